"""N-MNIST recordings: find, download, check, simulate and bin them, and make batches of frames.

    python nmnist.py                                  # what is in ./data, as a table; builds the frame cache
    python nmnist.py --data_dir DIR --time_steps 10   # the same for another folder, with 10 frames a recording
    python nmnist.py --dataset simulated              # record scikit-learn's digits with a simulated camera

Events are numpy structured arrays `x, y, t, p` as tonic gives them: t in microseconds, x and y in 0..33, p 0
(OFF) or 1 (ON). Frames are [T, B, 2, 34, 34], the value the number of events in that bin.
"""

import argparse
import contextlib
import hashlib
import http.client
import json
import os
import queue
import shutil
import sys
import tempfile
import threading
import urllib.request
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import tonic
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tonic.download_utils import check_md5
from tqdm import tqdm

from utils import UserError, atomic_path, num_cores, number, run_script, write_json

SENSOR_SIZE = (34, 34, 2)  # x, y, polarities, as tonic orders them
BINS_PER_FRAME = 2 * 34 * 34
NUM_DIGITS = 10
HOMEPAGE = "https://www.garrickorchard.com/datasets/n-mnist"

# ---------------------------------------------------------------------------------------------------------
# Recordings on disk
# ---------------------------------------------------------------------------------------------------------


class DownloadError(UserError):
    """N-MNIST is not on disk and can't be fetched."""


