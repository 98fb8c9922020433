"""Notebooks headless: what was passed arrives, a failure is an exit status, and what ran until then is kept."""

import errno
import os
import sys

import nbformat
import pytest
from nbformat import v4

from flexq_core.workbook import ParameterError, paths
from flexq_core.workbook import __main__ as command
from flexq_core.workbook.__main__ import _from_here, main
from flexq_core.workbook.execute import DEMO, execute, execute_all, lacking, reproduction
from flexq_core.workbook.run import check_parameters

PARAMETERS = """model: str = "demo"  # which model
count: int = 1  # how many"""
FACTS = (
    "import os, sys\nprint(model, count, sys.executable, os.environ['FLEXQ_HEADLESS'], os.path.basename(os.getcwd()))"
)


def notebook(name: str, *cells: str) -> None:
    parameters = v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    made = v4.new_notebook(
        cells=[parameters, *map(v4.new_code_cell, cells)], metadata={"language_info": {"name": "python"}}
    )
    nbformat.write(made, paths.NOTEBOOKS / f"{name}.ipynb")


def printed(copy) -> str:
    cells = nbformat.read(copy, as_version=4).cells
    return "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path / "story")
    monkeypatch.setenv("FLEXQ_OUTPUTS", str(tmp_path / "out"))
    paths.NOTEBOOKS.mkdir()
    notebook("good", FACTS)
    notebook("bad", "print('before')", "1 / 0", "print('after')")
    return tmp_path / "out" / "notebooks"


def test_a_notebook_runs_with_this_python_and_what_was_passed(folder, capsys):
    before = dict(os.environ)
    source = (paths.NOTEBOOKS / "good.ipynb").read_bytes()
    assert main(["run", "good", "-p", "model", "org/name", "-p", "count", "3"]) == 0
    copy = folder / "good-org--name.ipynb"
    assert capsys.readouterr().out.splitlines()[-1] == str(copy)
    assert printed(copy) == f"org/name 3 {sys.executable} 1 story\n"
    assert dict(os.environ) == before
    assert (paths.NOTEBOOKS / "good.ipynb").read_bytes() == source


@pytest.mark.parametrize("model", ["./here", "../mine/here", "here"])
def test_a_folder_is_found_from_where_the_command_was_given(folder, tmp_path, monkeypatch, model):
    """But a bare name is a model's."""
    (tmp_path / "mine" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine")
    assert main(["run", "good", "-p", "model", model]) == 0
    (copy,) = folder.glob("good-*.ipynb")
    assert printed(copy).split()[0] == (str(tmp_path / "mine" / "here") if "/" in model else model)
    assert _from_here({"data_dir": "here", "dataset": "here"})["data_dir"] == str(tmp_path / "mine" / "here")
    with pytest.raises(ParameterError, match="data_dir is 'nowhere'; accepted: a folder that exists"):
        _from_here({"data_dir": "nowhere"})


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("model", "./nowhere", "there is no folder '{here}/nowhere': check the path"),
        ("plan", "nowhere.json", "plan is 'nowhere.json'; accepted: a file that exists, or a plan's name"),
        ("records", "nowhere", "records is 'nowhere'; accepted: a folder that exists"),
    ],
)
def test_what_is_not_where_the_command_was_given_is_said_before_a_kernel_starts(
    folder, tmp_path, monkeypatch, capsys, name, value, told
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("flexq_core.workbook.__main__.execute", lambda *_: pytest.fail("executed"))
    assert main(["run", "good", "-p", name, value]) == 1
    assert told.format(here=tmp_path) in capsys.readouterr().err


def test_a_plan_is_found_from_where_the_command_was_given_if_it_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w6a6").mkdir()
    (tmp_path / "mine.json").touch()
    assert _from_here({"plan": "w6a6", "count": "mine.json"}) == {"plan": "w6a6", "count": "mine.json"}
    assert _from_here({"plan": "mine.json"}) == {"plan": str(tmp_path / "mine.json")}


def test_nothing_is_reproduced_from_a_folder_that_is_not_there(folder, capsys):
    assert main(["reproduce", "demo-llama", "--data-dir", "nowhere"]) == 1
    assert capsys.readouterr() == ("", "data_dir is 'nowhere'; accepted: a folder that exists\n")
    assert not folder.exists()


def test_a_failure_keeps_the_partial_copy_and_the_status_says_so(folder, capsys):
    assert main(["run", "bad"]) == 1
    copy = folder / "bad-all-partial.ipynb"
    said = capsys.readouterr().err
    assert "bad failed: ZeroDivisionError: division by zero" in said and f"partial copy: {copy}" in said
    assert printed(copy) == "before\n"


def test_a_failure_leaves_the_copy_of_a_run_that_did_well(folder, capsys):
    notebook("changes", "print('well')")
    assert main(["run", "changes"]) == 0
    notebook("changes", "print('before')", "1 / 0")
    assert main(["run", "changes"]) == 1
    assert printed(folder / "changes-all.ipynb") == "well\n"
    assert printed(folder / "changes-all-partial.ipynb") == "before\n"


def test_an_interruption_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "execute", interrupted)
    assert main(["run", "good"]) == 130
    assert capsys.readouterr().err == "\nstopped; the same command goes on from what is on record\n"


