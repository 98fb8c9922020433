"""The paper's claims beside this workbook's records: reproduced, not reproduced, or not measured here and why.

Nothing is measured here. A claim that speaks of several cases is reproduced when every one of them is on record and holds,
not reproduced as soon as one on record does not, and otherwise not measured here. Demo models bear out no claim of the
paper: what they show is told apart, in `directions`.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from flexq_core.runtime.ops import BACKENDS
from flexq_core.sources import paper
from flexq_core.sources.architectures import ARCHITECTURES
from flexq_core.sources.demo import DEMO_MODELS
from flexq_core.workbook import figures, load_records, paths
from flexq_core.workbook.records import Measurement
from flexq_core.workbook.report import accuracy_table

if TYPE_CHECKING:
    from flexq_core.workbook.run import Run

STUDY = "05_report"
REPRODUCED, NOT_REPRODUCED, NOT_MEASURED = "reproduced", "not reproduced", "not measured here"
STATUSES = (REPRODUCED, NOT_REPRODUCED, NOT_MEASURED)

DATASETS = {"wikitext2": "WikiText-2", "c4": "C4"}
WINDOW_LENGTH = 2048
LEAST_WINDOWS = {"wikitext2": 160, "c4": 256}
"""The protocol: all of WikiText-2's test text, which LLaMA's tokenizer makes 166 windows of, and 256 windows of C4."""

ABSTRACT = "abstract"
SENSITIVITY = "§3.1, sensitivity analysis"
PERPLEXITY_TABLES = "§4.2, perplexity tables"
KERNEL_FIGURE = "§4.3, kernel figure"
END_TO_END_FIGURE = "end-to-end figure"

HEADLINES = {"perplexity": 0.05, "kernel": 1.39, "latency": 1.33, "memory": 1.21}
"""The abstract's numbers: increase of perplexity at most, speed-up over ABQ-LLM, latency and memory over SmoothQuant."""

_RUN = "papermill {notebook}.ipynb ../outputs/o.ipynb{more} </dev/null"


@dataclass(frozen=True)
class Verdict:
    """What the records say of a claim.

    status: one of STATUSES.  detail: the numbers, or what is lacking and how to measure it.  evidence: cases on record.
    """

    status: str
    detail: str
    evidence: int


@dataclass(frozen=True)
class Tolerance:
    """How far our numbers may fall short of the paper's and still reproduce it.

    perplexity: added to the increase that the paper prints, which is rounded to 0.01 twice.  share: taken off a speed-up
    or a saving, as a share of it; times vary that much from run to run.
    """

    perplexity: float = 0.03
    share: float = 0.05

    def __post_init__(self) -> None:
        for name, value in (("perplexity_tolerance", self.perplexity), ("tolerance", self.share)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} is {value}; accepted: 0 or more, less than 1")


@dataclass(frozen=True)
class Claim:
    """One claim of the paper.  where: its place in the paper.  judge: (records, tolerance) → Verdict."""

    text: str
    where: str
    judge: Callable[[pd.DataFrame, Tolerance], Verdict] = field(repr=False)


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


def _settle(cases: Mapping[str, bool | None], numbers: Iterable[str], lacking: str) -> Verdict:
    """The verdict on a claim about all `cases`: name → whether it holds, None where it is not on record."""
    known = [holds for holds in cases.values() if holds is not None]
    told = "; ".join(numbers)
    if False in known:
        return Verdict(NOT_REPRODUCED, told, len(known))
    if len(known) == len(cases) > 0:
        return Verdict(REPRODUCED, told, len(known))
    so_far = f"; {len(known)} of {len(cases)} cases are on record and hold: {told}" if known else ""
    return Verdict(NOT_MEASURED, lacking + so_far, len(known))


# --- accuracy ---------------------------------------------------------------------------------------------------------


def paper_increases() -> pd.DataFrame:
    """Rows of {dataset, method, model, fp16, perplexity, increase} as the paper prints them; FP16 itself is left out."""
    table = paper.perplexity()
    base = table[table["bits"] == "FP16"].set_index(["dataset", "model"])["perplexity"].rename("fp16")
    table = table[table["bits"] != "FP16"].join(base, on=["dataset", "model"])
    return table.assign(increase=(table["perplexity"] - table["fp16"]).round(2)).reset_index(drop=True)


