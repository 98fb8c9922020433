"""Which layers of a model the format applies to."""

from __future__ import annotations

from torch import nn


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that FlexQ quantises: every nn.Linear inside a list of blocks, by its full name.

    Embeddings, the language-model head and projections outside the blocks stay in the model's dtype.
    """
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(name.startswith(f"{blocks}.") for blocks in lists)
    }
