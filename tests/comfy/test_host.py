"""What is asked of ComfyUI itself, with stand-ins for its modules that note what they are asked."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from diffsteer.comfy.host import Host

Asked = list[tuple[Any, ...]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Stand-ins for ComfyUI's modules, and the list of what they were asked."""
    noted: Asked = []

    def module(name: str, **inside: Any) -> Any:
        made = types.ModuleType(name)
        made.__dict__.update(inside)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    def note(name: str, answer: Any = None) -> Any:
        def noting(*given: Any, **named: Any) -> Any:
            noted.append((name, *given, named) if named else (name, *given))
            return answer

        return noting

    comfy = module("comfy")
    comfy.model_management = module(
        "comfy.model_management",
        throw_exception_if_processing_interrupted=note("interrupted?"),
        load_models_gpu=note("load"),
        intermediate_device=lambda: torch.device("cpu"),
    )
    comfy.sampler_helpers = module("comfy.sampler_helpers", estimate_memory=note("estimate", (70, 7)))
    comfy.samplers = module(
        "comfy.samplers",
        KSAMPLER=note("ksampler", "SAMPLER"),
        SCHEDULER_NAMES=("simple", "beta"),
        calculate_sigmas=lambda sampling, name, steps: torch.linspace(sampling, 0, steps + 1),
        CFGGuider="CFGGuider",
    )
    comfy.sample = module("comfy.sample", fix_empty_latent_channels=note("fix", "FIXED"))
    comfy.utils = module("comfy.utils", PROGRESS_BAR_ENABLED=True)
    comfy.cli_args = module("comfy.cli_args", args=types.SimpleNamespace(disable_metadata=True))
    module("latent_preview", prepare_callback=note("preview", "CALLBACK"))
    module(
        "folder_paths",
        get_output_directory=lambda: "/out",
        get_save_image_path=lambda prefix, out, w, h: (f"{out}/{prefix}", "name", 7, "sub", prefix),
    )
    return noted


def test_the_model_is_loaded_with_what_goes_with_it_and_with_room_for_a_step(asked: Asked) -> None:
    guider = types.SimpleNamespace(model_patcher="MODEL", loaded_models=["CONTROLNET"], conds={"positive": []})
    Host().keep_loaded(guider, (8, 4, 64, 64))
    memory = {"memory_required": 70, "minimum_memory_required": 7}
    assert asked == [("estimate", "MODEL", [8, 4, 64, 64], {"positive": []}), ("load", ["MODEL", "CONTROLNET"], memory)]


def test_sigmas_are_the_last_of_a_longer_grid(asked: Asked) -> None:
    model = types.SimpleNamespace(get_model_object=lambda name: {"model_sampling": 1.0}[name])
    assert torch.equal(Host().sigmas(model, "simple", 4, 1.0), torch.linspace(1, 0, 5))
    assert torch.equal(Host().sigmas(model, "simple", 4, 0.5), torch.linspace(1, 0, 9)[4:])


def test_a_run_has_the_mask_progress_and_its_seed(asked: Asked) -> None:
    seen: dict[str, Any] = {}

    class Guider:
        model_patcher = "MODEL"

        def sample(self, *given: Any, **named: Any) -> torch.Tensor:
            seen.update(given=given, **named)
            return torch.zeros(1)

    sigmas = torch.linspace(1, 0, 4)
    Host().sample(Guider(), "NOISE", "LATENT", "SAMPLER", sigmas, "MASK", 9)  # type: ignore[arg-type]
    assert seen["given"] == ("NOISE", "LATENT", "SAMPLER", sigmas)
    assert (seen["denoise_mask"], seen["callback"], seen["seed"], seen["disable_pbar"]) == ("MASK", "CALLBACK", 9, False)
    assert asked == [("preview", "MODEL", 3)]


def test_the_rest(asked: Asked) -> None:
    host = Host()
    host.stop_if_interrupted()
    assert host.sampler(len) == "SAMPLER" and host.guider_class() == "CFGGuider"  # type: ignore[arg-type, comparison-overlap]
    assert host.fix_latent("MODEL", torch.zeros(1)) == "FIXED"
    assert host.scheduler_names() == ["simple", "beta"] and host.metadata() is False
    assert host.output_folder("a/b", 1, 2) == ("/out/a/b", "name", 7, "sub")
    assert [entry[0] for entry in asked] == ["interrupted?", "ksampler", "fix"]