def measured_perplexities(records: pd.DataFrame) -> pd.DataFrame:
    """What is on record under the paper's protocol: rows of {dataset, model, method, backend, perplexity, base}.

    Whole texts in windows of 2048, no outliers; base is the unquantised model's. The packed weights come before their
    simulation where both were scored.
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
    return whole and parameters.get("window_length") == WINDOW_LENGTH and not parameters.get("outliers")


def _increase_claim(printed: Any) -> Claim:
    dataset, model = printed.dataset, printed.model

    def judge(records: pd.DataFrame, tolerance: Tolerance) -> Verdict:
        table = measured_perplexities(records)
        mine = table[(table["dataset"] == dataset) & (table["model"] == model) & (table["method"] == "flexq")]
        if mine.empty:
            return _settle({model: None}, [], _not_scored(model, dataset))
        row = mine.iloc[0]
        increase = row["perplexity"] - row["base"]
        holds = increase <= printed.increase + tolerance.perplexity
        told = (
            f"{row['base']:.2f} → {row['perplexity']:.2f}, {increase:+.3f} ({row['backend']}); the paper "
            f"{printed.fp16:.2f} → {printed.perplexity:.2f}, tolerance {tolerance.perplexity:g}"
        )
        return _settle({model: bool(holds)}, [told], "")

    text = f"{model}: FlexQ costs {printed.increase:.2f} of perplexity on {DATASETS[dataset]}, no more than 0.05"
    return Claim(text, PERPLEXITY_TABLES, judge)


def _not_scored(model: str, dataset: str) -> str:
    hub_id = ARCHITECTURES[model].hub_id
    access = f"{hub_id}, which is gated" if hub_id.startswith("meta-llama/") else hub_id
    command = _RUN.format(notebook="02_accuracy", more=f" -p model {model} -p dataset {dataset}")
    return f"needs the weights of {access}, and {DATASETS[dataset]}: {command}"


def _smoothquant_claim(dataset: str) -> Claim:
    models = list(paper_increases().query("dataset == @dataset and method == 'FlexQ'")["model"])

    def judge(records: pd.DataFrame, _: Tolerance) -> Verdict:
        table = measured_perplexities(records)
        of = table[table["dataset"] == dataset].set_index(["model", "method"])["perplexity"].to_dict()
        pairs = {model: (of.get((model, "flexq")), of.get((model, "smoothquant-w6a6"))) for model in models}
        cases = {model: None if None in pair else bool(pair[0] < pair[1]) for model, pair in pairs.items()}
        told = [f"{model} {a:.2f} against {b:.2f}" for model, (a, b) in pairs.items() if cases[model] is not None]
        return _settle(cases, told, _not_scored("llama-7b", dataset) + ", and so on for each model")

    text = f"FlexQ's perplexity on {DATASETS[dataset]} is below SmoothQuant W6A6's on all {len(models)} models"
    return Claim(text, PERPLEXITY_TABLES, judge)


def _beyond(reason: str) -> Callable[[pd.DataFrame, Tolerance], Verdict]:
    """A judge for what this workbook has no means to measure."""
    return lambda records, tolerance: Verdict(NOT_MEASURED, reason, 0)


# --- sensitivity ------------------------------------------------------------------------------------------------------


def _sensitivity_claim(layer: str, family: str) -> Claim:
    def judge(records: pd.DataFrame, _: Tolerance) -> Verdict:
        models = [name for name, architecture in ARCHITECTURES.items() if architecture.family == family.lower()]
        found = {model: kinds for model, kinds in divergence_by_kind(records).items() if model in models}
        cases = {model: max(kinds, key=kinds.get) == layer for model, kinds in found.items()}
        example = "llama-2-7b" if family == "LLaMA" else "opt-6.7b"
        command = _RUN.format(notebook="01_sensitivity", more=f" -p model {example}")
        told = [f"{model}: {_divergences(kinds)}" for model, kinds in found.items()]
        return _settle(cases or {layer: None}, told, f"needs the weights of one, such as {example}: {command}")

    return Claim(
        f"{layer} is the layer of {family} models that is most sensitive to 6-bit activations", SENSITIVITY, judge
    )


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


def _divergences(kinds: Mapping[str, float]) -> str:
    ordered = sorted(kinds.items(), key=lambda item: -item[1])
    return " > ".join(f"{kind} {value:.2g}" for kind, value in ordered[:3]) + " nat"


# --- speed and memory -------------------------------------------------------------------------------------------------

_METHODS_OWN = {"backend", "plan", "plan_sha256", "activation_bits", "weight_bits", "fingerprint", "dtype", "method"}
"""Parameters in which two methods that are compared may differ."""

RIVALS: dict[str, Callable[[str], bool]] = {
    "INT8": lambda method: method in ("torch-int8", "cublas-int8"),
    "ABQ-LLM": lambda method: "abq" in method,
    "W8A8": lambda method: method == "w8a8",
    "FP16": lambda method: method == "fp16",
}


def ratios(records: pd.DataFrame, study: str, metric: str, rival: str) -> pd.DataFrame:
    """How many times as much a rival takes as FlexQ: rows of {model, metric, ratio, method, rival, device, on_gpu,
    parameters}.

    FlexQ is a method whose name begins so, and in 03_kernels its compiled backends.  metric: the metric's name, or its
    beginning.  rival: a key of RIVALS.  Both were measured on the same device with the same parameters, those apart that
    are a method's own; of several such rivals the fastest counts, of the same case the newest record.
    """
    rows = records[(records["study"] == study) & (records["status"] == "ok") & records["metric"].str.startswith(metric)]
    whole = [row for row in rows.to_dict("records") if row["value"] and not row["parameters"].get("layers")]
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
                    **{name: mine[name] for name in ("model", "metric", "method", "device", "parameters")},
                    "ratio": best["value"] / mine["value"],
                    "rival": best["method"],
                    "on_gpu": _on_gpu(mine),
                }
            )
    columns = ["model", "metric", "ratio", "method", "rival", "device", "on_gpu", "parameters"]
    return pd.DataFrame(found, columns=columns)


def _case(row: Mapping[str, Any]) -> str:
    return json.dumps([row[name] for name in ("model", "method", "metric", "device", "parameters")], sort_keys=True)


def _alike(mine: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    a, b = mine["parameters"], other["parameters"]
    shared = (a.keys() & b.keys()) - _METHODS_OWN
    same = all(mine[name] == other[name] for name in ("model", "metric", "device"))
    return same and all(a[name] == b[name] for name in shared)


def _on_gpu(row: Mapping[str, Any]) -> bool:
    return pd.notna(row["driver"]) or str(row["parameters"].get("device", "")).startswith("cuda")


def kernel_ratios(records: pd.DataFrame, rival: str) -> dict[tuple[int, int, int], float]:
    """The rival's time over FlexQ's on a GPU, products alone, with the kernel figure's activations: (N, K, tokens) → ratio."""
    bits = {(r.outputs, r.features): r.activation_bits for r in paper.kernel_speedups().itertuples()}
    best: dict[tuple[int, int, int], float] = {}
    table = ratios(records, "03_kernels", "gemm_us", rival)
    for row in table[table["on_gpu"]].itertuples():
        p = row.parameters
        case = (p.get("outputs"), p.get("features"), p.get("tokens"))
        if p.get("activation_bits") == bits.get(case[:2]):
            best[case] = max(best.get(case, 0.0), row.ratio)
    return best


