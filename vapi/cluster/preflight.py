"""The first step of a run: find in seconds what would go wrong in hours, and make a plan for each stage.

    form, recipe -> configuration -> checks -> a plan for each stage

What the form says must make a configuration, in words of its fields; then everything that the run will need is looked
at: data and weights, volume, nodes, secrets, MLflow. One thing that failed stops the run, with all that failed named.
What could not be looked at is a warning. ``python -m pipelines check`` asks the same from outside (``about_cluster``), and
adds what only it can see: the Kubeflow server, the registry of images.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from vapi import config, data, hub, inputs
from vapi.cluster import api, checks, form, origin, pages, step
from vapi.cluster.api import Demand, Kubernetes
from vapi.cluster.checks import Check, failed, ok, warning
from vapi.cluster.config import CERTIFICATES, GPU_STEPS, ClusterConfig, require_label, require_pinned, require_tolerations
from vapi.cluster.origin import Origin
from vapi.config import STAGES, Config

T = TypeVar("T")

MLFLOW_SECONDS = 5

IMAGE_BYTES = 150_000
"""Of an image in a subset: ImageNet's have 110,000 on average."""
FEATURE_BYTES = 20_000
"""That evaluation keeps of a sample: Inception's features, spatial ones included."""
CAPTION_BYTES = 2 * 30 * 2048 * 2
"""Of 30 words by flan-t5-xl, in the cache and in the stage's result."""


def preflight(
    recipe: Mapping[str, Any], cluster: Mapping[str, Any], work_dir: str, trainjob: bool, form: Mapping[str, Any], report: str
) -> dict[str, step.Plan]:
    """The step. Writes the checks as Markdown to ``report`` and returns the stages' plans.

    Raises SystemExit(2) after printing every check if one of them failed.
    """

    def asked() -> tuple[Config, Sequence[Config], Origin]:
        settings, source = resolved(recipe, form, bool(work_dir), trainjob)
        return settings, [settings], source

    with step.in_words(), step.workplace(work_dir) as place:
        settings, source = looked_at(asked, place, cluster, form, trainjob, report)
        return plans(settings, source, place)


def looked_at(
    ask: Callable[[], tuple[T, Sequence[Config], Origin]],
    place: step.Place,
    cluster: Mapping[str, Any],
    form: Mapping[str, Any],
    trainjob: bool,
    report: str,
) -> tuple[T, Origin]:
    """Look at everything that a filled form needs, and write it as Markdown to ``report``. ``ask`` says what it asks for, in whatever
    form, with the configurations that will run and where their data come from. Leaves the process in the folder that the data's names
    are relative to; returns what ``ask`` said, and the source with a commit in place of a name that may move.

    Raises ValueError with all that failed, after printing every check.
    """
    facts = config.build(ClusterConfig, dict(cluster))
    try:
        asked, runs, source = ask()
        source = origin.resolve(source, place.state)
        found = about_form(runs, form) + about_here(runs, source, place, form, facts.limits.parallel)
    except ValueError as error:
        found = [failed("form", str(error))]
    else:
        found += _about_pod(runs, facts, form, trainjob)
    rows = [[row.field, row.status, row.found] for row in found]
    config.write_text(Path(report), pages.markdown_table("Preflight", ("field", "", "found"), rows))
    print(checks.table(found), flush=True)
    if wrong := checks.verdict(found):
        raise ValueError(wrong)
    return asked, source


def _about_pod(runs: Sequence[Config], facts: ClusterConfig, values: Mapping[str, Any], trainjob: bool) -> list[Check]:
    """What the cluster around this pod says, and what it gave to the pod."""
    if kubernetes := api.here():
        return [*_variables(facts), *about_cluster(kubernetes, runs, facts, values, trainjob)]
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        words = "this pod has no token for Kubernetes (automountServiceAccountToken): nodes, volume and secrets were not looked at"
        return [*_variables(facts), warning("cluster", words)]
    return [ok("cluster", "this is no pod of a cluster: nodes, volume and secrets were not looked at")]


