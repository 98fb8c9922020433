"""What the paper's own numbers say of its claims, and what was read in its public release."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import pandas as pd

from flexq_core.sources import paper
from flexq_core.studies.report.claims import ABSTRACT, END_TO_END_FIGURE, KERNEL_FIGURE, PERPLEXITY_TABLES
from flexq_core.studies.report.evidence import (
    DATASETS,
    HEADLINES,
    paper_end_to_end_ratios,
    paper_increases,
    paper_kernel_ratios,
)


@dataclass(frozen=True)
class Finding:
    """What the paper's own numbers say of one of its claims.

    agrees: whether they bear it out.  numbers: what was computed, by name.
    """

    claim: str
    where: str
    finding: str
    agrees: bool
    numbers: Mapping[str, float]


def largest_increase() -> Finding:
    """The abstract's bound on the increase of perplexity against the printed tables."""
    mine = paper_increases().query("method == 'FlexQ'")
    largest = mine["increase"].max()
    at = ", ".join(f"{r.model} on {DATASETS[r.dataset]}" for r in mine[mine["increase"] == largest].itertuples())
    return Finding(
        "perplexity increases of no more than 0.05",
        ABSTRACT,
        f"the printed tables bear it out: the largest increase is {largest:.2f}, {at}",
        bool(largest <= HEADLINES["perplexity"]),
        {"largest": largest},
    )


def flexq_is_listed_as_w6a6() -> Finding:
    """The tables' heading of FlexQ's row against the activations that the kernel figure gives it."""
    listed = set(paper.perplexity().query("method == 'FlexQ'")["bits"])
    shapes = paper.kernel_speedups().drop_duplicates(["model", "outputs", "features"])
    wide = int((shapes["activation_bits"] == 8).sum())
    return Finding(
        f"FlexQ stands among {', '.join(sorted(listed))} methods",
        PERPLEXITY_TABLES,
        f"it is not W6A6 throughout: the kernel figure runs {wide} of its {len(shapes)} shapes, each model's sensitive layer, "
        "with 8-bit activations",
        wide == 0,
        {"shapes_with_a8": wide, "shapes": len(shapes)},
    )


def average_over_abq() -> Finding:
    """What the abstract's average over ABQ-LLM is an average of."""
    table = paper_kernel_ratios()
    by_batch = table[table["model"] == "llama-2-70b"].groupby("tokens")["ratio"].mean()
    batch_1 = table.loc[table["tokens"] == 1, "ratio"].mean()
    others = " and ".join(f"{by_batch[tokens]:.2f}× at batch {tokens}" for tokens in (4, 8))
    return Finding(
        "an average 1.39× speed-up over ABQ-LLM on LLaMA-2-70B linear layers",
        ABSTRACT,
        f"it is the mean of four shapes at batch 1 ({by_batch[1]:.3f}×); the same shapes give {others}. All 20 shapes give "
        f"{batch_1:.2f}× at batch 1, {table['ratio'].mean():.2f}× over all batches",
        bool(round(by_batch.mean(), 2) == HEADLINES["kernel"]),
        {f"batch_{tokens}": value for tokens, value in by_batch.items()}
        | {"all_shapes_batch_1": batch_1, "all_shapes": table["ratio"].mean()},
    )


def slower_than_abq() -> Finding:
    """Where the kernel figure has FlexQ behind ABQ-LLM."""
    table = paper_kernel_ratios()
    behind = table[table["ratio"] < 1]
    cases = "; ".join(
        f"{r.outputs} × {r.features} ({r.model}) at batch {r.tokens}: {r.flexq:.2f}× against {r.abq:.2f}×"
        for r in behind.itertuples()
    )
    return Finding(
        "superior performance across all tested workloads",
        f"{KERNEL_FIGURE}, README of the release",
        f"as the figure was read, to 0.01, ABQ-LLM is ahead in {len(behind)} of {len(table)} cases: {cases or 'none'}",
        behind.empty,
        {"behind": len(behind), "cases": len(table)},
    )


def latency_over_smoothquant() -> Finding:
    """Whose ratio the abstract's end-to-end acceleration is."""
    means, overall = _over_smoothquant("latency")
    whose = [model for model, mean in means.items() if round(mean, 2) == HEADLINES["latency"]]
    return Finding(
        "1.33× inference acceleration over SmoothQuant",
        ABSTRACT,
        f"it is {' and '.join(whose)}'s; the models' means are {listed(means)}, and all together give {overall:.2f}×",
        bool(round(overall, 2) == HEADLINES["latency"]),
        means | {"all": overall},
    )


def memory_over_smoothquant() -> Finding:
    """What the abstract's memory saving is a mean of."""
    means, overall = _over_smoothquant("memory")
    fastest = max(_over_smoothquant("latency")[0].items(), key=lambda item: item[1])[0]
    return Finding(
        "1.21× memory savings over SmoothQuant",
        ABSTRACT,
        f"it is the mean of all models and lengths ({overall:.3f}×: {listed(means)}), where the 1.33× beside it in the same "
        f"sentence is {fastest}'s alone, whose saving is {means[fastest]:.2f}×",
        bool(round(overall, 2) == HEADLINES["memory"]),
        means | {"all": overall},
    )


