"""`auto` on a GPU: wgmma from the number of tokens measured for the nearest layer of this card, or of the one most like it."""

import json

import pytest

from flexq_core.runtime import auto
from flexq_core.studies.kernels import recorded, write_auto_table
from flexq_core.workbook import paths
from flexq_core.workbook.records import load_records

ROWS = [
    {"card": "A", "outputs": 4096, "features": 4096, "wgmma_from": None},
    {"card": "A", "outputs": 28672, "features": 8192, "wgmma_from": 33},
    {"card": "A 80GB", "outputs": 4096, "features": 4096, "wgmma_from": 7},
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
        (("A 80GB", 28672, 8192), 7),
        (("80GB B", 28672, 8192), 7),
        (("A B", 28672, 8192), 33),
        (("C", 28672, 8192), 33),
    ],
)
def test_the_nearest_layer_of_the_card_decides(rows, layer, tokens):
    assert auto.wgmma_from(*layer) == tokens
    card, *shape = layer
    assert [auto.choice(card, count, *shape) for count in (tokens - 1, tokens)] == ["imma", "wgmma"]


def test_without_a_table_wgmma_is_taken_beyond_64_tokens(rows):
    auto.PATH.write_text("[]")
    assert auto.wgmma_from("A", 4096, 4096) == auto.UNMEASURED_FROM == 65


def test_the_repositorys_table_can_be_read():
    for row in json.loads(auto.PATH.read_text(encoding="utf-8")):
        assert set(row) == set(ROWS[0])
        assert row["wgmma_from"] is None or row["wgmma_from"] >= 1


def test_the_repositorys_table_is_what_its_records_give(tmp_path):
    """The last `--write-auto-table` of each card came after its last records."""
    made = tmp_path / "auto.json"
    made.write_text("[]")
    for folder in sorted(paths.REFERENCE.iterdir()):
        if tables := recorded(load_records(folder)):
            write_auto_table(tables, made)
    assert read(made) == read(auto.PATH)


def read(path):
    rows = json.loads(path.read_text(encoding="utf-8"))
    return {(row["card"], row["outputs"], row["features"]): row["wgmma_from"] for row in rows}
