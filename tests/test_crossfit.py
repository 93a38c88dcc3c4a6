"""CrossFit's sampler, real few-shot files of 94 tasks beside the rows of tasks.yaml, and the script that compares MD5s.

The tests of real data need ../shared/crossfit beside the repository, or such a folder's path in IPT_CROSSFIT.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import string
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import verify_crossfit
from helpers import REAL, hub_rows, needs_real_data
from verify_crossfit import crossfit_tsv, published, verify_task, verify_tasks

from intrinsic_prompt_tuning.tasks import CROSSFIT_SEEDS, TASKS_FILE, Example, Sample, Task, find_few_shot_tasks, load_tasks
from intrinsic_prompt_tuning.tasks.crossfit import crossfit_sample, drawn_test_rows

TASKS = load_tasks(TASKS_FILE)
HUB = hub_rows()

# --- The sampler ---------------------------------------------------------------------------------

LABELLED = tuple(Example(f"row {n}", (label,)) for n, label in enumerate("xxxyxxyyxy"))
# RandomState(42) puts ten rows into the order 8 1 5 0 7 2 9 4 3 6; their labels are then x x x x y x y x y y.


def inputs(rows: tuple[Example, ...]) -> list[int]:
    return [int(row.input.removeprefix("row ")) for row in rows]


def test_labels_follow_their_first_row_and_each_gives_its_first_rows_then_its_next() -> None:
    train, validation = crossfit_sample(LABELLED, seed=42, k=2, per_label=True)
    assert (inputs(train), inputs(validation)) == ([8, 1, 7, 9], [5, 0, 3, 6])


def test_without_labels_the_shuffled_rows_are_cut_in_two() -> None:
    train, validation = crossfit_sample(LABELLED, seed=42, k=4, per_label=False)
    assert (inputs(train), inputs(validation)) == ([8, 1, 5, 0], [7, 2, 9, 4])


def test_a_label_with_too_few_rows_gives_what_it_has() -> None:
    train, validation = crossfit_sample(LABELLED, seed=42, k=5, per_label=True)
    assert (inputs(train), inputs(validation)) == ([8, 1, 5, 0, 2, 7, 9, 3, 6], [4])


@pytest.mark.parametrize("seed", CROSSFIT_SEEDS)
def test_the_shuffle_is_the_global_legacy_one_of_numpy(seed: int) -> None:
    expected = list(range(100))
    np.random.seed(seed)  # noqa: NPY002  # CrossFit's own call
    np.random.shuffle(expected)  # noqa: NPY002
    train, validation = crossfit_sample([Example(f"row {n}", ("x",)) for n in range(100)], seed=seed, k=32, per_label=False)
    assert inputs(train) + inputs(validation) == expected[:64]


def test_test_rows_are_drawn_with_one_seed_or_all_stand_in_the_order_of_the_file() -> None:
    assert [inputs(drawn_test_rows(LABELLED, count)) for count in (0, 1, 3)] == [[], [8], [8, 1, 5]]
    assert inputs(drawn_test_rows(LABELLED, 99)) == [8, 1, 5, 0, 7, 2, 9, 4, 3, 6]
    assert drawn_test_rows(LABELLED, None) == LABELLED


# --- Real few-shot files of 94 tasks -------------------------------------------------------------

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


def has_test(task: Task) -> bool:
    return (REAL / task.name / f"{task.name}_test.jsonl").exists()


def real_rows(task: Task) -> list[Example]:
    seeds = sorted({int(path.stem.split("_")[-2]) for path in (REAL / task.name).glob("*_dev.jsonl")})
    samples = [task.sample(seed, 16, None if has_test(task) else 0) for seed in seeds]
    return [row for sample in samples for row in (*sample.train, *sample.validation)] + list(samples[0].test)


@pytest.fixture(scope="module")
def real() -> dict[str, Task]:
    return find_few_shot_tasks(REAL, TASKS)


@needs_real_data
def test_every_real_input_matches_its_template(real: dict[str, Task]) -> None:
    assert len(real) == 94
    differing = set()
    for name, task in real.items():
        template = HUB[name].template
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
        literal = next(string.Formatter().parse(HUB[name].template))[0]
        assert start == literal, name


@needs_real_data
def test_a_wrong_template_would_be_found(real: dict[str, Task]) -> None:
    right = HUB["scitail"].template
    for wrong in (right.replace("sentence 2", "sentence B"), right.replace(" [SEP]", ""), "{sentence1}", right + " [SEP] {x}"):
        assert not any(pattern_of(wrong).fullmatch(row.input) for row in real_rows(real["scitail"]))


@needs_real_data
def test_every_real_answer_is_one_of_the_rows_words(real: dict[str, Task]) -> None:
    differing, checked = set(), 0
    for name, task in real.items():
        words = set(HUB[name].verbalizer.values())
        answers = {row.answers for row in real_rows(task)} if words else set()
        checked += bool(words)
        if not {answer for references in answers for answer in references} <= words:
            differing.add(name)
    assert differing == set(OTHER_WORDS)
    assert checked >= 50


def digest(name: str, rows: tuple[Example, ...]) -> str:
    """The MD5 of CrossFit's file of rows that MetaICL wrote: it moved the options out of the input, this puts them back."""
    source = HUB[name]
    if TASKS[name].kind == "multiple-choice" and source.template.endswith("{options}"):
        style = source.option_style.format
        shown = [
            "".join(style(letter=a, text=b) for a, b in zip(string.ascii_uppercase, row.options, strict=False)) for row in rows
        ]
        rows = tuple(dataclasses.replace(row, input=row.input + end) for row, end in zip(rows, shown, strict=True))
    return hashlib.md5(crossfit_tsv(rows)).hexdigest()[:8]


