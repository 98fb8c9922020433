"""What GPUs have been measured to do, as tables: kernels with few tokens and with many, and whole models.

All are made alike: of records the newest of each case, a row a case with its metrics by name; then, a row a card and setting,
how many times as long others take as FlexQ.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

PREFILL_FROM = 128
"""Tokens from which on they are a prompt's, and operations rather than bytes are what takes time."""

_SHOWN = "6 bits"
"""Of activations: 8 take the same time but for bit planes, and would be as many rows again."""

_LIBRARIES = {"torch-fp16": "cuBLAS FP16", "cublaslt-fp8": "cuBLASLt FP8", "cublas-int8": "cuBLAS INT8"}
_QUANTISING, _AFTER_NORM = "quantising (µs)", "fused with a norm (µs)"
_DECODE_TOLD = (
    "How many times as fast FlexQ's product of 6-bit weights and activations is as each library's, whose operands are quantised\n"
    "before: the geometric mean over shapes, weights cold; in brackets with the time that FlexQ takes to quantise activations.\n"
    "Last, in microseconds, the median and the most of what quantising adds to the product, and, fused with the norm before it\n"
    "(of up to 16384 features), to torch's RMSNorm and the product: below 0 the fused way is faster. Of the two kernels that\n"
    "`auto` chooses from, the faster one counts:"
)
_PREFILL_TOLD = (
    "The same with as many tokens as a prompt has, and the operations a second of FlexQ's product on its slowest and its\n"
    "fastest shape:"
)
_MODELS_TOLD = (
    "Whole models{weights}, decoded greedily: tokens of the prompt and of the outputs, the time to the first\n"
    "token (TTFT) and for each later one (TPOT), what a step's bytes take at the bandwidth that the card copies with (limit),\n"
    "the memory of all weights, and how many times as long FP16 takes for a token; each method in the fastest of torch's modes\n"
    "that it was tried in:"
)
_COMPILED = "compiled: "
"""What the reason of a `captured` record begins with, before the mode."""
_ENGINE = {"compile_mode": "", "weights": "pretrained"}
"""What else tells a model's runs apart → what it is where a record does not say; a column where it is not the same for all."""


