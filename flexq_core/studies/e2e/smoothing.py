"""SmoothQuant (arXiv 2211.10438) as it is served: channels evened out in advance, activations on one scale a layer.

What evens channels out is folded into norms and weights, so that a step costs nothing more for it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from flexq_core.quant.layers import linear_layers
from flexq_core.runtime.convert import replace_linear_layers
from flexq_core.sources.structure import is_norm, require_same_norm
from flexq_core.studies.baselines import smoothing_factors
from flexq_core.studies.e2e.linears import StaticInt8Linear


class Ranges:
    """What activations reach while a model runs, block by block or as a whole.

    largest: linear layer → [K] float32, the largest magnitude of every input channel.  norm_of: layer → the norm that it reads.
    """

    def __init__(self) -> None:
        self.largest: dict[str, Tensor] = {}
        self.norm_of: dict[str, str] = {}

    def watch_(self, module: nn.Module, prefix: str = "") -> None:
        """Note, from now on, what passes through a model, or a block whose name in its model is the prefix."""
        # The norm that ran last, and its output, which is kept so that its address is its own.
        normed: tuple[str, Tensor] | None = None

        def after_norm(name: str, _module: nn.Module, _inputs: tuple, output: Tensor) -> None:
            nonlocal normed
            normed = name, output

        def before_linear(name: str, _module: nn.Module, inputs: tuple[Tensor]) -> None:
            (x,) = inputs
            largest = x.abs().flatten(0, -2).amax(0).float()
            self.largest[name] = torch.maximum(self.largest.get(name, largest), largest)
            if normed and normed[1].data_ptr() == x.data_ptr():
                self.norm_of[name] = normed[0]

        for name, part in module.named_modules():
            if is_norm(part):
                part.register_forward_hook(functools.partial(after_norm, prefix + name))
            elif isinstance(part, nn.Linear):
                part.register_forward_pre_hook(functools.partial(before_linear, prefix + name))


def smoothed(model: nn.Module, ranges: Ranges, smoothing: float, prefix: str = "") -> nn.Module:
    """A new model, or a new list of one block, with every linear layer of its blocks in INT8; what was given is left alone.

    ranges: of the model.  smoothing: the migration strength α, see `baselines.smoothing_of`.  prefix: of a block's name in its
    model, which is called `block.0.` here.
    What reads no norm is quantised as it is. Raises ValueError for a norm whose channels its parameters do not scale.
    """
    here = "block.0." if prefix else ""
    layers = {prefix + name.removeprefix(here): name for name in linear_layers(model)}
    readers: dict[str, list[str]] = {}
    for full in layers:
        if full in ranges.norm_of:
            readers.setdefault(ranges.norm_of[full], []).append(full)
    factors: dict[str, Tensor] = {}
    for norm, mine in readers.items():
        weights = [model.get_submodule(layers[full]).weight for full in mine]
        factors[norm] = smoothing_factors(ranges.largest[mine[0]], weights, smoothing)

    def make(name: str, linear: nn.Linear) -> nn.Module:
        full = prefix + name.removeprefix(here)
        largest, factor = ranges.largest[full], factors.get(ranges.norm_of.get(full, ""))
        if factor is None:
            return StaticInt8Linear(linear, largest.amax())
        scaled = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        scaled.weight = nn.Parameter(linear.weight.data.float() * factor, requires_grad=False)
        scaled.bias = linear.bias
        return StaticInt8Linear(scaled, (largest / factor).amax())

    made = replace_linear_layers(model, make)
    for norm, factor in factors.items():
        name = here + norm.removeprefix(prefix)
        layer = made.get_submodule(name)
        for kind, parameter in list(layer.named_parameters()):  # others of its own: the given model's stay
            setattr(layer, kind, nn.Parameter((parameter.float() / factor).to(parameter.dtype), requires_grad=False))
        require_same_norm(model.get_submodule(name), layer, 1 / factor)
    return made
