"""Sampling: what it sees, what it draws, in which shapes, and how much room it takes."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_GPT, TINY_VQ, write_tiny
from torch import Tensor

from vapi import models
from vapi.models import gpt, graphs, memory, sampler
from vapi.models.sampler import Sampling

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(), reason="interprets a kernel of Triton's on a CPU"
)
PLAIN: Sampling = {}
GUIDED: Sampling = {"guidance": 2.0, "temperature": 0.9}
EVERYTHING: Sampling = {
    "guidance": 3.0,
    "temperature": 0.8,
    "top_k": 20,
    "top_p": 0.9,
    "guidance_schedule": "power-cosine",
    "guidance_power": 1.5,
}
SETTINGS = pytest.mark.parametrize("how", [PLAIN, GUIDED, EVERYTHING], ids=["plain", "guided", "everything"])


def captioned() -> tuple[gpt.Transformer, Tensor]:
    """A generator with a prefix of five caption positions, and three captions of two, five and one words."""
    torch.manual_seed(3)
    model = gpt.Transformer(dataclasses.replace(TINY_GPT, classes=0, caption_dim=24, prefix=5)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    there = torch.tensor([[0.0, 0, 0, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])[..., None]
    return model, torch.cat([torch.randn(3, 5, 24) * there, there], dim=-1)


# --- what the sampler sees ---------------------------------------------------------------------


def seen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The predictions from which codes are chosen, position by position, as they come."""
    kept: list[Tensor] = []
    choose = sampler.choose

    def keeps(logits: Tensor, *rest: Any) -> Tensor:
        kept.append(logits)
        return choose(logits, *rest)

    monkeypatch.setattr(sampler, "choose", keeps)
    return kept


