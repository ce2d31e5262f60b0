"""Recordings: found, downloaded, checked, simulated; frames compared with tonic's own."""

import contextlib
import ctypes
import dataclasses
import hashlib
import http.server
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
from conftest import SHARED, assert_refused, limit_files, make_events, make_recordings, run
from hypothesis import given, settings
from hypothesis import strategies as st
from tonic.io import read_mnist_file

import nmnist
from utils import UserError

NMNIST = (sys.executable, "nmnist.py")
NOWHERE = "http://127.0.0.1:9/"  # the discard port, where nothing listens
IMAGES, LABELS = nmnist.sklearn_images()


@pytest.fixture(autouse=True, scope="module")
def offline():
    """Let neither a test nor a process that it starts reach the published recordings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")
        for protocol in ("http", "https"):
            patch.setenv(f"{protocol}_proxy", NOWHERE)
        for split in nmnist.SPLITS:
            patch.setattr(tonic.datasets.NMNIST, f"{split}_url", f"{NOWHERE}{split}.zip")
        yield


def open_part(data_dir, split="test", **options):
    """Open one part of the recordings in `data_dir`."""
    (part,) = nmnist.open_recordings(data_dir, "nmnist", [split], **options)
    return part


def all_frames(recordings, *arguments, **options):
    """Return all frames [T, N, 2, 34, 34] of a part, from the cache if it holds them."""
    frames = nmnist.load_frames(recordings, *arguments, **options)
    return frames.batch(torch.arange(len(frames)))[0].clone()


def tonic_recordings(data_dir, train=False, **options):
    """Return tonic's own data set, which is told that the recordings are complete."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tonic.datasets.NMNIST, "_check_exists", lambda _self: True)
        return tonic.datasets.NMNIST(str(data_dir), train, **options)


def tonic_frames(data_dir, time_steps, denoise=None, bin_by="time", **options):
    """Return all frames [T, N, 2, 34, 34] of a part, by tonic's data set and transforms alone."""
    bins = {"time": "n_time_bins", "events": "n_event_bins"}[bin_by]
    transforms = [tonic.transforms.Denoise(denoise)] if denoise else []
    transforms += [tonic.transforms.ToFrame(sensor_size=(34, 34, 2), **{bins: time_steps})]
    transform = tonic.transforms.Compose(transforms)
    recordings = tonic_recordings(data_dir, transform=transform, **options)
    frames = np.stack([recordings[i][0] for i in range(len(recordings))])
    return torch.from_numpy(frames).float().transpose(0, 1)


def snapshot(folder):
    """Return what is in a folder, hidden or not: the bytes of each file, None for other paths."""
    paths = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*"))}
    return {name: path.read_bytes() if path.is_file() else None for name, path in paths.items()}


def listing(folder):
    """Return the sorted names of what is in a folder, hidden or not."""
    return sorted(path.name for path in folder.iterdir())


# --- Recordings -----------------------------------------------------------------------------------


def test_written_recordings_are_read_by_tonic_unchanged(tmp_path):
    events = make_events(7, np.random.default_rng(0))
    events["t"][-1] = 2**23 - 1  # the largest time that the format holds
    nmnist.write_recording(tmp_path / "x.bin", events)
    read = read_mnist_file(tmp_path / "x.bin", dtype=tonic.datasets.NMNIST.dtype)
    np.testing.assert_array_equal(read, events)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "damaged"),
        (b"\x01\x02\x80\x00", "damaged"),
        (b"\x40\x02\x80\x00\x00" * 3, "outside the 34 x 34 pixels"),
        (b"\x01\x02\x80\x01\x00" + b"\x01\x02\x80\x00\x00", "run backwards"),
        (b"\x01\xf0\x80\x00\x00", "no events"),  # only a time stamp overflow
        (None, "No such file"),
    ],
)
def test_bad_recordings_are_refused_by_name(tmp_path, content, words):
    bad = make_recordings(tmp_path, 2, 1) / "NMNIST" / "Train" / "4" / "00005.bin"
    bad.unlink()
    bad.symlink_to("nowhere") if content is None else bad.write_bytes(content)
    with pytest.raises((UserError, OSError), match=f"{words}.*{bad}|{bad} .*{words}"):
        nmnist.main(["--data_dir", str(tmp_path), "--time_steps", "5"])
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("examples", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_bytes_are_refused_by_name_or_are_recordings(tmp_path, examples):
    recordings = open_part(make_recordings(tmp_path, 1, 1))
    path = recordings.files[3]
    whole = path.read_bytes()
    byte, place = st.integers(0, 255), st.integers(0, 40)
    event = st.tuples(place, place, byte, byte, st.integers(0, 9))
    events = st.lists(event, max_size=8).map(lambda rows: bytes(sum(rows, ())))
    cut = st.integers(0, len(whole)).map(lambda size: whole[:size])

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(st.one_of(st.binary(max_size=60), events, cut))
    def check(content):
        path.write_bytes(content)
        good = len(content) > 0 and len(content) % 5 == 0
        if good:
            expected = read_mnist_file(path, dtype=tonic.datasets.NMNIST.dtype)
            x, y, t = (expected[axis].tolist() for axis in "xyt")
            good = len(t) > 0 and max(*x, *y) < 34 and t == sorted(t)
        if good:
            np.testing.assert_array_equal(recordings[3][0], expected)
        else:
            with pytest.raises(UserError, match=f"{path} is damaged"):
                recordings[3]

    check()


# --- Finding the data set -------------------------------------------------------------------------


def put(part, place):
    """Move a part to `place`: a folder, or a zip, with a colon before the folder inside it."""
    path, _, inside = str(place).partition(":")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if not path.lower().endswith(".zip"):
        part.rename(path)
        return
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(part.glob("*/*.bin")):
            archive.write(file, Path(inside) / file.relative_to(part))
        archive.writestr("__MACOSX/0/._00001.bin", b"macOS")
    shutil.rmtree(part)


def by_label(files):
    """Return the bytes of recordings by their folder's name and their own."""
    return {(path.parent.name, path.name): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("NMNIST/Train", "NMNIST/Test"),
        ("Train", "Test"),
        ("N-MNIST, unpacked/train", "N-MNIST, unpacked/TEST"),
        ("NMNIST/Train/Train", "NMNIST/test/TEST"),
        ("train.zip:Train", "test.zip:Test"),  # as published
        ("NMNIST/Train.ZIP:", "NMNIST/TEST.zip:test"),
        ("NMNIST/Train", "NMNIST/test.zip:Test"),
    ],
)
def test_recordings_are_found(tmp_path, capsys, train, test):
    made, data_dir = make_recordings(tmp_path / "made", 2, 1) / "NMNIST", tmp_path / "data"
    expected = [by_label((made / part).glob("*/*.bin")) for part in ("Train", "Test")]
    put(made / "Train", data_dir / train)
    put(made / "Test", data_dir / test)
    for _ in range(2):  # the second time, without the zips
        capsys.readouterr()
        parts = nmnist.open_recordings(data_dir, "auto")
        assert [by_label(part.files) for part in parts] == expected
        for part in parts:
            assert part.labels == [int(path.parent.name) for path in part.files]
            assert (part.name, part.source) == ("NMNIST", "nmnist")
            assert not [name for name in listing(part.folder.parent) if name.startswith(".")]
        first, second = capsys.readouterr().out.splitlines()
        assert first == f"data set    NMNIST, train: 20 of 60,000 recordings in {parts[0].folder}"
        assert second == f"data set    NMNIST, test: 10 of 10,000 recordings in {parts[1].folder}"
        for path in [path for path in data_dir.rglob("*") if path.suffix.lower() == ".zip"]:
            path.unlink()


