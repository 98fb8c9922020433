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
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from flexq_core.runtime.tensor_files import open_header

METHOD = "flexq"
VERSION = 1
"""Of the files' form; a release reads its own and earlier ones."""

SINGLE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message says what is wrong with which file, and what to do."""


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


def read_metadata(file: Path) -> dict[str, Any]:
    """What `metadata` put into a file's header; {"sha256": {}} where it has none. Raises CheckpointError for a bad file."""
    with open_shard(file) as shard:
        text = (shard.metadata() or {}).get(METHOD)
    try:
        return json.loads(text) if text else {"sha256": {}}
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file}: its checksums cannot be read ({error}); copy the file again") from error


def open_shard(file: Path) -> Any:
    """`open_header`; CheckpointError for a file that is absent, cut off or not safetensors."""
    try:
        return open_header(file)
    except FileNotFoundError:
        raise CheckpointError(f"{file.parent} lacks {file.name}: copy the file again") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is truncated or no safetensors file ({error}): copy it again or make it anew"
        ) from error


def shards(folder: Path) -> list[Path]:
    """The files of a model's weights, in order. Nothing is opened but the index.

    Raises CheckpointError where there are none, or only pickled ones, or where the index cannot be read.
    """
    if (folder / INDEX).is_file():
        try:
            names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder / INDEX} is no index of weights ({error}): copy it again") from error
        if bad := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
            raise CheckpointError(
                f"{folder / INDEX} names {bad[0]!r}; accepted: names of safetensors files in its folder"
            )
        return [folder / name for name in sorted(names)]
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if pickled := sorted({*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")}):
        raise CheckpointError(
            f"{folder} has only pickled weights ({pickled[0].name}), which can run code when they are read, and are not read "
            "here: take the model's safetensors version, or convert it where you trust it "
            "(https://huggingface.co/spaces/safetensors/convert)"
        )
    raise CheckpointError(f"{folder} has no {SINGLE_FILE} and no {INDEX}: it holds no weights")


def headers(file: Path) -> Iterator[tuple[str, list[int], str]]:
    """Every tensor of a file: name, shape and safetensors' name of the type. No data is read."""
    with open_shard(file) as shard:
        for name in shard.keys():  # noqa: SIM118 (not a mapping)
            view = shard.get_slice(name)
            yield name, view.get_shape(), view.get_dtype()


def read_config(folder: Path) -> dict[str, Any]:
    """config.json; CheckpointError where it is absent or broken."""
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} has no config.json: it is not a transformers model")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON ({error}): copy it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is not a JSON object: copy it again")
    return config
