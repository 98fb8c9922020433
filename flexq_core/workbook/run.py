"""The start of every notebook: its parameters are checked, its machine is named, its records are opened."""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from flexq_core.workbook import figures, paths
from flexq_core.workbook.machine import provenance
from flexq_core.workbook.records import Measurement, Records

_VERDICT = {True: "holds", False: "FAILS", None: "skipped"}
_COUNTS = re.compile(r"[0-9]+(,[0-9]+)*")
_TYPES = {"str": str, "int": int, "float": float, "bool": bool}


class ParameterError(ValueError):
    """A parameter that the notebook does not have, or of the wrong type; the message says what is accepted."""


class ClaimFailedError(AssertionError):
    """A notebook's claim that its own records do not bear out."""


@dataclass(frozen=True)
class Parameter:
    """One line of the parameters cell: `name: type = default  # help`."""

    name: str
    type: type
    default: Any
    help: str

    def __str__(self) -> str:
        return f"{self.name}: {self.type.__name__} = {self.default!r}  # {self.help}"


@dataclass
class Run:
    """One execution of one notebook.

    study: the notebook's name.  parameters: checked values.  device: `cpu` or `cuda`.  outputs: the folder that is written.
    records: the study's records.
    """

    study: str
    parameters: dict[str, Any]
    device: str
    outputs: Path
    records: Records
    _claims: dict[str, tuple[bool | None, str]] = field(default_factory=dict, repr=False)

    def progress(self, iterable: Iterable, *, desc: str, total: int | None = None) -> Iterator:
        """Iterate with a bar: a live one in Jupyter and on a terminal, a line every half minute in a log."""
        if paths.in_log():
            from tqdm import tqdm

            return iter(tqdm(iterable, desc=desc, total=total, mininterval=30, maxinterval=30, leave=False, ascii=True))
        from tqdm.auto import tqdm

        return iter(tqdm(iterable, desc=desc, total=total, mininterval=0.5, leave=False))

    def figure(self, figure: Any, name: str, *, caption: str) -> Path:
        """Save a figure as SVG and PNG under outputs/figures/<study>/<run>/ and return the SVG's path."""
        folder = self.outputs / "figures" / self.study / paths.run_label(self.parameters)
        return figures.save(figure, folder, name, caption=caption)

    def claim(self, text: str, holds: bool | None, detail: str = "") -> None:
        """State a claim and whether this run's records bear it out; `finish` fails the run if one does not hold.

        holds: None where this machine cannot tell; then `detail` says what it lacks, and the claim counts as skipped.
        """
        self._claims[text] = (None if holds is None else bool(holds), detail)

    def finish(self) -> None:
        """Record and print the claims made since the last call. Raises ClaimFailedError if none, or one that fails."""
        claims, self._claims = self._claims, {}  # so that cells run again tell what they find then
        self.records.replace(
            model=str(self.parameters.get("model", "")),
            method="claims",
            parameters={"run": self.parameters},
            seed=int(self.parameters.get("seed", 0)),
            measured={
                f"claim/{text}": Measurement(None if holds is None else float(holds), "1", detail)
                for text, (holds, detail) in claims.items()
            },
        )
        for text, (holds, detail) in claims.items():
            print(f"{_VERDICT[holds]:<9}{text}{f'   ({detail})' if detail else ''}")
        failed = [text for text, (holds, _) in claims.items() if holds is False]
        if failed or not claims:
            raise ClaimFailedError("; ".join(failed) or "the notebook made no claim")


def start(study: str, namespace: Mapping[str, Any]) -> Run:
    """Check the notebook's parameters and begin its run.

    study: the notebook's name without `.ipynb`.  namespace: the notebook's globals().
    Raises ParameterError for a parameter that was passed but is not declared, or whose value has another type.
    """
    declared = declared_parameters(paths.NOTEBOOKS / f"{study}.ipynb")
    _refuse_unknown(_injected_names(namespace), declared, study)
    values = {name: _typed(parameter, namespace.get(name, parameter.default)) for name, parameter in declared.items()}

    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    outputs = paths.outputs()
    figures.use_style()
    run = Run(study, values, device, outputs, Records(study, outputs, device))
    _print_banner(run, declared)
    return run


