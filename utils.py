"""What every script needs: errors, flag types, seeds, device, distributed training, atomic files, checkpoints, and
the plots of training and testing."""

import argparse
import contextlib
import csv
import ctypes
import datetime
import errno
import functools
import itertools
import json
import os
import platform
import re
import signal
import sys
import zipfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path


def end_at_once(_signal, _frame):
    """End a script that Ctrl-C stops before `run_script` takes over, while PyTorch is imported."""
    print(f"\n{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
    os._exit(130)


if Path(sys.argv[0]).name in ("nmnist.py", "train_nmnist.py", "visualize_nmnist.py", "visualize_activations.py"):
    signal.signal(signal.SIGINT, end_at_once)

import matplotlib
import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import distributed, nn

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

# --- Errors and flags ------------------------------------------------------------------------------------


class UserError(Exception):
    """An error that the user can fix. The message is one line: what is wrong with what, and what to do."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: it ends a script as Ctrl-C does, with another exit status."""


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`. A `UserError` or a file error becomes one line on stderr and exit status 1.

    Ctrl-C and SIGTERM become a line, too, and exit status 130 and 143. Of the processes that `torchrun` starts, the
    first prints to stdout.
    """
    script, first = Path(sys.argv[0]).name, rank() == 0
    make_output_safe()
    signal.signal(signal.SIGINT, _interrupt if first else signal.SIG_DFL)
    signal.signal(signal.SIGTERM, _interrupt if first else signal.SIG_DFL)
    if not first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        main()
        if sys.stdout:
            sys.stdout.flush()  # here, where an error becomes a line
    except BrokenPipeError as error:  # of `| head -3`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python still flushes at its end
        what = "all files are whole; run the command again" if error.errno else error
        print(f"{script}: output closed: {what}", file=sys.stderr)
        sys.exit(141)
    except (UserError, OSError) as error:
        text = describe_error(error)
        if isinstance(error, OSError) and not error.filename:  # all but the streams have a name
            text = f"output can't be written: {text}"
        sys.exit(f"{script}: error: {text}")
    except KeyboardInterrupt as stop:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)  # a second one must not stop the exit
        print(f"\n{script}: interrupted: {str(stop) or 'all files are whole; run the command again'}", file=sys.stderr)
        sys.exit(143 if isinstance(stop, Terminated) else 130)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            asked = re.search(r"[Tt]ried to allocate ([\d.,]+ \w+)", str(error))
            asked = f" ({asked[1]} more were asked for)" if asked else ""
            sys.exit(f"{script}: error: not enough memory{asked}: choose a smaller --batch_size or --time_steps")
        if world_size() > 1 and "closed by peer" in str(error):
            sys.exit(f"{script}: error: another process ended, so this one ends too")
        raise
    finally:
        destroy_distributed()
    if not first:  # while the first process tests, an error in Python's exit from another would end it
        os._exit(0)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error means that memory of the host or of a GPU is used up."""
    return isinstance(error, MemoryError) or bool(re.search("out of memory|allocate memory|ALLOC_FAILED", str(error)))


interrupted_by: type[KeyboardInterrupt] | None = None  # set by a signal that nothing has handled yet
interrupts_wait = False


def _interrupt(number, _frame):
    global interrupted_by
    interrupted_by = Terminated if number == signal.SIGTERM else KeyboardInterrupt
    if not interrupts_wait:
        raise interrupted_by


@contextlib.contextmanager
def delay_interrupts() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait until the block ends, so that what it changes stays together."""
    global interrupts_wait
    interrupts_wait = True
    try:
        yield
    finally:
        interrupts_wait = False
    check_interrupted()


def check_interrupted() -> None:
    """Raise the interrupt of a signal that came where Python discards exceptions, as in a callback of the compiler."""
    global interrupted_by
    if interrupted_by:
        stop, interrupted_by = interrupted_by, None
        raise stop


class SafeStderr:
    """stderr for progress bars and warnings: where it is closed or its disk is full, they are lost, not the run."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name):
        return getattr(self._stream, name)


def make_output_safe() -> None:
    """Let no character end a script that the terminal can't show, and no progress bar that can't be drawn."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stderr = SafeStderr(sys.stderr or open(os.devnull, "w"))  # noqa: SIM115


def warn(text: str) -> None:
    """Print a warning to stderr, in the first process only."""
    if rank() == 0:
        print(f"WARNING: {text}", file=sys.stderr)


def describe_error(error: Exception) -> str:
    """Return an error as a line for the user; for one of the operating system, file and reason without its number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def first_line(error: Exception) -> str:
    """Return the first line of an error, which libraries describe in many lines or in none."""
    return next(iter(describe_error(error).splitlines()), type(error).__name__)


def add_flag(parser, flag: str, default, text: str, **options) -> None:
    """Add a flag with a value to a parser or a group of it; its help ends with its default."""
    parser.add_argument(flag, default=default, help=f"{text} (default: %(default)s)", **options)


# The largest numbers that fit everywhere: 32-bit integers, and float32.
LARGEST = {int: 2**31 - 1, float: float(np.finfo(np.float32).max)}


def number(kind: type, low: float, high: float | None = None, open_low: bool = False, open_high: bool = False):
    """Make an argparse type: a number of type `kind` from `low` to `high`, both included unless open.

    Without `high`, the largest 32-bit number. A float that float32 rounds to 0 counts as 0.
    """
    high = LARGEST[kind] if high is None else high

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a valid {kind.__name__}") from None
        size = float(np.float32(value)) if kind is float and abs(value) < 1 else value
        above = size > low if open_low else size >= low
        below = value < high if open_high else value <= high
        if not (above and below):
            largest = f"{high:.9g}" if kind is float else high
            limits = f"{'above' if open_low else 'at least'} {low} and {'below' if open_high else 'at most'} {largest}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {limits}")
        return value

    return parse


# --- Seeds and device ------------------------------------------------------------------------------------


def set_seed(*parts: int) -> None:
    """Seed torch's generators from one or more integers, so that (seed, epoch) gives a stream of its own."""
    # The length is included, since to numpy (1,) and (1, 0) are the same seed.
    sequence = np.random.SeedSequence((len(parts), *parts))
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--device` to a script's flags."""
    text = "where to compute (default: cuda where there is one)"
    parser.add_argument("--device", type=_device, metavar="cuda|cpu", help=text)


def _device(text: str) -> str:
    if text not in ("cuda", "cpu"):
        raise argparse.ArgumentTypeError(f"unknown device {text!r}: choose cuda or cpu")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("PyTorch finds no CUDA device on this machine: choose cpu")
    return text


def pick_device(name: str | None) -> torch.device:
    """Return the device called `name`, or this machine's best one for None; of several GPUs, this process's.

    Raises `UserError` if there are fewer GPUs than processes.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and local_rank() >= torch.cuda.device_count():
        gpus = f"{torch.cuda.device_count()} GPU(s) for more processes"
        raise UserError(f"--nproc_per_node: {gpus}; start one a GPU, or choose --device cpu")
    return torch.device(name, local_rank() if name == "cuda" else None)


def prepare_device(device: torch.device) -> None:
    """Make work on `device` fast, for the whole process."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for products of float32 matrices
        torch.backends.cudnn.benchmark = True  # tries convolution algorithms once for each shape
    else:
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Tell glibc to keep large blocks that are freed; with another C library, do nothing.

    Otherwise each large tensor gets fresh pages from the kernel, zeroed at first touch, which takes up to half of a
    training step on a CPU: with it, training is 3.1 times as fast as snnTorch's loop, without it 1.5 times. The numbers
    are those of `mallopt` in glibc's malloc.h.
    """
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    mallopt = ctypes.CDLL(None).mallopt
    for name, value in ((m_mmap_max, 0), (m_trim_threshold, -1), (m_top_pad, 2**26)):
        mallopt(name, value)


def describe_device(device: torch.device) -> str:
    """Return what a user should know of the device, such as 'cpu (2 threads)'."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"


def processor_name() -> str:
    """Return the processor's name, if Linux tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def peak_memory_mb(device: torch.device) -> float:
    """Return the most memory in MB that this process has used, on a GPU that of its tensors."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def versions(*packages: str) -> dict[str, str]:
    """Return the version of Python and of packages."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in packages}


def add_precision_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--precision` to a script's flags."""
    text = "bf16, fp16: layers in bfloat16 or float16, membrane potentials in float32; fp32: all in float32; auto: "
    text += "what is fast on the device"
    add_flag(parser, "--precision", "auto", text, choices=["auto", "bf16", "fp16", "fp32"])


def pick_precision(name: str, device: torch.device) -> str:
    """Return 'bf16', 'fp16' or 'fp32' for `--precision`; warn of fp16 on a CPU.

    'auto' is bf16 on GPUs of compute capability 8 and up, and on CPUs with AMX or AVX512-BF16; on others bfloat16 is
    slower than float32. It is fp16 on GPUs of compute capability 7 (V100, T4), which compute that several times as
    fast as float32.
    """
    if name == "fp16" and device.type == "cpu":
        warn("--precision fp16 is meant for GPUs: on a CPU it may be many times slower than bf16 or fp32")
    if name != "auto":
        return name
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)[0]
        return "bf16" if capability >= 8 else "fp16" if capability == 7 else "fp32"
    features = torch.cpu.get_capabilities()
    return "bf16" if features.get("amx_tile") or features.get("avx512_bf16") else "fp32"


