"""Single functions of a package's source, where importing their modules asks for far more than they use.

Owns: finding and compiling them. Imports: nothing of this project.
"""

from __future__ import annotations

import ast
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any


def definition(package: str, path: str, name: str, **names: Any) -> Callable[..., Any]:
    """A function, class, or method ("Class.method") of a file of an installed package, with the globals ``names``."""
    file = Path(str(importlib.metadata.distribution(package).locate_file(path)))
    found: Any = ast.parse(file.read_text(), str(file))
    for part in name.split("."):
        (found,) = (node for node in found.body if getattr(node, "name", None) == part)
    found.decorator_list = []
    exec(compile(ast.Module([found], []), str(file), "exec"), names)
    made: Callable[..., Any] = names[found.name]
    return made