def test_a_folder_that_cannot_be_written_is_named_with_what_to_do(monkeypatch, capsys):
    def refused(error):
        def execute(*_):
            raise error

        monkeypatch.setattr(command, "execute", execute)

    refused(OSError(errno.EROFS, "Read-only file system", "/ro/notebooks"))
    assert main(["run", "good"]) == 1
    told = "cannot write /ro/notebooks: Read-only file system; set FLEXQ_OUTPUTS to a folder that can\n"
    assert capsys.readouterr().err == told
    refused(OSError(errno.EIO, "Input/output error", "/disk"))
    with pytest.raises(OSError, match="Input/output"):
        main(["run", "good"])


def test_a_kernel_that_dies_is_a_notebook_that_failed(folder, capsys):
    notebook("dies", "print('before')", "import os\nos.kill(os.getpid(), 9)")
    assert execute_all([("dies", {}), ("good", {})]) is False
    assert "dies failed: its Python process died" in capsys.readouterr().out
    assert printed(folder / "good-all.ipynb")


def test_a_kernel_that_crashes_says_where(folder, capfd):
    notebook("crashes", "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    assert execute_all([("crashes", {})]) is False
    assert "Fatal Python error: Segmentation fault" in capfd.readouterr().err


def test_the_others_still_run_after_one_failed(folder, capsys):
    assert execute_all([("bad", {"count": 2}), ("good", {})]) is False
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.split()[:4] == ["bad", "count=2", "FAILED", "after"]
    assert rest[-1].split()[:3] == ["good", "done", "in"]
    assert printed(folder / "good-all.ipynb").startswith("demo 1 ")


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [("modle", "x", r"Did you mean 'model'\?"), ("count", "x", "accepted: int"), ("model", 7, "accepted: str")],
)
def test_a_bad_parameter_is_refused_before_a_kernel_starts(folder, name, value, text):
    with pytest.raises(ParameterError, match=text):
        execute("good", {name: value})
    assert not folder.exists()


@pytest.mark.parametrize(("name", "value"), [("modle", "x"), ("count", "3.5"), ("count", "true"), ("model", "7")])
def test_a_bad_parameter_is_an_exit_status_on_the_command_line(folder, capsys, name, value):
    assert main(["run", "good", "-p", name, value]) == 1
    assert name in capsys.readouterr().err
    assert not folder.exists()


def test_a_notebook_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["run", "goood"])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "goood" in said and "bad" in said and "good" in said.replace("goood", "")


def test_a_reproduction_ends_where_the_first_notebook_fails_and_says_what_is_left_out(folder, capsys):
    assert execute_all([("bad", {}), ("good", {}), ("good", {"count": 2})], first_decides=True) is False
    assert capsys.readouterr().out.splitlines()[-1] == "  left out: good"
    assert not (folder / "good-all.ipynb").exists()
    assert execute_all([("good", {}), ("bad", {}), ("good", {"count": 2})], first_decides=True) is False
    assert capsys.readouterr().out.splitlines()[-1].split()[:3] == ["good", "count=2", "done"]


def test_a_reproduction_leaves_out_what_the_data_folder_does_not_have(tmp_path):
    assert lacking("org/name", "") == []
    with pytest.raises(ParameterError, match="has no file of wikitext2: nothing is there"):
        lacking("org/name", str(tmp_path))
    for name in ("wikitext2_test.txt", "piqa_validation.json", "boolq_validation.json"):
        (tmp_path / name).touch()
    without = lacking("org/name", str(tmp_path))
    assert without == ["c4", "arc_easy", "arc_challenge", "hellaswag", "winogrande"]
    scored = [parameters for study, parameters in reproduction("org/name", "texts", without) if study == "02_accuracy"]
    assert [parameters["tasks"] for parameters in scored] == ["piqa,boolq"]
    assert lacking("demo-llama", str(tmp_path / "nothing"))[0] == "c4"  # which has a text of its own


def test_a_model_that_is_not_known_is_refused_before_anything_runs(folder, capsys):
    assert main(["reproduce", "llama-2-7bb"]) == 1
    assert "Did you mean 'llama-2-7b'?" in capsys.readouterr().err
    assert not folder.exists()


def test_a_reproduction_scores_the_plan_that_it_made(monkeypatch, folder):
    steps = reproduction("org/name", "texts")
    assert [study for study, _ in steps] == sorted(study for study, _ in steps)
    (plan,) = {parameters["plan"] for _, parameters in steps if "plan" in parameters}
    assert plan == str(folder.parent / "plans" / "org--name.json")
    monkeypatch.undo()
    for study, parameters in steps:
        check_parameters(study, parameters)


@pytest.mark.parametrize("steps", [DEMO, reproduction("org/name")], ids=["demo", "reproduction"])
def test_no_two_steps_write_over_each_others_files(steps):
    files = [(study, paths.run_label(parameters)) for study, parameters in steps]
    assert len(files) == len(set(files))
