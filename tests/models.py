"""Small models with random weights, one of each architecture that the workbook must take."""

from __future__ import annotations

import copy

import torch
import transformers

from flexq_core.quant.layers import decoder_blocks
from flexq_core.sources.demo import demo_path

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96, "max_position_embeddings": 64}
GATED = dict(hidden_size=64, intermediate_size=176, **SIZES)

CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(num_key_value_heads=4, **GATED),
    "llama-3": lambda: transformers.LlamaConfig(num_key_value_heads=2, tie_word_embeddings=True, **GATED),
    "llama-3-untied": lambda: transformers.LlamaConfig(num_key_value_heads=2, **GATED),
    "qwen": lambda: transformers.Qwen2Config(num_key_value_heads=2, **GATED),
    "mistral": lambda: transformers.MistralConfig(num_key_value_heads=2, **GATED),
    "opt": lambda: transformers.OPTConfig(
        hidden_size=64, ffn_dim=200, word_embed_proj_dim=48, activation_function="relu", **SIZES
    ),
}


CONVERTED = {
    "gpt-neox": lambda: transformers.GPTNeoXConfig(hidden_size=64, intermediate_size=176, **SIZES),
    "mixtral": lambda: transformers.MixtralConfig(num_key_value_heads=2, num_local_experts=3, **GATED),
}
"""Families whose files have other names of tensors, or other tensors, than their models."""

UNKNOWN = {"starcoder": lambda: transformers.Starcoder2Config(num_key_value_heads=2, **GATED)}
"""Of whose layers no rule of a plan knows a name."""


def tiny_model(architecture: str, seed: int = 0):
    """A causal language model in float32 whose biases and norms are random too, so that each one matters."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config({**CONFIGS, **CONVERTED, **UNKNOWN}[architecture]()).eval()
    with torch.no_grad():
        for _name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def save_model(model, folder, max_shard_size: str = "40KB"):
    """The model and a tokenizer as a transformers folder, in several files unless `max_shard_size` is large; returns it."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    for file in demo_path("demo-llama").glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def logits(model, seed: int = 1):
    """Logits on fixed random tokens: [2, 24, vocabulary]."""
    ids = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(input_ids=ids.to(next(model.parameters()).device), use_cache=False).logits


def skeleton_of(model):
    """The model without the weights of its blocks, and the blocks by name."""
    blocks = {name: copy.deepcopy(block) for name, block in decoder_blocks(model).items()}
    skeleton = copy.deepcopy(model)
    for block in decoder_blocks(skeleton).values():
        block.to("meta")
    return skeleton, blocks
