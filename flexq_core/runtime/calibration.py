"""What a model's linear layers are given on a calibration text."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flexq_core.quant.layers import linear_layers


@torch.no_grad()
def input_moments(model: nn.Module, rows: Tensor, *, progress: Callable = iter) -> dict[str, Tensor]:
    """Mean square of every input channel of the blocks' linear layers over a text: layer → [K] float32 on the layer's device.

    model: a causal language model, unquantised.  rows: [W, T] int64 token ids, run a window at a time.
    progress: wraps the iteration over windows.
    """
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Callable:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            squares = arguments[0].flatten(0, -2).float().square().sum(0, dtype=torch.float64)
            sums[name] = sums[name] + squares if name in sums else squares

        return hook

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in linear_layers(model).items()]
    device = next(model.parameters()).device
    try:
        for row in progress(rows):
            model(input_ids=row[None].to(device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (total / rows.numel()).float() for name, total in sums.items()}
