"""Training, resuming and testing, as a user runs them, on recordings made here and on real ones."""

import csv
import errno
import io
import json
import math
import os
import random
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import matplotlib.pyplot as plt
import numpy as np
import pytest
import tonic
import torch
from conftest import ROOT, SHARED, assert_refused, files_in, limit_files, needs_cuda, run
from torch import distributed
from tqdm import tqdm

import models
import nmnist
import train_nmnist
import utils
import visualize_activations
from models import NetworkConfig, build_model, load_network

SHORT = ["--time_steps", "5", "--batch_size", "32", "--val_split", "0.2", "--device", "cpu"]
STEP = ["--neuron_backend", "step", "--time_steps", 2]  # the fastest training, with nothing to compile
MEASURED = {"machine", "peak_memory_mb", "milliseconds_per_recording"}  # which differ from test to test
FIGURES = ["confusion_matrix", "accuracy_over_time", "samples"]


def folder_flags(folder, data_dir):
    """Return the flags that put all files of a run into `folder`."""
    return ["--data_dir", data_dir, "--save_dir", folder / "checkpoints", "--log_dir", folder / "logs"]


def train(folder, data_dir, *flags, expect=0):
    """Run train_nmnist.py as a user does, with its files in `folder`."""
    result = run(sys.executable, "train_nmnist.py", *folder_flags(folder, data_dir), *SHORT, *flags)
    assert expect is None or result.returncode == expect, result.stderr
    return result


def start(folder, data_dir, *flags, launcher=()):
    """Start train_nmnist.py as a user does, and return the process while it runs."""
    return start_command(*launcher, "train_nmnist.py", *folder_flags(folder, data_dir), *SHORT, *flags)


def start_command(*command):
    """Start Python with these arguments in the project's folder, and return the process while it runs."""
    command = [str(part) for part in (sys.executable, *command)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def finish(process, status=0, timeout=120):
    """Wait for a process that was started; return its stdout and stderr."""
    stdout, stderr = process.communicate(timeout=timeout)
    assert process.returncode == status, stderr
    return stdout, stderr


def train_here(folder, data_dir, *flags):
    """Do the same in this process, which starts faster."""
    train_nmnist.main([str(part) for part in (*folder_flags(folder, data_dir), *SHORT, *flags)])


def weights(folder, model="cnn", which="last"):
    """Return the weights that a checkpoint tests, of the last one those that training continues with."""
    return weights_in(folder / "checkpoints" / f"{model}_{which}.pt")


def weights_in(path):
    """Return the same of the checkpoint at `path`."""
    checkpoint = torch.load(path, weights_only=True)
    return checkpoint["state"]["network"] if "state" in checkpoint else checkpoint["network"]


def equal(first, second):
    """Say whether two networks have the same weights, bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def history(folder, model="cnn"):
    """Return a run's history without what differs from run to run: its timings."""
    entries = json.loads((folder / "logs" / f"{model}_history.json").read_text())
    return [{k: v for k, v in entry.items() if k not in ("seconds", "recordings_per_second")} for entry in entries]


@pytest.fixture(scope="module")
def trained_networks(tmp_path_factory, made_data_dir):
    """Both networks, trained and tested with figures at the same time: {model: (folder, stdout, stderr)}."""
    started = {}
    for model in ("cnn", "resnet"):
        folder = tmp_path_factory.mktemp(model)
        started[model] = folder, start(folder, made_data_dir, "--model", model, "--epochs", 8, "--visualize")
    return {model: (folder, *finish(process)) for model, (folder, process) in started.items()}


@pytest.fixture(params=["cnn", "resnet"])
def trained(request, trained_networks):
    """One of `trained_networks`: (model, folder, stdout)."""
    return request.param, *trained_networks[request.param][:2]


def test_training_learns_and_reports_every_epoch(trained, trained_networks):
    model, folder, stdout = trained
    entries = json.loads((folder / "logs" / f"{model}_history.json").read_text())
    names = "epoch train_loss train_accuracy val_loss val_accuracy test_loss test_accuracy val_temperature lr precision"
    assert list(entries[0]) == [*names.split(), "neuron_backend", "seconds", "recordings_per_second"]
    assert entries[0]["neuron_backend"] == "fused"
    assert [entry["epoch"] for entry in entries] == list(range(1, 9))
    assert entries[-1]["train_loss"] < entries[0]["train_loss"]
    assert max(entry["val_accuracy"] for entry in entries) > 0.8  # the made-up digits are easy
    lines = [line for line in stdout.splitlines() if line.startswith("epoch")]
    assert len(lines) == 8
    assert "recordings/s" in lines[0]
    assert f"test {entries[0]['test_loss']:.4f}" in lines[0]
    assert "epoch 1/8" in trained_networks[model][2]  # the progress bar


def test_metrics_agree_with_one_another(trained):
    model, folder, stdout = trained
    metrics = json.loads((folder / "logs" / f"{model}_test_metrics.json").read_text())
    confusion = np.array(metrics["confusion_matrix"])
    facts = [metrics[name] for name in ("dataset", "trained_on", "model", "num_recordings", "seed")]
    assert facts == ["NMNIST", "NMNIST", model, 30, 0]
    assert confusion.sum(1).tolist() == [3] * 10  # rows are true digits, and there are 3 of each
    assert metrics["accuracy"] == pytest.approx(np.trace(confusion) / 30)
    assert len(metrics["accuracy_over_time"]) == 5
    assert metrics["accuracy_over_time"][-1] == metrics["accuracy"]
    assert 0 < metrics["synaptic_operations"] < metrics["macs"]
    layers = metrics["layers"].values()
    assert all(0 < layer["firing_rate"] < 1 for layer in layers)
    for name in ("synaptic_operations", "macs"):
        assert metrics[name] == pytest.approx(sum(layer[name] for layer in layers))
    energy = metrics["energy_uj"]
    assert energy["spiking_events"] == pytest.approx(0.9e-6 * metrics["synaptic_operations"])
    assert energy["relu_one_frame"] == pytest.approx(4.6e-6 * metrics["macs"] / 5)
    (line,) = [line for line in stdout.splitlines() if line.startswith("energy at 45 nm")]
    for value in energy.values():
        assert f"{value:.3g} uJ" in line
    assert all(line.startswith(name) for name, line in zip(metrics["layers"], layer_table(stdout), strict=True))
    assert metrics["parameters"] == sum(p.numel() for p in build_model(NetworkConfig(model)).parameters())
    assert f"test accuracy        {metrics['accuracy']:.2%}\n" in stdout
    assert "data set             NMNIST, 30 test recordings\n" in stdout
    assert metrics["precision"] == utils.pick_precision("auto", torch.device("cpu"))
    assert f"precision, neurons   {metrics['precision']}, fused\n" in stdout
    assert metrics["checkpoint"] == str(folder / "checkpoints" / f"{model}_best.pt")


def layer_table(stdout):
    """Return the lines of the printed table of layers."""
    table = stdout[stdout.index("layer   ") :].splitlines()[1:]
    return table[: next(i for i, line in enumerate(table) if line.startswith("metrics"))]


def test_predictions_and_early_exits_equal_a_loop_by_hand(trained, made_data_dir, tmp_path):
    """With a higher temperature than the fitted one, with which all of these easy recordings exit at the first step."""
    model, trained_in, _ = trained
    folder = tmp_path
    checkpoint = torch.load(trained_in / "checkpoints" / f"{model}_best.pt", weights_only=True)
    utils.save_tensors(folder / "checkpoints" / f"{model}_best.pt", checkpoint | {"temperature": 0.65})
    train_here(folder, made_data_dir, "--model", model, "--test_only")
    metrics = json.loads((folder / "logs" / f"{model}_test_metrics.json").read_text())
    with open(folder / "logs" / f"{model}_predictions.csv") as file:
        rows = list(csv.DictReader(file))
    recordings = nmnist.NMNIST(made_data_dir, "test")
    assert [row["file"] for row in rows] == [str(Path(path).relative_to(recordings.root)) for path in recordings.data]
    assert [int(row["label"]) for row in rows] == list(recordings.targets)
    for name, accuracy in metrics["accuracy_by_readout"].items():
        assert statistics.mean(row[name] == row["label"] for row in rows) == pytest.approx(accuracy)
    network, temperature = best_network(folder, model)
    with torch.no_grad():
        mems = network(nmnist.load_frames(recordings, 5).batch(torch.arange(30), network.dtype)[0])[1].numpy()
    exits = {entry["threshold"]: entry for entry in metrics["early_exit"]}
    assert list(exits) == [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999]
    for threshold, entry in exits.items():
        steps, correct = [], []
        for n, row in enumerate(rows):
            for step in range(1, 6):
                odds = np.exp((mems[:step, n].mean(0) - mems[:step, n].mean(0).max()) / temperature)
                if 1 / odds.sum() > threshold:
                    break
            steps.append(step)
            correct.append(int(odds.argmax() == int(row["label"])))
            if threshold == 0.9:
                assert int(row["early_exit_step_0.9"]) == step
                final = np.exp((mems[:, n].mean(0) - mems[:, n].mean(0).max()) / temperature)
                assert float(row["confidence"]) == pytest.approx(1 / final.sum(), abs=1e-4)
        assert entry["accuracy"] == pytest.approx(statistics.mean(correct))
        assert entry["mean_steps"] == pytest.approx(statistics.mean(steps))
        assert entry["mean_ms"] == pytest.approx(statistics.mean(steps) * 308 / 5)
        energy, dense = entry["energy_uj"], metrics["layers"]["lif1"]["macs"] * statistics.mean(steps) / 5
        assert energy["spiking_events"] == pytest.approx(0.9e-6 * entry["synaptic_operations"])
        assert 0 < energy["spiking_dense_input"] - energy["spiking_events"] < 4.6e-6 * dense
        assert energy["relu_one_frame"] == pytest.approx(metrics["energy_uj"]["relu_one_frame"])
    used = [entry["synaptic_operations"] for entry in exits.values()]
    assert used == sorted(used)
    assert used[0] < used[-1] <= metrics["synaptic_operations"] * (1 + 1e-9)
    assert len({entry["mean_steps"] for entry in metrics["early_exit"]}) > 4


def best_network(folder, model):
    """Return the network of a run's best checkpoint, and its temperature."""
    checkpoint = utils.load_checkpoint(folder / "checkpoints" / f"{model}_best.pt", model)
    return load_network(checkpoint, torch.device("cpu")).eval(), checkpoint["temperature"]


def test_the_temperature_is_fitted_on_validation_recordings(tmp_path, made_data_dir, monkeypatch):
    """After a few epochs, when the classes are not separable yet and the temperature is no extreme."""
    fit, fitted_on = train_nmnist.fit_temperature, []
    monkeypatch.setattr(train_nmnist, "fit_temperature", lambda *args: (fitted_on.append(args[3]), fit(*args))[1])
    train_here(tmp_path, made_data_dir, "--epochs", 4, "--lr", 2e-3, "--no_augment")
    network, temperature = best_network(tmp_path, "cnn")
    frames = nmnist.load_frames(nmnist.NMNIST(made_data_dir, "train"), 5)
    x, labels = frames.batch(nmnist.split_validation(frames.labels, 0.2, 0)[1], network.dtype)
    assert len(labels) == 24
    assert all(torch.equal(fitted, labels) for fitted in fitted_on)
    with torch.no_grad():
        mem = network(x)[1].numpy().astype(float)
        means = np.stack([mem[:step].mean(0) for step in range(1, 6)])

    def cross_entropy(t):
        logits = means / t - (means / t).max(-1, keepdims=True)
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return -logs[:, np.arange(len(labels)), labels].mean()

    temperatures = np.geomspace(0.01, 100, 600)
    assert temperature == pytest.approx(min(temperatures, key=cross_entropy), rel=0.1)
    assert temperatures[0] * 2 < temperature < temperatures[-1] / 2


@pytest.mark.parametrize(
    ("time_steps", "ends", "printed"),
    [
        # Saccades end after 100, 220 and 308 ms: after 8.1 of 25 frames, of which 8 lie in the first.
        (25, [8, 17, 25], ["8.00%", "17.00%", "25.00%"]),
        (2, [None, 1, 2], ["-", "1.00%", "2.00%"]),  # the first of two frames goes on after the first saccade
    ],
)
def test_accuracy_after_a_saccade_uses_no_event_of_the_next(trained, capsys, time_steps, ends, printed):
    model, folder, _ = trained
    metrics = json.loads((folder / "logs" / f"{model}_test_metrics.json").read_text())
    metrics["accuracy_over_time"] = [step / 100 for step in range(1, time_steps + 1)]
    for step, end in zip(ends, nmnist.SACCADE_ENDS, strict=True):
        assert step is None or step * 308 / time_steps <= end
    args, _ = train_nmnist.parse_args(["--time_steps", str(time_steps)])
    train_nmnist.print_metrics(metrics, train_nmnist.saccade_ends(args))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("after each saccade"))
    assert line.split()[3:] == printed


