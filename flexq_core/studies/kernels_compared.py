"""Tables of kernel times compared: speed-ups, their means, the bandwidth reached, and figures of all three.

On a GPU a table has `gemm_us`, the product alone, and it is what is compared; on a processor `median_us`, the layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from flexq_core.runtime import auto, ops
from flexq_core.sources import paper
from flexq_core.workbook import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BASELINES = ("torch-int8", "torch-fp16", "torch-fp32")
"""Of these the first that was measured is what speed-ups are over, unless a baseline is named."""

RIVALS = ("torch-fp16", "cublaslt-fp8", "cublas-int8")
"""What speed-ups on a GPU are over."""

DECODE_TOKENS = (1, 4, 8)
"""The batch sizes of the paper's kernel figure."""

_CASE = ["outputs", "features", "tokens"]


def time_column(table: pd.DataFrame) -> str:
    """What is compared: `gemm_us` where the table has it, else `median_us`."""
    return "gemm_us" if "gemm_us" in table else "median_us"


def chosen_backends(table: pd.DataFrame) -> pd.DataFrame:
    """{outputs, features, tokens, method}: FlexQ's fastest backend by case, on a GPU among those that `auto` chooses from."""
    backends = [name for name in auto.CHOICES if name in set(table["method"])] or ops.BACKENDS
    flexq = table[table["method"].isin(backends)].dropna(subset=["median_us"])
    return (
        flexq.sort_values("median_us", kind="stable").drop_duplicates(_CASE)[[*_CASE, "method"]].reset_index(drop=True)
    )


def wgmma_wins(table: pd.DataFrame) -> pd.DataFrame:
    """{outputs, features, wgmma_from}: the tokens from which on `wgmma`'s layer is faster than `imma`'s, or None."""
    rows = []
    for (outputs, features), mine in table.groupby(["outputs", "features"], sort=False):
        times = mine.pivot_table(index="tokens", columns="method", values="median_us")
        if not {"imma", "wgmma"} <= set(times):
            continue
        times = times.dropna(subset=["imma", "wgmma"])
        wins = (times["wgmma"] < times["imma"]).sort_index()
        lasting = wins[::-1].cummin()[::-1]  # and for all numbers above
        first = int(lasting.idxmax()) if lasting.any() else None
        rows.append({"outputs": outputs, "features": features, "wgmma_from": first})
    return pd.DataFrame(rows, columns=["outputs", "features", "wgmma_from"], dtype=object)


def speedups(table: pd.DataFrame, baseline: str = "", time: str = "") -> pd.DataFrame:
    """FlexQ's chosen backend over a baseline: {outputs, features, tokens, method, baseline, speedup}.

    baseline: empty for the first of BASELINES that was measured.  time: FlexQ's; empty for `time_column`'s. Empty without
    the baseline, or without FlexQ.
    """
    column = time_column(table)
    measured = table.dropna(subset=[column])
    baseline = baseline or next((name for name in BASELINES if name in set(measured["method"])), "")
    flexq = measured.merge(chosen_backends(measured), on=[*_CASE, "method"]).assign(
        flexq_us=lambda t: t[time or column]
    )
    base = measured.loc[measured["method"] == baseline, [*_CASE, column]].rename(columns={column: "base_us"})
    both = flexq[[*_CASE, "method", "flexq_us"]].merge(base, on=_CASE).sort_values(_CASE)
    both = both.assign(baseline=baseline, speedup=both["base_us"] / both["flexq_us"])
    return both[[*_CASE, "method", "baseline", "speedup"]].reset_index(drop=True)


def mean_speedups(table: pd.DataFrame) -> pd.DataFrame:
    """On a GPU, geometric means over shapes: {baseline, tokens, decode, shapes, product, layer}.

    tokens: each number, and, where decode is true, those of 1, 4 and 8 that were measured together.  product: FlexQ's product
    over the baseline's.  layer: FlexQ's whole layer, activations quantised, over the baseline's product.
    """
    rows = []
    for baseline in RIVALS:
        product, layer = (speedups(table, baseline, time) for time in ("gemm_us", "median_us"))
        decode = [count for count in DECODE_TOKENS if count in set(product["tokens"])]
        for among in [*([count] for count in sorted(product["tokens"].unique())), decode]:
            if not among:
                continue
            together = among is decode
            label = ", ".join(map(str, among))
            means = [_geometric_mean(found[found["tokens"].isin(among)]["speedup"]) for found in (product, layer)]
            shapes = len(product[product["tokens"].isin(among)].drop_duplicates(["outputs", "features"]))
            rows.append((title(baseline), label, together, shapes, *means))
    return pd.DataFrame(rows, columns=["baseline", "tokens", "decode", "shapes", "product", "layer"])


