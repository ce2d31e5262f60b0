"""Train and test a spiking network on N-MNIST.

python train_nmnist.py --model cnn                           # train, then test the best checkpoint
python train_nmnist.py --model resnet --epochs 15 --batch_size 64 --scheduler
python train_nmnist.py --model cnn --resume                  # go on where the last run stopped
python train_nmnist.py --model cnn --test_only --visualize   # test the best checkpoint, and draw
python train_nmnist.py --model cnn --seed 0 1 2 3 4          # train five networks, and compare
python train_nmnist.py --model cnn --no_spikes               # ReLU in place of neurons
torchrun --nproc_per_node=2 train_nmnist.py --model cnn      # two processes, on two GPUs if any
"""

import os

if __name__ == "__main__":  # before torch is imported: idle threads sleep, instead of spinning
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import contextlib
import copy
import functools
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import snntorch.functional as SF
import torch
from sklearn.metrics import confusion_matrix
from snntorch import SpikingNeuron
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

import nmnist
import utils
from models import (
    BACKENDS,
    NETWORKS,
    READOUTS,
    ActivityMeter,
    NetworkConfig,
    NetworkError,
    SpikingCNN,
    SpikingNetwork,
    build_model,
    describe_backend,
    digit_scores,
    energy_uj,
    fit_temperature,
    leaders,
    load_weights,
    predict,
    restore_network,
)
from nmnist import Data, Frames
from utils import UserError, add_flag, number, rank, world_size

DEFAULT_LR = {"adam": 5e-3, "adamw": 5e-3, "sgd": 0.1}
EMA_STEPS = 100  # training steps over which the weights are averaged, at most
NORM_RECORDINGS = 1000  # training recordings on which norms are measured before an evaluation
# Confidence thresholds of early exits, and the one that is printed.
EXIT_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
EXIT_THRESHOLD = 0.9
# The count of a neuron that spikes at every step, for the loss of spike counts. Counts of up to T
# would soon saturate the softmax, whose gradient then vanishes.
COUNT_RANGE = 5.0
# Flags without effect under --no_spikes.
NEED_SPIKES = ("beta", "threshold", "alpha", "readout", "learn_beta")

# --- Flags ----------------------------------------------------------------------------------------


