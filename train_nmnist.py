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
import copy
import functools
import math
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import snntorch.functional as SF
import torch
from sklearn.metrics import confusion_matrix
from snntorch import SpikingNeuron
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

import models
import nmnist
import utils
from models import ActivityMeter, SpikingNetwork
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


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all flags: the settings, and how to run."""
    parser = utils.make_parser(__doc__)
    add_network_flags(parser.add_argument_group("network"))
    add_training_flags(parser.add_argument_group("training"))
    nmnist.add_frame_flags(parser.add_argument_group("frames"))
    add_running_flags(parser.add_argument_group("running"))
    return parser


def settings_of(args: argparse.Namespace) -> dict:
    """Return the settings among the flags: all that shapes a trained network."""
    names = utils.flag_names(add_network_flags, add_training_flags, nmnist.add_frame_flags)
    return {name: getattr(args, name) for name in names}


def add_network_flags(group) -> None:
    """Add the flags of `NetworkConfig`."""
    flag, default = functools.partial(add_flag, group), models.NetworkConfig()
    share = number(float, 0, 1)
    flag("--model", default.model, "network", choices=list(models.NETWORKS))
    flag("--beta", default.beta, "decay of the membrane potential per step", type=share)
    threshold = "potential above which a neuron fires"
    flag("--threshold", default.threshold, threshold, type=number(float, 1e-6))
    alpha = "decay per step of ALIF's adaptation and of the synaptic current (resnet)"
    flag("--alpha", default.alpha, alpha, type=share)
    dropout = "probability of dropping a neuron of the last hidden layer, for a whole recording"
    flag("--dropout", default.dropout, dropout, type=number(float, 0, 0.999))
    flag("--width", default.width, "factor on channels and hidden layer", type=number(int, 1, 64))
    readout = "what decides: the mean membrane potential, the most spikes, or the first spike"
    flag("--readout", default.readout, readout, choices=models.READOUTS)
    flag("--learn_beta", False, "learn one beta per layer")
    flag("--no_spikes", False, "ReLU in place of neurons; its files are named <model>_relu_...")


def add_training_flags(group) -> None:
    """Add the flags that say how to train."""
    flag, positive = functools.partial(add_flag, group), number(int, 1)
    flag("--epochs", 10, "passes over the training recordings", type=positive)
    flag("--batch_size", 128, "recordings per training step", type=positive)
    rates = ", ".join(f"{lr} for {name}" for name, lr in DEFAULT_LR.items())
    flag("--lr", None, f"learning rate (default: {rates})", type=number(float, 1e-9))
    flag("--weight_decay", 0.0, "weight decay of connections alone", type=number(float, 0))
    flag("--optimizer", "adam", "optimizer", choices=list(DEFAULT_LR))
    loss = "ce: cross entropy of the membrane potentials at every step; mse: squared error of the "
    loss += "spike counts; count: cross entropy of the spike counts"
    flag("--loss", "ce", loss, choices=list(LOSSES))
    flag("--scheduler", False, "lower the learning rate along a half cosine")
    flag("--no_augment", False, "train on the recordings as they are, without random shift, ...")
    share = "share of training recordings for validation"
    flag("--val_split", 0.1, share, type=number(float, 0.0001, 0.9999))
    seed = "seed of all random numbers; of several, each trains a network"
    flag("--seed", 0, seed, type=number(int, 0, 2**32 - 1), nargs="+")


def add_running_flags(group) -> None:
    """Add the flags that say where and how to run, and what to read and write."""
    flag = functools.partial(add_flag, group)
    nmnist.add_data_flags(group)
    flag("--save_dir", "./checkpoints", "folder of the checkpoints")
    flag("--log_dir", "./logs", "folder of history, metrics and figures")
    utils.add_device_flags(group)
    flag("--resume", False, "go on with the run of this command in save_dir, if there is one")
    flag("--test_only", False, "test the best checkpoint, without training")
    flag("--visualize", False, "write figures to log_dir")


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with status 2 if flags contradict one another."""
    default = parser.parse_args([])
    for name in NEED_SPIKES:
        if args.no_spikes and getattr(args, name) != getattr(default, name):
            parser.error(f"argument --{name}: not allowed with argument --no_spikes")
    if models.NETWORKS[args.model] is models.SpikingCNN and args.alpha != default.alpha:
        parser.error("argument --alpha: --model cnn has no neurons that use it")
    if args.test_only and args.resume:
        parser.error("argument --resume: not allowed with argument --test_only")
    if args.batch_size // world_size() * args.time_steps < 2:
        parser.error("argument --batch_size: too small, norms need two frames in each process")


