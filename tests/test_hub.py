"""Tasks of data sets: records become text, local files, loading and what a row of tasks.yaml may say.

Nothing here reaches the Hub: `load_dataset` reads local folders that look like the Hub's.
"""

from __future__ import annotations

import collections
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from helpers import hub_rows

from intrinsic_prompt_tuning.errors import IptError, UnreachableError
from intrinsic_prompt_tuning.tasks import TASKS_FILE, Example, Task, hub, load_tasks
from intrinsic_prompt_tuning.tasks.checks import places, read_mapping
from intrinsic_prompt_tuning.tasks.hub import hub_task, read_hub_row
from intrinsic_prompt_tuning.tasks.records import CLEANERS, TRANSFORMS

SHIPPED, HUB = read_mapping(TASKS_FILE, "tasks"), hub_rows()


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    datasets.disable_progress_bars()


# --- Every row, from records with its columns to text: the contract ------------------------------
# The records hold made-up values, unequal in every column and row. What they must become is worked out here, from the YAML alone.

CODED = {name for name, row in SHIPPED["tasks"].items() if "transform" in row}
ELSEWHERE = {"wiki_split", "crawl_domain", "lama-trex", "lama-google_re"}
"""Their records are no plain columns: each has a test of its own below."""
MESSY = "  {}\n{} "
EXPECTED_CLEAN = {
    "": "  {}\n{} ",
    "strip": "{}\n{}",
    "newlines": "  {} {} ",
    "breaks": "  {} {} ",
    "whitespace": "{} {}",
    "quotes": "  {}\n{} ",
    "letter": "{}\n{} ",
    "compact": "{}\n{}",
}


def put(record: dict[str, Any], path: str, value: Any) -> None:
    """Set a path in a record, making the records on the way."""
    *parents, last = path.split(".")
    for parent in parents:
        record = record.setdefault(parent, {})
    record[last] = value


def made_up_record(row: dict[str, Any], number: int) -> dict[str, Any]:
    """Make a record with exactly the columns that a row reads: text in the template's, a fitting answer and options."""
    record: dict[str, Any] = {}
    for path in places(row["template"]):
        if path != "options":
            put(record, path, MESSY.format(path, number))
    for path in row.get("keep", {}):
        put(record, path, row["keep"][path][0] if row["keep"][path] else record[path])
    options = row.get("options", [])
    if isinstance(options, str):
        put(record, options, [f"  option {letter} {number}" for letter in "ABC"])
    for path in options if isinstance(options, list) else []:
        put(record, path, f"  option {path} {number}")
    if "option_labels" in row:
        put(record, row["option_labels"], ["1", "2", "3"])
    put(record, row["answer"].removesuffix(".0"), made_up_answer(row, number))
    return record


def made_up_answer(row: dict[str, Any], number: int) -> Any:
    if "verbalizer" in row:
        return list(row["verbalizer"])[number % len(row["verbalizer"])]
    if row.get("options") and row.get("kind") != "free-form":
        return {"label": "2", "letter": "B", "index": 1, "number": "2"}.get(row.get("pick", "text"), f"  option B {number}")
    several = row["answer"].endswith((".0", ".text", ".answer", ".entity", "answers", "Name", "Answer"))
    return [f"answer\n{number}", f"other {number}"] if several else f"answer\n{number}"


