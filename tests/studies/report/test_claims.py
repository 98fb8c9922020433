"""Every verdict can be reached, and what was measured otherwise than the paper does bears out nothing."""

import pytest

from flexq_core.sources import paper
from flexq_core.studies.report.claims import NOT_MEASURED, NOT_REPRODUCED, REPRODUCED, Tolerance, judge, paper_claims
from flexq_core.studies.report.evidence import end_to_end_ratios, paper_increases, ratios, read_records
from flexq_core.workbook.records import Measurement
from tests.studies.report.cases import CPU, GPU, verdict


def test_without_records_nothing_is_measured_and_every_claim_says_what_it_needs(folder):
    found = judge(paper_claims(), read_records(), Tolerance())
    assert len(found) > 50 and found["claim"].is_unique
    assert set(found["verdict"]) == {NOT_MEASURED}
    assert (found["evidence"] == 0).all()
    assert found["detail"].str.contains("papermill|not built here|not carried in").all()


@pytest.mark.parametrize(("perplexity", "status"), [(5.54, REPRODUCED), (5.56, NOT_REPRODUCED)])
def test_perplexity_is_judged_by_its_increase(score, perplexity, status):
    score("llama-2-7b", "fp16", 5.47, backend="torch")
    score("llama-2-7b", "flexq", perplexity)  # the paper's increase is 0.05, the tolerance 0.03
    found = verdict("llama-2-7b: FlexQ costs 0.05 of perplexity on WikiText-2")
    assert (found.verdict, found.evidence) == (status, 1)
    assert f"5.47 → {perplexity}" in found.detail and "the paper 5.47 → 5.52" in found.detail


def test_the_packed_weights_come_before_their_simulation(score):
    score("llama-2-7b", "fp16", 5.47, backend="torch")
    score("llama-2-7b", "flexq", 5.60, backend="cpu")
    score("llama-2-7b", "flexq", 5.50, backend="simulate")
    assert verdict("llama-2-7b: FlexQ costs 0.05 of perplexity on WikiText-2").verdict == NOT_REPRODUCED


@pytest.mark.parametrize("more", [{"windows": 8}, {"outliers": 32.0}, {"window_length": 512}, {"dataset": "pydoc"}])
def test_what_was_scored_otherwise_than_the_paper_does_not_count(score, more):
    score("llama-2-7b", "fp16", 5.47, backend="torch", **more)
    score("llama-2-7b", "flexq", 5.50, **more)
    assert verdict("llama-2-7b: FlexQ costs 0.05 of perplexity on WikiText-2").verdict == NOT_MEASURED


def test_a_claim_about_all_models_needs_all_of_them_and_one_refutes_it(score):
    text = "FlexQ's perplexity on WikiText-2 is below SmoothQuant"
    *models, last = paper_increases()["model"].unique()
    for model in models:
        score(model, "fp16", 5.0, backend="torch")
        score(model, "flexq", 5.1)
        score(model, "smoothquant-w6a6", 5.2)
    partly = verdict(text)
    assert partly.verdict == NOT_MEASURED and "6 of 7 cases are on record and hold" in partly.detail
    score(last, "fp16", 5.0, backend="torch")
    score(last, "flexq", 5.1)
    score(last, "smoothquant-w6a6", 5.2)
    assert (verdict(text).verdict, verdict(text).evidence) == (REPRODUCED, 7)
    score(last, "smoothquant-w6a6", 5.0)
    assert verdict(text).verdict == NOT_REPRODUCED


@pytest.mark.parametrize(("sensitive", "status"), [("down_proj", REPRODUCED), ("q_proj", NOT_REPRODUCED)])
def test_sensitivity_is_judged_by_kinds_of_layer(record, sensitive, status):
    for kind in ("q_proj", "down_proj"):
        method = f"rounded: every {kind}"
        record("01_sensitivity", "llama-7b", method, {"kl_nats": 1.0 if kind == sensitive else 0.1}, outliers=0.0)
        record("01_sensitivity", "llama-7b", method, {"kl_nats": 0.5}, outliers=32.0)  # another question
    assert verdict("down_proj is the layer").verdict == status
    assert verdict("fc2 is the layer").verdict == NOT_MEASURED


