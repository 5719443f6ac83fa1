from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import count
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import GBN, L1_BN, ONCE, TINY
from filelock import FileLock
from test_run import SQUARES
from test_study import assert_same_study
from torch import nn

import s6lib.lab.run
from s6lib.__main__ import main
from s6lib.data import load_mnist
from s6lib.errors import RunsFailed, S6Error, StudyError
from s6lib.lab.files import is_complete, read_about
from s6lib.lab.launch import run_study
from s6lib.models import PlainNet
from s6lib.recipes import CONTROL, Condition, Recipe, Run
from s6lib.study import Study


def run_here(recipe, conditions, seeds, out, **settings):
    return run_study(recipe, conditions, seeds, out, **{"jobs": 1, "show_progress": False, **settings})


@pytest.mark.parametrize("part", range(4))
def test_runs_on_different_images_or_labels_are_not_compared(tmp_path, monkeypatch, part):
    """As those of a `data` that draws without a seed, in two processes."""
    sums = (number if number % 4 == part else 0 for number in count())
    monkeypatch.setattr("s6lib.lab.trial.zlib", SimpleNamespace(crc32=Mock(side_effect=sums)))
    own = Recipe("own", PlainNet, epochs=1, data=lambda: [part.part(slice(64)) for part in load_mnist()])
    with pytest.raises(StudyError, match="have different images or labels: `data` must give the same"):
        run_here(own, CONTROL, (1, 2), tmp_path)


@pytest.mark.usefixtures("few_digits")
def test_a_file_that_is_edited_while_it_trains_is_recorded_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "edited_in_training.py"
    file.write_text("def penalty(model):\n    return 0 * model.layers[0].weight.sum()\n")
    monkeypatch.syspath_prepend(tmp_path)
    from edited_in_training import penalty

    def edit(*arguments):
        file.write_text("def penalty(model):\n    return 1.0\n")
        return original(*arguments)

    original = s6lib.lab.run.train_epoch
    monkeypatch.setattr(s6lib.lab.run, "train_epoch", edit)
    run_here(ONCE, Condition("own", penalty=penalty), 1, tmp_path)
    (folder,) = tmp_path.glob("*/own/seed-1")
    assert "return 0 *" in read_about(folder)["condition"]["penalty"]["source"]


# --- what is asked for -----------------------------------------------------------------------------------------------


def test_a_finished_run_is_not_repeated(tiny_study, capsys, monkeypatch):
    """However it is asked for; nor are first steps taken where all parts of a run are the library's."""
    monkeypatch.setattr("s6lib.lab.launch.first_steps", None)
    out = tiny_study.folder
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*.*") if path.name != ".lock"}
    again = run_study(TINY, (L1_BN, GBN, "gbn"), np.array([1, 2, 1]), out, device=torch.device("cpu"))
    assert_same_study(again, tiny_study)
    assert capsys.readouterr().err == "all 4 runs are there\n"
    assert "first_steps" not in read_about(out / "plain" / "gbn" / "seed-1")
    assert run_here(TINY, ["gbn"], 2, out).runs == [("gbn", 2)]
    assert list(run_here(TINY, iter((GBN, L1_BN)), iter((1, 2)), out, device="cpu").conditions) == ["gbn", "l1-bn"]
    renamed = run_here(TINY, replace(GBN, label="ghosts"), 1, out)  # a label is but a name
    assert (renamed.labels, set(renamed.history()["label"])) == ({"gbn": "ghosts"}, {"ghosts"})
    assert files == {path: path.stat().st_mtime_ns for path in out.rglob("*.*") if path.name != ".lock"}


