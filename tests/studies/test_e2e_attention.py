"""Attention of a GPU's end-to-end runs: what it computes, what it does not read, and that it gives the same bits each time."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers.integrations import sdpa_attention

from flexq_core.studies.e2e import attention
from flexq_core.studies.e2e.decode import Engine, capturing
from tests.models import CONFIGS, tiny_model


def tensors(batch, heads, key_heads, tokens, places, features, dtype=torch.float64):
    """Query, key and value, the query as a view of [B, T, heads, D], as models make it."""
    generator = torch.Generator().manual_seed(places)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    query = normal(batch, tokens, heads, features).transpose(1, 2)
    return query, normal(batch, key_heads, places, features), normal(batch, key_heads, places, features)


def oracle(query, key, value, mask, scale):
    """softmax(scale · query · keyᵀ) · value in float64: [B, T, heads, D]."""
    query, key, value = (x.double() for x in (query, key, value))
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    scores = (query @ key.mT * scale).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2)])
def test_a_prompt_sees_what_is_before_it_and_nothing_of_the_empty_places(heads, key_heads):
    query, key, value = tensors(2, heads, key_heads, 7, 12, 16)
    key[:, :, 7:] = value[:, :, 7:] = torch.nan
    found, _ = attention._forward(None, query, key, value, None, scaling=0.3)
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    torch.testing.assert_close(found, oracle(query, key[:, :, :7], value[:, :, :7], causal, 0.3))
    assert found.is_contiguous()


@pytest.mark.parametrize("besides", [{"sliding_window": 4}, {"softcap": 30.0}, {"position_bias": 1}, {"dropout": 0.1}])
@pytest.mark.parametrize("tokens", [1, 7])
def test_what_a_model_wants_besides_is_left_to_transformers(monkeypatch, besides, tokens):
    handed = []
    monkeypatch.setattr(
        sdpa_attention, "sdpa_attention_forward", lambda *given, **more: handed.append(given) or "theirs"
    )
    mask = torch.ones(2, 1, tokens, 12, dtype=torch.bool)
    inputs = tensors(2, 4, 4, tokens, 12, 16)
    assert attention._forward("layer", *inputs, mask, scaling=0.3, **besides) == "theirs"
    module, *given, dropout, scaling = handed[0]
    assert module == "layer" and [id(x) for x in given] == [id(x) for x in (*inputs, mask)]
    assert (dropout, scaling) == (besides.get("dropout", 0.0), 0.3)


@pytest.fixture
def without_a_gpu(monkeypatch):
    """The kernel's place is taken by the oracle; the shapes of the masks that it was given."""
    masks = []

    def one_token_attention(query, key, value, mask, scale):
        masks.append(tuple(mask.shape))
        return oracle(query, key, value, mask, scale).to(query.dtype)

    name = "flexq_core.studies.e2e.attention_kernels"
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(one_token_attention=one_token_attention))
    return masks


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_model_decodes_with_it_as_with_torchs(without_a_gpu, architecture):
    model = tiny_model(architecture)
    ids = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = model(ids).logits
    expected = Engine(model, 2, 7, 9).generate(ids).tokens
    assert not without_a_gpu
    attention._register()
    model.set_attn_implementation(attention.NAME)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, logits)
    assert torch.equal(Engine(model, 2, 7, 9).generate(ids).tokens, expected)
    blocks = model.config.num_hidden_layers if architecture != "mistral" else 0  # whose window is left to transformers
    assert without_a_gpu == [(2, 1, 1, 16)] * 8 * blocks


def test_what_is_compiled_writes_the_eager_models_tokens(without_a_gpu):
    """The op reads a cache that the step before it has written into."""
    model = tiny_model("llama")
    attention._register()
    model.set_attn_implementation(attention.NAME)
    ids = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(2))
    expected = Engine(model, 2, 7, 9).generate(ids).tokens
    engine = Engine(model, 2, 7, 9, "default")
    engine.compile_prefill()
    assert torch.equal(engine.generate(ids).tokens, expected)


def test_a_processor_has_torchs_own_and_so_has_a_gpu_without_triton(monkeypatch):
    assert attention.implementation("cpu") == "sdpa"
    monkeypatch.setattr(attention, "find_spec", {"triton": None}.get)
    assert attention.implementation("cuda") == "sdpa"
    monkeypatch.setattr(attention, "find_spec", {"triton": "found"}.get)
    assert attention.implementation("cuda") in transformers.AttentionInterface().valid_keys()


