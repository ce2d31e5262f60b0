"""Train and test a spiking network on N-MNIST.

python train_nmnist.py --model cnn                           # train, then test the best checkpoint
python train_nmnist.py --model resnet --epochs 15 --batch_size 64 --scheduler
python train_nmnist.py --model cnn --resume                  # go on where the last run stopped
python train_nmnist.py --model cnn --test_only --visualize   # test the best checkpoint, with pictures
torchrun --nproc_per_node=2 train_nmnist.py --model cnn      # train in two processes, on two GPUs where there are
"""

import argparse
import copy
import json
import math
import shlex
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import snntorch.functional as SF
import torch
from sklearn.metrics import confusion_matrix
from torch import distributed
from tqdm import tqdm

import nmnist
import utils
from models import (
    BACKENDS,
    NETWORKS,
    ActivityMeter,
    SpikingNetwork,
    build_model,
    describe_backend,
    load_network,
    predict,
    predict_over_time,
    synchronize_norms,
)
from nmnist import Data, Frames
from utils import UserError, number

DEFAULT_LR = {"adam": 5e-3, "adamw": 5e-3, "sgd": 0.1}
AVERAGED_STEPS = 100  # over which the weights are averaged, in effect
LOSSES = {
    "ce": SF.ce_rate_loss,  # cross entropy of the membrane potentials at every step, averaged over steps
    "mse": SF.mse_count_loss,  # squared error of the spike counts: T for the right digit, 0 for the others
    "count": SF.ce_count_loss,  # cross entropy of the spike counts, scaled by COUNT_RANGE
}
# What a spike at every step counts for. Counts of up to T soon leave no doubt about a training recording, however
# early they part: then nothing is left to learn from.
COUNT_RANGE = 5.0
# What `build_model` needs.
NETWORK_SETTINGS = ("model", "beta", "threshold", "alpha", "dropout", "precision", "neuron_backend")
# What a checkpoint keeps of the flags: a run that goes on with others would end elsewhere.
RUN_SETTINGS = (
    *NETWORK_SETTINGS,
    *("time_steps", "denoise", "batch_size", "lr", "weight_decay", "optimizer", "loss", "scheduler"),
    *("no_augment", "seed", "val_split", "epochs"),
)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the script's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(NETWORKS), default="cnn", help="network (default: %(default)s)")
    add_network_arguments(parser)
    add_training_arguments(parser)
    nmnist.add_data_arguments(parser)
    add_running_arguments(parser)
    return parser


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that shape the network."""
    group = parser.add_argument_group("network")
    add_value(group, "--beta", number(float, 0, 1), 0.5, "decay of the membrane potential per step")
    add_value(group, "--threshold", number(float, 0, open_low=True), 1.0, "membrane potential at which a neuron fires")
    text = "decay per step of ALIF's adaptation and of the synaptic current; resnet only"
    add_value(group, "--alpha", number(float, 0, 1), 0.9, text)
    add_value(group, "--dropout", number(float, 0, 1, open_high=True), 0.0, "share of last hidden neurons dropped")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how to learn."""
    group = parser.add_argument_group("training")
    add_value(group, "--epochs", number(int, 1), 10, "passes over the training recordings")
    add_value(group, "--batch_size", number(int, 1), 128, "recordings a step")
    rates = ", ".join(f"{lr} for {name}" for name, lr in DEFAULT_LR.items())
    group.add_argument("--lr", type=number(float, 0, open_low=True), help=f"learning rate (default: {rates})")
    add_value(group, "--weight_decay", number(float, 0), 0.0, "weight decay")
    group.add_argument("--optimizer", choices=list(DEFAULT_LR), default="adam", help="optimizer (default: %(default)s)")
    group.add_argument(
        "--loss",
        choices=list(LOSSES),
        default="ce",
        help="ce: cross entropy of the membrane potentials at every step; mse: squared error of the spike counts; "
        f"count: cross entropy of the spike counts, where a spike at every step counts for {COUNT_RANGE:g} "
        "(default: %(default)s)",
    )
    group.add_argument("--scheduler", action="store_true", help="lower the learning rate to 0 along a cosine")
    group.add_argument(
        "--no_augment", action="store_true", help="train on the recordings as they are: no random shift, rotation, ..."
    )
    text = "share of training recordings for validation"
    add_value(group, "--val_split", number(float, 0, 1, open_low=True, open_high=True), 0.1, text)
    text = "seed of weights, validation split, order, augmentation and dropout"
    add_value(group, "--seed", number(int, 0, 2**32 - 1), 0, text)


