"""The code that decides a study's numbers, as one digest: what other code has measured is computed anew.

What a study imports of this package counts, directly or not, and the kernels of the machine's kind. Not so what compares,
checks and draws (`*_claims`, `*_compared`), command lines, this folder, and what is written for readers: comments and docstrings.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import io
import json
import re
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

from flexq_core.workbook import paths

_PACKAGE = "flexq_core"
_UNCOUNTED = re.compile(r"flexq_core|flexq_core\.workbook\b.*|.*(_claims|_compared|\.__main__)")
_OF_OTHER_KIND = {"cuda": re.compile(r".*\.cpu"), "cpu": re.compile(r".*(\.cuda|_gpu)")}

_STRINGS_AND_COMMENTS = re.compile(
    r""" ("(?:\\.|[^"\\\n])*" | (?<!\w)'(?:\\.|[^'\\\n])*') | //[^\n]* | /\*.*?\*/ """, re.VERBOSE | re.DOTALL
)


def source_digest(study: str, card: str = "") -> str:
    """Digest of the code that decides a study's numbers.

    study: a notebook's name.  card: the GPU's name, empty for a processor, of which kernels and what calls them count alone.
    What `auto` takes on a card decides the numbers of every study that runs models there, so that the rows that it asks count
    (runtime/auto.py); 03_kernels names each backend, and finds the rows out. The demo models' weights are left out: a model's
    fingerprint is among a study's parameters.
    """
    from flexq_core.runtime import auto

    kind, stem = "cuda" if card else "cpu", study.split("_", 1)[-1]
    kernels = (path for path in (paths.KERNELS / kind).rglob("*") if path.is_file())
    digest = hashlib.sha256()
    for file in sorted([*_modules(stem, kind), *kernels]):
        digest.update(f"{file.relative_to(paths.ROOT)}\0{_read(file)[0]}\0".encode())
    if card and stem != "kernels":
        digest.update(json.dumps(auto.rows_for(card), sort_keys=True).encode())
    return digest.hexdigest()


def _modules(stem: str, kind: str) -> set[Path]:
    """The files of a study and of all that they import and that counts."""
    studies = paths.ROOT / _PACKAGE / "studies"
    own = [studies / f"{stem}.py", *(studies / stem).rglob("*.py")]
    waiting = [".".join(file.relative_to(paths.ROOT).with_suffix("").parts) for file in own]
    seen, files = set(waiting), set()
    while waiting:
        name = waiting.pop()
        file = _file(name)
        if file is None or _UNCOUNTED.fullmatch(name) or _OF_OTHER_KIND[kind].fullmatch(name):
            continue
        files.add(file)
        imported = _read(file)[1] - seen
        seen |= imported
        waiting += imported
    return files


def _file(module: str) -> Path | None:
    """Where a module of this package lies, or None for a name that is none."""
    path = paths.ROOT / Path(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _read(file: Path) -> tuple[str, frozenset[str]]:
    """The code of a file, and which of this package's names it imports; read once for each of its states."""
    facts = file.stat()
    return _read_once(file, facts.st_ino, facts.st_size, facts.st_mtime_ns)


@functools.cache
def _read_once(file: Path, *_state: int) -> tuple[str, frozenset[str]]:
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        tree = ast.parse(text)
        return _lines(_python_code(text, tree)), frozenset(_imported(tree))
    return _lines(_STRINGS_AND_COMMENTS.sub(lambda found: found[1] or " ", text).splitlines()), frozenset()


def _lines(lines: Iterable[str]) -> str:
    """Without the ends and the empty lines that comments leave."""
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _python_code(text: str, tree: ast.Module) -> Iterator[str]:
    """Lines without comments and without strings that stand alone, the same in every release of Python."""
    lines = text.splitlines()
    for kind, _, (row, column), _, _ in tokenize.generate_tokens(io.StringIO(text).readline):
        if kind == tokenize.COMMENT:
            lines[row - 1] = lines[row - 1][:column]
    alone = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            alone.update(range(node.lineno, node.end_lineno + 1))
    return (line for number, line in enumerate(lines, 1) if number not in alone)


def _imported(tree: ast.AST) -> Iterator[str]:
    """Names of this package that code imports, at its top or within functions, but for annotations alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            names = []
            yield from _imported(node)
        yield from (name for name in names if name.split(".")[0] == _PACKAGE)
