"""Accuracy by quantisation method: perplexity and zero-shot tasks (FlexQ §4.2, tables 1 to 3).

The module that is scored here is the module that is timed and saved. Every figure is a record, computed once.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from flexq_core.quant.layers import decoder_blocks, linear_layers, linears_of_block
from flexq_core.quant.plan import RULES
from flexq_core.quant.spec import SCALES
from flexq_core.runtime.calibration import input_moments
from flexq_core.runtime.convert import (
    linear_weight_bytes,
    quantizer,
    read_plan,
    replace_in_block_in_place,
    replace_linear_layers,
    resolve_plan,
)
from flexq_core.runtime.fuse import fuse_
from flexq_core.runtime.streaming import hidden_state_bytes, logits_block_by_block
from flexq_core.sources import tasks as zero_shot
from flexq_core.sources.models import locate_model
from flexq_core.studies import accuracy_agreement, accuracy_scales, baselines
from flexq_core.studies.parameters import names, require_at_least, resolved_backends
from flexq_core.studies.scored_model import ScoredModel
from flexq_core.workbook import figures
from flexq_core.workbook.machine import provenance
from flexq_core.workbook.records import Measurement, Skipped

if TYPE_CHECKING:
    from flexq_core.workbook.run import Run

UNQUANTISED = "fp16"
CALIBRATION_WINDOWS = 16

_BASELINES: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "rtn-w6a6": lambda model, _: baselines.round_to_nearest(model, weight_bits=6, activation_bits=6),
    "smoothquant-w8a8": lambda model, text: baselines.smooth_quant(model, text, weight_bits=8, activation_bits=8),
    "smoothquant-w6a6": lambda model, text: baselines.smooth_quant(model, text, weight_bits=6, activation_bits=6),
}
WHOLE_MODEL = tuple(method for method in _BASELINES if method.startswith("smoothquant"))
"""Methods that rescale norms by what a calibration text gives them and therefore want the whole model in memory."""
METHODS = (UNQUANTISED, *_BASELINES, *RULES)
"""`fp16` is the model as it is, in float32 on a CPU. `w6a6`, `w6a8` and `flexq` are plans with groups of 128."""

TITLES = {
    "fp16": "FP16",
    "fp32": "FP32",
    "rtn-w6a6": "RTN W6A6, per token",
    "smoothquant-w8a8": "SmoothQuant W8A8",
    "smoothquant-w6a6": "SmoothQuant W6A6",
    "w6a6": "W6A6, groups",
    "flexq": "FlexQ (W6A6, A8 where sensitive)",
    "w6a8": "W6A8, groups",
}


BLOCKS = 16
"""Parts into which a scored text is cut, to tell a difference between two methods from chance."""


@dataclass(frozen=True)
class Perplexity:
    """Summed negative log-likelihood in nats over `tokens` scored tokens.

    block_nats: the same a token in each of up to BLOCKS consecutive parts of the text.
    """

    nll_nats: float
    tokens: int
    block_nats: tuple[float, ...]

    @property
    def value(self) -> float:
        return math.exp(self.nll_nats / self.tokens)

    def measurements(self) -> dict[str, Measurement]:
        """As records: perplexity, and loss_nats/<block> for every block."""
        blocks = {f"{BLOCK_METRIC}{i:02}": Measurement(value, "nat") for i, value in enumerate(self.block_nats)}
        return {"perplexity": Measurement(self.value, "1"), **blocks}


BLOCK_METRIC = "loss_nats/"


@torch.no_grad()
def perplexity(model: nn.Module, rows: Tensor, *, batch_size: int = 8, progress: Callable = iter) -> Perplexity:
    """Score windows of a text: every token but a window's first, given those before it in its window.

    model: a causal language model.  rows: [W, T] int64, T ≥ 2.  progress: wraps the iteration over batches.
    """
    device = next(model.parameters()).device
    batches = rows.split(batch_size)
    logits = (model(input_ids=batch.to(device), use_cache=False).logits for batch in progress(batches))
    return perplexity_of(batches, logits)


@torch.no_grad()
def perplexity_of(batches: Iterable[Tensor], logits: Iterable[Tensor]) -> Perplexity:
    """Score windows as `perplexity` does, given their logits.

    batches: windows of one length, [B, T] int64 each.  logits: for each batch [B, T, vocabulary]; taken one at a time.
    """
    windows = []
    for batch, predicted in zip(batches, logits, strict=True):
        following = batch[:, 1:].to(predicted.device)
        # A window at a time: in float32 the logits of a batch may take more memory than a block of the model.
        nll = [
            F.cross_entropy(mine.float(), tokens, reduction="none")
            for mine, tokens in zip(predicted[:, :-1], following, strict=True)
        ]
        windows.append(torch.stack(nll).sum(1, dtype=torch.float64).cpu())
    nats, scored = torch.cat(windows), batch.shape[1] - 1
    blocks = nats.tensor_split(min(BLOCKS, len(nats)))
    return Perplexity(nats.sum().item(), len(nats) * scored, tuple((b.mean() / scored).item() for b in blocks))


def order_of(cases: list[Mapping[str, float]]) -> tuple[bool, str]:
    """Whether perplexity rises from no case to the next, as far as the text can tell, and how it goes in writing.

    cases: metric → value, from `Perplexity.measurements`, all on the same text.
    Each step is a paired comparison: of the differences of the blocks' losses, the mean is set against its standard error.
    Rounding is chaotic (a last bit that differs moves the perplexity by some 0.05%), so that a difference within two standard
    errors is written ≈ and tells nothing; a rise beyond them makes the order false.
    """
    holds, text = True, f"{cases[0]['perplexity']:.3f}"
    for before, after in itertools.pairwise(cases):
        fall, error = _fall(before, after)
        told_apart = abs(fall) > 2 * error
        holds &= fall > 0 or not told_apart
        text += f" {'≈' if not told_apart else '>' if fall > 0 else '<'} {after['perplexity']:.3f}"
    return holds, text


def _fall(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[float, float]:
    """By how much the logarithm of perplexity falls from one case to another, and the standard error of that.

    Of one block nobody can tell: the error is infinite.
    """
    blocks = [name for name in before if name.startswith(BLOCK_METRIC) and name in after]
    falls = torch.tensor([before[name] - after[name] for name in blocks], dtype=torch.float64)
    error = falls.std().item() / math.sqrt(len(falls)) if len(falls) > 1 else math.inf
    return math.log(before["perplexity"] / after["perplexity"]), error


class AccuracyStudy(ScoredModel):
    """One model, one text, several methods: measures each once and keeps the records.

    run: the workbook run whose records and parameters are used.  model, dataset, windows, window_length, tasks,
    task_limit, methods, backends, scales, plan, outliers, layer_by_layer, seed: as the notebook's parameters say.
    Raises before anything is computed: ValueError (or its kin PlanError, TaskError, ModelError, DataError) naming the
    parameter's value, the nearest valid one and what is accepted.
    """

    def __init__(
        self,
        run: Run,
        *,
        model: str,
        methods: str = ",".join(METHODS),
        backends: str = "simulate,auto",
        scales: str = "absmax",
        plan: str = "",
        dataset: str = "auto",
        windows: int = 0,
        window_length: int = 0,
        tasks: str = zero_shot.CONTINUATION,
        task_limit: int = 0,
        outliers: float = 0.0,
        layer_by_layer: bool = False,
        batch_size: int = 8,
        data_dir: str = "",
        seed: int = 0,
    ) -> None:
        locate_model(model)
        self.methods = names(methods, METHODS, "method") + ([plan] if plan else [])
        self.custom_plan = read_plan(plan) if plan else None
        self.backends = resolved_backends(backends, run.device)
        self.plan_backends = resolved_backends(backends, run.device, self.custom_plan)
        self.scales = names(scales, SCALES, "way to choose scales")
        self.tasks = names(tasks, None, "task")
        zero_shot.require_tasks(self.tasks)
        zero_shot.require_local_tasks(self.tasks, data_dir)
        require_at_least(0, task_limit=task_limit)
        if layer_by_layer and outliers:
            raise ValueError(
                f"outliers is {outliers} with layer_by_layer; accepted: 0, as outliers want the whole model"
            )
        if layer_by_layer and not set(self.methods) - set(WHOLE_MODEL):
            raise ValueError(
                f"methods is {methods!r} with layer_by_layer; accepted: one that is none of {', '.join(WHOLE_MODEL)}"
            )
        super().__init__(
            run,
            model=model,
            dataset=dataset,
            data_dir=data_dir,
            windows=windows,
            window_length=window_length,
            calibration_windows=CALIBRATION_WINDOWS,
            outliers=outliers,
            batch_size=batch_size,
            seed=seed,
            blocks_on_disk=layer_by_layer,
        )
        self.layer_by_layer, self.task_limit = layer_by_layer, task_limit
        if self.custom_plan:
            resolve_plan(self.custom_plan, self.loaded.model)

    @property
    def calibrates(self) -> bool:
        """Whether any case looks at the calibration text."""
        found = [accuracy_scales.of_method(method) for method, _ in self.cases()]
        return any(name in WHOLE_MODEL or scales == "output" for name, scales in found)

    @cached_property
    def moments(self) -> dict[str, Tensor]:
        """Mean square of every input channel on the calibration text: layer → [K]."""
        return input_moments(
            self.model, self.calibration, load_block=self.loaded.load_block, progress=self._bar("calibration")
        )

    def linears(self) -> Iterator[tuple[str, nn.Linear]]:
        """Every linear layer that is quantised, with its weights, by its full name; layer by layer a block at a time."""
        if not self.layer_by_layer:
            yield from linear_layers(self.model).items()
            return
        for name in decoder_blocks(self.model):
            for inner, layer in linears_of_block(self.loaded.load_block(name)).items():
                yield f"{name}.{inner}", layer

    def cases(self) -> Iterator[tuple[str, str]]:
        """(method, backend) in the order they are measured; only FlexQ's own methods have more than one backend.

        Scales other than absmax make methods of their own, `flexq+mse`, on the last backend alone.
        """
        for method in self.methods:
            if method == UNQUANTISED:
                yield method, "torch"
            elif method in _BASELINES:
                yield method, "simulate"
            else:
                backends = self.backends if method in RULES else self.plan_backends
                if SCALES[0] in self.scales:
                    yield from ((method, backend) for backend in backends)
                for scales in self.scales:
                    if scales != SCALES[0]:
                        yield accuracy_scales.with_scales(method, scales), backends[-1]

    def measure(self, method: str, backend: str) -> dict[str, float]:
        """Perplexity, zero-shot accuracy, weight size and kernels of one case: metric → value; computed unless on record.

        What cannot be had layer by layer is left out, and `skipped` says why.
        """
        built: dict[str, nn.Module] = {}  # made once, and only when a record is missing

        def quantised() -> nn.Module:
            if not built:
                built["model"] = self.build(method, backend)
            return built["model"]

        label = f"{self.label(method)} · {backend}"
        once = self.run.records.once
        shared = {"model": self.loaded.name, "method": self.label(method), "seed": self.seed}
        records = once(
            **shared,
            parameters=self._inputs(method, backend) | self.text_inputs,
            # Equal bit for bit, so that a record of the one is a record of the other.
            compute=lambda: (
                self._score_by_layer(method, backend, label) if self.layer_by_layer else self._score(quantised(), label)
            ),
        )
        for task in self.tasks if self._answers_tasks(method, backend) else []:
            records |= once(
                **shared,
                parameters=self._inputs(method, backend) | self._task_inputs[task],
                compute=lambda task=task: self._score_task(quantised(), task),
            )
        if self._has_kernels(method, backend):
            batch = {"batch_size": self.batch_size, "device": provenance(self.run.device)["device"]}
            records |= once(
                **shared,
                parameters=self._inputs(method, backend) | self.text_inputs | batch,
                compute=lambda: accuracy_agreement.agreement(quantised(), self.rows[: self.batch_size]),
            )
        return {m: record.reason if m == "skipped" else record.value for m, record in records.items()}

    def _has_kernels(self, method: str, backend: str) -> bool:
        """Whether it is told on which kernels a case ran and how far they are from `simulate`; it wants the whole model."""
        kernels = backend not in ("torch", accuracy_agreement.SIMULATED) and not self.layer_by_layer
        return kernels and accuracy_scales.of_method(method)[1] == SCALES[0]

    def _answers_tasks(self, method: str, backend: str) -> bool:
        """Whether zero-shot tasks are asked: they take long, so where a method has several cases only of one.

        That is the last one with scales by absmax, where there is such a one.
        """
        name = accuracy_scales.of_method(method)[0]
        split = [(*accuracy_scales.of_method(case[0]), case) for case in self.cases()]
        mine = [(scales == SCALES[0], case) for other, scales, case in split if other == name]
        return (method, backend) == sorted(mine, key=lambda each: each[0])[-1][1]

    def build(self, method: str, backend: str) -> nn.Module:
        """The model under this method and backend; the original for `fp16`. Raises Skipped where there is no whole model."""
        if self.layer_by_layer:
            raise Skipped("zero-shot tasks want the whole model in memory: run it without layer_by_layer")
        if method == UNQUANTISED:
            return self.model
        if method in _BASELINES:
            return _BASELINES[method](self.model, self.calibration if method in WHOLE_MODEL else None)
        return self._fuse_as_served_(replace_linear_layers(self.model, self.replacement(method, backend)), method)

    def _fuse_as_served_(self, model: nn.Module, method: str) -> nn.Module:
        """On a GPU fuse a model or a block under this method in place, if it is FlexQ's, as it is when it is timed or used."""
        ours = method != UNQUANTISED and method not in _BASELINES
        return fuse_(model) if ours and torch.device(self.run.device).type == "cuda" else model

    def replacement(self, method: str, backend: str) -> Callable[[str, nn.Linear], nn.Module]:
        """What this method makes of a linear layer and its name, where that is all it looks at; else raises Skipped."""
        if method == UNQUANTISED:
            return lambda _, linear: linear
        if method in WHOLE_MODEL:
            raise Skipped(f"{method} rescales the whole model in memory: run it without layer_by_layer")
        if method in _BASELINES:
            return lambda _, linear: baselines.RowwiseLinear(linear, 6, 6)
        method, scales = accuracy_scales.of_method(method)
        plan = resolve_plan(self.custom_plan if method not in RULES else method, self.loaded.model)
        return quantizer(plan, backend=backend, scales=scales, moments=self.moments if scales == "output" else None)

    def label(self, method: str) -> str:
        """The method's name in records: the dtype for the unquantised model, the plan's name for a plan file."""
        if method == UNQUANTISED:
            return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[self.loaded.model.dtype]
        method, scales = accuracy_scales.of_method(method)
        name = f"plan:{self.custom_plan.name}" if method not in METHODS else method
        return accuracy_scales.with_scales(name, scales)

    def table(self) -> pd.DataFrame:
        """Measure every case: one row each, with the change of perplexity against the unquantised model in percent.

        A case that could not be scored has no perplexity, and in the column `skipped` the reason.
        """
        cases = list(self.cases())
        rows = [
            {"method": self.label(method), "backend": backend, **self.measure(method, backend)}
            for method, backend in self.run.progress(cases, desc="methods", total=len(cases))
        ]
        table = pd.DataFrame(rows)
        base = table.loc[table["backend"] == "torch", "perplexity"]
        if len(base):
            table["change_percent"] = 100 * (table["perplexity"] / base.iloc[0] - 1)
        return table

    def _inputs(self, method: str, backend: str) -> dict[str, Any]:
        """Everything that decides a case's numbers but the text, as plain values."""
        inputs = {"backend": backend, **self.model_inputs}
        name, scales = accuracy_scales.of_method(method)
        if scales != SCALES[0]:
            inputs["scales"] = scales
        if name not in METHODS:
            inputs["plan_sha256"] = hashlib.sha256(self.custom_plan.to_json().encode()).hexdigest()
        if name in WHOLE_MODEL or scales == "output":
            inputs |= self.calibration_inputs
        return inputs

    @cached_property
    def _task_inputs(self) -> dict[str, dict[str, Any]]:
        """What decides a task's score, by task."""
        digests = {task: zero_shot.data_sha256(task, self.data_dir) for task in self.tasks}
        return {
            task: {"task": task, "task_limit": self.task_limit} | ({"data_sha256": digest} if digest else {})
            for task, digest in digests.items()
        }

    def _score(self, model: nn.Module, label: str) -> dict[str, Measurement]:
        start = time.perf_counter()
        score = perplexity(model, self.rows, batch_size=self.batch_size, progress=self._bar(label))
        seconds = time.perf_counter() - start
        holds_codes = not any(isinstance(module, baselines.RowwiseLinear) for module in model.modules())
        return self._metrics(score, seconds, linear_weight_bytes(model) if holds_codes else None)

    def _score_by_layer(self, method: str, backend: str, label: str) -> dict[str, Measurement]:
        """As `_score`, with one block of the model in memory at a time."""
        make, sizes = self.replacement(method, backend), []

        def load_block(name: str) -> nn.Module:
            block = replace_in_block_in_place(name, self.loaded.load_block(name), make)
            block = self._fuse_as_served_(block, method)
            sizes.append(linear_weight_bytes(block))  # as they are kept: a kernel's order pads outputs
            return block

        start = time.perf_counter()
        batches = self.rows.split(self.batch_size)
        with self._room_for_hidden_states() as folder:
            logits = logits_block_by_block(
                self.loaded.model, batches, load_block, folder=folder, progress=self._bar(f"{label}, blocks")
            )
            score = perplexity_of(batches, logits)
        seconds = time.perf_counter() - start
        if method == UNQUANTISED:
            sizes = [linear_weight_bytes(self.loaded.model)]
        return self._metrics(score, seconds, None if method in _BASELINES else sum(sizes))

    @contextmanager
    def _room_for_hidden_states(self) -> Iterator[Path | None]:
        """None where they fit into half of this machine's memory, else a folder in the outputs that is deleted afterwards."""
        needed = hidden_state_bytes(self.loaded.model, self.rows)
        if needed <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2:
            yield None
            return
        self.run.outputs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.run.outputs, prefix="hidden-states-") as folder:
            print(f"hidden states take {needed / 2**30:.1f} GiB and are kept in {folder}", flush=True)
            yield Path(folder)

    def _bar(self, label: str) -> Callable:
        return lambda items: self.run.progress(items, desc=label, total=len(items))

    def _metrics(self, score: Perplexity, seconds: float, weight_bytes: int | None) -> dict[str, Measurement]:
        bits = score.nll_nats / score.tokens / math.log(2)
        metrics = {
            **score.measurements(),
            "bits_per_character": Measurement(bits / self.characters_per_token, "bit"),
            "tokens_scored": Measurement(score.tokens, "token"),
            "seconds": Measurement(seconds, "s"),
        }
        if weight_bytes is not None:
            metrics["linear_weight_mib"] = Measurement(weight_bytes / 2**20, "MiB")
            metrics["bits_per_weight"] = Measurement(8 * weight_bytes / self._weights, "bit")
        return metrics

    def _score_task(self, model: nn.Module, task: str) -> dict[str, Measurement]:
        accuracy, questions = zero_shot.evaluate_tasks(
            model, self.loaded.tokenizer, [task], limit=self.task_limit, data_dir=self.data_dir, seed=self.seed
        )[task]
        return {
            f"accuracy/{task}": Measurement(accuracy, "1"),
            f"questions/{task}": Measurement(questions, "question"),
        }

    @cached_property
    def _weights(self) -> int:
        return sum(layer.weight.numel() for layer in linear_layers(self.loaded.model).values())


