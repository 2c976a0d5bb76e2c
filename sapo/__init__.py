"""Step-Aligned Policy Optimization: one credit per reasoning step, for recommenders that think, then name an item.

`import sapo` loads none of the libraries beneath it; a public name loads its module when first used.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the same names once more, for editors and type checkers
    from sapo.analysis.statistics import paired_bootstrap as paired_bootstrap
    from sapo.analysis.statistics import seed_interval as seed_interval
    from sapo.credit.advantages import step_advantages as step_advantages
    from sapo.credit.advantages import suffix_sum as suffix_sum
    from sapo.credit.advantages import to_tokens as to_tokens
    from sapo.credit.advantages import trajectory_advantages as trajectory_advantages
    from sapo.credit.gae import value_loss as value_loss
    from sapo.credit.loss import policy_loss as policy_loss
    from sapo.credit.objectives import OBJECTIVES as OBJECTIVES
    from sapo.credit.objectives import Objective as Objective
    from sapo.credit.rewards import exact_match as exact_match
    from sapo.credit.rewards import graded_match as graded_match
    from sapo.credit.rewards import step_match as step_match
    from sapo.data.catalog import Catalog as Catalog
    from sapo.data.interactions import Interactions as Interactions
    from sapo.data.reasoning import ReasoningConfig as ReasoningConfig
    from sapo.data.reasoning import ReasoningWorld as ReasoningWorld
    from sapo.data.synthetic import SyntheticCatalogue as SyntheticCatalogue
    from sapo.data.synthetic import SyntheticConfig as SyntheticConfig
    from sapo.decoding.beam_search import constrained_beam_search as constrained_beam_search
    from sapo.decoding.layout import ReasoningLayout as ReasoningLayout
    from sapo.decoding.sampling import grouped_rollouts as grouped_rollouts
    from sapo.errors import InputError as InputError
    from sapo.evaluation.evaluate import ranking_metrics as ranking_metrics
    from sapo.lab.exact import expected_update as expected_update
    from sapo.lab.exact import true_gradient as true_gradient
    from sapo.lab.world import SidWorld as SidWorld
    from sapo.policy.ask import ask as ask
    from sapo.policy.policy import Policy as Policy
    from sapo.policy.policy import recommend as recommend
    from sapo.semantic_ids.tokenizer import ItemTokenizer as ItemTokenizer
    from sapo.semantic_ids.trie import SidTrie as SidTrie
    from sapo.training.config import SAPOConfig as SAPOConfig
    from sapo.training.trainer import SAPOTrainer as SAPOTrainer

__version__ = version("sapo")

_HOME = {
    "Catalog": "sapo.data.catalog",
    "Interactions": "sapo.data.interactions",
    "ReasoningWorld": "sapo.data.reasoning",
    "ReasoningConfig": "sapo.data.reasoning",
    "SyntheticCatalogue": "sapo.data.synthetic",
    "SyntheticConfig": "sapo.data.synthetic",
    "ItemTokenizer": "sapo.semantic_ids.tokenizer",
    "SidTrie": "sapo.semantic_ids.trie",
    "exact_match": "sapo.credit.rewards",
    "step_match": "sapo.credit.rewards",
    "graded_match": "sapo.credit.rewards",
    "trajectory_advantages": "sapo.credit.advantages",
    "step_advantages": "sapo.credit.advantages",
    "suffix_sum": "sapo.credit.advantages",
    "to_tokens": "sapo.credit.advantages",
    "Objective": "sapo.credit.objectives",
    "OBJECTIVES": "sapo.credit.objectives",
    "policy_loss": "sapo.credit.loss",
    "value_loss": "sapo.credit.gae",
    "SidWorld": "sapo.lab.world",
    "expected_update": "sapo.lab.exact",
    "true_gradient": "sapo.lab.exact",
    "ReasoningLayout": "sapo.decoding.layout",
    "grouped_rollouts": "sapo.decoding.sampling",
    "constrained_beam_search": "sapo.decoding.beam_search",
    "Policy": "sapo.policy.policy",
    "recommend": "sapo.policy.policy",
    "ask": "sapo.policy.ask",
    "SAPOConfig": "sapo.training.config",
    "SAPOTrainer": "sapo.training.trainer",
    "ranking_metrics": "sapo.evaluation.evaluate",
    "paired_bootstrap": "sapo.analysis.statistics",
    "seed_interval": "sapo.analysis.statistics",
    "InputError": "sapo.errors",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    """Load a public name from its module (PEP 562) and keep it, so that the next use is a plain look-up."""
    if name not in _HOME:
        raise AttributeError(f"module 'sapo' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
