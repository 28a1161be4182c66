"""From stored latents to a loss per sample: every draw of a step, keyed so that it depends on the step alone.

And where a step's numbers stopped being finite: `name_what_went_bad` computes its batch once more, looked at from the
inside. Only for a step that was skipped, and only at a logged one: nothing watches a step that goes well. The weights
are those of the skipped step, as it left them alone, and its draws are keyed: so the same numbers come again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor
from torch.nn import functional

from pipeline.diffusion import Process
from pipeline.dit.embeddings import DRAWN_FOR, joined, parted
from pipeline.dit.inside import Findings, look_at_gradients, watched
from pipeline.randomness import generator
from pipeline.runtime.devices import widest_float
from pipeline.vae import Factor, draw_posterior, normalize
from train.data import Batch, BatchShard
from train.distributed import AUTOCAST
from train.parallel import Replicated

if TYPE_CHECKING:
    from train.loop import Trainer

Model = Callable[..., Any]
"""(x_t [N, C, H, W], timesteps [N], labels [N]) → the network's output; with `middle=True` its `Outputs`."""
ALIGN_BETA = 0.05
"""Error up to which alignment is squared (SRA 2)."""
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
    token: Float[Tensor, "batch dim"] | None = None
    """What the process adds to a class token, where there is one."""

    def rows(self, rows: slice) -> "Draws":
        """The same draws for some of the rows."""
        return self._each(lambda tensor: tensor[rows])

    def to(self, device: torch.device) -> "Draws":
        """The same draws on a device."""
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, function: Callable[[Tensor], Tensor]) -> "Draws":
        return Draws(
            t=function(self.t),
            noise=function(self.noise),
            posterior=function(self.posterior),
            dropped=function(self.dropped),
            token=None if self.token is None else function(self.token),
        )


def draw(
    process: Process,
    number: int,
    shard: BatchShard,
    shape: tuple[int, ...],
    *,
    seed: int,
    dropout: float,
    device: str,
    token: int = 0,
) -> Draws:
    """The draws of batch `number`: made for the whole global batch on every process, then cut to its own rows.

    So they are the same for any number of processes and any accumulation. A CPU and a GPU draw different streams.

    Args:
        shape: of a latent.
        token: numbers of a class token; 0 for none.
    """

    def own(whole: Tensor) -> Tensor:
        """This process's rows, as a copy: a view would keep the whole batch's draws in memory to the step's end."""
        return whole if shard.processes == 1 else whole[shard.rows].clone()

    def normal(purpose: str, shape: tuple[int, ...] = shape) -> Tensor:
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
        token=normal(DRAWN_FOR, (token,)) if token else None,
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
    further_weights: Mapping[str, float] = MappingProxyType({}),
    features: Float[Tensor, "batch token feature"] | None = None,
    class_token: Float[Tensor, "batch dim"] | None = None,
) -> dict[str, Float[Tensor, " batch"]]:
    """{"loss", "mse", "vb"}, each [batch], of stored latents under the given draws.

    Args:
        further_weights: what is trained besides "loss", in one forward pass and with the same draws: "middle", the
            same loss of the middle head's output, and "align", the smooth L1 distance of its tokens' latent from the
            clean one, "features", the mean of −cos between its projected tokens and `features`, and "class_token", the
            loss of the token's own prediction. Each is one more entry of the result; `trained_loss` adds them up.
        features: of an encoder, one for each token; without them "features" is 0, and so are its gradients.
        class_token: the clean one, normalised, of a network that has one: it is noised at the same time.
    """
    x_start = clean_latents(stored, normalization, draws.posterior)
    y = torch.where(draws.dropped | (labels < 0), null_class, labels)
    if class_token is not None:
        model, token_losses = _beside_token(model, process, class_token, draws)
    if not further_weights:
        return process.training_losses(lambda x_t, t: model(x_t, t, y), x_start, draws.t, draws.noise)

    # One pass gives all outputs; the process asks for the final one.
    made: list[Any] = []

    def final(x_t: Tensor, t: Tensor) -> Tensor:
        made.append(model(x_t, t, y, middle=True))
        return made[0].final

    losses = process.training_losses(final, x_start, draws.t, draws.noise)
    if "class_token" in further_weights:
        losses["class_token"] = token_losses()
    if "middle" in further_weights:
        middle = process.training_losses(lambda _x, _t: made[0].middle, x_start, draws.t, draws.noise)
        losses["middle"] = middle["loss"]
    if "align" in further_weights:
        aligned = made[0].aligned.float()
        distance = functional.smooth_l1_loss(aligned, x_start, reduction="none", beta=ALIGN_BETA)
        losses["align"] = distance.flatten(1).mean(1)
    if "features" in further_weights:
        projected = made[0].features.float()
        if features is None:  # every weight takes part in every step
            losses["features"] = projected[:, :0].flatten(1).sum(1)
        else:
            losses["features"] = -functional.cosine_similarity(projected, features, dim=-1).mean(1)
    return losses


def _beside_token(
    model: Model, process: Process, class_token: Tensor, draws: Draws
) -> tuple[Model, Callable[[], Float[Tensor, " batch"]]]:
    """The network as the latent's process sees it, and afterwards the loss of what it said of the token.

    The token goes through the same process at the same time, as a latent of one cell.
    """
    assert draws.token is not None, "drawn wherever there is a token"
    clean, noise = (numbers[:, :, None, None] for numbers in (class_token, draws.token))
    said: list[Tensor] = []

    def beside(x_t: Tensor, t: Tensor, y: Tensor, **options: bool) -> Any:
        noised = process.q_sample(clean, draws.t, noise)
        made = model(joined(x_t, noised.flatten(1)), t, y, **options)
        latent, token = parted(made.final if options else made, x_t.shape[1], clean.shape[1])
        said.append(token[:, :, None, None])
        return made._replace(final=latent) if options else latent

    return beside, lambda: process.training_losses(lambda _x, _t: said[0], clean, draws.t, noise)["loss"]


