"""The command line; see `--help`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from flexq_core.runtime import ops
from flexq_core.studies.e2e import ATTENTIONS, METHODS, WEIGHTS, EndToEndStudy, claims, plot_step, processes
from flexq_core.studies.e2e.decode import COMPILE_MODES
from flexq_core.studies.e2e.parallel import ParallelStudy
from flexq_core.workbook.machine import outputs_of
from flexq_core.workbook.records import Records, current, read_jsonl, write_jsonl
from flexq_core.workbook.run import Run, print_claims

STUDY = "04_e2e"


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; returns the process's exit status. torchrun calls it once a process: see parallel.py."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with processes.joined(device):
        return _measure(arguments, device)


def _measure(arguments: list[str] | None, device: str) -> int:
    description = "End to end: time to first token, time per output token and memory by method."
    parser = argparse.ArgumentParser(prog="python -m flexq_core.studies.e2e", description=description)
    parser.add_argument("--model", default="demo-llama", help="a name, a hub id or a folder (default: demo-llama)")
    parser.add_argument("--weights", choices=WEIGHTS, default=WEIGHTS[0], help="(default: pretrained)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="(default: all)")
    parser.add_argument("--backend", choices=ops.BACKENDS, default="auto", help="FlexQ's (default: auto)")
    parser.add_argument("--plan", default="", metavar="FILE", help="a plan file to time as well")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="(default: 128)")
    parser.add_argument("--output-tokens", type=int, nargs="+", default=[128], help="lengths (default: 128)")
    parser.add_argument("--batch-size", type=int, default=1, help="(default: 1)")
    parser.add_argument("--layers", type=int, default=0, help="with random weights: this many blocks (default: all)")
    parser.add_argument("--compile-mode", choices=COMPILE_MODES, default=COMPILE_MODES[-1], help="a GPU's decode step")
    parser.add_argument("--attention", choices=ATTENTIONS, default=ATTENTIONS[0], help="(default: sdpa)")
    parser.add_argument("--repeats", type=int, default=3, help="timed decodes (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument(
        "--outputs",
        metavar="FOLDER",
        help="keep records in FOLDER/records and a figure of the step, and measure none again; {card} is the GPU's short name "
        "(default: none)",
    )
    options = vars(parser.parse_args(arguments))
    folder = options.pop("outputs")
    options["methods"] = ",".join(options["methods"])
    options["output_tokens"] = ",".join(map(str, options["output_tokens"]))
    alone = processes.count() == 1
    try:
        kept = outputs_of(folder, device) if folder else None
    except ValueError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as temporary:
        place = kept or Path(temporary)
        records = (Records if alone else processes.SharedRecords)(STUDY, place, device)
        run = Run(STUDY, options, device, place, records)
        try:
            study = (EndToEndStudy if alone else ParallelStudy)(run, **options)
        except ValueError as error:
            parser.error(str(error))
        table = study.table()
        if folder and processes.is_first():
            path = run.records.path
            write_jsonl(path, current(read_jsonl(path)))
            if step := plot_step(table, study.loaded.name):
                run.figure(
                    step, "step", caption=f"A decode step by method, {study.loaded.name}, batch {study.batch_size}"
                )
    print(table.T.to_string(float_format=lambda value: f"{value:.4g}"))
    print_claims(claims(table, study.ratios_model))
    return 0


if __name__ == "__main__":
    sys.exit(main())
