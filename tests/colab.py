"""Run the notebooks in a stand-in for Colab: `python tests/colab.py PYTHON3.12 [NOTEBOOK ...]`, by default all.

It has Colab's versions (colab.txt), an empty folder for each notebook, a module google.colab, and GitHub's address
redirected to this checkout, so that its last commit is cloned. Every cell must print what is saved. The environment, of
some gigabytes, is made in the folder S6LIB_COLAB, by default build/colab, and kept.
"""

import difflib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

PROJECT = Path(__file__).resolve().parents[1]


def make_environment(folder: Path, python: str) -> Path:
    """Install what Colab brings, unless it is there already, and return the environment's Python."""
    inside = folder / "bin" / "python"
    if not (folder / "complete").exists():
        subprocess.run([python, "-m", "venv", folder], check=True)
        subprocess.run([inside, "-m", "pip", "install", "-q", "-r", PROJECT / "tests" / "colab.txt"], check=True)
        (folder / "complete").touch()
    return inside


def stand_in(folder: Path, python: Path | str) -> dict[str, str]:
    """Write what makes a kernel of `python` take itself for Colab, and return the variables that lead there."""
    startup = folder / "ipython" / "profile_default" / "startup"
    kernel = folder / "kernels" / "colab"
    for path in (startup, kernel, folder / "google" / "colab"):
        path.mkdir(parents=True, exist_ok=True)
    (folder / "google" / "colab" / "__init__.py").touch()
    (startup / "colab.py").write_text("import google.colab\n")
    command = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "Colab", "language": "python"}))
    address = re.search(r'repository = "([^"]+)"', (PROJECT / "pyproject.toml").read_text())[1]
    return {
        "JUPYTER_PATH": str(folder),
        "IPYTHONDIR": str(folder / "ipython"),
        "PYTHONPATH": str(folder),
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{PROJECT}.insteadOf",
        "GIT_CONFIG_VALUE_0": address,
    }


def run(notebook: NotebookNode, variables: dict[str, str]) -> NotebookNode:
    """A notebook as it comes out of the stand-in, in an empty folder. Raises CellExecutionError if a cell fails."""
    ran = nbformat.from_dict(notebook)
    # JUPYTER_PATH is read in this process, which starts the kernel.
    with tempfile.TemporaryDirectory() as empty, patch.dict(os.environ, variables):
        resources = {"metadata": {"path": empty}}
        NotebookClient(ran, kernel_name="colab", resources=resources).execute()
    return ran


def printed(cell: NotebookNode) -> str:
    """All text that a cell has printed or shown."""
    texts = [output.get("text") or output.get("data", {}).get("text/plain", "") + "\n" for output in cell.outputs]
    return "".join(texts)


def is_ignored(cell: NotebookNode | dict) -> bool:
    """Whether nbval runs a cell without comparing its output: a comment says so, or a tag, which readers do not see."""
    return "nbval-ignore-output" in cell["metadata"].get("tags", [])


def differences(saved: NotebookNode, ran: NotebookNode) -> tuple[int, list[str]]:
    """How many cells were compared, all but the first and those that nbval ignores, and what differs in them."""
    pairs = [pair for pair in zip(saved.cells, ran.cells, strict=True) if pair[0].cell_type == "code"][1:]
    pairs = [pair for pair in pairs if not is_ignored(pair[0])]
    lines = []
    for number, pair in enumerate(pairs, 1):
        names = (f"cell {number}, saved", f"cell {number}, here")
        lines += difflib.unified_diff(*(printed(cell).splitlines() for cell in pair), *names, lineterm="", n=1)
    return len(pairs), lines


def main(python: str, names: list[str]) -> int:
    """Run notebooks, each as on a machine of its own, and return how many came out differently."""
    environment = Path(os.environ.get("S6LIB_COLAB", PROJECT / "build" / "colab"))
    inside = make_environment(environment, python)
    failed = 0
    for path in map(Path, names or sorted((PROJECT / "notebooks").glob("*.ipynb"))):
        # What the first cell installs is gone with the machine.
        subprocess.run([inside, "-m", "pip", "uninstall", "-q", "-y", "s6lib", "loky"], check=True)
        saved = nbformat.read(path, as_version=4)
        try:
            with tempfile.TemporaryDirectory() as folder:
                count, lines = differences(saved, run(saved, stand_in(Path(folder), inside)))
        except CellExecutionError as error:
            count, lines = 0, str(error).splitlines()
        failed += bool(lines)
        outcome = "\n".join(["differs", *lines]) if lines else f"all {count} compared cells print what is saved"
        print(f"{path.stem}: {outcome}", flush=True)
    return failed


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python tests/colab.py PYTHON3.12 [NOTEBOOK ...]")
    sys.exit(min(main(sys.argv[1], sys.argv[2:]), 1))