def trained_loss(losses: Mapping[str, Tensor], further_weights: Mapping[str, float]) -> Tensor:
    """The scalar that gradients are of: the mean of "loss", plus those of what else is trained, weighted."""
    whole = losses["loss"]
    for name, weight in further_weights.items():
        whole = whole + weight * losses[name]
    return whole.mean()


class LossSums:
    """Sums of one step's losses on the device, whole and by quarter of the timesteps."""

    LENGTH = 4 + 2 * QUARTERS

    def __init__(self, device: torch.device, further: Sequence[str] = ()) -> None:
        self.further = tuple(further)
        """Names of losses beside these, as "middle"."""
        self.values = torch.zeros(self.LENGTH + len(self.further), device=device, dtype=widest_float(device))
        """[loss, mse, vb, samples, loss of each quarter, samples of each quarter, further losses], to be added over
        processes."""

    @torch.no_grad()
    def add(self, losses: dict[str, Float[Tensor, " batch"]], time: Float[Tensor, " batch"]) -> None:
        """Add one micro-batch; `time` runs from 0 (data) to 1 (noise)."""
        ones = torch.ones_like(losses["loss"])
        values = torch.stack([losses["loss"], losses["mse"], losses["vb"], ones]).to(self.values.dtype)  # [4, batch]
        quarter = (time * QUARTERS).long().clamp_(0, QUARTERS - 1)
        parts = torch.zeros(2, QUARTERS, device=values.device, dtype=values.dtype)
        parts.index_add_(1, quarter, values[::3])  # loss and samples; a list of rows would be uploaded as an index
        others = [losses[name].to(self.values.dtype).sum().reshape(1) for name in self.further]
        self.values += torch.cat([values.sum(1), parts.flatten(), *others])

    def means(self, values: Sequence[float]) -> dict[str, float | None]:
        """Means over the global batch, of `values` as read; a quarter that no sample fell into is None."""
        loss, mse, vb, count = values[:4]
        result: dict[str, float | None] = {"loss": loss / count, "mse": mse / count, "vb": vb / count}
        for quarter in range(QUARTERS):
            total, samples = values[4 + quarter], values[4 + QUARTERS + quarter]
            result[f"loss_q{quarter}"] = total / samples if samples else None
        for name, total in zip(self.further, values[self.LENGTH :], strict=True):
            result[f"loss_{name}"] = total / count
        return result


PIECE = 8
"""Samples looked at together, so that looking never needs more memory than the step did."""
_ADVICE = {
    "data": "these are the store's: dit-inspect STORE --verify looks for damage",
    "weights": "go back to an earlier checkpoint",
    "logits": "--qk-norm keeps them small; else lower --lr or set --clip-norm",
    "activations": "lower --lr, set --clip-norm, or train with --qk-norm or --mixed-precision no",
    "gradient": "set --clip-norm, lower --lr, or train with --mixed-precision no",
}


def name_what_went_bad(trainer: "Trainer", batch: Batch) -> str | None:
    """What of the skipped step was not finite first, what was largest and what would help; None if all is finite now.

    Every process must call it; each looks at its own rows, and the first that found something is believed.
    """
    mine = _look(trainer, batch)
    found = [each for each in trainer.hardware.gather(mine) if each.first is not None]
    if not found:
        return None
    kind, what = found[0].first or ("", "")
    largest = [
        f"the largest {name} was {value:.3g} in {where}"
        for name, (value, where) in (("activation", found[0].activation), ("attention logit", found[0].logit))
        if where
    ]
    return f"{'; '.join([f'first not finite: {what}', *largest])}; {_ADVICE[kind]}"


def _look(trainer: "Trainer", batch: Batch) -> Findings:
    network, found = trainer.state.placement.network, Findings()
    alone = isinstance(trainer.state.placement, Replicated)
    draws = trainer.draws_of(batch)
    if alone:
        for name, weight in network.named_parameters():
            found.see("weights", f"the weights {name}", weight)
    precision = AUTOCAST[trainer.hardware.precision]
    options = trainer.options.model
    for start in range(0, len(batch.labels), PIECE):
        rows = slice(start, start + PIECE)
        latents = clean_latents(batch.latents[rows], trainer.normalization, draws.posterior[rows])
        found.see("data", "the latents of the batch", latents)
        with (
            torch.compiler.set_stance("force_eager"),
            torch.set_grad_enabled(alone),
            torch.autocast(trainer.hardware.device.type, precision, enabled=precision is not torch.float32),
            watched(network, found),
        ):
            losses = _losses(trainer, batch, draws, rows)
        loss = trained_loss(losses, options.further_weights)
        found.see("activations", "the loss", loss)
        if alone and loss.isfinite():
            look_at_gradients(network, loss, found)
    found.heads.clear()
    return found


def _losses(trainer: "Trainer", batch: Batch, draws: Draws, rows: slice) -> dict[str, Tensor]:
    return sample_losses(
        trainer.state.placement.network,
        trainer.process,
        trainer.normalization,
        batch.latents[rows],
        batch.labels[rows],
        draws.rows(rows),
        null_class=trainer.state.placement.network.config.null_class,
        further_weights=trainer.options.model.further_weights,
        features=trainer.features_of(batch, rows),
        class_token=trainer.class_token_of(batch, rows),
    )