@needs_real_data
def test_real_test_files_give_the_published_md5(real: dict[str, Task]) -> None:
    equal = set()
    for name, task in real.items():
        if has_test(task) and digest(name, task.sample(100, 16, None).test) == published()[name][-1]:
            equal.add(name)
    assert len(equal) == 25


@needs_real_data
def test_real_train_and_dev_files_together_give_the_published_md5_of_train(real: dict[str, Task]) -> None:
    """MetaICL halved CrossFit's 32 rows: its train rows, then its dev rows, are CrossFit's train file."""
    equal = []
    for name, task in real.items():
        for place, seed in enumerate(CROSSFIT_SEEDS[:4]):
            sample = task.sample(seed, 16, 0)
            if digest(name, sample.train + sample.validation) == published()[name][2 * place]:
                equal.append(name)
    assert (len(equal), len(set(equal))) == (75, 23)


# --- The script that compares MD5s ---------------------------------------------------------------


def test_the_tsv_bytes_are_plain_and_keep_every_reference() -> None:
    assert crossfit_tsv([Example("ein \u00fc", ("a", "b")), Example('"q"', ("1",))]) == 'ein ü\ta\tb\n"q"\t1\n'.encode()


def rebuilt(changed: str) -> Task:
    """Return a task that draws CrossFit's own rows again, but for one part."""

    def draw(data_seed: int, shots: int, test_rows: int | None) -> Sample:
        assert (shots, test_rows) == (16, None)
        train, dev, test = (
            (Example(f"{part}{data_seed}".replace("test100", "test"), ("a",)),) for part in ("train", "dev", "test")
        )
        return Sample(train, train if changed == f"dev {data_seed}" else dev, train if changed == "test 100" else test)

    return Task(name="task", kind="free-form", metric="EM", source="", draw=draw)


@pytest.fixture
def _own_md5s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{part}{seed}" for seed in CROSSFIT_SEEDS for part in ("train", "dev")] + ["test"]
    digits = [hashlib.md5(f"{name}\ta\n".encode()).hexdigest()[:8] for name in names]
    (tmp_path / "md5.txt").write_text(f"# comment\ntask {' '.join(digits)}\n")
    monkeypatch.setattr(verify_crossfit, "MD5_FILE", tmp_path / "md5.txt")


@pytest.mark.usefixtures("_own_md5s")
def test_verification_tells_equal_files_from_different_ones() -> None:
    assert [verdict for *_, verdict in verify_task(rebuilt(""))] == ["equal"] * 11
    for changed in ("test 100", "dev 100", "dev 87"):
        verdicts = verify_task(rebuilt(changed))
        assert [f"{part} {seed}" for part, seed, verdict in verdicts if verdict == "different"] == [changed]
        assert len(verdicts) == 11


@pytest.mark.usefixtures("_own_md5s")
def test_verification_prints_a_line_a_task_and_a_count(capsys: pytest.CaptureFixture[str]) -> None:
    tasks = {"task": rebuilt("dev 87"), "other": dataclasses.replace(rebuilt(""), name="other")}
    verify_tasks(tasks, ["task", "other", "tisk"])
    assert capsys.readouterr().out.splitlines() == [
        "task: different: dev 87",
        "other: could not be loaded: CrossFit published no MD5s for task 'other'; only its own tasks can be verified",
        "tisk: could not be loaded: there is no such task in the tasks file; did you mean 'task'?",
        "0 equal, 1 different, 2 could not be loaded",
    ]
    verify_tasks({"task": rebuilt("")}, ["task"])
    assert capsys.readouterr().out == "task: equal\n1 equal, 0 different, 0 could not be loaded\n"


def test_the_script_runs_from_anywhere_and_ends_well_without_the_hub(tmp_path: Path, tasks_file: Path) -> None:
    script = [sys.executable, verify_crossfit.__file__]
    run = subprocess.run([*script, "ag_news", "eli5-asks"], cwd=tmp_path, capture_output=True, text=True)
    lines = run.stdout.splitlines()
    assert (run.returncode, len(lines)) == (0, 3), run.stderr
    assert re.match(r"ag_news: could not be loaded: .*split 'train' of 'fancyzhx/ag_news' could not be loaded", lines[0])
    assert re.match(r"eli5-asks: could not be loaded: .*its source data are gone", lines[1])
    assert lines[2] == "0 equal, 0 different, 2 could not be loaded"
    run = subprocess.run([*script, "mood-good", "--tasks-file", tasks_file], capture_output=True, text=True)
    assert run.returncode == 0 and "mood-good: could not be loaded: CrossFit published no MD5s" in run.stdout
    run = subprocess.run([*script, "--tasks-file", tmp_path / "absent.yaml"], capture_output=True, text=True)
    assert run.returncode == 2 and "there is no file" in run.stderr and "Traceback" not in run.stderr


def test_there_are_md5s_of_every_task() -> None:
    assert all(len(published()[name]) == 11 for name in HUB)
    assert all(re.fullmatch("[0-9a-f]{8}", digits) for name in HUB for digits in published()[name])
