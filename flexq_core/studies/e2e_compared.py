"""End to end compared: figures of latency, memory and a decode step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import Patch

from flexq_core.sources import paper
from flexq_core.workbook import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLES = {
    "fp16": "FP16",
    "fp32": "FP32",
    "bf16": "BF16",
    "w8a16": "W8A16, torch",
    "w8a8": "W8A8, torch",
    "smoothquant-w8a8": "W8A8, SmoothQuant",
    "fp8": "FP8, torch",
    "w6a6": "W6A6",
    "flexq": "FlexQ",
    "w6a8": "W6A8",
    "w6ax": "FlexQ",  # the paper's name in its figure
}
_PREFILL = "//////"


def _colour(method: str) -> str:
    return figures.method_colour("flexq" if method == "w6ax" else method)


def _panels(lengths: int, bars: int, published: int) -> tuple[Figure, Any]:
    """A figure with a panel an output length, and below them one each for the paper's where there are any."""
    columns, rows = max(lengths, published), 1 + bool(published)
    size = (max(figures.HALF_PAGE[0], 1.1 + 1.75 * columns), 1.0 + 0.22 * (bars + (4 if published else 0)) + 0.4 * rows)
    ratios = [bars, 4][:rows]
    return plt.subplots(rows, columns, figsize=size, squeeze=False, sharey="row", height_ratios=ratios)


def plot_latency(table: pd.DataFrame, model: str, published: pd.DataFrame) -> Figure:
    """Seconds by method, a panel an output length: prefill hatched, decode plain; below, what the paper shows for its GPU.

    table: of `EndToEndStudy.table`.  published: of `EndToEndStudy.published`; may be empty.
    """
    measured = table.dropna(subset=["total_s"])
    lengths, theirs = sorted(measured["output_tokens"].unique()), sorted(published["output_tokens"].unique())
    figure, axes = _panels(len(lengths), measured["method"].nunique(), len(theirs))
    for axis in axes.flat:
        axis.set_visible(False)
    for axis, length in zip(axes[0], lengths, strict=False):
        rows = measured[measured["output_tokens"] == length].iloc[::-1]
        titles, colours = _titles_and_colours(rows)
        prefill = rows["ttft_ms"] / 1e3
        axis.barh(titles, prefill, color="white", edgecolor=colours, hatch=_PREFILL, linewidth=0.8)
        bars = axis.barh(
            titles, rows["total_s"] - prefill, left=prefill, color=colours, edgecolor=colours, linewidth=0.8
        )
        _finish(axis, bars, rows["total_s"], f"{length} output tokens", "time (s)", 1.35)
    for axis, length in zip(axes[-1], theirs, strict=False):
        rows = published[published["output_tokens"] == length].iloc[::-1]
        titles, colours = _titles_and_colours(rows, paper=True)
        bars = axis.barh(titles, rows["seconds"], color=colours, alpha=0.6)
        _finish(axis, bars, rows["seconds"], f"{length} output tokens", "paper's GPU (s)", 1.35)
    colours = _drawn_colours(measured)
    kinds = {
        "prefill and first token": [
            Patch(facecolor="white", edgecolor=each, hatch=_PREFILL, linewidth=0.8) for each in colours
        ],
        "decode": [Patch(color=each) for each in colours],
    }
    _legend(figure, kinds, title=model)
    return figure


def published_note(published: pd.DataFrame) -> str:
    """What to know of the paper's bars of this model, which `plot_memory` marks with a star; empty where there is nothing.

    published: of `EndToEndStudy.published`.
    """
    told = []
    for other, bars in _copied_bars(published).items():
        lengths = (f"{tokens} tokens ({', '.join(map(_paper_title, bars[tokens]))})" for tokens in sorted(bars))
        told.append(f"* Of the paper's memory bars those at {' and '.join(lengths)} equal {other}'s to the last digit.")
    return " ".join(told)


def _copied_bars(published: pd.DataFrame) -> dict[str, dict[int, list[str]]]:
    """Memory bars of this model in the paper that are another's: other model → output tokens → methods."""
    found: dict[str, dict[int, list[str]]] = {}
    for one, another, tokens, method, _ in paper.shared_memory_bars():
        for mine, other in ((one, another), (another, one)):
            if (published["model"] == mine).any():
                found.setdefault(other, {}).setdefault(tokens, []).append(method)
    return found


