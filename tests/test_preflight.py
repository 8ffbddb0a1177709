"""What is looked at before a run: against a server that speaks Kubernetes' protocol, a web server in MLflow's place, and files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stubs
import world

from pipelines import pipeline
from vapi import config, grids, recipes
from vapi.cluster import api, checks, origin, preflight
from vapi.cluster.config import ClusterConfig, ImageConfig, PodsConfig
from vapi.config import Config

PACKAGE = "llamagen-xxl-c2i"


@pytest.fixture
def kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[stubs.Kubernetes]:
    with stubs.serving(stubs.Kubernetes()) as stub:
        monkeypatch.setenv("KUBECONFIG", str(stub.kubeconfig(tmp_path)))
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
        yield stub


def ask(stub: stubs.Kubernetes, cluster: ClusterConfig | None = None, nodes: bool = False, **changes: Any) -> dict[str, checks.Check]:
    """What the cluster says to the package of the paper's run, with some fields changed; by field, the worst of each."""
    cluster = cluster or ClusterConfig()
    values = {**pipeline.ABSENT, **pipeline.defaults(PACKAGE, cluster, nodes), **changes}
    found = preflight.about_cluster(api.named(), [recipes.recipe(PACKAGE)], cluster, values, nodes)
    order = ("ok", "warning", "failed")
    return {one.field: one for one in sorted(found, key=lambda one: order.index(one.status))}


def test_a_cluster_that_fits_has_nothing_to_say(kubernetes: stubs.Kubernetes) -> None:
    found = ask(kubernetes)
    assert {one.status for one in found.values()} == {"ok"}, found
    assert found["tune_gpus"].found == "2 of 2 nodes can hold 64 cpu, 512Gi memory, 8 nvidia.com/gpu"
    assert found["cluster_volume"].found == "vapi is bound, 2,199 GB"
    assert all(call.headers["Authorization"] == "Bearer secret" for call in kubernetes.calls)


def with_nodes(*nodes: dict[str, Any]) -> Any:
    def change(stub: stubs.Kubernetes) -> None:
        stub.nodes = list(nodes)

    return change


def with_claim(**claim: str) -> Any:
    return lambda stub: stub.claims.update(vapi=stubs.claim(**claim))


def with_quota(gpus: str) -> Any:
    return lambda stub: stub.quotas.append({"metadata": {"name": "few"}, "spec": {"hard": {"requests.nvidia.com/gpu": gpus}}})


def with_fault(pattern: str, fault: int | str) -> Any:
    return lambda stub: stub.faults.update({pattern: fault})


SECRETS = dataclasses.replace(
    ClusterConfig(),
    pods=PodsConfig(secrets={"login": {"user": "A", "password": "B"}}, config_maps={"site": {"key": "C"}}, ca_bundle="trust"),
)


