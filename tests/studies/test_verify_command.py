"""The command: what is as it was saved, and in one line what is not."""

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from flexq_core.__main__ import main
from flexq_core.runtime.quantize_files import quantize_files
from tests.models import save_model, tiny_model


@pytest.fixture
def checkpoint(tmp_path):
    quantize_files(save_model(tiny_model("llama"), tmp_path / "model"), tmp_path / "out")
    return tmp_path / "out"


def test_what_was_saved_is_what_is_there(checkpoint, capsys):
    assert main(["verify", str(checkpoint)]) == 0
    assert capsys.readouterr().out.endswith(f"{checkpoint}: all tensors are as they were saved\n")


def test_that_experts_stay_unquantised_is_nothing_that_a_checksum_lacks(tmp_path, capsys):
    with pytest.warns(UserWarning, match="are not quantised"):
        quantize_files(save_model(tiny_model("mixtral"), tmp_path / "model"), tmp_path / "out")
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out.endswith(f"{tmp_path / 'out'}: all tensors are as they were saved\n")


def test_an_altered_bit_is_told_in_one_line(checkpoint, capsys):
    file = min(checkpoint.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert main(["verify", str(checkpoint)]) == 1
    told = capsys.readouterr().err
    assert "is altered: its bits are not those that were saved" in told and told.count("\n") == 1


def test_tensors_without_a_checksum_are_told_apart(checkpoint, capsys):
    file = min(checkpoint.glob("*.safetensors"))
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    save_file(tensors, file, metadata={"format": "pt"})
    assert main(["verify", str(checkpoint)]) == 0
    captured = capsys.readouterr()
    assert "tensors have no checksum, first" in captured.err
    assert captured.out.endswith("all tensors that have a checksum are as they were saved\n")


def test_no_checkpoint_says_what_is_accepted(tmp_path, capsys):
    assert main(["verify", str(tmp_path / "nowhere")]) == 1
    assert "is no folder; accepted: one that `python -m flexq_core quantize` wrote" in capsys.readouterr().err
