"""Tables of what the code holds: every objective, recommender and reasoning system, with its source and its test.

Words that the code lacks stand here, a line a name; a name without its line is an error, so that no table falls behind.
"""

import re
from importlib import import_module
from typing import Any

import pandas as pd
from pages import markdown_table

from sapo.credit.objectives import OBJECTIVES, Objective
from sapo.errors import InputError
from sapo.experiments.suite import BASELINES, FUSIONS, MODELS
from sapo.experiments.systems import SYSTEMS, System

REWARDS = {
    "exact": "exact match",
    "verified": "10 for an exact match",
    "sign": "exact match, 1 or -1",
    "ranking": "exact match; misses of a group with a hit punished by beam rank",
    "graded": "leading matches 1/4, 1/2, 1",
    "match": "match of each step",
    "gated": "match under a right prefix",
    "first_error": "1, or 1/2 before the first error of a wrong SID",
    "best_of_beam": "most matches in a beam after each thought",
}
EXTRAS = {
    "valid_bonus": ", + .1 for a valid SID",
    "dynamic_sampling": ", groups without spread sampled anew",
    "suffix_rewards": ", summed from step k on",
    "across_steps": ", normalised over all steps",
    "suffix_advantages": ", then summed from step k on",
    "per_level": ", normalised a level, then summed",
    "beam_rollouts": ", completions are beams of one thought",
    "thinking_only": ", no SID token trained",
    "kl_in_reward": ", less the KL",
    "outcome_first": "; of groups with spread in exact match, exact match",
}
TESTS = {
    "grpo": "test_parity_with_the_trainer_of_trl",
    "grpo_graded": "test_rewards_by_hand",
    "dr_grpo": "test_dr_grpo_is_centred_and_unscaled",
    "dapo": "test_dynamic_sampling_fills_the_batch_with_groups_that_have_spread",
    "gspo": "test_ratio_units",
    "rloo": "test_rloo_by_hand",
    "reinforce_plus_plus": "test_reinforce_plus_plus_normalises_over_the_batch",
    "rlvr": "test_generalized_advantages_by_hand",
    "gdpo": "test_gdpo_by_hand",
    "rank_reward": "test_beam_groups_are_one_thought_and_punished_by_rank",
    "best_of_beam": "test_best_of_beam_pays_thoughts_for_what_a_beam_after_them_finds",
    "sign": "test_rewards_by_hand",
    "process_grpo": "test_process_grpo_by_hand",
    "vppo": "test_vppo_by_hand",
    "rank_grpo": "test_objectives_that_coincide_at_ratio_one",
    "sapo": "test_with_one_step_sapo_is_grpo",
    "sapo_gated": "test_gates_pay_only_under_a_right_prefix",
    "sapo_suffix": "test_suffix_credit_by_hand",
    "sapo_fallback": "test_outcome_first_by_hand",
    "sapo_no_std": "test_scales_of_sapo_by_hand",
    "sapo_batch_std": "test_scales_of_sapo_by_hand",
    "grpo_step_reward": "test_rewards_by_hand",
    "sapo_outcome_reward": "test_outcome_reward_with_step_credit_is_the_trajectory_advantage_at_every_step",
    "sapo_sequence_mean": "test_step_mean_gives_equal_credit_equal_mass_whatever_the_lengths",
}
# What is particular, how it differs from the published one, and its test.
RECOMMENDERS = {
    "SASRec": ("self-attention; one sampled negative", "width 64, two heads", "test_sasrec_by_loops"),
    "SASRec softmax": ("self-attention; softmax over all items", "width 128, two heads", "test_sasrec_by_loops"),
    "GRU4Rec": (
        "a recurrent state",
        "RecBole's form: softmax over all items, no session batches",
        "test_gru4rec_by_loops",
    ),
    "Caser": (
        "convolutions over the last items, across and along",
        "softmax over all items, one next item a window; validation chooses whether users have vectors",
        "test_caser_by_loops",
    ),
    "HSTU": (
        "gated attention without a softmax",
        "no bias of elapsed time; softmax over all items",
        "test_hstu_by_loops",
    ),
    "ReaRec ERL": (
        "latent steps between reading and recommending, whose states are averaged",
        "width 128, feed-forward 256; temperature 1 or 0.5; other weights fixed; noise from the first epoch",
        "test_a_step_follows_a_pointer_that_the_encoder_cannot",
    ),
    "ReaRec PRL": (
        "latent steps, of which the last recommends",
        "as ReaRec ERL",
        "test_a_step_follows_a_pointer_that_the_encoder_cannot",
    ),
    "TIGER": (
        "an encoder-decoder that writes SIDs",
        "2 + 2 layers, 4 heads of 32, feed-forward 512; SIDs of the data folder; no user token; codes compete with "
        "those that lead to an item; 20 beams",
        "test_beams_rank_as_all_items_scored_one_by_one",
    ),
    "LETTER-TIGER": (
        "the same at temperature 0.7, on SIDs that know who takes what together",
        "as TIGER; three levels, and a fourth that counts where items still share a SID; TF-IDF texts, SVD of "
        "sequences",
        "test_models_of_codes_may_have_sids_of_their_own",
    ),
}
FUSION = "weighted reciprocal ranks", "weights chosen on validation", "test_fused_ranks_by_hand"
SOURCES = {"LETTER-TIGER": "2405.07314"}  # where it is not that of the model's module
STARTS = {
    "stage2": "K blocks before the SID",
    "stage2_no_thinking": "next items, no thinking",
    "stage2_one_block": "one block before the SID",
    "stage2_alignment": "next items, titles of SIDs, SIDs of titles, across histories",
    "stage2_aligned": "LC-Rec's tasks, then K blocks",
}
THEN = {  # of systems without an objective of the table
    "LC-Rec": "–",
    "LICD": "SIDs scored with and without history and thought",
    "R2ec": "items matched by a second head, RecPO",
    "Rec-R1": "a retriever's NDCG pays for the thought as a query",
    "RecCoT": "two towers that read the thought",
    "RecCoT blind": "the towers alone",
}


