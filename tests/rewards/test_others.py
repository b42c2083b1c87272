"""Other people's rewards: against their own arithmetic where it is to be had, and everything that can be given wrongly."""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models_of_others
import pytest
import torch
import torch.nn.functional as F
from models_of_others import PATCH, SIDE, WIDTH, judge
from PIL import Image, ImageStat
from torch import Tensor, nn

from diffsteer import rewards
from diffsteer.media import picture_of
from diffsteer.rewards.image_reward import CENTRE, MEAN, SCALE, STD
from diffsteer.rewards.open_clip_model import fit
from diffsteer.rewards.remote_judge import number_in
from diffsteer.types import Context, DiffsteerError, RewardError

CTX = Context()
PROMPTS = ["a red star", "two blue rings", "a yellow star left of a ring", "a cross", "the star"]


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("others")
    models_of_others.make(folder)
    return folder


# ------------------------------------------------------------------------------------------------------- ImageReward


def attention(state: dict[str, Tensor], name: str, x: Tensor, other: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = (
        F.linear(at, state[f"{name}.self.{part}.weight"], state[f"{name}.self.{part}.bias"])
        for at, part in ((x, "query"), (other, "key"), (other, "value"))
    )
    scores = q @ k.transpose(1, 2) / WIDTH**0.5
    scores = scores if mask is None else scores.masked_fill(mask[:, None] == 0, float("-inf"))
    out = F.linear(scores.softmax(-1) @ v, state[f"{name}.output.dense.weight"], state[f"{name}.output.dense.bias"])
    return norm(state, f"{name}.output.LayerNorm", x + out, 1e-12)


def norm(state: dict[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], eps)


def linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def by_hand(state: dict[str, Tensor], pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """What ImageReward computes, written from the papers' equations on the checkpoint's own names; one head of 64 a tower."""
    see, read = "blip.visual_encoder", "blip.text_encoder"
    x = F.conv2d(pixels, state[f"{see}.patch_embed.proj.weight"], state[f"{see}.patch_embed.proj.bias"], PATCH)
    x = torch.cat([state[f"{see}.cls_token"].expand(len(x), 1, WIDTH), x.flatten(2).transpose(1, 2)], 1)
    x = x + state[f"{see}.pos_embed"]
    for i in range(2):
        block = f"{see}.blocks.{i}"
        q, k, v = linear(state, f"{block}.attn.qkv", norm(state, f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(state, f"{block}.attn.proj", (q @ k.transpose(1, 2) / WIDTH**0.5).softmax(-1) @ v)
        inner = F.gelu(linear(state, f"{block}.mlp.fc1", norm(state, f"{block}.norm2", x, 1e-6)))
        x = x + linear(state, f"{block}.mlp.fc2", inner)
    seen = norm(state, f"{see}.norm", x, 1e-6)
    y = state[f"{read}.embeddings.word_embeddings.weight"][ids]
    y = y + state[f"{read}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    y = norm(state, f"{read}.embeddings.LayerNorm", y, 1e-12)
    for i in range(2):
        layer = f"{read}.encoder.layer.{i}"
        y = attention(state, f"{layer}.attention", y, y, mask)
        y = attention(state, f"{layer}.crossattention", y, seen, None)
        inner = F.gelu(linear(state, f"{layer}.intermediate.dense", y))
        y = norm(state, f"{layer}.output.LayerNorm", y + linear(state, f"{layer}.output.dense", inner), 1e-12)
    z = y[:, 0]
    for i in (0, 2, 4, 6, 7):
        z = linear(state, f"mlp.layers.{i}", z)
    return (z[:, 0] - CENTRE) / SCALE


def test_image_reward_is_what_its_checkpoint_says(others: Path, images: Tensor) -> None:
    state = torch.load(others / "ImageReward.pt", weights_only=True)
    words = models_of_others.vocabulary()
    rows = [["[CLS]", *p.split(), "[SEP]"] for p in PROMPTS]
    ids = torch.tensor([[words[w] for w in row] + [0] * (35 - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (35 - len(row)) for row in rows])
    x = (fit(images, (SIDE, SIDE), "squash") - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)
    with torch.no_grad():
        wanted = by_hand(state, x, ids, mask)
        found = rewards.ImageReward(str(others / "ImageReward.pt"), str(others / "bert")).score(images, PROMPTS, CTX)
    assert float(wanted.std()) > 0.01
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_pick_score_is_that_of_transformers(others: Path, images: Tensor) -> None:
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    square = images[..., :40, :40]
    model, read = CLIPModel.from_pretrained(others / "pick").eval(), AutoTokenizer.from_pretrained(others / "pick")
    see = CLIPImageProcessor.from_pretrained(others / "pick")
    with torch.no_grad():
        pixels = see([picture_of(x) for x in square], return_tensors="pt").pixel_values
        wanted = [
            float(model(pixel_values=pixels[i : i + 1], **read([p], return_tensors="pt")).logits_per_image)
            for i, p in enumerate(PROMPTS)
        ]
        found = rewards.PickScore(str(others / "pick"), str(others / "pick")).score(square, PROMPTS, CTX)
    assert max(wanted) - min(wanted) > 0.1
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=0, atol=0.05)  # their pictures are rounded to whole levels


def test_vqa_score_is_the_probability_of_yes(others: Path, images: Tensor) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(others / "vqa").eval()
    processor = AutoProcessor.from_pretrained(others / "vqa")
    text = '<image> Does this figure show "a red star"? Please answer yes or no.'
    with torch.no_grad():
        told = processor(images=picture_of(images[0]), text=text, return_tensors="pt")
        last = model(**told).logits[0, -1].softmax(0)
    wanted = float(last[processor.tokenizer.convert_tokens_to_ids("yes")])
    found = rewards.VqaScore(str(others / "vqa")).score(images[:1], ["a red star"], CTX)
    assert float(found) == pytest.approx(wanted, rel=1e-4)
    blank = images[:2].clone()
    blank[1] = float("nan")
    assert rewards.VqaScore(str(others / "vqa")).score(blank, PROMPTS[:2], CTX).isnan().tolist() == [False, True]


def test_hps_is_the_cosine_of_that_checkpoint(clip_folder: Path, images: Tensor, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    state = load_file(clip_folder / "open_clip_model.safetensors")
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "HPS.pt")
    name = f"local-dir:{clip_folder}"
    clip = rewards.ClipScore(name, resize="pad").score(images, PROMPTS, CTX)
    found = rewards.HumanPreference(str(tmp_path / "HPS.pt"), name).score(images, PROMPTS, CTX)
    torch.testing.assert_close(found, clip / 100, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- classifiers


class Net(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 16, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(F.adaptive_avg_pool2d(x, 4).flatten(1))
        return out


@pytest.fixture
def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return Net()


def test_a_module_an_exported_program_and_onnx_say_the_same(net: Net, images: Tensor, tmp_path: Path) -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.export.save(
        torch.export.export(net, (torch.zeros(2, 3, 16, 16),), dynamic_shapes=({0: batch},)), tmp_path / "any.pt2"
    )
    torch.export.save(torch.export.export(net, (torch.zeros(4, 3, 16, 16),)), tmp_path / "four.pt2")
    for name, rows in (("any.onnx", None), ("two.onnx", 2)):
        save_onnx(net, tmp_path / name, rows)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    wanted = rewards.Classifier(net.train(), 1, size=16).score(images, PROMPTS, CTX)
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())  # the user's stays as it was
    assert all(p.requires_grad for p in net.parameters())
    for name, rows in (("any.pt2", None), ("four.pt2", 4), ("any.onnx", None), ("two.onnx", None)):
        reward = rewards.Classifier(str(tmp_path / name), 1, size=16, rows=rows, trust=True)
        torch.testing.assert_close(reward.score(images, PROMPTS, CTX), wanted, rtol=1e-4, atol=1e-5)
        assert reward.differentiable == name.endswith("pt2")
    x = images.clone().requires_grad_()
    live = rewards.Classifier(str(tmp_path / "any.pt2"), 1, size=16, trust=True).score(x, PROMPTS, CTX)
    (gradient,) = torch.autograd.grad(live.sum(), x)
    assert bool(gradient.flatten(1).any(1).all())


def save_onnx(net: Net, path: Path, rows: int | None) -> None:
    """An ONNX file of the same network, written by hand: torch's exporter wants packages of its own."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    pool = helper.make_node("AveragePool", ["x"], ["pooled"], kernel_shape=[4, 4], strides=[4, 4])
    flat = helper.make_node("Flatten", ["pooled"], ["flat"])
    head = helper.make_node("Gemm", ["flat", "w", "b"], ["y"], transB=1)
    weights = [numpy_helper.from_array(v.detach().numpy(), k) for k, v in (("w", net.head.weight), ("b", net.head.bias))]
    entry = helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows or "n", 3, 16, 16])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows or "n", 3])
    model = helper.make_model(
        helper.make_graph([pool, flat, head], "net", [entry], [result], weights),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=9,
    )
    onnx.save(model, path)


def test_outputs_of_a_classifier(net: Net, images: Tensor) -> None:
    logits = torch.stack([rewards.Classifier(net, k, size=16).score(images, PROMPTS, CTX) for k in range(3)], 1)
    chances = torch.stack([rewards.Classifier(net, k, "probability", size=16).score(images, PROMPTS, CTX) for k in range(3)], 1)
    logs = rewards.Classifier(net, 2, "log_probability", size=16).score(images, PROMPTS, CTX)
    torch.testing.assert_close(chances, logits.softmax(1))
    torch.testing.assert_close(logs, logits.log_softmax(1)[:, 2])
    alone = rewards.Classifier(Net(1), 0, "probability", size=16)
    assert alone.range == (0.0, 1.0)
    torch.testing.assert_close(
        alone.score(images, PROMPTS, CTX), rewards.Classifier(alone.model, 0, size=16).score(images, PROMPTS, CTX).sigmoid()
    )


# --------------------------------------------------------------------------------------------- a judge behind HTTP


def test_a_judge_keeps_answers_with_their_pictures(images: Tensor) -> None:
    """Whatever order they come in; each picture is asked about once, and the key goes with it."""
    seen: list[dict[str, Any]] = []
    slow = iter([0.3, 0.0, 0.2, 0.0, 0.1, *[0.0] * 20])
    lock = threading.Lock()

    def answer(body: dict[str, Any], picture: Image.Image, question: str) -> tuple[int, str]:
        with lock:
            pause = next(slow)
        time.sleep(pause)
        return models_of_others.brightness_in_words(body, picture, question)

    with judge(answer, seen) as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUDGE_KEY", "a secret")
        reward = rewards.RemoteJudge(url, "some-model", parallel=3, key="JUDGE_KEY")
        found = reward.score(images, PROMPTS, CTX)
        again = reward.score(images.flip(0), PROMPTS[::-1], CTX)
    grey = [ImageStat.Stat(picture_of(x).convert("L")).mean[0] for x in images]
    wanted = torch.tensor([g / 32 + len(p) / 100 for g, p in zip(grey, PROMPTS, strict=True)])
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-3)
    assert torch.equal(again.flip(0), found) and len(seen) == 5
    assert {s["path"] for s in seen} == {"/v1/chat/completions"} and {s["key"] for s in seen} == {"Bearer a secret"}
    assert {s["model"] for s in seen} == {"some-model"} and all(s["temperature"] == 0 for s in seen)


def test_an_endpoint_that_refuses_to_be_told_is_not_told(images: Tensor) -> None:
    bodies: list[dict[str, Any]] = []

    def answer(body: dict[str, Any], picture: Image.Image, question: str) -> tuple[int, str]:
        bodies.append(body)
        return 200, "5"

    for options in ({}, {"max_tokens": None, "temperature": None}, {"max_tokens": 4000}):
        with judge(answer, []) as url:
            rewards.RemoteJudge(url, "m", **options).score(images[:1], ["a"], CTX)
    told = [{k: body.get(k) for k in ("max_tokens", "temperature")} for body in bodies]
    assert [t["max_tokens"] for t in told] == [16, None, 4000] and [t["temperature"] for t in told] == [0, None, 0]


def replies(*said: tuple[int, str]) -> Any:
    left: Iterator[tuple[int, str]] = iter(said)
    return lambda body, picture, question: next(left)


def test_a_judge_asks_again(images: Tensor) -> None:
    seen: list[dict[str, Any]] = []
    with judge(replies((503, "busy"), (429, "slowly"), (200, "none of it"), (200, "11"), (200, "7 of 10")), seen) as url:
        found = rewards.RemoteJudge(url, "m", retries=4).score(images[:1], ["a"], CTX)
    assert found.tolist() == [7.0] and len(seen) == 5


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("7", 7),
        (" 7.5/10", 7.5),
        ("**8** of 10", 8),
        ("I would say 3.", 3),
        ("From 0 to 10: 7", None),
        ("none", None),
        ("-1", -1),
        ("Rating: 7/10", 7),
        ("<think>It has 2 of 3 things.</think>\n7", 7),
        ("7,5", None),
        ("1,000", None),
        ("1e1", 10),
        ("8 out of 10", 8),
        ("3/4 of it, so 7", 3),
        ("<think>It has 3 circles and", None),
        ("It has 3 circles.</think>7", 7),
    ],
)
def test_which_number_is_meant(answer: str, number: float | None) -> None:
    assert number_in(answer) == number


def test_of_an_answer_that_was_cut_off_only_its_beginning_counts() -> None:
    assert number_in("The picture shows 3 circles and", cut=True) is None and number_in("7. It shows", cut=True) == 7


@pytest.mark.parametrize("wrong", [{"max_tokens": 0}, {"max_tokens": 2.5}, {"temperature": -1.0}, {"temperature": math.inf}])
def test_what_no_endpoint_takes_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(DiffsteerError, match=f"{next(iter(wrong))}=.*; wanted"):
        rewards.RemoteJudge("http://127.0.0.1:9/v1", "m", **wrong)


def test_equal_pictures_are_asked_about_once_and_a_refused_one_is_its_own_matter(images: Tensor) -> None:
    seen: list[dict[str, Any]] = []
    with judge(seen=seen) as url:
        found = rewards.RemoteJudge(url, "m").score(images[:1].expand(4, -1, -1, -1), ["a", "a", "b", "a"], CTX)
    assert len(seen) == 2 and found[0] == found[1] == found[3]
    with judge(lambda *of: (422, "not this one")) as url, pytest.raises(RewardError, match="422"):
        rewards.RemoteJudge(url, "m").score(images[:1], ["a"], CTX)


def test_an_answer_without_a_number_loses(images: Tensor) -> None:
    with (
        judge(lambda *of: (200, "a fine picture")) as url,
        pytest.warns(UserWarning, match="answered 'a fine picture', no number"),
    ):
        assert rewards.RemoteJudge(url, "m", retries=1).score(images[:1], ["a"], CTX).isnan().all()
    blank = torch.full((1, 3, 8, 8), float("nan"))
    assert rewards.RemoteJudge("http://127.0.0.1:9/v1", "m").score(blank, ["a"], CTX).isnan().all()  # nobody is asked


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((401, "who are you"), "answered 401 Unauthorized.*who are you"),
        ((500, "broken"), "answered 500"),
        ((0, "<html>"), "is no completion: <html>"),
    ],
)
def test_a_judge_that_refuses_is_named(images: Tensor, answer: tuple[int, str], said: str) -> None:
    with judge(lambda *of: answer) as url, pytest.raises(DiffsteerError, match=said):
        rewards.RemoteJudge(url, "m", retries=1).score(images[:1], ["a"], CTX)


def test_a_judge_that_is_not_there_or_sleeps(images: Tensor) -> None:
    with pytest.raises(DiffsteerError, match="127.0.0.1:9/v1/chat/completions does not answer"):
        rewards.RemoteJudge("http://127.0.0.1:9/v1", "m", retries=0).score(images[:1], ["a"], CTX)
    began = time.monotonic()

    def asleep(*of: Any) -> tuple[int, str]:
        time.sleep(3)
        return 200, "5"

    with judge(asleep) as url, pytest.raises(DiffsteerError, match="does not answer"):
        rewards.RemoteJudge(url, "m", retries=0, timeout=0.3).score(images[:1], ["a"], CTX)
    assert time.monotonic() - began < 30


# ------------------------------------------------------------------------------------------ what can be given wrongly

WRONG: list[tuple[Any, dict[str, Any], str]] = [
    (rewards.PickScore, {"resize": "stretch"}, "resize='stretch' is unknown; valid: squash, crop, pad"),
    (rewards.HumanPreference, {"resize": "stretch"}, "resize='stretch'"),
    (rewards.ImageReward, {"resize": "stretch"}, "resize='stretch'"),
    (rewards.VqaScore, {"question": "Is it?"}, "has no {prompt} in it"),
    (rewards.VqaScore, {"dtype": "int8"}, "dtype='int8' is unknown"),
    (rewards.RemoteJudge, {"question": "Is it?"}, "has no {prompt} in it"),
    (rewards.RemoteJudge, {"low": 5, "high": 5}, "low=5 is not below high=5"),
    (rewards.RemoteJudge, {"timeout": 0}, "timeout=0"),
    (rewards.RemoteJudge, {"retries": 1.5}, "retries=1.5 is no whole number"),
    (rewards.Classifier, {"output": "odds"}, "output='odds' is unknown"),
    (rewards.Classifier, {"label": -1}, "label=-1"),
    (rewards.Classifier, {"std": (1, 0, 1)}, "std above 0"),
    (rewards.Stability, {"views": 0}, "at least 1 view"),
    (rewards.Stability, {"noise": 2}, "noise in"),
    (rewards.Brightness, {"target": 1.5}, "target=1.5"),
    (rewards.Brightness, {"target": "light"}, "no number"),
    (rewards.Symmetry, {"axis": "diagonal"}, "axis='diagonal' is unknown"),
]


@pytest.mark.parametrize(("cls", "given", "said"), WRONG, ids=[f"{c.name} {k}" for c, k, _ in WRONG])
def test_wrong_options_are_refused(cls: Any, given: dict[str, Any], said: str) -> None:
    with pytest.raises(DiffsteerError, match=said):
        cls(**given)


def test_wrong_files_are_refused(others: Path, tmp_path: Path, images: Tensor) -> None:
    """Pickles that could run code, files of other layouts, nothing at all: in a line, and nothing is run."""

    def refused(reward: Any, said: str) -> None:
        with pytest.raises(DiffsteerError, match=said):
            reward.prepare(["a"], CTX)

    torch.save({"model": Net()}, tmp_path / "whole.pth")
    torch.save({"blip.text_encoder.other": torch.zeros(2)}, tmp_path / "other.pt")
    state = torch.load(others / "ImageReward.pt", weights_only=True)
    torch.save({k: v for k, v in state.items() if "mlp.layers.4.bias" not in k}, tmp_path / "lacking.pt")
    torch.save(state | {"mlp.layers.9.bias": torch.zeros(1)}, tmp_path / "more.pt")
    torch.save(state | {"mlp.layers.7.bias": torch.zeros(2)}, tmp_path / "shape.pt")
    (tmp_path / "text.pt2").write_text("nothing")
    (tmp_path / "text.onnx").write_text("nothing")
    (tmp_path / "net.pt").write_text("nothing")
    bert, name = str(others / "bert"), "local-dir:nowhere"
    for file, said in (
        ("whole.pth", "not a file of plain tensors, and other pickles can run code.*convert it"),
        ("nothing.pt", "there is no file .*nothing.pt.*ImageReward.pt of huggingface.co"),
        ("other.pt", "lacks vision.embeddings.patch_embedding.weight"),
        ("lacking.pt", "lacks head.4.bias"),
        ("more.pt", "holds head.9.bias, which this model has not"),
        ("shape.pt", r"head.7.bias has shape \[2\], not \[1\]"),
    ):
        refused(rewards.ImageReward(str(tmp_path / file), bert), said)
    refused(rewards.ImageReward(str(others / "ImageReward.pt"), str(tmp_path)), "is not that of the checkpoint")
    refused(rewards.HumanPreference(str(tmp_path / "whole.pth")), "not a file of plain tensors")
    refused(rewards.HumanPreference(str(others / "linear.safetensors"), name), "local-dir:nowhere could not be made")
    refused(rewards.PickScore(str(tmp_path), str(others / "pick")), "could not be loaded")
    refused(rewards.VqaScore(str(tmp_path)), "could not be loaded")
    refused(rewards.Classifier(str(tmp_path / "whole.pth")), "not a file of plain tensors")
    refused(rewards.Classifier(str(tmp_path / "other.pt")), "could hold any code, so it is not opened")
    refused(rewards.Classifier(str(tmp_path / "net.pt")), "could hold any code, so it is not opened")
    refused(rewards.Classifier(str(tmp_path / "text.pt2"), trust=True), "no program of torch.export")
    refused(rewards.Classifier(str(tmp_path / "text.pt2")), "torch can run any code that is in it")
    refused(rewards.Classifier(), "model=None; wanted an .onnx file")
    refused(rewards.RemoteJudge(), "url=None")
    refused(rewards.RemoteJudge("http://127.0.0.1"), "which model")
    pytest.importorskip("onnxruntime")
    refused(rewards.Classifier(str(tmp_path / "text.onnx")), "cannot be opened")
    with pytest.raises(DiffsteerError, match="with a class 9"):
        rewards.Classifier(Net(), 9, size=16).score(images, PROMPTS, CTX)


def test_loading_draws_nothing_from_the_global_state(others: Path) -> None:
    torch.manual_seed(0)
    wanted = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for reward in (
            rewards.ImageReward(str(others / "ImageReward.pt"), str(others / "bert")),
            rewards.PickScore(str(others / "pick"), str(others / "pick")),
            rewards.VqaScore(str(others / "vqa")),
        ):
            reward.prepare(["a star"], CTX)
    assert torch.equal(torch.get_rng_state(), wanted)
