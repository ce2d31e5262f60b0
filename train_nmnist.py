"""Train and test a spiking network on N-MNIST.

python train_nmnist.py --model cnn                           # train, then test the best checkpoint
python train_nmnist.py --model resnet --epochs 15 --batch_size 64 --scheduler
python train_nmnist.py --model cnn --resume                  # continue the last run where it stopped
python train_nmnist.py --model cnn --test_only --visualize   # test the best checkpoint, with figures
python train_nmnist.py --model cnn --seed 0 1 2 3 4          # train five networks, and compare them in a table
python train_nmnist.py --model cnn --no_spikes               # train the same network with ReLU in place of neurons
torchrun --nproc_per_node=2 train_nmnist.py --model cnn      # train in two processes, on two GPUs where there are
"""

import utils  # must be first: Ctrl-C during the slow imports below exits with one line

# isort: split
import argparse
import contextlib
import copy
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import snntorch.functional as SF
import torch
from sklearn.metrics import confusion_matrix
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import nmnist
from models import (
    BACKENDS,
    NETWORKS,
    NUM_DIGITS,
    READOUTS,
    ActivityMeter,
    NetworkConfig,
    SpikingNetwork,
    build_model,
    confidence,
    describe_backend,
    energy_uj,
    fit_temperature,
    leading,
    load_network,
    predict,
    predict_over_time,
)
from nmnist import Data, Frames
from utils import UserError, add_flag, number

DEFAULT_LR = {"adam": 5e-3, "adamw": 5e-3, "sgd": 0.1}
EXIT_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)  # confidences of an early exit
EXIT_THRESHOLD = 0.9  # the one of the table of predictions
EMA_STEPS = 100  # training steps over which the weights are averaged
LOSSES = {
    "ce": SF.ce_rate_loss,  # cross entropy of the membrane potentials at every time step, averaged
    "mse": SF.mse_count_loss,  # squared error of the spike counts: T for the correct digit, 0 for the others
    "count": SF.ce_count_loss,  # cross entropy of the spike counts, scaled by COUNT_RANGE
}
# The count of a neuron that spikes at every step. Counts of up to T would soon saturate the softmax, whose gradient
# then vanishes.
COUNT_RANGE = 5.0
PACKAGES = ("torch", "snntorch", "tonic", "numpy")  # whose releases may change results
NETWORK_FLAGS = tuple(field.name for field in fields(NetworkConfig))
NEED_SPIKES = ("beta", "threshold", "alpha", "readout", "learn_beta", "loss")  # flags without a meaning for ReLU
TRAINING_FLAGS = (
    *("epochs", "batch_size", "lr", "weight_decay", "optimizer", "loss", "scheduler"),
    *("no_augment", "val_split", "seed", *nmnist.FRAME_FLAGS),
)

# --- Flags -----------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the script's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_network_arguments(parser)
    add_training_arguments(parser)
    nmnist.add_data_arguments(parser)
    add_running_arguments(parser)
    return parser


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `NetworkConfig`."""
    group = parser.add_argument_group("network")
    add_flag(group, "--model", NetworkConfig.model, "network", choices=list(NETWORKS))
    text = "decay of the membrane potential per step"
    add_flag(group, "--beta", NetworkConfig.beta, text, type=number(float, 0, 1))
    text = "membrane potential above which a neuron fires"
    add_flag(group, "--threshold", NetworkConfig.threshold, text, type=number(float, 0, open_low=True))
    text = "decay per step of ALIF's adaptation and of the synaptic current; resnet only"
    add_flag(group, "--alpha", NetworkConfig.alpha, text, type=number(float, 0, 1))
    text = "probability of dropping a neuron of the last hidden layer, for a whole recording"
    add_flag(group, "--dropout", NetworkConfig.dropout, text, type=number(float, 0, 1, open_high=True))
    text = "fused: compiled neurons and pooling; step: snnTorch's neurons, step by step"
    add_flag(group, "--neuron_backend", NetworkConfig.neuron_backend, text, choices=BACKENDS)
    utils.add_precision_argument(group)
    add_flag(group, "--width", NetworkConfig.width, "factor on channels and hidden layer", type=number(int, 1, 64))
    text = "what decides: the largest mean membrane potential, the most spikes, or the first spike"
    add_flag(group, "--readout", NetworkConfig.readout, text, choices=READOUTS)
    group.add_argument("--learn_beta", action="store_true", help="learn one beta per layer")
    text = "put ReLU in place of neurons, as a baseline; its files are named <model>_relu_..."
    group.add_argument("--no_spikes", action="store_true", help=text)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how to train."""
    group = parser.add_argument_group("training")
    add_flag(group, "--epochs", 10, "passes over the training recordings", type=number(int, 1))
    add_flag(group, "--batch_size", 128, "recordings per training step", type=number(int, 1))
    rates = ", ".join(f"{lr} for {name}" for name, lr in DEFAULT_LR.items())
    group.add_argument("--lr", type=number(float, 0, open_low=True), help=f"learning rate (default: {rates})")
    add_flag(group, "--weight_decay", 0.0, "weight decay of connections, not of norms and beta", type=number(float, 0))
    add_flag(group, "--optimizer", "adam", "optimizer", choices=list(DEFAULT_LR))
    text = "ce: cross entropy of the membrane potentials at every step; mse: squared error of the spike counts; "
    text += f"count: cross entropy of the spike counts, where a spike at every step counts {COUNT_RANGE:g}"
    add_flag(group, "--loss", "ce", text, choices=list(LOSSES))
    group.add_argument("--scheduler", action="store_true", help="lower the learning rate along a half cosine")
    text = "train on the recordings as they are, without random shift, rotation, ..."
    group.add_argument("--no_augment", action="store_true", help=text)
    share = number(float, 0, 1, open_low=True, open_high=True)
    add_flag(group, "--val_split", 0.1, "share of training recordings for validation", type=share)
    text = "seed of weights, validation split, order, augmentation and dropout; of several, each trains a network"
    add_flag(group, "--seed", 0, text, type=number(int, 0, 2**32 - 1), nargs="+", action=OneOrMore)


