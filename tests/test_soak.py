"""What `soak.py` does at length, briefly: kills, stops and many jobs; and closed pipes, Ctrl-C in a terminal, the same bytes again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import files_in, run_ipt

import ipt
from intrinsic_prompt_tuning import backbone, finding
from intrinsic_prompt_tuning.files import LEFTOVER, read_file, sweep, write_bytes
from intrinsic_prompt_tuning.passes import Budget

SHORT = ("--steps", 6, "--evaluations", 3, "--batch-size", 3, "--subspace-steps", 5, "--dim", 6)


def soak(*arguments: object) -> str:
    command = [sys.executable, str(Path(__file__).with_name("soak.py")), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(Path(ipt.__file__).parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


def test_runs_that_are_killed_at_random_moments_leave_the_files_of_an_undisturbed_one_and_do_nothing_twice() -> None:
    assert re.fullmatch(r"in all: 15 kills in \d+ runs of 1 processes, \d+ files compared, 0 wrong", soak("kill", "--kills", 15))


def test_two_processes_that_are_killed_together_or_one_of_them_leave_the_same_files_too() -> None:
    told = soak("kill", "--kills", 4, "--processes", 2)
    assert re.fullmatch(r"in all: [45] kills in \d+ runs of 2 processes, \d+ files compared, 0 wrong", told)


def test_a_stop_in_any_stage_says_how_to_go_on_and_loses_nothing() -> None:
    assert re.fullmatch(r"in all: 22 stops, \d+ files compared, 0 wrong", soak("stop"))


def test_memory_open_files_and_time_per_job_stay_flat() -> None:
    assert soak("jobs", "--count", 320) == "320 made, 0 files left over, flat"


@pytest.mark.parametrize("command", ["tasks", "run --help", "--version"])
def test_a_closed_pipe_is_no_error(command: str) -> None:
    reader = subprocess.Popen(["head", "-c", "1"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    program = [sys.executable, ipt.__file__, *command.split()]
    assert reader.stdin
    writer = subprocess.Popen(program, stdout=reader.stdin, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    reader.kill()  # whatever is written, nobody reads it
    reader.wait()
    reader.stdin.close()
    _, told = writer.communicate(timeout=120)
    assert (writer.returncode, told) == (0, b"")


def holders(cache: Path) -> set[str]:
    """Return the processes that have claims, as the system knows them."""
    inodes = {str(path.stat().st_ino) for path in cache.glob("*/.claims")}
    locks = [line.split() for line in Path("/proc/locks").read_text(encoding="ascii").splitlines()]
    return {lock[4] for lock in locks if "->" not in lock and lock[5].rpartition(":")[2] in inodes}


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="the system does not tell who has locks")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_processes_of_one_command_that_are_stopped_save_what_is_under_way_and_say_so_once(
    shared_options: list[object], tmp_path: Path, number: signal.Signals
) -> None:
    """A terminal sends Ctrl-C to all of them, a cluster its signal to the first alone, which passes it on."""
    arguments = ["collect", *shared_options, "--steps", 100_000, "--slots", 2, "--cache", tmp_path, "--processes", 2]
    process = subprocess.Popen(
        [sys.executable, ipt.__file__, *map(str, arguments)], stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        while len(holders(tmp_path)) < 2:
            assert process.poll() is None
            time.sleep(0.1)
        time.sleep(1)
        begin = time.monotonic()
        os.killpg(process.pid, number) if number == signal.SIGINT else process.terminate()
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number, told
    assert time.monotonic() - begin < 20
    assert told.count("stopped: what is done is kept, and the same command goes on from here") == 1
    assert "Traceback" not in told
    assert len(list(tmp_path.glob("*/soft-prompts/*.unfinished"))) == 4, "each has two jobs at a time"
    assert not list(tmp_path.glob("*/.claims"))


def touched_long_ago(path: Path) -> None:
    path.touch()
    os.utime(path, (0, time.time() - 2 * LEFTOVER))


def test_what_a_killed_process_was_writing_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    write_bytes(tmp_path / "scores" / "whole", b"whole")
    writers = []
    for name in ("dead", "living"):
        writer = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        touched_long_ago(tmp_path / "scores" / f".{name}.{os.uname().nodename}-{writer.pid}")
        writers.append(writer)
    node = os.uname().nodename
    for where in ("elsewhere", f"{node}-2"):  # other machines, one of them named almost like this one
        touched_long_ago(tmp_path / "scores" / f".far.{where}-{writers[0].pid}")
    touched_long_ago(tmp_path / "scores" / f".odd.{node}-x")
    (tmp_path / "scores" / f".fresh.{node}-{writers[0].pid}").touch()  # of a process in another container, perhaps
    try:
        writers[0].kill()
        writers[0].wait()
        sweep(tmp_path)
        left = sorted(path.name.split(".")[1] if path.name[0] == "." else path.name for path in (tmp_path / "scores").iterdir())
        assert left == ["far", "far", "fresh", "living", "odd", "whole"]
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()


def test_what_another_person_s_process_is_writing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = tmp_path / f".whole.{os.uname().nodename}-1"
    touched_long_ago(half)

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "kill", refuse)
    sweep(tmp_path)
    assert half.exists()


def test_what_another_person_left_and_what_no_process_can_have_written_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [tmp_path / f".whole.{os.uname().nodename}-{number}" for number in (2**22 + 1, 10**30)]
    for path in left:
        touched_long_ago(path)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    sweep(tmp_path)
    assert all(path.exists() for path in left)


# --- Determinism ---------------------------------------------------------------------------------


def tensors_of(files: dict[str, bytes]) -> dict[str, torch.Tensor]:
    loaded = {name: safetensors.torch.load(content) for name, content in files.items() if name.endswith(".safetensors")}
    return {f"{name} {key}": tensor for name, tensors in loaded.items() for key, tensor in tensors.items()}


@pytest.fixture(scope="module")
def plain(shared_options: list[object], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], Any]:
    cache = tmp_path_factory.mktemp("plain")
    done = run_ipt("run", *SHORT, *shared_options, "--cache", cache, "--processes", 1, "--json")
    assert done.code == 0, done.err
    return files_in(cache), done


def test_the_same_command_gives_the_same_bytes_again(plain: Any, shared_options: list[object], tmp_path: Path) -> None:
    again = run_ipt("run", *SHORT, *shared_options, "--cache", tmp_path, "--processes", 1, "--json")
    assert files_in(tmp_path) == plain[0]
    assert again.out == plain[1].out


@pytest.mark.parametrize(("slots", "tokens"), [(None, (40, 40)), (1, (1024, 2048)), (3, (150, 90))])
def test_pass_sizes_and_neighbours_change_rounding_alone(
    plain: Any,
    shared_options: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    slots: int | None,
    tokens: tuple[int, int],
) -> None:
    monkeypatch.setattr(backbone, "first_budgets", lambda *_: tuple(map(Budget, tokens)))
    more = ("--slots", slots) if slots else ()
    done = run_ipt("run", *SHORT, *shared_options, "--cache", tmp_path, "--processes", 1, "--json", *more)
    assert done.code == 0, done.err
    found, expected = tensors_of(files_in(tmp_path)), tensors_of(plain[0])
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-3, msg=lambda told, name=name: f"{name}: {told}")
    assert done.out == plain[1].out, "every score is the same"


@pytest.mark.parametrize("damaged", [False, True])
def test_scoring_goes_on_with_the_row_at_which_it_was_stopped_and_a_damaged_state_costs_only_itself(
    plain: Any, shared_options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    for name, content in plain[0].items():
        if "/scores/" not in name:
            write_bytes(tmp_path / name, content)
    answered, answer = list[int](), backbone.Backbone.answer

    def counted(self: Any, prompts: Any, rows: Any, **more: Any) -> Any:
        if more.get("decoding", "") is None:  # looks for the nearest prompt
            return answer(self, prompts, rows, **more)
        if len(answered) == 4 and not stopped:
            stopped.append(True)
            signal.raise_signal(signal.SIGINT)
        answers = answer(self, prompts, rows, **more)
        answered.append(len(rows))
        return answers

    stopped = list[bool]()
    monkeypatch.setattr(backbone, "first_budgets", lambda *_: (Budget(100), Budget(20)))  # four passes: less than a score's rows
    monkeypatch.setattr(backbone.Backbone, "answer", counted)
    monkeypatch.setattr(backbone, "check_backbone", lambda loaded: None)
    command = ("eval", *shared_options, "--cache", tmp_path, "--processes", 1, "--json")
    assert run_ipt(*command).code == 130
    (state,) = tmp_path.glob("*/scores/*.unfinished")
    n_said = len(bytes(read_file(state)[2]["said"].tolist()).decode().split('", "'))
    assert 0 < n_said < 10
    if damaged:
        state.write_bytes(state.read_bytes()[:-1] + b"?")
    assert run_ipt(*command).code == 0
    scores = [name for name in plain[0] if "/scores/" in name]
    asked = sum(read_file(path)[0]["stage"] != "one answer for all" for path in tmp_path.glob("*/scores/*"))
    assert sum(answered) == 10 * asked + n_said * damaged, "no row is answered twice"
    left = files_in(tmp_path)
    assert {name: left.get(name) for name in scores} == {name: plain[0][name] for name in scores}


@pytest.mark.parametrize("damaged", [False, True])
def test_of_two_subspaces_the_one_that_was_stopped_goes_on_or_begins_anew_where_its_state_is_damaged(
    plain: Any, shared_options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    for name, content in plain[0].items():
        if "/soft-prompts/" in name:
            write_bytes(tmp_path / name, content)
    taken, step = list[tuple[int, int]](), finding._fit_step

    def counted(*arguments: Any) -> None:
        taken.append((arguments[1].dim, arguments[1].step))
        if len(taken) == 304:
            signal.raise_signal(signal.SIGINT)
        step(*arguments)

    monkeypatch.setattr(finding, "_fit_step", counted)
    fit = ("fit-subspace", "--dim", 5, "--dim", 3, "--subspace-steps", 4, *shared_options, "--cache", tmp_path, "--processes", 1)
    assert run_ipt(*fit).code == 130
    (state,) = tmp_path.glob("*/subspaces/*.unfinished")
    if damaged:
        state.write_bytes(b"half")
    assert run_ipt(*fit).code == 0
    assert taken[:304] == [(5, n) for n in range(204)] + [(3, n) for n in range(100)]
    assert taken[304:] == [(3, n) for n in range(0 if damaged else 99, 204)]
