"""Amortised noise: a small change of the generator itself that moves the first noise to where a reward is high."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffsteer.shapes.models import NOISE
from diffsteer.types import DiffsteerError

RANK, LAST = 16, "conv_out"


class LowRank(nn.Module):
    """A low-rank addition to a linear layer or a convolution: ``up(down(x))``, nothing at first, in float32."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int) -> None:
        super().__init__()
        self.down: nn.Module
        self.up: nn.Module
        if isinstance(layer, nn.Linear):
            self.down = nn.Linear(layer.in_features, rank, bias=False)
            self.up = nn.Linear(rank, layer.out_features, bias=False)
        else:
            shape: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding, "bias": False}
            self.down = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, **shape)  # type: ignore[arg-type]
            self.up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.up(self.down(x.float()))
        return added.to(x.dtype)


class NoiseNetwork(nn.Module):
    """A `NoiseTransform` (z, condition) -> z + delta: the frozen denoiser with a low-rank change of its layers, whose last
    layer is the change alone, so that delta is zero before training (Eyring et al., 2025, arXiv 2508.09968, HyperNoise).

    One evaluation a noise, counted in the ledger. A heuristic: trained for ``0.5 |delta|^2 - reward`` it leans the prior
    towards the reward, and delta, being small, keeps it near standard normal; the result's diagnosis tells how near.

    Args:
        unet: a UNet2DConditionModel, which is copied and frozen.
        encode: from texts to what the UNet attends to, (N, L, D).
        time: the timestep of pure noise. rank: of the change.
    """

    evaluations = 1

    def __init__(
        self,
        unet: nn.Module,
        encode: Callable[[list[str]], Tensor],
        time: float = 1000.0,
        rank: int = RANK,
    ) -> None:
        super().__init__()
        self.unet = copy.deepcopy(unet).requires_grad_(False).eval()
        self.encode, self.time = encode, time
        self._texts: dict[str, Tensor] = {}
        self.changes = nn.ModuleDict()
        for name, layer in self.unet.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d) and getattr(layer, "groups", 1) == 1:
                change = LowRank(layer, rank).to(layer.weight.device, torch.float32)
                self.changes[name.replace(".", "/")] = change
                layer.register_forward_hook(_added(change, alone=name == LAST))

    def delta(self, noise: Tensor, texts: Sequence[str]) -> Tensor:
        """What is added to noise (N, C, h, w)."""
        new = [t for t in dict.fromkeys(texts) if t not in self._texts]
        if new:
            with torch.no_grad():
                self._texts |= dict(zip(new, self.encode(new).float(), strict=True))
        words = torch.stack([self._texts[t] for t in texts]).to(noise)
        time = torch.full((len(noise),), self.time, device=noise.device)
        delta: Tensor = self.unet(noise, time, encoder_hidden_states=words).sample
        return delta

    def __call__(self, noise: Tensor, session: Any, rows: Sequence[int]) -> Tensor:
        """Unit noise (N, C, h, w) of a session's rows as the session is to start from. Differentiable."""
        texts = session.texts_of(rows)
        if len(texts) != len(noise) or not all(isinstance(t, str) for t in texts):
            raise DiffsteerError("a noise network wants one text a row: it goes with no experts")
        parameter = next(self.unet.parameters())
        moved: Tensor
        with session.ledger.timed("denoiser"):
            moved = self.delta(noise.to(parameter.device, parameter.dtype), texts)
        session.ledger.evaluations += len(noise)
        session.ledger.forwards += 1
        return noise + moved.to(noise)

    def save(self, path: str | Path) -> None:
        """The change alone, in half precision."""
        from safetensors.torch import save_file

        save_file({k: v.half().contiguous() for k, v in self.changes.state_dict().items()}, str(path))

    def load(self, path: str | Path) -> NoiseNetwork:
        """A change that was saved.

        Raises:
            DiffsteerError: a file that is none, or the change of another network.
        """
        from safetensors.torch import load_file

        try:
            self.changes.load_state_dict({k: v.float() for k, v in load_file(str(path)).items()})
        except Exception as error:
            raise DiffsteerError(f"noise network {path}: {str(error).splitlines()[0]}") from error
        self.requires_grad_(False)
        return self


def _added(change: LowRank, alone: bool) -> Any:
    def hook(layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        added: Tensor = change(args[0])
        return added if alone else out + added

    return hook


def noise_network_of(pipe: Any, path: str | Path | None = None, rank: int = RANK) -> NoiseNetwork:
    """For a pipeline with a UNet and a CLIP text encoder, such as Stable Diffusion's; its change from a file, or untrained.
    "shapes-turbo" is the one that is embedded, of the model of that name.

    Raises:
        DiffsteerError: a pipeline of another kind.
    """
    parts: list[Any] = [getattr(pipe, name, None) for name in ("unet", "text_encoder", "tokenizer")]
    if any(part is None for part in parts):
        raise DiffsteerError(f"a noise network changes a UNet with one text encoder, which {type(pipe).__name__} has not")
    unet, encoder, tokenizer = parts

    def encode(texts: list[str]) -> Tensor:
        told = tokenizer(
            texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        words: Tensor = encoder(told.input_ids.to(next(encoder.parameters()).device))[0]
        return words

    assert isinstance(unet, nn.Module)
    made = NoiseNetwork(unet, encode, rank=rank)
    if path is None:
        return made
    return made.load(NOISE if path == "shapes-turbo" else path)
