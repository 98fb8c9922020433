"""Reading the notebooks' parameters: names, lists and numbers; what is wrong is said before anything is computed."""

from __future__ import annotations

from argparse import ArgumentTypeError
from difflib import get_close_matches

from flexq_core.quant.plan import LayerPrecision, PrecisionPlan
from flexq_core.quant.spec import GROUP_SIZE
from flexq_core.runtime import ops


def names(text: str, accepted: tuple[str, ...] | None, what: str) -> list[str]:
    """A comma-separated parameter as a list without repetition; ValueError names the nearest accepted value."""
    found = _items(text)
    for name in found if accepted else []:
        if name not in accepted:
            nearest = get_close_matches(name, accepted, n=1)
            hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
            raise ValueError(f"no {what} is called {name!r}{hint}; accepted: {', '.join(accepted)}")
    if accepted and not found:
        raise ValueError(f"no {what} is given; accepted: {', '.join(accepted)}")
    return found


def require_at_least(least: float, **values: float) -> None:
    """Raise ValueError, naming the parameter, for a value below `least`."""
    for name, value in values.items():
        if not value >= least:
            raise ValueError(f"{name} is {value}; accepted: {least} or more")


def require_between(least: float, most: float, **values: float) -> None:
    """Raise ValueError, naming the parameter, for a value outside `least` to `most`."""
    for name, value in values.items():
        if not least <= value <= most:
            raise ValueError(f"{name} is {value}; accepted: {least} to {most}")


def one_of(text: str, accepted: tuple[str, ...], what: str) -> str:
    """The parameter itself; ValueError names the nearest accepted value unless it is exactly one of them."""
    found = names(text, accepted, what)
    if len(found) > 1:
        raise ValueError(f"{what} is {text!r}; accepted: one of {', '.join(accepted)}")
    return found[0]


def resolved_backends(text: str, device: str, plan: PrecisionPlan | None = None) -> list[str]:
    """Comma-separated backends as what they mean for a plan's layers on this device, without repetition.

    plan: None for one of the rules, whose weights have 6 bits.  `auto` stays as it is where it means several.
    ValueError names the nearest accepted value, or the backend that cannot run these layers, and why.
    """
    bits = {LayerPrecision()} if plan is None else set(plan.layers.values())
    group_size = GROUP_SIZE if plan is None else plan.group_size
    found = []
    for backend in names(text, ops.BACKENDS, "backend"):
        meant = {
            ops.resolve_backend(backend, device, each.weight_bits, group_size, each.activation_bits) for each in bits
        }
        found.append(meant.pop() if len(meant) == 1 else backend)
    return list(dict.fromkeys(found))


def counts(text: str, what: str) -> list[int]:
    """Comma-separated whole numbers of 1 or more, without repetition and in order; ValueError names the first other."""
    accepted = "accepted: whole numbers of 1 or more, comma-separated, such as 1,8,64"
    for item in _items(text):
        if not _counts(item):
            raise ValueError(f"{what} holds {item!r}; {accepted}")
    found = sorted({int(item) for item in _items(text)})
    if not found:
        raise ValueError(f"{what} is empty; {accepted}")
    return found


def whole_number(text: str) -> int:
    """A command's argument that is a number of 1 or more: the `type` of argparse, which says what is wrong with another."""
    if not _counts(text):
        raise ArgumentTypeError(f"{text!r} given; accepted: whole numbers of 1 or more")
    return int(text)


def _counts(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) > 0


def _items(text: str) -> list[str]:
    return list(dict.fromkeys(item.strip() for item in text.split(",") if item.strip()))
