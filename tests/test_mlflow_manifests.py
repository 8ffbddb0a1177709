"""The tracking server's manifests fit Kubernetes, MLflow and each other. Nothing is started here; mlflow/README.md says what was."""

from __future__ import annotations

import ast
import configparser
import importlib.util
import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import kubernetes.client
import pytest
import yaml
from imports import ROOT

from vapi import config
from vapi.cluster.config import ClusterConfig, require_pinned

FOLDER = ROOT / "mlflow" / "kubernetes"
README = (ROOT / "mlflow" / "README.md").read_text()
NAME = "app.kubernetes.io/name"

Document = dict[str, Any]


def read(name: str) -> list[Document]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


KUSTOMIZATION: Document = read("kustomization.yaml")[0]
DOCUMENTS: list[Document] = [document for name in KUSTOMIZATION["resources"] for document in read(name)]
GENERATED: dict[str, dict[str, str]] = {}
"""ConfigMaps that kustomize makes: their keys and values."""
for generator in KUSTOMIZATION["configMapGenerator"]:
    content = GENERATED.setdefault(generator["name"], {})
    for name in generator.get("envs", []):
        lines = (FOLDER / name).read_text().splitlines()
        content.update(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    for name in generator.get("files", []):
        content[name.partition("=")[0]] = (FOLDER / name.rpartition("=")[2]).read_text()
SETTINGS = GENERATED["mlflow-server"]


@cache
def secrets() -> dict[str, dict[str, str]]:
    made = subprocess.run(["sh", FOLDER / "secrets.sh"], check=True, capture_output=True, text=True).stdout
    return {document["metadata"]["name"]: document["stringData"] for document in yaml.safe_load_all(made)}


def ids(document: Document) -> str:
    return f"{document['kind']}/{document['metadata']['name']}"


def of(kind: str) -> dict[str, Document]:
    return {document["metadata"]["name"]: document.get("spec", {}) for document in DOCUMENTS if document["kind"] == kind}


WORKLOADS = {**of("Deployment"), **of("StatefulSet")}
POLICIES = of("NetworkPolicy")
PODS = {name: workload["template"]["spec"] for name, workload in WORKLOADS.items()}
CONTAINERS = [(name, each) for name, pod in PODS.items() for each in pod.get("initContainers", []) + pod["containers"]]
SERVER = PODS["mlflow"]["containers"][0]

each_container = pytest.mark.parametrize(("pod", "container"), CONTAINERS, ids=[f"{pod}/{each['name']}" for pod, each in CONTAINERS])


def chosen(selector: Document) -> list[str]:
    """The workloads whose pods a selector picks."""
    wanted = selector.get("matchLabels", {}).items()
    return [name for name, workload in WORKLOADS.items() if wanted <= workload["template"]["metadata"]["labels"].items()]


def ports(pod: str) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for each in PODS[pod]["containers"] for port in each.get("ports", [])}


def environment(container: Document) -> dict[str, str]:
    values: dict[str, str] = {}
    for source in container.get("envFrom", []):
        values |= GENERATED[source["configMapRef"]["name"]] if "configMapRef" in source else secrets()[source["secretRef"]["name"]]
    for variable in container.get("env", []):
        reference = variable.get("valueFrom", {}).get("secretKeyRef")
        values[variable["name"]] = secrets()[reference["name"]][reference["key"]] if reference else variable["value"]
    return values


def command(container: Document) -> list[str]:
    """As the kubelet gives it, $(NAME) replaced; a name that is nowhere set would stay, and fails here."""
    values = environment(container)
    return [
        re.sub(r"\$\((\w+)\)", lambda match: values[match[1]], word) for word in container.get("command", []) + container.get("args", [])
    ]


# --- as Kubernetes reads them ------------------------------------------------------------------


class Answer:
    def __init__(self, document: Document) -> None:
        self.data = json.dumps(document)


def as_read(document: Document) -> Document:
    """Through the types of Kubernetes' own client and back: an unknown key is lost, a wrong type changed or refused."""
    api, version = kubernetes.client.ApiClient(), document["apiVersion"].rpartition("/")[2].capitalize()
    return api.sanitize_for_serialization(api.deserialize(Answer(document), version + document["kind"]))


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_kubernetes_knows_every_field(document: Document) -> None:
    assert as_read(document) == document


def test_and_a_wrong_one_would_be_found() -> None:
    service = next(document for document in DOCUMENTS if document["kind"] == "Service")
    for key, value in (("select", {}), ("ports", [{"port": "5000"}])):
        wrong = {**service, "spec": {**service["spec"], key: value}}
        assert as_read(wrong) != wrong


