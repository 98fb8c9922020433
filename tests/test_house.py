"""The house: imports point one way, importing costs little, and what is written twice says the same."""

import ast
import io
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pandas as pd
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import flexq_core
from flexq_core.runtime import cuda
from flexq_core.studies.report.claims import (
    NOT_MEASURED,
    NOT_REPRODUCED,
    REPRODUCED,
    Tolerance,
    judge,
    paper_claims,
)
from flexq_core.workbook import paths
from flexq_core.workbook.execute import DEMO
from flexq_core.workbook.gpu_tables import model_times
from flexq_core.workbook.records import load_reference
from flexq_core.workbook.report import README_MARKS, readme_with_results
from flexq_core.workbook.run import check_parameters, declared_parameters

ROOT = paths.ROOT
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NOTEBOOKS = sorted(paths.NOTEBOOKS.glob("*.ipynb"))
DOCUMENTS = [ROOT / name for name in ("README.md", "env/README.md", "outputs/README.md", "CHANGELOG.md", ".ci/run")]

MAY_IMPORT = {
    "files": set(),
    "quant": set(),
    "runtime": {"files", "quant"},
    "sources": {"files", "quant"},
    "studies": {"quant", "runtime", "sources", "workbook"},
    "workbook": set(),
}
ONCE_CALLED = {"workbook": {"runtime", "sources"}}
"""Inside functions only: describing the machine asks whether the kernel builds, and what is reproduced is looked for before."""


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imports_of(package: str) -> tuple[set[str], set[str]]:
    """What a package's modules import when they are imported, and what inside functions as well."""
    at_import, ever = set(), set()
    for file in (ROOT / "flexq_core" / package).rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        ever |= imported(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                node.body = [ast.Pass()]
        at_import |= imported(tree)
    assert at_import, f"{package} imports nothing: is it still there?"
    return at_import, ever


def ours(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("flexq_core.")}


def test_what_a_product_of_one_token_takes_is_what_its_kernel_holds():
    source = (ROOT / "kernels" / "cuda" / "w6ax_imma_row.cu").read_text(encoding="utf-8")
    limits = re.search(r"kMostGroups = (\d+), kMostNormGroups = (\d+);", source)
    assert tuple(map(int, limits.groups())) == (cuda.MOST_ROW_GROUPS, cuda.MOST_NORM_ROW_GROUPS)


def test_every_package_has_its_place():
    assert set(MAY_IMPORT) == {file.parent.name for file in (ROOT / "flexq_core").glob("*/__init__.py")}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package):
    at_import, ever = map(ours, imports_of(package))
    allowed = MAY_IMPORT[package] | {package, "__version__"}
    assert at_import <= allowed
    assert ever <= allowed | ONCE_CALLED.get(package, set())


def test_nothing_of_the_package_imports_tests():
    roots = {name.split(".")[0] for package in MAY_IMPORT for name in imports_of(package)[1]}
    assert not roots & {"tests", "notebooks", "pytest", "hypothesis"}


def test_the_number_format_is_torch_alone_and_reads_no_file():
    roots = {name.split(".")[0] for name in imports_of("quant")[1]} - {"flexq_core"}
    assert roots - set(sys.stdlib_module_names) == {"torch"}
    assert not roots & {"io", "os", "pathlib", "shutil", "socket", "subprocess", "tempfile", "urllib"}


