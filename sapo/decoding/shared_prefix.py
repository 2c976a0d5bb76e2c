"""Prompts that are read once, however many completions follow them.

A prompt here is long and its G completions are short, so most of what a trainer or decoder computes is the same prompt,
G times. Two classes give the model one stream of real tokens, shape (1, N): every layer but attention works
token by token and never sees a copy or padding. Attention, which transformers lets a caller replace, knows whose tokens
are whose:

    PackedGroups    all at once and with gradients, for training: prompts, then completions
    PromptCache     token by token, for decoding: keys and values of prompts once, of what follows one short row each
                    (`sapo.decoding.prompt_cache`)

Both compute what the model would compute on each row alone, for any model whose every layer is attention that goes
through transformers' `AttentionInterface` (Qwen3, Llama, Gemma, ...), sliding windows included.

The idea is known: in training as Prefix Grouper (arXiv 2506.05433, in verl), in decoding as Hydragen (arXiv 2402.05099)
and cascade attention (FlashInfer, arXiv 2501.01005). What is ours is the CPU, gradients that are exact to rounding, and
windows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sapo.decoding.joined_attention import can_join, joined_attention
from sapo.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sapo.decoding.prompt_cache import PromptCache

NAME = "shared_prompt"  # among transformers' attention implementations
_LAYERS = {"full_attention", "sliding_attention"}


def can_share_prompts(model: "PreTrainedModel") -> bool:
    """Whether every layer of the model is attention that can be replaced, a plain softmax of scaled scores."""
    config = model.config.get_text_config()
    layers = getattr(config, "layer_types", None) or ["full_attention"]
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    sinks = any(hasattr(module, "sinks") for module in model.modules())
    return model._can_set_attn_implementation() and set(layers) <= _LAYERS and not capped and not sinks


def share_prompts(model: "PreTrainedModel") -> None:
    """Let the model take `sharing=` in its forward call; without it, attention is torch's, whichever it was before.

    Raises:
        InputError: a model that has other layers, or whose attention cannot be replaced.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if model.config._attn_implementation == NAME:
        return
    if not can_share_prompts(model):
        raise InputError(
            f"{type(model).__name__} cannot share prompts: it has layers other than attention, attention with capped "
            f"scores or sinks, or attention that transformers does not let a caller replace."
        )
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


@contextmanager
def sharing_prompts(model: "PreTrainedModel") -> Iterator[None]:
    """`share_prompts` for a while, in evaluation mode."""
    before, was_training = model.config._attn_implementation, model.training
    share_prompts(model)
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()
        if before != NAME:
            model.set_attn_implementation(before)


class PackedGroups:
    """B prompts and R = B x G completions as one stream without padding, in which a prompt stands once.

    Args:
        prompt_ids, prompt_mask: one row a prompt, padded on either side.
        completion_ids, completion_mask: R rows, a prompt's G contiguous, padded on the right; None for prompts alone,
            of which then only the padding is saved.

    Attributes:
        input_ids, position_ids: what the model reads.
        predictor: for each completion token the place in the stream whose logits predict it.
    """

    input_ids: Int[Tensor, "1 N"]
    position_ids: Int[Tensor, "1 N"]
    predictor: Int[Tensor, "R T"]

    def __init__(
        self,
        prompt_ids: Int[Tensor, "B P"],
        prompt_mask: Bool[Tensor, "B P"],
        completion_ids: Int[Tensor, "R T"] | None = None,
        completion_mask: Bool[Tensor, "R T"] | None = None,
    ):
        if completion_ids is None or completion_mask is None:
            completion_ids, completion_mask = prompt_ids[:0, :1], prompt_mask[:0, :1]
        read = completion_mask[:, 1:]  # the last token of a completion predicts nothing
        self.prompts, self.completions = Rows(prompt_mask), Rows(read)
        self.group_size = len(completion_ids) // max(1, len(prompt_ids))
        self.input_ids = torch.cat([prompt_ids[prompt_mask], completion_ids[:, :-1][read]])[None]
        before = self.prompts.lengths.repeat_interleave(self.group_size)
        self.position_ids = torch.cat([self.prompts.column, before[self.completions.row] + self.completions.column])[
            None
        ]
        ends = self.prompts.lengths.cumsum(0) - 1
        start = len(self.prompts.row) + self.completions.lengths.cumsum(0) - self.completions.lengths
        places = start[:, None] + torch.arange(-1, completion_ids.shape[1] - 1, device=start.device)
        self.predictor = places.clamp(min=0)
        self.predictor[:, 0] = ends.repeat_interleave(self.group_size)
        self._masks: dict[int | None, Tensor] = {}

    def logits(self, model: "PreTrainedModel", places: Int[Tensor, "M"]) -> Float[Tensor, "M V"]:
        """Logits at places of the stream, with a graph if gradients are on; the model has had `share_prompts`."""
        return read_stream(model, self.input_ids, self.position_ids, places, self)

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float, window: int | None
    ) -> Float[Tensor, "1 N H D"]:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        sizes = [len(self.prompts.row), len(self.completions.row)]
        stream = [states.squeeze(0).transpose(0, 1).split(sizes) for states in (query, key, value)]
        prompt = [self.prompts.pad(states) for states, _ in stream]
        causal = self.prompts.window_mask(window)
        output = sdpa_attention_forward(module, *prompt, causal, dropout=dropout, scaling=scaling)[0]
        outputs = [self.prompts.unpad(output)]
        if self.completions.width:
            own = [self.completions.pad(states) for _, states in stream]
            whole = window is None or self.prompts.width + self.completions.width <= window
            if whole and can_join(own, dropout):
                output = joined_attention(own, prompt[1:], self.prompts.lengths, scaling).transpose(1, 2)
            else:
                # to `sdpa`, the keys of a completion are those of its prompt and its own
                own[1:] = (
                    torch.cat([shared[:, None].expand(-1, self.group_size, -1, -1, -1).flatten(0, 1), states], 2)
                    for shared, states in zip(prompt[1:], own[1:], strict=True)
                )
                if window not in self._masks:
                    self._masks[window] = self._mask(window)
                mask = self._masks[window]
                output = sdpa_attention_forward(module, *own, mask, dropout=dropout, scaling=scaling)[0]
            outputs.append(self.completions.unpad(output))
        return torch.cat(outputs)[None]

    def _mask(self, window: int | None) -> Bool[Tensor, "R 1 T W"]:
        """What completion tokens may attend to: W = P + T keys, of the prompt and of the completion."""
        width, length = self.prompts.width, self.completions.width
        before = self.prompts.lengths.repeat_interleave(self.group_size)[:, None, None]
        keys, time = (torch.arange(size, device=before.device) for size in (width, length))
        past, own = keys < before, (time <= time[:, None])[None]  # (R, 1, P) and (1, T, T)
        if window is not None:
            past = past & (before + time[:, None] - keys < window)
            own = own & (time[:, None] - time < window)
        shape = (len(before), length)
        return torch.cat([past.expand(*shape, width), own.expand(*shape, length)], 2)[:, None]