class NMNIST(tonic.datasets.NMNIST):
    """`tonic.datasets.NMNIST` for `split` 'train' or 'test' of any number of recordings, checked as they are read.

    tonic takes a folder for complete at 10,000 files beside a zip: an interrupted extraction passes, and
    recordings without a zip are downloaded anew. Here recordings are taken as they are; only where a zip lies
    beside them and some are missing or cut short is it extracted again.

    Raises `DownloadError` where nothing is on disk and nothing can be fetched, `UserError` where the folders
    are not N-MNIST's.
    """

    published = {"train": 60_000, "test": 10_000}
    connect_seconds = 10  # a host that has not answered by then is given up

    def __init__(self, data_dir: str | Path, split: str):
        self.split = split
        super().__init__(save_to=str(data_dir), train=split == "train")
        self._check_labels()

    @property
    def root(self) -> Path:
        """The folder that holds `Train` and `Test`."""
        return Path(self.location_on_system)

    @property
    def name(self) -> str:
        """The data set's name as files and figures carry it: simulated recordings are never called NMNIST."""
        return "SimulatedNMNIST" if (self.root / SIMULATOR_FILE).is_file() else "NMNIST"

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Return (events, label). Raises `UserError` naming the file where it is no N-MNIST recording."""
        path = self.data[index]
        size = os.path.getsize(path)
        if size == 0 or size % 5:
            raise UserError(f"{path} is damaged ({size} bytes, no multiple of 5 above 0): delete it or fetch it again")
        events, label = super().__getitem__(index)
        if len(events) == 0:
            raise UserError(f"{path} holds no events: delete it or fetch it again")
        if events["x"].max() > 33 or events["y"].max() > 33:
            raise UserError(f"{path} has events outside the 34 x 34 pixels: delete it or fetch it again")
        if (np.diff(events["t"]) < 0).any():
            raise UserError(f"{path} has time stamps that run backwards: delete it or fetch it again")
        return events, label

    def _check_exists(self) -> bool:
        """Say whether there are recordings, all that the zip holds where one lies beside them."""
        if (self.root / self.filename).is_file():
            return not self._missing_members()
        return any((self.root / self.folder_name).glob("*/*.bin"))

    def _missing_members(self) -> list[zipfile.ZipInfo]:
        """Return the recordings in the zip that are not on disk at their full size."""
        archive = self.root / self.filename
        try:
            with zipfile.ZipFile(archive) as zip_file:
                members = [m for m in zip_file.infolist() if self._is_recording(m.filename)]
        except zipfile.BadZipFile as error:
            raise UserError(f"{archive} is no intact zip ({error}): delete it, and it is downloaded again") from None
        if not members:
            raise UserError(f"{archive} holds no {self.folder_name}/<digit>/*.bin: it is not N-MNIST; delete it")
        sizes = {}
        for digit in range(NUM_DIGITS):
            with (
                contextlib.suppress(FileNotFoundError),
                os.scandir(self.root / self.folder_name / str(digit)) as files,
            ):
                sizes |= {f"{self.folder_name}/{digit}/{file.name}": file.stat().st_size for file in files}
        return [m for m in members if sizes.get(m.filename) != m.file_size]

    def _is_recording(self, filename: str) -> bool:
        parts = filename.split("/")
        return len(parts) == 3 and parts[0] == self.folder_name and parts[1].isdigit() and parts[2].endswith(".bin")

    def download(self) -> None:
        """Fetch the zip where it is missing, and extract what is not on disk yet, each file atomically."""
        archive = self.root / self.filename
        if not archive.is_file():
            fetch(self.url, self.file_md5, archive, self.connect_seconds)
        with zipfile.ZipFile(archive) as zip_file:
            for member in tqdm(self._missing_members(), desc=f"extract {self.filename}", unit="file"):
                try:
                    content = zip_file.read(member)
                except (zipfile.BadZipFile, zipfile.zlib.error) as error:
                    raise UserError(f"{archive} is damaged ({error}): delete it, and it is downloaded again") from None
                with atomic_path(self.root / member.filename) as temporary:
                    temporary.write_bytes(content)

    def _check_labels(self) -> None:
        """Refuse folders beside the digits, whose recordings tonic would give a wrong label, and missing digits."""
        folder = self.root / self.folder_name
        for path in sorted(folder.iterdir()):
            is_digit = path.name in "0123456789" and path.is_dir()
            if not is_digit and (path.is_dir() or path.suffix == ".bin"):
                raise UserError(f"{path} does not belong here: {folder} holds a folder for each digit 0 to 9")
        for digit in range(NUM_DIGITS):
            if digit not in set(self.targets):
                raise UserError(f"no recordings of digit {digit} in {folder / str(digit)}: fetch or unpack them again")

    def describe(self) -> str:
        """Return the number of recordings in a line, beside the published number where some are missing."""
        published = self.published[self.split]
        of_published = "" if len(self) == published else f" of {published:,}"
        return f"{'training' if self.split == 'train' else 'test'} recordings: {len(self):,}{of_published}"


def fetch(url: str, md5: str, path: Path, connect_seconds: float) -> None:
    """Download `url` to `path` with a progress bar; `path` appears only once it is whole and its md5 is right.

    tonic's own download waits for ever for a host that does not answer, and leaves what it got of a file whose
    connection dropped. Raises `DownloadError`.
    """
    try:
        with _open_url(url, connect_seconds) as response, atomic_path(path) as temporary:
            total = response.length
            with (
                open(temporary, "wb") as file,
                tqdm(desc=f"download {path.name}", total=total, unit="B", unit_scale=True) as bar,
            ):
                while chunk := response.read(1 << 20):
                    file.write(chunk)
                    bar.update(len(chunk))
            received = temporary.stat().st_size
            if total is not None and received != total:
                raise DownloadError(f"the connection to {url} dropped after {received:,} of {total:,} bytes")
            if not check_md5(str(temporary), md5):
                raise DownloadError(f"{url} sent another file than N-MNIST's {path.name} (its md5 differs from {md5})")
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(f"{path.name} can't be fetched from {url}: {error}") from None


def _open_url(url: str, seconds: float):
    """Open `url` within `seconds` in all: urlopen's own timeout limits neither name look-up nor redirects."""
    answers: queue.Queue = queue.Queue()

    def connect():
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "tonic"})
            answers.put(urllib.request.urlopen(request, timeout=seconds))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=connect, daemon=True).start()
    try:
        answer = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


