"""Which of the paper's texts and tasks a folder has files of."""

from __future__ import annotations

from flexq_core.sources import local
from flexq_core.sources.data import HUB_TEXTS
from flexq_core.sources.tasks import PAPER_TASKS


def held_by(data_dir: str) -> list[str]:
    """Their names, in the paper's order; none where there is no such folder. No file is opened."""
    try:
        return [name for name in (*HUB_TEXTS, *PAPER_TASKS) if data_dir and local.dataset_files(data_dir, name)]
    except local.LocalDataError:
        return []
