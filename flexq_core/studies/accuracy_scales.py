"""What better scales gain: the same codes, kernels and bytes, with each group's scale chosen by its error (quant/scales.py)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from flexq_core.quant import dequantize, quantize_weight
from flexq_core.quant.spec import SCALES
from flexq_core.workbook import figures
from flexq_core.workbook.records import Measurement

if TYPE_CHECKING:
    from flexq_core.studies.accuracy import AccuracyStudy

TITLES = {"absmax": "absmax", "mse": "least squared error", "output": "least output error"}
_COLOURS = {"absmax": figures.NEUTRAL, "mse": figures.MAIN, "output": figures.ACCENT}


def of_method(method: str) -> tuple[str, str]:
    """A method's name and how its scales are chosen: `flexq+mse` → (`flexq`, `mse`), `flexq` → (`flexq`, `absmax`)."""
    name, plus, scales = method.rpartition("+")
    return (name, scales) if plus and scales in SCALES else (method, SCALES[0])


def with_scales(method: str, scales: str) -> str:
    """Inverse of `of_method`."""
    return method if scales == SCALES[0] else f"{method}+{scales}"


def sqnr(weight: Tensor, moments: Tensor, scales: str) -> dict[str, float]:
    """SQNR of a weight [N, K] at 6 bits in dB, and of the layer's output where rounding errors are independent.

    moments: [K], from `input_moments`; it weighs the errors of the output whatever `scales` is.
    """
    quantized = quantize_weight(weight, scales=scales, moments=moments if scales == "output" else None)
    error, weight = (dequantize(quantized).double() - weight).square(), weight.double().square()

    def db(importance: Tensor) -> float:
        signal, noise = ((values * importance).sum().item() for values in (weight, error))
        return 10 * math.log10(signal / noise) if signal and noise else math.inf

    return {"weight_sqnr_db": db(torch.ones_like(moments)), "output_sqnr_db": db(moments.double())}


def layer_sqnr(study: AccuracyStudy) -> pd.DataFrame:
    """Rows of {scales, layer, weight_sqnr_db, output_sqnr_db} of every linear layer, on record; none where all is absmax."""
    columns = ["scales", "layer", "weight_sqnr_db", "output_sqnr_db"]
    if all(of_method(method)[1] == SCALES[0] for method, _ in study.cases()):
        return pd.DataFrame(columns=columns)

    def measured() -> dict[str, Measurement]:
        return {
            f"{metric}/{way}/{name}": Measurement(value, "dB")
            for name, layer in study.run.progress(study.linears(), desc="scales", total=len(study.moments))
            for way in study.scales
            for metric, value in sqnr(layer.weight.detach(), study.moments[name], way).items()
            if math.isfinite(value)  # a layer of zeros, or one that rounding leaves as it is
        }

    records = study.run.records.once(
        model=study.loaded.name,
        method="weight scales",
        parameters={
            **study.loaded.inputs,
            "outliers": study.outliers,
            "scales": study.scales,
            **study.calibration_inputs,
        },
        seed=study.seed,
        compute=measured,
    )
    rows: dict[tuple[str, str], dict] = {}
    for metric, record in records.items():
        name, way, layer = metric.split("/", 2)
        rows.setdefault((way, layer), {"scales": way, "layer": layer})[name] = record.value
    return pd.DataFrame(rows.values(), columns=columns)


def gain_table(table: pd.DataFrame, sqnrs: pd.DataFrame) -> pd.DataFrame:
    """What each way to choose scales costs: a row a way, the change of perplexity (%) by plan, and the layers' mean SQNR (dB).

    table: from `AccuracyStudy.table`; without an unquantised model in it, the perplexities themselves. The columns' name says
    which.  sqnrs: from `layer_sqnr`.  Plans are compared on the backend that all ways ran on.
    """
    split = table["method"].map(of_method)
    mine = table.assign(plan=split.str[0], scales=split.str[1])
    mine = mine[mine["plan"].isin(mine.loc[mine["scales"] != SCALES[0], "plan"])].drop_duplicates("method", keep="last")
    value, title = ("change_percent", "change of perplexity (%)") if "change_percent" in mine else ("perplexity",) * 2
    wide = mine.pivot(index="scales", columns="plan", values=value)
    wide = wide.reindex(index=[s for s in SCALES if s in wide.index], columns=mine["plan"].unique())
    return wide.join(sqnrs.groupby("scales")[["weight_sqnr_db", "output_sqnr_db"]].mean()).rename_axis(columns=title)


def plot_gain(gains: pd.DataFrame) -> Figure:
    """Change of perplexity by plan, a bar a way to choose scales. gains: from `gain_table`."""
    plans = [column for column in gains if not column.endswith("_db")]
    figure, axis = plt.subplots(figsize=figures.HALF_PAGE)
    for offset, (scales, row) in enumerate(gains.iterrows()):
        places = [place + 0.27 * (offset - (len(gains) - 1) / 2) for place in range(len(plans))]
        bars = axis.bar(places, row[plans], width=0.25, color=_COLOURS[scales], label=TITLES[scales])
        axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
    axis.set_xticks(range(len(plans)), plans)
    axis.set_ylabel(gains.columns.name)
    axis.margins(y=0.15)
    axis.grid(False, axis="x")
    if len(gains):
        axis.legend()
    return figure


def claims(table: pd.DataFrame, sqnrs: pd.DataFrame) -> list[tuple[str, bool, str]]:
    """What is claimed of scales, as (claim, whether it holds, the numbers); only for ways that were measured."""
    from flexq_core.studies.accuracy import order_of

    found = []
    by_layer = sqnrs.pivot(index="layer", columns="scales", values=["weight_sqnr_db", "output_sqnr_db"])
    for way, column, error in (("mse", "weight_sqnr_db", "squared"), ("output", "output_sqnr_db", "weighted squared")):
        if {"absmax", way} <= set(sqnrs["scales"]):
            gain = (by_layer[column][way] - by_layer[column]["absmax"]).dropna()
            text = f"scales by {TITLES[way]} raise no layer's {error} error over absmax"
            found.append((text, bool((gain >= 0).all()), f"{gain.min():+.2f} to {gain.max():+.2f} dB"))
    scored = table.dropna(subset=["perplexity"]).drop_duplicates("method", keep="last").set_index("method")
    for method in scored.index:
        plan, way = of_method(method)
        if way != SCALES[0] and plan in scored.index:
            holds, detail = order_of([scored.loc[name].dropna().to_dict() for name in (plan, method)])
            text = f"{plan}: scales by {TITLES[way]} cost no more perplexity than absmax, as far as the text can tell"
            found.append((text, holds, detail))
    return found
