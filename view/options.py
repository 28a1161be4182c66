"""The options of `dit-view`. No torch: `--help` must be quick."""

from dataclasses import dataclass
from typing import Annotated

import tyro
from msgspec import Meta

from pipeline.runtime.bounds import check_bounds
from pipeline.runtime.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MOST_GIVEN = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewOptions:
    """What the page may show, and where it is served."""

    checkpoint: Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN")] = ()
    """Runs to sample from and to follow; also checkpoint folders and any form that dit-convert knows. Several stand one after the other."""
    latents: Annotated[tuple[str, ...], tyro.conf.arg(metavar="STORE")] = ()
    """Latent stores to look into; several stand one after the other."""
    data: str | None = None
    """The images that a store of --latents was made from, as dit-extract --data named them: the page then shows them beside what the VAE makes of them, with its error."""
    host: str = "127.0.0.1"
    """Address to listen at. 127.0.0.1 is reached from this machine alone; with 0.0.0.0 anyone who reaches the machine can use the page."""
    port: Annotated[int, Meta(ge=0, le=65535)] = 7860
    """Port to listen at; 0 takes a free one."""
    device: str = "auto"
    """auto (an accelerator if there is one), cpu, cuda, cuda:N, or another accelerator that torch names, such as mps."""
    vae: str | None = None
    """The VAE that decodes, where the recorded name is not enough to find it: demo, a Hub name or a folder."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if not self.checkpoint and not self.latents:
            raise UserError("there is nothing to show; give --checkpoint RUN, --latents STORE, or both")
        if self.data is not None and not self.latents:
            raise UserError("--data is what a store was made from; name that with --latents, too")
        for flag, given in (("--checkpoint", self.checkpoint), ("--latents", self.latents)):
            if len(given) > MOST_GIVEN:
                raise UserError(f"{flag} names {len(given)} things; give at most {MOST_GIVEN}")
        if not self.host.strip():
            raise UserError("--host is empty; use 127.0.0.1, or 0.0.0.0 for every address of this machine")
