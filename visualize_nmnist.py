"""Draw N-MNIST recordings: frames, events in space and time, event rates, mean digits, animations.

python visualize_nmnist.py --num_samples 10            # recordings of the training part
python visualize_nmnist.py --split test --digit 7      # only recordings of a 7
python visualize_nmnist.py --animate                   # also one recording as an animation
"""

import utils  # isort: skip  # before matplotlib: it removes a notebook's MPLBACKEND

import argparse
import functools
import math
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tonic
from matplotlib.animation import PillowWriter
from matplotlib.figure import Figure

import nmnist
from nmnist import NMNIST, SENSOR_SIZE
from utils import UserError, number

MAX_COLUMNS = 12  # frames shown of a recording; of more time steps, evenly spaced ones
RATE_MS = 5  # bin of the event rate
SNAPSHOT_MS = 20  # in the middle of a saccade: long enough for a digit, too short to blur it
RECORDINGS_PER_DIGIT = 100  # averaged for a mean event image
GIF_FRAME_MS = 5  # of the recording, in a frame of an animation
GIF_FULL = 2  # events of a pixel that are drawn in full colour
SLOW_DOWN = 10  # an animation is this many times slower than the recording
PIXELS = (0, 10, 20, 30)  # ticks
SACCADES = tuple(pairwise((0, *nmnist.SACCADE_ENDS)))  # start and end in ms


class Sample(NamedTuple):
    """A recording that is drawn."""

    index: int  # in its part of the data set
    events: np.ndarray
    digit: int


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the script's flags."""
    parser = utils.make_parser(__doc__)
    flag = functools.partial(utils.add_flag, parser)
    flag("--num_samples", 10, "recordings to draw", type=number(int, 1, 100))
    flag("--split", "train", "part of the data set", choices=nmnist.SPLITS)
    flag("--digit", None, "draw only this digit (default: all)", type=int, choices=range(10))
    flag("--seed", 0, "seed of the choice", type=number(int, 0, 2**32 - 1))
    flag("--output_dir", "./visualizations", "folder of figures", type=utils.file_path)
    flag("--animate", False, "animate the first recording (GIF)")
    nmnist.add_data_flags(parser)
    nmnist.add_frame_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    options = {"first_saccade_only": args.first_saccade_only, "stabilize": args.stabilize}
    (recordings,) = nmnist.open_recordings(args.data_dir, args.dataset, [args.split], **options)
    samples = choose_samples(recordings, args.num_samples, args.digit, args.seed, args.denoise)
    digits = list(range(10)) if args.digit is None else [args.digit]
    folder = Path(args.output_dir)
    part = "training" if args.split == "train" else "test"
    name = f"{nmnist.data_set_name(recordings)}, {part} recordings"
    if args.denoise:
        name += f", denoised at {args.denoise:,} microseconds"
    title = name if args.digit is None else f"{name}, digit {args.digit}"
    first = samples[0]
    what = f"digit {first.digit}, recording {first.index}, {len(first.events):,} events"
    first_title = f"{name}\n{what}"
    plot_samples(samples, args.time_steps, args.bin_by, title, folder / "samples.png")
    plot_events_3d(first.events, first_title, folder / "events_3d.png")
    plot_event_rate(event_rates(samples), title, folder / "event_rate.png")
    plot_digits(mean_images(recordings, digits, args.denoise), title, folder / "digits.png")
    if args.animate:
        animate(first.events, first_title, folder / f"sample_{first.index}.gif")


# --- Recordings -----------------------------------------------------------------------------------


def choose_samples(
    recordings: NMNIST, num_samples: int, digit: int | None, seed: int, denoise: int | None
) -> list[Sample]:
    """Return `num_samples` random recordings, ordered by digit."""
    labels = np.array(recordings.labels)
    indices = np.flatnonzero(labels == digit) if digit is not None else np.arange(len(labels))
    if num_samples > len(indices):
        what = "" if digit is None else f" of digit {digit}"
        print(f"samples     only {len(indices)} {recordings.split} recordings{what}: all are drawn")
    order = np.random.default_rng(seed).permutation(indices)
    # The digits take turns, so that ten samples show all ten; then they are sorted.
    turns = utils.occurrences(labels[order])
    chosen = order[np.argsort(turns, kind="stable")][:num_samples]
    chosen = chosen[np.argsort(labels[chosen], kind="stable")]
    samples = []
    for index in chosen.tolist():
        events, label = recordings[index]
        events = nmnist.denoise_events(events, denoise)
        if len(events) == 0:
            path = recordings.files[index]
            raise UserError(f"{path} has no events left: choose a longer --denoise, fewer options")
        samples.append(Sample(index, events, label))
    return samples