# --- Distributed training --------------------------------------------------------------------------------

_RUNS = itertools.count()


def rank() -> int:
    """Return this process's number among those of `torchrun`, 0 without it."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """Return this process's number among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    """Return the number of processes that train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def init_distributed(device: torch.device) -> None:
    """Join the processes that `torchrun` started; without it, do nothing."""
    if "RANK" not in os.environ:
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # A script may do this for several seeds, one after the other: each time with other keys in torchrun's store.
    store, own_rank, size = next(distributed.rendezvous("env://"))
    store = distributed.PrefixStore(f"run {next(_RUNS)}", store)
    # The others wait while one downloads and bins.
    timeout = datetime.timedelta(hours=2)
    distributed.init_process_group(backend, store=store, rank=own_rank, world_size=size, timeout=timeout)


def destroy_distributed() -> None:
    """Leave the other processes; from here on, this one works alone."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def shard(size: int) -> slice:
    """Return which of `size` items are this process's: as even as possible, in the order of the ranks."""
    return slice(size * rank() // world_size(), size * (rank() + 1) // world_size())


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of `values` over all processes."""
    if world_size() > 1:
        distributed.all_reduce(values)
    return values


def all_gather(value) -> list:
    """Return each process's `value`, in the order of the ranks."""
    gathered = [value] * world_size()
    if world_size() > 1:
        distributed.all_gather_object(gathered, value)
    return gathered


def sync_batch_norm(network: nn.Module) -> None:
    """Let the norms of `network` measure the batch of all processes in training, as in a single process.

    torch's own `SyncBatchNorm` is for CUDA only.
    """
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            norm.forward = functools.partial(_forward_synced, norm)


def _forward_synced(norm: nn.BatchNorm1d | nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
    """Normalize x [F, C, ...] as `norm` does, in training by mean and variance over the frames of all processes."""
    if not norm.training:
        return type(norm).forward(norm, x)
    dims = [dim for dim in range(x.dim()) if dim != 1]
    count = torch.full((1,), x.numel() / x.shape[1], dtype=torch.float64, device=x.device)
    values = x.float()
    sums = [values.sum(dims, dtype=torch.float64), (values * values).sum(dims, dtype=torch.float64), count]
    sums = AllReduceSum.apply(torch.cat(sums))
    count = sums[-1].detach()
    mean, square = (sums[:-1] / count).chunk(2)
    variance = square - mean**2
    with torch.no_grad():
        norm.running_mean.lerp_(mean.float(), norm.momentum)
        norm.running_var.lerp_((variance * count / (count - 1)).float(), norm.momentum)
        norm.num_batches_tracked += 1
    scale = norm.weight * torch.rsqrt(variance + norm.eps).float()
    shift = norm.bias - mean.float() * scale
    per_channel = (1, -1) + (1,) * (x.dim() - 2)
    return (values * scale.view(per_channel) + shift.view(per_channel)).to(x.dtype)


class AllReduceSum(torch.autograd.Function):
    """The sum of a tensor over processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x):
        return all_reduce_sum(x.clone())

    @staticmethod
    def backward(ctx, grad):
        return all_reduce_sum(grad.contiguous().clone())


# --- Files -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(folder: str | Path, name: str, busy: str | None = None) -> Iterator[None]:
    """Hold `<folder>/.<name>.lock`, which one process at a time can; a killed process holds nothing.

    While another process holds it, wait, and say so; if `busy` is given, raise `UserError(busy)` instead. A folder that
    can't be written to is not locked, since nothing can be written there.
    """
    folder = Path(folder)
    lock = FileLock(folder / f".{name}.lock")
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=2)  # a process that was just killed may still be on its way out
            except Timeout:
                if busy:
                    raise UserError(busy) from None
                if rank() == 0:
                    print(f"waiting     for another process that writes to {folder}", file=sys.stderr)
                lock.acquire()
            stack.callback(lock.release)
        except OSError as error:
            if os.access(folder, os.W_OK):
                warn(f"{folder} can't be locked ({first_line(error)}): let no other process write to it")
        yield


def check_writable(flag: str, folder: str | Path) -> None:
    """Raise `UserError` naming `flag` if files can't be written to `folder`, which need not exist yet."""
    existing = Path(folder).absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"{flag} {folder}: {existing} is not a folder; choose another")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {folder}: {existing} can't be written to; choose another folder")


def temporary_path(path: Path) -> Path:
    """Return the hidden name beside `path` under which it is written; what a killed process left there is replaced."""
    return path.with_name(f".{path.stem}.tmp{path.suffix}")  # matplotlib chooses the format by the suffix


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which replaces `path` on success and is removed on failure.

    A reader sees the old file or the new one, never a part of it. The folder is made if it is missing. An `OSError`
    names `path`. Two processes must not write the same file at once (`locked`).
    """
    path = Path(path)
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.filename in (None, str(temporary), *map(str, path.parents)) and error.errno:
            raise OSError(error.errno, f"can't be written: {error.strerror}", str(path)) from None
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_json(path: Path):
    """Return the content of a JSON file, None if there is none or it is damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None


def write_json(path: str | Path, value) -> None:
    """Write `value` to `path` as JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def write_csv(path: str | Path, rows: list[dict]) -> None:
    """Write rows of the same keys to `path` as CSV with a header, atomically."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def save_tensors(path: str | Path, content: dict) -> None:
    """Write a dictionary of tensors, numbers, strings, lists and dictionaries to `path`, atomically."""
    with atomic_path(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # how torch's own writer reports a full disk
            reason = f"can't be written, the disk may be full ({first_line(error)})"
            raise OSError(errno.ENOSPC, reason, str(path)) from None


def read_tensors(path: str | Path, mmap: bool = False) -> dict:
    """Read what `save_tensors` wrote onto the CPU, or map its tensors into memory; no code in the file is run.

    Raises errors of many types if the file is damaged. torch itself does not check the checksums it writes.
    """
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"checksum of {damaged} is wrong")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


# --- Checkpoints -----------------------------------------------------------------------------------------

CHECKPOINT_FORMAT = 6  # increased if older checkpoints can't be used
CHECKPOINT_KEYS = (
    *("name", "network_config", "settings", "constants", "data", "versions", "threads", "network"),
    *("epoch", "seconds_to_epoch", "temperature", "score"),
)


def checkpoint_path(save_dir: str | Path, name: str, which: str) -> Path:
    """Return the path of the checkpoint of the 'last' finished epoch, or of the 'best' validation accuracy."""
    return Path(save_dir) / f"{name}_{which}.pt"


def load_checkpoint(path: str | Path, name: str) -> dict:
    """Read the checkpoint of a network, such as 'cnn', onto the CPU; `weights_only=True`, so no code in it is run.

    Raises `UserError` if the file is missing, damaged, or something else.
    """
    make_one = f"make one with `python train_nmnist.py {network_flags(name)}`"
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder, not a checkpoint: {make_one}")
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}: {make_one}")
    try:
        checkpoint = read_tensors(path)
    except Exception as error:  # torch raises many types on a damaged file
        raise UserError(f"{path} can't be read as a checkpoint ({first_line(error)}): {make_one}") from None
    if not isinstance(checkpoint, dict) or "network" not in checkpoint:
        raise UserError(f"{path} is not a checkpoint of this project: {make_one}")
    if checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise UserError(f"{path} was written by another version of this project: {make_one}")
    complete = all(key in checkpoint for key in CHECKPOINT_KEYS)
    parts = ("network_config", "settings", "constants", "data", "versions")
    if not complete or not all(isinstance(checkpoint[part], dict) for part in parts):
        raise UserError(f"{path} lacks parts of a checkpoint: {make_one}")
    found = checkpoint["name"]
    if found != name:
        raise UserError(f"{path} holds a {found}, not a {name}: choose {network_flags(str(found))}, or {make_one}")
    return checkpoint


