"""The example graphs that come with the node pack. They run on the embedded models, so nothing need be downloaded."""

from __future__ import annotations

from collections.abc import Callable

from diffsteer.comfy.graph import Graph, Made

PROMPT = "three red circles"
OWN_MODEL = "To work with a model of yours, replace **Load shapes** by a checkpoint loader and an empty latent of your size."
SEED, STEPS, CFG = 2, 30, 4.0  # steps and guidance are what the card of the embedded model recommends
FLOW_STEPS, FLOW_CFG = 50, 6.0


def steered_ksampler() -> Graph:
    """A sampler that looks at what it draws: one node in the place of a KSampler."""
    graph, model, text, positive, negative, reward = _begin("shapes", 1)
    graph.note = (
        "**Steered KSampler** draws eight particles and keeps the one that CLIP likes best, having looked on the way. It costs "
        f"eight times a KSampler. {OWN_MODEL} The reward is then CLIP without a model name, which is fetched once."
    )
    run = graph.add(
        "DiffsteerKSampler",
        model=model["model"],
        positive=positive["CONDITIONING"],
        negative=negative["CONDITIONING"],
        latent_image=model["latent"],
        vae=model["vae"],
        reward=reward["reward"],
        prompt=text["STRING"],
        particles=8,
        seed=SEED,
        steps=STEPS,
        cfg=CFG,
    )
    graph.add("DiffsteerSave", images=run["images"], run=run["run"], filename_prefix="diffsteer/steered_ksampler")
    return graph


def particles() -> Graph:
    """The same in parts, with all eight particles in their order, the lineage and the ledger."""
    graph, model, text, positive, negative, reward = _begin("shapes", 8)
    graph.note = (
        f"The latent batch are the particles. **Select particles** keeps the best, draws one, or sorts all. {OWN_MODEL}"
    )
    sampler = graph.add("DiffsteerSampler_fk", reward=reward["reward"], vae=model["vae"], prompt=text["STRING"])
    sigmas = graph.add("BasicScheduler", model=model["model"], steps=STEPS)
    _finish(graph, model, positive, negative, sampler, sigmas, CFG, "particles", "all")
    return graph


def flow() -> Graph:
    """A flow model, with two rewards added up, a schedule of ours, and one of eight particles drawn by its weight."""
    graph, model, text, positive, negative, reward = _begin("shapes-flow", 8)
    graph.note = f"A flow model, with a reward that also asks for pictures that compress well. {OWN_MODEL}"
    small = graph.add("DiffsteerReward_compressibility")
    both = graph.add("DiffsteerRewardSum", a=reward["reward"], b=small["reward"], weight_a=1.0, weight_b=2.0)
    sampler = graph.add("DiffsteerSampler_fk", reward=both["reward"], vae=model["vae"], prompt=text["STRING"])
    sigmas = graph.add("DiffsteerSchedule_flow_time", model=model["model"], steps=FLOW_STEPS, shift=1.5)
    _finish(graph, model, positive, negative, sampler, sigmas, FLOW_CFG, "flow", "best")
    return graph


def score_and_sort() -> Graph:
    """Any sampler, and a reward that sorts what it made: best of N by hand."""
    graph, model, text, positive, negative, reward = _begin("shapes", 8)
    graph.note = f"Nothing is steered here: a plain **KSampler**, and **Score and sort** behind it. {OWN_MODEL}"
    plain = graph.add(
        "KSampler",
        model=model["model"],
        seed=SEED,
        steps=STEPS,
        cfg=CFG,
        sampler_name="euler_ancestral",
        positive=positive["CONDITIONING"],
        negative=negative["CONDITIONING"],
        latent_image=model["latent"],
    )
    decoded = graph.add("VAEDecode", samples=plain["LATENT"], vae=model["vae"])
    scored = graph.add("DiffsteerScore", images=decoded["IMAGE"], reward=reward["reward"], prompt=text["STRING"])
    graph.add("PreviewAny", "Scores", source=scored["scores"])
    graph.add("DiffsteerSave", images=scored["images"], filename_prefix="diffsteer/score_and_sort")
    return graph


