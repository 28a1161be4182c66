"""Preview grids: the same noise and classes every time, from the raw and from the averaged weights."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from pipeline.diffusion import SAMPLERS, Process, classifier_free_guidance
from pipeline.dit import DiTConfig
from pipeline.dit.embeddings import state_noise
from pipeline.image_grid import grid, save_png
from pipeline.latents import Manifest
from pipeline.runtime.console import warn
from pipeline.runtime.devices import is_out_of_memory
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import make_folder
from pipeline.vae import Vae, denormalize, find_vae
from pipeline.vae_lanes import PREVIEWED_PX, at_once
from train.checkpointing import TrainState
from train.distributed import Hardware
from train.losses import Model
from train.options import PreviewOptions


class Previews:
    """Draws RUN/samples/step-N.png; the images are divided among the processes."""

    def __init__(
        self,
        options: PreviewOptions,
        manifest: Manifest,
        config: DiTConfig,
        process: Process,
        hardware: Hardware,
        *,
        folder: Path,
        seed: int,
    ) -> None:
        self._options, self._manifest, self._config = options, manifest, config
        self._process, self._hardware = process, hardware
        self._folder, self._seed = folder, seed

        most = SAMPLERS[process.preview_sampler].most_steps(process)
        if most is not None and options.preview_steps > most:
            raise UserError(f"--preview-steps {options.preview_steps} must be at most {most}, the steps of the process")

        # One class per column, evenly spaced over the labels.
        count = min(options.preview_classes, max(config.num_classes, 1))
        last = max(config.num_classes - 1, 0)
        self._columns = [round(k * last / max(count - 1, 1)) for k in range(count)]
        self._vae = self._find_vae()

    def _find_vae(self) -> Vae | None:
        """The store's VAE on the main process; without it there are no previews, which is said once."""
        vae, message = None, None
        if self._options.sample_every and self._hardware.is_main:
            try:
                vae = find_vae(self._manifest.vae, self._options.vae, device=self._hardware.device)
            except UserError as error:
                message = f"no preview grids will be drawn: {error}"
        self.possible = bool(self._hardware.broadcast(vae is not None))
        if message:
            warn(message)
        return vae

    def draw(self, state: TrainState) -> Image.Image | None:
        """Write the grid of this step and return it (None off the main process); every process must call it."""
        weights: dict[str, contextlib.AbstractContextManager[None]] = {
            "raw": contextlib.nullcontext(),
            "ema": state.averages["ema"].exchanged_with(state.placement.weights),
        }
        rows: dict[str, Tensor] = {}
        picture = None
        for name, in_place in weights.items():
            with in_place, _memory_may_end(state.step, alone=self._hardware.processes == 1):
                rows[name] = self._latents(state.placement.evaluate)
        if self._vae is not None and len(rows) == len(weights):
            with _memory_may_end(state.step, alone=True):
                picture = self._picture(rows, state.step)
        return picture

    def _picture(self, rows: dict[str, Tensor], step: int) -> Image.Image:
        """Raw weights above averaged ones."""
        images = torch.cat([self._decode(latents) for latents in rows.values()])
        labels = [name for name in rows for _ in range(self._options.preview_rows)]
        names = list(self._manifest.classes)
        captions = [names[label] if names else "" for label in self._columns] * len(labels)
        picture = grid(images.numpy(), len(self._columns), row_labels=labels, captions=captions, title=f"step {step:,}")
        make_folder(self._folder)
        save_png(self._folder / f"step-{step:07d}.png", picture, {"step": str(step)})
        return picture

    def _decode(self, latents: Tensor) -> Tensor:
        """Bytes [cells, H, W, 3] of latents [cells, C, h, w], as many at a time as memory at any image size allows."""
        assert self._vae is not None
        recorded, spec = self._manifest.vae, self._manifest.latent
        image_px = spec.height * spec.width * self._vae.downsample**2
        pieces = denormalize(latents, recorded.scaling_factor, recorded.shift_factor).split(
            at_once(PREVIEWED_PX, image_px)
        )
        return torch.cat([self._vae.decode(piece) for piece in pieces])

    @torch.no_grad()
    def _latents(self, model: Model) -> Tensor:
        """[rows · columns, C, H, W], gathered; every process computes the same number of them."""
        hardware, config, options = self._hardware, self._config, self._options
        labels = self._columns * options.preview_rows

        # This process's cells of the grid: every n-th, some twice where they do not divide.
        rounds = -(-len(labels) // hardware.processes)
        mine = [(hardware.rank + k * hardware.processes) % len(labels) for k in range(rounds)]

        def noise(purpose: str, *numbers: int) -> Tensor:
            drawn = [state_noise(config, self._seed, purpose, k, *numbers) for k in mine]
            return torch.stack(drawn).to(hardware.device)

        y = torch.tensor([labels[k] for k in mine]).to(hardware.device)
        scale = options.preview_guidance if config.num_classes and config.has_null_class else 1.0
        denoise = classifier_free_guidance(
            model,
            y,
            scale=scale,
            null_class=config.null_class,
            time_scale=self._process.time_scale,
            noise_first=self._process.noise_first,
        )
        sampler = SAMPLERS[self._process.preview_sampler]
        made = sampler(
            self._process, denoise, noise("preview"), lambda k: noise("preview step", k), steps=options.preview_steps
        )
        return self._in_order(made[:, : config.in_channels], len(labels))

    def _in_order(self, made: Tensor, count: int) -> Tensor:
        """All processes' latents on every one, in the order of the grid."""
        processes = self._hardware.processes
        if processes == 1:
            return made
        gathered = self._hardware.accelerator.gather(made.contiguous())
        dealt = gathered.view(processes, -1, *made.shape[1:]).transpose(0, 1)  # [rounds, processes, C, H, W]
        return dealt.reshape(-1, *made.shape[1:])[:count]  # [cells, C, H, W]


@contextlib.contextmanager
def _memory_may_end(step: int, *, alone: bool) -> Iterator[None]:
    """Go on without the block's result where memory ran out in it: a picture is not worth a run.

    Where other processes wait for that result, `alone` is False, and the error ends the run as any other.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not alone or not is_out_of_memory(error):
            raise
        warn(f"no preview of step {step:,}: memory ran out; lower --preview-classes or --preview-rows")