def network_flags(name: str) -> str:
    """Return the flags that choose a network by its name in files, such as 'cnn_relu'."""
    return f"--model {name.replace('_relu', ' --no_spikes')}"


def keep_earlier_run(*paths: Path) -> None:
    """Rename the files of an earlier run, if there are any, to the first free number, such as cnn_best.1.pt."""
    earlier = [path for path in paths if path.exists()]
    if earlier:
        n = next(n for n in itertools.count(1) if not any(_numbered(path, n).exists() for path in paths))
        for path in earlier:
            path.rename(_numbered(path, n))
        print(f"earlier     run kept as {', '.join(str(_numbered(path, n)) for path in earlier)}")


def _numbered(path: Path, n: int) -> Path:
    return path.with_name(f"{path.stem}.{n}{path.suffix}")


# --- Plots -----------------------------------------------------------------------------------------------

# Okabe and Ito's colours, which the colour-blind can tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
OFF_COLOUR, ON_COLOUR = BLUE, ORANGE

plt.rcParams.update(
    {
        "savefig.dpi": 150,
        "font.size": 11,
        "axes.titlesize": 12,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "legend.frameon": False,
        "figure.constrained_layout.use": True,
    }
)


def save_figure(figure: plt.Figure, path: str | Path) -> None:
    """Write a figure to `path`, atomically, close it, and print where it is."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary)
    plt.close(figure)
    print(f"figure      {path}")


def plot_history(history: list[dict], title: str, path: Path) -> None:
    """Draw loss and accuracy over epochs for training, validation and test."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    epochs = [entry["epoch"] for entry in history]
    styles = (("train", BLUE, "training", "o-"), ("val", ORANGE, "validation", "s-"), ("test", GREEN, "test", "^--"))
    for name, colour, label, marker in styles:
        axes[0].plot(epochs, [e[f"{name}_loss"] for e in history], marker, color=colour, label=label, ms=4)
        axes[1].plot(epochs, [100 * e[f"{name}_accuracy"] for e in history], marker, color=colour, label=label, ms=4)
    axes[0].set(xlabel="epoch", ylabel="loss")
    axes[1].set(xlabel="epoch", ylabel="accuracy (%)")
    for axis in axes:
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend()
    figure.suptitle(title)
    save_figure(figure, path)


