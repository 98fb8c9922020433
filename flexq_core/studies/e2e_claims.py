"""What the end-to-end study claims of its table: sizes, and ratios of time and memory.

No time depends on this file: thresholds can change and what is on record stays.
"""

from __future__ import annotations

import pandas as pd

from flexq_core.studies.e2e_compared import TITLES
from flexq_core.studies.kernels_claims import is_hopper

_UNQUANTISED = ("fp32", "fp16")
_INT8 = ("w8a8", "w8a16")
AT_MOST_OF_INT8 = 0.85
"""Share of INT8's bytes that FlexQ's linear weights may take: 0.77 for whole groups of 128, more where groups are padded."""
AT_MOST_OVER_INT8 = 1.1
"""How much longer than INT8 a decode step may take on a processor: both read fewer bytes than the rest of a step costs there."""
TELLING_MIB = 50
"""Unquantised linear weights below this are read faster than a step's overhead passes: its time tells nothing of them."""

AT_MOST_PREEMPTIONS = 1.0
"""Preemptions a token above which a machine is too busy to tell: on a quiet one there are hardly any."""

RATIOS_PROMPT = 128
"""Tokens of the prompt with which ratios of decoding and of memory are claimed."""
PREFILL_PROMPT = 1024
"""Tokens of the prompt with which the first token is claimed, and no ratio of decoding or memory."""
AT_LEAST_AS_FAST = {
    "llama-13b": {"fp16": 2.0, "w8a8": 1.33, "smoothquant-w8a8": 1.33, "fp8": 1.2},
    **{model: {"fp16": 1.9} for model in ("llama-7b", "llama-30b", "opt-30b")},
}
"""Model on a GPU → method → how many times as long as FlexQ it takes for a token."""
AT_LEAST_AS_SMALL = {"llama-13b": {"fp16": 2.28, "w8a8": 1.24, "smoothquant-w8a8": 1.24}}
"""Model on a GPU → method → how many times as much memory as FlexQ its weights and cache take."""
FP16_OVER_LIMIT = {"llama-7b": 4.68 / 3.17, "llama-13b": 8.28 / 6.1}
"""Model → how many times its byte limit FP16 may take for a token, else FlexQ were compared with a straw man: ms that a careful
torch.compile took on an H200, over the limit there, so that it holds of other cards."""


def claims(
    table: pd.DataFrame, model: str = "", prompt_tokens: int = RATIOS_PROMPT
) -> list[tuple[str, bool | None, str]]:
    """What this study claims, as (claim, whether the table bears it out, the numbers); None where it cannot tell.

    table: of `EndToEndStudy.table`. Claims are about `flexq` where it was measured, else the first of FlexQ's other methods.
    model: `EndToEndStudy.ratios_model`; of a model of AT_LEAST_AS_FAST its ratios are claimed, of others, and of methods that it
    has no ratio for, that FlexQ is faster.  prompt_tokens: those of the table.
    """
    best = table.dropna(subset=["linear_weights_mib"]).drop_duplicates("method", keep="last").set_index("method")
    ours = next(
        (m for m in ("flexq", "w6a6", "w6a8", *best.index[best.index.str.startswith("plan:")]) if m in best.index), None
    )
    if ours is None:
        return [("FlexQ is measured", None, "methods name none of FlexQ's")]
    base, *others = (next((m for m in among if m in best.index), None) for among in (_UNQUANTISED, _INT8, ["fp8"]))
    ratios = AT_LEAST_AS_FAST.get(model, {}) if prompt_tokens == RATIOS_PROMPT else {}
    leeway = 1.0 if model else AT_MOST_OVER_INT8
    speeds = [
        _speed_claim(best, ours, other, base, leeway) for other in (base, *others) if other and other not in ratios
    ]
    whole = _ratio_claims(best, ours, model, prompt_tokens) if model in AT_LEAST_AS_FAST else []
    return [*_weight_claims(best, ours), *whole, *_engine_claims(best, ours, model), *speeds]


def has_ratios(card: str, prompt_tokens: int) -> bool:
    """Whether ratios, of decoding or of the first token alone, are claimed of whole models on this card with such a prompt."""
    return is_hopper(card) and prompt_tokens in (RATIOS_PROMPT, PREFILL_PROMPT)


def _weight_claims(best: pd.DataFrame, ours: str) -> list[tuple[str, bool | None, str]]:
    """What FlexQ's linear weights take beside the unquantised model's and INT8's, where they were measured."""
    name, mib = TITLES.get(ours, ours), best["linear_weights_mib"]
    base = next((m for m in _UNQUANTISED if m in best.index), None)
    int8 = [m for m in _INT8 if m in best.index]
    found: list[tuple[str, bool | None, str]] = []
    if base:
        detail = f"{mib[ours]:.2f} of {mib[base]:.2f} MiB"
        half = 0.5 if base == "fp16" else 0.25
        text = f"{name}'s linear weights take less than {half:.0%} of the unquantised model's"
        found.append((text, bool(mib[ours] < half * mib[base]), f"{detail}, {mib[ours] / mib[base]:.1%}"))
    if int8:
        least = mib[int8].min()
        text = f"{name}'s linear weights take at most {AT_MOST_OF_INT8:.0%} of INT8's"
        found.append((text, bool(mib[ours] <= AT_MOST_OF_INT8 * least), f"{mib[ours]:.2f} of {least:.2f} MiB"))
    return found


