"""Causal backbones: equal to the plain, unpadded computation and to PEFT, wherever the prompt stands."""

from __future__ import annotations

import copy
import datetime
from pathlib import Path
from typing import Any

import peft
import pytest
import tokenizers
import torch
import transformers
import yaml
from conftest import save_tokenizer, spread, words_of
from torch import Tensor

from intrinsic_prompt_tuning.backbone import Backbone, Encoded, load_backbone
from intrinsic_prompt_tuning.causal import Causal
from intrinsic_prompt_tuning.errors import IptError
from intrinsic_prompt_tuning.experiment import Experiment
from intrinsic_prompt_tuning.layout import causal_layout
from intrinsic_prompt_tuning.passes import Budget
from intrinsic_prompt_tuning.settings import TESTBED
from intrinsic_prompt_tuning.spaces import Space
from intrinsic_prompt_tuning.tasks import Example, Task, World
from intrinsic_prompt_tuning.tuning import Job, TuneConfig, prompt_losses, tune

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES: dict[str, Any] = {
    "gpt2": lambda size: transformers.GPT2Config(vocab_size=size, n_embd=16, n_layer=2, n_head=4, n_positions=64),
    "llama": lambda size: transformers.LlamaConfig(vocab_size=size, max_position_embeddings=64, **SIZES),
    "qwen3": lambda size: transformers.Qwen3Config(vocab_size=size, max_position_embeddings=64, head_dim=4, **SIZES),
    "gemma": lambda size: transformers.GemmaConfig(vocab_size=size, max_position_embeddings=64, head_dim=4, **SIZES),
    "mistral": lambda size: transformers.MistralConfig(vocab_size=size, max_position_embeddings=64, sliding_window=5, **SIZES),
    "mpt": lambda size: transformers.MptConfig(
        vocab_size=size, d_model=16, n_layers=2, n_heads=4, expansion_ratio=2, max_seq_len=64
    ),
    "opt": lambda size: transformers.OPTConfig(
        vocab_size=size,
        hidden_size=16,
        word_embed_proj_dim=8,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        do_layer_norm_before=True,
    ),
    "phi3": lambda size: transformers.Phi3Config(vocab_size=size, max_position_embeddings=64, **SIZES),
    "gemma3": lambda size: transformers.Gemma3TextConfig(
        vocab_size=size, max_position_embeddings=64, head_dim=4, sliding_window=5, **SIZES
    ),
    "gemma2": lambda size: transformers.Gemma2Config(vocab_size=size, max_position_embeddings=64, head_dim=4, **SIZES),
}
CHAT = "{% for m in messages %}<turn> {{ m['role'] }} {{ m['content'] }} </s> {% endfor %}{% if add_generation_prompt %}<turn> assistant {% endif %}"


