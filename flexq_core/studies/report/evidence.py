"""The paper's numbers and this workbook's records as the same quantities: increases of perplexity, ratios of time and memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from flexq_core.runtime.ops import BACKENDS
from flexq_core.sources import paper
from flexq_core.studies.e2e_claims import RATIOS_PROMPT
from flexq_core.workbook import load_records, paths
from flexq_core.workbook.gpu_tables import as_compiled
from flexq_core.workbook.report import accuracy_table

STUDY = "05_report"
DATASETS = {"wikitext2": "WikiText-2", "c4": "C4"}
WINDOW_LENGTH = 2048
LEAST_WINDOWS = {"wikitext2": 160, "c4": 256}
"""The protocol: all of WikiText-2's test text, which LLaMA's tokenizer makes 166 windows of, and 256 windows of C4."""
HEADLINES = {"perplexity": 0.05, "kernel": 1.39, "latency": 1.33, "memory": 1.21}
"""The abstract's numbers: increase of perplexity at most, speed-up over ABQ-LLM, latency and memory over SmoothQuant."""


def read_records(folder: str = "") -> pd.DataFrame:
    """Records of an outputs folder, this study's own left out; those of this workbook and its references if empty.

    folder: relative to the repository, or absolute.
    Raises ValueError for a folder without records, saying what is accepted.
    """
    if folder:
        folders = [paths.ROOT / Path(folder).expanduser()]
        if not any((folders[0] / "records").glob("*.jsonl")):
            raise ValueError(
                f"records is {folder!r}, which holds no records/*.jsonl; accepted: empty, for this workbook's own, or an "
                "outputs folder such as 'outputs/reference/cpu'"
            )
    else:
        folders = [paths.outputs(), *sorted(paths.REFERENCE.glob("*/"))]
    tables = [load_records(place) for place in folders]
    filled = [table for table in tables if len(table)]
    records = pd.concat(filled, ignore_index=True) if filled else tables[0]
    records = records[records["study"] != STUDY]
    return records.drop_duplicates(["key", "metric", "time"]).sort_values("time", kind="stable", ignore_index=True)


def paper_increases() -> pd.DataFrame:
    """Rows of {dataset, method, model, fp16, perplexity, increase} as the paper prints them; FP16 itself is left out."""
    table = paper.perplexity()
    base = table[table["bits"] == "FP16"].set_index(["dataset", "model"])["perplexity"].rename("fp16")
    table = table[table["bits"] != "FP16"].join(base, on=["dataset", "model"])
    return table.assign(increase=(table["perplexity"] - table["fp16"]).round(2)).reset_index(drop=True)


def measured_perplexities(records: pd.DataFrame) -> pd.DataFrame:
    """What is on record under the paper's protocol: rows of {dataset, model, method, backend, perplexity, base}.

    Whole texts in windows of 2048, WikiText-2's raw, no outliers; base is the unquantised model's. The packed weights come
    before their simulation where both were scored.
    """
    columns = ["dataset", "model", "method", "backend", "perplexity", "base"]
    if records.empty:
        return pd.DataFrame(columns=columns)
    table = accuracy_table(records[records["parameters"].map(_in_protocol)])
    if table.empty:
        return pd.DataFrame(columns=columns)
    keys = ["dataset", "model"]
    table = table[table["model"].isin(paper.MODEL_NAMES.values())].dropna(subset=["perplexity"])
    base = table[table["backend"] == "torch"].set_index(keys)["perplexity"].rename("base")
    table = table[table["backend"] != "torch"].join(base, on=keys).dropna(subset=["base"])
    packed_first = table.assign(simulated=table["backend"] == "simulate").sort_values("simulated", kind="stable")
    return packed_first.drop_duplicates([*keys, "method"])[columns].reset_index(drop=True)


def _in_protocol(parameters: Mapping[str, Any]) -> bool:
    whole = parameters.get("windows", 0) >= LEAST_WINDOWS.get(parameters.get("dataset"), float("inf"))
    other = parameters.get("outliers") or parameters.get("tokenised")
    return whole and parameters.get("window_length") == WINDOW_LENGTH and not other


