"""What is done *to* a generator so that it trains fast, in little memory, or on many GPUs at once.

    activation checkpointing   block by block: keep a block's input, compute the rest again
    torch.compile              block by block, so that one compilation serves all of them
    FSDP2                      block by block: weights arrive before a block needs them, and leave after it

in this order, the way torchtitan does it. The model's own code and its key names know nothing of it: ``weights``
and ``state`` give back whole tensors under their own names, whatever was done, and ``restore`` takes them.

Left out: tensor and pipeline parallelism. The largest LlamaGen has 7B parameters, which FSDP2 fits on one node.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint

from vapi.config import TuneConfig
from vapi.launch import World
from vapi.models import Policy
from vapi.rewards import Reward

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def parallelize(policy: Policy, tune: TuneConfig, world: World) -> None:
    """Do to ``policy`` what the configuration asks for, in place. Before the optimizer is made: sharding replaces parameters."""
    for block in policy.blocks:
        if tune.activation_checkpointing:
            block.forward = _recomputed(block.forward)
        if tune.compile:
            block.compile(dynamic=False)  # two shapes or three, and a graph for any shape is slower
    if tune.sharding == "full" and world.size > 1:
        _shard(policy, world)


def speed_up(policy: Policy, reward: Reward, tune: TuneConfig) -> None:
    """Do to the frozen networks, in place, what changes their results by rounding only and their time by much."""
    for network in (policy.tokenizer, *reward.networks):
        network.to(memory_format=torch.channels_last)  # the layout that convolutions are fastest in
    if tune.compile:
        # norms and activations around a convolution read and write more than it does; fused they are read once.
        # A shape of its own each: there are few, and a graph for any shape is slower
        policy.tokenizer.decoder.compile(dynamic=False)  # type: ignore[union-attr]
        reward.compile()


def require_compiler(tune: TuneConfig, device: torch.device) -> None:
    """Raises ValueError if ``tune.compile`` is asked of a machine on which torch.compile finds no compiler."""
    known = ("CXX", ("g++", "clang++")) if device.type == "cpu" else ("CC", ("cc", "gcc", "clang"))
    names = [os.environ[known[0]]] if known[0] in os.environ else known[1]
    lacks = "" if any(map(shutil.which, names)) else " or ".join(names)
    lacks = lacks or ("" if headers() else "Python.h")
    if tune.compile and lacks:
        raise ValueError(
            f"tune.compile is true, but {lacks} is not here, which torch.compile needs; "
            "install it (Debian: apt-get install g++ python3-dev), or say --tune.compile false: results are the same but for rounding"
        )


def headers() -> bool:
    """Whether a compiler finds Python's own headers here."""
    return (Path(sysconfig.get_path("include")) / "Python.h").is_file()


def _recomputed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def recomputing(*given: Any, **named: Any) -> Tensor:
        return checkpoint(forward, *given, use_reentrant=False, **named) if torch.is_grad_enabled() else forward(*given, **named)

    return recomputing


def _shard(policy: Policy, world: World) -> None:
    """Weights travel and are added up in float32, and autocast lowers them where it does without shards: the same arithmetic."""
    mesh = init_device_mesh(policy.device.type, (world.size,))
    for module in (*policy.blocks, policy.generator):
        fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(policy.generator, "features")  # training enters here; what it leaves whole, the head may read
    for shard in _shards(policy.generator):
        shard.set_gradient_divide_factor(1.0)  # each process weighs its images by all processes' images: the sum is the mean
        shard.set_force_sum_reduction_for_comms(True)


def _shards(generator: nn.Module) -> list[FSDPModule]:
    return [module for module in generator.modules() if isinstance(module, FSDPModule)]


@contextlib.contextmanager
def whole(generator: nn.Module) -> Iterator[None]:
    """All weights on every process for a while, for what does not go through ``forward`` (sampling). All processes must enter."""
    shards = _shards(generator)
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)  # nor may a forward in between take them away
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.set_reshard_after_forward(module is not generator, recurse=False)
            module.reshard()


def weights(generator: nn.Module) -> dict[str, Tensor]:
    """The generator's whole weights on the CPU. All processes must call it; only the first gets them."""
    return get_model_state_dict(generator, options=_WHOLE)  # type: ignore[return-value]


def state(generator: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights and optimizer state by name, whole, so that any number of processes can go on. All processes must call it;
    only the first gets them.

    The optimizer must have stepped: torch gives a fresh one its state by a step of its own, which Adam would count.
    """
    assert optimizer.state, "no state before the first step"
    return {"model": weights(generator), "optimizer": get_optimizer_state_dict(generator, optimizer, options=_WHOLE)}


def restore(generator: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Put back what ``state`` gave, in each process."""
    set_model_state_dict(generator, saved["model"], options=StateDictOptions(full_state_dict=True))
    set_optimizer_state_dict(generator, optimizer, saved["optimizer"], options=StateDictOptions(full_state_dict=True))
