"""The commands. Exit code 0: done; 1: a run or a comparison failed; 2: a mistake that the message names.

Values for the form's fields follow ``-p``: ``-p tune_lr=2e-6 -p tune_steps=200``.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kfp import components

import pipelines
from pipelines import fields, local, manifests, packages, pipeline, readmes, registry, worktree
from pipelines import server as kubeflow
from vapi import config
from vapi.cluster import api, checks, preflight
from vapi.cluster.checks import Check
from vapi.cluster.config import ClusterConfig
from vapi.config import Config

ROOT = packages.HERE.parent


def main(words: list[str]) -> int:
    """Entry point; the exit code."""
    arguments = _parser().parse_args(words)
    try:
        return int(COMMANDS[arguments.command](arguments))
    except (ValueError, OSError) as error:
        if os.environ.get("VAPI_DEBUG"):
            raise
        kubeflow.complain(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        kubeflow.complain("interrupted")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipelines", description=(pipelines.__doc__ or "").split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, doc: str, *more: Callable[[argparse.ArgumentParser], Any]) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=doc, description=doc)
        for add in more:
            add(made)
        return made

    one = command("compile", "Compile packages from recipes and cluster.yaml.", _cluster)
    one.add_argument("packages", nargs="*", metavar="PACKAGE", help=f"all of these if none is named: {', '.join(packages.published())}")
    one.add_argument("--out", type=Path, default=packages.COMPILED, help="folder for the files (%(default)s)")
    one.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file differs from what would be written")
    one = command("cluster", "Print a complete cluster.yaml with its documentation, with the values that are set.", _cluster)
    one.add_argument("--write", action="store_true", help="write it")
    command("check", "Look at everything a run needs, before it asks for eight GPUs.", _package, _fields, _login)
    one = command("run-local", "Run a compiled package here, without a cluster.", _package, _fields)
    one.add_argument("--root", type=Path, default=local.ROOT, help="folder for artifacts (%(default)s)")
    one = command("submit", "Upload a package's version and start a run.", _package, _fields, _login, _start)
    one.add_argument("--wait", action="store_true", help="follow the run; the exit code is the run's")
    command("schedule", "Start a run again and again.", _package, _fields, _login, _start).add_argument(
        "--cron", required=True, help="when: six fields, seconds first: '0 0 2 * * *' is every night at two"
    )
    one = command("manifests", "Print what the cluster's owner applies once: volume and permissions.", _cluster)
    one.add_argument("--namespace", default=manifests.NAMESPACE, help="that runs live in (%(default)s)")
    one.add_argument("--service-account", default="", help=f"that runs have (pods.service_account, else {manifests.SERVICE_ACCOUNT})")
    return parser


def _package(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "package", nargs="?", default="", metavar="PACKAGE", help=f"{', '.join(packages.published())}, another recipe, or a file"
    )


def _fields(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-p", action="append", default=[], metavar="FIELD=VALUE", help="a field of the form; may be given often")
    parser.add_argument("--from-dvc", action="store_true", help="take the fields and the data's revision from params.yaml and git")
    parser.add_argument("--dirty", action="store_true", help="with --from-dvc: although the tree has edits that no commit holds")


def _cluster(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cluster", type=Path, default=packages.CLUSTER, help="the cluster's facts (%(default)s)")


def _login(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--endpoint", default="", help="Kubeflow Pipelines, as http://...; else KF_PIPELINES_ENDPOINT")
    parser.add_argument("--namespace", default="", help="the profile that the run belongs to, in a Kubeflow that has profiles")
    parser.add_argument("--context", default="", help="of the kubeconfig; else its present one")


def _start(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--experiment", default="vapi", help="in Kubeflow (%(default)s)")
    parser.add_argument("--name", default="", help="of the run; else the package's and the time")
    parser.add_argument("--no-check", action="store_true", help="start without looking first; preflight looks all the same")


# --- what a run is made of ---------------------------------------------------------------------


class Asked:
    """A package, and a filled form for it. Raises ValueError for a form that makes no configuration."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        name = arguments.package or (worktree.closest(ROOT) if arguments.from_dvc else "")
        if not name:
            raise ValueError(f"which package? {', '.join(packages.published())}, or with --from-dvc the one of params.yaml")
        self.path = _compiled(name)
        constants = packages.constants(self.path)
        self.pipeline = components.load_component_from_file(str(self.path))
        self.recipe, self.trainjob = constants.get("recipe"), constants.get("trainjob", False)
        self.cluster: ClusterConfig = config.build(ClusterConfig, constants["cluster"])
        self.volume = bool(constants["work_dir"])
        given = fields.checked(self.pipeline, fields.parse(arguments.p))
        taken = self._of_the_tree(arguments.dirty) if arguments.from_dvc else {}
        if "data_uri" in given:
            taken.pop("data_revision", None)
        both = {"overrides": {**taken.get("overrides", {}), **given.get("overrides", {})}}
        self.values = {**taken, **given, **(both if both["overrides"] else {})}
        self.runs = self._runs()

    def _of_the_tree(self, dirty: bool) -> dict[str, Any]:
        """The fields that params.yaml and git fill."""
        if self.recipe is None:
            raise ValueError("--from-dvc takes one configuration from params.yaml; an experiment has experiment_recipe and overrides")
        return worktree.values(ROOT, self.pipeline, self.recipe, dirty)

    def _runs(self) -> list[Config]:
        """The configurations that the form asks for."""
        if self.recipe is not None:
            return [preflight.resolved(self.recipe, self.form, self.volume, self.trainjob)[0]]
        from vapi.cluster import experiment  # with the weight of what makes a table

        return experiment.resolved(self.form, self.volume).distinct

    @property
    def name(self) -> str:
        """The package's."""
        return self.path.stem

    @property
    def form(self) -> dict[str, Any]:
        """Every field, those without a value of ours as the package fills them, and those that its form lacks."""
        shown = {name: spec.default for name, spec in self.pipeline.component_spec.inputs.items()}
        return {**pipeline.ABSENT, **fields.checked(self.pipeline, shown), **self.values}


