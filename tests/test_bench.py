"""``vapi bench``: every benchmark prints what it promises, on a tiny real model; operations are those of arithmetic."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vapi import cli, models, recipes
from vapi.bench import gpu, meter, naive, tune, world
from vapi.config import BENCHES, ModelConfig, TuneConfig
from vapi.digits import scenes
from vapi.models import features, gpt
from vapi.objective import Objective, optimizer_of, update
from vapi.rewards import Lpips, Reward


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: ModelConfig, capsys: pytest.CaptureFixture[str]) -> Any:
    """``vapi bench <words>`` on the tiny model, in an empty folder: its last line, read."""
    monkeypatch.chdir(tmp_path)
    recipes.write("digits")

    def run(*words: str, model: ModelConfig = tiny_model) -> dict[str, Any]:
        tiny = [
            "--model.generator",
            model.generator,
            "--model.tokenizer",
            model.tokenizer,
            "--image-size",
            str(model.image_size),
            "--device",
            "cpu",
        ]
        with pytest.raises(SystemExit) as stop:
            cli.main(["bench", *words, *tiny, "--rounds", "1"])
        captured = capsys.readouterr()
        assert stop.value.code == 0, captured.err
        return json.loads(captured.out.splitlines()[-1])

    return run


MODELS = Path(__file__).parent.parent / "data/models"
ABOUT = {"bench", "date", "command", "machine"}
SIZES = ("--images-per-step", "3", "--images-per-forward", "2", "--images-per-reward", "8", "--group-size", "4")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_is_timed_taken_apart_and_compared(bench: Any, precision: str) -> None:
    found = bench("tune", *SIZES, "--precision", precision)
    assert found.keys() > ABOUT
    for name in ("seconds_per_step", "naive_seconds_per_step", "images_per_second", "peak_memory_bytes", "peak_flops"):
        assert found[name] > 0
    assert found["speedup"] == pytest.approx(found["naive_seconds_per_step"] / found["seconds_per_step"], rel=1e-2)
    assert found["images_per_second"] == pytest.approx(3 / found["seconds_per_step"], rel=1e-2)
    assert {"forward", "draw", "decode", "reward features", "backward", "optimizer"} <= found["parts"].keys()
    assert sum(found["parts"].values()) == pytest.approx(1, abs=1e-2)
    assert found["model_flops_utilisation"] > 0 and found["transformer_flops_utilisation"] > 0


def test_reward_is_timed_in_each_precision_and_layout(bench: Any) -> None:
    found = bench("reward", *SIZES)
    assert found.keys() > ABOUT and found["images"] == 2 and found["peak_memory_bytes"] > 0
    assert found["ways"].keys() == {"naive", "ours", "float32", "float32 channels_last", "bfloat16", "bfloat16 channels_last"}
    assert found["speedup"] == pytest.approx(found["naive_seconds_per_image"] / found["seconds_per_image"], rel=1e-2)


def test_sampling_is_timed(bench: Any) -> None:
    found = bench("sample", "--images-per-batch", "3", "--guidance", "1.5")
    assert found.keys() > ABOUT and found["guidance"] == 1.5 and found["peak_memory_bytes"] > 0 and found["bandwidth_utilisation"] > 0
    assert found["images_per_second"] == pytest.approx(1 / found["seconds_per_image"], rel=1e-2)
    assert found["speedup"] == pytest.approx(found["naive_seconds_per_image"] / found["seconds_per_image"], rel=1e-2)


def test_the_frechet_distance_is_timed_and_agrees(bench: Any, tmp_path: Path) -> None:
    found = bench("fid", "--dimensions", "32", "--images-per-batch", "4", "--out", str(tmp_path / "all.jsonl"))
    assert found.keys() > ABOUT and found["relative_difference"] < 1e-8 and found["images_per_second"] > 0
    assert found["speedup"] == pytest.approx(found["naive_seconds_per_distance"] / found["seconds_per_distance"], rel=1e-2)
    again = bench("fid", "--dimensions", "32", "--images-per-batch", "4", "--out", str(tmp_path / "all.jsonl"))
    assert [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()] == [found, again]


def test_pictures_are_drawn_and_judged(bench: Any, tmp_path: Path) -> None:
    """By the bundled generator of scenes and its judge, which tiny pictures are too small for."""
    generator, tokenizer = (str(MODELS / f"scenes-{name}.safetensors") for name in ("generator", "tokenizer"))
    model = ModelConfig(generator=generator, tokenizer=tokenizer, image_size=40)
    (tmp_path / "asked.jsonl").write_text(scenes.jsonl(scenes.prompts("validation", 1)))
    asked = ["--prompts", str(tmp_path / "asked.jsonl"), "--images-per-prompt", "2", "--images-per-batch", "4", "--guidance", "2.0"]
    found = bench("geneval", *asked, "--model.text_encoder", "words", model=model)
    assert found["images"] == 12 and found["images_per_batch"] == 4 and found["detector"] == "classical"
    assert found["images_per_second"] == pytest.approx(12 / found["seconds"], rel=1e-2)
    assert found["drawn_per_second"] > 0 and found["detected_per_second"] > 0
    with pytest.raises(AssertionError, match="draws classes, and GenEval asks with captions"):
        bench("geneval", *asked)


def test_no_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "gpu"])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and not captured.out and "needs a GPU" in captured.err and captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["tun"], "takes one of tune, sample, reward, fid, geneval, gpu, not 'tun'"),
        (["tune", "--stepz", "3"], "did you mean '--tune.steps'"),
        (["tune", "--size", "GPT-Q"], "no generator is called 'GPT-Q'; did you mean"),
        (["tune", "--objective", "ste"], "compares va_pi with its released step, not ste"),
        (["tune", "--recipe", "digts"], "did you mean 'digits'"),
        (["tune", "--generator", "nowhere.pt"], "nowhere.pt is not here, and its sizes are not known; say --size"),
        (["tune", "--size", "GPT-B", "--image-size", "40"], "must be a multiple of 16"),
        (["fid", "--rounds", "0"], "bench.rounds is 0"),
    ],
)
def test_a_mistake_is_said(words: list[str], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", *words])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and complaint in captured.err and not captured.out


def test_help_names_every_benchmark_and_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for words in ([], ["--help"], *([name, "--help"] for name in BENCHES)):
        with pytest.raises(SystemExit) as stop:
            cli.main(["bench", *words])
        out = capsys.readouterr().out
        assert stop.value.code == 0 and all(name in out for name in (words[:1] if words[1:] else BENCHES))
        assert not words[1:] or "--bench.out" in out


# --- operations --------------------------------------------------------------------------------


def objective(policy: models.Policy) -> Objective:
    near = Lpips(features.random_twin(1).features)
    return Objective(policy, TuneConfig(group_size=4), Reward({"mse": 1.0, "near": 1.0}, functions={"near": near}))


def test_operations_are_those_of_arithmetic(tiny_policy: models.Policy) -> None:
    ours = objective(tiny_policy)
    counted = world.count(tiny_policy, ours.reward)
    c = tiny_policy.generator.config  # type: ignore[attr-defined]
    weights = c.layers * (4 * c.dim**2 + 3 * c.dim * c.hidden) + c.dim * c.vocab
    forward = 2 * c.codes * weights + c.layers * 4 * c.codes**2 * c.dim
    assert counted.forward == forward and counted.backward == 2 * forward
    assert counted.released(4)["transformer"] == 13 * forward and counted.released(4, base=True)["transformer"] == 17 * forward
    assert counted.shared(4)["transformer"] == 3 * forward
    assert all(p.device.type == "cpu" for p in tiny_policy.generator.parameters()), "counting changes nothing"


def test_a_step_does_the_operations_that_are_counted(tiny_policy: models.Policy) -> None:
    """Both of them, run for real."""
    ours = objective(tiny_policy)
    ours.map = map  # the counter sees its own thread only
    counted, batch = world.count(tiny_policy, ours.reward), world.batch(tiny_policy, 2)

    def shared() -> None:
        for share, loss, _ in ours.pieces(batch, 1):
            (share * loss).backward()

    functions = dict.fromkeys(ours.reward.functions.values(), 1.0)
    with sdpa_kernel(SDPBackend.MATH):  # the counter does not know the CPU's own attention
        released = meter.flops(lambda: naive.step(tiny_policy, batch.images, batch.codes, batch.condition, functions, group=4))
        assert meter.flops(shared) == 2 * sum(counted.shared(4).values())
    assert released == 2 * sum(counted.released(4).values())


@pytest.mark.slow
def test_xxl_at_384_takes_a_fifth_of_the_operations() -> None:
    """The paper's largest run, counted for one image on shapes alone."""
    counted = world.count_published("GPT-XXL", 384)
    assert counted.forward == pytest.approx(1.692e12, rel=0.01)
    ratio = sum(counted.released(8).values()) / sum(counted.shared(8).values())
    with_base = sum(counted.released(8, base=True).values()) / sum(counted.shared(8).values())
    assert with_base > 5 and ratio > 4


