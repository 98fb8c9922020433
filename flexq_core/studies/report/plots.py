"""The paper's tables and figures with ours in them, as stars, where measured."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from flexq_core.sources import paper
from flexq_core.studies.report.evidence import (
    DATASETS,
    HEADLINES,
    QUANTITIES,
    Ratios,
    end_to_end_ratios,
    end_to_end_rivals,
    kernel_ratios,
    measured_perplexities,
    paper_end_to_end_ratios,
    paper_increases,
    paper_kernel_ratios,
)
from flexq_core.workbook import figures

_PAPER_METHODS = {  # colour and marker
    "SmoothQuant": ("#e69f00", "s"),
    "OmniQuant": ("#cc79a7", "^"),
    "I-LLM": ("#009e73", "v"),
    "DuQuant": ("#56b4e9", "D"),
    "FlexQ": (figures.MAIN, "o"),
}
_OURS = {"marker": "*", "s": 90, "color": figures.ACCENT, "edgecolors": figures.INK, "linewidths": 0.5, "zorder": 5}


def plot_perplexity(records: pd.DataFrame) -> Figure:
    """The paper's increase of perplexity by method and model, ours as stars where measured."""
    printed, ours = paper_increases(), measured_perplexities(records).query("method == 'flexq'")
    models = list(printed["model"].unique())
    figure, axes = plt.subplots(1, 2, figsize=figures.FULL_PAGE, sharey=True)
    for axis, (dataset, title) in zip(axes, DATASETS.items(), strict=True):
        for method, (colour, marker) in _PAPER_METHODS.items():
            rows = printed[(printed["dataset"] == dataset) & (printed["method"] == method)]
            places = [models.index(model) for model in rows["model"]]
            axis.plot(places, rows["increase"], marker, color=colour, label=method, ms=5)
        mine = ours[ours["dataset"] == dataset]
        places = [models.index(model) for model in mine["model"]]
        if places:
            axis.scatter(
                places, (mine["perplexity"] - mine["base"]).clip(lower=0.005), label="FlexQ, measured here", **_OURS
            )
        axis.axhline(HEADLINES["perplexity"], color=figures.INK, lw=0.8, ls="--", label="the abstract's 0.05")
        axis.set(title=title, yscale="log")
        axis.set_xticks(range(len(models)), models, rotation=40, ha="right")
        axis.grid(False, axis="x")
    axes[0].set_yticks([0.01, 0.02, 0.05, 0.1, 0.2, 0.5], ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5"])
    axes[0].minorticks_off()
    axes[0].set_ylabel("increase of perplexity over FP16")
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    return figure


def plot_kernels(records: pd.DataFrame) -> Figure:
    """The paper's speed-up over INT8 cuBLAS by shape and batch, ABQ-LLM beside it, ours as stars where measured."""
    table, (card, ours) = paper_kernel_ratios(), kernel_ratios(records, "INT8")
    shapes = paper.kernel_shapes()[::-1]
    model_of = {(r.outputs, r.features): r.model for r in table.itertuples()}
    figure, axes = plt.subplots(1, 3, figsize=(figures.FULL_PAGE[0], 5.2), sharey=True, sharex=True)
    for axis, (tokens, rows) in zip(axes, table.groupby("tokens"), strict=True):
        at = [shapes.index((r.outputs, r.features)) for r in rows.itertuples()]
        axis.hlines(at, rows["abq"], rows["flexq"], color=figures.NEUTRAL, lw=1.5)
        axis.plot(rows["abq"], at, "s", color="#e69f00", ms=4.5, label="ABQ-LLM")
        axis.plot(rows["flexq"], at, "o", color=figures.MAIN, ms=5, label="FlexQ, the paper's GPU")
        mine = {case: ratio for case, ratio in ours.items() if case[2] == tokens and case[:2] in shapes}
        if mine:
            places = [shapes.index(case[:2]) for case in mine]
            axis.scatter(list(mine.values()), places, label=f"FlexQ, {card}", **_OURS)
        axis.axvline(1, color=figures.INK, lw=0.8, ls="--")
        axis.set_title(f"batch {tokens}")
        for place in range(4, len(shapes), 4):
            axis.axhline(place - 0.5, color=figures.LIGHT, lw=1)
        axis.grid(False, axis="y")
    axes[0].set_yticks(range(len(shapes)), [f"{model_of[shape]}  {shape[0]} × {shape[1]}" for shape in shapes])
    axes[1].set_xlabel("speed-up over INT8 cuBLAS (×)")
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    return figure


def plot_end_to_end(records: pd.DataFrame) -> Figure:
    """The paper's latency and memory of W8A8 over FlexQ by model and output length, ours as stars where measured."""
    table = paper_end_to_end_ratios().query("method == 'w8a8'")
    models, lengths = list(table["model"].unique()), sorted(table["output_tokens"].unique())
    shades = dict(zip(lengths, ("#b3cde3", "#6baed6", figures.MAIN, "#08306b"), strict=True))
    figure, axes = plt.subplots(1, 2, figsize=figures.FULL_PAGE)
    for axis, quantity in zip(axes, QUANTITIES, strict=True):
        card, ours = end_to_end_ratios(records, quantity, "W8A8")
        for offset, tokens in enumerate(lengths):
            rows = table[table["output_tokens"] == tokens].set_index("model")[quantity]
            places = [models.index(model) + 0.2 * (offset - 1.5) for model in rows.index]
            axis.bar(places, rows, width=0.18, color=shades[tokens], label=f"{tokens} tokens")
            stars = {place: ours.get((model, tokens)) for place, model in zip(places, rows.index, strict=True)}
            stars = {place: ratio for place, ratio in stars.items() if ratio is not None}
            axis.scatter(list(stars), list(stars.values()), label=card if stars else None, **_OURS)
        axis.axhline(HEADLINES[quantity], color=figures.ACCENT, lw=1.2, ls="--", label="the abstract")
        top = max([table[quantity].max(), *ours.values()])
        axis.set(title=f"the abstract: {HEADLINES[quantity]}×")
        axis.set(ylabel=f"{quantity}, W8A8 ÷ FlexQ (×)", ylim=(1, 1 + 1.15 * (top - 1)))
        axis.set_xticks(range(len(models)), models)
        axis.grid(False, axis="x")
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    return figure


def perplexity_note(records: pd.DataFrame) -> str:
    """What the stars of `plot_perplexity` are, for its caption."""
    ours = measured_perplexities(records).query("method == 'flexq'")
    return (
        "stars: measured here" if ours["dataset"].isin(list(DATASETS)).any() else "none of these models was scored here"
    )


def kernels_note(records: pd.DataFrame) -> str:
    """What the stars of `plot_kernels` are, for its caption."""
    return _stars(kernel_ratios(records, "INT8"))


def end_to_end_note(records: pd.DataFrame) -> str:
    """What the stars of `plot_end_to_end` are, and over which W8A8 (the fastest on record), for its caption."""
    shown = [end_to_end_ratios(records, quantity, "W8A8") for quantity in QUANTITIES]
    rivals = end_to_end_rivals(records, "latency", "W8A8")
    names = {model: "SmoothQuant" if "smooth" in rival else "dynamic W8A8" for model, rival in rivals.items()}
    told = ", ".join(f"{name} ({model})" for model, name in names.items())
    return _stars(*shown) + (f", over {told}" if told else "")


def _stars(*shown: Ratios) -> str:
    cards = dict.fromkeys(ratios.card for ratios in shown if ratios.of)
    return f"stars: this workbook's on {' and '.join(cards)}" if cards else "no GPU's of this workbook is on record"
