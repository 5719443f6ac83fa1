"""What a notebook shows of an error that a user causes, and of Stop: one sentence, the last line on the screen."""

import re

import pytest
from jupyter_client.manager import start_new_kernel

CELL = """\
import s6lib
from torch import nn
class Net(nn.Sequential):
    def __init__(self, kernel=5):
        super().__init__(nn.Conv2d(1, 4, kernel, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
mine = s6lib.Recipe('mine', Net, epochs=99999, train_images=640)
"""
REFUSALS = {
    "s6lib.run_study(s6lib.Recipe('mine', network=Net()))": "SettingError: network must be .* give the class Net",
    "s6lib.run_study(s6lib.Recipe('mine', Net, shift=99), s6lib.CONTROL)": "SettingError: BN .*pixels of an image",
    "s6lib.Study('nowhere')": "StudyError: no recipe is named",
    "class Slow(s6lib.Recipe): pass": "SettingError: Recipe cannot be subclassed",
}


@pytest.fixture(scope="module")
def run():
    """Runs a cell in a real kernel, and presses Stop when so asked; returns its error and what else is shown."""
    manager, client = start_new_kernel(kernel_name="python3")

    def run(source, stop_when=lambda: False):
        stopped, shown, text = False, [], ""

        def show(message):
            nonlocal stopped, shown, text
            if not stopped and stop_when():
                manager.interrupt_kernel()
                stopped = True
            shown += message["content"].get("traceback", [])
            text += message["content"].get("text", "")
            text += "widget" * ("application/vnd.jupyter.widget-view+json" in message["content"].get("data", ()))

        client.execute_interactive(source, output_hook=show, timeout=120)
        return shown, text

    assert run(CELL) == ([], "")
    yield run
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_an_error_of_the_users_is_one_sentence(run):
    for source, sentence in REFUSALS.items():
        (line,), text = run(source)
        assert re.fullmatch(f"{sentence}.*", line), line
        assert not text


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_stop_says_how_to_go_on(run, tmp_path, jobs):
    """Stop is pressed when the first epoch has ended; nothing else than a bar and the sentence is shown."""
    study = f"s6lib.run_study(mine, s6lib.CONTROL, (1, 2), {str(tmp_path)!r}, jobs={jobs})"
    lines, text = run(study, stop_when=lambda: any(tmp_path.rglob("checkpoint.pt")))
    assert lines == ["Stopped: every finished epoch is kept: run the cell again to go on"]
    assert text == "widget"
