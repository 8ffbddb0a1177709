"""Ours equals LlamaGen's, VA-pi's and Janus's own code, on random weights: to 1e-5 in float32, codes and greedy draws exactly.

The answers of theirs are stored (tests/golden/make.py made them from checkouts); weights and inputs are made here
again. benchmarks/parity.py compares at full size.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import janus_world
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vapi import grpo, images, models, rewards
from vapi.config import ModelConfig, TuneConfig
from vapi.models import gpt, janus_files, llamagen, sampler, vq
from vapi.objective import Batch, Draws, Objective

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parent / "golden"))
import problems
import upstream

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, Tensor]:
    return {key: t.long() if t.dtype == torch.int16 else t for key, t in load_file(GOLDEN / f"{name}.safetensors").items()}


def equal(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def generator(config: gpt.GPTConfig) -> gpt.Transformer:
    network = gpt.Transformer(config)
    network.load_state_dict(problems.generator_state(config))
    return network.eval()


def tokenizer(name: str) -> vq.VQModel:
    network = vq.VQModel(problems.VQS[name])
    network.load_state_dict(problems.tokenizer_state(problems.VQS[name]))
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def lpips(tmp_path_factory: pytest.TempPathFactory) -> rewards.Lpips:
    """LPIPS through the files in which a user has it."""
    folder = tmp_path_factory.mktemp("vgg")
    vgg, lines = upstream.lpips_state(5)
    torch.save(vgg, folder / rewards.VGG_FILE)
    torch.save(lines, folder / rewards.LPIPS_FILE)
    return rewards.load_lpips("vgg", str(folder))


CONDITIONS = {"c2i": (problems.CLASSES, problems.LABELS), "t2i": (problems.T2I, problems.captions())}


@pytest.mark.parametrize("kind", CONDITIONS)
@torch.no_grad()
def test_teacher_forced_logits(kind: str) -> None:
    config, condition = CONDITIONS[kind]
    theirs = golden("generators")[f"{kind}.logits"]
    assert theirs.std() > 0.5
    equal(generator(config)(condition, problems.context(config)), theirs)


@pytest.mark.parametrize("guidance", problems.GREEDY)
@pytest.mark.parametrize("kind", CONDITIONS)
def test_greedy_sampling_with_and_without_guidance(kind: str, guidance: float) -> None:
    config, condition = CONDITIONS[kind]
    drawn = sampler.generate(generator(config), condition, [0] * len(condition), top_k=1, guidance=guidance)
    assert torch.equal(drawn, golden("generators")[f"{kind}.greedy.{guidance}"])


@pytest.mark.parametrize("guidance, power", problems.POWER)
def test_greedy_sampling_with_power_cosine_guidance(guidance: float, power: float) -> None:
    how = {"guidance": guidance, "guidance_schedule": "power-cosine", "guidance_power": power}
    drawn = sampler.generate(generator(problems.CLASSES), problems.LABELS, [0] * len(problems.LABELS), top_k=1, **how)
    assert torch.equal(drawn, golden("generators")[f"c2i.power-cosine.{guidance}.{power}"])


def test_the_guidances_differ() -> None:
    answers = golden("generators")
    drawn = [answers[f"c2i.greedy.{guidance}"] for guidance in problems.GREEDY]
    drawn += [answers[f"c2i.power-cosine.{guidance}.{power}"] for guidance, power in problems.POWER]
    assert not any(torch.equal(one, other) for i, one in enumerate(drawn) for other in drawn[:i])


@pytest.mark.parametrize("name", problems.VQS)
@torch.no_grad()
def test_tokenizer(name: str) -> None:
    answers, network = golden("tokenizers"), tokenizer(name)
    codes = network.encode(problems.images())
    equal(network.quant_conv(network.encoder(problems.images())), answers[f"{name}.before"])
    assert torch.equal(codes, answers[f"{name}.codes"]) and len(codes.unique()) > 10
    equal(network.decode(codes[:1]), answers[f"{name}.decoded"])


@torch.no_grad()
def test_lpips(lpips: rewards.Lpips) -> None:
    equal(-lpips(problems.images(), problems.images().flip(-1)), golden("others")["lpips"])


@pytest.mark.parametrize("width, height", problems.CROPS)
def test_adm_center_crop_of_odd_sizes(width: int, height: int) -> None:
    from PIL import Image

    ours = images.center_crop(Image.fromarray(problems.photo(width, height)), problems.SIDE // 2)
    assert torch.equal(torch.from_numpy(ours), golden("others")[f"crop.{width}x{height}"])


def test_the_step_is_the_released_one_with_dropout_off(lpips: rewards.Lpips) -> None:
    """Loss and gradient to 1e-6 relative, with the draws and rewards that the released loop had."""
    answers = golden("step")
    policy = llamagen.LlamaGen(generator(problems.CLASSES), tokenizer("vq16"), problems.SIDE)
    tune = TuneConfig(rewards={"mse": 1.0, "lpips": 1.0}, group_size=problems.STEP_GROUP, ratio_clip=0.2, prior_weight=0.1)
    objective = Objective(policy, tune, rewards.Reward(tune.rewards, functions={"lpips": lpips}))
    pixels = problems.images()
    batch = Batch(torch.arange(len(pixels)), pixels, policy.encode(pixels), policy.condition(problems.LABELS[: len(pixels)]))
    assert torch.equal(batch.codes, answers["step.codes"])

    draws = answers["step.draws"].unflatten(0, (len(pixels), problems.STEP_GROUP))
    theirs = answers["step.rewards"].view(draws.shape[:2])
    equal(objective.score(draws, pixels)[0], theirs)
    # the very same rewards from here on: an advantage divides by their small spread, and would magnify a rounding
    drawn = Draws(draws, grpo.advantages(theirs, tune.advantage_clip))
    loss, terms = objective.loss(objective.predict(policy, batch.condition, batch.codes), batch.codes, drawn, 1, {})
    assert terms["clip_fraction"] == 0
    assert loss.item() == pytest.approx(answers["step.loss"].item(), rel=1e-6)
    loss.backward()
    gradient = {name: p.grad for name, p in policy.generator.named_parameters() if p.grad is not None}
    released = {name.removeprefix("gradient."): g for name, g in answers.items() if name.startswith("gradient.")}
    assert gradient.keys() == released.keys()
    difference = sum((gradient[name] - g).double().square().sum() for name, g in released.items())
    size = sum(g.double().square().sum() for g in released.values())
    assert float((difference / size).sqrt()) < 1e-6


# --- Janus -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def janus_policy(tmp_path_factory: pytest.TempPathFactory) -> models.Policy:
    folder = tmp_path_factory.mktemp("janus")
    janus_world.write_words(folder)
    (folder / "config.json").write_text(janus_world.config().to_json_string(use_diff=False))
    save_file(problems.janus_state(), folder / "model.safetensors")
    return models.load(ModelConfig(policy="janus", generator=str(folder), tokenizer=str(folder), image_size=16, device="cpu"))


@torch.no_grad()
def test_janus_predicts_what_deepseeks_code_does(janus_policy: models.Policy) -> None:
    """Three captions of three lengths in one batch, each as if it were alone."""
    equal(janus_policy.logits(janus_policy.condition(problems.ASKED), problems.janus_codes()), golden("janus")["logits"])


def test_janus_draws_what_deepseeks_code_does(janus_policy: models.Policy) -> None:
    drawn = janus_policy.generate(janus_policy.condition(problems.ASKED), [0, 1, 2], top_k=1, guidance=problems.JANUS_GUIDANCE)
    assert torch.equal(drawn, golden("janus")["greedy"]) and len(drawn.unique()) > 5


@torch.no_grad()
def test_janus_codes_and_pixels_are_those_of_deepseeks_code(janus_policy: models.Policy) -> None:
    codes = janus_policy.encode(problems.small_images())
    assert torch.equal(codes, golden("janus")["codes"]) and len(codes.unique()) > 5
    equal(janus_policy.decode(codes), golden("janus")["decoded"])


def test_janus_prompts_are_those_of_deepseeks_code(janus_policy: models.Policy) -> None:
    for i, caption in enumerate(problems.ASKED):
        assert janus_policy.prompts.text(caption) == bytes(golden("janus")[f"prompt.{i}"].tolist()).decode()


def test_deepseeks_names_of_all_tensors_are_known() -> None:
    """Every one of theirs has a name in transformers' layout and back, but for what neither uses."""
    theirs = bytes(golden("janus")["names"].tolist()).decode().split("\n")
    unused = [name for name in theirs if name.startswith(janus_files.UNUSED) or name.endswith(janus_files.COUNTER)]
    assert 0 < len(unused) < len(theirs) / 5
    for name in set(theirs) - set(unused):
        assert janus_files.to_deepseek(janus_files.to_transformers(name)) == name
    ours = {janus_files.to_transformers(name) for name in set(theirs) - set(unused)}
    merged = {re.sub(r"(vision_model\..*\.)[qkv]_proj", r"\1qkv", name) for name in problems.janus_state()}
    assert ours == merged