def crossovers(table: pd.DataFrame) -> pd.DataFrame:
    """On a GPU, with how many tokens FlexQ loses: {shape, timed with}, and {slower than <library>} for each of RIVALS.

    A row a shape. Numbers of tokens are those that were timed, in ranges of neighbours, such as `1, 64 to 512`: with all of a
    range FlexQ's product takes longer than the library's. `never` where it does with none, `–` where the library was not timed.
    """
    rows = {shape: {"shape": f"{shape[0]} × {shape[1]}", "timed with": "–"} for shape in _shapes(table)}
    for rival in RIVALS:
        column = f"slower than {title(rival)}"
        for row in rows.values():
            row[column] = "–"
        for shape, mine in speedups(table, rival).groupby(["outputs", "features"], sort=False):
            rows[shape]["timed with"] = f"{mine['tokens'].min()} to {mine['tokens'].max()}"
            rows[shape][column] = _ranges(mine["tokens"], mine["speedup"] < 1) or "never"
    return pd.DataFrame(list(rows.values()))


def _ranges(counts: pd.Series, chosen: pd.Series) -> str:
    """Those of ascending counts that are chosen, neighbours as a range; empty where none is."""
    runs = (chosen != chosen.shift()).cumsum()
    ends = counts[chosen].groupby(runs[chosen]).agg(["min", "max"])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in ends.itertuples(index=False, name=None))


def _geometric_mean(values: pd.Series) -> float:
    return float(np.exp(np.log(values).mean()))


_TITLES = {
    "imma": "FlexQ, INT8 tensor cores (imma)",
    "wgmma": "FlexQ, Hopper's INT8 (wgmma)",
    "bmma": "FlexQ, bit planes (bmma)",
    "cublas-int8": "cuBLAS INT8",
    "cublaslt-fp8": "cuBLASLt FP8",
    "torchao-int8wo": "torchao INT8 weights",
}
_ON_GPU_TITLES = {"torch-fp32": "cuBLAS FP32", "torch-fp16": "cuBLAS FP16", "torch-bf16": "cuBLAS BF16"}


def title(method: str, on_gpu: bool = True) -> str:
    """A method's name in figures."""
    known = _TITLES | (_ON_GPU_TITLES if on_gpu else {})
    plain = f"FlexQ, {method}" if method in ops.BACKENDS else method.replace("torch-", "torch ").replace("int8", "INT8")
    return known.get(method, plain)


_STYLES = {  # colour and marker, the same in every figure
    "cpu": (figures.MAIN, "o"),
    "imma": (figures.MAIN, "o"),
    "wgmma": (figures.SEQUENCE[3], "s"),
    "bmma": (figures.SEQUENCE[4], "D"),
    "reference": (figures.SEQUENCE[4], "X"),
    "simulate": (figures.SEQUENCE[5], "v"),
    "torch-fp32": (figures.INK, "o"),
    "torch-fp16": (figures.NEUTRAL, "P"),
    "torch-bf16": (figures.SEQUENCE[2], "v"),
    "torch-int8": (figures.ACCENT, "s"),
    "cublas-int8": (figures.ACCENT, "D"),
    "cublaslt-fp8": (figures.SEQUENCE[5], "^"),
    "torchao-int8wo": (figures.INK, "X"),
}
_SHAPE_MARKERS = "osD^"
_GPU_LIMIT = "limit: bandwidth, cuBLAS INT8"
_RATIO_TICKS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 8)


def _line_style(method: str) -> dict[str, str]:
    return dict(zip(("color", "marker"), _STYLES.get(method, (figures.SEQUENCE[3], "*")), strict=True))


def _shapes(table: pd.DataFrame) -> list[tuple[int, int]]:
    return list(table[["outputs", "features"]].drop_duplicates().itertuples(index=False, name=None))


def _four_shapes(table: pd.DataFrame) -> list[tuple[int, int]]:
    """Of those measured with the most numbers of tokens at most four, from small to large."""
    counted = table.groupby(["outputs", "features"], sort=False)["tokens"].nunique()
    shapes = list(counted[counted == counted.max()].index)
    if len(shapes) > 4:
        by_size = sorted(shapes, key=math.prod)
        shapes = [by_size[round(place * (len(shapes) - 1) / 3)] for place in range(4)]
    return shapes