def expected_example(row: dict[str, Any], number: int) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Work out input, answers and options from the row's YAML."""
    clean = row.get("clean", "")

    def column(path: str) -> str:
        return EXPECTED_CLEAN[clean.get(path, "") if isinstance(clean, dict) else ""].format(path, number)

    paths = row.get("options", [])
    names = ["A", "B", "C"] if isinstance(paths, str) else paths
    options = [f"  option {name} {number}" for name in names]
    if isinstance(clean, dict) and isinstance(paths, str):
        options = [{"letter": option[2:]}.get(clean.get(paths, ""), option) for option in options]
    letters = "123" if "option_labels" in row else "ABCDEFGH"
    style = row.get("option_style", " ({letter}) {text}")
    shown = "".join(style.replace("{letter}", a).replace("{text}", b) for a, b in zip(letters, options, strict=False))
    text = row["template"].replace("{options}", shown) if paths else row["template"]
    for path in places(row["template"]):
        text = text.replace("{" + path + "}", column(path), 1)
    text = text.replace("\n", row.get("replace", {}).get("\n", "\n"))
    if isinstance(clean, str) and clean:
        spaced = text.replace("\n", " ")
        text = {"strip": text.strip(), "newlines": spaced, "breaks": spaced, "whitespace": " ".join(text.split())}[clean]
    value = made_up_answer(row, number)
    if "verbalizer" in row:
        return text, (row["verbalizer"][value],), tuple(dict.fromkeys(row["verbalizer"].values()))
    if paths and row.get("kind") != "free-form":
        return text, (options[1],), tuple(options)
    answers = [str(item) for item in (value if isinstance(value, list) else [value])]
    answers = answers[:1] if row["answer"].endswith(".0") else answers
    answers = [row["join_answers"].join(answers)] if "join_answers" in row else answers
    changed = [
        " ".join(answer.split()) if row.get("clean_answers") in ("whitespace", "newlines") else answer for answer in answers
    ]
    return text, tuple(changed), ()


