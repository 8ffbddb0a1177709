"""``vapi <stage> --section.field value``: the command line, derived from ``config.py``.

A flag is the dotted name of a field in ``params.yaml``, and its value travels the same road as the
file's: laid over the file's plain values, then built and checked by ``config.build``. So nothing that
``config.py`` declares is declared here again, a misspelt flag and a misspelt line of the file get the
same answer, and help shows what would really run. A field of the stage's own section may drop the
section: ``vapi tune --lr 2e-6``.

A stage is imported only after it was named and its configuration is sound; help never loads torch.

Left out on purpose: a parser library. Flags here are data (one per field, known only to
``config.py``), and forty lines read them.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shlex
import shutil
import sys
import tempfile
import textwrap
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vapi
from vapi import config, recipes, signals
from vapi.config import ARTIFACTS, BENCHES, PARAMS, STAGES, BenchConfig, Config, Measured

Flags = dict[str, list[str]]
MISTAKE = signals.MISTAKE


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Exit code 0: done; 1: --strict and not promoted; 2: a mistake that the message names;
    what a stage exits with (75: stopped by SIGTERM, run again to continue) passes through."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        code = _dispatch(words)
        sys.stdout.flush()
    except SystemExit as stop:  # stopped, with a checkpoint
        assert isinstance(stop.code, int), stop.code
        code = stop.code
    except BrokenPipeError:  # vapi recipe digits | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (ValueError, OSError) as error:
        if os.environ.get("VAPI_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        code = MISTAKE
        if note := os.environ.get("VAPI_MISTAKE"):  # whoever would start this again reads it there
            config.write_text(Path(note), str(MISTAKE))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    if "vapi.launch" in sys.modules:
        launch = sys.modules["vapi.launch"]
        launch.leave(0 if code == launch.INTERRUPTED else code)
    raise SystemExit(code)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        print(vapi.__version__)
        return 0
    name, rest = words[0], words[1:]
    if name in STAGES:
        return _stage(name, rest)
    if name not in COMMANDS:
        raise ValueError(f"vapi has no command {name!r}; {config.nearest(name, [*STAGES, *COMMANDS])}")
    return _command(name, COMMANDS[name], rest)


def _command(name: str, command: Command, rest: list[str]) -> int:
    if command.flags is None:
        return command.run(rest, {})
    if _wants_help(rest):
        return _help(name, command)
    positional, flags = parse(rest)
    for flag in flags.keys() - set(command.flags):
        raise ValueError(
            f"vapi {name} has no flag --{flag}; " + (config.nearest(flag, command.flags) if command.flags else "it takes none")
        )
    return command.run(positional, flags)


# --- words -> values ---------------------------------------------------------------------------


def parse(words: list[str]) -> tuple[list[str], Flags]:
    """``["a", "--b.c", "1", "2", "--d=3"]`` -> ``(["a"], {"b.c": ["1", "2"], "d": ["3"]})``."""
    positional: list[str] = []
    flags: Flags = {}
    current = positional
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            current = flags[name.replace("-", "_")] = [value] if equals else []
        else:
            current.append(word)
    return positional, flags


def override(values: dict[str, Any], name: str, words: list[str], sections: tuple[str, ...], kind: type = Config) -> None:
    """Lay one flag over plain values of ``kind``, in place. Raises ValueError that names the nearest flag."""
    section, *path = name.split(".")
    hints = typing.get_type_hints(kind)
    fields = typing.get_type_hints(hints[section]) if section in sections else {}
    if not path or path[0] not in fields:
        known = [f"--{s}.{f}" for s in sections for f in typing.get_type_hints(hints[s])]
        raise ValueError(f"no flag --{name} here; {_nearest_flag(name, known)}")
    knob, *keys = path
    declared = fields[knob]
    if typing.get_origin(declared) is dict and len(keys) == 1:
        values[section][knob] = {**values[section][knob], keys[0]: _one(name, words)}
    elif keys:
        raise ValueError(f"--{section}.{knob} holds one value; there is no {'.'.join(keys)!r} in it")
    elif declared is bool and not words:
        values[section][knob] = True
    elif typing.get_origin(declared) is dict or (typing.get_origin(declared) is list and words and words[0].startswith("[")):
        values[section][knob] = config.read_yaml(_one(name, words))
    elif typing.get_origin(declared) is list:
        values[section][knob] = words
    else:
        values[section][knob] = _one(name, words)


def _nearest_flag(name: str, known: list[str]) -> str:
    """The nearest flag, by its whole name or by the field alone, so that --tune.learning names a flag of tune."""
    field = name.rpartition(".")[2]
    same = [flag for flag in known if flag.rpartition(".")[2] == field]
    return f"did you mean {same[0]!r}?" if same else config.nearest(f"--{name}", known)


def _one(name: str, words: list[str]) -> str:
    if len(words) != 1:
        raise ValueError(f"--{name} takes one value" + (f", not {len(words)}: {' '.join(words)}" if words else "; none was given"))
    return words[0]


# --- stages ------------------------------------------------------------------------------------


def configure(stage: str, flags: Flags) -> tuple[Config, dict[str, Path]]:
    """What a stage runs with: ``params.yaml`` under the flags, and its folders (inputs by name, and out)."""
    flags = dict(flags)
    spec = STAGES[stage]
    folders = {name: Path(_one(name, flags.pop(name))) if name in flags else default for name, default in _folders(stage).items()}
    params = Path(_one("params", flags.pop("params"))) if "params" in flags else PARAMS
    values = config.plain(config.load(params))
    for name, words in flags.items():
        own = name in values[stage]
        override(values, f"{stage}.{name}" if own else name, words, (*spec.sections, "track"))
    return config.build(Config, values), folders


def _folders(stage: str) -> dict[str, Path]:
    return {**{name: ARTIFACTS / name for name in STAGES[stage].inputs}, "out": ARTIFACTS / stage}


def _stage(stage: str, words: list[str]) -> int:
    if _wants_help(words):
        print(_stage_help(stage))
        return 0
    positional, flags = parse(words)
    if positional:
        raise ValueError(f"vapi {stage} does not understand {positional[0]!r}; values follow a flag, as in --{stage}.field value")
    settings, folders = configure(stage, flags)
    if STAGES[stage].parallel:
        from vapi import launch

        launch.end_with_starter()
        count = launch.processes(settings.model.device)
        if count > 1:
            return launch.start([sys.executable, "-m", "vapi", stage, *words], count)
    promoted = run_stage(stage, settings, folders)
    return 1 if stage == "register" and settings.register.strict and promoted is False else 0


def run_stage(stage: str, settings: Config, folders: dict[str, Path]) -> Any:
    """Import a stage, start tracking, run it; what the stage function returns. Among several processes (torchrun) only
    the first reports, and only the first runs a stage that is not made for several."""
    first = os.environ.get("RANK", "0") == "0"
    if not (first or STAGES[stage].parallel):
        return None
    function = getattr(importlib.import_module(f"vapi.{stage}"), stage)
    sections = {name: getattr(settings, name) for name in STAGES[stage].sections}
    if not first:
        return function(**sections, **folders)
    from vapi import track
    from vapi.run import NO_RUN

    with track.start(stage, settings, folders) as run:
        made = function(**sections, **folders, run=run)
        if run is not NO_RUN:
            _keep(stage, folders, run)
    return made


def _keep(stage: str, folders: dict[str, Path], run: Any) -> None:
    """Hand MLflow what ``vapi report`` reads of a stage, and after the evaluation the page itself."""
    from vapi import compare, compare_page, track

    for path in compare.kept(stage, folders["out"]):
        run.artifact(path, track.RECORD)
    if stage == "evaluate":
        with tempfile.TemporaryDirectory() as folder:
            page = Path(folder) / "report.html"
            page.write_text(compare_page.evaluated(folders["out"], folders["tune"]))
            run.artifact(page)


# --- vapi bench ----------------------------------------------------------------------------------


def measured(bench: str, flags: Flags) -> Measured:
    """What a benchmark runs with: a recipe (``--recipe``) or ``params.yaml`` under the flags. A field may drop its section."""
    flags = dict(flags)
    spec = BENCHES[bench]
    if "recipe" in flags:
        base = recipes.recipe(_one("recipe", flags.pop("recipe")))
    elif "params" in flags or PARAMS.exists():
        base = config.load(Path(_one("params", flags.pop("params"))) if "params" in flags else PARAMS)
    else:
        base = Config()
    shared = {name: values for name, values in config.plain(base).items() if name in typing.get_type_hints(Measured)}
    values = {**shared, "bench": config.plain(BenchConfig())}
    for name, words in flags.items():
        owners = [section for section in reversed(spec.sections) if name in values[section]]
        override(values, f"{owners[0]}.{name}" if owners else name, words, spec.sections, Measured)
    return config.build(Measured, values)


def _bench(words: list[str], _: Flags) -> int:
    if _wants_help(words) or not words:
        named = [word for word in words if word in BENCHES]
        print(_bench_help(named[0]) if named else _benches_help())
        return 0
    positional, flags = parse(words)
    if len(positional) != 1 or positional[0] not in BENCHES:
        wrong = " ".join(positional)
        raise ValueError(f"vapi bench takes one of {', '.join(BENCHES)}" + (f", not {wrong!r}" if wrong else ""))
    settings = measured(positional[0], flags)
    from vapi import bench

    bench.run(positional[0], settings, shlex.join(["vapi", "bench", *words]))
    return 0


def _benches_help() -> str:
    lines = ["usage: vapi bench NAME [--section.field value ...]", "", _wrap(COMMANDS["bench"].doc), ""]
    lines += [f"  {name:<8} {spec.doc}" for name, spec in BENCHES.items()]
    return "\n".join([*lines, "", "vapi bench NAME --help shows the fields."])


def _bench_help(name: str) -> str:
    spec = BENCHES[name]
    lines = [f"usage: vapi bench {name} [--recipe NAME | --params FILE] [--section.field value ...]", "", spec.doc, ""]
    lines += [f"values now (from {PARAMS} if it is here); a field may drop its section where one section has it:"]
    settings = measured(name, {})
    return "\n".join(lines + _fields(settings, spec.sections))


# --- vapi geneval --------------------------------------------------------------------------------


def _geneval(words: list[str], _: Flags) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_geneval_help())
        return 0
    if words[0] not in GENEVAL:
        raise ValueError(f"vapi geneval has no {words[0]!r}; {config.nearest(words[0], GENEVAL)}")
    return _command(f"geneval {words[0]}", GENEVAL[words[0]], words[1:])


def _geneval_help() -> str:
    lines = ["usage: vapi geneval COMMAND ...", "", _wrap(COMMANDS["geneval"].doc), ""]
    lines += [f"  {name:<17} {command.doc.split('; ')[0].removesuffix('.')}." for name, command in GENEVAL.items()]
    return "\n".join([*lines, "", "vapi geneval COMMAND --help shows more. docs/geneval.md explains it all."])


def _geneval_score(words: list[str], flags: Flags) -> int:
    if len(words) != 1:
        raise ValueError("vapi geneval score takes one folder: vapi geneval score IMAGES --detector FOLDER --clip FOLDER")
    given = {name: _one(name, value) for name, value in flags.items()}
    if "detections" in given and ("detector" in given or "clip" in given):
        raise ValueError("--detections stands in place of --detector and --clip; give one or the other")
    if "detections" not in given and "detector" not in given:
        raise ValueError("who looks at the pictures? --detector FOLDER (Mask2Former's weights) or digits, or --detections FILE")
    count = config.convert(given.get("images_per_prompt", 0), int, "--images-per-prompt")
    config.require(count >= 0, f"--images-per-prompt is {count}; give a number of images, or 0 for GenEval's")
    from vapi import geneval, models
    from vapi.metrics.geneval import table

    out, prompts = (Path(given[name]) if name in given else None for name in ("out", "prompts"))
    detector: Any
    if "detections" in given:
        detector = geneval.recorded_detections(Path(given["detections"]))
    else:
        device = models.device_of(config.ModelConfig(device=given.get("device", "auto")))
        detector = geneval.detector_of(given["detector"], given.get("clip", ""), device)
    print(table(geneval.score_folder(Path(words[0]), detector, out, prompts, count)))
    return 0


def _geneval_generate(words: list[str], _: Flags) -> int:
    if _wants_help(words):
        return _help("geneval generate", GENEVAL["generate"])
    positional, given = parse(words)
    if len(positional) != 1:
        raise ValueError("vapi geneval generate takes one new folder: vapi geneval generate OUT --prompts data/geneval/prompts.jsonl")
    settings = configure("evaluate", given)[0]
    from vapi import geneval

    geneval.generate(settings.model, settings.evaluate, Path(positional[0]))
    return 0


def _geneval_convert(words: list[str], _: Flags) -> int:
    if len(words) != 2:
        raise ValueError("vapi geneval convert-detector takes a file and a folder: vapi geneval convert-detector mask2former.pth TARGET")
    from vapi import geneval

    geneval.convert_detector(Path(words[0]), Path(words[1]))
    print(f"{words[1]} holds the detector of {words[0]}: vapi geneval score IMAGES --detector {words[1]} --clip FOLDER")
    return 0


def _geneval_convert_clip(words: list[str], flags: Flags) -> int:
    if len(words) != 2 or "words" not in flags:
        usage = "vapi geneval convert-clip HPS_v2_compressed.pt TARGET --words data/geneval/clip-vit-large-patch14"
        raise ValueError(f"vapi geneval convert-clip takes a file, a folder, and the folder of a CLIP whose vocabulary it shares: {usage}")
    from vapi import geneval

    geneval.convert_clip(Path(words[0]), Path(words[1]), Path(flags["words"][0]))
    print(f"{words[1]} holds the CLIP of {words[0]}: vapi evaluate --evaluate.hps {words[1]} --evaluate.text_metrics hpsv2")
    return 0


def _geneval_compare(words: list[str], flags: Flags) -> int:
    a, b = (words, flags["with"]) if "with" in flags else (words[:1], words[1:])
    if not a or not b or ("with" not in flags and len(words) != 2):
        raise ValueError("vapi geneval compare takes two results, A B, or several seeds of each: A0 A1 A2 --with B0 B1 B2")
    from vapi import geneval

    print(geneval.compare([Path(place) for place in a], [Path(place) for place in b]))
    return 0


# --- vapi experiment -----------------------------------------------------------------------------


def _experiment(words: list[str], _: Flags) -> int:
    if _wants_help(words) or not words:
        print(_experiments_help())
        return 0
    positional, flags = parse(words)
    if len(positional) != 1:
        raise ValueError(f"vapi experiment takes one name, not {' '.join(positional) or 'none'}; vapi experiment shows them")
    from vapi import grids

    (name,) = positional
    lists = _switch(flags, "list")
    out = Path(_one("out", flags.pop("out"))) if "out" in flags else None
    seeds = grids.seeds(",".join(flags.pop("seeds", ["0"])).split(","), "--seeds")
    base = _experiment_base(name, {flag: value for flag, value in flags.items() if flag != "list"})
    from vapi.experiment import Experiment

    made = Experiment(name, base, seeds, out)
    if lists:
        print(made.plan())
        return 0
    return made.run()


def _experiment_base(name: str, flags: Flags) -> Config:
    """What an experiment's points change: the grid's recipe, another one, or a file, under the flags."""
    from vapi import grids

    grid = grids.grid(name)
    if "params" in flags and "recipe" in flags:
        raise ValueError("--params FILE or --recipe NAME, not both")
    if "params" in flags:
        base = config.load(Path(_one("params", flags.pop("params"))))
    else:
        base = recipes.recipe(_one("recipe", flags.pop("recipe", [grid.recipe])))
    values = config.plain(grids.under(grid, base))
    for flag, words in flags.items():
        override(values, flag, words, tuple(section for section in values if section != "register"))
    grids.require_free(grid, list(flags))
    made: Config = config.build(Config, values)
    return made


def _experiments_help() -> str:
    from vapi import grids

    lines = [f"usage: vapi experiment {COMMANDS['experiment'].usage}", "", _wrap(COMMANDS["experiment"].doc), ""]
    for name, grid in grids.GRIDS.items():
        source = f"{grid.source[0].upper()}{grid.source[1:]}"
        lines += [f"  {name:<15} {grid.doc}", f"  {'':<15} {source}. Models to tune per seed: {grids.tunings(grid)} ({grid.recipe})."]
    return "\n".join(lines)


# --- the other commands ------------------------------------------------------------------------


def _recipe(words: list[str], flags: Flags) -> int:
    force, writes = _switch(flags, "force"), _switch(flags, "write")
    if words[:1] == ["diff"] and len(words) <= 2 and not (force or writes):
        return _recipe_diff(*words[1:])
    if len(words) > 1:
        raise ValueError(f"vapi recipe takes one name, not {' '.join(words)}")
    if not words:
        if writes or force:
            raise ValueError("which recipe? vapi recipe NAME --write")
        width = max(map(len, recipes.RECIPES))
        for name, row in recipes.RECIPES.items():
            print(f"{name:{width}}  {row.doc}\n{'':{width}}  Expect {row.expect}.")
    elif writes:
        recipes.write(words[0], force=force)
        print(f"{PARAMS} is now the recipe {words[0]}")
    else:
        print(recipes.text(words[0]), end="")
    return 0


def _recipe_diff(name: str = "") -> int:
    ours = config.load_values()  # unchecked, so that a file from another version can be compared too
    name = name or recipes.closest(ours)
    changes = recipes.changes(recipes.recipe(name), ours)
    print(f"{PARAMS} {'differs from' if changes else 'is'} the recipe {name}")
    for field, (theirs, own) in changes.items():
        print(f"  {field}: {'absent' if theirs is None else theirs} -> {'absent' if own is None else own}")
    return 0


def _listing(words: list[str], flags: Flags) -> int:
    settings, _ = configure("subset", flags)
    from vapi import listing

    listing.write_listing(settings.subset, ARTIFACTS / "listing.json")
    return 0


def _export(words: list[str], flags: Flags) -> int:
    if len(words) != 2:
        raise ValueError("vapi export takes two paths: vapi export artifacts/tune tuned.pt")
    from vapi.models import janus_files, llamagen

    folder, target = Path(words[0]), words[1]
    source = next((path for path in map(folder.joinpath, config.TUNED.values()) if path.is_file()), folder)
    if janus_files.is_tuned(source):
        return _export_janus(words[0], target, flags)
    if flags:
        raise ValueError(f"--{next(iter(flags))} is for Janus, and {words[0]} holds none; LlamaGen's scripts read one layout")
    made = folder / "config.json"
    if made.is_file() and config.read_yaml(made.read_text())["sections"]["model"]["policy"] == "janus":
        raise ValueError(f"{source} is a Janus's tokenizer, which no layout holds by itself; use it with --model.tokenizer {source}")
    llamagen.export(source, target)
    print(f"{words[1]} holds the weights of {words[0]} in the layout of LlamaGen's scripts")
    return 0


def _export_janus(source: str, target: str, flags: Flags) -> int:
    made = Path(source) / "config.json"
    if "base" not in flags and not made.is_file():
        raise ValueError(f"{source} is the tuned part of a Janus; name the whole one that it was tuned from with --base")
    from vapi import data
    from vapi.models import janus

    (base,) = flags["base"] if "base" in flags else [data.read_json(made)["sections"]["model"]["generator"]]
    (layout,) = flags.get("layout", ["transformers"])
    janus.export(base, source, target, layout)
    print(f"{target} holds {base} with the weights of {source}, in the layout of {layout}")
    return 0


def _weights(words: list[str], flags: Flags) -> int:
    settings, _ = configure("tokens", flags)
    from vapi import data

    data.write_weights(settings.model, ARTIFACTS / "weights")
    data.write_judges(settings, ARTIFACTS / "weights")
    data.write_rewards(settings, ARTIFACTS / "weights")
    return 0


def _track(words: list[str], flags: Flags) -> int:
    if not _switch(flags, "resend"):
        raise ValueError("vapi track --resend sends what an unreachable server has not got yet")
    from vapi import track

    left = track.resend()
    print(f"{left} runs still wait for their server" if left else "every run has been sent")
    return 1 if left else 0


def _promote(words: list[str], _: Flags) -> int:
    if _wants_help(words):
        return _help("promote", COMMANDS["promote"])
    positional, flags = parse(words)
    if len(positional) > 1:
        raise ValueError(f"vapi promote takes one version, not {' '.join(positional)}")
    reason = _one("force", flags.pop("force")) if "force" in flags else ""
    if reason.isdigit():
        raise ValueError(f"--force takes a reason in words, which is kept; a version goes first: vapi promote {reason} --force REASON")
    return _decide("promote", flags, *positional, reason=reason)


def _rollback(words: list[str], _: Flags) -> int:
    if _wants_help(words):
        return _help("rollback", COMMANDS["rollback"])
    positional, flags = parse(words)
    if positional:
        raise ValueError(f"vapi rollback takes no version; to make one champion: vapi promote {positional[0]}")
    return _decide("rollback", flags)


def _decide(name: str, flags: Flags, *words: str, **named: str) -> int:
    """A function of ``vapi.register`` that changes the registry, and what it says."""
    settings, _ = configure("register", flags)
    from vapi import register, track

    with track.registry(settings) as client:
        print(getattr(register, name)(settings.register, client, *words, **named))
    return 0


def _report(words: list[str], flags: Flags) -> int:
    out = Path(_one("out", flags.get("out", [str(ARTIFACTS / "report.html")])))
    log, names = _switch(flags, "log"), words or [str(ARTIFACTS)]
    ids = [name for name in names if not Path(name).is_dir()]
    config.require(bool(ids) or not log, "--log puts the page among a run's artifacts in MLflow; name a run by its id there")
    from vapi import compare, compare_page, track

    uri = _where_runs_are() if ids else ""
    with tempfile.TemporaryDirectory() as folder:
        runs = compare.read_all({name: track.fetch(name, uri, Path(folder) / name) if name in ids else Path(name) for name in names})
        config.write_text(out, compare_page.page(runs))
    for sentence in compare.warnings(runs):
        print(sentence, file=sys.stderr)
    for name in ids if log else []:
        track.attach(name, uri, out)
    print(f"{out}  ({', '.join(f'{run.name}: {run.place}' for run in runs)})")
    return 0


def _where_runs_are() -> str:
    """The MLflow that the configuration names; the defaults' where there is none."""
    from vapi import data, track

    settings = config.load() if PARAMS.is_file() else Config()
    config.require(settings.track.uri != "off", "a run's id needs MLflow, and track.uri is off; name the run's folder")
    return track.tracking_uri(settings, data.project_root())


