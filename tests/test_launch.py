"""Several processes do what one does, and end together. gloo on CPUs; the same code runs NCCL on GPUs."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import worker
from safetensors.torch import load_file
from test_evaluate import World as Evaluation
from test_evaluate import world as evaluation  # noqa: F401
from test_tune import config, lines, write_inputs

from vapi import data, launch, prediction
from vapi.config import Config, ModelConfig, TokensConfig, TuneConfig, plain
from vapi.launch import World
from vapi.models import features, weights

WORKER = Path(__file__).with_name("worker.py")


@pytest.fixture(scope="module")
def inputs(tiny_model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    subset, tokens = write_inputs(tmp_path_factory.mktemp("inputs"), tiny_model)
    return {"model": tiny_model, "subset": str(subset), "tokens": str(tokens)}


def command(what: str, inputs: dict[str, Any], tune: TuneConfig, out: Path) -> list[str]:
    return words(what, dataclasses.replace(Config(), model=inputs["model"], tune=tune), {**inputs, "out": out})


def words(what: str, settings: Config, folders: dict[str, Any]) -> list[str]:
    file = folders["out"].parent / f"{folders['out'].name}.given.json"
    file.write_text(json.dumps({"config": plain(settings), **{name: str(path) for name, path in folders.items()}}))
    return [sys.executable, str(WORKER), what, str(file)]


def run(processes: int, words: list[str], project: Path, **more: Any) -> subprocess.CompletedProcess[str]:
    """A command in several processes, through a starter of its own that can be sent signals."""
    return subprocess.run(starter(processes, words), env=environment(project), capture_output=True, text=True, timeout=240, **more)


def starter(processes: int, words: list[str]) -> list[str]:
    return [sys.executable, "-c", f"import sys; from vapi import launch; sys.exit(launch.start({words!r}, {processes}))"]


def environment(project: Path) -> dict[str, str]:
    return {**os.environ, "DVC_ROOT": str(project), "OMP_NUM_THREADS": "1"}


# --- the same numbers --------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 7, 8, 1000])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_parts_cover_everything_once(count: int, size: int) -> None:
    parts = [World(rank, size).part(count) for rank in range(size)]
    assert [i for part in parts for i in range(count)[part]] == list(range(count))
    lengths = [part.stop - part.start for part in parts]
    assert max(lengths) - min(lengths) <= 1


KINDS = {
    "shared": {},
    "kl": {"prior": "kl"},
    "accumulated": {"images_per_forward": 2},
    "recomputed": {"activation_checkpointing": True},
    "sharded": {"sharding": "full", "images_per_forward": 1, "activation_checkpointing": True, "max_grad_norm": 0.1},
    "official": {"policy_dropout": "official"},
    "twice": {"updates_per_rollout": 2},
    "free": {"objective": "ar_grpo", "prior": "kl", "rewards": {"class": 1.0}},
    "decoder": {"objective": "tokenizer", "prior_weight": 0.0},
}


@pytest.mark.parametrize(
    ("processes", "kind", "most"),
    [(2, "shared", 1 << 23), (3, "accumulated", 1 << 23), (2, "kl", 1 << 23), (3, "sharded", 100), (2, "official", 1 << 23),
     (2, "twice", 1 << 23), (3, "free", 1 << 23), (2, "decoder", 1 << 23)],
)  # fmt: skip
def test_processes_give_the_gradient_of_one(processes: int, kind: str, most: int, inputs: dict[str, Any], tmp_path: Path) -> None:
    """Seven images do not divide by two or three. The reward takes one image's draws at a time: a convolution rounds
    by the shape of its input, and dividing by the spread of a group makes that large. ``most``: numbers of a prediction at a time,
    so that with shards the head predicts outside the generator's forward pass, and again in the backward pass."""
    tune = config(**{"images_per_step": 7, "holdout_images": 5, "max_grad_norm": 0.0, **KINDS[kind]})
    tune = dataclasses.replace(tune, images_per_reward=tune.group_size, classifier=str(tmp_path / "classifier.safetensors"))
    weights.save(features.random_twin(3), tune.classifier, {})
    require_same_gradient(processes, {**inputs, "most": most}, dataclasses.replace(tune, images_per_forward=7), tune, tmp_path)


def test_processes_give_the_gradient_of_one_of_janus(janus_model: ModelConfig, tmp_path: Path) -> None:
    """With shards and recomputed layers, which are transformers' own."""
    subset, tokens = write_inputs(tmp_path / "inputs", janus_model)
    given = {"model": janus_model, "subset": str(subset), "tokens": str(tokens)}
    tune = config(**{"images_per_step": 7, "holdout_images": 5, "images_per_reward": 4, **KINDS["sharded"], "max_grad_norm": 0.0})
    require_same_gradient(2, given, dataclasses.replace(tune, images_per_forward=7), tune, tmp_path)


