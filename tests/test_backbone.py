"""Backbones: loading, tokens, losses, gradients and answers, against PEFT and plain loops."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from helpers import Questions, like, mixed_rows, random_prompts, rows_of, summed_losses
from torch import Tensor

from intrinsic_prompt_tuning.backbone import Backbone, load_backbone
from intrinsic_prompt_tuning.errors import IptError
from intrinsic_prompt_tuning.layout import Layout
from intrinsic_prompt_tuning.passes import Budget
from intrinsic_prompt_tuning.seq2seq import Seq2Seq, share_position_bias
from intrinsic_prompt_tuning.tasks import Example, Task
from intrinsic_prompt_tuning.tuning import prompt_losses


def load(folder: Path, **options: Any) -> Backbone:
    return load_backbone(str(folder), device="cpu", **options)


def copied(folder: Path, to: Path) -> Path:
    """Copy the files of a backbone into a folder."""
    to.mkdir(exist_ok=True)
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_embeddings_are_measured_as_the_encoder_gets_them(bart: Backbone, t5: Backbone) -> None:
    assert bart.embedding_rms == pytest.approx(0.9, rel=0.1)  # 0.9 / sqrt(20), times sqrt(20) by scale_embedding
    assert t5.embedding_rms == pytest.approx(float(t5.model.get_input_embeddings().weight.pow(2).mean().sqrt()))


def test_the_initial_prompt_is_made_of_words_and_depends_on_the_seed_only(backbone: Backbone) -> None:
    prompt = backbone.initial_prompt(7, seed=3)
    table = backbone.model.get_input_embeddings()(torch.arange(len(backbone.tokenizer)))
    found = [int((table == row).all(1).nonzero()[0]) for row in prompt]
    assert not set(found) & set(backbone.tokenizer.all_special_ids)
    assert torch.equal(prompt, backbone.initial_prompt(7, seed=3))
    assert not torch.equal(prompt, backbone.initial_prompt(7, seed=4))


def test_the_initial_prompt_is_a_text_repeated_where_one_is_given(backbone: Backbone) -> None:
    ids = backbone.tokenizer("the glad fox", add_special_tokens=False).input_ids
    wanted = backbone.model.get_input_embeddings()(torch.tensor((ids * 7)[:7]))
    assert torch.equal(backbone.initial_prompt(7, 0, "the glad fox"), wanted)
    assert torch.equal(backbone.initial_prompt(7, 0, "the glad fox"), backbone.initial_prompt(7, 1, "the glad fox"))
    for text in (" ", "\udcff"):  # the second is a byte of an argument that is no UTF-8
        with pytest.raises(IptError, match=f"--initial-text is {text!a}, which has no tokens".replace("\\", "\\\\")):
            backbone.initial_prompt(7, 0, text)


# --- What a soft prompt does ---------------------------------------------------------------------


def peft_model(backbone: Backbone, prompt: Tensor) -> Any:
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=len(prompt), num_transformer_submodules=1)
    model = peft.get_peft_model(copy.deepcopy(backbone.model), config)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(prompt)
    return model.eval()


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def test_a_soft_prompt_gives_the_loss_of_peft(backbone: Backbone, tasks: dict[str, Task]) -> None:
    (prompt,), rows = random_prompts(backbone, 1), mixed_rows(backbone, tasks, 1)
    ids = pad([row.input_ids for _, row in rows], backbone.tokenizer.pad_token_id)
    labels = pad([row.target_ids for _, row in rows], -100)
    mask = torch.tensor([[1] * len(row.input_ids) + [0] * (ids.shape[1] - len(row.input_ids)) for _, row in rows])
    with torch.no_grad():
        expected = peft_model(backbone, prompt)(input_ids=ids, attention_mask=mask, labels=labels).loss
        losses = summed_losses(backbone, prompt, [row for _, row in rows])
    assert float(losses.sum() / (labels != -100).sum()) == pytest.approx(float(expected), rel=1e-5)
    answers = backbone.answer(prompt[None], rows)
    means = [loss / len(row.target_ids) for loss, (_, row) in zip(losses.tolist(), rows, strict=True)]
    assert [answer.loss for answer in answers] == pytest.approx(means, rel=1e-4)


def test_a_soft_prompt_gives_the_gradient_of_peft(backbone: Backbone, tasks: dict[str, Task]) -> None:
    (prompt,), rows = random_prompts(backbone, 1), mixed_rows(backbone, tasks, 1)
    ids = pad([row.input_ids for _, row in rows], backbone.tokenizer.pad_token_id)
    mask = torch.tensor([[1] * len(row.input_ids) + [0] * (ids.shape[1] - len(row.input_ids)) for _, row in rows])
    other = peft_model(backbone, prompt)
    other(input_ids=ids, attention_mask=mask, labels=pad([row.target_ids for _, row in rows], -100)).loss.backward()
    losses, gradient = prompt_losses(backbone, prompt[None].clone(), rows)
    torch.testing.assert_close(gradient[0], other.prompt_encoder["default"].embedding.weight.grad, rtol=1e-4, atol=1e-7)
    assert losses.shape == (1,)


def test_a_soft_prompt_gives_the_greedy_generations_of_peft(backbone: Backbone, tasks: dict[str, Task]) -> None:
    prompts = random_prompts(backbone, 5, seed=2)
    limit, pad_id = 7, backbone.tokenizer.pad_token_id
    rows = [(0, dataclasses.replace(row, answer_limit=limit)) for _, row in mixed_rows(backbone, tasks, 1)]
    ids = pad([row.input_ids for _, row in rows], pad_id)
    mask = torch.tensor([[1] * len(row.input_ids) + [0] * (ids.shape[1] - len(row.input_ids)) for _, row in rows])
    texts = set()
    for prompt in prompts:
        greedy = {"max_new_tokens": limit, "do_sample": False, "num_beams": 1, "no_repeat_ngram_size": 0, "early_stopping": False}
        tokens = peft_model(backbone, prompt).generate(input_ids=ids, attention_mask=mask, **greedy)
        expected = backbone.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        got = [answer.text for answer in backbone.answer(prompt[None], rows, decoding="generate")]
        assert got == expected
        texts |= set(got)
    assert len(texts) > 1  # else equality would say nothing


def test_generation_is_greedy_whatever_the_backbone_was_saved_with(backbone: Backbone, tasks: dict[str, Task]) -> None:
    rows = mixed_rows(backbone, tasks, 4)
    prompts, start = random_prompts(backbone, 4, seed=3), backbone.model.config.decoder_start_token_id
    answers = backbone.answer(prompts, rows, decoding="generate")
    for (slot, row), answer in zip(rows, answers, strict=True):
        begun = backbone.lm.begin(prompts[slot][None], [row.input_ids])
        ids = [start]
        while len(ids) <= row.answer_limit and (len(ids) == 1 or ids[-1] != backbone.model.config.eos_token_id):
            logits = backbone.model(
                encoder_outputs=begun.states, attention_mask=begun.mask, decoder_input_ids=torch.tensor([ids]), use_cache=False
            ).logits
            ids.append(int(logits[0, -1].argmax()))
        expected = backbone.tokenizer.decode(ids, skip_special_tokens=True)
        assert answer.text == expected


def test_what_is_begun_holds_prompt_and_input_and_a_mask_of_what_is_real(backbone: Backbone, tasks: dict[str, Task]) -> None:
    rows = [row for _, row in mixed_rows(backbone, tasks, 1)][:5]
    begun = backbone.lm.begin(random_prompts(backbone, 5), [row.input_ids for row in rows])
    lengths = [3 + len(row.input_ids) for row in rows]
    assert begun.states.last_hidden_state.shape == (5, max(lengths), backbone.hidden)
    assert [[*row].index(False) if not all(row) else len(row) for row in begun.mask.tolist()] == lengths
    assert begun.mask.sum(1).tolist() == lengths
    again = begun.of([3, 3, 0])
    states = begun.states.last_hidden_state
    assert torch.equal(again.states.last_hidden_state, states[[3, 3, 0]]) and torch.equal(again.mask, begun.mask[[3, 3, 0]])
    assert begun.of(range(5)) is begun, "all rows need no copy"


def test_texts_behind_one_row_have_the_losses_that_they_have_alone(backbone: Backbone, tasks: dict[str, Task]) -> None:
    rows = [row for _, row in mixed_rows(backbone, tasks, 1) if row.option_ids][:4]
    prompts = random_prompts(backbone, 4)
    with torch.no_grad():
        begun = backbone.lm.begin(prompts, [row.input_ids for row in rows])
        behind = [2, 0, 0, 3, 1, 2]
        texts = [rows[i].option_ids[n % len(rows[i].option_ids)] for n, i in enumerate(behind)]
        together = backbone.lm.text_losses(begun, behind, texts).tolist()
        for i, text, loss in zip(behind, texts, together, strict=True):
            alone = backbone.lm.begin(prompts[i : i + 1], [rows[i].input_ids])
            assert loss == pytest.approx(float(backbone.lm.text_losses(alone, [0], [text])), rel=1e-5)


def test_a_row_is_generated_up_to_its_own_limit_whatever_those_beside_it_may(t5: Backbone, tasks: dict[str, Task]) -> None:
    rows, prompts = [row for _, row in mixed_rows(t5, tasks, 1)], random_prompts(t5, 1, seed=2)
    begun = t5.lm.begin(prompts.expand(len(rows), -1, -1), [row.input_ids for row in rows])
    limits = [1 + n % 5 for n in range(len(rows))]
    written = t5.lm.generate(begun, range(len(rows)), limits)
    longest = t5.lm.generate(begun, range(len(rows)), [5] * len(rows))
    assert written == [tokens[:limit] for tokens, limit in zip(longest, limits, strict=True)]
    assert any(len(tokens) == 5 for tokens in longest)


# --- Answers -------------------------------------------------------------------------------------


def test_answers_are_the_same_without_the_losses(backbone: Backbone, tasks: dict[str, Task]) -> None:
    prompts, rows = random_prompts(backbone, 4), mixed_rows(backbone, tasks, 4)
    for decoding in ("options", "generate"):
        with_losses, without = (backbone.answer(prompts, rows, decoding=decoding, losses=losses) for losses in (True, False))
        assert [a.text for a in without] == [a.text for a in with_losses]
        assert all(math.isnan(a.loss) for a in without) and all(math.isfinite(a.loss) for a in with_losses)


def test_answers_are_the_same_however_little_goes_through_at_once(backbone: Backbone, tasks: dict[str, Task]) -> None:
    prompts, rows = random_prompts(backbone, 4), mixed_rows(backbone, tasks, 4)
    tight = like(backbone, answer_budget=Budget(1))  # a row a pass, a text a piece
    for decoding in ("options", "generate"):
        one, other = (side.answer(prompts, rows, decoding=decoding) for side in (backbone, tight))
        assert [a.text for a in one] == [a.text for a in other]
        assert [a.loss for a in one] == pytest.approx([a.loss for a in other], abs=1e-5)


def test_padding_changes_neither_loss_nor_answer(backbone: Backbone, tasks: dict[str, Task]) -> None:
    prompts, rows = random_prompts(backbone, 4), mixed_rows(backbone, tasks, 4)
    together = backbone.answer(prompts, rows)
    alone = [backbone.answer(prompts, [row])[0] for row in rows]
    assert [a.text for a in together] == [a.text for a in alone]
    assert [a.loss for a in together] == pytest.approx([a.loss for a in alone], abs=1e-5)
    assert len({len(row) for _, row in rows}) > 5


def test_options_are_answered_as_a_plain_loop_over_them_does(backbone: Backbone, tasks: dict[str, Task]) -> None:
    rows = [(slot, row) for slot, row in mixed_rows(backbone, tasks, 4) if row.option_ids]
    prompts = random_prompts(backbone, 4, seed=1)
    answers = backbone.answer(prompts, rows)
    for (slot, row), answer in zip(rows, answers, strict=True):
        inputs = torch.cat([prompts[slot], backbone.model.get_input_embeddings()(torch.tensor(row.input_ids))])[None]
        losses = {}
        for option in row.example.options:
            labels = torch.tensor([backbone.tokenizer(option).input_ids])
            with torch.no_grad():
                losses[option] = float(backbone.model(inputs_embeds=inputs, labels=labels).loss) * labels.shape[1]
        assert answer.text == min(losses, key=losses.__getitem__)
    assert len({answer.text for answer in answers}) > 2


# --- Tokens --------------------------------------------------------------------------------------


def test_an_input_that_is_too_long_loses_its_middle_keeps_its_tail_and_ends_as_before(t5_folder: Path, bart_folder: Path) -> None:
    for folder in (t5_folder, bart_folder):
        backbone = load(folder, max_length=16)
        words = " ".join(["the", "fox", "sees", "one", "cups", "on"] * 5)
        tail = " | mild | wild"
        row = backbone.encode([Example(words + tail, ("mild",), tail=len(tail))], prompt_length=5)[0]
        ids = backbone.tokenizer(words + tail).input_ids
        assert row.truncated
        assert len(row.input_ids) == 16 - 5
        assert row.input_ids[-5:] == ids[-5:]  # | mild | wild </s>
        assert row.input_ids[:6] == ids[:6]
        fitting = backbone.encode([Example("the fox", ("mild",))], prompt_length=5)[0]
        assert not fitting.truncated
        assert backbone.encode([Example("the fox", (words,))], prompt_length=5)[0].truncated, "so is an answer"
        assert fitting.input_ids == backbone.tokenizer("the fox").input_ids


def test_without_a_tail_the_end_of_the_input_goes_but_not_the_end_of_sequence(t5_folder: Path) -> None:
    backbone = load(t5_folder, max_length=16)
    words = ["the", "fox", "sees", "one", "cups", "on", "monday", "glad", "owl", "two", "keys", "eel"]
    row = backbone.encode([Example(" ".join(words), ("mild",))], prompt_length=6)[0]
    assert row.input_ids == backbone.tokenizer(" ".join(words[:9])).input_ids


def test_prompt_and_input_fit_the_positions_that_bart_has(bart: Backbone) -> None:
    assert bart.max_length == 30
    row = bart.encode([Example("the fox " * 40, ("bird",), ("bird", "fish"))], prompt_length=9)[0]
    assert len(row.input_ids) == 21
    (answer,) = bart.answer(random_prompts(bart, 1, length=9), [(0, row)])
    assert math.isfinite(answer.loss)


def test_a_model_that_sees_has_the_positions_of_its_language_model(t5_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_backbone(str(t5_folder), device="cpu")
    assert backbone.positions is None
    text = {"model_type": "mistral", "max_position_embeddings": 77}
    monkeypatch.setattr(backbone.model, "config", transformers.Mistral3Config(text_config=text))
    assert backbone.positions == 77


def test_an_answer_longer_than_the_positions_that_bart_has_is_cut_to_them(bart: Backbone) -> None:
    row = bart.encode([Example("the fox", ("one two " * 30,))], prompt_length=3)[0]
    assert row.target_ids[-1] == bart.tokenizer.eos_token_id
    for decoding in ("options", "generate"):
        (answer,) = bart.answer(random_prompts(bart, 1), [(0, row)], decoding=decoding)
        assert math.isfinite(answer.loss)


def test_a_prompt_that_leaves_no_room_for_the_input_is_refused(bart: Backbone) -> None:
    with pytest.raises(IptError, match=r"a prompt of 28 tokens leaves no room for the input: .* takes 30 tokens"):
        bart.encode([Example("the fox", ("bird",))], prompt_length=28)[0]


def test_an_answer_longer_than_all_that_fits_is_cut_where_a_model_has_no_positions(t5_folder: Path) -> None:
    backbone = load(t5_folder, max_length=16)
    (row,) = backbone.encode([Example("the owl", ("fish bird " * 20,), ("fish bird " * 20, "fish"))], prompt_length=3)
    assert len(row.target_ids) == len(row.option_ids[0]) == row.answer_limit == 16
    assert row.target_ids[-1] == backbone.tokenizer.eos_token_id


def test_generated_text_is_not_tidied_before_it_is_compared() -> None:
    pieces = [("<unk>", 0.0), ("\u2581obama", -1.0), ("\u2581's", -1.0), ("\u2581dog", -1.0), ("</s>", 0.0)]
    unigram = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    unigram.pre_tokenizer, unigram.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=unigram, eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=True
    )
    assert Layout(tokenizer).text([[1, 2, 3, 4]]) == ["obama 's dog"]


def test_the_answer_limit_is_the_longest_reference_of_the_task(t5: Backbone) -> None:
    rows = t5.encode([Example("a", ("one",)), Example("b", ("two", "three four five"))], prompt_length=3)
    assert [row.answer_limit for row in rows] == [4, 4]
    assert t5.encode([], prompt_length=3) == []


def test_an_answer_limit_that_is_asked_for_holds_whatever_the_references_say(t5: Backbone, bart: Backbone) -> None:
    examples = [Example("a", ("one",)), Example("b", ("two", "three four five"))]
    for backbone, most in ((t5, 99), (bart, 30)):
        for limit in (2, 9, 99):
            rows = backbone.encode(examples, prompt_length=3, answer_limit=limit)
            assert [row.answer_limit for row in rows] == [min(limit, most)] * 2


# --- Fingerprint ---------------------------------------------------------------------------------


def test_the_fingerprint_changes_with_weights_vocabulary_tokenizer_and_settings(
    t5_folder: Path, t5: Backbone, tmp_path: Path
) -> None:
    def changed(name: str, file: str, edit: Callable[[Any], Any]) -> str:
        folder = copied(t5_folder, tmp_path / name)
        if file.endswith("json"):
            content = json.loads((folder / file).read_text(encoding="utf-8"))
            edit(content)
            (folder / file).write_text(json.dumps(content), encoding="utf-8")
        else:
            weights = safetensors.torch.load_file(folder / file)
            edit(weights)
            safetensors.torch.save_file(weights, folder / file, {"format": "pt"})
        return load(folder).fingerprint

    def swap_words(content: Any) -> None:
        vocabulary = content["model"]["vocab"]
        vocabulary["fox"], vocabulary["owl"] = vocabulary["owl"], vocabulary["fox"]

    assert load(t5_folder, max_length=20).fingerprint == t5.fingerprint
    assert changed("same", "tokenizer.json", lambda content: None) == t5.fingerprint, "it says nothing of where a model lies"
    found = {
        t5.fingerprint,
        changed("weights", "model.safetensors", lambda weights: weights["shared.weight"][5].mul_(1.1)),
        changed("words", "tokenizer.json", swap_words),
        changed("end", "tokenizer.json", lambda content: content.update(post_processor=None)),  # the same words, no </s>
        changed("settings", "config.json", lambda content: content.update(feed_forward_proj="gelu")),  # another function
    }
    assert len(found) == 5


def test_the_fingerprint_changes_with_any_single_weight(t5: Backbone) -> None:
    """Also with those that no sample of every 4,096th weight would look at, and by the least that a number can change."""
    found = {t5.fingerprint}
    places = [(name, place) for name, weight in t5.model.named_parameters() for place in (1, weight.numel() - 1)]
    for name, place in places:
        model = copy.deepcopy(t5.model)
        weight = dict(model.named_parameters())[name].data.view(-1)
        weight[place] = torch.nextafter(weight[place], torch.tensor(math.inf))
        found.add(like(t5, lm=Seq2Seq(model)).fingerprint)
    assert len(found) == 1 + len(places)


# --- Loading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "cannot load the backbone"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "gpt2"}'), "lacks the tensors .*: it is not whole"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "vit"}'),
            "cannot load the backbone .* language model",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot load the backbone"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "cannot load the backbone"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"nonsense"), "cannot load the backbone"),
    ],
)
def test_a_folder_that_is_no_whole_backbone_is_refused(t5_folder: Path, tmp_path: Path, damage: Any, message: str) -> None:
    damage(copied(t5_folder, tmp_path))
    with pytest.raises(IptError, match=message):
        load(tmp_path)


def test_a_backbone_that_lacks_a_tensor_is_refused_and_never_filled_in(t5_folder: Path, tmp_path: Path) -> None:
    weights = safetensors.torch.load_file(copied(t5_folder, tmp_path) / "model.safetensors")
    del weights["encoder.block.1.layer.1.DenseReluDense.wi.weight"]
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(IptError, match=r"wi.weight"):
        load(tmp_path)


def test_a_device_that_is_not_there_is_refused(t5_folder: Path) -> None:
    for device in ("cuda:99", "toaster", "meta"):
        with pytest.raises(IptError, match=device):
            load_backbone(str(t5_folder), device=device)


# --- Attention -----------------------------------------------------------------------------------


def test_position_bias_and_mask_are_joined_once_a_pass_with_the_result_of_transformers(
    t5: Backbone, tasks: dict[str, Task]
) -> None:
    config = transformers.T5Config(
        vocab_size=len(t5.tokenizer), d_model=16, d_kv=4, d_ff=32, num_layers=3, num_heads=2, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval().requires_grad_(False)
    backbone = like(t5, lm=Seq2Seq(model))
    rows = [rows_of(t5, tasks[name])[0] for name in ("mood-good", "mood-opposite-choice", "day-then-count")]
    assert len({len(row.input_ids) for row in rows}) > 1, "without padding there would be no mask"
    prompt = backbone.initial_prompt(3, seed=0).clone().requires_grad_()

    def pass_over() -> tuple[Tensor, Tensor, list[int]]:
        with Questions() as questions:
            losses = summed_losses(backbone, prompt, rows)
        return losses.detach(), torch.autograd.grad(losses.sum(), prompt)[0], questions.joined

    *expected, at_every_layer = pass_over()
    share_position_bias(model)
    *own, once = pass_over()
    for a, b in zip(own, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert len(at_every_layer) == 9, "three layers, each of the encoder, of the decoder, and between them"
    assert once == [1, 1, 1], "the fused kernels of a GPU take no other layout"


def test_a_line_of_megabytes_is_cut_at_once_to_the_tokens_of_its_ends(backbone: Backbone) -> None:
    words = ["the", "fox", "sees", "one", "cups", "on", "monday"]
    text = " ".join(words[n % 7] for n in range(700_000))
    begin = time.perf_counter()
    (row,) = backbone.encode([Example(text, ("one",), tail=20)], prompt_length=3)
    assert time.perf_counter() - begin < 1
    ids = backbone.tokenizer(text[:4000]).input_ids[:-1], backbone.tokenizer(text[-4000:]).input_ids
    assert row.truncated and len(row.input_ids) == backbone.max_length - 3
    assert row.input_ids[:15] == ids[0][:15] and row.input_ids[-4:] == ids[1][-4:]


# --- Hostile backbones ---------------------------------------------------------------------------

EVIL = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
Path("{ran}").touch()
from transformers import T5Config as Config, T5ForConditionalGeneration as Model, PreTrainedTokenizerFast as Tokenizer
"""
OWN_CODE = {"AutoConfig": "evil.Config", "AutoModelForSeq2SeqLM": "evil.Model", "AutoModelForCausalLM": "evil.Model"}


def edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@pytest.mark.parametrize(("config", "tokenizer"), [
    ({"model_type": "evil", "auto_map": OWN_CODE}, {}),
    ({"auto_map": OWN_CODE}, {}),
    ({}, {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}}),
    ({}, {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}}),
    ({"attn_implementation": "evil/kernel"}, {}),
    ({"architectures": ["../evil"], "custom_pipelines": {"x": {"impl": "evil.Model", "pt": ["Model"]}}}, {}),
])  # fmt: skip
def test_no_code_of_a_backbone_runs_even_where_somebody_says_yes(
    t5_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], tokenizer: dict[str, Any]
) -> None:
    folder, ran = copied(t5_folder, tmp_path / "backbone"), tmp_path / "ran"
    (folder / "evil.py").write_text(EVIL.replace("{ran}", str(ran)), encoding="utf-8")
    edited(folder / "config.json", **config)
    edited(folder / "tokenizer_config.json", **tokenizer)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))  # transformers asks at a terminal
    with contextlib.suppress(IptError):
        assert type(load(folder).model) is transformers.T5ForConditionalGeneration
    assert not ran.exists() and not (folder / "ran").exists()


class Pickled:
    """Touches a file when it is unpickled."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.ran,))


def test_pickled_weights_alone_are_refused_and_not_opened(t5_folder: Path, tmp_path: Path) -> None:
    folder = copied(t5_folder, tmp_path / "backbone")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights | {"x": Pickled(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(IptError, match="cannot load the backbone"):
        load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", [
    lambda content: content[: len(content) // 2], lambda content: content[:-1], lambda content: content[:4], lambda content: b"",
    lambda content: (2**62).to_bytes(8, "little") + content[8:], lambda content: (2**31).to_bytes(8, "little") + content[8:],
    lambda content: content.replace(b'"F32"', b'"F16"', 1), lambda content: content.replace(b'"shape":[', b'"shape":[9,', 1),
])  # fmt: skip
def test_weights_that_are_not_what_they_say_are_refused(t5_folder: Path, tmp_path: Path, damage: Any) -> None:
    weights = copied(t5_folder, tmp_path) / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    with pytest.raises(IptError, match="cannot load the backbone"):
        load(tmp_path)


def test_a_row_without_a_most_likely_option_is_no_answer(bart: Backbone) -> None:
    (row,) = bart.encode([Example("the owl", ("fish",), ("fish", "bird"))], prompt_length=1)
    broken = torch.full((1, 1, bart.hidden), math.nan)
    with pytest.raises(IptError, match="nan: no option of 'the owl' is the most likely"):
        bart.answer(broken, [(0, row)], losses=False)


def test_an_option_that_has_no_likelihood_is_not_the_most_likely(bart: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = bart.encode([Example("the owl", ("fish",), ("fish", "bird"))], prompt_length=1)
    losses_of = Backbone._text_losses
    for right in (0, 1):  # whichever of the two comes first

        def broken(self: Backbone, begun: Any, texts: list[Any], width: int, right: int = right) -> dict[Any, float]:
            wrong = tuple(row.option_ids[1 - right])
            return {text: math.nan if text[1] == wrong else loss for text, loss in losses_of(self, begun, texts, width).items()}

        monkeypatch.setattr(Backbone, "_text_losses", broken)
        (answer,) = bart.answer(random_prompts(bart, 1), [(0, row)])
        assert answer.text == ("fish", "bird")[right] and math.isnan(answer.option_losses[1 - right])
