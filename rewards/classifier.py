"""Any classifier as a reward: a module, an exported program, an ONNX file, or a linear head on features of CLIP."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffsteer.reward import Reward
from diffsteer.rewards.checkpoint import read_tensors, usual_device
from diffsteer.rewards.clip_score import ClipScore
from diffsteer.rewards.open_clip_model import RESIZE, check_resize, load, prepared
from diffsteer.types import Context, DiffsteerError, setting

OUTPUTS = ("logit", "log_probability", "probability")
WHERE = "an .onnx file, a program of torch.export (.pt2), or tensors `weight` and `bias` of a linear head (.safetensors, .pth)"


@dataclass(eq=False)
class Classifier(Reward):
    """What a classifier says of one of its classes.

    A network is given pictures of a size, less a mean and over a deviation; a linear head, or a network with ``features=true``,
    the features of CLIP, of length one. Probabilities are those of a softmax, of a sigmoid where there is one output alone.

    Cost: one pass a sample.

    Args:
        model: a file: .onnx (wants the package onnxruntime; without gradients), a program of `torch.export` (.pt2, with
            ``trust=true``), a linear head as .safetensors or .pth; or, from Python, a `torch.nn.Module`, (N, 3, S, S) or
            features (N, D) -> (N, classes).
        label: the number of the class. output: logit | log_probability | probability.
        features: the classifier reads features of CLIP; always so for a linear head.
        size: side of the pictures. mean, std: of the channels. resize: squash | crop | pad.
        rows: pictures a call, for a program that was exported for so many; None for any number.
        trust: open a .pt2 file, which can run any code while torch reads it.
        model_name, pretrained: of the CLIP, as in `ClipScore`. device: where all runs.

    Raises:
        DiffsteerError: what is no option; later, a file that cannot be opened, or a class that there is not.
    """

    model: Any = None
    label: int = 0
    output: str = setting("logit", choices=OUTPUTS)
    features: bool = False
    size: int = setting(224, low=1)
    mean: Sequence[float] = field(default=(0.485, 0.456, 0.406))
    std: Sequence[float] = field(default=(0.229, 0.224, 0.225))
    resize: str = setting("squash", choices=RESIZE)
    rows: int | None = None
    trust: bool = False
    model_name: str | None = None
    pretrained: str | None = None
    device: str | None = None

    name: ClassVar[str] = "classifier"
    range: ClassVar[tuple[float, float]] = (-1e6, 1e6)
    differentiable: ClassVar[bool] = True
    licence: ClassVar[str | None] = "that of the classifier"
    weights: ClassVar[str | None] = "the file that is given"

    def __post_init__(self) -> None:
        check_resize(self.name, self.resize)
        if self.output not in OUTPUTS:
            raise DiffsteerError(f"classifier: output={self.output!r} is unknown; valid: {', '.join(OUTPUTS)}")
        if self.label < 0 or self.size < 1 or (self.rows is not None and self.rows < 1):
            raise DiffsteerError(f"classifier: label={self.label}, size={self.size}, rows={self.rows}; wanted 0, 1, 1 or more")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise DiffsteerError(f"classifier: mean={list(self.mean)}, std={list(self.std)}; wanted three each, std above 0")
        ranges = {"log_probability": (-1e6, 0.0), "probability": (0.0, 1.0)}
        self.__dict__.update(range=ranges.get(self.output, self.range))
        if str(self.model).endswith(".onnx"):
            self.__dict__.update(differentiable=False)
        self._clip = ClipScore(self.model_name, self.pretrained, self.resize, self.device)
        self._called: Callable[[Tensor], Tensor] | None = None
        self._linear = False
        self._towers: dict[str, Any] = {}

    def prepare(self, prompts: Sequence[str], ctx: Context) -> None:
        """Load the classifier, and CLIP where it reads features."""
        self._load()
        if self.features or self._linear:
            self._tower(ctx)

    def score(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] -> (N,)."""
        called, device = self._load(), usual_device(self.device)
        if self.features or self._linear:
            x = self._tower(ctx).encode_images(samples, self.resize)
        else:
            x = prepared(samples.to(device), (self.size, self.size), self.resize, self.mean, self.std)
        said = torch.cat([self._rows(called, part) for part in x.split(self.rows or len(x))]).float()
        if said.ndim != 2 or not self.label < said.shape[1]:
            raise DiffsteerError(
                f"classifier: it returns shape {list(said.shape)}; wanted (N, classes), with a class {self.label}"
            )
        if self.output != "logit":
            alone = said.shape[1] == 1
            logs = nn.functional.logsigmoid(said) if alone else said.log_softmax(1)
            said = logs if self.output == "log_probability" else logs.exp()
        return said[:, self.label].to(samples.device)

    def _rows(self, called: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """One call; where it takes a fixed number of rows, the last again until there are as many."""
        missing = 0 if self.rows is None else self.rows - len(x)
        return called(torch.cat([x, x[-1:].expand(missing, *x.shape[1:])]) if missing else x)[: len(x)]

    def _tower(self, ctx: Context) -> Any:
        name, pretrained = self._clip.checkpoint(ctx)
        if name not in self._towers:
            self._towers[name] = load(name, pretrained, self.device)
        return self._towers[name]

    def _load(self) -> Callable[[Tensor], Tensor]:
        if self._called is None:
            with torch.inference_mode(False):  # or gradients could not pass later
                self._called = self._opened()
        return self._called

    def _opened(self) -> Callable[[Tensor], Tensor]:
        device = usual_device(self.device)
        if isinstance(self.model, nn.Module):
            return copy.deepcopy(self.model).eval().requires_grad_(False).to(device)
        if not isinstance(self.model, (str, Path)):
            raise DiffsteerError(f"classifier: model={self.model!r}; wanted {WHERE}")
        path = Path(self.model)
        if path.suffix in (".safetensors", ".pth", ".bin") or not path.is_file():
            return self._head(path, device)
        if path.suffix == ".onnx":
            return _onnx(path)
        if path.suffix == ".pt2":
            if not self.trust:
                told = "torch can run any code that is in it; if you trust it, give trust=true, or take ONNX"
                raise DiffsteerError(f"classifier: {path.name} is a program of torch.export, and is not opened: {told}")
            try:
                return torch.export.load(path).module().to(device)
            except Exception as error:
                said = str(error).split("\n")[0]
                raise DiffsteerError(f"classifier: {path.name} is no program of torch.export ({said})") from error
        raise DiffsteerError(f"classifier: {path.name} could hold any code, so it is not opened; wanted {WHERE}")

    def _head(self, path: Path, device: str) -> Callable[[Tensor], Tensor]:
        state = read_tensors(self.name, path, WHERE)
        weight, bias = state.get("weight"), state.get("bias")
        if set(state) - {"weight", "bias"} or weight is None or weight.ndim != 2:
            found = ", ".join(f"{k} {list(v.shape)}" for k, v in list(state.items())[:4]) or "nothing"
            raise DiffsteerError(
                f"classifier: {path.name} is no linear head: it holds {found}; wanted weight [classes, D], bias"
            )
        self._linear = True
        weight, bias = weight.float().to(device), None if bias is None else bias.float().to(device)
        return lambda x: nn.functional.linear(x, weight, bias)


def _onnx(path: Path) -> Callable[[Tensor], Tensor]:
    """An ONNX file as a function, on the CPU; one of a fixed number of rows is called as often as that takes."""
    try:
        import onnxruntime
    except ImportError as error:
        raise DiffsteerError("classifier: an .onnx file wants the package onnxruntime (pip install onnxruntime)") from error
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:
        raise DiffsteerError(f"classifier: {path.name} cannot be opened ({str(error).splitlines()[0]})") from error
    entry = session.get_inputs()[0]
    fixed = entry.shape[0] if isinstance(entry.shape[0], int) else None

    def called(x: Tensor) -> Tensor:
        rows = x.detach().float().cpu()
        found = []
        for i in range(0, len(rows), fixed or len(rows)):
            part = rows[i : i + (fixed or len(rows))]
            missing = 0 if fixed is None else fixed - len(part)
            whole = torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) if missing else part
            found.append(torch.from_numpy(session.run(None, {entry.name: whole.numpy()})[0])[: len(part)])
        return torch.cat(found)

    return called
