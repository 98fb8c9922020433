"""Local folders: files are found by name in every format, and what is missing or broken is said."""

import json
import warnings
from pathlib import Path
from unittest import mock

import pandas as pd
import pytest

from flexq_core.sources import data, local, tasks
from flexq_core.sources.held import held_by

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
TEXTS = ["One line of prose.", "", "Another line of it."]


def write(folder: Path, name: str) -> None:
    table = pd.DataFrame({"text": TEXTS})
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".parquet"):
        table.to_parquet(path)
    elif name.endswith(".arrow"):
        import datasets

        datasets.Dataset.from_pandas(table).save_to_disk(folder / "made")
        (made,) = (folder / "made").glob("*.arrow")
        made.rename(path)
    elif name.endswith((".json", ".jsonl", ".json.gz")):
        table.to_json(path, orient="records", lines=True)
    else:
        path.write_text("\n\n".join(TEXTS))


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    "name",
    [
        "wikitext2_test.txt",
        "wikitext2_test.parquet",
        "wikitext2_test.arrow",
        "wikitext2-test.json",
        "WikiText-2/test.jsonl",
        "wikitext-2-raw-v1/test-00000-of-00001.json.gz",
    ],
)
def test_every_format_gives_the_same_text(tmp_path, name):
    write(tmp_path / "data", name)
    text = data.evaluation_text("wikitext2", str(tmp_path / "data"))
    assert text.text == "\n\n".join(TEXTS)
    assert text.origin == f"{Path(name).name} (test)"


def test_the_tokenised_release_of_wikitext2_is_told(tmp_path):
    for name, told in (("wikitext2", True), ("c4", False)):
        (tmp_path / f"{name}_test.txt").write_text("a <unk> word")
        assert ("not those of the paper's raw text" in data.evaluation_text(name, str(tmp_path)).origin) is told


def test_a_split_that_is_there_is_calibrated_on_else_docstrings(tmp_path):
    write(tmp_path, "c4_validation.txt")
    assert data.evaluation_text("c4", str(tmp_path)).origin == "c4_validation.txt (validation)"
    assert data.calibration_text("c4", str(tmp_path)).name == "docstrings"
    write(tmp_path, "c4_train.txt")
    assert data.calibration_text("c4", str(tmp_path)).origin == "c4_train.txt (train)"


def test_of_several_configurations_the_papers_is_read_or_none(tmp_path):
    for folder in ("wikitext-2-raw-v1", "wikitext-2-v1"):
        write(tmp_path, f"wikitext/{folder}/test-00000-of-00001.parquet")
    text = data.evaluation_text("wikitext2", str(tmp_path))
    assert text.text == "\n\n".join(TEXTS)
    for folder in ("winogrande_xs", "winogrande_xl", "winogrande_debiased"):
        write(tmp_path, f"winogrande/{folder}/validation-00000-of-00001.parquet")
    (file,), _ = tasks._local_files("winogrande", str(tmp_path))
    assert file.parent.name == "winogrande_xl"
    for shard in ("00000-of-00002", "00001-of-00002"):
        write(tmp_path, f"c4/en/c4-validation.{shard}.json.gz")
    assert data.evaluation_text("c4", str(tmp_path)).text.count(TEXTS[0]) == 2
    for folder in ("one", "other"):
        write(tmp_path, f"{folder}/ptb_test.json")
    with pytest.raises(data.DataError, match=r"files that fit in several folders: one, other; accepted: one of them$"):
        data.evaluation_text("ptb", str(tmp_path))
    assert "ptb" in held_by(str(tmp_path))


