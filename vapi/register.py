"""A tuned model enters MLflow's registry if it passes its gates.

Two aliases, two questions:

- ``challenger``: does tuned beat base when both are sampled alike?
- ``champion``: does tuned at its best beat the present champion at its best (without a champion: the
  base at its best)? A model that is merely sharper than another gains nothing over it here.

In both, FID must fall by ``register.min_fid_drop`` and GenEval's score rise by ``register.min_geneval_gain`` (either may
be 0, and then decides nothing), and no other metric may get worse by more than its allowance. A number that is missing, not finite or
measured by another protocol fails its gate. A model that passes the first question is registered, with everything that
says where it came from, a model card among it; one that does not leaves the registry alone. Repeating the command finds
the version it made before.

People decide too: ``promote`` makes a version champion if it passes the gates of today, or with a reason that is kept;
``rollback`` gives the alias back to the version that had it before (alias ``previous``), and a version that was taken back
is no champion again by itself.

Left out: stages (MLflow replaced them by aliases), and deleting or archiving versions.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vapi import card, data, models, report
from vapi.config import ModelConfig, RegisterConfig, flat, nearest, plain, read_yaml, write_text
from vapi.models import weights
from vapi.run import NO_RUN, Run, Server

LOWER = ("fid", "sfid", "kid", "fid_random", "fd_dinov2")  # better when lower
HIGHER = (
    "inception_score", "inception_score_adm", "precision", "recall", "precision_adm", "recall_adm", "class_accuracy",
    "geneval", "geneval_second", "clipscore", "hpsv2",
)  # fmt: skip
OWN = {"fid": "min_fid_drop", "geneval": "min_geneval_gain"}
"""Metrics with a field of their own, in which a model must get better, not just no worse."""
REQUIREMENTS = ("torch", "numpy", "pandas", "pillow", "safetensors", "pyyaml", "mlflow")
FOR_JANUS = ("transformers",)
FOR_T5 = ("transformers", "sentencepiece", "beautifulsoup4", "ftfy")

Scores = dict[str, Any]


def register(model: ModelConfig, register: RegisterConfig, tune: Path, evaluate: Path, out: Path, run: Run = NO_RUN) -> bool:
    """Put what ``tune`` tuned into the registry if ``evaluate``/metrics.json lets it pass.

    Prints every gate and writes registration.json, MODEL_CARD.md and report.html, the evaluation's with the gates, to ``out``.
    Returns whether the model was registered.
    Raises ValueError if the evaluation is of other weights, or if there is something to register and the
    MLflow server cannot be reached; with tracking off the gates are judged and nothing is registered.
    """
    begin = time.perf_counter()
    _check_names(register)
    results = data.read_json(evaluate / "metrics.json")
    digest = _weights_digest(results, model, tune, evaluate)
    _require_measured(model, evaluate)
    _require_servable(model)
    page = _page(evaluate)  # before anything has changed
    with data.output_folder(out, "register") as folder, data.locked(data.state_dir("locks") / "register.lock"):
        server = run.server() if judge(register, results, None).challenger else None
        registry = Registry(server.client, register.model_name) if server else None
        verdict = judge(register, results, registry.champion(but=digest) if registry else None)
        text = card.card(model, register, tune, evaluate, verdict.plain())
        made = registry.publish(server, model, tune, results, verdict, text) if registry and server and verdict.challenger else {}
        judged = {"name": register.model_name, "weights": digest, **verdict.plain(), **made}
        data.write_json(folder / "registration.json", judged)
        write_text(folder / card.FILE, text)
        write_text(folder / "report.html", report.gated(page, judged))
        inputs = {"tune": data.file_digest(tune), "evaluate": data.file_digest(evaluate)}
        data.describe(folder, "register", {"model": model, "register": register}, inputs, time.perf_counter() - begin)
    run.metrics({"register/challenger": verdict.challenger, "register/champion": "champion" in made.get("aliases", ())})
    run.artifact(Path(out) / card.FILE)
    run.artifact(Path(out) / "report.html")
    print(verdict.table())
    print(_outcome(register, verdict, made, server))
    return bool(made)


def _outcome(register: RegisterConfig, verdict: Verdict, made: dict[str, Any], server: Server | None) -> str:
    if made:
        words = f"registered: {register.model_name} version {made['version']} as {' and '.join(made['aliases'])} in {made['registry']}"
        taken_back = verdict.champion and "champion" not in made["aliases"]
        return words + (f"; it was taken back before, and is champion again only by: vapi promote {made['version']}" * taken_back)
    if verdict.challenger:
        return (
            "not registered: the gates are passed, but tracking is off (track.uri), and the registry is part of MLflow; "
            "with it on: vapi register (under DVC: dvc repro --force --single-item register)"
        )
    return "not promoted: " + "; ".join(gate.reason() for gate in verdict.gates["challenger"] if not gate.passed)


def _check_names(register: RegisterConfig) -> None:
    own = {name for name, field in OWN.items() if getattr(register, field) > 0}
    known = set(LOWER + HIGHER) - own
    for name in register.allowances:
        if name in own:
            raise ValueError(f"register.allowances names {name!r}, which has a field of its own: register.{OWN[name]}")
        if name not in known:
            raise ValueError(f"register.allowances names {name!r}; {nearest(name, known)}")


def _weights_digest(results: dict[str, Any], model: ModelConfig, tune: Path, evaluate: Path) -> str:
    path = models.Networks.tuned(model, tune).changed
    digest = data.file_digest(path)
    if results.get("weights", {}).get("tuned") != digest:
        raise ValueError(f"{evaluate}/metrics.json was measured on other weights than {path}; run: vapi evaluate")
    return digest


def _require_measured(model: ModelConfig, evaluate: Path) -> None:
    """What is published must be what was measured: the tokenizer and the arithmetic too, not the weights alone."""
    made = data.read_json(evaluate / "config.json")
    if made["inputs"]["tokenizer"] != data.tokenizer_digest(model):
        raise ValueError(f"{evaluate} was measured with another tokenizer than {model.tokenizer}; run: vapi evaluate")
    if made["inputs"].get("text_encoder", "") != data.encoder_digest(model):
        raise ValueError(f"{evaluate} was measured with another text encoder than {model.text_encoder or 'none'}; run: vapi evaluate")
    for name in ("policy", "image_size", "precision"):
        then, now = made["sections"]["model"][name], getattr(model, name)
        if then != now:
            raise ValueError(f"{evaluate} was measured with model.{name} {then!r}, and now it is {now!r}; run: vapi evaluate")


def _require_servable(model: ModelConfig) -> None:
    """Raises ValueError for a Janus whose image tokenizer is a file: served, its words would come from that too."""
    if model.policy == "janus" and weights.locate(model.tokenizer).is_file():
        raise ValueError(
            f"model.tokenizer is the file {model.tokenizer}, and a registered Janus takes its words from the folder named there; it can "
            "be used, and not registered"
        )


def _page(evaluate: Path) -> str:
    path = evaluate / "report.html"
    if not path.is_file():
        raise ValueError(f"{path} is not here, which register adds the gates to; run: vapi evaluate")
    return path.read_text()


# --- gates -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gate:
    """One metric of a candidate against a rival. ``margin`` is how far inside the limit it is; None: no comparison."""

    metric: str
    rival: float | None
    candidate: float | None
    limit: float | None
    margin: float | None
    passed: bool

    @classmethod
    def of(cls, metric: str, rival: Any, candidate: Any, allowance: float) -> Gate:
        """``allowance`` is the share of the rival's value by which the candidate may be worse; negative: must be better."""
        rival, candidate = _number(rival), _number(candidate)
        if rival is None or candidate is None:
            return cls(metric, rival, candidate, None, None, False)
        better = -1.0 if metric in LOWER else 1.0
        limit = rival - better * allowance * abs(rival)
        margin = better * (candidate - limit)
        return cls(metric, rival, candidate, limit, margin, margin >= 0)

    def reason(self) -> str:
        """Why the gate is shut."""
        if self.margin is None:
            lacks = " and ".join(who for who, value in (("the rival", self.rival), ("the candidate", self.candidate)) if value is None)
            return f"{self.metric} of {lacks} is missing or not finite"
        return f"{self.metric} is {self.candidate:.4g}, {abs(self.margin):.4g} beyond the limit {self.limit:.4g}"


