"""The compiled CPU kernel behind a checked, tensor-level function."""

from __future__ import annotations

import torch
from torch import Tensor

from flexq_core.quant.spec import GROUP_SIZE
from flexq_core.runtime import build


def available_isas() -> list[str]:
    """Instruction sets that the kernel can use on this processor, fastest first. Builds the kernel if need be."""
    return list(build.cpu_kernel().available_isas())


def w6ax_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_exponent: Tensor,
    bias: Tensor | None,
    activation_bits: int,
    *,
    isa: str = "",
    out: Tensor | None = None,
) -> Tensor:
    """The kernel on operands that `ops.w6ax_linear` has checked.

    x: [M, K] float32, float16 or bfloat16.  weight: [N, G * 96] uint8.  weight_scale: [N, G] float16.
    weight_exponent: [N] int8.  bias: [N] or None.  isa: one of `available_isas()`; empty takes the fastest.
    out: [M, N] float32 to write to.
    Returns [M, N] in x's dtype. Raises ValueError for a non-finite x or an instruction set that is not there.
    """
    tokens, features = x.shape
    outputs, groups = weight_scale.shape
    rows = x.to(torch.float32).contiguous()
    weight, weight_scale, weight_exponent = (t.contiguous() for t in (weight, weight_scale, weight_exponent))
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    y = torch.empty(tokens, outputs) if out is None else out
    if tokens and outputs:
        bad = build.cpu_kernel().w6ax_linear(
            rows.data_ptr(),
            weight.data_ptr(),
            weight_scale.data_ptr(),
            weight_exponent.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            tokens,
            features,
            outputs,
            groups,
            activation_bits,
            torch.get_num_threads(),
            isa,
        )
        if bad >= 0:
            index = divmod(bad, features)
            raise ValueError(f"cannot quantise non-finite values: the first is {x[index].item()} at index {index}")
    return y.to(x.dtype)


def obstacle(device: torch.device, weight_bits: int, group_size: int) -> str | None:
    """Why the kernel cannot take such a layer, or None. Nothing is compiled."""
    if device.type != "cpu":
        return f"the tensors are on {device.type}"
    if weight_bits != 6:
        return f"it reads 6-bit weights, not {weight_bits}-bit ones"
    if group_size != GROUP_SIZE:
        return f"it takes groups of {GROUP_SIZE}, not {group_size}"
    available, reason = build.cpu_kernel_available()
    return None if available else reason