@pytest.mark.skipif(not shutil.which("kubectl"), reason="needs kubectl")
def test_kustomize_builds_them() -> None:
    text = subprocess.run(["kubectl", "kustomize", FOLDER], check=True, capture_output=True, text=True).stdout
    built = list(yaml.safe_load_all(text))
    plain = sorted(ids(document) for document in built if document["kind"] != "ConfigMap")
    assert plain == sorted(map(ids, DOCUMENTS))
    maps = {re.sub("-[a-z0-9]{10}$", "", d["metadata"]["name"]): d["data"] for d in built if d["kind"] == "ConfigMap"}
    assert maps == GENERATED
    assert {d["metadata"].get("namespace") for d in built if d["kind"] != "Namespace"} == {"mlflow"}
    assert all(as_read(document) == document for document in built)


# --- as they refer to each other ---------------------------------------------------------------


def test_every_selector_chooses_one_workload_and_every_port_is_there() -> None:
    for name, workload in WORKLOADS.items():
        assert chosen(workload["selector"]) == [name]
    assert of("Service").keys() == WORKLOADS.keys()
    for name, service in of("Service").items():
        assert chosen({"matchLabels": service["selector"]}) == [name]
        for port in service["ports"]:
            assert ports(name)[port["targetPort"]] == port["port"]
    for workload in of("StatefulSet").values():
        assert workload["serviceName"] in of("Service")


@each_container
def test_what_a_container_refers_to_exists(pod: str, container: Document) -> None:
    command(container)
    volumes = {volume["name"]: volume for volume in PODS[pod].get("volumes", [])}
    claimed = {claim["metadata"]["name"] for claim in WORKLOADS[pod].get("volumeClaimTemplates", [])}
    assert {mount["name"] for mount in container["volumeMounts"]} <= volumes.keys() | claimed
    for volume in volumes.values():
        source = volume.get("configMap", {})
        assert {item["key"] for item in source.get("items", [])} <= GENERATED[source["name"]].keys() if source else "emptyDir" in volume
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        if "httpGet" in container.get(probe, {}):
            assert container[probe]["httpGet"]["port"] in ports(pod)


def test_the_network_is_closed_but_for_what_is_needed() -> None:
    default = POLICIES["default-deny"]
    assert default == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}, "nothing, in both directions, for all pods"

    def pods_in(peers: list[Document]) -> list[str]:
        return [name for peer in peers if "namespaceSelector" not in peer for name in chosen(peer["podSelector"])]

    open_ports = {name: {port["port"] for rule in POLICIES[name]["ingress"] for port in rule["ports"]} for name in WORKLOADS}
    assert POLICIES.keys() == {"default-deny", *WORKLOADS}
    for name in WORKLOADS:
        assert chosen(POLICIES[name]["podSelector"]) == [name] and open_ports[name] == set(ports(name).values())
    for name in ("postgres", "s3"):
        (rule,) = POLICIES[name]["ingress"]
        assert len(rule["from"]) == 1 and pods_in(rule["from"]) == ["mlflow"]
    (outside,) = POLICIES["mlflow"]["ingress"]
    namespaces = [peer["namespaceSelector"]["matchLabels"] for peer in outside["from"]]
    assert {"app.kubernetes.io/part-of": "kubeflow-profile"} in namespaces and all(namespaces)
    *inside, names = POLICIES["mlflow"]["egress"]
    assert {(pod, port["port"]) for rule in inside for pod in pods_in(rule["to"]) for port in rule["ports"]} == {
        ("postgres", 5432),
        ("s3", 8333),
    }
    assert {(port["protocol"], port["port"]) for port in names["ports"]} == {("UDP", 53), ("TCP", 53)}
    store = urlparse(SETTINGS["MLFLOW_S3_ENDPOINT_URL"])
    assert SETTINGS["PGHOST"] == "postgres" and (store.hostname, store.port) == ("s3", 8333)


