"""What the kernel study claims of a table of times: which errors are right, and how fast FlexQ is beside the libraries.

No time depends on this file: thresholds can change and what is on record stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd

from flexq_core.runtime import auto, cpu, ops
from flexq_core.sources import paper
from flexq_core.studies import kernels_gpu
from flexq_core.studies.kernels_compared import (
    DECODE_TOKENS,
    bandwidth_reached,
    chosen_backends,
    mean_speedups,
    speedups,
    title,
)

ERROR_BOUNDS = {
    "torch-fp32": 1e-5,
    "torch-fp16": 1e-2,
    "torch-bf16": 2e-2,
    "torch-int8": 5e-2,
    "cublas-int8": 5e-2,
    "cublaslt-fp8": 6e-2,
    "torchao-int8wo": 5e-2,
}
FLEXQ_ERROR_BOUND = 6e-2
"""Relative error against float32, ‖y - y32‖ / ‖y32‖. On normal numbers 6-bit groups of 128 come to 4%: a wrong one to 100%."""

AT_MOST_OVER_INT8 = 1.1
"""How much longer than torch's dynamic INT8 FlexQ's CPU kernel may take for one token, the geometric mean over shapes."""
CLAIMED_WEIGHTS = 2**22
"""Of layers of fewer that is not claimed: what a call takes besides its weights decides."""
INT8_ISAS = ("amx", "avx512")
"""The CPU kernel's paths of which that is claimed. AVX2 has no instruction that sums products of bytes in 32 bits: which of two
ways round that is faster is each processor's own, and told."""
AT_MOST_PREEMPTIONS = 0.25
"""Preemptions a call above which a machine is too busy to tell: on a quiet one there are hardly any."""
HOPPER = ("H100", "H200")
"""Cards of which speed is claimed, by a part of their names: what is claimed is relative to the same card's libraries."""
AT_LEAST_ON_HOPPER = {"cublaslt-fp8": 1.25, "torch-fp16": 2.3, "cublas-int8": 1.5}
"""Library → FlexQ's speed-up over it, products alone, the geometric mean over shapes and 1, 4 and 8 tokens."""
LEAST_BANDWIDTH = 0.9
"""Share of the measured bandwidth of copying that the product reaches on LARGEST with BANDWIDTH_TOKENS."""
BANDWIDTH_TOKENS = (1, 4, 8, 16)
LARGEST = tuple(sorted(paper.kernel_shapes(), key=math.prod)[-2:])
"""The two largest of the paper's shapes, N × K."""
NOISE = 0.05
"""How much longer a product may take than what it is never to be slower than: so much do times of a few µs vary."""
FEW_TOKENS = 64
"""Up to which FlexQ is claimed to be faster than FP16 in every shape; beyond, FP16 is in small layers of some hundred tokens."""
PREFILL_BARS = (
    (4096, "rate", 1050.0),
    (256, "over_fp16", 1.2),
    (1024, "over_fp16", 1.4),
    (4096, "quantisation", 0.06),
)
"""(tokens, quantity, bar) on LARGEST, set for an H200: goals and no claims, which a card may miss."""


def claims(table: pd.DataFrame, card: str = "") -> list[tuple[str, bool | None, str]]:
    """What this study claims, as (claim, whether the table bears it out, the numbers); None where it cannot tell.

    card: the GPU's name, where the table is of one.
    """
    measured = table.dropna(subset=["gemm_us" if card else "median_us"])
    share = measured["error"] / [ERROR_BOUNDS.get(method, FLEXQ_ERROR_BOUND) for method in measured["method"]]
    if "definition_error" in measured:
        share = np.fmax(share, measured["definition_error"] / kernels_gpu.DEFINITION_BOUND)
    text = "every method's product is right: its relative error against float32 is within its bound"
    right: tuple[str, bool | None, str] = (text, None, "nothing could be measured here")
    if len(measured):
        worst = measured.loc[share.idxmax()]
        right = (text, bool((share <= 1).all()), f"nearest to its bound: {worst['method']}, {worst['error']:.2%}")
    return [right, *_gpu_claims(measured, card)] if card else [right, _speed_claim(measured)]


def recorded_claims(recorded: Mapping[tuple[str, int], pd.DataFrame]) -> pd.DataFrame:
    """What records of GPUs bear out of the claims, in writing: {GPU, activations, verdict, claim, numbers}.

    recorded: (card, activation bits) → its table.
    """
    verdicts = {True: "holds", False: "does not hold", None: "not told"}
    rows = [
        (card, f"{bits} bits", verdicts[holds], claim.removesuffix(f" on {card}"), numbers)
        for (card, bits), table in recorded.items()
        for claim, holds, numbers in claims(table, card)
    ]
    return pd.DataFrame(rows, columns=["GPU", "activations", "verdict", "claim", "numbers"])


def is_hopper(card: str) -> bool:
    """Whether speed is claimed of a card of this name."""
    return any(name in card for name in HOPPER)


