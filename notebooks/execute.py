"""Execute notebooks in place: `python notebooks/execute.py [NOTEBOOK ...]`, by default all of them."""

import os
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
RUNS_ARE_THERE = re.compile(r"(all [\d,]+ runs are|the run is) there\n")  # where runs are left from before
WIDGET = "application/vnd.jupyter.widget-view+json"


def execute(path: Path) -> None:
    """Run a notebook from top to bottom in its folder, and save it as readers see it who have not run it.

    Progress bars are off. A widget does not work without its kernel, so only its text is kept.
    """
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        resources=resources,
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
    )
    client.execute(env={**os.environ, "TQDM_DISABLE": "1"})
    notebook.metadata.pop("widgets", None)
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        output.get("data", {}).pop(WIDGET, None)
    for cell in notebook.cells:
        if outputs := cell.get("outputs"):
            cell.outputs = [one for one in outputs if not RUNS_ARE_THERE.fullmatch(one.get("text", ""))]
    path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for notebook_path in map(Path, sys.argv[1:] or sorted(FOLDER.glob("*.ipynb"))):
        execute(notebook_path.resolve())
        print(notebook_path.name)
