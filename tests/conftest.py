"""What the tests share: recordings, real ones and made-up ones, devices, and running scripts."""

import os
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))

import nmnist  # noqa: E402
import utils  # noqa: E402


def pytest_terminal_summary(terminalreporter):
    """Say in one line why tests were skipped."""
    reasons = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", []))
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} {reason.lower()}")


torch.set_num_threads(1)  # tests are small, and start processes, which have the other cores

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def pytest_configure(config):
    text = "slow: the long form of a test, run by `python -m pytest tests -m slow` alone"
    config.addinivalue_line("markers", text)


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and "slow" not in config.getoption("-m"):
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


@pytest.fixture(autouse=True)
def same_environment(monkeypatch):
    """Start each test alike, whatever `run_script` and `prepare_device` set for the process."""
    monkeypatch.setenv("TORCHINDUCTOR_VEC_ISA_OK", "1")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_cuda)])
def device(request):
    """Each device that there is, in turn."""
    return torch.device(request.param)


@pytest.fixture
def on_device(device, monkeypatch):
    """Make new tensors and modules on `device`, where float32 is computed as float32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with device:
        yield device


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
    """Return events of a blob that moves a little; its place, in two rows of five, is the digit."""
    t = np.sort(rng.integers(0, 300_000, number))
    x = 4 + 6 * (digit % 5) + t // 100_000 + rng.integers(0, 3, number)
    y = 8 + 14 * (digit // 5) + rng.integers(0, 4, number)
    events = np.empty(number, nmnist.NMNIST.dtype)
    for name, values in zip("xytp", (x, y, t, rng.integers(0, 2, number)), strict=True):
        events[name] = values
    return events


def make_recordings(data_dir: Path, train: int = 12, test: int = 3) -> Path:
    """Write `train` and `test` recordings of each digit into `data_dir`/NMNIST; return data_dir."""
    rng = np.random.default_rng(0)
    for folder, number in (("Train", train), ("Test", test)):
        for digit in range(10):
            path = data_dir / "NMNIST" / folder / str(digit)
            path.mkdir(parents=True)
            for i in range(number):
                events = make_events(digit, rng)
                nmnist.write_recording(path / f"{10 * i + digit + 1:05d}.bin", events)
    return data_dir


@pytest.fixture(scope="session")
def made_data_dir(tmp_path_factory):
    """A folder of 120 made-up training and 30 test recordings, which no test changes."""
    return make_recordings(tmp_path_factory.mktemp("made"))


@pytest.fixture
def figures(monkeypatch):
    """Keep figures, by file name, instead of writing them, for a test to look at."""
    kept = {}

    def keep(figure, title, path):
        utils.set_title(figure, title)
        kept[Path(path).name] = figure

    monkeypatch.setattr(utils, "save_figure", keep)
    return kept


# What a notebook's cell passes on to the commands that it runs.
INLINE = "module://matplotlib_inline.backend_inline"


def run(*command, cwd=ROOT, import_from=None, **options) -> subprocess.CompletedProcess:
    """Run a command as a user does, from the project's folder, and return it with its output."""
    # One thread: no result depends on their number, and tests may run at the same time.
    env = {"MPLBACKEND": INLINE, **os.environ, "OMP_NUM_THREADS": "1"}
    if import_from:
        env["PYTHONPATH"] = str(import_from)
    command = [str(part) for part in command]
    options |= {"capture_output": True, "text": True, "timeout": 280}
    return subprocess.run(command, cwd=cwd, env=env, **options)


def limit_files(size: int):
    """Return a `preexec_fn` that limits a process's files to `size` bytes, as a full disk does."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def files_in(folder: Path) -> set[Path]:
    """Return all files in a folder, those of unfinished writes included, lock files left out."""
    return {path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


def assert_refused(result: subprocess.CompletedProcess, *words: str, status: int = 1) -> None:
    """Check the exit status, and that stderr ends in an error that has `words`: no traceback."""
    message = result.stderr.strip().splitlines()[-1]
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    assert "error:" in message
    for word in words:
        assert word in message