@pytest.mark.parametrize(
    ("change", "fields", "field", "status", "words"),
    [
        (with_nodes(stubs.node("a", gpus=4)), {}, "tune_gpus", "failed", "asks for 8 nvidia.com/gpu, and the largest node has 4"),
        (None, {"tune_gpus": "16"}, "tune_gpus", "failed", "asks for 16 nvidia.com/gpu, and the largest node has 8"),
        (with_nodes(stubs.node("a", product="H100")), {}, "cluster_node_selector", "failed", "A100-SXM4-80GB; nodes have H100"),
        (with_nodes(stubs.node("a", key="team", value="other")), {}, "cluster_tolerations", "failed", "tainted: team=other:NoSchedule"),
        (with_nodes(stubs.node("a", memory="256Gi")), {}, "tune_gpus", "failed", "and the largest node has 96 cpu, 256Gi memory, 8 nv"),
        (with_nodes(stubs.node("a", effect="PreferNoSchedule", key="x")), {}, "tune_gpus", "ok", "1 of 1 nodes"),
        (with_nodes(stubs.node("a", key="node.kubernetes.io/unschedulable")), {}, "tune_gpus", "ok", "1 of 1 nodes"),
        (None, {"cluster_tolerations": []}, "cluster_tolerations", "failed", "tainted: nvidia.com/gpu=:NoSchedule"),
        (None, {"cluster_tolerations": [{"operator": "Exists"}]}, "tune_gpus", "ok", "2 of 2 nodes"),
        (None, {"cluster_tolerations": [{"operator": "Exists", "effect": "NoExecute"}]}, "cluster_tolerations", "failed", "tainted"),
        (None, {"cluster_tolerations": [{"key": "nvidia.com/gpu"}]}, "tune_gpus", "ok", "2 of 2"),
        (None, {"tune_gpus": "0", "tokens_gpus": "0", "evaluate_gpus": "0"}, "tune_gpus", "ok", "2 of 2 nodes can hold 64 cpu, 512Gi"),
        (None, {"cluster_volume": "mine"}, "cluster_volume", "failed", "mine does not exist in team; make it"),
        (with_claim(size="10Gi"), {}, "cluster_volume", "failed", "vapi has 11 GB, and a run needs about"),
        (with_claim(phase="Lost"), {}, "cluster_volume", "failed", "vapi has lost its volume"),
        (with_claim(phase="Pending"), {}, "cluster_volume", "warning", "vapi is Pending"),
        (with_claim(mode="ReadWriteOnce"), {}, "cluster_volume", "ok", "vapi is bound"),
        (with_quota("4"), {}, "tune_gpus", "failed", "quota few allows 4 nvidia.com/gpu in team, not 8"),
        (with_fault("GET /api/v1/nodes", 403), {}, "cluster_node_selector", "warning", "this account may not list nodes"),
        (with_fault("GET /api/v1/nodes", 401), {}, "cluster_node_selector", "failed", "does not accept this login"),
        (with_fault("persistentvolumeclaims", 500), {}, "cluster_volume", "failed", "Kubernetes answered 500"),
        (with_fault("persistentvolumeclaims", "cut"), {}, "cluster_volume", "failed", "Kubernetes cannot be reached"),
    ],
)  # fmt: skip
def test_what_will_not_work_is_named_by_its_field(
    kubernetes: stubs.Kubernetes, change: Any, fields: dict[str, Any], field: str, status: str, words: str
) -> None:
    if change:
        change(kubernetes)
    found = ask(kubernetes, **fields)
    assert found[field].status == status and words in found[field].found, found[field]


def test_a_server_that_hangs_is_given_up(kubernetes: stubs.Kubernetes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "SECONDS", (0.3, 0.3))
    kubernetes.faults["GET /api/v1/nodes"] = "hang"
    found = ask(kubernetes)["cluster_node_selector"]
    assert found.status == "failed" and "cannot be reached" in found.found


def test_a_server_that_is_not_there_is_said_for_each_question(kubernetes: stubs.Kubernetes, tmp_path: Path) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text(path.read_text().replace(kubernetes.url, "http://127.0.0.1:9"))
    found = ask(kubernetes)
    assert {one.status for one in found.values()} == {"failed"} and all("cannot be reached" in one.found for one in found.values())


def test_nodes_made_on_demand_may_be_absent(kubernetes: stubs.Kubernetes) -> None:
    kubernetes.nodes = [stubs.node("cpu", gpus=0)]
    cluster = dataclasses.replace(ClusterConfig(), gpu=dataclasses.replace(ClusterConfig().gpu, autoscaled=True))
    assert ask(kubernetes, cluster)["cluster_node_selector"].status == "warning"
    assert ask(kubernetes)["cluster_node_selector"].status == "failed"


def test_secrets_and_config_maps_need_their_keys(kubernetes: stubs.Kubernetes) -> None:
    found = ask(kubernetes, SECRETS)
    assert "login does not exist in team" in found["pods.secrets"].found
    kubernetes.secrets |= {"login": {"user": "YQ=="}, "pull": {}}
    kubernetes.config_maps |= {"site": {"key": "x"}, "trust": {}}
    found = ask(kubernetes, SECRETS)
    assert found["pods.secrets"].found == "login lacks password; it has user"
    assert found["pods.config_maps"].found == "trust lacks ca.crt; it is empty"
    kubernetes.secrets["login"] |= {"password": "Yg=="}
    kubernetes.config_maps["trust"] |= {"ca.crt": "x"}
    assert {one.status for one in ask(kubernetes, SECRETS).values()} == {"ok"}