def reward(objective: Objective) -> str:
    """The reward of an objective and what is done with it, in words."""
    words = REWARDS[objective.reward]
    if objective.reward == "match" and objective.credit == "trajectory" and "per_level" not in objective.extras:
        words = "matches, summed"
    if objective.reward == "exact" and objective.credit == "step":
        words = "exact match at every step"
    return words + "".join(EXTRAS[extra] for extra in EXTRAS if extra in objective.extras)


def objectives() -> str:
    """A row an objective."""
    lines = []
    for name, objective in OBJECTIVES.items():
        kl = f"{objective.beta:g}" if objective.beta else "–"
        lines.append(
            {
                "`objective=`": f"`{name}`",
                "reward": reward(objective),
                "credit": objective.credit + ", learned value" * (objective.baseline == "value"),
                "scale": "none" if objective.scale == "none" else f"{objective.scale} std",
                "ratio, clip": f"{objective.ratio}, {objective.epsilon:g}/{objective.epsilon_high:g}",
                "average": objective.average,
                "KL": kl,
                "source": objective.source,
                "test": f"`{TESTS[name]}`" if name in TESTS else "",
            }
        )
    return markdown_table(pd.DataFrame(lines))


def recommenders() -> str:
    """A row a recommender that is fitted, or that is made of fitted ones.

    Raises:
        InputError: a recommender without its line above.
    """
    lines = [
        _recommender(name, _of(RECOMMENDERS, name), SOURCES.get(name) or _source(baseline.model))
        for name, baseline in BASELINES.items()
    ]
    for name, parts in FUSIONS.items():
        how, differs, test = FUSION
        lines.append(_recommender(name, (f"{how} of {', '.join(parts)}", differs, test), "SIGIR 2009"))
    return markdown_table(pd.DataFrame(lines))


def systems() -> str:
    """A row a system that reasons.

    Raises:
        InputError: a system without its line above.
    """
    lines = [
        {
            "`sapo run --systems`": f"`{name}`",
            "starts from": _of(STARTS, system.start),
            "then": _then(name, system),
            "source": system.source,
            "how it differs from the published one": system.scope,
        }
        for name, system in SYSTEMS.items()
    ]
    return markdown_table(pd.DataFrame(lines))


def _recommender(name: str, words: tuple[str, str, str], source: str) -> dict[str, str]:
    how, differs, test = words
    return {
        "`sapo baselines`": f"`{name}`",
        "what is particular": how,
        "how it differs from the published one": differs,
        "source": source,
        "test": f"`{test}`",
    }


def _source(model: str) -> str:
    """The paper that the docstring of a model's module names."""
    first = (import_module(MODELS[model].__module__).__doc__ or "").splitlines()[0]
    found = re.search(r"\((?:arXiv )?([^)]+)\)", first)
    if found is None:
        raise InputError(f"the first line of {MODELS[model].__module__} names no source in brackets.")
    return found[1]


def _then(name: str, system: System) -> str:
    return f"`{system.objective}`" if system.objective else _of(THEN, name)


def _of(words: dict[str, Any], name: str) -> Any:
    if name not in words:
        raise InputError(f"paper_figures/reference.py has no line for {name}.")
    return words[name]