def plot_memory(table: pd.DataFrame, model: str, published: pd.DataFrame) -> Figure:
    """Memory by method for the longest output: linear weights, the rest, KV cache; below, in its unit, the paper's."""
    measured = table.dropna(subset=["weights_mib"])
    rows = measured[measured["output_tokens"] == measured["output_tokens"].max()].iloc[::-1]
    longest = published[published["output_tokens"] == published["output_tokens"].max()].iloc[::-1]
    unit, mib = ("GB", 2**20 / 1e9) if len(longest) else ("MiB", 1.0)
    sizes = ["weights_mib", "linear_weights_mib", "kv_cache_mib"]
    rows = rows.assign(**rows[sizes].astype(float) * mib)
    figure, axes = _panels(1, len(rows), 1 if len(longest) else 0)
    axis, (titles, colours) = axes[0, 0], _titles_and_colours(rows)
    rest = rows["weights_mib"] - rows["linear_weights_mib"]
    axis.barh(titles, rows["linear_weights_mib"], color=colours)
    axis.barh(titles, rest, left=rows["linear_weights_mib"], color=figures.NEUTRAL)
    cache = {"color": "white", "edgecolor": figures.INK, "hatch": _PREFILL, "linewidth": 0.6}
    bars = axis.barh(titles, rows["kv_cache_mib"], left=rows["weights_mib"], **cache)
    _finish(axis, bars, rows["weights_mib"] + rows["kv_cache_mib"], "", f"memory, {model} ({unit})")
    if len(longest):
        titles, colours = _titles_and_colours(longest, paper=True)
        copied = {m for bars in _copied_bars(longest).values() for m in bars.get(longest["output_tokens"].max(), [])}
        titles = [f"{title} *" if m in copied else title for title, m in zip(titles, longest["method"], strict=True)]
        bars = axes[1, 0].barh(titles, longest["memory_gb"], color=colours, alpha=0.6)
        _finish(axes[1, 0], bars, longest["memory_gb"], "", "paper's GPU (GB)")
    kinds = {
        "linear weights": [Patch(color=each) for each in _drawn_colours(rows.iloc[::-1])],
        "rest of the model": [Patch(facecolor=figures.NEUTRAL)],
        "KV cache": [Patch(facecolor="white", edgecolor=figures.INK, hatch=_PREFILL, linewidth=0.6)],
    }
    _legend(figure, kinds, columnspacing=1)
    return figure


_STEP = {"gemm": figures.MAIN, "attention": figures.ACCENT, "other": figures.NEUTRAL, "idle": "white"}
"""Part of a step (steps.py) → colour."""


def plot_step(table: pd.DataFrame, model: str) -> Figure | None:
    """Where a decode step's time goes by method: products, attention, the rest and idle, with the limit of its bytes as a line.

    table: of `EndToEndStudy.table`.  None where no step was taken apart, as on a processor.
    """
    rows = table.dropna(subset=["step_gemm_ms"]).drop_duplicates("method", keep="last").iloc[::-1]
    if rows.empty:
        return None
    figure, axis = plt.subplots(figsize=(figures.FULL_PAGE[0], 1.2 + 0.3 * len(rows)))
    titles, left = _titles_and_colours(rows)[0], 0.0
    for part, colour in _STEP.items():
        bars = axis.barh(
            titles, rows[f"step_{part}_ms"], left=left, color=colour, edgecolor=figures.INK, linewidth=0.4, label=part
        )
        left = left + rows[f"step_{part}_ms"]
    places = range(len(rows))
    limits = axis.vlines(
        rows["limit_ms"], [y - 0.4 for y in places], [y + 0.4 for y in places], color=figures.INK, linewidth=2
    )
    limits.set_label("limit: bytes / bandwidth")
    _finish(axis, bars, left, "", f"a decode step, {model} (ms)")
    figure.legend(loc="outside upper center", ncols=5, columnspacing=1)
    return figure


def _titles_and_colours(rows: pd.DataFrame, *, paper: bool = False) -> tuple[list[str], list[str]]:
    title = _paper_title if paper else lambda method: TITLES.get(method, method)
    titles = [title(method) for method in rows["method"]]
    return titles, [_colour(method) for method in rows["method"]]


def _drawn_colours(rows: pd.DataFrame) -> list[str]:
    """Of the methods, from the top bar down."""
    return list(dict.fromkeys(map(_colour, rows["method"])))


def _legend(figure: Figure, kinds: dict[str, list[Patch]], **options: Any) -> None:
    """What bars' parts mean, above the panels: label → the part as it is drawn, in the colour of each method."""
    shown = {"handler_map": {tuple: HandlerTuple(ndivide=None, pad=0)}, "handlelength": 4}
    keys = [tuple(parts) for parts in kinds.values()]
    figure.legend(keys, list(kinds), loc="outside upper center", ncols=len(kinds), **shown, **options)


def _paper_title(method: str) -> str:
    return TITLES[method].removesuffix(", torch")  # its INT8 is not torch's


def _finish(axis: Axes, bars: Any, totals: pd.Series, title: str, label: str, margin: float = 1.15) -> None:
    axis.set_visible(True)
    axis.bar_label(
        bars, [f"{total:.0f}" if total >= 100 else f"{total:#.3g}" for total in totals], padding=2, fontsize=8
    )
    axis.set(xlabel=label, title=title, xlim=(0, margin * totals.max()))
    axis.grid(False, axis="y")
    axis.locator_params(axis="x", nbins=4)