def take_settings(parser, argv: list[str], args: argparse.Namespace, trained: dict) -> None:
    """Give `args` the settings of a network to test; print which flags in `argv` are ignored."""
    # With the network's settings as defaults, what still differs was typed.
    parser.set_defaults(**trained)
    typed = parser.parse_args(argv)
    if isinstance(typed.seed, list):
        typed.seed = args.seed
    trained = trained | {"batch_size": typed.batch_size}  # a test may have another
    for name, value in trained.items():
        asked = getattr(typed, name)
        if asked != value:
            print(f"ignored     --{name} {asked}: the network was trained with {value}")
        setattr(args, name, value)
    if args.loss not in LOSSES:
        raise UserError(f"--loss {args.loss}: this script does not add it to LOSSES")


def check_same_command(args: argparse.Namespace, trained: dict) -> None:
    """Raise `UserError` if the settings are not those `trained` of a run; epochs may be more."""
    asked = settings_of(args)
    other = [name for name in asked if name != "epochs" and asked[name] != trained[name]]
    if args.epochs < trained["epochs"]:
        other.append("epochs")
    if other:
        flags = vars(args) | trained | {"epochs": max(args.epochs, trained["epochs"])}
        command = shlex.join(["python", sys.argv[0], *flags_of(flags)])
        raise UserError(
            f"--resume: the run in {args.save_dir} differs in {', '.join(other)}: continue it by "
            f"`{command}`, or omit --resume to start a new run"
        )


def flags_of(values: dict) -> list[str]:
    """Return the flags that set `values`, without those that are the parser's defaults."""
    defaults = vars(make_parser().parse_args([]))
    flags = []
    for name, value in values.items():
        if value != defaults[name]:
            flags.append(f"--{name}" if value is True else f"--{name}={value}")
    return flags


def network_config(args: argparse.Namespace) -> models.NetworkConfig:
    """Return the flags that say what the network is."""
    return models.NetworkConfig.from_settings(vars(args))


def load_checkpoint(args: argparse.Namespace, which: str, *parts: str) -> dict:
    """Return the checkpoint of the 'last' epoch, or of the 'best' validation."""
    expected = {"model": args.model, "no_spikes": args.no_spikes}
    return utils.load_checkpoint(checkpoint_path(args, which), parts, settings_of(args), **expected)


def load_last(args: argparse.Namespace) -> dict:
    """Return the checkpoint to resume, {} if training starts from scratch."""
    if not args.resume:
        return {}
    path = checkpoint_path(args, "last")
    if not path.exists():
        print(f"resume      no checkpoint at {path} yet: training starts from scratch")
        return {}
    last = load_checkpoint(args, "last", "best_network", "training")
    check_same_command(args, last["settings"])
    return last


def checkpoint_path(args: argparse.Namespace, which: str) -> Path:
    """Return the path of the checkpoint of the 'last' epoch, or of the 'best' validation."""
    return Path(args.save_dir) / f"{network_config(args).name}_{which}.pt"


def log_path(args: argparse.Namespace, name: str) -> Path:
    """Return the path of a file of this network in log_dir."""
    return Path(args.log_dir) / f"{network_config(args).name}_{name}"


# --- Losses ---------------------------------------------------------------------------------------


