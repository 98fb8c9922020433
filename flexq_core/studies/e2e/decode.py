"""Greedy decoding, timed token by token: one engine for every method.

On a GPU the prefill and the decode step are captured once each in a CUDA graph and replayed: nothing is launched, and nothing
waits, between tokens. Both may be compiled by torch first, to round as the eager model does, but for sums in another order:
of a random LLaMA-13B in FP16 the first 15 of 64 tokens are the eager model's, and before the prefill was compiled all were.
On a processor both are called.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch._inductor
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

COMPILE_MODES = ("none", "default", "max-autotune-no-cudagraphs")
"""How the decode step is compiled: not at all, or in this mode of torch.compile. Only the last tunes matrix products, which makes
some methods faster and others slower."""

_PREFILL_MODE = "default"
"""Of torch.compile: a prefill's products are large, and the library's own choice is as good as one that is tuned for minutes."""

_AS_EAGER = {"emulate_precision_casts": True, "eager_numerics.division_rounding": True}
"""Settings of Inductor under which fused operations round between them as separate ones do, and divide exactly.

By default what is fused stays in float32 where the eager model rounds to half precision, and Triton divides approximately.
Either moves a last bit, a near tie falls to the other side, and the text goes its own way: of a random LLaMA after one
token. Rounding costs a few instructions of kernels that wait for memory.
"""

_REPEATABLE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Of torch's attentions all but cuDNN's, which may give other bits each time (see attention.py)."""

_WARM_UP_STEPS = 2