@pytest.mark.usefixtures("few_digits")
def test_a_study_in_the_users_home_shows_a_line_for_each_run(tmp_path, monkeypatch, capsys):
    """Two conditions may share a label, and seeds may be numpy's, which JSON does not know."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / ".study-0123").touch()  # of a study that was killed
    run_study(ONCE, (Condition("one", "same"), Condition("two", "same")), np.arange(1, 2), "~/runs", jobs=1)
    shown = capsys.readouterr().err
    for line in ("same (one), seed 1: epoch 1/1", "same (two), seed 1: epoch 1/1", "2/2 epochs"):
        assert line in shown
    assert Study("~/runs").runs == [("one", 1), ("two", 1)]
    assert not list((tmp_path / "runs").glob(".study-*"))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        *(({"jobs": jobs}, f"jobs must be a whole number from 1, not {jobs!r}") for jobs in (0, 1.5, "2", True)),
        *(({"seeds": (1, one)}, f"a seed must be a whole number from 0, not {one!r}") for one in (-1, True, 1.0, None)),
        *(({"device": name}, f"device '{name}' is not available here; use auto") for name in ("cuda:7", "gpu")),
        ({"recipe": "plan"}, "'plan' is neither a Recipe nor the name of a built-in one: plain, bottleneck"),
        ({"conditions": ["gnb"]}, "'gnb' is neither a Condition nor the name of a built-in one: l1-bn"),
        ({"conditions": 4}, "4 is neither a Condition"), ({"executor": 4}, "executor must be .*Executor, not 4"),
        ({"seeds": []}, "conditions and seeds must name at least one each"),
        ({"conditions": (GBN, L1_BN, replace(GBN, num_splits=8))}, "two conditions share the name gbn; rename"),
        ({"recipe": replace(TINY, shift=99.0)}, "GBN .gbn. cannot be trained: shift must be less than the 28 pixels"),
        ({"recipe": replace(TINY, network=partial(PlainNet, width=0))}, "GBN .gbn. cannot be trained: width must be"),
    ],
)  # fmt: skip
def test_what_cannot_be_met_is_said_before_anything_is_made(tmp_path, asked, said):
    with pytest.raises(StudyError, match=said):
        run_study(**{"recipe": TINY, "conditions": (GBN,), "seeds": (1,), "out": tmp_path / "out", **asked})
    assert not list(tmp_path.glob("out/plain"))


@pytest.mark.parametrize(
    ("recipe", "condition", "difference"),
    [
        (replace(TINY, rotation=7.0, dropout=0.1), GBN, "dropout = 0.04, not 0.1; rotation = 15, not 7"),
        (replace(TINY, epochs=3), Condition("new", "New"), "epochs = 2, not 3"),  # from those of the other conditions
        (TINY, replace(GBN, num_splits=8), "num_splits = 4, not 8"),
        (TINY, replace(GBN, epochs=2), "changes = None, not"),
    ],
)
def test_a_folder_trained_otherwise_is_neither_trained_on_nor_opened(tiny_study, recipe, condition, difference):
    out = tiny_study.folder
    with pytest.raises(StudyError, match=f"was trained with different settings: {difference}"):
        run_study(recipe, condition, 7, out)
    assert not Run(recipe, condition, 7).folder(out).exists()
    with pytest.raises(StudyError, match=f"was trained with different settings: {difference}"):
        Study(out, recipe, [condition, L1_BN])


def test_a_folder_in_use_is_refused(tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(StudyError, match="another study is using"):
        run_study(TINY, (GBN,), (1,), tmp_path)


@pytest.mark.usefixtures("few_digits")
@pytest.mark.parametrize(
    ("recipe", "condition"),
    [
        (replace(ONCE, train_images=1), L1_BN),
        (replace(ONCE, train_images=65), GBN),
        (replace(ONCE, train_images=65, batch_size=1), L1_BN),
        (replace(ONCE, batch_size=60_000), GBN),
    ],
)
def test_odd_but_sound_requests_are_met(tmp_path, recipe, condition):
    study = run_here(recipe, condition, 1, tmp_path)
    assert np.isfinite(study.history()[["train_loss", "test_loss"]]).all(axis=None)


@pytest.mark.usefixtures("few_digits")
@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_failed_run_lets_the_others_finish_and_is_named(tmp_path, jobs):
    bad = Condition("bad", "Bad", l1=1e38)  # diverges, as a learning rate too large does
    blocked = Run(ONCE, Condition("blocked"), 1).folder(tmp_path)
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where the folder should be")
    with pytest.raises(RunsFailed) as error:
        run_here(ONCE, (bad, GBN, Condition("blocked")), 1, tmp_path, jobs=jobs)
    first, second = sorted(str(error.value).splitlines())
    assert first.startswith("Bad (bad), seed 1: the loss is not finite at epoch 1; lower")
    assert second.startswith("blocked, seed 1: FileExistsError")
    assert not is_complete(Run(ONCE, bad, 1).folder(tmp_path))
    assert Study(tmp_path).runs == [("gbn", 1)]


# --- what is one's own -----------------------------------------------------------------------------------------------


class Own(nn.Sequential):
    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__(nn.Conv2d(1, 4, 5, 3), norm(4), nn.Flatten(), nn.Linear(256, 10), nn.Dropout(0.1))

    def train(self, mode=True):  # forgets to return itself
        super().train(mode)


def decorrelated(model):
    weights = model[0].weight.flatten(1)
    return 1e-3 * (weights @ weights.T - torch.eye(4)).square().sum()


OWN = Recipe("own", Own, epochs=1, train_images=640)
OWN_CONDITIONS = (
    CONTROL,
    Condition("groups", "GroupNorm", norm=lambda channels: nn.GroupNorm(2, channels)),
    Condition("decorrelated", penalty=decorrelated),
    Condition("wild", "batch 256, two epochs", batch_size=256, epochs=2),
)


@pytest.fixture(scope="module")
def own_study(tmp_path_factory):
    return run_here(OWN, OWN_CONDITIONS, (1, 2), tmp_path_factory.mktemp("own"))


def test_a_study_of_ones_own_runs_and_is_recorded_with_its_code(own_study):
    epochs = own_study.history().query("seed == 1").groupby("condition")["epoch"].max()
    assert epochs.to_dict() == {"bn": 1, "groups": 1, "decorrelated": 1, "wild": 2}
    assert (own_study.history().query("condition == 'decorrelated'")["penalty"] > 0).all()
    assert isinstance(own_study.model("groups")[1], nn.GroupNorm)
    about = read_about(own_study.folder / "own" / "groups" / "seed-1")
    assert about["recipe"]["network"]["name"] == "Own"
    assert "nn.Conv2d(1, 4, 5, 3)" in about["recipe"]["network"]["source"]
    assert "nn.GroupNorm(2, channels)" in about["condition"]["norm"]["source"]
    assert about["first_steps"]["parameters"]["0.weight"] == "4x1x5x5"
    without_code = Study(own_study.folder)
    assert set(without_code.runs) == set(own_study.runs)
    assert without_code.labels["wild"] == "batch 256, two epochs"
    with pytest.raises(StudyError, match=r"Own is known from run\.json alone"):
        without_code.model("bn")


@pytest.mark.parametrize("workers", ["threads", pytest.param("processes", marks=pytest.mark.slow)])
def test_a_study_of_ones_own_runs_elsewhere_as_here(own_study, tmp_path, workers):
    """Threads share the random generators, and the user's classes, which they leave as they are."""
    before = vars(Own).copy()
    with ThreadPoolExecutor(2) as executor:
        settings = {"executor": executor, "jobs": None} if workers == "threads" else {"jobs": 2}
        study = run_here(OWN, OWN_CONDITIONS[::-1], (2, 1), tmp_path, **settings)  # in another order too
    assert_same_study(study, own_study)
    assert dict(vars(Own)) == before


