"""The one op, `flexq::w6ax_linear`, and its backends.

Every backend computes the same numbers up to the rounding of the outer float32 sum:

    Y[m,n] = 2^e[n] * sum_g sx[m,g] * sw[n,g] * (sum_{k in g} qx[m,k] * qw[n,k]) + bias[n]

    reference   torch, any device: the definition, group by group
    cpu         the compiled kernel in kernels/cpu
    imma        kernels/cuda/w6ax_imma.cu: weights unpacked to bytes in registers, INT8 tensor cores
    wgmma       kernels/cuda/w6ax_wgmma.cu: the same on Hopper's wider instructions, for many tokens
    bmma        kernels/cuda/w6ax_bmma.cu: bit planes on binary tensor cores, the paper's method
    simulate    fake quantisation: dequantised operands in a floating-point matrix product, as papers measure accuracy
    auto        the fastest of these that this machine has, never `simulate`; on a GPU imma or wgmma by the shape, see auto.py

Weights and activations have 2 to 8 bits. `cpu`, `imma` and `wgmma` read 6-bit weights, with activations of any of these;
`bmma` reads all, compiled on demand for weights of another width or activations of neither 6 nor 8 bits.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode

from flexq_core.quant.packing import packed_bytes, unpack_codes
from flexq_core.quant.quantize import Quantized, dequantize, fake_quantize, quantize_groups
from flexq_core.quant.spec import GROUP_SIZE, WEIGHT_BITS, group_count, require_bits
from flexq_core.runtime import build, cpu, cuda

FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def w6ax_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_exponent: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    activation_bits: int,
    group_size: int,
    backend: str,
) -> Tensor:
    """Linear layer on packed weights, with activations quantised on the way in (FlexQ §3).

    x: [..., K] float32, float16 or bfloat16; any leading shape, also empty.
    weight: [N, Kp * weight_bits / 8] uint8, the canonical packing of quant/packing.py, Kp = K rounded up to group_size.
    weight_scale: [N, Kp / group_size] float16.  weight_exponent: [N] int8.  bias: [N] floating point, or None.
    weight_bits, activation_bits: 2 to 8.  backend: one of BACKENDS.
    Returns [..., N] in x's dtype.
    Raises TypeError or ValueError for what does not fit, before anything is computed, and ValueError for a
    non-finite x; but the GPU's kernels, which wait for nothing, return NaN for each token that is not finite.
    They also repack the weights in each call: `w6ax_linear_repacked` is for weights that stay.
    """
    run = _w6ax_linear if direct(x) else torch.ops.flexq.w6ax_linear
    return run(x, weight, weight_scale, weight_exponent, bias, weight_bits, activation_bits, group_size, backend)


def direct(x: Tensor, *operands: object) -> bool:
    """Whether nobody traces or differentiates an op of these, so that torch's dispatcher can be left out.

    Going through it takes a tenth of a millisecond once weights have swept its code from the caches, as much as a fifth of
    a small layer.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and not (torch.is_grad_enabled() and any(getattr(each, "requires_grad", False) for each in (x, *operands)))
        and _get_current_dispatch_mode() is None
    )


def _w6ax_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_exponent: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    activation_bits: int,
    group_size: int,
    backend: str,
) -> Tensor:
    _require_fit(x, weight, weight_scale, weight_exponent, bias, weight_bits, activation_bits, group_size)
    run = _BACKENDS[resolve_backend(backend, x.device, weight_bits, group_size, activation_bits)]
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], weight.shape[0])
    packed = (weight, weight_scale, weight_exponent)
    y = run(rows, packed, bias, weight_bits, activation_bits, group_size)
    return y.view(*x.shape[:-1], weight.shape[0])


def for_inference(operator: torch.library.CustomOpDef) -> None:
    """Let an op be traced while gradients are on, as for `torch.compile`, and say of `backward` that it has none."""

    def backward(ctx, *gradients):
        gradient = next(each for each in gradients if each is not None and each.is_floating_point())
        wanted = zip(ctx.needs_input_grad, ctx.shapes, strict=True)
        return tuple(_no_gradient(gradient, shape) if needed else None for needed, shape in wanted)

    def setup_context(ctx, inputs, output):
        ctx.shapes = [each.shape if isinstance(each, Tensor) else None for each in inputs]

    operator.register_autograd(backward, setup_context=setup_context)


@torch.library.custom_op("flexq::no_gradient", mutates_args=())
def _no_gradient(gradient: Tensor, shape: Sequence[int]) -> Tensor:
    """An op, so that it raises when `backward` runs and not when it is traced."""
    raise RuntimeError(
        "quantised layers are for inference and have no gradients: call backward on the unquantised model, or run this one "
        "under torch.no_grad() or torch.inference_mode()"
    )


@_no_gradient.register_fake
def _(gradient, shape):
    return gradient.new_empty(shape)


_operator = torch.library.custom_op("flexq::w6ax_linear", _w6ax_linear, mutates_args=())
for_inference(_operator)