def paper_kernel_ratios() -> pd.DataFrame:
    """The kernel figure, a row a shape and batch size: {model, outputs, features, activation_bits, tokens, flexq, abq, ratio}.

    flexq, abq: speed-up over INT8 cuBLAS.  ratio: FlexQ over ABQ-LLM.
    """
    keys = ["model", "outputs", "features", "activation_bits", "tokens"]
    wide = paper.kernel_speedups().pivot(index=keys, columns="kernel", values="speedup").reset_index()
    wide.columns.name = None
    return wide.assign(ratio=wide["flexq"] / wide["abq"])


_ON_GPU = set(BACKENDS) - {"auto", "reference", "simulate", "cpu"}
_GPU = "an NVIDIA GPU" if _ON_GPU else "a GPU kernel, which is not here yet, and an NVIDIA GPU"


def _kernel_reason(records: pd.DataFrame, rival: str, bits: tuple[int, ...] = (6, 8)) -> str:
    if rival == "ABQ-LLM":
        return "ABQ-LLM's kernel is not built here, so there is nothing to time beside ours"
    timed = "; a processor was timed here" if (records["study"] == "03_kernels").any() else ""
    command = _RUN.format(notebook="03_kernels", more=f" -p shapes paper -p tokens 1,4,8 -p activation_bits {bits[0]}")
    again = "".join(f", and again with activation_bits {other}" for other in bits[1:])
    return f"needs {_GPU}{timed}: {command}{again}"


