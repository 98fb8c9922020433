"""Activation outliers for a model that has none, injected without changing what it computes.

Large models have a few channels whose activations are tens of times larger than the rest; they are what makes low-bit
activations hard. Here a norm's gain (or the up-projection) is scaled up in a few channels and the weights that read
those channels are scaled down, so that outputs are equal up to float32 rounding.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from flexq_core.sources.structure import mlp_pairs, norm_pairs, require_same_function, rescale_in_place

CHANNELS_SHARE = 1 / 64
"""Share of a layer's channels that become outliers, at least one: a few in a thousand to a few in a hundred in models."""


def require_strength(strength: float) -> None:
    """Raise ValueError unless `strength` is 0, for no outliers, or a finite factor of at least 1."""
    if strength != 0 and not (math.isfinite(strength) and strength >= 1):
        raise ValueError(f"outliers is {strength!r}; accepted: 0 for none, or a factor of at least 1")


def inject_outliers(model: nn.Module, strength: float, *, seed: int = 0) -> nn.Module:
    """A copy of `model` whose norm outputs and MLP activations carry outlier channels; `model` is left alone.

    model: a decoder-only transformers model.  strength: factor by which chosen channels grow, 0 for none.
    seed: chooses the channels.
    Raises ValueError for a strength that is not 0 or at least 1, or a model that rescaling would change.
    """
    require_strength(strength)
    rescaled = copy.deepcopy(model)
    if strength in (0, 1):
        return rescaled
    generator = torch.Generator().manual_seed(seed)
    for pair in norm_pairs(model) + mlp_pairs(model):
        width = model.get_submodule(pair.producer).weight.shape[0]
        factors = torch.ones(width)
        factors[torch.randperm(width, generator=generator)[: max(1, round(width * CHANNELS_SHARE))]] = strength
        rescale_in_place(rescaled, pair, factors)
    require_same_function(model, rescaled)
    return rescaled
