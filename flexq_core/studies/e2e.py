"""End to end: time to first token, time per output token, tokens a second and memory by method (FlexQ §4.4).

The module that is timed here is the module that is scored. One loop serves every method: greedy decoding over a static cache,
the same warm-up, and logits that are checked against the unquantised model's before anything is timed.

One decode of the longest output measures every length: total(L) = TTFT + the first L - 1 steps, for the first token comes out
of the prefill. So lengths cost nothing extra, and a short output is a prefix of a long one in time as it is in text. The time
of the prefill and of each step is the median over the repeats before they are summed: what another process took once is not
the method's.

Memory is counted from tensors, not asked of the system: a process's peak on a CPU holds the original model, torch and
everything before. On a GPU the allocator's peak of the run stands beside it.
"""

from __future__ import annotations

import copy
import hashlib
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor, nn

from flexq_core.quant.layers import linear_layers
from flexq_core.quant.plan import RULES
from flexq_core.runtime import ops
from flexq_core.runtime.convert import (
    linear_weight_bytes,
    quantize_model,
    read_plan,
    replace_linear_layers,
    resolve_plan,
)
from flexq_core.sources import paper
from flexq_core.sources.models import load_model, locate_model, random_model
from flexq_core.studies.parameters import counts, names, one_of, require_at_least
from flexq_core.workbook import figures
from flexq_core.workbook.machine import preemptions, provenance
from flexq_core.workbook.records import Measurement, Skipped

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from flexq_core.workbook.run import Run

UNQUANTISED = "fp16"
METHODS = (UNQUANTISED, "bf16", "w8a16", "w8a8", *RULES)
"""`fp16` is the model as it is, in float32 on a CPU. `w8a16` and `w8a8` are torch's own INT8. The rest are FlexQ's plans."""
_INT8 = ("w8a16", "w8a8")
WEIGHTS = ("pretrained", "random")

BOUNDS = {"fp16": 1e-6, "fp32": 1e-6, "bf16": 0.1, "w8a16": 0.1, "w8a8": 0.5}
SIX_BIT_BOUND = 0.5
"""Relative difference of the prompt's logits, ‖a - b‖ / ‖b‖, up to which a method may be timed. They tell a wrong product, which
leaves logits unrelated (about 1.4) or zero (1), from a rounded one; what rounding costs is 02_accuracy's question."""

_WARM_UP_S = 1.0
_INT8_ENGINES = ("onednn", "x86", "fbgemm")
_INT_MM_ROWS = 32  # torch._int_mm wants more than 16 on a GPU


class Int8WeightLinear(nn.Module):
    """W8A16: INT8 weights, a scale an output channel, bfloat16 activations, through torch's `_weight_int8pack_mm`.

    A plain baseline as torch ships it and no tuned kernel. Buffers: weight [N, K] int8, weight_scale [N] bfloat16.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        codes, scales = _int8_rows(linear.weight.data, torch.bfloat16)
        self.register_buffer("weight", codes)
        self.register_buffer("weight_scale", scales)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N] in x's dtype."""
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        y = torch._weight_int8pack_mm(rows, self.weight, self.weight_scale).to(x.dtype)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)

    def weight_bytes(self) -> int:
        """Bytes of the weight with its scales."""
        return self.weight.nbytes + self.weight_scale.nbytes


class Int8Linear(nn.Module):
    """W8A8 on a GPU: a scale an output channel and a token, exact integer sums by `torch._int_mm` (cuBLAS).

    Buffers: weight [N, K] int8, weight_scale [N] float32. K and N are multiples of 8.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        codes, scales = _int8_rows(linear.weight.data, torch.float32)
        self.register_buffer("weight", codes)
        self.register_buffer("weight_scale", scales)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N] in x's dtype."""
        codes, scales = _int8_rows(x.reshape(-1, x.shape[-1]), torch.float32)
        padding = max(0, _INT_MM_ROWS - len(codes))
        sums = torch._int_mm(nn.functional.pad(codes, (0, 0, 0, padding)), self.weight.T)[: len(codes)]
        y = (sums * scales[:, None] * self.weight_scale).to(x.dtype)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)

    def weight_bytes(self) -> int:
        """Bytes of the weight with its scales."""
        return self.weight.nbytes + self.weight_scale.nbytes