def _shape_claim(shape: tuple[int, int], rows: pd.DataFrame) -> Claim:
    def judge(records: pd.DataFrame, tolerance: Tolerance) -> Verdict:
        ours = kernel_ratios(records, "INT8")
        cases, told = {}, []
        for row in rows.itertuples():
            ratio = ours.get((*shape, row.tokens))
            cases[f"batch {row.tokens}"] = None if ratio is None else ratio >= (1 - tolerance.share) * row.flexq
            if ratio is not None:
                told.append(f"batch {row.tokens}: {ratio:.2f}× against {row.flexq:.2f}×")
        return _settle(cases, told, _kernel_reason(records, "INT8", (int(rows["activation_bits"].iloc[0]),)))

    paper_says = ", ".join(f"{value:.2f}×" for value in rows["flexq"])
    first = rows.iloc[0]
    text = f"{shape[0]} × {shape[1]} ({first['model']}, W6A{first['activation_bits']}): {paper_says} INT8 cuBLAS at batch 1, 4, 8"
    return Claim(text, KERNEL_FIGURE, judge)


def _mean_claim(
    text: str, where: str, stated: float, cells: list, ours: Callable[[pd.DataFrame], dict], lacking: Callable | str
) -> Claim:
    """A claim about a mean, which needs every one of `cells`.  ours: records → {cell: ratio}."""

    def judge(records: pd.DataFrame, tolerance: Tolerance) -> Verdict:
        measured = ours(records)
        known = [measured[cell] for cell in cells if cell in measured]
        if len(known) < len(cells):
            partly = f"; {len(known)} of its {len(cells)} cases are on record" if known else ""
            return Verdict(
                NOT_MEASURED, (lacking if isinstance(lacking, str) else lacking(records)) + partly, len(known)
            )
        mean = sum(known) / len(known)
        status = REPRODUCED if mean >= (1 - tolerance.share) * stated else NOT_REPRODUCED
        return Verdict(status, f"{mean:.2f}× against {stated:.2f}×, tolerance {tolerance.share:.0%}", len(known))

    return Claim(text, where, judge)


def _kernel_mean_claim(text: str, where: str, rows: pd.DataFrame, rival: str, stated: float) -> Claim:
    cells = [(row.outputs, row.features, row.tokens) for row in rows.itertuples()]
    return _mean_claim(
        text, where, stated, cells, lambda r: kernel_ratios(r, rival), lambda r: _kernel_reason(r, rival)
    )


def paper_end_to_end_ratios() -> pd.DataFrame:
    """The end-to-end figure as ratios to FlexQ: rows of {model, output_tokens, method, latency, memory}."""
    table = paper.end_to_end()
    keys = ["model", "output_tokens"]
    ours = table[table["method"] == "w6ax"].set_index(keys)[["seconds", "memory_gb"]].add_prefix("flexq_")
    table = table[table["method"] != "w6ax"].join(ours, on=keys)
    latency, memory = table["seconds"] / table["flexq_seconds"], table["memory_gb"] / table["flexq_memory_gb"]
    return table.assign(latency=latency, memory=memory)[[*keys, "method", "latency", "memory"]].reset_index(drop=True)


_QUANTITIES = {"latency": ("total_s/", "as fast as"), "memory": ("memory_mib/", "smaller in memory than")}


