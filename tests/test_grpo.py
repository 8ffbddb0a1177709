"""The mathematics, by hand and by counting."""

from __future__ import annotations

import math

import pytest
import torch

from vapi import grpo


def test_keys_differ_in_every_part() -> None:
    items = torch.arange(1000)
    seen = torch.cat([grpo.keys(items, seed, step) for seed in (0, 1, -1) for step in range(5)])
    assert len(seen.unique()) == len(seen)
    assert torch.equal(grpo.keys(items[5:7], 0, 3), grpo.keys(items, 0, 3)[5:7])


def test_splitmix_reference() -> None:
    """The published first outputs of splitmix64 from state 1234567."""
    state, expected = 1234567, [6457827717110365317, 3203168211198807973, 9817491932198370423]
    bits = grpo._mix(torch.tensor([state]) + torch.arange(1, 4) * grpo._GOLDEN)
    assert [int(b) % 2**64 for b in bits] == expected


def test_uniforms_are_uniform_and_independent() -> None:
    u = grpo.uniforms(grpo.keys(torch.arange(400), 7), 500)
    assert u.dtype == torch.float64 and u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.003
    counts = torch.histc(u.float(), 20, 0, 1)
    assert ((counts - u.numel() / 20) ** 2 / (u.numel() / 20)).sum() < 45  # chi-square, 19 degrees: p = 0.0007
    assert (torch.corrcoef(u) - torch.eye(400)).abs().max() < 0.25  # neighbours in key or count are unrelated


def test_corrupt_replaces_the_share_it_is_told() -> None:
    codes = torch.randint(0, 50, (200, 100), generator=torch.Generator().manual_seed(0))
    keys = grpo.keys(torch.arange(200), 0)
    assert torch.equal(grpo.corrupt(codes, 0.0, 50, keys), codes)
    noised = grpo.corrupt(codes, 0.3, 50, keys)
    assert abs((noised != codes).float().mean() - 0.3) < 0.01
    everything = grpo.corrupt(codes, 1.0, 50, keys)
    assert (everything != codes).all() and everything.min() == 0 and everything.max() == 49  # eq. 28: never the code itself
    counts = torch.bincount(everything.flatten(), minlength=50)
    assert counts.min() > 300 and counts.max() < 500  # 400 expected


def draw(logits: torch.Tensor, group: int, temperature: float, keys: torch.Tensor) -> torch.Tensor:
    """G draws of each image by its key: (B, T, V) -> (B, G, T)."""
    return grpo.draw(logits, temperature, grpo.uniforms(keys, group, logits.shape[1]).mT).mT


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[[0.0, 1.0, -2.0, -math.inf, 0.5]]]).expand(2, 3, 5)
    for temperature in (1.0, 0.5):
        drawn = draw(logits, 40_000, temperature, grpo.keys(torch.arange(2), 0))
        assert drawn.shape == (2, 40_000, 3)
        expected = (logits[0, 0] / temperature).softmax(-1)
        for row in drawn.permute(0, 2, 1).flatten(0, 1):
            shares = torch.bincount(row, minlength=5) / 40_000
            assert (shares - expected).abs().max() < 4 * 0.5 / 200
            assert shares[3] == 0


def test_draws_are_exact_in_the_tail() -> None:
    """A code of probability 1e-6 at the end of a large codebook is still drawn 1e-6 of the time."""
    logits = torch.zeros(1, 1, 16384)
    logits[..., -1] = math.log(1e-6 * 16383)
    drawn = draw(logits, 4_000_000, 1.0, torch.tensor([3]))
    assert 1 <= (drawn == 16383).sum() <= 12  # 4 expected
    assert drawn.unique().numel() > 16380


def test_draws_do_not_depend_on_the_split() -> None:
    logits, keys = torch.randn(6, 4, 30, generator=torch.Generator().manual_seed(1)), grpo.keys(torch.arange(6), 0, 2)
    whole = draw(logits, 5, 1.0, keys)
    parts = [draw(logits[a:b], 5, 1.0, keys[a:b]) for a, b in ((0, 1), (1, 4), (4, 6))]
    assert torch.equal(whole, torch.cat(parts))


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0]])
    got = grpo.advantages(rewards, 5.0)
    deviation = math.sqrt((4 + 1 + 0 + 9) / 3)
    torch.testing.assert_close(got[0], torch.tensor([-2.0, -1.0, 0.0, 3.0]) / deviation)
    assert torch.equal(got[1], torch.zeros(4))
    assert grpo.advantages(rewards, 0.5).abs().max() == 0.5


