"""Look inside a trained network: spikes, membrane potentials, features and firing rates of its layers.

python visualize_activations.py --model cnn                    # the output layer
python visualize_activations.py --model cnn --visualize_all    # every layer, t-SNE, firing rates
python visualize_activations.py --model resnet --visualize_all --sample 7
"""

import utils  # must be first: Ctrl-C during the slow imports below exits with one line

# isort: split
import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
from sklearn.manifold import TSNE
from snntorch import spikeplot
from tqdm import tqdm

import nmnist
from models import ALIF, NETWORKS, SpikingNetwork, predict
from train_nmnist import merge_settings, rebuild_network
from utils import UserError, number

BATCH_SIZE = 100
NUM_TRACES = 5  # hidden neurons whose membrane potential is drawn
DIGIT_COLOURS = sns.color_palette("colorblind", 10)
PALE = "#999999"


class LayerRecorder(dict):
    """Records the (spk, mem) of each neuron layer, by name and in float32, while open as a context manager.

    It uses forward hooks, and changes nothing in the network. Of several passes, it keeps the last.
    """

    def __init__(self, network: SpikingNetwork):
        super().__init__()
        self.network = network

    def __enter__(self):
        def record(name):
            return lambda _layer, _inputs, outputs: self.update({name: tuple(x.float() for x in outputs)})

        layers = self.network.neuron_layers()
        self._hooks = [layer.register_forward_hook(record(name)) for name, layer in layers.items()]
        return self

    def __exit__(self, *_):
        for hook in self._hooks:
            hook.remove()


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the script's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    utils.add_flag(parser, "--model", "cnn", "network", choices=list(NETWORKS))
    text = "draw every layer, t-SNE and firing rates, not the output alone"
    parser.add_argument("--visualize_all", action="store_true", help=text)
    text = "index of the test recording whose activity is drawn"
    utils.add_flag(parser, "--sample", 0, text, type=number(int, 0))
    text = "most active neurons that are drawn of a larger layer"
    utils.add_flag(parser, "--num_neurons", 100, text, type=number(int, 1))
    utils.add_flag(parser, "--tsne_samples", 2000, "test recordings in the t-SNE, at most", type=number(int, 5))
    utils.add_flag(parser, "--seed", 0, "seed of t-SNE", type=number(int, 0, 2**32 - 1))
    utils.add_flag(parser, "--save_dir", "./checkpoints", "folder of checkpoints")
    utils.add_flag(parser, "--output_dir", "./activations", "folder of figures")
    utils.add_device_argument(parser)
    nmnist.add_data_arguments(parser)
    return parser


def plot_raster(spk: torch.Tensor, layer: str, num_neurons: int, heading: str, path: Path) -> None:
    """Draw the spikes [T, N] of one layer: time steps against neurons."""
    time_steps, neurons = spk.shape
    shown = spk.sum(0).topk(min(num_neurons, neurons)).indices.sort().values
    figure, axis = plt.subplots(figsize=(9, 4.8))
    spikeplot.raster(spk[:, shown], axis, s=max(7, 600 / len(shown)), c=utils.BLUE, marker="s", linewidths=0)
    which = f"the {len(shown)} most active of {neurons:,} neurons" if len(shown) < neurons else f"{neurons} neurons"
    axis.set_title(f"{heading}\nspikes of {layer}, {which}; firing rate of the layer {spk.mean():.3f}")
    axis.set(xlabel="time step", xlim=(-0.5, time_steps - 0.5), ylim=(-0.7, len(shown) - 0.3))
    if neurons == nmnist.NUM_DIGITS:
        axis.set(ylabel="output neuron (digit)", yticks=range(neurons))
    else:
        axis.set_ylabel("neuron" if len(shown) == neurons else "neuron, counted among those shown")
    axis.xaxis.get_major_locator().set_params(integer=True)
    utils.save_figure(figure, path)