def test_weight_decay_shrinks_connections_alone(tmp_path, made_data_dir):
    """By a decay that ends all connections; norms and beta, which start at other values than 0, stay."""
    flags = ["--epochs", 1, *STEP, "--learn_beta", "--optimizer", "adamw", "--lr", 1e-3]
    train_here(tmp_path / "decayed", made_data_dir, *flags, "--weight_decay", 1000)
    decayed = weights(tmp_path / "decayed")
    for name, value in decayed.items():
        if name.endswith(".weight") and value.dim() > 1:
            assert value.abs().max() < 0.01, name
        if name.startswith("norm") and name.endswith(".weight"):
            assert value.min() > 0.9, name
        if name.endswith(".beta"):
            assert value == pytest.approx(0.5, abs=0.01), name


def test_training_without_spikes_keeps_files_of_its_own(tmp_path, made_data_dir, capsys):
    train_here(tmp_path, made_data_dir, "--epochs", 1)
    train_here(tmp_path, made_data_dir, "--epochs", 2, "--no_spikes", "--visualize")
    output = capsys.readouterr().out
    assert "earlier" not in output
    train_here(tmp_path, made_data_dir, "--no_spikes", "--test_only")
    train_here(tmp_path, made_data_dir, "--no_spikes", "--resume", "--epochs", 3)
    names = {path.name for path in files_in(tmp_path)}
    assert {"cnn_best.pt", "cnn_relu_best.pt", "cnn_relu_last.pt", "cnn_relu_predictions.csv"} <= names
    assert {f"cnn_relu_{name}.png" for name in FIGURES} <= names
    assert len(history(tmp_path, "cnn_relu")) == 3
    metrics = json.loads((tmp_path / "logs" / "cnn_relu_test_metrics.json").read_text())
    assert metrics["neuron_backend"] == "ReLU"
    assert metrics["settings"]["no_spikes"]
    assert metrics["model"] == "cnn_relu"
    assert set(metrics["accuracy_by_readout"]) == {"membrane"}
    assert "synaptic_operations" not in metrics
    last = metrics["early_exit"][-1]
    assert last["macs"] == pytest.approx(metrics["macs"] * last["mean_steps"] / 5)
    assert max(entry["val_accuracy"] for entry in history(tmp_path, "cnn_relu")) > 0.5
    relu = tmp_path / "checkpoints" / "cnn_relu_last.pt"
    with pytest.raises(utils.UserError, match="holds a cnn_relu, not a cnn: choose --model cnn --no_spikes"):
        train_here(tmp_path, made_data_dir, "--resume", relu, "--epochs", 4)
    with pytest.raises(utils.UserError, match=r"`python train_nmnist\.py --model resnet --no_spikes`"):
        train_here(tmp_path, made_data_dir, "--test_only", "--model", "resnet", "--no_spikes")


def test_the_best_checkpoint_is_chosen_on_validation(trained):
    model, folder, _ = trained
    entries = history(folder, model)
    expected = max(entries, key=lambda entry: (entry["val_accuracy"], -entry["val_loss"]))["epoch"]
    best = torch.load(folder / "checkpoints" / f"{model}_best.pt", weights_only=True)
    assert best["epoch"] == expected
    metrics = json.loads((folder / "logs" / f"{model}_test_metrics.json").read_text())
    assert metrics["accuracy"] == entries[expected - 1]["test_accuracy"]


def test_testing_again_gives_the_same_metrics_and_ignores_contradicting_flags(trained, made_data_dir, capsys):
    """Settings of the network and of the frames are the checkpoint's."""
    model, folder, _ = trained
    path = folder / "logs" / f"{model}_test_metrics.json"
    before = json.loads(path.read_text())
    flags = [*folder_flags(folder, made_data_dir), "--model", model, "--test_only", "--beta", 0.9, "--time_steps", 9]
    train_nmnist.main([str(part) for part in flags])
    output = capsys.readouterr().out
    assert "--beta 0.9 is ignored" in output
    assert "--time_steps 9 is ignored" in output
    after = json.loads(path.read_text())
    assert after.keys() == before.keys()
    assert {k: v for k, v in after.items() if k not in MEASURED} == {
        k: v for k, v in before.items() if k not in MEASURED
    }


def test_figures_are_written(trained):
    model, folder, stdout = trained
    names = ["training_results", *(f"{model}_{name}" for name in FIGURES)]
    for name in [*names, *(["resnet_filters"] if model == "resnet" else [])]:
        path = folder / "logs" / f"{name}.png"
        assert f"figure      {path}" in stdout
        height, width, _ = plt.imread(path).shape
        assert width > 900
        assert height > 500


def test_samples_show_mistakes_first_then_every_digit(made_data_dir, figures):
    recordings = nmnist.NMNIST(made_data_dir, "test")
    frames = nmnist.load_frames(recordings, 5)
    predictions = torch.tensor(recordings.targets)
    predictions[[4, 17]] = 8  # a 1 and a 5, read as 8
    train_nmnist.draw_samples(frames, predictions, 5 * 100 / 308, "title", Path("samples.png"))
    figure = figures["samples.png"]
    titles = [axis.get_title() for axis in figure.axes if axis.images]
    assert len(titles) == 20
    assert titles[0] == "mistake: 1 read as 8\nrecording 4"
    assert titles[1] == "mistake: 5 read as 8\nrecording 17"
    assert titles[2] == "0 read as 0\nrecording 0"
    digits = [recordings.targets[int(title.split()[-1])] for title in titles[2:]]
    assert digits == [*range(10), *range(8)]
    assert "2 mistakes" in figure.get_suptitle()


def test_samples_show_the_middle_of_the_first_saccade(made_data_dir, figures):
    """37 to 62 of 308 ms: a pixel is white where no event fell in that time."""
    recordings = nmnist.NMNIST(made_data_dir, "test")
    frames = nmnist.load_frames(recordings, 100)
    train_nmnist.draw_samples(frames, torch.tensor(recordings.targets), 100 * 100 / 308, "title", Path("samples.png"))
    axes = [axis for axis in figures["samples.png"].axes if axis.images]
    assert len(axes) == 20
    for axis in axes:
        events, _ = recordings[int(axis.get_title().split()[-1])]
        counts = tonic.transforms.ToFrame(sensor_size=(34, 34, 2), n_time_bins=100)(events)[12:20].sum((0, 1))
        np.testing.assert_array_equal(axis.images[0].get_array().sum(-1) < 3, counts > 0)