def _gpu_claims(measured: pd.DataFrame, card: str) -> list[tuple[str, bool | None, str]]:
    """What is claimed of HOPPER with the paper's shapes; of other cards the numbers are told.

    A claim is about all its cases: it holds where each was timed, and fails as soon as one that was does not bear it out.
    """
    known = is_hopper(card)
    where = card if known else f"an {' or '.join(HOPPER)}"
    shapes = pd.MultiIndex.from_frame(measured[["outputs", "features"]])
    measured = measured[shapes.isin(paper.kernel_shapes())]
    found = [_speedup_claim(measured, baseline, least) for baseline, least in AT_LEAST_ON_HOPPER.items()]
    found += [_bandwidth_claim(measured), *_cliff_claims(measured, card)]
    told = [(f"{text} on {where}", holds, detail) for text, holds, detail in found]
    if known:
        return told
    lacking = f"claimed of {where}, this is {card}"
    return [(text, None, detail if holds is None else f"{detail}; {lacking}") for text, holds, detail in told]


_SHAPES = len(paper.kernel_shapes())


def _speedup_claim(measured: pd.DataFrame, baseline: str, least: float) -> tuple[str, bool | None, str]:
    text = (
        f"the mean over the paper's {_SHAPES} shapes and {', '.join(map(str, DECODE_TOKENS))} tokens: FlexQ's product is at "
        f"least {least} times as fast as {title(baseline)}'s"
    )

    def decode(table: pd.DataFrame) -> pd.DataFrame:
        means = mean_speedups(table)
        return means[(means["baseline"] == title(baseline)) & means["decode"]]

    mean = decode(measured)
    if mean.empty:
        return text, None, f"{title(baseline)} or FlexQ was not timed on them with so many tokens here"
    row = mean.iloc[0]
    told = (
        f"{row['product']:.2f}× over {row['shapes']} shapes and {row['tokens']} tokens; {row['layer']:.2f}× with activation "
        "quantisation"
    )
    padded = measured.get("fewest_rows_us", pd.Series(math.nan, measured.index)).where(measured["method"] == baseline)
    if (padded > measured["gemm_us"]).any():
        fewest = decode(measured.assign(gemm_us=np.fmax(padded, measured["gemm_us"]))).iloc[0]
        told += f"; {fewest['product']:.2f}× over its fewest rows, where more are faster"
    cases, timed = _SHAPES * len(DECODE_TOKENS), speedups(measured, baseline)["tokens"].isin(DECODE_TOKENS).sum()
    if timed < cases:  # a mean over some is another number
        return text, None, f"{told}; {timed} of its {cases} cases were timed"
    return text, bool(row["product"] >= least), told


def _bandwidth_claim(measured: pd.DataFrame) -> tuple[str, bool | None, str]:
    named = " and ".join(f"{outputs} × {features}" for outputs, features in LARGEST)
    counts = ", ".join(map(str, BANDWIDTH_TOKENS))
    text = f"at {named} FlexQ's product reaches {LEAST_BANDWIDTH:.0%} of the bandwidth of copying with {counts} tokens"
    shares = [
        (row.bandwidth_share, f"{row.outputs} × {row.features}, {tokens} tokens")
        for tokens in BANDWIDTH_TOKENS
        for row in bandwidth_reached(measured, tokens).itertuples()
        if row.method in ops.BACKENDS and (row.outputs, row.features) in LARGEST
    ]
    if not shares:
        return text, None, "these shapes were not timed here"
    (least, where), cases = min(shares), len(LARGEST) * len(BANDWIDTH_TOKENS)
    holds = False if least < LEAST_BANDWIDTH else True if len(shares) == cases else None
    return text, holds, f"least {least:.1%}, {where}; {len(shares)} of {cases} cases"


def _cliff_claims(measured: pd.DataFrame, card: str) -> list[tuple[str, bool | None, str]]:
    """That no number of tokens is a bad one for the kernel that `auto` takes for it."""
    case = ["outputs", "features", "tokens"]
    choices = [auto.choice(card, row.tokens, row.outputs, row.features) for row in measured.itertuples()]
    taken = measured[measured["method"] == pd.Series(choices, measured.index, dtype=object)].sort_values(case)
    fp16 = measured[measured["method"] == "torch-fp16"].set_index(case)["gemm_us"]
    at_most = taken.groupby(case[:2])["gemm_us"].transform(lambda times: times[::-1].cummin()[::-1].shift(-1))
    found = []
    for other, most in (
        (
            f"{title('torch-fp16')}, up to {FEW_TOKENS} tokens",
            taken.join(fp16.rename("most"), on=case)["most"].where(taken["tokens"] <= FEW_TOKENS),
        ),
        ("itself with more tokens", at_most),
    ):
        text = (
            f"on none of the paper's {_SHAPES} shapes does a number of tokens make the kernel that auto takes more than "
            f"{NOISE:.0%} slower than {other}"
        )
        over = (taken["gemm_us"] / most).dropna()
        if over.empty:
            found.append((text, None, "there is nothing to compare here"))
            continue
        worst, reached = taken.loc[over.idxmax()], taken.loc[over.index].groupby(case[:2])["tokens"].max()
        complete = len(reached) == _SHAPES and reached.min() >= FEW_TOKENS
        holds = False if over.max() > 1 + NOISE else True if complete else None
        told = (
            f"at worst {over.max():.2f} of its time, {worst['outputs']} × {worst['features']}, {worst['tokens']} tokens, "
            f"{worst['method']}; {len(over)} cases, {len(reached)} shapes with up to {reached.min()} tokens"
        )
        if reached.min() < reached.max():
            told += f", {(reached == reached.max()).sum()} of them with up to {reached.max()}"
        found.append((text, holds, told))
    return found


