"""What FlexQ is compared with: round-to-nearest and SmoothQuant, simulated as their papers measure accuracy.

Both quantise weights per output channel and activations per token: one scale for a whole row.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexq_core.quant.quantize import fake_quantize
from flexq_core.runtime.convert import replace_linear_layers
from flexq_core.sources.structure import norm_pairs, require_same_function, rescale_in_place

SMOOTHING = 0.5
"""SmoothQuant's migration strength α: how much of an outlier moves from activations to weights (SmoothQuant §4.2)."""
_SMOOTHING_OF = {"llama": 0.85, "mistral": 0.8}
"""Model type → the α that SmoothQuant's authors use for it (github.com/mit-han-lab/smoothquant; of Llama-2-70B alone 0.9)."""
_LEAST = 1e-5
"""That a channel's magnitudes, and its factor, count as."""


class RowwiseLinear(nn.Module):
    """A linear layer with per-channel weights and per-token activations, both fake-quantised."""

    def __init__(self, linear: nn.Linear, weight_bits: int, activation_bits: int) -> None:
        super().__init__()
        features = linear.in_features
        quantized = fake_quantize(linear.weight.data, bits=weight_bits, group_size=features)
        self.weight = nn.Parameter(quantized, requires_grad=False)
        self.bias = linear.bias
        self.activation_bits = activation_bits

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N] in x's dtype."""
        x = fake_quantize(x, bits=self.activation_bits, group_size=x.shape[-1])
        return F.linear(x, self.weight, self.bias)


def round_to_nearest(model: nn.Module, *, weight_bits: int, activation_bits: int) -> nn.Module:
    """A new model with every linear layer of its blocks rounded per channel and per token."""
    return replace_linear_layers(model, lambda _, linear: RowwiseLinear(linear, weight_bits, activation_bits))


def smooth_quant(
    model: nn.Module,
    calibration: Tensor,
    *,
    weight_bits: int,
    activation_bits: int,
    smoothing: float | None = None,
) -> nn.Module:
    """SmoothQuant (arXiv 2211.10438): move outliers from norm outputs into the weights that read them, then round.

    model: a decoder-only transformers model, left alone.  calibration: [W, T] int64 token ids.  smoothing: α; the authors'
    for such a model unless given.
    """
    if smoothing is None:
        smoothing = smoothing_of(model)
    smoothed = copy.deepcopy(model)
    pairs = norm_pairs(model)
    absmax = _input_absmax(model, [pair.consumers[0] for pair in pairs], calibration)
    for pair in pairs:
        weights = [model.get_submodule(name).weight for name in pair.consumers]
        rescale_in_place(smoothed, pair, 1 / smoothing_factors(absmax[pair.consumers[0]], weights, smoothing))
    require_same_function(model, smoothed)
    return round_to_nearest(smoothed, weight_bits=weight_bits, activation_bits=activation_bits)


def smoothing_of(model: nn.Module) -> float:
    """The migration strength α that SmoothQuant's authors use for a transformers model of such a type."""
    return _SMOOTHING_OF.get(model.config.model_type, SMOOTHING)


def smoothing_factors(absmax: Tensor, weights: Sequence[Tensor], smoothing: float) -> Tensor:
    """SmoothQuant's factors s_j = max|x_j|^α / max|w_j|^(1-α) between a norm and its readers (its equation 4): [K] float32.

    absmax: [K] float32, the largest magnitude of every channel of the norm's output.  weights: the readers', [N, K] each.
    """
    largest = torch.stack([weight.abs().amax(0).float() for weight in weights]).amax(0).clamp(min=_LEAST)
    return (absmax.clamp(min=_LEAST) ** smoothing / largest ** (1 - smoothing)).clamp(min=_LEAST)


@torch.no_grad()
def _input_absmax(model: nn.Module, names: list[str], calibration: Tensor) -> dict[str, Tensor]:
    """Largest magnitude of every input channel of these layers over the calibration text: name → [K] float32."""
    absmax: dict[str, Tensor] = {}

    def watch(name):
        def hook(module, arguments):
            largest = arguments[0].detach().abs().flatten(0, -2).amax(0).float()
            absmax[name] = torch.maximum(absmax[name], largest) if name in absmax else largest

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    try:
        for row in calibration:
            model(input_ids=row[None].to(next(model.parameters()).device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return absmax
