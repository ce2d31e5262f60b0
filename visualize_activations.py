"""Look inside a trained network: spikes, membrane potentials, features, firing rates by layer.

python visualize_activations.py --model cnn                    # the output layer
python visualize_activations.py --model cnn --visualize_all    # every layer, t-SNE, firing rates
python visualize_activations.py --model resnet --visualize_all --sample 7
"""

import os

if __name__ == "__main__":  # before torch is imported: idle threads sleep, instead of spinning
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import utils  # isort: skip  # before matplotlib: it removes a notebook's MPLBACKEND

import argparse
import functools
import math
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import seaborn as sns
import torch
from matplotlib.patheffects import withStroke
from sklearn.manifold import TSNE
from snntorch import spikeplot

import models
import nmnist
from models import ActivityMeter, SpikingNetwork
from utils import BLUE, GREY, ORANGE, UserError, number

BATCH_SIZE = 100
NUM_TRACES = 5  # hidden neurons whose membrane potential is drawn
MAX_ROWS = 300  # of an image of spikes; of more neurons, a row is a mean
DIGIT_COLOURS = sns.color_palette("colorblind", 10)
TRUE_DIGIT = utils.GREEN  # not a colour of ON or OFF events
PALE = "#999999"
THRESHOLD_STYLE = {"color": GREY, "linestyle": "--", "lw": 1, "label": "threshold"}
SPIKE_STYLE = {"marker": "o", "ms": 5, "linestyle": "none"}


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the script's flags."""
    parser = utils.make_parser(__doc__)
    flag = functools.partial(utils.add_flag, parser)
    flag("--model", "cnn", "network, one with spikes", choices=list(models.NETWORKS))
    flag("--visualize_all", False, "draw every layer, t-SNE and firing rates, not the output alone")
    flag("--sample", 0, "index of the test recording that is drawn", type=number(int, 0))
    flag("--tsne_samples", 2000, "test recordings in the t-SNE, at most", type=number(int, 5))
    flag("--seed", 0, "seed of t-SNE and its recordings", type=number(int, 0, 2**32 - 1))
    flag("--save_dir", "./checkpoints", "folder of checkpoints", type=utils.file_path)
    output = "folder of figures (default: ./activations, for others than cnn ./activations/<model>)"
    flag("--output_dir", None, output, type=utils.file_path)
    utils.add_device_flags(parser)
    nmnist.add_data_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    path = Path(args.save_dir) / f"{args.model}_best.pt"
    # A checkpoint without what building the network and binning need is refused.
    needed = [*vars(models.NetworkConfig()), *utils.flag_names(nmnist.add_frame_flags)]
    checkpoint = utils.load_checkpoint(path, needed, model=args.model, no_spikes=False)
    device = utils.prepare_device(args.device)
    # Frames are binned as in training; all other flags are those of this command.
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
    default = "./activations" if args.model == "cnn" else f"./activations/{args.model}"
    folder = Path(args.output_dir or default)
    draw_recording(network, data, args.sample, args.visualize_all, name, folder)
    if args.visualize_all:
        draw_test_set(network, data, args.tsne_samples, args.seed, name, folder)


# --- One recording --------------------------------------------------------------------------------


class Recording(NamedTuple):
    """The recording that is drawn."""

    event_counts: np.ndarray  # [T, 2]: OFF and ON events at each step
    label: int
    time_axis: utils.TimeAxis
    heading: str  # first line of a title