def add_running_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where to run, and what to read and write."""
    group = parser.add_argument_group("running")
    add_value(group, "--save_dir", str, "./checkpoints", "folder of the checkpoints")
    add_value(group, "--log_dir", str, "./logs", "folder of history, metrics and figures")
    group.add_argument(
        "--resume",
        nargs="?",
        const="last",
        metavar="PATH",
        help="go on from this checkpoint (without PATH: from the last one of this model in save_dir)",
    )
    utils.add_device_argument(group)
    utils.add_precision_argument(group)
    group.add_argument(
        "--neuron_backend",
        choices=BACKENDS,
        default="fused",
        help="fused: neurons compiled over all steps; step: snnTorch's neurons, step by step (default: %(default)s)",
    )
    group.add_argument("--test_only", action="store_true", help="test the best checkpoint, train nothing")
    group.add_argument("--visualize", action="store_true", help="write figures to log_dir")


def add_value(group, flag: str, kind: Callable, default, text: str) -> None:
    """Add a flag with a value of type `kind`."""
    group.add_argument(flag, type=kind, default=default, help=f"{text} (default: %(default)s)")


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict | None]:
    """Return the flags and the checkpoint to test or to go on with, None where training starts anew.

    A checkpoint's settings fill the flags that are not given. Of flags that contradict them, testing takes the
    checkpoint's, and says so; resuming raises `UserError`, since it would not end where the run was heading, but
    lets `--epochs` grow.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.time_steps * args.batch_size == 1:
        parser.error("argument --batch_size: 1 is too few for --time_steps 1, whose norms need two frames")
    if args.test_only and args.resume is not None:
        parser.error("argument --resume: not allowed with argument --test_only")
    path = utils.checkpoint_path(args.save_dir, args.model, "best" if args.test_only else "last")
    anew = not args.test_only and args.resume is None
    if args.resume == "last" and not path.exists():  # killed before its first epoch ended, perhaps
        print(f"resume      no checkpoint at {path} yet: training starts anew, with the flags as given")
        anew = True
    if anew:
        args.precision = utils.pick_precision(args.precision, utils.pick_device(args.device))
        return args, None
    if args.resume not in (None, "last"):
        path = Path(args.resume)
    checkpoint = utils.load_checkpoint(path, args.model)
    args, different = utils.parse_with_settings(parser, argv, checkpoint["settings"])
    for name, given, value in different:
        if args.test_only:
            print(f"settings    --{name} {given} is ignored: {path} was trained with {value}")
            setattr(args, name, value)
        elif name != "epochs":
            raise UserError(f"--{name} {given}: {path} was trained with {value}; leave the flag out or train anew")
    if args.resume is not None:
        check_resumable(args, checkpoint, path)
    return args, checkpoint


def check_resumable(args: argparse.Namespace, checkpoint: dict, path: Path) -> None:
    """Raise `UserError` where a run can't go on from `checkpoint`; say where its learning rates will differ."""
    if "optimizer" not in checkpoint:
        last = path.with_name(f"{args.model}_last.pt")
        raise UserError(f"--resume {path}: it holds the network alone; go on from {last}")
    if args.epochs < checkpoint["epoch"]:
        raise UserError(f"--epochs {args.epochs}: {path} has seen {checkpoint['epoch']} epochs already")
    planned = checkpoint["settings"]["epochs"]
    if args.scheduler and args.epochs != planned:
        print(f"schedule    planned over {planned} epochs, goes on over {args.epochs}")


# ---------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------