def test_files_of_other_systems_are_not_recordings(tmp_path):
    """What macOS, Windows and an unfinished copy leave beside recordings."""
    root = make_recordings(tmp_path, 2, 1) / "NMNIST"
    before = open_part(tmp_path, "train").files
    for name in (
        *("__MACOSX/Train/0/._00001.bin", "Train/__MACOSX/0/1.bin", "Train/2/.AppleDouble/1.bin"),
        *("Train/2/._00003.bin", "Train/2/.00002.bin.x7Yk2", "Train/.hidden.bin"),
        *(".DS_Store", "Train/.DS_Store", "Train/2/.DS_Store", "Train/2/Thumbs.db", "desktop.ini"),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(before[0].read_bytes())
    assert open_part(tmp_path, "train").files == before


def test_one_part_is_enough_where_only_that_is_asked_for(tmp_path):
    root = make_recordings(tmp_path, 2, 1) / "NMNIST"
    put(root / "Test", root / "test.zip:Test")
    shutil.rmtree(root / "Train")
    (test,) = nmnist.open_recordings(tmp_path, "auto", ["test"])
    assert (test.split, len(test)) == ("test", 10)
    (root / "train.zip").write_bytes(b"which is not opened")
    data = load_data(tmp_path, splits=["test"])
    assert (data.train, len(data.test)) == (None, 10)
    assert data.test_files == [f"{digit}/{digit + 1:05d}.bin" for digit in range(10)]


@pytest.mark.parametrize(
    ("commands", "words"),  # in a data_dir of 10 training recordings and 1 test one a digit
    [
        ("cp -r NMNIST old", "several data sets .*NMNIST, .*old"),
        ("mkdir b; mv NMNIST/Test b", "several data sets .*NMNIST, .*b"),
        ("mv NMNIST/Test .", "several data sets"),
        ("cp -r NMNIST/Train NMNIST/train", "holds Train and train"),
        ("cd NMNIST; rm -r Train; touch train.zip Train.zip", r"holds Train\.zip and train\.zip"),
        ("cp -r NMNIST/Train b; mv b NMNIST/Train/Train", "NMNIST/Train"),
        ("rm -r NMNIST/Train", "NMNIST has no train part"),
        ("mv NMNIST/Test NMNIST/Testing", "NMNIST has no test part"),
        ("cd NMNIST; mv Train Training; mv Test Testing", r"holds \S+/T\w+ing/\S+\.bin, but not"),
        ("mv NMNIST/Train/* NMNIST; rm -r NMNIST/T*", r"holds \S+/NMNIST/\d/\d+\.bin, but not"),
        ("mv NMNIST/Train/* .; rm -r NMNIST", r"holds \S+/\d/\d+\.bin, but not"),
        ("mv NMNIST/Train/0/* .; rm -r NMNIST", r"holds \S+/\d+\.bin, but not"),
        ("mkdir a; mv NMNIST a", r"holds \S+/a/NMNIST/T\w+/\d/\d+\.bin, but not"),
        ("mkdir a; mv NMNIST a; mv a NMNIST", r"holds \S+/NMNIST/NMNIST/\S+\.bin, but not"),
        ("rm -r NMNIST; ln -s unmounted NMNIST", "/NMNIST"),
        ("rm -r NMNIST/Train/6", "Train/6 holds nothing"),
        ("rm -r NMNIST/Test/6/*", "Test/6 holds nothing"),
        ("cd NMNIST/Train/6; for n in 0*[1-9]7.bin; do mv $n $n.BIN; done", "BIN .9 of 10 files"),
        ("for n in NMNIST/*/*/*; do mv $n ${n%bin}npy; done", "00001.npy .10 of 10 files"),
        ("gzip -k NMNIST/Train/0/00001.bin", "Train/0 holds 00001.bin.gz .1 of 11 files"),
        ("mkdir NMNIST/Train/0/1", "Train/0 holds 1 .1 of 11 files"),
        ("mkdir NMNIST/Train/x", "Train/x is no digit"),
        ("mv NMNIST/Train/9 NMNIST/Train/12", "Train/12 is no digit"),
        ("cp NMNIST/Train/0/00001.bin NMNIST/Train/1.bin", "Train/1.bin is no digit"),
        ("cp NMNIST/Train/0/00001.bin NMNIST/Train/1.BIN", "Train/1.BIN is no digit"),
    ],
)
def test_what_is_nearly_a_data_set_is_refused_in_one_line(tmp_path, commands, words):
    make_recordings(tmp_path, 10, 1)
    subprocess.run(commands, shell=True, cwd=tmp_path, check=True)
    before = snapshot(tmp_path)
    for dataset in ("auto", "nmnist"):
        with pytest.raises(UserError, match=words) as error:
            nmnist.open_recordings(tmp_path, dataset)
        assert "downloaded" not in str(error.value)
        assert "\n" not in str(error.value)
        assert snapshot(tmp_path) == before  # neither simulated recordings nor a download


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-500],
        lambda content: content[:1000] + b"flipped bits" + content[1012:],
        lambda content: content.replace(b"\x14\0\0\0\x08\0", b"\x14\0\x01\0\x08\0"),  # encrypted
        lambda content: content.replace(b"\x14\0\0\0\x08\0", b"\x14\0\0\0\x09\0"),  # deflate64
        lambda _: b"<html>not found</html>",
        lambda _: b"PK\x05\x06" + bytes(18),  # a zip of no files
    ],
    ids=["cut", "flipped", "encrypted", "deflate64", "text", "empty"],
)
def test_a_zip_that_cannot_be_extracted_is_named_and_leaves_nothing(tmp_path, damage):
    archive = make_recordings(tmp_path, 2, 1) / "NMNIST" / "train.zip"
    put(archive.with_name("Train"), f"{archive}:Train")
    archive.write_bytes(damage(archive.read_bytes()))
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=f"{archive} can't be extracted"):
        nmnist.open_recordings(tmp_path, "auto")
    assert snapshot(tmp_path) == before


