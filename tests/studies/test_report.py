"""The paper beside records: every verdict can be reached, findings are what the numbers say, and demo models prove nothing."""

import pytest

from flexq_core.sources import paper
from flexq_core.studies import report
from flexq_core.studies.report import NOT_MEASURED, NOT_REPRODUCED, REPRODUCED, ReportStudy, Tolerance
from flexq_core.workbook import paths
from flexq_core.workbook.records import Measurement, Records, read_jsonl
from flexq_core.workbook.run import Run, declared_parameters

MACHINE = {"git_commit": None, "dirty": None, "versions": {}, "time": "2026-01-01T00:00:00+00:00"}
CPU = {**MACHINE, "device": "a processor", "driver": None}
GPU = {**MACHINE, "device": "a GPU", "driver": "1.0"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An outputs folder of this workbook's own, and no references beside it."""
    monkeypatch.setenv("FLEXQ_OUTPUTS", str(tmp_path / "out"))
    monkeypatch.setattr(paths, "REFERENCE", tmp_path / "reference")
    monkeypatch.setattr("flexq_core.workbook.records.source_digest", lambda study: study)
    return tmp_path / "out"


@pytest.fixture
def record(folder, monkeypatch):
    def write(study, model, method, measured, machine=CPU, **parameters):
        monkeypatch.setattr("flexq_core.workbook.records.provenance", lambda _: machine)
        measurements = {metric: Measurement(value, "1") for metric, value in measured.items()}
        Records(study, folder).replace(model=model, method=method, parameters=parameters, seed=0, measured=measurements)

    return write


@pytest.fixture
def score(record):
    def write(model, method, perplexity, backend="simulate", dataset="wikitext2", windows=166, **more):
        inputs = {"backend": backend, "dataset": dataset, "windows": windows, "window_length": 2048, "outliers": 0.0}
        record("02_accuracy", model, method, {"perplexity": perplexity}, **(inputs | more))

    return write


@pytest.fixture
def time_kernels(record):
    def write(speedup=None, cases=None, rival="cublas-int8", machine=GPU):
        for row in report.paper_kernel_ratios().itertuples():
            if cases is None or (row.outputs, row.features, row.tokens) in cases:
                shape = {"outputs": row.outputs, "features": row.features, "tokens": row.tokens, "threads": 2}
                model, time = f"{row.outputs}x{row.features}", "gemm_us"
                record("03_kernels", model, rival, {time: 100.0 * (speedup or row.flexq)}, machine, **shape)
                shape["activation_bits"] = row.activation_bits
                record("03_kernels", model, "flexq", {time: 100.0}, machine, **shape)

    return write


def verdict(text, tolerance=None):
    found = report.judge(report.paper_claims(), report.read_records(), tolerance or Tolerance())
    (row,) = [row for row in found.itertuples() if text in row.claim]
    return row


def run_of(folder, **parameters):
    return Run("05_report", parameters, "cpu", folder, Records("05_report", folder))


class TestVerdicts:
    def test_without_records_nothing_is_measured_and_every_claim_says_what_it_needs(self, folder):
        found = report.judge(report.paper_claims(), report.read_records(), Tolerance())
        assert len(found) > 50 and found["claim"].is_unique
        assert set(found["verdict"]) == {NOT_MEASURED}
        assert (found["evidence"] == 0).all()
        assert found["detail"].str.contains("papermill|not built here|not carried in").all()

    @pytest.mark.parametrize(("perplexity", "status"), [(5.54, REPRODUCED), (5.56, NOT_REPRODUCED)])
    def test_perplexity_is_judged_by_its_increase(self, score, perplexity, status):
        score("llama-2-7b", "fp16", 5.47, backend="torch")
        score("llama-2-7b", "flexq", perplexity)  # the paper's increase is 0.05, the tolerance 0.03
        found = verdict("llama-2-7b: FlexQ costs 0.05 of perplexity on WikiText-2")
        assert (found.verdict, found.evidence) == (status, 1)
        assert f"5.47 → {perplexity}" in found.detail and "the paper 5.47 → 5.52" in found.detail

    def test_the_packed_weights_come_before_their_simulation(self, score):
        score("llama-2-7b", "fp16", 5.47, backend="torch")
        score("llama-2-7b", "flexq", 5.60, backend="cpu")
        score("llama-2-7b", "flexq", 5.50, backend="simulate")
        assert verdict("llama-2-7b: FlexQ costs 0.05 of perplexity on WikiText-2").verdict == NOT_REPRODUCED

    @pytest.mark.parametrize("more", [{"windows": 8}, {"outliers": 32.0}, {"window_length": 512}, {"dataset": "pydoc"}])
    def test_what_was_scored_otherwise_than_the_paper_does_not_count(self, score, more):
        score("llama-2-7b", "fp16", 5.47, backend="torch", **more)
        score("llama-2-7b", "flexq", 5.50, **more)
        assert verdict("llama-2-7b: FlexQ costs 0.05 of perplexity on WikiText-2").verdict == NOT_MEASURED

    def test_a_claim_about_all_models_needs_all_of_them_and_one_refutes_it(self, score):
        text = "FlexQ's perplexity on WikiText-2 is below SmoothQuant"
        *models, last = report.paper_increases()["model"].unique()
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
    def test_sensitivity_is_judged_by_kinds_of_layer(self, record, sensitive, status):
        for kind in ("q_proj", "down_proj"):
            method = f"rounded: every {kind}"
            record("01_sensitivity", "llama-7b", method, {"kl_nats": 1.0 if kind == sensitive else 0.1}, outliers=0.0)
            record("01_sensitivity", "llama-7b", method, {"kl_nats": 0.5}, outliers=32.0)  # another question
        assert verdict("down_proj is the layer").verdict == status
        assert verdict("fc2 is the layer").verdict == NOT_MEASURED

    def test_kernels_as_fast_as_the_papers_reproduce_it(self, time_kernels):
        time_kernels()
        assert verdict("8192 × 28672 (llama-2-70b, W6A8)").verdict == REPRODUCED
        mean = verdict("at batch 4, the mean of 20 shapes")
        assert (mean.verdict, mean.evidence) == (REPRODUCED, 20)
        assert verdict("ABQ-LLM's on LLaMA-2-70B").verdict == NOT_MEASURED

    def test_slower_kernels_do_not(self, time_kernels):
        time_kernels(speedup=1.2)
        assert verdict("4096 × 4096 (llama-7b").verdict == NOT_REPRODUCED
        assert verdict("at batch 1, the mean of 20 shapes").verdict == NOT_REPRODUCED

    @pytest.mark.parametrize(("speedup", "status"), [(1.4, REPRODUCED), (1.3, NOT_REPRODUCED)])
    def test_the_mean_over_abq_needs_its_four_shapes(self, time_kernels, speedup, status):
        shapes = [shape for shape in paper.kernel_shapes() if 8192 in shape]
        time_kernels(speedup, {(*shape, 1) for shape in shapes[:3]}, rival="abq-llm")
        assert "3 of its 4 cases" in verdict("ABQ-LLM's on LLaMA-2-70B").detail
        time_kernels(speedup, {(*shape, 1) for shape in shapes}, rival="abq-llm")
        assert verdict("ABQ-LLM's on LLaMA-2-70B").verdict == status

    def test_a_processor_bears_out_no_claim_about_a_gpu(self, time_kernels):
        time_kernels(speedup=9.0, machine=CPU)
        found = verdict("4096 × 4096 (llama-7b")
        assert found.verdict == NOT_MEASURED and "an NVIDIA GPU; a processor was timed here: papermill" in found.detail

    def test_end_to_end_needs_every_length_and_the_whole_model(self, record):
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

    @pytest.mark.parametrize(("weights_mib", "status"), [(150.0, REPRODUCED), (110.0, NOT_REPRODUCED)])
    def test_memory_is_weights_and_cache(self, record, weights_mib, status):
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

    def test_only_what_was_run_alike_is_compared(self, record):
        record("04_e2e", "llama-7b", "flexq", {"total_s/128": 1.0}, GPU, prompt_tokens=15)
        record("04_e2e", "llama-7b", "w8a8", {"total_s/128": 9.0}, GPU, prompt_tokens=512)
        assert report.ratios(report.read_records(), "04_e2e", "total_s/", "W8A8").empty


class TestDemoModels:
    @pytest.fixture(autouse=True)
    def _demo(self, score, record):
        perplexities = {"rtn-w6a6": 9.0, "smoothquant-w6a6": 8.8, "w6a6": 8.5, "flexq": 8.3, "w6a8": 8.1}
        for method, perplexity in perplexities.items():
            score("demo-llama", method, perplexity)
        score("demo-llama", "fp32", 8.0, backend="torch")
        for kind, kl in (("up_proj", 0.2), ("down_proj", 0.1)):
            record("01_sensitivity", "demo-llama", f"rounded: every {kind}", {"kl_nats": kl}, outliers=0.0)
        shape = {"outputs": 64, "features": 128, "tokens": 1}
        record("03_kernels", "64x128", "cpu", {"median_us": 5.0}, activation_bits=6, **shape)
        record("03_kernels", "64x128", "simulate", {"median_us": 500.0}, activation_bits=6, **shape)
        record("03_kernels", "64x128", "torch-int8", {"median_us": 6.0}, **shape)

    def test_they_bear_out_no_claim_of_the_paper(self):
        found = report.judge(report.paper_claims(), report.read_records(), Tolerance())
        assert set(found["verdict"]) == {NOT_MEASURED} and (found["evidence"] == 0).all()

    def test_their_directions_are_told_apart(self):
        found = report.directions(report.read_records()).set_index("the paper's direction")
        assert found["same direction"].to_dict() == {
            "perplexity: rtn-w6a6 > w6a6 > flexq > w6a8": "yes",
            "perplexity: smoothquant-w6a6 > flexq": "yes",
            "down_proj is the most sensitive kind of layer": "no",
            "the kernel is faster than INT8": "yes",
        }
        assert found.loc["the kernel is faster than INT8", "here"] == "in 1 of 1 cases; 1.20× to 1.20×"


class TestFindings:
    def test_the_average_over_abq_is_that_of_batch_1(self):
        numbers = report.average_over_abq().numbers
        assert [round(numbers[f"batch_{n}"], 2) for n in (1, 4, 8)] == [1.39, 1.37, 1.36]
        assert round(numbers["all_shapes"], 2) == 1.25

    def test_the_acceleration_over_smoothquant_is_one_models(self):
        found = report.latency_over_smoothquant()
        rounded = {model: round(value, 2) for model, value in found.numbers.items()}
        assert rounded == {"llama-7b": 1.33, "llama-13b": 1.28, "llama-30b": 1.24, "opt-30b": 1.25, "all": 1.27}
        assert not found.agrees

    def test_the_memory_saving_is_the_mean_of_all(self):
        found = report.memory_over_smoothquant()
        assert round(found.numbers["all"], 2) == 1.21 and found.agrees

    def test_opt_30b_has_llama_30bs_memory_bars(self):
        shared = {(tokens, method): value for *models, tokens, method, value in report.shared_memory_bars()}
        assert shared == {
            (512, "w8a16"): 33.92,
            (512, "w8a8"): 33.92,
            (512, "w6ax"): 27.35,
            (1024, "fp16"): 64.38,
        }
        assert {row[:2] for row in report.shared_memory_bars()} == {("llama-30b", "opt-30b")}

    def test_memory_falls_as_the_output_grows(self):
        found = report.shrinking_memory()
        assert not found.agrees and "opt-30b w8a8 33.92 at 512 but 32.31 at 1024" in found.finding
        assert set(found.numbers) == {"opt-30b_w8a16", "opt-30b_w8a8", "opt-30b_w6ax"}

    def test_the_rest(self):
        assert report.largest_increase().numbers["largest"] == 0.05
        assert report.slower_than_abq().numbers == {"behind": 1, "cases": 60}
        assert report.flexq_is_listed_as_w6a6().numbers == {"shapes_with_a8": 5, "shapes": 20}
        assert round(report.best_over_fp16().numbers["memory"], 2) == 2.28

    def test_findings_follow_the_numbers(self, monkeypatch):
        bars = paper.end_to_end()
        bars["memory_gb"] += range(len(bars))  # so that no two are the same, and all grow
        monkeypatch.setattr(paper, "end_to_end", lambda: bars)
        assert report.shared_memory_bars() == [] and report.shrinking_memory().agrees


class TestStudy:
    @pytest.mark.parametrize(
        ("parameters", "text"),
        [
            (
                {"records": "nowhere"},
                "records is 'nowhere', which holds no records/.*accepted: empty, for this workbook",
            ),
            ({"records": "notebooks"}, "records is 'notebooks', which holds no records/"),
            ({"tolerance": -0.1}, "tolerance is -0.1; accepted: 0 or more, less than 1"),
            ({"tolerance": 1.0}, "tolerance is 1.0; accepted"),
            ({"tolerance": float("nan")}, "tolerance is nan; accepted"),
            ({"perplexity_tolerance": -1.0}, "perplexity_tolerance is -1.0; accepted"),
        ],
    )
    def test_wrong_parameters_are_refused(self, folder, parameters, text):
        with pytest.raises(ValueError, match=text):
            ReportStudy(run_of(folder), **parameters)

    def test_its_parameters_are_the_notebooks(self, folder):
        declared = declared_parameters(paths.NOTEBOOKS / "05_report.ipynb")
        ReportStudy(run_of(folder), **{name: parameter.default for name, parameter in declared.items()})

    def test_a_folder_that_is_named_is_read_alone(self, folder, score, tmp_path):
        score("llama-2-7b", "fp16", 5.47, backend="torch")
        other = tmp_path / "other"
        (other / "records").mkdir(parents=True)
        (other / "records" / "02_accuracy.jsonl").write_text("")
        assert report.read_records(str(other)).empty
        assert len(report.read_records()) == 1

    def test_references_are_read_too_and_a_copy_counts_once(self, folder, score, tmp_path):
        score("llama-2-7b", "fp16", 5.47, backend="torch")
        copy = tmp_path / "reference" / "h200" / "records"
        copy.mkdir(parents=True)
        (copy / "02_accuracy.jsonl").write_bytes((folder / "records" / "02_accuracy.jsonl").read_bytes())
        assert len(report.read_records()) == 1
        (folder / "records" / "02_accuracy.jsonl").unlink()
        assert len(report.read_records()) == 1

    def test_tolerances_decide(self, folder, score):
        score("llama-2-7b", "fp16", 5.47, backend="torch")
        score("llama-2-7b", "flexq", 5.53)
        text = "llama-2-7b: FlexQ costs 0.05 of perplexity on WikiText-2"
        assert verdict(text).verdict == REPRODUCED
        assert verdict(text, Tolerance(perplexity=0.0)).verdict == NOT_REPRODUCED

    def test_its_own_claims_hold_and_everything_is_kept_for_the_report(self, folder, score):
        score("llama-2-7b", "fp16", 5.47, backend="torch")
        score("llama-2-7b", "flexq", 5.50)
        study = ReportStudy(run_of(folder))
        assert all(holds is True for _, holds, _ in study.claims())
        study.keep()
        kept = read_jsonl(folder / "records" / "05_report.jsonl")
        kinds = [record.metric.split("/")[0] for record in kept]
        assert kinds.count("verdict") == len(study.verdicts)
        assert kinds.count("finding") == len(report.FINDINGS) and kinds.count("reading") == len(report.READINGS)
        reproduced = [record for record in kept if record.reason.startswith("reproduced: ")]
        assert len(reproduced) == 1 and reproduced[0].value == 1
        assert report.read_records()["study"].unique().tolist() == ["02_accuracy"]  # never its own

    def test_a_verdict_without_a_record_fails_its_claim(self, folder):
        study = ReportStudy(run_of(folder))
        study.verdicts.loc[0, "verdict"] = REPRODUCED
        failed = [claim for claim, holds, _ in study.claims() if not holds]
        assert failed == ["no claim counts as reproduced without a record"]

    def test_tables_can_be_read(self, folder):
        study = ReportStudy(run_of(folder))
        assert report.summary(study.verdicts).to_numpy().sum() == len(study.verdicts)
        assert len(report.findings_table(study.findings)) == len(report.FINDINGS)
        assert len(report.readings_table()) == len(report.READINGS)


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("plot", [report.plot_perplexity, report.plot_kernels, report.plot_end_to_end])
def test_figures_show_ours_only_where_measured(folder, score, record, time_kernels, tmp_path, plot, measured):
    if measured:
        score("llama-2-7b", "fp16", 5.47, backend="torch")
        score("llama-2-7b", "flexq", 5.50)
        time_kernels(cases={(4096, 4096, 1), (4096, 4096, 8)})
        for method, seconds in (("flexq", 1.0), ("w8a8", 1.4)):
            record("04_e2e", "llama-7b", method, {"total_s/128": seconds, "total_s/256": seconds}, GPU)
    figure = plot(report.read_records())
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert any("measured here" in label for label in labels) == measured
    path = run_of(tmp_path).figure(figure, "figure", caption="A caption")
    assert path.stat().st_size > 1000 and path.with_suffix(".png").is_file()