def _summary(words: list[str], flags: Flags) -> int:
    from vapi import report

    print(report.table(ARTIFACTS))
    return 0


def _switch(flags: Flags, name: str) -> bool:
    if flags.get(name):
        raise ValueError(f"--{name} takes no value")
    return name in flags


@dataclass(frozen=True)
class Command:
    """A command that is no stage."""

    doc: str
    run: Callable[[list[str], Flags], int]
    usage: str = ""
    flags: tuple[str, ...] | None = ()  # None: it reads its words by itself


GENEVAL = {
    "score": Command(
        "Score a folder of pictures in GenEval's layout and print the official table; writes results.jsonl and summary.json, and "
        "goes on where it was stopped. DETECTOR is a folder of Mask2Former's weights, or digits; FILE holds detections made elsewhere.",
        _geneval_score,
        "IMAGES (--detector DETECTOR [--clip FOLDER] [--device cuda] | --detections FILE) [--prompts FILE] [--images-per-prompt N] "
        "[--out FOLDER]",
        ("detector", "clip", "device", "detections", "prompts", "images_per_prompt", "out"),
    ),
    "generate": Command(
        f"Draw pictures for prompts, as a folder in GenEval's layout; {PARAMS} says of which model and how, flags win over it. "
        "What is there already is not drawn again.",
        _geneval_generate,
        "OUT [--prompts FILE] [--images-per-prompt N] [--seeds N] [--model.generator FILE] [--section.field value ...]",
        None,
    ),
    "convert-detector": Command(
        "Make a folder for --detector of OpenMMLab's checkpoint, whose scores alone are called GenEval.",
        _geneval_convert,
        "SOURCE.pth TARGET",
    ),
    "convert-clip": Command(
        "Make a folder for evaluate.hps (or evaluate.clip, tune.clip_model) of a checkpoint of open_clip's, as HPSv2's is (not of its "
        "-quickgelu models, which no weight tells apart); the vocabulary comes from the folder of another CLIP.",
        _geneval_convert_clip,
        "SOURCE.pt TARGET --words FOLDER",
        ("words",),
    ),
    "compare": Command(
        "What run B gains on run A, paired by prompt, with a 95 % interval; each a folder with results.jsonl, or several seeds of them.",
        _geneval_compare,
        "A B | A0 A1 ... --with B0 B1 ...",
        ("with",),
    ),
}
COMMANDS = {
    "bench": Command(
        "Measure this machine: vapi bench tune, sample, reward, fid, geneval or gpu; the last line of output is JSON. Each but "
        "geneval is the ratio to a naive reference in the same run; weights are random where a file is missing, since no figure "
        "depends on them.",
        _bench,
        flags=None,
    ),
    "experiment": Command(
        "Run a table of the paper, or one of ours, point by point and seed by seed: the paper's numbers beside ours. Repeat the command "
        "to go on where it was stopped. Flags are fields of the recipe; --list shows the rows and how far they are.",
        _experiment,
        "NAME [--seeds 0,1,2] [--recipe NAME | --params FILE] [--section.field value ...] [--list] [--out FOLDER]",
        None,
    ),
    "export": Command(
        "Write weights in the layout that LlamaGen's own scripts read, or a tuned Janus as a whole one, which transformers loads (or "
        "deepseek's own code); SOURCE is a file of weights, or what the stage tune wrote.",
        _export,
        "SOURCE TARGET.pt | SOURCE FOLDER [--layout transformers|deepseek] [--base FOLDER]",
        ("layout", "base"),
    ),
    "geneval": Command(
        "Text to image by GenEval's rules: score, generate, convert-detector, convert-clip, compare; no second environment.",
        _geneval,
        flags=None,
    ),
    "listing": Command("Write down which files the source of the subset holds; DVC runs subset again when that changes.", _listing),
    "promote": Command(
        "Make a registered version champion, the challenger if none is named; it must pass the gates of register against the present "
        "champion, and its run must have ended, or a REASON is given, which is kept in the version's tags. Who was champion before "
        f"bears the alias previous. {PARAMS} says which model and where, flags win over it.",
        _promote,
        "[VERSION] [--force REASON] [--section.field value ...]",
        None,
    ),
    "recipe": Command(
        "List the recipes; print one; --write it to params.yaml (refuses to lose edits, unless --force); "
        "diff: what params.yaml changes against a recipe (the closest one if none is named).",
        _recipe,
        "[NAME] [--write [--force]] | diff [NAME]",
        ("write", "force"),
    ),
    "report": Command(
        "Compare runs on one HTML page: pictures, numbers, curves, cost, configuration, lineage; RUN is a folder like artifacts (the "
        "default), or a run's id in MLflow; the first is what others are compared with. --log puts the page among those runs' artifacts.",
        _report,
        "[RUN ...] [--out FILE.html] [--log]",
        ("out", "log"),
    ),
    "rollback": Command(
        "Make the version champion again that was it before; the one taken back is no champion again by itself. A second call "
        "changes nothing.",
        _rollback,
        "[--section.field value ...]",
        None,
    ),
    "summary": Command("Base and tuned side by side, seconds per stage, and where to look next.", _summary),
    "weights": Command(
        "Fetch the weights of generator and tokenizer if they lie on a hub, and write down which they are; DVC runs what uses them "
        "again when that changes.",
        _weights,
    ),
    "track": Command("Send the runs that an unreachable MLflow server has not got yet.", _track, "--resend", ("resend",)),
}


