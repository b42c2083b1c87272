"""Rewards, one file each. Import them from here: ``from diffsteer.rewards import ClipScore``."""

if __name__ != "diffsteer.rewards":
    raise ImportError(f"import diffsteer.rewards, not {__name__}")

from diffsteer.judging import RankEnsemble
from diffsteer.rewards.aesthetic import Aesthetic
from diffsteer.rewards.classifier import Classifier
from diffsteer.rewards.clip_score import ClipScore, SecondClip
from diffsteer.rewards.compressibility import Compressibility
from diffsteer.rewards.hps import HumanPreference
from diffsteer.rewards.image_reward import ImageReward
from diffsteer.rewards.looks import Brightness, Sharpness, Symmetry
from diffsteer.rewards.motion_coherence import MotionCoherence
from diffsteer.rewards.motion_consistency import MotionConsistency
from diffsteer.rewards.pick_score import PickScore
from diffsteer.rewards.program import Program
from diffsteer.rewards.remote_judge import RemoteJudge
from diffsteer.rewards.stability import Stability
from diffsteer.rewards.vqa_score import VqaScore

__all__ = [
    "Aesthetic",
    "Brightness",
    "Classifier",
    "ClipScore",
    "Compressibility",
    "HumanPreference",
    "ImageReward",
    "MotionCoherence",
    "MotionConsistency",
    "PickScore",
    "Program",
    "RankEnsemble",
    "RemoteJudge",
    "SecondClip",
    "Sharpness",
    "Stability",
    "Symmetry",
    "VqaScore",
]