class Average:
    """The exponential average of a network's weights over its steps, which is what is validated and tested.

    It does for a learning rate that stays what lowering it does: the noise of the last steps averages out. It takes in
    what the norms measured, too, but not the neurons' states, which torch's own `AveragedModel` trips over.
    """

    def __init__(self, network: torch.nn.Module):
        self.network = copy.deepcopy(network)
        self.steps = 0

    @torch.no_grad()
    def update(self, network: torch.nn.Module) -> None:
        """Follow `network` by a step."""
        # Over a tenth of the steps so far, since the first weights say nothing, up to AVERAGED_STEPS.
        share = max(1 / AVERAGED_STEPS, 9 / (9 + self.steps))
        for averaged, current in zip(self.network.state_dict().values(), network.state_dict().values(), strict=True):
            if averaged.is_floating_point():
                averaged.lerp_(current, share)
            else:  # the norms' count of batches
                averaged.copy_(current)
        self.steps += 1

    def state_dict(self) -> dict:
        return {"network": self.network.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self.network.load_state_dict(state["network"])
        self.steps = state["steps"]


@dataclass
class Learner:
    """What changes in training: the network, its average, its optimizer; and the loss that it lowers."""

    network: SpikingNetwork
    parallel: torch.nn.Module  # the network, whose gradients are those of all processes
    average: Average
    optimizer: torch.optim.Optimizer
    loss_fn: Callable


def make_learner(args: argparse.Namespace, network: SpikingNetwork) -> Learner:
    """Return what is trained, in this process or in several."""
    average, parallel = Average(network), network
    if distributed.is_initialized():
        synchronize_norms(network)
        parallel = torch.nn.parallel.DistributedDataParallel(network, forward_sync_buffers=False)
    return Learner(network, parallel, average, make_optimizer(args, network), make_loss(args.loss))


def make_optimizer(args: argparse.Namespace, network: SpikingNetwork) -> torch.optim.Optimizer:
    """Return the optimizer of `--optimizer`."""
    lr = args.lr or DEFAULT_LR[args.optimizer]
    if args.optimizer == "sgd":
        return torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, weight_decay=args.weight_decay, fused=True)
    optimizer = torch.optim.Adam if args.optimizer == "adam" else torch.optim.AdamW
    return optimizer(network.parameters(), lr=lr, weight_decay=args.weight_decay, fused=True)


def make_loss(name: str) -> Callable:
    """Return the loss of `--loss` as a function of the output neurons' spk and mem [T, B, 10] and the labels [B].

    It is not finite where a membrane potential is not: spikes, and so a loss of spikes, stay finite even then.
    """
    loss_fn = LOSSES[name]()

    def loss(spk, mem, labels):
        out = mem if name == "ce" else spk  # a membrane tells how far from firing a neuron is, a spike is only 0 or 1
        if name == "count":
            out = out * (COUNT_RANGE / len(spk))
        # Of one element, which snnTorch shapes in two ways: so its sum.
        return loss_fn(out, labels).sum() + 0 * mem.sum()

    return loss


def train_one_epoch(learner: Learner, batches: Iterable, bar: tqdm) -> dict:
    """Train on `batches` of (frames, labels, recordings in the whole batch); return the epoch's mean loss and accuracy.

    Both are of the network in training, while it changes and drops spikes, on recordings that may be augmented. Of a
    whole batch, each process has a share.
    """
    learner.network.train()
    # Summed where the work is done, and read when the bar is drawn: reading waits for the device.
    sums = 0  # of loss, right decisions, recordings
    for x, labels, whole in batches:
        spk, mem = learner.parallel(x)
        # Without a recording in its share of a last batch, a process takes part with gradients of 0.
        loss = learner.loss_fn(spk, mem, labels) if len(labels) else mem.sum()
        learner.optimizer.zero_grad()
        (loss * (len(labels) * utils.num_processes() / whole)).backward()  # processes' gradients are averaged
        learner.optimizer.step()
        learner.average.update(learner.network)
        with torch.no_grad():
            right = (predict(mem) == labels).sum()
            seen = torch.full_like(right, len(labels))
            sums = sums + torch.stack([loss.double() * len(labels), right, seen])
        # The first process alone: of losses that are not finite, the others tell together, after the epoch.
        if bar.update(whole) and utils.process_number() == 0:
            show_progress(bar, sums)
    return show_progress(bar, utils.add_up(sums))


def show_progress(bar: tqdm, sums: torch.Tensor) -> dict:
    """Write mean loss and accuracy so far beside the bar, and return them.

    Raises `FloatingPointError` where the loss was not finite in a batch.
    """
    loss, right, seen = sums.tolist()
    if not math.isfinite(loss):
        raise FloatingPointError(f"within {bar.n:,} of {bar.total:,} recordings")
    bar.set_postfix(loss=f"{loss / seen:.4f}", accuracy=f"{right / seen:.2%}", refresh=False)
    return {"loss": loss / seen, "accuracy": right / seen}


