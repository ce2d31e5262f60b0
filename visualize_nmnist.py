"""Draw N-MNIST recordings: frames, events in space and time, event rates, mean digits, animations.

python visualize_nmnist.py --num_samples 10            # recordings of the training part
python visualize_nmnist.py --split test --digit 7      # only recordings of a 7
python visualize_nmnist.py --animate                   # also one recording as an animation
"""

import argparse
import functools
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tonic
from matplotlib.animation import PillowWriter
from tqdm import tqdm

import nmnist
import utils
from nmnist import NMNIST, SENSOR_SIZE
from utils import OFF_COLOUR, ON_COLOUR, UserError, number

MAX_COLUMNS = 12  # frames shown of a recording; of more time steps, evenly spaced ones
RATE_MS = 5  # bin of the event rate
RECORDINGS_PER_DIGIT = 100  # averaged for a mean event image
GIF_FRAME_MS = 5  # that a frame of an animation spans
SLOW_DOWN = 10  # how many times longer it is shown

Sample = tuple[int, np.ndarray, int]  # a recording's index in its split, its events, its digit


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the script's flags."""
    parser = utils.make_parser(__doc__)
    flag = functools.partial(utils.add_flag, parser)
    flag("--num_samples", 10, "recordings to draw", type=number(int, 1, 100))
    flag("--split", "train", "part of the data set", choices=nmnist.SPLITS)
    flag("--digit", None, "draw only this digit (default: all)", type=int, choices=range(10))
    flag("--seed", 0, "seed of the choice", type=number(int, 0, 2**32 - 1))
    flag("--output_dir", "./visualizations", "folder of figures")
    flag("--animate", False, "animate the first recording (GIF)")
    nmnist.add_data_flags(parser)
    nmnist.add_frame_flags(parser)
    return parser


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
    turns = utils.occurrences(labels[order])  # so that ten samples show all digits
    chosen = order[np.argsort(turns, kind="stable")][:num_samples]
    chosen = chosen[np.argsort(labels[chosen], kind="stable")]
    samples = [
        (int(i), nmnist.denoise_events(recordings[i][0], denoise), int(labels[i])) for i in chosen
    ]
    for index, events, _ in samples:
        if len(events) == 0:
            path = recordings.files[index]
            raise UserError(f"{path} has no events left: choose a longer --denoise, fewer options")
    return samples


def plot_samples(
    samples: list[Sample], time_steps: int, bin_by: str, title: str, path: Path
) -> None:
    """Draw one row per recording, its frames over time as columns, all on the same scale."""
    bins = {"n_time_bins": time_steps} if bin_by == "time" else {"n_event_bins": time_steps}
    to_frame = tonic.transforms.ToFrame(sensor_size=SENSOR_SIZE, **bins)
    frames = np.stack([to_frame(events) for _, events, _ in samples])  # [samples, T, 2, 34, 34]
    steps = np.linspace(0, time_steps - 1, min(time_steps, MAX_COLUMNS)).round().astype(int)
    full = max(1.0, np.quantile(frames[frames > 0], 0.95)) if frames.any() else 1.0
    size = (max(7, 0.95 * len(steps) + 0.8), 0.95 * len(samples) + 1.2)  # wide enough for titles
    figure, axes = plt.subplots(len(samples), len(steps), figsize=size, squeeze=False)
    duration = np.mean([events["t"][-1] - events["t"][0] for _, events, _ in samples]) / 1000
    for row, (_, _, digit) in enumerate(samples):
        for column, step in enumerate(steps):
            axis = axes[row, column]
            axis.imshow(utils.event_image(frames[row, step], full), interpolation="nearest")
            utils.show_border(axis)
            if row == 0:
                time = f"{(step + 0.5) * duration / time_steps:.0f} ms"
                axis.set_title(time if bin_by == "time" else f"frame {step + 1}", fontsize=9)
        axes[row, 0].set_ylabel(digit, rotation=0, fontsize=16, labelpad=14, va="center")
    shown = "" if len(steps) == time_steps else f", {len(steps)} of them shown"
    span = f"{duration / time_steps:.0f} ms" if bin_by == "time" else "equal event count"
    figure.suptitle(f"{title}\n{time_steps} frames of {span}{shown}")
    utils.polarity_legend(figure)
    figure.supylabel("digit")
    utils.save_figure(figure, path)


