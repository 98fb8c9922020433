"""Records: every figure the workbook shows, as JSON Lines, computed once for the same inputs.

A record is {study, model, method, metric, value, unit, parameters, seed, status, reason, key, git_commit, dirty,
versions, device, driver, time}. Its key is the digest of what decides its value: study, model, method, parameters, seed, the
code that computes (source_digest.py), and the releases of torch, transformers and the driver that ran it. A change of any of
them computes anew.

The file is replaced as a whole (temporary file, fsync, rename) under a lock, so that a run killed at any moment leaves
either the old records or the new ones.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from flexq_core.workbook import paths
from flexq_core.workbook.machine import provenance
from flexq_core.workbook.source_digest import source_digest


class Measurement(NamedTuple):
    """A value, its unit (`1` for plain numbers) and what there is to say about it; no value means skipped."""

    value: float | None
    unit: str
    note: str = ""


class Skipped(Exception):  # noqa: N818 - a state of a study, not an error
    """Raised by a computation that this machine cannot do; the message says what it lacks."""


class RecordError(RuntimeError):
    """Records that cannot be written or read; the message says what to do next."""


@dataclass(frozen=True)
class Record:
    """One figure with everything that tells where it came from. value is None where status is `skipped`."""

    study: str
    model: str
    method: str
    metric: str
    value: float | None
    unit: str
    parameters: dict[str, Any]
    seed: int
    status: str
    reason: str
    key: str
    git_commit: str | None
    dirty: bool | None
    versions: dict[str, str]
    device: str
    driver: str | None
    time: str

    @functools.cached_property
    def line(self) -> str:
        """As JSON, made once: a study of a thousand cases writes the first one's records a thousand times."""
        return json.dumps({name: getattr(self, name) for name in self.__dataclass_fields__}, sort_keys=True)


