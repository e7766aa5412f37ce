"""What the files of all other trainers have in common."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Self

from kdkit.config import DistillConfig
from kdkit.doctor.config.foreign import Translation, translate
from kdkit.doctor.findings import Value


@dataclass(frozen=True)
class ForeignDocument(ABC):
    """A file with settings under another trainer's names."""

    source: str
    text: str

    @property
    @abstractmethod
    def values(self) -> Mapping[str, Value]:
        """By the file's own names."""

    @abstractmethod
    def patched(self, patch: Mapping[str, Value]) -> Self:
        """With other values of kdkit's fields, under the file's own names."""

    @cached_property
    def translation(self) -> Translation:
        """In kdkit's terms."""
        return translate(self.values)

    @property
    def config(self) -> DistillConfig:
        """What it says."""
        return self.translation.config

    def in_its_words(self, patch: Mapping[str, Value]) -> Mapping[str, Value]:
        """What a patch changes, by the file's own names."""
        before, after = self.values, self.patched(patch).values
        return {name: value for name, value in after.items() if value != before.get(name)}
