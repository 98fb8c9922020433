"""End to end: time to first token, time per output token, tokens a second and memory by method (FlexQ §4.4).

The module that is timed here is the module that is scored. One loop serves every method: greedy decoding over a static cache,
the same warm-up, and logits that are checked against the unquantised model's before anything is timed.

One decode of the longest output measures every length: total(L) = TTFT + the first L - 1 steps, for the first token comes out
of the prefill. So lengths cost nothing extra, and a short output is a prefix of a long one in time as it is in text. The time
of the prefill and of each step is the median over the repeats before they are summed: of three and more what another process
took once is not the method's, of two it is their mean.

On a GPU all methods run in the same blocks, with merged projections (runtime/fuse.py), and in the same engine, whose prefill and
step torch compiles and CUDA graphs replay (decode.py). A decode step is set beside the time that its bytes take at the measured
bandwidth, and what its kernels do is counted. Random weights are made on the device, a block at a time.

Memory is counted from tensors, not asked of the system: a process's peak on a CPU holds the original model, torch and
everything before. On a GPU the allocator's peak of the run stands beside it.

    python -m flexq_core.studies.e2e --model llama-13b --methods fp16 w8a8 fp8 flexq --weights random --outputs FOLDER
    python -m flexq_core.studies.e2e --model llama-13b --weights random --batch-size 1 4 8 --prompt-tokens 128 1024
"""

from __future__ import annotations

import copy
import gc
import hashlib
import time
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor, nn

from flexq_core.quant.layers import linear_layers
from flexq_core.quant.plan import RULES, PrecisionPlan
from flexq_core.runtime import ops
from flexq_core.runtime.convert import quantize_model, read_plan, replace_linear_layers, resolve_plan
from flexq_core.runtime.fuse import fuse_
from flexq_core.sources import paper
from flexq_core.sources.models import LoadedModel, load_model, locate_model, model_shape, random_model
from flexq_core.studies.baselines import smoothing_of
from flexq_core.studies.e2e import attention, linears, processes, smoothing
from flexq_core.studies.e2e.decode import COMPILE_MODES, Engine, cache_bytes, total_ms
from flexq_core.studies.e2e.linears import (
    DynamicInt8Linear,
    Fp8Linear,
    Int8Linear,
    Int8WeightLinear,
    block_weight_bytes,
    kernels_of,
    model_bytes,
    scratch_bytes,
)
from flexq_core.studies.e2e.steps import STEPS, parts_ms, step_bytes
from flexq_core.studies.e2e_claims import claims, has_ratios
from flexq_core.studies.e2e_compared import plot_latency, plot_memory, plot_step, published_note
from flexq_core.studies.parameters import counts, names, one_of, require_at_least, resolved_backends
from flexq_core.studies.timing import machine_limits
from flexq_core.workbook.machine import preemptions, provenance
from flexq_core.workbook.records import Measurement, Skipped

if TYPE_CHECKING:
    from flexq_core.workbook.run import Run

__all__ = ["EndToEndStudy", "claims", "plot_latency", "plot_memory", "plot_step", "published_note"]

UNQUANTISED = "fp16"
SMOOTHQUANT = "smoothquant-w8a8"
METHODS = (UNQUANTISED, "bf16", "w8a16", "w8a8", SMOOTHQUANT, "fp8", *RULES)
"""`fp16` is the model as it is, in float32 on a CPU. `w8a16`, `w8a8` and `fp8` are torch's own, SmoothQuant's is on torch's INT8
product. The rest are FlexQ's plans."""
ON_GPUS_ALONE = (SMOOTHQUANT, "fp8")
WEIGHTS = ("pretrained", "random")

BOUNDS = {"fp16": 1e-2, "fp32": 1e-6, "bf16": 0.1, "w8a16": 0.1, "w8a8": 0.5, SMOOTHQUANT: 0.5, "fp8": 0.5}
SIX_BIT_BOUND = 0.5
"""Relative difference of the prompt's logits, ‖a - b‖ / ‖b‖, up to which a method may be timed. They tell a wrong product, which
leaves logits unrelated (about 1.4) or zero (1), from a rounded one; what rounding costs is 02_accuracy's question."""

CHECKED_BLOCKS = 2
"""Of a model with random weights, whose logits are compared: after many blocks of them rounding alone leaves logits unrelated (of
LLaMA-13B's 40 they differ by 0.77), and every block has the same shapes."""

