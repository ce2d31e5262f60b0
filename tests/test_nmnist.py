"""Recordings: found, downloaded, checked, simulated; frames compared with tonic's own."""

import contextlib
import ctypes
import functools
import hashlib
import http.server
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import benchmark
import numpy as np
import pytest
import tonic
import torch
from conftest import ROOT, SHARED, assert_refused, files_in, limit_files, make_events, make_recordings, run
from hypothesis import given, settings
from hypothesis import strategies as st
from tonic.io import read_mnist_file

import nmnist
import utils
from utils import UserError

NOWHERE = "http://127.0.0.1:9/"  # the discard port, where nothing listens


def run_offline(*arguments, url=NOWHERE, **options):
    """Run nmnist.py in a process of its own, in which the URLs of N-MNIST's zips are below `url`."""
    code = (
        "import sys, nmnist, utils; N = nmnist.NMNIST; "
        f"N.train_url, N.test_url = {url + 'train.zip'!r}, {url + 'test.zip'!r}; utils.run_script(nmnist.main)"
    )
    return run(sys.executable, "-c", code, *arguments, **options)


@contextlib.contextmanager
def start(*flags):
    """Start nmnist.py as a user does; yield the process while it runs, and kill what is left of it."""
    command = [sys.executable, "nmnist.py", *map(str, flags)]
    with subprocess.Popen(command, cwd=ROOT, stdout=-1, stderr=-1, text=True) as process:
        limit = threading.Timer(250, process.kill)
        limit.start()
        try:
            yield process
        finally:
            limit.cancel()
            process.kill()


def entries(folder):
    """Return the sorted names in a folder, those of temporary files included, lock files left out."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def contents(folder):
    """Return the bytes of each file in a folder by its path, lock files left out."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in files_in(folder)}


# --- files on disk ---------------------------------------------------------------------------------------


def test_written_recordings_are_read_by_tonic_unchanged(tmp_path):
    events = make_events(7, np.random.default_rng(0))
    events["t"][-1] = 2**23 - 1  # the largest time that the format holds
    nmnist.write_recording(tmp_path / "x.bin", events)
    np.testing.assert_array_equal(read_mnist_file(tmp_path / "x.bin", dtype=tonic.datasets.NMNIST.dtype), events)


def test_any_number_of_recordings_is_accepted_without_a_zip(made_data_dir, capsys):
    train, test = nmnist.open_recordings(made_data_dir, "nmnist")
    assert (len(train), len(test)) == (120, 30)
    assert "training recordings: 120 of 60,000, test recordings: 30 of 10,000" in capsys.readouterr().out
    events, label = train[0]
    assert events.dtype == tonic.datasets.NMNIST.dtype
    assert label == 0
    assert sorted(set(test.targets)) == list(range(10))


def zip_recordings(data_dir, folder, remove=0):
    """Write `<folder>.zip` beside the recordings, as N-MNIST is published, then remove some; return their contents."""
    root = data_dir / "NMNIST"
    files = sorted((root / folder).glob("*/*.bin"))
    with zipfile.ZipFile(root / f"{folder.lower()}.zip", "w") as archive:
        for path in files:
            archive.write(path, path.relative_to(root))
    recordings = {path: path.read_bytes() for path in files}
    for path in files[:remove]:
        path.unlink()
    return recordings


def test_an_interrupted_extraction_is_completed(tmp_path):
    zipped = zip_recordings(make_recordings(tmp_path), "Train", remove=17)
    cut = max(zipped)
    cut.write_bytes(zipped[cut][:100])
    extra = tmp_path / "NMNIST" / "Train" / "3" / "99999.bin"  # the user's own
    shutil.copy(next(path for path in zipped if path.exists()), extra)
    assert len(nmnist.NMNIST(tmp_path, "train")) == 121
    assert {path: path.read_bytes() for path in zipped} == zipped


def test_a_damaged_zip_beside_missing_recordings_is_named(tmp_path):
    zip_recordings(make_recordings(tmp_path), "Train", remove=1)
    archive = tmp_path / "NMNIST" / "train.zip"
    archive.write_bytes(archive.read_bytes()[:-500])
    with pytest.raises(UserError, match=r"train\.zip"):
        nmnist.NMNIST(tmp_path, "train")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "damaged"),
        (b"\x01\x02\x80\x00", "damaged"),
        (b"\x40\x02\x80\x00\x00" * 3, "outside the 34 x 34 pixels"),
        (b"\x01\x02\x80\x01\x00" + b"\x01\x02\x80\x00\x00", "run backwards"),
        (b"\x01\xf0\x80\x00\x00", "no events"),  # only a time stamp overflow
    ],
)
def test_bad_recordings_are_refused_by_name(tmp_path, content, words):
    bad = make_recordings(tmp_path, 2, 1) / "NMNIST" / "Train" / "4" / "00005.bin"
    bad.write_bytes(content)
    with pytest.raises(UserError, match=f"{bad} .*{words}"):
        nmnist.main(["--data_dir", str(tmp_path), "--time_steps", "5"])
    assert not list(tmp_path.glob("cache/*train*"))


def of_one_file(folder: Path, content: bytes):
    """Return a data set of one recording with this content, and its path."""
    path = folder / "recording.bin"
    path.write_bytes(content)
    recordings = object.__new__(nmnist.NMNIST)  # without looking for folders
    recordings.data, recordings.targets = [str(path)], [0]
    recordings.first_saccade_only = recordings.stabilize = False
    recordings.transform = recordings.target_transform = recordings.transforms = None
    return recordings, path


def check_any_content(folder: Path, content: bytes) -> None:
    """Check that content is refused by name, or that it is a recording: all its events are valid."""
    recordings, path = of_one_file(folder, content)
    try:
        events, _ = recordings[0]
    except UserError as error:
        assert str(path) in str(error)  # noqa: PT017
        return
    assert len(content) % 5 == 0
    assert len(events) > 0
    assert events["x"].max() < 34
    assert events["y"].max() < 34
    assert (np.diff(events["t"]) >= 0).all()
    assert nmnist.bin_events(events, 5)[2].sum() <= len(events)


def fuzz(folder: Path, examples: int) -> None:
    """Check random bytes, and random bytes that look like events, as recordings."""
    event = st.tuples(
        st.integers(0, 40), st.integers(0, 40), st.integers(0, 255), st.integers(0, 255), st.integers(0, 9)
    )
    events = st.lists(event, max_size=8).map(lambda rows: bytes(value for row in rows for value in row))

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(st.one_of(st.binary(max_size=60), events))
    def check(content):
        check_any_content(folder, content)

    check()


def test_random_bytes_are_refused_or_are_recordings(tmp_path):
    fuzz(tmp_path, 500)


@pytest.mark.slow
def test_ten_thousand_random_byte_strings_are_refused_or_are_recordings(tmp_path):
    fuzz(tmp_path, 10_000)


def test_a_recording_cut_anywhere_is_refused_unless_between_events(tmp_path):
    """A cut between two events leaves a shorter recording, which only the zip can tell from a whole one."""
    nmnist.write_recording(tmp_path / "whole.bin", make_events(3, np.random.default_rng(0)))
    content = (tmp_path / "whole.bin").read_bytes()
    cuts = [*range(41), *np.random.default_rng(1).integers(0, len(content), 1_000)]
    for cut in cuts:
        recordings, path = of_one_file(tmp_path, content[:cut])
        if cut % 5 or cut == 0:
            with pytest.raises(UserError, match=f"{path.name} is damaged"):
                recordings[0]
        else:
            assert len(recordings[0][0]) == cut // 5