# By --loss: functions of the output neurons' spk and mem [T, B, 10] and the labels [B]. They return
# the mean over a batch, or a value for each recording. Add your own: LOSSES["margin"] = margin_loss
LOSSES = {
    # Cross entropy of the membrane potentials at every time step, averaged. A potential tells how
    # far from firing a neuron is, a spike only 0 or 1.
    "ce": lambda spk, mem, labels: SF.ce_rate_loss()(mem, labels),
    # Squared error of spike counts, T for the correct digit, 0 for others, by T.
    "mse": lambda spk, mem, labels: SF.mse_count_loss()(spk, labels),
    # Cross entropy of spike counts, where T spikes count COUNT_RANGE.
    "count": lambda spk, mem, labels: SF.ce_count_loss()(spk * (COUNT_RANGE / len(spk)), labels),
}

# --- Training -------------------------------------------------------------------------------------


def train_one_epoch(network, ema, optimizer, loss_fn, batches: Iterator, step: int, bar) -> dict:
    """Train on `batches` of (frames, labels); return the mean `train_loss` and `train_accuracy`.

    Both are of the network while it changes, on recordings that may be augmented, of this process's
    share if there are several. `step` is the number of training steps before.
    """
    network.train()
    own = network.module if isinstance(network, DistributedDataParallel) else network
    results, sizes = [], []  # of each batch; reading results synchronizes with a GPU
    for frames, labels in batches:
        spk, mem = network(frames)
        loss = loss_fn(spk, mem, labels).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        own.clamp_decays()
        update_ema(ema, network, step)
        step += 1
        correct = (models.predict(spk.detach(), mem.detach(), ema.config.readout) == labels).sum()
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