gpu = pytest.mark.gpu
MASKS = {
    "half": lambda n: torch.arange(n) <= n // 2,
    "first": lambda n: torch.arange(n) < 1,
    "third": lambda n: torch.arange(n) % 3 == 0,
}


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("places", [1, 63, 64, 65, 1152, 5000])
@pytest.mark.parametrize(
    ("batch", "heads", "key_heads", "features"), [(1, 4, 4, 128), (3, 6, 2, 64), (2, 2, 1, 80), (1, 8, 1, 256)]
)
def test_one_token_is_as_near_the_truth_as_torchs_attention(batch, heads, key_heads, features, places, dtype):
    """At most twice as far, of every place and of some: what is not read is nan."""
    for shown in (None, *MASKS.values()):
        query, key, value = (x.cuda() for x in tensors(batch, heads, key_heads, 1, places, features, dtype))
        mask = torch.ones(places, dtype=torch.bool) if shown is None else shown(places)
        mask = mask.cuda().expand(batch, 1, 1, places)
        scale = features**-0.5
        right = oracle(query, key, value, mask, scale)
        whole = [x.repeat_interleave(heads // key_heads, 1) for x in (key, value)]
        plain = F.scaled_dot_product_attention(query, *whole, attn_mask=mask, scale=scale).transpose(1, 2)
        hidden = ~mask[:, :, 0, :, None]
        key, value = key.masked_fill(hidden, torch.nan), value.masked_fill(hidden, torch.nan)
        found = attention.one_token_attention(query, key, value, None if shown is None else mask, scale)
        assert found.shape == (batch, 1, heads, features) and found.dtype == dtype
        bound = 2 * (plain - right).abs().max() + torch.finfo(dtype).eps * right.abs().max()
        assert (found - right).abs().max() <= bound


@gpu
def test_one_token_without_any_place_is_zero():
    query, key, value = (x.cuda() for x in tensors(2, 4, 2, 1, 100, 64, torch.float16))
    mask = torch.zeros(2, 1, 1, 100, dtype=torch.bool, device="cuda")
    assert not attention.one_token_attention(query, key, value, mask, 0.1).any()


@gpu
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_finite_is_not_hidden(which, bad):
    inputs = [x.cuda() for x in tensors(2, 4, 2, 1, 100, 64, torch.float16)]
    inputs[0][0, 0, 0, 3] = 1.0  # or a score of minus infinity would rightly be no score
    inputs[which][0, 0, -1, 3] = bad
    found = attention.one_token_attention(*inputs, None, 0.1)
    assert not found[0, 0, 0].isfinite().all()
    assert found[1].isfinite().all()


@gpu
def test_one_mask_serves_all_sequences_and_must_be_of_truth_values():
    query, key, value = (x.cuda() for x in tensors(3, 4, 2, 1, 100, 64, torch.float16))
    mask = (torch.arange(100) < 30).cuda()[None, None, None]
    every = attention.one_token_attention(query, key, value, mask.repeat(3, 1, 1, 1), 0.1)
    assert torch.equal(attention.one_token_attention(query, key, value, mask, 0.1), every)
    with pytest.raises(ValueError, match=r"the mask is torch.float16; accepted: torch.bool"):
        attention.one_token_attention(query, key, value, mask.half(), 0.1)


@gpu
def test_what_is_captured_first_counts_in_memory_of_its_own():
    """Of so many heads none was computed before; then others are, on memory that the graph has given back or has not."""
    graphs = []
    for seed in range(3):
        query, key, value = (x.cuda() for x in tensors(7, 11, 11, 1, 300 + seed, 64, torch.float16))
        graphs.append((torch.cuda.CUDAGraph(), (query, key, value)))
        with capturing(graphs[-1][0]):
            graphs[-1] += (attention.one_token_attention(query, key, value, None, 0.1),)
    for _ in range(2):
        for graph, inputs, found in graphs:
            found.fill_(torch.nan)
            graph.replay()
            assert torch.equal(found, attention.one_token_attention(*inputs, None, 0.1))


@gpu
def test_eager_compiled_and_captured_give_the_same_bits_each_time():
    query, key, value = (x.cuda() for x in tensors(2, 8, 4, 1, 700, 128, torch.float16))
    mask = (torch.arange(700) < 650).cuda().expand(2, 1, 1, 700)

    def attend():
        return attention.one_token_attention(query, key, value, mask, 0.1)

    expected = attend()
    compiled = torch.compile(attend, fullgraph=True)
    graph = torch.cuda.CUDAGraph()
    with capturing(graph):
        captured = attend()
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(found, expected) for found in (attend(), compiled(), captured))
    torch.library.opcheck(torch.ops.flexq.one_token_attention.default, (query, key, value, mask, 0.1))
