"""Recordings: found, downloaded, checked, simulated; frames compared with tonic's own."""

import ctypes
import dataclasses
import functools
import hashlib
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import benchmark
import hypothesis
import numpy as np
import pytest
import tonic
import torch
from conftest import ROOT, SHARED, assert_refused, limit_files, make_events, make_recordings, run
from hypothesis import strategies as st
from tonic.io import read_mnist_file

import nmnist
from utils import UserError

NMNIST = (sys.executable, ROOT / "nmnist.py")
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
    cache = recordings.folder.parents[1] / "cache"
    frames = nmnist.load_frames(recordings, *arguments, cache=cache, **options)
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


PLACE = st.integers(0, 33)
LAST = 2**23 - 1  # the largest time that the format holds
EVENT = st.tuples(PLACE, PLACE, st.integers(0, LAST), st.integers(0, 1))


@hypothesis.settings(deadline=None, derandomize=True, database=None)
@hypothesis.given(st.lists(EVENT, max_size=8))
def test_written_recordings_are_read_by_tonic_unchanged(tmp_path_factory, rows):
    rows = [(0, 0, 0, 0), *sorted(rows, key=lambda event: event[2]), (33, 33, LAST, 1)]
    path = tmp_path_factory.getbasetemp() / "x.bin"
    nmnist.write_recording(path, np.array(rows, nmnist.NMNIST.dtype))
    assert read_mnist_file(path, dtype=tonic.datasets.NMNIST.dtype).tolist() == rows


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "found no events"),
        (b"\x01\x02\x80\x00", "found 4 bytes"),
        (b"\x40\x02\x80\x00\x00" + b"\x01\x02\x80\xff\xff", "found x from 1 to 64"),
        (b"\x01\x02\x80\xff\xff" + b"\x01\x02\x80\x00\x00", "found t that decreases"),
        (b"\x01\xf0\x80\xff\xff", "found no events"),  # only a time stamp overflow
        (b"\x01\x02\x80\x00\x00" + b"\x01\x02\x80\x03\xe7", "only t from 0 to 999"),
        (None, "No such file"),
    ],
)
def test_bad_recordings_are_refused_by_name(tmp_path, content, words):
    bad = make_recordings(tmp_path, 2, 1) / "NMNIST" / "Train" / "4" / "00005.bin"
    bad.unlink()
    bad.symlink_to("nowhere") if content is None else bad.write_bytes(content)
    with pytest.raises((UserError, OSError), match=f"{words}.*{bad}|{bad}.*{words}"):
        nmnist.main(["--data_dir", str(tmp_path), "--time_steps", "5"])
    assert not (tmp_path / "cache").exists()


SETTINGS = {"time_steps": 25, "denoise": None, "bin_by": "time"}
SETTINGS |= {"first_saccade_only": False, "stabilize": False}


