"""How a network lies on processes: replicated (DDP), divided among them (FSDP2) or both (HSDP), by the same verbs.

The optimizer, the averages and the checkpoints only ever see plain tensors: whole ones here, a process's shards
there. So everything around the network is written once, and a checkpoint does not tell how it was trained.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.dit import DiT
from pipeline.dit.model import Outputs
from pipeline.runtime.errors import UserError
from train.distributed import AUTOCAST, Hardware
from train.options import HardwareOptions

Holes = Sequence[Tensor | None]
"""Tensors in the order of the network's parameters, None where there is none for one."""


class Replicated:
    """The whole network on every process; gradients are averaged by DDP, or nobody's business when alone."""

    def __init__(self, network: DiT, hardware: Hardware) -> None:
        self.network = network
        self.description = f"{hardware.processes} processes, a copy each (DDP)" if hardware.processes > 1 else "alone"
        self._hardware = hardware
        self.model = hardware.accelerator.prepare_model(network)
        self.weights: list[Tensor] = list(network.parameters())
        self.shapes = _shapes(network)

    def evaluate(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The network's output outside training, where processes need not keep step."""
        return self.network(x, t, y)

    def accumulating(self, *, last: bool) -> AbstractContextManager[Any]:
        """Around a micro-batch: gradients, which are whole on each process anyway, are exchanged after the last one."""
        return nullcontext() if last else self._hardware.accelerator.no_sync(self.model)

    def gradients(self) -> list[Tensor]:
        """The gradients as the optimizer wants them."""
        return [_present(weight.grad) for weight in self.weights]

    def clear_gradients(self) -> None:
        for weight in self.weights:
            weight.grad = None

    def add_up(self, value: Tensor) -> Tensor:
        """A sum over what all processes hold of the network: everything is here."""
        return value

    def shared_out(self, tensors: Tensor, rows: int, function: Callable[[Tensor], Tensor]) -> Tensor:  # noqa: ARG002
        """A function of whole matrices, stacked; each is computed on one process and given to all.

        Args:
            tensors: [number, rows, columns], the same on all processes.
            rows: of the whole matrices.
            function: of some of them, stacked.
        """
        processes, rank = self._hardware.processes, self._hardware.rank
        if processes == 1:
            return function(tensors)
        count, shape = len(tensors), tensors.shape[1:]
        share = -(-count // processes)
        mine = tensors.new_zeros(share, *shape)
        some = tensors[rank * share : (rank + 1) * share]
        mine[: len(some)] = some
        made = tensors.new_empty(processes * share, *shape)
        dist.all_gather_into_tensor(made, function(mine))
        return made[:count]

    def whole(self, tensors: Holes) -> Iterator[Tensor | None]:
        """The whole tensors of which each process holds `tensors`."""
        yield from tensors

    @torch.no_grad()
    def put(self, whole: Iterable[Tensor], tensors: Holes) -> None:
        """The inverse of `whole`, into `tensors` in place; holes take none of them."""
        for target, source in zip(_without_holes(tensors), whole, strict=True):
            target.copy_(source)


class FullySharded:
    """Weights, gradients, optimizer and averages divided among the processes by torch's `fully_shard`.

    Weights are gathered block by block in the precision of the forward pass; gradients are reduced in float32.
    With several copies (HSDP) the consecutive processes of a group divide one, and gradients are averaged over copies.
    """

    def __init__(self, network: DiT, hardware: Hardware, shards: int) -> None:
        """`shards` processes divide one copy; their number divides that of all processes.

        Of a network without memory (`on_meta`) no process ever holds more than its shards, which are to be put.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        self.network = network
        copies = hardware.processes // shards
        kind = "sharded (FSDP2)" if copies == 1 else f"{copies} copies, each sharded over {shards} (HSDP)"
        self.description = f"{hardware.processes} processes, {kind}"
        self._precision = hardware.precision
        self._device = hardware.device
        mesh = init_device_mesh(hardware.device.type, (copies, shards), mesh_dim_names=("copy", "shard"))
        self._shards, self._group = shards, mesh["shard"].get_group()
        mesh = mesh if copies > 1 else mesh["shard"]
        # Timesteps and latents stay float32: autocast, not the policy, casts what enters a product.
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if hardware.precision == "bf16" else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        is_empty = next(network.parameters()).is_meta
        if not is_empty:
            network.to(hardware.device)
        for block in network.all_blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        # The root too lets go of its weights after a forward pass: previews exchange them without a backward pass.
        fully_shard(network, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        if is_empty:
            network.to_empty(device=hardware.device)
            network.register_tables()
            network.to(hardware.device)
        self.shapes = _shapes(network)
        self._parameters: list[Any] = list(network.parameters())
        self.weights = [parameter.to_local().detach() for parameter in self._parameters]

    def model(self, x: Tensor, t: Tensor, y: Tensor, *, middle: bool = False) -> Any:
        """The network's output, or with `middle` its `Outputs`, in float32, computed in the run's precision."""
        precision = AUTOCAST[self._precision]
        with torch.autocast(self._device.type, precision, enabled=precision is not torch.float32):
            made = self.network(x, t, y, middle=middle)
        if not middle:
            return made.float()
        return Outputs._make(each if each is None else each.float() for each in made)

    def evaluate(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The network's output outside training; every process must call it equally often."""
        evaluated: Tensor = self.model(x, t, y)
        return evaluated

    def accumulating(self, *, last: bool) -> AbstractContextManager[Any]:  # noqa: ARG002 - the same verb as above
        """Around a micro-batch: each one's gradients are divided at once, so that no process ever holds whole ones."""
        return nullcontext()

    def gradients(self) -> list[Tensor]:
        """This process's shards of the gradients."""
        return [_present(parameter.grad).to_local() for parameter in self._parameters]  # type: ignore[attr-defined]

    def clear_gradients(self) -> None:
        for parameter, weight in zip(self._parameters, self.weights, strict=True):
            parameter.grad = weight.grad = None

    def add_up(self, value: Tensor) -> Tensor:
        """A sum over what the processes hold of one copy of the network."""
        dist.all_reduce(value, group=self._group)
        return value

    def shared_out(self, tensors: Tensor, rows: int, function: Callable[[Tensor], Tensor]) -> Tensor:
        """A function of whole matrices, stacked; each is gathered on one process, computed there, and divided again.

        Args:
            tensors: [number, this process's rows, columns].
            rows: of the whole matrices; they are divided among the processes of a copy as torch.chunk does.
            function: of some whole ones, stacked.
        """
        processes = self._shards
        count, own, columns = tensors.shape
        share, most = -(-count // processes), -(-rows // processes)
        parts = tensors.new_zeros(processes * share, most, columns)
        parts[:count, :own] = tensors

        # [to, matrix, own rows] becomes [from, matrix, its rows]: this process's matrices, in parts.
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=self._group)
        whole = received.view(processes, share, most, columns).transpose(0, 1).reshape(share, -1, columns)
        whole[:, :rows] = function(whole[:, :rows].contiguous())
        back = whole.view(share, processes, most, columns).transpose(0, 1).reshape(parts.shape)
        dist.all_to_all_single(received, back, group=self._group)
        return received[:count, :own]

    def whole(self, tensors: Holes) -> Iterator[Tensor | None]:
        """The whole tensors of which each process holds `tensors`, gathered one at a time; all must take part."""
        from torch.distributed.tensor import DTensor

        for parameter, tensor in zip(self._parameters, tensors, strict=True):
            if tensor is None:
                yield None
                continue
            yield DTensor.from_local(
                tensor,
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            ).full_tensor()

    @torch.no_grad()
    def put(self, whole: Iterable[Tensor], tensors: Holes) -> None:
        """The inverse of `whole`, into `tensors` in place; each process cuts out its own part."""
        from torch.distributed.tensor import distribute_tensor

        parameters = [
            parameter for parameter, tensor in zip(self._parameters, tensors, strict=True) if tensor is not None
        ]
        for parameter, target, source in zip(parameters, _without_holes(tensors), whole, strict=True):
            shards = distribute_tensor(
                source.to(target.device), parameter.device_mesh, parameter.placements, src_data_rank=None
            )
            target.copy_(shards.to_local())


Placement = Replicated | FullySharded


def shard_processes(options: HardwareOptions, processes: int, environment: Mapping[str, str] = os.environ) -> int:
    """How many processes divide one copy of the network among them; 1 where each holds it whole.

    Raises:
        UserError: that number is not known, or does not divide the number of all processes.
    """
    if options.sharding == "none" or processes == 1:
        return 1
    if options.sharding == "fsdp":
        return processes
    shards = options.shard_processes or int(environment.get("LOCAL_WORLD_SIZE", "0"))
    if not shards:
        raise UserError(
            "--sharding hsdp divides a copy among the processes of one machine, and the launcher does not say how many "
            "these are (LOCAL_WORLD_SIZE); pass --shard-processes"
        )
    if processes % shards:
        raise UserError(
            f"--shard-processes {shards} does not divide the {processes} processes of this run; --sharding hsdp needs "
            f"copies of equal size"
        )
    return shards


def parallelize(network: DiT, hardware: Hardware, shards: int) -> Placement:
    """The network on this run's processes, `shards` of which divide one copy among them."""
    return FullySharded(network, hardware, shards) if shards > 1 else Replicated(network, hardware)


def _shapes(network: DiT) -> dict[str, tuple[int, ...]]:
    """Whole shapes by name, in the network's order."""
    return {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}


def _without_holes(tensors: Holes) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _present(gradient: Tensor | None) -> Tensor:
    assert gradient is not None, "every parameter takes part in every step"
    return gradient