def test_a_study_of_the_users_data_is_reported_without_its_code(tmp_path, capsys):
    run_here(SQUARES, CONTROL, (1, 2), tmp_path)
    assert main(["report", str(tmp_path)]) == 0
    assert "squares_accuracy.png" in capsys.readouterr().out
    with pytest.raises(StudyError, match=r"squares is known from run\.json alone"):
        _ = Study(tmp_path).data


def test_code_that_was_edited_or_is_wrong_is_refused_and_nothing_is_trained(own_study):
    Other = type("Own", (PlainNet,), {"__doc__": None})
    wrong = Condition("wrong", penalty=lambda model: None)
    for recipe, condition, said in (
        (replace(OWN, network=Other), CONTROL, r"settings: .*other parameters \(only one of the two has 0.bias"),
        (OWN, (CONTROL, wrong), "^wrong cannot be trained: .* a scalar tensor, not NoneType"),
    ):
        with pytest.raises(S6Error, match=said):
            run_study(recipe, condition, (3,), own_study.folder)
    assert not list(own_study.folder.glob("*/*/seed-3"))


def test_a_model_whose_code_has_changed_is_refused(own_study, monkeypatch):
    assert not own_study.model("bn", 1).training
    monkeypatch.setattr(Own, "forward", lambda self, images: -nn.Sequential.forward(self, images))
    with pytest.raises(StudyError, match=r"bn/seed-1 does not give the predictions saved with it for .* give the code"):
        own_study.model("bn", 1)


@pytest.mark.parametrize("where", ["load_images", "first_steps"])
def test_a_stop_before_training_says_how_to_go_on(tmp_path, monkeypatch, where):
    monkeypatch.setattr(f"s6lib.lab.launch.{where}", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt, match="every finished epoch is kept: run the cell again to go on"):
        run_here(OWN, CONTROL, 1, tmp_path)
