"""One run of the command: from the options to the exit status, everything opened here and closed again."""

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from pipeline.checkpoint.averages import MovingAverage
from pipeline.diffusion import Process
from pipeline.dit import DiT, DiTConfig, compile_blocks
from pipeline.dit.macs import count_macs, count_parameters
from pipeline.latents import LatentStore, Manifest
from pipeline.runtime.console import refuse_unless, say
from pipeline.runtime.devices import memory_explained
from pipeline.runtime.errors import UserError
from pipeline.runtime.launchers import wishes
from pipeline.runtime.processes import StopRequest
from pipeline.runtime.units import size
from train import build, distributed, memory
from train.checkpointing import Saver, TrainState, restore
from train.data import BatchShard, DataOrder
from train.distributed import Hardware
from train.kept_checkpoints import clean_up, newest_sound, sweep
from train.loop import Trainer, logs_at, run_steps
from train.losses import LatentNormalization
from train.metrics import Log, StepTimer, refuse_missing_wandb
from train.optimizer import Optimizer
from train.options import TrainOptions
from train.parallel import parallelize
from train.previews import Previews
from train.run_folder import CONFIG, begin_run, check_run, claimed, recorded_intervals
from train.summary import describe_work, say_aligned, say_summary
from train.validation import Validation


def train(options: TrainOptions) -> int:
    """Train, or go on training, the run that the options describe; the exit status.

    Raises:
        UserError: whatever the user can mend.
    """
    began = time.monotonic()
    refuse_missing_wandb(options)
    machine = distributed.start(options.hardware, trackers=("wandb",) if options.run.wandb_project else ())
    if options.run.dry_run:
        _forecast(follow_launcher(options), machine)
        machine.close()
        return 0
    options = _resolved(options, machine)
    try:
        with (
            memory_explained(lambda: _what_to_lower(options, machine)),
            contextlib.ExitStack() as stack,
            StopRequest(repeat_after_seconds=2.0) as stop,
        ):
            status = run_steps(assemble(options, machine, stack, began), stop)
    except RuntimeError as error:
        explained = distributed.explain_lost_peer(error)
        if explained is None:
            raise
        raise UserError(explained) from error
    machine.close()
    return status


def _forecast(options: TrainOptions, machine: Hardware) -> None:
    """Say what would be trained and what it takes, from the store and the settings alone."""
    shard = _shard(options, machine)
    with contextlib.closing(build.open_store(options.data.latents, options.data)) as store:
        manifest = store.manifest
        config = build.network_config(options.model, manifest, build.process_of(options.objective))
        order = _order(options, manifest)
    checkpoint = size(checkpoint_bytes(options, config))
    say_aligned(
        describe_work(options, manifest, config, machine, shard, order)
        | memory.describe(config, memory.settings_of(options, machine))
        | {"checkpoints": f"{checkpoint} each in {options.run.out}", "run": "nothing was written (--dry-run)"}
    )


def _resolved(options: TrainOptions, machine: Hardware) -> TrainOptions:
    hardware = dataclasses.replace(options.hardware, mixed_precision=machine.precision)
    return follow_launcher(dataclasses.replace(options, hardware=hardware))


def follow_launcher(options: TrainOptions, environment: Mapping[str, str] = os.environ) -> TrainOptions:
    """The options with the launcher's wishes for compiling and accumulation in them, each said; flags go first."""
    asked, model, hardware = wishes(environment), options.model, options.hardware
    if asked.dynamo == "inductor" and not model.compile:
        say("note: the launcher's dynamo wish is followed as --compile, which compiles block by block")
        model = dataclasses.replace(model, compile=True)
    elif asked.dynamo not in {None, "inductor"}:
        say(f"note: the launcher's dynamo backend {asked.dynamo} is left out; --compile compiles with inductor")
    if asked.accumulation and hardware.grad_accumulation == 1:
        say(f"note: the launcher's accumulation is followed as --grad-accumulation {asked.accumulation}")
        hardware = dataclasses.replace(hardware, grad_accumulation=asked.accumulation)
    elif asked.accumulation not in {None, hardware.grad_accumulation}:
        say(f"note: --grad-accumulation {hardware.grad_accumulation} goes before the launcher's {asked.accumulation}")
    return dataclasses.replace(options, model=model, hardware=hardware)


