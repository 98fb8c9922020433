"""transformers' own ways with a 6-bit model: on the fly, pipelines, static caches, offloading, several processes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import flexq_core
from flexq_core.quant import PlanError, PrecisionPlan
from flexq_core.runtime.linear import FlexQLinear
from flexq_core.runtime.quantize_files import quantize_files
from tests.models import logits, save_model, tiny_model
from tests.ranks import free_ports

IDS = torch.arange(3, 15)[None]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_model(tiny_model("llama-3"), tmp_path_factory.mktemp("models") / "source")


@pytest.fixture(scope="module")
def saved(source):
    return quantize_files(source, source.with_name("out"), "flexq").folder


@pytest.mark.parametrize("form", ["rule", "file", "plan", "dictionary"])
def test_quantised_on_the_fly_it_is_what_quantize_model_makes(source, tmp_path, form):
    expected = flexq_core.quantize_model(tiny_model("llama-3"), "flexq")
    plan = expected.config.quantization_config.plan
    assert isinstance(plan, PrecisionPlan)
    (tmp_path / "plan.json").write_text(plan.to_json())
    given = {"rule": "flexq", "file": tmp_path / "plan.json", "plan": plan, "dictionary": plan.to_dict()}[form]
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, quantization_config=flexq_core.FlexQConfig(plan=given)
    )
    assert torch.equal(logits(model), logits(expected))
    assert model.config.quantization_config.to_dict() == expected.config.quantization_config.to_dict()
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(flexq_core.load(tmp_path / "saved", dtype=torch.float32)), logits(expected))


def test_scales_of_least_error_on_the_fly_are_those_of_files(source, tmp_path):
    config = flexq_core.FlexQConfig("w6a6", scales="mse")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, quantization_config=config)
    written = quantize_files(source, tmp_path / "out", "w6a6", scales="mse").folder
    assert torch.equal(logits(model), logits(flexq_core.load(written, dtype=torch.float32)))
    plain = flexq_core.quantize_model(tiny_model("llama-3"), "w6a6")
    assert not torch.equal(logits(model), logits(plain))
    model.save_pretrained(tmp_path / "saved")
    assert "scales" not in (tmp_path / "saved" / "config.json").read_text()


def test_plans_that_do_not_fit_are_refused(source):
    with pytest.raises(TypeError, match="FlexQConfig has no 'pln'; accepted: plan, scales"):
        flexq_core.FlexQConfig(pln="w6a6")
    with pytest.raises(ValueError, match="accepted where weights are quantised as they are read: absmax, mse"):
        flexq_core.FlexQConfig(scales="output")
    for plan, text in (("flexk", "did you mean 'flexq'"), ("nowhere.json", "cannot read the plan 'nowhere.json'")):
        with pytest.raises(PlanError, match=text):
            flexq_core.FlexQConfig(plan)
    other = flexq_core.FlexQConfig(PrecisionPlan.from_rule("w6a6", ["a"]))
    with pytest.raises(PlanError, match="does not fit"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=other)


def test_a_checkpoint_loaded_as_another_class_says_as_which(saved):
    with pytest.raises(PlanError, match="is loaded as the class that it was saved as, mostly AutoModelForCausalLM"):
        transformers.AutoModel.from_pretrained(saved)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_loaded_in_any_type_codes_and_scales_stay_and_nothing_packed_is_trainable(saved, dtype):
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=dtype)
    expected = flexq_core.quantize_model(tiny_model("llama-3"), "flexq")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, FlexQLinear)}
    assert len(layers) == 14 and model.model.norm.weight.dtype == dtype
    for name, layer in layers.items():
        assert not any(parameter.requires_grad for parameter in layer.parameters())
        for part in ("weight", "weight_scale", "weight_exponent"):
            assert torch.equal(getattr(layer, part), getattr(expected.get_submodule(name), part))
    assert torch.isfinite(model(input_ids=IDS).logits).all()


def test_generation_with_a_static_cache_and_through_a_pipeline(saved):
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    plain = model.generate(IDS, **options)
    assert torch.equal(plain, model.generate(IDS, cache_implementation="static", **options))
    assert model.hf_quantizer.is_compileable  # else generation on a GPU is, silently, not compiled
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    tokenizer.pad_token_id = 0
    pipe = transformers.pipeline("text-generation", model=str(saved), tokenizer=tokenizer, dtype=torch.float32)
    assert isinstance(pipe.model.model.layers[0].mlp.up_proj, FlexQLinear)
    ids = pipe.model.generate(IDS, **options)
    assert torch.equal(plain, ids)


def test_a_device_map_and_weights_on_disk_change_nothing(saved, tmp_path):
    expected = logits(flexq_core.load(saved, dtype=torch.float32))
    assert torch.equal(logits(flexq_core.load(saved, dtype=torch.float32, device_map="auto")), expected)
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    offloaded = flexq_core.load(
        saved, dtype=torch.float32, device_map={**places, "model.layers.1": "disk"}, offload_folder=tmp_path
    )
    layer = offloaded.model.layers[1].mlp.up_proj
    assert layer.weight.is_meta
    assert torch.equal(logits(offloaded), expected) and torch.equal(logits(offloaded), expected)
    layer.prepare()
    assert layer._prepared is None  # what a layer that lives elsewhere repacked for a call is not kept


def test_lm_eval_scores_the_folder(saved):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = AutoTokenizer.from_pretrained(saved)
    harness = HFLM(pretrained=str(saved), tokenizer=tokenizer, dtype="float32", device="cpu", max_length=64)
    assert isinstance(harness.model.model.layers[0].mlp.up_proj, FlexQLinear)
    harness.tok_encode = lambda text, **_: [3 + ord(character) % 90 for character in text]
    request = Instance("loglikelihood", {}, ("a mean of", " arrays"), 0)
    ((score, _),) = harness.loglikelihood([request], disable_tqdm=True)
    ids = torch.tensor([harness.tok_encode("a mean of arrays")])
    with torch.no_grad():
        chances = flexq_core.load(saved, dtype=torch.float32)(input_ids=ids).logits.log_softmax(-1)
    assert score == pytest.approx(sum(chances[0, at - 1, ids[0, at]].item() for at in range(9, 16)), abs=1e-4)


RANKS = """
import os, sys
import torch
torch.set_num_threads(1)  # a fork must not meet a pool of threads
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig
import flexq_core
from tests.ranks import in_two_processes
folder, again, odd, unquantised, port = sys.argv[1:]
AutoModelForCausalLM.from_pretrained  # the import is lazy: here, once, for both processes