def _compiled(name: str) -> Path:
    """The file of a package: one that is named, or one of ours."""
    if name.endswith(".yaml"):
        if not Path(name).is_file():
            raise ValueError(f"{name} is not here")
        return Path(name)
    path = packages.COMPILED / f"{name}.yaml"
    if not path.is_file():
        if name not in packages.published():
            packages.recipe_of(name)
        raise ValueError(f"{path} is not here; make it: python -m pipelines compile {name}")
    return path


def _checks(asked: Asked, arguments: argparse.Namespace) -> list[Check]:
    """Everything that can be seen from outside, for what the package holds."""
    found = preflight.about_form(asked.runs, asked.form)
    found += kubeflow.check(kubeflow.Login(arguments.endpoint, arguments.namespace))
    found.append(registry.check(asked.form["cluster_image"], asked.cluster.image.pull_secret))
    found.append(preflight.mlflow(asked.runs[0].track.uri, inside=False))
    if asked.name in packages.published() and asked.path.read_text() != packages.text(asked.name, packages.load_cluster()):
        found.append(checks.warning("package", f"{asked.path.name} is not what cluster.yaml and the code would make now; compile it anew"))
    try:
        kubernetes = api.named(arguments.context, arguments.namespace)
    except ValueError as error:
        return [*found, checks.warning("cluster", f"{error}; nodes, volume and secrets were not looked at")]
    return found + preflight.about_cluster(kubernetes, asked.runs, asked.cluster, asked.form, asked.trainjob)


# --- commands ----------------------------------------------------------------------------------


def _compile(arguments: argparse.Namespace) -> int:
    cluster = packages.load_cluster(arguments.cluster)
    texts = {arguments.out / f"{name}.yaml": packages.text(name, cluster) for name in arguments.packages or packages.published()}
    if not arguments.packages:
        texts |= _manifests_of(cluster) | readmes.files(ROOT / "components")
    stale = [path for path, text in texts.items() if not path.is_file() or path.read_text() != text]
    if arguments.check:
        for path in stale:
            kubeflow.complain(f"{path} is not what python -m pipelines compile writes")
        return 1 if stale else 0
    for path, text in texts.items():
        config.write_text(path, text)
        print(path)
    return 0


