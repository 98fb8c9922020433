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

from flexq_core.sources.structure import mlp_pairs, norm_pairs, require_relu_or_gate

CHANNELS_SHARE = 1 / 64
"""Share of a layer's channels that become outliers, at least one: a few in a thousand to a few in a hundred in models."""


def inject_outliers(model: nn.Module, strength: float, *, seed: int = 0) -> nn.Module:
    """A copy of `model` whose norm outputs and MLP activations carry outlier channels; `model` is left alone.

    model: a decoder-only transformers model.  strength: factor by which chosen channels grow; 1 changes nothing.
    seed: chooses the channels.  Raises ValueError for a strength below 1 or not finite.
    """
    if not math.isfinite(strength) or strength < 1:
        raise ValueError(f"outlier strength is {strength!r}; accepted: a number of at least 1")
    model = copy.deepcopy(model)
    if strength == 1:
        return model
    require_relu_or_gate(model)
    generator = torch.Generator().manual_seed(seed)
    pairs = norm_pairs(model) + mlp_pairs(model)
    with torch.no_grad():
        for pair in pairs:
            producer = model.get_submodule(pair.producer)
            width = producer.weight.shape[0]
            count = max(1, round(width * CHANNELS_SHARE))
            channels = torch.randperm(width, generator=generator)[:count].to(producer.weight.device)
            producer.weight[channels] *= strength
            if getattr(producer, "bias", None) is not None:
                producer.bias[channels] *= strength
            for name in pair.consumers:
                model.get_submodule(name).weight[:, channels] /= strength
    return model
