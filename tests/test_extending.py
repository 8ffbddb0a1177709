"""docs/extending.md, followed to the letter."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vapi import rewards

PAGE = Path(__file__).parents[1] / "docs/extending.md"


def test_a_reward_is_added_in_a_few_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(code.splitlines()) < 20
    monkeypatch.setattr(rewards, "REWARDS", dict(rewards.REWARDS))
    exec(compile("from __future__ import annotations\n" + code, str(PAGE), "exec"), {"Tensor": Tensor, "REWARDS": rewards.REWARDS})
    weights = re.findall(r'--tune.rewards "\{mse: 1, edges: 0.5\}"', PAGE.read_text())
    assert len(weights) == 1
    targets = torch.zeros(2, 3, 8, 8)
    flat, striped = targets + 0.5, torch.arange(8.0).remainder(2).expand(2, 3, 8, 8)
    total, parts = rewards.Reward({"mse": 1.0, "edges": 0.5}).score(torch.stack([flat, striped], dim=1), targets)
    assert parts["edges"][:, 0].eq(0).all() and parts["edges"][:, 1].eq(-1).all()
    torch.testing.assert_close(total, parts["mse"] + 0.5 * parts["edges"])
