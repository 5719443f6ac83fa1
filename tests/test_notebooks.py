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
import pytest
import torch
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

import s6lib
from s6lib.data import PROJECT

sys.path.insert(0, str(PROJECT / "notebooks"))
from execute import execute
from set_address import FILES, set_address

NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))
IN_FOLDER = {"metadata": {"path": str(PROJECT / "notebooks")}}
OF_RUNS = ["03_study", "04_analysis", "05_replication", "09_methods"]  # those that read FOLDER


def code_cells(path: Path) -> list[dict]:
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    return [{**cell, "source": "".join(cell["source"])} for cell in cells]


def text_of(cell: dict) -> str:
    return json.dumps(
        [{**o, "data": {k: v for k, v in o.get("data", {}).items() if k != "image/png"}} for o in cell["outputs"]]
    )


def test_the_series_is_complete():
    first = ["01_data", "02_models", "03_study", "04_analysis", "05_replication", "06_when", "07_your_own"]
    assert [path.stem for path in NOTEBOOKS] == [*first, "08_frontier", "09_methods"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_every_cell_was_executed_in_order_without_an_error(self, path):
        cells = code_cells(path)
        assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
        outputs = [output for cell in cells for output in cell["outputs"]]
        assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)
        assert sum(bool(cell["outputs"]) for cell in cells) >= 0.6 * len(cells)

    def test_no_output_holds_a_machines_path_or_needs_a_kernel(self, path):
        """Saved widgets are dead, or shown as `VBox(children=...`; saved bars stand still."""
        assert "widgets" not in json.loads(path.read_text())["metadata"]
        for cell in code_cells(path):
            assert not re.search(r"/(home|root|tmp|work|Users|usr|content)/", text_of(cell))
            assert not re.search(r"widget-view|\(children=|\d%\|", text_of(cell))

    def test_cells_are_short_and_few_are_ignored(self, path):
        cells = code_cells(path)
        assert all(len(cell["source"].splitlines()) <= 20 for cell in cells)
        ignored = [cell for cell in cells if colab.is_ignored(cell)]
        assert len(ignored) <= {"06_when": 3, "07_your_own": 5}.get(path.stem, 1)  # versions, and runs trained anew
        assert not any(word in cell["source"] for cell in cells for word in ("NBVAL_SKIP", "NBVAL_RAISES"))

    def test_the_first_cell_is_the_same_in_all_and_folded_to_its_title(self, path):
        first = code_cells(path)[0]
        assert first["source"] == code_cells(NOTEBOOKS[0])[0]["source"]
        assert first["source"].startswith("# @title ")
        assert first["metadata"]["cellView"] == "form"
        assert first["metadata"]["jupyter"] == {"source_hidden": True}

    def test_answers_to_guesses_are_folded_and_no_guess_is_saved(self, path):
        for cell in code_cells(path):
            folded = cell["metadata"].get("collapsed", False)
            assert cell["metadata"].get("jupyter", {}).get("outputs_hidden", False) == folded
            if asked := re.search(r"^(guess|guesses|PREDICTED\w*) = (.*)$", cell["source"], re.MULTILINE):
                assert folded
                assert asked[1] != "guess" or asked[2].startswith('"?"')

    def test_what_s6lib_exports_is_imported_from_there(self, path):
        """So that a move of modules breaks no notebook, nor what readers copied from one."""
        text = "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"])
        imported = re.findall(r"^from s6lib\.[\w.]+ import (.+)$", text, re.MULTILINE)
        assert not {name for names in imported for name in names.split(", ")} & set(s6lib.__all__)


