"""Precision plans: rules, JSON that reads and validates, and a clear refusal of what does not fit."""

import copy
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexq_core.quant import LayerPrecision, PlanError, PrecisionPlan

LLAMA = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"]
OPT = ["model.decoder.layers.0.fc1", "model.decoder.layers.0.fc2"]

plans = st.builds(
    PrecisionPlan,
    name=st.text(min_size=1, max_size=20),
    layers=st.dictionaries(
        st.text(min_size=1, max_size=40),
        st.builds(LayerPrecision, st.integers(2, 8), st.integers(2, 8)),
        min_size=1,
        max_size=8,
    ),
    group_size=st.integers(1, 4096),
)


@given(plans)
def test_json_round_trip(plan):
    assert PrecisionPlan.from_json(plan.to_json()) == plan


def test_rules_follow_the_paper():
    flexq = PrecisionPlan.from_rule("flexq", LLAMA + OPT)
    eights = [layer for layer, bits in flexq.layers.items() if bits.activation_bits == 8]
    assert eights == [LLAMA[2], OPT[1]]
    assert {str(bits) for bits in PrecisionPlan.from_rule("w6a6", LLAMA).layers.values()} == {"W6A6"}
    assert {str(bits) for bits in PrecisionPlan.from_rule("w6a8", LLAMA).layers.values()} == {"W6A8"}


def test_a_plan_can_be_copied_and_sent_but_not_changed():
    plan = PrecisionPlan.from_rule("flexq", LLAMA)
    assert pickle.loads(pickle.dumps(plan)) == plan == copy.deepcopy(plan)
    with pytest.raises(TypeError):
        plan.layers["x"] = LayerPrecision()


def test_fit_is_exact():
    plan = PrecisionPlan.from_rule("w6a6", LLAMA)
    plan.require_fit(LLAMA)
    with pytest.raises(PlanError, match="names 1 layers that the model lacks, first 'model.layers.0.mlp.down_proj'"):
        plan.require_fit(LLAMA[:2])
    with pytest.raises(PlanError, match="leaves out 2 of its 5 layers, first 'model.decoder.layers.0.fc1'"):
        plan.require_fit(LLAMA + OPT)


def edited(**changes) -> str:
    data = json.loads(PrecisionPlan.from_rule("w6a6", LLAMA[:1]).to_json())
    data.update(changes)
    return json.dumps({key: value for key, value in data.items() if value is not None})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "the plan must be a JSON object, not list"),
        (edited(layers=None), "the plan lacks 'layers'"),
        (edited(extra=1), "unknown keys 'extra'"),
        (edited(format="gptq"), "format is 'gptq'; accepted: 'flexq-plan'"),
        (edited(version=2), "version is 2; this release reads version 1"),
        (edited(group_size=0), "group_size is 0"),
        (edited(group_size="128"), "group_size is '128'"),
        (edited(name=""), "name is ''"),
        (edited(layers={}), "names no layer"),
        (edited(layers=[1]), "layers must be an object"),
        (edited(layers={"a": 6}), "layer 'a' must be a JSON object, not int"),
        (edited(layers={"a": {"weight_bits": 6}}), "layer 'a' lacks 'activation_bits'"),
        (
            edited(layers={"a": {"weight_bits": 9, "activation_bits": 6}}),
            "layer 'a': weight_bits is 9; accepted: 2, 3, 4, 5, 6, 7, 8",
        ),
        (
            edited(layers={"a": {"weight_bits": 6, "activation_bits": True}}),
            "layer 'a': activation_bits is True",
        ),
        (edited(layers={"a": {"weight_bits": [6], "activation_bits": 6}}), r"weight_bits is \[6\]"),
        ('{"format": 1, "format": 2}', "names 'format' twice"),
    ],
)
def test_a_bad_plan_says_what_is_wrong(text, message):
    with pytest.raises(PlanError, match=message):
        PrecisionPlan.from_json(text)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({1: LayerPrecision()}, "the plan names a layer 1; accepted: a non-empty string"),
        ({"": LayerPrecision()}, "the plan names a layer ''"),
        ({"a": (6, 6)}, r"layer 'a' has bits \(6, 6\); accepted: a LayerPrecision"),
    ],
)
def test_a_plan_that_json_could_not_hold_is_refused(layers, message):
    with pytest.raises(PlanError, match=message):
        PrecisionPlan("mine", layers)


def test_an_unknown_rule_names_the_nearest():
    with pytest.raises(PlanError, match=r"'flexk' \(did you mean 'flexq'\?\); accepted: w6a6, w6a8, flexq"):
        PrecisionPlan.from_rule("flexk", LLAMA)
