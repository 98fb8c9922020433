"""What a machine is called."""

import pytest

from flexq_core.workbook import machine, paths


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000"),
        ("NVIDIA TITAN Xp", "titan-xp"),
    ],
)
def test_a_cards_folder_has_its_short_name(name, label, monkeypatch):
    assert machine.card_label(name) == label
    monkeypatch.setattr(machine, "provenance", lambda device: {"device": name})
    assert machine.outputs_of("outputs/reference/{card}", "cuda") == paths.REFERENCE / label


def test_a_processor_has_no_folder_of_a_card():
    assert machine.outputs_of("outputs/mine", "cpu") == paths.ROOT / "outputs" / "mine"
    told = r"outputs/\{card\} is named after a GPU, and torch finds none here: give --outputs a folder's name, or run it on"
    with pytest.raises(ValueError, match=told):
        machine.outputs_of("outputs/{card}", "cpu")
