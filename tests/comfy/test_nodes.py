"""What ComfyUI is told of the nodes, in both of its forms; nodes that come of the registry; and every node run once."""

from __future__ import annotations

import json
import math
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from fakes import VAE, FakeHost, First, Patcher, Red
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffsteer import registry
from diffsteer.comfy import catalogue
from diffsteer.comfy import fields as widgets_of
from diffsteer.comfy.host import Host
from diffsteer.comfy.node import REWARD, RUN, STEERING, Input, Node, Shown, as_v1, as_v3
from diffsteer.guidance import Guidance
from diffsteer.reward import Reward
from diffsteer.samplers import BestOfN, FeynmanKac
from diffsteer.types import DiffsteerError, setting

NODES = {node.id: node for node in catalogue.nodes(FakeHost())}


@pytest.mark.parametrize("node", NODES.values(), ids=lambda n: n.id)
def test_v1_says_what_the_node_is(node: Node) -> None:
    made: Any = as_v1(node)
    told = made.INPUT_TYPES()
    both = {**told["required"], **told["optional"]}
    assert list(both) == [i.name for i in sorted(node.inputs, key=lambda i: i.optional)]
    for i in node.inputs:
        kind, options = both[i.name]
        if i.is_widget:
            assert "default" in options
        if i.type == "COMBO":
            assert kind == i.listed() and options["default"] in kind
        else:
            assert kind == i.type
        if "min" in options:
            assert options["min"] <= options["default"] <= options["max"]
    assert len(made.RETURN_TYPES) == len(made.RETURN_NAMES) == len(node.outputs)
    assert made.CATEGORY == "diffsteer" and made.FUNCTION == "run" and node.description
    assert hasattr(made, "VALIDATE_INPUTS") == bool(node.widgets)
    if node.widgets:
        defaults = {w.name: w.default for w in node.widgets}
        assert made.VALIDATE_INPUTS(**defaults) is True or node.id in ("DiffsteerReward_aesthetic", "DiffsteerReward_program")


class FakeIO:
    """The names of ComfyUI's V3 interface that nodes use."""

    class _Entry:
        def __init__(self, *place: Any, **named: Any) -> None:
            self.place, self.named = place, named

    def __init__(self) -> None:
        self.ComfyNode = type("ComfyNode", (), {})
        self.Schema = self.NodeOutput = FakeIO._Entry
        for name in ("Int", "Float", "String", "Boolean", "Combo"):
            setattr(self, name, types.SimpleNamespace(Input=FakeIO._Entry))

    def Custom(self, kind: str) -> Any:
        return types.SimpleNamespace(Input=FakeIO._Entry, Output=FakeIO._Entry, kind=kind)


@pytest.mark.parametrize("node", NODES.values(), ids=lambda n: n.id)
def test_v3_says_the_same(node: Node) -> None:
    schema = as_v3(node, FakeIO()).define_schema().named  # type: ignore[attr-defined]
    assert schema["node_id"] == node.id and [i.place[0] for i in schema["inputs"]] == [i.name for i in node.inputs]
    assert [i.named["optional"] for i in schema["inputs"]] == [i.optional for i in node.inputs]
    ids = [i.place[0] for i in schema["inputs"]] + [o.place[0] for o in schema["outputs"]]
    assert len(ids) == len(set(ids))  # V3 refuses an output of an input's name


def test_both_forms_run_and_complain_alike() -> None:
    def run(weight: float, graph: Any = None, extra: Any = None) -> Any:
        return Shown({"text": [graph]}, (2 * weight,))

    def check(weight: float) -> None:
        if weight == 3:
            raise DiffsteerError("three is wrong")

    bounds = {"min": 0.0, "max": 5.0}
    node = Node(
        "N", "N", "n", (Input("weight", "FLOAT", "", 1.0, bounds),), (("FLOAT", "twice"),), run, check, ("weight",), True
    )
    v1: Any = as_v1(node)
    assert v1().run(weight=2.0, graph="g", extra=None) == {"ui": {"text": ["g"]}, "result": (4.0,)}
    assert v1.INPUT_TYPES()["hidden"] == {"graph": "PROMPT", "extra": "EXTRA_PNGINFO"}
    v3: Any = as_v3(node, FakeIO())
    v3.hidden = types.SimpleNamespace(prompt="g", extra_pnginfo=None)
    made = v3.execute(weight=2.0)
    assert made.place == (4.0,) and made.named["ui"] == {"text": ["g"]}
    for validate in (v1.VALIDATE_INPUTS, v3.validate_inputs):
        assert validate(weight=2.0) is True
        assert validate(weight=None) is True  # over a link: not known yet
        assert validate(weight=3.0) == "three is wrong"
        assert "lies in [0.0, 5.0]" in validate(weight=9.0)
    plain: Any = as_v1(Node("M", "M", "m", (), (("INT", "one"),), lambda: (1,)))
    assert plain().run() == (1,)


