"""Accuracy: the perplexity protocol equals a plain computation, and parameters are refused before anything runs."""

import dataclasses
import math
import os
import weakref
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
import torch

from flexq_core.quant import LayerPrecision, PlanError, PrecisionPlan
from flexq_core.quant.layers import linear_layers
from flexq_core.runtime import ops
from flexq_core.runtime.linear import FlexQLinear
from flexq_core.sources import data
from flexq_core.sources.models import ModelError, load_model
from flexq_core.sources.text import Text
from flexq_core.studies.accuracy import (
    TITLES,
    AccuracyStudy,
    Perplexity,
    claims,
    order_of,
    perplexity,
    plot_change,
    plot_size,
)
from flexq_core.studies.parameters import resolved_backends
from flexq_core.studies.sensitivity import SensitivityStudy
from flexq_core.workbook import paths
from flexq_core.workbook.records import load_records
from flexq_core.workbook.report import accuracy_table
from tests.models import tiny_model
from tests.runs import run_of


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
    assert math.isclose(sum(score.block_nats) / 5, total / 95, rel_tol=1e-5)


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


SMALL = {"windows": 2, "window_length": 64, "tasks": "", "backends": "reference"}


def a_study(folder, **parameters):
    return AccuracyStudy(run_of("02_accuracy", folder, **parameters), **{"model": "demo-opt", **SMALL, **parameters})


@pytest.mark.parametrize(
    ("parameters", "kind", "text"),
    [
        ({"model": "demo-opy"}, ModelError, "Did you mean 'demo-opt'"),
        ({"model": "tests"}, ModelError, "holds no config.json"),
        ({"methods": "w6a6,flex"}, ValueError, "did you mean 'flexq'"),
        ({"methods": ""}, ValueError, "no method is given; accepted: fp16"),
        ({"scales": "mze"}, ValueError, "no way to choose scales is called 'mze'.*'mse'"),
        ({"backends": "simulat"}, ValueError, "did you mean 'simulate'"),
        ({"plan": "nowhere.json"}, ValueError, "cannot read the plan 'nowhere.json'"),
        ({"dataset": "wikitxt2"}, data.DataError, "Did you mean 'wikitext2'"),
        ({"dataset": "c4", "data_dir": "nowhere"}, data.DataError, "accepted: a folder that exists"),
        ({"windows": -1}, ValueError, "windows is -1; accepted: 0 or more"),
        ({"window_length": -5}, ValueError, "window_length is -5; accepted: 0 or more"),
        ({"tasks": "piqua"}, ValueError, "Did you mean 'piqa'"),
        ({"tasks": "piqa", "data_dir": "tests"}, ValueError, "no data of 'piqa'"),
        ({"task_limit": -1}, ValueError, "task_limit is -1; accepted: 0 or more"),
        ({"outliers": -2.0}, ValueError, "outliers is -2.0; accepted: 0 for none"),
        ({"outliers": 8.0, "layer_by_layer": True}, ValueError, "outliers is 8.0 with layer_by_layer; accepted: 0"),
        (
            {"methods": "smoothquant-w6a6", "layer_by_layer": True},
            ValueError,
            "accepted: one that is none of smoothquant",
        ),
        ({"batch_size": 0}, ValueError, "batch_size is 0; accepted: 1 or more"),
        ({"seed": -1}, ValueError, "seed is -1; accepted: 0 or more"),
    ],
    ids=str,
)
def test_a_wrong_parameter_is_refused_before_anything_is_measured(tmp_path, parameters, kind, text):
    with pytest.raises(kind, match=text):
        a_study(tmp_path, **parameters)
    assert not (tmp_path / "records").exists()