def limit_note(table: pd.DataFrame) -> str:
    """What the limit in figures is, for captions: on a GPU a library's rate is part of it, and others may be faster."""
    if time_column(table) != "gemm_us":
        return "the least time for 6-bit weights at this machine's measured bandwidth and the fastest INT8 product found on it"
    return (
        "the time of 6-bit weights at the bandwidth that the card copies with, which reading alone passes by some percent, and "
        "at the rate that cuBLAS's INT8 reaches on it, which FP8's tensor cores, or a better INT8 kernel, can pass"
    )


def _count_tokens(axis: Axes, counts: pd.Series, most: int) -> None:
    """A logarithmic axis of tokens, labelled at the least of these counts and at others, far enough apart to be read."""
    counts = sorted(set(counts))
    apart = (counts[-1] / counts[0]) ** (1 / most)
    labelled = counts[:1]
    for count in counts[1:]:
        if count >= apart * labelled[-1]:
            labelled.append(count)
    axis.set(xscale="log", xlabel="tokens")
    axis.set_xticks(labelled, map(str, labelled))
    axis.minorticks_off()


def plot_times(table: pd.DataFrame) -> Figure:
    """Time by tokens, a line a method and the limit, a panel a shape; of more than four shapes four from small to large."""
    shapes = _four_shapes(table)
    columns, lines = min(2, len(shapes)), math.ceil(len(shapes) / 2)
    size = (figures.HALF_PAGE[0], 1.9 * lines + 0.9)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, sharey="row", layout="constrained")
    for axis, shape in zip(axes.flat, shapes, strict=False):
        _plot_shape(axis, table[(table["outputs"] == shape[0]) & (table["features"] == shape[1])], time_column(table))
        axis.set_title(f"{shape[0]} × {shape[1]}")
    for axis in axes.flat[len(shapes) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("time (µs)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def plot_rates(table: pd.DataFrame) -> Figure:
    """On a GPU, by tokens: operations a second, and the share of what the machine allows; a line a method, a column a shape.

    The share is the least time for 6-bit weights (`limits_us`) by the product's: a library that reads wider weights has less to
    hope for with few tokens. With many the limit is the rate of cuBLAS's INT8, which others pass.
    """
    shapes = _four_shapes(table)
    size = (figures.HALF_PAGE[0], 4.4)
    figure, axes = plt.subplots(
        2, len(shapes), figsize=size, squeeze=False, sharex=True, sharey="row", layout="constrained"
    )
    for (rates, shares), (outputs, features) in zip(axes.T, shapes, strict=True):
        mine = table[(table["outputs"] == outputs) & (table["features"] == features)]
        for method, rows in mine.dropna(subset=["gemm_us"]).groupby("method", sort=False):
            rows = rows.sort_values("tokens")
            style = _line_style(method) | {"markersize": 3, "lw": 1.2}
            rates.plot(rows["tokens"], rows["gops"] / 1e3, label=title(method), **style)
            shares.plot(rows["tokens"], 100 * rows["limit_us"] / rows["gemm_us"], **style)
        rates.set(yscale="log", title=f"{outputs}\n× {features}")
        shares.axhline(100, color=figures.INK, lw=1, ls="--")
        _count_tokens(shares, mine["tokens"], 3)
    axes[0, 0].set_ylabel("TOP/s")
    axes[1, 0].set(ylabel="of the limit (%)", ylim=(0, None))
    axes[0, 0].plot([], [], "--", color=figures.INK, lw=1, label=_GPU_LIMIT)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def plot_crossovers(table: pd.DataFrame) -> Figure:
    """On a GPU, a library's time over FlexQ's by tokens, a panel a library, a line a shape; FlexQ is faster above 1.

    At most four shapes are told apart, of those timed with the most numbers of tokens; the others are grey. Rings are where a
    line crosses 1, between the numbers that were timed.
    """
    told = _four_shapes(table)
    size = (figures.HALF_PAGE[0], 6.2)
    figure, axes = plt.subplots(len(RIVALS), 1, figsize=size, sharex=True, layout="constrained")
    for axis, rival in zip(axes, RIVALS, strict=True):
        found = speedups(table, rival)
        for shape in sorted(_shapes(found), key=lambda shape: shape in told):
            mine = found[(found["outputs"] == shape[0]) & (found["features"] == shape[1])]
            if shape not in told:
                axis.plot(mine["tokens"], mine["speedup"], color=figures.NEUTRAL, lw=0.6, zorder=1)
                continue
            index = told.index(shape)
            style = {"color": figures.SEQUENCE[index], "marker": _SHAPE_MARKERS[index], "markersize": 3, "lw": 1.2}
            axis.plot(mine["tokens"], mine["speedup"], label=f"{shape[0]} × {shape[1]}", **style)
            crossed = _crossings(mine["tokens"], mine["speedup"])
            axis.plot(crossed, [1] * len(crossed), "o", mfc="none", color=figures.INK, ms=7, zorder=3)
        axis.axhline(1, color=figures.INK, lw=1)
        axis.set(yscale="log", title=f"{title(rival)}'s time over FlexQ's")
        axis.yaxis.set_major_locator(FixedLocator(_RATIO_TICKS))
        axis.yaxis.set_major_formatter("{x:g}×")
        axis.yaxis.set_minor_locator(NullLocator())
    _count_tokens(axes[-1], table["tokens"], 12)
    axes[0].plot([], [], "o", mfc="none", color=figures.INK, ms=7, label="crosses 1")
    if len(_shapes(table)) > len(told):
        axes[0].plot([], [], color=figures.NEUTRAL, lw=0.6, label="other shapes")
    drawn = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=3)
    return figure


def _crossings(tokens: pd.Series, ratios: pd.Series) -> list[float]:
    """Where a line through these points, straight on logarithmic axes, crosses 1."""
    x, y = np.log(tokens.to_numpy(dtype=float)), np.log(ratios.to_numpy())
    before = np.flatnonzero((y[:-1] < 0) != (y[1:] < 0))
    share = y[before] / (y[before] - y[before + 1])
    return list(np.exp(x[before] + share * (x[before + 1] - x[before])))


def _plot_shape(axis: Axes, mine: pd.DataFrame, time: str) -> None:
    on_gpu = time == "gemm_us"
    low, high = ("gemm_p10_us", "gemm_p90_us") if on_gpu else ("p10_us", "p90_us")
    mine = mine.sort_values("tokens", kind="stable")  # records are in the order in which they were measured
    for method, rows in mine.dropna(subset=[time]).groupby("method", sort=False):
        spread = (rows[time] - rows[low], rows[high] - rows[time])
        style = _line_style(method)
        axis.errorbar(
            rows["tokens"], rows[time], yerr=spread, label=title(method, on_gpu), markersize=3.5, lw=1.2, **style
        )
    limit = mine.drop_duplicates("tokens")
    label = _GPU_LIMIT if on_gpu else "limit of this machine"
    axis.plot(limit["tokens"], limit["limit_us"], "--", color=figures.INK, linewidth=1, label=label)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if on_gpu else (1, 3)))
    axis.yaxis.set_major_formatter("{x:,.0f}")
    _count_tokens(axis, limit["tokens"], 5)


