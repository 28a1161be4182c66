"""A network's forward and backward pass looked at from the inside: what is first not finite, and what is largest."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.dit.embeddings import rotate
from pipeline.dit.model import DiT


@dataclass(kw_only=True, slots=True)
class Findings:
    """What was seen of the batch, in the order of computing."""

    first: tuple[str, str] | None = None
    """(kind, the tensor in words) of what was not finite before any other."""
    activation: tuple[float, str] = (0.0, "")
    """The largest finite activation after a block, and where."""
    logit: tuple[float, str] = (0.0, "")
    """The largest finite attention logit, and where."""
    heads: dict[str, Tensor] = field(default_factory=dict)
    """Queries and keys [batch, head, token, channel] of the block that is being computed."""

    def see(self, kind: str, what: str, tensor: Tensor) -> float:
        """The tensor's largest magnitude; it is noted where the tensor is not finite and none was before."""
        largest = float(tensor.detach().abs().max()) if tensor.numel() else 0.0
        if not math.isfinite(largest) and self.first is None:
            self.first = (kind, what)
        return largest

    def see_activation(self, what: str, tensor: Tensor) -> None:
        """Note the tokens after a block."""
        largest = self.see("activations", f"the activations of {what}", tensor)
        if math.isfinite(largest):
            self.activation = max(self.activation, (largest, what))

    def see_logits(self, what: str, logits: Tensor) -> None:
        """Note a block's attention logits."""
        largest = self.see("logits", f"the attention logits of {what}", logits)
        if math.isfinite(largest):
            self.logit = max(self.logit, (largest, what))


def look_at_gradients(network: nn.Module, loss: Tensor, found: Findings) -> None:
    """Gradients come from the last layer to the first, and are not kept: the run's own stay as they are."""
    names, weights = zip(*network.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    for name, gradient in reversed(list(zip(names, gradients, strict=True))):
        if gradient is not None:
            found.see("gradient", f"the gradient of {name}", gradient)


@contextlib.contextmanager
def watched(network: DiT, found: Findings) -> Iterator[None]:
    """Hooks on every block for as long as the context lasts."""
    handles: list[Any] = []

    def watch(name: str, block: Any, rotary: Tensor | None) -> None:
        def keep(which: str) -> Any:
            return lambda _module, _arguments, output: found.heads.update({which: output.detach()})

        def logits(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            q, k = found.heads["q"], found.heads["k"].to(found.heads["q"].dtype)
            if rotary is not None:
                q, k = rotate(q, rotary), rotate(k, rotary)
            for each_q, each_k in zip(q.float(), k.float(), strict=True):  # a sample at a time: the square is large
                found.see_logits(name, each_q @ each_k.mT / math.sqrt(q.shape[-1]))
            del arguments

        def tokens(_module: nn.Module, _arguments: Any, output: Any) -> None:
            found.see_activation(name, output[0] if isinstance(output, tuple) else output)

        handles.append(block.attn.q_norm.register_forward_hook(keep("q")))
        handles.append(block.attn.k_norm.register_forward_hook(keep("k")))
        handles.append(block.attn.proj.register_forward_pre_hook(logits))
        handles.append(block.register_forward_hook(tokens))

    checkpointing = network.gradient_checkpointing
    network.gradient_checkpointing = False  # or hooks would be called again on the way back
    for number, block in enumerate(network.blocks):
        watch(f"block {number}", block, network.rotary)
    if network.head is not None:
        for number, block in enumerate(network.head.blocks):
            watch(f"block {number} of the head", block, network.head.rotary)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        network.gradient_checkpointing = checkpointing
