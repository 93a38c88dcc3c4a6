"""The terminal: options made of dataclass fields, and what a person sees. With `ipt.py` all that knows Typer and rich."""

from __future__ import annotations

import contextlib
import inspect
import json
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

from intrinsic_prompt_tuning.errors import IptError, nearest
from intrinsic_prompt_tuning.experiment import Experiment
from intrinsic_prompt_tuning.ranks import n_processes, n_ranks, rank, run_in_processes
from intrinsic_prompt_tuning.results import Reporter, duration
from intrinsic_prompt_tuning.settings import BEHIND_SETTINGS, MACHINE, TESTBED, TESTBED_SETTINGS, Setting
from intrinsic_prompt_tuning.tasks.checks import check, read_mapping

STOPPED_BY: dict[int, float] = {}
"""The signals that have asked for an end, and when they came; the first tells the exit code."""
stderr = Console(stderr=True, highlight=False)


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


class Terminal(Reporter):
    """Shows a person what the stages do."""

    def __init__(self, *, quiet: bool = False, verbose: bool = False, log: Path | None = None) -> None:
        """Say nothing, or more; add events to a file."""
        self.quiet, self.verbose, self.log_file = quiet, verbose, log

    def say(self, text: str) -> None:
        """Print a message on stderr, once for all ranks."""
        if rank() == 0 and not self.quiet:
            stderr.print(text, markup=False, soft_wrap=True)

    def log(self, event: str, **about: Any) -> None:
        """Add a line to the log, whatever the rank; print it where every validation is asked for."""
        if self.verbose:
            figures = ", ".join(f"{name} {v:.4g}" if isinstance(v, float) else f"{name} {v}" for name, v in about.items())
            self.say(f"{event}: {figures}")
        if self.log_file:
            line = json.dumps({"time": round(time.time(), 3), "event": event} | about) + "\n"
            try:
                with self.log_file.open("a", encoding="utf-8") as file:
                    file.write(line)  # one write, so that lines of several processes do not mix
            except OSError as error:
                raise IptError(
                    f"cannot write {self.log_file}: {error.strerror or error}; name another file with --log"
                ) from error

    @contextlib.contextmanager
    def progress(self, label: str, total: float) -> Iterator[Callable[[float], None]]:
        """Show a bar with what is left, or plain lines when stderr is no terminal; nothing when there is nothing to do."""
        if not total or rank() or self.quiet:
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
                left = (now - begin) * (total - done) / max(1, done)
                self.say(f"{label}: {100 * done / total:.0f} %, {duration(left)} left")

        yield advance
        self.say(f"{label}: done in {duration(time.monotonic() - begin)}")


# --- Options -------------------------------------------------------------------------------------


def option(kind: type, name: str, flag: str = "") -> Any:
    """Return the annotation of an option for a dataclass field, None without a Setting; not giving it leaves the default."""
    value, setting, *_ = *get_args(get_type_hints(kind, include_extras=True)[name]), None, None
    if not isinstance(setting, Setting):
        return None
    default = getattr(kind(), name)
    flag = flag or f"--{(setting.name or name).replace('_', '-')}"
    names = [f"{flag}/--no-{flag[2:]}" if (value is bool and default) or value == (bool | None) else flag]
    shown = _shown(setting.shown_default or default, BEHIND_SETTINGS.get(name), TESTBED_SETTINGS.get(name))
    about = {"help": setting.help, "show_default": shown, "rich_help_panel": setting.panel or None}
    told = typer.Option(*names, min=setting.least, max=setting.most, **about)
    return Annotated[value if NoneType in get_args(value) else value | None, told]


def _shown(default: Any, behind: Any, on_testbed: Any) -> Any:
    """Return a default as help shows it, and what holds elsewhere; False where there is nothing to show."""

    def text(value: Any) -> str:
        return ", ".join(map(str, value)) if isinstance(value, list) else "on" if value is True else str(value)

    told = text(default) if default not in (None, False) else ""
    told = told if behind is None else f"{text(behind)} behind the input, {told} in front"
    return (told if on_testbed is None else f"{text(on_testbed)} on the testbed, else {told}") or False


