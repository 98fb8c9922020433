"""The study of a model that several processes share: tensor parallelism by transformers' own plan.

    torchrun --nproc-per-node 2 -m flexq_core.studies.e2e --model llama-7b --methods fp16 flexq

Each process loads its part of every layer from files: of the model, or of a 6-bit checkpoint that the first process makes of
them. Random weights are written to files first. Blocks are not fused: what is merged would be cut across its parts. The decode
step is not compiled; on GPUs it is captured as ever. Memory and bytes are of one process, the largest.

Tokens are compared with those of the same model in one process before anything is timed.
"""

from __future__ import annotations

import re
import tempfile
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from flexq_core.quant.layers import linear_layers
from flexq_core.quant.plan import RULES, PrecisionPlan
from flexq_core.quant.spec import divisors, require_whole_groups
from flexq_core.runtime.checkpoint import empty_model, load
from flexq_core.runtime.linear import FlexQLinear
from flexq_core.runtime.quantize_files import quantize_files
from flexq_core.sources.models import LoadedModel, load_model, model_folder, random_model
from flexq_core.studies import e2e
from flexq_core.studies.e2e import processes
from flexq_core.studies.e2e.decode import Engine, generate
from flexq_core.workbook.records import Measurement, Skipped

_UNQUANTISED = (e2e.UNQUANTISED, "bf16")


def require_shared(model: nn.Module, plan: PrecisionPlan | None, count: int) -> None:
    """Raise ValueError unless so many processes can share a model under transformers' plan.

    model: without weights will do.  plan: of the layers that are quantised, whose groups must stay whole; or None.
    """
    styles = getattr(model, "tp_plan", None) or {}
    if not any(style.startswith("rowwise") for style in styles.values()):
        raise ValueError(
            f"transformers has no plan to share a model of type {model.config.model_type!r}; accepted: one process"
        )
    for what in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(model.config, what, None) or count
        if heads % count:
            accepted = ", ".join(map(str, divisors(heads)))
            raise ValueError(f"{what} is {heads}, which {count} processes cannot share; accepted: {accepted}")
    for name, layer in linear_layers(model).items() if plan else ():
        if styles.get(re.sub(r"\.\d+(?=\.|$)", ".*", name), "").startswith("rowwise"):
            require_whole_groups(name, layer.in_features, plan.group_size, count)


