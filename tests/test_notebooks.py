"""The notebooks are executed, in order, without an error, and check what they show."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import colab
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

import s6lib
from s6lib.__main__ import read_study_file
from s6lib.data import PROJECT
from s6lib.lab.files import serialise
from s6lib.lab.launch import run_study
from s6lib.lab.run import COLUMNS, RunResult, save_run
from s6lib.models import PlainNet
from s6lib.preregistered import FACTORIAL, FACTORIAL_SEEDS, PENALTIES, PENALTY_SEEDS
from s6lib.recipes import ALL_CONDITIONS, CONDITIONS, CONTROL, PLAIN, Run
from s6lib.study import Study

sys.path.insert(0, str(PROJECT / "notebooks"))
from execute import execute
from set_address import FILES, set_address

NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))


def code_cells(path: Path) -> list[dict]:
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    return [{**cell, "source": "".join(cell["source"])} for cell in cells]


def outputs(cell: dict) -> str:
    return json.dumps(
        [{**o, "data": {k: v for k, v in o.get("data", {}).items() if k != "image/png"}} for o in cell["outputs"]]
    )


def test_the_series_is_complete():
    first = ["01_data", "02_models", "03_study", "04_analysis", "05_replication", "06_when", "07_your_own"]
    assert [path.stem for path in NOTEBOOKS] == [*first, "08_frontier", "09_methods"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_every_cell_was_executed_in_order(self, path):
        counts = [cell["execution_count"] for cell in code_cells(path)]
        assert counts == list(range(1, len(counts) + 1))

    def test_no_output_is_an_error_or_holds_a_machines_path(self, path):
        for cell in code_cells(path):
            assert all(output["output_type"] != "error" for output in cell["outputs"])
            assert not any(output.get("name") == "stderr" for output in cell["outputs"])
            assert not re.search(r"/(home|root|tmp|work|Users|usr|content)/", outputs(cell))

    def test_cells_are_short_and_few_are_ignored(self, path):
        cells = code_cells(path)
        assert all(len(cell["source"].splitlines()) <= 20 for cell in cells)
        # The versions; in 06 and 07 numbers of runs that are trained anew.
        allowed = {"06_when": 3, "07_your_own": 5}.get(path.stem, 1)
        assert sum("NBVAL_IGNORE_OUTPUT" in cell["source"] for cell in cells) == allowed
        assert not any(word in cell["source"] for cell in cells for word in ("NBVAL_SKIP", "NBVAL_RAISES"))

    def test_most_cells_show_something(self, path):
        shown = [bool(cell["outputs"]) for cell in code_cells(path)]
        assert sum(shown) >= 0.6 * len(shown)

    def test_the_first_cell_is_the_same_in_all(self, path):
        assert code_cells(path)[0]["source"] == code_cells(NOTEBOOKS[0])[0]["source"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_s6lib_exports_is_imported_from_there(path):
    """So that a move of modules breaks no notebook, nor what readers copied from one."""
    text = "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"])
    imported = re.findall(r"^from s6lib\.[\w.]+ import (.+)$", text, re.MULTILINE)
    assert not {name for names in imported for name in names.split(", ")} & set(s6lib.__all__)


@pytest.mark.slow
def test_nbval_fails_when_an_accuracy_is_falsified(tmp_path):
    """A copy of 04, cut down to its first cells and this number, which it claims to be 0.01 points more."""
    notebook = json.loads((PROJECT / "notebooks" / "04_analysis.ipynb").read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    (claim,) = [cell for cell in code if "wilson_interval(row.accuracy)" in "".join(cell["source"])]
    text = json.dumps({**notebook, "cells": [*code[:4], claim]})
    found = re.search(r"L2 \+ BN +(99\.\d\d)%, 95% interval", text)
    falsified = f"{float(found[1]) + 0.01:.2f}"
    copy = tmp_path / "04_analysis.ipynb"
    copy.write_text(text[: found.start(1)] + falsified + text[found.end(1) :])
    command = [sys.executable, "-m", "pytest", "--nbval", str(copy), "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stdout
    assert "1 failed, 4 passed" in result.stdout
    assert falsified in result.stdout


def test_one_command_rewrites_the_address_everywhere(tmp_path):
    for name in FILES:
        shutil.copy(PROJECT / name, tmp_path)
    shutil.copytree(PROJECT / "notebooks", tmp_path / "notebooks", ignore=shutil.ignore_patterns("__pycache__"))
    before = {
        path: path.read_text().count("OWNER/s6lib")
        for path in tmp_path.rglob("*")
        if path.suffix != ".py" and path.is_file()
    }
    changed = set_address("someone/my.fork-2", tmp_path)
    assert len(changed) == len(FILES) + len(NOTEBOOKS)
    for path in changed:
        assert path.read_text().count("someone/my.fork-2") == before[path] > 0
        assert "OWNER/s6lib" not in path.read_text()
    set_address("OWNER/s6lib", tmp_path)
    for path in changed:
        assert path.read_text() == (PROJECT / path.relative_to(tmp_path)).read_text()
    with pytest.raises(ValueError, match="expected OWNER/NAME"):
        set_address("https://github.com/someone/fork", tmp_path)


# What Colab has and a test has not. pip is replaced: a test installs nothing.
COLAB = """\
import sys, types
from pathlib import Path
sys.modules["google.colab"] = types.ModuleType("google.colab")
get_ipython().register_magic_function(lambda line: print("pip", line), magic_name="pip")
cell = Path("cell.txt").read_text()
"""
WHERE = "import s6lib; print(s6lib.__file__)\n"


def run_in_colab(folder: Path, script: str) -> str:
    """What a script prints in an IPython of its own that takes itself for Colab; `cell` is the first cell.

    The cell clones this checkout, and the script may replace the address of that.
    """
    cell = code_cells(NOTEBOOKS[0])[0]["source"]
    address = re.search(r"https://github\.com/\S+", cell)[0]
    (folder / "cell.txt").write_text(cell.replace(address, f"file://{PROJECT}"))
    (folder / "script.ipy").write_text(COLAB + script)
    result = subprocess.run(
        [sys.executable, "-m", "IPython", "--no-banner", "--colors=NoColor", "script.ipy"],
        cwd=folder, env={**os.environ, "IPYTHONDIR": str(folder / "ipython"), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    return result.stdout


@pytest.mark.slow
def test_the_first_cell_makes_s6lib_importable_in_colab(tmp_path):
    for _ in range(2):  # and again, when it is run a second time
        printed = run_in_colab(tmp_path, "get_ipython().run_cell(cell)\n" + WHERE)
        assert f"{tmp_path}/lab/s6lib/__init__.py" in printed, printed
        assert "pip install -q --no-deps torchsummary loky -e ./lab\n" in printed  # torch and numpy stay Colab's
        assert not (tmp_path / "lab.old").exists()


@pytest.mark.slow
def test_a_clone_that_fails_is_a_sentence_in_the_first_cell_which_then_runs_again(tmp_path):
    """In one kernel: Python would remember that there was no s6lib in a folder that was not there."""
    script = f"""\
