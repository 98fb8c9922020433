"""The embedded demo models: two small language models of documentation English, and the recipe that trained them.

    demo-llama   LLaMA: RMSNorm, SwiGLU, rotary positions, grouped-query attention; widths are multiples of 128
    demo-opt     OPT: LayerNorm, biases, ReLU, learned positions; widths are not multiples of 128, so groups are padded

Trained on docstrings of the standard library and of the pinned packages (`corpus.TRAINING_PACKAGES`), scored on the
Python language's documentation (`held_out_text`), no paragraph or long sentence of which is trained on. Byte-level BPE
of 4096; 64 × 512 tokens a step; AdamW, cosine schedule, bfloat16 autocast; weights saved in float16.

    python -m flexq_core.sources.demo corpus --out corpus/
    python -m flexq_core.sources.demo train demo-llama --corpus corpus/ --out demo-llama/     minutes on one GPU
    python -m flexq_core.sources.demo evaluate demo-llama                                    seconds on a CPU

The text changes with the installed versions, so a retrained model is as good but not bit-equal elsewhere; each model's
card (README.md beside its weights) records the digests, versions and hardware of its own training.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexq_core.sources import corpus
from flexq_core.sources.text import Text

VOCABULARY = 4096
CONTEXT_LENGTH = 512
END_OF_TEXT, PADDING = "<|endoftext|>", "<|padding|>"
_MODELS_FOLDER = Path(__file__).parent / "demo_models"


@dataclass(frozen=True)
class DemoModel:
    """A demo model's name, what it shows, its transformers configuration and how it trains.

    Training the LLaMA longer overfits it: on the held-out text 1.338 bits per character after 2500 steps, 1.356 after 4000.

    The OPT needs regularising or it grows attention logits that 6-bit activations blur, and then no plan helps. Change of
    perplexity under W6A6 and `flexq`: without dropout at weight decay 0.1, +3.6% and +3.5%; at 3, +1.8% and +1.8%; at 3 with
    OPT's own dropout of 0.1, +0.9% and +0.7%.
    """

    name: str
    shows: str
    config: Callable[[], Any]
    steps: int
    learning_rate: float
    weight_decay: float
    context_length: int = CONTEXT_LENGTH


def _llama() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2 * CONTEXT_LENGTH,
        **_shared(),
    )


def _opt() -> Any:
    from transformers import OPTConfig

    return OPTConfig(
        hidden_size=240,
        word_embed_proj_dim=240,
        ffn_dim=960,
        num_hidden_layers=8,
        num_attention_heads=5,
        max_position_embeddings=CONTEXT_LENGTH,
        activation_function="relu",
        dropout=0.1,
        **_shared(),
    )


def _shared() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "tie_word_embeddings": True,
    }


DEMO_MODELS = {
    model.name: model
    for model in (
        DemoModel(
            "demo-llama",
            "RMSNorm, SwiGLU, rotary positions, grouped-query attention",
            _llama,
            steps=2500,
            learning_rate=3e-3,
            weight_decay=0.1,
        ),
        DemoModel(
            "demo-opt",
            "LayerNorm, biases, ReLU, learned positions, padded groups",
            _opt,
            steps=2500,
            learning_rate=3e-3,
            weight_decay=3.0,
        ),
    )
}


def demo_path(name: str) -> Path:
    """Folder of a demo model: config, tokenizer, float16 safetensors, card. KeyError for another name."""
    return _MODELS_FOLDER / DEMO_MODELS[name].name


def held_out_text() -> Text:
    """The text demo models are scored on: the Python language's documentation, about 465 000 characters."""
    return Text.of("pydoc", corpus.language_topics(), origin=f"pydoc_data.topics of Python {platform.python_version()}")


def calibration_text() -> Text:
    """Docstrings of packages that no demo model was trained on; shares no paragraph with `held_out_text`."""
    packages = [package for package in corpus.HELD_OUT_PACKAGES if importlib.util.find_spec(package)]
    documents = corpus.documents(packages, without=[corpus.language_topics()])
    return Text.of("docstrings", "\n\n".join(documents), origin=f"docstrings of {', '.join(packages)}")