def _ratio_claims(best: pd.DataFrame, ours: str, model: str, prompt_tokens: int) -> list[tuple[str, bool | None, str]]:
    """How many times as long, and as much memory, the others take as FlexQ."""
    name = TITLES.get(ours, ours)
    memory = best["weights_mib"] + best["kv_cache_mib"]
    first = f"{name}'s first token after {prompt_tokens} takes no longer than {{1}}'s"
    quantities = [(best["ttft_ms"], "ms", {"fp16": 1}, first)]
    if prompt_tokens == RATIOS_PROMPT:
        faster = f"{name} decodes a token at least {{0}} times as fast as {{1}}"
        smaller = f"{name}'s weights and cache take at most 1 / {{0}} of {{1}}'s"
        quantities[:0] = [
            (best["tpot_ms"], "ms a token", AT_LEAST_AS_FAST[model], faster),
            (memory, "MiB", AT_LEAST_AS_SMALL.get(model, {}), smaller),
        ]
    found: list[tuple[str, bool | None, str]] = []
    for values, unit, ratios, text in quantities:
        for other, least in ratios.items():
            claim = f"{model}: {text.format(least, TITLES[other])}"
            if other not in best.index:
                found.append((claim, None, f"{TITLES[other]} was not measured here"))
                continue
            mine, theirs = values[ours], values[other]
            if pd.isna(mine) or pd.isna(theirs):
                found.append((claim, None, _NO_STEP))
                continue
            detail = f"{mine:.4g} and {theirs:.4g} {unit}, {theirs / mine:.2f} ×"
            obstacle = _obstacle(best, ours, other) if unit != "MiB" else ""
            found.append(
                (claim, None, f"{detail}; {obstacle}") if obstacle else (claim, bool(theirs / mine >= least), detail)
            )
    return found


def _engine_claims(best: pd.DataFrame, ours: str, model: str) -> list[tuple[str, bool | None, str]]:
    """What a GPU's engine owes: the eager model's tokens, and FP16 near its byte limit."""
    name = TITLES.get(ours, ours)
    found: list[tuple[str, bool | None, str]] = []
    compared = best.get("tokens_compared", pd.Series(dtype=float)).get(ours)
    if pd.notna(compared):
        agreed = best["tokens_as_eager"][ours]
        text = f"{name}'s tokens of the captured step are those of the eager model"
        told = f"{agreed:.0f} of {compared:.0f}"
        if agreed == compared:
            found.append((text, True, told))
        else:
            found.append((text, None if agreed else False, f"{told}; {_COMPILED}"))
    took, limit = (best.get(column, pd.Series(dtype=float)).get("fp16") for column in ("tpot_ms", "limit_ms"))
    if model in FP16_OVER_LIMIT and pd.notna(limit):
        at_most = FP16_OVER_LIMIT[model]
        text = f"{model}: FP16 takes at most {at_most:.2f} × as long for a token as its bytes"
        if pd.isna(took):
            return [*found, (text, None, _NO_STEP)]
        told = f"{took:.4g} ms a token, its bytes take {limit:.4g} ms, {took / limit:.2f} ×"
        obstacle = _obstacle(best, "fp16", "fp16")
        found.append((text, None, f"{told}; {obstacle}") if obstacle else (text, bool(took / limit <= at_most), told))
    return found


_NO_STEP = "outputs of one token have no decode step"
_COMPILED = "torch compiled the model, which may round a near tie to the other side"
"""Of tokens that differ: not compiled, they would have ended the study, so that a table of them is of a compiled step; none but
the first alike is no near tie."""


def _obstacle(best: pd.DataFrame, ours: str, other: str) -> str:
    """Why the times of these two methods tell nothing; empty where they do."""
    if best["backend"][ours] in ("reference", "simulate"):
        return f"the {best['backend'][ours]} backend is no kernel"
    preempted = best["preemptions_per_token"][[ours, other]].max()
    if preempted > AT_MOST_PREEMPTIONS:
        return f"the machine is busy with other work: {preempted:.1f} preemptions a token"
    return ""


def _speed_claim(
    best: pd.DataFrame, ours: str, other: str, base: str | None, leeway: float
) -> tuple[str, bool | None, str]:
    """How long a decode step takes beside the other method's, of INT8 with this leeway; None where a step is not about weights,
    or the machine busy."""
    name, other_name = TITLES.get(ours, ours), TITLES[other]
    at_most = leeway if other in _INT8 else 1.0
    text = f"{name} decodes a token faster than {other_name}"
    if at_most != 1:
        text = f"{name} decodes a token in at most {at_most} of the time of {other_name}"
    mine_ms, other_ms = best["tpot_ms"][ours], best["tpot_ms"][other]
    if pd.isna(mine_ms) or pd.isna(other_ms):
        return text, None, _NO_STEP
    detail = f"{mine_ms:.2f} and {other_ms:.2f} ms a token, {other_ms / mine_ms:.2f} ×"
    weights_mib = best["linear_weights_mib"].max()
    obstacle = _obstacle(best, ours, other)
    if base is None:
        obstacle = obstacle or "the unquantised model was not measured here"
    elif weights_mib < TELLING_MIB:
        obstacle = obstacle or f"{weights_mib:.0f} MiB of linear weights are too few to matter"
    if obstacle:
        return text, None, f"{detail}; {obstacle}"
    return text, bool(mine_ms < at_most * other_ms), detail
