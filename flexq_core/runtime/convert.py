"""From a transformers model and a plan to a quantised model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn
from tqdm.auto import tqdm

from flexq_core.quant.layers import linear_layers, linears_of_block, matrices_left
from flexq_core.quant.plan import PlanError, PrecisionPlan, require_rule
from flexq_core.quant.quantize import require_scales
from flexq_core.runtime import ops
from flexq_core.runtime.calibration import input_moments
from flexq_core.runtime.linear import FlexQLinear


def resolve_plan(plan: PrecisionPlan | str | Path, model: nn.Module) -> PrecisionPlan:
    """The plan for this model: a rule by name, a plan file (`*.json`), or a plan as it is.

    Raises PlanError for an unknown rule, a file that is absent or not a plan, or a plan that does not fit the model. Warns of
    weights in its blocks that no plan can name.
    """
    layers = linear_layers(model)
    if not layers:
        if any(isinstance(module, FlexQLinear) for module in model.modules()):
            raise PlanError("the model is quantised already; start from the original")
        raise PlanError(f"{type(model).__name__} has no nn.Linear inside its blocks: nothing to quantise")
    if left := matrices_left(model):
        weights, of = (sum(each.numel() for each in parameters) for parameters in (left.values(), model.parameters()))
        warnings.warn(
            f"{weights:,} of the {of:,} weights of this {type(model).__name__} ({weights / of:.1%}) are in its blocks but in no "
            f"nn.Linear, and are not quantised, first {next(iter(left))!r}",
            stacklevel=1,  # one place, so that it is told once
        )
    plan = plan_or_rule(plan)
    if not isinstance(plan, PrecisionPlan):
        return PrecisionPlan.from_rule(plan, layers)
    plan.require_fit(layers)
    return plan


def plan_or_rule(plan: PrecisionPlan | str | Path) -> PrecisionPlan | str:
    """A plan as it is or from its file, or the name of a rule, which makes one for a model; PlanError where it is neither."""
    if isinstance(plan, PrecisionPlan):
        return plan
    if Path(plan).suffix == ".json":
        return read_plan(plan)
    try:
        require_rule(str(plan))
    except PlanError as error:
        raise PlanError(f"{error}, or a plan file *.json") from None
    return str(plan)


def read_plan(path: str | Path) -> PrecisionPlan:
    """Read a plan file; PlanError names the file and what is wrong."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"cannot read the plan {str(path)!r}: {error}") from error
    try:
        return PrecisionPlan.from_json(text)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error


def quantize_model(
    model: nn.Module,
    plan: PrecisionPlan | str | Path,
    *,
    backend: str = "auto",
    scales: str = "absmax",
    calibration: Tensor | None = None,
    progress: bool = False,
) -> nn.Module:
    """A new model whose linear layers are `FlexQLinear` as the plan says; `model` is left alone.

    model: a decoder-only transformers model whose blocks hold nn.Linear (LLaMA, OPT, Qwen, Mistral, ...).
    plan: `w6a6`, `w6a8`, `flexq`, a plan file, or a PrecisionPlan.  backend: see runtime/ops.py.
    scales: how weights' scales are chosen, `absmax`, `mse` or `output` (quant/scales.py); codes and kernels are the same for all.
    calibration: token ids [W, T] int64 of a text, which `output` wants and the others do not take.
    progress: show a bar, one step a layer.

    Layers are quantised one at a time. What is not quantised (embeddings, norms, head) shares its memory with `model`, so
    that the new model costs only its packed weights; delete `model` to free the originals. `save_pretrained` of the new model
    writes a 6-bit checkpoint (runtime/checkpoint_format.py).
    Raises PlanError for a plan that does not fit, ValueError for a weight that is not finite (names the layer), for another
    backend or other scales, or for a calibration text that is missing or not wanted.
    """
    plan = resolve_plan(plan, model)
    ops.require_backend(backend)
    require_scales(scales)
    if (calibration is None) == (scales == "output"):
        given = "no calibration text" if calibration is None else "a calibration text"
        raise ValueError(f"scales is {scales!r} with {given}; accepted: a text for 'output' and for no other")
    moments = None if calibration is None else input_moments(model, calibration)
    make = quantizer(plan, backend=backend, scales=scales, moments=moments)
    quantised = replace_linear_layers(model, make, progress=progress)
    if hasattr(quantised, "save_pretrained"):
        from flexq_core.runtime.hf_quantizer import make_savable  # imports transformers, as this model's class has done

        make_savable(quantised, plan)
    return quantised


def quantizer(
    plan: PrecisionPlan, *, backend: str = "auto", scales: str = "absmax", moments: Mapping[str, Tensor] | None = None
) -> Callable[[str, nn.Linear], FlexQLinear]:
    """What makes a plan's `FlexQLinear` of a linear layer and its full name.

    scales: as `quantize_model`.  moments: layer → [K], from `input_moments`, for `output`.
    """

    def make(name: str, linear: nn.Linear) -> FlexQLinear:
        if moments is not None and name not in moments:
            raise ValueError("no token of the calibration text reaches it; accepted: a longer text, or other scales")
        return FlexQLinear.from_linear(
            linear,
            precision=plan.layers[name],
            group_size=plan.group_size,
            backend=backend,
            scales=scales,
            moments=None if moments is None else moments[name],
        )

    return make


def empty_layers_in_place(model: nn.Module, plan: PrecisionPlan) -> None:
    """Put a `FlexQLinear` without weights, to be loaded, in the place of every linear layer that the plan names."""
    for name, bits in plan.layers.items():
        linear = model.get_submodule(name)
        layer = FlexQLinear(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            precision=bits,
            group_size=plan.group_size,
            dtype=linear.weight.dtype,
            device=linear.weight.device,
        )
        model.set_submodule(name, layer)


def replace_linear_layers(
    model: nn.Module, make: Callable[[str, nn.Linear], nn.Module], *, progress: bool = False
) -> nn.Module:
    """A new model in which `make(name, linear)` stands for every linear layer of the blocks; the rest shares memory.

    A ValueError that `make` raises is raised again with the layer's name.
    """
    # What deepcopy finds in this memo it takes as the copy. A parameter of its own over the same memory: moving or
    # casting the new model leaves the old one alone, and ties between parameters survive.
    stand_ins: dict[int, object] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        stand_ins[id(parameter)] = nn.Parameter(parameter.data, requires_grad=parameter.requires_grad)
    for name, linear in tqdm(linear_layers(model).items(), desc="quantise", unit="layer", disable=not progress):
        stand_ins[id(linear)] = _made(make, name, linear)
    return copy.deepcopy(model, stand_ins)


def replace_in_block_in_place(name: str, block: nn.Module, make: Callable[[str, nn.Linear], nn.Module]) -> nn.Module:
    """The block called `name` in its model, every linear layer of it replaced as `replace_linear_layers` does.

    In place and one at a time, so that of the originals and their replacements only one layer is in memory twice.
    """
    for inner in list(linears_of_block(block)):
        block.set_submodule(inner, _made(make, f"{name}.{inner}", block.get_submodule(inner)))
    return block


def _made(make: Callable[[str, nn.Linear], nn.Module], name: str, linear: nn.Linear) -> nn.Module:
    try:
        return make(name, linear)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error


def linear_weight_bytes(model: nn.Module) -> int:
    """Bytes of the weights of the block's linear layers, quantised (with scales) or not."""
    packed = sum(layer.weight_bytes() for layer in model.modules() if isinstance(layer, FlexQLinear))
    return packed + sum(layer.weight.numel() * layer.weight.element_size() for layer in linear_layers(model).values())