# ---------------------------------------------------------------------------------------------------------
# Simulated recordings
# ---------------------------------------------------------------------------------------------------------

# What the sensor model needs; it lies beside simulated recordings, so that they are told from real ones and
# recorded anew when it changes.
SIMULATOR = {
    "dark_level": 1.0,  # added to the image (0 to 1) before the logarithm
    "blur": 0.45,  # pixels, standard deviation of the optics' point spread
    "time_constant": 2.8,  # ms, of the pixel's low-pass filter
    "threshold": 0.12,  # log intensity between two events
    "threshold_spread": 0.02,  # its standard deviation over pixels
    "noise_rate": 0.0002,  # events per pixel and ms
    "seed": 0,
}
SIMULATOR_FILE = "simulator.json"
# Where the digit's centre is, (time in ms, y, x) with y down, in pixels from the sensor's centre: the corners of
# the triangle that N-MNIST's camera moves along.
SACCADE_PATH = np.array(
    [
        (0, -2.4, -3.4),
        (8, -2.4, -3.4),
        (85, 3.5, -1),
        (112, 3.5, -1),
        (190, -2, 2.7),
        (222, -2, 2.7),
        (292, -1.9, -2.6),
    ]
)
RECORDING_MS = 306
TEST_DIGITS = 360  # of scikit-learn's 1,797


def saccade_offsets(times: np.ndarray) -> np.ndarray:
    """Return the digit's offset (y, x) [n, 2] in pixels at `times` in ms; each leg starts and ends gently."""
    corners, moments = SACCADE_PATH[:, 1:], SACCADE_PATH[:, 0]
    leg = np.clip(np.searchsorted(moments, times, side="right") - 1, 0, len(moments) - 2)
    done = np.clip((times - moments[leg]) / (moments[leg + 1] - moments[leg]), 0, 1)
    eased = (1 - np.cos(np.pi * done)) / 2
    return corners[leg] + eased[:, None] * (corners[leg + 1] - corners[leg])


def _sampling(offsets: np.ndarray, blur: float) -> np.ndarray:
    """Return weights [n, 34, 28] by which 34 pixels see 28 image rows moved by each of n offsets, blurred."""
    image_row = np.arange(28) - 13.5
    pixel = np.arange(34) - 16.5
    distance = pixel[None, :, None] - offsets[:, None, None] - image_row[None, None, :]
    weights = np.exp(-0.5 * (distance / blur) ** 2)
    return (weights / (blur * np.sqrt(2 * np.pi))).astype(np.float32)