def test_pull_secret_and_service_account_must_be_there(kubernetes: stubs.Kubernetes) -> None:
    cluster = dataclasses.replace(ClusterConfig(), image=ImageConfig(pull_secret="pull"), pods=PodsConfig(service_account="runner"))
    found = ask(kubernetes, cluster)
    assert found["image.pull_secret"].status == found["pods.service_account"].status == "failed"
    kubernetes.secrets["pull"] = {".dockerconfigjson": "e30="}
    kubernetes.accounts["runner"] = {}
    assert {one.status for one in ask(kubernetes, cluster).values()} == {"ok"}


def test_several_nodes_need_the_trainer_and_permission(kubernetes: stubs.Kubernetes) -> None:
    assert ask(kubernetes, nodes=True)["trainer.runtime"].status == "ok"
    assert "3 nodes are asked for, and 2 can hold" in ask(kubernetes, nodes=True, tune_nodes=3)["tune_nodes"].found
    kubernetes.forbidden.add("get pods/log")
    assert ask(kubernetes, nodes=True)["pods.service_account"].status == "warning"
    kubernetes.forbidden.add("create trainjobs")
    assert "may not create TrainJobs; apply pipelines/manifests/rbac.yaml" in ask(kubernetes, nodes=True)["pods.service_account"].found
    kubernetes.runtimes.clear()
    assert "is Kubeflow Trainer v2 installed" in ask(kubernetes, nodes=True)["trainer.runtime"].found
    for mode in ("ReadWriteOnce", "ReadWriteOncePod"):
        kubernetes.claims["vapi"] = stubs.claim(mode=mode)
        assert "pods on several need it at once: ReadWriteMany" in ask(kubernetes, nodes=True)["cluster_volume"].found


def test_without_a_kubeconfig_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="there is no usable kubeconfig"):
        api.named()
    assert api.here() is None


# --- the form, and what a pod sees -------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tune_gpus": "-1"}, "tune_gpus is '-1'; give a number of GPUs, or 0 for a CPU"),
        ({"tune_gpus": "eight"}, "tune_gpus is 'eight'; give a number of GPUs, or 0 for a CPU"),
        ({"evaluate_gpus": ""}, "evaluate_gpus is ''; give a number"),
        ({"tune_gpus": "200"}, "tune_gpus x tune_nodes are 200, and share tune_images_per_step 128"),
        ({"cluster_volume": ""}, "cluster_volume is empty, and this package keeps its data on one"),
        ({"cluster_volume": "my.claim"}, "cluster_volume is 'my.claim'; Kubeflow mounts what has small letters"),
        ({"cluster_tolerations": ["nvidia"]}, "cluster_tolerations holds 'nvidia'; a toleration is a mapping"),
        ({"cluster_tolerations": [{"kee": "x"}]}, "a toleration is a mapping with some of key, operator"),
        ({"data_uri": "https://token@host/a.git", "data_revision": "main"}, "data_uri holds a login or a signature"),
        ({"cluster_image": "vapi:latest"}, "cluster_image is 'vapi:latest'; name it by digest"),
        ({"tune_lr": -1.0}, "tune_lr is -1.0; it must be positive"),
        ({"evaluate_samples": 10}, "evaluate_protocol adm-256-50k means evaluate_samples 50000, and it is 10; or say own"),
        ({"data_revision": "main", "data_uri": ""}, "data_revision is given without data_uri"),
    ],
)
def test_a_form_that_cannot_be_is_refused_before_anything_is_asked(changes: dict[str, Any], words: str) -> None:
    values = {**pipeline.ABSENT, **pipeline.defaults(PACKAGE, ClusterConfig()), **changes}
    with pytest.raises(ValueError, match=r".") as error:
        preflight.resolved(config.plain(recipes.recipe(PACKAGE)), values, volume=True)
    assert words in str(error.value)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.write(tmp_path_factory.mktemp("world"))


