"""What a model's linear layers are given on a calibration text."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flexq_core.quant.layers import linear_layers, linears_of_block
from flexq_core.runtime.streaming import logits_block_by_block


@torch.no_grad()
def input_moments(
    model: nn.Module, rows: Tensor, *, load_block: Callable[[str], nn.Module] | None = None, progress: Callable = iter
) -> dict[str, Tensor]:
    """Mean square of every input channel of the blocks' linear layers over a text: layer → [K] float32 on the layer's device.

    model: a causal language model, unquantised.  rows: [W, T] int64 token ids, run a window at a time.
    load_block: for a model whose blocks have no weights, what loads one (runtime/streaming.py); the moments are the same.
    progress: wraps the iteration over windows, or over blocks.
    """
    sums: dict[str, Tensor] = {}
    if load_block is None:
        device = next(model.parameters()).device
        hooks = _watch(linear_layers(model), sums)
        try:
            for row in progress(rows):
                model(input_ids=row[None].to(device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
    else:

        def load_watched(name: str) -> nn.Module:
            block = load_block(name)
            _watch({f"{name}.{inner}": each for inner, each in linears_of_block(block).items()}, sums)
            return block

        # Before the first logits every window has passed every block; no logits are wanted.
        next(logits_block_by_block(model, rows.split(1), load_watched, progress=progress))
    return {name: (total / rows.numel()).float() for name, total in sums.items()}


def _watch(layers: Mapping[str, nn.Linear], sums: dict[str, Tensor]) -> list[RemovableHandle]:
    """Have every layer add the squares of what it is given to its sum, [K] float64."""

    def hook_of(name: str) -> Callable:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            squares = arguments[0].flatten(0, -2).float().square().sum(0, dtype=torch.float64)
            sums[name] = sums[name] + squares if name in sums else squares

        return hook

    return [layer.register_forward_pre_hook(hook_of(name)) for name, layer in layers.items()]
