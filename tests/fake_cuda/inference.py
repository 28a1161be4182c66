"""All but training traced on the card that computes nothing: samplers, VAE, feature networks, previews; as JSON.

python inference.py LIBGUARD.so [upload]     with the word, a fault is put into every step of a sampler
"""

import contextlib
import json
import sys
from types import SimpleNamespace

# isort: off
from card import CARD, RealOnCpu, Trace, keyed_generators_on_the_card, moved, torch  # before torch

# isort: on
import numpy as np
from diffusers import AutoencoderKL
from torch.utils._python_dispatch import TorchDispatchMode
from traces import MODERN, found, trainer
from transformers import Dinov2Config, Dinov2Model

from benchmarks.extract import VAES
from extract.encoder import Encoder
from extract.feature_network import FeatureNetwork
from pipeline import randomness
from pipeline.checkpoint import Checkpoint
from pipeline.checkpoint.release import default_info
from pipeline.diffusion import GaussianDiffusion, RectifiedFlow, make_process
from pipeline.diffusion.samplers import SAMPLERS
from pipeline.diffusion.schedules import tables_of
from pipeline.dit import DiT, DiTConfig
from pipeline.dit.memory import StepSettings, sampling_memory, step_memory
from pipeline.features.encoder import VisionEncoder
from pipeline.features.manifest import Encoder as AboutEncoder
from pipeline.features.pca import Projection
from pipeline.vae import Vae, keep_layout
from pipeline.vae_lanes import DECODED_PX, ENCODED_PX, PARAMETERS, decoder_bytes, encoder_bytes
from sample import generate
from sample.decode import decode_in_lanes
from sample.edits import Inpainting, Interpolation, Variation
from sample.evaluate import features
from sample.evaluate.inception import FIDInception
from train import losses, previews
from train.options import PreviewOptions

NOT_COMPUTED = (  # what a fake tensor answers to who asks for its values
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "numpy() is not supported for tensor subclasses",
)


def network(config):
    with torch.device("meta"):
        made = DiT(config, seed=None)
    made = moved(made).requires_grad_(False)
    made.to = lambda *_, **__: made
    return made


@contextlib.contextmanager
def until_values_are_asked_for():
    """Pass over the end of a path, where it reads what it has made."""
    try:
        yield
    except Exception as error:
        if not any(name in f"{type(error).__name__}: {error}" for name in NOT_COMPUTED):
            raise


def checkpoint_of(process, *, preset="DiT-Ti/2", side=32, **config):
    config = DiTConfig.from_preset(preset, input_size=side, learn_sigma=process.learns_variance, **config)
    info = default_info(config)
    return Checkpoint(model=network(config), config=config, info=info, process=process, weights="ema", folder=None)


def generator_of(checkpoint, *, sampler="ddpm", steps=4, batch=4, guide=None, edit=None, vae=None, **plan):
    settings = {"eta": 0.0, "guidance": 4.0, "channels": None, "interval": None, "seed": 0, "precision": "bf16", **plan}
    plan = generate.ReversePlan(sampler=sampler, steps=steps, batch_size=batch, **settings)
    return generate.Generator(checkpoint, plan, device="cuda:0", vae=vae, guide=guide, edit=edit)


LATENTS = torch.zeros(4, 4, 32, 32)
WAYS = {
    "interval": {"interval": (0.2, 0.8)},
    "interval of a flow": {"sampler": "heun", "interval": (0.2, 0.8)},
    "three channels": {"channels": 3},
    "eta": {"sampler": "ddim", "eta": 0.5},
    "float32": {"precision": "no"},
    "fp16": {"precision": "fp16"},
    "another network": {"guide": True},
    "middle head": {"source": "middle", "config": {"middle_head": True}},
    "class token": {"config": {"class_token": 768}},
    "both": {"source": "both", "middle_guidance": 1.5, "config": {"middle_head": True}},
    "inpainting": {"edit": Inpainting(latents=LATENTS, anew=torch.ones(32, 32) > 0)},
    "inpainting of a flow": {"sampler": "euler", "edit": Inpainting(latents=LATENTS, anew=torch.ones(32, 32) > 0)},
    "variation": {"sampler": "ddim", "edit": Variation(latents=LATENTS, first=600.0)},
    "interpolation": {"edit": Interpolation(config=DiTConfig(), to_seed=1, to_class=None, in_a_row=4)},
    "SiT": {"sampler": "sde", "process": {"objective": "sit", "path": "cosine"}},
    "modern": {"config": MODERN},
}
"""Ways of sampling beside the samplers themselves."""


