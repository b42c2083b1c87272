"""Run by ComfyUI's Python, in its folder: the embedded model as ComfyUI's own objects, steered in a graph's way and through
`CallableModel` with the same network. Prints what differs, as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

PROMPT, SEED, CFG, STEPS = "a red circle left of a blue square", 3, 4.0, 12


def main() -> None:
    sys.path.insert(0, str(Path.cwd()))
    sys.argv = ["same_core", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_management

    from diffsteer import SteeredPipeline, load_pipeline
    from diffsteer.callable import CallableModel
    from diffsteer.comfy import shapes
    from diffsteer.comfy.host import HOST
    from diffsteer.comfy.noise import KeyedNoise
    from diffsteer.comfy.registered import sigmas_of
    from diffsteer.comfy.sampling import sample
    from diffsteer.comfy.steering import Steering
    from diffsteer.rewards import ClipScore
    from diffsteer.samplers import FeynmanKac
    from diffsteer.schedules import Karras

    def compared(name: str) -> dict[str, Any]:
        flow = name == "shapes-flow"
        with torch.inference_mode():
            model, clip, vae = shapes.load(name)
            positive, negative = ([[clip.encode(text), {}]] for text in (PROMPT, ""))
            sampling = model.get_model_object("model_sampling")
            sigmas = torch.linspace(1, 0, STEPS + 1) if flow else sigmas_of(Karras(), sampling, STEPS)
            options: dict[str, Any] = {"events": (0.25, 0.5, 0.75)}
            reward = ClipScore("shapes")
            steering = Steering(FeynmanKac, options, 6, reward, PROMPT, vae)
            latent = shapes.empty_latent(6)
            noise = KeyedNoise(SEED).generate_noise(latent)
            latents, record = sample(HOST, steering, model, (positive, negative, CFG), latent, noise, sigmas, SEED)

        pipe = load_pipeline(name)
        texts = [pipe.encode_prompt(t, "cpu", 1, False)[0] for t in (PROMPT, "")]

        def clean(x: torch.Tensor, t: torch.Tensor, prompts: list[Any]) -> Any:
            good, bad = (one(x, t, text) for text in texts)
            return bad + CFG * (good - bad)

        def one(x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> Any:
            context, s = text.expand(len(x), -1, -1), t.view(-1, 1, 1, 1)
            if flow:
                return x - s * pipe.unet(x, t * 1000, context).sample
            number = sampling.timestep(t)
            return x - s * pipe.unet(x / (1 + s**2).sqrt(), number, context).sample

        def decode(x: torch.Tensor) -> Any:
            return (pipe.vae.decode(x).sample / 2 + 0.5).clamp(0, 1)

        ends = (float(sampling.sigma_max), float(sampling.sigma_min))
        path = "flow" if flow else "edm"
        toy = CallableModel(clean, "x0", path, (4, 16, 16), sigmas=ends, decode=decode)
        with torch.no_grad():
            out = SteeredPipeline(toy, FeynmanKac(6, **options), reward)([PROMPT], num_inference_steps=STEPS, seed=SEED)
        theirs = out.latents[0]
        return {
            "ancestors": [e.ancestors.tolist() for e in record.trace.events],
            "same ancestors": [
                torch.equal(a.ancestors, b.ancestors) for a, b in zip(record.trace.events, out.trace.events, strict=True)
            ],
            "resampled": [bool(e.resampled.any()) for e in record.trace.events],
            "latents": float((latents - theirs).abs().max() / theirs.abs().max()),
            "rewards": float((record.rewards - out.rewards).abs().max()),
            "counts": [record.ledger.decodes, out.ledger.decodes],
        }

    print(json.dumps({name: compared(name) for name in ("shapes", "shapes-flow")}))


if __name__ == "__main__":
    main()
