"""On which kernels a quantised model was scored, and how far they are from fake quantisation on the same weights and text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import pandas as pd
import torch
from torch import Tensor, nn

from flexq_core.runtime.linear import FlexQLinear
from flexq_core.workbook.records import Measurement

SIMULATED = "simulate"
"""The backend that the others are compared with: how papers measure accuracy."""

DIFFERENCE_METRIC = f"difference_from_{SIMULATED}"
LAYERS_METRIC = "layers_on/"


def kernels(model: nn.Module, tokens: int) -> dict[str, list[str]]:
    """Backend → names of the layers that run on it when given so many tokens."""
    found = defaultdict(list)
    for name, layer in _layers(model).items():
        found[layer.backend_for(tokens)].append(name)
    return dict(found)


@torch.no_grad()
def agreement(model: nn.Module, rows: Tensor) -> dict[str, Measurement]:
    """The kernels that a batch runs on, and how its logits differ from those of the same layers on `simulate`.

    model: with `FlexQLinear`s.  rows: [B, T] int64.
    Returns layers_on/<backend>, the number of layers, with their kinds as a note; and difference_from_simulate, ‖a - b‖ / ‖b‖.
    """
    rows = rows.to(next(model.parameters()).device)
    used = kernels(model, rows.numel())
    found = model(input_ids=rows, use_cache=False).logits
    with _simulated(model):
        expected = model(input_ids=rows, use_cache=False).logits
    # A window at a time: in float32 the logits of a batch may take more memory than the model.
    apart = torch.stack([(a.float() - b.float()).norm() for a, b in zip(found, expected, strict=True)]).norm()
    size = torch.stack([b.float().norm() for b in expected]).norm()
    batch = f"logits of {' x '.join(map(str, rows.shape))} tokens"
    return {
        **{f"{LAYERS_METRIC}{backend}": Measurement(len(on), "layer", _kinds(on)) for backend, on in used.items()},
        DIFFERENCE_METRIC: Measurement((apart / size).item(), "1", batch),
    }


def told(cases: pd.DataFrame) -> str:
    """What the rows of a method in the accuracy study's table say of its kernels, to go on with; empty where they say nothing.

    For example `; auto: 56 layers on imma, 168 layers on wgmma, logits 0.31% from simulate's`.
    """
    text = ""
    for case in cases.to_dict("records"):
        if not pd.notna(case.get(DIFFERENCE_METRIC)):
            continue
        counts = {name.removeprefix(LAYERS_METRIC): n for name, n in case.items() if name.startswith(LAYERS_METRIC)}
        layers = ", ".join(f"{n:.0f} layers on {kernel}" for kernel, n in counts.items() if n > 0)
        text += f"; {case['backend']}: {layers}, logits {case[DIFFERENCE_METRIC]:.2%} from {SIMULATED}'s"
    return text


@contextmanager
def _simulated(model: nn.Module) -> Iterator[None]:
    before = {layer: layer.backend for layer in _layers(model).values()}
    try:
        for layer in before:
            layer.backend = SIMULATED
        yield
    finally:
        for layer, backend in before.items():
            layer.backend = backend


def _layers(model: nn.Module) -> dict[str, FlexQLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FlexQLinear)}


def _kinds(names: list[str]) -> str:
    """Last parts of layers' names, each once: `q_proj, down_proj`."""
    return ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
