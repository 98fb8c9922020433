"""The command: any name of a model, one line of cause and next step where it cannot be done."""

import pytest
import torch

import flexq_core
from flexq_core.__main__ import main
from flexq_core.runtime.quantize_files import quantize_files
from tests.models import save_model, tiny_model


def test_a_demo_model_by_name(tmp_path, capsys):
    assert main(["quantize", "demo-opt", str(tmp_path / "out"), "--plan", "w6a8"]) == 0
    out = capsys.readouterr().out
    assert "10.5 MiB are now 4.3 MiB" in out and f"flexq_core.load('{tmp_path / 'out'}')" in out
    model = flexq_core.load(tmp_path / "out")
    assert model.config.quantization_config.plan.name == "w6a8"
    assert "# demo-opt, 6-bit" in (tmp_path / "out" / "README.md").read_text()


def test_a_local_folder_and_a_plan_file(tmp_path, capsys):
    model = tiny_model("mistral")
    plan = flexq_core.quantize_model(model, "w6a6").config.quantization_config.plan
    (tmp_path / "plan.json").write_text(plan.to_json())
    source = save_model(model, tmp_path / "my-model")
    assert main(["quantize", str(source), str(tmp_path / "out"), "--plan", str(tmp_path / "plan.json")]) == 0
    assert flexq_core.load(tmp_path / "out", dtype=torch.float32).config.quantization_config.plan == plan
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# my-model, 6-bit" in card and str(tmp_path) not in card


@pytest.mark.parametrize(("kind", "told"), [("starcoder", True), ("gpt-neox", False), ("opt", False), ("llama", False)])
def test_a_model_without_the_plans_sensitive_layers_is_told_apart(kind, told, tmp_path, capsys):
    source = save_model(tiny_model(kind), tmp_path / "my-model")
    assert main(["quantize", str(source), str(tmp_path / "out")]) == 0
    text = "flexq has 8-bit activations in layers called down_proj or fc2 or dense_4h_to_h, and this model has none"
    assert (text in capsys.readouterr().out) == told


def test_scales_of_least_error_are_another_checkpoint_with_less_of_it(tmp_path):
    source, partial = save_model(tiny_model("llama"), tmp_path / "my-model"), tmp_path / "out.partial"
    plain = quantize_files(source, tmp_path / "out")
    (tmp_path / "out").rename(partial)  # as if it had been stopped at the end: its files are of other inputs
    better = quantize_files(source, tmp_path / "out", scales="mse")
    assert all(better.sqnr_db[layer] >= plain.sqnr_db[layer] for layer in plain.sqnr_db)
    assert sum(better.sqnr_db.values()) > sum(plain.sqnr_db.values())
    expected = flexq_core.quantize_model(tiny_model("llama"), "flexq", scales="mse").state_dict()
    found = flexq_core.load(tmp_path / "out", dtype=torch.float32).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected if "_proj.weight" in name)
    with pytest.raises(ValueError, match="accepted where weights are quantised as they are read: absmax, mse"):
        quantize_files(source, tmp_path / "other", scales="output")


@pytest.mark.parametrize(
    ("raised", "status", "text"),
    [(KeyboardInterrupt, 130, "begins anew: no file was finished"), (OSError, 1, "I/O error")],
)
def test_what_ends_a_run_is_one_message(raised, status, text, tmp_path, monkeypatch, capsys):
    def ends(*_, **__):
        raise raised("I/O error")

    monkeypatch.setattr("flexq_core.studies.quantize_command.quantize_files", ends)
    assert main(["quantize", "demo-llama", str(tmp_path / "out")]) == status
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["quantize", "", "out"], ["quantize", "demo-llama", " "], ["verify", ""]])
def test_an_empty_argument_is_not_the_folder_that_one_is_in(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and "it is empty; is a variable unset?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["demo-lama", "out"], "Did you mean 'demo-llama'"),
        (
            ["demo-llama", "out", "--plan", "flexk"],
            "did you mean 'flexq'?); accepted: w6a6, w6a8, flexq, or a plan file *.json",
        ),
        # Before a model is fetched, which can take hours: this one would not be found.
        (["./nowhere", "out", "--plan", "flexk"], "no plan rule is called 'flexk'"),
        (["./nowhere", "."], "is not empty: give another folder"),
        (["demo-llama", "."], "is not empty: give another folder"),
    ],
)
def test_what_cannot_be_done_is_one_message_and_status_1(arguments, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").touch()
    assert main(["quantize", *arguments]) == 1
    captured = capsys.readouterr()
    assert text in captured.err and "Traceback" not in captured.err
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]
