"""From how many tokens on `auto` takes `wgmma` on a Hopper card, measured by layer: auto.json.

    [{"card": "NVIDIA H200", "outputs": 4096, "features": 4096, "wgmma_from": 128}, ...]

`imma` and `wgmma` read the same repacked weights, so that each call can take the faster. `imma` shares a layer among more blocks,
`wgmma` reads activations less often: the larger the layer, the sooner it wins. `python -m flexq_core.studies.kernels --outputs
<folder> --write-auto-table` writes the file from records.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("auto.json")
CHOICES = ("imma", "wgmma")
"""What `auto` chooses from on a GPU."""
UNMEASURED_FROM = 65
"""For a card without rows."""
UNDECIDED_FROM = 129
"""For a layer whose row says null: `wgmma` was faster for no number that was timed, but reads weights once for 128 tokens."""


def wgmma_from(card: str, outputs: int, features: int) -> int:
    """The least number of tokens for which `auto` takes `wgmma`: as the nearest layer timed on this card has it.

    card: the GPU's name.  Nearest: by the ratios of outputs and of features.
    """
    rows = [row for row in table() if row["card"] == card]

    def distance(row: dict[str, Any]) -> float:
        return abs(math.log(row["outputs"] / outputs)) + abs(math.log(row["features"] / features))

    if not rows:
        return UNMEASURED_FROM
    found = min(rows, key=distance)["wgmma_from"]
    return UNDECIDED_FROM if found is None else found


@cache
def table() -> list[dict[str, Any]]:
    """All rows."""
    return json.loads(PATH.read_text(encoding="utf-8"))
