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
from typing import NamedTuple

import numpy as np
import snntorch.functional as SF
import torch
from sklearn.metrics import confusion_matrix
from snntorch import SpikingNeuron
from torch.optim.swa_utils import update_bn

import models
import nmnist
import utils
from models import ActivityMeter, SpikingNetwork
from nmnist import Data, Frames
from utils import UserError, add_flag, number, rank, world_size

DEFAULT_LR = {"adam": 5e-3, "adamw": 5e-3, "sgd": 0.1}
# At step n, the new weights count max(9 / (9 + n), 1 / 100) in the moving average.
EMA_DIVISOR = 9
EMA_STEPS = 100
NORM_RECORDINGS = 1000  # training recordings on which norms are measured before an evaluation
# Confidence thresholds of early exits, and the one that is printed.
EXIT_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
PRINTED_EXIT = 0.9
# In the loss of spike counts, firing at every step counts this much: counts of up to T would soon
# saturate the softmax, whose gradient then vanishes.
COUNT_RANGE = 5.0
# Flags without effect under --no_spikes.
NEED_SPIKES = ("beta", "threshold", "alpha", "readout", "learn_beta")

# --- Losses ---------------------------------------------------------------------------------------


# By --loss: functions of the output neurons' spk and mem [T, B, 10] and the labels [B]. They return
# the mean over a batch, or a value for each recording. Add your own: LOSSES["margin"] = margin_loss
LOSSES = {
    # Cross entropy of the membrane potentials at every time step, averaged. A potential tells how
    # far from firing a neuron is, a spike only 0 or 1.
    "ce": lambda spk, mem, labels: SF.ce_rate_loss()(mem, labels),
    # Squared error of spike counts, T for the correct digit, 0 for others, divided by T.
    "mse": lambda spk, mem, labels: SF.mse_count_loss()(spk, labels),
    # Cross entropy of spike counts, where T spikes count COUNT_RANGE.
    "count": lambda spk, mem, labels: SF.ce_count_loss()(spk * (COUNT_RANGE / len(spk)), labels),
}

# --- The script -----------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Train and test the networks that the flags `argv` name, or those of the command line."""
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    args = parser.parse_args(argv)
    args.lr = args.lr or DEFAULT_LR[args.optimizer]
    seeds = args.seed if isinstance(args.seed, list) else [args.seed]
    seeds = list(dict.fromkeys(seeds))  # each once
    args.seed = seeds[0]
    device = utils.prepare_device(args.device)
    with utils.process_group(device):
        check_flags(parser, args)
        processes = f", {world_size()} processes" if world_size() > 1 else ""
        print(f"device      {utils.describe_device(device)}{processes}")
        if args.test_only and rank() > 0:
            return  # one process tests
        try:
            if len(seeds) > 1:
                run_seeds(args, argv, device, seeds)
            else:
                run(args, argv, device)
                print_next(args, argv)
        except models.NetworkError as error:
            raise UserError(f"--model {args.model}: {error}") from None


def run(args, argv: list[str], device, loaded: Data | None = None) -> tuple[dict, Data]:
    """Train and test one network, or test it alone; return metrics and recordings.

    `loaded` are the recordings, if an earlier seed has read them. The first process alone tests.
    """
    files = RunFiles(args)
    with files.hold(args.test_only):
        if args.test_only:
            checkpoint = read_checkpoint(files.best, settings_of(args))
            args = take_settings(args, argv, checkpoint["settings"])
            data = nmnist.load_data(args, device, ["test"], checkpoint["data"])
        else:
            saved = utils.from_first_process(lambda: load_last(args, files))
            data = loaded or load_training_data(args, device, saved.get("data"))
            try:
                saved = train(args, files, data, device, saved)
            except KeyboardInterrupt:
                hint = "To go on after the last finished epoch, repeat the command with --resume."
                raise KeyboardInterrupt(hint) from None
            if rank() > 0:
                return {}, data
            checkpoint = saved["best"]
        return test(args, files, data, device, checkpoint), data


def load_training_data(args, device, trained_on: dict | None) -> Data:
    """Return the recordings; raise `UserError` if another process has others."""
    with utils.first_process_first():  # on a shared disk, it downloads and bins for all
        data = nmnist.load_data(args, device, nmnist.SPLITS, trained_on)
    first = utils.from_first_process(data.describe)
    if changes := models.describe_changes(data.describe(), first):
        raise UserError(f"torchrun: not the recordings of the first process: {changes}")
    return data


# --- Training -------------------------------------------------------------------------------------


