"""The shapes of the paper's models and their kin, so that one can be built with random weights where its own are not at hand.

Sources: the models' public configurations (LLaMA arXiv 2302.13971, Llama 2 arXiv 2307.09288, Llama 3 arXiv 2407.21783,
OPT arXiv 2205.01068).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """A decoder's dimensions.

    hub_id: its repository.  family: `llama` (RMSNorm, SwiGLU, rotary positions) or `opt` (LayerNorm, biases, ReLU).
    hidden_size, intermediate_size: features.  layers: blocks.  heads, key_value_heads: of attention.
    vocabulary, context_length: tokens.  extra: what else its configuration sets.
    """

    hub_id: str
    family: str
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    context_length: int
    extra: tuple[tuple[str, Any], ...] = ()

    def config(self) -> Any:
        """Its transformers configuration; transformers is imported here."""
        import transformers

        shared = {
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.context_length,
            **dict(self.extra),
        }
        if self.family == "opt":
            return transformers.OPTConfig(ffn_dim=self.intermediate_size, **shared)
        return transformers.LlamaConfig(
            intermediate_size=self.intermediate_size, num_key_value_heads=self.key_value_heads, **shared
        )


def _llama(hub_id: str, *sizes: int, key_value_heads: int = 0, vocabulary: int = 32000, context: int, **extra: Any):
    return Architecture(
        hub_id, "llama", *sizes, key_value_heads or sizes[-1], vocabulary, context, tuple(sorted(extra.items()))
    )


def _opt(size: str, *sizes: int, **extra: Any) -> Architecture:
    extra.setdefault("word_embed_proj_dim", sizes[0])
    return Architecture(f"facebook/opt-{size}", "opt", *sizes, sizes[-1], 50272, 2048, tuple(sorted(extra.items())))


_LLAMA_1 = {
    "7b": (4096, 11008, 32, 32),
    "13b": (5120, 13824, 40, 40),
    "30b": (6656, 17920, 60, 52),
    "65b": (8192, 22016, 80, 64),
}
_LLAMA_2 = {"7b": (4096, 11008, 32, 32), "13b": (5120, 13824, 40, 40), "70b": (8192, 28672, 80, 64)}
_LLAMA_3 = {"8b": (4096, 14336, 32, 32), "70b": (8192, 28672, 80, 64)}
_OPT = {
    "125m": (768, 3072, 12, 12),
    "350m": (1024, 4096, 24, 16),
    "1.3b": (2048, 8192, 24, 32),
    "2.7b": (2560, 10240, 32, 32),
    "6.7b": (4096, 16384, 32, 32),
    "13b": (5120, 20480, 40, 40),
    "30b": (7168, 28672, 48, 56),
    "66b": (9216, 36864, 64, 72),
}

ARCHITECTURES: dict[str, Architecture] = {
    **{
        f"llama-{size}": _llama(f"huggyllama/llama-{size}", *sizes, context=2048, rms_norm_eps=1e-6)
        for size, sizes in _LLAMA_1.items()
    },
    **{
        f"llama-2-{size}{chat}": _llama(
            f"meta-llama/Llama-2-{size}{chat}-hf",
            *sizes,
            key_value_heads=8 if size == "70b" else 0,
            context=4096,
            rms_norm_eps=1e-5,
        )
        for chat in ("", "-chat")
        for size, sizes in _LLAMA_2.items()
    },
    **{
        f"llama-3-{size}": _llama(
            f"meta-llama/Meta-Llama-3-{size.upper()}",
            *sizes,
            key_value_heads=8,
            vocabulary=128256,
            context=8192,
            rms_norm_eps=1e-5,
            rope_theta=500000.0,
        )
        for size, sizes in _LLAMA_3.items()
    },
    **{
        f"opt-{size}": _opt(
            size, *sizes, **({"word_embed_proj_dim": 512, "do_layer_norm_before": False} if size == "350m" else {})
        )
        for size, sizes in _OPT.items()
    },
}
"""Short name → architecture, for every model of the paper and the seeds it grew from."""
