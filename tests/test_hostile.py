"""What people can write wrongly, as attacks on the rooms about tasks found it: each ends in one sentence."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TASKS_FILE

from intrinsic_prompt_tuning.errors import IptError
from intrinsic_prompt_tuning.tasks import Example, Sample, Task, find_few_shot_tasks, kept, load_tasks, split_tasks
from intrinsic_prompt_tuning.tasks.folders import parse_input
from intrinsic_prompt_tuning.tasks.hub import hub_task

ROW = {"dataset": "d", "template": "{a}", "answer": "b", "metric": "ACC"}


def load(folder: Path, text: str, name: str = "own") -> Any:
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return load_tasks(folder / f"{name}.yaml")


def local(folder: Path, **fields: Any) -> Any:
    rows = [{"text": f"t{n}", "label": n % 2, "opts": ["a", "b"], "empty": [], "num": 3} for n in range(10)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    row = {"dataset": "json", "data_files": {"train": "rows.jsonl"}, "template": "{text}", "answer": "label", "metric": "ACC"}
    return hub_task("mine", row | {"train": "train[:80%]", "test": "train[80%:]"} | fields, folder / "my.yaml")


# --- test_folders.py -----------------------------------------------------------------------------


def test_another_order_of_words_or_slots_has_another_name(tmp_path: Path) -> None:
    for words in ({"0": "no", "1": "yes"}, {"1": "yes", "0": "no"}):
        task = hub_task("x", ROW | {"verbalizer": words}, Path("f.yaml"))
        rows = tuple(Example("i", (word,), task.words) for word in task.words)
        own = dataclasses.replace(task, draw=lambda *_, rows=rows: Sample(rows, rows, rows))
        assert kept(own, tmp_path).sample(1, 1, 1) == own.sample(1, 1, 1)
    for name, slots in enumerate(("mood: mood, animal: animal", "animal: animal, mood: mood")):
        task = load(tmp_path, TASKS_FILE.replace("mood: mood, animal: animal", slots), str(name))["count-next"]
        assert kept(task, tmp_path).sample(1, 4, 4) == task.sample(1, 4, 4)


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("keep: {a: [2020-01-01]}", True), ("verbalizer: {0: a, x: b}", True), ("reader: {since: 2020-01-01}", True),
        ("splits: {1: seen, a: seen}", False),
    ],
)  # fmt: skip
def test_whatever_yaml_can_say_in_a_row_can_be_kept_or_is_refused(tmp_path: Path, text: str, good: bool) -> None:
    rows = (Example("i", ("a",)),)
    if not good:
        with pytest.raises(IptError):
            hub_task("x", ROW | yaml.safe_load(text), Path("f.yaml"))
        return
    task = hub_task("x", ROW | yaml.safe_load(text), Path("f.yaml"))
    assert kept(dataclasses.replace(task, draw=lambda *_: Sample(rows, rows, rows)), tmp_path).sample(1, 1, 1).train == rows


def test_a_row_that_reads_a_local_file_beside_others_or_by_a_file_url_is_not_kept(tmp_path: Path) -> None:
    for files in (
        {"train": "a.csv", "validation": "https://example.org/b.csv"},
        {"train": "file:///a.csv", "validation": "file:///b.csv"},
    ):
        assert hub_task("x", ROW | {"dataset": "csv", "data_files": files}, Path("f.yaml")).definition is None
    assert hub_task("x", ROW | {"dataset": str(tmp_path)}, Path("f.yaml")).definition is None


def test_a_seed_without_train_rows_and_a_file_that_is_no_test_file_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "n").mkdir()
    for name in ("n_16_13_train.tsv", "n_16_13_dev.tsv", "n_16_21_dev.tsv", "old_test.txt"):
        (tmp_path / "n" / name).write_text("a\tb\n")
    assert find_few_shot_tasks(tmp_path, {})["n"].source == "few-shot files, K 16, data seeds 13, no test rows"


def test_names_in_a_folder_are_those_that_a_tasks_file_may_have(tmp_path: Path) -> None:
    for name in ("a", "A"):
        (tmp_path / name).mkdir()
        for part in ("train", "dev"):
            (tmp_path / name / f"{name}_16_13_{part}.tsv").write_text("a\tb\n")
    with pytest.raises(IptError, match="differ by case only"):
        find_few_shot_tasks(tmp_path, {})


# --- test_worlds.py ------------------------------------------------------------------------------


@pytest.mark.usefixtures("little_memory")
def test_options_that_no_sentence_answers_do_not_take_forever(tmp_path: Path) -> None:
    text = TASKS_FILE.replace("multiple-choice, question: mood opposite", "multiple-choice, question: mood good then mood good")
    assert len(load(tmp_path, text)["mood-opposite-choice"].sample(1, 4, 4).test) == 4


def test_half_a_character_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IptError):
        load(tmp_path, TASKS_FILE.replace("fox beast", '"\\uD800 beast"'))["mood-good"].sample(1, 4, 4)


# --- test_tasks.py -------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), [
    ("  small:\n", "  1:\n"), ("splits: {tiny: seen}", "splits: {20: seen}"),
    ("      mood:\n", "      no: {columns: [a], rows: [b]}\n      mood:\n"),
])  # fmt: skip
def test_keys_that_are_no_text_are_refused(tmp_path: Path, old: str, new: str) -> None:
    with pytest.raises(IptError, match=r"own\.yaml"):
        tasks = load(tmp_path, TASKS_FILE.replace(old, new, 1))
        kept(tasks["mood-good"], tmp_path).sample(1, 4, 4)
        split_tasks(tasks, "tiny")


# --- test_hub.py ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [
    {"transform": "merge"}, {"transform": ["pair", "text"]}, {"transform": [["merge"]]}, {"transform": ["band", "text", 1, 2]},
    {"transform": "proto_qa"}, {"replace": {"t": "{"}}, {"replace": {"t": "{text:>9}"}}, {"options": "opts", "answer": "empty"},
    {"options": "opts", "option_labels": "num", "template": "{text}{options}"},
])  # fmt: skip
def test_a_row_that_does_not_fit_its_data_ends_in_one_sentence(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(IptError, match=r"my\.yaml: task 'mine'"):
        local(tmp_path, **fields).sample(42, 1, 1)


def test_choices_in_a_message_name_no_empty_one() -> None:
    with pytest.raises(IptError, match="it can be classification, multiple-choice, free-form"):
        hub_task("x", ROW | {"kind": "clasification"}, Path("f.yaml"))


# --- YAML ----------------------------------------------------------------------------------------

LEVELS = "".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]\n" for n in range(1, 12))
BOMB = f"x0: &x0 [lol]\n{LEVELS}"
"""Eleven lines that stand for 31 thousand million."""
MERGES = "m0: &m0 {k: v}\n" + "".join(f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}\n" for n in range(1, 12))


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Let this process take at most 2 GB more than it has, and 20 seconds."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if Path("/proc/self").exists() else 0
    if now:
        resource.setrlimit(resource.RLIMIT_AS, (now + (2 << 30), before[1]))
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("takes too long"))
    signal.alarm(20)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("text", [
    *(BOMB + f"tasks:\n  t: {{dataset: d, template: '{{a}}', answer: b, metric: ACC, {field}}}\n" for field in (
        "reader: {x: *x11}", "keep: {x: *x11}", "transform: *x11", "transform: [pair, *x11]", "verbalizer: {a: *x11}", "note: *x11",
        "options: *x11", "data_files: *x11", "clean: {x: *x11}", "*x11 : x",
    )),
    BOMB + "worlds: *x11\ntasks: {}\n", BOMB + "few: *x11\ntasks: {}\n", BOMB + "tasks: *x11\n",
    MERGES + "tasks: {}\n", "tasks:\n  ? &a [*a]\n  : 1\n", "tasks: &a {t: *a}\n",
    *(f"tasks:\n  t: {{dataset: d, template: '{{a}}', answer: b, metric: ACC, {field}}}\n" for field in (
        "keep: {x: &x [*x]}", "reader: &x {x: *x}", "transform: &x [*x]", 'template: "\\uD800{a}"', 'verbalizer: {a: "\\uDFFF"}',
        f"note: {'1' * 5000}", f"note: 1{':59' * 5000}",
    )),
    "tasks: !!python/object/apply:os.system ['exit 1']\n", "tasks: !!python/name:os.system\n", "tasks: !!python/object/new:ipt.x []\n",
    "tasks: !!binary AAAA\n", "tasks: !<x> y\n", "%YAML 9.9\n---\ntasks: {}\n...\n---\ntasks: {}\n", "tasks: {" + "a: {" * 3000,
    "tasks: {}\n\0", "\ufefftasks: [\n", "tasks: {t: !!set {a, b}}\n", "tasks: {t: !!pairs [a: 1, a: 2]}\n", "tasks: !!omap [t: {}]\n",
])  # fmt: skip
def test_hostile_yaml_is_refused_in_a_short_sentence_at_once(tmp_path: Path, text: str) -> None:
    with pytest.raises(IptError, match=r"own\.yaml") as caught:
        load(tmp_path, text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700 + len(str(tmp_path))


def test_aliases_of_an_honest_file_are_read(tmp_path: Path) -> None:
    words = "verbalizer: &words {'0': no, '1': yes}".replace("no", "'no'").replace("yes", "'yes'")
    row = "dataset: d, template: '{a}', answer: b, metric: ACC"
    tasks = load(tmp_path, f"tasks:\n  one: {{{row}, {words}}}\n  two: {{{row}, verbalizer: *words}}\n")
    assert tasks["one"].words == tasks["two"].words == ("no", "yes")


# --- Templates -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("place", [
    "{text.__class__}", "{text:>999999999}", "{text!r}", "{0}", "{}", "{text[0]}", "{text.__init__.__globals__}", "{__class__.__mro__}",
    "{text:{text}}", "{", "}", "{text!r:>{label}}",
])  # fmt: skip
@pytest.mark.parametrize("field", ["template", "option_style", "replace"])
def test_a_template_puts_text_into_places_and_nothing_else(tmp_path: Path, field: str, place: str) -> None:
    fields: dict[str, Any] = {field: {"t": place} if field == "replace" else place}
    with pytest.raises(
        IptError, match=r"my\.yaml: task 'mine'(: (template|option_style) names '.*'|.*cannot be read|.*a bare {column})"
    ):
        local(tmp_path, **fields).sample(42, 1, 1)


# --- What runs code, or writes elsewhere ---------------------------------------------------------


@pytest.mark.parametrize("fields", [
    {"dataset": "pandas", "data_files": {"train": "rows.pkl"}}, {"reader": {"cache_dir": "/tmp/elsewhere"}}, {"reader": {"num_proc": 99999}},
    {"reader": {"storage_options": {"a": "b"}}}, {"reader": {"download_config": {}}},
])  # fmt: skip
def test_a_row_reads_no_pickles_and_says_not_where_files_are_kept(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(IptError, match=r"my\.yaml: task 'mine': dataset 'pandas', and a 'reader' with .* are not allowed"):
        local(tmp_path, **fields)


# --- Few-shot files ------------------------------------------------------------------------------


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("part", ["train", "test"])
def test_a_device_a_pipe_and_a_link_to_itself_are_no_few_shot_files(tmp_path: Path, part: str) -> None:
    (tmp_path / "boolq").mkdir()
    for name in ("train", "dev", "test"):
        (tmp_path / "boolq" / f"boolq_16_13_{name}.jsonl").write_text('{"input": "i", "output": "o"}\n')
    file = tmp_path / "boolq" / f"boolq_16_13_{part}.jsonl"
    for make in (lambda: file.symlink_to("/dev/zero"), lambda: os.mkfifo(file), lambda: file.symlink_to(file)):
        file.unlink()
        make()
        with pytest.raises(IptError, match=rf"boolq_16_13_{part}\.jsonl cannot be read: it is no file"):
            find_few_shot_tasks(tmp_path, {})["boolq"].sample(13, 16, None)


@pytest.mark.parametrize(
    "line",
    ['{"input": "\\ud800"}', '{"input": 5}', '{"input": "a", "options": [5]}', '{"input": "a", "options": 5}', "{" * 99_999],
)
def test_a_hostile_input_line_is_refused(line: str) -> None:
    task = Task(name="t", kind="free-form", metric="EM", draw=lambda *_: Sample((), (), ()), source="")
    with pytest.raises(IptError, match="^expected text"):
        parse_input({"t": task}, "t", line)
