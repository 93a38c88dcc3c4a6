"""Results have a name before they exist.

A result is a file named by the digest of its header, and the header says all that it is a function of, other results by their
names. From that follow, each once: what is missing, what it will cost, going on where work was stopped, and sharing it among
processes.
"""

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from intrinsic_prompt_tuning.errors import IptError, damaged
from intrinsic_prompt_tuning.files import digest, read_file, write_file
from intrinsic_prompt_tuning.lazy import Tensor
from intrinsic_prompt_tuning.ranks import n_ranks, rank
from intrinsic_prompt_tuning.reporter import Reporter, duration, size
from intrinsic_prompt_tuning.tasks.checks import check

try:
    import fcntl
except ImportError:  # Windows: two processes may do the same work, and leave the same files
    fcntl = None  # type: ignore[assignment]

UNFINISHED = ".unfinished"
ABOUT: Any = {"task": str, "data_seed": int, "metric": str, "data": str}
TUNED: Any = ABOUT | {"tuning": dict[str, Any], "learning_rate": int | float}
VECTOR: Any = {"space": str, "dim": int, "start": str, "subspace": str}
SUBSPACE: Any = {"space": str, "dim": int, "prompts": dict[str, list[str]], "config": dict[str, Any], "free": int | float | None}
FIELDS = {"soft-prompt": TUNED, "intrinsic-vector": TUNED | VECTOR, "subspace": SUBSPACE}
"""Kind -> what a header holds beside what all headers do, and of which types."""
RECORDED = {"subspace": ("unit",), "score": ("score", "n")}
"""Kind -> what its record holds in any case."""


@dataclass(frozen=True)
class Cost:
    """What making results takes."""

    trained: float = 0
    """Rows that go through the backbone forward and backward."""
    answered: float = 0
    """Rows that go forward only."""
    tokens: float = 0
    """About how many tokens these rows are."""
    size: float = 0
    """Bytes of files."""
    steps: float = 0
    """What `AfterStep` counts: updates, or scores."""


@dataclass(frozen=True, eq=False)
class Result:
    """Something that is, or will be, a file of the cache."""

    header: dict[str, Any]
    """Kind, settings, names of the inputs: two results with equal headers are the same."""
    inputs: "tuple[Choice, ...]" = ()
    cost: Cost = Cost()
    instead_of: "Choice" = ()
    """Results that come first: this one is not needed if one of them answers all validation rows right."""
    name: str = field(init=False)

    def __post_init__(self) -> None:
        """Name it."""
        object.__setattr__(self, "name", digest(self.header))

    @property
    def kind(self) -> str:
        """What it is: soft-prompt, subspace, intrinsic-vector or score."""
        return str(self.header["kind"])


Choice = tuple[Result, ...]
"""Results of which the best by validation counts, such as those alike but for the learning rate: one, without a grid."""


def names(choice: Choice) -> list[str]:
    """Return what stands in the header of a result that is made of the best of these."""
    return sorted(result.name for result in choice)


def collection_name(choices: Iterable[Choice]) -> str:
    """Return a name for several choices: a collection of prompts."""
    return digest([names(choice) for choice in choices])


def by_validation(read: tuple[Result, Mapping[str, Any], Any]) -> tuple[float, float]:
    """Return how good a result that was read is by its record: by validation score, then by validation loss."""
    return read[1].get("validation", 0), -read[1].get("validation_loss", 0)


class Made(NamedTuple):
    """What a maker yields: a result that is done."""

    result: Result
    record: dict[str, Any]
    tensors: Mapping[str, Tensor]