def test_importing_is_light_compiles_nothing_and_asks_no_network(tmp_path):
    script = """
import importlib, json, pkgutil, sys
happened = []
watched = ("subprocess.Popen", "os.system", "os.posix_spawn", "os.fork", "os.exec", "socket.connect", "socket.getaddrinfo")
sys.addaudithook(lambda event, facts: happened.append([event, str(facts[0])]) if event in watched else None)
import flexq_core
light = sorted({name.split(".")[0] for name in sys.modules} & {"torch", "transformers", "numpy", "pandas"})
ours = len(happened)
import torch  # a CUDA build asks the system's linker for its libraries: that is not this package's doing
del happened[ours:]
for module in pkgutil.walk_packages(flexq_core.__path__, "flexq_core."):
    if not module.name.endswith(("__main__", "hf_quantizer", "attention_kernels")):  # these import transformers and triton
        importlib.import_module(module.name)
heavy = sorted({"transformers", "datasets", "lm_eval", "papermill", "torch.utils.cpp_extension"} & set(sys.modules))
print(json.dumps([light, heavy, happened, "flexq_core.studies.accuracy" in sys.modules]))
"""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "built")}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    light, heavy, happened, imported_all = json.loads(done.stdout)
    fonts = [["subprocess.Popen", name] for name in ("fc-list", "system_profiler")]  # matplotlib, once in a new home
    assert (light, heavy, [event for event in happened if event not in fonts]) == ([], [], [])
    assert imported_all
    assert not (tmp_path / "built").exists()


def test_every_name_of_the_package_is_there():
    for name in dir(flexq_core):
        assert getattr(flexq_core, name) is not None


def requirements(name: str) -> list[Requirement]:
    lines = [line.split("#")[0].strip() for line in (ROOT / "env" / name).read_text(encoding="utf-8").splitlines()]
    return [Requirement(line) for line in lines if line]


def locked() -> dict[str, set[str]]:
    pins: dict[str, set[str]] = {}
    for requirement in requirements("requirements.lock"):
        (pin,) = requirement.specifier
        assert pin.operator == "==" and "*" not in pin.version, f"{requirement} is no pin"
        pins.setdefault(requirement.name, set()).add(pin.version)
    return pins


def test_the_lock_has_every_direct_dependency_at_its_version():
    pins = locked()
    for wanted in requirements("requirements.in"):
        assert wanted.name in pins, f"{wanted.name} is not locked: run make lock"
        assert all(version in wanted.specifier for version in pins[wanted.name]), f"{wanted}: run make lock"


