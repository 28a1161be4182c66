"""One run of the command: from the options to the exit status, everything opened here and closed again."""

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from pipeline.checkpoint.averages import MovingAverage, PowerAverage
from pipeline.checkpoint.folder import CONFIG
from pipeline.checkpoint.mirror import Mirror
from pipeline.checkpoint.snapshots import stem_of
from pipeline.diffusion import Process
from pipeline.dit import DiT, DiTConfig, compile_blocks
from pipeline.dit.macs import count_macs, count_parameters
from pipeline.dit.matrices import count_in_matrices
from pipeline.dit.model import on_meta, starting_weights
from pipeline.features.store import FeatureStore
from pipeline.features.targets import TokenNormalization
from pipeline.latents import LatentStore, Manifest
from pipeline.runtime.console import refuse_unless, say, warn
from pipeline.runtime.devices import memory_explained
from pipeline.runtime.errors import UserError
from pipeline.runtime.launchers import wishes
from pipeline.runtime.processes import StopRequest
from pipeline.runtime.units import size
from train import build, distributed, memory
from train.checkpointing import Saver, TrainState, restore
from train.data import BatchShard, DataOrder
from train.distributed import Hardware
from train.kept_checkpoints import clean_up, newest_sound, superfluous, sweep, tells_skips
from train.loop import Trainer, logs_at, run_steps
from train.losses import LatentNormalization
from train.metrics import Log, StepTimer, refuse_missing_trackers, tracker_names
from train.optimizer import Optimizer
from train.options import TrainOptions
from train.parallel import parallelize, shard_processes
from train.previews import Previews
from train.run_folder import begin_run, check_mirrored, check_run, claimed, recorded_intervals
from train.summary import describe_work, say_aligned, say_summary
from train.validation import Validation


def train(options: TrainOptions) -> int:
    """Train, or go on training, the run that the options describe; the exit status.

    Raises:
        UserError: whatever the user can mend.
    """
    began = time.monotonic()
    refuse_missing_trackers(options)
    machine = distributed.start(options.hardware, trackers=tracker_names(options.run))
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
            trainer = assemble(options, machine, stack, began)
            status = run_steps(trainer, stop)
            machine.on_main(lambda: _bring_up(trainer.saver.mirror, options, status))
    except RuntimeError as error:
        explained = distributed.explain_lost_peer(error, options.hardware.process_timeout)
        if explained is None:
            raise
        raise UserError(explained) from error
    machine.close()
    return status


def _forecast(options: TrainOptions, machine: Hardware) -> None:
    """Say what would be trained and what it takes, from the store and the settings alone."""
    shard = _shard(options, machine)
    with contextlib.closing(build.open_store(options.data.latents, options.data)) as store:
        manifest = build.as_fed(store.manifest, options.data)
        features = build.open_features(options, manifest)
        config = build.network_config(options.model, manifest, build.process_of(options.objective, manifest), features)
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
        rest = f"; its {' and '.join(asked.dynamo_settings)} is left out" if asked.dynamo_settings else ""
        say(f"note: the launcher's dynamo wish is followed as --compile, which compiles block by block{rest}")
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
    manifest = build.as_fed(store.manifest, options.data)
    process = build.process_of(options.objective, manifest)
    features = build.open_features(options, manifest)
    config = build.network_config(options.model, manifest, process, features)
    normalization = build.normalization_of(manifest, machine.device)
    order = _order(options, manifest)
    memory.refuse_too_small_a_card(
        config,
        memory.settings_of(options, machine),
        memory.device_bytes(machine.device),
        allowed=options.run.anyway,
    )

    # The run that is there, or a new one; nothing is written yet.
    identity = build.data_identity(store.manifest, features)
    mirror = _open_mirror(options, machine, stack)
    found = _claim_run(options, machine, stack, identity, mirror)
    is_adapted = found is None and options.model.init_from is not None
    network = _network(config, options, machine, is_whole=is_adapted)
    if found is None:
        build.refuse_too_wide_latents(config, process, allowed=options.run.anyway)
        build.start_weights(network, options.model, manifest, process)
    state = _start_state(network, options, machine)
    if found is not None:
        restore(Path(found), state)
    origin = "from the beginning" if found is None else f"going on after step {state.step:,}"
    say_summary(options, manifest, config, state, machine, shard, order, origin=origin)
    class_token = build.token_normalization(features, config, found, machine.device)
    beside = None if features is None or class_token is None else (features, class_token)
    validation = _validation(options, store, order, normalization, process, config, machine, stack, tokens=beside)
    kept_lines = _lines_kept(options, state.step)

    # All is found right: from here on the folder is this run's.
    if options.run.overwrite:
        machine.on_main(lambda: _check_room(options, config))
    _begin(options, machine, identity, mirror)
    machine.on_main(lambda: clean_up(options.run))
    info = build.checkpoint_info(options, manifest, config, process, features, class_token, identity)
    saver = Saver(options.run, machine, info, mirror, _writers(options, machine))
    saver.saved_step = state.step if found is not None else None
    stack.callback(saver.finish)
    log = None
    if machine.is_main:
        log = Log(options, after_step=state.step, keep_until=kept_lines, accelerator=machine.accelerator)
        stack.callback(log.close)
    previews = _previews(options, manifest, config, process, machine)
    return Trainer(
        options=options,
        hardware=machine,
        store=store,
        order=order,
        shard=shard,
        process=process,
        normalization=normalization,
        feature_store=features,
        features=build.feature_targets(features, config, machine.device),
        class_token=class_token,
        state=state,
        saver=saver,
        timer=StepTimer(),
        log=log,
        validate=validation.losses if validation is not None else None,
        preview=previews.draw if previews is not None else None,
        flops_per_image=6.0 * count_macs(config),  # multiply and add, forward and twice as much backward
        deadline=None if options.run.time_limit is None else began + 60 * options.run.time_limit,
    )


