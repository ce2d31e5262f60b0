"""Look inside a trained network: spikes, membrane potentials, features, firing rates by layer.

python visualize_activations.py --model cnn                    # the output layer
python visualize_activations.py --model cnn --visualize_all    # every layer, t-SNE, firing rates
python visualize_activations.py --model resnet --visualize_all --sample 7
"""

import os

if __name__ == "__main__":  # before torch is imported: idle threads sleep, instead of spinning
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import functools
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
from sklearn.manifold import TSNE
from snntorch import spikeplot
from tqdm import tqdm

import models
import nmnist
import utils
from utils import UserError, number

BATCH_SIZE = 100
NUM_TRACES = 5  # hidden neurons whose membrane potential is drawn
DIGIT_COLOURS = sns.color_palette("colorblind", 10)
PALE = "#999999"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the script's flags."""
    parser = utils.make_parser(__doc__)
    flag = functools.partial(utils.add_flag, parser)
    flag("--model", "cnn", "network, without --no_spikes", choices=list(models.NETWORKS))
    flag("--visualize_all", False, "draw every layer, t-SNE and firing rates, not the output alone")
    flag("--sample", 0, "index of the test recording that is drawn", type=number(int, 0))
    flag("--num_neurons", 100, "neurons that are drawn of a larger layer", type=number(int, 1))
    flag("--tsne_samples", 2000, "test recordings in the t-SNE, at most", type=number(int, 5))
    flag("--seed", 0, "seed of t-SNE", type=number(int, 0, 2**32 - 1))
    flag("--save_dir", "./checkpoints", "folder of checkpoints")
    flag("--output_dir", "./activations", "folder of figures")
    utils.add_device_flags(parser)
    nmnist.add_data_flags(parser)
    return parser


def spread(spk: torch.Tensor, count: int) -> torch.Tensor:
    """Return `count` of the neurons that fire in spk [T, N], from the least to the most active."""
    rates = spk.sum(0)
    firing = rates.argsort(stable=True)[int((rates == 0).sum()) :]
    if len(firing) <= count:
        return firing
    return firing[torch.linspace(0, len(firing) - 1, count).round().long()]


def alif_thresholds(neuron: models.ALIF, spk: torch.Tensor) -> torch.Tensor:
    """Return the threshold at each step, [T, ...], of neurons that fire spk [T, ...]."""
    adapt = [torch.zeros_like(spk[0])]
    for step_spk in spk[:-1]:
        adapt.append(neuron.alpha * adapt[-1] + (1 - neuron.alpha) * step_spk)
    return neuron.threshold_at(torch.stack(adapt))


def plot_raster(
    spk: torch.Tensor, label: int | None, layer: str, num_neurons: int, heading: str, path: Path
) -> None:
    """Draw the spikes [T, N] of one layer: time steps against neurons.

    Of a hidden layer it is a spread of `num_neurons`, from the least active to the most active; of
    the output layer, which has a `label`, it is all ten.
    """
    is_output = label is not None
    shown = torch.arange(models.NUM_DIGITS) if is_output else spread(spk, num_neurons)
    figure, axis = plt.subplots(figsize=(9, 4.8))
    from_1 = torch.cat([torch.zeros(1, len(shown)), spk[:, shown]])  # steps count from 1
    colours = utils.BLUE
    if is_output:
        digits = from_1.nonzero()[:, 1]
        colours = np.where(digits == label, utils.ORANGE, utils.BLUE)
    size = max(7, 600 / max(1, len(shown)))
    spikeplot.raster(from_1, axis, s=size, c=colours, marker="s", linewidths=0)
    firing = int((spk.sum(0) > 0).sum())
    which = f"{len(shown)} of {firing:,} that fire, of {spk.shape[1]:,} neurons"
    which = f"that of the true digit {label} in orange" if is_output else which
    axis.set_title(f"{heading}\nspikes of {layer}, {which}; firing rate {spk.mean():.3f}")
    axis.set(xlabel="time step", xlim=(0.5, len(spk) + 0.5), ylim=(-0.7, len(shown) - 0.3))
    if is_output:
        axis.set(ylabel="output neuron (digit)", yticks=range(models.NUM_DIGITS))
    else:
        axis.set(ylabel="neuron, from the least to the most active")
    utils.whole_steps(axis)
    axis.grid(False)
    utils.save_figure(figure, path)


