"""Intrinsic Prompt Tuning: ~100 tuned soft prompts -> one small non-linear subspace -> new tasks by tuning 250 numbers.

    command            the paper's stage                  reads             writes
    ipt collect        prompt tuning                      tasks             soft prompts
    ipt fit-subspace   multi-task subspace finding, MSF   soft prompts      subspaces
    ipt tune           intrinsic subspace tuning, IST     subspaces, tasks  intrinsic vectors
    ipt eval           relative performance, E_rel        all of them       scores
    ipt run            all four

Paper: Qin et al., "Exploring Universal Intrinsic Task Subspace via Prompt Tuning", arXiv 2110.07867.
This is the command line; what it calls is in the package `intrinsic_prompt_tuning`, its rooms listed in README.md.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import inspect
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import wraps
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_type_hints

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from intrinsic_prompt_tuning.context import COLLECTION_SEED, Options, Rates, Start
from intrinsic_prompt_tuning.errors import IptError
from intrinsic_prompt_tuning.experiment import Experiment
from intrinsic_prompt_tuning.finding import SubspaceConfig
from intrinsic_prompt_tuning.ranks import n_processes, n_ranks, rank, run_in_processes
from intrinsic_prompt_tuning.report import make_report, report_text, wanted_scores
from intrinsic_prompt_tuning.results import Reporter, Result
from intrinsic_prompt_tuning.settings import TESTBED, TESTBED_SETTINGS, Setting
from intrinsic_prompt_tuning.spaces import SpaceKind
from intrinsic_prompt_tuning.tasks import CROSSFIT_SEEDS, load_tasks, missing_files, split_tasks, subsets
from intrinsic_prompt_tuning.tuning import TuneConfig
from intrinsic_prompt_tuning.using import Source, export_adapter, predict, tuned_prompts

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Intrinsic Prompt Tuning: many soft prompts, one small subspace, new tasks by tuning 250 numbers.",
)  # fmt: skip
STOPPED_BY: dict[int, float] = {}  # signals, and when they came
stderr = Console(stderr=True, highlight=False)

# --- Options -------------------------------------------------------------------------------------


def option(kind: type, name: str, flag: str = "") -> Any:
    """Return the annotation of an option for a dataclass field, None without a Setting; not giving it leaves the default."""
    value, setting, *_ = *get_args(get_type_hints(kind, include_extras=True)[name]), None, None
    if not isinstance(setting, Setting):
        return None
    default = getattr(kind(), name)
    flag = flag or f"--{(setting.name or name).replace('_', '-')}"
    names = [f"{flag}/--no-{flag[2:]}" if (value is bool and default) or value == (bool | None) else flag]
    shown = setting.shown_default or _shown(default, TESTBED_SETTINGS.get(name))
    told = typer.Option(*names, min=setting.least, max=setting.most, help=setting.help, show_default=shown)
    return Annotated[value if NoneType in get_args(value) else value | None, told]


def _shown(default: Any, on_testbed: Any) -> Any:
    """Return a default as help shows it; False where there is nothing to show."""

    def text(value: Any) -> str:
        return ", ".join(map(str, value)) if isinstance(value, list) else "on" if value is True else str(value)

    if on_testbed is not None:
        return f"{text(on_testbed)} on the testbed, else {text(default)}"
    return text(default) if default not in (None, False) else False


def with_options(*groups: type, in_processes: bool = True) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of dataclasses, and make the experiment, its first argument, of what was given.

    Args:
        groups: dataclasses; every field with a Setting is an option.
        in_processes: several processes can share the command's work.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        own = {name: p for name, p in inspect.signature(command).parameters.items() if name != "x"}
        parameters = [p.replace(kind=p.KEYWORD_ONLY, annotation=hints[name]) for name, p in own.items()]
        settings = {f.name: option(kind, f.name) for kind in groups for f in fields(kind) if f.name not in own}
        added = {name: annotation for name, annotation in settings.items() if annotation is not None}
        added |= {"processes": ProcessesOption} if in_processes else {}
        parameters += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=a) for name, a in added.items()
        ]

        @wraps(command)
        def expanded(**values: Any) -> None:
            small = values.get("backbone") in (None, TESTBED) and values.get("device") in (None, "auto", "cpu")
            count = values.pop("processes", None) or n_processes(small)
            if in_processes and n_ranks() == 1 and count > 1:
                try:
                    code, told = run_in_processes([sys.executable, __file__, *sys.argv[1:]], count)
                except KeyboardInterrupt:  # the first of them says how to go on
                    raise SystemExit(128 + next(iter(STOPPED_BY))) from None
                sys.stderr.write(told)
                raise SystemExit(code)
            if values.get("quick"):
                values |= {name: value for name, value in QUICK_SETTINGS.items() if values[name] is None}
            # `tune` has one rate, of whatever it tunes.
            values.setdefault("vector_learning_rate", values.get("learning_rate"))
            try:
                command(Experiment.of(values, Terminal()), **{name: values[name] for name in own})
            except KeyboardInterrupt:
                Terminal().say("stopped: what is done is kept, and the same command goes on from here")
                raise SystemExit(128 + next(iter(STOPPED_BY))) from None

        expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return expanded

    return decorate


DIM_HELP = "Intrinsic dimension; repeat it for more."
LEARNED_AND_RANDOM: tuple[SpaceKind, ...] = ("subspace", "random")
QUICK_SETTINGS = {"steps": 80, "subspace_steps": 50}
ProcessesOption = Annotated[
    int | None,
    typer.Option(min=1, max=64, help="Share the work.", show_default="one per core, at most 4, on the testbed, else 1"),
]
TaskOption = Annotated[list[str] | None, typer.Option(help="A task; repeat it for more.", show_default="all of the split")]
SeenOption = Annotated[bool, typer.Option("--seen", help="All seen tasks of the split.")]
UnseenOption = Annotated[bool, typer.Option("--unseen", help="All unseen tasks of the split.")]
DimOption = Annotated[list[int] | None, typer.Option(min=1, help=DIM_HELP, show_default="250")]
DataSeedOption = Annotated[int, typer.Option(min=0, help="Of the few-shot rows; on seen tasks, another than 100 is unseen data.")]
SpaceOption = Annotated[SpaceKind, typer.Option(help="Where to tune.")]
StartOption = Annotated[Start, typer.Option(help="random: N(0, 0.02); seen: from the distribution of the seen tasks' vectors.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done, and how long it would take.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
SourceOption = Annotated[Source, typer.Option("--from", help="What to use.")]
OneDimOption = Annotated[int | None, typer.Option(min=1, help="Intrinsic dimension of vectors.", show_default="any")]
WideOption = Annotated[bool, typer.Option("--wide", help="Print every column.")]

# --- Commands ------------------------------------------------------------------------------------
# A command is a signature, a line of help, and descriptions of results that are made.


def chosen(x: Experiment, task: list[str] | None, seen: bool, unseen: bool) -> list[str]:
    """Return the tasks that the options name; all of the split when they name none."""
    wanted = [role for role, asked in (("seen", seen), ("unseen", unseen)) if asked]
    found = list(dict.fromkeys([*(x.task(name).name for name in task or []), *x.named(*wanted)]))
    if wanted and not found:
        raise IptError(f"the split {x.options.split} has no {' and no '.join(wanted)} tasks; 'ipt tasks' lists what it has")
    return found or list(x.roles)


def flat(choices: Mapping[str, tuple[Result, ...]]) -> list[Result]:
    """Return all results of choices."""
    return [result for choice in choices.values() for result in choice]


@app.command()
@with_options(Options, TuneConfig)
def collect(
    x: Experiment, task: TaskOption = None, seen: SeenOption = False, unseen: UnseenOption = False,
    data_seed: DataSeedOption = COLLECTION_SEED, learning_rate: option(Rates, "learning_rate") = None,  # type: ignore[valid-type]
    dry_run: DryRunOption = False,
) -> None:  # fmt: skip
    """Tune a soft prompt for each task.

    Example: ipt collect --seen --learning-rate 0.1 --learning-rate 0.3
    """
    tasks, folder = chosen(x, task, seen, unseen), x.store.folder
    x.make(flat(x.soft_prompts(x.with_rows(tasks, data_seed), data_seed)), dry_run=dry_run)
    x.report.say(f"results: {folder}")
    x.finish()


@app.command("fit-subspace")
@with_options(Options, SubspaceConfig)
def fit_subspace(x: Experiment, dim: DimOption = None, dry_run: DryRunOption = False) -> None:
    """Find the subspace of the seen tasks' soft prompts.

    Example: ipt fit-subspace --dim 250 --dim 10
    """
    prompts = x.collected()
    subspaces = [x.subspace("subspace", one, prompts) for one in dim or [250]]
    x.make(subspaces, dry_run=dry_run)
    for subspace in () if dry_run else subspaces:
        x.report.say(f"subspace {subspace.name[:8]}: {x.store.path(subspace)}")
    x.finish()


@app.command()
@with_options(Options, TuneConfig)
def tune(
    x: Experiment, task: TaskOption = None, seen: SeenOption = False, unseen: UnseenOption = False, dim: DimOption = None,
    data_seed: DataSeedOption = COLLECTION_SEED, space: SpaceOption = "subspace", start: StartOption = "random",
    subspace: Annotated[str, typer.Option(help="The beginning of a subspace's name, where there are several of one dim.")] = "",
    learning_rate: option(Rates, "vector_learning_rate", "--learning-rate") = None,  # type: ignore[valid-type]
    dry_run: DryRunOption = False,
) -> None:  # fmt: skip
    """Tune an intrinsic vector for each task.

    Example: ipt tune --task day-next --dim 250 --data-seed 21
    """
    tasks = chosen(x, task, seen, unseen)
    if space == "prompt":
        wanted = flat(x.soft_prompts(x.with_rows(tasks, data_seed), data_seed))
    else:
        spaces = [x.choose_subspace(space, one, subspace) for one in dim or [250]]
        good = x.with_rows(tasks, data_seed)
        wanted = [result for found in spaces for result in flat(x.intrinsic_vectors(good, data_seed, found, start))]
        wanted += [found for found in spaces if space != "subspace"]
    x.make(wanted, dry_run=dry_run)
    x.report.say(f"results: {x.store.folder}")
    x.finish()


@app.command("eval")
@with_options(Options)
def evaluate(
    x: Experiment, per_task: Annotated[bool, typer.Option("--per-task", help="Also every task's scores.")] = False,
    wide: WideOption = False, as_json: JsonOption = False, dry_run: DryRunOption = False,
) -> None:  # fmt: skip
    """Score everything in the cache on the test rows, and print the paper's table.

    Example: ipt eval --per-task
    """
    scores = wanted_scores(x)
    x.make(scores, dry_run=dry_run)
    if not dry_run:
        print_report(make_report(x, scores), as_json, per_task=per_task, wide=wide)
    x.finish()


@app.command()
@with_options(Options, TuneConfig, SubspaceConfig, Rates)
def run(
    x: Experiment, dim: Annotated[list[int] | None, typer.Option(min=1, help=DIM_HELP, show_default="250 and 10")] = None,
    data_seed: Annotated[int, typer.Option(min=0, help="Of the seen tasks' other data.")] = 21,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer tasks and steps: the same code in about a minute.")] = False,
    wide: WideOption = False, as_json: JsonOption = False, dry_run: DryRunOption = False,
) -> None:  # fmt: skip
    """Do all of it: collect, fit-subspace, tune, eval. What has been done is not done again.

    Example: ipt run --quick
    """
    dims = dim or [250, 10]
    if quick:
        x.restrict(x.named("seen")[::8] + x.named("unseen")[::5])
    prompts = x.soft_prompts(x.with_rows(x.named("seen", "unseen"), COLLECTION_SEED))
    collection = {task: prompts[task] for task in x.with_rows(x.named("seen"), data_seed)}
    if not collection:
        raise IptError(f"the split {x.options.split} has no seen tasks to find a subspace with; 'ipt tasks' lists what it has")
    spaces = [x.subspace(kind, one, collection) for kind in LEARNED_AND_RANDOM for one in dims]
    spaces.append(x.subspace("low-rank", dims[0], collection))
    challenges = [(list(collection), data_seed), (x.named("unseen"), COLLECTION_SEED)]
    vectors = [choice for s in spaces for tasks, seed in challenges for choice in x.intrinsic_vectors(tasks, seed, s).values()]
    scores = x.scores(prompts, spaces, vectors)
    x.make([*flat(prompts), *spaces, *(result for choice in vectors for result in choice), *scores], dry_run=dry_run)
    if not dry_run:
        print_report(make_report(x, scores), as_json, per_task=False, wide=wide)
    x.finish()


@app.command("predict")
@with_options(Options, in_processes=False)
def predict_command(
    x: Experiment, task: Annotated[list[str], typer.Option(help="A task; repeat it when lines name theirs.")],
    input_file: Annotated[Path | None, typer.Option("--input", help="Lines to answer.", show_default="stdin")] = None,
    source: SourceOption = "best", dim: OneDimOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Answer new inputs, a line each, with what was tuned: text, or JSON objects with input, options, task.

    Example: ipt predict --task day-next --json
    """
    prompts = tuned_prompts(x, [x.task(name).name for name in task], source, dim)
    bad = 0
    with input_file.open(encoding="utf-8") if input_file else contextlib.nullcontext(sys.stdin) as lines:
        for found in predict(x, prompts, lines, task[0]):
            bad += bool(found.error)
            if found.error:
                x.report.say(f"not answered: {found.error}")
            elif as_json:
                fields = {"task": found.task, "input": found.input, "answer": found.answer, "options": found.options}
                echo(json.dumps({name: value for name, value in fields.items() if value is not None}, ensure_ascii=False))
            else:
                echo(found.answer)
    if bad:
        raise IptError(f"{bad} lines were not answered")


