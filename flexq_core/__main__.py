"""`python -m flexq_core <command>`: what can be done from a shell, a module each."""

from __future__ import annotations

import sys
from importlib import import_module

COMMANDS = {
    "quantize": ("flexq_core.studies.quantize_command", "keep a model's 6-bit checkpoint"),
}
"""name → (module with `main(arguments) -> exit status`, help)."""


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in COMMANDS:
        module, _ = COMMANDS[arguments[0]]
        return import_module(module).main(arguments[1:])
    asked = bool(arguments) and arguments[0] in ("-h", "--help")
    lines = [f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()]
    usage = "usage: python -m flexq_core <command> [--help]\n\n" + "\n".join(lines)
    if arguments and not asked:
        usage = f"no command is called {arguments[0]!r}\n{usage}"
    print(usage, file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main())