class Rows:
    """Where the tokens of a padded batch stand once the padding is gone: `row` and `column` of each, without gaps."""

    def __init__(self, mask: Bool[Tensor, "B L"]):
        self.lengths = mask.sum(1)
        self.width = int(self.lengths.max()) if len(mask) else 0
        self.row = mask.nonzero(as_tuple=True)[0]
        self.column = (mask.cumsum(1) - 1)[mask]
        self._place = self.row * self.width + self.column
        self._full = len(self.row) == len(mask) * self.width

    def pad(self, states: Float[Tensor, "N H D"]) -> Float[Tensor, "B H L D"]:
        """Rows that begin at the left, so that plain causal attention never looks at the padding."""
        if not self._full:
            padded = states.new_zeros(len(self.lengths) * self.width, *states.shape[1:])
            states = padded.index_copy(0, self._place, states)
        return states.view(len(self.lengths), self.width, *states.shape[1:]).transpose(1, 2)

    def unpad(self, states: Float[Tensor, "B L H D"]) -> Float[Tensor, "N H D"]:
        flat = states.flatten(0, 1)
        return flat if self._full else flat.index_select(0, self._place)

    def window_mask(self, window: int | None) -> Bool[Tensor, "1 1 L L"] | None:
        """What attention within rows needs beside being causal."""
        if window is None or self.width <= window:
            return None
        time = torch.arange(self.width, device=self.row.device)
        ago = time[:, None] - time
        return ((ago >= 0) & (ago < window))[None, None]


def _attention(
    module: Any,
    query: Float[Tensor, "B H L D"],
    key: Float[Tensor, "B h L D"],
    value: Float[Tensor, "B h L D"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sharing: "PackedGroups | PromptCache | None" = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in every layer."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if sharing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return sharing.attend(module, query, key, value, scaling, dropout, options.get("sliding_window")), None


def read_stream(
    model: Any,
    input_ids: Int[Tensor, "1 N"],
    position_ids: Int[Tensor, "1 N"],
    places: Int[Tensor, "M"],
    sharing: "PackedGroups | PromptCache",
) -> Float[Tensor, "M V"]:
    """Logits at some places of a stream.

    Raises:
        InputError: a prompt of no tokens; other attention, which would take the stream for one text and see all of it.
    """
    if not int(sharing.prompts.lengths.min()):
        raise InputError("a prompt has no tokens: nothing could predict what follows it.")
    config = getattr(model, "module", model).config  # of what a distributed wrapper holds
    if config._attn_implementation != NAME:
        raise InputError(
            f"the model's attention is {config._attn_implementation!r}: call share_prompts(model) to share prompts."
        )
    return model(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=_no_mask(input_ids),
        use_cache=False,
        logits_to_keep=places,
        sharing=sharing,
    ).logits.squeeze(0)  # whose gradient, unlike that of [0], is no copy


def _no_mask(ids: Tensor) -> Bool[Tensor, "1 1 1 1"]:
    """transformers leaves a mask of four dimensions alone, and attention here makes its own."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)