@pytest.mark.parametrize(
    ("axis", "change", "words"),
    [
        ("p", lambda p: 2 * p - 1.0, "p from -1.0 to 1.0"),
        ("x", lambda x: x + 30, "x from 34 to"),
        ("y", lambda y: y + 0.5, "y that is not whole"),
        ("x", lambda x: np.where(x == x[9], np.nan, x), "x that is not whole"),
        ("t", lambda t: t / 1e6, "t that is not whole"),  # seconds
        ("t", lambda t: t // 1000, "only t from 0 to 299, less than 1 ms"),  # ms
        ("t", lambda t: t + 1_700_000_000_000_000, "t from 17"),  # since 1970
        ("t", lambda t: np.roll(t, 1), "t that decreases"),
        ("t", lambda t: t[:1], "only t from"),  # one event
        ("t", lambda t: t[:0], "no events"),
    ],
)
def test_events_that_no_recording_holds_are_refused(tmp_path, axis, change, words):
    events = make_events(0, np.random.default_rng(0))
    values = change(events[axis])
    types = [(name, values.dtype if name == axis else int) for name in "ptyx"]
    wrong = np.empty(len(values), types)
    for name in "xytp":
        wrong[name] = values if name == axis else events[name][: len(values)]
    with pytest.raises(UserError, match=f"^events: found {words}.*; expected x and y from 0 to 33"):
        nmnist.to_frames(wrong, SETTINGS)
    with pytest.raises(UserError, match=f"^{tmp_path}/x.bin: found {words}"):
        nmnist.write_recording(tmp_path / "x.bin", wrong)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("kind", [list, dict, torch.tensor, np.array])
def test_what_is_no_array_of_events_is_refused(kind):
    with pytest.raises(UserError, match=r"^events: found something else than an array with"):
        nmnist.to_frames(kind([[1, 2], [3, 4]]), SETTINGS)


def test_events_of_other_types_are_read(tmp_path):
    """Small integers would overflow, and numpy copies fields by their place."""
    events = make_events(9, np.random.default_rng(0))
    types = [("t", np.float64), ("p", bool), ("y", np.uint8), ("x", np.int16)]
    other = np.empty(len(events), types)
    for name in "xytp":
        other[name] = events[name]
    expected = nmnist.to_frames(events, SETTINGS)
    assert torch.equal(nmnist.to_frames(other, SETTINGS), expected)
    nmnist.write_recording(tmp_path / "x.bin", other)
    read = read_mnist_file(tmp_path / "x.bin", dtype=tonic.datasets.NMNIST.dtype)
    np.testing.assert_array_equal(read, events)


# --- Finding the data set -------------------------------------------------------------------------


def put(part, place):
    """Move the folder of a part to `place`, or into a zip there, under its name."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.suffix != ".zip":
        part.rename(place)
        return
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(part.glob("*/*.bin")):
            archive.write(file, file.relative_to(part.parent))
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
        ("train.zip", "test.zip"),
        ("NMNIST/Train.zip", "NMNIST/Test.zip"),
        ("NMNIST/Train", "NMNIST/test.zip"),
    ],
)
def test_recordings_are_found(tmp_path, capsys, train, test):
    made, data_dir = make_recordings(tmp_path / "made", 2, 1) / "NMNIST", tmp_path / "data"
    expected = [by_label((made / part).glob("*/*.bin")) for part in ("Train", "Test")]
    put(made / "Train", data_dir / train)
    put(made / "Test", data_dir / test)
    for _ in range(2):  # the second time, the zips are unpacked
        capsys.readouterr()
        parts = nmnist.open_recordings(data_dir, "auto")
        assert [by_label(part.files) for part in parts] == expected
        for part in parts:
            assert part.labels == [int(path.parent.name) for path in part.files]
            assert not [name for name in listing(part.folder.parent) if name.startswith(".")]
        first, second = capsys.readouterr().out.splitlines()
        assert first == f"data set    NMNIST, train: 20 of 60,000 recordings in {parts[0].folder}"
        assert second == f"data set    NMNIST, test: 10 of 10,000 recordings in {parts[1].folder}"


def test_files_of_other_systems_are_not_recordings(tmp_path):
    """What macOS, Windows and an unfinished copy leave beside recordings."""
    root = make_recordings(tmp_path, 2, 1) / "NMNIST"
    before = open_part(tmp_path, "train").files
    # fmt: off
    names = [
        "__MACOSX/Train/0/._00001.bin", "Train/__MACOSX/0/1.bin", "Train/2/.AppleDouble/1.bin",
        "Train/2/._00003.bin", "Train/2/.00002.bin.x7Yk2", "Train/.hidden.bin",
        ".DS_Store", "Train/.DS_Store", "Train/2/.DS_Store", "Train/2/Thumbs.db", "desktop.ini",
    ]
    # fmt: on
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(before[0].read_bytes())
    assert open_part(tmp_path, "train").files == before


def test_one_part_is_enough_where_only_that_is_asked_for(tmp_path):
    root = make_recordings(tmp_path, 2, 1) / "NMNIST"
    put(root / "Test", root / "test.zip")
    shutil.rmtree(root / "Train")
    (test,) = nmnist.open_recordings(tmp_path, "auto", ["test"])
    assert (test.split, len(test)) == ("test", 10)
    (root / "train.zip").write_bytes(b"which is not opened")
    data = load_data(tmp_path, splits=["test"])
    assert (data.train, len(data.test)) == (None, 10)
    assert data.test_files == [f"{digit}/{digit + 1:05d}.bin" for digit in range(10)]


@pytest.mark.parametrize(
    ("commands", "words"),  # in a data_dir of 2 training recordings and 1 test one a digit
    [
        ("mkdir a; mv NMNIST a", r"a/NMNIST/T\w+/\d/\d+.bin; expected"),
        ("cp -r NMNIST b", r"b/T\w+/\d/\d+.bin; expected"),
        ("mv NMNIST/Test .", r"Test/\d/\d+.bin; expected .* \S+/NMNIST/Test/<digit>"),
        ("mv NMNIST/Train a; mkdir NMNIST/Train; mv a NMNIST/Train/Train", r"Train/Train/\d/"),
        ("mv NMNIST/Train/* .; rm -r NMNIST", r"\d/\d+.bin; expected"),
        ("mkdir a; touch a/train.zip", "a/train.zip; expected"),
        ("rm -r NMNIST/Train", "NMNIST/Train is missing"),
        ("rm -r NMNIST/Test/6", "Test/6 holds no \\*.bin"),
    ],
)
def test_what_is_nearly_a_data_set_is_refused_in_one_line(tmp_path, commands, words, monkeypatch):
    make_recordings(tmp_path / "data", 2, 1)
    subprocess.run(commands, shell=True, cwd=tmp_path / "data", check=True)
    monkeypatch.chdir(tmp_path)  # so that this is the default folder
    before = snapshot(tmp_path)
    for dataset in ("auto", "nmnist"):
        with pytest.raises(UserError, match=words) as error:
            nmnist.open_recordings("./data", dataset)
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
        lambda content: content.replace(b"Train", b"Trial"),
    ],
    ids=["cut", "flipped", "encrypted", "deflate64", "text", "empty", "of something else"],
)
def test_a_zip_that_cannot_be_extracted_is_named_and_leaves_nothing(tmp_path, damage):
    archive = make_recordings(tmp_path, 2, 1) / "NMNIST" / "train.zip"
    put(archive.with_name("Train"), archive)
    whole = archive.read_bytes()
    archive.write_bytes(damage(whole))
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=f"{archive} can't be extracted"):
        nmnist.open_recordings(tmp_path, "auto")
    assert snapshot(tmp_path) == before
    archive.write_bytes(whole)
    assert len(open_part(tmp_path, "train")) == 20


def test_simulated_digits_are_made_in_the_default_folder_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    for data_dir, dataset, words in (
        ("typo", "auto", "--data_dir typo is not a folder: create it"),
        ("empty", "auto", r"no N-MNIST in empty: .*Connection refused.* --dataset simulated"),
        ("./data", "nmnist", f"no N-MNIST in data: .*Connection refused.*{nmnist.HOMEPAGE}"),
    ):
        with pytest.raises(UserError, match=words):
            nmnist.open_recordings(data_dir, dataset)
    assert not any(snapshot(tmp_path).values())


# --- Download -------------------------------------------------------------------------------------


def test_missing_recordings_are_downloaded_once(tmp_path, monkeypatch):
    made, data_dir = make_recordings(tmp_path / "made", 2, 1) / "NMNIST", tmp_path / "data"
    expected = snapshot(made)
    data_dir.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for split in nmnist.SPLITS:
        archive = tmp_path / f"{split}.zip"
        put(made / split.capitalize(), archive)
        url = f"http://127.0.0.1:{server.server_port}/{split}.zip"
        monkeypatch.setattr(tonic.datasets.NMNIST, f"{split}_url", url)
        md5 = hashlib.md5(archive.read_bytes()).hexdigest()
        monkeypatch.setattr(tonic.datasets.NMNIST, f"{split}_md5", md5)
    with monkeypatch.context() as patch:  # a download that is cut leaves nothing in the way
        patch.setattr(tonic.datasets.NMNIST, "test_md5", "that of the whole file")
        with pytest.raises(UserError, match=r"can't be downloaded \(File not found or corrupted"):
            nmnist.open_recordings(data_dir)
        assert listing(data_dir) == [".download"]
    nmnist.open_recordings(data_dir)
    server.shutdown()
    server.server_close()
    parts = nmnist.open_recordings(data_dir)
    assert [nmnist.data_set_name(part) for part in parts] == ["NMNIST", "NMNIST"]
    assert listing(data_dir) == ["NMNIST"]
    assert snapshot(data_dir / "NMNIST") == expected


# --- Simulation -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """The result of `python nmnist.py` without network, and its data_dir."""
    folder = tmp_path_factory.mktemp("simulated")
    return run(*NMNIST, "--time_steps", "10", cwd=folder), folder / "data"


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
        folder = f"data/SimulatedNMNIST/{split.capitalize()}"
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
    assert nmnist.data_set_name(open_part(tmp_path)) == "SimulatedNMNIST"
    path = make_recordings(tmp_path / "made", 1, 1) / "NMNIST" / nmnist.SIMULATOR_FILE
    for content in (b"", b"{", b"[1]", b"\xff\xfe", b"{}"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{path} is damaged"):
            open_part(tmp_path / "made")


def test_simulated_recordings_of_another_version_are_kept_and_made_again(
    simulated, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(simulated[1] / "SimulatedNMNIST", "data/SimulatedNMNIST")
    earlier = snapshot(tmp_path / "data" / "SimulatedNMNIST")
    monkeypatch.setattr(nmnist, "SIMULATOR_VERSION", nmnist.SIMULATOR_VERSION + 1)
    monkeypatch.setattr(nmnist, "sklearn_images", lambda: few_images(50))
    nmnist.open_recordings(dataset="simulated")
    assert "SimulatedNMNIST kept as data/SimulatedNMNIST.1\n" in capsys.readouterr().out
    assert snapshot(tmp_path / "data" / "SimulatedNMNIST.1") == earlier
    parts = nmnist.open_recordings()  # finds neither to be misplaced
    assert sum(len(part) for part in parts) == 500


def test_a_change_of_the_camera_needs_another_version():
    """Counts of the first 7 by saccade and polarity: processors differ in the last bits."""
    (events,) = nmnist.simulate_events(few_images(8)[0][56:57], generators(1))
    saccade = np.searchsorted(nmnist.SACCADE_ENDS[:2], events["t"] / 1000)
    counts = np.bincount(2 * saccade + events["p"])
    assert nmnist.SIMULATOR_VERSION == 2
    np.testing.assert_allclose(counts, [483, 488, 404, 413, 398, 431], atol=1)


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
        assert gaps.min() > 1000 * camera.refractory * (1 - 3 * camera.duration_spread)


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
    """Write scikit-learn's digits to an .npz, with some arrays changed."""
    images, labels = few_images(per_digit)
    arrays = {"train_images": images, "train_labels": labels}
    arrays |= {"test_images": images[::2], "test_labels": labels[::2]} | changes
    np.savez(path, **arrays)
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
    assert nmnist.data_set_name(train) == "SimulatedNMNIST (images.npz)"
    assert (len(train), len(test)) == (130, 65)
    _, labels = few_images(13)
    assert train.labels == [labels[int(path.stem) - 1] for path in train.files]
    with pytest.raises(UserError, match=r"NMNIST is not empty: choose another"):
        simulate(archive, tmp_path / "a")
    assert snapshot(tmp_path / "a" / "NMNIST") == results[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_images": np.zeros((20, 28, 27), np.uint8)}, "holds other arrays; it needs train_"),
        ({"test_labels": np.arange(1, 11)}, "holds other arrays; it needs train_images and test_"),
        ({"train_labels": np.array([None] * 10)}, "can't be read"),  # a pickle, which may run code
    ],
)
def test_wrong_images_are_refused_and_nothing_written(tmp_path, changes, words):
    archive = save_images(tmp_path / "images.npz", per_digit=2, **changes)
    with pytest.raises(UserError, match=re.escape(words)) as error:
        simulate(archive, tmp_path / "out")
    assert str(archive) in str(error.value)
    assert not (tmp_path / "out").exists()


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
    if number > 32_767:
        with pytest.raises(UserError, match=rf"00001\.bin: {number:,} events in one bin"):
            all_frames(open_part(tmp_path), 1)
        return
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


