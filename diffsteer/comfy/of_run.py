"""A configuration of ``diffsteer generate`` as a graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from diffsteer.comfy import fields
from diffsteer.comfy.graph import Graph, Made
from diffsteer.reward import Reward, WeightedSum, ZScore
from diffsteer.shapes.models import MODELS, recommended_for
from diffsteer.trial import Search
from diffsteer.types import DiffsteerError, Sampler

# Of models that have a name: the file that is usually found in a ComfyUI, guidance, and the size of their pictures.
CHECKPOINTS = {
    "sd15": ("v1-5-pruned-emaonly.safetensors", 7.5, 512),
    "sdxl": ("sd_xl_base_1.0.safetensors", 5.0, 1024),
}
UNKNOWN = (7.5, 512)
STEPS = 50  # diffusers' own default
_FILES = (".safetensors", ".sft", ".ckpt", ".pt")
# What a graph has no place for, and what stands for nothing there.
_NOT_HERE = {
    "transition": ("own", "in a ComfyUI graph the transition is always diffsteer's own"),
    "decoder": ("full", "in a ComfyUI graph the VAE that is connected decodes: connect a tiny one"),
    "deterministic": (False, "a ComfyUI batch is run as it comes"),
    "device": (None, "ComfyUI chooses devices itself"),
    "guide.name": ("none", "in a graph put the node Gradient guidance in the place of CFGGuider"),
    "schedule.name": (
        "none",
        "in a graph put the node of that schedule, if it is not one that is measured, in the place of BasicScheduler",
    ),
    "sigmas": (None, "in a graph give SIGMAS"),
    "timesteps": (None, "in a graph give SIGMAS"),
    "model.dtype": ("float32", "ComfyUI chooses number formats itself"),
    "model.revision": (None, "ComfyUI loads files"),
    "model.variant": (None, "ComfyUI loads files"),
}


def graph_of(
    config: DictConfig, prompt: str, sampler: Sampler | None, reward: Reward | None, checkpoint: str | None = None
) -> Graph:
    """The graph that does what ``diffsteer generate`` with this configuration does, particles as the rows of the latent batch.

    The steps are ComfyUI's scheduler "simple", which is not always the grid of the pipeline's own scheduler. Noise is keyed by
    the seed as for a single prompt (a prompt of a file is keyed by its id there). So results are of the same kind, not equal.

    Args:
        prompt: one of those that the configuration names.
        sampler, reward: as built from it; without a sampler the graph has a plain KSampler.
        checkpoint: the name of a file in ComfyUI's models/checkpoints, for models that do not ship with diffsteer.

    Raises:
        DiffsteerError: what a graph cannot express.
    """
    if isinstance(sampler, Search):
        raise DiffsteerError(f"a graph has no node for {sampler.name}: searches run chains as often as they like")
    for key, (usual, why) in _NOT_HERE.items():
        if OmegaConf.select(config, key) != usual:
            raise DiffsteerError(f"{key}={OmegaConf.select(config, key)}: {why}")
    if sampler is not None and sampler.needs_grad:
        raise DiffsteerError(f"the sampler {sampler.name} needs gradients, and is no node by itself: use Gradient guidance")
    if sampler is not None and hasattr(sampler, "timing"):
        raise DiffsteerError(f"the sampler {sampler.name} sets noise levels row by row, which a graph cannot")
    chunk = config.chunk
    if isinstance(chunk, str):
        raise DiffsteerError(f"chunk={chunk}: in a graph give a number of rows, or leave it to ComfyUI")
    graph = Graph()
    model, vae, clip, latent, cfg, steps = _model(graph, config, checkpoint, sampler.particles if sampler else 1)
    words = graph.add("PrimitiveStringMultiline", "Prompt", value=prompt)["STRING"]
    positive = graph.add("CLIPTextEncode", "Positive", text=words, clip=clip)["CONDITIONING"]
    negative = graph.add("CLIPTextEncode", "Negative", text=config.negative_prompt or "", clip=clip)["CONDITIONING"]
    conditions = {"model": model, "positive": positive, "negative": negative}
    cfg = cfg if config.guidance_scale is None else max(1.0, config.guidance_scale)  # below, diffusers does not guide at all
    steps = config.num_inference_steps or steps
    if sampler is None:
        drawn = graph.add("KSampler", **conditions, latent_image=latent, seed=config.seed, steps=steps, cfg=cfg)
        images = graph.add("VAEDecode", samples=drawn["LATENT"], vae=vae)["IMAGE"]
        graph.add("DiffsteerSave", images=images, filename_prefix="diffsteer/run")
        return graph
    options = {f: fields.shown(type(sampler), sampler, f) for f in fields.names(type(sampler)) if f != "particles"}
    scored = {"reward": _reward(graph, reward), "vae": vae} if reward is not None else {}
    method = graph.add(
        f"DiffsteerSampler_{sampler.name}", prompt=words, noise=config.noise, chunk=chunk or 0, **scored, **options
    )
    run = graph.add(
        "SamplerCustomAdvanced",
        noise=graph.add("DiffsteerNoise", seed=config.seed)["noise"],
        guider=graph.add("CFGGuider", **conditions, cfg=cfg)["GUIDER"],
        sampler=method["sampler"],
        sigmas=graph.add("BasicScheduler", model=model, steps=steps)["SIGMAS"],
        latent_image=latent,
    )
    kept = graph.add("DiffsteerSelect", latent=run["output"], steering=method["steering"], output=config.output)
    images = graph.add("VAEDecode", samples=kept["latent"], vae=vae)["IMAGE"]
    graph.add("DiffsteerSave", images=images, run=kept["run"], filename_prefix="diffsteer/run")
    graph.add("PreviewAny", "Ledger", source=graph.add("DiffsteerLedger", run=kept["run"])["text"])
    return graph


def _reward(graph: Graph, reward: Reward) -> Any:
    if isinstance(reward, WeightedSum | ZScore):
        raise DiffsteerError(f"in a graph join rewards by the node Add rewards, not {reward.name}")
    options = {f: fields.shown(type(reward), reward, f) for f in fields.names(type(reward))}
    return graph.add(f"DiffsteerReward_{reward.name}", **options)["reward"]


def _model(graph: Graph, config: DictConfig, checkpoint: str | None, rows: int) -> tuple[Any, Any, Any, Any, float, int]:
    """MODEL, VAE, CLIP and an empty LATENT with so many rows; the usual guidance and number of steps."""
    path, call = str(config.model.path), dict(config.call)
    wrong = sorted(str(key) for key in call if key not in ("height", "width"))
    if wrong:
        raise DiffsteerError(f"call.{wrong[0]} has no place in a graph; valid: call.height, call.width")
    if path in MODELS and checkpoint is None:
        if call:
            raise DiffsteerError(f"call.{next(iter(call))}: the latents of {path} have one size in ComfyUI")
        loaded, usual = graph.add("DiffsteerShapes", model=path, batch_size=rows), recommended_for(path)
        return *_parts(loaded, "model", "vae", "clip", "latent"), usual["guidance_scale"], usual["num_inference_steps"]
    file, cfg, size = CHECKPOINTS.get(str(config.model.name), (None, *UNKNOWN))
    file = checkpoint or file or (Path(path).name if path.endswith(_FILES) else None)
    if file is None:
        raise DiffsteerError(
            f"model={path} is a folder or an id, and ComfyUI loads single files from its models/checkpoints: "
            "give --checkpoint NAME"
        )
    loaded = graph.add("CheckpointLoaderSimple", ckpt_name=file)
    sizes = {"width": call.get("width", size), "height": call.get("height", size)}
    empty = graph.add("EmptyLatentImage", **sizes, batch_size=rows)
    return *_parts(loaded, "MODEL", "VAE", "CLIP"), empty["LATENT"], cfg, STEPS


def _parts(made: Made, *names: str) -> Any:
    return tuple(made[name] for name in names)
