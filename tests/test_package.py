"""What `import s6lib` gives, and the drawing of its modules."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import s6lib

FOLDER = Path(s6lib.__file__).parent
SOURCES = {path.relative_to(FOLDER).with_suffix("").as_posix(): path.read_text() for path in FOLDER.rglob("*.py")}


def imports(module, everywhere=True):
    """The modules that a module imports: s6lib's as in SOURCES, such as lab/files, the others' first words."""
    tree = ast.parse(SOURCES[module])
    nodes = list(ast.walk(tree) if everywhere else tree.body)
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            of_package = node.module in ("s6lib", "s6lib.lab")
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if of_package else {node.module}
    inside = {name.removeprefix("s6lib.").replace(".", "/") for name in names if name.startswith("s6lib")}
    return inside & SOURCES.keys(), {name.partition(".")[0] for name in names}


def test_the_package_has_what_it_names():
    assert set(s6lib.__all__) <= set(dir(s6lib))
    assert s6lib.__version__.count(".") == 2
    assert (FOLDER / "py.typed").exists()
    with pytest.raises(AttributeError, match="has no attribute 'ghost'"):
        _ = s6lib.ghost


def test_modules_can_be_had_from_the_package_alone_and_figures_come_when_they_are_needed():
    code = "import sys, s6lib; s6lib.data.normalise; assert 'seaborn' not in sys.modules; s6lib.plots, s6lib.statistics"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_imports_point_one_way_and_those_that_take_seconds_come_where_they_are_needed():
    drawing = {module: imports(module)[0] for module in SOURCES if not module.endswith("__init__")}
    tuple(graphlib.TopologicalSorter(drawing).static_order())  # raises CycleError for a circle
    for alone in ("errors", "norm", "statistics", "preregistered", "preregistered_when"):
        assert drawing[alone] <= {"errors"}, alone
    lab = {module for module in drawing if module.startswith("lab/")}
    for lesson in ("data", "models", "train", "recipes"):
        assert not drawing[lesson] & {*lab, "study"}, lesson
    assert drawing["study"] & lab == {"lab/files", "lab/record", "lab/device"}
    assert not drawing["plots"] & lab
    assert {module for module in lab if drawing[module] & {"study", "analysis", "plots"}} == {"lab/launch"}
    assert not any("__main__" in imported for imported in drawing.values())
    assert "torch" not in imports("statistics")[1]
    for module in SOURCES:
        assert "torchvision" not in imports(module, everywhere=False)[1], module
