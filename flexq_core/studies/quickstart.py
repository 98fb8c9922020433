"""What FlexQ is, in pictures of the model at hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import nn

from flexq_core.quant import GROUP_SIZE, PrecisionPlan, dequantize, pack_codes, quantize_weight, unpack_codes
from flexq_core.quant.layers import linear_layers
from flexq_core.runtime import ops
from flexq_core.runtime.checkpoint_format import VERSION
from flexq_core.runtime.convert import linear_weight_bytes, plan_or_rule, quantize_model
from flexq_core.runtime.linear import FlexQLinear
from flexq_core.sources.models import LoadedModel
from flexq_core.studies.parameters import require_at_least
from flexq_core.workbook import figures, paths
from flexq_core.workbook.records import Measurement
from flexq_core.workbook.run import Run


def sizes(model: nn.Module, quantised: nn.Module) -> pd.DataFrame:
    """Size of the block's linear weights in each form, in MiB, and bits a weight, scales included."""
    weights = sum(layer.weight.numel() for layer in linear_layers(model).values())
    forms = {
        "FP32": 4 * weights,
        "FP16": 2 * weights,
        "INT8": weights,
        "FlexQ": linear_weight_bytes(quantised),
    }
    table = pd.DataFrame({"form": forms.keys(), "bytes": forms.values()})
    table["size_mib"] = table["bytes"] / 2**20
    table["bits_per_weight"] = 8 * table["bytes"] / weights
    return table.drop(columns="bytes")


@torch.no_grad()
def continue_text(model: Any, tokenizer: Any, prompt: str, *, new_tokens: int, seed: int = 0) -> str:
    """What the model writes after `prompt`, sampled with the same seed for every model that is compared.

    Raises ValueError for an empty prompt, no new tokens, more than fit the model, or a seed below 0.
    """
    require_at_least(1, new_tokens=new_tokens)
    require_at_least(0, seed=seed)
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    inputs.pop("token_type_ids", None)
    room = model.config.max_position_embeddings - inputs["input_ids"].shape[1]
    if not inputs["input_ids"].numel() or new_tokens > room:
        raise ValueError(
            f"new_tokens is {new_tokens} after a prompt of {inputs['input_ids'].numel()} tokens; accepted: a prompt that is not "
            f"empty, and 1 to {room} new tokens"
        )
    output = model.generate(
        **inputs,
        max_new_tokens=new_tokens,
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
        repetition_penalty=1.1,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)


def require_parameters(plan: str, *, new_tokens: int, seed: int) -> None:
    """Raise PlanError or ValueError for what the notebook could not do, before a model is loaded."""
    plan_or_rule(plan)
    require_at_least(1, new_tokens=new_tokens)
    require_at_least(0, seed=seed)


@torch.no_grad()
def logits_difference(first: Any, second: Any, ids: torch.Tensor) -> float:
    """Relative difference of two models' logits on token ids [B, T]: ‖a - b‖ / ‖b‖."""
    a, b = (model(input_ids=ids.to(model.device), use_cache=False).logits.double() for model in (first, second))
    return ((a - b).norm() / b.norm()).item()


def plot_group(model: nn.Module, layer: str) -> Figure:
    """A row's first group of weights, its codes, and what rounding costs."""
    weight = linear_layers(model)[layer].weight.detach()[:1, :GROUP_SIZE].float().cpu()
    quantized = quantize_weight(weight, bits=6)
    step = quantized.scales.float()[0, 0].item()
    values, restored = weight[0].numpy(), dequantize(quantized)[0].numpy()
    figure, (above, below) = plt.subplots(2, 1, sharex=True, height_ratios=(3, 1), figsize=figures.HALF_PAGE)
    above.vlines(range(len(values)), 0, restored, color=figures.MAIN, linewidth=1)
    above.plot(restored, "s", color=figures.MAIN, markersize=2.5, label=f"code × scale ({step:.2g})")
    above.plot(values, ".", color=figures.INK, markersize=3, label="weight")
    above.set_ylabel("weight")
    above.legend(loc="upper right", ncols=2)
    below.axhspan(-0.5, 0.5, color=figures.LIGHT)
    below.plot((values - restored) / step, ".", color=figures.ACCENT, markersize=3)
    below.set(ylim=(-1, 1), xlabel=f"index within the group of {GROUP_SIZE}", ylabel="error (steps)")
    return figure