def test_folders_and_unreadable_files_in_place_of_recordings_are_refused(tmp_path):
    bad = make_recordings(tmp_path, 2, 1) / "NMNIST" / "Train" / "4" / "00005.bin"
    bad.unlink()
    bad.mkdir()
    with pytest.raises(UserError, match=f"{bad} does not belong here"):
        nmnist.main(["--data_dir", str(tmp_path)])
    bad.rmdir()
    bad.symlink_to(tmp_path / "nowhere")
    assert_refused(run_offline("--data_dir", tmp_path), str(bad), "No such file")
    bad.unlink()
    bad.touch(mode=0)
    if not os.access(bad, os.R_OK):  # root may read everything
        with pytest.raises(PermissionError, match=str(bad)):
            nmnist.main(["--data_dir", str(tmp_path)])
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["x/00001.bin", "12/00001.bin", "0/1/00001.bin", "00001.bin"])
def test_recordings_outside_the_digits_folders_are_refused(tmp_path, name):
    train = make_recordings(tmp_path, 1, 1) / "NMNIST" / "Train"
    (train / name).parent.mkdir(exist_ok=True)
    shutil.copy(train / "0" / "00001.bin", train / name)
    with pytest.raises(UserError, match=f"{name.split('/')[0]}.* does not belong here"):
        nmnist.NMNIST(tmp_path, "train")


def test_folders_that_are_not_digits_and_missing_digits_are_refused(tmp_path):
    train = make_recordings(tmp_path, 2, 1) / "NMNIST" / "Train"
    (train / "x").mkdir()
    with pytest.raises(UserError, match="x does not belong here"):
        nmnist.NMNIST(tmp_path, "train")
    (train / "x").rmdir()
    shutil.rmtree(train / "6")
    with pytest.raises(UserError, match="no recordings of digit 6"):
        nmnist.NMNIST(tmp_path, "train")


# --- download --------------------------------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `files`; of those in `dropped` or `stalled` the first half, then closes the connection or is silent."""

    def __init__(self, files, dropped, stalled, *arguments):
        self.files, self.dropped, self.stalled = files, dropped, stalled
        super().__init__(*arguments)

    def do_GET(self):
        name = self.path.strip("/")
        if name not in self.files:
            self.send_error(404)
            return
        content = self.files[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if name in (*self.dropped, *self.stalled) else content)
        if name in self.stalled:
            time.sleep(5)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serve(files, dropped=(), stalled=()):
    """Serve files on the loopback address; yield the URL of their folder."""
    handler = functools.partial(Handler, files, dropped, stalled)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Zips in N-MNIST's published layout, by file name."""
    root = make_recordings(tmp_path_factory.mktemp("published"), 2, 1) / "NMNIST"
    files = {}
    for folder in ("Train", "Test"):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for path in sorted((root / folder).rglob("*")):
                archive.write(path, path.relative_to(root))
        files[f"{folder.lower()}.zip"] = buffer.getvalue()
    return files


@pytest.fixture
def set_url(published, monkeypatch):
    """Return a function that points the data set's URLs and md5 sums to a server of the published zips."""

    def point(url):
        for split in ("train", "test"):
            monkeypatch.setattr(nmnist.NMNIST, f"{split}_url", f"{url}{split}.zip")
            monkeypatch.setattr(nmnist.NMNIST, f"{split}_md5", hashlib.md5(published[f"{split}.zip"]).hexdigest())

    return point


def test_urls_and_md5_sums_are_tonics():
    for name in ("train_url", "test_url", "train_md5", "test_md5"):
        assert getattr(nmnist.NMNIST, name) == getattr(tonic.datasets.NMNIST, name)


def test_missing_recordings_are_downloaded_once(tmp_path, published, set_url):
    with serve(published) as url:
        set_url(url)
        train, test = nmnist.open_recordings(tmp_path, "auto")
    assert (train.name, len(train), len(test)) == ("NMNIST", 20, 10)
    train, _ = nmnist.open_recordings(tmp_path, "nmnist")  # the server is gone
    assert len(train) == 20
    assert entries(tmp_path / "NMNIST") == ["Test", "Train", "test.zip", "train.zip"]


def test_a_wrong_zip_is_refused_and_not_kept(tmp_path, published, set_url):
    wrong = published["test.zip"]
    with serve({"train.zip": wrong}) as url:
        set_url(url)
        message = rf"{url}train\.zip sent {len(wrong):,} bytes that are not N-MNIST's train\.zip \(wrong md5\)"
        with pytest.raises(nmnist.DownloadError, match=message):
            nmnist.open_recordings(tmp_path, "nmnist")
    assert not files_in(tmp_path)


def test_a_dropped_connection_is_reported_and_nothing_kept(tmp_path, published, set_url):
    half = len(published["train.zip"]) // 2
    with serve(published, dropped=["train.zip"]) as url:
        set_url(url)
        with pytest.raises(nmnist.DownloadError, match=rf"sent {half:,} bytes .*the connection may have dropped"):
            nmnist.open_recordings(tmp_path, "nmnist")
    assert not files_in(tmp_path)


def test_a_download_that_stalls_times_out_and_nothing_is_kept(tmp_path, published, set_url, monkeypatch):
    monkeypatch.setattr(nmnist.NMNIST, "connect_seconds", 1)
    before = socket.getdefaulttimeout()
    with serve(published, stalled=["train.zip"]) as url:
        set_url(url)
        with pytest.raises(nmnist.DownloadError, match=r"train\.zip can't be downloaded from .*timed out"):
            nmnist.open_recordings(tmp_path, "nmnist")
    assert not files_in(tmp_path)
    assert socket.getdefaulttimeout() == before