@pytest.mark.slow
def test_nbval_fails_when_a_number_is_falsified(tmp_path):
    """A copy of the first two cells of 01, in which the first training image, a five, is a six."""
    notebook = json.loads((PROJECT / "notebooks" / "01_data.ipynb").read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    text = json.dumps({**notebook, "cells": code[:2]})
    assert text.count("its label, 5") == 1
    shutil.copytree(PROJECT / "notebooks", tmp_path, ignore=shutil.ignore_patterns("*.ipynb"), dirs_exist_ok=True)
    (tmp_path / "copy.ipynb").write_text(text.replace("its label, 5", "its label, 6"))
    command = [sys.executable, "-m", "pytest", "--nbval", "copy.ipynb", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stdout
    assert "1 failed, 1 passed" in result.stdout
    assert "label, 6\n" in result.stdout


def test_one_command_rewrites_the_address_everywhere(tmp_path):
    for name in FILES:
        shutil.copy(PROJECT / name, tmp_path)
    shutil.copytree(PROJECT / "notebooks", tmp_path / "notebooks", ignore=shutil.ignore_patterns("__pycache__"))
    kept = {path: path.read_text() for path in tmp_path.rglob("*") if path.suffix != ".py" and path.is_file()}
    changed = set_address("someone/my.fork-2", tmp_path)
    assert len(changed) == len(FILES) + len(NOTEBOOKS)
    for path in changed:
        assert path.read_text().count("someone/my.fork-2") == kept[path].count("OWNER/s6lib") > 0
        assert "OWNER/s6lib" not in path.read_text()
    set_address("OWNER/s6lib", tmp_path)
    assert all(path.read_text() == text for path, text in kept.items())
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
RUN = "print(get_ipython().run_cell(cell).success)\nimport s6lib; print(s6lib.__file__)\n"


def run_in_colab(folder: Path, script: str) -> str:
    """What a script prints in an IPython of its own that takes itself for Colab; `cell` is the first cell.

    The cell clones this checkout, and the script may replace the address of that.
    """
    cell = code_cells(NOTEBOOKS[0])[0]["source"]
    address = re.search(r"https://github\.com/\S+", cell)[0]
    (folder / "cell.txt").write_text(cell.replace(address, f"file://{PROJECT}"))
    (folder / "script.ipy").write_text(COLAB + script)
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-m", "IPython", "--no-banner", "--colors=NoColor", "script.ipy"],
        cwd=folder, env={**variables, "IPYTHONDIR": str(folder / "ipython"), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    return result.stdout


@pytest.mark.slow
def test_the_first_cell_makes_s6lib_importable_in_colab_and_a_failed_clone_is_a_sentence(tmp_path):
    """In one kernel: Python would remember that there was no s6lib in a folder that was not there."""
    script = f"""\
get_ipython().run_cell(cell.replace("file://{PROJECT}", "file:///nowhere"))
sys.path_importer_cache["{tmp_path}/lab"] = None
print("again")
"""
    failed, succeeded = run_in_colab(tmp_path, script + RUN + RUN).split("\nagain\n")
    assert "fatal: '/nowhere'" in failed  # git's own reason
    assert failed.rstrip().endswith(
        "RuntimeError: s6lib could not be cloned, for the reason above; check the network and run this cell again"
    )
    assert "\npip install" not in failed
    assert "pip install -q --no-deps torchsummary loky -e ./lab\n" in succeeded  # torch and numpy stay Colab's
    assert succeeded.count(f"\nTrue\n{tmp_path}/lab/s6lib/__init__.py") == 2, succeeded
    assert not (tmp_path / "lab.old").exists()


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
    printed = run_in_colab(tmp_path, RUN)
    assert f"True\n{tmp_path}/lab/s6lib/__init__.py" in printed, printed
    assert state == "empty" or (tmp_path / "lab.old" / "mine.txt").read_text() == "mine"  # nothing is deleted


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


def read(name: str, **replaced: str) -> nbformat.NotebookNode:
    """A notebook in whose settings, lines such as `FOLDER = PROJECT / "results"`, other values stand."""
    notebook = nbformat.read(PROJECT / "notebooks" / f"{name}.ipynb", as_version=4)
    for setting, value in replaced.items():
        line = re.compile(rf"^{setting} = (?!Path\().*$", re.MULTILINE)
        assert sum(len(line.findall(cell.source)) for cell in notebook.cells) == 1
        for cell in notebook.cells:
            cell.source = line.sub(lambda _, setting=setting, value=value: f"{setting} = {value}", cell.source)
    return notebook


def cell_with(notebook: nbformat.NotebookNode, line: str) -> int:
    """The number of the first code cell with a line that begins like this."""
    cells = enumerate(notebook.cells)
    return next(n for n, cell in cells if cell.cell_type == "code" and re.search(f"^{line}", cell.source, re.MULTILINE))


@pytest.fixture(scope="module")
def own_runs(tmp_path_factory):
    """Two conditions, two seeds, two short recipes."""
    folder = tmp_path_factory.mktemp("own")
    for recipe in ("plain", "shorter"):
        short = replace(s6lib.PLAIN, name=recipe, epochs=2, train_images=640)
        s6lib.run_study(short, ("l1-bn", "gbn"), (1, 2), folder, jobs=1, device="cpu", show_progress=False)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_RUNS)
def test_a_folder_of_ones_own_may_take_the_place_of_the_published_one(own_runs, tmp_path, name):
    """As text, which is how 03 teaches to name a folder on Drive."""
    shutil.copytree(own_runs, tmp_path, dirs_exist_ok=True)
    notebook = read(name, FOLDER=repr(str(tmp_path)))
    if name == "03_study":  # the cells before would train for a minute, and read no folder
        needed = [nbformat.v4.new_code_cell("import lesson, pandas as pd, s6lib")]
        notebook.cells = [*needed, *notebook.cells[cell_with(notebook, "FOLDER = ") :]]
    NotebookClient(notebook, kernel_name="python3", resources=IN_FOLDER).execute()
    text = "".join(colab.printed(cell) for cell in notebook.cells if cell.cell_type == "code")
    assert "plain (PlainNet)" in text
    if name in ("03_study", "04_analysis"):
        assert "shorter (PlainNet)" in text
    if name == "04_analysis":
        drawn = {path.name for path in (tmp_path / "images").glob("*_accuracy.png")}
        assert drawn == {"plain_accuracy.png", "shorter_accuracy.png"}


def open_folder(name: str, folder: Path) -> dict[str, object]:
    """Run the cell of a notebook that sets and opens FOLDER, and return its variables."""
    notebook = read(name, FOLDER=repr(str(folder)))
    exec("import lesson, s6lib", names := {})
    exec(notebook.cells[cell_with(notebook, "FOLDER = ")].source, names)
    return names


@pytest.mark.parametrize("name", OF_RUNS)
@pytest.mark.parametrize("folder", ["empty", "missing"])
def test_a_folder_without_runs_is_a_sentence(tmp_path, name, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(s6lib.S6Error) as raised:
        open_folder(name, tmp_path / folder)
    assert str(raised.value) == "no runs yet: train some in 03, or set FOLDER"


@pytest.mark.parametrize("name", ["05_replication", "09_methods"])
def test_one_seed_is_too_few_to_compare_and_a_sentence_says_so(tiny_study, tmp_path, name):
    for run in ("plain/gbn/seed-1", "plain/l1-bn/seed-1"):
        shutil.copytree(tiny_study.folder / run, tmp_path / run)
    with pytest.raises(s6lib.S6Error, match=r"plain has too few runs to compare: .* two seeds or more"):
        open_folder(name, tmp_path)


def test_nothing_is_trained_until_the_reader_says_so(monkeypatch):
    """In Colab, with a GPU, neither."""
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("s6lib.lab.launch.run_study", None)
    notebook = read("03_study")
    exec("import lesson, s6lib", names := {})
    exec(notebook.cells[cell_with(notebook, "MODE = ")].source, names)
    assert (names["MODE"], names["FOLDER"]) == ("open", PROJECT / "results")


SLIDE = """\
import gc
import ipywidgets

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
    NotebookClient(notebook, kernel_name="python3", resources=IN_FOLDER).execute()
    tables = "".join(output["text"] for output in notebook.cells[-1].outputs).splitlines()
    assert len(set(tables)) == 10
    assert "The winner: <b>L2 + BN and L1 + L2 + BN</b>" in tables[0]
    assert "The winner: <b>GBN</b>" in tables[2]


def test_notebooks_are_saved_as_readers_see_them_without_a_kernel(tmp_path):
    there = "import sys\nprint('all 5 runs are there', file=sys.stderr)"
    source = f"{there}\nimport ipywidgets\nprint(1)\nprint(2)\ndisplay(ipywidgets.VBox())"
    moves = "view = display(1, display_id=True)\nview.update(2)"
    cells = [nbformat.v4.new_code_cell(source, id="one"), nbformat.v4.new_code_cell(moves, id="two")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path := tmp_path / "one.ipynb")
    execute(path)
    first, second = nbformat.read(path, as_version=4).cells
    assert [output.get("text") or output["data"] for output in first.outputs] == ["1\n2\n", {"text/plain": "VBox()"}]
    assert [output["data"] for output in second.outputs] == [{"text/plain": "2"}]  # as it was in the end
    saved = path.read_bytes()
    execute(path)  # twice changes nothing
    assert path.read_bytes() == saved


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_folded_solutions_print_what_stands_below_them(path, capsys, mnist):
    """With the data, what the notebook imports, and the cells that open FOLDER; nothing is trained."""
    cells, threads = [cell["source"] for cell in code_cells(path)[1:]], torch.get_num_threads()
    names = {"display": lambda shown: None, "sys": sys, "train": mnist[0], "test": mnist[1]}
    exec("\n".join(re.findall(r"^(?:from|import) .*", "\n".join(["import lesson", *cells]), re.MULTILINE)), names)
    first = next((number for number, cell in enumerate(cells) if "\nFOLDER = " in cell), len(cells))
    for cell in cells[first : first + 2]:
        if "run_study" not in cell:
            exec(cell, names)
    text = "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"])
    solution = r"<details><summary>Solution</summary>\n\n```python\n(.*?)```\n\nIt prints:\n\n```text\n(.*?)```"
    solutions = re.findall(solution, text, re.DOTALL)
    assert len(solutions) == text.count("<details>") >= 3
    for code, printed in solutions:
        capsys.readouterr()
        exec(code, names)
        assert capsys.readouterr().out == printed
    torch.set_num_threads(threads)


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
    with pytest.raises(CellExecutionError, match=r"was trained with different settings: loss = "):
        client.execute()
    assert "3 comparisons" in notebook.cells[2].outputs[0]["text"]
