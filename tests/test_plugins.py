"""The suite beside other people's pytest plugins."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from conftest import bounded

from s6lib.data import PROJECT

PLUGIN = """
import warnings

def pytest_configure():
    warnings.warn("as pytest-benchmark does beside pytest-xdist")
"""
TESTS = """
import warnings

def test_quiet():
    pass

def test_warning():
    warnings.warn("in a test")
"""


@pytest.mark.slow
def test_a_plugin_may_warn_as_it_starts_and_a_test_may_not(tmp_path):
    (tmp_path / "tests").mkdir()
    shutil.copy(PROJECT / "pyproject.toml", tmp_path)
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path / "tests")
    (tmp_path / "tests" / "test_warnings.py").write_text(TESTS)
    (tmp_path / "a_plugin.py").write_text(PLUGIN)
    path = os.pathsep.join([str(tmp_path), str(PROJECT)])
    command = [sys.executable, "-m", "pytest", "-p", "a_plugin", "-p", "no:cacheprovider"]
    with bounded(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}) as process:
        output = process.stdout.read()
    assert "UserWarning: in a test" in output
    assert "1 failed, 1 passed" in output, output
