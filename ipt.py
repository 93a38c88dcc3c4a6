"""Intrinsic Prompt Tuning: ~100 tuned soft prompts -> one small non-linear subspace -> new tasks by tuning 250 numbers.

    command            the paper's stage                  reads             writes
    ipt collect        prompt tuning                      tasks             soft prompts
    ipt fit-subspace   multi-task subspace finding, MSF   soft prompts      subspaces
    ipt tune           intrinsic subspace tuning, IST     subspaces, tasks  intrinsic vectors
    ipt eval           relative performance, E_rel        all of them       scores
    ipt run            all four

Paper: Qin et al., "Exploring Universal Intrinsic Task Subspace via Prompt Tuning", arXiv 2110.07867.
This is the command line, all that knows Typer and rich; what it calls is in the package `intrinsic_prompt_tuning`, its rooms
listed in README.md.
"""

import contextlib
import inspect
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import wraps
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from intrinsic_prompt_tuning.adapters import export_prompts, import_prompt
from intrinsic_prompt_tuning.context import COLLECTION_SEED, Options, Rates, Start
from intrinsic_prompt_tuning.errors import IptError, nearest
from intrinsic_prompt_tuning.evaluation import spread
from intrinsic_prompt_tuning.experiment import Experiment
from intrinsic_prompt_tuning.files import user_cache, write_bytes
from intrinsic_prompt_tuning.finding import SubspaceConfig
from intrinsic_prompt_tuning.page import make_page
from intrinsic_prompt_tuning.pictures import Format, Picture, Quantity, draw, lacking
from intrinsic_prompt_tuning.ranks import catch_signals, n_processes, n_ranks, rank, run_in_processes
from intrinsic_prompt_tuning.report import make_report, report_text, sample_text, spread_text, wrong_answers
from intrinsic_prompt_tuning.reporter import Reporter, table_text
from intrinsic_prompt_tuning.settings import TESTBED, Manners, described, versions
from intrinsic_prompt_tuning.shelf import about_file, cache_files, files_text, remove
from intrinsic_prompt_tuning.spaces import SpaceKind
from intrinsic_prompt_tuning.tasks import CROSSFIT_SEEDS
from intrinsic_prompt_tuning.tasks.checks import check, read_mapping
from intrinsic_prompt_tuning.tuning import TuneConfig
from intrinsic_prompt_tuning.using import predict, tuned_prompts, warm_starts

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False,
    help="Intrinsic Prompt Tuning: many soft prompts, one small subspace, new tasks by tuning 250 numbers.",
)  # fmt: skip
stderr = Console(stderr=True, highlight=False, emoji=False)

# --- What a person sees: results on stdout, progress and messages on stderr ----------------------


def echo(text: str = "") -> None:
    """Print a line of results on stdout, once for all ranks; end when its reader, such as `head`, has had enough."""
    if rank() == 0:
        try:
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()
        except BrokenPipeError:
            Console().on_broken_pipe()
            raise SystemExit(0) from None
        except UnicodeEncodeError as error:  # a terminal, or a locale, of few letters
            what = f"the output's encoding, {error.encoding}, has no {error.object[error.start]!a}"
            raise IptError(f"{what}: set PYTHONIOENCODING=utf-8") from error


def print_report(report: dict[str, Any], as_json: bool, *, per_task: bool, wide: bool) -> None:
    """Print the paper's table for people, or all of it as one JSON object."""
    told = report if per_task else {name: value for name, value in report.items() if name != "scores"}
    echo(json.dumps(told) if as_json else report_text(told, wide=wide))


def print_found(found: dict[str, Any], as_json: bool) -> None:
    """Print what was found as one JSON object, or for people as YAML."""
    style: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "default_flow_style": None, "width": stderr.width}
    echo(json.dumps(found) if as_json else yaml.safe_dump(found, **style).rstrip())


class Terminal(Reporter):
    """Shows a person what the stages do, or, when it is quiet, nothing."""

    quiet = False

    def say(self, text: str) -> None:
        """Print a message on stderr, once for all ranks."""
        if rank() == 0 and not self.quiet:
            stderr.print(text, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def progress(self, label: str, total: float) -> Iterator[Callable[[float], None]]:
        """Show a bar with what is left, or plain lines when stderr is no terminal."""
        if not total or rank() or self.quiet or not stderr.is_terminal:
            with super().progress(label, total) as advance:
                yield advance
            return
        with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=stderr) as bar:
            line = bar.add_task(label, total=total)
            yield lambda done: bar.update(line, completed=done)
            bar.update(line, completed=total)


