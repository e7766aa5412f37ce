"""Training on the student's own text: drawing it, guarding it, keeping it for replay, and how much of it there is.

`Rollout` is what the trainer calls; the rest are its parts.
"""

from kdkit.training.rollout.buffer import HeldText, ReplayBuffer, pack_texts, unpack_texts
from kdkit.training.rollout.building import build_rollout
from kdkit.training.rollout.generator import StudentGenerator, StudentText
from kdkit.training.rollout.guard import REASONS, Guard, Verdict, repeat_fractions
from kdkit.training.rollout.mixing import STATE_FILE, TEXTS_FILE, Rollout
from kdkit.training.rollout.threshold import AdaptiveThreshold, CollapseRule, Shares, TextCounts, shares

__all__ = [
    "REASONS",
    "STATE_FILE",
    "TEXTS_FILE",
    "AdaptiveThreshold",
    "CollapseRule",
    "Guard",
    "HeldText",
    "ReplayBuffer",
    "Rollout",
    "Shares",
    "StudentGenerator",
    "StudentText",
    "TextCounts",
    "Verdict",
    "build_rollout",
    "pack_texts",
    "repeat_fractions",
    "shares",
    "unpack_texts",
]
