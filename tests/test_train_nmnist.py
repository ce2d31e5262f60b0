"""Training, resuming and testing, as a user runs them, on recordings made here and on real ones."""

import contextlib
import copy
import csv
import io
import itertools
import json
import math
import os
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import snntorch as snn
import tonic
import torch
from conftest import INLINE, ROOT, files_in, run
from torch import nn
from torch.profiler import ProfilerActivity
from tqdm import tqdm

import nmnist
import train_nmnist
import utils
import visualize_activations
from models import (
    NETWORKS,
    ActivityMeter,
    NetworkConfig,
    SpikingNetwork,
    build_model,
    restore_network,
    run_options,
    warn_once,
)

SHORT = ["--time_steps", 5, "--batch_size", 32, "--val_split", 0.2]
BY_STEP = ["--neuron_backend", "step"]  # with nothing to compile
STEP = ["--time_steps", 2, *BY_STEP]  # the fastest
MEASURED = ("seconds", "recordings_per_second", "seconds_to_best_epoch")  # differ from run to run
# Of each setting but the network's name and the epochs, another value than the default.
# fmt: off
OTHER = {
    "beta": 0.6, "threshold": 1.1, "alpha": 0.4, "dropout": 0.2, "width": 2, "readout": "rate",
    "learn_beta": True, "batch_size": 31, "lr": 0.004, "weight_decay": 0.01, "optimizer": "adamw",
    "loss": "count", "scheduler": True, "no_augment": True, "val_split": 0.25, "seed": 5,
    "time_steps": 4, "denoise": 9000, "bin_by": "events", "first_saccade_only": True,
    "stabilize": True,
}
# fmt: on


def flags_for(folder, data_dir, *flags):
    """Return a command's flags: the files of the run in `folder`, on the CPU unless `flags` say."""
    folders = ["--save_dir", folder / "checkpoints", "--log_dir", folder / "logs"]
    return [str(flag) for flag in ("--data_dir", data_dir, *folders, "--device", "cpu", *flags)]


def main(folder, data_dir, *flags):
    """Run the script in this process, which starts faster than another."""
    train_nmnist.main(flags_for(folder, data_dir, *flags))


def train(folder, data_dir, *flags):
    """Run the script in this process on short sequences and small batches."""
    main(folder, data_dir, *SHORT, *flags)


def start(folder, data_dir, *flags):
    """Start the same as a user does; return the process while it runs."""
    flags = flags_for(folder, data_dir, *SHORT, *flags)
    command = [sys.executable, "train_nmnist.py", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    environment["MPLBACKEND"] = INLINE
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def finish(process, status=0):
    """Wait for a process that was started; return its stdout and stderr."""
    stdout, stderr = process.communicate(timeout=280)
    assert process.returncode == status, stderr
    return stdout, stderr


def typed(settings):
    """Return settings as flags; those that are True take no value."""
    return [x for k, v in settings.items() for x in ([f"--{k}"] if v is True else [f"--{k}", v])]


def checkpoint(folder, which="last", model="cnn"):
    """Return the content of a checkpoint."""
    return torch.load(folder / "checkpoints" / f"{model}_{which}.pt", weights_only=True)


def read_log(folder, name):
    """Return the content of a JSON file in log_dir."""
    return json.loads((folder / "logs" / name).read_text())


def read_csv(path):
    """Return the rows of a CSV file."""
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def contents(folder):
    """Return the bytes of all files in a folder."""
    return {path: path.read_bytes() for path in files_in(folder)}


def plain(value):
    """Return `value` with tensors as bytes and without measured times, to compare bits by `==`."""
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in MEASURED}
    return [plain(v) for v in value] if isinstance(value, list) else value


def differences(first, second, model="cnn"):
    """Return which results of two runs differ in any bit."""
    results = []
    for folder in (first, second):
        files = {which: checkpoint(folder, which, model) for which in ("best", "last")}
        files["history"] = read_log(folder, f"{model}_history.json")
        files["metrics"] = read_log(folder, f"{model}_test_metrics.json")
        del files["metrics"]["checkpoint"]
        files["predictions"] = read_csv(folder / "logs" / f"{model}_predictions.csv")
        results.append(plain(files))
    return [name for name in results[0] if results[0][name] != results[1][name]]


def load(data_dir, split, time_steps=5):
    """Return the frames of a part of the made-up recordings."""
    folder = data_dir / "NMNIST" / split.capitalize()
    return nmnist.load_frames(nmnist.NMNIST(folder), time_steps)


def outputs(folder, frames, indices, model="cnn"):
    """Return spk and mem [T, N, 10] of a run's best network as arrays in float64, and labels."""
    network = restore_network(checkpoint(folder, "best", model), neuron_backend="step")
    x, labels = frames.batch(indices)
    with torch.no_grad():
        spk, mem = network(x)
    return spk.double().numpy(), mem.double().numpy(), labels.numpy()


def cross_entropy(scores, labels):
    """Return the mean cross entropy of scores [T, N, 10]."""
    scores = scores - scores.max(-1, keepdims=True)
    logs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    return -logs[:, np.arange(len(labels)), labels].mean()


def table(stdout):
    """Return the printed table of a test, by title."""
    return {line[:12].strip(): line[12:] for line in stdout.splitlines()}


@pytest.fixture(scope="module")
def trained_networks(tmp_path_factory, made_data_dir):
    """Both networks, trained at the same time: {model: (folder, (stdout, stderr))}.

    The CNN by a user's command, the ResNet in this process.
    """
    folders = {model: tmp_path_factory.mktemp(model) for model in ("cnn", "resnet")}
    flags = ["--epochs", 5, "--visualize"]
    process = start(folders["cnn"], made_data_dir, *flags)
    with (
        contextlib.redirect_stdout(io.StringIO()) as stdout,
        contextlib.redirect_stderr(io.StringIO()) as stderr,
    ):
        train(folders["resnet"], made_data_dir, "--model", "resnet", *flags)
    outputs = {"cnn": finish(process), "resnet": (stdout.getvalue(), stderr.getvalue())}
    return {model: (folders[model], outputs[model]) for model in folders}


@pytest.fixture(scope="module")
def mislabelled(tmp_path_factory, made_data_dir):
    """A folder of the same recordings, of which a third is labelled as the next digit."""
    data_dir = tmp_path_factory.mktemp("mislabelled")
    shutil.copytree(made_data_dir / "NMNIST", data_dir / "NMNIST")
    for path in sorted(data_dir.glob("*/*/*/*.bin")):
        digit = int(path.parent.name)
        if (int(path.stem) - 1) // 10 % 3 == 0:
            path.rename(path.parent.with_name(str((digit + 1) % 10)) / path.name)
    return data_dir


