"""Run tests with the lowest or the newest packages that pyproject.toml allows, in a new virtual environment.

    python tests/versions.py lowest --torch 2.13.0
    python tests/versions.py newest --torch 2.13.0 tests/test_backbone.py

`--torch` keeps torch at one version, as each brings gigabytes where only builds for GPUs are to be had.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("files", "results", "tasks", "hub", "backbone", "causal", "tuning", "cli", "ranks")
TOOLS = ["pytest", "peft", "gguf"]


def requirements(end: str, torch: str | None) -> list[str]:
    """Return what to install: a range as it stands, or its lower end."""
    ranges = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    wanted = [re.sub(r">=([\d.]+).*", r"==\1", one) if end == "lowest" else one for one in ranges]
    return [f"torch=={torch}" if torch and one.startswith("torch") else one for one in wanted]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("end", choices=["lowest", "newest"])
    parser.add_argument("tests", nargs="*", default=[f"tests/test_{room}.py" for room in ROOMS])
    parser.add_argument("--torch")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder) / "bin" / "python")
        packages = requirements(arguments.end, arguments.torch)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *packages, *TOOLS], check=True)
        subprocess.run([*pip, "--no-deps", "--editable", str(ROOT)], check=True)
        names = [re.split(r"[=<>]", one)[0] for one in packages]
        told = f"from importlib.metadata import version\nprint(*(f'{{n}} {{version(n)}}' for n in {names}), sep=', ')"
        subprocess.run([python, "-c", told], check=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{folder}/bin:{os.environ['PATH']}"}
        environment.pop("PYTHONPATH", None)
        done = subprocess.run([python, "-m", "pytest", "-q", "-W", "ignore", *arguments.tests], cwd=ROOT, env=environment)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