@_operator.register_fake
def _(x, weight, weight_scale, weight_exponent, bias, weight_bits, activation_bits, group_size, backend):
    _require_fit(x, weight, weight_scale, weight_exponent, bias, weight_bits, activation_bits, group_size)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def w6ax_linear_repacked(
    x: Tensor, chunks: Tensor, weight_exponent: Tensor, bias: Tensor | None, activation_bits: int, backend: str
) -> Tensor:
    """`w6ax_linear` on a GPU, on weights that `cuda.repack` has put into the order of the backend's kernel.

    x: [..., K] float32, float16 or bfloat16.  chunks: [ceil(N / 32), ceil(K / 128), 3136] uint8, for `bmma` and weights of
    other than 6 bits cuda.chunk_bytes of them.  weight_exponent: [N] int8.  bias: [N] or None.  activation_bits: 2 to 8.
    backend: `imma`, `wgmma` or `bmma`, or `auto` for the faster of the first two, whose weights are the same.
    Returns [..., N] in x's dtype. Raises TypeError or ValueError for what does not fit.
    """
    run = _w6ax_linear_repacked if direct(x) else torch.ops.flexq.w6ax_linear_repacked
    return run(x, chunks, weight_exponent, bias, activation_bits, backend)


def _w6ax_linear_repacked(
    x: Tensor, chunks: Tensor, weight_exponent: Tensor, bias: Tensor | None, activation_bits: int, backend: str
) -> Tensor:
    _require_repacked(x, chunks, weight_exponent, bias, activation_bits, backend)
    y = cuda.w6ax_linear(x.reshape(-1, x.shape[-1]), chunks, weight_exponent, bias, activation_bits, backend)
    return y.view(*x.shape[:-1], weight_exponent.shape[0])


_repacked_operator = torch.library.custom_op("flexq::w6ax_linear_repacked", _w6ax_linear_repacked, mutates_args=())
for_inference(_repacked_operator)


@_repacked_operator.register_fake
def _(x, chunks, weight_exponent, bias, activation_bits, backend):
    _require_repacked(x, chunks, weight_exponent, bias, activation_bits, backend)
    return x.new_empty(*x.shape[:-1], weight_exponent.shape[0])


def resolve_backend(
    backend: str,
    device: torch.device | str,
    weight_bits: int = 6,
    group_size: int = GROUP_SIZE,
    activation_bits: int = 6,
) -> str:
    """The backend that `backend` means for such a layer on this device: itself, or what `auto` chooses.

    On a GPU `auto` stays `auto` where 6-bit weights meet its kernels: which of them depends on the shape; for other weights
    it is `bmma`. The kernel is compiled where it can be, and where it cannot `auto` says once why.
    Raises ValueError for an unknown backend, or one that cannot run there (says why, and which remain).
    """
    require_backend(backend)
    if backend in ("reference", "simulate"):
        return backend
    device = torch.device(device)
    wanted = backend
    if backend == "auto":
        wanted = "cpu" if device.type != "cuda" else "auto" if weight_bits == 6 else "bmma"
    if wanted == "cpu":
        load, obstacle = build.cpu_kernel, cpu.obstacle(device, weight_bits, group_size)
    else:
        load = functools.partial(cuda.prepare, device, wanted, weight_bits, activation_bits)
        obstacle = cuda.obstacle(device, weight_bits, group_size, wanted)
    if obstacle is None:
        try:
            load()
            return wanted
        except build.BuildError as error:
            obstacle = str(error)
    if backend != "auto":
        raise ValueError(f"backend {backend!r} cannot run here: {obstacle}; use 'reference' or 'auto'")
    if device.type == "cuda" or (device.type == "cpu" and weight_bits == 6):
        _warn_once(f"the compiled {device.type.upper()} kernel is not used: {obstacle}")
    return "reference"


def _run_reference(x, packed, bias, weight_bits, activation_bits, group_size) -> Tensor:
    activations = quantize_groups(x, bits=activation_bits, group_size=group_size)
    return reference_product(activations.codes, activations.scales, *packed, bias, weight_bits).to(x.dtype)


def reference_product(
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_exponent: Tensor,
    bias: Tensor | None,
    weight_bits: int,
) -> Tensor:
    """The definition, group by group, on activations that are quantised: codes [M, Kp] int8 and scales [M, G] float32.

    The rest as for `w6ax_linear`.  Returns [M, N] float32.
    """
    groups = scales.shape[1]
    largest_sum = codes.shape[1] // groups * 2 ** (weight_bits - 1) * 2**7  # of a group, for activations of 8 bits
    exact = torch.float32 if largest_sum <= 2**24 else torch.float64
    qx = codes.unflatten(-1, (groups, -1)).to(exact)
    qw = unpack_codes(weight, weight_bits).unflatten(-1, (groups, -1)).to(exact)
    y = torch.zeros(len(codes), len(weight), dtype=torch.float32, device=codes.device)
    for group in range(groups):
        inner = (qx[:, group] @ qw[:, group].T).float()
        y += inner * (scales[:, group, None] * weight_scale[:, group].float())
    y = torch.ldexp(y, weight_exponent.int())
    return y if bias is None else y + bias.float()


