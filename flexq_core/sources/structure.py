"""Which layers of a decoder feed which: the pairs between which a channel can be rescaled without changing the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flexq_core.quant.layers import linear_layers

MLP_PAIRS = {"up_proj": "down_proj", "fc1": "fc2"}
"""First → last linear layer of an MLP whose channels meet nothing but multiplication or ReLU in between."""


@dataclass(frozen=True)
class Pair:
    """A producer of channels, and every linear layer that reads them.

    producer: name of a norm, or of the MLP's first linear layer.  consumers: names of linear layers.
    """

    producer: str
    consumers: tuple[str, ...]


def norm_pairs(model: nn.Module) -> list[Pair]:
    """Every norm whose output only linear layers of a block read (attention input, MLP input), found by running the model.

    One token passes through; a linear layer whose input is a norm's output, the same memory, reads that norm.
    """
    linears = linear_layers(model)
    produced: dict[int, str] = {}  # address of an output → name of the norm
    consumers: dict[str, list[str]] = {}
    kept: list[Tensor] = []  # an address may be used again only once its tensor is gone
    hooks = []

    def remember_output(name):
        def hook(module, arguments, output):
            kept.append(output)
            produced[output.data_ptr()] = name

        return hook

    def remember_input(name):
        def hook(module, arguments):
            if norm := produced.get(arguments[0].data_ptr()):
                consumers.setdefault(norm, []).append(name)

        return hook

    for name, module in model.named_modules():
        if is_norm(module):
            hooks.append(module.register_forward_hook(remember_output(name)))
        elif name in linears:
            hooks.append(module.register_forward_pre_hook(remember_input(name)))
    try:
        device = next(model.parameters()).device
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [Pair(norm, tuple(names)) for norm, names in consumers.items()]


def mlp_pairs(model: nn.Module) -> list[Pair]:
    """The MLP's first and last linear layer, between which a positive factor commutes (SwiGLU's product, ReLU)."""
    names = linear_layers(model)
    pairs = []
    for name in names:
        parent, _, leaf = name.rpartition(".")
        last = f"{parent}.{MLP_PAIRS[leaf]}" if leaf in MLP_PAIRS else None
        if last in names:
            pairs.append(Pair(name, (last,)))
    return pairs


@torch.no_grad()
def rescale_in_place(model: nn.Module, pair: Pair, factors: Tensor) -> None:
    """Multiply the producer's channels by `factors` [channels] and divide the consumers' weights by them."""
    producer = model.get_submodule(pair.producer)
    factors = factors.to(producer.weight.device, torch.float32)
    for parameter in (producer.weight, getattr(producer, "bias", None)):
        if parameter is not None:
            per_channel = factors if parameter.dim() == 1 else factors[:, None]
            parameter.copy_(parameter.float() * per_channel)
    for name in pair.consumers:
        weight = model.get_submodule(name).weight
        weight.copy_(weight.float() / factors)


def is_norm(module: nn.Module) -> bool:
    """LayerNorm and the RMSNorms of transformers, which share no base class but their name and their one vector."""
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and isinstance(weight, nn.Parameter) and weight.dim() == 1


def require_same_function(model: nn.Module, rescaled: nn.Module) -> None:
    """Raise ValueError unless both models give the same logits on a short input, up to rounding.

    Rescaling channels keeps the function only where nothing but products and ReLU lies between producer and
    consumers; GELU, or a norm that adds one to its gain, would change the model silently.
    """
    device = next(model.parameters()).device
    ids = torch.arange(8, device=device)[None]
    with torch.no_grad():
        before, after = (each(input_ids=ids, use_cache=False).logits.float() for each in (model, rescaled))
    _require_same(
        model, before, after, "models with plain norm gains and a gated or ReLU MLP (LLaMA, Mistral, Qwen, OPT)"
    )


@torch.no_grad()
def require_same_norm(norm: nn.Module, rescaled: nn.Module, factors: Tensor) -> None:
    """Raise ValueError unless a norm's channels come out multiplied by `factors` [channels] float32, up to rounding.

    What `require_same_function` asks of a model, where only a block of it is at hand.
    """
    weight = norm.weight
    x = torch.linspace(-1, 1, 2 * len(weight), device=weight.device).view(2, -1).to(weight.dtype)
    before, after = norm(x).float() * factors, rescaled(x).float()
    _require_same(norm, before, after, "norms with plain gains (those of LLaMA, Mistral, Qwen, OPT)")


def _require_same(module: nn.Module, before: Tensor, after: Tensor, accepted: str) -> None:
    error = ((after - before).norm() / before.norm()).item()
    tolerance = 1e-4 if next(module.parameters()).dtype == torch.float32 else 5e-2
    if not error < tolerance:
        raise ValueError(
            f"{type(module).__name__} computes something else after its channels were rescaled (relative change "
            f"{error:.1e}); accepted: {accepted}"
        )
