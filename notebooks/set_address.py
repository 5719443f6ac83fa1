"""Point badges and first cells to the repository that this clone came from: `python notebooks/set_address.py`.

`python notebooks/set_address.py OWNER/NAME` points them to another one. The address is kept in pyproject.toml, under
[project.urls]. This rewrites it there, in FILES and in the notebooks.
"""

import re
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
FILES = ("pyproject.toml", "README.md", "CITATION.cff")


def read_address(project: Path = PROJECT) -> str:
    """Read OWNER/NAME from the remote "origin" of a clone. Raises ValueError if there is none on GitHub."""
    command = ["git", "-C", str(project), "remote", "get-url", "origin"]
    remote = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    found = re.search(r"github\.com[:/]([\w.-]+/[\w.-]+?)(?:\.git)?/?$", remote)
    if not found:
        raise ValueError(
            f"the remote origin of {project} is {remote or 'missing'}, and not a repository on github.com: give the "
            "address as OWNER/NAME"
        )
    return found[1]


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


def main(*arguments: str) -> None:
    if len(arguments) > 1:
        sys.exit("usage: python notebooks/set_address.py [OWNER/NAME]")
    try:
        changed = set_address(*arguments or [read_address()])
    except ValueError as error:
        sys.exit(str(error))
    for path in changed:
        print(path.relative_to(PROJECT))


if __name__ == "__main__":
    main(*sys.argv[1:])
