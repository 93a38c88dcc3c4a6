"""Real few-shot files through the whole pipeline, on a small T5 and a small BART that are made here.

The files are looked for in ../shared/crossfit beside the repository, or in $IPT_CROSSFIT. No pre-trained model is needed: the
backbones get a tokenizer trained on the text of the chosen tasks, and random weights, so figures mean nothing but that they are
computed right.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import sklearn.metrics
import tokenizers
import torch
import transformers
from conftest import Cli, Result, commands, files_in, spread
from helpers import REAL, needs_real_data

from intrinsic_prompt_tuning.backbone import load_backbone
from intrinsic_prompt_tuning.files import read_file
from intrinsic_prompt_tuning.tasks import TASKS_FILE, find_few_shot_tasks, load_tasks, split_tasks
from intrinsic_prompt_tuning.tasks.crossfit import drawn_test_rows

pytestmark = [needs_real_data]

SEEN = {
    "glue-sst2": "classification",
    "commonsense_qa": "multiple-choice",
    "web_questions": "free-form",
    "glue-cola": "classification",
}
UNSEEN = {"rotten_tomatoes": "classification", "openbookqa": "multiple-choice", "kilt_trex": "free-form"}
KINDS = SEEN | UNSEEN
PROMPT_LENGTH, MAX_LENGTH, TEST_ROWS = 5, 48, 18
TUNING = ("--steps", 40, "--batch-size", 4, "--evaluations", 2, "--learning-rate", 0.3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a gym folder of the chosen tasks alone."""
    folder = tmp_path_factory.mktemp("gym")
    for name in KINDS:
        (folder / name).symlink_to(REAL / name, target_is_directory=True)
    return folder


