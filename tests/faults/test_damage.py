"""Damaged files and strangers' files: found and named, never run, never rewritten by reading."""

import numpy as np
import pytest
import torch
from conftest import GBN, L1_BN, TINY
from processes import THOROUGH
from test_data import ARCHIVES, archives  # noqa: F401
from test_files import Harmful, damages
from test_study import rewrite

from s6lib.data import DataError, load_mnist
from s6lib.errors import DamagedFile, StudyError
from s6lib.lab.files import RESULTS, serialise
from s6lib.lab.launch import run_study
from s6lib.recipes import Run
from s6lib.study import Study


@pytest.mark.parametrize("name", [*RESULTS, "run.json"])
def test_a_damaged_result_is_named_and_neither_rewritten_nor_trained_again(tiny_study, copy, name):
    path = Run(TINY, GBN, 2).folder(copy) / name
    for damaged in (*damages(path.read_bytes()), (Run(TINY, GBN, 1).folder(copy) / name).read_bytes()):
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
    if name in RESULTS:
        run_study(TINY, (L1_BN, GBN), (1, 2), copy, jobs=1, show_progress=False)
        assert path.read_bytes() == damaged


@pytest.mark.parametrize("number", range(4))
def test_a_damaged_archive_is_named(archives, number):  # noqa: F811
    path, other = archives / ARCHIVES[number], archives / ARCHIVES[number - 1]
    places = 20 if THOROUGH else 2
    for damaged in (*damages(path.read_bytes(), places, places), other.read_bytes()):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=f"damaged, and the download failed: {path}. Restore it"):
            load_mnist(archives.parents[1])
        assert path.read_bytes() == damaged


# --- strangers' files ------------------------------------------------------------------------------------------------


def torchs(value: object) -> bytes:
    return serialise(lambda file: torch.save(value, file))


PICKLED = serialise(lambda file: np.save(file, np.array([Harmful()], dtype=object), allow_pickle=True))
STRANGE = {
    "weights.pt": (
        "a state_dict of PlainNet",
        [torchs({"weight": Harmful()}), torchs({"weight": torch.zeros(1)}), torchs(torch.zeros(1)), b"import os", b""],
    ),
    "predictions.npy": ("an array of numbers", [PICKLED, b"PK", b"import os", b""]),
    "history.csv": ("a history of a run", [b"epoch,lr\n1,0.1\n", b'"', b""]),
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_strangers_result_is_refused_though_its_digest_fits(copy, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    kind, contents = STRANGE[name]
    for content in contents:
        rewrite(Run(TINY, GBN, 1).folder(copy), {name: content})
        study = Study(copy)
        with pytest.raises(DamagedFile, match=rf"{name} is not {kind}, and is not trusted"):
            study.model("gbn", 1), study.predictions("gbn", 1), study.history()
    assert not (tmp_path / "harm").exists()


def test_a_strangers_run_json_that_describes_no_run_is_named(copy):
    for change in ({"recipe": []}, {"recipe": {"name": "plain"}}, {"condition": {"label": "GBN"}}, {"condition": None}):
        rewrite(Run(TINY, GBN, 1).folder(copy), **change)
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
