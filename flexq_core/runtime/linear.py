"""`FlexQLinear`: the module that is scored, timed and saved."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flexq_core.quant.packing import pack_codes, packed_bytes
from flexq_core.quant.plan import LayerPrecision
from flexq_core.quant.quantize import quantize_weight
from flexq_core.quant.spec import GROUP_SIZE, group_count
from flexq_core.runtime import cuda, ops


class FlexQLinear(nn.Module):
    """A linear layer with packed 6-bit (or 8-bit) weights and dynamically quantised activations.

    Parameters (none trainable), every one laid out with its outputs first:
        weight            [N, Kp * weight_bits / 8] uint8, canonical packing
        weight_scale      [N, Kp / group_size] float16; keeps its type when the module is cast
        weight_exponent   [N] int8
        bias              [N] floating point, or None
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        precision: LayerPrecision | None = None,
        group_size: int = GROUP_SIZE,
        backend: str = "auto",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """An empty layer, to be filled by a state dict; `from_linear` makes one that holds weights."""
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.precision = precision or LayerPrecision()
        self.group_size = group_size
        self.backend = backend
        groups = group_count(in_features, group_size)
        bytes_a_row = packed_bytes(groups * group_size, self.precision.weight_bits)

        def parameter(*shape: int, dtype: torch.dtype | None) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=dtype, device=device), requires_grad=False)

        self.weight = parameter(out_features, bytes_a_row, dtype=torch.uint8)
        self.weight_scale = parameter(out_features, groups, dtype=torch.float16)
        self.weight_exponent = parameter(out_features, dtype=torch.int8)
        self.bias = parameter(out_features, dtype=dtype) if bias else None
        self._repacked: tuple[str, str, Tensor | None] | None = None  # see `prepare`

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        precision: LayerPrecision | None = None,
        group_size: int = GROUP_SIZE,
        backend: str = "auto",
        scales: str = "absmax",
        moments: Tensor | None = None,
    ) -> FlexQLinear:
        """Quantise `linear`'s weight; the bias is kept as it is. `linear` is left alone.

        scales, moments: see `quantize_weight`.
        Raises ValueError as `quantize_weight`, for a non-finite weight for example, or for one without data (on the meta device).
        """
        if linear.weight.is_meta:
            raise ValueError("the linear layer has no weights yet (it is on the meta device); load them first")
        layer = cls(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            precision=precision,
            group_size=group_size,
            backend=backend,
            dtype=None if linear.bias is None else linear.bias.dtype,
            device=linear.weight.device,
        )
        with torch.no_grad():
            bits = layer.precision.weight_bits
            quantized = quantize_weight(linear.weight, bits=bits, group_size=group_size, scales=scales, moments=moments)
            layer.weight.copy_(pack_codes(quantized.codes, bits))
            layer.weight_scale.copy_(quantized.scales)
            layer.weight_exponent.copy_(quantized.exponents)
            if linear.bias is not None:
                layer.bias.copy_(linear.bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] float32, float16 or bfloat16 → [..., out_features] in the same dtype."""
        if x.is_cuda:
            backend, chunks = self.prepare()
            if chunks is not None:
                bits = self.precision.activation_bits
                return ops.w6ax_linear_repacked(x, chunks, self.weight_exponent, self.bias, bits, backend)
        return ops.w6ax_linear(
            x,
            self.weight,
            self.weight_scale,
            self.weight_exponent,
            self.bias,
            self.precision.weight_bits,
            self.precision.activation_bits,
            self.group_size,
            self.backend,
        )

    def prepare(self) -> tuple[str, Tensor | None]:
        """Repack the weights for the CUDA kernel that this layer runs on, once; what a first call would do.

        Returns the backend that `backend` means here, and the weights in its order, or None where it takes them as they
        are. Call it before capturing a CUDA graph. Weights that are written to later are repacked only when the layer is
        moved or loaded.
        """
        if self._repacked is None or self._repacked[0] != self.backend:
            bits, device = self.precision.weight_bits, self.weight.device
            backend = ops.resolve_backend(self.backend, device, bits, self.group_size)
            chunks = cuda.repack(self.weight, self.weight_scale, backend) if backend in cuda.BACKENDS else None
            self._repacked = self.backend, backend, chunks
        return self._repacked[1:]

    def weight_bytes(self) -> int:
        """Bytes that the packed weight takes with its scales and exponents."""
        return sum(p.numel() * p.element_size() for p in (self.weight, self.weight_scale, self.weight_exponent))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.precision}, group_size={self.group_size}, backend={self.backend!r}"
        )

    def _apply(self, fn, recurse: bool = True):
        # `model.to(bfloat16)` casts every floating parameter, but codes belong to the scale as it was rounded.
        scale = self.weight_scale.data
        self._repacked = None
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != scale.dtype:
            self.weight_scale.data = scale.to(self.weight_scale.device)
        return self

    def _load_from_state_dict(self, *arguments, **options) -> None:
        self._repacked = None
        super()._load_from_state_dict(*arguments, **options)
