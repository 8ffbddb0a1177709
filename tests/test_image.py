"""The container image, as far as its recipe tells without an engine that builds it; docs/image.md says how it was built."""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from imports import ROOT

import vapi

DRIVER = "/opt/triton-driver"


@dataclass(frozen=True)
class Step:
    """One instruction of the Dockerfile."""

    word: str
    rest: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.rest)

    @property
    def sources(self) -> list[str]:
        """What a COPY copies out of the clone."""
        assert self.word == "COPY"
        return [] if self.rest.startswith("--from=") else [word for word in self.words if not word.startswith("--")][:-1]


def stages(text: str) -> list[list[Step]]:
    """The instructions stage by stage, each beginning with its FROM; what precedes the first is a stage too."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    found: list[list[Step]] = [[]]
    for whole in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        word, _, rest = whole.partition(" ")
        if word == "FROM":
            found.append([])
        found[-1].append(Step(word, rest.strip()))
    return found


DOCKERFILE = (ROOT / "Dockerfile").read_text()
GLOBAL, BUILD, FINAL = stages(DOCKERFILE)
COPIED = [source for step in BUILD if step.word == "COPY" for source in step.sources]


def values(steps: list[Step], word: str) -> dict[str, str]:
    """NAME=value of all ENV, LABEL or ARG."""
    return dict(pair.partition("=")[::2] for step in steps if step.word == word for pair in step.words)


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path of the clone out: the last line that matches it, or a folder of it, decides."""
    out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!")
            folders = [*Path(path).parents, Path(path)]
            anywhere = pattern.startswith("**/") and any(fnmatch.fnmatch(folder.name, pattern[3:]) for folder in folders)
            if anywhere or any(fnmatch.fnmatch(str(folder), pattern) for folder in folders if str(folder) != "."):
                out = not line.startswith("!")
    return out


