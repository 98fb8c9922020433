"""FlexQ workbook: 6-bit weights in groups of 128 with 6- or 8-bit activations (arXiv 2508.04405).

    quant      the number format: quantise, pack, precision plans      (torch only, no I/O)
    runtime    the op, its backends, the module, model conversion      (uses quant)
    sources    models, texts, tasks and the demo models                (what comes in)
    studies    what a notebook or command measures, and how            (uses runtime and sources)
    workbook   parameters, records, figures, report                    (used by notebooks and studies)

Importing this package compiles nothing, downloads nothing and does not import transformers.
"""

from importlib import import_module

from flexq_core.runtime.registration import register

__version__ = "0.1.0"

# Loaded on first use, so that `import flexq_core` stays light.
_LAZY = {
    "PrecisionPlan": "flexq_core.quant.plan",
    "LayerPrecision": "flexq_core.quant.plan",
    "FlexQLinear": "flexq_core.runtime.linear",
    "quantize_model": "flexq_core.runtime.convert",
    "FlexQConfig": "flexq_core.runtime.hf_quantizer",
    "load": "flexq_core.runtime.checkpoint",
    "fuse_": "flexq_core.runtime.fuse",
    "quant": None,
    "runtime": None,
    "sources": None,
    "studies": None,
    "workbook": None,
}


register()  # so that transformers reads 6-bit checkpoints


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _LAZY[name]
    return import_module(f"{__name__}.{name}") if home is None else getattr(import_module(home), name)


def __dir__() -> list[str]:
    return ["__version__", *_LAZY]
