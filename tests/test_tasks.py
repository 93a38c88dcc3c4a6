"""A tasks file: its order, its names, what is wrong with it; and the samples that no task hands out."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import pytest
from conftest import TASKS_FILE

from intrinsic_prompt_tuning.errors import IptError, nearest
from intrinsic_prompt_tuning.tasks import TASKS_FILE as SHIPPED
from intrinsic_prompt_tuning.tasks import Example, Sample, Task, kept, load_tasks, load_worlds, rows_digest
from intrinsic_prompt_tuning.tasks.checks import check
from intrinsic_prompt_tuning.tasks.examples import check_names


def test_the_nearest_names_are_offered_and_nothing_when_none_is_near() -> None:
    assert nearest("mood-god", ["mood-good", "count-next"]) == "; did you mean 'mood-good'?"
    assert nearest("xyzzy", ["mood-good", "count-next"]) == ""


def test_what_two_types_are_called_alike_is_named_once() -> None:
    with pytest.raises(IptError, match="^here must be a number, not much$"):
        check("much", int | float, "here")


# --- Tasks files ---------------------------------------------------------------------------------


def load(tmp_path: Path, text: str) -> dict[str, Task]:
    file = tmp_path / "own.yaml"
    file.write_text(text, encoding="utf-8")
    return load_tasks(file)


def test_tasks_come_in_the_order_of_the_file_with_all_that_it_says(tasks: dict[str, Task]) -> None:
    assert list(tasks)[:2] == ["mood-good", "animal-class"]
    assert [task.metric for task in tasks.values()] == ["ACC", "Classification-F1", "EM", "QA-F1", "ACC", "ACC", "EM"]
    assert collections.Counter(task.splits["tiny"] for task in tasks.values()) == {"seen": 5, "unseen": 2}
    assert [name for name, task in tasks.items() if task.pretrained] == ["mood-good"]


def test_a_file_holds_tasks_of_worlds_and_of_data_sets_side_by_side(tmp_path: Path) -> None:
    hub = "  mine: {dataset: d, template: '{a}', answer: b, metric: EM, note: by hand, category: other/odd}\n"
    task = load(tmp_path, TASKS_FILE + hub)["mine"]
    assert (task.kind, task.metric, task.category, task.source) == ("free-form", "EM", "other/odd", "d")


def test_all_that_ships_is_read() -> None:
    assert len(load_tasks(SHIPPED)) == 267
    assert list(load_worlds(SHIPPED)) == ["testbed"]


def test_a_file_without_worlds_has_none(tmp_path: Path) -> None:
    assert load(tmp_path, "tasks: {}") == {}
    assert load_worlds(tmp_path / "own.yaml") == {}


ROW = "{world: small, kind: classification, question: mood good"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tasks:", "things:", "expected a mapping with the key 'tasks'"),
        ("tasks:", "tasks: [", "not readable as YAML"),
        ("  mood-good: " + ROW, "  mood-good: " + ROW + ", kind: extraction", "'kind' stands twice in the mapping at line"),
        ("  animal-class:", "  mood-good:", "'mood-good' stands twice in the mapping at line"),
        ("  animal-class:", "  no:", "'False' cannot be a task's name.*quote yes and no"),
        ("  animal-class:", "  a/b:", "'a/b' cannot be a task's name"),
        (ROW, ROW + ", qestion: x", "task mood-good has an unknown field 'qestion'; did you mean 'question'"),
        ("{world: small, kind: class", "{world: smal, kind: class", "no world 'smal' in this file; did you mean 'small'"),
        (
            "kind: transformation, question: count",
            "kind: no, question: count",
            "task count-next: field 'kind' must be text, not false",
        ),
        ("kind: extraction", "kind: extracton", "task thing-plural: field 'kind' is 'extracton'; did you mean 'extraction'"),
        ("question: mood good", "question: no", "task mood-good: field 'question' must be text, not false"),
        (", question: mood good", "", "task mood-good has no field 'question', which every row needs"),
        ("question: thing plural", "question: thing plurals", "task thing-plural: .*'thing plurals'"),
        ("metric: Classification-F1", "metric: Classification-F2", "task animal-class: .*did you mean 'Classification-F1'"),
        ("sees {count.word}", "sees {counts.word}", "world small: .*expected 'sentence'"),
        ("cup cups,", "cup,", "world small: .*as many words in each row"),
        (
            "cup cups,",
            "no,",
            "world small: field 'lexicon', entry 'thing', entry 'rows', entry '1' must be text, not false .*quote it",
        ),
        (
            "columns: [word, plural]",
            "columns: [word, no]",
            "world small: field 'lexicon', entry 'thing', entry 'columns', entry '2' must be text, not false",
        ),
        ("day: day}", "day: days}", "world small: .*days"),
        ("sentence:", "sentense:", "world small has an unknown field 'sentense'; did you mean 'sentence'"),
        ("worlds:", "worlds: []\nother:", "'worlds' must be a mapping, not a list"),
        (
            "splits: {tiny: seen}, pretrained: true",
            "splits: seen, pretrained: true",
            "task mood-good: field 'splits' must be a mapping, not seen",
        ),
        (
            "splits: {tiny: seen}, pretrained: true",
            "splits: {tiny: sean}, pretrained: true",
            "task mood-good: field 'splits', entry 'tiny' is 'sean'; did you mean 'seen'",
        ),
        ("pretrained: true", "pretrained: perhaps", "task mood-good: field 'pretrained' must be true or false, not perhaps"),
        (ROW, "{[a, b]: c, world: small, kind: classification, question: mood good", "own.yaml"),
        ("\ntasks:", "\ntasks:\n  new: [a, b]", "task 'new' is a list, not a mapping of fields"),
        ("\ntasks:", "\ntasks:\n  new:", "task 'new' is empty, not a mapping of fields"),
    ],
)
def test_a_broken_tasks_file_is_refused_with_what_is_wrong_and_where(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert TASKS_FILE.count(old) >= 1
    with pytest.raises(IptError, match=message) as caught:
        load(tmp_path, TASKS_FILE.replace(old, new, 1))
    assert "own.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_tasks_file_and_one_that_is_a_folder_or_not_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00\xff")
    (tmp_path / "empty.yaml").touch()
    (tmp_path / "folder.yaml").mkdir()
    for place in ("empty.yaml", "bytes.yaml", "absent.yaml", "folder.yaml"):
        with pytest.raises(IptError, match=place):
            load_tasks(tmp_path / place)


def test_a_file_nested_too_deeply_and_a_value_too_long_to_show_are_refused_in_one_short_sentence(tmp_path: Path) -> None:
    for text in ("tasks: " + "[" * 5000, TASKS_FILE.replace("kind: extraction", "kind: " + "x" * 5000)):
        (tmp_path / str(len(text))).mkdir()
        with pytest.raises(IptError, match=r"own\.yaml") as caught:
            load(tmp_path / str(len(text)), text)
        assert len(str(caught.value)) < 500 + len(str(tmp_path))


# --- Names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [
    "con", "NUL", "Aux", "prn", "com1", "lpt9", "nul.x", "com1.a.b", ".", "..", ".hidden", "../up", "", "a b", "a/b", "a\\b", "a*", "a\nb", "a\0b",
    "e\u0301", "\u202ename", "\ud800", "a" * 101, "名" * 34, 12, None,
])  # fmt: skip
def test_a_name_that_cannot_name_a_folder_everywhere_is_refused(name: object) -> None:
    with pytest.raises(IptError, match="here: .* cannot be a task's name: expected at most 100 letters"):
        check_names(["good", name], Path("here"))


def test_a_name_may_be_100_long_hold_dots_and_begin_like_a_reserved_one(tmp_path: Path) -> None:
    names = ["a" * 100, "console", "com10", "a.con", "null-x", "v1.5_b-c"]
    text = "".join(f"  {name}: {ROW}}}\n" for name in names)
    assert list(load(tmp_path, TASKS_FILE + text))[-len(names) :] == names


@pytest.mark.parametrize("name", ["MOOD-good", "\uff4dood-good", "moo\ufb01", "\u017f", "\u212a"])
def test_names_that_a_file_system_may_take_for_one_are_refused(name: str) -> None:
    with pytest.raises(
        IptError, match="here: the tasks '.*' and '.*' differ by case only, or by what file systems may fold: rename one"
    ):
        check_names(["mood-good", "moofi", "s", "k", name], Path("here"))


def test_the_longest_name_makes_a_file_everywhere(tmp_path: Path) -> None:
    name = "名" * 33
    check_names([name], tmp_path)
    rows = (Example("i", ("a",)),)
    own = Task(name=name, kind="free-form", metric="EM", source="", definition=1, draw=lambda *_: Sample(rows, rows, rows))
    assert kept(own, tmp_path).sample(2**32 - 1, 10_000, 1).train == rows


# --- Samples -------------------------------------------------------------------------------------

YES, NO = Example("a", ("yes",), ("yes", "no")), Example("b", ("no",), ("yes", "no"))
BOTH = (YES, NO)


def task_of(sample: Sample, kind: str = "classification") -> Task:
    return Task(name="odd", kind=kind, metric="ACC", source="", draw=lambda data_seed, shots, test_rows: sample)


def test_a_good_sample_comes_as_it_was_drawn_for_what_was_asked() -> None:
    asked: list[Any] = []

    def draw(*arguments: Any) -> Sample:
        asked.append(arguments)
        return Sample(BOTH, BOTH[::-1], BOTH)

    task = Task(name="odd", kind="classification", metric="ACC", source="", draw=draw)
    assert task.sample(13, 16, 7) == Sample(BOTH, BOTH[::-1], BOTH)
    assert task.sample(13, 16, None).test == BOTH
    assert asked == [(13, 16, 7), (13, 16, None)]


@pytest.mark.parametrize("part", Sample._fields)
def test_a_part_without_rows_is_refused(part: str) -> None:
    with pytest.raises(IptError, match=f"task 'odd' has no {part} rows for data seed 13"):
        task_of(Sample(BOTH, BOTH, BOTH)._replace(**{part: ()})).sample(13, 16, 5)


def test_no_test_rows_are_right_where_none_are_asked_for() -> None:
    assert task_of(Sample(BOTH, BOTH, ())).sample(13, 16, 0).test == ()
    with pytest.raises(IptError, match="no test rows"):
        task_of(Sample(BOTH, BOTH, ())).sample(13, 16, None)
    with pytest.raises(IptError, match="no train rows"):
        task_of(Sample((), BOTH, ())).sample(13, 16, 0)


@pytest.mark.parametrize("part", Sample._fields)
def test_a_right_answer_that_is_no_option_is_refused(part: str) -> None:
    odd = Example("c", ("maybe", "yes"), ("yes", "no"))
    with pytest.raises(IptError, match=rf"task 'odd': a {part} row has the answer 'maybe', which is none of \('yes', 'no'\)"):
        task_of(Sample(BOTH, BOTH, BOTH)._replace(**{part: (YES, odd)})).sample(13, 16, None)
    free = Example("c", ("maybe",))
    assert task_of(Sample((free,), (free,), (free,)), "free-form").sample(13, 16, None).train == (free,)


def test_a_classification_of_one_label_is_refused_when_it_has_more_than_nine_test_rows() -> None:
    with pytest.raises(IptError, match="task 'odd': all 10 test rows have the label 'yes', so no score means anything"):
        task_of(Sample(BOTH, BOTH, (YES,) * 10)).sample(13, 16, None)
    assert task_of(Sample(BOTH, BOTH, (YES,) * 9)).sample(13, 16, None).test == (YES,) * 9
    assert task_of(Sample(BOTH, BOTH, (YES,) * 10), "multiple-choice").sample(13, 16, None).test == (YES,) * 10
    assert len(task_of(Sample(BOTH, BOTH, (*(YES,) * 10, NO))).sample(13, 16, None).test) == 11


def test_rows_have_a_name_that_changes_with_all_that_they_hold_and_with_their_order() -> None:
    row = Example("a", ("yes", "y"), ("yes", "no"), 1)
    others = [Example("b", row.answers, row.options, 1), Example("a", ("y", "yes"), row.options, 1)]
    others += [Example("a", row.answers, ("no", "yes"), 1), Example("a", row.answers, row.options, 0)]
    names = [rows_digest([row]), *(rows_digest([other]) for other in others), rows_digest([row, YES]), rows_digest([YES, row])]
    assert len(set(names)) == len(names)
    assert rows_digest([row]) == rows_digest(iter([row]))
