"""The command line: what it understands, what it refuses and how it says so."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from vapi import cli, config, recipes
from vapi.config import STAGES


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the default params.yaml, as current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VAPI_DEBUG", raising=False)
    recipes.write("digits")
    return tmp_path


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``vapi <words>``."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(words))
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_words_become_flags() -> None:
    words = ["a", "--tune.lr", "2e-6", "--evaluate.seeds", "0", "-1", "--out=x=y", "--strict", "--min-size", "3"]
    flags = {"tune.lr": ["2e-6"], "evaluate.seeds": ["0", "-1"], "out": ["x=y"], "strict": [], "min_size": ["3"]}
    assert cli.parse(words) == (["a"], flags)


@pytest.mark.parametrize(
    ("stage", "words", "name", "value"),
    [
        ("tune", ["--tune.lr", "2e-6"], "tune.lr", 2e-6),
        ("tune", ["--lr=2e-6"], "tune.lr", 2e-6),
        ("tune", ["--tune.images-per-step", "32"], "tune.images_per_step", 32),
        ("tune", ["--tune.rewards.mse", "0.5"], "tune.rewards.mse", 0.5),
        ("tune", ["--tune.rewards.l1", "0.5"], "tune.rewards.l1", 0.5),
        ("tune", ["--tune.rewards", "{l1: 1, mse: 2}"], "tune.rewards.l1", 1.0),
        ("tune", ["--model.device", "cpu"], "model.device", "cpu"),
        ("tune", ["--track.uri", "off"], "track.uri", "off"),
        ("tune", ["--track.uri="], "track.uri", ""),
        ("tune", ["--tune.seed", "3"], "tune.seed", 3),
        ("evaluate", ["--evaluate.seeds", "0", "1", "2"], "evaluate.seeds", [0, 1, 2]),
        ("evaluate", ["--evaluate.seeds", "[0, 1]"], "evaluate.seeds", [0, 1]),
        ("evaluate", ["--temperatures", "0.9"], "evaluate.temperatures", [0.9]),
        ("register", ["--strict"], "register.strict", True),
        ("register", ["--register.strict", "false"], "register.strict", False),
        ("register", ["--model-name", "007"], "register.model_name", "007"),
    ],
)
def test_a_flag_wins_over_the_file(stage: str, words: list[str], name: str, value: object) -> None:
    settings, _ = cli.configure(stage, cli.parse(words)[1])
    assert config.flat(settings)[name] == value
    others = recipes.changes(recipes.recipe("digits"), settings).keys() - {name}
    assert all(other.startswith("tune.rewards") for other in others)


def test_folders_can_be_elsewhere() -> None:
    _, folders = cli.configure("tune", cli.parse(["--subset", "a", "--out", "b"])[1])
    assert folders == {"subset": Path("a"), "tokens": Path("artifacts/tokens"), "out": Path("b")}


def test_another_params_file(project: Path) -> None:
    other = project / "other.yaml"
    other.write_text(recipes.text("digits").replace("steps: 100", "steps: 7"))
    settings, _ = cli.configure("tune", {"params": [str(other)]})
    assert settings.tune.steps == 7


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["tun"], "no command 'tun'; did you mean 'tune'?"),
        (["tune", "--tune.stepz", "3"], "no flag --tune.stepz here; did you mean '--tune.steps'?"),
        (["tune", "--stepz", "3"], "no flag --stepz here; did you mean '--tune.steps'?"),
        (["tune", "--tume.lr", "3"], "no flag --tume.lr here; did you mean '--tune.lr'?"),
        (["tune", "--evaluate.samples", "3"], "no flag --evaluate.samples here"),
        (["tune", "--tune", "a"], "no flag --tune here"),
        (["tune", "--tune.lr"], "--tune.lr takes one value; none was given"),
        (["tune", "--tune.lr", "1", "2"], "--tune.lr takes one value, not 2: 1 2"),
        (["tune", "--tune.lr", "quick"], "tune.lr is 'quick'; it must be a float"),
        (["tune", "--tune.lr.x", "1"], "--tune.lr holds one value"),
        (["tune", "--tune.rewards", "mse"], "tune.rewards is 'mse'; it must be a mapping"),
        (["tune", "--tune.steps", "8.5"], "tune.steps is '8.5'; it must be an int"),
        (["tune", "--tune.group_size", "1"], "at least 2 draws"),
        (["tune", "--tune.prior", "cee"], "it must be one of 'ce', 'kl'"),
        (["tune", "lr", "3"], "does not understand 'lr'; values follow a flag"),
        (["recipe", "digts"], "no recipe is called 'digts'; did you mean 'digits'?"),
        (["recipe", "--write"], "which recipe?"),
        (["recipe", "digits", "--wirte"], "no flag --wirte; did you mean 'write'?"),
        (["recipe", "digits", "--write", "yes"], "--write takes no value"),
        (["track"], "vapi track --resend"),
        (["summary", "--all"], "has no flag --all; it takes none"),
    ],
)
def test_a_mistake_is_one_line_and_no_traceback(capsys: pytest.CaptureFixture[str], words: list[str], complaint: str) -> None:
    code, out, err = call(capsys, *words)
    assert code == 2 and not out
    assert err.startswith("error: ") and complaint in err and err.count("\n") == 1


def test_debug_shows_where_an_error_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAPI_DEBUG", "1")
    with pytest.raises(ValueError, match="no command"):
        cli.main(["tun"])


def test_a_stale_file_stops_a_stage_before_anything_is_loaded(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "params.yaml").write_text(recipes.text("digits").replace("  lr:", "  learning_rate:"))
    code, _, err = call(capsys, "tune")
    assert code == 2 and "params.yaml: tune has no field 'learning_rate'" in err


def test_outside_a_project_the_message_says_how_to_make_one(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "params.yaml").unlink()
    code, _, err = call(capsys, "tune")
    assert code == 2 and "vapi recipe digits --write" in err
    assert call(capsys, "tune", "--help")[0] == 0, "help needs no project"


@pytest.mark.parametrize("stage", STAGES)
def test_help_shows_each_field_with_its_doc_and_present_value(stage: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "params.yaml").write_text(recipes.text("digits").replace("experiment: vapi", "experiment: mine"))
    code, out, _ = call(capsys, stage, "--help")
    assert code == 0 and "--track.experiment mine" in out and f"--out artifacts/{stage}" in out
    unwrapped = " ".join(out.split())
    settings = config.load()
    for section in STAGES[stage].sections:
        values = getattr(settings, section)
        for name, doc in config.field_docs(type(values)).items():
            assert f"--{section}.{name} {config.scalar(getattr(values, name))}" in out
            assert " ".join(doc.split()) in unwrapped


def test_help_is_instant_and_loads_nothing_heavy() -> None:
    """Half a second is the promise; of processor time, since other work may share the machine."""
    loaded = "{'torch', 'mlflow', 'numpy'} & sys.modules.keys()"
    program = (
        f"import atexit, sys, vapi.cli as cli; atexit.register(lambda: print({loaded}, file=sys.stderr)); cli.main(['tune', '--help'])"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ran.stderr.strip() == "set()"
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "--help")
    assert code == 0 and all(f"\n  {name}" in out for name in [*STAGES, *cli.COMMANDS])
    for name in cli.COMMANDS:
        assert call(capsys, name, "--help")[0] == 0


# --- recipes -----------------------------------------------------------------------------------


def test_recipes_are_listed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = call(capsys, "recipe")
    assert all(name in out and row.doc in out and row.expect in out for name, row in recipes.RECIPES.items())
    _, out, _ = call(capsys, "recipe", "digits-prior-alone")
    assert config.build(config.Config, config.read_yaml(out)).tune.policy_weight == 0


def test_a_recipe_replaces_a_recipe_but_not_edits(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = project / "params.yaml"
    assert call(capsys, "recipe", "digits-reward-alone", "--write")[0] == 0
    assert config.load().tune.prior_weight == 0
    edited = params.read_text() + "# a note of mine\n"
    params.write_text(edited)
    code, _, err = call(capsys, "recipe", "digits", "--write")
    assert code == 2 and "edits that would be lost" in err and params.read_text() == edited
    assert call(capsys, "recipe", "digits", "--write", "--force")[0] == 0
    assert params.read_text() == recipes.text("digits")


def test_a_recipe_diff_shows_what_the_file_changes(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "params.yaml is the recipe digits" in call(capsys, "recipe", "diff")[1]
    text = recipes.text("digits-prior-alone").replace("steps: 100", "steps: 7").replace("mse: 1.0", "l1: 1.0")
    (project / "params.yaml").write_text(text)
    out = call(capsys, "recipe", "diff")[1]
    assert "differs from the recipe digits-prior-alone" in out and "tune.steps: 100 -> 7" in out
    assert "tune.rewards.mse: 1.0 -> absent" in out and "tune.rewards.l1: absent -> 1.0" in out and "policy_weight" not in out
    assert "tune.policy_weight: 1.0 -> 0.0" in call(capsys, "recipe", "diff", "digits")[1]


def test_a_file_of_another_version_can_be_compared_and_help_still_helps(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = recipes.text("digits").replace("  group_size: 8\n", "  draws: 8\n")
    (project / "params.yaml").write_text(text)
    code, _, err = call(capsys, "tune")
    assert code == 2 and "tune has no field 'draws'" in err
    out = call(capsys, "recipe", "diff")[1]
    assert "tune.group_size: 8 -> absent" in out and "tune.draws: absent -> 8" in out
    code, out, _ = call(capsys, "tune", "--help")
    assert code == 0 and "tune has no field 'draws'" in out and "--tune.group_size 8" in out


# --- as a process ------------------------------------------------------------------------------


def test_a_closed_pipe_is_no_error() -> None:
    ran = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} -m vapi tune --help | true"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert ran.returncode == 0 and not ran.stderr


def test_the_console_command_is_installed() -> None:
    ran = subprocess.run([Path(sys.executable).parent / "vapi", "--version"], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == __import__("vapi").__version__
