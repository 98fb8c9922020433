"""Running a model that is larger than memory: every batch passes one block before the next block is read.

The model's own forward is run, never a copy of it: once with blocks that only note how they are called, which embeds the
tokens and makes masks and positions, and once with blocks that hand on what the real ones computed, which applies the last norm
and the head. Between the two each block is called as the model called it. Each batch sees the operations that it would see in
memory, in the same shapes and order, so that the logits are equal bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flexq_core.quant.layers import decoder_blocks


@torch.no_grad()
def logits_block_by_block(
    model: nn.Module,
    batches: Sequence[Tensor],
    load_block: Callable[[str], nn.Module],
    *,
    folder: Path | None = None,
    progress: Callable = iter,
) -> Iterator[Tensor]:
    """The logits of each batch in turn: [B, T, vocabulary], equal to `model(input_ids=batch, use_cache=False).logits`.

    model: a decoder-only transformers model; its blocks need no weights, the rest lies where it runs.
    batches: token ids [B, T] int64 without padding.
    load_block: the block of a name with its weights, ready to run; called once a block, in order; each is let go before the next.
    folder: where hidden states are kept between blocks, in memory-mapped files; None keeps them in this machine's memory. They
    take `hidden_state_bytes`. Masks and positions stay on the device: a few MiB a batch.
    progress: wraps the iteration over the blocks' names.
    Raises ValueError for a block that returns anything but its hidden states.
    """
    blocks = decoder_blocks(model)
    device = next(parameter.device for parameter in model.parameters() if not parameter.is_meta)
    calls: list[list[tuple[tuple, dict]]] = []
    hidden: list[Tensor] = []
    for batch in batches:
        calls.append(_note_calls(model, blocks, batch.to(device), hidden))
        hidden[-1] = _keep(hidden[-1], folder, len(hidden))
    for index, name in enumerate(progress(list(blocks))):
        _pass_through(load_block(name), hidden, [call[index] for call in calls], device, in_place=folder is not None)
    for batch, states in zip(batches, hidden, strict=True):
        yield _finish(model, blocks, batch.to(device), states.to(device))


def _pass_through(block: nn.Module, hidden: list[Tensor], calls: list, device: torch.device, *, in_place: bool) -> None:
    """Replace every batch's hidden states by what the block makes of them; in place where they are mapped files."""
    for number, (states, (arguments, options)) in enumerate(zip(hidden, calls, strict=True)):
        output = block(states.to(device), *arguments, **options)
        if not isinstance(output, Tensor):
            raise ValueError(f"{type(block).__name__} returns {type(output).__name__}; accepted: its hidden states")
        hidden[number] = states.copy_(output) if in_place else output.cpu()


def hidden_state_bytes(model: nn.Module, rows: Tensor) -> int:
    """Bytes of the hidden states of token ids [W, T] between two blocks."""
    return math.prod(rows.shape) * model.config.hidden_size * model.dtype.itemsize


def _note_calls(model: nn.Module, blocks: dict[str, nn.Module], batch: Tensor, hidden: list[Tensor]) -> list:
    """How the model calls each block on this batch, but for the hidden states; what enters the first is added to `hidden`."""
    calls: list[tuple[tuple, dict[str, Any]]] = []

    def note(hidden_states: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if not calls:
            hidden.append(hidden_states)
        calls.append((arguments, options))
        if len(calls) == len(blocks):
            raise _Noted
        return hidden_states

    with _running(blocks, note), suppress(_Noted):
        model(input_ids=batch, use_cache=False)
    return calls


class _Noted(Exception):  # noqa: N818 - a way out, not an error
    """The last block was called: norm and head have nothing to do yet."""


def _finish(model: nn.Module, blocks: dict[str, nn.Module], batch: Tensor, states: Tensor) -> Tensor:
    """The model's logits, given what its last block computed."""
    with _running(blocks, lambda *_, **__: states):
        return model(input_ids=batch, use_cache=False).logits


@contextmanager
def _running(blocks: dict[str, nn.Module], forward: Callable) -> Iterator[None]:
    """Within it, every block runs `forward` instead of its own."""
    for block in blocks.values():
        block.forward = forward
    try:
        yield
    finally:
        for block in blocks.values():
            del block.forward


def _keep(states: Tensor, folder: Path | None, number: int) -> Tensor:
    """The same values off the device: in memory, or in a new file of `folder` that is mapped."""
    if folder is None:
        return states.cpu()
    file = folder / f"hidden_states_{number}"
    mapped = torch.from_file(str(file), shared=True, size=states.numel(), dtype=states.dtype)
    return mapped.view(states.shape).copy_(states)
