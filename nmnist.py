"""N-MNIST recordings: find, download, check and bin them, make batches, simulate recordings.

    python nmnist.py                                  # a table of what is in ./data
    python nmnist.py --data_dir DIR --time_steps 10   # of another folder, with 10 frames each
    python nmnist.py --dataset simulated              # scikit-learn's digits, by a simulated camera
    python nmnist.py --simulate IMAGES.npz --data_dir DIR   # labelled images of 28 x 28 pixels

Events are numpy structured arrays `x, y, t, p` as tonic gives them: t in microseconds, x and y in
0..33, p 0 (OFF) or 1 (ON). Frames are [T, B, 2, 34, 34]; the value is the number of events in that
bin. Read from the top: the data set, frames and their cache, augmentation, what scripts use. The
simulated camera comes last.
"""

import argparse
import functools
import hashlib
import http.client
import itertools
import json
import socket
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import tonic
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tonic.download_utils import download_url
from tqdm import tqdm

import utils
from utils import UserError, number

SENSOR_SIZE = (34, 34, 2)  # x, y, polarities, as tonic orders them
BINS_PER_FRAME = 2 * 34 * 34
# In ms: two minima of the mean event rate of real recordings, and the mean of their last event.
SACCADE_ENDS = (100, 220, 308)
SPLITS = ("train", "test")
DATASETS = ("auto", "nmnist", "simulated")
PUBLISHED = {"train": 60_000, "test": 10_000}  # recordings of N-MNIST
HOMEPAGE = "https://www.garrickorchard.com/datasets/n-mnist"
LAYOUT = "Train/<digit>/*.bin and Test/<digit>/*.bin, or train.zip and test.zip"
SIMULATED = "SimulatedNMNIST"  # folder and name of the simulated digits
DEPTHS = ("", "*/", "*/*/", "*/*/*/")  # of folders in which misplaced recordings are looked for
SIMULATOR_FILE = "simulator.json"  # beside simulated recordings, which it tells from real ones

# --- The data set ---------------------------------------------------------------------------------