def _run_simulate(x, packed, bias, weight_bits, activation_bits, group_size) -> Tensor:
    weight, weight_scale, weight_exponent = packed
    codes = unpack_codes(weight, weight_bits)
    stored = Quantized(codes, weight_scale, weight_bits, group_size, x.shape[-1], weight_exponent)
    x = fake_quantize(x, bits=activation_bits, group_size=group_size)
    return F.linear(x, dequantize(stored, x.dtype), None if bias is None else bias.to(x.dtype))


def _run_cpu(x, packed, bias, weight_bits, activation_bits, group_size) -> Tensor:
    return cpu.w6ax_linear(x, *packed, bias, activation_bits)


def _run_cuda(backend: str) -> Callable[..., Tensor]:
    def run(x, packed, bias, weight_bits, activation_bits, group_size) -> Tensor:
        weight, weight_scale, weight_exponent = packed
        chunks = cuda.repack(weight, weight_scale, backend)
        return cuda.w6ax_linear(x, chunks, weight_exponent, bias, activation_bits, backend)

    return run


_BACKENDS: dict[str, Callable[..., Tensor]] = {
    "auto": _run_cuda("auto"),  # elsewhere `auto` has been resolved
    "reference": _run_reference,
    "cpu": _run_cpu,
    "imma": _run_cuda("imma"),
    "wgmma": _run_cuda("wgmma"),
    "bmma": _run_cuda("bmma"),
    "simulate": _run_simulate,
}
BACKENDS = tuple(_BACKENDS)


def require_backend(backend: str) -> None:
    """Raise ValueError unless a backend has this name; whether it runs here is asked when it does."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; accepted: {', '.join(BACKENDS)}")


def _require_fit(x, weight, weight_scale, weight_exponent, bias, weight_bits, activation_bits, group_size) -> None:
    require_bits(weight_bits, what="weight bits")
    require_bits(activation_bits, what="activation bits")
    _require_floats(x)
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; accepted: [N, bytes], packed weights of N outputs")
    outputs, groups = weight.shape[0], group_count(x.shape[-1], group_size)
    expected = {
        "weight": (weight, torch.uint8, (outputs, packed_bytes(groups * group_size, weight_bits))),
        "weight_scale": (weight_scale, torch.float16, (outputs, groups)),
        "weight_exponent": (weight_exponent, torch.int8, (outputs,)),
    }
    if bias is not None:
        expected["bias"] = (bias, bias.dtype if bias.dtype in FLOAT_TYPES else x.dtype, (outputs,))
    layer = f"x of {x.shape[-1]} features, {weight_bits}-bit weights and groups of {group_size}"
    _require_operands(x, expected, layer)


def _require_repacked(x, chunks, weight_exponent, bias, activation_bits, backend) -> None:
    if backend not in cuda.BACKENDS:
        raise ValueError(f"backend is {backend!r}; accepted for repacked weights: {', '.join(cuda.BACKENDS)}")
    require_bits(activation_bits, what="activation bits")
    _require_floats(x)
    if x.device.type != "cuda":
        raise ValueError(f"x is on {x.device}; accepted: a CUDA device, for backend {backend!r}")
    outputs, groups = weight_exponent.shape[0], group_count(x.shape[-1], GROUP_SIZE)
    bits = 6
    if backend == "bmma" and chunks.dim() and cuda.weight_bits_of(chunks) in WEIGHT_BITS:
        bits = cuda.weight_bits_of(chunks)
    expected = {
        "chunks": (chunks, torch.uint8, (-(-outputs // cuda.CHUNK_ROWS), groups, cuda.chunk_bytes(bits))),
        "weight_exponent": (weight_exponent, torch.int8, (outputs,)),
    }
    if bias is not None:
        expected["bias"] = (bias, bias.dtype if bias.dtype in FLOAT_TYPES else x.dtype, (outputs,))
    _require_operands(x, expected, f"x of {x.shape[-1]} features and {outputs} outputs")
    if not chunks.is_contiguous():
        raise ValueError("chunks are not contiguous; accepted: the result of cuda.repack as it is")


def _require_floats(x: Tensor) -> None:
    if x.dim() == 0 or x.dtype not in FLOAT_TYPES:
        raise TypeError(f"x is {x.dtype} of shape {tuple(x.shape)}; accepted: [..., K] float32, float16 or bfloat16")
    if x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; accepted: [..., K] of at least one feature")


def _require_operands(x: Tensor, expected: dict, layer: str) -> None:
    for name, (tensor, dtype, shape) in expected.items():
        if tensor.dtype != dtype:
            raise TypeError(f"{name} is {tensor.dtype}; accepted: {dtype}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; accepted: {shape} for {layer}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}; accepted: one device")


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
