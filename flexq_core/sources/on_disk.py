"""A model whose blocks stay on disk: its structure, what is not a block, and every block's tensors one block at a time.

Names and shapes of all tensors are checked when the folder is opened, from the files' headers, so that a missing one is told
before anything is computed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from flexq_core.files.names import place_tensors
from flexq_core.files.tensors import INDEX, TensorError, find_tensors, read_index, read_tensor
from flexq_core.quant.layers import decoder_blocks


class ModelOnDisk:
    """A causal language model that has everything but the weights of its blocks.

    folder: a transformers folder.  device: where it runs.  dtype: what its parameters are cast to.
    model: the transformers model; parameters of blocks are on the meta device, all others on `device`.
    Raises TensorError for weights that cannot be read (files/tensors.py) and for a tensor that is missing or has another shape,
    ValueError for a model without one list of blocks.
    """

    def __init__(self, folder: Path, *, device: str, dtype: torch.dtype) -> None:
        import transformers
        from accelerate import init_empty_weights

        self.folder, self._tensors = folder, find_tensors(folder)
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        # Buffers are made for real: those that no file holds (rotary frequencies) are computed by the constructor.
        with init_empty_weights(include_buffers=False):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        self.model = model.eval().requires_grad_(False)
        self.device = torch.device(device)
        self.blocks = decoder_blocks(model)
        places, parts = place_tensors(model, self._tensors)
        self._stored, self._made = {name: name for name in model.state_dict()} | places, set(parts.values())
        self._load_the_rest()

    def _load_the_rest(self) -> None:
        """Load what is in no block, and check that the blocks' tensors are there."""
        state = self.model.state_dict()
        in_blocks = {name for name in state if any(name.startswith(f"{block}.") for block in self.blocks)}
        present = [name for name in state if name not in in_blocks and self._stored[name] in self._tensors]
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
        for name in names:
            stored, shape = self._stored[name], list(state[name].shape)
            if name in self._made:
                raise TensorError(
                    f"the weights in {self.folder} hold {name!r} in several tensors, which transformers puts together when it "
                    "loads a whole model, and this one is read block by block: load all of it at once"
                )
            if stored not in self._tensors:
                home = read_index(self.folder).get(stored)
                raise TensorError(
                    f"the weights in {self.folder} lack the tensor {stored!r}"
                    + (f", which {INDEX} places in {home}" if home else "")
                    + ": a file was lost or config.json is of another model; copy or download them again"
                )
            file, found, _ = self._tensors[stored]
            if found != shape:
                raise TensorError(f"the tensor {stored!r} in {file} has shape {found}; the model's is {shape}")

    def _read(self, names: Iterable[str], state: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name in names:
            stored = self._stored[name]
            found[name] = read_tensor(self._tensors[stored][0], stored).to(self.device, state[name].dtype)
        return found
