import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import GBN, L1_BN, TINY

from s6lib.data import PROJECT
from s6lib.errors import DamagedFile, StudyError
from s6lib.lab.files import RESULTS, read_about, write_results
from s6lib.lab.launch import run_study
from s6lib.lab.record import condition_entry
from s6lib.study import Study, recipes_in


def assert_same_study(a, b):
    assert set(a.runs) == set(b.runs)
    first, second = (
        study.history().drop(columns="seconds").sort_values(["condition", "seed", "epoch"], ignore_index=True)
        for study in (a, b)
    )
    pd.testing.assert_frame_equal(first, second, check_exact=True)
    for slug, seed in a.runs:
        assert np.array_equal(a.predictions(slug, seed), b.predictions(slug, seed))
        first, second = (study.folder / study.recipe.name / slug / f"seed-{seed}" for study in (a, b))
        assert (first / "weights.pt").read_bytes() == (second / "weights.pt").read_bytes()


def rewrite(folder, files=(), **entries):
    """Change a run's files, or entries of its run.json, so that all checksums fit, as a stranger can."""
    about = {name: entry for name, entry in read_about(folder).items() if name != "sha256"}
    write_results(folder, about | entries, {name: (folder / name).read_bytes() for name in RESULTS} | dict(files))


# --- tables ----------------------------------------------------------------------------------------------------------


def test_history_has_a_row_for_every_epoch_and_what_run_json_says_one_for_every_run(tiny_study):
    history = tiny_study.history()
    assert list(history) == [
        "condition", "label", "seed", "epoch", "lr", "train_loss", "train_accuracy", "penalty", "test_loss",
        "test_accuracy", "seconds",
    ]  # fmt: skip
    rows = history[["condition", "seed", "epoch"]].apply(tuple, axis=1).tolist()
    assert rows == [(slug, seed, epoch) for slug, seed in tiny_study.runs for epoch in (1, 2)]
    assert history["penalty"].gt(0).eq(history["condition"] == "l1-bn").all()
    history["lr"] = 0
    assert (tiny_study.history()["lr"] == 0.01).all()  # a table may be changed, the study's own is not
    about = tiny_study.about()
    assert list(zip(about["condition"], about["seed"], strict=True)) == tiny_study.runs
    assert (about["device"] == "cpu").all()
    assert {"processor", "core", "torch", "host", "process", "seconds"} <= set(about)


def test_summary_and_outcomes_are_of_the_last_epoch(tiny_study, mnist):
    summary, outcomes = tiny_study.summary(), tiny_study.outcomes()
    assert list(summary) == [
        "condition", "seed", "label", "test_accuracy", "test_loss", "best_accuracy", "best_epoch", "train_accuracy",
        "seconds",
    ]  # fmt: skip
    assert list(summary["label"]) == ["L1 + BN", "L1 + BN", "GBN", "GBN"]
    assert (outcomes.index.tolist(), list(outcomes)) == ([1, 2], ["l1-bn", "gbn"])
    for row in summary.itertuples():
        history = tiny_study.history().query("condition == @row.condition and seed == @row.seed")
        for column in ("test_accuracy", "test_loss", "train_accuracy"):
            assert getattr(row, column) == history[column].iloc[-1]
        assert row.best_accuracy == history["test_accuracy"].max()
        assert history.loc[history["epoch"] == row.best_epoch, "test_accuracy"].item() == row.best_accuracy
        assert row.seconds == pytest.approx(history["seconds"].sum())
        right = 100 * (tiny_study.predictions(row.condition, row.seed) == mnist[1].labels.numpy()).mean()
        assert outcomes.loc[row.seed, row.condition] == round(100 * row.test_accuracy, 2) == round(right, 2)


def test_outcomes_need_the_same_seeds_of_every_condition(copy):
    (copy / "plain" / "gbn" / "seed-2" / "run.json").unlink()  # not complete, so it is left out
    assert Study(copy, conditions="gbn").runs == [("gbn", 1)]
    with pytest.raises(ValueError, match="these runs are missing: gbn seed 2; train them"):
        Study(copy).outcomes()
    with pytest.raises(ValueError, match=r"these runs are missing: .* and \d+ more; train them, or choose") as raised:
        Study(PROJECT / "results" / "when").outcomes()
    assert len(str(raised.value)) < 300


def test_a_model_comes_in_evaluation_mode_and_may_be_named_by_its_condition(tiny_study):
    """That it is the saved one is shown of the published runs, in test_results.py."""
    assert not tiny_study.model(GBN, 1).training
    assert np.array_equal(tiny_study.predictions(GBN, 1), tiny_study.predictions("gbn"))
    train, test = tiny_study.data
    assert (len(train), len(test)) == (60_000, 10_000)


# --- what is opened --------------------------------------------------------------------------------------------------