@torch.no_grad()
def evaluate(network, frames: Frames, indices, loss_fn, batch_size: int, bar: tqdm) -> dict:
    """Run the network over the recordings `indices`, without learning, each process over its share.

    Returns mean `loss`, `accuracy`, `labels` [N] and `decisions` [T, N]: the digit decided on after each step.
    """
    network.eval()
    own = indices[utils.own_share(len(indices))]
    total_loss, labels = torch.zeros((), dtype=torch.float64), [torch.zeros(0, dtype=torch.int64)]
    decisions = [torch.zeros((frames.filled.shape[1], 0), dtype=torch.int64)]
    for x, batch_labels in frames.batches(own, batch_size, network.dtype):
        spk, mem = network(x)
        total_loss = total_loss.to(x.device) + loss_fn(spk, mem, batch_labels).double() * len(batch_labels)
        labels.append(batch_labels)
        decisions.append(predict_over_time(mem))
        bar.update(len(batch_labels) * utils.num_processes())
    results = torch.cat([x.cpu() for x in labels]), torch.cat([x.cpu() for x in decisions], dim=1)
    losses, labels, decisions = zip(*utils.gather((float(total_loss), *results)), strict=True)
    labels, decisions = torch.cat(labels), torch.cat(decisions, dim=1)
    accuracy = (decisions[-1] == labels).double().mean().item()
    return {"loss": sum(losses) / len(labels), "accuracy": accuracy, "labels": labels, "decisions": decisions}


def learning_rate(args: argparse.Namespace, epoch: int) -> float:
    """Return the learning rate of an epoch, counted from 1: constant, or falling along a cosine to near 0."""
    lr = args.lr or DEFAULT_LR[args.optimizer]
    return lr * (1 + math.cos(math.pi * (epoch - 1) / args.epochs)) / 2 if args.scheduler else lr


def training_batches(args, order: torch.Tensor, data: Data, dtype: torch.dtype) -> Iterator:
    """Yield this process's share of each batch of the recordings `order`: frames, labels, size of the whole batch."""
    for chunk in order.split(args.batch_size):
        share = utils.own_share(len(chunk))
        yield *data.train.batch(chunk, dtype, augment=not args.no_augment, share=share), len(chunk)


def run_epoch(args, epoch: int, learner: Learner, data: Data, train_indices, val_indices) -> dict:
    """Train for an epoch and evaluate on validation and test recordings; return its entry of the history."""
    start = time.perf_counter()
    # Seeded anew for each epoch, so that a resumed run draws what an unbroken one does.
    utils.set_seed(args.seed, epoch)
    for group in learner.optimizer.param_groups:
        group["lr"] = learning_rate(args, epoch)
    order = train_indices[torch.randperm(len(train_indices))]
    if args.time_steps == 1 and len(order) % args.batch_size == 1:
        order = order[:-1]  # a batch of a single frame has no variance to normalise by
    with tqdm(desc=f"epoch {epoch}/{args.epochs}", total=len(order), unit="recording", leave=False) as bar:
        results = {"train": train_one_epoch(learner, training_batches(args, order, data, learner.network.dtype), bar)}
    trained = time.perf_counter() - start
    for name, frames, indices in (("val", data.train, val_indices), ("test", data.test, torch.arange(len(data.test)))):
        with tqdm(desc=name, total=len(indices), unit="recording", leave=False) as bar:
            results[name] = evaluate(learner.average.network, frames, indices, learner.loss_fn, args.batch_size, bar)
    if not math.isfinite(results["val"]["loss"]):
        raise FloatingPointError("in validation")
    entry = {"epoch": epoch}
    for name, result in results.items():
        entry |= {f"{name}_loss": result["loss"], f"{name}_accuracy": result["accuracy"]}
    return entry | {
        "lr": learning_rate(args, epoch),
        "precision": args.precision,
        "neuron_backend": describe_backend(learner.network),
        "seconds": time.perf_counter() - start,
        "recordings_per_second": len(order) / trained,
    }


