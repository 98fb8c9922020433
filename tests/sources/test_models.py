"""Models by name: what is found, and one clear sentence with a next step for what is not."""

import json
import os
import shutil
import subprocess
import sys
from unittest import mock

import httpx
import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled

from flexq_core.runtime.convert import quantize_model
from flexq_core.sources import demo
from flexq_core.sources.models import HUB_MODELS, ModelError, load_model, locate_model, model_folder
from tests.models import save_model, tiny_model


def test_names_lead_to_places(tmp_path):
    assert locate_model("demo-llama") == str(demo.demo_path("demo-llama"))
    assert locate_model("llama-2-7b") == "meta-llama/Llama-2-7b-hf"
    assert locate_model("someone/some-model") == "someone/some-model"
    (tmp_path / "config.json").write_text("{}")
    assert locate_model(str(tmp_path)) == str(tmp_path)
    assert len(HUB_MODELS) == 20


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("no-such-model", r"no model is called 'no-such-model'.* Accepted: demo-llama, demo-opt, llama-7b"),
        ("demo-lama", "Did you mean 'demo-llama'"),
        ("lama-2-7b", "Did you mean 'llama-2-7b'"),
        ("./nowhere", "there is no folder '/.*/nowhere': check the path"),
        ("~/nowhere", "there is no folder '/.*/nowhere'"),
        ("models/of/mine", "there is no folder '/.*/models/of/mine'"),
        (__file__, "is a file; accepted: the folder of a model"),
    ],
)
def test_an_unknown_name_says_what_is_accepted(name, text):
    with pytest.raises(ModelError, match=text):
        locate_model(name)


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(ModelError, match="holds no config.json"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(
        ModelError, match="not a complete causal language model with its tokenizer and safetensors weights"
    ):
        load_model(str(tmp_path))


@pytest.mark.parametrize("blocks_on_disk", [False, True])
def test_a_checkpoint_that_is_quantised_already_is_refused(tmp_path, blocks_on_disk):
    save_model(quantize_model(tiny_model("llama"), "w6a6"), tmp_path)
    with pytest.raises(
        ModelError, match=r"is quantised already \(quant_method 'flexq'\).*: give the model that it was made from"
    ):
        load_model(str(tmp_path), blocks_on_disk=blocks_on_disk)


@pytest.mark.parametrize("blocks_on_disk", [False, True])
def test_code_that_a_model_brings_is_neither_run_nor_asked_about(blocks_on_disk, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    tiny_model("llama").save_pretrained(tmp_path)
    for file in demo.demo_path("demo-llama").glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    code = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": code}))
    with pytest.raises(ModelError, match="cannot load the model .* contains custom code"):
        load_model(str(tmp_path), blocks_on_disk=blocks_on_disk)
    assert not (tmp_path / "run").exists()


def test_pickled_weights_are_not_read(tmp_path):
    model = tiny_model("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    for file in demo.demo_path("demo-llama").glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match="safetensors"):
        load_model(str(tmp_path))


def test_without_network_the_message_names_the_next_step(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"cannot load the model 'opt-125m' \(facebook/opt-125m\)") as error:
        load_model("opt-125m")
    assert "the folder of a snapshot" in str(error.value)


UNREACHABLE = [httpx.ConnectError("no route"), httpx.ReadTimeout("silent"), OfflineModeIsEnabled("offline")]
"""What the hub raises where it gives no answer."""


@pytest.mark.parametrize("raised", UNREACHABLE, ids=lambda raised: type(raised).__name__)
def test_an_unreachable_hub_is_asked_once_for_a_while_and_transformers_never(raised, monkeypatch):
    asked = mock.Mock(side_effect=raised)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", asked)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(ModelError, match="the hub cannot be reached and the model is not in the local cache"):
        load_model("opt-125m")
    asked.assert_called_once_with("facebook/opt-125m", timeout=10)


def test_a_model_in_the_cache_needs_no_hub_and_is_told_by_its_commit(tmp_path):
    """In another process: the hub's library reads where its cache is when it is imported."""
    repository = tmp_path / "hub" / "models--facebook--opt-125m"
    snapshot = repository / "snapshots" / "0123456789abcdef"
    shutil.copytree(demo.demo_path("demo-opt"), snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    told = "model.fingerprint, len(model.tokenizer)"
    # Nobody listens there.
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    run = f"from flexq_core.sources.models import load_model; model = load_model('opt-125m'); print({told})"
    done = subprocess.run([sys.executable, "-c", run], env=environment, capture_output=True, text=True, timeout=100)
    tokens = len(load_model("demo-opt").tokenizer)
    assert done.stdout.split() == ["facebook/opt-125m@0123456789abcdef", str(tokens)], done.stderr


def test_a_model_whose_blocks_stay_on_disk_asks_the_hub_once(monkeypatch):
    asked = mock.Mock()
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", asked)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(demo.demo_path("demo-opt")))
    assert load_model("opt-125m", blocks_on_disk=True).load_block is not None
    asked.assert_called_once_with("facebook/opt-125m", timeout=10)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"device": "gpu"}, "no model can be on the device 'gpu'; accepted here: cpu"),
        ({"device": "cuda:99"}, "no model can be on the device 'cuda:99'; accepted here: cpu"),
        ({"dtype": torch.int8}, "dtype is torch.int8; accepted: torch.float32, torch.float16, torch.bfloat16"),
        ({"dtype": "float16"}, "dtype is 'float16'; accepted: torch.float32"),
    ],
)
def test_a_device_or_dtype_that_no_model_can_have(options, text):
    with pytest.raises(ModelError, match=text):
        load_model("demo-llama", **options)


def test_a_model_that_the_device_cannot_hold_names_the_ways_that_need_less(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("torch.nn.Module.to", full)
    with pytest.raises(
        ModelError, match=r"'demo-llama' takes 0.0 GiB, more than is free on cpu: .*layer_by_layer True .*quantize"
    ):
        load_model("demo-llama")


def test_a_models_folder_is_the_local_one_or_downloaded_without_pickles(tmp_path, monkeypatch):
    assert model_folder("demo-llama") == demo.demo_path("demo-llama")
    asked = {}

    def download(place, **options):
        asked.update(options, place=place)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(
        ModelError, match=r"facebook/opt-125m has no safetensors weights, and pickled ones.* convert it"
    ):
        model_folder("opt-125m")
    (tmp_path / "model.safetensors").touch()
    assert model_folder("opt-125m") == tmp_path
    assert asked["place"] == "facebook/opt-125m" and not any("bin" in pattern for pattern in asked["allow_patterns"])

    def offline(place, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ModelError, match="the hub cannot be reached and the model is not in the local cache"):
        model_folder("opt-125m")


def test_the_fingerprint_follows_the_weights(tmp_path):
    model = tiny_model("llama")
    for file in demo.demo_path("demo-llama").glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    first = loaded.fingerprint
    assert loaded.inputs == {"fingerprint": first, "dtype": "float32"}
    assert load_model(str(tmp_path)).fingerprint == first
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).fingerprint != first
