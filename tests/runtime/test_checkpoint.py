"""`flexq_core.load` gives back what was saved, bit for bit, or says what is wrong with which file."""

import json
import random
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import flexq_core
from flexq_core.files.tensors import INDEX, SINGLE_FILE
from flexq_core.quant import PlanError
from flexq_core.runtime.checkpoint import verify
from flexq_core.runtime.checkpoint_format import CheckpointError, metadata
from flexq_core.runtime.quantize_files import quantize_files
from tests.models import CONVERTED, logits, save_model, tiny_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A Qwen2's 6-bit checkpoint in several files: its layers have biases."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return quantize_files(save_model(tiny_model("qwen"), folder / "source"), folder / "out").folder


@pytest.fixture
def copy(saved, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(saved, tmp_path / "copy")


def file_of(folder, tensor: str):
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def edit_config(folder, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def refused(folder, text: str, error=CheckpointError) -> None:
    with pytest.raises(error, match=text):
        flexq_core.load(folder)


def test_one_flipped_bit_in_any_tensor_is_found_and_the_tensor_named(copy):
    verify(copy)
    rng = random.Random(0)
    names = json.loads((copy / INDEX).read_text())["weight_map"]
    assert len(names) > 40
    for name, file in names.items():
        whole = (copy / file).read_bytes()
        header = int.from_bytes(whole[:8], "little")
        first, end = json.loads(whole[8 : 8 + header])[name]["data_offsets"]
        damaged = bytearray(whole)
        damaged[8 + header + rng.randrange(first, end)] ^= 1 << rng.randrange(8)
        (copy / file).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"'{name}' in .*{file} is altered"):
            verify(copy)
        (copy / file).write_bytes(whole)
    verify(copy)


def test_an_altered_tensor_is_not_loaded(copy):
    file = file_of(copy, "model.layers.0.mlp.up_proj.weight")
    file.write_bytes(file.read_bytes()[:-1] + b"\xaa")
    refused(copy, "is altered: its bits are not those that were saved; copy the file again")


def test_files_that_are_cut_off_or_lost(copy):
    file = file_of(copy, "model.layers.0.mlp.up_proj.weight")
    file.write_bytes(file.read_bytes()[:-1])
    refused(copy, f"{file.name} is truncated or no safetensors file")
    file.write_bytes(b"")
    refused(copy, f"{file.name} is truncated or no safetensors file")
    file.unlink()
    refused(copy, f"lacks {file.name}: copy or download the file again")
    (copy / INDEX).write_text("{}")
    refused(copy, "is no index of weights")
    (copy / INDEX).unlink()
    refused(copy, f"has no {SINGLE_FILE} and no {INDEX}: it holds no weights")
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    refused(copy, r"has only pickled weights \(pytorch_model.bin\), which can run code")


def rewrite(file, change) -> None:
    """The file with other tensors, and checksums that fit them."""
    from flexq_core.runtime.checkpoint_format import checksums

    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt", **metadata(checksums(tensors))})


def test_a_scale_that_is_not_finite_is_refused_whatever_its_checksum_says(copy):
    name = "model.layers.0.mlp.up_proj.weight_scale"
    file = file_of(copy, name)
    rewrite(file, lambda tensors: tensors[name][3].fill_(torch.nan))
    refused(copy, rf"'{name}' in .*{file.name} was saved with a scale that is not finite; make the checkpoint anew")


def test_tensors_that_are_not_the_models(copy, saved):
    name = "model.layers.1.mlp.down_proj.weight"
    file = file_of(copy, name)
    whole = file.read_bytes()
    rewrite(file, lambda tensors: tensors.pop(name))
    refused(copy, f"1 tensors are missing, first '{name}'")
    file.write_bytes(whole)
    rewrite(file, lambda tensors: tensors.update({"model.layers.7.bias": torch.ones(3)}))
    refused(copy, r"1 tensors are unexpected, first 'model.layers.7.bias' in .*safetensors")
    file.write_bytes(whole)
    rewrite(file, lambda tensors: tensors.update({name: tensors[name][:, :96].contiguous()}))
    refused(copy, rf"'{name}' in .* is U8 of shape \[64, 96\]; accepted: U8 of shape \[64, 192\]")
    file.write_bytes(whole)
    rewrite(file, lambda tensors: tensors.update({name: tensors[name].view(torch.int8)}))
    refused(copy, rf"'{name}' in .* is I8 of shape \[64, 192\]; accepted: U8")
    file.write_bytes(whole)
    scale = f"{name}_scale"
    rewrite(file_of(copy, scale), lambda tensors: tensors.update({scale: tensors[scale].bfloat16()}))
    refused(copy, rf"'{scale}' in .* is BF16 of shape .*; accepted: F16")


def test_plans_and_formats_that_do_not_fit(copy):
    plan = json.loads((copy / "config.json").read_text())["quantization_config"]["plan"]
    less = {name: bits for name, bits in plan["layers"].items() if "layers.1." not in name}
    edit_config(copy, plan=plan | {"layers": less})
    refused(copy, "leaves out 7 of its 14 layers", PlanError)
    eight = {"weight_bits": 8, "activation_bits": 8}
    edit_config(copy, plan=plan | {"layers": plan["layers"] | {"model.layers.0.mlp.up_proj": eight}})
    refused(copy, r"is U8 of shape \[176, 96\]; accepted: U8 of shape \[176, 128\]")
    edit_config(copy, plan=plan | {"group_size": 32})
    refused(copy, "accepted: .* of shape")
    odd = {"weight_bits": 6.0, "activation_bits": 6}
    edit_config(copy, plan=plan | {"layers": plan["layers"] | {"model.layers.0.mlp.up_proj": odd}})
    refused(copy, "config.json: layer 'model.layers.0.mlp.up_proj': weight_bits is 6.0; accepted: 2, 3", PlanError)
    edit_config(copy, plan="flexq")
    refused(copy, "config.json: the plan must be a JSON object", PlanError)
    edit_config(copy, plan=plan, format_version=2)
    refused(copy, "has format 2, newer than this release of flexq-core, which reads up to format 1: install a newer")
    from transformers import AutoModelForCausalLM

    with pytest.raises(CheckpointError, match="has format 2, newer"):
        AutoModelForCausalLM.from_pretrained(copy)
    edit_config(copy, format_version="1")
    refused(copy, "format_version is '1'; accepted: 1 to 1")
    edit_config(copy, format_version=1, quant_method="gptq")
    refused(copy, "is no 6-bit checkpoint .*'gptq'.*python -m flexq_core quantize")


def test_what_config_and_headers_say_in_an_odd_form_is_refused(copy, tmp_path):
    file = file_of(copy, "model.layers.0.mlp.up_proj.weight")
    whole, tensors = file.read_bytes(), load_file(file)
    for odd in ("{", "[]", "{}", '{"sha256": 3}', "[" * 10**5):
        save_file(tensors, file, metadata={"format": "pt", "flexq": odd})
        refused(copy, f"{file.name}: its checksums cannot be read")
    file.write_bytes(whole)
    (copy / INDEX).write_text("[" * 10**5)
    refused(copy, "is no index of weights")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": "flexq"}))
    refused(copy, "config.json: its quantization_config is 'flexq'; accepted: an object")
    with pytest.raises(CheckpointError, match="config.json: its quantization_config is 'flexq'"):
        quantize_files(copy, tmp_path / "out")


def test_code_that_a_model_brings_is_neither_run_nor_asked_about(copy, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    (copy / "code.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    config = json.loads((copy / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (copy / "config.json").write_text(json.dumps(config))
    flexq_core.load(copy)  # transformers' own model of that type
    config["model_type"] = "mine"
    (copy / "config.json").write_text(json.dumps(config))
    refused(copy, r"is a 'mine', .* such code is not run here: where you trust it, use from_pretrained")
    del config["quantization_config"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="such code is not run here"):
        quantize_files(copy, tmp_path / "out")
    assert not (tmp_path / "run").exists()


def test_folders_that_are_no_checkpoint(copy, tmp_path):
    refused(tmp_path / "nowhere", "is no folder")
    refused(tmp_path, "has no config.json")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "no-such"}))
    refused(copy, "describes no causal language model")
    (copy / "config.json").write_text(json.dumps(config | {"num_attention_heads": 0}))
    refused(copy, "config.json describes no causal language model")
    for text, told in (("[]", "not a JSON object"), ("{", "not JSON"), ("[" * 10**5, r"not JSON \(.*recursion")):
        (copy / "config.json").write_text(text)
        refused(copy, f"config.json is {told}")
        with pytest.raises(CheckpointError, match=f"config.json is {told}"):
            quantize_files(copy, tmp_path / "out")


