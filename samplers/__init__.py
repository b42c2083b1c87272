"""Steering methods, one file a published method. Import them from here: ``from diffsteer.samplers import FeynmanKac``."""

if __name__ != "diffsteer.samplers":
    raise ImportError(f"import diffsteer.samplers, not {__name__}")

from diffsteer.samplers.beam import Beam
from diffsteer.samplers.best_of_n import BestOfN
from diffsteer.samplers.d_flow import DFlow
from diffsteer.samplers.depth_first import DepthFirst
from diffsteer.samplers.dno import DNO
from diffsteer.samplers.dps import DPS
from diffsteer.samplers.epsilon_scaling import EpsilonScaling
from diffsteer.samplers.evolutionary import Evolutionary
from diffsteer.samplers.feynman_kac import FeynmanKac
from diffsteer.samplers.freedom import FreeDoM
from diffsteer.samplers.halving import SuccessiveHalving
from diffsteer.samplers.lgd import LGD
from diffsteer.samplers.mpgd import MPGD
from diffsteer.samplers.random_search import RandomSearch
from diffsteer.samplers.reno import ReNO
from diffsteer.samplers.rollover import Rollover
from diffsteer.samplers.search_over_paths import SearchOverPaths
from diffsteer.samplers.stages import Stages
from diffsteer.samplers.tfg import TFG
from diffsteer.samplers.time_shift import TimeShift
from diffsteer.samplers.universal import UniversalGuidance
from diffsteer.samplers.zero_order import ZeroOrder

__all__ = [
    "Beam",
    "BestOfN",
    "DFlow",
    "DNO",
    "DPS",
    "DepthFirst",
    "EpsilonScaling",
    "Evolutionary",
    "FeynmanKac",
    "FreeDoM",
    "LGD",
    "MPGD",
    "RandomSearch",
    "ReNO",
    "Rollover",
    "SearchOverPaths",
    "Stages",
    "SuccessiveHalving",
    "TFG",
    "TimeShift",
    "UniversalGuidance",
    "ZeroOrder",
]