def _writers(options: TrainOptions, machine: Hardware) -> Hardware | None:
    """The processes apart, where each is to write a part of every checkpoint."""
    several = options.run.sharded_checkpoints and machine.processes > 1
    return machine.apart(options.hardware.process_timeout) if several else None


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


def _open_mirror(options: TrainOptions, machine: Hardware, stack: contextlib.ExitStack) -> Mirror | None:
    """The copy at --mirror, on the main process, which alone sees to it."""
    url, run, opened = options.run.mirror, options.run, list[Mirror]()

    def superfluous_there(steps: Sequence[int], trainer_of: Callable[[int], bytes | None]) -> list[int]:
        return superfluous(run, steps, lambda step: tells_skips(trainer_of(step)))

    if url is not None:
        machine.on_main(lambda: opened.append(Mirror(url, run.out, superfluous_there)))
    for mirror in opened:
        stack.callback(mirror.close)
    return opened[0] if opened else None


def _bring_up(mirror: Mirror | None, options: TrainOptions, status: int) -> None:
    """Have all of the run at --mirror; where that fails, the command does, if it has not ended otherwise already."""
    if mirror is None:
        return
    try:
        mirror.finish()
        clean_up(options.run)  # of what was going up while it would have been removed
    except UserError as error:
        if not status:
            raise UserError(f"the run is whole in --out, but its copy at --mirror is behind: {error}") from error
        warn(f"the copy at --mirror is behind: {error}")


def _claim_run(
    options: TrainOptions, machine: Hardware, stack: contextlib.ExitStack, data_identity: str, mirror: Mirror | None
) -> Path | None:
    """Hold the run folder, if it suits these options; the checkpoint to go on from, which may come from the mirror."""
    overwrite = options.run.overwrite
    machine.on_main(lambda: stack.enter_context(claimed(options.run.out)))
    machine.on_main(lambda: check_run(options, data_identity))
    if options.run.mirror is not None:
        check = partial(check_mirrored, options=options, data_identity=data_identity)
        machine.on_main(lambda: None if mirror is None else mirror.fetch(check, overwrite=overwrite))
    machine.on_main(lambda: sweep(options.run.out))
    return None if overwrite else machine.on_main(lambda: newest_sound(options.run.out))


def _begin(options: TrainOptions, machine: Hardware, data_identity: str, mirror: Mirror | None) -> None:
    """Write the run's settings once everything else is found right, and see that every process sees them."""
    machine.on_main(lambda: begin_run(options, data_identity))
    if not (options.run.out / CONFIG).is_file():
        raise UserError(
            f"process {machine.rank} does not see {options.run.out}; --out must lie on a disk that all machines share"
        )
    machine.on_main(lambda: None if mirror is None else mirror.begin())