def train(args, network, checkpoint: dict | None, data: Data) -> None:
    """Train for the epochs that are left; after each, print its figures and write checkpoints and history."""
    train_indices, val_indices = nmnist.split_validation(data.train.labels.cpu(), args.val_split, args.seed)
    learner = make_learner(args, network)
    last = utils.checkpoint_path(args.save_dir, args.model, "last")
    history, best = [], None
    if checkpoint:
        trained_on = (checkpoint["dataset"], checkpoint["num_recordings"])
        if trained_on != (data.name, len(data.train)):
            raise UserError(
                "--resume: trained on {} with {:,} recordings, and this is {} with {:,}".format(
                    *trained_on, data.name, len(data.train)
                )
            )
        for name in ("network", "average", "optimizer"):
            getattr(learner, name).load_state_dict(checkpoint[name])
        history, best = checkpoint["history"], checkpoint["best"]
        if utils.process_number() == 0:  # save_dir or log_dir may be others than before
            write_best_and_history(args, best, history)
            utils.save_tensors(last, checkpoint)
        print(f"resume      after epoch {len(history)} of {args.epochs}")
    print(f"training    {len(train_indices):,} recordings, validation {len(val_indices):,}, test {len(data.test):,}")
    saved = len(history)
    try:
        for epoch in range(saved + 1, args.epochs + 1):
            entry = run_epoch(args, epoch, learner, data, train_indices, val_indices)
            print_epoch(entry, args.epochs)
            history.append(entry)
            if utils.process_number() == 0:
                best = save(args, learner, history, best, data)
            saved = epoch
    except FloatingPointError as error:
        kept = f"{last} keeps epoch {saved}" if saved else "no epoch was finished, so there is no checkpoint"
        raise UserError(f"loss not finite in epoch {saved + 1}, {error}: choose a smaller --lr; {kept}") from None
    except KeyboardInterrupt as stop:
        how = how_to_go_on(args, "--resume", "--epochs", str(args.epochs))
        stop.args = (f"{last} keeps epoch {saved}; go on with: {how}",) if saved else ()
        raise


def how_to_go_on(args: argparse.Namespace, *flags: str) -> str:
    """Return the command that goes on with the run of `args` by `flags`; what is not named is in the checkpoint."""
    command, parser = ["python", "train_nmnist.py", "--model", args.model, *flags], make_parser()
    for name in ("save_dir", "log_dir", "data_dir", "dataset", "device"):
        if getattr(args, name) != parser.get_default(name):
            command += [f"--{name}", getattr(args, name)]
    return shlex.join(command)


def print_epoch(entry: dict, epochs: int) -> None:
    """Print an epoch's figures in one line."""
    parts = [f"epoch {entry['epoch']:3d}/{epochs}"]
    parts += [f"{s} {entry[f'{s}_loss']:.4f} {entry[f'{s}_accuracy']:7.2%}" for s in ("train", "val", "test")]
    parts += [f"{entry['recordings_per_second']:,.0f} recordings/s", f"lr {entry['lr']:.2g}"]
    print("   ".join(parts), flush=True)


def save(args, learner: Learner, history: list[dict], best: dict | None, data: Data) -> dict:
    """Write the best and the last checkpoint and the history, each atomically; return the best checkpoint so far."""
    checkpoint = {
        "format": utils.CHECKPOINT_FORMAT,
        "network_settings": {name: getattr(args, name) for name in NETWORK_SETTINGS},
        "settings": {name: getattr(args, name) for name in RUN_SETTINGS},
        "dataset": data.name,
        "num_recordings": len(data.train),
        "neuron_backend": describe_backend(learner.network),
        "network": {name: value.cpu().clone() for name, value in learner.average.network.state_dict().items()},
        "epoch": len(history),
        # Of equal validation accuracies the smaller loss is the better; the test set has no say.
        "score": [history[-1]["val_accuracy"], -history[-1]["val_loss"]],
    }
    if best is None or checkpoint["score"] > best["score"]:
        best = checkpoint
    write_best_and_history(args, best, history)
    # Last: a run killed before this repeats the epoch, and writes the same files again.
    utils.save_tensors(
        utils.checkpoint_path(args.save_dir, args.model, "last"),
        checkpoint
        | {name: getattr(learner, name).state_dict() for name in ("network", "average", "optimizer")}
        | {"history": history, "best": best},
    )
    return best