def end_to_end_ratios(records: pd.DataFrame, quantity: str, rival: str) -> dict[tuple[str, int], float]:
    """The rival's latency or peak memory over FlexQ's on a GPU, one sequence at a time: (model, output tokens) → ratio.

    Latency is the time of the whole output. Memory is the weights and the KV cache after it, which is what the paper's bars
    grow by; both are counted from tensors.
    """
    if quantity == "memory":
        records = _memory(records)
    table = ratios(records, "04_e2e", _QUANTITIES[quantity][0], rival)
    lengths = table["metric"].str.extract(r"/(\d+)$")[0] if len(table) else []
    return {
        (row.model, int(length)): row.ratio
        for row, length in zip(table.itertuples(), lengths, strict=True)
        if row.on_gpu and pd.notna(length) and row.parameters.get("batch_size", row.parameters.get("batch", 1)) == 1
    }


def _memory(records: pd.DataFrame) -> pd.DataFrame:
    """Records of weights and KV cache together, from those of each: metric `memory_mib/<output tokens>`."""
    weights = records[records["metric"] == "weights_mib"].drop_duplicates("key", keep="last").set_index("key")["value"]
    caches = records[records["metric"].str.startswith("kv_cache_mib/")]
    both = caches.assign(
        metric=caches["metric"].str.replace("kv_cache_mib/", "memory_mib/"),
        value=caches["value"].astype(float) + caches["key"].map(weights).astype(float),
    )
    return both.dropna(subset=["value"])


def _not_timed(model: str) -> str:
    more = f" -p model {model} -p weights random -p output_tokens 128,256,512,1024"
    return f"needs {_GPU} that holds {model}: {_RUN.format(notebook='04_e2e', more=more)}"


def _end_to_end_mean_claim(text: str, quantity: str) -> Claim:
    table = paper.end_to_end()
    cells = list(table[["model", "output_tokens"]].drop_duplicates().itertuples(index=False, name=None))
    return _mean_claim(
        text,
        ABSTRACT,
        HEADLINES[quantity],
        cells,
        lambda records: end_to_end_ratios(records, quantity, "W8A8"),
        _not_timed(cells[0][0]) + ", and so on for each model",
    )


def _end_to_end_claim(model: str, method: str, rival: str, quantity: str) -> Claim:
    table = paper_end_to_end_ratios()
    rows = table[(table["model"] == model) & (table["method"] == method)]
    stated = rows[quantity].mean()

    def judge(records: pd.DataFrame, tolerance: Tolerance) -> Verdict:
        ours = end_to_end_ratios(records, quantity, rival)
        cases, told = {}, []
        for row in rows.itertuples():
            ratio, printed = ours.get((model, row.output_tokens)), getattr(row, quantity)
            cases[str(row.output_tokens)] = None if ratio is None else bool(ratio >= (1 - tolerance.share) * printed)
            if ratio is not None:
                told.append(f"{row.output_tokens} tokens: {ratio:.2f}× against {printed:.2f}×")
        return _settle(cases, told, _not_timed(model))

    text = f"{model}: FlexQ is {stated:.2f}× {_QUANTITIES[quantity][1]} {rival}, the mean of four output lengths"
    return Claim(text, END_TO_END_FIGURE, judge)


# --- the claims -------------------------------------------------------------------------------------------------------


