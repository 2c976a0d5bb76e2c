"""What the best possible recommender scores where the next-item distribution is known."""

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray


def bayes_optimum(
    probabilities: Float[ndarray, "R N"],
    codes: Int[ndarray, "N K"],
    ks: tuple[int, ...],
    weights: Float[ndarray, "R"] | None = None,
    believed: Float[ndarray, "R N"] | None = None,
) -> dict[str, float]:
    """Score the ranking by probability, in expectation over the targets of R histories.

    Args:
        probabilities: P(next item | history) of each history; rows sum to 1.
        codes: semantic ID of every item.
        weights: share of each history; all alike where None.
        believed: what the recommender ranks by, who may know less; `probabilities` where None.

    Returns:
        recall@k and ndcg@k of the ranking; `exact_match_greedy` of naming the likeliest item, `exact_match_sampled` of
        naming one by its probability; `match_level_k` of the likeliest item's code k.
    """
    share = np.full(len(probabilities), 1 / len(probabilities)) if weights is None else weights
    believed = probabilities if believed is None else believed
    order = np.argsort(-believed, axis=1, kind="stable")
    gained = np.take_along_axis(probabilities, order, 1)
    discounts = 1 / np.log2(np.arange(2, gained.shape[1] + 2))
    values: dict[str, float] = {}
    for k in ks:
        values[f"recall@{k}"] = float(share @ gained[:, :k].sum(1))
        values[f"ndcg@{k}"] = float(share @ (gained * discounts)[:, :k].sum(1))
    values["exact_match_greedy"] = float(share @ gained[:, 0])
    values["exact_match_sampled"] = float(share @ (probabilities * believed).sum(1))
    best = codes[order[:, 0]]
    for level, (mine, code) in enumerate(zip(codes.T, best.T, strict=True), start=1):
        agree = mine[None] == code[:, None]
        values[f"match_level_{level}"] = float(share @ (probabilities * agree).sum(1))
    return values
