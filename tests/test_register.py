"""Only what is better enters the registry, and what enters it works elsewhere."""

from __future__ import annotations

import base64
import contextlib
import copy
import dataclasses
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CAPTIONED_GPT, CAPTIONS, TINY_GPT, write_tiny
from PIL import Image

from vapi import card, cli, config, data, images, licences, markup, models, register, report, track
from vapi.config import Config, EvaluateConfig, ModelConfig, RegisterConfig, TuneConfig
from vapi.run import NO_RUN

REPO = Path(__file__).parent.parent
BASE = {"fid": 14.0, "kid": 0.02, "inception_score": 4.0, "precision": 0.6, "recall": 0.5, "class_accuracy": 0.8, "fid_random": 1.4}
BETTER = {"fid": 9.0, "kid": 0.01, "inception_score": 5.0, "precision": 0.7, "recall": 0.46, "class_accuracy": 0.9, "fid_random": 0.9}
BEST = {"temperature": 0.9, "guidance": 1.0}
RULES = RegisterConfig()


def results(**changes: dict[str, Any]) -> dict[str, Any]:
    """A metrics.json in which tuned passes every gate, but for the changes."""
    made = {"base": BASE, "tuned": BETTER, "base_best": {**BASE, "fid": 11.0, **BEST}, "tuned_best": {**BETTER, "fid": 8.0, **BEST}}
    made |= {"protocol": {"samples": 2000, "seeds": [0], "reference": {"images": 4000}}}
    made |= {"anchors": {"real": {"fid": 0.4, "images": 2000}, "reconstruction": {"fid": 0.6, "images": 2000}}}
    return copy.deepcopy({name: {**values, **changes.get(name, {})} for name, values in made.items()})


def failed(gates: list[register.Gate]) -> list[str]:
    return [gate.metric for gate in gates if not gate.passed]


def test_a_gate_is_open_up_to_its_limit() -> None:
    assert register.Gate.of("fid", 100.0, 95.0, -0.05).margin == pytest.approx(0.0, abs=1e-9)
    assert register.Gate.of("fid", 10.0, 9.4, -0.05).passed and not register.Gate.of("fid", 10.0, 9.6, -0.05).passed
    assert register.Gate.of("recall", 0.5, 0.46, 0.1).passed and not register.Gate.of("recall", 0.5, 0.44, 0.1).passed
    assert register.Gate.of("kid", 0.02, 0.02, 0.0).passed and not register.Gate.of("kid", 0.02, 0.021, 0.0).passed
    # an unbiased KID may be negative; an allowance still allows
    assert register.Gate.of("kid", -0.01, -0.0095, 0.1).passed and not register.Gate.of("kid", -0.01, 0.0, 0.1).passed


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "9.0", True])
@pytest.mark.parametrize("where", ["base", "tuned"])
@pytest.mark.parametrize("metric", ["fid", "recall"])
def test_what_is_no_number_fails_closed(metric: str, where: str, value: Any) -> None:
    verdict = register.judge(RULES, results(**{where: {metric: value}}), None)
    assert failed(verdict.gates["challenger"]) == [metric]
    assert not verdict.challenger and not verdict.champion  # the numbers at its best alone promote nothing
    assert "missing or not finite" in verdict.gates["challenger"][0 if metric == "fid" else 4].reason()


def test_every_metric_but_fid_can_be_a_gate() -> None:
    """And is judged the way the report shows it."""
    lower = {column.key: column.lower for column in report.COLUMNS if column.key != "reward"}
    assert {**dict.fromkeys(register.LOWER, True), **dict.fromkeys(register.HIGHER, False)} == lower


def test_fid_and_reward_are_no_allowances(tmp_path: Path) -> None:
    for name, words in (("fid", "a field of its own: register.min_fid_drop"), ("reward", "names 'reward'")):
        with pytest.raises(ValueError, match=words):
            register.register(ModelConfig(), RegisterConfig(allowances={name: 0.1}), tmp_path, tmp_path, tmp_path / "out")


def test_an_empty_evaluation_fails_every_gate() -> None:
    verdict = register.judge(RULES, {}, None)
    assert len(failed(verdict.gates["challenger"])) == len(failed(verdict.gates["champion"])) == 6


