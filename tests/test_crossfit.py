"""The paper's tasks: their rows, CrossFit's samples of them, and the few-shot files that others built.

Run with `pytest tests/test_crossfit.py`. The tests of real data need ../shared/crossfit beside the repository, or such a folder's
path in IPT_CROSSFIT. Nothing here reaches the Hub: `load_dataset` reads local folders that look like the Hub's.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import re
import string
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml

import ipt
from ipt import Example, GymFolder, HubDataset, IptError, Task

SHIPPED = yaml.safe_load(ipt.TASKS_FILE.read_text(encoding="utf-8"))
TASKS = {name: ipt.parse_hub_task(name, row, ipt.TASKS_FILE) for name, row in SHIPPED["tasks"].items() if "template" in row}
REAL = Path(os.environ.get("IPT_CROSSFIT", Path(ipt.__file__).resolve().parent.parent / "shared" / "crossfit"))
needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real few-shot files in {REAL}; set IPT_CROSSFIT")


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    datasets.disable_progress_bars()


def source_of(name: str) -> HubDataset:
    source = TASKS[name].source
    assert isinstance(source, HubDataset)
    return source


# --- The sampler ---

LABELLED = tuple(Example(f"row {n}", (label,)) for n, label in enumerate("xxxyxxyyxy"))
# RandomState(42) puts ten rows into the order 8 1 5 0 7 2 9 4 3 6; their labels are then x x x x y x y x y y.


def inputs(rows: tuple[Example, ...]) -> list[int]:
    return [int(row.input.removeprefix("row ")) for row in rows]


def test_labels_follow_their_first_row_and_each_gives_its_first_rows_then_its_next() -> None:
    train, validation = ipt.crossfit_sample(LABELLED, seed=42, shots=2, per_label=True)
    assert (inputs(train), inputs(validation)) == ([8, 1, 7, 9], [5, 0, 3, 6])


def test_without_labels_the_shuffled_rows_are_cut_in_two() -> None:
    train, validation = ipt.crossfit_sample(LABELLED, seed=42, shots=4, per_label=False)
    assert (inputs(train), inputs(validation)) == ([8, 1, 5, 0], [7, 2, 9, 4])


def test_a_label_with_too_few_rows_gives_what_it_has() -> None:
    train, validation = ipt.crossfit_sample(LABELLED, seed=42, shots=5, per_label=True)
    assert (inputs(train), inputs(validation)) == ([8, 1, 5, 0, 2, 7, 9, 3, 6], [4])


@pytest.mark.parametrize("seed", ipt.CROSSFIT_SEEDS)
def test_the_shuffle_is_the_global_legacy_one_of_numpy(seed: int) -> None:
    expected = list(range(100))
    np.random.seed(seed)  # noqa: NPY002  # CrossFit's own call
    np.random.shuffle(expected)  # noqa: NPY002
    train, validation = ipt.crossfit_sample(
        [Example(f"row {n}", ("x",)) for n in range(100)], seed=seed, shots=32, per_label=False
    )
    assert inputs(train) + inputs(validation) == expected[:64]


def test_the_tsv_bytes_are_plain_and_keep_every_reference() -> None:
    assert ipt.crossfit_tsv([Example("ein \u00fc", ("a", "b")), Example('"q"', ("1",))]) == 'ein ü\ta\tb\n"q"\t1\n'.encode()


# --- Every row, from records with its columns to text: the contract ---
# The records hold made-up values, unequal in every column and row. What they must become is worked out here, from the YAML alone.

CODED = {name for name, row in SHIPPED["tasks"].items() if "transform" in row}
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
    for path in ipt.template_fields(row["template"]):
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
    for path in ipt.template_fields(row["template"]):
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
    task = ipt.parse_hub_task("made-up", as_on_the_hub(row, records, folder), folder / "tasks.yaml")
    source = task.source
    assert isinstance(source, HubDataset)
    splits = [row.get("train", "train"), row.get("test", "validation")]
    loaded = [ipt._rows_of_split(source, split) for split in dict.fromkeys(splits)]
    if "[" not in splits[0]:  # the whole split is drawn from
        assert len(loaded[0]) == len(records)
    return collections.Counter((example.input, example.answers, example.options) for rows in loaded for example in rows)


@pytest.mark.parametrize("name", [name for name in TASKS if name not in CODED and "unavailable" not in SHIPPED["tasks"][name]])
def test_a_record_becomes_the_text_options_and_answer_of_its_row(name: str, tmp_path: Path) -> None:
    row = SHIPPED["tasks"][name]
    if name in ELSEWHERE:
        pytest.skip(f"its records are no plain columns: {ELSEWHERE[name]}")
    if name == "amazon_polarity":
        row = row | {"train": "train[:8]", "test": "train[8:10]"}  # in place of 11,000 rows
    count = max(10, len(row.get("verbalizer", ())))
    loaded = rows_of(row, [made_up_record(row, number) for number in range(count)], tmp_path)
    expected = {expected_example(row, number) for number in range(count)}
    assert len(expected) == count
    assert set(loaded) == expected


ELSEWHERE = {
    "wiki_split": "test_wiki_split_lines_are_read",
    "crawl_domain": "test_domains_are_run_together",
    **dict.fromkeys(("lama-trex", "lama-google_re"), "test_lama_templates_are_filled"),
}


def examples_of(name: str, *records: dict[str, Any]) -> list[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    return [(row.input, row.answers, row.options) for row in source_of(name).examples(records)]


def test_wiki_split_lines_are_read(tmp_path: Path) -> None:
    row = SHIPPED["tasks"]["wiki_split"]
    (tmp_path / "lines.tsv").write_text('A "b , and c .\tA "b . <::::> C .\nD e .\tD . <::::> E .\n')
    row = row | {"data_files": {"train": "lines.tsv", "validation": "lines.tsv"}}
    source = ipt.parse_hub_task("wiki_split", row, tmp_path / "tasks.yaml").source
    assert isinstance(source, HubDataset)
    first, second = ipt._rows_of_split(source, "train")
    assert first == Example('sentence 1: A "b . [SEP] sentence 2: C .', ('A "b , and c .',))
    assert second.answers == ("D e .",)


def test_domains_are_run_together() -> None:
    assert examples_of("crawl_domain", {"example": "My Dog s"}) == [("mydogs", ("My Dog s",), ())]


def test_lama_templates_are_filled() -> None:
    record = {"template": "[X] plays [Y] .", "sub_label": "Ann", "obj_label": "chess"}
    assert examples_of("lama-trex", record) == [("Ann plays [MASK] .", ("chess",), ())]
    assert examples_of("lama-google_re", record) == [("Ann plays [MASK] .", ("chess",), ())]


# --- The rows that need code: hand-made records, and what CrossFit's description makes of them ---


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


# --- Slices, truncation, and failures of loading ---


def local_task(folder: Path, **fields: Any) -> Task:
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": f"t{n}", "label": n % 2}) + "\n" for n in range(10)))
    row = {"dataset": "json", "data_files": {"train": "rows.jsonl"}, "template": "{text}", "answer": "label", "metric": "ACC"}
    row |= {"verbalizer": {0: "even", 1: "odd"}, "train": "train[:80%]", "test": "train[80%:]", **fields}
    return ipt.parse_hub_task("mine", row, folder / "my.yaml")


def test_a_users_own_file_is_split_by_the_seeded_shuffle(tmp_path: Path) -> None:
    sample = local_task(tmp_path).source.sample(42, shots=1, test_rows=None)
    assert [row.input for row in sample.test] == ["t3", "t6"]  # the last of 8 1 5 0 7 2 9 4 3 6
    assert len(sample.train) == len(sample.validation) == 2
    assert not {row.input for row in sample.train} & {row.input for row in sample.validation}
    assert local_task(tmp_path).source.sample(13, shots=1, test_rows=1).test == sample.test[:1]


def test_a_label_without_words_is_refused_by_name(tmp_path: Path) -> None:
    task = local_task(tmp_path, verbalizer={0: "even"})
    with pytest.raises(
        IptError, match=r"my.yaml: task 'mine': verbalizer has no words for label '1' of 'label', only for 0; add it"
    ):
        task.source.sample(42, shots=1, test_rows=None)


def test_a_column_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    task = local_task(tmp_path, template="{txt}")
    with pytest.raises(IptError, match=r"task 'mine': template names 'txt', which the data lacks; its columns are text, label"):
        task.source.sample(42, shots=1, test_rows=None)


def test_a_column_that_a_transform_needs_is_named(tmp_path: Path) -> None:
    task = local_task(tmp_path, transform=["merge", "text", "group"])
    with pytest.raises(IptError, match=r"task 'mine': transform needs column 'group', which the data lacks"):
        task.source.sample(42, shots=1, test_rows=None)


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(IptError, match=r"the 8 rows of 'train\[:80%\]' are too few for 16 shots"):
        local_task(tmp_path).source.sample(42, shots=16, test_rows=None)


def test_a_failed_download_names_task_dataset_and_reason() -> None:
    with pytest.raises(IptError, match=r"task 'ag_news': split 'train' of 'fancyzhx/ag_news' could not be loaded: .*--data DIR"):
        TASKS["ag_news"].source.sample(100, shots=16, test_rows=None)


def test_a_failure_of_any_kind_inside_the_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class ConnectError(Exception):
        """Of an HTTP client, which derives from nothing known."""

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectError("no route\nto host")

    monkeypatch.setattr(ipt.datasets, "load_dataset", refuse)
    with pytest.raises(
        IptError, match=r"task 'mine': split 'train' of 'json' could not be loaded: ConnectError: no route; a folder"
    ):
        local_task(tmp_path).source.sample(42, shots=1, test_rows=None)


def test_a_withdrawn_dataset_says_so_and_names_the_way_out() -> None:
    with pytest.raises(IptError, match=r"task 'eli5-asks' cannot be loaded: its source data are gone, .*--data DIR"):
        TASKS["eli5-asks"].source.sample(100, shots=16, test_rows=None)


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
    (row,) = source_of(name).examples([record])
    assert row.input[len(row.input) - row.tail :] == spared


# --- Real few-shot files of 94 tasks ---

CONTEXT_FIRST = "MetaICL puts the context first and leaves out the separator"
OTHER_FORMAT = dict.fromkeys(("quail", "race-middle", "social_i_qa", "superglue-multirc"), CONTEXT_FIRST)
OWN_SEPARATOR = {"kilt_trex": "the data hold subject [SEP] relation", "kilt_zsre": "the data hold subject [SEP] relation"}
OTHER_WORDS = {
    "paws": "MetaICL writes the words that CrossFit declares, CrossFit the bare label",
    "tweet_eval-irony": "an old bug wrote 'hate' for label 1",
    "tweet_eval-offensive": "an old bug wrote 'hate' for label 1",
}


def pattern_of(template: str, inside: str = r"(?:(?! ?\[SEP\]).)*") -> re.Pattern[str]:
    """The template as a pattern: no field may hold a separator. MetaICL keeps options apart from the input."""
    parts = [(literal, path) for literal, path, *_ in string.Formatter().parse(template)]
    return re.compile(
        "".join(re.escape(literal) + (inside if path not in (None, "options") else "") for literal, path in parts), re.DOTALL
    )


def real_rows(task: Task) -> list[Example]:
    source = task.source
    assert isinstance(source, GymFolder)
    samples = [source.sample(seed, shots=16, test_rows=None if source.has_test else 0) for seed in source.seeds]
    return [row for sample in samples for row in (*sample.train, *sample.validation)] + list(samples[0].test)


@pytest.fixture(scope="module")
def real() -> dict[str, Task]:
    return ipt.find_gym_tasks(REAL, TASKS)


@needs_real_data
def test_every_real_input_matches_its_template(real: dict[str, Task]) -> None:
    assert len(real) == 94
    differing = set()
    for name, task in real.items():
        template = source_of(name).template
        pattern = pattern_of(template, ".*" if name in OWN_SEPARATOR else r"(?:(?! ?\[SEP\]).)*")
        rows = real_rows(task)
        assert len(rows) > 100
        # MetaICL strips what stands at the end: an empty last field, or the space before the options
        if not all(pattern.fullmatch(row.input) or pattern.fullmatch(row.input + " ") for row in rows):
            differing.add(name)
    assert differing == set(OTHER_FORMAT)


@needs_real_data
def test_no_template_lacks_what_all_real_inputs_begin_with(real: dict[str, Task]) -> None:
    for name in set(real) - set(OTHER_FORMAT):
        shortest, *others = sorted((row.input for row in real_rows(real[name])), key=len)
        start = next(shortest[:n] for n in range(len(shortest), -1, -1) if all(row.startswith(shortest[:n]) for row in others))
        literal = next(string.Formatter().parse(source_of(name).template))[0]
        assert start == literal, name


@needs_real_data
def test_a_wrong_template_would_be_found(real: dict[str, Task]) -> None:
    right = source_of("scitail").template
    for wrong in (right.replace("sentence 2", "sentence B"), right.replace(" [SEP]", ""), "{sentence1}", right + " [SEP] {x}"):
        assert not any(pattern_of(wrong).fullmatch(row.input) for row in real_rows(real["scitail"]))


@needs_real_data
def test_every_real_answer_is_one_of_the_rows_words(real: dict[str, Task]) -> None:
    differing, checked = set(), 0
    for name, task in real.items():
        words = set(source_of(name).verbalizer.values())
        answers = {row.answers for row in real_rows(task)} if words else set()
        checked += bool(words)
        if not {answer for references in answers for answer in references} <= words:
            differing.add(name)
    assert differing == set(OTHER_WORDS)
    assert checked >= 50


# --- CrossFit's bytes ---


def published(name: str) -> dict[tuple[str, int], str]:
    lines = (line.split() for line in ipt.shipped("crossfit_md5.txt").read_text().splitlines())
    keys = [(part, seed) for seed in ipt.CROSSFIT_SEEDS for part in ("train", "dev")] + [("test", 0)]
    return next(dict(zip(keys, digits, strict=True)) for task, *digits in lines if task == name)


def digest(name: str, rows: tuple[Example, ...]) -> str:
    """The MD5 of CrossFit's file of rows that MetaICL wrote: it moved the options out of the input, this puts them back."""
    source = source_of(name)
    if TASKS[name].kind == "multiple-choice" and source.template.endswith("{options}"):
        style = source.option_style.format
        shown = [
            "".join(style(letter=a, text=b) for a, b in zip(string.ascii_uppercase, row.options, strict=False)) for row in rows
        ]
        rows = tuple(dataclasses.replace(row, input=row.input + end) for row, end in zip(rows, shown, strict=True))
    return hashlib.md5(ipt.crossfit_tsv(rows)).hexdigest()[:8]


