"""Names of tensors in files: with and without the base's, as a family's first release had them, one of several."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexq_core.files.names import names_in_files, place_tensors
from tests.models import CONVERTED


def test_tensors_that_transformers_renames_or_makes_of_others_have_a_place():
    with torch.device("meta"):
        neox, mixtral = (AutoModelForCausalLM.from_config(make()) for make in CONVERTED.values())
    assert place_tensors(neox, ["embed_out.weight", "other"]) == ({"lm_head.weight": "embed_out.weight"}, {})
    both = ["lm_head.weight", "embed_out.weight"]
    assert place_tensors(neox, both) == ({"lm_head.weight": "lm_head.weight"}, {})
    gate, expert = (f"model.layers.0.block_sparse_moe.{name}.weight" for name in ("gate", "experts.3.w2"))
    places = {"model.layers.0.mlp.gate.weight": gate}
    assert place_tensors(mixtral, [gate, expert]) == (places, {expert: "model.layers.0.mlp.experts.down_proj"})


@pytest.mark.parametrize(
    ("stored", "found"),
    [
        (["model.norm", "lm_head"], {"model.norm": "model.norm", "lm_head": "lm_head"}),
        (["norm", "lm_head"], {"model.norm": "norm", "lm_head": "lm_head"}),  # saved from the base
        (["model.norm", "model.lm_head"], {"model.norm": "model.norm", "lm_head": "model.lm_head"}),
        (["model.norm", "norm", "lm_head", "model.lm_head"], {"model.norm": "model.norm", "lm_head": "lm_head"}),
        (["model.model.norm"], {"model.norm": "model.model.norm"}),
        (["rotary.inv_freq", "norms"], {}),
        ([], {}),
    ],
)
def test_names_in_files_with_and_without_the_prefix_of_the_models_base(stored, found):
    assert names_in_files(["model.norm", "lm_head"], stored, "model") == found


def test_a_tensor_that_is_missing_is_not_another_one_of_a_similar_name():
    assert names_in_files(["model.norm", "norm"], ["norm"], "model") == {"norm": "norm"}
    assert names_in_files(["model.norm", "norm"], ["model.norm"], "model") == {"model.norm": "model.norm"}