# --- Download -------------------------------------------------------------------------------------


@contextlib.contextmanager
def serve(files, faulty=None, fault=None):
    """Serve N-MNIST's zips on the loopback address, one with a fault; yield the names asked for."""
    asked = set()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.strip("/")
            asked.add(name)
            wrong, content = fault if name == faulty else None, files[name]
            if wrong == "missing":
                self.send_error(404)
                return
            if wrong == "silent":
                time.sleep(3)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            part = {"cut": 0.5, "stalled": 0.5, "other content": 0}.get(wrong, 1)
            self.wfile.write(content[: int(part * len(content))])
            if wrong == "other content":
                self.wfile.write(bytes(len(content)))
            if wrong == "stalled":
                time.sleep(3)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        for split in nmnist.SPLITS:
            url = f"http://127.0.0.1:{server.server_port}/{split}.zip"
            patch.setattr(tonic.datasets.NMNIST, f"{split}_url", url)
        yield asked
    server.shutdown()
    server.server_close()


@pytest.fixture
def published(tmp_path_factory, monkeypatch):
    """The zips of a small data set, by file name, whose md5 sums tonic knows."""
    root = make_recordings(tmp_path_factory.mktemp("published"), 2, 1) / "NMNIST"
    files = {}
    for split in nmnist.SPLITS:
        put(root / split.capitalize(), root / f"{split}.zip:{split.capitalize()}")
        files[f"{split}.zip"] = content = (root / f"{split}.zip").read_bytes()
        monkeypatch.setattr(tonic.datasets.NMNIST, f"{split}_md5", hashlib.md5(content).hexdigest())
    return files


def test_missing_recordings_are_downloaded_once(tmp_path, published):
    with serve(published) as asked:
        parts = nmnist.open_recordings(tmp_path, "auto")
        assert asked == {"train.zip", "test.zip"}
        asked.clear()
        nmnist.open_recordings(tmp_path, "auto")
        assert not asked
    assert [part.name for part in parts] == ["NMNIST", "NMNIST"]
    assert listing(tmp_path) == ["NMNIST"]
    expected = make_recordings(tmp_path / "made", 2, 1) / "NMNIST"
    assert snapshot(tmp_path / "NMNIST") == snapshot(expected)


@pytest.mark.parametrize(
    ("faulty", "fault", "words"),
    [
        ("train.zip", "other content", "corrupted"),
        ("train.zip", "cut", "corrupted"),
        ("test.zip", "stalled", "timed out"),
        ("train.zip", "silent", "timed out"),
        ("test.zip", "missing", "404"),
    ],
)
def test_a_failed_download_leaves_nothing_visible_and_is_completed(
    tmp_path, published, faulty, fault, words
):
    before = socket.getdefaulttimeout()
    with (
        serve(published, faulty, fault),
        pytest.raises(UserError, match=rf"N-MNIST can't be downloaded \(.*{words}"),
    ):
        nmnist.download(tmp_path, silent_seconds=1)
    assert socket.getdefaulttimeout() == before
    assert all(name.startswith(".") for name in listing(tmp_path))
    with serve(published) as asked:  # a zip that was finished is kept
        assert len(open_part(tmp_path)) == 10
        assert asked == {faulty, "test.zip"}
    assert listing(tmp_path) == ["NMNIST"]


def test_dataset_nmnist_does_not_fall_back_to_simulated(tmp_path):
    with pytest.raises(UserError, match=r"no N-MNIST in .*Connection refused") as error:
        nmnist.main(["--data_dir", str(tmp_path), "--dataset", "nmnist"])
    assert nmnist.HOMEPAGE in str(error.value)
    assert not any(snapshot(tmp_path).values())


# --- Simulation -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """The result of `python nmnist.py` without network, and its data_dir."""
    data_dir = tmp_path_factory.mktemp("simulated")
    return run(*NMNIST, "--data_dir", data_dir, "--time_steps", "10"), data_dir