@torch.no_grad()
def draw_recording(
    network: SpikingNetwork, data: nmnist.Data, sample: int, all_layers: bool, name: str, folder
) -> None:
    """Draw the output layer, or all layers, during the test recording `sample`."""
    frames, label = data.test.batch(torch.tensor([sample]))
    with ActivityMeter(network) as meter:
        prediction = int(models.predict(*network(frames), network.config.readout))
    heading = f"{name}, test recording {sample}: a {int(label)}, read as {prediction}"
    event_counts = frames[:, 0].sum((2, 3)).cpu().numpy()
    recording = Recording(event_counts, int(label), data.time_axis, heading)
    layers = list(meter.outputs)  # in the order in which they run
    for layer in layers if all_layers else layers[-1:]:
        spk, mem = (values[:, 0] for values in meter.outputs[layer])
        neuron = network.neuron_layers()[layer].neuron
        thresholds = neuron.threshold.expand_as(mem)
        if isinstance(neuron, models.ALIF):
            thresholds = neuron.thresholds(spk)
        spk = spk.cpu().numpy()
        mem = (mem / neuron.threshold).cpu().numpy()
        thresholds = (thresholds / neuron.threshold).cpu().numpy()
        spikes_path = folder / "spikes" / f"spike_pattern_{layer}.png"
        membrane_path = folder / "membrane" / f"membrane_potential_{layer}.png"
        if layer == layers[-1]:
            plot_output_spikes(recording, layer, spk, spikes_path)
            plot_output_membranes(recording, layer, spk, mem, thresholds, membrane_path)
        else:
            plot_spikes(recording, layer, spk, spikes_path)
            plot_membranes(recording, layer, spk, mem, thresholds, membrane_path)


def figure_with_events(recording: Recording):
    """Return a figure and its axes: events are drawn in the first; the second, below, is free."""
    figure, axes = utils.subplots((9, 6), 2, sharex=True, height_ratios=(1, 4))
    num_steps = len(recording.event_counts)
    steps = range(1, num_steps + 1)
    for polarity, name, colour in utils.POLARITIES:
        counts = recording.event_counts[:, polarity]
        axes[0].plot(steps, counts, color=colour, label=f"{name} events")
    axes[0].set(ylabel="events\nper step", ylim=(0, None))
    axes[1].grid(False)
    utils.show_time(axes, num_steps, recording.time_axis)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure, axes


def plot_spikes(recording: Recording, layer: str, spk: np.ndarray, path: Path) -> None:
    """Draw the spikes [T, ...] of a hidden layer's neurons, those that fire first on top."""
    spk = spk.reshape(len(spk), -1)
    fires = spk.any(0)
    order = np.lexsort((spk.argmax(0), ~fires))  # silent neurons last
    order = order[: max(1, fires.sum())]  # if all are silent, one stands for them
    figure, axes = figure_with_events(recording)
    # Each row of the image is `per_row` neurons.
    per_row = math.ceil(len(order) / MAX_ROWS)
    rows = [order[i : i + per_row] for i in range(0, len(order), per_row)]
    image = [spk[:, neurons].mean(1) for neurons in rows]
    extent = (0.5, len(spk) + 0.5, per_row * len(rows) + 0.5, 0.5)  # both count from 1
    style = {"cmap": "Blues", "vmin": 0, "vmax": 1, "aspect": "auto", "interpolation": "nearest"}
    drawn = axes[1].imshow(image, extent=extent, **style)
    axes[1].set_ylabel("neuron, in order of first spike")
    label = "spikes" if per_row == 1 else f"spikes, mean of {per_row} neurons in each row"
    figure.colorbar(drawn, ax=axes, label=label)
    which = f"{fires.sum():,} of {len(fires):,} neurons fire; firing rate {spk.mean():.3f}"
    utils.save_figure(figure, f"{recording.heading}\nspikes of {layer}: {which}", path)


def plot_output_spikes(recording: Recording, layer: str, spk: np.ndarray, path: Path) -> None:
    """Draw the spikes [T, 10] of the output neurons."""
    figure, axes = figure_with_events(recording)
    from_1 = np.pad(spk, ((1, 0), (0, 0)))  # steps count from 1, raster from 0
    _, digits = from_1.nonzero()
    colours = np.where(digits == recording.label, TRUE_DIGIT, GREY)
    spikeplot.raster(torch.from_numpy(from_1), axes[1], s=60, c=colours, marker="s", linewidths=0)
    axes[1].set(ylabel="output neuron (digit)", yticks=range(10), ylim=(-0.7, 9.7))
    which = f"those of the true digit {recording.label} in green; firing rate {spk.mean():.3f}"
    utils.save_figure(figure, f"{recording.heading}\nspikes of {layer}, {which}", path)


