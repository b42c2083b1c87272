"""One toy pipeline for each class of diffusers: real classes and call paths, random weights, nothing downloaded.

Heights and widths differ, and so do lengths of texts, latents and channels where a class allows it: no axis passes for
another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from families import parts
from families import toys_sound as sound
from families import toys_transformer as transformer
from families import toys_unet as unet
from families import toys_video as video
from torch import Tensor

NEGATIVE = "a square"


@dataclass(frozen=True)
class Toy:
    """How to build one pipeline, and what a short call of it wants."""

    build: Callable[[], Any]
    call: dict[str, Any]
    each: dict[str, Any] = field(default_factory=dict)  # wanted once a prompt: given as a list
    rows: str = "prompt"  # the argument that says how many samples: prompts, class labels, or a number
    output: str = "images"  # where the pipeline's output keeps the samples

    def arguments(self, prompts: Sequence[str]) -> dict[str, Any]:
        """The whole call for these prompts; a class without prompts draws as many samples."""
        given: dict[str, Any] = {"prompt": list(prompts), "class_labels": [1] * len(prompts), "batch_size": len(prompts)}
        lists = {name: [value] * len(prompts) for name, value in self.each.items()}
        return {self.rows: given[self.rows], **self.call, **lists}


def picture(height: int, width: int) -> Tensor:
    """Three ramps, (3, height, width) in [0, 1]."""
    down, right = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    return torch.stack([down, right, down * right])


IMAGE: dict[str, Any] = {"height": 16, "width": 24, "num_inference_steps": 5, "guidance_scale": 3.0}
VIDEO: dict[str, Any] = {"height": 16, "width": 32, "num_frames": 5, "num_inference_steps": 5, "guidance_scale": 3.0}
SHORT = {"max_sequence_length": 13}
ONE_PASS = {"stg_scale": 0.0, "audio_stg_scale": 0.0, "modality_scale": 1.0, "audio_modality_scale": 1.0}
SIZED_BY_IMAGE: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": 3.0, "strength": 0.8}

TOYS: dict[str, Toy] = {
    "StableDiffusionPipeline": Toy(unet.stable_diffusion, IMAGE),
    "StableDiffusionXLPipeline": Toy(unet.stable_diffusion_xl, IMAGE),
    "StableDiffusion3Pipeline": Toy(transformer.stable_diffusion_3, {**IMAGE, **SHORT}),
    "StableDiffusion3Pipeline without T5": Toy(
        lambda: transformer.stable_diffusion_3(t5=False), {**IMAGE, "max_sequence_length": 1}
    ),
    "StableDiffusion3Pipeline with skipped layers": Toy(
        transformer.stable_diffusion_3,
        {**IMAGE, **SHORT, "skip_guidance_layers": [0], "skip_layer_guidance_start": 0.3, "skip_layer_guidance_stop": 0.7},
    ),
    "FluxPipeline": Toy(transformer.flux, {**IMAGE, **SHORT, "true_cfg_scale": 2.0}, each={"negative_prompt": NEGATIVE}),
    "WanPipeline": Toy(video.wan, {**VIDEO, **SHORT}, output="frames"),
    "WanPipeline with two denoisers": Toy(lambda: video.wan(second=True), {**VIDEO, **SHORT}, output="frames"),
    "AnimateDiffPipeline": Toy(unet.animatediff, {**IMAGE, "num_frames": 5}, output="frames"),
    "PixArtSigmaPipeline": Toy(
        transformer.pixart_sigma, {**IMAGE, **SHORT, "use_resolution_binning": False, "clean_caption": False}
    ),
    "SanaPipeline": Toy(
        transformer.sana,
        {**IMAGE, **SHORT, "height": 32, "width": 64, "use_resolution_binning": False, "complex_human_instruction": None},
    ),
    "QwenImagePipeline": Toy(
        transformer.qwen_image,
        {"height": 16, "width": 24, "num_inference_steps": 5, "true_cfg_scale": 3.0},
        each={"negative_prompt": NEGATIVE},
    ),
    "ZImagePipeline": Toy(transformer.z_image, {**IMAGE, **SHORT}),
    "Flux2Pipeline": Toy(transformer.flux2, {**IMAGE, **SHORT, "text_encoder_out_layers": (1, 2)}),
    "HunyuanDiTPipeline": Toy(transformer.hunyuan_dit, {**IMAGE, "height": 48, "width": 64, "use_resolution_binning": False}),
    "Lumina2Pipeline": Toy(
        transformer.lumina2, {**IMAGE, "height": 32, "width": 64, "system_prompt": "", "max_sequence_length": 26}
    ),
    "AuraFlowPipeline": Toy(transformer.aura_flow, {**IMAGE, **SHORT}),
    "CogVideoXPipeline": Toy(video.cogvideox, {**VIDEO, **SHORT, "width": 40, "num_frames": 9}, output="frames"),
    "LTXPipeline": Toy(video.ltx, {**VIDEO, **SHORT, "height": 32, "width": 64}, output="frames"),
    "LTX2Pipeline": Toy(
        video.ltx2,
        {**VIDEO, "height": 32, "width": 64, "max_sequence_length": 14, **ONE_PASS},
        output="frames",
    ),
    "HunyuanVideoPipeline": Toy(
        video.hunyuan_video,
        {
            **VIDEO,
            **SHORT,
            "true_cfg_scale": 2.0,
            "height": 32,
            "width": 80,
            "num_frames": 9,
            "prompt_template": {"template": "video of {}", "crop_start": 2},
        },
        each={"negative_prompt": NEGATIVE},
        output="frames",
    ),
    "StableAudioPipeline": Toy(
        sound.stable_audio, {"num_inference_steps": 5, "guidance_scale": 3.0, "audio_end_in_s": 1.5}, output="audios"
    ),
    "AudioLDM2Pipeline": Toy(
        sound.audioldm2,
        {"num_inference_steps": 5, "guidance_scale": 3.0, "audio_length_in_s": 0.4, "max_new_tokens": 5},
        output="audios",
    ),
    "AudioLDM2Pipeline of its own length": Toy(
        sound.audioldm2, {"num_inference_steps": 5, "guidance_scale": 3.0, "max_new_tokens": 5}, output="audios"
    ),
    "StableDiffusionControlNetPipeline": Toy(
        unet.stable_diffusion_controlnet,
        {"num_inference_steps": 5, "guidance_scale": 3.0},
        each={"image": picture(16, 24)},
    ),
    "StableDiffusionControlNetPipeline for some steps": Toy(
        unet.stable_diffusion_controlnet,
        {"num_inference_steps": 5, "guidance_scale": 3.0, "control_guidance_start": 0.3, "control_guidance_end": 0.7},
        each={"image": picture(16, 24)},
    ),
    "StableDiffusionInpaintPipeline": Toy(
        unet.stable_diffusion_inpaint, IMAGE, each={"image": picture(16, 24), "mask_image": (picture(16, 24)[:1] > 0.5).float()}
    ),
    "StableDiffusionXLImg2ImgPipeline": Toy(unet.stable_diffusion_xl_img2img, SIZED_BY_IMAGE, each={"image": picture(16, 24)}),
    "StableDiffusionImg2ImgPipeline": Toy(unet.stable_diffusion_img2img, SIZED_BY_IMAGE, each={"image": picture(16, 24)}),
    "LatentConsistencyModelPipeline": Toy(unet.latent_consistency, IMAGE),
    "DDPMPipeline": Toy(unet.ddpm, {"num_inference_steps": 5}, rows="batch_size"),
    "DiTPipeline": Toy(unet.dit, {"num_inference_steps": 5, "guidance_scale": 3.0}, rows="class_labels"),
}
TOYS = {name: replace(toy, build=parts.seeded(toy.build)) for name, toy in TOYS.items()}

# The families that everything is tried on.
SIX = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "WanPipeline",
    "AnimateDiffPipeline",
)
