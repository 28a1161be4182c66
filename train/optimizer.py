"""One optimizer step that never asks the host: clipping, loss scale and skipping happen on the device.

AdamW's fused kernel divides the gradients by `grad_scale` and leaves everything alone where `found_inf` is set, on
CPU and GPU alike; so the clip and the scale cost no pass of their own, and a bad step costs no synchronisation.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) moves a matrix along the orthogonal matrix nearest to its
gradients' mean. Its steps are as long as AdamW's (Liu et al. 2025, arXiv 2502.16982): one learning rate suits both.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.dit.matrices import logical_matrices
from train.options import OptimizerOptions

SCALE_START, SCALE_GROWS_AFTER = 2.0**16, 2000
FUSED_ON = {"cpu", "cuda", "xpu"}  # where AdamW's fused kernel honours `found_inf` and `grad_scale`
COUNTERS = ("adamw_steps", "scale", "finite_in_a_row", "skipped_in_a_row", "skipped")


_FALLS: dict[str, Callable[[float], float]] = {
    "linear": lambda share: 1 - share,
    "cosine": lambda share: 0.5 * (1 + math.cos(math.pi * share)),
    "wsd": lambda share: 1 - math.sqrt(share),
}
"""Of the schedules that fall: what is left between --lr and --lr-end, by the share of the fall that is done."""
_STABLE_SHARE = {"wsd": 0.8}  # of --decay-steps, before the fall


def learning_rate(step: int, options: OptimizerOptions) -> float:
    """The learning rate of step `step`, counted from 0: a function of the step alone.

    linear, cosine and wsd fall from --lr at --decay-start to --lr-end at --decay-steps and stay there. wsd (warm-up,
    stable, decay) does so over the last fifth, as 1 - √ of what is done of it (Hägele et al. 2024, arXiv 2405.18392).
    inverse-sqrt is lr / √(max(n / D, 1)) with D = --decay-steps (Karras et al. 2024, arXiv 2312.02696, eq. 67). The
    warm-up multiplies by (n + 1) / warm-up.
    """
    done, rate, length = step + 1, options.lr, options.decay_steps
    if options.lr_schedule in _FALLS and length:
        start = options.decay_start
        if start is None:
            start = round(_STABLE_SHARE.get(options.lr_schedule, 0.0) * length)
        share = min(max(done - start, 0) / max(length - start, 1), 1.0)
        rate = options.lr_end + (options.lr - options.lr_end) * _FALLS[options.lr_schedule](share)
    elif options.lr_schedule == "inverse-sqrt" and length:
        rate = options.lr / math.sqrt(max(done / length, 1.0))
    return rate * min(1.0, done / options.lr_warmup_steps) if options.lr_warmup_steps else rate


SharedOut = Callable[[Tensor, int, Callable[[Tensor], Tensor]], Tensor]
"""(matrices stacked, as this process holds them; rows of a whole one; a function of whole ones) → its values, alike."""
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
MATCHED = 0.2  # root mean square of what AdamW adds to a weight, in learning rates


def orthogonalized(matrices: Tensor) -> Tensor:
    """Nearly U Vᵀ of each matrix U S Vᵀ of [number, rows, columns], by five Newton–Schulz steps of degree five.

    Singular values of at least 0.2 % of the matrix's Frobenius norm become 0.68 … 1.21, zeros stay. In bf16 on a GPU,
    whose units are made for it and where it is precise enough; in float32 elsewhere.
    """
    x = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    x = x / x.square().sum((-2, -1), keepdim=True).sqrt().clamp(min=1e-20)
    x = x.to(torch.bfloat16) if x.is_cuda else x
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if matrices.shape[-2] > matrices.shape[-1] else x).to(matrices.dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Group:
    """Weights of one shape, which are computed together."""

    places: list[int]
    """In the network's list."""
    shape: tuple[int, ...]
    """Of a whole one."""
    parts: int
    """Matrices in each, one below the other."""
    momentum: Tensor
    """[weight, this process's rows, columns]."""

    def directions(self, weights: Tensor) -> Tensor:
        """What whole weights [weight, rows, columns] are moved along: an orthogonal matrix for each of their parts."""
        rows, columns = self.shape[0] // self.parts, self.shape[1]
        made = orthogonalized(weights.view(-1, rows, columns))
        return made.reshape(weights.shape) * (MATCHED * math.sqrt(max(rows, columns)))