def _scored_by_absmax(table: pd.DataFrame) -> pd.DataFrame:
    usual = table["method"].map(lambda method: accuracy_scales.of_method(method)[1] == SCALES[0])
    return table[usual].dropna(subset=["perplexity"])


def plot_change(table: pd.DataFrame, model: str) -> Figure:
    """What each method costs: change of perplexity against the unquantised model, one bar a method and backend.

    Without both, an unquantised model and another, the perplexities themselves. What was skipped is left out, and what has
    other scales than absmax, which `accuracy_scales` shows.
    """
    table = _scored_by_absmax(table)
    shown = table[table["backend"] != "torch"]
    column, title, fmt = "change_percent", "change of perplexity (%)", "%+.2f%%"
    if column not in table or shown.empty:
        shown, column, title, fmt = table, "perplexity", "perplexity", "%.2f"
    shown = shown.iloc[::-1]
    figure, axis = plt.subplots(figsize=(figures.HALF_PAGE[0], 0.7 + 0.27 * len(shown)))
    labels = [f"{TITLES.get(m, m)} · {b}" for m, b in zip(shown["method"], shown["backend"], strict=True)]
    bars = axis.barh(labels, shown[column], color=[figures.method_colour(m) for m in shown["method"]])
    axis.bar_label(bars, fmt=fmt, padding=3, fontsize=8)
    largest = max(shown[column].max(), 0.01)
    axis.set(xlabel=title, xlim=(min(0, shown[column].min()), 1.35 * largest), title=model)
    axis.grid(False, axis="y")
    return figure


