"""Outliers: activations grow, outputs do not change, the original is left alone."""

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from flexq_core.sources.outliers import inject_outliers
from flexq_core.sources.structure import Pair, mlp_pairs, norm_pairs
from tests.models import CONFIGS, SIZES, logits, tiny_model


@pytest.mark.parametrize("architecture", CONFIGS)
def test_outputs_stay_equal_and_activations_grow(architecture):
    model = tiny_model(architecture)
    before = {name: p.clone() for name, p in model.named_parameters()}
    expected = logits(model)
    spread = largest_input(model)
    rescaled = inject_outliers(model, 32.0)
    assert (logits(rescaled) - expected).norm() <= 1e-5 * expected.norm()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    grown = largest_input(rescaled)
    assert all(grown[name] > 4 * spread[name] for name in spread)


def largest_input(model) -> dict[str, float]:
    """Largest over median input magnitude of every layer that reads a rescaled producer."""
    names = [name for pair in norm_pairs(model) + mlp_pairs(model) for name in pair.consumers]
    ratio = {}

    def watch(name):
        def hook(module, arguments):
            x = arguments[0].abs()
            ratio[name] = (x.amax() / x[x > 0].median()).item()

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    logits(model)
    for hook in hooks:
        hook.remove()
    return ratio


def test_pairs_of_a_llama_block():
    block = "model.layers.0"
    pairs = norm_pairs(tiny_model("llama-3"))
    attention = tuple(f"{block}.self_attn.{name}_proj" for name in "qkv")
    assert pairs[:2] == [
        Pair(f"{block}.input_layernorm", attention),
        Pair(f"{block}.post_attention_layernorm", (f"{block}.mlp.gate_proj", f"{block}.mlp.up_proj")),
    ]
    assert mlp_pairs(tiny_model("llama-3"))[0] == Pair(f"{block}.mlp.up_proj", (f"{block}.mlp.down_proj",))


def test_pairs_of_an_opt_block():
    block = "model.decoder.layers.0"
    pairs = norm_pairs(tiny_model("opt"))
    assert [pair.producer for pair in pairs[:2]] == [f"{block}.self_attn_layer_norm", f"{block}.final_layer_norm"]
    assert set(pairs[0].consumers) == {f"{block}.self_attn.{name}_proj" for name in "qkv"}
    assert pairs[1].consumers == (f"{block}.fc1",)


def test_the_seed_chooses_the_channels():
    model = tiny_model("llama")
    gains = [inject_outliers(model, 8.0, seed=seed).model.layers[0].input_layernorm.weight for seed in (0, 0, 1)]
    assert torch.equal(gains[0], gains[1]) and not torch.equal(gains[0], gains[2])


def test_none_is_a_copy():
    model = tiny_model("llama")
    assert torch.equal(logits(inject_outliers(model, 0)), logits(model))


@pytest.mark.parametrize("strength", [-1.0, 0.5, float("nan"), float("inf")])
def test_a_strength_that_is_no_growth_is_refused(strength):
    with pytest.raises(ValueError, match="accepted: 0 for none, or a factor of at least 1"):
        inject_outliers(tiny_model("llama"), strength)


def test_a_model_that_rescaling_would_change_is_refused():
    torch.manual_seed(0)
    opt = OPTForCausalLM(OPTConfig(hidden_size=64, ffn_dim=200, activation_function="gelu", **SIZES)).eval()
    with pytest.raises(ValueError, match="OPTForCausalLM computes something else"):
        inject_outliers(opt, 32.0)