def write_best_and_history(args: argparse.Namespace, best: dict, history: list[dict]) -> None:
    """Write the best checkpoint and the history of the epochs so far."""
    utils.save_tensors(utils.checkpoint_path(args.save_dir, args.model, "best"), best)
    utils.write_json(Path(args.log_dir) / f"{args.model}_history.json", history)


# ---------------------------------------------------------------------------------------------------------
# Testing
# ---------------------------------------------------------------------------------------------------------


def test(args, data: Data, device: torch.device) -> tuple[dict, SpikingNetwork, torch.Tensor]:
    """Test the best checkpoint, write and print its metrics; return them, the network and its decisions [N]."""
    path = utils.checkpoint_path(args.save_dir, args.model, "best")
    checkpoint = utils.load_checkpoint(path, args.model)
    network = load_network(checkpoint, device)
    if checkpoint["dataset"] != data.name:
        print(f"WARNING: trained on {checkpoint['dataset']}, tested on {data.name}")
    loss_fn = make_loss(checkpoint["settings"]["loss"])
    everything = torch.arange(len(data.test))
    with (
        tqdm(desc="test", total=len(everything), unit="recording", leave=False) as bar,
        ActivityMeter(network) as meter,
    ):
        result = evaluate(network, data.test, everything, loss_fn, args.batch_size, bar)
    labels, decisions = result["labels"], result["decisions"]
    metrics = {
        "dataset": data.name,
        "trained_on": checkpoint["dataset"],
        "model": args.model,
        "num_recordings": len(labels),
        "accuracy": result["accuracy"],
        "loss": result["loss"],
        "confusion_matrix": confusion_matrix(labels, decisions[-1], labels=range(10)).tolist(),
        "accuracy_over_time": (decisions == labels).double().mean(1).tolist(),
        "firing_rate": meter.firing_rate(),
        "synaptic_operations": meter.synaptic_operations(),
        "macs": meter.macs(),
        "parameters": sum(p.numel() for p in network.parameters()),
        "precision": network.precision,
        "neuron_backend": describe_backend(network),
        "checkpoint": str(path),
        "seed": checkpoint["settings"]["seed"],
    }
    print_metrics(metrics, checkpoint["epoch"])
    metrics_path = Path(args.log_dir) / f"{args.model}_test_metrics.json"
    utils.write_json(metrics_path, metrics)
    print(f"metrics     {metrics_path}")
    return metrics, network, decisions[-1]


def print_metrics(metrics: dict, epoch: int) -> None:
    """Print the test metrics as a short table."""
    over_time = metrics["accuracy_over_time"]
    ends = [len(over_time) * end / nmnist.SACCADE_ENDS[-1] for end in nmnist.SACCADE_ENDS]
    after_saccades = [over_time[math.ceil(end) - 1] for end in ends]
    share = metrics["synaptic_operations"] / metrics["macs"]
    rates = "  ".join(f"{name} {rate:.3f}" for name, rate in metrics["firing_rate"].items())
    rows = {
        "data set": f"{metrics['dataset']}, {metrics['num_recordings']:,} test recordings",
        "test accuracy": f"{metrics['accuracy']:.2%}",
        "test loss": f"{metrics['loss']:.4f}",
        "after each saccade": "  ".join(f"{accuracy:.2%}" for accuracy in after_saccades),
        "firing rate": rates,
        "synaptic operations": f"{metrics['synaptic_operations'] / 1e6:.2f} million a recording, "
        f"{share:.1%} of the {metrics['macs'] / 1e6:.1f} million MACs without spikes",
        "parameters": f"{metrics['parameters']:,}",
        "precision, neurons": f"{metrics['precision']}, {metrics['neuron_backend']}",
        "checkpoint": f"{metrics['checkpoint']} (epoch {epoch}, seed {metrics['seed']})",
    }
    for title, value in rows.items():
        print(f"{title:20} {value}")


# ---------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------