def test_sharpening_alone_makes_no_champion() -> None:
    verdict = register.judge(RULES, results(tuned_best={"fid": 10.9}), None)
    assert verdict.challenger and not verdict.champion
    assert failed(verdict.gates["champion"]) == ["fid"]


def test_a_champion_must_be_beaten_by_the_same_protocol() -> None:
    held = register.Champion("3", {**BETTER, "fid": 8.8}, results()["protocol"])
    assert register.judge(RULES, results(), held).champion
    assert not register.judge(RULES, results(tuned_best={"fid": 8.7}), held).champion
    other = register.Champion("3", held.scores, results()["protocol"] | {"samples": 50000})
    verdict = register.judge(RULES, results(), other)
    assert verdict.challenger and not verdict.champion
    assert "another protocol (samples)" in verdict.table() and "vapi promote VERSION --force REASON" in verdict.table()
    for unknown in (register.Champion("3", {}, results()["protocol"]), register.Champion("3", held.scores, {})):
        assert not register.judge(RULES, results(), unknown).champion


def test_a_misspelt_allowance_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="recal.*did you mean 'recall'"):
        register.register(ModelConfig(), RegisterConfig(allowances={"recal": 0.1}), tmp_path, tmp_path, tmp_path / "out")


# --- with a registry ---------------------------------------------------------------------------


