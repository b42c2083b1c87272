"""The pipelines that ship with diffsteer, loaded by diffusers from the folders of the package."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from diffusers import AutoencoderKL, StableDiffusion3Pipeline, StableDiffusionPipeline
from transformers import CLIPTokenizer

from diffsteer.shapes.models import MODELS, SHARED, embedded_name


def load_embedded(name: str, **kwargs: Any) -> Any:
    """A pipeline of `MODELS`; keyword arguments go to `from_pretrained`."""
    if name == "shapes":
        return StableDiffusionPipeline.from_pretrained(MODELS[name], safety_checker=None, **kwargs)
    vae, *tokenizers = SHARED[name].items()
    parts = {part: CLIPTokenizer.from_pretrained(folder) for part, folder in tokenizers}
    parts |= {vae[0]: AutoencoderKL.from_pretrained(vae[1], torch_dtype=kwargs.get("torch_dtype"))}
    absent = {"text_encoder_3": None, "tokenizer_3": None}
    return as_trained(StableDiffusion3Pipeline.from_pretrained(MODELS[name], **absent | parts | kwargs))


def as_trained(pipe: Any) -> Any:
    """The embedded flow model was trained with one empty token in the place of the T5 that it has not; its pipeline would put
    256 there, which are attended to."""
    if embedded_name(pipe) != "shapes-flow":
        return pipe
    encode, signature = pipe.encode_prompt, inspect.signature(pipe.encode_prompt)

    @functools.wraps(encode)
    def with_one_empty_token(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.arguments["max_sequence_length"] = 1
        return encode(*bound.args, **bound.kwargs)

    pipe.encode_prompt = with_one_empty_token
    return pipe
