"""Several processes that share one model, as torchrun starts them: who is first, what it tells the others, what is recorded.

All do the same in the same order. What one alone decides or knows (a clock, a file, what is on record) the first decides, and
tells: else processes would wait for each other for ever.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from flexq_core.workbook.records import Measurement, Record, Records, Skipped

_Value = TypeVar("_Value")

_PATIENCE = timedelta(hours=2)
"""For which processes wait for the first, which may be quantising a large model."""


def count() -> int:
    """How many processes share the model; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Join the others: over nccl on GPUs, of which this process takes the one that LOCAL_RANK says, else over gloo.

    device: `cpu` or `cuda`. Only the first process prints; what another fails of is still printed.
    Raises ValueError for processes of several machines, more than there are GPUs, or that no torchrun has numbered.
    """
    if count() == 1:
        yield
        return
    unset = [name for name in ("LOCAL_WORLD_SIZE", "LOCAL_RANK") if name not in os.environ]
    if unset:
        raise ValueError(
            f"WORLD_SIZE is {count()}, and {unset[0]} is not set; accepted: processes that torchrun starts, or one"
        )
    here, local = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    if here != count():
        raise ValueError(f"{here} of {count()} processes are on this machine; accepted: all of them")
    if device == "cuda" and here > torch.cuda.device_count():
        raise ValueError(f"{here} processes on {torch.cuda.device_count()} GPUs; accepted: at most one a GPU")
    options: dict[str, Any] = {"backend": "gloo"}
    if device == "cuda":
        torch.cuda.set_device(local)
        options = {"backend": "nccl", "device_id": torch.device("cuda", local)}
    _share_processors()
    dist.init_process_group(timeout=_PATIENCE, **options)
    with ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        if dist.get_rank():
            silence = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(silence))
            stack.enter_context(redirect_stderr(silence))
        try:
            yield
        except SystemExit:  # torchrun ends all when one has ended: the first must have said why
            sys.stderr.flush()
            dist.barrier()
            raise


def _share_processors() -> None:
    """Give each process its share of the processors, unless somebody has said how many threads it shall have.

    torchrun says one where nobody else does, with which the first would quantise a large model for hours. One of the user's own
    cannot be told from that.
    """
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(1, _processors() // count()))


def _processors() -> int:
    """How many this process may use: fewer than there are where a batch system or `taskset` says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_first() -> bool:
    """Whether this process is the one that prints and records."""
    return count() == 1 or dist.get_rank() == 0


def from_first(compute: Callable[[], _Value]) -> _Value:
    """What `compute` returns, or raises, in the first process; the others do not call it."""
    told: list[Any] = [None, None]
    if is_first():
        try:
            told = [compute(), None]
        except Exception as error:  # the others would wait
            told = [None, error]
    if count() > 1:
        dist.broadcast_object_list(told, src=0)
    value, error = told
    if error is not None:
        raise error
    return value


def largest(values: Mapping[str, float]) -> dict[str, float]:
    """Of each value the largest of all processes."""
    found: list[Any] = [None] * count()
    dist.all_gather_object(found, dict(values))
    return {name: max(mine[name] for mine in found) for name in values}


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that several may share."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class SharedRecords(Records):
    """Records that the first process keeps: all compute what it does not find, and get what it found."""

    def once(self, *, compute: Callable[[], Mapping[str, Measurement]], **inputs: Any) -> dict[str, Record]:
        if not is_first():
            if from_first(bool):  # the first tells it
                with suppress(Skipped):  # as in the first
                    compute()
            return from_first(dict)
        asked = False

        def told() -> Mapping[str, Measurement]:
            nonlocal asked
            asked = from_first(lambda: True)
            return compute()

        found = super().once(compute=told, **inputs)
        if not asked:
            from_first(lambda: False)
        return from_first(lambda: found)
