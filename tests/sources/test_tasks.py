"""Zero-shot tasks: fair questions, the real harness, offline."""

import pytest

from flexq_core.sources import demo, tasks
from flexq_core.sources.models import load_model


def test_questions_have_four_different_endings_and_the_right_one_follows():
    text = demo.held_out_text().text
    joined = " ".join(text.split())
    questions = tasks.continuation_questions(text)
    assert len(questions) > 150
    for question in questions:
        assert len(set(question["endings"])) == tasks.CHOICES
        assert question["context"] + question["endings"][question["label"]] in joined
        assert all(ending.startswith(" ") for ending in question["endings"])
    labels = [question["label"] for question in questions]
    assert all(0.15 < labels.count(label) / len(labels) < 0.35 for label in range(tasks.CHOICES))


def test_the_seed_decides_the_questions():
    text = demo.held_out_text().text
    assert tasks.continuation_questions(text, seed=1) == tasks.continuation_questions(text, seed=1)
    assert tasks.continuation_questions(text, seed=1) != tasks.continuation_questions(text, seed=2)


def test_the_harness_runs_offline_and_the_model_is_far_above_chance():
    loaded = load_model("demo-llama")
    results = tasks.evaluate_tasks(loaded.model, loaded.tokenizer, ["continuation"], limit=60)
    accuracy, questions = results["continuation"]
    assert questions == 60
    assert accuracy > 0.5


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(tasks.TaskError, match=r"'arc-easy'\. Did you mean 'arc_easy'\? Accepted: continuation, piqa"):
        tasks.require_tasks(["arc-easy"])