def plot_events_3d(sample: Sample, title: str, path: Path) -> None:
    """Draw one recording's events as a cloud over x, y and time, coloured by polarity."""
    index, events, digit = sample
    figure = plt.figure(figsize=(10, 5))
    axis = figure.add_subplot(projection="3d")
    for polarity, colour in ((1, ON_COLOUR), (0, OFF_COLOUR)):
        chosen = events[events["p"] == polarity]
        # y points down on the sensor: the axis is turned, so that the digit stands upright.
        style = {"s": 5, "c": colour, "alpha": 0.8, "lw": 0, "depthshade": False}
        # The box is wider than the axes that hold it, which would cut off its ends.
        axis.scatter(chosen["t"] / 1000, chosen["x"], chosen["y"], clip_on=False, **style)
    axis.set_box_aspect((2.6, 1, 1), zoom=1.5)
    axis.set(xlabel="time (ms)", ylabel="x (pixels)", zlabel="y (pixels)")
    axis.set(ylim=(0, 33), zlim=(33, 0))
    axis.set(yticks=(0, 15, 30), zticks=(0, 15, 30))  # 33 of both would meet in a corner
    axis.xaxis.labelpad = 14
    axis.view_init(elev=18, azim=-62)
    figure.suptitle(f"{title}: digit {digit}, recording {index}, {len(events):,} events")
    utils.polarity_legend(figure)
    utils.save_figure(figure, path)


def plot_event_rate(samples: list[Sample], title: str, path: Path) -> None:
    """Draw events per ms over time by polarity: mean and standard deviation over the samples."""
    end = max(events["t"].max() for _, events, _ in samples) / 1000
    edges = np.arange(0, end + RATE_MS, RATE_MS)
    figure, axis = plt.subplots(figsize=(9, 4.5))
    for polarity, colour, label in ((1, ON_COLOUR, "ON"), (0, OFF_COLOUR, "OFF")):
        times = [events["t"][events["p"] == polarity] / 1000 for _, events, _ in samples]
        rates = np.stack([np.histogram(ms, edges)[0] / RATE_MS for ms in times])
        mean, spread = rates.mean(0), rates.std(0)
        centres = edges[:-1] + RATE_MS / 2
        axis.plot(centres, mean, color=colour, label=f"{label}, mean of {len(samples)} recordings")
        low = np.maximum(mean - spread, 0)
        axis.fill_between(centres, low, mean + spread, color=colour, alpha=0.2, lw=0)
    axis.fill_between([], [], color=utils.GREY, alpha=0.2, label="± standard deviation")
    axis.set(xlim=(0, edges[-1]), ylim=(0, None), title=title)
    axis.set(xlabel="time (ms)", ylabel="events per ms")
    top = axis.get_ylim()[1]
    axis.set_ylim(0, 1.12 * top)
    for saccade, (start, stop) in enumerate(pairwise((0, *nmnist.SACCADE_ENDS)), start=1):
        if start >= end:
            break  # of first saccades alone
        axis.axvline(stop, color=utils.GREY, linestyle="--", lw=1)
        axis.text((start + stop) / 2, 1.1 * top, f"saccade {saccade}", ha="center", va="top")
    figure.legend(loc="outside lower center", ncols=3)
    utils.save_figure(figure, path)


