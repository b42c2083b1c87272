"""Weights of other people's rewards: files of tensors, opened as nothing else, and models of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffsteer.types import DiffsteerError

T = TypeVar("T")


def read_tensors(who: str, path: str | Path, where: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint: .safetensors, or a pickle of nothing but tensors (`state_dict` and `model` in a mapping of
    more are opened).

    Args:
        who: the reward. where: such a file is to be had.

    Raises:
        DiffsteerError: no such file, more than tensors in it, or a broken one.
    """
    path = Path(path)
    if not path.is_file():
        raise DiffsteerError(f"{who}: there is no file {str(path)!r}; wanted {where}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise DiffsteerError(f"{who}: {path.name} is no safetensors file ({error})") from error
    refusal = (
        f"{who}: {path.name} is not a file of plain tensors, and other pickles can run code, so it is not opened; "
        "if you trust it, convert it: torch.save(torch.load(FILE, weights_only=False).state_dict(), NEW_FILE)"
    )
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle.UnpicklingError, or whatever a broken file makes the reader raise
        raise DiffsteerError(refusal) from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DiffsteerError(refusal)
    return dict(state)


def located(who: str, named: str) -> Path:
    """A file: a path, or ``OWNER/REPOSITORY/FILE`` of huggingface.co, which is fetched once.

    Raises:
        DiffsteerError: neither.
    """
    path, parts = Path(named), named.split("/")
    if path.is_file() or len(parts) < 3 or path.is_absolute() or parts[0] in (".", ".."):
        return path
    from huggingface_hub import hf_hub_download

    return Path(fetched(who, named, lambda: hf_hub_download("/".join(parts[:2]), "/".join(parts[2:])), "the path of a file"))


def fill(who: str, name: str, module: torch.nn.Module, state: Mapping[str, Tensor], without: tuple[str, ...] = ()) -> None:
    """Load tensors into a module, all of them and no others.

    Args:
        without: beginnings of the names of buffers that a checkpoint may lack or have beside.

    Raises:
        DiffsteerError: with the first that is missing, left over, or of another shape.
    """
    own = {k: v for k, v in module.state_dict().items() if not k.startswith(without)}
    given = {k: v for k, v in state.items() if not k.startswith(without)}
    for key in [*own, *given]:
        if key not in given:
            raise DiffsteerError(f"{who}: {name} lacks {key}")
        if key not in own:
            raise DiffsteerError(f"{who}: {name} holds {key}, which this model has not")
        if own[key].shape != given[key].shape:
            raise DiffsteerError(f"{who}: in {name}, {key} has shape {list(given[key].shape)}, not {list(own[key].shape)}")
    module.load_state_dict(given, strict=False)


def fetched(
    who: str,
    named: str,
    load: Callable[[], T],
    wanted: str = "a folder as save_pretrained writes it, or an id of huggingface.co",
) -> T:
    """What `load` gets: frozen where it is a module, and nothing drawn from the global random state.

    Raises:
        DiffsteerError: in a line, whatever it raises.
    """
    try:
        with frozen_in_silence():
            made = load()
    except Exception as error:
        said = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise DiffsteerError(f"{who}: {named} could not be loaded ({said}); wanted {wanted}") from error
    if isinstance(made, torch.nn.Module):
        made.eval().requires_grad_(False)
    return made


@contextmanager
def frozen_in_silence() -> Iterator[None]:
    """The global random state stays as it is, inference mode is off, and transformers shows no progress and no advice."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
            yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def usual_device(device: str | None) -> str:
    """The device that was named, or the accelerator if there is one."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")
