"""Records: computed once for the same inputs, whole or not at all on disk, and never without where they came from."""

import contextlib
import errno
import json
import os
import subprocess
import tempfile
import threading
from datetime import datetime
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flexq_core
from flexq_core.workbook import Measurement, Skipped, load_records, paths
from flexq_core.workbook import records as records_module
from flexq_core.workbook.records import RecordError, Records, read_jsonl, write_atomically

CASE = {"model": "demo", "method": "flexq", "parameters": {"windows": 8}, "seed": 0}
FIELDS = {  # what DESIGN asks of every figure, and what `once` needs
    *("study", "model", "method", "metric", "value", "unit", "parameters", "seed", "git_commit", "dirty", "versions"),
    *("device", "driver", "time", "status", "reason", "key"),
}

json_scalars = st.none() | st.integers() | st.text(max_size=8)
cases = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["a", "b"]),
        "method": st.sampled_from(["a", "b"]),
        "parameters": st.dictionaries(st.sampled_from(["a", "b"]), json_scalars, max_size=2),
        "seed": st.integers(0, 1),
    }
)


def value(number: float, note: str = ""):
    return lambda: {"perplexity": Measurement(number, "1", note)}


def must_not_compute():
    raise AssertionError("computed again")


def test_what_is_on_record_is_not_computed_again(tmp_path):
    first = Records("study", tmp_path).once(**CASE, compute=value(8.5))
    again = Records("study", tmp_path).once(**CASE, compute=must_not_compute)
    assert again == first
    assert again["perplexity"].value == 8.5


def test_records_of_older_source_are_dropped_while_nobody_else_writes(tmp_path, monkeypatch):
    mine = Records("study", tmp_path)
    mine.once(**CASE, compute=value(1.0))
    monkeypatch.setattr(records_module, "source_digest", lambda *_: "newer")
    mine.once(**CASE | {"method": "w6a6"}, compute=value(2.0))
    held = []
    monkeypatch.setattr(records_module.fcntl, "flock", lambda *_: held.append(len(read_jsonl(mine.path))))
    mine.drop_old()
    assert held == [2] and [record.value for record in read_jsonl(mine.path)] == [2.0]


@settings(max_examples=30)
@given(cases, cases)
def test_only_the_same_inputs_are_the_same_record(one, other):
    with tempfile.TemporaryDirectory() as folder:
        records = Records("study", Path(folder))
        records.once(**one, compute=value(1.0))
        found = records.once(**other, compute=value(2.0))["perplexity"].value
        assert found == (1.0 if one == other else 2.0)
        assert len(read_jsonl(records.path)) == (1 if one == other else 2)


def test_the_order_of_parameters_does_not_matter(tmp_path):
    records = Records("study", tmp_path)
    records.once(**CASE | {"parameters": {"a": 1, "b": 2}}, compute=value(1.0))
    records.once(**CASE | {"parameters": {"b": 2, "a": 1}}, compute=must_not_compute)


@pytest.mark.parametrize(("library", "anew"), [("torch", True), ("transformers", True), ("numpy", False)])
def test_another_release_computes_anew_and_leaves_what_the_one_before_computed(tmp_path, monkeypatch, library, anew):
    mine, machine = Records("study", tmp_path), records_module.provenance("cpu")
    mine.once(**CASE, compute=value(1.0))
    newer = machine | {"versions": machine["versions"] | {library: "99"}}
    monkeypatch.setattr(records_module, "provenance", lambda _: newer)
    assert mine.once(**CASE, compute=value(2.0))["perplexity"].value == (2.0 if anew else 1.0)
    mine.drop_old()
    assert len(read_jsonl(mine.path)) == (2 if anew else 1)


@settings(max_examples=50)
@given(
    st.dictionaries(
        st.text(min_size=1),
        st.builds(Measurement, st.floats(allow_nan=False, allow_infinity=False), st.text(), st.text()),
        min_size=1,
        max_size=4,
    )
)
def test_any_text_and_number_is_read_as_it_was_written(measured):
    with tempfile.TemporaryDirectory() as folder:
        records = Records("study", Path(folder))
        written = records.once(**CASE, compute=lambda: measured)
        assert {record.metric: record for record in read_jsonl(records.path)} == written
        assert {m: (r.value, r.unit, r.reason) for m, r in written.items()} == measured


def test_every_record_says_where_it_came_from(tmp_path):
    Records("study", tmp_path).once(**CASE, compute=value(8.5, "a note"))
    (line,) = (tmp_path / "records" / "study.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert set(record) == FIELDS
    assert {name: record[name] for name in CASE} == CASE
    assert (record["study"], record["metric"], record["unit"]) == ("study", "perplexity", "1")
    assert (record["status"], record["reason"], record["driver"]) == ("ok", "a note", None)
    assert record["versions"]["flexq_core"] == flexq_core.__version__
    assert set(record["versions"]) == {"python", "flexq_core", "torch", "transformers", "numpy"}
    assert datetime.fromisoformat(record["time"]).utcoffset() is not None
    assert record["device"]


@pytest.mark.skipif(not (paths.ROOT / ".git").exists(), reason="not a git checkout")
def test_a_record_names_the_commit(tmp_path):
    record = Records("study", tmp_path).once(**CASE, compute=value(8.5))["perplexity"]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=paths.ROOT, capture_output=True, text=True, check=True)
    assert record.git_commit == head.stdout.strip()
    assert isinstance(record.dirty, bool)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_no_number_is_refused_and_not_recorded(tmp_path, number):
    records = Records("study", tmp_path)
    with pytest.raises(RecordError, match="perplexity came out as -?(nan|inf)"):
        records.once(**CASE, compute=value(number))
    assert records.once(**CASE, compute=value(8.5))["perplexity"].value == 8.5
    assert len(read_jsonl(records.path)) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), Path("x"), {1, 2}])