def test_a_host_that_never_answers_times_out(tmp_path, set_url, monkeypatch):
    assert nmnist.NMNIST.connect_seconds <= 10
    monkeypatch.setattr(nmnist.NMNIST, "connect_seconds", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # connections are accepted, but nothing is sent
        set_url(f"http://127.0.0.1:{silent.getsockname()[1]}/")
        with pytest.raises(nmnist.DownloadError, match=r"no answer within 0\.5 s|timed out"):
            nmnist.open_recordings(tmp_path, "nmnist")


def test_what_a_killed_download_left_is_removed_and_not_read(tmp_path, published, set_url):
    left = tmp_path / "NMNIST" / ".train.tmp.zip"
    left.parent.mkdir()
    left.write_bytes(published["test.zip"] + bytes(len(published["train.zip"])))  # longer than what is downloaded
    with serve(published) as url:
        set_url(url)
        train, _ = nmnist.open_recordings(tmp_path, "nmnist")
    assert len(train) == 20
    assert (tmp_path / "NMNIST" / "train.zip").read_bytes() == published["train.zip"]
    assert entries(tmp_path / "NMNIST") == ["Test", "Train", "test.zip", "train.zip"]


@pytest.mark.parametrize(
    ("folders", "suffix"), [(["Train"], "bin"), (["test", "train"], "bin"), (["Test", "Train"], "BIN")]
)
def test_half_a_data_set_is_refused_rather_than_replaced_by_a_simulated_one(tmp_path, monkeypatch, folders, suffix):
    for part in ("train", "test"):
        monkeypatch.setattr(nmnist.NMNIST, f"{part}_url", f"{NOWHERE}{part}.zip")
    for folder in folders:
        for digit in range(10):
            path = tmp_path / "NMNIST" / folder / str(digit) / f"0000{digit}.{suffix}"
            path.parent.mkdir(parents=True)
            nmnist.write_recording(path, make_events(digit, np.random.default_rng(0)))
    with pytest.raises(UserError, match=rf"holds {', '.join(folders)}, but not .*Test/<digit>/\*\.bin"):
        nmnist.main(["--data_dir", str(tmp_path)])
    assert not (tmp_path / "SimulatedNMNIST").exists()


def test_dataset_nmnist_does_not_fall_back_to_simulated(tmp_path):
    result = run_offline("--data_dir", tmp_path, "--dataset", "nmnist")
    assert_refused(result, "no N-MNIST in", "Connection refused", nmnist.HOMEPAGE)
    assert not files_in(tmp_path)


# --- simulation ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """The result of `python nmnist.py` without network, and its data_dir."""
    data_dir = tmp_path_factory.mktemp("simulated")
    return run_offline("--data_dir", data_dir, "--time_steps", "10"), data_dir


def test_dataset_auto_falls_back_to_simulated_with_a_warning(simulated):
    result, data_dir = simulated
    assert result.returncode == 0, result.stderr
    for words in ("WARNING: no N-MNIST in", "Connection refused", "falling back to SIMULATED", nmnist.HOMEPAGE):
        assert words in result.stderr
    assert f"SimulatedNMNIST in {data_dir}" in result.stdout
    assert "training recordings: 1,437, test recordings: 360" in result.stdout


def test_simulated_recordings_are_stratified_and_read_by_tonic(simulated):
    _, data_dir = simulated
    root = data_dir / "SimulatedNMNIST"
    for folder, number in (("Train", 1437), ("Test", 360)):
        files = list((root / folder).glob("*/*.bin"))
        assert len(files) == number
        per_digit = [len(list((root / folder / str(digit)).iterdir())) for digit in range(10)]
        assert min(per_digit) > 0.9 * number / 10
        for path in files[:20]:
            events = read_mnist_file(path, dtype=tonic.datasets.NMNIST.dtype)
            assert 500 < len(events) < 10_000
            assert (np.diff(events["t"]) >= 0).all()
            assert events["t"].max() < 320_000
    train, test = ({path.name for path in (root / folder).glob("*/*.bin")} for folder in ("Train", "Test"))
    assert not train & test


def test_simulated_recordings_keep_their_name_in_another_folder(simulated, tmp_path):
    _, data_dir = simulated
    (tmp_path / "NMNIST").symlink_to(data_dir / "SimulatedNMNIST")
    assert nmnist.NMNIST(tmp_path, "test").name == "SimulatedNMNIST"


def test_two_processes_may_simulate_at_once(tmp_path):
    flags = ["--data_dir", tmp_path, "--dataset", "simulated", "--time_steps", "2"]
    with start(*flags) as first, start(*flags) as second:
        for process in (first, second):
            stdout, stderr = process.communicate()
            assert process.returncode == 0, stderr
            assert "training recordings: 1,437, test recordings: 360" in stdout
    assert entries(tmp_path) == ["SimulatedNMNIST", "cache"]


@pytest.fixture
def few_digits(monkeypatch):
    """Let `SimulatedNMNIST` record 40 training and 10 test images."""
    monkeypatch.setattr(nmnist, "sklearn_images", functools.partial(few_images, 5))
    monkeypatch.setattr(nmnist, "TEST_DIGITS", 10)


def test_simulated_recordings_of_another_camera_are_replaced(tmp_path, few_digits):
    old = nmnist.SimulatedNMNIST(tmp_path, "train")
    assert (len(old), len(nmnist.SimulatedNMNIST(tmp_path, "test"))) == (40, 10)
    first = [old[i][0] for i in range(len(old))]
    simulator = json.loads((old.root / nmnist.SIMULATOR_FILE).read_text())
    (old.root / nmnist.SIMULATOR_FILE).write_text(json.dumps(simulator | {"threshold": 5}))
    Path(old.data[0]).write_bytes(Path(old.data[1]).read_bytes())
    new = nmnist.SimulatedNMNIST(tmp_path, "train")
    assert json.loads((old.root / nmnist.SIMULATOR_FILE).read_text()) == simulator
    for i, events in enumerate(first):  # the same camera again: the same recordings
        np.testing.assert_array_equal(new[i][0], events)
    assert entries(tmp_path) == ["SimulatedNMNIST"]


def test_what_a_killed_simulation_left_is_removed_and_not_read(tmp_path, few_digits):
    whole = nmnist.SimulatedNMNIST(tmp_path / "whole", "train").root
    left = tmp_path / "killed" / ".SimulatedNMNIST.tmp"
    shutil.copytree(whole, left)
    shutil.rmtree(left / "Test")
    recordings = sorted((left / "Train").glob("*/*.bin"))
    recordings[0].write_bytes(recordings[1].read_bytes())
    shutil.copy(recordings[1], left / "Train" / "0" / "99999.bin")
    nmnist.SimulatedNMNIST(tmp_path / "killed", "train")
    assert contents(tmp_path / "killed" / "SimulatedNMNIST") == contents(whole)
    assert entries(tmp_path / "killed") == ["SimulatedNMNIST"]


def few_images(per_digit):
    """Return the first images of each of scikit-learn's digits."""
    images, labels = ALL_IMAGES
    chosen = np.concatenate([np.flatnonzero(labels == digit)[:per_digit] for digit in range(10)])
    return images[chosen], labels[chosen]


ALL_IMAGES = nmnist.sklearn_images()


def test_events_lie_on_the_path_of_the_saccades():
    """The mean position of the events near a time is that of the digit, which the path gives."""
    image = np.zeros((28, 28), np.uint8)
    image[12:16, 12:16] = 255  # a square in the middle
    (events,) = nmnist.simulate_events(image[None], [np.random.default_rng(0)])
    for ms in (45, 150, 255):
        near = events[np.abs(events["t"] - 1000 * ms) < 10_000]
        y, x = nmnist.saccade_offsets(np.array([ms]))[0] + 16.5
        assert near["y"].mean() == pytest.approx(y, abs=1)
        assert near["x"].mean() == pytest.approx(x, abs=1)


def test_a_bright_edge_that_arrives_gives_off_events():
    """During the first saccade the digit moves down: its lower edge arrives (OFF), its upper edge leaves (ON)."""
    image = np.zeros((28, 28), np.uint8)
    image[12:16, 4:24] = 255
    (events,) = nmnist.simulate_events(image[None], [np.random.default_rng(0)])
    first = events[(events["t"] > 20_000) & (events["t"] < 80_000)]
    off, on = (np.median(first["y"][first["p"] == p]) for p in (0, 1))
    assert off > on + 1


def test_a_recording_depends_on_its_image_and_generator_alone():
    images, _ = few_images(7)
    together = list(nmnist.simulate_events(images, [np.random.default_rng(i) for i in range(70)]))  # 64 and 6 at once
    for i in (0, 1, 63, 64, 69):
        (alone,) = nmnist.simulate_events(images[i : i + 1], [np.random.default_rng(i)])
        assert alone.tobytes() == together[i].tobytes()
    (other,) = nmnist.simulate_events(images[:1], [np.random.default_rng(99)])
    assert other.tobytes() != together[0].tobytes()


def test_pixels_keep_the_refractory_period():
    images, _ = few_images(1)
    for events in nmnist.simulate_events(images, [np.random.default_rng(i) for i in range(10)]):
        pixel = events["y"] * 34 + events["x"]
        order = np.lexsort((events["t"], pixel))
        gaps = np.diff(events["t"][order])[np.diff(pixel[order]) == 0]
        # Noise events, 130 of 4,000, do not keep it.
        assert (gaps > 1000 * nmnist.CAMERA.refractory * (1 - 3 * nmnist.CAMERA.speed_spread)).mean() > 0.97


def test_a_blank_image_gives_only_noise():
    blank = np.zeros((20, 28, 28), np.uint8)
    recordings = nmnist.simulate_events(blank, [np.random.default_rng(i) for i in range(20)])
    expected = (nmnist.CAMERA.noise_on + nmnist.CAMERA.noise_off) * 34 * 34 * nmnist.CAMERA.duration
    mean = np.mean([len(events) for events in recordings])
    assert mean == pytest.approx(expected, abs=4 * np.sqrt(expected / 20))


def test_simulated_recordings_match_real_ones_of_the_same_images():
    if not (SHARED / "mnist.npz").is_file():
        pytest.skip(f"no real recordings in {SHARED}")
    real, images, ids = benchmark.load_real(SHARED)
    chosen = np.random.default_rng(0).permutation(800)[:100]
    simulated = list(nmnist.simulate_events(images[chosen], [np.random.default_rng([0, ids[i]]) for i in chosen]))
    rows = benchmark.compare(simulated, [real[i] for i in chosen])
    assert len(rows) == 8
    assert [row for row in rows if not row[3]] == []
    # The comparison is not blind: recordings of other images do not match.
    wrong = benchmark.compare(simulated, [real[i] for i in np.roll(chosen, 1)])
    assert not wrong[0][3]
    assert not wrong[4][3]


def save_images(path, per_digit=2, **changes):
    """Write a few of scikit-learn's digits to an .npz, with some arrays replaced by `changes` (None: left out)."""
    images, labels = few_images(per_digit)
    arrays = {"train_images": images, "train_labels": labels, "test_images": images[::2], "test_labels": labels[::2]}
    arrays |= changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_labelled_images_are_recorded_and_the_seed_sets_the_noise(tmp_path, monkeypatch, capsys):
    archive = save_images(tmp_path / "images.npz", per_digit=13)  # 130 and 65 recordings: more than one batch
    results = []
    for name, batch_size, seed in (("a", 64, 0), ("b", 7, 0), ("c", 64, 1)):
        monkeypatch.setattr(nmnist, "SIM_BATCH_SIZE", batch_size)  # which must not change a recording
        nmnist.main(["--simulate", str(archive), "--data_dir", str(tmp_path / name), "--seed", str(seed)])
        assert "195 recordings" in capsys.readouterr().out
        results.append(contents(tmp_path / name / "NMNIST"))
    assert results[0] == results[1]
    assert results[0].keys() == results[2].keys()
    assert results[0]["Train/0/00001.bin"] != results[2]["Train/0/00001.bin"]
    assert results[0]["Train/0/00001.bin"] != results[0]["Test/0/00001.bin"]  # the same image, other noise
    train, test = nmnist.open_recordings(tmp_path / "a", "nmnist")
    assert (train.name, len(train), len(test)) == ("SimulatedNMNIST (images.npz)", 130, 65)
    _, labels = few_images(13)
    for path, target in zip(train.data, train.targets, strict=True):
        index = int(path[-9:-4]) - 1  # names count from 1
        assert labels[index] == target


def test_images_without_a_test_part_are_training_recordings(tmp_path, capsys):
    images, labels = few_images(1)
    np.savez(tmp_path / "images.npz", images=images, labels=labels.astype(np.uint8))
    nmnist.main(["--simulate", str(tmp_path / "images.npz"), "--data_dir", str(tmp_path)])
    nmnist.main(["--data_dir", str(tmp_path), "--time_steps", "5"])  # the table, of one part
    assert "recordings of digit 3                        1\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="simulated from images without a test part"):
        nmnist.open_recordings(tmp_path, "nmnist")


IMAGES = np.zeros((10, 28, 28), np.uint8)
LABELS = np.arange(10)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_images": IMAGES[:, :27]}, "train_images is uint8 [10, 27, 28]; it must be uint8 [N, 28, 28]"),
        ({"train_images": IMAGES.astype(float)}, "train_images is float64"),
        ({"train_images": IMAGES[0]}, "train_images is uint8 [28, 28]"),
        ({"train_images": IMAGES[:0], "train_labels": LABELS[:0]}, "train_images is uint8 [0, 28, 28]"),
        ({"test_labels": LABELS[:4]}, "test_labels is int64 [4]; it must be whole numbers [10]"),
        ({"test_labels": LABELS / 2}, "test_labels is float64 [10]"),
        ({"train_labels": LABELS + 1}, "train_labels has values outside 0 to 9"),
        ({"train_labels": LABELS - 1}, "train_labels has values outside 0 to 9"),
        ({"test_images": None}, "no array test_images"),
        ({"train_images": None}, "no array train_images"),
        ({"train_labels": np.array([None] * 10)}, "can't be read as a .npz file"),  # needs pickle, which may run code
    ],
)
def test_wrong_images_are_refused_and_nothing_written(tmp_path, changes, words):
    arrays = {"train_images": IMAGES, "train_labels": LABELS, "test_images": IMAGES, "test_labels": LABELS}
    archive = save_images(tmp_path / "images.npz", **(arrays | changes))
    with pytest.raises(UserError, match=re.escape(words)) as error:
        nmnist.main(["--simulate", str(archive), "--data_dir", str(tmp_path / "out")])
    assert str(archive) in str(error.value)
    assert not (tmp_path / "out").exists()