def simulate_events(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Record an image (uint8 [28, 28]) with a simulated event camera of 34 x 34 pixels; return its events.

    The image moves along N-MNIST's three saccades. A pixel follows the logarithm of its intensity,
    L = log(dark_level + image), through a low-pass filter, and fires each time the filtered L has moved by its
    threshold since its last event (Lichtsteiner et al. 2008). As in N-MNIST, an event is 0 (OFF) where L rises
    and 1 (ON) where it falls. Background noise is added. Time in ms inside, in microseconds in the events.
    """
    times = np.arange(RECORDING_MS + 1)
    offsets = saccade_offsets(times)
    rows, columns = (_sampling(offsets[:, axis], SIMULATOR["blur"]) for axis in (0, 1))
    light = rows @ (image.astype(np.float32) / 255) @ columns.transpose(0, 2, 1)  # [ms, 34, 34]
    log_light = np.log(SIMULATOR["dark_level"] + light)
    threshold = np.clip(rng.normal(SIMULATOR["threshold"], SIMULATOR["threshold_spread"], (34, 34)), 0.02, None)
    keep = np.exp(-1 / SIMULATOR["time_constant"])
    filtered, reference = log_light[0], log_light[0] + threshold * rng.uniform(-0.5, 0.5, (34, 34))
    steps = []
    for ms in times[1:]:
        filtered = keep * filtered + (1 - keep) * log_light[ms]
        crossed = np.trunc((filtered - reference) / threshold)
        reference = reference + crossed * threshold
        y, x = np.nonzero(crossed)
        number = np.abs(crossed[y, x]).astype(int)
        y, x, off = (np.repeat(values, number) for values in (y, x, crossed[y, x] > 0))
        steps.append(np.stack([x, y, 1000 * (ms - 1) + rng.integers(0, 1000, len(x)), ~off]))
    noise = rng.poisson(SIMULATOR["noise_rate"] * RECORDING_MS * 34 * 34)
    limits = [[34], [34], [1000 * RECORDING_MS], [2]]
    steps.append(rng.integers(0, limits, (4, noise)))
    x, y, t, p = np.concatenate(steps, axis=1)
    events = tonic.io.make_structured_array(x, y, t, p, dtype=NMNIST.dtype)
    return events[np.argsort(events["t"], kind="stable")]


def write_recording(path: Path, events: np.ndarray) -> None:
    """Write events as an N-MNIST file: 5 bytes each, x, y, polarity in a bit, time stamp in 23 bits."""
    content = np.empty((len(events), 5), np.uint8)
    content[:, 0], content[:, 1] = events["x"], events["y"]
    content[:, 2] = events["p"] << 7 | events["t"] >> 16
    content[:, 3], content[:, 4] = events["t"] >> 8 & 255, events["t"] & 255
    content.tofile(path)


class SimulatedNMNIST(NMNIST):
    """scikit-learn's 1,797 handwritten digits before a simulated camera, kept and read as N-MNIST is."""

    published = {"train": 1_437, "test": 360}

    def _check_exists(self) -> bool:
        try:
            return json.loads((self.root / SIMULATOR_FILE).read_text()) == SIMULATOR
        except (FileNotFoundError, json.JSONDecodeError):
            return False

    def download(self) -> None:
        """Record the digits into a temporary folder, which takes its place once it is whole."""
        images, labels = sklearn_images()
        split = train_test_split(range(len(labels)), test_size=TEST_DIGITS, stratify=labels, random_state=0)
        self.root.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{self.root.name}.", suffix=".tmp", dir=self.root.parent))
        try:
            for folder, indices in zip(("Train", "Test"), split, strict=True):
                for digit in range(NUM_DIGITS):
                    (temporary / folder / str(digit)).mkdir(parents=True)
                for i in tqdm(sorted(indices), desc=f"simulate {folder}", unit="recording"):
                    events = simulate_events(images[i], np.random.default_rng([SIMULATOR["seed"], i]))
                    write_recording(temporary / folder / str(labels[i]) / f"{i + 1:05d}.bin", events)
            write_json(temporary / SIMULATOR_FILE, SIMULATOR)
            temporary.chmod(0o755)
            shutil.rmtree(self.root, ignore_errors=True)  # recordings of an older sensor model
            with contextlib.suppress(OSError):  # another process put the same recordings there first
                temporary.rename(self.root)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        print(f"simulated   {self.root} ({len(labels):,} recordings)")


def sklearn_images() -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's digits as MNIST draws its own, uint8 [1797, 28, 28], and their labels [1797].

    The 8 x 8 pixels are scaled to the 20 x 20 that an MNIST digit fills, in the middle of 28 x 28.
    """
    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] / 16
    scaled = torch.nn.functional.interpolate(small, size=(20, 20), mode="bicubic", align_corners=False).clamp(0, 1)
    images = torch.nn.functional.pad(scaled[:, 0], (4, 4, 4, 4))
    return (images * 255).round().byte().numpy(), digits.target


# ---------------------------------------------------------------------------------------------------------
# Frames
# ---------------------------------------------------------------------------------------------------------

CACHE_VERSION = 1


@dataclass
class Frames:
    """Binned recordings, kept as the positions and counts of their non-zero bins.

    A frame's bins are numbered p * 34 * 34 + y * 34 + x. The non-zero bins of all recordings follow one another,
    recording by recording and frame by frame.
    """

    position: torch.Tensor  # int16 [non-zero bins]
    count: torch.Tensor  # uint8 or int16 [non-zero bins]: events in the bin
    filled: torch.Tensor  # int16 [N, T]: non-zero bins of each frame
    labels: torch.Tensor  # uint8 [N]
    events: torch.Tensor  # int32 [N]: events of each recording, before --denoise
    on_events: torch.Tensor  # int32 [N]: those of polarity 1
    duration: torch.Tensor  # int32 [N]: microseconds from the first event to the last

    def __post_init__(self):
        self._length = self.filled.sum(1, dtype=torch.int64)
        self._start = self._length.cumsum(0) - self._length

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Frames":
        """Return the same frames on `device`."""
        return replace(self, **{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return frames float32 [T, B, 2, 34, 34] and labels int64 [B] of the recordings `indices` [B]."""
        device = self.position.device
        indices = indices.to(device)
        filled = self.filled[indices].long()  # [B, T]
        batch_size, time_steps = filled.shape
        # Entry i of the batch is entry i + (start of its recording in the cache - start in the batch) of the cache.
        length = self._length[indices]
        shift = self._start[indices] - (length.cumsum(0) - length)
        entry = torch.arange(int(length.sum()), device=device) + shift.repeat_interleave(length)
        frame = torch.arange(time_steps, device=device) * batch_size + torch.arange(batch_size, device=device)[:, None]
        target = frame.flatten().repeat_interleave(filled.flatten()) * BINS_PER_FRAME + self.position[entry].long()
        frames = torch.zeros(time_steps * batch_size * BINS_PER_FRAME, device=device)
        frames[target] = self.count[entry].float()
        return frames.view(time_steps, batch_size, 2, 34, 34), self.labels[indices].long()

    def batches(self, indices: torch.Tensor, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield `batch` of `indices`, `batch_size` at a time; the last may be smaller."""
        for chunk in indices.split(batch_size):
            yield self.batch(chunk)


def load_frames(recordings: NMNIST, time_steps: int, denoise: int | None = None) -> Frames:
    """Return the recordings binned into `time_steps` frames, from the cache where they are in it.

    `denoise` is the filter time of `tonic.transforms.Denoise` in microseconds. The cache is a file under
    `<data_dir>/cache/`, memory-mapped; its name holds a fingerprint of the recordings' names, sizes and times of
    change, so changed recordings are binned anew. Where it can't be written, the frames stay in memory.
    """
    prefix = f"{recordings.root.name}_{recordings.split}_T{time_steps}_denoise{denoise or 0}_"
    path = recordings.root.parent / "cache" / f"{prefix}{_fingerprint(recordings)}.pt"
    if path.is_file():
        try:
            return Frames(**torch.load(path, mmap=True, weights_only=True))
        except Exception as error:  # torch raises many types on a damaged file
            print(f"cache       {path} is damaged ({type(error).__name__}): binning anew", file=sys.stderr)
    frames = bin_recordings(recordings, time_steps, denoise)
    try:
        with atomic_path(path) as temporary:
            torch.save({field.name: getattr(frames, field.name) for field in fields(frames)}, temporary)
    except OSError as error:
        print(
            f"cache       {path.parent} can't be written ({error.strerror}): frames stay in memory",
            file=sys.stderr,
        )
        return frames
    for old in path.parent.glob(f"{prefix}*.pt"):  # of recordings that have changed since
        if old != path:
            old.unlink(missing_ok=True)
    print(f"cache       {path} ({path.stat().st_size / len(frames) / 1000:.1f} KB a recording)")
    return Frames(**torch.load(path, mmap=True, weights_only=True))


def _fingerprint(recordings: NMNIST) -> str:
    digest = hashlib.sha256(f"version {CACHE_VERSION}".encode())
    for path in recordings.data:
        status = os.stat(path)
        digest.update(f"{os.path.relpath(path, recordings.root)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def bin_recordings(recordings: NMNIST, time_steps: int, denoise: int | None = None) -> Frames:
    """Bin recordings with tonic's `ToFrame(n_time_bins=time_steps)`, after its `Denoise` where asked, on all cores."""
    transforms = [tonic.transforms.Denoise(denoise)] if denoise else []
    transforms.append(tonic.transforms.ToFrame(sensor_size=SENSOR_SIZE, n_time_bins=time_steps))
    chunks = np.array_split(np.arange(len(recordings)), max(1, len(recordings) // 50))
    parts = []
    with (
        ProcessPoolExecutor(
            num_cores(),
            initializer=_start_worker,
            initargs=(recordings, tonic.transforms.Compose(transforms)),
        ) as pool,
        tqdm(desc=f"bin {recordings.split}", total=len(recordings), unit="recording") as bar,
    ):
        try:
            for part in pool.map(_bin_chunk, chunks):
                parts.append(part)
                bar.update(len(part["events"]))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    labels = torch.tensor(recordings.targets, dtype=torch.uint8)
    return Frames(labels=labels, **{name: torch.from_numpy(values) for name, values in whole.items()})


_worker = {}  # what a worker process of `bin_recordings` is given once, at its start


def _start_worker(recordings: NMNIST, transform) -> None:
    _worker.update(recordings=recordings, transform=transform)


def _bin_chunk(indices: np.ndarray) -> dict[str, np.ndarray]:
    """Return the fields of `Frames` but the labels for some recordings."""
    recordings, transform = _worker["recordings"], _worker["transform"]
    positions, counts, filled, facts = [], [], [], []
    for index in indices:
        events, _ = recordings[index]
        facts.append((len(events), events["p"].sum(), events["t"][-1] - events["t"][0]))
        frames = transform(events).reshape(-1, BINS_PER_FRAME)
        frame, position = np.nonzero(frames)
        positions.append(position.astype(np.int16))
        counts.append(frames[frame, position])
        filled.append(np.bincount(frame, minlength=len(frames)).astype(np.int16))
    count = np.concatenate(counts)
    events, on_events, duration = np.array(facts, dtype=np.int32).T
    return {
        "position": np.concatenate(positions),
        # Parts of different types join to the wider one.
        "count": count.astype(np.uint8 if count.max(initial=0) < 256 else np.int16),
        "filled": np.stack(filled),
        "events": events,
        "on_events": on_events,
        "duration": duration,
    }


def split_validation(labels: torch.Tensor, val_split: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Split recordings into training and validation, stratified by digit, fixed by `seed`; return their indices."""
    indices = np.arange(len(labels))
    try:
        train, val = train_test_split(indices, test_size=val_split, stratify=labels.numpy(), random_state=seed)
    except ValueError:
        raise UserError(
            f"--val_split {val_split} of {len(labels)} recordings leaves a digit out of training or validation: "
            "choose another share or add recordings"
        ) from None
    return torch.from_numpy(np.sort(train)), torch.from_numpy(np.sort(val))


# ---------------------------------------------------------------------------------------------------------
# What scripts use
# ---------------------------------------------------------------------------------------------------------


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which recordings to use and how to bin them."""
    group = parser.add_argument_group("data")
    group.add_argument("--data_dir", default="./data", help="folder of the data sets (default: %(default)s)")
    group.add_argument(
        "--dataset",
        choices=["auto", "nmnist", "simulated"],
        default="auto",
        help="nmnist: from data_dir, else downloaded; simulated: scikit-learn's digits before a simulated camera; "
        "auto: nmnist, or simulated where it can't be had (default: %(default)s)",
    )
    group.add_argument(
        "--time_steps",
        type=number(int, 1, 1000),
        default=25,
        help="frames a recording is binned into, T (default: %(default)s)",
    )
    group.add_argument(
        "--denoise",
        type=number(int, 1),
        metavar="MICROSECONDS",
        help="drop events without a neighbour within this time (default: off)",
    )


def open_recordings(data_dir: str | Path, dataset: str) -> tuple[NMNIST, NMNIST]:
    """Return the training and the test recordings of `dataset` ('auto', 'nmnist' or 'simulated'); say what they are.

    Raises `DownloadError` where 'nmnist' can't be had, `UserError` where what is on disk is no data set.
    """
    if dataset != "simulated":
        try:
            return _announce(*(NMNIST(data_dir, split) for split in ("train", "test")))
        except DownloadError as error:
            how = (
                f"connect this machine, or unpack train.zip and test.zip of {HOMEPAGE} into {Path(data_dir) / 'NMNIST'}"
            )
            if dataset == "nmnist":
                raise DownloadError(f"no N-MNIST in {data_dir}: {error}. To get it: {how}") from None
            print(f"WARNING: no N-MNIST in {data_dir}: {error}", file=sys.stderr)
            print("WARNING: falling back to SIMULATED recordings of scikit-learn's digits.", file=sys.stderr)
            print(f"WARNING: to get the real ones, {how}.", file=sys.stderr)
    return _announce(*(SimulatedNMNIST(data_dir, split) for split in ("train", "test")))


@dataclass
class Data:
    """A data set, binned: its name as files and figures carry it, and the frames of its two splits."""

    name: str
    train: Frames
    test: Frames


def load_data(args: argparse.Namespace, device: torch.device) -> Data:
    """Open, bin and move to `device` the recordings that the flags of `add_data_arguments` name."""
    train, test = open_recordings(args.data_dir, args.dataset)
    frames = (load_frames(recordings, args.time_steps, args.denoise).to(device) for recordings in (train, test))
    return Data(train.name, *frames)


def _announce(train: NMNIST, test: NMNIST) -> tuple[NMNIST, NMNIST]:
    print(f"data set    {train.name} in {train.root}: {train.describe()}, {test.describe()}")
    return train, test


# ---------------------------------------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------------------------------------


def print_table(splits: dict[str, Frames]) -> None:
    """Print what the data set holds, a column a split."""
    time_steps = next(iter(splits.values())).filled.shape[1]
    rows = [("", [f"{split:>22}" for split in splits])]
    for digit in range(NUM_DIGITS):
        numbers = [int((frames.labels == digit).sum()) for frames in splits.values()]
        rows.append((f"recordings of digit {digit}", [f"{n:22,}" for n in numbers]))
    rows.append(("recordings", [f"{len(frames):22,}" for frames in splits.values()]))
    for title, field, scale in (("events", "events", 1), ("duration in ms", "duration", 1e-3)):
        for statistic in ("mean", "min", "max"):
            values = [getattr(getattr(frames, field).double(), statistic)() for frames in splits.values()]
            rows.append((f"{title}, {statistic}", [f"{float(value) * scale:22,.0f}" for value in values]))
    shares = [frames.on_events.sum() / frames.events.sum() for frames in splits.values()]
    rows.append(("share of ON events", [f"{float(share):22.1%}" for share in shares]))
    shares = [frames.filled.double().mean() / BINS_PER_FRAME for frames in splits.values()]
    rows.append((f"non-zero bins at T = {time_steps}", [f"{float(share):22.2%}" for share in shares]))
    for title, values in rows:
        print(f"{title:24}" + "".join(values))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.replace("%", "%%"), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_arguments(parser)
    args = parser.parse_args(argv)
    splits = {
        recordings.split: load_frames(recordings, args.time_steps, args.denoise)
        for recordings in open_recordings(args.data_dir, args.dataset)
    }
    print_table(splits)


if __name__ == "__main__":
    run_script(main)
