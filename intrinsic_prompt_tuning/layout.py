"""How a row's text becomes tokens: what stands around the input, between input and answer, and behind the answer.

encoder-decoder   encoder: input as the tokenizer writes it     decoder: answer as it writes targets
causal            input as the tokenizer writes it, one space, the answer, end of text
causal, chat      the template with the input as the user's message, the answer as the assistant's, end of turn
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from intrinsic_prompt_tuning.errors import IptError


@dataclass(frozen=True)
class Layout:
    """An encoder-decoder's: all is as its tokenizer writes it."""

    tokenizer: Any
    before: tuple[int, ...] = ()
    """Tokens in front of every input that its tokenizer does not write."""
    after: tuple[int, ...] = ()
    """Tokens behind every input, likewise."""
    end: int = 0
    """The token behind an answer, in a causal model."""
    chat: bool = False
    """Whether rows are written by the chat template."""
    space: str = " "
    """What stands in front of an answer, in a causal model."""

    def inputs(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of inputs, without what stands before and after."""
        return list(self.tokenizer(list(texts)).input_ids)

    def answers(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of answers, their end among them."""
        return list(self.tokenizer(text_target=list(texts)).input_ids)

    def text(self, written: Sequence[Sequence[int]]) -> list[str]:
        """Return generated tokens as text."""
        return list(self.tokenizer.batch_decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@dataclass(frozen=True)
class CausalLayout(Layout):
    """A causal model's, with or without a chat template."""

    def inputs(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of inputs; never none, as something must predict the answer."""
        ids = self.tokenizer(list(texts), add_special_tokens=not self.chat).input_ids
        ids = [own[:-1] if own[-1:] == [self.end] else own for own in ids]  # some tokenizers end every text
        return [own or ([] if self.before else [self.end]) for own in ids]

    def answers(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of answers and the end behind them."""
        ids = self.tokenizer([self.space + text for text in texts], add_special_tokens=False).input_ids
        return [[*own, self.end] for own in ids]

    def text(self, written: Sequence[Sequence[int]]) -> list[str]:
        """Return generated tokens as text, without the space before it."""
        return [text.strip() for text in super().text([own[:-1] if own[-1:] == [self.end] else own for own in written])]


def causal_layout(tokenizer: Any, name: str, chat: bool | None) -> CausalLayout:
    """Find out how a causal model's rows are written: by the tokenizer's template where `chat`, or where None and it has one.

    Raises:
        IptError: a template is asked for that is not there, or cannot hold a message; or there is no end token.
    """
    if chat and not tokenizer.chat_template:
        raise IptError(f"the tokenizer of '{name}' has no chat template: leave --chat out")
    if chat is False or not tokenizer.chat_template:
        if tokenizer.eos_token_id is None:
            raise IptError(f"the tokenizer of '{name}' has no end-of-text token, so no answer would ever end")
        # A tokenizer of SentencePiece's kind (Mistral's) begins every text with a space of its own.
        own_space = "".join(tokenizer.tokenize("a")).startswith("\u2581")
        return CausalLayout(tokenizer, end=tokenizer.eos_token_id, space="" if own_space else " ")
    mark, answer = "<<the-input>>", "<<the-answer>>"
    turns = [{"role": "user", "content": mark}, {"role": "assistant", "content": answer}]
    # Some templates write today's date, and a row must be the same tomorrow.
    day = "{% macro strftime_now(form) %}26 Jul 2024{% endmacro %}"
    try:
        template = day + tokenizer.get_chat_template()
        manner: Any = {"chat_template": template, "tokenize": False, "enable_thinking": False}
        asked = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, **manner)
        whole = tokenizer.apply_chat_template(turns, **manner)
        thinking = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, **manner | {"enable_thinking": True})
        turn, ending, *_ = whole.split(answer)
        if asked == thinking and asked.startswith(turn):  # what is more is a thought that it opens whatever it is told
            asked = turn
        before, after = asked.split(mark)
        if turn.startswith(asked) and turn[len(asked) :].strip():  # a channel is named in front of an answer (gpt-oss)
            after += turn[len(asked) :]
        ending = tokenizer(ending, add_special_tokens=False).input_ids
    except Exception as error:  # a template is a program of its own
        raise IptError(f"the chat template of '{name}' cannot be used ({error}): use --no-chat") from error
    before, after = (tuple(tokenizer(text, add_special_tokens=False).input_ids) for text in (before, after))
    # Not the space or the text before it, which answers hold, too.
    end = next((token for token in ending if token in tokenizer.added_tokens_decoder), tokenizer.eos_token_id)
    if end is None:
        raise IptError(f"the chat template of '{name}' has no end of turn, so no answer would ever end: use --no-chat")
    return CausalLayout(tokenizer, before=before, after=after, end=end, chat=True, space="")
