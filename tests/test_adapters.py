"""Others' formats: PEFT and we compute the same, round trips keep every byte, what cannot be meant is refused; warm starts."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import transformers
from conftest import SHORT, Result, run_ipt
from test_causal import THINKING, plain_logits, save_model

from intrinsic_prompt_tuning.adapters import CONFIG, WEIGHTS
from intrinsic_prompt_tuning.backbone import Backbone, load_backbone
from intrinsic_prompt_tuning.files import read_file
from intrinsic_prompt_tuning.passes import FEW
from intrinsic_prompt_tuning.tasks import Example, World

TASK = "count-next"


class Place:
    """A backbone with a cache of its own."""

    def __init__(self, shared: Sequence[object], folder: Path, cache: Path, *more: object) -> None:
        self.cache, self.folder = cache, folder
        # By default a causal model's prompt stands behind the input, where PEFT has none.
        self.options = [*shared, "--backbone", folder, "--cache", cache, "--prompt-at", "front", *more]

    def __call__(self, command: str, *arguments: object) -> Result:
        return run_ipt(command, *self.options, *arguments)

    def good(self, command: str, *arguments: object) -> Result:
        done = self(command, *arguments)
        assert done.code == 0, done.err
        return done

    def refused(self, command: str, *arguments: object) -> str:
        done = self(command, *arguments)
        assert done.code == 1, done.err
        return " ".join(done.err.split("error: ")[-1].split())

    def prompts(self, task: str = TASK) -> dict[str, dict[str, Any]]:
        """Return name -> header, record and prompt of a task's soft prompts."""
        found = {}
        for path in self.cache.glob(f"*/soft-prompts/{task}-*.safetensors"):
            header, record, tensors = read_file(path)
            found[path.stem] = {"header": header, "record": record, "prompt": tensors["soft_prompt"]}
        return found


@pytest.fixture(scope="module")
def places(
    shared_options: list[object], t5_folder: Path, bart_folder: Path, world: World, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Place]:
    """Return a way to a place of a family, with everything tuned."""
    known: dict[str, Place] = {}

    def place(family: str) -> Place:
        if family not in known:
            causal = family in ("gpt2", "llama", "mpt")
            folder = (
                save_model(tmp_path_factory.mktemp(family), family, world)
                if causal
                else {"t5": t5_folder, "bart": bart_folder}[family]
            )
            known[family] = Place(shared_options, folder, tmp_path_factory.mktemp("cache"))
            known[family].good("collect", *SHORT)
            known[family].good("fit-subspace", "--dim", 4, "--subspace-steps", 2)
            known[family].good("tune", "--dim", 4, *SHORT, "--task", TASK)
        return known[family]

    return place


@pytest.fixture(scope="module")
def t5_place(places: Callable[[str], Place]) -> Place:
    return places("t5")


@pytest.fixture
def empty(t5_place: Place, shared_options: list[object], tmp_path: Path) -> Place:
    """Return a place with T5 where nothing was tuned."""
    return Place(shared_options, t5_place.folder, tmp_path / "cache")


def base_model(folder: Path) -> Any:
    causal = transformers.AutoConfig.from_pretrained(folder).is_encoder_decoder is False
    kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForSeq2SeqLM
    return kind.from_pretrained(folder)


def loaded_quietly(place: Place, adapter: Path) -> Any:
    """Load an adapter with PEFT, and let no warning pass."""
    base, said = base_model(place.folder), io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger().addHandler(handler)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # PEFT's own, whatever it loads
            model = peft.PeftModel.from_pretrained(base, str(adapter)).eval()
    finally:
        logging.getLogger().removeHandler(handler)
    assert not said.getvalue()
    return model


def our_logits(backbone: Backbone, prompt: torch.Tensor, row: Any) -> torch.Tensor:
    """Return the logits of a row's answer as our path computes them."""
    seen = []
    hook = backbone.model.get_output_embeddings().register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.inference_mode():
        begun = backbone.lm.begin(prompt[None], [row.input_ids])
        backbone.lm.text_losses(begun, [0], [row.target_ids])
    hook.remove()
    return torch.cat([out.view(-1, out.shape[-1]) for out in seen])[: len(row.target_ids)]


