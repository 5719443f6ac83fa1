import os
import subprocess
import sys
from unittest.mock import Mock

import pytest

from s6lib.__main__ import main
from s6lib.data import DataError
from s6lib.recipes import ALL_CONDITIONS


@pytest.mark.usefixtures("few_digits")
def test_run_trains_reports_and_draws(tmp_path, capsys):
    command = ["run", "--conditions", "gbn", "bn", "--epochs", "1", "--train-images", "640", "--jobs", "1"]
    command += ["--out", str(tmp_path), "--device", "cpu"]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "GBN     1" in printed.out
    assert "GBN (gbn), seed 1: epoch 1/1, accuracy" in printed.err
    names = {"plain_accuracy.png", "plain_loss.png", "plain_misclassified_gbn.png"}
    assert {path.name for path in (tmp_path / "images").iterdir()} == names
    assert all(name in printed.out for name in names)

    assert main(["report", str(tmp_path), "--images", str(tmp_path / "else")]) == 0
    assert {path.name for path in (tmp_path / "else").iterdir()} == names
    table, _, _ = capsys.readouterr().out.partition("\n\n")
    assert table in printed.out

    (tmp_path / "bottleneck" / "gbn" / "seed-1").mkdir(parents=True)  # begun, and stopped in its first epoch
    assert main(["report", str(tmp_path)]) == 0
    weights = tmp_path / "plain" / "bn" / "seed-1" / "weights.pt"  # which no table and no figure needs
    weights.write_bytes(weights.read_bytes()[:-1])
    assert main(["report", str(tmp_path)]) == 1
    assert f"{weights} is damaged" in capsys.readouterr().err


def refused(command, capsys):
    """The one line that a wrong request ends with, and exit code 2."""
    try:
        code = main(command)
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    assert code == 2
    assert not printed.out
    assert printed.err.count("\n") == 1
    return printed.err


def test_a_wrong_request_is_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in {"none.py": "", "fails.py": "1 / 0", "half.py": "from s6lib import PLAIN as RECIPE"}.items():
        (tmp_path / name).write_text(text)
    for command, message in {
        "run --epochs 0": "epochs must be a whole number from 1, not 0",
        "run --seeds -1": "a seed must be a whole number from 0, not -1",
        "walk": "invalid choice: 'walk'",
        "report": "arguments are required: DIR",
        "run --cluster dask://a/b:1": "'dask://a/b:1' is not of the form dask://HOST:PORT",
        "run --cluster tcp://127.0.0.1:8786": "is not of the form dask://HOST:PORT",
        "run --train-images 60001": "train_images must be a whole number from 1 to 60,000, not 60001",
        "run --epochs 999999999999999999999 --recipe x": "invalid choice: 'x' (choose from",
        "run --conditions gnb": "'gnb' is not known; there are: l1-bn, ",
        "run --device tpu": "device 'tpu' is not available here; use auto or one of: cpu",
        "run --out none.py": "cannot write in none.py (File exists); choose another folder",
        "run --study nowhere.py": "there is no Python file nowhere.py",
        "run --study fails.py": "fails.py cannot be imported: ZeroDivisionError",
        "run --study none.py": "none.py must define RECIPE, a s6lib.Recipe, not None",
        "run --study half.py": "half.py must define CONDITIONS, a tuple of s6lib.Condition, not None",
        "run --study mine.py --recipe plain": "argument --recipe: not allowed with argument --study",
        "report nowhere": "no complete",
    }.items():
        assert message in refused(command.split(), capsys)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("broken", "error", "said"),
    [
        ("s6lib.lab.run.evaluate", ArithmeticError("no"), "complete:\nGBN (gbn), seed 1: ArithmeticError: no\n"),
        ("s6lib.recipes.load_data", DataError("archive missing"), "python -m s6lib: archive missing\n"),
    ],
)
def test_a_failed_run_or_missing_images_are_exit_code_1(tmp_path, capsys, monkeypatch, broken, error, said):
    monkeypatch.setattr(broken, Mock(side_effect=error))
    command = ["run", "--conditions", "gbn", "--epochs", "1", "--train-images", "64", "--jobs", "1"]
    assert main([*command, "--out", str(tmp_path), "--device", "cpu"]) == 1
    assert capsys.readouterr().err.endswith(said)