def test_filters_are_the_first_layers_weights(figures):
    weight = build_model(NetworkConfig("resnet")).conv1.weight.detach()
    utils.plot_filters(weight, "title", Path("filters.png"))
    off, on = (axis.images[0].get_array() for axis in figures["filters.png"].axes[:2])
    for grid, polarity in ((off, 0), (on, 1)):
        # Four a row, with a line of a pixel between and around them.
        np.testing.assert_array_equal(grid[1:4, 1:4], weight[0, polarity])
        np.testing.assert_array_equal(grid[5:8, 9:12], weight[6, polarity])


def test_the_same_command_twice_gives_the_same_numbers(tmp_path, made_data_dir):
    for process in [start(tmp_path / name, made_data_dir, "--epochs", 2) for name in "ab"]:
        finish(process)
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert history(tmp_path / "a") == history(tmp_path / "b")


@pytest.mark.parametrize("flags", [[], ["--scheduler", "--optimizer", "sgd", "--model", "resnet"]])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, made_data_dir, monkeypatch, flags):
    model = "resnet" if flags else "cnn"
    train_here(tmp_path / "uninterrupted", made_data_dir, "--epochs", 4, *flags)

    class Stop(Exception):
        pass

    def stop(args, state, history, best, data, save=train_nmnist.save):
        if len(history) == 3:  # the second epoch is the last on disk
            raise Stop
        return save(args, state, history, best, data)

    with monkeypatch.context() as patch:
        patch.setattr(train_nmnist, "save", stop)
        with pytest.raises(Stop):
            train_here(tmp_path / "stopped", made_data_dir, "--epochs", 4, *flags)
    assert len(history(tmp_path / "stopped", model)) == 2
    # The settings come from the checkpoint: only the model is named.
    train_here(tmp_path / "stopped", made_data_dir, "--resume", "--model", model)
    for which in ("last", "best"):
        assert equal(weights(tmp_path / "uninterrupted", model, which), weights(tmp_path / "stopped", model, which))
    assert history(tmp_path / "uninterrupted", model) == history(tmp_path / "stopped", model)


@pytest.mark.parametrize("epochs", [1, 4, 15])
def test_the_scheduler_equals_torchs_cosine_annealing(epochs):
    args, _ = train_nmnist.parse_args(["--scheduler", "--epochs", str(epochs), "--lr", "0.3"])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    for epoch in range(1, epochs + 1):
        assert train_nmnist.learning_rate(args, epoch) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    for flags, constant in (([], 5e-3), (["--optimizer", "sgd"], 0.1), (["--lr", "0.3"], 0.3)):
        args, _ = train_nmnist.parse_args(["--epochs", str(epochs), *flags])
        assert {train_nmnist.learning_rate(args, epoch) for epoch in range(1, epochs + 1)} == {constant}


def test_every_epoch_trains_at_its_learning_rate(tmp_path, made_data_dir, monkeypatch):
    used = []

    def train_one_epoch(state, batches, bar, train_one_epoch=train_nmnist.train_one_epoch):
        used.append(state.optimizer.param_groups[0]["lr"])
        return train_one_epoch(state, batches, bar)

    monkeypatch.setattr(train_nmnist, "train_one_epoch", train_one_epoch)
    train_here(tmp_path, made_data_dir, "--epochs", 2, "--scheduler", "--lr", 0.01)
    assert used == pytest.approx([0.01, 0.005])
    assert [entry["lr"] for entry in history(tmp_path)] == used


def test_a_resumed_run_refuses_other_settings(tmp_path, made_data_dir):
    train_here(tmp_path, made_data_dir, "--epochs", 1)
    with pytest.raises(utils.UserError, match=r"cnn_best\.pt: it holds the network alone; resume .*cnn_last\.pt"):
        train_here(tmp_path, made_data_dir, "--resume", tmp_path / "checkpoints" / "cnn_best.pt")
    train_here(tmp_path, made_data_dir, "--resume", "--epochs", 2)  # growing is allowed
    assert len(history(tmp_path)) == 2
    with pytest.raises(utils.UserError, match=r"--epochs 1: .*cnn_last\.pt has 2 epochs already"):
        train_here(tmp_path, made_data_dir, "--resume", "--epochs", 1)
    for flag, value in (("--lr", 0.1), ("--beta", 0.9)):
        with pytest.raises(utils.UserError, match=f"{flag} {value}: .*cnn_last.pt was trained with"):
            train_here(tmp_path, made_data_dir, "--resume", flag, value)
    other = tmp_path / "other.pt"
    shutil.copy(tmp_path / "checkpoints" / "cnn_last.pt", other)
    with pytest.raises(utils.UserError, match=r"other\.pt holds a cnn, not a resnet"):
        train_here(tmp_path, made_data_dir, "--resume", other, "--model", "resnet")


def test_only_training_recordings_are_augmented(tmp_path, made_data_dir, monkeypatch):
    calls = []

    def augment(frame, *rest, augment_events=nmnist.augment_events):
        calls.append(len(frame))
        return augment_events(frame, *rest)

    def evaluate(*args, evaluate=train_nmnist.evaluate):
        before = len(calls)
        result = evaluate(*args)
        assert len(calls) == before
        return result

    monkeypatch.setattr(nmnist, "augment_events", augment)
    monkeypatch.setattr(train_nmnist, "evaluate", evaluate)
    train_here(tmp_path / "augmented", made_data_dir, "--epochs", 1)
    assert len(calls) == 3  # 96 training recordings in batches of 32
    train_here(tmp_path / "plain", made_data_dir, "--epochs", 1, "--no_augment")
    assert len(calls) == 3
    assert not equal(weights(tmp_path / "augmented"), weights(tmp_path / "plain"))


def test_the_moving_average_equals_a_hand_computation():
    """The first weights count wholly, the next nine tenths, nine elevenths, ... and at last a hundredth."""
    network, averaged = (build_model(NetworkConfig()) for _ in range(2))
    weight, mean = 0.0, 0.0
    for step in (*range(30), *range(880, 910)):  # the share falls to a hundredth at step 891
        network.norm_out.weight.data.fill_(np.sin(step / 10))
        network.norm_out.running_mean.fill_(np.cos(step / 10))
        network.norm_out.num_batches_tracked.fill_(step + 7)
        train_nmnist.update_ema(averaged, network, step)
        share = max(0.01, 9 / (9 + step))
        weight = (1 - share) * weight + share * np.sin(step / 10)
        mean = (1 - share) * mean + share * np.cos(step / 10)
        assert averaged.norm_out.num_batches_tracked == step + 7
    torch.testing.assert_close(averaged.norm_out.weight.data, torch.full((10,), weight), atol=1e-5, rtol=0)
    torch.testing.assert_close(averaged.norm_out.running_mean, torch.full((10,), mean), atol=1e-5, rtol=0)


def test_the_best_checkpoint_holds_the_moving_average(tmp_path, made_data_dir):
    train_here(tmp_path, made_data_dir, "--epochs", 1)
    last = torch.load(tmp_path / "checkpoints" / "cnn_last.pt", weights_only=True)
    assert last["state"]["steps"] == 3
    assert equal(weights(tmp_path, which="best"), last["state"]["ema"])
    assert equal(last["network"], last["state"]["ema"])
    assert not equal(last["state"]["network"], last["state"]["ema"])


def test_backends_train_alike(tmp_path, made_data_dir):
    for backend in ("fused", "step"):
        train_here(tmp_path / backend, made_data_dir, "--epochs", 2, "--precision", "fp32", "--neuron_backend", backend)
    fused, step = history(tmp_path / "fused"), history(tmp_path / "step")
    assert [entry["neuron_backend"] for entry in fused + step] == ["fused"] * 2 + ["step"] * 2
    for a, b in zip(fused, step, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=0.03)
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=0.05)


def test_resuming_into_other_folders_copies_checkpoints_and_history(tmp_path, made_data_dir):
    train_here(tmp_path / "here", made_data_dir, "--epochs", 2)
    train_here(tmp_path / "there", made_data_dir, "--resume", tmp_path / "here" / "checkpoints" / "cnn_last.pt")
    assert equal(weights(tmp_path / "here", which="best"), weights(tmp_path / "there", which="best"))
    assert history(tmp_path / "here") == history(tmp_path / "there")
    assert equal(weights(tmp_path / "here"), weights(tmp_path / "there"))  # so that it can be resumed there


# ---------------------------------------------------------------------------------------------------------
# Faults
# ---------------------------------------------------------------------------------------------------------


def wait_for(path, seconds=120):
    """Wait until a file exists."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.02)


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_and_resumed_equals_an_uninterrupted_one(tmp_path, made_data_dir, kills):
    """Binning, each epoch and every save are among the moments. Two runs at a time, each with a cache of its own."""
    flags = ["--epochs", 12, *STEP, "--resume"]
    uninterrupted = tmp_path / "uninterrupted"
    begin = time.monotonic()
    train(uninterrupted, made_data_dir, *flags)
    seconds = time.monotonic() - begin
    rng = random.Random(0)
    for i in range(kills // 2):
        folders = [tmp_path / f"killed{2 * i + j}" for j in (0, 1)]
        for folder in folders:
            shutil.copytree(made_data_dir / "NMNIST", folder / "NMNIST")
        running = [start(folder, folder, *flags) for folder in folders]
        moments = sorted(rng.uniform(0.3, 1.2) * seconds for _ in running)
        begin = time.monotonic()
        for process, moment in zip(running, moments, strict=True):
            time.sleep(max(0, begin + moment - time.monotonic()))
            process.kill()
            process.communicate()
        for process in [start(folder, folder, *flags) for folder in folders]:
            finish(process)
        for folder in folders:
            for which in ("last", "best"):
                assert equal(weights(uninterrupted, which=which), weights(folder, which=which))
            assert history(uninterrupted) == history(folder)
            assert not [path for path in files_in(folder) if ".tmp" in path.name]
            shutil.rmtree(folder)


def test_an_interrupted_run_prints_the_command_that_continues_it(tmp_path, made_data_dir):
    stops = {signal.SIGINT: 130, signal.SIGTERM: 143}
    running = [start(tmp_path / str(status), made_data_dir, "--epochs", 10_000, *STEP) for status in stops.values()]
    for process, (number, status) in zip(running, stops.items(), strict=True):
        folder = tmp_path / str(status)
        last = folder / "checkpoints" / "cnn_last.pt"
        wait_for(last)
        process.send_signal(number)
        _, stderr = finish(process, status, timeout=20)
        assert "Traceback" not in stderr
        saved = torch.load(last, weights_only=True)["epoch"]
        message = stderr.strip().splitlines()[-1]
        command = "python train_nmnist.py --model cnn --resume --epochs 10000"
        assert f"{last} holds epoch {saved}; continue with: {command}" in message
        assert not [path for path in files_in(folder) if ".tmp" in path.name]


SIGNAL_AFTER_SAVE = """
import signal, sys, utils, train_nmnist
save_tensors = utils.save_tensors
def save(path, content):
    save_tensors(path, content)
    if path.name == "cnn_last.pt" and content["epoch"] == 2:
        signal.raise_signal(signal.SIGTERM)
