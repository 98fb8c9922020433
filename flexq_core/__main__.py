"""The package's command line: `python -m flexq_core COMMAND ...`. A command is a module's `main(arguments) -> exit status`."""

from __future__ import annotations

import sys
from difflib import get_close_matches
from importlib import import_module

COMMANDS = {
    "quantize": ("flexq_core.studies.quantize_command", "keep a model's 6-bit checkpoint"),
    "verify": ("flexq_core.studies.verify_command", "whether a 6-bit checkpoint is what was saved"),
    "doctor": ("flexq_core.studies.doctor", "what this machine has, what will run on it, and how to get the rest"),
}
"""Name → module, imported when it is asked for, and a line of help."""


def main(arguments: list[str] | None = None) -> int:
    """Hand over to the command's module; returns the exit status, 2 where no command is named or known."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name not in COMMANDS:
        nearest = get_close_matches(name, COMMANDS, n=1, cutoff=0.4)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        said = f"there is no command {name!r}.{hint}\n" if name else ""
        print(f"{said}{_usage()}", file=sys.stderr)
        return 2
    try:
        return import_module(COMMANDS[name][0]).main(rest)
    except KeyboardInterrupt:  # while it is imported, too
        print("\ninterrupted", file=sys.stderr)
        return 130  # as a shell has it


def _usage() -> str:
    lines = [f"  {name:<10} {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(("usage: python -m flexq_core COMMAND ...   (COMMAND --help says more)", *lines))


if __name__ == "__main__":
    sys.exit(main())