def test_kernels_as_fast_as_the_papers_reproduce_it(time_kernels):
    time_kernels()
    assert verdict("8192 × 28672 (llama-2-70b, W6A8)").verdict == REPRODUCED
    mean = verdict("at batch 4, the mean of 20 shapes")
    assert (mean.verdict, mean.evidence) == (REPRODUCED, 20)
    assert verdict("ABQ-LLM's on LLaMA-2-70B").verdict == NOT_MEASURED


def test_slower_kernels_do_not(time_kernels):
    time_kernels(speedup=1.2)
    assert verdict("4096 × 4096 (llama-7b").verdict == NOT_REPRODUCED
    assert verdict("at batch 1, the mean of 20 shapes").verdict == NOT_REPRODUCED


@pytest.mark.parametrize(("speedup", "status"), [(1.4, REPRODUCED), (1.3, NOT_REPRODUCED)])
def test_the_mean_over_abq_needs_its_four_shapes(time_kernels, speedup, status):
    shapes = [shape for shape in paper.kernel_shapes() if 8192 in shape]
    time_kernels(speedup, {(*shape, 1) for shape in shapes[:3]}, rival="abq-llm")
    assert "3 of its 4 cases" in verdict("ABQ-LLM's on LLaMA-2-70B").detail
    time_kernels(speedup, {(*shape, 1) for shape in shapes}, rival="abq-llm")
    assert verdict("ABQ-LLM's on LLaMA-2-70B").verdict == status


def test_two_cards_make_no_mean_the_one_with_more_cases_is_judged_and_named(time_kernels):
    time_kernels(speedup=1.2, machine=GPU | {"device": "first"})
    time_kernels(speedup=9.0, cases={(4096, 4096, 1)}, machine=GPU | {"device": "second"})
    found = verdict("4096 × 4096 (llama-7b")
    assert found.verdict == NOT_REPRODUCED and found.detail.startswith("first: batch 1: 1.20× against")
    assert verdict("at batch 1, the mean of 20 shapes").detail.endswith(", first")
    time_kernels(speedup=9.0, machine=GPU | {"device": "second"})
    assert verdict("4096 × 4096 (llama-7b").detail.startswith("second: batch 1: 9.00×")


def test_of_two_cards_with_as_many_cases_the_one_measured_last_is_judged(time_kernels):
    for hour, card, tokens in ((0, "first", 1), (1, "second", 1), (1, "second", 4), (2, "first", 4)):
        machine = GPU | {"device": card, "time": f"2026-01-01T0{hour}:00:00+00:00"}
        time_kernels(speedup=1.2, cases={(4096, 4096, tokens)}, machine=machine)
    assert verdict("4096 × 4096 (llama-7b").detail.startswith("first: ")


def test_a_case_that_several_kernels_were_timed_on_counts_once_and_the_fastest_is_told(time_kernels, record):
    first, second = (GPU | {"device": card} for card in ("first", "second"))
    time_kernels(speedup=1.2, cases={(4096, 4096, 1)}, machine=first)
    for method, us in (("imma", 50.0), ("bmma", 200.0)):
        shape = {"outputs": 4096, "features": 4096, "tokens": 1, "threads": 2, "activation_bits": 6, "device": "first"}
        record("03_kernels", "4096x4096", method, {"gemm_us": us}, first, **shape)
    assert "first: batch 1: 2.40×" in verdict("4096 × 4096 (llama-7b").detail
    time_kernels(speedup=1.2, cases={(4096, 4096, 1), (4096, 4096, 4)}, machine=second)
    assert verdict("4096 × 4096 (llama-7b").detail.startswith("second: ")