def few_images(per_digit):
    """Return the first images of each of scikit-learn's digits."""
    first = np.concatenate([np.flatnonzero(digit == LABELS)[:per_digit] for digit in range(10)])
    return IMAGES[first], LABELS[first]


def generators(number):
    """Return the generators of a number of recordings."""
    return [np.random.default_rng(i) for i in range(number)]


def test_dataset_auto_falls_back_to_simulated_with_a_warning(simulated):
    result, data_dir = simulated
    assert result.returncode == 0, result.stderr
    for words in ("WARNING: no N-MNIST in", "Connection refused", "SIMULATED", nmnist.HOMEPAGE):
        assert words in result.stderr
    for split, number in (("train", "1,437"), ("test", "360")):
        folder = data_dir / "SimulatedNMNIST" / split.capitalize()
        assert f"SimulatedNMNIST, {split}: {number} recordings in {folder}\n" in result.stdout
    assert {*listing(data_dir)} - {".download"} == {"SimulatedNMNIST", "cache"}


def test_simulated_recordings_are_stratified_and_read_by_tonic(simulated):
    root, names = simulated[1] / "SimulatedNMNIST", set()
    for folder, number in (("Train", 1437), ("Test", 360)):
        files = list((root / folder).glob("*/*.bin"))
        names |= {path.name for path in files}
        assert len(files) == number
        labels = [int(path.parent.name) for path in files]
        assert np.bincount(labels).min() > 0.9 * number / 10
        assert labels == [LABELS[int(path.stem) - 1] for path in files]  # names count from 1
        for path in files[:20]:
            events = read_mnist_file(path, dtype=tonic.datasets.NMNIST.dtype)
            assert 500 < len(events) < 10_000
            assert (np.diff(events["t"]) >= 0).all()
            assert events["t"].max() < 320_000
    assert len(names) == 1797


