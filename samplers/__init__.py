"""Steering methods, one file a published method. Import them from here: ``from diffsteer.samplers import FeynmanKac``."""

if __name__ != "diffsteer.samplers":
    raise ImportError(f"import diffsteer.samplers, not {__name__}")

from diffsteer.samplers.best_of_n import BestOfN
from diffsteer.samplers.dps import DPS
from diffsteer.samplers.epsilon_scaling import EpsilonScaling
from diffsteer.samplers.feynman_kac import FeynmanKac
from diffsteer.samplers.freedom import FreeDoM
from diffsteer.samplers.lgd import LGD
from diffsteer.samplers.mpgd import MPGD
from diffsteer.samplers.tfg import TFG
from diffsteer.samplers.time_shift import TimeShift
from diffsteer.samplers.universal import UniversalGuidance

__all__ = ["BestOfN", "DPS", "EpsilonScaling", "FeynmanKac", "FreeDoM", "LGD", "MPGD", "TFG", "TimeShift", "UniversalGuidance"]
