import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import GBN, L1_BN, TINY

from s6lib.data import PROJECT
from s6lib.errors import DamagedFile, StudyError
from s6lib.lab.files import RESULTS, write_results
from s6lib.lab.launch import run_study
from s6lib.lab.run import Run
from s6lib.models import PlainNet
from s6lib.study import Study
from s6lib.train import evaluate


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


def test_history_is_tidy(tiny_study):
    history = tiny_study.history()
    assert list(history.columns[:4]) == ["condition", "label", "seed", "epoch"]
    assert len(history) == 2 * 2 * 2
    assert history.groupby(["condition", "seed"], sort=False).ngroups == 4
    assert list(history["condition"].unique()) == ["l1-bn", "gbn"]
    assert history["penalty"].gt(0).eq(history["condition"] == "l1-bn").all()


def test_summary_is_of_the_last_epoch(tiny_study):
    summary = tiny_study.summary()
    assert list(summary["label"]) == ["L1 + BN", "L1 + BN", "GBN", "GBN"]
    for row in summary.itertuples():
        history = tiny_study.history().query("condition == @row.condition and seed == @row.seed")
        assert row.accuracy == history["val_accuracy"].iloc[-1]
        assert row.best_accuracy == history["val_accuracy"].max()
        assert history.loc[history["epoch"] == row.best_epoch, "val_accuracy"].item() == row.best_accuracy
        assert row.seconds == pytest.approx(history["seconds"].sum())


def test_model_is_the_saved_one(tiny_study, mnist):
    for run in tiny_study.runs:
        model = tiny_study.model(*run)
        assert not model.training
        evaluation = evaluate(model, mnist[1].part(slice(1000)))
        assert evaluation.predictions.tolist() == tiny_study.predictions(*run)[:1000].tolist()


def test_study_of_nothing_and_a_run_that_is_not_there(tiny_study, tmp_path):
    with pytest.raises(StudyError, match=r"no complete plain run of those asked for in .*python -m s6lib run"):
        Study(tmp_path)
    for name in (tiny_study.model, tiny_study.predictions):
        with pytest.raises(StudyError, match="no complete run of condition 'gbn', seed 3; there are: l1-bn 1, l1-bn 2"):
            name("gbn", 3)


@pytest.mark.parametrize("name", RESULTS)
def test_a_missing_result_is_named(tiny_study, tmp_path, name):
    out = shutil.copytree(tiny_study.folder, tmp_path / "copy")
    (Run(TINY, GBN, 2).folder(out) / name).unlink()
    study = Study(out)
    with pytest.raises(DamagedFile, match=name):
        study.summary(), study.model("gbn", 2), study.predictions("gbn", 2)


def test_a_study_can_look_at_some_runs_alone(tiny_study):
    out = tiny_study.folder
    assert Study(out, conditions=(GBN,)).runs == [("gbn", 1), ("gbn", 2)]
    assert set(Study(out, seeds=(2,)).history()["seed"]) == {2}
    with pytest.raises(StudyError, match="no complete plain run of those asked for"):
        Study(out, seeds=(9,))


@pytest.mark.usefixtures("few_digits")
def test_a_run_not_complete_is_left_out(tmp_path):
    once = replace(TINY, epochs=1, train_images=64)
    run_study(once, (GBN,), (1, 2), tmp_path, jobs=1, show_progress=False)
    (Run(once, GBN, 2).folder(tmp_path) / "run.json").unlink()
    assert Study(tmp_path).runs == [("gbn", 1)]
    about = json.loads((Run(once, GBN, 1).folder(tmp_path) / "run.json").read_text())
    assert Study(tmp_path).recipe == once
    assert about["recipe"]["train_images"] == 64


# --- what is asked for -----------------------------------------------------------------------------------------------


def test_a_study_tells_its_runs_seeds_and_what_run_json_says(tiny_study):
    assert tiny_study.runs == [("l1-bn", 1), ("l1-bn", 2), ("gbn", 1), ("gbn", 2)]
    assert tiny_study.seeds == [1, 2]
    assert tiny_study.labels == {"l1-bn": "L1 + BN", "gbn": "GBN"}
    about = tiny_study.about()
    assert about[["condition", "seed"]].apply(tuple, axis=1).tolist() == tiny_study.runs
    assert (about["device"] == "cpu").all()
    assert {"processor", "core", "torch", "host", "process", "seconds"} <= set(about)


def test_outcomes_are_in_percent_and_complete(tiny_study):
    outcomes, summary = tiny_study.outcomes(), tiny_study.summary()
    assert outcomes.index.tolist() == [1, 2]
    assert list(outcomes) == ["l1-bn", "gbn"]
    for row in summary.itertuples():
        assert outcomes.loc[row.seed, row.condition] == round(100 * row.accuracy, 2)


