"""What people can write wrongly, as attacks on the rooms about tasks found it: each ends in one sentence."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TASKS_FILE

from intrinsic_prompt_tuning.errors import IptError
from intrinsic_prompt_tuning.tasks import (
    Example,
    Sample,
    find_few_shot_tasks,
    kept,
    load_tasks,
    missing_files,
    split_tasks,
    subsets,
)
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
    "text", ["keep: {a: [2020-01-01]}", "verbalizer: {0: a, x: b}", "reader: {since: 2020-01-01}", "splits: {1: seen, a: seen}"]
)
def test_whatever_yaml_can_say_in_a_row_can_be_kept_or_is_refused(tmp_path: Path, text: str) -> None:
    rows = (Example("i", ("a",)),)
    try:
        task = hub_task("x", ROW | yaml.safe_load(text), Path("f.yaml"))
    except IptError:
        return
    assert kept(dataclasses.replace(task, draw=lambda *_: Sample(rows, rows, rows)), tmp_path).sample(1, 1, 1).train == rows


def test_a_row_that_reads_a_local_file_beside_others_or_by_a_file_url_is_not_kept(tmp_path: Path) -> None:
    for files in (
        {"train": "a.csv", "validation": "https://example.org/b.csv"},
        {"train": "file:///a.csv", "validation": "file:///b.csv"},
    ):
        assert hub_task("x", ROW | {"dataset": "csv", "data_files": files}, Path("f.yaml")).definition is None
    assert hub_task("x", ROW | {"dataset": str(tmp_path)}, Path("f.yaml")).definition is None


def test_a_seed_without_train_rows_and_a_file_that_is_no_test_file_are_missing(tmp_path: Path) -> None:
    (tmp_path / "n").mkdir()
    for name in ("n_16_13_train.tsv", "n_16_13_dev.tsv", "n_16_21_dev.tsv", "old_test.txt"):
        (tmp_path / "n" / name).write_text("a\tb\n")
    expected = ["task 'n' lacks data seeds 21", "task 'n' has no test file"]
    assert missing_files(tmp_path, find_few_shot_tasks(tmp_path, {}), ["n"], [13, 21]) == expected


def test_names_in_a_folder_are_those_that_a_tasks_file_may_have(tmp_path: Path) -> None:
    for name in ("a", "A"):
        (tmp_path / name).mkdir()
        for part in ("train", "dev"):
            (tmp_path / name / f"{name}_16_13_{part}.tsv").write_text("a\tb\n")
    with pytest.raises(IptError, match="differ by case only"):
        find_few_shot_tasks(tmp_path, {})


# --- test_worlds.py ------------------------------------------------------------------------------


@pytest.mark.parametrize("slot", ["{mood.__class__}", "{mood.word[0]}", "{mood.word.__len__}", "{mood}"])
def test_a_sentence_reaches_columns_only(tmp_path: Path, slot: str) -> None:
    with pytest.raises(IptError, match="world small: .*sentence"):
        load(tmp_path, TASKS_FILE.replace("{mood.word}", slot))


def test_options_that_no_sentence_answers_do_not_take_forever(tmp_path: Path) -> None:
    text = TASKS_FILE.replace(
        "kind: multiple-choice, question: mood opposite", "kind: multiple-choice, question: mood good then mood good"
    )
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
    signal.alarm(5)
    try:
        load(tmp_path, text)["mood-opposite-choice"].sample(1, 4, 4)
    finally:
        signal.alarm(0)


def test_half_a_character_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IptError):
        load(tmp_path, TASKS_FILE.replace("fox beast", '"\\uD800 beast"'))["mood-good"].sample(1, 4, 4)


# --- test_tasks.py -------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), [
    ("  small:\n", "  1:\n"), ("splits: {tiny: seen}", "splits: {20: seen}"), ("\ntasks:", "\nsubsets: {20: [mood-good]}\ntasks:"),
    ("      mood:\n", "      no: {columns: [a], rows: [b]}\n      mood:\n"),
])  # fmt: skip
def test_keys_that_are_no_text_and_subsets_of_unknown_tasks_are_refused(tmp_path: Path, old: str, new: str) -> None:
    with pytest.raises(IptError, match=r"own\.yaml"):
        tasks = load(tmp_path, TASKS_FILE.replace(old, new, 1))
        kept(tasks["mood-good"], tmp_path).sample(1, 4, 4)
        split_tasks(tasks, "few" if "few" in new else "tiny", subsets(tmp_path / "own.yaml"))


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
