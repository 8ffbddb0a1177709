"""``python -m vapi.cluster.lifeline FILE SECONDS COMMAND ...``: run a command for as long as somebody touches a file.

A TrainJob outlives the step that made it. If the run is cancelled, or the step's node is lost, nobody may be left to
delete it (Kubeflow ends a step's container at once), and eight GPUs a node would go on. So the step touches a file on
the volume, and a job that sees no touch for a while gets SIGTERM, writes its checkpoint and ends; a retry of the step that
comes in time finds it alive. The time of the last touch is compared with itself, never with another machine's clock.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

LOOK_SECONDS = 1.0


def follow(command: list[str], file: Path, patience: float) -> int:
    """The command's exit code. SIGTERM for this process is the command's too."""
    child = subprocess.Popen(command, start_new_session=True)

    def hand_on(number: int, frame: FrameType | None) -> None:
        if child.poll() is None:
            child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, hand_on)
    touched, seen = _touched(file), time.monotonic()
    while child.poll() is None:
        time.sleep(LOOK_SECONDS)
        if (now := _touched(file)) != touched:
            touched, seen = now, time.monotonic()
        elif time.monotonic() - seen > patience:
            print(f"nobody has followed this job for {patience:.0f} seconds; it stops with a checkpoint", file=sys.stderr, flush=True)
            child.terminate()
            child.wait()
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _touched(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:  # taken away, or a volume that does not answer
        return 0


if __name__ == "__main__":
    raise SystemExit(follow(sys.argv[3:], Path(sys.argv[1]), float(sys.argv[2])))