def test_saved_again_it_is_the_same_bit_for_bit(saved, tmp_path):
    model = flexq_core.load(saved, dtype=torch.float32)
    model.save_pretrained(tmp_path / "again", max_shard_size="60KB")
    again = flexq_core.load(tmp_path / "again", dtype=torch.float32)
    first, second = model.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(logits(model), logits(again))
    again.save_pretrained(tmp_path / "third", max_shard_size="60KB")
    files = sorted(file.name for file in (tmp_path / "again").glob("*.safetensors"))
    assert len(files) > 1
    for name in files:
        a, b = (load_file(tmp_path / folder / name) for folder in ("again", "third"))
        assert a.keys() == b.keys() and all(torch.equal(a[tensor], b[tensor]) for tensor in a)


@pytest.mark.parametrize("architecture", CONVERTED)
@pytest.mark.parametrize("as_released", [True, False])
def test_every_tensor_that_is_saved_under_another_name_has_its_checksum(architecture, as_released, tmp_path, recwarn):
    quantised = flexq_core.quantize_model(tiny_model(architecture), "flexq")
    quantised.save_pretrained(tmp_path, save_original_format=as_released)
    assert torch.equal(logits(flexq_core.load(tmp_path, dtype=torch.float32)), logits(quantised))
    assert not [each for each in recwarn if "checksum" in str(each.message)]


