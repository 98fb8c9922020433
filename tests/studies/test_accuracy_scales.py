"""Scales in 02_accuracy: each way is a method of its own, its gain is on record, and claims say what the numbers say."""

import math

import pandas as pd
import pytest
import torch

from flexq_core.quant import PrecisionPlan
from flexq_core.quant.layers import linear_layers
from flexq_core.studies import accuracy_scales
from flexq_core.studies.accuracy import claims as accuracy_claims
from flexq_core.studies.accuracy import plot_change
from tests.studies import test_accuracy

SCALES = "absmax,mse,output"
NO_SQNR = pd.DataFrame(columns=["scales", "layer", "weight_sqnr_db", "output_sqnr_db"])


def a_study(folder, **parameters):
    """A small study that calibrates on the start of what it scores: gathering the text that it would read takes seconds."""
    study = test_accuracy.a_study(folder, **parameters)
    study.calibration = study.rows[:1]
    return study


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        ("flexq", ("flexq", "absmax")),
        ("flexq+mse", ("flexq", "mse")),
        ("plans/a+b.json", ("plans/a+b.json", "absmax")),
        ("plans/a+b.json+output", ("plans/a+b.json", "output")),
    ],
)
def test_a_methods_name_tells_its_scales(method, parts):
    assert accuracy_scales.of_method(method) == parts
    assert accuracy_scales.with_scales(*parts) == method


def test_every_way_is_scored_once_and_found_again(tmp_path):
    parameters = {"methods": "fp16,w6a8", "backends": "simulate,reference", "scales": SCALES, "tasks": "continuation"}
    study = a_study(tmp_path, **parameters, task_limit=2)
    assert list(study.cases()) == [
        ("fp16", "torch"),
        ("w6a8", "simulate"),
        ("w6a8", "reference"),
        ("w6a8+mse", "reference"),
        ("w6a8+output", "reference"),
    ]
    table = study.table()
    assert table["perplexity"].nunique() == 5
    assert table["accuracy/continuation"].notna().tolist() == [True, False, True, False, False]
    assert table["linear_weight_mib"].iloc[1:].nunique() == 1  # the format is the same
    sqnrs = accuracy_scales.layer_sqnr(study)
    assert len(sqnrs) == 3 * len(linear_layers(study.loaded.model)) and sqnrs.notna().all(axis=None)
    gains = accuracy_scales.gain_table(table, sqnrs)
    assert list(gains.index) == SCALES.split(",") and list(gains) == ["w6a8", "weight_sqnr_db", "output_sqnr_db"]
    assert gains["w6a8"].tolist() == table["change_percent"].iloc[2:].tolist()
    assert gains["weight_sqnr_db"].idxmax() == "mse" and gains["output_sqnr_db"].idxmax() == "output"
    assert len(accuracy_scales.plot_gain(gains).axes[0].patches) == 3
    found = accuracy_scales.claims(table, sqnrs)
    assert len(found) == 4 and all(holds for _, holds, _ in found[:2])
    # What is compared by method leaves these out.
    assert len(plot_change(table, "demo-opt").axes[0].patches) == 2
    assert not any("+" in text for text, _, _ in accuracy_claims(table, outliers=0.0))
    again = a_study(tmp_path, **parameters, task_limit=2)
    again.build = lambda *_: pytest.fail("computed again")
    pd.testing.assert_frame_equal(again.table(), table)
    pd.testing.assert_frame_equal(accuracy_scales.layer_sqnr(again), sqnrs)
    assert "moments" not in vars(again)


def test_a_plan_of_ones_own_takes_scales_too(tmp_path):
    file = tmp_path / "plan.json"
    study = a_study(tmp_path, methods="fp16")
    file.write_text(PrecisionPlan("mine", PrecisionPlan.from_rule("w6a8", linear_layers(study.model)).layers).to_json())
    parameters = {"methods": "fp16,w6a8", "plan": str(file), "scales": "mse", "windows": 1}
    table = a_study(tmp_path, **parameters).table().set_index("method")
    assert list(table.index) == ["fp32", "w6a8+mse", "plan:mine+mse"]
    assert table["perplexity"]["w6a8+mse"] == table["perplexity"]["plan:mine+mse"]


@pytest.mark.parametrize(
    ("column", "label"), [("change_percent", "change of perplexity (%)"), ("perplexity", "perplexity")]
)
def test_the_figure_says_what_it_shows(column, label):
    rows = [("w6a6", 24.3, 1.2), ("w6a6+mse", 24.2, 0.9)]
    table = pd.DataFrame(rows, columns=["method", "perplexity", "change_percent"]).assign(backend="cpu")
    gains = accuracy_scales.gain_table(
        table if column == "change_percent" else table.drop(columns="change_percent"), NO_SQNR
    )
    axis = accuracy_scales.plot_gain(gains).axes[0]
    assert axis.get_ylabel() == label and [bar.get_height() for bar in axis.patches] == table[column].tolist()


def test_layer_by_layer_all_is_the_same_bit_for_bit(tmp_path):
    parameters = {"methods": "fp16,flexq", "scales": "output"}
    whole = a_study(tmp_path / "whole", **parameters)
    study = a_study(tmp_path / "layers", **parameters, layer_by_layer=True)
    pd.testing.assert_frame_equal(
        study.table().drop(columns="seconds"), whole.table().drop(columns="seconds"), check_exact=True
    )
    sqnrs = accuracy_scales.layer_sqnr(study)
    assert len(sqnrs) == len(linear_layers(whole.model))
    pd.testing.assert_frame_equal(sqnrs, accuracy_scales.layer_sqnr(whole), check_exact=True)


def test_absmax_alone_has_nothing_to_compare(tmp_path):
    study = a_study(tmp_path, methods="fp16,flexq")
    table, sqnrs = study.table(), accuracy_scales.layer_sqnr(study)
    assert sqnrs.empty and "moments" not in vars(study)  # nothing is calibrated for it
    assert accuracy_scales.gain_table(table, sqnrs).empty and not accuracy_scales.claims(table, sqnrs)


def test_a_claim_fails_where_the_numbers_say_so():
    rows = [
        {"scales": way, "layer": "a", "weight_sqnr_db": db, "output_sqnr_db": db}
        for way, db in (("absmax", 30.0), ("mse", 29.0))
    ]
    blocks = {f"loss_nats/{i:02}": 3.0 for i in range(4)}
    table = pd.DataFrame(
        [
            {"method": "w6a6", "backend": "cpu", "perplexity": math.exp(3.0), **blocks},
            {
                "method": "w6a6+mse",
                "backend": "cpu",
                "perplexity": math.exp(3.1),
                **{b: v + 0.1 for b, v in blocks.items()},
            },
        ]
    )
    found = accuracy_scales.claims(table, pd.DataFrame(rows))
    assert [holds for _, holds, _ in found] == [False, False]
    assert found[0][2] == "-1.00 to -1.00 dB"


def test_a_layer_of_zeros_has_no_ratio():
    assert accuracy_scales.sqnr(torch.zeros(2, 8), torch.ones(8), "mse") == {
        "weight_sqnr_db": math.inf,
        "output_sqnr_db": math.inf,
    }