def test_files_that_are_not_npz_are_refused(tmp_path):
    text = tmp_path / "images.npz"
    text.write_text("hello")
    np.save(tmp_path / "array.npy", IMAGES)
    for path in (text, tmp_path / "missing.npz", tmp_path, tmp_path / "array.npy"):
        with pytest.raises(UserError, match=r"can't be read as a \.npz file"):
            nmnist.main(["--simulate", str(path), "--data_dir", str(tmp_path)])
    assert entries(tmp_path) == ["array.npy", "images.npz"]


def test_simulate_does_not_overwrite_recordings(tmp_path):
    archive = save_images(tmp_path / "images.npz")
    data_dir = make_recordings(tmp_path / "data", 1, 1)
    before = contents(data_dir)
    with pytest.raises(UserError, match="exists already"):
        nmnist.main(["--simulate", str(archive), "--data_dir", str(data_dir)])
    assert contents(data_dir) == before


def test_simulate_does_not_overwrite_what_another_process_records_first(tmp_path, monkeypatch):
    archive = save_images(tmp_path / "images.npz")
    data_dir = tmp_path / "data"

    @contextlib.contextmanager
    def wait_for_another_process(*args, locked=utils.locked):
        with locked(*args):
            make_recordings(data_dir, 1, 1)  # by the process that held the lock until now
            yield

    monkeypatch.setattr(utils, "locked", wait_for_another_process)
    before = contents(make_recordings(tmp_path / "other", 1, 1))
    with pytest.raises(UserError, match="exists already"):
        nmnist.main(["--simulate", str(archive), "--data_dir", str(data_dir)])
    assert contents(data_dir) == before


# --- frames ----------------------------------------------------------------------------------------------


def tonic_frames(recordings, time_steps, denoise=None):
    """Return all frames [N, T, 2, 34, 34] as tonic makes them."""
    transforms = [tonic.transforms.Denoise(denoise)] if denoise else []
    to_frame = tonic.transforms.ToFrame(sensor_size=tonic.datasets.NMNIST.sensor_size, n_time_bins=time_steps)
    transform = tonic.transforms.Compose([*transforms, to_frame])
    return np.stack([transform(recordings[i][0]) for i in range(len(recordings))])


