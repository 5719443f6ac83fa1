"""Damaged files and strangers' files: found and named, never run, never rewritten by reading."""

import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GBN, L1_BN, TINY
from processes import THOROUGH
from test_data import ARCHIVES, archives  # noqa: F401
from test_study import assert_same_study

from s6lib.data import DataError, load_mnist
from s6lib.errors import DamagedFile, RunsFailed, StudyError
from s6lib.lab.files import RESULTS, serialise, write_checkpoint, write_results
from s6lib.lab.launch import run_study
from s6lib.lab.record import settings_of
from s6lib.recipes import Condition, Run
from s6lib.study import Study

PLACES = 20


class Harmful:
    """An object whose unpickling makes a folder: where torch or numpy refuses code, none appears."""

    def __reduce__(self):
        return os.mkdir, ("harm",)


def damages(content: bytes, other: bytes, places: int) -> list[bytes]:
    """A file's content truncated and with a flipped bit at so many places, empty, and another's."""
    cuts = [content[: len(content) * place // places] for place in range(places)]
    flips, moments = [], random.Random(1)
    for _ in range(places):
        flipped = bytearray(content)
        flipped[moments.randrange(len(content))] ^= 1 << moments.randrange(8)
        flips.append(bytes(flipped))
    return [*cuts, *flips, other]


@pytest.fixture
def copy(tiny_study, tmp_path):
    """A study folder that may be changed."""
    return shutil.copytree(tiny_study.folder, tmp_path / "copy")


@pytest.mark.parametrize("name", [*RESULTS, "run.json"])
def test_a_damaged_result_is_named_and_not_rewritten(tiny_study, copy, name):
    path = Run(TINY, GBN, 2).folder(copy) / name
    for damaged in damages(path.read_bytes(), (Run(TINY, GBN, 1).folder(copy) / name).read_bytes(), PLACES):
        path.write_bytes(damaged)
        refusal = ""
        try:
            study = Study(copy)
            study.model("gbn", 2), study.predictions("gbn", 2)
            assert study.history().equals(tiny_study.history())
        except DamagedFile as error:
            refusal = str(error)
        assert str(path.parent) in refusal or name == "run.json"  # whose white space may change
        assert path.name in refusal or name == "run.json"
        assert path.read_bytes() == damaged


def test_a_published_run_is_not_trained_again_though_its_files_are_damaged(copy):
    paths = [Run(TINY, GBN, 2).folder(copy) / name for name in RESULTS]
    for path in paths:
        path.write_bytes(b"damaged")
    run_study(TINY, (L1_BN, GBN), (1, 2), copy, jobs=1, show_progress=False)
    assert all(path.read_bytes() == b"damaged" for path in paths)


@pytest.mark.usefixtures("few_digits")
def test_a_run_whose_checkpoints_are_lost_starts_again_and_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    once = replace(TINY, epochs=1, train_images=64)
    whole = run_study(once, (GBN,), (1,), tmp_path / "whole", jobs=1, show_progress=False)
    folder = Run(once, GBN, 1).folder(tmp_path / "out")
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").write_bytes(b"damaged")
    (folder / "checkpoint-before.pt").write_bytes(serialise(lambda file: torch.save({"model": Harmful()}, file)))
    study = run_study(once, (GBN,), (1,), tmp_path / "out", jobs=1, show_progress=False)
    assert_same_study(study, whole)
    assert capsys.readouterr().err.count("is damaged") == 2
    assert not (tmp_path / "harm").exists()


def test_another_runs_checkpoint_is_refused_and_kept(tmp_path):
    folder = Run(TINY, GBN, 1).folder(tmp_path)
    folder.mkdir(parents=True)
    write_checkpoint(folder, settings_of(Run(TINY, GBN, 2)))
    content = (folder / "checkpoint.pt").read_bytes()
    with pytest.raises(RunsFailed, match="is of another run; delete it to start the run again"):
        run_study(TINY, (GBN,), (1,), tmp_path, jobs=1, show_progress=False)
    assert (folder / "checkpoint.pt").read_bytes() == content


# --- the digits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(4))
def test_a_damaged_archive_is_named(archives, number):  # noqa: F811
    path, other = archives / ARCHIVES[number], archives / ARCHIVES[number - 1]
    for damaged in damages(path.read_bytes(), other.read_bytes(), PLACES if THOROUGH else 2):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=f"damaged, and the download failed: {path}. Restore it"):
            load_mnist(archives.parents[1])
        assert path.read_bytes() == damaged


# --- strangers' files ------------------------------------------------------------------------------------------------


def rewrite(folder: Path, change: dict, results: dict[str, bytes]) -> None:
    """Change run.json and results in a run's folder, with digests that fit, as a stranger can."""
    about = {k: v for k, v in json.loads((folder / "run.json").read_text()).items() if k != "sha256"}
    write_results(folder, about | change, {name: (folder / name).read_bytes() for name in RESULTS} | results)


def weights(value: object) -> bytes:
    return serialise(lambda file: torch.save(value, file))


STRANGE_WEIGHTS = {
    "code": weights({"weight": Harmful()}),
    "another network": weights({"weight": torch.zeros(1)}),
    "a tensor": weights(torch.zeros(1)),
    "no archive": b"import os",
    "nothing": b"",
}
STRANGE_PREDICTIONS = {
    "code": serialise(lambda file: np.save(file, np.array([Harmful()], dtype=object), allow_pickle=True)),
    "the start of an archive": b"PK",
    "no array": b"import os",
    "nothing": b"",
}


def test_a_strangers_results_are_refused_though_their_digests_fit(copy, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folder = Run(TINY, GBN, 1).folder(copy)
    for content in STRANGE_WEIGHTS.values():
        rewrite(folder, {}, {"weights.pt": content})
        with pytest.raises(DamagedFile, match=r"weights\.pt is not a state_dict of PlainNet, and is not trusted"):
            Study(copy).model("gbn", 1)
    for content in STRANGE_PREDICTIONS.values():
        rewrite(folder, {}, {"predictions.npy": content})
        with pytest.raises(DamagedFile, match=r"predictions\.npy is not an array of numbers, and is not trusted"):
            Study(copy).predictions("gbn", 1)
    assert not (tmp_path / "harm").exists()


def test_a_strangers_run_json_that_describes_no_run_is_named(copy):
    for change in ({"recipe": []}, {"recipe": {"name": "plain"}}, {"condition": {"label": "GBN"}}, {"condition": None}):
        rewrite(Run(TINY, GBN, 1).folder(copy), change, {})
        with pytest.raises(DamagedFile, match=r"run\.json describes no run"):
            Study(copy)


@pytest.mark.parametrize("link", ["plain", "plain/gbn", "plain/gbn/seed-1"])
def test_a_link_that_leads_out_of_the_folder_is_not_followed(tmp_path, link):
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    elsewhere.mkdir()
    (out / link).parent.mkdir(parents=True)
    (out / link).symlink_to(elsewhere)
    with pytest.raises(StudyError, match=f"leads out of {out}, to {elsewhere}.*; remove the link"):
        run_study(TINY, (GBN,), (1,), out, jobs=1, show_progress=False)
    assert not list(elsewhere.iterdir())


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").symlink_to(mine)
    with pytest.raises(StudyError, match="cannot write in"):
        run_study(TINY, (GBN,), (1,), tmp_path / "out", jobs=1, show_progress=False)
    assert mine.read_text() == "precious"


@pytest.mark.parametrize("name", ["..", "../plain", "/tmp", "a/b", "", ".", "Plain", "a\\b", "a\nb"])
def test_names_do_not_lead_out_of_the_folder(tiny_study, name):
    with pytest.raises(ValueError, match="must be lower-case words"):
        replace(TINY, name=name)
    if name:  # without a slug, a condition may name itself
        with pytest.raises(ValueError, match="must be lower-case words"):
            Condition(name, "label")
    with pytest.raises(StudyError, match=r"a recipe is a Recipe or its name|no complete"):
        Study(tiny_study.folder, name)
