"""Measurements that the README quotes, each made by a command.

    python tests/benchmark.py simulator              # the simulated camera against the 800 real recordings
    python tests/benchmark.py simulator --no_train   # the same without training a network (a minute, not twenty)

Needs `nmnist-small` and `mnist.npz`, by default from the folder `../shared` beside the project.
"""

import argparse
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import nmnist  # noqa: E402
import train_nmnist  # noqa: E402
import utils  # noqa: E402

BLUR = 0.7  # pixels, of the event maps that are compared


# ---------------------------------------------------------------------------------------------------------
# The simulated camera against real recordings
# ---------------------------------------------------------------------------------------------------------


def load_real(shared: Path):
    """Return the 800 real recordings, the MNIST image behind each, and their ids."""
    parts = [nmnist.NMNIST(shared / "nmnist-small", split) for split in nmnist.SPLITS]
    paths = [path for part in parts for path in part.data]
    recordings = [part[i][0] for part in parts for i in range(len(part))]
    ids = np.array([int(Path(path).stem) for path in paths])
    mnist = np.load(shared / "mnist.npz")
    place = {int(number): i for i, number in enumerate(mnist["train_ids"])}
    return recordings, mnist["train_images"][[place[number] for number in ids]], ids


def event_maps(recordings: list[np.ndarray]) -> np.ndarray:
    """Return smoothed event counts [N, 3 * 2 * 34 * 34]: a map for each saccade and polarity."""
    distance = np.arange(34)[:, None] - np.arange(34)
    kernel = np.exp(-0.5 * (distance / BLUR) ** 2)
    kernel /= kernel[17].sum()
    maps = []
    for events in recordings:
        saccade = np.searchsorted(nmnist.SACCADE_ENDS[:2], events["t"] / 1000, side="right")
        counts = np.zeros((3, 2, 34, 34))
        np.add.at(counts, (saccade, events["p"], events["y"], events["x"]), 1)
        maps.append((kernel @ counts @ kernel.T).ravel())
    return np.array(maps)


def time_histogram(recordings: list[np.ndarray]) -> np.ndarray:
    """Return the mean number of events in bins of 5 ms."""
    return np.histogram(np.concatenate([e["t"] for e in recordings]), np.arange(0, 325_000, 5_000))[0] / len(recordings)


def inter_event_times(recordings: list[np.ndarray], polarity: int) -> np.ndarray:
    """Return the times in ms between successive events of one pixel and polarity."""
    times = []
    for events in recordings:
        chosen = events[events["p"] == polarity]
        pixel = chosen["y"] * 34 + chosen["x"]
        order = np.lexsort((chosen["t"], pixel))
        same = np.diff(pixel[order]) == 0
        times.append(np.diff(chosen["t"][order])[same] / 1000)
    return np.concatenate(times)


def compare(simulated: list[np.ndarray], real: list[np.ndarray]) -> list[tuple[str, str, str, bool]]:
    """Return rows (what, figure, target, met) of how alike two lists of recordings of the same images are."""
    maps = [np.corrcoef(a, b)[0, 1] for a, b in zip(event_maps(simulated), event_maps(real), strict=True)]
    over_time = np.corrcoef(time_histogram(simulated), time_histogram(real))[0, 1]
    numbers = [np.array([len(e) for e in recordings]) for recordings in (simulated, real)]
    mean, spread = (values[0] / values[1] - 1 for values in zip(*((n.mean(), n.std()) for n in numbers), strict=True))
    together = np.corrcoef(*numbers)[0, 1]
    on = [np.concatenate([e["p"] for e in recordings]).mean() for recordings in (simulated, real)]
    rows = [
        ("event maps, median correlation", f"{np.median(maps):.4f}", "0.95 or more", np.median(maps) >= 0.95),
        ("events over time, correlation", f"{over_time:.4f}", "0.985 or more", over_time >= 0.985),
        ("events a recording, mean", f"{numbers[0].mean():,.0f} ({mean:+.1%})", "within 3%", abs(mean) <= 0.03),
        ("events a recording, spread", f"{numbers[0].std():,.0f} ({spread:+.1%})", "within 12%", abs(spread) <= 0.12),
        ("events a recording, correlation", f"{together:.4f}", "0.95 or more", together >= 0.95),
        ("share of ON events", f"{on[0]:.4f} ({on[0] - on[1]:+.4f})", "within 0.01", abs(on[0] - on[1]) <= 0.01),
    ]
    for polarity, name in enumerate(("OFF", "ON")):
        median = [np.median(inter_event_times(recordings, polarity)) for recordings in (simulated, real)]
        ratio = median[0] / median[1] - 1
        rows.append((f"inter-event time, {name}", f"{median[0]:.2f} ms ({ratio:+.1%})", "within 20%", abs(ratio) < 0.2))
    return rows


