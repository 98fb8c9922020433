"""`auto` on a GPU: the backend of the nearest layer timed on this card, and `imma` where none was."""

import json

import pytest
import torch

from flexq_core.runtime import auto, cuda, ops
from flexq_core.runtime.linear import FlexQLinear

ROWS = [
    {"card": "A", "outputs": 4096, "features": 4096, "tokens": 1, "activation_bits": 6, "backend": "bmma"},
    {"card": "A", "outputs": 28672, "features": 8192, "tokens": 1, "activation_bits": 6, "backend": "imma"},
    {"card": "A", "outputs": 4096, "features": 4096, "tokens": 1, "activation_bits": 8, "backend": "imma"},
]


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.setattr(auto, "PATH", tmp_path / "auto.json")
    auto.PATH.write_text(json.dumps(ROWS))
    auto.table.cache_clear()
    yield
    auto.table.cache_clear()


@pytest.mark.parametrize(
    ("layer", "backend"),
    [
        (("A", 4096, 4096, 6), "bmma"),
        (("A", 5120, 3000, 6), "bmma"),
        (("A", 20000, 9000, 6), "imma"),
        (("A", 4096, 4096, 8), "imma"),
        (("B", 4096, 4096, 6), None),
        (("A", 0, 4096, 6), None),
    ],
)
def test_the_nearest_layer_of_the_card_decides(rows, layer, backend):
    assert auto.choose(*layer) == backend


def test_the_repositorys_table_names_backends_that_there_are():
    for row in json.loads(auto.PATH.read_text(encoding="utf-8")):
        assert set(row) == set(ROWS[0]) and row["backend"] in cuda.ORDERS and row["activation_bits"] in (6, 8)


def test_a_layer_asks_for_its_own_shape(rows, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A")
    monkeypatch.setattr(ops.cuda, "obstacle", lambda *_: None)
    monkeypatch.setattr(ops.build, "cuda_kernels", lambda device: None)
    assert ops.resolve_backend("auto", "cuda", layer=(4096, 4096, 6)) == "bmma"
    assert ops.resolve_backend("auto", "cuda") == "imma"
    assert ops.resolve_backend("imma", "cuda", layer=(4096, 4096, 6)) == "imma"
    asked = []
    monkeypatch.setattr(ops, "resolve_backend", lambda *arguments: asked.append(arguments[-1]) or "reference")
    FlexQLinear(256, 96).prepare()
    assert asked == [(96, 256, 6)]