def _number(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def gates(register: RegisterConfig, rival: Scores, candidate: Scores) -> list[Gate]:
    """What must get better, and every metric with an allowance."""
    better = {name: -getattr(register, field) for name, field in OWN.items() if getattr(register, field) > 0}
    allowances = {**better, **register.allowances}
    return [Gate.of(name, rival.get(name), candidate.get(name), allowance) for name, allowance in allowances.items()]


@dataclass(frozen=True)
class Champion:
    """The registered champion: the numbers at its best, and how they were measured."""

    version: str
    scores: Scores
    protocol: dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """All gates, by alias, and who was on the other side."""

    gates: dict[str, list[Gate]]
    rivals: dict[str, str]
    note: str = ""

    @property
    def challenger(self) -> bool:
        """Whether tuned beats base, sampled alike."""
        return all(gate.passed for gate in self.gates["challenger"])

    @property
    def champion(self) -> bool:
        """Whether tuned at its best beats the champion, or the base, at its best. Never without the first."""
        return self.challenger and all(gate.passed for gate in self.gates["champion"])

    def plain(self) -> dict[str, Any]:
        """For registration.json."""
        listed = {alias: {"rival": self.rivals[alias], "gates": [asdict(gate) for gate in found]} for alias, found in self.gates.items()}
        return {"passed": {"challenger": self.challenger, "champion": self.champion}, "against": listed, "note": self.note}

    def table(self) -> str:
        """The gates for a terminal."""
        lines = [f"{'':<17}{'rival':>11}{'tuned':>11}{'limit':>11}{'margin':>11}"]
        for alias, found in self.gates.items():
            lines.append(f"{alias}: tuned against {self.rivals[alias]}")
            for gate in found:
                numbers = "".join(
                    f"{'missing' if x is None else f'{x:.4g}':>11}" for x in (gate.rival, gate.candidate, gate.limit, gate.margin)
                )
                lines.append(f"  {gate.metric:<15}{numbers}  {'passed' if gate.passed else 'FAILED'}")
        return "\n".join(lines + [self.note] * bool(self.note))


def judge(register: RegisterConfig, results: dict[str, Any], champion: Champion | None) -> Verdict:
    """Both questions, from metrics.json and the present champion."""
    protocol, note, best = results.get("protocol"), "", results.get("base_best", {})
    rivals = {"challenger": "base, both sampled alike", "champion": "base at its best"}
    if champion is not None:
        rivals["champion"], best = f"champion version {champion.version} at its best", champion.scores
        if differs := _differences(champion.protocol, protocol):
            best = {}  # numbers of another protocol are no numbers
            note = (
                f"version {champion.version} was measured by another protocol ({differs}): nothing can be said against it. Evaluate as "
                "it was evaluated, or decide without numbers: vapi promote VERSION --force REASON"
            )
    found = {
        "challenger": gates(register, results.get("base", {}), results.get("tuned", {})),
        "champion": gates(register, best, results.get("tuned_best", {})),
    }
    return Verdict(found, rivals, note)


def _differences(one: Any, other: Any) -> str:
    """The names in which two protocols differ; not knowing one is a difference too."""
    if not one or not other:
        return "unknown"
    left, right = flat(one), flat(other)
    return ", ".join(name for name in sorted({*left, *right}) if left.get(name) != right.get(name))


# --- the registry ------------------------------------------------------------------------------


RESULTS = ("base", "tuned", "base_best", "tuned_best", "protocol")
"""What a version's tags hold of metrics.json: its link to a run's metrics is not kept by every MLflow store."""
WITHDRAWN = "withdrawn"
"""Tag of a version that was taken back: the version that is champion in its place."""


class Registry:
    """One registered model in MLflow."""

    def __init__(self, client: Any, name: str) -> None:
        self.client, self.name = client, name

    def versions(self) -> dict[str, Any]:
        """Every version by its number, the oldest first."""
        found = self.client.search_model_versions(f"name = '{self.name}'")
        return {str(version.version): version for version in sorted(found, key=lambda version: int(version.version))}

    def aliases(self) -> dict[str, str]:
        """The version of each alias."""
        found = self.client.search_registered_models(f"name = '{self.name}'")
        return {alias: str(version) for alias, version in found[0].aliases.items()} if found else {}

    def champion(self, but: str) -> Champion | None:
        """The present champion, unless it is made of the weights ``but``: nobody needs to beat himself."""
        version = self.aliases().get("champion")
        if version is None:
            return None
        tags = self.client.get_model_version(self.name, version).tags
        if tags.get("weights") == but:
            return None
        return Champion(version, json.loads(tags.get("tuned_best", "{}")), json.loads(tags.get("protocol", "{}")))

    def publish(
        self, server: Server, model: ModelConfig, tune: Path, results: dict[str, Any], verdict: Verdict, text: str
    ) -> dict[str, Any]:
        """Make a version (or find the one made before), give it the card ``text``, and point the aliases at it."""
        tags = {**_lineage(server, results["weights"]["tuned"]), **{name: json.dumps(results[name]) for name in RESULTS}}
        same = ("weights", "tuned", "tuned_best", "protocol")
        found = [version for version in self.versions().values() if all(version.tags.get(name) == tags[name] for name in same)]
        version = str(found[0].version) if found else self._create(server, model, tune, results, tags)
        self.client.update_model_version(self.name, version, card.description(text, f"run {server.run}"))
        self.client.set_registered_model_alias(self.name, "challenger", version)
        crowned = verdict.champion and not self._withdrawn(tags["weights"])
        if crowned:
            self.crown(version)
        ids = {"run": server.run, "parent": server.parent}
        return {"version": version, "aliases": ["challenger"] + ["champion"] * crowned, "registry": server.uri, **ids}

    def crown(self, version: str) -> None:
        """Make a version champion. Whoever was it before bears the alias ``previous``."""
        before = self.aliases().get("champion")
        if before == version:
            return
        if before is not None:
            self.client.set_registered_model_alias(self.name, "previous", before)
        # first, so that no champion is left marked by a command that is killed
        for number in self._withdrawn(self.client.get_model_version(self.name, version).tags.get("weights", "")):
            self.client.delete_model_version_tag(self.name, number, WITHDRAWN)
        self.client.set_registered_model_alias(self.name, "champion", version)

    def _withdrawn(self, digest: str) -> list[str]:
        """Versions of these weights that were taken back, however often they were measured."""
        versions = self.versions().items()
        return [number for number, version in versions if WITHDRAWN in version.tags and version.tags.get("weights") == digest]

    def _create(self, server: Server, model: ModelConfig, tune: Path, results: dict[str, Any], tags: dict[str, str]) -> str:
        logged = _log_model(server, model, tune, {**results["protocol"].get("sampler", {}), **results["tuned_best"]})
        if not self.client.search_registered_models(f"name = '{self.name}'"):
            self.client.create_registered_model(self.name)
        version = self.client.create_model_version(
            self.name,
            source=logged.model_uri,
            run_id=server.run,
            tags=tags,
            model_id=logged.model_id,
        )
        return str(version.version)


def _lineage(server: Server, digest: str) -> dict[str, str]:
    """Where a version comes from: data, code, configuration, runs."""
    code = data.code_version()
    runs = {"run": server.run, "parent": server.parent}
    return {"weights": digest, **server.lineage, **runs, **{f"code.{k}": v for k, v in code.items()}, **_dvc_lineage()}


def _log_model(server: Server, model: ModelConfig, tune: Path, best: Scores) -> Any:
    """The weights with the code that draws from them, as a model of this run."""
    mlflow, tuned = server.mlflow, models.Networks.tuned(model, tune)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*An input example")  # it would draw an image here, and the signature says it all
        config = Path(folder) / "config.json"
        data.write_json(config, plain(model))
        # Model.log rather than pyfunc.log_model: it takes the run by id and leaves MLflow's "active run" alone
        return mlflow.models.Model.log(
            artifact_path=None,
            name="generator",
            flavor=mlflow.pyfunc,
            run_id=server.run,
            python_model=str(serving_code()),
            artifacts={
                "generator": str(tuned.generator),
                "tokenizer": str(weights.locate(tuned.model.tokenizer)),
                "config": str(config),
                **({"text_encoder": model.text_encoder} if Path(model.text_encoder or "-").is_dir() else {}),
            },
            code_paths=[str(Path(__file__).parent)],
            # never our own name: on the public index it is somebody else's
            pip_requirements=[f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in _requirements(model)],
            signature=_signature(mlflow, best, asked=("string", "prompt") if model.captions else ("long", "class_id")),
        )


def _requirements(model: ModelConfig) -> tuple[str, ...]:
    readers = FOR_JANUS if model.policy == "janus" else FOR_T5 if model.text_encoder not in ("", "words") else ()
    return (*REQUIREMENTS, *readers)


def _signature(mlflow: Any, best: Scores, asked: tuple[str, str]) -> Any:
    """``asked``: type and name of the one column that says what to draw."""
    types = mlflow.types
    params = [
        types.ParamSpec("seed", "long", 0),
        types.ParamSpec("temperature", "double", float(best.get("temperature", 1.0))),
        types.ParamSpec("guidance", "double", float(best.get("guidance", 1.0))),
        types.ParamSpec("top_k", "long", int(best.get("top_k", 0))),
        types.ParamSpec("top_p", "double", float(best.get("top_p", 1.0))),
        types.ParamSpec("guidance_schedule", "string", str(best.get("guidance_schedule", "constant"))),
        types.ParamSpec("guidance_power", "double", float(best.get("guidance_power", 2.0))),
    ]
    outputs = types.Schema([types.ColSpec(*asked), types.ColSpec("string", "png_base64")])
    return mlflow.models.ModelSignature(types.Schema([types.ColSpec(*asked)]), outputs, types.ParamSchema(params))


def serving_code() -> Path:
    """``mlflow/generator.py`` of the clone. Raises ValueError outside one (the folder is not part of the package)."""
    for root in (Path.cwd(), Path(__file__).parent.parent):
        path = root / "mlflow" / "generator.py"
        if path.is_file() and not (root / "mlflow" / "__init__.py").exists():
            return path
    raise ValueError("mlflow/generator.py is not here; register inside the project's clone")


def _dvc_lineage() -> dict[str, str]:
    """What DVC knows of the weights: the hash of the stage tune's output."""
    lock = Path("dvc.lock")
    stages = read_yaml(lock.read_text()).get("stages", {}) if lock.is_file() else {}
    return {f"dvc.{Path(out['path']).name}": str(out["md5"]) for out in stages.get("tune", {}).get("outs", []) if "md5" in out}


# --- by hand -----------------------------------------------------------------------------------


def promote(register: RegisterConfig, client: Any, version: str = "", reason: str = "") -> str:
    """Make a version champion, the challenger if none is named. Returns what changed, in words.

    It must pass the gates of ``register`` against the present champion, and its run must have ended well. With a ``reason``
    it need not; the tag ``forced`` then keeps it beside what stood against. Raises ValueError for a version that is not there
    or must not become champion; nothing has changed then.
    """
    _check_names(register)
    with data.locked(data.state_dir("locks") / "register.lock"):
        registry = Registry(client, register.model_name)
        found = _version(registry, version)
        version, name = str(found.version), register.model_name
        before = registry.aliases().get("champion")
        if version == before:
            return f"{name} version {version} is champion already; nothing changed"
        results = {each: json.loads(found.tags.get(each, "{}")) for each in RESULTS}
        verdict = judge(register, results, registry.champion(but=found.tags.get("weights", "")))
        against = [*_unfinished(client, found), *_shut(verdict)]
        if against and not reason:
            raise ValueError(
                f"{name} version {version} is not promoted: {'; '.join(against)}. Nothing changed; if it must be, say why: "
                f"vapi promote {version} --force REASON{verdict.note and f' ({verdict.note})'}"
            )
        if against:
            client.set_model_version_tag(name, version, "forced", f"{reason} (against it: {'; '.join(against)})")
        registry.crown(version)
        was = f"; version {before} was it before, and is again by: vapi rollback" if before else ""
        return f"{verdict.table()}\n{name} version {version} is champion{' by force' if against else ''}{was}"


def _version(registry: Registry, version: str) -> Any:
    """The version to promote. Raises ValueError where it is not there."""
    versions = registry.versions()
    if not versions:
        raise ValueError(f"the registry holds no {registry.name} (register.model_name); register one with: vapi register")
    wanted = version or registry.aliases().get("challenger", "")
    if not wanted:
        raise ValueError(f"{registry.name} has no challenger; name a version, it has {', '.join(versions)}")
    if wanted not in versions:
        raise ValueError(f"{registry.name} has no version {wanted}; it has {', '.join(versions)}")
    return versions[wanted]


def _unfinished(client: Any, version: Any) -> list[str]:
    """What is wrong with how a version was made."""
    status = client.get_run(version.run_id).info.status if version.run_id else "no run"
    wrong = [] if version.status == "READY" else [f"the registry calls it {version.status}"]
    return wrong + ([] if status == "FINISHED" else [f"its run has not ended well ({status}); vapi register completes it"])


def _shut(verdict: Verdict) -> list[str]:
    return [f"{alias}: {gate.reason()}" for alias, found in verdict.gates.items() for gate in found if not gate.passed]


def rollback(register: RegisterConfig, client: Any) -> str:
    """Give the alias champion back to the version that had it before. Returns what changed, in words.

    A second call changes nothing. Raises ValueError where there is no champion, or none was before it.
    """
    with data.locked(data.state_dir("locks") / "register.lock"):
        registry, name = Registry(client, register.model_name), register.model_name
        aliases = registry.aliases()
        champion, previous = aliases.get("champion"), aliases.get("previous")
        if champion is None:
            raise ValueError(f"{name} has no champion to take back; make one with: vapi promote VERSION")
        gone = [number for number, version in registry.versions().items() if version.tags.get(WITHDRAWN) == champion]
        if previous == champion:  # left by a command that was killed
            client.delete_registered_model_alias(name, "previous")
        if previous in (None, champion) and gone:
            return f"{name} version {champion} is champion again already, in place of version {gone[-1]}; nothing changed"
        if previous in (None, champion):
            raise ValueError(
                f"{name} has nothing to go back to from version {champion}: no version bears the alias previous; name one: "
                "vapi promote VERSION"
            )
        client.set_model_version_tag(name, champion, WITHDRAWN, previous)
        client.set_registered_model_alias(name, "champion", previous)
        client.delete_registered_model_alias(name, "previous")
        return f"{name} version {previous} is champion again; version {champion} was taken back, and returns by: vapi promote {champion}"
