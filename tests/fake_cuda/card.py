"""A GPU that computes nothing: fake tensors of cuda:0 in a CPU build, every wait, upload, kernel and byte noted.

Import this before torch is loaded anywhere, in a process of its own: `load(library)` installs the guard that guard.cpp
builds. FakeTensor raises where devices mix and where Python reads a value from the card.
"""

import contextlib
import ctypes
import functools
import sys
import weakref
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
READS = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.equal.default", "aten.masked_select.default"}
NO_KERNEL = {"aten.detach.default", "aten.alias.default", "prim.device.default"}

assert "torch" not in sys.modules, "the hooks are looked up once, when torch is loaded"
_library = ctypes.CDLL(sys.argv[1])
_library.install_idle_guard()

import torch  # noqa: E402 - the guard goes first
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

CARD = torch.device("cuda", 0)
_attention_of_cpu = functional.scaled_dot_product_attention


def attention(q, k, v, **options):
    """The kernel that a card of capability 8 takes: flash at 16 bits, memory-efficient in float32."""
    if not q.is_cuda:
        return _attention_of_cpu(q, k, v, **options)
    assert not any(options.get(name) for name in ("attn_mask", "dropout_p", "is_causal"))
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
    if q.dtype in {torch.bfloat16, torch.float16}:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    kept = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, kept)[0]


_shapes = torch.library.Library("aten", "IMPL")  # what this operator has no rule for: it changes its first argument
_shapes.impl("_fused_sgd_", lambda *_, **__: None, "Meta")
functional.scaled_dot_product_attention = attention
torch.cuda.amp.common.amp_definitely_not_available = lambda: False
torch.cuda.is_bf16_supported = lambda including_emulation=True: True
torch.cuda._lazy_init = lambda: None
torch.cuda.set_device = lambda _device: None
torch.Tensor.pin_memory = lambda self, *_: self


class CardGenerator(torch.Generator):
    """A CPU generator that says it is on the card."""

    @property
    def device(self):
        return CARD


def keyed_generators_on_the_card(randomness, *users):
    """Let `randomness.generator` give generators that say they are on the card, also where it was imported by name."""
    real = randomness.generator

    def generator(seed, purpose, *numbers, device="cpu"):
        if torch.device(device).type != "cuda":
            return real(seed, purpose, *numbers)
        made = CardGenerator()
        made.manual_seed(randomness.derive_seed(seed, purpose, *numbers))
        return made

    for module in (randomness, *users):
        assert hasattr(module, "generator"), module
        module.generator = generator


def put(module, change, recurse=True, *, change_buffer=None):
    """Replace every parameter, and by the same or a rule of their own every buffer, as torch cannot for fake ones."""
    for part in module.modules() if recurse else [module]:
        for name, old in part._parameters.items():
            if old is not None:
                with torch.no_grad():
                    part._parameters[name] = torch.nn.Parameter(change(old), requires_grad=old.requires_grad)
        for name, old in part._buffers.items():
            if old is not None:
                part._buffers[name] = (change_buffer or change)(old)
    return module


def moved(module, dtype=None):
    """The module with fake parameters and buffers on the card, of the shapes they have; call it in a fake mode."""
    return put(
        module,
        lambda old: torch.empty(old.shape, dtype=dtype or old.dtype, device=CARD),
        change_buffer=lambda old: torch.empty(old.shape, dtype=old.dtype, device=CARD),
    )


def involves_the_card(args, kwargs):
    """Whether one of a call's tensors is fake, or a device among its arguments is the card."""
    return any(
        isinstance(leaf, FakeTensor) or (isinstance(leaf, torch.device) and leaf.type == "cuda")
        for leaf in tree_leaves((args, kwargs))
    )


class RealOnCpu(TorchDispatchMode):
    """Fake where the card is involved, real elsewhere, so that tables and schedulers on the CPU may be read."""

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self.fake if involves_the_card(args, kwargs) else contextlib.nullcontext():
            return f(*args, **kwargs)


class Trace(TorchDispatchMode):
    """Kernels that would be launched, values that Python reads, uploads that make the host wait, and bytes alive."""

    def __init__(self):
        super().__init__()
        self.kernels, self.reads, self.uploads = Counter(), Counter(), Counter()
        self.alive = self.peak = 0
        self._storages = {}

    def hold(self, *values):
        """Count storages that are there already."""
        for value in tree_leaves(values):
            if isinstance(value, torch.Tensor) and value.device.type == "cuda":
                storage = value.untyped_storage()
                if id(storage) not in self._storages:
                    size = -(-storage.nbytes() // 512) * 512  # as the caching allocator rounds
                    freed = functools.partial(self._free, id(storage), size)
                    self._storages[id(storage)] = weakref.ref(storage, lambda _, freed=freed: freed())
                    self.alive += size
        self.peak = max(self.peak, self.alive)

    def _free(self, key, size):
        del self._storages[key]
        self.alive -= size

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = f(*args, **kwargs)
        name = str(f)
        places = [leaf.device.type for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        if "cuda" in places:
            if not f.is_view and name not in NO_KERNEL:
                self.kernels[name] += 1
            self._note_copies(name, args, kwargs, out)
        self.hold(out)
        return out

    def _note_copies(self, name, args, kwargs, out):
        if name in READS:
            self.reads[f"{name} at {_place()}"] += 1
        if name == "aten._to_copy.default":
            source, target, waits = args[0].device.type, out.device.type, not kwargs.get("non_blocking")
        elif name == "aten.copy_.default":
            source, target = args[1].device.type, args[0].device.type
            waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        else:
            return
        if source != target and waits:
            (self.reads if target == "cpu" else self.uploads)[f"{source} to {target} at {_place()}"] += 1


def _place():
    """The two innermost lines of the project that led here."""
    frame, found = sys._getframe(3), []
    while frame is not None and len(found) < 2:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "tests") and ".venv" not in path.parts:
            found.append(f"{path.relative_to(ROOT)}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(found) or "a library"