def make_settings_parser() -> argparse.ArgumentParser:
    """Return the parser of the settings: all that shapes a trained network."""
    parser = argparse.ArgumentParser(add_help=False)
    add_network_flags(parser.add_argument_group("network"))
    add_training_flags(parser.add_argument_group("training"))
    nmnist.add_frame_flags(parser.add_argument_group("frames"))
    return parser


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all flags: the settings, and how to run."""
    parser = utils.make_parser(__doc__, parents=[make_settings_parser()])
    add_running_flags(parser.add_argument_group("running"))
    return parser


def add_network_flags(group) -> None:
    """Add the flags of `NetworkConfig`."""
    flag, default, share = functools.partial(add_flag, group), NetworkConfig(), number(float, 0, 1)
    above_0, below_1 = number(float, 0, open_low=True), number(float, 0, 1, open_high=True)
    flag("--model", default.model, "network", choices=list(NETWORKS))
    flag("--beta", default.beta, "decay of the membrane potential per step", type=share)
    flag("--threshold", default.threshold, "potential above which a neuron fires", type=above_0)
    alpha = "decay per step of ALIF's adaptation and of the synaptic current (resnet)"
    flag("--alpha", default.alpha, alpha, type=share)
    dropout = "probability of dropping a neuron of the last hidden layer, for a whole recording"
    flag("--dropout", default.dropout, dropout, type=below_1)
    flag("--width", default.width, "factor on channels and hidden layer", type=number(int, 1, 64))
    readout = "what decides: the mean membrane potential, the most spikes, or the first spike"
    flag("--readout", default.readout, readout, choices=READOUTS)
    flag("--learn_beta", False, "learn one beta per layer")
    flag("--no_spikes", False, "ReLU in place of neurons; its files are named <model>_relu_...")


def add_training_flags(group) -> None:
    """Add the flags that say how to train."""
    flag, positive = functools.partial(add_flag, group), number(int, 1)
    above_0, share = (
        number(float, 0, open_low=True),
        number(float, 0, 1, open_low=True, open_high=True),
    )
    flag("--epochs", 10, "passes over the training recordings", type=positive)
    flag("--batch_size", 128, "recordings per training step", type=positive)
    rates = ", ".join(f"{lr} for {name}" for name, lr in DEFAULT_LR.items())
    flag("--lr", None, f"learning rate (default: {rates})", type=above_0)
    flag("--weight_decay", 0.0, "weight decay of connections alone", type=number(float, 0))
    flag("--optimizer", "adam", "optimizer", choices=list(DEFAULT_LR))
    loss = "ce: cross entropy of the membrane potentials at every step; mse: squared error of the "
    loss += "spike counts; count: cross entropy of the spike counts"
    flag("--loss", "ce", loss, choices=list(LOSSES))
    flag("--scheduler", False, "lower the learning rate along a half cosine")
    flag("--no_augment", False, "train on the recordings as they are, without random shift, ...")
    flag("--val_split", 0.1, "share of training recordings for validation", type=share)
    seed = "seed of all random numbers; of several, each trains a network"
    flag("--seed", 0, seed, type=number(int, 0, 2**32 - 1), nargs="+")


def add_running_flags(group) -> None:
    """Add the flags that say where and how to run, and what to read and write."""
    flag = functools.partial(add_flag, group)
    nmnist.add_data_flags(group)
    flag("--save_dir", "./checkpoints", "folder of the checkpoints")
    flag("--log_dir", "./logs", "folder of history, metrics and figures")
    utils.add_device_flag(group)
    precision = "type of the layers; auto: bf16 where the hardware computes it, else fp32"
    flag("--precision", "auto", precision, choices=["auto", "bf16", "fp32"])
    backend = "fused: compiled neurons; step: snnTorch's neurons, step by step"
    flag("--neuron_backend", "fused", backend, choices=BACKENDS)
    flag("--resume", False, "continue the last run of this model in save_dir, if there is one")
    flag("--test_only", False, "test the best checkpoint, without training")
    flag("--visualize", False, "write figures to log_dir")


def check_flags(parser: argparse.ArgumentParser, flags: dict, given: dict) -> None:
    """Exit with status 2 if flags contradict one another; `given` are those that were typed."""
    for name in NEED_SPIKES:
        if flags["no_spikes"] and name in given:
            parser.error(f"argument --{name}: not allowed with argument --no_spikes")
    if NETWORKS[flags["model"]] is SpikingCNN and "alpha" in given:
        parser.error("argument --alpha: --model cnn has no neurons that use it")
    if flags["test_only"] and flags["resume"]:
        parser.error("argument --resume: not allowed with argument --test_only")
    if flags["batch_size"] // world_size() * flags["time_steps"] < 2:
        parser.error("argument --batch_size: too small, norms need two frames in each process")


def load_last(args: argparse.Namespace) -> dict:
    """Return the checkpoint to resume, {} if training starts from scratch."""
    path = checkpoint_path(args, "last")
    if args.resume and path.exists():
        return utils.load_checkpoint(path, "training")
    if args.resume:
        print(f"resume      no checkpoint at {path} yet: training starts from scratch")
    return {}


def complete_flags(flags: dict, given: dict, checkpoint: dict, device: torch.device):
    """Return the flags to run with: a checkpoint's settings come before the defaults.

    If those in `given` contradict it, a test ignores them, and says so; a resumed run, which would
    end elsewhere, raises `UserError`.
    """
    flags = dict(flags)
    may_differ = "batch_size" if flags["test_only"] else "epochs"
    for name, trained in checkpoint.get("settings", {}).items():
        asked = given.get(name, trained)
        flags[name] = asked if name == may_differ else trained
        if asked != flags[name]:
            folder = flags["save_dir"]
            text = f"--{name} {asked}: the network in {folder} was trained with {trained}"
            if not flags["test_only"]:
                raise UserError(f"{text}; omit the flag, or start a new run")
            print(f"ignored     {text}")
    if flags["loss"] not in LOSSES:
        raise UserError(f"--loss {flags['loss']}: this script does not add it to LOSSES")
    if checkpoint:
        where = flags["data_dir"], flags["dataset"]
        flags["dataset"] = nmnist.trained_dataset(*where, checkpoint["data"])
    flags["lr"] = flags["lr"] or DEFAULT_LR[flags["optimizer"]]
    flags["precision"] = utils.pick_precision(flags["precision"], device)
    flags["neuron_backend"] = utils.pick_backend(flags["neuron_backend"], device)
    return argparse.Namespace(**flags)


def settings_of(args: argparse.Namespace) -> dict:
    """Return the settings among the flags."""
    return {name: getattr(args, name) for name in vars(make_settings_parser().parse_args([]))}


def network_config(args: argparse.Namespace) -> NetworkConfig:
    """Return the flags that say what the network is."""
    return NetworkConfig.from_settings(vars(args))


def checkpoint_path(args: argparse.Namespace, which: str) -> Path:
    """Return the path of the checkpoint of the 'last' epoch, or of the 'best' validation."""
    return Path(args.save_dir) / f"{network_config(args).name}_{which}.pt"


def log_path(args: argparse.Namespace, name: str) -> Path:
    """Return the path of a file of this network in log_dir."""
    return Path(args.log_dir) / f"{network_config(args).name}_{name}"


# --- Losses ---------------------------------------------------------------------------------------


def membrane_cross_entropy(spk, mem, labels):
    """Return the cross entropy of the membrane potentials at every time step, averaged."""
    # A potential tells how far from firing a neuron is, a spike only 0 or 1.
    return SF.ce_rate_loss()(mem, labels)


def spike_count_error(spk, mem, labels):
    """Return the squared error of spike counts, T for the correct digit, 0 for others, by T."""
    return SF.mse_count_loss()(spk, labels)


def spike_count_cross_entropy(spk, mem, labels):
    """Return the cross entropy of the spike counts, where T spikes count COUNT_RANGE."""
    return SF.ce_count_loss()(spk * (COUNT_RANGE / len(spk)), labels)


# By --loss: functions of the output neurons' spk and mem [T, B, 10] and the labels [B]. They return
# the mean over a batch, or a value for each recording.
LOSSES = {
    "ce": membrane_cross_entropy,
    "mse": spike_count_error,
    "count": spike_count_cross_entropy,
}  # add your own: LOSSES["margin"] = margin_loss

# --- Training -------------------------------------------------------------------------------------


def train_one_epoch(
    network: torch.nn.Module,
    ema: SpikingNetwork,
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable,
    batches: Iterator,
    step: int,
    bar: tqdm,
) -> dict:
    """Train on `batches` of (frames, labels); return the mean `train_loss` and `train_accuracy`.

    Both are of the network while it changes, on recordings that may be augmented, of this process's
    share if there are several. `step` is the number of training steps before.
    """
    network.train()
    results, sizes = [], []  # of each batch; reading results synchronizes with a GPU
    for frames, labels in batches:
        spk, mem = network(frames)
        loss = loss_fn(spk, mem, labels).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_ema(ema, network, step)
        step += 1
        correct = (predict(spk.detach(), mem.detach(), ema.config.readout) == labels).sum()
        results.append(torch.stack([loss.detach(), correct]))
        sizes.append(len(labels))
        if bar.update(len(labels) * world_size()):  # True where the bar was redrawn
            means = mean_results(results, sizes)
            text = {
                "loss": f"{means['train_loss']:.4f}",
                "accuracy": f"{means['train_accuracy']:.2%}",
            }
            bar.set_postfix(text, refresh=False)
    return mean_results(results, sizes)


def mean_results(results: list[torch.Tensor], sizes: list[int]) -> dict:
    """Return `train_loss` and `train_accuracy` of batches: (loss, correct predictions), sizes."""
    losses, correct = zip(*torch.stack(results).tolist(), strict=True)
    loss = sum(loss * size for loss, size in zip(losses, sizes, strict=True)) / sum(sizes)
    return {"train_loss": loss, "train_accuracy": sum(correct) / sum(sizes)}


@torch.no_grad()
def update_ema(ema: SpikingNetwork, network: torch.nn.Module, step: int) -> None:
    """Update the exponential moving average of the weights after training step `step`, from 0.

    It averages over about the last tenth of the steps, at most EMA_STEPS, which removes noise as
    lowering the learning rate would. torch's AveragedModel would synchronize with a GPU each step.
    """
    weight = max(9 / (9 + step), 1 / EMA_STEPS)
    for average, value in zip(ema.parameters(), network.parameters(), strict=True):
        average.lerp_(value, weight)


def measure_norms(network: SpikingNetwork, frames: Frames, indices, batch_size: int) -> None:
    """Let norms measure the statistics that averaged weights need, on the recordings `indices`."""
    # In batches of about one size, since update_bn weighs them alike, and not smaller than asked.
    chunks = indices.tensor_split(max(1, len(indices) // batch_size))
    update_bn((frames.batch(chunk, network.dtype) for chunk in chunks), network)


@torch.no_grad()
def evaluate(
    network: SpikingNetwork,
    frames: Frames,
    indices: torch.Tensor,
    loss_fn: Callable,
    batch_size: int,
    name: str,
) -> dict:
    """Run the network over the recordings `indices`, without training.

    Returns mean `loss`, `accuracy`, `labels` [N], the output neurons' `spk` and `mem` [T, N, 10],
    and `predictions` [T, N]: the digit that the network's readout predicts after each step.
    """
    network.eval()
    total_loss, spks, mems = 0.0, [], []
    with progress(name, len(indices)) as bar:
        for x, labels in frames.batches(indices, batch_size, network.dtype):
            spk, mem = network(x)
            total_loss += float(loss_fn(spk, mem, labels).mean()) * len(labels)
            spks.append(spk.cpu())
            mems.append(mem.cpu())
            bar.update(len(labels))
    spk, mem = torch.cat(spks, dim=1), torch.cat(mems, dim=1)
    labels = frames.labels.cpu()[indices].long()
    predictions = predict(spk, mem, network.config.readout, over_time=True)
    return {
        "loss": total_loss / len(labels),
        "accuracy": mean_of(predictions[-1] == labels),
        "labels": labels,
        "spk": spk,
        "mem": mem,
        "predictions": predictions,
    }


def train(args: argparse.Namespace, data: Data, device: torch.device, checkpoint: dict) -> None:
    """Train for the epochs that are left; after each, write checkpoints and history."""
    labels = data.train.labels
    train_indices, val_indices = nmnist.split_validation(labels, args.val_split, args.seed)
    utils.set_seed(args.seed)
    network = build_model(network_config(args), **run_options(args)).to(device)
    ema = copy.deepcopy(network)  # the moving average is validated and tested
    parallel = utils.data_parallel(network, device)
    optimizer, loss_fn, history = make_optimizer(args, network), LOSSES[args.loss], []
    print(f"network     {network.title}, {num_parameters(network):,} parameters")
    print(f"training    {len(train_indices):,} recordings, validation {len(val_indices):,}")
    if checkpoint:
        history = resume(args, data, checkpoint, network, ema, optimizer)
    elif rank() == 0:
        keep_earlier_run(args)

    for epoch in range(len(history) + 1, args.epochs + 1):
        start = time.perf_counter()
        # Seeded again, so that a resumed run draws the numbers of one that was not stopped.
        utils.set_seed(args.seed, epoch)
        order = train_indices[torch.randperm(len(train_indices))]
        if rank() > 0:  # the same order in all processes, but other random numbers
            utils.set_seed(args.seed, epoch, rank())
        lr = learning_rate(args, epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batches = training_batches(args, data.train, order, network.dtype)
        step = (epoch - 1) * math.ceil(len(order) / args.batch_size)
        with progress(f"epoch {epoch}/{args.epochs}", len(order)) as bar:
            trained = train_one_epoch(parallel, ema, optimizer, loss_fn, batches, step, bar)
        speed = len(order) / (time.perf_counter() - start)
        if rank() == 0:
            entry = {"epoch": epoch} | trained
            entry |= validate(args, data, ema, order[:NORM_RECORDINGS], val_indices)
            check_finite(args, entry, network, ema)
            entry |= {"lr": lr, "processes": world_size(), "precision": args.precision}
            entry |= {"neuron_backend": describe_backend(network)}
            entry |= {"seconds": time.perf_counter() - start, "recordings_per_second": speed}
            history.append(entry)
            save(args, data, history, network, ema, optimizer)
            print_epoch(entry, args.epochs)
        utils.wait_for_all()


def validate(args, data: Data, ema: SpikingNetwork, norm_indices, val_indices) -> dict:
    """Return an epoch's loss and accuracy on validation and test recordings, and a temperature."""
    measure_norms(ema, data.train, norm_indices, args.batch_size)
    test_indices, loss_fn = torch.arange(len(data.test)), LOSSES[args.loss]
    val = evaluate(ema, data.train, val_indices, loss_fn, args.batch_size, "val")
    test = evaluate(ema, data.test, test_indices, loss_fn, args.batch_size, "test")
    scores = digit_scores(val["spk"], val["mem"], args.readout)
    return {
        "val_loss": val["loss"],
        "val_accuracy": val["accuracy"],
        "test_loss": test["loss"],
        "test_accuracy": test["accuracy"],
        "val_temperature": fit_temperature(scores, val["labels"]),
    }