def test_outcomes_need_the_same_seeds_of_every_condition(tiny_study, tmp_path):
    shutil.copytree(tiny_study.folder, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "plain" / "gbn" / "seed-2")
    with pytest.raises(ValueError, match="these runs are missing: gbn seed 2"):
        Study(tmp_path / "copy").outcomes()


def test_many_missing_runs_are_a_short_sentence():
    with pytest.raises(ValueError, match="these runs are missing: ") as raised:
        Study(PROJECT / "results" / "when", "when").outcomes()
    assert " more; train them, or choose conditions or seeds" in str(raised.value)
    assert len(str(raised.value)) < 300


def test_a_run_published_without_weights_says_so():
    study = Study(PROJECT / "results" / "when", "when", "300-l1")
    assert isinstance(study.model("300-l1", 11), PlainNet)
    with pytest.raises(DamagedFile, match=r"weights.pt is missing: .* choose a run that has this file"):
        study.model("300-l1", 13)


@pytest.mark.parametrize("conditions", [("gbn",), ["gbn"], (GBN,), "gbn", GBN, {"gbn"}])
@pytest.mark.parametrize("recipe", ["plain", TINY])
def test_a_study_takes_slugs_or_conditions_and_a_recipe_or_its_name(tiny_study, conditions, recipe):
    assert Study(tiny_study.folder, recipe, conditions, 2).runs == [("gbn", 2)]


@pytest.mark.parametrize("conditions", [("gbn", "l1-bn"), (GBN, "l1-bn"), ("gbn", L1_BN), (GBN, L1_BN)])
def test_conditions_stand_in_the_order_in_which_they_were_asked_for(tiny_study, conditions):
    study = Study(tiny_study.folder, TINY, conditions)
    assert list(study.conditions) == list(study.outcomes()) == ["gbn", "l1-bn"]
    assert study.runs == [("gbn", 1), ("gbn", 2), ("l1-bn", 1), ("l1-bn", 2)]


def test_a_condition_may_be_given_where_its_slug_is(tiny_study):
    assert np.array_equal(tiny_study.predictions(GBN, 1), tiny_study.predictions("gbn"))


@pytest.mark.parametrize("recipe", [1, None, "../plain", "Plain", ["plain"]])
def test_what_is_no_recipe_is_refused(tiny_study, recipe):
    with pytest.raises(StudyError, match=r"a recipe is a Recipe or its name, such as 'plain', not"):
        Study(tiny_study.folder, recipe)


def test_a_label_is_but_a_name(tiny_study):
    renamed = replace(GBN, label="ghosts")
    study = run_study(TINY, (renamed,), (1,), tiny_study.folder, show_progress=False)
    assert study.labels == {"gbn": "ghosts"}
    assert set(study.history()["label"]) == {"ghosts"}


@pytest.mark.parametrize(
    ("recipe", "conditions", "said"),
    [
        (replace(TINY, epochs=3), None, "epochs = 2, not 3"),
        (TINY, (replace(GBN, num_splits=8),), "num_splits = 4, not 8"),
    ],
)
def test_what_was_trained_otherwise_than_is_given_is_refused(tiny_study, recipe, conditions, said):
    with pytest.raises(StudyError, match=f"was trained with different settings: {said}"):
        Study(tiny_study.folder, recipe, conditions)


def test_two_conditions_of_one_slug_are_not_pooled(tiny_study, tmp_path):
    copy = shutil.copytree(tiny_study.folder, tmp_path / "copy")
    folder = copy / "plain" / "gbn" / "seed-1"
    about = {k: v for k, v in json.loads((folder / "run.json").read_text()).items() if k != "sha256"}
    about["condition"]["num_splits"] = 8
    write_results(folder, about, {name: (folder / name).read_bytes() for name in RESULTS})
    with pytest.raises(StudyError, match=r"num_splits = (4|8), not (8|4)"):
        Study(copy)


@pytest.mark.parametrize("content", [b"", b"epoch,lr\n", b'"'])
def test_a_history_that_is_none_is_named_though_its_digest_fits(tiny_study, tmp_path, content):
    copy = shutil.copytree(tiny_study.folder, tmp_path / "copy")
    folder = copy / "plain" / "gbn" / "seed-1"
    about = {k: v for k, v in json.loads((folder / "run.json").read_text()).items() if k != "sha256"}
    write_results(folder, about, {name: (folder / name).read_bytes() for name in RESULTS} | {"history.csv": content})
    with pytest.raises(DamagedFile, match=r"history\.csv is no"):
        Study(copy).history()


@pytest.mark.parametrize("name", RESULTS)
def test_a_check_reads_every_file(tiny_study, tmp_path, name):
    tiny_study.check()
    copy = shutil.copytree(tiny_study.folder, tmp_path / "copy")
    path = copy / "plain" / "gbn" / "seed-2" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DamagedFile, match=name):
        Study(copy).check()
