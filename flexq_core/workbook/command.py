"""A study's command: where its records go, what it prints, and how it ends."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from flexq_core.workbook import paths
from flexq_core.workbook.machine import card_label, provenance
from flexq_core.workbook.records import RecordError

_VERDICT = {True: "holds", False: "FAILS", None: "cannot tell"}


def outputs_of(folder: str, device: str) -> Path:
    """An outputs folder, relative to the repository; `{card}` in it stands for the device's short name.

    Raises ValueError for `{card}` on a processor.
    """
    if "{card}" in folder:
        if not device.startswith("cuda"):
            raise ValueError(
                f"{folder} is named after a GPU, and torch finds none here: give --outputs a folder's name, or run it on a "
                "machine with a GPU"
            )
        folder = folder.replace("{card}", card_label(provenance(device)["device"]))
    return paths.ROOT / folder


def writable_outputs(folder: str, device: str) -> Path:
    """As `outputs_of`, with the folder made: what cannot be kept is said before anything is measured, as a ValueError."""
    outputs = outputs_of(folder, device)
    records = outputs / "records"
    try:
        records.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=records).close()
    except OSError as error:
        raise ValueError(f"--outputs {folder} cannot be written: {error.strerror or error}") from error
    return outputs


def exit_status(measure: Callable[[], int]) -> int:
    """What `measure` returns; 1 where a record cannot be kept and 130 after an interruption, with a line that says so."""
    try:
        return measure()
    except RecordError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; with --outputs the same command goes on from what is on record", file=sys.stderr)
        return 130


def print_claims(claims: Iterable[tuple[str, bool | None, str]]) -> None:
    """Print what a study claims, as (claim, whether it holds, the numbers): a command records no claims."""
    for text, holds, detail in claims:
        print(f"{_VERDICT[holds]:<12}{text} ({detail})")