def noise_search() -> Graph:
    """The best of 32 noises, found with drafts of eight steps, drawn by a deterministic sampler."""
    graph, model, text, positive, negative, reward = _begin("shapes", 1)
    graph.note = f"**Noise search** draws 32 drafts and hands the best noise to an ordinary sampler. {OWN_MODEL}"
    found = graph.add(
        "DiffsteerNoiseSearch",
        model=model["model"],
        positive=positive["CONDITIONING"],
        negative=negative["CONDITIONING"],
        latent_image=model["latent"],
        vae=model["vae"],
        reward=reward["reward"],
        prompt=text["STRING"],
        candidates=32,
        cfg=CFG,
        seed=SEED,
    )
    guider = graph.add(
        "CFGGuider",
        model=model["model"],
        positive=positive["CONDITIONING"],
        negative=negative["CONDITIONING"],
        cfg=CFG,
    )
    euler = graph.add("KSamplerSelect", sampler_name="euler")
    sigmas = graph.add("BasicScheduler", model=model["model"], steps=STEPS)
    drawn = graph.add(
        "SamplerCustomAdvanced",
        noise=found["noise"],
        guider=guider["GUIDER"],
        sampler=euler["SAMPLER"],
        sigmas=sigmas["SIGMAS"],
        latent_image=model["latent"],
    )
    decoded = graph.add("VAEDecode", samples=drawn["output"], vae=model["vae"])
    graph.add("DiffsteerSave", images=decoded["IMAGE"], run=found["run"], filename_prefix="diffsteer/noise_search")
    return graph


def gradient_guidance() -> Graph:
    """The gradient of CLIP pulls every step: no particles, one image a row."""
    graph, model, text, positive, negative, reward = _begin("shapes", 4)
    graph.note = f"The **guider** follows the gradient of the reward; the sampler is an ordinary one. {OWN_MODEL}"
    guider = graph.add(
        "DiffsteerGuider",
        model=model["model"],
        positive=positive["CONDITIONING"],
        negative=negative["CONDITIONING"],
        reward=reward["reward"],
        vae=model["vae"],
        cfg=CFG,
        prompt=text["STRING"],
    )
    euler = graph.add("KSamplerSelect", sampler_name="euler_ancestral")
    sigmas = graph.add("BasicScheduler", model=model["model"], steps=STEPS)
    noise = graph.add("DiffsteerNoise", seed=SEED)
    drawn = graph.add(
        "SamplerCustomAdvanced",
        noise=noise["noise"],
        guider=guider["guider"],
        sampler=euler["SAMPLER"],
        sigmas=sigmas["SIGMAS"],
        latent_image=model["latent"],
    )
    decoded = graph.add("VAEDecode", samples=drawn["output"], vae=model["vae"])
    graph.add("DiffsteerSave", images=decoded["IMAGE"], filename_prefix="diffsteer/gradient_guidance")
    return graph


EXAMPLES: dict[str, Callable[[], Graph]] = {
    f.__name__: f for f in (steered_ksampler, particles, flow, score_and_sort, noise_search, gradient_guidance)
}


def _begin(name: str, rows: int) -> tuple[Graph, Made, Made, Made, Made, Made]:
    """The model, the prompt, its conditions and a CLIP that reads both."""
    graph = Graph()
    model = graph.add("DiffsteerShapes", model=name, batch_size=rows)
    text = graph.add("PrimitiveStringMultiline", "Prompt", value=PROMPT)
    positive = graph.add("CLIPTextEncode", "Positive", text=text["STRING"], clip=model["clip"])
    negative = graph.add("CLIPTextEncode", "Negative", clip=model["clip"])
    reward = graph.add("DiffsteerReward_clip", model_name="shapes")
    return graph, model, text, positive, negative, reward


def _finish(
    graph: Graph, model: Made, positive: Made, negative: Made, sampler: Made, sigmas: Made, cfg: float, name: str, output: str
) -> None:
    """Sampling in parts, the selection, the picture of the lineage and the ledger."""
    guider = graph.add(
        "CFGGuider",
        model=model["model"],
        positive=positive["CONDITIONING"],
        negative=negative["CONDITIONING"],
        cfg=cfg,
    )
    noise = graph.add("DiffsteerNoise", seed=SEED)
    drawn = graph.add(
        "SamplerCustomAdvanced",
        noise=noise["noise"],
        guider=guider["GUIDER"],
        sampler=sampler["sampler"],
        sigmas=sigmas[sigmas.facts.outputs[0][1]],
        latent_image=model["latent"],
    )
    chosen = graph.add("DiffsteerSelect", latent=drawn["output"], steering=sampler["steering"], output=output)
    decoded = graph.add("VAEDecode", samples=chosen["latent"], vae=model["vae"])
    graph.add("DiffsteerSave", images=decoded["IMAGE"], run=chosen["run"], filename_prefix=f"diffsteer/{name}")
    picture = graph.add("DiffsteerLineage", run=chosen["run"])
    graph.add("SaveImage", "Save lineage", images=picture["image"], filename_prefix=f"diffsteer/{name}_lineage")
    text = graph.add("DiffsteerLedger", run=chosen["run"])
    graph.add("PreviewAny", "Ledger", source=text["text"])