@pytest.fixture(params=["cnn", "resnet"])
def trained(request, trained_networks):
    """One of them: (model, folder, (stdout, stderr)). Tests that write use `copied`."""
    return request.param, *trained_networks[request.param]


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of one of them that a test may change: (model, folder)."""
    model, folder, _ = trained
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return model, tmp_path


# --- Training -------------------------------------------------------------------------------------


def test_training_learns_and_reports_every_epoch(trained):
    model, folder, (stdout, stderr) = trained
    entries = read_log(folder, f"{model}_history.json")
    names = "epoch train_loss train_accuracy val_loss val_accuracy test_loss test_accuracy "
    names += "val_temperature lr device precision neuron_backend threads processes seconds "
    names += "recordings_per_second"
    assert list(entries[0]) == names.split()
    assert [entry["epoch"] for entry in entries] == [1, 2, 3, 4, 5]
    how = {"device": "cpu", "neuron_backend": "fused", "threads": 1, "processes": 1}
    how["precision"] = run_options(torch.device("cpu"), "auto", "auto")["precision"]
    for entry in entries:
        assert {name: entry[name] for name in how} == how
    assert entries[-1]["train_loss"] < entries[0]["train_loss"]
    assert max(entry["val_accuracy"] for entry in entries) > 0.8  # the made-up digits are easy
    lines = [line for line in stdout.splitlines() if line.startswith("epoch")]
    assert len(lines) == 5
    for entry, line in zip(entries, lines, strict=True):
        assert all(f"{x} {entry[f'{x}_loss']:.4f}" in line for x in ("train", "val", "test"))
        assert f"{entry['recordings_per_second']:,.0f} recordings/s" in line
    assert "WARNING" not in stderr
    assert "|" not in stderr  # no bars, which would stand before the lines of a log


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self):
        return True


def test_bars_show_the_progress_in_a_terminal(tmp_path, made_data_dir):
    with contextlib.redirect_stderr(Terminal()) as stderr:
        train(tmp_path, made_data_dir, *STEP, "--epochs", 2)
    bars = [bar.split(":")[0] for bar in stderr.getvalue().split("\r") if "|" in bar]
    epochs = [bar for i, bar in enumerate(bars) if bar not in bars[:i]]
    assert epochs == ["bin train", "bin test", "epoch 1/2", "norms", "val", "test", "epoch 2/2"]


def test_the_same_command_twice_gives_the_same_numbers(trained, tmp_path, made_data_dir):
    """After other work, the CNN in another process."""
    model, folder, _ = trained
    train(tmp_path, made_data_dir, "--model", model, "--epochs", 5)
    assert differences(tmp_path, folder, model) == []


def test_the_best_checkpoint_is_chosen_on_validation(tmp_path, mislabelled):
    """Over the epochs, validation and test losses rise and fall."""
    train(tmp_path, mislabelled, *STEP, "--epochs", 7, "--seed", 3)
    entries = read_log(tmp_path, "cnn_history.json")
    best = max(entries, key=lambda entry: (entry["val_accuracy"], -entry["val_loss"]))
    assert checkpoint(tmp_path, "best")["history"] == entries[: best["epoch"]]
    metrics = read_log(tmp_path, "cnn_test_metrics.json")
    assert metrics["epoch"] == best["epoch"]
    assert metrics["loss"] == best["test_loss"]
    assert metrics["accuracy"] == best["test_accuracy"]


@pytest.mark.parametrize("time_steps", [1, 5, 25])
def test_losses_equal_a_hand_computation(time_steps):
    """The right neuron of ten fires at every step, no other; its membrane is at 2, others at 0."""
    labels = torch.tensor([3, 7, 7])
    spk = torch.nn.functional.one_hot(labels, 10).float().expand(time_steps, 3, 10)
    losses = {k: float(loss(spk, 2 * spk, labels)) for k, loss in train_nmnist.LOSSES.items()}
    assert losses["ce"] == pytest.approx(math.log(1 + 9 * math.exp(-2)), rel=1e-5)
    assert losses["mse"] == 0
    # Whatever the number of steps.
    assert losses["count"] == pytest.approx(math.log(1 + 9 * math.exp(-5)), rel=1e-5)
    silent = float(train_nmnist.LOSSES["mse"](0 * spk, 2 * spk, labels))
    assert silent == pytest.approx(time_steps / 10)  # T squared, by ten neurons and T steps


@pytest.mark.parametrize("names", ["ce sgd", "ce adamw", "mse adam", "mse sgd", "count adam"])
def test_every_loss_and_optimizer_learns(tmp_path, made_data_dir, names):
    loss, optimizer = names.split()
    train(tmp_path, made_data_dir, "--epochs", 3, "--loss", loss, "--optimizer", optimizer)
    entries = read_log(tmp_path, "cnn_history.json")
    assert entries[-1]["train_loss"] < entries[0]["train_loss"]
    assert {entry["lr"] for entry in entries} == {0.1 if optimizer == "sgd" else 0.005}


@pytest.mark.parametrize("epochs", [1, 6])
def test_the_scheduler_equals_torchs_cosine_annealing(tmp_path, made_data_dir, capsys, epochs):
    train(tmp_path, made_data_dir, *STEP, "--epochs", epochs, "--scheduler", "--lr", 0.03)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.03)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    expected = []
    for _ in range(epochs):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert [e["lr"] for e in read_log(tmp_path, "cnn_history.json")] == pytest.approx(expected)
    groups = checkpoint(tmp_path)["training"]["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([expected[-1]] * len(groups))
    # A run that goes on for more epochs than planned says so.
    flags = [*STEP, "--epochs", epochs + 1, "--scheduler", "--lr", 0.03]
    train(tmp_path, made_data_dir, *flags, "--resume")
    assert f"planned over {epochs} epochs, continues over {epochs + 1}" in capsys.readouterr().out


def test_weight_decay_shrinks_connections_alone(tmp_path, made_data_dir):
    """The decay ends all connections; norms and beta, which start above 0, stay."""
    flags = ["--epochs", 1, *STEP, "--learn_beta", "--optimizer", "adamw", "--lr", 1e-3]
    train(tmp_path, made_data_dir, *flags, "--weight_decay", 1000)
    network = checkpoint(tmp_path)["training"]["raw_network"]
    connections = [x for name, x in network.items() if name.endswith("weight") and x.dim() > 1]
    norms = [x for name, x in network.items() if re.fullmatch(r"norm\w+\.weight", name)]
    betas = [x for name, x in network.items() if name.endswith("beta")]
    assert len(connections) == len(norms) == len(betas) == 5
    assert all(values.abs().max() < 0.01 for values in connections)
    assert all(values.min() > 0.9 for values in norms)
    assert all(value == pytest.approx(0.5, abs=0.01) for value in betas)


def test_only_training_recordings_are_augmented(tmp_path, made_data_dir):
    """Validation and test losses are those of plain frames, recomputed."""
    flags = ["--epochs", 1, "--precision", "fp32", *BY_STEP]
    train(tmp_path / "plain", made_data_dir, *flags, "--no_augment")
    train(tmp_path / "moved", made_data_dir, *flags)
    plain, moved = (read_log(tmp_path / name, "cnn_history.json")[0] for name in ("plain", "moved"))
    assert plain["train_loss"] != moved["train_loss"]
    frames, test = (load(made_data_dir, split) for split in ("train", "test"))
    _, val = nmnist.split_validation(frames.labels, 0.2, seed=0)
    assert len(val) == 24
    for name, part, indices in (("val", frames, val), ("test", test, torch.arange(30))):
        _, mem, labels = outputs(tmp_path / "moved", part, indices)
        assert moved[f"{name}_loss"] == pytest.approx(cross_entropy(mem, labels), rel=1e-4)
        accuracy = (mem.mean(0).argmax(-1) == labels).mean()
        assert moved[f"{name}_accuracy"] == pytest.approx(accuracy)


def test_the_moving_average_equals_a_hand_computation():
    """The first weights count wholly, the next 9/10, 9/11, ... and from step 891 on a hundredth."""
    network, averaged = (build_model(NetworkConfig()) for _ in range(2))
    weight = 0.0
    for step in (*range(30), *range(880, 910)):
        network.norm_out.weight.data.fill_(np.sin(step / 10))
        train_nmnist.update_ema(averaged, network, step)
        share = max(0.01, 9 / (9 + step))
        weight = (1 - share) * weight + share * np.sin(step / 10)
    assert averaged.norm_out.weight.tolist() == pytest.approx([weight] * 10, abs=1e-5)


def test_checkpoints_hold_the_moving_average_of_all_steps(tmp_path, made_data_dir):
    """After an epoch of one step, the weights; after two such epochs, 9/10 of the second ones.

    Its norms are measured on training recordings that are not augmented.
    """
    flags = [*STEP, "--precision", "fp32", "--batch_size", 96]
    train(tmp_path, made_data_dir, *flags, "--epochs", 1)
    first = checkpoint(tmp_path)
    assert plain(first["network"]) == plain(checkpoint(tmp_path, "best")["network"])
    train(tmp_path, made_data_dir, *flags, "--epochs", 2, "--resume")
    second = checkpoint(tmp_path)
    names = [name for name, _ in build_model(NetworkConfig()).named_parameters()]
    assert len(names) == 15
    for name in names:
        before, after = first["network"][name], second["training"]["raw_network"][name]
        assert torch.equal(before, first["training"]["raw_network"][name])
        torch.testing.assert_close(second["network"][name], 0.1 * before + 0.9 * after)
    frames = load(made_data_dir, "train", 2)
    x, _ = frames.batch(nmnist.split_validation(frames.labels, 0.2, seed=0)[0])
    weight = second["network"]["conv1.weight"]
    out = torch.nn.functional.conv2d(x.flatten(0, 1), weight, padding=1)
    out = torch.nn.functional.max_pool2d(out, 2).movedim(1, 0).flatten(1)
    for name, value in (("mean", out.mean(1)), ("var", out.var(1))):
        measured = second["network"][f"norm1.running_{name}"]
        torch.testing.assert_close(measured, value, rtol=2e-3, atol=0)


def test_backends_train_alike(tmp_path, made_data_dir):
    """A wider network with learned decays does so, too."""
    settings = {"width": 2, "learn_beta": True}
    for backend in ("fused", "step"):
        flags = ["--precision", "fp32", "--epochs", 2, "--neuron_backend", backend]
        train(tmp_path / backend, made_data_dir, *flags, *typed(settings))
        network = checkpoint(tmp_path / backend)["training"]["raw_network"]
        betas = [value.item() for name, value in network.items() if name.endswith("beta")]
        assert len(betas) == 5
        assert 0.5 not in betas
    fused, step = (read_log(tmp_path / name, "cnn_history.json") for name in ("fused", "step"))
    assert [entry["neuron_backend"] for entry in fused + step] == ["fused"] * 2 + ["step"] * 2
    for a, b in zip(fused, step, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=0.03)
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=0.05)
    parameters = sum(p.numel() for p in build_model(NetworkConfig(**settings)).parameters())
    assert read_log(tmp_path / "fused", "cnn_test_metrics.json")["parameters"] == parameters


@pytest.mark.parametrize("model", ["cnn", "resnet"])
def test_learned_decays_stay_between_0_and_1(tmp_path, made_data_dir, model, capsys):
    """The learning rate would take them out; the table and the metrics tell them."""
    flags = ["--model", model, "--learn_beta", "--lr", 0.2, "--epochs", 3]
    train(tmp_path, made_data_dir, *STEP, *flags)
    last = checkpoint(tmp_path, model=model)
    for weights in (last["training"]["raw_network"], last["network"]):
        betas = [x.item() for name, x in weights.items() if name.endswith("neuron.beta")]
        assert len(betas) == (5 if model == "cnn" else 7)
        assert 0 <= min(betas) <= max(betas) <= 1
    best = checkpoint(tmp_path, "best", model)["network"]
    layers, printed = (
        read_log(tmp_path, f"{model}_test_metrics.json")["layers"],
        table(capsys.readouterr().out),
    )
    assert printed["layer"].split()[-1] == "beta"
    for name, layer in layers.items():
        assert layer["beta"] == pytest.approx(best[f"{name}.neuron.beta"].item())
        assert printed[name].split()[-1] == f"{layer['beta']:.3f}"


def test_training_without_spikes_keeps_files_of_its_own(tmp_path, made_data_dir, capsys):
    train(tmp_path, made_data_dir, *STEP, "--epochs", 1)
    before = contents(tmp_path)
    capsys.readouterr()
    train(tmp_path, made_data_dir, "--epochs", 2, "--no_spikes", "--visualize")
    assert "synaptic" not in capsys.readouterr().out
    train(tmp_path, made_data_dir, "--no_spikes", "--test_only")
    train(tmp_path, made_data_dir, "--no_spikes", "--resume", "--epochs", 3)
    after = contents(tmp_path)
    assert {path: after[path] for path in before} == before
    files = ["best.pt", "last.pt", "history.json", "test_metrics.json", "predictions.csv"]
    files += ["confusion_matrix.png", "accuracy_over_time.png", "samples.png"]
    assert {f"cnn_relu_{name}" for name in files} <= {path.name for path in after}
    entries = read_log(tmp_path, "cnn_relu_history.json")
    assert len(entries) == 3
    assert max(entry["val_accuracy"] for entry in entries) > 0.5
    metrics = read_log(tmp_path, "cnn_relu_test_metrics.json")
    assert (metrics["settings"]["model"], metrics["neuron_backend"]) == ("cnn", "relu")
    assert metrics["settings"]["no_spikes"]
    assert list(metrics["accuracy_by_readout"]) == ["membrane"]
    layers = metrics["layers"].values()
    assert not any("synaptic_operations" in x for x in (*layers, *metrics["early_exit"]))
    macs = sum(layer["macs"] for layer in layers)
    assert metrics["energy_uj"] == {"without_spikes": pytest.approx(4.6e-6 * macs)}
    with pytest.raises(utils.UserError, match=r"no checkpoint at .*resnet_relu_best\.pt"):
        train(tmp_path, made_data_dir, "--test_only", "--model", "resnet", "--no_spikes")


@pytest.mark.parametrize("batch_size", [5, 19])
def test_a_single_time_step_and_a_last_batch_of_one(tmp_path, made_data_dir, batch_size):
    """One frame, the last of the 96 recordings, is too few for a norm."""
    flags = [*BY_STEP, "--time_steps", 1, "--batch_size", batch_size]
    train(tmp_path, made_data_dir, "--epochs", 1, *flags)
    assert len(read_log(tmp_path, "cnn_history.json")) == 1


def test_real_recordings_are_learnt_in_two_epochs(tmp_path, real_data_dir):
    flags = ["--batch_size", 16, "--time_steps", 10, "--val_split", 0.1]
    main(tmp_path, real_data_dir, "--epochs", 2, *flags)
    assert read_log(tmp_path, "cnn_history.json")[-1]["test_accuracy"] > 0.6


# --- Flags and environment ------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none(tmp_path, made_data_dir):
    with pytest.raises(utils.UserError, match="--device cuda: PyTorch finds no"):
        main(tmp_path, made_data_dir, "--device", "cuda")
    assert not files_in(tmp_path)


@pytest.mark.parametrize("flag", ["--save_dir", "--log_dir"])
def test_bad_folders_are_refused_before_training(tmp_path, made_data_dir, capsys, flag):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "folder"
    with pytest.raises(utils.UserError, match=f"{flag} {folder} can't be written to"):
        train(tmp_path, made_data_dir, flag, folder)
    assert "training" not in capsys.readouterr().out
    assert files_in(tmp_path) == {tmp_path / "file"}


def test_every_setting_is_saved_in_the_checkpoint(tmp_path, made_data_dir, capsys):
    """The settings are all flags of --help but those of running."""
    with pytest.raises(SystemExit):
        train_nmnist.main(["--help"])
    text = capsys.readouterr().out
    text = text[text.index("\nnetwork:") : text.index("\nrunning:")]
    flags = ["--model", "resnet", "--epochs", 1, *BY_STEP, *typed(OTHER)]
    main(tmp_path, made_data_dir, *flags)
    for which in ("best", "last"):
        saved = checkpoint(tmp_path, which, "resnet")["settings"]
        assert saved == OTHER | {"model": "resnet", "epochs": 1, "no_spikes": False}
    assert set(re.findall(r"^  --(\w+)", text, re.MULTILINE)) == set(saved)
    name = "NMNIST, first saccade, stabilized, frames of equal event count"
    metrics = read_log(tmp_path, "resnet_test_metrics.json")
    assert metrics["tested_on"]["data_set"] == metrics["trained_on"]["data_set"] == name


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_of_a_cluster_change_nothing(tmp_path, made_data_dir, monkeypatch, capsys, rank):
    train(tmp_path / "without", made_data_dir, *STEP, "--epochs", 1)
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost"}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    train(tmp_path / "with", made_data_dir, *STEP, "--epochs", 1)
    assert differences(tmp_path / "without", tmp_path / "with") == []
    assert capsys.readouterr().out.count("epoch   1/1") == 2


# --- Resuming, faults and files -------------------------------------------------------------------


@contextlib.contextmanager
def interrupt_at(call, loss="ce"):
    """Press Ctrl-C when a loss is computed for the n-th time."""
    loss_fn, calls = train_nmnist.LOSSES[loss], itertools.count(1)

    def interrupted(*batch):
        if next(calls) == call:
            raise KeyboardInterrupt
        return loss_fn(*batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train_nmnist.LOSSES, loss, interrupted)
        yield


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("cnn", ""),
        ("cnn", "--optimizer adamw --weight_decay 0.1 --learn_beta"),
        ("resnet", "--scheduler --optimizer sgd --loss mse --dropout 0.3"),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, made_data_dir, model, flags):
    """Interrupted when the third of four epochs is trained, and validated, but not saved.

    An epoch has three batches of training, one of validation and one of test recordings.
    """
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    backend = STEP if flags else []
    flags = ["--model", model, "--epochs", 4, *flags.split(), *backend]
    train(whole, made_data_dir, *flags)
    interrupt = interrupt_at(3 * 5, "mse" if "mse" in flags else "ce")
    with interrupt, pytest.raises(KeyboardInterrupt, match="--resume"):
        train(stopped, made_data_dir, *flags)
    assert len(read_log(stopped, f"{model}_history.json")) == 2
    train(stopped, made_data_dir, "--resume", *flags)
    assert differences(whole, stopped, model) == []


@pytest.mark.parametrize("rounds", [1, pytest.param(7, marks=pytest.mark.slow)])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(tmp_path, made_data_dir, rounds):
    """Killed at its start, in training, and after an epoch, in the folder of an earlier run."""
    flags = [*STEP, "--epochs", 15]
    train(tmp_path / "whole", made_data_dir, *flags)
    seconds = sum(entry["seconds"] for entry in read_log(tmp_path / "whole", "cnn_history.json"))
    train(tmp_path / "wide", made_data_dir, *STEP, "--epochs", 1, "--width", 2)
    wide, rng, moments = contents(tmp_path / "wide"), random.Random(rounds), set()
    for n in range(rounds):
        killed = tmp_path / f"killed{n}"
        shutil.copytree(tmp_path / "wide", killed)
        shutil.copytree(made_data_dir / "NMNIST", killed / "NMNIST")
        for kill, first in enumerate(("earlier", "epoch", "resume")):
            # The first moment is while the earlier run's files are renamed, or soon after.
            process = start(killed, killed, *flags, *(["--resume"] if kill else []))
            while not process.stdout.readline().startswith(first):
                assert process.poll() is None
            time.sleep(rng.uniform(0, 0.5) * seconds if kill else 0.05 * n)
            process.kill()
            finished = re.findall(r"^epoch +(\d+)/", process.stdout.read(), re.MULTILINE)
            process.communicate()
            last = killed / "checkpoints" / "cnn_last.pt"
            saved = len(checkpoint(killed)["history"]) if last.exists() else 0
            assert saved >= int([0, *finished][-1])  # at most the epoch under way is lost
            if saved > 1:  # killed before it was written, the history is an epoch behind
                assert len(read_log(killed, "cnn_history.json")) >= saved - 1
                assert checkpoint(killed, "best")["network"]
            for path in files_in(killed):
                if path.name.startswith("."):
                    continue  # was being written
                if path.suffix == ".json":  # all others are whole
                    json.loads(path.read_text())
                elif path.suffix == ".pt":
                    assert torch.load(path, weights_only=True)
            moments.add(saved)
        train(killed, killed, *flags, "--resume")
        assert differences(tmp_path / "whole", killed) == []
        assert set(wide.values()) <= set(contents(killed).values())
    assert len(moments) > 1  # and not all before the first epoch


def test_a_run_holds_its_folder_until_ctrl_c_ends_it_in_one_line(tmp_path, made_data_dir):
    process = start(tmp_path, made_data_dir, *STEP, "--epochs", 10_000)
    while not process.stdout.readline().startswith("epoch"):
        assert process.poll() is None
    message = f"--save_dir {tmp_path / 'checkpoints'}: in use by another run of cnn"
    with pytest.raises(utils.UserError, match=message):
        train(tmp_path, made_data_dir, *STEP, "--epochs", 1)
    train(tmp_path, made_data_dir, *STEP, "--epochs", 1, "--no_spikes")  # another network may
    process.send_signal(signal.SIGINT)
    _, stderr = finish(process, 130)
    assert "Traceback" not in stderr
    last_line = stderr.strip().splitlines()[-1]
    assert "train_nmnist.py: interrupted" in last_line
    assert "repeat the command with --resume" in last_line
    assert not [path for path in files_in(tmp_path) if path.name.startswith(".")]
    saved = len(checkpoint(tmp_path)["history"])
    with pytest.raises(utils.UserError, match=r"epochs: .*continue it by"):
        train(tmp_path, made_data_dir, *STEP, "--resume", "--epochs", saved + 1)
    assert len(checkpoint(tmp_path)["history"]) == saved


def test_a_full_disk_leaves_what_was_there(tmp_path, made_data_dir):
    """The best checkpoint would fit, not the last one; a script ends with the error in one line."""
    train(tmp_path, made_data_dir, *STEP, "--epochs", 1)
    before = contents(tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*cnn_last\.pt"):
            train(tmp_path, made_data_dir, *STEP, "--resume", "--epochs", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert contents(tmp_path) == before  # nothing half written


@pytest.mark.parametrize("loss", ["ce", "mse", "count"])
def test_a_diverging_run_stops_and_keeps_what_was_there(tmp_path, made_data_dir, loss, capsys):
    """In its first epoch, it keeps the earlier run; later, its own last checkpoint."""
    flags = [*STEP, "--optimizer", "sgd", "--lr", 1e38, "--loss", loss]
    train(tmp_path, made_data_dir, *STEP, "--epochs", 1)
    before, path = contents(tmp_path), tmp_path / "checkpoints" / "cnn_last.pt"
    with pytest.raises(utils.UserError, match=r"not finite.*choose a smaller --lr"):
        train(tmp_path, made_data_dir, *flags, "--epochs", 2)
    after = contents(tmp_path)
    assert {path.name.replace(".1.", ".") for path in after} == {path.name for path in before}
    assert sorted(after.values()) == sorted(before.values())
    # What is resumed is the run that stopped in its first epoch, not the one before.
    train(tmp_path, made_data_dir, *flags, "--lr", 0.01, "--epochs", 1, "--resume")
    assert "training starts from scratch" in capsys.readouterr().out
    changed = checkpoint(tmp_path)
    changed["settings"]["lr"] = 1e38
    torch.save(changed, path)
    before = contents(tmp_path)
    with pytest.raises(utils.UserError, match=f"not finite in epoch 2.*{path}"):
        train(tmp_path, made_data_dir, *flags, "--epochs", 3, "--resume")
    assert contents(tmp_path) == before


def test_an_earlier_run_is_kept_under_a_number(tmp_path, made_data_dir, capsys):
    names = ["checkpoints/cnn_best.pt", "checkpoints/cnn_last.pt", "logs/cnn_history.json"]
    names += ["logs/cnn_test_metrics.json", "logs/cnn_predictions.csv"]
    runs = []
    for seed in range(3):
        train(tmp_path, made_data_dir, *STEP, "--epochs", 1, "--seed", seed)
        runs.append([(tmp_path / name).read_bytes() for name in names])
        assert ("cnn_best.pt kept as" in capsys.readouterr().out) == (seed > 0)
    for n, earlier in enumerate(runs[:2], start=1):
        numbered = [tmp_path / f".{n}.".join(name.rsplit(".", 1)) for name in names]
        assert [path.read_bytes() for path in numbered] == earlier
    # A run that goes on is the same run.
    train(tmp_path, made_data_dir, *STEP, "--seed", 2, "--resume", "--epochs", 2)
    assert len(checkpoint(tmp_path, "last")["history"]) == 2
    assert not list((tmp_path / "checkpoints").glob("*.3.pt"))


def test_the_last_checkpoint_alone_is_the_run(tmp_path, mislabelled):
    """The best one is missing, or `last` is copied elsewhere; epochs are left, or none."""
    flags = [*STEP, "--seed", 3, "--epochs"]
    train(tmp_path / "whole", mislabelled, *flags, 5)
    train(tmp_path / "stopped", mislabelled, *flags, 4)
    for name in ("deleted", "copied", "damaged"):
        folder = tmp_path / name / "checkpoints"
        folder.mkdir(parents=True)
        shutil.copy(tmp_path / "stopped" / "checkpoints" / "cnn_last.pt", folder)
        if name == "deleted":
            shutil.copytree(tmp_path / "stopped" / "logs", tmp_path / name / "logs")
        elif name == "damaged":
            (folder / "cnn_best.pt").write_text("damaged")
        train(tmp_path / name, mislabelled, *flags, 4, "--resume")
        assert differences(tmp_path / "stopped", tmp_path / name) == []
        (folder / "cnn_best.pt").unlink()
        train(tmp_path / name, mislabelled, *flags, 5, "--resume")
        assert differences(tmp_path / "whole", tmp_path / name) == []


def test_nothing_is_rewritten_before_something_was_trained(tmp_path, made_data_dir):
    train(tmp_path, made_data_dir, *STEP, "--epochs", 1)
    before = contents(tmp_path)
    with interrupt_at(1), pytest.raises(KeyboardInterrupt):
        train(tmp_path, made_data_dir, *STEP, "--epochs", 30, "--resume")
    assert contents(tmp_path) == before
    train(tmp_path, made_data_dir, *STEP, "--epochs", 2, "--resume")
    for which in ("best", "last"):
        assert checkpoint(tmp_path, which)["settings"]["epochs"] == 2


def test_a_resumed_run_refuses_other_settings(trained, made_data_dir, capsys):
    """Typed or default; what is refused names the flags that are left to type."""
    model, folder, _ = trained
    before = contents(folder)
    flags = ["--model", model, "--epochs", 5, "--resume"]
    settings = {k: v for k, v in OTHER.items() if k != "alpha" or model == "resnet"}
    for name, value in (settings | {"epochs": 4}).items():
        command = r"continue it by `python \S+ .*--resume`"
        message = rf"the run in {folder}/checkpoints \({name}: [^;]+\): {command}"
        with pytest.raises(utils.UserError, match=message) as error:
            train(folder, made_data_dir, *flags, *typed({name: value}))
        message = str(error.value)
        assert message.endswith(", or omit --resume to start a new run")
        pasted = shlex.split(message[message.index("`") + 1 : message.rindex("`")])[2:]
    with pytest.raises(utils.UserError, match=r"batch_size: .*val_split: .*time_steps: "):
        main(folder, made_data_dir, "--model", model, "--resume")
    assert contents(folder) == before
    train_nmnist.main(pasted)
    assert "epoch 5 of 5: nothing is left" in capsys.readouterr().out
    assert contents(folder / "checkpoints") == {
        path: content for path, content in before.items() if path.suffix == ".pt"
    }


@pytest.mark.parametrize("change", ["label", "content", "test"])
def test_a_run_resumed_on_other_data_is_refused(tmp_path, made_data_dir, capsys, change):
    root = tmp_path / "NMNIST"
    shutil.copytree(made_data_dir / "NMNIST", root)
    train(tmp_path, tmp_path, *STEP, "--epochs", 1)
    for path in root.glob("*/0/*.bin"):
        os.utime(path, (1, 1))  # touched: the same data
    train(tmp_path, tmp_path, *STEP, "--resume", "--epochs", 2)
    before = contents(tmp_path / "checkpoints")
    path = root / "Train" / "3" / "00004.bin"
    if change == "label":
        path.rename(root / "Train" / "4" / "00006.bin")
    elif change == "content":
        path.write_bytes(path.read_bytes()[:-5])
    else:
        (root / "Test" / "3" / "00004.bin").unlink()
    part = "test" if change == "test" else "train"
    message = rf"--resume: .* other recordings: .*{part}_fingerprint: \w+, was \w+"
    with pytest.raises(utils.UserError, match=message):
        train(tmp_path, tmp_path, *STEP, "--resume", "--epochs", 3)
    assert contents(tmp_path / "checkpoints") == before
    capsys.readouterr()
    train(tmp_path, tmp_path, *STEP, "--test_only")
    told = "not the test part of the training" in "".join(capsys.readouterr())
    assert told == (part == "test")


def test_a_checkpoint_of_another_network_is_refused_in_every_script(
    trained_networks, tmp_path, made_data_dir
):
    """Under another network's name, or with something missing or of another shape."""
    whole = checkpoint(trained_networks["cnn"][0])
    resnet = checkpoint(trained_networks["resnet"][0], model="resnet")
    no_steps = {name: value for name, value in whole["settings"].items() if name != "time_steps"}
    cut = whole["network"] | {"fc1.weight": torch.zeros(3, 3)}
    files = {
        "it is another network's, whose model is resnet": resnet,
        "it is another network's, whose no_spikes is True": whole
        | {"settings": whole["settings"] | {"no_spikes": True}},
        "it has no time_steps": whole | {"settings": no_steps},
        "it has no history": whole | {"history": []},
        "the weights are not those of SpikingCNN": whole | {"network": cut},
        "can't be used: 'settings'": {"format": utils.CHECKPOINT_FORMAT},
    }
    folders = [f"--save_dir={tmp_path}/checkpoints", f"--data_dir={made_data_dir}"]
    (tmp_path / "checkpoints").mkdir()
    for message, content in files.items():
        for which in ("best", "last"):
            torch.save(content, tmp_path / "checkpoints" / f"cnn_{which}.pt")
        before = contents(tmp_path / "checkpoints")
        for script in (
            lambda: main(tmp_path, made_data_dir, "--test_only"),
            lambda: train(tmp_path, made_data_dir, "--resume", "--epochs", 5),
            lambda: visualize_activations.main(["--device=cpu", *folders]),
        ):
            with pytest.raises(utils.UserError, match=re.escape(message)):
                script()
        assert contents(tmp_path / "checkpoints") == before


