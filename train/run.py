"""One sitting of a run: from the options to the exit status, everything opened here and closed again."""

import contextlib
import dataclasses
import time
from pathlib import Path

import numpy as np
import torch

from pipeline.checkpoint.averages import MovingAverage
from pipeline.dit import DiT, compile_blocks
from pipeline.dit.macs import count_macs
from pipeline.latents import LatentStore
from pipeline.runtime.console import say
from pipeline.runtime.errors import UserError
from pipeline.runtime.processes import StopRequest
from train import build, distributed
from train.checkpointing import Saver, TrainState, newest_sound, restore, sweep
from train.data import DataOrder, Share
from train.distributed import Hardware
from train.loop import Parts, logs_at, run_steps
from train.metrics import Log, Pace, refuse_missing_wandb
from train.optimizer import Optimizer
from train.options import TrainOptions
from train.parallel import place
from train.previews import Previews
from train.run_folder import CONFIG, begin_run, check_run, claimed, recorded_intervals
from train.summary import say_summary
from train.validation import Validation


def train(options: TrainOptions) -> int:
    """Train, or go on training, the run that the options describe; the exit status.

    Raises:
        UserError: whatever the user can mend.
    """
    began = time.monotonic()
    refuse_missing_wandb(options)
    machine = distributed.start(options.hardware, trackers=("wandb",) if options.run.wandb_project else ())
    options = _resolved(options, machine)
    try:
        with contextlib.ExitStack() as stack, StopRequest(repeat_after_seconds=2.0) as stop:
            return run_steps(assemble(options, machine, stack, began), stop)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if distributed.is_lost_peer(error):
            raise UserError("another process of this run has ended, and has said why; this one ends too") from error
        if not is_out_of_memory(error):
            raise
        raise UserError(_what_to_lower(options, machine)) from error
    finally:
        machine.close()


def _resolved(options: TrainOptions, machine: Hardware) -> TrainOptions:
    precise = dataclasses.replace(options.hardware, mixed_precision=machine.precision)
    return dataclasses.replace(options, hardware=precise)


def assemble(options: TrainOptions, machine: Hardware, stack: contextlib.ExitStack, began: float) -> Parts:
    """Every part of the run, checked; files stay open until the stack is closed."""
    share = Share(
        batch_size=options.optimizer.batch_size,
        rank=machine.rank,
        processes=machine.processes,
        accumulation=options.hardware.grad_accumulation,
    )
    store = stack.enter_context(contextlib.closing(build.open_store(options.data.latents, options.data)))
    manifest = store.manifest
    process = build.process_of(options.objective)
    config = build.network_config(options.model, manifest, process)
    latents = build.latents_of(manifest, config, machine.device)
    share_out = options.data.validation_share
    held_out = max(1, round(share_out * manifest.samples)) if share_out else 0
    order = DataOrder(manifest.samples, options.data.seed, held_out=held_out, order=options.data.order)
    found = _claim_run(options, machine, stack, build.data_identity(manifest))
    network = DiT(config, seed=options.data.seed)
    if found is None:
        build.start_weights(network, options.model, manifest)
    state = _start_state(network, options, machine)
    origin = "from the beginning"
    if found is not None:
        restore(Path(found), state)
        origin = f"going on after step {state.step:,}"
    say_summary(options, manifest, config, state, machine, share, order, origin=origin)
    validation = _validation(options, store, order, latents, process, machine, stack)
    kept_lines = _lines_kept(options, state.step)
    _begin(options, machine, build.data_identity(manifest))
    saver = Saver(options.run, machine, build.checkpoint_info(options, manifest, config, process))
    saver.saved_step = state.step if found is not None else None
    stack.callback(saver.finish)
    log = None
    if machine.is_main:
        log = Log(options, after_step=state.step, keep_until=kept_lines, accelerator=machine.accelerator)
        stack.callback(log.close)
    return Parts(
        options=options,
        hardware=machine,
        store=store,
        order=order,
        share=share,
        process=process,
        latents=latents,
        state=state,
        saver=saver,
        pace=Pace(),
        log=log,
        validation=validation,
        previews=_previews(options, store, config, process, machine),
        flops_per_image=6.0 * count_macs(config),  # multiply and add, forward and twice as much backward
        deadline=None if options.run.time_limit is None else began + 60 * options.run.time_limit,
    )


