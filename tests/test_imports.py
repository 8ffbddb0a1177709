"""DESIGN's section 4, who may import whom, as a test on the source."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from imports import MODULES, ROOT, imported, libraries, ours, reached

from vapi.config import STAGES

STAGE_MODULES = {f"vapi.{stage}" for stage in STAGES}
# weights named by a hub id, DINOv2, T5s, Janus (what is missing is said); comes with torch; asked by a cluster's steps alone
OPTIONAL = {"huggingface_hub", "transformers", "tokenizers", "bs4", "ftfy", "triton", "kubernetes", "urllib3"}
ENTRY_POINTS = {"vapi.cli", "vapi.__main__"}


def under(package: str) -> list[str]:
    return [name for name in MODULES if name == package or name.startswith(f"{package}.")]


def test_the_configuration_needs_yaml_and_nothing_else() -> None:
    assert not ours("vapi.config") and libraries("vapi.config") - sys.stdlib_module_names == {"yaml"}
    assert ours("vapi.recipes") <= {"vapi", "vapi.config"}


def test_the_mathematics_needs_torch_and_nothing_else() -> None:
    assert not ours("vapi.grpo") and libraries("vapi.grpo") - sys.stdlib_module_names == {"torch"}


@pytest.mark.parametrize("stage", sorted(STAGE_MODULES))
def test_stages_meet_on_disk(stage: str) -> None:
    """And none knows where its numbers go."""
    assert not reached(stage, without=set()) & (STAGE_MODULES | ENTRY_POINTS | {"vapi.track"}) - {stage}
    assert ours(stage) == ours(stage, deferred=False), "what a stage needs stands at its top, where DVC's dependencies are read off"


@pytest.mark.parametrize("module", sorted(MODULES.keys() - STAGE_MODULES - ENTRY_POINTS))
def test_nothing_below_a_stage_imports_one(module: str) -> None:
    assert not ours(module) & (STAGE_MODULES | ENTRY_POINTS)


def test_a_source_is_read_by_one_process() -> None:
    """Eight ranks that listed a data set on a hub would be eight times as many requests; they read what the subset holds."""
    assert not STAGES["subset"].parallel
    for stage in ("tokens", "tune"):
        assert not reached(f"vapi.{stage}", without=set()) & {"vapi.sources", "vapi.hub"}


def test_models_and_metrics_do_not_know_each_other() -> None:
    assert not [name for module in under("vapi.models") for name in ours(module) if name.startswith("vapi.metrics")]
    assert not [name for module in under("vapi.metrics") for name in ours(module) if name.startswith("vapi.models")]


@pytest.mark.parametrize(
    ("library", "owner"),
    [("mlflow", "vapi.track.sender"), ("kubernetes", "vapi.cluster.api"), ("kfp", ""), ("great_expectations", "vapi.quality")],
)
def test_a_service_has_one_importer(library: str, owner: str) -> None:
    assert {module for module in MODULES if library in libraries(module)} <= {owner}


def test_the_cluster_can_be_deleted() -> None:
    """What only a cluster needs is known to nobody else."""
    assert not [
        module for module in set(MODULES) - set(under("vapi.cluster")) if any(name in under("vapi.cluster") for name in ours(module))
    ]


def test_mlflow_is_imported_only_when_it_is_used() -> None:
    assert "mlflow" not in libraries("vapi.track.sender", deferred=False, hints=False)


def test_the_command_line_imports_a_stage_only_once_it_was_named() -> None:
    assert ours("vapi.cli", deferred=False) <= {"vapi", "vapi.config", "vapi.recipes", "vapi.signals"}
    assert libraries("vapi.cli", deferred=False) <= sys.stdlib_module_names


def test_the_library_mlflow_is_not_shadowed_by_our_folder() -> None:
    assert not (ROOT / "mlflow" / "__init__.py").exists() and not (ROOT / "mlflow" / "mlflow.py").exists()
    where = subprocess.run(
        [sys.executable, "-c", "from importlib.util import find_spec; print(find_spec('mlflow').origin)"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    ).stdout
    assert "site-packages" in where


def test_every_library_is_declared() -> None:
    """What the package imports is in pyproject's core dependencies, and the other way round."""
    distributions = importlib.metadata.packages_distributions()
    used = {library for module in MODULES for library in libraries(module)} - sys.stdlib_module_names - OPTIONAL
    needed = {_canonical(name) for library in used for name in distributions[library]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {_canonical(requirement) for requirement in project["dependencies"]}
    assert needed - {"mlflow-skinny", "mlflow-tracing"} == declared - {"lpips"}, "of this one the weights are used"


def _canonical(requirement: str) -> str:
    name = "".join(c if c.isalnum() or c in "-_." else " " for c in requirement).split()[0]
    return name.lower().replace("_", "-")


def test_the_wheel_holds_vapi_alone(tmp_path: Path) -> None:
    """A top-level mlflow/ in a wheel would be installed on top of the library of that name."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ["pyproject.toml", "README.md", "LICENSE", "NOTICE"]:
        (source / name).write_bytes((ROOT / name).read_bytes())
    for module in MODULES.values():
        copy = source / module.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(module.read_bytes())
    for folder in ["mlflow", "tests", "benchmarks", "data"]:
        (source / folder).mkdir()
        (source / folder / "generator.py").write_text("")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(tmp_path),
        str(source),
    ]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("vapi_align-*.whl")
    members = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in members if ".dist-info/" not in name} == {"vapi"}
    assert {str(path.relative_to(ROOT)) for path in MODULES.values()} <= set(members)
    assert any(name.endswith("licenses/NOTICE") for name in members)


def test_the_reader_of_imports_sees_what_it_must() -> None:
    assert (
        "vapi.cli" in imported("vapi.__main__")
        and "vapi.track" in ours("vapi.cli")
        and "vapi.track" not in ours("vapi.cli", deferred=False)
    )