# --- Testing --------------------------------------------------------------------------------------


def test_metrics_agree_with_one_another_and_with_what_is_printed(trained):
    model, folder, (stdout, _) = trained
    metrics = read_log(folder, f"{model}_test_metrics.json")
    data_sets = [metrics[name]["data_set"] for name in ("tested_on", "trained_on")]
    assert (data_sets, metrics["num_recordings"]) == (["NMNIST"] * 2, 30)
    assert [metrics["settings"][name] for name in ("model", "readout")] == [model, "membrane"]
    confusion = np.array(metrics["confusion_matrix"])
    assert confusion.sum(1).tolist() == [3] * 10  # rows are true digits, and there are 3 of each
    assert metrics["accuracy"] == pytest.approx(np.trace(confusion) / 30)
    assert len(metrics["accuracy_over_time"]) == 5
    assert metrics["accuracy_over_time"][-1] == metrics["accuracy"]
    layers = metrics["layers"].values()
    operations, macs = (sum(x[name] for x in layers) for name in ("synaptic_operations", "macs"))
    assert 0 < operations < macs
    assert all(0 < layer["firing_rate"] < 1 for layer in layers)
    expected = {"spiking": 0.9e-6 * operations, "without_spikes": 4.6e-6 * macs}
    assert metrics["energy_uj"] == pytest.approx(expected)
    parameters = build_model(NetworkConfig(model)).parameters()
    assert metrics["parameters"] == sum(values.numel() for values in parameters)
    entries = read_log(folder, f"{model}_history.json")[: metrics["epoch"]]
    assert metrics["seconds_to_best_epoch"] == pytest.approx(sum(e["seconds"] for e in entries))
    assert metrics["temperature"] == entries[-1]["val_temperature"]
    assert metrics["settings"] == checkpoint(folder, model=model)["settings"]
    assert [v["torch"] for v in metrics["versions"].values()] == [torch.__version__] * 2
    for name in ("device", "precision", "neuron_backend", "threads"):
        assert metrics[name] == entries[-1][name]
    assert metrics["checkpoint"] == str(folder / "checkpoints" / f"{model}_best.pt")
    printed = table(stdout)
    assert printed["accuracy"] == f"{metrics['accuracy']:.2%} of 30 test recordings of NMNIST"
    assert printed["loss"] == f"{metrics['loss']:.4f}"
    assert printed["run as"] == f"{metrics['precision']}, neurons fused"
    (exit_at,) = (entry for entry in metrics["early_exit"] if entry["threshold"] == 0.9)
    decided = f"{exit_at['accuracy']:.2%} correct if decided at 90% confidence"
    after = f"after {exit_at['mean_steps']:.1f} of 5 steps on average"
    assert printed["early exit"] == f"{decided}, {after}"
    assert printed["metrics"] == str(folder / "logs" / f"{model}_test_metrics.json")
    assert all(f"{value:.3g} uJ" in stdout for value in metrics["energy_uj"].values())
    for name, layer in metrics["layers"].items():
        assert f"{layer['macs']:,.0f}" in printed[name]
        assert f"{layer['firing_rate']:.3f}" in printed[name]


