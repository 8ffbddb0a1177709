"""The stage on a tiny policy: it learns, it continues after a kill with the same bits, it refuses what does not fit."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CAPTIONS, write_tiny
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vapi import data, grpo, images, models, rewards
from vapi import tune as stage
from vapi.config import ModelConfig, TuneConfig, plain
from vapi.models import features, weights

IMAGES = 24


def png(seed: int, size: int = 16) -> bytes:
    """A smooth coloured pattern."""
    x = np.linspace(0, 3, size) + np.random.default_rng(seed).uniform(0, 6, (3, 1))
    pixels = (127 + 120 * np.sin(x)[:, :, None] * np.cos(x)[:, None, :]).astype(np.uint8).transpose(1, 2, 0)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def write_inputs(folder: Path, model: ModelConfig, labels: list[int] | None = None, count: int = IMAGES) -> tuple[Path, Path]:
    """A subset of ``count`` patterns and its tokens, as the first two stages write them."""
    subset, tokens = folder / "subset", folder / "tokens"
    labels = labels or [i % 10 for i in range(count)]
    captions = [CAPTIONS[i % len(CAPTIONS)] if model.captions else "" for i in range(count)]
    rows = [data.Row(f"{i:03d}.png", labels[i], captions[i], 16, 16, "RGB", png(i), f"{i:064x}") for i in range(count)]
    for made in (subset, tokens):
        made.mkdir(parents=True)
    data.write_subset(subset, rows)
    tokenizer = models.load_tokenizer(model)
    pixels = np.stack([np.asarray(images.decode(row.data)) for row in rows])
    codes = tokenizer.encode(images.to_float(pixels)).numpy().astype(np.uint16)
    summary = {"image_size": 16, "tokenizer": data.tokenizer_digest(model)}
    data.write_tokens(tokens, codes, data.read_subset(subset), "center", summary)
    return subset, tokens


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Resume state goes into a project of its own."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def inputs(tiny_model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    subset, tokens = write_inputs(tmp_path_factory.mktemp("inputs"), tiny_model)
    yield {"model": tiny_model, "subset": subset, "tokens": tokens}


@pytest.fixture(scope="module", params=["tiny_model", "janus_model"])
def of_any(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same of every policy."""
    model = request.getfixturevalue(request.param)
    subset, tokens = write_inputs(tmp_path_factory.mktemp(request.param), model)
    return {"model": model, "subset": subset, "tokens": tokens}


def config(**changes: Any) -> TuneConfig:
    small = {"steps": 4, "images_per_step": 6, "images_per_forward": 4, "group_size": 4, "rewards": {"mse": 1.0}, "lr": 1e-3}
    every = {"holdout_images": 4, "holdout_every": 2, "sheet_every": 4, "checkpoint_every": 1}
    return TuneConfig(**{**small, **every, **changes})


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same(a: Path, b: Path) -> bool:
    names = sorted(p.relative_to(a) for p in a.rglob("*") if p.is_file() and p.name not in ("provenance.json", "config.json"))
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


# --- what it makes -----------------------------------------------------------------------------