def sampling(*, steps, sampler="ddpm", process=None, config=None, guide=None, **settings):
    """The latents of four images on the card: waits and kernels."""
    tables_of.cache_clear()
    with RealOnCpu():
        kinds = {"flow": RectifiedFlow, "ddpm": GaussianDiffusion}
        made = make_process(process) if process else kinds[SAMPLERS[sampler].objective]()
        checkpoint = checkpoint_of(made, **config or {})
        if guide:
            guide = network(checkpoint.config)
        if isinstance(settings.get("edit"), Variation):
            settings["timesteps"] = tuple(float(t) for t in np.linspace(600, 100, steps).round())
        generator = generator_of(checkpoint, sampler=sampler, steps=steps, guide=guide, **settings)
        with Trace() as trace, until_values_are_asked_for():
            generator.latents(0, np.zeros(4, dtype=np.int64))
    return found(trace)


def vae_of(dtype, layout=torch.contiguous_format):
    """Stable Diffusion's VAE on the card."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"):
        model = AutoencoderKL(**blocks, **VAES["sd"], latent_channels=4)
    model = moved(model.requires_grad_(False).eval(), dtype)
    for part in model.modules() if layout is torch.channels_last else ():
        for name, old in part._parameters.items():
            if old is not None and old.ndim == 4:
                new = torch.empty(old.shape, dtype=dtype, device=CARD, memory_format=layout)
                part._parameters[name] = torch.nn.Parameter(new, requires_grad=False)
    keep_layout(model)
    return Vae(
        name="sd", class_name="AutoencoderKL", sha256="", kind="moments", channels=4, downsample=8,
        scaling_factor=0.18215, shift_factor=None, fixed_px=None, device=CARD, dtype=dtype, model=model,
    )  # fmt: skip


class Layouts(TorchDispatchMode):
    """Bytes read and written to change the order in which values lie, before convolutions and norms."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        last, name = torch.channels_last, str(f)
        if "convolution" in name:  # cuDNN copies its input where the weights lie in the other order
            x, weight = args[:2]
            weighs_last = weight.is_contiguous(memory_format=last) and not weight.is_contiguous()
            self.bytes += 2 * x.nbytes * (weighs_last and x.is_contiguous())
        if name == "aten.clone.default" and args[0].ndim == 4 and not args[0].is_contiguous():
            self.bytes += 2 * out.nbytes
        return out


def on_the_card(work, *holding):
    """What `work` does beside what is there already."""
    with RealOnCpu(), Trace() as trace, Layouts() as layouts:
        trace.hold(*holding)
        fixed = trace.alive
        with until_values_are_asked_for():
            work()
    return found(trace) | {"fixed": fixed, "layouts": layouts.bytes}


def held(module):
    return [*module.parameters(), *module.buffers()]


def decoding(vae, images, side):
    """Latents to bytes in one lane, as dit-sample does."""
    with RealOnCpu():
        latents = torch.empty(images, 4, side // 8, side // 8, device=CARD)
    return on_the_card(lambda: decode_in_lanes(vae, latents, size=images, in_lanes=map), held(vae.model), latents)


def encoding(network, images, side):
    """A batch of bytes, both views, to what is stored, as dit-extract does."""
    encoder = Encoder(network, batch_size=images, flip=True, store_dtype=torch.float16, views=2, image_px=side)
    with RealOnCpu():
        encoder._values  # noqa: B018 - sent once, for all batches
    model = network.model if isinstance(network, Vae) else network.encoder.model
    return on_the_card(lambda: encoder._encode(np.zeros((images, 1, side, side, 3), dtype=np.uint8)), held(model))


def vision_encoder():
    """DINOv2-S/14 at 224 px, its patches reduced to 64 numbers."""
    with torch.device("meta"):
        model = Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=224, patch_size=14))
    model = moved(model.requires_grad_(False).eval(), torch.bfloat16)
    mean, std = (torch.empty(3, 1, 1, device=CARD) for _ in range(2))
    about = AboutEncoder(
        name="dino", class_name="Dinov2Model", sha256="", resolution=224, grid=(16, 16), width=384,
        mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
    )  # fmt: skip
    encoder = VisionEncoder(
        about=about, has_cls=True, device=CARD, dtype=torch.bfloat16, mean=mean, std=std, model=model
    )
    projection = Projection(mean=torch.empty(384, device=CARD), components=torch.empty(64, 384, device=CARD))
    return FeatureNetwork(encoder=encoder, projection=projection)


def evaluating(images, side):
    """A batch through the FID network."""
    with RealOnCpu():
        with torch.device("meta"):
            made = FIDInception()
        made = moved(made.requires_grad_(False).eval())
    batch, wanted = np.zeros((images, side, side, 3), dtype=np.uint8), ("features_2048", "spatial", "logits_unbiased")
    return on_the_card(lambda: features._features_of_batch(batch, made, wanted, "cuda:0"), held(made))