def test_a_folder_opens_the_one_recipe_that_is_there(copy, tmp_path):
    assert Study(copy).recipe == Study(str(copy)).recipe == TINY
    other = copy / "other" / "gbn" / "seed-1"
    shutil.copytree(copy / "plain" / "gbn" / "seed-1", other)
    (other / "run.json").unlink()  # not complete, so it does not count
    assert Study(copy).recipe == TINY
    shutil.copy(copy / "plain" / "gbn" / "seed-1" / "run.json", other)
    assert recipes_in(copy) == ["plain", "other"]
    with pytest.raises(StudyError, match="it has those of plain, other: name one of them"):
        Study(copy)
    with pytest.raises(StudyError, match="train some with run_study"):
        Study(tmp_path / "nothing")


def test_a_study_can_look_at_some_runs_alone(tiny_study):
    out = tiny_study.folder
    for conditions in (("gbn",), [GBN], "gbn", GBN, {"gbn"}):
        for recipe in (None, "plain", TINY):
            assert Study(out, recipe, conditions, 2).runs == [("gbn", 2)]
    for conditions in (("gbn", "l1-bn"), (GBN, "l1-bn"), (GBN, L1_BN), np.array(["gbn", "l1-bn"])):  # in this order
        study = Study(out, TINY, conditions)
        assert list(study.conditions) == list(study.outcomes()) == ["gbn", "l1-bn"]
        assert study.runs == [("gbn", 1), ("gbn", 2), ("l1-bn", 1), ("l1-bn", 2)]
    assert set(Study(out, seeds=range(2, 9)).history()["seed"]) == {2}


def test_what_is_not_there_is_said_with_what_is(tiny_study, tmp_path):
    with pytest.raises(StudyError, match=r"no complete plain run .*there are: l1-bn, gbn\).*python -m s6lib run"):
        Study(tiny_study.folder, seeds=(9,))
    with pytest.raises(StudyError, match="there are: none"):
        Study(tmp_path, "plain")
    for recipe in (1, "", ".", "..", "../plain", "/tmp", "Plain", ["plain"]):
        with pytest.raises(StudyError, match=r"no complete .* run of those .* \(there are: runs of plain\)"):
            Study(tiny_study.folder, recipe)
    for method in (tiny_study.model, tiny_study.predictions):
        with pytest.raises(StudyError, match="no complete run of condition 'gbn', seed 3; there are: l1-bn 1, l1-bn 2"):
            method("gbn", 3)


COPIES = "gbn/seed-1 (1)", "gbn/seed-1 copy", "gbn/seed-1 2", "gbn (1)/seed-1", "gbn copy/seed-1", "gbn/Copy of seed-1"


def test_copies_as_drive_and_people_make_them_are_passed_over(copy, monkeypatch):
    seed = copy / "plain" / "gbn" / "seed-1"
    for name in COPIES:
        shutil.copytree(seed, copy / "plain" / name)
    shutil.copytree(copy / "plain", copy / "plain (1)")
    for name in (".DS_Store", "desktop.ini", "._run.json", "run (1).json", "Icon\r"):
        for folder in (seed, seed.parent, copy / "plain", copy):
            (folder / name).write_text("x")
    assert Study(copy).runs == [("l1-bn", 1), ("l1-bn", 2), ("gbn", 1), ("gbn", 2)]
    monkeypatch.setattr("s6lib.lab.launch.train_here", lambda task, jobs: iter(task.runs and 1 / 0))
    assert run_study(TINY, ["gbn"], (1, 2), copy, show_progress=False).runs == [("gbn", 1), ("gbn", 2)]
    with pytest.raises(ZeroDivisionError):  # one more is asked for, and nothing stands in its way
        run_study(TINY, "gbn", 3, copy, show_progress=False)


# --- what is not one training, or damaged ----------------------------------------------------------------------------


def test_two_conditions_of_one_slug_and_a_run_in_the_place_of_another_are_refused(copy):
    gbn = copy / "plain" / "gbn"
    shutil.copytree(gbn / "seed-1", gbn / "seed-3")
    with pytest.raises(DamagedFile, match=r"seed-3 holds another run: plain, gbn, seed-1"):
        Study(copy)
    shutil.rmtree(gbn / "seed-3")
    rewrite(gbn / "seed-1", condition=condition_entry(replace(GBN, num_splits=8)))
    with pytest.raises(StudyError, match=r"num_splits = (4|8), not (8|4)"):
        Study(copy)


def test_a_missing_result_is_named(copy):
    study, folder = Study(copy), copy / "plain" / "gbn" / "seed-2"
    study.check()
    for name in reversed(RESULTS):  # the last to be read is the first to go
        (folder / name).unlink()
        with pytest.raises(DamagedFile, match=f"{name} is missing"):
            study.check()
    with pytest.raises(DamagedFile, match=r"history\.csv is missing"):
        study.summary()
    with pytest.raises(DamagedFile, match=r"weights.pt is missing: .* choose a run that has this file"):
        Study(PROJECT / "results" / "when", conditions="300-l1").model("300-l1", 13)  # published without