@torch.no_grad()
def evaluate(network, frames: Frames, indices, loss_fn, batch_size: int, name: str) -> dict:
    """Run the network over the recordings `indices` [N], without training; `name` is for the bar.

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
    predictions = models.predict(spk, mem, network.config.readout, over_time=True)
    return {
        "loss": total_loss / len(labels),
        "accuracy": mean_of(predictions[-1] == labels),
        "labels": labels,
        "spk": spk,
        "mem": mem,
        "predictions": predictions,
    }


def train(args: argparse.Namespace, data: Data, device: torch.device, last: dict) -> dict:
    """Train for the epochs that are left; after each, write checkpoints and history.

    `last` is the last checkpoint of the run to resume, {} for a new one. Returns the new one.
    """
    labels = data.train.labels
    train_indices, val_indices = nmnist.split_validation(labels, args.val_split, args.seed)
    utils.set_seed(args.seed)
    before = last["history"][-1] if last else None
    options = models.run_options(device, args.neuron_backend, args.precision, before)
    network = models.build_model(network_config(args), **options).to(device)
    ema = copy.deepcopy(network)  # the moving average is validated and tested
    parallel = utils.data_parallel(network, device)
    optimizer, loss_fn = make_optimizer(args, network), LOSSES[args.loss]
    size = num_parameters(network)
    print(f"network     {network.title}, {size:,} parameters, {network.precision}")
    print(f"training    {len(train_indices):,} recordings, validation {len(val_indices):,}")
    if last:
        resume(args, data, last, network, ema, optimizer)
    elif rank() == 0:
        keep_earlier_run(args)

    for epoch in range(len(last.get("history", [])) + 1, args.epochs + 1):
        start = time.perf_counter()
        # Seeded again, so that a resumed run draws the numbers of one that was not stopped.
        utils.set_seed(args.seed, epoch)
        order = train_indices[torch.randperm(len(train_indices))]
        if rank() > 0:  # the same order in all processes, but other random numbers
            utils.set_seed(args.seed, epoch, rank())
        lr = args.lr
        if args.scheduler:  # along a half cosine
            lr *= (1 + math.cos(math.pi * (epoch - 1) / args.epochs)) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr
        batches = training_batches(args, data.train, order, network.dtype)
        step = (epoch - 1) * math.ceil(len(order) / args.batch_size)
        with progress(f"epoch {epoch}/{args.epochs}", len(order)) as bar:
            trained = train_one_epoch(parallel, ema, optimizer, loss_fn, batches, step, bar)
        speed = len(order) / (time.perf_counter() - start)
        if rank() == 0:
            # Also what training changes in buffers, such as a threshold that adapts.
            ema.load_state_dict(dict(network.named_buffers()), strict=False)
            entry = {"epoch": epoch} | trained
            entry |= validate(args, data, ema, order[:NORM_RECORDINGS], val_indices)
            check_finite(args, entry, network, ema)
            entry |= {"lr": lr} | models.how_it_runs(network) | {"processes": world_size()}
            entry |= {"seconds": time.perf_counter() - start, "recordings_per_second": speed}
            last = save(args, data, last, entry, network, ema, optimizer)
            print_epoch(entry, args.epochs)
        utils.wait_for_all()
    return last


def validate(args, data: Data, ema: SpikingNetwork, norm_indices, val_indices) -> dict:
    """Measure norms; return loss and accuracy on validation and test recordings, a temperature."""
    # The statistics that averaged weights need, in batches of about one size, since update_bn
    # weighs them alike, and not smaller than asked.
    chunks = norm_indices.tensor_split(max(1, len(norm_indices) // args.batch_size))
    update_bn((data.train.batch(chunk, ema.dtype) for chunk in chunks), ema)
    test_indices, loss_fn = torch.arange(len(data.test)), LOSSES[args.loss]
    val = evaluate(ema, data.train, val_indices, loss_fn, args.batch_size, "val")
    test = evaluate(ema, data.test, test_indices, loss_fn, args.batch_size, "test")
    scores = models.digit_scores(val["spk"], val["mem"], args.readout)
    return {
        "val_loss": val["loss"],
        "val_accuracy": val["accuracy"],
        "test_loss": test["loss"],
        "test_accuracy": test["accuracy"],
        "val_temperature": models.fit_temperature(scores, val["labels"]),
    }


def check_finite(args, entry: dict, network: SpikingNetwork, ema: SpikingNetwork) -> None:
    """Raise `UserError` if an epoch's losses or the weights after it are not finite."""
    losses = entry["train_loss"] + entry["val_loss"]
    if not (math.isfinite(losses) and utils.is_finite(network.state_dict(), ema.state_dict())):
        kept = f"{checkpoint_path(args, 'last')} holds epoch {entry['epoch'] - 1}"
        kept = kept if entry["epoch"] > 1 else "no epoch was finished"
        raise UserError(f"loss or weights not finite: choose a smaller --lr; {kept}")


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


def save(args, data: Data, earlier: dict, entry: dict, network, ema, optimizer) -> dict:
    """Write the run after an epoch, of which `entry` tells; return its new last checkpoint.

    `earlier` is the one before, {} after the first epoch.
    """
    history = [*earlier.get("history", []), entry]
    weights = {name: value.to("cpu", copy=True) for name, value in ema.state_dict().items()}
    last = {
        "format": utils.CHECKPOINT_FORMAT,
        "settings": settings_of(args),
        "data": data.describe(),
        "versions": utils.versions(),
        "history": history,
        "network": weights,
        "best_network": weights if best_epoch(history) == len(history) else earlier["best_network"],
        "training": {"network": network.state_dict(), "optimizer": optimizer.state_dict()},
    }
    utils.save_tensors(checkpoint_path(args, "last"), last)
    write_best_and_history(args, last)
    return last


def write_best_and_history(args: argparse.Namespace, last: dict) -> None:
    """Write what of the last checkpoint is read by others than --resume."""
    utils.save_tensors(checkpoint_path(args, "best"), best_of(last))
    path = log_path(args, "history.json")
    logged = utils.read_json(path) or []
    if logged != last["history"][: len(logged)]:  # that of another run
        utils.keep_earlier_files(path)
    utils.write_json(path, last["history"])