def event_rates(samples: list[Sample]) -> np.ndarray:
    """Return OFF and ON events per ms of each sample, in bins of RATE_MS, [N, 2, bins]."""
    num_bins = max(int(sample.events["t"][-1]) for sample in samples) // (1000 * RATE_MS) + 1
    rates = np.zeros((len(samples), 2, num_bins))
    for rate, sample in zip(rates, samples, strict=True):
        time_bin = sample.events["t"] // (1000 * RATE_MS)
        np.add.at(rate, (sample.events["p"], time_bin), 1 / RATE_MS)
    return rates


def mean_images(
    recordings: NMNIST, digits: list[int], denoise: int | None
) -> list[tuple[int, int, np.ndarray]]:
    """Return for each digit: the digit, the number of recordings, their mean image [34, 34].

    They are its first recordings, `RECORDINGS_PER_DIGIT` at most.
    """
    labels = np.array(recordings.labels)
    images = []
    for digit in utils.progress("mean digits", digits, unit="digit"):
        indices = np.flatnonzero(labels == digit)[:RECORDINGS_PER_DIGIT]
        total = np.zeros((nmnist.SIDE, nmnist.SIDE))
        for index in indices:
            events = nmnist.denoise_events(recordings[index][0], denoise)
            np.add.at(total, (events["y"], events["x"]), 1)
        images.append((digit, len(indices), total / len(indices)))
    return images


# --- Figures --------------------------------------------------------------------------------------


def plot_samples(
    samples: list[Sample], time_steps: int, bin_by: str, title: str, path: Path
) -> None:
    """Draw one row per recording, its frames over time as columns, all on the same scale."""
    bins = {"n_time_bins": time_steps} if bin_by == "time" else {"n_event_bins": time_steps}
    to_frame = tonic.transforms.ToFrame(sensor_size=SENSOR_SIZE, **bins)
    steps = np.linspace(0, time_steps - 1, min(time_steps, MAX_COLUMNS)).round().astype(int)
    frames = np.stack([to_frame(sample.events)[steps] for sample in samples])
    full = utils.full_count(frames)
    # Squares, below a title of two lines, and no narrower than that title.
    size = (max(7, 0.95 * len(steps) + 0.8), 0.95 * len(samples) + 1.2)
    figure, axes = utils.subplots(size, len(samples), len(steps), squeeze=False)
    mean_duration = np.mean([np.ptp(sample.events["t"]) for sample in samples]) / 1000
    for row, sample in enumerate(samples):
        for column, step in enumerate(steps):
            axis = axes[row, column]
            utils.show_image(axis, utils.event_image(frames[row, column], full))
            if row == 0:
                time = f"{(step + 0.5) * mean_duration / time_steps:.0f} ms"
                axis.set_title(time if bin_by == "time" else f"frame {step + 1}", fontsize=9)
        axes[row, 0].set_ylabel(sample.digit, rotation=0, fontsize=16, labelpad=14, va="center")
    shown = "" if len(steps) == time_steps else f", {len(steps)} of them shown"
    span = f"{mean_duration / time_steps:.0f} ms" if bin_by == "time" else "equal event count"
    utils.polarity_legend(figure)
    figure.supylabel("digit")
    utils.save_figure(figure, f"{title}\n{time_steps} frames of {span}{shown}", path)


def plot_events_3d(events: np.ndarray, title: str, path: Path) -> None:
    """Draw events as a cloud over time, x and y, above an image of the middle of each saccade."""
    figure = Figure((10, 8), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=(2.2, 1))
    cloud_axis = figure.add_subplot(grid[0, :], projection="3d")
    ms = events["t"] / 1000
    for polarity, _, colour in utils.POLARITIES:
        chosen = events["p"] == polarity
        x, y = events["x"][chosen], events["y"][chosen]
        # The box is wider than the axes that hold it, which would cut off its ends.
        style = {"s": 7, "c": colour, "alpha": 0.8, "lw": 0, "depthshade": False, "clip_on": False}
        cloud_axis.scatter(ms[chosen], x, y, **style)
    cloud_axis.set(xlabel="time (ms)", ylabel="x (pixels)", zlabel="y (pixels)")
    # y points down on the sensor: the axis is turned, so that the digit stands upright.
    cloud_axis.set(
        ylim=(0, nmnist.SIDE - 1), zlim=(nmnist.SIDE - 1, 0), yticks=PIXELS, zticks=PIXELS
    )
    cloud_axis.xaxis.labelpad = 14  # points: below the numbers
    # Chosen by eye: time runs along the page, and the box fills it.
    cloud_axis.set_box_aspect((2.8, 1, 1), zoom=1.55)
    cloud_axis.view_init(elev=15, azim=-66)
    for i, (start, stop) in enumerate(SACCADES):
        low = (start + stop - SNAPSHOT_MS) / 2
        inside = events[(ms >= low) & (ms < low + SNAPSHOT_MS)]
        if len(inside):  # else it may be of the first saccade alone
            image = tonic.transforms.ToImage(sensor_size=SENSOR_SIZE)(inside)
            axis = figure.add_subplot(grid[1, i])
            utils.show_image(axis, utils.event_image(image, utils.full_count(image)))
            axis.set_title(f"saccade {i + 1}: {low:.0f} to {low + SNAPSHOT_MS:.0f} ms")
    utils.polarity_legend(figure)
    utils.save_figure(figure, title, path)