def test_simulated_recordings_keep_their_name_in_another_folder(simulated, tmp_path):
    (tmp_path / "NMNIST").symlink_to(simulated[1] / "SimulatedNMNIST")
    assert open_part(tmp_path).name == "SimulatedNMNIST"
    path = make_recordings(tmp_path / "made", 1, 1) / "NMNIST" / nmnist.SIMULATOR_FILE
    for content in (b"", b"{", b"[1]", b"\xff\xfe", b"{}"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{path} is damaged"):
            open_part(tmp_path / "made")


def test_simulated_recordings_of_another_camera_are_not_used(simulated, tmp_path):
    root = tmp_path / "SimulatedNMNIST"
    (make_recordings(tmp_path, 1, 1) / "NMNIST").rename(root)
    camera = json.loads((simulated[1] / root.name / nmnist.SIMULATOR_FILE).read_text())
    for content in (camera | {"threshold": 5}, camera | {"seed": 1}, {}, None):
        (root / nmnist.SIMULATOR_FILE).write_text(json.dumps(content))
        before = snapshot(tmp_path)
        with pytest.raises(UserError, match=f"{root} was not made by this version.*move it away"):
            nmnist.open_recordings(tmp_path, "simulated")
        assert snapshot(tmp_path) == before


def test_a_square_gives_events_on_the_path_of_the_saccades_and_off_where_it_arrives():
    image = np.zeros((28, 28), np.uint8)
    image[12:16, 12:16] = 255  # in the middle
    (events,) = nmnist.simulate_events(image[None], generators(1))
    for ms in (45, 150, 255):
        near = events[np.abs(events["t"] - 1000 * ms) < 10_000]
        y, x = nmnist.saccade_offsets(np.array([ms]))[0] + 16.5
        assert near["y"].mean() == pytest.approx(y, abs=1)
        assert near["x"].mean() == pytest.approx(x, abs=1)
    down = events[(events["t"] > 20_000) & (events["t"] < 80_000)]  # the first saccade
    off, on = (np.median(down["y"][down["p"] == p]) for p in (0, 1))
    assert off > on + 1  # its lower edge arrives, its upper edge leaves


def test_pixels_keep_the_refractory_period(monkeypatch):
    camera = dataclasses.replace(nmnist.CAMERA, noise_on=0, noise_off=0)  # which do not keep it
    monkeypatch.setattr(nmnist, "CAMERA", camera)
    for events in nmnist.simulate_events(few_images(1)[0], generators(10)):
        pixel = events["y"] * 34 + events["x"]
        order = np.lexsort((events["t"], pixel))
        gaps = np.diff(events["t"][order])[np.diff(pixel[order]) == 0]
        assert len(gaps) > 500
        assert gaps.min() > 1000 * camera.refractory * (1 - 3 * camera.speed_spread)


def test_a_blank_image_gives_only_noise():
    camera = nmnist.CAMERA
    recordings = nmnist.simulate_events(np.zeros((20, 28, 28), np.uint8), generators(20))
    expected = (camera.noise_on + camera.noise_off) * 34 * 34 * camera.duration
    mean = np.mean([len(events) for events in recordings])
    assert mean == pytest.approx(expected, abs=4 * np.sqrt(expected / 20))


def test_simulated_recordings_match_real_ones_of_the_same_images():
    if not (SHARED / "mnist.npz").is_file():
        pytest.skip(f"no real recordings in {SHARED}")
    real, images, ids = benchmark.load_real(SHARED)
    chosen = np.random.default_rng(0).permutation(800)[:100]
    noise = [np.random.default_rng([0, ids[i]]) for i in chosen]
    simulated = list(nmnist.simulate_events(images[chosen], noise))
    rows = benchmark.compare(simulated, [real[i] for i in chosen])
    assert len(rows) == 8
    assert [row for row in rows if not row[3]] == []
    # The comparison is not blind: recordings of other images do not match.
    wrong = benchmark.compare(simulated, [real[i] for i in np.roll(chosen, 1)])
    assert not wrong[0][3]
    assert not wrong[4][3]


def save_images(path, per_digit=2, **changes):
    """Write scikit-learn's digits to an .npz, with some arrays changed (None: left out)."""
    images, labels = few_images(per_digit)
    arrays = {"train_images": images, "train_labels": labels}
    arrays |= {"test_images": images[::2], "test_labels": labels[::2]} | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def simulate(images, data_dir, *flags):
    """Record images as `python nmnist.py --simulate` does."""
    nmnist.main(["--simulate", str(images), "--data_dir", str(data_dir), *flags])


def test_labelled_images_are_recorded_and_the_seed_sets_the_noise(tmp_path, monkeypatch, capsys):
    archive = save_images(tmp_path / "images.npz", per_digit=13)  # more than one batch
    results = []
    for name, batch_size, seed in (("a", 64, "0"), ("b", 7, "0"), ("c", 64, "1")):
        monkeypatch.setattr(nmnist, "SIM_BATCH_SIZE", batch_size)  # changes no recording
        simulate(archive, tmp_path / name, "--seed", seed)
        assert "195 recordings" in capsys.readouterr().out
        results.append(snapshot(tmp_path / name / "NMNIST"))
    assert results[0] == results[1]
    assert results[0].keys() == results[2].keys()
    assert results[0]["Train/0/00001.bin"] != results[2]["Train/0/00001.bin"]
    assert results[0]["Train/0/00001.bin"] != results[0]["Test/0/00001.bin"]  # the same image
    train, test = nmnist.open_recordings(tmp_path / "a", "nmnist")
    assert (train.name, len(train), len(test)) == ("SimulatedNMNIST (images.npz)", 130, 65)
    _, labels = few_images(13)
    assert train.labels == [labels[int(path.stem) - 1] for path in train.files]
    with pytest.raises(UserError, match="NMNIST holds recordings: choose another --data_dir"):
        simulate(archive, tmp_path / "a")
    assert snapshot(tmp_path / "a" / "NMNIST") == results[0]


BLANK, DIGITS = np.zeros((10, 28, 28), np.uint8), np.arange(10)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_images": BLANK[:, :27]}, "train_images must be uint8 [N, 28, 28]"),
        ({"train_images": BLANK.astype(float)}, "train_images must be"),
        ({"train_images": BLANK[0]}, "train_images must be"),
        ({"train_images": BLANK[0, 0, 0]}, "train_images must be"),
        ({"train_images": BLANK[:0], "train_labels": DIGITS[:0]}, "train_images must be"),
        ({"test_labels": DIGITS[:4]}, "test_labels [N] whole numbers, all digits from 0 to 9"),
        ({"test_labels": DIGITS / 2}, "test_labels [N]"),
        ({"test_labels": DIGITS[:, None]}, "test_labels [N]"),
        ({"test_labels": DIGITS.astype(str)}, "test_labels [N]"),
        ({"test_labels": DIGITS + 1}, "test_labels [N]"),
        ({"test_labels": DIGITS - 1}, "test_labels [N]"),
        ({"test_labels": DIGITS // 2 * 2}, "test_labels [N]"),
        ({"test_images": None}, "test_images must be"),
        ({"train_images": None}, "train_images must be"),
        ({"train_labels": None}, "train_labels [N]"),
        ({"train_labels": np.array([None] * 10)}, "can't be read"),  # a pickle, which may run code
    ],
)
def test_wrong_images_are_refused_and_nothing_written(tmp_path, changes, words):
    archive = save_images(tmp_path / "images.npz", **changes)
    with pytest.raises(UserError, match=re.escape(words)) as error:
        simulate(archive, tmp_path / "out")
    assert str(archive) in str(error.value)
    assert not (tmp_path / "out").exists()


def test_files_that_are_not_npz_are_refused(tmp_path):
    (tmp_path / "images.npz").write_text("hello")
    np.save(tmp_path / "array.npy", BLANK)
    for name in ("images.npz", "missing.npz", "", "array.npy"):
        with pytest.raises(UserError, match=rf"{tmp_path / name} can't be read as a \.npz file"):
            simulate(tmp_path / name, tmp_path)
    assert listing(tmp_path) == ["array.npy", "images.npz"]


# --- Frames ---------------------------------------------------------------------------------------

CASES = [  # (time_steps, options of the frames, options of the recordings)
    *((time_steps, {}, {}) for time_steps in (1, 10, 25, 40)),
    (25, {"denoise": 5000}, {"first_saccade_only": True}),
    (25, {}, {"first_saccade_only": True}),
    (1, {}, {"stabilize": True}),
    (10, {}, {"first_saccade_only": True, "stabilize": True}),
    (1, {"bin_by": "events"}, {}),
    (10, {"bin_by": "events"}, {}),
    (10, {"bin_by": "events"}, {"first_saccade_only": True}),
    (10, {"bin_by": "events"}, {"stabilize": True}),
    (10, {"bin_by": "events", "denoise": 9000}, {"first_saccade_only": True, "stabilize": True}),
]


@pytest.mark.parametrize("source", ["made_data_dir", "real_data_dir"])
@pytest.mark.parametrize(("time_steps", "of_frames", "of_recordings"), CASES)
def test_batches_are_tonics_frames(request, source, time_steps, of_frames, of_recordings, device):
    data_dir = request.getfixturevalue(source)
    expected = tonic_frames(data_dir, time_steps, **of_frames, **of_recordings)
    assert expected.sum() > (100_000 if source == "real_data_dir" else 1000)
    targets = tonic_recordings(data_dir).targets
    recordings = open_part(data_dir, **of_recordings)
    frames = nmnist.load_frames(recordings, time_steps, **of_frames).to(device)
    assert (len(frames), frames.time_steps) == (expected.shape[1], time_steps)
    order = torch.randperm(len(frames), generator=torch.Generator().manual_seed(0))
    for indices, (x, labels) in zip(order.split(32), frames.batches(order, 32), strict=True):
        assert x.device.type == labels.device.type == device.type
        assert torch.equal(x.cpu(), expected[:, indices])
        assert labels.tolist() == [targets[i] for i in indices]


def test_bfloat16_batches_are_equal_and_channels_last(made_data_dir, device):
    frames = nmnist.load_frames(open_part(made_data_dir), 10).to(device)
    indices = torch.tensor([4, 0, 29])
    x, _ = frames.batch(indices, torch.bfloat16)
    assert x.dtype == torch.bfloat16
    assert torch.equal(x.float(), frames.batch(indices)[0])
    assert x.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("number", [127, 128, 255, 256, 32_767, 32_768, 40_000])
def test_counts_of_a_bin_are_exact(tmp_path, number):
    events = make_events(0, np.random.default_rng(0), number + 1)
    events["x"], events["y"], events["p"] = 5, 6, 1
    events["t"][-1] += 1  # tonic leaves out the last time stamp
    nmnist.write_recording(make_recordings(tmp_path, 1, 1) / "NMNIST/Test/0/00001.bin", events)
    x = all_frames(open_part(tmp_path), 1)[:, 0]
    assert x.sum() == x[0, 1, 6, 5] == number


def test_recordings_without_events_are_blank_counted_and_told(tmp_path, capsys):
    path = make_recordings(tmp_path, 1, 1) / "NMNIST" / "Test" / "3" / "00004.bin"
    events = make_events(3, np.random.default_rng(0))
    nmnist.write_recording(path, events[events["t"] > 150_000])
    frames = nmnist.load_frames(open_part(tmp_path, first_saccade_only=True), 5)
    assert frames.num_blank == 1
    assert "WARNING: 1 of 10 test recordings have no event in any" in capsys.readouterr().err
    sums = frames.batch(torch.arange(10))[0].sum((0, 2, 3, 4))
    assert (sums == 0).tolist() == [digit == 3 for digit in range(10)]
    nmnist.main(["--data_dir", str(tmp_path), "--time_steps", "5", "--first_saccade_only"])
    output = capsys.readouterr()
    assert "data set    NMNIST, first saccade, test: 10 of 10,000 recordings" in output.out
    assert re.search(r"^blank recordings +0 +1$", output.out, re.MULTILINE)
    assert "WARNING: 1 of 10 test recordings" in output.err  # from the cache, too


# --- The cache of frames --------------------------------------------------------------------------


def test_the_cache_takes_at_most_10_kb_per_real_recording(real_data_dir):
    frames = nmnist.load_frames(open_part(real_data_dir, "train"), 25)
    (path,) = (real_data_dir / "cache").glob("*_train_T25_*")
    assert path.stat().st_size / len(frames) < 10_000


@pytest.mark.parametrize(("time_steps", "of_frames", "of_recordings"), CASES)
def test_a_recording_of_ones_own_becomes_the_frames_of_the_training(
    made_data_dir, time_steps, of_frames, of_recordings
):
    expected = tonic_frames(made_data_dir, time_steps, **of_frames, **of_recordings)
    settings = {"denoise": None, "bin_by": "time", "first_saccade_only": False, "stabilize": False}
    settings |= {"time_steps": time_steps} | of_frames | of_recordings
    for i, (events, _) in enumerate(tonic_recordings(made_data_dir)):
        before = events.copy()
        assert torch.equal(nmnist.to_frames(events, settings)[:, 0], expected[:, i])
        np.testing.assert_array_equal(events, before)


def test_a_recording_without_events_in_the_first_saccade_is_blank(tmp_path, capsys):
    path = make_recordings(tmp_path, 1, 1) / "NMNIST" / "Test" / "3" / "00004.bin"
    events = make_events(3, np.random.default_rng(0))
    nmnist.write_recording(path, events[events["t"] >= 100_000])
    nmnist.main(["--data_dir", str(tmp_path), "--first_saccade_only", "--denoise", "100000"])
    output = capsys.readouterr()
    assert "1 of 10 test recordings have no event in any frame" in output.err
    assert re.search(r"^blank recordings +0 +1$", output.out, re.MULTILINE)


def test_the_cache_is_used_until_a_recording_changes(tmp_path):
    path = make_recordings(tmp_path, 2, 1) / "NMNIST" / "Test" / "0" / "00001.bin"
    first = all_frames(open_part(tmp_path), 5)
    content, status = path.read_bytes(), path.stat()
    path.write_bytes(bytes(len(content)))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # seen by who reads it alone
    assert torch.equal(all_frames(open_part(tmp_path), 5), first)
    nmnist.write_recording(path, make_events(9, np.random.default_rng(5)))
    assert not torch.equal(all_frames(open_part(tmp_path), 5), first)
    assert torch.equal(all_frames(open_part(tmp_path), 5), tonic_frames(tmp_path, 5))
    path.with_name("00002.bin").write_bytes(content)  # one more
    assert torch.equal(all_frames(open_part(tmp_path), 5), tonic_frames(tmp_path, 5))


def test_caches_of_other_options_and_parts_are_not_mixed(tmp_path):
    make_recordings(tmp_path, 1, 1)
    for _ in range(2):  # binned, then from the cache
        for time_steps, of_frames, of_recordings in CASES:
            frames = all_frames(open_part(tmp_path, **of_recordings), time_steps, **of_frames)
            expected = tonic_frames(tmp_path, time_steps, **of_frames, **of_recordings)
            assert torch.equal(frames, expected)
        train = all_frames(open_part(tmp_path, "train"), 10)
        assert torch.equal(train, tonic_frames(tmp_path, 10, train=True))
    assert len(listing(tmp_path / "cache")) == len(CASES) + 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda content, _other: content[: len(content) // 2],
        lambda content, _other: np.random.default_rng(0).bytes(len(content)),
        lambda _content, _other: b"",
        lambda _content, other: other,
    ],
    ids=["cut", "random bytes", "empty", "frames of another shape"],
)
def test_a_cache_that_cannot_be_read_is_named_and_binned_again(tmp_path, capsys, damage):
    recordings = open_part(make_recordings(tmp_path, 2, 1))
    expected = all_frames(recordings, 5)
    (path,) = (tmp_path / "cache").iterdir()
    nmnist.load_frames(recordings, 6)
    (other,) = set((tmp_path / "cache").iterdir()) - {path}
    path.write_bytes(damage(path.read_bytes(), other.read_bytes()))
    capsys.readouterr()
    assert torch.equal(all_frames(recordings, 5), expected)
    assert f"WARNING: cache {path} can't be read" in capsys.readouterr().err
    assert torch.equal(all_frames(recordings, 5), expected)
    assert "WARNING" not in capsys.readouterr().err