def best_of(last: dict) -> dict:
    """Return the best checkpoint, a part of the last one: what is tested, and what led to it."""
    best = {name: last[name] for name in ("format", "settings", "data", "versions")}
    best["history"] = last["history"][: best_epoch(last["history"])]
    best["network"] = last["best_network"]
    return best


def best_epoch(history: list[dict]) -> int:
    """Return the epoch with the best validation accuracy, and of these the smallest loss."""
    return max(history, key=lambda entry: (entry["val_accuracy"], -entry["val_loss"]))["epoch"]


def keep_earlier_run(args: argparse.Namespace) -> None:
    """Rename the files of an earlier run of this network, first the one that --resume reads."""
    checkpoints = [checkpoint_path(args, which) for which in ("last", "best")]
    names = ("history.json", "test_metrics.json", "predictions.csv")
    utils.keep_earlier_files(*checkpoints, *(log_path(args, name) for name in names))


def resume(args, data: Data, last: dict, network, ema, optimizer) -> None:
    """Put back what `save` wrote. Raises `UserError` if it was trained on other recordings."""
    for name, here in data.describe().items():
        trained = last["data"].get(name)
        if here != trained:
            raise UserError(f"--resume: trained with another {name}: {trained}; here it is {here}")
    models.load_weights(network, last["training"]["network"])
    models.load_weights(ema, last["network"])
    optimizer.load_state_dict(last["training"]["optimizer"])
    history, planned = last["history"], last["settings"]["epochs"]
    left = "" if len(history) < args.epochs else ": nothing is left to train"
    now = models.how_it_runs(network) | {"processes": world_size()}
    if not left and (changes := models.describe_changes(now, history[-1], names=now)):
        utils.warn(f"resumed otherwise than before, which gives other numbers: {changes}")
    print(f"resume      after epoch {len(history)} of {args.epochs}{left}")
    if args.scheduler and args.epochs != planned:
        print(f"schedule    planned over {planned} epochs, goes on over {args.epochs}")
    if left and rank() == 0:
        write_best_and_history(args, last)


# --- Testing --------------------------------------------------------------------------------------