def paper_claims() -> list[Claim]:
    """The paper's claims, in its order: sensitivity, accuracy, kernels, end to end."""
    claims = [_sensitivity_claim("down_proj", "LLaMA"), _sensitivity_claim("fc2", "OPT")]
    claims += [_increase_claim(row) for row in paper_increases().query("method == 'FlexQ'").itertuples()]
    claims += [_smoothquant_claim(dataset) for dataset in DATASETS]
    claims += [
        Claim(
            "FlexQ's perplexity is below OmniQuant's, I-LLM's and DuQuant's at W6A6",
            PERPLEXITY_TABLES,
            _beyond("these methods are not built here: they train or rotate the model, and have releases of their own"),
        ),
        Claim(
            "zero-shot accuracy stays near FP16's on six tasks",
            "§4.2, zero-shot tables",
            _beyond("the paper's zero-shot tables are not carried in, so there is nothing to set ours beside"),
        ),
    ]
    kernels = paper_kernel_ratios()
    for tokens, rows in kernels.groupby("tokens"):
        stated = rows["flexq"].mean()
        text = f"the kernel is {stated:.2f}× as fast as INT8 cuBLAS at batch {tokens}, the mean of 20 shapes"
        claims.append(_kernel_mean_claim(text, KERNEL_FIGURE, rows, "INT8", stated))
    claims += [
        _shape_claim(shape, kernels[(kernels["outputs"] == shape[0]) & (kernels["features"] == shape[1])])
        for shape in paper.kernel_shapes()
    ]
    largest = kernels[(kernels["model"] == "llama-2-70b") & (kernels["tokens"] == 1)]
    text = "the kernel is on average 1.39× as fast as ABQ-LLM's on LLaMA-2-70B's linear layers"
    claims.append(_kernel_mean_claim(text, ABSTRACT, largest, "ABQ-LLM", HEADLINES["kernel"]))
    for quantity, (_, words) in _QUANTITIES.items():
        text = f"end to end, FlexQ is {HEADLINES[quantity]}× {words} SmoothQuant, the mean of 4 models and 4 lengths"
        claims.append(_end_to_end_mean_claim(text, quantity))
        for model in paper.end_to_end()["model"].unique():
            claims.append(_end_to_end_claim(model, "w8a8", "W8A8", quantity))
    claims += [_end_to_end_claim("llama-13b", "fp16", "FP16", quantity) for quantity in _QUANTITIES]
    return claims


def judge(claims: Iterable[Claim], records: pd.DataFrame, tolerance: Tolerance) -> pd.DataFrame:
    """Rows of {where, claim, verdict, detail, evidence}, in the order of the claims."""
    told = [(claim, claim.judge(records, tolerance)) for claim in claims]
    rows = [(c.where, c.text, v.status, v.detail, v.evidence) for c, v in told]
    return pd.DataFrame(rows, columns=["where", "claim", "verdict", "detail", "evidence"])


def summary(verdicts: pd.DataFrame) -> pd.DataFrame:
    """How many claims of each place in the paper met which verdict."""
    counts = pd.crosstab(verdicts["where"], verdicts["verdict"]).reindex(columns=list(STATUSES), fill_value=0)
    return counts.loc[verdicts["where"].unique()].rename_axis(columns=None)


# --- what the paper's own numbers say of its claims -------------------------------------------------------------------


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
        f"it is {' and '.join(whose)}'s; the models' means are {_listed(means)}, and all together give {overall:.2f}×",
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
        f"it is the mean of all models and lengths ({overall:.3f}×: {_listed(means)}), where the 1.33× beside it in the same "
        f"sentence is {fastest}'s alone, whose saving is {means[fastest]:.2f}×",
        bool(round(overall, 2) == HEADLINES["memory"]),
        means | {"all": overall},
    )


def _over_smoothquant(quantity: str) -> tuple[dict[str, float], float]:
    table = paper_end_to_end_ratios().query("method == 'w8a8'")
    return table.groupby("model", sort=False)[quantity].mean().to_dict(), table[quantity].mean()


def _listed(means: Mapping[str, float]) -> str:
    return ", ".join(f"{model} {mean:.2f}×" for model, mean in means.items())


def shared_memory_bars() -> list[tuple[str, str, int, str, float]]:
    """Memory bars that two models have in common to the last digit: (model, other model, output tokens, method, GB)."""
    bars = paper.end_to_end().set_index(["model", "output_tokens", "method"])["memory_gb"]
    models = bars.index.get_level_values("model").unique()
    return [
        (a, b, tokens, method, value)
        for a, b in itertools.combinations(models, 2)
        for (tokens, method), value in bars[a].items()
        if bars[b].get((tokens, method)) == value
    ]


def copied_memory_bars() -> Finding:
    """Memory bars of one model that are another's."""
    shared = shared_memory_bars()
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


# --- the demo models and this processor: never beside the paper's numbers ---------------------------------------------

ORDER = ("rtn-w6a6", "w6a6", "flexq", "w6a8")


def directions(records: pd.DataFrame) -> pd.DataFrame:
    """Whether what stands in for the paper's models and GPU points the same way: {claim, on, same direction, here}.

    These rows bear out no claim of the paper and are counted in none.
    """
    rows = [*_accuracy_directions(records), *_sensitivity_directions(records), *_speed_directions(records)]
    return pd.DataFrame(rows, columns=["the paper's direction", "on", "same direction", "here"])


