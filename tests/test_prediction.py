"""What the generator predicts, asked in parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_naive import TUNE, flat_gradient, problem
from torch.utils._python_dispatch import TorchDispatchMode

from vapi import prediction
from vapi.config import TuneConfig
from vapi.prediction import Prediction

FEW = 3 * 32 + 5  # numbers of 3 positions: no divisor of an image's 16


OVER_CODES = {"aten::_log_softmax", "aten::_log_softmax_backward_data", "aten::cumsum"}  # attention does none of these


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor over a codebook has."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        result = function(*given, **(named or {}))
        if function.name().split(".")[0] in OVER_CODES:
            self.numbers = max(self.numbers, result.numel())
        return result


@pytest.mark.parametrize("kind", ["tiny_model", "captioned_model", "janus_model"])
@pytest.mark.parametrize("changes", [{}, {"prior": "kl"}, {"policy_dropout": "official"}, {"policy_weight": 0.0}, {"temperature": 0.7}])
def test_parts_are_the_whole(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, kind: str, changes: dict[str, Any]) -> None:
    """Loss, gradient and what held-out images show; and no tensor over the codebook is larger than was asked for."""
    found = []
    for most in (prediction.MOST, FEW):
        monkeypatch.setattr(prediction, "MOST", most)
        objective, batch, _ = problem(request.getfixturevalue(kind), torch.float32, TuneConfig(**{**vars(TUNE), **changes}))
        numbers: dict[str, float] = {}
        with Largest() as largest:
            for share, loss, terms in objective.pieces(batch, step=3):
                (share * loss).backward()
                for name, value in terms.items():
                    numbers[name] = numbers.get(name, 0.0) + share * float(value)
            numbers |= objective.look(batch, 3)
        found.append((flat_gradient(objective.policy), numbers, largest.numbers))
    (whole, numbers, all_at_once), (parts, again, few) = found
    assert ((whole - parts).norm() / whole.norm()).item() < 1e-5
    assert again == pytest.approx(numbers, rel=1e-5, abs=1e-6)
    assert few <= FEW < all_at_once


def test_answers_keep_their_places() -> None:
    features = torch.arange(24.0).view(2, 3, 4)
    asked = Prediction(features, lambda x: x * 2, vocab=prediction.MOST // 2)  # two positions at a time
    double, mine = asked.ask(lambda x, about: (x[:, 0], x[:, 1:] + about), torch.ones(2, 3, 3))
    assert torch.equal(double, features[..., 0] * 2) and torch.equal(mine, features[..., 1:] * 2 + 1)
