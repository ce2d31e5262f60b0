"""What every script needs and no domain: errors, flag types, seeds, device, processes, atomic files, figures."""

import argparse
import contextlib
import ctypes
import datetime
import errno
import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
import sys
import threading
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import distributed
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows has no locks of this kind
    fcntl = None

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

# ---------------------------------------------------------------------------------------------------------
# Errors and flags
# ---------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """Something the user can put right. The message is one line: what is wrong with what, and what to do."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: it ends a script as Ctrl-C does, with another exit status."""


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`. A `UserError` or a file error becomes one line on stderr and exit status 1.

    Ctrl-C and SIGTERM become a line, too, and exit status 130 and 143. Of several processes (`torchrun`) the first
    prints, and of each machine's the first tells of errors.
    """
    first = int(os.environ.get("RANK", 0)) == 0
    signal.signal(signal.SIGTERM, _terminate if first else signal.SIG_DFL)
    stderr = sys.stderr
    if not first:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        main()
    except (UserError, OSError) as error:
        text = f"{Path(sys.argv[0]).name}: error: {describe_error(error)}"
        if first:
            sys.exit(text)
        if number_on_machine() == 0:
            print(text, file=stderr)
        sys.exit(1)
    except KeyboardInterrupt as stop:
        for one in (signal.SIGINT, signal.SIGTERM):
            signal.signal(one, signal.SIG_IGN)  # a second one must not end the ending
        how = str(stop) or "what is written is whole; start the command again"
        print(f"\n{Path(sys.argv[0]).name}: interrupted: {how}", file=sys.stderr)
        sys.stdout.flush()
        os._exit(143 if isinstance(stop, Terminated) else 130)  # at once: taking PyTorch down takes a second
    except Exception as error:
        if num_processes() > 1 and "closed by peer" in str(error):
            sys.exit(f"{Path(sys.argv[0]).name}: error: another process has ended, and with it this one")
        if first:
            raise
        traceback.print_exc(file=stderr)
        sys.exit(1)
    finally:
        leave_processes()


def _terminate(_signal, _frame):
    raise Terminated


def describe_error(error: Exception) -> str:
    """Return an error as a line for the user: of the operating system's, file and reason without its number."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def describe_damage(error: Exception) -> str:
    """Return in a line why a file can't be read, which libraries tell in many lines or in none."""
    return next(iter(describe_error(error).splitlines()), type(error).__name__)


def number(kind: type, low: float, high: float = float("inf"), open_low: bool = False, open_high: bool = False):
    """Make an argparse type: a finite number of type `kind` from `low` to `high`, both included unless open."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a valid {kind.__name__}") from None
        above = value > low if open_low else value >= low
        below = value < high if open_high or high == float("inf") else value <= high
        if not (above and below):
            limits = f"{'above' if open_low else 'at least'} {low}"
            if high != float("inf"):
                limits += f" and {'below' if open_high else 'at most'} {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {limits}")
        return value

    return parse


# ---------------------------------------------------------------------------------------------------------
# Seeds, cores and device
# ---------------------------------------------------------------------------------------------------------


def set_seed(*parts: int) -> None:
    """Seed torch's generators from one or more integers, so that (seed, epoch) gives a stream of its own."""
    # The length goes in, since to numpy (1,) and (1, 0) are the same seed.
    sequence = np.random.SeedSequence((len(parts), *parts))
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


def num_cores() -> int:
    """Return the number of CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def work_in_parallel(
    function, jobs: list[tuple], sizes: list[int], description: str, initializer=None, initargs=()
) -> Iterator:
    """Yield `function(*job)` for each job in order, computed by a process a core, with a bar of recordings done."""
    with (
        ProcessPoolExecutor(num_cores(), initializer=_start_worker, initargs=(initializer, initargs)) as pool,
        tqdm(desc=description, total=sum(sizes), unit="recording") as bar,
    ):
        try:
            for result, size in zip(pool.map(function, *zip(*jobs, strict=True)), sizes, strict=True):
                bar.update(size)
                yield result
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _start_worker(initializer, initargs) -> None:
    """Begin a worker process: the script alone answers to Ctrl-C, and a script that was killed takes it along."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    if initializer:
        initializer(*initargs)


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--device` to a script's flags."""
    parser.add_argument(
        "--device",
        type=_device,
        metavar="cuda|cpu",
        help="where to compute (default: cuda where there is one)",
    )


def _device(text: str) -> str:
    if text not in ("cuda", "cpu"):
        raise argparse.ArgumentTypeError(f"unknown device {text!r}: choose cuda or cpu")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("PyTorch finds no CUDA device on this machine: choose cpu")
    return text


def prepare_device(device: torch.device) -> None:
    """Set what makes work on `device` fast, for the whole process."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 where products of matrices are float32
        torch.backends.cudnn.benchmark = True  # tries convolution algorithms once for each shape
    else:
        keep_freed_memory()


def pick_device(name: str | None) -> torch.device:
    """Return the device called `name`, or the best one of this machine when it is None; of several processes' GPUs,
    this one's."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name, number_on_machine() if name == "cuda" else None)


