"""The quickstart: text goes on from the prompt, the same for the same seed, and what cannot be written is refused."""

import pytest

from flexq_core.quant.layers import linear_layers
from flexq_core.runtime.convert import quantize_model
from flexq_core.runtime.linear import FlexQLinear
from flexq_core.sources.models import load_model
from flexq_core.studies.quickstart import _codes_lost, continue_text, layers_difference, require_parameters


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


def test_the_kernel_is_the_definition_in_every_layer_of_a_long_prompt_or_the_difference_shows(demo):
    """Logits of whole models differ by up to 1e-2 there: a last bit of a sum makes another code further on."""
    text = "Return a new array of the given shape and type, filled with ones. " * 6
    ids = demo.tokenizer(text, return_tensors="pt").input_ids
    kernel, definition = (quantize_model(demo.model, "flexq", backend=backend) for backend in ("auto", "reference"))
    assert ids.shape[1] > 60 and layers_difference(kernel, definition, ids) < 1e-6
    last = list(linear_layers(demo.model))[-1]
    definition.get_submodule(last).weight_scale[0, 0] *= 1.05
    assert layers_difference(kernel, definition, ids) > 2e-4


@pytest.mark.parametrize(
    ("changes", "text"),
    [({"plan": "flexk"}, "flexq"), ({"new_tokens": 0}, "new_tokens is 0"), ({"seed": -1}, "seed is -1")],
)
def test_parameters_are_refused_before_a_model_is_loaded(changes, text):
    with pytest.raises(ValueError, match=text):
        require_parameters(**{"plan": "w6a6", "new_tokens": 5, "seed": 0} | changes)
