"""Splits: which tasks are seen, by a name of tasks.yaml or a file of the user's."""

from __future__ import annotations

import collections
from dataclasses import replace
from pathlib import Path

import pytest

from intrinsic_prompt_tuning.errors import IptError
from intrinsic_prompt_tuning.tasks import TASKS_FILE, Task, load_tasks, split_tasks

TASKS = load_tasks(TASKS_FILE)

# --- Splits of tasks.yaml ------------------------------------------------------------------------


def count(name: str) -> dict[str, int]:
    return dict(collections.Counter(split_tasks(TASKS, name).values()))


def test_the_papers_splits_have_its_sizes() -> None:
    assert count("random") == {"seen": 100, "unseen": 20}
    assert count("cls") == {"seen": 35, "unseen-in": 8, "unseen-out": 76}  # the paper counts 77 without discovery's place
    assert count("non-cls") == {"seen": 35, "unseen-in": 41, "unseen-out": 43}
    assert [count(f"random-{size}") for size in (20, 40, 60, 80)] == [{"seen": size, "unseen": 20} for size in (20, 40, 60, 80)]


def test_smaller_splits_have_roles_of_random() -> None:
    random = split_tasks(TASKS, "random")
    assert all(split_tasks(TASKS, f"random-{size}").items() <= random.items() for size in (20, 40, 60, 80))


def test_leaving_a_type_out_makes_all_its_tasks_unseen() -> None:
    roles = split_tasks(TASKS, "without-nli")
    assert collections.Counter(roles.values()) == {"seen": 94, "unseen": 7}
    assert {name for name, role in roles.items() if role == "unseen"} == {
        name for name in roles if TASKS[name].category == "cls/nli"
    }


def test_a_split_names_its_tasks_in_the_order_of_the_file(tasks: dict[str, Task]) -> None:
    roles = split_tasks(tasks, "tiny")
    assert list(roles) == list(tasks)
    assert [name for name, role in roles.items() if role == "unseen"] == ["even-or-good", "day-then-count"]


def test_an_unknown_split_names_the_nearest_all_others_and_the_way_to_an_own_one(tasks: dict[str, Task]) -> None:
    with pytest.raises(IptError, match="there is no task split 'randon'; did you mean 'random'"):
        split_tasks(TASKS, "randon")
    with pytest.raises(IptError, match=r"'tinny'; did you mean 'tiny'\?; there are tiny, or a file: --split mine\.yaml"):
        split_tasks(tasks, "tinny")


# --- A user's own --------------------------------------------------------------------------------


def split_of(tmp_path: Path, text: str, suffix: str = "yaml") -> dict[str, str]:
    file = tmp_path / f"mine.{suffix}"
    file.write_text(text, encoding="utf-8")
    return split_tasks(TASKS, str(file))


def test_a_users_own_list_of_tasks_is_a_split(tmp_path: Path) -> None:
    expected = {"glue-sst2": "seen", "anli": "seen", "piqa": "unseen"}
    assert split_of(tmp_path, "seen: [glue-sst2, anli]\nunseen: [piqa]\n") == expected
    assert split_of(tmp_path, "{unseen-in: [anli], unseen-out: [piqa], seen: []}", "yml") == {
        "anli": "unseen-in",
        "piqa": "unseen-out",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seen: [glue-sst3]", r"mine\.yaml: there is no task 'glue-sst3'; did you mean 'glue-sst2'"),
        ("sen: [anli]", r"mine\.yaml, the name of an entry is 'sen'; did you mean 'seen' or 'unseen'\?; it can be seen, unseen"),
        ("1: [anli]", r"mine\.yaml, the name of an entry must be text, not 1"),
        ("seen: [anli]\nunseen: [anli]", r"mine\.yaml: task 'anli' stands twice, under seen and unseen: remove one"),
        ("seen: [anli, anli]", r"mine\.yaml: task 'anli' stands twice, under seen and seen: remove one"),
        ("seen: [anli]\nseen: [piqa]", r"mine\.yaml: 'seen' stands twice in the mapping at line 1"),
        ("seen: anli", r"mine\.yaml, entry 'seen' must be a list, not anli"),
        ("seen: {anli: piqa}", r"mine\.yaml, entry 'seen' must be a list, not a mapping"),
        ("seen: [anli]\nunseen:", r"mine\.yaml, entry 'unseen' must be a list, not empty"),
        ("seen: [no]", r"mine\.yaml, entry 'seen', entry '1' must be text, not false"),
        ("seen: [[anli]]", r"mine\.yaml, entry 'seen', entry '1' must be text, not a list"),
        ("{seen: [], unseen: []}", r"mine\.yaml names no task: expected lists such as \{seen: \[glue-sst2, anli\], unseen:"),
        ("{}", r"mine\.yaml names no task: expected lists"),
        ("[anli]", r"mine\.yaml: expected a mapping, got a list"),
        ("", r"mine\.yaml: expected a mapping, got empty"),
        ("seen: [anli", r"mine\.yaml is not readable as YAML"),
    ],
)  # fmt: skip
def test_a_wrong_list_of_tasks_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(IptError, match=message) as caught:
        split_of(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_a_list_of_tasks_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IptError, match=r"there is no file .*mine\.yaml"):
        split_tasks(TASKS, str(tmp_path / "mine.yaml"))


def test_a_task_of_random_without_a_type_makes_no_split_that_leaves_it_out() -> None:
    odd = replace(TASKS["anli"], category="")
    with pytest.raises(IptError, match="there are cls, non-cls, random, random-40, random-80, or a file"):
        split_tasks({"anli": odd}, "without-")
