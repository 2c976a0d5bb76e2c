"""Keys and values of prompts that their completions share, while these are written."""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sapo.decoding.shared_prefix import Rows, read_stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PromptCache:
    """Keys and values of B prompts, and of what R = B x G rows wrote after them.

    Prompts are read when it is made. `start` begins G rows a prompt, `read` goes on with them, each at its own pace;
    `select` copies rows, as beams do; `extend_prompts` makes prompts of the rows, so beams can share a thought too.

    Args:
        model: within `sharing_prompts`, or after `share_prompts` and in evaluation mode.
        input_ids, attention_mask: prompts of one token or more, padded on either side.

    Attributes:
        logits: (B, V), of the token after each prompt.
        prompt_lengths: (B,), tokens of each prompt.
        lengths: (R,), tokens read of each row.
    """

    logits: Float[Tensor, "B V"]
    prompt_lengths: Int[Tensor, "B"]
    lengths: Int[Tensor, "R"]

    def __init__(
        self,
        model: "PreTrainedModel",
        input_ids: Int[Tensor, "B P"],
        attention_mask: Int[Tensor, "B P"],
    ):
        self.model = model
        self.prompts = Rows(attention_mask.bool())
        self.prompt_lengths = self.prompts.lengths
        self.group_size = 0  # while prompts are read
        self._shared: dict[int, tuple[Tensor, Tensor]] = {}  # by layer: keys and values, (B, heads, P, D)
        self._own: dict[int, tuple[Tensor, Tensor]] = {}  # by layer: (B, heads, G, T, D)
        self._last_layer = model.config.get_text_config().num_hidden_layers - 1
        self._ends = self.prompts.lengths.cumsum(0) - 1
        self.logits = self._forward(input_ids[attention_mask.bool()], self.prompts.column, self._ends)

    def start(self, group_size: int, longest: int) -> None:
        """Begin R = B x `group_size` empty rows of at most `longest` tokens."""
        self.group_size, self.longest = group_size, longest
        self.lengths = self.prompt_lengths.new_zeros(len(self.prompt_lengths) * group_size)
        self._own = {}

    def read(
        self, ids: Int[Tensor, "R T"], until: Int[Tensor, "R"], rows: Bool[Tensor, "R"] | None = None
    ) -> Float[Tensor, "M V"]:
        """Read `ids[r, lengths[r] : until[r]]` of the given rows, at least one token each, or of all.

        Returns:
            Logits after the last token of each of these rows.
        """
        column = torch.arange(ids.shape[1], device=ids.device)
        pending = (column >= self.lengths[:, None]) & (column < until[:, None])
        if rows is not None:
            pending &= rows[:, None]
        self._row, self._slot = pending.nonzero(as_tuple=True)
        counts = pending.sum(1)
        self._offset = self._slot - self.lengths[self._row]
        self._most = int(counts.max())
        self._begin, self.lengths = self.lengths, self.lengths + counts
        self._reach = int(self.lengths.max())
        self._regular = len(self._row) == len(counts) * self._most  # as many tokens of every row
        self._in_step = self._regular and self._most == 1 and int(self.lengths.min()) == self._reach
        self._masks: dict[int | None, Tensor | None] = {}
        positions = self.prompt_lengths.repeat_interleave(self.group_size)[self._row] + self._slot
        last = counts.cumsum(0) - 1
        return self._forward(ids[self._row, self._slot], positions, last if rows is None else last[rows])

    def select(self, rows: Int[Tensor, "B W"]) -> None:
        """Go on with W rows a prompt, each a copy of one of its rows, given by their number within the group."""
        width = rows.shape[1]
        self.lengths = self.lengths.view(-1, self.group_size).gather(1, rows).flatten()
        index = rows[:, None, :, None, None]
        for layer, states in self._own.items():
            keys, values = (x.gather(2, index.expand(-1, x.shape[1], -1, *x.shape[3:])) for x in states)
            self._own[layer] = keys, values
        self.group_size = width

    def extend_prompts(self, logits: Float[Tensor, "R V"]) -> None:
        """Make R prompts of what has been read of the R rows; `logits` follow the last token of each."""
        before = self.prompt_lengths.repeat_interleave(self.group_size)
        lengths = before + self.lengths
        slots = torch.arange(self.longest, device=lengths.device)
        row, slot = (slots < self.lengths[:, None]).nonzero(as_tuple=True)
        for layer, states in self._shared.items():
            longer = [x.repeat_interleave(self.group_size, 0) for x in states]
            if layer in self._own:
                room = max(0, int(lengths.max()) - longer[0].shape[2])
                longer = [torch.nn.functional.pad(x, (0, 0, 0, room)) for x in longer]
                for shared, own in zip(longer, self._own[layer], strict=True):
                    shared[row, :, before[row] + slot] = own.transpose(1, 2).flatten(0, 1)[row, :, slot]
            self._shared[layer] = (longer[0], longer[1])
        self.prompt_lengths, self.logits = lengths, logits
        self.group_size, self._own = 0, {}

    def _forward(self, ids: Int[Tensor, "N"], positions: Int[Tensor, "N"], last: Int[Tensor, "M"]) -> Tensor:
        return read_stream(self.model, ids[None], positions[None], last, self)

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float, window: int | None
    ) -> Float[Tensor, "1 N H D"]:
        # under autocast norms leave queries and keys in float32; a cache of them would be twice as large
        stream = [states[0].transpose(0, 1).to(value.dtype) for states in (query, key, value)]
        if not self.group_size:
            return self._attend_in_prompts(module, stream, scaling, window)
        layer, (query, key, value) = module.layer_idx, stream
        shared_keys, shared_values = self._shared[layer]
        prompts, heads, width, size = shared_keys.shape
        group, most, reach = self.group_size, self._most, self._reach
        if layer not in self._own:
            shape = (prompts, heads, group, self.longest)
            self._own[layer] = (key.new_zeros(*shape, size), value.new_zeros(*shape, shared_values.shape[-1]))
        for states, written in zip(self._own[layer], (key, value), strict=True):
            if self._in_step:
                states[:, :, :, reach - 1] = written.view(prompts, group, heads, -1).transpose(1, 2)
            else:
                states[self._row // group, :, self._row % group, self._slot] = written
        own_keys, own_values = (states[:, :, :, :reach] for states in self._own[layer])

        # queries as (prompts, key heads, G, query heads of a key head x tokens of a row, D)
        grid = query * scaling
        if not self._regular:
            place = self._row * most + self._offset
            grid = grid.new_zeros(prompts * group * most, *grid.shape[1:]).index_copy_(0, place, grid)
        repeats = query.shape[1] // heads
        grid = grid.view(prompts, group, most, heads, repeats, size).permute(0, 3, 1, 4, 2, 5)
        grid = grid.reshape(prompts, heads, group, repeats * most, size)
        scores = query.new_empty(prompts, heads, group, repeats * most, width + reach)
        scores[..., :width] = (grid.flatten(2, 3) @ shared_keys.mT).view(*grid.shape[:-1], width)
        scores[..., width:] = grid @ own_keys.mT
        if window not in self._masks:
            self._masks[window] = self._forbidden(width, reach, window)
        if (forbidden := self._masks[window]) is not None:
            by_head = scores.view(prompts, heads, group, repeats, most, width + reach)
            by_head.masked_fill_(forbidden, float("-inf"))
        weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
        output = (weights[..., :width].flatten(2, 3) @ shared_values).view(*grid.shape[:-1], -1)
        output += weights[..., width:] @ own_values
        output = output.view(prompts, heads, group, repeats, most, -1).permute(0, 2, 4, 1, 3, 5)
        output = output.reshape(prompts * group * most, query.shape[1], -1)
        return (output if self._regular else output.index_select(0, place))[None]

    def _attend_in_prompts(
        self, module: Any, stream: list[Tensor], scaling: float, window: int | None
    ) -> Float[Tensor, "1 N H D"]:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        query, key, value = (self.prompts.pad(states) for states in stream)
        self._shared[module.layer_idx] = (key, value)
        if module.layer_idx < self._last_layer:
            mask = self.prompts.window_mask(window)
            output = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)[0]
            return self.prompts.unpad(output)[None]
        # of the last layer only the last tokens are asked for
        lengths, column = self.prompts.lengths[:, None], torch.arange(key.shape[2], device=key.device)
        mask = column < lengths if window is None else (column < lengths) & (lengths - 1 - column < window)
        query = stream[0][self._ends][:, :, None]
        output = sdpa_attention_forward(module, query, key, value, mask[:, None, None], scaling=scaling)[0]
        everyone = output.new_zeros(len(stream[0]), *output.shape[2:])
        return everyone.index_copy_(0, self._ends, output[:, 0])[None]

    def _forbidden(self, width: int, reach: int, window: int | None) -> Bool[Tensor, "B 1 G 1 q W"] | None:
        """Keys that the tokens read now may not attend to: padding, what comes later, what left the window."""
        before = self.prompt_lengths.view(-1, 1, 1, 1)
        if self._in_step and window is None and int(before.min()) == width:
            return None
        device = before.device
        slot = self._begin.view(-1, self.group_size, 1, 1) + torch.arange(self._most, device=device)[:, None]
        shared, own = torch.arange(width, device=device), torch.arange(reach, device=device)
        outside = [(shared >= before).expand(*slot.shape[:3], width), own > slot]
        if window is not None:
            outside[0] = outside[0] | (before + slot - shared >= window)
            outside[1] = outside[1] | (slot - own >= window)
        return torch.cat(outside, -1)[:, None, :, None]