def plot_size(table: pd.DataFrame, model: str) -> Figure:
    """Perplexity against the bits that a weight takes in memory, scales included; empty where only fake quantisation ran."""
    table = _scored_by_absmax(table)
    shown = (
        table.assign(bits_per_weight=table.get("bits_per_weight", math.nan))
        .dropna(subset=["bits_per_weight"])
        .drop_duplicates("method", keep="last")
    )
    figure, axis = plt.subplots()
    for row in shown.itertuples():
        colour = figures.method_colour(row.method)
        axis.plot(row.bits_per_weight, row.perplexity, "o", color=colour, label=TITLES.get(row.method, row.method))
    axis.set(xlabel="bits a weight, scales included", ylabel=f"perplexity, {model}", xscale="log")
    axis.set_xticks([6, 8, 16, 32], ["6", "8", "16", "32"])
    axis.minorticks_off()
    if len(shown):
        axis.legend()
    return figure


ORDER = ("rtn-w6a6", "w6a6", "flexq", "w6a8")
"""Methods from most to least costly, as the paper finds them."""
BOUNDS_PERCENT = {"flexq": 1.5, "w6a8": 0.5}
"""What a method may cost in perplexity, in percent, on a model without injected outliers."""
AGREEMENT_PERCENT = 0.1
"""How far two backends' perplexities may lie apart, in percent, and by two standard errors more: of a short text chance alone
puts them as far."""


