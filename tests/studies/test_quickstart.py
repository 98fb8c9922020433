"""The quickstart: text goes on from the prompt, the same for the same seed, and what cannot be written is refused."""

import pytest

from flexq_core.quant.layers import linear_layers
from flexq_core.runtime.convert import quantize_model
from flexq_core.runtime.linear import FlexQLinear
from flexq_core.sources.models import load_model
from flexq_core.studies.quickstart import _codes_lost, continue_text


@pytest.fixture(scope="module")
def demo():
    return load_model("demo-opt")


def test_text_goes_on_from_the_prompt_and_follows_the_seed(demo):
    prompt = "Return the number of"
    first, again, other = (continue_text(demo.model, demo.tokenizer, prompt, new_tokens=12, seed=s) for s in (0, 0, 1))
    assert first.startswith(prompt) and len(first) > len(prompt)
    assert first == again != other


@pytest.mark.parametrize(
    ("prompt", "parameters", "text"),
    [
        ("Return", {"new_tokens": 0}, "new_tokens is 0; accepted: 1 or more"),
        (
            "Return",
            {"new_tokens": 10_000},
            "new_tokens is 10000 after a prompt of 1 tokens; accepted: .* 1 to 511 new tokens",
        ),
        ("", {"new_tokens": 5}, "a prompt that is not empty"),
        ("Return", {"new_tokens": 5, "seed": -1}, "seed is -1; accepted: 0 or more"),
    ],
)
def test_what_cannot_be_written_is_refused(demo, prompt, parameters, text):
    with pytest.raises(ValueError, match=text):
        continue_text(demo.model, demo.tokenizer, prompt, **parameters)


def test_a_lost_code_is_counted_also_where_a_layer_keeps_its_weights_in_a_kernels_order(demo, monkeypatch):
    quantised = quantize_model(demo.model, "w6a6")
    kept = {
        name: layer.weight.data.clone() for name, layer in quantised.named_modules() if isinstance(layer, FlexQLinear)
    }
    assert set(kept) == set(linear_layers(demo.model)) and _codes_lost(demo.model, quantised) == 0
    last = list(kept)[-1]
    kept[last][0, 0] ^= 1
    by_layer = {quantised.get_submodule(name): weight for name, weight in kept.items()}
    for layer in by_layer:
        layer.weight.data = layer.weight.data.new_empty(len(layer.weight), 0)  # as on a GPU, once it has run
    monkeypatch.setattr(FlexQLinear, "canonical", lambda layer: (by_layer[layer], layer.weight_scale))
    assert _codes_lost(demo.model, quantised) == 1
