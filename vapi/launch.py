"""One process per GPU: started here, unless torchrun or a Trainer job has done that already.

    vapi tune                                  # starts one process per visible GPU by itself
    torchrun --nproc-per-node 8 -m vapi tune   # the same processes, started by somebody else

``start`` runs the same command N times with the variables that torchrun sets (RANK, WORLD_SIZE, ...), hands
signals on, and ends all of them as soon as one fails. ``world`` is what a stage sees of it: who it is, what
its part of the work is, and a few ways to talk. Alone, it talks to nobody and every one of them is free.

Left out: several nodes, elastic restarts. torchrun and the Trainer do that, and a stage continues by itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import functools
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from vapi import signals

T = TypeVar("T")

INTERRUPTED = 75
"""Exit code after SIGTERM or Ctrl-C (EX_TEMPFAIL): run the same command again to continue."""

PATIENCE = datetime.timedelta(hours=2)  # the others wait while the first process computes metrics of 50,000 images
LOOK_SECONDS = 0.05  # between two looks at whether a process has ended
LAST_WORDS_SECONDS = 5.0  # for the process that failed first to be heard before those that only miss it
BUCKET = 64 << 20  # numbers per all-reduce
PR_SET_PDEATHSIG = 1


# --- what a stage sees -------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """The processes that work on this stage together. The first writes, reports and prints; all compute."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def part(self, count: int) -> slice:
        """This process's share of ``count`` items: all shares lie in a row and differ by one item at most."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all processes, in place. They must agree in dtype and device."""
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            dist.all_reduce(flat)
            for tensor, summed in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(summed.view_as(tensor))

    def any(self, flag: bool) -> bool:
        """Whether it is true in one of the processes at least."""
        return any(self.gather(flag))

    def gather(self, value: T) -> list[T]:
        """Everybody's value, in the order of the ranks."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=_words())
        return found

    def once(self, make: Callable[[], T]) -> T:
        """``make()`` in the first process alone; all get what it returned."""
        if self.size == 1:
            return make()
        box = [make() if self.first else None]
        dist.broadcast_object_list(box, src=0, group=_words())
        return box[0]  # type: ignore[return-value]

    @contextlib.contextmanager
    def first_enters(self, context: contextlib.AbstractContextManager[T]) -> Iterator[T | None]:
        """The first process enters a context (a lock, an output folder) before the others go on; they get None."""
        if self.first:
            with context as value:
                self.once(lambda: None)
                yield value
        else:
            self.once(lambda: None)
            yield None


ALONE = World()


def world(device: str = "auto") -> World:
    """The processes that torchrun, a Trainer job or ``start`` has started; ``ALONE`` if nobody has.

    The first call meets the others, and takes this process's GPU, where there is one and ``device`` does not mean the CPU.
    Raises ValueError if several processes would share a GPU.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    return ALONE if size == 1 else _join(int(os.environ["RANK"]), size, device)


@functools.cache
def _join(rank: int, size: int, device: str) -> World:
    backend = "gloo"
    if device != "cpu" and torch.cuda.is_available():
        if ":" in device:
            raise ValueError(f"model.device is {device}, one GPU for {size} processes; say cuda, and each takes its own")
        torch.cuda.set_device(_own_gpu())
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=PATIENCE)
    sys.excepthook = _fall
    return World(rank, size)


def _own_gpu() -> int:
    """The index of this process's GPU: its number among the machine's processes, unless its launcher shows it but one."""
    local, visible = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if visible == 1 and "CUDA_VISIBLE_DEVICES" in os.environ:
        return 0
    if local >= visible:
        raise ValueError(f"process {local} of this machine has no GPU, {visible} are visible; start fewer processes, or --model.device cpu")
    return local


def _fall(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say what happened, and end. Whoever has lost another process fails as well: let the other's words come first."""
    if issubclass(kind, RuntimeError):
        time.sleep(LAST_WORDS_SECONDS)
    sys.__excepthook__(kind, error, trace)
    leave(1)


@functools.cache
def _words() -> Any:
    """A group for small Python values, which never need a GPU."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def leave(code: int = 0) -> None:
    """End of the work: with others in order, but after a failure (``code``) at once, since they may never answer."""
    if not dist.is_initialized():
        return
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    dist.destroy_process_group()


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of about ``BUCKET`` numbers: few messages, little memory."""
    sizes = itertools.accumulate(tensor.numel() for tensor in tensors)
    for _, run in itertools.groupby(zip(sizes, tensors, strict=True), key=lambda item: item[0] // BUCKET):
        yield [tensor for _, tensor in run]


# --- starting them -----------------------------------------------------------------------------


def processes(device: str) -> int:
    """How many processes to start for ``model.device``: one per visible GPU; one where somebody has started us already."""
    if "WORLD_SIZE" in os.environ or device not in ("auto", "cuda"):
        return 1
    return max(1, torch.cuda.device_count())


def start(command: list[str], count: int) -> int:
    """Run ``command`` in ``count`` processes of this machine that can find each other; their exit code.

    When one fails, its words are shown, the others are killed, and its code is the result. SIGTERM and
    Ctrl-C go to all of them; what they do about it (write a checkpoint, exit with ``INTERRUPTED``) is waited for.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is here, none of them need open one
        "TORCHELASTIC_RESTART_COUNT": "0",
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count))),
        "VAPI_STARTED_BY": str(os.getpid()),
    }
    with contextlib.ExitStack() as stack:
        words = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(count)]
        group: list[subprocess.Popen[bytes]] = []
        stack.callback(_kill, group)
        stack.enter_context(signals.handed_on(functools.partial(_send, group)))
        for rank in range(count):
            environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            quiet = {"stdout": subprocess.DEVNULL, "stderr": words[rank]} if rank else {}
            group.append(subprocess.Popen(command, env=environment, start_new_session=True, **quiet))  # type: ignore[call-overload]
        failed = _wait(group)
        if failed is None:
            return max(child.returncode for child in group)
        words[failed].seek(0)
        sys.stderr.write(words[failed].read().decode(errors="replace"))
        code = group[failed].returncode
        if code < 0:
            print(f"process {failed} of {count} was ended by {signal.Signals(-code).name}; the same command continues", file=sys.stderr)
        return signals.exit_code(code)


def _kill(group: list[subprocess.Popen[bytes]]) -> None:
    for child in group:
        child.kill()
        child.wait()


def _wait(group: list[subprocess.Popen[bytes]]) -> int | None:
    """Wait until all have ended; or until one has failed, and which. A mistake that all make is the first one's to report,
    who speaks to the terminal and to the tracker: it gets a moment for that."""
    while True:
        failed = _failed(group)
        if failed:
            with contextlib.suppress(subprocess.TimeoutExpired):
                group[0].wait(LAST_WORDS_SECONDS / 2)  # less than those wait who have only lost another
            return 0 if 0 in _failed(group) else failed[0]
        if None not in [child.poll() for child in group]:
            return None
        time.sleep(LOOK_SECONDS)


def _failed(group: list[subprocess.Popen[bytes]]) -> list[int]:
    return [rank for rank, child in enumerate(group) if child.poll() not in (None, 0, INTERRUPTED)]


def _send(group: list[subprocess.Popen[bytes]], number: int) -> None:
    for child in group:
        if child.poll() is None:
            child.send_signal(number)


def end_with_starter() -> None:
    """A process that ``start`` has made must not outlive it: it would hold the lock against the next attempt."""
    starter = os.environ.pop("VAPI_STARTED_BY", None)  # what this process starts is its own business
    if starter is None:
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(starter):  # it was gone already
        raise SystemExit(INTERRUPTED)