class Project:
    """A clone with tiny weights, a tuned checkpoint, its evaluation and a database of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.gpt = TINY_GPT
        self.model = write_tiny(folder / "data")
        self.uri = f"sqlite:///{folder / 'mlflow.db'}"
        (folder / "params.yaml").write_text(config.dump(Config()))

    def tuned(self, seed: int, **changes: dict[str, Any]) -> str:
        """Another checkpoint, evaluated."""
        model = write_tiny(self.folder / f"tuned-{seed}", gpt_config=self.gpt, seed=seed)
        tune, evaluate = self.folder / "artifacts" / "tune", self.folder / "artifacts" / "evaluate"
        for folder in (tune, evaluate):
            folder.mkdir(parents=True, exist_ok=True)
        (tune / "model.safetensors").write_bytes(Path(model.generator).read_bytes())
        digest = data.file_digest(tune / "model.safetensors")
        found = results(**changes) | {"weights": {"tuned": digest}}
        data.write_json(evaluate / "metrics.json", found)
        (evaluate / "report.html").write_text(markup.document("tuned", ["<header><h1>tuned</h1></header>"]))
        networks = {"tokenizer": data.tokenizer_digest(self.model), "text_encoder": data.encoder_digest(self.model)}
        data.describe(evaluate, "evaluate", {"model": self.model, "evaluate": EvaluateConfig()}, networks, 1.0)
        inputs = {"generator": data.file_digest(Path(self.model.generator)), "subset": "5" * 64, **networks}
        data.describe(tune, "tune", {"model": self.model, "tune": TuneConfig(lr=3e-6)}, inputs, 1.0)
        subset = {"source": "photos/mine.parquet", "images": 2048}
        data.write_json(tune / "summary.json", {"steps": 100, "images_seen": 6400, "parameters": 12345, "subset": subset})
        return digest

    def register(self, uri: str = "", **rules: Any) -> bool:
        rules = RegisterConfig(model_name="vapi-test", **rules)
        settings = Config(model=self.model, register=rules, track=config.TrackConfig(uri=uri or self.uri))
        artifacts = self.folder / "artifacts"
        with track.start("register", settings) as run:
            return register.register(self.model, rules, artifacts / "tune", artifacts / "evaluate", artifacts / "register", run)

    def say(self, *words: str) -> tuple[int, str]:
        """Exit code of a command on this registry, and what it says."""
        with pytest.raises(SystemExit) as stop, contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
            cli.main([*words, "--track.uri", self.uri, "--model-name", "vapi-test"])
        return int(stop.value.code or 0), out.getvalue()

    def refused(self, *words: str) -> str:
        """What a command says that is refused and changes nothing."""
        before = self.aliases()
        code, said = self.say(*words)
        assert code == cli.MISTAKE and self.aliases() == before, said
        return said

    def versions(self) -> dict[str, Any]:
        found = track.connect(self.uri).search_model_versions("name = 'vapi-test'")
        return {str(version.version): version for version in found}

    def aliases(self) -> dict[str, str]:
        found = track.connect(self.uri).search_registered_models("name = 'vapi-test'")
        return {name: str(version) for name, version in found[0].aliases.items()} if found else {}

    def registration(self) -> dict[str, Any]:
        return data.read_json(self.folder / "artifacts" / "register" / "registration.json")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow_db: Path, sender_thread: None) -> Project:
    made = Project(tmp_path)
    (tmp_path / "mlflow.db").write_bytes(mlflow_db.read_bytes())
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "RANK", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    return made


def test_a_better_model_becomes_challenger_and_champion_and_draws_elsewhere(
    project: Project, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = project.tuned(1)
    (project.folder / "dvc.lock").write_text("stages:\n  tune:\n    outs:\n    - path: artifacts/tune\n      md5: abc.dir\n")
    assert project.register() is True
    assert "registered: vapi-test version 1 as challenger and champion" in capsys.readouterr().out
    assert project.aliases() == {"challenger": "1", "champion": "1"}
    tags = project.versions()["1"].tags
    assert (tags["weights"], tags["dvc.tune"], json.loads(tags["tuned_best"])["fid"]) == (digest, "abc.dir", 8.0)
    run = track.connect(project.uri).get_run(tags["run"])
    assert run.data.tags["mlflow.parentRunId"] == tags["parent"] and run.data.tags["vapi.execution"] == tags["execution"]
    first = project.registration()

    # again: the same version, the same record
    assert project.register() is True
    assert list(project.versions()) == ["1"]
    ids = {"run", "parent"}
    assert {k: v for k, v in project.registration().items() if k not in ids} == {k: v for k, v in first.items() if k not in ids}

    # in a fresh process, elsewhere, without this clone's code
    code = (
        "import sys, json, mlflow\n"
        "model = mlflow.pyfunc.load_model('models:/vapi-test@challenger')\n"
        "draw = lambda ids, **params: model.predict({'class_id': ids}, params=params)['png_base64'].tolist()\n"
        "drawn = [draw([3, 1], seed=5), draw([1], seed=6), draw([3, 1], seed=5, temperature=0.01)]\n"
        "print(json.dumps([*drawn, sys.modules['vapi'].__file__]))\n"
    )
    environment = {**os.environ, "MLFLOW_TRACKING_URI": project.uri, "PYTHONPATH": "", "PYTHONSAFEPATH": "1"}
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    done = subprocess.run([sys.executable, "-c", code], cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    both, second, cold, loaded = json.loads(done.stdout.splitlines()[-1])
    assert not Path(loaded).is_relative_to(REPO)
    assert second == both[1:] and cold != both  # an image depends on its own seed alone; parameters arrive
    policy = models.load(project.model, project.folder / "artifacts" / "tune" / "model.safetensors")
    with torch.inference_mode():
        codes = policy.generate(policy.condition([3, 1]), [5, 6], temperature=0.9)
        pixels = images.to_uint8(policy.decode(codes)).permute(0, 2, 3, 1).numpy()
    drawn = [Image.open(io.BytesIO(base64.b64decode(png))) for png in both]
    assert np.array_equal([np.asarray(image) for image in drawn], pixels)


def test_a_tuned_tokenizer_is_registered_with_the_bases_generator(project: Project, tmp_path_factory: pytest.TempPathFactory) -> None:
    project.tuned(1)
    tune, evaluate = project.folder / "artifacts" / "tune", project.folder / "artifacts" / "evaluate"
    other = Path(write_tiny(project.folder / "other", seed=4).tokenizer)
    (tune / "model.safetensors").unlink()
    (tune / models.TUNED["tokenizer"]).write_bytes(other.read_bytes())
    digest = data.file_digest(other)
    data.write_json(evaluate / "metrics.json", data.read_json(evaluate / "metrics.json") | {"weights": {"tuned": digest}})
    assert project.register() is True and project.versions()["1"].tags["weights"] == digest
    served = Path(track.connect(project.uri).get_model_version_download_uri("vapi-test", "1").removeprefix("file://"))
    kept = {path.name: data.file_digest(path) for path in served.rglob("*.safetensors")} if served.is_dir() else {}
    assert sorted(kept.values()) == sorted([digest, data.file_digest(Path(project.model.generator))]), served


KILLED = """
import os, signal
from vapi import cli, register
create = register.Registry._create
def and_die(*values):
    create(*values)
    os.kill(os.getpid(), signal.SIGKILL)