def test_shards_lower_what_autocast_lowers(inputs: dict[str, Any], tmp_path: Path) -> None:
    """bfloat16 with shards is the arithmetic of bfloat16 without, one image at a time."""
    low = {**inputs, "model": dataclasses.replace(inputs["model"], precision="bfloat16")}
    tune = config(images_per_step=4, images_per_forward=1, images_per_reward=4, sharding="full")
    require_same_gradient(2, low, tune, tune, tmp_path)


def require_same_gradient(processes: int, inputs: dict[str, Any], alone: TuneConfig, together: TuneConfig, tmp_path: Path) -> None:
    alone = dataclasses.replace(alone, sharding="none", activation_checkpointing=False)
    settings = dataclasses.replace(Config(), model=inputs["model"], tune=alone)
    worker.gradient({**inputs, "most": prediction.MOST, "out": str(tmp_path / "one.safetensors")}, settings)
    done = run(processes, command("gradient", inputs, together, tmp_path / "many.safetensors"), tmp_path)
    assert done.returncode == 0, done.stderr
    one, many = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "many"))
    assert one.keys() == many.keys()
    off, size = (torch.stack([f(name).double().norm() for name in one]).norm() for f in (lambda n: one[n] - many[n], one.__getitem__))
    assert off <= 1e-6 * size
    numbers = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "many")]
    assert numbers[1] == pytest.approx(numbers[0], rel=1e-5, abs=1e-7)


def test_a_sharded_run_is_that_of_one_process(inputs: dict[str, Any], tmp_path: Path) -> None:
    """Sheets and checkpoints between the steps included."""
    tune = config(sheet_every=2, activation_checkpointing=True)
    assert run(1, command("tune", inputs, tune, tmp_path / "one"), tmp_path).returncode == 0
    done = run(2, command("tune", inputs, dataclasses.replace(tune, sharding="full"), tmp_path / "many"), tmp_path)
    assert done.returncode == 0, done.stderr
    require_alike(tmp_path / "one", tmp_path / "many")
    assert (tmp_path / "many" / "sheets" / "step-000002.png").is_file()


def test_tokens_are_those_of_one_process(inputs: dict[str, Any], tmp_path: Path) -> None:
    """Bit by bit, though five batches do not divide by three; and the cache they leave serves any number."""
    settings = dataclasses.replace(Config(), model=inputs["model"], tokens=TokensConfig(images_per_batch=5, workers=1))
    for processes in (1, 3):
        out = tmp_path / f"out{processes}"
        done = run(processes, words("tokens", settings, {"subset": inputs["subset"], "out": out}), tmp_path / f"project{processes}")
        assert done.returncode == 0, done.stderr
    assert data.file_digest(tmp_path / "out1") == data.file_digest(tmp_path / "out3")
    assert data.read_json(tmp_path / "out3" / "provenance.json")["encoded"] == 24
    again = run(1, words("tokens", settings, {"subset": inputs["subset"], "out": tmp_path / "out3"}), tmp_path / "project3")
    assert again.returncode == 0 and data.read_json(tmp_path / "out3" / "provenance.json")["encoded"] == 0


def require_alike(one: Path, many: Path) -> None:
    """The same curves and weights, but for rounding."""
    for ours, theirs in zip(lines(one), lines(many), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-3, abs=1e-5)
    a, b = (load_file(folder / "model.safetensors") for folder in (one, many))
    assert a.keys() == b.keys() and max((a[name] - b[name]).abs().max().item() for name in a) < 1e-4


def test_an_evaluation_is_that_of_one_process(evaluation: Evaluation, tmp_path: Path) -> None:  # noqa: F811
    """Bit by bit, though seven batches do not divide by three."""
    settings = dataclasses.replace(Config(), model=evaluation.model, evaluate=dataclasses.replace(evaluation.config, images_per_batch=6))
    for processes in (1, 3):
        project, out = tmp_path / f"project{processes}", tmp_path / f"out{processes}"
        done = run(processes, words("evaluate", settings, {"tune": evaluation.tune, "out": out}), project)
        assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "out1").iterdir()} - {"provenance.json"}
    assert {"metrics.json", "report.html", "sheet-best.png"} < names
    for name in names:
        assert (tmp_path / "out1" / name).read_bytes() == (tmp_path / "out3" / name).read_bytes(), name