def plot_confusion_matrix(counts: np.ndarray, title: str, path: Path) -> None:
    """Draw a confusion matrix [10, 10]: counts, coloured by the share of each row (each true digit)."""
    rates = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    texts = [f"{n}\n{rate:.0%}" if n else "" for n, rate in zip(counts.flat, rates.flat, strict=True)]
    cells = {"annot": np.reshape(texts, counts.shape), "fmt": "", "annot_kws": {"fontsize": 8}}
    style = {"cmap": "Blues", "vmin": 0, "vmax": 100, "square": True, "linewidths": 0.5}
    figure, axis = plt.subplots(figsize=(8, 6.8))
    sns.heatmap(100 * rates, **cells, **style, cbar_kws={"label": "share of the true digit (%)"}, ax=axis)
    axis.set(xlabel="predicted digit", ylabel="true digit", title=title)
    axis.grid(False)
    save_figure(figure, path)


def plot_accuracy_over_time(
    accuracy: np.ndarray,
    early_exit: list[dict],
    saccade_ends: list[float],
    step_ms: float | None,
    title: str,
    path: Path,
) -> None:
    """Draw the accuracy [T] of predictions made after each step, and that of early exits at their mean step.

    `saccade_ends` are in steps, `step_ms` is the duration of a step, if it is known.
    """
    figure, axis = plt.subplots(figsize=(7.5, 5))
    axis.plot(
        np.arange(1, len(accuracy) + 1),
        100 * accuracy,
        "o-",
        color=BLUE,
        ms=4,
        label="every recording decided at this step",
    )
    steps, accuracies, thresholds = ([e[key] for e in early_exit] for key in ("mean_steps", "accuracy", "threshold"))
    low, high = (f"{100 * threshold:g}" for threshold in (thresholds[0], thresholds[-1]))
    label = f"early exit at a confidence of\n{low} to {high}% (mean step)"
    axis.plot(steps, 100 * np.array(accuracies), "s-", color=ORANGE, ms=4, label=label)
    axis.axhline(10, color=GREY, linestyle=":", label="chance")
    for i, end in enumerate(saccade_ends):
        axis.axvline(end, color=GREY, linestyle="--", label=None if i else "ends of the first two saccades")
    axis.set(xlabel="time step of the prediction", ylabel="test accuracy (%)", ylim=(0, 102))
    axis.xaxis.get_major_locator().set_params(integer=True)
    if step_ms:
        upper = axis.secondary_xaxis("top", functions=(lambda step: step * step_ms, lambda ms: ms / step_ms))
        upper.set_xlabel("time of the prediction (ms)")
    figure.suptitle(title, fontsize=plt.rcParams["axes.titlesize"])
    figure.legend(loc="outside lower center", ncols=2)
    save_figure(figure, path)