CALIBRATION_TOKENS = 512
"""On which SmoothQuant sees what activations reach."""

BEST_MODE = "best"
"""Instead of one of COMPILE_MODES: each method in the one of those that compile in which it decodes fastest."""

EAGER_TOKENS = 64
"""Of an output, that the eager model writes as well, to be compared."""

_WAITING = ("reference", "simulate")
"""Backends that ask a GPU whether activations are finite, which no graph can."""
_WARM_UP_S = 1.0
_TRIED_TOKENS = 64  # in each mode, before the faster is timed


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
        compile_mode: str = BEST_MODE,
        repeats: int = 3,
        seed: int = 0,
    ) -> None:
        locate_model(model)
        self.run, self.model = run, model
        self.weights = one_of(weights, WEIGHTS, "weights")
        self.methods = names(methods, METHODS, "method") + ([plan] if plan else [])
        self.custom_plan = read_plan(plan) if plan else None
        one_of(backend, ops.BACKENDS, "backend")
        (self.backend,) = resolved_backends(backend, run.device)
        (self.plan_backend,) = resolved_backends(backend, run.device, self.custom_plan)
        self.output_tokens = counts(output_tokens, "output_tokens")
        require_at_least(1, prompt_tokens=prompt_tokens, batch_size=batch_size, repeats=repeats)
        require_at_least(0, layers=layers, seed=seed)
        if layers and self.weights == "pretrained":
            raise ValueError(f"layers is {layers} with pretrained weights; accepted: 0, or weights=random")
        self.prompt_tokens, self.batch_size, self.layers = prompt_tokens, batch_size, layers
        self.repeats, self.seed = repeats, seed
        self.on_gpu = torch.device(run.device).type == "cuda"
        if not self.on_gpu and set(self.methods) <= set(ON_GPUS_ALONE):
            here = ", ".join(method for method in METHODS if method not in ON_GPUS_ALONE)
            raise ValueError(f"methods is {methods!r}, which run on GPUs alone; accepted on a processor: one of {here}")
        wanted = one_of(compile_mode, (BEST_MODE, *COMPILE_MODES), "compile_mode")
        self.attention = attention.implementation(run.device)
        if not self._can_compile and wanted not in ("none", BEST_MODE):
            raise ValueError(
                f"compile_mode is {wanted!r}, which wants a GPU, Triton and one process; accepted here: none, {BEST_MODE}"
            )
        self.compile_mode = wanted if self._can_compile else "none"
        if self.weights == "random":  # which takes a large model a minute to make
            shape = model_shape(model)
            self._require_size(shape.num_hidden_layers, shape.max_position_embeddings)
        self.loaded = self._load()
        self._require_fit()

    @property
    def _can_compile(self) -> bool:
        return self.attention == attention.NAME  # which wants a GPU and Triton as well

    def _load(self) -> LoadedModel:
        """The unquantised model."""
        if self.weights == "random":
            return self._random(keep=not self.on_gpu)
        loaded = load_model(self.model, device=self.run.device)
        loaded.model.set_attn_implementation(self.attention)
        return loaded

    def _require_size(self, blocks: int, context: int) -> None:
        if self.layers > blocks:
            raise ValueError(f"layers is {self.layers}; accepted: 0 for all, or up to the model's {blocks}")
        longest = self.prompt_tokens + self.output_tokens[-1]
        if longest > context:
            raise ValueError(
                f"{self.prompt_tokens} prompt and {self.output_tokens[-1]} output tokens are {longest}; accepted: up to "
                f"{context}, the context of {self.model!r}"
            )

    def _require_fit(self) -> None:
        self._require_size(self.loaded.model.config.num_hidden_layers, self.loaded.context_length)
        resolve_plan(self.custom_plan or "w6a6", self._shapes)

    def resized(self, batch_size: int, prompt_tokens: int) -> EndToEndStudy:
        """The same study, of the same loaded model, with another batch size and prompt. Raises ValueError as it is made."""
        made = copy.copy(self)
        for name in ("prompt", "_logits", "_checked"):
            vars(made).pop(name, None)
        require_at_least(1, prompt_tokens=prompt_tokens, batch_size=batch_size)
        made.batch_size, made.prompt_tokens = batch_size, prompt_tokens
        made._require_fit()
        return made

    @cached_property
    def prompt(self) -> Tensor:
        """[batch_size, prompt_tokens] int64, random ids, the same for every method."""
        return self._random_tokens(self.batch_size, self.prompt_tokens, seed=self.seed)

    @property
    def calibration(self) -> Tensor:
        """[1, up to CALIBRATION_TOKENS] int64, random ids other than the prompt's, the same for every size."""
        return self._random_tokens(1, min(CALIBRATION_TOKENS, self.loaded.context_length), seed=self.seed + 1)

    def _random_tokens(self, *shape: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self.loaded.model.config.vocab_size, shape, generator=generator).to(self.run.device)

    def cases(self) -> Iterator[tuple[str, str]]:
        """(method, backend) in the order they are measured; the backend is `torch` for all but FlexQ's own methods."""
        for method in self.methods:
            yield method, self.backend if method in RULES else "torch" if method in METHODS else self.plan_backend

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
        """The model under this method, ready to run. Raises Skipped where this machine cannot run it."""
        dtype = self._dtype(method)
        dtype = None if dtype == self.loaded.model.dtype else dtype
        if self.weights == "random" and self.on_gpu:

            def convert(name: str, block: nn.Module) -> nn.Module:
                return self._converted(method, backend, block, name)

            return fuse_(self._random(dtype=dtype, convert=convert).model)  # each block is; now they know each other
        model = self.loaded.model if dtype is None else _with_parameters_in(self.loaded.model, dtype)
        return self._converted(method, backend, model)

    def _dtype(self, method: str) -> torch.dtype:
        """Of the model under this method: FP8 products come out in bfloat16."""
        in_bfloat16 = method == "bf16" or (method == "fp8" and self.on_gpu)
        return torch.bfloat16 if in_bfloat16 else self.loaded.model.dtype

    def _random(self, **options: Any) -> LoadedModel:
        """The model with random weights; options: of `random_model`."""
        loaded = random_model(self.model, device=self.run.device, layers=self.layers, seed=self.seed, **options)
        loaded.model.set_attn_implementation(self.attention)
        return loaded

    def _converted(self, method: str, backend: str, model: nn.Module, name: str = "") -> nn.Module:
        """A whole model, or one of its blocks, under this method; what was given is left alone.

        name: the block's; empty for the model. On a GPU projections are merged first, for FlexQ after it has quantised them.
        """
        blocks = model if not name else nn.ModuleDict({"block": nn.ModuleList([model])})
        if method in RULES or method not in METHODS:
            plan = self._plan(method)
            here = {
                layer: layer if not name else f"{name}.{layer.removeprefix('block.0.')}"
                for layer in linear_layers(blocks)
            }
            mine = PrecisionPlan(plan.name, {layer: plan.layers[full] for layer, full in here.items()}, plan.group_size)
            made = quantize_model(blocks, mine, backend=backend)
            made = fuse_(made) if self.on_gpu else made
        else:
            if self.on_gpu:
                blocks = fuse_(replace_linear_layers(blocks, lambda _, linear: linear))
                for block in blocks.modules():
                    if hasattr(block, "chain"):
                        block.chain = ()  # FlexQ's alone; a circle, in which what is replaced would wait to be collected
            made = self._baseline(method, blocks, name)
        return made if not name else made["block"][0]

    def _plan(self, method: str) -> PrecisionPlan:
        return resolve_plan(self.custom_plan if method not in RULES else method, self._shapes)

    @cached_property
    def _shapes(self) -> nn.Module:
        """The model's layers without their weights."""
        if not (self.weights == "random" and self.on_gpu):
            return self.loaded.model
        import transformers

        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(self.loaded.model.config)

    def _baseline(self, method: str, model: nn.Module, name: str) -> nn.Module:
        layers = linear_layers(model)
        if method == SMOOTHQUANT:
            if not self.on_gpu:
                raise Skipped("SmoothQuant's INT8 is timed on GPUs")
            linears.require_int8(layers)
            strength = smoothing_of(self.loaded.model)
            return smoothing.smoothed(model, self._ranges, strength, f"{name}." if name else "")
        if method == "w8a16":
            linears.require_weight_only(layers)
            return replace_linear_layers(model, lambda _, linear: Int8WeightLinear(linear))
        if method == "w8a8" and self.on_gpu:
            linears.require_int8(layers)
            return replace_linear_layers(model, lambda _, linear: Int8Linear(linear))
        if method == "w8a8":
            largest = max(layers.values(), key=lambda layer: layer.weight.numel())
            engine = linears.fastest_engine(largest, self.batch_size)
            return replace_linear_layers(model, lambda _, linear: DynamicInt8Linear(linear, engine))
        if method == "fp8":
            linears.require_fp8(layers, torch.device(self.run.device))
            return replace_linear_layers(model, lambda _, linear: Fp8Linear(linear))
        return model

    @cached_property
    def _ranges(self) -> smoothing.Ranges:
        """What the calibration's activations reach in the merged blocks of the unquantised model."""
        found = smoothing.Ranges()
        if self.weights == "random":

            def watched(name: str, block: nn.Module) -> nn.Module:
                block = self._converted(UNQUANTISED, "torch", block, name)
                found.watch_(block, f"{name}.")
                return block

            model = self._random(convert=watched, keep=False).model
        else:
            model = self._converted(UNQUANTISED, "torch", self.loaded.model)
            found.watch_(model)
        _prompt_logits(model, self.calibration)
        return found

    def table(self) -> pd.DataFrame:
        """Measure every case: a row a method and output length.

        Columns: method, backend, output_tokens, ttft_ms, tpot_ms (each with _p10 and _p90), total_s, tokens_per_s,
        linear_layers (how many; the record says on which kernels), linear_weights_mib, weights_mib (all of the model),
        kv_cache_mib, difference (of the logits), preemptions_per_token; on a GPU also peak_mib, workspace_mib, limit_ms,
        step_*_ms (see steps.py), tokens_as_eager of tokens_compared, and captured; and skipped, the reason, where a method
        could not run.
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
        """The paper's rows for this model, as `paper.end_to_end()`; none for a demo model, fewer blocks or larger batches."""
        rows = paper.end_to_end()
        return rows[(rows["model"] == self.loaded.name) & (self.layers == 0) & (self.batch_size == 1)]

    @property
    def ratios_model(self) -> str:
        """The model's name where ratios are claimed: all of it decodes one sequence on one Hopper GPU; else empty."""
        whole = self.on_gpu and not self.layers and self.batch_size == processes.count() == 1
        card = provenance(self.run.device)["device"]
        return self.loaded.name if whole and has_ratios(card, self.prompt_tokens) else ""

    def _inputs(self, method: str, backend: str) -> dict[str, Any]:
        """Everything that decides a case's numbers, the machine among it, as plain values."""
        inputs = {
            "backend": backend,
            **self.loaded.inputs,
            "dtype": str(self._dtype(method)).removeprefix("torch."),
            "weights": self.weights,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "batch_size": self.batch_size,
            "layers": self.layers,
            "repeats": self.repeats,
            "device": provenance(self.run.device)["device"],
            "threads": torch.get_num_threads(),
        }
        if self.on_gpu:
            inputs |= {"compile_mode": self.compile_mode, "attention": self.attention}
        if method not in METHODS:
            inputs["plan_sha256"] = hashlib.sha256(self.custom_plan.to_json().encode()).hexdigest()
        return inputs

    @cached_property
    def _logits(self) -> Tensor:
        """The unquantised model's logits on the prompt: [B, T, vocabulary] on the CPU."""
        return _prompt_logits(self.loaded.model, self.prompt)

    @cached_property
    def _checked(self) -> EndToEndStudy:
        """The study whose models' logits are compared: this one, or with random weights one of CHECKED_BLOCKS."""
        if self.weights == "pretrained" or self.loaded.model.config.num_hidden_layers <= CHECKED_BLOCKS:
            return self
        self._shapes, self.prompt  # noqa: B018 - a plan is for all blocks, and the prompt is the same
        checked = copy.copy(self)
        checked.layers = CHECKED_BLOCKS
        checked.loaded = checked._load()
        return checked

    def _measured(self, method: str, backend: str) -> dict[str, Measurement]:
        self._checked._logits, self._bandwidth_gbps  # noqa: B018 - while nothing else lies on the GPU
        _free()
        try:
            return self._timed(self.build(method, backend), method, backend)
        except torch.OutOfMemoryError as error:
            if processes.count() > 1:  # the others wait for this one: it must end, and not go on to the next method
                raise
            raise Skipped(f"it does not fit this GPU: {str(error).splitlines()[0]}") from None
        finally:
            torch.compiler.reset()  # compiled code keeps its model
            _free()

    def _timed(self, model: nn.Module, method: str, backend: str) -> dict[str, Measurement]:
        checked = self._checked
        layers, kernels = kernels_of(model, self.batch_size)
        _, kernels_of_prompt = kernels_of(model, self.batch_size * self.prompt_tokens)
        if kernels_of_prompt != kernels:
            kernels = f"{kernels}; for the prompt {kernels_of_prompt}"
        difference = checked._checked_difference(model if checked is self else checked.build(method, backend), method)
        size = model_bytes(model)
        choose = self.compile_mode == BEST_MODE
        engine = self._fastest_engine(model, backend) if choose else self._engine(model, self.compile_mode)
        mode = engine.compile_mode
        if mode != "none":
            engine.compile_prefill()
        self._warm_up(engine)
        if self.on_gpu:
            eager = self._engine(model, "none")
            first = min(EAGER_TOKENS, self.output_tokens[-1])
            expected = [eager.generate(self.prompt, first).tokens for _ in range(2)]
            del eager
            _free()
            torch.cuda.reset_peak_memory_stats()
            others = torch.cuda.memory_allocated() - size - scratch_bytes(model) - _whole_cache_bytes(engine)
            captured = backend not in _WAITING and engine.capture()
        before = preemptions()
        runs = [engine.generate(self.prompt) for _ in range(self.repeats)]
        preempted = preemptions() - before
        measured = {
            **_spread("ttft_ms", torch.tensor([run.ttft_ms for run in runs], dtype=torch.float64)),
            "weights_mib": Measurement(size / 2**20, "MiB"),
            "linear_layers": Measurement(layers, "layer", kernels),
            "linear_weights_mib": Measurement(block_weight_bytes(model) / 2**20, "MiB"),
            "difference": Measurement(difference, "1", "" if checked is self else f"of {CHECKED_BLOCKS} blocks"),
            "preemptions_per_token": Measurement(preempted / self.repeats / self.output_tokens[-1], "1"),
        }
        if self.output_tokens[-1] > 1:
            measured |= _spread("tpot_ms", torch.cat([run.steps_ms for run in runs]))
        if self.on_gpu:
            peak = torch.cuda.max_memory_allocated() - others
            as_eager = tokens_as_eager(runs[0].tokens, expected, captured and mode == "none")
            measured |= self._gpu_measurements(engine, peak - size)
            measured |= {
                "tokens_as_eager": as_eager,
                "tokens_compared": Measurement(first, "token"),
                "captured": Measurement(int(captured), "1", f"compiled: {mode}"),
            }
        for length in self.output_tokens:
            total_s = total_ms(runs, length) / 1e3
            cache = cache_bytes(runs[0].cache, self.prompt_tokens + length)
            measured[f"total_s/{length}"] = Measurement(total_s, "s")
            measured[f"tokens_per_s/{length}"] = Measurement(self.batch_size * length / total_s, "token/s")
            measured[f"kv_cache_mib/{length}"] = Measurement(cache / 2**20, "MiB")
        return measured

    def _engine(self, model: nn.Module, mode: str) -> Engine:
        """The engine of this study's size, in one of COMPILE_MODES."""
        return Engine(model, self.batch_size, self.prompt_tokens, self.output_tokens[-1], mode)

    def _fastest_engine(self, model: nn.Module, backend: str) -> Engine:
        """In the mode of those that compile with the shortest median step, each tried as it will be timed; nothing is captured.

        What needs more memory than there is in one of them may run in the other; torch.OutOfMemoryError where in neither.
        """
        steps_ms, failed = {}, None
        for mode in COMPILE_MODES[1:]:
            engine = None  # the one before, and its cache
            try:
                engine = self._engine(model, mode)
                steps_ms[mode] = self._tried_ms(engine, backend)
                engine.uncapture()
            except torch.OutOfMemoryError as error:
                engine, failed = None, error.with_traceback(None)  # whose frames hold what filled the memory
            _free()
        if not steps_ms:
            raise failed
        fastest = min(steps_ms, key=steps_ms.get)
        if engine is None or engine.compile_mode != fastest:  # what is compiled lives until another engine compiles
            engine = None
            _free()
            engine = self._engine(model, fastest)
        return engine

    def _tried_ms(self, engine: Engine, backend: str) -> float:
        """The median of some steps; 0 where there are none."""
        self._warm_up(engine)
        if backend not in _WAITING:
            engine.capture()
        steps_ms = engine.generate(self.prompt, min(_TRIED_TOKENS, self.output_tokens[-1])).steps_ms
        return steps_ms.median().item() if len(steps_ms) else 0.0

    def _gpu_measurements(self, engine: Engine, beside_weights: int) -> dict[str, Measurement]:
        """Memory beside the weights, the limit of a step, and its parts."""
        middle = self.prompt_tokens + self.output_tokens[-1] // 2
        read = step_bytes(engine.model, engine.cache, middle)
        kept = _whole_cache_bytes(engine)
        measured = {
            "peak_mib": Measurement((beside_weights + model_bytes(engine.model)) / 2**20, "MiB"),
            "workspace_mib": Measurement(
                (beside_weights - kept) / 2**20, "MiB", "peak less weights and the whole cache"
            ),
            "limit_ms": Measurement(
                read / self._bandwidth_gbps / 1e6, "ms", "weights and cache at the measured bandwidth"
            ),
        }
        if self.output_tokens[-1] >= 2 * STEPS:
            parts, products = parts_ms(engine.rehearse(STEPS))
            measured |= {
                f"step_{part}_ms": Measurement(value, "ms", products if part == "gemm" else "")
                for part, value in parts.items()
            }
        return measured

    @cached_property
    def _bandwidth_gbps(self) -> float:
        """Of copying on this GPU, reads and writes counted; 0 on a processor."""
        return machine_limits(self.run)["copy_bandwidth_gbps"] if self.on_gpu else 0.0

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

    def _warm_up(self, engine: Engine) -> None:
        """Decode untimed for a second: threads spread over the processors, clocks rise, the allocator has its blocks."""
        end = time.perf_counter() + _WARM_UP_S
        while True:
            engine.warm_up(self.prompt)
            if time.perf_counter() >= end:
                return