print(get_ipython().run_cell(cell.replace("file://{PROJECT}", "file:///nowhere")).success)
sys.path_importer_cache["{tmp_path}/lab"] = None
print(get_ipython().run_cell(cell).success)
"""
    failed, succeeded = run_in_colab(tmp_path, script + WHERE).split("\nFalse\n")
    assert "fatal: '/nowhere'" in failed  # git's own reason
    assert failed.rstrip().endswith(
        "RuntimeError: s6lib could not be cloned, for the reason above; check the network and run this cell again"
    )
    assert "\npip install" not in failed
    assert "\nTrue\n" in succeeded, succeeded
    assert f"{tmp_path}/lab/s6lib/__init__.py" in succeeded


@pytest.mark.slow
@pytest.mark.parametrize("state", ["empty", "cut off", "no clone"])
def test_the_first_cell_runs_over_an_empty_or_half_made_lab(tmp_path, state):
    lab = tmp_path / "lab"
    if state == "cut off":  # as by a lost connection, before its files were there
        subprocess.run(["git", "clone", "-q", "--no-checkout", f"file://{PROJECT}", lab], check=True)
    else:
        lab.mkdir()
    if state != "empty":
        (lab / "mine.txt").write_text("mine")
    printed = run_in_colab(tmp_path, "get_ipython().run_cell(cell)\n" + WHERE)
    assert f"{tmp_path}/lab/s6lib/__init__.py" in printed, printed
    assert state == "empty" or (tmp_path / "lab.old" / "mine.txt").read_text() == "mine"  # nothing is deleted


def read(name: str, **replaced: str) -> nbformat.NotebookNode:
    """A notebook in whose settings, lines such as `FOLDER = PROJECT / "results"`, other values stand."""
    notebook = nbformat.read(PROJECT / "notebooks" / f"{name}.ipynb", as_version=4)
    for setting, value in replaced.items():
        line = re.compile(rf"^{setting} = (?!Path\().*$", re.MULTILINE)
        assert sum(len(line.findall(cell.source)) for cell in notebook.cells) == 1
        for cell in notebook.cells:
            cell.source = line.sub(lambda _, setting=setting, value=value: f"{setting} = {value}", cell.source)
    return notebook


def printed(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") or output.get("data", {}).get("text/plain", "") + "\n" for output in outputs)


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory):
    """A folder of one's own: two conditions, two seeds, one network by two short recipes."""
    out = tmp_path_factory.mktemp("own")
    for name in ("plain", "shorter"):
        short = replace(PLAIN, name=name, epochs=2, train_images=640)
        run_study(short, ("l1-bn", "gbn"), (1, 2), out, jobs=1, device="cpu", show_progress=False)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["03_study", "04_analysis", "05_replication", "09_methods"])
