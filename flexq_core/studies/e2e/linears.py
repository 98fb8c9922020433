"""The linear layers that FlexQ is compared with end to end, as torch computes them, and the bytes that models take.

Each takes an nn.Linear and leaves it alone. On a GPU all are written for torch.compile, which makes one kernel of quantising
activations with the norm before them, and scales a product in the kernel that reads it.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexq_core.quant.layers import linear_layers
from flexq_core.runtime.convert import linear_weight_bytes
from flexq_core.runtime.linear import FlexQLinear
from flexq_core.studies.e2e.processes import local_part
from flexq_core.workbook.records import Skipped

_INT8_ENGINES = ("onednn", "x86", "fbgemm")
_INT_MM_ROWS = 17
"""That `torch._int_mm` wants at least on a GPU; in 03_kernels 32 are slower in nearly every shape."""

_FEW_TOKENS = 64
"""Up to which FP8 scales are applied to the product and not in it."""


class _EightBitLinear(nn.Module):
    """Codes of 8 bits and a scale an output channel. Buffers: weight [N, K], weight_scale [N].

    kernel: what multiplies, for records.
    """

    kernel: str

    def __init__(self, linear: nn.Linear, codes: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", codes)
        self.register_buffer("weight_scale", scales)
        self.bias = linear.bias

    def weight_bytes(self) -> int:
        """Bytes of the weight with its scales."""
        return self.weight.nbytes + self.weight_scale.nbytes


class Int8WeightLinear(_EightBitLinear):
    """W8A16: INT8 weights, a scale an output channel.

    On a CPU bfloat16 activations through torch's `_weight_int8pack_mm`: a plain baseline as torch ships it. On a GPU a product
    with the weights cast in it, which torch.compile fuses for few tokens (so do gpt-fast and torchao).
    Buffers: weight [N, K] int8, weight_scale [N] bfloat16.
    """

    kernel = "INT8 weights cast in the product"

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear, *_int8_rows(linear.weight.data, torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N] in x's dtype."""
        if x.is_cuda:
            y = F.linear(x, self.weight.to(x.dtype)) * self.weight_scale.to(x.dtype)
            return y if self.bias is None else y + self.bias
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        y = torch._weight_int8pack_mm(rows, self.weight, self.weight_scale).to(x.dtype)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)


class Int8Linear(_EightBitLinear):
    """W8A8 on a GPU: a scale an output channel and a token, exact integer sums by `torch._int_mm` (cuBLAS).

    It takes no fewer than 17 rows. So that none is copied or cleared, codes of fewer tokens are written into rows that the
    layer keeps, by the kernel that quantises; what the others hold is multiplied and left.
    Buffers: weight [N, K] int8, weight_scale [N] float32, rows [17, K] int8. K and N are multiples of 8.
    """

    kernel = "torch._int_mm, a scale a token"

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear, *_int8_rows(linear.weight.data, torch.float32))
        self.register_buffer("rows", self.weight.new_zeros(_INT_MM_ROWS, self.weight.shape[1]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N] in x's dtype."""
        codes, scales = self._codes(x.reshape(-1, x.shape[-1]))
        tokens = len(codes)
        if tokens < _INT_MM_ROWS:
            self.rows[:tokens].copy_(codes)
            codes = self.rows
        sums = torch._int_mm(codes, self.weight.T)[:tokens]
        y = (sums * scales * self.weight_scale).to(x.dtype)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)

    def _codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of tokens [M, K]: codes [M, K] int8, and scales that multiply the sums [M, N]."""
        codes, scales = _int8_rows(x, torch.float32)
        return codes, scales[:, None]


class StaticInt8Linear(Int8Linear):
    """W8A8 whose activations have one scale, fixed in advance: SmoothQuant's fastest setting (its O3).

    Codes are an elementwise product, with no maximum to wait for.
    Buffers: as Int8Linear's, and activation_scale [] float32.
    """

    kernel = "torch._int_mm, a scale a layer"

    def __init__(self, linear: nn.Linear, largest: Tensor) -> None:
        """largest: [] float32, the magnitude that activations reach; beyond it they are clipped."""
        super().__init__(linear)
        scale = (largest.float() / 127).clamp(min=torch.finfo(torch.float32).tiny)
        self.register_buffer("activation_scale", scale)

    def _codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        codes = (x.float() / self.activation_scale).round().clamp(-127, 127).to(torch.int8)
        return codes, self.activation_scale


class Fp8Linear(_EightBitLinear):
    """W8A8 in FP8 (e4m3) on a GPU: a scale an output channel and a token, through `torch._scaled_mm`.

    Given those scales, `_scaled_mm` takes CUTLASS kernels, which are made for many tokens; given one scale, cuBLASLt's, which
    are some 1.4 times as fast at few. Few tokens' codes are therefore multiplied as they are, and the scales applied to the
    product, which torch.compile fuses with what reads it. The product comes out in bfloat16, whose range is float32's; it is
    rounded before the scales as well as after them.
    Buffers: weight [N, K] float8_e4m3fn, weight_scale [N] float32, one [] float32. K and N are multiples of 16.
    """

    kernel = f"torch._scaled_mm, scales after it up to {_FEW_TOKENS} tokens"

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear, *_fp8_rows(linear.weight.data))
        self.register_buffer("one", self.weight_scale.new_ones(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N] in x's dtype."""
        codes, scales = _fp8_rows(x.reshape(-1, x.shape[-1]))
        options = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
        if len(codes) <= _FEW_TOKENS:
            product = torch._scaled_mm(codes, self.weight.T, self.one, self.one, **options)
            y = product * scales[:, None] * self.weight_scale
        else:
            y = torch._scaled_mm(codes, self.weight.T, scales[:, None], self.weight_scale[None, :], **options)
        y = y.to(x.dtype)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)