def plot_packing() -> Figure:
    """Where the bits of four codes go: three bytes, as quant/packing.py draws them."""
    codes = torch.eye(4, dtype=torch.int8).neg()  # code i is all ones, the others zero
    packed = pack_codes(codes, 6).numpy()
    owner = np.zeros(24, int)
    for code, row in enumerate(packed):
        owner[np.unpackbits(row, bitorder="little").astype(bool)] = code
    figure, axis = plt.subplots(figsize=(figures.HALF_PAGE[0], 1.3))
    colours = figures.SEQUENCE[:4]
    axis.imshow(owner[None], cmap=ListedColormap(colours), aspect="auto", vmin=-0.5, vmax=3.5)
    for bit, code in enumerate(owner):
        axis.text(bit, 0, str(bit - 6 * code), ha="center", va="center", color="white", fontsize=8)
    for edge in (7.5, 15.5):
        axis.axvline(edge, color="white", linewidth=3)
    axis.set_yticks([])
    axis.set_xticks([3.5, 11.5, 19.5], ["byte 0", "byte 1", "byte 2"])
    for code in range(4):
        axis.text(6 * code + 2.5, -0.62, f"code {code}", ha="center", color=colours[code], fontsize=9)
    axis.grid(False)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    return figure


def plot_plan(plan: PrecisionPlan) -> Figure:
    """Activation bits by block and layer."""
    blocks = list(dict.fromkeys(_split(layer)[0] for layer in plan.layers))
    kinds = list(dict.fromkeys(_split(layer)[1] for layer in plan.layers))
    grid = np.full((len(kinds), len(blocks)), np.nan)
    for layer, bits in plan.layers.items():
        block, kind = _split(layer)
        grid[kinds.index(kind), blocks.index(block)] = bits.activation_bits
    figure, axis = plt.subplots(figsize=(figures.HALF_PAGE[0], 0.6 + 0.27 * len(kinds)))
    axis.imshow(grid == 8, cmap=ListedColormap([figures.LIGHT, figures.ACCENT]), aspect="auto", vmin=0, vmax=1)
    if len(blocks) <= 16:
        for (row, column), bits in np.ndenumerate(grid):
            axis.text(column, row, f"A{bits:.0f}", ha="center", va="center", fontsize=8)
    axis.set_yticks(range(len(kinds)), kinds)
    axis.set_xticks(range(0, len(blocks), max(1, len(blocks) // 8)))
    axis.set_xlabel("block")
    axis.grid(False)
    return figure


def plot_sizes(table: pd.DataFrame) -> Figure:
    """Size of the linear weights in each form."""
    figure, axis = plt.subplots(figsize=(figures.HALF_PAGE[0], 1.9))
    colours = [figures.MAIN if form == "FlexQ" else figures.NEUTRAL for form in table["form"]]
    bars = axis.barh(table["form"], table["size_mib"], color=colours)
    labels = [
        f"{size:.1f} MiB, {bits:.3g} bits"
        for size, bits in zip(table["size_mib"], table["bits_per_weight"], strict=False)
    ]
    axis.bar_label(bars, labels, padding=3)
    axis.set(xlabel="linear weights (MiB)", xlim=(0, table["size_mib"].max() * 1.45))
    axis.invert_yaxis()
    axis.grid(False, axis="y")
    return figure


def keep(run: Run, quantised: Any, tokenizer: Any) -> Path:
    """Write a quantised model and its tokenizer to the outputs, as a 6-bit checkpoint; returns its folder."""
    plan = quantised.config.quantization_config.plan
    folder = run.outputs / "checkpoints" / f"{paths.run_label(run.parameters)}-{paths.model_label(plan.name)}"
    quantised.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def files(folder: Path) -> pd.DataFrame:
    """What a folder holds, in KiB."""
    sizes = {file.name: file.stat().st_size / 2**10 for file in sorted(folder.iterdir())}
    return pd.DataFrame({"file": sizes.keys(), "size_kib": sizes.values()})


def _split(layer: str) -> tuple[str, str]:
    """model.layers.3.mlp.up_proj → (3, up_proj)."""
    parts = layer.split(".")
    number = next(i for i in reversed(range(len(parts))) if parts[i].isdigit())
    return parts[number], parts[-1]


def check(
    run: Run, original: LoadedModel, quantised: nn.Module, kept: nn.Module, plan: PrecisionPlan, prompt: str
) -> dict[str, float]:
    """Measure, as records, what the notebook claims: metric → value.

    bits_per_weight; codes_lost by packing; backend_difference between this machine's fastest backend and `reference`, the
    largest of a layer; logits_difference between the quantised and the original model; checkpoint_difference between the
    quantised model and `kept`, which was saved and loaded again. Differences are relative, of logits on the prompt, or of a
    layer's outputs there.
    """
    ids = original.tokenizer(prompt, return_tensors="pt").input_ids

    def measured() -> dict[str, Measurement]:
        table = sizes(original.model, quantised).set_index("form")
        reference = quantize_model(original.model, plan, backend="reference")
        return {
            "bits_per_weight": Measurement(table.loc["FlexQ", "bits_per_weight"], "bit"),
            "linear_weight_mib": Measurement(table.loc["FlexQ", "size_mib"], "MiB"),
            "codes_lost": Measurement(_codes_lost(original.model, quantised), "1"),
            "backend_difference": Measurement(layers_difference(quantised, reference, ids), "1"),
            "logits_difference": Measurement(logits_difference(quantised, original.model, ids), "1"),
        }

    inputs = {"fingerprint": original.fingerprint, "plan": plan.to_json(), "prompt": prompt, "backend": _backend(run)}
    facts = {"model": original.name, "method": plan.name, "seed": 0}
    records = run.records.once(**facts, parameters=inputs, compute=measured)
    records |= run.records.once(
        **facts,
        parameters={**inputs, "checkpoint_format": VERSION},
        compute=lambda: {"checkpoint_difference": Measurement(logits_difference(kept, quantised, ids), "1")},
    )
    return {metric: record.value for metric, record in records.items()}


@torch.no_grad()
def layers_difference(quantised: nn.Module, reference: nn.Module, ids: torch.Tensor) -> float:
    """The largest relative difference of a layer's outputs between two models' backends, on what the first gives that layer.

    ids: [1, T] int64.  Of whole models the logits would not do: where the last bit of a sum differs, an activation may be
    rounded to the next code further on.
    """
    found = []

    def compare(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            expected = reference.get_submodule(name)(*inputs).float()
            found.append(
                (output.float() - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny)
            )

        return hook

    layers = {name: layer for name, layer in quantised.named_modules() if isinstance(layer, FlexQLinear)}
    handles = [layer.register_forward_hook(compare(name)) for name, layer in layers.items()]
    try:
        quantised(input_ids=ids.to(next(quantised.parameters()).device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(found).max().item()  # NaN where one is


def _backend(run: Run) -> str:
    return ops.resolve_backend("auto", run.device)


def _codes_lost(model: nn.Module, quantised: nn.Module) -> int:
    """Codes that differ after packing and unpacking, over all layers."""
    lost = 0
    for name, linear in linear_layers(model).items():
        layer = quantised.get_submodule(name)
        bits = layer.precision.weight_bits
        codes = quantize_weight(linear.weight.detach(), bits=bits, group_size=layer.group_size).codes
        lost += int((unpack_codes(layer.canonical()[0], bits) != codes).sum())
    return lost
