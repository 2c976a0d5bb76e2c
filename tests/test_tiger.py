"""TIGER: what it reads, what it learns from, and that its beams rank items."""

import itertools

import pytest
import torch

from sapo.baselines.fitting import FitConfig, fit
from sapo.baselines.tiger import Tiger
from sapo.data.interactions import Interactions
from sapo.errors import InputError

SMALL = {"size": 16, "layers": 2, "heads": 2, "head_size": 8, "feed_forward": 32, "dropout": 0.0}
SIDS = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 0], [1, 2]])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Tiger(SIDS, max_history=3, user_tokens=7, **SMALL).eval()


def test_every_code_of_every_level_is_a_word_of_its_own(model):
    """Two items share (1, 0), so a third level of two codes counts them: words 1-2, 3-5 and 6-7, then seven users."""
    assert model.tokens.tolist() == [[1, 3, 6], [1, 4, 6], [2, 3, 6], [2, 3, 7], [2, 5, 6]]
    assert model.network.config.vocab_size == 1 + 2 + 3 + 2 + 7
    assert Tiger(SIDS[[0, 1, 2, 4]], user_tokens=0, **SMALL).tokens.shape == (4, 2)  # no two alike: no level more


def test_prompts_are_the_user_and_the_last_items(model):
    prompts = model.prompts([[4, 0, 1, 2], [3]], ["ann", "bob"])
    ann, bob = prompts.tolist()
    assert ann[1:] == [1, 3, 6, 1, 4, 6, 2, 3, 6]
    assert bob[1:] == [2, 3, 7, 0, 0, 0, 0, 0, 0]
    assert all(8 <= line[0] < 15 for line in (ann, bob))
    assert model.prompts([[3]], ["bob"])[0, 0] == bob[0]
    assert Tiger(SIDS, user_tokens=0, **SMALL).prompts([[3]], ["bob"]).tolist() == [[2, 3, 7]]


def test_beams_rank_as_all_items_scored_one_by_one(model):
    """The probability of an item is the product of those of its codes over all words."""
    histories, users = [[4, 0, 1], [3]], ["ann", "bob"]
    ranked = model.rank(histories, 5, users)
    for history, user, row in zip(histories, users, ranked.tolist(), strict=True):
        scores = []
        for item in range(5):
            prompt = model.prompts([history], [user])
            written = [0]
            total = 0.0
            for token in model.tokens[item].tolist():
                logits = model.network(
                    input_ids=prompt, attention_mask=(prompt > 0).long(), decoder_input_ids=torch.tensor([written])
                ).logits[0, -1]
                total += logits.log_softmax(-1)[token].item()
                written.append(token)
            scores.append(total)
        assert row == sorted(range(5), key=lambda item: -scores[item])


@pytest.mark.parametrize(("beams", "k", "found"), [(1, 1, [0]), (2, 1, [2]), (1, 2, [2, 0]), (2, 3, [2, 0, 1])])
def test_a_search_has_beams_beside_those_of_the_items_it_gives(beams, k, found, monkeypatch):
    """First codes of 0.5, 0.3 and 0.2; then (0, 0) of 0.5 * 0.52 = 0.26, (0, 1) of 0.5 * 0.48 = 0.24, (1, 0) of
    0.3 * 0.9 = 0.27, (1, 1) of 0.3 * 0.1 = 0.03 and (2, 0) of 0.2. A single beam follows code 0 and misses the best."""
    tiger = Tiger(torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1], [2, 0]]), user_tokens=0, beams=beams, **SMALL).eval()
    second = torch.tensor([[0.52, 0.48], [0.9, 0.1], [1.0, 0.0]])

    def logits(read, prompts, written, keys):
        """Words 1-3 are first codes, 4-5 second ones."""
        chances = torch.zeros(len(written), 1, 6)
        if written.shape[1]:
            chances[:, 0, 4:] = second[written[:, 0] - 1]
        else:
            chances[:, 0, 1:4] = torch.tensor([0.5, 0.3, 0.2])
        return chances.log()

    monkeypatch.setattr(tiger, "_logits", logits)
    assert tiger.rank([[4], [0, 1]], k).tolist() == [found] * 2