def build_corpus(folder: Path) -> dict[str, Any]:
    """Write the tokenizer, the training tokens and the held-out tokens to `folder`; returns the facts it also writes."""
    import numpy as np
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    held_out = held_out_text()
    packages = ("stdlib", *corpus.TRAINING_PACKAGES)
    texts = corpus.documents(packages, without=[held_out.text, calibration_text().text])
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[END_OF_TEXT, PADDING],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    folder.mkdir(parents=True, exist_ok=True)
    PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    ids = [token for encoding in bpe.encode_batch(texts) for token in (*encoding.ids, 0)]
    np.save(folder / "train.npy", np.array(ids, np.uint16))
    np.save(folder / "held_out.npy", np.array(bpe.encode(held_out.text).ids, np.uint16))
    facts = {
        "packages": {p: platform.python_version() if p == "stdlib" else _version(p) for p in packages},
        "training_characters": sum(map(len, texts)),
        "training_tokens": len(ids),
        "training_sha256": hashlib.sha256("\0".join(texts).encode("utf-8", "replace")).hexdigest(),
        "held_out": held_out.origin,
        "held_out_characters": len(held_out.text),
        "held_out_sha256": held_out.sha256,
    }
    (folder / "corpus.json").write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def train(
    name: str,
    corpus_folder: Path,
    out: Path,
    *,
    steps: int | None = None,
    batch_size: int = 64,
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    seed: int = 0,
    device: str = "cuda",
    compile_model: bool = True,
) -> float:
    """Train a demo model on a folder made by `build_corpus`, write it to `out`, return bits per character held out.

    steps, learning_rate, weight_decay: None for the model's own.
    """
    import numpy as np
    import torch
    from torch.nn import functional as F
    from transformers import AutoModelForCausalLM, AutoTokenizer

    steps = steps or DEMO_MODELS[name].steps
    learning_rate = learning_rate or DEMO_MODELS[name].learning_rate
    weight_decay = DEMO_MODELS[name].weight_decay if weight_decay is None else weight_decay
    torch.manual_seed(seed)
    facts = json.loads((corpus_folder / "corpus.json").read_text())
    tokens = torch.from_numpy(np.load(corpus_folder / "train.npy").astype(np.int32)).to(device)
    model = AutoModelForCausalLM.from_config(DEMO_MODELS[name].config()).to(device)
    step_model = torch.compile(model) if compile_model else model
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.95),
        fused=device == "cuda",
    )
    warmup = min(200, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / (steps - warmup)))),
    )
    offsets = torch.arange(CONTEXT_LENGTH + 1, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    start = time.perf_counter()
    for step in range(steps):
        first = torch.randint(len(tokens) - CONTEXT_LENGTH, (batch_size, 1), device=device, generator=generator)
        window = tokens[first + offsets].long()
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            logits = step_model(input_ids=window[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        if step % 500 == 0 or step == steps - 1:
            print(
                f"{name} step {step:>6} loss {loss.item():.4f} {time.perf_counter() - start:6.1f} s",
                flush=True,
            )
    seconds = time.perf_counter() - start
    held_out = torch.from_numpy(np.load(corpus_folder / "held_out.npy").astype(np.int64))
    model = model.half().eval()  # scored as it is saved
    bits = bits_per_character(model.float(), held_out, facts["held_out_characters"])
    model.half().save_pretrained(out)
    AutoTokenizer.from_pretrained(corpus_folder).save_pretrained(out)
    hardware = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    run = {
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "seed": seed,
    }
    (out / "README.md").write_text(_card(name, model, facts, run, seconds, hardware, bits))
    return bits


def bits_per_character(model: Any, ids: Any, characters: int) -> float:
    """Bits a character of a text that is `ids` [T] int64, in windows of `CONTEXT_LENGTH` without overlap."""
    import torch
    from torch.nn import functional as F

    rows = ids[: len(ids) // CONTEXT_LENGTH * CONTEXT_LENGTH].view(-1, CONTEXT_LENGTH)
    nll, scored = 0.0, 0
    with torch.no_grad():
        for batch in rows.split(16):
            batch = batch.to(model.device)
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1).float()
            nll += F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum").item()
            scored += batch[:, 1:].numel()
    return nll / scored / math.log(2) * len(ids) / characters


def _version(package: str) -> str:
    names = importlib.metadata.packages_distributions().get(package, [package])
    return importlib.metadata.version(names[0])


def _card(name: str, model: Any, facts: dict, run: dict, seconds: float, hardware: str, bits: float) -> str:
    import torch

    parameters = sum(p.numel() for p in model.parameters())
    packages = ", ".join(f"{package} {version}" for package, version in facts["packages"].items())
    settings = ", ".join(f"{key} {value}" for key, value in run.items())
    return f"""# {name}

A language model of documentation English with {parameters / 1e6:.2f} M parameters, made to show quantisation on any
machine: {DEMO_MODELS[name].shows}. It knows how docstrings sound and nothing else. Licence: Apache-2.0, as this repository.

| | |
|---|---|
| bits per character, held out | {bits:.4f} |
| held-out text | {facts["held_out"]}, {facts["held_out_characters"]} characters, sha256 `{facts["held_out_sha256"]}` |
| training text | {facts["training_characters"]} characters, {facts["training_tokens"]} tokens |
| its sha256 | `{facts["training_sha256"]}` |
| docstrings of | {packages} |
| recipe | `python -m flexq_core.sources.demo train {name}`: {settings} |
| trained | {seconds:.0f} s on one {hardware}, torch {torch.__version__} |
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flexq_core.sources.demo", description="Make and score demo models."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("corpus", help="collect docstrings, train the tokenizer, write token files (a minute)")
    build.add_argument("--out", type=Path, required=True, help="folder to write")
    fit = commands.add_parser("train", help="train a demo model (minutes on one GPU)")
    fit.add_argument("name", choices=DEMO_MODELS)
    fit.add_argument("--corpus", type=Path, help="folder written by `corpus`; made beside --out if absent")
    fit.add_argument("--out", type=Path, required=True, help="folder to write")
    fit.add_argument("--steps", type=int, help="optimiser steps (default: the model's own)")
    fit.add_argument("--batch-size", type=int, default=64, help="windows of 512 tokens a step (default: %(default)s)")
    fit.add_argument("--learning-rate", type=float, help="peak (default: the model's own)")
    fit.add_argument("--weight-decay", type=float, help="of matrices (default: the model's own)")
    fit.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    fit.add_argument("--device", default="cuda", help="cuda or cpu (default: %(default)s)")
    fit.add_argument("--no-compile", action="store_true", help="do not use torch.compile")
    score = commands.add_parser("evaluate", help="bits per character on the held-out text")
    score.add_argument("model", help=f"a folder, or one of {', '.join(DEMO_MODELS)}")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command line; see `--help`."""
    options = _parser().parse_args(arguments)
    if options.command == "corpus":
        print(json.dumps(build_corpus(options.out), indent=2))
    elif options.command == "train":
        folder = options.corpus or options.out.with_name(f"{options.out.name}-corpus")
        if not (folder / "corpus.json").is_file():
            build_corpus(folder)
        bits = train(
            options.name,
            folder,
            options.out,
            steps=options.steps,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            weight_decay=options.weight_decay,
            seed=options.seed,
            device=options.device,
            compile_model=not options.no_compile,
        )
        print(f"{options.name}: {bits:.4f} bits per character, written to {options.out}")
    else:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = demo_path(options.model) if options.model in DEMO_MODELS else Path(options.model)
        if not folder.is_dir():
            print(
                f"no such model: {options.model}; accepted: a folder, {', '.join(DEMO_MODELS)}",
                file=sys.stderr,
            )
            return 2
        text = held_out_text()
        ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text.text, verbose=False).input_ids)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        bits = bits_per_character(model, ids, len(text.text))
        print(f"{options.model}: {bits:.4f} bits per character on {text.origin} (sha256 {text.sha256})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
