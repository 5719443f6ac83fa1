import pytest
import torch

from s6lib.__main__ import main
from s6lib.data import MnistError


def test_run_trains_reports_and_draws(tmp_path, capsys):
    command = ["run", "--conditions", "gbn", "bn", "--epochs", "1", "--train-images", "640", "--jobs", "1"]
    command += ["--out", str(tmp_path), "--device", "cpu"]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "GBN     1" in printed.out
    assert "GBN, seed 1: epoch 1/1, validation accuracy" in printed.err
    names = {"plain_accuracy.png", "plain_loss.png", "plain_misclassified_gbn.png"}
    assert {path.name for path in (tmp_path / "images").iterdir()} == names
    assert all(name in printed.out for name in names)

    assert main(["report", str(tmp_path), "--images", str(tmp_path / "else")]) == 0
    assert {path.name for path in (tmp_path / "else").iterdir()} == names
    table, _, _ = capsys.readouterr().out.partition("\n\n")
    assert table in printed.out

    (tmp_path / "bottleneck" / "gbn" / "seed-1").mkdir(parents=True)  # begun, and stopped in its first epoch
    assert main(["report", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["run", "--recipe", "plian"], "'plian' is not known; did you mean 'plain'?"),
        (["run", "--conditions", "gnb"], "'gnb' is not known; did you mean 'gbn'?"),
        (["run", "--epochs", "0"], "'0' is not a whole number from 1"),
        (["run", "--seeds", "-1"], "'-1' is not a whole number from 0"),
        (["run", "--jobs", "two"], "'two' is not a whole number from 1"),
        (["run", "--device", "tpu"], "invalid choice: 'tpu'"),
        (["walk"], "invalid choice: 'walk'"),
        (["report"], "arguments are required: DIR"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_code_2(command, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["run", "--train-images", "60001"], "train_images must be a whole number from 1 to 60000, not 60001"),
        (["report", "nowhere"], "no complete plain run in nowhere; train some"),
        pytest.param(
            ["run", "--device", "cuda"],
            "device 'cuda' is not available here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_a_request_that_cannot_be_met_is_one_line_and_exit_code_2(command, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_a_failed_run_is_exit_code_1(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("s6lib.run.evaluate", lambda *_: 1 / 0)
    command = ["run", "--conditions", "gbn", "--epochs", "1", "--train-images", "64", "--jobs", "1"]
    assert main([*command, "--out", str(tmp_path), "--device", "cpu"]) == 1
    assert "GBN (gbn), seed 1: ZeroDivisionError" in capsys.readouterr().err


def test_missing_digits_are_one_line_and_exit_code_1(tmp_path, capsys, monkeypatch):
    def missing(*_):
        raise MnistError("archive missing")

    monkeypatch.setattr("s6lib.study.load_mnist", missing)
    assert main(["run", "--out", str(tmp_path), "--device", "cpu"]) == 1
    assert capsys.readouterr().err.endswith("python -m s6lib: archive missing\n")


def test_help_names_the_commands_and_the_conditions(capsys):
    for command in (["--help"], ["run", "--help"], ["report", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "python -m s6lib report results" in printed
    assert "l1-l2-gbn" in printed