def peft_logits(model: Any, row: Any) -> torch.Tensor:
    ids, target = torch.tensor([row.input_ids]), torch.tensor([row.target_ids])
    with torch.inference_mode():
        if model.config.is_encoder_decoder:
            # As wide as our path makes them: a CPU rounds smaller products in another way.
            labels = torch.nn.functional.pad(target, (0, max(0, FEW - target.shape[1])), value=-100)
            return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).logits[0, : target.shape[1]]
        both = torch.cat([ids, target], dim=1)
        return model(input_ids=both, attention_mask=torch.ones_like(both)).logits[0, -target.shape[1] - 1 : -1]


# --- Export --------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["prompt", "vector"])
@pytest.mark.parametrize("family", ["t5", "bart", "gpt2", "llama", "mpt"])
def test_peft_loads_an_export_without_a_warning_and_its_logits_are_ours(
    places: Callable[[str], Place], tmp_path: Path, family: str, source: str
) -> None:
    place = places(family)
    place.good("export", "--task", TASK, "--from", source, "--out", tmp_path / "adapter")
    model, backbone = (
        loaded_quietly(place, tmp_path / "adapter"),
        load_backbone(str(place.folder), device="cpu", prompt_at="front"),
    )
    prompt = model.get_prompt_embedding_to_save("default")
    (row,) = backbone.encode([Example("the glad fox sees one cups", ("two three",))], prompt_length=3)
    theirs, ours = peft_logits(model, row), our_logits(backbone, prompt, row)
    if family in ("gpt2", "llama", "mpt"):  # PEFT is one plain pass; ours differs by rounding
        assert torch.equal(theirs, plain_logits(backbone, prompt, row, row.target_ids))
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(theirs, ours)
    _, _, tensors = read_file(tmp_path / "adapter" / WEIGHTS)
    assert ("intrinsic_vector" in tensors) == (source == "vector")
    if source == "prompt":
        assert any(torch.equal(prompt, found["prompt"]) for found in place.prompts().values())


