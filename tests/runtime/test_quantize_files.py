"""Files to files: equal to quantising in memory, atomic at every moment, resumed where it stopped, refused with a next step."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import flexq_core
from flexq_core.files.tensors import INDEX, SINGLE_FILE
from flexq_core.quant import PlanError, PrecisionPlan
from flexq_core.quant.layers import linear_layers
from flexq_core.runtime import quantize_files as module
from flexq_core.runtime.checkpoint_format import CheckpointError
from flexq_core.runtime.convert import linear_weight_bytes
from flexq_core.runtime.quantize_files import quantize_files
from flexq_core.sources.demo import demo_path
from tests.models import CONFIGS, CONVERTED, logits, save_model, tiny_model

IDS = torch.arange(3, 15)[None]


def same_tensors(first, second) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A LLaMA in several files, and beside them what a model comes with."""
    folder = save_model(tiny_model("llama"), tmp_path_factory.mktemp("models") / "source")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.mark.parametrize("architecture", [*CONFIGS, *CONVERTED])
def test_every_architecture_is_kept_and_computes_as_if_quantised_in_memory(architecture, tmp_path):
    model = tiny_model(architecture)
    written = quantize_files(save_model(model, tmp_path / "source"), tmp_path / "out", "flexq")
    expected = flexq_core.quantize_model(model, "flexq")
    loaded = flexq_core.load(tmp_path / "out", dtype=torch.float32)
    assert same_tensors(loaded, expected)
    assert torch.equal(logits(loaded), logits(expected))
    scores = [each(input_ids=IDS, labels=IDS).loss for each in (loaded, expected)]
    assert torch.isfinite(scores[0]) and torch.equal(*scores)
    texts = [each.generate(IDS, max_new_tokens=5, min_new_tokens=5, do_sample=False) for each in (loaded, expected)]
    assert texts[0].shape == (1, 17) and torch.equal(*texts)
    assert loaded.config.tie_word_embeddings == (loaded.lm_head.weight is loaded.get_input_embeddings().weight)
    assert set(written.sqnr_db) == set(linear_layers(model)) == set(written.plan.layers)
    assert linear_weight_bytes(loaded) == written.layer_bytes
    assert linear_weight_bytes(model) == written.original_bytes


