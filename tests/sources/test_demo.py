"""The demo models: what they are, how good they are, and what their command line refuses."""

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from flexq_core.quant.layers import linear_layers
from flexq_core.sources import demo
from flexq_core.sources.models import load_model

NAMES = list(demo.DEMO_MODELS)


@pytest.fixture(scope="module", params=NAMES)
def loaded(request):
    return load_model(request.param)


def test_size_on_disk_and_format():
    for name in NAMES:
        folder = demo.demo_path(name)
        assert sum(file.stat().st_size for file in folder.iterdir()) < 16e6
        assert {file.suffix for file in folder.iterdir()} == {".json", ".md", ".safetensors"}
        assert "bits per character, held out" in (folder / "README.md").read_text()


def test_architecture(loaded):
    config = loaded.model.config
    widths = {layer.in_features for layer in linear_layers(loaded.model).values()}
    assert 5e6 < sum(p.numel() for p in loaded.model.parameters()) < 7e6
    if loaded.name == "demo-llama":
        assert all(width % 128 == 0 for width in widths)
        assert config.num_key_value_heads < config.num_attention_heads
    else:
        assert all(width % 128 for width in widths)
        biases = [
            m.bias for m in loaded.model.modules() if isinstance(m, nn.Linear | nn.LayerNorm) and m.bias is not None
        ]
        assert len(biases) > 40
        assert all(bias.abs().max() > 1e-3 for bias in biases)


def test_bits_per_character_on_a_fifth_of_the_held_out_text(loaded):
    text = demo.held_out_text().text
    part = text[: len(text) // 5]
    ids = torch.tensor(loaded.tokenizer(part, verbose=False).input_ids)
    assert demo.bits_per_character(loaded.model, ids, len(part)) < 1.45


def test_tokenizer_round_trip(loaded):
    text = 'def f(x):\n    """Naïve – 量化, "quotes" and\ttabs."""\n'
    assert loaded.tokenizer.decode(loaded.tokenizer(text).input_ids) == text
    assert len(loaded.tokenizer) == demo.VOCABULARY


def test_both_models_share_their_tokenizer():
    first, second = (AutoTokenizer.from_pretrained(demo.demo_path(name)).get_vocab() for name in NAMES)
    assert first == second


def test_calibration_text_is_its_own(loaded):
    from flexq_core.sources import corpus

    calibration, held_out = demo.calibration_text(), demo.held_out_text()
    assert len(calibration.text) > 150_000
    topics = {corpus.fingerprint(p) for p in corpus.paragraphs(held_out.text)}
    assert not topics & {corpus.fingerprint(p) for p in corpus.paragraphs(calibration.text)}


def test_command_line(capsys):
    assert demo.main(["evaluate", "no-such-model"]) == 2
    assert "no such model: no-such-model; accepted: a folder, demo-llama, demo-opt" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        demo.main(["train", "demo-lama", "--out", "x"])
    assert stop.value.code == 2
    assert "demo-llama" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        demo.main(["train", "--help"])
    assert stop.value.code == 0
    assert "optimiser steps" in capsys.readouterr().out