def test_a_folder_of_ones_own_may_take_the_place_of_the_published_one(own_folder, name):
    """As text, which is how 03 teaches to name a folder on Drive."""
    notebook = read(name, FOLDER=repr(str(own_folder)))
    for cell in notebook.cells:
        cell.source = cell.source.replace("DIGITS, EPOCHS = 3_200, 4", "DIGITS, EPOCHS = 640, 1")  # they are yours, too
    resources = {"metadata": {"path": str(PROJECT / "notebooks")}}
    NotebookClient(notebook, kernel_name="python3", resources=resources).execute()
    text = printed(notebook)
    if name == "03_study":
        assert "L1 has less than half of the weights below 0.01" in text  # after so few steps
        assert "\nplain (PlainNet), seed 1\n" in text
        assert "\nshorter (PlainNet), seed 1\n" in text
    else:
        assert "plain (PlainNet): 4 runs" in text
    if name == "04_analysis":
        assert "shorter (PlainNet): 4 runs" in text
        assert {path.name for path in (own_folder / "images").glob("*_accuracy.png")} == {
            "plain_accuracy.png",
            "shorter_accuracy.png",
        }
    if name == "05_replication":
        assert (own_folder / "images" / "plain_replication.png").exists()


@pytest.mark.parametrize("name", ["03_study", "04_analysis", "05_replication", "09_methods"])
@pytest.mark.parametrize("folder", ["empty", "missing"])
def test_a_folder_without_runs_is_a_sentence(tmp_path, name, folder):
    if folder == "empty":
        (tmp_path / folder).mkdir()
    notebook = read(name, FOLDER=repr(str(tmp_path / folder)))
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    needed = [cell for cell in cells if re.search("^(FOLDER|QUICK) = |^def minutes_here", cell, re.MULTILINE)]
    with pytest.raises(s6lib.S6Error) as raised:
        exec("\n".join(needed), {"CONDITIONS": CONDITIONS})
    assert str(raised.value) == "no runs yet: train some in 03, or set FOLDER"


@pytest.mark.parametrize("name", ["05_replication", "09_methods"])
def test_one_seed_is_too_few_to_compare_and_a_sentence_says_so(tiny_study, tmp_path, name):
    for run in ("plain/gbn/seed-1", "plain/l1-bn/seed-1"):
        shutil.copytree(tiny_study.folder / run, tmp_path / run)
    (cell,) = [cell.source for cell in read(name, FOLDER=repr(str(tmp_path))).cells if "\nFOLDER = " in cell.source]
    with pytest.raises(s6lib.S6Error, match=r"plain has too few runs to compare: .* two seeds or more"):
        exec(cell, {})


def test_nothing_is_trained_until_the_reader_says_so(monkeypatch):
    """In Colab, with a GPU, neither."""
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for path in NOTEBOOKS:
        for cell in code_cells(path):
            if re.search("^MODE = ", cell["source"], re.MULTILINE):
                exec(cell["source"], names := {"sys": sys, "torch": torch})
                assert names["MODE"] == "open"
                assert names["FOLDER"] == PROJECT / "results"