utils.save_tensors = save
utils.run_script(train_nmnist.main)
"""


def test_an_interrupt_right_after_a_save_counts_the_saved_epoch(tmp_path, made_data_dir):
    flags = [*folder_flags(tmp_path, made_data_dir), *SHORT, *STEP, "--epochs", 10]
    _, stderr = finish(start_command("-c", SIGNAL_AFTER_SAVE, *flags), 143)
    assert f"{tmp_path / 'checkpoints' / 'cnn_last.pt'} holds epoch 2; continue with: python" in stderr


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what a process has imported on Linux alone")
@pytest.mark.parametrize(
    ("script", "library", "seconds"),
    [
        *(("train_nmnist.py", "numpy", 0), ("train_nmnist.py", "libtorch_cpu", 0), ("train_nmnist.py", "numpy", 0.5)),
        *(("nmnist.py", "numpy", 0), ("visualize_nmnist.py", "numpy", 0), ("visualize_activations.py", "numpy", 0)),
    ],
)
def test_ctrl_c_during_imports_ends_in_one_line(tmp_path, script, library, seconds):
    """A moment after the first of the script's imports, NumPy, and after PyTorch has begun to load."""
    process = start_command(script, "--data_dir", tmp_path)
    maps, end = Path(f"/proc/{process.pid}/maps"), time.monotonic() + 60
    while library not in maps.read_text():
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert stderr.strip() == f"{script}: interrupted"
    assert not stdout


def test_importing_utils_outside_the_scripts_keeps_pythons_ctrl_c():
    assert signal.getsignal(signal.SIGINT) is not utils.end_at_once


def test_a_full_disk_keeps_the_checkpoint_of_the_epoch_before(tmp_path, made_data_dir):
    train_here(tmp_path, made_data_dir, "--epochs", 1, *STEP)
    before = {path: path.read_bytes() for path in files_in(tmp_path) if path.name != "cnn_best.pt"}
    command = [sys.executable, "train_nmnist.py", *folder_flags(tmp_path, made_data_dir), "--resume", "--epochs", 2]
    result = run(*command, preexec_fn=limit_files(1_000_000))  # enough for the best, not for the last
    assert_refused(result, str(tmp_path / "checkpoints" / "cnn_last.pt"), "can't be written")
    assert (tmp_path / "checkpoints" / "cnn_last.pt").read_bytes() == before[tmp_path / "checkpoints" / "cnn_last.pt"]
    assert files_in(tmp_path) == {*before, tmp_path / "checkpoints" / "cnn_best.pt"}
    # Figures: the metrics, which are small, are written; the first figure is not.
    command = [sys.executable, "train_nmnist.py", *folder_flags(tmp_path, made_data_dir), "--test_only", "--visualize"]
    result = run(*command, preexec_fn=limit_files(10_000))
    assert_refused(result, str(tmp_path / "logs" / "training_results.png"), "can't be written: File too large")
    assert files_in(tmp_path) == {*before, tmp_path / "checkpoints" / "cnn_best.pt"}


def test_a_diverging_run_stops_and_keeps_its_checkpoint(tmp_path, made_data_dir, monkeypatch):
    with pytest.raises(utils.UserError, match=r"not finite in epoch 1, within .* of 96 .*: choose a smaller --lr; no"):
        train_here(tmp_path, made_data_dir, "--epochs", 3, "--optimizer", "sgd", "--lr", 1e38)
    assert not files_in(tmp_path)
    monkeypatch.setattr(train_nmnist, "learning_rate", lambda _args, epoch: 1e38 if epoch == 3 else 0.01)
    last = tmp_path / "checkpoints" / "cnn_last.pt"
    with pytest.raises(utils.UserError, match=rf"not finite in epoch 3, .*; {last} holds epoch 2"):
        train_here(tmp_path, made_data_dir, "--epochs", 5, "--optimizer", "sgd")
    assert torch.load(last, weights_only=True)["epoch"] == 2
    assert all(torch.isfinite(values).all() for values in weights(tmp_path).values())


@pytest.fixture
def impatient(monkeypatch):
    """Make `utils.locked` not wait for a process that may be on its way out."""

    def acquire(lock, timeout=-1, acquire=filelock.FileLock.acquire):
        return acquire(lock, min(timeout, 0))

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)


def test_two_runs_of_a_model_into_the_same_folder_are_refused(tmp_path, made_data_dir, impatient):
    for flag, folder in (("--save_dir", tmp_path / "checkpoints"), ("--log_dir", tmp_path / "logs")):
        message = f"{flag} {folder}: another run of cnn writes there"
        with utils.locked(folder, "cnn"), pytest.raises(utils.UserError, match=message):
            train_here(tmp_path, made_data_dir, "--epochs", 1)
    assert not files_in(tmp_path)
    with utils.locked(tmp_path / "checkpoints", "resnet"), utils.locked(tmp_path / "logs", "resnet"):
        train_here(tmp_path, made_data_dir, "--epochs", 1)  # another model may


def test_one_folder_for_checkpoints_and_logs_is_locked_once(tmp_path, impatient):
    (tmp_path / "link").symlink_to(tmp_path)
    for log_dir in (tmp_path, tmp_path / "link"):
        flags = ["--save_dir", str(tmp_path), "--log_dir", str(log_dir)]
        args = train_nmnist.make_parser().parse_args(flags)
        with (
            train_nmnist.locked_folders(args),
            pytest.raises(utils.UserError, match=f"--save_dir {tmp_path}: another run of cnn writes there"),
            train_nmnist.locked_folders(args),
        ):
            pass
        with train_nmnist.locked_folders(args):
            pass


def test_tests_into_the_same_folder_wait_for_one_another(tmp_path, made_data_dir, impatient, capsys):
    train_here(tmp_path, made_data_dir, "--epochs", 1)
    logs = tmp_path / "logs"
    metrics = logs / "cnn_test_metrics.json"
    before = json.loads(metrics.read_text())
    metrics.unlink()
    (logs / "cnn_predictions.csv").unlink()
    with ThreadPoolExecutor(2) as pool:
        with utils.locked(logs, "test"):
            flags = [tmp_path, made_data_dir, "--test_only", "--visualize"]
            tests, stderr, end = [pool.submit(train_here, *flags) for _ in range(2)], "", time.monotonic() + 60
            while stderr.count(f"waiting     for another process that writes to {logs}\n") < 2:
                assert time.monotonic() < end, stderr
                assert not any(test.done() for test in tests), stderr
                time.sleep(0.02)
                stderr += capsys.readouterr().err
            assert {path.name for path in files_in(logs)} == {"cnn_history.json"}
        for test in tests:
            test.result()
    after = json.loads(metrics.read_text())
    assert {k: v for k, v in after.items() if k not in MEASURED} == {
        k: v for k, v in before.items() if k not in MEASURED
    }
    names = ["training_results.png", *(f"cnn_{name}.png" for name in FIGURES), metrics.name, "cnn_history.json"]
    assert {path.name for path in files_in(logs)} == {*names, "cnn_predictions.csv"}


@pytest.mark.parametrize("flag", ["--save_dir", "--log_dir"])
def test_folders_that_cannot_be_written_to_are_refused_before_training(tmp_path, made_data_dir, monkeypatch, flag):
    monkeypatch.setattr(train_nmnist, "train", None)
    (tmp_path / "file").touch()
    with pytest.raises(utils.UserError, match=f"{flag} {tmp_path / 'file' / 'folder'}: .*file is not a folder"):
        train_here(tmp_path, made_data_dir, flag, tmp_path / "file" / "folder")
    assert files_in(tmp_path) == {tmp_path / "file"}


# ---------------------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """Make this process the only one of a group, as `torchrun --nproc_per_node=1` does, for each call of `train`."""

    def join(_device):
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)

    monkeypatch.setattr(utils, "init_distributed", join)
    yield
    utils.destroy_distributed()