def plot_membranes(spk, mem, thresholds, layer: str, heading: str, path: Path) -> None:
    """Draw the membrane potentials [T, N] of a hidden layer's most active neurons, thresholds and spikes."""
    shown = spk.sum(0).topk(min(NUM_TRACES, spk.shape[1])).indices
    steps = np.arange(len(spk))
    figure, axes = plt.subplots(len(shown), 1, figsize=(9, 1.5 * len(shown) + 1.2), sharex=True, squeeze=False)
    for axis, neuron in zip(axes[:, 0], shown, strict=True):
        axis.plot(steps, mem[:, neuron], color=utils.BLUE, label="membrane potential")
        axis.plot(steps, thresholds[:, neuron], "--", color=utils.GREY, label="threshold")
        fired = spk[:, neuron] > 0
        axis.plot(steps[fired], mem[fired, neuron], "o", color=utils.ORANGE, ms=5, label="spike")
        axis.set_ylabel(f"neuron {neuron}")
    axes[-1, 0].set_xlabel("time step")
    axes[-1, 0].xaxis.get_major_locator().set_params(integer=True)
    figure.supylabel("membrane potential")
    figure.suptitle(
        f"{heading}\nmembrane potentials of {layer}: the {len(shown)} most active of {spk.shape[1]:,} neurons"
    )
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    utils.save_figure(figure, path)


def plot_output_membranes(spk, mem, threshold: float, label: int, heading: str, path: Path) -> None:
    """Draw the membrane potentials [T, 10] of the output neurons, the correct digit in front."""
    steps = np.arange(len(mem))
    figure, axis = plt.subplots(figsize=(9, 5))
    for digit in range(nmnist.NUM_DIGITS):
        correct = digit == label
        colour = utils.ORANGE if correct else PALE
        style = {"color": colour, "lw": 2.4 if correct else 1, "zorder": 3 if correct else 2}
        axis.plot(steps, mem[:, digit], **style)
        fired = spk[:, digit] > 0
        axis.plot(steps[fired], mem[fired, digit], "o", ms=5, color=colour, zorder=style["zorder"])
    name_traces(axis, mem, label)
    axis.axhline(threshold, color=utils.BLUE, linestyle="--", lw=1)
    axis.plot([], [], color=utils.ORANGE, lw=2.4, label=f"digit {label}, the correct one")
    axis.plot([], [], color=PALE, label="the other digits")
    axis.plot([], [], "o", color=utils.GREY, label="spike")
    axis.plot([], [], "--", color=utils.BLUE, label="threshold")
    axis.set(xlabel="time step", ylabel="membrane potential", xlim=(0, len(mem) * 1.06 - 0.5))
    axis.set_title(f"{heading}\nmembrane potentials of lif_out")
    axis.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower center", ncols=4)
    utils.save_figure(figure, path)


def name_traces(axis: plt.Axes, mem: torch.Tensor, label: int) -> None:
    """Write each trace's digit at its end, moved apart where the ends are too close."""
    low, high = axis.get_ylim()
    gap = (high - low) / 24
    y = -np.inf
    for digit in mem[-1].argsort().tolist():
        y = max(float(mem[-1, digit]), y + gap)
        style = {"color": utils.ORANGE, "weight": "bold"} if digit == label else {"color": utils.GREY}
        axis.annotate(
            str(digit),
            (len(mem) - 1, float(mem[-1, digit])),
            (len(mem) - 1 + len(mem) * 0.025, y),
            va="center",
            arrowprops={"arrowstyle": "-", "color": "#cccccc", "lw": 0.6},
            **style,
        )


