import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import GBN, L1_BN, TINY
from filelock import FileLock

from s6lib.conditions import Condition
from s6lib.files import RESULTS, DamagedFile, is_complete
from s6lib.study import RunsFailed, Study, StudyError, run_folder, run_study


def assert_same_study(a, b):
    assert a.folders.keys() == b.folders.keys()
    pd.testing.assert_frame_equal(
        a.history.drop(columns="seconds"), b.history.drop(columns="seconds"), check_exact=True
    )
    for run in a.folders:
        assert np.array_equal(a.predictions(*run), b.predictions(*run))
        assert (a.folders[run] / "weights.pt").read_bytes() == (b.folders[run] / "weights.pt").read_bytes()


def test_runs_side_by_side_equal_runs_in_turn(tiny_study, tmp_path):
    conditions, seeds = (GBN, L1_BN), (2, 1)  # in another order too
    assert_same_study(run_study(TINY, conditions, seeds, tmp_path, jobs=2, show_progress=False), tiny_study)


def test_a_finished_run_is_not_repeated(tiny_study, capsys):
    out = tiny_study.folders["gbn", 1].parents[2]
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*.*") if path.name != ".lock"}
    again = run_study(TINY, (L1_BN, GBN, GBN), (1, 2, 1), out, show_progress=True)
    assert files == {path: path.stat().st_mtime_ns for path in out.rglob("*.*") if path.name != ".lock"}
    assert_same_study(again, tiny_study)