def plot_digits(
    recordings: NMNIST, digit: int | None, denoise: int | None, title: str, path: Path
) -> None:
    """Draw the mean event image of each digit, or of `digit` alone, over its first recordings."""
    labels = np.array(recordings.labels)
    digits = range(10) if digit is None else [digit]
    to_image = tonic.transforms.ToImage(sensor_size=SENSOR_SIZE)
    means, counts = {}, {}
    for d in tqdm(digits, desc="mean digits", unit="digit", leave=False):
        indices = np.flatnonzero(labels == d)[:RECORDINGS_PER_DIGIT]
        total = np.zeros((34, 34))
        for index in indices:
            events = nmnist.denoise_events(recordings[index][0], denoise)
            total += to_image(events).sum(0) if len(events) else 0
        means[d], counts[d] = total / len(indices), len(indices)
    full = np.quantile(np.stack(list(means.values())), 0.995)  # so that hot pixels pale no others
    rows, columns, size = (2, 5, (12.5, 5.6)) if digit is None else (1, 1, (7, 5.6))
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for axis, d in zip(axes.flat, digits, strict=True):
        image = axis.imshow(means[d], cmap="magma_r", vmin=0, vmax=full, interpolation="nearest")
        axis.set_title(f"{d}  ({counts[d]} recordings)", fontsize=10)
        axis.set(xticks=[0, 16, 33], yticks=[0, 16, 33])
        axis.grid(False)
    figure.colorbar(image, ax=axes, label="mean events per pixel", extend="max", shrink=0.8)
    figure.supxlabel("x (pixels)", fontsize=10)
    figure.supylabel("y (pixels)", fontsize=10)
    what = "each digit" if digit is None else f"digit {digit}"
    figure.suptitle(f"{title}\nmean event image of {what}")
    utils.save_figure(figure, path)


def animate(sample: Sample, title: str, path: Path) -> None:
    """Write one recording as a GIF, `SLOW_DOWN` times slower than it was."""
    index, events, digit = sample
    num_frames = max(1, int(np.ceil((events["t"][-1] + 1) / (1000 * GIF_FRAME_MS))))
    frames, frame = np.zeros((num_frames, 2, 34, 34)), events["t"] // (1000 * GIF_FRAME_MS)
    np.add.at(frames, (frame, events["p"], events["y"], events["x"]), 1)
    figure, axis = plt.subplots(figsize=(4.2, 4.8))
    image = axis.imshow(utils.event_image(frames[0], 2), interpolation="nearest")
    axis.set(xlabel="x (pixels)", ylabel="y (pixels)")
    axis.grid(False)
    heading = f"{title}\ndigit {digit}, recording {index}, {SLOW_DOWN} times slower"
    figure.suptitle(heading, fontsize=10)
    utils.polarity_legend(figure)
    axis.set_title(f"0 to {GIF_FRAME_MS} ms", fontsize=10)
    figure.canvas.draw()
    figure.set_layout_engine("none")  # laid out once: for each frame it takes most of the time
    writer = PillowWriter(fps=1000 / (GIF_FRAME_MS * SLOW_DOWN))
    with utils.atomic_path(path) as temporary, writer.saving(figure, temporary, dpi=80):
        for i in tqdm(range(num_frames), "animation", unit="frame", leave=False):
            image.set_data(utils.event_image(frames[i], 2))
            axis.set_title(f"{i * GIF_FRAME_MS} to {(i + 1) * GIF_FRAME_MS} ms", fontsize=10)
            writer.grab_frame()
    plt.close(figure)
    print(f"animation   {path}")


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    options = {"first_saccade_only": args.first_saccade_only, "stabilize": args.stabilize}
    (recordings,) = nmnist.open_recordings(args.data_dir, args.dataset, [args.split], **options)
    samples = choose_samples(recordings, args.num_samples, args.digit, args.seed, args.denoise)
    output_dir = Path(args.output_dir)
    part = "training" if args.split == "train" else "test"
    title = f"{nmnist.name_of(recordings)}, {part} recordings"
    if args.denoise:
        title += f", denoised at {args.denoise:,} microseconds"
    plot_samples(samples, args.time_steps, args.bin_by, title, output_dir / "samples.png")
    plot_events_3d(samples[0], title, output_dir / "events_3d.png")
    plot_event_rate(samples, title, output_dir / "event_rate.png")
    plot_digits(recordings, args.digit, args.denoise, title, output_dir / "digits.png")
    if args.animate:
        animate(samples[0], title, output_dir / f"sample_{samples[0][0]}.gif")


if __name__ == "__main__":
    utils.run_script(main)
