"""N-MNIST recordings: find, download, check and bin them, make batches of frames, and simulate recordings.

    python nmnist.py                                  # a table of what is in ./data; builds the frame cache
    python nmnist.py --data_dir DIR --time_steps 10   # the same for another folder, with 10 frames a recording
    python nmnist.py --dataset simulated              # record scikit-learn's digits with a simulated camera
    python nmnist.py --simulate IMAGES.npz --data_dir DIR   # record any labelled images of 28 x 28 pixels

Events are numpy structured arrays `x, y, t, p` as tonic gives them: t in microseconds, x and y in 0..33, p 0
(OFF) or 1 (ON). Frames are [T, B, 2, 34, 34]; the value is the number of events in that bin.
"""

import utils  # must be first: Ctrl-C during the slow imports below exits with one line

# isort: split
import argparse
import contextlib
import errno
import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import threading
import urllib.request
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
from tonic.download_utils import USER_AGENT, download_url
from tonic.io import read_mnist_file
from tqdm import tqdm

from utils import UserError, number

SENSOR_SIZE = (34, 34, 2)  # x, y, polarities, as tonic orders them
BINS_PER_FRAME = 2 * 34 * 34
NUM_DIGITS = 10
# ms at which the three saccades of a recording end: the valleys of the real event rate, and the mean last event.
SACCADE_ENDS = (100, 220, 308)
SPLITS = ("train", "test")
DATASETS = ("auto", "nmnist", "simulated")
FRAME_FLAGS = ("time_steps", "denoise", "bin_by", "first_saccade_only", "stabilize")  # that shape the frames
HOMEPAGE = "https://www.garrickorchard.com/datasets/n-mnist"
SIMULATOR_FILE = "simulator.json"  # beside simulated recordings, which it tells from real ones

# --- The data set ----------------------------------------------------------------------------------------


class DownloadError(UserError):
    """N-MNIST is not on disk and can't be downloaded."""