def plot_tsne(features, labels, predictions, seed: int, heading: str, layer: str, path: Path) -> None:
    """Draw the spike counts [N, features] of the last hidden layer in two dimensions, coloured by digit."""
    if bool((features == features[0]).all()):  # scikit-learn crashes on points that are all the same
        print(f"t-SNE       not drawn: {layer} answers every recording alike", file=sys.stderr)
        return
    print(f"t-SNE       of {len(features):,} recordings", flush=True)  # scikit-learn shows no progress
    perplexity = min(30, (len(features) - 1) / 3)
    points = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(features.numpy())
    figure, axis = plt.subplots(figsize=(8, 6.5))
    for digit in range(nmnist.NUM_DIGITS):
        chosen = labels == digit
        axis.scatter(*points[chosen].T, s=14, color=DIGIT_COLOURS[digit], label=str(digit), lw=0)
        if chosen.any():
            centre = np.median(points[chosen], axis=0)
            axis.text(*centre, str(digit), fontsize=20, weight="bold", alpha=0.55, ha="center", va="center")
    mistakes = predictions != labels
    axis.scatter(
        *points[mistakes].T, s=70, facecolors="none", edgecolors="black", lw=1, label=f"mistake ({int(mistakes.sum())})"
    )
    axis.set(xlabel="t-SNE dimension 1", ylabel="t-SNE dimension 2")
    axis.set_title(f"{heading}\nt-SNE of the spike counts of {layer}, {len(labels):,} test recordings")
    axis.grid(False)
    figure.legend(loc="outside right center", title="digit")
    utils.save_figure(figure, path)


def plot_firing_rates(rates: dict[str, torch.Tensor], num_recordings: int, heading: str, path: Path) -> None:
    """Draw each layer's mean firing rate [T] over time, and over all steps."""
    figure, (over_time, mean) = plt.subplots(1, 2, figsize=(11, 4.5), width_ratios=(2, 1))
    for i, (layer, rate) in enumerate(rates.items()):
        colour = plt.get_cmap("viridis")(i / len(rates))
        over_time.plot(rate, color=colour, label=layer, lw=2)
        mean.barh(layer, float(rate.mean()), color=colour)
        mean.text(float(rate.mean()), i, f" {rate.mean():.3f}", va="center")
    over_time.set(xlabel="time step", ylabel="spikes per neuron and step", ylim=(0, None))
    over_time.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower center", ncols=len(rates), fontsize=9)
    mean.set(xlabel="mean over all steps", xlim=(0, 1.25 * max(0.01, *(float(rate.mean()) for rate in rates.values()))))
    mean.invert_yaxis()
    figure.suptitle(f"{heading}\nfiring rates, mean over {num_recordings:,} test recordings")
    utils.save_figure(figure, path)


@torch.no_grad()
def run_test_set(network: SpikingNetwork, frames: nmnist.Frames) -> dict:
    """Run the network over the test recordings in random order.

    Returns `features` [N, hidden] (spike counts of the last hidden layer), `labels` [N], `predictions` [N] and
    `rates`, by layer: spikes per neuron at each step, [T].
    """
    order = torch.randperm(len(frames), generator=torch.Generator().manual_seed(0))
    features, labels, predictions, totals = [], [], [], {}
    with tqdm(desc="test", total=len(order), unit="recording", leave=False) as bar:
        for x, batch_labels in frames.batches(order, BATCH_SIZE):
            with LayerRecorder(network) as layers:
                spk, mem = network(x)
            for name, (layer_spk, _) in layers.items():
                rate = layer_spk.flatten(2).mean(2).sum(1).cpu()
                totals[name] = totals.get(name, 0) + rate
            last_hidden = list(layers)[-2]
            features.append(layers[last_hidden][0].sum(0).flatten(1).cpu())
            labels.append(batch_labels.cpu())
            predictions.append(predict(spk, mem, network.config.readout).cpu())
            bar.update(len(batch_labels))
    return {
        "features": torch.cat(features),
        "labels": torch.cat(labels),
        "predictions": torch.cat(predictions),
        "rates": {name: total / len(order) for name, total in totals.items()},
    }