def test_a_plan_for_another_model_is_refused(tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(PrecisionPlan.from_rule("flexq", linear_layers(load_model("demo-llama").model)).to_json())
    with pytest.raises(PlanError, match="does not fit the model: it names 42 layers that the model lacks"):
        a_study(tmp_path, plan=str(file))


def test_a_plan_file_is_scored_under_its_name_with_outliers_and_found_again(tmp_path):
    file = tmp_path / "plan.json"
    layers = linear_layers(load_model("demo-opt").model)
    file.write_text(PrecisionPlan("mine", PrecisionPlan.from_rule("w6a8", layers).layers).to_json())
    parameters = {"methods": "fp16,w6a8", "plan": str(file), "outliers": 32.0, "batch_size": 2, "seed": 1}
    table = a_study(tmp_path, **parameters).table()
    assert list(table["method"]) == ["fp32", "w6a8", "plan:mine"]
    scores = table.set_index("method")["perplexity"]
    assert scores["w6a8"] == scores["plan:mine"] > scores["fp32"]
    before = (tmp_path / "records" / "02_accuracy.jsonl").read_bytes()
    pd.testing.assert_frame_equal(a_study(tmp_path, **parameters).table(), table)
    assert (tmp_path / "records" / "02_accuracy.jsonl").read_bytes() == before


def test_auto_means_what_the_plans_own_bits_can_run_on(tmp_path):
    file = tmp_path / "plan.json"
    layers = linear_layers(load_model("demo-opt").model)
    file.write_text(PrecisionPlan("w4", dict.fromkeys(layers, LayerPrecision(4, 8))).to_json())
    table = a_study(tmp_path, methods="w6a6", plan=str(file), backends="auto").table()
    assert table.loc[table["method"] == "plan:w4", "backend"].item() == "reference"
    with pytest.raises(ValueError, match="'cpu' cannot run here"):
        a_study(tmp_path, plan=str(file), backends="cpu")


def test_auto_stays_where_it_means_several(monkeypatch):
    monkeypatch.setattr(ops, "resolve_backend", lambda asked, _, bits, *__: {"auto": f"for {bits}"}.get(asked, asked))
    layers = {"a": LayerPrecision(4, 8), "b": LayerPrecision(6, 6)}
    for text, meant in [("simulate,auto", ["simulate", "auto"]), ("reference,auto,reference", ["reference", "auto"])]:
        assert resolved_backends(text, "cpu", PrecisionPlan("mixed", layers)) == meant


def test_both_figures_are_drawn(tmp_path):
    table = a_study(tmp_path, methods="fp16,flexq", task_limit=1).table()
    (change,), (size,) = plot_change(table, "demo-opt").axes, plot_size(table, "demo-opt").axes
    assert len(change.patches) == (table["backend"] != "torch").sum() > 0
    assert {text.get_text() for text in size.get_legend().get_texts()} == {TITLES["fp32"], TITLES["flexq"]}


@pytest.mark.parametrize("model", ["demo-llama", "demo-opt"])
def test_layer_by_layer_the_numbers_are_the_whole_models_bit_for_bit(tmp_path, model):
    parameters = {"model": model, "methods": "fp16,rtn-w6a6,flexq", "windows": 3, "batch_size": 2}
    whole = a_study(tmp_path / "whole", **parameters).table()
    study = a_study(tmp_path / "layers", layer_by_layer=True, **parameters)
    alive = weakref.WeakSet()

    def load_block(name, load=study.loaded.load_block):
        assert not alive, "more than one block is in memory"
        block = load(name)
        alive.update(block.parameters())
        return block

    study.loaded = dataclasses.replace(study.loaded, load_block=load_block)
    whole = whole.drop(columns=["difference_from_simulate", "layers_on/reference"])  # wants the whole model
    pd.testing.assert_frame_equal(
        study.table().drop(columns="seconds"), whole.drop(columns="seconds"), check_exact=True
    )
    assert all(layer.weight.is_meta for layer in linear_layers(study.loaded.model).values())


def test_layer_by_layer_weights_take_the_bytes_that_they_take_as_they_are_served(tmp_path, monkeypatch):
    def fuse(_study, model, _method):
        for layer in model.modules():
            if isinstance(layer, FlexQLinear):
                layer.chunks = torch.empty(10**5, dtype=torch.uint8)  # as a kernel's, which a processor does not read
        return model

    monkeypatch.setattr(AccuracyStudy, "_fuse_as_served_", fuse)
    found = {}
    for layer_by_layer in (False, True):
        study = a_study(tmp_path / str(layer_by_layer), methods="flexq", layer_by_layer=layer_by_layer)
        (found[layer_by_layer],) = study.table()["linear_weight_mib"]
    layers = linear_layers(study.loaded.model).values()
    assert found[True] == found[False] == sum(10**5 + layer.out_features for layer in layers) / 2**20


def test_layer_by_layer_what_wants_the_whole_model_is_skipped_and_the_rest_is_resumed(tmp_path, monkeypatch):
    parameters = {"methods": "fp16,smoothquant-w8a8,flexq", "tasks": "continuation", "layer_by_layer": True}
    table = a_study(tmp_path, **parameters).table().set_index("method")
    assert table["perplexity"].notna().to_dict() == {"fp32": True, "smoothquant-w8a8": False, "flexq": True}
    assert table["skipped"].str.contains("without layer_by_layer").all()
    assert not any(column.startswith("accuracy/") for column in table)
    records = run_of("02_accuracy", tmp_path).records.path.read_text()
    assert "smoothquant-w8a8 rescales the whole model in memory: run it without layer_by_layer" in records
    whole = a_study(tmp_path, **{**parameters, "methods": "fp16,flexq", "tasks": "", "layer_by_layer": False})
    monkeypatch.setattr(AccuracyStudy, "_score", lambda *_: pytest.fail("computed again"))
    assert whole.table()["seconds"].tolist() == table["seconds"].dropna().tolist()
    shown = table.reset_index()
    assert (
        len(plot_change(shown, "demo-opt").axes[0].patches) == 1
        and len(plot_size(shown, "demo-opt").axes[0].lines) == 2
    )
    assert len(claims(shown, outliers=0.0)) == 1


def test_hidden_states_that_do_not_fit_into_memory_are_kept_in_the_outputs(tmp_path, monkeypatch, capsys):
    parameters = {"methods": "fp16", "windows": 3, "layer_by_layer": True}
    expected = a_study(tmp_path / "memory", **parameters).table()["perplexity"]
    monkeypatch.setattr(os, "sysconf", lambda name: 64)
    assert (a_study(tmp_path / "files", **parameters).table()["perplexity"] == expected).all()
    assert "hidden states take 0.0 GiB and are kept in" in capsys.readouterr().out
    assert not list((tmp_path / "files").glob("hidden-states-*"))


def scored(*block_nats):
    return Perplexity(sum(block_nats), len(block_nats), block_nats).measurements()


def values(measurements):
    return {metric: measurement.value for metric, measurement in measurements.items()}


@pytest.mark.parametrize(
    ("after", "holds", "sign"),
    [
        ((1.9, 2.9, 3.9, 4.91), True, ">"),  # falls everywhere
        ((2.1, 3.1, 4.1, 5.09), False, "<"),  # rises everywhere
        ((2.3, 2.8, 4.1, 4.9), True, "≈"),  # rises by chance: the blocks do not agree
        ((1.8, 3.1, 3.9, 5.1), True, "≈"),
    ],
)
def test_an_order_is_false_only_where_the_text_can_tell(after, holds, sign):
    before = values(scored(2.0, 3.0, 4.0, 5.0))
    found, text = order_of([before, values(scored(*after))])
    assert found is holds
    assert text.split()[1] == sign


@pytest.mark.parametrize(
    ("other", "holds"),
    [
        ((2.0, 3.0, 4.0, 5.0), True),
        ((2.0005, 3.0005, 4.0005, 5.0005), True),  # by 0.05% everywhere
        ((2.002, 3.002, 4.002, 5.002), False),  # by 0.2% everywhere
        ((1.998, 2.998, 3.998, 4.998), False),
        ((2.01, 2.99, 4.012, 4.996), True),  # by 0.2%, but the blocks do not agree
    ],
)
def test_backends_disagree_only_where_the_text_can_tell(other, holds):
    rows = [
        {"method": "flexq", "backend": backend, **values(scored(*nats))}
        for backend, nats in (("simulate", (2.0, 3.0, 4.0, 5.0)), ("cpu", other))
    ]
    (found,) = [found for text, found, _ in claims(pd.DataFrame(rows), outliers=1.0) if "agree to 0.1%" in text]
    assert found is holds


@pytest.mark.parametrize(
    ("rows", "label", "points"),
    [
        ([("flexq", "cpu", 24.2, 6.125)], "perplexity", 1),  # nothing to compare with
        ([("fp32", "torch", 24.0, 32.0)], "perplexity", 1),
        ([("rtn-w6a6", "simulate", 24.8, None)], "perplexity", 0),  # nothing is stored in fewer bits
    ],
)
def test_figures_of_one_method_alone(rows, label, points):
    table = pd.DataFrame(rows, columns=["method", "backend", "perplexity", "bits_per_weight"]).dropna(axis=1)
    axis = plot_change(table, "m").axes[0]
    assert axis.get_title() == "m" and axis.get_xlabel() == label and axis.patches[0].get_width() == rows[0][2]
    assert len(plot_size(table, "m").axes[0].lines) == points


def test_a_run_of_methods_of_which_nothing_is_claimed_succeeds(tmp_path, capsys):
    """The notebook's last cell, which without any claim would have failed."""
    cells = nbformat.read(paths.NOTEBOOKS / "02_accuracy.ipynb", as_version=4).cells
    study = SimpleNamespace(claims=lambda *_, **__: [])
    run = run_of("02_accuracy", tmp_path, model="demo-opt")
    names = {"run": run, "accuracy": study, "accuracy_scales": study, "table": None, "sqnrs": None, "outliers": 0}
    exec(cells[-1].source, names)
    assert "skipped" in capsys.readouterr().out


def test_of_one_block_no_order_is_told():
    one, lower = (values(scored(nats)) for nats in (2.0, 1.9))
    assert order_of([one, lower]) == (True, f"{one['perplexity']:.3f} ≈ {lower['perplexity']:.3f}")
    assert order_of([lower, one])[0]


@pytest.mark.parametrize(
    ("parameters", "asked"),
    [
        ({"backends": "simulate,reference"}, [("fp16", "torch"), ("w6a6", "reference")]),
        ({"backends": "simulate"}, [("fp16", "torch"), ("w6a6", "simulate")]),
        ({"backends": "reference", "scales": "mse,output"}, [("fp16", "torch"), ("w6a6+output", "reference")]),
        ({"backends": "reference", "scales": "absmax,mse"}, [("fp16", "torch"), ("w6a6", "reference")]),
    ],
)
def test_every_method_answers_the_tasks_once(tmp_path, parameters, asked):
    study = a_study(tmp_path, methods="fp16,w6a6", **parameters)
    assert [case for case in study.cases() if study._answers_tasks(*case)] == asked
    assert study.calibrates == ("output" in study.scales)


def test_what_is_calibrated_on_and_asked_decides_a_record(tmp_path):
    study = a_study(tmp_path, methods="smoothquant-w6a6,w6a6")
    text = study.calibration_text
    calibrated = study._inputs("smoothquant-w6a6", "simulate")
    assert (
        calibrated["calibration_sha256"] == text.sha256
        and calibrated["calibration_window_length"] == study.window_length
    )
    assert "calibration_sha256" not in study._inputs("w6a6", "simulate")
    asked = a_study(tmp_path, methods="w6a6", tasks="continuation,piqa")._task_inputs
    assert asked["continuation"]["data_sha256"] == data.demo.held_out_text().sha256
    assert "data_sha256" not in asked["piqa"]  # the hub's
    file = tmp_path / "piqa_validation.json"
    digests = set()
    for content in ("{}", '{"a": 1}'):
        file.write_text(content)
        study = a_study(tmp_path, methods="w6a6", tasks="piqa", dataset="pydoc", data_dir=str(tmp_path))
        digests.add(study._task_inputs["piqa"]["data_sha256"])
    assert len(digests) == 2


@pytest.mark.parametrize("study", [AccuracyStudy, SensitivityStudy])
@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"dataset": "wikitxt2"}, "Did you mean 'wikitext2'"),
        ({"dataset": "ptb", "data_dir": "tests"}, "no data of 'ptb'"),
        ({"model": "llama-2-7b", "data_dir": "tests"}, "no data of 'wikitext2'"),
    ],
)
def test_a_text_that_is_not_there_is_said_before_a_model_is_fetched(tmp_path, monkeypatch, study, parameters, text):
    monkeypatch.setattr("flexq_core.studies.scored_model.load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(data.DataError, match=text):
        study(run_of("02_accuracy", tmp_path), **{"model": "demo-opt"} | parameters)


def test_what_is_calibrated_stands_in_one_table_with_the_rest(tmp_path):
    study = a_study(
        tmp_path, methods="fp16,smoothquant-w6a6,w6a6", scales="absmax,output", tasks="continuation", task_limit=2
    )
    cases = {(study.label(method), backend) for method, backend in study.cases()}
    study.table()
    table = accuracy_table(load_records(tmp_path))
    assert set(table[["method", "backend"]].itertuples(index=False, name=None)) == cases and len(cases) == 4
    assert table["change_percent"].notna().all()
    assert set(table.loc[table["accuracy"].notna(), "method"]) == {"fp32", "smoothquant-w6a6", "w6a6"}
