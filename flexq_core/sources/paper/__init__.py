"""The paper's published numbers (arXiv 2508.04405), as data that reports and figures stand beside.

    perplexity.csv        the perplexity tables, as printed
    kernel_speedups.csv   speed-up over INT8 cuBLAS by shape and batch size, read off the kernel figure
    end_to_end.csv        latency (s) and memory (GB) by output length, read off the end-to-end figure

`-` and empty cells are what the paper leaves out.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pandas as pd

_FOLDER = Path(__file__).parent

ORIGIN = {
    "perplexity": "printed in the paper's tables",
    "kernel_speedups": "read off the paper's kernel figure",
    "end_to_end": "read off the paper's end-to-end figure",
}
"""How each table came to be here."""

MODEL_NAMES = {
    "llama1_7b": "llama-7b",
    "llama1_13b": "llama-13b",
    "llama1_30b": "llama-30b",
    "llama1_65b": "llama-65b",
    "llama2_7b": "llama-2-7b",
    "llama2_13b": "llama-2-13b",
    "llama2_70b": "llama-2-70b",
    "LLaMA-7B": "llama-7b",
    "LLaMA-13B": "llama-13b",
    "LLaMA-30B": "llama-30b",
    "LLaMA-2-13B": "llama-2-13b",
    "LLaMA-2-70B": "llama-2-70b",
    "OPT-30B": "opt-30b",
}
"""The paper's spelling → the workbook's name of a model."""


def perplexity() -> pd.DataFrame:
    """Rows of {dataset, bits, method, model, perplexity}; what the paper leaves out is absent."""
    wide = pd.read_csv(_FOLDER / "perplexity.csv")
    long = wide.melt(["dataset", "bits", "method"], var_name="model", value_name="perplexity").dropna()
    return long.assign(model=long["model"].map(MODEL_NAMES)).reset_index(drop=True)


def kernel_speedups() -> pd.DataFrame:
    """Rows of {model, outputs, features, activation_bits, tokens, kernel, speedup}: kernel is `flexq` or `abq`.

    speedup: over INT8 cuBLAS, as the figure gives it.  tokens: the batch size, 1, 4 or 8.
    """
    keys = {"N": "outputs", "K": "features", "act_bits": "activation_bits"}
    wide = pd.read_csv(_FOLDER / "kernel_speedups.csv").rename(columns=keys)
    long = wide.melt(["model", *keys.values()], var_name="case", value_name="speedup")
    kernel, tokens = zip(*(case.split("_b") for case in long["case"]), strict=True)
    return long.assign(model=long["model"].map(MODEL_NAMES), kernel=kernel, tokens=list(map(int, tokens)))[
        ["model", *keys.values(), "tokens", "kernel", "speedup"]
    ]


def kernel_shapes() -> tuple[tuple[int, int], ...]:
    """The 20 N × K of the kernel figure, in its order."""
    wide = pd.read_csv(_FOLDER / "kernel_speedups.csv")
    return tuple(zip(wide["N"].tolist(), wide["K"].tolist(), strict=True))


def end_to_end() -> pd.DataFrame:
    """Rows of {model, output_tokens, method, seconds, memory_gb}: method is fp16, w8a16, w8a8 or w6ax."""
    wide = pd.read_csv(_FOLDER / "end_to_end.csv")
    rows = [
        (MODEL_NAMES[row["model"]], row["output_len"], method, row[f"{method}_s"], row[f"{method}_gb"])
        for _, row in wide.iterrows()
        for method in ("fp16", "w8a16", "w8a8", "w6ax")
    ]
    return pd.DataFrame(rows, columns=["model", "output_tokens", "method", "seconds", "memory_gb"])


def shared_memory_bars() -> list[tuple[str, str, int, str, float]]:
    """Memory bars that two models have in common to the last digit: (model, other model, output tokens, method, GB)."""
    bars = end_to_end().set_index(["model", "output_tokens", "method"])["memory_gb"]
    models = bars.index.get_level_values("model").unique()
    return [
        (a, b, tokens, method, value)
        for a, b in itertools.combinations(models, 2)
        for (tokens, method), value in bars[a].items()
        if bars[b].get((tokens, method)) == value
    ]