def check_finite(args, entry: dict, network: SpikingNetwork, ema: SpikingNetwork) -> None:
    """Raise `UserError` if an epoch's losses or the weights after it are not finite."""
    losses = entry["train_loss"] + entry["val_loss"]
    if not (math.isfinite(losses) and utils.is_finite(network.state_dict(), ema.state_dict())):
        kept = f"{checkpoint_path(args, 'last')} holds epoch {entry['epoch'] - 1}"
        kept = kept if entry["epoch"] > 1 else "no epoch was finished"
        raise UserError(f"loss or weights not finite: choose a smaller --lr; {kept}")


def run_options(args: argparse.Namespace) -> dict[str, str]:
    """Return the flags that say how a network runs."""
    return {"neuron_backend": args.neuron_backend, "precision": args.precision}


def training_batches(args, frames: Frames, order: torch.Tensor, dtype: torch.dtype) -> Iterator:
    """Yield this process's share of each batch of the recordings `order`: frames and labels."""
    for chunk in order.split(args.batch_size):
        if len(chunk) // world_size() * frames.time_steps >= 2:  # what norms need
            yield frames.batch(chunk[rank() :: world_size()], dtype, augment=not args.no_augment)


def make_optimizer(args: argparse.Namespace, network: SpikingNetwork) -> torch.optim.Optimizer:
    """Return the optimizer of `--optimizer`; norms, beta and the like do not decay."""
    connections, others = [], []
    for name, parameter in network.named_parameters():
        owner = network.get_submodule(name.rpartition(".")[0])
        if parameter.dim() > 1 and not isinstance(owner, SpikingNeuron):
            connections.append(parameter)
        else:
            others.append(parameter)
    groups = [
        {"params": connections, "weight_decay": args.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, args.lr, momentum=0.9, fused=True)
    adam = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.optimizer]
    return adam(groups, args.lr, fused=True)