def test_a_train_split_that_cannot_be_read_is_not_taken_for_an_absent_one(tmp_path):
    write(tmp_path, "c4_validation.txt")
    (tmp_path / "c4_train.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(data.DataError, match=r"cannot read c4_train.parquet \(train\).*fetch it again"):
        data.calibration_text("c4", str(tmp_path))
    for folder in ("one", "other"):
        write(tmp_path, f"{folder}/c4_train.parquet")
    with pytest.raises(data.DataError, match=r"fit in several folders: \., one, other; accepted: one of them$"):
        data.calibration_text("c4", str(tmp_path))


def test_the_hubs_ptb_is_read_from_the_files_that_the_hub_made_of_its_program(monkeypatch):
    asked = mock.Mock(return_value=mock.MagicMock(column_names=["sentence"]))
    monkeypatch.setattr("datasets.load_dataset", asked)
    monkeypatch.setattr(data, "_joined", lambda *_: "text")
    data.evaluation_text("ptb")
    asked.assert_called_once_with(
        split="test",
        path="ptb-text-only/ptb_text_only",
        name=None,
        data_files={"test": "penn_treebank/test/0000.parquet"},
        revision="refs/convert/parquet",
    )


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(data.DataError, match=r"data_dir is 'nowhere'; accepted: a folder that exists"):
        data.evaluation_text("ptb", "nowhere")
    write(tmp_path, "c4_validation.txt")
    with pytest.raises(
        data.DataError, match=r"no data of 'ptb'; accepted: a file named like ptb_test.*found: c4_valid"
    ):
        data.evaluation_text("ptb", str(tmp_path))
    with pytest.raises(data.DataError, match=r"no data of 'ptb'"):
        data.calibration_text("ptb", str(tmp_path))


def test_what_is_broken_is_said(tmp_path):
    (tmp_path / "ptb_test.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(data.DataError, match=r"cannot read ptb_test.parquet \(test\).*fetch it again"):
        data.evaluation_text("ptb", str(tmp_path))
    (tmp_path / "c4_validation.json").write_text(json.dumps({"body": "x"}))
    with pytest.raises(data.DataError, match=r"has no column 'text'; its columns: body"):
        data.evaluation_text("c4", str(tmp_path))


def test_a_task_that_the_folder_lacks_is_refused(tmp_path):
    (tmp_path / "piqa_validation.json").write_text("{}")
    tasks.require_local_tasks(["piqa", "continuation"], str(tmp_path))
    tasks.require_local_tasks(["hellaswag"], "")
    with pytest.raises(
        tasks.TaskError, match=r"no data of 'hellaswag'; accepted: a file named like hellaswag_validation"
    ):
        tasks.require_local_tasks(["piqa", "hellaswag"], str(tmp_path))


def test_a_hub_task_is_the_harness_own(tmp_path):
    from lm_eval.tasks import TaskManager

    for name in tasks.PAPER_TASKS:
        tasks._write_stock(tmp_path, name, "")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    assert set(tasks.PAPER_TASKS) <= set(manager.all_tasks)


def hellaswag_rows():
    for i in range(6):
        yield {
            "ind": i,
            "activity_label": "Walking",
            "ctx_a": "A person walks.",
            "ctx_b": "they",
            "endings": ["go on.", "turn back.", "sit down.", "look up."],
            "label": str(i % 4),
        }


def test_a_task_with_code_of_its_own_runs_from_a_local_file(tmp_path):
    from flexq_core.sources.models import load_model

    rows = "".join(json.dumps(row) + "\n" for row in hellaswag_rows())
    (tmp_path / "hellaswag_validation.jsonl").write_text(rows)
    loaded = load_model("demo-llama")
    found = tasks.evaluate_tasks(loaded.model, loaded.tokenizer, ["hellaswag"], data_dir=str(tmp_path))
    accuracy, questions = found["hellaswag"]
    assert questions == 6 and 0 <= accuracy <= 1


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real evaluation data are not here")
def test_the_real_tasks_run_offline():
    from flexq_core.sources.models import load_model

    loaded = load_model("demo-llama")
    names = [name for name in tasks.PAPER_TASKS if name != "hellaswag"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = tasks.evaluate_tasks(loaded.model, loaded.tokenizer, names, limit=4, data_dir=str(SHARED / "zero_shot"))
    assert {name: questions for name, (_, questions) in found.items()} == dict.fromkeys(names, 4)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real evaluation data are not here")
def test_the_real_text_is_found():
    text = data.evaluation_text("wikitext2", str(SHARED))
    assert text.origin.startswith("wikitext2_tokenized_test.txt (test); tokenised") and len(text.text) > 1_000_000


def test_no_two_formats_share_an_ending():
    endings = list(local.FORMATS)
    assert not [(a, b) for a in endings for b in endings if a != b and b.endswith(a)]