def claims(table: pd.DataFrame, *, outliers: float) -> list[tuple[str, bool, str]]:
    """What this study claims, as (claim, whether the table bears it out, the numbers); only for methods measured."""
    found = []
    table = _scored_by_absmax(table)
    best = table.drop_duplicates("method", keep="last").set_index("method")
    if "change_percent" in best:
        change = best["change_percent"]
        for method, bound in BOUNDS_PERCENT.items() if not outliers else ():
            if method in change:
                text = f"{TITLES[method]} costs at most {bound}% of perplexity"
                found.append((text, change[method] <= bound, f"{change[method]:+.2f}%"))
    ordered = [method for method in ORDER if method in best.index]
    if len(ordered) > 1:
        holds, detail = order_of([best.loc[method].dropna().to_dict() for method in ordered])
        found.append(
            (f"perplexity rises nowhere in the order {' > '.join(ordered)}, as far as the text can tell", holds, detail)
        )
    for method, group in table.groupby("method", sort=False):
        if len(group) > 1:
            worst_first = group.sort_values("perplexity", ascending=False)
            fall, error = _fall(*(worst_first.iloc[place].dropna().to_dict() for place in (0, -1)))
            text = (
                f"{method}: {' and '.join(group['backend'])} agree to {AGREEMENT_PERCENT}%, as far as the text can tell"
            )
            holds = fall - 2 * error <= math.log1p(AGREEMENT_PERCENT / 100)
            found.append((text, holds, f"{100 * math.expm1(fall):.4f}%{accuracy_agreement.told(group)}"))
    accuracy = f"accuracy/{zero_shot.CONTINUATION}"
    if accuracy in table and not outliers:
        scores = table.dropna(subset=[accuracy]).set_index("method")[accuracy]
        holds = bool((scores > 2 / zero_shot.CHOICES).all())
        detail = f"{scores.min():.1%} to {scores.max():.1%}, chance {1 / zero_shot.CHOICES:.0%}"
        found.append(("every method picks the right continuation more than twice as often as chance", holds, detail))
    return found
