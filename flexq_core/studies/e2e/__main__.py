"""The command line; see `--help`."""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch

from flexq_core.runtime import ops
from flexq_core.sources.models import ModelError
from flexq_core.studies.e2e import BEST_MODE, METHODS, WEIGHTS, EndToEndStudy, claims, processes
from flexq_core.studies.e2e.decode import COMPILE_MODES
from flexq_core.studies.e2e.parallel import ParallelStudy
from flexq_core.studies.e2e_compared import plot_latency, plot_memory, plot_step, published_note
from flexq_core.studies.parameters import whole_number
from flexq_core.workbook.arguments import given
from flexq_core.workbook.command import exit_status, print_claims, writable_outputs
from flexq_core.workbook.records import Records
from flexq_core.workbook.run import Run

STUDY = "04_e2e"


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; returns the process's exit status. torchrun calls it once a process: see parallel.py."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def measure() -> int:
        with ExitStack() as stack:
            try:
                stack.enter_context(processes.joined(device))
            except ValueError as refusal:
                print(refusal, file=sys.stderr)
                return 1
            return _measure(arguments, device)

    return exit_status(measure)


def _measure(arguments: list[str] | None, device: str) -> int:
    description = "End to end: time to first token, time per output token and memory by method."
    parser = argparse.ArgumentParser(prog="python -m flexq_core.studies.e2e", description=description)
    parser.add_argument("--model", default="demo-llama", help="a name, a hub id or a folder (default: demo-llama)")
    parser.add_argument("--weights", choices=WEIGHTS, default=WEIGHTS[0], help="(default: pretrained)")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=METHODS, help="(default: all that this machine can run)"
    )
    parser.add_argument("--backend", choices=ops.BACKENDS, default="auto", help="FlexQ's (default: auto)")
    parser.add_argument("--plan", default="", metavar="FILE", help="a plan file to time as well")
    parser.add_argument(
        "--prompt-tokens", type=whole_number, nargs="+", default=[128], help="one or more (default: 128)"
    )
    parser.add_argument("--output-tokens", type=whole_number, nargs="+", default=[128], help="lengths (default: 128)")
    parser.add_argument("--batch-size", type=whole_number, nargs="+", default=[1], help="one or more (default: 1)")
    parser.add_argument("--layers", type=int, default=0, help="with random weights: this many blocks (default: all)")
    parser.add_argument(
        "--compile-mode",
        choices=(BEST_MODE, *COMPILE_MODES),
        default=BEST_MODE,
        help="torch's for a GPU's decode step (the prompt has the default); best: for each method the faster of the last two "
        "(default: best)",
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed decodes (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument(
        "--outputs",
        metavar="FOLDER",
        type=given,
        help="keep records in FOLDER/records and figures in FOLDER/figures, measure none again, and drop records of older "
        "source; from the repository's root, and {card} is the GPU's short name (default: none)",
    )
    options = vars(parser.parse_args(arguments))
    folder = options.pop("outputs")
    options["methods"] = ",".join(options["methods"])
    options["output_tokens"] = ",".join(map(str, options["output_tokens"]))
    sizes = list(itertools.product(options.pop("batch_size"), options.pop("prompt_tokens")))
    alone = processes.count() == 1
    try:
        kept = writable_outputs(folder, device) if folder else None
    except ValueError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as temporary:
        place = kept or Path(temporary)
        records = (Records if alone else processes.SharedRecords)(STUDY, place, device)
        run = Run(STUDY, options, device, place, records)
        try:
            first = (EndToEndStudy if alone else ParallelStudy)(
                run, **options, **dict(zip(_SIZES, sizes[0], strict=True))
            )
            studies = [first.resized(*size) for size in sizes]  # what is wrong with one is said before any is measured
        except (ModelError, ValueError) as error:
            parser.error(str(error))
        while studies:
            study = studies.pop(0)  # so that what it computes goes with it
            table = study.table()
            if folder and processes.is_first():
                run.records.drop_old()
                _draw(run, study, table)
            print(f"batch {study.batch_size}, {study.prompt_tokens} prompt tokens")
            shown = table.dropna(axis=1, how="all").T  # what nothing here has, such as a step's parts without a GPU
            print(shown.to_string(float_format=lambda value: f"{value:.4g}", na_rep="-"))
            print_claims(claims(table, study.ratios_model, study.prompt_tokens))
    return 0


_SIZES = ("batch_size", "prompt_tokens")


def _draw(run: Run, study: EndToEndStudy, table: pd.DataFrame) -> None:
    """Latency, memory and step of one batch size and prompt, beside the paper's where it shows this model."""
    if table.get("total_s", pd.Series(dtype=float)).isna().all():
        return
    published, model = study.published(), study.loaded.name
    size = f"batch {study.batch_size}, {study.prompt_tokens} prompt tokens, {study.weights} weights"
    with plt.rc_context({"figure.constrained_layout.use": True}):
        drawn = {
            "latency": (plot_latency(table, model, published), f"Time by method and output length, {size}"),
            "step": (plot_step(table, model), f"A decode step by method, {size}"),
            "memory": (
                plot_memory(table, model, published),
                f"Weights and KV cache by method, {study.output_tokens[-1]} output tokens, {size}. {published_note(published)}",
            ),
        }
    for kind, (figure, caption) in drawn.items():
        if figure:
            name = f"{kind}-batch-{study.batch_size}-prompt-{study.prompt_tokens}"
            run.figure(figure, name, caption=caption.rstrip())
            plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