def add_running_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where to run, and what to read and write."""
    group = parser.add_argument_group("running")
    add_flag(group, "--save_dir", "./checkpoints", "folder of the checkpoints")
    add_flag(group, "--log_dir", "./logs", "folder of history, metrics and figures")
    text = "continue from this checkpoint (without PATH: from the last one of this model in save_dir)"
    group.add_argument("--resume", nargs="?", const="last", metavar="PATH", help=text)
    utils.add_device_argument(group)
    group.add_argument("--test_only", action="store_true", help="test the best checkpoint, without training")
    group.add_argument("--visualize", action="store_true", help="write figures to log_dir")


class OneOrMore(argparse.Action):
    """Store a single value as it is, several as a list."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict | None]:
    """Return the flags and the checkpoint to test or to resume, None if training starts from scratch.

    A checkpoint's settings are the defaults of the flags that are not given. Of flags that contradict them, testing
    uses the checkpoint's, and says so; resuming raises `UserError`, since the run would end elsewhere, but lets
    `--epochs` change, not below the epochs done.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.time_steps * args.batch_size == 1 and not args.test_only:
        parser.error("argument --batch_size: 1 is too few for --time_steps 1, since norms need two frames")
    need_spikes = [name for name in NEED_SPIKES if getattr(args, name) != parser.get_default(name)]
    if args.no_spikes and need_spikes:
        parser.error(f"argument --no_spikes: not allowed with argument --{need_spikes[0]}, which needs spikes")
    if args.model != "resnet" and args.alpha != parser.get_default("alpha"):
        parser.error(f"argument --alpha: not allowed with argument --model {args.model}, which has no such neurons")
    if args.test_only and args.resume is not None:
        parser.error("argument --resume: not allowed with argument --test_only")
    path = find_checkpoint(args)
    if path is None:
        args.precision = utils.pick_precision(args.precision, utils.pick_device(args.device))
        args.lr = args.lr or DEFAULT_LR[args.optimizer]
        return args, None
    checkpoint = utils.load_checkpoint(path, network_name(args))
    args, different = merge_settings(parser, argv, checkpoint["network_config"] | checkpoint["settings"])
    for name, given, trained in different:
        if (name, given) == ("precision", "auto"):
            args.precision = trained
        elif args.test_only and name != "batch_size":  # which changes no result
            print(f"settings    --{name} {given} is ignored: {path} was trained with {trained}")
            setattr(args, name, trained)
        elif not args.test_only and name != "epochs":
            raise UserError(f"--{name} {given}: {path} was trained with {trained}; omit the flag or start a new run")
    args.dataset = nmnist.trained_dataset(args.dataset, args.data_dir, checkpoint["data"]["data set"])
    if args.resume is not None:
        check_resumable(args, checkpoint, path)
    return args, checkpoint


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    """Return the path of the checkpoint to test or to resume, None if training starts from scratch."""
    if args.test_only:
        return checkpoint_path(args, "best")
    if args.resume != "last":
        return None if args.resume is None else Path(args.resume)
    last = checkpoint_path(args, "last")
    if last.exists():
        return last
    # Stopped before its first epoch ended, perhaps.
    print(f"resume      no checkpoint at {last} yet: training starts from scratch, with the flags as given")
    return None


def merge_settings(
    parser: argparse.ArgumentParser, argv: list[str] | None, settings: dict
) -> tuple[argparse.Namespace, list[tuple]]:
    """Parse flags with a checkpoint's settings as the defaults of those that are not given.

    Returns the flags and what contradicts the checkpoint: a list of (name, given, the checkpoint's).
    """
    parser.set_defaults(**settings)
    args = parser.parse_args(argv)
    different = [(name, getattr(args, name), value) for name, value in settings.items() if getattr(args, name) != value]
    return args, different


def check_resumable(args: argparse.Namespace, checkpoint: dict, path: Path) -> None:
    """Raise `UserError` if `checkpoint` can't be resumed; print if its learning rates will differ."""
    if "state" not in checkpoint:
        last = path.with_name(f"{network_name(args)}_last.pt")
        raise UserError(f"--resume {path}: it holds the network alone; resume {last}")
    if args.epochs < checkpoint["epoch"]:
        raise UserError(f"--epochs {args.epochs}: {path} has {checkpoint['epoch']} epochs already")
    planned = checkpoint["settings"]["epochs"]
    if args.scheduler and args.epochs != planned:
        print(f"schedule    planned over {planned} epochs, continues over {args.epochs}")


def network_config(args: argparse.Namespace) -> NetworkConfig:
    """Return the flags that shape the network."""
    return NetworkConfig(**{name: getattr(args, name) for name in NETWORK_FLAGS})


def network_name(args: argparse.Namespace) -> str:
    """Return the network's name in files: 'cnn', or 'cnn_relu' with `--no_spikes`."""
    return NetworkConfig(model=args.model, no_spikes=args.no_spikes).name


def checkpoint_path(args: argparse.Namespace, which: str) -> Path:
    """Return the path of the 'last' or the 'best' checkpoint."""
    return utils.checkpoint_path(args.save_dir, network_name(args), which)


def log_path(args: argparse.Namespace, name: str) -> Path:
    """Return the path of a file of this network in log_dir."""
    return Path(args.log_dir) / f"{network_name(args)}_{name}"


def resume_command(args: argparse.Namespace, *flags: str) -> str:
    """Return the command that continues the run of `args` with `flags`; its other settings are in the checkpoint."""
    command, parser = [*launcher(), "--model", args.model, *flags], make_parser()
    for name in ("save_dir", "log_dir", "data_dir", "dataset", "device"):
        if getattr(args, name) != parser.get_default(name):
            command.append(f"--{name}={getattr(args, name)}")
    switches = [f"--{name}" for name in ("no_spikes", "visualize") if getattr(args, name)]
    return shlex.join([*command, *switches])


def launcher() -> list[str]:
    """Return how this script was started, without its flags."""
    if "LOCAL_WORLD_SIZE" not in os.environ:
        return ["python", "train_nmnist.py"]
    machines, processes = os.environ.get("GROUP_WORLD_SIZE", "1"), f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"
    if machines == "1":
        return ["torchrun", processes, "train_nmnist.py"]
    meeting = ["--rdzv_backend=c10d", "--rdzv_endpoint=HOST:29500"]
    return ["torchrun", f"--nnodes={machines}", processes, *meeting, "train_nmnist.py"]


# --- Training --------------------------------------------------------------------------------------------


@dataclass
class TrainState:
    """What changes in training, and the loss that it lowers."""

    network: SpikingNetwork
    parallel: torch.nn.Module  # the network; with several processes, their gradients are averaged
    ema: SpikingNetwork  # the exponential moving average of the network, which is validated and tested
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # of the loss, so that float16 holds its gradients; without effect otherwise
    loss_fn: Callable
    steps: int = 0  # training steps so far

    SAVED = ("network", "ema", "optimizer", "scaler")

    def state_dict(self) -> dict:
        """Return what `load_state_dict` needs to go on."""
        return {name: getattr(self, name).state_dict() for name in self.SAVED} | {"steps": self.steps}

    def load_state_dict(self, saved: dict) -> None:
        """Put the state that `state_dict` returned back."""
        for name in self.SAVED:
            getattr(self, name).load_state_dict(saved[name])
        self.steps = saved["steps"]


def train(args: argparse.Namespace, device: torch.device, checkpoint: dict | None, data: Data) -> None:
    """Train for the epochs that are left; after each, print its results and write checkpoints and history."""
    train_indices, val_indices = nmnist.split_validation(data.train.labels.cpu(), args.val_split, args.seed)
    state = make_state(args, device)
    history, best = [], None
    if checkpoint:
        history, best = restore(args, state, checkpoint, data)
    print(f"training    {len(train_indices):,} recordings, validation {len(val_indices):,}, test {len(data.test):,}")
    last, saved = checkpoint_path(args, "last"), len(history)
    try:
        for epoch in range(saved + 1, args.epochs + 1):
            entry = run_epoch(args, epoch, state, data, train_indices, val_indices)
            history.append(entry)
            with utils.delay_interrupts():
                if utils.rank() == 0:
                    if epoch == 1:
                        utils.keep_earlier_run(*files_of_run(args))
                    best = save(args, state, history, best, data)
                saved = epoch
            print_epoch(entry, args.epochs)  # after saving: a line that can't be printed loses nothing
    except FloatingPointError as error:
        kept = f"{last} holds epoch {saved}" if saved else "no epoch was finished, so there is no checkpoint"
        raise UserError(f"loss not finite in epoch {saved + 1}, {error}: choose a smaller --lr; {kept}") from None
    except (KeyboardInterrupt, BrokenPipeError) as stop:
        command = resume_command(args, "--resume", "--epochs", str(args.epochs))
        if saved:
            raise type(stop)(f"{last} holds epoch {saved}; continue with: {command}") from None
        raise


def run_epoch(args, epoch: int, state: TrainState, data: Data, train_indices, val_indices) -> dict:
    """Train for an epoch, evaluate on validation and test recordings; return the epoch's entry of the history."""
    start = time.perf_counter()
    # Seeded for each epoch, so that a resumed run draws the same numbers as one that was not stopped.
    utils.set_seed(args.seed, epoch)
    lr = learning_rate(args, epoch)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    order = train_indices[torch.randperm(len(train_indices))]
    if args.time_steps == 1 and len(order) % args.batch_size == 1:
        order = order[:-1]  # a batch of a single frame has no variance to normalise by
    with progress(f"epoch {epoch}/{args.epochs}", len(order)) as bar:
        results = {"train": train_one_epoch(state, training_batches(args, order, data.train, state.network.dtype), bar)}
    trained = time.perf_counter() - start
    for name, frames, indices in (("val", data.train, val_indices), ("test", data.test, torch.arange(len(data.test)))):
        with progress(name, len(indices)) as bar:
            results[name] = evaluate(state.ema, frames, indices, state.loss_fn, args.batch_size, bar)
    if not math.isfinite(results["val"]["loss"]):
        raise FloatingPointError("in validation")
    entry = {"epoch": epoch}
    for name, result in results.items():
        entry |= {f"{name}_loss": result["loss"], f"{name}_accuracy": result["accuracy"]}
    val = results["val"]
    return entry | {
        "val_temperature": fit_temperature(val["spk"], val["mem"], args.readout, val["labels"]),
        "lr": lr,
        "precision": args.precision,
        "neuron_backend": describe_backend(state.network),
        "seconds": time.perf_counter() - start,
        "recordings_per_second": len(order) / trained,
    }


def train_one_epoch(state: TrainState, batches: Iterator, bar: tqdm) -> dict:
    """Train on `batches` of (frames, labels, size of the whole batch); return the epoch's mean loss and accuracy.

    Both are of the network while it changes and drops neurons, on recordings that may be augmented. The frames and
    labels are this process's shard of the whole batch.
    """
    state.network.train()
    totals = 0  # reading them waits for a GPU, so only the bar does
    for frames, labels, batch_size in batches:
        utils.check_interrupted()
        totals = totals + training_step(state, frames, labels, batch_size)
        if bar.update(batch_size):
            means = mean_results(totals, bar)
            bar.set_postfix(loss=f"{means['loss']:.4f}", accuracy=f"{means['accuracy']:.2%}", refresh=False)
    return mean_results(utils.all_reduce_sum(totals), bar)


def training_step(state: TrainState, frames: torch.Tensor, labels: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Train on this process's shard of a batch of `batch_size` recordings.

    It waits for no GPU, but with `--loss mse`, where snnTorch reads the labels on the host. Returns the sums [3] of
    loss, correct predictions and recordings of the shard.
    """
    spk, mem = state.parallel(frames)
    # A process without a recording of the last batch takes part with gradients of 0.
    loss = state.loss_fn(spk, mem, labels) if len(labels) else mem.sum()
    share = len(labels) * utils.world_size() / batch_size  # gradients are averaged over processes
    state.optimizer.zero_grad()
    state.scaler.scale(loss * share).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    update_ema(state.ema, state.network, state.steps)
    state.steps += 1
    with torch.no_grad():
        correct = (predict(spk, mem, state.network.config.readout) == labels).sum()
        return torch.stack([loss.double() * len(labels), correct, torch.full_like(correct, len(labels))])


def mean_results(totals: torch.Tensor, bar: tqdm) -> dict:
    """Return mean loss and accuracy; raise `FloatingPointError` if the loss of a batch so far was not finite."""
    loss, correct, num_samples = totals.tolist()
    if not math.isfinite(loss):
        raise FloatingPointError(f"within {bar.n:,} of {bar.total:,} recordings")
    return {"loss": loss / num_samples, "accuracy": correct / num_samples}


@torch.no_grad()
def evaluate(network: SpikingNetwork, frames: Frames, indices: torch.Tensor, loss_fn, batch_size: int, bar) -> dict:
    """Run the network over the recordings `indices`, without training, each process over its shard.

    Returns mean `loss`, `accuracy`, `labels` [N], the output neurons' `spk` and `mem` [T, N, 10], and `predictions`
    [T, N]: the digit that the network's readout predicts after each step.
    """
    network.eval()
    total_loss, no_output = 0.0, torch.zeros(frames.time_steps, 0, NUM_DIGITS, device=frames.labels.device)
    outputs = [(no_output, no_output, no_output[0, :, 0].long())]  # a process may have no recording
    for x, labels in frames.batches(indices[utils.shard(len(indices))], batch_size, network.dtype):
        spk, mem = network(x)
        total_loss = total_loss + loss_fn(spk, mem, labels).double() * len(labels)
        outputs.append((spk, mem, labels))
        bar.update(len(labels) * utils.world_size())
    own = tuple(x.cpu() for x in join_batches(outputs))
    losses, outputs = zip(*utils.all_gather((float(total_loss), own)), strict=True)
    spk, mem, labels = join_batches(outputs)
    predictions = predict_over_time(spk, mem, network.config.readout)
    results = {"labels": labels, "spk": spk, "mem": mem, "predictions": predictions}
    return {"loss": sum(losses) / len(labels), "accuracy": mean_of(predictions[-1] == labels), **results}


def join_batches(outputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Join the (spk, mem, labels) of batches along the recordings."""
    spk, mem, labels = zip(*outputs, strict=True)
    return torch.cat(spk, dim=1), torch.cat(mem, dim=1), torch.cat(labels)


def mean_of(values: torch.Tensor) -> float:
    """Return the mean of numbers or truth values [N]."""
    return values.double().mean().item()


def training_batches(args, order: torch.Tensor, frames: Frames, dtype: torch.dtype) -> Iterator:
    """Yield this process's shard of each batch of the recordings `order`: frames, labels, size of the whole batch."""
    for chunk in order.split(args.batch_size):
        shard = utils.shard(len(chunk))
        yield *frames.batch(chunk, dtype, augment=not args.no_augment, shard=shard), len(chunk)


def learning_rate(args: argparse.Namespace, epoch: int) -> float:
    """Return the learning rate of an epoch, counted from 1: constant, or falling along a half cosine."""
    return args.lr * (1 + math.cos(math.pi * (epoch - 1) / args.epochs)) / 2 if args.scheduler else args.lr


def make_loss(name: str) -> Callable:
    """Return the loss of `--loss` as a function of the output neurons' spk and mem [T, B, 10] and the labels [B].

    It is NaN if a membrane potential is not finite: spikes, and with them a loss of spikes, are finite even then.
    """
    loss_fn = LOSSES[name]()

    def loss(spk, mem, labels):
        out = mem if name == "ce" else spk  # a potential tells how far from firing a neuron is, a spike only 0 or 1
        if name == "count":
            out = out * (COUNT_RANGE / len(spk))
        # snnTorch returns the shape [] or [1], depending on the loss; sum makes it a scalar.
        return torch.where(mem.isfinite().all(), loss_fn(out, labels).sum(), torch.nan)

    return loss


def make_state(args: argparse.Namespace, device: torch.device) -> TrainState:
    """Return a new network and what trains it, in this process or in several."""
    utils.set_seed(args.seed)
    network = build_model(network_config(args)).to(device)
    print(f"network     {network.title}, {sum(p.numel() for p in network.parameters()):,} parameters")
    ema, parallel = copy.deepcopy(network), network
    if distributed.is_initialized():
        utils.sync_batch_norm(network)
        parallel = DistributedDataParallel(network, forward_sync_buffers=False)
    connections = [p for p in network.parameters() if p.dim() > 1]
    others = [p for p in network.parameters() if p.dim() <= 1]  # norms and beta, which must not decay
    groups = [{"params": connections, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if args.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, args.lr, momentum=0.9, fused=True)
    else:
        adam = torch.optim.Adam if args.optimizer == "adam" else torch.optim.AdamW
        optimizer = adam(groups, args.lr, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    return TrainState(network, parallel, ema, optimizer, scaler, make_loss(args.loss))


@torch.no_grad()
def update_ema(ema: SpikingNetwork, network: SpikingNetwork, steps: int) -> None:
    """Update the exponential moving average of weights, and of what norms measured, after `steps` earlier updates.

    It averages out the noise of the last training steps, as lowering the learning rate would. The weight of the current
    values, 9 / (9 + steps), lets the average forget the first steps; it stays at 1 / EMA_STEPS from then on.
    """
    weight = max(9 / (9 + steps), 1 / EMA_STEPS)  # torch's AveragedModel waits for a GPU at each step
    for ours, theirs in zip(ema.state_dict().values(), network.state_dict().values(), strict=True):
        if ours.is_floating_point():
            ours.lerp_(theirs, weight)
        else:  # the norms' number of batches
            ours.copy_(theirs)


def progress(text: str, num_recordings: int) -> tqdm:
    """Return a progress bar, which the first process shows."""
    return tqdm(desc=text, total=num_recordings, unit="recording", leave=False, disable=utils.rank() > 0)


def print_epoch(entry: dict, epochs: int) -> None:
    """Print an epoch's results in one line."""
    parts = [f"epoch {entry['epoch']:3d}/{epochs}"]
    parts += [f"{s} {entry[f'{s}_loss']:.4f} {entry[f'{s}_accuracy']:7.2%}" for s in ("train", "val", "test")]
    parts += [f"{entry['recordings_per_second']:,.0f} recordings/s", f"lr {entry['lr']:.2g}"]
    print("   ".join(parts), flush=True)


# --- Checkpoints -----------------------------------------------------------------------------------------


def save(args, state: TrainState, history: list[dict], best: dict | None, data: Data) -> dict:
    """Write the best and the last checkpoint and the history, each atomically; return the best checkpoint so far."""
    checkpoint = {
        "format": utils.CHECKPOINT_FORMAT,
        "name": network_name(args),
        "network_config": asdict(network_config(args)),
        "settings": {name: getattr(args, name) for name in TRAINING_FLAGS},
        "data": describe_data(data),
        "constants": constants(args),
        "versions": utils.versions(*PACKAGES),
        "threads": torch.get_num_threads(),
        "network": {name: value.cpu().clone() for name, value in state.ema.state_dict().items()},
        "epoch": len(history),
        "seconds_to_epoch": sum(entry["seconds"] for entry in history),
        "temperature": history[-1]["val_temperature"],  # of the confidences that an early exit needs
        # If validation accuracies are equal, the smaller loss is better. The test recordings are not used.
        "score": [history[-1]["val_accuracy"], -history[-1]["val_loss"]],
    }
    if best is None or checkpoint["score"] > best["score"]:
        best = checkpoint
    write_best_and_history(args, best, history)
    # Last: a run killed before this repeats the epoch, and writes the same files again.
    last = checkpoint_path(args, "last")
    utils.save_tensors(last, checkpoint | {"history": history, "best": best, "state": state.state_dict()})
    return best


def restore(args, state: TrainState, checkpoint: dict, data: Data) -> tuple[list[dict], dict]:
    """Put the state that `save` wrote back; return the history and the best checkpoint so far.

    Raises `UserError` if the data or this code's constants are not those of the checkpoint. Another number of threads
    and other releases of packages give a warning.
    """
    here = describe_data(data) | constants(args)
    for name, trained in (checkpoint["data"] | checkpoint["constants"]).items():
        if here.get(name) != trained:
            raise UserError(f"--resume: trained with another {name}: {trained}, and this is {here.get(name)}")
    before = {"threads (OMP_NUM_THREADS)": checkpoint["threads"]} | checkpoint["versions"]
    now = {"threads (OMP_NUM_THREADS)": torch.get_num_threads()} | utils.versions(*PACKAGES)
    changed = [f"{name}: {now[name]}, before {value}" for name, value in before.items() if now[name] != value]
    if changed:
        utils.warn(f"resumed, it will not be equal bit for bit to a run that was not stopped ({'; '.join(changed)})")
    last = checkpoint_path(args, "last")
    same_folder = args.resume == "last" or os.path.realpath(args.resume) == os.path.realpath(last)
    if same_folder and utils.load_checkpoint(last, network_name(args)).get("history") != checkpoint.get("history"):
        raise UserError(f"{last} has changed since this command started: run it again")
    try:
        state.load_state_dict(checkpoint["state"])
        history, best = checkpoint["history"], checkpoint["best"]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"--resume: the checkpoint lacks parts of its state ({utils.first_line(error)})") from None
    if utils.rank() == 0:  # save_dir or log_dir may be others than before
        if not same_folder:
            utils.keep_earlier_run(*files_of_run(args))
        recorded = read_history(args)
        if same_folder and recorded[: len(history)] != history[: len(recorded)]:  # of a run with another save_dir
            utils.keep_earlier_run(*files_of_run(args)[2:])
        write_best_and_history(args, best, history)
        utils.save_tensors(last, checkpoint)
    print(f"resume      after epoch {len(history)} of {args.epochs}")
    return history, best


def files_of_run(args: argparse.Namespace) -> list[Path]:
    """Return the files of a run that a later one would overwrite: two of save_dir, then three of log_dir."""
    checkpoints = [checkpoint_path(args, which) for which in ("last", "best")]
    return checkpoints + [log_path(args, name) for name in ("history.json", "test_metrics.json", "predictions.csv")]


def constants(args: argparse.Namespace) -> dict:
    """Return what shapes a training run beside its flags and data: constants of this code."""
    return {
        "augmentation": asdict(nmnist.AUGMENTATION),
        "surrogate slope": NETWORKS[args.model].SLOPE,
        "EMA steps": EMA_STEPS,
        "count range": COUNT_RANGE,
    }


def read_history(args: argparse.Namespace) -> list[dict]:
    """Return the history in log_dir; it is empty if there is none, or a damaged one."""
    history = utils.read_json(log_path(args, "history.json"))
    is_whole = isinstance(history, list) and all(isinstance(e, dict) and "val_accuracy" in e for e in history)
    return history if is_whole else []


def describe_data(data: Data) -> dict[str, str]:
    """Return what tells a data set from another: its name, and the number and a fingerprint of each part's recordings.

    The fingerprint is of contents and labels, so copied or touched files are the same data.
    """
    parts = {"training part": data.train, "test part": data.test}
    described = {name: f"{len(part):,} recordings ({part.fingerprint[:12]})" for name, part in parts.items()}
    return {"data set": data.name} | described


def write_best_and_history(args: argparse.Namespace, best: dict, history: list[dict]) -> None:
    """Write the best checkpoint and the history of the epochs so far."""
    utils.save_tensors(checkpoint_path(args, "best"), best)
    utils.write_json(log_path(args, "history.json"), history)


# --- Testing ---------------------------------------------------------------------------------------------


def test(args, data: Data, device: torch.device) -> tuple[dict, SpikingNetwork, torch.Tensor]:
    """Test the best checkpoint, write and print its metrics; return them, the network and its predictions [N]."""
    path = checkpoint_path(args, "best")
    checkpoint = utils.load_checkpoint(path, network_name(args))
    network = rebuild_network(checkpoint, path, device)
    trained_with, here = checkpoint["data"], describe_data(data)
    for part in ("data set", "test part"):
        if trained_with[part] != here[part]:
            utils.warn(f"tested on another {part} than in training: {here[part]}, not {trained_with[part]}")
    loss_fn, indices = make_loss(checkpoint["settings"]["loss"]), torch.arange(len(data.test))
    with progress("test", len(indices)) as bar, ActivityMeter(network) as meter:
        result = evaluate(network, data.test, indices, loss_fn, args.batch_size, bar)
    if not math.isfinite(result["loss"]):
        raise UserError(f"{path}: the loss of this network is not finite")
    readouts = ("membrane",) if network.config.no_spikes else READOUTS  # without spikes, there is one
    result["by_readout"] = {name: predict(result["spk"], result["mem"], name) for name in readouts}
    result["confidence"] = confidence(result["spk"], result["mem"], network.config.readout, checkpoint["temperature"])
    metrics = {
        "dataset": data.name,
        "trained_on": trained_with["data set"],
        "data": here,
        "model": network.config.name,
        "num_recordings": len(indices),
        **describe_result(result, network.config),
        "temperature": checkpoint["temperature"],
        "layers": (layers := meter.layers()),
        **total_cost(layers, data.test.time_steps),
        "early_exit": early_exit(result, meter, milliseconds_per_step(args)),
        "parameters": sum(p.numel() for p in network.parameters()),
        "precision": network.config.precision,
        "neuron_backend": describe_backend(network),
        "checkpoint": str(path),
        **provenance(checkpoint, device),
        "peak_memory_mb": utils.peak_memory_mb(device),
        "milliseconds_per_recording": {
            f"batch of {size}": time_per_recording(network, data.test, size)
            for size in (1, min(args.batch_size, len(data.test)))
        },
    }
    print_metrics(metrics, saccade_ends(args))
    metrics_path, predictions_path = log_path(args, "test_metrics.json"), log_path(args, "predictions.csv")
    earlier = utils.read_json(metrics_path)
    if isinstance(earlier, dict) and any(earlier.get(name) != metrics[name] for name in ("checkpoint", "data")):
        utils.keep_earlier_run(metrics_path, predictions_path)
    utils.write_json(metrics_path, metrics)
    utils.write_csv(predictions_path, table_of_predictions(result, data.test_files))
    print(f"{'metrics':20} {metrics_path}\n{'predictions':20} {predictions_path}")
    return metrics, network, result["predictions"][-1]


def rebuild_network(checkpoint: dict, path: Path, device: torch.device) -> SpikingNetwork:
    """Return the network of the checkpoint read from `path`; raise `UserError` if it does not hold a whole one."""
    try:
        if not 0 < checkpoint["temperature"] < math.inf:
            raise ValueError(f"its temperature is {checkpoint['temperature']}")
        return load_network(checkpoint, device)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} does not hold the network it names ({utils.first_line(error)})") from None


def describe_result(result: dict, config: NetworkConfig) -> dict:
    """Return the metrics of what the output neurons told, from what `evaluate` returns."""
    spk, labels, predictions = (result[name] for name in ("spk", "labels", "predictions"))
    by_readout = result["by_readout"]
    return {
        "accuracy": result["accuracy"],
        "readout": config.readout,
        "accuracy_by_readout": {name: mean_of(digits == labels) for name, digits in by_readout.items()},
        "ties": {name: mean_of(leading(spk, name)[-1].sum(-1) > 1) for name in by_readout if name != "membrane"},
        "loss": result["loss"],
        "confusion_matrix": confusion_matrix(labels, predictions[-1], labels=range(10)).tolist(),
        "accuracy_over_time": (predictions == labels).double().mean(1).tolist(),
    }


def total_cost(layers: dict[str, dict[str, float]], time_steps: float) -> dict:
    """Return synaptic operations (none without spikes), MACs and energy per recording of all `layers` together."""
    names = [name for name in ("synaptic_operations", "macs") if name in next(iter(layers.values()))]
    totals = {name: sum(layer[name] for layer in layers.values()) for name in names}
    return totals | {"energy_uj": energy_uj(layers, time_steps)}


def early_exit(result: dict, meter: ActivityMeter, step_ms: float | None) -> list[dict]:
    """Return what is reached if each recording is decided as soon as its confidence passes a threshold.

    For each of `EXIT_THRESHOLDS`: accuracy, and mean time steps, nominal milliseconds (None if they are unknown) and
    `total_cost` until the decision.
    """
    entries = []
    for threshold in EXIT_THRESHOLDS:
        step = exit_step(result["confidence"], threshold)
        correct = result["predictions"].gather(0, step[None] - 1)[0] == result["labels"]
        entry = {"threshold": threshold, "accuracy": mean_of(correct), "mean_steps": mean_of(step)}
        entry["mean_ms"] = step_ms and step_ms * entry["mean_steps"]
        entries.append(entry | total_cost(meter.cost_until(step), entry["mean_steps"]))
    return entries


def exit_step(confidences: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return the first time step, from 1, with a confidence [T, N] above the threshold, the last without one: [N]."""
    passed = confidences > threshold
    passed[-1] = True
    return passed.int().argmax(0) + 1


def table_of_predictions(result: dict, files: list[str]) -> list[dict]:
    """Return a row for each test recording: file, label, each readout's prediction, confidence, early exit."""
    columns = {"file": files, "label": result["labels"].tolist()}
    columns |= {name: digits.tolist() for name, digits in result["by_readout"].items()}
    columns["confidence"] = [f"{value:.6f}" for value in result["confidence"][-1].tolist()]
    columns[f"early_exit_step_{EXIT_THRESHOLD}"] = exit_step(result["confidence"], EXIT_THRESHOLD).tolist()
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def provenance(checkpoint: dict, device: torch.device) -> dict:
    """Return how a tested network came about: its training, and what it is tested on and with."""
    return {
        "weights": "exponential moving average",
        "epoch": checkpoint["epoch"],
        "val_accuracy": checkpoint["score"][0],
        "seconds_to_epoch": checkpoint["seconds_to_epoch"],
        "seed": checkpoint["settings"]["seed"],
        "settings": checkpoint["network_config"] | checkpoint["settings"],
        "constants": checkpoint["constants"],
        "trained_with": checkpoint["versions"],
        "tested_with": utils.versions(*PACKAGES),
        "machine": f"{utils.processor_name()}, {utils.describe_device(device)}",
    }


@torch.no_grad()
def time_per_recording(network: SpikingNetwork, frames: Frames, batch_size: int) -> float:
    """Return the median time in ms that the network takes for a recording of a batch, the frames being made."""
    x, _ = frames.batch(torch.arange(batch_size), network.dtype)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        network(x)[1].sum().item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 1000 * float(np.median(seconds[1:])) / batch_size  # the first warms up


def print_metrics(metrics: dict, saccade_ends: list[float]) -> None:
    """Print the test metrics as a short table."""
    # A saccade shorter than a frame has none of its own.
    after_saccades = [f"{metrics['accuracy_over_time'][int(end) - 1]:.2%}" if end >= 1 else "-" for end in saccade_ends]
    exit_at = next(entry for entry in metrics["early_exit"] if entry["threshold"] == EXIT_THRESHOLD)
    exit_ms = f" ({exit_at['mean_ms']:.0f} ms)" if exit_at["mean_ms"] else ""
    rows = {
        "data set": f"{metrics['dataset']}, {metrics['num_recordings']:,} test recordings",
        "test accuracy": f"{metrics['accuracy']:.2%}",
        "by readout": "  ".join(
            f"{name} {accuracy:.2%}" + (f" ({metrics['ties'][name]:.1%} ties)" if name in metrics["ties"] else "")
            for name, accuracy in metrics["accuracy_by_readout"].items()
        ),
        "test loss": f"{metrics['loss']:.4f}",
        "after each saccade": "  ".join(after_saccades) or "unknown with --bin_by events",
        f"exit at {EXIT_THRESHOLD:.0%}": f"{exit_at['accuracy']:.2%} after {exit_at['mean_steps']:.1f} steps{exit_ms}",
        **describe_cost(metrics),
        "parameters": f"{metrics['parameters']:,}",
        "precision, neurons": f"{metrics['precision']}, {metrics['neuron_backend']}",
        "time per recording": ", ".join(
            f"{ms:.2f} ms in a {b}" for b, ms in metrics["milliseconds_per_recording"].items()
        ),
        "checkpoint": f"{metrics['checkpoint']} (epoch {metrics['epoch']}, seed {metrics['seed']})",
    }
    for title, value in rows.items():
        print(f"{title:20} {value}")
    print_layers(metrics["layers"])


def describe_cost(metrics: dict) -> dict[str, str]:
    """Return the rows of operations and energy: the most and the least favourable to spikes."""
    macs, energy = metrics["macs"], metrics["energy_uj"]
    time_steps = len(metrics["accuracy_over_time"])
    relu = f"{energy['relu_all_frames']:.3g} uJ on {time_steps} frames, {energy['relu_one_frame']:.3g} uJ on one"
    if "synaptic_operations" not in metrics:
        return {"MACs": f"{macs / 1e6:.2f} million per recording", "energy at 45 nm": relu}
    operations, best, worst = metrics["synaptic_operations"], energy["spiking_events"], energy["spiking_dense_input"]
    return {
        "synaptic operations": f"{operations / 1e6:.2f} million per recording: {operations / macs:.1%} of the "
        f"{macs / 1e6:.1f} million MACs without spikes on {time_steps} frames, "
        f"{operations * time_steps / macs:.0%} of the {macs / time_steps / 1e6:.2f} million on one",
        "energy at 45 nm": f"{best:.3g} uJ, {worst:.3g} uJ with a dense first layer; without spikes {relu}",
    }


def print_layers(layers: dict[str, dict[str, float]]) -> None:
    """Print a row for each layer, per recording."""
    widths = {name: max(13, len(name) + 2) for name in next(iter(layers.values()))}
    print(f"{'layer':20}" + "".join(f"{name.replace('_', ' '):>{width}}" for name, width in widths.items()))
    for layer, values in layers.items():
        texts = {name: f"{value:.3f}" if name == "firing_rate" else f"{value:,.0f}" for name, value in values.items()}
        print(f"{layer:20}" + "".join(f"{texts[name]:>{width}}" for name, width in widths.items()))


def milliseconds_per_step(args: argparse.Namespace) -> float | None:
    """Return the nominal duration of a time step: a recording takes 308 ms, its first saccade 100 ms.

    With `--bin_by events` it is unknown, since it varies: None.
    """
    if args.bin_by == "events":
        return None
    return nmnist.SACCADE_ENDS[0 if args.first_saccade_only else -1] / args.time_steps


def saccade_ends(args: argparse.Namespace) -> list[float]:
    """Return where a recording's saccades end, in steps; with `--bin_by events` that is not the same for all."""
    if args.bin_by == "events":
        return []
    ends = nmnist.SACCADE_ENDS[:1] if args.first_saccade_only else nmnist.SACCADE_ENDS
    return [args.time_steps * end / ends[-1] for end in ends]


def visualize(args, metrics: dict, network: SpikingNetwork, frames: Frames, predictions: torch.Tensor) -> None:
    """Write the figures of training, if there is a history, and of the test."""
    name = network.title
    history, epoch = read_history(args), metrics["epoch"]
    try:
        if history[epoch - 1]["val_accuracy"] != metrics["val_accuracy"]:
            raise ValueError
        path = Path(args.log_dir) / "training_results.png"
        utils.plot_history(history, f"{name} on {metrics['trained_on']}", path)
    except (IndexError, ValueError, TypeError, KeyError, OverflowError):
        path = log_path(args, "history.json")
        utils.warn(f"{path} is missing, damaged or of another run: training_results.png is not drawn")
    tested = f"{metrics['accuracy']:.2%} of {metrics['num_recordings']:,} test recordings"
    title = f"{name} on {metrics['dataset']}: {tested}"
    counts = np.array(metrics["confusion_matrix"])
    utils.plot_confusion_matrix(counts, title, log_path(args, "confusion_matrix.png"))
    accuracy, step_ms = np.array(metrics["accuracy_over_time"]), milliseconds_per_step(args)
    path = log_path(args, "accuracy_over_time.png")
    utils.plot_accuracy_over_time(accuracy, metrics["early_exit"], saccade_ends(args)[:-1], step_ms, title, path)
    first_end = (saccade_ends(args) or [args.time_steps / 3])[0]
    draw_samples(frames, predictions, first_end, title, log_path(args, "samples.png"))
    if args.model == "resnet":
        weight = network.conv1.weight.detach().cpu()
        title = f"{name} on {metrics['trained_on']}\nthe {len(weight)} filters of conv1, 3 x 3 pixels each"
        utils.plot_filters(weight, title, log_path(args, "filters.png"))


def draw_samples(frames: Frames, predictions: torch.Tensor, first_end: float, title: str, path: Path) -> None:
    """Draw 20 test recordings with true and predicted digit: mistakes first, then the digits in turn.

    The events shown are from the middle of the first saccade, which ends after `first_end` frames: over a whole
    recording ON and OFF cover one another.
    """
    labels, predictions = frames.labels.cpu().numpy(), predictions.numpy()
    indices = utils.mistakes_first(labels, predictions, 20)
    sequences = frames.batch(torch.from_numpy(indices))[0]
    first, last = int(0.37 * first_end), math.ceil(0.615 * first_end)  # 37 to 62 of 100 ms
    images = sequences[first:last].sum(0).cpu().numpy()
    mistakes = int((labels != predictions).sum())
    title += f"\n{mistakes} mistakes, drawn first; events in the middle of the first saccade"
    utils.plot_predictions(images, labels[indices], predictions[indices], indices, title, path)


# --- The script ------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = make_parser().parse_args(argv)
    if isinstance(args.seed, list):
        run_seeds(argv, args)
    else:
        run(argv)


def run_seeds(argv: list[str], args: argparse.Namespace) -> None:
    """Run the script for each seed in folders of its own; print and write a table of the tests."""
    rows = []
    for seed in dict.fromkeys(args.seed):
        folders = {name: Path(getattr(args, name)) / f"seed_{seed}" for name in ("save_dir", "log_dir")}
        print(f"seed        {seed}")
        try:
            run([*argv, "--seed", str(seed), *(f"--{name}={folder}" for name, folder in folders.items())])
        except (KeyboardInterrupt, BrokenPipeError) as stop:
            resume = ["--resume"] if not args.test_only and args.resume is None else []
            command = shlex.join([*launcher(), *argv, *resume])
            raise type(stop)(f"stopped at seed {seed}; continue with: {command}") from None
        if utils.rank() != 0:  # the first process tests
            continue
        metrics = json.loads((folders["log_dir"] / log_path(args, "test_metrics.json").name).read_text())
        row = {name: metrics[name] for name in ("model", "seed", "dataset", "accuracy", "loss", "epoch")}
        row |= {f"accuracy_{readout}": accuracy for readout, accuracy in metrics["accuracy_by_readout"].items()}
        row |= {name: metrics.get(name) for name in ("synaptic_operations", "macs", "parameters", "seconds_to_epoch")}
        rows.append(row)
    if rows:
        print_seeds(rows, log_path(args, "seeds.csv"))


def print_seeds(rows: list[dict], path: Path) -> None:
    """Print mean, standard deviation, minimum and maximum of the accuracies in `rows`; write the rows to `path`."""
    utils.keep_earlier_run(path)
    utils.write_csv(path, rows)
    print(f"{'test accuracy':20} {'mean':>8} {'std':>8} {'min':>8} {'max':>8}   of {len(rows)} seeds")
    for name in (name for name in rows[0] if name.startswith("accuracy")):
        values = np.array([row[name] for row in rows])
        spread = values.std(ddof=1) if len(values) > 1 else 0.0
        numbers = (values.mean(), spread, values.min(), values.max())
        print(f"{name:20} " + " ".join(f"{value:8.2%}" for value in numbers))
    print(f"seeds       {path}")


def run(argv: list[str]) -> None:
    """Train and test one network, or test it alone."""
    args, checkpoint = parse_args(argv)
    device = utils.pick_device(args.device)
    utils.prepare_device(device)
    utils.check_writable("--log_dir", args.log_dir)
    if not args.test_only:
        utils.check_writable("--save_dir", args.save_dir)
    utils.init_distributed(device)
    processes = f", {utils.world_size()} processes" if utils.world_size() > 1 else ""
    print(f"device      {utils.describe_device(device)}{processes}")
    if args.batch_size < utils.world_size():
        raise UserError(f"--batch_size {args.batch_size}: fewer than the {utils.world_size()} processes")
    data = nmnist.load_data(args, device)
    check_processes_agree(args, checkpoint, data)
    with locked_folders(args):
        if not args.test_only:
            train(args, device, checkpoint, data)
        utils.destroy_distributed()
        if utils.rank() == 0:
            test_and_visualize(args, data, device)


@contextlib.contextmanager
def locked_folders(args: argparse.Namespace) -> Iterator[None]:
    """Hold save_dir and log_dir for training this model; raise `UserError` if another run does."""
    # By folder, since the two may be the same, which can be locked once.
    flags = {os.path.realpath(args.log_dir): "--log_dir", os.path.realpath(args.save_dir): "--save_dir"}
    with contextlib.ExitStack() as stack:
        for folder, flag in flags.items() if utils.rank() == 0 and not args.test_only else ():
            busy = f"{flag} {folder}: another run of {network_name(args)} writes there; choose another folder, or wait"
            stack.enter_context(utils.locked(folder, network_name(args), busy))
        yield


def check_processes_agree(args: argparse.Namespace, checkpoint: dict | None, data: Data) -> None:
    """Raise `UserError` if processes, of several machines perhaps, differ in settings or data."""
    own = {f"--{name}": getattr(args, name) for name in (*NETWORK_FLAGS, *TRAINING_FLAGS)}
    own |= describe_data(data)
    own["epochs in the checkpoint"] = checkpoint["epoch"] if checkpoint else 0
    for rank, theirs in enumerate(utils.all_gather(own)):
        for name, value in theirs.items():
            if value != own[name]:
                raise UserError(
                    f"processes differ in {name}: {own[name]}, and {value} in process {rank}; "
                    "machines need the same data, and a save_dir that they share to resume"
                )


def test_and_visualize(args: argparse.Namespace, data: Data, device: torch.device) -> None:
    """Test the best checkpoint, and draw figures if `--visualize` asks for them."""
    try:
        with utils.locked(args.log_dir, "test"):
            metrics, network, predictions = test(args, data, device)
            if args.visualize:
                visualize(args, metrics, network, data.test, predictions)
    except KeyboardInterrupt as stop:
        stop.args = (f"the test was not finished; repeat it with: {resume_command(args, '--test_only')}",)
        raise


if __name__ == "__main__":
    utils.run_script(main)