class Claims:
    """Which process makes what: in an empty file, a living process locks a byte for each result that it makes."""

    def __init__(self, path: Path) -> None:
        """Lock bytes of the file at `path`, which is there as long as any process has claims."""
        self.path = path
        self._file: Any = None

    def take(self, name: str) -> bool:
        """Claim a result until all claims are given back, and tell whether no other living process has it."""
        if fcntl is None:
            return True
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self._file or self.path.open("ab")
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int(name[:15], 16))
            if self._is_current(file):  # else the last to have claims just removed it
                self._file = file
        except (BlockingIOError, FileNotFoundError):
            return False
        except OSError as error:
            raise IptError(f"cannot write {self.path}: {error.strerror or error}; name another folder with --cache") from error
        return self._file is file

    def give_back(self) -> None:
        """Forget what this process has claimed."""
        if self._file:
            fcntl.lockf(self._file, fcntl.LOCK_UN)  # first, or two that give back at once would each leave the file to the other
            with contextlib.suppress(OSError):  # others have claims
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_current(self._file):  # else another removed it, and there may be a new one
                    self.path.unlink()
            self._file.close()
            self._file = None

    def _is_current(self, file: Any) -> bool:
        """Return whether an open file is the one that others find; while this process has locks in it, it stays so."""
        return os.path.samestat(os.fstat(file.fileno()), self.path.stat())


class Store:
    """The files of one backbone. A result that is being made has its state beside it, under its own name."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        """Look into `folder`, for files of the backbone with this fingerprint."""
        self.folder, self.fingerprint = folder, fingerprint
        self.claims = Claims(folder / ".claims")
        self.before_save: Callable[[], None] = lambda: None
        self._solved, self._whole = dict[str, bool](), set[str]()
        self._headers: dict[tuple[Path, int], dict[str, Any]] = {}  # of files at a time, as reading a large one takes long

    def path(self, result: Result) -> Path:
        """Return where the file is or would be."""
        header = result.header
        return self.folder / f"{header['kind']}s" / f"{header.get('task', header.get('dim'))}-{result.name}.safetensors"

    def missing(self, results: Iterable[Result]) -> list[Result]:
        """Return which are needed and not there yet, each once."""
        absent = (result for result in {r.name: r for r in results}.values() if not self.is_there(result))
        return [result for result in absent if not any(self.is_solved(other) for other in result.instead_of)]

    def is_there(self, result: Result) -> bool:
        """Tell whether a file is there; a damaged score is not, as it costs little to make it anew."""
        if result.kind != "score" or result.name in self._whole:
            return self.path(result).exists()
        with contextlib.suppress(IptError):
            self.read(result)
            self._whole.add(result.name)
        return result.name in self._whole

    def is_solved(self, result: Result) -> bool:
        """Tell whether a result answers all validation rows right."""
        if result.name not in self._solved and self.path(result).exists():
            self._solved[result.name] = self.read(result)[0].get("validation") == 1
        return self._solved.get(result.name, False)

    def save(self, made: Made) -> None:
        """Write a file as a whole, and forget the state on the way to it."""
        self.before_save()
        path = self.path(made.result)
        write_file(path, made.result.header, made.record, made.tensors)
        path.with_suffix(UNFINISHED).unlink(missing_ok=True)

    def save_unfinished(self, states: Mapping[Result, Mapping[str, Tensor]]) -> None:
        """Write the states of results that are being made."""
        for result, state in states.items():
            if not self.path(result).exists():  # else it is done meanwhile
                write_file(self.path(result).with_suffix(UNFINISHED), result.header, {}, state)

    def unfinished(self, result: Result) -> Mapping[str, Tensor]:
        """Return the state at which making a result goes on; nothing at the beginning, or where the state is damaged."""
        with contextlib.suppress(IptError):
            header, _, state = read_file(self.path(result).with_suffix(UNFINISHED))
            if header == result.header:
                return state
        return {}

    def read(self, result: Result) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return record and tensors of a result.

        Raises:
            IptError: its file is not there, damaged, or of something else.
        """
        path = self.path(result)
        header, record, tensors = read_file(path)
        if header != result.header:
            raise damaged(path, "is not what its name says")
        if lacking := set(RECORDED.get(result.kind, ())) - record.keys():
            raise damaged(path, f"lacks {sorted(lacking)} in its record")
        return record, tensors

    def best(self, choice: Choice) -> tuple[Result, dict[str, Any], dict[str, Tensor]]:
        """Return the best of a choice by validation score, then by validation loss: itself, its record, its tensors."""
        read: list[tuple[Result, dict[str, Any], dict[str, Tensor]]] = []
        for result in sorted(choice, key=lambda it: (-it.header.get("learning_rate", 0), it.header.get("try", 0), it.name)):
            if not result.instead_of or self.path(result).exists():
                read.append((result, *self.read(result)))
            if read[-1][1].get("validation") == 1:
                break  # so that what is best depends on the names alone, whether or not the rest was made
        return max(read, key=by_validation)

    def complete(self, wanted: Sequence[str], made: Mapping[str, Result]) -> Choice:
        """Return the results of these names, of all that are made; none if one is gone that could be the best of them.

        Of a grid, what comes behind a rate that solves a task was never needed.
        """
        there = tuple(made[name] for name in wanted if name in made)
        return there if len(there) == len(wanted) or any(map(self.is_solved, there)) else ()

    def found(self, kind: str) -> tuple[list[Result], dict[str, str]]:
        """Return what the cache holds of a kind, ordered by file name, and of each file that cannot be used why."""
        results, unusable = list[Result](), dict[str, str]()
        for path in sorted((self.folder / f"{kind}s").glob("*.safetensors")):
            try:
                at = path, path.stat().st_mtime_ns if path.exists() else 0
                self._headers[at] = self._headers.get(at) or read_file(path)[0]
                result = Result(self._headers[at])
                if result.header.get("backbone") != self.fingerprint:
                    made_for = str(result.header.get("backbone"))[:8]
                    raise damaged(path, f"was made with another backbone ({made_for}, expected {self.fingerprint[:8]})")
                if result.header.get("kind") != kind or self.path(result) != path:
                    raise damaged(path, "is not what its name says, or is damaged")
                for name, hint in (ABOUT if "imported" in result.header else FIELDS.get(kind, {})).items():
                    check(result.header.get(name), hint, f"{path}: remove it; field '{name}' of its header")
                results.append(result)
            except IptError as error:
                unusable[str(path)] = str(error)
        return results, unusable


