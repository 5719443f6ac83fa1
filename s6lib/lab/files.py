"""The files in a run's folder: written atomically, and verified when they are read."""

import hashlib
import io
import json
import os
import re
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from s6lib.errors import DamagedFile
from s6lib.recipes import SLUG

RESULTS = ("predictions.npy", "weights.pt", "history.csv")
CHECKPOINTS = ("checkpoint.pt", "checkpoint-before.pt")  # of the last epoch, and of the one before


def serialise(write: Callable[[BinaryIO], Any]) -> bytes:
    """Return the bytes that `write` produces."""
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: write a part file, sync it to the disk, then rename it."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    with suppress(OSError):  # Windows cannot open a folder, and some file systems (CIFS, some FUSE) cannot sync one
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # so that the rename survives a crash
        finally:
            os.close(folder)


def write_results(folder: Path, about: dict[str, Any], results: dict[str, bytes]) -> None:
    """Write the files of a finished run, then run.json, which makes it complete; remove its checkpoints.

    run.json holds `about`, the SHA-256 of every file, and the SHA-256 of `about` itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in RESULTS:
        write_whole(folder / name, results[name])
    digests = {name: hashlib.sha256(results[name]).hexdigest() for name in RESULTS}
    digests["run.json"] = _digest(about)
    write_whole(folder / "run.json", json.dumps({**about, "sha256": digests}, indent=2).encode() + b"\n")
    for name in CHECKPOINTS:
        (folder / name).unlink(missing_ok=True)


def run_folders(folder: str | Path) -> list[Path]:
    """List the runs under a recipe's folder, started or complete; copies such as "seed-1 (1)" are passed over."""
    runs = sorted(Path(folder).glob("*/seed-*"))
    return [run for run in runs if re.fullmatch(SLUG, run.parent.name) and re.fullmatch(r"seed-\d+", run.name)]


def is_complete(folder: Path) -> bool:
    """Return whether `folder` holds a finished run."""
    return (folder / "run.json").exists()


def read_about(folder: Path) -> dict[str, Any]:
    """Read the entries of run.json. Raises DamagedFile if it is missing or does not match its checksum."""
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        about = json.loads((folder / "run.json").read_bytes())
        if about["sha256"]["run.json"] == _digest({k: v for k, v in about.items() if k != "sha256"}):
            return about
    raise _damage_error(folder / "run.json")


def read_result(folder: Path, name: str) -> io.BytesIO:
    """Read one of RESULTS. Raises DamagedFile if it is missing or does not match its checksum."""
    with suppress(FileNotFoundError):
        content = (folder / name).read_bytes()
        if hashlib.sha256(content).hexdigest() == read_about(folder)["sha256"].get(name):
            return io.BytesIO(content)
    raise _damage_error(folder / name)


def write_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Save the state at the end of an epoch, and keep the previous checkpoint."""
    last, before = (folder / name for name in CHECKPOINTS)
    if last.exists():
        os.replace(last, before)
    write_whole(last, serialise(lambda file: torch.save(state, file)))


def read_checkpoint(folder: Path, *, resume: bool = False) -> dict[str, Any] | None:
    """Read the newest undamaged checkpoint, or return None.

    With `resume`, remove the part files of processes that were killed, report a damaged checkpoint on stderr, and put
    the older one in its place. Raises MemoryError and OSError, since what cannot be read now is not damaged.
    """
    for part in folder.glob(".*.part") if resume else ():
        part.unlink(missing_ok=True)
    for path in (folder / name for name in CHECKPOINTS):
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            continue
        try:
            state = _load_checkpoint(content)
        except MemoryError:
            raise
        except Exception as error:  # torch.load raises a dozen kinds of exception for damaged files
            if resume:
                print(f"{path} is damaged ({type(error).__name__}); going on without it", file=sys.stderr, flush=True)
        else:
            if resume:
                os.replace(path, folder / CHECKPOINTS[0])  # or the next `write_checkpoint` would keep the damaged one
            return state
    return None


def _load_checkpoint(content: bytes) -> dict[str, Any]:
    # A .pt file is a zip archive with a CRC-32 for each tensor, which torch.load does not check.
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if archive.testzip() is not None:
            raise zipfile.BadZipFile("wrong checksum")
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if isinstance(state, dict) and state.keys() >= {"recipe", "condition", "seed"}:
        return state
    raise TypeError("not a checkpoint")


def _digest(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _damage_error(path: Path) -> DamagedFile:
    damage = "damaged, or its checksum in run.json is" if path.exists() else "missing"
    return DamagedFile(
        f"{path} is {damage}: restore the folder (git checkout -- {path.parent}), choose a run that has this file, or "
        "delete the folder and train the run again"
    )
