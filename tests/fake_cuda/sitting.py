"""The sitting rehearsed on the card that computes nothing: every piece runs to its rows, whose figures mean nothing.

python sitting.py LIBGUARD.so [mix] [PIECE …]     all pieces, or those whose names begin so

With "mix", the noise of the plain sampling loop stays on the CPU.

What is read from the card is made up (ones); code for a GPU is not compiled. So what is seen is what a first sitting
would stumble over: devices that mix, names that are not there, shapes that do not fit, rows that cannot be written.
"""

import json
import tempfile
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

# isort: off
from card import CARD, CardGenerator, FakeTensor, FakeTensorMode, involves_the_card, put, torch  # before torch

# isort: on
import sys

from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from benchmarks import sample, sitting
from benchmarks.machine import Ceilings, Setting
from benchmarks.report import part_table
from benchmarks.timing import Spread

COMMANDS = ("processes",)
"""Parts that start commands of their own, which know nothing of this card."""
_aten = torch.ops.aten


class MadeUp(TorchDispatchMode):
    """Fake where the card is involved, real elsewhere; what comes back from the card is made of ones."""

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._one_at_a_time = threading.RLock()

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        if not involves_the_card(args, kwargs):
            return f(*args, **kwargs)
        if f is _aten._local_scalar_dense.default:
            return torch.ones((), dtype=args[0].dtype).item()
        if f is _aten.equal.default:
            return True
        if f is _aten.copy_.default and not isinstance(args[0], FakeTensor):
            return args[0].fill_(1)
        if f is _aten._to_copy.default and torch.device(kwargs.get("device") or CARD).type == "cpu":
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if f is _aten.nonzero.default:
            return self._on_the_card(_aten.zeros.default, [0, args[0].ndim], dtype=torch.long, device=CARD)
        return self._on_the_card(f, *args, **kwargs)

    def _on_the_card(self, f, *args, **kwargs):
        with self._one_at_a_time:
            args, kwargs = tree_map(self._faked, (args, kwargs))
        with self._one_at_a_time, self.fake:
            return f(*args, **kwargs)

    def _faked(self, leaf):
        """Without its values, which a fake tensor would compute on."""
        real = isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor)
        return self.fake.from_tensor(leaf.detach()) if real else leaf


_Generator = torch.Generator


class EitherGenerator(_Generator):
    """What torch.Generator gives: one of the CPU's that says where it is."""

    def __new__(cls, device="cpu"):
        return CardGenerator() if torch.device(device).type == "cuda" else _Generator()


class Event:
    """Between two of them a thousandth of a second lies."""

    def __init__(self, **_):
        pass

    def record(self, *_):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, _other):
        return 1.0


def pretend():
    """A card with 80 GB, which is idle."""
    cuda = torch.cuda
    about = SimpleNamespace(name="a card that computes nothing", total_memory=80 * 2**30, major=9, minor=0)
    cuda.get_device_properties = lambda *_: about
    cuda.get_device_name = lambda *_: about.name
    cuda.get_device_capability = lambda *_: (9, 0)
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.mem_get_info = lambda *_: (79 * 2**30, 80 * 2**30)
    cuda.memory_allocated = lambda *_: 0
    cuda.max_memory_allocated = lambda *_: 2**30
    cuda.Event = Event
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        setattr(cuda, name, lambda *_: None)
    torch.nn.Module._apply = put
    torch.Generator = EitherGenerator
    _device_constructors()  # it remembers the function that goes next
    on_the_host = torch.tensor
    torch.tensor = lambda data, **how: (
        on_the_host(data, **{**how, "device": "cpu"}).to(CARD)
        if torch.device(how.get("device") or "cpu").type == "cuda"
        else on_the_host(data, **how)
    )
    torch.compile = lambda model=None, **_: model if model is not None else (lambda f: f)
    torch.nn.Module.compile = lambda self, *_, **__: None


CEILINGS = Ceilings(**dict.fromkeys(
    ("fp32", "tf32", "bf16", "copy", "upload"), Spread(median=1e12, least=1e12, greatest=1e12, count=1)
))  # fmt: skip


def rehearse(unit, folder):
    """The rows of a piece as a table, or why there are none."""
    place = Path(tempfile.mkdtemp(dir=folder))
    setting = Setting(device=CARD, ceilings=CEILINGS, folder=place, quick=True)
    pieces = __import__(unit.module, fromlist=["pieces"]).pieces(setting)
    mode, run = MadeUp(), threading.Thread.run

    def run_within(thread):
        with mode:
            run(thread)

    with mode, mock.patch.object(threading.Thread, "run", run_within):
        rows = pieces[unit.piece]()
    return part_table(rows) if rows else "nothing to measure"


def main():
    pretend()
    chosen, found, failed = sys.argv[2:], {}, {}
    if "mix" in chosen:
        chosen.remove("mix")
        sample.noise = lambda shape, race, *_: torch.zeros(race.batch_size, *shape)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(device=CARD, ceilings=CEILINGS, folder=Path(folder), quick=True)
        for unit in sitting.units(setting):
            if unit.part in COMMANDS or (chosen and not any(unit.name.startswith(name) for name in chosen)):
                continue
            began = time.monotonic()
            try:
                found[unit.name] = rehearse(unit, folder)
            except Exception as error:  # noqa: BLE001 - it is one line of the findings
                traceback.print_exc()
                failed[unit.name] = f"{type(error).__name__}: {error}"[:500]
            print(f"{unit.name}: {time.monotonic() - began:.1f} s {failed.get(unit.name, '')}"[:300], file=sys.stderr)
    print(json.dumps({"rows": found, "failed": failed}))


if __name__ == "__main__":  # a piece may start processes of its own
    main()
