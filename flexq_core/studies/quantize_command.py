"""`python -m flexq_core quantize`: a model's name → its 6-bit checkpoint on disk."""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from flexq_core.quant.plan import RULES, SENSITIVE_LAYERS
from flexq_core.quant.spec import TEXTLESS_SCALES
from flexq_core.runtime.convert import plan_or_rule
from flexq_core.runtime.quantize_files import Written, quantize_files, require_free
from flexq_core.sources.models import ModelError, model_folder
from flexq_core.workbook.arguments import folder, given

_REFUSALS = (ModelError, OSError, ValueError)
"""What ends in one line of cause and next step; a CheckpointError and a PlanError are ValueErrors."""


def main(arguments: list[str] | None = None) -> int:
    """Quantise a model's files; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        plan = plan_or_rule(options.plan)
        require_free(options.out.absolute())  # a model may be long in coming
        written = quantize_files(
            model_folder(options.model),
            options.out,
            plan,
            scales=options.scales,
            name=Path(options.model).name if Path(options.model).is_dir() else options.model,
            progress=True,
        )
    except _REFUSALS as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        partial = Path(f"{options.out}.partial")
        goes_on = f"goes on where this one stopped ({partial})"
        told = goes_on if partial.is_dir() else "begins anew: no file was finished"
        print(f"\ninterrupted: the same command {told}", file=sys.stderr)
        return 130
    _describe(written)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flexq_core quantize",
        description="Write a model's 6-bit checkpoint. Files are read one tensor at a time; a run that was stopped goes on.",
    )
    parser.add_argument(
        "model", type=given, help="a demo model, a paper model such as llama-2-7b, a hub id or a local folder"
    )
    parser.add_argument("out", type=folder, help="the folder to write; absent or empty")
    parser.add_argument("--plan", default="flexq", help=f"{', '.join(RULES)}, or a plan file *.json (default: flexq)")
    parser.add_argument(
        "--scales",
        choices=TEXTLESS_SCALES,
        default="absmax",
        help="of weights: mse has the least squared error (default: absmax)",
    )
    return parser


def _describe(written: Written) -> None:
    if written.plan.name == "flexq" and all(bits.activation_bits == 6 for bits in written.plan.layers.values()):
        print(
            f"plan       flexq has 8-bit activations in layers called {' or '.join(SENSITIVE_LAYERS)}, and this model has "
            "none: all are 6-bit; --plan takes a file that names others"
        )
    worst = min(written.sqnr_db, key=written.sqnr_db.__getitem__)
    if written.left_out:
        print(f"left out   {len(written.left_out)} tensors that the model does not use, first {written.left_out[0]}")
    print(
        f"weights    {written.original_bytes / 2**20:.1f} MiB are now {written.layer_bytes / 2**20:.1f} MiB, scales included\n"
        f"SQNR       {statistics.median(written.sqnr_db.values()):.1f} dB in the median, "
        f"{written.sqnr_db[worst]:.1f} dB in {worst}\n"
        f"load       flexq_core.load({str(written.folder)!r})"
    )