@needs_real_data
def test_real_test_files_give_the_published_md5(real: dict[str, Task]) -> None:
    equal = set()
    for name, task in real.items():
        source = task.source
        assert isinstance(source, GymFolder)
        if source.has_test and digest(name, source.sample(100, shots=16, test_rows=None).test) == published(name)["test", 0]:
            equal.add(name)
    assert len(equal) == 25


@needs_real_data
def test_real_train_and_dev_files_together_give_the_published_md5_of_train(real: dict[str, Task]) -> None:
    """MetaICL halved CrossFit's 32 rows: its train rows, then its dev rows, are CrossFit's train file."""
    equal = []
    for name, task in real.items():
        for seed in (100, 13, 21, 42):
            sample = task.source.sample(seed, shots=16, test_rows=0)
            if digest(name, sample.train + sample.validation) == published(name)["train", seed]:
                equal.append(name)
    assert (len(equal), len(set(equal))) == (75, 23)


class Rebuilt:
    """CrossFit's own rows again, for the verification."""

    def __init__(self, changed: str) -> None:
        self.changed = changed

    def sample(self, data_seed: int, *, shots: int, test_rows: int | None) -> ipt.FewShotSample:
        train, dev, test = (
            (Example(f"{part}{data_seed if part != 'test' else ''}", ("a",)),) for part in ("train", "dev", "test")
        )
        return ipt.FewShotSample(train, dev, test if self.changed != "test" else train)


