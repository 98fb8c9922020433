"""What the commands of studies share: where records go, and how a command ends."""

import pytest

from flexq_core.workbook import command, paths
from flexq_core.workbook.records import RecordError


def test_a_cards_folder_has_its_short_name(monkeypatch):
    monkeypatch.setattr(command, "provenance", lambda device: {"device": "NVIDIA GeForce RTX 4090"})
    assert command.outputs_of("outputs/reference/{card}", "cuda") == paths.REFERENCE / "rtx-4090"


def test_a_processor_has_no_folder_of_a_card():
    assert command.outputs_of("outputs/mine", "cpu") == paths.ROOT / "outputs" / "mine"
    told = r"outputs/\{card\} is named after a GPU, and torch finds none here: give --outputs a folder's name, or run it on"
    with pytest.raises(ValueError, match=told):
        command.outputs_of("outputs/{card}", "cpu")


def test_a_folder_for_records_is_made_and_left_empty(tmp_path):
    outputs = command.writable_outputs(str(tmp_path / "new"), "cpu")
    assert outputs == tmp_path / "new" and not list((outputs / "records").iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^--outputs .*file cannot be written: Not a directory$"):
        command.writable_outputs(str(tmp_path / "file"), "cpu")


@pytest.mark.parametrize(
    ("raised", "status", "told"),
    [
        (KeyboardInterrupt(), 130, "\nstopped; with --outputs the same command goes on from what is on record\n"),
        (RecordError("the disk is full"), 1, "the disk is full\n"),
    ],
)
def test_what_ends_a_command_is_one_message(raised, status, told, capsys):
    def measure():
        raise raised

    assert command.exit_status(measure) == status
    assert capsys.readouterr().err == told
    assert command.exit_status(lambda: 0) == 0