def read_config(context: typer.Context, file: Path | None) -> Path | None:
    """Take options from a file: those at its top, and those under the command's name; flags and the environment win."""
    if file is None or context.parent is None:
        return file
    commands = context.parent.command.commands  # type: ignore[attr-defined]
    flags = {command: {flag: p for p in of.params for flag in p.opts} for command, of in commands.items()}
    content, here = read_mapping(file), str(context.info_name)
    check(own := content.get(here) or {}, dict[Any, Any], f"{file}: '{here}'")
    given = {name: value for name, value in content.items() if name not in commands} | own
    known = {flag for own in flags.values() for flag in own}
    for name, value in given.items():
        flag = f"--{name}".replace("_", "-")
        if flag not in known or (name not in content and flag not in flags[here]):
            raise IptError(f"{file}: there is no option {flag}{nearest(flag, known)}")
        if parameter := flags[here].get(flag):
            several = parameter.multiple and not isinstance(value, list)
            context.default_map = {**(context.default_map or {}), parameter.name: [value] if several else value}
    return file


QUICK_SETTINGS = {"steps": 80, "subspace_steps": 50}
ProcessesOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=64,
        help="Share the work.",
        show_default="one per core, at most 4, on the testbed, else 1",
        rich_help_panel=MACHINE,
    ),
]
MANNERS: dict[str, Any] = {
    "config": Annotated[
        Path | None, typer.Option(help="YAML file of options.", is_eager=True, callback=read_config, rich_help_panel=MACHINE)
    ],
    "log": Annotated[
        Path | None, typer.Option(help="Add what happens to a file, a JSON object a line.", rich_help_panel=MACHINE)
    ],
    "quiet": Annotated[bool | None, typer.Option("--quiet", help="Say nothing but results and errors.", rich_help_panel=MACHINE)],
    "verbose": Annotated[bool | None, typer.Option("--verbose", help="Say every validation, too.", rich_help_panel=MACHINE)],
}
"""What every command has."""


def options_of(x: Experiment, context: typer.Context, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that a command was told, defaults among it, by the names that `--config` takes."""
    left_out = {*MANNERS, "cache", "processes", "help"}
    options = [p for p in context.command.params if p.name not in left_out and p.opts[0].startswith("--")]
    flags = {str(p.name): p.opts[0][2:] for p in options}
    settled = x.settings() | {name: value for name, value in given.items() if value is not None}
    return {flag: settled[name] for name, flag in flags.items() if name in settled}


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
        added |= MANNERS | ({"processes": ProcessesOption} if in_processes else {})
        parameters += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=a) for name, a in added.items()
        ]
        for parameter in parameters:  # every option can be given by the environment, too
            parameter.annotation.__metadata__[0].envvar = f"IPT_{parameter.name.upper()}"
            parameter.annotation.__metadata__[0].show_envvar = False

        @wraps(command)
        def expanded(context: typer.Context, **values: Any) -> None:
            small = values.get("backbone") in (None, TESTBED) and values.get("device") in (None, "auto", "cpu")
            count = values.pop("processes", None) or n_processes(small)
            if in_processes and n_ranks() == 1 and count > 1:
                try:
                    code, told = run_in_processes([sys.executable, inspect.getfile(command), *sys.argv[1:]], count)
                except KeyboardInterrupt:  # the first of them says how to go on
                    raise SystemExit(128 + next(iter(STOPPED_BY))) from None
                sys.stderr.write(told)
                raise SystemExit(code)
            if values.get("quick"):
                values |= {name: value for name, value in QUICK_SETTINGS.items() if values[name] is None}
            # `tune` has one rate, of whatever it tunes.
            values.setdefault("learning_rate", values.get("vector_learning_rate"))
            terminal = Terminal(quiet=bool(values["quiet"]), verbose=bool(values["verbose"]), log=values["log"])
            try:
                x = Experiment.of(values, terminal)
                x.told = str(context.info_name), options_of(x, context, values)
                command(x, **{name: values[name] for name in own})
            except KeyboardInterrupt:
                terminal.say("stopped: what is done is kept, and the same command goes on from here")
                raise SystemExit(128 + next(iter(STOPPED_BY))) from None

        parameters.insert(0, inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context))
        expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return expanded

    return decorate
