"""Fused blocks: the same logits, tokens, hidden states and state dict as the model had before."""

import copy
import warnings

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from flexq_core.quant import LayerPrecision, PrecisionPlan
from flexq_core.quant.layers import linear_layers
from flexq_core.runtime import activations, fuse
from flexq_core.runtime.convert import quantize_model
from flexq_core.runtime.fuse import fuse_
from flexq_core.runtime.linear import FlexQLinear
from tests.models import CONFIGS, logits, tiny_model

architectures = pytest.mark.parametrize("architecture", CONFIGS)


def quantised(architecture: str, backend: str = "reference", plan: str = "flexq"):
    return quantize_model(tiny_model(architecture), plan, backend=backend)


def fused(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return fuse_(copy.deepcopy(model))


@architectures
@pytest.mark.parametrize("plan", ["flexq", "w6a6"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_the_unfused_models_bit_for_bit(architecture, plan, dtype):
    model = quantised(architecture, plan=plan)
    for parameter in model.parameters():
        if parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(dtype)
    assert torch.equal(logits(fused(model)), logits(model))


@architectures
def test_nothing_is_quantised_twice(architecture, monkeypatch):
    """Of a block's layers only attention's output projection quantises for itself."""
    model = fused(quantised(architecture))
    ran = []
    forward = FlexQLinear.forward
    monkeypatch.setattr(FlexQLinear, "forward", lambda self, x: ran.append(self) or forward(self, x))
    logits(model)
    outputs = [m for name, m in model.named_modules() if name.endswith(("o_proj", "out_proj"))]
    assert ran == outputs and len(outputs) == 2


@architectures
@pytest.mark.parametrize("backend", ["simulate", "auto"])
def test_backends_that_quantise_for_themselves_run_merged(architecture, backend):
    model = quantised(architecture, backend)
    found, expected = logits(fused(model)), logits(model)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@architectures
def test_an_unquantised_model_is_merged(architecture):
    model = tiny_model(architecture)
    made = fused(model)
    kinds = [name.rsplit(".", 1)[1] for name in linear_layers(made) if ".0." in name]
    both = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    assert sorted(kinds) == sorted(["qkv_proj", "out_proj", "fc1", "fc2"] if architecture == "opt" else both)
    expected = logits(model)
    assert (logits(made) - expected).norm() <= 1e-5 * expected.norm()


def fused_generates_what_the_model_does(model, ids):
    """Five tokens, with each kind of cache."""
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    model.generation_config.eos_token_id = None
    for cache in ("dynamic", "static"):
        expected = model.generate(ids, cache_implementation=cache, **settings)
        assert torch.equal(fused(model).generate(ids, cache_implementation=cache, **settings), expected)


@architectures
def test_generation_is_unchanged(architecture):
    ids = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(2))
    fused_generates_what_the_model_does(quantised(architecture), ids)


@architectures
def test_padding_and_recorded_outputs_are_unchanged(architecture):
    model = quantised(architecture)
    ids, mask = torch.randint(3, 96, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    model.set_attn_implementation("eager")
    run = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    run |= {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        expected, found = model(**run), fused(model)(**run)
    assert torch.equal(found.logits, expected.logits)
    for kind in ("hidden_states", "attentions"):
        pairs = zip(found[kind], expected[kind], strict=True)
        assert len(expected[kind]) >= 2 and all(torch.equal(mine, theirs) for mine, theirs in pairs)


@architectures
def test_the_state_dict_is_the_unfused_models(architecture, tmp_path):
    model = quantised(architecture)
    made, stored = fused(model), model.state_dict()
    found = made.state_dict()
    assert set(found) == set(stored) and all(torch.equal(found[name], stored[name]) for name in stored)
    other = fused(quantize_model(tiny_model(architecture, seed=5), "flexq", backend="reference"))
    assert not torch.equal(logits(other), logits(model))
    other.load_state_dict(stored)
    assert torch.equal(logits(other), logits(model))
    made.save_pretrained(tmp_path)  # merged tensors are views of one: it must not refuse them
    saved = load_file(tmp_path / "model.safetensors")
    assert set(saved) <= set(stored) and all(torch.equal(tensor, stored[name]) for name, tensor in saved.items())
    assert {name for name in stored if "proj" in name} <= set(saved)


@architectures
def test_blocks_hand_their_sum_on_quantised(architecture, monkeypatch):
    """One norm a block is quantised where the block before ends, the first block's and the MLPs' where they are."""
    model = fused(quantised(architecture))
    residuals = []
    quantize = fuse._norm_quantize

    def counted(norm, reader, x, residual=None):
        residuals.append(residual is not None)
        return quantize(norm, reader, x, residual)

    monkeypatch.setattr(fuse, "_norm_quantize", counted)
    first = logits(model)
    assert residuals == [False, True, True, True]
    assert torch.equal(logits(model), first)


def test_blocks_hand_their_sum_on_when_compiled():
    graphs = []
    torch.compiler.reset()
    logits(
        torch.compile(fused(quantised("llama")), fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    )
    norms = [node for node in graphs[0].graph.nodes if "norm_quantize" in str(node.target)]
    assert [node.args[1] is not None for node in norms] == [False, True, True, True]


@pytest.fixture
def one_token_is_a_row(monkeypatch):
    """As on a GPU, where the product of one token begins with its norm: on the reference's own norm and product."""
    given = []

    def forward_norm(layer, x, norm, residual=None):
        given.append(residual is not None)
        parameters = (norm.weight, norm.bias) if norm.centred else (norm.weight,)
        quantize = activations.layer_norm_quantize if norm.centred else activations.rms_norm_quantize
        records, h = quantize(x, *parameters, norm.eps, layer.reader(), residual)
        return layer.forward_quantized(records, x.shape[:-1], x.dtype), h

    monkeypatch.setattr(FlexQLinear, "takes_norm", lambda layer, x: len(x) == 1)
    monkeypatch.setattr(FlexQLinear, "forward_norm", forward_norm)
    return given


@architectures
def test_one_token_is_normalised_where_it_is_read(architecture, one_token_is_a_row):
    """Of two blocks the first begins with what it was given, the three other norms with a sum of their own."""
    model, ids = quantised(architecture), torch.randint(3, 96, (1, 7), generator=torch.Generator().manual_seed(2))
    fused_generates_what_the_model_does(model, ids)
    assert one_token_is_a_row == [False, True, True, True] * 8
    with torch.no_grad():
        hidden = [each(ids[:, :1], output_hidden_states=True).hidden_states for each in (model, fused(model))]
    assert all(torch.equal(one, other) for one, other in zip(*hidden, strict=True))


def test_a_sum_that_nobody_reads_is_not_computed_when_compiled(one_token_is_a_row):
    """Each block returns it, and the next one computes it with its norm; what is left of two is the last block's."""
    model, sums = fused(quantised("llama")), []
    hidden = (1, 1, model.config.hidden_size)

    def count(graph, _):
        added = [node for node in graph.graph.nodes if node.target is torch.ops.aten.add.Tensor]
        sums.append(sum(tuple(node.meta["val"].shape) == hidden for node in added))
        return graph

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=count))
    with torch.no_grad():
        found, expected = (each(torch.tensor([[5]]), use_cache=False).logits for each in (compiled, model))
    assert (found - expected).norm() <= 1e-2 * expected.norm()
    assert sums == [1]


def test_hidden_states_that_a_hook_changes_are_normalised_anew():
    model = quantised("llama")
    made = fused(model)
    for each in (model, made):
        each.model.layers[0].register_forward_hook(lambda module, given, out: out * 2)
    assert torch.equal(logits(made), logits(model))


def add_one(hidden_states):
    hidden_states.add_(1)


def add_one_to_data(hidden_states):
    hidden_states.data.add_(1)  # which torch does not count as an edit


def after_a_block(model, edit):
    return model.model.layers[0].register_forward_hook(lambda module, given, out: edit(out))


def before_a_block(model, edit):
    return model.model.layers[1].register_forward_pre_hook(lambda module, given: edit(given[0]))


def after_any_module(model, edit):
    def hook(module, given, out):
        if isinstance(module, LlamaDecoderLayer) and module.self_attn.layer_idx == 0:
            edit(out)

    return nn.modules.module.register_module_forward_hook(hook)


@pytest.mark.parametrize("edit", [add_one, add_one_to_data])
@pytest.mark.parametrize("register", [after_a_block, before_a_block, after_any_module])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_hidden_states_that_a_hook_edits_in_place_are_normalised_anew(mode, register, edit):
    """Whether the hook came before fusion or after it, and not for ever."""
    ids, model = torch.randint(3, 96, (1, 6)), quantised("llama")
    made = fused(model)
    with mode():
        plain = model(ids).logits
        with register(model, edit):
            expected, early = model(ids).logits, fused(model)(ids).logits
        with register(made, edit):
            late = made(ids).logits
        assert not torch.equal(expected, plain)
        assert torch.equal(early, expected) and torch.equal(late, expected) and torch.equal(made(ids).logits, plain)


@pytest.mark.parametrize("register", [after_a_block, before_a_block])
def test_a_hook_that_edits_in_place_is_compiled(register):
    ids, model = torch.randint(3, 96, (1, 6)), quantised("llama")
    made = fused(model)
    with torch.no_grad():
        with register(model, add_one):
            expected = model(ids, use_cache=False).logits
        with register(made, add_one):
            torch.compiler.reset()
            found = torch.compile(made, fullgraph=True, backend="aot_eager")(ids, use_cache=False).logits
    assert (found - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_hidden_states_edited_in_place_between_blocks_called_by_hand(mode):
    model, h = quantised("llama"), torch.randn(1, 5, 64)
    embeddings = model.model.rotary_emb(h, torch.arange(5)[None])

    def steered(blocks):
        out = h
        for block in blocks:
            out = block(out, position_embeddings=embeddings)
            out += 1
        return out

    with mode():
        assert torch.equal(steered(fused(model).model.layers), steered(model.model.layers))


def test_the_next_block_may_lie_on_another_device():
    model = quantised("llama")
    made = fused(model)
    made.model.layers[1].to("meta")
    model.config.num_hidden_layers = made.config.num_hidden_layers = 1
    assert torch.equal(logits(made), logits(model))


def test_fewer_blocks_can_be_run():
    model = quantised("llama")
    made = fused(model)
    model.config.num_hidden_layers = made.config.num_hidden_layers = 1
    assert torch.equal(logits(made), logits(model))


@pytest.mark.parametrize("architecture", ["llama-3", "qwen", "opt"])
def test_it_compiles_without_a_graph_break(architecture):
    model = fused(quantised(architecture))
    ids = torch.randint(3, 96, (1, 6))
    cache = transformers.StaticCache(config=model.config, max_cache_len=8)
    positions = torch.arange(7)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, position_ids=positions[None, :6])
        other = copy.deepcopy(cache)
        step = {"input_ids": ids[:, :1], "position_ids": positions[None, 6:], "use_cache": True}
        step["attention_mask"] = torch.ones(1, 8, dtype=torch.long)  # of OPT, older releases trace it only with a mask
        expected = model(past_key_values=cache, **step).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        found = compiled(past_key_values=other, **step).logits
    assert (found - expected).norm() <= 1e-2 * expected.norm()  # traced, attention takes another path: a code may move


def test_a_known_block_can_be_used_twice_and_copied():
    model = quantised("llama")
    made = fused(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fuse_(made) is made
    assert type(made.model.layers[0]).__name__ == "FusedLlamaDecoderLayer"
    assert isinstance(made.model.layers[0], type(model.model.layers[0]))
    assert torch.equal(logits(copy.deepcopy(made)), logits(model))


def test_qwen3_with_its_norms_of_heads():
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        vocab_size=96, max_position_embeddings=64,
    )  # fmt: skip
    model = quantize_model(transformers.AutoModelForCausalLM.from_config(config).eval(), "flexq", backend="reference")
    assert torch.equal(logits(fused(model)), logits(model))


def test_another_activation_function_runs_unfused():
    config = CONFIGS["llama"]()
    config.hidden_act = "gelu"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model = quantize_model(model, "flexq", backend="reference")
    found, expected = logits(fused(model)), logits(model)
    assert (found - expected).norm() <= 1e-2 * expected.norm()  # a last bit may move a code


def left_alone(model, match: str) -> None:
    stored, expected, kinds = model.state_dict(), logits(model), [type(m) for m in model.modules()]
    with pytest.warns(RuntimeWarning, match=match):
        assert fuse_(model) is model
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(logits(model), expected) and list(model.state_dict()) == list(stored)


def test_a_model_that_is_not_known_is_left_alone():
    shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64}
    model = transformers.AutoModelForCausalLM.from_config(transformers.GPT2Config(**shape)).eval()
    left_alone(model, "GPT2LMHeadModel has no block of a kind known here; accepted: LlamaDecoderLayer")


def test_layers_of_different_bits_are_left_alone():
    model = tiny_model("llama")
    layers = {name: LayerPrecision(6, 8 if name.endswith("v_proj") else 6) for name in linear_layers(model)}
    model = quantize_model(model, PrecisionPlan("mixed", layers), backend="reference")
    left_alone(model, "2 blocks are left unfused, as they were: LlamaDecoderLayer: layers that differ cannot be merged")


def test_opt_with_norms_after_is_left_alone():
    config = CONFIGS["opt"]()
    config.do_layer_norm_before = False
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    left_alone(quantize_model(model, "flexq", backend="reference"), "its norms come after attention and MLP")


def test_a_block_whose_forward_is_replaced_is_left_alone():
    """As accelerate replaces it where a device map spreads a model: a subclass's forward would never run."""
    model = quantised("llama")
    for block in model.model.layers:
        add_hook_to_module(block, ModelHook())
    left_alone(model, "its forward is replaced")


def test_norms_in_another_type_are_not_fused():
    model = quantised("llama").to(torch.bfloat16)
    model.model.layers[0].post_attention_layernorm.float()  # its output is float32, and so is the residual after it
    model.model.layers[1:].float()
    model.model.norm.float(), model.lm_head.float()
    assert torch.equal(logits(fused(model)), logits(model))
    assert fuse._reader(fused(model).model.layers[0].mlp.down_proj, torch.zeros(1)) == activations.Reader(
        8, "reference", 64, 128
    )
