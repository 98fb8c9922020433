"""The paper's claims, each judged by the records: reproduced, not reproduced, or not measured here and why.

A claim that speaks of several cases is reproduced when every one of them is on record and holds, not reproduced as soon as one
on record does not, and otherwise not measured here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from flexq_core.runtime.ops import BACKENDS
from flexq_core.sources import paper
from flexq_core.sources.architectures import ARCHITECTURES
from flexq_core.studies.report.evidence import (
    DATASETS,
    HEADLINES,
    QUANTITIES,
    Ratios,
    divergence_by_kind,
    divergences_text,
    end_to_end_ratios,
    kernel_ratios,
    measured_perplexities,
    paper_end_to_end_ratios,
    paper_increases,
    paper_kernel_ratios,
)

REPRODUCED, NOT_REPRODUCED, NOT_MEASURED = "reproduced", "not reproduced", "not measured here"
STATUSES = (REPRODUCED, NOT_REPRODUCED, NOT_MEASURED)
ABSTRACT = "abstract"
SENSITIVITY = "§3.1, sensitivity analysis"
PERPLEXITY_TABLES = "§4.2, perplexity tables"
KERNEL_FIGURE = "§4.3, kernel figure"
END_TO_END_FIGURE = "end-to-end figure"
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


def _on(card: str, told: list[str]) -> list[str]:
    """What is told of a card, under its name."""
    return [f"{card}: {told[0]}", *told[1:]] if told else []


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


def _sensitivity_claim(layer: str, family: str) -> Claim:
    def judge(records: pd.DataFrame, _: Tolerance) -> Verdict:
        models = [name for name, architecture in ARCHITECTURES.items() if architecture.family == family.lower()]
        found = {model: kinds for model, kinds in divergence_by_kind(records).items() if model in models}
        cases = {model: max(kinds, key=kinds.get) == layer for model, kinds in found.items()}
        example = "llama-2-7b" if family == "LLaMA" else "opt-6.7b"
        command = _RUN.format(notebook="01_sensitivity", more=f" -p model {example}")
        told = [f"{model}: {divergences_text(kinds)}" for model, kinds in found.items()]
        return _settle(cases or {layer: None}, told, f"needs the weights of one, such as {example}: {command}")

    return Claim(
        f"{layer} is the layer of {family} models that is most sensitive to 6-bit activations", SENSITIVITY, judge
    )


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
        card, ours = kernel_ratios(records, "INT8")
        cases, told = {}, []
        for row in rows.itertuples():
            ratio = ours.get((*shape, row.tokens))
            cases[f"batch {row.tokens}"] = None if ratio is None else ratio >= (1 - tolerance.share) * row.flexq
            if ratio is not None:
                told.append(f"batch {row.tokens}: {ratio:.2f}× against {row.flexq:.2f}×")
        return _settle(cases, _on(card, told), _kernel_reason(records, "INT8", (int(rows["activation_bits"].iloc[0]),)))

    paper_says = ", ".join(f"{value:.2f}×" for value in rows["flexq"])
    first = rows.iloc[0]
    text = f"{shape[0]} × {shape[1]} ({first['model']}, W6A{first['activation_bits']}): {paper_says} INT8 cuBLAS at batch 1, 4, 8"
    return Claim(text, KERNEL_FIGURE, judge)


def _mean_claim(
    text: str, where: str, stated: float, cells: list, ours: Callable[[pd.DataFrame], Ratios], lacking: Callable | str
) -> Claim:
    """A claim about a mean, which needs every one of `cells`.  ours: records → Ratios by cell."""

    def judge(records: pd.DataFrame, tolerance: Tolerance) -> Verdict:
        card, measured = ours(records)
        known = [measured[cell] for cell in cells if cell in measured]
        if len(known) < len(cells):
            partly = f"; {len(known)} of its {len(cells)} cases are on record" if known else ""
            return Verdict(
                NOT_MEASURED, (lacking if isinstance(lacking, str) else lacking(records)) + partly, len(known)
            )
        mean = sum(known) / len(known)
        status = REPRODUCED if mean >= (1 - tolerance.share) * stated else NOT_REPRODUCED
        told = f"{mean:.2f}× against {stated:.2f}×, tolerance {tolerance.share:.0%}, {card}"
        return Verdict(status, told, len(known))

    return Claim(text, where, judge)


def _kernel_mean_claim(text: str, where: str, rows: pd.DataFrame, rival: str, stated: float) -> Claim:
    cells = [(row.outputs, row.features, row.tokens) for row in rows.itertuples()]
    return _mean_claim(
        text, where, stated, cells, lambda r: kernel_ratios(r, rival), lambda r: _kernel_reason(r, rival)
    )


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
        card, ours = end_to_end_ratios(records, quantity, rival, model)
        cases, told = {}, []
        for row in rows.itertuples():
            ratio, printed = ours.get((model, row.output_tokens)), getattr(row, quantity)
            cases[str(row.output_tokens)] = None if ratio is None else bool(ratio >= (1 - tolerance.share) * printed)
            if ratio is not None:
                told.append(f"{row.output_tokens} tokens: {ratio:.2f}× against {printed:.2f}×")
        return _settle(cases, _on(card, told), _not_timed(model))

    text = f"{model}: FlexQ is {stated:.2f}× {QUANTITIES[quantity][1]} {rival}, the mean of four output lengths, judged at each"
    return Claim(text, END_TO_END_FIGURE, judge)


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
    for quantity, (_, words) in QUANTITIES.items():
        text = f"end to end, FlexQ is {HEADLINES[quantity]}× {words} SmoothQuant, the mean of 4 models and 4 lengths"
        claims.append(_end_to_end_mean_claim(text, quantity))
        for model in paper.end_to_end()["model"].unique():
            claims.append(_end_to_end_claim(model, "w8a8", "W8A8", quantity))
    claims += [_end_to_end_claim("llama-13b", "fp16", "FP16", quantity) for quantity in QUANTITIES]
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