def train(args, files, data: Data, device, saved: dict) -> dict:
    """Train for the epochs that are left; after each, write checkpoints and history.

    `saved` is the run's last checkpoint, {} if the run is new. Returns the new one in process 0.
    """
    settings = settings_of(args)
    loss_fn = LOSSES[args.loss]
    labels = data.train.labels
    train_indices, val_indices = nmnist.split_validation(labels, args.val_split, args.seed)
    last_entry = saved["history"][-1] if saved else None
    options = models.run_options(device, args.neuron_backend, args.precision, last_entry)
    utils.set_seed(args.seed)
    network = models.build_model(models.NetworkConfig.from_settings(settings), **options)
    network = network.to(device)
    # The moving average of the weights is what is validated and tested.
    ema = copy.deepcopy(network)  # before data_parallel, which may replace norms
    parallel = utils.data_parallel(network, device)
    optimizer = make_optimizer(network, args.optimizer, args.lr, args.weight_decay)
    how = models.how_it_runs(network)  # also compiles the forward kernel, and so tries the compiler
    size = sum(parameter.numel() for parameter in network.parameters())
    run_as = f"{how['precision']}, neurons {how['neuron_backend']}"
    print(f"network     {network.title}, {size:,} parameters, {run_as}")
    print(f"training    {len(train_indices):,} recordings, validation {len(val_indices):,}")
    if saved:
        resume(saved, files, data, network, ema, optimizer, args.epochs)
    elif rank() == 0:
        # `last` is renamed first, so that --resume never finds that of an earlier run.
        earlier = files.last, files.best, files.history, files.metrics, files.predictions
        utils.keep_earlier_files(*earlier)

    for epoch in range(len(saved.get("history", [])) + 1, args.epochs + 1):
        start = time.perf_counter()
        order = seed_and_shuffle(train_indices, args.seed, epoch)
        lr = cosine_lr(args.lr, epoch, args.epochs) if args.scheduler else args.lr
        for group in optimizer.param_groups:
            group["lr"] = lr
        augment = not args.no_augment
        batches = training_batches(data.train, order, args.batch_size, network.dtype, augment)
        step = (epoch - 1) * math.ceil(len(order) / args.batch_size)
        with utils.progress(f"epoch {epoch}/{args.epochs}", total=len(order)) as bar:
            results = train_one_epoch(
                network, parallel, ema, optimizer, loss_fn, batches, step=step, bar=bar
            )
        speed = len(order) / (time.perf_counter() - start)
        if rank() == 0:
            # Buffers are copied, not averaged: in a user's neuron, they may be state.
            ema.load_state_dict(dict(network.named_buffers()), strict=False)
            measure_norms(ema, data.train, order[:NORM_RECORDINGS], args.batch_size)
            entry = {
                "epoch": epoch,
                **results,
                **validate(ema, data, val_indices, loss_fn, args.batch_size),
                "lr": lr,
                **how,
                "processes": world_size(),
                "seconds": time.perf_counter() - start,
                "recordings_per_second": speed,
            }
            saved = save(files, settings, data, saved, entry, network, ema, optimizer)
            print_epoch(entry, args.epochs)
    return saved


def seed_and_shuffle(indices: torch.Tensor, seed: int, epoch: int) -> torch.Tensor:
    """Seed all random numbers of an epoch; return the indices in its order, in all processes alike.

    A resumed run draws the numbers of one that was not stopped; each process draws others.
    """
    utils.set_seed(seed, epoch)
    order = indices[torch.randperm(len(indices))]
    if rank() > 0:
        utils.set_seed(seed, epoch, rank())
    return order


