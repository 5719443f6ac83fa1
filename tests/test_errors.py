"""What a notebook shows of an error that a user causes, and of Stop: one sentence, the last line on the screen."""

import re

import nbformat
import pytest
from jupyter_client import KernelManager
from nbclient import NotebookClient

CELL = """\
import s6lib
from torch import nn
class Net(nn.Sequential):
    def __init__(self, kernel=5):
        super().__init__(nn.Conv2d(1, 4, kernel, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
"""


REFUSALS = {
    "s6lib.Recipe('mine', Net, epochs=0)": "SettingError: epochs must be a whole number from 1, not 0",
    "s6lib.run_study(s6lib.Recipe('mine', network=Net()))": "SettingError: network must be .* give the class Net",
    "s6lib.run_study(s6lib.Recipe('mine', Net, shift=99), s6lib.CONTROL)": "SettingError: BN .*pixels of an image",
    "s6lib.run_study(conditions='gnb')": "StudyError: 'gnb' is no built-in condition",
    "s6lib.Study('nowhere')": "StudyError: no complete plain run",
    "class Slow(s6lib.Recipe): pass": "SettingError: Recipe cannot be subclassed",
}


def test_an_error_of_the_users_is_one_sentence():
    """In one kernel, since each takes seconds to start."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in (CELL, *REFUSALS)])
    NotebookClient(notebook, kernel_name="python3", allow_errors=True).execute()
    for cell, sentence in zip(notebook.cells[1:], REFUSALS.values(), strict=True):
        (error,) = [output for output in cell["outputs"] if output["output_type"] == "error"]
        assert cell["outputs"][-1] is error
        (line,) = error["traceback"]
        assert "\n" not in line
        assert re.match(sentence, line), line


STUDY = (
    CELL + "mine = s6lib.Recipe('mine', Net, epochs=99999, train_images=640)\n"
    "s6lib.run_study(mine, s6lib.CONTROL, (1, 2), {out!r}, jobs={jobs})"
)


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_stop_says_how_to_go_on(tmp_path, jobs):
    """Stop is pressed in a real kernel when the first epoch has ended; nothing else than the sentence is shown."""
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel()
    client = manager.client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=60)
        request = client.execute(STUDY.format(out=str(tmp_path), jobs=jobs))
        while not list(tmp_path.rglob("checkpoint.pt")):
            client.get_iopub_msg(timeout=120)  # a bar that moves
        manager.interrupt_kernel()
        shown = []
        while not shown or shown[-1]["msg_type"] != "status" or shown[-1]["content"]["execution_state"] != "idle":
            message = client.get_iopub_msg(timeout=60)
            if message["parent_header"].get("msg_id") == request:
                shown.append(message)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    (error,) = [message["content"] for message in shown if message["msg_type"] == "error"]
    assert error["traceback"] == ["Stopped: every finished epoch is kept: run the cell again to go on"]
    streams = "".join(message["content"]["text"] for message in shown if message["msg_type"] == "stream")
    assert "Traceback" not in streams
    assert "CANCELLED" not in streams
