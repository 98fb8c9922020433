"""Fused decoder blocks in transformers' own models: fewer, larger products, and activations that stay quantised between kernels.

    norm → q, k, v → attention → o → + → norm → gate, up → SiLU × → down → +      a block as transformers runs it
    qkv → attention → o → + & norm & quantise → gate_up → SiLU × & quantise → down → + & norm & quantise      fused

The last of these is the next block's norm: a block hands the result on beside the sum that it returns. Of one token on a GPU
the products but `down` begin with their own norm, if any, and quantisation (w6ax_imma_row.cu; `cuda.takes_row` says which
rows), and a block hands on the two that are summed.

Projections that read the same activations become one layer, and what feeds a `FlexQLinear` quantises its result for it
(runtime/activations.py). Attention is the model's own: where q, k and v were stands what picks theirs out of the merged
product, so that rotary embeddings, caches, sliding windows and attention implementations are transformers' code, of whatever
release. A block keeps its class, as a subclass, and its submodules' names; a state dict has the layers as they were before.

Merging works for unquantised layers as well, so that a comparison can give both sides the same blocks.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexq_core.runtime import activations, cuda
from flexq_core.runtime.linear import FlexQLinear


def fuse_(model: nn.Module) -> nn.Module:
    """Fuse the blocks of a model in place; returns it.

    model: a transformers model whose blocks are LLaMA's, Mistral's, Qwen2's, Qwen3's or OPT's (with its norms before), quantised
    by `quantize_model` or not.  Quantised layers are prepared for the device that they are on: fuse a model where it will run.
    Logits are those of the unfused model, bit for bit on the `reference` backend; a GPU's fused norm sums in another order.
    What cannot be fused is left as it is, and a RuntimeWarning says what and why.
    """
    fused, left = 0, Counter()
    for module in list(model.modules()):
        kind = _KINDS.get(type(module).__name__) if type(module).__module__.startswith("transformers.") else None
        if kind is None:
            fused += isinstance(module, _Fused)
            continue
        if any("forward" in vars(part) for part in module.modules()):
            left[
                f"{type(module).__name__}: its forward is replaced, as accelerate does to spread or offload a model"
            ] += 1
            continue
        try:
            kind.merge_(module)
        except ValueError as reason:
            left[f"{type(module).__name__}: {reason}"] += 1
            continue
        module.__class__ = _fused_class(type(module), kind)
        for layer in module.modules():
            if isinstance(layer, FlexQLinear):
                layer.prepare()
        fused += 1
    for blocks in model.modules():
        if isinstance(blocks, nn.ModuleList) and all(isinstance(block, _Fused) for block in blocks):
            chain = list(blocks)
            for block in blocks:
                block.chain = chain
    if not fused and not left:
        left[f"{type(model).__name__} has no block of a kind known here; accepted: {', '.join(_KINDS)}"] = 1
    for reason, count in left.items():
        warnings.warn(f"{count} blocks are left unfused, as they were: {reason}", RuntimeWarning, stacklevel=2)
    return model


class _Columns(nn.Module):
    """Stands where a projection was: given the merged product, it picks the projection's part of it."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, product: Tensor) -> Tensor:
        """[..., outputs of all] → [..., own outputs], a view."""
        return product[..., self.start : self.stop]

    def extra_repr(self) -> str:
        return f"{self.start}:{self.stop}"