@pytest.mark.parametrize("time_steps", [1, 10, 25, 40])
def test_batches_are_tonics_frames_of_real_recordings(real_data_dir, time_steps):
    recordings = nmnist.NMNIST(real_data_dir, "test")
    frames = nmnist.load_frames(recordings, time_steps)
    expected = torch.from_numpy(tonic_frames(recordings, time_steps)).float()
    assert expected.sum() > 100_000
    order = torch.randperm(len(recordings), generator=torch.Generator().manual_seed(0))
    for indices, (x, labels) in zip(order.split(32), frames.batches(order, 32), strict=True):
        assert x.shape == (time_steps, len(indices), 2, 34, 34)
        assert torch.equal(x, expected[indices].transpose(0, 1))
        assert labels.tolist() == [recordings.targets[i] for i in indices]


@pytest.mark.parametrize(("time_steps", "denoise"), [(1, None), (25, None), (40, None), (25, 5000)])
def test_batches_are_tonics_frames(made_data_dir, time_steps, denoise, device):
    recordings = nmnist.NMNIST(made_data_dir, "test")
    frames = nmnist.load_frames(recordings, time_steps, denoise).to(device)
    assert frames.time_steps == time_steps
    expected = torch.from_numpy(tonic_frames(recordings, time_steps, denoise)).float()
    x, labels = frames.batch(torch.arange(len(recordings)))
    assert x.device.type == labels.device.type == device.type
    assert torch.equal(x.cpu(), expected.transpose(0, 1))
    assert labels.tolist() == recordings.targets


@pytest.mark.parametrize("augment", [False, True])
def test_batches_of_frames_in_pinned_memory_are_equal(made_data_dir, device, augment, monkeypatch):
    """Without a GPU nothing can be pinned, but the way such batches are made is the same."""
    frames = nmnist.load_frames(nmnist.NMNIST(made_data_dir, "test"), 10)
    on_device = frames.to(device)
    if device.type == "cuda":
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (1000, 10**9))
    else:
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _tensor: True)
    on_host = frames.to(device)
    assert on_host.bin_index.is_pinned()
    for indices in (torch.tensor([4, 0, 29, 8, 8]), torch.zeros(0, dtype=torch.int64)):
        for shard in (None, slice(1, 3)):
            batches = []
            for place in (on_device, on_host):
                torch.manual_seed(0)
                batches.append(place.batch(indices, augment=augment, shard=shard))
            assert all(torch.equal(*pair) for pair in zip(*batches, strict=True))


def test_frames_stay_on_the_host_where_they_do_not_fit_on_the_gpu(made_data_dir, monkeypatch, capsys):
    frames = nmnist.load_frames(nmnist.NMNIST(made_data_dir, "test"), 10)
    size = frames.bin_index.nbytes + frames.count.nbytes
    moved, pinned = [], []
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, _device: moved.append(tensor.nbytes) or tensor)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.nbytes) or tensor)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: tensor.nbytes in pinned)
    for free, bytes_pinned in ((2 * size, 0), (2 * size - 2, size)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device, free=free: (free, 10**12))
        moved.clear()
        frames.to(torch.device("cuda"))
        assert sum(pinned) == bytes_pinned
        assert (frames.bin_index.nbytes in moved) == (bytes_pinned == 0)
        assert ("frames      stay on the host" in capsys.readouterr().out) == (bytes_pinned > 0)


def test_bfloat16_batches_are_equal_and_channels_last(made_data_dir, device):
    frames = nmnist.load_frames(nmnist.NMNIST(made_data_dir, "test"), 10).to(device)
    indices = torch.tensor([4, 0, 29])
    x, _ = frames.batch(indices, torch.bfloat16)
    assert x.dtype == torch.bfloat16
    assert torch.equal(x.float(), frames.batch(indices)[0])
    assert x.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("augment", [False, True])
def test_shards_are_parts_of_the_whole_batch(made_data_dir, augment, device):
    frames = nmnist.load_frames(nmnist.NMNIST(made_data_dir, "test"), 10).to(device)
    indices = torch.tensor([4, 0, 29, 8, 8, 17, 3])
    batches = []
    for shard in (None, slice(0, 3), slice(3, 3), slice(3, 7)):
        torch.manual_seed(0)
        batches.append(frames.batch(indices, augment=augment, shard=shard))
    (whole, labels), *shards = batches
    assert torch.equal(torch.cat([x for x, _ in shards], 1), whole)
    assert torch.equal(torch.cat([y for _, y in shards]), labels)


def augmented(frames, monkeypatch, draws=None, **limits):
    """Return all frames, plain and augmented with these limits; `draws`, 0 to 1, replaces all random numbers."""
    nothing = {"shift": 0, "rotation": 0, "scale": 0, "shear": 0, "time_shift": 0, "drop": 0}
    monkeypatch.setattr(nmnist, "AUGMENTATION", nmnist.Augmentation(**(nothing | limits)))
    with monkeypatch.context() as patch:
        if draws is not None:
            patch.setattr(torch, "rand", lambda *size, **options: torch.full(size, draws, **options))
        indices = torch.arange(len(frames))
        return frames.batch(indices)[0].cpu(), frames.batch(indices, augment=True)[0].cpu()


def test_augmentation_with_limits_of_zero_changes_nothing(made_data_dir, monkeypatch):
    plain, moved = augmented(nmnist.load_frames(nmnist.NMNIST(made_data_dir, "test"), 10), monkeypatch)
    assert torch.equal(plain, moved)


def test_augmentation_rotates_shifts_and_scales(made_data_dir, monkeypatch, device):
    frames = nmnist.load_frames(nmnist.NMNIST(made_data_dir, "test"), 10).to(device)
    plain, rotated = augmented(frames, monkeypatch, draws=1.0, rotation=90)
    assert torch.equal(rotated, plain.rot90(-1, (3, 4)))  # y points down: from x to y is clockwise
    plain, shifted = augmented(frames, monkeypatch, draws=1.0, shift=3)
    assert torch.equal(shifted[..., 3:, 3:], plain[..., :-3, :-3])
    assert shifted[..., :3, :].sum() + shifted[..., :3].sum() == 0
    plain, earlier = augmented(frames, monkeypatch, draws=0.0, time_shift=0.2)
    assert torch.equal(earlier[:-2], plain[2:])  # by two of ten frames
    assert earlier[-2:].sum() == 0
    plain, halved = augmented(frames, monkeypatch, draws=0.0, scale=0.5)
    assert halved.sum() == plain.sum()  # events that move to the same bin add up
    where = halved.sum((0, 1, 2)).nonzero()
    assert (where.min(), where.max()) >= (8, 8)
    assert where.max() <= 25


def test_augmentation_differs_between_recordings_and_follows_the_seed(made_data_dir, monkeypatch):
    frames = nmnist.load_frames(nmnist.NMNIST(made_data_dir, "test"), 10)
    torch.manual_seed(0)
    plain, first = augmented(frames, monkeypatch, shift=5, drop=0.3)
    torch.manual_seed(0)
    assert torch.equal(augmented(frames, monkeypatch, shift=5, drop=0.3)[1], first)
    assert not torch.equal(augmented(frames, monkeypatch, shift=5, drop=0.3)[1], first)
    assert 0.6 < first.sum() / plain.sum() < 0.75
    centre = [(x.sum((0, 2, 3)) * torch.arange(34)).sum(-1) / x.sum((0, 2, 3, 4)) for x in (plain, first)]
    moves = (centre[1] - centre[0]).round()
    assert len(moves.unique()) > 4
    assert moves.abs().max() <= 6


