"""CLIP models of open_clip as rewards use them: loaded in silence, frozen, with preprocessing that gradients pass."""

from __future__ import annotations

import difflib
import functools
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsteer.rewards.checkpoint import usual_device
from diffsteer.shapes import models
from diffsteer.types import DiffsteerError

MANY_TEXTS = 4096  # whose features are kept
EMBEDDED, SECOND = "shapes", "shapes2"  # the miniature CLIPs that ship with diffsteer
RESIZE = ("squash", "crop", "pad")
_SCHEMAS = ("local-dir:", "hf-hub:")
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".npz")


def check_options(who: str, model_name: str | None, pretrained: str | None, resize: str) -> None:
    """Refuse options that contradict each other.

    Raises:
        DiffsteerError: an unknown `resize`, weights without a model, or weights for a model that brings its own.
    """
    check_resize(who, resize)
    if pretrained is not None and model_name is None:
        raise DiffsteerError(f"{who}: pretrained={pretrained!r} needs a model_name (such as ViT-B-32)")
    brought = model_name is not None and (model_name in (EMBEDDED, SECOND) or model_name.startswith(_SCHEMAS))
    if pretrained is not None and brought:
        raise DiffsteerError(f"{who}: model_name={model_name!r} brings its own weights: set pretrained=null (None)")


def check_resize(who: str, resize: str) -> None:
    """Refuse an unknown way to bring a picture to a model's size.

    Raises:
        DiffsteerError: with those that are known.
    """
    if resize not in RESIZE:
        raise DiffsteerError(f"{who}: resize={resize!r} is unknown; valid: {', '.join(RESIZE)}")


def is_embedded(model_name: str) -> bool:
    """Does this name, or this ``local-dir:``, mean one of the embedded miniature CLIPs?"""
    folder = model_name.removeprefix("local-dir:")
    ours = (models.CLIP.resolve(), models.CLIP2.resolve())
    return model_name in (EMBEDDED, SECOND) or (folder != model_name and Path(folder).resolve() in ours)


