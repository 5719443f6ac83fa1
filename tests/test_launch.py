import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import GBN, L1_BN, TINY
from filelock import FileLock
from test_data import squares
from test_study import assert_same_study
from torch import nn

from s6lib.__main__ import main
from s6lib.errors import RunsFailed, StudyError
from s6lib.lab.files import is_complete
from s6lib.lab.launch import run_study
from s6lib.recipes import CONTROL, Condition, Recipe, Run
from s6lib.study import Study


@pytest.mark.slow
def test_runs_side_by_side_equal_runs_in_turn(tiny_study, tmp_path):
    conditions, seeds = (GBN, L1_BN), (2, 1)  # in another order too
    assert_same_study(run_study(TINY, conditions, seeds, tmp_path, jobs=2, show_progress=False), tiny_study)


def test_a_finished_run_is_not_repeated(tiny_study, capsys):
    out = tiny_study.folder
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*.*") if path.name != ".lock"}
    again = run_study(TINY, (L1_BN, GBN, GBN), (1, 2, 1), out, show_progress=True)
    assert files == {path: path.stat().st_mtime_ns for path in out.rglob("*.*") if path.name != ".lock"}
    assert_same_study(again, tiny_study)
    assert capsys.readouterr().err == "all 4 runs are there\n"


@pytest.mark.usefixtures("few_digits")
def test_what_a_killed_study_left_is_removed(tmp_path):
    (tmp_path / ".study-0123").touch()
    run_study(replace(TINY, epochs=1, train_images=64), GBN, 1, tmp_path, jobs=1, show_progress=False)
    assert not list(tmp_path.glob(".study-*"))


@pytest.mark.usefixtures("few_digits")
def test_a_folder_may_be_in_the_users_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = replace(TINY, epochs=1, train_images=64)
    run_study(recipe, GBN, 1, "~/runs", jobs=1, show_progress=False)
    assert (tmp_path / "runs" / "plain").exists()
    assert Study("~/runs").runs == [("gbn", 1)]


@pytest.mark.parametrize("jobs", [-1, 0, 1.5, "2", True])
def test_a_number_of_jobs_that_is_none_is_refused(tmp_path, jobs):
    with pytest.raises(StudyError, match=f"jobs must be a whole number from 1, or None for one per core, not {jobs!r}"):
        run_study(TINY, GBN, 1, tmp_path / "out", jobs=jobs)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", [-1, True, 1.0, "1", None])
