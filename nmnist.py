"""N-MNIST recordings as batches of frames; how they are found, downloaded and simulated.

    python nmnist.py                                  # a table of N-MNIST; download it if missing
    python nmnist.py --data_dir DIR --time_steps 10   # of what is in another folder
    python nmnist.py --dataset simulated              # of simulated recordings of digits
    python nmnist.py --simulate IMAGES.npz --data_dir DIR   # record images of 28 x 28 pixels

Events are numpy structured arrays `x, y, t, p` as tonic gives them: x and y in 0..33, t in
microseconds, p 0 (called OFF) or 1 (called ON). In N-MNIST, 1 means that the light fell. Frames are
[T, B, 2, 34, 34]; the value is the number of events in that bin. Read from the top: recordings,
frames, augmentation, loading. Finding a data set on the disk and the simulated camera may be
skipped.
"""

import argparse
import contextlib
import functools
import hashlib
import http.client
import io
import itertools
import os
import socket
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import tonic
import torch
from scipy.interpolate import CubicHermiteSpline
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tonic.download_utils import download_url
from torch.nn import functional as F

import utils
from utils import UserError, number

SIDE = 34  # pixels of the sensor, along each axis
SENSOR_SIZE = (SIDE, SIDE, 2)  # x, y, polarities, as tonic orders them
BINS_PER_FRAME = SIDE * SIDE * 2
# In ms: two minima of the mean event rate of real recordings, and the recordings' mean duration.
SACCADE_ENDS = (100, 220, 308)
SPLITS = ("train", "test")
DATASETS = ("auto", "nmnist", "simulated")
DATA_DIR = "./data"
PUBLISHED = {"train": 60_000, "test": 10_000}  # recordings of N-MNIST
HOMEPAGE = "https://www.garrickorchard.com/datasets/n-mnist"
DIGIT_FOLDERS = tuple("0123456789")
ARCHIVES = ("train.zip", "test.zip", "Train.zip", "Test.zip")
SIMULATED = "SimulatedNMNIST"  # folder and name of the simulated digits
SIMULATOR_FILE = "simulator.json"  # marks simulated recordings
BUILT_IN_IMAGES = "sklearn.datasets.load_digits"

# --- The data set ---------------------------------------------------------------------------------