def test_two_processes_train_like_one(tmp_path, made_data_dir, alone):
    """The last batch holds a single recording: one of the two has none of it. A small rate: rounding stays rounding."""
    flags = ["--batch_size", 19, "--lr", 1e-4, "--precision", "fp32"]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2"]
    both = start(tmp_path / "two", made_data_dir, *flags, "--epochs", 1, launcher=torchrun)
    train_here(tmp_path / "one", made_data_dir, *flags, "--epochs", 2)
    stdout, _ = finish(both)
    assert stdout.count("data set    NMNIST") == 1  # only the first prints
    assert "2 processes" in stdout
    stdout, _ = finish(start(tmp_path / "two", made_data_dir, "--test_only", launcher=torchrun))
    assert stdout.count("test accuracy") == 1
    # One process resumes what two began.
    train_here(tmp_path / "two", made_data_dir, *flags, "--resume", "--epochs", 2)
    for one, two in zip(history(tmp_path / "one"), history(tmp_path / "two"), strict=True):
        for name in ("train_loss", "val_loss", "test_loss"):
            assert one[name] == pytest.approx(two[name], rel=1e-5), name
        for name in ("train_accuracy", "val_accuracy", "test_accuracy"):
            assert one[name] == two[name]


def test_two_processes_train_several_seeds(tmp_path, made_data_dir):
    """Each time they meet again, also if the test between, which one of them makes, takes a while."""
    code = "import utils, time, train_nmnist; test = train_nmnist.test; "
    code += "train_nmnist.test = lambda *args: (time.sleep(1), test(*args))[1]; utils.run_script(train_nmnist.main)"
    (tmp_path / "slow_test.py").write_text(code)
    flags = [*folder_flags(tmp_path, made_data_dir), *SHORT, *STEP, "--epochs", 1, "--seed", 3, 7]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2"]
    result = run(sys.executable, *torchrun, tmp_path / "slow_test.py", *flags, import_from=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("2 processes") == 2
    assert "of 2 seeds" in result.stdout
    with open(tmp_path / "logs" / "cnn_seeds.csv") as file:
        assert [row["seed"] for row in csv.DictReader(file)] == ["3", "7"]


def test_an_error_in_the_exit_of_a_process_leaves_the_first_ones_test_alone(monkeypatch):
    """torch's threads may abort a process while Python ends; torchrun then stops all others."""
    code = "import atexit, os, utils; atexit.register(os.abort); utils.run_script(lambda: None)"
    assert run(sys.executable, "-c", code).returncode == -signal.SIGABRT
    monkeypatch.setenv("RANK", "1")
    assert run(sys.executable, "-c", code).returncode == 0


def test_under_torchrun_the_printed_command_starts_as_many_processes(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    args, _ = train_nmnist.parse_args(["--save_dir", "runs", "--no_spikes"])
    command = train_nmnist.resume_command(args, "--resume")
    expected = "torchrun --nproc_per_node=2 train_nmnist.py --model cnn --resume --save_dir=runs --no_spikes"
    assert command == expected
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")  # of three machines
    launcher = ["torchrun", "--nnodes=3", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=HOST:29500"]
    assert train_nmnist.launcher() == [*launcher, "train_nmnist.py"]  # as in the README


@pytest.mark.parametrize("loss", list(train_nmnist.LOSSES))
def test_a_process_without_recordings_takes_part_in_a_test(made_data_dir, monkeypatch, loss):
    """Of more processes than recordings, some have none."""
    frames = nmnist.load_frames(nmnist.NMNIST(made_data_dir, "test"), 5)
    network, indices = build_model(NetworkConfig()), torch.arange(30)
    bar = tqdm(disable=True)
    whole = train_nmnist.evaluate(network, frames, indices, train_nmnist.make_loss(loss), 32, bar)
    parts = []
    for part in (slice(0, 30), slice(30, 30)):
        monkeypatch.setattr(utils, "shard", lambda _, part=part: part)
        monkeypatch.setattr(utils, "all_gather", lambda own: parts.append(own) or list(parts))
        both = train_nmnist.evaluate(network, frames, indices, train_nmnist.make_loss(loss), 32, bar)
    assert both["loss"] == pytest.approx(whole["loss"])
    assert torch.equal(both["predictions"], whole["predictions"])


def test_processes_that_differ_are_refused(tmp_path, made_data_dir, monkeypatch):
    monkeypatch.setattr(utils, "all_gather", lambda own: [own, {**own, "training part": "7 recordings"}])
    words = r"processes differ in training part: 120 recordings \(\w+\), and 7 recordings in process 1"
    with pytest.raises(utils.UserError, match=words):
        train_here(tmp_path, made_data_dir, "--epochs", 1)
    monkeypatch.setattr(utils, "world_size", lambda: 64)
    with pytest.raises(utils.UserError, match="--batch_size 32: fewer than the 64 processes"):
        train_here(tmp_path, made_data_dir, "--epochs", 1)
    assert not files_in(tmp_path)


def test_when_one_process_dies_all_end(tmp_path, made_data_dir):
    flags = ["--epochs", 10_000, *STEP]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2"]
    both = start(tmp_path, made_data_dir, *flags, launcher=torchrun)
    wait_for(tmp_path / "checkpoints" / "cnn_last.pt")
    listed = Path(f"/proc/{both.pid}/task/{both.pid}/children").read_text()
    children = [int(pid) for pid in listed.split()]
    assert len(children) == 2
    os.kill(children[1], signal.SIGKILL)
    both.communicate(timeout=30)
    assert both.returncode != 0
    assert not any(os.path.exists(f"/proc/{pid}") for pid in children)


# ---------------------------------------------------------------------------------------------------------
# Figures, flags and devices
# ---------------------------------------------------------------------------------------------------------


def test_figures_show_the_history_and_the_metrics(trained, figures):
    model, folder, _ = trained
    entries = json.loads((folder / "logs" / f"{model}_history.json").read_text())
    metrics = json.loads((folder / "logs" / f"{model}_test_metrics.json").read_text())
    utils.plot_history(entries, "title", Path("history.png"))
    loss, accuracy = figures["history.png"].axes
    for name, label in (("train", "training"), ("val", "validation"), ("test", "test")):
        for axis, quantity, scale in ((loss, "loss", 1), (accuracy, "accuracy", 100)):
            (line,) = [line for line in axis.lines if line.get_label() == label]
            np.testing.assert_allclose(line.get_ydata(), [scale * e[f"{name}_{quantity}"] for e in entries])
    utils.plot_confusion_matrix(np.array(metrics["confusion_matrix"]), "title", Path("confusion.png"))
    axis = figures["confusion.png"].axes[0]
    texts = [text.get_text().split("\n")[0] or "0" for text in axis.texts]
    assert [int(text) for text in texts] == np.array(metrics["confusion_matrix"]).ravel().tolist()
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("predicted digit", "true digit")
    accuracy = np.array(metrics["accuracy_over_time"])
    args, _ = train_nmnist.parse_args(SHORT)
    ends = train_nmnist.saccade_ends(args)[:2]
    exits = metrics["early_exit"]
    utils.plot_accuracy_over_time(accuracy, exits, ends, 308 / 5, "title", Path("over_time.png"))
    curve, early, _chance, *saccades = figures["over_time.png"].axes[0].lines
    np.testing.assert_allclose(early.get_xdata(), [entry["mean_steps"] for entry in exits])
    np.testing.assert_allclose(early.get_ydata(), [100 * entry["accuracy"] for entry in exits])
    np.testing.assert_allclose(curve.get_xdata(), [1, 2, 3, 4, 5])
    np.testing.assert_allclose(curve.get_ydata(), 100 * accuracy)
    # 100 and 220 of 308 ms; what is predicted after step 1, at 61.6 ms, is drawn at 1.
    np.testing.assert_allclose([line.get_xdata()[0] for line in saccades], [500 / 308, 1100 / 308])


def test_a_missing_checkpoint_names_the_command_that_makes_it(tmp_path, made_data_dir):
    path = tmp_path / "checkpoints" / "resnet_best.pt"
    with pytest.raises(utils.UserError, match=f"{path}: .*`python train_nmnist.py --model resnet`"):
        train_here(tmp_path, made_data_dir, "--test_only", "--model", "resnet")
    assert not list(tmp_path.iterdir())


def test_testing_on_other_data_than_trained_on_warns(tmp_path, made_data_dir, capsys):
    train_here(tmp_path, made_data_dir, "--epochs", 1)
    simulated = tmp_path / "data"
    shutil.copytree(made_data_dir / "NMNIST", simulated / "NMNIST")
    (simulated / "NMNIST" / nmnist.SIMULATOR_FILE).write_text(json.dumps({"images": "x"}))
    capsys.readouterr()
    train_here(tmp_path, simulated, "--test_only")
    warning = "WARNING: tested on another data set than in training: SimulatedNMNIST (x), not NMNIST\n"
    assert warning in capsys.readouterr().err
    metrics = json.loads((tmp_path / "logs" / "cnn_test_metrics.json").read_text())
    assert (metrics["dataset"], metrics["trained_on"]) == ("SimulatedNMNIST (x)", "NMNIST")
    earlier = json.loads((tmp_path / "logs" / "cnn_test_metrics.1.json").read_text())  # of the first test
    assert earlier["dataset"] == "NMNIST"
    assert (tmp_path / "logs" / "cnn_predictions.1.csv").exists()
    train_here(tmp_path, simulated, "--test_only")
    assert not (tmp_path / "logs" / "cnn_test_metrics.2.json").exists()  # the same test again
    words = r"trained with another data set: NMNIST, and this is SimulatedNMNIST \(x\)"
    with pytest.raises(utils.UserError, match=words):
        train_here(tmp_path, simulated, "--resume", "--epochs", 2)


def test_a_single_time_step_and_a_last_batch_of_one(tmp_path, made_data_dir):
    train_here(tmp_path, made_data_dir, "--epochs", 1, "--time_steps", 1, "--batch_size", 19)  # 96 = 5 * 19 + 1
    assert len(history(tmp_path)) == 1


@pytest.mark.parametrize("time_steps", [1, 5, 25])
def test_losses_equal_a_hand_computation(time_steps):
    """The correct neuron of ten fires at every step, the others never; its membrane is at 2, the others' at 0."""
    labels = torch.tensor([3, 7, 7])
    spk = torch.nn.functional.one_hot(labels, 10).float().expand(time_steps, 3, 10)
    mem = 2 * spk
    losses = {name: float(train_nmnist.make_loss(name)(spk, mem, labels)) for name in ("ce", "mse", "count")}
    assert losses["ce"] == pytest.approx(math.log(1 + 9 * math.exp(-2)), rel=1e-5)
    assert losses["mse"] == 0
    assert losses["count"] == pytest.approx(math.log(1 + 9 * math.exp(-5)), rel=1e-5)  # whatever the number of steps
    assert float(train_nmnist.make_loss("mse")(0 * spk, mem, labels)) > 0
    # Spikes stay finite where a membrane potential is not, and so would a loss of them alone.
    mem[-1, 1, 0] = math.inf
    for name in ("mse", "count"):
        assert math.isnan(float(train_nmnist.make_loss(name)(spk, mem, labels)))


@pytest.mark.parametrize(
    ("loss", "optimizer"), [("ce", "sgd"), ("ce", "adamw"), ("mse", "adam"), ("mse", "sgd"), ("count", "adam")]
)
def test_every_loss_and_optimizer_lowers_the_loss(tmp_path, made_data_dir, loss, optimizer):
    train_here(tmp_path, made_data_dir, "--epochs", 3, "--loss", loss, "--optimizer", optimizer)
    losses = [entry["train_loss"] for entry in history(tmp_path)]
    assert losses[-1] < losses[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none(capsys):
    with pytest.raises(SystemExit) as stop:
        train_nmnist.main(["--device", "cuda"])
    assert stop.value.code == 2
    assert "error: argument --device: PyTorch finds no CUDA device" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------
# Devices and precisions
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["cnn", "resnet"])
def test_a_run_on_each_device_is_resumed_and_read_on_the_other(tmp_path, made_data_dir, device, model):
    flags = ["--model", model, "--device", device.type]
    train_here(tmp_path, made_data_dir, "--epochs", 1, *flags)
    train_here(tmp_path, made_data_dir, "--epochs", 3, "--resume", *flags)
    assert [entry["epoch"] for entry in history(tmp_path, model)] == [1, 2, 3]
    assert history(tmp_path, model)[-1]["train_loss"] < history(tmp_path, model)[0]["train_loss"]
    path = tmp_path / "logs" / f"{model}_test_metrics.json"
    there = json.loads(path.read_text())
    assert device.type in there["machine"]
    other = "cuda" if device.type == "cpu" and torch.cuda.is_available() else "cpu"  # without a GPU, the same
    train_here(tmp_path, made_data_dir, "--test_only", "--model", model, "--device", other)
    here = json.loads(path.read_text())
    assert here["loss"] == pytest.approx(there["loss"], rel=0.05)
    assert here["accuracy"] == pytest.approx(there["accuracy"], abs=2 / 30)
    for entry, expected in zip(here["early_exit"], there["early_exit"], strict=True):
        assert entry["mean_steps"] == pytest.approx(expected["mean_steps"], abs=0.3)
    train_here(tmp_path, made_data_dir, "--epochs", 4, "--resume", "--model", model, "--device", other)
    assert len(history(tmp_path, model)) == 4


@needs_cuda
def test_torchrun_on_cuda(tmp_path, made_data_dir):
    """By nccl, one process a GPU."""
    flags = ["--epochs", 2, "--device", "cuda"]
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={torch.cuda.device_count()}"]
    process = start(tmp_path, made_data_dir, *flags, launcher=launcher)
    finish(process, timeout=280)
    assert len(history(tmp_path)) == 2


def state_and_step(made_data_dir, device, *flags):
    """Return a new `TrainState`, and a function that makes an augmented batch and a training step with it."""
    args, _ = train_nmnist.parse_args([*SHORT, "--device", device.type, *map(str, flags)])
    frames = nmnist.load_frames(nmnist.NMNIST(made_data_dir, "train"), 5).to(device)
    state = train_nmnist.make_state(args, device)
    batches = train_nmnist.training_batches(args, torch.arange(96), frames, state.network.dtype)
    return state, lambda: train_nmnist.training_step(state, *next(batches))


@needs_cuda
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("model", ["cnn", "resnet"])
def test_a_training_step_on_cuda_waits_for_nothing(made_data_dir, model, precision, pinned, monkeypatch):
    device = torch.device("cuda")
    if pinned:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (1000, 10**9))
    _, step = state_and_step(made_data_dir, device, "--model", model, "--precision", precision, "--dropout", 0.2)
    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
def test_out_of_memory_on_cuda_is_not_taken_for_a_missing_compiler(tmp_path, made_data_dir):
    train_here(tmp_path / "before", made_data_dir, "--epochs", 1, "--device", "cuda")
    models.probe_compiler.cache_clear()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.3e9 / torch.cuda.get_device_properties(0).total_memory)
    flags = ["--epochs", 1, "--device", "cuda", "--batch_size", 96, "--time_steps", 100]  # a convolution: 0.36 GB
    try:
        with pytest.raises(torch.OutOfMemoryError):
            train_here(tmp_path, made_data_dir, *flags)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert models.compiler_error is None


def test_fp16_learns_as_fp32_does_and_is_resumed(tmp_path, made_data_dir, capsys):
    flags = ["--time_steps", 2, "--lr", 2e-3]
    train_here(tmp_path / "fp32", made_data_dir, "--epochs", 3, "--precision", "fp32", *flags)
    assert "WARNING" not in capsys.readouterr().err
    train_here(tmp_path / "fp16", made_data_dir, "--epochs", 2, "--precision", "fp16", *flags)
    assert "WARNING: --precision fp16 is meant for GPUs" in capsys.readouterr().err
    train_here(tmp_path / "fp16", made_data_dir, "--epochs", 3, "--resume", *flags)
    for fp32, fp16 in zip(history(tmp_path / "fp32"), history(tmp_path / "fp16"), strict=True):
        assert fp16["precision"] == "fp16"
        assert fp16["train_loss"] == pytest.approx(fp32["train_loss"], rel=0.05)
    saved = torch.load(tmp_path / "fp16" / "checkpoints" / "cnn_last.pt", weights_only=True)
    assert saved["state"]["scaler"]["_growth_tracker"] == 9  # steps without overflow, of both commands


def test_fp16_skips_a_step_whose_gradients_overflow(made_data_dir, device):
    state, step = state_and_step(made_data_dir, device, "--precision", "fp16")
    before = {name: value.clone() for name, value in state.network.named_parameters()}
    state.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**60)
    loss, _correct, _number = step().tolist()
    assert math.isfinite(loss)
    assert state.scaler.get_scale() == 2.0**59
    assert all(torch.equal(value, before[name]) for name, value in state.network.named_parameters())
    state.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    step()
    assert not all(torch.equal(value, before[name]) for name, value in state.network.named_parameters())


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real recordings in {SHARED}")
def test_real_recordings_are_learnt_in_two_epochs(tmp_path, real_data_dir):
    flags = ["--epochs", 2, "--batch_size", 16, "--time_steps", 10, "--val_split", 0.1]
    train_here(tmp_path, real_data_dir, *flags)
    assert history(tmp_path)[-1]["test_accuracy"] > 0.6


