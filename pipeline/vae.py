"""The frozen autoencoder between pixels and latents: load it, know it again, encode, normalise, decode to bytes.

Latents in files are always *unscaled*, as the encoder gave them. Training and sampling work on
`normalize(z) = (z − shift) · scale`, and `denormalize` undoes it just before decoding. Bytes become pixels in [−1, 1]
in `pipeline.images.to_pixels`; pixels become bytes again here, in `to_bytes`, rounded to nearest, and nowhere else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from pipeline.runtime.errors import UserError
from pipeline.vae_folder import KINDS, find_folder, fingerprint, load_model, read_config

if TYPE_CHECKING:
    from diffusers import ModelMixin

    from pipeline.recorded import RecordedVae
else:
    RecordedVae = Any

Factor = float | Sequence[float] | Tensor

STABLE_DIFFUSION: dict[str, Any] = {
    "name": "stabilityai/sd-vae-ft-ema",
    "class": "AutoencoderKL",
    "sha256": None,
    "scaling_factor": 0.18215,
    "shift_factor": None,
}
"""The VAE of the public release and of fast-DiT's features; neither says its fingerprint."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Vae:
    """A frozen diffusers autoencoder in evaluation mode, and what has to be remembered about it."""

    name: str
    """`demo`, a Hub name, or the last component of a local folder."""
    class_name: str
    """Its class in diffusers."""
    sha256: str
    """`fingerprint` of its folder: the same VAE wherever it lies and in whatever precision it is run."""
    kind: str
    """`moments` (mean and log-variance) or `point` (one latent, no spread)."""
    channels: int
    """Channels of one latent; moments have twice as many."""
    downsample: int
    """Pixels along one side of a latent cell."""
    scaling_factor: float | list[float]
    """What centred latents are multiplied by; a list has one factor per channel."""
    shift_factor: float | list[float] | None
    """What is subtracted from latents first; None is 0."""
    fixed_px: int | None
    """The one image side it works at, or None where any multiple of `downsample` will do."""
    device: torch.device
    dtype: torch.dtype
    """Precision of the weights and of the computation; what comes out is float32 or bytes in any case."""
    model: "ModelMixin" = field(repr=False)
    """The diffusers model."""
    pixels: Sequence[int] | None = None
    """Between what its encoder was given pixels, where another project made the latents; None is [−1, 1]. EDM2 gave
    [0, 1]."""

    def describe(self) -> dict[str, Any]:
        """What a store's manifest and a checkpoint remember, to find this VAE again and to know it is this one."""
        return {
            "name": self.name,
            "class": self.class_name,
            "sha256": self.sha256,
            "scaling_factor": self.scaling_factor,
            "shift_factor": self.shift_factor,
            **({} if self.pixels is None else {"pixels": list(self.pixels)}),
        }

    def view_shape(self, image_px: int) -> tuple[int, int, int]:
        """[values, h, w] of what `encode` gives for a square image."""
        side = image_px // self.downsample
        return self.channels * (2 if self.kind == "moments" else 1), side, side

    def compile_encoder(self) -> None:
        """Compile what `encode` runs; the first image then takes a minute or so."""
        self.model.encode = torch.compile(self.model.encode)

    def check_size(self, height: int, width: int) -> None:
        """Raise UserError unless the VAE can encode images of this many pixels; the sentence says which it can."""
        if self.fixed_px is not None and (height, width) != (self.fixed_px, self.fixed_px):
            raise UserError(
                f"the VAE {self.name} works on images of {self.fixed_px}×{self.fixed_px} pixels only, "
                f"not {height}×{width}; use --image-size {self.fixed_px}"
            )
        if height % self.downsample or width % self.downsample:
            raise UserError(
                f"{height}×{width} pixels is no multiple of {self.downsample}, the down-factor of the VAE {self.name}; "
                f"choose --image-size {max(1, round(height / self.downsample)) * self.downsample}, for example"
            )

    @torch.no_grad()
    def encode(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch values latent_height latent_width"]:
        """Unscaled moments [N, 2C, h, w] (mean, then log-variance as the encoder gave it), or points [N, C, h, w].

        Pixels are RGB in [−1, 1]. The result is float32 on the VAE's device. A sample's last bits depend on the size
        of its batch: pad every batch to one size where equal bytes matter.

        Raises:
            UserError: images of a size that this VAE cannot encode.
        """
        self.check_size(*pixels.shape[-2:])
        x = self._to_model((pixels + 1) / 2 if self.is_from_zero else pixels)
        if self.class_name == "AutoencoderKL":
            return self.model.encode(x).latent_dist.parameters.float()
        if self.class_name == "AutoencoderRAE":  # pixels in [0, 1]; normalises and scales inside
            return self.model.encode((x + 1) / 2, return_dict=False)[0].float() / self.model.config.scaling_factor
        return self.model.encode(x, return_dict=False)[0].float()

    def decode(
        self, latents: Float[Tensor, "batch channel latent_height latent_width"]
    ) -> UInt8[Tensor, "batch height width 3"]:
        """Images as bytes on the CPU, from unscaled latents (see `to_bytes`)."""
        return to_bytes(self.decode_values(latents)).cpu()

    @torch.no_grad()
    def decode_values(
        self, latents: Float[Tensor, "batch channel latent_height latent_width"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """What the decoder gives for unscaled latents, float32: RGB, mostly in [−1, 1], not clipped, not checked."""
        if self.class_name == "AutoencoderRAE":
            z = self._to_model(latents * self.model.config.scaling_factor)
            return self.model.decode(z, return_dict=False)[0].float() * 2 - 1
        values = self.model.decode(self._to_model(latents), return_dict=False)[0].float()
        return values * 2 - 1 if self.is_from_zero else values

    @property
    def is_from_zero(self) -> bool:
        """Whether the model itself takes and gives pixels in [0, 1]."""
        return self.pixels is not None and list(self.pixels) == [0, 1]

    def _to_model(self, x: Tensor) -> Tensor:
        return x.to(self.device, self.dtype)


def load_vae(name: str, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Vae:
    """A frozen VAE in evaluation mode, from safetensors alone.

    Args:
        name: `demo`, a local folder in diffusers' layout, a name on the Hugging Face Hub; for the last two also the
            folder or repository of a whole diffusers pipeline, whose `vae` is taken.

    Raises:
        UserError: there is no such VAE, it is of a class that is not supported, or its files are incomplete.
    """
    folder, known_as = find_folder(name)
    config = read_config(folder, name)
    class_name = config.class_name
    sha256 = fingerprint(folder)
    model = load_model(folder, class_name, name, dtype)
    model.requires_grad_(False).eval()
    device = torch.device(device)
    model.to(device)
    if device.type == "cuda":
        keep_layout(model)
    scale, shift = _factors(model.config, class_name)
    rae = class_name == "AutoencoderRAE"
    return Vae(
        name=known_as,
        class_name=class_name,
        sha256=sha256,
        kind=KINDS[class_name],
        channels=model.config["encoder_hidden_size" if rae else "latent_channels"],
        downsample=_downsample(model.config, class_name),
        scaling_factor=scale,
        shift_factor=shift,
        fixed_px=model.decoder_image_size if rae else None,
        device=device,
        dtype=dtype,
        model=model,
    )


def keep_layout(model: "ModelMixin") -> None:
    """Let a decoder's values lie channel by channel from end to end, as its norms take them on a GPU.

    In the middle diffusers' attention gives them cell by cell, and every norm after it would copy them into order. With
    all weights in channels_last each convolution copies its input back, too: more than three times as many bytes
    (docs/vae.md).
    """
    middle = getattr(getattr(model, "decoder", None), "mid_block", None)
    if middle is not None:
        middle.register_forward_hook(lambda _module, _given, made: made.contiguous())


def find_vae(
    recorded: RecordedVae,
    override: str | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    allow_other: bool = False,
) -> Vae:
    """The VAE that a store or a checkpoint was made with, checked by its fingerprint.

    Scale and shift stay what is recorded of this very VAE, or of another project's latents (`pixels` is recorded):
    those need not be its own configuration's.

    Args:
        recorded: what `Vae.describe` gave then.
        override: where to load it from instead of its recorded name (`--vae`).
        allow_other: take the VAE that `override` names even if it is another one.

    Raises:
        UserError: it cannot be found by its recorded name, or it is another VAE.
    """
    name = recorded.name
    if override is None and (not name or (name != "demo" and "/" not in name)):
        what = f"a VAE in a local folder named {name!r}" if name else "a VAE whose name was not recorded"
        raise UserError(f"the latents were made with {what}; say where it is with --vae FOLDER (or a Hub name)")
    vae = load_vae(override or str(name), device=device, dtype=dtype)
    expected = recorded.sha256
    if expected and vae.sha256 != expected and not allow_other:
        fix = "give the right one with --vae" if override is None else "leave --vae out or give the right one"
        raise UserError(
            f"the latents were made with the VAE {name} of fingerprint {expected[:12]}…, but {override or name} has "
            f"{vae.sha256[:12]}…: its weights or settings differ, and decoding would give wrong pictures; {fix}"
        )
    if recorded.pixels is None and (not expected or vae.sha256 != expected):
        return vae
    own: dict[str, Any] = {name: recorded.get(name) for name in ("scaling_factor", "shift_factor", "pixels")}
    return replace(vae, **own)


def check_latents(vae: Vae, *, channels: int, downsample: int | None = None) -> None:
    """Raise UserError unless the VAE's latents have the channels, and the pixels, of a network's or a store's."""
    if vae.channels != channels or downsample not in {None, vae.downsample}:
        theirs = f"{channels} channels" + (f" and cells of {downsample} pixels" if downsample else "")
        raise UserError(
            f"the VAE {vae.name} has latents of {vae.channels} channels and cells of {vae.downsample} pixels, but "
            f"{theirs} are needed; give the VAE of these latents with --vae"
        )


def to_bytes(values: Float[Tensor, "batch 3 height width"]) -> UInt8[Tensor, "batch height width 3"]:
    """Images as bytes: 127.5 · (x + 1), clipped and rounded to nearest."""
    levels = ((values.clamp(-1, 1) + 1) * 127.5).round()
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def draw_posterior(
    moments: Float[Tensor, "*batch moments height width"], noise: Float[Tensor, "*batch channel height width"]
) -> Float[Tensor, "*batch channel height width"]:
    """A latent z = mean + exp(logvar / 2) · noise, the log-variance clamped to [−30, 20] as diffusers does."""
    mean, logvar = moments.chunk(2, dim=-3)
    return mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * noise


def normalize(
    z: Float[Tensor, "*batch channel height width"], scaling_factor: Factor, shift_factor: Factor | None = None
) -> Float[Tensor, "*batch channel height width"]:
    """What the network is fed: (z − shift) · scale, with one factor or one per channel."""
    return (z - _per_channel(shift_factor, z)) * _per_channel(scaling_factor, z)


def denormalize(
    z: Float[Tensor, "*batch channel height width"], scaling_factor: Factor, shift_factor: Factor | None = None
) -> Float[Tensor, "*batch channel height width"]:
    """Unscaled latents from what the network made: z / scale + shift, the inverse of `normalize`."""
    return z / _per_channel(scaling_factor, z) + _per_channel(shift_factor, z)


def _per_channel(factor: Factor | None, z: Tensor) -> Tensor | float:
    if factor is None or isinstance(factor, int | float):
        return float(factor or 0.0)
    if isinstance(factor, Tensor):  # already where z is: making one from numbers would wait for the device
        return factor.reshape(-1, 1, 1)
    return torch.tensor(list(factor), dtype=z.dtype, device=z.device).reshape(-1, 1, 1)


def _downsample(config: Mapping[str, Any], class_name: str) -> int:
    if class_name == "AutoencoderRAE":
        return int(config["patch_size"])
    blocks = "block_out_channels" if class_name == "AutoencoderKL" else "encoder_block_out_channels"
    return int(2 ** (len(config[blocks]) - 1))


def _factors(config: Mapping[str, Any], class_name: str) -> tuple[float | list[float], float | list[float] | None]:
    """(scale, shift) of the configuration; a mean and spread per channel are folded into lists of them.

    Some configurations normalise by (z − mean_c) / std_c · scale (`latents_mean`, `latents_std`). RAE does so inside
    its own encode and decode, so there only its scale is left.
    """
    scale, shift = config.get("scaling_factor", 1.0), config.get("shift_factor")
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if class_name == "AutoencoderRAE" or (mean is None and std is None):
        return float(scale), None if shift is None else float(shift)
    channels = config["latent_channels"]
    mean = [0.0] * channels if mean is None else [float(value) for value in mean]
    std = [1.0] * channels if std is None else [float(value) for value in std]
    if shift or len(mean) != channels or len(std) != channels:
        raise UserError(
            f"the VAE's config.json has latents_mean of {len(mean)} and latents_std of {len(std)} values for "
            f"{channels} channels, and shift_factor {shift}: it must have one per channel, and no shift_factor beside"
        )
    return [scale / value for value in std], mean