def cosine_lr(lr: float, epoch: int, epochs: int) -> float:
    """Return the learning rate of an epoch, from 1, along a half cosine."""
    return lr * (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2


def train_one_epoch(network, parallel, ema, optimizer, loss_fn, batches, *, step: int, bar) -> dict:
    """Train on `batches` of (frames, labels); return the mean `train_loss` and `train_accuracy`.

    Both are measured while the network changes, on this process's recordings, as augmented.
    `parallel` is the network, or wraps it to average gradients over processes; `step` counts
    the training steps before. In a step, only redrawing the bar, snnTorch's loss "mse" and, among
    several GPUs, the norms synchronize with a GPU.
    """
    network.train()
    losses, num_correct, sizes = [], [], []
    for frames, labels in batches:
        spk, mem = parallel(frames)
        loss = loss_fn(spk, mem, labels).mean()  # a loss of one's own may be [B]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        network.clamp_decays()
        update_ema(ema, network, step)
        step += 1
        predictions = models.predict(spk.detach(), mem.detach(), network.config.readout)
        losses.append(loss.detach())
        num_correct.append((predictions == labels).sum())
        sizes.append(len(labels))
        if bar.update(len(labels) * world_size()):  # True where the bar was redrawn
            accuracy = f"{num_correct[-1].item() / len(labels):.2%}"
            bar.set_postfix(loss=f"{loss.item():.4f}", accuracy=accuracy, refresh=False)
    total_loss = sum(x * size for x, size in zip(torch.stack(losses).tolist(), sizes, strict=True))
    total_correct = torch.stack(num_correct).sum().item()
    return {"train_loss": total_loss / sum(sizes), "train_accuracy": total_correct / sum(sizes)}


@torch.no_grad()
def update_ema(ema: SpikingNetwork, network: SpikingNetwork, step: int) -> None:
    """Update the exponential moving average of the weights after training step `step`, from 0.

    It removes noise as a lower learning rate would. torch's AveragedModel synchronizes with a GPU.
    """
    weight = max(EMA_DIVISOR / (EMA_DIVISOR + step), 1 / EMA_STEPS)
    for average, value in zip(ema.parameters(), network.parameters(), strict=True):
        average.lerp_(value, weight)


class Evaluation(NamedTuple):
    """What a network does with N recordings."""

    loss: float
    accuracy: float
    labels: torch.Tensor  # [N]
    spk: torch.Tensor  # [T, N, 10], of the output neurons, as is mem
    mem: torch.Tensor
    predictions: torch.Tensor  # [T, N]: by the network's readout, after each step


@torch.no_grad()
def evaluate(network, part: Frames, indices, loss_fn, batch_size: int, text: str) -> Evaluation:
    """Evaluate the network on the recordings `indices` [N]; `text` labels the progress bar."""
    network.eval()
    total_loss, spks, mems = 0.0, [], []
    with utils.progress(text, total=len(indices)) as bar:
        for frames, labels in part.batches(indices, batch_size, network.dtype):
            spk, mem = network(frames)
            total_loss += float(loss_fn(spk, mem, labels).mean()) * len(labels)
            spks.append(spk.cpu())
            mems.append(mem.cpu())
            bar.update(len(labels))
    spk, mem = torch.cat(spks, dim=1), torch.cat(mems, dim=1)
    labels = part.labels.cpu()[indices].long()
    predictions = models.predict(spk, mem, network.config.readout, over_time=True)
    accuracy = (predictions[-1] == labels).double().mean().item()
    return Evaluation(total_loss / len(labels), accuracy, labels, spk, mem, predictions)


def measure_norms(ema: SpikingNetwork, part: Frames, indices, batch_size: int) -> None:
    """Measure the statistics of BatchNorm, with the averaged weights, on recordings."""
    # In batches of about one size, because update_bn gives each the same weight.
    chunks = indices.tensor_split(max(1, len(indices) // batch_size))
    batches = (part.batch(chunk, ema.dtype) for chunk in chunks)
    update_bn(utils.progress("norms", batches, len(chunks), unit="batch"), ema)


def validate(ema, data: Data, val_indices, loss_fn, batch_size: int) -> dict:
    """Return results on validation recordings, which choose the best epoch, and on test ones."""
    test_indices = torch.arange(len(data.test))
    val = evaluate(ema, data.train, val_indices, loss_fn, batch_size, "val")
    on_test = evaluate(ema, data.test, test_indices, loss_fn, batch_size, "test")
    scores = models.digit_scores(val.spk, val.mem, ema.config.readout)
    return {
        "val_loss": val.loss,
        "val_accuracy": val.accuracy,
        "test_loss": on_test.loss,
        "test_accuracy": on_test.accuracy,
        "val_temperature": models.fit_temperature(scores, val.labels),
    }


def training_batches(part: Frames, order, batch_size: int, dtype, augment: bool) -> Iterator:
    """Yield this process's share of each batch of the recordings `order`: frames and labels."""
    for chunk in order.split(batch_size):
        if len(chunk) // world_size() * part.time_steps >= 2:  # the last may be too small for norms
            yield part.batch(chunk[rank() :: world_size()], dtype, augment)


def make_optimizer(network, name: str, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Return the optimizer of `--optimizer`; norms, beta and the like do not decay."""
    connections, others = [], []
    for parameter_name, parameter in network.named_parameters():
        owner = network.get_submodule(parameter_name.rpartition(".")[0])
        if parameter.dim() > 1 and not isinstance(owner, SpikingNeuron):
            connections.append(parameter)
        else:
            others.append(parameter)
    groups = [
        {"params": connections, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if name == "sgd":
        return torch.optim.SGD(groups, lr, momentum=0.9, fused=True)
    adam = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
    return adam(groups, lr, fused=True)


def print_epoch(entry: dict, epochs: int) -> None:
    """Print an epoch's results in one line."""
    parts = [f"epoch {entry['epoch']:3d}/{epochs}"]
    for name in ("train", "val", "test"):
        parts.append(f"{name} {entry[f'{name}_loss']:.4f} {entry[f'{name}_accuracy']:7.2%}")
    parts += [f"{entry['recordings_per_second']:,.0f} recordings/s", f"lr {entry['lr']:.2g}"]
    print("   ".join(parts), flush=True)


# --- Saving and resuming --------------------------------------------------------------------------


class RunFiles:
    """Where the files of a network's run are."""

    def __init__(self, args: argparse.Namespace):
        self.name = models.NetworkConfig.from_settings(vars(args)).name
        self.save_dir, self.log_dir = Path(args.save_dir), Path(args.log_dir)
        self.last = self.save_dir / f"{self.name}_last.pt"  # the run
        self.best = self.save_dir / f"{self.name}_best.pt"  # the part of it that is tested
        self.history = self.log_dir / f"{self.name}_history.json"
        self.metrics = self.log_dir / f"{self.name}_test_metrics.json"
        self.predictions = self.log_dir / f"{self.name}_predictions.csv"
        self.seeds = self.log_dir / f"{self.name}_seeds.csv"

    def figure(self, name: str) -> Path:
        """Return the path of a figure of this network."""
        return self.log_dir / f"{self.name}_{name}.png"

    def hold(self, test_only: bool):
        """Return a context that locks the folders against another run of this network.

        A test locks `log_dir` alone: it may run beside a training.
        """
        if test_only:
            return utils.hold_folders(f"{self.name}_test", log_dir=self.log_dir)
        return utils.hold_folders(self.name, save_dir=self.save_dir, log_dir=self.log_dir)


def save(files, settings: dict, data: Data, saved: dict, entry: dict, network, ema, optimizer):
    """Write the run after the epoch of `entry`; return its new last checkpoint.

    `saved` is the one before, {} after the first epoch. Beside settings and history, it holds

        network     averaged weights after this epoch
        best        the checkpoint of the best epoch, whose history ends there
        training    weights before averaging and the optimizer, for --resume

    in one file, so that a kill leaves no half of it. Raises `UserError` if losses or weights are
    not finite.
    """
    results_finite = all(math.isfinite(x) for x in entry.values() if isinstance(x, float))
    if not (results_finite and utils.is_finite(network.state_dict(), ema.state_dict())):
        what = f"loss or weights not finite in epoch {entry['epoch']}: choose a smaller --lr"
        raise UserError(f"{what}; epochs before it, if any, are in {files.last}")
    history = [*saved.get("history", []), entry]
    averaged = {name: value.to("cpu", copy=True) for name, value in ema.state_dict().items()}
    checkpoint = {
        "format": utils.CHECKPOINT_FORMAT,
        "settings": settings,
        "data": data.describe(),
        "versions": utils.versions(),
        "history": history,
        "network": averaged,
    }
    best_entry = max(history, key=lambda e: (e["val_accuracy"], -e["val_loss"]))
    if best_entry is entry:
        best = checkpoint
    else:
        best = {**saved["best"], "settings": settings}  # --epochs may have been raised
    saved = {
        **checkpoint,
        "best": best,
        "training": {"raw_network": network.state_dict(), "optimizer": optimizer.state_dict()},
    }
    utils.save_tensors(files.last, saved)
    write_best_and_history(files, saved)
    return saved


def write_best_and_history(files: RunFiles, saved: dict) -> None:
    """Write the parts of the last checkpoint that others than --resume read."""
    utils.save_tensors(files.best, saved["best"])
    logged = utils.read_json(files.history) or []
    if logged != saved["history"][: len(logged)]:  # that of another run
        utils.keep_earlier_files(files.history)
    utils.write_json(files.history, saved["history"])


def read_checkpoint(path: Path, settings: dict, *parts: str) -> dict:
    """Return a checkpoint of the network that the settings name, which has these parts."""
    expected = {name: settings[name] for name in ("model", "no_spikes")}
    return utils.load_checkpoint(path, [*settings, *parts], **expected)


def load_last(args: argparse.Namespace, files: RunFiles) -> dict:
    """Return the last checkpoint of the run, {} without --resume or if there is none yet.

    Raises `UserError` if its settings differ from those of the command.
    """
    if not args.resume:
        return {}
    if not files.last.exists():
        print(f"resume      no checkpoint at {files.last} yet: training starts from scratch")
        return {}
    asked = settings_of(args)
    saved = read_checkpoint(files.last, asked, "best", "training")
    settings = {**saved["settings"]}
    settings["epochs"] = max(settings["epochs"], args.epochs)  # more may be asked
    if changes := models.describe_changes(asked, settings):
        flags = flags_of({**vars(args), **settings})
        command = shlex.join(["python", sys.argv[0], *flags])
        raise UserError(
            f"--resume: not the settings of the run in {files.save_dir} ({changes}): continue it "
            f"by `{command}`, or omit --resume to start a new run"
        )
    return saved


def resume(saved: dict, files, data: Data, network, ema, optimizer, epochs: int) -> None:
    """Load what `save` wrote; print where the run continues, and what changed.

    Raises `UserError` if the run was trained on other recordings.
    """
    if changes := models.describe_changes(data.describe(), saved["data"]):
        raise UserError(f"--resume: the run was trained on other recordings: {changes}")
    models.load_weights(network, saved["training"]["raw_network"])
    models.load_weights(ema, saved["network"])
    optimizer.load_state_dict(saved["training"]["optimizer"])
    done, planned = len(saved["history"]), saved["settings"]["epochs"]
    if done == epochs:
        print(f"resume      after epoch {done} of {epochs}: nothing is left to train")
        if rank() == 0:  # what was not written before a kill, or was lost
            write_best_and_history(files, saved)
        return
    print(f"resume      after epoch {done} of {epochs}")
    if saved["settings"]["scheduler"] and epochs != planned:
        print(f"schedule    planned over {planned} epochs, continues over {epochs}")
    now = {**models.how_it_runs(network), "processes": world_size()}
    if changes := models.describe_changes(now, saved["history"][-1]):
        utils.warn(f"resumed with other options, which give other numbers: {changes}")


# --- Testing --------------------------------------------------------------------------------------


def test(args, files: RunFiles, data: Data, device: torch.device, checkpoint: dict) -> dict:
    """Test a checkpoint's network; print, write and return its metrics, and draw if asked."""
    network = models.restore_network(checkpoint, device, args.neuron_backend, args.precision)
    indices = torch.arange(len(data.test))
    with ActivityMeter(network) as meter:
        result = evaluate(network, data.test, indices, LOSSES[args.loss], args.batch_size, "test")
    how = models.how_it_runs(network)
    entry = checkpoint["history"][-1]
    scores = models.digit_scores(result.spk, result.mem, args.readout) / entry["val_temperature"]
    confidences = torch.softmax(scores, -1).amax(-1)  # [T, N], of the most likely digit
    readouts = [args.readout] if args.no_spikes else models.READOUTS
    by_readout = {name: models.predict(result.spk, result.mem, name) for name in readouts}
    tested_on = data.describe(["test"])
    recordings = nmnist.describe_tested(tested_on, checkpoint["data"])
    tested = f"{len(indices):,} test recordings of {recordings}"
    print(f"checkpoint  {files.best}, epoch {entry['epoch']}")
    print(f"run as      {how['precision']}, neurons {how['neuron_backend']}")
    print(f"accuracy    {result.accuracy:.2%} of {tested}")
    print(f"loss        {result.loss:.4f}")
    metrics = {
        "accuracy": result.accuracy,
        "loss": result.loss,
        "num_recordings": len(indices),
        "num_blank": data.test.num_blank,
        **measure_accuracy(result, by_readout, data),
        "early_exit": measure_early_exits(confidences, result, meter),
        **measure_cost(meter),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "tested_on": tested_on,
        "trained_on": checkpoint["data"],
        "checkpoint": str(files.best),
        "network_hash": utils.fingerprint(checkpoint["network"]),
        "epoch": entry["epoch"],
        "val_accuracy": entry["val_accuracy"],
        "temperature": entry["val_temperature"],
        "seconds_to_best_epoch": sum(epoch["seconds"] for epoch in checkpoint["history"]),
        "settings": checkpoint["settings"],
        "versions": {"trained": checkpoint["versions"], "tested": utils.versions()},
        "device_name": utils.describe_device(device),
        **how,
    }
    write_results(files, metrics, data, by_readout, confidences)
    if args.visualize:
        name = f"{network.title}{network.note}"
        draw_training(files, network, checkpoint)
        draw_test(files, data, metrics, f"{name}: {result.accuracy:.2%} correct of {tested}")
        draw_samples(files, data, by_readout[args.readout], confidences[-1], name)
    return metrics


def measure_accuracy(result: Evaluation, by_readout: dict, data: Data) -> dict:
    """Return accuracies by readout and over time, and a confusion matrix; print accuracies.

    `by_readout` are the predictions [N] of each readout.
    """
    labels, predictions = result.labels, result.predictions
    accuracies, ties = {}, {}
    for readout, predicted in by_readout.items():
        accuracies[readout] = (predicted == labels).double().mean().item()
        if readout != "membrane":  # the share of recordings where digits tie in the end
            scores = models.digit_scores(result.spk, result.mem, readout)[-1]
            ties[readout] = (models.leaders(scores).sum(-1) > 1).double().mean().item()
    over_time = (predictions == labels).double().mean(1).tolist()
    step_ms, saccade_ends = data.time_axis
    steps = [int(end) for end in saccade_ends if end >= 1]
    after = [f"{over_time[step - 1]:.2%} at {step * step_ms:.0f} ms" for step in steps]
    print("by readout  " + "   ".join(f"{name} {x:.2%}" for name, x in accuracies.items()))
    print("over time   " + ("   ".join(after) or "steps of no fixed duration"))
    return {
        "accuracy_by_readout": accuracies,
        "ties": ties,
        "confusion_matrix": confusion_matrix(labels, predictions[-1], labels=range(10)).tolist(),
        "accuracy_over_time": over_time,
    }


def measure_early_exits(confidences, result: Evaluation, meter: ActivityMeter) -> list[dict]:
    """Return what is reached if each recording is decided once its confidence passes a threshold.

    For each of `EXIT_THRESHOLDS`: accuracy, mean time steps, and synaptic operations until then;
    for `PRINTED_EXIT` it is printed. Confidences are [T, N].
    """
    entries = []
    for threshold in EXIT_THRESHOLDS:
        steps = exit_steps(confidences, threshold)
        correct = result.predictions.gather(0, steps[None] - 1)[0] == result.labels
        entry = {
            "threshold": threshold,
            "accuracy": correct.double().mean().item(),
            "mean_steps": steps.double().mean().item(),
        }
        if not meter.network.config.no_spikes:
            entry["synaptic_operations"] = meter.operations_until(steps)
        entries.append(entry)
        if threshold == PRINTED_EXIT:
            decided = f"{entry['accuracy']:.2%} correct if decided at {threshold:.0%} confidence"
            after = f"{entry['mean_steps']:.1f} of {len(confidences)} steps"
            print(f"early exit  {decided}, after {after} on average")
    return entries


def exit_steps(confidences: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return the first step, from 1, with a confidence [T, N] above the threshold, or T: [N]."""
    passed = confidences > threshold
    passed[-1] = True
    return passed.int().argmax(0) + 1


def measure_cost(meter: ActivityMeter) -> dict:
    """Return what each layer does in a recording and what it costs; print it, and what stands out.

    Costs are synaptic operations, multiply-accumulates (MACs) and an estimate of the energy.
    """
    layers = meter.layers()
    energy = models.energy_uj(layers)
    macs = sum(layer["macs"] for layer in layers.values()) / 1e6
    cost = f"{macs:.2f} million MACs, {energy['without_spikes']:.3g} uJ at 45 nm"
    if "spiking" in energy:
        operations = sum(layer["synaptic_operations"] for layer in layers.values()) / 1e6
        spiking = f"{operations:.2f} million synaptic operations, {energy['spiking']:.3g} uJ"
        cost = f"{spiking}; without spikes {cost}"
    print(f"cost        {cost}")
    print_layers(layers)
    for name, layer in layers.items():
        if layer.get("firing_rate") in (0, 1):
            what = "never fire" if layer["firing_rate"] == 0 else "fire at every step"
            utils.warn(f"neurons of {name} {what}: try --threshold, --beta, --lr or more --epochs")
    not_counted = sorted(meter.not_counted)
    if not_counted:
        names = ", ".join(not_counted)
        utils.warn(f"operations, MACs and energy leave out the connections of {names}")
    return {"layers": layers, "energy_uj": energy, "not_counted": not_counted}


def print_layers(layers: dict[str, dict[str, float]]) -> None:
    """Print a table of the layers, with a column for each of their values."""
    columns = list(dict.fromkeys(column for layer in layers.values() for column in layer))
    print(f"{'layer':12}" + "".join(f"{column.replace('_', ' '):>21}" for column in columns))
    for name, layer in layers.items():
        cells = []
        for column in columns:
            decimals = 0 if column in ("neurons", "macs", "synaptic_operations") else 3
            cells.append(f"{layer[column]:,.{decimals}f}" if column in layer else "")
        print(f"{name:12}" + "".join(f"{cell:>21}" for cell in cells))


def write_results(files, metrics: dict, data: Data, by_readout: dict, confidences) -> None:
    """Write metrics and predictions; earlier ones are kept if they are not of the same test."""
    earlier = utils.read_json(files.metrics) or {}
    identity = ("network_hash", "settings", "tested_on", "device", "precision", "neuron_backend")
    if any(earlier.get(name) != metrics[name] for name in identity):
        utils.keep_earlier_files(files.metrics, files.predictions)
    columns = {"file": data.test_files, "label": data.test.labels.tolist()}
    for readout, predicted in by_readout.items():
        columns[readout] = predicted.tolist()
    columns["confidence"] = [f"{confidence:.6f}" for confidence in confidences[-1].tolist()]
    columns[f"early_exit_step_{PRINTED_EXIT}"] = exit_steps(confidences, PRINTED_EXIT).tolist()
    utils.write_json(files.metrics, metrics)
    utils.write_csv(files.predictions, columns)
    print(f"metrics     {files.metrics}\npredictions {files.predictions}")


def draw_training(files: RunFiles, network: SpikingNetwork, checkpoint: dict) -> None:
    """Draw the history, and the filters of a `conv1` that sees the two polarities."""
    history = checkpoint["history"]
    logged = utils.read_json(files.history) or []
    if logged[: len(history)] == history:  # the same run, which went on after the best epoch
        history = logged
    title = f"{network.title} on {checkpoint['data']['data_set']}"
    best_epoch = checkpoint["history"][-1]["epoch"]
    augmented = not checkpoint["settings"]["no_augment"]
    path = files.log_dir / "training_results.png"
    utils.plot_history(history, best_epoch, augmented, title, path)
    conv1 = getattr(network, "conv1", None)
    if isinstance(conv1, torch.nn.Conv2d) and conv1.in_channels == 2 and conv1.groups == 1:
        weight = conv1.weight.detach().cpu().numpy()
        num_filters, _, height, width = weight.shape
        title += f"\nthe {num_filters} filters of conv1, {height} x {width} pixels each"
        utils.plot_filters(weight, title, files.figure("filters"))


def draw_test(files: RunFiles, data: Data, metrics: dict, title: str) -> None:
    """Draw the confusion matrix and the accuracy over time."""
    counts = np.array(metrics["confusion_matrix"])
    utils.plot_confusion_matrix(counts, title, files.figure("confusion_matrix"))
    over_time, exits = np.array(metrics["accuracy_over_time"]), metrics["early_exit"]
    path = files.figure("accuracy_over_time")
    utils.plot_accuracy_over_time(over_time, exits, data.time_axis, title, path)


def draw_samples(files: RunFiles, data: Data, predictions, confidences, network: str) -> None:
    """Draw 20 test recordings with true and predicted digit: mistakes first, the digits in turn.

    The events are from the middle of the first saccade: over a whole recording ON and OFF cover one
    another.
    """
    labels, predictions = data.test.labels.cpu().numpy(), predictions.numpy()
    indices = utils.mistakes_first(labels, predictions, 20)
    sequences, _ = data.test.batch(torch.from_numpy(indices))
    saccade_ends = data.time_axis.saccade_ends
    end = saccade_ends[0] if saccade_ends else len(sequences) / 3
    start, stop = int(0.4 * end), math.ceil(0.6 * end)  # whole steps, at least one
    images = sequences[start:stop].sum(0).cpu().numpy()
    texts = []
    for i in indices:
        text = f"{labels[i]} read as {predictions[i]}\nconfidence {confidences[i]:.0%}, no. {i}"
        texts.append(text)
    mistakes = labels != predictions
    title = f"{network} on {data.name}: test recordings, mistakes first, in orange\n"
    title += f"{mistakes.sum()} in all; events of steps {start + 1} to {stop} of {len(sequences)}"
    utils.plot_predictions(images, texts, mistakes[indices], title, files.figure("samples"))


# --- Several seeds --------------------------------------------------------------------------------


def run_seeds(args: argparse.Namespace, argv: list[str], device, seeds: list[int]) -> None:
    """Run the script for each seed, in folders of its own; print and write a table of the tests."""
    files = RunFiles(args)
    all_metrics = []
    data = None
    with files.hold(args.test_only):
        for seed in seeds:
            print(f"seed        {seed}")
            of_seed = copy.copy(args)
            of_seed.seed = seed
            of_seed.save_dir = str(files.save_dir / f"seed_{seed}")
            of_seed.log_dir = str(files.log_dir / f"seed_{seed}")
            of_seed.dataset = data.source if data else args.dataset  # the same for all
            metrics, data = run(of_seed, argv, device, data)
            all_metrics.append(metrics)
        if rank() == 0:
            print_seeds(all_metrics, files.seeds)


def print_seeds(all_metrics: list[dict], path: Path) -> None:
    """Print mean and standard deviation of the accuracies; write a row for each seed."""
    rows = []
    for metrics in all_metrics:
        row = {"epoch": metrics["epoch"], "test_loss": metrics["loss"]}
        for name in ("precision", "neuron_backend", "accuracy"):
            row[name] = metrics[name]
        for readout, accuracy in metrics["accuracy_by_readout"].items():
            row[f"accuracy_{readout}"] = accuracy
        row["trained_on"] = metrics["trained_on"]["data_set"]
        rows.append({**row, **metrics["trained_on"], **metrics["tested_on"], **metrics["settings"]})
    accuracies = [name for name in rows[0] if name.startswith("accuracy")]
    differing = {name for row in rows for name in row if row[name] != rows[0][name]}
    if other := sorted(differing - {"seed", "epoch", "test_loss", *accuracies}):
        utils.warn(f"these networks differ in more than their seed: {', '.join(other)}")
    print(f"seeds       {len(rows)}, mean ± standard deviation")
    for name in accuracies:
        values = 100 * np.array([row[name] for row in rows])
        print(f"{name.removeprefix('accuracy_'):12}{values.mean():.2f} ± {values.std(ddof=1):.2f}%")
    utils.keep_earlier_files(path)
    utils.write_csv(path, {name: [row[name] for row in rows] for name in rows[0]})
    print(f"table       {path}")


# --- Flags and settings ---------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all flags: the settings, and how to run."""
    parser = utils.make_parser(__doc__)
    add_network_flags(parser.add_argument_group("network"))
    add_training_flags(parser.add_argument_group("training"))
    nmnist.add_frame_flags(parser.add_argument_group("frames"))
    add_running_flags(parser.add_argument_group("running"))
    return parser


def add_network_flags(group) -> None:
    """Add the flags of `NetworkConfig`."""
    default = models.NetworkConfig()
    flag = functools.partial(add_flag, group)
    decay = number(float, 0, 1)
    positive = number(float, 1e-6)
    rate = number(float, 0, 0.999)
    flag("--model", default.model, "network", choices=models.NETWORKS)
    flag("--beta", default.beta, "decay of the membrane potential per step", type=decay)
    flag("--threshold", default.threshold, "potential above which a neuron fires", type=positive)
    flag("--alpha", default.alpha, "decay of adaptation and synaptic current (resnet)", type=decay)
    flag("--dropout", default.dropout, "probability of dropping a last hidden neuron", type=rate)
    flag("--width", default.width, "factor on channels and hidden layer", type=number(int, 1, 64))
    readout = "what decides: the mean membrane potential, the most spikes, or the first spike"
    flag("--readout", default.readout, readout, choices=models.READOUTS)
    flag("--learn_beta", False, "learn one beta per layer")
    flag("--no_spikes", False, "ReLU in place of neurons; its files are named <model>_relu_...")


def add_training_flags(group) -> None:
    """Add the flags that say how to train."""
    flag = functools.partial(add_flag, group)
    rates = ", ".join(f"{lr} for {name}" for name, lr in DEFAULT_LR.items())
    share = number(float, 0.0001, 0.9999)
    seed = number(int, 0, 2**32 - 1)
    flag("--epochs", 10, "passes over the training recordings", type=number(int, 1))
    flag("--batch_size", 128, "recordings per training step", type=number(int, 1))
    flag("--lr", None, f"learning rate (default: {rates})", type=number(float, 1e-9))
    flag("--weight_decay", 0.0, "weight decay of connections alone", type=number(float, 0))
    flag("--optimizer", "adam", "optimizer", choices=DEFAULT_LR)
    loss = "cross entropy of potentials (ce) or spike counts (count); squared error of counts (mse)"
    flag("--loss", "ce", loss, choices=LOSSES)
    flag("--scheduler", False, "lower the learning rate along a half cosine")
    flag("--no_augment", False, "train on the recordings as they are, without augmentation")
    flag("--val_split", 0.1, "share of training recordings for validation", type=share)
    flag("--seed", 0, "seed of all random numbers; several: one network each", type=seed, nargs="+")


def add_running_flags(group) -> None:
    """Add the flags that say where and how to run, and what to read and write."""
    flag = functools.partial(add_flag, group)
    nmnist.add_data_flags(group)
    flag("--save_dir", "./checkpoints", "folder of the checkpoints", type=utils.file_path)
    flag("--log_dir", "./logs", "folder of history, metrics and figures", type=utils.file_path)
    utils.add_device_flags(group)
    flag("--resume", False, "go on with the run of this command in save_dir, if there is one")
    flag("--test_only", False, "test the best checkpoint, without training")
    flag("--visualize", False, "write figures to log_dir")


def settings_of(args: argparse.Namespace) -> dict:
    """Return the settings among the flags: all that shapes a trained network."""
    names = utils.flag_names(add_network_flags, add_training_flags, nmnist.add_frame_flags)
    return {name: getattr(args, name) for name in names}


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with status 2 if flags contradict one another; one typed as its default does not."""
    changed = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    for name in NEED_SPIKES:
        if args.no_spikes and name in changed:
            parser.error(f"argument --{name}: not allowed with argument --no_spikes")
    if models.NETWORKS[args.model] is models.SpikingCNN and "alpha" in changed:
        parser.error("argument --alpha: --model cnn has no neurons that use it")
    if args.test_only and args.resume:
        parser.error("argument --resume: not allowed with argument --test_only")
    if not args.test_only and args.batch_size // world_size() * args.time_steps < 2:
        parser.error("argument --batch_size: too small, norms need two frames in each process")


def take_settings(args, argv: list[str], settings: dict) -> argparse.Namespace:
    """Return `args` with the settings of a network to test; print which flags are ignored."""
    # Parsed with the trained settings as defaults, so that what differs from them was typed.
    parser = make_parser()
    parser.set_defaults(**settings)
    typed = parser.parse_args(argv)
    if isinstance(typed.seed, list):  # one of which is tested
        typed.seed = args.seed
    # A test may have another batch size, on a machine of less memory.
    settings = {**settings, "batch_size": typed.batch_size}
    for name, value in settings.items():
        asked = getattr(typed, name)
        if asked != value:
            print(f"ignored     --{name} {asked}: the network was trained with {value}")
    if settings["loss"] not in LOSSES:
        raise UserError(f"--loss {settings['loss']}: this script does not add it to LOSSES")
    return argparse.Namespace(**{**vars(args), **settings})


# --- The commands that come next ------------------------------------------------------------------


def print_next(args: argparse.Namespace, argv: list[str]) -> None:
    """Print the commands that test and draw the network of the command `argv`."""
    if argv != sys.argv[1:] or not Path(sys.argv[0]).is_file():
        return  # this is no command that was typed
    if not args.visualize:
        words = [word for word in argv if word not in ("--resume", "--test_only")]
        command = ["python", sys.argv[0], *words, "--test_only", "--visualize"]
        print(f"next        {shlex.join(command)}")
    script = Path(sys.argv[0])
    if script.resolve() == Path(__file__).resolve() and not args.no_spikes:
        names = utils.flag_names(nmnist.add_data_flags, utils.add_device_flags)
        flags = flags_of({name: getattr(args, name) for name in ("model", "save_dir", *names)})
        script = script.with_name("visualize_activations.py")
        print("next        " + shlex.join(["python", str(script), *flags, "--visualize_all"]))


def flags_of(values: dict) -> list[str]:
    """Return the flags that set `values`, without those that are the parser's defaults."""
    defaults = vars(make_parser().parse_args([]))
    flags = []
    for name, value in values.items():
        if value != defaults[name]:
            flags.append(f"--{name}" if value is True else f"--{name}={value}")
    return flags


if __name__ == "__main__":
    utils.run_script(main)
