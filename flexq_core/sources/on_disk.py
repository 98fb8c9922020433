"""A model whose blocks stay on disk: its structure, what is not a block, and every block's tensors one block at a time.

Only safetensors folders are read, in one file or in shards by `model.safetensors.index.json`. Names and shapes of all tensors
are checked when the folder is opened, from the files' headers, so that a missing one is told before anything is computed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flexq_core.quant.layers import decoder_blocks

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class TensorError(ValueError):
    """Tensors that are absent, of another shape or unreadable; the message names the tensor and the file."""


class TensorFiles:
    """The tensors of a safetensors folder, by name; each is read when it is asked for.

    folder: holds `model.safetensors`, or shards and their index.
    Raises TensorError where it holds neither, or a file that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        single, index = folder / SINGLE, folder / INDEX
        if single.is_file():
            self._file_of = dict.fromkeys(_open(single).keys(), single)
        elif index.is_file():
            try:
                names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                self._file_of = {name: folder / file for name, file in names.items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise TensorError(f"{index} is not an index of tensors: {error!r}") from error
        else:
            raise TensorError(f"the folder {str(folder)!r} holds neither {SINGLE} nor {INDEX}")

    def require(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise TensorError unless each of these tensors is there, in its file and with this shape."""
        opened: dict[Path, Any] = {}
        for name, shape in shapes.items():
            if name not in self._file_of:
                raise TensorError(f"the weights in {str(self.folder)!r} lack the tensor {name!r}")
            file = self._file_of[name]
            if file not in opened:
                opened[file] = _open(file)
            try:
                found = tuple(opened[file].get_slice(name).get_shape())
            except Exception as error:  # safetensors has one error for all, which is no public class everywhere
                raise TensorError(f"{file} lacks the tensor {name!r}, which the index places there: {error}") from error
            if found != shape:
                raise TensorError(f"the tensor {name!r} in {file} has shape {found}; the model's is {shape}")

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def read(self, name: str) -> Tensor:
        """The tensor in this machine's memory, in the type it is stored in."""
        return _open(self._file_of[name]).get_tensor(name)


def _open(file: Path) -> Any:
    from safetensors import safe_open

    try:
        return safe_open(file, framework="pt")
    except Exception as error:
        raise TensorError(f"cannot read {file}: {error}; fetch it again") from error


class ModelOnDisk:
    """A causal language model that has everything but the weights of its blocks.

    config: its transformers configuration.  files: its tensors.  device: where it runs.  dtype: what its parameters are cast to.
    model: the transformers model; parameters of blocks are on the meta device, all others on `device`.
    Raises TensorError for a tensor that is missing or has another shape, ValueError for a model without one list of blocks.
    """

    def __init__(self, config: Any, files: TensorFiles, *, device: str, dtype: torch.dtype) -> None:
        import transformers
        from accelerate import init_empty_weights

        # Buffers are made for real: those that no file holds (rotary frequencies) are computed by the constructor.
        with init_empty_weights(include_buffers=False):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        self.model = model.eval().requires_grad_(False)
        self.device, self._files = torch.device(device), files
        self.blocks = decoder_blocks(model)
        self._stored = self._names_in_files()
        self._load_the_rest()

    @classmethod
    def open(cls, folder: Path, *, device: str, dtype: torch.dtype) -> ModelOnDisk:
        """Open a transformers folder."""
        import transformers

        config = transformers.AutoConfig.from_pretrained(folder)
        return cls(config, TensorFiles(folder), device=device, dtype=dtype)

    def _names_in_files(self) -> dict[str, str]:
        """Name in the model → name in the files, which lack the prefix where they were saved from the model without its head."""
        prefix = f"{self.model.base_model_prefix}."
        stored = {}
        for name in self.model.state_dict():
            bare = name.removeprefix(prefix)
            stored[name] = bare if name not in self._files and bare in self._files else name
        return stored

    def _load_the_rest(self) -> None:
        """Load what is in no block, and check that the blocks' tensors are there."""
        state = self.model.state_dict()
        in_blocks = {name for name in state if any(name.startswith(f"{block}.") for block in self.blocks)}
        present = [name for name in state if name not in in_blocks and self._stored[name] in self._files]
        self._require(in_blocks.union(present), state)
        self.model.load_state_dict(self._read(present, state), strict=False, assign=True)
        self.model.tie_weights()
        rest = {name: p for name, p in self.model.named_parameters() if name not in in_blocks}
        self._require((name for name, parameter in rest.items() if parameter.is_meta), state)
        for name, module in self.model.named_modules():
            if not any(f"{name}.".startswith(f"{block}.") for block in self.blocks):
                for buffer, value in module.named_buffers(recurse=False):
                    module._buffers[buffer] = value.to(self.device)
        self.model.requires_grad_(False)

    def block(self, name: str) -> nn.Module:
        """The block of this name with its weights, on the device; the one in `model` stays without."""
        block = copy.deepcopy(self.blocks[name])
        state = block.state_dict(prefix=f"{name}.")
        tensors = self._read(state, state)
        block.load_state_dict({key.removeprefix(f"{name}."): value for key, value in tensors.items()}, assign=True)
        return block.to(self.device).eval().requires_grad_(False)

    def _require(self, names: Iterable[str], state: dict[str, Tensor]) -> None:
        self._files.require({self._stored[name]: tuple(state[name].shape) for name in names})

    def _read(self, names: Iterable[str], state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._files.read(self._stored[name]).to(self.device, state[name].dtype) for name in names}
