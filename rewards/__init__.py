"""Rewards, one file each. Import them from here: ``from diffsteer.rewards import ClipScore``."""

if __name__ != "diffsteer.rewards":
    raise ImportError(f"import diffsteer.rewards, not {__name__}")

from diffsteer.judging import RankEnsemble
from diffsteer.rewards.aesthetic import Aesthetic
from diffsteer.rewards.clip_score import ClipScore
from diffsteer.rewards.compressibility import Compressibility
from diffsteer.rewards.motion_coherence import MotionCoherence
from diffsteer.rewards.motion_consistency import MotionConsistency
from diffsteer.rewards.program import Program

__all__ = ["Aesthetic", "ClipScore", "Compressibility", "MotionCoherence", "MotionConsistency", "Program", "RankEnsemble"]
