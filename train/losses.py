"""From stored latents to a loss per sample: every draw of a step, keyed so that it depends on the step alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from pipeline.diffusion import Process
from pipeline.randomness import generator
from pipeline.vae import Factor, draw_posterior, normalize
from train.data import BatchShard

Model = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t [N, C, H, W], timesteps [N], labels [N]) → the network's output."""
QUARTERS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentNormalization:
    """How a stored latent becomes the network's x_0: a draw of its posterior, then (z − shift) · scale."""

    kind: str
    """Either "moments" or "point"."""
    scaling_factor: Factor
    shift_factor: Factor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Draws:
    """Everything random about one step, for one process's rows of the global batch."""

    t: Shaped[Tensor, " batch"]
    """In the process's own units: whole steps, or real times."""
    noise: Float[Tensor, "batch channel height width"]
    """What the process adds."""
    posterior: Float[Tensor, "batch channel height width"]
    """What makes a latent of the stored mean and spread."""
    dropped: Bool[Tensor, " batch"]
    """Whether a sample's label is replaced by the null class."""

    def rows(self, rows: slice) -> "Draws":
        """The same draws for some of the rows."""
        return Draws(t=self.t[rows], noise=self.noise[rows], posterior=self.posterior[rows], dropped=self.dropped[rows])


def draw(
    process: Process, number: int, shard: BatchShard, shape: tuple[int, ...], *, seed: int, dropout: float, device: str
) -> Draws:
    """The draws of batch `number`: made for the whole global batch on every process, then cut to its own rows.

    So they are the same for any number of processes and any accumulation. A CPU and a GPU draw different streams.
    """

    def own(whole: Tensor) -> Tensor:
        """This process's rows, as a copy: a view would keep the whole batch's draws in memory to the step's end."""
        return whole if shard.processes == 1 else whole[shard.rows].clone()

    def normal(purpose: str) -> Tensor:
        draws = generator(seed, purpose, number, device=device)
        return own(torch.randn((shard.batch_size, *shape), generator=draws, device=device))

    uniform = torch.rand(
        shard.batch_size, generator=generator(seed, "label drop", number, device=device), device=device
    )
    return Draws(
        t=own(process.draw_timesteps(shard.batch_size, generator(seed, "timestep", number, device=device))),
        noise=normal("diffusion noise"),
        posterior=normal("posterior noise"),
        dropped=own(uniform) < dropout,
    )


def clean_latents(
    stored: Shaped[Tensor, "batch values height width"],
    normalization: LatentNormalization,
    noise: Float[Tensor, "batch channel height width"],
) -> Float[Tensor, "batch channel height width"]:
    """The network's x_0 in float32; points have no spread, so the noise does nothing to them."""
    z = draw_posterior(stored.float(), noise) if normalization.kind == "moments" else stored.float()
    return normalize(z, normalization.scaling_factor, normalization.shift_factor)


def sample_losses(
    model: Model,
    process: Process,
    normalization: LatentNormalization,
    stored: Shaped[Tensor, "batch values height width"],
    labels: Int64[Tensor, " batch"],
    draws: Draws,
    *,
    null_class: int,
) -> dict[str, Float[Tensor, " batch"]]:
    """{"loss", "mse", "vb"}, each [batch], of stored latents under the given draws."""
    x_start = clean_latents(stored, normalization, draws.posterior)
    y = torch.where(draws.dropped | (labels < 0), null_class, labels)
    return process.training_losses(lambda x_t, t: model(x_t, t, y), x_start, draws.t, draws.noise)


class LossSums:
    """Sums of one step's losses on the device, whole and by quarter of the timesteps."""

    LENGTH = 4 + 2 * QUARTERS

    def __init__(self, device: torch.device) -> None:
        precision = torch.float32 if device.type == "mps" else torch.float64
        self.values = torch.zeros(self.LENGTH, device=device, dtype=precision)
        """[loss, mse, vb, samples, loss of each quarter, samples of each quarter], to be added over processes."""

    @torch.no_grad()
    def add(self, losses: dict[str, Float[Tensor, " batch"]], time: Float[Tensor, " batch"]) -> None:
        """Add one micro-batch; `time` runs from 0 (data) to 1 (noise)."""
        ones = torch.ones_like(losses["loss"])
        values = torch.stack([losses["loss"], losses["mse"], losses["vb"], ones]).to(self.values.dtype)  # [4, batch]
        quarter = (time * QUARTERS).long().clamp_(0, QUARTERS - 1)
        parts = torch.zeros(2, QUARTERS, device=values.device, dtype=values.dtype)
        parts.index_add_(1, quarter, values[::3])  # loss and samples; a list of rows would be uploaded as an index
        self.values += torch.cat([values.sum(1), parts.flatten()])

    @staticmethod
    def means(values: Sequence[float]) -> dict[str, float | None]:
        """Means over the global batch, of `values` as read; a quarter that no sample fell into is None."""
        loss, mse, vb, count = values[:4]
        result: dict[str, float | None] = {"loss": loss / count, "mse": mse / count, "vb": vb / count}
        for quarter in range(QUARTERS):
            total, samples = values[4 + quarter], values[4 + QUARTERS + quarter]
            result[f"loss_q{quarter}"] = total / samples if samples else None
        return result