def test_what_the_paper_does_not_show_makes_no_card_the_one_judged(time_kernels, record):
    time_kernels(speedup=1.2, cases={(4096, 4096, 1)}, machine=GPU | {"device": "first"})
    other = GPU | {"device": "second"}
    combination = {"outputs": 4096, "features": 4096, "tokens": 1, "weight_bits": 2, "activation_bits": 8}
    for parameters in (combination, combination | {"outputs": 64, "weight_bits": 6}):
        for method in ("cublas-int8", "bmma"):
            record("03_kernels", "layer", method, {"gemm_us": 1.0}, other, **parameters)
    assert verdict("4096 × 4096 (llama-7b").detail.startswith("first: ")
    for card, batch_size in (("first", 1), ("second", 4), ("second", 8)):
        for method, total_s in (("w8a8", 2.0), ("flexq", 1.0)):
            shared = {"weights": "random", "output_tokens": [128], "batch_size": batch_size}
            record("04_e2e", "llama-7b", method, {"total_s/128": total_s}, GPU | {"device": card}, **shared)
    assert end_to_end_ratios(read_records(), "latency", "W8A8") == ("first", {("llama-7b", 128): 2.0})
    for method, total_s in (("w8a8", 9.0), ("flexq", 1.0)):
        longer = {"weights": "random", "output_tokens": [128], "batch_size": 1, "prompt_tokens": 1024}
        record("04_e2e", "llama-7b", method, {"total_s/128": total_s}, GPU | {"device": "first"}, **longer)
    assert end_to_end_ratios(read_records(), "latency", "W8A8") == ("first", {("llama-7b", 128): 2.0})


def test_other_widths_of_weights_are_not_flexqs_six(time_kernels, record):
    time_kernels(speedup=1.2, cases={(8192, 28672, 1)})
    shape = {"outputs": 8192, "features": 28672, "tokens": 1, "threads": 2, "weight_bits": 2, "activation_bits": 8}
    record("03_kernels", "8192x28672", "bmma", {"gemm_us": 1.0}, GPU, **shape)
    assert "batch 1: 1.20× against" in verdict("8192 × 28672 (llama-2-70b, W6A8)").detail


def test_a_processor_bears_out_no_claim_about_a_gpu(time_kernels):
    time_kernels(speedup=9.0, machine=CPU)
    found = verdict("4096 × 4096 (llama-7b")
    assert found.verdict == NOT_MEASURED and "an NVIDIA GPU; a processor was timed here: papermill" in found.detail


def test_end_to_end_needs_every_length_and_the_whole_model(record):
    def generate(faster, *lengths, **parameters):
        seconds = {f"total_s/{length}": float(length) for length in lengths}
        record("04_e2e", "llama-7b", "flexq", seconds, GPU, **parameters)
        slower = {metric: faster * value for metric, value in seconds.items()}
        record("04_e2e", "llama-7b", "w8a8", slower, GPU, **parameters)

    text = "llama-7b: FlexQ is 1.33× as fast as W8A8"
    generate(1.4, 128, 256, 512, 1024, layers=2)
    assert verdict(text).verdict == NOT_MEASURED
    generate(1.4, 128, 256)
    assert "2 of 4 cases" in verdict(text).detail
    generate(1.4, 128, 256, 512, 1024)
    assert verdict(text).verdict == REPRODUCED
    generate(1.2, 128, 256, 512, 1024)
    assert verdict(text).verdict == NOT_REPRODUCED
    assert verdict("1.33× as fast as SmoothQuant").evidence == 4


