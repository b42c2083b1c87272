"""Time-Shift Sampler: Li et al. (2023), arXiv 2305.15583."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffsteer.samplers.timed import Timed
from diffsteer.timing import REFERENCES, SIDES, Timing
from diffsteer.types import setting


@dataclass(frozen=True)
class TimeShift(Timed):
    """Each state's variance tells, within a window, the level that it is really at; it is denoised as a state of that level.

    Against exposure bias: errors of earlier steps leave states at other levels than the grid says. A heuristic. On exact
    samples of Gaussian data the calibrated reference finds no shift but what the variance of finitely many elements brings;
    as published (``reference="noise"``) the rule forgets the data's own variance, is off by that at every level, and on
    latents of unit variance always stands at the window's edge: `out.trace.shifts` says for how many rows, and a warning
    when for most. With ``window=0`` it is the plain chain, bit for bit at order 1 (with eta=0 of solvers that cannot
    be cut, such as DDPM's and PNDM's, the DDIM step on their grid). A step from a level without signal is of first order.
    Where a scheduler clips its estimates (clip_sample) the noise of a step that is looked at follows from the clipped one.

    Cost: that of the plain chain, 1 evaluation more at order 2 and 9 more at order 4; ``reference="calibrated"`` takes a
    plain run first.

    Args:
        particles: chains a prompt; the best is chosen if there is a reward.
        eta: amount of noise in the transition: 0 is DDIM, 1 DDPM.
        window: width of the window, in thousandths of the model's range of times; the paper has 2 to 100 on models of 1,000
            times, more for fewer steps.
        cutoff: no shift at times at or below it, in the same unit; the paper has 200 to 900.
        reference: what a state's variance is compared with: "calibrated", the data's own measured on a plain run of the prompt;
            "noise", as published; "data_var", the data's own given as `data_variance`.
        data_variance: of a clean sample over all its elements, the mean over samples.
        side: "conditioning", network and update are told the shifted level; "update", the update alone.
        order: 1; 2 (S-PNDM) or 4 (F-PNDM) of Liu et al., 2022, arXiv 2202.09778, whose weights are those of even steps.

    Raises:
        DiffsteerError: a value out of its range.
        UnsupportedError: a model whose rows cannot be at levels of their own.
    """

    window: float = setting(40.0, low=0)
    cutoff: float = setting(300.0, low=0)
    reference: str = setting("calibrated", choices=REFERENCES)
    data_variance: float | None = setting(None, low=0)
    side: str = setting("conditioning", choices=SIDES)

    name: ClassVar[str] = "time_shift"
    source: ClassVar[str] = "Li et al., 2023, arXiv 2305.15583"

    @property
    def timing(self) -> Timing:
        """How levels are read."""
        return Timing(
            window=self.window,
            cutoff=self.cutoff,
            reference=self.reference,
            data_variance=self.data_variance,
            side=self.side,
            order=self.order,
        )