class DynamicInt8Linear(nn.Module):
    """W8A8 on a CPU: torch's dynamic quantisation, a scale an output channel, activations a scale a call.

    Its packed weight is no tensor that could be counted; what it holds is a byte a weight, and a float32 scale and an int32
    zero point a channel.
    """

    def __init__(self, linear: nn.Linear, engine: str) -> None:
        super().__init__()
        self._weights, self._outputs = linear.weight.numel(), linear.out_features
        self._bias_bytes = 0 if linear.bias is None else linear.bias.nbytes
        before, torch.backends.quantized.engine = torch.backends.quantized.engine, engine
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it is deprecated; its successor is another package
                plan = {"": torch.ao.quantization.per_channel_dynamic_qconfig}
                sequence = nn.Sequential(copy.deepcopy(linear))
                self.inner = torch.ao.quantization.quantize_dynamic(sequence, plan, dtype=torch.qint8)[0]
        finally:
            torch.backends.quantized.engine = before

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] float32 → [..., N] float32."""
        return self.inner(x)

    def weight_bytes(self) -> int:
        """Bytes of the weight with its scales and zero points."""
        return self._weights + 8 * self._outputs

    def hidden_bytes(self) -> int:
        """Bytes held outside parameters and buffers: the weight and the bias."""
        return self.weight_bytes() + self._bias_bytes


_INT8_LAYERS = (Int8WeightLinear, Int8Linear, DynamicInt8Linear)


def block_weight_bytes(model: nn.Module) -> int:
    """Bytes of the weights of the blocks' linear layers in the form they have: floating point, INT8 or packed, with scales."""
    int8 = sum(layer.weight_bytes() for layer in model.modules() if isinstance(layer, _INT8_LAYERS))
    return int8 + linear_weight_bytes(model)


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, memory that several share counted once, and of what torch packs out of sight."""
    held = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    hidden = sum(layer.hidden_bytes() for layer in model.modules() if isinstance(layer, DynamicInt8Linear))
    return sum(held.values()) + hidden


def cache_bytes(cache: Any, tokens: int) -> int:
    """Bytes of keys and values that `tokens` positions take of a StaticCache; a sliding layer holds no more than its window."""
    total = 0
    for layer in cache.layers:
        places = layer.keys.shape[-2]
        total += (layer.keys.nbytes + layer.values.nbytes) // places * min(tokens, places)
    return total


@dataclass(frozen=True)
class Generation:
    """What one greedy decode wrote and how long it took.

    tokens: [B, L] int64, without the prompt.  ttft_ms: prefill with the first token.  steps_ms: [L - 1] float64, each later
    token.  cache: the StaticCache it filled.
    """

    tokens: Tensor
    ttft_ms: float
    steps_ms: Tensor
    cache: Any


def total_ms(repeats: list[Generation], output_tokens: int) -> float:
    """Time of the first `output_tokens` tokens of equal decodes: TTFT and the steps after it, each the median of the repeats.

    output_tokens: 1 up to the tokens decoded.
    """
    times = torch.tensor([[run.ttft_ms, *run.steps_ms.tolist()] for run in repeats], dtype=torch.float64)
    return times.quantile(0.5, dim=0)[:output_tokens].sum().item()


@torch.no_grad()
def generate(model: nn.Module, prompt: Tensor, output_tokens: int) -> Generation:
    """Decode greedily, exactly `output_tokens` tokens whatever they are, and time every one.

    model: a causal language model.  prompt: [B, T] int64 on the model's device, no padding.  output_tokens: 1 or more.
    On a GPU the marks are events on its stream and nothing waits between steps.
    """
    import transformers

    batch, length = prompt.shape
    cache = transformers.StaticCache(config=model.config, max_cache_len=length + output_tokens)
    positions = torch.arange(length + output_tokens, device=prompt.device)
    watch = _Stopwatch(prompt.device)
    ids, at, written = prompt, positions[:length], []
    watch.mark()
    for step in range(output_tokens):
        logits = model(
            input_ids=ids,
            past_key_values=cache,
            position_ids=at.expand(batch, -1),
            cache_position=at,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        ids = logits[:, -1:].argmax(-1)
        written.append(ids)
        watch.mark()
        at = positions[length + step : length + step + 1]
    gaps_ms = watch.gaps_ms()
    return Generation(torch.cat(written, 1), gaps_ms[0].item(), gaps_ms[1:], cache)


class _Stopwatch:
    """Marks moments: on a GPU events that its stream reaches, elsewhere readings of the clock."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[Any] = []
        if self.on_gpu:
            torch.cuda.synchronize(device)

    def mark(self) -> None:
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self.marks.append(event if self.on_gpu else time.perf_counter())

    def gaps_ms(self) -> Tensor:
        """Times between marks: [marks - 1] float64 milliseconds."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if self.on_gpu:
            torch.cuda.synchronize()
            return torch.tensor([a.elapsed_time(b) for a, b in pairs], dtype=torch.float64)
        return torch.tensor([(b - a) * 1e3 for a, b in pairs], dtype=torch.float64)


class EndToEndStudy:
    """One model, several methods: measures each once and keeps the records.

    run: the workbook run whose records and device are used; the other arguments: as the notebook's parameters say.
    Raises before anything is computed: ValueError (or its kin PlanError, ModelError) naming the value, the nearest valid one
    and what is accepted.
    """

    def __init__(
        self,
        run: Run,
        *,
        model: str,
        weights: str = "pretrained",
        methods: str = ",".join(METHODS),
        backend: str = "auto",
        plan: str = "",
        prompt_tokens: int = 128,
        output_tokens: str = "32,128",
        batch_size: int = 1,
        layers: int = 0,
        repeats: int = 3,
        seed: int = 0,
    ) -> None:
        locate_model(model)
        self.run = run
        self.weights = one_of(weights, WEIGHTS, "weights")
        self.methods = names(methods, METHODS, "method") + ([plan] if plan else [])
        self.backend = ops.resolve_backend(one_of(backend, ops.BACKENDS, "backend"), run.device)
        self.output_tokens = counts(output_tokens, "output_tokens")
        require_at_least(1, prompt_tokens=prompt_tokens, batch_size=batch_size, repeats=repeats)
        require_at_least(0, layers=layers, seed=seed)
        if layers and self.weights == "pretrained":
            raise ValueError(f"layers is {layers} with pretrained weights; accepted: 0, or weights=random")
        self.custom_plan = read_plan(plan) if plan else None
        self.prompt_tokens, self.batch_size, self.layers = prompt_tokens, batch_size, layers
        self.repeats, self.seed = repeats, seed
        if self.weights == "random":
            self.loaded = random_model(model, device=run.device, layers=layers, seed=seed)
        else:
            self.loaded = load_model(model, device=run.device)
        self._require_fit()

    def _require_fit(self) -> None:
        blocks = self.loaded.model.config.num_hidden_layers
        if self.layers > blocks:
            raise ValueError(f"layers is {self.layers}; accepted: 0 for all, or up to the model's {blocks}")
        longest, context = self.prompt_tokens + self.output_tokens[-1], self.loaded.context_length
        if longest > context:
            raise ValueError(
                f"{self.prompt_tokens} prompt and {self.output_tokens[-1]} output tokens are {longest}; accepted: up to "
                f"{context}, the context of {self.loaded.name!r}"
            )
        resolve_plan(self.custom_plan or "w6a6", self.loaded.model)

    @cached_property
    def prompt(self) -> Tensor:
        """[batch_size, prompt_tokens] int64, random ids, the same for every method."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.batch_size, self.prompt_tokens)
        ids = torch.randint(self.loaded.model.config.vocab_size, shape, generator=generator)
        return ids.to(self.run.device)

    def cases(self) -> Iterator[tuple[str, str]]:
        """(method, backend) in the order they are measured; the backend is `torch` for all but FlexQ's own methods."""
        for method in self.methods:
            yield method, self.backend if method in RULES or method not in METHODS else "torch"

    def label(self, method: str) -> str:
        """The method's name in records: the dtype for the unquantised model, the plan's name for a plan file."""
        if method == UNQUANTISED:
            return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[self.loaded.model.dtype]
        return method if method in METHODS else f"plan:{self.custom_plan.name}"

    def measure(self, method: str, backend: str) -> dict[str, Any]:
        """Times and sizes of one case: metric → value, on record or measured now; {"skipped": why} where it cannot run here."""
        records = self.run.records.once(
            model=self.loaded.name,
            method=self.label(method),
            seed=self.seed,
            parameters=self._inputs(method, backend),
            compute=lambda: self._measured(method, backend),
        )
        if "skipped" in records:
            return {"skipped": records["skipped"].reason}
        return {metric: record.value for metric, record in records.items()}

    def build(self, method: str, backend: str) -> nn.Module:
        """The model under this method; the original for `fp16`. Raises Skipped where this machine cannot run it."""
        model = self.loaded.model
        if method == UNQUANTISED:
            return model
        if method == "bf16":
            return _with_parameters_in(model, torch.bfloat16)
        if method == "w8a16":
            _require_weight_only(model)
            return replace_linear_layers(model, lambda _, linear: Int8WeightLinear(linear))
        if method == "w8a8":
            return self._int8_model()
        return quantize_model(model, self.custom_plan if method not in RULES else method, backend=backend)

    def table(self) -> pd.DataFrame:
        """Measure every case: a row a method and output length.

        Columns: method, backend, output_tokens, ttft_ms, tpot_ms (each with _p10 and _p90), total_s, tokens_per_s,
        linear_weights_mib, weights_mib (all of the model), kv_cache_mib, difference (of the logits), preemptions_per_token, on a
        GPU peak_mib; and skipped, the reason, where a method could not run.
        """
        cases = list(self.cases())
        rows = []
        for method, backend in self.run.progress(cases, desc="methods", total=len(cases)):
            found = self.measure(method, backend)
            shared = {name: value for name, value in found.items() if "/" not in name}
            for length in self.output_tokens:
                mine = {n.split("/")[0]: v for n, v in found.items() if n.endswith(f"/{length}")}
                case = {"method": self.label(method), "backend": backend, "output_tokens": length}
                rows.append(case | shared | mine)
        table = pd.DataFrame(rows)
        for column in _NUMBERS:
            if column not in table:
                table[column] = float("nan")
        return table

    def published(self) -> pd.DataFrame:
        """The paper's rows for this model, as `paper.end_to_end()`; none for a demo model or one with fewer blocks."""
        rows = paper.end_to_end()
        return rows[(rows["model"] == self.loaded.name) & (self.layers == 0)]

    def _inputs(self, method: str, backend: str) -> dict[str, Any]:
        """Everything that decides a case's numbers, the machine among it, as plain values."""
        inputs = {
            "backend": backend,
            **self.loaded.inputs,
            "weights": self.weights,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "batch_size": self.batch_size,
            "layers": self.layers,
            "repeats": self.repeats,
            "device": provenance(self.run.device)["device"],
            "threads": torch.get_num_threads(),
        }
        if method not in METHODS:
            inputs["plan_sha256"] = hashlib.sha256(self.custom_plan.to_json().encode()).hexdigest()
        return inputs

    def _int8_model(self) -> nn.Module:
        layers = linear_layers(self.loaded.model)
        if self.run.device == "cuda":
            if any(size % 8 for layer in layers.values() for size in layer.weight.shape):
                raise Skipped("torch's INT8 product on a GPU takes layers whose sizes are multiples of 8")
            return replace_linear_layers(self.loaded.model, lambda _, linear: Int8Linear(linear))
        largest = max(layers.values(), key=lambda layer: layer.weight.numel())
        engine = _fastest_engine(largest, self.batch_size)
        return replace_linear_layers(self.loaded.model, lambda _, linear: DynamicInt8Linear(linear, engine))

    @cached_property
    def _logits(self) -> Tensor:
        """The unquantised model's logits on the prompt: [B, T, vocabulary] on the CPU."""
        return _prompt_logits(self.loaded.model, self.prompt)

    def _measured(self, method: str, backend: str) -> dict[str, Measurement]:
        model = self.build(method, backend)
        difference = self._checked_difference(model, method)
        size = model_bytes(model)
        self._warm_up(model)
        if self.run.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            others = torch.cuda.memory_allocated() - size  # the original's layers, which this model does not use
        before = preemptions()
        runs = [generate(model, self.prompt, self.output_tokens[-1]) for _ in range(self.repeats)]
        preempted = preemptions() - before
        measured = {
            **_spread("ttft_ms", torch.tensor([run.ttft_ms for run in runs], dtype=torch.float64)),
            "weights_mib": Measurement(size / 2**20, "MiB"),
            "linear_weights_mib": Measurement(block_weight_bytes(model) / 2**20, "MiB"),
            "difference": Measurement(difference, "1"),
            "preemptions_per_token": Measurement(preempted / self.repeats / self.output_tokens[-1], "1"),
        }
        if self.output_tokens[-1] > 1:
            measured |= _spread("tpot_ms", torch.cat([run.steps_ms for run in runs]))
        if self.run.device == "cuda":
            measured["peak_mib"] = Measurement((torch.cuda.max_memory_allocated() - others) / 2**20, "MiB")
        for length in self.output_tokens:
            total_s = total_ms(runs, length) / 1e3
            cache = cache_bytes(runs[0].cache, self.prompt_tokens + length)
            measured[f"total_s/{length}"] = Measurement(total_s, "s")
            measured[f"tokens_per_s/{length}"] = Measurement(self.batch_size * length / total_s, "token/s")
            measured[f"kv_cache_mib/{length}"] = Measurement(cache / 2**20, "MiB")
        return measured

    def _checked_difference(self, model: nn.Module, method: str) -> float:
        """Relative difference of the prompt's logits; RuntimeError where it is not within the method's bound."""
        found, expected = _prompt_logits(model, self.prompt), self._logits
        difference = ((found - expected).norm() / expected.norm()).item()
        bound = BOUNDS.get(self.label(method), SIX_BIT_BOUND)
        if not difference <= bound:  # nan is wrong, too
            raise RuntimeError(
                f"{self.label(method)} is not timed: its logits differ from the unquantised model's by {difference:.3g} of "
                f"their norm, bound {bound}"
            )
        return difference

    def _warm_up(self, model: nn.Module) -> None:
        """Generate untimed for a second: threads spread over the processors, clocks rise, the allocator has its blocks."""
        end = time.perf_counter() + _WARM_UP_S
        while True:
            generate(model, self.prompt, min(8, self.output_tokens[-1]))
            if time.perf_counter() >= end:
                return


