"""The claims of the notebooks' texts are checked in the last code cell of each, for the published runs alone."""

import json

import checks
import pytest

from s6lib.data import PROJECT


def test_claims_that_do_not_hold_are_named_but_not_of_a_readers_own_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(checks, "CLAIMS", {"04_analysis": {"one is 1": lambda it: it.one == 1}})
    checks.check_claims("04_analysis", {"FOLDER": PROJECT / "results", "one": 1})
    assert capsys.readouterr().out == "1 claims of the text hold for the published runs\n"
    with pytest.raises(AssertionError, match="the text says: one is 1"):
        checks.check_claims("04_analysis", {"FOLDER": PROJECT / "results", "one": 2})
    checks.check_claims("04_analysis", {"FOLDER": str(tmp_path), "one": 2})
    assert capsys.readouterr().out == "The text is about the published runs; yours may differ.\n"


@pytest.mark.parametrize("name", checks.CLAIMS)
def test_a_notebook_with_claims_checks_them_once_all_is_computed(name):
    cells = json.loads((PROJECT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    last = "".join([cell for cell in cells if cell["cell_type"] == "code"][-1]["source"])
    assert f'check_claims("{name}", globals())' in last
