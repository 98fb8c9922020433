"""Model conversion: every architecture, the original left alone, memory that does not double, plans that must fit."""

import pytest
import torch
from torch import nn

from flexq_core.quant import PlanError, PrecisionPlan
from flexq_core.quant.layers import linear_layers
from flexq_core.runtime.convert import linear_weight_bytes, quantize_model, resolve_plan
from flexq_core.runtime.linear import FlexQLinear
from tests.models import CONFIGS, logits, tiny_model


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_architecture_is_quantised_and_stays_close(architecture):
    model = tiny_model(architecture)
    before = {name: p.clone() for name, p in model.named_parameters()}
    expected = logits(model)
    layers = linear_layers(model)
    quantised = quantize_model(model, "w6a8")
    assert {n for n, m in quantised.named_modules() if isinstance(m, FlexQLinear)} == set(layers)
    assert len(layers) == (12 if architecture == "opt" else 14)
    assert not linear_layers(quantised)
    error = (logits(quantised) - expected).norm() / expected.norm()
    assert 0 < error < 0.1
    # The original is what it was, and still works.
    assert torch.equal(logits(model), expected)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_what_is_not_quantised_shares_memory_and_ties_survive():
    model = tiny_model("llama-3")
    quantised = quantize_model(model, "w6a6")
    assert quantised.lm_head.weight is quantised.model.embed_tokens.weight
    assert quantised.lm_head.weight is not model.lm_head.weight
    assert quantised.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()


def test_casting_the_new_model_leaves_the_old_one_alone():
    model = tiny_model("opt")
    quantize_model(model, "w6a6").to(torch.bfloat16).half()
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_size_is_what_the_format_says():
    model = tiny_model("llama")
    weights = sum(layer.weight.numel() for layer in linear_layers(model).values())
    assert linear_weight_bytes(model) == 4 * weights
    quantised = quantize_model(model, "w6a6")
    expected = sum(
        layer.out_features * (-(-layer.in_features // 128) * (96 + 2) + 1) for layer in linear_layers(model).values()
    )
    assert linear_weight_bytes(quantised) == expected


def test_plans_by_rule_object_and_file(tmp_path):
    model = tiny_model("llama")
    plan = resolve_plan("flexq", model)
    assert sum(bits.activation_bits == 8 for bits in plan.layers.values()) == 2
    file = tmp_path / "plan.json"
    file.write_text(plan.to_json())
    expected = logits(quantize_model(model, plan))
    assert torch.equal(logits(quantize_model(model, file)), expected)
    assert torch.equal(logits(quantize_model(model, "flexq")), expected)


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        ("flexk", "did you mean 'flexq'"),
        ("nowhere.json", "cannot read the plan 'nowhere.json'"),
        (PrecisionPlan.from_rule("w6a6", ["model.layers.9.x"]), "names 1 layers that the model lacks"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(plan, text):
    with pytest.raises(PlanError, match=text):
        quantize_model(tiny_model("llama"), plan)


def test_a_broken_plan_file_is_named(tmp_path):
    file = tmp_path / "plan.json"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(PlanError, match="cannot read the plan"):
        resolve_plan(file, tiny_model("llama"))
    file.write_text("{}")
    with pytest.raises(PlanError, match=r"plan\.json: the plan lacks 'format'"):
        resolve_plan(file, tiny_model("llama"))


def test_models_that_cannot_be_quantised_say_why():
    model = tiny_model("llama")
    with pytest.raises(PlanError, match="quantised already"):
        quantize_model(quantize_model(model, "w6a6"), "w6a6")
    with pytest.raises(ValueError, match="backend is 'cpuu'; accepted: auto, reference"):
        quantize_model(model, "w6a6", backend="cpuu")
    with pytest.raises(PlanError, match="Linear has no nn.Linear inside its blocks"):
        quantize_model(nn.Linear(4, 4), "w6a6")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layer 'model.layers.1.mlp.up_proj': .* nan at index \(0, 0\)"):
        quantize_model(model, "w6a6")


def test_experts_that_are_no_linear_layers_are_told_once(recwarn):
    model = tiny_model("mixtral")
    quantize_model(model, "w6a6")
    resolve_plan("w6a6", model)  # from another place
    (told,) = [str(each.message) for each in recwarn if "not quantised" in str(each.message)]
    left = sum(p.numel() for name, p in model.named_parameters() if ".mlp." in name)
    assert told.startswith(f"{left:,} of the {sum(p.numel() for p in model.parameters()):,} weights of this Mixtral")
    assert "first 'model.layers.0.mlp.gate.weight'" in told
    quantize_model(tiny_model("gpt-neox"), "w6a6")
    assert len([each for each in recwarn if "not quantised" in str(each.message)]) == 1


def test_generation_and_compile_work_on_the_quantised_model():
    model = quantize_model(tiny_model("llama-3"), "flexq")
    ids = torch.randint(3, 96, (1, 5))
    out = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 9)
    block = torch.compile(model.model.layers[0].mlp, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 3, 64)
    assert torch.allclose(block(x), model.model.layers[0].mlp(x), atol=1e-6)