@app.command("export")
@with_options(Options, in_processes=False)
def export_command(
    x: Experiment, task: Annotated[str, typer.Option(help="A task.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    source: SourceOption = "best", dim: OneDimOption = None,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that is not empty.")] = False,
) -> None:  # fmt: skip
    """Write a tuned prompt as a folder that PEFT loads: a prompt-tuning adapter with a card.

    Example: ipt export --task day-next --out day-next
    """
    (prompt,) = tuned_prompts(x, [x.task(task).name], source, dim).values()
    export_adapter(x, prompt, out, force=force)
    x.report.say(f"adapter: {out}")


@app.command("tasks")
@with_options(Options, in_processes=False)
def tasks_command(
    x: Experiment, task: Annotated[list[str] | None, typer.Argument(help="Tasks.", show_default="all of the split")] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the few-shot sample as the backbone gets it.")] = False,
    data_seed: DataSeedOption = COLLECTION_SEED,
) -> None:  # fmt: skip
    """List tasks with kind, metric, role in the split and source; look at one.

    Example: ipt tasks day-next --show
    """
    names = [x.task(name).name for name in task or x.roles]
    if show:
        for name in names:
            show_task(x, name, data_seed)
        return
    row = "{:<52} {:<16} {:<20} {:<10} {}"
    echo(row.format("task", "kind", "metric", "role", "source"))
    for name in names:
        known = x.task(name)
        echo(row.format(name, known.kind, known.metric, x.roles.get(name, "-"), known.source).rstrip())
    if x.options.data and not task:
        wanted = split_tasks(load_tasks(x.options.tasks_file), x.options.split, subsets(x.options.tasks_file))
        for sentence in missing_files(x.options.data, x.tasks, wanted, CROSSFIT_SEEDS):
            x.report.say(sentence)