def as_on_the_hub(row: dict[str, Any], records: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Write the records as the row says the dataset lies, by config and split or as files; return the row, pointed there."""
    splits = {row.get(part, default).partition("[")[0] for part, default in (("train", "train"), ("test", "validation"))}
    if row.get("dataset") in ("csv", "json", "text"):
        assert set(row["data_files"]) == splits
        names = {split: f"{split}.{row['dataset']}" for split in splits}
        for name in names.values():
            write_file(row, records, folder / name)
        return row | {"data_files": names}
    config = row.get("config", "default")
    for split in splits:
        path = folder / config / split / "0000.parquet"
        path.parent.mkdir(parents=True)
        datasets.Dataset.from_list(records).to_parquet(path)
    files = "".join(f"\n  - {{split: {split}, path: {config}/{split}/*.parquet}}" for split in splits)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n  data_files:{files}\n---\n")
    return row | {"dataset": str(folder)}


def write_file(row: dict[str, Any], records: list[dict[str, Any]], path: Path) -> None:
    if row["dataset"] == "json":
        field = row.get("reader", {}).get("field")
        lines = "\n".join(json.dumps(record) for record in records)
        path.write_text(json.dumps({field: records}) if field else lines)
    else:
        datasets.Dataset.from_list(records).to_csv(path)


def rows_of(row: dict[str, Any], records: list[dict[str, Any]], folder: Path) -> collections.Counter[tuple[Any, ...]]:
    """Load the rows of train and test through `load_dataset`."""
    hub_row = read_hub_row("made-up", as_on_the_hub(row, records, folder), folder / "tasks.yaml")
    splits = [row.get("train", "train"), row.get("test", "validation")]
    loaded = [hub_row.rows_of_split(split) for split in dict.fromkeys(splits)]
    if "[" not in splits[0]:  # the whole split is drawn from
        assert len(loaded[0]) == len(records)
    return collections.Counter((example.input, example.answers, example.options) for rows in loaded for example in rows)


@pytest.mark.parametrize("name", [name for name in HUB if name not in CODED | ELSEWHERE and not HUB[name].unavailable])
def test_a_record_becomes_the_text_options_and_answer_of_its_row(name: str, tmp_path: Path) -> None:
    row = SHIPPED["tasks"][name]
    if name == "amazon_polarity":
        row = row | {"train": "train[:8]", "test": "train[8:10]"}  # in place of 11,000 rows
    count = max(10, len(row.get("verbalizer", ())))
    loaded = rows_of(row, [made_up_record(row, number) for number in range(count)], tmp_path)
    expected = {expected_example(row, number) for number in range(count)}
    assert len(expected) == count
    assert set(loaded) == expected


def examples_of(name: str, *records: dict[str, Any]) -> list[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    return [(row.input, row.answers, row.options) for row in HUB[name].examples(records)]


def test_wiki_split_lines_are_read(tmp_path: Path) -> None:
    row = SHIPPED["tasks"]["wiki_split"]
    (tmp_path / "lines.tsv").write_text('A "b , and c .\tA "b . <::::> C .\nD e .\tD . <::::> E .\n')
    row = row | {"data_files": {"train": "lines.tsv", "validation": "lines.tsv"}}
    first, second = read_hub_row("wiki_split", row, tmp_path / "tasks.yaml").rows_of_split("train")
    assert first == Example('sentence 1: A "b . [SEP] sentence 2: C .', ('A "b , and c .',))
    assert second.answers == ("D e .",)


def test_domains_are_run_together() -> None:
    assert examples_of("crawl_domain", {"example": "My Dog s"}) == [("mydogs", ("My Dog s",), ())]


def test_lama_templates_are_filled() -> None:
    record = {"template": "[X] plays [Y] .", "sub_label": "Ann", "obj_label": "chess"}
    assert examples_of("lama-trex", record) == [("Ann plays [MASK] .", ("chess",), ())]
    assert examples_of("lama-google_re", record) == [("Ann plays [MASK] .", ("chess",), ())]


# --- The rows that need code: hand-made records, and what CrossFit's description makes of them ----


def test_acronyms_and_long_forms_are_read_off_their_tags() -> None:
    tokens = ["the", "big", "red", "dog", "(", "B", "RD", ")"]
    one = {"tokens": tokens, "labels": [4, 0, 2, 2, 4, 1, 3, 4]}
    two = {"tokens": tokens, "labels": [4, 0, 2, 0, 4, 1, 3, 4]}
    ends = {"tokens": ["B", "is", "big", "dog"], "labels": [1, 4, 0, 2]}
    assert examples_of("acronym_identification", one, two, ends) == [
        ("the big red dog ( B RD ) [SEP] acronym: B RD", ("big red dog",), ()),
        ("B is big dog [SEP] acronym: B", ("big dog",), ()),
    ]


@pytest.mark.parametrize("name", ["blimp-ellipsis_n_bar_1", "crows_pairs"])
def test_pairs_are_ordered_by_the_seeded_coin(name: str) -> None:
    right, wrong = ("sentence_good", "sentence_bad") if name.startswith("blimp") else ("sent_more", "sent_less")
    rows = examples_of(name, *({right: f"r{n}", wrong: f"w{n}"} for n in range(4)))
    # RandomState(42) draws 0.37, 0.95, 0.73, 0.60: the first pair is turned round
    assert rows[0] == ("sentence 1: w0 [SEP] sentence 2: r0", ("sentence 2",), ("sentence 1", "sentence 2"))
    assert [row[:2] for row in rows[1:]] == [(f"sentence 1: r{n} [SEP] sentence 2: w{n}", ("sentence 1",)) for n in (1, 2, 3)]


def test_rows_of_one_concept_set_become_one_row_with_all_references() -> None:
    records = [
        {"concept_set_idx": n, "concepts": ["dog", "run"] if n else ["cat"], "target": t}
        for n, t in ((1, "a"), (0, "b"), (1, "c"))
    ]
    assert examples_of("common_gen", *records) == [("dog, run", ("a", "c"), ()), ("cat", ("b",), ())]


def test_dialogues_are_merged_without_their_broken_utterances() -> None:
    row = {"prompt": "I won_comma_ once", "context": "proud"}
    rows = examples_of(
        "empathetic_dialogues", row | {"utterance": "x hit:1_y"}, row | {"utterance": "Yes_comma_\nme"}, row | {"utterance": "No"}
    )
    assert rows == [("I won, once [SEP] proud", ("Yes, me", "No"), ())]


def test_the_majority_of_annotators_decides_and_ties_are_dropped() -> None:
    records = [{"post_tokens": ["a", "b"], "annotators": {"label": labels}} for labels in ([2, 0, 2], [0, 1, 2], [1, 1, 1])]
    assert [row[:2] for row in examples_of("hatexplain", *records)] == [("a b", ("offensive",)), ("a b", ("normal",))]


def test_ratings_in_between_are_dropped() -> None:
    records = [{"content": " q ", "rating": rating} for rating in (0.2, 0.4, 0.5, 0.6, 0.8)]
    assert [row[:2] for row in examples_of("google_wellformed_query", *records)] == [
        ("q", ("not well-formed",)),
        ("q", ("well-formed",)),
    ]


def test_math_options_are_cut_at_every_comma() -> None:
    record = {"Problem": "p ?", "options": "a ) 38 , b ) 27.5 , c ) x y , d ) 4 , e ) none", "correct": "c"}
    assert examples_of("math_qa", record) == [
        ("p ? (A) 38 (B) 27.5 (C) x y (D) 4 (E) none", ("x y",), ("38", "27.5", "x y", "4", "none"))
    ]


def test_options_lose_their_own_letters() -> None:
    record = {"question": "q\n?", "options": ["A)21", "B)2 1"], "correct": "B"}
    assert examples_of("aqua_rat", record) == [("q ? (A) 21 (B) 2 1", ("2 1",), ("21", "2 1"))]


def test_options_inside_the_question_are_found() -> None:
    record = {"question": "It is more (A) rough or (B) smooth", "answer_index": 0}
    assert examples_of("quarel", record) == [("It is more (A) rough or (B) smooth", ("rough",), ("rough", "smooth"))]
    assert examples_of("quarel", record | {"answer_index": 1})[0][1] == ("smooth",)


def test_multirc_gathers_options_and_joins_the_right_ones() -> None:
    rows = [(0, "a", 1), (0, "b\n", 0), (1, "z", 0), (0, "c", 1)]
    records = [
        {"idx": {"question": q}, "question": "q?", "paragraph": "p\np", "answer": a, "label": label} for q, a, label in rows
    ]
    assert examples_of("superglue-multirc", *records) == [
        ("question: q? (A) a (B) b  (C) c context: p p", ("a [SEP] c",), ()),
        ("question: q? (A) z context: p p", ("NO ANSWER!",), ()),
    ]


def test_an_infobox_is_written_line_by_line() -> None:
    table = {"column_header": ["name", "born"], "content": [" A\nB ", "1900"]}
    record = {"input_text": {"context": " ab ", "table": table}, "target_text": "x\ny"}
    broken = {"input_text": {"context": "ab", "table": {"column_header": ["name"], "content": []}}, "target_text": "x"}
    assert examples_of("wiki_bio", record, broken) == [("ab [SEP] name: A B [n] born: 1900 [n] ", ("x y",), ())]


def test_proto_qa_answers_keep_the_order_of_the_file() -> None:
    line = json.dumps({"question": {"normalized": "name it"}, "answers": {"raw": {"zoo": 3, "ant": 9}}})
    assert examples_of("proto_qa", {"text": line}) == [("name it", ("zoo", "ant"), ())]


def test_only_paragraphs_that_support_the_answer_are_written() -> None:
    context = {"title": ["t", "u", "v"], "sentences": [["One.", " Two."], ["No."], ["Three. "]]}
    record = {"question": "q", "answer": "a", "context": context, "supporting_facts": {"title": ["v", "t", "t"]}}
    assert examples_of("hotpot_qa", record) == [("question: q context: One. Two. Three.", ("a",), ())]


def test_every_coded_row_is_among_these() -> None:
    families = ("blimp-",)
    tested = {
        "acronym_identification",
        "crows_pairs",
        "common_gen",
        "empathetic_dialogues",
        "hatexplain",
        "google_wellformed_query",
    }
    tested |= {"math_qa", "quarel", "superglue-multirc", "wiki_bio", "proto_qa", "hotpot_qa"}
    assert {name for name in CODED if not name.startswith(families)} == tested


# --- Local files, slices, truncation, and failures of loading ------------------------------------


def local_task(folder: Path, **fields: Any) -> Task:
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": f"t{n}", "label": n % 2}) + "\n" for n in range(10)))
    row = {"dataset": "json", "data_files": {"train": "rows.jsonl"}, "template": "{text}", "answer": "label", "metric": "ACC"}
    row |= {"verbalizer": {0: "even", 1: "odd"}, "train": "train[:80%]", "test": "train[80%:]", **fields}
    return hub_task("mine", row, folder / "my.yaml")


def test_a_users_own_file_is_split_by_the_seeded_shuffle(tmp_path: Path) -> None:
    sample = local_task(tmp_path).sample(42, 1, None)
    assert [row.input for row in sample.test] == ["t3", "t6"]  # the last of 8 1 5 0 7 2 9 4 3 6
    assert len(sample.train) == len(sample.validation) == 2
    assert not {row.input for row in sample.train} & {row.input for row in sample.validation}


def test_test_rows_are_drawn_with_a_fixed_seed_so_that_a_sorted_file_gives_all_labels(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"t{n}", "label": int(n >= 20)}) for n in range(40)]
    (tmp_path / "sorted.jsonl").write_text("\n".join(lines))
    files = {"train": "sorted.jsonl", "validation": "sorted.jsonl"}
    task = local_task(tmp_path, data_files=files, train="train", test="validation")
    sample = task.sample(42, 2, 12)
    assert {row.answers for row in sample.test} == {("even",), ("odd",)}
    assert task.sample(13, 4, 12).test == sample.test
    assert task.sample(42, 2, 5).test == sample.test[:5]
    assert [row.input for row in task.sample(42, 2, None).test] == [f"t{n}" for n in range(40)]
    assert task.sample(42, 2, 0).test == ()


def test_a_label_without_words_is_refused_by_name(tmp_path: Path) -> None:
    task = local_task(tmp_path, verbalizer={0: "even"})
    with pytest.raises(
        IptError, match=r"my.yaml: task 'mine': verbalizer has no words for label '1' of 'label', only for 0; add it"
    ):
        task.sample(42, 1, None)


def test_a_column_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    task = local_task(tmp_path, template="{txt}")
    with pytest.raises(IptError, match=r"task 'mine': template names 'txt', which the data lacks; its columns are text, label"):
        task.sample(42, 1, None)


def test_a_column_that_a_transform_needs_is_named(tmp_path: Path) -> None:
    task = local_task(tmp_path, transform=["merge", "text", "group"])
    with pytest.raises(IptError, match=r"task 'mine': transform needs column 'group', which the data lacks"):
        task.sample(42, 1, None)


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(IptError, match=r"the 8 rows of 'train\[:80%\]' are too few for 16 shots"):
        local_task(tmp_path).sample(42, 16, None)


def test_a_hub_that_does_not_answer_has_an_error_of_its_own_with_task_dataset_and_reason() -> None:
    with pytest.raises(
        UnreachableError, match=r"task 'ag_news': split 'train' of 'fancyzhx/ag_news' could not be loaded: .*--data DIR"
    ):
        load_tasks(TASKS_FILE)["ag_news"].sample(100, 16, None)


def test_a_failure_of_any_kind_inside_the_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class ConnectError(Exception):
        """Of an HTTP client, which derives from nothing known."""

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectError("no route\nto host")

    monkeypatch.setattr(hub.datasets, "load_dataset", refuse)
    with pytest.raises(
        IptError, match=r"task 'mine': split 'train' of 'json' could not be loaded: ConnectError: no route; a folder"
    ):
        local_task(tmp_path).sample(42, 1, None)


def test_a_withdrawn_dataset_says_so_and_names_the_way_out() -> None:
    with pytest.raises(IptError, match=r"task 'eli5-asks' cannot be loaded: its source data are gone, .*--data DIR"):
        load_tasks(TASKS_FILE)["eli5-asks"].sample(100, 16, None)


@pytest.mark.parametrize(
    ("name", "record", "spared"),
    [
        ("anli", {"premise": "p", "hypothesis": "h", "label": 0}, " [SEP] hypothesis: h"),
        ("hellaswag", {"ctx": "c", "endings": ["x", "y"], "label": "1"}, " (A) x (B) y"),
        ("boolq", {"question": "q", "passage": "p", "answer": True}, ""),
        ("kilt_wow", {"input": "a\nb", "output": [{"answer": "c"}]}, "a b"),
    ],
)
def test_truncation_spares_the_question_and_the_options(name: str, record: dict[str, Any], spared: str) -> None:
    (row,) = HUB[name].examples([record])
    assert row.input[len(row.input) - row.tail :] == spared


# --- Bad rows ------------------------------------------------------------------------------------

GOOD = {"dataset": "d", "template": "{text} [SEP] {b}", "answer": "label", "metric": "ACC", "verbalizer": {0: "no", 1: "yes"}}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"templat": "{a}"}, "f.yaml: task 'x' has an unknown field 'templat'; did you mean 'template'?"),
        (
            {"verbalizer": {0: False}},
            "field 'verbalizer', entry '0' must be text, not false (in YAML yes, no, on and off are booleans: quote it)",
        ),
        ({"verbalizer": {0: 3}}, "field 'verbalizer', entry '0' must be text, not 3 (quote it)"),
        ({"template": True}, "field 'template' must be text, not true (in YAML yes, no, on and off are booleans: quote it)"),
        ({"template": None}, "field 'template' must be text, not empty"),
        ({"config": 5}, "field 'config' must be text, not 5 (quote it)"),
        ({"metric": "F1"}, "field 'metric' is 'F1'"),
        ({"metric": "Rouge-l"}, "did you mean 'Rouge-L'?"),
        (
            {"splits": {"random": "unsen"}},
            "field 'splits', entry 'random' is 'unsen'; did you mean 'unseen' or 'unseen-in' or 'unseen-out'?; it can be",
        ),
        ({"clean": {"a.text": "strip"}}, "clean names 'a.text', but only whole columns can be cleaned"),
        ({"clean": {"text": "white"}}, "field 'clean', entry 'text' is 'white'; did you mean 'whitespace'?"),
        ({"keep": {"label": 0}}, "field 'keep', entry 'label' must be a list, not 0"),
        ({"template": "{text"}, "field 'template' cannot be read"),
        ({"template": "{text!r}"}, "a field of the template is a bare {column}, without '!' or ':' and not empty"),
        ({"option_style": "{0}"}, "option_style names '0', but there are only letter and text"),
        ({"where": "elsewhere"}, "task 'x' has an unknown field 'where'"),
        ({"verbalizer": ["no", "yes"]}, "field 'verbalizer' must be a mapping, not a list"),
        ({"verbalizer": ..., "kind": "classification"}, "task 'x' is of kind classification, so it needs field 'verbalizer'"),
        ({"verbalizer": ..., "kind": "multiple-choice"}, "task 'x' is of kind multiple-choice, so it needs field 'options'"),
        ({"truncate": "context"}, "truncate names 'context', but the template has only text, b"),
        ({"transform": "merg"}, "there is no transform 'merg'; did you mean 'merge'?"),
        ({"transform": ["merg", "a"]}, "there is no transform 'merg'; did you mean 'merge'?"),
        ({"test": "[:5]"}, "split '[:5]' cannot be read; write a name or a slice such as train[:80%]"),
        ({"train": "train[80]"}, "split 'train[80]' cannot be read; write a name or a slice such as train[:80%]"),
        ({"pick": "label"}, "pick is 'label', so option_labels must name the column of the labels"),
        ({"dataset": ...}, "task 'x' has no field 'dataset', which every row needs"),
    ],
)
def test_a_bad_row_is_refused_in_one_sentence(change: dict[str, Any], sentence: str) -> None:
    row = {key: value for key, value in (GOOD | change).items() if value is not ...}
    assert hub_task("x", GOOD, Path("f.yaml")).kind == "classification"
    with pytest.raises(IptError, match=re.escape(sentence)) as caught:
        hub_task("x", row, Path("f.yaml"))
    assert str(caught.value).startswith("f.yaml: task 'x'")
    assert "\n" not in str(caught.value)


def test_unquoted_words_of_real_yaml_are_refused() -> None:
    row = yaml.safe_load("{dataset: d, template: '{a}', answer: b, metric: ACC, verbalizer: {0: no, 1: yes}}")
    with pytest.raises(IptError, match="quote it"):
        hub_task("x", row, Path("f.yaml"))


@pytest.mark.parametrize("row", [None, "text", 5, ["a", "b"]])
def test_what_is_no_row_at_all_is_refused(row: Any) -> None:
    with pytest.raises(IptError, match=r"f\.yaml: task 'x' is .*, not a mapping of fields such as template, answer, metric"):
        hub_task("x", row, Path("f.yaml"))


# --- Fields of a row, one by one -----------------------------------------------------------------


def test_every_cleaner_and_transform_has_a_name_that_a_row_can_say() -> None:
    assert set(EXPECTED_CLEAN) == set(CLEANERS)
    assert {name for row in HUB.values() if row.transform for name in row.transform[:1]} == set(TRANSFORMS)


def test_a_row_knows_its_kind_from_its_fields(tmp_path: Path) -> None:
    free = {key: value for key, value in GOOD.items() if key != "verbalizer"}
    kinds = [
        hub_task("x", row, Path("f.yaml")).kind for row in (GOOD, free, free | {"options": "o"}, GOOD | {"kind": "free-form"})
    ]
    assert kinds == ["classification", "free-form", "multiple-choice", "free-form"]


def test_a_task_holds_its_row_as_written_and_its_words_unless_its_files_may_change_any_time(tmp_path: Path) -> None:
    task = hub_task("x", GOOD, Path("f.yaml"))
    assert (task.definition, task.words, task.source) == (GOOD, ("no", "yes"), "d")
    assert local_task(tmp_path).definition is None
    files = {"train": "https://example.org/a.csv", "validation": "https://example.org/b.csv"}
    from_the_net = GOOD | {"dataset": "csv", "data_files": files}
    assert hub_task("x", from_the_net, Path("f.yaml")).definition == from_the_net
    of_a_folder = GOOD | {"dataset": "csv", "reader": {"data_dir": "mine"}}
    assert hub_task("x", of_a_folder, Path("f.yaml")).definition is None


RECORD = {"q": "ask", "a": ["x", "y"], "letters": ["p", "q"], "right": "y", "many": ["b", "a", "", "b"]}


@pytest.mark.parametrize(
    ("pick", "key", "message"),
    [
        ("text", "z", "'z' of 'right' is no text of the 2 options"),
        ("label", "z", "'z' of 'right' is no label of the 2 options"),
        ("letter", "C", "'C' of 'right' is no letter of the 2 options"),
        ("index", 2, "'2' of 'right' is no index of the 2 options"),
        ("index", -1, "'-1' of 'right' is no index of the 2 options"),
        ("number", 0, "'0' of 'right' is no number of the 2 options"),
        ("number", "one", "'one' of 'right' is no number of the 2 options"),
    ],
)
def test_a_key_that_picks_no_option_is_refused_by_name(pick: str, key: Any, message: str) -> None:
    row = {"dataset": "d", "template": "{q}{options}", "answer": "right", "metric": "ACC", "options": "a", "pick": pick}
    read = read_hub_row("x", row | ({"option_labels": "letters"} if pick == "label" else {}), Path("f.yaml"))
    right = {"text": "y", "label": "q", "letter": "b", "index": 1, "number": 2}[pick]
    assert next(read.examples([RECORD | {"right": right}])).answers == ("y",)
    with pytest.raises(IptError, match=re.escape(f"f.yaml: task 'x': {message}")):
        next(read.examples([RECORD | {"right": key}]))


@pytest.mark.parametrize(
    ("fields", "answers"),
    [
        ({}, ("b", "a", "", "b")),
        ({"references": "unique"}, ("b", "a")),
        ({"references": "sorted"}, ("a", "b")),
        ({"references": "sorted", "join_answers": ""}, ("ab",)),
        ({"join_answers": " + "}, ("b + a +  + b",)),
        ({"answer": "nothing"}, ("",)),
        ({"answer": "missing"}, ("",)),
        ({"answer": "many.1"}, ("a",)),
    ],
)
def test_several_references_become_what_the_row_says(fields: dict[str, Any], answers: tuple[str, ...]) -> None:
    row = {"dataset": "d", "template": "{q}", "answer": "many", "metric": "EM"}
    (example,) = read_hub_row("x", row | fields, Path("f.yaml")).examples([RECORD | {"nothing": [], "missing": None}])
    assert example == Example("ask", answers)


def test_lists_in_a_template_are_joined_and_replaced_text_is_a_template() -> None:
    row = {
        "dataset": "d",
        "template": "{q}: {many}",
        "answer": "right",
        "metric": "EM",
        "join": "+",
        "replace": {"ask": "({right})"},
    }
    (example,) = read_hub_row("x", row, Path("f.yaml")).examples([RECORD])
    assert example.input == "(y): b+a++b"


@pytest.mark.parametrize(("template", "truncate"), [("x = {{}} {q}", ""), ("{{q}} {q} {right}", "q"), ("{{q}} {q}", "start")])
def test_doubled_braces_of_a_template_are_text(template: str, truncate: str) -> None:
    row = {"dataset": "d", "template": template, "answer": "right", "metric": "EM", "truncate": truncate}
    (example,) = read_hub_row("x", row, Path("f.yaml")).examples([RECORD])
    assert example.input == template.format(**RECORD)
    assert example.tail == {"": 0, "q": len(" y"), "start": len(example.input)}[truncate]


def test_more_options_than_there_are_letters_are_all_written() -> None:
    row = {"dataset": "d", "template": "{q}{options}", "answer": "key", "metric": "ACC", "options": "many", "pick": "letter"}
    record = RECORD | {"many": [f"option {n}" for n in range(30)], "key": "ab"}
    (example,) = read_hub_row("x", row, Path("f.yaml")).examples([record])
    assert " (Z) option 25 (AA) option 26 (AB) option 27 " in example.input and example.input.endswith("(AD) option 29")
    assert example.answers == ("option 27",) and len(example.options) == 30


def test_the_name_of_a_column_may_hold_dots() -> None:
    row = {"dataset": "d", "template": "{meta.title} {meta.n}", "answer": "right", "metric": "EM"}
    (example,) = read_hub_row("x", row, Path("f.yaml")).examples([RECORD | {"meta.title": "T", "meta": {"n": 5}}])
    assert example.input == "T 5"


def test_only_records_with_a_wanted_value_are_kept() -> None:
    row = {"dataset": "d", "template": "{q}", "answer": "right", "metric": "EM", "keep": {"n": [1, True], "right": []}}
    records = [RECORD | {"q": f"{n!r} {right}", "n": n, "right": right} for n in (0, 1, True, None) for right in ("", "y")]
    kept = read_hub_row("x", row, Path("f.yaml")).examples(records)
    assert [example.input for example in kept] == ["1 y", "True y"]
