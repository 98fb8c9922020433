"""What `auto` means on a GPU: the backend that was measured to be the faster for such a layer, from auto.json.

    [{"card": "NVIDIA H200", "outputs": 4096, "features": 4096, "tokens": 1, "activation_bits": 6, "backend": "imma"}, ...]

`python -m flexq_core.studies.kernels --outputs <folder> --write-auto-table` writes it from records. A layer's weights are packed
for one backend, whatever the number of tokens, so rows are of the fewest tokens that were timed, one a layer and card.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("auto.json")


def choose(card: str, outputs: int, features: int, activation_bits: int) -> str | None:
    """The backend of the nearest layer that was timed on this card; None for a card without rows.

    card: the GPU's name.  Nearest: by the ratios of outputs and of features, among rows of these activation bits if any.
    """
    rows = [row for row in table() if row["card"] == card]
    rows = [row for row in rows if row["activation_bits"] == activation_bits] or rows

    def distance(row: dict[str, Any]) -> float:
        return abs(math.log(row["outputs"] / outputs)) + abs(math.log(row["features"] / features))

    return min(rows, key=distance)["backend"] if rows and outputs and features else None


@cache
def table() -> list[dict[str, Any]]:
    """All rows."""
    return json.loads(PATH.read_text(encoding="utf-8"))