def _decodes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run without gradients, and with attention that gives the same each time."""
    return torch.no_grad()(sdpa_kernel(_REPEATABLE)(function))


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, **options: Any) -> Iterator[None]:
    """torch.cuda.graph with these options, while nothing is collected: a graph that ends within makes CUDA give the capture up.

    Engines and their compiled code refer to each other in circles, so that only the collector ends what one had captured.
    """
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, **options):
            yield
    finally:
        if collects:
            gc.enable()


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


def cache_bytes(cache: Any, tokens: int) -> int:
    """Bytes of keys and values that `tokens` positions take of a StaticCache; a sliding layer holds no more than its window."""
    total = 0
    for layer in cache.layers:
        places = layer.keys.shape[-2]
        total += (layer.keys.nbytes + layer.values.nbytes) // places * min(tokens, places)
    return total


def generate(model: nn.Module, prompt: Tensor, output_tokens: int) -> Generation:
    """Decode once, with nothing compiled or captured; see `Engine`."""
    return Engine(model, *prompt.shape, output_tokens).generate(prompt)


class Engine:
    """A model that decodes exactly `output_tokens` tokens after prompts of one shape, whatever the tokens are.

    model: a causal language model, on the device where it runs.  batch_size, prompt_tokens, output_tokens: 1 or more.
    compile_mode: of the step, one of COMPILE_MODES; what other engines had compiled before is given up, and would be compiled
    anew.
    `generate` may be called at once; `compile_prefill`, `warm_up` and then `capture` first make it fast on a GPU.
    """

    def __init__(
        self, model: nn.Module, batch_size: int, prompt_tokens: int, output_tokens: int, compile_mode: str = "none"
    ) -> None:
        device = next(model.parameters()).device
        self.model, self.device, self.output_tokens = model, device, output_tokens
        self.compile_mode = compile_mode
        longest = prompt_tokens + output_tokens
        self.cache, self._length = _cache(model.config, longest, device)

        def tokens(count: int) -> Tensor:
            return torch.zeros(batch_size, count, dtype=torch.long, device=device)

        # What is replayed reads and writes these, wherever they lie now.
        self._prompt, self._ids, self.written = tokens(prompt_tokens), tokens(1), tokens(output_tokens)
        self._positions = torch.arange(longest, device=device)
        self._at = torch.zeros(1, dtype=torch.long, device=device)  # of the token that the next step takes
        # OPT would ask the GPU how many positions there are; later ones are masked all the same.
        self._mask = torch.ones(batch_size, longest, dtype=torch.long, device=device)
        self._launched_prefill: Callable[[], None] = self._run_prefill
        self._launched_step: Callable[[], None] = self._run_step
        if compile_mode != "none":
            torch.compiler.reset()  # after eight models of one code torch would compile no more
            self._launched_step = _compiled(self._run_step, compile_mode)
        self.uncapture()

    def compile_prefill(self) -> None:
        """Have the prefill compiled, too, which takes as long again: not for an engine whose step is only tried."""
        self._launched_prefill = _compiled(self._run_prefill, _PREFILL_MODE)
        self.uncapture()

    @_decodes
    def generate(self, prompt: Tensor, output_tokens: int = 0) -> Generation:
        """Decode greedily and time every token.

        prompt: [batch_size, prompt_tokens] int64, no padding.  output_tokens: 0 for all, or fewer.
        On a GPU the marks are events on its stream and nothing waits between steps.
        """
        self._prompt.copy_(prompt)
        self._reset()
        watch = _Stopwatch(self.device)
        watch.mark()
        self._prefill()
        watch.mark()
        count = output_tokens or self.output_tokens
        for _ in range(count - 1):
            self._step()
            watch.mark()
        gaps_ms = watch.gaps_ms()
        return Generation(self.written[:, :count].clone(), gaps_ms[0].item(), gaps_ms[1:], self.cache)

    @_decodes
    def warm_up(self, prompt: Tensor) -> None:
        """Run the prefill and a few steps: what compiles, chooses or allocates does so now."""
        self._prompt.copy_(prompt)
        self._reset()
        self._prefill()
        for _ in range(min(_WARM_UP_STEPS, self.output_tokens - 1)):
            self._step()

    @_decodes
    def capture(self) -> bool:
        """Capture prefill and step in CUDA graphs, after `warm_up`; False where this device or cache cannot."""
        self.uncapture()
        if self.device.type != "cuda" or self._length is None:
            return False
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.warm_up(self._prompt)  # libraries keep a workspace a stream
        torch.cuda.synchronize(self.device)
        pool = None
        for name in ("_prefill", "_step")[: self.output_tokens]:  # one token takes no step, and none has been compiled
            graph = torch.cuda.CUDAGraph()
            with capturing(graph, pool=pool, stream=stream):
                getattr(self, name)()
            pool = graph.pool()
            setattr(self, name, graph.replay)
        return True

    def uncapture(self) -> None:
        """Give the graphs up, and with them what they hold of the GPU's memory: what is compiled stays."""
        self._prefill: Callable[[], None] = self._launched_prefill
        self._step: Callable[[], None] = self._launched_step

    @_decodes
    def rehearse(self, steps: int) -> Callable[[], None]:
        """What runs one decode step, up to `steps` times, in the middle of an output; for a profiler.

        Raises ValueError for an output of fewer than twice as many tokens.
        """
        if self.output_tokens < 2 * steps:
            raise ValueError(f"an output of {self.output_tokens} tokens has no {steps} steps in its middle")
        self._reset()
        self._advance(self._prompt.shape[1] + (self.output_tokens - steps) // 2)
        return _decodes(self._step)

    def _reset(self) -> None:
        self.cache.reset()
        self._at.zero_()
        self._advance(0)

    def _forward(self, ids: Tensor, at: Tensor) -> Tensor:
        """Logits of the last of these tokens: [B, 1, vocabulary]."""
        return self.model(
            input_ids=ids,
            past_key_values=self.cache,
            position_ids=at.expand(len(ids), -1),
            attention_mask=self._mask,
            use_cache=True,
            logits_to_keep=1,
        ).logits

    def _run_prefill(self) -> None:
        tokens = self._prompt.shape[1]
        logits = self._forward(self._prompt, self._positions[:tokens])
        self._ids.copy_(logits[:, -1:].argmax(-1))
        self.written[:, :1].copy_(self._ids)
        self._advance(tokens)

    def _run_step(self) -> None:
        logits = self._forward(self._ids, self._at)
        self._ids.copy_(logits[:, -1:].argmax(-1))
        self._advance(1)
        self.written.index_copy_(1, self._at - self._prompt.shape[1], self._ids)

    def _advance(self, tokens: int) -> None:
        self._at.add_(tokens)
        if self._length is not None:
            self._length.copy_(self._at[0])


def _compiled(run: Callable[[], None], mode: str) -> Callable[[], None]:
    options = torch._inductor.list_mode_options(mode) | _AS_EAGER
    return torch.compile(run, fullgraph=True, dynamic=False, options=options)


def _cache(config: Any, longest: int, device: torch.device) -> tuple[Any, Tensor | None]:
    """A StaticCache, and the number of positions that its layers share, or None where they count for themselves.

    transformers lets each layer count on the GPU, a kernel a layer and step for the same number.
    """
    import transformers
    from transformers.cache_utils import StaticLayer

    class Layer(StaticLayer):
        """A layer whose length others set."""

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            at = torch.arange(key_states.shape[-2], device=self.device) + self.cumulative_length
            self.keys.index_copy_(2, at, key_states)
            self.values.index_copy_(2, at, value_states)
            return self.keys, self.values

    cache = transformers.StaticCache(config=config, max_cache_len=longest)
    if any(type(layer) is not StaticLayer for layer in cache.layers):
        return cache, None
    length = torch.zeros((), dtype=torch.long, device=device)
    for index in range(len(cache.layers)):
        cache.layers[index] = Layer(max_cache_len=longest)
        cache.layers[index].cumulative_length = length
    return cache, length


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