def test_published_sizes_have_as_many_parameters_as_published() -> None:
    published = {"GPT-B": 110.9, "GPT-L": 342.9, "GPT-XL": 774.7, "GPT-XXL": 1411.0, "GPT-3B": 3096.7}  # million, at 256 pixels
    for size, millions in published.items():
        with torch.device("meta"):
            generator = gpt.Transformer(gpt.published(size, codes=256))
        assert sum(p.numel() for p in generator.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_a_missing_checkpoint_is_replaced_by_its_size(tiny_model: ModelConfig) -> None:
    assert world._size_in("c2i_XXL_384", "x") == "GPT-XXL" and world._size_in("c2i_B_256", "x") == "GPT-B"
    assert world._size_in("t2i_XL_stage1_256", "x") == "GPT-XL"
    assert world._size_in("Janus-Pro-1B", "x") == "Janus-Pro-1B"


def test_operations_of_janus_pro() -> None:
    """On shapes alone. Two operations for each weight and position, of what a position passes through."""
    counted = world.count_published("Janus-Pro-1B", 384, perceptual="alex")
    policy = world.random_policy("Janus-Pro-1B", ModelConfig(image_size=384), "meta")
    passed = sum(p.numel() for name, p in policy.generator.named_parameters() if "layers" in name or "head" in name)
    assert counted.forward == pytest.approx(2 * passed * (576 + 63), rel=0.1)
    ratio = sum(counted.released(8).values()) / sum(counted.shared(8).values())
    assert ratio > 4


# --- pieces ------------------------------------------------------------------------------------


def test_pieces_of_a_step_are_the_step(tiny_policy: models.Policy) -> None:
    """Taken apart for its timing, a step leaves the same weights."""
    whole, apart = objective(tiny_policy), objective(copy.deepcopy(tiny_policy))
    update(whole, optimizer_of(whole.policy.generator, whole.tune), world.batch(tiny_policy, 3), 1)
    shares = tune.parts(apart, optimizer_of(apart.policy.generator, apart.tune), world.batch(tiny_policy, 3))
    assert all(torch.equal(a, b) for a, b in zip(whole.policy.generator.parameters(), apart.policy.generator.parameters(), strict=True))
    assert min(shares.values()) > 0


@pytest.mark.parametrize("name", ["vgg", "alex"])
def test_random_networks_have_the_layers_of_lpips(name: str) -> None:
    lpips = world.random_lpips("cpu", name)
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    assert [m.shape[1] for m in lpips.layers(images)] == list(world.WIDTHS[name])
    assert lpips(images, images).item() == 0 and lpips(images, -images).item() < 0


def test_memory_is_the_peak_and_not_what_is_left() -> None:
    small = meter.peak_memory(torch.device("cpu"), lambda: None)
    large = meter.peak_memory(torch.device("cpu"), lambda: torch.ones(1 << 28, dtype=torch.uint8).sum())
    assert large - small > 200 << 20


def test_a_known_card_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(name: str, precision: str) -> meter.Peak:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        return meter.peak(torch.device("cuda"), precision)

    assert peak("NVIDIA H100 80GB HBM3", "bfloat16") == meter.Peak(989e12, 3.35e12, "data sheet of H100")
    assert peak("NVIDIA H100 PCIe", "bfloat16").flops == 756e12 and peak("NVIDIA L40S", "float32").source.endswith("L40S")
    assert peak("NVIDIA H200", "float32").flops == 67e12


def test_a_part_of_the_table_ends_in_time_and_says_why_it_failed() -> None:
    """A process of its own: its result, its last words, or that it took too long."""
    done = gpu.attempt(["fid", "--dimensions", "8", "--rounds", "1", "--images-per-batch", "2", "--device", "cpu"], 300)
    assert done["bench"] == "fid"
    assert "did you mean '--tune.steps'" in gpu.attempt(["tune", "--stepz", "1"], 300)["error"]
    assert gpu.attempt(["fid"], 0.1) == {"error": "took longer than 0 s"}


def test_the_table_tries_again_when_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def attempt(words: list[str], limit: float) -> dict[str, Any]:
        asked.append(" ".join(words))
        small = "--images-per-forward 8" in asked[-1] or asked[-1].startswith("sample") and "--images-per-batch 64" in asked[-1]
        return {"seconds_per_step": 1.0, "images_per_second": 2.0} if small else {"error": "out of memory: CUDA"}

    monkeypatch.setattr(gpu, "attempt", attempt)
    found = gpu.table(gpu.parts(80 << 30), "")
    assert [words.split()[0] for words in asked] == ["tune", "tune", "sample", "sample", "reward", "reward", "fid"]
    assert found["seconds_per_step"] == 1.0 and found["samples_per_second"] == 2.0 and found["rewarded_per_second"] == 2.0
    assert sum(part.seconds for part in gpu.parts(80 << 30)) <= gpu.LIMIT < 9 * 60


def test_random_weights_lie_where_they_are_wanted() -> None:
    policy = world.random_policy("GPT-B", ModelConfig(image_size=256), "meta")
    assert all(tensor.is_meta for tensor in (*policy.generator.buffers(), *policy.generator.parameters()))


def test_every_flag_of_the_table_is_understood() -> None:
    for part in (*gpu.parts(80 << 30), *gpu.parts(139 << 30)):
        for words in part.tries:
            (name,), flags = cli.parse(words.split())
            settings = cli.measured(name, flags)
            assert name == part.name and settings.model.device == "cuda" and settings.tune.perceptual == "vgg"