def add_precision_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--precision` to a script's flags."""
    parser.add_argument(
        "--precision",
        choices=["auto", "bf16", "fp32"],
        default="auto",
        help="bf16: layers in bfloat16, membranes in float32; fp32: all in float32; auto: bf16 where the device is "
        "built for it (default: %(default)s)",
    )


def pick_precision(name: str, device: torch.device) -> str:
    """Return 'bf16' or 'fp32' for `--precision`: of 'auto', bf16 on CUDA devices of compute capability 8 and up, and
    on CPUs with AMX or AVX512-BF16. On others bfloat16 is slower than float32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp32"
    built_for_it = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bf16" if built_for_it else "fp32"


def keep_freed_memory() -> None:
    """Tell glibc's allocator to keep large blocks it is given back; elsewhere do nothing.

    By default each large tensor is fresh pages from the kernel, zeroed at first touch: up to half of a training
    step on a CPU. The numbers are `mallopt`'s of glibc's malloc.h; other C libraries have no such call.
    """
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    mallopt = ctypes.CDLL(None).mallopt
    for name, value in ((m_mmap_max, 0), (m_trim_threshold, -1), (m_top_pad, 2**26)):
        mallopt(name, value)


def describe_device(device: torch.device) -> str:
    """Return what a user should know of where the work is done, e.g. 'cpu (2 threads)'."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"


# ---------------------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------------------


def join_processes(device: torch.device) -> None:
    """Join the processes that `torchrun` started; without it, do nothing."""
    if "RANK" not in os.environ:
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # The others wait while the first downloads and bins.
    distributed.init_process_group(backend, timeout=datetime.timedelta(hours=2))


def leave_processes() -> None:
    """Leave the other processes: from here on, this one works alone."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def num_processes() -> int:
    """Return the number of processes that share the work."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def process_number() -> int:
    """Return this process's number among them, from 0: the first prints and writes."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def number_on_machine() -> int:
    """Return this process's number among those of its machine, from 0; torchrun sets it, before processes join."""
    return int(os.environ.get("LOCAL_RANK", 0))


@contextlib.contextmanager
def first_of_machine_first() -> Iterator[None]:
    """Let the first process of each machine do what is inside, and the others then, who find its files."""
    first = number_on_machine() == 0
    if num_processes() > 1 and not first:
        distributed.barrier()
    yield
    if num_processes() > 1 and first:
        distributed.barrier()


def own_share(size: int) -> slice:
    """Return which of `size` things are this process's: as even as can be, in the order of the processes."""
    number, processes = process_number(), num_processes()
    return slice(size * number // processes, size * (number + 1) // processes)


def add_up(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of `values` over all processes."""
    if num_processes() > 1:
        distributed.all_reduce(values)
    return values


def gather(value) -> list:
    """Return what each process holds as `value`, in the order of the processes."""
    gathered = [value]
    if num_processes() > 1:
        gathered *= num_processes()
        distributed.all_gather_object(gathered, value)
    return gathered


# ---------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------


def temporary_beside(path: Path) -> Path:
    """Return a hidden name beside `path` that tells which process of which machine writes there."""
    # The suffix stays at the end: matplotlib chooses the format by it.
    return path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp{path.suffix}")


def remove_left_over(folder: str | Path) -> None:
    """Remove the temporary files and folders in `folder` whose process was killed before it could."""
    if os.name != "posix" or not Path(folder).is_dir():
        return
    for path in Path(folder).iterdir():
        found = re.fullmatch(rf"\..+\.{re.escape(platform.node())}\.(\d+)\.tmp.*", path.name)
        if not found:
            continue
        try:
            os.kill(int(found[1]), 0)  # asks whether there is such a process
        except ProcessLookupError:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        except PermissionError:
            pass  # somebody else's, and alive


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which replaces `path` on success and vanishes on failure.

    A reader sees the old file or the new one, never a part of it. Makes the folder where it is missing. An `OSError`
    names `path`.
    """
    path = Path(path)
    temporary = temporary_beside(path)
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


def check_writable(flag: str, folder: str | Path) -> None:
    """Raise `UserError` naming `flag` where files can't be written into `folder`, which need not be there yet."""
    place = Path(folder).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{flag} {folder}: {place} is no folder; choose another")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {folder}: {place} can't be written to; choose another folder")


@contextlib.contextmanager
def locked(folders: dict[str, str], name: str, seconds: float = 3) -> Iterator[None]:
    """Hold folders, by their flags, for what is called `name`: only one process at a time can.

    Raises `UserError` where another process still holds one after `seconds`. A process that is killed holds nothing.
    """
    with contextlib.ExitStack() as files:
        for folder, flag in {Path(folder).resolve(): flag for flag, folder in folders.items()}.items():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                file = files.enter_context(open(folder / f".{name}.lock", "a"))
            except OSError as error:
                raise UserError(f"{flag} {folder} can't be written to: {error.strerror}; choose another") from None
            if fcntl and not _lock(file, seconds):
                raise UserError(f"{flag} {folder}: another run of {name} writes there; choose another folder, or wait")
            remove_left_over(folder)
        yield


def _lock(file, seconds: float) -> bool:
    """Lock `file` within `seconds`, for which workers of a killed process may hold it; say whether it is locked."""
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                return False
        except OSError:  # a file system without locks
            return True
        time.sleep(0.1)


def write_json(path: str | Path, value) -> None:
    """Write `value` to `path` as JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def save_tensors(path: str | Path, content: dict) -> None:
    """Write a dictionary of tensors, numbers, strings, lists and dictionaries to `path`, atomically."""
    with atomic_path(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # torch's own writer tells a full disk so
            reason = str(error).splitlines()[0]
            raise OSError(errno.ENOSPC, f"can't be written, the disk may be full ({reason})", str(path)) from None


def read_tensors(path: str | Path, mmap: bool = False) -> dict:
    """Read what `save_tensors` wrote onto the CPU, or map its tensors into memory; nothing in the file is run.

    Raises errors of many types where the file is damaged. torch itself does not look at the checksums it writes.
    """
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"checksum of {damaged} is wrong")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


CHECKPOINT_FORMAT = 2  # of networks whose weights mean something else, another
CHECKPOINT_KEYS = ("network_settings", "settings", "dataset", "num_recordings", "network", "epoch", "score")


def checkpoint_path(save_dir: str | Path, model: str, which: str) -> Path:
    """Return where the checkpoint of the 'last' finished epoch lies, or of the 'best' validation accuracy."""
    return Path(save_dir) / f"{model}_{which}.pt"


def load_checkpoint(path: str | Path, model: str) -> dict:
    """Read a checkpoint of `model` onto the CPU; `weights_only=True`, so nothing in it is run.

    Raises `UserError` where the file is missing, or holds something else.
    """
    made_by = f"make one with `python train_nmnist.py --model {model}`"
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder, no checkpoint: {made_by}")
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}: {made_by}")
    try:
        checkpoint = read_tensors(path)
    except Exception as error:  # torch raises many types on a damaged file
        raise UserError(f"{path} can't be read as a checkpoint ({describe_damage(error)}): {made_by}") from None
    settings = checkpoint.get("network_settings") if isinstance(checkpoint, dict) else None
    if not isinstance(settings, dict) or "model" not in settings:
        raise UserError(f"{path} is no checkpoint of this project: {made_by}")
    if checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise UserError(f"{path} was written by another version of this project: {made_by}")
    found = settings["model"]
    if any(name not in checkpoint for name in CHECKPOINT_KEYS):
        raise UserError(f"{path} lacks parts of a checkpoint: {made_by}")
    if found != model:
        raise UserError(f"{path} holds a {found}, not a {model}: choose --model {found}, or {made_by}")
    return checkpoint


def parse_with_settings(parser: argparse.ArgumentParser, argv: list[str] | None, settings: dict):
    """Parse flags with a checkpoint's settings as the defaults of those that are not given.

    Returns the flags and what contradicts the checkpoint: a list of (name, given, the checkpoint's).
    """
    parser.set_defaults(**settings)
    args = parser.parse_args(argv)
    different = [(name, getattr(args, name), value) for name, value in settings.items() if getattr(args, name) != value]
    return args, different


# ---------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------

# Okabe and Ito's colours, which the colour-blind can tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
OFF_COLOUR, ON_COLOUR = BLUE, ORANGE

plt.rcParams.update(
    {
        "figure.dpi": 100,
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


def event_image(frame: np.ndarray, full: float) -> np.ndarray:
    """Return an RGB picture [H, W, 3] of event counts [2, H, W]: OFF and ON inked on white, fully at `full` events."""
    strength = np.clip(frame / full, 0, 1)[..., None]
    off, on = (1 - np.array(to_rgb(colour)) for colour in (OFF_COLOUR, ON_COLOUR))
    return np.clip(1 - strength[0] * off - strength[1] * on, 0, 1)


def polarity_legend(figure: plt.Figure) -> None:
    """Name the colours of the two polarities below a figure."""
    handles = [Patch(color=ON_COLOUR, label="ON events (1)"), Patch(color=OFF_COLOUR, label="OFF events (0)")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)


def filter_grid(filters: torch.Tensor, columns: int) -> np.ndarray:
    """Return filters [N, H, W] side by side as one picture, NaN between them, by `torchvision.utils.make_grid`."""
    try:
        from torchvision.utils import make_grid
    except RuntimeError:
        # PyPI's torchvision for Linux is built for CUDA: beside a CPU build of torch its operators can't load, and
        # the import fails on these two. Pictures need none of them.
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        from torchvision.utils import make_grid
    return make_grid(filters[:, None], nrow=columns, padding=1, pad_value=float("nan"))[0].numpy()


def save_figure(figure: plt.Figure, path: str | Path) -> None:
    """Write a figure to `path`, atomically, close it, and say where it went."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary)
    plt.close(figure)
    print(f"figure      {path}")