class NMNIST:
    """The recordings of one part of a data set, checked as they are read.

        test = NMNIST("data/NMNIST/Test", "test")
        events, digit = test[0]

    `folder` holds a folder for each digit. With `first_saccade_only`, the events are those of the
    first 100 ms, with `stabilize` without the saccades' movement, as in `tonic.datasets.NMNIST`.
    `name` is for figures, `source` is 'nmnist' or 'simulated'; frames are cached in the folder
    `cache`. Raises `UserError` if a digit has no recordings, or other files among them.
    """

    dtype = tonic.datasets.NMNIST.dtype

    def __init__(
        self,
        folder: str | Path,
        split: str,
        first_saccade_only: bool = False,
        stabilize: bool = False,
        name: str = "NMNIST",
        source: str = "nmnist",
        cache: Path | None = None,
    ):
        self.folder, self.split, self.source, self.cache = Path(folder), split, source, cache
        self.first_saccade_only, self.stabilize = first_saccade_only, stabilize
        self.name = name + ", first saccade" * first_saccade_only + ", stabilized" * stabilize
        self.files = list_recordings(self.folder)
        self.labels = [int(file.parent.name) for file in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Return (events, digit). Raises `UserError` naming a file that is no recording."""
        path, wrong = self.files[index], None
        size = path.stat().st_size
        if size == 0 or size % 5:
            wrong = f"{size} bytes, not a multiple of 5 above 0"
        else:
            events = tonic.io.read_mnist_file(str(path), dtype=self.dtype)
            if len(events) == 0:
                wrong = "no events"
            elif events["x"].max() > 33 or events["y"].max() > 33:
                wrong = "events outside the 34 x 34 pixels"
            elif (np.diff(events["t"]) < 0).any():
                wrong = "time stamps that run backwards"
        if wrong:
            raise UserError(f"{path} is damaged ({wrong}): put a whole copy there, or delete it")
        return select(events, self.first_saccade_only, self.stabilize), self.labels[index]


def select(events: np.ndarray, first_saccade_only: bool, stabilize: bool) -> np.ndarray:
    """Return events as `tonic.datasets.NMNIST` does with these options."""
    if first_saccade_only:
        events = events[events["t"] < 100_000]
    # A copy, since tonic's function changes the events that it is given.
    return tonic.datasets.nmnist.stabilize(events.copy()) if stabilize else events


def denoised(events: np.ndarray, microseconds: int | None) -> np.ndarray:
    """Return events after tonic's `Denoise`, if asked."""
    if not microseconds or len(events) == 0:
        return events
    return tonic.transforms.Denoise(microseconds)(events)


def open_recordings(
    data_dir: str | Path, dataset: str = "auto", splits: Sequence[str] = SPLITS, **options: bool
) -> list[NMNIST]:
    """Return the parts `splits` of a data set, and print what they are.

    `dataset` is 'nmnist', 'simulated', or 'auto': N-MNIST if it is on disk or can be downloaded,
    else simulated recordings, with a warning. `options` are `first_saccade_only` and `stabilize`.
    Raises `UserError` if what is on disk is no data set, or has not all parts.
    """
    root = None if dataset == "simulated" else find_or_download(Path(data_dir), dataset)
    source = "simulated" if root is None else "nmnist"
    root = root or simulate_digits(Path(data_dir) / SIMULATED)
    parts, name, recordings = find_parts(root), data_set_name(root), []
    for split in splits:
        if split not in parts:
            raise UserError(f"{root} has no {split} part; add it: {LAYOUT}")
        folder = parts[split] if parts[split].is_dir() else unpack(parts[split], split)
        folder, cache = digits_folder(folder, split), Path(data_dir) / "cache"
        part = NMNIST(folder, split, name=name, source=source, cache=cache, **options)
        missing = f" of {PUBLISHED[split]:,}" * (name == "NMNIST" and len(part) < PUBLISHED[split])
        count = f"{len(part):,}{missing}"
        print(f"data set    {part.name}, {split}: {count} recordings in {part.folder}")
        recordings.append(part)
    return recordings


def find_or_download(data_dir: Path, dataset: str) -> Path | None:
    """Return the folder of N-MNIST; for `dataset` 'auto' warn and return None if there is none."""
    if root := find_data_set(data_dir):
        return root
    try:
        return download(data_dir)
    except UserError as error:
        how = f"connect this machine, or unpack {HOMEPAGE} into {data_dir}/NMNIST"
        if dataset == "nmnist":
            raise UserError(f"no N-MNIST in {data_dir}: {error}; {how}") from None
        utils.warn(f"no N-MNIST in {data_dir}: {error}. SIMULATED recordings instead; {how}")
    return None


def list_recordings(folder: Path) -> list[Path]:
    """Return the recordings <digit>/*.bin of a part; refuse what would be missed or mislabelled."""
    digits = [str(digit) for digit in range(10)]
    for path in visible(folder):
        if path.name not in digits and (path.is_dir() or path.suffix.lower() == ".bin"):
            raise UserError(f"{path} is no digit: {folder} must hold <digit>/*.bin, digits 0 to 9")
    files = []
    for digit in digits:
        found = visible(folder / digit)
        others = [path.name for path in found if path.suffix != ".bin"]
        if others or not found:
            seen = f"{others[0]} ({len(others):,} of {len(found):,} files)" if others else "nothing"
            raise UserError(f"{folder / digit} holds {seen}; it must hold recordings (*.bin) alone")
        files += found
    return files


def visible(folder: Path) -> list[Path]:
    """Return what a folder holds, sorted, but for what operating systems add."""
    ignored = ("__MACOSX", "Thumbs.db", "desktop.ini", "lost+found")
    paths = folder.iterdir() if folder.is_dir() else []
    return sorted(p for p in paths if not p.name.startswith(".") and p.name not in ignored)


def find_data_set(data_dir: Path) -> Path | None:
    """Return the folder that holds N-MNIST, `data_dir` or one in it, None if there is nothing.

    Raises `UserError` if there are several, or recordings that are not where they should be.
    """
    folders = [path for path in visible(data_dir) if path.is_dir() and path.name != SIMULATED]
    candidates = [data_dir, *(path for path in folders if path.name.lower() not in SPLITS)]
    found = [folder for folder in candidates if find_parts(folder)]
    if len(found) > 1:
        names = ", ".join(map(str, found))
        raise UserError(f"--data_dir {data_dir}: several data sets ({names}); name or keep one")
    if not found:
        recordings = (folder.glob(f"{deep}*.[bB][iI][nN]") for folder in folders for deep in DEPTHS)
        stray = next(itertools.chain(data_dir.glob("*.bin"), *recordings), None)
        expected = data_dir / "NMNIST"
        if stray is None and (expected.is_symlink() or visible(expected)):
            stray = expected
        if stray:
            raise UserError(f"--data_dir {data_dir} holds {stray}, but not {LAYOUT}")
    return found[0] if found else None


def find_parts(root: Path) -> dict[str, Path]:
    """Return the folder or zip of each part in `root`: Train, or train.zip, whatever the case."""
    parts = {}
    for split in SPLITS:
        folders = [path for path in visible(root) if path.name.lower() == split and path.is_dir()]
        zips = [path for path in visible(root) if path.name.lower() == f"{split}.zip"]
        found = folders or zips
        if len(found) > 1:
            raise UserError(f"{root} holds {' and '.join(path.name for path in found)}; keep one")
        if found:
            parts[split] = found[0]
    return parts


def digits_folder(part: Path, split: str) -> Path:
    """Return the folder in which a part's digits are: its folder, or one level deeper."""
    deeper = [path for path in visible(part) if path.name.lower() == split and path.is_dir()]
    return deeper[0] if deeper and not (part / "0").exists() else part


def unpack(archive: Path, split: str) -> Path:
    """Extract a part's zip into a folder beside it, which appears when it is whole; return it."""
    folder = archive.with_name(split.capitalize())
    try:
        with (
            utils.name_in_errors(archive),
            zipfile.ZipFile(archive) as zip_file,
            tempfile.TemporaryDirectory(prefix=".", dir=archive.parent) as temporary,
        ):
            for member in tqdm(zip_file.infolist(), desc=f"extract {archive.name}", unit="file"):
                zip_file.extract(member, Path(temporary) / split)
            new = digits_folder(Path(temporary) / split, split)
            if not any(new.glob("[0-9]/*.bin")):
                raise zipfile.BadZipFile("no <digit>/*.bin in it")
            new.rename(folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        reason = f"can't be extracted ({utils.first_line(error)})"
        raise UserError(f"{archive} {reason}: replace it, or delete it") from None
    return folder


def download(data_dir: Path, silent_seconds: float = 10) -> Path:
    """Download N-MNIST into `data_dir`/NMNIST, which appears when it is whole; return it.

    A host that is silent for `silent_seconds` is given up: `UserError`. A zip whose download was
    finished is kept for the next try.
    """
    source, zips = tonic.datasets.NMNIST, data_dir / ".download"
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(silent_seconds)  # tonic sets no limit
    try:
        download_url(source.train_url, str(zips), "train.zip", source.train_md5)
        download_url(source.test_url, str(zips), "test.zip", source.test_md5)
    except (OSError, http.client.HTTPException, RuntimeError) as error:
        raise UserError(f"N-MNIST can't be downloaded ({utils.first_line(error)})") from None
    finally:
        socket.setdefaulttimeout(before)
    for split in SPLITS:
        if find_parts(zips)[split].suffix == ".zip":  # not extracted before
            unpack(zips / f"{split}.zip", split)
    root = zips.rename(data_dir / "NMNIST")
    for split in SPLITS:
        (root / f"{split}.zip").unlink()
    return root


def data_set_name(root: Path) -> str:
    """Return 'NMNIST', or for simulated recordings 'SimulatedNMNIST', with other images' name."""
    path = root / SIMULATOR_FILE
    if not path.exists():
        return "NMNIST"
    try:
        images = utils.read_json(path)["images"]
    except (TypeError, KeyError):
        raise UserError(f"{path} is damaged: record the data set again") from None
    return SIMULATED if images == BUILT_IN_IMAGES else f"{SIMULATED} ({images})"


# --- Frames and their cache -----------------------------------------------------------------------

CACHE_VERSION = 7  # increased if the same options and recordings give other frames


@dataclass
class Frames:
    """Binned recordings, as the indices and counts of their non-zero bins.

    The bin at (p, y, x) of a frame has the index (y * 34 + x) * 2 + p. The non-zero bins of all
    recordings follow one another, recording by recording and frame by frame.
    """

    bin_index: torch.Tensor  # int16 [non-zero bins]
    count: torch.Tensor  # int8, int16 or int32 [non-zero bins]: events in the bin
    nnz_per_frame: torch.Tensor  # int16 [N, T]: non-zero bins of each frame
    labels: torch.Tensor  # uint8 [N]
    num_events: torch.Tensor  # int32 [N]: of each recording, before --denoise
    num_on_events: torch.Tensor  # int32 [N]: those of polarity 1
    duration: torch.Tensor  # int32 [N]: microseconds from the first event to the last
    hashes: torch.Tensor  # int64 [N]: of each recording's content

    def __post_init__(self):
        self._length = self.nnz_per_frame.sum(1, dtype=torch.int64).cpu()
        self._start = self._length.cumsum(0) - self._length

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def time_steps(self) -> int:
        """The number of frames per recording, T."""
        return self.nnz_per_frame.shape[1]

    @property
    def num_blank(self) -> int:
        """The number of recordings without an event in any frame."""
        return int((self._length == 0).sum())

    @functools.cached_property
    def fingerprint(self) -> str:
        """A text that is equal if and only if recordings, labels and their order are."""
        content = self.hashes.cpu().numpy().tobytes() + self.labels.cpu().numpy().tobytes()
        return hashlib.sha256(content).hexdigest()[:12]

    def to(self, device: torch.device) -> "Frames":
        """Return the same frames, which lie on `device`; 0.5 GB for 60,000 recordings."""
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def batch(
        self, indices: torch.Tensor, dtype: torch.dtype = torch.float32, augment: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return frames [T, B, 2, 34, 34] and labels int64 [B] of the recordings `indices` [B].

        `indices` are on the CPU. The frames are stored channels-last, as `dtype`. `augment` moves
        and drops events at random (`augment_events`).
        """
        time_steps, batch_size = self.time_steps, len(indices)
        frame, bin_index, count = self.entries(indices)
        if augment:
            affine = sample_affine(batch_size, time_steps).to(frame.device, non_blocking=True)
            frame, bin_index, count = augment_events(frame, bin_index, count, affine, time_steps)
        size = time_steps * batch_size * BINS_PER_FRAME
        frames = torch.zeros(size, dtype=dtype, device=frame.device)
        # Events that moved to the same bin add up.
        where = (frame * BINS_PER_FRAME + bin_index,)
        frames.index_put_(where, count.to(dtype), accumulate=augment)
        frames = frames.view(time_steps, batch_size, 34, 34, 2).movedim(-1, 2)
        return frames, self.labels[indices.to(frame.device, non_blocking=True)].long()

    def entries(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the non-zero bins of a batch of B recordings: frame t * B + b, index, count."""
        device = self.labels.device
        # Sizes are known on the CPU, so that a GPU need not synchronize.
        length, start = self._length[indices], self._start[indices]
        size = int(length.sum())
        # Entry i of a recording that starts at `first` in the batch is entry i - first + start.
        first = length.cumsum(0) - length
        shift = (start - first).to(device, non_blocking=True)
        length = length.to(device, non_blocking=True)
        entry = torch.arange(size, device=device)
        entry += shift.repeat_interleave(length, output_size=size)
        nnz = self.nnz_per_frame[indices.to(device, non_blocking=True)].long()  # [B, T]
        t, b = (torch.arange(n, device=device) for n in (self.time_steps, len(indices)))
        frame = (t * len(b) + b[:, None]).flatten()  # [B, T]: the entries are in this order
        frame = frame.repeat_interleave(nnz.flatten(), output_size=size)
        return frame, self.bin_index[entry], self.count[entry]

    def batches(
        self, indices: torch.Tensor, batch_size: int, dtype: torch.dtype = torch.float32
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield `batch` of `indices`, `batch_size` at a time; the last may be smaller."""
        for chunk in indices.split(batch_size):
            yield self.batch(chunk, dtype)


def load_frames(
    recordings: NMNIST, time_steps: int, denoise: int | None = None, bin_by: str = "time"
) -> Frames:
    """Return the recordings binned into `time_steps` frames, from the cache if it holds them.

    `denoise` is the filter time of `tonic.transforms.Denoise` in microseconds; `bin_by` is 'time'
    for frames of equal duration or 'events' for frames of equal event count. A cache is keyed by
    the options and by every recording's name, size and time of change.
    """
    path = cache_path(recordings, time_steps, denoise, bin_by) if recordings.cache else None
    frames = read_cache(path, (len(recordings), time_steps)) if path else None
    if frames is None:
        frames = bin_recordings(recordings, time_steps, denoise, bin_by)
        if path:
            write_cache(path, frames)
    if frames.num_blank:
        utils.warn(
            f"{frames.num_blank:,} of {len(frames):,} {recordings.split} recordings have no event "
            "in any frame: choose fewer --time_steps, a longer --denoise or fewer options"
        )
    return frames


def cache_path(recordings: NMNIST, time_steps: int, denoise: int | None, bin_by: str) -> Path:
    """Return the file that caches the frames of these recordings with these options."""
    options = "_first_saccade" * recordings.first_saccade_only
    options += "_stabilized" * recordings.stabilize + "_by_events" * (bin_by == "events")
    digest = hashlib.sha256(f"version {CACHE_VERSION} {recordings.folder.resolve()}\n".encode())
    for path in recordings.files:
        status, name = path.stat(), path.relative_to(recordings.folder)
        digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode())
    name = f"{recordings.source}_{recordings.split}{options}_T{time_steps}_denoise{denoise or 0}"
    return recordings.cache / f"{name}_{digest.hexdigest()[:16]}.pt"


def read_cache(path: Path, shape: tuple[int, int]) -> Frames | None:
    """Return the frames in a cache, memory-mapped, None if there are none of `shape` [N, T]."""
    if not path.is_file():
        return None
    try:
        frames = Frames(**torch.load(path, mmap=True, weights_only=True))
        if frames.nnz_per_frame.shape == shape:
            return frames
        reason = "its shape is wrong"
    except Exception as error:  # torch raises many types on a damaged file
        reason = utils.first_line(error)
    utils.warn(f"cache {path} can't be read ({reason}): binning again")
    return None


def write_cache(path: Path, frames: Frames) -> None:
    """Write the cache; where that fails, warn, and leave the frames in memory."""
    try:
        utils.save_tensors(path, {f.name: getattr(frames, f.name) for f in fields(frames)})
        print(f"cache       {path} ({path.stat().st_size / len(frames) / 1000:.1f} KB a recording)")
    except OSError as error:
        utils.warn(f"cache {path} can't be written ({error.strerror}): frames stay in memory")


def bin_recordings(
    recordings: NMNIST, time_steps: int, denoise: int | None = None, bin_by: str = "time"
) -> Frames:
    """Bin recordings as tonic's `ToFrame` does, after its `Denoise` if asked."""
    indices, counts, nnz, statistics, hashes = [], [], [], [], []
    for i in tqdm(range(len(recordings)), desc=f"bin {recordings.split}", unit="recording"):
        events, _ = recordings[i]
        digest = hashlib.sha256(recordings.files[i].read_bytes()).digest()
        hashes.append(int.from_bytes(digest[:8], "big", signed=True))
        duration = events["t"][-1] - events["t"][0] if len(events) else 0
        statistics.append((len(events), events["p"].sum(), duration))
        events = denoised(events, denoise)
        frame, bin_index, count = bin_events(events, time_steps, bin_by)
        indices.append(bin_index.astype(np.int16))
        signed = np.min_scalar_type(-1 - count.max(initial=0))  # the smallest that holds all
        counts.append(count.astype(signed))
        nnz.append(np.bincount(frame, minlength=time_steps).astype(np.int16))
    num_events, num_on_events, duration = np.array(statistics, dtype=np.int32).T
    arrays = {
        "bin_index": np.concatenate(indices),
        "count": np.concatenate(counts),  # of the widest type
        "nnz_per_frame": np.stack(nnz),
        "labels": np.array(recordings.labels, dtype=np.uint8),
        "num_events": num_events,
        "num_on_events": num_on_events,
        "duration": duration,
        "hashes": np.array(hashes),
    }
    return Frames(**{name: torch.from_numpy(np.array(array)) for name, array in arrays.items()})


def bin_events(
    events: np.ndarray, time_steps: int, bin_by: str = "time"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the non-zero bins of a recording: frame, index in it as in `Frames`, event count.

    They are the bins of tonic's `ToFrame`, which also fills the others, 96% of them.
    """
    if len(events) == 0:  # denoising left none
        return (np.zeros(0, int),) * 3
    slicers = {"time": tonic.slicers.SliceByTimeBins, "events": tonic.slicers.SliceByEventBins}
    first, last = np.array(slicers[bin_by](time_steps).get_slice_metadata(events, None)).T
    events = events[first[0] : last[-1]]  # without the rest that time_steps do not divide
    frame = np.repeat(np.arange(time_steps), last - first)
    bin_index = (events["y"].astype(int) * 34 + events["x"]) * 2 + events["p"]
    bins, count = np.unique(
        (frame * BINS_PER_FRAME + bin_index).astype(np.int32), return_counts=True
    )
    return *np.divmod(bins, BINS_PER_FRAME), count


def to_frames(events: np.ndarray, settings: dict) -> torch.Tensor:
    """Return the frames [T, 1, 2, 34, 34] of one recording's events, for a trained network.

    `settings` are those of its checkpoint, which say how its training's frames were made.
    """
    events = select(events, settings["first_saccade_only"], settings["stabilize"])
    events, time_steps = denoised(events, settings["denoise"]), settings["time_steps"]
    frame, bin_index, count = bin_events(events, time_steps, settings["bin_by"])
    frames = torch.zeros(time_steps * BINS_PER_FRAME)
    frames[frame * BINS_PER_FRAME + bin_index] = torch.from_numpy(count).float()
    return frames.view(time_steps, 1, 34, 34, 2).movedim(-1, 2)


# --- Augmentation ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augmentation:
    """How far a recording is changed: limits of uniform distributions around no change."""

    shift: float = 1.0  # pixels, along each axis
    rotation: float = 5.0  # degrees, around the centre of the sensor
    scale: float = 0.05  # relative, of each axis
    shear: float = 0.05  # pixels along x for one along y
    time_shift: float = 0.03  # of a recording's duration
    drop: float = 0.05  # share of the bins whose events are dropped


AUGMENTATION = Augmentation()


def sample_affine(batch_size: int, time_steps: int) -> torch.Tensor:
    """Draw how each recording of a batch moves, [7, B]: an affine map and a shift in steps.

    The first six rows are the matrix that maps (x, y, 1), around the centre: shear, scale,
    rotation, then shift. The numbers are drawn on the CPU, from torch's generator.
    """
    a = AUGMENTATION
    angle, scale_x, scale_y, shear, shift_x, shift_y, shift_t = 2 * torch.rand(7, batch_size) - 1
    angle = torch.deg2rad(a.rotation * angle)
    cos, sin = torch.cos(angle), torch.sin(angle)
    scale_x, scale_y, shear = 1 + a.scale * scale_x, 1 + a.scale * scale_y, a.shear * shear
    x_row = [cos * scale_x, cos * scale_x * shear - sin * scale_y, a.shift * shift_x]
    y_row = [sin * scale_x, sin * scale_x * shear + cos * scale_y, a.shift * shift_y]
    return torch.stack([*x_row, *y_row, (a.time_shift * time_steps * shift_t).round()])


def augment_events(frame, bin_index, count, affine, time_steps: int):
    """Move each recording's events as `affine` [7, B] says, and drop some; return the result.

    `frame` (t * B + b), `bin_index` and `count` [entries] are a batch's non-zero bins.
    """
    batch_size = affine.shape[1]
    dropped = torch.rand(len(frame), device=frame.device) < AUGMENTATION.drop
    x_x, x_y, x_1, y_x, y_y, y_1, steps = affine.index_select(1, frame % batch_size)
    centre = (SENSOR_SIZE[0] - 1) / 2
    pixel = bin_index >> 1
    polarity, row = bin_index - 2 * pixel, pixel // 34
    x, y = pixel - 34 * row - centre, row - centre
    new_x = (x_x * x + x_y * y + (x_1 + centre)).round().long()
    new_y = (y_x * x + y_y * y + (y_1 + centre)).round().long()
    frame = frame + steps.long() * batch_size
    kept = (new_x >= 0) & (new_x < 34) & (new_y >= 0) & (new_y < 34) & ~dropped
    kept &= (frame >= 0) & (frame < time_steps * batch_size)
    # What is dropped gets a count of 0: sizes stay fixed, so a GPU need not synchronize.
    bin_index = torch.where(kept, (new_y * 34 + new_x) * 2 + polarity, 0)
    return torch.where(kept, frame, 0), bin_index, count * kept


# --- What scripts use -----------------------------------------------------------------------------


@dataclass
class Data:
    """A data set, binned, on the device; `train` is None where the test part alone was loaded."""

    name: str  # in files and figures
    train: Frames | None
    test: Frames
    test_files: list[str]  # relative to the folder of the test part
    flags: dict  # that name it; `dataset` is 'nmnist' or 'simulated'
    step_ms: float | None  # nominal duration of a time step; None if it varies
    saccade_ends: list[float]  # in time steps; [] if these vary

    def describe(self, splits: Sequence[str] = SPLITS) -> dict:
        """Return what tells a data set from another; copied or touched files are the same data."""
        description = {"source": self.flags["dataset"], "data_set": self.name}
        for split in splits:
            frames = self.train if split == "train" else self.test
            description[f"{split}_recordings"] = len(frames)
            description[f"{split}_fingerprint"] = frames.fingerprint
        return description


def load_data(args, device, splits=SPLITS, trained_on=None, loaded: Data | None = None) -> Data:
    """Open, bin and move to `device` the recordings that the flags name, if not yet `loaded`.

    `trained_on` is `Data.describe()` of those that a network was trained on: `--dataset auto` takes
    simulated ones again if they are in data_dir, also where N-MNIST is there meanwhile.
    """
    names = utils.flag_names(add_data_flags, add_frame_flags)
    flags = {name: getattr(args, name) for name in names}
    was_simulated = trained_on and trained_on["source"] == "simulated"
    if args.dataset == "auto" and was_simulated and (Path(args.data_dir) / SIMULATED).is_dir():
        flags["dataset"] = "simulated"
    if loaded and loaded.flags == flags:
        return loaded
    parts, frames = open_by_flags(argparse.Namespace(**flags), splits), {}
    for part in parts:
        binned = load_frames(part, args.time_steps, args.denoise, args.bin_by)
        frames[part.split] = binned.to(device)
    train, test, part = frames.get("train"), frames["test"], parts[-1]
    if train is not None and (repeated := int(torch.isin(test.hashes, train.hashes).sum())):
        utils.warn(f"{repeated:,} test recordings are also in the training part")
    name = part.name
    if args.bin_by == "events":
        name += ", frames of equal event count"
    flags["dataset"] = part.source
    files = [str(path.relative_to(part.folder)) for path in part.files]
    step_ms = None
    saccade_ends = []
    if args.bin_by == "time":
        ends_ms = SACCADE_ENDS[:1] if args.first_saccade_only else SACCADE_ENDS
        step_ms = ends_ms[-1] / args.time_steps
        saccade_ends = [end * args.time_steps / ends_ms[-1] for end in ends_ms]
    return Data(name, train, test, files, flags, step_ms, saccade_ends)


def open_by_flags(args: argparse.Namespace, splits: Sequence[str] = SPLITS) -> list[NMNIST]:
    """Open the recordings that the flags name."""
    options = {"first_saccade_only": args.first_saccade_only, "stabilize": args.stabilize}
    return open_recordings(args.data_dir, args.dataset, splits, **options)


def describe_tested(tested: dict, trained: dict) -> str:
    """Return the name of recordings that a network is tested on; if it was trained on others, so.

    Both are `Data.describe()`.
    """
    name = tested["data_set"]
    if name != trained["data_set"]:
        return f"{name} (TRAINED on {trained['data_set']})"
    if tested["test_fingerprint"] != trained["test_fingerprint"]:
        return f"{name} (not the test part of the training)"
    return name


def split_validation(
    labels: torch.Tensor, val_split: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices of training and validation recordings, stratified, fixed by `seed`."""
    indices, labels = np.arange(len(labels)), labels.cpu().numpy()
    try:
        parts = train_test_split(indices, test_size=val_split, stratify=labels, random_state=seed)
    except ValueError:
        raise UserError(
            f"--val_split {val_split} of {len(labels)} recordings leaves a digit out of training "
            "or validation: choose another share or add recordings"
        ) from None
    train, val = (torch.from_numpy(np.sort(part)) for part in parts)
    return train, val


def add_frame_flags(parser) -> None:
    """Add the flags that shape frames."""
    flag = functools.partial(utils.add_flag, parser)
    flag("--time_steps", 25, "frames a recording is binned into, T", type=number(int, 1, 1000))
    denoise = "drop events without a neighbour within this many microseconds (default: off)"
    flag("--denoise", None, denoise, type=number(int, 1), metavar="MICROSECONDS")
    flag("--bin_by", "time", "frames of equal duration or event count", choices=["time", "events"])
    flag("--first_saccade_only", False, "only events of the first 100 ms (tonic's option)")
    flag("--stabilize", False, "take the saccades' movement out of the events (tonic's option)")


def add_data_flags(parser) -> None:
    """Add the flags that say where recordings are."""
    utils.add_flag(parser, "--data_dir", "./data", "folder of the recordings")
    dataset = "nmnist: from data_dir, else downloaded; simulated: scikit-learn's digits before a "
    dataset += "simulated camera; auto: nmnist, or simulated if it can't be downloaded"
    utils.add_flag(parser, "--dataset", "auto", dataset, choices=DATASETS)


# --- The simulated camera -------------------------------------------------------------------------


@dataclass(frozen=True)
class Camera:
    """The camera's parameters, each with what it was fitted to in 100 to 400 real recordings.

    Spreads between recordings are standard deviations of normal distributions, cut off at 2.5.
    """

    duration: float = 308.0  # ms at mean speed; real last events: 307.6 on average
    gamma: float = 4.4  # exponent from grey value to light: event maps' correlation
    blur: float = 0.6  # pixels, standard deviation of the point spread: event maps
    dark_light: float = 1.6  # of the background, where a full stroke adds 1: spread of counts
    threshold: float = 0.065  # log light between two events: 4,101 events on average
    threshold_spread: float = 0.055  # relative, from pixel to pixel: event maps
    refractory: float = 1.7  # ms without events after one: 99% of real pauses are longer
    tau_dark: float = 5.3  # ms, receptor at the background's light: ON events, 5.4 ms apart
    tau_bright: float = 3.2  # ms, receptor at full light: OFF events, 4.2 ms apart
    noise_on: float = 0.00035  # events per pixel and ms: the corners' 0.12 per recording
    noise_off: float = 0.00002  # events per pixel and ms: almost none in the corners
    shift_spread: float = 0.05  # pixels, along each axis: real 0.059 (y) and 0.051 (x)
    speed_spread: float = 0.0085  # relative: real last events lie between 297 and 315 ms
    start_spread: float = 0.6  # ms: what the speed leaves of the real 0.75
    recording_threshold_spread: float = 0.03  # relative: counts differ by 4% for one image
    path_step: float = 8.0  # ms between the points of `path`
    # (y, x) of the digit's centre from the sensor's, y down, in pixels: shifts of real event maps.
    # fmt: off
    path: tuple = (
        (-1.62, -2.53), (-1.40, -2.57), (-1.17, -2.60), (-0.74, -2.65), (0.00, -2.69),
        (0.96, -2.65), (1.98, -2.54), (2.81, -2.04), (3.35, -1.53), (3.57, -1.11),
        (3.60, -1.02), (3.55, -0.93), (3.43, -0.82), (3.34, -0.69), (3.33, -0.52),
        (3.31, -0.33), (3.00, 0.15), (2.39, 0.68), (1.50, 1.19), (0.56, 1.38),
        (-0.34, 1.55), (-1.12, 1.91), (-1.50, 2.15), (-1.62, 2.31), (-1.60, 2.40),
        (-1.54, 2.58), (-1.53, 2.73), (-1.61, 2.79), (-1.68, 2.65), (-1.61, 2.16),
        (-1.54, 1.38), (-1.55, 0.65), (-1.59, -0.22), (-1.64, -1.05), (-1.75, -1.64),
        (-1.85, -2.00), (-1.84, -2.34), (-1.78, -2.46), (-1.77, -2.43), (-1.77, -2.44),
    )
    # fmt: on


CAMERA = Camera()
TEST_DIGITS = 360  # of scikit-learn's 1,797
BUILT_IN_IMAGES = "sklearn.datasets.load_digits"
STEP = np.float32(1)  # ms, with at most one event per pixel; halving it changed no result
SIDE = 34  # pixels of the sensor
PAD = 4  # pixels of empty scene around the sensor; the saccades reach less far
SUB = 4  # the blurred scene is tabulated at every 1 / SUB of a pixel
SIM_BATCH_SIZE = 64  # recordings simulated at once; the result does not depend on it


def simulate_events(
    images: np.ndarray, generators: list[np.random.Generator]
) -> Iterator[np.ndarray]:
    """Record images (uint8 [N, 28, 28]) with a simulated event camera; yield each one's events.

    The image moves along N-MNIST's three saccades (Orchard et al. 2015) before pixels as
    Lichtsteiner et al. 2008 built them, as ESIM (Rebecq et al. 2018) and v2e (Hu et al. 2021)
    simulate them:

        light      I = (image / 255)^gamma, blurred, moved by `saccade_offsets`
        receptor   L = log(dark_light + I), dV/dt = (L - V) / tau; tau_dark to tau_bright with L
        event      if |V - V_ref| >= threshold: V_ref = V, then none for the refractory period
        polarity   0 if V rose, 1 if it fell, as in N-MNIST, where 1 is called ON all the same
        noise      thresholds vary between pixels and recordings; some events occur at random

    Time is in ms inside and in microseconds in the events, which are sorted by it. A recording's
    generator and image determine every bit of it, whatever is recorded beside it: every sum is
    elementwise over recordings.
    """
    for first in range(0, len(images), SIM_BATCH_SIZE):
        batch = slice(first, first + SIM_BATCH_SIZE)
        yield from simulate_batch(images[batch], generators[batch])


def simulate_batch(images: np.ndarray, generators: list[np.random.Generator]) -> list[np.ndarray]:
    """Return the events of each of the images [N, 28, 28], all stepped at once."""
    n = len(images)
    shifts, scale, start, threshold, noise = zip(*map(sample_variation, generators), strict=True)
    path = saccade_offsets(np.arange(0, CAMERA.duration + STEP / 2, STEP))
    scene, thresholds = log_scene(images, np.array(shifts)), np.stack(threshold, axis=-1)
    pixel, when, polarity = pixel_events(scene, path, thresholds)
    noise_polarity, noise_pixel, noise_when = map(np.concatenate, zip(*noise, strict=True))
    noise_recording = np.repeat(np.arange(n), [len(times) for _, _, times in noise])
    recording = np.concatenate([pixel % n, noise_recording])
    polarity = np.concatenate([polarity.astype(np.int64), noise_polarity])
    pixel = np.concatenate([pixel // n, noise_pixel])
    when = np.concatenate([when, noise_when])
    microseconds = 1000 * (when * np.array(scale)[recording] + np.array(start)[recording])
    microseconds = np.maximum(microseconds, 0).astype(np.int64)
    # One sort, by bits: 40 and up recording, 16 to 39 microseconds, 1 to 15 pixel, 0 polarity.
    key = np.sort(recording << 40 | microseconds << 16 | pixel << 1 | polarity)
    y, x = np.divmod((key >> 1) & 0x7FFF, SIDE)
    t, p = (key >> 16) & 0xFFFFFF, key & 1
    events = tonic.io.make_structured_array(x, y, t, p, dtype=NMNIST.dtype)
    return np.split(events, np.searchsorted(key, np.arange(1, n) << 40))


def saccade_offsets(times: np.ndarray) -> np.ndarray:
    """Return the digit's offset (y, x) [n, 2] in pixels at `times` in ms, on a smooth curve.

    Cubic Hermite (Catmull-Rom) between the path's points, constant before and after them.
    """
    points = np.array(CAMERA.path)
    slope = np.gradient(points, axis=0)
    u = np.clip(np.asarray(times, float) / CAMERA.path_step, 0, len(points) - 1)
    i = np.minimum(u.astype(int), len(points) - 2)
    u = (u - i)[:, None]
    at_points = (1 + 2 * u) * (1 - u) ** 2 * points[i] + u**2 * (3 - 2 * u) * points[i + 1]
    return at_points + u * (1 - u) ** 2 * slope[i] - u**2 * (1 - u) * slope[i + 1]


def sample_variation(rng: np.random.Generator):
    """Draw what is random in a recording: (shift [2], time scale, start, thresholds, noise).

    Thresholds are [34, 34]; noise is (polarity, pixel y * 34 + x, time in ms) of each noise event.
    """
    z = np.clip(rng.standard_normal(5), -2.5, 2.5)
    relative = rng.standard_normal((SIDE, SIDE), dtype=np.float32)
    relative = 1 + relative * np.float32(CAMERA.threshold_spread)
    level = np.float32(CAMERA.threshold * (1 + z[4] * CAMERA.recording_threshold_spread))
    threshold = np.maximum(relative, np.float32(0.3)) * level
    expected = np.array([CAMERA.noise_off, CAMERA.noise_on]) * SIDE * SIDE * CAMERA.duration
    counts = rng.poisson(expected)
    where, when = rng.random((counts.sum(), 2)).T
    pixel = (where * SIDE * SIDE).astype(np.int64)
    noise = np.repeat([0, 1], counts), pixel, when * CAMERA.duration
    scale, start = 1 + z[2] * CAMERA.speed_spread, z[3] * CAMERA.start_spread
    return z[:2] * CAMERA.shift_spread, scale, start, threshold, noise


def log_scene(images: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Return L of images [N, 28, 28] moved by shifts [N, 2] in pixels: [SUB, SUB, H, H, N].

    H is 34 + 2 PAD. Entry [r, s, i, j] is the scene at (i + r / SUB - PAD, j + s / SUB - PAD) of
    the sensor. The blur's taps are summed one by one, elementwise over recordings, so that a
    recording's bits can't depend on its neighbours.
    """
    n, size, first = len(images), SIDE + 2 * PAD, PAD + (SIDE - 28) // 2  # first row of the image
    grey_to_light = ((np.arange(256) / 255) ** CAMERA.gamma).astype(np.float32)
    light = grey_to_light[np.ascontiguousarray(images.transpose(1, 2, 0))]
    taps = np.arange(-3, 4)
    at = taps[:, None] + np.arange(SUB) / SUB
    distance = at[..., None, None] - shifts  # [tap, sub-pixel, N, axis]
    weight = np.exp(-(distance**2) / (2 * CAMERA.blur**2))
    weight = (weight / sum(weight)).astype(np.float32)
    rows = np.zeros((SUB, size, 28, n), np.float32)
    scene = np.zeros((SUB, SUB, size, size, n), np.float32)
    for tap, w in zip(taps, weight, strict=True):
        rows[:, first + tap : first + tap + 28] += w[:, None, None, :, 0] * light
    for tap, w in zip(taps, weight, strict=True):
        for s in range(SUB):
            scene[:, s, :, first + tap : first + tap + 28] += w[s, :, 1] * rows
    scene += np.float32(CAMERA.dark_light)
    return np.log(scene, out=scene)


def sample_scene(scene: np.ndarray, offset: np.ndarray, view: np.ndarray, work: np.ndarray) -> None:
    """Write to `view` [34, 34, N] what the sensor sees with the digit at `offset` (y, x)."""
    at = (PAD - offset) * SUB
    (row, column), (v, u) = np.floor(at).astype(int), (at % 1).astype(np.float32)
    view[:] = 0
    for i, weight_y in ((row, 1 - v), (row + 1, v)):  # bilinear between the table's entries
        for j, weight_x in ((column, 1 - u), (column + 1, u)):
            top, left = i // SUB, j // SUB
            entry = scene[i % SUB, j % SUB, top : top + SIDE, left : left + SIDE]
            view += np.multiply(entry, weight_y * weight_x, out=work)


def max_log_intensity(scene: np.ndarray, path: np.ndarray) -> np.ndarray:
    """Return the largest L [34, 34, N] of the rectangle around the path, for each pixel."""
    top = scene.max(axis=(0, 1))
    for axis in (0, 1):
        low, high = int(np.floor(-path[:, axis].max())), int(np.ceil(-path[:, axis].min())) + 1
        shifted = [top.take(range(PAD + d, PAD + d + SIDE), axis) for d in range(low, high)]
        top = np.maximum.reduce(shifted)
    return top


def pixel_events(scene: np.ndarray, path: np.ndarray, threshold: np.ndarray):
    """Step the pixel equations of `simulate_events` along the path.

    Returns (pixel, time in ms, polarity) of each event: `threshold` is [34, 34, N], and `pixel` a
    flat index into it. Only pixels that the digit can reach are stepped.
    """
    dark, bright = np.log(CAMERA.dark_light), np.log(CAMERA.dark_light + 1)
    pixels = np.flatnonzero(max_log_intensity(scene, path) - np.float32(dark) >= threshold)
    threshold = threshold.ravel()[pixels]
    slow, fast = 1 - np.exp(-STEP / CAMERA.tau_dark), 1 - np.exp(-STEP / CAMERA.tau_bright)
    # In a step, V moves by the share base + gain L of its distance to L.
    gain = np.float32((fast - slow) / (bright - dark))
    base = np.float32(slow - gain * dark)
    intensities = log_intensities(scene, path, pixels)
    v = next(intensities).copy()
    v_ref, free_at, fired = v.copy(), np.zeros_like(v), []  # free_at: end of the refractory period
    for step, intensity in enumerate(intensities):
        time = step * STEP
        rise = (intensity * gain + base) * (intensity - v)
        v += rise
        size = np.abs(v - v_ref)
        i = np.flatnonzero((size >= threshold) & (free_at < time + STEP))
        # The share of the step after which V had moved by the threshold, or the pixel was free.
        share = 1 - (size[i] - threshold[i]) / np.maximum(np.abs(rise[i]), np.float32(1e-9))
        share = np.minimum(np.maximum(share, np.maximum((free_at[i] - time) / STEP, 0)), 1)
        when, v_then = time + share * STEP, v[i] - (1 - share) * rise[i]
        fired.append((pixels[i], when, v_then < v_ref[i]))
        v_ref[i], free_at[i] = v_then, when + np.float32(CAMERA.refractory)
    return map(np.concatenate, zip(*fired, strict=True))


def log_intensities(scene: np.ndarray, path: np.ndarray, pixels: np.ndarray) -> Iterator:
    """Yield L of the pixels at each point of the path.

    The scene moves so slowly that it is sampled at every other point, and interpolated between.
    """
    view, work = np.empty((2, SIDE, SIDE, scene.shape[-1]), np.float32)
    sample_scene(scene, path[0], view, work)
    before = view.ravel()[pixels]
    yield before
    for point in range(2, len(path) + 1, 2):
        sample_scene(scene, path[min(point, len(path) - 1)], view, work)
        after = view.ravel()[pixels]
        yield (before + after) * np.float32(0.5)
        if point < len(path):
            yield after
        before = after


def write_recording(path: Path, events: np.ndarray) -> None:
    """Write events as an N-MNIST file: 5 bytes each, x, y, polarity in a bit, time in 23 bits."""
    content = np.empty((len(events), 5), np.uint8)
    content[:, 0], content[:, 1] = events["x"], events["y"]
    content[:, 2] = events["p"] << 7 | events["t"] >> 16
    content[:, 3], content[:, 4] = events["t"] >> 8 & 255, events["t"] & 255
    path.write_bytes(content.tobytes())


@dataclass
class Images:
    """Labelled images to record, and the numbers that name their recordings."""

    images: np.ndarray  # uint8 [N, 28, 28]
    labels: np.ndarray  # [N], 0 to 9
    numbers: np.ndarray  # [N]


def record_data_set(root: Path, parts: dict[str, Images], name: str, seed: int) -> None:
    """Record the images of 'Train' and 'Test' into `root`, which appears when it is whole.

    `name` is that of the images, `seed` draws the noise; both are written to SIMULATOR_FILE.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    temporary = tempfile.TemporaryDirectory(prefix=".", dir=root.parent)
    with utils.name_in_errors(root), temporary as beside:
        new = Path(beside) / root.name
        for i, (folder, part) in enumerate(parts.items()):
            record_images(part, new / folder, (seed, i))
        utils.write_json(new / SIMULATOR_FILE, describe_simulator(name, seed))
        new.rename(root)
    print(f"simulated   {root} ({sum(len(p.labels) for p in parts.values()):,} recordings)")


def record_images(part: Images, folder: Path, seed: tuple[int, ...]) -> None:
    """Record images into `folder`/<label>/<number>.bin; seed and number draw the noise."""
    for digit in range(10):
        (folder / str(digit)).mkdir(parents=True)
    generators = [np.random.default_rng([*seed, i]) for i in part.numbers]
    recordings = simulate_events(part.images, generators)
    bar = tqdm(recordings, f"simulate {folder.name}", len(part.labels), unit="recording")
    for events, label, i in zip(bar, part.labels, part.numbers, strict=True):
        write_recording(folder / str(label) / f"{i:05d}.bin", events)


def describe_simulator(name: str, seed: int) -> dict:
    """Return the content of SIMULATOR_FILE for recordings of the images `name`, as JSON has it."""
    return json.loads(json.dumps({"images": name, "seed": seed, **asdict(CAMERA)}))


def simulate_digits(root: Path) -> Path:
    """Record scikit-learn's digits into `root`, split once for all, unless they are there."""
    if not root.exists():
        images, labels = sklearn_images()
        indices = np.arange(len(labels))
        chosen = train_test_split(indices, test_size=TEST_DIGITS, stratify=labels, random_state=0)
        parts = (Images(images[np.sort(i)], labels[np.sort(i)], np.sort(i) + 1) for i in chosen)
        parts = dict(zip(("Train", "Test"), parts, strict=True))
        try:
            record_data_set(root, parts, BUILT_IN_IMAGES, seed=0)
        except OSError:
            if not (root / SIMULATOR_FILE).exists():  # else another process was faster
                raise
    elif utils.read_json(root / SIMULATOR_FILE) != describe_simulator(BUILT_IN_IMAGES, seed=0):
        raise UserError(f"{root} was not made by this version of the camera: move it away")
    return root


def sklearn_images() -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's digits in MNIST's form, uint8 [1797, 28, 28], and their labels [1797].

    The 8 x 8 pixels are scaled to the 20 x 20 that an MNIST digit fills, in the middle of 28 x 28.
    """
    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] / 16
    options = {"size": (20, 20), "mode": "bicubic", "align_corners": False}
    scaled = torch.nn.functional.interpolate(small, **options).clamp(0, 1)
    images = torch.nn.functional.pad(scaled[:, 0], (4, 4, 4, 4))
    return (images * 255).round().byte().numpy(), digits.target


def read_images(path: str | Path) -> dict[str, Images]:
    """Read labelled images from a .npz file, those of 'Train' and of 'Test'.

    It holds `train_images` (uint8 [N, 28, 28]), `train_labels` ([N], 0 to 9), `test_images` and
    `test_labels`. A recording's name is its image's index in its array, counted from 1. Raises
    `UserError` naming the file and what is wrong with it.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:  # NumPy raises many types on other files
        reason = utils.first_line(error)
        raise UserError(f"--simulate {path} can't be read as a .npz file ({reason})") from None
    return {part: check_images(path, arrays, part.lower()) for part in ("Train", "Test")}


def check_images(path: str | Path, arrays: dict[str, np.ndarray], split: str) -> Images:
    """Return the images and labels of a split, or raise `UserError`."""
    nothing = np.zeros(0)
    images, labels = (arrays.get(f"{split}_{name}", nothing) for name in ("images", "labels"))
    are_images = images.dtype == np.uint8 and images.shape[1:] == (28, 28)
    are_digits = labels.dtype.kind in "iu" and labels.shape == images.shape[:1]
    if not (are_images and are_digits and set(labels.tolist()) == set(range(10))):
        needed = f"{split}_images must be uint8 [N, 28, 28], {split}_labels [N] whole numbers"
        raise UserError(f"--simulate {path}: {needed}, all digits from 0 to 9")
    return Images(images, labels.astype(int), np.arange(1, len(images) + 1))


# --- The script -----------------------------------------------------------------------------------


def print_table(parts: dict[str, Frames]) -> None:
    """Print what the data set holds, one column a part."""
    frames = parts.values()
    rows = {"": list(parts)}
    for digit in range(10):
        rows[f"recordings of digit {digit}"] = [f"{(f.labels == digit).sum():,}" for f in frames]
    rows["recordings"] = [f"{len(f):,}" for f in frames]
    rows["blank recordings"] = [f"{f.num_blank:,}" for f in frames]
    for title, name, unit in (("events", "num_events", 1), ("duration in ms", "duration", 1000)):
        for statistic in ("mean", "min", "max"):
            values = [getattr(getattr(f, name).double() / unit, statistic)() for f in frames]
            rows[f"{title}, {statistic}"] = [f"{value:,.0f}" for value in values]
    shares = [f.num_on_events.sum() / f.num_events.sum() for f in frames]
    rows["share of ON events"] = [f"{share:.1%}" for share in shares]
    shares = [f.nnz_per_frame.double().mean() / BINS_PER_FRAME for f in frames]
    title = f"non-zero bins at T = {next(iter(frames)).time_steps}"
    rows[title] = [f"{share:.2%}" for share in shares]
    for title, values in rows.items():
        print(f"{title:24}" + "".join(f"{value:>22}" for value in values))


def simulate(args: argparse.Namespace) -> None:
    """Record the images of `--simulate` into `<data_dir>/NMNIST`, unless there is a data set."""
    parts = read_images(args.simulate)
    if there := find_data_set(Path(args.data_dir)):
        raise UserError(f"{there} holds recordings: choose another --data_dir to record into")
    record_data_set(Path(args.data_dir, "NMNIST"), parts, Path(args.simulate).name, args.seed)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the script's flags."""
    parser = utils.make_parser(__doc__)
    simulate = "record these images into data_dir/NMNIST by the simulated camera: arrays "
    simulate += "train_images (uint8 [N, 28, 28]), train_labels, test_images and test_labels"
    utils.add_flag(parser, "--simulate", None, simulate, metavar="IMAGES.npz")
    utils.add_flag(parser, "--seed", 0, "seed of --simulate", type=number(int, 0, 2**32 - 1))
    add_data_flags(parser)
    add_frame_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.simulate:
        simulate(args)
    elif args.seed:
        parser.error("argument --seed: nothing is random without argument --simulate")
    frames = {}
    for part in open_by_flags(args):
        frames[part.split] = load_frames(part, args.time_steps, args.denoise, args.bin_by)
    print_table(frames)


if __name__ == "__main__":
    utils.run_script(main)
