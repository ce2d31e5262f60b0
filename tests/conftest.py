"""What the tests share: the real recordings where there are some, recordings made here, and running scripts."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))

import nmnist  # noqa: E402
import utils  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: the long form of a test, run by `python -m pytest tests -m slow` alone")


def pytest_collection_modifyitems(config, items):
    if "slow" not in config.getoption("-m"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


torch.set_num_threads(1)  # tests are small, and start processes, which have the other cores

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_cuda)])
def device(request):
    """Each device that there is, in turn."""
    return torch.device(request.param)


@pytest.fixture
def on_device(device, monkeypatch):
    """Make new tensors and modules on `device`, where float32 is computed as float32."""
    for name in ("allow_tf32", "benchmark"):
        monkeypatch.setattr(torch.backends.cudnn, name, False)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    with device:
        yield device
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="session")
def real_data_dir(tmp_path_factory):
    """A folder that holds the 800 real recordings, linked, so that caches stay out of ../shared."""
    recordings = SHARED / "nmnist-small" / "NMNIST"
    if not recordings.is_dir():
        pytest.skip(f"no real recordings in {recordings}")
    data_dir = tmp_path_factory.mktemp("real")
    (data_dir / "NMNIST").symlink_to(recordings)
    return data_dir


def make_events(digit: int, rng: np.random.Generator, number: int = 400) -> np.ndarray:
    """Return events of a blob that moves a little; its position, in two rows of five, gives the digit."""
    t = np.sort(rng.integers(0, 300_000, number))
    x = 4 + 6 * (digit % 5) + t // 100_000 + rng.integers(0, 3, number)
    y = 8 + 14 * (digit // 5) + rng.integers(0, 4, number)
    events = np.empty(number, nmnist.NMNIST.dtype)
    for name, values in zip("xytp", (x, y, t, rng.integers(0, 2, number)), strict=True):
        events[name] = values
    return events


def make_recordings(data_dir: Path, train: int = 12, test: int = 3) -> Path:
    """Write `train` and `test` made-up recordings of each digit into N-MNIST folders in `data_dir`; return it."""
    rng = np.random.default_rng(0)
    for folder, number in (("Train", train), ("Test", test)):
        for digit in range(10):
            path = data_dir / "NMNIST" / folder / str(digit)
            path.mkdir(parents=True)
            for i in range(number):
                nmnist.write_recording(path / f"{10 * i + digit + 1:05d}.bin", make_events(digit, rng))
    return data_dir


@pytest.fixture(scope="session")
def made_data_dir(tmp_path_factory):
    """A folder with 120 made-up training and 30 test recordings; tests that change it make their own."""
    return make_recordings(tmp_path_factory.mktemp("made"))


@pytest.fixture
def figures(monkeypatch):
    """Keep figures open, by file name, instead of writing them, so that a test can check what was drawn."""
    kept = {}
    monkeypatch.setattr(utils, "save_figure", lambda figure, path: kept.update({Path(path).name: figure}))
    yield kept
    plt.close("all")


def run(*command, cwd=ROOT, import_from=None, **options) -> subprocess.CompletedProcess:
    """Run a command as a user does, from the project's folder, and return it with its output."""
    # One thread: no result depends on the number of threads, and tests may run at the same time.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if import_from:
        environment["PYTHONPATH"] = str(import_from)
    command = [str(part) for part in command]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, timeout=280, **options)


def limit_files(size: int):
    """Return a `preexec_fn` after which a process can't write files of more than `size` bytes, as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def files_in(folder: Path) -> set[Path]:
    """Return all files in a folder, temporary files of failed writes included, lock files left out."""
    return {path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


def assert_refused(result: subprocess.CompletedProcess, *words: str, status: int = 1) -> None:
    """Check that stderr ends with a line that has `words`, without a traceback, and check the exit status."""
    message = result.stderr.strip().splitlines()[-1]
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    assert "error:" in message
    for word in words:
        assert word in message
