"""The particle sampler on whatever a graph has: masks, parts of a schedule, blocks, records, and what it refuses."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from fakes import CONST, VAE, FakeHost, First, Guider, Inpainting, Interrupted, Patcher, Red
from torch import Tensor

from diffsteer.comfy.noise import FoundNoise, KeyedNoise, keyed
from diffsteer.comfy.sampling import sample
from diffsteer.comfy.session import levels_of
from diffsteer.comfy.steering import Record, Steering, indexed
from diffsteer.forecast import estimate
from diffsteer.reward import FunctionReward, Reward
from diffsteer.samplers import BestOfN, FeynmanKac
from diffsteer.types import DiffsteerError, UnsupportedError

SHAPE, STEPS, CONDITIONS = (4, 4, 4), 10, (0.4, -0.2, 3.0)
FK: dict[str, Any] = {"scale": 60.0, "target_ess": None, "events": (0.3, 0.6)}


def run(
    rows: int = 6,
    steps: int = STEPS,
    path: str = "edm",
    sigmas: Tensor | None = None,
    latent: dict[str, Any] | None = None,
    host: FakeHost | None = None,
    conditions: Any = CONDITIONS,
    seed: int = 1,
    **steering: Any,
) -> tuple[Tensor, Record, Steering, FakeHost]:
    host = host or FakeHost()
    given: dict[str, Any] = {"method": FeynmanKac, "options": FK, "reward": Red(), "vae": VAE(), "prompt": "any"}
    made = Steering(**given | steering, host=host)
    patcher = Patcher(path)
    latent = latent or {"samples": torch.zeros(rows, *SHAPE)}
    sigmas = host.sigmas(patcher, "simple", steps, 1.0) if sigmas is None else sigmas
    noise = KeyedNoise(seed).generate_noise(latent)
    with torch.inference_mode():
        samples, record = sample(host, made, patcher, conditions, latent, noise, sigmas, seed)
    return samples, record, made, host


@pytest.mark.parametrize("path", ["edm", "flow"])
def test_blocks_change_nothing_and_cost_what_is_declared(path: str) -> None:
    whole, record, _, _ = run(path=path)
    parts, pieces, _, _ = run(path=path, chunk=4)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    assert torch.equal(pieces.trace.events[0].ancestors, record.trace.events[0].ancestors)
    declared = estimate(FeynmanKac(6, **FK), 1, STEPS, guided=True, apart=True)
    assert record.ledger.counts == declared.counts
    assert pieces.ledger.forwards == 2 * declared.forwards and pieces.ledger.evaluations == declared.evaluations


def test_progress_comes_with_every_step_and_the_model_is_kept_after_each_decode() -> None:
    _, record, _, host = run(chunk=2)
    assert [step for step, _ in host.seen] == list(range(STEPS))
    assert all(len(x0) == 6 for _, x0 in host.seen)  # the whole batch, whatever the blocks
    assert host.reloads == record.ledger.decodes / 2


def test_the_last_progress_is_the_result() -> None:
    """SamplerCustomAdvanced makes its second output of it."""
    samples, _, _, host = run()
    torch.testing.assert_close(host.seen[-1][1] / 2, samples)


@pytest.mark.parametrize("stop_at", [1, 5, 9, 16])
def test_an_interrupt_ends_the_run_and_frees_its_tensors(stop_at: int) -> None:
    held: list[weakref.ref[Tensor]] = []

    host = FakeHost(stop_at=stop_at)
    steering = Steering(FeynmanKac, FK, 0, Red(), "any", VAE(), host=host)
    noise = torch.randn(6, *SHAPE)

    def model(x: Tensor, sigma: Tensor, **more: Any) -> Tensor:
        held.append(weakref.ref(x))
        return inside(x, sigma, **more)

    guider = Guider(Patcher())
    guider.set_conds(0.4, -0.2)
    guider.inner_model, guider.conds = guider.model_patcher.model, {}
    inside = Inpainting(guider, noise, torch.zeros(6, *SHAPE))
    model.inner_model = guider  # type: ignore[attr-defined]
    with pytest.raises(Interrupted):
        steering(model, noise * 10, torch.linspace(10, 0, STEPS + 1), extra_args={"seed": 0})
    assert not len(steering.records) and not guider.inner_model.diffusion_model._forward_hooks
    gc.collect()
    assert all(ref() is None for ref in held)
    again = FakeHost()
    run(host=again)
    assert again.seen  # and the next run is a run


def test_inpainting_keeps_the_picture_and_its_rows_follow_their_particles() -> None:
    pictures = torch.randn(6, *SHAPE)
    mask = torch.zeros(6, 1, 4, 4)
    mask[..., :2] = 1
    latent = {"samples": pictures, "noise_mask": mask}
    samples, record, _, _ = run(latent=latent)
    origin = record.trace.lineage()[-1, 0]
    assert len(set(origin.tolist())) < 6
    torch.testing.assert_close(samples[..., 2:], pictures[origin][..., 2:])
    assert not torch.allclose(samples[..., :2], pictures[origin][..., :2])
    torch.testing.assert_close(run(latent=latent, chunk=4)[0], samples, rtol=1e-5, atol=1e-6)


def test_latents_that_differ_in_a_corner_only_have_records_of_their_own() -> None:
    """As with a mask: everything else is the picture that is kept."""
    picture = torch.randn(1, 4, 64, 64).expand(4, -1, -1, -1).contiguous()
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 40:, 40:] = 1
    host, noises, records = FakeHost(), [], []
    steering = Steering(FeynmanKac, FK, 0, Red(), "any", VAE(), host=host)
    for seed in (1, 2):
        latent = {"samples": picture, "noise_mask": mask.expand(4, -1, -1, -1)}
        noise = KeyedNoise(seed).generate_noise(latent)
        sigmas = torch.linspace(10, 0, 6)
        samples, record = sample(host, steering, Patcher(), CONDITIONS, latent, noise, sigmas, seed)
        noises.append(samples)
        records.append(record)
    assert steering.record_of(noises[0]) is records[0] and steering.record_of(noises[1]) is records[1]
    with pytest.raises(DiffsteerError, match="not what this steering's sampler made"):
        steering.record_of(picture)


@pytest.mark.parametrize("path", ["edm", "flow"])
def test_both_outputs_of_a_part_of_a_schedule_are_known(path: str) -> None:
    top = 10.0 if path == "edm" else 1.0
    samples, record, steering, host = run(sigmas=torch.linspace(top, 0, STEPS + 1)[:6], path=path)
    assert steering.record_of(samples) is record
    assert steering.record_of(host.seen[-1][1] / 2) is record  # the clean estimates


def test_a_part_of_a_schedule_scores_clean_estimates() -> None:
    sigmas = torch.linspace(10, 0, STEPS + 1)
    samples, record, steering, host = run(sigmas=sigmas[:6])
    assert record.trace.events[-1].done == 5
    assert not torch.allclose(samples * 2, host.seen[-1][1])  # still noisy
    assert steering.vae is not None
    with torch.no_grad():
        scored = Red().score(steering.vae.decode(host.seen[-1][1] / 2).movedim(-1, 1), [], None)  # type: ignore[arg-type]
    torch.testing.assert_close(record.rewards[0].float(), scored)
    whole, _, _, _ = run(sigmas=sigmas, method=BestOfN, options={"eta": 0.0})
    first, _, _, _ = run(sigmas=sigmas[:6], method=BestOfN, options={"eta": 0.0})
    guided = Patcher()
    latent = {"samples": first}
    steering = Steering(BestOfN, {"eta": 0.0}, 0, Red(), "any", VAE(), host=FakeHost())
    rest, _ = sample(FakeHost(), steering, guided, CONDITIONS, latent, torch.zeros_like(first), sigmas[5:], 1)
    torch.testing.assert_close(rest, whole, rtol=1e-4, atol=1e-5)


def test_images_of_a_batch_have_particles_of_their_own() -> None:
    samples, record, _, _ = run(rows=6, particles=3)
    assert record.rewards.shape == (2, 3) and len(samples) == 6
    best = record.rows("best")
    assert [b // 3 for b in best] == [0, 1]
    assert best == [int(record.rewards[0].argmax()), 3 + int(record.rewards[1].argmax())]
    everyone = record.rows("all")
    assert sorted(everyone[:3]) == [0, 1, 2] and everyone[0] == best[0]
    flat = record.rewards.flatten()
    assert flat[everyone[0]] >= flat[everyone[1]] >= flat[everyone[2]]
    drawn = record.rows("draw")
    assert drawn == record.rows("draw") and [d // 3 for d in drawn] == [0, 1]


def test_the_record_of_latents_is_found_among_runs_and_for_no_others() -> None:
    host = FakeHost()
    steering = Steering(FeynmanKac, FK, 0, Red(), "any", VAE(), host=host)
    runs = []
    for seed in range(3):
        latent = {"samples": torch.zeros(4, *SHAPE)}
        noise, sigmas = keyed(seed, 4, 4, latent["samples"]), torch.linspace(10, 0, 6)
        runs.append(sample(host, steering, Patcher(), CONDITIONS, latent, noise, sigmas, seed))
    for samples, record in runs:
        assert steering.record_of(samples) is record
        assert steering.record_of(samples.half()) is record  # ComfyUI may keep latents in half precision
        assert steering.record_of(samples.bfloat16()) is record
    for strange in (runs[0][0] + 1, runs[0][0][:2], torch.zeros(4, 4, 8, 8)):
        with pytest.raises(DiffsteerError, match="not what this steering's sampler made"):
            steering.record_of(strange)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"vae": None}, "connect a VAE"),
        ({"reward": None}, "selects by a reward: connect one"),
        ({"particles": 4}, "a latent batch of 6 is no number of images with 4 particles each"),
        ({"sigmas": torch.tensor([1.0, 5.0, 0.0])}, "must fall"),
        ({"options": FK | {"scale": -1.0}}, "scale=-1.0"),
        ({"vae": None, "reward": First(), "conditions": ({"wish": 0.4, "model_conds": {}}, -0.2, 1.0)}, ""),
    ],
)
def test_refusals(changed: dict[str, Any], said: str) -> None:
    if not said:
        run(**changed)
        return
    with pytest.raises(DiffsteerError, match=said):
        run(**changed)


def test_a_method_with_a_number_of_its_own_keeps_it() -> None:
    class Pair(BestOfN):
        def __init__(self, eta: float = 1.0) -> None:
            super().__init__(2, eta)

    Pair.__dataclass_fields__ = {"eta": BestOfN.__dataclass_fields__["eta"]}  # its number is no setting
    assert run(rows=2, method=Pair, options={})[1].rewards.shape == (1, 2)
    assert run(rows=4, method=Pair, options={}, particles=2)[1].rewards.shape == (2, 2)
    with pytest.raises(DiffsteerError, match="has 2 particles, not 4"):
        run(rows=4, method=Pair, options={})


class Held:
    def __init__(self, cond: Tensor) -> None:
        self.cond = cond


def test_conditions_that_differ_from_row_to_row_are_refused() -> None:
    for rows, refused in ((torch.randn(6, 3), True), (torch.randn(1, 3).expand(6, 3), False)):
        conditions = ({"wish": 0.4, "model_conds": {"c_crossattn": Held(rows)}}, -0.2, 1.0)
        if not refused:
            run(conditions=conditions)
            continue
        with pytest.raises(UnsupportedError, match="a condition has 6 different rows"):
            run(conditions=conditions)
        run(rows=1, conditions=conditions)

    class Hint:
        cond_hint_original = torch.randn(2, 3, 8, 8)
        previous_controlnet = None

    class Chained:
        cond_hint_original = None
        previous_controlnet = Hint

    for control in (Hint(), Chained()):
        with pytest.raises(UnsupportedError, match="2 different rows"):
            run(conditions=({"wish": 0.4, "control": control}, -0.2, 1.0))
    listed = Held(torch.zeros(0))
    listed.cond = [torch.zeros(1, 2), torch.randn(2, 2)]  # type: ignore[assignment]
    for cond in ({"mask": torch.rand(6, 4, 4)}, {"model_conds": {"c": listed}}):
        with pytest.raises(UnsupportedError, match="different rows"):
            run(rows=2, conditions=({"wish": 0.4, **cond}, -0.2, 1.0))
    two = ({"wish": 0.4, "model_conds": {"c_crossattn": Held(torch.randn(2, 3))}}, -0.2, 1.0)
    run(rows=2, particles=1, method=BestOfN, options={}, conditions=two)  # each row is an image of its own
    with pytest.raises(UnsupportedError, match="2 different rows"):  # but blocks would not find theirs
        run(rows=2, particles=1, method=BestOfN, options={}, conditions=two, chunk=1)


def test_the_frames_of_one_video_are_no_particles() -> None:
    from fakes import Base

    class SVD_img2vid(Base):
        pass

    patcher = Patcher()
    patcher.model = SVD_img2vid()
    latent = {"samples": torch.zeros(4, *SHAPE)}
    noise, sigmas = torch.randn(4, *SHAPE), torch.linspace(10, 0, 4)
    steering = Steering(FeynmanKac, FK, 0, Red(), "any", VAE(), host=FakeHost())
    with pytest.raises(UnsupportedError, match="frames of one video"):
        sample(FakeHost(), steering, patcher, CONDITIONS, latent, noise, sigmas, 0)


def test_rewards_are_prepared_outside_inference_mode() -> None:
    modes = []

    class Told(Red):
        def prepare(self, prompts: Any, ctx: Any) -> None:
            modes.append(torch.is_inference_mode_enabled())

    run(reward=Told())
    from diffsteer.comfy.parts import score_images

    with torch.inference_mode():
        score_images(torch.rand(2, 4, 4, 3), Told(), "any", 0)
    assert modes == [False, False]


def test_a_model_without_noise_is_refused() -> None:
    class IMG_TO_IMG(CONST):
        pass

    patcher = Patcher()
    patcher.model.model_sampling = IMG_TO_IMG()
    steering = Steering(BestOfN, {}, 0, Red(), "any", VAE(), host=FakeHost())
    latent = {"samples": torch.zeros(2, *SHAPE)}
    with pytest.raises(UnsupportedError, match="without any noise"):
        sample(FakeHost(), steering, patcher, CONDITIONS, latent, torch.randn(2, *SHAPE), torch.linspace(1, 0, 4), 0)


def test_levels_say_what_a_model_is() -> None:
    sigmas = torch.tensor([1.0, 0.25, 0.0])
    assert [float(at.alpha) for at in levels_of("flow", sigmas)] == [0.0, 0.75, 1.0]
    assert [float(at.alpha) for at in levels_of("edm", sigmas)] == [1.0] * 3


def test_embedded_models_are_told_to_rewards() -> None:
    told = []

    class Told(Red):
        def prepare(self, prompts: Any, ctx: Any) -> None:
            told.append(ctx.embedded)

    run(reward=Told())
    before = Patcher.__init__

    def marked(self: Patcher, path: str = "edm") -> None:
        before(self, path)
        self.model.diffsteer_embedded = True  # type: ignore[assignment]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Patcher, "__init__", marked)
        run(reward=Told())
    assert told == [False, True]


def test_videos_are_shown_frame_by_frame_and_sounds_as_they_are() -> None:
    class VideoVAE(VAE):
        latent_dim = 3

        def decode(self, latents: Tensor) -> Tensor:
            frames = [super(VideoVAE, self).decode(f) for f in latents.unbind(2)]
            return torch.stack(frames, 1)  # (N, F, H, W, 3), as ComfyUI has it

    shapes = []

    class Seen(Red):
        def score(self, samples: Tensor, prompts: Any, ctx: Any) -> Tensor:
            shapes.append(tuple(samples.shape))
            return super().score(samples, prompts, ctx)

    _, record, _, _ = run(latent={"samples": torch.zeros(4, 4, 3, 4, 4)}, vae=VideoVAE(), reward=Seen())
    assert shapes[0] == (4 * 3, 3, 8, 8) and record.rewards.shape == (1, 4)

    class SoundVAE(VAE):
        latent_dim = 1

        def decode(self, latents: Tensor) -> Tensor:
            return latents.repeat_interleave(2, -1)[:, :2].movedim(1, -1)  # (N, T, channels)

    def loud(samples: Tensor, prompts: Any) -> Tensor:
        shapes.append(tuple(samples.shape))
        return samples.flatten(1).square().mean(1)

    sound = {"samples": torch.zeros(4, 4, 10)}
    run(latent=sound, vae=SoundVAE(), reward=FunctionReward(loud))
    assert shapes[-1] == (4, 2, 20)
    with pytest.raises(DiffsteerError, match="looks at images, but this pipeline makes sound"):
        run(latent=sound, vae=SoundVAE(), reward=Red())


def test_rows_of_a_latent_go_with_all_it_holds() -> None:
    latent = {
        "samples": torch.arange(3.0)[:, None],
        "noise_mask": torch.arange(3.0)[:, None],
        "batch_index": [7, 8, 9],
        "kind": "a",
    }
    kept = indexed(latent, [2, 0])
    assert kept["samples"].flatten().tolist() == [2, 0] == kept["noise_mask"].flatten().tolist()
    assert kept["batch_index"] == [9, 7] and kept["kind"] == "a" and latent["batch_index"] == [7, 8, 9]
    one = {"samples": torch.zeros(3, 1), "noise_mask": torch.zeros(1, 1)}
    assert indexed(one, [1])["noise_mask"] is one["noise_mask"]


def test_keyed_noise_is_the_core_s_and_found_noise_refuses_what_it_was_not_found_for() -> None:
    from diffsteer import rng

    latent = {"samples": torch.zeros(4, *SHAPE)}
    one = KeyedNoise(5, 0).generate_noise({"samples": torch.zeros(1, *SHAPE), "batch_index": [3]})
    assert torch.equal(one[0], KeyedNoise(5, 0).generate_noise(latent)[3])  # of a row taken out of a batch
    few, many = (KeyedNoise(5, 0).generate_noise({"samples": torch.zeros(n, *SHAPE)}) for n in (2, 4))
    assert torch.equal(few, many[:2])
    assert torch.equal(KeyedNoise(5, 2).generate_noise(latent)[2:], rng.normal(5, [(1, 0), (1, 1)], 0, "start", SHAPE))
    found = FoundNoise(0, many, None)  # type: ignore[arg-type]
    assert torch.equal(found.generate_noise({"samples": torch.zeros(2, *SHAPE)}), many[:2])
    for wrong in ((5, *SHAPE), (2, 4, 8, 8)):
        with pytest.raises(DiffsteerError, match="no noise for a latent of"):
            found.generate_noise({"samples": torch.zeros(wrong)})


def test_a_reward_that_fails_is_named() -> None:
    class Broken(Reward):
        name = "broken"

        def score(self, samples: Tensor, prompts: Any, ctx: Any) -> Tensor:
            raise ValueError("no")

    with pytest.raises(DiffsteerError, match="the reward broken raised ValueError"):
        run(reward=Broken())
