"""The frozen language model and its tokenizer: loading, tokens, and answers to rows behind soft prompts."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from intrinsic_prompt_tuning.causal import Causal, PromptAt
from intrinsic_prompt_tuning.errors import IptError, short
from intrinsic_prompt_tuning.layout import Layout, causal_layout
from intrinsic_prompt_tuning.lazy import Tensor, torch, transformers
from intrinsic_prompt_tuning.passes import Budget, first_budgets, to_device
from intrinsic_prompt_tuning.seq2seq import Seq2Seq, share_position_bias
from intrinsic_prompt_tuning.settings import TESTBED
from intrinsic_prompt_tuning.tasks import Example

Text = tuple[int, tuple[int, ...]]
"""The number of a row in a pass, and the tokens of an answer to it."""
Decoding = Literal["options", "generate"]
Precision = Literal["auto", "fp32", "bf16"]
TESTBED_FOLDER = Path(__file__).with_name("testbed")


@dataclass(frozen=True)
class Encoded:
    """An example as token ids, made once."""

    input_ids: list[int]
    target_ids: list[int]
    option_ids: list[list[int]]
    example: Example
    answer_limit: int
    """Tokens to generate at most."""
    truncated: bool

    def __len__(self) -> int:
        """Return its tokens, which stand beside the prompt's in a pass."""
        return len(self.input_ids) + len(self.target_ids)

    def widths(self, prompt_length: int) -> tuple[int, int]:
        """Return the tokens of prompt and input, and of the answer."""
        return prompt_length + len(self.input_ids), len(self.target_ids)


@dataclass(frozen=True)
class Answer:
    """What the backbone answered to a row."""

    text: str
    loss: float
    """Mean loss per token of the right answer; nan when it was not asked for."""
    option_losses: tuple[float, ...] = ()
    """Minus the log-likelihood of each option, where the most likely one was chosen."""