def learning_rate(args: argparse.Namespace, epoch: int) -> float:
    """Return the learning rate of an epoch, from 1: constant, or falling along a half cosine."""
    if not args.scheduler:
        return args.lr
    return args.lr * (1 + math.cos(math.pi * (epoch - 1) / args.epochs)) / 2


def progress(text: str, num_recordings: int) -> tqdm:
    """Return a progress bar, which the first process shows."""
    return tqdm(desc=text, total=num_recordings, unit="recording", leave=False, disable=rank() > 0)


def print_epoch(entry: dict, epochs: int) -> None:
    """Print an epoch's results in one line."""
    parts = [f"epoch {entry['epoch']:3d}/{epochs}"]
    for name in ("train", "val", "test"):
        parts.append(f"{name} {entry[f'{name}_loss']:.4f} {entry[f'{name}_accuracy']:7.2%}")
    parts += [f"{entry['recordings_per_second']:,.0f} recordings/s", f"lr {entry['lr']:.2g}"]
    print("   ".join(parts), flush=True)


def num_parameters(network: SpikingNetwork) -> int:
    """Return the number of learned numbers."""
    return sum(parameter.numel() for parameter in network.parameters())


def mean_of(values: torch.Tensor) -> float:
    """Return the mean of numbers or truth values [N]."""
    return values.double().mean().item()


