"""Attention for every method on a GPU: of a prompt by torch's own, with no mask, and of one token by a kernel of its own.

With one token there is one row of scores a head, and torch has three fused ways to it, none good: flash attention takes no mask,
which the empty places of a static cache want; the memory-efficient one gives a head to one multiprocessor, 52 µs a layer of
LLaMA-13B with 1152 places on an H200; and cuDNN's, which torch prefers there (14 µs), adds up parts in no fixed order, so that
after a near tie the same model writes another text each time. Here the keys of a head are shared among blocks (split-KV, as in
Flash-Decoding) whose parts the last of them adds in their order, empty places are not read, and the bits are the same eager,
compiled and captured.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "flexq_one_token"
"""Under which transformers knows it."""

_UNUSUAL = ("sliding_window", "position_bias", "softcap", "s_aux")
"""What some models hand to their attention besides."""


def implementation(device: torch.device | str) -> str:
    """What a model on this device is to be given as `attn_implementation`; transformers knows it afterwards.

    Torch's own on a processor, and where there is no Triton, without which torch compiles nothing for a GPU either.
    """
    if torch.device(device).type != "cuda" or find_spec("triton") is None:
        return "sdpa"
    _register()
    return NAME


@cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: query [B, heads, T, D], key and value [B, key heads, places, D] → [B, T, heads, D].

    More than one token is a whole prompt without padding, in an empty cache or none, whose mask is that of causality. What a
    model wants beyond that is left to transformers' own.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    tokens, scale = query.shape[2], query.shape[3] ** -0.5 if scaling is None else scaling
    if dropout or any(options.get(name) is not None for name in _UNUSUAL):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    if tokens == 1:
        return one_token_attention(query, key, value, attention_mask, scale), None
    key, value = key[:, :, :tokens], value[:, :, :tokens]
    fewer = key.shape[1] < query.shape[1]
    found = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=fewer)
    return found.transpose(1, 2).contiguous(), None


@torch.library.custom_op("flexq::one_token_attention", mutates_args=())
def one_token_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale · query · keyᵀ) · value of one token a sequence, in float32.

    query: [B, heads, 1, D] float16/bfloat16/float32.  key, value: [B, key heads, places, D] of its type; heads is a multiple of
    key heads.  mask: [B, 1, 1, places] bool, the places that are read, or all; without any, zeros.
    Returns [B, 1, heads, D] of query's type. On a GPU.
    """
    from flexq_core.studies.e2e import attention_kernels

    return attention_kernels.one_token_attention(query, key, value, mask, scale)


@one_token_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return query.new_empty(query.shape[0], 1, query.shape[1], query.shape[3])
