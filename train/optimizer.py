"""One optimizer step that never asks the host: clipping, loss scale and skipping happen on the device.

AdamW's fused kernel divides the gradients by `grad_scale` and leaves everything alone where `found_inf` is set, on
CPU and GPU alike; so the clip and the scale cost no pass of their own, and a bad step costs no synchronisation.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from train.options import OptimizerOptions

SCALE_START, SCALE_GROWS_AFTER = 2.0**16, 2000
FUSED_ON = {"cpu", "cuda", "xpu"}  # where AdamW's fused kernel honours `found_inf` and `grad_scale`
COUNTERS = ("adamw_steps", "scale", "finite_in_a_row", "skipped_in_a_row", "skipped")


def learning_rate(step: int, options: OptimizerOptions) -> float:
    """The learning rate of step `step`, counted from 0: a function of the step alone.

    cosine falls from --lr to --lr-end over --decay-steps and stays there; inverse-sqrt is lr / √(max(n / D, 1)) with
    D = --decay-steps (Karras et al. 2024, arXiv 2312.02696, eq. 67). The warm-up multiplies by (n + 1) / warm-up.
    """
    done, rate = step + 1, options.lr
    if options.lr_schedule == "cosine" and options.decay_steps:
        share = min(done / options.decay_steps, 1.0)
        rate = options.lr_end + (options.lr - options.lr_end) * 0.5 * (1 + math.cos(math.pi * share))
    elif options.lr_schedule == "inverse-sqrt" and options.decay_steps:
        rate = options.lr / math.sqrt(max(done / options.decay_steps, 1.0))
    return rate * min(1.0, done / options.lr_warmup_steps) if options.lr_warmup_steps else rate


class Optimizer:
    """AdamW over one process's tensors, with what surrounds it: loss scale, clipping, skipping and its counters.

    A loss that is not finite makes its own gradient NaN, and reducing the gradients spreads that to every process:
    so all of them see the same gradient norm and agree on skipping without another collective.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        options: OptimizerOptions,
        *,
        scaled: bool,
        add_up: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Optimise `weights` (leaf tensors, whole or shards).

        Args:
            scaled: whether to scale the loss, as float16 needs.
            add_up: sums a scalar over the processes, for shards; None for whole tensors.
        """
        device = weights[0].device
        self.weights = list(weights)
        self._clip_norm = options.clip_norm
        self._add_up = add_up
        self._adamw = torch.optim.AdamW(
            self.weights,
            lr=options.lr,
            betas=options.betas,
            eps=options.adam_eps,
            weight_decay=options.weight_decay,
            fused=device.type in FUSED_ON,
        )
        self.kernel = "fused" if self._adamw.defaults["fused"] else "foreach"
        self.scaled = scaled
        self.scale = torch.tensor(SCALE_START if scaled else 1.0, device=device)
        self.finite_in_a_row = torch.zeros((), device=device)
        self.skipped_in_a_row = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)

    def backward(self, loss: Tensor, parts: int) -> None:
        """Add the gradient of loss / parts, times the loss scale; NaN if the loss is not finite."""
        factor = torch.where(loss.isfinite(), self.scale / parts, math.nan)
        torch.autograd.backward(loss, factor.to(loss.dtype))

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], rate: float) -> tuple[Tensor, Tensor]:
        """Update the weights; (gradient norm before clipping, 1.0 where the step was skipped), both on the device."""
        norm = self._norm(gradients) / self.scale
        skip = (~norm.isfinite()).float()
        for group in self._adamw.param_groups:
            group["lr"] = rate
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.grad = gradient
        divisor = self._divisor(norm)
        if self.kernel == "fused":
            self._adamw.found_inf, self._adamw.grad_scale = skip, divisor  # type: ignore[attr-defined]
            self._adamw.step()
        elif not skip:
            if divisor is not None:
                torch._foreach_div_(list(gradients), divisor)
            self._adamw.step()
        self._count(skip)
        return norm, skip

    def _norm(self, gradients: Sequence[Tensor]) -> Tensor:
        norm = torch.nn.utils.get_total_norm(list(gradients), foreach=True)
        return norm if self._add_up is None else self._add_up(norm.square()).sqrt()

    def _divisor(self, norm: Tensor) -> Tensor | None:
        """What the gradients are divided by: the loss scale, times what is too long; None for 1."""
        if self._clip_norm is None:
            return self.scale if self.scaled else None
        return self.scale * (norm / self._clip_norm).clamp(min=1.0)

    def _count(self, skip: Tensor) -> None:
        """Count skipped steps and move the loss scale, all without the host.

        While a loss scale can still be lowered, a skipped step is its ordinary search and no sign of trouble.
        """
        self.skipped += skip
        troubled = skip * (self.scale <= 1.0)
        self.skipped_in_a_row = (self.skipped_in_a_row + troubled) * torch.where(skip > 0, troubled, 0.0)
        if self.scaled:
            self.finite_in_a_row = (self.finite_in_a_row + 1.0) * (1.0 - skip)
            grows = self.finite_in_a_row >= SCALE_GROWS_AFTER
            self.scale = torch.where(
                skip > 0, (self.scale / 2).clamp(min=1.0), torch.where(grows, self.scale * 2, self.scale)
            )
            self.finite_in_a_row = torch.where(grows, 0.0, self.finite_in_a_row)

    def forget_streak(self) -> None:
        """Count skipped steps in a row anew, as after rolling back."""
        self.skipped_in_a_row = torch.zeros_like(self.skipped_in_a_row)

    def adam_state(self) -> dict[str, list[Tensor]]:
        """AdamW's state: {"exp_avg": one tensor per weight, "exp_avg_sq": …}, made now if there was no step yet."""
        for weight in self.weights:
            if not self._adamw.state[weight]:
                self._adamw.state[weight].update(
                    step=torch.zeros((), device=weight.device if self.kernel == "fused" else "cpu"),
                    exp_avg=torch.zeros_like(weight),
                    exp_avg_sq=torch.zeros_like(weight),
                )
        states = [self._adamw.state[weight] for weight in self.weights]
        return {name: [state[name] for state in states] for name in ("exp_avg", "exp_avg_sq")}

    def counter_values(self) -> Tensor:
        """Everything else that resuming needs, in the order of COUNTERS, on the device."""
        steps = self._adamw.state[self.weights[0]].get("step", torch.zeros(()))
        tensors = [steps, self.scale, self.finite_in_a_row, self.skipped_in_a_row, self.skipped]
        return torch.stack([tensor.detach().float().to(self.scale.device) for tensor in tensors])

    def counters(self) -> dict[str, float]:
        """`counter_values` by name, as plain numbers. Waits for the device."""
        return dict(zip(COUNTERS, self.counter_values().tolist(), strict=True))

    def restore_counters(self, values: dict[str, float]) -> None:
        """The inverse of `counters`; the moments are written into `adam_state()` in place."""
        self.adam_state()
        for weight in self.weights:
            self._adamw.state[weight]["step"].fill_(values["adamw_steps"])
        for name in COUNTERS[1:]:
            setattr(self, name, torch.full_like(self.scale, values[name]))