@pytest.mark.slow
def test_the_full_mode_says_first_what_it_trains_and_for_how_long(tmp_path):
    short = 'replace(PLAIN, name="short", epochs=2, train_images=640)'
    notebook = read("03_study", MODE='"full"', RECIPE=short, FOLDER=repr(str(tmp_path)))
    needed = [
        cell for cell in notebook.cells if re.search("^(MODE|QUICK) = |^def minutes_here", cell.source, re.MULTILINE)
    ]
    needed[0].source = "from dataclasses import replace\n" + needed[0].source
    needed[1].source = "import torch\nfrom s6lib import CONDITIONS\nCONDITIONS = CONDITIONS[:2]\n" + needed[1].source
    notebook.cells = needed
    NotebookClient(notebook, kernel_name="python3", coalesce_streams=True).execute()
    said, *bars = [output for output in notebook.cells[-1].outputs if output.get("name") != "stderr"]
    assert re.fullmatch(
        r"one study, recipe short: 2 runs of 2 epochs, about 1 min on this machine, less what is there already\n",
        said["text"],
    )
    assert sum(bar["data"]["text/plain"].startswith("all runs") for bar in bars) == 1
    assert len(list(tmp_path.glob("short/*/seed-1/run.json"))) == 2


@pytest.mark.parametrize(("share", "said"), [(0.6, "more than half"), (0.4, "less than half")])
def test_what_is_said_of_l1_is_computed(share, said, capsys):
    (cell,) = [
        cell["source"] for cell in code_cells(PROJECT / "notebooks" / "03_study.ipynb") if "than(" in cell["source"]
    ]
    weights = np.where(np.arange(100) < 100 * share, 0.0, 1.0)
    seen = {"bn 0": np.ones(100), "l1-bn 0": np.ones(100), "bn 1": np.ones(100), "l1-bn 1": weights}
    exec(cell, {"seen": seen, "DIGITS": 640, "EPOCHS": 1})
    assert f"L1 has {said} of the weights below 0.01, and BN less than one in eight" in capsys.readouterr().out


SLIDE = """\
import gc

(slider,) = [thing for thing in gc.get_objects() if type(thing) is ipywidgets.SelectionSlider]
(shown,) = [thing for thing in gc.get_objects() if type(thing) is ipywidgets.HTML]
for seed in slider.options:
    slider.value = seed
    print(shown.value)
"""


@pytest.mark.slow
def test_the_slider_moves_after_the_whole_notebook_has_run():
    notebook = read("05_replication")
    notebook.cells.append(nbformat.v4.new_code_cell(SLIDE))
    resources = {"metadata": {"path": str(PROJECT / "notebooks")}}
    NotebookClient(notebook, kernel_name="python3", resources=resources).execute()
    tables = "".join(output["text"] for output in notebook.cells[-1].outputs).splitlines()
    assert len(set(tables)) == 10
    assert "<td>99.50%</td></tr>" in tables[0]
    assert "The winner: <b>L2 + BN and L1 + L2 + BN</b>" in tables[0]
    assert "The winner: <b>GBN</b>" in tables[2]


def test_notebooks_are_saved_as_readers_see_them_without_a_kernel(tmp_path):
    there = "import sys\nprint('all 5 runs are there', file=sys.stderr)"
    source = f"{there}\nimport ipywidgets\nprint(1)\nprint(2)\ndisplay(ipywidgets.VBox())"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source, id="one")])
    nbformat.write(notebook, path := tmp_path / "one.ipynb")
    execute(path)
    printed, shown = nbformat.read(path, as_version=4).cells[0].outputs
    assert printed["text"] == "1\n2\n"
    assert shown["data"] == {"text/plain": "VBox()"}
    saved = path.read_bytes()
    execute(path)  # twice changes nothing
    assert path.read_bytes() == saved


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_output_needs_a_kernel_to_be_seen(path):
    """Saved widgets are dead, or shown as `VBox(children=...`."""
    assert "widgets" not in json.loads(path.read_text())["metadata"]
    for cell in code_cells(path):
        assert not re.search(r"widget-view|\(children=|\d%\|", outputs(cell))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_after_a_restart_the_first_two_cells_are_not_missed(path):
    """What they import, later cells import again: in Colab, the installation outlives the kernel."""
    source = "\n".join(cell["source"] for cell in code_cells(path)[2:])
    command = ["ruff", "check", "--isolated", "--select=F821", "--config=builtins=['display']", "-"]
    result = subprocess.run([sys.executable, "-m", *command], input=source, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def names_of(path: Path) -> dict[str, object]:
    """What a notebook imports, and what its cells that open FOLDER define, if there are any; nothing is trained."""
    cells = [cell["source"] for cell in code_cells(path)[1:]]
    imports = [line for cell in cells for line in cell.splitlines() if re.match("(from|import) ", line)]
    names = {"display": lambda shown: None, "sys": sys}
    exec("\n".join(imports), names)
    first = next((number for number, cell in enumerate(cells) if "\nFOLDER = " in cell), len(cells))
    for cell in cells[first : first + 2]:
        if "run_study" not in cell:
            exec(cell, names)
    return names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_folded_solutions_print_what_stands_below_them(path, capsys):
    names, threads = names_of(path), torch.get_num_threads()
    text = "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"])
    solutions = re.findall(
        r"<details><summary>Solution</summary>\n\n```python\n(.*?)```\n\nIt prints:\n\n```text\n(.*?)```",
        text,
        re.DOTALL,
    )
    assert len(solutions) == text.count("<details>") >= 3
    for code, printed in solutions:
        capsys.readouterr()
        exec(code, names)
        assert capsys.readouterr().out == printed
    torch.set_num_threads(threads)


