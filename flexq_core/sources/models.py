"""Models by name: the embedded demo models, the paper's, any hub id, any local folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flexq_core.files.tensors import BESIDE_WEIGHTS
from flexq_core.sources import local
from flexq_core.sources.architectures import ARCHITECTURES
from flexq_core.sources.demo import DEMO_MODELS, demo_path
from flexq_core.sources.on_disk import ModelOnDisk

HUB_MODELS = {name: architecture.hub_id for name, architecture in ARCHITECTURES.items()}
"""Short names of the paper's models → hub ids."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""That the kernels take activations in."""

_ANSWER_S = 10
"""Seconds in which the hub has to answer whether it has a model: transformers, which asks for every file, tries each for half a
minute and more."""


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
    if folder.exists():
        raise ModelError(
            f"{name!r} is a file; accepted: the folder of a model, with its config.json and safetensors weights"
        )
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(
            f"there is no folder {str(folder.absolute())!r}: check the path, or give a model's name or hub id"
        )
    if name.count("/") == 1:
        return name
    nearest = get_close_matches(name, known_models(), n=1, cutoff=0.4)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise ModelError(
        f"no model is called {name!r}.{hint} Accepted: {', '.join(known_models())}, a hub id (owner/name), "
        "or a local folder"
    )


def model_folder(name: str) -> Path:
    """The folder with the files of the model `name`: downloaded first where it is on the hub, but never pickled weights.

    Raises ModelError, with the next step, as `load_model`.
    """
    place = locate_model(name)
    if Path(place).is_dir():
        return Path(place)
    import huggingface_hub

    patterns = ["model*.safetensors", *BESIDE_WEIGHTS]
    with _explained(name, place):
        source = _source(place)
        if source == place:
            source = huggingface_hub.snapshot_download(place, allow_patterns=patterns, ignore_patterns=["*/*"])
    folder = Path(source)
    if not any(folder.glob("model*.safetensors")):
        raise ModelError(
            f"the hub's {place} has no safetensors weights, and pickled ones, which can run code, are not read: convert it "
            "where you trust it (https://huggingface.co/spaces/safetensors/convert) and give the folder"
        )
    return folder


def load_model(
    name: str, *, device: str = "cpu", dtype: torch.dtype | None = None, blocks_on_disk: bool = False
) -> LoadedModel:
    """Load a model and its tokenizer for inference.

    name: a known name, a hub id or a local folder.  device: where it goes.  dtype: float32 on a CPU and float16 on
    a GPU unless given.  blocks_on_disk: leave the weights of its blocks on disk, for `load_block` to fetch; on the model
    itself they are then on the meta device.
    Raises ModelError, with the next step, for an unknown name, no network, a gated or absent repository, files that are
    not a causal language model, one that is quantised already, or a device or dtype that it cannot run in. Only safetensors
    weights are read: pickled ones could run code, and no code that a model brings is run.
    """
    import transformers

    place = locate_model(name)
    _require_device(device)
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.float16
    elif dtype not in _DTYPES:
        raise ModelError(f"dtype is {dtype!r}; accepted: {', '.join(map(str, _DTYPES))}")
    folder = model_folder(name) if blocks_on_disk else None
    with _explained(name, place):
        source = str(folder) if folder else place if Path(place).is_dir() else _source(place)
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    _require_unquantised(name, config)
    with _explained(name, place):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        if folder is not None:
            on_disk = ModelOnDisk(folder, device=device, dtype=dtype)
            model = on_disk.model
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, use_safetensors=True, trust_remote_code=False
            )
    config = model.config
    return LoadedModel(
        name=name,
        model=model if blocks_on_disk else _moved(name, model, device).eval(),
        tokenizer=tokenizer,
        fingerprint=_fingerprint(place),
        context_length=DEMO_MODELS[name].context_length if name in DEMO_MODELS else config.max_position_embeddings,
        load_block=on_disk.block if blocks_on_disk else None,
    )


def random_model(
    name: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    layers: int = 0,
    seed: int = 0,
    convert: Callable[[str, Any], Any] | None = None,
    keep: bool = True,
) -> LoadedModel:
    """A model of the shape of `name` with random weights, for measuring time and memory; it has no tokenizer.

    name: a demo model, a model of `ARCHITECTURES` (nothing is downloaded), or a local folder.  dtype: float32 on a CPU and
    float16 on a GPU unless given.  layers: build this many blocks only, or all if there are fewer; 0 builds all.
    seed: of the weights; a block's do not depend on the others.
    convert: (name, block) → what stands in the block's place, asked as soon as a block is made: of a model that is quantised
    so, one block at a time takes its full size.  keep: False makes each block anew whenever the model runs and holds none, so
    that a model of any size computes.
    Raises ModelError for a name whose shape is not known here, or a folder that is no model.
    """
    import transformers

    config = model_shape(name)
    count = config.num_hidden_layers = min(layers or config.num_hidden_layers, config.num_hidden_layers)
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.float16
    config.num_hidden_layers = 1  # the others are made as this one was
    with _seeded(seed, device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    config.num_hidden_layers, config.dtype = count, dtype
    for parameter in model.parameters():  # not buffers: rotary frequencies stay in float32
        parameter.data = parameter.data.to(dtype)
    place, blocks = next((n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m))
    kind = type(blocks[0])
    model.set_submodule(place, torch.nn.ModuleList())  # the one that showed the kind takes its full size
    del blocks

    def make(index: int) -> Any:
        # Made where it will live: a 13B model need not pass through this machine's memory.
        with _seeded(seed + 1 + index, device):
            block = kind(config, layer_idx=index).apply(model._init_weights)
        block = block.to(dtype).eval().requires_grad_(False)
        block = block if convert is None else convert(f"{place}.{index}", block)
        for part in block.modules():
            if "config" in vars(part):
                part.config = config  # converting may have copied it; what is set in one must hold for all
        return block

    made = torch.nn.ModuleList(make(index) for index in range(count)) if keep else _MadeAnew(make, count)
    model.set_submodule(place, made)
    described = hashlib.sha256(config.to_json_string().encode()).hexdigest()[:16]
    return LoadedModel(
        name=name,
        model=model,
        tokenizer=None,
        fingerprint=f"random:{config.model_type}:{described}:{seed}",
        context_length=config.max_position_embeddings,
    )


class _MadeAnew(torch.nn.ModuleList):
    """Blocks that exist while they are used."""

    def __init__(self, make: Callable[[int], Any], count: int) -> None:
        super().__init__()
        self._make, self._count = make, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Any]:
        return map(self._make, range(self._count))

    def __getitem__(self, index: Any) -> Any:
        return self if isinstance(index, slice) else self._make(index)


