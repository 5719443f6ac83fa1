"""Point badges and first cells to another repository: `python notebooks/set_address.py OWNER/NAME`.

The address is kept in pyproject.toml, under [project.urls]. This rewrites it there, in FILES and in the notebooks.
"""

import re
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
FILES = ("pyproject.toml", "README.md", "CITATION.cff")


def set_address(address: str, project: Path = PROJECT) -> list[Path]:
    """Replace the present OWNER/NAME by `address` and return the files changed. Raises ValueError for another form."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", address):
        raise ValueError(f"expected OWNER/NAME, as in github.com/OWNER/NAME, not {address!r}")
    present = re.search(r'repository = "https://github.com/([^"]+)"', (project / "pyproject.toml").read_text())[1]
    changed = []
    for path in (*(project / name for name in FILES), *sorted(project.glob("notebooks/*.ipynb"))):
        text = path.read_text(encoding="utf-8")
        # The whole name between slash and slash, quote or blank: OWNER/s6lib is not OWNER/s6lib-two.
        replaced = re.sub(rf"(?<=/){re.escape(present)}(?![\w.-])", address, text)
        if replaced != text:
            path.write_text(replaced, encoding="utf-8")
            changed.append(path)
    return changed


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python notebooks/set_address.py OWNER/NAME")
    for changed_path in set_address(sys.argv[1]):
        print(changed_path.relative_to(PROJECT))
