"""``python -m vapi.cluster.lifeline FILE SECONDS COMMAND ...``: run a command for as long as somebody touches a file.

A TrainJob outlives the step that made it. If the run is cancelled, or the step's node is lost, nobody may be left to
delete it (Kubeflow ends a step's container at once), and eight GPUs a node would go on. So the step touches a file on
the volume, and a job that sees no touch for a while gets SIGTERM, writes its checkpoint and ends; a retry of the step that
comes in time finds it alive. The time of the last touch is compared with itself, never with another machine's clock.

Kubernetes starts what failed again, several times. So the end is noted beside the file, if another start would not help: nobody
follows, or ``vapi`` was asked for something that cannot be (it notes that itself, since torchrun keeps no exit codes). A
start that finds the note ends as it says; the step removes it when it makes a job anew.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from vapi import signals

LOOK_SECONDS = 1.0
ALONE = 75
"""Exit code of one that was stopped and can be continued (EX_TEMPFAIL)."""


def note(file: Path) -> Path:
    """Where it is noted that, and how, a job has ended for good."""
    return file.with_name(f"{file.name}.ended")


def follow(command: list[str], file: Path, patience: float) -> int:
    """The command's exit code. SIGTERM for this process is the command's too."""
    if note(file).is_file():
        code = int(note(file).read_text())
        print(f"this job has ended before, with code {code}; it is not begun again", file=sys.stderr, flush=True)
        return code
    child = subprocess.Popen(command, env={**os.environ, "VAPI_MISTAKE": str(note(file))}, start_new_session=True)
    with signals.handed_on(lambda number: child.send_signal(number)):
        return signals.exit_code(_watch(child, file, patience))


def _watch(child: subprocess.Popen[bytes], file: Path, patience: float) -> int:
    touched, seen = _touched(file), time.monotonic()
    while child.poll() is None:
        time.sleep(LOOK_SECONDS)
        if (now := _touched(file)) != touched:
            touched, seen = now, time.monotonic()
        elif time.monotonic() - seen > patience:
            print(f"nobody has followed this job for {patience:.0f} seconds; it stops with a checkpoint", file=sys.stderr, flush=True)
            note(file).write_text(str(ALONE))
            child.terminate()
            child.wait()
    return child.returncode


def _touched(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:  # taken away, or a volume that does not answer
        return 0


if __name__ == "__main__":
    raise SystemExit(follow(sys.argv[3:], Path(sys.argv[1]), float(sys.argv[2])))