def save_model(folder: Path, family: str, world: World, *, chat: bool = False, pad: bool = True, end: bool = True) -> Path:
    specials = ["<pad>", "</s>", "<unk>", "<turn>"]
    roles = ({"pad_token": "<pad>"} if pad else {}) | ({"eos_token": "</s>"} if end else {})
    size = save_tokenizer(folder, specials, [*words_of(world), "user", "assistant"], "$A", **roles)
    if chat:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = CHAT
        tokenizer.save_pretrained(folder)
    config = FAMILIES[family](size)
    config.eos_token_id, config.pad_token_id, config.bos_token_id = 1, 0, None
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    spread(model, 1.0, seed=3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, world: World) -> dict[str, Path]:
    return {family: save_model(tmp_path_factory.mktemp(family), family, world) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def rows_of(backbone: Backbone, tasks: dict[str, Task], length: int = 3) -> list[Encoded]:
    """Return rows of many lengths, with options and without."""
    rows = [row for name in tasks for row in backbone.encode(tasks[name].sample(100, 2, 11).train[:3], prompt_length=length)]
    short = [
        Example("the owl", ("bird",)),
        Example("on", ("one two three",)),
        Example("cod sees keys", ("fish",), ("fish", "bird")),
    ]
    return [*rows, *backbone.encode(short, prompt_length=length)]


def prompts_of(backbone: Backbone, count: int, length: int = 3) -> Tensor:
    noise = torch.randn(count, length, backbone.hidden, generator=torch.Generator().manual_seed(1))
    return noise * backbone.embedding_rms


def plain_logits(backbone: Backbone, prompt: Tensor, row: Encoded, text: list[int]) -> Tensor:
    """Return the logits of a text's tokens by one unpadded pass of the model over embeddings."""
    embed = backbone.model.get_input_embeddings()
    before, behind = embed(torch.tensor(row.input_ids)), embed(torch.tensor(text))
    parts = [prompt, before, behind] if backbone.lm.prompt_at == "front" else [before, prompt, behind]
    return backbone.model(inputs_embeds=torch.cat(parts)[None], use_cache=False).logits[0, -len(text) - 1 : -1]


def plain_loss(backbone: Backbone, prompt: Tensor, row: Encoded, text: list[int]) -> Tensor:
    return torch.nn.functional.cross_entropy(plain_logits(backbone, prompt, row, text), torch.tensor(text), reduction="sum")


@pytest.mark.parametrize("at", ["front", "end"])
def test_in_bf16_losses_and_gradients_are_nearly_those_of_fp32(folders: dict[str, Path], tasks: dict[str, Task], at: Any) -> None:
    found = []
    for precision in ("fp32", "bf16"):
        backbone = load_backbone(str(folders["llama"]), device="cpu", precision=precision, prompt_at=at)  # type: ignore[arg-type]
        rows, prompts = rows_of(backbone, tasks), prompts_of(backbone, 2)
        found.append(prompt_losses(backbone, prompts, [(n % 2, row) for n, row in enumerate(rows)]))
    (losses, gradients), (half, half_gradients) = found
    assert half.tolist() == pytest.approx(losses.tolist(), rel=0.02)
    assert not half.equal(losses) and torch.cosine_similarity(gradients.flatten(), half_gradients.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("at", ["front", "end"])
def test_losses_gradients_and_options_are_those_of_the_unpadded_computation(
    folders: dict[str, Path], family: str, tasks: dict[str, Task], at: Any
) -> None:
    backbone = load_backbone(str(folders[family]), device="cpu", prompt_at=at)
    backbone.budget = backbone.answer_budget = Budget(1 << 12)  # rows of all lengths in one pass, as on a GPU
    rows, prompts = rows_of(backbone, tasks), prompts_of(backbone, 2)
    leaf = prompts.clone().requires_grad_()
    expected = [plain_loss(backbone, leaf[n % 2], row, row.target_ids) for n, row in enumerate(rows)]
    answers = backbone.answer(prompts, [(n % 2, row) for n, row in enumerate(rows)])
    for answer, row, loss in zip(answers, rows, expected, strict=True):
        assert answer.loss * len(row.target_ids) == pytest.approx(float(loss.detach()), rel=1e-4)
    for n, (answer, row) in enumerate(zip(answers, rows, strict=True)):
        if row.option_ids:
            with torch.no_grad():
                losses = [float(plain_loss(backbone, prompts[n % 2], row, option)) for option in row.option_ids]
            assert answer.text == row.example.options[losses.index(min(losses))]
    losses, gradients = prompt_losses(backbone, prompts.clone(), [(n % 2, row) for n, row in enumerate(rows)])
    for i in (0, 1):
        tokens = sum(len(row.target_ids) for row in rows[i::2])
        total = torch.stack(expected[i::2]).sum() / tokens
        assert float(losses[i]) == pytest.approx(float(total.detach()), rel=1e-4)
    whole = sum(torch.stack(expected[i::2]).sum() / sum(len(row.target_ids) for row in rows[i::2]) for i in (0, 1))
    (gradient,) = torch.autograd.grad(whole, leaf)
    torch.testing.assert_close(gradients, gradient, rtol=1e-3, atol=1e-5)
    assert len({len(row.input_ids) for row in rows}) > 2, "without padding the case shows nothing"


def test_a_hybrid_is_right_with_the_prompt_in_front_and_refused_behind(
    tmp_path: Path, world: World, tasks: dict[str, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its layers of convolution remember of an input is no keys and values."""
    if not hasattr(transformers, "Lfm2Config"):
        pytest.skip("transformers has no LFM2 yet")
    layers = {"layer_types": ["conv", "full_attention"]}
    monkeypatch.setitem(FAMILIES, "lfm2", lambda size: transformers.Lfm2Config(vocab_size=size, **SIZES, **layers))
    folder = save_model(tmp_path, "lfm2", world)
    test_losses_gradients_and_options_are_those_of_the_unpadded_computation({"lfm2": folder}, "lfm2", tasks, "front")
    with pytest.raises(IptError, match=r"\(lfm2\) cannot be used here: .*; --prompt-at front may work"):
        load_backbone(str(folder), device="cpu", prompt_at="end")


def test_a_model_that_does_not_fit_onto_its_device_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def to(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(transformers.PreTrainedModel, "to", to)
    with pytest.raises(IptError, match="cannot load the backbone 'testbed'.*out of memory"):
        load_backbone(TESTBED, device="cpu")


@pytest.mark.parametrize("at", ["front", "end"])
def test_generation_is_greedy_and_padding_is_not_seen(
    folders: dict[str, Path], family: str, tasks: dict[str, Task], at: Any
) -> None:
    backbone = load_backbone(str(folders[family]), device="cpu", prompt_at=at)
    backbone.budget = backbone.answer_budget = Budget(1 << 12)
    rows, prompts = rows_of(backbone, tasks)[:8], prompts_of(backbone, 2)
    answers = backbone.answer(prompts, [(n % 2, row) for n, row in enumerate(rows)], decoding="generate")
    for n, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        written: list[int] = []
        while len(written) < row.answer_limit and written[-1:] != [backbone.lm.end]:
            with torch.no_grad():
                written.append(int(plain_logits(backbone, prompts[n % 2], row, [*written, 0])[-1].argmax()))
        assert answer.text == backbone.tokenizer.decode(written, skip_special_tokens=True).strip()
    assert len({answer.text for answer in answers}) > 1


@pytest.mark.parametrize("at", ["front", "end"])
def test_a_row_that_may_write_much_takes_no_position_of_its_neighbours(folders: dict[str, Path], at: Any) -> None:
    """GPT-2 has 64 positions: a row that fills them ends beside one that goes on."""
    backbone = load_backbone(str(folders["gpt2"]), device="cpu", prompt_at=at)
    backbone.lm.end = -1  # no answer ends by itself
    (long,) = backbone.encode([Example("the owl " * 20, ("bird",))], prompt_length=3, answer_limit=20)
    (short,) = backbone.encode([Example("the owl", ("bird",))], prompt_length=3, answer_limit=30)
    assert len(long.input_ids) + 3 + 20 > 60
    prompts = prompts_of(backbone, 1)
    alone = [backbone.answer(prompts, [(0, row)], decoding="generate")[0].text for row in (long, short)]
    backbone.answer_budget = Budget(1 << 12)
    together = backbone.answer(prompts, [(0, long), (0, short)], decoding="generate")
    assert [answer.text for answer in together] == alone


def test_rows_that_have_ended_go_through_the_model_no_more(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_backbone(str(folders["llama"]), device="cpu")
    backbone.lm.end, backbone.answer_budget = -1, Budget(1 << 12)  # no answer ends by itself
    rows = [backbone.encode([Example("the owl", ("bird",))], prompt_length=3, answer_limit=limit)[0] for limit in (2, 5, 3)]
    run, sizes = Causal.logits, list[int]()
    monkeypatch.setattr(Causal, "logits", lambda lm, given, *rest: (sizes.append(len(given)), run(lm, given, *rest))[1])
    backbone.answer(prompts_of(backbone, 1), [(0, row) for row in rows], decoding="generate", losses=False)
    assert sizes[-4:] == [3, 2, 1, 1]


def test_rows_of_all_lengths_share_a_pass(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a causal model no bit is promised beside neighbours; an encoder-decoder on a CPU would have a pass for each block."""
    backbone = load_backbone(str(folders["llama"]), device="cpu")
    rows = backbone.encode([Example("the owl sees " * n, ("bird",), ("bird", "owl")) for n in (1, 4, 8, 13)], prompt_length=3)
    assert len({len(row.input_ids) // 16 for row in rows}) == 3
    begin, sizes = Causal.begin, list[int]()
    monkeypatch.setattr(Causal, "begin", lambda lm, given, ids: (sizes.append(len(ids)), begin(lm, given, ids))[1])
    backbone.answer(prompts_of(backbone, 1), [(0, row) for row in rows])
    assert sizes == [4]


def test_long_answers_leave_half_of_the_positions_to_the_input(folders: dict[str, Path]) -> None:
    backbone = load_backbone(str(folders["gpt2"]), device="cpu")
    (row,) = backbone.encode([Example("the owl sees " * 5, ("one two " * 20,))], prompt_length=3, answer_limit=80)
    assert len(row.input_ids) == 15 and row.truncated, "its answer is cut"
    assert len(row.target_ids) == row.answer_limit == 32 and row.target_ids[-1] == backbone.lm.end


def test_a_prompt_in_front_gives_the_loss_and_the_gradient_of_peft(folders: dict[str, Path], tasks: dict[str, Task]) -> None:
    """Row by row: PEFT's positions are wrong where rows are padded on the left."""
    backbone = load_backbone(str(folders["llama"]), device="cpu", prompt_at="front")
    rows, (prompt,) = rows_of(backbone, tasks)[:6], prompts_of(backbone, 1)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(prompt))
    model = peft.get_peft_model(copy.deepcopy(backbone.model), config)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(prompt)
    for row in rows:
        ids = torch.tensor([row.input_ids + row.target_ids])
        labels = torch.tensor([[-100] * len(row.input_ids) + row.target_ids])
        expected = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        model.zero_grad()
        expected.backward()
        losses, gradient = prompt_losses(backbone, prompt[None].clone(), [(0, row)])
        assert float(losses) == pytest.approx(float(expected.detach()), rel=1e-5)
        torch.testing.assert_close(gradient[0], model.prompt_encoder["default"].embedding.weight.grad, rtol=1e-3, atol=1e-6)


def test_behind_the_input_a_prompt_lets_every_input_go_through_the_model_once(
    folders: dict[str, Path], tasks: dict[str, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load_backbone(str(folders["llama"]), device="cpu", prompt_at="end")
    space, seen = Space(backbone.initial_prompt(3, 0), backbone.embedding_rms), []
    run = backbone.lm._run_inputs
    monkeypatch.setattr(backbone.lm, "_run_inputs", lambda inputs: (seen.extend(inputs), run(inputs))[1])
    task = tasks["animal-class"]
    sample = task.sample(100, 4, 11)
    train, validation = (backbone.encode(part, prompt_length=3) for part in (sample.train, sample.validation))
    jobs = [
        Job(task="animal-class", metric="ACC", data_seed=100, learning_rate=rate, theta=torch.zeros(space.dim), rows=(train, validation))
        for rate in (0.1, 0.2)
    ]  # fmt: skip
    list(tune(backbone, space, jobs, TuneConfig(steps=12, batch_size=4, evaluations=3, patience=0)))
    assert len(seen) == len(set(seen)) == len({tuple(row.input_ids) for row in [*train, *validation]})


def test_what_memory_does_not_keep_is_computed_again_with_the_same_result(
    folders: dict[str, Path], tasks: dict[str, Task]
) -> None:
    wide, tight = (load_backbone(str(folders["qwen3"]), device="cpu", prompt_at="end") for _ in range(2))
    tight.lm.memory = 6000.0
    rows, prompts = rows_of(wide, tasks), prompts_of(wide, 2)
    pairs = [(n % 2, row) for n, row in enumerate(rows)]
    for _ in range(2):
        one, other = (b.answer(prompts, pairs) for b in (wide, tight))
        assert [a.text for a in one] == [a.text for a in other]
        assert [a.loss for a in one] == pytest.approx([a.loss for a in other], rel=1e-5)
    assert tight.lm._kept_bytes <= 6000 < wide.lm._kept_bytes


@pytest.mark.parametrize("at", ["front", "end"])
def test_the_backbone_stays_bitwise_the_same_and_tuning_lowers_the_loss(
    folders: dict[str, Path], tasks: dict[str, Task], at: Any
) -> None:
    backbone = load_backbone(str(folders["llama"]), device="cpu", prompt_at=at)
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    space, rows = Space(backbone.initial_prompt(3, 0), backbone.embedding_rms), rows_of(backbone, tasks)[:8]
    job = Job(task="x", metric="EM", data_seed=1, learning_rate=0.1, theta=torch.zeros(space.dim), rows=(rows, rows))
    (result,) = tune(backbone, space, [job], TuneConfig(steps=40, batch_size=8, evaluations=2, patience=0))
    assert result.record["last_loss"] < result.record["first_loss"]
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.model.state_dict().items())
    assert all(weight.grad is None for weight in backbone.model.parameters())


# --- Text ----------------------------------------------------------------------------------------


def test_a_row_is_the_input_a_space_the_answer_and_the_end(folders: dict[str, Path]) -> None:
    backbone = load_backbone(str(folders["llama"]), device="cpu")
    (row,) = backbone.encode([Example("the fox sees", ("two keys",))], prompt_length=3)
    words = backbone.tokenizer.convert_ids_to_tokens
    assert words(row.input_ids) == ["the", "fox", "sees"]
    assert words(row.target_ids) == ["two", "keys", "</s>"]
    assert not backbone.layout.chat


def test_a_chat_model_s_row_is_its_template_with_the_answer_as_the_assistant_s_turn(tmp_path: Path, world: World) -> None:
    folder = save_model(tmp_path, "llama", world, chat=True)
    backbone, bare = load_backbone(str(folder), device="cpu"), load_backbone(str(folder), device="cpu", chat=False)
    (row,), (plain,) = (b.encode([Example("the fox sees", ("two keys",))], prompt_length=3) for b in (backbone, bare))
    words = backbone.tokenizer.convert_ids_to_tokens
    assert words(row.input_ids) == ["<turn>", "user", "the", "fox", "sees", "</s>", "<turn>", "assistant"]
    assert words(row.target_ids) == ["two", "keys", "</s>"]
    assert backbone.layout.chat and not bare.layout.chat and words(plain.input_ids) == ["the", "fox", "sees"]
    ids = backbone.tokenizer.apply_chat_template(
        [{"role": "user", "content": "the fox sees"}], add_generation_prompt=True, return_dict=False
    )
    assert row.input_ids == list(ids)


def test_a_long_input_of_a_chat_model_is_cut_inside_its_template(tmp_path: Path, world: World) -> None:
    backbone = load_backbone(str(save_model(tmp_path, "llama", world, chat=True)), device="cpu", max_length=16)
    (row,) = backbone.encode([Example("the fox sees one cups on " * 4, ("two",))], prompt_length=3)
    words = backbone.tokenizer.convert_ids_to_tokens(row.input_ids)
    assert row.truncated and len(words) == 13
    assert words[:2] == ["<turn>", "user"] and words[-3:] == ["</s>", "<turn>", "assistant"]


def test_an_empty_input_still_has_a_token_to_go_on_from(folders: dict[str, Path]) -> None:
    backbone = load_backbone(str(folders["llama"]), device="cpu")
    (row,) = backbone.encode([Example("", ("two",))], prompt_length=0)
    (answer,) = backbone.answer(torch.zeros(1, 0, backbone.hidden), [(0, row)])
    assert len(row.input_ids) == 1 and answer.loss > 0


def bytes_tokenizer(template: str) -> Any:
    """Return a tokenizer of single bytes, in which a template's marks are no tokens but the end of text is."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    plain = tokenizers.Tokenizer(tokenizers.models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


TURNS = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {{ END }}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"


@pytest.mark.parametrize("end", ["{{ eos_token }}", "<over>"])
def test_an_answer_of_a_chat_ends_with_a_token_that_is_no_text(end: str) -> None:
    """The space before the end is none, nor the first letter of a mark that is no token."""
    tokenizer = bytes_tokenizer(TURNS.replace("{{ END }}", end))
    layout = causal_layout(tokenizer, "bytes", None)
    assert layout.chat and layout.end == tokenizer.eos_token_id
    (ids,) = layout.answers(["two keys"])
    assert tokenizer.decode(ids) == "two keys</s>" and layout.text([ids]) == ["two keys"]


def test_a_channel_that_a_template_names_in_front_of_an_answer_stands_there() -> None:
    """gpt-oss's template writes it into what was said, and leaves it to the model where it asks for more."""
    say = "{% if m['role'] == 'assistant' %}[assistant]<final>{% else %}[user]{% endif %}{{ m['content'] }}{{ eos_token }}"
    ask = "{% if add_generation_prompt %}[assistant]{% endif %}"
    layout = causal_layout(bytes_tokenizer("{% for m in messages %}" + say + "{% endfor %}" + ask), "bytes", None)
    ids = [*layout.before, *layout.inputs(["is it"])[0], *layout.after, *layout.answers(["yes"])[0]]
    assert layout.tokenizer.decode(ids) == "[user]is it</s>[assistant]<final>yes</s>"


def test_a_template_that_opens_a_thought_whatever_it_is_told_opens_none() -> None:
    """DeepSeek-R1's, as far as it tells here: what was said has no thought in front."""
    say = "{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}"
    ask = "{% if add_generation_prompt %}assistant: <think>{% endif %}"
    layout = causal_layout(bytes_tokenizer("{% for m in messages %}" + say + "{% endfor %}" + ask), "bytes", None)
    ids = [*layout.before, *layout.inputs(["is it"])[0], *layout.after, *layout.answers(["yes"])[0]]
    assert layout.tokenizer.decode(ids) == "user: is it</s>assistant: yes</s>"


def test_a_tokenizer_that_ends_every_text_ends_no_input(folders: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["llama"])
    plain = causal_layout(tokenizer, "plain", False).inputs(["the owl"])
    core = tokenizer.backend_tokenizer
    core.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    assert tokenizer("the owl").input_ids == [*plain[0], 1]
    assert causal_layout(tokenizer, "ending", False).inputs(["the owl", ""]) == [*plain, [1]]


def test_an_answer_has_one_space_before_it_where_the_tokenizer_puts_one() -> None:
    """As Mistral's does: what begins a text has a space in front."""
    vocab = {token: n for n, token in enumerate(["</s>", *"\u2581abcdefghijklmnopqrstuvwxyz"])}
    plain = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    spaces = [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
    plain.normalizer = tokenizers.normalizers.Sequence(spaces)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>")
    layout = causal_layout(tokenizer, "pieces", None)
    whole = tokenizer("is it yes").input_ids
    assert [*layout.inputs(["is it"])[0], *layout.answers(["yes"])[0]] == [*whole, layout.end]


def test_a_chat_template_writes_the_same_day_every_day(monkeypatch: pytest.MonkeyPatch) -> None:
    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Later:
            return cls(2031, 1, 2)

    tokenizer = bytes_tokenizer("{{ 'It is ' + strftime_now('%d %b %Y') }}" + TURNS.replace("{{ END }}", "</s>"))
    today = causal_layout(tokenizer, "bytes", None).before
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Later)
    assert causal_layout(tokenizer, "bytes", None).before == today
    assert "26 Jul 2024" in tokenizer.decode(today)


def test_the_fingerprint_changes_with_the_chat_template_where_it_is_used(tmp_path: Path, world: World) -> None:
    folder = save_model(tmp_path, "llama", world, chat=True)
    found = []
    for template in (CHAT, CHAT.replace("<turn>", "<turn> the")):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        found.append([load_backbone(str(folder), device="cpu", chat=chat).fingerprint for chat in (True, False)])
    assert found[0][0] != found[1][0] and found[0][1] == found[1][1]


def test_random_words_are_those_that_the_model_has_embeddings_of(folders: dict[str, Path]) -> None:
    backbone = load_backbone(str(folders["llama"]), device="cpu")
    assert backbone.tokenizer.add_tokens([f"new{n}" for n in range(500)]) == 500
    for seed in range(3):
        assert backbone.initial_prompt(100, seed).isfinite().all()


# --- Bad input -----------------------------------------------------------------------------------


def test_a_tokenizer_without_padding_token_is_fine(tmp_path: Path, world: World, tasks: dict[str, Task]) -> None:
    backbone = load_backbone(str(save_model(tmp_path, "gpt2", world, pad=False)), device="cpu")
    assert len(backbone.answer(prompts_of(backbone, 1), [(0, row) for row in rows_of(backbone, tasks)])) > 5


def test_a_tokenizer_without_end_token_is_refused(tmp_path: Path, world: World) -> None:
    with pytest.raises(IptError, match="no end-of-text token"):
        load_backbone(str(save_model(tmp_path, "gpt2", world, end=False)), device="cpu")


def test_a_chat_template_that_is_not_there_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(IptError, match="has no chat template: leave --chat out"):
        load_backbone(str(folders["llama"]), device="cpu", chat=True)


def test_what_is_for_causal_models_is_refused_on_an_encoder_decoder() -> None:
    with pytest.raises(IptError, match="--prompt-at end is for causal models"):
        load_backbone(TESTBED, device="cpu", prompt_at="end")
    with pytest.raises(IptError, match="--chat is for causal models"):
        load_backbone(TESTBED, device="cpu", chat=True)


def test_an_encoder_alone_is_refused(tmp_path: Path, world: World) -> None:
    size = save_tokenizer(tmp_path, ["<pad>", "</s>", "<unk>"], words_of(world), "$A", pad_token="<pad>", eos_token="</s>")
    config = transformers.BertConfig(
        vocab_size=size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(IptError, match="is an encoder alone"):
        load_backbone(str(tmp_path), device="cpu")


def test_a_prompt_and_text_beyond_the_model_s_positions_are_refused_and_long_inputs_cut(folders: dict[str, Path]) -> None:
    backbone = load_backbone(str(folders["gpt2"]), device="cpu")
    (row,) = backbone.encode([Example("the fox " * 60, ("bird",), ("bird", "fish"))], prompt_length=9)
    assert len(row.input_ids) + 9 + len(row.target_ids) <= 64
    assert backbone.answer(prompts_of(backbone, 1, length=9), [(0, row)])[0].loss > 0
    with pytest.raises(IptError, match="a prompt of 62 tokens leaves no room"):
        backbone.encode([Example("the fox", ("bird",))], prompt_length=62)


def test_a_gguf_file_needs_the_package_that_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(IptError, match=r"install the package gguf: pip install 'intrinsic-prompt-tuning\[gguf\]'"):
        load_backbone(str(tmp_path / "model.gguf"), device="cpu")


def test_a_gguf_file_that_is_none_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_bytes(b"GGUF and nothing more")
    with pytest.raises(IptError, match="cannot load the backbone"):
        load_backbone(str(tmp_path / "model.gguf"), device="cpu")


# --- Self-check ----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["Pegasus", "Marian"])
def test_a_family_that_computes_another_thing_behind_a_prompt_is_refused(
    tmp_path: Path, world: World, kind: str, precision: str
) -> None:
    """Both scale the embeddings of tokens only, not those that a prompt brings."""
    size = save_tokenizer(tmp_path, ["<pad>", "</s>", "<unk>"], words_of(world), "$A </s>", pad_token="<pad>", eos_token="</s>")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=size, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=40, scale_embedding=True, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0, forced_eos_token_id=None,
    )  # fmt: skip
    model = getattr(transformers, "PegasusForConditionalGeneration" if kind == "Pegasus" else "MarianMTModel")(config)
    spread(model, 1.0, seed=5)
    model.save_pretrained(tmp_path)
    with pytest.raises(IptError, match=rf"\({kind.lower()}\) (computes another loss|cannot be used)"):
        load_backbone(str(tmp_path), device="cpu", precision=precision)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["M2M100", "Blenderbot"])
def test_a_family_that_shifts_no_labels_itself_gives_its_own_losses(
    tmp_path: Path, world: World, tasks: dict[str, Task], kind: str
) -> None:
    size = save_tokenizer(tmp_path, ["<pad>", "</s>", "<unk>"], words_of(world), "$A </s>", pad_token="<pad>", eos_token="</s>")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=size, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=60, scale_embedding=False, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=1, forced_eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    spread(model, 1.0, seed=5)
    model.save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path), device="cpu")
    rows = [row for name in tasks for row in backbone.encode(tasks[name].sample(100, 2, 11).train[:2], prompt_length=0)]
    answers = backbone.answer(torch.zeros(1, 0, 16), [(0, row) for row in rows])
    for row, answer in zip(rows, answers, strict=True):
        ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.target_ids])
        expected = float(backbone.model(input_ids=ids, labels=labels).loss)
        assert answer.loss == pytest.approx(expected, rel=1e-5)


THINKING = CHAT.replace("assistant {% endif %}", "assistant{% if enable_thinking is false %} the{% endif %} {% endif %}")


def test_a_model_that_thinks_answers_at_once(tmp_path: Path, world: World) -> None:
    """Its template then says that there are no thoughts; here `the` does."""
    folder = save_model(tmp_path, "llama", world, chat=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = THINKING
    tokenizer.save_pretrained(folder)
    backbone = load_backbone(str(folder), device="cpu")
    (row,) = backbone.encode([Example("fox", ("two",))], prompt_length=0)
    assert backbone.tokenizer.convert_ids_to_tokens(row.input_ids)[-3:] == ["<turn>", "assistant", "the"]


def test_a_prompt_behind_the_input_has_defaults_of_its_own_text_and_steps(folders: dict[str, Path], tmp_path: Path) -> None:
    def of(**more: Any) -> Experiment:
        return Experiment({"backbone": str(folders["llama"]), "cache": tmp_path, "device": "cpu", "prompt_length": 5} | more)

    behind, front, words = of(), of(prompt_at="front"), of(initial_text="")
    tokens = behind.backbone.tokenizer("Answer:", add_special_tokens=False).input_ids
    embeddings = behind.backbone.model.get_input_embeddings()(torch.tensor((5 * tokens)[:5]))
    assert behind.prompt_space.initial_prompt.equal(embeddings)
    assert behind.header("soft-prompt")["initial_text"] == "Answer:"
    for x in (front, words):
        assert "initial_text" not in x.header("soft-prompt")
        assert not x.prompt_space.initial_prompt.equal(embeddings)
    assert [x.tuning.steps for x in (behind, front, of(steps=7))] == [200, 1000, 7]
    for x, steps in ((behind, 200), (of(steps=7), 7)):  # also where it follows from the place
        x.tell("tune", {"steps": "--steps", "initial_text": "--initial-text"})
        x.keep_notes()
        told = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in (tmp_path / "commands").iterdir()]
        assert {"tune": {"steps": steps, "initial-text": "Answer:"}} in told