def test_counts_above_255_are_kept(tmp_path):
    events = make_events(0, np.random.default_rng(0), 1000)
    events["x"], events["y"] = 5, 6
    path = make_recordings(tmp_path, 1, 1) / "NMNIST" / "Test" / "0" / "00001.bin"
    nmnist.write_recording(path, events)
    x, _ = nmnist.load_frames(nmnist.NMNIST(tmp_path, "test"), 1).batch(torch.tensor([0]))
    assert x[0, 0, 1, 6, 5] == events["p"][events["t"] < events["t"][-1]].sum()  # tonic drops the last event
    assert x.max() > 255


def test_the_cache_takes_at_most_10_kb_per_real_recording(real_data_dir):
    frames = nmnist.load_frames(nmnist.NMNIST(real_data_dir, "train"), 25)
    (path,) = (real_data_dir / "cache").glob("NMNIST_train_T25_denoise0_*.pt")
    assert path.stat().st_size / len(frames) < 10_000


def test_the_cache_is_used_until_recordings_change(tmp_path, monkeypatch):
    data_dir = make_recordings(tmp_path, 2, 1)
    first = nmnist.load_frames(nmnist.NMNIST(data_dir, "train"), 5)
    with monkeypatch.context() as patch:
        patch.setattr(nmnist, "bin_recordings", None)  # not called: from the cache
        again = nmnist.load_frames(nmnist.NMNIST(data_dir, "train"), 5)
    assert torch.equal(first.batch(torch.arange(20))[0], again.batch(torch.arange(20))[0])
    (old,) = (data_dir / "cache").iterdir()
    nmnist.write_recording(data_dir / "NMNIST" / "Train" / "0" / "00001.bin", make_events(9, np.random.default_rng(5)))
    changed = nmnist.load_frames(nmnist.NMNIST(data_dir, "train"), 5)
    assert not torch.equal(first.batch(torch.arange(1))[0], changed.batch(torch.arange(1))[0])
    assert not old.exists()


def test_changed_recordings_leave_other_caches_alone(tmp_path):
    data_dir = make_recordings(tmp_path, 2, 1)
    nmnist.load_frames(nmnist.NMNIST(data_dir, "train"), 5)
    (old,) = entries(data_dir / "cache")
    for split, time_steps, denoise in (("train", 50, None), ("train", 5, 5000), ("test", 5, None)):
        nmnist.load_frames(nmnist.NMNIST(data_dir, split), time_steps, denoise)
    (data_dir / "cache" / f"Simulated{old}").touch()  # of the other data set, which ends in the same name
    others = set(entries(data_dir / "cache")) - {old}
    assert len(others) == 4
    nmnist.write_recording(data_dir / "NMNIST" / "Train" / "0" / "00001.bin", make_events(9, np.random.default_rng(5)))
    nmnist.load_frames(nmnist.NMNIST(data_dir, "train"), 5)
    (new,) = set(entries(data_dir / "cache")) - others
    assert new != old
    assert others < set(entries(data_dir / "cache"))


def test_what_a_killed_process_left_in_the_cache_is_removed_and_not_read(tmp_path):
    data_dir = make_recordings(tmp_path, 2, 1)
    recordings = nmnist.NMNIST(data_dir, "train")
    nmnist.load_frames(nmnist.NMNIST(data_dir, "test"), 5)
    nmnist.load_frames(recordings, 5)
    test, train = sorted((data_dir / "cache").iterdir())
    train.unlink()
    (data_dir / "cache" / f".{train.stem}.tmp.pt").write_bytes(test.read_bytes())  # whole, but of other recordings
    (data_dir / "cache" / f".{train.stem[:-16]}{'0' * 16}.tmp.pt").write_bytes(b"PK")  # recordings changed since
    x, _ = nmnist.load_frames(recordings, 5).batch(torch.arange(20))
    assert torch.equal(x, torch.from_numpy(tonic_frames(recordings, 5)).float().transpose(0, 1))
    assert entries(data_dir / "cache") == [test.name, train.name]


def test_a_damaged_cache_is_rebuilt_with_a_warning(tmp_path, capsys):
    recordings = nmnist.NMNIST(make_recordings(tmp_path, 2, 1), "train")
    expected = nmnist.load_frames(recordings, 5).batch(torch.arange(20))[0].clone()
    (path,) = (tmp_path / "cache").iterdir()
    path.write_bytes(path.read_bytes()[:1000])
    assert torch.equal(nmnist.load_frames(recordings, 5).batch(torch.arange(20))[0], expected)
    assert "is damaged" in capsys.readouterr().err


def test_a_cache_with_a_flipped_bit_is_rebuilt(tmp_path, capsys):
    recordings = nmnist.NMNIST(make_recordings(tmp_path, 2, 1), "train")
    expected = nmnist.load_frames(recordings, 5)
    expected = {name: value.clone() for name, value in vars(expected).items() if isinstance(value, torch.Tensor)}
    (path,) = (tmp_path / "cache").iterdir()
    content = path.read_bytes()
    rebuilt = 0
    for index in np.random.default_rng(0).integers(0, len(content), 60):
        flipped = bytearray(content)
        flipped[index] ^= 1 << int(index) % 8
        path.write_bytes(flipped)
        frames = nmnist.load_frames(recordings, 5)
        rebuilt += "is damaged" in capsys.readouterr().err
        for name, value in expected.items():  # a bit between the tensors of a file changes nothing
            assert torch.equal(getattr(frames, name), value), name
    assert rebuilt > 5


def test_a_cache_of_another_version_is_not_used(tmp_path, monkeypatch):
    recordings = nmnist.NMNIST(make_recordings(tmp_path, 2, 1), "train")
    nmnist.load_frames(recordings, 5)
    (old,) = (tmp_path / "cache").iterdir()
    monkeypatch.setattr(nmnist, "CACHE_VERSION", nmnist.CACHE_VERSION + 1)
    nmnist.load_frames(recordings, 5)
    (new,) = (tmp_path / "cache").iterdir()
    assert new != old


def test_a_full_disk_keeps_frames_in_memory_and_leaves_no_half_simulated_data(tmp_path):
    made = make_recordings(tmp_path / "made", 2, 1)
    result = run_offline("--data_dir", made, "--time_steps", 5, preexec_fn=limit_files(3_000))
    assert result.returncode == 0, result.stderr
    assert "can't be written" in result.stderr
    assert "frames stay in memory" in result.stderr
    assert not list((made / "cache").iterdir())
    result = run_offline("--data_dir", tmp_path / "new", "--dataset", "simulated", preexec_fn=limit_files(3_000))
    assert_refused(result, "can't be written: File too large")
    assert not entries(tmp_path / "new")


def test_a_full_disk_during_extraction_is_reported_by_name(tmp_path):
    missing = min(zip_recordings(make_recordings(tmp_path, 2, 1), "Train", remove=3))
    result = run_offline("--data_dir", tmp_path, preexec_fn=limit_files(1_000))
    assert_refused(result, f"error: {missing}: ", "File too large")


def test_a_damaged_simulator_file_is_named(tmp_path):
    made = make_recordings(tmp_path, 2, 1)
    for content in (b"", b"{", b"[1]", b"\xff\xfe", b"{}"):
        (made / "NMNIST" / nmnist.SIMULATOR_FILE).write_bytes(content)
        with pytest.raises(UserError, match=r"simulator\.json is damaged"):
            _ = nmnist.NMNIST(made, "train").name


def test_frames_stay_in_memory_where_the_cache_cannot_be_written(tmp_path, capsys):
    data_dir = make_recordings(tmp_path, 2, 1)
    (data_dir / "cache").touch()  # a file where the folder would be
    recordings = nmnist.NMNIST(data_dir, "test")
    frames = nmnist.load_frames(recordings, 5)
    assert torch.equal(
        frames.batch(torch.arange(10))[0], torch.from_numpy(tonic_frames(recordings, 5)).float().transpose(0, 1)
    )
    assert "can't be written" in capsys.readouterr().err


