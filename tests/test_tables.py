"""One's own tables: what is read off them, how their rows are drawn, and what is refused."""

from __future__ import annotations

import csv
import io
import json
import re
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli, run_ipt
from hypothesis import given
from hypothesis import strategies as st

from intrinsic_prompt_tuning.errors import IptError
from intrinsic_prompt_tuning.tasks import Example, Task, few_shot_files, find_table_tasks, tables


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")
    return path


def write_rows(path: Path, *rows: tuple[Any, ...], separator: str = ",") -> Path:
    """Write a table by the csv module."""
    stream = io.StringIO()
    csv.writer(stream, delimiter=separator).writerows(rows)
    return write(path, stream.getvalue())


def write_lines(path: Path, *rows: Any) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def labelled(path: Path, count: int, labels: tuple[str, ...] = ("no", "yes"), mark: str = "row") -> Path:
    return write_rows(path, ("text", "label"), *((f"{mark} {n}", labels[n % len(labels)]) for n in range(count)))


def only(data: Path, **more: Any) -> Task:
    (task,) = find_table_tasks(data, {}, **more).values()
    return task


def rows_of(data: Path, **more: Any) -> list[Example]:
    """Return the rows of a table without labels, all of them where they are 5, 10, 15 ...; sorted."""
    task = only(data, **more)
    (pool,) = re.findall(r"(\d+) train", task.source)
    sample = task.draw(100, int(pool) // 4, None)
    return sorted((*sample.train, *sample.validation, *sample.test), key=lambda row: row.input)


def test_a_label_s_rows_are_counted_by_their_first_reference(tmp_path: Path) -> None:
    """So that K rows of each are drawn, however many references some of them have."""
    rows = [{"text": f"row {n}", "label": [("no", "yes")[n % 2], *["of course"] * (n % 4 > 1)]} for n in range(80)]
    train, validation, _ = only(write_lines(tmp_path / "multi.jsonl", *rows)).draw(100, 8, None)
    for part in (train, validation):
        assert Counter(row.answers[0] for row in part) == {"no": 8, "yes": 8}


# --- What is understood --------------------------------------------------------------------------


def test_few_distinct_answers_are_the_labels_of_a_classification(tmp_path: Path) -> None:
    task = only(labelled(tmp_path / "reviews.csv", 100))
    assert (task.name, task.kind, task.metric, task.words) == ("reviews", "classification", "ACC", ("no", "yes"))
    assert task.source == "text -> label of reviews.csv, 100 rows: 80 train, 20 test (a fifth, put aside); 2 labels: no, yes"
    sample = task.sample(100, 4, None)
    assert Counter(row.answers for row in sample.train) == Counter(row.answers for row in sample.validation)
    assert Counter(row.answers for row in sample.train) == {("no",): 4, ("yes",): 4}
    assert {row.options for part in sample for row in part} == {("no", "yes")}


@pytest.mark.parametrize(
    ("answer", "metric"),
    [
        (lambda n: f"name {n}", "EM"),
        (lambda n: f"this is the whole story of the row {n}", "Rouge-L"),
        (lambda n: f"слово одно два три четыре пять шесть {n}", "EM"),  # Rouge-L knows Latin words only
    ],
)
def test_answers_that_are_mostly_distinct_are_free_and_long_ones_are_compared_by_words(
    tmp_path: Path, answer: Callable[[int], str], metric: str
) -> None:
    task = only(write_rows(tmp_path / "a.csv", ("input", "output"), *((f"row {n}", answer(n)) for n in range(30))))
    assert (task.kind, task.metric, task.words) == ("free-form", metric, ())
    sample = task.sample(100, 3, None)
    assert [len(part) for part in sample] == [6, 6, 6]


def test_answers_that_can_be_labels_or_free_are_asked_about_and_the_option_decides(tmp_path: Path) -> None:
    path = labelled(tmp_path / "intents.csv", 300, tuple(f"intent {n}" for n in range(30)))
    with pytest.raises(
        IptError, match=r"'intents' has 30 distinct answers in 300 rows.*--kind classification or --kind free-form"
    ):
        find_table_tasks(path, {})
    assert [only(path, kind=kind).kind for kind in ("classification", "free-form")] == ["classification", "free-form"]
    assert len(only(path, kind="classification").words) == 30
    assert only(labelled(tmp_path / "b.csv", 80, tuple(f"{n}" for n in range(20)))).kind == "classification"
    for name, count, labels in (("c", 79, 20), ("d", 840, 21)):  # just too many
        with pytest.raises(IptError, match=f"{labels} distinct answers in {count} rows"):
            only(labelled(tmp_path / f"{name}.csv", count, tuple(f"{n}" for n in range(labels))))


def test_options_make_multiple_choice_and_the_same_ones_in_every_row_a_classification(tmp_path: Path) -> None:
    rows = [(f"row {n}", f"a{n}", f"a{n} | b|b | c{n}") for n in range(20)]
    task = only(write_rows(tmp_path / "a.csv", ("input", "output", "options"), *rows))
    assert (task.kind, task.metric, task.words) == ("multiple-choice", "ACC", ())
    assert rows_of(tmp_path / "a.csv")[0] == Example("row 0", ("a0",), ("a0", "b", "c0"))
    lines = [{"input": f"row {n}", "output": "b", "options": ["b", "a"]} for n in range(20)]
    assert only(write_lines(tmp_path / "b.jsonl", *lines)).words == ("b", "a")
    lines = [{"input": f"row {n}", "output": f"{n}", "options": []} for n in range(20)]
    assert only(write_lines(tmp_path / "c.jsonl", *lines)).kind == "free-form"
    for kind in ("classification", "free-form"):  # is said of tables without options
        told = [(task.kind, task.words) for task in find_table_tasks(tmp_path, {}, kind=kind).values()]
        assert told[:2] == [("multiple-choice", ()), ("classification", ("b", "a"))] and told[2][0] == kind
    first_without = [{"input": "i", "output": "a"}, {"input": "j", "output": "a", "options": ["a", "b"]}]
    for path in (
        write_rows(tmp_path / "d.csv", ("input", "output", "options"), ("i", "a", "a|b"), ("j", "a", "")),
        write_lines(tmp_path / "d.jsonl", *first_without),
    ):
        with pytest.raises(IptError, match="'d' has rows with options and rows without"):
            only(path)


@pytest.mark.parametrize("names", [("input", "output"), ("text", "label"), ("prompt", "completion"), ("Text", "LABEL")])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_pairs_of_columns_are_known_by_name_in_every_format(tmp_path: Path, names: tuple[str, str], suffix: str) -> None:
    rows = [(f"a, b; {n}", f"out {n}", n) for n in range(10)]
    if suffix == "jsonl":
        path = write_lines(tmp_path / "t.jsonl", *(dict(zip((*names, "id"), row, strict=True)) for row in rows))
    else:
        path = write_rows(tmp_path / f"t.{suffix}", (*names, "id"), *rows, separator="\t" if suffix == "tsv" else ",")
    assert only(path).source.startswith(f"{names[0]} -> {names[1]} of t.{suffix} (not id), 10 rows: 8 train, 2 test")
    assert rows_of(path)[0] == Example("a, b; 0", ("out 0",))


def test_columns_can_be_named_and_two_readings_are_asked_about(tmp_path: Path) -> None:
    head = ("review", "text", "label", "output", "choices")
    path = write_rows(tmp_path / "t.csv", head, *((f"r{n}", f"t{n}", f"l{n}", f"o{n}", f"l{n}|x") for n in range(10)))
    with pytest.raises(IptError, match=r"t\.csv, line 2 has the columns review, text, label, output, choices; .*with --columns"):
        find_table_tasks(path, {})
    assert rows_of(path, columns="review,output")[0] == Example("r0", ("o0",))
    assert rows_of(path, columns="review,label,choices")[0] == Example("r0", ("l0",), ("l0", "x"))
    spaced = write(tmp_path / "u.csv", path.read_text(encoding="utf-8").replace(",", ", "))
    assert rows_of(spaced, columns="review,output") == rows_of(path, columns="review, output")
    for said in ("review,label,choices,text", "review,stars"):
        with pytest.raises(
            IptError, match=rf"--columns is '{said}', expected at most 3 of the columns of .*t\.csv, line 2: review, text"
        ):
            rows_of(path, columns=said)


def test_of_messages_the_last_of_the_assistant_is_the_answer_and_what_stands_before_it_the_input(tmp_path: Path) -> None:
    def turn(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    one = [[turn("user", f"q{n}"), turn("assistant", f"a{n}")] for n in range(9)]
    more = [turn("system", "be kind"), turn("user", "z"), turn("assistant", "y"), turn("user", "w"), turn("assistant", "v")]
    path = write_lines(tmp_path / "chat.jsonl", *({"messages": turns} for turns in (*one, [*more, turn("user", "thanks")])))
    rows = rows_of(path)
    assert Example("system: be kind\nuser: z\nassistant: y\nuser: w", ("v",)) in rows and Example("q0", ("a0",)) in rows


def test_numbers_are_text_a_list_of_outputs_is_several_references_and_space_at_the_ends_goes(tmp_path: Path) -> None:
    lines = [{"prompt": n, "completion": value} for n, value in enumerate([1, 2.5, True, ["a", " b "], " x\ny "])]
    rows = rows_of(write_lines(tmp_path / "t.jsonl", *lines))
    assert [(row.input, row.answers) for row in rows] == [
        ("0", ("1",)), ("1", ("2.5",)), ("2", ("true",)), ("3", ("a", "b")), ("4", ("x\ny",))
    ]  # fmt: skip


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_quotes_marks_separators_and_ends_of_lines_of_csv(tmp_path: Path, separator: str, end: str, mark: str) -> None:
    rows = ["text;label", *(f'"a ""b"", c; d\u2028{end}\te {n}";l{n}' for n in range(10)), ""]
    text = end.join(rows) if separator == ";" else end.join(row[::-1].replace(";", separator, 1)[::-1] for row in rows)
    assert rows_of(write(tmp_path / "t.csv", mark + text))[0] == Example(f'a "b", c; d\u2028{end}\te 0', ("l0",))


# --- Files and parts -----------------------------------------------------------------------------


def test_the_parts_of_a_task_are_told_by_the_names_of_files(tmp_path: Path) -> None:
    for train, validation, test in (
        ("a_train", "a_dev", "a_test"),
        ("b", "b-validation", "b.test"),
        ("c Train", "c_VAL", "c_test"),
    ):
        for name, mark in ((train, "train"), (validation, "validation"), (test, "test")):
            labelled(tmp_path / f"{name}.csv", 40, mark=mark)
    write(tmp_path / "notes.txt", "no table")
    write(tmp_path / ".hidden.csv", "no table")
    tasks = find_table_tasks(tmp_path, {})
    assert sorted(tasks) == ["a", "b", "c"]
    for task in tasks.values():
        for part, rows in task.sample(13, 5, 30)._asdict().items():
            assert {row.input.split()[0] for row in rows} == {part} and len(rows) == (30 if part == "test" else 10)
    assert tasks["a"].source == "text -> label of a_train.csv, 120 rows: 40 train, 40 validation, 40 test; 2 labels: no, yes"
    assert tasks["a"].splits == {"own": "seen"} and tasks["a"].definition is None


def test_files_named_after_parts_alone_are_named_after_their_folder(tmp_path: Path) -> None:
    for part in ("train", "test"):
        labelled(tmp_path / "my reviews" / f"{part}.csv", 20, mark=part)
    assert list(find_table_tasks(tmp_path / "my reviews", {})) == ["my-reviews"]


def test_a_file_given_alone_is_all_that_its_task_has(tmp_path: Path) -> None:
    for part in ("train", "test"):
        labelled(tmp_path / f"a_{part}.csv", 40, mark=part)
    sample = only(tmp_path / "a_train.csv").sample(100, 2, None)
    assert {row.input.split()[0] for part in sample for row in part} == {"train"} and len(sample.test) == 8
    with pytest.raises(IptError, match="task 'a' has 0 rows beside its test rows, and --shots 2 wants 4: add rows"):
        only(tmp_path / "a_test.csv").sample(100, 2, None)


def test_names_are_made_safe_and_refused_where_that_does_not_do(tmp_path: Path) -> None:
    assert only(labelled(tmp_path / "My reviews (2024).csv", 20)).name == "My-reviews-2024"
    known = {"reviews": only(labelled(tmp_path / "reviews.csv", 20))}
    with pytest.raises(IptError, match="there is a task 'reviews' already: rename the file"):
        find_table_tasks(tmp_path / "reviews.csv", known)
    with pytest.raises(IptError, match="differ by case only"):
        find_table_tasks(labelled(tmp_path / "Reviews2" / "REVIEWS.csv", 20), known)
    for name in ("???", "con", "x" * 101):
        with pytest.raises(IptError, match="cannot be a task's name"):
            find_table_tasks(labelled(tmp_path / f"{name}.csv", 20), {})


def test_two_files_for_one_part_are_refused(tmp_path: Path) -> None:
    for name in ("a.csv", "a_train.csv"):
        labelled(tmp_path / name, 20)
    with pytest.raises(IptError, match=r"a\.csv and a_train\.csv are both train rows of one task: rename one"):
        find_table_tasks(tmp_path, {})


def test_a_folder_of_few_shot_files_is_none_of_tables(tmp_path: Path) -> None:
    labelled(tmp_path / "stats.csv", 20)
    assert not few_shot_files(tmp_path) and not few_shot_files(tmp_path / "stats.csv")
    write(tmp_path / "raw" / "reviews_train.jsonl", '{"input": "i", "output": "o"}\n')  # of another form: nobody's
    assert not few_shot_files(tmp_path) and "stats" in find_table_tasks(tmp_path, {})
    for part in ("test", "train", "dev"):  # a test file alone is nobody's either
        assert not few_shot_files(tmp_path)
        write(tmp_path / "a" / f"a_16_100_{part}.tsv", "i\to\n")
    assert few_shot_files(tmp_path)


# --- Drawing -------------------------------------------------------------------------------------


def test_the_default_shots_are_had_of_80_rows(tmp_path: Path) -> None:
    assert len(only(labelled(tmp_path / "a.csv", 80)).sample(100, 16, None).test) == 16
    free = write_rows(tmp_path / "b.csv", ("text", "output"), *((f"{n}", f"{n}") for n in range(80)))
    assert len(only(free).sample(100, 16, None).validation) == 32


@given(count=st.integers(60, 90), labels=st.integers(2, 4), seed=st.integers(0, 999), repeats=st.integers(0, 20))
def test_test_rows_are_the_same_for_all_data_seeds_and_never_trained_on(
    tmp_path: Path, count: int, labels: int, seed: int, repeats: int
) -> None:
    rows = [(f"row {n}", f"label {n % labels}") for n in range(count)]
    task = only(write_rows(tmp_path / "t.csv", ("text", "label"), *rows, *rows[:repeats]))
    assert (f"left out: {repeats} rows whose input came before" in task.source) == bool(repeats)
    first, other = task.sample(100, 2, None), task.sample(seed, 2, None)
    assert first.test == other.test and len(first.test) == count // 5
    for sample in (first, other):
        inputs = [{row.input for row in part} for part in sample]
        assert sum(map(len, inputs)) == len(set.union(*inputs)) == sum(map(len, sample))
    assert task.sample(seed, 2, 5).test == task.sample(seed + 1, 2, 5).test


def test_a_row_of_the_test_file_is_not_trained_on(tmp_path: Path) -> None:
    labelled(tmp_path / "a_train.csv", 40)
    labelled(tmp_path / "a_test.csv", 10)
    task = only(tmp_path)
    assert "50 rows" not in task.source and "40 rows: 30 train, 10 test" in task.source and "left out: 10 rows" in task.source
    inputs = [{row.input for row in part} for part in task.sample(100, 7, None)]
    assert not inputs[2] & (inputs[0] | inputs[1]) and len(inputs[2]) == 10


def test_too_few_rows_are_counted_and_the_shots_that_they_suffice_for_are_named(tmp_path: Path) -> None:
    task = only(labelled(tmp_path / "a.csv", 40))
    with pytest.raises(
        IptError, match=r"'a' has (\d+) rows of the label '\w+' beside its test rows, and --shots 16 wants 32"
    ) as caught:
        task.sample(100, 16, None)
    task.sample(100, int(str(caught.value).split("name --shots ")[1].split(",")[0]), None)  # what it says is right
    free = only(write_rows(tmp_path / "b.csv", ("text", "output"), *((f"{n}", f"{n}") for n in range(40))))
    with pytest.raises(
        IptError, match="'b' has 32 rows beside its test rows, and --shots 9 wants 36: name --shots 8, or add rows"
    ):
        free.sample(100, 9, None)
    assert len(free.sample(100, 8, None).validation) == 16


# --- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "content", "message"), [
    ("t.csv", b"", r"t\.csv holds no rows"),
    ("t.csv", b"text,label\n", r"t\.csv holds no rows"),
    ("t.jsonl", b"\n\n", r"t\.jsonl holds no rows"),
    ("t.csv", b"a,b\n1,2\n", r"t\.csv, line 2 has the columns a, b; expected one of input, text, prompt and one of output, label"),
    ("t.jsonl", b'{"text": "a"}\n', r"t\.jsonl, line 1 has the columns text; expected one of input"),
    ("t.csv", b"text,label\nfine,1\ncaf\xe9,0\n", r"t\.csv, line 3 cannot be read \('utf-8' codec can't decode byte 0xe9"),
    ("t.jsonl", b'{"text": "a", "label": 1}\n\n\xff', r"t\.jsonl, line 3 cannot be read \('utf-8' codec"),
    ("t.csv", b"\xff\xfet\0e\0", r"t\.csv, line 1 cannot be read \('utf-8' codec"),
    ("t.csv", b"text,label\na,b,c\n", r"t\.csv, line 2 cannot be read \(no JSON object, or more cells than columns\)"),
    ("t.csv", b"text,label\nx,1\na\n", r"t\.csv, line 3: expected text in text, label, got \['a', None\]"),
    ("t.csv", b"text,label\nx,1\na,\n", r"t\.csv, line 3: expected text in text, label, got \['a', ''\]"),
    ("t.csv", b"text,label,label\na,b,c\n", r"t\.csv, line 1 cannot be read \(two columns have one name\)"),
    ("t.csv", b'text,label\n"open,1\nb,2\n', r"t\.csv, line 3 cannot be read \(unexpected end of data\)"),
    ("t.csv", b'text,label\n"a"b,1\n', r"t\.csv, line 2 cannot be read"),
    ("t.csv", b'text,label\n"' + b"x\n" * 200_000, r"t\.csv, line \d+ cannot be read \(field larger than field limit"),
    ("t.csv", b"text\rlabel\ra\r", r"t\.csv, line 1 cannot be read \(new-line character"),
    ("t.jsonl", b"[1]\n", r"t\.jsonl, line 1 cannot be read \(no JSON object"),
    ("t.jsonl", b"{\n", r"t\.jsonl, line 1 cannot be read \(Expecting property name"),
    ("t.jsonl", b"[" * 100_000, r"t\.jsonl, line 1 cannot be read \(maximum recursion"),
    ("t.jsonl", b'{"text": "\\ud800", "label": 1}', r"t\.jsonl, line 1 cannot be read \('utf-8' codec can't encode"),
    ("t.jsonl", b'{"text": ' + b"1" * 9000 + b', "label": 1}', r"t\.jsonl, line 1 cannot be read"),
    ("t.jsonl", b'{"text": null, "label": 1}', r"t\.jsonl, line 1: expected text in text, label, got \[None, 1\]"),
    ("t.jsonl", b'{"text": {"a": 1}, "label": 1}', r"t\.jsonl, line 1: expected text in text, label"),
    ("t.jsonl", b'{"text": "a", "label": []}', r"t\.jsonl, line 1: expected text in text, label"),
    ("t.jsonl", b'{"messages": [{"role": "user", "content": "x"}]}', r"t\.jsonl, line 1: expected messages"),
    ("t.jsonl", b'{"messages": "x"}', r"t\.jsonl, line 1: expected messages"),
    ("t.jsonl", b'{"messages": [{"role": "assistant", "content": "x"}]}', r"t\.jsonl, line 1: expected text in messages"),
    ("t.txt", b"text,label\na,b\n", r"t\.txt holds no task; expected files such as reviews\.csv"),
])  # fmt: skip
def test_what_is_no_table_is_refused_with_file_and_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(IptError, match=message) as caught:
        find_table_tasks(tmp_path / name, {})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 520 + len(str(tmp_path))


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IptError, match=r"no\.csv is not there; expected"):
        find_table_tasks(tmp_path / "no.csv", {})
    with pytest.raises(IptError, match="holds no task; expected"):
        find_table_tasks(tmp_path, {})


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_a_line_of_100_megabytes_is_refused_in_little_memory(tmp_path: Path, name: str) -> None:
    with (tmp_path / name).open("wb") as file:
        file.write(b"text,label\n" if name == "t.csv" else b'{"text": "')
        for _ in range(100):
            file.write(b"x" * 1_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(IptError, match=r"line \d cannot be read \(a line can have 1,000,000 bytes, a file 100,000,000\)"):
            find_table_tasks(tmp_path / name, {})
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def told_of(path: Path) -> str:
    """Return why a table cannot be used, or nothing."""
    try:
        only(path).sample(100, 1, None)
    except IptError as error:
        return str(error)
    return ""


@given(text=st.text(alphabet=st.sampled_from('",;\t\r\n ab|1é\u2028\x00'), max_size=80) | st.text(max_size=60))
def test_whatever_a_csv_holds_gives_rows_or_one_sentence(tmp_path: Path, text: str) -> None:
    for name, head in (("t.csv", ""), ("u.csv", "text,label\n"), ("v.tsv", "input\toutput\toptions\n")):
        (tmp_path / name).write_bytes((head + text).encode("utf-8", "surrogatepass"))
        assert "\n" not in told_of(tmp_path / name)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner, max_size=3),
    max_leaves=6,
)