def assemble(options: TrainOptions, machine: Hardware, stack: contextlib.ExitStack, began: float) -> Trainer:
    """Everything of the run, checked; files stay open until the stack is closed."""
    # What is learned from, and by what.
    shard = _shard(options, machine)
    store = stack.enter_context(contextlib.closing(build.open_store(options.data.latents, options.data)))
    manifest = store.manifest
    process = build.process_of(options.objective)
    config = build.network_config(options.model, manifest, process)
    normalization = build.normalization_of(manifest, machine.device)
    order = _order(options, manifest)
    memory.refuse_too_small_a_card(
        config,
        memory.settings_of(options, machine),
        memory.device_bytes(machine.device),
        allowed=options.run.anyway,
    )

    # The run that is there, or a new one; nothing is written yet.
    identity = build.data_identity(manifest)
    found = _claim_run(options, machine, stack, identity)
    network = DiT(config, seed=options.data.seed)
    if found is None:
        build.start_weights(network, options.model, manifest, process)
    state = _start_state(network, options, machine)
    if found is not None:
        restore(Path(found), state)
    origin = "from the beginning" if found is None else f"going on after step {state.step:,}"
    say_summary(options, manifest, config, state, machine, shard, order, origin=origin)
    validation = _validation(options, store, order, normalization, process, config, machine, stack)
    kept_lines = _lines_kept(options, state.step)

    # All is found right: from here on the folder is this run's.
    if options.run.overwrite:
        machine.on_main(lambda: _check_room(options, config))
    _begin(options, machine, identity)
    machine.on_main(lambda: clean_up(options.run))
    saver = Saver(options.run, machine, build.checkpoint_info(options, manifest, config, process))
    saver.saved_step = state.step if found is not None else None
    stack.callback(saver.finish)
    log = None
    if machine.is_main:
        log = Log(options, after_step=state.step, keep_until=kept_lines, accelerator=machine.accelerator)
        stack.callback(log.close)
    previews = _previews(options, store, config, process, machine)
    return Trainer(
        options=options,
        hardware=machine,
        store=store,
        order=order,
        shard=shard,
        process=process,
        normalization=normalization,
        state=state,
        saver=saver,
        timer=StepTimer(),
        log=log,
        validate=validation.losses if validation is not None else None,
        preview=previews.draw if previews is not None else None,
        flops_per_image=6.0 * count_macs(config),  # multiply and add, forward and twice as much backward
        deadline=None if options.run.time_limit is None else began + 60 * options.run.time_limit,
    )


def _order(options: TrainOptions, manifest: Manifest) -> DataOrder:
    share = options.data.validation_share
    held_out = max(1, round(share * manifest.samples)) if share else 0
    return DataOrder(manifest.samples, options.data.seed, held_out=held_out, order=options.data.order)


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
    machine.on_main(lambda: stack.enter_context(claimed(options.run.out)))
    machine.on_main(lambda: check_run(options, data_identity))
    machine.on_main(lambda: sweep(options.run.out))
    return None if options.run.overwrite else machine.on_main(lambda: newest_sound(options.run.out))


def _begin(options: TrainOptions, machine: Hardware, data_identity: str) -> None:
    """Write the run's settings once everything else is found right, and see that every process sees them."""
    machine.on_main(lambda: begin_run(options, data_identity))
    if not (options.run.out / CONFIG).is_file():
        raise UserError(
            f"process {machine.rank} does not see {options.run.out}; --out must lie on a disk that all machines share"
        )


def _shard(options: TrainOptions, machine: Hardware) -> BatchShard:
    return BatchShard(
        batch_size=options.optimizer.batch_size,
        rank=machine.rank,
        processes=machine.processes,
        accumulation=options.hardware.grad_accumulation,
    )


def checkpoint_bytes(options: TrainOptions, config: DiTConfig) -> int:
    """A checkpoint on disk: weights, two tensors of AdamW's, averages; all float32."""
    return 4 * (3 + len(options.average.decays)) * count_parameters(config)


def _check_room(options: TrainOptions, config: DiTConfig) -> None:
    """Raise UserError unless a first checkpoint fits beside the run that is to be replaced by it."""
    needed, free = checkpoint_bytes(options, config), shutil.disk_usage(options.run.out).free
    if (options.run.out / CONFIG).is_file() and needed > free:
        refuse_unless(
            options.run.anyway,
            f"{options.run.out} has {free / 1e9:.1f} GB free, but a checkpoint takes {needed / 1e9:.1f} GB and the "
            f"run that --overwrite replaces stays until there is one; free some space or choose another --out",
        )


def _start_state(network: DiT, options: TrainOptions, machine: Hardware) -> TrainState:
    network.gradient_checkpointing = options.model.gradient_checkpointing
    if options.model.compile:
        torch._dynamo.config.optimize_ddp = False  # it would cut each block, compiled on its own, into three graphs
        compile_blocks(network)
    placement = parallelize(network, machine, options.hardware.sharding)
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
    normalization: LatentNormalization,
    process: Process,
    config: DiTConfig,
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
    return Validation(store, indices, normalization, process, machine, null_class=config.null_class, seed=data.seed)


def _previews(
    options: TrainOptions,
    store: LatentStore,
    config: DiTConfig,
    process: Process,
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