@pytest.mark.parametrize(
    ("id", "changed", "said"),
    [
        ("DiffsteerSampler_fk", {"threshold": 0.4}, "must exceed target_ess"),
        ("DiffsteerSampler_fk", {"potential": "min"}, "valid: difference, max"),
        ("DiffsteerSampler_fk", {"potential": "max"}, "set scale and target_ess"),
        ("DiffsteerSampler_fk", {"events": "0.5, two"}, "events="),
        ("DiffsteerSampler_fk", {"events": "[0.5"}, "cannot be read"),
        ("DiffsteerSampler_fk", {"eta": 0.0}, "set eta in"),
        ("DiffsteerReward_clip", {"pretrained": "x"}, "needs a model_name"),
        ("DiffsteerReward_compressibility", {"quality": 101}, "lies in [1, 100]"),
        ("DiffsteerKSampler", {"scheduler": "simpel"}, "valid: simple, karras"),
        ("DiffsteerKSampler", {"particles": 0}, "lies in [1, 1024]"),
        ("DiffsteerGuider", {"lowest": 0.9, "highest": 0.2}, "wanted 0 <= lowest <= highest"),
        ("DiffsteerSchedule_karras", {"rho": 0.5}, "lies in [1,"),
        ("DiffsteerKSampler", {"steps": 2.5}, "steps=2.5 is no whole number"),
        ("DiffsteerKSampler", {"cfg": "high"}, "cfg='high' is no number"),
    ],
)
def test_wrong_values_are_complained_of(id: str, changed: dict[str, Any], said: str) -> None:
    given = {w.name: w.default for w in NODES[id].widgets} | changed
    assert said in str(NODES[id].complaint(given))


def test_what_comes_over_a_link_hinders_no_other_complaint() -> None:
    node = NODES["DiffsteerSampler_fk"]
    given = {w.name: w.default for w in node.widgets}
    assert "must exceed" in str(node.complaint({**given, "threshold": 0.4, "prompt": None}))
    assert node.complaint({**given, "potential": "max", "scale": None}) is True  # it may be just what is missing


FK = st.fixed_dictionaries(
    {},
    optional={
        "scale": st.none() | st.floats(0.5, 50),
        "target_ess": st.floats(0.1, 0.5),
        "resampling": st.sampled_from(["ssp", "systematic"]),
        "threshold": st.floats(0.6, 1),
        "events": st.sampled_from(["all", 3, (0.5,), (0.2, 0.4, 0.75)]),
        "eta": st.floats(0.1, 1),
    },
)


@given(FK)
def test_widgets_say_all_that_a_sampler_is(options: dict[str, Any]) -> None:
    sampler = FeynmanKac(particles=3, **options)
    shown = {f.name: widgets_of.shown(FeynmanKac, sampler, f.name) for f in fields(FeynmanKac)}
    assert json.loads(json.dumps(shown)) == shown  # as a graph's file has them
    assert FeynmanKac(**widgets_of.values(FeynmanKac, shown)) == sampler


def test_every_method_reward_and_guidance_comes_back_from_its_default_widgets() -> None:
    from diffsteer.rewards import ClipScore

    for cls in (FeynmanKac, BestOfN, Guidance):
        defaults = {w.name: w.default for w in widgets_of.widgets(cls)}
        assert cls(**widgets_of.values(cls, defaults)) == cls()
    clip = ClipScore(**widgets_of.values(ClipScore, {w.name: w.default for w in widgets_of.widgets(ClipScore)}))
    assert (clip.model_name, clip.pretrained, clip.resize) == (None, None, "squash")
    assert all(w.tooltip for cls in (FeynmanKac, BestOfN, Guidance, ClipScore) for w in widgets_of.widgets(cls))


@dataclass(frozen=True)
class Theirs(BestOfN):
    """A method of another package.

    Args:
        mood: cheerful | grim.
        depth: of its thoughts, or None.
        offset: any number, or None.
    """

    mood: str = setting("grim", choices=("cheerful", "grim"))
    depth: int | None = setting(None, low=0)
    offset: float | None = None

    name: ClassVar[str] = "theirs"