def test_files_are_those_of_a_checkpoint(source, tmp_path):
    written = quantize_files(source, tmp_path / "out", "w6a8", name="tiny")
    out = tmp_path / "out"
    assert written.folder == out
    assert {file.name for file in out.iterdir()} == {file.name for file in source.iterdir()} | {"README.md"}
    assert {file.name for file in source.glob("*.safetensors")} == {file.name for file in out.glob("*.safetensors")}
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    config = json.loads((out / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())
    assert quantization["quant_method"] == "flexq" and quantization["format_version"] == 1
    assert PrecisionPlan.from_dict(quantization["plan"]) == written.plan and written.plan.group_size == 128
    index = json.loads((out / INDEX).read_text())
    stored = {name: file.name for file in out.glob("*.safetensors") for name in load_file(file)}
    assert index["weight_map"] == stored
    assert index["metadata"]["total_size"] == sum(
        tensor.numel() * tensor.element_size()
        for file in out.glob("*.safetensors")
        for tensor in load_file(file).values()
    )
    card = (out / "README.md").read_text()
    assert all(f"| {layer} | W6A8 | {value:.1f} |" in card for layer, value in written.sqnr_db.items())
    assert {file.stat().st_mode & 0o777 for file in out.iterdir()} == {(out / "config.json").stat().st_mode & 0o777}
    assert not (tmp_path / "out.partial").exists()


def test_the_same_model_gives_the_same_bytes(source, tmp_path):
    first, second = (quantize_files(source, tmp_path / name).folder for name in ("one", "two"))
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name


@pytest.mark.parametrize("name", ["demo-llama", "demo-opt"])
def test_demo_checkpoints_are_small_and_their_error_is_what_was_measured(name, tmp_path):
    written = quantize_files(demo_path(name), tmp_path / "out", "flexq")
    original, packed = load_file(demo_path(name) / SINGLE_FILE), load_file(tmp_path / "out" / SINGLE_FILE)
    linear = sum(2 * original[f"{layer}.weight"].numel() for layer in written.plan.layers)
    parts = (".weight", ".weight_scale", ".weight_exponent")
    assert sum(packed[layer + part].nbytes for layer in written.plan.layers for part in parts) <= 0.42 * linear
    layer = next(iter(written.plan.layers))
    weight = original[f"{layer}.weight"].float()
    loaded = flexq_core.load(tmp_path / "out", dtype=torch.float32).get_submodule(layer)
    with torch.no_grad():
        noise = loaded_weight(loaded) - weight
    assert written.sqnr_db[layer] == pytest.approx(20 * torch.log10(weight.norm() / noise.norm()).item(), abs=1e-3)


def loaded_weight(layer):
    """The weight that a packed layer stands for, by its answers to one-hot inputs, whose codes are exact."""
    layer.bias = None
    return layer(torch.eye(layer.in_features)).T


def test_blocks_of_rows_and_rows_with_exponents_change_nothing(source, tmp_path, monkeypatch):
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith("proj.weight"):
                tensor[3] *= 2.0**-30
        (tmp_path / "scaled").mkdir(exist_ok=True)
        save_file(tensors, tmp_path / "scaled" / file.name, metadata={"format": "pt"})
    for file in source.glob("*.json"):
        (tmp_path / "scaled" / file.name).write_bytes(file.read_bytes())
    quantize_files(tmp_path / "scaled", tmp_path / "whole", "flexq")
    monkeypatch.setattr(module, "_ELEMENTS", 640)
    quantize_files(tmp_path / "scaled", tmp_path / "blocks", "flexq")
    whole, blocks = flexq_core.load(tmp_path / "whole"), flexq_core.load(tmp_path / "blocks")
    assert same_tensors(whole, blocks)
    assert whole.model.layers[0].mlp.up_proj.weight_exponent[3] != 0


def test_names_without_the_models_prefix_and_tensors_it_does_not_use(tmp_path):
    model = tiny_model("llama-3")
    tensors = {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}
    del tensors["lm_head.weight"]  # tied
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    (tmp_path / "source").mkdir()
    model.config.save_pretrained(tmp_path / "source")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "source" / SINGLE_FILE)
    written = quantize_files(tmp_path / "source", tmp_path / "out", "flexq")
    assert written.left_out == ("layers.0.self_attn.rotary_emb.inv_freq",)
    assert same_tensors(flexq_core.load(tmp_path / "out"), flexq_core.quantize_model(model, "flexq"))