@contextmanager
def _seeded(seed: int, device: str) -> Iterator[None]:
    """Tensors are made on this device, at random but the same each time; what others draw is left as it was."""
    # Without a list torch warns where there are several.
    cards = 0 if torch.device(device).type == "cpu" else torch.cuda.device_count()
    with torch.random.fork_rng(devices=range(cards)), torch.device(device):
        torch.manual_seed(seed)
        yield


def model_shape(name: str) -> Any:
    """transformers' configuration of a model that can be built without its weights. Raises ModelError as `random_model`."""
    import transformers

    place = locate_model(name)
    if name in ARCHITECTURES:
        return ARCHITECTURES[name].config()
    if not Path(place).is_dir():
        raise ModelError(
            f"the shape of {name!r} is not known here, so it cannot be built with random weights; accepted: "
            f"{', '.join(known_models())}, or a local folder with its config.json"
        )
    try:
        return transformers.AutoConfig.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"cannot read the shape of {name!r} from its config.json: {reason}") from error


def _source(place: str) -> str:
    """Where a hub model comes from: the hub, or, where that gives no answer, the folder of the cache that holds it.

    Raises what the hub raises where the model is not in the cache either.
    """
    import huggingface_hub

    try:
        huggingface_hub.HfApi().model_info(place, timeout=_ANSWER_S)
    except Exception:  # errors of the hub have no common base, and after any of them the cache may hold the model
        folder = _cached_folder(place)
        if folder is None or not any(folder.glob("*.safetensors")):
            raise
        return str(folder)
    return place


def _cached_folder(place: str) -> Path | None:
    """The folder of the cache that holds a hub model's revision; it is named after the commit."""
    import huggingface_hub

    config = huggingface_hub.try_to_load_from_cache(place, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def _moved(name: str, model: Any, device: str) -> Any:
    try:
        return model.to(device)
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"the model {name!r} takes {model.get_memory_footprint() / 2**30:.1f} GiB, more than is free on {device}: score it "
            "block by block (-p layer_by_layer True of 02_accuracy), or make a 6-bit checkpoint, which needs no GPU "
            "(python -m flexq_core quantize)"
        ) from error


def _require_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # an AssertionError is a torch without CUDA
        available = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise ModelError(f"no model can be on the device {device!r}; accepted here: {', '.join(available)}") from error


def _require_unquantised(name: str, config: Any) -> None:
    if quantization := getattr(config, "quantization_config", None):
        raise ModelError(
            f"the model {name!r} is quantised already (quant_method {quantization.get('quant_method')!r}), and studies quantise "
            "it themselves: give the model that it was made from"
        )


def _fingerprint(place: str) -> str:
    folder = Path(place)
    if not folder.is_dir():
        cached = _cached_folder(place)
        return f"{place}@{cached.name if cached else 'unknown'}"
    return f"sha256:{local.sha256([folder / 'config.json', *sorted(folder.glob('*.safetensors'))])}"


@contextmanager
def _explained(name: str, place: str) -> Iterator[None]:
    """Whatever is raised as a ModelError: errors of transformers and the hub have no common base."""
    try:
        yield
    except Exception as error:
        raise ModelError(_explain(name, place, error)) from error


def _explain(name: str, place: str, error: Exception) -> str:
    """One sentence of cause and one of next step for what was raised."""
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
        step = (
            f"the folder is not a complete causal language model with its tokenizer and safetensors weights ({error})"
        )
    elif kinds & {
        "ConnectionError",
        "ConnectTimeout",
        "ConnectError",
        "IncompleteSnapshotError",
        "LocalEntryNotFoundError",
        "OfflineModeIsEnabled",
        "ProxyError",
        "ReadTimeout",
    }:
        step = (
            "the hub cannot be reached and the model is not in the local cache: connect, or give the folder of a "
            "snapshot downloaded elsewhere as the model (env/README.md), or use demo-llama, which needs no network"
        )
    else:
        step = str(error)
    return f"cannot load the model {name!r} ({place}): {step}"