def plot_membranes(spk, mem, thresholds, layer: str, heading: str, path: Path) -> None:
    """Draw membrane potentials of hidden neurons of median activity, with their thresholds.

    spk, mem and thresholds are [T, N] or [T, C, H, W], the last two in thresholds at rest.
    """
    shape = spk.shape[1:]
    spk, mem, thresholds = (values.flatten(1) for values in (spk, mem, thresholds))
    firing = spread(spk, spk.shape[1])
    first = max(0, len(firing) // 2 - NUM_TRACES // 2)
    shown = firing[first : first + NUM_TRACES] if len(firing) else torch.arange(NUM_TRACES)
    steps = np.arange(1, len(spk) + 1)
    size = (9, 1.5 * len(shown) + 1.2)
    figure, axes = plt.subplots(len(shown), 1, figsize=size, sharex=True, squeeze=False)
    for axis, neuron in zip(axes[:, 0], shown, strict=True):
        axis.plot(steps, mem[:, neuron], color=utils.BLUE, label="membrane potential")
        axis.plot(steps, thresholds[:, neuron], "--", color=utils.GREY, label="threshold")
        fired = spk[:, neuron] > 0
        axis.plot(steps[fired], mem[fired, neuron], "o", color=utils.ORANGE, ms=5, label="spike")
        place = ", ".join(str(int(i)) for i in np.unravel_index(int(neuron), shape))
        axis.set_ylabel(place)
    axes[-1, 0].set(xlabel="time step", xlim=(0.5, len(spk) + 0.5))
    utils.whole_steps(axes[-1, 0])
    place = "channel, y, x of a neuron" if len(shape) == 3 else "neuron"
    figure.supylabel(f"membrane potential (thresholds); {place}")
    which = f"neurons of median activity among the {len(firing):,} that fire"
    which = which if len(firing) else "neurons; none fires"
    figure.suptitle(f"{heading}\n{layer}: {len(shown)} {which}")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    utils.save_figure(figure, path)


def plot_output_membranes(spk, mem, label: int, layer: str, heading: str, path: Path) -> None:
    """Draw the membrane potentials [T, 10] of the output neurons, in thresholds."""
    steps = np.arange(1, len(mem) + 1)
    others = [digit for digit in mem.mean(0).argsort(descending=True).tolist() if digit != label]
    names = {label: f"{label}, the true digit", others[0]: f"{others[0]}, the strongest other"}
    names[others[1]] = "the other digits"
    figure, axis = plt.subplots(figsize=(9, 5))
    for digit in (*others, label):
        colour = {label: utils.ORANGE, others[0]: utils.BLUE}.get(digit, PALE)
        style = {"color": colour, "zorder": 2 if colour == PALE else 3}
        width = 2 if digit == label else 1
        axis.plot(steps, mem[:, digit], lw=width, label=names.get(digit), **style)
        fired = spk[:, digit] > 0
        axis.plot(steps[fired], mem[fired, digit], "o", ms=5, **style)
    axis.plot([], [], "o", color=utils.GREY, label="spike")
    axis.axhline(1, color=utils.GREY, linestyle="--", lw=1, label="threshold")
    axis.set(xlabel="time step", ylabel="membrane potential (thresholds)")
    axis.set(xlim=(0.5, len(mem) + 0.5), title=f"{heading}\nmembrane potentials of {layer}")
    utils.whole_steps(axis)
    figure.legend(loc="outside lower center", ncols=5)
    utils.save_figure(figure, path)


def plot_tsne(
    features, labels, predictions, seed: int, heading: str, layer: str, path: Path
) -> None:
    """Draw the spike counts [N, features] of the last hidden layer in two dimensions."""
    if bool((features == features[0]).all()):  # on which scikit-learn crashes
        print(f"t-SNE       not drawn: {layer} answers every recording alike", file=sys.stderr)
        return
    print(f"t-SNE       of {len(features):,} recordings", flush=True)  # it shows no progress
    tsne = TSNE(perplexity=min(30, (len(features) - 1) / 3), init="pca", random_state=seed)
    points = tsne.fit_transform(features.numpy())
    figure, axis = plt.subplots(figsize=(8, 6.5))
    for digit in range(models.NUM_DIGITS):
        chosen = labels == digit
        axis.scatter(*points[chosen].T, s=14, color=DIGIT_COLOURS[digit], label=str(digit), lw=0)
        if chosen.any():
            centre = np.median(points[chosen], axis=0)
            style = {"size": 20, "weight": "bold", "alpha": 0.55, "ha": "center", "va": "center"}
            axis.text(*centre, str(digit), **style)
    mistakes = predictions != labels
    style = {"s": 70, "facecolors": "none", "edgecolors": "black", "lw": 1}
    axis.scatter(*points[mistakes].T, **style, label=f"mistake ({int(mistakes.sum())})")
    axis.set(xlabel="t-SNE dimension 1", ylabel="t-SNE dimension 2")
    what = f"t-SNE of the spike counts of {layer}, {len(labels):,} test recordings"
    axis.set_title(f"{heading}\n{what}")
    axis.grid(False)
    figure.legend(loc="outside right center", title="digit")
    utils.save_figure(figure, path)


def plot_firing_rates(
    rates: dict[str, torch.Tensor], num_recordings: int, heading: str, path: Path
) -> None:
    """Draw each layer's mean firing rate [T] over time, and over all steps."""
    figure, (over_time, overall) = plt.subplots(1, 2, figsize=(11, 4.5), width_ratios=(2, 1))
    for i, (layer, rate) in enumerate(rates.items()):
        colour = plt.get_cmap("viridis")(i / len(rates))
        over_time.plot(range(1, len(rate) + 1), rate, color=colour, label=layer, lw=2)
        overall.barh(layer, float(rate.mean()), color=colour)
        overall.text(float(rate.mean()), i, f" {rate.mean():.3f}", va="center")
    over_time.set(xlabel="time step", ylabel="spikes per neuron and step", ylim=(0, None))
    utils.whole_steps(over_time)
    figure.legend(loc="outside lower center", ncols=len(rates), fontsize=9)
    largest = max(0.01, *(float(rate.mean()) for rate in rates.values()))
    overall.set(xlabel="mean over all steps", xlim=(0, 1.25 * largest))
    overall.invert_yaxis()
    overall.grid(False)
    figure.suptitle(f"{heading}\nfiring rates, mean over {num_recordings:,} test recordings")
    utils.save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    path = Path(args.save_dir) / f"{args.model}_best.pt"
    needed = [*vars(models.NetworkConfig()), *utils.flag_names(nmnist.add_frame_flags)]
    checkpoint = utils.load_checkpoint(path, needed, model=args.model, no_spikes=False)
    device = utils.prepare_device(args.device)
    flags = argparse.Namespace(**{**checkpoint["settings"], **vars(args)})
    data = nmnist.load_data(flags, device, ["test"], checkpoint["data"])
    if args.sample >= len(data.test):
        last = len(data.test) - 1
        raise UserError(f"--sample {args.sample}: the last test recording is {last:,}")
    try:
        network = models.restore_network(checkpoint, device, args.neuron_backend, args.precision)
    except models.NetworkError as error:
        raise UserError(f"--model {args.model}: {error}") from None
    tested = nmnist.describe_tested(data.describe(["test"]), checkpoint["data"])
    name = f"{network.title}{network.note} on {tested}"
    if tested != data.name:
        utils.warn(name)
    draw_recording(args, network, data.test, name)
    if args.visualize_all:
        draw_test_set(args, network, data.test, name)


@torch.no_grad()
def draw_recording(args, network: models.SpikingNetwork, frames: nmnist.Frames, name: str) -> None:
    """Draw the output layer, or every layer, during the recording `--sample`."""
    x, label = frames.batch(torch.tensor([args.sample]))
    with models.ActivityMeter(network) as meter:
        prediction = int(models.predict(*network(x), network.config.readout))
    heading = f"{name}, test recording {args.sample}: a {int(label)}, read as {prediction}"
    *_, output_layer = meter.outputs  # they run in this order
    for layer in meter.outputs if args.visualize_all else [output_layer]:
        spk, mem = (values[:, 0] for values in meter.outputs[layer])
        neuron = network.neuron_layers()[layer].neuron
        thresholds = neuron.threshold.expand_as(mem)
        if isinstance(neuron, models.ALIF):
            thresholds = alif_thresholds(neuron, spk)
        mem, thresholds = mem / neuron.threshold, thresholds / neuron.threshold
        spk, mem, thresholds = spk.cpu(), mem.cpu(), thresholds.cpu()
        raster_path = Path(args.output_dir) / "spikes" / f"spike_pattern_{layer}.png"
        membrane_path = Path(args.output_dir) / "membrane" / f"membrane_potential_{layer}.png"
        if layer == output_layer:
            plot_raster(spk, int(label), layer, args.num_neurons, heading, raster_path)
            plot_output_membranes(spk, mem, int(label), layer, heading, membrane_path)
        else:
            plot_raster(spk.flatten(1), None, layer, args.num_neurons, heading, raster_path)
            plot_membranes(spk, mem, thresholds, layer, heading, membrane_path)


@torch.no_grad()
def draw_test_set(args, network: models.SpikingNetwork, frames: nmnist.Frames, name: str) -> None:
    """Draw t-SNE and firing rates over the test recordings, in random order."""
    order = torch.randperm(len(frames), generator=torch.Generator().manual_seed(0))
    features, predictions = [], []
    bar = tqdm(desc="test", total=len(order), unit="recording", leave=False)
    with bar, models.ActivityMeter(network) as meter:
        for x, labels in frames.batches(order, BATCH_SIZE):
            predictions.append(models.predict(*network(x), network.config.readout).cpu())
            last_hidden = list(meter.outputs)[-2:][0]  # the output layer runs last
            features.append(meter.outputs[last_hidden][0].sum(0).flatten(1).cpu())
            bar.update(len(labels))
    features, predictions = torch.cat(features), torch.cat(predictions)
    labels = frames.labels.cpu()[order]
    accuracy = (predictions == labels).double().mean()
    heading = f"{name}: {accuracy:.2%} of {len(frames):,} test recordings"
    shown = (values[: args.tsne_samples] for values in (features, labels, predictions))
    path = Path(args.output_dir) / "tsne" / "tsne_features.png"
    plot_tsne(*shown, args.seed, heading, last_hidden, path)
    rates = {layer: meter.firing_rate(layer) for layer in meter.outputs}
    plot_firing_rates(rates, len(frames), heading, Path(args.output_dir) / "firing_rates.png")


if __name__ == "__main__":
    utils.run_script(main)
