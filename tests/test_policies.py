"""The contract of a base model: causality, sampler equals teacher forcing, independence of batch mates."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import CAPTIONED_GPT, CAPTIONS, TINY_GPT, TINY_VQ, write_tiny

from vapi import models
from vapi.config import ModelConfig
from vapi.models import gpt, sampler, vq, weights

POLICIES = {"llamagen": "tiny", "llamagen, captions": "captioned", "janus": "janus"}
OF_CAPTIONS = [name for name in POLICIES if name != "llamagen"]


@pytest.fixture(params=POLICIES)
def asked(request: pytest.FixtureRequest) -> tuple[models.Policy, list]:
    """A policy, and four things that it can be asked for."""
    policy = request.getfixturevalue(f"{POLICIES[request.param]}_policy")
    return policy, [3, 0, 9, 5] if policy.num_classes else list(CAPTIONS)


def test_every_policy_is_tested() -> None:
    assert {name.split(",")[0] for name in POLICIES} == set(models.POLICIES)


def codes_of(policy: models.Policy, rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(policy.vocab, (rows, policy.num_codes), generator=torch.Generator().manual_seed(seed))


def test_causality(asked: tuple[models.Policy, list]) -> None:
    policy, things = asked
    condition, context = policy.condition(things[:2]), codes_of(policy, 2)
    before = policy.logits(condition, context)
    for t in (0, 5, policy.num_codes - 1):
        changed = context.clone()
        changed[:, t:] = (changed[:, t:] + 1) % policy.vocab
        after = policy.logits(condition, changed)
        assert torch.equal(before[:, : t + 1], after[:, : t + 1])
        if t + 1 < policy.num_codes:
            assert not torch.equal(before[:, t + 1], after[:, t + 1])


def test_what_is_asked_for_matters(asked: tuple[models.Policy, list]) -> None:
    policy, things = asked
    context = codes_of(policy, 1)
    one, other = (policy.logits(policy.condition([thing]), context) for thing in things[:2])
    assert not torch.allclose(one[:, 0], other[:, 0])


@torch.no_grad()
def test_sampler_sees_the_teacher_forced_logits(asked: tuple[models.Policy, list]) -> None:
    policy, things = asked
    condition, context = policy.condition(things[:3]), codes_of(policy, 3)
    model = policy.generator
    embedded, starts = model.front(condition, guided=False)
    cache = model.new_cache(*embedded.shape[:2])
    stepped = [model.prefill(embedded, cache, starts)]
    stepped += [model.step(context[:, t - 1], t, cache, starts) for t in range(1, policy.num_codes)]
    torch.testing.assert_close(torch.stack(stepped, 1), policy.logits(condition, context), rtol=1e-5, atol=1e-5)


def test_rows_do_not_depend_on_batch_mates(asked: tuple[models.Policy, list]) -> None:
    policy, things = asked
    condition, context = policy.condition(things), codes_of(policy, 4)
    together = policy.logits(condition, context)
    alone = torch.cat([policy.logits(policy.condition(things[i : i + 1]), context[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_image_n_depends_on_seed_n_alone(asked: tuple[models.Policy, list], guidance: float) -> None:
    policy, things = asked
    labels = policy.condition(things)
    all_at_once = policy.generate(labels, [10, 11, 12, 13], guidance=guidance)
    one = policy.generate(labels[2:3], [12], guidance=guidance)
    assert torch.equal(all_at_once[2:3], one)
    assert not torch.equal(all_at_once[0], policy.generate(labels[:1], [11], guidance=guidance)[0])


@torch.no_grad()
@pytest.mark.parametrize("kind", OF_CAPTIONS)
def test_guidance_pairs_a_caption_with_its_own_image(request: pytest.FixtureRequest, kind: str) -> None:
    """Row n's guided prediction is made of row n's two predictions, whatever its neighbours are asked for."""
    policy = request.getfixturevalue(f"{POLICIES[kind]}_policy")
    greedy = policy.generate(policy.condition(CAPTIONS), [0] * 4, top_k=1, guidance=2.5)
    for n, caption in enumerate(CAPTIONS):
        condition = policy.condition([caption])
        said = policy.logits(condition, greedy[n : n + 1])
        nothing = policy.logits(policy.generator.null(condition), greedy[n : n + 1])
        assert torch.equal((nothing + 2.5 * (said - nothing)).argmax(-1)[0], greedy[n])


def test_guidance_one_is_none_and_two_is_not(tiny_policy: models.Policy) -> None:
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sampler.guide(logits, 1.0), logits)
    torch.testing.assert_close(sampler.guide(logits, 2.0), 2 * logits[:2] - logits[2:])


def test_pick_follows_the_distribution() -> None:
    p = torch.tensor([0.1, 0.0, 0.6, 0.3])
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    counts = torch.bincount(sampler.pick(p.expand(10_000, 4), u), minlength=4) / 10_000
    torch.testing.assert_close(counts, p, atol=1e-3, rtol=0)
    assert sampler.pick(torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([0.999999999999], dtype=torch.float64)).item() == 1


def test_top_k_and_top_p_keep_the_likeliest() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    assert torch.isinf(sampler.keep_likely(logits, 2, 1.0)).tolist() == [[False, False, True, True]]
    assert torch.isinf(sampler.keep_likely(logits, 0, 0.6)).tolist() == [[False, False, True, True]]
    assert torch.equal(sampler.keep_likely(logits, 0, 1.0), logits)


def test_low_temperature_is_greedy(asked: tuple[models.Policy, list]) -> None:
    policy, things = asked
    condition = policy.condition([things[1], things[1]])
    cold = policy.generate(condition, [1, 2], temperature=1e-5)
    assert torch.equal(cold[0], cold[1])
    greedy = policy.logits(condition, cold).argmax(-1)
    assert torch.equal(greedy, cold)


def test_a_batch_filled_up_changes_no_bit(asked: tuple[models.Policy, list]) -> None:
    policy, things = asked
    condition = policy.condition(things)
    filled = policy.generate(condition, [3, 1, 4, 1], 3, guidance=1.5)
    assert torch.equal(filled[3:], policy.generate(condition[[3, 3, 3]], [1, 1, 1], guidance=1.5)[:1])


def test_decode_of_encode_has_the_shape_of_the_image(asked: tuple[models.Policy, list]) -> None:
    policy, _ = asked
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = policy.encode(images)
    assert codes.shape == (2, 16) and codes.max() < 32
    assert policy.decode(codes).shape == images.shape


def test_nearest_code_is_the_nearest() -> None:
    torch.manual_seed(0)
    quantizer = vq.Quantizer(TINY_VQ)
    z = torch.randn(2, 4, 3, 3)
    unit = torch.nn.functional.normalize(z, dim=1).flatten(2).transpose(1, 2)
    distance = torch.cdist(unit.double(), quantizer.entries().double().expand(2, -1, -1))
    assert torch.equal(quantizer.nearest(z), distance.argmin(-1))


@pytest.mark.parametrize("kind", POLICIES)
def test_save_and_load_again(request: pytest.FixtureRequest, kind: str, tmp_path: Path) -> None:
    model = request.getfixturevalue(f"{POLICIES[kind]}_model")
    policy = models.load(model)
    policy.save(tmp_path / "m.safetensors")
    again = models.load(model, tmp_path / "m.safetensors")
    for (name, a), (_, b) in zip(policy.generator.state_dict().items(), again.generator.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert again.generator.config == policy.generator.config


@pytest.mark.parametrize("wrap", ["", "model", "module", "state_dict"])
def test_reads_torch_checkpoints(tiny_model: ModelConfig, tmp_path: Path, wrap: str) -> None:
    state, _ = weights.read(tiny_model.tokenizer)
    torch.save({wrap: state} if wrap else state, tmp_path / "vq.pt")
    read, _ = weights.read(tmp_path / "vq.pt")
    assert weights.shapes(read) == weights.shapes(state)


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    torch.save({"model": Path("x")}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="not executed"):
        weights.read(tmp_path / "bad.pt")


def test_missing_and_extra_keys_are_listed(tiny_model: ModelConfig, tmp_path: Path) -> None:
    state, _ = weights.read(tiny_model.generator)
    state["surplus"] = state.pop("norm.weight")
    torch.save(state, tmp_path / "bad.pt")
    config = dataclasses.replace(tiny_model, generator=str(tmp_path / "bad.pt"))
    with pytest.raises(ValueError, match="names no heads"):
        models.load(config)
    with pytest.raises(ValueError, match="(?s)missing norm.weight.*unexpected surplus"):
        weights.fill(gpt.Transformer(TINY_GPT), state, "bad.pt")


def test_another_size_is_refused(tiny_model: ModelConfig, tmp_path: Path) -> None:
    wide = write_tiny(tmp_path / "wide", gpt_config=dataclasses.replace(TINY_GPT, codes=64))
    with pytest.raises(ValueError, match="64 codes"):
        models.load(wide)
    other = write_tiny(tmp_path / "vocab", vq_config=dataclasses.replace(TINY_VQ, vocab=48))
    with pytest.raises(ValueError, match="do not belong together"):
        models.load(other)
    with pytest.raises(ValueError, match="not the weights of a LlamaGen generator"):
        models.load(dataclasses.replace(tiny_model, generator=tiny_model.tokenizer))
    with pytest.raises(ValueError, match="not the weights of a LlamaGen tokenizer"):
        models.load(dataclasses.replace(tiny_model, tokenizer=tiny_model.generator))


def test_half_a_file_and_no_file(tiny_model: ModelConfig, tmp_path: Path) -> None:
    half = Path(tiny_model.generator).read_bytes()[:1000]
    (tmp_path / "half.safetensors").write_bytes(half)
    with pytest.raises(ValueError, match="fetch it again"):
        weights.read(tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="dvc pull"):
        weights.read("data/models/nowhere.safetensors")


def test_misspelt_policy(tiny_model: ModelConfig) -> None:
    with pytest.raises(ValueError, match="did you mean 'llamagen'"):
        models.load(dataclasses.replace(tiny_model, policy="lamagen"))


def test_class_out_of_range(tiny_policy: models.Policy) -> None:
    with pytest.raises(ValueError, match="0 .. 9"):
        tiny_policy.condition([10])  # the null class is for guidance


def test_captions_in_words_or_as_features(captioned_policy: models.Policy) -> None:
    policy = captioned_policy
    features = policy.condition([CAPTIONS[1], CAPTIONS[0], CAPTIONS[1]])
    assert features.shape == (3, 9, 177) and torch.equal(policy.condition(features), features)
    assert torch.equal(features[0], features[2]) and features[..., -1].sum(-1).tolist() == [2, 6, 2]
    with pytest.raises(ValueError, match="9 positions x 176 features, and these have 9 x 64"):
        policy.condition(torch.zeros(1, 9, 65))


def test_a_text_encoder_that_does_not_belong(captioned_model: ModelConfig, tiny_model: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="draws from captions .9 x 176 features.*model.text_encoder is empty"):
        models.load(dataclasses.replace(captioned_model, text_encoder=""))
    with pytest.raises(ValueError, match="draws from class ids, but model.text_encoder is 'words'"):
        models.load(dataclasses.replace(tiny_model, text_encoder="words"))
    narrow = write_tiny(tmp_path / "narrow", gpt_config=dataclasses.replace(CAPTIONED_GPT, caption_dim=24))
    policy = models.load(dataclasses.replace(narrow, text_encoder="words"))
    with pytest.raises(ValueError, match="words gives 176 features per word, the generator reads 24"):
        policy.condition(["a seven"])