def step(
    root: Path, out: Path, work_dir: str = "", also: dict[str, Any] | None = None, cluster: ClusterConfig | None = None, **changes: Any
) -> dict[str, Any]:
    """The step as Kubeflow runs it, on the tiny world; the plans. ``also``: more overrides."""
    recipe = recipes.recipe("digits")
    values = {**pipeline.ABSENT, **pipeline.defaults("digits", ClusterConfig()), "cluster_volume": "vapi" if work_dir else ""}
    values |= world.fields(values, world.settings(recipe), recipe) | {"data_uri": str(root), **changes}
    values["overrides"] = {**values["overrides"], **(also or {})}
    facts = config.plain(cluster or ClusterConfig())
    return preflight.preflight(config.plain(recipe), facts, work_dir, False, values, str(out / "checks.md"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pod's process: variables and folder are its own."""
    monkeypatch.setenv("VAPI_STATE", str(tmp_path / "state"))
    for name in ("MLFLOW_TRACKING_URI", "VAPI_WORK_DIR", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_plan_holds_what_the_stage_s_result_follows_from(root: Path, here: Path) -> None:
    plans = step(root, here)
    assert list(plans["subset"]["config"]) == ["subset", "track"] and plans["subset"]["files"].keys() == {"subset.source"}
    assert list(plans["tune"]["config"]) == ["subset", "model", "tokens", "tune", "track"]
    other = step(root, here, tune_lr=1e-3)
    assert other["tokens"] == plans["tokens"] and other["tune"] != plans["tune"], "the cache sees what matters, and nothing else"
    source = root / "data/digits/train.parquet"
    before = source.read_bytes()
    world.write_images(source, 60, seed=9)
    assert step(root, here)["subset"]["files"] != plans["subset"]["files"]
    source.write_bytes(before)
    assert "| overrides tune.perceptual | ok |" in (here / "checks.md").read_text()
    json.dumps(plans)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_generator": "data/none.pt"}, "model_generator: data/none.pt is not here"),
        ({"evaluate_reference": "data/none.npz"}, "evaluate_reference: data/none.npz is not in"),
        ({"subset_source": "data/digits/*.tar"}, "subset_source: data/digits/*.tar is not in"),
        ({"data_uri": "/nowhere"}, "data_uri: data_uri is /nowhere, and there is no such folder"),
        ({"track_uri": "http://127.0.0.1:9"}, "track_uri: http://127.0.0.1:9 cannot be reached"),
        ({"track_uri": "mlflow"}, "track_uri: 'mlflow' is no address"),
        ({"tune_rewards": {"lpip": 1.0}}, "tune_rewards: no reward is called 'lpip'; did you mean 'lpips'?"),
        ({"evaluate_reference": "data/models/generator.safetensors"}, "evaluate_reference: "),
        ({"subset_source": "../elsewhere", "data_uri": "http://127.0.0.1:9"}, "'../elsewhere' leads out of the data"),
        ({"also": {"tune.lr": 1.0}}, "overrides names tune.lr, which has a field of its own"),
        ({"also": {"tune.perceptual": "vgg", "tune.perceptual_weights": "/none"}}, "overrides tune.perceptual: the lpips reward"),
        ({"also": {"evaluate.extractor": "inception", "evaluate.extractor_weights": "/none"}}, "evaluate.extractor is inception, but"),
    ],
)  # fmt: skip
def test_what_is_not_there_stops_the_run_with_all_of_it_named(
    root: Path, here: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        step(root, here, **changes)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and words in err and "Traceback" not in err
    assert "| failed |" in (here / "checks.md").read_text()


def test_a_volume_that_cannot_be_written_or_is_too_small_is_named(
    root: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        step(root, here, work_dir=str(here / "none"))
    assert "is the volume mounted there?" in capsys.readouterr().err
    volume = here / "volume"
    volume.mkdir()
    assert not step(root, here, work_dir=str(volume))["tune"]["files"], "with a volume each step looks at the files itself"
    monkeypatch.setattr(preflight, "IMAGE_BYTES", 10**15)
    with pytest.raises(SystemExit):
        step(root, here, work_dir=str(volume))
    assert "and a run needs about" in capsys.readouterr().err
    runs = [world.settings(recipes.recipe("digits"), tune_lr=lr) for lr in (1e-3, 1e-4)]
    for several, status in ((runs, "warning"), (runs[:1], "failed")):
        found = preflight.about_here(several, origin.Origin(str(root)), preflight.step.Place(here / "state", volume), {}, 2)
        (room,) = (one for one in found if one.field == "cluster_volume")
        assert room.status == status, "an experiment's results may be there already"


def test_a_pod_says_what_it_was_not_given(
    root: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A secret that is missing does not keep this pod from starting, so that it can say so; no permission is needed for it."""
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")  # a pod, without a token
    monkeypatch.setenv("A", "user")
    with pytest.raises(SystemExit):
        step(root, here, cluster=SECRETS)
    err = capsys.readouterr().err
    assert "login gives no B; is it there, with the key password?" in err and "login gives no A" not in err
    assert "site gives no C" in err and "trust gives no /etc/vapi-certificates/ca.crt" in err
    assert step(root, here)
    assert "this pod has no token for Kubernetes" in (here / "checks.md").read_text()


def test_with_a_volume_nothing_is_fetched_to_look_at_it(root: Path, here: Path) -> None:
    volume = here / "volume"
    volume.mkdir()
    step(root, here, work_dir=str(volume), data_uri=f"local://{root}")
    assert not list((volume / ".vapi").rglob("*.parquet")) and not list((volume / ".vapi").rglob("*.safetensors"))
    assert "| subset_source | ok | data/digits/train.parquet," in (here / "checks.md").read_text()
    assert "bytes, still to be fetched" in (here / "checks.md").read_text()


def test_what_lies_on_a_hub_is_looked_at_there(
    root: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dataset by its list of files and the end of the first, a model by its size; neither is missed where the data come from."""
    named = {"subset_source": "hf://datasets/team/pictures/train.parquet", "model_generator": "team/model", "model_tokenizer": "team/model"}
    with stubs.serving(stubs.Hub(root / "data/digits")) as hub:
        stubs.hub_at(hub.url, monkeypatch)
        plans = step(root, here, **named, subset_images=20)
        table = (here / "checks.md").read_text()
        assert f"| subset_source | ok | hf://datasets/team/pictures/train.parquet at commit {'a' * 40}, 1 files, " in table
        assert "| model_generator | ok | team/model, 123 bytes |" in table
        assert plans["subset"]["config"]["subset"]["source"] == named["subset_source"]
        volume = here / "volume"
        volume.mkdir()
        step(root, here, **named, work_dir=str(volume), data_uri=f"local://{root}")
        for words, changes in (
            ("subset_source: the hub knows no dataset team/none", {"subset_source": "hf://datasets/team/none"}),
            ("subset_source: train.parquet has no column 'lable'; did you mean 'label'?", {"also": {"subset.label_column": "lable"}}),
            ("evaluate_reference: hf://datasets/team/pictures is not in", {"evaluate_reference": "hf://datasets/team/pictures"}),
        ):
            with pytest.raises(SystemExit):
                step(root, here, **{**named, **changes})
            assert words in capsys.readouterr().err
    source = origin.Origin(f"local://{root}")
    assert not list(origin.root(source, named.values(), here / "other").iterdir()), "a hub's names are left to whoever reads them"


@pytest.mark.parametrize(
    ("status", "inside", "expected", "words"),
    [
        (200, True, "ok", "answers"),
        (401, True, "failed", "MLFLOW_TRACKING_USERNAME"),
        (401, False, "warning", "wants a login"),
        (403, True, "failed", "--allowed-hosts"),
        (500, True, "failed", "HTTP 500"),
    ],
)
def test_mlflow_is_asked_whether_it_lets_us_in(
    monkeypatch: pytest.MonkeyPatch, status: int, inside: bool, expected: str, words: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    stub = stubs.Stub()
    stub.route("GET", "/api/2.0/mlflow/experiments/search")(lambda request: (status, {}))
    with stubs.serving(stub):
        found = preflight.mlflow(stub.url, inside)
    assert (found.status, found.field) == (expected, "track_uri") and words in found.found
    assert stub.calls[0].headers["Authorization"].startswith("Basic ")


def test_every_image_of_a_source_is_asked_about() -> None:
    runs = [world.settings(recipes.recipe("digits"), subset_images=0)]
    for form, field in (({"subset_images": 0}, "subset_images"), ({"experiment_name": "images"}, "overrides subset.images")):
        found = preflight.about_form(runs, form)[1]
        assert (found.status, found.field) == ("warning", field)


def test_no_mlflow_is_a_warning_and_a_database_is_fine() -> None:
    assert preflight.mlflow("").status == preflight.mlflow("off").status == "warning"
    assert preflight.mlflow("sqlite:///x.db").status == "ok"


def test_the_estimate_grows_with_weights_images_and_samples(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    small = world.settings(recipes.recipe("digits"))
    one, generator = preflight.bytes_needed([small]), (root / "data/models/generator.safetensors").stat().st_size
    assert preflight.bytes_needed([world.settings(recipes.recipe("digits"), subset_images=4000)]) > one
    assert preflight.bytes_needed([world.settings(recipes.recipe("digits"), evaluate_samples=50_000)]) > one > 8 * generator
    assert isinstance(preflight.bytes_needed([Config()]), int)


def test_several_runs_need_what_they_share_once_and_checkpoints_of_few(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    digits = recipes.recipe("digits")
    runs = [world.settings(digits, tune_lr=lr, evaluate_temperature=at) for lr in (1e-5, 1e-4, 1e-3) for at in (0.9, 1.0)]
    images = preflight.IMAGE_BYTES * runs[0].subset.images
    features = preflight.FEATURE_BYTES * 2 * 4 * runs[0].evaluate.samples * len(runs[0].evaluate.seeds)
    swept = world.settings(digits).evaluate
    features += preflight.FEATURE_BYTES * 2 * len(swept.temperatures) * len(swept.guidances) * swept.sweep_samples
    generator = (root / "data/models/generator.safetensors").stat().st_size
    for parallel, at_once in ((1, 1), (2, 2), (5, 3)):
        assert preflight.bytes_needed(runs, parallel) == images + 3 * generator + 7 * at_once * generator + 6 * features


def test_the_papers_largest_experiment_has_room_on_the_default_volume(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """72 models of 1.4 billion weights, of which two at a time keep checkpoints."""
    from vapi.cluster.api import parse_quantity

    monkeypatch.setattr("vapi.models.weights.size", lambda name: 5_700_000_000)
    base = grids.under(grids.grid("rates"), recipes.recipe("llamagen-xxl-c2i"))
    runs = list(grids.runs(grids.grid("rates"), base, [0, 1, 2]).values())
    assert len(runs) > 60 and preflight.bytes_needed(runs, 2) < parse_quantity(ClusterConfig().volume.size)


def test_models_tuned_at_once_need_a_volume_for_several_nodes(kubernetes: stubs.Kubernetes) -> None:
    kubernetes.claims["vapi"] = stubs.claim(mode="ReadWriteOnce")
    recipe = recipes.recipe(PACKAGE)
    other = dataclasses.replace(recipe, tune=dataclasses.replace(recipe.tune, lr=1e-7))
    looked = dataclasses.replace(recipe, evaluate=dataclasses.replace(recipe.evaluate, detector="other"))
    one_by_one = dataclasses.replace(ClusterConfig(), limits=dataclasses.replace(ClusterConfig().limits, parallel=1))
    for runs, cluster, refused in (
        ([recipe, other], ClusterConfig(), True),
        ([recipe, other], one_by_one, False),
        ([recipe, looked], ClusterConfig(), False),
    ):
        values = {**pipeline.ABSENT, **pipeline.defaults(PACKAGE, cluster)}
        found = [one for one in preflight.about_cluster(api.named(), runs, cluster, values) if one.field == "cluster_volume"]
        assert any("ReadWriteMany" in one.found and one.status == "failed" for one in found) == refused