def plot_speedups(table: pd.DataFrame, baseline: str = "") -> Figure:
    """Speed-up over a baseline by shape, a colour a number of tokens; over INT8 beside the paper's over INT8 cuBLAS on its GPU.

    Of more than three numbers of tokens those are shown that the paper has.
    """
    found = speedups(table, baseline)
    shapes = _shapes(table)
    on_gpu, over = time_column(table) == "gemm_us", found["baseline"].iloc[0] if len(found) else ""
    as_paper = not on_gpu or over == "cublas-int8"  # on a processor the only figure there is
    published = paper.kernel_speedups().query("kernel == 'flexq'") if as_paper else pd.DataFrame(columns=["tokens"])
    tokens = sorted(table["tokens"].unique())
    if len(tokens) > 3:
        tokens = [count for count in tokens if count in DECODE_TOKENS] or tokens[:3]
    offsets = np.linspace(-0.25, 0.25, len(tokens)) if len(tokens) > 1 else [0.0]
    height = 1.6 + min(0.4, 5.0 / len(shapes)) * len(shapes)
    figure, axis = plt.subplots(figsize=(figures.HALF_PAGE[0], height), layout="constrained")
    for index, (count, offset) in enumerate(zip(tokens, offsets, strict=True)):
        colour = figures.SEQUENCE[index % len(figures.SEQUENCE)]
        plural = "s" if count > 1 else ""
        for rows, marker, face, whose in (
            (found, "o", colour, "measured"),
            (published, "D", "none", "the paper's GPU"),
        ):
            mine = rows[rows["tokens"] == count]
            places = [
                (row.speedup, shapes.index((row.outputs, row.features)) + offset)
                for row in mine.itertuples()
                if (row.outputs, row.features) in shapes
            ]
            if places:
                style = {"color": colour, "markerfacecolor": face, "markersize": 4.5}
                axis.plot(*zip(*places, strict=True), marker, label=f"{count} token{plural}, {whose}", **style)
    axis.axvline(1, color=figures.INK, linewidth=1)
    _name_shapes(axis, shapes)
    label = f"speed-up over {title(over, on_gpu) if over else 'a baseline (none measured)'}"
    axis.set(xlabel=label + ("\n(the paper's: over INT8 cuBLAS)" if as_paper else ""), xscale="log")
    ticks = [tick for tick in _RATIO_TICKS if axis.get_xlim()[0] <= tick <= axis.get_xlim()[1]]
    axis.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axis.minorticks_off()
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def bandwidth_reached(table: pd.DataFrame, tokens: int) -> pd.DataFrame:
    """On a GPU, with so many tokens: {outputs, features, method, bandwidth_share}, of FlexQ the chosen backend alone."""
    rows = table[table["tokens"] == tokens].dropna(subset=["gemm_us"])
    ours = set(chosen_backends(rows)[["outputs", "features", "method"]].itertuples(index=False, name=None))
    mine = [
        row.method not in ops.BACKENDS or (row.outputs, row.features, row.method) in ours for row in rows.itertuples()
    ]
    return rows.loc[mine, ["outputs", "features", "method", "bandwidth_share"]].reset_index(drop=True)


