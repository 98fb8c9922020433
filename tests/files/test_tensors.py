"""Safetensors folders: what safetensors reads, but also where memory is scarce; what is no such folder is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import flexq_core
from flexq_core.files.tensors import (
    INDEX,
    SINGLE_FILE,
    TensorError,
    find_tensors,
    headers,
    open_file,
    read_tensor,
    write_tensors,
)
from tests.models import save_model, tiny_model

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def test_every_tensor_is_what_safetensors_reads(tmp_path):
    tensors = {str(dtype): torch.randn(3, 5).to(dtype) for dtype in FLOATS}
    tensors |= {str(dtype): torch.randint(0, 100, (2, 1, 7), dtype=dtype) for dtype in INTEGERS}
    tensors |= {"bool": torch.tensor([True, False, True]), "none": torch.empty(0, 4), "one": torch.tensor(2.5)}
    save_file(tensors, tmp_path / "file", metadata={"of": "a test"})
    expected = load_file(tmp_path / "file")
    with open_file(tmp_path / "file") as header:
        assert header.metadata() == {"of": "a test"} and set(header.keys()) == set(expected)
    for name, tensor in expected.items():
        found = read_tensor(tmp_path / "file", name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found.flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))
        found.zero_()  # it is the caller's
    assert torch.equal(read_tensor(tmp_path / "file", "one"), tensors["one"])


def test_what_is_written_is_what_safetensors_reads_whatever_the_order_it_was_given_in(tmp_path):
    tensors = {f"x{dtype}": torch.randn(3, 5).to(dtype) for dtype in FLOATS} | {"é": torch.randn(4, 2).T}
    tensors |= {"bool": torch.tensor([True, False]), "none": torch.empty(0, 4), "one": torch.tensor(2.5)}
    metadata = {"of": 'a "test"', "a": "é"}
    write_tensors(tmp_path / "file", tensors, metadata)
    with open_file(tmp_path / "file") as header:
        assert header.metadata() == metadata
    for name, found in load_file(tmp_path / "file").items():
        assert (found.dtype, found.shape) == (tensors[name].dtype, tensors[name].shape)
        assert torch.equal(found.float(), tensors[name].float())
    turned = [dict(reversed(given.items())) for given in (tensors, metadata)]
    write_tensors(tmp_path / "turned", *turned)
    assert (tmp_path / "turned").read_bytes() == (tmp_path / "file").read_bytes()


def test_what_cannot_be_read_is_named(tmp_path):
    save_file({"whole": torch.ones(64), "last": torch.ones(64)}, tmp_path / "file")
    with pytest.raises(TensorError, match="cannot read the tensor 'absent'"):
        read_tensor(tmp_path / "file", "absent")
    contents = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(contents.replace(b'"F32"', b'"F99"'))
    with pytest.raises(TensorError, match="'whole' in .* is F99; accepted: F64, F32"):
        read_tensor(tmp_path / "file", "whole")
    (tmp_path / "file").write_bytes(contents[:-1])
    with pytest.raises(TensorError, match="ends within the tensor 'whole'"):
        read_tensor(tmp_path / "file", "whole")
    with pytest.raises(TensorError, match="is truncated or no safetensors file"):
        headers(tmp_path / "file")
    (tmp_path / "file").write_bytes(contents[:20])
    with pytest.raises(TensorError, match="cannot read the tensor 'whole'"):
        read_tensor(tmp_path / "file", "whole")
    (tmp_path / "file").unlink()
    with pytest.raises(TensorError, match="lacks file: copy or download the file again"):
        headers(tmp_path / "file")


def write_index(folder, **weight_map) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_tensors_are_found_in_the_files_that_the_index_names(tmp_path):
    save_file({"a": torch.ones(2, 3), "b": torch.ones(1)}, tmp_path / "one.safetensors")
    save_file({"c": torch.ones(4).half()}, tmp_path / "two.safetensors")
    write_index(tmp_path, a="one.safetensors", c="two.safetensors", stale="two.safetensors")
    assert find_tensors(tmp_path) == {
        "a": (tmp_path / "one.safetensors", [2, 3], "F32"),
        "b": (tmp_path / "one.safetensors", [1], "F32"),
        "c": (tmp_path / "two.safetensors", [4], "F16"),
    }
    write_index(tmp_path, a="two.safetensors", c="one.safetensors")
    with pytest.raises(TensorError, match=r"places the tensor 'a' in two.safetensors, but one.safetensors holds it"):
        find_tensors(tmp_path)


def test_one_file_is_preferred_to_an_index_as_transformers_does(tmp_path):
    model = tiny_model("llama")
    save_model(model, tmp_path)
    with torch.no_grad():
        model.model.norm.weight.fill_(7)
    save_file(
        {name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / SINGLE_FILE, {"format": "pt"}
    )
    assert {file for file, _, _ in find_tensors(tmp_path).values()} == {tmp_path / SINGLE_FILE}
    assert (AutoModelForCausalLM.from_pretrained(tmp_path).model.norm.weight == 7).all()


@pytest.mark.parametrize(
    ("index", "text"),
    [
        ("[]", "is no index of weights .*: copy or download it again"),
        ("{", "is no index of weights"),
        ('{"weight_map": {}}', "names no tensor"),
        ('{"weight_map": {"a": "../b.safetensors"}}', r"names '../b.safetensors'; accepted: .* in its folder"),
        ('{"weight_map": {"a": "b.bin"}}', "names 'b.bin'; accepted: names of safetensors files"),
        ('{"weight_map": {"a": 3}}', "names 3; accepted"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path, index, text):
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(TensorError, match=text):
        find_tensors(tmp_path)


READER = """
from flexq_core.files.tensors import find_tensors, read_tensor
limit_memory()
assert {"large", "lm_head.weight"} < set(find_tensors(folder))
assert read_tensor(folder / "model.safetensors", "lm_head.weight").shape == (96, 64)
"""

LAYER_BY_LAYER = """
from flexq_core.sources.demo import demo_path
from flexq_core.sources.on_disk import ModelOnDisk
ModelOnDisk(demo_path("demo-llama"), device="cpu", dtype=torch.float32)  # what is imported takes memory once
limit_memory()
model = ModelOnDisk(folder, device="cpu", dtype=torch.float32)
assert model.model.lm_head.weight.shape == (96, 64)
assert model.block("model.layers.1").mlp.up_proj.weight.shape == (176, 64)
"""

LIMITED = """
import resource, sys
from pathlib import Path
import torch
folder = Path(sys.argv[1])
def limit_memory():  # that may be written to
    held = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (held + (64 << 20),) * 2)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
@pytest.mark.parametrize("script", [READER, LAYER_BY_LAYER], ids=["reader", "layer by layer"])
def test_a_file_larger_than_the_memory_that_is_left_is_read(tmp_path, script):
    save_model(tiny_model("llama"), tmp_path, max_shard_size="1GB")
    tensors = load_file(tmp_path / SINGLE_FILE) | {"large": torch.zeros(256 << 20, dtype=torch.uint8)}
    save_file(tensors, tmp_path / SINGLE_FILE)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED + script, tmp_path],
        cwd=Path(flexq_core.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
