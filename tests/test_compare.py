"""Runs beside each other: what is read, what is refused, and a page that says no more than they have kept."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import browser
import numpy as np
import pytest
import world
from PIL import Image
from test_report import Outline

from vapi import cli, compare, compare_page, data, images, markup, recipes, report, track
from vapi.compare import Run
from vapi.config import STAGES
from vapi.run import Run as Reported

STEPS = 4


def make(root: Path, name: str, **changes: object) -> Path:
    """A run of four stages on the tiny world."""
    settings = world.settings(recipes.recipe("digits"), tune_steps=STEPS, tune_holdout_every=2, evaluate_seeds=[0, 1], **changes)
    out = root / name
    for stage in ("subset", "tokens", "tune", "evaluate"):
        inputs = {made: out / made for made in STAGES[stage].inputs}
        cli.run_stage(stage, settings, {**inputs, "out": out / stage})
    return out


def register(folder: Path) -> None:
    """The gates of such a run; tracking is off, so nothing is registered."""
    inputs = {name: folder / name for name in STAGES["register"].inputs}
    cli.run_stage("register", world.settings(recipes.recipe("digits")), {**inputs, "out": folder / "register"})


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of one protocol in a project of their own."""
    root = world.write(tmp_path_factory.mktemp("compare"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("DVC_ROOT", str(root))
        swept = {"evaluate_temperatures": [0.8, 1.0], "evaluate_guidances": [1.0, 2.0]}
        make(root, "a", **swept)
        make(root, "b", tune_lr=3e-3, tune_prior="kl", tune_prior_weight=1.0, **swept)
    return root  # not from within: it lives for the whole session, and other tests are at home in the clone


@pytest.fixture
def project(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, entered."""
    monkeypatch.chdir(made)
    monkeypatch.setenv("DVC_ROOT", str(made))
    return made


def runs(*folders: Path) -> list[Run]:
    return compare.read_all({folder.name: folder for folder in folders})


def text_of(page: str) -> str:
    """What a reader sees, in one line."""
    body = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


# --- what is read ------------------------------------------------------------------------------


def test_a_run_is_read_from_its_root_or_from_a_stage(project: Path) -> None:
    whole, stage = compare.read("a", project / "a"), compare.read("a", project / "a" / "evaluate")
    assert set(whole.folders) == set(stage.folders) == {"subset", "tokens", "tune", "evaluate"}
    assert whole.results == data.read_json(project / "a" / "evaluate" / "metrics.json") and not whole.notices
    assert [row["step"] for row in whole.curves] == list(range(STEPS + 1))
    assert whole.settings["tune.steps"] == STEPS and whole.settings["tune.rewards.mse"] == 1.0


def test_pictures_come_back_from_the_sheets_to_the_pixel(project: Path) -> None:
    run = compare.read("a", project / "a")
    plain = run.samples("plain")
    assert plain["base"].shape == plain["tuned"].shape == (10, 16, 16, 3)
    again = report.banded_sheet([("one", plain["base"]), ("two", plain["tuned"])], data.SHEET_COLUMNS)
    path = project / "a" / "evaluate" / "sheet-before-after.png"
    title = slice(report.TITLE_HEIGHT, report.TITLE_HEIGHT + images.sheet_height(10, 10, 16))
    assert np.array_equal(np.asarray(again)[title], np.asarray(images.decode(path.read_bytes()))[title])
    looks = run.looks
    assert [look.step for look in looks] == [0, STEPS]
    assert looks[0].pictures["real"].shape == (8, 16, 16, 3) and np.array_equal(looks[0].pictures["real"], looks[1].pictures["real"])
    subset = data.read_subset(project / "a" / "subset")
    real = subset.pixels(subset.keys.index(looks[0].keys[0]), 16)
    assert np.array_equal(looks[0].pictures["real"][0], real)


def test_rewards_of_a_sheet_are_the_sum_of_their_parts(project: Path) -> None:
    run = compare.read("a", project / "a")
    for look in run.looks:
        summed = sum(run.settings[f"tune.rewards.{name}"] * np.array(look.rewards[name]) for name in ("mse", "lpips"))
        assert np.allclose(summed, look.rewards["reward"], rtol=1e-4)


# --- what is refused, and what is said ---------------------------------------------------------


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", *words])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_a_folder_without_a_run(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "empty").mkdir(exist_ok=True)
    code, _, err = call(capsys, "a", "empty", "--out", "page.html")
    assert code == 2 and "empty holds no run" in err and "subset, tokens, tune, evaluate, register" in err
    assert not (project / "page.html").exists()


def test_a_name_that_is_no_folder_where_there_is_no_mlflow(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "a", "nowhere")
    assert code == 2 and "nowhere is no folder here, and cannot be looked up" in err and "mlflow.db is not here: nothing was tracked" in err
    assert not (project / "mlflow.db").exists(), "looking for a run makes no database"


def test_flags_that_mean_nothing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "a", "--log")
    assert code == 2 and "name a run by its id" in err
    with pytest.raises(ValueError, match="7 runs do not fit on a page"):
        compare.read_all({str(n): project / "a" for n in range(7)})


def test_a_damaged_file_is_named(project: Path, tmp_path: Path) -> None:
    shutil.copytree(project / "a", tmp_path / "a")
    (tmp_path / "a/evaluate/metrics.json").write_text('{"protocol"')
    with pytest.raises(ValueError, match=r"metrics.json is damaged .* vapi evaluate"):
        compare.read("a", tmp_path / "a")
    evaluate = tmp_path / "a/evaluate"
    shutil.copy(project / "a/evaluate/metrics.json", evaluate)
    shutil.copy(tmp_path / "a/tune/sheets/step-000000.png", evaluate / "sheet-best.png")
    with pytest.raises(ValueError, match=r"sheet-best.png cannot be cut up \(a sheet of .* vapi evaluate"):
        compare.read("a", tmp_path / "a").samples("best")


def test_a_sheet_of_another_shape_is_refused() -> None:
    sheet = np.asarray(images.sheet(np.zeros((4, 16, 16, 3), np.uint8), 2, images.tile_scale(16)))
    assert images.cut(sheet, 4, 2, 16).shape == (4, 16, 16, 3)
    with pytest.raises(ValueError, match="a sheet of 9 pictures has 296 x 296 pixels, and this 198 x 198"):
        images.cut(sheet, 9, 3, 16)


def test_an_unfinished_run_is_shown_as_far_as_it_went(project: Path, tmp_path: Path) -> None:
    for stage in ("subset", "tokens", "tune"):
        shutil.copytree(project / "a" / stage, tmp_path / "half" / stage)
    assert "evaluate.samples" not in text_of(compare_page.page(runs(tmp_path / "half", project / "b"))), "it has not come to that yet"
    (half,) = runs(tmp_path / "half")
    page = compare_page.page([half])
    assert "A (half): it is not evaluated, so FID and its kin are missing; run: vapi evaluate." in text_of(page)
    assert "While tuning" in page and "Held-out images" in page and "The numbers" not in page

    stopped = tmp_path / ".vapi/resume/tune/0123"
    stopped.mkdir(parents=True)
    lines = (project / "a/tune/metrics.jsonl").read_text().splitlines(keepends=True)
    (stopped / "metrics.jsonl").write_text("".join(lines[:3]))
    page = compare_page.page(runs(stopped, project / "a"))
    assert "tuning has not ended: step 2 is the last so far; the same vapi tune continues it" in text_of(page)
    assert "B beside A: A not evaluated" in page and "A held out" in page and "B held out" in page


def test_folders_that_do_not_belong_together_are_no_run(project: Path, tmp_path: Path) -> None:
    for stage in STAGES.keys() - {"register"}:
        shutil.copytree(project / "a" / stage, tmp_path / "a" / stage)
    shutil.rmtree(tmp_path / "a/tune")
    shutil.copytree(project / "b/tune", tmp_path / "a/tune")  # tuned anew, and not evaluated yet
    run = compare.read("a", tmp_path / "a")
    assert set(run.folders) == {"evaluate"} and "the evaluation is of other weights" in run.notices[0]
    run = compare.read("a/tune", tmp_path / "a/tune")
    assert set(run.folders) == {"subset", "tokens", "tune"} and "it is not evaluated" in run.notices[0], "who names it wants to see it"
    shutil.rmtree(tmp_path / "a/tune")
    shutil.copytree(project / "a/tune", tmp_path / "a/tune")
    (tmp_path / "a/tokens/summary.json").write_text("{}")
    run = compare.read("a", tmp_path / "a")
    assert set(run.folders) == {"subset", "tune", "evaluate"} and "its tokens are not shown" in run.notices[0]


def test_gates_that_judged_another_evaluation_are_no_part_of_a_run(project: Path, tmp_path: Path) -> None:
    shutil.copytree(project / "a", tmp_path / "a")
    register(tmp_path / "a")
    run = compare.read("a", tmp_path / "a")
    assert "register" in run.folders and not run.notices
    shutil.rmtree(tmp_path / "a/tune")
    shutil.copytree(project / "b/tune", tmp_path / "a/tune")
    assert set(compare.read("a", tmp_path / "a").folders) == {"evaluate", "register"}, "tuned anew; the gates are the evaluation's"
    shutil.rmtree(tmp_path / "a/evaluate")
    assert "register" not in compare.read("a", tmp_path / "a").folders
    shutil.copytree(project / "b/evaluate", tmp_path / "a/evaluate")  # evaluated anew, and not judged yet
    run = compare.read("a", tmp_path / "a")
    assert set(run.folders) == {"subset", "tokens", "tune", "evaluate"} and "its gates are not shown" in run.notices[0]
    assert not compare.of(tmp_path / "a/evaluate", tmp_path / "a/tune").notices, "gates come after the evaluation"


def changed(folder: Path, stage: str, **fields: object) -> None:
    """Another config.json of a stage; a field that is None is one that it never had."""
    made = data.read_json(folder / stage / "config.json")
    section = made["sections"][stage] | fields
    made["sections"][stage] = {name: value for name, value in section.items() if value is not None}
    data.write_json(folder / stage / "config.json", made)


def test_what_was_not_written_down_is_no_difference(project: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(project / name, tmp_path / name)
    changed(
        tmp_path / "b", "tune", rewards={"mse": 1.0, "lpips": 10.0, "other": 0.0}, perceptual_weights=None, perceptual="moved.safetensors"
    )
    changed(tmp_path / "b", "evaluate", clip=None, dinov2="dinov2")
    a, b = runs(tmp_path / "a", tmp_path / "b")
    assert compare.warnings([a, b]) == [], "a weight of 0, the same network elsewhere, and a field of a later version"
    page = compare_page.page([a, b])
    (table,) = [table for table in re.findall(r"<table.*?</table>", page, re.DOTALL) if ">Configuration<" in table]
    rows = {
        text_of(head).partition(" ")[0]: text_of(cells) for head, cells in re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', table)
    }
    assert rows["evaluate.dinov2"] == "not set dinov2" and rows["tune.rewards.other"] == "not set 0.0"
    assert "evaluate.clip" not in rows and "tune.perceptual_weights" not in rows
    assert "Not recorded by every run, which may be of another version: tune.perceptual_weights, evaluate.clip." in text_of(page)

    made = data.read_json(tmp_path / "b/tune/config.json")
    made["inputs"]["perceptual"] = "0" * 64
    data.write_json(tmp_path / "b/tune/config.json", made)
    changed(tmp_path / "b", "tune", rewards={"mse": 2.0, "lpips": 10.0})
    (words,) = compare.warnings(runs(tmp_path / "a", tmp_path / "b"))
    assert words.startswith("Rewards are put together differently (tune.rewards.mse, tune.perceptual):")


def test_gates_are_shown_with_their_numbers_and_the_verdict(project: Path, tmp_path: Path) -> None:
    shutil.copytree(project / "a", tmp_path / "a")
    register(tmp_path / "a")
    page = compare_page.page(runs(tmp_path / "a", project / "b"))
    gates = page.partition('<section id="gates">')[2].partition("</section>")[0]
    judged = data.read_json(tmp_path / "a/register/registration.json")
    for alias, against in judged["against"].items():
        assert report.gate_title(judged, alias) in text_of(gates)
        for gate in against["gates"]:
            numbers = " ".join(report.gate_numbers(gate)).replace("-", "−")
            assert f"{gate['metric']} {numbers} {'yes' if gate['passed'] else 'no'}" in text_of(gates)
    assert "Not registered." in gates and gates.count("<table") == len(judged["against"]) and '<a href="#gates">' in page

    made = {"version": "3", "aliases": ["challenger", "champion"], "note": "by another <protocol>"}
    data.write_json(tmp_path / "a/register/registration.json", judged | made)
    page = compare_page.page(runs(tmp_path / "a"))
    assert f"Registered as version 3 of {judged['name']}, challenger and champion. by another &lt;protocol&gt;" in page
    assert 'id="gates"' not in compare_page.page(runs(project / "b")), "nobody judged it"


def test_runs_of_different_protocols_never_share_a_table(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    shutil.copytree(project / "b", other)
    results = data.read_json(other / "evaluate/metrics.json")
    results["protocol"]["samples"], results["protocol"]["torch_fidelity"] = 30, "0.0"
    data.write_json(other / "evaluate/metrics.json", results)
    code, out, err = call(capsys, "a", str(other), "--out", str(tmp_path / "page.html"))
    assert code == 0 and "page.html" in out
    assert "A and B were measured by different protocols (samples, torch_fidelity): their numbers do not compare" in err
    page = (tmp_path / "page.html").read_text()
    assert "B beside A: measured by different protocols" in page
    tables = [table for table in re.findall(r"<table.*?</table>", page, re.DOTALL) if "Metrics of every model" in table]
    assert len(tables) == 2
    assert [table.count('<th scope="row">tuned</th>') for table in tables] == [1, 1]
    assert "Protocol of A" in page and "Protocol of B" in page


# --- the page ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def page(made: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        patch.setenv("DVC_ROOT", str(made))
        return compare_page.page(runs(made / "a", made / "b"))


def test_the_page_is_whole_and_small(page: str) -> None:
    outline = Outline(re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL))
    assert len(page.encode()) < 3_000_000
    assert not re.search(r"https?://|@import|url\(|\bsrc=\"(?!data:)", page)
    pictures = [attributes for tag, attributes in outline.found if tag == "img"]
    assert len(pictures) == 2 * 3 * 10 + 5 * 8 and all(picture["alt"] for picture in pictures)
    assert all(attributes["aria-label"] for tag, attributes in outline.found if tag == "svg")
    ids = [attributes["id"] for _, attributes in outline.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = [attributes["aria-describedby"] for _, attributes in outline.found if "aria-describedby" in attributes]
    links = [attributes["href"] for tag, attributes in outline.found if tag == "a"]
    assert set(named) <= set(ids) and {str(link)[1:] for link in links} <= set(ids) and len(links) == 11


def test_only_pictures_that_are_shown_share_the_budget(project: Path, page: str) -> None:
    a, b = runs(project / "a", project / "b")
    assert len(list(compare_page._pictures([a, b]))) == page.count("<img ")
    assert len(list(compare_page._pictures([a]))) == compare_page.page([a]).count("<img ")


def test_a_page_of_photographs_stays_small() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (120, 384, 384, 3), dtype=np.uint8)  # nothing is harder to encode
    how = markup.encoding(list(noise), compare_page.BUDGET)
    assert sum(len(markup.encoded(one, how)) for one in noise) < compare_page.BUDGET * 1.1
    assert markup.encoding(list(noise[:4]), compare_page.BUDGET)[0] == 256 and markup.encoding([], 1) == markup.ENCODINGS[0]
    small = np.zeros((3, 32, 32, 3), np.uint8)
    assert markup.encoded(small[0], markup.encoding(list(small), compare_page.BUDGET)).startswith(b"\x89PNG")


def test_the_page_says_what_the_runs_have_kept(page: str, project: Path) -> None:
    text = text_of(page)
    a, b = runs(project / "a", project / "b")
    for run in (a, b):
        assert report.verdict(run.results) in text
    shown = markup.distance(b.results["tuned"]["fid"])
    assert f"B, tuned: FID {shown}" in text
    assert "tune.lr" in text and "0.003" in text and "kl" in text and "tune.steps" not in text, "what differs, and nothing else"
    assert text.count("KL from the base") == 1, "of the run that has one"
    for digest in (a.results["weights"]["tuned"], b.results["weights"]["tuned"], a.made["subset"]["inputs"]["source"]):
        assert f'<code title="{digest}">' in page
    assert "GPU utilisation" not in text and "0 (no GPU)" in text and "device cpu cpu" in text
    assert "real images: perplexity" in text and f"{a.tokens['perplexity']:,.0f}" in text
    assert f"reward {_short(a.looks[0].rewards['reward'][0])} = 10 × lpips" in text


def _short(value: float) -> str:
    return f"{value:.4g}".replace("-", "−")


def test_what_runs_share_is_shown_once(page: str) -> None:
    (table,) = [table for table in re.findall(r"<table.*?</table>", page, re.DOTALL) if "Metrics of every model" in table]
    heads = re.findall(r'<th scope="row">(.*?)</th>', table)
    assert heads.count("base") == 1 and sum(head.endswith("</b>tuned") for head in heads) == 2 and heads[-1] == "real images"


def test_cost_is_of_what_was_recorded_whole(project: Path, tmp_path: Path) -> None:
    def cost(**provenance: dict[str, object]) -> str:
        for stage, told in provenance.items():
            (tmp_path / "a" / stage).mkdir(parents=True, exist_ok=True)
            shutil.copy(project / "a" / stage / "config.json", tmp_path / "a" / stage)
            data.write_json(tmp_path / "a" / stage / "provenance.json", told)
        return text_of(compare_page._cost(runs(tmp_path / "a")))

    tuned = {"seconds": 100.0, "processes": 2, "device": "a GPU", "seconds_in_own_steps": 40.0, "seconds_per_step": 9.0}
    half = cost(tune=tuned)
    assert "share of tune's time that steps took 40%" in half and "GPU-seconds, tune and evaluate not recorded" in half
    whole = cost(evaluate={"seconds": 50.0, "processes": 1, "device": "a GPU"})
    assert "GPU-seconds, tune and evaluate 250" in whole
    assert "GPU-seconds, tune and evaluate not recorded" in cost(evaluate={"seconds": 50.0}), "of an older version"
    older = {name: value for name, value in tuned.items() if name != "seconds_in_own_steps"} | {"seconds_in_steps": 90.0}
    assert "steps took not recorded" in cost(tune=older), "nobody knows how many of them an earlier process spent"


def test_draws_share_a_card_if_they_are_of_the_same_pixels_and_rewarded_alike(project: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(project / name, tmp_path / name)
    a, b = runs(tmp_path / "a", tmp_path / "b")
    assert a.looks[0].draws_like(b.looks[0]) and not a.looks[1].draws_like(b.looks[1]) and len(compare.by_images([a, b])) == 1
    changed(tmp_path / "b", "tune", rewards={"mse": 2.0, "lpips": 10.0})
    page = compare_page.page(runs(tmp_path / "a", tmp_path / "b"))
    tip = page.partition('id="heldout-A-0"')[2].partition("</div>")[0]
    assert "<br>A base, step 0: reward" in tip and "+ 1 × mse" in tip and "<br>B base, step 0: reward" in tip and "+ 2 × mse" in tip

    for path in (tmp_path / "b/tune/sheets").glob("*.png"):
        sheet = np.array(images.decode(path.read_bytes()))
        sheet[2:8, 2:8] = 255 - sheet[2:8, 2:8]  # another crop of the first real image
        path.write_bytes(images.png_bytes(Image.fromarray(sheet)))
    a, b = runs(tmp_path / "a", tmp_path / "b")
    assert a.looks[0].keys == b.looks[0].keys and len(compare.by_images([a, b])) == 2
    page = compare_page.page([a, b])
    assert 'id="heldout-A-0"' in page and 'id="heldout-B-0"' in page and "Images of A</h3>" in page and "Images of B</h3>" in page


def test_the_terms_of_every_objective_are_drawn(project: Path, tmp_path: Path) -> None:
    settings = world.settings(recipes.recipe("digits"), tune_steps=2, tune_objective="cca")
    inputs = {name: project / "a" / name for name in STAGES["tune"].inputs}
    cli.run_stage("tune", settings, {**inputs, "out": tmp_path / "cca/tune"})
    (run,) = runs(tmp_path / "cca")
    text = text_of(compare_page.page([run]))
    assert {"tune/ratio", "tune/ratio_other", "tune/told_apart"} <= run.curves[-1].keys()
    for title in ("log-ratio to the base, own class", "log-ratio to the base, another class", "share likelier under its own class"):
        assert title in text and title in report.curve_charts(run.curves)


def test_one_run_alone(project: Path) -> None:
    page = compare_page.page(runs(project / "a"))
    assert "report of 1 run<" in page and "What was set differently" not in page and "By class" in page
    assert compare_page.page([compare.of(project / "a/evaluate", project / "a/tune")]).count("<section") == page.count("<section")


def test_a_page_that_cannot_be_made_undoes_no_evaluation(project: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Kept(Reported):
        pages: ClassVar[list[str]] = []

        def artifact(self, path: Path | str, folder: str = "") -> None:
            self.pages += [Path(path).read_text()] if Path(path).suffix == ".html" else []

    folders = {"tune": tmp_path / "tune", "out": tmp_path / "evaluate"}
    for stage in ("tune", "evaluate"):
        shutil.copytree(project / "a" / stage, tmp_path / stage)
    cli._keep("evaluate", folders, Kept())
    (tmp_path / "evaluate/sheet-best.png").write_bytes(b"torn")
    cli._keep("evaluate", folders, Kept())
    assert "report of 1 run<" in Kept.pages[0] and Kept.pages[1] == (tmp_path / "evaluate/report.html").read_text()
    assert "was not made" in caplog.text and "the evaluation is whole" in caplog.text


def test_everything_is_escaped(project: Path, tmp_path: Path) -> None:
    nasty = tmp_path / "<script>alert(1)<"
    shutil.copytree(project / "a", nasty)
    made = data.read_json(nasty / "tune/config.json")
    made["sections"]["tune"]["rewards"] = {"<img src=x>": 1.0, **made["sections"]["tune"]["rewards"]}
    data.write_json(nasty / "tune/config.json", made)
    page = compare_page.page(compare.read_all({str(nasty): nasty, "a": project / "a"}))
    assert "<script>alert" not in page and "<img src=x>" not in page and "&lt;img src=x&gt;" in page


# --- colours -----------------------------------------------------------------------------------


def _schemes() -> dict[str, dict[str, str]]:
    """The colours of each scheme by name."""
    found = re.findall(r"(@media \([^)]*dark\)\{|@media print\{)?:root\{([^}]*)\}", markup.STYLE)
    return {scheme.split("{")[0]: dict(re.findall(r"--(\w+):(#\w+)", colours)) for scheme, colours in found}


def _luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (int(digits[n : n + 2], 16) / 255 for n in (0, 2, 4))]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two colours."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast_as_wcag_counts_it() -> None:
    assert contrast("#000", "#ffffff") == pytest.approx(21) and contrast("#777777", "#fff") == pytest.approx(4.48, abs=0.005)


@pytest.mark.parametrize("scheme", ["", "@media (prefers-color-scheme:dark)", "@media print"])
def test_text_can_be_read_in_every_scheme(scheme: str) -> None:
    colours = _schemes()[scheme]
    assert len(colours) == 12
    for ground in ("bg", "card"):
        for name in colours.keys() - {"bg", "card", "rule"}:
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)


# --- MLflow ------------------------------------------------------------------------------------


def test_a_run_comes_back_out_of_mlflow(
    made: Path, mlflow_db: Path, sender_thread: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    root = world.write(tmp_path / "tracked")
    (root / "mlflow.db").write_bytes(mlflow_db.read_bytes())
    monkeypatch.chdir(root)
    monkeypatch.setenv("DVC_ROOT", str(root))
    uri = f"sqlite:///{root}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    out = make(root, "one", track_uri=uri)
    client = track.connect(uri)
    (experiment,) = [found for found in client.search_experiments() if found.name == "vapi"]
    found = {run.data.tags["stage"]: run for run in client.search_runs([experiment.experiment_id])}
    assert {"report.html", "record"} <= {file.path for file in client.list_artifacts(found["evaluate"].info.run_id)}

    parent = found["pipeline"].info.run_id
    evaluated = found["evaluate"].info.run_id
    for name in (parent, evaluated):
        code, _, err = call(capsys, name, "one", "--out", "report.html", "--log")
        assert code == 0, err
    here, there = compare.read("one", out), compare.read(parent, track.fetch(parent, uri, tmp_path / "fetched"))
    assert here.results == there.results and here.curves == there.curves and here.classes == there.classes
    assert here.made == there.made and np.array_equal(here.samples("best")["tuned"], there.samples("best")["tuned"])
    assert here.looks[1].rewards == there.looks[1].rewards
    for name in (parent, evaluated):
        assert [file.path for file in client.list_artifacts(name, "comparisons")] == ["comparisons/report.html"]
    own = client.download_artifacts(evaluated, "report.html", str(tmp_path))
    assert "report of 1 run<" in Path(own).read_text(), "the page that the stage left is its own still"

    code, _, err = call(capsys, "0" * 32)
    assert code == 2 and f"neither a folder here nor a run's id in MLflow at {uri}" in err and parent in err


def test_a_run_that_was_killed_comes_back_with_its_numbers(
    mlflow_db: Path, sender_thread: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mlflow.db").write_bytes(mlflow_db.read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    settings = world.settings(recipes.recipe("digits"), track_uri=uri)
    with pytest.raises(KeyboardInterrupt), track.start("tune", settings, {"out": tmp_path / "tune"}) as run:
        for step in range(3):
            run.metrics({"tune/ce": 4.0 - step, "tune/loss": float("nan") if step == 2 else 1.0}, step)
        raise KeyboardInterrupt
    client = track.connect(uri)
    experiments = [found.experiment_id for found in client.search_experiments()]
    (tune,) = client.search_runs(experiments, "tags.stage = 'tune'")
    found = compare.read("killed", track.fetch(tune.info.run_id, uri, tmp_path / "fetched"))
    assert [json.dumps(row) for row in found.curves][-1] == '{"step": 2, "tune/ce": 2.0}'
    assert found.settings["tune.lr"] == settings.tune.lr and found.settings["tune.rewards.lpips"] == 10.0
    assert "MLflow calls it killed" in found.notices[0] and "While tuning" in compare_page.page([found])


# --- in a browser ------------------------------------------------------------------------------

needs_chromium = pytest.mark.skipif(not browser.CHROMIUM, reason="no chromium here")
UNREADABLE = """(() => {
  const parse = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = c => { const l = c.slice(0, 3).map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * l[0] + .7152 * l[1] + .0722 * l[2]; };
  const ground = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length === 3 || c[3] > 0) return c; } };
  const words = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  let seen = 0;
  while (words.nextNode()) {
    const e = words.currentNode.parentElement, style = getComputedStyle(e);
    if (!words.currentNode.textContent.trim() || !e.getClientRects().length || ['SCRIPT', 'title'].includes(e.tagName)) continue;
    const [a, b] = [light(parse(e.closest('svg') ? style.fill : style.color)), light(ground(e))].sort((x, y) => y - x);
    seen += 1;
    if ((a + .05) / (b + .05) < 4.5) found.push(`${e.tagName}.${e.className.baseVal ?? e.className}: ${words.currentNode.textContent}`);
  }
  return [seen, found];
})()"""


@pytest.fixture(scope="session")
def shown(page: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    """The page in a browser."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page)
    with browser.chromium() as one:
        one.look()
        one.open(path)
        yield one