def plot_bandwidth(table: pd.DataFrame, tokens: int = 1) -> Figure:
    """Share of the measured bandwidth that a product reaches, by shape, a mark a method; each method by its own bytes."""
    shapes = _shapes(table)
    height = 1.5 + min(0.3, 4.4 / len(shapes)) * len(shapes)
    figure, axis = plt.subplots(figsize=(figures.HALF_PAGE[0], height), layout="constrained")
    methods = table.loc[table["tokens"] == tokens].dropna(subset=["gemm_us"]).groupby("method", sort=False)
    for method, rows in methods:
        places = [shapes.index((row.outputs, row.features)) for row in rows.itertuples()]
        style = _line_style(method) | {"lw": 0, "markersize": 4.5, "label": title(method)}
        axis.plot(100 * rows["bandwidth_share"], places, **style)
    axis.axvline(100, color=figures.INK, linewidth=1)
    _name_shapes(axis, shapes)
    axis.set(xlabel=f"bandwidth reached, {tokens} token{'s' if tokens > 1 else ''} (% of copying)")
    axis.set_xlim(left=0)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def gpu_figures(table: pd.DataFrame, where: str) -> Iterator[tuple[Figure, str, str]]:
    """(figure, name, caption) of rates, crossovers, speed-ups over each of RIVALS and the bandwidth reached.

    where: for captions.
    """
    told = (
        f"Operations a second by tokens, and the share of the limit, {where}; the limit (dashed): {limit_note(table)}"
    )
    yield plot_rates(table), "rates", told
    told = (
        f"Each library's time over that of FlexQ's product by tokens, {where}: above 1 FlexQ is faster; rings: where that "
        "changes, between the numbers of tokens that were timed; grey: other shapes"
    )
    yield plot_crossovers(table), "crossovers", told
    for rival in RIVALS:
        told = f"Speed-up of FlexQ's product over {title(rival)}'s, {where}"
        if rival == "cublas-int8":
            told += (
                " (filled), and of the paper's kernel over INT8 cuBLAS on its own GPU (hollow; read off the paper's figure, "
                "8-bit activations in down-projections)"
            )
        yield plot_speedups(table, rival), f"speedups-{rival}", told
    told = f"Share of the measured bandwidth of copying that one token's product reaches, each method by its own bytes, {where}"
    yield plot_bandwidth(table), "bandwidth", told


def _name_shapes(axis: Axes, shapes: list[tuple[int, int]]) -> None:
    axis.set_yticks(range(len(shapes)), [f"{n} × {k}" for n, k in shapes])
    axis.set_ylim(len(shapes) - 0.5, -0.5)
