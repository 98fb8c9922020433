"""Load a 6-bit checkpoint, and refuse one that is not what was saved."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flexq_core.files.names import place_tensors
from flexq_core.files.tensors import find_tensors, headers, read_tensor
from flexq_core.quant.plan import PlanError, PrecisionPlan
from flexq_core.runtime import ops
from flexq_core.runtime.checkpoint_format import (
    METHOD,
    CheckpointError,
    checkpoint_errors,
    checksum,
    read_config,
    read_metadata,
    require_version,
)
from flexq_core.runtime.convert import empty_layers_in_place, resolve_plan
from flexq_core.runtime.linear import FlexQLinear

PACKED = {"weight": "U8", "weight_scale": "F16", "weight_exponent": "I8"}
FLOATS = ("F32", "F16", "BF16")
"""Types of a packed layer's tensors and of ordinary ones, as safetensors calls them."""


class UncheckedTensors(UserWarning):
    """That tensors of a file have no checksum, by which they could be compared with what was saved."""


def load(folder: str | Path, *, backend: str = "auto", **options: Any) -> Any:
    """The model of a 6-bit checkpoint, every tensor of which is there, fits, and has the bits that were saved.

    folder: written by `python -m flexq_core quantize` or by `save_pretrained`.  backend: of its layers, see runtime/ops.py.
    options: for transformers' `from_pretrained`, such as `dtype`, `device_map` or `distributed_config`.
    Raises CheckpointError, which says what to do, for a folder that is no such checkpoint, a newer format, pickled weights,
    a file that is absent or cut off, a tensor that is missing, unexpected, of the wrong shape or altered; PlanError for
    a plan that does not fit the model; ValueError for a backend of no such name or a GPU where there is none.
    """
    from transformers import AutoModelForCausalLM

    ops.require_backend(backend)
    if "device" in options:
        raise TypeError(f"load has no 'device'; accepted: device_map={str(options['device'])!r}")
    _require_device(options.get("device_map"))
    folder = Path(folder).expanduser()
    verify(folder)
    model, found = AutoModelForCausalLM.from_pretrained(
        folder, use_safetensors=True, output_loading_info=True, **options
    )
    if wrong := {what: names for what, names in found.items() if names}:
        raise CheckpointError(f"{folder}: transformers could not place all tensors: {wrong}")
    for module in model.modules():
        if isinstance(module, FlexQLinear):
            module.backend = backend
    return model


def _require_device(device_map: Any) -> None:
    """Raise ValueError for a GPU that is not there, before anything is read; what a map may be is transformers' to say."""
    places = device_map.values() if isinstance(device_map, dict) else (device_map,)
    wanted = [place for place in places if isinstance(place, int) or str(place).startswith("cuda")]
    if wanted and not torch.cuda.is_available():
        raise ValueError(
            f"device_map asks for {wanted[0]!r}, and torch finds no CUDA GPU here: give 'cpu', or see what "
            "`python -m flexq_core doctor` says of this machine"
        )


@checkpoint_errors()
def verify(folder: Path) -> None:
    """Read every tensor of a checkpoint and raise CheckpointError or PlanError, as `load` does, unless all is as it was saved.

    Warns of tensors without a checksum, which `save_pretrained` leaves to models that were partly offloaded.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{str(folder)!r} is no folder; accepted: one that `python -m flexq_core quantize` wrote")
    quantization = read_config(folder).get("quantization_config") or {}
    if quantization.get("quant_method") != METHOD:
        raise CheckpointError(
            f"{folder} is no 6-bit checkpoint (its quant_method is {quantization.get('quant_method')!r}): make one with "
            f"`python -m flexq_core quantize {folder} <out>`"
        )
    require_version(quantization.get("format_version"))
    try:
        plan = PrecisionPlan.from_dict(quantization.get("plan"))
    except PlanError as error:
        raise PlanError(f"{folder / 'config.json'}: {error}") from error
    model = empty_model(folder)
    resolve_plan(plan, model)
    empty_layers_in_place(model, plan)
    found = find_tensors(folder)
    places, parts = place_tensors(model, found)
    known = {stored: name for name, stored in places.items()}
    require_tensors(model, {known.get(stored, stored): where for stored, where in found.items()}, parts)
    for file in sorted({file for file, *_ in found.values()}):
        verify_shard(file)


def empty_model(folder: Path) -> nn.Module:
    """The unquantised model of a folder's config.json, without weights (on the meta device). Code beside it is not run."""
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    described = read_config(folder)
    if "auto_map" in described and (kind := str(described.get("model_type"))) not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{folder} is a {kind!r}, which transformers knows by code in that folder alone, and such code is not run here: "
            "where you trust it, use from_pretrained(..., trust_remote_code=True); quantization_config=FlexQConfig(...) quantises"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # what odd values of a configuration end in has no common base
        raise CheckpointError(f"{folder / 'config.json'} describes no causal language model: {error}") from error