def test_a_seed_that_is_no_whole_number_is_refused(tmp_path, seed):
    with pytest.raises(StudyError, match="a seed is a whole number from 0"):
        run_study(TINY, (GBN,), (1, seed), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("few_digits")
def test_two_conditions_of_one_label_have_a_progress_line_each(tmp_path, capsys):
    recipe = replace(TINY, epochs=1, train_images=64)
    run_study(recipe, (Condition("one", "same"), Condition("two", "same")), 1, tmp_path, jobs=1)
    shown = capsys.readouterr().err
    assert "one, seed 1: epoch 1/1" in shown
    assert "two, seed 1: epoch 1/1" in shown
    assert "2/2 epochs" in shown


@pytest.mark.usefixtures("few_digits")
def test_seeds_of_numpy_are_seeds(tmp_path):
    """A stopped run with one goes on, and a finished run is written: JSON knows no int64."""
    recipe = replace(TINY, epochs=1, train_images=64)
    study = run_study(recipe, (GBN,), np.arange(1, 3), tmp_path, jobs=1, show_progress=False)
    assert study.runs == [("gbn", 1), ("gbn", 2)]
    assert_same_study(run_study(recipe, (GBN,), iter((1, 2)), tmp_path, show_progress=False), study)


def test_two_conditions_of_one_name_are_refused(tmp_path):
    with pytest.raises(StudyError, match="share the name of a folder: gbn, l1-bn, gbn"):
        run_study(TINY, (GBN, L1_BN, replace(GBN, num_splits=8)), (1,), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("recipe", "conditions", "difference"),
    [
        (replace(TINY, epochs=3), (GBN,), "epochs = 2, not 3"),
        (replace(TINY, train_images=65), (L1_BN,), "train_images = 640, not 65"),
        (replace(TINY, rotation=7.0, dropout=0.1), (GBN,), "dropout = 0.04, not 0.1; rotation = 15.0, not 7.0"),
        (replace(TINY, epochs=3), (Condition("new", "New"),), "epochs = 2, not 3"),
        (TINY, (replace(GBN, num_splits=8),), "num_splits = 4, not 8"),
    ],
)
def test_a_folder_trained_otherwise_is_refused(tiny_study, recipe, conditions, difference):
    out = tiny_study.folder
    with pytest.raises(StudyError, match=f"was trained with different settings: {difference}"):
        run_study(recipe, conditions, (7,), out)
    assert not Run(recipe, conditions[0], 7).folder(out).exists()


def test_a_folder_in_use_is_refused(tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(StudyError, match="another study is using"):
        run_study(TINY, (GBN,), (1,), tmp_path)


@pytest.mark.parametrize("device", ["cuda:7", "gpu", "tpu"])
def test_a_missing_device_is_refused(tmp_path, device):
    with pytest.raises(StudyError, match=f"device '{device}' is not available here; use auto or one of: .*cpu"):
        run_study(TINY, (GBN,), (1,), tmp_path, device=device)


def test_no_more_workers_than_cores(tmp_path, monkeypatch):
    asked = []

    def spied(jobs):
        asked.append(jobs)
        raise StudyError("not run")

    monkeypatch.setattr("s6lib.lab.workers._pool", spied)
    monkeypatch.setattr("s6lib.lab.workers.cpu_count", lambda: 3)
    for jobs, seeds in ((None, 9), (2, 9), (1000, 9), (None, 2)):
        with pytest.raises(StudyError, match="not run"):
            run_study(TINY, (GBN,), range(seeds), tmp_path, jobs=jobs, device="cpu", show_progress=False)
    assert asked == [3, 2, 3, 2]


@pytest.mark.usefixtures("few_digits")
@pytest.mark.parametrize(
    ("recipe", "condition"),
    [
        (replace(TINY, train_images=1), GBN),
        (replace(TINY, train_images=63), L1_BN),
        (replace(TINY, train_images=65), GBN),
        (replace(TINY, train_images=65, batch_size=1), L1_BN),
        (replace(TINY, batch_size=60_000), GBN),
        (TINY, Condition("gbn-many", "more splits than images in a batch", num_splits=10**6)),
    ],
)
def test_odd_but_sound_requests_are_met(tmp_path, recipe, condition):
    once = replace(recipe, epochs=1, train_images=min(recipe.train_images, 128))
    study = run_study(once, (condition,), (1,), tmp_path, jobs=1, show_progress=False)
    assert np.isfinite(study.history()[["train_loss", "val_loss"]]).all(axis=None)


@pytest.mark.usefixtures("few_digits")
@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_failed_run_lets_the_others_finish(tmp_path, jobs):
    once = replace(TINY, epochs=1)
    bad = Condition("bad", "Bad", l1=1e38)  # diverges, as a learning rate too large does
    with pytest.raises(RunsFailed, match=r"^Bad \(bad\), seed 1: the loss is not finite at epoch 1, step 1;"):
        run_study(once, (bad, GBN), (1,), tmp_path, jobs=jobs, show_progress=False)
    assert not is_complete(Run(once, bad, 1).folder(tmp_path))
    assert Study(tmp_path).runs == [("gbn", 1)]


def test_an_unforeseen_error_in_a_run_is_named(tmp_path):
    folder = Run(TINY, GBN, 1).folder(tmp_path)
    folder.parent.mkdir(parents=True)
    folder.write_text("a file where the folder should be")
    with pytest.raises(RunsFailed, match=r"GBN \(gbn\), seed 1: FileExistsError"):
        run_study(TINY, (GBN,), (1,), tmp_path, jobs=1, show_progress=False)


# --- what is one's own -----------------------------------------------------------------------------------------------


class Own(nn.Module):
    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 5, 3), norm(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))

    def forward(self, images):
        return self.layers(images)


def decorrelated(model):
    weights = model.layers[0].weight.flatten(1)
    return 1e-3 * (weights @ weights.T - torch.eye(4)).square().sum()


OWN = Recipe("own", Own, epochs=1, train_images=640)
OWN_CONDITIONS = (
    CONTROL,
    Condition("groups", "GroupNorm", norm=lambda channels: nn.GroupNorm(2, channels)),
    Condition("decorrelated", penalty=decorrelated),
    Condition("wild", "batch 256, two epochs", changes={"batch_size": 256, "epochs": 2}),
)


@pytest.fixture(scope="module")
def own_study(tmp_path_factory):
    return run_study(OWN, OWN_CONDITIONS, (1, 2), tmp_path_factory.mktemp("own"), jobs=1, show_progress=False)


@pytest.mark.slow
def test_a_study_of_ones_own_runs_in_worker_processes_as_here(own_study, tmp_path):
    assert_same_study(own_study, run_study(OWN, OWN_CONDITIONS, (1, 2), tmp_path, jobs=2, show_progress=False))


def test_a_study_of_ones_own_runs(own_study):
    assert [len(own_study.history().query("condition == @slug and seed == 1")) for slug in own_study.conditions] == [
        1,
        1,
        1,
        2,
    ]
    penalised = own_study.history().query("condition == 'decorrelated'")["penalty"]
    assert (penalised > 0).all()
    assert isinstance(own_study.model("groups").layers[1], nn.GroupNorm)


def test_code_of_the_users_is_recorded_beside_its_first_steps(own_study):
    about = json.loads((own_study.folder / "own" / "groups" / "seed-1" / "run.json").read_text())
    assert about["recipe"]["network"]["name"] == "Own"
    assert "nn.Conv2d(1, 4, 5, 3)" in about["recipe"]["network"]["source"]
    assert "nn.GroupNorm(2, channels)" in about["condition"]["norm"]["source"]
    steps = about["first_steps"]
    assert steps["parameters"]["layers.0.weight"] == "4x1x5x5"
    assert len(steps["steps"]) == 3
    assert {step["penalty"] for step in steps["steps"]} == {0}
    about = json.loads((own_study.folder / "own" / "decorrelated" / "seed-1" / "run.json").read_text())
    assert all(step["penalty"] > 0 for step in about["first_steps"]["steps"])