def _shard(options: TrainOptions, machine: Hardware) -> BatchShard:
    return BatchShard(
        batch_size=options.optimizer.batch_size,
        rank=machine.rank,
        processes=machine.processes,
        accumulation=options.hardware.grad_accumulation,
    )


def checkpoint_bytes(options: TrainOptions, config: DiTConfig) -> int:
    """A checkpoint on disk: weights, two tensors of AdamW's or one of Muon's, averages; all float32."""
    spared = count_in_matrices(config) if options.optimizer.optimizer == "muon" else 0
    return 4 * ((3 + options.average.count) * count_parameters(config) - spared)


def _check_room(options: TrainOptions, config: DiTConfig) -> None:
    """Raise UserError unless a first checkpoint fits beside the run that is to be replaced by it."""
    needed, free = checkpoint_bytes(options, config), shutil.disk_usage(options.run.out).free
    if (options.run.out / CONFIG).is_file() and needed > free:
        refuse_unless(
            options.run.anyway,
            f"{options.run.out} has {free / 1e9:.1f} GB free, but a checkpoint takes {needed / 1e9:.1f} GB and the "
            f"run that --overwrite replaces stays until there is one; free some space or choose another --out",
        )


def _network(config: DiTConfig, options: TrainOptions, machine: Hardware, *, is_whole: bool) -> DiT:
    """The network with its first weights; without any where it is to be divided, unless it `is_whole` first."""
    divided = shard_processes(options.hardware, machine.processes) > 1
    return on_meta(config) if divided and not is_whole else DiT(config, seed=options.data.seed)


def _start_state(network: DiT, options: TrainOptions, machine: Hardware) -> TrainState:
    network.gradient_checkpointing = options.model.gradient_checkpointing
    if options.model.compile:
        torch._dynamo.config.optimize_ddp = False  # it would cut each block, compiled on its own, into three graphs
        compile_blocks(network)
    is_empty = next(network.parameters()).is_meta
    placement = parallelize(network, machine, shard_processes(options.hardware, machine.processes))
    if is_empty:
        placement.put(starting_weights(placement.shapes, network.config, options.data.seed), placement.weights)
    optimizer = Optimizer(
        placement.weights,
        options.optimizer,
        scaled=machine.precision == "fp16",
        add_up=placement.add_up,
        shapes=placement.shapes,
        shared_out=placement.shared_out,
    )
    averages = {
        name: MovingAverage(placement.weights, decay=decay, warmup=options.average.ema_warmup)
        for name, decay in options.average.decays.items()
    } | {stem_of(sigma): PowerAverage(placement.weights, sigma=sigma) for sigma in options.average.sigmas}
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
    *,
    tokens: tuple[FeatureStore, TokenNormalization] | None,
) -> Validation | None:
    data = options.data
    indices = order.held_out(data.validation_samples)
    if data.validation is not None:
        held_out = stack.enter_context(contextlib.closing(build.open_store(data.validation, data)))
        build.check_same_kind(store.manifest, held_out.manifest, data.validation)
        every = DataOrder(held_out.manifest.samples, data.seed)
        indices = every.indices(np.arange(min(data.validation_samples, every.samples), dtype=np.int64))
        if tokens is not None:
            tokens = build.held_out_tokens(data.validation, held_out.manifest, options, tokens[0]), tokens[1]
        store = held_out
    if not len(indices):
        return None
    say(f"validation loss on {len(indices):,} held-out samples every {data.validate_every:,} steps")
    return Validation(
        store,
        indices,
        normalization,
        process,
        machine,
        null_class=config.null_class,
        seed=data.seed,
        tokens=tokens,
    )


def _previews(
    options: TrainOptions,
    manifest: Manifest,
    config: DiTConfig,
    process: Process,
    machine: Hardware,
) -> Previews | None:
    if not options.preview.sample_every:
        return None
    previews = Previews(
        options.preview,
        manifest,
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
        f"memory ran out on {machine.device} with {options.model.title} and {micro} samples per process at a time; "
        f"{', or '.join(ways)}"
    )