def show_task(x: Experiment, name: str, data_seed: int) -> None:
    """Print a task's rows as the backbone gets them, with their lengths in tokens."""
    for part, rows in zip(("train", "validation", "test"), x.encoded(name, data_seed), strict=True):
        echo(f"{name}, {part}: {len(rows)} rows, {sum(e.truncated for e in rows)} truncated")
        for e in rows[:8]:
            options = f"   options: {' | '.join(e.example.options)}" if e.example.options else ""
            text = x.backbone.tokenizer.decode(e.input_ids)
            echo(f"  {len(e.input_ids)} tokens: {text} -> {len(e.target_ids)} tokens: {' / '.join(e.example.answers)}{options}")


# --- What is printed -----------------------------------------------------------------------------
# Results on stdout, progress and messages on stderr.


def echo(text: str = "") -> None:
    """Print a line of results on stdout, once for all ranks; end when its reader, such as `head`, has had enough."""
    if rank() == 0:
        try:
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()
        except BrokenPipeError:
            Console().on_broken_pipe()
            raise SystemExit(0) from None


def print_report(report: dict[str, Any], as_json: bool, *, per_task: bool, wide: bool) -> None:
    """Print the paper's table for people, or all of it as one JSON object."""
    told = report if per_task else {name: value for name, value in report.items() if name != "scores"}
    echo(json.dumps(told) if as_json else report_text(told, wide=wide))