def obey_permissions():
    """A `preexec_fn` that drops root's right to ignore file permissions (on Linux)."""
    if sys.platform == "linux":
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP; without effect for other users


@pytest.mark.parametrize("cached", [False, True])
def test_frames_stay_in_memory_where_data_dir_is_read_only(tmp_path, cached):
    data_dir = make_recordings(tmp_path, 2, 1)
    if cached:
        nmnist.load_frames(nmnist.NMNIST(data_dir, "train"), 5)
        (old,) = (data_dir / "cache").iterdir()
        recording = data_dir / "NMNIST" / "Train" / "0" / "00001.bin"
        nmnist.write_recording(recording, make_events(9, np.random.default_rng(5)))
        nmnist.load_frames(nmnist.NMNIST(data_dir, "test"), 5)
        (damaged,) = set((data_dir / "cache").iterdir()) - {old}
        damaged.write_bytes(damaged.read_bytes()[:1000])
    folders = [data_dir, *data_dir.glob("cache")]
    before = contents(data_dir)
    for folder in folders:
        folder.chmod(0o555)
    try:
        if run("test", "-w", data_dir, preexec_fn=obey_permissions).returncode == 0:
            pytest.skip("this user can write everywhere")
        result = run_offline("--data_dir", data_dir, "--time_steps", 5, preexec_fn=obey_permissions)
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("frames stay in memory") == 2
    assert ("is damaged" in result.stderr) == cached
    assert "can't be locked" not in result.stderr
    assert contents(data_dir) == before


def test_two_processes_may_build_the_cache_at_once(tmp_path):
    data_dir = make_recordings(tmp_path)
    flags = ["--data_dir", data_dir, "--time_steps", "10"]
    with start(*flags) as first, start(*flags) as second:
        for process in (first, second):
            stderr = process.communicate()[1]
            assert process.returncode == 0, stderr
    recordings = nmnist.NMNIST(data_dir, "train")
    x, _ = nmnist.load_frames(recordings, 10).batch(torch.arange(120))
    assert torch.equal(x, torch.from_numpy(tonic_frames(recordings, 10)).float().transpose(0, 1))
    assert len(os.listdir(data_dir / "cache")) == 2


def test_a_second_process_waits_for_the_lock_on_data_dir(tmp_path, capsys):
    data_dir = make_recordings(tmp_path, 2, 1)
    flags = ["--data_dir", str(data_dir), "--time_steps", "5"]
    with contextlib.ExitStack() as lock:
        lock.enter_context(utils.locked(data_dir, "data"))
        with start(*flags) as process:
            assert "waiting" in next((line for line in process.stderr if str(data_dir) in line), "")
            time.sleep(1)  # ten times what binning takes
            assert process.poll() is None
            assert not (data_dir / "cache").exists()
            lock.close()
            _, stderr = process.communicate()
            assert process.returncode == 0, stderr
    assert len(entries(data_dir / "cache")) == 2
    with utils.locked(data_dir, "data"):  # reading needs no lock
        nmnist.main(flags)
    assert "waiting" not in capsys.readouterr().err


def test_validation_is_stratified_and_fixed_by_the_seed():
    labels = torch.arange(10).repeat_interleave(torch.arange(10, 110, 10))  # 10 of digit 0, 100 of digit 9
    train, val = nmnist.split_validation(labels, 0.1, seed=3)
    assert sorted(torch.cat([train, val]).tolist()) == list(range(len(labels)))
    assert torch.bincount(labels[val]).tolist() == list(range(1, 11))
    assert torch.equal(val, nmnist.split_validation(labels, 0.1, seed=3)[1])
    assert not torch.equal(val, nmnist.split_validation(labels, 0.1, seed=4)[1])
    with pytest.raises(UserError, match="--val_split"):
        nmnist.split_validation(torch.arange(10), 0.1, seed=3)


# --- the script ------------------------------------------------------------------------------------------


def test_the_table_agrees_with_the_files(made_data_dir, capsys):
    nmnist.main(["--data_dir", str(made_data_dir), "--time_steps", "10"])
    table = {line[:24].strip(): line[24:].split() for line in capsys.readouterr().out.splitlines()}
    assert table["recordings of digit 3"] == ["12", "3"]
    assert table["recordings"] == ["120", "30"]
    assert table["events, mean"] == ["400", "400"]
    events = [nmnist.NMNIST(made_data_dir, "train")[i][0] for i in range(120)]
    on_share = np.mean([recording["p"].mean() for recording in events])
    assert table["share of ON events"][0] == f"{on_share:.1%}"
    duration = np.mean([recording["t"][-1] - recording["t"][0] for recording in events])
    assert table["duration in ms, mean"][0] == f"{duration / 1000:.0f}"
    nonzero = np.count_nonzero(tonic_frames(nmnist.NMNIST(made_data_dir, "train"), 10)) / (120 * 10 * 2312)
    assert table["non-zero bins at T = 10"][0] == f"{nonzero:.2%}"


# --- trust ------------------------------------------------------------------------------------------------


def test_files_of_other_systems_are_not_recordings(tmp_path):
    """What macOS, Windows and a half-written copy of another host leave beside recordings."""
    root = make_recordings(tmp_path, 2, 1) / "NMNIST"
    before = nmnist.NMNIST(tmp_path, "train")
    recording = (root / "Train" / "2" / "00003.bin").read_bytes()
    (root / "__MACOSX" / "Train" / "0").mkdir(parents=True)
    (root / "Train" / "__MACOSX").mkdir()
    (root / "Train" / "2" / ".AppleDouble").mkdir()
    for name in (
        *("Train/2/.00002.bin.otherhost.7.tmp.bin", "Train/2/._00003.bin", "__MACOSX/Train/0/._00001.bin"),
        *("Train/.hidden.bin", "Train/2/.AppleDouble/00001.bin"),
    ):
        (root / name).write_bytes(recording)
    for name in (".DS_Store", "Train/.DS_Store", "Train/2/.DS_Store", "Train/Thumbs.db", "Train/2/Thumbs.db"):
        (root / name).write_bytes(b"x")
    after = nmnist.NMNIST(tmp_path, "train")
    assert (after.data, after.targets) == (before.data, before.targets)
    assert len(nmnist.load_frames(after, 5)) == 20


@pytest.mark.parametrize("number", [255, 256, 32_767, 32_768, 40_000])
def test_counts_of_a_bin_are_exact(tmp_path, number):
    events = make_events(0, np.random.default_rng(0), number + 1)
    events["x"], events["y"], events["p"] = 5, 6, 1
    events["t"] = np.sort(events["t"])
    path = make_recordings(tmp_path, 1, 1) / "NMNIST" / "Test" / "0" / "00001.bin"
    nmnist.write_recording(path, events)
    x, _ = nmnist.load_frames(nmnist.NMNIST(tmp_path, "test"), 1).batch(torch.tensor([0]))
    assert x.sum() == x[0, 0, 1, 6, 5] == (events["t"] < events["t"][-1]).sum()  # tonic leaves out the last time stamp
    assert x.sum() > number - 100