register.Registry._create = and_die
cli.main(["register"])
"""


def test_killed_between_version_and_aliases_the_same_command_makes_no_second_version(project: Project) -> None:
    project.tuned(1)
    settings = Config(model=project.model, register=RegisterConfig(model_name="vapi-test"), track=config.TrackConfig(uri=project.uri))
    (project.folder / "params.yaml").write_text(config.dump(settings))
    ran = subprocess.run([sys.executable, "-c", KILLED], env={**os.environ, "PYTHONPATH": str(REPO)}, capture_output=True, text=True)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    assert list(project.versions()) == ["1"] and project.aliases() == {}
    assert "vapi-test has no challenger; name a version, it has 1" in project.refused("promote")
    assert "its run has not ended well" in project.refused("promote", "1") and project.aliases() == {}
    assert project.register() is True
    assert list(project.versions()) == ["1"] and project.aliases() == {"challenger": "1", "champion": "1"}


def test_a_worse_model_leaves_the_registry_alone(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    project.tuned(1, tuned={"fid": 13.9})
    assert project.register() is False
    printed = capsys.readouterr().out
    assert "not promoted: fid is 13.9, 0.6 beyond the limit 13.3" in printed and "FAILED" in printed
    assert project.versions() == {} and project.aliases() == {}
    record = project.registration()
    assert record["passed"] == {"challenger": False, "champion": False} and "version" not in record
    assert record["against"]["challenger"]["gates"][0]["margin"] == pytest.approx(-0.6)


def test_a_later_model_replaces_the_champion_only_if_it_beats_it(project: Project) -> None:
    project.tuned(1)
    project.register()
    project.tuned(2, tuned_best={"fid": 7.9})  # better, but not by 5 %
    assert project.register()
    assert project.aliases() == {"challenger": "2", "champion": "1"}
    project.tuned(3, tuned_best={"fid": 7.0})
    assert project.register()
    assert project.aliases() == {"challenger": "3", "champion": "3", "previous": "1"}
    project.tuned(4, tuned_best={"fid": 1.0}, protocol={"samples": 9})
    assert project.register()
    assert project.aliases() == {"challenger": "4", "champion": "3", "previous": "1"}
    assert "another protocol (samples)" in project.registration()["note"]


def test_an_evaluation_of_other_weights_is_refused(project: Project) -> None:
    project.tuned(1)
    (project.folder / "artifacts" / "tune" / "model.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match="measured on other weights.*vapi evaluate"):
        project.register(uri="off")


def test_another_tokenizer_or_arithmetic_than_was_measured_is_refused(project: Project) -> None:
    project.tuned(1)
    measured = project.model
    project.model = dataclasses.replace(measured, tokenizer=write_tiny(project.folder / "other", seed=9).tokenizer)
    with pytest.raises(ValueError, match="measured with another tokenizer"):
        project.register(uri="off")
    project.model = dataclasses.replace(measured, precision="bfloat16")
    with pytest.raises(ValueError, match="measured with model.precision 'float32', and now it is 'bfloat16'"):
        project.register(uri="off")
    assert not (project.folder / "artifacts" / "register").exists()


def test_a_server_is_asked_for_only_when_there_is_something_to_register(project: Project) -> None:
    project.tuned(1, tuned={"fid": 99.0})
    assert project.register(uri="http://127.0.0.1:9") is False
    assert project.registration()["passed"] == {"challenger": False, "champion": False}


def test_without_a_server_nothing_is_half_done(project: Project) -> None:
    project.tuned(1)
    with pytest.raises(ValueError, match="http://127.0.0.1:9 cannot be reached.*then repeat the command"):
        project.register(uri="http://127.0.0.1:9")
    assert not (project.folder / "artifacts" / "register").exists()


def test_with_tracking_off_the_gates_are_judged_and_nothing_is_registered(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    project.tuned(1)
    assert project.register(uri="off") is False
    assert "tracking is off" in capsys.readouterr().out
    assert project.registration()["passed"] == {"challenger": True, "champion": True}
    artifacts = project.folder / "artifacts"
    assert not register.register(project.model, RULES, artifacts / "tune", artifacts / "evaluate", artifacts / "register", NO_RUN)


# --- the card ----------------------------------------------------------------------------------


def test_a_version_bears_its_card(project: Project) -> None:
    digest = project.tuned(1)
    assert project.register(licences={"data": "CC BY-SA 4.0, from my camera"})
    version = project.versions()["1"]
    folder = project.folder / "artifacts" / "register"
    text = (folder / card.FILE).read_text()
    assert version.description == text and len(text) <= card.DESCRIPTION
    run = track.connect(project.uri)
    assert {card.FILE, "report.html"} <= {entry.path for entry in run.list_artifacts(version.tags["run"])}
    base = data.file_digest(Path(project.model.generator))
    for words in (
        f"`{digest}`", f"`{base}`", "photos/mine.parquet, 2048 images, `5555", "100 steps, 6,400 images seen", "12,345 parameters",
        "| data | tuned on | photos/mine.parquet | CC BY-SA 4.0, from my camera | register.licences |",
        f"| generator | part of it | {project.model.generator} | unknown | nobody |",
        f"| reference | measured it | data/digits/reference.parquet | {licences.DIGITS} | its name |",
        "**Unknown: generator, tokenizer.**",
        "### challenger: passed, tuned against base, both sampled alike", "| tuned | limit |", "| fid | 14 | 9 | 13.3 | 4.3 | yes |",
        "| tuned | 9.00 | 10.00 | 5.00 |", "One seed of sampling", "Not measured: sFID", "| `tune.lr` | 0.0001 | 3.0e-06 |",
    ):  # fmt: skip
        assert words in text, words
    assert "prompts" not in text and "detector" not in text, "a generator of classes has no use for them"
    project.register(licences={"data": "mine", "generator": "MIT", "tokenizer": "MIT"})
    again = project.versions()["1"].description
    assert "Unknown" not in again and "| tuned on | photos/mine.parquet | mine |" in again, "the same version, its card anew"


def test_a_card_shows_what_a_configuration_leaves_out_and_what_had_no_say(project: Project) -> None:
    """A reward or a gate that the recipe has and the run has not; a network that only looked on; weights of an earlier version."""

    def card_of(changes: dict[str, Any]) -> str:
        path = project.folder / "artifacts/tune/config.json"
        made = data.read_json(path)
        tune = {**made["sections"]["tune"], **changes}
        data.write_json(path, {**made, "sections": {**made["sections"], "tune": {k: v for k, v in tune.items() if v is not None}}})
        rules, folder = RegisterConfig(model_name="vapi-test", allowances={"kid": 0.0}), project.folder / "artifacts"
        return card.card(project.model, rules, folder / "tune", folder / "evaluate", {"against": {}, "note": ""})

    project.tuned(1)
    whole = card_of({})
    assert "| perceptual | rewarded it |" in whole and "reward and prior" in whole
    assert "| `register.allowances.recall` | 0.1 | absent |" in whole
    assert "| `tune.rewards.lpips` | 10.0 | absent |" in card_of({"rewards": {"mse": 1.0}})
    for changes, words in (
        ({"rewards": {"mse": 1.0, "lpips": 1.0}, "policy_weight": 0.0}, "prior alone"),
        ({"objective": "cca", "policy_weight": 1.0}, "condition contrastive alignment"),
    ):
        assert "| perceptual |" not in (said := card_of(changes)) and words in said
    assert "VA-pi (arXiv 2512.19680), reward and prior" in card_of({"objective": None})


def test_a_janus_with_a_tokenizer_of_its_own_is_not_registered(project: Project) -> None:
    project.tuned(1)
    project.model = dataclasses.replace(project.model, policy="janus")
    with pytest.raises(ValueError, match=r"a registered Janus takes its words from the folder"):
        register._require_servable(project.model)


def test_a_card_that_is_too_long_for_a_registry_says_where_the_rest_is(project: Project) -> None:
    project.tuned(1)
    project.register(licences={"data": "words " * 700})
    whole = (project.folder / "artifacts" / "register" / card.FILE).read_text()
    shown = project.versions()["1"].description
    assert len(whole) > card.DESCRIPTION >= len(shown) and f"{card.FILE} of run {project.versions()['1'].tags['run']}" in shown
    kept = shown.partition("\n(The rest")[0]
    assert whole.startswith(kept + "\n## ") and "## What it is" in kept


def test_gates_are_shown_in_the_report_and_in_the_summary(project: Project) -> None:
    project.tuned(1, tuned={"recall": 0.1})
    assert not project.register(uri="off")
    page = (project.folder / "artifacts" / "register" / "report.html").read_text()
    assert "<h3>challenger: FAILED, tuned against base, both sampled alike</h3>" in page
    assert "<td>0.45</td><td>−0.35</td><td><b>no</b></td>" in page and page.count("</section>") == 1
    shown = "challenger: FAILED, tuned against base, both sampled alike (recall)\nchampion: FAILED with challenger, tuned against"
    assert shown in (said := report.table(project.folder / "artifacts")) and "register/report.html" in said
    project.tuned(2)
    assert "FAILED" not in (said := report.table(project.folder / "artifacts")) and "evaluate/report.html" in said, "not of this evaluation"


# --- by hand -----------------------------------------------------------------------------------


def three(project: Project) -> None:
    """Version 1 is champion, 2 is not better than it, 3 neither."""
    project.tuned(1)
    project.register()
    for seed, fid in ((2, 7.9), (3, 7.8)):
        project.tuned(seed, tuned_best={"fid": fid})
        project.register()
    assert project.aliases() == {"challenger": "3", "champion": "1"}


def test_promote_knows_the_rules_of_register(project: Project) -> None:
    """An allowance that would overrule a demand is refused, as there."""
    three(project)
    said = project.refused("promote", "3", "--min-fid-drop", "0.05", "--register.allowances.fid", "0.05")
    assert "register.allowances names 'fid', which has a field of its own: register.min_fid_drop" in said


def test_without_its_page_an_evaluation_changes_no_registry(project: Project) -> None:
    project.tuned(1)
    (project.folder / "artifacts/evaluate/report.html").unlink()
    with pytest.raises(ValueError, match="report.html is not here, which register adds the gates to; run: vapi evaluate"):
        project.register()
    assert not project.versions()


def test_promote_and_rollback_and_again(project: Project) -> None:
    three(project)
    said = project.refused("promote")
    assert "vapi-test version 3 is not promoted: champion: fid is 7.8, 0.2 beyond the limit 7.6. Nothing changed" in said
    code, said = project.say("promote", "2", "--force", "sharper to the eye")
    assert code == 0 and "version 2 is champion by force; version 1 was it before" in said
    assert project.aliases() == {"challenger": "3", "champion": "2", "previous": "1"}
    assert project.versions()["2"].tags["forced"] == "sharper to the eye (against it: champion: fid is 7.9, 0.3 beyond the limit 7.6)"
    assert project.say("promote", "2") == (0, "vapi-test version 2 is champion already; nothing changed\n")
    assert "version 1 is champion again; version 2 was taken back" in project.say("rollback")[1]
    assert project.aliases() == {"challenger": "3", "champion": "1"}
    assert project.say("rollback") == (0, "vapi-test version 1 is champion again already, in place of version 2; nothing changed\n")
    assert project.aliases() == {"challenger": "3", "champion": "1"}


def test_gates_that_are_lower_today_let_it_pass(project: Project) -> None:
    three(project)
    code, said = project.say("promote", "--min-fid-drop", "0.01")
    assert code == 0 and "vapi-test version 3 is champion; version 1 was it before" in said and "forced" not in project.versions()["3"].tags


def test_what_was_taken_back_is_no_champion_again_by_itself(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    project.tuned(1)
    project.register()
    project.tuned(2, tuned_best={"fid": 5.0})
    project.register()
    assert project.aliases()["champion"] == "2"
    project.say("rollback")
    project.register()
    assert project.aliases() == {"challenger": "2", "champion": "1"}
    assert "as challenger in" in (said := capsys.readouterr().out) and "champion again only by: vapi promote 2" in said
    project.tuned(2, tuned_best={"fid": 5.01})  # the same weights, measured again
    project.register()
    assert project.aliases() == {"challenger": "3", "champion": "1"}
    assert project.say("promote", "2")[0] == 0
    assert project.aliases() == {"challenger": "3", "champion": "2", "previous": "1"}
    assert register.WITHDRAWN not in project.versions()["2"].tags


def test_a_registry_that_lacks_what_is_asked_for_is_left_alone(project: Project) -> None:
    assert "the registry holds no vapi-test (register.model_name); register one with: vapi register" in project.refused("promote")
    assert "vapi-test has no champion to take back; make one with: vapi promote VERSION" in project.refused("rollback")
    project.tuned(1, tuned_best={"fid": 12.0})  # a challenger only
    project.register()
    assert "vapi-test has no champion to take back" in project.refused("rollback")
    assert "vapi-test has no version 7; it has 1" in project.refused("promote", "7")
    assert "vapi promote 7 --force REASON" in project.refused("promote", "--force", "7")
    assert "promote takes one version, not 1 2" in project.refused("promote", "1", "2")
    assert "rollback takes no version" in project.refused("rollback", "1")
    assert project.say("promote", "1", "--force", "a first one")[0] == 0
    assert "nothing to go back to from version 1" in project.refused("rollback")


def test_a_version_whose_run_goes_on_is_not_promoted(project: Project) -> None:
    three(project)
    version = project.versions()["2"]
    track.connect(project.uri).update_run(version.run_id, status="RUNNING")
    assert "its run has not ended well (RUNNING)" in project.refused("promote", "2", "--min-fid-drop", "0.01")


def test_where_there_is_no_registry_none_is_made(project: Project) -> None:
    for uri, words in (
        (f"sqlite:///{project.folder}/none.db", "none.db is not here: nothing was tracked yet"),
        ("off", "tracking is off"),
        ("http://127.0.0.1:9", "http://127.0.0.1:9 cannot be reached"),
    ):
        for command in ("promote", "rollback"):
            with pytest.raises(ValueError, match=words), track.registry(Config(track=config.TrackConfig(uri=uri))) as client:
                getattr(register, command)(RULES, client)
    assert not (project.folder / "none.db").exists()


# --- served ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["class_id", pytest.param("prompt", marks=pytest.mark.slow)])
def test_mlflow_serves_it(name: str, project: Project, captioned_model: ModelConfig) -> None:
    """`mlflow models serve`, as docs/registry.md types it."""
    asked, wrong, words = [3, 1], 10, "class_id 10 is unknown; this model draws classes 0 .. 9"
    if name == "prompt":
        project.model, project.gpt = captioned_model, CAPTIONED_GPT
        asked, wrong, words = list(CAPTIONS[:2]), " ", "prompt 0 is ' '; this model draws what words say"
    project.tuned(1)
    project.register()
    program = [str(Path(sys.executable).parent / "mlflow"), "models", "serve", "-m", "models:/vapi-test@champion"]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": project.uri, "PYTHONPATH": "", "MLFLOW_DISABLE_TELEMETRY": "true"}
    log = project.folder / "log"
    with log.open("w") as file, socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        free.close()
        server = subprocess.Popen(
            [*program, "--env-manager", "local", "--port", str(port)], env=environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        answered(f"http://127.0.0.1:{port}/ping", log)
        both, second, cold = (
            json.loads(answered(f"http://127.0.0.1:{port}/invocations", log, {"inputs": {name: some}, "params": params}))["predictions"]
            for some, params in (
                (asked, {"seed": 5, "temperature": 0.9, "guidance": 1.5}),
                (asked[1:], {"seed": 6, "temperature": 0.9, "guidance": 1.5}),
                (asked[1:], {"seed": 6, "temperature": 0.01, "guidance": 1.5}),
            )
        )
        assert [row[name] for row in both] == asked and second == both[1:] != cold
        sizes = [Image.open(io.BytesIO(base64.b64decode(row["png_base64"]))).size for row in both]
        assert sizes == [(16, 16)] * 2
        with pytest.raises(urllib.error.HTTPError) as refused:
            answered(f"http://127.0.0.1:{port}/invocations", log, {"inputs": {name: [wrong]}})
        assert refused.value.code == 400 and words in json.loads(refused.value.read())["stack_trace"].strip().splitlines()[-1]
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def answered(address: str, log: Path, body: Any = None, seconds: float = 120) -> bytes:
    """What a server says, once it is up."""
    deadline = time.monotonic() + seconds
    asked = urllib.request.Request(address, json.dumps(body).encode() if body else None, {"Content-Type": "application/json"})
    while True:
        try:
            with urllib.request.urlopen(asked, timeout=60) as answer:
                return answer.read()
        except urllib.error.HTTPError:
            raise
        except OSError:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
