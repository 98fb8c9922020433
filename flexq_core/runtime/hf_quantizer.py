"""The plug-in by which transformers saves and loads 6-bit models; imported by runtime/registration.py.

    model = AutoModelForCausalLM.from_pretrained("a 6-bit checkpoint")
    model = AutoModelForCausalLM.from_pretrained("any model", quantization_config=FlexQConfig("flexq"))
    model.save_pretrained("folder")

Files hold the canonical form, the same for every machine; a layer repacks it for its kernel when it first runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import ConversionOps, revert_weight_conversion
from transformers.distributed.tensor_parallel import (
    ALL_PARALLEL_STYLES,
    TensorParallelLayer,
    replace_layer_number_by_wildcard,
)
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from flexq_core.quant.plan import PlanError, PrecisionPlan
from flexq_core.quant.quantize import quantize_weight, require_scales
from flexq_core.quant.spec import TEXTLESS_SCALES, require_whole_groups
from flexq_core.runtime.checkpoint_format import METHOD, VERSION, checksums, metadata, require_version
from flexq_core.runtime.convert import empty_layers_in_place, plan_or_rule, resolve_plan
from flexq_core.runtime.linear import FlexQLinear, packed_parameters


@register_quantization_config(METHOD)
class FlexQConfig(QuantizationConfigMixin):
    """How a model is quantised, for `from_pretrained(..., quantization_config=...)` and in a checkpoint's config.json.

    plan: `w6a6`, `w6a8`, `flexq`, a plan file (`*.json`), a PrecisionPlan, or one as a dictionary (as config.json has it).
    scales: of weights that are quantised on the fly, `absmax` or `mse` (quant/scales.py); a checkpoint holds what came of it.
    Raises PlanError for what is no plan or no rule's name, CheckpointError for a format version that this release cannot read,
    ValueError for other scales.
    """

    def __init__(
        self,
        plan: PrecisionPlan | dict | str | Path = "flexq",
        format_version: int = VERSION,
        quant_method: str = METHOD,
        scales: str = "absmax",
        **unknown: Any,
    ) -> None:
        require_version(format_version)  # before what a newer format may have added
        if unknown:
            raise TypeError(f"FlexQConfig has no {', '.join(map(repr, unknown))}; accepted: plan, scales")
        require_scales(scales, TEXTLESS_SCALES)
        self.quant_method = quant_method
        self.format_version = format_version
        self.scales = scales
        self.plan = PrecisionPlan.from_dict(plan) if isinstance(plan, dict) else plan_or_rule(plan)

    def to_dict(self) -> dict[str, Any]:
        plan = self.plan.to_dict() if isinstance(self.plan, PrecisionPlan) else self.plan
        return {"quant_method": self.quant_method, "format_version": self.format_version, "plan": plan}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


@register_quantizer(METHOD)
class FlexQHfQuantizer(HfQuantizer):
    """Puts `FlexQLinear` where the plan says, before weights are loaded; quantises them as they come if they are not yet."""

    requires_calibration = False
    is_trainable = False
    is_compileable = True
    quantized_element_size = 1
    """Bytes of a weight that comes unquantised, at most, for what plans memory before it comes."""

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        try:
            plan = resolve_plan(self.quantization_config.plan, model)
        except PlanError as error:
            if not self.pre_quantized:
                raise
            raise PlanError(
                f"{error}; a 6-bit checkpoint is loaded as the class that it was saved as, mostly AutoModelForCausalLM"
            ) from error
        self.quantization_config.plan = plan
        weights = {name: model.get_submodule(name).weight for name in plan.layers}
        empty_layers_in_place(model, plan)
        if (
            not self.pre_quantized
        ):  # the original's type stands there until its weight comes: transformers 5.17 casts to it
            for name, weight in weights.items():
                model.get_submodule(name).weight = weight
        _keep_exponents_whole(model)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        for name, layer in model.named_modules():
            if isinstance(layer, FlexQLinear):
                layer.requires_grad_(False)  # loading makes every floating-point parameter trainable
                _require_whole_groups_here(name, layer)
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        if self.pre_quantized:
            return False
        layer, _, leaf = param_name.rpartition(".")
        needed = leaf == "weight" and isinstance(model.get_submodule(layer), FlexQLinear)
        if needed and (getattr(model, "_tp_size", None) or 1) > 1:
            raise ValueError(
                "a model cannot be quantised while it is loaded in parts by several processes: keep a 6-bit checkpoint first "
                "(python -m flexq_core quantize), then load that one"
            )
        return needed

    def get_quantize_ops(self) -> ConversionOps:
        return _QuantizeWeight(self.quantization_config.scales)

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[None, dict[str, str]]:
        state = model.state_dict()
        as_released = revert_weight_conversion(model, state)  # save_pretrained can write either
        return None, metadata(checksums(state | as_released))


class _QuantizeWeight(ConversionOps):
    """A weight as it is read → what a `FlexQLinear` keeps of it."""

    def __init__(self, scales: str) -> None:
        self._scales = scales

    def convert(
        self, input_dict: dict[str, Any], *, full_layer_name: str, model: nn.Module, **_: Any
    ) -> dict[str, Tensor]:
        (weight,) = input_dict.values()
        if isinstance(weight, list):
            (weight,) = weight
        layer = model.get_submodule(full_layer_name.rpartition(".")[0])
        bits, group_size = layer.precision.weight_bits, layer.group_size
        quantized = quantize_weight(weight, bits=bits, group_size=group_size, scales=self._scales)
        prefix = full_layer_name.removesuffix("weight")
        return {prefix + name: tensor for name, tensor in packed_parameters(quantized).items()}


def make_savable(model: nn.Module, plan: PrecisionPlan) -> None:
    """Give a model that `quantize_model` made what `save_pretrained` asks of a quantised model.

    It is not marked `is_quantized`, for which transformers would refuse `half()` and `float()`: these layers take both.
    """
    quantizer = FlexQHfQuantizer(FlexQConfig(plan), pre_quantized=True)
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)


def _keep_exponents_whole(model: nn.Module) -> None:
    """In tensor parallelism a layer's parameters follow its style: `rowwise` cuts the inputs, of which exponents have none."""
    if "replicate" not in ALL_PARALLEL_STYLES:  # transformers 5.17
        ALL_PARALLEL_STYLES.register("replicate", TensorParallelLayer())
    for name, _ in model.named_parameters():
        layer, _, leaf = replace_layer_number_by_wildcard(name).rpartition(".")
        if leaf == "weight_exponent" and model.tp_plan.get(layer, "").startswith("rowwise"):
            model.tp_plan[f"{layer}.{leaf}"] = "replicate"


def _require_whole_groups_here(name: str, layer: FlexQLinear) -> None:
    """Raise ValueError where processes that share a layer's inputs do not each hold whole groups."""
    if not isinstance(layer.weight, DTensor):
        return
    for dimension, placement in enumerate(layer.weight.placements):
        if placement.is_shard(1):
            processes = layer.weight.device_mesh.size(dimension)
            require_whole_groups(name, layer.in_features, layer.group_size, processes)