def test_an_expert_that_is_lost_is_missed(tmp_path):
    source = save_model(tiny_model("mixtral"), tmp_path / "source", max_shard_size="1GB")
    tensors = load_file(source / SINGLE_FILE)
    del tensors["model.layers.0.block_sparse_moe.experts.1.w2.weight"]
    save_file(tensors, source / SINGLE_FILE)
    with pytest.raises(CheckpointError, match="1 tensors are missing, first 'model.layers.0.mlp.experts.down_proj'"):
        quantize_files(source, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize("name", ["layers.1.self_attn.q_proj", "layers.0.block_sparse_moe.experts.1.w2", "norm"])
def test_a_type_that_is_not_read_is_named(name, dtype, tmp_path):
    source = save_model(tiny_model("mixtral"), tmp_path / "source", max_shard_size="1GB")
    name = f"model.{name}.weight"
    tensors = load_file(source / SINGLE_FILE)
    save_file(tensors | {name: tensors[name].to(dtype)}, source / SINGLE_FILE)
    with pytest.raises(CheckpointError, match=f"'{name}' in .* is of type [FI].*; accepted: F32, F16, BF16: save"):
        quantize_files(source, tmp_path / "out")


def test_a_norm_or_an_embedding_that_is_not_finite_is_not_copied(tmp_path):
    source = save_model(tiny_model("llama"), tmp_path / "source", max_shard_size="1GB")
    whole = load_file(source / SINGLE_FILE)
    for name, value in (("model.norm.weight", float("nan")), ("model.embed_tokens.weight", -float("inf"))):
        tensors = {key: tensor.clone() for key, tensor in whole.items()}
        tensors[name][-1] = value
        save_file(tensors, source / SINGLE_FILE)
        with pytest.raises(
            ValueError, match=f"'{name}' in .*{SINGLE_FILE} has {tensors[name][-1].numel()} values that"
        ):
            quantize_files(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()


class Killed(BaseException):
    """What no handler expects."""


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_stopped_at_any_rename_there_is_all_or_nothing_and_a_rerun_goes_on(source, tmp_path, monkeypatch, after):
    replace, out = os.replace, tmp_path / "out"
    files = len(list(source.glob("*.safetensors")))
    quantised = []
    quantize = module.quantize_weight
    monkeypatch.setattr(
        module, "quantize_weight", lambda *given, **more: quantised.append(0) or quantize(*given, **more)
    )
    # First at each file of weights, of which every run finishes one more where it stops after the rename; then, all of
    # them finished, at the index, at config.json and at the folder.
    for stop in [0] * files + [0, 1, 2]:
        renames = iter(range(4))

        def replace_or_stop(*names, stop=stop, renames=renames):
            stopping = next(renames) == stop
            if after or not stopping:
                replace(*names)
            if stopping:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace_or_stop)
            with pytest.raises(Killed):
                quantize_files(source, out, "flexq")
        if not (after and stop == 2):
            assert not out.exists()
        if stop == 0:
            with pytest.raises(CheckpointError, match=r"has no config.json"):
                flexq_core.load(tmp_path / "out.partial")
    if not after:
        quantize_files(source, out, "flexq")
    assert len(quantised) == 14 if after else len(quantised) > 14  # no layer twice where its file was finished
    assert same_tensors(
        flexq_core.load(out), flexq_core.load(quantize_files(source, tmp_path / "whole", "flexq").folder)
    )


def test_other_inputs_another_plan_or_a_damaged_file_start_anew(source, tmp_path, monkeypatch):
    replace, out = os.replace, tmp_path / "out"
    files = sorted(file.name for file in source.glob("*.safetensors"))

    def stop_at_the_last(*names):
        if names[1].name == files[-1]:
            raise Killed
        replace(*names)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop_at_the_last)
        with pytest.raises(Killed):
            quantize_files(source, out, "w6a6")
    partial = tmp_path / "out.partial"
    damaged = partial / files[0]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x55")
    kept = {name: (partial / name).stat().st_mtime_ns for name in files[:-1]}
    quantize_files(source, out, "w6a6")
    again = {name for name in files[:-1] if (out / name).stat().st_mtime_ns != kept[name]}
    assert again == {files[0]}

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop_at_the_last)
        with pytest.raises(Killed):
            quantize_files(source, tmp_path / "other", "w6a6")
    plan = quantize_files(source, tmp_path / "other", "w6a8").plan
    assert {str(bits) for bits in plan.layers.values()} == {"W6A8"}
    loaded = flexq_core.load(tmp_path / "other")
    assert {str(loaded.get_submodule(layer).precision) for layer in plan.layers} == {"W6A8"}


KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)  # a fork must not meet a pool of threads
import flexq_core
from flexq_core.runtime.checkpoint import empty_model
from flexq_core.runtime.quantize_files import quantize_files
source, out, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
empty_model(source)  # imports what a run imports, so that kills meet the run itself

def run(until):
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        quantize_files(source, out, "flexq")
        os._exit(0)
    if until is not None:
        time.sleep(until)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1], time.monotonic() - started

def take_away():
    for file in out.iterdir():
        file.unlink()
    out.rmdir()

status, whole_s = run(None)
assert status == 0
take_away()
moments = random.Random(0)
killed = tries = 0
while tries < kills or not killed and tries < 50:  # a run that goes on where one was killed may end before its moment
    status, _ = run(moments.uniform(0, whole_s))
    killed += os.WIFSIGNALED(status)
    tries += 1
    if out.exists():
        flexq_core.runtime.checkpoint.verify(out)
        take_away()