class NMNIST(tonic.datasets.NMNIST):
    """`tonic.datasets.NMNIST` for `split` 'train' or 'test', with any number of recordings, checked as they are read.

    tonic considers a split complete once there are 10,000 files and a zip. It therefore accepts an interrupted
    extraction, and downloads recordings whose zip was deleted. Here recordings are used as they are; if a zip lies
    beside them, those missing or cut short are extracted again. tonic's constructor calls `_check_exists` and, if that
    is false, `download`. `first_saccade_only` (the first 100 ms) and `stabilize` (without the saccades' movement) are
    tonic's own options.

    Raises `DownloadError` if nothing is on disk and nothing can be downloaded, `UserError` if the folders are not
    N-MNIST's.
    """

    published = {"train": 60_000, "test": 10_000}
    connect_seconds = 10  # time limit for a host to answer

    def __init__(self, data_dir: str | Path, split: str, first_saccade_only: bool = False, stabilize: bool = False):
        self.split = split
        options = {"first_saccade_only": first_saccade_only, "stabilize": stabilize}
        with contextlib.suppress(ValueError):  # of a label that tonic reads from the name of a hidden folder
            super().__init__(save_to=str(data_dir), train=split == "train", **options)
        # tonic lists hidden files, too: what macOS adds, and what half-written copies leave.
        files = sorted((self.root / self.folder_name).glob("[0-9]/*.bin"))
        files = [file for file in files if not file.name.startswith(".")]
        self.data, self.targets = [str(file) for file in files], [int(file.parent.name) for file in files]
        missing = set(range(NUM_DIGITS)) - set(self.targets)
        if missing:
            folder = self.root / self.folder_name / str(min(missing))
            raise UserError(f"no recordings of digit {min(missing)} in {folder}: download or unpack them again")

    @property
    def root(self) -> Path:
        """The folder that holds `Train` and `Test`."""
        return Path(self.location_on_system)

    @property
    def name(self) -> str:
        """The data set's name in files and figures: simulated recordings are never called NMNIST."""
        try:
            images = json.loads((self.root / SIMULATOR_FILE).read_text())["images"]
            name = "SimulatedNMNIST" if images == BUILT_IN_IMAGES else f"SimulatedNMNIST ({images})"
        except FileNotFoundError:
            name = "NMNIST"
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.root / SIMULATOR_FILE} is damaged: record the data set again") from None
        return name + ", first saccade" * self.first_saccade_only + ", stabilized" * self.stabilize

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Return (events, label). Raises `UserError` naming the file if it is not an N-MNIST recording."""
        path = self.data[index]
        size = os.path.getsize(path)
        again = "delete it or download it again"
        if size == 0 or size % 5:
            raise UserError(f"{path} is damaged ({size} bytes, not a multiple of 5 above 0): {again}")
        raw = read_mnist_file(path, dtype=self.dtype)
        if len(raw) == 0:
            raise UserError(f"{path} holds no events: {again}")
        if raw["x"].max() > 33 or raw["y"].max() > 33:
            raise UserError(f"{path} has events outside the 34 x 34 pixels: {again}")
        if (np.diff(raw["t"]) < 0).any():
            raise UserError(f"{path} has time stamps that run backwards: {again}")
        options = self.first_saccade_only, self.stabilize, self.transform, self.target_transform, self.transforms
        if not any(options):
            return raw, self.targets[index]
        events, label = super().__getitem__(index)
        if len(events) == 0:
            raise UserError(f"{path} holds no events that {self.name} keeps: {again}")
        return events, label

    def describe(self) -> str:
        """Return the number of recordings, with the published number if some are missing."""
        published = self.published[self.split]
        of_published = "" if len(self) == published else f" of {published:,}"
        return f"{'training' if self.split == 'train' else 'test'} recordings: {len(self):,}{of_published}"

    def _check_exists(self) -> bool:
        """Return whether there are recordings; if a zip lies beside them, all that it holds."""
        self._check_folders()
        if (self.root / self.filename).is_file():
            return not self._missing_members()
        return any((self.root / self.folder_name).glob("*/*.bin"))

    def _check_folders(self) -> None:
        """Refuse recordings outside the digits' folders, to which tonic would give a wrong label."""
        folder = self.root / self.folder_name
        digits = [str(digit) for digit in range(NUM_DIGITS)]
        for path in sorted([*folder.glob("*"), *folder.glob("[0-9]/*/")]):
            is_digit = path.parent == folder and path.name in digits and path.is_dir()
            is_ignored = is_digit or path.name.startswith(".") or path.name == "__MACOSX"
            if not is_ignored and (path.is_dir() or path.suffix == ".bin"):
                raise UserError(
                    f"{path} does not belong here: {folder} holds a folder for each digit 0 to 9, "
                    "and those hold nothing but recordings"
                )

    def _missing_members(self) -> list[zipfile.ZipInfo]:
        """Return the recordings in the zip that are not on disk at their full size."""
        archive, recording = self.root / self.filename, rf"{self.folder_name}/\d/[^/]+\.bin"
        try:
            with zipfile.ZipFile(archive) as zip_file:
                members = [m for m in zip_file.infolist() if re.fullmatch(recording, m.filename)]
        except zipfile.BadZipFile as error:
            raise UserError(f"{archive} is damaged ({error}): delete it, and it is downloaded again") from None
        if not members:
            raise UserError(f"{archive} does not hold {self.folder_name}/<digit>/*.bin: it is not N-MNIST; delete it")
        sizes = {}
        for digit in range(NUM_DIGITS):
            folder = self.root / self.folder_name / str(digit)
            for file in os.scandir(folder) if folder.is_dir() else []:
                sizes[f"{self.folder_name}/{digit}/{file.name}"] = file.stat().st_size
        return [m for m in members if sizes.get(m.filename) != m.file_size]

    def download(self) -> None:
        """Make the recordings complete. One process does it, while others wait for it."""
        with utils.locked(self.root.parent, "data"):
            if not self._check_exists():
                self._prepare()

    def _prepare(self) -> None:
        """Download the zip if it is missing, and extract what is not on disk yet."""
        archive = self.root / self.filename
        if (self.root / SIMULATOR_FILE).is_file():  # real recordings must not come to lie beside simulated ones
            raise UserError(f"no {self.folder_name} in {self.root}: it was simulated from images without a test part")
        if not archive.is_file():
            download_zip(self.url, self.file_md5, archive, self.connect_seconds)
        try:
            with zipfile.ZipFile(archive) as zip_file:
                for member in tqdm(self._missing_members(), desc=f"extract {self.filename}", unit="file"):
                    try:
                        zip_file.extract(member, self.root)
                    except OSError as error:
                        reason = f"can't be written: {error.strerror}"
                        raise OSError(error.errno, reason, str(self.root / member.filename)) from None
        except (zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{archive} is damaged ({error}): delete it, and it is downloaded again") from None
        except (NotImplementedError, RuntimeError) as error:  # compressed in another way, or encrypted
            raise UserError(f"{archive} can't be extracted here ({error}): extract it by another program") from None


def download_zip(url: str, md5: str, path: Path, connect_seconds: float) -> None:
    """Download `url` to `path` by tonic; `path` appears only once it is complete and its md5 is right.

    A host that is silent for `connect_seconds` is given up. Raises `DownloadError`.
    """
    wait_for_answer(url, connect_seconds)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(connect_seconds)  # tonic sets no limit
    try:
        with utils.atomic_path(path) as temporary:
            try:
                download_url(url, str(temporary.parent), temporary.name, md5)
            except (OSError, http.client.HTTPException, RecursionError) as error:
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                    raise
                raise DownloadError(f"{path.name} can't be downloaded from {url}: {error}") from None
            except RuntimeError:  # how tonic reports a wrong md5
                raise DownloadError(
                    f"{url} sent {temporary.stat().st_size:,} bytes that are not N-MNIST's {path.name} (wrong md5): "
                    "the connection may have dropped"
                ) from None
    finally:
        socket.setdefaulttimeout(before)


def wait_for_answer(url: str, seconds: float) -> None:
    """Raise `DownloadError` if `url` does not answer in time; a socket's own timeout excludes the name look-up."""
    outcome = []

    def connect():
        try:
            request = urllib.request.Request(url, headers={"User-Agent": USER_AGENT})
            urllib.request.urlopen(request, timeout=seconds).close()
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    error = outcome[0] if outcome else f"no answer within {seconds:g} s"
    if error is not None:
        raise DownloadError(f"{url} can't be reached: {error}")


# --- Frames and their cache ------------------------------------------------------------------------------

CACHE_VERSION = 5
# Attributes of a data set that shape no frame.
NOT_IN_FRAMES = ("data", "targets", "location_on_system", "url", "filename", "file_md5")


@dataclass
class Frames:
    """Binned recordings, as the indices and counts of their non-zero bins.

    The bin at (p, y, x) of a frame has the index (y * 34 + x) * 2 + p. The non-zero bins of all recordings follow one
    another, recording by recording and frame by frame.
    """

    bin_index: torch.Tensor  # int16 [non-zero bins]
    count: torch.Tensor  # uint8, int16 or int32 [non-zero bins]: events in the bin
    nnz_per_frame: torch.Tensor  # int16 [N, T]: non-zero bins of each frame
    labels: torch.Tensor  # uint8 [N]
    events: torch.Tensor  # int32 [N]: events of each recording, before --denoise
    on_events: torch.Tensor  # int32 [N]: those of polarity 1
    duration: torch.Tensor  # int32 [N]: microseconds from the first event to the last
    sha256: torch.Tensor  # uint8 [32]: of all recordings' contents and labels, whatever their files' names and dates

    def __post_init__(self):
        # On the CPU, so that the size of a batch is known without waiting for the device.
        self._length = self.nnz_per_frame.sum(1, dtype=torch.int64).cpu()
        self._start = self._length.cumsum(0) - self._length

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def time_steps(self) -> int:
        """The number of frames per recording, T."""
        return self.nnz_per_frame.shape[1]

    @property
    def fingerprint(self) -> str:
        """`sha256` as text: equal for the same recordings in the same order."""
        return bytes(self.sha256.tolist()).hex()

    def to(self, device: torch.device) -> "Frames":
        """Return the same frames, whose batches are made on `device`.

        They lie on a GPU if they take at most half of its free memory, else on the host, in pinned memory.
        """
        moved = {field.name: getattr(self, field.name) for field in fields(self)}
        if device.type == "cuda":
            size, free = self.bin_index.nbytes + self.count.nbytes, torch.cuda.mem_get_info(device)[0]
            if size > free / 2:
                print(f"frames      stay on the host: {size / 1e9:.2f} GB, and the GPU has {free / 1e9:.2f} GB free")
                moved |= {name: moved[name].pin_memory() for name in ("bin_index", "count")}
        return replace(self, **{name: x if x.is_pinned() else x.to(device) for name, x in moved.items()})

    def batch(
        self, indices: torch.Tensor, dtype=torch.float32, augment=False, shard: slice | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return frames [T, B, 2, 34, 34] of type `dtype` and labels int64 [B] of the recordings `indices` [B].

        `indices` are on the CPU. The frames are stored channels-last. `augment` moves and drops events at random
        (`augment_events`). `shard` selects this process's part of the batch; it is augmented as in the whole batch.
        """
        device = self.labels.device
        shard = shard or slice(0, len(indices))
        bin_index, count = self._entries(indices[shard])
        size = len(bin_index)
        if augment:  # drawn for the whole batch, so that the number of processes does not matter
            affine = sample_affine(len(indices), self.time_steps)[:, shard].to(device, non_blocking=True)
            length = self._length[indices]
            before = int(length[: shard.start].sum())
            drop_rand = torch.rand(int(length.sum()), device=device)[before : before + size]
        indices = indices[shard].to(device, non_blocking=True)
        nnz = self.nnz_per_frame[indices].long()  # [B, T]
        batch_size, time_steps = nnz.shape
        frame = torch.arange(time_steps, device=device) * batch_size + torch.arange(batch_size, device=device)[:, None]
        frame = frame.flatten().repeat_interleave(nnz.flatten(), output_size=size)
        count = count.to(dtype)
        if augment:
            frame, bin_index, count = augment_events(frame, bin_index, count, affine, drop_rand, time_steps)
        frames = torch.zeros(time_steps * batch_size * BINS_PER_FRAME, dtype=dtype, device=device)
        # Events that moved to the same bin add up.
        frames.index_put_((frame * BINS_PER_FRAME + bin_index,), count, accumulate=augment)
        return frames.view(time_steps, batch_size, 34, 34, 2).movedim(-1, 2), self.labels[indices].long()

    def _entries(self, indices: torch.Tensor) -> list[torch.Tensor]:
        """Return bin_index and count of recordings, one recording after the other, without waiting for the device."""
        values, device = (self.bin_index, self.count), self.labels.device
        length, start = self._length[indices], self._start[indices]
        if self.bin_index.is_pinned():
            parts = [slice(0, 0), *(slice(i, i + n) for i, n in zip(start.tolist(), length.tolist(), strict=True))]
            return [torch.cat([x[part].to(device, non_blocking=True) for part in parts]) for x in values]
        # Entry i of the batch is entry i + (start of its recording in the cache - start in the batch) of the cache.
        size, shift = int(length.sum()), start - (length.cumsum(0) - length)
        shift, length = (x.to(device, non_blocking=True) for x in (shift, length))
        entry = torch.arange(size, device=device) + shift.repeat_interleave(length, output_size=size)
        return [x[entry] for x in values]

    def batches(self, indices: torch.Tensor, batch_size: int, dtype=torch.float32) -> Iterator:
        """Yield `batch` of `indices`, `batch_size` at a time; the last may be smaller. Of no indices, yield nothing."""
        for chunk in indices.split(batch_size) if len(indices) else ():
            yield self.batch(chunk, dtype)


def load_frames(recordings: NMNIST, time_steps: int, denoise: int | None = None, bin_by: str = "time") -> Frames:
    """Return the recordings binned into `time_steps` frames, from the cache if it holds them.

    `denoise` is the filter time of `tonic.transforms.Denoise` in microseconds; `bin_by` is 'time' for frames of equal
    duration or 'events' for frames of equal event count. The cache is a file in `<data_dir>/cache/`, memory-mapped. Its
    name has a fingerprint of the data set's options and of the recordings' names, sizes and times of change, so
    changed recordings are binned again. One process bins, while others wait for it. If the cache can't be written, the
    frames stay in memory.
    """
    cache = recordings.root.parent / "cache"
    options = "_first_saccade" * recordings.first_saccade_only + "_stabilized" * recordings.stabilize
    bins = f"T{time_steps}" + "_by_events" * (bin_by == "events")
    prefix = f"{recordings.root.name}_{recordings.split}{options}_{bins}_denoise{denoise or 0}_"
    path = cache / f"{prefix}{_cache_key(recordings)}.pt"
    frames = _read_cache(path)
    if frames is None:
        with utils.locked(recordings.root.parent, "data"):
            frames = _read_cache(path)  # another process may have written it meanwhile
            if frames is None:
                frames = bin_recordings(recordings, time_steps, denoise, bin_by)
                for old in (*cache.glob(f"{prefix}*"), *cache.glob(f".{prefix}*")):  # of recordings that have changed
                    with contextlib.suppress(OSError):
                        old.unlink()
                _write_cache(path, frames)
    return frames


def _cache_key(recordings: NMNIST) -> str:
    """Return what a cache is keyed by: all that the data set or a subclass of it sets, and the state of its files."""
    kind = type(recordings)
    options = {name: value for name, value in vars(recordings).items() if name not in NOT_IN_FRAMES}
    digest = hashlib.sha256(f"version {CACHE_VERSION} {sorted(options.items())}".encode())
    if kind.__module__ != __name__:
        digest.update(f"{kind.__module__}.{kind.__qualname__}".encode())
    for path, label in zip(recordings.data, recordings.targets, strict=True):
        status, name = os.stat(path), os.path.relpath(path, recordings.root)
        digest.update(f"{name} {label} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _read_cache(path: Path) -> Frames | None:
    """Return the frames in the cache file `path`, None if there are none."""
    if not path.is_file():
        return None
    try:
        return Frames(**utils.read_tensors(path, mmap=True))
    except Exception as error:  # torch raises many types on a damaged file
        utils.warn(f"cache {path} is damaged ({utils.first_line(error)}): binning again")
        with contextlib.suppress(OSError):
            path.unlink()
        return None


def _write_cache(path: Path, frames: Frames) -> None:
    try:
        utils.save_tensors(path, {field.name: getattr(frames, field.name) for field in fields(frames)})
        print(f"cache       {path} ({path.stat().st_size / len(frames) / 1000:.1f} KB a recording)")
    except OSError as error:
        utils.warn(f"cache {utils.describe_error(error)}: frames stay in memory")


def bin_recordings(recordings: NMNIST, time_steps: int, denoise: int | None = None, bin_by: str = "time") -> Frames:
    """Bin recordings as tonic's `ToFrame` with `n_time_bins` or `n_event_bins`, after its `Denoise` if asked."""
    indices, counts, nnz, facts, sha256 = [], [], [], [], hashlib.sha256()
    for i in tqdm(range(len(recordings)), desc=f"bin {recordings.split}", unit="recording"):
        utils.check_interrupted()
        events, label = recordings[i]
        sha256.update(bytes([label]) + Path(recordings.data[i]).read_bytes())
        facts.append((len(events), events["p"].sum(), events["t"][-1] - events["t"][0]))
        if denoise:
            events = tonic.transforms.Denoise(denoise)(events)
        frame, bin_index, count = bin_events(events, time_steps, bin_by)
        indices.append(bin_index.astype(np.int16))
        largest = count.max(initial=0)
        counts.append(count.astype(np.uint8 if largest < 2**8 else np.int16 if largest < 2**15 else np.int32))
        nnz.append(np.bincount(frame, minlength=time_steps).astype(np.int16))
    num_events, on_events, duration = np.array(facts, dtype=np.int32).T
    arrays = {
        "bin_index": np.concatenate(indices),
        "count": np.concatenate(counts),  # of the widest type
        "nnz_per_frame": np.stack(nnz),
        "labels": np.array(recordings.targets, dtype=np.uint8),
        "events": num_events,
        "on_events": on_events,
        "duration": duration,
        "sha256": np.frombuffer(sha256.digest(), np.uint8),
    }
    return Frames(**{name: torch.from_numpy(np.array(array)) for name, array in arrays.items()})


def bin_events(events: np.ndarray, time_steps: int, bin_by: str = "time") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the non-zero bins of a recording: the frame, the index in it as in `Frames`, the number of events.

    They are the bins of tonic's `ToFrame`, which also fills the others, 96% of them, and takes twice the time.
    """
    if len(events) == 0:  # denoising left none
        return (np.zeros(0, int),) * 3
    slicer = {"time": tonic.slicers.SliceByTimeBins, "events": tonic.slicers.SliceByEventBins}[bin_by](time_steps)
    first, last = np.array(slicer.get_slice_metadata(events, None)).T
    events = events[first[0] : last[-1]]  # as tonic does, without the end that time_steps do not divide
    frame = np.repeat(np.arange(time_steps), last - first)
    bin_index = (events["y"].astype(int) * 34 + events["x"]) * 2 + events["p"]
    bins, count = np.unique((frame * BINS_PER_FRAME + bin_index).astype(np.int32), return_counts=True)
    return *np.divmod(bins, BINS_PER_FRAME), count


# --- Augmentation ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augmentation:
    """How far `augment_events` changes a recording: limits of uniform distributions around no change."""

    shift: float = 1.0  # pixels, along each axis
    rotation: float = 5.0  # degrees, around the centre of the sensor
    scale: float = 0.05  # relative, of each axis
    shear: float = 0.05  # pixels along x for one along y
    time_shift: float = 0.03  # of a recording's duration
    drop: float = 0.05  # share of the bins whose events are dropped


AUGMENTATION = Augmentation()


def sample_affine(batch_size: int, time_steps: int) -> torch.Tensor:
    """Draw how each recording of a batch moves, [7, B]: an affine map of its events' (x, y), and a shift in steps.

    The first six rows are the matrix that maps (x, y, 1), around the centre: shear, scale, rotation, then shift. The
    numbers are drawn on the CPU, from torch's generator.
    """
    a = AUGMENTATION
    angle, scale_x, scale_y, shear, shift_x, shift_y, shift_t = 2 * torch.rand(7, batch_size) - 1
    cos, sin = torch.cos(torch.deg2rad(a.rotation * angle)), torch.sin(torch.deg2rad(a.rotation * angle))
    scale_x, scale_y, shear = 1 + a.scale * scale_x, 1 + a.scale * scale_y, a.shear * shear
    x_row = torch.stack([cos * scale_x, cos * scale_x * shear - sin * scale_y, a.shift * shift_x])
    y_row = torch.stack([sin * scale_x, sin * scale_x * shear + cos * scale_y, a.shift * shift_y])
    return torch.cat([x_row, y_row, (a.time_shift * time_steps * shift_t).round()[None]])


def augment_events(frame, bin_index, count, affine, drop_rand, time_steps: int):
    """Move each recording's events as `affine` [7, B] of `sample_affine` says, and drop some; return the result.

    `frame` (t * B + b), `bin_index` and `count` [entries] are a batch's non-zero bins; those whose `drop_rand`
    [entries], from 0 to 1, is below the share to drop are dropped.
    """
    batch_size = affine.shape[1]
    x_x, x_y, x_1, y_x, y_y, y_1, steps = affine.index_select(1, frame % max(batch_size, 1))
    centre = (SENSOR_SIZE[0] - 1) / 2
    pixel = bin_index >> 1
    polarity, row = bin_index - 2 * pixel, pixel // 34
    x, y = pixel - 34 * row - centre, row - centre
    new_x = (x_x * x + x_y * y + (x_1 + centre)).round().long()
    new_y = (y_x * x + y_y * y + (y_1 + centre)).round().long()
    frame = frame + steps.long() * batch_size
    kept = (new_x >= 0) & (new_x < 34) & (new_y >= 0) & (new_y < 34)
    kept &= (frame >= 0) & (frame < time_steps * batch_size) & (drop_rand >= AUGMENTATION.drop)
    # Dropped bins get a count of 0, so no size depends on a random number, and nothing waits for the device.
    return (
        torch.where(kept, frame, 0),
        torch.where(kept, (new_y * 34 + new_x) * 2 + polarity, 0),
        count * kept,
    )


# --- What scripts use ------------------------------------------------------------------------------------


@dataclass
class Data:
    """A data set, binned: its name in files and figures, the frames of its two parts, the test recordings' files."""

    name: str
    train: Frames
    test: Frames
    test_files: list[str]  # relative to the data set's folder


def load_data(args: argparse.Namespace, device: torch.device) -> Data:
    """Open, bin and move to `device` the recordings that the flags of `add_data_arguments` name."""
    train, test = open_recordings(args.data_dir, args.dataset, SPLITS, **recording_options(args))
    frames = (load_frames(part, args.time_steps, args.denoise, args.bin_by).to(device) for part in (train, test))
    name = train.name + ", frames of equal event count" * (args.bin_by == "events")
    return Data(name, *frames, [os.path.relpath(path, test.root) for path in test.data])


def recording_options(args: argparse.Namespace) -> dict[str, bool]:
    """Return the flags that are options of tonic's data set."""
    return {"first_saccade_only": args.first_saccade_only, "stabilize": args.stabilize}


def open_recordings(
    data_dir: str | Path, dataset: str, splits: Sequence[str] = SPLITS, **options: bool
) -> list[NMNIST]:
    """Return the recordings of `splits` of `dataset` ('auto', 'nmnist' or 'simulated'), and print what they are.

    `options` are `first_saccade_only` and `stabilize`.

    Raises `DownloadError` if 'nmnist' is neither on disk nor downloaded, `UserError` if what is on disk is not a data
    set.
    """
    if dataset == "simulated":
        return _announce([SimulatedNMNIST(data_dir, split, **options) for split in splits])
    try:
        return _announce([NMNIST(data_dir, split, **options) for split in splits])
    except DownloadError as error:
        root = Path(data_dir) / "NMNIST"
        how = f"connect this machine, or unpack train.zip and test.zip of {HOMEPAGE} into {root}"
        found = sorted(path.name for path in root.glob("*") if path.is_dir() and not path.name.startswith("."))
        if found and dataset == "auto":  # a data set that is not whole, which the user means to use
            wanted = " and ".join(f"{split.capitalize()}/<digit>/*.bin" for split in splits)
            raise UserError(f"{root} holds {', '.join(found)}, but not {wanted}: {how}") from None
        if dataset == "nmnist":
            raise DownloadError(f"no N-MNIST in {data_dir}: {error}. To get it: {how}") from None
        utils.warn(f"no N-MNIST in {data_dir}: {error}")
        utils.warn("falling back to SIMULATED recordings of scikit-learn's digits.")
        utils.warn(f"to get the real ones, {how}.")
        return open_recordings(data_dir, "simulated", splits, **options)


def trained_dataset(dataset: str, data_dir: str | Path, trained_on: str) -> str:
    """Return `dataset`; for 'auto' and a network trained on simulated recordings, 'simulated' if they are on disk.

    Otherwise each command of a user without network would try the download again, and one who has come online would
    test on other data than those of the training.
    """
    on_disk = (Path(data_dir) / "SimulatedNMNIST" / SIMULATOR_FILE).is_file()
    simulated = trained_on.split(", ")[0] == "SimulatedNMNIST"
    return "simulated" if dataset == "auto" and simulated and on_disk else dataset


def _announce(recordings: list[NMNIST]) -> list[NMNIST]:
    parts = ", ".join(part.describe() for part in recordings)
    print(f"data set    {recordings[0].name} in {recordings[0].root}: {parts}")
    return recordings


def split_validation(labels: torch.Tensor, val_split: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Split recordings into training and validation, stratified by digit, fixed by `seed`; return their indices."""
    try:
        train, val = train_test_split(
            np.arange(len(labels)), test_size=val_split, stratify=labels.numpy(), random_state=seed
        )
    except ValueError:
        raise UserError(
            f"--val_split {val_split} of {len(labels)} recordings leaves a digit out of training or validation: "
            "choose another share or add recordings"
        ) from None
    return torch.from_numpy(np.sort(train)), torch.from_numpy(np.sort(val))


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which recordings to use and how to bin them."""
    group = parser.add_argument_group("data")
    utils.add_flag(group, "--data_dir", "./data", "folder of the data sets")
    text = "nmnist: from data_dir, else downloaded; simulated: scikit-learn's digits before a simulated camera; "
    text += "auto: nmnist, or simulated if it can't be downloaded"
    utils.add_flag(group, "--dataset", "auto", text, choices=DATASETS)
    utils.add_flag(group, "--time_steps", 25, "frames a recording is binned into, T", type=number(int, 1, 1000))
    group.add_argument(
        "--denoise",
        type=number(int, 1),
        metavar="MICROSECONDS",
        help="drop events without a neighbour within this time (default: off)",
    )
    text = "frames of equal duration or of equal event count"
    utils.add_flag(group, "--bin_by", "time", text, choices=["time", "events"])
    text = "only events of the first saccade, the first 100 ms (tonic's option)"
    group.add_argument("--first_saccade_only", action="store_true", help=text)
    text = "take the movement of the saccades out of the events (tonic's option)"
    group.add_argument("--stabilize", action="store_true", help=text)


# --- The simulated camera --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Camera:
    """The simulated camera's parameters, each with what it was fitted to in 100 to 400 of 800 real recordings.

    Spreads between recordings are standard deviations of normal distributions, cut off at 2.5 of them.
    """

    duration: float = 308.0  # ms, of a recording at mean speed; real last events: 307.6 on average
    gamma: float = (
        4.4  # exponent from grey value to light; event maps' correlation 0.966 -> 0.982, counts' 0.955 -> 0.99
    )
    blur: float = 0.6  # pixels, standard deviation of the optics' point spread: event maps, inter-event times
    dark_light: float = 1.6  # light of the background, where a full stroke adds 1: spread of the counts, 1,350 to 7,150
    threshold: float = 0.065  # log light between two events: 4,101 events on average
    threshold_spread: float = 0.055  # relative, from pixel to pixel: event maps
    refractory: float = 1.7  # ms without events after an event: 99% of the real inter-event times are longer
    tau_dark: float = 5.3  # ms, photoreceptor at the background's light: ON events come 5.4 ms apart
    tau_bright: float = 3.2  # ms, photoreceptor at full light: OFF events come 4.2 ms apart
    noise_on: float = 0.00035  # events per pixel and ms: the corners' 0.12 per pixel and recording
    noise_off: float = 0.00002  # events per pixel and ms: almost none in the corners
    shift_spread: float = 0.05  # pixels, along each axis: real recordings' 0.059 (y) and 0.051 (x)
    speed_spread: float = 0.0085  # relative: real last events lie between 297 and 315 ms
    start_spread: float = 0.6  # ms: what the speed leaves of the real 0.75
    recording_threshold_spread: float = 0.03  # relative: counts differ by 4% beyond what the image explains
    path_step: float = 8.0  # ms between the points of `path`
    # (y, x) of the digit's centre from the sensor's centre, y down, in pixels: shifts and speeds of real event maps.
    path: tuple = (
        *((-1.62, -2.53), (-1.40, -2.57), (-1.17, -2.60), (-0.74, -2.65), (0.00, -2.69), (0.96, -2.65)),
        *((1.98, -2.54), (2.81, -2.04), (3.35, -1.53), (3.57, -1.11), (3.60, -1.02), (3.55, -0.93), (3.43, -0.82)),
        *((3.34, -0.69), (3.33, -0.52), (3.31, -0.33), (3.00, 0.15), (2.39, 0.68), (1.50, 1.19), (0.56, 1.38)),
        *((-0.34, 1.55), (-1.12, 1.91), (-1.50, 2.15), (-1.62, 2.31), (-1.60, 2.40), (-1.54, 2.58), (-1.53, 2.73)),
        *((-1.61, 2.79), (-1.68, 2.65), (-1.61, 2.16), (-1.54, 1.38), (-1.55, 0.65), (-1.59, -0.22), (-1.64, -1.05)),
        *((-1.75, -1.64), (-1.85, -2.00), (-1.84, -2.34), (-1.78, -2.46), (-1.77, -2.43), (-1.77, -2.44)),
    )


CAMERA = Camera()
TEST_DIGITS = 360  # of scikit-learn's 1,797
BUILT_IN_IMAGES = "sklearn.datasets.load_digits"
STEP = np.float32(1)  # ms, of the pixel equations, at most one event per pixel in each; halving it changed no result
SIDE = 34  # pixels of the sensor
PAD = 4  # pixels of empty scene around the sensor; the saccades reach less far
SUB = 4  # the blurred scene is tabulated at every 1 / SUB of a pixel
SIM_BATCH_SIZE = 64  # recordings simulated at once; the result does not depend on it


def simulate_events(images: np.ndarray, generators: list[np.random.Generator]) -> Iterator[np.ndarray]:
    """Record images (uint8 [N, 28, 28]) with a simulated event camera; yield the events of each recording.

    The image moves along N-MNIST's three saccades (Orchard et al. 2015) before pixels as Lichtsteiner et al. 2008
    built them, in the form in which ESIM (Rebecq et al. 2018) and v2e (Hu et al. 2021) simulate them:

        light      I = (image / 255)^gamma, blurred, moved by `saccade_offsets`
        receptor   L = log(dark_light + I),  dV/dt = (L - V) / tau,  tau from tau_dark to tau_bright with L
        event      if |V - V_ref| >= threshold: an event, V_ref = V, then none for the refractory period
        polarity   0 if V rose, 1 if it fell: the convention of the recordings of N-MNIST
        noise      thresholds vary between pixels and recordings; events of both polarities occur at random

    Time is in ms inside and in microseconds in the events, which are sorted by it. `generators` holds one generator
    per recording, which with its image determines every bit of it, whatever is recorded beside it: every sum is
    elementwise over recordings, and there is no matrix product.
    """
    for first in range(0, len(images), SIM_BATCH_SIZE):
        batch = slice(first, first + SIM_BATCH_SIZE)
        yield from _simulate_batch(images[batch], generators[batch])


def _simulate_batch(images: np.ndarray, generators: list[np.random.Generator]) -> list[np.ndarray]:
    """Return the events of each of the images [N, 28, 28], all stepped at once."""
    n = len(images)
    shifts, scale, start, threshold, noise = zip(*map(_sample_variation, generators), strict=True)
    path = saccade_offsets(np.arange(0, CAMERA.duration + STEP / 2, STEP))
    pixel, when, polarity = _pixel_events(_log_scene(images, np.array(shifts)), path, np.stack(threshold, axis=-1))
    noise_polarity, noise_pixel, noise_when = (np.concatenate(values) for values in zip(*noise, strict=True))
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
    events = tonic.io.make_structured_array(x, y, (key >> 16) & 0xFFFFFF, key & 1, dtype=NMNIST.dtype)
    return np.split(events, np.searchsorted(key, np.arange(1, n) << 40))


def saccade_offsets(times: np.ndarray) -> np.ndarray:
    """Return the digit's offset (y, x) [n, 2] in pixels at `times` in ms, on a smooth curve through the path's points.

    Cubic Hermite (Catmull-Rom) between the points, constant before the first and after the last.
    """
    points = np.array(CAMERA.path)
    slope = np.gradient(points, axis=0)
    u = np.clip(np.asarray(times, float) / CAMERA.path_step, 0, len(points) - 1)
    i = np.minimum(u.astype(int), len(points) - 2)
    u = (u - i)[:, None]
    return (
        (1 + 2 * u) * (1 - u) ** 2 * points[i]
        + u**2 * (3 - 2 * u) * points[i + 1]
        + u * (1 - u) ** 2 * slope[i]
        - u**2 * (1 - u) * slope[i + 1]
    )


def _sample_variation(rng: np.random.Generator):
    """Draw everything random in a recording: (shift [2], time scale, start, thresholds [34, 34], noise).

    Noise is (polarity, pixel y * 34 + x, time in ms), three arrays with an entry for each noise event.
    """
    z = np.clip(rng.standard_normal(5), -2.5, 2.5)
    relative = 1 + rng.standard_normal((SIDE, SIDE), dtype=np.float32) * np.float32(CAMERA.threshold_spread)
    level = np.float32(CAMERA.threshold * (1 + z[4] * CAMERA.recording_threshold_spread))
    threshold = np.maximum(relative, np.float32(0.3)) * level
    counts = rng.poisson(np.array([CAMERA.noise_off, CAMERA.noise_on]) * SIDE * SIDE * CAMERA.duration)
    where, when = rng.random((counts.sum(), 2)).T
    noise = (np.repeat([0, 1], counts), (where * SIDE * SIDE).astype(np.int64), when * CAMERA.duration)
    return z[:2] * CAMERA.shift_spread, 1 + z[2] * CAMERA.speed_spread, z[3] * CAMERA.start_spread, threshold, noise


def _log_scene(images: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Return L of images [N, 28, 28] moved by shifts [N, 2] in pixels: float32 [SUB, SUB, H, H, N], H = 34 + 2 PAD.

    Entry [r, s, i, j] is the scene at (i + r / SUB - PAD, j + s / SUB - PAD) of the sensor. The blur's taps are
    summed one by one, elementwise over recordings, so that a recording's bits can't depend on its neighbours.
    """
    n, size, first = len(images), SIDE + 2 * PAD, PAD + (SIDE - 28) // 2  # first: where the image's first row lies
    grey_to_light = ((np.arange(256) / 255) ** CAMERA.gamma).astype(np.float32)
    light = grey_to_light[np.ascontiguousarray(images.transpose(1, 2, 0))]
    taps = np.arange(-3, 4)
    distance = (taps[:, None] + np.arange(SUB) / SUB)[..., None, None] - shifts  # [tap, sub-pixel, N, axis]
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
    """Write to `view` [34, 34, N] what the sensor sees of the scene when the digit is at `offset` (y, x)."""
    at = (PAD - offset) * SUB
    (row, column), (v, u) = np.floor(at).astype(int), (at % 1).astype(np.float32)
    view[:] = 0
    for i, weight_y in ((row, 1 - v), (row + 1, v)):  # bilinear between the table's entries
        for j, weight_x in ((column, 1 - u), (column + 1, u)):
            top, left = i // SUB, j // SUB
            entry = scene[i % SUB, j % SUB, top : top + SIDE, left : left + SIDE]
            view += np.multiply(entry, weight_y * weight_x, out=work)


def max_log_intensity(scene: np.ndarray, path: np.ndarray) -> np.ndarray:
    """Return the largest L [34, 34, N] that each pixel may see on the path, over the rectangle around the path."""
    top = scene.max(axis=(0, 1))
    for axis in (0, 1):
        low, high = int(np.floor(-path[:, axis].max())), int(np.ceil(-path[:, axis].min())) + 1
        top = np.maximum.reduce([top.take(range(PAD + d, PAD + d + SIDE), axis) for d in range(low, high)])
    return top


def _pixel_events(scene: np.ndarray, path: np.ndarray, threshold: np.ndarray):
    """Step the pixel equations of `simulate_events` along the path; return (pixel, time in ms, polarity) of each event.

    `threshold` is [34, 34, N], and `pixel` a flat index into it. Only pixels that the digit can reach are stepped.
    The scene is sampled in every other step and interpolated in the others: it moves that slowly.
    """
    dark, bright = np.log(CAMERA.dark_light), np.log(CAMERA.dark_light + 1)
    pixels = np.flatnonzero(max_log_intensity(scene, path) - np.float32(dark) >= threshold)
    threshold = threshold.ravel()[pixels]
    slow, fast = 1 - np.exp(-STEP / CAMERA.tau_dark), 1 - np.exp(-STEP / CAMERA.tau_bright)
    # In a step, V moves by the share base + gain L of its distance to L.
    gain = np.float32((fast - slow) / (bright - dark))
    base = np.float32(slow - gain * dark)
    view, work = np.empty((2, SIDE, SIDE, scene.shape[-1]), np.float32)
    sample_scene(scene, path[0], view, work)
    v = view.ravel()[pixels]
    light, v_ref, free_at = v.copy(), v.copy(), np.zeros_like(v)  # free_at: end of the refractory period
    rise, size, next_light = np.empty((3, len(v)), np.float32)
    fired = []
    for step in range(1, len(path)):
        time = (step - 1) * STEP
        if step % 2:
            sample_scene(scene, path[min(step + 1, len(path) - 1)], view, work)
            view.ravel().take(pixels, out=next_light, mode="clip")
            light += next_light
            light *= np.float32(0.5)
        else:
            light, next_light = next_light, light
        np.multiply(light, gain, out=rise)
        rise += base
        rise *= np.subtract(light, v, out=size)
        v += rise
        np.abs(np.subtract(v, v_ref, out=size), out=size)
        i = np.flatnonzero(size >= threshold)
        i = i[free_at[i] < time + STEP]
        # The share of the step after which V had moved by the threshold, or the refractory period ended if later.
        share = 1 - (size[i] - threshold[i]) / np.maximum(np.abs(rise[i]), np.float32(1e-9))
        share = np.minimum(np.maximum(share, np.maximum((free_at[i] - time) / STEP, 0)), 1)
        when, v_then = time + share * STEP, v[i] - (1 - share) * rise[i]
        fired.append((pixels[i], when, v_then < v_ref[i]))
        v_ref[i], free_at[i] = v_then, when + np.float32(CAMERA.refractory)
    return map(np.concatenate, zip(*fired, strict=True))


def write_recording(path: Path, events: np.ndarray) -> None:
    """Write events as an N-MNIST file: 5 bytes each, x, y, polarity in a bit, time stamp in 23 bits."""
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


def record_data_set(root: Path, splits: dict[str, Images], simulator: dict) -> None:
    """Record the images of 'Train' and 'Test' into `root`, where they appear once all of them are there.

    `simulator` says what they were made of, and is written to SIMULATOR_FILE; its "seed" draws the noise. Where `root`
    exists, recordings of the same names are replaced, SIMULATOR_FILE last, and other files stay.
    """
    temporary = utils.temporary_path(root)
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    try:
        for folder, part in splits.items():
            record_images(part, temporary / folder, (simulator["seed"], ("Train", "Test").index(folder)))
        utils.write_json(temporary / SIMULATOR_FILE, simulator)
        if root.exists():
            for path in [*temporary.glob("*/*/*.bin"), temporary / SIMULATOR_FILE]:
                (root / path.relative_to(temporary)).parent.mkdir(parents=True, exist_ok=True)
                path.replace(root / path.relative_to(temporary))
        else:
            temporary.rename(root)
    except OSError as error:
        raise OSError(error.errno, f"can't be written: {error.strerror}", str(root)) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"simulated   {root} ({sum(len(part.labels) for part in splits.values()):,} recordings)")


def record_images(part: Images, folder: Path, seed: tuple[int, ...]) -> None:
    """Record images into `folder`/<label>/<number>.bin; `seed` and its number draw a recording's noise."""
    for digit in range(NUM_DIGITS):
        (folder / str(digit)).mkdir(parents=True, exist_ok=True)
    recordings = simulate_events(part.images, [np.random.default_rng([*seed, i]) for i in part.numbers])
    recordings = tqdm(recordings, desc=f"simulate {folder.name}", total=len(part.labels), unit="recording")
    for events, label, i in zip(recordings, part.labels, part.numbers, strict=True):
        write_recording(folder / str(label) / f"{i:05d}.bin", events)


class SimulatedNMNIST(NMNIST):
    """scikit-learn's 1,797 handwritten digits before the simulated camera, kept and read as N-MNIST is."""

    published = {"train": 1_437, "test": 360}
    seed = 0

    def _check_exists(self) -> bool:
        """Return whether the recordings are there, made by this very camera of these images."""
        return utils.read_json(self.root / SIMULATOR_FILE) == describe_simulator(BUILT_IN_IMAGES, self.seed)

    def _prepare(self) -> None:
        """Record the digits: a fixed, stratified split. Recordings of an older camera are replaced, and only they."""
        found = utils.read_json(self.root / SIMULATOR_FILE)
        ours = isinstance(found, dict) and found.get("images") == BUILT_IN_IMAGES
        if self.root.exists() and not ours:
            raise UserError(f"{self.root} exists, and this project did not make it: move it away")
        images, labels = sklearn_images()
        chosen = train_test_split(np.arange(len(labels)), test_size=TEST_DIGITS, stratify=labels, random_state=0)
        parts = (Images(images[np.sort(i)], labels[np.sort(i)], np.sort(i) + 1) for i in chosen)
        simulator = describe_simulator(BUILT_IN_IMAGES, self.seed)
        record_data_set(self.root, dict(zip(("Train", "Test"), parts, strict=True)), simulator)


def describe_simulator(images: str, seed: int) -> dict:
    """Return the content of SIMULATOR_FILE for recordings of `images`, as JSON reads it back."""
    return json.loads(json.dumps({"images": images, "seed": seed, **asdict(CAMERA)}))


def sklearn_images() -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's digits in MNIST's form, uint8 [1797, 28, 28], and their labels [1797].

    The 8 x 8 pixels are scaled to the 20 x 20 that an MNIST digit fills, in the middle of 28 x 28.
    """
    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] / 16
    scaled = torch.nn.functional.interpolate(small, size=(20, 20), mode="bicubic", align_corners=False).clamp(0, 1)
    images = torch.nn.functional.pad(scaled[:, 0], (4, 4, 4, 4))
    return (images * 255).round().byte().numpy(), digits.target


def read_images(path: str | Path) -> dict[str, Images]:
    """Read labelled images from a .npz file, as 'Train' and 'Test' where it has both.

    It holds `images` (uint8 [N, 28, 28]) and `labels` ([N], 0 to 9), or `train_images`, `train_labels`,
    `test_images` and `test_labels`. A recording's name is its image's index in its array, counted from 1.
    Raises `UserError` naming the file and what is wrong with it.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:  # NumPy raises many types on other files
        raise UserError(f"--simulate {path}: can't be read as a .npz file of arrays ({error})") from None
    prefixes = {"Train": "train_", "Test": "test_"} if "images" not in arrays else {"Train": ""}
    return {folder: _check_images(path, arrays, prefix) for folder, prefix in prefixes.items()}


def _check_images(path: str | Path, arrays: dict[str, np.ndarray], prefix: str) -> Images:
    for name in (f"{prefix}images", f"{prefix}labels"):
        if name not in arrays:
            raise UserError(
                f"--simulate {path}: no array {name}; it needs images and labels, or train_images, train_labels, "
                "test_images and test_labels"
            )
    images, labels = arrays[f"{prefix}images"], arrays[f"{prefix}labels"]
    if images.ndim != 3 or images.shape[1:] != (28, 28) or images.dtype != np.uint8 or len(images) == 0:
        raise UserError(
            f"--simulate {path}: {prefix}images is {images.dtype} {list(images.shape)}; it must be uint8 [N, 28, 28]"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise UserError(
            f"--simulate {path}: {prefix}labels is {labels.dtype} {list(labels.shape)}; "
            f"it must be whole numbers [{len(images)}], one per image"
        )
    if labels.min() < 0 or labels.max() >= NUM_DIGITS:
        raise UserError(f"--simulate {path}: {prefix}labels has values outside 0 to 9")
    return Images(images, labels, np.arange(1, len(images) + 1))


# --- The script ------------------------------------------------------------------------------------------


def print_table(splits: dict[str, Frames]) -> None:
    """Print what the data set holds, one column a split."""
    time_steps = next(iter(splits.values())).time_steps
    rows = [("", [f"{split:>22}" for split in splits])]
    for digit in range(NUM_DIGITS):
        counts = [int((frames.labels == digit).sum()) for frames in splits.values()]
        rows.append((f"recordings of digit {digit}", [f"{n:22,}" for n in counts]))
    rows.append(("recordings", [f"{len(frames):22,}" for frames in splits.values()]))
    statistics = (("mean", torch.mean), ("min", torch.min), ("max", torch.max))
    for title, field, unit in (("events", "events", 1), ("duration in ms", "duration", 1000)):
        for statistic, function in statistics:
            values = [function(getattr(frames, field).double() / unit) for frames in splits.values()]
            rows.append((f"{title}, {statistic}", [f"{float(value):22,.0f}" for value in values]))
    shares = [frames.on_events.sum() / frames.events.sum() for frames in splits.values()]
    rows.append(("share of ON events", [f"{float(share):22.1%}" for share in shares]))
    shares = [frames.nnz_per_frame.double().mean() / BINS_PER_FRAME for frames in splits.values()]
    rows.append((f"non-zero bins at T = {time_steps}", [f"{float(share):22.2%}" for share in shares]))
    for title, values in rows:
        print(f"{title:24}" + "".join(values))


def simulate(args: argparse.Namespace) -> None:
    """Record the images of `--simulate` into `<data_dir>/NMNIST`, which must not exist yet."""
    root = Path(args.data_dir) / "NMNIST"
    splits = read_images(args.simulate)
    for folder, part in splits.items():
        missing = sorted(set(range(NUM_DIGITS)) - set(part.labels.tolist()))
        if missing:
            utils.warn(f"no images of {missing} for {folder}: scripts need recordings of all ten digits")
    with utils.locked(args.data_dir, "data"):
        if root.exists():
            raise UserError(f"{root} exists already: choose another --data_dir to record into")
        record_data_set(root, splits, describe_simulator(Path(args.simulate).name, args.seed))


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the script's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--simulate",
        metavar="IMAGES.npz",
        help="record these images into data_dir/NMNIST with the simulated camera: arrays images (uint8 [N, 28, 28]) "
        "and labels, or train_images, train_labels, test_images, test_labels",
    )
    utils.add_flag(parser, "--seed", 0, "seed of --simulate", type=number(int, 0, 2**32 - 1))
    add_data_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if args.simulate:
        simulate(args)
        return
    root = Path(args.data_dir) / "NMNIST"
    simulated = args.dataset != "simulated" and (root / SIMULATOR_FILE).is_file()
    splits = SPLITS[:1] if simulated and not (root / "Test").exists() else SPLITS  # --simulate without test images
    recordings = open_recordings(args.data_dir, args.dataset, splits, **recording_options(args))
    print_table({part.split: load_frames(part, args.time_steps, args.denoise, args.bin_by) for part in recordings})


if __name__ == "__main__":
    utils.run_script(main)