# --- Nothing is lost, and nothing is silently different ----------------------------------------------------


def change_label(data_dir):
    source = data_dir / "NMNIST" / "Train" / "3" / "00004.bin"
    source.rename(data_dir / "NMNIST" / "Train" / "4" / "00006.bin")


def change_content(data_dir):
    path = data_dir / "NMNIST" / "Train" / "3" / "00004.bin"
    path.write_bytes(path.read_bytes()[:-5])


def change_test_part(data_dir):
    (data_dir / "NMNIST" / "Test" / "3" / "00004.bin").unlink()


@pytest.mark.parametrize("change", [change_label, change_content, change_test_part])
def test_a_run_resumed_on_other_data_is_refused(tmp_path, made_data_dir, capsys, change):
    shutil.copytree(made_data_dir / "NMNIST", tmp_path / "NMNIST")
    train_here(tmp_path, tmp_path, "--epochs", 1)
    for path in (tmp_path / "NMNIST").glob("*/0/*.bin"):
        os.utime(path, (1, 1))  # touched: the same data
    train_here(tmp_path, tmp_path, "--resume", "--epochs", 2)
    before = {path: path.read_bytes() for path in files_in(tmp_path / "checkpoints")}
    change(tmp_path)
    part = "test" if change is change_test_part else "training"
    with pytest.raises(
        utils.UserError, match=rf"--resume: trained with another {part} part: .* recordings \(\w+\), and"
    ):
        train_here(tmp_path, tmp_path, "--resume", "--epochs", 3)
    assert {path: path.read_bytes() for path in files_in(tmp_path / "checkpoints")} == before
    capsys.readouterr()
    train_here(tmp_path, tmp_path, "--test_only")
    assert ("tested on another test part than in training" in capsys.readouterr().err) == (part == "test")


def test_an_earlier_run_is_kept_under_a_number(tmp_path, made_data_dir, capsys):
    names = [
        "checkpoints/cnn_best.pt",
        "checkpoints/cnn_last.pt",
        "logs/cnn_history.json",
        "logs/cnn_test_metrics.json",
    ]
    runs = []
    for seed in range(3):
        train_here(tmp_path, made_data_dir, "--epochs", 1, "--seed", seed)
        runs.append({name: (tmp_path / name).read_bytes() for name in names})
        assert ("earlier     run kept as" in capsys.readouterr().out) == (seed > 0)
    for n, earlier in enumerate(runs[:2], start=1):
        for name, content in earlier.items():
            stem, suffix = name.rsplit(".", 1)
            assert (tmp_path / f"{stem}.{n}.{suffix}").read_bytes() == content
    # An older checkpoint is resumed: the newer run is kept.
    train_here(tmp_path, made_data_dir, "--resume", tmp_path / "checkpoints" / "cnn_last.1.pt", "--epochs", 2)
    assert (tmp_path / "checkpoints" / "cnn_last.3.pt").read_bytes() == runs[2]["checkpoints/cnn_last.pt"]
    assert [entry["epoch"] for entry in history(tmp_path)] == [1, 2]
    # The last checkpoint itself is resumed: nothing to keep.
    train_here(tmp_path, made_data_dir, "--resume", "--epochs", 3)
    assert not (tmp_path / "checkpoints" / "cnn_last.4.pt").exists()


