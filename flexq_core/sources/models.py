"""Models by name: the embedded demo models, the paper's, any hub id, any local folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flexq_core.sources.architectures import ARCHITECTURES
from flexq_core.sources.demo import DEMO_MODELS, demo_path
from flexq_core.sources.on_disk import ModelOnDisk

HUB_MODELS = {name: architecture.hub_id for name, architecture in ARCHITECTURES.items()}
"""Short names of the paper's models → hub ids."""


class ModelError(RuntimeError):
    """A model that is unknown or cannot be had; the message says what to do next."""


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model, ready to run, with what identifies it.

    name: as it was asked for.  fingerprint: sha256 of the demo model's or folder's weights, or the hub commit.
    context_length: tokens the model was trained on at once.
    load_block: for a model whose blocks are on disk: a block's name → the block with its weights, ready to run; else None.
    """

    name: str
    model: Any
    tokenizer: Any
    fingerprint: str
    context_length: int
    load_block: Callable[[str], nn.Module] | None = None

    @property
    def is_demo(self) -> bool:
        return self.name in DEMO_MODELS

    @property
    def inputs(self) -> dict[str, str]:
        """What decides the model's numbers, as a record's parameters: fingerprint and dtype."""
        return {"fingerprint": self.fingerprint, "dtype": str(self.model.dtype).removeprefix("torch.")}


def known_models() -> tuple[str, ...]:
    """Names that need no hub id: the demo models first."""
    return (*DEMO_MODELS, *HUB_MODELS)


def locate_model(name: str) -> str:
    """The local folder or hub id that `name` means; ModelError names the nearest known one. Nothing is loaded."""
    if name in DEMO_MODELS:
        return str(demo_path(name))
    if name in HUB_MODELS:
        return HUB_MODELS[name]
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"the folder {name!r} holds no config.json: it is not a transformers model")
        return str(folder)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not folder.exists():
        return name
    nearest = get_close_matches(name, known_models(), n=1, cutoff=0.4)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise ModelError(
        f"no model is called {name!r}.{hint} Accepted: {', '.join(known_models())}, a hub id (owner/name), "
        "or a local folder"
    )


def load_model(
    name: str, *, device: str = "cpu", dtype: torch.dtype | None = None, blocks_on_disk: bool = False
) -> LoadedModel:
    """Load a model and its tokenizer for inference.

    name: a known name, a hub id or a local folder.  device: where it goes.  dtype: float32 on a CPU and float16 on
    a GPU unless given.  blocks_on_disk: leave the weights of its blocks on disk, for `load_block` to fetch; on the model
    itself they are then on the meta device.
    Raises ModelError, with the next step, for an unknown name, no network, a gated or absent repository, or files
    that are not a causal language model. Only safetensors weights are read: pickled ones could run code.
    """
    import transformers

    place = locate_model(name)
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.float16
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place)
        if blocks_on_disk:
            on_disk = ModelOnDisk.open(place, device=device, dtype=dtype)
            model = on_disk.model
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=dtype, use_safetensors=True)
    except Exception as error:  # transformers raises OSError, ValueError and others for the same causes
        raise ModelError(_explain(name, place, error)) from error
    config = model.config
    return LoadedModel(
        name=name,
        model=model if blocks_on_disk else model.to(device).eval(),
        tokenizer=tokenizer,
        fingerprint=_fingerprint(place, config),
        context_length=DEMO_MODELS[name].context_length if name in DEMO_MODELS else config.max_position_embeddings,
        load_block=on_disk.block if blocks_on_disk else None,
    )


def random_model(
    name: str, *, device: str = "cpu", dtype: torch.dtype | None = None, layers: int = 0, seed: int = 0
) -> LoadedModel:
    """A model of the shape of `name` with random weights, for measuring time and memory; it has no tokenizer.

    name: a demo model, a model of `ARCHITECTURES` (nothing is downloaded), or a local folder.  dtype: as `load_model`.
    layers: build this many blocks only; 0 builds all.
    Raises ModelError for a name whose shape is not known here, or a folder that is no model.
    """
    import transformers

    place = locate_model(name)
    if name in ARCHITECTURES:
        config = ARCHITECTURES[name].config()
    elif Path(place).is_dir():
        try:
            config = transformers.AutoConfig.from_pretrained(place)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(f"cannot read the shape of {name!r} from its config.json: {reason}") from error
    else:
        raise ModelError(
            f"the shape of {name!r} is not known here, so it cannot be built with random weights; accepted: "
            f"{', '.join(known_models())}, or a local folder with its config.json"
        )
    if layers:
        config.num_hidden_layers = min(layers, config.num_hidden_layers)
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.float16
    # Made where it will live: a 13B model need not pass through this machine's memory.
    with torch.random.fork_rng(devices=[] if torch.device(device).type == "cpu" else None), torch.device(device):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return LoadedModel(
        name=name,
        model=model.eval().requires_grad_(False),
        tokenizer=None,
        fingerprint=f"random:{config.model_type}:{hashlib.sha256(config.to_json_string().encode()).hexdigest()[:16]}:{seed}",
        context_length=config.max_position_embeddings,
    )


def _fingerprint(place: str, config: Any) -> str:
    folder = Path(place)
    if not folder.is_dir():
        return f"{place}@{getattr(config, '_commit_hash', None) or 'unknown'}"
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"


def _explain(name: str, place: str, error: Exception) -> str:
    """One sentence of cause and one of next step for what transformers raised."""
    chain, cause = [], error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    kinds = {type(link).__name__ for link in chain}
    text = " ".join(str(link) for link in chain)
    if "GatedRepoError" in kinds or "gated repo" in text:
        step = (
            "it is gated: accept its licence on its hub page, log in with `hf auth login` or set HF_TOKEN, and run "
            "again; or give a local snapshot's folder as the model (env/README.md)"
        )
    elif "RepositoryNotFoundError" in kinds or "is not a valid model identifier" in text:
        step = "the hub has no such repository, or it is private: check the id, or log in with `hf auth login`"
    elif Path(place).is_dir():
        step = f"the folder is not a complete causal language model with safetensors weights ({error})"
    elif kinds & {
        "ConnectionError",
        "ConnectTimeout",
        "ConnectError",
        "LocalEntryNotFoundError",
        "OfflineModeIsEnabled",
    }:
        step = (
            "the hub cannot be reached and the model is not in the local cache: connect, or give the folder of a "
            "snapshot downloaded elsewhere as the model (env/README.md), or use demo-llama, which needs no network"
        )
    else:
        step = str(error)
    return f"cannot load the model {name!r} ({place}): {step}"
