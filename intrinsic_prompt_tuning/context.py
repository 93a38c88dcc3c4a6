"""Options made real: the tasks of a split, their rows, the loaded backbone, the cache, and what the cache holds."""

import contextlib
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal, TypeVar

import yaml

from intrinsic_prompt_tuning.backbone import Backbone, Decoding, Encoded, Precision, load_backbone
from intrinsic_prompt_tuning.causal import PromptAt
from intrinsic_prompt_tuning.errors import IptError, UnreachableError, UnwritableError, damaged, nearest, short
from intrinsic_prompt_tuning.files import FILE_VERSION, digest, file_name, sweep, user_cache, write_bytes
from intrinsic_prompt_tuning.finding import SubspaceConfig
from intrinsic_prompt_tuning.lazy import Tensor, torch
from intrinsic_prompt_tuning.ranks import rank
from intrinsic_prompt_tuning.reporter import Reporter
from intrinsic_prompt_tuning.results import Choice, Result, Store
from intrinsic_prompt_tuning.settings import BEHIND, DATA, MACHINE, TESTBED, TESTBED_SETTINGS, TUNING, Setting, settled, versions
from intrinsic_prompt_tuning.spaces import Space
from intrinsic_prompt_tuning.tasks import TASKS_FILE, few_shot_files, find_tasks, kept, load_tasks, rows_digest, split_tasks
from intrinsic_prompt_tuning.tasks.examples import Example, Sample, Task
from intrinsic_prompt_tuning.tasks.tables import Kind
from intrinsic_prompt_tuning.tuning import TuneConfig

