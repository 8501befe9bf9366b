"""What pyproject.toml cannot say: the README as the package's description, with no link that leads to a file.

A link to a file becomes its text, which names the file; the sdist has all of them. Addresses stay links.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup

README = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")

setup(
    long_description=re.sub(r"!?\[([^\]]+)\]\((?!https?:)[^)]*\)", r"\1", README),
    long_description_content_type="text/markdown",
)
