"""The notebooks are executed, in order, without an error, and check what they show."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import checks
import colab
import nbformat
import pytest
import torch
from conftest import TINY, commit_all
from execute import execute
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook
from set_address import FILES

import s6lib
from s6lib.data import PROJECT

NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))
README = (PROJECT / "README.md").read_text()
IN_FOLDER = {"metadata": {"path": str(PROJECT / "notebooks")}}
OF_RUNS = ["03_study", "04_analysis", "05_replication", "09_methods"]  # those that read FOLDER


@cache
def code_cells(path: Path) -> list[NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def text_of(path: Path) -> str:
    """Code and lesson."""
    return "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)


def test_the_readme_lists_the_series():
    listed = re.findall(r"^\| \[(\w+)\]\(notebooks/\1\.ipynb\)", README, re.MULTILINE)
    assert [path.stem for path in NOTEBOOKS] == listed


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_every_cell_was_executed_in_order_without_an_error(self, path):
        cells = code_cells(path)
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
        outputs = [output for cell in cells for output in cell.outputs]
        assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
        assert sum(bool(cell.outputs) for cell in cells) >= 0.6 * len(cells)

    def test_no_output_holds_a_machines_path_or_needs_a_kernel(self, path):
        """Saved widgets are dead, or shown as `VBox(children=...`; saved bars stand still."""
        assert "widgets" not in nbformat.read(path, as_version=4).metadata
        outputs = json.dumps([cell.outputs for cell in code_cells(path)])
        without_pictures = re.sub(r'"image/png": "[^"]*"', "", outputs)
        assert not re.search(r"/(home|root|tmp|work|Users|usr|content)/", without_pictures)
        assert not re.search(r"widget-view|\(children=|\d%\|", without_pictures)

    def test_cells_are_short_and_few_are_ignored(self, path):
        cells = code_cells(path)
        assert all(len(cell.source.splitlines()) <= 20 for cell in cells)
        ignored = [cell for cell in cells if colab.is_ignored(cell)]
        assert len(ignored) <= {"06_when": 3, "07_your_own": 5}.get(path.stem, 1)  # versions, and runs trained anew
        assert not any(word in cell.source for cell in cells for word in ("NBVAL_SKIP", "NBVAL_RAISES"))

    def test_the_first_cell_is_the_same_in_all_and_folded_to_its_title(self, path):
        first = code_cells(path)[0]
        assert first.source == code_cells(NOTEBOOKS[0])[0].source
        assert first.source.startswith("# @title ")
        assert (first.metadata.cellView, first.metadata.jupyter) == ("form", {"source_hidden": True})

    def test_the_last_cell_checks_the_claims_of_the_text(self, path):
        claims = f'check_claims("{path.stem}", globals())' in code_cells(path)[-1].source
        assert claims == (path.stem in checks.CLAIMS)

    def test_answers_to_guesses_are_folded_and_no_guess_is_saved(self, path):
        for cell in code_cells(path):
            folded = cell.metadata.get("collapsed", False)
            assert cell.metadata.get("jupyter", {}).get("outputs_hidden", False) == folded
            if asked := re.search(r"^(guess|guesses|PREDICTED\w*) = (.*)$", cell.source, re.MULTILINE):
                assert folded
                assert asked[1] != "guess" or asked[2].startswith('"?"')

    def test_what_s6lib_exports_is_imported_from_there(self, path):
        """So that a move of modules breaks no notebook, nor what readers copied from one."""
        imported = re.findall(r"^from s6lib\.[\w.]+ import (.+)$", text_of(path), re.MULTILINE)
        assert not {name for names in imported for name in names.split(", ")} & set(s6lib.__all__)

    def test_the_folded_solutions_print_what_stands_below_them(self, path, capsys, mnist):
        """With the data, what the notebook imports, and the cells that open FOLDER; nothing is trained."""
        cells, threads = [cell.source for cell in code_cells(path)[1:]], torch.get_num_threads()
        names = {"display": lambda shown: None, "sys": sys, "train": mnist[0], "test": mnist[1]}
        exec("\n".join(re.findall(r"^(?:from|import) .*", "\n".join(["import lesson", *cells]), re.MULTILINE)), names)
        first = next((number for number, cell in enumerate(cells) if "\nFOLDER = " in cell), len(cells))
        for cell in cells[first : first + 2]:
            if "run_study" not in cell:
                exec(cell, names)
        solution = r"<details><summary>Solution</summary>\n\n```python\n(.*?)```\n\nIt prints:\n\n```text\n(.*?)```"
        solutions = re.findall(solution, text_of(path), re.DOTALL)
        assert len(solutions) == text_of(path).count("<details>") >= 3
        for code, printed in solutions:
            capsys.readouterr()
            exec(code, names)
            assert capsys.readouterr().out == printed
        torch.set_num_threads(threads)


def test_claims_that_do_not_hold_are_named_but_not_of_a_readers_own_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(checks, "CLAIMS", {"04_analysis": {"one is 1": lambda it: it.one == 1}})
    checks.check_claims("04_analysis", {"FOLDER": PROJECT / "results", "one": 1})
    assert capsys.readouterr().out == "1 claims of the text hold for the published runs\n"
    with pytest.raises(AssertionError, match="the text says: one is 1"):
        checks.check_claims("04_analysis", {"FOLDER": PROJECT / "results", "one": 2})
    checks.check_claims("04_analysis", {"FOLDER": str(tmp_path), "one": 2})
    assert capsys.readouterr().out == "The text is about the published runs; yours may differ.\n"


def test_one_command_points_a_fork_to_its_own_address_everywhere(tmp_path):
    """By default, that of the clone's remote."""
    for name in FILES:
        shutil.copy(PROJECT / name, tmp_path)
    shutil.copytree(PROJECT / "notebooks", tmp_path / "notebooks", ignore=shutil.ignore_patterns("__pycache__"))
    kept = {path: path.read_text() for path in tmp_path.rglob("*") if path.suffix != ".py" and path.is_file()}
    subprocess.run(["git", "init", "-q", tmp_path], check=True)

    def set_address(remote, *arguments):
        subprocess.run(["git", "-C", tmp_path, "config", "remote.origin.url", remote], check=True)
        command = [sys.executable, tmp_path / "notebooks" / "set_address.py", *arguments]
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False).stdout

    own = "someone/my.fork-2"
    changed = [tmp_path / name for name in set_address(f"git@github.com:{own}.git").split()]
    assert len(changed) == len(FILES) + len(NOTEBOOKS)
    for path in changed:
        assert path.read_text().count(own) == kept[path].count("OWNER/s6lib") > 0
        assert "OWNER/s6lib" not in path.read_text()
    assert set_address(f"https://github.com/{own}.git") == set_address(f"https://github.com/{own}/") == ""
    elsewhere = "/elsewhere/s6lib"
    assert f"the remote origin of {tmp_path} is {elsewhere}, and not" in set_address(elsewhere)
    assert "expected OWNER/NAME" in set_address(elsewhere, f"https://github.com/{own}")
    set_address(elsewhere, "OWNER/s6lib")
    assert all(path.read_text() == text for path, text in kept.items())


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """The address of a clone without the published runs, which take most of the time to copy."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("s6lib", "notebooks"):
        shutil.copytree(PROJECT / name, folder / name)
    commit_all(folder)
    return f"file://{folder}"


def run_in_colab(folder: Path, repository: str, *sources: str) -> list[NotebookNode]:
    """Cells as they come out of the stand-in for Colab, with this Python. pip is replaced: a test installs nothing."""
    variables = colab.stand_in(folder, sys.executable) | {"GIT_CONFIG_KEY_0": f"url.{repository}.insteadOf"}
    pip = "get_ipython().register_magic_function(lambda line: print('pip', line), magic_name='pip')\n"
    (folder / "ipython" / "profile_default" / "startup" / "pip.py").write_text(pip)
    cells = [new_code_cell(source, metadata={"tags": ["raises-exception"]}) for source in sources]
    return colab.run(new_notebook(cells=cells), variables).cells


FIRST = code_cells(NOTEBOOKS[0])[0].source
FROM_LAB = "import os, s6lib; print(s6lib.__file__ == os.path.abspath('lab/s6lib/__init__.py'), sorted(os.listdir()))"


@pytest.mark.slow
def test_the_first_cell_makes_s6lib_importable_in_colab_and_a_failed_clone_is_a_sentence(tmp_path, repository):
    """In one kernel: Python would remember that there was no s6lib in a folder that was not there."""
    nowhere = re.sub(r"https://github\.com/\S+", "file:///nowhere", FIRST)
    forget = "import os, sys; sys.path_importer_cache[os.path.abspath('lab')] = None"
    failed, _, *again = run_in_colab(tmp_path, repository, nowhere, forget, FIRST, FROM_LAB, FIRST, FROM_LAB)
    assert "fatal: '/nowhere'" in colab.printed(failed)  # git's own reason
    assert failed.outputs[-1].evalue == (
        "s6lib could not be cloned, for the reason above; check the network and run this cell again"
    )
    assert "pip install" not in colab.printed(failed)
    installed = "pip install -q --no-deps torchsummary loky -e ./lab\n"  # torch and numpy stay Colab's
    assert [colab.printed(cell).startswith(installed) for cell in again[::2]] == [True, True]
    assert [colab.printed(cell) for cell in again[1::2]] == ["True ['lab']\n"] * 2


@pytest.mark.slow
def test_the_first_cell_runs_over_an_empty_or_half_made_lab(tmp_path, repository):
    """Half made by a lost connection, before its files were there, or by the reader: nothing is deleted."""
    clone = f"!git clone -q --no-checkout {repository} lab"
    for number, state in enumerate(("!mkdir lab", f"{clone}; touch lab/mine", "!mkdir lab; touch lab/mine")):
        cells = (state, FIRST, f"{FROM_LAB}; print(os.listdir('lab.old'))")
        *_, shown = run_in_colab(tmp_path / str(number), repository, *cells)
        assert colab.printed(shown).startswith("True ['lab', 'lab.old']\n"), state
        assert ("'mine'" in colab.printed(shown)) == ("mine" in state)


def read(name: str, folder: Path | None = None) -> NotebookNode:
    """A notebook, with another folder in the place of its own: as text, as 03 teaches to name one on Drive."""
    notebook = nbformat.read(PROJECT / "notebooks" / f"{name}.ipynb", as_version=4)
    for cell in notebook.cells if folder else ():
        cell.source = re.sub(r"^FOLDER = .*$", lambda _: f"FOLDER = {str(folder)!r}", cell.source, flags=re.MULTILINE)
    return notebook


def opening_cell(notebook: NotebookNode) -> int:
    """The number of the cell that sets FOLDER, and opens it."""
    cells = enumerate(notebook.cells)
    return next(n for n, cell in cells if cell.cell_type == "code" and "\nFOLDER = " in cell.source)


@pytest.fixture(scope="module")
def own_runs(tiny_study, tmp_path_factory):
    """Two conditions, two seeds, two short recipes."""
    folder = shutil.copytree(tiny_study.folder, tmp_path_factory.mktemp("own"), dirs_exist_ok=True)
    shorter = replace(TINY, name="shorter", epochs=1)
    s6lib.run_study(shorter, ("l1-bn", "gbn"), (1, 2), folder, jobs=1, show_progress=False)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_RUNS)
def test_a_folder_of_ones_own_may_take_the_place_of_the_published_one(own_runs, tmp_path, name):
    shutil.copytree(own_runs, tmp_path, dirs_exist_ok=True)
    notebook = read(name, tmp_path)
    if name == "03_study":  # the cells before would train for a minute, and read no folder
        needed = new_code_cell("import lesson, pandas as pd, s6lib")
        notebook.cells = [needed, *notebook.cells[opening_cell(notebook) :]]
    NotebookClient(notebook, kernel_name="python3", resources=IN_FOLDER).execute()
    text = "".join(colab.printed(cell) for cell in notebook.cells if cell.cell_type == "code")
    assert "plain (PlainNet)" in text
    if name in ("03_study", "04_analysis"):
        assert "shorter (PlainNet)" in text
    if name == "04_analysis":
        drawn = {path.name for path in (tmp_path / "images").glob("*_accuracy.png")}
        assert drawn == {"plain_accuracy.png", "shorter_accuracy.png"}


def open_folder(name: str, folder: Path | None = None) -> dict[str, object]:
    """Run the cell of a notebook that sets and opens FOLDER, and return its variables."""
    notebook = read(name, folder)
    exec("import lesson, s6lib", names := {})
    exec(notebook.cells[opening_cell(notebook)].source, names)
    return names


@pytest.mark.parametrize("name", OF_RUNS)
def test_a_folder_with_too_few_runs_is_a_sentence(tiny_study, tmp_path, name):
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "missing"):
        with pytest.raises(s6lib.S6Error, match=r"^no runs yet: train some in 03, or set FOLDER$"):
            open_folder(name, tmp_path / folder)
    for run in ("plain/gbn/seed-1", "plain/l1-bn/seed-1"):
        shutil.copytree(tiny_study.folder / run, tmp_path / "one" / run)
    if name in ("05_replication", "09_methods"):  # which compare
        with pytest.raises(s6lib.S6Error, match=r"plain has too few runs to compare: .* two seeds or more"):
            open_folder(name, tmp_path / "one")


def test_nothing_is_trained_until_the_reader_says_so(monkeypatch):
    """In Colab, with a GPU, neither."""
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("s6lib.lab.launch.run_study", None)
    names = open_folder("03_study")
    assert (names["MODE"], names["FOLDER"]) == ("open", PROJECT / "results")


def test_notebooks_are_saved_as_readers_see_them_without_a_kernel(tmp_path):
    there = "import sys\nprint('all 5 runs are there', file=sys.stderr)"
    source = f"{there}\nimport ipywidgets\nprint(1)\nprint(2)\ndisplay(ipywidgets.VBox())"
    moves = "view = display(1, display_id=True)\nview.update(2)"
    cells = [new_code_cell(source, id="one"), new_code_cell(moves, id="two")]
    nbformat.write(new_notebook(cells=cells), path := tmp_path / "one.ipynb")
    execute(path)
    first, second = nbformat.read(path, as_version=4).cells
    assert [output.get("text") or output["data"] for output in first.outputs] == ["1\n2\n", {"text/plain": "VBox()"}]
    assert [output["data"] for output in second.outputs] == [{"text/plain": "2"}]  # as it was in the end
    saved = path.read_bytes()
    execute(path)  # twice changes nothing
    assert path.read_bytes() == saved


AGAIN = """\
first = study.summary().drop(columns="seconds")
(study.folder / "mine" / "groups" / "seed-2" / "run.json").unlink()  # as if it had been stopped
study = s6lib.run_study(mine, conditions, seeds=(1, 2), jobs=2)
assert study.summary().drop(columns="seconds").equals(first)
assert isinstance(study.model("groups", 1)[1], nn.GroupNorm)
comparisons = s6lib.statistics.paired_comparisons(study.outcomes())
print(len(study.runs), "runs in", study.folder, "and", len(comparisons), "comparisons")
"""


@pytest.mark.slow
def test_the_readmes_example_runs_in_a_cell_resumes_and_is_judged_and_edited_is_refused(tmp_path):
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "MyNet" in code]
    quick = example.replace("epochs=5", "epochs=1, train_images=640").replace("range(1, 11)", "(1, 2), jobs=2")
    edited = quick.replace("GroupNorm(2,", "GroupNorm(4,")
    notebook = new_notebook(cells=[new_code_cell(source) for source in (quick, AGAIN, edited)])
    client = NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    with pytest.raises(CellExecutionError, match=r"groups.* was trained with different settings: "):
        client.execute()
    assert "14 runs in runs and 21 comparisons" in colab.printed(notebook.cells[1])