def declared_parameters(notebook: Path) -> dict[str, Parameter]:
    """The parameters of a notebook, from its cell tagged `parameters`: name → Parameter.

    Raises ParameterError where the notebook or the cell is absent, or a line is not `name: type = literal  # help`.
    """
    if not notebook.is_file():
        known = ", ".join(sorted(path.stem for path in notebook.parent.glob("*.ipynb"))) or "none"
        raise ParameterError(f"there is no notebook {notebook.stem!r} in {notebook.parent}; found: {known}")
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(c["source"]) for c in cells if "parameters" in c.get("metadata", {}).get("tags", [])]
    if len(sources) != 1:
        raise ParameterError(f"{notebook.name} has {len(sources)} cells tagged 'parameters'; accepted: one")
    return parse_parameters(sources[0], notebook.name)


def parse_parameters(source: str, where: str) -> dict[str, Parameter]:
    """Read a parameters cell; see `declared_parameters`."""
    accepted = f"accepted: name: {'|'.join(_TYPES)} = literal  # help"
    try:
        nodes = ast.parse(source).body
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    except (SyntaxError, tokenize.TokenError) as error:
        raise ParameterError(f"{where}: the parameters cell is not Python ({error}); {accepted}") from None
    parameters = {}
    for node in nodes:
        # A formatter may have spread a long line over several; its help is then on one of them.
        help_text = next((comments[n] for n in range(node.lineno, node.end_lineno + 1) if n in comments), "")
        simple = isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None
        kind = _TYPES.get(ast.unparse(node.annotation)) if simple else None
        if kind is None or not help_text:
            raise ParameterError(f"{where}: {ast.get_source_segment(source, node)!r} is not a parameter; {accepted}")
        name = node.target.id
        if name in parameters:
            raise ParameterError(f"{where}: {name!r} is declared twice")
        try:
            default = ast.literal_eval(node.value)
        except ValueError:
            raise ParameterError(f"{where}: the default of {name!r} is not a literal; {accepted}") from None
        parameters[name] = Parameter(name, kind, _typed(Parameter(name, kind, kind(), help_text), default), help_text)
    return parameters


def check_parameters(study: str, values: Mapping[str, Any]) -> None:
    """Raise ParameterError, as `start` would, before a notebook is even run."""
    declared = declared_parameters(paths.NOTEBOOKS / f"{study}.ipynb")
    _refuse_unknown(list(values), declared, study)
    for name, value in values.items():
        _typed(declared[name], value)


def _refuse_unknown(names: list[str], declared: dict[str, Parameter], study: str) -> None:
    for name in names:
        if name not in declared:
            nearest = get_close_matches(name, declared, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            listing = "\n  ".join(map(str, declared.values()))
            raise ParameterError(f"{study} has no parameter {name!r}.{hint} Its parameters:\n  {listing}")


def _injected_names(namespace: Mapping[str, Any]) -> list[str]:
    """Names that papermill set, known or not: it runs them in a cell of its own that begins `# Parameters`.

    Everything else in the namespace may be the reader's own and is none of our business, so that cells can be run
    again in any order. Of several such cells the last counts: a reader may have mended it and run it again.
    """
    injected = [s for s in namespace.get("In", []) if isinstance(s, str) and s.startswith("# Parameters\n")]
    if not injected:
        return []
    try:
        nodes = ast.parse(injected[-1]).body
    except SyntaxError:  # it never ran
        return []
    targets = [target for node in nodes if isinstance(node, ast.Assign) for target in node.targets]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _typed(parameter: Parameter, value: Any) -> Any:
    if parameter.type is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    # papermill and the shell take a single count for an integer; where the default is counts, it is text all the same.
    if _COUNTS.fullmatch(str(parameter.default)) and parameter.type is str and type(value) is int:
        return str(value)
    if type(value) is not parameter.type:
        raise ParameterError(
            f"parameter {parameter.name!r} is {value!r} ({type(value).__name__}); accepted: {parameter.type.__name__}, "
            f"for example {parameter.default!r}  # {parameter.help}"
        )
    return value


def _print_banner(run: Run, declared: dict[str, Parameter]) -> None:
    import torch

    facts = provenance(run.device)
    width = max(map(len, declared), default=0)
    for name, value in run.parameters.items():
        changed = "" if value == declared[name].default else f"   (default {declared[name].default!r})"
        print(f"{'*' if changed else ' '} {name:<{width}} = {value!r}{changed}")
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    print(f"{facts['device']} ({run.device}), {torch.get_num_threads()} threads · {versions} · {commit_text(facts)}")
    print(f"writes to {run.outputs}", flush=True)


def commit_text(facts: Mapping[str, Any]) -> str:
    """The commit of a provenance, short, as people read it."""
    if not facts["git_commit"]:
        return "no git"
    return f"commit {facts['git_commit'][:10]}{' with local changes' if facts['dirty'] else ''}"
