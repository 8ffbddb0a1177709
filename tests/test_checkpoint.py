"""A checkpoint is whole or not there, and belongs to one run."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vapi import checkpoint


def state(step: int, size: int = 1000) -> dict[str, object]:
    weight = torch.nn.Linear(size, 3)
    optimizer = torch.optim.AdamW(weight.parameters())
    weight(torch.ones(size)).sum().backward()
    optimizer.step()
    return {"step": step, "model": weight.state_dict(), "optimizer": optimizer.state_dict(), "lines": ['{"step": 1}']}


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "checkpoint.pt"
    assert checkpoint.load(path, "a") is None
    for step in (1, 2):
        saved = state(step)
        checkpoint.save(path, "a", saved)
        loaded = checkpoint.load(path, "a")
        assert loaded is not None and loaded["step"] == step and loaded["lines"] == saved["lines"]
        assert all(torch.equal(loaded["model"][k], v) for k, v in saved["model"].items())  # type: ignore[attr-defined]
        fresh = torch.nn.Linear(1000, 3)
        torch.optim.AdamW(fresh.parameters()).load_state_dict(loaded["optimizer"])
    assert names(path.parent) == ["checkpoint.pt"]


def test_another_run_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c.pt", "a", state(1))
    with pytest.raises(ValueError, match="another configuration"):
        checkpoint.load(tmp_path / "c.pt", "b")


def test_damage_is_named_and_nothing_executes(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    checkpoint.save(path, "a", state(1))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.load(path, "a")
    torch.save({"digest": "a", "hook": Path.home}, path)
    with pytest.raises(ValueError, match="no checkpoint of ours"):
        checkpoint.load(path, "a")


def test_disk_full_keeps_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    checkpoint.save(path, "a", state(1))
    before = path.read_bytes()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before), limits[1]))
    try:
        with pytest.raises(ValueError, match="cannot write the checkpoint .* is intact.*Make room"):
            checkpoint.save(path, "a", state(2, size=200_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before and names(tmp_path) == ["c.pt"]


def test_full_device_is_reported() -> None:
    """/dev/full answers every write with ENOSPC, as a full disk does."""
    target = checkpoint._Flushed(Path("/dev/full"))
    torch.save(state(1, size=100_000), target)
    with pytest.raises(OSError, match="No space left"):
        target.finish()


def test_killed_while_writing(tmp_path: Path) -> None:
    """Whenever the writer dies, the last complete checkpoint is there and readable."""
    path = tmp_path / "c.pt"
    code = (
        "import sys, torch; from pathlib import Path; from vapi import checkpoint\n"
        "for step in range(10_000):\n"
        "    checkpoint.save(Path(sys.argv[1]), 'a', {'step': step, 'model': torch.full((300_000,), float(step))})\n"
        "    print(step, flush=True)\n"
    )
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        last = [int(writer.stdout.readline()) for _ in range(4)][-1]
        writer.kill()
        writer.wait()
        writer.stdout.close()
        loaded = checkpoint.load(path, "a")
        assert loaded is not None and loaded["step"] >= last and bool((loaded["model"] == loaded["step"]).all())
    checkpoint.save(path, "a", {"step": -1})
    assert names(tmp_path) == ["c.pt"]  # what the kills left is gone after the next save