def _over_smoothquant(quantity: str) -> tuple[dict[str, float], float]:
    table = paper_end_to_end_ratios().query("method == 'w8a8'")
    return table.groupby("model", sort=False)[quantity].mean().to_dict(), table[quantity].mean()


def listed(means: Mapping[str, float]) -> str:
    """Each model's mean ratio, in writing."""
    return ", ".join(f"{model} {mean:.2f}×" for model, mean in means.items())


def copied_memory_bars() -> Finding:
    """Memory bars of one model that are another's."""
    shared = paper.shared_memory_bars()
    names = " and ".join(dict.fromkeys(name for a, b, *_ in shared for name in (a, b)))
    told = ", ".join(f"{method} {value:.2f} at {tokens}" for _, _, tokens, method, value in shared)
    lengths = " and ".join(str(tokens) for tokens in sorted({tokens for _, _, tokens, _, _ in shared}))
    return Finding(
        f"OPT-30B's memory at {lengths} tokens",
        END_TO_END_FIGURE,
        f"{len(shared)} bars of {names} are equal to the last digit, and no bars of any other two models are (GB): {told}",
        not shared,
        {f"{method}_{tokens}": value for _, _, tokens, method, value in shared},
    )


def shrinking_memory() -> Finding:
    """Memory that falls as the output grows, which a KV cache does not allow."""
    table = paper.end_to_end().sort_values("output_tokens", kind="stable")
    falls = {}
    for (model, method), rows in table.groupby(["model", "method"], sort=False):
        for a, b in itertools.pairwise(rows.itertuples()):
            if b.memory_gb < a.memory_gb:
                falls[model, method] = (a, b)
    told = ", ".join(
        f"{model} {method} {a.memory_gb:.2f} at {a.output_tokens} but {b.memory_gb:.2f} at {b.output_tokens}"
        for (model, method), (a, b) in falls.items()
    )
    return Finding(
        "memory by output length",
        END_TO_END_FIGURE,
        f"memory falls as the output, and with it the KV cache, grows (GB): {told}" if told else "it grows throughout",
        not falls,
        {f"{model}_{method}": b.memory_gb - a.memory_gb for (model, method), (a, b) in falls.items()},
    )


def best_over_fp16() -> Finding:
    """The release's "up to" over FP16 against the figure's largest."""
    rows = paper_end_to_end_ratios().query("method == 'fp16' and model == 'llama-13b'")
    latency, memory = rows["latency"].max(), rows["memory"].max()
    return Finding(
        "LLaMA-13B: up to 2.38× as fast and 2.28× smaller than FP16",
        f"{END_TO_END_FIGURE}, README of the release",
        f"the figure gives {latency:.3f}× and {memory:.3f}×, the same within reading it to two decimals",
        bool(abs(latency - 2.38) < 0.01 and abs(memory - 2.28) < 0.01),
        {"latency": latency, "memory": memory},
    )


FINDINGS: tuple[Callable[[], Finding], ...] = (
    largest_increase,
    flexq_is_listed_as_w6a6,
    average_over_abq,
    slower_than_abq,
    latency_over_smoothquant,
    memory_over_smoothquant,
    copied_memory_bars,
    shrinking_memory,
    best_over_fp16,
)
RELEASE = "FlexQ on GitHub, by FlyFoxPlayer"
READINGS: tuple[tuple[str, str], ...] = (
    ("algorithm", "the sensitivity analysis is not there: the layer with 8-bit activations is hard-coded"),
    ("algorithm, engine", "accuracy is measured with fake quantisation, speed with random bits in a separate engine"),
    ("engine", "the kernel test allows ±6.55 absolute, against a reference that reads the GPU's own packed buffers"),
    ("engine", "the INT8 cuBLAS baseline is timed without a warm-up"),
    ("engine, e2e", "there is no checkpoint format, and nothing runs without an NVIDIA GPU"),
    ("algorithm", "a group of zeros divides 0 by 0"),
    ("README", "the abstract now says no more than 0.1 on WikiText-2, where its first version says no more than 0.05"),
)
"""Read in the public release, not measured here: (folder or file of the release, what)."""


def findings() -> list[Finding]:
    """Every finding about the paper's own numbers, in the order of the paper."""
    return [find() for find in FINDINGS]


def findings_table(found: Iterable[Finding]) -> pd.DataFrame:
    """Rows of {where, claim, the paper's own numbers, finding}."""
    rows = [(f.where, f.claim, "agree" if f.agrees else "differ", f.finding) for f in found]
    return pd.DataFrame(rows, columns=["where", "claim", "the paper's own numbers", "finding"])


def readings_table() -> pd.DataFrame:
    """Rows of {where, read in the public release, not measured here}."""
    return pd.DataFrame(
        [(f"{RELEASE}: {where}", what) for where, what in READINGS],
        columns=["where", "read in the public release, not measured here"],
    )