@pytest.mark.parametrize("family", ["t5", "bart", "gpt2", "llama"])
def test_a_card_tells_what_it_is_and_its_code_answers_as_we_do(
    places: Callable[[str], Place],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    family: str,
) -> None:
    place = places(family)
    place.good("export", "--task", TASK, "--from", "prompt", "--out", tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    for line in ("# A soft prompt for count-next", "- data seed: 100", "- rows: [8, 8]", "- space: prompt", f"- dim: {48 + 12 * (family == 'bart')}",
                 "- test score: not measured", f"base_model: {place.folder}"):  # fmt: skip
        assert line in card, line
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    text = "the glad fox sees one cups on monday"
    exec(compile(code.replace("the input", text), "README.md", "exec"), {})
    said = capsys.readouterr().out.strip()
    backbone = load_backbone(str(place.folder), device="cpu", prompt_at="front")
    limit = int(re.findall(r'"max_new_tokens": (\d+)', code)[0])
    (row,) = backbone.encode([Example(text, ("x",))], prompt_length=3, answer_limit=limit)
    (prompt,) = [found["prompt"] for found in place.prompts().values()]
    (answer,) = backbone.answer(prompt[None], [(0, row)], decoding="generate")
    assert said == answer.text and (said or family == "bart")


def test_a_card_of_a_chat_model_writes_rows_as_they_were_tuned_and_answers_greedily(
    shared_options: list[object], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the template does by itself, here thinking, and whatever the model was saved with, here penalties."""
    folder = save_model(tmp_path / "chat", "llama", world, chat=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = THINKING
    tokenizer.save_pretrained(folder)
    saved = {"do_sample": True, "temperature": 2.0, "eos_token_id": 3, "repetition_penalty": 30.0, "no_repeat_ngram_size": 1}
    (folder / "generation_config.json").write_text(json.dumps(saved), encoding="utf-8")
    place = Place(shared_options, folder, tmp_path / "cache")
    place.good("collect", *SHORT, "--task", TASK)
    place.good("export", "--task", TASK, "--from", "prompt", "--out", tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(compile(code.replace("the input", "the glad fox"), "README.md", "exec"), found)
    backbone = load_backbone(str(folder), device="cpu", prompt_at="front")
    limit = found["options"]["max_new_tokens"]
    (row,) = backbone.encode([Example("the glad fox", ("x",))], prompt_length=3, answer_limit=limit)
    assert found["ids"].tolist() == [row.input_ids] and found["options"]["eos_token_id"] == backbone.layout.end
    (prompt,) = [one["prompt"] for one in place.prompts().values()]
    (answer,) = backbone.answer(prompt[None], [(0, row)], decoding="generate")
    said = tokenizer.decode(found["answer"][0, len(row.input_ids) :], skip_special_tokens=True)
    assert said.strip() == answer.text != "" and len({*answer.text.split()}) < len(answer.text.split())


def test_a_card_of_a_vector_tells_its_subspace_and_a_test_score(places: Callable[[str], Place], tmp_path: Path) -> None:
    place = places("t5")
    place.good("eval")
    for source in ("vector", "prompt"):
        place.good("export", "--task", TASK, "--from", source, "--out", tmp_path / source)
    card = (tmp_path / "vector" / "README.md").read_text(encoding="utf-8")
    for line in ("- space: subspace", "- dim: 4", "- start: random", "- test n: 10"):
        assert line in card, line
    scores = json.loads(place.good("eval", "--json", "--per-task").out)["scores"]
    for source, quantity in (("vector", "T_train_same(IST)"), ("prompt", "prompt tuning")):
        (score,) = [s["value"] for s in scores if s["task"] == TASK and s["quantity"] == quantity]
        assert f"- test score: {score}\n" in (tmp_path / source / "README.md").read_text(encoding="utf-8")


def test_a_card_tells_the_test_score_of_its_own_prompt(empty: Place, tmp_path: Path) -> None:
    """A score is of the best of a grid, and says nothing of the others."""
    empty.good("collect", "--seen", *SHORT, "--learning-rate", 0.3, "--learning-rate", 1e-7)
    empty.good("eval")
    best = max(empty.prompts().values(), key=lambda one: (one["record"]["validation"], -one["record"]["validation_loss"]))
    told = {}
    for path in empty.cache.glob(f"*/soft-prompts/{TASK}-*.safetensors"):
        empty.good("export", "--task", TASK, "--from", path, "--out", tmp_path / path.stem)
        told[path.stem] = "not measured" in (tmp_path / path.stem / "README.md").read_text(encoding="utf-8")
    assert len(told) == 2 and [name for name, missing in told.items() if not missing] == [
        name for name, one in empty.prompts().items() if one is best or one["header"] == best["header"]
    ]


def test_a_card_tells_no_score_on_test_rows_that_its_task_has_no_more(empty: Place, tmp_path: Path) -> None:
    empty.good("collect", "--seen", *SHORT)
    empty.good("eval", "--test-rows", 3)
    empty.good("export", "--task", TASK, "--out", tmp_path / "one")
    assert "not measured" in (tmp_path / "one" / "README.md").read_text(encoding="utf-8")
    empty.good("export", "--task", TASK, "--out", tmp_path / "two", "--test-rows", 3)
    assert "test n: 3" in (tmp_path / "two" / "README.md").read_text(encoding="utf-8")


def test_all_tasks_that_have_something_are_exported_at_once(t5_place: Place, empty: Place, tmp_path: Path) -> None:
    done = t5_place.good("export", "--all", "--out", tmp_path / "all")
    assert "7 of 7 tasks had a prompt" in done.err
    assert len(list((tmp_path / "all").glob(f"*/{CONFIG}"))) == 7
    assert "holds no tuned vector of task 'mood-good'" in t5_place.refused(
        "export", "--task", TASK, "--task", "mood-good", "--from", "vector", "--out", tmp_path / "x"
    )
    assert "holds no tuned prompt or vector" in empty.refused("export", "--all", "--out", tmp_path / "none")
    done = t5_place.good("export", "--all", "--from", "vector", "--out", tmp_path / "vectors")
    assert "1 of 7 tasks had a prompt" in done.err and [path.name for path in (tmp_path / "vectors").iterdir()] == [TASK]


def test_a_folder_that_is_not_empty_is_left_alone_without_force(t5_place: Place, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep me")
    assert "is not empty" in t5_place.refused("export", "--task", TASK, "--out", tmp_path)
    assert "no folder" in t5_place.refused("export", "--task", TASK, "--out", tmp_path / "mine", "--force")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    t5_place.good("export", "--task", TASK, "--out", tmp_path, "--force")
    assert (tmp_path / "mine").read_text() == "keep me"


def test_a_prompt_behind_the_input_goes_to_vllm_but_not_to_peft(
    places: Callable[[str], Place], t5_place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = places("llama")
    for at in ("front", "end"):
        place.good("collect", *SHORT, "--task", TASK, "--prompt-at", at)
        place.good("export", "--task", TASK, "--from", "prompt", "--prompt-at", at, "--format", "vllm", "--out", tmp_path / at)
        (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / at / "README.md").read_text(encoding="utf-8"), re.DOTALL)
        # vLLM itself is not here: what its documentation says it takes is looked at.
        vllm, asked = types.ModuleType("vllm"), list[Any]()

        class LLM:
            def __init__(self, model: str, enable_prompt_embeds: bool) -> None:
                assert model == str(place.folder) and enable_prompt_embeds

            def generate(self, prompt: dict[str, torch.Tensor], parameters: Any, asked: list[Any] = asked) -> list[Any]:
                asked.append(prompt["prompt_embeds"])
                return [types.SimpleNamespace(outputs=[types.SimpleNamespace(text="said")])]

        vllm.LLM, vllm.SamplingParams = LLM, lambda **about: about  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "vllm", vllm)
        monkeypatch.chdir(tmp_path)
        exec(compile(code.replace("the input", "the glad fox"), "README.md", "exec"), {})
        backbone = load_backbone(str(place.folder), device="cpu", prompt_at=at)  # type: ignore[arg-type]
        (prompt,) = [f["prompt"] for f in place.prompts().values() if f["header"]["prompt_at"] == at]
        (row,) = backbone.encode([Example("the glad fox", ("two",))], prompt_length=3)
        logits = backbone.model(inputs_embeds=asked[0][None]).logits[0, -1]
        torch.testing.assert_close(logits, plain_logits(backbone, prompt, row, row.target_ids)[0], rtol=1e-5, atol=1e-6)
    again = ("export", "--task", TASK, "--prompt-at", "front", "--out", tmp_path / "front", "--force")
    place.good(*again)
    assert (tmp_path / "front" / "adapter_config.json").exists()
    place.good(*again, "--format", "vllm")
    assert not (tmp_path / "front" / "adapter_config.json").exists()
    refused = place.refused("export", "--task", TASK, "--prompt-at", "end", "--out", tmp_path / "other")
    assert "one behind it cannot be exported; collect with --prompt-at front" in refused and not (tmp_path / "other").exists()
    assert "causal" in t5_place.refused("export", "--task", TASK, "--format", "vllm", "--out", tmp_path / "other")


# --- Import --------------------------------------------------------------------------------------


def made_by_peft(place: Place, folder: Path, config: Any, *, seed: int = 0) -> Any:
    """Save an adapter as PEFT makes it, and return the model."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(base_model(place.folder), config).eval()
    model.save_pretrained(folder)
    return model


KINDS: dict[str, Callable[[str], Any]] = {
    "one submodule": lambda kind: peft.PromptTuningConfig(task_type=kind, num_virtual_tokens=3, num_transformer_submodules=1),
    "two submodules": lambda kind: peft.PromptTuningConfig(task_type=kind, num_virtual_tokens=3),
    "p-tuning": lambda kind: peft.PromptEncoderConfig(task_type=kind, num_virtual_tokens=3, encoder_hidden_size=8),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["t5", "bart", "gpt2", "llama"])
def test_an_adapter_that_peft_made_computes_the_same_here(
    places: Callable[[str], Place], shared_options: list[object], tmp_path: Path, family: str, kind: str
) -> None:
    place = Place(shared_options, places(family).folder, tmp_path / "cache")
    model = made_by_peft(place, tmp_path / "a", KINDS[kind]("CAUSAL_LM" if family in ("gpt2", "llama") else "SEQ_2_SEQ_LM"))
    place.good("import", tmp_path / "a", "--task", TASK)
    (found,) = place.prompts().values()
    backbone = load_backbone(str(place.folder), device="cpu", prompt_at="front")
    (row,) = backbone.encode([Example("the glad fox sees one cups", ("two",))], prompt_length=3)
    torch.testing.assert_close(peft_logits(model, row), our_logits(backbone, found["prompt"], row), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_one_task_of_a_multitask_adapter_is_imported(
    places: Callable[[str], Place], shared_options: list[object], tmp_path: Path, family: str
) -> None:
    place = Place(shared_options, places(family).folder, tmp_path / "cache")
    task_type = "CAUSAL_LM" if family == "llama" else "SEQ_2_SEQ_LM"
    init = peft.MultitaskPromptTuningInit.RANDOM
    about = {"task_type": task_type, "num_virtual_tokens": 3, "num_tasks": 2, "num_ranks": 1, "prompt_tuning_init": init}
    model = made_by_peft(place, tmp_path / "a", peft.MultitaskPromptTuningConfig(**about))
    prompt = model.get_prompt(1, task_ids=torch.tensor([1]))[0, :3].detach()
    assert "holds 2 numbered tasks" in place.refused("import", tmp_path / "a", "--task", TASK)
    assert "holds 2 numbered tasks" in place.refused("import", tmp_path / "a", "--task", TASK, "--task-id", 2)
    done = place.good("import", tmp_path / "a", "--task", TASK, "--task-id", 1)
    assert ("in front of the decoder is left out" in done.err) == (family == "t5")
    (found,) = place.prompts().values()
    assert torch.equal(found["prompt"], prompt)


def test_what_is_exported_comes_back_with_the_same_bytes(t5_place: Place, empty: Place, tmp_path: Path) -> None:
    for source in ("prompt", "vector"):
        t5_place.good("export", "--task", TASK, "--from", source, "--out", tmp_path / source)
        empty.good("import", tmp_path / source, "--task", TASK)
    found, here = empty.prompts(), t5_place.prompts()
    kept = [safetensors.torch.load_file(tmp_path / source / WEIGHTS)["prompt_embeddings"] for source in ("prompt", "vector")]
    assert all(any(torch.equal(one["prompt"], prompt) for one in found.values()) for prompt in kept)
    same = [(one["record"], other["record"]) for one in found.values() for other in here.values()
            if torch.equal(one["prompt"], other["prompt"])]  # fmt: skip
    assert [new["validation"] for new, _ in same] == [old["validation"] for _, old in same] != []
    assert all(one["header"]["imported"] and one["header"]["source"] for one in found.values())


def test_an_array_goes_through_an_adapter_and_back(
    t5_place: Place, empty: Place, places: Callable[[str], Place], tmp_path: Path
) -> None:
    array = np.random.default_rng(1).normal(size=(3, 16)).astype("f4")
    np.save(tmp_path / "x.npy", array)
    t5_place.good("export", "--task", TASK, "--from", tmp_path / "x.npy", "--out", tmp_path / "a")
    assert np.array_equal(loaded_quietly(t5_place, tmp_path / "a").get_prompt_embedding_to_save("default").numpy(), array)
    empty.good("import", tmp_path / "a" / WEIGHTS, "--task", TASK)
    assert np.array_equal(next(iter(empty.prompts().values()))["prompt"].numpy(), array)
    assert "made for another backbone" in places("llama").refused("import", tmp_path / "a", "--task", TASK)


def test_arrays_become_collected_prompts_to_which_a_subspace_is_fitted(empty: Place, tmp_path: Path, tasks_file: Path) -> None:
    generator = np.random.default_rng(0)
    seen = ["mood-good", "animal-class", "count-next", "thing-plural", "mood-opposite-choice"]
    for number, task in enumerate(seen):
        array = generator.normal(size=(3, 16)).astype(("<f4", ">f4", "<f8", "<f2", "<f4")[number])
        np.save(tmp_path / f"{task}.npy", array)
        safetensors.torch.save_file({"x": torch.tensor(array.astype("<f4"))}, tmp_path / f"{task}.safetensors")
        path = tmp_path / f"{task}.{('npy', 'safetensors')[number == 0]}"
        assert f"{path}: " in empty.good("import", path, "--task", task).err
        (found,) = empty.prompts(task).values()
        assert np.array_equal(found["prompt"].numpy(), array.astype("<f4"))
    empty.good("import", tmp_path / "mood-good.safetensors", "--task", "mood-good")  # again: nothing new
    assert len(empty.prompts("mood-good")) == 1
    empty.good("fit-subspace", "--dim", 4, "--subspace-steps", 40)
    empty.good("tune", "--dim", 4, *SHORT, "--task", "day-then-count")
    done = empty.good("eval")
    assert "prompt tuning is an imported prompt on 5 tasks" in done.out
    empty.good("collect", *SHORT, "--task", "day-then-count")
    assert json.loads(empty.good("eval", "--json").out)["imported"] == seen


def test_what_is_no_soft_prompt_of_this_backbone_is_refused_by_name(
    t5_place: Place, places: Callable[[str], Place], empty: Place, tmp_path: Path
) -> None:
    def refused(path: Path, *more: object) -> str:
        said = empty.refused("import", path, "--task", TASK, *more)
        assert not empty.prompts()
        return said

    seq = "SEQ_2_SEQ_LM"
    made_by_peft(
        empty,
        tmp_path / "prefix",
        peft.PrefixTuningConfig(task_type=seq, num_virtual_tokens=3, token_dim=12, num_attention_heads=3),
    )
    made_by_peft(empty, tmp_path / "lora", peft.LoraConfig(task_type=seq, target_modules=["q", "v"]))
    assert "of the kind PREFIX_TUNING, expected one of PROMPT_TUNING" in refused(tmp_path / "prefix")
    assert "of the kind LORA" in refused(tmp_path / "lora")
    torch.save({"prompt_embeddings": torch.zeros(3, 16)}, tmp_path / "adapter_model.bin")
    assert "a pickle, which is never read" in refused(tmp_path / "adapter_model.bin")
    assert "a pickle, which is never read" in refused(tmp_path)
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert "allow_pickle=False" in refused(tmp_path / "objects.npy")
    np.savez(tmp_path / "a.npz", a=np.zeros((3, 16)))
    assert "never read" in refused(tmp_path / "a.npz")
    made_by_peft(empty, tmp_path / "longer", peft.PromptTuningConfig(task_type=seq, num_virtual_tokens=5))
    assert "holds a prompt of 5 tokens, expected 3: use --prompt-length 5" in refused(tmp_path / "longer")
    bart = places("bart")
    made_by_peft(bart, tmp_path / "bart", peft.PromptTuningConfig(task_type=seq, num_virtual_tokens=3))
    assert f"is for the model {bart.folder}, not {empty.folder}" in refused(tmp_path / "bart")
    config = json.loads((tmp_path / "bart" / CONFIG).read_text())
    (tmp_path / "bart" / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": None}))
    assert "expected one (tokens, 16)" in refused(tmp_path / "bart")
    made_by_peft(places("llama"), tmp_path / "llama", peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert "stands in front of the input of a CAUSAL_LM" in refused(tmp_path / "llama")
    bart.good("export", "--task", TASK, "--out", tmp_path / "ours")
    assert "was made for another backbone" in refused(tmp_path / "ours")
    t5_place.good("export", "--task", "mood-good", "--out", tmp_path / "mood")
    assert "was made for another task: mood-good, expected count-next" in refused(tmp_path / "mood")
    assert "holds no numbered tasks" in refused(tmp_path / "longer", "--task-id", 0)
    np.save(tmp_path / "array.npy", np.zeros((3, 16), dtype=np.float32))
    assert "is no multitask adapter: leave --task-id out" in refused(tmp_path / "array.npy", "--task-id", 0)
    assert "No such file" in refused(tmp_path / "nothing")


BROKEN: dict[str, Any] = {
    "integers": np.zeros((3, 16), dtype=int), "not finite": np.full((3, 16), np.nan), "a vector": np.zeros(16), "none": np.zeros((0, 16)),
    "complex": np.zeros((3, 16), dtype=complex), "text": np.full((3, 16), "x"), "a scalar": np.zeros(()), "three axes": np.zeros((1, 3, 16)),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_an_array_that_is_no_prompt_ends_in_one_sentence(empty: Place, tmp_path: Path, name: str) -> None:
    np.save(tmp_path / "x.npy", BROKEN[name])
    assert str(tmp_path / "x.npy") in empty.refused("import", tmp_path / "x.npy", "--task", TASK)


@pytest.mark.parametrize("config", ["", "[]", "{", "5", '{"peft_type": ["LORA"]}', '{"peft_type": "PROMPT_TUNING"}', '{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": "x"}',
                                    '{"peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 3}', "[" * 100_000])  # fmt: skip
@pytest.mark.parametrize("tensors", [{"prompt_embeddings": torch.zeros(3, 16)}, {"prefix_task_cols": torch.zeros(2)},
                                     {"prompt_embeddings": torch.tensor(1.0)}, {"prefix_task_cols": torch.tensor(1.0)}])  # fmt: skip
def test_a_damaged_adapter_ends_in_one_sentence(
    empty: Place, tmp_path: Path, config: str, tensors: dict[str, torch.Tensor]
) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / CONFIG).write_text(config)
    safetensors.torch.save_file(tensors, folder / WEIGHTS)
    if "num_virtual_tokens" in config and "x" not in config and tensors.get("prompt_embeddings", torch.tensor(0)).ndim:
        empty.good("import", folder, "--task", TASK)
        return
    assert str(folder) in empty.refused("import", folder, "--task", TASK)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-5])
    assert str(folder) in empty.refused("import", folder, "--task", TASK)


# --- Files where results are used ----------------------------------------------------------------


def predictions(place: Place, tmp_path: Path, *arguments: object) -> list[str]:
    (tmp_path / "lines.txt").write_text("the glad fox sees one cups on monday\nthe wild eel sees two keys on sunday\n")
    return place.good("predict", "--task", TASK, "--input", tmp_path / "lines.txt", "--json", *arguments).out.splitlines()


def test_predict_takes_a_file_of_the_cache_or_an_adapter(t5_place: Place, empty: Place, tmp_path: Path) -> None:
    (prompt,) = t5_place.cache.glob(f"*/soft-prompts/{TASK}-*")
    (vector,) = t5_place.cache.glob(f"*/intrinsic-vectors/{TASK}-*")
    t5_place.good("export", "--task", TASK, "--from", prompt, "--out", tmp_path / "a")
    told = predictions(t5_place, tmp_path, "--from", "prompt")
    assert predictions(empty, tmp_path, "--from", prompt) == predictions(empty, tmp_path, "--from", tmp_path / "a") == told
    assert predictions(t5_place, tmp_path, "--from", vector) == predictions(t5_place, tmp_path, "--from", "vector")
    assert "lacks the subspace" in empty.refused("predict", "--task", TASK, "--from", vector)
    assert "expected best, prompt, vector, or" in empty.refused("predict", "--task", TASK, "--from", tmp_path / "nothing")
    assert "made for another task" in empty.refused("predict", "--task", "mood-good", "--from", prompt)
    (subspace,) = t5_place.cache.glob("*/subspaces/*")
    assert "is a subspace, expected a soft prompt" in t5_place.refused("predict", "--task", TASK, "--from", subspace)


def test_a_vector_needs_only_its_subspace_and_its_own_file(
    t5_place: Place, empty: Place, tmp_path: Path, tasks_file: Path
) -> None:
    """On another machine: the backbone, two files, and a task whose rows cannot be had there."""
    (subspace,), (vector,) = t5_place.cache.glob("*/subspaces/*"), t5_place.cache.glob(f"*/intrinsic-vectors/{TASK}-*")
    for path in (subspace, vector):
        copy = empty.cache / path.relative_to(t5_place.cache)
        copy.parent.mkdir(parents=True)
        copy.write_bytes(path.read_bytes())
    gone = "tasks:\n  count-next: {dataset: csv, data_files: {train: gone.csv}, template: '{a}', answer: b, metric: EM, splits: {tiny: seen}}\n"
    (tmp_path / "gone.yaml").write_text(gone)
    told = predictions(t5_place, tmp_path, "--from", "vector")
    assert predictions(empty, tmp_path, "--from", vector, "--tasks-file", tmp_path / "gone.yaml") == told
    assert not (empty.cache / "samples").exists()
    assert predictions(empty, tmp_path, "--from", "vector") == told
    assert {path.parent.name.rpartition("-")[0] for path in empty.cache.glob("samples/*/*")} == {TASK}  # no other task's rows


# --- Warm starts ---------------------------------------------------------------------------------


@pytest.fixture
def copied(t5_place: Place, shared_options: list[object], tmp_path: Path) -> Place:
    """Return a place that has what `t5_place` has, to change."""
    for path in t5_place.cache.rglob("*.safetensors"):
        copy = tmp_path / "copied" / path.relative_to(t5_place.cache)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    return Place(shared_options, t5_place.folder, tmp_path / "copied")


@pytest.mark.parametrize("start", ["subspace", "nearest", "mood-good", "file"])
def test_tuning_starts_where_it_is_told(copied: Place, tmp_path: Path, start: str) -> None:
    before = set(copied.prompts())
    if start == "file":
        copied.good("export", "--task", "animal-class", "--from", "prompt", "--out", tmp_path / "a")
    # A rate so small that the prompt stays where it starts.
    still = ("--learning-rate", 1e-9, "--steps", 1)
    path = tmp_path / "a" if start == "file" else start
    copied.good("collect", "--task", TASK, "--start", path, *still)
    (found,) = (one for name, one in copied.prompts().items() if name not in before)
    if start == "subspace":
        copied.good("export", "--task", TASK, "--from", "vector", "--out", tmp_path / "v")
        wanted = safetensors.torch.load_file(tmp_path / "v" / WEIGHTS)["prompt_embeddings"]
    elif start == "nearest":
        seen = [one["prompt"] for task in ("mood-good", "animal-class", TASK) for one in copied.prompts(task).values()]
        wanted = min((one for one in seen if one is not found["prompt"]), key=lambda one: float((one - found["prompt"]).norm()))
    else:
        (wanted,) = (one["prompt"] for one in copied.prompts("mood-good" if start == "mood-good" else "animal-class").values())
    torch.testing.assert_close(found["prompt"], wanted, rtol=1e-5, atol=1e-6)
    assert (
        found["header"]["start"] == start
        and "plan: 0 soft prompts" in copied.good("collect", "--task", TASK, "--start", path, *still).err
    )
    (first,) = (one for name, one in copied.prompts().items() if name in before)
    assert start == "nearest" or not torch.allclose(first["prompt"], found["prompt"], atol=1e-3)


def test_eval_tells_warm_starts_from_prompt_tuning(copied: Place) -> None:
    baseline = json.loads(copied.good("eval", "--json", "--per-task").out)
    copied.good("collect", "--task", TASK, "--start", "subspace", *SHORT)
    copied.good("collect", "--task", TASK, "--start", TASK, *SHORT)
    copied.good("collect", "--task", TASK, "--start", "nearest", *SHORT)
    told = json.loads(copied.good("eval", "--json", "--per-task").out)
    assert [s for s in told["scores"] if s["quantity"] == "prompt tuning"] == [
        s for s in baseline["scores"] if s["quantity"] == "prompt tuning"
    ]
    rows = {(row["quantity"], row["start"]): row for row in told["rows"] if row["space"] == "prompt"}
    assert set(rows) == {
        ("T_train_same(two-stage)", "subspace"),
        ("T_train_same(warm start)", TASK),
        ("T_train_same(warm start)", "nearest"),
    }
    assert all(row["n_tasks"] + row["n_excluded"] == 1 and row["dim"] == 48 for row in rows.values())
    assert [row for row in told["rows"] if row["space"] != "prompt"] == baseline["rows"]
    assert "T_train_same(two-stage)" in copied.good("eval").out
    subspaces = len(list(copied.cache.glob("*/subspaces/*")))
    assert "0 subspaces to make" in copied.good("fit-subspace", "--dim", 4, "--subspace-steps", 2).err
    assert len(list(copied.cache.glob("*/subspaces/*"))) == subspaces


def test_eval_tells_apart_what_started_from_vectors_of_several_subspaces(copied: Place) -> None:
    copied.good("fit-subspace", "--dim", 2, "--subspace-steps", 2)
    copied.good("tune", "--task", TASK, "--dim", 2, *SHORT)
    for dim in (4, 2):
        copied.good("collect", "--task", TASK, "--start", "subspace", "--dim", dim, *SHORT)
    told = json.loads(copied.good("eval", "--json").out)
    rows = [row for row in told["rows"] if row["quantity"] == "T_train_same(two-stage)"]
    known = {path.stem[-16:] for path in copied.cache.glob("*/subspaces/*")}
    assert len(rows) == 2 and {row["subspace"] for row in rows} == known


def test_predict_takes_the_best_wherever_it_started(copied: Place, tmp_path: Path) -> None:
    copied.good("collect", "--task", TASK, "--start", TASK, "--steps", 60, "--evaluations", 6, "--learning-rate", 0.5)
    best = max(copied.prompts().values(), key=lambda one: (one["record"]["validation"], -one["record"]["validation_loss"]))
    copied.good("export", "--task", TASK, "--from", "prompt", "--out", tmp_path / "a")
    assert torch.equal(safetensors.torch.load_file(tmp_path / "a" / WEIGHTS)["prompt_embeddings"], best["prompt"])
    assert best["header"].get("start") == TASK


def test_a_start_that_is_not_there_is_said(empty: Place, t5_place: Place) -> None:
    assert "run 'ipt tune --task count-next --space subspace --data-seed 100'" in empty.refused(
        "collect", "--task", TASK, "--start", "subspace"
    )
    assert "run 'ipt collect --task mood-good'" in empty.refused("collect", "--task", TASK, "--start", "mood-good")
    assert "expected subspace, nearest, a task, or a file that is there; did you mean 'mood-good'" in empty.refused(
        "collect", "--task", TASK, "--start", "mood-god"
    )
    assert "data-seed 21 --dim 9'" in t5_place.refused(
        "collect", "--task", TASK, "--start", "subspace", "--data-seed", 21, "--dim", 9
    )


def test_a_prompt_that_stood_behind_the_input_is_not_put_in_front_of_it(
    places: Callable[[str], Place], shared_options: list[object], tmp_path: Path
) -> None:
    place = Place(shared_options, places("llama").folder, tmp_path / "cache")
    place.good("collect", *SHORT, "--task", TASK, "--prompt-at", "end")
    (path,) = place.cache.glob(f"*/soft-prompts/{TASK}-*")
    for command in (("predict", "--from"), ("import",)):
        said = place.refused(*command, path, "--task", TASK)
        assert "was made for another prompt_at: end, expected front" in said