# --- Options -------------------------------------------------------------------------------------


def option(kind: type, name: str, flag: str = "") -> Any:
    """Return the annotation of an option for a dataclass field; None if the field has no Setting. Its own default is None."""
    if (found := described(kind, name)) is None:
        return None
    value, own, setting = found
    about: dict[str, Any] = {"show_default": setting.shown_default or False, "rich_help_panel": setting.panel or None}
    return Annotated[value | None, typer.Option(flag or own, help=setting.help, min=setting.least, max=setting.most, **about)]


def read_config(context: typer.Context, file: Path | None) -> Path | None:
    """Take options from a file: those at its top, and those under the command's name; flags and the environment win."""
    if file is None or context.parent is None:
        return file
    commands = context.parent.command.commands  # type: ignore[attr-defined]
    flags = {command: {flag: p for p in of.params for flag in p.opts if flag != "--config"} for command, of in commands.items()}
    every = {flag for options in flags.values() for flag in options}
    content, here = read_mapping(file), str(context.info_name)
    both = {name for name in commands if f"--{name}" in every}  # names of commands and of options
    sections = {n: v or {} for n, v in content.items() if n in commands and (n not in both or isinstance(v, dict | None))}
    check(own := sections.get(here, {}), dict[Any, Any], f"{file}: '{here}'")
    shared = {name: value for name, value in content.items() if name not in sections}
    if sections and not shared and here not in sections:
        raise IptError(f"{file} holds options of {' and '.join(sections)}, none of {here}")
    for name, value in (shared | own).items():
        flag, known = f"--{name}".replace("_", "-"), flags[here] if name in own else every
        if flag not in known:
            raise IptError(f"{file}: there is no option {flag}{nearest(flag, known)}")
        parameter = flags[here].get(flag)
        others = isinstance(value, list) and any(flag in of and of[flag].multiple for of in flags.values())  # take several
        if parameter and (parameter.multiple or name in own or not others):
            several = parameter.multiple and not isinstance(value, list)
            context.default_map = {**(context.default_map or {}), parameter.name: [value] if several else value}
    return file


NOT_KEPT = {*(f.name for f in fields(Manners)), "cache", "help"}
"""What the file of options that reproduces a command does not hold."""
QUICK_SETTINGS = {"steps": 80, "subspace_steps": 50}


def parameters_of(function: Callable[..., None], groups: tuple[type, ...], shared: bool) -> list[inspect.Parameter]:
    """Return what a command is given: its function's own parameters, those of dataclasses, and `context`."""
    _, *own = inspect.signature(function, eval_str=True).parameters.values()
    taken = {p.name for p in own} | ({"processes"} if not shared else set())
    added = {f.name: option(kind, f.name) for kind in (*groups, Manners) for f in fields(kind) if f.name not in taken}
    config = added["config"].__metadata__[0]
    config.is_eager, config.callback = True, read_config
    annotated = {p.name: (p.annotation, p.default) for p in own} | {name: (a, None) for name, a in added.items() if a}
    for name, (annotation, _) in annotated.items():  # every option can be given by the environment, too
        about = annotation.__metadata__[0]
        if isinstance(about, typer.models.ArgumentInfo):
            continue
        flag = about.default if str(about.default).startswith("--") else name  # Typer has the flag there until it is used
        flag = flag.split("/")[0].lstrip("-")
        about.envvar, about.show_envvar = f"IPT_{flag.replace('-', '_').upper()}", False
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    return [context, *(context.replace(name=n, annotation=a, default=d) for n, (a, d) in annotated.items())]