def test_largest_advantage_of_a_group() -> None:
    rewards = torch.zeros(1, 8)
    rewards[0, 0] = 1.0
    assert grpo.advantages(rewards, 5.0).max() == pytest.approx(7 / math.sqrt(8), rel=1e-6)  # paper: the clip of 5 is idle at G = 8


def test_leave_one_out_by_hand() -> None:
    """Unbiased: a draw's own reward is not in what it is compared with; of places as of images."""
    rewards = torch.tensor([[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0]])
    got = grpo.leave_one_out(rewards, 10.0)
    torch.testing.assert_close(got[0], torch.tensor([1 - 11 / 3, 2 - 10 / 3, 3 - 9 / 3, 6 - 6 / 3]))
    assert torch.equal(got[1], torch.zeros(4)) and grpo.leave_one_out(rewards, 0.5).abs().max() == 0.5
    torch.testing.assert_close(grpo.leave_one_out(rewards[..., None].expand(2, 4, 3), 10.0)[..., 1], got)


def test_local_advantages_by_hand() -> None:
    rewards = torch.tensor([[[1.0, 5.0], [3.0, 5.0]]])  # two draws: they differ by 2 at the first place, not at all at the second
    torch.testing.assert_close(grpo.local_advantages(rewards, 5.0), torch.tensor([[[-1.0, 0.0], [1.0, 0.0]]]))  # spread: sqrt((2 + 0) / 2)
    assert grpo.local_advantages(rewards, 0.4).abs().max() == pytest.approx(0.4)


def test_neighbours_by_hand() -> None:
    rewards = torch.arange(9.0).view(1, 1, 9)
    assert torch.equal(grpo.around(rewards, 0), rewards)
    near = grpo.around(rewards, 1)[0, 0]
    assert near[4] == 4 and near[0] == (0 + 1 + 3 + 4) / 4 and near[5] == (1 + 2 + 4 + 5 + 7 + 8) / 6


def test_shared_ratio_is_one_and_never_clipped() -> None:
    new = torch.randn(3, 4, 5, requires_grad=True)
    advantages = torch.randn(3, 4)
    loss, clipped = grpo.policy_term(new, new.detach(), advantages, 0.2)
    assert clipped == 0
    torch.testing.assert_close(loss, -advantages.mean())
    loss.backward()
    torch.testing.assert_close(new.grad, -advantages[:, :, None].expand_as(new) / new.numel())


def test_clipped_term_by_hand() -> None:
    ratios, advantages = torch.tensor([[[1.5, 0.5, 1.1]], [[1.5, 0.5, 1.1]]]), torch.tensor([[1.0], [-1.0]])
    loss, clipped = grpo.policy_term(ratios.log(), torch.zeros_like(ratios), advantages, 0.2)
    gains = [1.2, 0.5, 1.1, -1.5, -0.8, -1.1]
    torch.testing.assert_close(loss, torch.tensor(-sum(gains) / 6))
    torch.testing.assert_close(clipped, torch.tensor(4 / 6))


def test_prior_and_entropy() -> None:
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]]))
    logp = grpo.log_probs(logits + 3.0)
    torch.testing.assert_close(
        grpo.prior_ce(grpo.chosen(logp, torch.tensor([[[0], [2]]]))), torch.tensor(-(math.log(0.5) + math.log(0.8)) / 2)
    )
    expected = (0.5 * math.log(2) + 0.5 * math.log(4) - 0.2 * math.log(0.1) - 0.8 * math.log(0.8)) / 2
    torch.testing.assert_close(grpo.entropy(logp).mean(), torch.tensor(expected))
    torch.testing.assert_close(grpo.chosen(logp, torch.tensor([[[1, 0], [2, 0]]])).exp(), torch.tensor([[[0.25, 0.5], [0.8, 0.1]]]))


def test_k3_is_an_estimate_of_the_divergence() -> None:
    p, q = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.5, 0.2, 0.3]).log()
    draws = draw(p[None, None], 200_000, 1.0, torch.tensor([1]))
    estimate = grpo.prior_kl(grpo.chosen(p[None, None], draws.mT), grpo.chosen(q[None, None], draws.mT))
    assert estimate == pytest.approx(float((p.exp() * (p - q)).sum()), rel=0.02)
    new = p.clone().requires_grad_()
    grpo.prior_kl(new, p).backward()
    assert torch.equal(new.grad, torch.zeros(3))  # no pull while policy and base agree


def test_usage_counts_codes() -> None:
    assert grpo.usage(torch.tensor([2, 2, 0, 0])) == {"codes_used": 0.5, "perplexity": pytest.approx(2.0)}
    skewed = grpo.usage(torch.tensor([97, 1, 1, 1]))
    assert skewed["codes_used"] == 1.0 and 1.0 < skewed["perplexity"] < 1.3
