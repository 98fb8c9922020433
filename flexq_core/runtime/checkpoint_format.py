"""What a 6-bit checkpoint is, on disk: a transformers folder with packed weights and a checksum for every tensor.

    config.json            quantization_config: {quant_method: flexq, format_version, plan}
    *.safetensors          <layer>.weight          [N, Kp * weight_bits / 8] uint8, canonical packing (quant/packing.py)
                           <layer>.weight_scale    [N, Kp / group_size] float16
                           <layer>.weight_exponent [N] int8
                           everything else as in the original; each file's header has the sha256 of its tensors

The form is the same for every machine: kernels that want another order repack it once it is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexq_core.files.tensors import TensorError, open_file

METHOD = "flexq"
VERSION = 1
"""Of the files' form; a release reads its own and earlier ones."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message says what is wrong with which file, and what to do."""


@contextmanager
def checkpoint_errors() -> Iterator[None]:
    """Of a function or a block: what is wrong with files of weights, a TensorError, is raised as a CheckpointError."""
    try:
        yield
    except TensorError as error:
        raise CheckpointError(str(error)) from error


def require_version(version: Any) -> None:
    """Raise CheckpointError unless this release reads format `version`."""
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise CheckpointError(f"the checkpoint's format_version is {version!r}; accepted: 1 to {VERSION}")
    if version > VERSION:
        raise CheckpointError(
            f"the checkpoint has format {version}, newer than this release of flexq-core, which reads up to format {VERSION}: "
            "install a newer release"
        )


def checksum(tensor: Tensor) -> str:
    """sha256 of a tensor's type, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """name → checksum, of what is here: the parts of tensors that processes share are gathered, offloaded ones are left out."""
    found = {}
    for name, tensor in tensors.items():
        if hasattr(tensor, "full_tensor"):
            tensor = tensor.full_tensor()
        if not tensor.is_meta:
            found[name] = checksum(tensor)
    return found


def metadata(sha256: Mapping[str, str], **more: Any) -> dict[str, str]:
    """The header of a file of weights."""
    return {METHOD: json.dumps({"sha256": dict(sha256), **more})}


@checkpoint_errors()
def read_metadata(file: Path) -> dict[str, Any]:
    """What `metadata` put into a file's header; {"sha256": {}} where it has none. Raises CheckpointError for a bad file."""
    with open_file(file) as opened:
        text = (opened.metadata() or {}).get(METHOD)
    try:
        saved = json.loads(text) if text else {"sha256": {}}
        if not isinstance(saved["sha256"], dict):
            raise TypeError("sha256 is no object")
        return saved
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{file}: its checksums cannot be read ({error!r}); copy the file again") from error


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, in which `quantization_config` is an object or nothing; CheckpointError where it is absent or broken."""
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} has no config.json: it is not a transformers model")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON ({error}): copy it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is not a JSON object: copy it again")
    if not isinstance(config.get("quantization_config"), dict | None):
        raise CheckpointError(
            f"{file}: its quantization_config is {config['quantization_config']!r}; accepted: an object"
        )
    return config