@torch.no_grad()
def test_it_sees_the_teacher_forced_logits(tiny_policy: models.Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    predictions = seen(monkeypatch)
    condition = tiny_policy.condition([3, 1, 4])
    codes = tiny_policy.generate(condition, [1, 2, 3], temperature=0.7)
    torch.testing.assert_close(torch.stack(predictions, 1), tiny_policy.logits(condition, codes), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_with_captions_it_does_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefix of several positions; guided, both halves at once."""
    model, captions = captioned()
    predictions = seen(monkeypatch)
    codes = sampler.generate(model, captions, [1, 2, 3])
    torch.testing.assert_close(torch.stack(predictions, 1), model(captions, codes), rtol=1e-5, atol=1e-5)
    predictions.clear()
    codes = sampler.generate(model, captions, [1, 2, 3], guidance=3.0)
    both = torch.cat([captions, model.cls_embedding.null(captions)])
    conditional, unconditional = model(both, codes.repeat(2, 1)).chunk(2)
    torch.testing.assert_close(torch.stack(predictions, 1), unconditional + 3 * (conditional - unconditional), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_cache_in_place_equals_one_that_grows(tiny_policy: models.Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit; the growing one is the plainest there is."""
    grown: dict[int, tuple[Tensor, Tensor]] = {}

    def grows(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, position: int, starts: None) -> Tensor:
        if position:
            before = grown[cache.data_ptr()]
            k, v = torch.cat([before[0], k], dim=2), torch.cat([before[1], v], dim=2)
        grown[cache.data_ptr()] = k, v
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)

    condition = tiny_policy.condition([3, 1])
    predictions = seen(monkeypatch)
    tiny_policy.generate(condition, [1, 2])
    in_place = torch.stack(predictions)
    predictions.clear()
    monkeypatch.setattr(gpt, "attend", grows)
    tiny_policy.generate(condition, [1, 2])
    assert torch.equal(torch.stack(predictions), in_place) and len(grown) == TINY_GPT.layers


def test_what_lies_in_the_cache_beyond_the_filled_part_is_never_read(tiny_policy: models.Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    clean = tiny_policy.generate(tiny_policy.condition([5]), [7])
    new_cache = gpt.Transformer.new_cache
    monkeypatch.setattr(gpt.Transformer, "new_cache", lambda self, *room: new_cache(self, *room).fill_(torch.nan))
    assert torch.equal(tiny_policy.generate(tiny_policy.condition([5]), [7]), clean)


# --- shapes ------------------------------------------------------------------------------------


@SETTINGS
def test_a_batch_filled_up_changes_no_bit(tiny_policy: models.Policy, monkeypatch: pytest.MonkeyPatch, how: Sampling) -> None:
    """Images at the same place of a batch of the same shape see the same predictions to the bit, whoever else is there."""
    predictions = seen(monkeypatch)

    def drawn(labels: list[int], seeds: list[int], rows: int) -> tuple[Tensor, Tensor]:
        predictions.clear()
        codes = tiny_policy.generate(tiny_policy.condition(labels), seeds, images_per_batch=rows, **how)
        return codes, torch.stack(predictions).unflatten(0, (-1, TINY_GPT.codes)).transpose(1, 2).flatten(0, 1)

    codes, logits = drawn([0, 1, 2, 3, 4, 5, 6], [10, 11, 12, 13, 14, 15, 16], 4)
    assert len(logits) == 8  # the last batch has a place to fill
    others, theirs = drawn([0, 1, 2, 3, 4, 5, 6, 9], [10, 11, 12, 13, 14, 15, 16, 99], 4)
    assert torch.equal(codes, others[:7]) and torch.equal(logits[:7], theirs[:7])
    last, last_logits = drawn([4, 5, 6], [14, 15, 16], 4)  # another process's share
    assert torch.equal(last, codes[4:]) and torch.equal(last_logits[:3], logits[4:7])


@SETTINGS
def test_another_shape_draws_the_same_codes(tiny_policy: models.Policy, how: Sampling) -> None:
    labels, seeds = tiny_policy.condition(list(range(10))), list(range(10))
    together = tiny_policy.generate(labels, seeds, **how)
    for rows in (3, 10, 16):
        assert torch.equal(tiny_policy.generate(labels, seeds, images_per_batch=rows, **how), together), rows


def test_the_stream_gives_the_images_of_each_batch_in_order(tiny_policy: models.Policy) -> None:
    batches = [(tiny_policy.condition([n, n + 1]), [n, n + 50]) for n in range(3)]
    found = list(sampler.stream(tiny_policy, batches, 2, contextlib.nullcontext(), temperature=0.5))
    assert len(found) == 3
    for image, batch in zip(found, batches, strict=True):
        assert torch.equal(image, tiny_policy.decode(tiny_policy.generate(*batch, temperature=0.5)))


def test_a_stream_begins_before_it_knows_its_end(tiny_policy: models.Policy) -> None:
    def endless() -> Iterator[tuple[Tensor, list[int]]]:
        while True:
            yield tiny_policy.condition([1]), [1]

    assert next(sampler.stream(tiny_policy, endless(), 1, contextlib.nullcontext())).shape == (1, 3, 16, 16)


def test_one_further_than_its_reader() -> None:
    """While an item is looked at, the next is at work, and no more than that; what fails, fails in its turn."""
    begun: list[int] = []
    second = threading.Event()

    def work(item: int) -> int:
        begun.append(item)
        if item == 1:
            second.set()
        if item == 3:
            raise ValueError("three")
        return 10 * item

    results = sampler.ahead(work, range(5))
    assert next(results) == 0 and second.wait(60) and begun == [0, 1]
    assert next(results) == 10 and 3 not in begun
    assert next(results) == 20
    with pytest.raises(ValueError, match="three"):
        next(results)
    assert list(sampler.ahead(work, [])) == [] and list(sampler.ahead(work, [7])) == [70]


def test_decoding_in_parts_gives_the_same_images(tiny_policy: models.Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(32, (5, 16), generator=torch.Generator().manual_seed(0))
    whole = sampler.decode(tiny_policy, codes)
    monkeypatch.setattr(memory, "CPU_DECODE_BYTES", 2 * tiny_policy.footprint().decoded)
    sizes = []
    decode = tiny_policy.tokenizer.decode
    monkeypatch.setattr(tiny_policy.tokenizer, "decode", lambda part: (sizes.append(len(part)), decode(part))[1])
    torch.testing.assert_close(sampler.decode(tiny_policy, codes), whole)
    assert sizes == [2, 2, 1]


# --- arithmetic --------------------------------------------------------------------------------


def test_under_autocast_weights_are_cast_once_and_positions_never(tiny_policy: models.Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    predictions = seen(monkeypatch)
    model = tiny_policy.generator
    low = sampler.lowered(model, torch.bfloat16)
    assert {weight.dtype for weight in low.parameters()} == {torch.bfloat16} and low.rotary.dtype == torch.float32
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert sampler.lowered(model, torch.float32) is model
    condition = tiny_policy.condition([1, 2])
    with torch.autocast("cpu", torch.bfloat16):
        tiny_policy.generate(condition, [1, 2])
    sampler.generate(low, condition, [1, 2])
    sampler.generate(model, condition, [1, 2])
    autocast, cast, whole = torch.stack(predictions).unflatten(0, (3, -1))
    assert torch.equal(autocast, cast) and not torch.equal(autocast[0], whole[0])


# --- guidance ----------------------------------------------------------------------------------


def test_constant_guidance_is_constant() -> None:
    assert sampler.guidance_scales(2.5, "constant", 2.0, 6).tolist() == [2.5] * 6


def test_power_cosine_is_the_released_formula() -> None:
    """1 + (s - 1) (1 - cos(pi t)) / 2 with t = (i / n) ** power over the n codes after the first, which has all of it."""
    scales = sampler.guidance_scales(3.0, "power-cosine", 2.0, 5).tolist()
    assert scales == pytest.approx([3.0, 1.0, *(1 + (1 - math.cos(math.pi * t)) for t in (1 / 16, 1 / 4, 9 / 16))])
    low = sampler.guidance_scales(3.0, "power-cosine", 4.0, 5)
    assert (low[2:] < torch.tensor(scales[2:])).all() and (low.diff()[1:] > 0).all()


def test_guidance_that_is_one_for_now_gives_the_conditional_rows_to_the_bit() -> None:
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sampler.guide(logits, torch.ones(())), logits[:3])


def test_the_schedule_reaches_the_predictions(tiny_policy: models.Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    predictions = seen(monkeypatch)
    condition = tiny_policy.condition([2])
    codes = tiny_policy.generate(condition, [3], **EVERYTHING)
    null = torch.tensor([tiny_policy.num_classes])
    with torch.no_grad():
        conditional, unconditional = (tiny_policy.logits(what, codes)[0] for what in (condition, null))
    scales = sampler.guidance_scales(3.0, "power-cosine", 1.5, 16).unsqueeze(-1)
    torch.testing.assert_close(torch.cat(predictions), unconditional + scales * (conditional - unconditional), rtol=1e-4, atol=1e-4)


def test_only_guidance_takes_rows(tiny_policy: models.Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    new_cache = gpt.Transformer.new_cache
    monkeypatch.setattr(gpt.Transformer, "new_cache", lambda self, count, prefix: (rows.append(count), new_cache(self, count, prefix))[1])
    for guidance in (1.0, 1.5):
        tiny_policy.generate(tiny_policy.condition([1, 2, 3]), [1, 2, 3], guidance=guidance, guidance_schedule="power-cosine")
    assert rows == [3, 6]


# --- top-k, top-p ------------------------------------------------------------------------------


def kept_one_by_one(logits: list[float], top_k: int, top_p: float) -> set[int]:
    """Codes in the order of their probability, until there are enough of them, or of it."""
    order = sorted(range(len(logits)), key=lambda code: -logits[code])
    order = order[:top_k] if top_k else order
    weights = [math.exp(logits[code]) for code in order]
    kept, held = set(), 0.0
    for code, weight in zip(order, weights, strict=True):
        if held > top_p * sum(weights):
            break
        kept.add(code)
        held += weight
    return kept


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (1, 1.0), (7, 1.0), (0, 0.5), (0, 0.93), (12, 0.8), (500, 0.01)])
def test_what_is_kept_is_what_a_plain_count_keeps(top_k: int, top_p: float) -> None:
    logits = 2 * torch.randn(40, 30, generator=torch.Generator().manual_seed(top_k))
    kept = sampler.keep_likely(logits, top_k, top_p).isfinite()
    for row, found in zip(logits.tolist(), kept, strict=True):
        assert set(found.nonzero().flatten().tolist()) == kept_one_by_one(row, top_k, top_p)


# --- memory ------------------------------------------------------------------------------------

XXL = gpt.GPTConfig(dim=1536, layers=48, heads=24, hidden=4096, vocab=16384, codes=576, classes=1000)


def test_a_cache_takes_what_the_footprint_says() -> None:
    model = gpt.Transformer(TINY_GPT)
    for dtype in (torch.float32, torch.bfloat16):
        need, more = (memory.footprint(config, 0, TINY_VQ, dtype, False) for config in (TINY_GPT, dataclasses.replace(TINY_GPT, layers=4)))
        assert more.image - need.image == model.to(dtype).new_cache(1).nbytes  # two layers more
    count = sum(weight.numel() for weight in model.parameters())
    assert memory.footprint(TINY_GPT, count, TINY_VQ, torch.bfloat16, False).weights == sum(weight.nbytes for weight in model.parameters())


def test_guidance_halves_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 40 << 30)
    cpu = torch.device("cpu")
    plain, guided = (memory.images_per_batch(memory.footprint(XXL, 1_400_000_000, TINY_VQ, torch.bfloat16, g), cpu) for g in (False, True))
    assert (plain, guided) == (128, 64)


def test_where_not_even_one_image_fits() -> None:
    need = memory.Footprint(0, 5 << 30, 0)
    with pytest.raises(ValueError, match=r"4.0 GiB are free on cpu, too few to sample: .* one image 5.00"):
        memory.images_per_batch(need, torch.device("cpu"))


def test_out_of_memory_says_what_to_turn_and_what_would_fit() -> None:
    need = memory.Footprint(0, 1 << 30, 0)
    words = memory.out_of_memory(64, need, free=20 << 30)
    assert "64 images at a time, 1024 MiB each; evaluate.images_per_batch 16 would" in words and "bfloat16" in words
    assert "images_per_batch 32 would" in memory.out_of_memory(64, need, free=900 << 30)  # half, where arithmetic knows no better
    assert "images_per_batch 1 would" in memory.out_of_memory(2, need, free=0)


def test_an_allocator_that_fails_while_sampling_is_put_into_words(tiny_policy: models.Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: gpt.Transformer, *room: int) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpt.Transformer, "new_cache", fails)
    with pytest.raises(ValueError, match=r"sampling 3 images at a time.*evaluate.images_per_batch 1 would probably fit"):
        tiny_policy.generate(tiny_policy.condition([1, 2]), [1, 2], images_per_batch=3)


# --- the recorded loop -------------------------------------------------------------------------


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop's parts on a CPU: the kernel interpreted by Triton (conftest), nothing compiled, nothing recorded."""
    monkeypatch.setattr(graphs, "_compiled", lambda kind: (kind.before, kind.after))


@needs_triton
@pytest.mark.parametrize("how", [PLAIN, EVERYTHING], ids=["plain", "everything"])
def test_the_loop_of_a_gpu_draws_the_same_codes(tiny_policy: models.Policy, interpreted: None, how: Sampling) -> None:
    condition, seeds = tiny_policy.condition([3, 1]), [4, 5]
    found = graphs.Loops().generate(tiny_policy.generator, condition, seeds, **how)
    assert torch.equal(found, tiny_policy.generate(condition, seeds, **how))


@needs_triton
def test_the_loop_of_a_gpu_draws_the_same_codes_of_janus(janus_policy: models.Policy, interpreted: None) -> None:
    """For captions of any length up to the loop's."""
    loops = graphs.Loops()
    for caption in ("nine", "a red seven left of a blue one"):
        condition, before = janus_policy.condition([caption]), loops.last
        found = loops.generate(janus_policy.generator, condition, [4], **EVERYTHING)
        assert torch.equal(found, janus_policy.generate(condition, [4], **EVERYTHING))
        assert before in (None, loops.last), "recorded once"


@needs_triton
def test_the_loop_takes_captions_and_other_temperatures(interpreted: None) -> None:
    model, captions = captioned()
    loops = graphs.Loops()
    for temperature in (1.0, 0.5):  # the second after what the first left behind
        for guidance, which in ((1.0, slice(0, 2)), (3.0, slice(2, 3))):
            how: Sampling = {"temperature": temperature, "guidance": guidance}
            seeds = [1, 2][: len(captions[which])]
            found = loops.generate(model, captions[which], seeds, **how)
            assert torch.equal(found, sampler.generate(model, captions[which], seeds, **how))


@needs_triton
@torch.no_grad()
@pytest.mark.parametrize("width", [64, 100])
def test_the_kernel_attends_to_the_filled_part(interpreted: None, width: int) -> None:
    """Against torch's attention; more positions than a block of the kernel, heads that are no power of two wide (GPT-3B's), and
    queries, keys and values as one product's slices."""
    from vapi.models import kernels

    torch.manual_seed(0)
    rows, heads, position = 2, 3, 70
    q, k, v = (part.unflatten(-1, (heads, width)).transpose(1, 2) for part in torch.randn(rows, 1, 3 * heads * width).chunk(3, dim=-1))
    cache = torch.randn(2, rows, heads, 90, width)
    plain = cache.clone()
    starts = torch.tensor([0, 67])  # one row sees all, the other four positions
    found = kernels.attend(q, k, v, cache, torch.tensor([position]), starts)
    torch.testing.assert_close(found, gpt.attend(q, k, v, plain, position, starts), rtol=1e-5, atol=1e-6)
    assert torch.equal(cache, plain)


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from vapi.models.kernels import _attend

pointers = {"q", "k", "v", "cache", "out"}
for number in ("bf16", "fp32"):
    for width, lanes in ((64, 64), (100, 128)):
        sizes = {"WIDTH": width, "LANES": lanes, "BLOCK": 64}
        kinds = {name: "*" + number if name in pointers else "constexpr" if name in sizes else "i32" for name in _attend.arg_names}
        source = ASTSource(fn=_attend, signature={**kinds, "at": "*i64", "starts": "*i64", "scale": "fp32"}, constexprs=sizes)
        assert "cubin" in compile(source, target=GPUTarget("cuda", 90, 32)).asm
"""


@needs_triton
@pytest.mark.slow
def test_the_kernel_compiles_for_a_gpu_that_is_not_here() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", COMPILE], check=True, env=environment)


@needs_triton
def test_weights_that_changed_are_sampled_from_at_once(tiny_policy: models.Policy, interpreted: None) -> None:
    condition, loops, model = tiny_policy.condition([3]), graphs.Loops(), tiny_policy.generator
    with torch.autocast("cpu", torch.bfloat16):
        before = loops.generate(model, condition, [1])
        loop = loops.last
        with torch.no_grad():
            model.output.weight.copy_(-model.output.weight)
        assert not torch.equal(loops.generate(model, condition, [1]), before)
        assert loops.last is loop, "recorded once"
    assert loop is not None and torch.equal(loop.twin.output.weight, model.output.weight.bfloat16())


@pytest.mark.parametrize("kind", ["tiny", "janus"])
def test_one_compilation_serves_all_layers(request: pytest.FixtureRequest, kind: str) -> None:
    network = request.getfixturevalue(f"{kind}_policy").generator
    graphs_made = []

    def keeps(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs_made.append(graph)
        return graph.forward

    before, after = (torch.compile(part, backend=keeps, dynamic=False, fullgraph=True) for part in (network.before, network.after))
    x, table = torch.randn(3, 1, 32), network.table(torch.tensor([1]), torch.zeros(3, dtype=torch.long))
    with torch.no_grad():
        for layer in network.layers:
            q, k, v = before(layer, x, table)
            for ours, theirs in zip((q, k, v), network.before(layer, x, table), strict=True):
                torch.testing.assert_close(ours, theirs)
            torch.testing.assert_close(after(layer, x, q), network.after(layer, x, q))
    assert len(graphs_made) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@SETTINGS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_equals_step_by_step(tiny_policy: models.Policy, how: Sampling, dtype: torch.dtype) -> None:
    """On a GPU: predictions of two kernels differ by rounding, so nearly all codes are the same; a replay is the same to the bit."""
    assert not graphs.missing(), graphs.missing()
    policy = tiny_policy
    policy.generator.cuda()
    condition, seeds = policy.condition(list(range(10)) * 3), list(range(30))
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
        plain = policy.generate(condition, seeds, **how)
        recorded = policy.generate(condition, seeds, images_per_batch=8, **how)
        again = policy.generate(condition, seeds, images_per_batch=8, **how)
    assert torch.equal(recorded, again)
    assert (recorded == plain).float().mean() > (0.95 if dtype == torch.float32 else 0.4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_large_codebook_is_drawn_from(tmp_path: Path) -> None:
    """As LlamaGen's, on a GPU: what is compiled there depends on sizes."""
    vocab = 16384
    policy = models.load(write_tiny(tmp_path, dataclasses.replace(TINY_VQ, vocab=vocab), dataclasses.replace(TINY_GPT, vocab=vocab)))
    policy.generator.cuda()
    drawn = policy.generate(policy.condition([1] * 8), list(range(8)), images_per_batch=8, guidance=2.0, top_k=2000)
    assert drawn.unique().numel() > 50


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_decoding_beside_sampling_gives_the_same_images(tiny_policy: models.Policy) -> None:
    tiny_policy.generator.cuda()
    tiny_policy.tokenizer.cuda()
    batches = [(tiny_policy.condition([n] * 8), list(range(8 * n, 8 * n + 8))) for n in range(5)]
    alone = [tiny_policy.decode(tiny_policy.generate(*batch, images_per_batch=8)) for batch in batches]
    beside = list(sampler.stream(tiny_policy, batches, 8, contextlib.nullcontext()))
    assert all(torch.equal(one, other) for one, other in zip(alone, beside, strict=True))
