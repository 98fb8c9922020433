"""Types of arguments on command lines."""

from __future__ import annotations

import argparse
from pathlib import Path


def given(text: str) -> str:
    """What names something; nothing, as a shell's unset variable is, would name the folder that one is in."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; is a variable unset?")
    return text


def folder(text: str) -> Path:
    """A path that is not empty."""
    return Path(given(text)).expanduser()