def test_a_folder_of_ones_own_can_be_read_without_the_code_but_for_its_models(own_study):
    study = Study(own_study.folder, "own")
    assert set(study.runs) == set(own_study.runs)
    assert study.labels["wild"] == "batch 256, two epochs"
    with pytest.raises(StudyError, match=r"Own is known from run\.json alone"):
        study.model("bn")


def test_a_study_of_the_users_data_is_reported_without_its_code(tmp_path, capsys):
    recipe = Recipe("squares", lambda: nn.Sequential(nn.Flatten(), nn.Linear(144, 3)), data=squares, epochs=1)
    run_study(recipe, CONTROL, (1, 2), tmp_path, jobs=1, show_progress=False)
    assert main(["report", str(tmp_path)]) == 0
    assert "squares_accuracy.png" in capsys.readouterr().out
    with pytest.raises(StudyError, match=r"squares is known from run\.json alone"):
        _ = Study(tmp_path, "squares").data


def edited(name):
    """The network under its old name with another kernel, and the normalisation under its old name with more groups."""
    if name == "network":

        class Own(nn.Module):
            def __init__(self, norm=nn.BatchNorm2d):
                super().__init__()
                self.layers = nn.Sequential(nn.Conv2d(1, 4, 3, 3), norm(4), nn.Flatten(), nn.Linear(324, 10))

            def forward(self, images):
                return self.layers(images)

        return replace(OWN, network=Own), CONTROL
    return OWN, replace(OWN_CONDITIONS[1], norm=lambda channels: nn.GroupNorm(4, channels))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("network", r"other parameters \(only one of the two has layers.3.bias, layers.3.weight, layers.4.bias, ...\)"),
        ("norm", "step 1 loss = .*, not "),
    ],
)
def test_code_edited_under_the_same_name_is_refused(own_study, name, said):
    recipe, condition = edited(name)
    with pytest.raises(StudyError, match=f"was trained with different settings: .*{said}"):
        run_study(recipe, (condition,), (3,), own_study.folder)


def test_code_that_does_the_same_is_accepted(own_study):
    same = replace(OWN_CONDITIONS[1], norm=with_two_groups)
    study = run_study(OWN, (same,), 1, own_study.folder, show_progress=False)
    assert study.runs == [("groups", 1)]


def with_two_groups(channels):
    """Another name, other words."""
    return nn.GroupNorm(num_groups=1 + 1, num_channels=channels)


def test_threads_train_the_users_code_and_leave_it_as_it_is(own_study, tmp_path):
    before = vars(Own).copy()
    with ThreadPoolExecutor(2) as executor:
        study = run_study(OWN, OWN_CONDITIONS, (1, 2), tmp_path, executor=executor, show_progress=False)
    assert_same_study(study, own_study)
    assert dict(vars(Own)) == before


def test_a_stopped_run_of_ones_own_goes_on(own_study, tmp_path):
    out = shutil.copytree(own_study.folder, tmp_path / "copy")
    (out / "own" / "groups" / "seed-1" / "run.json").unlink()
    again = run_study(OWN, OWN_CONDITIONS, (1, 2), out, jobs=1, show_progress=False)
    assert_same_study(again, own_study)


# --- what is asked for -----------------------------------------------------------------------------------------------


def test_a_study_returns_what_was_asked_for(tiny_study):
    assert run_study(TINY, ["gbn"], 2, tiny_study.folder, show_progress=False).runs == [("gbn", 2)]
    both = run_study(TINY, iter((GBN, L1_BN)), iter((1, 2)), tiny_study.folder, show_progress=False)
    assert list(both.conditions) == ["gbn", "l1-bn"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"conditions": ["gnb"]}, "'gnb' is no built-in condition; there are: l1-bn"),
        ({"conditions": [4]}, "a condition is a Condition or the slug of a built-in one, not 4"),
        ({"conditions": []}, "conditions must name at least one"),
        ({"seeds": []}, "seeds must name at least one"),
        ({"conditions": [Condition("drop", changes={"dropout": 2.0})]}, "dropout must be a finite number from 0 to 1"),
        ({"recipe": Recipe("bare", nn.Identity)}, "with parameters to train"),
    ],
)
def test_what_cannot_be_met_is_said_before_anything_is_made(tmp_path, asked, said):
    with pytest.raises(StudyError, match=said):
        run_study(**{"recipe": TINY, "conditions": (GBN,), "seeds": (1,), "out": tmp_path / "out", **asked})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_a_device_may_be_torchs(tiny_study, device):
    assert run_study(TINY, (GBN,), 1, tiny_study.folder, device=device, show_progress=False).runs == [("gbn", 1)]