def tokens_as_eager(tokens: Tensor, expected: list[Tensor], exact: bool) -> Measurement:
    """How many tokens are those of the eager model before the first that is not.

    tokens: [B, L] int64.  expected: what the eager model wrote each time, [B, up to L] int64.  exact: whether the same kernels
    ran, captured. Then tokens must be the same: RuntimeError, unless the eager model's own differ from one time to the next.
    Compiled, sums may round differently and a near tie may fall to the other side, after which a text goes its own way.
    """
    compared = expected[0].shape[1]
    agreed = max(int((tokens[:, :compared] == each).all(0).long().cumprod(0).sum()) for each in expected)
    repeats = all(torch.equal(each, expected[0]) for each in expected)
    if exact and repeats and agreed < compared:
        raise RuntimeError(f"the captured model's tokens differ from the eager model's from token {agreed} on")
    return Measurement(agreed, "token", f"of {compared}" + ("" if repeats else "; the eager model's own differ"))


def _whole_cache_bytes(engine: Engine) -> int:
    """Bytes of all keys and values that an engine's cache has places for."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in engine.cache.layers)


def _free() -> None:
    """Give back what nothing refers to any more; graphs and compiled code refer to models in circles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


_NUMBERS = (
    *("ttft_ms", "ttft_ms_p10", "ttft_ms_p90", "tpot_ms", "tpot_ms_p10", "tpot_ms_p90", "total_s", "tokens_per_s"),
    *("linear_weights_mib", "weights_mib", "kv_cache_mib", "difference", "preemptions_per_token"),
    *(
        "limit_ms",
        "tokens_as_eager",
        "tokens_compared",
        "step_gemm_ms",
        "step_attention_ms",
        "step_other_ms",
        "step_idle_ms",
    ),
)


def _spread(metric: str, times_ms: Tensor) -> dict[str, Measurement]:
    quantiles = {metric: 0.5, f"{metric}_p10": 0.1, f"{metric}_p90": 0.9}
    return {name: Measurement(times_ms.quantile(q).item(), "ms") for name, q in quantiles.items()}


@torch.no_grad()
def _prompt_logits(model: nn.Module, prompt: Tensor) -> Tensor:
    return model(input_ids=prompt, use_cache=False).logits.float().cpu()


def _with_parameters_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A new model with parameters in this dtype; buffers stay, for rounded rotary frequencies would be another model."""
    made = copy.deepcopy(model)
    for parameter in made.parameters():
        parameter.data = parameter.data.to(dtype)
    return made