def made_up_run(folder, condition, seed, accuracy, loss=0.02):
    """A run of 25 epochs, all alike; a quarter of the weights are zero where there is L1."""
    model, run = PlainNet(), Run(PLAIN, condition, seed)
    for weights in model.parameters() if condition.l1 else ():
        weights.data.flatten()[::4] = 0
    row = {"val_accuracy": round(accuracy, 4), "val_loss": loss}
    history = [{**dict.fromkeys(COLUMNS, 0.0), "epoch": epoch, **row} for epoch in range(1, 26)]
    weights = serialise(lambda file: torch.save(model.state_dict(), file))
    save_run(run.folder(folder), run, RunResult(None, history, weights, np.zeros(10_000, np.uint8), [{}]))


@pytest.mark.slow
def test_the_preregistered_answer_is_shown_once_all_runs_are_in(tmp_path, capsys):
    """On made-up accuracies: GBN costs 0.1 points, and all else is alike."""
    asked = {(slug, seed) for slug in FACTORIAL for seed in (*range(1, 11), *FACTORIAL_SEEDS)}
    for slug, seed in sorted(asked | {(slug, seed) for slug in PENALTIES for seed in PENALTY_SEEDS}):
        accuracy = 0.9950 - 0.001 * ("gbn" in slug) + 0.0001 * (seed % 3) + 0.0001 * (slug == "bn") * (seed % 2)
        loss = 0.02 + 0.001 * ("gbn" in slug) + 0.0001 * (seed % 5)
        made_up_run(tmp_path, ALL_CONDITIONS[slug], seed, accuracy, loss)
    cells = [cell["source"] for cell in code_cells(PROJECT / "notebooks" / "05_replication.ipynb")]
    count, shown, drawn, beside, weights = (
        next(cell for cell in cells if mark in cell)
        for mark in ("asked = {", "answer(read(", "plot_answers(", "contrasts(read(", "weights that are below")
    )
    names = {"FOLDER": tmp_path, "PUBLISHED": False, "Study": Study, "np": np, "display": lambda _: None}
    for cell in (count, shown, drawn):
        exec(cell, names)
    printed = capsys.readouterr().out
    assert printed.startswith("168 of 168 runs are in\nG: GBN: costs 0.1")
    assert "E: L1, L2 and L1 + L2: all within 0.05 points" in printed
    (g,) = names["found"].query("question == 'G'")["mean"]
    assert re.search(rf"^ +G 32 {-g:.3f} ", printed, re.MULTILINE)  # in the table as in the picture
    bars = names["answers_figure"].axes[0].get_lines()
    assert bars[3].get_xdata()[0] < -0.1  # drawn as a loss

    names["PUBLISHED"] = True  # which asks for seeds 1 to 10 too
    exec(beside, names)
    printed = capsys.readouterr().out
    assert printed.startswith(f"last epoch       G            {-g:+.3f}, 95% interval ")
    assert f"epochs 19 to 25  G            {-g:+.3f}" in printed  # here all epochs are alike
    assert "test loss        G            +1.000, 95% interval +1.000 to +1.000" in printed
    assert len(printed.splitlines()) == 10
    exec(weights, names)
    shares = [float(share) for share in re.findall(r"([\d.]+)%$", capsys.readouterr().out, re.MULTILINE)]
    assert [share > 24 for share in shares] == ["l1" in slug for slug in FACTORIAL]

    (tmp_path / "plain" / "gbn" / "seed-30" / "run.json").unlink()
    for cell in (count, shown, drawn, beside, weights):
        exec(cell, names)
    assert capsys.readouterr().out == "167 of 168 runs are in: no answer before all are\n"
    assert not names["COMPLETE"]