def _accuracy_directions(records: pd.DataFrame) -> Iterable[tuple[str, str, str, str]]:
    if records.empty:
        return
    table = accuracy_table(records[records["model"].isin(list(DEMO_MODELS))])
    if table.empty:
        return
    table = table[table["outliers"] == 0].drop_duplicates(["model", "dataset", "method"], keep="last")
    for model, mine in table.groupby("model"):
        perplexity = mine.set_index("method")["perplexity"]
        for methods in (ORDER, ("smoothquant-w6a6", "flexq")):
            if set(methods) <= set(perplexity.index):
                values = [perplexity[method] for method in methods]
                same = all(a > b for a, b in itertools.pairwise(values))
                yield f"perplexity: {' > '.join(methods)}", model, _yes(same), " > ".join(f"{v:.3f}" for v in values)


def _sensitivity_directions(records: pd.DataFrame) -> Iterable[tuple[str, str, str, str]]:
    for model, kinds in divergence_by_kind(records).items():
        if model in DEMO_MODELS:
            layer = "fc2" if "fc2" in kinds else "down_proj"
            most = max(kinds, key=kinds.get)
            yield f"{layer} is the most sensitive kind of layer", model, _yes(most == layer), _divergences(kinds)


def _speed_directions(records: pd.DataFrame) -> Iterable[tuple[str, str, str, str]]:
    for study, metric, rival, what in (
        ("03_kernels", "median_us", "INT8", "the kernel is faster than INT8"),
        ("04_e2e", "tpot_ms", "W8A8", "a token takes less time than with W8A8"),
        ("04_e2e", "weights_mib", "W8A8", "weights are smaller than with W8A8"),
    ):
        table = ratios(records, study, metric, rival)
        stands_in = ~table["on_gpu"].astype(bool) | table["model"].isin(list(DEMO_MODELS))
        for (model, device), mine in table[stands_in].groupby(["model", "device"]):
            ahead = int((mine["ratio"] > 1).sum())
            told = f"in {ahead} of {len(mine)} cases; {mine['ratio'].min():.2f}× to {mine['ratio'].max():.2f}×"
            yield what, ", ".join(filter(None, (model, device))), _yes(ahead == len(mine)), told


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


# --- figures ----------------------------------------------------------------------------------------------------------

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
    table, ours = paper_kernel_ratios(), kernel_ratios(records, "INT8")
    shapes = paper.kernel_shapes()[::-1]
    model_of = {(r.outputs, r.features): r.model for r in table.itertuples()}
    figure, axes = plt.subplots(1, 3, figsize=(figures.FULL_PAGE[0], 5.2), sharey=True, sharex=True)
    for axis, (tokens, rows) in zip(axes, table.groupby("tokens"), strict=True):
        at = [shapes.index((r.outputs, r.features)) for r in rows.itertuples()]
        axis.hlines(at, rows["abq"], rows["flexq"], color=figures.NEUTRAL, lw=1.5)
        axis.plot(rows["abq"], at, "s", color="#e69f00", ms=4.5, label="ABQ-LLM")
        axis.plot(rows["flexq"], at, "o", color=figures.MAIN, ms=5, label="FlexQ")
        mine = {case: ratio for case, ratio in ours.items() if case[2] == tokens and case[:2] in shapes}
        if mine:
            places = [shapes.index(case[:2]) for case in mine]
            axis.scatter(list(mine.values()), places, label="FlexQ, measured here", **_OURS)
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
    for axis, quantity in zip(axes, _QUANTITIES, strict=True):
        ours = end_to_end_ratios(records, quantity, "W8A8")
        for offset, tokens in enumerate(lengths):
            rows = table[table["output_tokens"] == tokens].set_index("model")[quantity]
            places = [models.index(model) + 0.2 * (offset - 1.5) for model in rows.index]
            axis.bar(places, rows, width=0.18, color=shades[tokens], label=f"{tokens} tokens")
            stars = {place: ours.get((model, tokens)) for place, model in zip(places, rows.index, strict=True)}
            stars = {place: ratio for place, ratio in stars.items() if ratio is not None}
            axis.scatter(list(stars), list(stars.values()), label="measured here" if stars else None, **_OURS)
        axis.axhline(HEADLINES[quantity], color=figures.ACCENT, lw=1.2, ls="--", label="the abstract")
        top = max([table[quantity].max(), *ours.values()])
        axis.set(title=f"the abstract: {HEADLINES[quantity]}×")
        axis.set(ylabel=f"{quantity}, W8A8 ÷ FlexQ (×)", ylim=(1, 1 + 1.15 * (top - 1)))
        axis.set_xticks(range(len(models)), models)
        axis.grid(False, axis="x")
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6)
    return figure


