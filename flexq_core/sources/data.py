"""Texts to score and to calibrate on, and their windows.

pydoc       documentation of the Python language (`pydoc_data.topics`): on every machine, for the demo models
wikitext2   WikiText-2 raw, test split joined with blank lines, as the paper scores it
c4          C4, a validation shard
ptb         Penn Treebank
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from flexq_core.sources import demo
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
    "ptb": HubText("ptb-text-only/ptb_text_only", "penn_treebank", "sentence", "test", "train"),
}
DATASETS = ("pydoc", *HUB_TEXTS)
DEFAULT_WINDOWS = {"c4": 256, "pydoc": 128}
"""Windows scored unless told: the paper's 256 for C4, half of the demo text to save time, all of the others."""


def default_dataset(is_demo: bool) -> str:
    """The text a model is scored on unless told: demo models were trained on documentation, real ones on the web."""
    return "pydoc" if is_demo else "wikitext2"


def evaluation_text(dataset: str) -> Text:
    """The held-out text of `dataset`; DataError for an unknown one, or one that cannot be had."""
    return _text(dataset, demo.held_out_text, "score")


def calibration_text(dataset: str) -> Text:
    """Text of the same kind that shares nothing with `evaluation_text`; DataError likewise."""
    return _text(dataset, demo.calibration_text, "calibrate")


def _text(dataset: str, embedded: Callable[[], Text], use: str) -> Text:
    if dataset == "pydoc":
        return embedded()
    if dataset in HUB_TEXTS:
        return _hub_text(dataset, getattr(HUB_TEXTS[dataset], use))
    nearest = get_close_matches(dataset, DATASETS, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise DataError(f"no dataset is called {dataset!r}.{hint} Accepted: {', '.join(DATASETS)}")


def _hub_text(name: str, split: str) -> Text:
    import datasets

    hub = HUB_TEXTS[name]
    try:
        files = {split: hub.files[split]} if hub.files else None
        rows = datasets.load_dataset(hub.dataset, hub.configuration, split=split, data_files=files)
    except Exception as error:  # datasets raises many kinds for "cannot be reached"
        raise DataError(
            f"cannot load {name!r} ({hub.dataset}) from the hub: {type(error).__name__}: {error}. Connect once so that it is "
            "cached, or use dataset=pydoc, which needs no network"
        ) from error
    column = rows[hub.column] if hub.rows is None else rows[: hub.rows][hub.column]
    return Text.of(name, "\n\n".join(column), origin=f"{hub.dataset} {hub.configuration or ''} {split}".strip())


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
