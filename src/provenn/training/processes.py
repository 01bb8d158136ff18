"""What a training over several processes needs besides Lightning: whole weights, random states, a clean end."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed.nn.functional  # before there is a group: its functions' defaults would hold that for good
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from provenn.distributed import rank_lost, speaks_of_lost_rank


def leave_group(wrapper: nn.Module | None) -> None:
    """Leave the group of processes that train together, where there is one; all of them have to, at the same point.

    Left standing, its threads outlive the interpreter and abort it. Who lets go of a group last waits for its threads,
    and one of them may wait for the interpreter to let go of the tensor that was reduced last. Python's hold of the
    group frees the interpreter meanwhile, DDP's does not and waits for ever: so DDP's goes first. FSDP's holds outlive
    its weights, in the mesh that torch keeps with every operation on a divided tensor.

    Args:
        wrapper: what the model was trained in; None lets go of every wrapper by DDP that is left.
    """
    if not torch.distributed.is_initialized():
        return
    groups = list(torch.distributed.distributed_c10d._world.pg_map)
    torch.distributed.barrier()
    for left in gc.get_objects() if wrapper is None else [wrapper]:
        if type(left) is DistributedDataParallel:
            for part in ("logger", "reducer", "process_group"):
                vars(left).pop(part, None)
    for mesh_info in mesh_infos(wrapper):
        mesh_info.mesh._get_root_mesh()._pg_registry.clear()
        mesh_info.shard_process_group = None
    torch.distributed.destroy_process_group()
    del groups


def mesh_infos(wrapper: nn.Module | None) -> list[Any]:
    """What FSDP knows of the groups that divide each module's weights."""
    from torch.distributed.fsdp import FSDPModule

    divided = [] if wrapper is None else [module for module in wrapper.modules() if isinstance(module, FSDPModule)]
    return [group.mesh_info for module in divided for group in module._get_fsdp_state()._fsdp_param_groups]


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model, of which each process may hold a part; all of them have to ask."""
    from torch.distributed.tensor import DTensor

    state = {name: value.detach() for name, value in model.state_dict().items()}
    return {name: v.full_tensor() if isinstance(v, DTensor) else v.clone() for name, v in state.items()}


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Every process holds all weights inside, so that more than `forward` may be called."""
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def random_states(device: torch.device) -> list[dict[str, Tensor]]:
    """Where the random numbers of each process stand; all of them have to ask."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    if not torch.distributed.is_initialized():
        return [state]
    states: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, state)
    return states


@contextmanager
def as_one_run(trainer: Any) -> Iterator[None]:
    """A training of several processes, or of several starts, is one run to its user.

    An error of torch.distributed that the end of another process causes says so, in one line. With a limit of steps, a
    checkpoint of an epoch's end begins the next epoch, as without one; Lightning would end the old one again.
    """
    loop = trainer.fit_loop
    restore, limit = loop.load_state_dict, loop.epoch_loop.max_steps

    def load_state_dict(*args: Any, **options: Any) -> None:
        loop.epoch_loop.max_steps = -1
        try:
            restore(*args, **options)
        finally:
            loop.epoch_loop.max_steps = limit

    loop.load_state_dict = load_state_dict
    try:
        yield
    except RuntimeError as error:
        if trainer.world_size > 1 and speaks_of_lost_rank(error):
            raise rank_lost(error, trainer.global_rank, trainer.world_size) from None
        raise
