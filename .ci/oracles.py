"""Holds every dialect against its original, live on fresh random data, in an environment that has the originals.

    .venv/bin/python .ci/oracles.py [--seeds N] [--write] [name ...]

What it is given goes to tests/oracles/dialects.py, and where it names no dialect also to arrays.py beside it, and to
blocks.py, of which libraries.py writes the golden vectors. The environment is a directory of its own under
build/oracles, which sees the development set-up and holds the originals beside it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / "build" / "oracles"
REQUIREMENTS = ROOT / "tests" / "oracles" / "requirements.txt"


def prepared() -> Path:
    """The environment's Python, with the originals installed."""
    python, ready = HOME / "bin" / "python", HOME / "ready.txt"
    wanted = REQUIREMENTS.read_text() + sys.version
    if not ready.exists() or ready.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", HOME], check=True)
        ask = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
        site = Path(subprocess.check_output([python, "-c", ask], text=True).strip())
        (site / "development.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "-r", REQUIREMENTS], check=True)
        ready.write_text(wanted)
    return python


if __name__ == "__main__":
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    named = any(not argument.lstrip("-").isdigit() and not argument.startswith("-") for argument in sys.argv[1:])
    scripts = ("dialects.py", "arrays.py", "blocks.py")[: 1 if named else 2 if "--write" in sys.argv else 3]
    python, codes = prepared(), []
    for script in scripts:
        command = [python, "-W", "ignore", ROOT / "tests" / "oracles" / script, *sys.argv[1:]]
        codes.append(subprocess.run(command, env=environment, check=False).returncode)
    sys.exit(max(codes, key=abs))
