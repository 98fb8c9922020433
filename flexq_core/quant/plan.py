"""Precision plans: which layer runs at which weight and activation bits (FlexQ §3.1, layer-wise sensitivity).

A plan names every quantised layer, so that reading it answers what ran. As JSON:

    {
      "format": "flexq-plan",
      "version": 1,
      "name": "flexq",
      "group_size": 128,
      "layers": {
        "model.layers.0.self_attn.q_proj": {"weight_bits": 6, "activation_bits": 6},
        "model.layers.0.mlp.down_proj": {"weight_bits": 6, "activation_bits": 8}
      }
    }
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

from flexq_core.quant.spec import ACTIVATION_BITS, GROUP_SIZE, WEIGHT_BITS

FORMAT = "flexq-plan"
VERSION = 1

SENSITIVE_LAYERS = ("down_proj", "fc2", "dense_4h_to_h")
"""The layers that the paper keeps at 8-bit activations, the last linear layer of an MLP, as LLaMA, OPT and GPT-NeoX name it."""


class PlanError(ValueError):
    """A plan that cannot be read, or that does not fit the model it is used with."""


@dataclass(frozen=True)
class LayerPrecision:
    """Bits of one linear layer's weights and activations."""

    weight_bits: int = 6
    activation_bits: int = 6

    def __post_init__(self) -> None:
        for field, accepted in (("weight_bits", WEIGHT_BITS), ("activation_bits", ACTIVATION_BITS)):
            value = getattr(self, field)
            if type(value) is not int or value not in accepted:
                raise PlanError(f"{field} is {value!r}; accepted: {', '.join(map(str, accepted))}")

    def __str__(self) -> str:
        return f"W{self.weight_bits}A{self.activation_bits}"


RULES: Mapping[str, Callable[[str], LayerPrecision]] = MappingProxyType(
    {
        "w6a6": lambda layer: LayerPrecision(6, 6),
        "w6a8": lambda layer: LayerPrecision(6, 8),
        "flexq": lambda layer: LayerPrecision(6, 8 if layer.rsplit(".", 1)[-1] in SENSITIVE_LAYERS else 6),
    }
)
"""Rule plans by name: a layer's name decides its bits."""


@dataclass(frozen=True)
class PrecisionPlan:
    """Layer name → bits, for every layer that is quantised.

    Raises PlanError for an empty plan, a layer whose name is not a string or whose bits are none, or a group size below 1.
    """

    name: str
    layers: Mapping[str, LayerPrecision]
    group_size: int = GROUP_SIZE

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise PlanError(f"the plan's name is {self.name!r}; accepted: a non-empty string")
        if isinstance(self.group_size, bool) or not isinstance(self.group_size, int) or self.group_size < 1:
            raise PlanError(f"the plan's group_size is {self.group_size!r}; accepted: an integer of at least 1")
        if not self.layers:
            raise PlanError("the plan names no layer")
        for layer, bits in self.layers.items():
            if not isinstance(layer, str) or not layer:
                raise PlanError(f"the plan names a layer {layer!r}; accepted: a non-empty string")
            if not isinstance(bits, LayerPrecision):
                raise PlanError(f"layer {layer!r} has bits {bits!r}; accepted: a LayerPrecision")
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))

    def __reduce__(self):  # a mapping proxy cannot be copied or sent to another process by itself
        return type(self), (self.name, dict(self.layers), self.group_size)

    @classmethod
    def from_rule(cls, rule: str, layers: Iterable[str], group_size: int = GROUP_SIZE) -> PrecisionPlan:
        """The plan that a rule (`w6a6`, `w6a8`, `flexq`) makes for these layer names; PlanError for another rule."""
        require_rule(rule)
        return cls(rule, {layer: RULES[rule](layer) for layer in layers}, group_size)

    @classmethod
    def from_json(cls, text: str) -> PrecisionPlan:
        """Read a plan; PlanError says what is wrong, and where."""
        try:
            data = json.loads(text, object_pairs_hook=_without_duplicates)
        except (json.JSONDecodeError, RecursionError) as error:
            raise PlanError(f"the plan is not JSON: {error}") from error
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: Any) -> PrecisionPlan:
        """A plan from what its JSON says; PlanError says what is wrong, and where."""
        _require_keys(data, {"format", "version", "name", "group_size", "layers"}, "the plan")
        if data["format"] != FORMAT:
            raise PlanError(f"the plan's format is {data['format']!r}; accepted: {FORMAT!r}")
        if data["version"] != VERSION:
            raise PlanError(f"the plan's version is {data['version']!r}; this release reads version {VERSION}")
        if not isinstance(data["layers"], dict):
            raise PlanError("the plan's layers must be an object: layer name → bits")
        layers = {}
        for layer, bits in data["layers"].items():
            _require_keys(bits, {"weight_bits", "activation_bits"}, f"layer {layer!r}")
            try:
                layers[layer] = LayerPrecision(**bits)
            except PlanError as error:
                raise PlanError(f"layer {layer!r}: {error}") from None
        return cls(data["name"], layers, data["group_size"])

    def to_dict(self) -> dict[str, Any]:
        """What the plan's JSON says; `from_dict` gives back an equal plan."""
        return json.loads(self.to_json())

    def to_json(self) -> str:
        """The plan as JSON, one layer a line; `from_json` gives back an equal plan."""
        layers = ",\n".join(
            f'    {json.dumps(layer)}: {{"weight_bits": {bits.weight_bits}, "activation_bits": {bits.activation_bits}}}'
            for layer, bits in self.layers.items()
        )
        return (
            f'{{\n  "format": "{FORMAT}",\n  "version": {VERSION},\n  "name": {json.dumps(self.name)},\n'
            f'  "group_size": {self.group_size},\n  "layers": {{\n{layers}\n  }}\n}}\n'
        )

    def require_fit(self, layers: Iterable[str]) -> None:
        """Raise PlanError unless the plan names exactly these layers."""
        present = set(layers)
        unknown = [layer for layer in self.layers if layer not in present]
        missing = [layer for layer in sorted(present) if layer not in self.layers]
        if unknown:
            raise PlanError(
                f"plan {self.name!r} does not fit the model: it names {len(unknown)} layers that the model lacks, "
                f"first {unknown[0]!r}; the model's first layer is {min(present, default=None)!r}"
            )
        if missing:
            raise PlanError(
                f"plan {self.name!r} does not fit the model: it leaves out {len(missing)} of its {len(present)} "
                f"layers, first {missing[0]!r}"
            )


def require_rule(rule: str) -> None:
    """Raise PlanError, which names the nearest, unless a rule has this name."""
    if rule not in RULES:
        nearest = get_close_matches(str(rule), RULES, n=1)
        hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
        raise PlanError(f"no plan rule is called {rule!r}{hint}; accepted: {', '.join(RULES)}")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise PlanError(f"the plan names {twice!r} twice")
    return data


def _require_keys(data: Any, keys: set[str], what: str) -> None:
    if not isinstance(data, dict):
        raise PlanError(f"{what} must be a JSON object, not {type(data).__name__}")
    if missing := sorted(keys - data.keys()):
        raise PlanError(f"{what} lacks {', '.join(map(repr, missing))}")
    if unknown := sorted(data.keys() - keys):
        raise PlanError(f"{what} has unknown keys {', '.join(map(repr, unknown))}; accepted: {', '.join(sorted(keys))}")
