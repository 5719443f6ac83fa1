"""What `import s6lib` gives, and the drawing of its modules."""

import ast
import graphlib
import importlib
from pathlib import Path

import pytest

import s6lib

FOLDER = Path(s6lib.__file__).parent


def test_the_names_that_people_import_are_there():
    for name in s6lib.__all__:
        assert getattr(s6lib, name) is not None
    assert s6lib.statistics.paired_comparisons
    assert s6lib.__version__.count(".") == 2
    assert set(s6lib.__all__) <= set(dir(s6lib))
    assert (FOLDER / "py.typed").exists()
    with pytest.raises(AttributeError, match="has no attribute 'ghost'"):
        _ = s6lib.ghost


def name(path: Path) -> str:
    return ".".join(path.relative_to(FOLDER).with_suffix("").parts)


def imports(path: Path) -> set[str]:
    """The modules of s6lib that a module imports when it is itself imported."""
    nodes = ast.parse(path.read_text()).body
    found = [node for node in nodes if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("s6lib")]
    names = {alias.name for node in found if node.module == "s6lib" for alias in node.names}
    return names | {node.module.removeprefix("s6lib.") for node in found if node.module != "s6lib"}


def test_imports_point_one_way():
    drawing = {name(path): imports(path) for path in FOLDER.rglob("*.py") if path.stem != "__init__"}
    tuple(graphlib.TopologicalSorter(drawing).static_order())  # raises CycleError for a circle
    assert drawing["norm"] == drawing["statistics"] == drawing["errors"] == drawing["preregistered"] == set()
    assert not drawing["study"] & {"lab.launch", "lab.workers"}
    assert not {one for one in drawing["plots"] if one == "study" or one.startswith("lab.")}


def test_statistics_know_no_torch():
    source = Path(importlib.import_module("s6lib.statistics").__file__).read_text()
    assert "torch" not in {name.partition(".")[0] for name in imports_of_all(source)}


def test_torchvision_is_imported_only_where_it_is_needed():
    """It takes as long to import as torch does."""
    for path in FOLDER.rglob("*.py"):
        at_once = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert "torchvision" not in " ".join(map(ast.unparse, at_once)), path


def imports_of_all(source: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(source)))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