class NMNIST:
    """The recordings of one part of a data set, checked as they are read.

        test = NMNIST("data/NMNIST/Test")
        events, digit = test[0]

    `folder`, called Train or Test, holds <digit>/*.bin. `first_saccade_only` keeps the events of
    the first 100 ms, `stabilize` takes the saccades' movement out of them, both as in
    `tonic.datasets.NMNIST`. tonic's class checks nothing, and wants 10,000 or more recordings.
    Raises `UserError` if a digit has no recordings.
    """

    dtype = tonic.datasets.NMNIST.dtype

    def __init__(self, folder: str | Path, *, first_saccade_only=False, stabilize=False):
        self.folder = Path(folder)
        self.split = self.folder.name.lower()
        self.first_saccade_only = first_saccade_only
        self.stabilize = stabilize
        self.files = []
        for digit in DIGIT_FOLDERS:
            files = sorted((self.folder / digit).glob("[!.]*.bin"))  # macOS adds ._*.bin
            if not files:
                raise UserError(f"{self.folder / digit} holds no *.bin: every digit needs some")
            self.files += files
        self.labels = [int(file.parent.name) for file in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Return (events, digit). Raises `UserError` naming a file that is not a recording."""
        path = self.files[index]
        content = path.read_bytes()
        if len(content) % 5:
            raise UserError(f"{path}: found {len(content):,} bytes; expected 5 for each event")
        events = tonic.io.read_mnist_file(io.BytesIO(content), self.dtype, is_stream=True)
        events = check_events(events, path)
        return apply_options(events, self.first_saccade_only, self.stabilize), self.labels[index]


def check_events(events: np.ndarray, name: str | Path) -> np.ndarray:
    """Check that events can be a recording, and return them in tonic's dtype.

    `events` have the fields x, y, t, p, of any numeric type; `UserError` calls wrong ones `name`.
    """
    if wrong := what_is_wrong(events):
        expected = "x and y from 0 to 33, p 0 or 1, t in whole microseconds from 0 to 8,388,607"
        raise UserError(f"{name}: found {wrong}; expected {expected}, sorted, over 1 ms or more")
    if events.dtype == NMNIST.dtype:  # as read from a file
        return events
    return tonic.io.make_structured_array(*(events[axis] for axis in "xytp"), dtype=NMNIST.dtype)


def what_is_wrong(events: np.ndarray) -> str | None:
    """Return what is wrong with the events of a recording, in words, or None."""
    if not set("xytp") <= set(np.asarray(events).dtype.names or ()):
        return "something else than an array with the fields x, y, t, p"
    if len(events) == 0:
        return "no events"
    for axis, largest in (("x", 33), ("y", 33), ("t", 2**23 - 1), ("p", 1)):
        values = events[axis]
        if values.min() < 0 or values.max() > largest:
            return f"{axis} from {values.min()} to {values.max()}"
        if values.dtype.kind == "f" and (values % 1 != 0).any():
            return f"{axis} that is not whole"
    t = events["t"]
    if (t[1:] < t[:-1]).any():
        return "t that decreases"
    if t[-1] - t[0] < 1000:
        return f"only t from {t[0]} to {t[-1]}, less than 1 ms (is it in another unit?)"
    return None


def write_recording(path: str | Path, events: np.ndarray) -> None:
    """Write events x, y, t, p as an N-MNIST file, atomically; `UserError` if they are wrong.

    Each event takes 5 bytes: x, y, then p in one bit and t in 23.
    """
    events = check_events(events, path)
    content = np.empty((len(events), 5), np.uint8)
    content[:, 0] = events["x"]
    content[:, 1] = events["y"]
    content[:, 2] = (events["p"] << 7) | (events["t"] >> 16)
    content[:, 3] = (events["t"] >> 8) & 255
    content[:, 4] = events["t"] & 255
    with utils.atomic_path(path) as temporary:
        temporary.write_bytes(content.tobytes())


def apply_options(events: np.ndarray, first_saccade_only: bool, stabilize: bool) -> np.ndarray:
    """Apply the options of `tonic.datasets.NMNIST` to events."""
    if first_saccade_only:
        events = events[events["t"] < 100_000]
    if stabilize:
        # A copy, since tonic's function changes the events that it is given.
        events = tonic.datasets.nmnist.stabilize(events.copy())
    return events


def denoise_events(events: np.ndarray, denoise: int | None) -> np.ndarray:
    """Drop isolated events by tonic's `Denoise`, if its filter time in microseconds is given."""
    if denoise is None or len(events) == 0:
        return events
    return tonic.transforms.Denoise(denoise)(events)


# --- Frames and their cache -----------------------------------------------------------------------

CACHE_VERSION = 7  # increase it when the same options and recordings give other frames


@dataclass
class Frames:
    """Binned recordings, as the indices and counts of their non-zero bins.

    The bin at (p, y, x) of a frame has the index (y * 34 + x) * 2 + p. The non-zero bins of all
    recordings follow one another, recording by recording and frame by frame.
    """

    bin_index: torch.Tensor  # int16 [non-zero bins]
    count: torch.Tensor  # int8 or int16 [non-zero bins]: events in the bin
    nnz_per_frame: torch.Tensor  # int16 [N, T]: non-zero bins of each frame
    labels: torch.Tensor  # uint8 [N]
    num_events: torch.Tensor  # int32 [N]: of each recording, with the options of `NMNIST`
    num_on_events: torch.Tensor  # int32 [N]: those of polarity 1
    duration: torch.Tensor  # int32 [N]: microseconds from the first event to the last
    hashes: torch.Tensor  # int64 [N]: of each recording's content

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def time_steps(self) -> int:
        """The number of frames per recording, T."""
        return self.nnz_per_frame.shape[1]

    @functools.cached_property
    def spans(self) -> list[slice]:
        """Where each recording's non-zero bins are."""
        ends = self.nnz_per_frame.sum(1, dtype=torch.int64).cumsum(0).tolist()
        return [slice(start, end) for start, end in itertools.pairwise([0, *ends])]

    @property
    def num_blank(self) -> int:
        """The number of recordings without an event in any frame."""
        return sum(span.start == span.stop for span in self.spans)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the recordings' files, labels and order."""
        content = self.hashes.cpu().numpy().tobytes() + self.labels.cpu().numpy().tobytes()
        return hashlib.sha256(content).hexdigest()[:12]

    def to(self, device: torch.device) -> "Frames":
        """Move the frames to `device`: 0.5 GB for 60,000 recordings at T = 25."""
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def batch(
        self, indices: torch.Tensor, dtype: torch.dtype = torch.float32, augment: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return frames [T, B, 2, 34, 34] and labels int64 [B] of the recordings `indices` [B].

        `indices` are on the CPU. The frames are stored channels-last, as `dtype`. `augment` changes
        them at random, as `Augmentation` says.
        """
        device = self.labels.device
        T, B = self.time_steps, len(indices)
        spans = [self.spans[i] for i in indices.tolist()]
        bin_index = torch.cat([self.bin_index[span] for span in spans])
        count = torch.cat([self.count[span] for span in spans])
        chosen = indices.to(device, non_blocking=True)
        nnz = self.nnz_per_frame[chosen].long()  # [B, T]
        # Frame t of recording b is frame t * B + b of the batch.
        batch_frame = torch.arange(T, device=device) * B + torch.arange(B, device=device)[:, None]
        # Each non-zero bin gets the index of its frame; output_size spares a GPU a synchronization.
        frame_index = batch_frame.flatten().repeat_interleave(nnz.flatten(), output_size=len(count))
        if augment:
            frame_index, bin_index, count = augment_events(frame_index, bin_index, count, B, T)
        position = frame_index * BINS_PER_FRAME + bin_index
        frames = torch.zeros(T * B * BINS_PER_FRAME, dtype=dtype, device=device)
        # Events that moved to the same bin add up.
        frames.index_put_((position,), count.to(dtype), accumulate=augment)
        frames = frames.view(T, B, SIDE, SIDE, 2).movedim(-1, 2)
        return frames, self.labels[chosen].long()

    def batches(
        self, indices: torch.Tensor, batch_size: int, dtype: torch.dtype = torch.float32
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the batches of `indices`; the last may be smaller."""
        for chunk in indices.split(batch_size):
            yield self.batch(chunk, dtype)


def load_frames(
    recordings: NMNIST,
    time_steps: int,
    denoise: int | None = None,
    bin_by: str = "time",
    cache: str | Path | None = None,
) -> Frames:
    """Return the recordings binned into `time_steps` frames.

    `denoise` is the filter time of `tonic.transforms.Denoise` in microseconds; `bin_by` is 'time'
    for frames of equal duration or 'events' for frames of equal event count. Frames are read from
    the folder `cache`, or written to it. They are keyed by the options, the recordings' folder, and
    the label, name, size and date of each file. Those of a subclass, which may change events, are
    not cached.
    """
    if type(recordings) is not NMNIST:
        cache = None
    path = Path(cache) / cache_name(recordings, time_steps, denoise, bin_by) if cache else None
    frames = read_cache(path, (len(recordings), time_steps)) if path else None
    if frames is None:
        frames = bin_recordings(recordings, time_steps, denoise, bin_by)
        if path:
            write_cache(path, frames)
    if frames.num_blank:
        utils.warn(
            f"{frames.num_blank:,} of {len(frames):,} {recordings.split} recordings have no event "
            "in any frame: choose fewer --time_steps, a longer --denoise, no --first_saccade_only"
        )
    return frames


def bin_recordings(recordings: NMNIST, time_steps: int, denoise: int | None, bin_by: str) -> Frames:
    """Bin recordings as tonic's `ToFrame` does, after its `Denoise` if a time is given."""
    binned = []
    for index in utils.progress(f"bin {recordings.split}", range(len(recordings))):
        binned.append(bin_recording(recordings, index, time_steps, denoise, bin_by))
    names = [field.name for field in fields(Frames)]
    return Frames(**{name: torch.cat([getattr(one, name) for one in binned]) for name in names})


def bin_recording(
    recordings: NMNIST, index: int, time_steps: int, denoise: int | None, bin_by: str
) -> Frames:
    """Bin one recording. Raises `UserError` if a bin holds more events than int16 counts."""
    path = recordings.files[index]
    digest = hashlib.sha256(path.read_bytes()).digest()  # of the raw file, whatever the options
    events, digit = recordings[index]
    t = events["t"]
    duration = int(t[-1] - t[0]) if len(t) else 0
    frame, bin_index, count = bin_events(denoise_events(events, denoise), time_steps, bin_by)
    largest = count.max(initial=0)
    if largest > 32_767:
        raise UserError(f"{path}: {largest:,} events in one bin: choose more --time_steps")
    nnz = np.bincount(frame, minlength=time_steps)
    return Frames(
        bin_index=torch.from_numpy(bin_index.astype(np.int16)),
        count=torch.from_numpy(count.astype(np.int8 if largest <= 127 else np.int16)),
        nnz_per_frame=torch.from_numpy(nnz.astype(np.int16))[None],
        labels=torch.tensor([digit], dtype=torch.uint8),
        num_events=torch.tensor([len(t)], dtype=torch.int32),
        num_on_events=torch.tensor([events["p"].sum()], dtype=torch.int32),
        duration=torch.tensor([duration], dtype=torch.int32),
        hashes=torch.tensor([int.from_bytes(digest[:8], "big", signed=True)]),
    )


def bin_events(
    events: np.ndarray, time_steps: int, bin_by: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the non-zero bins of tonic's `ToFrame`: their frame, index in it, event count."""
    if len(events) == 0:  # the options left none
        return (np.zeros(0, int),) * 3
    slicers = {"time": tonic.slicers.SliceByTimeBins, "events": tonic.slicers.SliceByEventBins}
    # Frame i holds the events from first[i] to last[i], which is not included.
    first, last = np.array(slicers[bin_by](time_steps).get_slice_metadata(events, None)).T
    events = events[first[0] : last[-1]]  # without the remainder
    frame = np.repeat(np.arange(time_steps), last - first)
    bin_index = (events["y"] * SIDE + events["x"]) * 2 + events["p"]
    index = (frame * BINS_PER_FRAME + bin_index).astype(np.int32)  # sorts faster than int64
    index, count = np.unique(index, return_counts=True)
    frame, bin_index = np.divmod(index, BINS_PER_FRAME)
    return frame, bin_index, count


def to_frames(events: np.ndarray, settings: dict) -> torch.Tensor:
    """Return the frames [T, 1, 2, 34, 34] of a user's own events, for a trained network.

    `events` have the fields x, y, t, p. `settings` are those of the network's checkpoint, which
    say how the frames that it was trained on were made. Raises `UserError` if the events are wrong.
    """
    events = check_events(events, "events")
    events = apply_options(events, settings["first_saccade_only"], settings["stabilize"])
    events = denoise_events(events, settings["denoise"])
    time_steps = settings["time_steps"]
    frame, bin_index, count = bin_events(events, time_steps, settings["bin_by"])
    if len(count) == 0:
        utils.warn("the network's settings leave no event in any frame")
    frames = torch.zeros(time_steps * BINS_PER_FRAME)
    frames[frame * BINS_PER_FRAME + bin_index] = torch.from_numpy(count).float()
    return frames.view(time_steps, 1, SIDE, SIDE, 2).movedim(-1, 2)


def cache_name(recordings: NMNIST, time_steps: int, denoise: int | None, bin_by: str) -> str:
    """Return the name of the file that caches the frames of these recordings with these options."""
    name = f"{recordings.folder.parent.name}_{recordings.split}"
    if recordings.first_saccade_only:
        name += "_first_saccade"
    if recordings.stabilize:
        name += "_stabilized"
    if bin_by == "events":
        name += "_by_events"
    digest = hashlib.sha256(f"version {CACHE_VERSION} {recordings.folder.resolve()}\n".encode())
    for path, label in zip(recordings.files, recordings.labels, strict=True):
        status = path.stat()
        file = path.relative_to(recordings.folder)
        digest.update(f"{file} {label} {status.st_size} {status.st_mtime_ns}\n".encode())
    return f"{name}_T{time_steps}_denoise{denoise or 0}_{digest.hexdigest()[:16]}.pt"


def read_cache(path: Path, shape: tuple[int, int]) -> Frames | None:
    """Return the frames in a cache, memory-mapped, None if there are none of `shape` [N, T]."""
    try:
        frames = Frames(**torch.load(path, mmap=True, weights_only=True))
        if frames.nnz_per_frame.shape == shape:
            return frames
        reason = "its shape is wrong"
    except FileNotFoundError:
        return None
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


# --- Augmentation ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augmentation:
    """How a recording is changed. All but `drop` are limits, up to which values are uniform."""

    shift: float = 1.0  # pixels, along each axis
    rotation: float = 5.0  # degrees, around the centre of the sensor
    scale: float = 0.05  # relative, of each axis
    shear: float = 0.05  # pixels along x for one along y
    time_shift: float = 0.03  # of a recording's duration, rounded to whole frames: none if T < 17
    drop: float = 0.05  # probability that a bin's events are dropped


AUGMENTATION = Augmentation()


def sample_moves(batch_size: int, time_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw how each recording of a batch moves: matrices [B, 2, 3], and frames in time [B].

    A matrix maps (x, y, 1), with x and y from the sensor's centre, to x and y: shear, scale,
    rotation, then shift. The numbers are drawn on the CPU, from torch's generator.
    """
    a = AUGMENTATION
    u = 2 * torch.rand(7, batch_size) - 1
    angle = torch.deg2rad(a.rotation * u[0])
    cos, sin = torch.cos(angle), torch.sin(angle)
    scale_x, scale_y = 1 + a.scale * u[1], 1 + a.scale * u[2]
    shear = a.shear * u[3]
    x_row = [cos * scale_x, cos * scale_x * shear - sin * scale_y, a.shift * u[4]]
    y_row = [sin * scale_x, sin * scale_x * shear + cos * scale_y, a.shift * u[5]]
    affine = torch.stack([torch.stack(x_row, -1), torch.stack(y_row, -1)], 1)
    return affine, (a.time_shift * time_steps * u[6]).round().long()


def augment_events(frame_index, bin_index, count, B: int, T: int):
    """Move the events of each recording of a batch, and drop some; return the same three tensors.

    `frame_index` (t * B + b), `bin_index` and `count` are those of the non-zero bins.
    """
    affine, time_shift = (x.to(count.device, non_blocking=True) for x in sample_moves(B, T))
    dropped = torch.rand(len(count), device=count.device) < AUGMENTATION.drop
    recording = frame_index % B
    # Two rows [3, non-zero bins]; affine[recording] takes three times as long.
    x_row, y_row = affine.flatten(1).T.index_select(1, recording).view(2, 3, -1)
    centre = (SIDE - 1) / 2
    pixel, polarity = bin_index >> 1, bin_index & 1
    row = pixel // SIDE
    x, y = pixel - SIDE * row - centre, row - centre
    new_x = (x_row[0] * x + x_row[1] * y + (x_row[2] + centre)).round().long()
    new_y = (y_row[0] * x + y_row[1] * y + (y_row[2] + centre)).round().long()
    frame_index = frame_index + time_shift.index_select(0, recording) * B
    kept = (new_x >= 0) & (new_x < SIDE) & (new_y >= 0) & (new_y < SIDE) & ~dropped
    kept &= (frame_index >= 0) & (frame_index < T * B)
    # Events that are not kept get a count of 0: fixed sizes avoid a GPU synchronization.
    bin_index = torch.where(kept, (new_y * SIDE + new_x) * 2 + polarity, 0)
    return torch.where(kept, frame_index, 0), bin_index, count * kept


# --- Loading and splitting ------------------------------------------------------------------------


@dataclass
class Data:
    """A data set, binned, on the device."""

    name: str  # in files and figures
    train: Frames | None  # None if the test part alone was loaded
    test: Frames
    test_files: list[str]  # relative to the folder of the test part
    source: str  # the value of --dataset that loads it: 'nmnist' or 'simulated'
    time_axis: utils.TimeAxis

    def describe(self, splits: Sequence[str] = SPLITS) -> dict:
        """Return what identifies the recordings, by their content."""
        description = {"source": self.source, "data_set": self.name}
        for split in splits:
            frames = self.train if split == "train" else self.test
            description[f"{split}_recordings"] = len(frames)
            description[f"{split}_fingerprint"] = frames.fingerprint
        return description


def load_data(args, device, splits=SPLITS, trained_on: dict | None = None) -> Data:
    """Open, bin and move to `device` the recordings that the flags name, the test part at least.

    `trained_on` is `Data.describe()` of the recordings that a network was trained on: if simulated,
    `--dataset auto` gives these again if they are in data_dir, even if N-MNIST is there too.
    """
    data_dir = Path(args.data_dir)
    dataset = args.dataset
    was_simulated = trained_on and trained_on["source"] == "simulated"
    if dataset == "auto" and was_simulated and (data_dir / SIMULATED).is_dir():
        dataset = "simulated"
    options = {"first_saccade_only": args.first_saccade_only, "stabilize": args.stabilize}
    opened = {part.split: part for part in open_recordings(data_dir, dataset, splits, **options)}
    frames = {}
    for split, part in opened.items():
        cache = data_dir / "cache"
        binned = load_frames(part, args.time_steps, args.denoise, args.bin_by, cache)
        frames[split] = binned.to(device)
    if "train" in frames:
        repeated = int(torch.isin(frames["test"].hashes, frames["train"].hashes).sum())
        if repeated:
            utils.warn(f"{repeated:,} test recordings are also in the training part")
    test = opened["test"]
    name = data_set_name(test)
    if args.bin_by == "events":
        name += ", frames of equal event count"
    is_built_in = test.folder.parent == data_dir / SIMULATED
    mean_ms = frames["test"].duration.double().mean().item() / 1000
    return Data(
        name=name,
        train=frames.get("train"),
        test=frames["test"],
        test_files=[str(path.relative_to(test.folder)) for path in test.files],
        source="simulated" if is_built_in else "nmnist",
        time_axis=time_axis(args.time_steps, args.bin_by, args.first_saccade_only, mean_ms),
    )


def time_axis(
    time_steps: int, bin_by: str, first_saccade_only: bool, mean_ms: float
) -> utils.TimeAxis:
    """Return what is known of the time of each step of recordings that last `mean_ms`.

    It is nothing for frames of equal event count, or if they last a fifth longer or shorter than
    N-MNIST's.
    """
    ends_ms = SACCADE_ENDS[:1] if first_saccade_only else SACCADE_ENDS
    if bin_by == "events" or not 0.8 < mean_ms / ends_ms[-1] < 1.2:
        return utils.TimeAxis(None, [])
    ends = [end * time_steps / ends_ms[-1] for end in ends_ms]
    return utils.TimeAxis(ends_ms[-1] / time_steps, ends)


def describe_tested(tested: dict, trained: dict) -> str:
    """Name the recordings of a test, and say so if the network was trained on others.

    Both are `Data.describe()`.
    """
    name = tested["data_set"]
    if name != trained["data_set"]:
        return f"{name} (TRAINED on {trained['data_set']})"
    if tested["test_fingerprint"] != trained["test_fingerprint"]:
        return f"{name} (not the test part of the training)"
    return name


def split_validation(labels: torch.Tensor, val_split: float, seed: int) -> list[torch.Tensor]:
    """Return the indices of training and validation recordings, stratified, fixed by `seed`."""
    indices, labels = np.arange(len(labels)), labels.cpu().numpy()
    try:
        parts = train_test_split(indices, test_size=val_split, stratify=labels, random_state=seed)
    except ValueError:
        raise UserError(
            f"--val_split {val_split} of {len(labels)} recordings leaves a digit out of training "
            "or validation: choose another share or add recordings"
        ) from None
    return [torch.from_numpy(np.sort(part)) for part in parts]


# --- Flags and the script -------------------------------------------------------------------------


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
    text = "folder of the recordings"
    utils.add_flag(parser, "--data_dir", DATA_DIR, text, type=utils.file_path)
    dataset = "nmnist: from data_dir, else downloaded; simulated: scikit-learn's digits, recorded "
    dataset += f"by a simulated camera; auto: nmnist, or in {DATA_DIR} simulated if that fails"
    utils.add_flag(parser, "--dataset", "auto", dataset, choices=DATASETS)


def print_table(parts: dict[str, Frames]) -> None:
    """Print what the data set holds, with a column for each part."""
    frames = list(parts.values())
    rows = {"": list(parts)}
    for digit in range(10):
        rows[f"recordings of digit {digit}"] = [f"{(f.labels == digit).sum():,}" for f in frames]
    rows["recordings"] = [f"{len(f):,}" for f in frames]
    rows["blank recordings"] = [f"{f.num_blank:,}" for f in frames]
    for title, name, unit in (("events", "num_events", 1), ("duration in ms", "duration", 1000)):
        values = [getattr(f, name).double() / unit for f in frames]
        rows[f"{title}, mean"] = [f"{v.mean():,.0f}" for v in values]
        rows[f"{title}, min"] = [f"{v.min():,.0f}" for v in values]
        rows[f"{title}, max"] = [f"{v.max():,.0f}" for v in values]
    shares = [f.num_on_events.sum() / f.num_events.sum() for f in frames]
    rows["share of ON events"] = [f"{share:.1%}" for share in shares]
    shares = [f.nnz_per_frame.double().mean() / BINS_PER_FRAME for f in frames]
    rows[f"non-zero bins at T = {frames[0].time_steps}"] = [f"{share:.2%}" for share in shares]
    for title, values in rows.items():
        print(f"{title:24}" + "".join(f"{value:>22}" for value in values))


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the script's flags."""
    parser = utils.make_parser(__doc__)
    simulate = "record these images into data_dir/NMNIST by the simulated camera: arrays "
    simulate += "train_images (uint8 [N, 28, 28]), train_labels, test_images and test_labels"
    utils.add_flag(parser, "--simulate", None, simulate, type=utils.file_path, metavar="IMAGES.npz")
    utils.add_flag(parser, "--seed", 0, "seed of --simulate", type=number(int, 0, 2**32 - 1))
    add_data_flags(parser)
    add_frame_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.simulate is not None:
        parts = read_images(args.simulate)
        if there := find_data_set(Path(args.data_dir)):
            raise UserError(f"{there} is not empty: choose another --data_dir to record into")
        name = Path(args.simulate).name
        record_data_set(Path(args.data_dir, "NMNIST"), parts, name, args.seed)
        args.dataset = "nmnist"
    elif args.seed:
        parser.error("argument --seed: needs argument --simulate")
    data = load_data(args, torch.device("cpu"))
    print_table({"train": data.train, "test": data.test})


# --- Finding and downloading the data set ---------------------------------------------------------


def open_recordings(
    data_dir: str | Path = DATA_DIR, dataset="auto", splits: Sequence[str] = SPLITS, **options: bool
) -> list[NMNIST]:
    """Open the parts `splits` of a data set, and print a line about each.

    `dataset` is one of
        nmnist      N-MNIST, which is in `data_dir` or is downloaded
        simulated   simulated recordings of scikit-learn's digits, which are made if missing
        auto        nmnist; if it can't be downloaded to ./data, simulated, with a warning
    `options` are those of `NMNIST`. Raises `UserError` if recordings are missing or in an
    unexpected place.
    """
    data_dir = Path(data_dir)
    if dataset == "simulated":
        root = simulate_digits(data_dir / SIMULATED)
    else:
        root = find_data_set(data_dir) or download_or_simulate(data_dir, dataset)
    opened = []
    for split in splits:
        recordings = NMNIST(unpacked_part(root, split), **options)
        name = data_set_name(recordings)
        count = f"{len(recordings):,}"
        is_real = not (root / SIMULATOR_FILE).exists()
        if is_real and len(recordings) < PUBLISHED[split]:
            count += f" of {PUBLISHED[split]:,}"
        print(f"data set    {name}, {split}: {count} recordings in {recordings.folder}")
        opened.append(recordings)
    return opened


def data_set_name(recordings: NMNIST) -> str:
    """Return the data set's name for figures, with the options that change its recordings.

    Simulated recordings are called SimulatedNMNIST, followed by the file of a user's own images.
    """
    name = "NMNIST"
    path = recordings.folder.parent / SIMULATOR_FILE
    if path.exists():
        name = SIMULATED
        try:
            images = utils.read_json(path)["images"]
        except (TypeError, KeyError):
            raise UserError(f"{path} is damaged: record the data set again") from None
        if images != BUILT_IN_IMAGES:
            name += f" ({images})"
    if recordings.first_saccade_only:
        name += ", first saccade"
    if recordings.stabilize:
        name += ", stabilized"
    return name


def find_data_set(data_dir: Path) -> Path | None:
    """Return `data_dir`/NMNIST if anything is in it, `data_dir` if it holds Train, Test or a zip.

    Returns None if there is neither. Raises `UserError` if recordings lie elsewhere in `data_dir`.
    """
    nmnist = data_dir / "NMNIST"
    root = None
    if nmnist.is_dir() and any(nmnist.iterdir()):
        root = nmnist
    elif any((data_dir / name).exists() for name in ("Train", "Test", *ARCHIVES)):
        root = data_dir
    if path := find_misplaced(data_dir, root):
        place = root or nmnist
        expected = f"{place}/Train/<digit>/*.bin and {place}/Test/<digit>/*.bin, or zips in {place}"
        raise UserError(f"--data_dir {data_dir}: found {path}; expected {expected}: move it there")
    return root


def find_misplaced(data_dir: Path, root: Path | None) -> Path | None:
    """Return a recording or zip, at most four folders deep, that is not in its place in `root`."""
    # Digit folders in their place are not entered, so that any recording met is misplaced.
    for name, folders, files in os.walk(data_dir, followlinks=True):
        folder = Path(name)
        is_part = folder.parent == root and folder.name in ("Train", "Test")
        in_place = DIGIT_FOLDERS if is_part else ()
        skipped = (".", "__MACOSX", SIMULATED)
        folders[:] = [f for f in folders if f not in in_place and not f.startswith(skipped)]
        if len(folder.relative_to(data_dir).parts) == 4:
            folders.clear()
        for file in files:
            is_recording = folder.name in DIGIT_FOLDERS and file.endswith(".bin")
            if is_recording or (file in ARCHIVES and folder != root):
                return folder / file
    return None


def unpacked_part(root: Path, split: str) -> Path:
    """Return the folder Train or Test in `root`; if there is none, its zip is unpacked first."""
    folder = root / split.capitalize()
    for archive in (root / f"{split}.zip", root / f"{folder.name}.zip"):
        if not folder.exists() and archive.exists():
            unpack(archive, folder)
    if not folder.is_dir():
        needed = f"{root} must hold {folder.name}/<digit>/*.bin or {split}.zip"
        raise UserError(f"{folder} is missing: {needed}")
    return folder


def unpack(archive: Path, folder: Path) -> None:
    """Extract the folder Train or Test of a published zip to `folder`, all of it or none."""
    try:
        with (
            zipfile.ZipFile(archive) as zip_file,
            utils.name_in_errors(folder),
            tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as temporary,
        ):
            members = zip_file.infolist()
            for member in utils.progress(f"extract {archive.name}", members, unit="file"):
                zip_file.extract(member, temporary)
            new = Path(temporary) / folder.name
            if not new.is_dir():
                raise zipfile.BadZipFile(f"it holds no folder {folder.name}")
            new.rename(folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        reason = f"can't be extracted ({utils.first_line(error)})"
        raise UserError(f"{archive} {reason}: replace it, or delete it") from None


def download_or_simulate(data_dir: Path, dataset: str) -> Path:
    """Download N-MNIST and return its folder; for 'auto' in ./data, simulate if that fails."""
    is_default = data_dir.resolve() == Path(DATA_DIR).resolve()
    if not (is_default or data_dir.is_dir()):
        advice = "create it to download N-MNIST into it, or add --dataset simulated"
        raise UserError(f"--data_dir {data_dir} is not a folder: {advice}")
    try:
        return download(data_dir)
    except UserError as error:
        problem = f"no N-MNIST in {data_dir}: {error}"
        advice = f"connect to the internet, or unpack the zips of {HOMEPAGE} into {data_dir}/NMNIST"
        if dataset == "nmnist" or not is_default:
            raise UserError(f"{problem}; {advice}, or choose --dataset simulated") from None
        utils.warn(f"{problem}. Using SIMULATED recordings instead; {advice}")
        return simulate_digits(data_dir / SIMULATED)


def download(data_dir: Path) -> Path:
    """Download N-MNIST to `data_dir`/NMNIST, all of it or none, and return that folder.

    Raises `UserError` if a zip can't be downloaded; a complete one is kept for the next try.
    """
    source = tonic.datasets.NMNIST
    zips = data_dir / ".download"
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # give up after 10 s of silence; tonic would wait for ever
    try:
        with utils.name_in_errors(data_dir):
            zips.mkdir(parents=True, exist_ok=True)
        bars = sys.stderr if sys.stderr.isatty() else io.StringIO()
        with contextlib.redirect_stderr(bars):
            download_url(source.train_url, str(zips), "train.zip", source.train_md5)
            download_url(source.test_url, str(zips), "test.zip", source.test_md5)
    except (OSError, http.client.HTTPException, RuntimeError) as error:
        raise UserError(f"N-MNIST can't be downloaded ({utils.first_line(error)})") from None
    finally:
        socket.setdefaulttimeout(previous)
    for split in SPLITS:
        unpacked_part(zips, split)  # before the folder gets its name
    root = zips.rename(data_dir / "NMNIST")
    for split in SPLITS:
        (root / f"{split}.zip").unlink()
    return root


# --- The simulated camera -------------------------------------------------------------------------


@dataclass(frozen=True)
class Camera:
    """The camera's parameters: what each is; what in 100 to 400 real recordings it was fitted to.

    Spreads are standard deviations. Values drawn for a recording are clipped at 2.5 of them.
    """

    duration: float = SACCADE_ENDS[-1]  # ms, on average
    gamma: float = 4.4  # exponent from grey value to light; maps of events per pixel
    blur: float = 0.53  # pixels, standard deviation of the point spread; maps of events
    dark_light: float = 1.6  # of the background, to which a full stroke adds 1; spread of counts
    threshold: float = 0.065  # log light between two events; 4,101 events on average
    threshold_spread: float = 0.055  # relative, from pixel to pixel; maps of events
    refractory: float = 1.7  # ms without events after one; 99% of real pauses are longer
    tau_dark: float = 5.3  # ms, of the receptor in the dark; ON events are 5.4 ms apart
    tau_bright: float = 3.2  # ms, of the receptor in full light; OFF events are 4.2 ms apart
    noise_on: float = 0.00035  # events per pixel and ms; in the corners, 0.12 a recording
    noise_off: float = 0.00002  # events per pixel and ms; in the corners, almost none
    duration_spread: float = 0.0085  # relative; last events are between 297 and 315 ms
    start_spread: float = 0.6  # ms; the rest of that spread
    recording_threshold_spread: float = 0.03  # relative; counts differ by 4% for one image


CAMERA = Camera()
PATH_STEP = 8.0  # ms
# Position (y, x) of the digit's centre from the sensor's in pixels, y down, every PATH_STEP:
# measured as the shift of real event maps.
# fmt: off
SACCADE_PATH = (
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
STEP = 1.0  # ms; a pixel fires at most once in it. Halving it made no difference.
MARGIN = 4  # pixels of empty scene around the sensor, more than the digit moves
SAMPLES = 4  # per pixel of the scene, along each axis
SIM_BATCH_SIZE = 64  # recordings simulated at once; does not affect the result
SIMULATOR_VERSION = 2  # increase it when the same image and seed give another recording


def simulate_events(images: np.ndarray, generators: list[np.random.Generator]) -> Iterator:
    """Record images (uint8 [N, 28, 28]) with a simulated event camera; yield each one's events.

    The image moves along N-MNIST's three saccades (Orchard et al. 2015) in front of an event camera
    (Lichtsteiner et al. 2008), modelled as in ESIM (Rebecq et al. 2018) and v2e (Hu et al. 2021):

        light      I = (image / 255)^gamma, blurred, moved by `saccade_offsets`
        receptor   L = log(dark_light + I), dV/dt = (L - V) / tau, faster in bright light: in a
                   step, V moves by a share of its distance to L that is linear in L
        event      when |V - V_ref| >= threshold: V_ref = V, then none for the refractory period
        polarity   0 if V rose, 1 if it fell, as in N-MNIST
        noise      thresholds vary between pixels and recordings; some events occur at random
        time       starts and durations vary between recordings

    Time is in ms inside and in microseconds in the events, which are sorted by it. A recording
    depends on its image and generator alone, not on those beside it.
    """
    for first in range(0, len(images), SIM_BATCH_SIZE):
        chosen = slice(first, first + SIM_BATCH_SIZE)
        thresholds = np.stack([sample_threshold(rng) for rng in generators[chosen]])
        recording, *fired = pixel_events(log_scene(images[chosen]), thresholds.ravel())
        for i, rng in enumerate(generators[chosen]):
            of_i = np.flatnonzero(recording == i)
            caused = [values[of_i] for values in fired]
            noise = sample_noise(rng)
            x, y, t, p = (np.concatenate(both) for both in zip(caused, noise, strict=True))
            stretch = 1 + CAMERA.duration_spread * clipped_normal(rng)
            start = CAMERA.start_spread * clipped_normal(rng)
            microseconds = np.maximum(1000 * (start + stretch * t), 0).astype(np.int64)
            events = tonic.io.make_structured_array(x, y, microseconds, p, dtype=NMNIST.dtype)
            yield events[np.argsort(microseconds, kind="stable")]


def clipped_normal(rng: np.random.Generator) -> float:
    """Draw a number from a standard normal distribution, clipped."""
    return np.clip(rng.standard_normal(), -2.5, 2.5)


def sample_threshold(rng: np.random.Generator) -> np.ndarray:
    """Draw a recording's thresholds, float32 [34, 34]."""
    level = 1 + CAMERA.recording_threshold_spread * clipped_normal(rng)
    pixels = 1 + CAMERA.threshold_spread * rng.standard_normal((SIDE, SIDE))
    return (CAMERA.threshold * level * pixels).astype(np.float32)


def sample_noise(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Draw x, y, time in ms and polarity of noise events."""
    rates = np.array([CAMERA.noise_off, CAMERA.noise_on])
    counts = rng.poisson(rates * SIDE * SIDE * CAMERA.duration)
    x, y = rng.integers(0, SIDE, (2, counts.sum()))
    t = rng.uniform(0, CAMERA.duration, counts.sum())
    return x, y, t, np.repeat([0, 1], counts)


def saccade_offsets(times: np.ndarray) -> np.ndarray:
    """Return the digit's offset (y, x) [n, 2] in pixels at `times` in ms, on a smooth curve."""
    points = np.array(SACCADE_PATH)
    at = PATH_STEP * np.arange(len(points))
    return CubicHermiteSpline(at, points, np.gradient(points, PATH_STEP, axis=0))(times)


def log_scene(images: np.ndarray) -> torch.Tensor:
    """Return L of images [N, 28, 28] at rest, [1, N, H, H], H = SAMPLES * (SIDE + 2 * MARGIN).

    The recordings are the channels of one picture, which one `grid_sample` reads.
    """
    light = (images / 255) ** CAMERA.gamma
    border = MARGIN + (SIDE - 28) // 2
    light = np.pad(light, ((0, 0), (border, border), (border, border)))
    light = light.repeat(SAMPLES, axis=1).repeat(SAMPLES, axis=2)
    light = gaussian_filter(light, SAMPLES * CAMERA.blur, axes=(1, 2))
    scene = torch.from_numpy(np.log(CAMERA.dark_light + light)).float()[None]
    return scene.contiguous(memory_format=torch.channels_last)


def view_at(scene: torch.Tensor, offset: np.ndarray) -> np.ndarray:
    """Return what each pixel [N * 34 * 34] sees if the scene moves by `offset` (y, x) in pixels."""
    pixels = torch.arange(SIDE) - (SIDE - 1) / 2
    to_unit = SIDE / 2 + MARGIN  # grid_sample counts from -1 to 1
    y, x = ((pixels - moved) / to_unit for moved in offset)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    return F.grid_sample(scene, grid[None].float(), align_corners=False).flatten().numpy()


def pixel_events(scene: torch.Tensor, threshold: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return recording, x, y, time in ms and polarity of the events that a scene causes.

    `scene` is that of `log_scene`, `threshold` is float32 [N * 34 * 34]. The equations are those of
    `simulate_events`.
    """
    # In a step, V moves by the share share_at_0 + slope * L of its distance to L.
    dark, bright = np.log(CAMERA.dark_light), np.log(CAMERA.dark_light + 1)
    dark_share, bright_share = 1 - np.exp(-STEP / np.array([CAMERA.tau_dark, CAMERA.tau_bright]))
    slope = np.float32((bright_share - dark_share) / (bright - dark))
    share_at_0 = np.float32(dark_share - slope * dark)
    times = np.arange(0, CAMERA.duration + STEP, STEP, dtype=np.float32)
    offsets = saccade_offsets(times)
    v = view_at(scene, offsets[0])
    v_ref = v.copy()
    free_at = np.zeros_like(v)  # the end of the refractory period
    fired = []
    for end, offset in zip(times[1:], offsets[1:], strict=True):
        log_light = view_at(scene, offset)
        dv = (share_at_0 + slope * log_light) * (log_light - v)
        v += dv
        change = v - v_ref
        i = np.flatnonzero((np.abs(change) >= threshold) & (free_at < end))
        change, dv = change[i], dv[i]
        # An event occurs when V has moved by the threshold, but not before the pixel is free.
        steps_ago = (np.abs(change) - threshold[i]) / np.maximum(np.abs(dv), 1e-9)
        when = np.maximum(end - STEP * np.minimum(steps_ago, 1), free_at[i])
        v_ref[i] = v[i] - (end - when) / STEP * dv  # V at that time
        free_at[i] = when + CAMERA.refractory
        fired.append((i, when, change < 0))
    i, when, polarity = (np.concatenate(column) for column in zip(*fired, strict=True))
    recording, pixel = np.divmod(i, SIDE * SIDE)
    y, x = np.divmod(pixel, SIDE)
    return recording, x, y, when, polarity


def record_data_set(root: Path, parts: dict[str, tuple], name: str, seed: int) -> None:
    """Record the images of 'Train' and 'Test' into the folder `root`, all of them or none.

    A part is its images (uint8 [N, 28, 28]), their labels [N] and the numbers [N] that name the
    recordings. Part, number and seed determine the noise. `name` says which images they are.
    """
    with utils.atomic_path(root) as new:
        for i, (folder, (images, labels, numbers)) in enumerate(parts.items()):
            generators = [np.random.default_rng([seed, i, n]) for n in numbers]
            recordings = simulate_events(images, generators)
            bar = utils.progress(f"simulate {folder}", recordings, len(images))
            for events, label, n in zip(bar, labels, numbers, strict=True):
                write_recording(new / folder / str(label) / f"{n:05d}.bin", events)
        simulator = {"version": SIMULATOR_VERSION, "images": name, "seed": seed}
        utils.write_json(new / SIMULATOR_FILE, simulator)
    total = sum(len(labels) for _, labels, _ in parts.values())
    print(f"simulated   {root} ({total:,} recordings, version {SIMULATOR_VERSION} of the camera)")


def simulate_digits(root: Path) -> Path:
    """Record scikit-learn's digits into `root`, with a fixed split, unless they are there."""
    simulator = utils.read_json(root / SIMULATOR_FILE)
    if isinstance(simulator, dict) and simulator.get("version") == SIMULATOR_VERSION:
        return root
    utils.keep_earlier_files(root)  # of another version of the camera
    images, labels = sklearn_images()
    indices = np.arange(len(labels))
    train, test = train_test_split(indices, test_size=360, stratify=labels, random_state=0)
    parts = {}
    for folder, chosen in (("Train", np.sort(train)), ("Test", np.sort(test))):
        parts[folder] = images[chosen], labels[chosen], chosen + 1
    try:
        record_data_set(root, parts, BUILT_IN_IMAGES, seed=0)
    except OSError:
        if not (root / SIMULATOR_FILE).exists():  # else another process was faster
            raise
    return root


def sklearn_images() -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's digits in MNIST's form, uint8 [1797, 28, 28], and their labels [1797].

    The 8 x 8 pixels are scaled to the 20 x 20 that an MNIST digit fills, in the middle of 28 x 28.
    """
    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] / 16
    scaled = F.interpolate(small, size=(20, 20), mode="bicubic", align_corners=False)
    images = F.pad(scaled.clamp(0, 1)[:, 0], (4, 4, 4, 4))
    return (images * 255).round().byte().numpy(), digits.target


def read_images(path: str | Path) -> dict[str, tuple]:
    """Read labelled images from a .npz file, as `record_data_set` takes them.

    They are numbered from 1 in each part. Raises `UserError` if the file is not as it must be.
    """
    needed = "train_images and test_images, uint8 [N, 28, 28], train_labels and test_labels, whole "
    needed += "numbers [N], every digit from 0 to 9"
    parts = {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            for split in SPLITS:
                images, labels = archive[f"{split}_images"], archive[f"{split}_labels"]
                parts[split.capitalize()] = images, labels, np.arange(1, len(images) + 1)
    except Exception as error:  # NumPy raises many types on other files
        reason = utils.first_line(error)
        raise UserError(f"--simulate {path} can't be read ({reason}); it needs {needed}") from None
    for images, labels, _ in parts.values():
        are_images = images.dtype == np.uint8 and images.shape[1:] == (28, 28)
        are_labels = labels.dtype.kind in "iu" and labels.shape == images.shape[:1]
        if not (are_images and are_labels and set(labels.tolist()) == set(range(10))):
            raise UserError(f"--simulate {path} holds other arrays; it needs {needed}")
    return parts


if __name__ == "__main__":
    utils.run_script(main)