class DynamicInt8Linear(nn.Module):
    """W8A8 on a CPU: torch's dynamic quantisation, a scale an output channel, activations a scale a call.

    Its packed weight is no tensor that could be counted; what it holds is a byte a weight, and a float32 scale and an int32
    zero point a channel.
    """

    def __init__(self, linear: nn.Linear, engine: str) -> None:
        super().__init__()
        self._weights, self._outputs = linear.weight.numel(), linear.out_features
        self._bias_bytes = 0 if linear.bias is None else linear.bias.nbytes
        self.kernel = f"torch's dynamic INT8, {engine}"
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


_EIGHT_BIT_LAYERS = (_EightBitLinear, DynamicInt8Linear)


def block_weight_bytes(model: nn.Module) -> int:
    """Bytes of the weights of the blocks' linear layers in the form they have: floating point, 8 bits or packed, with scales."""
    eight = sum(layer.weight_bytes() for layer in model.modules() if isinstance(layer, _EIGHT_BIT_LAYERS))
    return eight + linear_weight_bytes(model)


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers here, memory that several share counted once, and of what torch packs out of sight.

    What layers only write to, `scratch_bytes`, is left out: it is no weight, and a step does not read it from memory.
    """
    tensors = map(local_part, (*model.parameters(), *model.buffers()))
    held = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
    hidden = sum(layer.hidden_bytes() for layer in model.modules() if isinstance(layer, DynamicInt8Linear))
    return sum(held.values()) + hidden - scratch_bytes(model)


def kernels_of(model: nn.Module, tokens: int) -> tuple[int, str]:
    """How many linear layers the blocks have, and on what they run when given so many tokens, in writing."""
    found: Counter[str] = Counter()
    for layer in model.modules():
        if isinstance(layer, FlexQLinear):
            found[f"flexq {layer.backend_for(tokens)}"] += 1
        elif isinstance(layer, _EIGHT_BIT_LAYERS):
            found[layer.kernel] += 1
    if plain := [layer for layer in linear_layers(model).values() if type(layer) is nn.Linear]:
        found[f"torch's {str(plain[0].weight.dtype).removeprefix('torch.')} product"] += len(plain)
    return found.total(), "; ".join(f"{count} × {kernel}" for kernel, count in found.items())


def scratch_bytes(model: nn.Module) -> int:
    """Bytes of the rows that INT8 layers keep for few tokens' codes."""
    return sum(local_part(layer.rows).nbytes for layer in model.modules() if isinstance(layer, Int8Linear))


def _int8_rows(x: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes [M, K] int8 in [-127, 127] and scales [M] so that x ≈ codes * scales; codes belong to the scale as it is stored."""
    scales = (x.float().abs().amax(-1) / 127).to(scale_dtype)
    steps = scales.float().clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    return (x.float() / steps).round().clamp(-127, 127).to(torch.int8), scales


def _fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [M, K] float8_e4m3fn and scales [M] float32 so that x ≈ codes * scales."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    scales = (x.float().abs().amax(-1) / largest).clamp(min=torch.finfo(torch.float32).tiny)
    return (x.float() / scales[:, None]).clamp(-largest, largest).to(torch.float8_e4m3fn), scales


def require_fp8(layers: dict[str, nn.Linear], device: torch.device) -> None:
    """Raise Skipped unless `Fp8Linear` runs there on these layers."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise Skipped("FP8 products run on GPUs of compute capability 8.9 or later")
    _require_multiples(layers, 16, "FP8")


def require_int8(layers: dict[str, nn.Linear]) -> None:
    """Raise Skipped unless `Int8Linear` takes these layers."""
    _require_multiples(layers, 8, "INT8")


def _require_multiples(layers: dict[str, nn.Linear], of: int, what: str) -> None:
    if any(size % of for layer in layers.values() for size in layer.weight.shape):
        raise Skipped(f"torch's {what} product on a GPU takes layers whose sizes are multiples of {of}")


def require_weight_only(layers: dict[str, nn.Linear]) -> None:
    """Raise Skipped unless torch's INT8 weight-only product runs on every shape of these layers here."""
    for linear in {tuple(layer.weight.shape): layer for layer in layers.values()}.values():
        try:
            made = Int8WeightLinear(linear)
            made(torch.zeros(1, linear.in_features, dtype=linear.weight.dtype, device=linear.weight.device))
        except (AttributeError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise Skipped(f"torch's INT8 weight-only product does not run here: {reason}") from None


def fastest_engine(linear: nn.Linear, rows: int) -> str:
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
