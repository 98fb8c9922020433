"""A notebook's run: parameters are refused before anything runs, and a claim that does not hold fails it."""

import keyword

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbformat import v4

from flexq_core import workbook
from flexq_core.workbook import ClaimFailedError, ParameterError, paths
from flexq_core.workbook.records import read_jsonl
from flexq_core.workbook.run import check_parameters, declared_parameters, parse_parameters

PARAMETERS = """model: str = "demo"  # which model
windows: int = 0  # how many
outliers: float = 0.0  # how large
quick: bool = False  # less of it
lengths: str = "32,128"  # one or several"""


def notebook(name: str, *cells: str) -> None:
    made = v4.new_notebook(cells=[v4.new_code_cell(cell, metadata={"tags": ["parameters"]}) for cell in cells])
    nbformat.write(made, paths.NOTEBOOKS / f"{name}.ipynb")


def passed(**values) -> dict:
    """A namespace as papermill leaves it: its cell has run, whatever the names."""
    cell = "# Parameters\n" + "".join(f"{name} = {value!r}\n" for name, value in values.items())
    return {"In": ["", PARAMETERS, cell], **values}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path)
    monkeypatch.setenv("FLEXQ_OUTPUTS", str(tmp_path / "out"))
    notebook("study", PARAMETERS)


def test_a_run_has_the_defaults_and_what_was_passed(tmp_path):
    run = workbook.start("study", passed(model="org/name", outliers=3))
    assert run.parameters == {"model": "org/name", "windows": 0, "outliers": 3.0, "quick": False, "lengths": "32,128"}
    assert type(run.parameters["outliers"]) is float
    assert run.outputs == tmp_path / "out" == paths.outputs()
    assert run.records.path == tmp_path / "out" / "records" / "study.jsonl"


def test_a_changed_parameter_stands_out(capsys, tmp_path):
    workbook.start("study", passed(windows=8))
    lines = capsys.readouterr().out.splitlines()
    assert "* windows  = 8   (default 0)" in lines
    assert "  model    = 'demo'" in lines
    assert lines[-1] == f"writes to {tmp_path / 'out'}"


@pytest.mark.parametrize("check", [lambda values: workbook.start("study", passed(**values)), None])
def test_an_unknown_parameter_names_the_nearest(check):
    check = check or (lambda values: check_parameters("study", values))
    with pytest.raises(ParameterError, match=r"study has no parameter 'modle'\. Did you mean 'model'\?") as caught:
        check({"modle": "x"})
    assert all(line in str(caught.value).replace("'", '"') for line in PARAMETERS.splitlines())


def test_a_name_near_to_none_is_still_refused():
    with pytest.raises(ParameterError, match=r"no parameter 'zzz'\. Its parameters:"):
        workbook.start("study", passed(zzz=1))


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("windows", "8", r"'windows' is '8' \(str\); accepted: int, for example 0  # how many"),
        ("windows", 8.0, r"'windows' is 8\.0 \(float\); accepted: int"),
        ("windows", True, r"'windows' is True \(bool\); accepted: int"),
        ("windows", None, r"'windows' is None \(NoneType\); accepted: int"),
        ("outliers", False, r"'outliers' is False \(bool\); accepted: float"),
        ("outliers", "3", r"'outliers' is '3' \(str\); accepted: float"),
        ("model", 7, r"'model' is 7 \(int\); accepted: str, for example 'demo'"),
        ("quick", 1, r"'quick' is 1 \(int\); accepted: bool"),
        ("lengths", 64.0, r"'lengths' is 64\.0 \(float\); accepted: str, for example '32,128'"),
        ("lengths", True, r"'lengths' is True \(bool\); accepted: str"),
    ],
)
def test_a_value_of_another_type_is_refused(name, value, text):
    with pytest.raises(ParameterError, match=text):
        workbook.start("study", passed(**{name: value}))
    with pytest.raises(ParameterError, match=text):
        check_parameters("study", {name: value})


def test_a_single_count_is_text_where_the_default_is_counts():
    check_parameters("study", {"lengths": 64})
    assert workbook.start("study", passed(lengths=64)).parameters["lengths"] == "64"


def test_the_readers_own_names_are_none_of_our_business():
    mine = {"In": ["", "modle = 1", "windows = 5"], "modle": 1, "windows": 5}
    assert workbook.start("study", mine).parameters["windows"] == 5


def test_a_mended_parameters_cell_counts_in_place_of_the_first():
    namespace = passed(modle="x")
    namespace["In"].append("# Parameters\nmodel = 'x'\n")
    assert workbook.start("study", namespace | {"model": "x"}).parameters["model"] == "x"
    namespace["In"].append("# Parameters\nmodle = 'x'\n")
    with pytest.raises(ParameterError, match="modle"):
        workbook.start("study", namespace)


names = st.from_regex(r"[a-z_][a-z0-9_]{0,12}", fullmatch=True).filter(lambda name: not keyword.iskeyword(name))
literals = st.text() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans()


@given(st.dictionaries(names, literals))
def test_whatever_can_be_declared_is_read_as_it_stands(values):
    source = "\n".join(f"{name}: {type(value).__name__} = {value!r}  # of {name}" for name, value in values.items())
    read = parse_parameters(source, "here")
    assert {name: parameter.default for name, parameter in read.items()} == values
    assert all(parameter.type is type(values[name]) for name, parameter in read.items())
    assert all(parameter.help == f"of {name}" for name, parameter in read.items())
    assert list(parse_parameters("\n".join(map(str, read.values())), "again")) == list(values)


