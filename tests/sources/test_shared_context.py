"""Endings that share their context: the harness's own scores, for every architecture that is said to take it."""

import random

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from flexq_core.sources.models import load_model
from flexq_core.sources.shared_context import ARCHITECTURES, SharedContexts, _mask, harness_model
from tests.models import CONFIGS, tiny_model

TOKENIZER = load_model("demo-llama").tokenizer


def requests(*, contexts: int, longest: int, seed: int = 0) -> list:
    """One to four endings of 1 to 7 tokens for each context, in mixed order; texts stand for nothing."""
    chooser = random.Random(seed)
    made = []
    for _ in range(contexts):
        context = chooser.choices(range(3, 96), k=chooser.randint(1, longest))
        for _ in range(chooser.randint(1, 4)):
            made.append((("", ""), context, chooser.choices(range(3, 96), k=chooser.randint(1, 7))))
    chooser.shuffle(made)
    return made


def both(architecture: str, **options) -> tuple[list, list]:
    asked = requests(**options)
    model = tiny_model(architecture)
    plain = HFLM(pretrained=model, tokenizer=TOKENIZER, batch_size=5)
    shared = harness_model(model, TOKENIZER, batch_size=5)
    assert isinstance(shared, SharedContexts)
    return tuple(each._loglikelihood_tokens(asked, disable_tqdm=True) for each in (plain, shared))


@pytest.mark.parametrize("architecture", CONFIGS)
def test_scores_are_the_harnesss(architecture):
    expected, found = both(architecture, contexts=17, longest=40)
    torch.testing.assert_close([score for score, _ in found], [score for score, _ in expected], rtol=1e-4, atol=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_contexts_longer_than_the_model_are_cut_as_the_harness_cuts_them():
    expected, found = both("opt", contexts=12, longest=90)  # the model takes 64
    torch.testing.assert_close([score for score, _ in found], [score for score, _ in expected], rtol=1e-4, atol=1e-4)


def test_a_greedy_ending_is_known_as_such():
    model = tiny_model("llama")
    context = [5, 7, 11]
    with torch.no_grad():
        best = model(input_ids=torch.tensor([context])).logits[0, -1].argmax().item()
    harness = harness_model(model, TOKENIZER, batch_size=4)
    asked = [(("", ""), context, [best]), (("", ""), context, [best + 1])]
    assert [greedy for _, greedy in harness._loglikelihood_tokens(asked)] == [True, False]


def test_an_architecture_not_known_to_take_it_is_left_to_the_harness(monkeypatch):
    monkeypatch.setattr("flexq_core.sources.shared_context.ARCHITECTURES", ARCHITECTURES - {"opt"})
    assert not isinstance(harness_model(tiny_model("opt"), TOKENIZER, batch_size=4), SharedContexts)


def test_an_ending_sees_its_context_and_itself_only():
    allowed = _mask(torch.tensor([[0, 0, 1, 1, 2, -1]]), torch.float32)[0, 0] == 0
    assert allowed.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]