def test_output(of_any: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "artifacts" / "tune"
    stage.tune(**of_any, tune=config(rewards={"mse": 1.0, "l1": 0.5}), out=out)
    names = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    sheets = {f"sheets/step-{step:06d}.{kind}" for step in (0, 4) for kind in ("png", "json")}
    assert names == {"model.safetensors", "metrics.jsonl", "summary.json", "config.json", "provenance.json"} | sheets
    rows = lines(out)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    wanted = "loss policy ce entropy reward reward_mse reward_l1 reward_std advantage_std clip_fraction grad_norm"
    assert set(rows[1]) == {"step"} | {f"tune/{name}" for name in wanted.split()}
    followed = {"reward", "reward_mse", "ce", "entropy", "codes_used", "perplexity"}
    assert {f"holdout/{name}" for name in followed} <= set(rows[0]) & set(rows[2]) & set(rows[4])
    for row in rows[1:]:
        assert row["tune/clip_fraction"] == 0
        assert row["tune/reward"] == pytest.approx(row["tune/reward_mse"] + 0.5 * row["tune/reward_l1"], rel=1e-5)
        assert row["tune/loss"] == pytest.approx(row["tune/policy"] + 0.1 * row["tune/ce"], rel=1e-5)
    summary = data.read_json(out / "summary.json")
    assert summary["holdout"]["first"]["step"] == 0 and summary["holdout"]["last"]["step"] == 4 and summary["images_seen"] == 24
    assert data.read_json(out / "config.json")["sections"]["tune"]["group_size"] == 4
    told = data.read_json(out / "provenance.json")
    assert told["seconds_per_step"] > 0 and told["seconds_in_own_steps"] > 2 * told["seconds_per_step"] and told["device"] == "cpu"
    for step in (0, 4):
        drawn = data.read_json(out / f"sheets/step-{step:06d}.json")
        assert drawn["step"] == step and len(drawn["keys"]) == len(drawn["rewards"]["mse"]) == 4
        assert drawn["rewards"]["reward"] == pytest.approx(np.dot([1.0, 0.5], [drawn["rewards"][name] for name in ("mse", "l1")]), rel=1e-4)
    models.load(of_any["model"], out / "model.safetensors")  # strictly
    assert not list((tmp_path / ".vapi" / "resume" / "tune").iterdir())


def test_repeats_to_the_bit(of_any: dict[str, Any], tmp_path: Path) -> None:
    for name in ("a", "b"):
        stage.tune(**of_any, tune=config(), out=tmp_path / name)
    assert same(tmp_path / "a", tmp_path / "b")
    stage.tune(**of_any, tune=config(seed=1), out=tmp_path / "c")
    assert not same(tmp_path / "a", tmp_path / "c")


def test_forty_steps_raise_the_reward(inputs: dict[str, Any], tmp_path: Path) -> None:
    """Without the prior, which pulls towards codes that this random tokenizer decodes no better than others."""
    every = {"holdout_every": 40, "sheet_every": 40, "checkpoint_every": 40}
    tuned = config(steps=40, lr=1e-2, images_per_step=20, images_per_forward=20, group_size=8, prior_weight=0.0, **every)
    stage.tune(**inputs, tune=tuned, out=tmp_path / "vapi")
    held = data.read_json(tmp_path / "vapi" / "summary.json")["holdout"]
    assert held["last"]["holdout/reward"] > 0.9 * held["first"]["holdout/reward"]  # rewards are negative
    rows = lines(tmp_path / "vapi")
    early, late = (np.mean([row["tune/reward"] for row in part]) for part in (rows[1:6], rows[-5:]))
    assert late > 0.85 * early


def test_the_first_step_is_adams_first(inputs: dict[str, Any], tmp_path: Path) -> None:
    """It moves every weight by the learning rate, whatever the gradient."""
    stage.tune(**inputs, tune=config(steps=1, lr=1e-3, weight_decay=0.0), out=tmp_path / "out")
    base, tuned = load_file(inputs["model"].generator), load_file(tmp_path / "out" / "model.safetensors")
    moved = torch.cat([(tuned[name] - base[name]).abs().flatten() for name in base])
    assert moved[moved > 0].median().item() == pytest.approx(1e-3, rel=1e-2)


def test_compilation_without_a_compiler(inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match=r"g\+\+ or clang\+\+ is not here.*--tune.compile false"):
        stage.tune(**inputs, tune=config(compile=True), out=tmp_path / "out")


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_compiled(inputs: dict[str, Any], tmp_path: Path) -> None:
    """The same curve and weights but for rounding, with activations computed again too."""
    stage.tune(**inputs, tune=config(), out=tmp_path / "plain")
    stage.tune(**inputs, tune=config(compile=True, activation_checkpointing=True), out=tmp_path / "compiled")
    for ours, theirs in zip(lines(tmp_path / "plain"), lines(tmp_path / "compiled"), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-3, abs=1e-5)


# --- what the objective is ---------------------------------------------------------------------


def objective(inputs: dict[str, Any], tune: TuneConfig) -> tuple[stage.Objective, stage.Batch]:
    policy = models.load(inputs["model"])
    examples = stage.Examples(inputs["model"], tune, inputs["subset"], inputs["tokens"])
    rows = examples.order(1)
    reward = rewards.Reward(tune.rewards)
    return stage.Objective(policy, tune, reward), examples.batch(rows, examples.pixels(rows), policy)


def gradient(made: tuple[stage.Objective, stage.Batch], step: int = 1) -> tuple[torch.Tensor, dict[str, float]]:
    target, batch = made
    totals: dict[str, float] = {}
    for share, loss, terms in target.pieces(batch, step):
        (share * loss).backward()
        for name, value in terms.items():
            totals[name] = totals.get(name, 0.0) + share * value.item()
    return torch.cat([p.grad.flatten() for p in target.policy.generator.parameters()]), totals


@pytest.mark.parametrize("dropout", ["none", "official"])
def test_split_does_not_matter(inputs: dict[str, Any], dropout: Any) -> None:
    """One forward of 6 images, or 4 + 2, or six of 1, with decoding in other chunks: the same step."""
    sizes = [{"images_per_forward": f, "images_per_reward": r} for f, r in ((6, 256), (4, 5), (1, 3))]
    made = [gradient(objective(inputs, config(context_noise=0.3, policy_dropout=dropout, **size))) for size in sizes]
    for other, totals in made[1:]:
        torch.testing.assert_close(other, made[0][0], rtol=1e-4, atol=1e-7)
        assert totals == pytest.approx(made[0][1], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("per_block", [1, 3, 4, 7, 100])
def test_blocks_and_threads_do_not_matter(inputs: dict[str, Any], per_block: int) -> None:
    """Token maps decoded and rewarded all at once, or in blocks that share a group, on one thread or three."""
    target, batch = objective(inputs, config(rewards={"mse": 1.0, "l1": 0.5}))
    codes = torch.randint(32, (6, 4, 16), generator=torch.Generator().manual_seed(0))
    whole, parts = target.score(codes, batch.images)
    torch.set_num_threads(3)
    other, _ = objective(inputs, config(rewards={"mse": 1.0, "l1": 0.5}, images_per_reward=per_block))
    torch.set_num_threads(1)
    again, theirs = other.score(codes, batch.images)
    torch.testing.assert_close(again, whole)
    assert set(theirs) == set(parts) == {"mse", "l1"} and other.map is not map
    torch.testing.assert_close(theirs["l1"], parts["l1"])


def test_prior_alone_draws_nothing(inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = objective(inputs, config(policy_weight=0.0, group_size=1, images_per_forward=6))
    monkeypatch.setattr(grpo, "draw", lambda *args: pytest.fail("drew"))
    found, totals = gradient(made)
    assert set(totals) == {"ce", "entropy", "loss"} and totals["loss"] == pytest.approx(0.1 * totals["ce"])
    policy, batch = made[0].policy, made[1]
    policy.generator.zero_grad()
    logits = policy.logits(batch.condition, batch.codes)
    (0.1 * torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.codes.flatten())).backward()
    torch.testing.assert_close(found, torch.cat([p.grad.flatten() for p in policy.generator.parameters()]))


def test_reward_alone_has_no_prior(inputs: dict[str, Any]) -> None:
    _, totals = gradient(objective(inputs, config(prior_weight=0.0)))
    assert totals["loss"] == pytest.approx(totals["policy"], abs=1e-7)


def test_kl_prior_is_zero_at_the_base_and_not_after(inputs: dict[str, Any], tmp_path: Path) -> None:
    stage.tune(**inputs, tune=config(prior="kl"), out=tmp_path / "kl")
    rows = lines(tmp_path / "kl")
    assert rows[1]["tune/kl"] == 0 and rows[-1]["tune/kl"] > 0
    assert rows[2]["tune/loss"] == pytest.approx(rows[2]["tune/policy"] + 0.1 * rows[2]["tune/kl"], rel=1e-5)


def test_official_dropout_moves_the_ratio(inputs: dict[str, Any]) -> None:
    """As released: clipping acts, because the update sees other masks than the draws did (facts: only for that reason)."""
    made = objective(inputs, config(policy_dropout="official"))
    first, totals = gradient(made)
    assert totals["clip_fraction"] > 0.05 and not made[0].policy.generator.training
    made[0].policy.generator.zero_grad()
    again, _ = gradient(made)
    assert torch.equal(first, again)  # masks belong to (seed, step, image), too
    made[0].policy.generator.cls_embedding.dropout = 0.0
    for module in made[0].policy.generator.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    made[0].policy.generator.zero_grad()
    undropped, totals = gradient(made)
    assert totals["clip_fraction"] == 0
    shared, _ = gradient(objective(inputs, config()))
    torch.testing.assert_close(undropped, shared, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("field", "value", "also"),
    [
        ("lr", 2e-3, {}),
        ("weight_decay", 0.5, {}),
        ("beta1", 0.5, {}),
        ("beta2", 0.5, {}),
        ("max_grad_norm", 1e-9, {}),  # so small that AdamW's epsilon shows
        ("advantage_clip", 0.1, {}),
        ("ratio_clip", 0.0, {"policy_dropout": "official"}),
        ("prior_weight", 0.5, {}),
        ("policy_weight", 0.5, {}),
        ("temperature", 0.5, {"prior": "kl"}),
        ("context_noise", 0.5, {}),
        ("seed", 1, {}),
    ],
)
def test_every_knob_of_an_update_moves_the_weights(inputs: dict[str, Any], field: str, value: Any, also: dict[str, Any]) -> None:
    def weights_after(tune: TuneConfig) -> torch.Tensor:
        target, batch = objective(inputs, tune)
        optimizer = stage.optimizer_of(target.policy.generator, tune)
        for step in (1, 2):
            stage.update(target, optimizer, batch, step)
        return torch.cat([p.detach().flatten() for p in target.policy.generator.parameters()])

    plain_run, again, other = (weights_after(config(**also, **change)) for change in ({}, {}, {field: value}))
    assert torch.equal(plain_run, again) and not torch.allclose(plain_run, other, rtol=1e-4, atol=1e-7)


def test_vectors_are_tuned_too(inputs: dict[str, Any]) -> None:
    target, batch = objective(inputs, config())
    vectors = {name: p.detach().clone() for name, p in target.policy.generator.named_parameters() if p.dim() < 2}
    stage.update(target, stage.optimizer_of(target.policy.generator, config()), batch, 1)
    now = dict(target.policy.generator.named_parameters())
    assert vectors and all(not torch.equal(was, now[name]) for name, was in vectors.items())


def test_held_out_images_meet_the_same_noise_and_draws_at_every_step(inputs: dict[str, Any]) -> None:
    target, batch = objective(inputs, config(context_noise=0.5))
    assert target.look(batch, 1) == target.look(batch, 2)


def test_a_kl_prior_compares_with_the_tempered_base(inputs: dict[str, Any]) -> None:
    """Before the first update policy and base are one, at any temperature."""
    for temperature in (0.5, 2.0):
        _, totals = gradient(objective(inputs, config(prior="kl", temperature=temperature)))
        assert abs(totals["kl"]) < 1e-6


def test_temperature_and_noise_reach_the_draws(inputs: dict[str, Any]) -> None:
    (_, cold), (_, warm) = (gradient(objective(inputs, config(temperature=t))) for t in (0.1, 1.0))
    assert cold["reward_std"] < warm["reward_std"] and cold["clip_fraction"] == warm["clip_fraction"] == 0
    (_, clean), (_, noised) = (gradient(objective(inputs, config(context_noise=n))) for n in (0.0, 1.0))
    assert clean["ce"] != noised["ce"]


def test_bfloat16(inputs: dict[str, Any], tmp_path: Path) -> None:
    low = dataclasses.replace(inputs["model"], precision="bfloat16")
    stage.tune(**{**inputs, "model": low}, tune=config(), out=tmp_path / "low")
    state = load_file(tmp_path / "low" / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    stage.tune(**inputs, tune=config(), out=tmp_path / "full")
    first, second = lines(tmp_path / "low")[1]["tune/ce"], lines(tmp_path / "full")[1]["tune/ce"]
    assert first != second and first == pytest.approx(second, rel=0.02)


# --- the data in its order ---------------------------------------------------------------------


def test_order_is_whole_epochs_without_the_held_out(inputs: dict[str, Any]) -> None:
    examples = stage.Examples(inputs["model"], config(), inputs["subset"], inputs["tokens"])
    epoch = torch.cat([examples.order(step) for step in (1, 2, 3)])
    assert len(epoch.unique()) == 18 and not set(epoch.tolist()) & set(examples.held.tolist())
    assert not torch.equal(examples.order(1), examples.order(4))
    other = stage.Examples(inputs["model"], config(seed=5), inputs["subset"], inputs["tokens"])
    assert torch.equal(other.held, examples.held) and not torch.equal(other.order(1), examples.order(1))


def test_weight_decay_spares_vectors(tiny_policy: models.Policy) -> None:
    decayed, spared = stage.optimizer_of(tiny_policy.generator, config(weight_decay=0.5)).param_groups
    assert decayed["weight_decay"] == 0.5 and all(p.dim() >= 2 for p in decayed["params"])
    assert spared["weight_decay"] == 0 and {p.dim() for p in spared["params"]} == {1}


# --- killed and continued ----------------------------------------------------------------------

CHILD = """
import json, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from vapi import tune
from vapi.config import ModelConfig, TuneConfig
a = json.loads(sys.argv[1])
tune.tune(ModelConfig(**a["model"]), TuneConfig(**a["tune"]), Path(a["subset"]), Path(a["tokens"]), Path(a["out"]))
"""


def child(inputs: dict[str, Any], tune: TuneConfig, out: Path) -> subprocess.Popen[str]:
    """The stage in a process of its own."""
    arguments = {"model": plain(inputs["model"]), "tune": plain(tune), "out": str(out)}
    arguments |= {name: str(inputs[name]) for name in ("subset", "tokens")}
    environment = {**os.environ, "PYTHONPATH": str(Path(stage.__file__).parents[1])}
    return subprocess.Popen([sys.executable, "-c", CHILD, json.dumps(arguments)], env=environment, stderr=subprocess.PIPE, text=True)


def reached(project: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Wait until the run's own metrics show ``step``."""
    for _ in range(60_000):  # minutes, on a machine that is busy with other things
        found = list((project / ".vapi" / "resume" / "tune").glob("*/metrics.jsonl"))
        if process.poll() is not None or (found and len(found[0].read_text().splitlines()) > step):
            return
        time.sleep(0.005)
    pytest.fail(f"step {step} was never reached")


def test_kill_nine_and_continue(of_any: dict[str, Any], tmp_path: Path) -> None:
    tune = config(steps=40, checkpoint_every=7, holdout_every=20, sheet_every=20, context_noise=0.2)
    stage.tune(**of_any, tune=tune, out=tmp_path / "undisturbed")
    out, dice = tmp_path / "killed", random.Random(time.time_ns())
    for step in sorted(dice.sample(range(1, 38), 2)):
        process = child(of_any, tune, out)
        reached(tmp_path, step, process)
        time.sleep(dice.uniform(0, 0.02))
        process.kill()
        process.communicate()
        assert not out.exists()
    stage.tune(**of_any, tune=tune, out=out)
    assert same(tmp_path / "undisturbed", out)


OTHERS: dict[str, dict[str, Any]] = {
    "twice": {"updates_per_rollout": 2},
    "free": {"objective": "ar_grpo", "prior": "kl", "rewards": {"class": 1.0}},
    "decoder": {"objective": "tokenizer", "prior_weight": 0.0},
}


@pytest.mark.parametrize("kind", list(OTHERS))
def test_other_objectives_continue_with_the_same_bits(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    classifier = str(tmp_path / "classifier.safetensors")
    weights.save(features.random_twin(3), classifier, {})
    tune = config(**OTHERS[kind], classifier=classifier)
    stage.tune(**inputs, tune=tune, out=tmp_path / "whole")
    update = stage.update

    def until_three(objective: Any, optimizer: Any, batch: Any, step: int) -> dict[str, float]:
        if step == 3:
            raise KeyboardInterrupt
        return update(objective, optimizer, batch, step)

    monkeypatch.setattr(stage, "update", until_three)
    with pytest.raises(KeyboardInterrupt):
        stage.tune(**inputs, tune=tune, out=tmp_path / "again")
    monkeypatch.setattr(stage, "update", update)
    stage.tune(**inputs, tune=tune, out=tmp_path / "again")
    assert same(tmp_path / "whole", tmp_path / "again")
    networks = models.Networks.tuned(inputs["model"], tmp_path / "again")
    assert networks.changed.name == models.TUNED["tokenizer" if kind == "decoder" else "generator"]
    assert (networks.model.tokenizer != inputs["model"].tokenizer) == (kind == "decoder")
    networks.load()


def test_a_second_process_is_refused_and_sigterm_writes_a_checkpoint(
    inputs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tune = config(steps=200, checkpoint_every=1000, holdout_every=100, sheet_every=100)
    process = child(inputs, tune, tmp_path / "out")
    reached(tmp_path, 5, process)
    process.send_signal(signal.SIGSTOP)  # or it may be through before we have looked
    with pytest.raises(ValueError, match="another process is at work"):
        stage.tune(**inputs, tune=tune, out=tmp_path / "elsewhere")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    _, words = process.communicate()
    assert process.returncode == stage.INTERRUPTED == 75 and "the same command continues" in words
    assert not (tmp_path / "out").exists()
    stage.tune(**inputs, tune=tune, out=tmp_path / "out")
    assert "continuing after step" in capsys.readouterr().err
    stage.tune(**inputs, tune=tune, out=tmp_path / "undisturbed")
    assert same(tmp_path / "undisturbed", tmp_path / "out")


# --- refused before anything expensive ---------------------------------------------------------


def test_too_few_images_with_arithmetic(inputs: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"24 images, but tune.holdout_images 4 \+ tune.images_per_step 21 = 25"):
        stage.tune(**inputs, tune=config(images_per_step=21), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("label", [-1, 10])
def test_label_outside_the_classes(tiny_model: ModelConfig, tmp_path: Path, label: int) -> None:
    subset, tokens = write_inputs(tmp_path, tiny_model, labels=[0] * 23 + [label])
    with pytest.raises(ValueError, match=rf"1 labels lie outside the model's classes 0 .. 9: 023.png \({label}\)"):
        stage.tune(tiny_model, config(), subset, tokens, tmp_path / "out")


def test_tokens_of_another_tokenizer(inputs: dict[str, Any], tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="made by another tokenizer"):
        stage.tune(other, config(), inputs["subset"], inputs["tokens"], tmp_path / "out")


def test_tokens_of_another_subset(inputs: dict[str, Any], tmp_path: Path) -> None:
    fewer, _ = write_inputs(tmp_path, inputs["model"], count=20)
    with pytest.raises(ValueError, match="another subset"):
        stage.tune(inputs["model"], config(), fewer, inputs["tokens"], tmp_path / "out")


def test_codes_that_do_not_fit(inputs: dict[str, Any], tiny_policy: models.Policy) -> None:
    examples = stage.Examples(inputs["model"], config(), inputs["subset"], inputs["tokens"])
    whole = examples.tokens
    examples.tokens = dataclasses.replace(whole, codes=whole.codes + 32)
    with pytest.raises(ValueError, match=r"the generator knows 0 .. 31"):
        examples.fit(tiny_policy)
    examples.tokens = dataclasses.replace(whole, codes=whole.codes[:, :9])
    with pytest.raises(ValueError, match="9 codes per image, the generator draws 16"):
        examples.fit(tiny_policy)


@pytest.mark.parametrize("what", ["missing", "unexpected", "not"])
def test_checkpoint_that_does_not_fit(inputs: dict[str, Any], tmp_path: Path, what: str) -> None:
    state, meta = weights.read(inputs["model"].generator)
    if what == "missing":
        state.pop("norm.weight")
    elif what == "unexpected":
        state["extra.weight"] = torch.zeros(2)
    else:
        state["norm.weight"] = torch.ones(48)
    save_file(state, tmp_path / "bad.safetensors", metadata=meta)
    bad = dataclasses.replace(inputs["model"], generator=str(tmp_path / "bad.safetensors"))
    with pytest.raises(ValueError, match=f"does not fit the network:\n.*{what}"):
        stage.tune(**{**inputs, "model": bad}, tune=config(), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_groups_and_steps_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="at least 2 draws"):
        config(group_size=1)
    with pytest.raises(ValueError, match="tune.steps is 0"):
        config(steps=0)
    with pytest.raises(ValueError, match="nothing to optimise"):
        config(policy_weight=0.0, prior="kl")
    with pytest.raises(ValueError, match="tune.holdout_images"):
        config(holdout_images=0)


def test_output_that_cannot_be_written(inputs: dict[str, Any], tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("do not touch")
    with pytest.raises(ValueError, match="no stage of vapi wrote"):
        stage.tune(**inputs, tune=config(), out=theirs)
    assert [path.name for path in theirs.iterdir()] == ["thesis.tex"]


def test_disk_full_at_the_very_end_loses_no_step(inputs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Writing the weights is the last thing; the same command then has nothing left to compute."""
    save, calls = weights.save_file, []

    def full(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    weights.save_file = full
    try:
        with pytest.raises(ValueError, match="No space left on device.*make room and run the same command again"):
            stage.tune(**inputs, tune=config(checkpoint_every=1000), out=tmp_path / "out")
    finally:
        weights.save_file = save
    assert calls and not (tmp_path / "out").exists()
    stage.tune(**inputs, tune=config(checkpoint_every=1000), out=tmp_path / "out")
    assert "continuing after step 4 of 4" in capsys.readouterr().err
    told = data.read_json(tmp_path / "out/provenance.json")
    assert told["seconds_in_own_steps"] == 0 < told["seconds_per_step"], "its steps were another process's"
    stage.tune(**inputs, tune=config(checkpoint_every=1000), out=tmp_path / "undisturbed")
    assert same(tmp_path / "out", tmp_path / "undisturbed")


def test_disk_full_at_a_checkpoint(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk is full from step 3 on; with room again, the same command ends with the same bits."""
    update, limits = stage.update, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fills(*given: Any) -> dict[str, float]:
        if given[-1] == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2 * Path(inputs["model"].generator).stat().st_size, limits[1]))
        return update(*given)

    monkeypatch.setattr(stage, "update", fills)
    try:
        with pytest.raises(ValueError, match="cannot write the checkpoint .*File too large.* is intact.*run the same command again"):
            stage.tune(**inputs, tune=config(), out=tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.setattr(stage, "update", update)
    assert not (tmp_path / "out").exists()
    stage.tune(**inputs, tune=config(), out=tmp_path / "out")
    assert "continuing after step 2 of 4" in capsys.readouterr().err
    stage.tune(**inputs, tune=config(), out=tmp_path / "undisturbed")
    assert same(tmp_path / "out", tmp_path / "undisturbed")


def test_the_subset_taken_away_in_mid_run(inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run says so; with the folder back, the same command ends with the bits of an undisturbed one."""
    mine = {**inputs, "subset": tmp_path / "subset"}
    mine["subset"].mkdir()
    kept = data.read_subset(inputs["subset"])
    rows = [data.Row(kept.keys[i], i % 10, "", 16, 16, "RGB", kept.image(i), kept.sha256[i]) for i in range(len(kept))]
    data.write_subset(mine["subset"], rows, images_per_shard=1)  # more files than are kept open
    tuned = config(steps=14, holdout_every=14, sheet_every=14)
    update = stage.update

    def disturbed(*given: Any) -> dict[str, float]:
        if given[-1] == 3:
            mine["subset"].rename(tmp_path / "away")
        return update(*given)

    monkeypatch.setattr(stage, "update", disturbed)
    with pytest.raises(ValueError, match="subset was there and cannot be read any more .* run the same command again"):
        stage.tune(**mine, tune=tuned, out=tmp_path / "out")
    monkeypatch.setattr(stage, "update", update)
    (tmp_path / "away").rename(mine["subset"])
    stage.tune(**mine, tune=tuned, out=tmp_path / "out")
    stage.tune(**mine, tune=tuned, out=tmp_path / "undisturbed")
    assert same(tmp_path / "out", tmp_path / "undisturbed")


def test_unknown_reward_and_missing_network(inputs: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'mse'"):
        stage.tune(**inputs, tune=config(rewards={"mze": 1.0}), out=tmp_path / "out")
    with pytest.raises(ValueError, match="is not here"):
        stage.tune(**inputs, tune=config(rewards={"lpips": 1.0}, perceptual="data/none.safetensors"), out=tmp_path / "out")


def test_lpips_on_a_network_of_ours(inputs: dict[str, Any], tmp_path: Path) -> None:
    weights.save(features.random_twin(), tmp_path / "reward.safetensors", {})
    tuned = config(steps=1, rewards={"mse": 1.0, "lpips": 1.0}, perceptual=str(tmp_path / "reward.safetensors"))
    stage.tune(**inputs, tune=tuned, out=tmp_path / "out")
    assert lines(tmp_path / "out")[1]["tune/reward_lpips"] < 0
    assert "perceptual" in data.read_json(tmp_path / "out" / "config.json")["inputs"]


# --- stops before it does harm -----------------------------------------------------------------


def test_non_finite_reward_stops_before_the_update(inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def fragile(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        return images.mean((1, 2, 3)) / (0.0 if len(calls) > 4 else 1.0) * 0 + 1

    monkeypatch.setitem(rewards.REWARDS, "fragile", fragile)
    with pytest.raises(ValueError, match="step 2: reward_fragile is nan; stopped before the update"):
        stage.tune(**inputs, tune=config(rewards={"fragile": 1.0}), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where, name", [("output.weight", "ce"), ("nothing", "grad_norm")])
def test_non_finite_terms_are_named(inputs: dict[str, Any], where: str, name: str) -> None:
    target, batch = objective(inputs, config())
    optimizer = stage.optimizer_of(target.policy.generator, config())
    for key, parameter in target.policy.generator.named_parameters():
        if key == where:
            parameter.data.fill_(float("nan"))
    if where == "nothing":
        target.policy.generator.norm.weight.register_hook(lambda grad: grad * float("inf"))
    before = {k: v.clone() for k, v in target.policy.generator.state_dict().items()}
    with pytest.raises(ValueError, match=f"step 3: {name} is (nan|inf)"):
        stage.update(target, optimizer, batch, 3)
    after = target.policy.generator.state_dict()
    assert all(torch.equal(v, after[k]) or k == where for k, v in before.items())