@pytest.mark.parametrize("model", ["cnn", "resnet"])
def test_predictions_and_early_exits_equal_a_loop_by_hand(tmp_path, mislabelled, model):
    """The temperature lets recordings exit at all steps."""
    flags = ["--model", model, "--precision", "fp32", *BY_STEP]
    train(tmp_path, mislabelled, *flags, "--epochs", 2)
    changed = checkpoint(tmp_path, "best", model)
    changed["history"][-1]["val_temperature"] = 0.3
    torch.save(changed, tmp_path / "checkpoints" / f"{model}_best.pt")
    main(tmp_path, mislabelled, *flags, "--test_only")
    metrics = read_log(tmp_path, f"{model}_test_metrics.json")
    rows = read_csv(tmp_path / "logs" / f"{model}_predictions.csv")
    files = sorted((mislabelled / "NMNIST" / "Test").glob("*/*.bin"))
    assert [row["file"] for row in rows] == [f"{p.parent.name}/{p.name}" for p in files]
    assert [row["label"] for row in rows] == [path.parent.name for path in files]
    for name, accuracy in metrics["accuracy_by_readout"].items():
        hits = [row[name] == row["label"] for row in rows]
        assert statistics.mean(hits) == pytest.approx(accuracy)
    confusion = np.zeros((10, 10), int)
    for row in rows:
        confusion[int(row["label"]), int(row["membrane"])] += 1
    assert confusion.tolist() == metrics["confusion_matrix"]
    frames = load(mislabelled, "test")
    _, mem, labels = outputs(tmp_path, frames, torch.arange(30), model)
    means = np.stack([mem[:step].mean(0) for step in range(1, 6)])
    odds = np.exp((means - means.max(-1, keepdims=True)) / 0.3)
    confidences, digits = 1 / odds.sum(-1), odds.argmax(-1)
    operations = operations_by_hand(tmp_path, frames, model)
    exits = {entry["threshold"]: entry for entry in metrics["early_exit"]}
    assert list(exits) == [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999]
    for threshold, entry in exits.items():
        ends = []  # of each recording, the step at which it is decided, from 0
        for n in range(30):
            ends.append(0)
            while ends[n] < 4 and confidences[ends[n], n] <= threshold:
                ends[n] += 1
        correct = [digits[end, n] == labels[n] for n, end in enumerate(ends)]
        assert entry["accuracy"] == pytest.approx(np.mean(correct))
        assert entry["mean_steps"] == pytest.approx(1 + statistics.mean(ends))
        used = statistics.mean(operations[end][n] for n, end in enumerate(ends))
        assert entry["synaptic_operations"] == pytest.approx(used, rel=1e-3)
        if threshold == 0.9:
            assert [int(row["early_exit_step_0.9"]) - 1 for row in rows] == ends
    printed = [float(row["confidence"]) for row in rows]
    assert printed == pytest.approx(confidences[-1], abs=1e-4)
    assert len({entry["mean_steps"] for entry in exits.values()}) > 4