def test_help_names_the_commands_and_the_conditions(capsys):
    for command in (["--help"], ["run", "--help"], ["report", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 0
    help = capsys.readouterr().out
    assert "python -m s6lib report results" in help
    assert all(slug in "".join(help.split()) for slug in ALL_CONDITIONS)


OWN = """
from torch import nn
from s6lib import CONTROL, Condition, Recipe

class Tiny(nn.Sequential):
    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__(nn.Conv2d(1, 4, 5, 3), norm(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))

RECIPE = Recipe("tiny", Tiny, epochs=1, train_images=640, held_out=True)
CONDITIONS = (CONTROL, Condition("groups", "GroupNorm", norm=lambda channels: nn.GroupNorm(2, channels)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_study_of_ones_own_runs_and_is_reported(tmp_path, capsys, monkeypatch, jobs):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(OWN)
    assert main(["run", "--study", "mine.py", "--seeds", "1", "2", "--jobs", jobs, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "Tiny (tiny)" in printed
    assert "accuracy on the held-out images at the last epoch, %" in printed
    assert "paired differences" in printed
    kinds = ("accuracy", "loss", "misclassified_bn", "replication", "differences")
    assert {path.name for path in (tmp_path / "runs/images").iterdir()} == {f"tiny_{kind}.png" for kind in kinds}
    assert main(["report", "runs", "--study", "mine.py", "--images", "with"]) == 0
    assert capsys.readouterr().out.replace("with/", "runs/images/") == printed
    assert main(["report", "runs", "--images", "without"]) == 0  # all but what needs the network itself
    assert {path.name for path in (tmp_path / "without").iterdir()} == {
        f"tiny_{kind}.png" for kind in kinds if not kind.startswith("misclassified")
    }


@pytest.mark.slow
@pytest.mark.usefixtures("few_digits")
def test_more_seeds_and_another_condition_are_reported_for_what_was_asked(tmp_path, capsys, monkeypatch):
    """The README's own sequence: first the study, then two conditions with more seeds."""
    monkeypatch.setenv("HOME", str(tmp_path))
    short = ["--epochs", "1", "--train-images", "640", "--jobs", "1", "--device", "cpu", "--out", "~"]
    assert main(["run", "--conditions", "l1-bn", "gbn", *short]) == 0
    assert main(["run", "--conditions", "gbn", "bn", "--seeds", "1", "2", *short]) == 0
    assert "GBN" in capsys.readouterr().out
    assert (tmp_path / "images" / "plain_differences.png").exists()
    assert main(["report", "~"]) == 0
    assert "comparisons are paired by seed, and these runs are missing" in capsys.readouterr().out


@pytest.mark.slow
def test_a_report_whose_reader_has_read_enough_ends_without_a_word(tiny_study):
    script = f"{sys.executable} -m s6lib report {tiny_study.folder} | true"
    assert subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False).stderr == ""


@pytest.mark.slow
def test_a_letter_that_the_output_lacks_and_a_file_named_like_a_module_of_pythons(tmp_path):
    (tmp_path / "random.py").write_text(OWN.replace("GroupNorm", "\N{GREEK SMALL LETTER LAMDA} = 1e-4", 1), "utf-8")
    command = [sys.executable, "-P"] if sys.version_info >= (3, 11) else [sys.executable]
    command += ["-m", "s6lib", "run", "--study", str(tmp_path / "random.py"), "--jobs", "1", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert b"\\u03bb = 1e-4" in done.stdout
    assert len(list(tmp_path.rglob("*.png"))) == 3
