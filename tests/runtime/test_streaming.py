"""Block by block: logits equal the whole model's bit for bit, and never more than one block is in memory."""

import copy
import weakref

import pytest
import torch
from torch import nn

from flexq_core.quant.layers import decoder_blocks
from flexq_core.runtime.convert import quantize_model, quantizer, replace_in_block_in_place, resolve_plan
from flexq_core.runtime.streaming import hidden_state_bytes, logits_block_by_block
from tests.models import CONFIGS, skeleton_of, tiny_model


def batches(sizes=(3, 3, 1), length=24):
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, 96, (size, length), generator=generator) for size in sizes]


@torch.no_grad()
def whole(model):
    return [model(input_ids=batch, use_cache=False).logits for batch in batches()]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_logits_equal_the_whole_models_bit_for_bit(architecture, attention):
    model = tiny_model(architecture)
    model.set_attn_implementation(attention)
    skeleton, blocks = skeleton_of(model)
    streamed = list(logits_block_by_block(skeleton, batches(), blocks.get))
    assert all(torch.equal(a, b) for a, b in zip(streamed, whole(model), strict=True))


def test_hidden_states_in_files_give_the_same(tmp_path):
    model = tiny_model("opt")
    skeleton, blocks = skeleton_of(model)
    streamed = list(logits_block_by_block(skeleton, batches(), blocks.get, folder=tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(streamed, whole(model), strict=True))
    files = list(tmp_path.iterdir())
    assert len(files) == len(batches())
    rows = torch.cat(batches())
    assert sum(file.stat().st_size for file in files) == hidden_state_bytes(model, rows)


def test_quantised_blocks_equal_the_quantised_model():
    model = tiny_model("llama-3")
    expected = whole(quantize_model(model, "flexq", backend="reference"))
    skeleton, blocks = skeleton_of(model)
    make = quantizer(resolve_plan("flexq", skeleton), backend="reference")
    load = lambda name: replace_in_block_in_place(name, blocks[name], make)  # noqa: E731
    assert all(
        torch.equal(a, b) for a, b in zip(logits_block_by_block(skeleton, batches(), load), expected, strict=True)
    )


def test_a_block_is_let_go_before_the_next_is_loaded_and_each_is_loaded_once():
    skeleton, blocks = skeleton_of(tiny_model("llama"))
    alive, loaded = weakref.WeakSet(), []

    def load(name):
        assert not alive, "the block before is still in memory"
        block = copy.deepcopy(blocks[name])
        alive.update(block.parameters())
        loaded.append(name)
        return block

    for _ in logits_block_by_block(skeleton, batches(), load):
        assert not alive
    assert loaded == list(blocks)


def test_the_model_is_as_before_also_after_an_error():
    model = tiny_model("opt")
    skeleton, blocks = skeleton_of(model)
    with pytest.raises(KeyError):
        list(logits_block_by_block(skeleton, batches(), {}.__getitem__))
    assert all("forward" not in vars(block) for block in decoder_blocks(skeleton).values())
    assert len(list(logits_block_by_block(skeleton, batches(), blocks.get))) == 3


def test_a_block_that_returns_something_else_is_refused():
    class Pair(nn.Module):
        def forward(self, states, **_):
            return states, None

    skeleton, _ = skeleton_of(tiny_model("llama"))
    with pytest.raises(ValueError, match="Pair returns tuple; accepted: its hidden states"):
        list(logits_block_by_block(skeleton, batches(), lambda name: Pair()))


def test_an_error_of_a_layer_names_it():
    def refuse(name, linear):
        raise ValueError("no")

    block = decoder_blocks(tiny_model("llama"))["model.layers.1"]
    with pytest.raises(ValueError, match=r"layer 'model\.layers\.1\.self_attn\.q_proj': no"):
        replace_in_block_in_place("model.layers.1", block, refuse)


def test_a_model_without_one_list_of_blocks_is_refused():
    with pytest.raises(ValueError, match=r"Linear has 0 lists of blocks \(none\); accepted: one"):
        decoder_blocks(nn.Linear(2, 2))