def test_a_run_that_fails_in_its_first_epoch_leaves_the_earlier_one(tmp_path, made_data_dir):
    train_here(tmp_path, made_data_dir, "--epochs", 1)
    before = {path: path.read_bytes() for path in files_in(tmp_path)}
    with pytest.raises(utils.UserError, match="loss not finite in epoch 1"):
        train_here(tmp_path, made_data_dir, "--epochs", 1, "--optimizer", "sgd", "--lr", 1e38)
    assert {path: path.read_bytes() for path in files_in(tmp_path)} == before


def test_a_broken_pipe_ends_training_with_all_epochs_saved(tmp_path, made_data_dir):
    process = start(tmp_path, made_data_dir, "--epochs", 10_000, *STEP)
    while "epoch" not in process.stdout.readline():
        pass
    process.stdout.close()  # as `| head` does
    assert process.wait(timeout=60) == 141
    message = process.stderr.read().strip().splitlines()[-1]
    saved = torch.load(tmp_path / "checkpoints" / "cnn_last.pt", weights_only=True)["epoch"]
    assert saved == len(history(tmp_path)) >= 2
    assert f"output closed: {tmp_path}/checkpoints/cnn_last.pt holds epoch {saved}; continue with: python" in message


def test_an_epoch_whose_line_cannot_be_printed_is_saved(tmp_path, made_data_dir, monkeypatch):
    class FullDisk(io.StringIO):
        def write(self, text):
            if text.startswith("epoch"):
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(text)

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", FullDisk())
        with pytest.raises(OSError, match="No space left on device"):
            train_here(tmp_path, made_data_dir, "--epochs", 2, *STEP)
    assert torch.load(tmp_path / "checkpoints" / "cnn_last.pt", weights_only=True)["epoch"] == 1
    assert len(history(tmp_path)) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_to_a_full_disk_ends_in_one_line(tmp_path, made_data_dir):
    flags = ["--data_dir", made_data_dir, "--time_steps", 5]
    result = run("sh", "-c", shlex.join(map(str, [sys.executable, "nmnist.py", *flags])) + " >/dev/full")
    assert_refused(result, "output can't be written: No space left on device")


def test_a_progress_bar_that_cannot_be_drawn_ends_no_run(tmp_path, made_data_dir):
    def run_without_stderr(name, stderr):
        flags = [*folder_flags(tmp_path / name, made_data_dir), *SHORT, *STEP, "--epochs", 1]
        return run("sh", "-c", shlex.join(map(str, [sys.executable, "train_nmnist.py", *flags])) + " " + stderr)

    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(run_without_stderr, ("closed", "full"), ("2>&-", "2>/dev/full")):
            assert result.returncode == 0
            assert "test accuracy" in result.stdout


def test_the_command_that_started_a_run_resumes_it(tmp_path, made_data_dir):
    for flags in (
        ["--precision", "auto"],
        ["--lr", "0.005"],
        ["--scheduler", "--denoise", "9000", "--precision", "fp32"],
    ):
        folder = tmp_path / flags[-1]
        for _ in range(3):
            train_here(folder, made_data_dir, "--epochs", 1, "--resume", *flags)
        assert len(history(folder)) == 1


def test_a_damaged_history_is_reported(tmp_path, made_data_dir, capsys):
    train_here(tmp_path, made_data_dir, "--epochs", 1, *STEP)
    for content in ("{", "[1]", '{"epoch": 1}', '[{"epoch": 1}]'):
        (tmp_path / "logs" / "cnn_history.json").write_text(content)
        train_here(tmp_path, made_data_dir, "--test_only", "--visualize")
        assert "cnn_history.json is missing, damaged or of another run" in capsys.readouterr().err
    train_here(tmp_path, made_data_dir, "--resume", "--epochs", 1, *STEP)
    assert len(history(tmp_path)) == 1


def test_resuming_with_another_number_of_threads_gives_a_warning(tmp_path, made_data_dir, capsys):
    train_here(tmp_path, made_data_dir, "--epochs", 1, *STEP)
    threads = torch.get_num_threads()
    assert torch.load(tmp_path / "checkpoints" / "cnn_last.pt", weights_only=True)["threads"] == threads
    assert "threads" not in capsys.readouterr().err
    torch.set_num_threads(threads + 1)
    try:
        train_here(tmp_path, made_data_dir, *STEP, "--epochs", 2, "--resume")
    finally:
        torch.set_num_threads(threads)
    words = "it will not be equal bit for bit to a run that was not stopped "
    words += f"(threads (OMP_NUM_THREADS): {threads + 1}, before {threads})"
    assert words in capsys.readouterr().err


def test_resuming_with_another_release_of_a_package_gives_a_warning(tmp_path, made_data_dir, capsys, monkeypatch):
    train_here(tmp_path, made_data_dir, "--epochs", 1, *STEP)
    versions = utils.versions("torch", "snntorch", "tonic", "numpy")
    monkeypatch.setattr(utils, "versions", lambda *_: {**versions, "snntorch": "9.9"})
    train_here(tmp_path, made_data_dir, *STEP, "--epochs", 2, "--resume")
    assert f"not stopped (snntorch: 9.9, before {versions['snntorch']})" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "name", "value", "words"),
    [
        (nmnist, "AUGMENTATION", nmnist.Augmentation(shift=2.0), "another augmentation: "),
        (train_nmnist, "EMA_STEPS", 50, "another EMA steps: 100, and this is 50"),
        (models.SpikingCNN, "SLOPE", 25, "another surrogate slope: 5, and this is 25"),
    ],
)
def test_a_run_resumed_by_changed_code_is_refused(tmp_path, made_data_dir, monkeypatch, module, name, value, words):
    train_here(tmp_path, made_data_dir, "--epochs", 1, *STEP)
    monkeypatch.setattr(module, name, value)
    with pytest.raises(utils.UserError, match=f"--resume: trained with {words}"):
        train_here(tmp_path, made_data_dir, *STEP, "--epochs", 2, "--resume")


# --- Recordings as tonic offers them -----------------------------------------------------------------------


@pytest.mark.parametrize("flags", [["--first_saccade_only", "--stabilize"], ["--bin_by", "events"]])
def test_options_of_recordings_are_kept_in_the_checkpoint(tmp_path, made_data_dir, capsys, flags):
    train_here(tmp_path, made_data_dir, "--epochs", 1, "--visualize", *flags)
    capsys.readouterr()
    train_nmnist.main([str(x) for x in (*folder_flags(tmp_path, made_data_dir), "--test_only", "--device", "cpu")])
    assert "WARNING" not in capsys.readouterr().err
    metrics = json.loads((tmp_path / "logs" / "cnn_test_metrics.json").read_text())
    suffix = "frames of equal event count" if "--bin_by" in flags else "first saccade, stabilized"
    assert metrics["dataset"] == metrics["trained_on"] == f"NMNIST, {suffix}"
    train_here(tmp_path, made_data_dir, "--resume", "--epochs", 2)
    other = ["--stabilize"] if "--bin_by" in flags else ["--bin_by", "events"]
    with pytest.raises(utils.UserError, match=rf"{other[0]} \w+: .* was trained with (False|time)"):
        train_here(tmp_path, made_data_dir, "--resume", "--epochs", 3, *other)