def _variables(facts: ClusterConfig) -> Iterator[Check]:
    """Whether secrets and config maps gave this pod what they should; it takes no permission to see that."""
    for field, named in (("pods.secrets", facts.pods.secrets), ("pods.config_maps", facts.pods.config_maps)):
        for name, keys in named.items():
            for key, variable in keys.items():
                if variable not in os.environ:
                    yield failed(field, f"{name} gives no {variable}; is it there, with the key {key}?")
    if facts.pods.ca_bundle and not Path(CERTIFICATES, "ca.crt").is_file():
        yield failed("pods.ca_bundle", f"{facts.pods.ca_bundle} gives no {CERTIFICATES}/ca.crt; is it there, with the key ca.crt?")


def resolved(recipe: Mapping[str, Any], values: Mapping[str, Any], volume: bool, trainjob: bool = False) -> tuple[Config, Origin]:
    """What a filled form asks for, of a package with a ``volume`` or without. Raises ValueError that names its field."""
    settings = form.resolve(recipe, values)
    require_pinned(values["cluster_image"], "cluster_image")
    require_label("cluster_volume", values["cluster_volume"])
    require_tolerations("cluster_tolerations", values["cluster_tolerations"])
    if volume and not values["cluster_volume"]:
        raise ValueError("cluster_volume is empty, and this package keeps its data on one; name a PersistentVolumeClaim")
    gpus = {stage: form.gpus(f"{stage}_gpus", values) for stage in GPU_STEPS}
    if trainjob and values["tune_nodes"] < 1:
        raise ValueError(f"tune_nodes is {values['tune_nodes']}; give a number of nodes")
    processes = max(1, gpus["tune"]) * values["tune_nodes"]
    for name in ("images_per_step", "holdout_images"):
        if (images := getattr(settings.tune, name)) < processes:
            shared = f"{form.called(f'tune.{name}', values)} {images}"
            raise ValueError(f"tune_gpus x tune_nodes are {processes}, and share {shared}; use fewer GPUs or more images")
    return settings, Origin(values["data_uri"], values["data_revision"])


def about_form(runs: Sequence[Config], values: Mapping[str, Any]) -> list[Check]:
    """What the form, filled with ``values``, asks for, and what of it may not be meant or not be there."""
    from vapi import rewards  # with torch

    several = f"{len(runs)} configurations" if len(runs) > 1 else "a configuration"
    found = [ok("form", f"{several} of {len(config.flat(runs[0]))} fields")]
    if any(settings.subset.images == 0 for settings in runs):
        found.append(
            warning(form.called("subset.images", values), "0 takes every image of the source; the room they need is not in the estimate")
        )
    unknown: dict[str, None] = {}
    for settings in runs:
        try:
            rewards.kinds(settings.tune)
        except ValueError as error:
            unknown[str(error)] = None
    return [*found, *(failed(form.called("tune.rewards", values), words) for words in unknown)]


# --- what the pod itself can see ---------------------------------------------------------------


def about_here(runs: Sequence[Config], source: Origin, place: step.Place, values: Mapping[str, Any], parallel: int) -> list[Check]:
    """Data and weights, the mounted volume, MLflow. Leaves the process in the folder that the data's names are relative to. ``values``:
    the filled form. ``parallel``: how many models are tuned at once.

    With a volume nothing is fetched but what it takes to know that it can be: the stages fetch what they read, once.
    """
    names = list(dict.fromkeys(name for settings in runs for name in config.named_files(settings, config.FILES).values()))
    try:
        there = origin.bytes_of(source, names, place.state) if place.volume else {}
        os.chdir(origin.root(source, [] if place.volume else names, place.state))
    except ValueError as error:
        return [failed("data_uri", str(error))]
    found = [ok("data_uri", _described(source)), *_inputs(runs, there, values)]
    if place.volume:
        # of several runs some may be done: what is on the volume already is counted as needed, and is not free
        found += _room(place.volume, bytes_needed(runs, parallel) + sum(there.values()), failed if len(runs) == 1 else warning)
    return [*found, mlflow(runs[0].track.uri or os.environ.get("MLFLOW_TRACKING_URI", ""))]


def _described(source: Origin) -> str:
    if source.is_repository:
        return f"{source.uri} at {source.revision}"
    return source.uri or "the image's own data"


