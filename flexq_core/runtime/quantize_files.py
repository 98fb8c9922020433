"""From a model's files to a 6-bit checkpoint, file by file: the model itself is never in memory.

A tensor is read, quantised in blocks of rows and let go, so that what is held is the output of one file. Everything is
written to `<out>.partial`, each file under another name until it is complete, and config.json last; the folder then gets its
name. Whoever finds `<out>` finds all of it, and a run that was killed goes on with the files it had finished.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from flexq_core.files.names import place_tensors
from flexq_core.files.tensors import (
    BESIDE_WEIGHTS,
    INDEX,
    SINGLE_FILE,
    find_tensors,
    headers,
    read_tensor,
    write_tensors,
)
from flexq_core.quant.packing import packed_bytes
from flexq_core.quant.plan import LayerPrecision, PrecisionPlan
from flexq_core.quant.quantize import dequantize, quantize_weight, require_scales
from flexq_core.quant.spec import TEXTLESS_SCALES, group_count
from flexq_core.runtime.checkpoint import empty_model, require_tensors, verify_shard
from flexq_core.runtime.checkpoint_format import (
    METHOD,
    VERSION,
    CheckpointError,
    checkpoint_errors,
    checksums,
    metadata,
    read_config,
    read_metadata,
)
from flexq_core.runtime.convert import resolve_plan
from flexq_core.runtime.linear import packed_parameters

_ELEMENTS = 2**20
"""Of a weight that a thread quantises at once: float32 copies of them stay in its caches."""


@dataclass(frozen=True)
class Written:
    """What `quantize_files` wrote.

    folder: the checkpoint.  sqnr_db: layer → signal-to-noise ratio of its weight, in dB (infinite where nothing was lost).
    layer_bytes, original_bytes: of the quantised layers' weights, now (with scales) and before.
    left_out: tensors of the original that its model does not use.
    """

    folder: Path
    plan: PrecisionPlan
    sqnr_db: Mapping[str, float]
    layer_bytes: int
    original_bytes: int
    left_out: tuple[str, ...]


@checkpoint_errors()
def quantize_files(
    source: Path,
    out: Path,
    plan: PrecisionPlan | str | Path = "flexq",
    *,
    scales: str = "absmax",
    name: str = "",
    progress: bool = False,
) -> Written:
    """Write the 6-bit checkpoint of the model in `source` to the folder `out`.

    source: a transformers folder with safetensors weights.  out: absent or empty, and no link or mount point.
    plan: as for `quantize_model`.
    scales: how weights' scales are chosen, `absmax` or `mse` (quant/scales.py).  name: of the model, for the card.
    progress: show a bar, one step a tensor.
    Raises CheckpointError for a source that is incomplete, pickled, quantised or no causal language model, for an `out` that
    is taken, and where the disk is full; PlanError for a plan that does not fit; ValueError for a tensor that is not
    finite (names it). What was finished before is kept in `<out>.partial` for the next run.
    """
    source, out = source.resolve(), out.absolute()
    require_free(out)
    work = _Work.of(source, plan, scales)
    partial = out.with_name(f"{out.name}.partial")
    with _locked(partial), _clear_when_full(partial), _a_thread_for_each_block() as pool:
        require_free(out)  # another run may have finished since
        finished = {file: saved for file in work.files if (saved := work.finished(file, partial)) is not None}
        _discard(partial, keep={file.name for file in finished})
        _require_space(partial, sum(work.bytes_of(file) for file in work.files if file not in finished))
        with tqdm(total=len(work.tensors), desc="quantise", unit="tensor", disable=not progress) as bar:
            for file in work.files:
                if file in finished:
                    bar.update(len(work.names_in(file)))
                else:
                    finished[file] = work.write(file, partial, bar, pool)
        written = work.summary(out, finished.values())
        _write_others(source, partial, work, written, name or source.name)
        for file in (*partial.iterdir(), partial):
            _sync(file)
        os.replace(partial, out)
        _sync(out.parent)
    return written


@dataclass(frozen=True)
class _Work:
    """What is to be done.

    config: of the original.  model: without weights.
    tensors: the model's name of a tensor → (its file, its name there, shape, type). What transformers makes one of several
    keeps the files' names.
    left_out: tensors of the files that the model has no place for.
    """

    config: Mapping[str, Any]
    model: nn.Module
    plan: PrecisionPlan
    scales: str
    tensors: Mapping[str, tuple[Path, str, list[int], str]]
    left_out: tuple[str, ...]

    @classmethod
    def of(cls, source: Path, plan: PrecisionPlan | str | Path, scales: str) -> _Work:
        """Read config.json and the files' headers; raises as `quantize_files` for a source or a plan that does not fit."""
        require_scales(scales, TEXTLESS_SCALES)
        config = read_config(source)
        if config.get("quantization_config"):
            method = config["quantization_config"].get("quant_method")
            raise CheckpointError(f"{source} is quantised already (quant_method {method!r}): start from the original")
        model = empty_model(source)
        plan = resolve_plan(plan, model)
        found = find_tensors(source)
        places, parts = place_tensors(model, found)
        place = {part: part for part in parts} | {stored: name for name, stored in places.items()}
        tensors = {
            place[stored]: (file, stored, shape, dtype)
            for stored, (file, shape, dtype) in found.items()
            if stored in place
        }
        left_out = [stored for stored in found if stored not in place]
        require_tensors(model, {name: (file, shape, dtype) for name, (file, _, shape, dtype) in tensors.items()}, parts)
        if made := [layer for layer in plan.layers if f"{layer}.weight" not in tensors]:
            raise CheckpointError(
                f"{source} holds the weights of {len(made)} layers in other tensors, of which transformers makes them, first "
                f"{made[0]!r}: quantise it by from_pretrained(..., quantization_config=FlexQConfig(...)) and save_pretrained"
            )
        return cls(config, model, plan, scales, tensors, tuple(left_out))

    @property
    def files(self) -> list[Path]:
        """The files that hold tensors of the model, in order."""
        return sorted({file for file, *_ in self.tensors.values()})

    def names_in(self, file: Path) -> list[str]:
        return [name for name, (home, *_) in self.tensors.items() if home == file]

    def precision(self, name: str) -> LayerPrecision | None:
        """Of the layer whose weight this tensor is; None for what is copied."""
        layer, _, leaf = name.rpartition(".")
        return self.plan.layers.get(layer) if leaf == "weight" else None

    def bytes_of(self, file: Path, *, layers_only: bool = False) -> int:
        """Of what a file becomes, without its header; `layers_only` counts quantised weights alone."""
        total = 0
        for name in self.names_in(file):
            _, _, shape, dtype = self.tensors[name]
            if bits := self.precision(name):
                groups = group_count(shape[1], self.plan.group_size)
                total += shape[0] * (packed_bytes(groups * self.plan.group_size, bits.weight_bits) + 2 * groups + 1)
            elif not layers_only:
                total += math.prod(shape) * _width(dtype)
        return total

    def inputs(self, file: Path) -> dict[str, str]:
        """What decides the bytes of the file that this one becomes."""
        with file.open("rb") as stream:
            return {
                "file": hashlib.file_digest(stream, "sha256").hexdigest(),
                "scales": self.scales,
                "plan": hashlib.sha256(self.plan.to_json().encode()).hexdigest(),
                "config": hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest(),
            }

    def finished(self, file: Path, partial: Path) -> dict[str, Any] | None:
        """What an earlier run wrote about this file, if it made all of it from the same inputs, else None."""
        try:
            saved = verify_shard(partial / file.name)
            same = saved.get("inputs") == self.inputs(file) and saved.get("version") == VERSION
            return saved if same else None
        except CheckpointError:
            return None

    def write(self, file: Path, partial: Path, bar: tqdm, pool: ThreadPoolExecutor) -> dict[str, Any]:
        """Quantise one file; returns what its header says."""
        tensors: dict[str, Tensor] = {}
        sqnr_db: dict[str, float | None] = {}
        inputs = self.inputs(file)
        for name in self.names_in(file):
            tensor = read_tensor(file, self.tensors[name][1])
            bits, layer = self.precision(name), name.removesuffix(".weight")
            if bits is None:
                _require_finite(tensor, name, file)
                tensors[name] = tensor
            else:
                try:
                    packed, noise = _quantize(tensor, bits.weight_bits, self.plan.group_size, self.scales, pool)
                except ValueError as error:
                    raise ValueError(f"layer {layer!r}: {error}") from error
                tensors |= {f"{layer}.{part}": value for part, value in packed.items()}
                sqnr_db[layer] = noise
            del tensor
            bar.update()
        saved = {"version": VERSION, "inputs": inputs, "sqnr_db": sqnr_db}
        sha256 = checksums(tensors)
        unfinished = partial / f"{file.name}.tmp"
        write_tensors(unfinished, tensors, {"format": "pt", **metadata(sha256, **saved)})
        _sync(unfinished)
        os.replace(unfinished, partial / file.name)
        return {"sha256": sha256, **saved}

    def summary(self, out: Path, saved: Iterable[Mapping[str, Any]]) -> Written:
        """What was written, from the headers of all files."""
        sqnr_db = {layer: value for header in saved for layer, value in header["sqnr_db"].items()}
        weights = [self.tensors[f"{layer}.weight"] for layer in self.plan.layers]
        return Written(
            folder=out,
            plan=self.plan,
            sqnr_db={layer: math.inf if sqnr_db[layer] is None else sqnr_db[layer] for layer in self.plan.layers},
            layer_bytes=sum(self.bytes_of(file, layers_only=True) for file in self.files),
            original_bytes=sum(math.prod(shape) * _width(dtype) for _, _, shape, dtype in weights),
            left_out=self.left_out,
        )


