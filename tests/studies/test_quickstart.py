"""The quickstart: text goes on from the prompt, the same for the same seed, and what cannot be written is refused."""

import pytest

from flexq_core.sources.models import load_model
from flexq_core.studies.quickstart import continue_text


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