def test(args: argparse.Namespace, data: Data, device: torch.device, checkpoint: dict) -> dict:
    """Test a checkpoint's network; write and return its metrics, and draw figures if asked."""
    network = models.restore_network(checkpoint, device, args.neuron_backend, args.precision)
    with ActivityMeter(network) as meter:
        indices, loss_fn = torch.arange(len(data.test)), LOSSES[args.loss]
        result = evaluate(network, data.test, indices, loss_fn, args.batch_size, "test")
    spk, mem, labels, predictions = (result[k] for k in ("spk", "mem", "labels", "predictions"))
    best = checkpoint["history"][-1]
    scores = models.digit_scores(spk, mem, args.readout) / best["val_temperature"]
    confidences = torch.softmax(scores, -1).amax(-1)  # of the digit that is predicted, [T, N]
    readouts = (args.readout,) if args.no_spikes else models.READOUTS
    by_readout = {name: models.predict(spk, mem, name) for name in readouts}
    ties = {}  # by readout: the share of recordings of which several digits lead in the end
    for name in readouts[1:]:
        leaders = models.leaders(models.digit_scores(spk, mem, name)[-1])
        ties[name] = mean_of(leaders.sum(-1) > 1)
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
        "energy_uj": models.energy_uj(layers),
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
        "device_name": utils.describe_device(device),
    } | models.how_it_runs(network)
    columns = {"file": data.test_files, "label": labels.tolist()}
    columns |= {name: digits.tolist() for name, digits in by_readout.items()}
    columns["confidence"] = [f"{value:.6f}" for value in confidences[-1].tolist()]
    columns[f"early_exit_step_{EXIT_THRESHOLD}"] = exit_steps(confidences, EXIT_THRESHOLD).tolist()
    write_results(args, metrics, columns)
    if args.visualize:
        visualize(args, metrics, checkpoint["history"], network)
        title = f"{network.title}{network.note} on {data.name}, test recordings"
        draw_samples(args, data.test, predictions[-1], confidences[-1], title)
    return metrics


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
    times = [f"{over_time[t - 1]:.2%} at {t * step_ms:.0f} ms" for t in after]
    exit_at = next(e for e in metrics["early_exit"] if e["threshold"] == EXIT_THRESHOLD)
    exits = f"{exit_at['mean_steps']:.1f} of {len(over_time)} steps"
    by_readout = [f"{name} {x:.2%}" for name, x in metrics["accuracy_by_readout"].items()]
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
        "over time": "   ".join(times) or "of no fixed duration",
        f"exit at {EXIT_THRESHOLD:.0%}": f"{exit_at['accuracy']:.2%} after {exits}",
        "cost per recording": cost,
        "precision, neurons": f"{metrics['precision']}, {metrics['neuron_backend']}",
        "checkpoint": f"{metrics['checkpoint']}, epoch {metrics['epoch']}",
    }
    for title, value in rows.items():
        print(f"{title:20} {value}")
    columns = list(dict.fromkeys(column for layer in layers.values() for column in layer))
    print(f"{'layer':20}" + "".join(f"{column.replace('_', ' '):>21}" for column in columns))
    for name, layer in layers.items():
        cells = []
        for column in columns:
            digits = 0 if column in ("neurons", "macs", "synaptic_operations") else 3
            cells.append(f"{layer[column]:,.{digits}f}" if column in layer else "")
        print(f"{name:20}" + "".join(f"{cell:>21}" for cell in cells))
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
    """Write metrics and predictions; earlier ones are kept if they are not of the same test."""
    paths = log_path(args, "test_metrics.json"), log_path(args, "predictions.csv")
    earlier = utils.read_json(paths[0]) or {}
    names = ("network_hash", "tested_on", "device", "precision", "neuron_backend")
    if any(earlier.get(name) != metrics[name] for name in names):
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
    name = network.title + network.note
    title = f"{name}: {metrics['accuracy']:.2%} of {describe_test(metrics)}"
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
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    args = parser.parse_args(argv)
    args.lr = args.lr or DEFAULT_LR[args.optimizer]
    device = utils.prepare_device(args.device)
    utils.init_distributed(device)
    check_flags(parser, args)
    processes = f", {world_size()} processes" if world_size() > 1 else ""
    print(f"device      {utils.describe_device(device)}{processes}")
    seeds = list(dict.fromkeys(args.seed)) if isinstance(args.seed, list) else [args.seed]
    try:
        if len(seeds) > 1:
            run_seeds(parser, argv, args, seeds, device)
        else:
            args.seed = seeds[0]
            metrics, _ = run(parser, argv, args, device)
            if rank() == 0:
                print_metrics(metrics)
                if argv == sys.argv[1:] and Path(sys.argv[0]).is_file():  # else nothing was typed
                    print_next(argv, args)
    except models.NetworkError as error:
        raise UserError(f"--model {args.model}: {error}") from None
    utils.leave_distributed()


def run(parser, argv, args, device, data: Data | None = None) -> tuple[dict, Data | None]:
    """Train and test one network, or test it alone; return metrics and recordings.

    `data` are the recordings of the seed before, if any. The first process alone returns metrics.
    """
    if args.test_only and rank() > 0:
        return {}, None
    with hold_folders(args):
        if args.test_only:
            checkpoint = load_checkpoint(args, "best")
            take_settings(parser, argv, args, checkpoint["settings"])
            args.dataset = nmnist.trained_dataset(args.data_dir, args.dataset, checkpoint["data"])
            data = nmnist.load_data(args, device, ["test"], data)
            return test(args, data, device, checkpoint), data
        last = load_last(args)
        args.dataset = nmnist.trained_dataset(args.data_dir, args.dataset, last.get("data", {}))
        with utils.first_process_first():  # it downloads and bins, the others read the cache
            data = nmnist.load_data(args, device, loaded=data)
        try:
            last = train(args, data, device, last)
        except KeyboardInterrupt:
            hint = "To go on after the last finished epoch, repeat the command with --resume."
            raise KeyboardInterrupt(hint) from None
        return (test(args, data, device, best_of(last)) if rank() == 0 else {}), data


