"""The example graphs that come with the node pack. They run on the embedded models, so nothing need be downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffsteer.comfy.graph import Graph, Link, Made

PROMPT = "three red circles"
OWN_MODEL = "To work with a model of yours, replace **Load shapes** by a checkpoint loader and an empty latent of your size."
SEED, STEPS, CFG = 2, 30, 4.0  # steps and guidance are what the card of the embedded model recommends
FLOW_STEPS, FLOW_CFG = 50, 6.0


def steered_ksampler() -> Graph:
    """A sampler that looks at what it draws: one node in the place of a KSampler."""
    start = Start("shapes", 1)
    start.graph.note = (
        "**Steered KSampler** draws eight particles and keeps the one that CLIP likes best, having looked on the way. It costs "
        f"eight times a KSampler. {OWN_MODEL} The reward is then CLIP without a model name, which is fetched once."
    )
    run = start.graph.add(
        "DiffsteerKSampler",
        **start.conditions,
        **start.scored,
        latent_image=start.latent,
        particles=8,
        seed=SEED,
        steps=STEPS,
        cfg=CFG,
    )
    start.save(run["images"], "steered_ksampler", run["run"])
    return start.graph


def particles() -> Graph:
    """The same in parts, with all eight particles in their order, the lineage and the ledger."""
    start = Start("shapes", 8)
    start.graph.note = (
        f"The latent batch are the particles. **Select particles** keeps the best, draws one, or sorts all. {OWN_MODEL}"
    )
    sampler = start.graph.add("DiffsteerSampler_fk", **start.scored)
    _select(start, sampler, start.sigmas(), CFG, "particles", "all")
    return start.graph


def flow() -> Graph:
    """A flow model, with two rewards added up, a schedule of ours, and the best of eight particles."""
    start = Start("shapes-flow", 8)
    start.graph.note = f"A flow model, with a reward that also asks for pictures that compress well. {OWN_MODEL}"
    small = start.graph.add("DiffsteerReward_compressibility")
    both = start.graph.add("DiffsteerRewardSum", a=start.scored["reward"], b=small["reward"], weight_a=1.0, weight_b=2.0)
    sampler = start.graph.add("DiffsteerSampler_fk", **start.scored | {"reward": both["reward"]})
    sigmas = start.graph.add("DiffsteerSchedule_flow_time", model=start.conditions["model"], steps=FLOW_STEPS, shift=1.5)
    _select(start, sampler, sigmas["sigmas"], FLOW_CFG, "flow", "best")
    return start.graph


def score_and_sort() -> Graph:
    """Any sampler, and a reward that sorts what it made: best of N by hand."""
    start = Start("shapes", 8)
    start.graph.note = f"Nothing is steered here: a plain **KSampler**, and **Score and sort** behind it. {OWN_MODEL}"
    plain = start.graph.add(
        "KSampler",
        **start.conditions,
        latent_image=start.latent,
        seed=SEED,
        steps=STEPS,
        cfg=CFG,
        sampler_name="euler_ancestral",
    )
    wanted = {name: start.scored[name] for name in ("reward", "prompt")}
    scored = start.graph.add("DiffsteerScore", images=start.decoded(plain["LATENT"]), **wanted)
    start.graph.add("PreviewAny", "Scores", source=scored["scores"])
    start.save(scored["images"], "score_and_sort")
    return start.graph


def noise_search() -> Graph:
    """The best of 32 noises, found with drafts of eight steps, drawn by a deterministic sampler."""
    start = Start("shapes", 1)
    start.graph.note = f"**Noise search** draws 32 drafts and hands the best noise to an ordinary sampler. {OWN_MODEL}"
    found = start.graph.add(
        "DiffsteerNoiseSearch",
        **start.conditions,
        **start.scored,
        latent_image=start.latent,
        candidates=32,
        cfg=CFG,
        seed=SEED,
    )
    guider = start.graph.add("CFGGuider", **start.conditions, cfg=CFG)["GUIDER"]
    euler = start.graph.add("KSamplerSelect", sampler_name="euler")["SAMPLER"]
    drawn = start.sampled(found["noise"], guider, euler, start.sigmas())
    start.save(start.decoded(drawn), "noise_search", found["run"])
    return start.graph


def gradient_guidance() -> Graph:
    """The gradient of CLIP pulls every step: no particles, one image a row."""
    start = Start("shapes", 4)
    start.graph.note = f"The **guider** follows the gradient of the reward; the sampler is an ordinary one. {OWN_MODEL}"
    guider = start.graph.add("DiffsteerGuider", **start.conditions, **start.scored, cfg=CFG)["guider"]
    euler = start.graph.add("KSamplerSelect", sampler_name="euler_ancestral")["SAMPLER"]
    drawn = start.sampled(start.noise(), guider, euler, start.sigmas())
    report = start.graph.add("DiffsteerGuidanceReport", latent=drawn, guider=guider)["text"]
    start.save(start.decoded(drawn), "gradient_guidance", notes=report)
    start.graph.add("PreviewAny", "Report", source=report)
    return start.graph


EXAMPLES: dict[str, Callable[[], Graph]] = {
    f.__name__: f for f in (steered_ksampler, particles, flow, score_and_sort, noise_search, gradient_guidance)
}


class Start:
    """What all of them begin with: the model, the prompt, its conditions, and a CLIP that reads both.

    Attributes:
        conditions: the inputs model, positive and negative of nodes. scored: reward, vae and prompt.
    """

    def __init__(self, name: str, rows: int) -> None:
        self.graph = Graph()
        loaded = self.graph.add("DiffsteerShapes", model=name, batch_size=rows)
        text = self.graph.add("PrimitiveStringMultiline", "Prompt", value=PROMPT)["STRING"]
        positive = self.graph.add("CLIPTextEncode", "Positive", text=text, clip=loaded["clip"])["CONDITIONING"]
        negative = self.graph.add("CLIPTextEncode", "Negative", clip=loaded["clip"])["CONDITIONING"]
        reward = self.graph.add("DiffsteerReward_clip", model_name="shapes")["reward"]
        self.latent, self.vae = loaded["latent"], loaded["vae"]
        self.conditions: dict[str, Any] = {"model": loaded["model"], "positive": positive, "negative": negative}
        self.scored: dict[str, Any] = {"reward": reward, "vae": self.vae, "prompt": text}

    def noise(self) -> Link:
        return self.graph.add("DiffsteerNoise", seed=SEED)["noise"]

    def sigmas(self) -> Link:
        return self.graph.add("BasicScheduler", model=self.conditions["model"], steps=STEPS)["SIGMAS"]

    def sampled(self, noise: Link, guider: Link, sampler: Link, sigmas: Link) -> Link:
        wired: dict[str, Any] = {"noise": noise, "guider": guider, "sampler": sampler, "sigmas": sigmas}
        return self.graph.add("SamplerCustomAdvanced", **wired, latent_image=self.latent)["output"]

    def decoded(self, latent: Link) -> Link:
        return self.graph.add("VAEDecode", samples=latent, vae=self.vae)["IMAGE"]

    def save(self, images: Link, name: str, run: Link | None = None, notes: Link | None = None) -> None:
        told: dict[str, Any] = {key: link for key, link in (("run", run), ("notes", notes)) if link is not None}
        self.graph.add("DiffsteerSave", images=images, filename_prefix=f"diffsteer/{name}", **told)


def _select(start: Start, sampler: Made, sigmas: Link, cfg: float, name: str, output: str) -> None:
    """Sampling in parts, the selection, the picture of the lineage and the ledger."""
    graph = start.graph
    guider = graph.add("CFGGuider", **start.conditions, cfg=cfg)["GUIDER"]
    drawn = start.sampled(start.noise(), guider, sampler["sampler"], sigmas)
    chosen = graph.add("DiffsteerSelect", latent=drawn, steering=sampler["steering"], output=output)
    start.save(start.decoded(chosen["latent"]), name, chosen["run"])
    picture = graph.add("DiffsteerLineage", run=chosen["run"])["image"]
    graph.add("SaveImage", "Save lineage", images=picture, filename_prefix=f"diffsteer/{name}_lineage")
    graph.add("PreviewAny", "Ledger", source=graph.add("DiffsteerLedger", run=chosen["run"])["text"])
