"""`python -m flexq_core verify`: whether a 6-bit checkpoint is what was saved, to the last bit."""

from __future__ import annotations

import argparse
import sys
import warnings

from flexq_core.runtime.checkpoint import UncheckedTensors, verify
from flexq_core.workbook.arguments import folder


def main(arguments: list[str] | None = None) -> int:
    """Read a checkpoint's tensors against their checksums; returns the exit status."""
    place = _parser().parse_args(arguments).folder
    files = list(place.glob("*.safetensors"))
    if files:
        size = sum(file.stat().st_size for file in files)
        print(f"reading {size / 2**20:,.1f} MiB in {len(files)} file{'s' * (len(files) > 1)}", flush=True)
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            verify(place)
    except (OSError, ValueError) as error:  # a CheckpointError and a PlanError are ValueErrors
        print(error, file=sys.stderr)
        return 1
    unchecked = [str(warning.message) for warning in told if warning.category is UncheckedTensors]
    for message in unchecked:
        print(message, file=sys.stderr)
    print(f"{place}: all tensors {'that have a checksum ' * bool(unchecked)}are as they were saved")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flexq_core verify",
        description="Read every tensor of a 6-bit checkpoint against its checksum, as flexq_core.load does before it loads one.",
    )
    parser.add_argument("folder", type=folder, help="written by `python -m flexq_core quantize` or by save_pretrained")
    return parser
