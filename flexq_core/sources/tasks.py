"""Zero-shot tasks, run by the real lm-eval harness.

The six tasks of the paper come from the hub. `continuation` is made from the demo models' held-out text and needs no
network: which of four continuations follows?
"""

from __future__ import annotations

import json
import logging
import random
import re
import tempfile
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from flexq_core.sources import demo, local
from flexq_core.sources.shared_context import harness_model

_STOCK = {
    "piqa": "piqa/piqa.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
}
"""The paper's tasks → their definitions in the harness."""
_CONFIGURATIONS = {"winogrande": "winogrande_xl"}
"""Of those tasks whose clone from the hub holds several, the harness's."""
PAPER_TASKS = tuple(_STOCK)
CONTINUATION = "continuation"
TASKS = (CONTINUATION, *PAPER_TASKS)

CONTEXT_CHARACTERS = 400
ENDING_CHARACTERS = 60
CHOICES = 4

_CONTINUATION_YAML = """\
task: continuation
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {questions}
output_type: multiple_choice
validation_split: validation
doc_to_text: context
doc_to_choice: endings
doc_to_target: label
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


class TaskError(ValueError):
    """A task that is unknown or cannot be had; the message says what to do next."""


def require_tasks(names: list[str]) -> None:
    """Raise TaskError, naming the nearest one, unless every name is a task."""
    for name in names:
        if name not in TASKS:
            nearest = get_close_matches(name, TASKS, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise TaskError(f"no task is called {name!r}.{hint} Accepted: {', '.join(TASKS)}")


def continuation_questions(text: str, *, seed: int = 0) -> list[dict[str, Any]]:
    """Multiple-choice questions from running text: a context, the ending that follows it, and three that do not.

    text: prose.  Returns rows of {context, endings (4), label}. Endings start and stop at words, and the wrong
    ones follow other contexts of the same text, so that nothing but the context tells them apart.
    """
    pieces = []
    for paragraph in re.split(r"\n\s*\n", text):
        words = " ".join(paragraph.split())
        if len(words) >= CONTEXT_CHARACTERS // 2 + ENDING_CHARACTERS:
            start = words.rfind(" ", 0, len(words) - ENDING_CHARACTERS)
            pieces.append((words[max(0, start - CONTEXT_CHARACTERS) : start], words[start:]))
    chooser = random.Random(seed)
    questions = []
    for context, ending in pieces:
        others = sorted({other for _, other in pieces} - {ending})
        endings = chooser.sample(others, CHOICES - 1)
        label = chooser.randrange(CHOICES)
        endings.insert(label, ending)
        questions.append({"context": context, "endings": endings, "label": label})
    return questions


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    names: list[str],
    *,
    limit: int = 0,
    batch_size: int = 16,
    data_dir: str = "",
    seed: int = 0,
) -> dict[str, tuple[float, int]]:
    """Zero-shot accuracy by task, through lm-eval.

    model, tokenizer: a transformers causal language model and its tokenizer.  names: from `TASKS`.
    limit: questions a task at most, 0 for all.  data_dir: a folder that holds the paper's tasks (see sources/local.py);
    empty for the hub.
    Returns task → (accuracy in [0, 1], questions scored). Raises TaskError for an unknown task, or data that cannot be had.
    """
    require_tasks(names)
    from datasets.exceptions import DatasetGenerationError
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # before its model is made, of which it says what is meant so
    with tempfile.TemporaryDirectory(prefix="flexq-tasks-") as folder:
        for name in names:
            if name == CONTINUATION:
                _write_continuation(Path(folder), seed)
            else:
                _write_stock(Path(folder), name, data_dir)
        manager = TaskManager(verbosity="ERROR", include_path=folder, include_defaults=False)
        try:
            results = simple_evaluate(
                model=harness_model(model, tokenizer, batch_size=batch_size),
                tasks=names,
                num_fewshot=0,
                limit=limit or None,
                bootstrap_iters=0,
                task_manager=manager,
                random_seed=seed,
                log_samples=False,
                verbosity="ERROR",
            )
        except (DatasetGenerationError, OSError) as error:  # no network among them
            raise TaskError(
                f"cannot load the tasks {', '.join(names)}: {error}. Connect once so that they are cached, give a folder that "
                f"holds them as data_dir, or use tasks={CONTINUATION}, which needs no network"
            ) from error
    return {name: (results["results"][name]["acc,none"], results["n-samples"][name]["effective"]) for name in names}


def require_local_tasks(names: list[str], data_dir: str) -> None:
    """Raise TaskError, naming what would do, unless the folder holds every one of these that is not embedded."""
    for name in names if data_dir else []:
        if name != CONTINUATION:
            _local_files(name, data_dir)


def data_sha256(name: str, data_dir: str = "") -> str:
    """What identifies a task's questions: a digest of the embedded text or of a folder's files; empty for the hub's."""
    if name == CONTINUATION:
        return demo.held_out_text().sha256
    if not data_dir:
        return ""
    return local.sha256(_local_files(name, data_dir)[0])


def _local_files(name: str, data_dir: str) -> tuple[list[Path], str]:
    try:
        # The splits that the harness scores: the others' test splits have no answers.
        splits = ("test", "validation") if name.startswith("arc") else ("validation",)
        return local.find_split(data_dir, name, splits, configuration=_CONFIGURATIONS.get(name, ""))
    except local.LocalDataError as error:
        raise TaskError(str(error)) from error


def _write_stock(folder: Path, name: str, data_dir: str) -> None:
    """The harness's own task by an include; from local files, what says where its data come from is replaced."""
    import lm_eval.tasks
    import yaml

    definition: dict[str, Any] = {"include": str(Path(lm_eval.tasks.__file__).parent / _STOCK[name]), "task": name}
    if data_dir:
        files, _ = _local_files(name, data_dir)
        arguments = local.builder_arguments(files, "validation")
        definition |= {
            "dataset_path": arguments["path"],
            "dataset_name": None,
            "dataset_kwargs": {"data_files": arguments["data_files"]},
            "training_split": None,
            "validation_split": "validation",
            "test_split": None,
        }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(definition), encoding="utf-8")


def _write_continuation(folder: Path, seed: int) -> None:
    questions = folder / "continuation.jsonl"
    rows = continuation_questions(demo.held_out_text().text, seed=seed)
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "continuation.yaml").write_text(
        _CONTINUATION_YAML.format(questions=json.dumps(str(questions))), encoding="utf-8"
    )