@dataclass(frozen=True)
class Gradient(BestOfN):
    """A method that needs gradients."""

    name: ClassVar[str] = "gradient"
    needs_grad: ClassVar[bool] = True


class Score(Red):
    """A reward of another package."""

    name = "score_of_theirs"


def test_methods_and_rewards_of_other_packages_are_nodes_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    methods: dict[str, Any] = {"theirs": Theirs, "gradient": Gradient}
    more: dict[str, dict[str, Any]] = {"sampler": methods, "reward": {"score_of_theirs": Score}}
    before = registry.registered
    found: Callable[[str], dict[str, Any]] = lambda kind: {**before(kind), **more.get(kind, {})}  # noqa: E731
    monkeypatch.setattr(catalogue, "registered", found)
    monkeypatch.setattr("diffsteer.comfy.sampling.registered", found)
    nodes = {node.id: node for node in catalogue.nodes(FakeHost())}
    assert "DiffsteerSampler_gradient" not in nodes  # this node samples without gradients
    assert nodes["DiffsteerReward_score_of_theirs"].run()[0].name == "score_of_theirs"
    theirs = nodes["DiffsteerSampler_theirs"]
    kinds = {w.name: (w.type, w.default, w.tooltip) for w in theirs.widgets}
    assert kinds["mood"] == ("COMBO", "grim", "cheerful | grim.")
    assert kinds["depth"] == ("INT", -1, "of its thoughts, or None. (-1: not set)")
    assert kinds["offset"] == ("STRING", "", "any number, or None.")
    given = {w.name: w.default for w in theirs.widgets}
    _, steering = theirs.run(**given | {"offset": "-2.5", "depth": 0})
    assert steering.options == {"eta": 1.0, "mood": "grim", "depth": 0, "offset": -2.5}
    assert theirs.run(**given)[1].options["depth"] is None
    assert nodes["DiffsteerKSampler"].widgets[1].listed() == ["fk", "best_of_n", "theirs"]


def test_a_plug_in_that_can_be_no_node_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Clash(BestOfN):
        noise: float = 0.5
        name: ClassVar[str] = "clash"

    before = registry.registered
    more: dict[str, dict[str, Any]] = {"sampler": {"clash": Clash}}
    monkeypatch.setattr(catalogue, "registered", lambda kind: {**before(kind), **more.get(kind, {})})
    with pytest.warns(UserWarning, match="the sampler clash is no node: .* two inputs 'noise'"):
        assert {node.id for node in catalogue.nodes(FakeHost())} == set(NODES)


def test_names_for_comfyui_with_and_without_v3(monkeypatch: pytest.MonkeyPatch) -> None:
    names = catalogue.for_comfyui()  # no ComfyUI here
    assert set(names) == {"NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"}
    assert set(names["NODE_CLASS_MAPPINGS"]) == set(NODES) == set(names["NODE_DISPLAY_NAME_MAPPINGS"])
    api: Any = types.ModuleType("comfy_api.v0_0_2")
    api.ComfyExtension, api.io = type("ComfyExtension", (), {}), FakeIO()
    monkeypatch.setitem(sys.modules, "comfy_api", types.ModuleType("comfy_api"))
    monkeypatch.setitem(sys.modules, "comfy_api.v0_0_2", api)
    monkeypatch.setattr(Host, "scheduler_names", FakeHost.scheduler_names)
    entry = catalogue.for_comfyui()["comfy_entrypoint"]

    def now(coroutine: Any) -> Any:
        with pytest.raises(StopIteration) as done:
            coroutine.send(None)
        return done.value.value

    listed = now(now(entry()).get_node_list())
    assert [n.define_schema().named["node_id"] for n in listed] == list(NODES)


def run(id: str, host: FakeHost | None = None, **given: Any) -> Any:
    node = {n.id: n for n in catalogue.nodes(host)}[id] if host else NODES[id]
    defaults = {w.name: w.default for w in node.widgets}
    with torch.inference_mode():
        return node.run(**defaults | given)


CONDITIONS: dict[str, Any] = {"positive": 0.4, "negative": -0.2, "cfg": 3.0}


def all_in_one(rows: int = 2, **given: Any) -> Any:
    latent = {"samples": torch.zeros(rows, 4, 4, 4), "batch_index": list(range(rows))}
    model: dict[str, Any] = {"model": Patcher(), "vae": VAE(), "reward": Red(), "latent_image": latent}
    return run("DiffsteerKSampler", **CONDITIONS, **model | {"steps": 6, "particles": 3, "seed": 2} | given)