def rank(number):
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    split = {"distributed_config": DistributedConfig(tp_plan="auto"), "dtype": torch.float32}
    ids = torch.arange(3, 24)[None]
    with torch.no_grad():
        expected = flexq_core.load(folder, dtype=torch.float32)(input_ids=ids, use_cache=False).logits
        model = flexq_core.load(folder, **split)
        logits = model(input_ids=ids, use_cache=False).logits
    down = model.model.layers[0].mlp.down_proj
    assert down.weight.to_local().shape == (256, 192) and down.weight_scale.to_local().shape == (256, 2), down
    assert model.model.layers[0].mlp.up_proj.weight.to_local().shape == (256, 192)
    assert (logits - expected).norm() < 1e-5 * expected.norm(), (logits - expected).norm()
    model.save_pretrained(again)
    fly = {"quantization_config": flexq_core.FlexQConfig("flexq"), **split}
    for call, text in (
        (lambda: flexq_core.load(odd, **split), "groups of 128, which 2 processes cannot share"),
        (lambda: AutoModelForCausalLM.from_pretrained(unquantised, **fly), "cannot be quantised while it is loaded in parts"),
    ):
        try:
            call()
        except ValueError as error:
            assert text in str(error), error
        else:
            raise AssertionError("loaded")
    torch.distributed.destroy_process_group()

sys.exit(in_two_processes(rank))
"""


@pytest.mark.slow
def test_two_processes_share_a_model_and_save_it_as_it_was(tmp_path):
    """Tensor parallelism over gloo, with biases and exponents in the layers whose inputs are cut."""
    folders = {}
    for name, width in (("even", 512), ("odd", 384)):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            hidden_size=256, intermediate_size=width, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=96, max_position_embeddings=64, mlp_bias=True, attention_bias=True,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            model.model.layers[0].mlp.down_proj.weight[::3] *= 2.0**-30
        folders[name] = quantize_files(save_model(model, tmp_path / name), tmp_path / f"{name}-6", "flexq").folder
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            RANKS,
            folders["even"],
            tmp_path / "again",
            folders["odd"],
            tmp_path / "even",
            *free_ports(1),
        ],
        cwd=Path(flexq_core.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    first, again = (flexq_core.load(folder).state_dict() for folder in (folders["even"], tmp_path / "again"))
    assert first["model.layers.0.mlp.down_proj.weight_exponent"].any()
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