def operations_by_hand(folder, frames, model):
    """Return the synaptic operations [T][N] of recordings that are cut after each step."""
    network = restore_network(checkpoint(folder, "best", model), neuron_backend="step")
    x, _ = frames.batch(torch.arange(len(frames)))
    operations = []
    for step in range(1, len(x) + 1):
        with torch.no_grad(), ActivityMeter(network) as meter:
            network(x[:step])
        layers = [meter.operations(name).sum(0) for name in meter.layers()]
        operations.append(sum(layers).tolist())
    return operations


def test_the_temperature_is_fitted_on_validation_recordings(tmp_path, mislabelled):
    train(tmp_path, mislabelled, "--epochs", 2, "--precision", "fp32", *BY_STEP)
    temperature = checkpoint(tmp_path, "best")["history"][-1]["val_temperature"]
    frames = load(mislabelled, "train")
    temperatures, best = np.geomspace(0.01, 100, 600), []
    for indices in nmnist.split_validation(frames.labels, 0.2, seed=0):
        _, mem, labels = outputs(tmp_path, frames, indices)
        means = np.stack([mem[:step].mean(0) for step in range(1, 6)])
        best.append(min(temperatures, key=lambda t: cross_entropy(means / t, labels)))
    assert temperature == pytest.approx(best[1], rel=0.1)
    assert temperature != pytest.approx(best[0], rel=0.1)  # that of the training recordings