def test_auto_takes_the_data_set_of_the_checkpoint_without_the_network(tmp_path, made_data_dir, monkeypatch, capsys):
    """The network was trained on simulated recordings; N-MNIST could be downloaded meanwhile."""
    shutil.copytree(made_data_dir / "NMNIST", tmp_path / "SimulatedNMNIST")
    simulator = nmnist.describe_simulator(nmnist.BUILT_IN_IMAGES, 0)
    (tmp_path / "SimulatedNMNIST" / nmnist.SIMULATOR_FILE).write_text(json.dumps(simulator))
    train_here(tmp_path, tmp_path, "--epochs", 1, "--dataset", "simulated")

    def download(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(nmnist, "download_zip", download)
    capsys.readouterr()
    train_here(tmp_path, tmp_path, "--test_only")
    train_here(tmp_path, tmp_path, "--resume", "--epochs", 2)
    visualize_activations.main(
        ["--data_dir", str(tmp_path), "--save_dir", str(tmp_path / "checkpoints"), "--output_dir", str(tmp_path / "a")]
    )
    output = capsys.readouterr()
    assert output.out.count("data set    SimulatedNMNIST in") == 3
    assert "WARNING" not in output.err


@pytest.mark.parametrize("model", ["cnn", "resnet"])
def test_width_and_learned_decays(tmp_path, made_data_dir, model):
    flags = ["--model", model, "--width", 2, "--learn_beta", "--precision", "fp32"]
    for backend in ("fused", "step"):
        train_here(tmp_path / backend, made_data_dir, "--epochs", 1, *flags, "--neuron_backend", backend)
    fused, step = history(tmp_path / "fused", model), history(tmp_path / "step", model)
    assert fused[0]["train_loss"] == pytest.approx(step[0]["train_loss"], rel=0.03)
    for backend in ("fused", "step"):
        learned = {n: v for n, v in weights(tmp_path / backend, model).items() if n.endswith("neuron.beta")}
        assert len(learned) == {"cnn": 5, "resnet": 7}[model]
        assert all(value.item() != 0.5 for value in learned.values())
    metrics = json.loads((tmp_path / "fused" / "logs" / f"{model}_test_metrics.json").read_text())
    expected = build_model(NetworkConfig(model=model, width=2, learn_beta=True))
    assert metrics["parameters"] == sum(p.numel() for p in expected.parameters())
    train_here(tmp_path / "fused", made_data_dir, "--resume", "--epochs", 2, "--model", model)


@pytest.mark.parametrize("readout", ["rate", "latency"])
def test_the_readout_decides_everywhere(tmp_path, made_data_dir, readout):
    train_here(tmp_path, made_data_dir, "--epochs", 3, "--readout", readout, "--no_augment", "--visualize")
    metrics = json.loads((tmp_path / "logs" / "cnn_test_metrics.json").read_text())
    entries = history(tmp_path)
    best = max(entries, key=lambda entry: (entry["val_accuracy"], -entry["val_loss"]))
    assert metrics["readout"] == readout
    assert metrics["accuracy"] == metrics["accuracy_by_readout"][readout] == best["test_accuracy"]
    assert metrics["accuracy_over_time"][-1] == metrics["accuracy"]
    # Recomputed from the network's outputs, by hand.
    checkpoint = utils.load_checkpoint(tmp_path / "checkpoints" / "cnn_best.pt", "cnn")
    network = load_network(checkpoint, torch.device("cpu")).eval()
    frames, labels = nmnist.load_frames(nmnist.NMNIST(made_data_dir, "test"), 5).batch(torch.arange(30))
    with torch.no_grad():
        spk, mem = (x.numpy() for x in network(frames))
    correct, ties = 0, 0
    for b, label in enumerate(labels):
        first = [np.flatnonzero(spk[:, b, n])[0] if spk[:, b, n].any() else 99 for n in range(10)]
        score = spk[:, b].sum(0) if readout == "rate" else -np.array(first)
        leaders = np.flatnonzero(score == score.max())
        ties += len(leaders) > 1
        correct += leaders[mem[:, b, leaders].sum(0).argmax()] == int(label)
    assert metrics["accuracy"] == pytest.approx(correct / 30)
    assert metrics["ties"][readout] == pytest.approx(ties / 30)


def test_several_seeds_end_with_a_table(tmp_path, made_data_dir, capsys):
    flags = ["--epochs", 1, *STEP]
    train_here(tmp_path / "one", made_data_dir, *flags, "--seed", 7)
    train_here(tmp_path / "many", made_data_dir, *flags, "--seed", 3, 7)
    output = capsys.readouterr().out
    many = tmp_path / "many"
    for which in ("best", "last"):
        assert equal(weights(tmp_path / "one", which=which), weights_at(many / "checkpoints" / "seed_7", which))
    assert not equal(*(weights_at(many / "checkpoints" / f"seed_{seed}", "last") for seed in (3, 7)))
    accuracies = []
    for seed in (3, 7):
        metrics = json.loads((many / "logs" / f"seed_{seed}" / "cnn_test_metrics.json").read_text())
        assert metrics["seed"] == metrics["settings"]["seed"] == seed
        accuracies.append(metrics["accuracy"])
    with open(many / "logs" / "cnn_seeds.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["seed"]), float(row["accuracy"])) for row in rows] == list(zip((3, 7), accuracies, strict=True))
    mean, spread = statistics.mean(accuracies), statistics.stdev(accuracies)
    line = next(line for line in output.splitlines() if line.startswith("accuracy "))
    assert line.split()[1:] == [f"{x:.2%}" for x in (mean, spread, min(accuracies), max(accuracies))]
    # Stopped and resumed: what is done is only tested again.
    train_here(tmp_path / "many", made_data_dir, *flags, "--resume", "--seed", 3, 7, 9)
    assert len(list((many / "checkpoints").glob("seed_*/cnn_best*.pt"))) == 3
    with open(many / "logs" / "cnn_seeds.1.csv") as file:  # the earlier table
        assert list(csv.DictReader(file)) == rows


@pytest.mark.parametrize("stop", [KeyboardInterrupt, utils.Terminated, BrokenPipeError])
def test_an_interrupted_run_of_several_seeds_prints_the_command_that_continues_all(monkeypatch, stop):
    def run(_argv):
        raise stop("the command for this seed")

    monkeypatch.setattr(train_nmnist, "run", run)
    with pytest.raises(stop) as raised:
        train_nmnist.main(["--seed", "3", "7", "--epochs", "5"])
    command = "python train_nmnist.py --seed 3 7 --epochs 5 --resume"
    assert str(raised.value) == f"stopped at seed 3; continue with: {command}"


def weights_at(save_dir, which):
    """Return the weights in a checkpoint of `save_dir`."""
    return weights_in(save_dir / f"cnn_{which}.pt")


def test_metrics_say_how_they_came_about(tmp_path, made_data_dir):
    train_here(tmp_path, made_data_dir, "--epochs", 2, *STEP)
    metrics = json.loads((tmp_path / "logs" / "cnn_test_metrics.json").read_text())
    entries = json.loads((tmp_path / "logs" / "cnn_history.json").read_text())
    assert metrics["seconds_to_epoch"] == pytest.approx(sum(e["seconds"] for e in entries[: metrics["epoch"]]))
    assert metrics["settings"]["time_steps"] == 2
    assert metrics["settings"]["neuron_backend"] == "step"
    assert metrics["constants"]["augmentation"]["rotation"] == nmnist.Augmentation().rotation
    assert metrics["trained_with"]["torch"] == metrics["tested_with"]["torch"] == torch.__version__
    assert f"{torch.get_num_threads()} threads" in metrics["machine"]
    assert 100 < metrics["peak_memory_mb"] < 100_000
    assert list(metrics["milliseconds_per_recording"]) == ["batch of 1", "batch of 30"]
    assert all(0 < ms < 10_000 for ms in metrics["milliseconds_per_recording"].values())


# --- What an adversary found -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [[], ["checkpoints/cnn_last.pt"]])
def test_a_checkpoint_that_changes_while_a_resumed_run_waits_is_kept(tmp_path, made_data_dir, monkeypatch, path):
    train_here(tmp_path, made_data_dir, "--epochs", 1, *STEP)
    path = [tmp_path / name for name in path]

    def load_data(args, device, load_data=nmnist.load_data):
        with monkeypatch.context() as patch:
            patch.setattr(nmnist, "load_data", load_data)  # meanwhile, another run goes on
            train_here(tmp_path, made_data_dir, "--resume", "--epochs", 3, *STEP)
        return load_data(args, device)

    monkeypatch.setattr(nmnist, "load_data", load_data)
    with pytest.raises(utils.UserError, match=r"cnn_last\.pt has changed since this command started: run it again"):
        train_here(tmp_path, made_data_dir, "--resume", *path, "--epochs", 2, *STEP)
    assert len(history(tmp_path)) == 3


def test_runs_that_share_log_dir_keep_each_others_history_and_metrics(tmp_path, made_data_dir, capsys):
    logs = tmp_path / "logs"
    for name, seed in (("a", 0), ("b", 5)):
        train_here(tmp_path / name, made_data_dir, "--log_dir", logs, "--epochs", 2, "--seed", seed, *STEP)
    names = [logs / "cnn_history.json", logs / "cnn_test_metrics.json"]
    of_b = [path.read_bytes() for path in names]
    capsys.readouterr()
    train_here(tmp_path / "a", made_data_dir, "--log_dir", logs, "--test_only", "--visualize")
    assert "of another run: training_results.png is not drawn" in capsys.readouterr().err
    assert (logs / "cnn_test_metrics.2.json").read_bytes() == of_b[1]
    train_here(tmp_path / "a", made_data_dir, "--log_dir", logs, "--resume", "--epochs", 3, *STEP)
    kept = [path.read_bytes() for path in logs.glob("cnn_history.*.json")]
    assert of_b[0] in kept


def test_an_interrupt_that_python_discards_stops_training_at_the_next_batch(tmp_path, made_data_dir, monkeypatch):
    monkeypatch.setattr(utils, "interrupted_by", utils.Terminated)
    with pytest.raises(utils.Terminated):
        train_here(tmp_path, made_data_dir, "--epochs", 1, *STEP)
    assert utils.interrupted_by is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c["network_config"].update(other=1),
        lambda c: c["network_config"].update(neuron_backend="other"),
        lambda c: c["network"].popitem(),
        lambda c: c["network"].update({"conv1.weight": torch.zeros(2)}),
        lambda c: c.update(data=None),
        lambda c: [values.fill_(torch.nan) for values in c["network"].values() if values.is_floating_point()],
    ],
)
def test_checkpoints_edited_by_hand_are_refused_by_name(tmp_path, made_data_dir, damage):
    path = tmp_path / "checkpoints" / "cnn_best.pt"
    train_here(tmp_path, made_data_dir, "--epochs", 1, *STEP)
    checkpoint = torch.load(path, weights_only=True)
    damage(checkpoint)
    torch.save(checkpoint, path)
    with pytest.raises((utils.UserError, SystemExit)) as error:
        train_here(tmp_path, made_data_dir, "--test_only")
    if error.type is utils.UserError:
        assert str(path) in str(error.value)


def test_a_compile_cache_that_cannot_be_made_is_refused_by_name(tmp_path, made_data_dir, monkeypatch):
    """torch's own optimizers need it."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with ThreadPoolExecutor(2) as pool:
        refused, helped = (
            pool.submit(train, tmp_path, made_data_dir, flag, expect=None) for flag in ("--scheduler", "--help")
        )
    assert_refused(refused.result(), str(tmp_path / "file" / "cache"))
    assert helped.result().returncode == 0