def test_conda_installs_by_the_same_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    python, *rest = environment["dependencies"]
    assert rest == ["pip", {"pip": ["-r env/requirements.lock"]}]  # no pin of its own that could differ
    name, version = python.split("=")
    assert name == "python" and version in SpecifierSet(PROJECT["project"]["requires-python"])
    assert environment["channels"] == ["conda-forge", "nodefaults"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_pins_in_documents_are_the_locks(document):
    pins = locked()
    for name, version in re.findall(r"([a-z][\w-]*)==([\d.]+\d)", document.read_text(encoding="utf-8")):
        assert version in pins[name]


def test_the_version_is_written_once_and_the_changelog_has_it():
    assert "version" not in PROJECT["project"]
    assert "version" in PROJECT["project"]["dynamic"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "flexq_core.__version__"}
    headings = re.findall(r"^## (\d+\.\d+\.\d+)\b", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == flexq_core.__version__
    assert headings == sorted(headings, key=lambda version: tuple(map(int, version.split("."))), reverse=True)


def test_there_are_notebooks_and_the_readme_names_each():
    assert NOTEBOOKS
    for notebook in NOTEBOOKS:
        assert f"`{notebook.stem}`" in README


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_it_is_stripped(self, notebook):
        content = json.loads(notebook.read_text(encoding="utf-8"))
        assert set(content["metadata"]) <= {"kernelspec", "language_info"}
        for cell in content["cells"]:
            assert set(cell["metadata"]) <= {"tags"}
            if cell["cell_type"] == "code":
                assert cell["outputs"] == [] and cell["execution_count"] is None

    def test_its_second_cell_is_its_parameters_and_papermill_reads_the_same(self, notebook):
        import papermill

        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        assert cells[1]["metadata"].get("tags") == ["parameters"]
        declared = declared_parameters(notebook)
        read = papermill.inspect_notebook(str(notebook))
        assert {name: parameter.type.__name__ for name, parameter in declared.items()} == {
            name: parameter["inferred_type_name"] for name, parameter in read.items()
        }
        assert {n: p.default for n, p in declared.items()} == {
            n: ast.literal_eval(p["default"]) for n, p in read.items()
        }

    def test_it_starts_under_its_own_name_and_ends_with_its_claims(self, notebook):
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        assert cells[2]["source"][-1] == f'run = workbook.start("{notebook.stem}", globals())'
        assert cells[-1]["source"][-1] == "run.finish()"
        assert cells[0]["cell_type"] == "markdown" and "**Claim" in "".join(cells[0]["source"])

    def test_it_is_a_thin_story(self, notebook):
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        assert len(cells) <= 3 + 15
        for cell in cells:
            if cell["cell_type"] == "code":
                for node in ast.walk(ast.parse("".join(cell["source"]))):
                    if isinstance(node, ast.FunctionDef):
                        assert node.end_lineno - node.lineno < 10


@pytest.mark.parametrize(("study", "parameters"), DEMO, ids=str)
def test_the_demo_can_run(study, parameters):
    check_parameters(study, parameters)


def test_every_make_target_that_is_mentioned_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert targets == set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())
    mentioned = set()
    for document in DOCUMENTS:
        for line in re.findall(
            r"(?:`|^ *|\S=\S+ )make ((?:[a-z-]+ ?)+)", document.read_text(encoding="utf-8"), re.MULTILINE
        ):
            mentioned |= set(line.split()) if document.suffix != ".md" else {line.split()[0]}
    assert {"demo", "test"} <= mentioned <= targets


@pytest.mark.parametrize("document", DOCUMENTS[:4], ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_in_documents_exist(document):
    text = document.read_text(encoding="utf-8")
    links = {document.parent / link for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text)}
    named = {ROOT / name for name in re.findall(r"`((?:notebooks|flexq_core|kernels|env|tests)/[\w./-]*)`", text)}
    assert not {path for path in links | named if not path.exists()}


def tracked() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="not a git checkout")
def test_no_tracked_text_names_a_folder_of_one_machine():
    files = tracked()
    assert ROOT / "README.md" in files
    found = []
    for file in files:
        content = file.read_bytes()
        if b"\0" not in content:
            for number, line in enumerate(io.BytesIO(content), 1):
                if re.search(rb"(?<![\w.:/-])/(?:work|root|home|Users)/", line):
                    found.append(f"{file.relative_to(ROOT)}:{number}: {line[:80]!r}")
    assert not found


def test_the_readmes_results_are_those_of_the_reference_records():
    between = README.split(README_MARKS[0])[1].split(README_MARKS[1])[0]
    records = load_reference()
    if records.empty:
        assert not between.strip(), "results without records"
    else:
        assert readme_with_results(README, records) == README, "run make readme"
        counts = judge(paper_claims(), records.sort_values("time", kind="stable"), Tolerance())[
            "verdict"
        ].value_counts()
        told = f"Of the paper's {counts.sum()} claims {counts[REPRODUCED]} are reproduced by the records kept here, "
        told += f"{counts[NOT_REPRODUCED]} are not and {counts[NOT_MEASURED]} are not measured here"
        assert told in " ".join(README.split())


def test_the_readmes_first_numbers_are_those_of_its_tables():
    times = model_times(load_reference())
    one = {"device": "NVIDIA H200", "model": "llama-13b", "batch_size": 1, "prompt_tokens": 128, "output_tokens": 1024}
    times = times[(times[list(one)] == pd.Series(one)).all(axis=1)].sort_values("tpot_ms")
    times = times.drop_duplicates("method").set_index("method")
    ms, gib = times["tpot_ms"].map("{:.2f}".format), (times["weights_mib"] / 1024).map("{:.1f}".format)
    told = (
        f"On an NVIDIA H200 a token of LLaMA-13B takes {ms['flexq']} ms, in FP8 {ms['fp8']} and in FP16 {ms['fp16']}, "
    )
    told += f"and its weights {gib['flexq']} GiB, in FP8 {gib['fp8']} and in FP16 {gib['fp16']} "
    assert told in " ".join(README.split())
