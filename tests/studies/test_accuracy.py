"""Accuracy: the perplexity protocol equals a plain computation, and parameters are refused before anything runs."""

import math

import pytest
import torch

from flexq_core.sources import data
from flexq_core.sources.text import Text
from flexq_core.studies.accuracy import perplexity
from tests.models import tiny_model


def test_perplexity_is_the_exponential_of_the_mean_over_scored_tokens():
    model = tiny_model("llama")
    rows = torch.randint(3, 96, (5, 20), generator=torch.Generator().manual_seed(3))
    total = 0.0
    with torch.no_grad():
        for row in rows:
            log_probabilities = model(input_ids=row[None]).logits[0].double().log_softmax(-1)
            total -= sum(log_probabilities[i, row[i + 1]].item() for i in range(19))
    score = perplexity(model, rows, batch_size=2)
    assert score.tokens == 5 * 19
    assert math.isclose(score.nll_nats, total, rel_tol=1e-5)
    assert math.isclose(score.value, math.exp(total / 95), rel_tol=1e-5)


def test_windows_do_not_overlap_and_drop_the_rest():
    ids = torch.arange(25)
    assert data.windows(ids, 10).tolist() == [list(range(10)), list(range(10, 20))]
    assert data.windows(torch.arange(100), 10, 3)[:, 0].tolist() == [0, 30, 60]
    assert len(data.windows(ids, 10, 99)) == 2


@pytest.mark.parametrize(
    ("length", "count", "text"),
    [(1, 0, "window length is 1"), (10, -1, "windows is -1"), (30, 0, "25 tokens: less than one window of 30")],
)
def test_bad_windows_are_refused(length, count, text):
    with pytest.raises(ValueError, match=text):
        data.windows(torch.arange(25), length, count)


def test_an_unknown_dataset_names_the_nearest():
    with pytest.raises(data.DataError, match=r"'wikitext'\. Did you mean 'wikitext2'\? Accepted: pydoc, wikitext2"):
        data.evaluation_text("wikitext")


def test_a_text_knows_its_digest():
    text = Text.of("name", "abc", origin="here")
    assert text.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
