"""The nodes that sample: the all-in-one sampler, the noise search, keyed noise, and the guider."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffsteer.comfy import fields
from diffsteer.comfy.guider import Pull, pulled
from diffsteer.comfy.host import HOST, Host
from diffsteer.comfy.node import MOST, REWARD, RUN, Input, Node
from diffsteer.comfy.noise import FoundNoise, KeyedNoise, keyed
from diffsteer.comfy.parts import OUTPUT
from diffsteer.comfy.registered import CHUNK, EACH, PROMPT
from diffsteer.comfy.steering import Record, Steering, indexed
from diffsteer.guidance import Guidance
from diffsteer.registry import find, registered
from diffsteer.reward import Reward
from diffsteer.trial import Search

NOT_IN_A_GUIDER = ("recurrence", "smoothing", "draws")  # which only says what a clean estimate is
STEPS = Input("steps", "INT", "", 20, {"min": 1, "max": 10000})
CFG = Input("cfg", "FLOAT", "Classifier-free guidance.", 7.0, {"min": 0.0, "max": 100.0, "step": 0.1})
DENOISE = Input(
    "denoise", "FLOAT", "Below 1 the given latent is changed only in part.", 1.0, {"min": 0.01, "max": 1.0, "step": 0.01}
)
SEED = Input("seed", "INT", "The key of all randomness.", 0, {"min": 0, "max": MOST, "control_after_generate": True})
REWARDED = Input("reward", REWARD, "What the particles are chosen by.")
DECODED = Input("vae", "VAE", "Decodes what the reward looks at, and the result.")


def is_a_node(sampler: Any) -> bool:
    """Can a SAMPLER run this method? It takes no gradients, and sets no levels row by row."""
    searches = issubclass(sampler if isinstance(sampler, type) else type(sampler), Search)
    return not searches and not sampler.needs_grad and not hasattr(sampler, "timing")


def steerable() -> list[str]:
    """The methods that a SAMPLER can run, the particle filter first."""
    return sorted((name for name, cls in registered("sampler").items() if is_a_node(cls)), key=lambda name: name != "fk")


def sample(
    host: Host,
    steering: Steering,
    model: Any,
    conditions: tuple[Any, Any, float],
    latent: dict[str, Any],
    noise: Tensor,
    sigmas: Tensor,
    seed: int,
) -> tuple[Tensor, Record]:
    """One run with classifier-free guidance: latents (N, ...) of every particle, and its record."""
    positive, negative, cfg = conditions
    guider = host.guider_class()(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    samples = host.sample(guider, noise, latent["samples"], host.sampler(steering), sigmas, latent.get("noise_mask"), seed)
    return samples, steering.record_of(samples)


def batched(host: Host, model: Any, latent: dict[str, Any], particles: int) -> dict[str, Any]:
    """A LATENT with every row as often as it has particles, in the channels of the model."""
    latent = {**latent, "samples": host.fix_latent(model, latent["samples"])}
    rows = [r for r in range(len(latent["samples"])) for _ in range(particles)]
    return indexed(latent, rows)


def all_in_one(host: Host) -> Node:
    def run(
        model: Any,
        positive: Any,
        negative: Any,
        latent_image: dict[str, Any],
        vae: Any,
        reward: Reward,
        prompt: str,
        method: str,
        particles: int,
        seed: int,
        steps: int,
        cfg: float,
        scheduler: str,
        denoise: float,
        output: str,
        chunk: int,
    ) -> tuple[Tensor, dict[str, Any], Record]:
        latent = batched(host, model, latent_image, particles)
        noise = keyed(seed, len(latent["samples"]), particles, latent["samples"])
        sigmas = host.sigmas(model, scheduler, steps, denoise)
        steering = Steering(find("sampler", method), {}, particles, reward, prompt, vae, "eta", chunk or None, host)
        samples, record = sample(host, steering, model, (positive, negative, cfg), latent, noise, sigmas, seed)
        kept = indexed({**latent, "samples": samples}, record.rows(output), record.origin.tolist())
        decoded = vae.decode(kept["samples"])
        return decoded.flatten(0, 1) if decoded.ndim == 5 else decoded, kept, record

    def check(method: str, particles: int) -> None:
        find("sampler", method)(particles=particles)

    return Node(
        "DiffsteerKSampler",
        "Steered KSampler",
        "A KSampler that draws several particles for each image of the latent batch, looks at what they are becoming with a "
        "reward, and keeps what goes well. It costs a KSampler's run for each particle, so compare it with as many images.",
        (
            Input("model", "MODEL"),
            Input("positive", "CONDITIONING"),
            Input("negative", "CONDITIONING"),
            Input("latent_image", "LATENT", "An image a row; each gets particles of its own."),
            DECODED,
            REWARDED,
            PROMPT,
            Input("method", "COMBO", "fk looks on the way, best_of_n at the end.", "fk", choices=steerable),
            Input("particles", "INT", "An image; the cost grows with it.", 4, {"min": 1, "max": 1024}),
            SEED,
            STEPS,
            CFG,
            Input("scheduler", "COMBO", "Where the steps are.", "simple", choices=host.scheduler_names),
            DENOISE,
            OUTPUT,
            CHUNK,
        ),
        (("IMAGE", "images"), ("LATENT", "latent"), (RUN, "run")),
        run,
        check,
        ("method", "particles"),
    )


def noise_search(host: Host) -> Node:
    def run(
        model: Any,
        positive: Any,
        negative: Any,
        latent_image: dict[str, Any],
        vae: Any,
        reward: Reward,
        prompt: str,
        candidates: int,
        seed: int,
        draft_steps: int,
        cfg: float,
        scheduler: str,
        chunk: int,
    ) -> tuple[FoundNoise, Record]:
        one = indexed(latent_image, [0])
        latent = batched(host, model, one, candidates)
        noise = keyed(seed, candidates, candidates, latent["samples"])
        sigmas = host.sigmas(model, scheduler, draft_steps, 1.0)
        steering = Steering(
            find("sampler", "best_of_n"), {"eta": 0.0}, candidates, reward, prompt, vae, "eta", chunk or None, host
        )
        _, record = sample(host, steering, model, (positive, negative, cfg), latent, noise, sigmas, seed)
        return FoundNoise(seed, noise[record.rows("all")], record), record

    return Node(
        "DiffsteerNoiseSearch",
        "Noise search",
        "Random search over starting noises, drawn as drafts in a few deterministic steps and sorted by the reward. The NOISE "
        "gives the best, as many as the latent it is used with has rows; use it with a deterministic sampler such as euler, "
        "whose result the noise decides. It costs candidates times draft_steps. A heuristic: what is good as a draft need "
        "not be best in the end.",
        (
            Input("model", "MODEL"),
            Input("positive", "CONDITIONING"),
            Input("negative", "CONDITIONING"),
            Input("latent_image", "LATENT", "The size of a row."),
            DECODED,
            REWARDED,
            PROMPT,
            Input("candidates", "INT", "Noises that are tried.", 16, {"min": 1, "max": 4096}),
            SEED,
            Input("draft_steps", "INT", "Steps of a draft.", 8, {"min": 1, "max": 10000}),
            CFG,
            Input("scheduler", "COMBO", "Where the steps are.", "simple", choices=host.scheduler_names),
            CHUNK,
        ),
        (("NOISE", "noise"), (RUN, "run")),
        run,
    )


def keyed_noise() -> Node:
    return Node(
        "DiffsteerNoise",
        "Keyed noise",
        "Noise of which a particle's part does not depend on how many others there are. A seed gives the same noise as in "
        "Python and on the command line.",
        (SEED, EACH),
        (("NOISE", "noise"),),
        lambda seed, particles: (KeyedNoise(seed, particles),),
    )


def gradient_guider(host: Host) -> Node:
    def run(
        model: Any,
        positive: Any,
        negative: Any,
        reward: Reward,
        cfg: float,
        prompt: str,
        chunk: int,
        vae: Any = None,
        **given: Any,
    ) -> tuple[Any]:
        pull = Pull(Guidance(**fields.values(Guidance, given)), reward, prompt, vae, chunk or None, host)
        guider = pulled(host.guider_class(), model, pull)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        return (guider,)

    return Node(
        "DiffsteerGuider",
        "Gradient guidance (guider)",
        f"Classifier-free guidance whose clean estimates follow the gradient of a reward. {fields.summary(Guidance)}",
        (
            Input("model", "MODEL"),
            Input("positive", "CONDITIONING"),
            Input("negative", "CONDITIONING"),
            Input("reward", REWARD, "One that has a gradient."),
            Input("vae", "VAE", "Decodes what the reward looks at.", optional=True),
            CFG,
            PROMPT,
            *fields.widgets(Guidance, leave_out=NOT_IN_A_GUIDER),
            CHUNK,
        ),
        (("GUIDER", "guider"),),
        run,
        lambda **given: Guidance(**fields.values(Guidance, given)),
        tuple(name for name in fields.names(Guidance) if name not in NOT_IN_A_GUIDER),
    )


def nodes(host: Host = HOST) -> list[Node]:
    return [all_in_one(host), noise_search(host), keyed_noise(), gradient_guider(host)]