def require_tensors(
    model: nn.Module, tensors: Mapping[str, tuple[Path, list[int], str]], parts: Mapping[str, str]
) -> None:
    """Raise CheckpointError unless these tensors, name → (file, shape, type), are the model's.

    parts: name of a tensor that is none of the model's → the one of the model that is made of it and of others.
    """
    expected = model.state_dict()
    packed = {name for name, module in model.named_modules() if isinstance(module, FlexQLinear)}
    tied = getattr(model, "all_tied_weights_keys", {})
    tied = tied | {source: name for name, source in tied.items()}
    sizes = Counter()
    for part, name in parts.items():
        sizes[name] += math.prod(tensors[part][1])
    made = {name for name, size in sizes.items() if size >= expected[name].numel()}
    present = tensors.keys() | made
    if missing := [name for name in expected if name not in present and tied.get(name) not in present]:
        raise CheckpointError(
            f"{len(missing)} tensors are missing, first {missing[0]!r}: a file was lost or the checkpoint is of another model; "
            "copy it again or make it anew"
        )
    if unexpected := [name for name in tensors if name not in expected and name not in parts]:
        name = unexpected[0]
        raise CheckpointError(
            f"{len(unexpected)} tensors are unexpected, first {name!r} in {tensors[name][0]}: they are of another model or of "
            "another plan; copy the checkpoint again or make it anew"
        )
    for name, (file, shape, dtype) in tensors.items():
        wanted, (layer, _, leaf) = expected[parts.get(name, name)], name.rpartition(".")
        fits = name in parts or shape == list(wanted.shape)
        types = FLOATS if wanted.is_floating_point() else (dtype,)
        if layer in packed and leaf in PACKED:
            types = (PACKED[leaf],)
        if fits and dtype not in types and types == FLOATS:
            raise CheckpointError(
                f"{name!r} in {file} is of type {dtype}; accepted: {', '.join(types)}: save the original in one of these first "
                "(model.to(torch.bfloat16).save_pretrained)"
            )
        if not fits or dtype not in types:
            raise CheckpointError(
                f"{name!r} in {file} is {dtype} of shape {shape}; accepted: {' or '.join(types)} of shape {list(wanted.shape)}: "
                "the weights and config.json are not of one checkpoint; copy it again or make it anew"
            )


@checkpoint_errors()
def verify_shard(file: Path) -> dict[str, Any]:
    """Read every tensor of a file of weights against its checksum; returns the header's metadata. Raises CheckpointError."""
    saved = read_metadata(file)
    without = []
    for name, _, _ in headers(file):
        if name not in saved["sha256"]:
            without.append(name)
            continue
        tensor = read_tensor(file, name)
        if checksum(tensor) != saved["sha256"][name]:
            raise CheckpointError(
                f"{name!r} in {file} is altered: its bits are not those that were saved; copy the file again or make it anew"
            )
        if name.endswith(".weight_scale") and not tensor.isfinite().all():
            raise CheckpointError(
                f"{name!r} in {file} was saved with a scale that is not finite; make the checkpoint anew"
            )
    if without:
        text = f"{file}: {len(without)} tensors have no checksum, first {without[0]!r}"
        warnings.warn(text, UncheckedTensors, stacklevel=3)
    return saved