def test_what_quantize_model_made_is_saved_and_its_checksums_are_checked(tmp_path):
    quantised = flexq_core.quantize_model(tiny_model("llama-3"), "w6a8")
    quantised.save_pretrained(tmp_path)
    loaded = flexq_core.load(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(loaded), logits(quantised))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight  # tied as before
    file = tmp_path / SINGLE_FILE
    file.write_bytes(file.read_bytes()[:-1] + b"\x3c")
    refused(tmp_path, "is altered")


@pytest.mark.parametrize("architecture", ["llama-3", "opt"])
def test_a_fused_model_is_saved_as_it_was_before(architecture, tmp_path):
    quantised = flexq_core.quantize_model(tiny_model(architecture), "flexq", backend="reference")
    expected = logits(quantised)
    flexq_core.fuse_(quantised).save_pretrained(tmp_path)
    loaded = flexq_core.load(tmp_path, backend="reference", dtype=torch.float32)
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(flexq_core.fuse_(loaded)), expected)


def test_tensors_without_checksums_are_loaded_with_a_warning(copy):
    file = file_of(copy, "model.layers.0.mlp.up_proj.weight")
    tensors = load_file(file)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=f"{len(tensors)} tensors have no checksum, first"):
        flexq_core.load(copy)


def test_checksums_are_of_type_shape_and_bytes(saved):
    """The recipe, written down again: whoever has the file can check it without this package."""
    import hashlib

    import numpy as np

    for file in saved.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            sha256 = json.loads(shard.metadata()["flexq"])["sha256"]
            assert set(sha256) == set(shard.keys())
            for name in sha256:
                tensor = shard.get_tensor(name)
                text = f"{tensor.dtype} {list(tensor.shape)} ".encode()
                content = np.ascontiguousarray(tensor.numpy()).tobytes()
                assert hashlib.sha256(text + content).hexdigest() == sha256[name]


def test_the_backend_is_the_one_asked_for(saved):
    model = flexq_core.load(saved, backend="simulate")
    assert model.model.layers[0].mlp.up_proj.backend == "simulate"


def test_a_backend_of_no_such_name_or_a_gpu_that_is_not_there_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="backend is 'cpuu'; accepted: auto, reference, cpu"):
        flexq_core.load(tmp_path / "nowhere", backend="cpuu")
    with pytest.raises(TypeError, match="load has no 'device'; accepted: device_map='cuda'"):
        flexq_core.load(tmp_path / "nowhere", device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device_map in ("cuda", 0, torch.device("cuda", 1), {"": "cuda:0", "lm_head": "cpu"}):
        with pytest.raises(ValueError, match="and torch finds no CUDA GPU here: give 'cpu'"):
            flexq_core.load(tmp_path / "nowhere", device_map=device_map)
