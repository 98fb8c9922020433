"""The start of every notebook: its parameters are checked, its machine is named, its records are opened."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from flexq_core.workbook import figures, paths
from flexq_core.workbook.records import Measurement, Records, provenance

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
    _claims: list[tuple[str, bool, str]] = field(default_factory=list, repr=False)

    def progress(self, iterable: Iterable, *, desc: str, total: int | None = None) -> Iterator:
        """Iterate with a bar: a live one in Jupyter and on a terminal, a line now and then in a log."""
        from tqdm.auto import tqdm

        return iter(tqdm(iterable, desc=desc, total=total, mininterval=0.5, leave=False))

    def figure(self, figure: Any, name: str, *, caption: str) -> Path:
        """Save a figure as SVG and PNG under outputs/figures/<study>/<model>/ and return the SVG's path."""
        return figures.save(figure, self.outputs / "figures" / self.study / self._label(), name, caption=caption)

    def claim(self, text: str, holds: bool, detail: str = "") -> None:
        """State a claim and whether this run's records bear it out; `finish` fails the run if one does not hold."""
        self._claims.append((text, bool(holds), detail))

    def finish(self) -> None:
        """Record and print the claims. Raises ClaimFailedError if there is none, or one that does not hold."""
        claims = {f"claim/{text}": Measurement(float(holds), detail or "1") for text, holds, detail in self._claims}
        self.records.replace(
            model=str(self.parameters.get("model", "")),
            method="claims",
            parameters={"run": self.parameters},
            seed=int(self.parameters.get("seed", 0)),
            measured=claims,
        )
        for text, holds, detail in self._claims:
            print(f"{'holds' if holds else 'FAILS'}   {text}{f'   ({detail})' if detail else ''}")
        failed = [text for text, holds, _ in self._claims if not holds]
        if failed or not self._claims:
            raise ClaimFailedError("; ".join(failed) or "the notebook made no claim")

    def _label(self) -> str:
        return str(self.parameters.get("model", "all")).strip("/").replace("/", "--")


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

    Raises ParameterError where the cell is absent or a line is not `name: type = literal  # help`.
    """
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(c["source"]) for c in cells if "parameters" in c.get("metadata", {}).get("tags", [])]
    if len(sources) != 1:
        raise ParameterError(f"{notebook.name} has {len(sources)} cells tagged 'parameters'; accepted: one")
    return parse_parameters(sources[0], notebook.name)


def parse_parameters(source: str, where: str) -> dict[str, Parameter]:
    """Read a parameters cell; see `declared_parameters`."""
    parameters = {}
    lines = source.splitlines()
    for node in ast.parse(source).body:
        line = lines[node.lineno - 1]
        simple = isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None
        kind = _TYPES.get(ast.unparse(node.annotation)) if simple else None
        if kind is None or "#" not in line:
            raise ParameterError(
                f"{where}: {line!r} is not a parameter; accepted: name: {'|'.join(_TYPES)} = literal  # help"
            )
        name, help_text = node.target.id, line.rsplit("#", 1)[1].strip()
        parameters[name] = Parameter(name, kind, ast.literal_eval(node.value), help_text)
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
    again in any order.
    """
    names = []
    for source in namespace.get("In", []):
        if isinstance(source, str) and source.startswith("# Parameters\n"):
            targets = [node.targets for node in ast.parse(source).body if isinstance(node, ast.Assign)]
            names += [target.id for group in targets for target in group if isinstance(target, ast.Name)]
    return names


def _typed(parameter: Parameter, value: Any) -> Any:
    if parameter.type is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not parameter.type:
        raise ParameterError(
            f"parameter {parameter.name!r} is {value!r} ({type(value).__name__}); accepted: {parameter.type.__name__}, "
            f"for example {parameter.default!r}  # {parameter.help}"
        )
    return value


def _print_banner(run: Run, declared: dict[str, Parameter]) -> None:
    facts = provenance(run.device)
    changed = [f"{n}={v!r}" for n, v in run.parameters.items() if v != declared[n].default]
    commit = facts["git_commit"]
    state = "no git" if commit is None else commit[:10] + (" with local changes" if facts["dirty"] else "")
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    print(f"{run.study} · {', '.join(changed) or 'default parameters'}")
    print(f"{facts['device']} ({run.device}) · {versions} · {state}")
    print(f"records: {run.records.path}", file=sys.stdout, flush=True)
