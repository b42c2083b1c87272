"""What is asked of ComfyUI beside the objects of a graph. Imported nowhere else, and only while a node runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


class Host:
    """ComfyUI itself; tests put another in its place."""

    def stop_if_interrupted(self) -> None:
        """Raise ComfyUI's own exception if the user has pressed Cancel."""
        import comfy.model_management

        comfy.model_management.throw_exception_if_processing_interrupted()

    def keep_loaded(self, guider: Any, shape: Sequence[int]) -> None:
        """Bring the model back to where it computes, with room for states of that shape: decoding in the middle of a run may
        have moved it away."""
        import comfy.model_management
        import comfy.sampler_helpers

        more = getattr(guider, "loaded_models", [])
        wanted, least = comfy.sampler_helpers.estimate_memory(guider.model_patcher, list(shape), guider.conds)
        comfy.model_management.load_models_gpu(
            [guider.model_patcher, *more], memory_required=wanted, minimum_memory_required=least
        )

    def sampler(self, function: Callable[..., Tensor]) -> Any:
        """A SAMPLER of a sampler function."""
        import comfy.samplers

        return comfy.samplers.KSAMPLER(function)

    def scheduler_names(self) -> Sequence[str]:
        """The schedulers that a graph can choose from."""
        import comfy.samplers

        return list(comfy.samplers.SCHEDULER_NAMES)

    def sigmas(self, model: Any, scheduler: str, steps: int, denoise: float) -> Tensor:
        """SIGMAS as ComfyUI's BasicScheduler gives them: (steps + 1,), the last `steps` of ``steps / denoise``."""
        import comfy.samplers

        whole = int(steps / denoise)
        grid: Tensor = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, whole)
        return grid.cpu()[-(steps + 1) :]

    def guider_class(self) -> type[Any]:
        """Classifier-free guidance."""
        import comfy.samplers

        guider: type[Any] = comfy.samplers.CFGGuider
        return guider

    def fix_latent(self, model: Any, samples: Tensor) -> Tensor:
        """An empty latent with the channels of the model."""
        import comfy.sample

        fixed: Tensor = comfy.sample.fix_empty_latent_channels(model, samples)
        return fixed

    def sample(
        self, guider: Any, noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor, mask: Tensor | None, seed: int
    ) -> Tensor:
        """Run a SAMPLER, with progress and previews."""
        import comfy.model_management
        import comfy.utils
        import latent_preview

        callback = latent_preview.prepare_callback(guider.model_patcher, len(sigmas) - 1)
        samples: Tensor = guider.sample(
            noise,
            latent,
            sampler,
            sigmas,
            denoise_mask=mask,
            callback=callback,
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
        return samples.to(comfy.model_management.intermediate_device())

    def output_folder(self, prefix: str, width: int, height: int) -> tuple[str, str, int, str]:
        """Where a file goes: (folder, name, number, subfolder)."""
        import folder_paths

        folder, name, number, subfolder, _ = folder_paths.get_save_image_path(
            prefix, folder_paths.get_output_directory(), width, height
        )
        return folder, name, number, subfolder

    def metadata(self) -> bool:
        """Is metadata wanted in files?"""
        from comfy.cli_args import args

        return not args.disable_metadata


HOST = Host()