def test_verification_tells_equal_files_from_different_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{part}{seed}" for seed in ipt.CROSSFIT_SEEDS for part in ("train", "dev")] + ["test"]
    digits = [hashlib.md5(f"{name}\ta\n".encode()).hexdigest()[:8] for name in names]
    (tmp_path / "md5.txt").write_text(f"# comment\ntask {' '.join(digits)}\n")
    monkeypatch.setattr(ipt, "shipped", lambda name: tmp_path / "md5.txt")
    verdicts = ipt.verify_task(Task(name="task", kind="free-form", metric="EM", splits={}, source=Rebuilt("")))
    assert [verdict for *_, verdict in verdicts] == ["equal"] * 11
    verdicts = ipt.verify_task(Task(name="task", kind="free-form", metric="EM", splits={}, source=Rebuilt("test")))
    assert verdicts[-1] == ("test", 100, "different")
    assert {verdict for *_, verdict in verdicts[:-1]} == {"equal"}


def test_there_are_md5s_of_every_task() -> None:
    assert all(re.fullmatch("[0-9a-f]{8}", digits) for name in TASKS for digits in published(name).values())


# --- Bad rows ---

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
            "field 'splits' is 'unsen'; did you mean 'unseen' or 'unseen-in' or 'unseen-out'?; it can be seen, unseen, unseen-in, unseen-out",
        ),
        ({"clean": {"text": "white"}}, "field 'clean' is 'white'; did you mean 'whitespace'?"),
        ({"keep": {"label": 0}}, "field 'keep', entry 'label' must be a list of values, not 0 (quote it)"),
        ({"template": "{text"}, "field 'template' cannot be read"),
        ({"template": "{text!r}"}, "a field of the template is a bare {column}, without '!' or ':' and not empty"),
        ({"template": "{}"}, "a field of the template is a bare {column}, without '!' or ':' and not empty"),
        ({"verbalizer": ..., "kind": "classification"}, "task 'x' is of kind classification, so it needs field 'verbalizer'"),
        ({"verbalizer": ..., "kind": "multiple-choice"}, "task 'x' is of kind multiple-choice, so it needs field 'options'"),
        ({"truncate": "context"}, "truncate names 'context', but the template has only text, b"),
        ({"transform": "merg"}, "there is no transform 'merg'; did you mean 'merge'?"),
        ({"train": "train[80]"}, "split 'train[80]' cannot be read; write a name or a slice such as train[:80%]"),
        ({"pick": "label"}, "pick is 'label', so option_labels must name the column of the labels"),
        ({"dataset": ...}, "task 'x' has no field 'dataset', which every row needs"),
    ],
)
def test_a_bad_row_is_refused_in_one_sentence(change: dict[str, Any], sentence: str) -> None:
    row = {key: value for key, value in (GOOD | change).items() if value is not ...}
    assert ipt.parse_hub_task("x", GOOD, Path("f.yaml")).kind == "classification"
    with pytest.raises(IptError, match=re.escape(sentence)) as caught:
        ipt.parse_hub_task("x", row, Path("f.yaml"))
    assert str(caught.value).startswith("f.yaml: task 'x'")
    assert "\n" not in str(caught.value)


