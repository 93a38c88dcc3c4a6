"""Results, the store, claims, and the one loop that makes what is missing, on makers that only pretend to work."""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import files_in
from helpers import Listener

import ipt
from intrinsic_prompt_tuning import results
from intrinsic_prompt_tuning.errors import IptError
from intrinsic_prompt_tuning.files import FILE_VERSION, read_file, write_file
from intrinsic_prompt_tuning.reporter import Reporter
from intrinsic_prompt_tuning.results import AfterStep, Claims, Cost, Made, Maker, Result, Store, make

FINGERPRINT = "f" * 64
HEADER = {
    "version": FILE_VERSION, "backbone": FINGERPRINT, "kind": "soft-prompt", "task": "mood-good", "data_seed": 100, "metric": "ACC",
    "data": "", "tuning": {}, "learning_rate": 0.1,
}  # fmt: skip
RECORD = {"validation": 0.5, "validation_loss": 1.0, "score": 0.5, "n": 3, "unit": 1.0}
PROMPT = {"soft_prompt": torch.arange(15.0).reshape(3, 5)}


def result(**changes: Any) -> Result:
    return Result(HEADER | changes)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "backbone", FINGERPRINT)


def save_one(store: Store, **changes: Any) -> Result:
    made = result(**changes)
    store.save(Made(made, RECORD, PROMPT))
    return made


class BarListener(Listener):
    """Keeps the bars, too."""

    def __init__(self) -> None:
        super().__init__()
        self.bars: list[tuple[str, float, list[float]]] = []

    @contextlib.contextmanager
    def progress(self, label: str, total: float) -> Iterator[Callable[[float], None]]:
        self.bars.append((label, total, []))
        yield self.bars[-1][2].append


# --- Result --------------------------------------------------------------------------------------


def test_a_result_is_named_by_its_header_alone() -> None:
    one = result()
    assert one.kind == "soft-prompt"
    assert one.name == Result(dict(reversed(HEADER.items())), ((one,),), Cost(1, 2, 3, 4)).name
    others = [result(task="count-next"), result(data_seed=21), result(more=None)]
    assert len({r.name for r in [one, *others]}) == 4


def test_the_names_of_a_choice_do_not_depend_on_its_order() -> None:
    choice = tuple(result(learning_rate=rate) for rate in (0.1, 0.3, 0.2))
    assert results.names(choice) == results.names(choice[::-1]) == sorted(r.name for r in choice)


# --- Store ---------------------------------------------------------------------------------------


def test_a_result_comes_back_as_it_was_saved(store: Store) -> None:
    saved = save_one(store)
    assert store.path(saved).relative_to(store.folder) == Path(f"soft-prompts/mood-good-{saved.name}.safetensors")
    record, tensors = store.read(result())
    assert (record, list(tensors)) == (RECORD, ["soft_prompt"])
    assert torch.equal(tensors["soft_prompt"], PROMPT["soft_prompt"])
    (found,), sentences = store.found("soft-prompt")
    assert (found.header, found.name, sentences) == (HEADER, saved.name, {})


def test_a_subspace_s_file_is_called_by_its_dim(store: Store) -> None:
    subspace = Result({"kind": "subspace", "dim": 6})
    assert store.path(subspace).relative_to(store.folder) == Path(f"subspaces/6-{subspace.name}.safetensors")


def test_what_is_missing_is_told_once_and_in_order(store: Store) -> None:
    save_one(store)
    wanted = [result(data_seed=21), result(), result(data_seed=13), result(data_seed=21)]
    assert [r.header["data_seed"] for r in store.missing(wanted)] == [21, 13]


def test_only_results_of_the_kind_are_found(store: Store) -> None:
    for seed, task in ((100, "mood-good"), (21, "mood-good"), (100, "count-next")):
        save_one(store, data_seed=seed, task=task)
    save_one(store, kind="score")
    found = [(r.header["task"], r.header["data_seed"]) for r in store.found("soft-prompt")[0]]
    assert sorted(found) == [("count-next", 100), ("mood-good", 21), ("mood-good", 100)]
    assert [r.kind for r in store.found("score")[0]] == ["score"]
    assert store.found("subspace") == ([], {})


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def of_version_1(path: Path) -> None:
    path.write_bytes(safetensors.torch.save(PROMPT, {"ipt": '{"header": {"version": 1}, "record": {}}'}))


def of_another_backbone(path: Path) -> None:
    write_file(path, HEADER | {"backbone": "0" * 64}, RECORD, PROMPT)


def of_another_kind(path: Path) -> None:
    write_file(path, HEADER | {"kind": "intrinsic-vector"}, RECORD, PROMPT)


