"""The loss of a step: named terms, their weights at this step, and their sum."""

from kdkit.training.objective.across import Across, relate_vocabularies
from kdkit.training.objective.terms import (
    ITEMS,
    PROJECTOR,
    HiddenTerm,
    Item,
    Moment,
    Scene,
    StudentPass,
    Term,
    TermValue,
    VocabularyTerm,
    build_projector,
    count_items,
)
from kdkit.training.objective.weighted_sum import Objective

__all__ = [
    "ITEMS",
    "PROJECTOR",
    "Across",
    "HiddenTerm",
    "Item",
    "Moment",
    "Objective",
    "Scene",
    "StudentPass",
    "Term",
    "TermValue",
    "VocabularyTerm",
    "build_projector",
    "count_items",
    "relate_vocabularies",
]