@pytest.mark.parametrize(("offset", "value", "words"), [(0, 1, "encrypted"), (2, 9, "compression method")])
def test_zips_that_zipfile_cannot_extract_are_reported(tmp_path, offset, value, words):
    """A zip whose headers say that it is encrypted (flag 1) or compressed by deflate64 (method 9)."""
    contents = zip_recordings(make_recordings(tmp_path, 1, 1), "Train", remove=3)
    archive = tmp_path / "NMNIST" / "train.zip"
    content = bytearray(archive.read_bytes())
    for signature, start in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # local headers, central directory
        at = content.find(signature)
        while at >= 0:
            content[at + start + offset] = value
            at = content.find(signature, at + 4)
    archive.write_bytes(content)
    with pytest.raises(UserError, match=f"{archive} .*{words}.*extract it by another program"):
        nmnist.main(["--data_dir", str(tmp_path)])
    assert len(contents) - len(list((tmp_path / "NMNIST" / "Train").glob("*/*.bin"))) == 3


def test_only_recordings_of_our_camera_are_replaced(tmp_path, few_digits):
    root = tmp_path / "SimulatedNMNIST"
    root.mkdir()
    (root / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="SimulatedNMNIST exists, and this project did not make it: move it away"):
        nmnist.SimulatedNMNIST(tmp_path, "train")
    assert [path.name for path in root.iterdir()] == ["thesis.txt"]
    (root / "thesis.txt").rename(tmp_path / "thesis.txt")
    root.rmdir()
    nmnist.SimulatedNMNIST(tmp_path, "train")
    expected = contents(root)
    (tmp_path / "thesis.txt").rename(root / "Train" / "thesis.txt")
    simulator = json.loads((root / nmnist.SIMULATOR_FILE).read_text())
    (root / nmnist.SIMULATOR_FILE).write_text(json.dumps(simulator | {"threshold": 5}))  # an older camera's
    nmnist.SimulatedNMNIST(tmp_path, "train")
    assert contents(root) == expected | {"Train/thesis.txt": b"mine"}


def test_fingerprints_tell_contents_and_labels_but_not_dates(tmp_path):
    def fingerprint(data_dir):
        return nmnist.load_frames(nmnist.NMNIST(data_dir, "train"), 5).fingerprint

    first = fingerprint(make_recordings(tmp_path / "a", 2, 1))
    shutil.copytree(tmp_path / "a" / "NMNIST", tmp_path / "b" / "NMNIST", copy_function=shutil.copyfile)
    path = tmp_path / "b" / "NMNIST" / "Train" / "3" / "00004.bin"
    os.utime(path, (1, 1))
    assert fingerprint(tmp_path / "b") == first
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    changed = fingerprint(tmp_path / "b")
    path.write_bytes(content)
    path.rename(path.parent.parent / "4" / "00004.bin")  # relabelled
    assert len({first, changed, fingerprint(tmp_path / "b")}) == 3


# --- tonic's options --------------------------------------------------------------------------------------

OPTIONS = [{"first_saccade_only": True}, {"stabilize": True}, {"first_saccade_only": True, "stabilize": True}, {}]


def tonic_alone(data_dir, options, bin_by, time_steps):
    """Return all frames [N, T, 2, 34, 34] of the test part, made by tonic's own data set and transform."""
    bins = {"n_time_bins": time_steps} if bin_by == "time" else {"n_event_bins": time_steps}
    to_frame = tonic.transforms.ToFrame(sensor_size=tonic.datasets.NMNIST.sensor_size, **bins)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tonic.datasets.NMNIST, "_check_exists", lambda _self: True)
        recordings = tonic.datasets.NMNIST(str(data_dir), train=False, transform=to_frame, **options)
        return np.stack([recordings[i][0] for i in range(len(recordings))])


@pytest.mark.parametrize("bin_by", ["time", "events"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("real", [False, True])
def test_options_give_tonics_frames(request, real, options, bin_by):
    data_dir = request.getfixturevalue("real_data_dir" if real else "made_data_dir")
    recordings = nmnist.NMNIST(data_dir, "test", **options)
    for time_steps in (10,) if real else (1, 10):
        frames = nmnist.load_frames(recordings, time_steps, bin_by=bin_by)
        expected = torch.from_numpy(tonic_alone(data_dir, options, bin_by, time_steps)).float()
        assert expected.sum() > 0
        assert torch.equal(frames.batch(torch.arange(len(recordings)))[0], expected.transpose(0, 1))


class Mirrored(nmnist.NMNIST):
    """A user's data set: recordings seen in a mirror, or not."""

    mirrored = True

    def __getitem__(self, index):
        events, label = super().__getitem__(index)
        if self.mirrored:
            events["x"] = 33 - events["x"]
        return events, label


class Turn:
    """A transform: recordings upside down."""

    def __call__(self, events):
        events["y"] = 33 - events["y"]
        return events


def test_caches_of_other_options_and_subclasses_are_not_mixed(tmp_path):
    data_dir = make_recordings(tmp_path, 2, 1)
    (tmp_path / "Mirrored").symlink_to("NMNIST")  # tonic looks for recordings under the name of the class

    def frames(recordings, **options):
        return nmnist.load_frames(recordings, 5, **options).batch(torch.arange(10))[0].clone()

    plain, mirrored = nmnist.NMNIST(data_dir, "test"), Mirrored(data_dir, "test")
    expected = frames(plain)
    assert torch.equal(frames(mirrored), expected.flip(-1))
    mirrored.mirrored = False  # an attribute that only the user knows
    assert torch.equal(frames(mirrored), expected)
    mirrored.mirrored = True
    assert torch.equal(frames(mirrored), expected.flip(-1))
    turned = nmnist.NMNIST(data_dir, "test")
    turned.transform = Turn()
    assert torch.equal(frames(turned), expected.flip(-2))
    others = [frames(nmnist.NMNIST(data_dir, "test", **options)) for options in OPTIONS[:3]]
    others += [frames(plain, bin_by="events"), frames(plain, denoise=3000)]
    for other in others:
        assert not torch.equal(other, expected)
    assert torch.equal(frames(plain), expected)
    kept = {path.name.split("_denoise")[0] for path in (tmp_path / "cache").iterdir()}
    assert kept >= {"NMNIST_test_T5", "NMNIST_test_first_saccade_stabilized_T5", "NMNIST_test_T5_by_events"}


def test_names_tell_the_options(made_data_dir, capsys):
    recordings = nmnist.NMNIST(made_data_dir, "test", first_saccade_only=True, stabilize=True)
    assert recordings.name == "NMNIST, first saccade, stabilized"
    events, _ = recordings[0]
    assert events["t"].max() < 100_000
    nmnist.main(["--data_dir", str(made_data_dir), "--time_steps", "5", "--first_saccade_only", "--bin_by", "events"])
    assert "data set    NMNIST, first saccade in" in capsys.readouterr().out


def test_recordings_that_an_option_leaves_empty_are_refused_by_name(tmp_path):
    path = make_recordings(tmp_path, 1, 1) / "NMNIST" / "Test" / "3" / "00004.bin"
    events = make_events(3, np.random.default_rng(0))
    nmnist.write_recording(path, events[events["t"] > 150_000])
    recordings = nmnist.NMNIST(tmp_path, "test", first_saccade_only=True)
    with pytest.raises(UserError, match=f"{path} holds no events that NMNIST, first saccade keeps"):
        nmnist.load_frames(recordings, 5)


def test_labels_that_a_user_changes_are_not_taken_from_nor_left_in_the_cache(tmp_path):
    recordings = nmnist.NMNIST(make_recordings(tmp_path, 2, 1), "test")
    original = list(recordings.targets)
    recordings.targets = [label % 2 for label in original]
    assert nmnist.load_frames(recordings, 5).labels.tolist() == recordings.targets
    recordings.targets = original
    assert nmnist.load_frames(recordings, 5).labels.tolist() == original