def test_a_cache_of_another_version_is_not_read(tmp_path, monkeypatch, capsys):
    recordings = open_part(make_recordings(tmp_path, 2, 1))
    expected = all_frames(recordings, 5)
    (old,) = (tmp_path / "cache").iterdir()
    old.write_bytes(b"what only that version can read")
    monkeypatch.setattr(nmnist, "CACHE_VERSION", nmnist.CACHE_VERSION + 1)
    capsys.readouterr()
    assert torch.equal(all_frames(recordings, 5), expected)
    assert "WARNING" not in capsys.readouterr().err


def obey_permissions():
    """A `preexec_fn` that drops root's right to ignore file permissions (on Linux)."""
    if sys.platform == "linux":
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


def test_frames_stay_in_memory_where_data_dir_is_read_only(tmp_path):
    make_recordings(tmp_path, 2, 1)
    before = snapshot(tmp_path)
    tmp_path.chmod(0o555)
    try:
        if run("test", "-w", tmp_path, preexec_fn=obey_permissions).returncode == 0:
            pytest.skip("this user can write everywhere")
        result = run(*NMNIST, "--data_dir", tmp_path, preexec_fn=obey_permissions)
    finally:
        tmp_path.chmod(0o755)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("can't be written (Permission denied): frames stay in memory") == 2
    assert snapshot(tmp_path) == before


