"""`python -m flexq_core`: every command is there, and one that is not names the nearest."""

import subprocess
import sys
from importlib import import_module

import pytest

from flexq_core.__main__ import COMMANDS, main
from flexq_core.workbook import paths


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_how_it_is_used(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: python -m flexq_core {command}" in capsys.readouterr().out
    assert import_module(COMMANDS[command][0]).main


def test_an_interruption_is_a_line_also_while_a_command_is_imported(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("flexq_core.__main__.import_module", interrupted)
    assert main(["verify", "folder"]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_the_commands(flag, capsys):
    assert main([flag]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed and about in listed for name, (_, about) in COMMANDS.items())


def test_a_command_that_is_not_there_names_the_nearest(capsys):
    assert main(["docter", "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("there is no command 'docter'. Did you mean 'doctor'?\nusage: ")


def test_no_command_is_an_error_that_lists_them(capsys):
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("usage: ")


def test_help_imports_no_command():
    script = "import sys; from flexq_core.__main__ import main; main(['-h']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=paths.ROOT, check=True, stdout=subprocess.DEVNULL)
