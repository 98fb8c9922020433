"""Tells transformers of the 6-bit format when transformers first needs its quantisers, and not before.

`AutoModelForCausalLM.from_pretrained` reads a 6-bit checkpoint after `import flexq_core`. transformers' quantisers take
seconds to import and bring torch along; so, unless they are there already, the plug-in waits for their import.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec

QUANTIZERS = "transformers.quantizers.auto"
PLUGIN = "flexq_core.runtime.hf_quantizer"


def register() -> None:
    """Import the plug-in, which registers itself: now if transformers' quantisers are imported, else right after they are."""
    if QUANTIZERS in sys.modules:
        import_module(PLUGIN)
    elif not any(isinstance(finder, _AfterQuantizers) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterQuantizers())


class _AfterQuantizers:
    """A finder that finds nothing itself: it adds the plug-in's import to the end of that of transformers' quantisers, once."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != QUANTIZERS:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_then_register(module):
                execute(module)
                import_module(PLUGIN)

            spec.loader.exec_module = execute_then_register
        return spec
