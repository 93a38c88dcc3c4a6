"""An encoder-decoder (T5, BART ...): the soft prompt stands in front of the encoder's input, as in the paper and in PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from intrinsic_prompt_tuning.lazy import Tensor, np, torch, transformers
from intrinsic_prompt_tuning.passes import FEW, only, padded, to_device


@dataclass(frozen=True)
class Begun:
    """Rows that have been through the encoder: all texts behind a row go on from there."""

    states: Any
    """(rows, prompt_length + input_length, hidden), as a decoder takes them."""
    mask: Tensor
    """(rows, prompt_length + input_length), one where there is something."""

    def of(self, rows: Sequence[int]) -> Begun:
        """Return some rows, perhaps several times."""
        if list(rows) == list(range(len(self.mask))):
            return self
        at = to_device(rows, self.mask.device)
        return Begun(transformers.modeling_outputs.BaseModelOutput(self.states.last_hidden_state[at]), self.mask[at])


@dataclass(frozen=True)
class Seq2Seq:
    """A frozen sequence-to-sequence model of transformers, and how rows go through it."""

    model: Any
    prompt_at: Literal["front"] = "front"

    def begin(self, soft_prompts: Tensor, input_ids: Sequence[list[int]]) -> Begun:
        """Run the encoder on soft prompts (rows, prompt_length, hidden), float32, and inputs, whose padding no row sees."""
        ids, real = padded(input_ids, self.model.device, before=soft_prompts.shape[1])
        inputs = self.model.get_input_embeddings()(ids)  # (rows, input_length, hidden)
        inputs = torch.cat([soft_prompts.to(inputs.dtype), inputs], dim=1)  # (rows, prompt_length + input_length, hidden)
        mask = to_device(real.astype(np.int64), self.model.device)
        return Begun(self.model.get_encoder()(inputs_embeds=inputs, attention_mask=mask), mask)

    def text_losses(self, begun: Begun, rows: Sequence[int], texts: Sequence[list[int]]) -> Tensor:
        """Return minus the log-likelihood of texts (tokens), each behind the row that `rows` names, summed: (texts,), float32."""
        tokens, real = padded(texts, self.model.device, least=FEW)  # (texts, length)
        start = self.model.generation_config.decoder_start_token_id
        ids = torch.nn.functional.pad(tokens[:, :-1], (1, 0), value=start)
        # Found on the host: a device that is asked makes the host wait for it.
        own = np.flatnonzero(real)
        filled, rows_of = np.resize(own, max(FEW, len(own))), np.nonzero(real)[0]
        flat, of = (to_device(positions, self.model.device) for positions in (filled, rows_of))
        behind: Any = begun.of(rows)
        about = {"encoder_outputs": behind.states, "attention_mask": behind.mask, "decoder_input_ids": ids, "use_cache": False}
        with only(self.model, flat):
            logits = self.model(**about).logits  # (text tokens, filled up, vocabulary)
        losses = torch.nn.functional.cross_entropy(logits.float(), tokens.flatten().index_select(0, flat), reduction="none")
        return losses.new_zeros(len(texts)).index_add(0, of, losses[: len(own)])

    def generate(self, begun: Begun, rows: Sequence[int], limits: Sequence[int]) -> list[list[int]]:
        """Return greedily generated tokens of some rows, each at most so many."""
        behind = begun.of(rows)
        written = self.model.generate(encoder_outputs=behind.states, attention_mask=behind.mask, max_new_tokens=max(limits))
        # A row's own limit holds, so that no answer depends on the rows beside it. The first token is the decoder's start.
        return [row[1 : 1 + limit] for row, limit in zip(written.tolist(), limits, strict=True)]


def share_position_bias(model: Any) -> None:
    """Let a backbone's attention join position bias (T5) and padding mask once a pass; transformers does it at every layer.

    The joined mask (batch, heads, length, length) is the largest tensor of a pass, and each layer would keep its own for the
    backward pass. Whether there is padding at all is not looked at either: that look makes the host wait for the device.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
        bias = options.pop("position_bias", None)
        if bias is not None and mask is not None:
            if getattr(bias, "joined_with", None) is not mask:  # kept on the bias, so that it goes when the pass is over
                # T5 computes its bias heads last; the fused kernels of a GPU want keys last.
                bias.joined_with, bias.joined = mask, torch.where(mask, bias.contiguous(), torch.finfo(query.dtype).min)
            mask, bias = bias.joined, None
        return sdpa_attention_forward(module, query, key, value, mask, position_bias=bias, **options)

    def full_mask(*arguments: Any, **options: Any) -> Any:
        return sdpa_mask(*arguments, **options | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})

    transformers.AttentionInterface.register("ipt", attend)
    transformers.AttentionMaskInterface.register("ipt", full_mask)
    model.set_attn_implementation("ipt")
