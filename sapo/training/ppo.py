"""Proximal policy optimisation (PPO): a learned value of every state beside the policy, and the credit it gives."""

import copy
from pathlib import Path

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from sapo.credit.gae import generalized_advantages, token_rewards, value_loss, whiten
from sapo.errors import InputError

FILE = "critic.pt"
VALUE_CLIP = 0.2  # of the reward


class Critic(nn.Module):
    """A copy of the policy's trunk with one number on top, in place of the vocabulary. It starts at 0 everywhere.

    A trunk of its own, as in Tulu 3 (arXiv 2411.15124), so that learning values does not move the policy; there it
    comes from a reward model, here from the policy that reinforcement learning starts from.

    Args:
        policy: whose trunk is copied.
        scale: of the rewards; the head counts in units of it.
    """

    def __init__(self, policy: PreTrainedModel, accelerator: Accelerator, learning_rate: float, scale: float):
        super().__init__()
        self.trunk = copy.deepcopy(policy.base_model)
        self.head = nn.Linear(policy.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.accelerator, self.scale = accelerator, scale
        self.to(accelerator.device).eval()  # no dropout: a value is compared with what it was a moment ago
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=learning_rate, weight_decay=0.0)

    def forward(
        self, input_ids: Int[Tensor, "B L"], attention_mask: Int[Tensor, "B L"], tokens: int
    ) -> Float[Tensor, "B T"]:
        """Values of the states before each of the last `tokens` tokens."""
        positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        with self.accelerator.autocast():
            hidden = self.trunk(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
            ).last_hidden_state
        return self.scale * self.head(hidden[:, -tokens - 1 : -1].float())[..., 0]

    def learn(
        self,
        input_ids: Int[Tensor, "B L"],
        attention_mask: Int[Tensor, "B L"],
        returns: Float[Tensor, "B T"],
        old_values: Float[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
        num_tokens: float | Tensor,
    ) -> float:
        """Add the gradient of one micro-batch, and make the step at the last one of an update; returns its loss.

        In units of the reward, so that clipping and gradients do not depend on what a hit pays.

        Args:
            num_tokens: trained tokens of the whole update on this process, so that how it is cut changes nothing.
        """
        values = self(input_ids, attention_mask, returns.shape[1]) / self.scale
        loss = value_loss(values, returns / self.scale, old_values / self.scale, mask, VALUE_CLIP)
        (loss * mask.sum() / num_tokens).backward()
        if self.accelerator.sync_gradients:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
            nn.utils.clip_grad_norm_(self.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.item()

    @torch.no_grad()
    def judge(
        self,
        states: tuple[Int[Tensor, "B L"], Int[Tensor, "B L"]],
        logps: Float[Tensor, "B T"],
        reference: Float[Tensor, "B T"],
        rewards: Float[Tensor, "B"],
        trained: Bool[Tensor, "B T"],
        beta: float,
        chunk: int,
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Values of a batch, what they should have been (`returns`), and advantages whitened over all processes; and
        what to log of them.

        Args:
            states: ids and mask of prompts and completions.
            reference: log-probabilities whose KL, weighed by `beta`, is taken from every token's reward.
            chunk: rows that are read at once.
        """
        tokens = logps.shape[1]
        parts = zip(*(part.split(chunk) for part in states), strict=True)
        values = torch.cat([self(*part, tokens) for part in parts])
        by_token = token_rewards(rewards, logps, reference, trained, beta)
        advantages, returns = generalized_advantages(by_token, values, trained)
        both = torch.stack([advantages, trained.float()], 2)
        on_all = self.accelerator.gather(self.accelerator.pad_across_processes(both, dim=1))
        whitened = whiten(on_all[..., 0], on_all[..., 1].bool())
        first = self.accelerator.process_index * len(logps)
        metrics = {}
        if trained.any():
            errors = (returns - values)[trained]
            metrics["value/mean"] = values[trained].mean().item()
            metrics["value/explained"] = 1 - (errors.var() / returns[trained].var().clamp(min=1e-8)).item()
        return {
            "advantages": whitened[first : first + len(logps), :tokens],
            "returns": returns,
            "old_values": values,
        }, metrics

    def save(self, folder: Path) -> None:
        """Weights and optimizer, for a run that is resumed."""
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"weights": self.state_dict(), "optimizer": self.optimizer.state_dict()}, folder / FILE)

    def load(self, folder: Path) -> None:
        """What `save` wrote.

        Raises:
            InputError: a checkpoint without a critic.
        """
        if not (folder / FILE).is_file():
            raise InputError(f"{folder} holds no {FILE}: it is no checkpoint of the objective 'rlvr'.")
        state = torch.load(folder / FILE, map_location=self.accelerator.device, weights_only=True)
        self.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