def test_the_all_in_one_sampler() -> None:
    images, latent, record = all_in_one()
    assert images.shape == (2, 8, 8, 3) and latent["samples"].shape == (2, 4, 4, 4) and latent["batch_index"] == [0, 1]
    scores = images[..., 0].flatten(1).mean(1)
    torch.testing.assert_close(scores.double(), record.rewards.max(1).values, rtol=1e-5, atol=1e-6)
    everyone, _, _ = all_in_one(output="all")
    assert everyone.shape == (6, 8, 8, 3) and bool((everyone[:3, ..., 0].flatten(1).mean(1).diff() <= 1e-6).all())
    _, _, plain = all_in_one(method="best_of_n", particles=1)
    assert plain.settings["sampler"] == "best_of_n" and plain.ledger.decodes == 2
    half, _, record = all_in_one(denoise=0.5, latent_image={"samples": torch.randn(1, 4, 4, 4)})
    assert half.shape[0] == 1 and record.settings["steps"] == 6


def test_the_all_in_one_sampler_changes_only_what_the_mask_says() -> None:
    picture = torch.randn(2, 4, 4, 4)
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, ..., :2] = mask[1, ..., 2:] = 1  # another one for each picture
    _, latent, _ = all_in_one(latent_image={"samples": picture, "noise_mask": mask})
    made = latent["samples"]
    torch.testing.assert_close(made[0][..., 2:], picture[0][..., 2:])
    torch.testing.assert_close(made[1][..., :2], picture[1][..., :2])
    assert not torch.allclose(made[0][..., :2], picture[0][..., :2]) and torch.equal(latent["noise_mask"], mask)


def test_the_all_in_one_sampler_gives_each_picture_noise_of_its_own() -> None:
    """The first picture of two is the picture alone, and the second is keyed as the second."""
    two = all_in_one(rows=2, output="all", method="best_of_n")[1]["samples"]
    one = all_in_one(rows=1, output="all", method="best_of_n")[1]["samples"]
    torch.testing.assert_close(two[:3], one)
    assert not torch.allclose(two[3:], one)


def test_drafts_start_from_noise_alone() -> None:
    asked = []

    class Asked(FakeHost):
        def sigmas(self, model: Any, scheduler: str, steps: int, denoise: float) -> Any:
            asked.append((scheduler, steps, denoise))
            return super().sigmas(model, scheduler, steps, denoise)

    given: dict[str, Any] = {"model": Patcher(), "vae": VAE(), "reward": Red(), "candidates": 2, "draft_steps": 5}
    latent = {"samples": torch.zeros(1, 4, 4, 4)}
    run("DiffsteerNoiseSearch", Asked(), latent_image=latent, **CONDITIONS, **given, scheduler="karras")
    assert asked == [("karras", 5, 1.0)]


def test_the_all_in_one_sampler_is_the_parts() -> None:
    latents = all_in_one(rows=1, particles=4, output="all")[1]["samples"]
    sampler, steering = run("DiffsteerSampler_fk", reward=Red(), vae=VAE())
    host, model = FakeHost(), Patcher()
    guider = host.guider_class()(model)
    guider.set_conds(0.4, -0.2)
    guider.set_cfg(3.0)
    latent = {"samples": torch.zeros(4, 4, 4, 4)}
    (noise,) = run("DiffsteerNoise", seed=2)
    with torch.inference_mode():
        sigmas = host.sigmas(model, "simple", 6, 1.0)
        made = guider.sample(noise.generate_noise(latent), latent["samples"], sampler, sigmas, seed=noise.seed)
    kept, record = run("DiffsteerSelect", latent={"samples": made}, steering=steering, output="all")
    torch.testing.assert_close(kept["samples"], latents)
    text = run("DiffsteerLedger", run=record)[0]
    assert "sampler: fk" in text and "(best)" in text and str(record.ledger) in text and "after step 6" in text
    (picture,) = run("DiffsteerLineage", run=record)
    assert picture.ndim == 4 and picture.shape[-1] == 3 and 0 <= float(picture.min()) < float(picture.max()) <= 1