class _Fused(nn.Module):
    """What fused blocks share.

    chain: the blocks of the model, in a list that is no submodule.  ahead: what the block before has handed on: the hidden
    states that it returned, their edits until then, and their norm quantised for this block, or, of one token, the two that
    they are the sum of: the first layer adds, normalises and quantises them itself.
    """

    chain: Sequence[_Fused] = ()
    ahead: tuple[Tensor, int, Tensor | tuple[Tensor, Tensor]] | None = None

    @staticmethod
    def merge_(block: Any) -> None:
        """Merge the projections of a block in place; ValueError, before anything is changed, where they cannot be."""
        raise NotImplementedError

    def first(self) -> tuple[nn.Module, nn.Module]:
        """The norm that the block begins with, and the layer that reads it."""
        raise NotImplementedError

    def _begin(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """What the first layer makes of the normalised hidden states, and these, which need not be the tensor that was given."""
        norm, linear = self.first()
        ahead, self.ahead = self.ahead, None
        if ahead is None or ahead[0] is not hidden_states or ahead[1] != _edits(hidden_states):
            return _norm_linear(norm, linear, hidden_states)
        if isinstance(ahead[2], tuple):
            return _norm_linear(norm, linear, *ahead[2])
        return linear.forward_quantized(ahead[2], hidden_states.shape[:-1], hidden_states.dtype), hidden_states

    def _end(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + x, and its norm handed on to the block that comes next."""
        index = self.self_attn.layer_idx + 1
        if index < len(self.chain) and _edits_show(self, self.chain[index]):
            norm, linear = self.chain[index].first()
            reader = _reader(linear, x, norm.weight)
            if reader is not None:
                if linear.takes_norm(_rows(x)):
                    h, handed = residual + x, (x, residual)  # compiled, nobody reads this sum but where a model ends
                else:
                    handed, h = _norm_quantize(norm, reader, x, residual)
                self.chain[index].ahead = h, _edits(h), handed
                return h
        return residual + x


class _FusedGated(_Fused):
    """A block with RMSNorm and a gated MLP."""

    @staticmethod
    def merge_(block: Any) -> None:
        attention, mlp = block.self_attn, block.mlp
        qkv = _merged([attention.q_proj, attention.k_proj, attention.v_proj])
        gate_up = _merged([mlp.gate_proj, mlp.up_proj])
        _replace_(attention, ("q_proj", "k_proj", "v_proj"), "qkv_proj", qkv)
        _replace_(mlp, ("gate_proj", "up_proj"), "gate_up_proj", gate_up)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """As the block's own: [B, T, K] → [B, T, K]."""
        qkv, hidden_states = self._begin(hidden_states)
        attended, _ = self.self_attn(hidden_states=qkv, attention_mask=attention_mask, **options)
        gate_up, h = _norm_linear(self.post_attention_layernorm, self.mlp.gate_up_proj, attended, hidden_states)
        return self._end(h, _gated(self.mlp, gate_up))

    def first(self) -> tuple[nn.Module, nn.Module]:
        return self.input_layernorm, self.self_attn.qkv_proj


class _FusedOPT(_Fused):
    """OPT's block, with LayerNorm before attention and MLP."""

    @staticmethod
    def merge_(block: Any) -> None:
        if not block.do_layer_norm_before:
            raise ValueError("its norms come after attention and MLP")
        attention = block.self_attn
        qkv = _merged([attention.q_proj, attention.k_proj, attention.v_proj])
        _replace_(attention, ("q_proj", "k_proj", "v_proj"), "qkv_proj", qkv)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False, **options: Any
    ) -> Tensor:
        """As the block's own: [B, T, K] → [B, T, K]."""
        qkv, hidden_states = self._begin(hidden_states)
        attended, _ = self.self_attn(hidden_states=qkv, attention_mask=attention_mask, **options)
        attended = F.dropout(attended, p=self.dropout, training=self.training)
        up, h = _norm_linear(self.final_layer_norm, self.fc1, attended, hidden_states)
        down = _activated(self.activation_fn, self.fc2, up)
        return self._end(h, F.dropout(down, p=self.dropout, training=self.training))

    def first(self) -> tuple[nn.Module, nn.Module]:
        return self.self_attn_layer_norm, self.self_attn.qkv_proj


_KINDS: dict[str, type[_Fused]] = {
    "LlamaDecoderLayer": _FusedGated,
    "MistralDecoderLayer": _FusedGated,
    "Qwen2DecoderLayer": _FusedGated,
    "Qwen3DecoderLayer": _FusedGated,
    "OPTDecoderLayer": _FusedOPT,
}
"""Class of a block → how it is fused. By name, for models that only look alike (Gemma, OLMo 2) compute something else."""


_SILU = ("silu", "swish")
"""Its names in transformers."""


@cache
def _fused_class(block: type, kind: type[_Fused]) -> type:
    """A subclass: what transformers knows by its class (outputs to record, checkpoints) stays known."""
    return type(f"Fused{block.__name__}", (kind, block), {})


def _edits_show(block: nn.Module, following: nn.Module) -> bool:
    """Whether it shows when hidden states are edited in place between two blocks, so that none edited are taken for the old.

    `_edits` counts edits, but nothing does in inference mode, or where a hook edits `.data`. While torch traces nothing does
    either: what it compiles as one program edits nothing unseen, but between blocks compiled one by one only hooks are seen.
    """
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        return False
    return not (block._forward_hooks or following._forward_pre_hooks or nn.modules.module._has_any_global_hook())


def _edits(x: Tensor) -> int:
    """How often x was edited in place; not known while torch traces, where `_edits_show` has ruled out hooks."""
    return 0 if torch.compiler.is_compiling() else x._version


def _norm_linear(
    norm: nn.Module, linear: nn.Module, x: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`linear(norm(h))` and h = residual + x, or x alone."""
    reader = _reader(linear, x, norm.weight)
    if reader is None:
        h = x if residual is None else residual + x
        return linear(norm(h)), h
    if linear.takes_norm(_rows(x)):
        y, h = linear.forward_norm(_rows(x), _norm(norm), None if residual is None else _rows(residual))
        return y.view(*x.shape[:-1], y.shape[-1]), h.view(x.shape)
    records, h = _norm_quantize(norm, reader, x, residual)
    return linear.forward_quantized(records, x.shape[:-1], x.dtype), h


def _norm_quantize(
    norm: nn.Module, reader: activations.Reader, x: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Records of `norm(h)`, and h = residual + x, or x alone."""
    rows, residual = _rows(x), None if residual is None else _rows(residual)
    weight, bias, eps, centred = _norm(norm)
    if centred:
        records, h = activations.layer_norm_quantize(rows, weight, bias, eps, reader, residual)
    else:
        records, h = activations.rms_norm_quantize(rows, weight, eps, reader, residual)
    return records, h.view(x.shape)


def _norm(norm: nn.Module) -> cuda.Norm:
    if isinstance(norm, nn.LayerNorm):
        return cuda.Norm(norm.weight, norm.bias, norm.eps, True)
    return cuda.Norm(norm.weight, None, norm.variance_epsilon, False)


def _rows(x: Tensor) -> Tensor:
    """[..., K] → [M, K]"""
    return x.reshape(-1, x.shape[-1])


def _gated(mlp: Any, gate_up: Tensor) -> Tensor:
    """`down_proj(act_fn(gate) * up)` from the merged product."""
    reader = _reader(mlp.down_proj, gate_up) if mlp.config.hidden_act in _SILU else None
    if reader is None:
        return mlp(gate_up)
    gate, up = gate_up.reshape(-1, gate_up.shape[-1]).chunk(2, dim=-1)
    records = activations.silu_mul_quantize(gate, up, reader)
    return mlp.down_proj.forward_quantized(records, gate_up.shape[:-1], gate_up.dtype)


def _activated(activation: nn.Module, linear: nn.Module, x: Tensor) -> Tensor:
    """`linear(activation(x))`."""
    reader = _reader(linear, x) if isinstance(activation, nn.ReLU) else None
    if reader is None:
        return linear(activation(x))
    records = activations.relu_quantize(x.reshape(-1, x.shape[-1]), reader)
    return linear.forward_quantized(records, x.shape[:-1], x.dtype)


def _reader(linear: nn.Module, x: Tensor, *norm: Tensor | None) -> activations.Reader | None:
    """For whom x's operation is to quantise, or None where it cannot, or need not, be fused.

    norm: the weight of the norm that is the operation; the kernels want it there, of x's type, on its device, and not too wide.
    """
    if not isinstance(linear, FlexQLinear):
        return None
    for weight in norm:
        if weight is None or len(weight) > cuda.MOST_NORM_FEATURES:
            return None
        if (weight.dtype, weight.device) != (x.dtype, x.device):
            return None
    return linear.reader()


def _merged(layers: Sequence[nn.Module]) -> nn.Module:
    """One layer with the outputs of all; ValueError where they differ."""
    if all(type(layer) is FlexQLinear for layer in layers):
        return FlexQLinear.merged(layers)
    first = layers[0]
    if any(type(layer) is not nn.Linear or (layer.bias is None) != (first.bias is None) for layer in layers):
        raise ValueError(f"layers that differ cannot be merged: {', '.join(map(repr, layers))}")
    outputs = sum(layer.out_features for layer in layers)
    made = nn.Linear(first.in_features, outputs, bias=first.bias is not None, device="meta")
    for name, parameter in first.named_parameters():
        tensors = [getattr(layer, name).detach() for layer in layers]
        setattr(made, name, nn.Parameter(torch.cat(tensors), requires_grad=parameter.requires_grad))
    return made


def _replace_(owner: Any, names: Sequence[str], name: str, layer: nn.Module) -> None:
    """Put the merged layer into its owner, and columns in the place of the layers that it holds."""
    start = 0
    for part in names:
        stop = start + getattr(owner, part).out_features
        setattr(owner, part, _Columns(start, stop))
        start = stop
    setattr(owner, name, layer)
    owner.merged_projections = {name: tuple(names)}
    owner.register_state_dict_post_hook(_split_merged)
    owner.register_load_state_dict_pre_hook(_join_parts)


def _split_merged(owner: Any, state: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
    """Give a state dict each part's tensors, views of the merged layer's; their first dimension is that of outputs."""
    for name, parts in owner.merged_projections.items():
        columns = [getattr(owner, part) for part in parts]
        for key in [key for key in state if key.startswith(f"{prefix}{name}.")]:
            tensor = state.pop(key)
            for part, column in zip(parts, columns, strict=True):
                state[f"{prefix}{part}.{key.rsplit('.', 1)[1]}"] = tensor[column.start : column.stop]


def _join_parts(owner: Any, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """The inverse, before the state dict is loaded."""
    for name, parts in owner.merged_projections.items():
        kinds = {key.rsplit(".", 1)[1] for key in state if key.startswith(f"{prefix}{parts[0]}.")}
        for kind in kinds:
            keys = [f"{prefix}{part}.{kind}" for part in parts]
            if all(key in state for key in keys):
                state[f"{prefix}{name}.{kind}"] = torch.cat([state.pop(key) for key in keys])