# --- records and the notebook's own claims ----------------------------------------------------------------------------


class ReportStudy:
    """The paper's claims beside the records of one folder.

    run: the workbook run.  records: folder to read, empty for this workbook's.  tolerance, perplexity_tolerance: see
    `Tolerance`.
    Raises ValueError for a folder without records or a tolerance below 0, saying what is accepted.
    """

    def __init__(
        self, run: Run, *, records: str = "", tolerance: float = 0.05, perplexity_tolerance: float = 0.03
    ) -> None:
        self.run = run
        self.tolerance = Tolerance(perplexity_tolerance, tolerance)
        self.records = read_records(records)
        self.verdicts = judge(paper_claims(), self.records, self.tolerance)
        self.findings = findings()

    def keep(self) -> None:
        """Record every verdict, finding and reading for the report, as metric `<kind>/<where>/<claim>` and its reason."""
        value = {REPRODUCED: 1.0, NOT_REPRODUCED: 0.0, NOT_MEASURED: None}
        measured = {
            f"verdict/{v.where}/{v.claim}": Measurement(value[v.verdict], "1", f"{v.verdict}: {v.detail}")
            for v in self.verdicts.itertuples()
        }
        for found in self.findings:
            measured[f"finding/{found.where}/{found.claim}"] = Measurement(float(found.agrees), "1", found.finding)
        for where, what in READINGS:
            measured[f"reading/{RELEASE}: {where}/{what}"] = Measurement(None, "")
        self.run.records.replace(
            model="", method="paper", parameters={"run": self.run.parameters}, seed=0, measured=measured
        )

    def claims(self) -> list[tuple[str, bool, str]]:
        """What this notebook claims of itself: (claim, whether it holds, the numbers)."""
        counts = Counter(self.verdicts["verdict"])
        reproduced = self.verdicts[self.verdicts["verdict"] == REPRODUCED]
        unexplained = self.verdicts[self.verdicts["detail"].str.strip() == ""]
        abq, latency, memory = average_over_abq(), latency_over_smoothquant(), memory_over_smoothquant()
        bars = {(model, other) for model, other, *_ in shared_memory_bars()}
        return [
            (
                "every claim of the paper has a verdict and its reason",
                set(counts) <= set(STATUSES) and unexplained.empty,
                ", ".join(f"{counts[status]} {status}" for status in STATUSES),
            ),
            (
                "no claim counts as reproduced without a record",
                bool((reproduced["evidence"] > 0).all()),
                f"{int(reproduced['evidence'].sum())} cases on record",
            ),
            (
                "the abstract's 1.39× over ABQ-LLM is the figure's mean at batch 1, and at no other batch",
                [t for t in (1, 4, 8) if round(abq.numbers[f"batch_{t}"], 2) == HEADLINES["kernel"]] == [1],
                ", ".join(f"batch {t}: {abq.numbers[f'batch_{t}']:.3f}×" for t in (1, 4, 8)),
            ),
            (
                "the abstract's 1.33× over SmoothQuant is LLaMA-7B's, and no other model's",
                [m for m, mean in latency.numbers.items() if round(mean, 2) == HEADLINES["latency"]] == ["llama-7b"],
                _listed(latency.numbers),
            ),
            (
                "the abstract's 1.21× memory over SmoothQuant is the mean of all models",
                memory.agrees,
                _listed(memory.numbers),
            ),
            (
                "OPT-30B and LLaMA-30B share memory bars, and no other two models do",
                bars == {("llama-30b", "opt-30b")},
                f"{len(shared_memory_bars())} bars",
            ),
        ]
