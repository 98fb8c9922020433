"""Documentation English that every machine has: docstrings of installed packages, and the Python language's topics.

Files are parsed, never imported. The text changes with the versions installed, so whoever uses it records its digest.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

TRAINING_PACKAGES = (
    "accelerate", "datasets", "huggingface_hub", "joblib", "matplotlib", "networkx", "nltk", "numpy", "pandas",
    "peft", "PIL", "pyarrow", "scipy", "sklearn", "sympy", "torch", "transformers",
)  # fmt: skip
"""Packages whose docstrings the demo models are trained on, with the standard library."""

HELD_OUT_PACKAGES = (
    "seaborn",
    "lm_eval",
    "papermill",
    "nbconvert",
    "nbformat",
    "jupyter_server",
    "traitlets",
)
"""Packages that no demo model has seen: calibration text."""

_SHORTEST = 40  # characters of a paragraph worth reading
_PROSE = re.compile(r"[a-z]{2,}[ ,.]+[a-z]{2,}")


def package_docstrings(package: str) -> Iterator[str]:
    """The docstrings and long prose strings of an installed package or of `stdlib`, in file order.

    Raises importlib.metadata.PackageNotFoundError where the package is not installed.
    """
    if package == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [
            path for path in root.rglob("*.py") if not {"site-packages", "test", "tests", "idlelib"} & {*path.parts}
        ]
        files = [path for path in files if path.parent.name != "pydoc_data"]
    else:
        root = Path(sysconfig.get_paths()["purelib"]) / package
        if not root.is_dir():
            raise importlib.metadata.PackageNotFoundError(package)
        files = list(root.rglob("*.py"))
    for path in sorted(files):
        yield from file_docstrings(path)


def file_docstrings(path: Path) -> Iterator[str]:
    """Docstrings of one file, and string arguments that read like them (torch's `add_docstr`, NumPy's `add_newdoc`)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):  # templates and files of other Python versions
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node):
                yield text
        elif isinstance(node, ast.Call):
            for argument in node.args:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str) and len(argument.value) > 200:
                    yield inspect.cleandoc(argument.value)


def paragraphs(text: str) -> Iterator[str]:
    """Blocks between blank lines that hold prose, with trailing space removed."""
    for block in re.split(r"\n[ \t]*\n", text):
        block = "\n".join(line.rstrip() for line in block.strip("\n").splitlines())
        if len(block) >= _SHORTEST and _PROSE.search(block):
            yield block


def fingerprint(paragraph: str) -> bytes:
    """What two paragraphs share when they differ in spacing and case only."""
    return hashlib.sha1(" ".join(paragraph.lower().split()).encode("utf-8", "replace"), usedforsecurity=False).digest()


def documents(packages: Iterable[str], *, without: Iterable[str] = ()) -> list[str]:
    """Docstrings of these packages with repeated paragraphs dropped, in a fixed order.

    without: texts none of whose paragraphs, nor sentences of 60 characters and more, may appear.
    """
    banned_text = list(without)
    seen = {fingerprint(p) for text in banned_text for p in paragraphs(text)}
    banned = {fingerprint(s) for text in banned_text for s in _sentences(text)}
    kept = []
    for package in packages:
        for docstring in package_docstrings(package):
            fresh = []
            for paragraph in paragraphs(docstring):
                key = fingerprint(paragraph)
                if key in seen or any(fingerprint(s) in banned for s in _sentences(paragraph)):
                    continue
                seen.add(key)
                fresh.append(paragraph)
            if fresh:
                kept.append("\n\n".join(fresh))
    return kept


def language_topics() -> str:
    """The Python language's documentation as `help()` shows it, topic after topic in sorted order."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def _sentences(text: str) -> Iterator[str]:
    for sentence in re.split(r"(?<=[.:!?])\s+", " ".join(text.split())):
        if len(sentence) >= 60:
            yield sentence
