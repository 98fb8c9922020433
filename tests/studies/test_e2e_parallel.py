"""End to end in two processes over gloo: they write what one writes, one prints and records, what cannot be is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import flexq_core
from flexq_core.quant.layers import linear_layers
from flexq_core.quant.plan import PrecisionPlan
from flexq_core.runtime.quantize_files import quantize_files
from flexq_core.studies.e2e import __main__ as command
from flexq_core.studies.e2e import processes
from flexq_core.studies.e2e.parallel import require_shared
from flexq_core.workbook.records import read_jsonl
from tests.models import save_model, tiny_model
from tests.ranks import free_ports

SIZES = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
TOKENS = 9

RANKS = """
import gc, json, os, sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
import torch
torch.set_num_threads(1)  # a fork must not meet a pool of threads
# What is imported lazily: here, once, for both processes.
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast
import torch._dynamo, torch.distributed.tensor, flexq_core.runtime.hf_quantizer
from flexq_core.studies import e2e
from flexq_core.studies.e2e import __main__ as command, decode, parallel, processes
from flexq_core.workbook.run import Run
from tests.ranks import in_two_processes
folder, even, odd, tokens, *ports = sys.argv[1:]
folder, small = Path(folder), {"prompt_tokens": 8, "output_tokens": tokens, "repeats": 1}
e2e._WARM_UP_S = 0.0

def studied(**options):
    records = processes.SharedRecords("04_e2e", folder / "study")
    return parallel.ParallelStudy(Run("04_e2e", {}, "cpu", folder, records), **small | options)

