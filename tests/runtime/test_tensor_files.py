"""Safetensors files, a tensor at a time: what safetensors reads, but also where memory is scarce."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import flexq_core
from flexq_core.runtime.tensor_files import open_header, read_tensor

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def test_every_tensor_is_what_safetensors_reads(tmp_path):
    tensors = {str(dtype): torch.randn(3, 5).to(dtype) for dtype in FLOATS}
    tensors |= {str(dtype): torch.randint(0, 100, (2, 1, 7), dtype=dtype) for dtype in INTEGERS}
    tensors |= {"bool": torch.tensor([True, False, True]), "none": torch.empty(0, 4), "one": torch.tensor(2.5)}
    save_file(tensors, tmp_path / "file", metadata={"of": "a test"})
    expected = load_file(tmp_path / "file")
    with open_header(tmp_path / "file") as header:
        assert header.metadata() == {"of": "a test"} and set(header.keys()) == set(expected)
    for name, tensor in expected.items():
        found = read_tensor(tmp_path / "file", name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found.flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))
        found.zero_()  # it is the caller's
    assert torch.equal(read_tensor(tmp_path / "file", "one"), tensors["one"])


def test_what_cannot_be_read_is_named(tmp_path):
    save_file({"whole": torch.ones(64), "last": torch.ones(64)}, tmp_path / "file")
    with pytest.raises(KeyError, match="absent"):
        read_tensor(tmp_path / "file", "absent")
    contents = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(contents.replace(b'"F32"', b'"F99"'))
    with pytest.raises(ValueError, match="'whole' in .* is F99; accepted: F64, F32"):
        read_tensor(tmp_path / "file", "whole")
    (tmp_path / "file").write_bytes(contents[:-1])
    with pytest.raises(ValueError, match="ends within the tensor 'whole'"):
        read_tensor(tmp_path / "file", "whole")


LIMITED = """
import resource, sys
import torch
from pathlib import Path
from flexq_core.runtime.checkpoint_format import headers
from flexq_core.runtime.tensor_files import read_tensor
file = Path(sys.argv[1])
held = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (held + (64 << 20),) * 2)  # of memory that may be written to
assert [name for name, _, _ in headers(file)] == ["large", "small"], list(headers(file))
assert read_tensor(file, "small").sum() == 3
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
def test_a_file_larger_than_the_memory_that_is_left_is_read(tmp_path):
    save_file(
        {"large": torch.zeros(256 << 20, dtype=torch.uint8), "small": torch.ones(3, dtype=torch.uint8)},
        tmp_path / "model.safetensors",
    )
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, tmp_path / "model.safetensors"],
        cwd=Path(flexq_core.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