def test_unquoted_words_of_real_yaml_are_refused() -> None:
    row = yaml.safe_load("{dataset: d, template: '{a}', answer: b, metric: ACC, verbalizer: {0: no, 1: yes}}")
    with pytest.raises(IptError, match="quote it"):
        ipt.parse_hub_task("x", row, Path("f.yaml"))


# --- Splits of the tasks ---


def count(name: str) -> dict[str, int]:
    return dict(collections.Counter(ipt.split_tasks(TASKS, name, SHIPPED["subsets"]).values()))


def test_the_papers_splits_have_its_sizes() -> None:
    assert count("random") == {"seen": 100, "unseen": 20}
    assert count("cls") == {"seen": 35, "unseen-in": 8, "unseen-out": 76}  # the paper counts 77 without discovery's place
    assert count("non-cls") == {"seen": 35, "unseen-in": 41, "unseen-out": 43}
    assert [count(f"random-{size}") for size in (20, 40, 60, 80)] == [{"seen": size, "unseen": 20} for size in (20, 40, 60, 80)]


def test_subsets_are_seen_tasks_of_random() -> None:
    roles = ipt.split_tasks(TASKS, "random", {})
    assert all(roles[name] == "seen" for names in SHIPPED["subsets"].values() for name in names)


def test_leaving_a_type_out_makes_all_its_tasks_unseen() -> None:
    roles = ipt.split_tasks(TASKS, "without-nli", SHIPPED["subsets"])
    assert collections.Counter(roles.values()) == {"seen": 94, "unseen": 7}
    assert {name for name, role in roles.items() if role == "unseen"} == {
        name for name in roles if TASKS[name].category == "cls/nli"
    }


