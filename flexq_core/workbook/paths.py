"""Where the workbook's things are."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
KERNELS = ROOT / "kernels"
REFERENCE = ROOT / "outputs" / "reference"


def outputs() -> Path:
    """The folder that runs write to: FLEXQ_OUTPUTS, or outputs/ of this repository."""
    return Path(os.environ.get("FLEXQ_OUTPUTS") or ROOT / "outputs")