def command(name: str, *groups: type, shared: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function: dataclasses give it options, and what was given makes the experiment, its first argument.

    Several processes can share the work of a command that is `shared`.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        own = [*inspect.signature(function).parameters][1:]

        @wraps(function)
        def expanded(context: typer.Context, **values: Any) -> None:
            small = values.get("backbone") in (None, TESTBED) and values.get("device") in (None, "auto", "cpu")
            count = values.pop("processes", None) or n_processes(small)
            terminal = Terminal(verbose=bool(values["verbose"]), log=values["log"])
            terminal.quiet = bool(values["quiet"]) and not values.get("dry_run")  # a plan is what was asked for
            try:
                if shared and n_ranks() == 1 and count > 1:
                    terminal.quiet = True  # the first of them says how to go on
                    code, told = run_in_processes([sys.executable, __file__, *sys.argv[1:]], count)
                    sys.stderr.write(told)
                    raise SystemExit(code)
                if values.get("quick"):
                    values |= {name: value for name, value in QUICK_SETTINGS.items() if values[name] is None}
                # `tune` has one rate, of whatever it tunes.
                values.setdefault("learning_rate", values.get("vector_learning_rate"))
                x = Experiment(values, terminal)
                if values.get("space") == "prompt":
                    x.given["vector_learning_rate"] = x.rates.learning_rate
                x.tell(name, {str(p.name): p.opts[0] for p in context.command.params if p.name not in NOT_KEPT})
                function(x, **{name: values[name] for name in own})
                if rank() == 0:  # another that failed would end the first, which may still write
                    x.finish()
            except KeyboardInterrupt as stop:
                terminal.say("stopped: what is done is kept, and the same command goes on from here")
                raise SystemExit(128 + (stop.args or (signal.SIGINT,))[0]) from None

        parameters = parameters_of(function, groups, shared)
        expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return app.command(name)(expanded)

    return register


DIM_HELP = "Intrinsic dimension; repeat it for more."
TaskOption = Annotated[list[str] | None, typer.Option(help="A task; repeat it for more.", show_default="all of the split")]
SeenOption = Annotated[bool, typer.Option("--seen", help="All seen tasks of the split.")]
UnseenOption = Annotated[bool, typer.Option("--unseen", help="All unseen tasks of the split.")]
DimOption = Annotated[list[int] | None, typer.Option(min=1, help=DIM_HELP, show_default="250")]
DataSeedOption = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the few-shot rows; all but 100 are unseen data.")]
SpaceOption = Annotated[SpaceKind, typer.Option(help="Where to tune.")]
StartOption = Annotated[Start, typer.Option(help="random: N(0, 0.02); seen: as seen tasks' vectors lie; nearest: at the best.")]
WARM_HELP = "subspace (the task's vector), nearest (the seen task's prompt with the least loss), a task, a file."
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done, and how long it would take.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object; predict: one a line.")]
SourceOption = Annotated[str, typer.Option("--from", help="best, prompt, vector; or a file of any kind that 'ipt import' reads.")]
OneDimOption = Annotated[int | None, typer.Option(min=1, help="Intrinsic dimension of vectors.", show_default="any")]
QuantityOption = Annotated[Quantity, typer.Option(help="What pictures show of scores.")]
WideOption = Annotated[bool, typer.Option("--wide", help="Print every column.")]

# --- Commands ------------------------------------------------------------------------------------
# A command is a signature, a line of help, and descriptions of results that are made.


@command("collect", Options, TuneConfig, shared=True)
def collect(
    x: Experiment, task: TaskOption = None, seen: SeenOption = False, unseen: UnseenOption = False,
    data_seed: DataSeedOption = COLLECTION_SEED, learning_rate: option(Rates, "learning_rate") = None,  # type: ignore[valid-type]
    tries: option(Rates, "tries") = None,  # type: ignore[valid-type]
    start: Annotated[str, typer.Option(help=WARM_HELP, show_default="random words")] = "",
    dim: OneDimOption = None, dry_run: DryRunOption = False,
) -> None:  # fmt: skip
    """Tune a soft prompt for each task.

    Example: ipt collect --seen --learning-rate 0.1 --learning-rate 0.3
    """
    if dim and start not in ("", "subspace"):
        raise IptError("--dim is of the vectors that prompts start from: it needs --start subspace")
    good = x.with_rows(x.chosen(task, seen, unseen), data_seed)
    near = [*x.collected().values()] if start == "nearest" else []
    starts = warm_starts(x, start, good, data_seed, dim) if start not in ("", "nearest") else None
    x.make(chain(*x.soft_prompts(good, data_seed, starts, near).values()), dry_run=dry_run)
    if not dry_run:
        x.report.say(f"results: {x.store.folder}")


@command("fit-subspace", Options, SubspaceConfig, shared=True)
def fit_subspace(x: Experiment, dim: DimOption = None, dry_run: DryRunOption = False) -> None:
    """Find the subspace of the seen tasks' soft prompts.

    Example: ipt fit-subspace --dim 250 --dim 10
    """
    prompts = x.collected()
    subspaces = [x.subspace("subspace", one, prompts) for one in dict.fromkeys(dim or [250])]
    x.make(subspaces, dry_run=dry_run)
    for subspace in () if dry_run else subspaces:
        x.report.say(f"subspace {subspace.name[:8]}: {x.store.path(subspace)}")


@command("tune", Options, TuneConfig, shared=True)
def tune(
    x: Experiment, task: TaskOption = None, seen: SeenOption = False, unseen: UnseenOption = False, dim: DimOption = None,
    data_seed: DataSeedOption = COLLECTION_SEED, space: SpaceOption = "subspace", start: StartOption = "random",
    subspace: Annotated[str, typer.Option(help="The beginning of a subspace's name, where there are several of one dim.")] = "",
    vector_learning_rate: option(Rates, "vector_learning_rate", "--learning-rate") = None,  # type: ignore[valid-type]
    tries: option(Rates, "tries") = None,  # type: ignore[valid-type]
    dry_run: DryRunOption = False,
) -> None:  # fmt: skip
    """Tune an intrinsic vector for each task.

    Example: ipt tune --task day-next --dim 250 --data-seed 21
    """
    if space == "prompt" and (start != "random" or dim or subspace):
        raise IptError("--start, --dim and --subspace are for vectors: 'ipt collect --start' is for prompts")
    tasks = x.chosen(task, seen, unseen)
    spaces = [] if space == "prompt" else [x.choose_subspace(space, one, subspace) for one in dim or [250]]
    good = x.with_rows(tasks, data_seed)
    choices = [own for found in spaces for own in x.intrinsic_vectors(good, data_seed, found, start).values()]
    choices += x.soft_prompts(good, data_seed).values() if space == "prompt" else ()
    x.make(chain(*choices, spaces if space != "subspace" else ()), dry_run=dry_run)
    if not dry_run:
        x.report.say(f"results: {x.store.folder}")


@command("eval", Options, shared=True)
def evaluate(
    x: Experiment, per_task: Annotated[bool, typer.Option("--per-task", help="Also every task's scores.")] = False,
    wide: WideOption = False, as_json: JsonOption = False, dry_run: DryRunOption = False,
    wrong: Annotated[str, typer.Option(metavar="TASK", help="The test rows of a task that are answered wrong, instead.")] = "",
) -> None:  # fmt: skip
    """Score everything in the cache on the test rows, and print the paper's table.

    Example: ipt eval --per-task
    """
    scores = x.wanted_scores(wrong)
    x.make(scores, dry_run=dry_run)
    if wrong and not dry_run:
        print_found({} if rank() else wrong_answers(x, scores, None if as_json else stderr.width - 11), as_json)
    elif not dry_run:
        print_report(make_report(x, scores), as_json, per_task=per_task, wide=wide)


@command("run", Options, TuneConfig, SubspaceConfig, Rates, shared=True)
def run(
    x: Experiment, dim: Annotated[list[int] | None, typer.Option(min=1, help=DIM_HELP, show_default="250 and 10")] = None,
    data_seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the seen tasks' other data.")] = 21,
    seeds: Annotated[int, typer.Option(min=1, max=4, help="Runs with other seeds: mean and spread.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer tasks and steps: the same code in about a minute.")] = False,
    wide: WideOption = False, as_json: JsonOption = False, dry_run: DryRunOption = False,
) -> None:  # fmt: skip
    """Do all of it: collect, fit-subspace, tune, eval. What has been done is not done again.

    Example: ipt run --quick
    """
    if quick:
        some = {*x.named("seen")[::8], *x.named("unseen")[::5], *x.own}
        x.roles = {task: role for task, role in x.roles.items() if task in some}
    reports = []
    data_seeds = [data_seed, *(seed for seed in CROSSFIT_SEEDS if seed not in (COLLECTION_SEED, data_seed))]
    for n in range(seeds):
        one = x.with_seeds(n) if n else x
        if seeds > 1:
            x.report.say(f"run {n + 1} of {seeds}")
        results, scores = one.whole(dim or [250, 10], data_seeds[n])
        one.make([*results, *scores], dry_run=dry_run)
        reports += [] if dry_run else [make_report(one, scores)]
    for report in reports if seeds == 1 or (wide and not as_json) else ():
        print_report(report, as_json, per_task=False, wide=wide)
    if len(reports) > 1:
        rows = spread(reports)
        echo(json.dumps({"spread": rows, "runs": reports}) if as_json else spread_text(rows).rstrip("\n"))


@command("predict", Options)
def predict_command(
    x: Experiment, task: Annotated[list[str], typer.Option(help="A task; repeat it when lines name theirs.")],
    input_file: Annotated[typer.FileBinaryRead | None, typer.Option("--input", help="Lines.", show_default="stdin")] = None,
    source: SourceOption = "best", dim: OneDimOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Answer new inputs, a line each: text, or JSON objects with input or the template's columns, options, task.

    Example: ipt predict --task day-next --json
    """
    prompts, bad = tuned_prompts(x, [x.task(name).name for name in task], source, {"dim": dim} if dim else None), 0
    lines: Any = input_file or getattr(sys.stdin, "buffer", ())
    for found in predict(x, prompts, (line.decode("utf-8", "surrogateescape") for line in lines), task[0]):
        bad += bool(found.error)
        if found.error:
            x.report.say(f"not answered: {found.error}")
        elif as_json:
            echo(json.dumps({name: value for name, value in vars(found).items() if value is not None}, ensure_ascii=False))
        else:
            echo(found.answer)
    if bad:
        raise IptError(f"{bad} lines were not answered")


@command("export", Options)
def export_command(
    x: Experiment, out: Annotated[Path, typer.Option(help="Folder to write; of several tasks, a folder each in it.")],
    task: TaskOption = None, every: Annotated[bool, typer.Option("--all", help="All tasks of the split.")] = False,
    form: Annotated[Literal["peft", "vllm"], typer.Option("--format", help="An adapter of PEFT, or a prompt for vLLM.")] = "peft",
    source: SourceOption = "best", dim: OneDimOption = None,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that is not empty.")] = False,
) -> None:  # fmt: skip
    """Write tuned prompts as folders that PEFT loads, prompt-tuning adapters with a card, or for vLLM.

    Example: ipt export --task day-next --out day-next
    """
    tasks, several = x.chosen(task, every, every), every or len(task or []) != 1
    prompts = tuned_prompts(x, tasks, source, {"dim": dim} if dim else None, some=not task)
    export_prompts(x, {out / name if several else out: prompt for name, prompt in prompts.items()}, form, force=force)
    x.report.say(f"{len(prompts)} of {len(tasks)} tasks had a prompt: {out}")


@command("import", Options)
def import_command(
    x: Experiment, path: Annotated[Path, typer.Argument(help="Adapter folder, .npy array, or safetensors file of one matrix.")],
    task: Annotated[str, typer.Option(help="What it is a prompt of.")],
    task_id: Annotated[int | None, typer.Option(min=0, help="Which task's of a multitask adapter.")] = None,
) -> None:  # fmt: skip
    """Take a soft prompt that another program tuned as collected.

    Example: ipt import my-adapter --task day-next
    """
    import_prompt(x, path, x.task(task).name, task_id)


@command("show", Options)
def show_command(
    x: Experiment, file: Annotated[str, typer.Argument(help="A file, or the beginning of a result's name.")],
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Tell what a file of the cache is; of a prompt also its nearest words, of a subspace its tasks and spectrum.

    Example: ipt show fbdca412 --json
    """
    print_found(about_file(x, file), as_json)


@app.command("cache")
def cache_command(
    do: Annotated[Literal["ls", "rm"], typer.Argument(help="Sizes, or what is removed, by files.")] = "ls",
    query: Annotated[str, typer.Argument(help="A kind, or a pattern of paths in the cache; rm needs it.")] = "",
    cache: option(Options, "cache") = None,  # type: ignore[valid-type]
    yes: Annotated[bool, typer.Option("--yes", help="Remove without asking.")] = False,
) -> None:
    """List what the cache holds by backbone and kind, or remove some of it.

    Example: ipt cache rm "*/day-next-*" --yes
    """
    folder, rm = cache or user_cache(), do == "rm"
    files = cache_files(folder, query if rm else query or "*")
    echo(files_text(files, each=rm))
    if rm and not yes and not sys.stdin.isatty():
        raise IptError("nothing was removed, as nobody can be asked here: add --yes")
    if rm and (yes or typer.confirm("Remove them?", err=True)):
        Terminal().say(f"removed {remove(folder, files)} of {len(files)} files")


@command("plot", Options, shared=True)
def plot(
    x: Experiment, picture: Annotated[list[Picture] | None, typer.Argument(help="Which.", show_default="all")] = None,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path(), quantity: QuantityOption = "e_rel",
    form: Annotated[list[Format] | None, typer.Option("--format", help="Repeat it for both.", show_default="png")] = None,
    dim: OneDimOption = None,
) -> None:  # fmt: skip
    """Draw the paper's pictures of what the cache holds, which is scored first as by eval.

    Example: ipt plot dimensions --quantity gain --format svg
    """
    if why := lacking():
        raise IptError(why)
    scores = x.wanted_scores()
    x.make(scores)
    files = draw(x, scores, make_report(x, scores)["rows"], picture or (), form or ("png",), quantity, dim) if rank() == 0 else {}
    for name, content in files.items():
        write_bytes(out / name, content)
        x.report.say(f"picture: {out / name}")


@command("report", Options, shared=True)
def report_command(
    x: Experiment, out: Annotated[Path, typer.Option(help="File to write.")], quantity: QuantityOption = "e_rel"
) -> None:
    """Write what the cache holds as one page of HTML: what was run, the table, pictures, every task's scores.

    Example: ipt report --out page.html
    """
    scores = x.wanted_scores()
    x.make(scores)
    if rank() == 0:
        table, why = make_report(x, scores), lacking()
        drawn = {} if why else draw(x, scores, table["rows"], formats=["svg"], quantity=quantity)
        write_bytes(out, make_page(x, table, drawn).encode())
        x.report.say(f"page: {out}" + (f", without pictures: {why}" if why else ""))


@command("tasks", Options)
def tasks_command(
    x: Experiment, task: Annotated[list[str] | None, typer.Argument(help="Tasks.", show_default="all of the split")] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the few-shot sample as the backbone gets it.")] = False,
    data_seed: DataSeedOption = COLLECTION_SEED,
) -> None:  # fmt: skip
    """List tasks with kind, metric, role in the split and source; look at one.

    Example: ipt tasks day-next --show
    """
    tasks = [x.task(name) for name in task or x.own or x.roles]
    if show:
        for one in tasks:
            echo(sample_text(x, one.name, data_seed))
        return
    rows = [[one.name, one.kind, one.metric, x.roles.get(one.name), one.source] for one in tasks]
    echo(table_text("task|kind|metric|role|source", rows).rstrip("\n"))


@app.callback(invoke_without_command=True)
def common(version: Annotated[bool, typer.Option("--version", help="Print versions.")] = False) -> None:
    """Take what stands before a command: the wish for the versions that a report of a mistake needs."""
    if version:
        echo(versions())
        raise typer.Exit


def main() -> None:
    """Run the command line; a mistake that a person can mend is one line and exit code 1."""
    # Two threads that wait by spinning are many times slower than one where another process wants a core, too.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    catch_signals()
    # Closed by the shell, `>&-`, a stream is None: what would be written there goes nowhere.
    sys.stdout, sys.stderr = (it or Path(os.devnull).open("w") for it in (sys.stdout, sys.stderr))  # noqa: SIM115
    # What is still to be written into a closed pipe goes nowhere, which is no mistake.
    Console.on_broken_pipe = lambda c: os.dup2(os.open(os.devnull, os.O_WRONLY), c.file.fileno())  # type: ignore[assignment]
    try:
        app()
    except (IptError, OSError, UnicodeDecodeError) as error:  # also a path too long, a disk, an input in another encoding
        stderr.print(f"error: {error}", markup=False, soft_wrap=True)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