def _require_finite(tensor: Tensor, name: str, file: Path) -> None:
    wrong = int(tensor.numel() - torch.isfinite(tensor).sum())
    if wrong:
        raise ValueError(
            f"{name!r} in {file} has {wrong} values that are not finite, of {tensor.numel()}: copy or download the file again, "
            "or take another model"
        )


def _width(dtype: str) -> int:
    """Bytes of an element of a safetensors type: BF16 → 2."""
    bits = "".join(filter(str.isdigit, dtype.partition("_")[0]))
    return int(bits or 8) // 8


def _quantize(
    weight: Tensor, bits: int, group_size: int, scales: str, pool: ThreadPoolExecutor
) -> tuple[dict[str, Tensor], float | None]:
    """A weight's packed tensors, and its SQNR in dB (None where nothing was lost)."""

    def block(first: int) -> tuple[dict[str, Tensor], float, float]:
        part = weight[first : first + rows]
        try:
            quantized = quantize_weight(part, bits=bits, group_size=group_size, scales=scales)
        except ValueError as error:
            raise ValueError(f"rows from {first}: {error}") from error
        part = part.float()
        signal, noise = (torch.linalg.vector_norm(x).item() ** 2 for x in (part, part - dequantize(quantized)))
        return packed_parameters(quantized), signal, noise

    rows = max(1, _ELEMENTS // weight.shape[1])
    blocks, signals, noises = zip(*pool.map(block, range(0, len(weight), rows)), strict=True)
    packed = {part: torch.cat([each[part] for each in blocks]) for part in blocks[0]}
    signal, noise = sum(signals), sum(noises)
    return packed, 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None


@contextmanager
def _a_thread_for_each_block() -> Iterator[ThreadPoolExecutor]:
    """As many blocks at once as torch would use threads, each on one: threads that share a block wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def _write_others(source: Path, partial: Path, work: _Work, written: Written, name: str) -> None:
    """Everything but the weights; config.json, without which nothing loads, last."""
    anew = {"config.json", "README.md"}
    for file in {file for pattern in BESIDE_WEIGHTS for file in source.glob(pattern)}:
        if file.is_file() and file.name not in anew and not file.name.endswith(".index.json"):
            shutil.copyfile(file, partial / file.name)
    if [file.name for file in work.files] != [SINGLE_FILE]:
        weight_map = {tensor: file.name for file in work.files for tensor, _, _ in headers(partial / file.name)}
        size = sum(work.bytes_of(file) for file in work.files)
        _write_json(partial / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))})
    (partial / "README.md").write_text(_card(name, written), encoding="utf-8")
    quantization = {"quant_method": METHOD, "format_version": VERSION, "plan": work.plan.to_dict()}
    _write_json(partial / "config.json", {**work.config, "quantization_config": quantization})


def _write_json(file: Path, content: dict[str, Any]) -> None:
    unfinished = file.with_name(f"{file.name}.tmp")
    unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, file)


def _card(name: str, written: Written) -> str:
    """The model card: how it was made, how to load it, and what each layer lost."""
    rows = "\n".join(
        f"| {layer} | {bits} | {written.sqnr_db[layer]:.1f} |" for layer, bits in written.plan.layers.items()
    )
    now_mib, before_mib = written.layer_bytes / 2**20, written.original_bytes / 2**20
    return f"""---
library_name: transformers
tags:
- flexq
- 6-bit
---

# {name}, 6-bit

The linear layers of {name}, quantised by plan `{written.plan.name}` (FlexQ, arXiv 2508.04405): their weights, in groups of
{written.plan.group_size}, take {now_mib:.1f} MiB with their scales, before {before_mib:.1f}. Everything else is the original's.
The header of each file of weights has the sha256 of its tensors.

```python
import flexq_core
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("folder")
model = flexq_core.load("folder")  # checks every tensor's sha256 first
```

Signal-to-quantisation-noise ratio of each layer's weight, measured when it was quantised:

| layer | precision | SQNR (dB) |
|:--|:--|--:|
{rows}
"""


def require_free(out: Path) -> None:
    """Raise CheckpointError for a place that a finished folder cannot be moved to."""
    if out.is_symlink() or out.resolve().is_mount():  # of "." the parent is itself
        kind = "link" if out.is_symlink() else "mount point"
        raise CheckpointError(f"{out} is a {kind}, whose place no folder can take; accepted: a folder within it")
    if _holds_checkpoint(out):
        raise CheckpointError(
            f"{out} holds a finished 6-bit checkpoint: use it (flexq_core.load), or give another folder, or delete it first"
        )
    if out.is_dir() and any(out.iterdir()):
        raise CheckpointError(f"{out} is not empty: give another folder, or delete it first")
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file; accepted: a folder that is absent or empty")


def _holds_checkpoint(folder: Path) -> bool:
    try:
        return (read_config(folder).get("quantization_config") or {}).get("quant_method") == METHOD
    except CheckpointError:
        return False


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Make the folder and hold it against another run."""
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make the folder {partial}: {error.strerror}") from error
    folder = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise CheckpointError(f"another run is writing {partial}: wait for it, or give another folder") from None
    try:
        yield
    except BaseException:
        with suppress(OSError):
            partial.rmdir()  # where nothing was written
        raise
    finally:
        os.close(folder)


def _discard(partial: Path, keep: set[str]) -> None:
    """Delete what an earlier run left, but for the files that are finished; nothing where anything is not a run's own."""
    left = [path for path in partial.iterdir() if path.name not in keep]
    weights = [path for path in left if _is_a_runs_weights(path)]
    others = [path for path in left if path not in weights]
    # A run writes other files when its weights are finished: without any they are somebody else's.
    finished = keep or any(path.suffix == ".safetensors" for path in weights)
    if foreign := [path for path in others if not (finished and _may_be_written(path))]:
        raise CheckpointError(
            f"{partial} holds {foreign[0].name}, which no run has made: move it away, or give another folder"
        )
    for path in (*others, *weights):  # in this order: what is left when that is interrupted is a run's own
        path.unlink()


def _is_a_runs_weights(path: Path) -> bool:
    if path.suffix != ".safetensors" or not path.is_file():
        return path.is_file() and path.name.endswith(".safetensors.tmp")
    try:
        return "inputs" in read_metadata(path)
    except CheckpointError:
        return False


def _may_be_written(path: Path) -> bool:
    written = path.with_suffix("") if path.suffix == ".tmp" else path
    return path.is_file() and any(written.match(pattern) for pattern in (*BESIDE_WEIGHTS, "README.md"))


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"the disk of {folder.parent} has {free / 2**20:.1f} MiB free, and {needed / 2**20:.1f} MiB are to be written: make "
            "room, or give a folder elsewhere"
        )


@contextmanager
def _clear_when_full(partial: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise CheckpointError(
            f"the disk of {partial} is full: make room and run the same command again; finished files are kept"
        ) from error


def _sync(path: Path) -> None:
    """Wait until what was written is on the disk, so that a name never comes before its content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