class Muon:
    """Muon over the matrices among a network's weights: orthogonal steps along Nesterov's momentum, no decay."""

    def __init__(
        self,
        weights: Sequence[Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        options: OptimizerOptions,
        shared_out: SharedOut,
    ) -> None:
        """For `weights` as this process holds them, whose names and whole shapes are `shapes`."""
        self._momentum, self._shared_out = options.muon_momentum, shared_out
        self._relative_rate = 1.0 if options.muon_lr is None else options.muon_lr / options.lr
        found, places = logical_matrices(shapes), {name: place for place, name in enumerate(shapes)}
        alike: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for name, parts in found.items():
            alike.setdefault((shapes[name], parts), []).append(places[name])
        self._groups = [
            _Group(
                places=chosen,
                shape=shape,
                parts=parts,
                momentum=torch.zeros_like(weights[chosen[0]]).repeat(len(chosen), 1, 1),
            )
            for (shape, parts), chosen in alike.items()
        ]

    @property
    def momentum(self) -> dict[int, Tensor]:
        """Every matrix's mean gradient, by the weight's place; writing into it changes the state."""
        return {place: group.momentum[k] for group in self._groups for k, place in enumerate(group.places)}

    def step(
        self, weights: Sequence[Tensor], gradients: Sequence[Tensor], rate: float, divisor: Tensor | None, skip: Tensor
    ) -> None:
        """Move the matrices; nothing changes where `skip` is 1. Gradients are divided by `divisor` first."""
        for group in self._groups:
            gradient = torch.stack([gradients[place] for place in group.places])
            if divisor is not None:
                gradient /= divisor
            gradient = torch.where(skip > 0, group.momentum, gradient)  # the mean of itself and itself is itself
            group.momentum.lerp_(gradient, 1 - self._momentum)
            gradient.lerp_(group.momentum, self._momentum)
            update = self._shared_out(gradient, group.shape[0], group.directions)
            update = torch.where(skip > 0, 0.0, update * (-rate * self._relative_rate))
            torch._foreach_add_([weights[place] for place in group.places], list(update.unbind()))


class Optimizer:
    """AdamW over one process's tensors, or Muon over some; with loss scale, clipping, skipping and their counters.

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
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        shared_out: SharedOut | None = None,
    ) -> None:
        """Optimise `weights` (leaf tensors, whole or shards).

        Args:
            scaled: whether to scale the loss, as float16 needs.
            add_up: sums a scalar over the processes, for shards; None for whole tensors.
            shapes: names and whole shapes of the weights, for Muon.
            shared_out: computes whole matrices, each on one process, for Muon; None for whole tensors on one process.
        """
        device = weights[0].device
        self.weights = list(weights)
        self._clip_norm = options.clip_norm
        self._add_up = add_up
        self._muon: Muon | None = None
        if options.optimizer == "muon":
            assert shapes is not None, "Muon knows matrices by their names"
            alone: SharedOut = lambda tensors, _, function: function(tensors)  # noqa: E731
            self._muon = Muon(self.weights, shapes, options, shared_out or alone)
        orthogonal = self._muon.momentum if self._muon else {}
        self._others = [weight for place, weight in enumerate(self.weights) if place not in orthogonal]
        self._adamw = torch.optim.AdamW(
            self._others,
            lr=options.lr,
            betas=options.betas,
            eps=options.adam_eps,
            weight_decay=options.weight_decay,
            fused=device.type in FUSED_ON,
        )
        self.kernel = "fused" if self._adamw.defaults["fused"] else "foreach"
        self.description = f"{'Muon and ' if self._muon else ''}AdamW ({self.kernel})"
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
        if self._muon is not None:
            self._muon.step(self.weights, gradients, rate, divisor, skip)
        if self.kernel == "fused":
            self._adamw.found_inf, self._adamw.grad_scale = skip, divisor  # type: ignore[attr-defined]
            self._adamw.step()
        elif not skip:
            if divisor is not None:
                torch._foreach_div_([weight.grad for weight in self._others if weight.grad is not None], divisor)
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

    def state_tensors(self) -> dict[str, list[Tensor | None]]:
        """The state: {"exp_avg": one per weight, "exp_avg_sq": …}, and Muon's "momentum"; None for a weight without.

        AdamW's is made now if there was no step yet.
        """
        for weight in self._others:
            if not self._adamw.state[weight]:
                self._adamw.state[weight].update(
                    step=torch.zeros((), device=weight.device if self.kernel == "fused" else "cpu"),
                    exp_avg=torch.zeros_like(weight),
                    exp_avg_sq=torch.zeros_like(weight),
                )
        states = [self._adamw.state.get(weight, {}) for weight in self.weights]
        found = {name: [state.get(name) for state in states] for name in ("exp_avg", "exp_avg_sq")}
        if self._muon is not None:
            momentum = self._muon.momentum
            found["momentum"] = [momentum.get(place) for place in range(len(self.weights))]
        return found

    def counter_values(self) -> Tensor:
        """Everything else that resuming needs, in the order of COUNTERS, on the device."""
        steps = self._adamw.state[self._others[0]].get("step", torch.zeros(()))
        tensors = [steps, self.scale, self.finite_in_a_row, self.skipped_in_a_row, self.skipped]
        return torch.stack([tensor.detach().float().to(self.scale.device) for tensor in tensors])

    def counters(self) -> dict[str, float]:
        """`counter_values` by name, as plain numbers. Waits for the device."""
        return dict(zip(COUNTERS, self.counter_values().tolist(), strict=True))

    def restore_counters(self, values: dict[str, float]) -> None:
        """The inverse of `counters`; the moments are written into `state_tensors()` in place."""
        self.state_tensors()
        for weight in self._others:
            self._adamw.state[weight]["step"].fill_(values["adamw_steps"])
        for name in COUNTERS[1:]:
            setattr(self, name, torch.full_like(self.scale, values[name]))