def test_parameters_that_cannot_be_a_key_are_refused_before_computing(tmp_path, bad):
    with pytest.raises(RecordError, match="parameters must be plain finite JSON values"):
        Records("study", tmp_path).once(**CASE | {"parameters": {"x": bad}}, compute=must_not_compute)


def test_a_skipped_computation_says_why_and_is_tried_again(tmp_path):
    def skip():
        raise Skipped("no GPU here")

    records = Records("study", tmp_path)
    record = records.once(**CASE, compute=skip)["skipped"]
    assert (record.status, record.value, record.reason) == ("skipped", None, "no GPU here")
    records.once(**CASE, compute=value(8.5))
    assert [(record.metric, record.status) for record in read_jsonl(records.path)] == [("perplexity", "ok")]


def test_a_computation_that_fails_leaves_no_record(tmp_path):
    records = Records("study", tmp_path)
    with pytest.raises(ZeroDivisionError):
        records.once(**CASE, compute=lambda: 1 / 0)
    assert not read_jsonl(records.path)


def test_replace_tells_anew_and_leaves_the_rest(tmp_path):
    records = Records("study", tmp_path)
    records.once(**CASE, compute=value(8.5))
    claims = CASE | {"method": "claims"}
    records.replace(**claims, measured={"old": Measurement(0.0, "1"), "both": Measurement(0.0, "1")})
    records.replace(**claims, measured={"both": Measurement(1.0, "1")})
    assert {(record.metric, record.value) for record in read_jsonl(records.path)} == {
        ("perplexity", 8.5),
        ("both", 1.0),
    }


def test_current_is_what_this_run_computed_or_found(tmp_path):
    Records("study", tmp_path).once(**CASE, compute=value(1.0))
    Records("study", tmp_path).once(**CASE | {"seed": 1}, compute=value(2.0))
    run = Records("study", tmp_path)
    run.once(**CASE | {"seed": 2}, compute=value(3.0))
    run.once(**CASE, compute=must_not_compute)
    assert [record.value for record in run.current()] == [1.0, 3.0]


def two_records(folder: Path) -> Records:
    records = Records("study", folder)
    records.once(**CASE, compute=value(1.0))
    records.once(**CASE | {"seed": 1}, compute=value(2.0))
    return records


@settings(max_examples=30)
@given(st.data())
def test_a_half_written_line_is_named_and_never_overwritten(data):
    with tempfile.TemporaryDirectory() as folder:
        records = two_records(Path(folder))
        whole = records.path.read_bytes()
        last = len(whole.splitlines(keepends=True)[-1])
        torn = whole[: len(whole) - data.draw(st.integers(2, last - 1), "bytes lost")]
        records.path.write_bytes(torn)
        with pytest.raises(RecordError, match=r"study\.jsonl, line 2 is not a record .* move the file away"):
            records.once(**CASE, compute=must_not_compute)
        assert records.path.read_bytes() == torn


@pytest.mark.parametrize("line", ["[]", "{}", "3", '{"study": "x"}', "", "<<<<<<< HEAD", "\udcff"])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    records = two_records(tmp_path)
    first, second = records.path.read_text().splitlines()
    records.path.write_text("\n".join([first, line, second]), errors="surrogateescape")
    with pytest.raises(RecordError, match="line 2 is not a record"):
        load_records(tmp_path)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_keeps_what_was_written_and_leaves_no_litter(tmp_path, monkeypatch, step):
    records = two_records(tmp_path)
    before = {file.name: file.read_bytes() for file in records.path.parent.iterdir()}

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, full)
    with pytest.raises(RecordError, match=r"No space left on device.*written before are intact.*FLEXQ_OUTPUTS"):
        records.once(**CASE | {"seed": 2}, compute=value(3.0))
    assert {file.name: file.read_bytes() for file in records.path.parent.iterdir()} == before


def test_a_kill_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "file"
    write_atomically(file, "old")

    def killed(_):
        assert file.read_text() == "old"  # nothing of the new text is in place before all of it is on disk
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(file, "new and longer")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_that_cannot_be_made_says_what_to_do(tmp_path):
    (tmp_path / "records").write_text("a file where the folder should be")
    with pytest.raises(RecordError, match="cannot write .* choose a folder that can be written .FLEXQ_OUTPUTS"):
        Records("study", tmp_path).replace(**CASE, measured={})


def test_runs_side_by_side_lose_no_record(tmp_path, monkeypatch):
    """Every run reads the file before any writes it, unless the lock keeps them apart."""
    runs = 4
    all_read = threading.Barrier(runs)

    def slow_write(path, text):
        with contextlib.suppress(threading.BrokenBarrierError):
            all_read.wait(timeout=0.1)
        write_atomically(path, text)

    monkeypatch.setattr(records_module, "write_atomically", slow_write)
    folders = [Records("study", tmp_path) for _ in range(runs)]  # each opens the lock for itself, as processes do
    threads = [
        threading.Thread(target=folder.replace, kwargs=CASE | {"seed": n, "measured": value(float(n))()})
        for n, folder in enumerate(folders)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(record.seed for record in read_jsonl(folders[0].path)) == list(range(runs))


def test_all_studies_are_loaded_and_none_is_an_empty_table(tmp_path):
    empty = load_records(tmp_path)
    assert empty.empty and set(empty.columns) == FIELDS
    for study in ("a", "b"):
        Records(study, tmp_path).once(**CASE, compute=value(8.5))
    pd.testing.assert_series_equal(load_records(tmp_path)["study"], pd.Series(["a", "b"], name="study"))
