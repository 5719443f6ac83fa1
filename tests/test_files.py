import errno
import os
import random
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from s6lib.lab.files import CHECKPOINTS, read_checkpoint, write_checkpoint, write_whole

STATE = {"recipe": {}, "condition": {}, "seed": 1, "model": {"weight": torch.arange(300.0)}, "history": [1]}
FULL = Mock(side_effect=OSError("no space left"))


def same(state):
    return state is not None and torch.equal(state["model"]["weight"], STATE["model"]["weight"])


def damages(content, cuts=20, flips=20):
    """A file's content cut at so many places, and with a bit flipped at so many."""
    moments = random.Random(1)
    for place in range(cuts):
        yield content[: len(content) * place // cuts]
    for _ in range(flips):
        flipped = bytearray(content)
        flipped[moments.randrange(len(content))] ^= 1 << moments.randrange(8)
        yield bytes(flipped)


@pytest.mark.filterwarnings("ignore")  # zipfile's and torch's, of what is damaged
def test_a_damaged_checkpoint_gives_way_to_the_one_before_unless_the_damage_does_not_matter(tmp_path, capsys):
    write_checkpoint(tmp_path, STATE)
    write_checkpoint(tmp_path, {**STATE, "history": []})
    last, before = ((tmp_path / name).read_bytes() for name in CHECKPOINTS)
    found = 0
    for damaged in damages(last, flips=300):
        (tmp_path / "checkpoint.pt").write_bytes(damaged)
        (tmp_path / "checkpoint-before.pt").write_bytes(before)
        state = read_checkpoint(tmp_path)
        assert same(state)
        assert read_checkpoint(tmp_path, resume=True)["history"] == state["history"]
        said = "checkpoint.pt is damaged" in capsys.readouterr().err
        assert state["history"] == (STATE["history"] if said else [])
        found += said
    assert found > 120


def test_a_damaged_checkpoint_never_takes_the_place_of_the_one_before(tmp_path, monkeypatch, capsys):
    """Nor when the next cannot be written."""
    write_checkpoint(tmp_path, STATE)
    write_checkpoint(tmp_path, {**STATE, "history": []})
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    assert same(read_checkpoint(tmp_path, resume=True))
    monkeypatch.setattr(os, "fsync", FULL)
    with pytest.raises(OSError, match="no space left"):
        write_checkpoint(tmp_path, STATE)
    assert read_checkpoint(tmp_path)["history"] == STATE["history"]
    capsys.readouterr()
    for name in CHECKPOINTS:
        (tmp_path / name).write_bytes(b"")
    assert read_checkpoint(tmp_path, resume=True) is None
    assert capsys.readouterr().err.count("is damaged") == 2


def test_a_checkpoint_that_cannot_be_read_now_is_kept(tmp_path, monkeypatch):
    """For want of memory or of permission; nor does one matter that another process has moved in the meantime."""
    write_checkpoint(tmp_path, STATE)
    write_checkpoint(tmp_path, STATE)
    for reader, kind in (((torch, "load"), MemoryError), ((Path, "read_bytes"), PermissionError)):
        with monkeypatch.context() as patch:
            patch.setattr(*reader, Mock(side_effect=kind))
            with pytest.raises(kind):
                read_checkpoint(tmp_path, resume=True)
    (tmp_path / "checkpoint.pt").unlink()
    assert same(read_checkpoint(tmp_path, resume=True))


class Harmful:
    """An object whose unpickling makes a folder: where torch or numpy refuses code, none appears."""

    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_another_file_of_torchs_is_no_checkpoint_and_code_in_one_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for other in (torch.zeros(3), STATE["model"], {**STATE, "model": Harmful()}):
        torch.save(other, tmp_path / "checkpoint.pt")
        assert read_checkpoint(tmp_path) is None
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(("function", "first", "code"), [("fsync", [None], errno.EINVAL), ("open", [], errno.EACCES)])
def test_a_folder_that_cannot_be_synced_or_opened_will_do(tmp_path, monkeypatch, function, first, code):
    """CIFS and some FUSE answer EINVAL to fsync of a folder, which follows that of the file; Windows opens none."""
    refusing = Mock(side_effect=[*first, OSError(code, os.strerror(code))])
    monkeypatch.setattr(os, function, refusing)
    write_whole(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"
    assert refusing.call_count == len(first) + 1