_NUMBERS = (
    *("ttft_ms", "ttft_ms_p10", "ttft_ms_p90", "tpot_ms", "tpot_ms_p10", "tpot_ms_p90", "total_s", "tokens_per_s"),
    *("linear_weights_mib", "weights_mib", "kv_cache_mib", "difference", "preemptions_per_token"),
)


def _spread(metric: str, times_ms: Tensor) -> dict[str, Measurement]:
    quantiles = {metric: 0.5, f"{metric}_p10": 0.1, f"{metric}_p90": 0.9}
    return {name: Measurement(times_ms.quantile(q).item(), "ms") for name, q in quantiles.items()}


@torch.no_grad()
def _prompt_logits(model: nn.Module, prompt: Tensor) -> Tensor:
    return model(input_ids=prompt, use_cache=False).logits.float().cpu()


def _int8_rows(x: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes [M, K] int8 in [-127, 127] and scales [M] so that x ≈ codes * scales; codes belong to the scale as it is stored."""
    scales = (x.float().abs().amax(-1) / 127).to(scale_dtype)
    steps = scales.float().clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    return (x.float() / steps).round().clamp(-127, 127).to(torch.int8), scales


def _with_parameters_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A new model with parameters in this dtype; buffers stay, for rounded rotary frequencies would be another model."""
    made = copy.deepcopy(model)
    for parameter in made.parameters():
        parameter.data = parameter.data.to(dtype)
    return made


def _require_weight_only(model: nn.Module) -> None:
    """Raise Skipped unless torch's INT8 weight-only product runs on every shape of the model's linear layers here."""
    for linear in {tuple(layer.weight.shape): layer for layer in linear_layers(model).values()}.values():
        try:
            made = Int8WeightLinear(linear)
            made(torch.zeros(1, linear.in_features, dtype=linear.weight.dtype, device=linear.weight.device))
        except (AttributeError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise Skipped(f"torch's INT8 weight-only product does not run here: {reason}") from None


def _fastest_engine(linear: nn.Linear, rows: int) -> str:
    """Of torch's INT8 engines the one that is fastest on `rows` tokens of this layer; Skipped where torch has none."""
    supported = [engine for engine in _INT8_ENGINES if engine in torch.backends.quantized.supported_engines]
    supported = supported or [e for e in torch.backends.quantized.supported_engines if e == "qnnpack"]
    if not supported:
        raise Skipped("this torch has no engine for dynamic INT8")
    x = torch.randn(rows, linear.in_features, generator=torch.Generator().manual_seed(0))

    def best_s(engine: str) -> float:
        layer, times = DynamicInt8Linear(linear, engine), []
        for _ in range(30):
            start = time.perf_counter()
            layer(x)
            times.append(time.perf_counter() - start)
        return min(times)

    return min(supported, key=best_s)


_TITLES = {
    "fp16": "FP16",
    "fp32": "FP32",
    "bf16": "BF16",
    "w8a16": "W8A16, torch",
    "w8a8": "W8A8, torch",
    "w6a6": "W6A6",
    "flexq": "FlexQ",
    "w6a8": "W6A8",
    "w6ax": "FlexQ",  # the paper's name in its figure
}
_PREFILL = "//////"


def _colour(method: str) -> str:
    return figures.method_colour("flexq" if method == "w6ax" else method)


def _panels(lengths: int, bars: int, published: int) -> tuple[Figure, Any]:
    """A figure with a panel an output length, and below them one each for the paper's where there are any."""
    columns, rows = max(lengths, published), 1 + bool(published)
    size = (max(figures.HALF_PAGE[0], 1.1 + 1.75 * columns), 1.0 + 0.22 * (bars + (4 if published else 0)) + 0.4 * rows)
    ratios = [bars, 4][:rows]
    return plt.subplots(rows, columns, figsize=size, squeeze=False, sharey="row", height_ratios=ratios)


def plot_latency(table: pd.DataFrame, model: str, published: pd.DataFrame) -> Figure:
    """Seconds by method, a panel an output length: prefill hatched, decode plain; below, what the paper shows for its GPU.

    table: of `EndToEndStudy.table`.  published: of `EndToEndStudy.published`; may be empty.
    """
    measured = table.dropna(subset=["total_s"])
    lengths, theirs = sorted(measured["output_tokens"].unique()), sorted(published["output_tokens"].unique())
    figure, axes = _panels(len(lengths), measured["method"].nunique(), len(theirs))
    for axis in axes.flat:
        axis.set_visible(False)
    for axis, length in zip(axes[0], lengths, strict=False):
        rows = measured[measured["output_tokens"] == length].iloc[::-1]
        titles, colours = _titles_and_colours(rows)
        prefill = rows["ttft_ms"] / 1e3
        axis.barh(titles, prefill, color="white", edgecolor=colours, hatch=_PREFILL, linewidth=0.8)
        bars = axis.barh(
            titles, rows["total_s"] - prefill, left=prefill, color=colours, edgecolor=colours, linewidth=0.8
        )
        _finish(axis, bars, rows["total_s"], f"{length} output tokens", "time (s)", 1.35)
    for axis, length in zip(axes[-1], theirs, strict=False):
        rows = published[published["output_tokens"] == length].iloc[::-1]
        titles, colours = _titles_and_colours(rows, paper=True)
        bars = axis.barh(titles, rows["seconds"], color=colours, alpha=0.6)
        _finish(axis, bars, rows["seconds"], f"{length} output tokens", "paper's GPU (s)", 1.35)
    kinds = [Patch(facecolor="white", edgecolor=figures.INK, hatch=_PREFILL, label="prefill and first token")]
    kinds.append(Patch(facecolor=figures.INK, label="decode"))
    figure.legend(handles=kinds, loc="outside upper center", ncols=2, title=model)
    return figure


def plot_memory(table: pd.DataFrame, model: str, published: pd.DataFrame) -> Figure:
    """Memory by method for the longest output: linear weights, the rest of the model, KV cache; below, the paper's."""
    measured = table.dropna(subset=["weights_mib"])
    rows = measured[measured["output_tokens"] == measured["output_tokens"].max()].iloc[::-1]
    longest = published[published["output_tokens"] == published["output_tokens"].max()].iloc[::-1]
    figure, axes = _panels(1, len(rows), 1 if len(longest) else 0)
    axis, (titles, colours) = axes[0, 0], _titles_and_colours(rows)
    rest = rows["weights_mib"] - rows["linear_weights_mib"]
    axis.barh(titles, rows["linear_weights_mib"], color=colours)
    axis.barh(titles, rest, left=rows["linear_weights_mib"], color=figures.NEUTRAL)
    cache = {"color": "white", "edgecolor": figures.INK, "hatch": _PREFILL, "linewidth": 0.6}
    bars = axis.barh(titles, rows["kv_cache_mib"], left=rows["weights_mib"], **cache)
    _finish(axis, bars, rows["weights_mib"] + rows["kv_cache_mib"], "", f"memory, {model} (MiB)")
    if len(longest):
        titles, colours = _titles_and_colours(longest, paper=True)
        bars = axes[1, 0].barh(titles, longest["memory_gb"], color=colours, alpha=0.6)
        _finish(axes[1, 0], bars, longest["memory_gb"], "", "paper's GPU (GB)")
    kinds = [
        Patch(facecolor=figures.INK, label="linear weights"),
        Patch(facecolor=figures.NEUTRAL, label="rest of the model"),
        Patch(facecolor="white", edgecolor=figures.INK, hatch=_PREFILL, label="KV cache"),
    ]
    figure.legend(handles=kinds, loc="outside upper center", ncols=3, columnspacing=1)
    return figure


def _titles_and_colours(rows: pd.DataFrame, *, paper: bool = False) -> tuple[list[str], list[str]]:
    titles = [_TITLES.get(method, method) for method in rows["method"]]
    if paper:  # its INT8 is not torch's
        titles = [title.removesuffix(", torch") for title in titles]
    return titles, [_colour(method) for method in rows["method"]]


def _finish(axis: Axes, bars: Any, totals: pd.Series, title: str, label: str, margin: float = 1.15) -> None:
    axis.set_visible(True)
    axis.bar_label(
        bars, [f"{total:.0f}" if total >= 100 else f"{total:#.3g}" for total in totals], padding=2, fontsize=8
    )
    axis.set(xlabel=label, title=title, xlim=(0, margin * totals.max()))
    axis.grid(False, axis="y")
    axis.locator_params(axis="x", nbins=4)


AT_MOST_OF_INT8 = 0.85
"""Share of INT8's bytes that FlexQ's linear weights may take: 0.77 for whole groups of 128, more where groups are padded."""
AT_MOST_OVER_INT8 = 1.1
"""How much longer than INT8 a decode step may take: both read fewer bytes than the rest of a step costs on a processor."""
TELLING_MIB = 50
"""Unquantised linear weights below this are read faster than a step's overhead passes: its time tells nothing of them."""

AT_MOST_PREEMPTIONS = 1.0
"""Preemptions a token above which a machine is too busy to tell: on a quiet one there are hardly any."""


def claims(table: pd.DataFrame) -> list[tuple[str, bool | None, str]]:
    """What this study claims, as (claim, whether the table bears it out, the numbers); None where it cannot tell.

    table: of `EndToEndStudy.table`. Claims are about `flexq` where it was measured, else the first of FlexQ's other methods.
    """
    best = table.dropna(subset=["linear_weights_mib"]).drop_duplicates("method", keep="last").set_index("method")
    ours = next(
        (m for m in ("flexq", "w6a6", "w6a8", *best.index[best.index.str.startswith("plan:")]) if m in best.index), None
    )
    base = next((m for m in ("fp32", "fp16") if m in best.index), None)
    int8 = [m for m in _INT8 if m in best.index]
    if ours is None:
        return [("FlexQ is measured", None, "methods name none of FlexQ's")]
    name, mib = _TITLES.get(ours, ours), best["linear_weights_mib"]
    found: list[tuple[str, bool | None, str]] = []
    if base:
        detail = f"{mib[ours]:.2f} of {mib[base]:.2f} MiB"
        half = 0.5 if base == "fp16" else 0.25
        text = f"{name}'s linear weights take less than {half:.0%} of the unquantised model's"
        found.append((text, mib[ours] < half * mib[base], f"{detail}, {mib[ours] / mib[base]:.1%}"))
    if int8:
        least = mib[int8].min()
        text = f"{name}'s linear weights take at most {AT_MOST_OF_INT8:.0%} of INT8's"
        found.append((text, mib[ours] <= AT_MOST_OF_INT8 * least, f"{mib[ours]:.2f} of {least:.2f} MiB"))
    for other in (base, *int8[-1:]):
        if other:
            found.append(_speed_claim(best, ours, other, base))
    return found


def _speed_claim(best: pd.DataFrame, ours: str, other: str, base: str | None) -> tuple[str, bool | None, str]:
    """How long a decode step takes beside the other method's; None where a step is not about weights, or the machine busy."""
    name, other_name = _TITLES.get(ours, ours), _TITLES[other]
    text = f"{name} decodes a token faster than {other_name}"
    at_most = 1.0
    if other in _INT8:
        at_most = AT_MOST_OVER_INT8
        text = f"{name} decodes a token in at most {at_most} of the time of {other_name}"
    mine_ms, other_ms = best["tpot_ms"][ours], best["tpot_ms"][other]
    if pd.isna(mine_ms) or pd.isna(other_ms):
        return text, None, "outputs of one token have no decode step"
    detail = f"{mine_ms:.2f} and {other_ms:.2f} ms a token, {other_ms / mine_ms:.2f} ×"
    weights_mib = best["linear_weights_mib"].max()
    if best["backend"][ours] in ("reference", "simulate"):
        return text, None, f"{detail}; the {best['backend'][ours]} backend is no kernel"
    if base is None or weights_mib < TELLING_MIB:
        return text, None, f"{detail}; {weights_mib:.0f} MiB of linear weights are too few to matter"
    preempted = best["preemptions_per_token"][[ours, other]].max()
    if preempted > AT_MOST_PREEMPTIONS:
        return text, None, f"{detail}; the machine is busy with other work: {preempted:.1f} preemptions a token"
    return text, bool(mine_ms < at_most * other_ms), detail