@pytest.mark.parametrize(
    ("time_steps", "flags"), [(2, []), (5, []), (15, []), (11, ["--first_saccade_only"])]
)
def test_accuracies_over_time_use_whole_saccades(
    tmp_path, made_data_dir, capsys, time_steps, flags
):
    """Saccades end after 100, 220 and 308 ms; no event of the next one is used."""
    train(tmp_path, made_data_dir, *STEP, "--time_steps", time_steps, "--epochs", 1, *flags)
    accuracies = read_log(tmp_path, "cnn_test_metrics.json")["accuracy_over_time"]
    ends, duration = ([100], 100) if flags else ([100, 220, 308], 308)
    expected = []
    for step in (end * time_steps // duration for end in ends):
        if step:
            ms = step * duration / time_steps
            expected.append(f"{accuracies[step - 1]:.2%} at {ms:.0f} ms")
    assert table(capsys.readouterr().out)["over time"] == "   ".join(expected)


@pytest.mark.parametrize("readout", ["rate", "latency"])
def test_the_readout_decides_everywhere(tmp_path, mislabelled, readout):
    flags = ["--readout", readout, "--no_augment", "--precision", "fp32", "--epochs", 2]
    train(tmp_path, mislabelled, *STEP, *flags)
    metrics = read_log(tmp_path, "cnn_test_metrics.json")
    best = read_log(tmp_path, "cnn_history.json")[metrics["epoch"] - 1]
    assert metrics["settings"]["readout"] == readout
    assert metrics["accuracy"] == metrics["accuracy_by_readout"][readout] == best["test_accuracy"]
    assert metrics["accuracy_over_time"][-1] == metrics["accuracy"]
    # Recomputed from the network's outputs, by hand.
    spk, mem, labels = outputs(tmp_path, load(mislabelled, "test", 2), torch.arange(30))
    correct, ties = 0, 0
    for b, label in enumerate(labels):
        fired = [np.flatnonzero(spk[:, b, n]) for n in range(10)]
        first = [steps[0] if len(steps) else 99 for steps in fired]
        score = spk[:, b].sum(0) if readout == "rate" else -np.array(first)
        leaders = np.flatnonzero(score == score.max())
        ties += len(leaders) > 1
        correct += leaders[mem[:, b, leaders].sum(0).argmax()] == label
    assert metrics["accuracy"] == pytest.approx(correct / 30)
    assert metrics["ties"][readout] == pytest.approx(ties / 30)
    assert ties > 0


def test_a_test_needs_the_test_part_alone_and_ignores_settings(copied, made_data_dir, capsys):
    """Whatever is typed, the result is that of the test after training, whose files it replaces."""
    model, folder = copied
    data_dir = folder / "data"
    shutil.copytree(made_data_dir / "NMNIST" / "Test", data_dir / "NMNIST" / "Test")
    before = read_log(folder, f"{model}_test_metrics.json")
    settings = {k: v for k, v in OTHER.items() if k not in ("batch_size", "alpha")}
    main(folder, data_dir, "--model", model, "--test_only", *typed(settings))
    output = capsys.readouterr().out
    for name, value in settings.items():
        assert re.search(f"ignored +--{name} {value}: .* was trained with ", output)
    assert output.count("ignored") == len(settings)
    after = read_log(folder, f"{model}_test_metrics.json")
    for metrics in (before, after):
        del metrics["checkpoint"], metrics["tested_on"]
    assert after == before
    assert not list((folder / "logs").glob("*.1.*"))


@pytest.fixture
def fast_bf16(monkeypatch):
    """A function that says whether this processor computes bfloat16; it does at first."""

    def set_features(fast):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": fast})
        warn_once.cache_clear()  # which tells once in a process

    set_features(True)
    return set_features


def test_a_network_is_tested_resumed_and_restored_as_it_was_trained(
    tmp_path, made_data_dir, fast_bf16, capsys
):
    flags = [*SHORT, "--time_steps", 2]
    main(tmp_path, made_data_dir, *flags, "--epochs", 1, "--precision", "fp32", *BY_STEP)
    assert not {"precision", "neuron_backend", "device"} & checkpoint(tmp_path)["settings"].keys()
    expected = read_log(tmp_path, "cnn_test_metrics.json")
    main(tmp_path, made_data_dir, "--test_only")
    assert read_log(tmp_path, "cnn_test_metrics.json") == expected
    assert not list((tmp_path / "logs").glob("*.1.*"))
    main(tmp_path, made_data_dir, *flags, "--epochs", 2, "--resume")
    entries = read_log(tmp_path, "cnn_history.json")
    assert [entry["precision"] for entry in entries] == ["fp32", "fp32"]
    assert [entry["neuron_backend"] for entry in entries] == ["step", "step"]
    network = restore_network(checkpoint(tmp_path))
    assert network.precision == "fp32"
    assert not any(layer.fused for layer in network.neuron_layers().values())
    assert "WARNING" not in capsys.readouterr().err


def test_what_was_trained_in_bf16_is_tested_in_fp32_where_that_is_faster(
    tmp_path, made_data_dir, fast_bf16, figures, capsys
):
    train(tmp_path, made_data_dir, *STEP, "--epochs", 1)
    before = read_log(tmp_path, "cnn_test_metrics.json")
    assert before["precision"] == "bf16"
    assert restore_network(checkpoint(tmp_path)).precision == "bf16"
    assert "WARNING" not in capsys.readouterr().err
    fast_bf16(False)
    folders = [f"--save_dir={tmp_path}/checkpoints", f"--data_dir={made_data_dir}"]
    for test in (
        lambda: main(tmp_path, made_data_dir, "--test_only", "--visualize"),
        lambda: visualize_activations.main(["--device=cpu", "--visualize_all", *folders]),
        lambda: restore_network(checkpoint(tmp_path)),
    ):
        test()
        told = "WARNING: the network runs otherwise than when trained: precision: fp32, was bf16"
        assert capsys.readouterr().err.splitlines()[0] == told
    assert read_log(tmp_path, "cnn_test_metrics.json")["precision"] == "fp32"
    assert read_log(tmp_path, "cnn_test_metrics.1.json") == before
    for name, figure in figures.items():
        title = figure.get_suptitle()
        in_training = name in ("training_results.png", "cnn_filters.png")
        assert ("SpikingCNN (precision: fp32, was bf16)" in title) != in_training
    train(tmp_path, made_data_dir, *STEP, "--epochs", 2, "--resume")
    told = "resumed with other options, which give other numbers: precision: fp32, was bf16\n"
    assert told in capsys.readouterr().err
    entries = read_log(tmp_path, "cnn_history.json")
    assert [entry["precision"] for entry in entries] == ["bf16", "fp32"]


def test_other_ways_to_run_are_told_and_their_results_kept(tmp_path, made_data_dir, capsys):
    train(tmp_path, made_data_dir, *STEP, "--epochs", 1, "--precision", "fp32")
    first, trained = contents(tmp_path / "logs"), read_log(tmp_path, "cnn_test_metrics.json")
    for n, flags in enumerate((["--precision", "bf16"], ["--neuron_backend", "fused"]), start=1):
        main(tmp_path, made_data_dir, "--test_only", *flags)
        metrics = read_log(tmp_path, "cnn_test_metrics.json")
        assert metrics[flags[0][2:]] == flags[1]
        assert metrics["loss"] == pytest.approx(trained["loss"], rel=0.05)
        output = capsys.readouterr().out
        how = f"{metrics['precision']}, neurons {metrics['neuron_backend']}"
        assert table(output)["run as"] == how
        assert "ignored" not in output
        for name in ("cnn_test_metrics{}.json", "cnn_predictions{}.csv"):
            kept = tmp_path / "logs" / name.format(f".{n}")
            assert (n > 1) or kept.read_bytes() == first[tmp_path / "logs" / name.format("")]
    assert len(list((tmp_path / "logs").glob("cnn_predictions.?.csv"))) == 2
    torch.set_num_threads(2)
    try:
        flags = ["--precision", "bf16", "--neuron_backend", "fused", "--time_steps", 2]
        train(tmp_path, made_data_dir, *flags, "--epochs", 2, "--resume")
    finally:
        torch.set_num_threads(1)
    told = "WARNING: resumed with other options, which give other numbers: precision: bf16, "
    told += "was fp32; neuron_backend: fused, was step; threads: 2, was 1\n"
    assert told in capsys.readouterr().err
    entries = read_log(tmp_path, "cnn_history.json")
    how = [[e[name] for name in ("precision", "neuron_backend", "threads")] for e in entries]
    assert how == [["fp32", "step", 1], ["bf16", "fused", 2]]


def test_a_test_on_other_data_says_so_and_keeps_the_metrics(tmp_path, made_data_dir, capsys):
    train(tmp_path, made_data_dir, *STEP, "--epochs", 1)
    before = contents(tmp_path / "logs")
    other = tmp_path / "data"
    shutil.copytree(made_data_dir / "NMNIST", other / "NMNIST")
    (other / "NMNIST" / nmnist.SIMULATOR_FILE).write_text(json.dumps({"images": "x"}))
    capsys.readouterr()
    main(tmp_path, other, *BY_STEP, "--test_only")
    assert "SimulatedNMNIST (x) (TRAINED on NMNIST)\n" in "".join(capsys.readouterr())
    metrics = read_log(tmp_path, "cnn_test_metrics.json")
    data_sets = [metrics[name]["data_set"] for name in ("tested_on", "trained_on")]
    assert data_sets == ["SimulatedNMNIST (x)", "NMNIST"]
    for name in ("cnn_test_metrics{}.json", "cnn_predictions{}.csv"):
        earlier = (tmp_path / "logs" / name.format(".1")).read_bytes()
        assert earlier == before[tmp_path / "logs" / name.format("")]
    main(tmp_path, other, *BY_STEP, "--test_only")
    assert not list((tmp_path / "logs").glob("*.2.*"))  # the same test again
    with pytest.raises(utils.UserError, match=r"--resume: .* other recordings: .*NMNIST"):
        train(tmp_path, other, *STEP, "--resume", "--epochs", 2)


def test_runs_that_share_log_dir_keep_the_results_of_each_other(tmp_path, made_data_dir):
    logs, names = tmp_path / "logs", ("cnn_test_metrics", "cnn_predictions", "cnn_history")
    for name, seed in (("a", 0), ("b", 5)):
        flags = [*STEP, "--log_dir", logs, "--epochs", 1, "--seed", seed]
        train(tmp_path / name, made_data_dir, *flags)
    of_b = {path.name: path.read_bytes() for path in logs.iterdir() if path.stem in names}
    assert len(of_b) == 3
    train(tmp_path / "a", made_data_dir, *STEP, "--log_dir", logs, "--test_only")
    assert read_log(tmp_path, "cnn_test_metrics.json")["settings"]["seed"] == 0
    train(tmp_path / "a", made_data_dir, *STEP, "--log_dir", logs, "--resume", "--epochs", 2)
    for name, content in of_b.items():
        stem, suffix = name.split(".")
        assert content in [path.read_bytes() for path in logs.glob(f"{stem}.?.{suffix}")]


def test_a_test_by_another_readout_keeps_the_metrics_of_the_first(tmp_path, made_data_dir):
    """The networks have the same weights, since the readout only predicts."""
    flags = [*STEP, "--log_dir", tmp_path / "logs"]
    for readout in ("membrane", "latency"):
        train(tmp_path / readout, made_data_dir, *flags, "--epochs", 1, "--readout", readout)
        before = (tmp_path / "logs" / "cnn_test_metrics.json").read_bytes()
    main(tmp_path / "membrane", made_data_dir, *flags, "--test_only")
    earlier = (tmp_path / "logs").glob("cnn_test_metrics.?.json")
    assert before in [path.read_bytes() for path in earlier]


def test_auto_takes_the_data_set_of_the_checkpoint(tmp_path, made_data_dir, monkeypatch, capsys):
    """The network was trained on simulated recordings; N-MNIST could be downloaded meanwhile."""
    root = tmp_path / "SimulatedNMNIST"
    shutil.copytree(made_data_dir / "NMNIST", root)
    simulator = {"version": nmnist.SIMULATOR_VERSION, "images": nmnist.BUILT_IN_IMAGES}
    (root / nmnist.SIMULATOR_FILE).write_text(json.dumps(simulator))
    train(tmp_path, tmp_path, *STEP, "--epochs", 1, "--dataset", "simulated")

    def connect(*_):
        raise AssertionError("the internet was asked")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    capsys.readouterr()
    main(tmp_path, tmp_path, *STEP, "--test_only")
    train(tmp_path, tmp_path, *STEP, "--resume", "--epochs", 2)
    output = capsys.readouterr()
    assert output.out.count("data set    SimulatedNMNIST, test") == 2
    assert "SIMULATED recordings instead" not in output.err


def test_several_seeds_end_with_a_table(tmp_path, made_data_dir, capsys):
    one, many = tmp_path / "one", tmp_path / "many"
    train(one, made_data_dir, *STEP, "--epochs", 1, "--seed", 7, 7)  # counts once
    train(many, made_data_dir, *STEP, "--epochs", 1, "--seed", 3, 7)
    output = capsys.readouterr().out
    for which in ("best", "last"):
        path = many / "checkpoints" / "seed_7" / f"cnn_{which}.pt"
        assert plain(torch.load(path, weights_only=True)) == plain(checkpoint(one, which))
    metrics = [read_log(many, f"seed_{seed}/cnn_test_metrics.json") for seed in (3, 7)]
    assert [m["settings"]["seed"] for m in metrics] == [3, 7]
    assert metrics[0]["loss"] != metrics[1]["loss"]
    rows = read_csv(many / "logs" / "cnn_seeds.csv")
    assert [int(row["seed"]) for row in rows] == [3, 7]
    for name, metric in (("accuracy", "accuracy"), ("test_loss", "loss"), ("epoch", "epoch")):
        assert [float(row[name]) for row in rows] == [m[metric] for m in metrics]
    assert {row["loss"] for row in rows} == {"ce"}
    for name in ("membrane", "rate", "latency"):
        values = [m["accuracy_by_readout"][name] for m in metrics]
        assert [float(row[f"accuracy_{name}"]) for row in rows] == values
        mean, deviation = 100 * statistics.mean(values), 100 * statistics.stdev(values)
        assert table(output)[name] == f"{mean:.2f} ± {deviation:.2f}%"
    assert output.count("data set    NMNIST, train") == 2  # once for a command
    assert "differ in more than their seed" not in output
    # Resumed with another seed: what is done is only tested again.
    before = contents(many / "checkpoints")
    train(many, made_data_dir, *STEP, "--epochs", 1, "--resume", "--seed", 3, 7, 9)
    after = contents(many / "checkpoints")
    assert {path: after[path] for path in before} == before
    assert len(after) == len(before) + 2
    assert len(read_csv(many / "logs" / "cnn_seeds.csv")) == 3
    assert read_csv(many / "logs" / "cnn_seeds.1.csv") == rows  # the earlier table


def test_a_run_that_is_refused_renames_no_file(tmp_path, made_data_dir):
    """One into the folders of another run, one whose seeds another run trains, one of bad flags."""
    flags = [*STEP, "--epochs", 1]
    train(tmp_path, made_data_dir, *flags)
    train(tmp_path, made_data_dir, *flags, "--seed", 3, 7)
    before = contents(tmp_path)
    for name, folder, seeds in (("save_dir", "checkpoints", [3, 7]), ("log_dir", "logs", [3])):
        held = utils.hold_folders("cnn", **{name: tmp_path / folder})
        message = f"--{name} .*: in use by another run of cnn"
        with held, pytest.raises(utils.UserError, match=message):
            train(tmp_path, made_data_dir, *flags, "--seed", *seeds)
    for seeds in ([3], [3, 7]):
        typo = ["--dataset", "nmnist", "--data_dir", tmp_path / "typo"]
        for wrong in (["--val_split", 0.001], typo):
            with pytest.raises(utils.UserError, match=r"--val_split|typo is not a folder"):
                train(tmp_path, made_data_dir, *flags, *wrong, "--seed", *seeds)
    assert contents(tmp_path) == before


# --- Figures --------------------------------------------------------------------------------------


def test_figures_show_the_history_and_the_metrics(copied, made_data_dir, figures):
    model, folder = copied
    flags = ["--model", model, "--test_only", "--visualize"]
    main(folder, made_data_dir, *flags)
    entries = read_log(folder, f"{model}_history.json")
    metrics = read_log(folder, f"{model}_test_metrics.json")
    loss, accuracy = figures["training_results.png"].axes
    labels = {"val": "validation", "test": "test"}
    labels["train"] = "training (augmented, weights before averaging)"
    for name, label in labels.items():
        for axis, quantity, scale in ((loss, "loss", 1), (accuracy, "accuracy", 100)):
            (line,) = [line for line in axis.lines if line.get_label() == label]
            expected = [scale * entry[f"{name}_{quantity}"] for entry in entries]
            np.testing.assert_allclose(line.get_ydata(), expected)
    name = type(restore_network(checkpoint(folder, "best", model))).__name__
    assert figures["training_results.png"].get_suptitle() == f"{name} on NMNIST"
    for axis in (loss, accuracy):
        (line,) = [line for line in axis.lines if "best checkpoint" in line.get_label()]
        assert line.get_label() == f"best checkpoint (epoch {metrics['epoch']})"
        assert line.get_xdata()[0] == metrics["epoch"]
    axis = figures[f"{model}_confusion_matrix.png"].axes[0]
    title = figures[f"{model}_confusion_matrix.png"].get_suptitle()
    assert f"{metrics['accuracy']:.2%} correct of 30 test recordings" in title
    texts = [int(text.get_text().split("\n")[0] or 0) for text in axis.texts]
    assert texts == np.array(metrics["confusion_matrix"]).ravel().tolist()
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("predicted digit", "true digit")
    axis = figures[f"{model}_accuracy_over_time.png"].axes[0]
    lines = [line.get_xydata() for line in axis.lines]
    exits = [(e["mean_steps"], 100 * e["accuracy"]) for e in metrics["early_exit"]]
    over_time = list(enumerate(np.multiply(100, metrics["accuracy_over_time"]), start=1))
    for expected in (over_time, exits):
        assert any(len(x) == len(expected) and np.allclose(x, expected) for x in lines)
    for ms in (100, 220):  # the ends of saccades; what is predicted at 61.6 ms is drawn at 1
        assert any(len(x) and np.allclose(x[:, 0], ms / 61.6) for x in lines)
    weight = checkpoint(folder, "best", model)["network"]["conv1.weight"]
    images = [axis.images[0] for axis in figures[f"{model}_filters.png"].axes[:2]]
    for polarity, image in enumerate(images):  # OFF, then ON
        drawn = np.stack(np.split(image.get_array().filled(np.nan), 16, axis=1))
        np.testing.assert_array_equal(drawn[:, :, :3], weight[:, polarity])
        assert np.isnan(drawn[:, :, 3]).all()  # a gap
    assert len({image.get_clim() for image in images}) == 1
    title = figures[f"{model}_filters.png"].get_suptitle()
    assert "the 16 filters of conv1, 3 x 3 pixels each" in title
    # Of a damaged history, what the checkpoint knows of it is drawn.
    (folder / "logs" / f"{model}_history.json").write_text("{")
    main(folder, made_data_dir, *flags)
    line = figures["training_results.png"].axes[0].lines[0]
    known = checkpoint(folder, "best", model)["history"]
    np.testing.assert_allclose(line.get_ydata(), [entry["train_loss"] for entry in known])


def test_samples_show_mistakes_first_in_the_first_saccade(tmp_path, mislabelled, figures):
    """From 31 to 62 of 308 ms: a pixel is white where no event fell in that time."""
    flags = [*BY_STEP, "--precision", "fp32", "--time_steps", 10, "--epochs", 2]
    train(tmp_path, mislabelled, *flags, "--visualize")
    rows = read_csv(tmp_path / "logs" / "cnn_predictions.csv")
    wrong = {n for n, row in enumerate(rows) if row["label"] != row["membrane"]}
    assert 0 < len(wrong) < 20
    test, shown = nmnist.NMNIST(mislabelled / "NMNIST" / "Test"), []
    to_frames = tonic.transforms.ToFrame(sensor_size=(34, 34, 2), n_time_bins=10)
    for axis in (axis for axis in figures["cnn_samples.png"].axes if axis.images):
        title = axis.get_title()
        shown.append(int(re.findall(r"\d+", title)[-1]))
        row = rows[shown[-1]]
        assert f"{row['label']} read as {row['membrane']}\n" in title
        assert (axis.title.get_color() == utils.ORANGE) == (shown[-1] in wrong)
        counts = to_frames(test[shown[-1]][0])[1].sum(0)
        np.testing.assert_array_equal(axis.images[0].get_array().sum(-1) < 3, counts > 0)
    title = figures["cnn_samples.png"].get_suptitle()
    assert f"{len(wrong)} in all; events of steps 2 to 2 of 10" in title
    assert len(shown) == len(set(shown)) == 20
    assert set(shown[: len(wrong)]) == wrong


# --- Networks, neurons and losses of one's own ----------------------------------------------------


class MyNet(SpikingNetwork):
    """Recurrent neurons, joined by a convolution, then some of which each has its own beta."""

    def __init__(self, config):
        super().__init__(config)
        self.conv1 = nn.Conv2d(2, 4, 5, stride=4, bias=False)
        recurrent = snn.RSynaptic(config.alpha, config.beta, conv2d_channels=4, kernel_size=3)
        self.lif1 = self.make_layer(recurrent)
        betas = torch.full([4, 8, 8], config.beta)
        self.lif2 = self.make_layer(snn.Leaky(betas, learn_beta=True))
        self.fc_out = nn.Linear(4 * 8 * 8, 10, bias=False)
        self.norm_out = nn.BatchNorm1d(10)
        self.lif3 = self.make_layer(self.make_lif([10]))

    def forward_layers(self, x, T):
        x, _ = self.lif1(self.conv1(x), T)
        x, _ = self.lif2(4 * x, T)
        return self.lif3(self.norm_out(self.fc_out(x.flatten(1))), T)


def margin(spk, mem, labels):
    """Return a loss that is none of the script's."""
    return torch.nn.functional.multi_margin_loss(mem.mean(0), labels)


class Adapts(snn.Leaky):
    """A neuron whose threshold rises while it is trained."""

    def forward(self, *inputs):
        self.threshold += 0.01 * self.training
        return super().forward(*inputs)


def test_what_training_changes_in_buffers_is_tested_and_resumed(
    tmp_path, made_data_dir, my_net, monkeypatch
):
    monkeypatch.setattr(MyNet, "make_lif", lambda self, shape: Adapts(0.5))
    flags = [*STEP, "--model", my_net, "--batch_size", 96, "--epochs"]
    train(tmp_path, made_data_dir, *flags, 1)
    train(tmp_path, made_data_dir, *flags, 3, "--resume")
    last = checkpoint(tmp_path, model=my_net)
    assert last["training"]["raw_network"]["lif3.neuron.threshold"].item() == pytest.approx(1.06)
    # Two steps an epoch; norms are measured in another pass of two steps.
    assert last["network"]["lif3.neuron.threshold"].item() == pytest.approx(1.08)


@pytest.fixture
def my_net(monkeypatch):
    """The name of a network of one's own, beside a loss of one's own."""
    monkeypatch.setitem(NETWORKS, "my_net", MyNet)
    monkeypatch.setitem(train_nmnist.LOSSES, "margin", margin)
    return "my_net"


def test_a_network_of_ones_own_is_trained_resumed_tested_and_drawn(
    tmp_path, made_data_dir, my_net, capsys
):
    flags = ["--model", my_net, "--loss", "margin", "--alpha", 0.4, "--epochs"]
    warn_once.cache_clear()
    train(tmp_path / "whole", made_data_dir, *flags, 2)
    warning = "no kernel supports the neurons of lif1 (RSynaptic), lif2 (Leaky)"
    train(tmp_path, made_data_dir, *flags, 1)
    train(tmp_path, made_data_dir, *flags, 2, "--resume")
    entries = read_log(tmp_path, "my_net_history.json")
    assert entries[1]["train_loss"] < entries[0]["train_loss"]
    for name in ("loss", "accuracy"):
        whole = read_log(tmp_path / "whole", "my_net_history.json")[1][f"train_{name}"]
        assert entries[1][f"train_{name}"] == whole
    assert {entry["neuron_backend"] for entry in entries} == {"fused+step"}
    main(tmp_path, made_data_dir, "--model", my_net, "--test_only", "--visualize")
    captured = capsys.readouterr()
    assert captured.err.count(warning) == 1  # once in a process
    assert "operations, MACs and energy leave out the connections of lif1\n" in captured.err
    assert (tmp_path / "logs" / "my_net_filters.png").exists()  # of its conv1
    metrics = read_log(tmp_path, "my_net_test_metrics.json")
    assert metrics["not_counted"] == ["lif1"]
    assert list(metrics["layers"]) == ["lif1", "lif2", "lif3"]
    folders = [f"--save_dir={tmp_path}/checkpoints", f"--output_dir={tmp_path}/activations"]
    folders += [f"--data_dir={made_data_dir}", "--device=cpu"]
    visualize_activations.main(["--model", my_net, "--visualize_all", *folders])
    drawn = {path.name for path in files_in(tmp_path / "activations")}
    expected = {f"spike_pattern_lif{n}.png" for n in (1, 2, 3)}
    expected |= {f"membrane_potential_lif{n}.png" for n in (1, 2, 3)}
    assert drawn == expected | {"tsne_features.png", "firing_rates.png"}


def test_connections_inside_neurons_decay_and_betas_do_not(tmp_path, made_data_dir, my_net):
    flags = ["--optimizer", "adamw", "--lr", 1e-3, "--weight_decay", 1000, "--epochs", 1]
    train(tmp_path, made_data_dir, "--model", my_net, *flags)
    network = checkpoint(tmp_path, model=my_net)["training"]["raw_network"]
    assert network["lif1.neuron.recurrent.weight"].abs().max() < 0.01
    betas = network["lif2.neuron.beta"]
    assert betas.shape == (4, 8, 8)
    torch.testing.assert_close(betas, torch.full_like(betas, 0.5), rtol=0, atol=0.01)


def test_what_a_script_does_not_know_is_told_in_one_line(
    tmp_path, made_data_dir, my_net, monkeypatch, capsys
):
    flags = ["--model", my_net, "--epochs", 1]
    with pytest.raises(
        utils.UserError,
        match=r"no checkpoint at \S*my_net_best.pt: train a network in \S*checkpoints, or",
    ):
        train(tmp_path, made_data_dir, "--model", my_net, "--test_only")
    train(tmp_path, made_data_dir, *flags, "--loss", "margin")
    monkeypatch.delitem(train_nmnist.LOSSES, "margin")
    with pytest.raises(utils.UserError, match="--loss margin: this script does not add it"):
        main(tmp_path, made_data_dir, "--model", my_net, "--test_only")
    with pytest.raises(utils.UserError, match=r"loss: ce, was margin.* --loss=margin"):
        train(tmp_path, made_data_dir, *flags, "--resume")
    train(tmp_path, made_data_dir, *flags)
    # The network is changed meanwhile, then by a neuron that cannot be stepped.
    changed = type("Changed", (MyNet,), {"make_lif": lambda *_: snn.Synaptic(0.5, 0.5)})
    other = type("Other", (MyNet,), {"make_lif": lambda *_: snn.LeakyParallel(10, 10)})
    messages = {changed: "the weights are not those of Changed", other: "LeakyParallel is not a"}
    for network, message in messages.items():
        monkeypatch.setitem(NETWORKS, "my_net", network)
        for action in (["--test_only"], ["--resume", "--epochs", 2]):
            with pytest.raises(utils.UserError, match=f"--model my_net: {message}"):
                train(tmp_path, made_data_dir, "--model", my_net, *action)
        folders = [f"--save_dir={tmp_path}/checkpoints", f"--data_dir={made_data_dir}"]
        with pytest.raises(utils.UserError, match=f"--model my_net: {message}"):
            visualize_activations.main(["--model", my_net, "--device=cpu", *folders])
    monkeypatch.delitem(NETWORKS, "my_net")
    with pytest.raises(SystemExit):
        main(tmp_path, made_data_dir, "--model", my_net)
    assert "--model: invalid choice: 'my_net'" in capsys.readouterr().err


# --- Several processes and GPUs -------------------------------------------------------------------


MACHINE = """
import os, sys, train_nmnist, utils
folder = f"{sys.argv.pop(1)}/machine_{os.environ['RANK']}"
sys.argv += [f"--save_dir={folder}/checkpoints", f"--log_dir={folder}/logs"]
utils.run_script(train_nmnist.main)
"""


def test_torchrun_trains_and_resumes_seeds_and_one_process_prints_and_writes(
    tmp_path, made_data_dir, device
):
    """gloo runs two processes on the CPU, nccl one on each GPU. They share no disk.

    One network goes on from where a single process stopped, another one is new.
    """
    processes = 2 if device.type == "cpu" else torch.cuda.device_count()
    folder = tmp_path / "machine_0"
    flags = [*STEP, "--device", device.type]
    of_seed = [f"--save_dir={folder}/checkpoints/seed_0", f"--log_dir={folder}/logs/seed_0"]
    train(folder, made_data_dir, *flags, *of_seed, "--seed", 0, "--epochs", 2)
    (tmp_path / "machine.py").write_text(MACHINE)
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    launcher += [tmp_path / "machine.py", tmp_path, "--data_dir", made_data_dir]
    flags += ["--seed", 0, 1, "--epochs", 3, "--resume"]
    result = run(sys.executable, *launcher, *SHORT, *flags, import_from=ROOT)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout.count(f"{processes} processes") == (1 if processes > 1 else 0)
    assert result.stdout.count("epoch   3/3") == 2
    assert result.stdout.count("seeds       2, mean") == 1
    for seed, alone in (("seed_0", 2), ("seed_1", 0)):
        entries = read_log(folder, f"{seed}/cnn_history.json")
        assert [entry["epoch"] for entry in entries] == [1, 2, 3]
        assert entries[-1]["train_loss"] < entries[0]["train_loss"]
        expected = [1] * alone + [processes] * (3 - alone)
        assert [entry["processes"] for entry in entries] == expected
    assert [row["seed"] for row in read_csv(folder / "logs" / "cnn_seeds.csv")] == ["0", "1"]
    names = ["cnn_best.pt", "cnn_last.pt"]
    names += ["cnn_history.json", "cnn_test_metrics.json", "cnn_predictions.csv"]
    written = [path for path in files_in(folder) if ".1." not in path.name]
    assert sorted(path.name for path in written) == sorted([*names * 2, "cnn_seeds.csv"])
    assert not (tmp_path / "machine_1").exists()


def test_processes_of_other_recordings_are_refused(tmp_path, made_data_dir, monkeypatch):
    """This happens on two machines if one is offline and simulates recordings."""
    monkeypatch.setattr(
        utils, "from_first_process", lambda f: {**f(), "train_fingerprint": "other"}
    )
    with pytest.raises(utils.UserError, match=r"torchrun: .*train_fingerprint: \w+, was other"):
        train(tmp_path, made_data_dir, *STEP, "--epochs", 1)
    assert not files_in(tmp_path)


@pytest.mark.parametrize("model", ["cnn", "resnet"])
def test_a_run_goes_on_on_another_device(tmp_path, made_data_dir, device, model):
    flags = ["--model", model, "--device", device.type]
    train(tmp_path, made_data_dir, "--epochs", 1, *flags)
    train(tmp_path, made_data_dir, "--epochs", 3, "--resume", *flags)
    entries = read_log(tmp_path, f"{model}_history.json")
    assert entries[-1]["train_loss"] < entries[0]["train_loss"]
    there = read_log(tmp_path, f"{model}_test_metrics.json")
    assert device.type in there["device"]
    # Without a GPU, the same.
    other = "cuda" if device.type == "cpu" and torch.cuda.is_available() else "cpu"
    flags = ["--model", model, "--device", other]
    train(tmp_path, made_data_dir, "--test_only", *flags)
    here = read_log(tmp_path, f"{model}_test_metrics.json")
    assert here["loss"] == pytest.approx(there["loss"], rel=0.05)
    assert here["accuracy"] == pytest.approx(there["accuracy"], abs=2 / 30)
    for entry, expected in zip(here["early_exit"], there["early_exit"], strict=True):
        assert entry["mean_steps"] == pytest.approx(expected["mean_steps"], abs=0.3)
    train(tmp_path, made_data_dir, "--epochs", 4, "--resume", *flags)
    assert len(read_log(tmp_path, f"{model}_history.json")) == 4


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("model", ["cnn", "resnet"])
def test_a_training_step_waits_for_nothing(made_data_dir, device, model, precision):
    """On CUDA, whatever waits is an error; on a CPU, reading a value back is."""
    network = build_model(NetworkConfig(model, dropout=0.2), precision=precision).to(device)
    optimizer = train_nmnist.make_optimizer(network, "adam", lr=0.005, weight_decay=0.0)
    frames, loss = load(made_data_dir, "train").to(device), train_nmnist.LOSSES["ce"]

    operators, readers = set(), set()

    def watched():
        """Yield batches, of which the first one compiles; watch what is done with the others."""
        order = torch.arange(96)
        batches = train_nmnist.training_batches(frames, order, 32, network.dtype, augment=True)
        yield next(batches)
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
            yield from batches
            torch.cuda.set_sync_debug_mode("default")
        for batch in batches:
            with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profile:
                yield batch
            for event in profile.events():
                operators.add(event.name)
                if event.name == "aten::item":  # reads a value
                    readers.add(event.cpu_parent and event.cpu_parent.name)

    ema, bar = copy.deepcopy(network), tqdm(disable=True)
    try:
        train_nmnist.train_one_epoch(
            network, network, ema, optimizer, loss, watched(), step=0, bar=bar
        )
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert ("aten::max_pool2d" in operators) == (device.type == "cpu")
    assert readers <= {"aten::_fused_adam_"}  # its number of steps, on a CPU alone


# --- What a new user is told ----------------------------------------------------------------------


@pytest.fixture
def one_epoch(tmp_path, made_data_dir, capsys, monkeypatch):
    """The folder of a network that was trained for an epoch; its output is in `capsys`."""
    (tmp_path / "own.py").touch()
    flags = flags_for(tmp_path, made_data_dir, *SHORT, *STEP, "--epochs", 1)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "own.py"), *flags])
    train_nmnist.main()
    return tmp_path


