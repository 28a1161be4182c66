"""How a network lies on several processes: replicated (DDP) or divided among them (FSDP2), with the same verbs.

The optimizer, the averages and the checkpoints only ever see plain tensors: whole ones here, a process's shards
there. So everything around the network is written once, and a checkpoint does not tell how it was trained.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pipeline.dit import DiT
from train.distributed import AUTOCAST, Hardware
from train.options import Sharding


class Replicated:
    """The whole network on every process; gradients are averaged by DDP, or nobody's business when alone."""

    def __init__(self, network: DiT, hardware: Hardware) -> None:
        self.network = network
        self.description = f"{hardware.processes} processes, a copy each (DDP)" if hardware.processes > 1 else "alone"
        self._hardware = hardware
        self.model = hardware.accelerator.prepare_model(network)
        self.names = [name for name, _ in network.named_parameters()]
        self.weights: list[Tensor] = list(network.parameters())

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

    def whole(self, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
        """The whole tensors of which each process holds `tensors`."""
        yield from tensors

    @torch.no_grad()
    def put(self, whole: Iterable[Tensor], tensors: Sequence[Tensor]) -> None:
        """The inverse of `whole`, into `tensors` in place."""
        for target, source in zip(tensors, whole, strict=True):
            target.copy_(source)


class FullySharded:
    """Weights, gradients, optimizer and averages divided among the processes by torch's `fully_shard`.

    Weights are gathered block by block in the precision of the forward pass; gradients are reduced in float32.
    """

    def __init__(self, network: DiT, hardware: Hardware) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        self.network = network
        self.description = f"{hardware.processes} processes, sharded (FSDP2)"
        self._precision = hardware.precision
        self._device = hardware.device
        self._hardware = hardware
        mesh = init_device_mesh(hardware.device.type, (hardware.processes,))
        # Timesteps and latents stay float32: autocast, not the policy, casts what enters a product.
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if hardware.precision == "bf16" else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        network.to(hardware.device)
        for block in network.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        # The root too lets go of its weights after a forward pass: previews exchange them without a backward pass.
        fully_shard(network, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        self.names = [name for name, _ in network.named_parameters()]
        self._parameters: list[Any] = list(network.parameters())
        self.weights = [parameter.to_local().detach() for parameter in self._parameters]

    def model(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The network's output in float32, computed in the run's precision."""
        precision = AUTOCAST[self._precision]
        with torch.autocast(self._device.type, precision, enabled=precision is not torch.float32):
            return self.network(x, t, y).float()

    def evaluate(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The network's output outside training; every process must call it equally often."""
        return self.model(x, t, y)

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
        """A sum over what all processes hold of the network."""
        return self._hardware.all_reduce_sum(value)

    def whole(self, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
        """The whole tensors of which each process holds `tensors`, gathered one at a time; all must take part."""
        from torch.distributed.tensor import DTensor

        for parameter, tensor in zip(self._parameters, tensors, strict=True):
            yield DTensor.from_local(
                tensor,
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            ).full_tensor()

    @torch.no_grad()
    def put(self, whole: Iterable[Tensor], tensors: Sequence[Tensor]) -> None:
        """The inverse of `whole`, into `tensors` in place; each process cuts out its own part."""
        from torch.distributed.tensor import distribute_tensor

        for parameter, target, source in zip(self._parameters, tensors, whole, strict=True):
            shards = distribute_tensor(
                source.to(target.device), parameter.device_mesh, parameter.placements, src_data_rank=None
            )
            target.copy_(shards.to_local())


Placement = Replicated | FullySharded


def parallelize(network: DiT, hardware: Hardware, sharding: Sharding) -> Placement:
    """The network on this run's processes."""
    kind = FullySharded if sharding == "fsdp" and hardware.processes > 1 else Replicated
    return kind(network, hardware)


def _present(gradient: Tensor | None) -> Tensor:
    assert gradient is not None, "every parameter takes part in every step"
    return gradient
