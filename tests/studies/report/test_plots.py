"""The paper's figures, with ours in them only where measured."""

import pytest

from flexq_core.studies.report.evidence import read_records
from flexq_core.studies.report.plots import (
    end_to_end_note,
    kernels_note,
    plot_end_to_end,
    plot_kernels,
    plot_perplexity,
)
from tests.runs import run_of
from tests.studies.report.cases import GPU


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("plot", [plot_perplexity, plot_kernels, plot_end_to_end])
def test_figures_show_ours_only_where_measured(folder, score, record, time_kernels, tmp_path, plot, measured):
    if measured:
        score("llama-2-7b", "fp16", 5.47, backend="torch")
        score("llama-2-7b", "flexq", 5.50)
        time_kernels(cases={(4096, 4096, 1), (4096, 4096, 8)})
        for method, seconds in (("flexq", 1.0), ("w8a8", 1.4)):
            record("04_e2e", "llama-7b", method, {"total_s/128": seconds, "total_s/256": seconds}, GPU)
    figure = plot(read_records())
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert any("measured here" in label or GPU["device"] in label for label in labels) == measured
    path = run_of("05_report", tmp_path).figure(figure, "figure", caption="A caption")
    assert path.stat().st_size > 1000 and path.with_suffix(".png").is_file()


def test_figures_of_gpus_name_the_card(folder, record, time_kernels):
    nothing = "no GPU's of this workbook is on record"
    assert kernels_note(read_records()) == end_to_end_note(read_records()) == nothing
    time_kernels(cases={(4096, 4096, 1)}, machine={**GPU, "device": "NVIDIA H100"})
    assert kernels_note(read_records()) == "stars: this workbook's on NVIDIA H100"
    labels = [text.get_text() for text in plot_kernels(read_records()).legends[0].get_texts()]
    assert labels[-1] == "FlexQ, NVIDIA H100"
    assert end_to_end_note(read_records()) == nothing
    for method, seconds in (("flexq", 1.0), ("w8a8", 1.4)):
        record("04_e2e", "llama-7b", method, {"total_s/128": seconds}, {**GPU, "device": "NVIDIA H200 141GB HBM3e"})
    told = "stars: this workbook's on NVIDIA H200 141GB HBM3e, over dynamic W8A8 (llama-7b)"
    assert end_to_end_note(read_records()) == told
    figure = plot_end_to_end(read_records())
    figure.canvas.draw()
    legend = figure.legends[0].get_window_extent()
    assert 0 <= legend.x0 < legend.x1 <= figure.bbox.width  # a card's name is long
