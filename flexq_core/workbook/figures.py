"""One look for every figure: colour-blind-safe, legible at half a page's width, SVG and PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

INK, NEUTRAL, LIGHT = "#222222", "#9aa3ad", "#e6e9ed"
MAIN, ACCENT = "#0072b2", "#d55e00"  # Okabe and Ito's blue and vermilion
SEQUENCE = (MAIN, ACCENT, "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
HALF_PAGE = (4.6, 3.0)  # inches, with 9-point type
FULL_PAGE = (7.2, 3.4)

METHOD_COLOURS = {
    "fp32": INK,
    "fp16": INK,
    "bf16": "#5c6670",
    "w8a16": "#e69f00",
    "w8a8": "#cc79a7",
    "fp8": "#f0e442",
    "rtn-w6a6": NEUTRAL,
    "smoothquant-w8a8": "#8c4a73",
    "smoothquant-w6a6": "#e69f00",
    "w6a6": "#56b4e9",
    "flexq": MAIN,
    "w6a8": "#009e73",
}


def method_colour(method: str) -> str:
    """The colour a method has in every figure; plans of one's own share the accent."""
    return METHOD_COLOURS.get(method, ACCENT)


def use_style() -> None:
    """Set matplotlib's defaults for the process."""
    import matplotlib as mpl
    import seaborn as sns

    sns.set_theme(context="paper", style="whitegrid", palette=list(SEQUENCE))
    mpl.rcParams.update(
        {
            "figure.figsize": HALF_PAGE,
            "figure.constrained_layout.use": True,
            "font.size": 9,
            "axes.labelsize": 9,
            "axes.titlesize": 9,
            "xtick.labelsize": 8,
            "ytick.labelsize": 8,
            "legend.fontsize": 8,
            "axes.edgecolor": NEUTRAL,
            "grid.color": LIGHT,
            "legend.frameon": False,
            "svg.hashsalt": "flexq",  # the same figure is the same file
            "savefig.dpi": 200,
        }
    )


def save(figure: Any, folder: Path, name: str, *, caption: str) -> Path:
    """Write `name`.svg, `name`.png and its caption to `folder`; returns the SVG's path."""
    folder.mkdir(parents=True, exist_ok=True)
    svg = folder / f"{name}.svg"
    figure.savefig(svg, metadata={"Date": None, "Title": caption})
    figure.savefig(svg.with_suffix(".png"))
    svg.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
    return svg
