"""Combinations of bits, written w4a8: which are timed on bit planes, and the figure of their times.

Binary tensor cores multiply one plane of the weights by one of the activations, so that one kernel serves every combination, as
in ABQ-LLM (arXiv 2408.08554): fewer bits are fewer bytes and fewer products.
"""

from __future__ import annotations

import re

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from flexq_core.quant import ACTIVATION_BITS, WEIGHT_BITS, LayerPrecision
from flexq_core.studies.parameters import names
from flexq_core.workbook import figures

USUAL = ("w2a2", "w2a4", "w2a8", "w3a8", "w4a4", "w4a8", "w6a6", "w6a8", "w8a8")


def read_combinations(text: str) -> tuple[LayerPrecision, ...]:
    """`none`, or `usual` and names such as w4a8, comma-separated, each once; ValueError says what is accepted."""
    if text == "none":
        return ()
    found = [name for item in names(text, None, "combination") for name in (USUAL if item == "usual" else [item])]
    accepted = (
        f"accepted: usual, none, or w and a with {WEIGHT_BITS[0]} to {WEIGHT_BITS[-1]} bits each, such as w2a8,w4a4"
    )
    if not found:
        raise ValueError(f"combinations is empty; {accepted}")
    precisions = []
    for name in dict.fromkeys(found):
        bits = re.fullmatch(r"w(\d)a(\d)", name, re.ASCII)
        if not bits or int(bits[1]) not in WEIGHT_BITS or int(bits[2]) not in ACTIVATION_BITS:
            raise ValueError(f"combinations holds {name!r}; {accepted}")
        precisions.append(LayerPrecision(int(bits[1]), int(bits[2])))
    return tuple(precisions)


def plot_combinations(table: pd.DataFrame) -> Figure:
    """Time of the product by combination, a mark a number of tokens, and the least time that the bytes allow.

    table: of `KernelStudy.combination_table`, one shape.
    """
    measured = table.dropna(subset=["gemm_us"])
    labels = list(dict.fromkeys(measured["combination"]))
    figure, axis = plt.subplots(figsize=figures.HALF_PAGE, layout="constrained")
    for index, (tokens, rows) in enumerate(measured.groupby("tokens")):
        places = [labels.index(name) for name in rows["combination"]]
        spread = (rows["gemm_us"] - rows["gemm_p10_us"], rows["gemm_p90_us"] - rows["gemm_us"])
        style = {"color": figures.SEQUENCE[index % len(figures.SEQUENCE)], "fmt": "osD^vP"[index % 6], "markersize": 4}
        axis.errorbar(places, rows["gemm_us"], yerr=spread, label=f"{tokens} token{'s' if tokens > 1 else ''}", **style)
    least = measured.groupby("combination", sort=False)["byte_limit_us"].min()
    axis.plot(range(len(least)), least, "_", color=figures.INK, markersize=14, label="limit of the bytes")
    axis.set_xticks(range(len(labels)), labels)
    axis.set(title=f"{table['outputs'].iloc[0]} × {table['features'].iloc[0]}", ylabel="time (µs)", ylim=(0, None))
    figure.legend(loc="outside lower center", ncols=4)
    return figure