def test_an_unknown_split_names_the_nearest() -> None:
    with pytest.raises(IptError, match="there is no task split 'randon'; did you mean 'random'"):
        ipt.split_tasks(TASKS, "randon", SHIPPED["subsets"])


# --- Gym folders ---


def write_gym(
    folder: Path, name: str, lines: str, *, suffix: str = "tsv", seeds: tuple[int, ...] = (13, 100), k: int = 16
) -> Path:
    (folder / name).mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for part in ("train", "dev", "test"):
            (folder / name / f"{name}_{k}_{seed}_{part}.{suffix}").write_text(
                lines.replace("PART", f"{part}{seed}{k}"), encoding="utf-8"
            )
    return folder


def test_a_tsv_build_of_a_known_task_takes_its_words_and_metric(tmp_path: Path) -> None:
    write_gym(tmp_path, "ag_news", "PART a\u2028b\tWorld\nPART\tSports\n")
    task = ipt.find_gym_tasks(tmp_path, TASKS)["ag_news"]
    sample = task.source.sample(13, shots=16, test_rows=1)
    assert sample.train[0] == Example("train1316 a\u2028b", ("World",), ("World", "Sports", "Business", "Sci/Tech"))
    assert sample.test == (Example("test1316 a\u2028b", ("World",), sample.train[0].options),)
    assert (task.kind, task.metric, task.splits["cls"]) == ("classification", "Classification-F1", "seen")


