"""The paper's numbers: every table is whole, in its units, and names models as the workbook does."""

import pytest

from flexq_core.sources import paper
from flexq_core.sources.architectures import ARCHITECTURES


def test_the_perplexity_tables_are_whole():
    table = paper.perplexity()
    assert list(table) == ["dataset", "bits", "method", "model", "perplexity"]
    # 2 texts × (FP16 and 5 methods × 7 models), less the two models that I-LLM leaves out
    assert len(table) == 2 * (6 * 7 - 2)
    assert not table.duplicated(["dataset", "method", "model"]).any()
    assert table["perplexity"].between(3, 9).all()


def test_quantising_never_lowers_the_printed_perplexity():
    wide = paper.perplexity().pivot(index=["dataset", "model"], columns="method", values="perplexity")
    for method in wide.columns.drop("-"):
        assert (wide[method].dropna() > wide.loc[wide[method].notna(), "-"]).all()


def test_the_kernel_figure_is_whole():
    table = paper.kernel_speedups()
    assert list(table) == ["model", "outputs", "features", "activation_bits", "tokens", "kernel", "speedup"]
    assert len(table) == 20 * 3 * 2
    assert set(table["tokens"]) == {1, 4, 8} and set(table["kernel"]) == {"flexq", "abq"}
    assert table["speedup"].between(0.5, 3).all()


def test_the_kernel_figures_shapes_are_its_models():
    assert len(set(paper.kernel_shapes())) == 20
    for row in paper.kernel_speedups().itertuples():
        model = ARCHITECTURES[row.model]
        assert {row.outputs, row.features} & {model.hidden_size}
        assert (row.activation_bits == 8) == (row.features == model.intermediate_size)


def test_the_end_to_end_figure_is_whole():
    table = paper.end_to_end()
    assert list(table) == ["model", "output_tokens", "method", "seconds", "memory_gb"]
    assert len(table) == 4 * 4 * 4
    assert not table.duplicated(["model", "output_tokens", "method"]).any()
    assert (table[["seconds", "memory_gb"]] > 0).all(axis=None)


@pytest.mark.parametrize("table", [paper.perplexity, paper.kernel_speedups, paper.end_to_end])
def test_models_are_named_as_the_workbook_names_them(table):
    assert set(table()["model"]) <= set(ARCHITECTURES)
    assert table.__name__ in paper.ORIGIN


def test_opt_30b_has_llama_30bs_memory_bars():
    shared = {(tokens, method): value for *models, tokens, method, value in paper.shared_memory_bars()}
    assert shared == {
        (512, "w8a16"): 33.92,
        (512, "w8a8"): 33.92,
        (512, "w6ax"): 27.35,
        (1024, "fp16"): 64.38,
    }
    assert {row[:2] for row in paper.shared_memory_bars()} == {("llama-30b", "opt-30b")}