class ParallelStudy(e2e.EndToEndStudy):
    """As `EndToEndStudy`, for every process of `processes.joined`; run.records are `processes.SharedRecords`.

    Raises as it does, and ValueError where the processes cannot share the model (names what does not divide).
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="flexq-")  # used by the first process
        self._folders: dict[tuple[int, str], Path] = {}
        super().__init__(*arguments, **options)

    @property
    def _can_compile(self) -> bool:
        return False

    def _load(self) -> LoadedModel:
        """The model without its weights, and what identifies it."""
        dtype = torch.float16 if self.on_gpu else torch.float32
        if self.weights == "random":
            return random_model(self.model, device="meta", dtype=dtype, layers=self.layers, seed=self.seed)

        def identify() -> tuple[Path, str, int]:
            folder, loaded = model_folder(self.model), load_model(self.model, dtype=dtype)
            return folder, loaded.fingerprint, loaded.context_length

        folder, *facts = processes.from_first(identify)
        return LoadedModel(self.model, empty_model(folder).to(dtype), None, *facts)

    def _require_fit(self) -> None:
        super()._require_fit()
        shared = [
            method for method in self.methods if method in _UNQUANTISED or method in RULES or method not in e2e.METHODS
        ]
        for method in shared:
            plan = None if method in _UNQUANTISED else self._plan(method)
            require_shared(self._shapes, plan, processes.count())

    def build(self, method: str, backend: str) -> nn.Module:
        """This process's part of the model under this method. Raises Skipped for what cannot be shared."""
        from transformers.distributed.configuration_utils import DistributedConfig

        self._require_shareable(method)
        model = self._opened(method, backend, distributed_config=DistributedConfig(tp_plan="auto"))
        return _keep_parts_(model)

    def _require_shareable(self, method: str) -> None:
        if method in e2e.METHODS and method not in (*_UNQUANTISED, *RULES):
            raise Skipped(
                f"{method} runs in one process: its layers are made of whole weights, which transformers' plan does not split"
            )

    def _opened(self, method: str, backend: str, **options: Any) -> nn.Module:
        """The model from its files; options: of `from_pretrained`."""
        from transformers import AutoModelForCausalLM

        folder = self._folder(method)
        options["dtype"] = torch.bfloat16 if method == "bf16" else self.loaded.model.dtype
        options["attn_implementation"] = self.attention
        if method in _UNQUANTISED:
            model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **options)
        else:
            model = load(folder, backend=backend, **options)
        return model.eval().requires_grad_(False)

    def _folder(self, method: str) -> Path:
        """The files of the model under this method; every process asks, the first writes them."""
        key = self.layers, "" if method in _UNQUANTISED else method
        if key not in self._folders:
            source = self._folder(e2e.UNQUANTISED) if key[1] else None
            self._folders[key] = processes.from_first(lambda: self._written(method, source))
        return self._folders[key]

    def _written(self, method: str, source: Path | None) -> Path:
        out = Path(self._temporary.name) / str(len(self._folders))
        if source is not None:
            plan, here = self._plan(method), linear_layers(self.loaded.model)
            layers = {layer: bits for layer, bits in plan.layers.items() if layer in here}  # of few blocks, few
            mine = PrecisionPlan(plan.name, layers, plan.group_size)
            return quantize_files(source, out, mine, progress=True).folder
        if self.weights == "pretrained":
            return model_folder(self.model)
        # Made where it is made for one process, so that it is the same, but a block at a time.
        self._random(convert=lambda _, block: block.to("cpu")).model.to("cpu").save_pretrained(out)
        return out

    @cached_property
    def _logits(self) -> Tensor:
        return self._alone(e2e.UNQUANTISED, "torch", lambda model: e2e._prompt_logits(model, self.prompt))

    def _alone(self, method: str, backend: str, compute: Any) -> Any:
        """What the first process computes with the whole model."""
        self._folder(method)

        def computed() -> Any:
            try:
                return compute(self._opened(method, backend).to(self.run.device))
            except torch.OutOfMemoryError:
                raise Skipped("the whole model, with which tokens are compared, does not fit one GPU") from None

        found = processes.from_first(computed)
        e2e._free()
        return found

    def _measured(self, method: str, backend: str) -> dict[str, Measurement]:
        self._require_shareable(method)
        checked, compared = self._checked, min(self.output_tokens[-1], e2e.EAGER_TOKENS)
        # While nothing else lies on the GPU.
        self._expected = checked._alone(
            method, backend, lambda model: generate(model, checked.prompt, compared).tokens.cpu()
        )
        return super()._measured(method, backend)

    def _timed(self, model: nn.Module, method: str, backend: str) -> dict[str, Measurement]:
        checked = self._checked
        agreed = self._agreeing_tokens(model if checked is self else checked.build(method, backend), method)
        measured = super()._timed(model, method, backend)
        sizes = {name: entry.value for name, entry in measured.items() if "_mib" in name}
        for name, value in processes.largest(sizes).items():
            measured[name] = measured[name]._replace(value=value)
        return measured | {"tokens_as_one_process": agreed}

    def _agreeing_tokens(self, model: nn.Module, method: str) -> Measurement:
        """How many tokens are those of one process before the first that is not.

        In float32 all must be: RuntimeError. In half precision partial sums round differently and a near tie may fall to the
        other side, after which a text goes its own way.
        """
        expected = self._expected
        tokens = generate(model, self.prompt, expected.shape[1]).tokens.cpu()
        agreed = int((tokens == expected).all(0).long().cumprod(0).sum())
        if agreed < expected.shape[1] and next(model.parameters()).dtype == torch.float32:
            raise RuntimeError(
                f"{self.label(method)} is not timed: from token {agreed} on {processes.count()} processes write another text "
                "than one"
            )
        return Measurement(agreed, "token", f"of {expected.shape[1]}")

    def _warm_up(self, engine: Engine) -> None:
        end = time.perf_counter() + e2e._WARM_UP_S
        engine.warm_up(self.prompt)
        while processes.from_first(lambda: time.perf_counter() < end):  # clocks differ
            engine.warm_up(self.prompt)

    def _inputs(self, method: str, backend: str) -> dict[str, Any]:
        return super()._inputs(method, backend) | {"processes": processes.count()}

    def published(self) -> pd.DataFrame:
        """None: the paper's models ran on one GPU."""
        return super().published().iloc[:0]


def _keep_parts_(model: nn.Module) -> nn.Module:
    """Let the blocks' linear layers hold this process's part of their weights as plain parameters.

    So a 6-bit layer can let go of what it has repacked, and its bytes are those it holds. Nothing is saved from here.
    """
    layers = [module for module in model.modules() if isinstance(module, FlexQLinear)]
    for layer in (*layers, *linear_layers(model).values()):
        for name in ("weight", "weight_scale", "weight_exponent"):
            if (parameter := layer._parameters.get(name)) is not None:
                layer._parameters[name] = nn.Parameter(processes.local_part(parameter.data), requires_grad=False)
    return model
