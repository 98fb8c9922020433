"""What 01 and 02 begin with: a model, the windows of a text that it is scored on, and a text of that kind to calibrate on."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from flexq_core.sources import data
from flexq_core.sources.demo import DEMO_MODELS
from flexq_core.sources.models import LoadedModel, load_model
from flexq_core.sources.outliers import inject_outliers, require_strength
from flexq_core.studies.parameters import require_at_least

if TYPE_CHECKING:
    from flexq_core.workbook.run import Run


class ScoredModel:
    """A model and its text, with what decides both as parameters of records.

    run: the workbook run whose records are used.  model, dataset, data_dir, windows, window_length, calibration_windows,
    outliers, batch_size, seed: as the notebooks' parameters say.  blocks_on_disk: see `load_model`.
    Raises ValueError (or its kin ModelError, DataError) naming what is accepted. Parameters are checked before anything is
    loaded; the model's files, the text and its windows afterwards.
    """

    def __init__(
        self,
        run: Run,
        *,
        model: str,
        dataset: str,
        data_dir: str,
        windows: int,
        window_length: int,
        calibration_windows: int,
        outliers: float,
        batch_size: int,
        seed: int,
        blocks_on_disk: bool = False,
    ) -> None:
        require_at_least(0, windows=windows, window_length=window_length, seed=seed)
        require_at_least(1, batch_size=batch_size, calibration_windows=calibration_windows)
        require_strength(outliers)
        self.run = run
        self.dataset = data.default_dataset(model in DEMO_MODELS) if dataset == "auto" else dataset
        self.data_dir = data_dir
        data.require_text(self.dataset, data_dir)
        self.loaded: LoadedModel = load_model(model, device=run.device, blocks_on_disk=blocks_on_disk)
        self.outliers, self.batch_size, self.seed = outliers, batch_size, seed
        self.window_length = window_length or min(2048, self.loaded.context_length)
        self.calibration_windows = calibration_windows
        self.text = data.evaluation_text(self.dataset, data_dir)
        ids = data.token_ids(self.loaded.tokenizer, self.text)
        self.characters_per_token = len(self.text.text) / len(ids)
        self.rows = data.windows(ids, self.window_length, windows or data.DEFAULT_WINDOWS.get(self.dataset, 0))

    @cached_property
    def model(self) -> nn.Module:
        """The model as it is scored: with the outliers that were asked for."""
        return inject_outliers(self.loaded.model, self.outliers, seed=self.seed) if self.outliers else self.loaded.model

    @cached_property
    def calibration_text(self) -> data.Text:
        """A text of the scored one's kind that shares nothing with it."""
        return data.calibration_text(self.dataset, self.data_dir)

    @cached_property
    def calibration(self) -> Tensor:
        """[W, T] token ids of the calibration text."""
        ids = data.token_ids(self.loaded.tokenizer, self.calibration_text)
        return data.windows(ids, self.window_length, self.calibration_windows)

    @property
    def model_inputs(self) -> dict[str, Any]:
        """What decides the model's numbers, as a record's parameters."""
        return {**self.loaded.inputs, "outliers": self.outliers}

    @property
    def text_inputs(self) -> dict[str, Any]:
        """What decides what is scored, likewise."""
        return {
            "dataset": self.dataset,
            "text_sha256": self.text.sha256,
            "windows": len(self.rows),
            "window_length": self.window_length,
        } | ({"tokenised": True} if data.is_tokenised(self.text) else {})

    @property
    def calibration_inputs(self) -> dict[str, Any]:
        """What decides what is calibrated on, likewise."""
        return {
            "calibration": self.dataset,
            "calibration_sha256": self.calibration_text.sha256,
            "calibration_windows": self.calibration_windows,
            "calibration_window_length": self.window_length,
        }