# --- help --------------------------------------------------------------------------------------


def _wants_help(words: list[str]) -> bool:
    return "-h" in words or "--help" in words


def _help(name: str, command: Command) -> int:
    print(f"usage: vapi {name} {command.usage}\n\n{_wrap(command.doc)}")
    return 0


def _wrap(text: str, indent: str = "") -> str:
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _overview() -> str:
    lines = [vapi.__doc__ or "", "", "usage: vapi COMMAND [--help]", "", "stages, in the order in which data flows:"]
    lines += [f"  {name:<10} {stage.doc}" for name, stage in STAGES.items()]
    lines += ["", "also:"]
    lines += [f"  {name:<10} {command.doc.split('; ')[0].removesuffix('.')}." for name, command in COMMANDS.items()]
    lines += ["", f"A stage reads {PARAMS}; flags win over it: vapi tune --tune.lr 2e-6"]
    return "\n".join(lines)


def _stage_help(stage: str) -> str:
    spec = STAGES[stage]
    try:
        settings, origin = config.load(), str(PARAMS)
    except ValueError as error:  # none here, or of another version: help all the same
        settings, origin = recipes.recipe("digits"), f"the recipe digits, because {error}"
    lines = [f"usage: vapi {stage} [--section.field value ...]", "", spec.doc, "", "folders:"]
    lines += [f"  --{name} {path}" for name, path in _folders(stage).items()]
    lines += ["", f"values now (from {origin}); --{stage}.field may be written --field:"]
    return "\n".join(lines + _fields(settings, (*spec.sections, "track")))


def _fields(settings: Config | Measured, sections: tuple[str, ...]) -> list[str]:
    """Every field of some sections, with its present value and its documentation."""
    lines: list[str] = []
    for section in sections:
        values = getattr(settings, section)
        lines += ["", f"{section}: {type(values).__doc__}"]
        docs, hints = config.field_docs(type(values)), typing.get_type_hints(type(values))
        for name, value in config.plain(values).items():
            choices = f"  ({' | '.join(typing.get_args(hints[name]))})" if typing.get_origin(hints[name]) is typing.Literal else ""
            lines += [f"  --{section}.{name} {config.scalar(value)}{choices}", _wrap(docs[name], " " * 8)]
    return lines