FITS = {
    "XL/2": {"preset": "DiT-XL/2"},
    "XL/2 at 512 px": {"preset": "DiT-XL/2", "side": 64, "images": 4},
    "L/4 in float32": {"preset": "DiT-L/4", "precision": "no", "images": 32},
    "S/8": {"preset": "DiT-S/8", "images": 64},
    "Ti/2 in float32": {"preset": "DiT-Ti/2", "precision": "no"},
    "in-context": {"preset": "DiT-B/2", "conditioning": "in-context"},
    "modern": {"preset": "DiT-B/2", **MODERN},
    "modern in float32": {"preset": "DiT-B/2", "precision": "no", **MODERN},
    "wide head": {"preset": "DiT-S/2", "head_width": 1536},
    "wide head in float32": {"preset": "DiT-S/2", "precision": "no", "head_width": 1536},
    "wide head of the network's width": {"preset": "DiT-XL/2", "head_width": 1152},
}
"""Networks, of four blocks each, whose memory in sampling is compared with the formula."""


def fitting(*, images=16, precision="bf16", **config):
    """The peak of sampling so many images in two steps, and what the formula says."""
    tables_of.cache_clear()
    with RealOnCpu():
        checkpoint = checkpoint_of(GaussianDiffusion(), depth=4, **config)
        generator = generator_of(checkpoint, steps=2, batch=images, precision=precision)
    labels = np.zeros(images, dtype=np.int64)
    traced = on_the_card(lambda: generator.latents(0, labels), held(generator.model))
    formula = sampling_memory(checkpoint.config, images, precision=precision)
    return {"peak": traced["peak"], "formula": sum(formula.values())}


def lane_fitting(work, dtype, pixels):
    """The same of a lane of the VAE."""
    formula = {encoding: encoder_bytes, decoding: decoder_bytes}[work]
    with RealOnCpu():
        vae = vae_of(dtype)
    size = 2 if dtype == torch.bfloat16 else 4
    traced = work(vae, pixels // 256**2, 256)
    return {"peak": traced["peak"], "formula": size * PARAMETERS + formula(pixels, value_bytes=size)}


def previewing(side, *, rows=2, **settings):
    """A preview of two or more rows by raw and by averaged weights, beside all that training holds."""
    tables_of.cache_clear()
    with RealOnCpu() as mode:
        with mode.fake:
            made = trainer(side=side, **settings)
            state = made.state.optimizer.state_tensors()
        vae = vae_of(torch.float32)
        previews.find_vae = lambda *_, **__: vae

        manifest = SimpleNamespace(
            latent=SimpleNamespace(height=side, width=side), vae=SimpleNamespace(**vae.describe()), classes=[]
        )
        options = PreviewOptions(sample_every=1, preview_steps=2, preview_rows=rows)
        drawn = previews.Previews(options, manifest, made.config, made.process, made.hardware, folder=None, seed=0)
    whole = [[tensor for tensor in tensors if tensor is not None] for tensors in state.values()]
    standing = [made.state.placement.weights, made.state.averages["ema"].tensors, whole, held(vae.model)]
    traced = on_the_card(lambda: drawn.draw(made.state), *standing)
    formula = step_memory(made.config, StepSettings(images=0, previews=8 * rows))
    return traced | {"formula": sum(formula.values())}


def spoil():
    """Let every pass of a network upload a number and wait for it."""
    real = generate.classifier_free_guidance

    def spoiled(*given, **options):
        denoise = real(*given, **options)
        return lambda x_t, t: denoise(x_t * torch.ones(1).to(x_t.device), t)

    generate.classifier_free_guidance = spoiled


def everything():
    with RealOnCpu():
        vae, last = vae_of(torch.float32), vae_of(torch.float32, torch.channels_last)
        dino = vision_encoder()
    return {
        "samplers": {name: [sampling(steps=steps, sampler=name) for steps in (4, 5)] for name in SAMPLERS},
        "ways": {name: [sampling(steps=steps, **way) for steps in (4, 5)] for name, way in WAYS.items()},
        "decoder": {side: decoding(vae, images, side) for images, side in ((16, 256), (4, 512))},
        "encoder": {side: encoding(vae, images, side) for images, side in ((32, 256), (8, 512))},
        "channels last": {"decoder": decoding(last, 16, 256), "encoder": encoding(last, 32, 256)},
        "feature networks": {"DINOv2-S/14": encoding(dino, 32, 224), "FID": evaluating(32, 256)},
        "previews": {
            "256": previewing(32),
            "512": previewing(64),
            "sampling": previewing(32, rows=8, preset="DiT-XL/2", depth=4),
        },
        "fits": {name: fitting(**settings) for name, settings in FITS.items()}
        | {
            f"{work.__name__} in {dtype}": lane_fitting(work, dtype, pixels)
            for work, pixels in ((encoding, ENCODED_PX), (decoding, DECODED_PX))
            for dtype in (torch.float32, torch.bfloat16)
        },
    }


if __name__ == "__main__":
    keyed_generators_on_the_card(randomness, losses)
    # Without gradients operators reach the modes in the parts they are made of, which in inference mode they do not.
    features.torch = SimpleNamespace(**vars(torch) | {"inference_mode": torch.no_grad})
    if sys.argv[2:]:
        spoil()
        print(json.dumps([sampling(steps=steps) for steps in (4, 5)]))
    else:
        print(json.dumps(everything()))