def texts(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*/*_16_100_train.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            yield from (row["input"], row["output"], *row["options"])


def train_tokenizer(folder: Path, data: Path, specials: list[str], template: str, **roles: str) -> int:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts(data), trainer)
    used = [(token, backend.token_to_id(token)) for token in specials if token in template]
    backend.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=used)
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **roles).save_pretrained(folder)
    return int(backend.get_vocab_size())


@pytest.fixture(scope="module", params=["t5", "bart"])
def folder(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a backbone with a vocabulary of 700 pieces of the tasks' text."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    if request.param == "t5":
        roles = {"pad_token": "<pad>", "eos_token": "</s>"}
        size = train_tokenizer(folder, data, ["<pad>", "</s>", "<unk>"], "$A </s>", **roles)
        config = transformers.T5Config(
            vocab_size=size, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_decoder_layers=1, num_heads=3,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
        model: Any = transformers.T5ForConditionalGeneration(config)
    else:
        roles = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>"}
        size = train_tokenizer(folder, data, ["<s>", "<pad>", "</s>", "<unk>"], "<s> $A </s>", **roles)
        config = transformers.BartConfig(
            vocab_size=size, d_model=20, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=4,
            encoder_ffn_dim=36, decoder_ffn_dim=28, max_position_embeddings=MAX_LENGTH - 4, bos_token_id=0, pad_token_id=1,
            eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
        )  # fmt: skip
        model = transformers.BartForConditionalGeneration(config)
    spread(model, 1.5, seed=3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def done(folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Cli, Result]:
    """Return the cache after a whole run, a way to run further commands on it, and what the run printed."""
    cache = tmp_path_factory.mktemp("cache")
    cli = commands(
        "--backbone", folder, "--data", data, "--cache", cache, "--prompt-length", PROMPT_LENGTH,
        "--max-length", MAX_LENGTH, "--test-rows", TEST_ROWS, "--device", "cpu",
    )  # fmt: skip

    result = cli("run", *TUNING, "--dim", 3, "--subspace-steps", 10)
    assert result.code == 0, result.err
    return cache, cli, result


def test_every_task_has_its_kind_metric_and_place(data: Path) -> None:
    tasks = find_few_shot_tasks(data, load_tasks(TASKS_FILE))
    assert {name: task.kind for name, task in tasks.items()} == KINDS
    places = split_tasks(tasks, "random")
    assert places == dict.fromkeys(SEEN, "seen") | dict.fromkeys(UNSEEN, "unseen")
    assert tasks["glue-cola"].metric == "Matthew-Correlation"


def test_the_rows_are_those_of_the_files(data: Path) -> None:
    tasks = find_few_shot_tasks(data, {})
    for name, kind in KINDS.items():
        sample = tasks[name].sample(21, 16, TEST_ROWS)
        for part, rows in (("16_21_train", sample.train), ("16_21_dev", sample.validation), ("test", sample.test)):
            lines = (REAL / name / f"{name}_{part}.jsonl").read_text(encoding="utf-8").splitlines()
            expected = [(row["input"], row["output"], tuple(row["options"])) for row in map(json.loads, lines)]
            expected = list(drawn_test_rows(expected, TEST_ROWS)) if part == "test" else expected
            assert [(row.input, row.answers[0], row.options) for row in rows] == expected
            assert all(bool(row.options) == (kind != "free-form") for row in rows)


def test_how_many_rows_are_cut_is_said(done: tuple[Path, Cli, Result]) -> None:
    assert re.search(r"\d+ of \d+ rows of [\w-]+ are cut to \d+ tokens", done[2].err)


def test_every_stage_leaves_its_files(done: tuple[Path, Cli, Result]) -> None:
    (place,) = (path for path in done[0].iterdir() if path.name not in ("samples", "commands"))
    counts = {kind.name: len(list(kind.iterdir())) for kind in place.iterdir()}
    assert counts == {"soft-prompts": 7, "subspaces": 2, "intrinsic-vectors": 2 * 7, "scores": 3 * 7 + 7 + 2 * 7 + 2 * 3}
    for path in place.glob("soft-prompts/*"):
        (tensor,) = safetensors.torch.load_file(path).values()
        assert tensor.shape[0] == PROMPT_LENGTH and tensor.isfinite().all()


def test_losses_fall_on_every_task(done: tuple[Path, Cli, Result]) -> None:
    records = {h["task"]: r for h, r, _ in map(read_file, done[0].glob("*/soft-prompts/*"))}
    assert records.keys() == KINDS.keys()
    for name, record in records.items():
        assert record["last_loss"] < record["first_loss"], name


def test_reports_have_all_quantities(done: tuple[Path, Cli, Result]) -> None:
    report = json.loads(done[1]("eval", "--json").out)
    quantities = {row["quantity"] for row in report["rows"]}
    names = ("T_train(MSF)", "T_test(MSF)", "T_train_diff(IST)", "T_test(IST)", "T_test(mean)", "T_test(nearest)")
    assert quantities == set(names)
    assert {place: row["n_tasks"] for place, row in report["prompt_tuning"].items()} == {"seen": 4, "unseen": 3}


def test_scores_are_those_of_a_plain_loop(done: tuple[Path, Cli, Result], folder: Path, data: Path) -> None:
    """Classification and multiple choice by the most likely option, CoLA by scikit-learn's Matthews correlation."""
    report = json.loads(done[1]("eval", "--json", "--per-task").out)
    told = {s["task"]: s["value"] for s in report["scores"] if s["quantity"] == "prompt tuning"}
    backbone = load_backbone(str(folder), device="cpu", max_length=MAX_LENGTH)
    model, tokenizer = backbone.model, backbone.tokenizer
    tasks = find_few_shot_tasks(data, load_tasks(TASKS_FILE))
    for name in ("glue-sst2", "glue-cola", "openbookqa"):
        (path,) = done[0].glob(f"*/soft-prompts/{name}-*")
        prompt = safetensors.torch.load_file(path)["soft_prompt"]
        truths, guesses = [], []
        for row in tasks[name].sample(100, 16, TEST_ROWS).test:
            ids = tokenizer(row.input).input_ids
            room = backbone.max_length - PROMPT_LENGTH
            ids = ids if len(ids) <= room else [*ids[: room - 1], ids[-1]]
            inputs = torch.cat([prompt, model.get_input_embeddings()(torch.tensor(ids))])[None]
            losses = []
            for option in row.options:
                labels = torch.tensor([tokenizer(text_target=option).input_ids])
                with torch.no_grad():
                    losses.append(float(model(inputs_embeds=inputs, labels=labels).loss) * labels.shape[1])
            truths.append(row.answers[0])
            guesses.append(row.options[losses.index(min(losses))])
        if name == "glue-cola":
            expected = sklearn.metrics.matthews_corrcoef(truths, guesses)
        else:
            expected = sklearn.metrics.accuracy_score(truths, guesses)
        assert told[name] == pytest.approx(expected), name


def test_running_again_changes_nothing(done: tuple[Path, Cli, Result]) -> None:
    before = files_in(done[0])
    again = done[1]("run", *TUNING, "--dim", 3, "--subspace-steps", 10)
    assert (again.code, again.out) == (0, done[2].out)
    assert files_in(done[0]) == before


def test_a_data_seed_that_the_folder_lacks_is_named_with_those_it_has(done: tuple[Path, Cli, Result]) -> None:
    result = done[1]("collect", *TUNING, "--task", "glue-sst2", "--data-seed", 5)
    assert result.code == 1
    assert "glue-sst2" in result.err and "data seed 5" in result.err and "13, 21, 42, 100" in result.err


def test_generation_answers_everything_when_asked_to(done: tuple[Path, Cli, Result]) -> None:
    """An untrained backbone hardly ever writes a label, but the most likely of two labels is right now and then."""
    result = done[1]("collect", "--steps", 2, "--task", "glue-sst2", "--decoding", "generate")
    assert result.code == 0, result.err
    report = json.loads(done[1]("eval", "--json", "--per-task", "--decoding", "generate", "--skip-missing").out)
    scores = {s["task"]: s["value"] for s in report["scores"] if s["quantity"] == "prompt tuning"}
    assert scores == {"glue-sst2": 0.0}