assert run(None)[0] == 0
flexq_core.load(out)
print(killed)
"""


def test_kill_9_leaves_all_or_nothing_and_a_rerun_succeeds(source, tmp_path):
    kills = int(os.environ.get("FLEXQ_TEST_KILLS", "3"))
    done = subprocess.run(
        [sys.executable, "-c", KILLS, source, tmp_path / "out", str(kills)],
        cwd=Path(flexq_core.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 0, "no kill came in time"


def test_what_cannot_be_written_is_refused(source, tmp_path, monkeypatch):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("kept")
    with pytest.raises(CheckpointError, match=r"taken is not empty: give another folder"):
        quantize_files(source, taken)
    assert (taken / "mine.txt").read_text() == "kept"
    with pytest.raises(CheckpointError, match="is a file; accepted: a folder that is absent or empty"):
        quantize_files(source, taken / "mine.txt")
    mine = tmp_path / "out.partial"
    (mine / "photos").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="holds photos, which no run has made: move it away"):
        quantize_files(source, tmp_path / "out")
    (mine / "photos").rmdir()
    (mine / "notes.txt").touch()
    with pytest.raises(CheckpointError, match="holds notes.txt, which no run has made"):
        quantize_files(source, tmp_path / "out")
    save_file({"a": torch.zeros(1)}, mine / SINGLE_FILE)
    with pytest.raises(CheckpointError, match=f"holds {SINGLE_FILE}, which no run has made"):
        quantize_files(source, tmp_path / "out")
    assert {file.name for file in mine.iterdir()} == {"notes.txt", SINGLE_FILE}
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "disk_usage", lambda _: module.shutil._ntuple_diskusage(9, 9, 1000))
        with pytest.raises(CheckpointError, match=r"has 0.0 MiB free, and 0.[1-9] MiB are to be written: make room"):
            quantize_files(source, tmp_path / "full")
        assert not (tmp_path / "full.partial").exists()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_tensors", full)
    with pytest.raises(
        CheckpointError, match=r"the disk of .*full.partial is full: make room and run the same command again"
    ):
        quantize_files(source, tmp_path / "full")
    assert not (tmp_path / "full").exists()


def test_a_finished_checkpoint_in_the_way_is_told_as_one_and_left_alone(source, tmp_path):
    out = quantize_files(source, tmp_path / "out").folder
    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    with pytest.raises(CheckpointError, match="out holds a finished 6-bit checkpoint: use it"):
        quantize_files(source, out)
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == before


def test_a_place_that_no_folder_can_take_is_refused_at_once(source, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "there")
    for name, kind in (("link", "link"), ("there", "mount point")):
        with pytest.raises(CheckpointError, match=f"is a {kind}, whose place no folder can take"):
            quantize_files(source, tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "there"]


def test_a_second_run_leaves_the_first_its_folder_and_what_it_finished(source, tmp_path, monkeypatch):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    with module._locked(partial):
        with pytest.raises(CheckpointError, match="another run is writing"):
            quantize_files(source, out)
        assert partial.is_dir()
    work_of = module._Work.of

    def finished_meanwhile(*given):
        out.mkdir()
        (out / "config.json").touch()
        return work_of(*given)

    monkeypatch.setattr(module._Work, "of", finished_meanwhile)
    monkeypatch.setattr(module, "quantize_weight", lambda *_, **__: pytest.fail("computed for nothing"))
    with pytest.raises(CheckpointError, match="out is not empty"):
        quantize_files(source, out)
    assert not partial.exists()


def test_sources_that_cannot_be_quantised_say_why(source, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in source.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())

    def refused(text, error=CheckpointError, plan="flexq"):
        with pytest.raises(error, match=text):
            quantize_files(copy, tmp_path / "out", plan)
        assert not (tmp_path / "out").exists()

    refused("did you mean 'flexq'", PlanError, "flexk")
    other = PrecisionPlan.from_rule("w6a6", ["model.layers.9.mlp.up_proj"])
    refused("names 1 layers that the model lacks", PlanError, other)
    first = copy / json.loads((copy / INDEX).read_text())["weight_map"]["model.layers.0.mlp.up_proj.weight"]
    whole = first.read_bytes()
    first.write_bytes(whole[:-7])
    refused("is truncated or no safetensors file")
    tensors = load_file(source / first.name)
    name = next(name for name in tensors if name.endswith("proj.weight"))
    tensors[name][1, 2] = float("nan")
    save_file(tensors, first)
    refused(f"layer '{name.removesuffix('.weight')}': rows from 0: .* nan at index \\(1, 2\\)", ValueError)
    save_file({name: tensor for name, tensor in tensors.items() if not name.endswith("proj.weight")}, first)
    refused("1 tensors are missing, first 'model.layers.0.mlp.up_proj.weight'")
    first.unlink()
    refused(f"lacks {first.name}")
    (copy / INDEX).write_text('{"weight_map": {"a": "../b.safetensors"}}')
    refused("names '../b.safetensors'; accepted: names of safetensors files")
    (copy / INDEX).unlink()
    refused("holds no weights")
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    refused(r"only pickled weights \(pytorch_model.bin\).* convert it where you trust it")
    (copy / "config.json").write_text("{")
    refused("is not JSON")
    (copy / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    refused("quantised already .*'gptq'.*: start from the original")
    (copy / "config.json").unlink()
    refused("has no config.json")