@dataclass(eq=False)
class Backbone:
    """A frozen language model, its tokenizer, and how much goes through it at once."""

    name: str
    """For messages."""
    lm: Seq2Seq | Causal
    """A model of transformers, and how rows go through it."""
    layout: Layout
    """How text becomes tokens."""
    max_length: int
    """Tokens of prompt and input together."""
    budget: Budget
    """Of passes forward and backward."""
    answer_budget: Budget
    """Of passes forward only, which keep no activations."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers."""
        return self.layout.tokenizer

    @property
    def model(self) -> Any:
        """The model of transformers."""
        return self.lm.model

    @property
    def prompt_at(self) -> PromptAt:
        """Where the prompt stands: in front of the input or behind it."""
        return self.lm.prompt_at

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return torch.device(self.model.device)

    @property
    def hidden(self) -> int:
        """The size of an input embedding."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    @cached_property
    def fingerprint(self) -> str:
        """A digest that changes with the architecture, any weight, and the tokenizer, its behaviour included."""
        about = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}
        config = {name: value for name, value in self.model.config.to_diff_dict().items() if name not in about}
        own = self.tokenizer
        rules = own.backend_tokenizer.to_str() if own.is_fast else repr(own).replace(repr(own.name_or_path), "")
        written = [] if self.layout.space else [[self.layout.before, self.layout.after, self.layout.end]]  # of a template
        about_all = [own.get_vocab(), rules, config, *written]
        digest = hashlib.sha256(json.dumps(about_all, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    @cached_property
    def embedding_rms(self) -> float:
        """The root mean square of the embeddings as the model gets them: about 10 for T5, 0.02 for BART."""
        embed = self.model.get_input_embeddings()
        pieces = torch.arange(embed.weight.shape[0], device=self.device).split(1 << 14)  # a copy of all may take gigabytes
        squares = [len(ids) * float(embed(ids).float().pow(2).mean()) for ids in pieces]
        return float(torch.tensor(sum(squares) / embed.weight.shape[0]).sqrt())

    def initial_prompt(self, prompt_length: int, seed: int, text: str = "") -> Tensor:
        """Return the start that all tasks share: embeddings of a text, repeated, or of random words: (prompt_length, hidden).

        Raises:
            IptError: the text has no tokens.
        """
        embed = self.model.get_input_embeddings()
        words = sorted({*range(min(len(self.tokenizer), len(embed.weight)))} - {*self.tokenizer.all_special_ids})
        known = text.encode(errors="ignore").decode()  # without what is no UTF-8, which tokenizers do not take
        chosen = self.tokenizer(known, add_special_tokens=False).input_ids if known else []
        if text and not chosen:
            raise IptError(f"--initial-text is {text!a}, which has no tokens")
        chosen = (chosen * prompt_length)[:prompt_length] or random.Random(seed).choices(words, k=prompt_length)
        embeddings: Tensor = embed(torch.tensor(chosen, device=self.device, dtype=torch.long)).float()
        return embeddings

    @property
    def positions(self) -> int | None:
        """How many tokens the model has positions for; None: any number."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)  # of a model that sees, too

    def room(self, prompt_length: int, answer_length: int = 1) -> int:
        """Return how many tokens of an input fit beside a prompt, and, in a causal model, an answer.

        Raises:
            IptError: too few.
        """
        most = self.max_length
        if isinstance(self.lm, Causal) and self.positions:
            most = min(most, self.positions - answer_length)
        if (room := most - prompt_length - len(self.layout.before) - len(self.layout.after)) < 4:
            raise IptError(
                f"a prompt of {prompt_length} tokens leaves no room for the input: {self.name} takes {most} tokens in "
                f"all; use a smaller --prompt-length{'' if self.max_length == self.positions else ' or a larger --max-length'}"
            )
        return room

    def encode(self, examples: Sequence[Example], *, prompt_length: int, answer_limit: int | None = None) -> list[Encoded]:
        """Tokenise the rows of one task, cutting inputs so that prompt, input and end-of-sequence fit.

        Args:
            examples: rows of one task.
            prompt_length: tokens of the prompt.
            answer_limit: tokens to generate at most; None: those of the longest reference.

        Raises:
            IptError: the prompt leaves no room for any input.
        """
        if not examples:
            return []
        texts, most = sorted({text for e in examples for text in (*e.answers, *e.options)}), self.max_length
        if isinstance(self.lm, Causal) and self.positions:  # answers share them with inputs
            most = min(most, self.positions // 2)
        whole = dict(zip(texts, self.layout.answers(texts), strict=True))
        ids = {text: own if len(own) <= most else [*own[: most - 1], own[-1]] for text, own in whole.items()}
        limit = min(most, answer_limit or max(len(ids[text]) for e in examples for text in e.answers))
        room = self.room(prompt_length, max([limit, *map(len, ids.values())]))
        # Of text far beyond the room only the ends are looked at, so only they need to become tokens.
        end = 64 * room
        inputs = self.layout.inputs([e.input if len(e.input) <= 2 * end else e.input[:end] + e.input[-end:] for e in examples])
        cut = [len(own) > room or len(whole[e.answers[0]]) > most for own, e in zip(inputs, examples, strict=True)]
        return [
            Encoded(self._cut(own, e, room), ids[e.answers[0]], [ids[o] for o in e.options], e, limit, is_cut)
            for own, e, is_cut in zip(inputs, examples, cut, strict=True)
        ]

    def _cut(self, ids: list[int], example: Example, room: int) -> list[int]:
        """Cut an input, first the end of what stands before the example's tail, then the start of the tail; and frame it."""
        if len(ids) > room:
            tail = example.input[len(example.input) - example.tail :]
            # An encoder-decoder's input ends in a token of its own, whatever it says.
            spared = len(self.tokenizer(tail, add_special_tokens=False).input_ids) + (not isinstance(self.lm, Causal))
            head = max(1, room - spared)
            ids = ids[:head] + ids[len(ids) - (room - head) :]
        return [*self.layout.before, *ids, *self.layout.after]

    def answer(
        self, prompts: Tensor, rows: Sequence[tuple[int, Encoded]], *, decoding: Decoding | None = "options", losses: bool = True
    ) -> list[Answer]:
        """Answer rows, each behind the soft prompt that it names.

        Args:
            prompts: (tasks, prompt_length, hidden).
            rows: (index of the soft prompt, example).
            decoding: `options` answers by the most likely option where there are options; `generate` always generates greedily;
                None gives losses alone.
            losses: whether to compute the loss of the right answer, too.
        """
        answers: dict[int, Answer] = {}

        def work(numbers: list[int]) -> None:
            chunk, at = [rows[n][1] for n in numbers], to_device([rows[n][0] for n in numbers], self.device)
            begun: Any = self.lm.begin(prompts[at], [e.input_ids for e in chunk])
            options = [e.option_ids if decoding == "options" else [] for e in chunk]
            writing = [i for i, own in enumerate(options) if decoding and not own]
            written = self.lm.generate(begun, writing, [chunk[i].answer_limit for i in writing]) if writing else []
            said = dict(zip(writing, self.layout.text(written), strict=True))
            # An option that is the right answer, as one is, need not be scored twice.
            wanted = [(i, tuple(text)) for i, e in enumerate(chunk) for text in [e.target_ids] * losses + options[i]]
            loss_of = self._text_losses(begun, list(dict.fromkeys(wanted)), prompts.shape[1] + len(chunk[0]))
            for i, (n, e) in enumerate(zip(numbers, chunk, strict=True)):
                scored = tuple(loss_of[i, tuple(option)] for option in options[i])
                if not losses and any(map(math.isnan, scored)):
                    raise IptError(f"nan: no option of '{e.example.input[:60]}' is the most likely; use --precision fp32")
                compared = [math.inf if math.isnan(loss) else loss for loss in scored]
                text = e.example.options[compared.index(min(compared))] if scored else said.get(i, "")
                loss = loss_of[i, tuple(e.target_ids)] / len(e.target_ids) if losses else math.nan
                answers[n] = Answer(text, loss, scored)

        with torch.inference_mode():
            self.answer_budget.in_passes([e.widths(prompts.shape[1]) for _, e in rows], work)
        return [answers[n] for n in range(len(rows))]

    def _text_losses(self, begun: Any, texts: Sequence[Text], width: int) -> dict[Text, float]:
        """Return the losses of (row, text), in pieces: each text brings a copy of its row's states, so many tokens wide."""
        losses, size = dict[Text, float](), max(1, 4 * self.answer_budget.tokens // width)
        for group in self.answer_budget.groups([(len(text),) for _, text in texts]):
            for start in range(0, len(group), size):
                piece = [texts[n] for n in group[start : start + size]]
                losses |= zip(piece, self.lm.text_losses(begun, *zip(*piece, strict=True)).tolist(), strict=True)
        return losses


def load_backbone(
    name: str, *, device: str = "auto", precision: Precision = "auto", max_length: int = 512,
    prompt_at: PromptAt | None = None, chat: bool | None = None,
) -> Backbone:  # fmt: skip
    """Load and freeze a language model, and check it.

    Args:
        name: a Hub id, a local folder, a `.gguf` file, or `testbed`.
        device: `auto` takes a GPU when there is one, each rank its own.
        precision: `bf16`, `fp32`, or `auto`: bf16 on a GPU that has it. What learns is always float32.
        max_length: tokens of prompt and input together, at most what the backbone has positions for.
        prompt_at: where a causal model's prompt stands, in front of the input or behind it; None: behind it.
        chat: write a causal model's rows by the tokenizer's chat template; None: if it has one.

    Raises:
        IptError: there is no such model, it is no language model that answers, or it computes another thing here than alone.
    """
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    where = _find_device(device)
    has_bf16 = where.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = precision == "bf16" or (precision == "auto" and has_bf16)
    # Every step has other shapes, and with cuDNN's attention took 2 to 2.4 times as long (H100, torch 2.11).
    torch.backends.cuda.enable_cudnn_sdp(False)
    model, tokenizer = _load(name, where, torch.bfloat16 if bf16 else torch.float32)
    model.eval().requires_grad_(False)
    # Answers are greedy, whatever the backbone was saved with: beams, forced tokens, penalties.
    special = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    model.generation_config = transformers.GenerationConfig(**{name: getattr(model.config, name, None) for name in special})
    lm: Seq2Seq | Causal
    if model.config.is_encoder_decoder:
        if asked := "--prompt-at end" if prompt_at == "end" else "--chat" if chat else "":
            raise IptError(f"{asked} is for causal models, but '{name}' is an encoder-decoder: leave it out")
        if model._supports_sdpa:
            share_position_bias(model)
        layout, lm = Layout(tokenizer), Seq2Seq(model)
    else:
        if bf16 and where.type == "cpu":
            # torch's own kernel takes five times as long backward (2.13, AVX512-BF16), a step a third longer.
            model.set_attn_implementation("eager")
        layout = causal_layout(tokenizer, name, chat)
        lm = Causal(model, prompt_at or "end", end=layout.end)
    backbone = Backbone(name, lm, layout, max_length, *first_budgets(model, lm.prompt_at))
    check_backbone(backbone)
    backbone.max_length = min(max_length, backbone.positions or max_length)
    return backbone


def _load(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return model and tokenizer as transformers loads them: safetensors, no code of the model's own, no question about it."""
    path, options = (str(TESTBED_FOLDER) if name == TESTBED else name), dict[str, Any](trust_remote_code=False)
    if name.endswith(".gguf"):
        path, options = str(Path(name).parent), options | {"gguf_file": Path(name).name}
        if importlib.util.find_spec("gguf") is None:
            raise IptError(f"to read '{name}', install the package gguf: pip install 'intrinsic-prompt-tuning[gguf]'")
    try:
        config = transformers.AutoConfig.from_pretrained(path, **options)
        encoder_only = [a for a in getattr(config, "architectures", None) or () if a.endswith("ForMaskedLM")]
        if encoder_only and not config.is_encoder_decoder:
            raise IptError(f"the backbone '{name}' is an encoder alone ({encoder_only[0]}), which cannot answer")
        kind: Any = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
        if not config.is_encoder_decoder and type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
            kind = transformers.AutoModelForImageTextToText  # reads text, too: Mistral 3, Qwen 3 VL
        weights = {} if "gguf_file" in options else {"use_safetensors": True}
        loaded: Any = kind.from_pretrained(path, dtype=dtype, output_loading_info=True, **weights, **options)
        model, loading = loaded[0].to(device), loaded[1]
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
    except IptError:
        raise
    except Exception as error:  # readers of safetensors, GGUF, JSON and configurations raise whatever they like
        raise IptError(
            f"cannot load the backbone '{short(name, 200)}' as a language model: {short(str(error) or repr(error), 300)} "
            "Expected a Hub id (google/t5-base-lm-adapt), a folder with config, safetensors and tokenizer, or a .gguf file"
        ) from error
    if loading["missing_keys"]:
        raise IptError(f"the backbone '{name}' lacks the tensors {', '.join(sorted(loading['missing_keys']))}: it is not whole")
    return model, tokenizer


def check_backbone(backbone: Backbone) -> None:
    """Send one row through our path, two of its tokens as prompt and padded beside another, and through the model's own; compare.

    Families differ in what they do between tokens and layers (scaled embeddings, start tokens, masks). Whatever passes is right.

    Raises:
        IptError: the losses differ, or one path fails.
    """
    model, example = backbone.model, Example("is it so that one and two are three?", ("yes",), ("yes", "no"))
    tolerance = 1e-3 if model.dtype == torch.float32 else 2e-2  # rounding alone: 1e-6, 3e-3
    try:
        (row,) = backbone.encode([example], prompt_length=0)
        ids, target = (torch.tensor([ids], device=backbone.device) for ids in (row.input_ids, row.target_ids))
        if shift := getattr(model, "prepare_decoder_input_ids_from_labels", None):  # mBART's labels end in the start
            model.generation_config.decoder_start_token_id = int(shift(labels=target)[0, 0])
        # Two of the input's own tokens as its prompt, a hair beside them as some families (Gemma 4) look up which token an
        # embedding is; and a longer row, for which it is padded.
        front = backbone.prompt_at == "front"
        taken, rest = (slice(2), row.input_ids[2:]) if front else (slice(-2, None), row.input_ids[:-2])
        with torch.inference_mode():
            prompt = model.get_input_embeddings()(ids)[:, taken].float() * (1 + tolerance / 10)
            begun: Any = backbone.lm.begin(prompt.expand(2, -1, -1), [rest, 2 * row.input_ids])
            found = [backbone.lm.text_losses(begun, rows, [row.target_ids] * len(rows)) for rows in ([0, 1], [0, 0, 1])]
            ours = [float(loss) / len(row.target_ids) for loss in (found[0][0], *found[1][:2])]
            if isinstance(backbone.lm, Causal):
                ids, target = torch.cat([ids, target], dim=1), torch.cat([torch.full_like(ids, -100), target], dim=1)
            theirs = float(model(input_ids=ids, labels=target).loss)
    except Exception as error:  # whatever a family of models does that this program does not know
        reason = short(f"{type(error).__name__}: {error}", 200)
        reason += "; --prompt-at front may work" * (backbone.prompt_at == "end")
        raise IptError(f"the backbone '{backbone.name}' ({model.config.model_type}) cannot be used here: {reason}") from error
    if not all(abs(own - theirs) <= tolerance * max(1.0, abs(theirs)) for own in ours):
        told = ", ".join(f"{own:.4f}" for own in ours)
        raise IptError(
            f"the backbone '{backbone.name}' ({model.config.model_type}) computes another loss where a prompt is words of the "
            f"input ({told}) than alone ({theirs:.4f}): its family does something that this program does not know"
        )


def _find_device(name: str) -> torch.device:
    """Return a device that is there, `auto` being this rank's GPU if there is one."""
    try:
        if name == "auto":
            count = torch.cuda.device_count()
            name = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % count}" if count else "cpu"
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        device = torch.empty(0, device=device).device  # with its number, which `cuda` alone lacks
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise IptError(f"there is no device '{name}' here ({short(error)}): use --device auto, cpu or cuda") from error
    return device