_BARS = {
    "rate": ("TOP/s of the product", "at least {:.0f}", "{:.0f}"),
    "over_fp16": ("the product, times as fast as cuBLAS FP16", "at least {:.2f}", "{:.2f}"),
    "quantisation": ("a layer over its product, for activation quantisation", "at most {:.0%}", "{:.1%}"),
}
"""Quantity of PREFILL_BARS → what it is, how a bar is written, and how what was reached is."""


def prefill_bars(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """On GPUs, PREFILL_BARS on LARGEST and what FlexQ reached, in writing: {tokens, shape, what, bar} and a column a table.

    tables: label → table; one without any of these cases has no column. Where a layer and its product were timed apart, as on
    the H100, the card's clock varies by more than quantisation takes of many tokens, so that the difference may be below 0.
    """
    bars = [(*bar, shape) for bar in PREFILL_BARS for shape in LARGEST]
    rows = [(tokens, f"{n} × {k}", _BARS[name][0], _BARS[name][1].format(bar)) for tokens, name, bar, (n, k) in bars]
    shown = pd.DataFrame(rows, columns=["tokens", "shape", "what", "bar"])
    for label, table in tables.items():
        reached = _reached(table)
        values = [reached[name].get((*shape, tokens), math.nan) for tokens, name, _, shape in bars]
        if not np.isnan(values).all():
            shown[label] = [_told(value, name, bar) for value, (_, name, bar, _) in zip(values, bars, strict=True)]
    return shown


def _reached(table: pd.DataFrame) -> dict[str, pd.Series]:
    """Quantity of PREFILL_BARS → FlexQ's by (outputs, features, tokens)."""
    case = ["outputs", "features", "tokens"]
    flexq = table.merge(chosen_backends(table), on=[*case, "method"]).set_index(case)
    return {
        "rate": flexq["gops"] / 1e3,
        "over_fp16": speedups(table, "torch-fp16").set_index(case)["speedup"],
        "quantisation": flexq["median_us"] / flexq["gemm_us"] - 1,
    }


def _told(value: float, name: str, bar: float) -> str:
    if math.isnan(value):
        return "not timed"
    missed = value > bar if name == "quantisation" else value < bar
    return _BARS[name][2].format(value) + (", missed" if missed else "")


def _speed_claim(measured: pd.DataFrame) -> tuple[str, bool | None, str]:
    text = (
        "with AMX or AVX-512's VNNI and VBMI, for 1 token, FlexQ's CPU kernel takes no longer than torch's dynamic INT8 on its "
        f"best engine (geometric mean over shapes at most {AT_MOST_OVER_INT8} of it)"
    )
    one = measured[measured["tokens"] == 1].pivot_table(
        index=["outputs", "features"], columns="method", values="median_us", sort=False
    )
    if "torch-int8" not in one:
        return text, None, "torch-int8 was not timed with 1 token here"
    flexq = next((method for method in ("cpu", "reference") if method in one), None)
    if flexq is None:
        return text, None, "the CPU kernel was not timed with 1 token here"
    used = measured[(measured["tokens"] == 1) & measured["method"].isin([flexq, "torch-int8"])]
    both = one[[flexq, "torch-int8"]].dropna()
    ratio = float(np.exp(np.log(both[flexq] / both["torch-int8"]).mean()))
    if flexq != "cpu":
        return text, None, f"the CPU kernel was not timed; {flexq} takes {ratio:.2f} of torch-int8's time"
    detail = f"{ratio:.2f} of torch-int8's time over {len(both)} shape{'s' * (len(both) > 1)}"
    if len(both) < len(one):
        return text, None, f"{detail} of the {len(one)} timed"
    if (smallest := min(n * k for n, k in both.index)) < CLAIMED_WEIGHTS:
        return text, None, f"{detail}; of {smallest:,} weights a call takes longer than they do"
    if (isa := cpu.available_isas()[0]) not in INT8_ISAS:
        return text, None, f"{detail}; the fastest path of this processor is {isa}"
    preempted = used["preemptions_per_call"].max()
    if preempted > AT_MOST_PREEMPTIONS:
        busy = f"other programs took the processors {preempted:.1f} times a call: time anew on a quiet machine"
        return text, None, f"{detail}, but {busy}"
    return text, ratio <= AT_MOST_OVER_INT8, detail