# --- Saving and resuming --------------------------------------------------------------------------


def save(args, data: Data, history: list[dict], network, ema, optimizer) -> None:
    """Write the history and the last checkpoint, and the best one if this epoch is it."""
    best, last = checkpoint_path(args, "best"), checkpoint_path(args, "last")
    checkpoint = {
        "format": utils.CHECKPOINT_FORMAT,
        "settings": settings_of(args),
        "data": data.describe(),
        "versions": utils.versions() | {"threads": torch.get_num_threads()},
        "network": {name: value.cpu() for name, value in ema.state_dict().items()},
        "history": history,
    }
    # If validation accuracies are equal, the smaller loss is better. Test recordings do not count.
    scores = [(entry["val_accuracy"], -entry["val_loss"]) for entry in history]
    if scores[-1] > max(scores[:-1], default=(-1.0, 0.0)):
        utils.save_tensors(best, checkpoint)
    utils.write_json(log_path(args, "history.json"), history)
    # Last: a run killed before this repeats the epoch, and writes the same files again.
    training = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
    utils.save_tensors(last, checkpoint | {"training": training})


def keep_earlier_run(args: argparse.Namespace) -> None:
    """Rename the files of an earlier run of this network, if there are any."""
    checkpoints = [checkpoint_path(args, which) for which in ("last", "best")]
    names = ("history.json", "test_metrics.json", "predictions.csv")
    utils.keep_earlier_files(*checkpoints, *(log_path(args, name) for name in names))


def resume(args, data: Data, checkpoint: dict, network, ema, optimizer) -> list[dict]:
    """Put back what `save` wrote; return the history so far.

    Raises `UserError` if the run was trained on other recordings, or has more epochs than asked.
    """
    for name, here in data.describe().items():
        trained = checkpoint["data"].get(name)
        if here != trained:
            raise UserError(f"--resume: trained with another {name}: {trained}; here it is {here}")
    history, planned = checkpoint["history"], checkpoint["settings"]["epochs"]
    if args.epochs < len(history):
        raise UserError(f"--epochs {args.epochs}: the checkpoint has {len(history)} epochs already")
    load_weights(network, checkpoint["training"]["network"])
    load_weights(ema, checkpoint["network"])
    optimizer.load_state_dict(checkpoint["training"]["optimizer"])
    if rank() == 0:
        logged = utils.read_json(log_path(args, "history.json")) or []
        if logged[: len(history)] != history[: len(logged)]:  # of a run with another save_dir
            utils.keep_earlier_files(log_path(args, "history.json"))
        if args.epochs != planned:  # so that results tell the run that they are of
            path = checkpoint_path(args, "best")
            best = utils.load_checkpoint(path)
            best["settings"]["epochs"] = args.epochs
            utils.save_tensors(path, best)
    left = "" if len(history) < args.epochs else ": nothing is left to train"
    print(f"resume      after epoch {len(history)} of {args.epochs}{left}")
    if args.scheduler and args.epochs != planned:
        print(f"schedule    planned over {planned} epochs, goes on over {args.epochs}")
    return history


# --- Testing --------------------------------------------------------------------------------------