@given(rows=st.lists(
    st.dictionaries(st.sampled_from(["text", "label", "options", "messages", "output"]), json_values, max_size=4) | json_values,
    max_size=4,
))  # fmt: skip
def test_whatever_json_lines_hold_gives_rows_or_one_sentence(tmp_path: Path, rows: list[Any]) -> None:
    write_lines(tmp_path / "t.jsonl", *rows)
    assert "\n" not in told_of(tmp_path / "t.jsonl")


@given(rows=st.lists(st.tuples(st.text(min_size=1, max_size=8), st.text(min_size=1, max_size=8)), min_size=9, max_size=20))
def test_what_the_csv_module_writes_is_read_back(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    wanted = {text.strip(): answer.strip() for text, answer in reversed(rows) if text.strip() and answer.strip()}
    if len(wanted) < len(rows) or any("\ud800" <= c <= "\udfff" for row in rows for c in "".join(row)):
        return
    found = rows_of(write_rows(tmp_path / "t.csv", ("text", "label"), *rows), kind="free-form")
    assert {row.input: row.answers[0] for row in found}.items() <= wanted.items() and found


# --- Commands ------------------------------------------------------------------------------------


@pytest.fixture
def moods(tmp_path: Path) -> Path:
    """A table in the small world's words."""
    rows = [
        (f"the {mood} {animal} sees {count} cups on monday", "good" if mood in ("glad", "mild") else "bad")
        for mood in ("glad", "sorry", "mild", "wild") for animal in ("fox", "cow", "owl") for count in ("two", "three", "four")
    ]  # fmt: skip
    return write_rows(tmp_path / "moods.csv", ("text", "label"), *rows)


FEW = ("--steps", 2, "--evaluations", 1, "--batch-size", 2, "--processes", 1)


def test_a_table_is_collected_tuned_in_the_split_s_subspace_and_answered_with(cli: Cli, moods: Path, tmp_path: Path) -> None:
    assert cli("collect", "--seen", *FEW).code == 0
    assert cli("fit-subspace", "--dim", 2, "--subspace-steps", 1, "--processes", 1).code == 0
    told = "moods: classification, ACC, text -> label of moods.csv, 36 rows: 29 train, 7 test (a fifth, put aside); 2 labels: bad, good"
    for command in (("collect",), ("tune", "--dim", 2)):
        done = cli(*command, "--data", moods, *FEW)
        assert done.code == 0, done.err
        assert done.err.count(told) == 1 and "to make, 0 made before" in done.err
    write(tmp_path / "in.txt", "the glad cow sees two cups on monday\n")
    for source in ("prompt", "vector"):
        done = cli("predict", "--data", moods, "--task", "moods", "--from", source, "--input", tmp_path / "in.txt", "--json")
        assert done.code == 0 and set(json.loads(done.out)["options"]) == {"bad", "good"}, done.err
    report = json.loads(cli("eval", "--data", moods, "--json", "--processes", 1).out)
    assert {role: own["n_tasks"] for role, own in report["prompt_tuning"].items()} == {"seen": 5, "unseen": 1}


def test_tables_are_listed_shown_and_all_seen_in_the_split_own(cli: Cli, moods: Path, tmp_path: Path) -> None:
    listed = cli("tasks", "--data", moods).out.splitlines()
    assert len(listed) == 2 and listed[1].split()[:4] == ["moods", "classification", "ACC", "unseen"]
    assert "36 rows: 29 train, 7 test" in listed[1]
    shown = cli("tasks", "--data", moods, "--show")
    assert "moods, train: 8 rows" in shown.out and "moods, test: 7 rows" in shown.out
    folder = tmp_path / "tables"
    for name in ("a", "b", "c"):
        write(folder / f"{name}.csv", moods.read_text(encoding="utf-8"))
    listed = cli("tasks", "--data", folder, "--split", "own").out.splitlines()
    assert [line.split()[0::3][:2] for line in listed[1:]] == [["a", "seen"], ["b", "seen"], ["c", "seen"]]
    done = cli("run", "--quick", "--data", folder, *FEW, "--dim", 2, "--subspace-steps", 1, "--json")
    assert done.code == 0 and json.loads(done.out)["prompt_tuning"]["unseen"]["n_tasks"] == 3, "all of one's own, also quickly"
    split = write(tmp_path / "mine.yaml", "{seen: [a, count-next], unseen: [b]}\n")
    listed = cli("tasks", "--data", folder, "--split", split).out.splitlines()
    assert [line.split()[0::3][:2] for line in listed[1:]] == [["a", "seen"], ["b", "unseen"]]


def test_a_table_keeps_the_settings_of_the_testbed_and_bad_ones_end_in_one_sentence(tmp_path: Path) -> None:
    for name, text in (("bad.csv", "a,b\n1,2\n"), ("few.csv", "text,label\n" + "".join(f"{n},{n % 2}\n" for n in range(20)))):
        done = run_ipt("collect", "--data", write(tmp_path / name, text), "--cache", tmp_path / "cache", "--processes", 1)
        assert done.code == 1 and done.err.splitlines()[-1].startswith("error: "), done.err
    assert "--shots 16 wants 32" in done.err
    done = run_ipt(
        "collect", "--data", labelled(tmp_path / "fine.csv", 100), "--cache", tmp_path / "c", "--dry-run", "--processes", 1
    )
    assert done.code == 0 and "at most 528 rows" in done.err, done.err  # 400 steps of one row, four validations of 32


def test_an_answer_of_more_than_five_words_on_average_is_long(tmp_path: Path) -> None:
    for name, words, metric in (("a", "one two three four", "EM"), ("b", "one two three four five", "Rouge-L")):
        rows = [(f"row {n}", f"{words} {n}") for n in range(30)]  # and a number, which is a word
        assert only(write_rows(tmp_path / f"{name}.csv", ("input", "output"), *rows)).metric == metric


def test_a_file_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = labelled(tmp_path / "a.csv", 40)
    monkeypatch.setattr(tables, "LARGEST_FILE", path.stat().st_size)
    assert only(path).words == ("no", "yes")
    monkeypatch.setattr(tables, "LARGEST_FILE", path.stat().st_size - 1)
    with pytest.raises(IptError, match=r"a\.csv, line \d+ cannot be read \(a line can have 1,000,000 bytes, a file \d+\)"):
        only(path)