def fit(images: Tensor, size: tuple[int, int], resize: str, interpolation: str = "bicubic", fill: float = 0.0) -> Tensor:
    """Bring images (N, C, H, W) in [0, 1] to `size` (height, width), antialiased, as PIL would up to its rounding to 8 bits.

    Args:
        resize: "squash" changes the aspect ratio; "crop" keeps it and cuts the longer side at its centre, as CLIP was
            trained; "pad" keeps it and fills what is left.
        interpolation: bicubic | bilinear.
        fill: the grey level of the padding.
    """
    (height, width), (h, w) = images.shape[-2:], size
    if resize == "crop":
        inner = (h, h * width // height) if height * w <= width * h else (w * height // width, w)
    elif resize == "pad":
        shrink = max(height / h, width / w)
        inner = (max(1, round(height / shrink)), max(1, round(width / shrink)))
    else:
        inner = size
    for step in ((height, inner[1]), inner):  # bicubic overshoots; PIL clips after either pass. All the same, gradients pass
        images = F.interpolate(images, step, mode=interpolation, align_corners=False, antialias=True)
        images = images + (images.clamp(0, 1) - images).detach()
    if resize == "crop":
        top, left = round((inner[0] - h) / 2), round((inner[1] - w) / 2)
        return images[..., top : top + h, left : left + w]
    if resize == "pad":
        down, right = h - inner[0], w - inner[1]
        return F.pad(images, (right // 2, right - right // 2, down // 2, down - down // 2), value=fill)
    return images


def prepared(
    images: Tensor,
    size: tuple[int, int],
    resize: str,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bicubic",
    fill: float = 0.0,
) -> Tensor:
    """Images in [0, 1] as a network takes them: float32, of its size, less the mean and over the deviation of its channels."""
    x = fit(images.to(torch.float32), size, resize, interpolation, fill)
    centre, scale = (torch.tensor(v, device=x.device).view(-1, 1, 1) for v in (list(mean), list(std)))
    return (x - centre) / scale


class Texts:
    """Features of prompts, each encoded alone, so that they do not depend on the batch; then remembered.

    Args:
        encode: from a prompt to features (D,).
    """

    def __init__(self, encode: Callable[[str], Tensor]) -> None:
        self.encode = encode
        self._known: dict[str, Tensor] = {}

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Features (N, D)."""
        known = self._known  # of now: another thread may put a smaller one in its place
        for prompt in prompts:
            if prompt not in known:
                with torch.inference_mode(False), torch.no_grad():
                    known[prompt] = self.encode(prompt)
        return torch.stack([known[prompt] for prompt in prompts])

    def forget_all_but(self, prompts: Iterable[str]) -> None:
        """Drop the features of all other prompts, once there are thousands of them."""
        kept = set(prompts) if len(self._known) > MANY_TEXTS else set(self._known)
        self._known = {p: features for p, features in self._known.copy().items() if p in kept}


class OpenClip:
    """A loaded model, float32 and frozen. Its features are of unit length.

    Args:
        name: as open_clip takes it.
        model: the open_clip model.
    """

    def __init__(self, name: str, model: Any, device: str) -> None:
        self.name, self.model, self.device = name, model.eval().requires_grad_(False), device
        self.preprocessing: dict[str, Any] = model.visual.preprocess_cfg
        size = self.preprocessing["size"]
        self.size: tuple[int, int] = (size, size) if isinstance(size, int) else (size[0], size[-1])
        self.encode_texts = Texts(self._encode_text)

    def encode_images(self, images: Tensor, resize: str) -> Tensor:
        """Features (N, D) of images (N, 3, H, W) in [0, 1], on the device of the model. Differentiable."""
        cfg = self.preprocessing
        fill = cfg["fill_color"] / 255
        x = prepared(images.to(self.device), self.size, resize, cfg["mean"], cfg["std"], cfg["interpolation"], fill)
        return F.normalize(self.model.encode_image(x).float(), dim=-1)

    def _encode_text(self, prompt: str) -> Tensor:
        """Features (D,) of a prompt."""
        ids = self._tokenizer([prompt]).to(self.device)
        self._warn_if_cut(prompt, ids.shape[1])
        return F.normalize(self.model.encode_text(ids).float(), dim=-1)[0]

    @functools.cached_property
    def _tokenizer(self) -> Any:
        import open_clip

        with _quiet():
            try:
                return open_clip.get_tokenizer(self.name)
            except Exception as error:
                raise DiffsteerError(f"the tokenizer of {self.name} could not be loaded ({_line(error)})") from error

    def _warn_if_cut(self, prompt: str, length: int) -> None:
        longer, empty = (self._tokenizer([text], context_length=length + 1)[0, -1] for text in (prompt, ""))
        if longer != empty:
            warnings.warn(f"CLIP reads {length} tokens; what is beyond them is not scored in {prompt!r}", stacklevel=3)


def load(model_name: str, pretrained: str | None, device: str | None = None) -> OpenClip:
    """Load a model with open_clip. Draws nothing from the global random state. Pickled files are opened as plain tensors only.

    A tag that was trained with QuickGELU (all of OpenAI's) gets it whatever the model's name; open_clip would only warn. For
    a file nobody can tell: name the model with -quickgelu where it is one.

    Args:
        model_name: a name of `open_clip.list_models()`, ``local-dir:FOLDER``, ``hf-hub:ORG/NAME``, or an embedded one,
            "shapes" or "shapes2".
        pretrained: a tag of the model or a checkpoint file; None for those that bring their weights.
        device: None for the accelerator if there is one.

    Raises:
        DiffsteerError: nothing can be loaded; names the nearest valid names.
    """
    import open_clip

    device = usual_device(device)
    name = {EMBEDDED: f"local-dir:{models.CLIP}", SECOND: f"local-dir:{models.CLIP2}"}.get(model_name, model_name)
    quick_gelu = _needs_quick_gelu(name, pretrained)
    with _quiet(), torch.random.fork_rng(devices=[]), torch.inference_mode(False):  # or gradients could not pass later
        try:
            model = open_clip.create_model(
                name,
                pretrained=pretrained,
                device=device,
                force_quick_gelu=quick_gelu,
                require_pretrained=True,
                weights_only=True,
            )
        except Exception as error:
            what = name if pretrained is None else f"{name} with pretrained={pretrained!r}"
            hint = "a checkpoint file can be given as pretrained, a folder as model_name=local-dir:FOLDER"
            raise DiffsteerError(f"the CLIP model {what} could not be loaded ({_line(error)}); {hint}") from error
        return OpenClip(name, model, device)


def untrained(model_name: str, device: str | None = None) -> OpenClip:
    """A model of open_clip without its weights, for those of somebody else.

    Raises:
        DiffsteerError: there is no such model.
    """
    import open_clip

    with _quiet(), torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        try:
            model = open_clip.create_model(model_name, load_weights=False, pretrained_image=False)
        except Exception as error:
            near = _nearest(model_name, open_clip.list_models())
            raise DiffsteerError(
                f"the CLIP model {model_name} could not be made ({_line(error)}); nearest: {near}; or local-dir:FOLDER"
            ) from error
        device = usual_device(device)
        return OpenClip(model_name, model.to(device), device)


def _needs_quick_gelu(name: str, pretrained: str | None) -> bool:
    """Check the names; say whether the tag was trained with QuickGELU."""
    import open_clip

    if name.startswith(_SCHEMAS):
        return False
    plain = name.replace("/", "-")
    known = open_clip.list_models()
    if plain not in known:
        also = f"{EMBEDDED}, local-dir:FOLDER or hf-hub:ORG/NAME"
        raise DiffsteerError(
            f"there is no CLIP model {name!r}; nearest: {_nearest(plain, [*known, EMBEDDED, SECOND])}; also {also}"
        )
    tags = open_clip.list_pretrained_tags_by_model(plain)
    if pretrained is None:
        raise DiffsteerError(f"which weights of {name}? Set pretrained to a checkpoint file or to one of: {', '.join(tags)}")
    tagged = open_clip.get_pretrained_cfg(plain, pretrained)
    if tagged:
        return bool(tagged.get("quick_gelu", False))
    if Path(pretrained).is_file():
        return False
    if Path(pretrained).name != pretrained or Path(pretrained).suffix in _SUFFIXES:
        raise DiffsteerError(f"there is no checkpoint file {pretrained!r} for the CLIP model {name}")
    raise DiffsteerError(f"{name} has no weights {pretrained!r}; nearest: {_nearest(pretrained, tags) or 'none'}; or a file")


def _nearest(name: str, names: Iterable[str]) -> str:
    """The three names that look most alike, capitals aside."""
    lower = {n.lower(): n for n in names}
    return ", ".join(lower[n] for n in difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.0))


def _line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """open_clip writes to the root logger, which would also install a handler there; what matters it raises."""
    root, handler = logging.getLogger(), logging.NullHandler()

    def foreign(record: logging.LogRecord) -> bool:
        return "open_clip" not in Path(record.pathname).parts

    root.addHandler(handler)
    root.addFilter(foreign)
    try:
        yield
    finally:
        root.removeFilter(foreign)
        root.removeHandler(handler)
