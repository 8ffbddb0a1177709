"""The compiled packages: whole, plain, the same as their source, and asking of a cluster what cluster.yaml says."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import inspect
import textwrap
import typing
from functools import cache
from pathlib import Path
from typing import Any

import kfp.dsl
import pytest
import yaml
from google.protobuf import json_format
from imports import ROOT
from kfp.dsl.base_component import BaseComponent
from kfp.kubernetes import kubernetes_executor_config_pb2
from kfp.pipeline_spec import pipeline_spec_pb2

from pipelines import commands, experiment, packages, pipeline, readmes, resources
from vapi import config, recipes
from vapi.cluster import form
from vapi.cluster.config import GPU_STEPS, STEPS, ClusterConfig, GpuConfig, ImageConfig, LimitsConfig, PodsConfig, VolumeConfig
from vapi.config import STAGES

COMPONENTS = readmes.COMPONENTS
NAMES = packages.published()
RECIPES = [name for name in NAMES if name not in experiment.PACKAGES]
PLACED_AS = {
    "trainjob": "tune",
    "expand": "preflight",
    "collect": "register",
    "verdict": "preflight",
    "branches": "register",
    "branches-2": "register",
}


@cache
def documents(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    spec, platform = yaml.safe_load_all((packages.COMPILED / f"{name}.yaml").read_text())
    return spec, platform


def executors(name: str) -> dict[str, dict[str, Any]]:
    """Container and Kubernetes' part of each box."""
    spec, platform = documents(name)
    of_kubernetes = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return {
        box.removeprefix("exec-"): {**one["container"], "kubernetes": of_kubernetes[box]}
        for box, one in spec["deploymentSpec"]["executors"].items()
    }


def dags(name: str) -> dict[str, dict[str, Any]]:
    """The graph, and the one inside each of its loops, by the loop's component."""
    spec, _ = documents(name)
    return {"root": spec["root"]["dag"], **{part: one["dag"] for part, one in spec["components"].items() if "dag" in one}}


def boxes(name: str) -> dict[str, dict[str, Any]]:
    """The boxes, those in loops too."""
    return {box: task for dag in dags(name).values() for box, task in dag["tasks"].items() if "parameterIterator" not in task}


def wants_gpus(name: str) -> bool:
    return not name.startswith("digits") and name != "experiment-cpu"


def fields(name: str) -> dict[str, dict[str, Any]]:
    return dict(documents(name)[0]["root"]["inputDefinitions"]["parameters"])


# --- every package -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_it_is_what_compile_writes(name: str) -> None:
    assert (packages.COMPILED / f"{name}.yaml").read_text() == packages.text(name, packages.load_cluster()), "python -m pipelines compile"