def test_several_references_are_read_and_written_back(tmp_path: Path) -> None:
    write_gym(tmp_path, "kilt_nq", "PART\ta\tb\n", k=32)
    sample = ipt.find_gym_tasks(tmp_path, TASKS)["kilt_nq"].source.sample(100, shots=16, test_rows=None)
    assert sample.validation[0].answers == ("a", "b")
    assert ipt.crossfit_tsv(sample.validation) == b"dev10032\ta\tb\n"


def test_the_asked_for_k_is_taken_where_there_are_several(tmp_path: Path) -> None:
    for k in (16, 32, 64):
        write_gym(tmp_path, "kilt_nq", "PART\ta\n", k=k)
    source = ipt.find_gym_tasks(tmp_path, TASKS)["kilt_nq"].source
    assert [source.sample(100, shots=shots, test_rows=0).train[0].input for shots in (16, 32, 5)] == [
        "train10032",
        "train10064",
        "train10016",
    ]


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
    task = ipt.find_gym_tasks(write_gym(tmp_path, "new", lines, suffix="jsonl"), TASKS)["new"]
    assert (task.kind, task.metric) == (kind, metric)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    write_gym(tmp_path, "ag_news", "PART\tWorld\n")
    tasks = ipt.find_gym_tasks(tmp_path, TASKS)
    with pytest.raises(IptError, match="task 'ag_news' has no train and dev files for data seed 87; the folder has 13, 100"):
        tasks["ag_news"].source.sample(87, shots=16, test_rows=None)
    for path in (tmp_path / "ag_news").glob("*_test.tsv"):
        path.unlink()
    tasks = ipt.find_gym_tasks(tmp_path, TASKS)
    assert ipt.missing_from_gym(tasks, ["ag_news", "boolq"], [13, 21, 42]) == [
        "task 'ag_news' lacks data seeds 21, 42",
        "task 'ag_news' has no test file",
        "task 'boolq' is not in the folder",
    ]
    with pytest.raises(IptError, match="task 'ag_news' has no test file"):
        tasks["ag_news"].source.sample(13, shots=16, test_rows=None)
    assert tasks["ag_news"].source.sample(13, shots=16, test_rows=0).test == ()


def test_broken_lines_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(IptError, match="holds no task; expected files such as"):
        ipt.find_gym_tasks(tmp_path, TASKS)
    write_gym(tmp_path, "ag_news", "no tab here\n")
    with pytest.raises(IptError, match=r"ag_news_16_13_train.tsv, line 1: expected an input, a tab and the references"):
        ipt.find_gym_tasks(tmp_path, TASKS)["ag_news"].source.sample(13, shots=16, test_rows=0)
    write_gym(tmp_path, "boolq", '{"input": "i"}\n', suffix="jsonl")
    with pytest.raises(IptError, match=r"boolq_16_13_train.jsonl, line 1: expected a JSON object with input, output and options"):
        ipt.find_gym_tasks(tmp_path, TASKS)["boolq"].source.sample(13, shots=16, test_rows=0)


def test_a_users_own_list_of_tasks_is_a_split(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("seen: [glue-sst2, anli]\nunseen: [piqa]\n", encoding="utf-8")
    assert ipt.split_tasks(TASKS, str(file), {}) == {"glue-sst2": "seen", "anli": "seen", "piqa": "unseen"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seen: [glue-sst3]", r"mine\.yaml: there is no task 'glue-sst3'; did you mean 'glue-sst2'"),
        ("sen: [anli]", r"'sen' is no place of a split; did you mean 'seen'"),
        ("seen: [anli]\nunseen: [anli]", r"'anli' stands twice, under seen and unseen"),
        ("seen: anli", r"expected lists of tasks under seen, unseen"),
        ("[anli]", r"expected lists of tasks under seen, unseen"),
        ("seen: [anli", r"mine\.yaml is not readable as YAML"),
        (None, r"there is no file .*mine\.yaml"),
    ],
)
def test_a_wrong_list_of_tasks_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "mine.yaml"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    with pytest.raises(ipt.IptError, match=message):
        ipt.split_tasks(TASKS, str(file), {})
