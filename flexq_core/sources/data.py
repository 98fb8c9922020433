"""Texts to score and to calibrate on, and their windows.

pydoc       documentation of the Python language (`pydoc_data.topics`): on every machine, for the demo models
wikitext2   WikiText-2 raw, test split joined with blank lines, as the paper scores it
c4          C4, a validation shard
ptb         Penn Treebank
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexq_core.sources import demo, local
from flexq_core.sources.text import Text


class DataError(RuntimeError):
    """A text that is unknown or cannot be had; the message says what to do next."""


@dataclass(frozen=True)
class HubText:
    """Where the hub keeps a text: dataset, configuration, the splits to score and to calibrate on, and its column."""

    dataset: str
    configuration: str | None
    column: str
    score: str
    calibrate: str
    files: dict[str, str] | None = None
    rows: int | None = None
    revision: str | None = None

    @property
    def scored(self) -> tuple[str, ...]:
        """Splits of a folder that are scored, the best first."""
        return (self.score, "test", "validation")


HUB_TEXTS = {
    "wikitext2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "text", "test", "train"),
    "c4": HubText(
        "allenai/c4",
        None,
        "text",
        "validation",
        "train",
        files={
            "validation": "en/c4-validation.00000-of-00008.json.gz",
            "train": "en/c4-train.00000-of-01024.json.gz",
        },
        rows=4000,
    ),
    "ptb": HubText(
        "ptb-text-only/ptb_text_only",
        None,
        "sentence",
        "test",
        "train",
        files={split: f"penn_treebank/{split}/0000.parquet" for split in ("test", "train")},
        revision="refs/convert/parquet",  # its own files are a program, which no release of datasets runs any more
    ),
}
_TOKENISED = "<unk>"
"""Rare words of WikiText-2's other release."""
DATASETS = ("pydoc", *HUB_TEXTS)
DEFAULT_WINDOWS = {"c4": 256, "pydoc": 128}
"""Windows scored unless told: the paper's 256 for C4, half of the demo text to save time, all of the others."""


def default_dataset(is_demo: bool) -> str:
    """The text a model is scored on unless told: demo models were trained on documentation, real ones on the web."""
    return "pydoc" if is_demo else "wikitext2"


def evaluation_text(dataset: str, data_dir: str = "") -> Text:
    """The held-out text of `dataset`, from the hub or from files in `data_dir` (see sources/local.py).

    Raises DataError for an unknown dataset, or one that cannot be had.
    """
    if dataset == "pydoc":
        return demo.held_out_text()
    hub = _require_known(dataset)
    if data_dir:
        return _local_text(dataset, *_local_files(dataset, data_dir, hub.scored))
    return _hub_text(dataset, hub.score)


def calibration_text(dataset: str, data_dir: str = "") -> Text:
    """Text of the same kind that shares nothing with `evaluation_text`; DataError likewise.

    A folder that has only the scored split leaves docstrings to calibrate on; the text's origin says so.
    """
    if dataset == "pydoc":
        return demo.calibration_text()
    hub = _require_known(dataset)
    if not data_dir:
        return _hub_text(dataset, hub.calibrate)
    files, split = _local_files(dataset, data_dir, (hub.calibrate, *hub.scored))
    return _local_text(dataset, files, split) if split == hub.calibrate else demo.calibration_text()


def require_text(dataset: str, data_dir: str = "") -> None:
    """Raise DataError for a dataset that is unknown, or that a folder lacks; nothing is read."""
    if dataset == "pydoc":
        return
    hub = _require_known(dataset)
    if data_dir:
        _local_files(dataset, data_dir, hub.scored)


def _require_known(dataset: str) -> HubText:
    if dataset not in HUB_TEXTS:
        nearest = get_close_matches(dataset, DATASETS, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise DataError(f"no dataset is called {dataset!r}.{hint} Accepted: {', '.join(DATASETS)}")
    return HUB_TEXTS[dataset]


def _hub_text(name: str, split: str) -> Text:
    hub = HUB_TEXTS[name]
    files = {split: hub.files[split]} if hub.files else None
    rows = _load(
        {"path": hub.dataset, "name": hub.configuration, "data_files": files, "revision": hub.revision},
        split,
        f"cannot load {name!r} ({hub.dataset}) from the hub",
        "Connect once so that it is cached, give a folder that has it as data_dir, or use dataset=pydoc, which needs no network",
    )
    return _joined(name, rows, hub, f"{hub.dataset} {hub.configuration or ''} {split}".strip())


def _local_files(name: str, folder: str, splits: tuple[str, ...]) -> tuple[list[Path], str]:
    try:
        return local.find_split(folder, name, splits, configuration=HUB_TEXTS[name].configuration or "")
    except local.LocalDataError as error:
        raise DataError(str(error)) from error


def _local_text(name: str, files: list[Path], split: str) -> Text:
    origin = f"{', '.join(path.name for path in files)} ({split})"
    if files[0].suffix == ".txt":  # running text, not a row a line
        try:
            text = "\n\n".join(path.read_text(encoding="utf-8") for path in files)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {origin} in {str(files[0].parent)!r}: {error}") from error
        found = Text.of(name, text, origin=origin)
    else:
        rows = _load(
            local.builder_arguments(files, split),
            split,
            f"cannot read {origin} in {str(files[0].parent)!r}",
            "It may be truncated: fetch it again",
        )
        found = _joined(name, rows, HUB_TEXTS[name], origin)
    if is_tokenised(found):
        return replace(found, origin=f"{origin}; tokenised, so that perplexities are not those of the paper's raw text")
    return found


def is_tokenised(text: Text) -> bool:
    """Whether it is WikiText-2's other release, whose perplexities are not those of the paper's raw text."""
    return text.name == "wikitext2" and _TOKENISED in text.text


def _load(arguments: dict[str, Any], split: str, what: str, step: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(split=split, **arguments)
    except Exception as error:  # datasets raises many kinds for "cannot be reached" and "cannot be read"
        raise DataError(f"{what}: {type(error).__name__}: {str(error).splitlines()[0]}. {step}") from error


def _joined(name: str, rows: Any, hub: HubText, origin: str) -> Text:
    column = hub.column if hub.column in rows.column_names else "text"
    if column not in rows.column_names:
        raise DataError(f"{origin} has no column {hub.column!r}; its columns: {', '.join(rows.column_names)}")
    texts = rows[column] if hub.rows is None else rows[: hub.rows][column]
    return Text.of(name, "\n\n".join(texts), origin=origin)


def token_ids(tokenizer: Any, text: Text) -> Tensor:
    """The whole text as one row of token ids: [T] int64."""
    return torch.tensor(tokenizer(text.text, verbose=False).input_ids, dtype=torch.long)


def windows(ids: Tensor, length: int, count: int = 0) -> Tensor:
    """Consecutive windows without overlap: [W, length] int64; the rest of the text is dropped, as in the paper.

    ids: [T] int64.  length: tokens a window, at least 2.  count: keep this many windows, evenly spread over the
    text; 0 keeps all.
    Raises ValueError for a length or count out of range, or a text shorter than one window.
    """
    if length < 2:
        raise ValueError(f"window length is {length}; accepted: at least 2")
    if count < 0:
        raise ValueError(f"windows is {count}; accepted: 0 (all) or more")
    available = len(ids) // length
    if available == 0:
        raise ValueError(f"the text has {len(ids)} tokens: less than one window of {length}")
    rows = ids[: available * length].view(available, length)
    if count == 0 or count >= available:
        return rows
    return rows[torch.arange(count) * available // count]
