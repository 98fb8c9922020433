"""Which change of the source computes which study anew."""

import json
import re
import shutil

import pytest

from flexq_core.runtime import auto
from flexq_core.workbook import paths
from flexq_core.workbook.source_digest import source_digest

CPU, GPU = "", "NVIDIA H100"
STUDIES = ("00_quickstart", "01_sensitivity", "02_accuracy", "03_kernels", "04_e2e")
OF_MODELS = {"00_quickstart", "01_sensitivity", "02_accuracy", "04_e2e"}


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A copy of the code, to be changed."""
    for name in ("flexq_core", "kernels"):
        code = shutil.ignore_patterns("__pycache__", "*.safetensors", "*.json")
        shutil.copytree(paths.ROOT / name, tmp_path / name, ignore=code)
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(paths, "KERNELS", tmp_path / "kernels")
    return tmp_path


def digests():
    return {(study, card): source_digest(study, card) for study in STUDIES for card in (CPU, GPU)}


@pytest.mark.parametrize(
    ("changed", "studies", "cards"),
    [
        ("flexq_core/quant/spec.py", set(STUDIES), (CPU, GPU)),
        ("flexq_core/runtime/ops.py", set(STUDIES), (CPU, GPU)),
        ("flexq_core/runtime/cpu.py", set(STUDIES), (CPU,)),
        ("flexq_core/runtime/cuda.py", set(STUDIES), (GPU,)),
        ("kernels/cpu/avx512.h", set(STUDIES), (CPU,)),
        ("kernels/cuda/ring.cuh", set(STUDIES), (GPU,)),
        ("flexq_core/runtime/convert.py", OF_MODELS, (CPU, GPU)),
        ("flexq_core/files/tensors.py", OF_MODELS, (CPU, GPU)),
        ("flexq_core/sources/models.py", OF_MODELS, (CPU, GPU)),
        ("flexq_core/sources/data.py", {"01_sensitivity", "02_accuracy"}, (CPU, GPU)),
        ("flexq_core/sources/tasks.py", {"01_sensitivity", "02_accuracy"}, (CPU, GPU)),
        ("flexq_core/studies/quickstart.py", {"00_quickstart"}, (CPU, GPU)),
        ("flexq_core/studies/sensitivity.py", {"01_sensitivity"}, (CPU, GPU)),
        ("flexq_core/studies/accuracy.py", {"01_sensitivity", "02_accuracy"}, (CPU, GPU)),
        ("flexq_core/studies/accuracy_scales.py", {"01_sensitivity", "02_accuracy"}, (CPU, GPU)),
        ("flexq_core/studies/baselines.py", {"01_sensitivity", "02_accuracy", "04_e2e"}, (CPU, GPU)),
        ("flexq_core/studies/timing.py", {"03_kernels", "04_e2e"}, (CPU, GPU)),
        ("flexq_core/studies/kernels.py", {"03_kernels"}, (CPU, GPU)),
        ("flexq_core/studies/kernels_gpu.py", {"03_kernels"}, (GPU,)),
        ("flexq_core/studies/e2e/decode.py", {"04_e2e"}, (CPU, GPU)),
        ("flexq_core/studies/e2e/parallel.py", {"04_e2e"}, (CPU, GPU)),
        ("flexq_core/studies/e2e/__main__.py", set(), ()),
        ("flexq_core/studies/e2e_claims.py", set(), ()),
        ("flexq_core/studies/kernels_compared.py", set(), ()),
        ("flexq_core/workbook/report.py", set(), ()),
    ],
)
def test_a_change_of_what_computes_computes_anew(source, changed, studies, cards):
    """On a processor and on a GPU, each of which has kernels of its own."""
    before = digests()
    with (source / changed).open("a") as file:
        file.write("int more;\n" if "kernels/" in changed else "more = 1\n")
    after = digests()
    assert {case for case in before if before[case] != after[case]} == {(s, card) for s in studies for card in cards}


def test_what_is_written_for_readers_changes_nothing(source):
    before = digests()
    for file in [*(source / "flexq_core").rglob("*.py"), *(source / "kernels").rglob("*.*")]:
        start, more = ("#", '\n"""Read me."""\n') if file.suffix == ".py" else ("//", "/* Read\nme. */\n")
        text = file.read_text()
        assert text.endswith("\n")
        file.write_text(f"{text[:-1]}  {start} and so on\n\n{start} To be read.\n{more}")
    assert digests() == before


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("flexq_core/quant/spec.py", 'path = "a#b"\n', 'path = "a#c"\n'),
        ("flexq_core/quant/spec.py", 'text = """\n# a\n"""\n', 'text = """\n# b\n"""\n'),
        ("kernels/cuda/ring.cuh", 'auto* path = "a//b";\n', 'auto* path = "a//c";\n'),
        ("kernels/cuda/ring.cuh", "char quote = '\"'; int a; // \"\n", "char quote = '\"'; int b; // \"\n"),
    ],
)
def test_strings_are_not_taken_for_comments(source, name, before, after):
    found = []
    for text in (before, after):
        (source / name).write_text(text)
        found.append(source_digest("03_kernels", GPU))
    assert found[0] != found[1]


def test_names_imported_from_the_packages_root_are_its_modules():
    """What the root gives on first use is in other modules: imported from it, it would not count."""
    for file in (paths.ROOT / "flexq_core").rglob("*.py"):
        if file.parts[-2] not in ("doctor", "workbook"):
            assert not re.search(r"^ *from flexq_core import", file.read_text(), re.MULTILINE), file


@pytest.mark.parametrize("study", ["01_sensitivity", "02_accuracy", "03_kernels", "04_e2e"])
def test_what_auto_takes_on_a_card_decides_its_studies_but_the_one_that_finds_it_out(tmp_path, monkeypatch, study):
    """And those of a card without rows, for which the one most like it stands."""
    monkeypatch.setattr(auto, "PATH", tmp_path / "auto.json")

    def digests(wgmma_from):
        rows = [{"card": GPU, "wgmma_from": 65}, {"card": "NVIDIA H200", "wgmma_from": wgmma_from}]
        auto.PATH.write_text(json.dumps(rows))
        auto.table.cache_clear()
        return {card: source_digest(study, card) for card in (CPU, GPU, "NVIDIA H200", "NVIDIA H200 NVL")}

    before, after = digests(65), digests(33)
    auto.table.cache_clear()
    changed = {card for card in before if before[card] != after[card]}
    assert changed == ({"NVIDIA H200", "NVIDIA H200 NVL"} if study != "03_kernels" else set())