def test(args: argparse.Namespace, data: Data, device: torch.device, checkpoint: dict) -> dict:
    """Test a checkpoint's network; write and return its metrics, and draw figures if asked."""
    network = restore_network(checkpoint, **run_options(args)).to(device)
    with ActivityMeter(network) as meter:
        indices, loss_fn = torch.arange(len(data.test)), LOSSES[args.loss]
        result = evaluate(network, data.test, indices, loss_fn, args.batch_size, "test")
    spk, mem, labels, predictions = (result[k] for k in ("spk", "mem", "labels", "predictions"))
    best = checkpoint["history"][-1]
    scores = digit_scores(spk, mem, args.readout) / best["val_temperature"]
    confidences = torch.softmax(scores, -1).amax(-1)  # of the digit that is predicted, [T, N]
    readouts = (args.readout,) if args.no_spikes else READOUTS
    by_readout = {name: predict(spk, mem, name) for name in readouts}
    ties = {name: share_of_ties(spk, mem, name) for name in readouts if name != "membrane"}
    layers = meter.layers()
    metrics = {
        "accuracy": result["accuracy"],
        "loss": result["loss"],
        "num_recordings": len(labels),
        "num_blank": data.test.num_blank,
        "accuracy_by_readout": {k: mean_of(digits == labels) for k, digits in by_readout.items()},
        "ties": ties,
        "confusion_matrix": confusion_matrix(labels, predictions[-1], labels=range(10)).tolist(),
        "accuracy_over_time": (predictions == labels).double().mean(1).tolist(),
        "early_exit": early_exits(confidences, predictions, labels, meter),
        "layers": layers,
        "energy_uj": energy_uj(layers),
        "not_counted": sorted(meter.not_counted),
        "parameters": num_parameters(network),
        "tested_on": {k: v for k, v in data.describe().items() if k != "training part"},
        "trained_on": checkpoint["data"],
        "checkpoint": str(checkpoint_path(args, "best")),
        "network_hash": utils.fingerprint(checkpoint["network"]),
        "epoch": best["epoch"],
        "val_accuracy": best["val_accuracy"],
        "temperature": best["val_temperature"],
        "training_seconds": sum(entry["seconds"] for entry in checkpoint["history"]),
        "settings": checkpoint["settings"],
        "versions": {"trained": checkpoint["versions"], "tested": utils.versions()},
        "device": utils.describe_device(device),
        "precision": args.precision,
        "neuron_backend": describe_backend(network),
    }
    columns = {"file": data.test_files, "label": labels.tolist()}
    columns |= {name: digits.tolist() for name, digits in by_readout.items()}
    columns["confidence"] = [f"{value:.6f}" for value in confidences[-1].tolist()]
    columns[f"early_exit_step_{EXIT_THRESHOLD}"] = exit_steps(confidences, EXIT_THRESHOLD).tolist()
    write_results(args, metrics, columns)
    if args.visualize:
        visualize(args, metrics, checkpoint["history"], network)
        title = f"{network.title} on {data.name}, test recordings"
        draw_samples(args, data.test, predictions[-1], confidences[-1], title)
    return metrics


def share_of_ties(spk, mem, readout: str) -> float:
    """Return the share of recordings of which several digits lead by `readout` in the end."""
    scores = digit_scores(spk, mem, readout)[-1]
    return mean_of(leaders(scores).sum(-1) > 1)


def early_exits(confidences, predictions, labels, meter: ActivityMeter) -> list[dict]:
    """Return what is reached if each recording is decided once its confidence passes a threshold.

    For each of `EXIT_THRESHOLDS`: accuracy, mean time steps, and synaptic operations until then.
    Confidences and predictions are [T, N].
    """
    entries = []
    for threshold in EXIT_THRESHOLDS:
        steps = exit_steps(confidences, threshold)
        correct = predictions.gather(0, steps[None] - 1)[0] == labels
        entry = {"threshold": threshold, "accuracy": mean_of(correct), "mean_steps": mean_of(steps)}
        if not meter.network.config.no_spikes:
            entry["synaptic_operations"] = meter.operations_until(steps)
        entries.append(entry)
    return entries


