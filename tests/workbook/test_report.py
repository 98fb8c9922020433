"""The report: made from records alone, whole without a network, and never markup from what was measured."""

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexq_core.workbook import Measurement, Skipped, load_records, paths, report
from flexq_core.workbook.__main__ import main
from flexq_core.workbook.records import RecordError, Records
from flexq_core.workbook.report import README_MARKS, accuracy_table, build_report, claims_told, readme_with_results

START, END = README_MARKS
PROVENANCE = {
    "git_commit": "0" * 40,
    "dirty": True,
    "versions": {"python": "3"},
    "device": "a <fast> CPU",
    "driver": None,
}


class Page(HTMLParser):
    """The cells of a page's tables by row, its tags, its references and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows, self.tags, self.references, self.words = [], set(), [], []
        self.feed(page)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.references += [value for name, value in attributes if name in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        self.words.append(data)
        if self.lasttag in ("td", "th") and data.strip():
            self.rows[-1][-1] += data.strip()


def score(folder, method, backend, perplexity, model="demo", parameters=None, **more):
    measured = {name: Measurement(value, "1") for name, value in {"perplexity": perplexity, **more}.items()}
    Records("02_accuracy", folder).once(
        model=model,
        method=method,
        parameters={"backend": backend, **(parameters or {})},
        seed=0,
        compute=lambda: measured,
    )


def claim(folder, *claims, study="00_quickstart", model="demo", **parameters):
    Records(study, folder).replace(
        model=model,
        method="claims",
        parameters={"run": parameters},
        seed=0,
        measured={f"claim/{text}": Measurement(holds, "1", *detail) for text, holds, *detail in claims},
    )


def test_the_last_line_counts_the_claims_of_the_last_runs(tmp_path):
    assert claims_told(load_records(tmp_path)) == ""
    claim(tmp_path, ("a", 1.0), ("b", 0.0))
    claim(tmp_path, ("a", 1.0), ("b", 1.0), ("c", None))
    claim(tmp_path, ("d", 0.0), study="01_sensitivity")
    assert claims_told(load_records(tmp_path)) == "claims: 2 hold, 1 fail, 1 skipped"


def page_of(folder) -> Page:
    return Page(build_report(folder).read_text(encoding="utf-8"))


def test_the_table_is_what_the_records_say(tmp_path):
    score(tmp_path, "fp32", "torch", 8.0, **{"accuracy/a": 0.5, "accuracy/b": 1.0})
    score(tmp_path, "flexq", "cpu", 8.2, linear_weight_mib=1.5)
    rows = page_of(tmp_path).rows
    assert rows[1] == ["demo", "fp32", "torch", "8.000", "+0.00%", "75.0%", "–"]
    assert rows[2] == ["demo", "flexq", "cpu", "8.200", "+2.50%", "–", "1.50 MiB"]


def test_other_scales_are_rows_of_the_same_table_and_single_layers_are_none(tmp_path):
    score(tmp_path, "fp32", "torch", 8.0)
    score(tmp_path, "flexq", "cpu", 8.2)
    score(tmp_path, "flexq+mse", "cpu", 8.1, parameters={"scales": "mse"})
    layers = {f"{metric}/mse/a": Measurement(30.0, "dB") for metric in ("weight_sqnr_db", "output_sqnr_db")}
    shared = {"model": "demo", "method": "weight scales", "parameters": {"scales": ["mse"]}, "seed": 0}
    Records("02_accuracy", tmp_path).once(**shared, compute=lambda: layers)
    rows = page_of(tmp_path).rows
    assert [row[1:5] for row in rows[2:]] == [
        ["flexq", "cpu", "8.200", "+2.50%"],
        ["flexq+mse", "cpu", "8.100", "+1.25%"],
    ]
    assert not any("sqnr" in column for column in accuracy_table(load_records(tmp_path)))


def test_kernels_that_a_batch_ran_on_are_no_setting_of_the_table(tmp_path):
    """They are recorded last, with parameters of their own."""
    score(tmp_path, "fp32", "torch", 8.0, parameters={"windows": 2})
    score(tmp_path, "flexq", "cpu", 8.2, parameters={"windows": 2})
    used = {"layers_on/cpu": Measurement(42.0, "layer"), "difference_from_simulate": Measurement(0.01, "1")}
    shared = {
        "model": "demo",
        "method": "flexq",
        "parameters": {"backend": "cpu", "windows": 2, "batch_size": 4},
        "seed": 0,
    }
    Records("02_accuracy", tmp_path).once(**shared, compute=lambda: used)
    table = accuracy_table(load_records(tmp_path))
    assert table[["method", "perplexity"]].values.tolist() == [["fp32", 8.0], ["flexq", 8.2]]


def test_without_a_perplexity_there_is_a_report_all_the_same(tmp_path):
    shared = {"model": "demo", "method": "flexq", "parameters": {"backend": "cpu"}, "seed": 0}
    Records("02_accuracy", tmp_path).once(**shared, compute=lambda: {"bits_per_weight": Measurement(6.1, "bit")})
    assert page_of(tmp_path).rows[1][:4] == ["demo", "flexq", "cpu", "–"]


def test_a_change_is_against_the_same_model(tmp_path):
    for model, base in (("one", 8.0), ("two", 4.0)):
        score(tmp_path, "fp32", "torch", base, model=model)
        score(tmp_path, "flexq", "cpu", 8.2, model=model)
    score(tmp_path, "flexq", "cpu", 8.2, model="alone")
    changes = {row[0]: row[4] for row in page_of(tmp_path).rows if row[1] == "flexq"}
    assert changes == {"one": "+2.50%", "two": "+105.00%", "alone": "–"}


def test_the_newest_of_the_same_case_is_shown(tmp_path, monkeypatch):
    for hour, (perplexity, windows) in enumerate([(8.0, 1), (9.0, 2), (10.0, 3)]):
        time = {"time": f"2026-01-01T0{hour}:00:00+00:00"}
        monkeypatch.setattr("flexq_core.workbook.records.provenance", lambda _, time=time: {**PROVENANCE, **time})
        Records("02_accuracy", tmp_path).once(
            model="demo",
            method="fp32",
            parameters={"backend": "torch", "windows": windows},
            seed=0,
            compute=lambda value=perplexity: {"perplexity": Measurement(value, "1")},
        )
    assert [row[3] for row in page_of(tmp_path).rows[1:]] == ["10.000"]


def test_claims_are_shown_as_they_went(tmp_path):
    claim(tmp_path, ("small", 1.0, "6.4"), ("exact", 0.0, "2 lost"), ("fast", None, "no GPU"))
    assert sorted(page_of(tmp_path).rows[1:]) == [
        ["fails", "demo", "exact", "2 lost"],
        ["holds", "demo", "small", "6.4"],
        ["skipped", "demo", "fast", "no GPU"],
    ]


def test_claims_of_runs_that_differ_say_in_what(tmp_path):
    for outliers, holds in ((0.0, 1.0), (32.0, 0.0)):
        claim(tmp_path, ("small", holds), outliers=outliers, windows=8)
    claim(tmp_path, ("small", 1.0), model="other", outliers=0.0, windows=8)
    runs = {row[1]: row[0] for row in page_of(tmp_path).rows[1:]}
    assert runs == {"demo, outliers=0.0": "holds", "demo, outliers=32.0": "fails", "other": "holds"}


def test_what_an_older_source_claimed_is_not_shown(tmp_path, monkeypatch):
    for hour, text in enumerate(["removed since", "kept"]):
        monkeypatch.setattr("flexq_core.workbook.records.source_digest", lambda *_, text=text: text)
        time = {**PROVENANCE, "time": f"2026-01-01T0{hour}:00:00+00:00"}
        monkeypatch.setattr("flexq_core.workbook.records.provenance", lambda _, time=time: time)
        claim(tmp_path, (text, 1.0))
    assert [row[2] for row in page_of(tmp_path).rows[1:]] == ["kept"]


def test_only_what_was_measured_alike_is_compared(tmp_path):
    score(tmp_path, "fp32", "torch", 8.0, parameters={"windows": 8})
    score(tmp_path, "flexq", "cpu", 8.2, parameters={"windows": 8})
    score(tmp_path, "flexq", "cpu", 4.1, parameters={"windows": 4})
    score(tmp_path, "fp32", "torch", 2.0, parameters={"windows": 4, "dataset": "c4"})
    rows = page_of(tmp_path).rows
    assert [row[:6] for row in rows[1:]] == [
        ["demo", "", "flexq", "cpu", "4.100", "–"],
        ["demo", "c4", "fp32", "torch", "2.000", "+0.00%"],
    ]


def test_what_was_skipped_says_why(tmp_path):
    def skip():
        raise Skipped("no GPU <here>")

    Records("03_kernels", tmp_path).once(model="m", method="cuda", parameters={}, seed=0, compute=skip)
    page = page_of(tmp_path)
    assert "no GPU <here>" in page.text and "03_kernels" in page.text


def test_the_paper_is_shown_claim_by_claim_as_its_last_run_judged_it(tmp_path, monkeypatch):
    for hour, tolerance in enumerate((0.5, 0.05)):
        time = {**PROVENANCE, "time": f"2026-01-01T0{hour}:00:00+00:00"}
        monkeypatch.setattr("flexq_core.workbook.records.provenance", lambda _, time=time: time)
        Records("05_report", tmp_path).replace(
            model="",
            method="paper",
            parameters={"tolerance": tolerance},
            seed=0,
            measured={
                "verdict/abstract/fast": Measurement(float(hour == 0), "1", "not reproduced: 1.2×: too slow"),
                "verdict/§4.2/exact": Measurement(None, "1", "not measured here: no GPU"),
                "finding/figure/equal": Measurement(0.0, "1", "a/b differ"),
                "reading/engine/no warm-up": Measurement(None, ""),
            },
        )
    page = page_of(tmp_path)
    assert [row for row in page.rows if "where" not in row] == [
        ["not reproduced", "abstract", "fast", "1.2×: too slow"],
        ["not measured here", "§4.2", "exact", "no GPU"],
        ["differ", "figure", "equal", "a/b differ"],
        ["engine", "no warm-up"],
    ]
    assert "1 not measured here, 1 not reproduced ." in page.text.replace("reproduced.", "reproduced .")


def test_no_records_make_a_page_without_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FLEXQ_OUTPUTS", str(tmp_path / "out"))
    assert main(["report"]) == 0
    file = tmp_path / "out" / "report.html"
    assert str(file) in capsys.readouterr().out
    page = Page(file.read_text(encoding="utf-8"))
    assert "Made from 0 records." in page.text
    assert "table" not in page.tags


def test_nothing_that_was_measured_becomes_markup(tmp_path, monkeypatch):
    monkeypatch.setattr("flexq_core.workbook.records.provenance", lambda _: {**PROVENANCE, "time": "2026"})
    score(tmp_path, "fp32", "torch", 8.0)
    claim(tmp_path, ("plain", 1.0))
    plain = page_of(tmp_path).tags
    hostile = '<script>alert("1")</script>'
    score(tmp_path, hostile, "cpu", 8.0, model=hostile)
    claim(tmp_path, (hostile, 1.0, hostile), model=hostile)
    figure = tmp_path / "figures" / "00_quickstart" / '"><iframe>' / "x.svg"
    figure.parent.mkdir(parents=True)
    figure.write_text("<svg/>")
    figure.with_suffix(".txt").write_text(hostile)
    page = page_of(tmp_path)
    assert page.tags == plain | {"figure", "img", "figcaption"}
    assert ["holds", hostile, hostile, hostile] in [[cell.replace("\n", "") for cell in row] for row in page.rows]
    assert "a <fast> CPU" in page.text


def test_the_page_needs_nothing_but_the_notebooks_beside_it(tmp_path):
    claim(tmp_path, ("small", 1.0))
    figures = tmp_path / "figures" / "00_quickstart" / "demo"
    for folder in (figures, tmp_path / "notebooks"):
        folder.mkdir(parents=True)
    (figures / "sizes.svg").write_text("<svg/>")
    for name in ("demo", "lost-partial"):
        (tmp_path / "notebooks" / f"00_quickstart-{name}.ipynb").write_text("{}")
    page = page_of(tmp_path)
    assert "Executed: 00_quickstart-demo.ipynb" in page.text
    assert "Failed or stopped: 00_quickstart-lost-partial.ipynb" in page.text
    assert len(page.references) == 3
    for reference in page.references:
        assert reference.startswith("data:image/svg+xml;base64,") or (tmp_path / reference).is_file()
    assert "demo: sizes" in page.text  # a figure without a caption is shown by its name


texts = st.text(max_size=40).filter(lambda text: START not in text and END not in text)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    score(folder, "fp32", "torch", 8.0)
    score(folder, "flexq", "cpu", 8.2)
    return load_records(folder)


@given(before=texts, old=texts, after=texts)
def test_the_readme_changes_between_its_marks_only(records, before, old, after):
    made = readme_with_results(f"{before}{START}{old}{END}{after}", records)
    assert made.startswith(before + START) and made.endswith(END + after)
    assert readme_with_results(made, records) == made


def test_the_readmes_table_is_what_the_records_say(records):
    table = readme_with_results(f"{START}\n{END}", records)
    rows = [re.split(r"\s*\|\s*", line.strip("| ")) for line in table.splitlines() if line.startswith("|")]
    assert [row[1:5] for row in rows[2:]] == [["fp32", "torch", "8.000", "+0.00%"], ["flexq", "cpu", "8.200", "+2.50%"]]
    assert f"Measured on: {records['device'][0]}." in table


@pytest.mark.parametrize("readme", ["none", START, f"{END}{START}", f"{START}{END}{START}{END}", f"{START}{END}{END}"])
def test_a_readme_without_its_marks_is_refused(records, readme):
    with pytest.raises(RecordError, match="the README needs one"):
        readme_with_results(readme, records)


def test_no_records_are_no_table(tmp_path):
    with pytest.raises(RecordError, match="no records of 02_accuracy"):
        readme_with_results(f"{START}{END}", load_records(tmp_path))


def test_without_records_there_is_no_reference_and_it_says_what_makes_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FLEXQ_OUTPUTS", str(tmp_path))
    monkeypatch.setattr(paths, "REFERENCE", tmp_path / "reference")
    assert main(["reference", "cpu"]) == 1
    assert f"{tmp_path / 'records'} has no records of the present source to keep" in capsys.readouterr().err
    assert not (tmp_path / "reference").exists()


def test_reference_then_readme_carry_records_into_the_readme(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXQ_OUTPUTS", str(tmp_path / "out"))
    monkeypatch.setattr("flexq_core.workbook.records.source_digest", lambda *_: "this source")
    score(tmp_path / "out", "fp32", "torch", 8.125)
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(paths, "REFERENCE", tmp_path / "reference")
    readme = tmp_path / "README.md"
    readme.write_text(f"Results\n{START}\n{END}\nThe end.\n")
    assert main(["reference", "cpu"]) == 0
    assert main(["readme"]) == 0
    assert "8.125" in readme.read_text()
    assert report.accuracy_table(load_records(tmp_path / "reference" / "cpu"))["perplexity"].tolist() == [8.125]