def divergence_by_kind(records: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Divergence in nats with every layer of a kind at 6-bit activations, no outliers: model → kind → newest."""
    prefix = "rounded: every "
    rows = records[
        (records["study"] == "01_sensitivity") & (records["metric"] == "kl_nats") & (records["status"] == "ok")
    ]
    found: dict[str, dict[str, float]] = {}
    for row in rows.itertuples():
        if row.method.startswith(prefix) and not row.parameters.get("outliers"):
            found.setdefault(row.model, {})[row.method.removeprefix(prefix)] = row.value
    return {model: kinds for model, kinds in found.items() if len(kinds) > 1}


def divergences_text(kinds: Mapping[str, float]) -> str:
    """The three most sensitive kinds of layer with their divergences, in writing."""
    ordered = sorted(kinds.items(), key=lambda item: -item[1])
    return " > ".join(f"{kind} {value:.2g}" for kind, value in ordered[:3]) + " nat"


_METHODS_OWN = {
    "backend", "plan", "plan_sha256", "activation_bits", "weight_bits", "fingerprint", "dtype", "method", "compile_mode",
    "repeats",
}  # fmt: skip
"""Parameters in which two methods that are compared may differ. Each is compiled in the mode in which it is the fastest, and
timed as often as it was."""
RIVALS: dict[str, Callable[[str], bool]] = {
    "INT8": lambda method: method in ("torch-int8", "cublas-int8"),
    "ABQ-LLM": lambda method: "abq" in method,
    "W8A8": lambda method: method in ("w8a8", "smoothquant-w8a8"),
    "FP16": lambda method: method == "fp16",
}


def ratios(records: pd.DataFrame, study: str, metric: str, rival: str) -> pd.DataFrame:
    """How many times as much a rival takes as FlexQ: rows of {model, metric, ratio, method, rival, device, on_gpu,
    parameters, time}; time is that of FlexQ's record.

    FlexQ is a method whose name begins so, and in 03_kernels its compiled backends.  metric: the metric's name, or its
    beginning.  rival: a key of RIVALS.  Both were measured on the same device with the same parameters, those apart that
    are a method's own; of several such rivals the fastest counts, of the same case the newest record.
    """
    rows = records[(records["study"] == study) & (records["status"] == "ok") & records["metric"].str.startswith(metric)]
    whole = [
        row | {"conditions": _conditions(row)}
        for row in rows.to_dict("records")
        if row["value"] and not row["parameters"].get("layers")
    ]
    newest = {_case(row): row for row in whole}.values()  # rows are in the order of time
    kernels = set(BACKENDS) - {"reference", "simulate"} if study == "03_kernels" else set()
    rivals = [row for row in newest if RIVALS[rival](row["method"].lower())]
    found = []
    for mine in newest:
        if mine["method"] not in kernels and not mine["method"].lower().startswith("flexq"):
            continue
        best = min((other for other in rivals if _alike(mine, other)), key=lambda other: other["value"], default=None)
        if best:
            found.append(
                {
                    **{name: mine[name] for name in ("model", "metric", "method", "device", "parameters", "time")},
                    "ratio": best["value"] / mine["value"],
                    "rival": best["method"],
                    "on_gpu": _on_gpu(mine),
                }
            )
    columns = ["model", "metric", "ratio", "method", "rival", "device", "on_gpu", "parameters", "time"]
    return pd.DataFrame(found, columns=columns)


def _conditions(row: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a record. How many threads its host had is no condition of what a GPU does by itself."""
    return {name: value for name, value in row["parameters"].items() if name != "threads" or not _on_gpu(row)}


def _case(row: Mapping[str, Any]) -> str:
    return json.dumps([row[name] for name in ("model", "method", "metric", "device", "conditions")], sort_keys=True)


def _alike(mine: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    if any(mine[name] != other[name] for name in ("model", "metric", "device")):
        return False  # of nearly all pairs: asked first
    a, b = mine["conditions"], other["conditions"]
    return all(a[name] == b[name] for name in (a.keys() & b.keys()) - _METHODS_OWN)


def _on_gpu(row: Mapping[str, Any]) -> bool:
    return pd.notna(row["driver"]) or str(row["parameters"].get("device", "")).startswith("cuda")


class Ratios(NamedTuple):
    """What one GPU bears out.  card: its name, empty without records.  of: case → ratio."""

    card: str
    of: dict[tuple, float]


def _of_one_card(table: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """The GPU with the most cases, of several such the one measured last, and FlexQ's fastest of each: two make no mean.

    table: of `ratios`, and of it only what is compared, with a column `case`.
    """
    table = table[table["on_gpu"].astype(bool)]
    cards = table.groupby("device").agg(cases=("case", "nunique"), last=("time", "max")).sort_values(["cases", "last"])
    card = "" if cards.empty else cards.index[-1]
    fastest = table.sort_values("ratio", kind="stable").drop_duplicates(["device", "case"], keep="last")
    return card, fastest[fastest["device"] == card]


def kernel_ratios(records: pd.DataFrame, rival: str) -> Ratios:
    """The rival's time over FlexQ's on one GPU, products alone, with the kernel figure's bits: (N, K, tokens) → ratio."""
    bits = {(r.outputs, r.features): r.activation_bits for r in paper.kernel_speedups().itertuples()}

    def compared(p: Mapping[str, Any]) -> bool:
        shape = (p.get("outputs"), p.get("features"))
        return shape in bits and p.get("activation_bits") == bits[shape] and p.get("weight_bits", 6) == 6

    table = ratios(records, "03_kernels", "gemm_us", rival)
    table = table[table["parameters"].map(compared).astype(bool)]
    card, table = _of_one_card(
        table.assign(case=[(p["outputs"], p["features"], p["tokens"]) for p in table["parameters"]])
    )
    return Ratios(card, dict(zip(table["case"], table["ratio"], strict=True)))


def paper_kernel_ratios() -> pd.DataFrame:
    """The kernel figure, a row a shape and batch size: {model, outputs, features, activation_bits, tokens, flexq, abq, ratio}.

    flexq, abq: speed-up over INT8 cuBLAS.  ratio: FlexQ over ABQ-LLM.
    """
    keys = ["model", "outputs", "features", "activation_bits", "tokens"]
    wide = paper.kernel_speedups().pivot(index=keys, columns="kernel", values="speedup").reset_index()
    wide.columns.name = None
    return wide.assign(ratio=wide["flexq"] / wide["abq"])


QUANTITIES = {"latency": ("total_s/", "as fast as"), "memory": ("memory_mib/", "smaller in memory than")}
"""What is compared end to end → the beginning of its metric's name, and how a claim says it."""


def end_to_end_ratios(records: pd.DataFrame, quantity: str, rival: str, model: str = "") -> Ratios:
    """The rival's latency or memory over FlexQ's on one GPU, one sequence at a time: (model, output tokens) → ratio.

    model: of this one alone, on the GPU with the most of it; of all models, which together make a mean, unless one is given.
    Latency is the time of the whole output, after a prompt of RATIOS_PROMPT tokens: of longer ones it is partly another
    quantity. Memory is the weights and the KV cache after it, which is what the paper's bars grow by; both are counted from
    tensors.
    """
    card, table = _end_to_end(records[records["model"] == model] if model else records, quantity, rival)
    return Ratios(card, dict(zip(table["case"], table["ratio"], strict=True)))


def end_to_end_rivals(records: pd.DataFrame, quantity: str, rival: str) -> dict[str, str]:
    """Over which of the rival's methods `end_to_end_ratios` are: model → method."""
    return dict(_end_to_end(records, quantity, rival)[1][["model", "rival"]].itertuples(index=False, name=None))


def _end_to_end(records: pd.DataFrame, quantity: str, rival: str) -> tuple[str, pd.DataFrame]:
    """The GPU and its rows of `ratios`, of whole outputs of one sequence; a case is a model and output tokens."""
    records = as_compiled(records)
    if quantity == "memory":
        records = _memory(records)
    table = ratios(records, "04_e2e", QUANTITIES[quantity][0], rival)
    alike = table["parameters"].map(
        lambda p: p.get("batch_size", p.get("batch", 1)) == 1 and p.get("prompt_tokens", RATIOS_PROMPT) == RATIOS_PROMPT
    )
    table = table[alike.astype(bool) & table["metric"].astype(str).str.fullmatch(r".*/\d+")]
    tokens = table["metric"].astype(str).str.split("/").str[-1].astype(int)
    return _of_one_card(table.assign(case=list(zip(table["model"], tokens, strict=True))))


def paper_end_to_end_ratios() -> pd.DataFrame:
    """The end-to-end figure as ratios to FlexQ: rows of {model, output_tokens, method, latency, memory}."""
    table = paper.end_to_end()
    keys = ["model", "output_tokens"]
    ours = table[table["method"] == "w6ax"].set_index(keys)[["seconds", "memory_gb"]].add_prefix("flexq_")
    table = table[table["method"] != "w6ax"].join(ours, on=keys)
    latency, memory = table["seconds"] / table["flexq_seconds"], table["memory_gb"] / table["flexq_memory_gb"]
    return table.assign(latency=latency, memory=memory)[[*keys, "method", "latency", "memory"]].reset_index(drop=True)


def _memory(records: pd.DataFrame) -> pd.DataFrame:
    """Records of weights and KV cache together, from those of each: metric `memory_mib/<output tokens>`."""
    weights = records[records["metric"] == "weights_mib"].drop_duplicates("key", keep="last").set_index("key")["value"]
    caches = records[records["metric"].str.startswith("kv_cache_mib/")]
    both = caches.assign(
        metric=caches["metric"].str.replace("kv_cache_mib/", "memory_mib/"),
        value=caches["value"].astype(float) + caches["key"].map(weights).astype(float),
    )
    return both.dropna(subset=["value"])