def test_a_line_that_a_formatter_spread_is_one_parameter():
    (parameter,) = parse_parameters('text: str = (\n    "long"  # what it says\n)', "here").values()
    assert str(parameter) == "text: str = 'long'  # what it says"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("windows = 8  # no type", "'windows = 8' is not a parameter; accepted: name: str|int|float|bool = literal"),
        ("windows: int = 8", "'windows: int = 8' is not a parameter"),
        ("windows: int  # no value", "'windows: int' is not a parameter"),
        ("windows: list = []  # a list", "'windows: list = []' is not a parameter"),
        ("model: str | None = None  # either", "'model: str | None = None' is not a parameter"),
        ("import os  # a statement", "'import os' is not a parameter"),
        ("run.windows: int = 8  # an attribute", "'run.windows: int = 8' is not a parameter"),
        ("windows: int = 4 * 2  # an expression", "the default of 'windows' is not a literal"),
        ("windows: int = 'x'  # mistyped", "'windows' is 'x' (str); accepted: int"),
        ("windows: int = 8  # one\nwindows: int = 9  # two", "'windows' is declared twice"),
        ("windows: int = (  # torn", "the parameters cell is not Python"),
    ],
)
def test_a_parameters_cell_that_papermill_or_people_would_misread_is_refused(source, text):
    with pytest.raises(ParameterError) as caught:
        parse_parameters(source, "here")
    assert text in str(caught.value)


@pytest.mark.parametrize("cells", [(), (PARAMETERS, "more: int = 1  # a second cell")])
def test_a_notebook_has_one_parameters_cell(cells):
    notebook("other", *cells)
    with pytest.raises(ParameterError, match=f"other.ipynb has {len(cells)} cells tagged 'parameters'; accepted: one"):
        workbook.start("other", {})


def test_a_notebook_that_is_not_there_names_those_that_are():
    with pytest.raises(ParameterError, match="there is no notebook 'sutdy' in .*; found: study"):
        declared_parameters(paths.NOTEBOOKS / "sutdy.ipynb")


def test_outputs_are_the_repositorys_unless_said_otherwise(monkeypatch):
    monkeypatch.setenv("FLEXQ_OUTPUTS", "")
    assert paths.outputs() == paths.ROOT / "outputs"
    monkeypatch.setenv("FLEXQ_OUTPUTS", "elsewhere")
    assert paths.outputs() == paths.ROOT / "elsewhere"


def test_a_figure_lies_by_study_and_model_in_both_forms(tmp_path):
    from matplotlib.figure import Figure

    run = workbook.start("study", passed(model="/org/name/"))
    svg = run.figure(Figure(), "change", caption="What it shows")
    assert svg == tmp_path / "out/figures/study/org--name/change.svg"
    assert sorted(file.name for file in svg.parent.iterdir()) == ["change.png", "change.svg", "change.txt"]
    assert svg.with_suffix(".txt").read_text() == "What it shows\n"
    first = svg.read_bytes()
    assert run.figure(Figure(), "change", caption="What it shows").read_bytes() == first


def test_progress_passes_everything_on():
    assert list(workbook.start("study", {}).progress(range(3), desc="x", total=3)) == [0, 1, 2]


def test_claims_that_hold_let_the_run_finish(capsys):
    run = workbook.start("study", {})
    run.claim("small", True, "6.4")
    run.claim("fast", None, "no GPU")
    run.finish()
    shown = capsys.readouterr().out
    assert "holds    small   (6.4)" in shown and "skipped  fast   (no GPU)" in shown
    records = {record.metric: record for record in read_jsonl(run.records.path)}
    small, fast = records["claim/small"], records["claim/fast"]
    assert (small.status, small.value, small.reason) == ("ok", 1.0, "6.4")
    assert (fast.status, fast.value, fast.reason) == ("skipped", None, "no GPU")  # never counted as one that holds


def test_a_claim_that_fails_fails_the_run_and_is_on_record(capsys):
    run = workbook.start("study", {})
    run.claim("small", True)
    run.claim("exact", False, "2 lost")
    with pytest.raises(ClaimFailedError, match="^exact$"):
        run.finish()
    assert "FAILS    exact   (2 lost)" in capsys.readouterr().out
    values = {record.metric: record.value for record in read_jsonl(run.records.path)}
    assert values == {"claim/small": 1.0, "claim/exact": 0.0}


def test_claims_told_again_are_told_as_they_are_now(capsys):
    run = workbook.start("study", {})
    run.claim("exact", False)
    with pytest.raises(ClaimFailedError):
        run.finish()
    capsys.readouterr()
    run.claim("exact", False)
    run.claim("exact", True)
    run.finish()
    assert "FAILS" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "label"), [("..", "model"), ("./m", "m"), ("../../m", "m"), ("a b/c:d", "a--b--c--d")]
)
def test_no_models_name_leads_out_of_its_folder(tmp_path, model, label):
    from matplotlib.figure import Figure

    svg = workbook.start("study", passed(model=model)).figure(Figure(), "x", caption="x")
    assert svg.parent == tmp_path / "out/figures/study" / label


def test_a_run_without_a_claim_fails():
    with pytest.raises(ClaimFailedError, match="the notebook made no claim"):
        workbook.start("study", {}).finish()


def test_the_claims_of_a_second_run_take_the_place_of_the_firsts():
    for holds in (False, True):
        run = workbook.start("study", {})
        run.claim("exact", holds)
        if holds:
            run.finish()
        else:
            with pytest.raises(ClaimFailedError):
                run.finish()
    (record,) = read_jsonl(run.records.path)
    assert record.value == 1.0