def test_nothing_else_lies_beside_them_and_manifests_are_fresh(capsys: pytest.CaptureFixture[str]) -> None:
    assert sorted(path.stem for path in packages.COMPILED.iterdir()) == sorted(NAMES)
    assert commands.main(["compile", "--check"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_both_documents_are_what_kubeflow_reads(name: str) -> None:
    spec, platform = documents(name)
    json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
    json_format.ParseDict(platform, pipeline_spec_pb2.PlatformSpec())
    for one in executors(name).values():
        json_format.ParseDict(one["kubernetes"], kubernetes_executor_config_pb2.KubernetesExecutorConfig())


@pytest.mark.parametrize("name", NAMES)
def test_it_is_small_ascii_and_installs_nothing(name: str) -> None:
    data = (packages.COMPILED / f"{name}.yaml").read_bytes()
    assert data.isascii() and len(data) < packages.MAX_BYTES
    assert b"pip install" not in data and b"packages_to_install" not in data


@pytest.mark.parametrize("name", NAMES)
def test_every_field_has_a_default_and_a_description(name: str) -> None:
    for field, declared in fields(name).items():
        assert "defaultValue" in declared and declared["defaultValue"] is not None, field
        assert declared["description"], field


@pytest.mark.parametrize("name", RECIPES)
def test_the_form_shows_the_recipe(name: str) -> None:
    recipe, nodes = packages.recipe_of(name)
    shown = {field: declared["defaultValue"] for field, declared in fields(name).items()}
    base = recipes.recipe(recipe)
    for field, value in shown.items():
        if (place := form.stands_for(field)) and field != "track_uri":
            assert value == getattr(getattr(base, place[0]), place[1]), field
    assert form.resolve(config.plain(base), shown) == base, "left as it is, it is the recipe"
    assert ("tune_nodes" in shown) == nodes


@pytest.mark.parametrize("name", RECIPES)
def test_six_plain_boxes_in_a_row(name: str) -> None:
    tasks = documents(name)[0]["root"]["dag"]["tasks"]
    tune_box = "trainjob" if name.endswith("-trainjob") else "tune"
    assert [task["taskInfo"]["name"] for task in tasks.values()] and set(tasks) == {*STEPS, tune_box} - ({"tune"} - {tune_box})
    assert {task["taskInfo"]["name"] for task in tasks.values()} == {step.capitalize() for step in STEPS}
    assert not any("triggerPolicy" in task or "iterator" in task for task in tasks.values()), "no box that hides others"
    for box, task in tasks.items():
        if box != "preflight":
            assert task["inputs"]["parameters"]["plan"]["taskOutputParameter"]["producerTask"] == "preflight"


@pytest.mark.parametrize("name", NAMES)
def test_each_box_asks_for_what_cluster_yaml_says(name: str) -> None:
    cluster, gpu = packages.load_cluster(), wants_gpus(name)
    nodes = name.endswith("-trainjob")
    for box, one in executors(name).items():
        step = PLACED_AS.get(box, box)
        on_gpus = step in GPU_STEPS and box != "trainjob"
        size = cluster.gpu if gpu and on_gpus else cluster.cpu
        asks, kubernetes = one["resources"], one["kubernetes"]
        assert (asks["resourceCpuLimit"], asks["resourceMemoryLimit"], asks["resourceMemoryRequest"]) == (
            size.cpu,
            size.memory,
            size.memory,
        )
        mounts = {mount["mountPath"]: mount for mount in kubernetes["emptyDirMounts"]}
        assert mounts["/dev/shm"]["medium"] == "Memory" and mounts["/dev/shm"]["sizeLimit"] == size.shared_memory
        assert mounts["/tmp"]["sizeLimit"] == size.scratch
        limit = cluster.limits.run if box == "trainjob" else cluster.limits.timeouts[step]  # it waits for its nodes too
        assert kubernetes["activeDeadlineSeconds"] == str(limit)
        assert kubernetes["fieldPathAsEnv"] == [{"name": resources.RUN_ID, "fieldPath": "metadata.labels['pipeline/runid']"}]
        assert one["image"] == "{{$.inputs.parameters['pipelinechannel--cluster_image']}}"
        assert ("accelerator" in asks) == on_gpus
        if on_gpus:
            assert asks["accelerator"]["resourceType"] == cluster.gpu.resource
            assert asks["accelerator"]["resourceCount"] == f"{{{{$.inputs.parameters['pipelinechannel--{step}_gpus']}}}}"
            assert _field(kubernetes["nodeSelector"]["nodeSelectorJson"]) == "cluster_node_selector"
            assert _field(kubernetes["tolerations"][0]["tolerationJson"]) == "cluster_tolerations"
        volumes = [(mount["mountPath"], _field(mount["pvcNameParameter"])) for mount in kubernetes.get("pvcMount", [])]
        assert volumes == ([(cluster.volume.path, "cluster_volume")] if gpu else [])
    limit = documents(name)[1]["platforms"]["kubernetes"]["pipelineConfig"]["activeDeadlineSeconds"]
    assert limit == cluster.limits.run
    assert nodes == ("trainjob" in executors(name))


def _field(named: dict[str, Any]) -> str:
    """The form's field; a loop's boxes know it by a longer name."""
    return str(named["componentInputParameter"]).removeprefix("pipelinechannel--")


@pytest.mark.parametrize("name", NAMES)
def test_what_lies_on_a_volume_or_is_of_the_moment_is_not_cached(name: str) -> None:
    for box, task in boxes(name).items():
        step = PLACED_AS.get(box, box)
        assert bool(task["cachingOptions"].get("enableCache")) == (not wants_gpus(name) and step not in ("preflight", "register")), box
        retries = task.get("retryPolicy", {}).get("maxRetryCount", 0)
        assert retries == (0 if step == "preflight" else packages.load_cluster().limits.retries)


@pytest.mark.parametrize("name", experiment.PACKAGES)
def test_an_experiment_loops_over_what_its_runs_share(name: str) -> None:
    """Images, in it models, in it looks at a model; so many models at once as cluster.yaml says. The table is of all looks."""
    within, found = "root", []
    while loops := {task["componentRef"]["name"]: task for task in dags(name)[within]["tasks"].values() if "parameterIterator" in task}:
        ((inner, task),) = loops.items()
        found.append((task["taskInfo"]["name"], task["iteratorPolicy"]["parallelismLimit"], set(dags(name)[inner]["tasks"]) & set(STEPS)))
        within = inner
    parallel = packages.load_cluster().limits.parallel
    assert found == [("images", 1, {"subset", "tokens"}), ("models", parallel, {"tune"}), ("evaluations", 1, {"evaluate"})]
    assert not any(
        "parameterExpressionSelector" in given
        for dag in dags(name).values()
        for task in dag["tasks"].values()
        if "parameterIterator" in task
        for given in task["inputs"]["parameters"].values()
    ), "which Kubeflow's driver evaluates again in each iteration, when the items are gone"
    first, last = (documents(name)[0]["root"]["dag"]["tasks"][box] for box in ("expand", "collect"))
    assert "dependentTasks" not in first and last["dependentTasks"] == ["expand", "for-loop-1"]
    collected = documents(name)[0]["components"]["comp-collect"]["inputDefinitions"]["artifacts"]["evaluations"]
    assert collected["isArtifactList"] and last["inputs"]["artifacts"]["evaluations"]["taskOutputArtifact"]["producerTask"] == "for-loop-1"


@pytest.mark.parametrize("name", NAMES)
def test_what_a_box_in_a_loop_asks_for_is_known_there(name: str) -> None:
    """Numbers of GPUs among it, which kfp forgets to hand into a loop."""
    for part, dag in dags(name).items():
        spec = documents(name)[0]["root" if part == "root" else "components"]
        known = (spec if part == "root" else spec[part])["inputDefinitions"]["parameters"]
        for box, task in dag["tasks"].items():
            for one in task.get("inputs", {}).get("parameters", {}).values():
                assert one.get("componentInputParameter", next(iter(known))) in known, (box, one)


@pytest.mark.parametrize("name", NAMES)
def test_a_number_of_gpus_is_text(name: str) -> None:
    """Kubeflow's driver reads a string there (resolvePodSpecInputRuntimeParameter); of a number it makes no limit, and so no GPU."""
    spec = documents(name)[0]
    kinds = {
        (field.removeprefix("pipelinechannel--"), given["parameterType"])
        for part in (spec["root"], *spec["components"].values())
        for field, given in part["inputDefinitions"]["parameters"].items()
        if field.endswith("_gpus")
    }
    assert kinds == {(f"{step}_gpus", "STRING") for step in GPU_STEPS}


def test_defaults_are_eight_a100_and_digits_needs_none() -> None:
    shown = {name: declared["defaultValue"] for name, declared in fields("llamagen-xxl-c2i").items()}
    assert [shown[f"{step}_gpus"] for step in GPU_STEPS] == ["8", "8", "8"]
    assert shown["cluster_node_selector"] == {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"}
    assert (shown["tune_steps"], shown["tune_images_per_step"], shown["tune_lr"], shown["subset_images"]) == (100, 128, 1e-6, 12_928)
    shown = {name: declared["defaultValue"] for name, declared in fields("digits").items()}
    assert [shown[f"{step}_gpus"] for step in GPU_STEPS] == ["0", "0", "0"] and shown["cluster_node_selector"] == {}
    assert "cluster_volume" not in shown


# --- cluster.yaml ------------------------------------------------------------------------------


def test_cluster_yaml_is_the_defaults_with_their_documentation() -> None:
    assert packages.CLUSTER.read_text() == packages.cluster_text(ClusterConfig())


def test_every_fact_of_cluster_yaml_gets_into_a_package(tmp_path: Path) -> None:
    """Each field is changed; the change must show in a compiled file or, where it says so, in a manifest."""
    cluster = ClusterConfig(
        image=ImageConfig("registry.example.com/mine:9.9.9", "Always", "pull-me"),
        gpu=dataclasses.replace(
            GpuConfig(), resource="amd.com/gpu", per_node=4, node_selector={"a": "b"}, tolerations=[], cpu="33", memory="333Gi"
        ),
        volume=VolumeConfig("mine", "/mnt/mine"),
        limits=dataclasses.replace(LimitsConfig(), run=77, retries=7, retry_seconds=70, parallel=5),
        pods=PodsConfig(
            labels={"kueue.x-k8s.io/queue-name": "gpu"}, annotations={"sidecar.istio.io/inject": "false"}, env={"NCCL_DEBUG": "INFO"},
            secrets={"login": {"user": "MLFLOW_TRACKING_USERNAME"}}, config_maps={"site": {"key": "SITE"}}, ca_bundle="certificates",
            proxy="http://proxy:3128", no_proxy="localhost",
        ),
    )  # fmt: skip
    spec, platform = yaml.safe_load_all(packages.text("llamagen-xl-c2i", cluster))
    shown = {name: declared["defaultValue"] for name, declared in spec["root"]["inputDefinitions"]["parameters"].items()}
    assert shown["cluster_image"] == "registry.example.com/mine:9.9.9" and shown["cluster_volume"] == "mine"
    given = spec["root"]["dag"]["tasks"]["preflight"]["inputs"]["parameters"]
    assert given["work_dir"]["runtimeValue"]["constant"] == shown["data_uri"] == "/mnt/mine" and shown["tune_gpus"] == "4"
    assert shown["cluster_node_selector"] == {"a": "b"} and shown["cluster_tolerations"] == []
    box = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-tune"]
    assert box["imagePullPolicy"] == "Always" and box["imagePullSecret"][0]["secretName"] == "pull-me"
    assert box["podMetadata"] == {"labels": cluster.pods.labels, "annotations": cluster.pods.annotations}
    assert box["secretAsEnv"][0]["keyToEnv"] == [{"secretKey": "user", "envVar": "MLFLOW_TRACKING_USERNAME"}]
    assert box["configMapAsEnv"][0]["keyToEnv"] == [{"configMapKey": "key", "envVar": "SITE"}]
    assert box["configMapAsVolume"][0]["configMapName"] == "certificates"
    container = spec["deploymentSpec"]["executors"]["exec-tune"]["container"]
    env = {one["name"]: one["value"] for one in container["env"]}
    assert (
        env["NCCL_DEBUG"] == "INFO" and env["HTTPS_PROXY"] == env["https_proxy"] == "http://proxy:3128" and env["NO_PROXY"] == "localhost"
    )
    assert env["SSL_CERT_FILE"] == env["REQUESTS_CA_BUNDLE"] == box["configMapAsVolume"][0]["mountPath"] + "/ca.crt"
    assert (container["resources"]["resourceCpuLimit"], container["resources"]["resourceMemoryLimit"]) == ("33", "333Gi")
    assert container["resources"]["accelerator"]["resourceType"] == "amd.com/gpu"
    task = spec["root"]["dag"]["tasks"]["tune"]["retryPolicy"]
    assert (task["maxRetryCount"], task["backoffDuration"]) == (7, "70s")
    assert task["backoffMaxDuration"] == "77s", "it bounds all attempts together, so a shorter one than the run's would end a retry"
    optional = {
        box: one["secretAsEnv"][0]["optional"] for box, one in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].items()
    }
    assert optional.pop("exec-preflight") and not any(optional.values()), "preflight starts without a secret, in order to say so"
    assert platform["platforms"]["kubernetes"]["pipelineConfig"]["activeDeadlineSeconds"] == 77
    assert "parallelismLimit: 5\n" in packages.text("experiment", cluster)


@pytest.mark.parametrize(
    ("line", "wrong", "words"),
    [
        ("  name: registry.example.com/vapi:0.1.0", "  name: ghcr.io/a/b:latest", "image.name is 'ghcr.io/a/b:latest'; name it by digest"),
        ("  name: registry.example.com/vapi:0.1.0", "  name: ghcr.io/a/b", "image.name is 'ghcr.io/a/b'"),
        ("  name: registry.example.com/vapi:0.1.0", "  name: ghcr.io/a/b@sha256:12", "image.name is 'ghcr.io/a/b@sha256:12'"),
        ("  memory: 512Gi", "  memory: 512 GB", "gpu.memory is '512 GB'; write a quantity"),
        ("  per_node: 8", "  per_node: 0", "gpu.per_node is 0"),
        ("  per_node: 8", "  per_nodes: 8", "gpu has no field 'per_nodes'; did you mean 'per_node'?"),
        ("  per_node: 8\n", "", "gpu lacks per_node; add it, or write a complete file with: python -m pipelines cluster --write"),
        ("  name: registry.example.com/vapi:0.1.0", "  name: ghcr.io/a/b:LATEST", "image.name is 'ghcr.io/a/b:LATEST'"),
        ("  path: /mnt/vapi", "  path: mnt", "volume.path is 'mnt'"),
        ("  path: /mnt/vapi", "  path: /tmp/vapi", "volume.path is '/tmp/vapi'; give a folder that nobody else has"),
        ("  claim: vapi", "  claim: My_Claim", "volume.claim is 'My_Claim'; Kubeflow mounts"),
        ("  claim: vapi", "  claim: my.claim", "volume.claim is 'my.claim'; Kubeflow mounts"),
        ("  claim: vapi", "  claim: ''", "volume.claim is empty"),
        ("  shared_memory: 64Gi", "  shared_memory: 512Gi", "gpu.shared_memory 512Gi is a part of gpu.memory 512Gi, and must be less"),
        ("{key: nvidia.com/gpu, ", "{kee: nvidia.com/gpu, ", "gpu.tolerations holds"),
        ("  labels: {}", "  labels: {Bad Key!: x}", "pods.labels has 'Bad Key!'"),
        ("  env: {}", "  env: {A B: x}", "pods names the variable 'A B'"),
        ("  ca_bundle: ''", "  ca_bundle: kube-root-ca.crt", "pods.ca_bundle is 'kube-root-ca.crt'; Kubeflow mounts"),
        ("  secrets: {}", "  secrets: {login: {}}", "pods.secrets.login names no key"),
        ("  pull_policy: IfNotPresent", "  pull_policy: Sometimes", "image.pull_policy is 'Sometimes'; it must be one of"),
        ("tune: 86400", "tunes: 86400", "limits.timeouts names"),
        ("  parallel: 2", "  parallel: 0", "limits.parallel is 0; give at least 1"),
        ("gpu:", "gpus:", "the config has no field 'gpus'; did you mean 'gpu'?"),
    ],
)
def test_a_fact_that_cannot_be_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, wrong: str, words: str) -> None:
    text = packages.CLUSTER.read_text()
    assert line in text
    path = tmp_path / "cluster.yaml"
    path.write_text(text.replace(line, wrong, 1))
    assert commands.main(["compile", "--cluster", str(path), "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: cluster.yaml: ") and words in err and not list(tmp_path.glob("*c2i*"))


def test_other_recipes_can_be_compiled_and_a_cpu_recipe_has_no_second_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["compile", "digits-prior-alone", "--out", str(tmp_path)]) == 0
    assert "tune_policy_weight" in (tmp_path / "digits-prior-alone.yaml").read_text()
    assert commands.main(["compile", "digits-trainjob", "--out", str(tmp_path)]) == 2
    assert commands.main(["compile", "digit", "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "needs no GPU" in err and "did you mean 'digits'?" in err


def test_cluster_can_be_written_anew_with_its_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(packages.CLUSTER.read_text().replace("claim: vapi", "claim: mine").replace("  # Cores.\n", ""))
    assert commands.main(["cluster", "--cluster", str(path), "--write"]) == 0
    assert "claim: mine" in path.read_text() and "# Cores." in path.read_text()


# --- components --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_body_uses_nothing_around_it(name: str) -> None:
    """It is shipped as text: names of its module, closures and imports at its top are not there when it runs."""
    function = COMPONENTS[name].python_func
    given = {*dir(builtins), *dir(typing), *dir(kfp.dsl), "kfp", "dsl"}
    code = compile(textwrap.dedent(inspect.getsource(function).partition("\n")[2]), name, "exec")
    used = {
        one.argval
        for part in _codes(code)
        for one in __import__("dis").get_instructions(part)
        if one.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    assert not used - given - {name}


def _codes(code: Any) -> list[Any]:
    return [code, *(inner for constant in code.co_consts if inspect.iscode(constant) for inner in _codes(constant))]


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_module_imports_kfp_alone_at_its_top(name: str) -> None:
    tree = ast.parse((ROOT / f"components/{name}/component.py").read_text())
    top = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)} | {
        a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names
    }
    assert top <= {"typing", "kfp.dsl", "components"}
    inside = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)} - top
    assert inside and all(module == "collections" or module.startswith("vapi") for module in inside)


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_component_runs_in_the_one_image_and_installs_nothing(name: str) -> None:
    container = COMPONENTS[name].component_spec.implementation.container
    assert container.image == ImageConfig().name and "pip" not in " ".join(container.command[:3])


