"""`FlexQLinear`: the module that is scored, timed and saved."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flexq_core.quant.packing import pack_codes, packed_bytes
from flexq_core.quant.plan import LayerPrecision
from flexq_core.quant.quantize import Quantized, quantize_weight
from flexq_core.quant.spec import GROUP_SIZE, group_count
from flexq_core.runtime import activations, cuda, ops
from flexq_core.runtime.chunks import unpack_chunks


def packed_parameters(quantized: Quantized) -> dict[str, Tensor]:
    """What a `FlexQLinear` keeps of a quantised weight, by the names of its parameters."""
    return {
        "weight": pack_codes(quantized.codes, quantized.bits),
        "weight_scale": quantized.scales,
        "weight_exponent": quantized.exponents,
    }


class FlexQLinear(nn.Module):
    """A linear layer with packed weights of 2 to 8 bits, usually 6, and dynamically quantised activations.

    Parameters (none trainable), every one laid out with its outputs first:
        weight            [N, Kp * weight_bits / 8] uint8, canonical packing
        weight_scale      [N, Kp / group_size] float16; keeps its type when the module is cast
        weight_exponent   [N] int8
        bias              [N] floating point, or None

    On a GPU the kernel reads weight and scale in an order of its own, and they are kept in that order only: the buffer
    `chunks`. `canonical` and the state dict give them as above.
    """

    # In transformers' tensor parallelism forward sees plain tensors, this process's parts of the parameters.
    _hf_quantized_needs_local_tp = True

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
        self.register_buffer("chunks", None, persistent=False)  # see `prepare`
        self._prepared: tuple[str, str] | None = None  # the backend that was asked for, and what it means here
        self._takes_rows = False  # whether one token runs on `imma`

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
            for name, tensor in packed_parameters(quantized).items():
                getattr(layer, name).copy_(tensor)
            if linear.bias is not None:
                layer.bias.copy_(linear.bias)
        return layer

    @classmethod
    def merged(cls, layers: Sequence[FlexQLinear]) -> FlexQLinear:
        """One layer for several that read the same activations: its outputs are theirs, one after the other.

        Raises ValueError for layers that differ in what one layer has once: features, bits, group size, backend, bias.
        """
        first = layers[0]

        def shared(layer: FlexQLinear) -> tuple:
            kind = None if layer.bias is None else layer.bias.dtype
            return layer.in_features, layer.precision, layer.group_size, layer.backend, kind

        if any(shared(layer) != shared(first) for layer in layers):
            raise ValueError(
                f"layers that differ cannot be merged: {'; '.join(layer.extra_repr() for layer in layers)}"
            )
        outputs = sum(layer.out_features for layer in layers)
        options = {"precision": first.precision, "group_size": first.group_size, "backend": first.backend}
        made = cls(first.in_features, outputs, bias=first.bias is not None, device="meta", **options)
        weights, scales = zip(*(layer.canonical() for layer in layers), strict=True)
        parts = {
            "weight": weights,
            "weight_scale": scales,
            "weight_exponent": [layer.weight_exponent for layer in layers],
        }
        if first.bias is not None:
            parts["bias"] = [layer.bias for layer in layers]
        for name, tensors in parts.items():
            setattr(made, name, nn.Parameter(torch.cat([tensor.detach() for tensor in tensors]), requires_grad=False))
        return made

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] float32, float16 or bfloat16 → [..., out_features] in the same dtype.

        Raises ValueError for another width, before anything is computed; else as `ops.w6ax_linear`.
        """
        self._require_width(x)
        if x.is_cuda:
            backend, chunks = self.prepare()
            if chunks is not None:
                bits = self.precision.activation_bits
                return ops.w6ax_linear_repacked(x, chunks, self.weight_exponent, self.bias, bits, backend)
        return ops.w6ax_linear(
            x,
            *self.canonical(),
            self.weight_exponent,
            self.bias,
            self.precision.weight_bits,
            self.precision.activation_bits,
            self.group_size,
            self.backend,
        )

    def _require_width(self, x: Tensor) -> None:
        """Raise ValueError for an x of another width, which may have as many groups: kernels and ops know only those."""
        if x.shape[-1:] == (self.in_features,):
            return
        groups = (self.chunks if self._holds_chunks_only() else self.weight_scale).shape[1]
        width = min(self.in_features, groups * self.group_size)  # of a layer that processes share this one's part
        if x.shape[-1:] != (width,):
            raise ValueError(
                f"x has shape {tuple(x.shape)}; accepted: [..., {width}], as many features as the layer has"
            )

    def reader(self) -> activations.Reader | None:
        """For whom to quantise activations ahead (runtime/activations.py); None where the backend quantises for itself."""
        backend = self.prepare()[0]
        if backend not in activations.BACKENDS or (backend in cuda.BACKENDS and self.chunks is None):
            return None
        outputs = len(self.weight_exponent)
        return activations.Reader(self.precision.activation_bits, backend, outputs, self.group_size)

    def forward_quantized(self, records: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The product with activations [*shape, in_features] quantised ahead for `reader()`: [*shape, out_features] in dtype."""
        chunks = self.chunks
        weight, scale = (self.weight, self.weight_scale) if chunks is None else (chunks, None)
        operands = (weight, scale, self.weight_exponent, self.bias, self.precision.weight_bits, dtype)
        y = activations.w6ax_linear_quantized(records, math.prod(shape), *operands, self.reader())
        return y.view(*shape, y.shape[-1])

    def takes_norm(self, x: Tensor) -> bool:
        """Whether x [M, in_features] can be given to `forward_norm`: one token, whose product begins with its norm."""
        self.prepare()
        return self._takes_rows and cuda.takes_row(*x.shape, x.dtype, norm=True)

    def forward_norm(self, x: Tensor, norm: cuda.Norm, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The product with the norm of h = x + residual, and h, in one launch, of an x that `takes_norm`.

        x, residual: [1, in_features].  Returns [1, out_features] and [1, in_features].  Raises ValueError for another width.
        """
        self._require_width(x)
        operands = (self.chunks, self.weight_exponent, self.bias, self.precision.activation_bits)
        return activations.norm_linear(x, norm, *operands, residual)

    def prepare(self) -> tuple[str, Tensor | None]:
        """Repack the weights for the CUDA kernel that this layer runs on, once; what a first call would do.

        Returns the backend that `backend` means here, and the weights in its order, or None where it takes them as they
        are. Repacked weights take the place of canonical ones: `weight` and `weight_scale` hold nothing until the layer is
        moved or loaded, or its backend changes. Call it before compiling the layer or capturing a CUDA graph.
        """
        if self._prepared is None or self._prepared[0] != self.backend:
            self._restore()
            bits, device = self.precision.weight_bits, self.weight.device
            backend = ops.resolve_backend(self.backend, device, bits, self.group_size, self.precision.activation_bits)
            chunks = cuda.repack(self.weight, self.weight_scale, backend) if backend in cuda.BACKENDS else None
            if getattr(getattr(self, "_hf_hook", None), "offload", False):
                return backend, chunks  # accelerate brings the weights for each call, and takes them away after it
            self._prepared, self.chunks = (self.backend, backend), chunks
            self._takes_rows = chunks is not None and self.backend_for(1) == "imma"
            for parameter in (self.weight, self.weight_scale) if chunks is not None else ():
                if isinstance(parameter, nn.Parameter):  # in tensor parallelism it is the part that a parameter keeps
                    parameter.data = parameter.new_empty(len(parameter), 0)
        return self._prepared[1], self.chunks

    def backend_for(self, tokens: int) -> str:
        """The backend that so many tokens run on: as `prepare`, and for a GPU's `auto` the kernel that it takes of them."""
        backend, chunks = self.prepare()
        if backend != "auto":
            return backend
        features, outputs = chunks.shape[1] * GROUP_SIZE, len(self.weight_exponent)  # of a shared layer this process's
        return cuda.backend_for(tokens, features, outputs, chunks.device)

    def canonical(self) -> tuple[Tensor, Tensor]:
        """`weight` and `weight_scale` as they are stored, whatever this layer keeps; unpacked anew where it keeps chunks."""
        if not self._holds_chunks_only():
            return self.weight, self.weight_scale
        return unpack_chunks(self.chunks, len(self.weight_exponent), planes=self._prepared[1] == "bmma")

    def _holds_chunks_only(self) -> bool:
        return self.chunks is not None and self.weight.shape[1] == 0

    def _restore(self) -> None:
        """Undo `prepare`."""
        if self._holds_chunks_only():
            self.weight.data, self.weight_scale.data = self.canonical()
        self.chunks = self._prepared = None
        self._takes_rows = False

    def weight_bytes(self) -> int:
        """Bytes that the packed weight takes with its scales and exponents, in the form that it is kept."""
        kept = (self.weight, self.weight_scale) if self.chunks is None else (self.chunks,)
        return sum(tensor.nbytes for tensor in (*kept, self.weight_exponent))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.precision}, group_size={self.group_size}, backend={self.backend!r}"
        )

    def _apply(self, fn, recurse: bool = True):
        # `model.to(bfloat16)` casts every floating parameter, but codes belong to the scale as it was rounded.
        self._restore()
        scale = self.weight_scale.data
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != scale.dtype:
            self.weight_scale.data = scale.to(self.weight_scale.device)
        return self

    def _save_to_state_dict(self, destination, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._holds_chunks_only():
            destination[f"{prefix}weight"], destination[f"{prefix}weight_scale"] = self.canonical()

    def _load_from_state_dict(self, *arguments, **options) -> None:
        self._restore()
        super()._load_from_state_dict(*arguments, **options)
