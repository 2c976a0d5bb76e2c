"""What recommenders share that let a policy think and then recommend in another way than by naming a SID.

They are trained by policy gradients of their own rewards, with the advantages and the loss of GRPO that all objectives
here have, in the loop of all baselines: a loss samples its thoughts itself.
"""

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sapo.baselines.fitting import Recommender
from sapo.credit.loss import policy_loss
from sapo.credit.objectives import OBJECTIVES
from sapo.decoding.logprobs import completion_logps, end_ids
from sapo.decoding.prompt_cache import PromptCache
from sapo.decoding.sampling import Decoder
from sapo.decoding.shared_prefix import sharing_prompts
from sapo.errors import InputError
from sapo.policy.policy import Policy


class Drawn(NamedTuple):
    """R = B x G thoughts after B prompts."""

    prompt_ids: Int[Tensor, "B P"]  # padded on the left
    prompt_mask: Bool[Tensor, "B P"]
    ids: Int[Tensor, "R T"]  # padded on the right
    lengths: Int[Tensor, "R"]
    sampled: Bool[Tensor, "R T"]  # rather than forced


class ThinkingRecommender(Recommender):
    """A Recommender with a policy, whose thoughts are drafted greedily when it is asked.

    Args:
        policy: what thinks; it is trained in place.
        group_size: G, thoughts of a training history.

    Raises:
        InputError: a policy that does not think.
    """

    ranked_together = 128

    def __init__(self, policy: Policy, group_size: int = 8):
        if not policy.layout.blocks:
            raise InputError("this policy has not learnt to think, and there is nothing else to recommend by.")
        super().__init__(policy.catalog.num_items, policy.max_history)
        self.policy, self.model, self.group_size = policy, policy.model, group_size

    def train(self, mode: bool = True) -> Self:
        """The policy reads thoughts as it drew them, always without dropout."""
        super().train(mode)
        self.model.eval()
        return self

    @torch.no_grad()
    def draw(self, histories: Sequence[Sequence[int]], group_size: int = 1, greedy: bool = True) -> Drawn:
        """Thoughts after histories; sampled ones come from torch's own generator."""
        policy = self.policy
        batch = policy.encode(policy.prompts(histories))
        decoder = Decoder(
            policy.layout, policy.tokenizer.pad_token_id, policy.block_budget, policy.min_block_tokens, greedy=greedy
        )
        with sharing_prompts(self.model):
            cache = PromptCache(self.model, batch["input_ids"], batch["attention_mask"])
            drafts = decoder.think(cache, group_size, None)
        width = int(drafts.length.max())
        mask = batch["attention_mask"].bool()
        return Drawn(batch["input_ids"], mask, drafts.ids[:, :width], drafts.length, drafts.sampled[:, :width])

    def words(self, drawn: Drawn) -> list[str]:
        """The thoughts as text, without delimiters."""
        marks = {self.policy.layout.think_start_id, self.policy.layout.think_end_id}
        rows = [ids[:length] for ids, length in zip(drawn.ids.tolist(), drawn.lengths.tolist(), strict=True)]
        return self.policy.tokenizer.batch_decode([[token for token in row if token not in marks] for row in rows])

    def read(self, drawn: Drawn, mark: int | None = None) -> tuple[Float[Tensor, "R T"], Float[Tensor, "R D"]]:
        """Log-probabilities of the thoughts' tokens as they were drawn, and the state after each thought, or after
        the token `mark` that follows it."""
        group, width = len(drawn.ids) // len(drawn.prompt_ids), drawn.ids.shape[1] + 1
        column = torch.arange(width, device=drawn.ids.device)
        ids = torch.nn.functional.pad(drawn.ids, (0, 1), value=self.policy.tokenizer.pad_token_id)
        mask, ends = column < drawn.lengths[:, None], drawn.lengths - 1
        if mark is not None:
            ends = drawn.lengths
            ids = ids.masked_fill(column == ends[:, None], mark)
            mask = column <= ends[:, None]
        before = [part.repeat_interleave(group, 0) for part in (drawn.prompt_ids, drawn.prompt_mask)]
        states = self.states(torch.cat([before[0], ids], 1), torch.cat([before[1], mask], 1))
        states = states[:, -width - 1 :]  # of the prompt's last token, and of what follows
        written = column[:-1] < drawn.lengths[:, None]
        logps = completion_logps(
            self.model.get_output_embeddings()(states[:, :-2][written]),
            drawn.ids,
            written,
            self.policy.layout,
            self.policy.trie,
            pad_id=self.policy.tokenizer.pad_token_id,
            eos_ids=end_ids(self.model),
            min_block_tokens=self.policy.min_block_tokens,
        )
        return logps, states[torch.arange(len(states), device=ends.device), ends + 1]

    def states(self, ids: Int[Tensor, "R L"], mask: Bool[Tensor, "R L"]) -> Float[Tensor, "R L D"]:
        """The model's last states of whole texts."""
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        backbone = self.model.base_model
        return backbone(input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=False)[0]

    def thought_loss(self, drawn: Drawn, logps: Float[Tensor, "R T"], advantages: Float[Tensor, "R"]) -> Tensor:
        """GRPO's loss of the sampled tokens of thoughts that the policy has just drawn, without KL."""
        steps = self.policy.layout.token_steps(drawn.ids)
        weights = advantages[:, None].expand(logps.shape)
        loss = policy_loss(
            OBJECTIVES["grpo"],
            logps,
            logps.detach(),
            weights,
            steps,
            drawn.sampled,
            num_steps=self.policy.layout.num_steps,
            beta=0,
        )
        return loss.loss
