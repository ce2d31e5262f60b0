"""What every script needs, then the plots of training and testing."""

import os
from importlib.util import find_spec

# Before matplotlib is imported: Jupyter's cells pass their backend on to commands, for which it
# fails in an environment without Jupyter's package.
if "matplotlib_inline" in os.environ.get("MPLBACKEND", "") and not find_spec("matplotlib_inline"):
    del os.environ["MPLBACKEND"]

import argparse
import contextlib
import csv
import ctypes
import datetime
import functools
import hashlib
import io
import json
import math
import platform
import random
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import seaborn as sns
import torch
from filelock import FileLock, Timeout
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

# --- Errors and flags -----------------------------------------------------------------------------


class UserError(Exception):
    """An error that the user can fix. The message is one line: what is wrong, and what to do."""


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`, with a style for figures.

    `UserError` and `OSError` become one line on stderr and status 1, Ctrl-C status 130.
    """
    script = Path(sys.argv[0]).name
    if isinstance(sys.stdout, io.TextIOWrapper):  # not a notebook's
        sys.stdout.reconfigure(errors="backslashreplace")  # names that a console can't encode
    # Trust the processor's own report: inductor's trial of instruction sets takes 7 s once.
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
    try:
        with matplotlib.rc_context(STYLE):
            main()
    except (UserError, OSError) as error:
        sys.exit(f"{script}: error: {error}")
    except KeyboardInterrupt as stop:
        print(f"\n{script}: interrupted. {stop}".rstrip(), file=sys.stderr)
        sys.exit(130)


def warn(text: str) -> None:
    """Print a warning to stderr, in the first process only."""
    if rank() == 0:
        print(f"WARNING: {text}", file=sys.stderr)


def progress(text: str, iterable=None, total: int | None = None, unit="recording") -> tqdm:
    """Return a progress bar, which the first process shows in a terminal, not in a log file."""
    disable = True if rank() > 0 else None  # None: unless stderr is a terminal
    return tqdm(iterable, text, total, leave=False, unit=unit, disable=disable)


def first_line(error: Exception) -> str:
    """Return the first line of an error, which libraries describe in many lines or in none."""
    return (str(error) or type(error).__name__).splitlines()[0]


def make_parser(docstring: str) -> argparse.ArgumentParser:
    """Return a parser whose --help starts with a script's docstring, as it is written."""
    return argparse.ArgumentParser(
        description=docstring,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_flag(parser, flag: str, default, text: str, **options) -> None:
    """Add a flag to a parser or a group of it; if its default is False, it takes no value.

    Its help ends with its default, if it has one.
    """
    if default is False:
        parser.add_argument(flag, action="store_true", help=text)
        return
    if default is not None:
        text += " (default: %(default)s)"
    parser.add_argument(flag, default=default, help=text, **options)


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """Make an argparse type: a finite number from `low` to `high`, both included."""

    def parse(text: str) -> float:
        value = kind(text)
        if value == math.inf or not low <= value <= high:
            limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {limits}")
        return value

    parse.__name__ = kind.__name__  # which argparse names if the text is no number
    return parse


file_path = os.path.expanduser  # an argparse type: shells leave the ~ in --save_dir=~/x


def flag_names(*adders: Callable) -> list[str]:
    """Return the names of the flags that functions such as `add_device_flags` add."""
    parser = argparse.ArgumentParser()
    for add_flags in adders:
        add_flags(parser)
    return list(vars(parser.parse_args([])))


# --- Device and seeds -----------------------------------------------------------------------------

DEVICES = ("cuda", "cpu", "mps")
PRECISIONS = ("auto", "bf16", "fp32")
BACKENDS = ("auto", "fused", "step")  # compiled, or snnTorch's neurons step by step


def set_seed(*parts: int) -> None:
    """Seed all generators from integers, so that (seed, epoch) gives a stream of its own."""
    # The length is included, since to numpy (1,) and (1, 0) are the same seed.
    sequence = np.random.SeedSequence((len(parts), *parts))
    seed = int(sequence.generate_state(1, np.uint64)[0])
    torch.manual_seed(seed)
    random.seed(seed)  # a user's own code may use this, and the next
    np.random.seed(seed % 2**32)  # noqa: NPY002


def add_device_flags(parser) -> None:
    """Add the flags that say on what a network runs, and how."""
    flag = functools.partial(add_flag, parser)
    flag("--device", None, "where to compute (default: cuda where there is one)", choices=DEVICES)
    flag("--precision", "auto", "of layers; auto: as trained, or the fastest", choices=PRECISIONS)
    flag("--neuron_backend", "auto", "of neurons; auto: as trained, or fused", choices=BACKENDS)


def prepare_device(name: str | None) -> torch.device:
    """Return the device `name`, by default cuda if available, else the CPU; make work on it fast.

    Raises `UserError` if this machine has no such device.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    available = {"cpu": True, "cuda": torch.cuda.is_available()}
    available["mps"] = torch.backends.mps.is_available()
    if not available[name]:
        raise UserError(f"--device {name}: PyTorch finds no such device here; choose cpu")
    if name == "cpu":
        keep_freed_memory()
    if name != "cuda":
        return torch.device(name)
    torch.set_float32_matmul_precision("high")  # TF32 for products of float32 matrices
    torch.backends.cudnn.benchmark = True  # tries convolution algorithms once for each shape
    index = int(os.environ["LOCAL_RANK"]) if distributed.is_torchelastic_launched() else 0
    if index >= torch.cuda.device_count():
        raise UserError("torchrun: more processes than GPUs; start fewer, or --device cpu")
    return torch.device("cuda", index)


def keep_freed_memory() -> None:
    """Tell glibc to keep large blocks that are freed; with another C library, do nothing.

    Otherwise the kernel gives each large tensor fresh pages, zeroed at first touch, and training is
    half as fast. The numbers are those of `mallopt` in glibc's malloc.h.
    """
    if sys.platform.startswith("linux") and platform.libc_ver()[0] == "glibc":
        m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
        mallopt = ctypes.CDLL(None).mallopt
        for name, value in ((m_mmap_max, 0), (m_trim_threshold, -1), (m_top_pad, 2**26)):
            mallopt(name, value)


def describe_device(device: torch.device) -> str:
    """Return the device's name, of a CPU with its threads."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else device.type


def versions() -> dict[str, str]:
    """Return the releases that results depend on; torch's names its build: '2.13.0+cpu'."""
    result = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("snntorch", "tonic", "numpy"):
        result[package] = metadata.version(package)
    return result


# --- Several processes ----------------------------------------------------------------------------


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that `torchrun` started, if it did; the first alone prints."""
    launched = distributed.is_torchelastic_launched()  # RANK alone may be set by a cluster
    if launched:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        timeout = datetime.timedelta(hours=2)  # while the first process downloads, bins, tests
        distributed.init_process_group(backend, timeout=timeout)
        if rank() > 0:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    yield
    if launched:
        # Without the barrier, a process that ends may abort: a thread of gloo still holds a tensor.
        distributed.barrier()
        distributed.destroy_process_group()


def rank() -> int:
    """Return this process's number among those that train together."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes that train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def from_first_process(function: Callable):
    """Return, in every process, what `function` returns in the first one."""
    results = [function() if rank() == 0 else None]
    if distributed.is_initialized():
        distributed.broadcast_object_list(results)
    return results[0]


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """Run a block in the first process, then in the others."""
    if rank() > 0:
        distributed.barrier()
    yield
    if rank() == 0 and distributed.is_initialized():
        distributed.barrier()


def data_parallel(network: nn.Module, device: torch.device) -> nn.Module:
    """Return `network` with gradients that are averaged over the processes, if there are several.

    On GPUs its norms measure the whole batch; on a CPU, each process's own share.
    """
    if not distributed.is_initialized():
        return network
    if device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return DistributedDataParallel(network, forward_sync_buffers=False)


# --- Files ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def name_in_errors(path: Path) -> Iterator[None]:
    """Let an `OSError` name `path`: it would name a temporary file, or on a full disk none."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path for a file or new folder, renamed to `path` on success, else removed.

    A reader sees the old file or the new one, never a part of it. The folder is made if missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two processes do not share the name; its suffix tells matplotlib the format.
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        with name_in_errors(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value) -> None:
    """Write `value` to `path` as JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def read_json(path: str | Path):
    """Return the content of a JSON file, None if there is none or it can't be read."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return None


def write_csv(path: str | Path, columns: dict[str, list]) -> None:
    """Write columns, by name, to `path` as CSV with a header, atomically."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def save_tensors(path: str | Path, content: dict) -> None:
    """Write a dictionary of tensors, numbers, strings, lists and dictionaries, atomically."""
    buffer = io.BytesIO()  # to a full disk, torch.save raises a RuntimeError
    torch.save(content, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def keep_earlier_files(*paths: Path) -> None:
    """Rename files of an earlier run to the first free number, such as cnn_best.1.pt."""

    def numbered(path: Path, n: int) -> Path:
        return path.with_name(f"{path.stem}.{n}{path.suffix}")

    n = 1
    while any(numbered(path, n).exists() for path in paths):
        n += 1
    for path in paths:
        if path.exists():
            path.rename(numbered(path, n))
            print(f"earlier     {path.name} kept as {numbered(path, n)}")


@contextlib.contextmanager
def hold_folders(name: str, **folders: str | Path) -> Iterator[None]:
    """Lock folders, such as save_dir="checkpoints", against another run of the network `name`.

    Raises `UserError` if one can't be written to, or is in use; the lock of a killed process is
    free. Of several processes, the first one does it.
    """
    if rank() > 0:
        folders = {}
    with contextlib.ExitStack() as held:
        for flag, folder in folders.items():
            try:
                Path(folder).mkdir(parents=True, exist_ok=True)
                held.enter_context(FileLock(Path(folder) / f".{name}_{flag}.lock", timeout=2))
            except Timeout:
                message = f"--{flag} {folder}: in use by another run of {name}; choose another"
                raise UserError(message) from None
            except OSError as error:
                message = f"--{flag} {folder} can't be written to: {error.strerror}"
                raise UserError(message) from None
        yield


# --- Checkpoints ----------------------------------------------------------------------------------

CHECKPOINT_FORMAT = 10  # increased if older checkpoints can't be used


def load_checkpoint(path: str | Path, needed: Iterable[str] = (), **expected) -> dict:
    """Read onto the CPU a checkpoint of `train_nmnist.py`; no code in it is run.

    It holds `settings`, `data`, `versions`, `history` and `network`; the last checkpoint of a run
    also `best` and `training`. Raises `UserError` if the file is missing, can't be read, lacks a
    part or a setting that is `needed`, has other settings than `expected`, or weights that are not
    finite.
    """
    hint = f"train a network in {Path(path).parent}, or repeat its training command with --resume"
    hint += ", which needs a whole *_last.pt"
    if not Path(path).exists():
        raise UserError(f"no checkpoint at {path}: {hint}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint.get("format") != CHECKPOINT_FORMAT:
            raise ValueError("it is not a checkpoint of this version of the project")
        found = {**checkpoint, **checkpoint["settings"]}
        for name in ("data", "versions", "history", "network", *needed):
            if name not in found or found[name] == []:  # a history of no epoch
                raise ValueError(f"it has no {name}")
        for name, value in expected.items():
            if found[name] != value:
                raise ValueError(f"it is another network's, whose {name} is {found[name]}")
        if not is_finite(checkpoint["network"]):
            raise ValueError("its weights are not finite")
    except Exception as error:  # torch raises many types
        raise UserError(f"{path} can't be used: {first_line(error)}; {hint}") from None
    return checkpoint


def is_finite(*states: dict[str, torch.Tensor]) -> bool:
    """Return whether all tensors of state dictionaries are finite."""
    return all(bool(x.isfinite().all()) for state in states for x in state.values())


def fingerprint(tensors: dict[str, torch.Tensor]) -> str:
    """Return what tells a network's weights from others: a hash of its state dictionary."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


# --- Plots ----------------------------------------------------------------------------------------

# Of Okabe and Ito's palette, which the colour-blind can tell apart, and grey.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
POLARITIES = ((1, "ON", ORANGE), (0, "OFF", BLUE))  # in N-MNIST, 1 means that the light fell

STYLE = {
    "savefig.dpi": 150,
    "font.size": 11,
    "figure.titlesize": 12,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}
SACCADE_END = {"color": GREY, "linestyle": ":", "lw": 1.2}


def subplots(size: tuple[float, float], *args, **options):
    """Return a figure of `size` in inches, and its axes: `plt.subplots` without a backend."""
    figure = Figure(size, layout="constrained")
    return figure, figure.subplots(*args, **options)


def save_figure(figure: Figure, title: str, path: str | Path) -> None:
    """Write a figure to `path`, atomically, below a title, and print where it is."""
    set_title(figure, title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary)
    print(f"figure      {path}")


def set_title(figure: Figure, title: str, **style) -> None:
    """Set the title, wrapped to the figure's width; a $ in a name starts no formula."""
    figure.suptitle(title.replace("$", r"\$"), wrap=True, **style)


def whole_steps(axis: Axes) -> None:
    """Let the ticks of the x axis, epochs or time steps, be whole numbers."""
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


class TimeAxis(NamedTuple):
    """What is known of the time of the steps of a recording."""

    step_ms: float | None  # nominal duration of a step; None if it varies
    saccade_ends: list[float]  # in steps; the last is the recording's end; [] if they vary


def show_time(
    axes: Sequence[Axes], num_steps: int, time_axis: TimeAxis, at_step_ends: bool = False
) -> None:
    """Let the x axis that `axes` share be time steps, with ms above; mark the ends of saccades.

    x = k is the middle of step k, from 1, or with `at_step_ends` its end.
    """
    start = 0 if at_step_ends else 0.5  # the x at which the recording starts
    for axis in axes:
        for i, end in enumerate(time_axis.saccade_ends[:-1]):
            label = "end of a saccade" if i == 0 else None
            axis.axvline(start + end, label=label, **SACCADE_END)
    axes[-1].set(xlabel="time step", xlim=(0.5, num_steps + 0.5))
    whole_steps(axes[-1])
    if step_ms := time_axis.step_ms:
        to_ms_and_back = (lambda x: (x - start) * step_ms), (lambda ms: start + ms / step_ms)
        axes[0].secondary_xaxis("top", functions=to_ms_and_back).set_xlabel("time (ms)")


def plot_history(
    history: list[dict], best_epoch: int, augmented: bool, title: str, path: Path
) -> None:
    """Draw loss and accuracy over epochs for training, validation and test; mark the best epoch.

    The training curve is of `augmented` recordings, if they are, and of the weights as they train;
    the others are of averaged weights.
    """
    figure, (losses, accuracies) = subplots((10, 4.6), 1, 2)
    epochs = [entry["epoch"] for entry in history]
    what = "augmented, " if augmented else ""
    for name, label, marker, colour in (
        ("train", f"training ({what}weights before averaging)", "o-", BLUE),
        ("val", "validation", "s-", ORANGE),
        ("test", "test", "^--", GREEN),
    ):
        style = {"color": colour, "ms": 4, "label": label}
        losses.plot(epochs, [e[f"{name}_loss"] for e in history], marker, **style)
        accuracies.plot(epochs, [100 * e[f"{name}_accuracy"] for e in history], marker, **style)
    best = f"best checkpoint (epoch {best_epoch})"
    for axis, quantity in ((losses, "loss"), (accuracies, "accuracy (%)")):
        axis.axvline(best_epoch, color=GREY, linestyle=":", label=best)
        axis.set(xlabel="epoch", ylabel=quantity)
        whole_steps(axis)
    figure.legend(*losses.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save_figure(figure, title, path)


def plot_confusion_matrix(counts: np.ndarray, title: str, path: Path) -> None:
    """Draw a confusion matrix [10, 10]: counts, coloured by the share of the true digit."""
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    texts = np.array(
        [f"{n}\n{s:.0f}%" if n else "" for n, s in zip(counts.flat, shares.flat, strict=True)]
    )
    figure, axis = subplots((8, 6.8))
    style = {"cmap": "Blues", "vmin": 0, "vmax": 100, "square": True, "linewidths": 0.5}
    style["annot_kws"] = {"fontsize": 8}
    style["cbar_kws"] = {"label": "share of the true digit (%)"}
    sns.heatmap(shares, annot=texts.reshape(counts.shape), fmt="", ax=axis, **style)
    axis.set(xlabel="predicted digit", ylabel="true digit")
    axis.tick_params(axis="y", rotation=0)
    axis.grid(False)
    save_figure(figure, title, path)


def plot_accuracy_over_time(
    accuracy: np.ndarray, early_exits: list[dict], time_axis: TimeAxis, title: str, path: Path
) -> None:
    """Draw the accuracy [T] after each step, and that of early exits at their mean step."""
    figure, axis = subplots((9, 5.2))
    steps = np.arange(1, len(accuracy) + 1)
    exits = np.array([(e["mean_steps"], 100 * e["accuracy"]) for e in early_exits])
    axis.plot(steps, 100 * accuracy, "o-", color=BLUE, ms=4, label="all decided at this step")
    low, high = (f"{100 * early_exits[i]['threshold']:g}%" for i in (0, -1))
    label = f"each decided at a confidence, from {low} to {high} (mean step)"
    axis.plot(*exits.T, "s-", color=ORANGE, ms=4, label=label)
    axis.axhline(10, color=GREY, linestyle="--", lw=1, label="chance")
    axis.set(ylabel="test accuracy (%)", ylim=(0, 100))
    show_time([axis], len(steps), time_axis, at_step_ends=True)
    figure.legend(loc="outside lower center", ncols=2)
    save_figure(figure, title, path)


def occurrences(labels: np.ndarray) -> np.ndarray:
    """Return how many of the labels [N] before each one are the same."""
    counts = np.zeros(len(labels), int)
    for label in np.unique(labels):
        counts[labels == label] = np.arange((labels == label).sum())
    return counts


def mistakes_first(labels: np.ndarray, predictions: np.ndarray, num_shown: int) -> np.ndarray:
    """Return the indices of `num_shown` recordings to draw: mistakes first, the digits in turn."""
    correct = labels == predictions
    turns = occurrences(labels + 10 * correct)  # mistakes on a digit are counted apart
    return np.lexsort((labels, turns, correct))[:num_shown]  # the last key counts most


def plot_predictions(images: np.ndarray, texts: list[str], mistakes, title: str, path) -> None:
    """Draw event images [N, 2, 34, 34], each below its text, in orange if `mistakes` [N]."""
    columns = min(5, len(images))
    rows = math.ceil(len(images) / columns)
    size = 1.9 * columns, 2.2 * rows + 1.2  # room for two lines above each
    figure, axes = subplots(size, rows, columns, squeeze=False)
    full = full_count(images)
    for axis in axes.flat[len(images) :]:
        axis.set_axis_off()
    for axis, image, text, mistake in zip(axes.flat, images, texts, mistakes, strict=False):
        show_image(axis, event_image(image, full))
        axis.set_title(text, fontsize=9, color=ORANGE if mistake else "black")
    polarity_legend(figure)
    save_figure(figure, title, path)


def show_image(axis: Axes, image: np.ndarray, **style):
    """Draw an image in a pale border, without ticks and grid; return what `imshow` does."""
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set(visible=True, color="#cccccc")
    return axis.imshow(image, interpolation="nearest", **style)


def plot_filters(weight: np.ndarray, title: str, path: Path) -> None:
    """Draw filters [N, 2, h, w] side by side, those of OFF above those of ON events."""
    limit = np.abs(weight).max()
    figure, axes = subplots((12, 3), 2)
    for axis, (polarity, name, _) in zip(axes, reversed(POLARITIES), strict=True):
        filters = weight[:, polarity]
        gaps = np.full_like(filters[:, :, :1], np.nan)
        tiles = np.hstack(np.concatenate([filters, gaps], 2))
        image = show_image(axis, tiles, cmap="PRGn", vmin=-limit, vmax=limit)
        axis.set_ylabel(f"{name} events")
    figure.colorbar(image, ax=axes, label="weight")
    save_figure(figure, title, path)


def full_count(counts: np.ndarray) -> float:
    """Return the event count to draw in full colour, below that of hot pixels."""
    return np.quantile(counts[counts > 0], 0.9) if counts.any() else 1


def event_image(frame: np.ndarray, full: float) -> np.ndarray:
    """Return an RGB image [H, W, 3] of event counts [2, H, W] on white, saturated at `full`."""
    strength = np.clip(frame / full, 0, 1)[..., None]
    image = np.ones((*frame.shape[1:], 3))
    for polarity, _, colour in POLARITIES:
        image -= strength[polarity] * (1 - np.array(to_rgb(colour)))
    return np.clip(image, 0, 1)


def polarity_legend(figure: Figure) -> None:
    """Name the colours of the two polarities below a figure."""
    handles = [Patch(color=colour, label=f"{name} events ({p})") for p, name, colour in POLARITIES]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