def _lines_kept(options: TrainOptions, step: int) -> int:
    """Up to which step the lines logged so far stay: a finished run logs its last step wherever that falls.

    A longer run would not have logged it; but what was logged because its time had come is kept.
    """
    if step >= options.optimizer.steps or logs_at(step, options):
        return step
    intervals = recorded_intervals(options.run.out)
    run = dataclasses.replace(options.run, log_every=intervals.get("log-every", options.run.log_every))
    data = dataclasses.replace(
        options.data, validate_every=intervals.get("validate-every", options.data.validate_every)
    )
    return step if logs_at(step, dataclasses.replace(options, run=run, data=data)) else step - 1


def _claim_run(
    options: TrainOptions, machine: Hardware, stack: contextlib.ExitStack, data_identity: str
) -> Path | None:
    """Hold the run folder, if it suits these options; the checkpoint to go on from."""
    machine.once(lambda: stack.enter_context(claimed(options.run.out)))
    machine.once(lambda: check_run(options, data_identity))
    machine.once(lambda: sweep(options.run.out))
    return None if options.run.overwrite else machine.once(lambda: newest_sound(options.run.out))


def _begin(options: TrainOptions, machine: Hardware, data_identity: str) -> None:
    """Write the run's settings once everything else is found right, and see that every process sees them."""
    machine.once(lambda: begin_run(options, data_identity))
    if not (options.run.out / CONFIG).is_file():
        raise UserError(
            f"process {machine.rank} does not see {options.run.out}; --out must lie on a disk that all machines share"
        )


def _start_state(network: DiT, options: TrainOptions, machine: Hardware) -> TrainState:
    network.gradient_checkpointing = options.model.gradient_checkpointing
    if options.model.compile:
        compile_blocks(network)
    placement = place(network, machine, options.hardware.sharding)
    optimizer = Optimizer(
        placement.weights, options.optimizer, scaled=machine.precision == "fp16", add_up=placement.add_up
    )
    averages = {
        name: MovingAverage(placement.weights, decay=decay, warmup=options.average.ema_warmup)
        for name, decay in options.average.decays.items()
    }
    return TrainState(placement=placement, optimizer=optimizer, averages=averages)


def _validation(
    options: TrainOptions,
    store: LatentStore,
    order: DataOrder,
    latents: build.Latents,
    process: build.Process,
    machine: Hardware,
    stack: contextlib.ExitStack,
) -> Validation | None:
    data = options.data
    indices = order.held_out(data.validation_samples)
    if data.validation is not None:
        held_out = stack.enter_context(contextlib.closing(build.open_store(data.validation, data)))
        build.check_same_kind(store.manifest, held_out.manifest, data.validation)
        every = DataOrder(held_out.manifest.samples, data.seed)
        indices = every.indices(np.arange(min(data.validation_samples, every.samples), dtype=np.int64))
        store = held_out
    if not len(indices):
        return None
    say(f"validation loss on {len(indices):,} held-out samples every {data.validate_every:,} steps")
    return Validation(store, indices, latents, process, machine, seed=data.seed)


def _previews(
    options: TrainOptions,
    store: LatentStore,
    config: build.DiTConfig,
    process: build.Process,
    machine: Hardware,
) -> Previews | None:
    if not options.preview.sample_every:
        return None
    previews = Previews(
        options.preview,
        store.manifest,
        config,
        process,
        machine,
        folder=options.run.out / "samples",
        seed=options.data.seed,
    )
    return previews if previews.possible else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out, on a GPU or on the host."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text


def _what_to_lower(options: TrainOptions, machine: Hardware) -> str:
    parts = options.hardware.grad_accumulation
    ways = [f"raise --grad-accumulation (now {parts}), which keeps the batch", "lower --batch-size"]
    if not options.model.gradient_checkpointing:
        ways.insert(1, "pass --gradient-checkpointing")
    if machine.precision == "no" and machine.device.type == "cuda":
        ways.append("use --mixed-precision bf16")
    if machine.processes > 1 and options.hardware.sharding == "none":
        ways.append("divide the network with --sharding fsdp")
    micro = options.optimizer.batch_size // (machine.processes * parts)
    return (
        f"memory ran out on {machine.device} with {options.model.model} and {micro} samples per process at a time; "
        f"{', or '.join(ways)}"
    )