def test_the_end_of_training_names_the_command_that_draws(one_epoch, made_data_dir, capsys):
    """For one's own script, it names that, and no command that draws its layers."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next")]
    (command,) = [line.removeprefix("next ").split() for line in lines]
    assert command[:2] == ["python", str(one_epoch / "own.py")]
    train_nmnist.main(command[2:])
    assert "next" not in capsys.readouterr().out  # by a script: nothing was typed
    assert (one_epoch / "logs" / "cnn_samples.png").is_file()


def test_the_next_commands_are_as_typed_and_run_from_there(
    tmp_path, made_data_dir, monkeypatch, capsys
):
    """From another folder, with a space in a name."""
    (tmp_path / "my runs").mkdir()
    folders = "--save_dir 'a b' --log_dir=l --data_dir " + str(made_data_dir)
    typed = f"{folders} --device cpu --precision fp32 --time_steps 2 --neuron_backend step"
    here = {"cwd": tmp_path / "my runs"}
    script = os.path.relpath(ROOT / "train_nmnist.py", here["cwd"])
    command = [sys.executable, script, *shlex.split(typed), "--epochs=1", "--resume"]
    result = run(*command, **here)
    assert result.returncode == 0, result.stderr
    test, draw = re.findall("^next +python (.*)", result.stdout, re.MULTILINE)
    drawn = f"--save_dir 'a b' --data_dir {made_data_dir} --device cpu --precision fp32 "
    drawn += "--neuron_backend step --visualize_all"
    assert shlex.split(test) == [*command[1:-1], "--test_only", "--visualize"]
    expected = str(Path(script).with_name("visualize_activations.py"))
    words = [part for word in shlex.split(draw) for part in word.split("=")]
    assert words == [expected, *shlex.split(drawn)]
    monkeypatch.chdir(here["cwd"])  # in this process, which starts faster
    train_nmnist.main(shlex.split(test)[1:])
    visualize_activations.main(shlex.split(draw)[1:])
    assert "WARNING" not in capsys.readouterr().err
    names = {path.name for path in files_in(tmp_path)}
    assert {"cnn_samples.png", "tsne_features.png"} <= names
    assert not [name for name in names if ".1." in name]


@pytest.mark.parametrize(("bias", "what"), [(-100.0, "never fire"), (100.0, "fire at every step")])
def test_a_layer_that_never_or_always_fires_is_told(one_epoch, made_data_dir, capsys, bias, what):
    best = utils.load_checkpoint(one_epoch / "checkpoints" / "cnn_best.pt")
    best["network"]["norm3.bias"].fill_(bias)
    torch.save(best, one_epoch / "checkpoints" / "cnn_best.pt")
    capsys.readouterr()
    main(one_epoch, made_data_dir, *BY_STEP, "--test_only")
    warning = f"neurons of lif3 {what}: try --threshold, --beta, --lr or more --epochs"
    assert warning in capsys.readouterr().err


def test_a_table_of_networks_that_differ_in_more_than_their_seed_says_so(
    tmp_path, made_data_dir, capsys
):
    """It has a row for each, with the settings of its frames."""
    for seed, steps in ((0, 2), (1, 3)):
        folders = [f"--{name}_dir={tmp_path}/{name}/seed_{seed}" for name in ("save", "log")]
        flags = ["--epochs", 1, "--seed", seed, "--time_steps", steps]
        train(tmp_path, made_data_dir, *BY_STEP, *flags, *folders)
    folders = [f"--{name}_dir={tmp_path}/{name}" for name in ("save", "log")]
    main(tmp_path, made_data_dir, "--test_only", "--seed", 0, 1, *folders)
    captured = capsys.readouterr()
    assert "these networks differ in more than their seed: time_steps\n" in captured.err
    rows = read_csv(tmp_path / "log" / "cnn_seeds.csv")
    assert [(row["seed"], row["time_steps"]) for row in rows] == [("0", "2"), ("1", "3")]


def test_threads_that_wait_sleep_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_nmnist.py", "--wrong"])
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    for policy in ("active", "passive"):
        with plt.rc_context(), pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / "train_nmnist.py"), run_name="__main__")
        assert os.environ["OMP_WAIT_POLICY"] == policy
        monkeypatch.delenv("OMP_WAIT_POLICY")