def draw_trace(axis, spk, mem, style: dict, spike_style: dict) -> None:
    """Draw a membrane potential [T] over time, with a mark at each spike of spk [T]."""
    steps = np.arange(1, len(mem) + 1)
    fired = spk > 0
    axis.plot(steps, mem, **style)
    axis.plot(steps[fired], mem[fired], **SPIKE_STYLE, **spike_style)


def plot_membranes(recording: Recording, layer: str, spk, mem, thresholds, path: Path) -> None:
    """Draw membrane potentials of some hidden neurons, with their thresholds.

    spk, mem and thresholds are [T, N] or [T, C, H, W], the last two in units of the threshold at
    rest.
    """
    indices = np.argwhere(spk.any(0))  # in the order of channels
    which = f"of the {len(indices):,} that fire, of {spk[0].size:,} neurons"
    if len(indices) == 0:
        indices = np.argwhere(~spk.any(0))
        which = f"of {spk[0].size:,} neurons, none of which fires"
    # The middles of equal parts of them, which are of different channels.
    spaced = np.linspace(0, len(indices), 2 * NUM_TRACES + 1)[1::2].astype(int)
    chosen = indices[np.unique(spaced)]
    size = 9, 1.5 * len(chosen) + 1.5  # room for title and legend
    figure, axes = utils.subplots(size, len(chosen), sharex=True, squeeze=False)
    for axis, index in zip(axes[:, 0], chosen, strict=True):
        trace = (slice(None), *index)
        style = {"color": BLUE, "label": "membrane potential"}
        draw_trace(axis, spk[trace], mem[trace], style, {"color": ORANGE, "label": "spike"})
        axis.plot(range(1, len(spk) + 1), thresholds[trace], **THRESHOLD_STYLE)
        names = ("channel", "y", "x") if len(index) == 3 else ("neuron",)
        place = [f"{name} {i}" for name, i in zip(names, index, strict=True)]
        axis.set_title(", ".join(place), loc="left", fontsize=10)
    utils.show_time(axes[:, 0], len(spk), recording.time_axis)
    figure.supylabel("membrane potential (thresholds)", fontsize=11)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    title = f"{recording.heading}\nmembrane potentials of {layer}: {len(chosen)} {which}"
    utils.save_figure(figure, title, path)


def plot_output_membranes(
    recording: Recording, layer: str, spk, mem, thresholds, path: Path
) -> None:
    """Draw the membrane potentials [T, 10] of the output neurons, and the true digit's threshold.

    mem and thresholds are in units of the threshold at rest.
    """
    label = recording.label
    others = [digit for digit in mem.mean(0).argsort().tolist() if digit != label]
    strongest = others[-1]
    styles = {digit: {"color": PALE, "lw": 1} for digit in others}
    styles[others[0]]["label"] = "the other digits"
    styles[strongest] = {"color": BLUE, "lw": 1, "label": f"{strongest}, the strongest other"}
    styles[label] = {"color": TRUE_DIGIT, "lw": 2, "label": f"{label}, the true digit"}
    figure, axis = utils.subplots((9, 5))
    for digit, style in styles.items():  # the true digit last, above the others
        draw_trace(axis, spk[:, digit], mem[:, digit], style, {"color": style["color"]})
    axis.plot([], [], color=GREY, label="spike", **SPIKE_STYLE)
    axis.plot(range(1, len(mem) + 1), thresholds[:, label], **THRESHOLD_STYLE)
    axis.set_ylabel("membrane potential (thresholds)")
    utils.show_time([axis], len(mem), recording.time_axis)
    figure.legend(loc="outside lower center", ncols=3)
    utils.save_figure(figure, f"{recording.heading}\nmembrane potentials of {layer}", path)


# --- The test set ---------------------------------------------------------------------------------