def _inputs(runs: Iterable[Config], there: Mapping[str, int], values: Mapping[str, Any]) -> Iterator[Check]:
    """What the stages will read, looked at once however many runs do; of what is ``there`` to be fetched, that it is."""
    looks = {named: look for settings in runs for named, look in inputs.looks(settings).items()}
    for (dotted, name), look in looks.items():
        with _field(form.called(dotted, values)) as (field, found):
            found.append(ok(field, f"{name}, {there[name]:,} bytes, still to be fetched" if name in there else look()))
        yield from found


@contextlib.contextmanager
def _field(field: str) -> Iterator[tuple[str, list[Check]]]:
    """Collects what is found about a field; a ValueError is what failed."""
    found: list[Check] = []
    try:
        yield field, found
    except ValueError as error:
        found.append(failed(field, str(error)))


def _room(volume: Path, needed: int, worse: Callable[[str, str], Check]) -> Iterator[Check]:
    """Whether the volume can be written to, and has the room; ``worse`` if it has not."""
    try:
        with tempfile.TemporaryFile(dir=volume) as file:
            file.write(b"vapi")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        yield failed("cluster_volume", f"{volume} cannot be written to by user {os.getuid()} ({error.strerror}); change its owner or mode")
        return
    free = shutil.disk_usage(volume).free
    words = f"{free / 1e9:,.0f} GB are free in {volume}, and a run needs about {needed / 1e9:,.0f} GB"
    yield ok("cluster_volume", words) if free >= needed else worse("cluster_volume", f"{words}; make room (.vapi/resume, artifacts)")


def distinct(runs: Iterable[Config], stage: str) -> list[Config]:
    """The first of the runs that share a ``stage``, for each time that it is run."""
    found: dict[str, Config] = {}
    for settings in runs:
        plain = config.plain(settings)
        found.setdefault(json.dumps([plain[section] for section in config.sections_so_far(stage)]), settings)
    return list(found.values())


def bytes_needed(runs: Sequence[Config], parallel: int = 1) -> int:
    """About what runs write to the volume: the images of each subset, each tuned generator, the features of each evaluation; and
    checkpoints (the old one and the new) of as many models as are tuned at once, ``parallel``: tune removes its own at its end."""
    tuned = [_generator_bytes(settings) for settings in distinct(runs, "tune")]
    images = [IMAGE_BYTES * settings.subset.images * _copies(settings) for settings in distinct(runs, "subset")]
    captions = [CAPTION_BYTES * settings.subset.images for settings in distinct(runs, "tokens") if settings.model.text_encoder]
    features = [FEATURE_BYTES * _drawn(settings) for settings in distinct(runs, "evaluate")]
    return sum(tuned) + 7 * sum(sorted(tuned)[-parallel:]) + sum(images) + sum(captions) + sum(features)


def _generator_bytes(settings: Config) -> int:
    from vapi.models import weights

    try:
        return weights.size(settings.model.generator)
    except ValueError:  # said elsewhere
        return 0


def _copies(settings: Config) -> int:
    """Of a subset's image on the volume: what is read of a hub is kept beside."""
    return 2 if hub.is_address(settings.subset.source) else 1


def _drawn(settings: Config) -> int:
    """Samples of an evaluation, of base and tuned."""
    looks = settings.evaluate
    sweep = len(looks.temperatures) * len(looks.guidances) * looks.sweep_samples
    return 2 * (sweep + 4 * looks.samples * len(looks.seeds))


