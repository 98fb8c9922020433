"""Sensitivity: one pass predicts what a pass a layer measures, plans keep to their budget, wrong parameters are refused."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexq_core.quant import PrecisionPlan, dequantize, quantize_weight
from flexq_core.quant.layers import linear_layers
from flexq_core.quant.quantize import fake_quantize
from flexq_core.sources.models import ModelError, load_model
from flexq_core.studies import sensitivity
from tests.models import logits, tiny_model
from tests.runs import run_of

ROWS = torch.randint(3, 96, (3, 24), generator=torch.Generator().manual_seed(7))
SMALL = {"calibration_windows": 2, "windows": 2, "window_length": 64}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    run = run_of("01_sensitivity", folder, model="demo-llama", outliers=32.0)
    return sensitivity.SensitivityStudy(run, model="demo-llama", outliers=32.0, backend="reference", **SMALL)


@pytest.fixture(scope="module")
def layers(study):
    return study.layers()


@pytest.mark.parametrize("architecture", ["llama-3", "opt"])
def test_the_yardstick_rounds_weights_alone_and_leaves_the_model_as_it_was(architecture):
    model = tiny_model(architecture)
    before, expected = {n: p.clone() for n, p in model.named_parameters()}, logits(model)
    rounded = sensitivity.with_six_bit_weights(model)
    for name, layer in linear_layers(rounded).items():
        weight = linear_layers(model)[name].weight.detach()
        assert torch.equal(layer.weight, dequantize(quantize_weight(weight, bits=6)))
    assert 0 < ((logits(rounded) - expected).norm() / expected.norm()) < 0.1
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("architecture", ["llama-3", "opt"])
def test_errors_are_those_of_each_layers_own_output(architecture):
    model = sensitivity.with_six_bit_weights(tiny_model(architecture))
    errors = sensitivity.layer_errors(model, ROWS)
    assert list(errors.index) == list(linear_layers(model))
    name, layer = list(linear_layers(model).items())[-1]
    inputs = []
    handle = layer.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    with torch.no_grad():
        model(input_ids=ROWS, use_cache=False)
    handle.remove()
    x, weight = inputs[0].double().flatten(0, -2), layer.weight.double()
    for bits in (6, 8):
        error = (fake_quantize(inputs[0], bits=bits).double().flatten(0, -2) - x) @ weight.T
        relative = (error.norm() / (x @ weight.T).norm()).item()
        assert np.isclose(errors.loc[name, f"relative_error_a{bits}"], relative, rtol=1e-4)
        assert np.isclose(errors.loc[name, f"sqnr_a{bits}_db"], -20 * np.log10(relative), rtol=1e-4)
    assert (errors["relative_error_a8"] < errors["relative_error_a6"]).all()
    assert (errors["predicted_kl_a8_nats"] < errors["predicted_kl_a6_nats"]).all()


def test_rounding_is_measured_by_layer_and_undone():
    model = sensitivity.with_six_bit_weights(load_model("demo-opt").model)  # random models hardly predict anything
    predictions = sensitivity.Predictions(model, ROWS, batch_size=2)
    names = list(linear_layers(model))
    assert predictions.rounded({}) == pytest.approx((0.0, 0.0), abs=1e-9)
    six, eight = (predictions.rounded(dict.fromkeys(names, bits))[0] for bits in (6, 8))
    assert 0 < eight < six
    assert predictions.rounded({}) == pytest.approx((0.0, 0.0), abs=1e-9)
    with torch.no_grad():
        exact = model(input_ids=ROWS, use_cache=False).logits[:, :-1].double().log_softmax(-1)
        handle = model.get_submodule(names[0]).register_forward_pre_hook(
            lambda module, arguments: (fake_quantize(arguments[0], bits=6),)
        )
        now = model(input_ids=ROWS, use_cache=False).logits[:, :-1].double().log_softmax(-1)
        handle.remove()
    expected = (exact.exp() * (exact - now)).sum(-1).mean().item()
    assert predictions.rounded({names[0]: 6})[0] == pytest.approx(expected, rel=1e-2)


def test_one_pass_orders_the_layers_as_measuring_each_does(study, layers):
    correlations = study.correlations(layers)
    assert correlations["predicted_kl_a6_nats"] > 0.9
    assert set(layers["kind"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert sorted(set(layers["block"])) == list(range(6))


def test_with_outliers_the_plan_beats_the_rule_and_02_can_read_it(study, layers, tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXQ_OUTPUTS", str(tmp_path))
    plan = study.plan(layers)
    assert sensitivity.share_at_eight_bits(plan, study.macs) <= study.budget + 1e-9
    assert study.budget == pytest.approx(0.25)  # down_proj of three equal MLP layers, a quarter of all
    path = study.save(plan)
    assert path.name == "demo-llama-outliers-32.json"
    assert PrecisionPlan.from_json(path.read_text()) == plan
    curve = study.curve(layers, plan)
    at = curve.set_index("name")["perplexity"]
    assert at["plan"] < at["rule"]
    ends = curve[curve["name"] == "greedy"]["share"]
    assert ends.iloc[0] == 0 and ends.iloc[-1] == 1 and ends.is_monotonic_increasing


def test_what_is_on_record_is_not_measured_again(study, layers, monkeypatch):
    monkeypatch.setattr(sensitivity, "layer_errors", lambda *_, **__: pytest.fail("measured again"))
    monkeypatch.setattr(sensitivity.Predictions, "rounded", lambda *_: pytest.fail("measured again"))
    pd.testing.assert_frame_equal(study.layers(), layers)


def test_every_figure_is_drawn(study, layers):
    plan = study.plan(layers)
    kinds = study.kinds()
    assert kinds["share_of_macs"].sum() == pytest.approx(1)
    drawn = [
        sensitivity.plot_heat(layers, "kl_nats", "x"),
        sensitivity.plot_prediction(layers, study.correlations(layers)),
        sensitivity.plot_kinds(kinds),
        sensitivity.plot_curve(study.curve(layers, plan), "pydoc"),
    ]
    assert all(figure.axes for figure in drawn)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 1000)), min_size=1, max_size=20),
    st.floats(0, 1),
)
def test_a_greedy_choice_keeps_to_its_budget_and_spends_it_on_the_best(cases, budget):
    gain = pd.Series([g for g, _ in cases], index=[str(i) for i in range(len(cases))])
    macs = pd.Series([m for _, m in cases], index=gain.index)
    chosen = sensitivity.greedy_layers(gain, macs, budget)
    spent = macs[chosen].sum()
    assert spent <= budget * macs.sum() * (1 + 1e-6)
    left_out = [layer for layer in gain.index if layer not in chosen]
    assert all(macs[layer] > budget * macs.sum() - spent for layer in left_out)  # none of them would still fit
    assert chosen == [layer for layer in sensitivity.greedy_order(gain, macs) if layer in chosen]


def a_curve(greedy, rule, plan):
    rows = [("greedy", i / (len(greedy) - 1), value) for i, value in enumerate(greedy)]
    table = pd.DataFrame([*rows, ("rule", 0.25, rule), ("plan", 0.25, plan)], columns=["name", "share", "perplexity"])
    for block, shift in enumerate((-0.1, 0.0, 0.1)):  # texts differ in how hard they are, by the same for every plan
        table[f"loss_nats/{block:02}"] = np.log(table["perplexity"]) + shift
    return table


@pytest.mark.parametrize(
    ("greedy", "plan", "correlation", "failing"),
    [
        ((30, 28, 26), 27.0, 0.95, set()),
        ((30, 28, 28.1), 27.0, 0.95, {1}),
        ((30, 28, 26), 29.5, 0.95, {2, 3}),
        ((30, 28, 26), 28.9, 0.95, {3}),
        ((30, 28, 26), 27.0, 0.5, {0}),
    ],
)
def test_each_claim_can_fail(greedy, plan, correlation, failing):
    correlations = {"predicted_kl_a6_nats": correlation, "relative_error_a6": 0.2}
    found = sensitivity.claims(a_curve(greedy, 29.0, plan), correlations, outliers=32.0)
    assert {i for i, (_, holds, _) in enumerate(found) if not holds} == failing
    assert len(sensitivity.claims(a_curve(greedy, 29.0, plan), correlations, outliers=0.0)) == 3


@pytest.mark.parametrize(
    ("parameters", "kind", "text"),
    [
        ({"model": "demo-lama"}, ModelError, "Did you mean 'demo-llama'"),
        ({"budget": 1.5}, ValueError, "budget is 1.5; accepted: 0"),
        ({"budget": float("nan")}, ValueError, "budget is nan; accepted: 0"),
        ({"score": "measurd"}, ValueError, "did you mean 'measured'"),
        ({"score": "measured,predicted"}, ValueError, "accepted: one of measured, predicted"),
        ({"backend": "cup"}, ValueError, "accepted: auto, reference, cpu, imma, wgmma, bmma, simulate"),
        ({"calibration_windows": 0}, ValueError, "calibration_windows is 0; accepted: 1 or more"),
        ({"windows": -1}, ValueError, "windows is -1; accepted: 0 or more"),
        ({"window_length": -1}, ValueError, "window_length is -1; accepted: 0 or more"),
        ({"window_length": 1}, ValueError, "window length is 1; accepted: at least 2"),
        ({"outliers": 0.5}, ValueError, "outliers is 0.5; accepted: 0 for none"),
        ({"batch_size": 0}, ValueError, "batch_size is 0; accepted: 1 or more"),
        ({"seed": -1}, ValueError, "seed is -1; accepted: 0 or more"),
        ({"dataset": "pydok"}, RuntimeError, "Did you mean 'pydoc'"),
        ({"dataset": "wikitext2", "data_dir": "no-such-folder"}, RuntimeError, "data_dir is 'no-such-folder'"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_wrong_parameter_is_refused_before_anything_is_measured(tmp_path, parameters, kind, text):
    with pytest.raises(kind, match=text):
        sensitivity.SensitivityStudy(run_of("01_sensitivity", tmp_path), **{"model": "demo-llama", **parameters})
    assert not (tmp_path / "records").exists()