@pytest.mark.parametrize(("time_steps", "of_frames", "of_recordings"), [CASES[1], CASES[-1]])
def test_a_recording_of_ones_own_becomes_the_frames_of_the_training(
    made_data_dir, time_steps, of_frames, of_recordings
):
    expected = tonic_frames(made_data_dir, time_steps, **of_frames, **of_recordings)
    settings = SETTINGS | {"time_steps": time_steps} | of_frames | of_recordings
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


def test_events_that_the_options_leave_blank_are_told(capsys):
    events = make_events(3, np.random.default_rng(0))
    settings = SETTINGS | {"first_saccade_only": True}
    frames = nmnist.to_frames(events[events["t"] >= 100_000], settings)
    assert frames.sum() == 0
    assert "WARNING: the network's settings leave no event in any frame" in capsys.readouterr().err


# --- The cache of frames --------------------------------------------------------------------------


def test_the_cache_takes_at_most_10_kb_per_real_recording(real_data_dir):
    frames = nmnist.load_frames(
        open_part(real_data_dir, "train"), 25, cache=real_data_dir / "cache"
    )
    (path,) = (real_data_dir / "cache").glob("*_train_T25_*")
    assert path.stat().st_size / len(frames) < 10_000


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
        for time_steps, of_frames, of_recordings in CASES[-5:]:
            frames = all_frames(open_part(tmp_path, **of_recordings), time_steps, **of_frames)
            expected = tonic_frames(tmp_path, time_steps, **of_frames, **of_recordings)
            assert torch.equal(frames, expected)
        train = all_frames(open_part(tmp_path, "train"), 10)
        assert torch.equal(train, tonic_frames(tmp_path, 10, train=True))
    assert len(listing(tmp_path / "cache")) == 6