Snapshot = Callable[[], Mapping[Result, Mapping[str, Tensor]]]
AfterStep = Callable[[Snapshot, float], None]
"""Takes a way to read the states of what is under way, and how much is done."""
Maker = Callable[[Iterator[Result], AfterStep], Iterator[Made]]
"""Takes results as it begins them, which claims them one by one, and yields each as it is done."""
Pace = Callable[[Sequence[Result]], tuple[float, float]]
"""Returns seconds per row trained and per row answered, of such results."""


def make(
    store: Store, results: Iterable[Result], makers: Mapping[str, Maker], report: Reporter, *, pace: Pace | None = None
) -> None:
    """Make what the cache lacks, stage by stage; with a pace, only tell what that takes.

    Processes share the results of a stage, and go on to the next when all are there, whoever made them.

    Args:
        store: where results are.
        results: all that is wanted, inputs among it.
        makers: kind -> how its results are made, in the order in which they are.
        report: told of plans and progress.
        pace: measures how long rows take.
    """
    seconds = 0.0
    for stage in stages(results, list(makers)):
        missing = store.missing(stage)
        text, needed = plan(stage, missing, pace)
        report.say(text)
        seconds += needed
        if pace is None and missing:
            _make_stage(store, stage, makers[stage[0].kind], report)
    if seconds:
        report.say(f"plan: all of it, if no job ends early; {duration(seconds)}")


def stages(results: Iterable[Result], kinds: Sequence[str]) -> list[list[Result]]:
    """Return what is made together: results of one kind, when tuned also of one space and one configuration; each once.

    Prompts that start from those of a collection come after it.
    """
    found: dict[tuple[Any, ...], dict[str, Result]] = {}
    for result in sorted(results, key=lambda result: (kinds.index(result.kind), "collection" in result.header)):
        tuning = result.header.get("tuning")
        key = result.kind, digest([tuning, *map(result.header.get, ("subspace", "collection"))] if tuning else None)
        found.setdefault(key, {})[result.name] = result
    return [list(stage.values()) for stage in found.values()]