def of_another_task(path: Path) -> None:
    write_file(path, HEADER | {"task": "animal-class"}, RECORD, PROMPT)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut_short, "is not a file of ipt, or is damaged .*: remove it"),
        (of_version_1, "has file version 1, expected 2: remove it"),
        (of_another_backbone, "was made with another backbone .00000000, expected ffffffff.: remove it"),
        (of_another_kind, "is not what its name says"),
        (of_another_task, "is not what its name says"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_and_the_others_are_found(
    store: Store, spoil: Callable[[Path], None], message: str
) -> None:
    good, bad = save_one(store, task="count-next"), save_one(store)
    path = store.path(bad)
    spoil(path)
    before = files_in(store.folder)
    found, unusable = store.found("soft-prompt")
    ((where, sentence),) = unusable.items()
    assert where == str(path)
    assert [r.name for r in found] == [good.name]
    assert sentence.startswith(str(path))
    assert re.search(message, sentence)
    assert files_in(store.folder) == before


def test_a_file_under_another_s_name_is_refused_when_it_is_read(store: Store) -> None:
    one, two = save_one(store), result(data_seed=21)
    store.path(two).write_bytes(store.path(one).read_bytes())
    with pytest.raises(IptError, match=rf"{two.name}\.safetensors is not what its name says: remove it"):
        store.read(two)


def test_a_result_that_is_not_there_is_named_when_it_is_read(store: Store) -> None:
    with pytest.raises(IptError, match=result().name):
        store.read(result())


def test_the_best_of_a_choice_has_the_highest_validation_score_and_among_equals_the_lowest_loss(store: Store) -> None:
    records = [(0.5, 1.0), (0.7, 2.0), (0.7, 1.5)]
    choice = tuple(result(learning_rate=n) for n in range(3))
    for one, (score, loss) in zip(choice, records, strict=True):
        store.save(Made(one, {"validation": score, "validation_loss": loss}, PROMPT))
    assert store.best(choice)[0] is store.best(choice[::-1])[0] is choice[2]
    assert store.best(choice[:2])[1] == {"validation": 0.7, "validation_loss": 2.0}
    assert store.best(choice[:1])[0] is choice[0]


def test_each_result_under_way_has_a_state_of_its_own(store: Store) -> None:
    one, two, three = (result(data_seed=seed) for seed in (1, 2, 3))
    store.save_unfinished({one: {"step": torch.tensor(4.0)}, two: {"step": torch.tensor(5.0)}})
    assert {path.name for path in store.folder.glob("*/*")} == {f"mood-good-{r.name}.unfinished" for r in (one, two)}
    assert [store.unfinished(r) for r in (one, two, three)] == [{"step": 4.0}, {"step": 5.0}, {}]
    store.save_unfinished({one: {"step": torch.tensor(6.0)}})
    assert [store.unfinished(r) for r in (one, two)] == [{"step": 6.0}, {"step": 5.0}]
    assert store.found("soft-prompt") == ([], {})
    assert len(store.missing([one, two, three])) == 3


def test_a_result_that_is_saved_needs_its_state_no_more(store: Store) -> None:
    store.save_unfinished({result(): {"step": torch.tensor(4.0)}})
    save_one(store)
    assert [path.suffix for path in store.folder.glob("*/*")] == [".safetensors"]


def test_a_state_that_is_damaged_or_another_s_is_no_state(store: Store) -> None:
    one, two = result(), result(data_seed=21)
    store.save_unfinished({one: {"step": torch.tensor(4.0)}, two: {"step": torch.tensor(5.0)}})
    state = store.path(one).with_suffix(".unfinished")
    whole = state.read_bytes()
    for content in (b"", b"half", whole[:-1], whole[:-1] + b"?", store.path(two).with_suffix(".unfinished").read_bytes()):
        state.write_bytes(content)
        assert store.unfinished(one) == {}
        assert store.unfinished(two) == {"step": 5.0}


# --- Claims --------------------------------------------------------------------------------------

HOLDER = """
import sys
from pathlib import Path
from intrinsic_prompt_tuning.results import Claims
claims = Claims(Path(sys.argv[1]))
print([name for name in sys.argv[2:] if claims.take(name)], flush=True)
sys.stdin.readline()
claims.give_back()
print("given back", flush=True)
"""


def taken(claims: Claims, *names: str) -> list[str]:
    """Return which names could be claimed."""
    return [name for name in names if claims.take(name)]


def python(program: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """Start another process that knows the package."""
    known = {"PYTHONPATH": str(Path(ipt.__file__).parent), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | known | environment,
    )  # fmt: skip


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Return another process that has claimed a and b."""
    process = python(HOLDER, tmp_path / "claims", "a", "b")
    assert process.stdout and process.stdout.readline() == "['a', 'b']\n"
    yield process
    process.kill()
    process.communicate()


def test_what_another_process_has_is_not_given(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    claims = Claims(tmp_path / "claims")
    assert taken(claims, "a", "c") == ["c"]
    claims.give_back()
    assert taken(claims, "b", "a") == []
    claims.give_back()
    assert holder.communicate("\n", timeout=60)[0] == "given back\n"
    assert not (tmp_path / "claims").exists()
    assert taken(claims, "b", "a") == ["b", "a"]
    claims.give_back()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_process_s_claims_are_free(tmp_path: Path, holder: subprocess.Popen[str], number: signal.Signals) -> None:
    claims = Claims(tmp_path / "claims")
    holder.send_signal(number)
    holder.wait(timeout=60)
    assert (tmp_path / "claims").exists()
    assert taken(claims, "a", "c") == ["a", "c"]
    claims.give_back()
    assert not list(tmp_path.iterdir())


def test_claims_that_nobody_could_see_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening the file and locking it, the last other process that had claims removes it."""
    claims, lock = Claims(tmp_path / "claims"), results.fcntl.lockf
    monkeypatch.setattr(results.fcntl, "lockf", lambda *arguments: ((tmp_path / "claims").unlink(), lock(*arguments)))
    assert not claims.take("a")
    monkeypatch.undo()
    assert claims.take("a")
    other = python(HOLDER, tmp_path / "claims", "a", "b")
    assert other.communicate("\n", timeout=60)[0] == "['b']\ngiven back\n"
    claims.give_back()
    assert not list(tmp_path.iterdir())


def test_of_two_that_give_back_at_once_one_removes_the_file(
    tmp_path: Path, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    claims, lock = Claims(tmp_path / "claims"), results.fcntl.lockf

    def lock_when_the_other_has_given_back(*arguments: Any) -> None:
        try:
            lock(*arguments)
        finally:
            if arguments[1] & results.fcntl.LOCK_EX:  # it is known by now whether others have claims
                assert holder.communicate("\n", timeout=60)[0].endswith("given back\n")

    assert claims.take("c")
    monkeypatch.setattr(results.fcntl, "lockf", lock_when_the_other_has_given_back)
    claims.give_back()
    assert not list(tmp_path.iterdir())


def test_who_gives_back_late_leaves_the_new_file_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claims, lock = Claims(tmp_path / "claims"), results.fcntl.lockf

    def lock_when_there_is_a_new_file(file: Any, kind: int) -> None:
        if kind & results.fcntl.LOCK_EX:
            (tmp_path / "claims").unlink()
            (tmp_path / "claims").touch()
        lock(file, kind)

    assert claims.take("a")
    monkeypatch.setattr(results.fcntl, "lockf", lock_when_there_is_a_new_file)
    claims.give_back()
    assert (tmp_path / "claims").exists()


CROWD = """
import sys, time
from pathlib import Path
from intrinsic_prompt_tuning.results import Claims
folder, end, claims, count = Path(sys.argv[1]), time.monotonic() + 2, Claims(Path(sys.argv[1], "claims")), 0
while time.monotonic() < end:
    for name in filter(claims.take, ["a", "b"]):
        with (folder / name).open("x"):  # fails if the other has it, too
            count += 1
        (folder / name).unlink()
    claims.give_back()
print(count > 0)
"""


def test_two_processes_never_claim_the_same(tmp_path: Path) -> None:
    others = [python(CROWD, tmp_path) for _ in range(2)]
    assert [other.communicate(timeout=60) for other in others] == [("True\n", "")] * 2
    assert not list(tmp_path.iterdir())


def test_where_claims_cannot_be_written_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(IptError, match=r"cannot write .*claims: .*; name another folder with --cache"):
        Claims(tmp_path / "file" / "claims").take("a")


def test_without_locks_everything_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, where two processes may do the same work."""
    monkeypatch.setattr(results, "fcntl", None)
    claims = Claims(tmp_path / "claims")
    assert taken(claims, "a", "b") == ["a", "b"]
    claims.give_back()
    assert not list(tmp_path.iterdir())


# --- Making --------------------------------------------------------------------------------------


class Bakery:
    """Makes rolls in four steps each, two at a time, and pies of them; remembers what it did."""

    def __init__(self, store: Store, stop_at: int = -1) -> None:
        self.store, self.stop_at = store, stop_at
        self.steps: list[tuple[str, int]] = []
        self.made: list[str] = []

    @property
    def makers(self) -> dict[str, Maker]:
        return {"roll": self.bake, "pie": self.fill}

    def bake(self, rolls: Iterator[Result], after_step: AfterStep) -> Iterator[Made]:
        while begun := list(itertools.islice(rolls, 2)):
            some = {r: int(self.store.unfinished(r).get("step", torch.tensor(0))) for r in begun}
            while some:
                for roll in some:
                    if len(self.steps) == self.stop_at:
                        raise KeyboardInterrupt
                    some[roll] += 1
                    self.steps.append((roll.header["task"], some[roll]))
                for roll in [roll for roll, step in some.items() if step == 4]:
                    del some[roll]
                    self.made.append(roll.header["task"])
                    yield Made(roll, {"steps": 4}, {"dough": torch.ones(2)})
                states = {roll: {"step": torch.tensor(float(step))} for roll, step in some.items()}
                after_step(lambda states=states: states, len(self.steps))

    def fill(self, pies: Iterator[Result], after_step: AfterStep) -> Iterator[Made]:
        for pie in pies:
            dough = [self.store.best(choice)[2]["dough"] for choice in pie.inputs]
            self.made.append(pie.header["task"])
            yield Made(pie, {"rolls": len(dough)}, {})
            after_step(dict, 1)

    def make(self, wanted: Sequence[Result], report: Reporter | None = None, **more: Any) -> None:
        make(self.store, wanted, self.makers, report or Reporter(), **more)


def roll(name: str, **more: Any) -> Result:
    return Result({**HEADER, "kind": "roll", "task": name, **more}, cost=Cost(10, 4, 1000, 8, steps=4))


def pie(name: str, *rolls: Result) -> Result:
    of = [results.names((one,)) for one in rolls]
    return Result({**HEADER, "kind": "pie", "task": name, "of": of}, tuple((one,) for one in rolls), Cost(0, 2, 30, steps=1))


ROLLS = [roll(name) for name in ("ann", "ben", "cid", "dan", "eve")]


def test_what_is_missing_is_made_and_nothing_twice(store: Store) -> None:
    save = Bakery(store)
    save.make([ROLLS[1]])
    bakery, report = Bakery(store), BarListener()
    bakery.make([*ROLLS[:3], ROLLS[0], ROLLS[2]], report)
    assert sorted(bakery.made) == ["ann", "cid"]
    assert report.sentences == ["plan: 2 rolls to make, 1 made before; at most 28 rows, 0.0 million tokens; 16 B of files"]
    again, report = Bakery(store), BarListener()
    before = {path: path.stat().st_mtime_ns for path in store.folder.rglob("*")}
    again.make(ROLLS[:3], report)
    assert again.made == [] and report.bars == []
    assert report.sentences == ["plan: 0 rolls to make, 3 made before"]
    assert {path: path.stat().st_mtime_ns for path in store.folder.rglob("*")} == before


def test_inputs_are_made_before_what_is_made_of_them(store: Store) -> None:
    bakery = Bakery(store)
    bakery.make([pie("apple", *ROLLS[:2]), *ROLLS[:2]])
    assert bakery.made == ["ann", "ben", "apple"]
    assert store.read(pie("apple", *ROLLS[:2])) == ({"rolls": 2}, {})


def test_results_of_one_stage_are_of_one_kind_one_space_and_one_configuration() -> None:
    wanted = [
        pie("apple"), roll("ann", tuning={"steps": 4}), roll("ben", tuning={"steps": 4}), roll("cid", tuning={"steps": 5}),
        roll("dan", tuning={"steps": 4}, subspace="s"), roll("ann", tuning={"steps": 4}), roll("eve", tuning={"steps": 4}, rate=2),
    ]  # fmt: skip
    stages = results.stages(wanted, ["roll", "pie"])
    assert [[r.header["task"] for r in stage] for stage in stages] == [["ann", "ben", "eve"], ["cid"], ["dan"], ["apple"]]


def test_progress_is_told_of_what_is_missing(store: Store) -> None:
    report = BarListener()
    Bakery(store).make([ROLLS[0]])
    Bakery(store).make(ROLLS[:3], report)
    ((label, total, told),) = report.bars
    assert (label, total) == ("rolls", 8)
    assert told == sorted(told) and told[-1] == total


def test_a_stage_in_a_space_is_called_by_it() -> None:
    vector = Result({"kind": "intrinsic-vector", "space": "linear", "dim": 4, "subspace": "s", "tuning": {}})
    assert results.label([vector]) == "intrinsic vectors (linear, dim 4)"
    score = Result({"kind": "score", "space": "linear", "dim": 4, "subspace": "s"})
    assert results.label([score]) == "scores"


def test_a_plan_tells_rows_tokens_and_megabytes_and_with_a_pace_minutes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    big = [Result({**HEADER, "kind": "roll", "task": name}, cost=Cost(6000, 1500, 9e6, 4e6)) for name in ("ann", "ben")]
    words = "plan: 2 rolls to make, 0 made before; at most 15,000 rows, 18.0 million tokens"
    assert results.plan(big, big, None) == (f"{words}; 8 MB of files", 0)
    text, seconds = results.plan(big, big, lambda missing: (0.1, 0.02))
    assert seconds == pytest.approx(2 * (6000 * 0.1 + 1500 * 0.02))
    assert text == f"{words}; 21 min 00 s by steps just measured; 8 MB of files"
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert results.plan(big, big, lambda missing: (0.1, 0.02))[1] == pytest.approx(seconds / 3)


def test_with_a_pace_only_the_plan_is_told_and_nothing_made(store: Store) -> None:
    bakery, report, asked = Bakery(store), BarListener(), []

    def pace(missing: Sequence[Result]) -> tuple[float, float]:
        asked.append(1)
        return 6.0, 15.0

    bakery.make([*ROLLS[:2], pie("apple", *ROLLS[:2])], report, pace=pace)
    assert not store.folder.exists() and not bakery.made and not report.bars
    assert [sentence.split(";")[-1] for sentence in report.sentences[1:]] == [
        " 30 s by steps just measured", " 4 min 30 s",
    ]  # fmt: skip
    assert report.sentences[-1] == "plan: all of it, if no job ends early; 4 min 30 s"
    Bakery(store).make([*ROLLS[:2], pie("apple", *ROLLS[:2])])
    asked.clear()
    bakery.make([*ROLLS[:2], pie("apple", *ROLLS[:2])], report, pace=pace)
    assert not asked, "no steps are measured where nothing is to do"


def test_what_was_done_before_a_mistake_is_kept_and_claimed_no_more(store: Store) -> None:
    def work(rolls: Iterator[Result], after_step: AfterStep) -> Iterator[Made]:
        yield Made(next(rolls), {}, {})
        raise IptError("no more flour")

    with pytest.raises(IptError, match="no more flour"):
        make(store, ROLLS, {"roll": work}, Reporter())
    assert len(store.missing(ROLLS)) == 4
    assert [path.parent.name for path in store.folder.rglob("*") if path.is_file()] == ["rolls"]


@pytest.mark.parametrize("stop_at", range(20))
def test_an_interruption_loses_nothing_but_the_step_that_was_under_way(store: Store, stop_at: int) -> None:
    stopped = Bakery(store, stop_at)
    with pytest.raises(KeyboardInterrupt):
        stopped.make(ROLLS)
    assert not store.claims.path.exists()
    resumed = Bakery(store)
    resumed.make(ROLLS)
    assert sorted(stopped.made + resumed.made) == ["ann", "ben", "cid", "dan", "eve"]
    assert stop_at <= len(stopped.steps + resumed.steps) - 1 and len(stopped.steps + resumed.steps) <= 21
    assert {path.suffix for path in store.folder.rglob("*") if path.is_file()} == {".safetensors"}


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("call", range(5))
def test_an_interruption_between_two_files_loses_none_and_leaves_no_state_of_what_is_done(
    store: Store, monkeypatch: pytest.MonkeyPatch, call: int, after: bool
) -> None:
    calls, save = iter(range(5)), Store.save

    def interrupted(self: Store, made: Made) -> None:
        stops = next(calls) == call
        if after or not stops:
            save(self, made)
        if stops:
            raise KeyboardInterrupt

    monkeypatch.setattr(Store, "save", interrupted)
    stopped = Bakery(store)
    with pytest.raises(KeyboardInterrupt):
        stopped.make(ROLLS)
    monkeypatch.undo()
    assert len(store.missing(ROLLS)) == 5 - call - after
    resumed = Bakery(store)
    resumed.make(ROLLS)
    assert len(stopped.steps + resumed.steps) <= 22
    assert {path.suffix for path in store.folder.rglob("*") if path.is_file()} == {".safetensors"}


def test_a_resumed_run_goes_on_at_the_newest_state(store: Store) -> None:
    for stop_at, first in ((2, 1), (4, 2), (1, 4)):
        bakery = Bakery(store, stop_at)
        with pytest.raises(KeyboardInterrupt):
            bakery.make(ROLLS[:2])
        assert bakery.steps[0] == ("ann", first)
    bakery = Bakery(store)
    bakery.make(ROLLS[:2])
    assert bakery.steps == [("ann", 4), ("ben", 4)]


def test_a_damaged_state_costs_only_itself(store: Store) -> None:
    with pytest.raises(KeyboardInterrupt):
        Bakery(store, 4).make(ROLLS)
    ann, ben = (store.path(one).with_suffix(".unfinished") for one in ROLLS[:2])
    assert ben.exists()
    ann.write_bytes(b"half")
    resumed = Bakery(store)
    resumed.make(ROLLS)
    assert [step for task, step in resumed.steps if task == "ann"] == [1, 2, 3, 4]
    assert [step for task, step in resumed.steps if task == "ben"] == [3, 4]
    assert {path.suffix for path in store.folder.rglob("*") if path.is_file()} == {".safetensors"}


def test_other_work_between_leaves_states_alone(store: Store) -> None:
    with pytest.raises(KeyboardInterrupt):
        Bakery(store, 4).make(ROLLS[:2])
    before = {name: content for name, content in files_in(store.folder).items() if name.endswith("unfinished")}
    assert len(before) == 2
    Bakery(store).make(ROLLS[2:])
    assert before.items() <= files_in(store.folder).items()


def test_states_are_saved_every_so_many_seconds_and_at_an_interruption_but_not_at_a_mistake(store: Store) -> None:
    told: list[float] = []

    def state() -> dict[Result, dict[str, torch.Tensor]]:
        return {ROLLS[0]: {"step": torch.tensor(1.0)}}

    with results.saving(store, told.append, every=0) as after_step:
        after_step(state, 3)
        assert store.unfinished(ROLLS[0]) == {"step": 1.0}
    with pytest.raises(IptError), results.saving(store, told.append) as after_step:
        after_step(lambda: {ROLLS[1]: {"step": torch.tensor(1.0)}}, 4)
        raise IptError("a mistake")
    assert store.unfinished(ROLLS[1]) == {}
    with pytest.raises(KeyboardInterrupt), results.saving(store, told.append) as after_step:
        after_step(lambda: {ROLLS[2]: {"step": torch.tensor(1.0)}}, 5)
        raise KeyboardInterrupt
    assert store.unfinished(ROLLS[2]) == {"step": 1.0}
    assert told == [3, 4, 5]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_makes_its_share_first_and_then_what_nobody_else_makes(
    store: Store, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    bakery = Bakery(store)
    bakery.make(ROLLS[:4])
    shares = [["ann", "cid"], ["ben", "dan"]]
    assert bakery.made[:2] == shares[rank] and sorted(bakery.made[2:]) == shares[1 - rank]


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_has_first_tries(store: Store, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    firsts = [roll("ann"), roll("ben")]
    pairs = [(one, Result(one.header | {"try": 1}, cost=one.cost, instead_of=(one,))) for one in firsts]
    bakery = Bakery(store)
    bakery.make([result for pair in pairs for result in pair])
    assert bakery.made[0] == ["ann", "ben"][rank]


def made_beside(
    store: Store, monkeypatch: pytest.MonkeyPatch, held: Sequence[Result], wanted: Sequence[Result]
) -> tuple[list[str], list[str]]:
    """Make results as the second of two ranks while another process holds some; return what it made before it waited, and all."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    other = python(HOLDER, store.claims.path, *(one.name for one in held), WORLD_SIZE="1")
    bakery, sleep, before_waiting = Bakery(store), time.sleep, list[str]()

    def waits(seconds: float) -> None:
        if seconds != 0.2:  # a process is waited for
            return sleep(seconds)
        before_waiting.extend(bakery.made)
        assert other.communicate("\n", timeout=60)[0].endswith("given back\n")

    store.folder.mkdir()
    try:
        assert other.stdout and len(other.stdout.readline().split()) == len(held)
        monkeypatch.setattr(results.time, "sleep", waits)
        bakery.make(wanted)
    finally:
        other.kill()
    return before_waiting, bakery.made


def test_a_rank_whose_share_another_process_makes_goes_on_with_the_rest_and_then_waits(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, takes = store.claims.take, list[str]()

    def counted(name: str) -> bool:
        takes.append(name)
        assert len(takes) < 20, "it spins"
        return take(name)

    monkeypatch.setattr(store.claims, "take", counted)
    before_waiting, made = made_beside(store, monkeypatch, ROLLS[1:4:2], ROLLS[:4])
    assert before_waiting == ["ann", "cid"]
    assert made == ["ann", "cid", "ben", "dan"]


def test_a_rank_does_not_wait_for_a_first_try_that_another_process_makes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer tasks than ranks, all but the first would else have nothing to do."""
    first = roll("ann")
    second = Result(first.header | {"try": 1}, cost=first.cost, instead_of=(first,))
    before_waiting, made = made_beside(store, monkeypatch, [first], [first, second])
    assert before_waiting == ["ann"] and len(made) == 2


def test_what_a_result_makes_needless_is_not_made(store: Store) -> None:
    first = roll("ann", learning_rate=0.3)
    second = Result(roll("ann", learning_rate=0.1).header, cost=first.cost, instead_of=(first,))
    made: list[float] = []

    def work(rolls: Iterator[Result], after_step: AfterStep) -> Iterator[Made]:
        for one in rolls:
            made.append(one.header["learning_rate"])
            yield Made(one, {"validation": solved}, {})

    for solved, expected in ((1.0, [0.3]), (0.9, [0.3, 0.1])):
        made.clear()
        fresh = Store(store.folder.with_name(f"solved {solved}"), FINGERPRINT)
        report = BarListener()
        make(fresh, [first, second], {"roll": work}, report)
        assert made == expected
        assert report.sentences[0].startswith("plan: 2 rolls to make, 0 made before; at most 28 rows")
        assert fresh.missing([first, second]) == []
        make(fresh, [first, second], {"roll": work}, report)
        assert made == expected
        assert fresh.best((first, second))[0] is first


WORKER = f"""
import sys, time
from pathlib import Path
from intrinsic_prompt_tuning.reporter import Reporter
from intrinsic_prompt_tuning.results import Cost, Made, Result, Store, make

folder, log, seconds, block = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
header = {HEADER!r}
wanted = [Result(header | {{"kind": "roll", "task": f"roll{{n}}"}}, cost=Cost(1)) for n in range(8)]

class Shell(Reporter):
    def say(self, text):
        print(text, flush=True)

def tell(what, result):
    with log.open("a") as file:
        file.write(f"{{what}} {{result.header['task']}}\\n")

def work(rolls, after_step):
    for one in rolls:
        tell("begin", one)
        time.sleep(600 if one.header["task"] == block else seconds)
        tell("end", one)
        yield Made(one, {{}}, {{}})

make(Store(folder, header["backbone"]), wanted, {{"roll": work}}, Shell())
"""


@pytest.mark.parametrize("ranks", [False, True])
def test_two_processes_never_make_the_same_result(store: Store, tmp_path: Path, ranks: bool) -> None:
    log = tmp_path / "log"
    environments = [{"WORLD_SIZE": "2", "RANK": str(rank)} if ranks else {} for rank in range(2)]
    processes = [python(WORKER, store.folder, log, 0.1, "", **environment) for environment in environments]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    lines = log.read_text(encoding="utf-8").splitlines()
    assert sorted(lines) == sorted(f"{what} roll{n}" for what in ("begin", "end") for n in range(8))
    assert [path.name for path in store.folder.iterdir()] == ["rolls"]
    assert len(list(store.folder.glob("rolls/*"))) == 8


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_a_killed_process_s_work_is_taken_over(store: Store, tmp_path: Path) -> None:
    log = tmp_path / "log"
    first = python(WORKER, store.folder, log, 0, "roll3")
    try:
        wait_for(lambda: log.exists() and "begin roll3" in log.read_text(encoding="utf-8"))
        second = python(WORKER, store.folder, log, 0, "")
        assert second.stdout
        assert second.stdout.readline().startswith("plan: 5 rolls to make, 3 made before")
        assert second.stdout.readline() == "waiting for another process, which makes 1 rolls\n"
        assert log.read_text(encoding="utf-8").count("end") == 7, "what the first has not begun is not waited for"
        assert second.poll() is None
    finally:
        first.kill()
        first.communicate()
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 0, errors
    lines = log.read_text(encoding="utf-8").splitlines()
    assert [lines.count(f"begin roll{n}") for n in range(8)] == [1, 1, 1, 2, 1, 1, 1, 1]
    assert [path.name for path in store.folder.iterdir()] == ["rolls"]
    assert len(list(store.folder.glob("rolls/*"))) == 8


# --- Files of earlier versions -------------------------------------------------------------------

OLD = Path(__file__).parent / "data"
VERSION_2 = {
    "soft-prompt": ("day-next-6300da45fd91ca15", {"soft_prompt": (1, 128)}, 24.0974883),
    "subspace": (
        "2-41b1f175a3bbb2de", {"in.bias": (2,), "in.weight": (2, 128), "out.bias": (128,), "out.weight": (128, 2)}, 8.8424488,
    ),
    "intrinsic-vector": ("day-next-5be8646d6dc1b0a3", {"intrinsic_vector": (2,)}, 0.0174149),
    "score": ("day-next-0825833e71b7c191", {}, 0.0),
}  # fmt: skip
"""What the first program of version 2 wrote: kind -> file, shapes, sum of all numbers."""


@pytest.mark.parametrize("kind", VERSION_2)
def test_a_file_that_version_2_wrote_is_read_as_it_was_or_refused_by_name(kind: str) -> None:
    name, shapes, total = VERSION_2[kind]
    path = OLD / "version-2" / f"{kind}s" / f"{name}.safetensors"
    if FILE_VERSION != 2:
        with pytest.raises(IptError, match=rf"{name}\.safetensors has file version 2, expected {FILE_VERSION}: remove it"):
            read_file(path)
        return
    header, record, tensors = read_file(path)
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == shapes
    assert sum(float(tensor.double().sum()) for tensor in tensors.values()) == pytest.approx(total, abs=1e-5)
    old = Store(OLD / "version-2", header["backbone"])
    (found,), unusable = old.found(kind)
    assert old.path(found) == path, "the same header has the same name"
    assert not unusable and old.missing([found]) == [] and old.read(found)[0] == record
    expected = {"soft-prompt": {"validation"}, "intrinsic-vector": {"validation"}, "subspace": {"unit"}, "score": {"score", "n"}}
    assert expected[kind] <= record.keys()


# --- Damaged scores ------------------------------------------------------------------------------


def test_a_damaged_score_is_missing_and_damaged_results_that_cost_more_are_not(store: Store) -> None:
    score, prompt = save_one(store, kind="score"), save_one(store)
    for damaged in (score, prompt):
        store.path(damaged).write_bytes(store.path(damaged).read_bytes()[:-1] + b"?")
    assert Store(store.folder, FINGERPRINT).missing([score, prompt]) == [score]
    with pytest.raises(IptError, match=r"damaged .*: remove it"):
        store.read(prompt)
    before = store.path(prompt).read_bytes()
    store.save(Made(score, RECORD, PROMPT))
    assert store.missing([score, prompt]) == [] and store.path(prompt).read_bytes() == before


def test_a_record_that_lacks_a_figure_is_refused_by_name_though_its_checksum_is_right(store: Store) -> None:
    for kind, lacking in (("score", "n"), ("subspace", "unit")):
        one = result(kind=kind)
        write_file(store.path(one), one.header, {name: value for name, value in RECORD.items() if name != lacking}, {})
        with pytest.raises(IptError, match=rf"lacks .*'{lacking}'.* in its record: remove it"):
            store.read(one)
        assert store.is_there(one) == (kind == "subspace")


def test_a_pipe_in_a_result_s_place_makes_nobody_wait(store: Store) -> None:
    one = result()
    store.path(one).parent.mkdir(parents=True)
    os.mkfifo(store.path(one))
    with pytest.raises(IptError, match="no plain file"):
        store.read(one)
    assert list(store.found("soft-prompt")[1]) == [str(store.path(one))]


# --- Links that somebody put into the cache ------------------------------------------------------


def test_nothing_is_written_through_a_link_in_the_cache(store: Store, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("precious", encoding="utf-8")
    one = result()
    path, claimed = store.path(one), store.claims.path
    for link in (path, path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}"), path.with_suffix(".unfinished"), claimed):
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(outside)
    assert store.unfinished(one) == {}
    assert store.claims.take(one.name)
    store.save_unfinished({one: {"step": torch.tensor(1.0)}})
    path.unlink()  # it is no result, but there
    store.save_unfinished({one: {"step": torch.tensor(1.0)}})
    save_one(store)
    store.claims.give_back()
    assert outside.read_text(encoding="utf-8") == "precious"
    assert [found.name for found in store.folder.rglob("*") if found.is_file()] == [path.name]
    assert not path.is_symlink() and store.read(one)[0] == RECORD


def test_states_are_saved_about_twice_a_minute(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses no more than that."""
    now, saved = 0.0, list[float]()
    monkeypatch.setattr(results.time, "monotonic", lambda: now)
    monkeypatch.setattr(Store, "save_unfinished", lambda store, states: saved.append(now))
    with results.saving(store, lambda done: None) as after_step:
        for second in range(100):
            now = float(second)
            after_step(dict, 0)
    assert saved == [31, 62, 93]


def test_what_another_process_has_just_made_is_not_made_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes its file, and gives its claim back, between our look for the file and our claim."""
    take, bakery = store.claims.take, Bakery(store)

    def late(name: str) -> bool:
        store.save(Made(ROLLS[0], {"steps": 4}, {"dough": torch.ones(2)}))
        return take(name)

    monkeypatch.setattr(store.claims, "take", late)
    bakery.make(ROLLS[:1])
    assert bakery.made == []
