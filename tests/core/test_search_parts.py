"""What searches are made of: budgets, proposals, the prior, diversity, ranks and duels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffsteer import DiffsteerError, RewardError
from diffsteer.budget import Budget, Cost, Purse, Stopwatch
from diffsteer.diversity import best_diverse, diversity, features_of
from diffsteer.judging import ByDuel, ByRank, Duel, RankEnsemble, UnorderedReward, elo, mean_rank, ranks
from diffsteer.prior import LIMIT, chi, diagnose, whiteness
from diffsteer.proposals import PROPOSALS, cross, mix, partial, proposal_of, rotation
from diffsteer.samplers.noise_gradient import pull
from diffsteer.trial import Outcome, Trial
from diffsteer.types import Context

CTX = Context(1, 1)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------ proposals


@pytest.mark.parametrize("step", [0.1, 0.31, 0.9, 0.999])
def test_rotation_keeps_radius_and_has_the_cosine(step: float) -> None:
    z, n = noise(4, 16, 16).double(), noise(4, 16, 16, seed=1).double()
    moved = rotation(z, n, step)
    assert float(moved.norm()) == pytest.approx(float(z.norm()), rel=1e-12)
    assert float((moved * z).sum() / z.norm() ** 2) == pytest.approx(math.sqrt(1 - step**2), abs=1e-9)


@pytest.mark.parametrize("name", PROPOSALS)
def test_proposals_keep_the_law(name: str) -> None:
    """Mean, variance, the variance of the radius and the correlation with the old noise, over many draws."""
    count, d, step = 20_000, 8, 0.6
    place = torch.Generator().manual_seed(3)
    old, fresh = noise(count, d), noise(count, d, seed=1)
    moved = torch.stack([proposal_of(name)(a, b, step, place) for a, b in zip(old, fresh, strict=True)])
    assert moved.mean().abs() < 4 / math.sqrt(count * d)
    assert moved.square().mean() == pytest.approx(1, abs=0.02)
    squares = moved.square().sum(1)
    assert squares.var() == pytest.approx(2 * d, rel=0.08)
    cosine = float((moved * old).mean())
    wanted = {"rotation": 0.8, "mix": 0.8, "redraw": 0.0, "partial": 1 - 3 / 8}[name]  # 0.36 of 8 elements are three
    assert cosine == pytest.approx(wanted, abs=0.02)
    again = torch.cov(moved.T)
    assert (again - torch.eye(d)).abs().max() < 0.06


def test_step_one_is_an_independent_draw() -> None:
    z, n = noise(3, 4, 4), noise(3, 4, 4, seed=1)
    for name in ("rotation", "mix", "redraw", "partial"):
        for seed in range(20):
            assert torch.equal(PROPOSALS[name](z, n, 1.0, torch.Generator().manual_seed(seed)), n)


def test_a_part_is_as_large_as_its_step_says() -> None:
    z, n = noise(1, 32, 32), noise(1, 32, 32, seed=1)
    for step in (0.3, 0.6, 0.9, 0.97):
        shares = [float((partial(z, n, step, torch.Generator().manual_seed(seed)) != z).float().mean()) for seed in range(200)]
        assert sum(shares) / len(shares) == pytest.approx(step**2, rel=0.02)
        assert min(shares) > 0.8 * step**2 and max(shares) < 1.2 * step**2


def test_a_part_is_a_box_and_the_rest_stays_bit_for_bit() -> None:
    z, n = noise(4, 16, 16), noise(4, 16, 16, seed=1)
    places = set()
    for seed in range(20):
        changed = partial(z, n, 0.5, torch.Generator().manual_seed(seed)) != z
        rows, columns = changed.any(0).any(1).nonzero()[:, 0], changed.any(0).any(0).nonzero()[:, 0]
        box = changed[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert bool(box.all()) and int(changed.sum()) == box.numel()
        assert 0.15 <= box.numel() / z.numel() <= 0.35
        places.add((int(rows[0]), int(columns[0])))
    assert len(places) > 5


def test_adding_noise_is_refused_with_the_reason_and_would_fail_the_radius() -> None:
    with pytest.raises(DiffsteerError, match="grows by sqrt"):
        proposal_of("additive")
    with pytest.raises(DiffsteerError, match="did you mean 'rotation'"):
        proposal_of("rotatoin")
    z = noise(4, 32, 32)
    assert not diagnose(z).off
    assert diagnose(z + 0.5 * noise(4, 32, 32, seed=1)).radius > LIMIT
    assert abs(diagnose(rotation(z, noise(4, 32, 32, seed=1), 0.5)).radius - diagnose(z).radius) < 1e-3


def test_large_half_precision_noise_does_not_overflow() -> None:
    z, n = noise(16, 128, 128).half(), noise(16, 128, 128, seed=1).half()
    assert bool(rotation(z, n, 0.3).isfinite().all()) and rotation(z, n, 0.3).dtype == torch.float16
    assert float(rotation(z, n, 0.3).double().norm() / z.double().norm()) == pytest.approx(1, abs=1e-3)


def test_children_of_two_are_standard_normal() -> None:
    a, b = noise(100_000), noise(100_000, seed=1)
    assert float(cross(a, b, 0.3).var()) == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(cross(a, a, 0.5), a)
    for step in (0.2, 0.6):  # of relatives
        assert float(cross(a, mix(a, b, step), 0.5).var()) == pytest.approx(1, abs=0.02)
    assert torch.equal(mix(a, b, 0.0), a)


# ------------------------------------------------------------------------------------------------------ the prior


def test_white_noise_is_off_the_prior_as_seldom_as_a_normal_number() -> None:
    """Beyond four standard deviations about once in 16,000; the tails of a chi-squared number, unlike its score, are seen in
    every four hundredth."""
    found = [diagnose(noise(4, 16, 16, seed=s)) for s in range(1500)]
    assert sum(d.off for d in found) <= 1
    scores = torch.tensor([d.covariance for d in found])
    assert float(scores.mean()) == pytest.approx(0, abs=0.1) and float(scores.std()) == pytest.approx(1, abs=0.07)


def test_white_noise_passes_and_what_is_not_white_does_not() -> None:
    passed = [not diagnose(noise(4, 16, 16, seed=s)).off for s in range(200)]
    assert sum(passed) >= 196  # each statistic is beyond 4 deviations about once in ten thousand; the last is skewed
    z = noise(4, 16, 16)
    smooth = (z + z.roll(1, -1)) / math.sqrt(2)
    assert abs(diagnose(smooth).radius) < LIMIT < diagnose(smooth).autocorrelation
    # twice as much noise in one of four: neither radius nor neighbours of images tell, second moments do
    uneven = noise(1024, seed=2) * torch.tensor([1.6, 0.6, 0.6, 0.6]).repeat(256) / math.sqrt((1.6**2 + 3 * 0.36) / 4)
    assert abs(diagnose(uneven).radius) < LIMIT < diagnose(uneven).covariance


def test_chi_is_least_on_the_shell_and_counts_rows_alone() -> None:
    d = 64
    z = noise(2, d)
    z = z / z.norm(dim=1, keepdim=True) * math.sqrt(d - 1)
    z.requires_grad_(True)
    (gradient,) = torch.autograd.grad(chi(z).sum(), z)
    torch.testing.assert_close(gradient, torch.stack([pull(row) for row in z.detach()]), atol=1e-5, rtol=0)
    assert gradient.abs().max() < 1e-4
    assert (chi(1.1 * z) > chi(z)).all() and (chi(0.9 * z) > chi(z)).all()
    alone = torch.cat([chi(z[:1]), chi(5 * z[1:])])
    torch.testing.assert_close(chi(torch.cat([z[:1], 5 * z[1:]])), alone)
    assert chi(1e3 * torch.ones(1, 65536, dtype=torch.float16)).isfinite().all()


def test_whiteness_is_silent_about_white_noise_and_pulls_other_noise_back() -> None:
    white, pulls = [], []
    for z in (noise(1, 4096), noise(1, 4096) + 0.2):
        z.requires_grad_(True)
        value = whiteness(z, torch.Generator().manual_seed(0))
        white.append(float(value.detach()))
        pulls.append(torch.autograd.grad(value.sum(), z)[0])
    assert 2 * math.log(2) <= white[0] < 1.5 and white[1] > 15
    assert pulls[0].norm() < 0.05 * pulls[1].norm() and float(pulls[1].mean()) > 0
    quiet = torch.tensor([1.0, -1.0]).repeat(2048)[torch.randperm(4096, generator=torch.Generator().manual_seed(1))]
    z = quiet[None].requires_grad_(True)  # mean 0 in any large block: typical in nearly every order
    assert float(whiteness(z, torch.Generator().manual_seed(0)).detach()) < 1.6


# ------------------------------------------------------------------------------------------------------ diversity


def test_diversity_of_equal_and_of_orthogonal_samples() -> None:
    same = torch.tensor([[1.0, 0, 0]] * 4)
    assert diversity(same).distance == pytest.approx(0) and diversity(same).vendi == pytest.approx(1)
    apart = diversity(torch.eye(4))
    assert apart.distance == pytest.approx(1) and apart.vendi == pytest.approx(4)


def test_the_best_are_chosen_and_copies_are_not() -> None:
    features = torch.tensor([[1.0, 0], [1.0, 0], [0, 1.0], [0.6, 0.8]])
    values = torch.tensor([1.0, 0.99, 0.5, 0.4])
    assert best_diverse(values, features, 2, 0.0) == [0, 1]
    assert best_diverse(values, features, 2, 0.5) == [0, 2]
    assert best_diverse(torch.tensor([math.nan, 0.2, -math.inf, 0.1]), features, 3, 0.0)[:2] == [1, 3]
    lost = torch.tensor([1.0, 0.95, -3.0, -math.inf])
    assert best_diverse(lost, features, 2, 0.3) == best_diverse(lost[:3], features[:3], 2, 0.3)
    assert best_diverse(values, features, 9, 0.3)[0] == 0 and len(best_diverse(values, features, 9, 0.3)) == 4


def test_features_see_colours_and_places() -> None:
    image = torch.rand(1, 3, 32, 32)
    one = features_of(image)
    assert float((one * one).sum()) == pytest.approx(1) and float((one * features_of(image.flip(-1))).sum()) < 0.95
    red, black = (torch.tensor(c).view(1, 3, 1, 1).expand(1, 3, 8, 8) for c in ([1.0, 0, 0], [0.0, 0, 0]))
    assert diversity(features_of(torch.cat([red, red]))).distance == pytest.approx(0, abs=1e-5)
    assert diversity(features_of(torch.cat([red, black]))).distance > 0.5
    assert features_of(torch.rand(2, 4, 3, 16, 16)).shape == (2, 3 * 64 + 1)
    gray = diversity(features_of(torch.full((2, 3, 8, 8), 0.5)))
    assert gray.distance == pytest.approx(0, abs=1e-5) and gray.vendi == pytest.approx(1)


# ------------------------------------------------------------------------------------------------------ budgets


def test_a_purse_counts_what_is_left_and_keeps_its_reserve() -> None:
    purse = Purse(Budget(evals=100, decodes=3), Stopwatch(None))
    assert purse.affords(Cost(10, 1, 5)) == 3 and purse.affords(Cost(40)) == 2
    purse.reserve = Cost(50, 2)
    assert purse.affords(Cost(10, 1, 1)) == 1 and purse.affords(Cost(30)) == 1 and purse.affords(Cost(51)) == 0
    purse.pay(Cost(40, 1, 1))
    assert purse.affords(Cost(10)) == 1 and purse.affords(Cost(10), Cost(1)) == 0 and purse.affords(Cost(1, 1)) == 0
    purse.until = 0.4
    assert purse.affords(Cost(1)) == 0 and purse.share() == pytest.approx(0.4)


def test_seconds_are_predicted_from_what_was_measured_but_not_from_warming_up() -> None:
    now = [0.0]
    watch = Stopwatch(20.0, lambda: now[0])
    purse = Purse(Budget(seconds=20.0), watch)
    assert purse.affords(Cost(5)) == 1  # nothing is measured yet
    purse.pay(Cost(5))
    assert purse.affords(Cost(5)) == 0  # until that one is
    now[0] = 8.0
    watch.note(5, 8.0)  # with all that was loaded
    assert purse.affords(Cost(5)) == 1
    purse.pay(Cost(5))
    now[0] = 9.0
    watch.note(5, 1.0)
    assert purse.affords(Cost(5)) == 11 and purse.affords(Cost(5), Cost(10)) == 9
    watch.reserved = 4.0
    assert purse.affords(Cost(5)) == 7
    purse.pay(Cost(5), 3)
    assert purse.affords(Cost(5)) == 4 and purse.affords(Cost(5), late=True) > 99
    now[0] = 21.0
    assert purse.affords(Cost(1)) == 0 and purse.share() == 1


@pytest.mark.parametrize("wrong", [{"evals": 0}, {"seconds": -1.0}, {"evals": 1.5}, {"decodes": True}, {"reward_calls": -3}])
def test_wrong_budgets(wrong: dict[str, Any]) -> None:
    with pytest.raises(DiffsteerError, match=f"budget: {next(iter(wrong))}"):
        Budget(**wrong)


# ------------------------------------------------------------------------------------------------------ ranks


def test_ranks_with_ties_and_no_numbers() -> None:
    scores = torch.tensor([[3.0], [1.0], [3.0], [math.nan], [-math.inf]])
    assert ranks(scores)[:, 0].tolist() == [0.875, 0.5, 0.875, 0.0, 0.25]
    assert ranks(torch.full((3, 1), math.nan))[:, 0].tolist() == [0.5] * 3
    assert ranks(torch.ones(1, 2)).tolist() == [[0.5, 0.5]]


@given(st.lists(st.lists(st.integers(-5, 5), min_size=2, max_size=2), min_size=2, max_size=12))
def test_ranks_do_not_know_scales(rows: list[list[int]]) -> None:
    scores = torch.tensor(rows, dtype=torch.float64)
    changed = torch.stack([scores[:, 0].exp(), scores[:, 1] ** 3 * 1e6 - 7], 1)
    assert torch.equal(mean_rank(scores, [1.0, 2.0]), mean_rank(changed, [1.0, 2.0]))
    assert float(ranks(scores).mean()) == pytest.approx(0.5)


def test_an_incumbent_is_ranked_with_the_newcomers() -> None:
    """Ranks of two pools do not compare: a best of the first may be the worst of both together."""
    rewards = [lambda x, p: x[:, 0], lambda x, p: x[:, 1]]
    ensemble = RankEnsemble(rewards)
    weak, strong = torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([[9.0, 8.0], [8.0, 9.0]])
    assert ensemble.score(weak, ["a", "a"], CTX).tolist() == [1.0, 0.0]
    assert ensemble.score(strong, ["a", "a"], CTX).tolist() == [0.5, 0.5]
    both = [outcome(i, s) for i, s in enumerate([*weak, *strong])]
    assert ByRank([1.0, 1.0]).order(both) == [2, 3, 0, 1]
    mixed = ensemble.score(torch.cat([weak, strong]), ["a", "a", "b", "b"], CTX)
    assert mixed.tolist() == [1.0, 0.0, 0.5, 0.5]


@pytest.mark.parametrize("rewards, weights", [([len], None), ([len, len], [1.0]), ([len, len], [1.0, -1.0])])
def test_wrong_ensembles(rewards: list[Any], weights: Any) -> None:
    with pytest.raises(DiffsteerError, match="rank_ensemble"):
        RankEnsemble(rewards, weights)


def outcome(slot: int, scores: Tensor) -> Outcome:
    x = torch.zeros(1)
    return Outcome(Trial(x), slot, 1, x, x, x, True, float("nan"), scores, sample=x)


# ------------------------------------------------------------------------------------------------------ duels


class Partial(Duel):
    """Knows who is better, and always likes the first one a little more."""

    def __init__(self, bias: float) -> None:
        self.bias, self.seen = bias, 0

    def compare(self, a: Tensor, b: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
        self.seen += len(a)
        return ((a[:, 0] - b[:, 0]).sign() * 0.3 + 0.5 + self.bias).clamp(0, 1)


def test_a_judge_who_likes_the_first_one_likes_nobody() -> None:
    samples = torch.tensor([[0.0], [2.0], [1.0], [3.0]])
    fair, biased = Partial(0.0).score(samples, ["p"] * 4, CTX), Partial(0.2).score(samples, ["p"] * 4, CTX)
    torch.testing.assert_close(fair, biased, rtol=1e-4, atol=1e-3)
    assert fair.argsort().tolist() == [0, 2, 1, 3] and float(fair.sum()) == pytest.approx(0, abs=1e-3)


def test_ratings_are_of_results_and_not_of_their_order() -> None:
    pairs, won = [(0, 1), (1, 2), (0, 2)], torch.tensor([1.0, 1.0, 0.5])
    ratings = elo(3, pairs, won)
    torch.testing.assert_close(ratings, elo(3, pairs[::-1], won.flip(0)))
    torch.testing.assert_close(ratings, elo(3, [(j, i) for i, j in pairs], 1 - won))
    assert ratings[0] > ratings[1] > ratings[2]
    # one game drawn at 400 points' odds stays as it is
    assert float(elo(2, [(0, 1)], torch.tensor([10 / 11]), rounds=4000)[0]) == pytest.approx(200, abs=1)


def test_nobody_meets_twice() -> None:
    met: list[tuple[int, int]] = []

    def play(outcomes: Sequence[Outcome], pairs: Sequence[tuple[int, int]]) -> Tensor:
        met.extend((outcomes[i].slot, outcomes[j].slot) for i, j in pairs)
        return torch.tensor([float(outcomes[i].slot > outcomes[j].slot) for i, j in pairs])

    judge = ByDuel(play)
    first = [outcome(i, torch.empty(0)) for i in range(3)]
    assert judge.order(first) == [2, 1, 0] and len(met) == 3
    assert judge.order([*first, outcome(3, torch.empty(0))])[0] == 3 and len(met) == 6
    assert judge.order(first[::-1]) == [0, 1, 2] and len(met) == 6


def test_who_met_nobody_is_no_better_than_the_last() -> None:
    """The purse pays for three pairs: those of the first one."""
    purse = Purse(Budget(reward_calls=6), Stopwatch(None))
    judge = ByDuel(lambda them, pairs: torch.tensor([1.0] * len(pairs)), purse)
    assert judge.order([outcome(i, torch.empty(0)) for i in range(6)])[0] == 0 and purse.spent.reward_calls == 6
    values = judge.values([outcome(i, torch.empty(0)) for i in range(6)])
    assert float(values[5]) == float(values[:4].min()) < float(values[0])


def test_ctrl_c_in_a_tournament_leaves_what_is_known() -> None:
    def play(outcomes: Sequence[Outcome], pairs: Sequence[tuple[int, int]]) -> Tensor:
        if len(outcomes) > 2:
            raise KeyboardInterrupt
        return torch.tensor([0.0] * len(pairs))

    purse = Purse(Budget(reward_calls=100), Stopwatch(None))
    judge = ByDuel(play, purse)
    assert judge.order([outcome(i, torch.empty(0)) for i in range(2)]) == [1, 0] and not judge.interrupted
    assert judge.order([outcome(i, torch.empty(0)) for i in range(4)])[0] == 1 and judge.interrupted
    assert purse.spent.reward_calls == 2


def test_results_that_are_none() -> None:
    class Wild(Duel):
        def compare(self, a: Tensor, b: Tensor, prompts: Sequence[str], ctx: Context) -> Tensor:
            return 2 * torch.ones(len(a))

    with pytest.raises(RewardError, match="no 1 numbers in"):
        Wild().score(torch.zeros(2, 1), ["p", "p"], CTX)


class Late(UnorderedReward):
    name = "late"

    def __init__(self, *rows: int) -> None:
        self.rows = rows

    def answers(self, samples: Tensor, prompts: Sequence[str], ctx: Context) -> Iterator[tuple[int, float]]:
        for row in self.rows or reversed(range(len(samples))):
            yield row, float(samples[row].sum()) if row < len(samples) else 0.0


def test_answers_out_of_order_keep_their_images() -> None:
    samples = torch.arange(4.0).view(4, 1)
    assert Late().score(samples, ["p"] * 4, CTX).tolist() == [0, 1, 2, 3]
    assert Late(*torch.tensor([3, 1, 0, 2]).numpy()).score(samples, ["p"] * 4, CTX).tolist() == [0, 1, 2, 3]  # numpy's numbers
    for rows, said in (((0, 1, 2), "no answer for row 3"), ((0, 0), "twice"), ((7,), "is none")):
        with pytest.raises(RewardError, match=said):
            Late(*rows).score(samples, ["p"] * 4, CTX)
