"""A causal language model (GPT-2, Llama, Qwen ...): the soft prompt stands in front of the text, as in PEFT, or behind it.

Behind the text, what the frozen model keeps of an input (keys and values) does not depend on the prompt: every input goes
through the model once, and from then on a step costs only the tokens of prompt and answer.
Padding stands in front of all, whatever the tokenizer's side, and positions are counted over real tokens alone.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from intrinsic_prompt_tuning.lazy import Tensor, np, torch, transformers
from intrinsic_prompt_tuning.passes import available_memory, only, padded, to_device

PromptAt = Literal["front", "end"]


@dataclass(frozen=True)
class Done:
    """Rows whose prompt and input have gone through the model: texts behind them go on from there."""

    logits: Tensor
    """(rows, vocabulary), of the first token that follows."""
    cache: Any
    """Keys and values of prompt and input."""
    real: np.ndarray
    """(rows, length): which of them are."""

    def of(self, rows: Sequence[int]) -> Done:
        """Return some rows, perhaps several times; what follows in one is not seen in another."""
        at = to_device(rows, self.logits.device)
        chosen = copy.deepcopy(self.cache)
        chosen.reorder_cache(at)
        return Done(self.logits[at], chosen, self.real[list(rows)])


@dataclass(frozen=True)
class Begun:
    """Rows that go through the model when it turns out what is behind them: one text each goes through together with them."""

    lm: Causal
    soft_prompts: Tensor
    """(rows, prompt_length, hidden), float32."""
    input_ids: Sequence[list[int]]

    @cached_property
    def done(self) -> Done:
        """Prompt and input, run on their own."""
        embeddings, real, cache = self.lm.embedded(self.soft_prompts, self.input_ids)
        if cache is None:
            # By the configuration, as hybrids (Qwen 3.5, Granite 4) also keep states that are no keys and values.
            cache = transformers.DynamicCache(config=self.lm.model.config)
        logits = self.lm.logits(embeddings, real, cache, np.arange(1, len(real) + 1) * embeddings.shape[1] - 1)
        return Done(logits, cache, real)


class Causal:
    """A frozen causal model of transformers, and how rows go through it."""

    def __init__(self, model: Any, prompt_at: PromptAt, *, end: int) -> None:
        """Take a model of transformers, where the prompt stands, and the token that ends an answer."""
        self.model, self.prompt_at, self.end = model, prompt_at, end
        # Versions of transformers differ in the name.
        self._cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        self.memory = available_memory(model.device) / 4
        """Bytes that inputs may keep, when the prompt is behind."""
        self.kept: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()
        """Of each input: keys and values of all layers, side by side: (length, features)."""
        self._kept_bytes = 0
        self._shapes: list[tuple[int, int]] = []
        """Heads and dim of each layer's keys, then of its values."""

    def begin(self, soft_prompts: Tensor, input_ids: Sequence[list[int]]) -> Begun:
        """Take soft prompts (rows, prompt_length, hidden), float32, and inputs, one list a row, none empty."""
        return Begun(self, soft_prompts, input_ids)

    def embedded(self, soft_prompts: Tensor, input_ids: Sequence[list[int]]) -> tuple[Tensor, np.ndarray, Any]:
        """Return what goes through the model, and what is cached before it, nothing or inputs.

        Returns:
            Embeddings (rows, length, hidden); what is real of the cache and of them (rows, cached length + length); the cache,
            None where nothing is in it.
        """
        n_rows, prompt_length = soft_prompts.shape[:2]
        if self.prompt_at == "end" and prompt_length:
            cache, real = self._inputs_once(input_ids)
            return soft_prompts.to(self.model.dtype), np.pad(real, ((0, 0), (0, prompt_length)), constant_values=True), cache
        ids, real = padded(input_ids, self.model.device, before=prompt_length)
        embeddings = torch.cat([soft_prompts.to(self.model.dtype), self.model.get_input_embeddings()(ids)], dim=1)
        # Padding to the front: windows and biases that count by place see prompt, input and text side by side.
        width = real.shape[1]
        turned = (np.arange(width) + real.sum(1, keepdims=True)) % width
        at = to_device((turned + np.arange(n_rows)[:, None] * width).ravel(), embeddings.device)
        embeddings = embeddings.flatten(0, 1).index_select(0, at).unflatten(0, (n_rows, width))
        return embeddings, np.take_along_axis(real, turned, 1), None

    def logits(self, embeddings: Tensor, real: np.ndarray, cache: Any, flat: np.ndarray) -> Tensor:
        """Return logits (len(flat), vocabulary) at some positions of the flattened rows; only those reach the vocabulary."""
        mask, places = real.astype(np.int64), np.maximum(real.cumsum(1) - 1, 0)[:, -embeddings.shape[1] :]
        about = {"attention_mask": to_device(mask, embeddings.device), "position_ids": to_device(places, embeddings.device)}
        with only(self.model, to_device(flat, embeddings.device)):
            out = self.model(inputs_embeds=embeddings, use_cache=cache is not None, **about, **{self._cache_name: cache})
        logits: Tensor = out.logits.float()
        return logits

    def _inputs_once(self, input_ids: Sequence[list[int]]) -> tuple[Any, np.ndarray]:
        """Return a cache of inputs, each of which goes through the model once if memory keeps it; and what is real of it."""
        keys = [tuple(ids) for ids in input_ids]
        missing = [key for key in dict.fromkeys(keys) if key not in self.kept]
        rows = {key: self.kept[key] for key in keys if key in self.kept} | (self._run_inputs(missing) if missing else {})
        for key in keys:
            self._kept_bytes += 0 if key in self.kept else rows[key].nbytes
            self.kept[key] = rows[key]
            self.kept.move_to_end(key)
        while self._kept_bytes > self.memory:  # what was used the longest ago goes
            self._kept_bytes -= self.kept.popitem(last=False)[1].nbytes
        lengths = [len(key) for key in keys]
        real = np.arange(max(lengths), 0, -1) <= np.array(lengths)[:, None]
        # One tensor a row: a GPU would wait for the host if each row had one for each layer.
        together = torch.nn.utils.rnn.pad_sequence([rows[key] for key in keys], batch_first=True, padding_side="left")
        parts = together.split([heads * dim for heads, dim in self._shapes], dim=2)
        parts = [part.unflatten(2, shape).transpose(1, 2) for part, shape in zip(parts, self._shapes, strict=True)]
        cache: Any = transformers.DynamicCache()
        for number in range(len(parts) // 2):
            cache.update(*parts[2 * number : 2 * number + 2], number)  # (rows, heads, length, dim) each
        return cache, real

    def _run_inputs(self, inputs: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], Tensor]:
        ids, real = padded(inputs, self.model.device)
        cache: Any = transformers.DynamicCache()
        with torch.no_grad():
            self.logits(self.model.get_input_embeddings()(ids), real, cache, np.arange(1))
        parts = [part for layer in cache.layers for part in (layer.keys, layer.values)]
        self._shapes = [(part.shape[1], part.shape[3]) for part in parts]
        together = torch.cat([part.transpose(1, 2).flatten(2) for part in parts], dim=2)
        return {key: together[i, : len(key)].clone() for i, key in enumerate(inputs)}

    def text_losses(self, begun: Begun, rows: Sequence[int], texts: Sequence[list[int]]) -> Tensor:
        """Return minus the log-likelihood of texts (tokens), each behind the row that `rows` names, summed: (texts,), float32."""
        tokens, said = padded(texts, self.model.device)  # (texts, length)
        following = self.model.get_input_embeddings()(tokens[:, :-1])
        at, of = np.nonzero(said.T)  # all first tokens, then all second ones
        if "done" not in vars(begun) and list(rows) == list(range(len(begun.input_ids))):
            embeddings, real, cache = self.embedded(begun.soft_prompts, begun.input_ids)
            real, first = np.concatenate([real, said[:, :-1]], axis=1), embeddings.shape[1]
            embeddings = torch.cat([embeddings, following], dim=1)
            # The last token before a text predicts its first.
            logits = self.logits(embeddings, real, cache, of * embeddings.shape[1] + first - 1 + at)
        else:
            behind, rest = begun.done.of(rows), (of * following.shape[1] + at - 1)[len(texts) :]
            logits = behind.logits
            if len(rest):
                real = np.concatenate([behind.real, said[:, :-1]], axis=1)
                logits = torch.cat([logits, self.logits(following, real, behind.cache, rest)])
        wanted = tokens.flatten().index_select(0, to_device(of * tokens.shape[1] + at, tokens.device))
        losses = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
        return losses.new_zeros(len(texts)).index_add(0, to_device(of, tokens.device), losses)

    def generate(self, begun: Begun, rows: Sequence[int], limits: Sequence[int]) -> list[list[int]]:
        """Return greedily generated tokens of some rows, each at most so many.

        Not transformers' `generate`, which follows what the backbone was saved with and wants padding on the left.
        """
        behind, tokens, going = begun.done.of(rows), [list[int]() for _ in rows], list(range(len(rows)))
        cache, real, logits = behind.cache, behind.real, behind.logits
        while going:
            following = logits.argmax(-1).tolist()
            for row, token in zip(going, following, strict=True):
                tokens[row].append(token)
            on = [n for n, row in enumerate(going) if following[n] != self.end and len(tokens[row]) < limits[row]]
            going = [going[n] for n in on]
            if going:
                if len(on) < len(following):  # what has ended costs nothing more
                    cache.reorder_cache(to_device(on, self.model.device))
                ids = to_device([[following[n]] for n in on], self.model.device)
                real = np.pad(real[on], ((0, 0), (0, 1)), constant_values=True)
                logits = self.logits(self.model.get_input_embeddings()(ids), real, cache, np.arange(len(on)))
        return tokens