def test_a_full_disk_keeps_frames_in_memory_and_leaves_no_half_simulated_data(tmp_path):
    made, new = make_recordings(tmp_path / "made", 2, 1), tmp_path / "new"
    code = (
        f"import nmnist, utils; nmnist.main(['--data_dir', {str(made)!r}]); "
        f"flags = ['--data_dir', {str(new)!r}, '--dataset', 'simulated']; "
        "utils.run_script(lambda: nmnist.main(flags))"
    )
    result = run(sys.executable, "-c", code, preexec_fn=limit_files(3_000))
    assert result.stderr.count("frames stay in memory") == 2, result.stderr
    assert listing(made / "cache") == []
    assert listing(new) == []
    assert_refused(result, "File too large", str(new))


def test_a_killed_process_leaves_nothing_that_is_read(tmp_path):
    """It is killed when its files are complete, but not yet renamed."""
    archive = save_images(tmp_path / "images.npz")
    make_recordings(tmp_path / "made", 2, 1)
    code = (
        "import os, pathlib, sys, nmnist\n"
        "at = (os, 'replace', sys.argv[1:5]), (pathlib.Path, 'rename', sys.argv[5:])\n"
        "for owner, name, flags in at:\n"
        "    if os.fork() == 0:\n"
        "        setattr(owner, name, lambda *_: os.kill(os.getpid(), 9))\n"
        "        nmnist.main(flags)\n"
        "    assert os.waitstatus_to_exitcode(os.wait()[1]) == -9\n"
    )
    flags = ["--data_dir", tmp_path / "made", "--time_steps", "5"]
    flags += ["--data_dir", tmp_path / "new", "--simulate", archive]
    result = run(sys.executable, "-c", code, *flags)
    assert result.returncode == 0, result.stderr
    for folder in (tmp_path / "made" / "cache", tmp_path / "new"):
        assert any(snapshot(folder).values())  # it was killed late
        assert all(name.startswith(".") for name in listing(folder))
    frames = all_frames(open_part(tmp_path / "made", "train"), 5)
    assert torch.equal(frames, tonic_frames(tmp_path / "made", 5, train=True))
    simulate(archive, tmp_path / "new")
    simulate(archive, tmp_path / "other")
    assert snapshot(tmp_path / "new" / "NMNIST") == snapshot(tmp_path / "other" / "NMNIST")


# --- Augmentation ---------------------------------------------------------------------------------


def augmented(frames, monkeypatch, draws=None, **limits):
    """Return all frames, plain and augmented; `draws` (0 to 1) replaces all random numbers."""
    nothing = {"shift": 0, "rotation": 0, "scale": 0, "shear": 0, "time_shift": 0, "drop": 0}
    monkeypatch.setattr(nmnist, "AUGMENTATION", nmnist.Augmentation(**(nothing | limits)))
    with monkeypatch.context() as patch:
        if draws is not None:
            patch.setattr(torch, "rand", lambda *size, **kw: torch.full(size, draws, **kw))
        indices = torch.arange(len(frames))
        return frames.batch(indices)[0].cpu(), frames.batch(indices, augment=True)[0].cpu()


