"""The mathematics of VA-pi (arXiv 2512.19680, section 3): tensors in, tensors out, torch alone.

All G draws of an image share one teacher-forced prediction, so they share one forward with
gradient; the ratio of equation 11 is then ``exp(lp - lp.detach())``: its value is 1, its gradient
is that of the log-probability.

Randomness belongs to the item and not to the process. ``keys`` turns (seed, step, image, ...)
into one number per image, ``uniforms`` counts on from it, and one number per draw is enough
(inverse distribution function; Gumbel noise would need one per codebook entry). The result is
the same however images are split into forwards, and the same on every device.

Left out on purpose: top-k and top-p (the ratio would compare a cut distribution with a whole one).

Shapes: B images, G group, T codes, V codebook.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # splitmix64's increment, as a signed 64-bit number
_MIX = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's own keeps the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser: every bit of the result depends on every bit of ``x``."""
    x = (x ^ _shift(x, 30)) * _MIX[0]
    x = (x ^ _shift(x, 27)) * _MIX[1]
    return x ^ _shift(x, 31)


def keys(items: Tensor, *parts: int) -> Tensor:
    """One random-looking int64 per item, from the item's number (B,) and what it is wanted for."""
    key = torch.zeros_like(items, dtype=torch.int64)
    for part in parts:
        key = _mix(key + _GOLDEN + part)
    return _mix(key + _GOLDEN + items)


def uniforms(keys: Tensor, *shape: int) -> Tensor:
    """Numbers in [0, 1) with 53 random bits, (B,) -> (B, *shape) float64; row b depends on keys[b] alone."""
    size = torch.Size(shape)
    count = torch.arange(1, size.numel() + 1, device=keys.device)
    bits = _mix(keys[:, None] + count * _GOLDEN)
    return (_shift(bits, 11).double() * 2.0**-53).reshape(len(keys), *size)


def corrupt(codes: Tensor, noise: float, vocab: int, keys: Tensor) -> Tensor:
    """The noised context of equation 28: each code is replaced with probability ``noise``.

    The replacement is uniform over the other ``vocab - 1`` codes, as in the paper; the released
    code draws it from all of them. ``codes`` (B, T) int64 -> (B, T) int64.
    """
    if noise == 0:
        return codes
    hit, which = uniforms(keys, 2, codes.shape[1]).unbind(1)
    other = (codes + 1 + (which * (vocab - 1)).long()) % vocab
    return torch.where(hit < noise, other, codes)


@torch.no_grad()
def draw(logits: Tensor, temperature: float, uniforms: Tensor) -> Tensor:
    """Independent draws at every position (eq. 7), G by as many uniform numbers: logits or log-probabilities (..., V) and
    (..., G) -> codes (..., G) int64.

    The distribution is summed in float64: in float32 the tail of a large codebook would be lost.
    """
    cdf = (logits.float() / temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
    # right=True finds the first entry above u, so a code of probability 0 is never drawn
    return torch.searchsorted(cdf, uniforms.contiguous() * cdf[..., -1:], right=True)


def log_probs(logits: Tensor) -> Tensor:
    """log pi(. | context), (B, T, V): float32, or float64 if the logits are."""
    return logits.log_softmax(-1, dtype=None if logits.dtype == torch.float64 else torch.float32)


def tempered(log_probs: Tensor, temperature: float) -> Tensor:
    """The same prediction at the temperature at which it is drawn from."""
    return log_probs if temperature == 1 else (log_probs / temperature).log_softmax(-1)


def chosen(log_probs: Tensor, codes: Tensor) -> Tensor:
    """log pi(code | context) of G codes at each position: (..., V) and (..., G) -> (..., G)."""
    return log_probs.gather(-1, codes)


def advantages(rewards: Tensor, clip: float) -> Tensor:
    """Rewards normalised within each image's group (eq. 4), (B, G) -> (B, G).

    Unbiased standard deviation + 1e-8, clipped to +-clip, as released. Needs G >= 2.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    return (centred / (rewards.std(1, keepdim=True) + 1e-8)).clamp(-clip, clip)


def leave_one_out(rewards: Tensor, clip: float) -> Tensor:
    """Each draw's reward less the mean of the image's other draws (arXiv 2402.14740), (B, G) -> (B, G), or by place, (B, G, T).

    Not divided by the spread, so an image whose draws differ more counts for more. Needs G >= 2.
    """
    group = rewards.shape[1]
    return ((rewards - rewards.mean(1, keepdim=True)) * (group / (group - 1))).clamp(-clip, clip)


def local_advantages(rewards: Tensor, clip: float) -> Tensor:
    """The same for rewards of places, (B, G, T) -> (B, G, T): compared with the other draws at the same place, by the spread that
    the image has over all of its places. So a place where draws hardly differ in what they do to the image hardly counts."""
    centred = rewards - rewards.mean(1, keepdim=True)
    spread = rewards.var(1, keepdim=True).mean(-1, keepdim=True).sqrt()
    return (centred / (spread + 1e-8)).clamp(-clip, clip)


def around(rewards: Tensor, radius: int) -> Tensor:
    """Rewards of places (B, G, T), each with its neighbours up to ``radius`` rows and columns away: the mean of those there are."""
    side = round(rewards.shape[-1] ** 0.5)
    window = 2 * radius + 1
    square = rewards.unflatten(-1, (side, side)).flatten(0, 1)[:, None]
    return F.avg_pool2d(square, window, 1, radius, count_include_pad=False).reshape(rewards.shape) if radius else rewards


def policy_term(new: Tensor, old: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """The clipped term of equation 11 as a loss, and the share of ratios outside 1 +- clip.

    ``new``, ``old`` (B, G, T) log-probabilities of the draws, ``old`` without gradient; ``advantages`` (B, G), one per draw for
    all its codes, or (B, G, T). Mean over codes, draws and images.
    """
    ratio = (new - old).exp()
    advantage = advantages.to(ratio.dtype).reshape(*ratio.shape[:2], -1)
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    return -gain.mean(), ((ratio - 1).abs() > clip).float().mean()


def prior_ce(log_probs: Tensor) -> Tensor:
    """The prior of equation 9: cross-entropy on the image's true codes, from their log-probabilities (B, T) -> ()."""
    return -log_probs.mean()


def prior_kl(new: Tensor, base: Tensor) -> Tensor:
    """The alternative of figure 4: the k3 estimate of KL(policy || base) on the draws, (B, G, T) twice -> ()."""
    gap = base - new
    return (gap.exp() - gap - 1).mean()


@torch.no_grad()
def entropy(log_probs: Tensor) -> Tensor:
    """Entropy of a position's prediction in nats, (..., V) -> (...)."""
    return -(log_probs.exp() * log_probs).sum(-1)


def usage(counts: Tensor) -> dict[str, float]:
    """How many different codes a set of token maps holds, from how often each occurs (V,): the share of the codebook in use, and
    the perplexity, which is the number of codes that would be in use if all were used alike."""
    shares = counts.double() / counts.sum()
    return {"codes_used": (counts > 0).double().mean().item(), "perplexity": torch.special.entr(shares).sum().exp().item()}