def label(stage: Sequence[Result]) -> str:
    """Return what to call results that are made together."""
    header = stage[0].header
    about = f" ({header['space']}, dim {header['dim']})" if "subspace" in header and "tuning" in header else ""
    about += " (from the nearest)" * (stage[0].kind == "soft-prompt" and header.get("start") == "nearest")
    return f"{stage[0].kind.replace('-', ' ')}s{about}"


def plan(stage: Sequence[Result], missing: Sequence[Result], pace: Pace | None) -> tuple[str, float]:
    """Return what is to do as a sentence, and in how many seconds, by a pace, where there is one."""
    cost, seconds = Cost(*map(sum, zip(*(astuple(result.cost) for result in missing), strict=True))), 0.0
    text = f"plan: {len(missing)} {label(stage)} to make, {len(stage) - len(missing)} made before"
    if rows := cost.trained + cost.answered:
        text += f"; at most {rows:,.0f} rows, {cost.tokens / 1e6:,.1f} million tokens"
    if rows and pace:
        per_trained, per_answered = pace(missing)
        seconds = (cost.trained * per_trained + cost.answered * per_answered) / n_ranks()
        text += f"; {duration(seconds)} by steps just measured"
    return text + (f"; {size(cost.size)} of files" if cost.size else ""), seconds


def _make_stage(store: Store, stage: Sequence[Result], maker: Maker, report: Reporter) -> None:
    """Make this process's share first; then whatever is missing and nobody alive is making, until nothing is missing."""
    # A share depends on names, not on what is missing: ranks need not agree, and share alike after an interruption.
    ordered = sorted(stage, key=lambda result: len(result.instead_of))  # so that each has as many that need not wait for others
    share, waits = {result.name for result in ordered[rank() :: n_ranks()]}, False
    while missing := store.missing(ordered):
        mine = [result for result in missing if result.name in share] or missing
        absent = {result.name for result in mine}  # what could make others needless comes first, but nobody waits for another
        todo = [result for result in mine if not any(other.name in absent for other in result.instead_of)]
        own = _claimed(store, todo)
        try:
            if first := next(own, None):
                with report.progress(label(stage), sum(r.cost.steps for r in todo)) as tell, saving(store, tell) as after_step:
                    for made in maker(itertools.chain((first,), own), after_step):
                        store.save(made)
                        report.log("made", file=str(store.path(made.result)), **made.record)
                        del made  # before the next one is made, as a subspace is large
        finally:
            store.claims.give_back()
        if not first and mine is missing:
            if not waits and n_ranks() == 1:
                report.say(f"waiting for another process, which makes {len(missing)} {label(stage)}")
            waits = True
            time.sleep(0.2)
        share = share if first else set()


def _claimed(store: Store, results: Iterable[Result]) -> Iterator[Result]:
    """Claim results as they are asked for, so that another process can have those that nobody has begun."""
    for result in results:  # another process may just have made it, and have given its claim back
        if not store.is_there(result) and store.claims.take(result.name) and not store.is_there(result):
            yield result


@contextlib.contextmanager
def saving(store: Store, advance: Callable[[float], None], every: float = 30) -> Iterator[AfterStep]:
    """Write the states of what is being made: every so many seconds, and when a person or a cluster stops it."""
    latest: Snapshot = dict
    saved = time.monotonic()

    def after_step(snapshot: Snapshot, done: float) -> None:
        nonlocal latest, saved
        latest = snapshot
        advance(done)
        if time.monotonic() - saved > every:
            store.save_unfinished(latest())
            saved = time.monotonic()

    try:
        yield after_step
    except KeyboardInterrupt:
        store.save_unfinished(latest())
        raise