@pytest.mark.parametrize("seed", [-1, True, 1.0, "1", None])
def test_a_seed_that_is_no_whole_number_is_refused(tmp_path, seed):
    with pytest.raises(StudyError, match="a seed is a whole number from 0"):
        run_study(TINY, (GBN,), (1, seed), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_seeds_of_numpy_are_seeds(tmp_path):
    """A stopped run with one goes on, and a finished run is written: JSON knows no int64."""
    recipe = replace(TINY, epochs=1, train_images=64)
    study = run_study(recipe, (GBN,), np.arange(1, 3), tmp_path, jobs=1, show_progress=False)
    assert [*study.folders] == [("gbn", 1), ("gbn", 2)]
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
    out = tiny_study.folders["gbn", 1].parents[2]
    with pytest.raises(StudyError, match=f"was trained with {difference}"):
        run_study(recipe, conditions, (7,), out)
    assert not run_folder(out, recipe, conditions[0], 7).exists()


def test_a_folder_in_use_is_refused(tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(StudyError, match="another study is at work in"):
        run_study(TINY, (GBN,), (1,), tmp_path)


@pytest.mark.parametrize("device", ["cuda:7", "gpu", "tpu"])
def test_a_missing_device_is_refused(tmp_path, device):
    with pytest.raises(StudyError, match=f"device '{device}' is not available here; use auto or one of: .*cpu"):
        run_study(TINY, (GBN,), (1,), tmp_path, device=device)


def test_no_more_workers_than_cores(tmp_path, monkeypatch):
    asked = []

    def spied(n_jobs, **settings):
        asked.append(n_jobs)
        return lambda tasks: ()

    monkeypatch.setattr("s6lib.study.Parallel", spied)
    monkeypatch.setattr("s6lib.study.cpu_count", lambda: 3)
    for jobs in (None, 1, 2, 1000):
        with pytest.raises(StudyError, match="no complete"):
            run_study(TINY, (GBN,), (1,), tmp_path, jobs=jobs, device="cpu", show_progress=False)
    assert asked == [3, 1, 2, 3]


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
    assert np.isfinite(study.history[["train_loss", "val_loss"]]).all(axis=None)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failed_run_lets_the_others_finish(tmp_path, jobs):
    once = replace(TINY, epochs=1)
    bad = Condition("bad", "Bad", l1=1e38)  # diverges, as a learning rate too large does
    with pytest.raises(RunsFailed, match=r"^Bad \(bad\), seed 1: the loss is not finite at epoch 1, step 1;"):
        run_study(once, (bad, GBN), (1,), tmp_path, jobs=jobs, show_progress=False)
    assert not is_complete(run_folder(tmp_path, once, bad, 1))
    assert list(Study(tmp_path).folders) == [("gbn", 1)]


def test_an_unforeseen_error_in_a_run_is_named(tmp_path):
    folder = run_folder(tmp_path, TINY, GBN, 1)
    folder.parent.mkdir(parents=True)
    folder.write_text("a file where the folder should be")
    with pytest.raises(RunsFailed, match=r"GBN \(gbn\), seed 1: FileExistsError"):
        run_study(TINY, (GBN,), (1,), tmp_path, jobs=1, show_progress=False)


# --- reading ---------------------------------------------------------------------------------------------------------


def test_history_is_tidy(tiny_study):
    history = tiny_study.history
    assert list(history.columns[:4]) == ["condition", "seed", "epoch", "lr"]
    assert len(history) == 2 * 2 * 2
    assert history.groupby(["condition", "seed"], sort=False).ngroups == 4
    assert list(history["condition"].unique()) == ["l1-bn", "gbn"]
    assert history["penalty"].gt(0).eq(history["condition"] == "l1-bn").all()


def test_summary_is_of_the_last_epoch(tiny_study):
    summary = tiny_study.summary()
    assert list(summary["label"]) == ["L1 + BN", "L1 + BN", "GBN", "GBN"]
    for row in summary.itertuples():
        history = tiny_study.history.query("condition == @row.condition and seed == @row.seed")
        assert row.accuracy == history["val_accuracy"].iloc[-1]
        assert row.best_accuracy == history["val_accuracy"].max()
        assert history.loc[history["epoch"] == row.best_epoch, "val_accuracy"].item() == row.best_accuracy
        assert row.seconds == pytest.approx(history["seconds"].sum())


def test_model_is_the_saved_one(tiny_study, mnist):
    from s6lib.train import evaluate

    for run in tiny_study.folders:
        model = tiny_study.model(*run)
        assert not model.training
        evaluation = evaluate(model, mnist[1])
        assert evaluation.predictions.tolist() == tiny_study.predictions(*run).tolist()


def test_study_of_nothing_and_a_run_that_is_not_there(tiny_study, tmp_path):
    with pytest.raises(StudyError, match=r"no complete plain run in .*python -m s6lib run --recipe plain"):
        Study(tmp_path)
    for name in (tiny_study.model, tiny_study.predictions):
        with pytest.raises(StudyError, match="no complete run of condition 'gbn', seed 3; there are: l1-bn 1, l1-bn 2"):
            name("gbn", 3)


@pytest.mark.parametrize("name", RESULTS)
def test_a_missing_result_is_named(tiny_study, tmp_path, name):
    out = shutil.copytree(tiny_study.folders["gbn", 1].parents[2], tmp_path / "copy")
    (run_folder(out, TINY, GBN, 2) / name).unlink()
    study = Study(out)
    with pytest.raises(DamagedFile, match=name):
        study.summary(), study.model("gbn", 2), study.predictions("gbn", 2)


def test_a_study_can_look_at_some_runs_alone(tiny_study):
    out = tiny_study.folders["gbn", 1].parents[2]
    assert list(Study(out, conditions=(GBN,)).folders) == [("gbn", 1), ("gbn", 2)]
    assert set(Study(out, seeds=(2,)).history["seed"]) == {2}
    with pytest.raises(StudyError, match="no complete plain run"):
        Study(out, seeds=(9,))


def test_a_run_not_complete_is_left_out(tmp_path):
    once = replace(TINY, epochs=1, train_images=64)
    run_study(once, (GBN,), (1, 2), tmp_path, jobs=1, show_progress=False)
    (run_folder(tmp_path, once, GBN, 2) / "run.json").unlink()
    assert list(Study(tmp_path).folders) == [("gbn", 1)]
    about = json.loads((run_folder(tmp_path, once, GBN, 1) / "run.json").read_text())
    assert Study(tmp_path).recipe == once
    assert about["recipe"]["train_images"] == 64
    assert torch.get_num_threads() >= 1