def test_augmentation_rotates_shifts_shears_and_scales(made_data_dir, monkeypatch, device):
    frames = nmnist.load_frames(open_part(made_data_dir), 10).to(device)
    assert torch.equal(*augmented(frames, monkeypatch))  # with limits of zero, nothing changes
    plain, rotated = augmented(frames, monkeypatch, draws=1.0, rotation=90)
    assert torch.equal(rotated, plain.rot90(-1, (3, 4)))  # y points down: clockwise
    plain, shifted = augmented(frames, monkeypatch, draws=1.0, shift=3)
    assert torch.equal(shifted[..., 3:, 3:], plain[..., :-3, :-3])
    assert shifted[..., :3, :].sum() + shifted[..., :3].sum() == 0
    plain, earlier = augmented(frames, monkeypatch, draws=0.0, time_shift=0.2)
    assert torch.equal(earlier[:-2], plain[2:])  # by two of ten frames
    assert earlier[-2:].sum() == 0
    plain, halved = augmented(frames, monkeypatch, draws=0.0, scale=0.5)
    assert halved.sum() == plain.sum()  # events that move to the same bin add up
    where = halved.sum((0, 1, 2)).nonzero()
    assert where.min() >= 8
    assert where.max() <= 25
    plain, sheared = augmented(frames, monkeypatch, draws=1.0, shear=2)
    for row in range(34):
        shift = 2 * row - 33  # along x
        moved = torch.nn.functional.pad(plain[..., row, :], (shift, -shift))
        assert torch.equal(sheared[..., row, :], moved)


def test_augmentation_differs_between_recordings_and_follows_the_seed(made_data_dir, monkeypatch):
    frames = nmnist.load_frames(open_part(made_data_dir), 10)
    torch.manual_seed(0)
    plain, first = augmented(frames, monkeypatch, shift=5, drop=0.3)
    torch.manual_seed(0)
    assert torch.equal(augmented(frames, monkeypatch, shift=5, drop=0.3)[1], first)
    assert not torch.equal(augmented(frames, monkeypatch, shift=5, drop=0.3)[1], first)
    assert 0.6 < first.sum() / plain.sum() < 0.75
    before, after = (
        (x.sum((0, 2, 3)) * torch.arange(34)).sum(-1) / x.sum((0, 2, 3, 4)) for x in (plain, first)
    )
    moves = (after - before).round()
    assert len(moves.unique()) > 4
    assert moves.abs().max() <= 6


# --- What scripts use -----------------------------------------------------------------------------


def load_data(data_dir, *flags, splits=nmnist.SPLITS):
    """Load the data set that flags name, in five frames, as the scripts do."""
    flags = ["--data_dir", str(data_dir), "--time_steps", "5", *flags]
    return nmnist.load_data(nmnist.make_parser().parse_args(flags), torch.device("cpu"), splits)


def test_fingerprints_tell_contents_and_labels_but_not_dates_nor_options(tmp_path):
    original = make_recordings(tmp_path, 2, 1) / "NMNIST"
    copy = tmp_path / "copy" / "NMNIST"
    shutil.copytree(original, copy, copy_function=shutil.copyfile)
    path = copy / "Train" / "3" / "00014.bin"  # the last of its digit
    os.utime(path, (1, 1))
    first = load_data(original).describe()
    assert load_data(copy).describe() == load_data(copy, "--denoise", "5000").describe() == first
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    changed = load_data(copy)
    path.write_bytes(content)
    path.rename(copy / "Train" / "4" / "00000.bin")  # another label, in the same place
    relabelled = load_data(copy)
    for other in (changed, relabelled):
        differ = [name for name, value in other.describe().items() if first[name] != value]
        assert differ == ["train_fingerprint"]
    assert changed.train.fingerprint != relabelled.train.fingerprint
    options = load_data(copy, "--first_saccade_only", "--stabilize", "--bin_by", "events")
    assert options.describe() != relabelled.describe()
    assert options.name == "NMNIST, first saccade, stabilized, frames of equal event count"


def test_test_recordings_that_are_also_in_the_training_part_are_told(tmp_path, capsys):
    root = make_recordings(tmp_path, 2, 1) / "NMNIST"
    assert load_data(tmp_path).name == "NMNIST"
    assert "WARNING" not in capsys.readouterr().err
    shutil.copy(root / "Train" / "3" / "00004.bin", root / "Test" / "3" / "1.bin")
    shutil.copy(root / "Train" / "4" / "00005.bin", root / "Test" / "5" / "1.bin")
    load_data(tmp_path)
    warning = "WARNING: 2 test recordings are also in the training part"
    assert warning in capsys.readouterr().err


def test_validation_is_stratified_and_fixed_by_the_seed():
    labels = torch.arange(10).repeat_interleave(torch.arange(10, 110, 10))  # 10 of 0, 100 of 9
    train, val = nmnist.split_validation(labels, 0.1, seed=3)
    assert sorted(torch.cat([train, val]).tolist()) == list(range(len(labels)))
    assert torch.bincount(labels[val]).tolist() == list(range(1, 11))
    assert torch.equal(val, nmnist.split_validation(labels, 0.1, seed=3)[1])
    assert not torch.equal(val, nmnist.split_validation(labels, 0.1, seed=4)[1])
    with pytest.raises(UserError, match="--val_split"):
        nmnist.split_validation(torch.arange(10), 0.1, seed=3)


def test_the_table_agrees_with_the_files(made_data_dir, capsys):
    nmnist.main(["--data_dir", str(made_data_dir), "--time_steps", "10"])
    table = {line[:24].strip(): line[24:].split() for line in capsys.readouterr().out.splitlines()}
    events = [events for events, _ in tonic_recordings(made_data_dir, train=True)]
    on_events = np.mean([recording["p"].mean() for recording in events])
    durations = [(recording["t"][-1] - recording["t"][0]) / 1000 for recording in events]
    frames = tonic_frames(made_data_dir, 10, train=True)
    assert table["recordings of digit 3"] == ["12", "3"]
    assert table["recordings"] == ["120", "30"]
    assert table["blank recordings"] == ["0", "0"]
    assert table["events, mean"] == ["400", "400"]
    assert table["share of ON events"][0] == f"{on_events:.1%}"
    for name, value in (("mean", np.mean(durations)), ("min", min(durations))):
        assert table[f"duration in ms, {name}"][0] == f"{value:.0f}"
    assert table["non-zero bins at T = 10"][0] == f"{(frames > 0).double().mean():.2%}"
