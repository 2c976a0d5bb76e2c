"""How much of the full softmax's probability mass lies on the tokens that the decoder allows."""

import pandas as pd
import torch

from sapo.decoding.layout import ReasoningLayout
from sapo.decoding.sampling import Rollouts
from sapo.decoding.shared_prefix import sharing_prompts
from sapo.policy.policy import Policy


@torch.no_grad()
def allowed_mass(
    policy: Policy,
    prompts: list[str],
    group_size: int,
    generator: torch.Generator,
    *,
    temperature: float = 1.0,
) -> pd.DataFrame:
    """Columns kind ("block" or "level 1" to "level K"), positions and mass: the mean, over the positions of sampled
    completions where there was a choice, of the full softmax's mass on the allowed set.

    A token's probability in the full softmax over that in the allowed set is the mass of the set, whichever token it
    is. What is left outside is what an engine that trains on the full softmax moves while it samples from the set (TRL
    issue 6789).

    Args:
        prompts: as `Policy.prompts` writes them; all are read at once.
        temperature: of sampling and of both softmaxes.
    """
    batch = policy.encode(prompts)
    rollouts = policy.sample(batch, group_size, generator, temperature)
    with sharing_prompts(policy.model):
        allowed, full = (policy.logps(batch, rollouts, temperature, over) for over in ("trie", "full"))
    return _by_kind((full - allowed).exp(), rollouts, policy.layout)


def _by_kind(mass: torch.Tensor, rollouts: Rollouts, layout: ReasoningLayout) -> pd.DataFrame:
    reading = layout.read(rollouts.completion_ids)
    kinds = {"block": reading.in_block}
    kinds |= {f"level {k + 1}": reading.is_sid & (reading.sid_index == k) for k in range(layout.num_steps)}
    rows = []
    for kind, places in kinds.items():
        of_kind = mass[places & rollouts.sampled].double()
        if len(of_kind):
            rows.append((kind, len(of_kind), float(of_kind.mean())))
    return pd.DataFrame(rows, columns=["kind", "positions", "mass"])
