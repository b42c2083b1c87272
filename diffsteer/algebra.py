"""The denoising algebra: one interpolant, one transition and its density, for VP, EDM and rectified-flow models.

Everywhere ``x_t = alpha x0 + sigma eps``. VP: ``alpha^2 + sigma^2 = 1``; EDM: ``alpha = 1``; rectified flow:
``alpha = 1 - t``, ``sigma = t``. A `Level` is one pair (alpha, sigma), for all rows or one a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST_SIGNAL = 0.02  # the least alpha that an update through a network is divided by: a flow begins with none
NO_SIGNAL = 1e-3  # below this alpha no clean estimate follows from a noise: flows and zero terminal SNR begin so
PREDICTIONS = ("eps", "v", "x0", "velocity")


class Level(NamedTuple):
    """A noise level: scalars, or tensors of shape (N,) for a level a row."""

    alpha: Tensor
    sigma: Tensor

    def like(self, x: Tensor) -> Level:
        """The level shaped to multiply `x` (N, ...)."""
        return Level(_broadcast(self.alpha, x), _broadcast(self.sigma, x))


def level(alpha: float | Tensor, sigma: float | Tensor) -> Level:
    """A level in float64, so that differences of neighbouring levels keep their digits."""
    return Level(torch.as_tensor(alpha, dtype=torch.float64), torch.as_tensor(sigma, dtype=torch.float64))


def to_clean(prediction: str, x: Tensor, output: Tensor, at: Level) -> tuple[Tensor, Tensor]:
    """Turn a network's output into the clean estimate and the noise.

    Args:
        prediction: "eps"; "x0"; "v" = alpha eps - sigma x0 on the unit circle (Salimans & Ho, 2022, arXiv 2202.00512),
            x being scaled there first where alpha^2 + sigma^2 is not 1; "velocity" = eps - x0 (Lipman et al., 2022,
            arXiv 2210.02747).
        x, output: (N, ...).
        at: the level of x.

    Returns:
        (x0, eps), each (N, ...), with ``alpha x0 + sigma eps = x``.

    Raises:
        ValueError: an unknown prediction.
    """
    alpha, sigma = at.like(x)
    if prediction == "eps":
        return (x - sigma * output) / alpha, output
    if prediction == "x0":
        return output, (x - alpha * output) / sigma
    if prediction == "v":
        square = alpha**2 + sigma**2
        length = square.sqrt()
        return alpha / square * x - sigma / length * output, sigma / square * x + alpha / length * output
    if prediction == "velocity":
        return (x - sigma * output) / (alpha + sigma), (x + alpha * output) / (alpha + sigma)
    raise ValueError(f"unknown prediction {prediction!r}; valid: {', '.join(PREDICTIONS)}")


def mixed(output: Tensor, weights: Sequence[float]) -> Tensor:
    """Predictions of several experts, (N * E, ...) with an expert's rows side by side, as one: the weighted sum, (N, ...).

    Of networks of one prediction type this is the same sum of clean estimates and of noises, if the weights add up to one.
    """
    if len(weights) == 1:
        return output
    w = torch.tensor(weights, dtype=output.dtype, device=output.device).view(-1, *[1] * (output.ndim - 1))
    return (output.view(-1, len(weights), *output.shape[1:]) * w).sum(1)


def posterior_std(at: Level, to: Level) -> Tensor:
    """``nu^2 = (sigma'^2 / sigma^2) (sigma^2 - (alpha / alpha')^2 sigma'^2)``: for VP DDPM's posterior (Song et al., 2020,
    arXiv 2010.02502, eq. 16 with eta = 1); the same family on any other path, finite at alpha = 0."""
    inside = at.sigma**2 - (at.alpha / to.alpha) ** 2 * to.sigma**2
    variance = (to.sigma / at.sigma) ** 2 * inside.clamp(min=0)
    return torch.where(at.sigma > 0, variance, torch.zeros_like(variance)).sqrt()


def quadratic_std(at: Level, to: Level) -> Tensor:
    """The noise of a diffusion with ``g(t) = 3 t^2`` in a flow's time t = sigma / (alpha + sigma) (Kim et al., 2025, arXiv
    2503.19385): ``nu^2 = integral of g^2 = 9/5 (t^5 - t'^5)``, at most sigma', which forgets the old noise altogether. Another
    model's states are the flow's, scaled by alpha + sigma, and so is its noise."""
    t, s = (v.sigma / (v.alpha + v.sigma) for v in (at, to))
    return torch.minimum((9 / 5 * (t**5 - s**5).clamp(min=0)).sqrt() * (to.alpha + to.sigma), to.sigma)


# Amounts of noise by name; a sampler's eta in [0, 1] multiplies them.
NOISES: dict[str, Callable[[Level, Level], Tensor]] = {"eta": posterior_std, "quadratic": quadratic_std}


def noise_std(at: Level, to: Level, eta: float, noise: str = "eta") -> Tensor:
    """nu, the standard deviation of the noise that the transition adds: eta times the named amount."""
    return eta * NOISES[noise](at, to)


def transition_mean(x0: Tensor, eps: Tensor, at: Level, to: Level, eta: float, noise: str = "eta") -> Tensor:
    """The mean of the next state: ``alpha' x0 + sqrt(sigma'^2 - nu^2) eps``. (N, ...) -> (N, ...)."""
    nu = noise_std(at, to, eta, noise)
    along = (to.sigma**2 - nu**2).clamp(min=0).sqrt()
    return _broadcast(to.alpha, x0) * x0 + _broadcast(along, x0) * eps


def transition(x0: Tensor, eps: Tensor, at: Level, to: Level, eta: float, z: Tensor, noise: str = "eta") -> Tensor:
    """Draw the next state: the mean plus ``nu z``.

    Args:
        x0, eps: the clean estimate and the noise at the level `at`, (N, ...).
        to: the next level, with less noise.
        eta: amount of noise in [0, 1]; 0 is the deterministic DDIM step (Euler's step for a flow).
        z: standard normal, (N, ...).
        noise: what eta is a share of, see `NOISES`. As steps grow fine every amount keeps the marginals of the model.
    """
    return transition_mean(x0, eps, at, to, eta, noise) + _broadcast(noise_std(at, to, eta, noise), x0) * z


def log_density(x_next: Tensor, x0: Tensor, eps: Tensor, at: Level, to: Level, eta: float, noise: str = "eta") -> Tensor:
    """log p(x' | x) of the transition, summed over all elements of a row in float64. Returns (N,).

    Raises:
        ValueError: the transition is deterministic and has no density (eta or the next sigma is 0).
    """
    nu = noise_std(at, to, eta, noise)
    if not bool((nu > 0).all()):
        raise ValueError("a deterministic transition has no density: eta and the next level's sigma must be positive")
    z = (x_next - transition_mean(x0, eps, at, to, eta, noise)).double() / _broadcast(nu, x0.double())
    count = z[0].numel()
    return -0.5 * z.flatten(1).square().sum(1) - count * (nu.log() + 0.5 * math.log(2 * math.pi))


def _broadcast(value: Tensor, x: Tensor) -> Tensor:
    value = value.to(x.device, x.dtype)
    return value.reshape(-1, *[1] * (x.ndim - 1)) if value.ndim else value
