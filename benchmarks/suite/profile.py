"""Where the time of a training step goes: the operations that take most of it."""

from functools import partial
from typing import Any

from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.suite.setting import Setting
from benchmarks.suite.train import builders, cases
from benchmarks.timing import finish, release
from benchmarks.train import write_data

STEPS = 3


def measure_profile(setting: Setting, *, top: int = 14) -> list[dict[str, Any]]:
    """The operations of the first case's step by their own time on the device, with their share of all of it."""
    case = cases(setting)[0]
    data = setting.folder / f"profile-{case.side}"
    data.mkdir()
    write_data(data, case.side)
    build, _ = builders(case, data, setting)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setting.on_gpu else [])]
    with build(case.batch_size) as step:
        for _ in range(3):
            step()
        finish(setting.device)
        with profile(activities=activities) as recorded:
            for _ in range(STEPS):
                step()
            finish(setting.device)
    release(setting.device)
    events = [event for event in recorded.key_averages() if not setting.on_gpu or event.device_type == DeviceType.CUDA]
    own = partial(_own_time, on_gpu=setting.on_gpu)
    whole = sum(own(event) for event in events) or 1.0
    chosen = sorted(events, key=own, reverse=True)[:top]
    return [
        {"name": event.key[:100], "share": own(event) / whole, "calls": round(event.count / STEPS, 1)}
        for event in chosen
        if own(event) > 0
    ]


def _own_time(event: Any, *, on_gpu: bool) -> float:
    """Microseconds in the operation itself: kernels on a GPU, else the CPU's."""
    return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)