class Terminal(Reporter):
    """Shows a person what the stages do."""

    def say(self, text: str) -> None:
        """Print a message on stderr, once for all ranks."""
        if rank() == 0:
            stderr.print(text, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def progress(self, label: str, total: float) -> Iterator[Callable[[float], None]]:
        """Show a bar with what is left, or plain lines when stderr is no terminal; nothing when there is nothing to do."""
        if not total or rank():
            yield lambda done: None
            return
        if stderr.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=stderr) as bar:
                line = bar.add_task(label, total=total)
                yield lambda done: bar.update(line, completed=done)
                bar.update(line, completed=total)
            return
        begin = told = time.monotonic()

        def advance(done: float) -> None:
            nonlocal told
            now = time.monotonic()
            if now - told > 20:
                told = now
                minutes = (now - begin) * (total - done) / max(1, done) / 60
                self.say(f"{label}: {100 * done / total:.0f} %, {minutes:.1f} minutes left")

        yield advance
        self.say(f"{label}: done in {time.monotonic() - begin:.0f} s")


def print_version(asked: bool) -> None:
    """Print the versions that a report of a mistake needs, and end."""
    if asked:
        packages = {"intrinsic-prompt-tuning": "ipt"} | {
            name: name for name in ("torch", "transformers", "datasets", "safetensors")
        }
        echo(", ".join(f"{shown} {importlib.metadata.version(name)}" for name, shown in packages.items()))
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print versions.")] = False,
) -> None:
    """Take what stands before a command."""


def stop(number: int, _: object) -> None:
    """Save unfinished work and end; what comes within five seconds is the same wish, which a launcher passes on."""
    now = time.monotonic()
    if not STOPPED_BY or now > min(STOPPED_BY.values()) + 5:
        STOPPED_BY[number] = now
        raise KeyboardInterrupt


def main() -> None:
    """Run the command line; a mistake that a person can mend is one line and exit code 1."""
    # Two threads that wait by spinning are many times slower than one where another process wants a core, too.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    STOPPED_BY.clear()
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    # What is still to be written into a closed pipe goes nowhere, which is no mistake.
    Console.on_broken_pipe = lambda c: os.dup2(os.open(os.devnull, os.O_WRONLY), c.file.fileno())  # type: ignore[assignment]
    try:
        app()
    except IptError as error:
        stderr.print(f"error: {error}", markup=False, soft_wrap=True)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