@torch.no_grad()
def draw_test_set(
    network: SpikingNetwork, data: nmnist.Data, tsne_samples: int, seed: int, name: str, folder
) -> None:
    """Draw firing rates of the test recordings, and a t-SNE of `tsne_samples` random ones."""
    order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(seed))
    features, predictions = [], []
    with utils.progress("test", total=len(order)) as bar, ActivityMeter(network) as meter:
        for frames, batch_labels in data.test.batches(order, BATCH_SIZE):
            predictions.append(models.predict(*network(frames), network.config.readout).cpu())
            layers = list(meter.outputs)
            last_hidden = layers[-2] if len(layers) > 1 else layers[-1]  # before the output
            features.append(meter.outputs[last_hidden][0].sum(0).flatten(1).cpu())
            bar.update(len(batch_labels))
    predictions, labels = torch.cat(predictions), data.test.labels.cpu()[order]
    accuracy = (predictions == labels).double().mean()
    heading = f"{name}: {accuracy:.2%} correct of {len(order):,} test recordings"

    rates = {layer: meter.firing_rate(layer) for layer in meter.outputs}
    title = f"{heading}\nmean firing rates"
    plot_firing_rates(rates, data.time_axis, title, folder / "firing_rates.png")

    features = torch.cat(features)[:tsne_samples].numpy()
    labels, predictions = labels[:tsne_samples].numpy(), predictions[:tsne_samples].numpy()
    if (features == features[0]).all():  # on which scikit-learn crashes
        utils.warn(f"no t-SNE is drawn: {last_hidden} answers every recording alike")
        return
    print(f"t-SNE       of {len(features):,} recordings", flush=True)  # it shows no progress
    tsne = TSNE(perplexity=min(30, (len(features) - 1) / 3), init="pca", random_state=seed)
    points = tsne.fit_transform(features)
    title = f"{heading}\nt-SNE of the spike counts of {last_hidden}, {len(points):,} recordings"
    plot_tsne(points, labels, predictions, title, folder / "tsne" / "tsne_features.png")


def plot_tsne(points, labels, predictions, title: str, path: Path) -> None:
    """Draw points [N, 2] in the colours of their labels [N], and mark mistakes."""
    figure, axis = utils.subplots((8, 6.5))
    for digit, colour in enumerate(DIGIT_COLOURS):
        cloud = points[labels == digit]
        axis.scatter(*cloud.T, s=14, color=colour, label=str(digit), lw=0)
        if len(cloud):
            outline = withStroke(linewidth=3, foreground="white")
            style = {"size": 14, "weight": "bold", "path_effects": [outline]}
            axis.text(*np.median(cloud, 0), digit, ha="center", va="center", **style)
    mistakes = predictions != labels
    style = {"s": 70, "facecolors": "none", "edgecolors": "black", "lw": 1}
    axis.scatter(*points[mistakes].T, **style, label=f"mistake ({mistakes.sum()})")
    axis.set(xlabel="t-SNE dimension 1", ylabel="t-SNE dimension 2")
    axis.grid(False)
    figure.legend(loc="outside right center", title="digit")
    utils.save_figure(figure, title, path)


def plot_firing_rates(
    rates: dict[str, torch.Tensor], time_axis: utils.TimeAxis, title: str, path: Path
) -> None:
    """Draw each layer's firing rate [T] over time; its mean over all steps stands beside it."""
    figure, axis = utils.subplots((9, 5))
    for i, (layer, rate) in enumerate(rates.items()):
        colour = matplotlib.colormaps["viridis"](i / len(rates))
        label = f"{layer}, mean {rate.mean():.3f}"
        axis.plot(range(1, len(rate) + 1), rate, color=colour, lw=2, label=label)
    axis.set(ylabel="spikes per neuron and step", ylim=(0, None))
    utils.show_time([axis], len(rate), time_axis)
    figure.legend(loc="outside right center")
    utils.save_figure(figure, title, path)


if __name__ == "__main__":
    utils.run_script(main)
