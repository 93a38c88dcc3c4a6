"""Attack the program and see what it loses.

    python tests/soak.py kill --kills 30                  # SIGKILL at random moments, one process
    python tests/soak.py kill --kills 1000 --processes 2  # two that share the work: both are killed, or one while the other goes on
    python tests/soak.py stop                             # SIGINT and SIGTERM in every stage, and closed pipes
    python tests/soak.py alike                            # how far scores depend on neighbours, pass sizes, processes
    python tests/soak.py jobs --count 10000               # memory, open files and time per job of a long run

`kill`: `ipt run` on three of the testbed's tasks, a few steps each, is killed at random moments and started again until it has
finished; again and again, until there were so many kills. Processes are forks of this one, which has imported everything, so that
they begin working within a second. Then
- the files must be those of an undisturbed run, byte for byte, and nothing else may lie there: no claims, no states, no half files;
- a log of all steps must show none done again that a checkpoint held, no work on what was done, and nothing made by two at once.
With several slots a killed run's passes hold other rows, which must change no bit.
"""

from __future__ import annotations

import argparse
import collections
import functools
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import torch

import ipt
from intrinsic_prompt_tuning import backbone, context, finding, load_backbone, load_tasks, makers, results, tuning
from intrinsic_prompt_tuning.experiment import Experiment
from intrinsic_prompt_tuning.files import read_file
from intrinsic_prompt_tuning.passes import Budget, first_budgets
from intrinsic_prompt_tuning.tasks import TASKS_FILE

SPLIT = "{seen: [day-next, object-small], unseen: [not-subject-person-and-object-small]}"
SETTINGS = ("--steps", "8", "--evaluations", "2", "--subspace-steps", "5", "--test-rows", "8", "--dim", "10")


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- What a process does, and the log of it ------------------------------------------------------


def name_of(result: results.Result) -> str:
    """Return what to call a result in the log: a space, of which a step knows no more, by its kind and dim."""
    return f"{result.header['space']}-{result.header['dim']}" if result.kind == "subspace" else result.name


def progress_in(state: Any) -> int:
    """Return how many steps, or answers of a score, a state holds."""
    return int(state["step"]) if "step" in state else len(json.loads(bytes(state["said"].tolist())))


def watch(log: int) -> None:
    """Write every step that begins, every state and every result that is kept, each in one write, which is never torn."""

    def tell(what: str, name: str, count: int = 0) -> None:
        os.write(log, f"{os.getpid()} {what} {name} {count}\n".encode())

    watch_steps(functools.partial(tell, "step"))
    save, save_unfinished = results.Store.save, results.Store.save_unfinished

    def saved(store: results.Store, made: results.Made) -> None:
        save(store, made)
        tell("done", name_of(made.result))

    def kept(store: results.Store, states: Any) -> None:
        for result, state in states.items():
            save_unfinished(store, {result: state})
            tell("kept", name_of(result), progress_in(state))

    results.Store.save, results.Store.save_unfinished = saved, kept  # type: ignore[method-assign]


def watch_steps(tell: Callable[[str, int], None]) -> None:
    """Tell of every step of a job or a subspace, and of every test row that is answered."""
    job_of, step, fit_step, unanswered = makers.job_of, tuning.step, finding._fit_step, makers._unanswered
    named = dict[tuning.Job, str]()

    def jobs(x: Any, result: results.Result, space: Any) -> tuning.Job:
        job = job_of(x, result, space)
        named[job] = name_of(result)
        return job

    def steps(*arguments: Any) -> None:
        for job, taken in zip(arguments[2].jobs, arguments[2].state["step"].tolist(), strict=True):
            tell(named[job], int(taken) + 1)
        step(*arguments)

    def fit_steps(*arguments: Any) -> None:
        tell(f"subspace-{arguments[1].space.dim}", arguments[1].step + 1)
        fit_step(*arguments)

    def answers(x: Any, scores: Any, said: Any) -> Iterator[Any]:
        begun = dict[Any, int]()
        for question in unanswered(x, scores, said):
            begun[question[0]] = begun.get(question[0], len(said[question[0]])) + 1
            tell(name_of(question[0]), begun[question[0]])
            yield question

    makers.job_of, tuning.step, finding._fit_step, makers._unanswered = jobs, steps, fit_steps, answers