def mistakes_first(labels: np.ndarray, predictions: np.ndarray, num_shown: int) -> np.ndarray:
    """Return the indices of `num_shown` recordings to draw: mistakes first, each kind with the digits in turn."""
    correct = labels == predictions
    turn = np.zeros(len(labels), int)
    for kind in np.unique(np.stack([labels, correct]), axis=1).T:
        same = (labels == kind[0]) & (correct == kind[1])
        turn[same] = np.arange(same.sum())
    return np.lexsort((labels, turn, correct))[:num_shown]


def plot_predictions(images: np.ndarray, labels, predictions, indices, title: str, path: Path) -> None:
    """Draw event images [N, 2, 34, 34] of the recordings `indices` [N], with true and predicted digit [N]."""
    columns = min(5, len(images))
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.9 * columns, 2.2 * rows + 1.2), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    full = np.quantile(images[images > 0], 0.9) if images.any() else 1
    for axis, image, label, prediction, index in zip(axes.flat, images, labels, predictions, indices, strict=False):
        axis.imshow(event_image(image, full), interpolation="nearest")
        mark, colour = ("", "black") if label == prediction else ("mistake: ", ORANGE)
        axis.set_title(f"{mark}{label} read as {prediction}\nrecording {index}", fontsize=9, color=colour)
    figure.suptitle(title)
    polarity_legend(figure)
    save_figure(figure, path)


