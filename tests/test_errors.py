"""What a notebook shows of an error that a user causes, and of Stop: one sentence, the last line on the screen."""

import re

import pytest
from jupyter_client import KernelManager

CELL = """\
import s6lib
from torch import nn
class Net(nn.Sequential):
    def __init__(self, kernel=5):
        super().__init__(nn.Conv2d(1, 4, kernel, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
mine = s6lib.Recipe('mine', Net, epochs=99999, train_images=640)
"""
REFUSALS = {
    "s6lib.Recipe('mine', Net, epochs=0)": "SettingError: epochs must be a whole number from 1, not 0",
    "s6lib.run_study(s6lib.Recipe('mine', network=Net()))": "SettingError: network must be .* give the class Net",
    "s6lib.run_study(s6lib.Recipe('mine', Net, shift=99), s6lib.CONTROL)": "SettingError: BN .*pixels of an image",
    "s6lib.run_study(conditions='gnb')": "StudyError: 'gnb' is ",
    "s6lib.Study('nowhere')": "StudyError: no recipe is named",
    "class Slow(s6lib.Recipe): pass": "SettingError: Recipe cannot be subclassed",
}


class Kernel:
    """A real kernel, since each takes seconds to start."""

    def __init__(self):
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel()
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def run(self, source, stop_when=lambda: False):
        """Run a cell, and press Stop when so asked; return the lines of its error, and all other text."""
        request, stopped, shown, text = self.client.execute(source), False, [], ""
        while True:
            message = self.client.get_iopub_msg(timeout=120)  # a bar that moves, for example
            if not stopped and stop_when():
                self.manager.interrupt_kernel()
                stopped = True
            if message["parent_header"].get("msg_id") != request:
                continue
            content = message["content"]
            shown += content["traceback"] if message["msg_type"] == "error" else []
            text += content["text"] if message["msg_type"] == "stream" else ""
            if content.get("execution_state") == "idle":
                return shown, text


@pytest.fixture(scope="module")
def kernel():
    kernel = Kernel()
    assert kernel.run(CELL) == ([], "")
    yield kernel
    kernel.client.stop_channels()
    kernel.manager.shutdown_kernel(now=True)


def test_an_error_of_the_users_is_one_sentence(kernel):
    for source, sentence in REFUSALS.items():
        (line,), text = kernel.run(source)
        assert "\n" not in line
        assert re.match(sentence, line), line
        assert not text


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_stop_says_how_to_go_on(kernel, tmp_path, jobs):
    """Stop is pressed when the first epoch has ended; nothing else than the sentence is shown."""
    study = f"s6lib.run_study(mine, s6lib.CONTROL, (1, 2), {str(tmp_path)!r}, jobs={jobs})"
    lines, text = kernel.run(study, stop_when=lambda: any(tmp_path.rglob("checkpoint.pt")))
    assert lines == ["Stopped: every finished epoch is kept: run the cell again to go on"]
    assert "Traceback" not in text
    assert "CANCELLED" not in text
