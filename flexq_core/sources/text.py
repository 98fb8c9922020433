"""A text with what identifies it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """A text to score or to calibrate on.

    name: the dataset's short name.  sha256: of the UTF-8 text.  origin: where it came from, with versions.
    """

    name: str
    text: str
    sha256: str
    origin: str

    @classmethod
    def of(cls, name: str, text: str, *, origin: str) -> Text:
        """The text with its digest computed."""
        return cls(name, text, hashlib.sha256(text.encode()).hexdigest(), origin)