def draw_layers(network, layers: dict, names: list[str], label: int, heading: str, args) -> None:
    """Draw spikes and membrane potentials of the layers `names`, of one recording (a batch of one)."""
    output_dir = Path(args.output_dir)
    for name in names:
        spk, mem = (values[:, 0].flatten(1) for values in layers[name])
        neuron = network.neuron_layers()[name].neuron
        if isinstance(neuron, ALIF):
            thresholds = neuron.thresholds(spk)
        else:
            thresholds = torch.full_like(mem, float(neuron.threshold))
        spk, mem, thresholds = spk.cpu(), mem.cpu(), thresholds.cpu()
        plot_raster(spk, name, args.num_neurons, heading, output_dir / "spikes" / f"spike_pattern_{name}.png")
        path = output_dir / "membrane" / f"membrane_potential_{name}.png"
        if name == "lif_out":
            plot_output_membranes(spk, mem, float(neuron.threshold), label, heading, path)
        else:
            plot_membranes(spk, mem, thresholds, name, heading, path)


def main(argv: list[str] | None = None) -> None:
    args, checkpoint = parse_args(argv)
    device = utils.pick_device(args.device)
    utils.prepare_device(device)
    data = nmnist.load_data(args, device)
    if args.sample >= len(data.test):
        raise UserError(f"--sample {args.sample}: there are {len(data.test):,} test recordings, counted from 0")
    path = utils.checkpoint_path(args.save_dir, args.model, "best")
    network = rebuild_network(checkpoint, path, device).eval()
    name = f"{network.title} on {data.name}"
    trained_on = checkpoint["data"]["data set"]
    if trained_on != data.name:
        name = f"{network.title}, trained on {trained_on}, on {data.name}"
        utils.warn(f"trained on {trained_on}, drawn on {data.name}")
    with utils.locked(args.output_dir, "figures"):
        draw_recording(network, data.test, name, args)
        if args.visualize_all:
            draw_test_set(network, data.test, name, args)


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, dict]:
    """Return the flags and the best checkpoint, which says how recordings are binned."""
    parser = make_parser()
    args = parser.parse_args(argv)
    utils.check_writable("--output_dir", args.output_dir)
    checkpoint = utils.load_checkpoint(utils.checkpoint_path(args.save_dir, args.model, "best"), args.model)
    settings = {name: checkpoint["settings"][name] for name in nmnist.FRAME_FLAGS}
    args, different = merge_settings(parser, argv, settings)
    for flag, given, trained in different:
        print(f"settings    --{flag} {given} is ignored: the network was trained with {trained}")
        setattr(args, flag, trained)
    args.dataset = nmnist.trained_dataset(args.dataset, args.data_dir, checkpoint["data"]["data set"])
    return args, checkpoint


def draw_recording(network: SpikingNetwork, frames: nmnist.Frames, name: str, args: argparse.Namespace) -> None:
    """Draw the output layer's activity during the recording `--sample`; with `--visualize_all`, every layer's."""
    x, label = frames.batch(torch.tensor([args.sample]))
    with torch.no_grad(), LayerRecorder(network) as layers:
        prediction = int(predict(*network(x), network.config.readout))
    heading = f"{name}, test recording {args.sample}: a {int(label)}, read as {prediction}"
    names = list(layers) if args.visualize_all else ["lif_out"]
    draw_layers(network, layers, names, int(label), heading, args)


def draw_test_set(network: SpikingNetwork, frames: nmnist.Frames, name: str, args: argparse.Namespace) -> None:
    """Draw t-SNE and firing rates over the test recordings."""
    output_dir, tested = Path(args.output_dir), run_test_set(network, frames)
    accuracy = (tested["predictions"] == tested["labels"]).double().mean()
    heading = f"{name}: {accuracy:.2%} of {len(frames):,} test recordings"
    shown = (tested[key][: args.tsne_samples] for key in ("features", "labels", "predictions"))
    last_hidden = list(tested["rates"])[-2]
    plot_tsne(*shown, args.seed, heading, last_hidden, output_dir / "tsne" / "tsne_features.png")
    plot_firing_rates(tested["rates"], len(frames), heading, output_dir / "firing_rates.png")


if __name__ == "__main__":
    utils.run_script(main)