def test_the_ablation_finds_what_earns(tmp_path, capsys):
    """On made-up accuracies: shift and scale earn 0.1 points, and nothing else earns any."""
    steps = (CONTROL, *read_study_file(str(PROJECT / "studies" / "ablation.py"))[1])
    for number, condition in enumerate((*steps, *CONDITIONS)):
        for seed in range(1, 11) if condition in (*steps[:2], *CONDITIONS) else range(1, 6):
            earned = 0.001 * (number in range(2, len(steps)))
            made_up_run(tmp_path, condition, seed, 0.9950 + earned + 0.0001 * ((seed + number) % 3))
    cells = [cell["source"] for cell in code_cells(PROJECT / "notebooks" / "08_frontier.ipynb")]
    whole, judged, again, drawn = (
        next(cell for cell in cells if mark in cell) for mark in ("def gain(", "STEPS = (", "fresh = ", "plot_gains(")
    )
    names = {"FOLDER": tmp_path, "Study": Study, "pd": pd, "plain": Study(tmp_path, conditions="average")}
    for cell in (whole, judged, again, drawn):
        exec(cell, names)
    assert re.search(
        r"\nsignificant after the correction: shift and scale\n.*n = 5, p = .*: not confirmed\n$",
        capsys.readouterr().out,
        re.DOTALL,
    )
    assert names["table"]["label"].tolist() == [f"+ {condition.label}" for condition in steps[1:]]
    assert names["table"]["mean"].round(2).tolist() == [0, 0.1, 0, 0, 0, 0]
    assert names["whole"]["mean"] == pytest.approx(0.1, abs=0.01)
    assert len(names["gains"]) == 13


OWN_CELLS = (
    """\
import s6lib
from torch import nn

GROUPS = 2

class Own(nn.Module):
    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 5, 3), norm(4), nn.Flatten(), nn.Linear(256, 10))

    def forward(self, images):
        return self.layers(images)

def small(model):
    return 1e-3 * model.layers[0].weight.square().sum()

mine = s6lib.Recipe("mine", network=Own, epochs=2, train_images=640)
conditions = (
    s6lib.CONTROL,
    s6lib.Condition("groups", norm=lambda channels: nn.GroupNorm(GROUPS, channels)),
    s6lib.Condition("small", penalty=small),
)
def study(seeds):
    return s6lib.run_study(mine, conditions, seeds, jobs=2, device="cpu", show_progress=False)
""",
    "first = study((1, 2)).summary()",
    """\
from pathlib import Path
Path("runs/mine/groups/seed-2/run.json").unlink()  # as if it had been stopped
again = study((1, 2))
assert again.summary().drop(columns="seconds").equals(first.drop(columns="seconds"))
assert isinstance(again.model("groups").layers[1], nn.GroupNorm)
print(len(s6lib.statistics.paired_comparisons(again.outcomes())), "comparisons")
""",
    "GROUPS = 4\nstudy((1,))",
)


@pytest.mark.slow
def test_a_network_of_a_notebook_cell_runs_resumes_and_is_judged_and_edited_is_refused(tmp_path):
    cells = [nbformat.v4.new_code_cell(source) for source in OWN_CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells)
    client = NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    with pytest.raises(CellExecutionError, match=r"was trained with different settings: step 1 loss = "):
        client.execute()
    assert "3 comparisons" in notebook.cells[2].outputs[0]["text"]


@pytest.mark.slow
def test_the_stand_in_for_colab_takes_the_first_cell_seriously_and_sees_differences(tmp_path):
    """With this Python in place of Colab's; pip is replaced, since a test installs nothing."""
    variables = colab.stand_in(tmp_path, sys.executable)
    pip = "get_ipython().register_magic_function(lambda line: None, magic_name='pip')\n"
    (tmp_path / "ipython" / "profile_default" / "startup" / "pip.py").write_text(pip)
    first = code_cells(NOTEBOOKS[0])[0]["source"]
    shown = "import os, s6lib; print(os.listdir(), s6lib.__file__ == os.path.abspath('lab/s6lib/__init__.py'))"
    cells = [nbformat.v4.new_code_cell(source) for source in (first, shown, "1 + 1")]
    ran = colab.run(nbformat.v4.new_notebook(cells=cells), variables)
    assert colab.printed(ran.cells[1]) == "['lab'] True\n"
    assert colab.differences(ran, ran) == (2, [])
    other = nbformat.from_dict(ran)
    other.cells[2].outputs[0].data["text/plain"] = "3"
    assert colab.differences(ran, other)[1][-2:] == ["-2", "+3"]