def exit_steps(confidences: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return the first step, from 1, with a confidence [T, N] above the threshold, or T: [N]."""
    passed = confidences > threshold
    passed[-1] = True
    return passed.int().argmax(0) + 1


def print_metrics(metrics: dict) -> None:
    """Print the test metrics as a short table, and what stands out."""
    args = argparse.Namespace(**metrics["settings"])
    over_time, step_ms = metrics["accuracy_over_time"], milliseconds_per_step(args)
    after = [int(end) for end in saccade_ends(args) if end >= 1]
    exit_at = next(e for e in metrics["early_exit"] if e["threshold"] == EXIT_THRESHOLD)
    exits = f"{exit_at['mean_steps']:.1f} of {len(over_time)} steps"
    by_readout = []
    for name, accuracy in metrics["accuracy_by_readout"].items():
        ties = f" ({metrics['ties'][name]:.1%} ties)" if name in metrics["ties"] else ""
        by_readout.append(f"{name} {accuracy:.2%}{ties}")
    layers, energy = metrics["layers"], metrics["energy_uj"]
    macs = sum(layer["macs"] for layer in layers.values()) / 1e6
    cost = f"{macs:.2f} million MACs, {energy['without_spikes']:.3g} uJ at 45 nm"
    if "spiking" in energy:
        operations = sum(layer["synaptic_operations"] for layer in layers.values()) / 1e6
        spikes = f"{operations:.2f} million synaptic operations, {energy['spiking']:.3g} uJ"
        cost = f"{spikes}; without spikes {cost}"
    rows = {
        "test accuracy": f"{metrics['accuracy']:.2%} of {describe_test(metrics)}",
        "test loss": f"{metrics['loss']:.4f}",
        "by readout": "   ".join(by_readout),
        "over time": "   ".join(f"{over_time[t - 1]:.2%} at {t * step_ms:.0f} ms" for t in after)
        or "of no fixed duration",
        f"exit at {EXIT_THRESHOLD:.0%}": f"{exit_at['accuracy']:.2%} after {exits}",
        "cost per recording": cost,
        "precision, neurons": f"{metrics['precision']}, {metrics['neuron_backend']}",
        "checkpoint": f"{metrics['checkpoint']}, epoch {metrics['epoch']}",
    }
    for title, value in rows.items():
        print(f"{title:20} {value}")
    columns = list(next(iter(layers.values())))
    print(f"{'layer':20}" + "".join(f"{name.replace('_', ' '):>21}" for name in columns))
    for name, layer in layers.items():
        values = (f"{v:.3f}" if k == "firing_rate" else f"{v:,.0f}" for k, v in layer.items())
        print(f"{name:20}" + "".join(f"{value:>21}" for value in values))
    if metrics["not_counted"]:
        names = ", ".join(metrics["not_counted"])
        utils.warn(f"operations, MACs and energy leave out the connections of {names}")
    for name, layer in layers.items():
        if layer.get("firing_rate") in (0, 1):
            what = "never fire" if layer["firing_rate"] == 0 else "fire at every step"
            utils.warn(f"neurons of {name} {what}: try --threshold, --beta, --lr or more --epochs")


def describe_test(metrics: dict) -> str:
    """Return what a network was tested on, and whether it was trained on something else."""
    other = nmnist.describe_difference(metrics["tested_on"], metrics["trained_on"])
    name = metrics["tested_on"]["data set"]
    return f"{metrics['num_recordings']:,} test recordings of {name}" + (other and f"; {other}")


def write_results(args: argparse.Namespace, metrics: dict, columns: dict[str, list]) -> None:
    """Write metrics and predictions; those of another network or other recordings are kept."""
    paths = log_path(args, "test_metrics.json"), log_path(args, "predictions.csv")
    earlier = utils.read_json(paths[0]) or {}
    if any(
        earlier.get(name, metrics[name]) != metrics[name] for name in ("network_hash", "tested_on")
    ):
        utils.keep_earlier_files(*paths)
    utils.write_json(paths[0], metrics)
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    utils.write_csv(paths[1], rows)
    print(f"{'metrics':20} {paths[0]}\n{'predictions':20} {paths[1]}")


def milliseconds_per_step(args: argparse.Namespace) -> float | None:
    """Return the nominal duration of a time step; None with `--bin_by events`, where it varies."""
    if args.bin_by == "events":
        return None
    return nmnist.SACCADE_ENDS[0 if args.first_saccade_only else -1] / args.time_steps


def saccade_ends(args: argparse.Namespace) -> list[float]:
    """Return where a recording's saccades end, in steps; [] where steps have no fixed duration."""
    ends = nmnist.SACCADE_ENDS[:1] if args.first_saccade_only else nmnist.SACCADE_ENDS
    return [end * args.time_steps / ends[-1] for end in ends] if args.bin_by == "time" else []


def visualize(args, metrics: dict, history: list[dict], network: SpikingNetwork) -> None:
    """Write the figures of training and of the test."""
    # log_dir's history goes on after the best epoch, if it is that of the same run.
    logged = utils.read_json(log_path(args, "history.json")) or []
    history = logged if logged[: len(history)] == history else history
    trained = f"{network.title} on {metrics['trained_on']['data set']}"
    utils.plot_history(history, trained, Path(args.log_dir) / "training_results.png")
    title = f"{network.title}: {metrics['accuracy']:.2%} of {describe_test(metrics)}"
    counts = np.array(metrics["confusion_matrix"])
    utils.plot_confusion_matrix(counts, title, log_path(args, "confusion_matrix.png"))
    utils.plot_accuracy_over_time(
        np.array(metrics["accuracy_over_time"]),
        metrics["early_exit"],
        saccade_ends(args)[:-1],
        milliseconds_per_step(args),
        title,
        log_path(args, "accuracy_over_time.png"),
    )
    if args.model == "resnet":
        weight = network.conv1.weight.detach().cpu()
        title = f"{trained}\nthe {len(weight)} filters of conv1, 3 x 3 pixels each"
        utils.plot_filters(weight, title, log_path(args, "filters.png"))


def draw_samples(args, frames: Frames, predictions, confidences, title: str) -> None:
    """Draw 20 test recordings with true and predicted digit: mistakes first, the digits in turn.

    The events are from the middle of the first saccade: over a whole recording ON and OFF cover
    one another.
    """
    labels, predictions = frames.labels.cpu().numpy(), predictions.numpy()
    indices = utils.mistakes_first(labels, predictions, 20)
    sequences = frames.batch(torch.from_numpy(indices))[0]
    end = (saccade_ends(args) or [args.time_steps / 3])[0]
    first, last = int(0.37 * end), math.ceil(0.615 * end)  # 37 to 62 of 100 ms
    images = sequences[first:last].sum(0).cpu().numpy()
    texts = []
    for i in indices:
        mark = "" if labels[i] == predictions[i] else "mistake: "
        what = f"{mark}{labels[i]} read as {predictions[i]}"
        texts.append(f"{what}\nconfidence {confidences[i]:.0%}, no. {i}")
    mistakes = int((labels != predictions).sum())
    shown = f"{min(mistakes, len(indices))} of {mistakes} mistakes, then correct ones"
    title += f"\n{shown}; events in the middle of the first saccade"
    utils.plot_predictions(images, texts, title, log_path(args, "samples.png"))


# --- The script -----------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    flags, given = utils.parse_flags(parser, argv)
    device = utils.prepare_device(flags["device"])
    utils.init_distributed(device)
    check_flags(parser, flags, given)
    seeds = list(dict.fromkeys(given.get("seed", [])))
    try:
        if len(seeds) > 1:
            with hold_folders(flags):
                run_seeds(flags, given, seeds, device)
        else:
            seed = {"seed": seeds[0]} if seeds else {}
            metrics = run(flags | seed, given | seed, device)
            if rank() == 0:
                print_metrics(metrics)
                if not flags["visualize"]:
                    print("next        " + shlex.join(draw_command(given)))
    except NetworkError as error:
        raise UserError(f"--model {flags['model']}: {error}") from None
    utils.leave_distributed()


@contextlib.contextmanager
def hold_folders(flags: dict) -> Iterator[None]:
    """Hold save_dir and log_dir, where other runs of this network are refused; a test does not."""
    network = NetworkConfig.from_settings(flags).name
    with contextlib.ExitStack() as held:
        for name in ("save_dir", "log_dir") if not flags["test_only"] else ():
            held.enter_context(utils.hold_folder(f"--{name}", flags[name], network))
        yield


def run(flags: dict, given: dict, device: torch.device) -> dict:
    """Train and test one network, or test it alone; return the metrics, in the first process."""
    processes = f", {world_size()} processes" if world_size() > 1 else ""
    print(f"device      {utils.describe_device(device)}{processes}")
    if flags["test_only"]:
        return test_only(flags, given, device) if rank() == 0 else {}
    with hold_folders(flags):
        checkpoint = load_last(argparse.Namespace(**flags))
        args = complete_flags(flags, given, checkpoint, device)
        with utils.first_process_first():  # it downloads and bins, the others read the cache
            data = nmnist.load_data(args, device)
        try:
            train(args, data, device, checkpoint)
        except KeyboardInterrupt:
            hint = "To go on after the last finished epoch, repeat the command with --resume."
            raise KeyboardInterrupt(hint) from None
        if rank() > 0:
            return {}
        best = utils.load_checkpoint(checkpoint_path(args, "best"))
        return test(args, data, device, best)


def test_only(flags: dict, given: dict, device: torch.device) -> dict:
    """Test the best checkpoint; return the metrics."""
    utils.check_folder("--log_dir", flags["log_dir"])
    checkpoint = utils.load_checkpoint(checkpoint_path(argparse.Namespace(**flags), "best"))
    args = complete_flags(flags, given, checkpoint, device)
    return test(args, nmnist.load_data(args, device, ["test"]), device, checkpoint)


def draw_command(given: dict) -> list[str]:
    """Return the command that tests and draws what a command with the flags `given` trained."""
    names = ("model", "no_spikes", "data_dir", "dataset", "save_dir", "log_dir")
    typed = {name: given[name] for name in names if name in given}
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in typed.items()]
    return ["python", sys.argv[0], *flags, "--test_only", "--visualize"]