def start(
    cache: Path, log: Path, slots: int, every: float, rank: int = 0, processes: int = 1, prepare: Callable[[], object] = dict
) -> int:
    """Run `ipt run` in a fork of this process, there after some preparation; return its number."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes)}
        written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(log.with_suffix(".err"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        watch(written)
        results.saving = functools.partial(results.saving, every=every)  # type: ignore[assignment]
        # Few rows are answered at a time.
        backbone.first_budgets = lambda *_: (Budget(1 << 10, by_block=True), Budget(1 << 8, by_block=True))
        split = ["--split", str(log.with_name("split.yaml")), "--processes", "1", "--slots", str(slots)]
        sys.argv = ["ipt", "run", *split, *SETTINGS, "--cache", str(cache)]
        prepare()
        ipt.main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        os._exit(code)


def repeated(log: list[str]) -> list[str]:
    """Return what a log shows of work that was done twice: of steps that a state or a result held, and of two processes at once."""
    kept, done, makers_of = collections.Counter[str](), set[str](), collections.defaultdict[str, list[str]](list)
    wrong = []
    for line in log:
        pid, what, name, count = line.split()
        if what == "step":
            if name in done or int(count) <= kept[name]:
                wrong.append(f"{line} (kept: {kept[name]}, done: {name in done})")
            if pid in makers_of[name][:-1]:
                wrong.append(f"{line} (also made by {makers_of[name][-1]} meanwhile)")
            if pid not in makers_of[name]:
                makers_of[name].append(pid)
        elif what == "kept":
            kept[name] = max(kept[name], int(count))
        else:
            done.add(name)
    return wrong


def on_disk(cache: Path) -> list[str]:
    """Return as lines of a log what the states and results on disk hold, which are whole whenever a process is killed."""
    lines = []
    for path in sorted(cache.glob("*/*s/*-*")):
        if path.suffix in (".unfinished", ".safetensors"):
            header, _, state = read_file(path)
            name = name_of(results.Result(header))
            lines.append(f"disk done {name} 0" if path.suffix == ".safetensors" else f"disk kept {name} {progress_in(state)}")
    return lines


# --- Killing -------------------------------------------------------------------------------------


def killed_at_random(begin: Callable[[int], int], log: Path, processes: int, rng: random.Random) -> tuple[int, bool]:
    """Start processes, kill each or all but one at random moments; return how many were killed, and whether all have finished."""
    size, since = log.stat().st_size, time.monotonic()
    running, kills, good = {begin(rank) for rank in range(processes)}, 0, True
    spared = rng.choice(sorted(running)) if processes > 1 and rng.random() < 0.1 else None  # it does all of the rest
    # Most after some of the work (bytes of the log), so that each gets somewhere however busy the machine is; some on the way to it.
    wanted = {pid: rng.choice((0, 2000, 4000)) * rng.random() for pid in sorted(running) if pid != spared}
    if rng.random() < 0.5:  # all at once, as when a machine goes down
        wanted = dict.fromkeys(wanted, next(iter(wanted.values())))
    later = rng.uniform(0, 0.03)
    while running:
        for pid in sorted(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            far = log.stat().st_size - size >= wanted.get(pid, float("inf"))
            if not ended and far and (wanted[pid] or time.monotonic() - since > later * 20):
                time.sleep(later)
                os.kill(pid, signal.SIGKILL)
                ended, status = os.waitpid(pid, 0)
                kills += os.WIFSIGNALED(status)
            if ended:
                running.discard(pid)
                good &= status == 0
                if os.WIFEXITED(status) and status:
                    raise SystemExit(f"a process failed: {log.with_suffix('.err').read_text(encoding='utf-8')[-2000:]}")
        time.sleep(0.002)
    return kills, good


def run_and_kill(cut: Path, log: Path, kills: int, processes: int, slots: int, rng: random.Random) -> int:
    """Start `ipt run` until it has finished, and kill it up to so many times; return how many times it was."""
    killed, finished = 0, False
    log.touch()
    while not finished:
        begin = functools.partial(start, cut, log, slots, rng.choice([0, 0.05, 0.3]))
        if killed < kills:
            more, finished = killed_at_random(functools.partial(begin, processes=processes), log, processes, rng)
            killed += more
        else:
            finished = os.waitpid(begin(0), 0)[1] == 0
        with log.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in on_disk(cut))
    return killed


def kill(kills: int, processes: int, slots: int, seed: int) -> int:
    """Return how many files and steps are not as they should be."""
    rng, wrong, killed, runs, compared = random.Random(seed), 0, 0, 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "split.yaml").write_text(SPLIT, encoding="utf-8")
        run_and_kill(folder / "whole", folder / "whole.log", 0, 1, slots, rng)
        expected = files_in(folder / "whole")
        print(f"undisturbed: {len(expected)} files", flush=True)
        while killed < kills:
            runs += 1
            cut, log = folder / f"cut{runs}", folder / f"cut{runs}.log"
            killed += run_and_kill(cut, log, min(kills - killed, 30), processes, slots, rng)
            found, lines = files_in(cut), log.read_text(encoding="utf-8").splitlines()
            odd = sorted(expected.keys() ^ found.keys())
            other = sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name])
            twice, steps = repeated(lines), sum(" step " in line for line in lines)
            compared += len(expected.keys() & found.keys())
            wrong += len(odd) + len(twice) + len(other)
            print(
                f"run {runs}: {killed} kills so far, {len(found)} files, {len(odd)} missing or left over {odd[:3]}, "
                f"{len(other)} differ {other[:3]}, {steps} steps, {len(twice)} of them wrong {twice[:3]}",
                flush=True,
            )
            shutil.rmtree(cut)
    print(f"in all: {killed} kills in {runs} runs of {processes} processes, {compared} files compared, {wrong} wrong", flush=True)
    return wrong


# --- Stopping ------------------------------------------------------------------------------------

STAGES = {
    "reading the tasks": (context, "find_tasks", 1),
    "loading the backbone": (backbone, "_load", 1),
    "checking the backbone": (backbone, "check_backbone", 1),
    "drawing rows": (Experiment, "sample", 2),
    "tuning prompts": (tuning, "step", 4),
    "validating": (tuning, "validate", 2),
    "waiting for another process": (results.time, "sleep", 2),
    "finding a subspace": (finding, "_fit_step", 90),
    "tuning vectors": (tuning, "step", 20),
    "scoring": (makers, "_answer_some", 3),
    "printing the table": (ipt, "make_report", 1),
}


def at_call(owner: Any, name: str, call: int, number: int, told: Path) -> None:
    """Send this process a signal when a function is called for the so-manieth time, and write down when that was."""
    original, calls = getattr(owner, name), itertools.count(1)

    def signalled(*arguments: Any, **named: Any) -> Any:
        if next(calls) == call:
            told.write_text(str(time.monotonic()), encoding="utf-8")
            os.kill(os.getpid(), number)
        return original(*arguments, **named)

    setattr(owner, name, signalled)


def into_closed_pipe() -> None:
    """Let nobody read what this process prints."""
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)
    os.dup2(writing, 2)


def stopped(cut: Path, log: Path, stage: str, number: signal.Signals) -> list[str]:
    """Stop `ipt run` by a signal in a stage; return what is wrong with how it ends."""
    told, err, other = log.with_suffix(".told"), log.with_suffix(".err"), 0
    for file in (told, err):
        file.unlink(missing_ok=True)
    if "waiting" in stage:
        other = start(cut, log, 1, 30, prepare=functools.partial(at_call, tuning, "step", 2, signal.SIGSTOP, told))
        os.waitpid(other, os.WUNTRACED)
    status = os.waitpid(start(cut, log, 1, 30, prepare=functools.partial(at_call, *STAGES[stage], number, told)), 0)[1]
    seconds = time.monotonic() - float(told.read_text(encoding="utf-8"))
    claims = not other and list(cut.glob("*/.claims"))
    if other:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
    said, code = err.read_text(encoding="utf-8"), os.waitstatus_to_exitcode(status)
    print(f"{number.name} while {stage}: exit code {code} after {seconds:.2f} s", flush=True)
    right = {
        "the code": code == 128 + number,
        "seconds": seconds < 5,
        "claims left": not claims,
        "a traceback": "Traceback" not in said,
    }
    right["what nobody had begun is not made"] = (
        "waiting" not in stage or len(list(cut.glob("*/soft-prompts/*.safetensors"))) == 2
    )
    right["no word on how to go on"] = said.endswith("stopped: what is done is kept, and the same command goes on from here\n")
    return [f"{number.name} while {stage}: {what}, {said[-500:]}" for what, good in right.items() if not good]


def shared(cut: Path, log: Path) -> list[str]:
    """Run the same command twice at once, the first held at its second step until the other waits; return what is wrong."""
    begin = functools.partial(start, cut, log, 1, 30)
    first = begin(prepare=functools.partial(at_call, tuning, "step", 2, signal.SIGSTOP, log.with_suffix(".told")))
    os.waitpid(first, os.WUNTRACED)
    second = begin()
    while "waiting for another process" not in log.with_suffix(".err").read_text(encoding="utf-8"):
        assert os.waitpid(second, os.WNOHANG) == (0, 0)
        time.sleep(0.01)
    os.kill(first, signal.SIGCONT)
    codes = [os.waitpid(pid, 0)[1] for pid in (first, second)]
    lines = log.read_text(encoding="utf-8").splitlines()
    made = {pid: {line.split()[2] for line in lines if line.startswith(f"{pid} done")} for pid in (first, second)}
    print(f"the same command twice at once: {len(made[first])} results made by the first, {len(made[second])} by the second")
    fair = len(made[first]) > 0 and len(made[second]) > 1 and not made[first] & made[second]
    return repeated(lines) + ([] if codes == [0, 0] and fair else [f"the same command twice at once: {codes}, {made}"])


def stops() -> int:
    """Stop `ipt run` in every stage by either signal, and go on; return how much is not as it should be."""
    with tempfile.TemporaryDirectory() as name:
        folder, wrong = Path(name), list[str]()
        (folder / "split.yaml").write_text(SPLIT, encoding="utf-8")
        status = os.waitpid(start(folder / "whole", folder / "whole.log", 1, 30, prepare=into_closed_pipe), 0)[1]
        wrong += [f"with nobody to read what is printed: {status}"] if status else []
        for stage in STAGES:
            for number in (signal.SIGINT, signal.SIGTERM):
                wrong += stopped(folder / "cut", folder / "cut.log", stage, number)
        assert os.waitpid(start(folder / "cut", folder / "cut.log", 1, 30), 0)[1] == 0
        wrong += shared(folder / "both", folder / "both.log")
        expected = files_in(folder / "whole")
        for found in (files_in(folder / "cut"), files_in(folder / "both")):
            wrong += [f"{name} differs" for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
        wrong += repeated((folder / "cut.log").read_text(encoding="utf-8").splitlines())
    print("\n".join([*wrong, f"in all: {2 * len(STAGES)} stops, {len(found)} files compared, {len(wrong)} wrong"]))
    return len(wrong)


# --- The same scores? ----------------------------------------------------------------------------

ALIKE = {
    "again": ((), None, 1),
    "4 slots": (("--slots", "4"), None, 1),
    "small passes": ((), (300, 500), 1),
    "large passes": ((), (4096, 8192), 1),
    "two processes": ((), None, 2),
}


def alike() -> int:
    """Run `ipt run --quick` with other neighbours, pass sizes and processes, and tell how far its scores differ: not at all."""

    def scores(
        cache: Path, more: Sequence[str] = (), budgets: tuple[int, int] | None = None, processes: int = 1
    ) -> dict[str, float]:
        def prepare() -> None:
            sys.argv = ["ipt", "run", "--quick", "--processes", "1", "--cache", str(cache), *more]
            backbone.first_budgets = (
                first_budgets if budgets is None else lambda *_: tuple(Budget(most, by_block=True) for most in budgets)
            )

        log = cache.with_suffix(".log")
        ranks = [start(cache, log, 16, 30, rank, processes, prepare) for rank in range(processes)]
        assert not any([os.waitpid(pid, 0)[1] for pid in ranks]), log.with_suffix(".err").read_text(encoding="utf-8")  # noqa: C419 (all are waited for)
        return {path.name: read_file(path)[1]["score"] for path in cache.glob("*/scores/*.safetensors")}

    with tempfile.TemporaryDirectory() as name:
        plain, wrong = scores(Path(name) / "plain"), 0
        for number, (what, varied) in enumerate(ALIKE.items()):
            found = scores(Path(name) / f"{number}", *varied)
            differences = [abs(found[score] - plain[score]) for score in plain]
            equal, mean = sum(one == 0 for one in differences), sum(differences) / len(plain)
            print(f"{what}: {equal} of {len(plain)} scores are the same, mean difference {mean:.3f}", flush=True)
            wrong += found != plain
    return wrong


# --- Many jobs -----------------------------------------------------------------------------------


def jobs(count: int) -> int:
    """Tune so many prompts, two steps each, by way of the store; return whether memory, open files or time per job grow."""
    told = []

    def save(store: results.Store, made: results.Made) -> None:
        original(store, made)
        done.append(made.result.name)
        if len(done) % (count // 10) == 0:
            pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
            megabytes, handles = pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(list(Path("/proc/self/fd").iterdir()))
            now = time.process_time()
            told.append((megabytes, handles, (now - since[-1]) * 1000 / (count // 10)))
            since.append(now)
            print(
                f"{len(done):>7} jobs: {megabytes:6.0f} MB, {handles} open files, {told[-1][2]:.1f} ms of processor a job",
                flush=True,
            )

    original, results.Store.save = results.Store.save, save  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "split.yaml").write_text(SPLIT, encoding="utf-8")
        about = {"cache": Path(name) / "cache", "split": str(Path(name) / "split.yaml"), "prompt_length": 8, "shots": 2}
        x = Experiment(about | {"test_rows": 2, "slots": 8, "steps": 2, "batch_size": 2, "evaluations": 1})
        prompts = [choice[0] for choice in x.soft_prompts(x.roles).values()]
        wanted = [results.Result({**prompt.header, "repeat": n}, cost=prompt.cost) for n in range(count) for prompt in prompts][
            :count
        ]
        done, since = list[str](), [time.process_time()]
        x.make(wanted)
        left = [path for path in files_in(x.store.folder) if not path.startswith("soft-prompts/")]
    first, last = told[1], told[-1]
    grown = last[0] > 1.05 * first[0] + 5 or last[1] > first[1] or last[2] > 1.5 * first[2]
    print(f"{len(set(done))} made, {len(left)} files left over, {'grown' if grown else 'flat'}")
    return grown + len(left) + (len(done) != len(wanted))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kill", "stop", "jobs", "alike"])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load_backbone("testbed")  # what is imported or read late is so now, once for all
    load_tasks(TASKS_FILE)
    attacks = {
        "kill": lambda: kill(arguments.kills, arguments.processes, arguments.slots, arguments.seed),
        "stop": stops,
        "alike": alike,
        "jobs": lambda: jobs(arguments.count),
    }
    raise SystemExit(bool(attacks[arguments.what]()))


if __name__ == "__main__":
    main()
