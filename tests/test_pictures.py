"""The pictures show the table's figures; nothing written lies over anything else; what is lacking is one sentence."""

from __future__ import annotations

import io
import itertools
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import matplotlib.image
import numpy as np
import pytest
import scipy.cluster.hierarchy
import scipy.spatial.distance
import torch
from conftest import Cli, Result, run_ipt

from intrinsic_prompt_tuning import results
from intrinsic_prompt_tuning.errors import IptError
from intrinsic_prompt_tuning.pictures import STYLE, by_number, clustered, components, lines, probe, similarity, tuned_vectors
from intrinsic_prompt_tuning.tasks import TASKS_FILE, load_tasks

SHORT = ("--steps", 4, "--evaluations", 2)


@pytest.fixture(scope="module")
def finished(shared_options: list[object], tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """Return a way to run commands on a cache with subspaces of two dims, and one of fewer seen tasks."""
    folder = tmp_path_factory.mktemp("finished")
    fewer = folder / "fewer.yaml"
    fewer.write_text("{seen: [mood-good, animal-class, count-next], unseen: [even-or-good, day-then-count]}", encoding="utf-8")

    def cli(command: str, *arguments: object) -> Result:
        done = run_ipt(command, *shared_options, "--cache", folder / "cache", *arguments)
        assert "Traceback" not in done.err
        return done

    wide = ("--dim", 6, "--dim", 4)
    for command in (
        ("collect", "--steps", 60, "--learning-rate", 0.3), ("fit-subspace", *wide, "--subspace-steps", 3), ("tune", *SHORT, *wide, "--seen", "--data-seed", 21),
        ("tune", *SHORT, *wide, "--unseen"), ("tune", *SHORT, *wide, "--unseen", "--space", "random"),
        ("collect", *SHORT, "--start", "subspace", "--task", "day-then-count"),  # in the table, in no picture
        ("fit-subspace", "--split", fewer, "--dim", 4, "--subspace-steps", 3),
    ):  # fmt: skip
        assert cli(*command).code == 0, command
    assert cli("tune", *SHORT, "--split", fewer, "--dim", 4, "--unseen").code == 0
    return cli


def test_every_picture_is_drawn_as_png_and_svg_and_again_the_same(finished: Cli, tmp_path: Path) -> None:
    for out in ("a", "b"):
        done = finished("plot", "--out", tmp_path / out, "--format", "png", "--format", "svg")
        assert done.code == 0, done.err
        assert "not drawn" not in done.err
    names = {f"{name}.{kind}" for name in ("dimensions", "seen-tasks", "components", "similarity") for kind in ("png", "svg")}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names
    for name in names:
        content = (tmp_path / "a" / name).read_bytes()
        assert content == (tmp_path / "b" / name).read_bytes(), name
        if name.endswith("png"):
            assert content.startswith(b"\x89PNG")
        else:
            assert ElementTree.fromstring(content).tag.endswith("svg")


def test_only_the_wanted_picture_is_drawn_and_gain_is_another_picture_than_e_rel(finished: Cli, tmp_path: Path) -> None:
    for quantity in ("e_rel", "gain"):
        assert finished("plot", "dimensions", "--quantity", quantity, "--out", tmp_path / quantity).code == 0
        assert [path.name for path in (tmp_path / quantity).iterdir()] == ["dimensions.png"]
    assert (tmp_path / "gain" / "dimensions.png").read_bytes() != (tmp_path / "e_rel" / "dimensions.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("components", "--dim", 5), r"holds 0 tasks tuned in one learned subspace of dim 5, expected 3: run 'ipt tune'"),
        (("--out", TASKS_FILE), r"cannot write .*dimensions.png: .*; name another folder with --cache or --out"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(finished: Cli, arguments: tuple[object, ...], said: str) -> None:
    done = finished("plot", *arguments)
    assert done.code == 1
    assert re.search(f"^error: .*{said}", done.err.splitlines()[-1]), done.err


def test_a_picture_is_said_to_lack_what_a_younger_cache_does_not_hold(cli: Cli, tmp_path: Path) -> None:
    assert cli("collect", *SHORT).code == 0
    assert cli("fit-subspace", "--dim", 4, "--subspace-steps", 2).code == 0
    done = cli("plot", "--out", tmp_path / "out")
    assert done.code == 0
    assert len(re.findall(r"not drawn: (?:dimensions|seen-tasks|components|similarity): the cache holds", done.err)) == 4
    assert not (tmp_path / "out").exists()
    assert cli("plot", "seen-tasks").code == 1


def test_without_matplotlib_one_sentence_comes_before_any_work(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = cli("plot")
    assert (done.code, done.err) == (
        1,
        "error: pictures need the package matplotlib: pip install 'intrinsic-prompt-tuning[plot]'\n",
    )
    assert not (tmp_path / "cache").exists()


# --- What they show ------------------------------------------------------------------------------


def row_of(quantity: str, space: str, dim: int, value: float | None, **more: Any) -> dict[str, Any]:
    bounds = {f"{name}{side}": None if value is None else value + by for name in ("e_rel", "gain") for side, by in
              (("", 0), ("_low", -0.2), ("_high", 0.1))}  # fmt: skip
    about = {"quantity": quantity, "space": space, "dim": dim, "n_tasks": 20, "n_excluded": 1, "seen_tasks": 100}
    return about | bounds | more


def drawn(axes: Any) -> dict[str, list[tuple[float, float]]]:
    """Return label -> height and length of the interval of each point of the lines in axes."""
    found = {}
    for container in axes.containers:
        (bars,) = container[2]
        lengths = [segment[1][1] - segment[0][1] for segment in bars.get_segments() if len(segment)]
        found[container.get_label()] = list(zip(container[0].get_ydata(), lengths, strict=True))
    return found


def test_lines_show_values_and_intervals_of_their_panel_s_tasks_and_nothing_without_a_value() -> None:
    lines = {
        "learned subspace": [row_of("T_test(IST)", "subspace", dim, v) for dim, v in ((250, 0.9), (10, 0.6), (50, None))]
        + [row_of("T_train_diff(IST)", "subspace", 10, 0.8)],
        "nearest seen prompt": [row_of("T_test(nearest)", "nearest", 0, 0.5)],
    }
    figure = by_number(lines, "gain", "dim")
    test, train = figure.axes
    assert drawn(test) == {
        "learned subspace": [(0.6, pytest.approx(0.3)), (0.9, pytest.approx(0.3))],
        "nearest seen prompt": [(0.5, pytest.approx(0.3))],
    }
    assert drawn(train)["learned subspace"] == [(0.8, pytest.approx(0.3))]
    assert test.get_title() == "unseen tasks: T_test(IST), n=21"
    assert train.get_title() == "seen tasks, other data: T_train_diff(IST), n=21"
    assert [tick.get_text() for tick in test.get_xticklabels()] == ["0", "10", "250"]


def test_a_panel_s_number_of_tasks_is_that_of_what_was_tuned() -> None:
    rows = [row_of("T_test(IST)", "subspace", 10, 0.6, n_tasks=3, n_excluded=0), row_of("T_test(MSF)", "subspace", 10, 0.5)]
    (axes,) = by_number({"learned subspace": rows}, "gain", "dim").axes
    assert axes.get_title() == "unseen tasks: T_test(IST), n=3"


def test_each_data_seed_is_a_line() -> None:
    of = {"start": "random", "subspace": "0123456789"}
    tuned = [row_of("T_train_diff(IST)", "subspace", dim, 0.6, data_seed=seed, **of) for dim, seed in ((4, 21), (4, 13), (2, 21))]
    score = results.Result({"kind": "score", "stage": "mean", "subspace": of["subspace"]})
    found = lines(tuned, [score], "dim")
    told = {label: [(row["dim"], row["data_seed"]) for row in own] for label, own in found.items()}
    assert told == {"learned subspace, data seed 21": [(2, 21), (4, 21)], "learned subspace, data seed 13": [(4, 13)]}


def test_an_interval_without_an_end_leaves_the_picture_and_one_task_alone_has_none() -> None:
    endless = row_of("T_test(IST)", "subspace", 10, 0.5, gain_high=None)
    (axes,) = by_number({"learned subspace": [endless]}, "gain", "dim").axes
    ((_, length),) = drawn(axes)["learned subspace"]
    assert 0.5 + length > axes.get_ylim()[1]
    alone = endless | {"gain_low": None, "n_tasks": 1, "n_excluded": 0}
    (axes,) = by_number({"learned subspace": [alone]}, "gain", "dim").axes
    assert drawn(axes)["learned subspace"] == [(0.5, 0)]
    far = row_of("T_test(IST)", "subspace", 10, -3.0)
    (axes,) = by_number({"learned subspace": [far]}, "gain", "dim").axes
    assert axes.get_ylim()[0] < -3, "a point is never outside"


def test_what_has_no_gain_is_not_said_to_be_untuned() -> None:
    with pytest.raises(IptError, match=r"holds no gain of tasks tuned in a space; .* and --quantity names another figure"):
        by_number({"learned subspace": [row_of("T_test(IST)", "subspace", 10, None)]}, "gain", "dim")


def many(tasks: int, dim: int, seed: int = 0) -> tuple[Any, list[str], list[str], list[str]]:
    names = list(load_tasks(TASKS_FILE))[:tasks]
    names[0] = "x" * max(map(len, names))
    kinds = [("classification", "multiple-choice", "free-form")[n % 3] for n in range(tasks)]
    roles = ["unseen" if n % 5 == 0 else "seen" for n in range(tasks)]
    return np.random.default_rng(seed).normal(size=(tasks, dim)), names, kinds, roles


def assert_whole(figure: Any) -> None:
    """Check that nothing is cut off: what is farthest out is white on all sides."""
    figure.savefig(file := io.BytesIO(), format="png")
    file.seek(0)
    pixels = matplotlib.image.imread(file)[..., :3]
    assert all((side == 1).all() for side in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))


def boxes(figure: Any, texts: list[Any]) -> list[Any]:
    figure.draw_without_rendering()
    return [text.get_window_extent() for text in texts if text.get_text()]


@pytest.mark.parametrize("tasks", [3, 17, 45, 147])
def test_no_names_of_tasks_lie_over_each_other_or_leave_the_picture(tasks: int) -> None:
    with matplotlib.rc_context(STYLE):
        figure = similarity(*many(tasks, 6))
        axes, legend = figure.axes[0], figure.legends[0]
        assert_whole(figure)
        found = boxes(figure, [*axes.get_yticklabels(), axes.title, *legend.get_texts()])
    assert len(found) == tasks + 1 + 3
    assert not [(a, b) for a, b in itertools.combinations(found, 2) if a.overlaps(b) and a.shrunk(1, 0.8).overlaps(b)]


@pytest.mark.parametrize("dim", [1, 2, 250])
def test_components_show_every_task_once_and_all_that_is_written(dim: int) -> None:
    with matplotlib.rc_context(STYLE):
        figure = components(*many(120, dim))
        axes, legend = figure.axes[0], figure.legends[0]
        assert_whole(figure)
        found = boxes(figure, [axes.title, axes.xaxis.label, axes.yaxis.label, *legend.get_texts()])
    assert sum(len(shown.get_offsets()) for shown in axes.collections) == 120
    assert not [(a, b) for a, b in itertools.combinations(found, 2) if a.overlaps(b)]


@pytest.mark.parametrize("log", [True, False])
def test_nothing_written_beside_lines_lies_over_anything_else(log: bool) -> None:
    across, dims = ("dim", (1, 5, 10, 50, 100, 250, 264, 1000, 1210)) if log else ("seen_tasks", (2, 20, 40, 60, 80, 99, 100))
    lines = {
        f"{space}, start as seen, dim {n}": [row_of(f"T_test{w}(IST)", "subspace", d, 0.7, seen_tasks=d) for d in dims for w in ("", "_in")]
        for n, space in enumerate(("learned subspace", "learned subspace, there and back (MSF)", "random space", "mean seen prompt"))
    }  # fmt: skip
    with matplotlib.rc_context(STYLE):
        figure = by_number(lines, "e_rel", across)
        texts = [
            text for axes in figure.axes for text in (*axes.get_xticklabels(), axes.title, axes.xaxis.label, axes.yaxis.label)
        ]
        assert_whole(figure)
        found = boxes(figure, [*texts, *figure.legends[0].get_texts(), figure.legends[0].get_title()])
    assert not [(a, b) for a, b in itertools.combinations(found, 2) if a.overlaps(b)]


# --- The numbers beside them ---------------------------------------------------------------------


def test_the_probe_is_fitted_without_the_task_that_it_is_asked_about() -> None:
    vectors, _, kinds, _ = many(21, 4)
    vectors[:, 0] += np.unique(kinds, return_inverse=True)[1]
    centred = vectors - vectors.mean(0)
    scale = (centred**2).sum() / len(vectors)
    features = np.hstack([centred / scale**0.5, np.ones((len(vectors), 1))])
    known = sorted(set(kinds))
    right = 0
    for n, kind in enumerate(kinds):
        others = np.arange(len(kinds)) != n
        targets = np.array([[own == k for k in known] for own in kinds], dtype=float)[others]
        weights = np.linalg.solve(features[others].T @ features[others] + np.eye(5), features[others].T @ targets)
        right += known[int((features[n] @ weights).argmax())] == kind
    assert 0 < right < 21
    assert probe(vectors, kinds) == pytest.approx(right / 21)


def test_the_probe_finds_kinds_that_lie_apart_and_no_others() -> None:
    vectors, _, kinds, _ = many(60, 8)
    assert probe(vectors, kinds) < 0.6
    assert probe(vectors + 9 * np.eye(3, 8)[np.unique(kinds, return_inverse=True)[1]], kinds) == 1


def test_tasks_are_ordered_as_scipy_s_average_linkage_joins_them() -> None:
    points = np.random.default_rng(1).normal(size=(40, 3))
    distances = scipy.spatial.distance.pdist(points)
    order = clustered(-scipy.spatial.distance.squareform(distances))
    assert sorted(order) == list(range(40))
    members = {n: {n} for n in range(40)}
    for n, (a, b, *_) in enumerate(scipy.cluster.hierarchy.linkage(distances, "average")):
        members[40 + n] = members[int(a)] | members[int(b)]
        at = sorted(order.index(one) for one in members[40 + n])
        assert at == list(range(at[0], at[0] + len(at))), "a cluster stands together"


def tuned_score(
    task: str, dim: int, subspace: str, start: str = "random", seed: int = 100, space: str = "subspace"
) -> results.Result:
    """Return the score of a vector, whose numbers a stub of the store reads off its header."""
    about = {"task": task, "dim": dim, "subspace": subspace, "start": start, "data_seed": seed}
    vector = results.Result({"kind": "intrinsic-vector", **about})
    return results.Result({"kind": "score", "stage": "IST", "space": space, **about}, ((vector,),))


def test_vectors_are_those_of_the_learned_subspace_with_the_most_tasks_and_of_these_the_largest() -> None:
    names = ["mood", "animal", "count", "thing"]
    x: Any = SimpleNamespace(
        store=SimpleNamespace(best=lambda choice: (None, {}, {"intrinsic_vector": torch.full((choice[0].header["dim"],),
            float(choice[0].header["data_seed"] + (choice[0].header["start"] != "random")))})),
        task=lambda name: SimpleNamespace(kind=f"kind of {name}"), roles=dict.fromkeys(names, "seen"),
    )  # fmt: skip
    scores = [tuned_score(name, dim, f"s{dim}") for dim in (4, 6) for name in names]
    scores += [tuned_score(name, 9, "s9") for name in names[:3]]
    scores += [tuned_score(name, 12, "r12", space="random") for name in names]
    scores += [tuned_score("mood", 6, "s6", seed=21), tuned_score("mood", 6, "s6", start="nearest")]
    for order in (scores, scores[::-1]):
        for dim, shape in ((None, (4, 6)), (4, (4, 4)), (9, (3, 9))):
            vectors, tasks, kinds, _ = tuned_vectors(x, order, dim)
            assert vectors.shape == shape and (vectors == 100).all() and kinds == [f"kind of {task}" for task in tasks]
    with pytest.raises(IptError, match="holds 0 tasks tuned in one learned subspace of dim 12, expected 3"):
        tuned_vectors(x, scores, 12)
