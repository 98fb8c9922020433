"""Safetensors folders: which files, which tensors with which shapes and types, and a tensor's bytes.

Made for machines with less memory than a file has bytes. torch maps a file as memory that may be written to, and Linux refuses
that for files larger than the machine's memory. So headers are read through safetensors' other mapping, and a tensor's bytes
where the header says that they lie.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SINGLE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
BESIDE_WEIGHTS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*", "USE_POLICY*")
"""Files that a model needs beside its weights, or must not go without."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorError(ValueError):
    """Weights that are absent, contradict each other or cannot be read; the message names the file, and says what to do."""


def find_tensors(folder: Path) -> dict[str, tuple[Path, list[int], str]]:
    """Every tensor of a model's weights: name → (its file, shape, safetensors' name of the type). Only headers are read.

    Raises TensorError where there are no weights, or only pickled ones; for an index that cannot be read, names a file outside
    its folder, or places a tensor where it is not; and for a file that is absent, cut off or not safetensors.
    """
    placed = read_index(folder)
    found = {}
    for file in sorted({folder / file for file in placed.values()}) or [folder / SINGLE_FILE]:
        for name, shape, dtype in headers(file):
            if placed.get(name, file.name) != file.name:
                raise TensorError(
                    f"{folder / INDEX} places the tensor {name!r} in {placed[name]}, but {file.name} holds it: the files are not "
                    "of one model; copy or download them again"
                )
            found[name] = file, shape, dtype
    return found


def read_index(folder: Path) -> dict[str, str]:
    """Name → name of its file, as the index says; {} where all are in one file, which transformers prefers to an index.

    Raises TensorError as `find_tensors`, for what is wrong with the index or the folder.
    """
    index = folder / INDEX
    if (folder / SINGLE_FILE).is_file():
        return {}
    if index.is_file():
        try:
            placed = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"].items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise TensorError(f"{index} is no index of weights ({error!r}): copy or download it again") from error
        for file in placed.values():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise TensorError(f"{index} names {file!r}; accepted: names of safetensors files in its folder")
        if placed:
            return placed
        raise TensorError(f"{index} names no tensor: copy or download it again")
    if pickled := sorted({*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")}):
        raise TensorError(
            f"{folder} has only pickled weights ({pickled[0].name}), which can run code when they are read, and are not read "
            "here: take the model's safetensors version, or convert it where you trust it "
            "(https://huggingface.co/spaces/safetensors/convert)"
        )
    raise TensorError(f"{folder} has no {SINGLE_FILE} and no {INDEX}: it holds no weights")


def headers(file: Path) -> list[tuple[str, list[int], str]]:
    """Every tensor of a file: name, shape and safetensors' name of the type. Raises TensorError as `open_file`."""
    with open_file(file) as opened:
        views = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
        return [(name, view.get_shape(), view.get_dtype()) for name, view in views.items()]


def open_file(file: Path) -> Any:
    """safetensors' `safe_open`, for what a header says; TensorError for a file that is absent, cut off or not safetensors."""
    try:
        return safe_open(file, "np")
    except FileNotFoundError:
        raise TensorError(f"{file.parent} lacks {file.name}: copy or download the file again") from None
    except (SafetensorError, OSError) as error:
        raise TensorError(
            f"{file} is truncated or no safetensors file ({error}): copy or download it again, or make it anew"
        ) from error


def read_tensor(file: Path, name: str) -> Tensor:
    """A tensor in this machine's memory, in the type it is stored in; `headers` has found the file sound.

    Raises TensorError for a tensor that is not there, a type that torch lacks or a file that was cut off since.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            entry = json.loads(stream.read(length))[name]
            begin, end = entry["data_offsets"]
            stream.seek(8 + length + begin)
            data = bytearray(end - begin)
            whole = stream.readinto(data) == len(data)
    except (OSError, ValueError, KeyError) as error:
        raise TensorError(
            f"cannot read the tensor {name!r} in {file} ({error!r}): copy or download it again"
        ) from error
    if not whole:
        raise TensorError(f"{file} ends within the tensor {name!r}: copy or download it again")
    if entry["dtype"] not in _DTYPES:
        raise TensorError(f"the tensor {name!r} in {file} is {entry['dtype']}; accepted: {', '.join(_DTYPES)}")
    dtype = _DTYPES[entry["dtype"]]
    flat = torch.frombuffer(data, dtype=dtype) if math.prod(entry["shape"]) else torch.empty(0, dtype=dtype)
    return flat.view(entry["shape"])


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, the same bytes for the same contents: safetensors' own writer shuffles the metadata.

    tensors: in this machine's memory, of types that `read_tensor` reads.  metadata: for the header.
    """
    stored = {dtype: name for name, dtype in _DTYPES.items()}
    ordered = sorted(tensors.items(), key=lambda each: (-each[1].element_size(), each[0]))  # so that all are aligned
    header, end = {"__metadata__": dict(sorted(metadata.items()))}, 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": stored[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            stream.write(tensor.contiguous().flatten().view(torch.uint8).numpy())
