"""What the demo models and this processor show, which is never set beside the paper's numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pandas as pd

from flexq_core.sources.demo import DEMO_MODELS
from flexq_core.studies.report.evidence import divergence_by_kind, divergences_text, ratios
from flexq_core.workbook.report import accuracy_table

ORDER = ("rtn-w6a6", "w6a6", "flexq", "w6a8")
SAME_PERPLEXITY, SAME_TIME = 1e-3, 0.05
"""Shares by which two perplexities, two times or sizes may differ and not be told apart: rounding anew moves a perplexity by some
0.05%, and times vary from run to run."""


def directions(records: pd.DataFrame) -> pd.DataFrame:
    """Whether what stands in for the paper's models and GPU points the same way: {claim, on, same direction, here}.

    These rows bear out no claim of the paper and are counted in none.
    """
    rows = [*_accuracy_directions(records), *_sensitivity_directions(records), *_speed_directions(records)]
    return pd.DataFrame(rows, columns=["the paper's direction", "on", "same direction", "here"])


def _accuracy_directions(records: pd.DataFrame) -> Iterable[tuple[str, str, str, str]]:
    if records.empty:
        return
    table = accuracy_table(records[records["model"].isin(list(DEMO_MODELS))])
    if table.empty:
        return
    table = table[table["outliers"] == 0].drop_duplicates(["model", "dataset", "method"], keep="last")
    for model, mine in table.groupby("model"):
        perplexity = mine.set_index("method")["perplexity"]
        for methods in (ORDER, ("smoothquant-w6a6", "flexq")):
            if set(methods) <= set(perplexity.index):
                values = [perplexity[method] for method in methods]
                ratios = [a / b for a, b in itertools.pairwise(values)]
                signs = [_told(ratio, SAME_PERPLEXITY) for ratio in ratios]
                told = f"{values[0]:.3f}" + "".join(
                    f" {sign} {v:.3f}" for sign, v in zip(signs, values[1:], strict=True)
                )
                yield f"perplexity: {' > '.join(methods)}", model, _direction(signs), told


def _sensitivity_directions(records: pd.DataFrame) -> Iterable[tuple[str, str, str, str]]:
    for model, kinds in divergence_by_kind(records).items():
        if model in DEMO_MODELS:
            layer = "fc2" if "fc2" in kinds else "down_proj"
            most = max(kinds, key=kinds.get)
            yield f"{layer} is the most sensitive kind of layer", model, _yes(most == layer), divergences_text(kinds)


def _speed_directions(records: pd.DataFrame) -> Iterable[tuple[str, str, str, str]]:
    for study, metric, rival, what in (
        ("03_kernels", "median_us", "INT8", "the kernel is faster than INT8"),
        ("04_e2e", "tpot_ms", "W8A8", "a token takes less time than with W8A8"),
        ("04_e2e", "weights_mib", "W8A8", "weights are smaller than with W8A8"),
    ):
        table = ratios(records, study, metric, rival)
        stands_in = ~table["on_gpu"].astype(bool) | table["model"].isin(list(DEMO_MODELS))
        for (model, device), mine in table[stands_in].groupby(["model", "device"]):
            signs = [_told(ratio, SAME_TIME) for ratio in mine["ratio"]]
            told = (
                f"in {signs.count('>')} of {len(mine)} cases; {mine['ratio'].min():.2f}× to {mine['ratio'].max():.2f}×"
            )
            yield what, ", ".join(filter(None, (model, device))), _direction(signs), told


def _told(ratio: float, same: float) -> str:
    """Of two numbers with this ratio the sign between them: ≈ where they differ by no more than this share."""
    return "≈" if abs(ratio - 1) <= same else ">" if ratio > 1 else "<"


def _direction(signs: list[str]) -> str:
    """`yes` where each is >, `no` where one is <, else `not told apart`."""
    return "no" if "<" in signs else "yes" if set(signs) == {">"} else "not told apart"


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"
