"""Where the workbook's things are."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
KERNELS = ROOT / "kernels"
REFERENCE = ROOT / "outputs" / "reference"


def outputs() -> Path:
    """The folder that runs write to: FLEXQ_OUTPUTS, relative to the repository, or its outputs/."""
    return ROOT / (os.environ.get("FLEXQ_OUTPUTS") or "outputs")


def model_label(model: str) -> str:
    """A model's name as a file's: `org/name` as `org--name`; no folder's name leads out of the outputs."""
    return re.sub(r"[^\w.-]+", "--", model).strip("-.") or "model"


def run_label(parameters: Mapping[str, Any]) -> str:
    """What tells a run's files from those of other runs of its study: its model, and what else it is about."""
    parts = [str(parameters.get("model", "all"))]
    for name, usual in (("dataset", "auto"), ("activation_bits", 6), ("outliers", 0)):
        value = parameters.get(name, usual)
        if value != usual:
            parts.append(f"{name}-{value:g}" if isinstance(value, float) else f"{name}-{value}")
    return model_label("-".join(parts))


def plan_file(parameters: Mapping[str, Any]) -> Path:
    """Where 01_sensitivity writes the plan that it makes."""
    return outputs() / "plans" / f"{run_label(parameters)}.json"


def in_log() -> bool:
    """Whether what is printed goes to a file rather than to a terminal or a live notebook."""
    return not sys.stderr.isatty() and ("ipykernel" not in sys.modules or "FLEXQ_HEADLESS" in os.environ)
