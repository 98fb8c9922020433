"""Findings are what the paper's numbers say."""

from flexq_core.sources import paper
from flexq_core.studies.report.own_numbers import (
    average_over_abq,
    best_over_fp16,
    flexq_is_listed_as_w6a6,
    largest_increase,
    latency_over_smoothquant,
    memory_over_smoothquant,
    shrinking_memory,
    slower_than_abq,
)


def test_the_average_over_abq_is_that_of_batch_1():
    numbers = average_over_abq().numbers
    assert [round(numbers[f"batch_{n}"], 2) for n in (1, 4, 8)] == [1.39, 1.37, 1.36]
    assert round(numbers["all_shapes"], 2) == 1.25


def test_the_acceleration_over_smoothquant_is_one_models():
    found = latency_over_smoothquant()
    rounded = {model: round(value, 2) for model, value in found.numbers.items()}
    assert rounded == {"llama-7b": 1.33, "llama-13b": 1.28, "llama-30b": 1.24, "opt-30b": 1.25, "all": 1.27}
    assert not found.agrees


def test_the_memory_saving_is_the_mean_of_all():
    found = memory_over_smoothquant()
    assert round(found.numbers["all"], 2) == 1.21 and found.agrees


def test_memory_falls_as_the_output_grows():
    found = shrinking_memory()
    assert not found.agrees and "opt-30b w8a8 33.92 at 512 but 32.31 at 1024" in found.finding
    assert set(found.numbers) == {"opt-30b_w8a16", "opt-30b_w8a8", "opt-30b_w6ax"}


def test_the_rest():
    assert largest_increase().numbers["largest"] == 0.05
    assert slower_than_abq().numbers == {"behind": 1, "cases": 60}
    assert flexq_is_listed_as_w6a6().numbers == {"shapes_with_a8": 5, "shapes": 20}
    assert round(best_over_fp16().numbers["memory"], 2) == 2.28


def test_findings_follow_the_numbers(monkeypatch):
    bars = paper.end_to_end()
    bars["memory_gb"] += range(len(bars))  # so that no two are the same, and all grow
    monkeypatch.setattr(paper, "end_to_end", lambda: bars)
    assert paper.shared_memory_bars() == [] and shrinking_memory().agrees