def pins() -> dict[str, str]:
    lines = (line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#"))
    return {_name(line): line.partition("==")[2] for line in lines}


def _name(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement)[0].lower().replace("_", "-")


# --- the last stage, which is what people get --------------------------------------------------


def test_the_last_stage_installs_nothing() -> None:
    """So nothing that builds is in it: no compiler, no package manager's leftovers; what pip needed stayed behind."""
    assert FINAL[0] == Step("FROM", "${BASE}") and BUILD[0] == Step("FROM", "${BASE} AS build") and values(GLOBAL, "ARG")["BASE"]
    assert {step.word for step in FINAL} == {"FROM", "COPY", "ARG", "LABEL", "ENV", "WORKDIR", "USER", "CMD"}
    copies = [step.words for step in FINAL if step.word == "COPY"]
    assert all(words[0] == "--from=build" and words[1].startswith("/opt/") for words in copies)
    assert all(words[2].startswith("/opt/") or words[2] == "/etc/gitconfig" for words in copies)


def test_nothing_comes_from_the_network_but_through_a_package_manager() -> None:
    assert not {step.word for step in BUILD + FINAL} & {"ADD", "HEALTHCHECK", "ENTRYPOINT", "VOLUME", "EXPOSE"}
    assert "://" not in DOCKERFILE and not re.search(r"\b(curl|wget|git clone)\b", DOCKERFILE)


def test_it_runs_as_somebody_who_may_do_nothing() -> None:
    (user,) = [step.rest for step in FINAL if step.word == "USER"]
    assert re.fullmatch(r"[1-9]\d*:0", user), "by number: Kubernetes cannot tell whether a name is root's"
    assert FINAL[-1] == Step("CMD", '["vapi", "--help"]')


def test_no_secret_has_a_place() -> None:
    named = {*values(BUILD + FINAL, "ENV"), *values(GLOBAL + BUILD + FINAL, "ARG")}
    assert not [name for name in named if re.search(r"PASS|TOKEN|SECRET|CREDENTIAL|_KEY|LOGIN", name)]
    assert set(values(FINAL, "ARG")) == {"VERSION", "COMMIT", "SOURCE"}, "what is given to the last stage stays readable in its history"


def test_labels() -> None:
    labels, arguments = values(FINAL, "LABEL"), values(FINAL, "ARG")
    named = {name.removeprefix("org.opencontainers.image."): value for name, value in labels.items()}
    assert named["source"] == "${SOURCE}" and named["revision"] == "${COMMIT}" and named["version"] == "${VERSION}"
    assert arguments["VERSION"] == vapi.__version__
    assert named["licenses"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]


def test_whatever_is_written_goes_below_tmp() -> None:
    env = values(FINAL, "ENV")
    caches = {name: value for name, value in env.items() if re.search(r"CACHE|HOME|CONFIGDIR|TMP", name)}
    assert all(re.fullmatch(r"/tmp(/[\w.]+)*", value) for value in caches.values()), caches
    named = (
        "HOME",
        "XDG_CACHE_HOME",
        "MPLCONFIGDIR",
        "TORCHINDUCTOR_CACHE_DIR",
        "TRITON_CACHE_DIR",
        "DVC_SITE_CACHE_DIR",
        "CUDA_CACHE_PATH",
    )
    assert caches.keys() >= set(named)
    assert not env.keys() & {"HF_HOME", "TORCH_HOME", "VAPI_STATE"}, "a step sets them, unless somebody has"
    assert env["USER"] and env["PYTHONDONTWRITEBYTECODE"] and env["VAPI_COMMIT"] == "${COMMIT}"


# --- versions ----------------------------------------------------------------------------------


def test_every_version_is_the_constraints() -> None:
    assert values(BUILD, "ENV")["PIP_CONSTRAINT"].endswith("/constraints.txt") and "constraints.txt" in COPIED
    installs = [
        install for step in BUILD if step.word == "RUN" for install in re.findall(r"\binstall (--no-compile|--no-deps) ([^&]*)", step.rest)
    ]
    assert len(installs) == 4
    assert not any(re.search(r"[=<>~]=", rest) for _, rest in installs), "a version here would be a second truth"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {_name(line) for line in [*project["dependencies"], *project["optional-dependencies"]["image"], "kfp", "torch", "torchvision"]}
    assert not wanted - pins().keys()


def test_constraints_are_in_order() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines == sorted(lines, key=str.lower) and len(pins()) == len(lines)


# --- what it is built from ---------------------------------------------------------------------


def test_the_build_sees_what_it_copies_and_no_more() -> None:
    for source in COPIED:
        assert (ROOT / source).exists() and not ignored(source), source
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert set(allowed) == set(COPIED), "what is let through is copied"
    assert not ignored("vapi/models/gpt.py") and not ignored(".dvc/bundled/files/md5/83/22")
    for private in (".git/config", ".env", ".venv/bin/python", ".dvc/config.local", ".dvc/cache/x", "artifacts/tune/model.safetensors"):
        assert ignored(private), private
    for needless in (
        "vapi/__pycache__/cli.pyc",
        "vapi/models/__pycache__/gpt.pyc",
        "mlflow/compose.yaml",
        "mlflow.db",
        "data/mine.parquet",
    ):
        assert ignored(needless), needless


def test_the_embedded_data_are_restored_from_the_clone() -> None:
    restore = " ".join(step.rest for step in BUILD if step.word == "RUN" and "dvc pull" in step.rest)
    assert "--remote bundled data.dvc" in restore and {".dvc/bundled", ".dvc/config", "data.dvc"} <= set(COPIED)


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What lies in the image under /opt/vapi, less the data."""
    root = tmp_path_factory.mktemp("opt") / "vapi"
    for step in BUILD:
        if step.word == "COPY" and step.words[-1].startswith("/opt/vapi/"):
            target = root / Path(step.words[-1]).relative_to("/opt/vapi")
            for source in step.sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    target.mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / source, target)
    return root


def test_what_is_copied_is_all_that_the_package_looks_for(layout: Path) -> None:
    code = (
        "import mlflow, vapi; from vapi import config, data, register; from vapi.cluster import origin; "
        "config.load(); assert 'site-packages' in mlflow.__file__; "
        "print(vapi.__file__, origin.IMAGE, register.serving_code(), data.code_version()['commit'], data.project_root(), sep='\\n')"
    )
    environment = {**os.environ, "PYTHONPATH": str(layout), "PYTHONDONTWRITEBYTECODE": "1", "VAPI_COMMIT": "0123abc"}
    environment.pop("DVC_ROOT", None)
    ran = subprocess.run([sys.executable, "-c", code], cwd=layout, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = [layout / "vapi" / "__init__.py", layout, layout / "mlflow" / "generator.py", "0123abc", layout]
    assert ran.stdout.split() == [str(value) for value in found]


# --- in place of a compiler --------------------------------------------------------------------


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The image's CC, with its module beside it."""
    build = pytest.importorskip("triton.runtime.build", reason="comes with torch's builds for CUDA on Linux")
    shutil.copy(ROOT / "docker/cc", tmp_path)
    shutil.copy(Path(build.__file__).parents[1] / "backends/nvidia/driver.c", tmp_path)
    (tmp_path / "driver.so").write_bytes(b"as it was built")
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    build._find_compiler.cache_clear()  # it remembers the machine's own
    yield tmp_path / "cc"
    build._find_compiler.cache_clear()


def test_triton_gets_the_driver_that_was_built_with_the_image(compiler: Path, tmp_path: Path) -> None:
    from triton.backends.nvidia import driver
    from triton.runtime import build

    source = str(Path(driver.__file__).with_name("driver.c"))
    made = build._build("cuda_utils", source, str(tmp_path), ["/usr/lib"], driver.include_dirs, driver.libraries, [])
    assert Path(made).read_bytes() == b"as it was built"


def test_nothing_else_is_compiled(compiler: Path, tmp_path: Path) -> None:
    (tmp_path / "other.c").write_text("int other;")
    for source, there in (("other.c", True), ("driver.c", False)):
        if not there:
            (tmp_path / "driver.so").unlink()  # as in the CPU variant
        ran = subprocess.run([compiler, tmp_path / source, "-shared", "-o", tmp_path / "out.so"], capture_output=True, text=True)
        assert ran.returncode == 1 and "no C compiler" in ran.stderr and not (tmp_path / "out.so").exists()


def test_the_driver_lies_where_the_image_looks_for_it() -> None:
    assert values(FINAL, "ENV")["CC"] == f"{DRIVER}/cc" and os.access(ROOT / "docker/cc", os.X_OK)
    assert any(step.rest == f"docker/cc {DRIVER}/cc" for step in BUILD) and f"--from=build {DRIVER} {DRIVER}" in [
        step.rest for step in FINAL
    ]