@pytest.mark.parametrize("hours", [(1, 2), (2, 1)])
def test_each_method_is_taken_in_its_fastest_mode_whichever_was_measured_last(record, hours):
    for hour, mode, slower in zip(hours, ("default", "best"), (1.0, 1.2), strict=True):
        machine = GPU | {"time": f"2026-01-01T0{hour}:00:00+00:00"}
        for method, total_s in (("flexq", 1.0 * slower), ("w8a8", 1.6 / slower)):
            ran = Measurement(1, "1", "compiled: " + mode.replace("best", "max-autotune"))
            record("04_e2e", "llama-7b", method, {"total_s/128": total_s, "captured": ran}, machine, compile_mode=mode)
    (ratio,) = end_to_end_ratios(read_records(), "latency", "W8A8").of.values()
    assert ratio == pytest.approx(1.6 / 1.2)


def test_a_mode_that_was_chosen_is_the_same_as_that_mode_and_the_newest_run_counts(record):
    for hour, mode, total_s in ((1, "best", 1.2), (2, "default", 1.6)):
        machine = GPU | {"time": f"2026-01-01T0{hour}:00:00+00:00"}
        for method, seconds in (("flexq", 1.0), ("w8a8", total_s)):
            measured = {"total_s/128": seconds, "captured": Measurement(1, "1", "compiled: default")}
            record("04_e2e", "llama-7b", method, measured, machine, compile_mode=mode)
    assert end_to_end_ratios(read_records(), "latency", "W8A8").of == {("llama-7b", 128): 1.6}


def test_a_claim_about_a_model_asks_the_card_that_has_it(record):
    for card, model in (("first", "llama-7b"), ("second", "llama-13b"), ("second", "llama-30b")):
        for method, each in (("w8a8", 2.0), ("flexq", 1.0)):
            seconds = {f"total_s/{length}": each for length in (128, 256, 512, 1024)}
            record("04_e2e", model, method, seconds, GPU | {"device": card})
    for model, card in (("llama-7b", "first"), ("llama-13b", "second")):
        found = verdict(f"{model}: FlexQ is 1.{33 if card == 'first' else 28}× as fast as W8A8")
        assert found.verdict == REPRODUCED and found.detail.startswith(f"{card}: ")
    assert verdict("1.33× as fast as SmoothQuant").evidence == 8  # a mean is of one card


@pytest.mark.parametrize(("weights_mib", "status"), [(150.0, REPRODUCED), (110.0, NOT_REPRODUCED)])
def test_memory_is_weights_and_cache(record, weights_mib, status):
    text = "llama-7b: FlexQ is 1.20× smaller in memory than W8A8"
    for method, mib in (("flexq", 100.0), ("w8a8", weights_mib)):
        record("04_e2e", "llama-7b", method, {"weights_mib": mib}, GPU)
    assert verdict(text).verdict == NOT_MEASURED  # without the cache
    for method, mib in (("flexq", 100.0), ("w8a8", weights_mib)):
        caches = {f"kv_cache_mib/{length}": length / 64 for length in (128, 256, 512, 1024)}
        record("04_e2e", "llama-7b", method, {"weights_mib": mib} | caches, GPU)
    found = verdict(text)
    assert (found.verdict, found.evidence) == (status, 4)
    assert f"128 tokens: {(weights_mib + 2) / 102:.2f}×" in found.detail


def test_only_what_was_run_alike_is_compared(record):
    record("04_e2e", "llama-7b", "flexq", {"total_s/128": 1.0}, GPU, prompt_tokens=15)
    record("04_e2e", "llama-7b", "w8a8", {"total_s/128": 9.0}, GPU, prompt_tokens=512)
    assert ratios(read_records(), "04_e2e", "total_s/", "W8A8").empty


@pytest.mark.parametrize(("machine", "compared"), [(GPU, 1), (CPU, 0)])
def test_a_hosts_threads_are_no_condition_of_a_gpu(record, machine, compared):
    for method, threads in (("flexq", 16), ("w8a8", 32)):
        record("04_e2e", "llama-7b", method, {"total_s/128": 1.0}, machine, threads=threads)
    assert len(ratios(read_records(), "04_e2e", "total_s/", "W8A8")) == compared