def plot_event_rate(rates: np.ndarray, title: str, path: Path) -> None:
    """Draw rates [N, 2, bins] in events per ms over time: mean and standard deviation over N."""
    figure, axis = utils.subplots((9, 4.5))
    centres = RATE_MS * (np.arange(rates.shape[2]) + 0.5)
    for polarity, label, colour in utils.POLARITIES:
        mean, spread = rates[:, polarity].mean(0), rates[:, polarity].std(0)
        axis.plot(centres, mean, color=colour, label=f"{label}, mean of {len(rates)} recordings")
        low = np.maximum(mean - spread, 0)
        band = {"color": colour, "alpha": 0.2, "lw": 0, "label": "± standard deviation"}
        axis.fill_between(centres, low, mean + spread, **band)
    axis.margins(y=0.1)  # room for a line of text
    axis.set(xlim=(0, RATE_MS * rates.shape[2]), ylim=(0, None))
    axis.set(xlabel="time (ms)", ylabel="events per ms")
    style = {"ha": "center", "va": "top", "transform": axis.get_xaxis_transform()}
    style["clip_on"] = True  # no label beyond the last event
    for i, (start, stop) in enumerate(SACCADES, start=1):
        axis.axvline(stop, **utils.SACCADE_END)
        axis.text((start + stop) / 2, 0.98, f"saccade {i}", **style)
    figure.legend(loc="outside lower center", ncols=2)
    utils.save_figure(figure, title, path)


def plot_digits(images: list[tuple[int, int, np.ndarray]], title: str, path: Path) -> None:
    """Draw mean event images on one scale: a digit, the number of recordings, [34, 34]."""
    rows, columns = math.ceil(len(images) / 5), min(5, len(images))
    size = 2.2 * columns + 2, 2.4 * rows + 1  # room for colour bar and title
    figure, axes = utils.subplots(size, rows, columns, squeeze=False)
    stack = [image for _, _, image in images]
    full = np.quantile(stack, 0.995)  # hot pixels would pale the others
    for axis, (digit, count, image) in zip(axes.flat, images, strict=True):
        drawn = axis.imshow(image, cmap="magma_r", vmin=0, vmax=full, interpolation="nearest")
        axis.set_title(f"{digit}  ({count} recordings)", fontsize=10)
        axis.set(xlabel="x (pixels)", ylabel="y (pixels)", xticks=PIXELS, yticks=PIXELS)
        axis.label_outer()
        axis.grid(False)
    figure.colorbar(drawn, ax=axes, label="mean events per pixel", extend="max", shrink=0.8)
    utils.save_figure(figure, f"{title}\nmean events of each pixel", path)


def animate(events: np.ndarray, title: str, path: Path) -> None:
    """Write a recording as a GIF, `SLOW_DOWN` times slower than it was."""
    frame_index = events["t"] // (1000 * GIF_FRAME_MS)
    frames = np.zeros((frame_index[-1] + 1, 2, nmnist.SIDE, nmnist.SIDE))
    np.add.at(frames, (frame_index, events["p"], events["y"], events["x"]), 1)
    figure, axis = utils.subplots((4.2, 4.8))
    image = axis.imshow(utils.event_image(frames[0], GIF_FULL), interpolation="nearest")
    axis.set(xlabel="x (pixels)", ylabel="y (pixels)", xticks=PIXELS, yticks=PIXELS)
    axis.grid(False)
    utils.set_title(figure, f"{title}, {SLOW_DOWN} times slower", fontsize=10)
    utils.polarity_legend(figure)
    axis.set_title(f"0 to {GIF_FRAME_MS} ms", fontsize=10)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once: for each frame it takes most of the time
    writer = PillowWriter(fps=1000 / (GIF_FRAME_MS * SLOW_DOWN))
    with utils.atomic_path(path) as temporary, writer.saving(figure, temporary, dpi=80):
        for i, counts in enumerate(utils.progress("animation", frames, unit="frame")):
            image.set_data(utils.event_image(counts, GIF_FULL))
            axis.set_title(f"{i * GIF_FRAME_MS} to {(i + 1) * GIF_FRAME_MS} ms", fontsize=10)
            writer.grab_frame()
    print(f"animation   {path}")


if __name__ == "__main__":
    utils.run_script(main)
