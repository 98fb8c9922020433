"""From how many tokens on `auto` takes `wgmma` on a Hopper card, measured by layer: auto.json.

    [{"card": "NVIDIA H200", "outputs": 12288, "features": 4096, "wgmma_from": 64}, ...]

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
"""Where the table is empty."""
UNDECIDED_FROM = 129
"""For a layer whose row says null: `wgmma` was faster for no number that was timed, but of more than 128 tokens its tiles hold
128 or 256, those of `imma` 64, and each reads its weights once."""


def choice(card: str, tokens: int, outputs: int, features: int) -> str:
    """What `auto` takes of CHOICES on a Hopper card."""
    return "wgmma" if tokens >= wgmma_from(card, outputs, features) else "imma"


def wgmma_from(card: str, outputs: int, features: int) -> int:
    """The least number of tokens for which `auto` takes `wgmma`: as the nearest layer of the card's rows has it.

    card: the name of a Hopper GPU.  Nearest: by the ratios of outputs and of features.
    """

    def distance(row: dict[str, Any]) -> float:
        return abs(math.log(row["outputs"] / outputs)) + abs(math.log(row["features"] / features))

    rows = rows_for(card)
    if not rows:
        return UNMEASURED_FROM
    found = min(rows, key=distance)["wgmma_from"]
    return UNDECIDED_FROM if found is None else found


def rows_for(card: str) -> list[dict[str, Any]]:
    """The rows that decide what `auto` takes on a card; none where the table is empty.

    card: the name of a GPU; where it has no rows, the card with the most words of its name stands for it. All in the table are
    Hopper's, and only on those does `auto` choose by it.
    """

    def likeness(name: str) -> tuple[bool, int]:
        return name == card, len(set(name.split()) & set(card.split()))

    nearest = max((row["card"] for row in table()), key=likeness, default=None)
    return [row for row in table() if row["card"] == nearest]


@cache
def table() -> list[dict[str, Any]]:
    """All rows."""
    return json.loads(PATH.read_text(encoding="utf-8"))
