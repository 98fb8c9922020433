"""What a model calls the tensors of its files: without the names of its base, or as its family's first release called them.

Of some families transformers renames tensors when it loads them, or makes one of several, a layer's experts say.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


def place_tensors(model: Any, stored: Collection[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Where transformers puts the tensors of a model's files; what the model has no place for is left out.

    model: of transformers; its weights are not looked at.  stored: the files' names of tensors.
    Returns the model's name of a tensor → its name in the files; and name in the files → the model's name of the tensor that
    is made of it and of others.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    names, prefix = model.state_dict().keys(), model.base_model_prefix
    conversions = get_model_conversion_mapping(model)
    kinds = [[each for each in conversions if isinstance(each, kind)] for kind in (WeightRenaming, WeightConverter)]
    whole, parts = {}, {}
    for name in sorted(set(stored) - names):  # some renamings look at what came before
        renamed, converter = rename_source_key(name, *kinds)
        if converter is None:
            whole[renamed] = name
        else:
            parts[name] = renamed
    whole |= {name: name for name in stored if name in names}  # its own name is more than one that is another's as well
    places = {name: whole[renamed] for name, renamed in names_in_files(names, whole, prefix).items()}
    targets = {renamed: name for name, renamed in names_in_files(names, set(parts.values()), prefix).items()}
    return places, {name: targets[renamed] for name, renamed in parts.items() if renamed in targets}


def names_in_files(names: Collection[str], stored: Collection[str], prefix: str) -> dict[str, str]:
    """A model's name of a tensor → its name in the files, for the tensors that they hold.

    names: of the model's tensors.  stored: of the files' tensors.  prefix: of the names of the model's base, `model` say: files
    that were saved from the base alone lack it, and a few add it to what is not the base's.
    """
    found = {}
    for name in names:
        possible = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
        # Another tensor's own name is not this one's.
        match = next((other for other in possible if other in stored and (other == name or other not in names)), None)
        if match is not None:
            found[name] = match
    return found