def run_seeds(flags: dict, given: dict, seeds: list[int], device: torch.device) -> None:
    """Run the script for each seed in folders of its own; print and write a table of the tests.

    Raises `UserError` if the networks differ in more than the seed.
    """
    rows = []
    for seed in seeds:
        own = {name: str(Path(flags[name], f"seed_{seed}")) for name in ("save_dir", "log_dir")}
        own["seed"] = seed
        print(f"seed        {seed}")
        metrics = run(flags | own, given | own, device)
        if rank() == 0:
            print(f"accuracy    {metrics['accuracy']:.2%} of {describe_test(metrics)}")
            rows.append(row_of_table(metrics))
            for name in ("training part", *metrics["settings"]):
                expected = seed if name == "seed" else rows[0][name]
                if rows[-1][name] != expected:
                    text = f"{name} {rows[-1][name]}, not {expected}: a table is of seeds alone"
                    raise UserError(f"{metrics['checkpoint']} was trained with {text}")
    if rank() == 0:
        print_seeds(rows, log_path(argparse.Namespace(**flags), "seeds.csv"))


def row_of_table(metrics: dict) -> dict:
    """Return what a table of seeds says of one network."""
    row = {"dataset": metrics["tested_on"]["data set"], "accuracy": metrics["accuracy"]}
    for readout, accuracy in metrics["accuracy_by_readout"].items():
        row[f"accuracy_{readout}"] = accuracy
    row |= {"test_loss": metrics["loss"], "epoch": metrics["epoch"]}
    return row | {"training part": metrics["trained_on"]["training part"]} | metrics["settings"]


def print_seeds(rows: list[dict], path: Path) -> None:
    """Print mean, standard deviation, minimum and maximum of the accuracies; write the rows."""
    utils.keep_earlier_files(path)
    utils.write_csv(path, rows)
    print(f"{'test accuracy':20} {'mean':>8} {'std':>8} {'min':>8} {'max':>8}   {len(rows)} seeds")
    for name in (name for name in rows[0] if name.startswith("accuracy")):
        values = np.array([row[name] for row in rows])
        numbers = values.mean(), values.std(ddof=1), values.min(), values.max()
        print(f"{name:20} " + " ".join(f"{value:8.2%}" for value in numbers))
    print(f"seeds       {path}")


if __name__ == "__main__":
    utils.run_script(main)