def rank(number):
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), MASTER_PORT=ports[0])
    with processes.joined("cpu"):
        assert torch.get_num_threads() == max(1, os.cpu_count() // 2)
        study = studied(model=even, methods="fp16,flexq,w8a8")
        texts = {m: decode.generate(study.build(m, "auto"), study.prompt, int(tokens)).tokens.tolist() for m in ("fp16", "flexq")}
        (folder / f"tokens-{number}.json").write_text(json.dumps({"prompt": study.prompt.tolist(), **texts}))
        deep = studied(model=odd, methods="fp16", weights="random", seed=1)
        found = deep.measure("fp16", "torch")
        assert found["tokens_as_one_process"] == int(tokens) and found["difference"] < 1e-5, found
        assert deep._checked is not deep and len(deep.build("fp16", "torch").model.layers) == 3
        right = parallel.ParallelStudy.build
        def wrong(self, *case):
            model = right(self, *case)
            if number:
                model.model.layers[0].mlp.down_proj.weight.neg_()
            return model
        parallel.ParallelStudy.build = wrong
        try:
            study.measure("fp16", "torch")
        except RuntimeError as error:
            assert "2 processes write another text than one" in str(error), error
        else:
            raise AssertionError("a wrong sum is timed")
        parallel.ParallelStudy.build = right
    arguments = ["--prompt-tokens", "8", "--output-tokens", tokens, "--repeats", "1", "--outputs", str(folder), "--methods"]
    os.environ["MASTER_PORT"] = ports[1]
    assert command.main([*arguments, "fp16", "flexq", "w8a8", "--model", even]) == 0
    os.environ["MASTER_PORT"] = ports[2]
    try:
        command.main([*arguments, "flexq", "--model", odd])
    except SystemExit as error:
        assert error.code == 2
    else:
        raise AssertionError("three groups are shared")

def told_apart(number):
    with open(folder / f"out-{number}", "w") as out, redirect_stdout(out), redirect_stderr(out):
        rank(number)

gc.freeze()  # the study collects garbage; what is imported is none
sys.exit(in_two_processes(told_apart))
"""


def test_two_processes_write_what_one_writes(tmp_path):
    folders = {}
    for name, width, blocks in (("even", 512, 2), ("odd", 384, 3)):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            intermediate_size=width, num_hidden_layers=blocks, mlp_bias=True, attention_bias=True, **SIZES
        )
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        folders[name] = save_model(model, tmp_path / name)
    environment = os.environ | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment["OMP_NUM_THREADS"] = "1"  # as torchrun sets it
    done = subprocess.run(
        [sys.executable, "-c", RANKS, tmp_path, folders["even"], folders["odd"], str(TOKENS), *free_ports(3)],
        cwd=Path(flexq_core.__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    printed = [(tmp_path / f"out-{number}").read_text() for number in (0, 1)]
    assert done.returncode == 0, (done.stderr, *printed)
    assert "FlexQ's linear weights take less" in printed[0] and printed[1] == ""
    assert (
        "layer 'model.layers.0.mlp.down_proj' has 384 inputs in 3 groups of 128, which 2 processes cannot share; accepted: 1, 3"
        in printed[0]
    )

    first, second = (json.loads((tmp_path / f"tokens-{number}.json").read_text()) for number in (0, 1))
    assert first == second
    prompt = torch.tensor(first["prompt"])
    packed = quantize_files(folders["even"], tmp_path / "even-6", "flexq").folder
    for method, whole in (
        ("fp16", AutoModelForCausalLM.from_pretrained(folders["even"], dtype=torch.float32)),
        ("flexq", flexq_core.load(packed, dtype=torch.float32)),
    ):
        whole.generation_config.eos_token_id = None
        options = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
        text = whole.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[:, prompt.shape[1] :]
        assert first[method] == text.tolist()

    records = {(r.method, r.metric): r for r in read_jsonl(tmp_path / "records" / "04_e2e.jsonl")}
    assert {record.parameters["processes"] for record in records.values()} == {2}
    for method in ("fp32", "flexq"):
        assert records[method, "tokens_as_one_process"].value == TOKENS
    assert records["w8a8", "skipped"].reason.startswith(
        "w8a8 runs in one process: its layers are made of whole weights"
    )
    # Half of every matrix of two blocks; a byte of exponent a row is whole where inputs are cut.
    weights, rows = 2 * (256 * (256 + 2 * 128 + 256) + 3 * 256 * 512), 2 * (256 + 2 * 128 + 2 * 512)
    halves = weights * (6 / 8 + 2 / 128) / 2 + rows / 2 + 2 * (256 + 256)
    assert records["fp32", "linear_weights_mib"].value * 2**20 == 4 * weights / 2
    assert records["flexq", "linear_weights_mib"].value * 2**20 == halves


@pytest.mark.parametrize(
    ("architecture", "count", "text"),
    [
        ("opt", 2, "no plan to share a model of type 'opt'; accepted: one process"),
        ("llama", 3, "num_attention_heads is 4, which 3 processes cannot share; accepted: 1, 2, 4"),
        ("llama-3", 4, "num_key_value_heads is 2, which 4 processes cannot share; accepted: 1, 2"),
        ("llama", 2, r"'model.layers.0.self_attn.o_proj' has 64 inputs in 1 groups of 128, .*; accepted: 1$"),
    ],
)
def test_what_processes_cannot_share_is_refused(architecture, count, text):
    model = tiny_model(architecture)
    plan = PrecisionPlan.from_rule("w6a6", linear_layers(model))
    with pytest.raises(ValueError, match=text):
        require_shared(model, plan, count)
    if architecture == "llama" and count == 2:
        require_shared(model, None, count)  # not quantised there are no groups


@pytest.mark.parametrize(
    ("device", "here", "text"),
    [
        ("cpu", "2", "2 of 4 processes are on this machine; accepted: all of them"),
        ("cuda", "4", "4 processes on 1 GPUs; accepted: at most one a GPU"),
        (
            "cpu",
            "",
            "WORLD_SIZE is 4, and LOCAL_WORLD_SIZE is not set; accepted: processes that torchrun starts, or one",
        ),
    ],
)
def test_processes_that_cannot_join_are_refused(monkeypatch, capsys, device, here, text):
    for name, value in (("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", here), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=text), processes.joined(device):
        pytest.fail("joined")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    monkeypatch.setattr(command, "_measure", lambda *_: pytest.fail("measured"))
    assert command.main([]) == 1 and capsys.readouterr().err == f"{text}\n"


@pytest.mark.parametrize(("allowed", "threads"), [(6, 3), (1, 1)])
def test_processes_share_the_processors_that_they_may_use_and_not_all_there_are(monkeypatch, allowed, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(allowed)), raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    processes._share_processors()
    assert given == [threads]


def test_a_process_alone_asks_nobody():
    assert processes.is_first() and processes.from_first(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        processes.from_first(lambda: 1 // 0)
