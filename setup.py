"""What pyproject.toml cannot say: the README as the package's description, and where the project is at home.

A release says where that is: ``AQT_LITE_HOME=https://host/owner/aqt_lite python -m build``. Then links to files lead
there, and so do the package's addresses, as GitHub's lie and those of hosts like it. Without it a link to a file
becomes its text, which names the file; the sdist has all of them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from setuptools import setup

README = Path(__file__).parent / "README.md"
LINK = re.compile(r"(!?)\[([^\]]+)\]\((?!https?:)([^)]*)\)")


def description(home: str) -> str:
    """The README with no link that leads to a file beside it."""

    def link(found: re.Match[str]) -> str:
        image, text, to = found.groups()
        if not home:
            return text
        return (
            f"{image}[{text}]({home}/{'raw' if image else 'blob'}/main/{'README.md' if to.startswith('#') else ''}{to})"
        )

    return LINK.sub(link, README.read_text(encoding="utf-8"))


def addresses(home: str) -> dict[str, str]:
    """The package's addresses, by the names that indexes know."""
    pages = {"Homepage": "", "Documentation": "/tree/main/docs", "Changelog": "/blob/main/CHANGELOG.md", "Source": ""}
    return {name: home + page for name, page in {**pages, "Issues": "/issues"}.items()} if home else {}


if __name__ == "__main__":
    home = os.environ.get("AQT_LITE_HOME", "")
    if (home and not re.fullmatch(r"https://[\w.-]+(:\d+)?(/[\w.~-]+){2,}/?", home)) or re.search(
        r"\.git/?$|/(tree|blob)/", home
    ):
        raise SystemExit(
            f"AQT_LITE_HOME={home!r} is no repository's page: use https://host/owner/name, without .git or a branch"
        )
    home = home.rstrip("/")
    setup(
        long_description=description(home),
        long_description_content_type="text/markdown",
        project_urls=addresses(home),
    )