def plot_history(history: list[dict], title: str, path: Path) -> None:
    """Draw loss and accuracy over epochs for training, validation and test."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    epochs = [entry["epoch"] for entry in history]
    styles = (("train", utils.BLUE, "training", "o-"), ("val", utils.ORANGE, "validation", "s-"))
    for name, colour, label, marker in (*styles, ("test", utils.GREEN, "test", "^--")):
        axes[0].plot(epochs, [e[f"{name}_loss"] for e in history], marker, color=colour, label=label, ms=4)
        axes[1].plot(epochs, [100 * e[f"{name}_accuracy"] for e in history], marker, color=colour, label=label, ms=4)
    axes[0].set(xlabel="epoch", ylabel="loss")
    axes[1].set(xlabel="epoch", ylabel="accuracy (%)")
    for axis in axes:
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend()
    figure.suptitle(title)
    utils.save_figure(figure, path)


def plot_confusion_matrix(metrics: dict, title: str, path: Path) -> None:
    """Draw the confusion matrix: counts, coloured by the share of each row (each true digit)."""
    counts = np.array(metrics["confusion_matrix"])
    rates = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    texts = [
        [f"{n}\n{rate:.0%}" if n else "" for n, rate in zip(*row, strict=True)]
        for row in zip(counts, rates, strict=True)
    ]
    figure, axis = plt.subplots(figsize=(8, 6.8))
    sns.heatmap(
        100 * rates,
        annot=np.array(texts),
        fmt="",
        cmap="Blues",
        vmin=0,
        vmax=100,
        square=True,
        linewidths=0.5,
        annot_kws={"fontsize": 8},
        cbar_kws={"label": "share of the true digit (%)"},
        ax=axis,
    )
    axis.set(xlabel="predicted digit", ylabel="true digit", title=title)
    axis.grid(False)
    utils.save_figure(figure, path)


def plot_accuracy_over_time(metrics: dict, title: str, path: Path) -> None:
    """Draw the accuracy had the decision been made after each step, with the borders of the three saccades."""
    accuracy = 100 * np.array(metrics["accuracy_over_time"])
    steps = np.arange(1, len(accuracy) + 1)
    figure, axis = plt.subplots(figsize=(7.5, 4.4))
    axis.plot(steps, accuracy, "o-", color=utils.BLUE, ms=4, label="accuracy so far")
    axis.axhline(10, color=utils.GREY, linestyle=":", label="chance")
    for end, label in zip(nmnist.SACCADE_ENDS[:2], ("ends of the first two saccades", None), strict=True):
        step = 0.5 + len(steps) * end / nmnist.SACCADE_ENDS[-1]
        axis.axvline(step, color=utils.GREY, linestyle="--", label=label)
    axis.set(xlabel="time step of the decision", ylabel="test accuracy (%)", ylim=(0, 102), title=title)
    axis.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower center", ncols=3)
    utils.save_figure(figure, path)


def plot_samples(frames: Frames, decisions: torch.Tensor, title: str, path: Path, shown: int = 20) -> None:
    """Draw test recordings with true and predicted digit, the mistakes first.

    Shown are the events in the middle of the first saccade: over a whole recording ON and OFF cover one another.
    """
    labels = frames.labels.cpu().long()
    right = decisions == labels
    order = torch.argsort(right.int(), stable=True)[:shown]
    sequences = frames.batch(order)[0]
    first, last = len(sequences) * 12 // 100, -(-len(sequences) * 20 // 100)  # 37 to 62 of 308 ms
    images = sequences[first:last].sum(0).cpu().numpy()
    columns = min(5, len(order))
    rows = math.ceil(len(order) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.9 * columns, 2.2 * rows + 1.2), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    full = np.quantile(images[images > 0], 0.9) if images.any() else 1
    for axis, place, image in zip(axes.flat, order.tolist(), images, strict=False):
        axis.imshow(utils.event_image(image, full), interpolation="nearest")
        mark, colour = ("", "black") if right[place] else ("mistake: ", utils.ORANGE)
        text = f"{mark}{labels[place]} read as {decisions[place]}"
        axis.set_title(f"{text}\nrecording {place}", fontsize=9, color=colour)
    figure.suptitle(f"{title}\nthe {int((~right).sum())} mistakes first; events in the middle of the first saccade")
    utils.polarity_legend(figure)
    utils.save_figure(figure, path)


def plot_filters(network: SpikingNetwork, title: str, path: Path) -> None:
    """Draw the first layer's filters, those of OFF beside those of ON events, on one scale."""
    weight = network.conv1.weight.detach().cpu()
    limit = float(weight.abs().max())
    figure, axes = plt.subplots(1, 2, figsize=(9, 5))
    for polarity, name in enumerate(("OFF events", "ON events")):
        grid = utils.filter_grid(weight[:, polarity], columns=4)
        picture = axes[polarity].imshow(grid, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        axes[polarity].set_title(f"weights of {name}")
        axes[polarity].set_axis_off()
    figure.colorbar(picture, ax=axes, label="weight", shrink=0.8)
    figure.suptitle(f"{title}\nthe {len(weight)} filters of conv1, {weight.shape[2]} x {weight.shape[3]} pixels each")
    utils.save_figure(figure, path)


def visualize(args, metrics: dict, network: SpikingNetwork, frames: Frames, decisions: torch.Tensor) -> None:
    """Write the figures of training, where there is a history, and of the test."""
    log_dir, name = Path(args.log_dir), type(network).__name__
    history_path = log_dir / f"{args.model}_history.json"
    if history_path.is_file():
        history = json.loads(history_path.read_text())
        plot_history(history, f"{name} on {metrics['trained_on']}", log_dir / "training_results.png")
    tested = f"{metrics['accuracy']:.2%} of {metrics['num_recordings']:,} test recordings"
    title = f"{name} on {metrics['dataset']}: {tested}"
    plot_confusion_matrix(metrics, title, log_dir / f"{args.model}_confusion_matrix.png")
    plot_accuracy_over_time(metrics, title, log_dir / f"{args.model}_accuracy_over_time.png")
    plot_samples(frames, decisions, title, log_dir / f"{args.model}_samples.png")
    if args.model == "resnet":
        plot_filters(network, f"{name} on {metrics['trained_on']}", log_dir / "resnet_filters.png")


# ---------------------------------------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------------------------------------


def test_and_visualize(args: argparse.Namespace, data: Data, device: torch.device) -> None:
    """Test the best checkpoint, and draw it where `--visualize` asks for it."""
    try:
        metrics, network, decisions = test(args, data, device)
        if args.visualize:
            visualize(args, metrics, network, data.test, decisions)
    except KeyboardInterrupt as stop:
        stop.args = (f"training is done; test with: {how_to_go_on(args, '--test_only')}",)
        raise


def check_processes_agree(args: argparse.Namespace, checkpoint: dict | None, data: Data) -> None:
    """Raise `UserError` where processes, of several machines perhaps, would not train the same network alike."""
    own = {f"--{name}": getattr(args, name) for name in RUN_SETTINGS}
    own |= {"data set": data.name, "training recordings": len(data.train), "test recordings": len(data.test)}
    own["epochs in the checkpoint"] = checkpoint["epoch"] if checkpoint else 0
    for number_of_process, theirs in enumerate(utils.gather(own)):
        for name, value in theirs.items():
            if value != own[name]:
                raise UserError(
                    f"processes differ in {name}: {own[name]}, and {value} in process {number_of_process}; "
                    "machines need the same data, and a save_dir that they share to resume"
                )


def main(argv: list[str] | None = None) -> None:
    args, checkpoint = parse_args(argv)
    device = utils.pick_device(args.device)
    utils.prepare_device(device)
    utils.check_writable("--log_dir", args.log_dir)
    if not args.test_only:
        utils.check_writable("--save_dir", args.save_dir)
    utils.join_processes(device)
    processes = f", {utils.num_processes()} processes" if utils.num_processes() > 1 else ""
    print(f"device      {utils.describe_device(device)}{processes}")
    if args.batch_size < utils.num_processes():
        raise UserError(f"--batch_size {args.batch_size}: fewer than the {utils.num_processes()} processes")
    data = nmnist.load_data(args, device)
    check_processes_agree(args, checkpoint, data)
    first = utils.process_number() == 0
    folders = {"--save_dir": args.save_dir, "--log_dir": args.log_dir} if first and not args.test_only else {}
    with utils.locked(folders, args.model):
        if not args.test_only:
            utils.set_seed(args.seed)
            network = build_model(**{name: getattr(args, name) for name in NETWORK_SETTINGS}).to(device)
            print(f"network     {type(network).__name__}, {sum(p.numel() for p in network.parameters()):,} parameters")
            train(args, network, checkpoint, data)
        utils.leave_processes()
        if first:
            test_and_visualize(args, data, device)


if __name__ == "__main__":
    utils.run_script(main)
