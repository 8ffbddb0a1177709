"""Only what is better enters the registry, and what enters it works elsewhere."""

from __future__ import annotations

import base64
import copy
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_tiny
from PIL import Image

from vapi import config, data, images, models, register, report, track
from vapi.config import Config, ModelConfig, RegisterConfig
from vapi.run import NO_RUN

REPO = Path(__file__).parent.parent
BASE = {"fid": 14.0, "kid": 0.02, "inception_score": 4.0, "precision": 0.6, "recall": 0.5, "class_accuracy": 0.8, "fid_std": None}
BETTER = {"fid": 9.0, "kid": 0.01, "inception_score": 5.0, "precision": 0.7, "recall": 0.46, "class_accuracy": 0.9, "fid_std": None}
BEST = {"temperature": 0.9, "guidance": 1.0}
RULES = RegisterConfig()


def results(**changes: dict[str, Any]) -> dict[str, Any]:
    """A metrics.json in which tuned passes every gate, but for the changes."""
    made = {"base": BASE, "tuned": BETTER, "base_best": {**BASE, "fid": 11.0, **BEST}, "tuned_best": {**BETTER, "fid": 8.0, **BEST}}
    made |= {"protocol": {"samples": 2000, "seeds": [0]}}
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
    other = register.Champion("3", held.scores, {"samples": 50000, "seeds": [0]})
    verdict = register.judge(RULES, results(), other)
    assert verdict.challenger and not verdict.champion
    assert "another protocol (samples)" in verdict.table() and "delete_registered_model_alias('vapi-digits', 'champion')" in verdict.table()
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
        self.model = write_tiny(folder / "data")
        self.uri = f"sqlite:///{folder / 'mlflow.db'}"
        (folder / "params.yaml").write_text(config.dump(Config()))

    def tuned(self, seed: int, **changes: dict[str, Any]) -> str:
        """Another checkpoint, evaluated."""
        model = write_tiny(self.folder / f"tuned-{seed}", seed=seed)
        tune, evaluate = self.folder / "artifacts" / "tune", self.folder / "artifacts" / "evaluate"
        for folder in (tune, evaluate):
            folder.mkdir(parents=True, exist_ok=True)
        (tune / "model.safetensors").write_bytes(Path(model.generator).read_bytes())
        digest = data.file_digest(tune / "model.safetensors")
        data.write_json(evaluate / "metrics.json", results(**changes) | {"weights": {"tuned": digest}})
        data.describe(evaluate, "evaluate", {"model": self.model}, {"tokenizer": data.tokenizer_digest(self.model)}, 1.0)
        return digest

    def register(self, uri: str = "", **rules: Any) -> bool:
        rules = RegisterConfig(model_name="vapi-test", **rules)
        settings = Config(model=self.model, register=rules, track=config.TrackConfig(uri=uri or self.uri))
        artifacts = self.folder / "artifacts"
        with track.start("register", settings) as run:
            return register.register(self.model, rules, artifacts / "tune", artifacts / "evaluate", artifacts / "register", run)

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
    assert project.aliases() == {"challenger": "3", "champion": "3"}
    project.tuned(4, tuned_best={"fid": 1.0}, protocol={"samples": 9})
    assert project.register()
    assert project.aliases() == {"challenger": "4", "champion": "3"}
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