def test_signature_dvc_and_form_agree() -> None:
    """One pipeline, said three times: a stage's inputs are those of config.STAGES, hence of dvc.yaml (tests/test_agreement.py)."""
    called = {"tune": "model", "evaluate": "evaluation"}  # what Kubeflow's artifacts of these stages are called
    for stage, spec in STAGES.items():
        component = COMPONENTS[stage]
        folders = [name for name, one in component.component_spec.inputs.items() if one.type.startswith("system.")]
        assert folders == [called.get(name, name) for name in spec.inputs]
        assert [name for name in component.component_spec.inputs if name not in folders] == ["plan", "work_dir"]
    everything = pipeline.fields(gpu=True, nodes=True) | pipeline.fields(gpu=True, nodes=True, first=COMPONENTS["expand"])
    assert list(pipeline.fields(gpu=True, nodes=True)) == [
        name for name in COMPONENTS["preflight"].component_spec.inputs if name not in pipeline.GIVEN
    ]
    for name, kind in everything.items():
        assert form.stands_for(name) or name in form.OTHERS
        if place := form.stands_for(name):
            declared = typing.get_type_hints(typing.get_type_hints(config.Config)[place[0]])[place[1]]
            plain = typing.get_origin(declared) or declared
            assert kind is (str if plain is typing.Literal else plain), name
    assert {name for name in COMPONENTS["preflight"].component_spec.outputs if name != "checks"} == set(STAGES)


@pytest.mark.parametrize("name", COMPONENTS)
def test_readme_has_the_table_of_the_signature(name: str) -> None:
    assert (ROOT / f"components/{name}/README.md").read_text() == readmes.text(name), "python -m pipelines compile"
    assert all(f"| `{field}` |" in readmes.text(name) for field in COMPONENTS[name].component_spec.inputs)


def test_the_components_are_the_folders() -> None:
    assert {path.parent.name for path in (ROOT / "components").glob("*/component.py")} == set(COMPONENTS)
    assert all(isinstance(one, BaseComponent) for one in COMPONENTS.values())