def sections(records: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """(what it shows, a table of text) for each kind of table that there are records for."""
    kernels = kernel_table(records)
    if len(kernels):
        kernels = kernels[kernels["activations"] == _SHOWN].drop(columns="activations")
    decode = kernels.get("tokens", pd.Series(dtype=int)) < PREFILL_FROM
    few, many, models = kernels[decode], kernels[~decode], model_times(records)
    for told, table, left_out in (_DECODE_TOLD, few, ["TOP/s"]), (_PREFILL_TOLD, many, [_QUANTISING, _AFTER_NORM]):
        if len(table):
            yield told, table.drop(columns=left_out)
    if len(models):
        random = set(models["weights"]) == {"random"}
        yield _MODELS_TOLD.format(weights=" with random weights" if random else ""), model_table(models)


def kernel_times(records: pd.DataFrame) -> pd.DataFrame:
    """What 03_kernels has timed on GPUs, the newest of each case, one row each.

    Columns: device, activation_bits (FlexQ's; NaN for libraries), outputs, features, tokens, method, and the metrics by name,
    among them gemm_us, which only times of GPUs have.
    """
    mine = records[records["study"] == "03_kernels"]
    layers = mine["parameters"].map(lambda p: "tokens" in p and "weight_bits" not in p)  # and no combinations of bits
    absent = {"activation_bits": math.nan, "outputs": 0, "features": 0, "tokens": 0}
    return _newest(mine[layers.astype(bool)], absent, ["gemm_us", "median_us", "norm_us", "norm_quantize_us"]).drop(
        columns="model"
    )


def kernel_table(records: pd.DataFrame) -> pd.DataFrame:
    """FlexQ's speed-up on GPUs over each library, the geometric mean over shapes; empty without records.

    Of products alone, and in brackets of FlexQ's layer, which quantises activations, over the library's product; and what that
    adds, alone and fused with a norm, the median over shapes and the most. A row a GPU, activation bits and tokens. Of the
    backends that `auto` chooses from, the faster layer counts.
    """
    from flexq_core.runtime import auto

    times = kernel_times(records)
    setting, shape = ["device", "activation_bits", "tokens"], ["outputs", "features"]
    flexq = times[times["method"].isin(auto.CHOICES)].sort_values("median_us", kind="stable")
    rows = []
    for (device, bits, tokens), mine in flexq.drop_duplicates([*setting, *shape]).groupby(setting):
        here = times[(times["device"] == device) & (times["tokens"] == tokens)]
        rates = 2e-6 * tokens * mine["outputs"] * mine["features"] / mine["gemm_us"]
        over = {
            f"over {name}": _speed_up(here[here["method"] == method], mine, shape)
            for method, name in _LIBRARIES.items()
        }
        shown = {"GPU": device, "activations": f"{bits:.0f} bits", "tokens": tokens, "shapes": len(mine)}
        adds = {
            _QUANTISING: _median_and_most(mine["median_us"] - mine["gemm_us"]),
            _AFTER_NORM: _median_and_most(mine["norm_quantize_us"] - mine["norm_us"]),
        }
        rows.append({**shown, **over, "TOP/s": f"{rates.min():.0f} to {rates.max():.0f}"} | adds)
    return pd.DataFrame(rows)


def model_table(times: pd.DataFrame) -> pd.DataFrame:
    """`model_times` as text.

    A row a model, batch, prompt, longest output, weights, backend and method, in its fastest way to compile, beside FP16 of the
    same.
    """
    setting = ["device", "model", "batch_size", "prompt_tokens", "output_tokens", "weights"]
    fastest = times.groupby([*setting, "backend", "method"], dropna=False)["tpot_ms"].transform("min")
    times = times[times["tpot_ms"] == fastest]
    told = [name for name in _ENGINE if times[name].nunique() > 1]
    told += ["backend"] * (times.loc[times["backend"] != "torch", "backend"].nunique() > 1)
    rows = []
    for (device, model, batch, prompt, outputs, *_), table in times.groupby(setting):
        fp16 = table[table["method"] == "fp16"]
        for index, row in table.iterrows():
            rows.append(
                {"GPU": device, "model": model, "batch": batch, "prompt": prompt, "outputs": outputs}
                | {name: row[name] for name in [*told, "method"]}
                | {"TTFT (ms)": _number(row["ttft_ms"], ".1f"), "TPOT (ms)": _number(row["tpot_ms"], ".2f")}
                | {"limit (ms)": _number(row["limit_ms"], ".2f"), "weights (MiB)": _number(row["weights_mib"], ".0f")}
                | {"over FP16": _times_as_long(fp16, table.loc[[index]], setting, "tpot_ms")}
            )
    return pd.DataFrame(rows)


def model_times(records: pd.DataFrame) -> pd.DataFrame:
    """What 04_e2e has timed of whole models on one GPU, the newest of each case, one row each.

    output_tokens: the longest, over whose steps tpot_ms is a median.
    """
    mine = records[records["study"] == "04_e2e"]
    whole = mine["parameters"].map(
        lambda p: "prompt_tokens" in p and not p.get("layers") and p.get("processes", 1) == 1
    )
    of_gpus = as_compiled(mine[whole.astype(bool) & mine["driver"].notna()])
    longest = of_gpus["parameters"].map(lambda p: {**p, "output_tokens": max(p.get("output_tokens", [0]))})
    absent = {"batch_size": 1, "prompt_tokens": 0, "output_tokens": 0, **_ENGINE, "backend": ""}
    return _newest(of_gpus.assign(parameters=longest), absent, ["tpot_ms", "ttft_ms", "limit_ms", "weights_mib"])


def as_compiled(records: pd.DataFrame) -> pd.DataFrame:
    """Records of 04_e2e with the mode that torch compiled in as their compile_mode, also where it was chosen as the best."""
    told = records[(records["metric"] == "captured") & records["reason"].astype(str).str.startswith(_COMPILED)]
    modes = dict(zip(told["key"], told["reason"].str.removeprefix(_COMPILED), strict=True))
    parameters = [
        {**p, "compile_mode": modes[key]} if key in modes else p
        for key, p in zip(records["key"], records["parameters"], strict=True)
    ]
    return records.assign(parameters=pd.Series(parameters, records.index, dtype=object))


def _newest(rows: pd.DataFrame, parameters: Mapping[str, Any], metrics: list[str]) -> pd.DataFrame:
    """A row a case, in the order in which they were first measured, with the metrics of its newest run by name.

    A case is a device, a model, a method and these parameters: name → what it is where a record has none.  A run is what has
    one record key.  metrics: columns that there are in any case; runs without the first are left out.
    """
    rows = rows[rows["status"] == "ok"].sort_values("time", kind="stable")
    rows = rows[rows["key"].isin(rows.loc[rows["metric"] == metrics[0], "key"])]
    cases: dict[tuple[str, ...], tuple[str, dict[str, Any]]] = {}
    for row in rows.itertuples():
        case = {"device": row.device, "model": row.model}
        case |= {name: row.parameters.get(name, absent) for name, absent in parameters.items()} | {"method": row.method}
        name = tuple(map(str, case.values()))
        if name not in cases or cases[name][0] != row.key:
            cases[name] = (row.key, case)
        cases[name][1][row.metric] = row.value
    measured = [case for _, case in cases.values()]
    names = dict.fromkeys(["device", "model", *parameters, "method", *metrics])
    return pd.DataFrame(measured, columns=list(names | dict.fromkeys(name for case in measured for name in case)))


def _times_as_long(theirs: pd.DataFrame, mine: pd.DataFrame, on: list[str], metric: str) -> str:
    """Their metric over mine, the geometric mean of the cases that both have, in writing."""
    both = mine.merge(theirs, on=on)
    logs = (both[f"{metric}_y"] / both[f"{metric}_x"]).map(math.log)
    return f"{math.exp(logs.mean()):.2f}×" if len(logs) else "–"


def _speed_up(library: pd.DataFrame, flexq: pd.DataFrame, on: list[str]) -> str:
    """Of FlexQ's product over a library's, in brackets of FlexQ's whole layer, where it was timed."""
    product = _times_as_long(library, flexq, on, "gemm_us")
    layer = _times_as_long(library.assign(median_us=library["gemm_us"]), flexq, on, "median_us")
    return f"{product} ({layer})" if product != "–" else product


def _median_and_most(values: pd.Series) -> str:
    return f"{values.median():.1f} (≤ {values.max():.1f})" if values.notna().any() else "–"


def _number(value: float, form: str) -> str:
    return "–" if math.isnan(value) else format(value, form)