def mlflow(uri: str, inside: bool = True) -> Check:
    """Whether the tracking server answers, and lets us in. ``inside``: whether we stand where the run will."""
    if uri in ("", "off"):
        words = "there is no MLflow: numbers stay in the artifacts, and nothing can be registered"
        return warning("track_uri", words + ("" if uri else "; set mlflow.uri in cluster.yaml"))
    if uri.startswith(("sqlite:///", "postgresql", "mysql", "databricks")):
        return ok("track_uri", uri.partition("@")[0])
    if not uri.startswith(("http://", "https://")):
        return failed("track_uri", f"{uri!r} is no address; write http://..., or off")
    worse = failed if inside else warning
    request = urllib.request.Request(f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search?max_results=1", headers=_login())
    try:
        with urllib.request.urlopen(request, timeout=MLFLOW_SECONDS):
            return ok("track_uri", f"{uri} answers")
    except urllib.error.HTTPError as error:
        if error.code == 401:
            words = "wants a login: give MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD through pods.secrets"
            return worse("track_uri", f"{uri} {words}" if inside else f"{uri} answers, and wants a login that is not at hand here")
        if error.code == 403:
            return worse("track_uri", f"{uri} refuses (403); is this name among the server's --allowed-hosts, and may the user read?")
        return worse("track_uri", f"{uri} answers HTTP {error.code}")
    except OSError as error:
        where = "" if inside else " from here, which may be no matter: preflight looks from inside"
        return worse("track_uri", f"{uri} cannot be reached{where} ({getattr(error, 'reason', error)}); start it, or set track_uri to off")


def _login() -> dict[str, str]:
    user, password = os.environ.get("MLFLOW_TRACKING_USERNAME", ""), os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
    if token := os.environ.get("MLFLOW_TRACKING_TOKEN", ""):
        return {"Authorization": f"Bearer {token}"}
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()} if user else {}


# --- what the cluster says ---------------------------------------------------------------------


def about_cluster(
    kubernetes: Kubernetes, runs: Sequence[Config], cluster: ClusterConfig, values: Mapping[str, Any], trainjob: bool = False
) -> list[Check]:
    """Nodes, quota, volume, secrets, config maps, service account, and the trainer where a TrainJob is made."""
    wants, pods = demands(cluster, values, trainjob), cluster.pods
    maps = pods.config_maps | ({pods.ca_bundle: {"ca.crt": ""}} if pods.ca_bundle else {})
    asked: list[Callable[[], list[Check]]] = [
        lambda: api.nodes(kubernetes, cluster, wants, values["cluster_node_selector"], values["cluster_tolerations"]),
        lambda: api.quota(kubernetes, cluster.gpu.resource, max(want.gpus * want.nodes for want in wants)),
        lambda: api.secrets(kubernetes, pods.secrets),
        lambda: api.config_maps(kubernetes, maps),
    ]
    if values["cluster_volume"]:
        needed = bytes_needed(runs, cluster.limits.parallel)
        several = trainjob or min(cluster.limits.parallel, len(distinct(runs, "tune"))) > 1
        asked.append(lambda: api.volume(kubernetes, values["cluster_volume"], needed, several))
    if cluster.image.pull_secret:
        asked.append(lambda: api.pull_secret(kubernetes, cluster.image.pull_secret))
    if pods.service_account:
        asked.append(lambda: api.service_account(kubernetes, pods.service_account))
    if trainjob:
        asked.append(lambda: api.trainer(kubernetes, cluster.trainer.runtime))
    return list(dict.fromkeys(found for ask in asked for found in ask()))  # three boxes may say the same of one selector


def demands(cluster: ClusterConfig, values: Mapping[str, Any], trainjob: bool = False) -> list[Demand]:
    """What each step that may run on a GPU asks of its node."""
    found = []
    for name in GPU_STEPS:
        gpus, nodes = form.gpus(f"{name}_gpus", values), values["tune_nodes"] if trainjob and name == "tune" else 1
        size = cluster.gpu if values["cluster_volume"] else cluster.cpu  # as the package was compiled
        found.append(Demand(f"{name}_gpus", gpus, size.cpu, size.memory, nodes))
    return found


# --- plans -------------------------------------------------------------------------------------


def plans(settings: Config, source: Origin, place: step.Place) -> dict[str, step.Plan]:
    """Each stage's plan: the sections that its result follows from, the data, the code.

    Without a volume Kubeflow's cache may take a step from an earlier run, so the files' digests are part of the plan;
    with one, a step looks at the files itself, and is never cached.
    """
    from vapi import track

    everything = config.plain(settings)
    digests = {} if place.volume else origin.digests(settings, config.FILES)
    made = {}
    for stage in STAGES:
        sections = config.sections_so_far(stage)
        made[stage] = {
            "config": {name: everything[name] for name in (*sections, "track")},
            "data": {"uri": source.uri, "revision": source.revision, "digest": track.data_digest(settings)},
            "files": {field: digest for field, digest in digests.items() if field.partition(".")[0] in sections},
            "code": data.code_version(),
        }
    return made