def time_simulation(images: np.ndarray, rounds: int = 5) -> float:
    """Return the median time in ms to simulate one of the images, in one process; NumPy runs it on one core."""
    times = []
    for _ in range(rounds + 1):
        generators = [np.random.default_rng(i) for i in range(len(images))]
        start = time.perf_counter()
        nmnist.simulate_events(images, generators)
        times.append((time.perf_counter() - start) / len(images))
    return 1000 * float(np.median(times[1:]))  # the first is the warm-up


def train_on_simulated(shared: Path, images: np.ndarray, ids: np.ndarray, number: int, epochs: int) -> float:
    """Train the CNN on simulated MNIST digits without the real recordings' images; return its accuracy on these."""
    mnist = np.load(shared / "mnist.npz")
    others = np.flatnonzero(~np.isin(mnist["train_ids"], np.arange(1, 801)))
    chosen = np.sort(np.random.default_rng(0).permutation(others)[:number])
    with tempfile.TemporaryDirectory() as folder:
        simulated, real = Path(folder) / "simulated", Path(folder) / "real"
        labels = {int(i): int(label) for i, label in zip(mnist["train_ids"], mnist["train_labels"], strict=True)}
        np.savez(
            Path(folder) / "mnist.npz",
            train_images=mnist["train_images"][chosen],
            train_labels=mnist["train_labels"][chosen],
            test_images=images,
            test_labels=np.array([labels[int(i)] for i in ids]),
        )
        nmnist.main(["--simulate", f"{folder}/mnist.npz", "--data_dir", str(simulated)])
        for split in ("Train", "Test"):  # every real recording is a test recording here
            for path in (shared / "nmnist-small").glob("NMNIST/*/*/*.bin"):
                link = real / "NMNIST" / split / path.parent.name / path.name
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path.resolve())
        recipe = ["--time_steps", "10", "--batch_size", "64", "--scheduler"]
        places = ["--save_dir", f"{folder}/checkpoints", "--log_dir", f"{folder}/logs"]
        train_nmnist.main(["--data_dir", str(simulated), "--epochs", str(epochs), *recipe, *places])
        args, _ = train_nmnist.parse_args(["--test_only", "--data_dir", str(real), *places])
        device = utils.pick_device(None)
        metrics, _, _ = train_nmnist.test(args, nmnist.load_data(args, device), device)
        return metrics["accuracy"]


def benchmark_simulator(args: argparse.Namespace) -> None:
    """Print how like the real recordings the simulated ones of the same images are."""
    real, images, ids = load_real(args.shared)
    simulated = nmnist.simulate_events(images, [np.random.default_rng([args.seed, number]) for number in ids])
    rows = compare(simulated, real)
    alone = nmnist.simulate_events(images[7:8], [np.random.default_rng([args.seed, ids[7]])])[0]
    same = alone.tobytes() == simulated[7].tobytes()
    rows.append(("the same bytes alone as among others", "yes" if same else "no", "yes", same))
    milliseconds = time_simulation(images)
    rows.append(("simulating a recording, one core", f"{milliseconds:.2f} ms", "3 ms or less", milliseconds <= 3))
    if not args.no_train:
        accuracy = train_on_simulated(args.shared, images, ids, number=10_000, epochs=10)
        title = "CNN of simulated digits on real ones"
        rows.append((title, f"{accuracy:.2%}", "98.5% or more", accuracy >= 0.985))
    machine = f"{platform.machine()}, {utils.num_cores()} cores, NumPy {np.__version__}"
    print(f"\nsimulated against the {len(real)} real recordings, seed {args.seed} ({machine})")
    for what, figure, target, met in rows:
        print(f"{what:38} {figure:>18}   {target:14} {'met' if met else 'MISSED'}")
    if not all(met for *_, met in rows):
        sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=["simulator"], help="what to measure")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder of the reference data")
    parser.add_argument("--seed", type=int, default=0, help="seed of the simulation (default: %(default)s)")
    parser.add_argument("--no_train", action="store_true", help="train no network")
    args = parser.parse_args()
    if not (args.shared / "nmnist-small").is_dir():
        raise utils.UserError(f"--shared {args.shared}: there is no nmnist-small in it")
    benchmark_simulator(args)


if __name__ == "__main__":
    utils.run_script(main)
