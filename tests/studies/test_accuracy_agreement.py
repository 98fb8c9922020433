"""The kernels that a model was scored on are told, and a wrong product shows in how far its logits are from fake quantisation."""

import pytest
import torch

from flexq_core.quant.layers import linear_layers
from flexq_core.quant.plan import LayerPrecision, PrecisionPlan
from flexq_core.runtime import cuda, ops
from flexq_core.runtime.convert import quantize_model
from flexq_core.runtime.linear import FlexQLinear
from flexq_core.studies import accuracy_agreement
from flexq_core.studies.accuracy import AccuracyStudy, claims
from flexq_core.workbook.records import read_jsonl
from tests.models import tiny_model
from tests.runs import run_of

ROWS = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))


def test_the_table_and_the_records_tell_kernels_and_agreement_with_fake_quantisation(tmp_path):
    settings = {"methods": "fp16,w6a6", "backends": "simulate,auto", "windows": 2, "window_length": 64, "tasks": ""}
    study = AccuracyStudy(run_of("02_accuracy", tmp_path), model="demo-opt", **settings)
    backend, layers = study.backends[-1], len(linear_layers(study.model))
    table = study.table().set_index("backend")
    assert table[f"layers_on/{backend}"].dropna().to_dict() == {backend: layers}
    assert set(table["difference_from_simulate"].dropna().index) == {backend}
    assert 0 < table["difference_from_simulate"][backend] < 0.03
    records = {
        record.metric: record for record in read_jsonl(study.run.records.path) if record.parameters.get("device")
    }
    assert records[f"layers_on/{backend}"].reason == "k_proj, v_proj, q_proj, out_proj, fc1, fc2"
    assert records["difference_from_simulate"].reason == "logits of 2 x 64 tokens"
    (detail,) = [detail for text, _, detail in claims(table.reset_index(), outliers=0.0) if "agree" in text]
    assert f"; {backend}: {layers} layers on {backend}, logits " in detail


def test_a_wrong_product_is_far_from_fake_quantisation_and_layers_keep_their_backend(monkeypatch):
    model = quantize_model(tiny_model("llama"), "flexq", backend="reference")
    right = accuracy_agreement.agreement(model, ROWS)["difference_from_simulate"].value
    run = ops._BACKENDS["reference"]
    monkeypatch.setitem(ops._BACKENDS, "reference", lambda *operands: 1.1 * run(*operands))
    assert right < 0.03 < accuracy_agreement.agreement(model, ROWS)["difference_from_simulate"].value
    assert {layer.backend for layer in model.modules() if isinstance(layer, FlexQLinear)} == {"reference"}


def test_what_auto_means_is_told_for_each_layer(monkeypatch):
    plain = tiny_model("llama")
    precision = {name: LayerPrecision(4 if "o_proj" in name else 6, 6) for name in linear_layers(plain)}
    model = quantize_model(plain, PrecisionPlan("mixed", precision), backend="reference")

    def prepare(layer):  # as on a GPU
        chunks = torch.empty(0, layer.weight_scale.shape[1], 0)
        return "auto" if layer.precision.weight_bits == 6 else "bmma", chunks

    monkeypatch.setattr(FlexQLinear, "prepare", prepare)
    monkeypatch.setattr(cuda, "backend_for", lambda m, k, n, _: "wgmma" if m >= 48 and n > k else "imma")
    found = {kernel: {name[15:] for name in names} for kernel, names in accuracy_agreement.kernels(model, 48).items()}
    assert found == {
        "imma": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"},
        "bmma": {"self_attn.o_proj"},
        "wgmma": {"mlp.gate_proj", "mlp.up_proj"},
    }
    assert set(accuracy_agreement.kernels(model, 47)) == {"imma", "bmma"}


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "bmma"])
def test_on_a_gpu_kernels_agree_with_fake_quantisation(backend):
    model = quantize_model(tiny_model("llama").cuda(), "flexq", backend=backend)
    found = accuracy_agreement.agreement(model, ROWS)
    assert found["difference_from_simulate"].value < 0.03
    on = {metric.removeprefix("layers_on/"): found[metric].value for metric in found if "layers_on/" in metric}
    assert sum(on.values()) == 14 and set(on) <= ({"imma", "wgmma"} if backend == "auto" else {"bmma"})


@pytest.mark.gpu
def test_on_a_gpu_what_is_scored_is_the_fused_model_whole_or_block_by_block(tmp_path):
    settings = {"methods": "fp16,w6a8", "backends": "auto", "windows": 4, "window_length": 64, "tasks": ""}

    def table(folder, layer_by_layer):
        run = run_of("02_accuracy", tmp_path / folder, device="cuda")
        study = AccuracyStudy(run, model="demo-llama", layer_by_layer=layer_by_layer, **settings)
        return study.table().set_index("method")

    whole, apart = table("whole", False), table("apart", True)
    assert whole.filter(like="layers_on/").loc["w6a8"].sum() == 4 * 6  # qkv, o, gate and up, down of each block
    assert whole["perplexity"].equals(apart["perplexity"])
    assert whole["bits_per_weight"].equals(apart["bits_per_weight"])
    assert 0 < abs(whole["change_percent"]["w6a8"]) < 2
