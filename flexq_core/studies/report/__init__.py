"""The paper beside this workbook's records: claims and their verdicts, findings about its own numbers, figures.

Nothing is measured here. Demo models bear out no claim of the paper: what they show is told apart, in `directions`.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from flexq_core.sources import paper
from flexq_core.studies.report.claims import (
    NOT_MEASURED,
    NOT_REPRODUCED,
    REPRODUCED,
    STATUSES,
    Tolerance,
    judge,
    paper_claims,
    summary,
)
from flexq_core.studies.report.demo_directions import directions
from flexq_core.studies.report.evidence import HEADLINES, read_records
from flexq_core.studies.report.own_numbers import (
    READINGS,
    RELEASE,
    average_over_abq,
    findings,
    findings_table,
    latency_over_smoothquant,
    listed,
    memory_over_smoothquant,
    readings_table,
)
from flexq_core.studies.report.plots import (
    end_to_end_note,
    kernels_note,
    perplexity_note,
    plot_end_to_end,
    plot_kernels,
    plot_perplexity,
)
from flexq_core.workbook.records import Measurement

if TYPE_CHECKING:
    from flexq_core.workbook.run import Run

__all__ = [
    "ReportStudy",
    "directions",
    "end_to_end_note",
    "findings_table",
    "kernels_note",
    "perplexity_note",
    "plot_end_to_end",
    "plot_kernels",
    "plot_perplexity",
    "readings_table",
    "summary",
]


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
        bars = {(model, other) for model, other, *_ in paper.shared_memory_bars()}
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
                listed(latency.numbers),
            ),
            (
                "the abstract's 1.21× memory over SmoothQuant is the mean of all models",
                memory.agrees,
                listed(memory.numbers),
            ),
            (
                "OPT-30B and LLaMA-30B share memory bars, and no other two models do",
                bars == {("llama-30b", "opt-30b")},
                f"{len(paper.shared_memory_bars())} bars",
            ),
        ]
