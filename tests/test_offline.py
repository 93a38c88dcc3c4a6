"""Nothing is fetched and nobody is told anything: whole commands in a process of their own, every socket and program noted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import ipt

NOTES = """
import os, sys
def note(event, arguments):
    if event.startswith(("socket.", "subprocess.", "os.exec", "os.posix_spawn", "os.system", "pickle.")):
        with open(os.environ["NOTES"], "a") as file:
            file.write(f"{event} {arguments!r}"[:300] + "\\n")
sys.addaudithook(note)
"""
"""Run by Python itself before any program."""
RUN = (
    "run", "--steps", "2", "--evaluations", "1", "--subspace-steps", "2", "--test-rows", "4", "--dim", "2", "--processes", "1",
    "--prompt-length", "1", "--shots", "2",
)  # fmt: skip


def noted(program: list[str], folder: Path) -> tuple[list[str], subprocess.CompletedProcess[str]]:
    """Run a program; return the sockets, programs and pickles that it asked the system for."""
    (folder / "sitecustomize.py").write_text(NOTES, encoding="utf-8")
    known = {"PYTHONPATH": os.pathsep.join([str(folder), str(Path(ipt.__file__).parent)]), "OMP_NUM_THREADS": "1"}
    environment = {k: v for k, v in os.environ.items() if "OFFLINE" not in k and "TELEMETRY" not in k} | known
    environment |= {"NOTES": str(folder / "notes"), "HF_HOME": str(folder / "hub")}
    done = subprocess.run([sys.executable, *program], capture_output=True, text=True, timeout=300, env=environment, check=False)
    notes = folder / "notes"
    return (notes.read_text(encoding="utf-8").splitlines() if notes.exists() else []), done


def test_a_whole_run_on_the_testbed_opens_no_socket_starts_no_program_and_reads_no_pickle(tmp_path: Path) -> None:
    (tmp_path / "few.yaml").write_text("{seen: [day-next, object-small], unseen: [not-subject-person]}", encoding="utf-8")
    options = ["--cache", str(tmp_path / "cache"), "--split", str(tmp_path / "few.yaml")]
    notes, done = noted([ipt.__file__, *RUN, *options], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "T_test(IST)" in done.stdout
    assert not notes
    assert not (tmp_path / "hub").exists()


def test_a_socket_would_be_noted(tmp_path: Path) -> None:
    program = "import socket\ntry: socket.create_connection(('127.0.0.1', 9), 1)\nexcept OSError: pass"
    notes, _ = noted(["-c", program], tmp_path)
    assert any(note.startswith("socket.connect") for note in notes)
