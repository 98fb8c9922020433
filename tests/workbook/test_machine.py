"""What a machine is called."""

import pytest

from flexq_core.workbook import machine


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
def test_a_card_has_a_short_name(name, label):
    assert machine.card_label(name) == label
