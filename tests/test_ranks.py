"""Two processes under torchrun: the same files as one process, and a rank that dies costs only its running jobs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import Result, files_in, run_ipt

import ipt
from intrinsic_prompt_tuning.errors import IptError
from intrinsic_prompt_tuning.ranks import n_cores, n_processes, run_in_processes

RUN = ("run", "--steps", 6, "--evaluations", 3, "--batch-size", 3, "--dim", 6, "--dim", 4, "--subspace-steps", 5)
DIES = """
import os, pathlib, time
import ipt
from intrinsic_prompt_tuning import tuning
validate, died = tuning.validate, pathlib.Path(__file__).with_name("died")
def dying(*arguments):
    validate(*arguments)
    if os.environ["RANK"] == "1" and arguments[2].state["step"].max() == 4:
        died.touch()
        os._exit(9)
    for _ in range(600):  # else rank 0, which waits for nobody, might do all before rank 1 has begun
        if os.environ["RANK"] == "1" or died.exists():
            break
        time.sleep(0.1)
tuning.validate = dying
ipt.main()
"""


def torchrun(program: list[str], arguments: list[object]) -> Result:
    """Run a program in two ranks on this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(ipt.__file__).parent)}
    done = subprocess.run(
        [*launcher, *program, *map(str, arguments)], capture_output=True, text=True, timeout=300, env=environment
    )
    return Result(done.returncode, done.stdout, done.stderr)


def tensors_in(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {name: safetensors.torch.load(content) for name, content in files_in(folder).items() if name.endswith(".safetensors")}


def test_two_ranks_leave_the_files_of_one_process(shared_options: list[object], tmp_path: Path) -> None:
    alone = run_ipt(*RUN, *shared_options, "--cache", tmp_path / "one")
    assert alone.code == 0, alone.err
    both = torchrun(["-m", "ipt"], [*RUN, *shared_options, "--cache", tmp_path / "two"])
    assert both.code == 0, both.err
    assert files_in(tmp_path / "one").keys() == files_in(tmp_path / "two").keys()
    for name, expected in tensors_in(tmp_path / "one").items():
        for key, tensor in tensors_in(tmp_path / "two")[name].items():
            torch.testing.assert_close(tensor, expected[key], rtol=2e-2, atol=2e-3)
    assert len(both.out.splitlines()) == len(alone.out.splitlines()), "the table is printed once"


def test_a_rank_that_dies_loses_only_its_running_jobs(shared_options: list[object], tmp_path: Path) -> None:
    driver, collect = tmp_path / "driver.py", ["collect", *RUN[1:7], "--slots", 2, *shared_options, "--cache", tmp_path / "cache"]
    driver.write_text(DIES, encoding="utf-8")
    assert torchrun([str(driver)], collect).code != 0
    before = {name: content for name, content in files_in(tmp_path / "cache").items() if name.endswith(".safetensors")}
    again = torchrun(["-m", "ipt"], collect)
    assert again.code == 0, again.err
    after = files_in(tmp_path / "cache")
    assert before.items() <= after.items(), "finished work is not done again"
    assert len([name for name in after if "soft-prompts" in name]) == 7, "nothing is left over"
    assert not [name for name in after if "unfinished" in name]


def in_processes(*arguments: object) -> Result:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, ipt.__file__, *map(str, arguments), "--processes", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    return Result(done.returncode, done.stdout, done.stderr)


def test_processes_share_a_command_without_torchrun(shared_options: list[object], tmp_path: Path) -> None:
    done = in_processes("collect", *RUN[1:7], *shared_options, "--cache", tmp_path)
    assert done.code == 0, done.err
    assert len(list(tmp_path.glob("*/soft-prompts/*"))) == 7


def test_more_processes_than_cores_are_refused() -> None:
    with pytest.raises(IptError, match=rf"--processes is 6400, and there are {n_cores()} cores to use"):
        run_in_processes(["never", "run"], 6400)


def test_a_process_that_says_more_than_a_pipe_holds_does_not_wait_for_ever() -> None:
    says = "import os, sys\nif os.environ['RANK'] == '1':\n    sys.stderr.write('x' * 300_000)\n    raise SystemExit(3)"
    code, told = run_in_processes([sys.executable, "-c", says], 2)
    assert code == 3 and told == "x" * 300_000


def test_a_mistake_is_told_once_for_all_processes(shared_options: list[object], tmp_path: Path) -> None:
    done = in_processes("collect", "--task", "mood-god", *shared_options, "--cache", tmp_path)
    assert done.code == 1
    assert [line for line in done.err.splitlines() if line] == [
        "error: there is no task 'mood-god'; did you mean 'mood-good'?; 'ipt tasks' lists them, --data adds your own"
    ]


def test_a_mistake_that_one_process_alone_meets_is_told_too(shared_options: list[object], tmp_path: Path) -> None:
    """One job diverges, and each process has its share of the jobs."""
    tasks = ("--task", "mood-good", "--task", "count-next")
    options = ("--learning-rate", 0.1, "--learning-rate", 1e39)
    done = in_processes("collect", *RUN[1:7], *tasks, *options, *shared_options, "--cache", tmp_path)
    assert done.code == 1
    assert "learning rate 1e+39) is nan by step" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("cores", "small", "count"), [(1, True, 1), (3, True, 3), (64, True, 4), (64, False, 1), (None, True, 1)]
)
def test_by_default_the_testbed_has_a_process_per_core(
    monkeypatch: pytest.MonkeyPatch, cores: int | None, small: bool, count: int
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert n_processes(small) == count


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system has no such limit")
def test_cores_that_a_process_may_not_use_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert n_processes(small=True) == 1


def test_a_process_that_the_system_ends_is_not_one_that_a_person_stopped() -> None:
    ends = "import os, time\nif os.environ['RANK'] == '1':\n    os.kill(os.getpid(), 9)\ntime.sleep(60)"
    code, told = run_in_processes([sys.executable, "-c", ends], 2)
    assert code == 137 and told.startswith("error: process 2 of 2 was ended by signal 9, as a system does")
    says = ends.replace("os.kill(os.getpid(), 9)", "os.write(2, b'no device\\n')\n    os.kill(os.getpid(), 6)")
    assert run_in_processes([sys.executable, "-c", says], 2) == (134, "no device\nerror: process 2 of 2 was ended by signal 6\n")