@dataclass
class Records:
    """The records of one study in one folder.

    study: the notebook's name.  folder: the outputs folder.  device: `cpu` or `cuda`.
    """

    study: str
    folder: Path
    device: str = "cpu"
    _seen: set[str] = field(default_factory=set, repr=False)

    @property
    def path(self) -> Path:
        return self.folder / "records" / f"{self.study}.jsonl"

    def once(
        self,
        *,
        model: str,
        method: str,
        parameters: Mapping[str, Any],
        seed: int,
        compute: Callable[[], Mapping[str, Measurement]],
    ) -> dict[str, Record]:
        """The records of one computation, metric → record: those on file for the same inputs, else computed and written.

        A computation that raises `Skipped` is recorded as skipped, under the metric `skipped`, and tried again next time.
        Raises RecordError for a value that is not a finite number, or a folder that cannot be written.
        """
        facts = self._facts(model, method, parameters, seed)
        key = facts["key"]
        found = [record for record in read_jsonl(self.path) if record.key == key and record.status == "ok"]
        if found:
            return {record.metric: record for record in found}
        try:
            measured = compute()
        except Skipped as skipped:
            measured = {"skipped": Measurement(None, "", str(skipped))}
        return self._measured(facts, measured)

    def replace(
        self,
        *,
        model: str,
        method: str,
        parameters: Mapping[str, Any],
        seed: int,
        measured: Mapping[str, Measurement],
    ) -> dict[str, Record]:
        """Write measurements in place of those on file for the same inputs (a run's claims, told anew each time)."""
        return self._measured(self._facts(model, method, parameters, seed), measured)

    def current(self) -> list[Record]:
        """The records that this run computed or found, in the order of the file."""
        return [record for record in read_jsonl(self.path) if record.key in self._seen]

    def drop_old(self) -> None:
        """Drop what this source would compute anew, from the file."""
        with self._file():
            write_jsonl(self.path, current(read_jsonl(self.path)))

    def _facts(self, model: str, method: str, parameters: Mapping[str, Any], seed: int) -> dict[str, Any]:
        inputs = {"study": self.study, "model": model, "method": method, "parameters": dict(parameters), "seed": seed}
        facts = inputs | provenance(self.device)
        key = _key(facts, source_digest(self.study, _card(facts)))
        self._seen.add(key)
        return facts | {"key": key}

    def _measured(self, facts: dict[str, Any], measured: Mapping[str, Measurement]) -> dict[str, Record]:
        fresh = [
            Record(
                **facts,
                metric=metric,
                value=_finite(metric, value),
                unit=unit,
                status="skipped" if value is None else "ok",
                reason=note,
            )
            for metric, (value, unit, note) in measured.items()
        ]
        self._write(facts["key"], fresh)
        return {record.metric: record for record in fresh}

    def _write(self, key: str, fresh: list[Record]) -> None:
        with self._file():
            kept = [record for record in read_jsonl(self.path) if record.key != key]
            write_jsonl(self.path, kept + fresh)

    @contextmanager
    def _file(self) -> Iterator[None]:
        """Hold the file while it is replaced; RecordError where it cannot be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path.with_suffix(".lock")):
                yield
        except OSError as error:
            raise RecordError(
                f"cannot write {self.path}: {error.strerror or error}. Records written before are intact; free space or "
                "choose a folder that can be written (FLEXQ_OUTPUTS, or a command's --outputs), and run again: finished work is "
                "not repeated"
            ) from error


def current(records: Iterable[Record]) -> list[Record]:
    """Those that this source would compute where they were computed: nothing that decides their values has changed since."""
    source = functools.cache(source_digest)  # to read it all takes longer than a record

    def key(record: Record) -> str:
        facts = {name: getattr(record, name) for name in _DECIDING}
        return _key(facts, source(record.study, _card(facts)))

    return [record for record in records if record.key == key(record)]


_INPUTS = ("study", "model", "method", "parameters", "seed")
_DECIDING = (*_INPUTS, "device", "driver", "versions")
_LIBRARIES = ("torch", "transformers")


def _key(facts: Mapping[str, Any], source: str) -> str:
    """Of a record's facts, _DECIDING among them, and the source's digest; where the machine counts, parameters name it."""
    releases = {"driver": facts["driver"]} | {name: facts["versions"].get(name) for name in _LIBRARIES}
    try:
        canonical = json.dumps(
            {name: facts[name] for name in _INPUTS} | {"releases": releases, "source": source},
            sort_keys=True,
            allow_nan=False,
        )
    except (TypeError, ValueError) as error:
        raise RecordError(f"parameters must be plain finite JSON values: {error}") from error
    return hashlib.sha256(canonical.encode()).hexdigest()


def _card(facts: Mapping[str, Any]) -> str:
    """The name of the GPU that a record is of, empty for a processor."""
    return facts["device"] if facts["driver"] else ""


_parsed: dict[Path, tuple[tuple[int, ...], list[Record]]] = {}
"""File → what tells its state, and its records: a study asks after every computation, and parsing thousands takes as long."""


def _state(path: Path) -> tuple[int, ...]:
    facts = path.stat()
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


def read_jsonl(path: Path) -> list[Record]:
    """Records of one file, none if it is absent; RecordError names the first line that is not a record."""
    try:
        state = _state(path)
        if _parsed.get(path, ((),))[0] == state:
            return list(_parsed[path][1])
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(Record(**json.loads(line)))
        except (TypeError, ValueError) as error:  # not JSON, not text, or not these fields
            raise RecordError(
                f"{path}, line {number} is not a record ({error}); move the file away to start anew"
            ) from None
    _parsed[path] = state, list(records)
    return records


def write_jsonl(path: Path, records: Iterable[Record]) -> None:
    """Write records in place of a file's, whole or not at all."""
    records = list(records)
    write_atomically(path, "".join(record.line + "\n" for record in records))
    _parsed[path] = _state(path), records


def load_records(folder: Path | None = None) -> pd.DataFrame:
    """All records of an outputs folder, one row each; empty where there are none."""
    folder = folder or paths.outputs()
    rows = [asdict(record) for path in sorted((folder / "records").glob("*.jsonl")) for record in read_jsonl(path)]
    return pd.DataFrame(rows, columns=list(Record.__dataclass_fields__))


def load_reference() -> pd.DataFrame:
    """The records that the repository keeps of named machines; empty where it keeps none."""
    tables = [table for folder in sorted(paths.REFERENCE.glob("*/")) if len(table := load_records(folder))]
    return pd.concat(tables, ignore_index=True) if tables else load_records(paths.REFERENCE)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _finite(metric: str, value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise RecordError(f"{metric} came out as {value}: not a figure that can be recorded")
    return value if value is None or isinstance(value, int) else float(value)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an advisory lock; the kernel releases it when a process dies, so that a killed run leaves none behind."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