def _manifests_of(cluster: ClusterConfig) -> dict[Path, str]:
    """The manifests in git, for a Kubeflow Pipelines that stands alone."""
    head = "Made by python -m pipelines compile, for namespace {}; for another: python -m pipelines manifests --namespace ...".format
    return {
        packages.HERE / "manifests" / "volume.yaml": manifests.text(manifests.volume(cluster), head(manifests.NAMESPACE)),
        packages.HERE / "manifests" / "rbac.yaml": manifests.text(manifests.rbac(cluster), head(manifests.NAMESPACE)),
    }


def _write_cluster(arguments: argparse.Namespace) -> int:
    cluster = packages.load_cluster(arguments.cluster) if arguments.cluster.is_file() else ClusterConfig()
    text = packages.cluster_text(cluster)
    if arguments.write:
        config.write_text(arguments.cluster, text)
        print(arguments.cluster)
    else:
        print(text, end="")
    return 0


def _manifests(arguments: argparse.Namespace) -> int:
    cluster = packages.load_cluster(arguments.cluster)
    namespace, account = arguments.namespace, arguments.service_account
    objects = [*manifests.volume(cluster, namespace), *manifests.rbac(cluster, namespace, account)]
    print(manifests.text(objects, f"for namespace {namespace}"), end="")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    found = _checks(Asked(arguments), arguments)
    print(checks.table(found))
    return 2 if checks.verdict(found) else 0


def _run_local(arguments: argparse.Namespace) -> int:
    if not os.environ.pop(local.SUPERVISED, ""):
        return local.supervise(sys.argv[1:])
    asked = Asked(arguments)
    try:
        outputs = local.run(asked.path, asked.values, arguments.root)
    except RuntimeError as error:
        kubeflow.complain(f"error: {error}")
        return 1
    for name, value in outputs.items():
        print(f"{name}: {value}")
    print(f"artifacts are in {arguments.root}")
    return 0


def _ready(arguments: argparse.Namespace) -> tuple[Asked, kubeflow.Server]:
    """What is to be started, after looking. Raises ValueError with what failed."""
    asked = Asked(arguments)
    if not arguments.no_check:
        found = _checks(asked, arguments)
        print(checks.table(found), flush=True)
        if wrong := checks.verdict(found):
            raise ValueError(f"{wrong} (nothing was started; --no-check starts all the same)")
    return asked, kubeflow.Server(kubeflow.Login(arguments.endpoint, arguments.namespace))


def _name(arguments: argparse.Namespace, asked: Asked) -> str:
    return arguments.name or f"{asked.name} {time.strftime('%Y-%m-%d %H:%M:%S')}"


def _submit(arguments: argparse.Namespace) -> int:
    asked, server = _ready(arguments)
    name = _name(arguments, asked)
    run = server.start(asked.path, name, arguments.experiment, asked.values, asked.cluster.pods.service_account)
    print(f"{name}: {server.link(run)}", flush=True)
    return server.follow(run) if arguments.wait else 0


def _schedule(arguments: argparse.Namespace) -> int:
    if len(arguments.cron.split()) != 6 or not re.fullmatch(r"[\d\s*/,\-?LW#A-Za-z]+", arguments.cron):
        raise ValueError(f"--cron is {arguments.cron!r}; it has six fields, seconds first: '0 0 2 * * *' is every night at two")
    asked, server = _ready(arguments)
    name = _name(arguments, asked)
    made = server.repeat(asked.path, name, arguments.experiment, asked.values, arguments.cron, asked.cluster.pods.service_account)
    print(f"{name}: recurring run {made}, {arguments.cron}")
    return 0


COMMANDS = {
    "compile": _compile,
    "cluster": _write_cluster,
    "check": _check,
    "run-local": _run_local,
    "submit": _submit,
    "schedule": _schedule,
    "manifests": _manifests,
}