@needs_chromium
def test_nothing_fails_and_nothing_is_fetched(shown: browser.Page) -> None:
    assert shown.complaints == []
    assert {address.partition(":")[0] for address in shown.fetched} == {"file", "data"} and sum("file:" in a for a in shown.fetched) == 1
    shown.run("for (const one of document.querySelectorAll('details')) one.open = true")
    assert shown.run("[...document.images].length") == 100
    assert shown.run("[...document.images].every(one => one.complete && one.naturalWidth === 16 && one.alt)")


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read_as_it_is_shown(shown: browser.Page, scheme: str) -> None:
    shown.look(scheme)
    seen, unreadable = shown.run(UNREADABLE)
    assert seen > 500 and unreadable == []
    dark = shown.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 20, 20)"
    assert dark == (scheme == "dark")


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_its_window(shown: browser.Page, width: int) -> None:
    shown.look(width=width)
    assert shown.run("document.documentElement.scrollWidth") <= width


@needs_chromium
def test_paper_is_white_and_holds_no_controls(shown: browser.Page) -> None:
    shown.look("dark", "print", 794)
    assert shown.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert shown.run("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert shown.run("document.documentElement.scrollWidth") <= 794
    shown.look()


@needs_chromium
def test_tables_are_sorted_from_the_keyboard(shown: browser.Page) -> None:
    shown.look()
    table = "[...document.querySelectorAll('table')].find(one => one.caption.textContent.startsWith('Metrics of'))"
    shown.run(f"{table}.querySelector('thead button').focus()")
    shown.press("Tab")  # from the model to FID
    column = f"[...{table}.tBodies[0].rows].map(row => Number(row.cells[1].dataset.by))"
    before = shown.run(column)
    states = []
    for key in ("Enter", " "):
        shown.press(key)
        states.append((shown.run("document.activeElement.parentElement.getAttribute('aria-sort')"), shown.run(column)))
    assert states == [("ascending", sorted(before)), ("descending", sorted(before, reverse=True))] and before != sorted(before)
    assert shown.run(f"{table}.querySelectorAll('[aria-sort]').length") == 1


@needs_chromium
def test_what_has_no_number_is_sorted_to_the_end(shown: browser.Page) -> None:
    table = "[...document.querySelectorAll('table')].find(one => one.caption.textContent.startsWith('Metrics of'))"
    shown.run(f"[...{table}.querySelectorAll('thead button')].at(-1).click()")
    last = shown.run(f"[...{table}.tBodies[0].rows].map(row => row.cells[row.cells.length - 1].textContent)")
    numbers = [float(text.replace("−", "-")) for text in last if text != "–"]
    assert numbers == sorted(numbers) and set(last[len(numbers) :]) == {"–"}


@needs_chromium
def test_pictures_are_enlarged_from_the_keyboard(shown: browser.Page) -> None:
    shown.look()
    shown.run("document.querySelector('#heldout .zoom').focus()")
    shown.press("Tab")
    tip = "document.activeElement.nextElementSibling"
    assert shown.run(f"getComputedStyle({tip}).display") == "block" and "× mse" in shown.run(f"{tip}.textContent")
    assert shown.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    small = shown.run("document.activeElement.querySelector('img').clientWidth")
    shown.press("Enter")
    assert shown.run("document.querySelector('dialog').open") and "× mse" in shown.run("document.querySelector('dialog .said').textContent")
    assert shown.run("document.querySelectorAll('dialog img').length") == 5
    assert shown.run("document.querySelector('dialog img').clientWidth") >= 2 * small
    shown.press("Escape")
    assert not shown.run("document.querySelector('dialog').open")
    assert shown.run("document.activeElement.classList.contains('zoom')"), "the reader is where he was"