def plot_filters(weight: torch.Tensor, title: str, path: Path) -> None:
    """Draw filters [N, 2, h, w], those of OFF beside those of ON events, on one scale."""
    limit = float(weight.abs().max())
    figure, axes = plt.subplots(1, 2, figsize=(9, 5))
    for polarity, name in enumerate(("OFF events", "ON events")):
        grid = filter_grid(weight[:, polarity], columns=4)
        image = axes[polarity].imshow(grid, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        axes[polarity].set_title(f"weights of {name}")
        axes[polarity].set_axis_off()
    figure.colorbar(image, ax=axes, label="weight", shrink=0.8)
    figure.suptitle(title)
    save_figure(figure, path)


def filter_grid(filters: torch.Tensor, columns: int) -> np.ndarray:
    """Return filters [N, H, W] side by side as one image, NaN between them, by `torchvision.utils.make_grid`."""
    try:
        from torchvision.utils import make_grid
    except RuntimeError:
        # PyPI's torchvision for Linux is built for CUDA: beside a CPU build of torch its operators can't load, and
        # the import fails on these two. Images need neither.
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        from torchvision.utils import make_grid
    return make_grid(filters[:, None], nrow=columns, padding=1, pad_value=float("nan"))[0].numpy()


def event_image(frame: np.ndarray, full: float) -> np.ndarray:
    """Return an RGB image [H, W, 3] of event counts [2, H, W]: OFF and ON on white, saturated at `full` events."""
    strength = np.clip(frame / full, 0, 1)[..., None]
    off, on = (1 - np.array(to_rgb(colour)) for colour in (OFF_COLOUR, ON_COLOUR))
    return np.clip(1 - strength[0] * off - strength[1] * on, 0, 1)


def polarity_legend(figure: plt.Figure) -> None:
    """Name the colours of the two polarities below a figure."""
    handles = [Patch(color=ON_COLOUR, label="ON events (1)"), Patch(color=OFF_COLOUR, label="OFF events (0)")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