def test_the_loss_is_that_of_all_codes_of_the_targets(model):
    """Three rows of one user of four items: each later item after those before it."""
    split = Interactions(["ann"], [[4, 0, 1, 2, 3, 0]], 5).leave_one_out()  # the last two are kept for later
    assert model.lengths(split) == [1, 2, 3]
    loss = model.loss(split, [0, 2], FitConfig())
    expected = []
    for history, target in (([4], 0), ([4, 0, 1], 2)):
        prompt = model.prompts([history], ["ann"])
        labels = model.tokens[target][None]
        expected.append(model.network(input_ids=prompt, attention_mask=(prompt > 0).long(), labels=labels).loss.item())
    assert loss.item() == pytest.approx(sum(expected) / 2, abs=1e-5)


def test_a_temperature_divides_the_logits_of_the_loss_alone(model):
    split = Interactions(["ann"], [[4, 0, 1, 2, 3, 0]], 5).leave_one_out()
    plain, ranked = model.loss(split, [2], FitConfig()).item(), model.rank([[4, 0, 1]], 5, ["ann"])
    model.temperature = 0.7
    prompt, target = model.prompts([[4, 0, 1]], ["ann"]), model.tokens[2]
    written = torch.cat([torch.zeros(1, dtype=torch.long), target[:-1]])[None]
    logits = model.network(input_ids=prompt, attention_mask=(prompt > 0).long(), decoder_input_ids=written).logits[0]
    logps = (logits / 0.7).log_softmax(-1)[torch.arange(3), target]
    assert model.loss(split, [2], FitConfig()).item() == pytest.approx(-logps.mean().item(), abs=1e-5)
    assert abs(model.loss(split, [2], FitConfig()).item() - plain) > 1e-4
    assert model.rank([[4, 0, 1]], 5, ["ann"]).tolist() == ranked.tolist()


def test_codes_may_compete_with_those_that_lead_to_an_item(model):
    """Of item 1, (0, 1, 0): first codes 0 and 1; after 0 the second 0 and 1, not 2; then nothing is left to choose."""
    model.rivals = "trie"
    split = Interactions(["ann"], [[4, 1, 2, 3, 0]], 5).leave_one_out()
    prompt = model.prompts([[4]], ["ann"])
    written = torch.tensor([[0, 1, 4]])  # the beginning, code 0 of level 1, code 1 of level 2
    logits = model.network(input_ids=prompt, attention_mask=(prompt > 0).long(), decoder_input_ids=written).logits[0]
    losses = [logits[0, [1, 2]].log_softmax(0)[0], logits[1, [3, 4]].log_softmax(0)[1], torch.tensor(0.0)]
    assert model.loss(split, [0], FitConfig()).item() == pytest.approx(-sum(losses).item() / 3, abs=1e-5)
    scores = []
    for sid in model.codes.tolist():
        total, begun = 0.0, [0]
        for level, code in enumerate(sid):
            logits = model.network(
                input_ids=prompt, attention_mask=(prompt > 0).long(), decoder_input_ids=torch.tensor([begun])
            ).logits[0, -1]
            words = model.level_tokens[level]
            rivals = sorted(
                {words[other[level]].item() for other in model.codes.tolist() if other[:level] == sid[:level]}
            )
            total += logits[rivals].log_softmax(0)[rivals.index(words[code].item())].item()
            begun.append(words[code].item())
        scores.append(total)
    assert model.rank([[4]], 5, ["ann"])[0].tolist() == sorted(range(5), key=lambda item: -scores[item])


def test_it_learns_what_follows_two_items():
    """The next item is the sum of the last two modulo 5: neither of them alone says anything of it."""
    sequences = []
    for first, second in itertools.product(range(5), repeat=2):
        sequence = [first, second]
        while len(sequence) < 9:
            sequence.append((sequence[-1] + sequence[-2]) % 5)
        sequences += [sequence] * 4
    split = Interactions([f"u{n}" for n in range(len(sequences))], sequences, 5).leave_one_out()
    torch.manual_seed(0)
    sids = torch.tensor([[0, 0], [0, 1], [0, 2], [1, 0], [1, 1]])
    tiger = Tiger(sids, max_history=2, user_tokens=0, **SMALL | {"size": 32, "head_size": 16})
    log = fit(tiger, split, FitConfig(epochs=60, patience=60, batch_size=64, learning_rate=3e-3), seed=0)
    assert log[-1]["loss"] < log[0]["loss"]
    ranked = tiger.rank(split.test.history, 1, split.test.user)[:, 0]
    assert (ranked == torch.tensor(split.test.target)).float().mean() > 0.95


def test_bad_questions_say_so(model):
    with pytest.raises(InputError, match="k is 6; there are 5 items"):
        model.rank([[1]], 6)
    with pytest.raises(InputError, match="a history is empty"):
        model.rank([[1], []], 3)
