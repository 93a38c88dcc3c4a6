"""A small world with seven tasks, a tiny T5 and a tiny BART that speak it, and a way to run the commands in this process."""

from __future__ import annotations

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "120", "TOKENIZERS_PARALLELISM": "false"}

import contextlib
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest
import tokenizers
import torch
import transformers

import ipt
from intrinsic_prompt_tuning.backbone import Backbone, load_backbone
from intrinsic_prompt_tuning.tasks import Task, World, load_tasks, load_worlds
from intrinsic_prompt_tuning.tasks.worlds import OPTION_MARK

torch.set_num_threads(1)
hypothesis.settings.register_profile(
    "ipt", deadline=None, max_examples=60, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
hypothesis.settings.load_profile("ipt")

# Every axis has a size of its own: 4 moods, 6 animals, 7 counts, 5 things, 3 days; prompts of 3; widths of 16 and 20.
TASKS_FILE = """
worlds:
  small:
    sentence: "the {mood.word} {animal.word} sees {count.word} {thing.plural} on {day.word}"
    slots: {mood: mood, animal: animal, count: count, thing: thing, day: day}
    lexicon:
      mood:
        columns: [word, opposite, tone]
        rows: [glad sorry good, sorry glad bad, mild wild good, wild mild bad]
      animal:
        columns: [word, class]
        rows: [fox beast, cow beast, owl bird, hen bird, cod fish, eel fish]
      count:
        columns: [word, next, parity]
        rows: [one two odd, two three even, three four odd, four five even, five six odd, six seven even, seven one odd]
      thing:
        columns: [word, plural]
        rows: [cup cups, box boxes, leaf leaves, key keys, toy toys]
      day:
        columns: [word, next]
        rows: [monday tuesday, tuesday sunday, sunday monday]

tasks:
  mood-good: {world: small, kind: classification, question: mood good, splits: {tiny: seen}, pretrained: true}
  animal-class: {world: small, kind: classification, question: animal class, metric: Classification-F1, splits: {tiny: seen}}
  count-next: {world: small, kind: transformation, question: count next, splits: {tiny: seen}}
  thing-plural: {world: small, kind: extraction, question: thing plural, splits: {tiny: seen}}
  mood-opposite-choice: {world: small, kind: multiple-choice, question: mood opposite, splits: {tiny: seen}}
  even-or-good: {world: small, kind: classification, question: count even or mood good, splits: {tiny: unseen}}
  day-then-count: {world: small, kind: transformation, question: day next then count next, splits: {tiny: unseen}}
"""
PROMPT_LENGTH = 3


@pytest.fixture(scope="session")
def tasks_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tasks") / "tasks.yaml"
    file.write_text(TASKS_FILE, encoding="utf-8")
    return file


@pytest.fixture
def impossible(tmp_path: Path) -> Path:
    """Return a tasks file in which nobody can draw the rows of the seen task animal-class."""
    file = tmp_path / "impossible.yaml"
    file.write_text(TASKS_FILE.replace("question: animal class,", "question: mood good and mood bad,"), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def world(tasks_file: Path) -> World:
    return load_worlds(tasks_file)["small"]


@pytest.fixture(scope="session")
def tasks(tasks_file: Path) -> dict[str, Task]:
    return load_tasks(tasks_file)


# --- Backbones -----------------------------------------------------------------------------------


def words_of(world: World) -> list[str]:
    entries = (entry for table in world.tables.values() for entry in table)
    values = {value for entry in entries for value in vars(entry).values()}
    return sorted(values | {"the", "sees", "on", "yes", "no", OPTION_MARK})


def save_tokenizer(folder: Path, specials: Sequence[str], words: Sequence[str], template: str, **roles: str) -> int:
    """Save a word-level tokenizer whose special tokens come first; return the size of its vocabulary."""
    vocabulary = {word: number for number, word in enumerate([*specials, *words])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    used = [(token, vocabulary[token]) for token in specials if token in template]
    backend.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=used)
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **roles).save_pretrained(folder)
    return len(vocabulary)


def spread(model: transformers.PreTrainedModel, scale: float, seed: int) -> None:
    """Give matrices weights so large that every word of input and prompt tells on the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.copy_(scale * torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5)


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory: pytest.TempPathFactory, world: World) -> Path:
    """Save a T5 with a relative position bias, tied embeddings and 2 + 1 layers."""
    folder = tmp_path_factory.mktemp("t5")
    specials = ["<pad>", "</s>", "<unk>"]
    size = save_tokenizer(folder, specials, words_of(world), "$A </s>", pad_token="<pad>", eos_token="</s>")
    config = transformers.T5Config(
        vocab_size=size, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_decoder_layers=1, num_heads=3, dropout_rate=0.1,
        relative_attention_num_buckets=8, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    spread(model, 1.5, seed=1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bart_folder(tmp_path_factory: pytest.TempPathFactory, world: World) -> Path:
    """Save a BART with 30 positions, scaled embeddings and, like published ones, beam search among its generation settings."""
    folder = tmp_path_factory.mktemp("bart")
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    roles = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "mask_token": "<mask>"}
    size = save_tokenizer(folder, specials, words_of(world), "<s> $A </s>", **roles)
    config = transformers.BartConfig(
        vocab_size=size, d_model=20, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=2,
        encoder_ffn_dim=28, decoder_ffn_dim=36, max_position_embeddings=30, scale_embedding=True, init_std=0.02,
        bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config)
    spread(model, 0.9, seed=2)
    model.generation_config = transformers.GenerationConfig(
        num_beams=3, no_repeat_ngram_size=2, early_stopping=True, decoder_start_token_id=2, eos_token_id=2, pad_token_id=1
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def t5(t5_folder: Path) -> Backbone:
    return load_backbone(str(t5_folder), device="cpu")


@pytest.fixture(scope="session")
def bart(bart_folder: Path) -> Backbone:
    return load_backbone(str(bart_folder), device="cpu")


@pytest.fixture(params=["t5", "bart"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    loaded: Backbone = request.getfixturevalue(request.param)
    return loaded


# --- Commands ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What a command left: its exit code and all that it printed."""

    code: int
    out: str
    err: str


def run_ipt(*arguments: object) -> Result:
    """Run `ipt` in this process as the shell would."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["ipt", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            ipt.main()
        code = 0
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    finally:
        sys.argv = argv
    return Result(code, out.getvalue(), err.getvalue())


Cli = Callable[..., Result]
SHORT = ("--steps", 6, "--evaluations", 3, "--batch-size", 3)


def commands(*options: object) -> Cli:
    """Return a way to run commands with these options."""
    return lambda command, *arguments: run_ipt(command, *options, *arguments)


@pytest.fixture(scope="session")
def shared_options(t5_folder: Path, tasks_file: Path) -> list[object]:
    """Options that every command takes, for the tiny T5 and the small world."""
    return [
        "--backbone", t5_folder, "--tasks-file", tasks_file, "--split", "tiny", "--prompt-length", PROMPT_LENGTH,
        "--shots", 4, "--test-rows", 10, "--device", "cpu",
    ]  # fmt: skip


@pytest.fixture
def cli(shared_options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Return a way to run a command with the shared options, its cache in the test's own folder."""
    monkeypatch.setenv("IPT_CACHE", str(tmp_path / "cache"))
    return commands(*shared_options)


def files_in(folder: Path) -> dict[str, bytes]:
    """Return every file under a folder, name -> content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
