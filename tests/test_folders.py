"""Few-shot files: what CrossFit and MetaICL build, and what the cache keeps of the samples that were drawn."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TASKS_FILE as SMALL
from conftest import files_in
from helpers import Listener

from intrinsic_prompt_tuning.backbone import Backbone
from intrinsic_prompt_tuning.context import Context
from intrinsic_prompt_tuning.errors import IptError
from intrinsic_prompt_tuning.tasks import TASKS_FILE, Example, Sample, Task, find_few_shot_tasks, find_tasks, kept, load_tasks
from intrinsic_prompt_tuning.tasks.hub import hub_task

TASKS = load_tasks(TASKS_FILE)
TOPICS = ("World", "Sports", "Business", "Sci/Tech")


def write_files(
    folder: Path, name: str, lines: str, *, suffix: str = "tsv", seeds: tuple[int, ...] = (13, 100), k: int = 16
) -> Path:
    (folder / name).mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for part in ("train", "dev", "test"):
            (folder / name / f"{name}_{k}_{seed}_{part}.{suffix}").write_text(
                lines.replace("PART", f"{part}{seed}{k}"), encoding="utf-8", newline=""
            )
    return folder


def found(folder: Path, name: str) -> Task:
    return find_few_shot_tasks(folder, TASKS)[name]


# --- What is found and read ----------------------------------------------------------------------


def test_a_tsv_build_of_a_known_task_takes_its_words_and_metric(tmp_path: Path) -> None:
    write_files(tmp_path, "ag_news", "PART a\u2028b\tWorld\nPART\tSports\n")
    task = found(tmp_path, "ag_news")
    sample = task.sample(13, 16, None)
    assert sample.train[0] == Example("train1316 a\u2028b", ("World",), TOPICS)
    assert sample.test == (Example("test1316 a\u2028b", ("World",), TOPICS), Example("test1316", ("Sports",), TOPICS))
    assert (task.kind, task.metric, task.splits["cls"]) == ("classification", "Classification-F1", "seen")
    assert task.source == "few-shot files, K 16, data seeds 13 100"


def test_several_references_are_read(tmp_path: Path) -> None:
    write_files(tmp_path, "kilt_nq", "PART\ta\tb\n", k=32)
    assert found(tmp_path, "kilt_nq").sample(100, 16, None).validation == (Example("dev10032", ("a", "b")),)


def test_the_asked_for_k_is_taken_where_there_are_several_and_one_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for k in (16, 32, 64):
        write_files(tmp_path, "kilt_nq", "PART\ta\n", k=k)
    task = found(tmp_path, "kilt_nq")
    assert task.source == "few-shot files, K 16/32/64, data seeds 13 100"
    assert [task.sample(100, shots, 0).train[0].input for shots in (16, 32, 8)] == ["train10032", "train10064", "train10016"]
    with pytest.raises(
        IptError, match="task 'kilt_nq' has no files of K 5 for data seed 100; the folder has 16, 32, 64: name one with --shots"
    ):
        task.sample(100, 5, 0)


def test_k_counts_rows_per_label_or_in_total_as_the_folder_has_it(tmp_path: Path) -> None:
    for k in (16, 32):
        write_files(tmp_path, "ag_news", "PART\tWorld\n", k=k)
    write_files(tmp_path, "kilt_nq", "PART\ta\n", k=16)
    assert [found(tmp_path, "ag_news").sample(100, shots, 0).train[0].input for shots in (16, 32)] == ["train10016", "train10032"]
    with pytest.raises(IptError, match="'ag_news' has no files of K 8 for data seed 100; the folder has 16, 32"):
        found(tmp_path, "ag_news").sample(100, 8, 0)
    assert found(tmp_path, "kilt_nq").sample(100, 16, 0).train[0].input == "train10016"


def test_a_k_counts_only_where_train_and_dev_are_both_there(tmp_path: Path) -> None:
    for k in (16, 32):
        write_files(tmp_path, "ag_news", "PART\tWorld\n", k=k)
    (tmp_path / "ag_news" / "ag_news_32_13_dev.tsv").unlink()
    with pytest.raises(IptError, match="no files of K 32 for data seed 13; the folder has 16: name one"):
        found(tmp_path, "ag_news").sample(13, 32, 0)
    assert found(tmp_path, "ag_news").sample(100, 32, 0).train[0].input == "train10032"


@pytest.mark.parametrize(
    ("options", "kind", "metric"),
    [
        (lambda n: ["a", "b"], "classification", "ACC"),
        (lambda n: ["a", f"b{n}"], "multiple-choice", "ACC"),
        (lambda n: [], "free-form", "EM"),
    ],
)
def test_the_kind_of_an_unknown_task_is_read_off_its_rows(tmp_path: Path, options: Any, kind: str, metric: str) -> None:
    lines = "".join(json.dumps({"task": "new", "input": "i", "output": "a", "options": options(n)}) + "\n" for n in range(3))
    task = found(write_files(tmp_path, "new", lines, suffix="jsonl"), "new")
    assert (task.kind, task.metric, task.definition) == (kind, metric, None)


def test_one_test_file_serves_all_seeds_and_its_rows_are_drawn_with_a_fixed_seed(tmp_path: Path) -> None:
    write_files(tmp_path, "new", '{"input": "PART", "output": "a"}\n', suffix="jsonl")
    for path in (tmp_path / "new").glob("*_test.jsonl"):
        path.unlink()
    lines = [json.dumps({"input": f"{n}", "output": "a"}) for n in range(10)]
    (tmp_path / "new" / "new_test.jsonl").write_text("\n".join(lines), encoding="utf-8")
    task = found(tmp_path, "new")
    # RandomState(42) puts ten rows into the order 8 1 5 0 7 2 9 4 3 6.
    assert [row.input for row in task.sample(13, 16, 4).test] == ["8", "1", "5", "0"]
    assert task.sample(100, 16, 4).test == task.sample(13, 16, 4).test
    assert [row.input for row in task.sample(13, 16, None).test] == list("0123456789")
    assert sorted(row.input for row in task.sample(13, 16, 99).test) == list("0123456789")


def test_other_files_beside_the_few_shot_ones_do_no_harm(tmp_path: Path) -> None:
    write_files(tmp_path, "ag_news", "PART\tWorld\n")
    for name in ("README.md", "ag_news_16_13_train.txt", "ag_news_train.tsv", "boolq_16_13_train.tsv", "ag_news_16_13_best.tsv"):
        (tmp_path / "ag_news" / name).write_text("no row\n", encoding="utf-8")
    (tmp_path / "README.md").write_text("no folder", encoding="utf-8")
    assert list(find_few_shot_tasks(tmp_path, TASKS)) == ["ag_news"]
    assert len(found(tmp_path, "ag_news").sample(13, 16, None).train) == 1


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    write_files(tmp_path, "ag_news", "PART\tWorld\n")
    with pytest.raises(IptError, match="task 'ag_news' has no train and dev files for data seed 87; the folder has 13, 100"):
        found(tmp_path, "ag_news").sample(87, 16, None)
    for path in (tmp_path / "ag_news").glob("*_test.tsv"):
        path.unlink()
    task = found(tmp_path, "ag_news")
    assert task.source == "few-shot files, K 16, data seeds 13 100, no test rows"
    with pytest.raises(IptError, match=r"task 'ag_news' has no test file; add ag_news_16_13_test\.tsv to its folder"):
        task.sample(13, 16, None)
    assert task.sample(13, 16, 0).test == ()


def test_what_a_folder_lacks_of_the_split_is_said(tmp_path: Path) -> None:
    write_files(tmp_path, "ag_news", "PART\tWorld\n")
    report, lacks = Listener(), rf"{re.escape(str(tmp_path))} lacks "
    for split, names in (("whole", "[ag_news]"), ("more", "[piqa, ag_news]")):
        (file := tmp_path / f"{split}.yaml").write_text(f"{{seen: {names}, unseen: []}}", encoding="utf-8")
        assert [*Context({"data": tmp_path, "split": str(file)}, report).roles] == ["ag_news"]
    Context({"data": tmp_path}, report)
    more, random = report.sentences
    assert re.fullmatch(f"{lacks}1 of the split's 2 tasks: piqa", more)
    assert re.fullmatch(rf"{lacks}119 of the split's 120 tasks: (\S+, ){{4}}\S+ \.\.\.", random)


def test_a_folder_of_which_no_task_is_in_the_split_is_told_so(tmp_path: Path) -> None:
    write_files(tmp_path, "own", "PART\ta\n")
    with pytest.raises(IptError, match="has no task of the split random: list its own in a file, --split mine.yaml"):
        Context({"data": tmp_path})


def test_tables_beside_few_shot_files_and_options_of_tables_without_one_are_refused(tmp_path: Path) -> None:
    write_files(tmp_path / "gym", "ag_news", "PART\tWorld\n")
    for columns, kind, data in (("a,b", None, None), ("", "free-form", None), ("a,b", None, tmp_path / "gym")):
        with pytest.raises(IptError, match="--columns and --kind are for your own tables, which --data names: leave them out"):
            find_tasks(TASKS_FILE, data, columns, kind)
    (tmp_path / "gym" / "reviews.csv").write_text("input,output\ngood,yes\n", encoding="utf-8")
    with pytest.raises(
        IptError, match=r"gym holds few-shot files and tables, such as reviews\.csv: give the tables another folder"
    ):
        find_tasks(TASKS_FILE, tmp_path / "gym", "", None)


# --- Hostile files -------------------------------------------------------------------------------


def test_a_folder_without_train_and_dev_rows_holds_no_task(tmp_path: Path) -> None:
    write_files(tmp_path, "ag_news", "PART\tWorld\n")
    for path in (tmp_path / "ag_news").glob("*_dev.tsv"):
        path.unlink()
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(IptError, match="(holds no task|is not there); expected files such as .* and the same with dev"):
            find_tasks(TASKS_FILE, folder, "", None)


def test_broken_lines_are_refused(tmp_path: Path) -> None:
    write_files(tmp_path, "ag_news", "no tab here\n")
    with pytest.raises(IptError, match=r"ag_news_16_13_train\.tsv, line 1: expected an input, a tab and the references"):
        found(tmp_path, "ag_news").sample(13, 16, 0)


@pytest.mark.parametrize("line", [
    b'{"input": "i"}', b'{"output": "o"}', b"{", b"[]", b"null", b"NaN", b'"text"', b"5", b'["input", "output"]', b"[" * 100_000, b"\0",
    b'{"input": NaN, "output": "o"}', b'{"input": 5, "output": "o"}', b'{"input": null, "output": "o"}', b'{"input": "\\ud800", "output": "o"}',
    b'{"input": "i", "output": 5}', b'{"input": "i", "output": ["o"]}', b'{"input": "i", "output": Infinity}', b'{"input": "i", "output": "\\udfff"}',
    b'{"input": "i", "output": ' + b"1" * 5000 + b"}", b'{"input": "i"}\r{"output": "o"}', b'{"input": "i", "output": "o"} {"input": "i", "output": "o"}',
    b'{"input": "i", "output": "o", "options": "yes no"}', b'{"input": "i", "output": "o", "options": [1, 2]}',
    b'{"input": "i", "output": "o", "options": {"o": 1}}', b'{"input": "i", "output": "o", "options": [["o"]]}',
    b'{"input": "i", "output": "o", "options": ["\\ud800", "o"]}', b'{"input": "i", "output": "o", "answers": "o"}',
    b'{"input": "i", "output": "o", "answers": {"o": 1}}', b'{"input": "i", "output": "o", "tail": "x"}',
    b'{"input": "i", "output": "o", "tail": 2}', b'{"input": "i", "output": "o", "tail": -1}',
    b'{"input": "i", "output": "o", "tail": 1e999}', b'\xef\xbb\xbf{"input": "i", "output": "o"}',
])  # fmt: skip
def test_a_line_that_is_no_row_is_refused_with_file_and_line(tmp_path: Path, line: bytes) -> None:
    good = b'{"input": "i", "output": "o", "options": ["o", "p"]}\n'
    write_files(tmp_path, "boolq", "", suffix="jsonl")
    (tmp_path / "boolq" / "boolq_16_13_train.jsonl").write_bytes(good + line + b"\n" + good)
    with pytest.raises(IptError, match=r"boolq_16_13_train\.jsonl, line 2: expected ") as caught:
        found(tmp_path, "boolq").sample(13, 16, 0)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(str(tmp_path))


def test_a_line_that_is_no_row_is_refused_in_a_task_that_nobody_knows_too(tmp_path: Path) -> None:
    write_files(tmp_path, "new", '{"input": "i", "output": "o", "options": "o p"}\n', suffix="jsonl")
    with pytest.raises(IptError, match=r"new_16_13_train\.jsonl, line 1: expected text in input and output, and a list of texts"):
        find_few_shot_tasks(tmp_path, TASKS)


@pytest.mark.parametrize("content", [
    b"caf\xe9\tWorld\n", "\ufeff\ufeffi\to\n".encode("utf-16"), b"\x80", b"\xc3(\to\n", b"\xed\xa0\x80\to\n", b"\xff\xfe",
])  # fmt: skip
@pytest.mark.parametrize("suffix", ["tsv", "jsonl"])
def test_bytes_that_are_no_text_are_refused_by_file(tmp_path: Path, suffix: str, content: bytes) -> None:
    write_files(tmp_path, "ag_news", "PART\tWorld\n", suffix=suffix)
    (tmp_path / "ag_news" / f"ag_news_16_13_train.{suffix}").write_bytes(content)
    with pytest.raises(IptError, match=rf"ag_news_16_13_train\.{suffix} cannot be read: 'utf-8' codec can't decode") as caught:
        found(tmp_path, "ag_news").sample(13, 16, 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["i\0\x01\x7f\u202e", "i" * 3_000_000, "\u200b", "=cmd|' /C calc'!A0"], ids=["controls", "long", "nothing", "formula"]
)
def test_odd_text_is_a_row_as_it_stands(tmp_path: Path, t5: Backbone, text: str) -> None:
    write_files(tmp_path, "new", f"{text}\tyes\n")
    sample = found(tmp_path, "new").sample(13, 16, None)
    assert sample.train == (Example(text, ("yes",)),)
    (row,) = t5.encode(sample.train, prompt_length=3)
    assert len(row.input_ids) <= t5.max_length


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path, "ag_news", "PART\tWorld\n")
    (tmp_path / "ag_news" / "ag_news_16_13_dev.tsv").unlink()
    (tmp_path / "ag_news" / "ag_news_16_13_dev.tsv").mkdir()
    with pytest.raises(IptError, match=r"ag_news_16_13_dev\.tsv cannot be read"):
        found(tmp_path, "ag_news").sample(13, 16, 0)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["", "\n", "\n\n  \n"])
def test_byte_order_marks_and_any_ends_of_lines_are_no_part_of_a_row(tmp_path: Path, mark: str, end: str, last: str) -> None:
    rows = ["one\u2028two\x0bthree\x85\tWorld", " two \tSports"]
    write_files(tmp_path, "ag_news", mark + end.join(rows) + last.replace("\n", end))
    expected = (Example("one\u2028two\x0bthree\x85", ("World",), TOPICS), Example(" two ", ("Sports",), TOPICS))
    assert found(tmp_path, "ag_news").sample(13, 16, None) == Sample(expected, expected, expected)
    lines = [
        json.dumps({"input": row.input, "output": row.answers[0], "options": TOPICS}, ensure_ascii=False) for row in expected
    ]
    write_files(tmp_path, "new", mark + end.join(lines) + last.replace("\n", end), suffix="jsonl")
    assert found(tmp_path, "new").sample(13, 16, None) == Sample(expected, expected, expected)


def test_empty_files_are_refused(tmp_path: Path) -> None:
    write_files(tmp_path, "ag_news", "PART\tWorld\n")
    folder = tmp_path / "ag_news"
    (folder / "ag_news_16_13_test.tsv").write_text("\n", encoding="utf-8")
    with pytest.raises(IptError, match="task 'ag_news' has no test rows for data seed 13"):
        found(tmp_path, "ag_news").sample(13, 16, None)
    (folder / "ag_news_16_13_dev.tsv").write_text("", encoding="utf-8")
    with pytest.raises(IptError, match="task 'ag_news' has no validation rows for data seed 13"):
        found(tmp_path, "ag_news").sample(13, 16, None)


def test_a_label_that_the_task_does_not_know_and_test_rows_of_one_label_are_refused(tmp_path: Path) -> None:
    write_files(tmp_path, "ag_news", "PART\tWorlds\n")
    with pytest.raises(
        IptError, match=r"task 'ag_news': a train row has the answer 'Worlds', which is none of \('World', 'Sports'"
    ):
        found(tmp_path, "ag_news").sample(13, 16, None)
    write_files(tmp_path, "ag_news", "PART\tWorld\n" * 10)
    with pytest.raises(IptError, match="task 'ag_news': all 10 test rows have the label 'World', so no score means anything"):
        found(tmp_path, "ag_news").sample(13, 16, None)


# --- What the cache keeps ------------------------------------------------------------------------

HARD = (
    Example("a b", ("x", "y", ""), ("x", "z"), 2),
    Example('"q"\t\\ \r\n\u2028\x85\x00 ü 漢 😀', ("line\nline",), (), 0),
    Example("", ("",), (), 0),
    Example("c", ("z",), ("x", "z"), 1),
)


def counting(calls: list[tuple[Any, ...]], definition: Any = "any", **fields: Any) -> Task:
    """Return a task that counts its draws, and whose rows tell what they were drawn for."""

    def draw(data_seed: int, shots: int, test_rows: int | None) -> Sample:
        calls.append((data_seed, shots, test_rows))
        rows = (*HARD, Example(f"{data_seed} {shots}", ("a",)))
        return Sample(rows, rows[::-1], () if test_rows == 0 else (*rows, Example(f"{test_rows}", ("a",))))

    about = {"name": "mine", "kind": "free-form", "metric": "EM", "source": "", "definition": definition, "draw": draw}
    return Task(**about | fields)


def test_a_sample_is_drawn_once_and_read_back_exactly(tmp_path: Path) -> None:
    calls: list[tuple[Any, ...]] = []
    first = kept(counting(calls), tmp_path).sample(13, 16, 5)
    again = kept(counting(calls), tmp_path).sample(13, 16, 5)
    assert first == again == counting([]).sample(13, 16, 5)
    assert calls == [(13, 16, 5)]


def test_every_seed_number_of_shots_and_of_test_rows_is_kept_by_itself(tmp_path: Path) -> None:
    calls: list[tuple[Any, ...]] = []
    wanted = [(seed, shots, rows) for seed in (13, 21) for shots in (4, 8) for rows in (0, 5, None)]
    for task in (counting(calls), counting(calls, kind="classification")):
        for _ in range(2):
            for one in wanted:
                assert kept(task, tmp_path).sample(*one) == counting([]).sample(*one)
    assert sorted(calls, key=str) == sorted(2 * wanted, key=str)


ROW = {"dataset": "d", "template": "{a}", "answer": "b", "metric": "EM", "keep": {"n": [1, 2]}}


@pytest.mark.parametrize(
    "change", [{"template": "{b}"}, {"metric": "QA-F1"}, {"keep": {"n": [2, 1]}}, {"note": "new"}, {"dataset": "e"}]
)
def test_another_definition_has_another_name(tmp_path: Path, change: dict[str, Any]) -> None:
    calls: list[tuple[Any, ...]] = []
    for row in (ROW, ROW | change, ROW):
        task = hub_task("mine", row, Path("f.yaml"))
        kept(counting(calls, task.definition, metric=task.metric), tmp_path).sample(13, 16, 5)
    assert len(calls) == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_another_word_in_a_world_gives_other_rows_at_once(tmp_path: Path) -> None:
    texts = []
    for number, word in enumerate(("sees", "hears", "sees")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(SMALL.replace("sees", word), encoding="utf-8")
        sample = kept(load_tasks(file)["count-next"], tmp_path / "kept").sample(13, 4, 5)
        assert sample == load_tasks(file)["count-next"].sample(13, 4, 5)
        texts.append(sample.train[0].input)
    assert "sees" in texts[0] and "hears" in texts[1] and texts[2] == texts[0]
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_all_that_ships_and_is_defined_can_be_kept(tmp_path: Path) -> None:
    for task in TASKS.values():
        own = kept(dataclasses.replace(task, draw=counting([]).draw, kind="free-form"), tmp_path)
        assert own.sample(13, 4, 5) == own.sample(13, 4, 5)
    assert len(list(tmp_path.iterdir())) == len(TASKS)


def test_a_data_set_that_is_a_folder_here_is_local_by_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"dataset": "mydata", "template": "{a}", "answer": "b", "metric": "EM"}
    assert hub_task("x", row, tmp_path / "f.yaml").definition is not None
    (tmp_path / "mydata").mkdir()
    monkeypatch.chdir(tmp_path)
    assert hub_task("x", row, tmp_path / "f.yaml").definition is None


def test_rows_of_local_files_are_drawn_anew_every_time(tmp_path: Path) -> None:
    row = {
        "dataset": "csv",
        "data_files": {"train": "r.csv", "validation": "r.csv"},
        "template": "{a}",
        "answer": "b",
        "metric": "EM",
    }
    local = hub_task("mine", row, tmp_path / "f.yaml")
    assert local.definition is None and kept(local, tmp_path / "kept") is local
    calls: list[tuple[Any, ...]] = []
    for _ in range(2):
        kept(counting(calls, local.definition), tmp_path / "kept").sample(13, 16, 5)
    assert len(calls) == 2 and not (tmp_path / "kept").exists()
    write_files(tmp_path / "data", "ag_news", "PART\tWorld\n")
    files = found(tmp_path / "data", "ag_news")
    assert kept(files, tmp_path / "kept") is files


def test_what_is_kept_is_a_folder_of_few_shot_files_that_can_be_given_away(tmp_path: Path, tasks: dict[str, Task]) -> None:
    expected = {name: kept(tasks[name], tmp_path).sample(13, 4, 10) for name in ("animal-class", "count-next")}
    for name, sample in expected.items():
        (folder,) = tmp_path.glob(f"{name}-*")
        read = find_few_shot_tasks(folder, tasks)[name].sample(13, 4, None)
        assert read == sample


def test_a_sample_that_tells_nothing_is_refused_from_what_is_kept_too(tmp_path: Path) -> None:
    yes = Example("a", ("yes",), ("yes", "no"))
    bad = Sample((yes,), (yes,), (yes,) * 10)
    task = Task(name="odd", kind="classification", metric="ACC", source="", draw=lambda *_: bad, definition=1)
    for _ in range(2):
        with pytest.raises(IptError, match="all 10 test rows have the label 'yes'"):
            kept(task, tmp_path).sample(13, 16, 10)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"\xff"),
        lambda path: path.unlink(),
        lambda path: path.write_text("{"),
        lambda path: path.write_bytes(path.read_bytes().replace(b"a", b"b").replace(b"1", b"2")),
        lambda path: path.write_bytes(b""),
    ],
)
@pytest.mark.parametrize("file", ["train.jsonl", "dev.jsonl", "test.jsonl", "checksum"])
def test_a_kept_file_that_was_damaged_is_drawn_anew_and_mended(tmp_path: Path, damage: Callable[[Path], Any], file: str) -> None:
    kept(counting([]), tmp_path).sample(13, 16, 5)
    kept(counting([]), tmp_path).sample(21, 16, 5)
    whole = files_in(tmp_path)
    damage(next(tmp_path.rglob(f"mine_32_13*{file}")))
    calls: list[tuple[Any, ...]] = []
    for seed in (13, 21, 13):
        assert kept(counting(calls), tmp_path).sample(seed, 16, 5) == counting([]).sample(seed, 16, 5)
    assert calls == [(13, 16, 5)], "what is damaged costs only itself"
    assert files_in(tmp_path) == whole


def test_not_a_bit_of_kept_rows_may_be_another(tmp_path: Path) -> None:
    expected, calls = counting([]).sample(13, 16, 5), list[tuple[Any, ...]]()
    kept(counting([]), tmp_path).sample(13, 16, 5)
    for path in sorted(tmp_path.rglob("mine_*")):
        whole = path.read_bytes()
        for at in range(0, len(whole), 11):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
            assert kept(counting(calls), tmp_path).sample(13, 16, 5) == expected
            path.write_bytes(whole)
    assert calls, "what reads as other rows was drawn anew"


def test_a_sample_that_version_2_kept_is_read(tmp_path: Path) -> None:
    rows = (Example("a b", ("x", "y"), ("x", "z"), 2), Example('"q"\t\\ \r\n\u2028 ü 漢', ("z",), ("x", "z")))

    def fail(*_: Any) -> Sample:
        raise IptError("drawn anew")

    old = Task(name="old", kind="multiple-choice", metric="ACC", draw=fail, source="", definition="version 2")
    folder = Path(__file__).parent / "data" / "version-2" / "samples"
    assert kept(old, folder).sample(100, 1, 2) == Sample(rows[:1], rows[1:], rows)
    with pytest.raises(IptError, match="drawn anew"):
        kept(old, folder).sample(13, 1, 2)
