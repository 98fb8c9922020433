"""Datasets in a local folder, found by name: for machines without network."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FORMATS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".json": "json",
    ".jsonl": "json",
    ".json.gz": "json",
    ".txt": "text",
}
"""How a file's name ends → the `datasets` builder that reads it."""


class LocalDataError(ValueError):
    """A folder that lacks what was asked for; the message says which files would do."""


def dataset_files(folder: str | Path, name: str) -> list[Path]:
    """The files of a dataset in a folder, of whatever split: those whose path below it contains the name, as for `find_split`.

    Raises LocalDataError where the folder is absent.
    """
    folder = _existing(folder)
    return [path for path in _readable(folder) if _plain(name) in _plain(str(path.relative_to(folder)))]


def find_split(
    folder: str | Path, name: str, splits: Iterable[str], *, configuration: str = ""
) -> tuple[list[Path], str]:
    """The files of a dataset in a folder, and which of `splits`, in order of preference, they are.

    name, splits: letters and digits that the path below the folder must contain; case and punctuation do not count, so that
    `ARC-Easy/test-00000-of-00001.parquet` is arc_easy's test split.  configuration: which of a dataset's is meant where files
    of several are there, as in a clone from the hub.
    Raises LocalDataError where the folder is absent, no file of `FORMATS` fits, or those that fit lie in several folders.
    """
    folder, mine = _existing(folder), dataset_files(folder, name)
    for split in splits:
        of_split = [path for path in mine if _plain(split) in _plain(str(path.relative_to(folder)))]
        kinds = {_builder(path) for path in of_split}
        if of_split:  # one format: the same rows may lie there in several
            kind = next(kind for kind in FORMATS.values() if kind in kinds)
            return _of_one_folder(folder, [path for path in of_split if _builder(path) == kind], configuration), split
    wanted = " or ".join(f"{name}_{split}" for split in dict.fromkeys(splits))
    files = _readable(folder)
    found = ", ".join(str(path.relative_to(folder)) for path in files[:8]) or "no such file"
    raise LocalDataError(
        f"{str(folder)!r} has no data of {name!r}; accepted: a file named like {wanted} that ends in "
        f"{', '.join(FORMATS)}; found: {found}{', …' if len(files) > 8 else ''}"
    )


def sha256(files: Iterable[Path]) -> str:
    """What identifies the contents of files in this order."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _existing(folder: str | Path) -> Path:
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise LocalDataError(f"data_dir is {str(folder)!r}; accepted: a folder that exists, or '' for the hub")
    return folder


def _readable(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and _builder(path)]


def _of_one_folder(folder: Path, files: list[Path], configuration: str) -> list[Path]:
    if len({path.parent for path in files}) == 1:
        return files
    meant = [
        path for path in files if configuration and _plain(configuration) in map(_plain, path.relative_to(folder).parts)
    ]
    if len({path.parent for path in meant}) == 1:
        return meant
    places = ", ".join(sorted({str(path.parent.relative_to(folder)) for path in files}))
    raise LocalDataError(
        f"{str(folder)!r} has files that fit in several folders: {places}; accepted: one of them"
        + (f", or one called {configuration}" if configuration else "")
    )


def builder_arguments(files: list[Path], split: str) -> dict[str, Any]:
    """`path` and `data_files` for `datasets.load_dataset` that read these files as `split`."""
    return {"path": _builder(files[0]), "data_files": {split: [str(path.resolve()) for path in files]}}


def _builder(path: Path) -> str | None:
    return next((builder for suffix, builder in FORMATS.items() if path.name.endswith(suffix)), None)


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())
