"""`auto` on a GPU: wgmma from the number of tokens measured for the nearest layer of this card."""

import json

import pytest

from flexq_core.runtime import auto

ROWS = [
    {"card": "A", "outputs": 4096, "features": 4096, "wgmma_from": None},
    {"card": "A", "outputs": 28672, "features": 8192, "wgmma_from": 33},
]


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.setattr(auto, "PATH", tmp_path / "auto.json")
    auto.PATH.write_text(json.dumps(ROWS))
    auto.table.cache_clear()
    yield
    auto.table.cache_clear()


@pytest.mark.parametrize(
    ("layer", "tokens"),
    [
        (("A", 4096, 4096), auto.UNDECIDED_FROM),
        (("A", 5120, 3000), auto.UNDECIDED_FROM),
        (("A", 20000, 9000), 33),
        (("B", 4096, 4096), auto.UNMEASURED_FROM),
    ],
)
def test_the_nearest_layer_of_the_card_decides(rows, layer, tokens):
    assert auto.wgmma_from(*layer) == tokens


def test_the_repositorys_table_can_be_read():
    for row in json.loads(auto.PATH.read_text(encoding="utf-8")):
        assert set(row) == set(ROWS[0])
        assert row["wgmma_from"] is None or row["wgmma_from"] >= 1
