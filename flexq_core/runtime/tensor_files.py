"""Safetensors files, a tensor at a time, on machines with less memory than a file has bytes.

torch maps a file as memory that may be written to, and Linux refuses that for files larger than the machine's memory. So headers
are read through safetensors' other mapping, and a tensor's bytes where the header says that they lie.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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


def open_header(file: Path) -> Any:
    """safetensors' `safe_open`, for names, shapes, types and metadata; raises as it does for a file that is cut off or none."""
    from safetensors import safe_open

    return safe_open(file, "np")


def read_tensor(file: Path, name: str) -> Tensor:
    """A tensor in this machine's memory, in the type it is stored in; `open_header` has found the file sound.

    Raises KeyError for a tensor that is not there, ValueError for a type that torch lacks or a file that was cut off since.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        entry = json.loads(stream.read(length))[name]
        begin, end = entry["data_offsets"]
        stream.seek(8 + length + begin)
        data = bytearray(end - begin)
        if stream.readinto(data) != len(data):
            raise ValueError(f"{file} ends within the tensor {name!r}")
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"the tensor {name!r} in {file} is {entry['dtype']}; accepted: {', '.join(_DTYPES)}")
    dtype = _DTYPES[entry["dtype"]]
    flat = torch.frombuffer(data, dtype=dtype) if math.prod(entry["shape"]) else torch.empty(0, dtype=dtype)
    return flat.view(entry["shape"])
