"""Steering methods, one file a published method. Import them from here: ``from diffsteer.samplers import FeynmanKac``."""

if __name__ != "diffsteer.samplers":
    raise ImportError(f"import diffsteer.samplers, not {__name__}")

from diffsteer.samplers.best_of_n import BestOfN
from diffsteer.samplers.feynman_kac import FeynmanKac

__all__ = ["BestOfN", "FeynmanKac"]