def test_a_run_continues_on_another_number_of_processes(inputs: dict[str, Any], tmp_path: Path) -> None:
    """Two processes of torchrun, with shards, are stopped, three of ours go on in smaller pieces, one ends it: the same
    curve as on one."""
    tune = config(steps=30)
    assert run(1, command("tune", inputs, tune, tmp_path / "one"), tmp_path).returncode == 0
    sharded = command("tune", inputs, dataclasses.replace(tune, sharding="full"), tmp_path / "many")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", *sharded[1:]]
    assert interrupted(torchrun, tmp_path, signal.SIGTERM) != 0
    words = command("tune", inputs, dataclasses.replace(tune, images_per_forward=1), tmp_path / "many")
    assert interrupted(starter(3, words), tmp_path, signal.SIGTERM) == launch.INTERRUPTED
    ended = run(1, words, tmp_path)
    assert ended.returncode == 0 and "continuing after step" in ended.stderr
    require_alike(tmp_path / "one", tmp_path / "many")


def interrupted(words: list[str], project: Path, number: signal.Signals, victim: int | None = None) -> int:
    """Exit code of a run that got a signal after a few steps: whoever started it, or one of its processes."""
    metrics = project / ".vapi" / "resume" / "tune"
    before = written(metrics)
    with subprocess.Popen(words, env=environment(project), stderr=subprocess.PIPE) as process:
        while written(metrics) < before + 3:
            assert process.poll() is None, process.stderr and process.stderr.read().decode()
            time.sleep(0.02)
        if victim is None:
            process.send_signal(number)
        else:
            os.kill(children(process.pid)[victim], number)
        return process.wait(timeout=60)


def written(metrics: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in metrics.glob("*/metrics.jsonl"))


def children(pid: int) -> list[int]:
    """Child processes in the order in which they were started."""
    return sorted(int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


# --- faults ------------------------------------------------------------------------------------


def test_killed(inputs: dict[str, Any], tmp_path: Path) -> None:
    """One of two, the other, both with their starter: nobody hangs or stays, and the same command ends with the bits of
    an undisturbed run."""
    tune = config(steps=20)
    assert run(2, command("tune", inputs, tune, tmp_path / "whole"), tmp_path).returncode == 0
    killed = command("tune", inputs, tune, tmp_path / "killed")
    for victim in (0, 1):
        assert interrupted(starter(2, killed), tmp_path, signal.SIGKILL, victim) == 128 + signal.SIGKILL
    kill_starter(killed, tmp_path)
    assert run(2, killed, tmp_path).returncode == 0
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


def kill_starter(words: list[str], project: Path) -> None:
    """SIGKILL for the starter alone, in the middle of the work; its two processes must go with it."""
    metrics = project / ".vapi" / "resume" / "tune"
    before = written(metrics)
    with subprocess.Popen(starter(2, words), env=environment(project), stderr=subprocess.DEVNULL) as process:
        while written(metrics) < before + 2:
            assert process.poll() is None
            time.sleep(0.02)
        orphans = children(process.pid)
        process.kill()
    deadline = time.monotonic() + 30
    while [pid for pid in orphans if alive(pid)]:
        assert time.monotonic() < deadline, "processes outlived the one that had started them"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_the_first_to_fail_is_heard_alone(tmp_path: Path) -> None:
    """A traceback of the process that failed, none of those that only missed it."""
    script = (
        "from vapi import launch\n"
        "world = launch.world()\n"
        "world.gather(1)\n"
        "if world.rank == 1: raise RuntimeError('the disk of rank 1 is gone')\n"
        "world.gather(2)\n"
    )
    done = run(3, [sys.executable, "-c", script], tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1 and "the disk of rank 1 is gone" in done.stderr


def test_more_processes_than_images(inputs: dict[str, Any], tmp_path: Path) -> None:
    done = run(3, command("tune", inputs, config(images_per_step=2), tmp_path / "out"), tmp_path)
    assert done.returncode != 0 and "3 processes (GPUs) share tune.images_per_step 2; use fewer GPUs" in done.stderr
    assert not (tmp_path / "out").exists()


def test_out_of_memory_says_what_to_change(inputs: dict[str, Any], tmp_path: Path) -> None:
    """And the smaller knob, which changes no result, continues the work."""
    greedy = config(group_size=4096, images_per_reward=1 << 20)
    settings, folders = dataclasses.replace(Config(), model=inputs["model"], tune=greedy), {**inputs, "out": tmp_path / "out"}
    done = run(1, words("tune", settings, {**folders, "memory": 1 << 30}), tmp_path)
    assert (
        done.returncode != 0
        and "ValueError: out of memory with tune.images_per_forward 4 and tune.images_per_reward 1048576" in done.stderr
    )
    assert "lower them, then try tune.activation_checkpointing true" in done.stderr
    modest = dataclasses.replace(settings, tune=dataclasses.replace(greedy, images_per_reward=64, steps=1))
    done = run(1, words("tune", modest, {**folders, "memory": 1 << 30}), tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many processes as visible GPUs, unless somebody has started several, or the CPU is meant."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert launch.processes("auto") == launch.processes("cuda") == 8 and launch.processes("cpu") == launch.processes("cuda:1") == 1
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert launch.processes("auto") == 1
