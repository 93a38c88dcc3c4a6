"""The paper's pictures of what the cache holds. Colours are Okabe and Ito's, for the colour-blind; shapes say the same again."""

from __future__ import annotations

import importlib.util
import io
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

from intrinsic_prompt_tuning.context import COLLECTION_SEED
from intrinsic_prompt_tuning.errors import IptError
from intrinsic_prompt_tuning.experiment import Experiment
from intrinsic_prompt_tuning.lazy import np
from intrinsic_prompt_tuning.results import Choice, Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Quantity = Literal["e_rel", "gain"]
Picture = StrEnum("Picture", ["dimensions", "seen-tasks", "components", "similarity"])
Format = StrEnum("Format", ["png", "svg"])
Row = Mapping[str, Any]
SPACES = {
    "subspace": ("learned subspace", "#0072B2", "o"), "random": ("random space", "#E69F00", "s"),
    "low-rank": ("low-rank space", "#009E73", "D"), "nearest": ("nearest seen prompt", "#CC79A7", "P"),
    "linear": ("linear subspace", "#56B4E9", "v"), "random-unscaled": ("unscaled random space", "#D55E00", "^"),
    "mean": ("mean seen prompt", "#000000", "X"),
}  # fmt: skip
"""Space -> what a legend calls it, its colour, its marker."""
STARTS = {"seen": ", start as seen", "nearest": ", start nearby"}
COLOURS, STROKES = [colour for _, colour, _ in SPACES.values()], ("-", "--", ":", "-.")
QUANTITIES = {"e_rel": "E_rel (1: prompt tuning)", "gain": "gain (0: no prompt, 1: prompt tuning)"}
STYLE: Any = {"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 150}
STYLE |= {"legend.frameon": False, "legend.title_fontsize": 9, "savefig.bbox": "tight", "svg.hashsalt": "ipt"}


def lacking() -> str:
    """Return what to install before anything can be drawn; nothing where matplotlib is there."""
    there = importlib.util.find_spec("matplotlib") is not None
    return "" if there else "pictures need the package matplotlib: pip install 'intrinsic-prompt-tuning[plot]'"


def draw(
    x: Experiment, scores: Sequence[Result], rows: Sequence[Row], wanted: Sequence[str] = (),
    formats: Iterable[str] = ("png",), quantity: Quantity = "e_rel", dim: int | None = None,
) -> dict[str, bytes]:  # fmt: skip
    """Return name -> content of files with pictures of `scores` and their table's `rows`; equal numbers give equal bytes.

    Without any `wanted`, all are drawn for which the cache holds enough. `dim` is that of the intrinsic vectors.

    Raises:
        IptError: the cache holds too little for a picture that is wanted.
    """
    import matplotlib as mpl

    drawers: dict[str, Callable[[], Figure]] = {
        "dimensions": lambda: by_number(lines(rows, scores, "dim"), quantity, "dim"),
        "seen-tasks": lambda: by_number(lines(rows, scores, "seen_tasks"), quantity, "seen_tasks"),
        "components": lambda: components(*tuned_vectors(x, scores, dim)),
        "similarity": lambda: similarity(*tuned_vectors(x, scores, dim)),
    }
    files = dict[str, bytes]()
    with mpl.rc_context(STYLE):
        for name in dict.fromkeys(wanted) or drawers:
            try:
                figure = drawers[name]()
                for kind in formats:
                    figure.savefig(file := io.BytesIO(), format=kind, metadata={"Date" if kind == "svg" else "Software": None})
                    files[f"{name}.{kind}"] = file.getvalue()
            except IptError as error:
                if wanted:
                    raise
                x.report.say(f"not drawn: {name}: {error}")
    return files


def _figure(width: float, height: float, rows: int = 1) -> tuple[Figure, Any]:
    """Return a figure, in inches, with room for all that is written, and its axes, one below the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, sharey=True)


def lines(rows: Sequence[Row], scores: Iterable[Result], across: str) -> dict[str, list[Row]]:
    """Return what a legend calls a line -> its rows, each with `seen_tasks`, how many tasks its space was made of.

    Across dim: in the spaces of the most seen tasks that any was tuned in. Across seen_tasks: of unseen tasks, in spaces of
    several numbers of seen ones.
    """
    rows = [row for row in rows if row["space"] in SPACES]  # prompts that began at a vector are in no space
    seen = {score.header["subspace"]: len(score.inputs) for score in scores if score.header["stage"] in ("mean", "nearest")}
    spaces = [choice[0] for score in scores for choice in score.inputs if choice[0].kind == "subspace"]
    seen |= {space.name: len(space.header["prompts"]) for space in spaces}
    most = max((seen[row["subspace"]] for row in rows if "(IST)" in row["quantity"]), default=0)
    found, seeds = dict[str, list[Row]](), {(row["quantity"], row["data_seed"]) for row in rows}
    several = Counter(name for name, _ in seeds)  # quantities of several data seeds, each of which is a line
    for row in sorted(rows, key=lambda row: (list(SPACES).index(row["space"]), "(IST)" not in row["quantity"], row["dim"])):
        shown, msf = {**row, "seen_tasks": seen[row["subspace"]]}, "(MSF)" in row["quantity"]
        if (shown["seen_tasks"] != most) if across == "dim" else (msf or "T_train" in row["quantity"]):
            continue
        label = SPACES[row["space"]][0] + ", there and back (MSF)" * msf + STARTS.get(row["start"], "")
        label += f", dim {row['dim']}" if row["dim"] and across != "dim" else ""
        label += f", data seed {row['data_seed']}" if several[row["quantity"]] > 1 else ""
        if any((other["quantity"], other[across]) == (row["quantity"], shown[across]) for other in found.get(label, ())):
            label += f", {row['subspace'][:8]}"  # as the table tells apart what is alike
        found.setdefault(label, []).append(shown)
    return {label: own for label, own in found.items() if across == "dim" or len({row[across] for row in own}) > 1}


def by_number(drawn: Mapping[str, Sequence[Row]], quantity: Quantity, across: str) -> Figure:
    """Draw lines across dim (the paper's figures 3 and 4) or seen_tasks (figure 6), a panel for each quantity of tuned tasks.

    Raises:
        IptError: nothing was tuned in a space, or not in spaces of several numbers of seen tasks, or has no such quantity.
    """
    every = [row for own in drawn.values() for row in own if row[quantity] is not None]
    tuned = list(dict.fromkeys(row["quantity"] for row in every if "(IST)" in row["quantity"]))
    if not tuned:
        where = "a space" if across == "dim" else "spaces of one dim, made of several numbers of seen tasks (--split)"
        told = f"the cache holds no {QUANTITIES[quantity].partition(' (')[0]} of tasks tuned in {where}"
        raise IptError(f"{told}; 'ipt fit-subspace' and 'ipt tune' make them, and --quantity names another figure")
    figure, axes = _figure(6.4, 1 + 0.1 * len(drawn) + 2.4 * len(tuned), len(tuned))
    for ax, panel in zip(np.atleast_1d(axes), tuned, strict=True):
        role = panel.partition("(")[0]
        same_tasks = role.removesuffix("_diff").removesuffix("_same")
        shown = [row for row in every if row["quantity"] in (panel, *(f"{same_tasks}({s})" for s in ("MSF", "nearest", "mean")))]
        _panel(ax, {label: [row for row in shown if row in own] for label, own in drawn.items()}, quantity, across)
        n = max(row["n_tasks"] + (quantity == "gain") * row["n_excluded"] for row in shown if row["quantity"] == panel)
        title = f"{'seen' if 'train' in role else 'unseen'} tasks{', other data' * ('diff' in role)}: {panel}, n={n}"
        ax.set(title=title, ylabel=QUANTITIES[quantity])
    name = f"numbers tuned per task, in spaces made of {every[0]['seen_tasks']} seen tasks"
    ax.set_xlabel(name if across == "dim" else "seen tasks that the space is made of")
    (low, high), values = ax.get_ylim(), [row[quantity] for row in every]
    ax.set_ylim(max(low, min(-1, *values) - 0.05), min(high, max(2, *values) + 0.05))
    title = "bars: 95 % intervals over tasks; one that reaches the edge goes on beyond it"
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2, title=title)
    return figure


def _panel(ax: Any, drawn: Mapping[str, Sequence[Row]], quantity: Quantity, across: str) -> None:
    """Draw lines with intervals; bars at one place stand side by side, and what tunes no number stands left of all."""
    log, numbers, nth = across == "dim", sorted({row[across] for own in drawn.values() for row in own}), dict.fromkeys(SPACES, 0)
    places = {number: float(number) or numbers[1] / 3 for number in numbers}  # a logarithm has no 0
    beside = [label for label, own in drawn.items() if own]  # the others are in the legend alone
    for label, own in drawn.items():
        line = sorted(own, key=lambda row: int(row[across]))
        space = next(key for key in SPACES if label.startswith(SPACES[key][0]))
        (_, colour, marker), again = SPACES[space], nth[space]
        aside = beside.index(label) - (len(beside) - 1) / 2 if own else 0
        step = [
            places[row[across]] * 1.045**aside if log else places[row[across]] + aside * (numbers[-1] - numbers[0]) / 90
            for row in line
        ]
        reach = [[_reach(row, quantity, side) for row in line] for side in ("low", "high")]
        ax.errorbar(
            step, [row[quantity] for row in line], reach, color=colour, marker="^" if again > 1 else marker, label=label,
            linestyle=STROKES[again % 4], markerfacecolor="white" if again else colour, markersize=5, capsize=2, elinewidth=0.8,
        )  # fmt: skip
        nth[space] += 1
    for level in (0, 1):
        ax.axhline(level, color="0.5", linewidth=0.8, zorder=0)
    ax.set_xscale("log" if log else "linear")
    scaled = {number: math.log(at) if log else at for number, at in places.items()}
    apart = numbers[:1]
    for number in numbers[1:]:  # so that what is written below does not overlap
        apart += [number] * (scaled[number] - scaled[apart[-1]] > (scaled[numbers[-1]] - scaled[numbers[0]]) / 14)
    ax.set_xticks([places[number] for number in apart], apart)
    ax.minorticks_off()


def _reach(row: Row, quantity: Quantity, side: str) -> float:
    """Return how far an interval reaches: nowhere for one task alone, out of the picture where it has no end."""
    bound, endless = row[f"{quantity}_{side}"], quantity == "gain" and row["n_tasks"] + row["n_excluded"] > 1
    return 9.0 * endless if bound is None else float(abs(row[quantity] - bound))


def tuned_vectors(x: Experiment, scores: Iterable[Result], dim: int | None) -> tuple[Any, list[str], list[str], list[str]]:
    """Return vectors (tasks, dim), tasks, kinds, roles, in one learned subspace: that with the most tasks, of these the largest.

    Of several vectors of a task one from a random start counts, and of the collection's data.

    Raises:
        IptError: there are vectors of fewer than three tasks.
    """
    found: dict[tuple[int, str], dict[str, Choice]] = {}
    choices = [score.inputs[0] for score in scores if (score.header["stage"], score.header.get("space")) == ("IST", "subspace")]
    for choice in sorted(
        choices, key=lambda it: (it[0].header["start"] != "random", it[0].header["data_seed"] != COLLECTION_SEED)
    ):
        header = choice[0].header
        if dim in (None, header["dim"]):
            found.setdefault((header["dim"], header["subspace"]), {}).setdefault(header["task"], choice)
    own = found[max(found, key=lambda key: (len(found[key]), key))] if found else {}
    if len(own) < 3:
        of_dim = f" of dim {dim}" if dim else ""
        raise IptError(f"the cache holds {len(own)} tasks tuned in one learned subspace{of_dim}, expected 3: run 'ipt tune'")
    vectors = np.stack([x.store.best(choice)[2]["intrinsic_vector"].double().numpy() for choice in own.values()])
    return vectors, list(own), [x.task(task).kind for task in own], [x.roles[task].split("-")[0] for task in own]


def probe(vectors: Any, kinds: Sequence[str]) -> float:
    """Return the share of tasks whose kind ridge regression on vectors (tasks, dim) finds that was fitted on all others."""
    centred, n = vectors - vectors.mean(0), len(vectors)
    products = centred @ centred.T
    products = products * n / max(np.trace(products), 1e-12) + 1  # the 1 is the probe's constant
    fit, truth = products @ np.linalg.inv(products + np.eye(n)), np.unique(kinds, return_inverse=True)[1]
    targets, own = np.eye(n)[truth], np.diag(fit)[:, None]
    left_out = (fit @ targets - own * targets) / (1 - own)  # what the probe fitted without a task says of it
    return float((left_out.argmax(1) == truth).mean())


def about(vectors: Any) -> str:
    """Return what vectors (tasks, dim) are, for a title."""
    return f"intrinsic vectors of {len(vectors)} tasks, {vectors.shape[1]} numbers each"


def _colours(kinds: Iterable[str]) -> dict[str, str]:
    return dict(zip(sorted(set(kinds)), COLOURS * 9, strict=False))


def components(vectors: Any, tasks: Sequence[str], kinds: Sequence[str], roles: Sequence[str]) -> Figure:
    """Draw the first two principal components, coloured by kind, shaped by seen or unseen: the paper's figure 7."""
    left, sizes, _ = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    shares = [*sizes**2 / max((sizes**2).sum(), 1e-12), 0]
    places = np.pad(left * sizes, ((0, 0), (0, 1)))  # one number has no second component
    figure, ax = _figure(6.4, 5)
    for kind, role in sorted(set(zip(kinds, roles, strict=True))):
        at = places[(np.array(kinds) == kind) & (np.array(roles) == role)]
        look = {"marker": "^", "s": 60, "edgecolor": "black"} if role == "unseen" else {"edgecolor": "white"}
        ax.scatter(at[:, 0], at[:, 1], color=_colours(kinds)[kind], label=f"{kind}, {role} ({len(at)})", linewidth=0.8, **look)
    ax.set(xlabel=f"principal component 1 ({shares[0]:.0%} of variance)", ylabel=f"principal component 2 ({shares[1]:.0%})")
    chance = max(Counter(kinds).values()) / len(tasks)
    found = f"linear probe: right kind for {probe(vectors, kinds):.0%} of tasks, each left out once"
    ax.set_title(f"{about(vectors)}\n{found}\n(chance, the share of the largest kind: {chance:.0%})")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def clustered(alike: Any) -> list[int]:
    """Order things by how alike they are (things, things): clusters with the greatest mean similarity are joined first."""
    groups, between = [[n] for n in range(len(alike))], np.array(alike, dtype=float)
    while len(groups) > 1:
        np.fill_diagonal(between, -np.inf)
        a, b = sorted(map(int, np.unravel_index(between.argmax(), between.shape)))
        between[a] = between[:, a] = np.average(between[[a, b]], axis=0, weights=[len(groups[a]), len(groups[b])])
        between = np.delete(np.delete(between, b, 0), b, 1)
        groups[a] += groups.pop(b)
    return groups[0]


def similarity(vectors: Any, tasks: Sequence[str], kinds: Sequence[str], roles: Sequence[str]) -> Figure:
    """Draw the cosines of tasks' vectors less their mean as a matrix in which like tasks stand together."""
    from matplotlib.patches import Patch

    n, colours = len(tasks), _colours(kinds)
    unit = vectors - vectors.mean(0)
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    cosines, others, same = unit @ unit.T, ~np.eye(n, dtype=bool), np.equal.outer(kinds, kinds)
    means = [f"{cosines[others & mask].mean():.2f}" if (others & mask).any() else "-" for mask in (same, ~same)]
    order, row = clustered(cosines), min(0.22, max(0.09, 8 / n))  # inches a row: the names stay apart
    size = min(8, 56 * row)
    figure, ax = _figure(n * row + 2.6 + max(map(len, tasks)) * size * 0.0085, n * row + 1.3)
    shown = np.where(others, cosines[np.ix_(order, order)], np.nan)
    limit = max(0.1, float(np.nanmax(np.abs(shown))))
    image = ax.imshow(shown, cmap="PuOr", vmin=-limit, vmax=limit, interpolation="nearest")
    ax.set(xticks=[], facecolor="0.6")
    ax.set_yticks(range(n), [tasks[i] + " *" * (roles[i] == "unseen") for i in order], fontsize=size)
    for tick, i in zip(ax.get_yticklabels(), order, strict=True):
        tick.set_color(colours[kinds[i]])
    ax.set_title(f"{about(vectors)} (*: unseen)\nmean cosine {means[0]} between tasks of one kind, {means[1]} of two kinds")
    figure.colorbar(image, ax=ax, label="cosine of vectors less their mean", fraction=0.05, aspect=30)
    figure.legend(handles=[Patch(color=c, label=kind) for kind, c in colours.items()], loc="outside lower center", ncols=3)
    return figure
