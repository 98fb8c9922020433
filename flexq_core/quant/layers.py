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


def matrices_left(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a model's blocks multiply by besides `linear_layers`, by full name: experts kept as one parameter, say."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    taken = {f"{name}.weight" for name in linear_layers(model)}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and name not in taken and any(name.startswith(f"{blocks}.") for blocks in lists)
    }


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a decoder, in the order they run, by full name; ValueError unless it has exactly one list of them."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outermost) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(outermost)} lists of blocks ({', '.join(outermost) or 'none'}); accepted: one"
        )
    (blocks,) = outermost
    return {f"{blocks}.{name}": block for name, block in model.get_submodule(blocks).named_children()}


def linears_of_block(block: nn.Module) -> dict[str, nn.Linear]:
    """Of one block, the layers that FlexQ quantises, by their names within it."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
