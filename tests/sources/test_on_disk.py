"""A model whose blocks stay on disk: what is loaded is what transformers loads, and what is missing is named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexq_core.files.tensors import TensorError
from flexq_core.quant.layers import decoder_blocks
from flexq_core.sources import demo
from flexq_core.sources.models import ModelError, load_model
from tests.models import CONFIGS, tiny_model


def saved(folder, model, **options):
    """A folder as `load_model` wants it: weights, config and a tokenizer."""
    model.save_pretrained(folder, **options)
    for file in demo.demo_path("demo-llama").glob("tokenizer*"):
        shutil.copy(file, folder)
    return str(folder)


def test_only_what_is_in_no_block_has_weights():
    loaded = load_model("demo-llama", blocks_on_disk=True)
    assert {name for name, p in loaded.model.named_parameters() if not p.is_meta} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
    }
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert loaded.inputs == load_model("demo-llama").inputs
    assert load_model("demo-llama").load_block is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", [*CONFIGS, "gpt-neox"])
def test_every_tensor_equals_what_transformers_loads_from_shards(tmp_path, architecture, dtype):
    folder = saved(tmp_path, tiny_model(architecture).half(), max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    whole = load_model(folder, dtype=dtype).model
    on_disk = load_model(folder, dtype=dtype, blocks_on_disk=True)
    found = {n: v for n, v in [*on_disk.model.named_parameters(), *on_disk.model.named_buffers()] if not v.is_meta}
    for block in decoder_blocks(on_disk.model):
        found |= {f"{block}.{name}": value for name, value in on_disk.load_block(block).named_parameters()}
        assert all(p.is_meta for p in on_disk.model.get_submodule(block).parameters())
    expected = dict([*whole.named_parameters(), *whole.named_buffers()])
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    assert not any(value.requires_grad for value in found.values())


def test_weights_that_were_saved_without_their_head_are_found(tmp_path):
    model = tiny_model("llama-3")
    folder = saved(tmp_path, model.model)
    model.config.save_pretrained(tmp_path)
    loaded = load_model(folder, blocks_on_disk=True)
    name = "model.layers.1"
    for key, value in loaded.load_block(name).state_dict().items():
        assert torch.equal(value, model.state_dict()[f"{name}.{key}"])


def test_experts_that_files_hold_one_by_one_are_told(tmp_path):
    folder = saved(tmp_path, tiny_model("mixtral"))
    with pytest.raises(ModelError, match=r"hold 'model\.layers\.\d.mlp\.experts\.\w+' in several tensors"):
        load_model(folder, blocks_on_disk=True)


def without(tensors, name):
    del tensors[name]


def reshaped(tensors, name):
    tensors[name] = tensors[name][:-1].clone()


@pytest.mark.parametrize(
    ("change", "tensor", "text"),
    [
        (without, "model.layers.1.mlp.up_proj.weight", r"lack the tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"),
        (without, "model.norm.weight", r"lack the tensor 'model\.norm\.weight'"),
        (without, "lm_head.weight", r"lack the tensor 'lm_head\.weight'"),
        (
            reshaped,
            "model.layers.0.mlp.up_proj.weight",
            r"up_proj\.weight' in .* \[175, 64\]; the model's is \[176, 64\]",
        ),
    ],
)
def test_a_missing_or_wrong_tensor_is_named_before_anything_is_computed(tmp_path, change, tensor, text):
    folder = saved(tmp_path, tiny_model("llama"))
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors, tensor)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=text):
        load_model(folder, blocks_on_disk=True)


def test_broken_folders_say_what_is_wrong(tmp_path):
    folder = saved(tmp_path, tiny_model("llama"), max_shard_size="50KB")
    index = tmp_path / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    tensor = "model.layers.0.mlp.up_proj.weight"
    wrong = next(file for file in names.values() if file != names[tensor])
    index.write_text(json.dumps({"weight_map": {**names, tensor: wrong}}))
    with pytest.raises(ModelError, match=f"lack the tensor '{tensor}', which {index.name} places in {wrong}: "):
        load_model(folder, blocks_on_disk=True)
    index.write_text(json.dumps({"weight_map": names}))
    shard = tmp_path / names[tensor]
    whole = shard.read_bytes()
    tensors = load_file(shard)
    without(tensors, tensor)
    save_file(tensors, shard)
    with pytest.raises(
        ModelError, match=f"lack the tensor '{tensor}', which .* places in {shard.name}: .* download them again"
    ):
        load_model(folder, blocks_on_disk=True)
    shard.write_bytes(whole[:-1])
    with pytest.raises(ModelError, match=f"{shard.name} is truncated or no safetensors file .*download it again"):
        load_model(folder, blocks_on_disk=True)
    shard.unlink()
    with pytest.raises(ModelError, match=f"lacks {shard.name}: copy or download the file again"):
        load_model(folder, blocks_on_disk=True)
    index.write_text(json.dumps({"weight_map": {**names, tensor: f"../{shard.name}"}}))
    with pytest.raises(
        ModelError, match=f"names '../{shard.name}'; accepted: names of safetensors files in its folder"
    ):
        load_model(folder, blocks_on_disk=True)
    index.write_text("[]")
    with pytest.raises(ModelError, match="is no index of weights"):
        load_model(folder, blocks_on_disk=True)
    index.unlink()
    with pytest.raises(ModelError, match=r"has no model\.safetensors and no model\.safetensors\.index\.json"):
        load_model(folder, blocks_on_disk=True)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(
        ModelError, match=r"has only pickled weights \(pytorch_model.bin\).* convert it where you trust it"
    ):
        load_model(folder, blocks_on_disk=True)


def test_a_file_that_is_cut_off_after_the_folder_was_opened_is_named(tmp_path):
    loaded = load_model(saved(tmp_path, tiny_model("llama")), blocks_on_disk=True)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(TensorError, match="model.safetensors ends within the tensor 'model.layers.1"):
        loaded.load_block("model.layers.1")