@each_container
def test_no_container_has_a_right_that_it_does_not_need(pod: str, container: Document) -> None:
    """Kubernetes' restricted standard, which the namespace enforces, and a root file system that is read-only."""
    (namespace,) = [document["metadata"] for document in DOCUMENTS if document["kind"] == "Namespace"]
    assert namespace["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    whole, own = PODS[pod], container["securityContext"]
    assert whole["securityContext"]["runAsNonRoot"] and whole["securityContext"]["runAsUser"] > 0
    assert whole["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert own == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    assert whole["automountServiceAccountToken"] is False
    assert whole["enableServiceLinks"] is False, "a Service named mlflow would become the server's option MLFLOW_PORT"
    assert container["resources"]["requests"].keys() == {"cpu", "memory"} and "memory" in container["resources"]["limits"]


def test_images_are_pinned_in_one_place_and_the_server_is_the_version_that_was_tested() -> None:
    pinned = {image["name"]: f"{image['name']}:{image['newTag']}" for image in KUSTOMIZATION["images"]}
    assert {container["image"] for _, container in CONTAINERS} == pinned.keys()
    for image in pinned.values():
        require_pinned(image, "images")
    (version,) = re.findall(r"^mlflow==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned["ghcr.io/mlflow/mlflow"].endswith(f":v{version}-full"), "the image without -full has no psycopg2, boto3, Flask-WTF"
    assert compose()["image"] == f"ghcr.io/mlflow/mlflow:v{version}"


# --- secrets -----------------------------------------------------------------------------------


def test_no_secret_is_known_in_advance() -> None:
    template = {document["metadata"]["name"]: document["stringData"] for document in read("secrets.template.yaml")}
    assert all(value is None for keys in template.values() for value in keys.values())
    assert {name: list(keys) for name, keys in secrets().items()} == {name: list(keys) for name, keys in template.items()}
    values = [value for keys in secrets().values() for value in keys.values()]
    first = dict(secrets())
    secrets.cache_clear()
    values += [value for keys in secrets().values() for value in keys.values()]
    assert first.keys() == secrets().keys() and len(values) == len(set(values)) and all(re.fullmatch("[0-9a-f]{48}", v) for v in values)


def test_every_secret_is_used_and_goes_only_where_it_is_used() -> None:
    users: dict[str, set[str]] = {}
    for pod, container in CONTAINERS:
        named = [source["secretRef"]["name"] for source in container.get("envFrom", []) if "secretRef" in source]
        named += [variable["valueFrom"]["secretKeyRef"]["name"] for variable in container.get("env", []) if "valueFrom" in variable]
        for name in named:
            users.setdefault(name, set()).add(pod)
    assert users == {
        "mlflow-server": {"mlflow"},
        "mlflow-database": {"mlflow", "postgres"},
        "mlflow-s3": {"mlflow", "s3"},
        "postgres": {"postgres"},
    }
    words = " ".join([*SETTINGS.values(), *(word for _, each in CONTAINERS for word in each.get("command", []) + each.get("args", []))])
    assert not re.search(r"://[^/\s]*@", words) and "password" not in words.lower(), "no password in an address or a command line"


# --- as MLflow reads them ----------------------------------------------------------------------

LIBRARY = Path(str(importlib.util.find_spec("mlflow").origin)).parent  # type: ignore[union-attr]


def compose() -> Document:
    return yaml.safe_load((ROOT / "mlflow" / "compose.yaml").read_text())["services"]["mlflow"]


def options(words: list[str]) -> dict[str, str]:
    assert words[:2] == ["mlflow", "server"]
    return dict(word.removeprefix("--").split("=", 1) for word in words[2:])


def test_mlflow_knows_every_option_and_variable() -> None:
    known = (LIBRARY / "cli" / "__init__.py").read_text() + (LIBRARY / "utils" / "cli_args.py").read_text()
    variables = known + (LIBRARY / "environment_variables.py").read_text() + (LIBRARY / "utils" / "crypto.py").read_text()
    for option in [*options(command(SERVER)), *options(compose()["command"])]:
        assert f'"--{option}"' in known
    for variable in [*environment(SERVER), *compose()["environment"]]:
        assert not variable.startswith("MLFLOW_") or f'"{variable}"' in variables


def test_the_server_asks_for_a_login_and_answers_to_its_own_names_alone() -> None:
    given = options(command(SERVER))
    assert given["app-name"] == "basic-auth" and environment(SERVER)["MLFLOW_FLASK_SERVER_SECRET_KEY"]
    hosts = given["allowed-hosts"].split(",")
    assert {f"mlflow{zone}:5000" for zone in ("", ".mlflow", ".mlflow.svc", ".mlflow.svc.cluster.local")} <= set(hosts)
    assert not [host for host in hosts if "*" in host and host.partition(":")[0] not in ("localhost", "127.0.0.1")]
    assert given["artifacts-destination"].startswith("s3://") and "default-artifact-root" not in given, "artifacts go through the server"
    assert "DO_NOT_TRACK" in environment(SERVER) and environment(SERVER)["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"

    mounted = {mount["name"]: mount["mountPath"] for mount in SERVER["volumeMounts"]}
    assert environment(SERVER)["MLFLOW_AUTH_CONFIG_PATH"] == f"{mounted['auth']}/basic_auth.ini"
    ours = configparser.ConfigParser()
    ours.read_string(GENERATED["mlflow-auth"]["basic_auth.ini"])
    published = (LIBRARY / "server" / "auth" / "basic_auth.ini").read_text()
    assert all(f"{key} = " in published for key in ours["mlflow"]) and "admin_password" not in ours["mlflow"]
    admin = ours["mlflow"]["admin_username"]
    assert f'admin = "{admin}"' in (FOLDER / "login.sh").read_text()
    database = ours["mlflow"]["database_uri"].rpartition("/")[2]
    for name in (database, given["backend-store-uri"].rpartition("/")[2]):
        assert f"CREATE DATABASE {name} OWNER {SETTINGS['PGUSER']};" in GENERATED["postgres-init"]["mlflow.sql"]


def test_two_servers_never_migrate_at_once() -> None:
    deployment = of("Deployment")["mlflow"]
    assert deployment["replicas"] == 1 and deployment["strategy"] == {"type": "Recreate"}
    (upgrade,) = [each for each in PODS["mlflow"]["initContainers"] if each["command"][:3] == ["mlflow", "db", "upgrade"]]
    assert command(upgrade)[3] == options(command(SERVER))["backend-store-uri"]


def test_the_store_is_not_offered_to_clients() -> None:
    section = configparser.ConfigParser()
    section.read_string(GENERATED["mlflow-plugin"]["entry_points.txt"])
    ((group, entries),) = ((name, section[name]) for name in section.sections())
    assert f'"{group}"' in (LIBRARY / "store" / "artifact" / "artifact_repository_registry.py").read_text()
    module, _, name = entries["s3"].partition(":")
    (plugin,) = [volume["configMap"] for volume in PODS["mlflow"]["volumes"] if volume["name"] == "plugin"]
    laid_out = {item["key"]: item["path"] for item in plugin["items"]}
    assert laid_out[f"{module}.py"] == f"{module}.py" and laid_out["entry_points.txt"].split("/")[0].endswith(".dist-info")
    assert {mount["name"]: mount["mountPath"] for mount in SERVER["volumeMounts"]}["plugin"] == environment(SERVER)["PYTHONPATH"]

    store = in_source(FOLDER / f"{module}.py", name)
    original = in_source(LIBRARY / "store" / "artifact" / "s3_artifact_repo.py", "S3ArtifactRepository")
    whole = in_source(LIBRARY / "store" / "artifact" / "artifact_repo.py", "ArtifactRepository")
    offers = {"MultipartUploadMixin", "MultipartDownloadMixin", "PresignedUploadMixin"}
    assert bases(store) == {"ArtifactRepository"} and bases(original) == {"ArtifactRepository", *offers}, "MLflow offers these and no more"
    abstract = {name for name, method in methods(whole).items() if any("abstract" in ast.unparse(d) for d in method.decorator_list)}
    assert abstract <= methods(store).keys()
    for name, method in methods(store).items():
        if name == "__init__":
            continue
        theirs = methods(original).get(name) or methods(whole)[name]
        assert [a.arg for a in method.args.args] == [a.arg for a in theirs.args.args]


def in_source(path: Path, name: str) -> ast.ClassDef:
    """A class as it is written: importing MLflow takes seconds, and its S3 store is used with boto3, which is not here."""
    return next(node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef) and node.name == name)


def bases(node: ast.ClassDef) -> set[str]:
    return {ast.unparse(base) for base in node.bases}


def methods(node: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    return {each.name: each for each in node.body if isinstance(each, ast.FunctionDef)}


def test_the_laptop_s_server_listens_to_the_laptop() -> None:
    assert compose()["ports"] == ["${MLFLOW_ADDRESS:-127.0.0.1}:5000:5000"]
    given = options(compose()["command"])
    assert given["workers"] == "1" and given["backend-store-uri"].startswith("sqlite:////mlflow/")
    assert given["allowed-hosts"] == "${MLFLOW_ALLOWED_HOSTS:-localhost:5000,127.0.0.1:5000}"


# --- as pipelines use them ---------------------------------------------------------------------


def test_what_the_readme_puts_into_cluster_yaml_is_what_login_makes() -> None:
    (block,) = [text for text in re.findall(r"^```yaml\n(.*?)^```$", README, re.MULTILINE | re.DOTALL) if "secrets" in text]
    values = yaml.safe_load(block)
    plain = config.plain(ClusterConfig())
    for section, fields in values.items():
        plain[section] |= fields
    cluster = config.build(ClusterConfig, plain)
    login = yaml.safe_load((FOLDER / "login.sh").read_text().partition("<<END\n")[2].partition("END\n")[0])
    assert cluster.pods.secrets == {
        login["metadata"]["name"]: dict(zip(login["stringData"], ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")))
    }
    address = urlparse(cluster.mlflow.uri)
    assert address.netloc in SETTINGS["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")


def test_scripts_are_shell() -> None:
    for script in FOLDER.glob("*.sh"):
        subprocess.run(["sh", "-n", script], check=True)
        assert str(script.relative_to(ROOT)) in README


def test_no_folder_of_ours_is_taken_for_the_library() -> None:
    assert not list((ROOT / "mlflow").rglob("__init__.py"))