class Mirrored(nmnist.NMNIST):
    """Recordings whose events are changed as they are read."""

    def __getitem__(self, index):
        events, digit = super().__getitem__(index)
        events["x"] = 33 - events["x"]
        return events, digit


def test_neither_other_labels_nor_changed_events_come_from_or_reach_the_cache(
    made_data_dir, tmp_path
):
    folder = made_data_dir / "NMNIST" / "Test"
    plain = nmnist.load_frames(nmnist.NMNIST(folder), 5, cache=tmp_path)
    permuted = nmnist.NMNIST(folder)
    permuted.labels = permuted.labels[::-1]
    assert nmnist.load_frames(permuted, 5, cache=tmp_path).labels.tolist() == permuted.labels
    every = torch.arange(len(plain))
    for _ in range(2):
        mirrored = nmnist.load_frames(Mirrored(folder), 5, cache=tmp_path)
        assert torch.equal(mirrored.batch(every)[0], plain.batch(every)[0].flip(-1))
        again = nmnist.load_frames(nmnist.NMNIST(folder), 5, cache=tmp_path)
        assert torch.equal(again.batch(every)[0], plain.batch(every)[0])
        assert torch.equal(again.labels, plain.labels)


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
    all_frames(recordings, 6)
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


def test_what_cannot_be_written_is_named_and_frames_stay_in_memory(tmp_path):
    archive = make_recordings(tmp_path, 2, 1) / "NMNIST" / "test.zip"
    flags = ["--data_dir", tmp_path]
    folders = [tmp_path, tmp_path / "NMNIST"]
    for folder in folders:
        folder.chmod(0o555)
    try:
        if run("test", "-w", tmp_path, preexec_fn=obey_permissions).returncode == 0:
            pytest.skip("this user can write everywhere")
        before = snapshot(tmp_path)
        read = run(*NMNIST, *flags, preexec_fn=obey_permissions)
        simulated = run(*NMNIST, *flags, "--dataset", "simulated", preexec_fn=obey_permissions)
        assert snapshot(tmp_path) == before
        folders[1].chmod(0o755)
        put(tmp_path / "NMNIST" / "Test", archive)
        folders[1].chmod(0o555)
        extracted = run(*NMNIST, *flags, preexec_fn=obey_permissions)
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert read.returncode == 0, read.stderr
    assert read.stderr.count("can't be written (Permission denied): frames stay in memory") == 2
    assert_refused(simulated, "Permission denied", f"'{tmp_path}/SimulatedNMNIST'")
    assert_refused(extracted, "Permission denied", f"'{tmp_path}/NMNIST/Test'")


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
        "import os, sys, nmnist\n"
        "replace = os.replace\n"
        "def die(new, path):\n"
        "    if str(path).endswith(('.pt', 'NMNIST')):\n"
        "        os.kill(os.getpid(), 9)\n"
        "    replace(new, path)\n"
        "os.replace = die\n"
        "for flags in sys.argv[1:5], sys.argv[5:]:\n"
        "    if os.fork() == 0:\n"
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