def hold_folders(args: argparse.Namespace):
    """Hold the folders that are written to, in which other such runs are refused."""
    name = network_config(args).name
    if args.test_only:
        return utils.hold_folders(f"{name}_test", log_dir=args.log_dir)
    return utils.hold_folders(name, save_dir=args.save_dir, log_dir=args.log_dir)


def print_next(argv: list[str], args: argparse.Namespace) -> None:
    """Print the commands that test and draw the network of the command `argv`."""
    if not args.visualize:
        # argparse takes --res for --resume, too.
        words = [word for word in argv if not (word[:5] == "--res" and "--resume".startswith(word))]
        words += ["--visualize"] if args.test_only else ["--test_only", "--visualize"]
        print("next        " + shlex.join(["python", sys.argv[0], *words]))
    script = Path(sys.argv[0])
    if script.resolve() == Path(__file__).resolve() and not args.no_spikes:
        names = utils.flag_names(nmnist.add_data_flags, utils.add_device_flags)
        flags = flags_of({name: getattr(args, name) for name in ("model", "save_dir", *names)})
        script = script.with_name("visualize_activations.py")
        print("next        " + shlex.join(["python", str(script), *flags, "--visualize_all"]))


def run_seeds(parser, argv, args: argparse.Namespace, seeds: list[int], device) -> None:
    """Run the script for each seed, in folders of its own; print and write a table of the tests."""
    tests, data = [], None
    with hold_folders(args):
        for seed in seeds:
            print(f"seed        {seed}")
            own = argparse.Namespace(**vars(args) | {"seed": seed})
            own.save_dir = str(Path(args.save_dir, f"seed_{seed}"))
            own.log_dir = str(Path(args.log_dir, f"seed_{seed}"))
            metrics, data = run(parser, argv, own, device, data)
            args.dataset = own.dataset  # that of the first one's checkpoint, if there is one
            if rank() == 0:
                print(f"accuracy    {metrics['accuracy']:.2%} of {describe_test(metrics)}")
                tests.append(metrics)
        if rank() == 0:
            print_seeds(tests, log_path(args, "seeds.csv"))


def print_seeds(tests: list[dict], path: Path) -> None:
    """Print mean and standard deviation of the accuracies; write a row for each seed."""
    rows = []
    for metrics in tests:
        results = {"epoch": metrics["epoch"], "test_loss": metrics["loss"]}
        results["accuracy"] = metrics["accuracy"]
        for readout, accuracy in metrics["accuracy_by_readout"].items():
            results[f"accuracy_{readout}"] = accuracy
        conditions = metrics["trained_on"] | metrics["tested_on"] | metrics["settings"]
        conditions |= {name: metrics[name] for name in ("precision", "neuron_backend")}
        rows.append(results | conditions)
    if len({row["seed"] for row in rows}) < len(rows):
        utils.warn("two of these networks are of the same seed")
    differing = {name for name in conditions for row in rows if row[name] != rows[0][name]}
    if other := sorted(differing - {"seed"}):
        utils.warn(f"these networks differ in more than their seed: {', '.join(other)}")
    utils.keep_earlier_files(path)
    utils.write_csv(path, rows)
    print(f"{f'{len(rows)} seeds':20} mean ± standard deviation")
    for name in (name for name in rows[0] if name.startswith("accuracy")):
        values = 100 * np.array([row[name] for row in rows])
        print(f"{name:20} {values.mean():.2f} ± {values.std(ddof=1):.2f}%")
    print(f"seeds       {path}")


if __name__ == "__main__":
    utils.run_script(main)