def test_the_noise_search_finds_what_its_drafts_say() -> None:
    given: dict[str, Any] = {"model": Patcher(), "vae": VAE(), "reward": Red(), "seed": 4, "candidates": 7, "draft_steps": 5}
    latent = {"samples": torch.zeros(3, 4, 4, 4)}
    found, record = run("DiffsteerNoiseSearch", latent_image=latent, **CONDITIONS, **given)
    assert record.ledger.evaluations == 7 * 5 * 2 and found.noises.shape == (7, 4, 4, 4)
    (every,) = run("DiffsteerNoise", seed=4)
    tried = every.generate_noise({"samples": torch.zeros(7, 4, 4, 4)})
    assert torch.equal(found.generate_noise(latent), tried[record.rewards[0].argsort(descending=True)[:3]])


def test_images_are_scored_and_sorted() -> None:
    images = torch.rand(20, 6, 6, 3)
    images[3] = math.nan
    red = images[..., 0].flatten(1).mean(1)
    made, text = run("DiffsteerScore", images=images, reward=Red(), keep=0)
    order = red.nan_to_num(nan=-1.0).argsort(descending=True)
    assert torch.equal(made[:19], images[order[:19]]) and bool(made[19].isnan().all())
    assert text.splitlines()[0].startswith(f"image {int(order[0]) + 1}: ") and len(text.splitlines()) == 20
    assert len(run("DiffsteerScore", images=images, reward=Red(), keep=2)[0]) == 2
    with pytest.raises(DiffsteerError, match="looks at latents"):
        run("DiffsteerScore", images=images, reward=First())


def test_rewards_add() -> None:
    (both,) = run("DiffsteerRewardSum", a=Red(), b=Red(), weight_a=2.0, weight_b=-0.5)
    (one,) = run("DiffsteerRewardSum", a=Red(), weight_a=2.0)
    x = torch.rand(3, 3, 4, 4)
    scores = Red().score(x, [], None)  # type: ignore[arg-type]
    torch.testing.assert_close(both.score(x, [""] * 3, None), 1.5 * scores)
    torch.testing.assert_close(one.score(x, [""] * 3, None), 2 * scores)


def test_rewards_are_made_outside_inference_mode() -> None:
    (reward,) = run("DiffsteerReward_compressibility", quality=50)
    assert isinstance(reward, Reward) and reward.quality == 50  # type: ignore[attr-defined]
    made = []

    class Loads(Red):
        """A reward that loads at once."""

        name = "loads"

        def __init__(self) -> None:
            made.append(torch.zeros(1).is_inference())

    from diffsteer.comfy.registered import reward_node

    with torch.inference_mode():
        reward_node("loads", Loads).run()
    assert made == [False]


@pytest.mark.parametrize("path", ["edm", "flow"])
@pytest.mark.parametrize("name", ["karras", "log_snr", "flow_time"])
def test_schedules_are_sigmas_of_the_model(name: str, path: str) -> None:
    model = Patcher(path)
    (sigmas,) = run(f"DiffsteerSchedule_{name}", model=model, steps=9)
    sampling = model.model.model_sampling
    assert sigmas.dtype == torch.float32 and len(sigmas) == 10 and float(sigmas[-1]) == 0
    assert float(sigmas[0]) == sampling.sigma_max and float(sigmas[-2]) == pytest.approx(sampling.sigma_min, rel=1e-4)
    (half,) = run(f"DiffsteerSchedule_{name}", model=model, steps=9, denoise=0.5)
    assert len(half) == 10 and float(half[0]) < sampling.sigma_max


def test_pictures_carry_graph_settings_and_cost(tmp_path: Path) -> None:
    images, _, record = all_in_one()
    shown = run(
        "DiffsteerSave",
        FakeHost(tmp_path),
        images=images,
        run=record,
        graph={"1": {"class_type": "X"}},
        extra={"workflow": {"nodes": []}},
    )
    files = [tmp_path / i["subfolder"] / i["filename"] for i in shown.ui["images"]]
    assert [f.name for f in files] == ["steered_00001_.png", "steered_00002_.png"]
    with Image.open(files[0]) as image:
        said = {key: json.loads(text) for key, text in image.text.items()}  # type: ignore[attr-defined]
    assert said["prompt"] == {"1": {"class_type": "X"}} and said["workflow"] == {"nodes": []}
    about = said["diffsteer"]
    assert about["settings"]["sampler"] == "fk" and about["settings"]["seed"] == 2
    assert about["ledger"] == record.ledger.counts and len(about["rewards"]) == 2


def test_sockets_of_our_own_are_the_three() -> None:
    ours = {kind for node in NODES.values() for kind, _ in node.outputs if kind.startswith("DIFFSTEER")}
    assert ours == {REWARD, STEERING, RUN}