COLLECTION_SEED = 100
"""The data seed of the prompts that the subspace is made of, and of every baseline."""
Start = Literal["random", "seen", "nearest"]
T = TypeVar("T")
_rate = partial(list[float], (0.3,))
MOST_UNKNOWN = 0.2
"""The share of unknown tokens above which a task is said to be in another language than the backbone's."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What all commands share."""

    backbone: Annotated[str, Setting("Hub id, folder or .gguf file of a causal or encoder-decoder model.")] = TESTBED
    split: Annotated[str, Setting("Which tasks are seen and unseen: a name, or a YAML file.")] = "random"
    data: Annotated[Path | None, Setting("Your .csv, .tsv or .jsonl, or a folder of them, or of few-shot files.")] = None
    columns: Annotated[str, DATA("Of your tables: INPUT,ANSWER or INPUT,ANSWER,OPTIONS.", shown_default="by their names")] = ""
    kind: Annotated[Kind | None, DATA("Of your tables without options.", shown_default="by their rows")] = None
    tasks_file: Annotated[Path, DATA("Another tasks.yaml.", shown_default="the one that ships")] = TASKS_FILE
    cache: Annotated[Path | None, Setting("Folder of all results.", shown_default="$IPT_CACHE or the user's")] = None
    prompt_length: Annotated[int, TUNING("Tokens of a soft prompt.", least=1, most=100_000)] = 100
    initial_text: Annotated[
        str, TUNING("What prompts start from, repeated; '' for random words.", shown_default="random words")
    ] = ""
    shots: Annotated[int, DATA("Rows per label, or half the rows of a task without labels.", least=1, most=10_000)] = 16
    test_rows: Annotated[int, DATA("Test rows of a task, at most.", least=1, most=1_000_000)] = 1000
    max_length: Annotated[int, DATA("Tokens of prompt and input together, and of an answer.", least=8)] = 512
    decoding: Annotated[Decoding, DATA("options: the most likely option; generate: as CrossFit.")] = "options"
    precision: Annotated[Precision, MACHINE("Of the backbone; what learns is always fp32.")] = "auto"
    device: Annotated[str, MACHINE("auto, cpu, cuda, cuda:1 ...")] = "auto"
    prompt_at: Annotated[
        PromptAt | None, DATA("Where the prompt stands, seen from the input.", shown_default="end in causal models, else front")
    ] = None
    chat: Annotated[bool | None, DATA("Write rows by the chat template.", shown_default="if the tokenizer has one")] = None
    seed: Annotated[int, TUNING("Of the shared initial prompt, and of where vectors start.", least=0, most=2**32 - 1)] = 0
    slots: Annotated[int | None, MACHINE("Jobs tuned at once.", least=1, shown_default="four passes full, at least 16")] = None
    skip_missing: Annotated[bool, Setting("Do without tasks that cannot be had, and seen tasks without soft prompt.")] = False


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The grids of learning rates and tries, of which validation chooses per task."""

    learning_rate: Annotated[list[float], TUNING("Of prompts; repeat it: validation chooses.")] = field(default_factory=_rate)
    """In units of the embeddings."""
    vector_learning_rate: Annotated[list[float], TUNING("Of vectors; repeat it likewise.")] = field(default_factory=_rate)
    tries: Annotated[int, TUNING("At each rate, rows in another order; validation chooses.", least=1, most=100)] = 1

    def __post_init__(self) -> None:
        """Refuse what is no rate."""
        for flag, rates in (("--learning-rate", self.learning_rate), ("--vector-learning-rate", self.vector_learning_rate)):
            if wrong := [rate for rate in rates if not 0 < rate < math.inf]:
                raise IptError(f"{flag} is {wrong[0]}, expected a number above 0")


class Context:
    """A backbone, tasks and a cache: what the commands work on."""

    def __init__(self, given: Mapping[str, Any], report: Reporter | None = None) -> None:
        """Read tasks and split; the backbone is loaded, and rows are drawn, when they are asked for.

        Args:
            given: settings by name. For those that are missing, the testbed's hold, those behind the input, or the defaults.
            report: told what happens.

        Raises:
            IptError: a file of tasks or the split is wrong.
        """
        testbed = given.get("backbone") in (None, TESTBED) and not ((data := given.get("data")) and few_shot_files(data))
        known = {name: value for name, value in given.items() if value is not None}
        self.given: dict[str, Any] = (TESTBED_SETTINGS if testbed else {}) | known
        self.options, self.rates = settled(Options, self.given), settled(Rates, self.given)
        self.fitting, self.report = settled(SubspaceConfig, self.given), report or Reporter()
        options = self.options
        self.cache = options.cache or user_cache()
        """The folder of all results."""
        self.left_out: dict[str, str] = {}
        """Task or file -> why it could not be used."""
        self.told: tuple[str, Mapping[str, str]] | None = None
        """The command that this is for, and all its options."""
        known, own = find_tasks(options.tasks_file, options.data, options.columns, options.kind)
        self.tasks = known | own
        some = options.data and not own  # a folder of few-shot files has some of the tasks
        wanted = split_tasks(self.tasks | load_tasks(options.tasks_file) if some else self.tasks, options.split)
        self.roles = {task: role for task, role in wanted.items() if task in self.tasks}
        """The split's tasks and what they are in it: seen or unseen."""
        if absent := [task for task in wanted if task not in self.tasks]:
            names = ", ".join(absent[:5]) + " ..." * (len(absent) > 5)
            self.report.say(f"{options.data} lacks {len(absent)} of the split's {len(wanted)} tasks: {names}")
        if not self.roles:
            raise IptError(f"{options.data} has no task of the split {options.split}: list its own in a file, --split mine.yaml")
        if own and not own.keys() & self.roles.keys():  # the split's subspace, and one's own tasks as what it never saw
            self.roles = dict.fromkeys(self.named("seen"), "seen") | dict.fromkeys(own, "unseen")
        self.own = [task for task in own if task in self.roles]
        """The tasks of one's own tables, which are meant where none is named."""
        self.starts: dict[str, Tensor] = {}  # what start_prompt in a header stands for: (prompt_length, hidden)
        self._samples: dict[tuple[str, int], Sample] = {}
        self._encoded: dict[tuple[str, int], Sequence[list[Encoded]]] = {}
        self._spaces: dict[str, Space] = {}
        self._collections: dict[tuple[str, ...], Tensor] = {}
        self.nearest: dict[tuple[Any, ...], list[int]] = {}  # what `nearest_prompts` has found
        self._repeating, self._said, self._known_budgets = set[str](), set[str](), list[list[float]]()
        self._measured: tuple[float, float] | None = None

    def chosen(self, task: list[str] | None, seen: bool, unseen: bool) -> list[str]:
        """Return the tasks that options name; all of the split when they name none."""
        wanted = [role for role, asked in (("seen", seen), ("unseen", unseen)) if asked]
        found = list(dict.fromkeys([*(self.task(name).name for name in task or []), *self.named(*wanted)]))
        if wanted and not found:
            raise IptError(f"the split {self.options.split} has no {' and no '.join(wanted)} tasks: see 'ipt tasks'")
        return found or self.own or list(self.roles)

    def tell(self, command: str, flags: Mapping[str, str]) -> None:
        """Take a command, and settings -> its flags."""
        self.told = command, flags

    def keep_notes(self) -> None:
        """Write the file of options that reproduces the command, once, and what was found out about memory."""
        self.remember_budgets()
        if self.told:
            (command, flags), self.told = self.told, None
            groups = (self.placed(Options), self.tuning, self.fitting, self.rates)
            known = {f.name: value for g in groups for f in fields(g) if (value := getattr(g, f.name)) not in (None, TASKS_FILE)}
            known |= self.given
            options = {flag[2:]: known[name] for name, flag in flags.items() if name in known and flag.startswith("--")}
            plain = json.loads(json.dumps(options, default=str))
            text = f"# {versions()}\n# ipt {command} --config THIS_FILE\n{yaml.safe_dump({command: plain})}"
            write_bytes(self.cache / "commands" / f"{command}-{digest(plain)[:8]}.yaml", text.encode())

    @cached_property
    def backbone(self) -> Backbone:
        """The loaded backbone."""
        o = self.options
        return load_backbone(
            o.backbone, device=o.device, precision=o.precision, max_length=o.max_length, prompt_at=o.prompt_at, chat=o.chat
        )

    @cached_property
    def store(self) -> Store:
        """The cache's part for this backbone, and how much is known to fit into memory at once."""
        self.backbone.room(self.placed(Options).prompt_length)
        sweep(self.cache)
        o = self.options.backbone
        name = os.path.basename(os.path.abspath(o)) if Path(o).exists() else o  # noqa: PTH100, PTH119 (a link keeps its name)
        store = Store(self.cache / f"{file_name(name)}-{self.backbone.fingerprint[:8]}", self.backbone.fingerprint)
        store.before_save = self.keep_notes  # so that a killed command has left them beside its first result
        with contextlib.suppress(OSError, ValueError, TypeError, OverflowError, RecursionError):  # it is found out again
            numbers = json.loads(self._budget_file(store).read_bytes())
            both = zip((self.backbone.budget, self.backbone.answer_budget), numbers, strict=True)
            known = [replace(own, tokens=max(1, int(tokens)), most=float(most)) for own, (tokens, most) in both]
            self.backbone.budget, self.backbone.answer_budget = known
        self._known_budgets = _budgets(self.backbone)
        return store

    def _budget_file(self, store: Store) -> Path:
        device = self.backbone.device
        kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return store.folder / "budgets" / f"{file_name(f'{platform.node()}-{kind}')}.json"

    def remember_budgets(self) -> None:
        """Keep what was found out about how much fits into memory, for the next command on this machine."""
        file, found = self._budget_file(self.store), _budgets(self.backbone)
        if rank() == 0 and found != self._known_budgets:
            write_bytes(file, json.dumps(found).encode())
            self._known_budgets = found

    @cached_property
    def prompt_space(self) -> Space:
        """The space of whole soft prompts, around the initial prompt that all tasks share."""
        o = self.placed(Options)
        return Space(self.backbone.initial_prompt(o.prompt_length, o.seed, o.initial_text), self.backbone.embedding_rms)

    @property
    def tuning(self) -> TuneConfig:
        """How jobs are tuned."""
        return self.placed(TuneConfig)

    def placed(self, kind: type[T]) -> T:
        """Return settings, of which some have another default where the prompt stands behind the input."""
        return settled(kind, (BEHIND if self.backbone.prompt_at == "end" else {}) | self.given)

    def task(self, name: str) -> Task:
        """Return a task by name."""
        if name not in self.tasks:
            raise IptError(f"there is no task '{name}'{nearest(name, self.tasks)}; 'ipt tasks' lists them, --data adds your own")
        return self.tasks[name]

    def named(self, *roles: str) -> list[str]:
        """Return the split's tasks in these roles, seen or unseen, but for those left out."""
        return [task for task, role in self.roles.items() if role.split("-")[0] in roles and task not in self.left_out]

    def seen_tasks(self) -> list[str]:
        """Return the split's seen tasks, which make a subspace.

        Raises:
            IptError: it has none.
        """
        if found := self.named("seen"):
            return found
        raise IptError(f"the split {self.options.split} has no seen tasks to find a subspace with: see 'ipt tasks'")

    def with_rows(self, tasks: Iterable[str], data_seed: int) -> list[str]:
        """Return the tasks whose rows can be had.

        Raises:
            IptError: some cannot, and nobody asked for leaving them out.
        """
        _ = self.store  # a backbone that cannot be had is told before any data set is asked for
        failures, good = dict[str, str](), list[str]()
        for task in tasks:
            try:
                self.sample(task, data_seed)
                good.append(task)
            except IptError as error:
                if isinstance(error, UnwritableError) or (isinstance(error, UnreachableError) and not self.options.skip_missing):
                    raise  # it is nothing of this task's: the next would wait as long and fail alike
                failures[task] = str(error)
        if failures and not self.options.skip_missing:
            raise IptError(f"{len(failures)} tasks cannot be had, leave them out with --skip-missing: {_some(failures)}")
        self.leave_out(failures)
        return good

    def leave_out(self, reasons: Mapping[str, str]) -> None:
        """Say what is left out, and remember it for the end."""
        for why in reasons.values():
            self.say_once(f"left out: {why}")
        self.left_out.update(reasons)

    def say_once(self, text: str) -> None:
        """Tell what a command may find out several times."""
        if text not in self._said:
            self.report.say(text)
        self._said.add(text)

    def finish(self) -> None:
        """End with an error that lists what was left out, if anything was."""
        if self.left_out:
            raise IptError(f"{len(self.left_out)} were left out: {_some(self.left_out)}")

    def sample(self, task: str, data_seed: int) -> Sample:
        """Return a task's rows as text, drawn once on this machine."""
        if (task, data_seed) not in self._samples:
            if task in self.own and task not in {known for known, _ in self._samples}:
                about = self.task(task)
                self.report.say(f"{task}: {about.kind}, {about.metric}, {about.source}")
            source = kept(self.task(task), self.cache / "samples")
            sample = source.sample(data_seed, self.options.shots, self.options.test_rows)
            known = {row.input for row in (*sample.train, *sample.validation)}
            if (again := sum(row.input in known for row in sample.test)) and task not in self._repeating:
                self._repeating.add(task)
                where = f"train or validation (seed {data_seed})"
                self.report.say(f"{again} of {len(sample.test)} test rows of {task} are in {where}, too")
            self._samples[task, data_seed] = sample
        return self._samples[task, data_seed]

    def encoded(self, task: str, data_seed: int) -> Sequence[list[Encoded]]:
        """Return train, validation and test rows as tokens, made once.

        What is generated is at most twice as long as the longest reference of train and validation rows.
        """
        if (task, data_seed) not in self._encoded:
            sample, length = self.sample(task, data_seed), self.placed(Options).prompt_length
            known = self.backbone.encode([*sample.train, *sample.validation], prompt_length=length)
            limit = 2 * known[0].answer_limit
            made = [self.backbone.encode(rows, prompt_length=length, answer_limit=limit) for rows in sample]
            self._encoded[task, data_seed] = made
            if cut := sum(e.truncated for rows in made for e in rows):
                self.report.say(f"{cut} of {sum(map(len, sample))} rows of {task} are cut to {self.backbone.max_length} tokens")
            if alike := next((e for e in known if len({*map(tuple, e.option_ids)}) < len({*e.example.options})), None):
                told = f"some of the options {short(', '.join(alike.example.options), 100)} are the same tokens"
                self.report.say(f"{task}: {told} to {self.backbone.name}, which cannot tell them apart")
            tokens = [token for row in known for token in (*row.input_ids, *row.target_ids)]
            unknown = tokens.count(self.backbone.tokenizer.unk_token_id) / len(tokens)
            if unknown > MOST_UNKNOWN:
                share = f"{100 * unknown:.0f} % of the tokens of {task} are words"
                self.report.say(f"{share} that {self.backbone.name} does not know, so cannot read: name another --backbone")
        return self._encoded[task, data_seed]

    def answering(self, task: str, data_seed: int) -> dict[str, Any]:
        """Return what answers to a task's new inputs follow from: options that all rows share, tokens at most; how many rows."""
        sample, known = self.sample(task, data_seed), {row.options for row in self.sample(task, data_seed).train}
        limit, rows = self.encoded(task, data_seed)[2][0].answer_limit, [len(sample.train), len(sample.validation)]
        return {"options": list(known.pop()) if len(known) == 1 else [], "answer_limit": limit, "rows": rows}

    def row_tokens(self, rows: Sequence[Example]) -> float:
        """Return about how many tokens a row of these is, its prompt among them: English has some four letters a token."""
        return self.placed(Options).prompt_length + fmean(len(e.input) for e in rows) / 4

    def header(self, kind: str, **more: Any) -> dict[str, Any]:
        """Return the part that all headers share, and more."""
        of, o = self.backbone, self.placed(Options)
        shared = {"version": FILE_VERSION, "backbone": of.fingerprint, "precision": str(of.model.dtype).removeprefix("torch.")}
        shared |= {"prompt_at": of.prompt_at, "chat": of.layout.chat, "seed": o.seed, "prompt_length": o.prompt_length}
        shared |= {"decoding": o.decoding, "max_length": of.max_length, "kind": kind}
        # Where prompts start from random words, headers have no text, as those of older versions had none.
        return shared | ({"initial_text": o.initial_text} if o.initial_text else {}) | more

    def prompts(self, choices: Sequence[Choice]) -> Tensor:
        """Return soft prompts that were tuned: (tasks, prompt_length, hidden)."""
        key = tuple(result.name for choice in choices for result in choice)
        if key not in self._collections:  # every job of a stage may ask for the same one
            self._collections = {key: torch.stack([self.tuned(choice) for choice in choices])}
        return self._collections[key]

    def space(self, subspace: Result) -> Space:
        """Return a subspace that was made."""
        if subspace.name not in self._spaces:
            record, weights = self.store.read(subspace)
            on_device = {name: weight.to(self.backbone.device) for name, weight in weights.items()}
            space = Space(self.prompt_space.initial_prompt, record["unit"], on_device)
            if space.dim != subspace.header["dim"]:
                raise damaged(self.store.path(subspace), f"holds weights of dim {space.dim}, which its header denies")
            self._spaces = {subspace.name: space}  # one at a time: they are large
        return self._spaces[subspace.name]

    def tuned(self, choice: Choice) -> Tensor:
        """Return what the best of a choice, of soft prompts or of intrinsic vectors, comes to: (prompt_length, hidden)."""
        result, _, tensors = self.store.best(choice)
        is_prompt = result.kind == "soft-prompt"
        space = self.prompt_space if is_prompt else self.space(result.inputs[0][0])
        name, shape = ("soft_prompt", space.initial_prompt.shape) if is_prompt else ("intrinsic_vector", (space.dim,))
        found, expected = {key: tuple(tensor.shape) for key, tensor in tensors.items()}, {name: tuple(shape)}
        if found != expected or tensors[name].dtype != torch.float32 or not tensors[name].isfinite().all():
            raise damaged(self.store.path(result), f"holds the tensors {found}, expected {expected}, finite float32")
        tensor = tensors[name].to(self.backbone.device)
        return tensor if is_prompt else space.back_project(tensor[None])[0]


def _budgets(backbone: Backbone) -> list[list[float]]:
    """Return what a file remembers of how much fits into memory at once."""
    return [[budget.tokens, budget.most] for budget in (backbone.budget, backbone.answer_budget)]


def _some(reasons: Mapping[str, str]) -> str:
    """Return the first few sentences, and how many more there are."""
    more = f"; and {len(reasons) - 5} more" if len(reasons) > 5 else ""
    return "; ".join(list(reasons.values())[:5]) + more


def sample_digest(sample: Sample) -> str:
    """Return a name for a task's training and validation rows."""
    return digest([rows_digest(sample.train), rows_digest(sample.validation)])
