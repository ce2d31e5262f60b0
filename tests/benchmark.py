"""Measurements, each made by a command; the README quotes those of speed.

python tests/benchmark.py --model cnn             # speed of training, inference, batches, binning
python tests/benchmark.py --model resnet
python tests/benchmark.py --device cuda           # also the share of time that the GPU is busy
python tests/benchmark.py simulator               # the simulated camera against real recordings
python tests/benchmark.py simulator --no_train    # without training: a minute, not twenty

`simulator` needs `nmnist-small` and `mnist.npz`, by default from `../shared` beside the project.
"""

import argparse
import copy
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import snntorch as snn
import snntorch.utils
import tonic
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import models  # noqa: E402
import nmnist  # noqa: E402
import train_nmnist  # noqa: E402
import utils  # noqa: E402

INSTRUCTION_SETS = ("avx2", "avx512_f", "avx512_bf16", "amx_tile", "neon", "bf16", "sve", "sve2")

# --- snnTorch's loop ------------------------------------------------------------------------------


class Loop(nn.Module):
    """The loop of snnTorch's tutorial 7 over the layers of one of our networks, step by step.

    Topology and weights are the same, in float32 and torch's usual memory layout. The neurons are
    snnTorch's own, which keep their state (`init_hidden`) until `snntorch.utils.reset` clears it
    before each batch. snnTorch has no ALIF, so that of the ResNet is ours.
    """

    def __init__(self, network: models.SpikingNetwork):
        super().__init__()
        self.net = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
        self.step = self.step_resnet if isinstance(network, models.SpikingResNet) else self.step_cnn
        for name, layer in network.neuron_layers().items():
            # snntorch.utils.reset looks for types of neurons among a network's children, and clears
            # all that a constructor made: so they are new neurons, and children of this module.
            self.net.set_submodule(name, nn.Identity())
            setattr(self, name.replace(".", "_"), new_neuron(layer.neuron))

    def forward(self, frames):
        snntorch.utils.reset(self)
        if isinstance(self.lif1, models.ALIF):  # which snnTorch's reset does not know
            self.lif1.reset_mem()
        outputs = [self.step(x) for x in frames]
        return tuple(torch.stack(x) for x in zip(*outputs, strict=True))

    def step_cnn(self, x):
        net = self.net
        spk = self.lif1(net.norm1(net.conv1(x)))
        spk = self.lif2(net.norm2(net.conv2(spk)))
        spk = self.lif3(net.norm3(net.conv3(spk)))
        return self.output(self.lif4(net.norm4(net.fc1(spk.flatten(1)))))

    def step_resnet(self, x):
        net = self.net
        spk, _adapt, _mem = self.lif1(net.norm1(net.conv1(x)))
        spk = self.step_block(net.res1, self.res1_lif1, self.res1_lif2, spk)
        spk = self.step_block(net.res2, self.res2_lif1, self.res2_lif2, spk)
        return self.output(self.fc_syn(net.norm2(net.fc1(spk.flatten(1)))))

    def step_block(self, block: models.ResidualBlock, lif1, lif2, x):
        spk1 = lif1(block.norm1(block.conv1(x)))
        shortcut = block.shortcut(models.sum_pool(x))
        return spk1 + lif2(block.norm2(block.conv2(spk1)) + shortcut)

    def output(self, spk):
        """Return (spk, mem) of the output neurons for the spikes of the last hidden layer."""
        spk = F.dropout(spk, self.net.dropout.p, self.net.training)
        return self.lif_out(self.net.norm_out(self.net.fc_out(spk))), self.lif_out.mem


def new_neuron(neuron: snn.SpikingNeuron) -> snn.SpikingNeuron:
    """Return a new neuron with the parameters of another, which keeps its state between steps."""
    beta, threshold = float(neuron.beta), float(neuron.threshold)
    options = {"beta": beta, "threshold": threshold, "spike_grad": neuron.spike_grad}
    if isinstance(neuron, models.ALIF):
        return models.ALIF(float(neuron.alpha), adapt_scale=float(neuron.adapt_scale), **options)
    if isinstance(neuron, snn.Synaptic):
        return snn.Synaptic(float(neuron.alpha), init_hidden=True, **options)
    return snn.Leaky(init_hidden=True, **options)


# --- Speed ----------------------------------------------------------------------------------------

EPOCH = "an epoch of train_nmnist.py"
RATIOS = {  # of two rates
    "training, times snnTorch's loop": ("training", "training by snnTorch's loop"),
    "training, times the same without spikes": ("training", "training without spikes"),
    "inference, times snnTorch's loop": ("inference", "inference by snnTorch's loop"),
    "inference, times the same without spikes": ("inference", "inference without spikes"),
    "an augmented batch, share of a training step": ("training", "an augmented batch"),
    "binning, times tonic alone": ("binning", "binning by tonic alone"),
}


def benchmark_speed(args: argparse.Namespace) -> None:
    """Measure training, inference, batches and binning, against snnTorch's loop and tonic."""
    settings, device = training_settings(args)
    torch.manual_seed(0)
    network = make_network(settings, device)
    relu = argparse.Namespace(**vars(settings) | {"no_spikes": True})
    relu = make_network(relu, device)
    loop = Loop(network).to(device)
    with tempfile.TemporaryDirectory() as folder:
        recordings = make_recordings(Path(folder), 1_000)
        cached = nmnist.load_frames(recordings, args.time_steps).to(device)
        indices = torch.randperm(len(cached))[: args.batch_size]
        frames, labels = cached.batch(indices, network.dtype)
        plain = frames.float().contiguous()
        first_step = seconds_of(training_step(network, frames, labels, settings), device)
        batches = {
            "training": training_step(network, frames, labels, settings),
            "training without spikes": training_step(relu, frames, labels, settings),
            "training by snnTorch's loop": training_step(loop, plain, labels, settings),
            "inference": inference(network, frames),
            "inference without spikes": inference(relu, frames),
            "inference by snnTorch's loop": inference(loop, plain),
            "a batch": lambda: cached.batch(indices, network.dtype),
            "an augmented batch": lambda: cached.batch(indices, network.dtype, augment=True),
        }
        epoch = training_epoch(network, cached, settings)
        passes = {
            EPOCH: epoch,
            "binning": lambda: nmnist.load_frames(recordings, args.time_steps),
            "binning by tonic alone": lambda: bin_with_tonic(recordings, args.time_steps),
        }
        seconds = measure(batches, args.rounds, 3, device) | measure(passes, args.rounds, 1, device)
        busy = kernel_seconds(epoch, device) / seconds[EPOCH] if device.type == "cuda" else None
    rates = {name: len(indices) / seconds[name] for name in batches}
    rates |= {name: len(cached) / seconds[name] for name in passes}
    rows = {
        "processor": processor(),
        "device": utils.describe_device(device),
        "versions": ", ".join(f"{name} {value}" for name, value in utils.versions().items()),
        "network": f"{network.title}, T = {args.time_steps}, batches of {len(indices)}",
        "precision": f"{network.precision}, the loop fp32",
        "neurons": models.describe_backend(network),
        "first training step": f"{first_step:.1f} s",
        "60,000 recordings in such an epoch": f"{60_000 / rates[EPOCH]:.1f} s",
    }
    rows |= {name: f"{rate:10,.0f} recordings/s" for name, rate in rates.items()}
    rows |= {name: f"{rates[a] / rates[b]:10.2f}" for name, (a, b) in RATIOS.items()}
    if busy is not None:
        rows["share of an epoch in which the GPU is busy"] = f"{busy:10.2f}"
    for name, value in rows.items():
        print(f"{name:45} {value}")


def training_settings(args: argparse.Namespace) -> tuple[argparse.Namespace, torch.device]:
    """Return the flags of `train_nmnist.py`, its defaults where `args` has none, and the device."""
    device = utils.prepare_device(args.device)
    settings = train_nmnist.make_parser().parse_args([])
    for name, value in vars(args).items():
        setattr(settings, name, value)
    settings.lr = train_nmnist.DEFAULT_LR[settings.optimizer]
    return settings, device


def make_network(settings: argparse.Namespace, device: torch.device) -> models.SpikingNetwork:
    """Return a new network as `train_nmnist.py` makes it."""
    config = models.NetworkConfig.from_settings(vars(settings))
    options = models.run_options(device, settings.neuron_backend, settings.precision)
    return models.build_model(config, **options).to(device)


def make_recordings(folder: Path, number: int) -> nmnist.NMNIST:
    """Record `number` of scikit-learn's digits into `folder`, and open them."""
    images, labels = nmnist.sklearn_images()
    train = images[:number], labels[:number], np.arange(1, number + 1)
    nmnist.record_data_set(folder / "simulated", {"Train": train}, "benchmark", seed=0)
    return nmnist.NMNIST(folder / "simulated" / "Train")


def make_optimizer(network, settings: argparse.Namespace) -> torch.optim.Optimizer:
    """Return the optimizer of the settings."""
    name, lr, weight_decay = settings.optimizer, settings.lr, settings.weight_decay
    return train_nmnist.make_optimizer(network, name, lr, weight_decay)


def training_step(network, frames, labels, settings: argparse.Namespace) -> Callable:
    """Return a function that makes a training step of `network` on a batch."""
    optimizer = make_optimizer(network, settings)
    loss_fn = train_nmnist.LOSSES[settings.loss]

    def step():
        network.train()
        loss = loss_fn(*network(frames), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def inference(network, frames) -> Callable:
    """Return a function that runs `network` on a batch without training."""

    @torch.no_grad()
    def run():
        network.eval()
        network(frames)

    return run


def training_epoch(network, frames: nmnist.Frames, settings: argparse.Namespace) -> Callable:
    """Return a function that trains for an epoch: augmented batches, moving average, accuracy."""
    ema, loss_fn = copy.deepcopy(network), train_nmnist.LOSSES[settings.loss]
    optimizer = make_optimizer(network, settings)

    def epoch():
        order, bar = torch.randperm(len(frames)), tqdm(disable=True)
        size, augment = settings.batch_size, not settings.no_augment
        batches = train_nmnist.training_batches(frames, order, size, network.dtype, augment)
        train_nmnist.train_one_epoch(
            network, network, ema, optimizer, loss_fn, batches, step=0, bar=bar
        )

    return epoch


def bin_with_tonic(recordings: nmnist.NMNIST, time_steps: int) -> None:
    """Read and bin recordings by tonic alone, one after the other."""
    to_frame = tonic.transforms.ToFrame(sensor_size=nmnist.SENSOR_SIZE, n_time_bins=time_steps)
    for path in recordings.files:
        to_frame(tonic.io.read_mnist_file(str(path), dtype=recordings.dtype))


def measure(competitors: dict, rounds: int, turns: int, device: torch.device) -> dict[str, float]:
    """Return the median seconds of each; in a round, each runs `turns` times in a row."""
    seconds = {name: [] for name in competitors}
    for _ in range(rounds + 1):
        for name, run in competitors.items():
            seconds[name] += [seconds_of(run, device) for _ in range(turns)]
    # Without the first round, which warms up.
    return {name: float(np.median(values[turns:])) for name, values in seconds.items()}


def seconds_of(run: Callable, device: torch.device) -> float:
    """Return the seconds that a function takes, with what it has started on a GPU."""
    start = time.perf_counter()
    run()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start


def kernel_seconds(run: Callable, device: torch.device) -> float:
    """Return the seconds of a GPU's kernels in a function, which the profiler itself slows."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        seconds_of(run, device)
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6


def processor() -> str:
    """Return the processor's name, its cores, and what matters of its instruction sets."""
    features = torch.cpu.get_capabilities()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    known = ", ".join(name for name in INSTRUCTION_SETS if features.get(name))
    return f"{features.get('cpu_name', platform.machine())}, {cores} cores, {known}"


# --- The simulated camera against real recordings -------------------------------------------------

BLUR = 0.7  # pixels, of the event maps that are compared


def benchmark_simulator(args: argparse.Namespace) -> None:
    """Compare real recordings with simulated ones of the same images."""
    real, images, ids = load_real(args.shared)
    generators = [np.random.default_rng([0, i]) for i in ids]
    simulated = list(nmnist.simulate_events(images, generators))
    rows = compare(simulated, real)
    (alone,) = nmnist.simulate_events(images[7:8], [np.random.default_rng([0, ids[7]])])
    same = alone.tobytes() == simulated[7].tobytes()
    rows.append(("same bytes alone as among others", "yes" if same else "no", "yes", same))
    ms = simulation_ms(images)
    rows.append(("simulating a recording, one core", f"{ms:.2f} ms", "6 ms or less", ms <= 6))
    if not args.no_train:
        accuracy = train_on_simulated(args.shared, images, ids)
        result = f"{accuracy:.2%}", "98.5% or more", accuracy >= 0.985
        rows.append(("CNN of simulated digits on real ones", *result))
    print(f"\nsimulated against {len(real)} real recordings; {processor()}; NumPy {np.__version__}")
    for what, result, target, met in rows:
        print(f"{what:38} {result:>18}   {target:14} {'met' if met else 'MISSED'}")
    if not all(met for *_, met in rows):
        sys.exit(1)


def load_real(shared: Path) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Return the events of the 800 real recordings, the MNIST image of each, and their ids."""
    folder = shared / "nmnist-small" / "NMNIST"
    parts = [nmnist.NMNIST(folder / split.capitalize()) for split in nmnist.SPLITS]
    recordings = [part[i][0] for part in parts for i in range(len(part))]
    ids = np.array([int(path.stem) for part in parts for path in part.files])
    mnist = np.load(shared / "mnist.npz")
    return recordings, mnist["train_images"][np.searchsorted(mnist["train_ids"], ids)], ids


def compare(simulated: list[np.ndarray], real: list[np.ndarray]) -> list[tuple]:
    """Return rows (what, result, target, met) on how alike recordings of the same images are."""
    maps = zip(event_maps(simulated), event_maps(real), strict=True)
    numbers, real_numbers = ([len(events) for events in part] for part in (simulated, real))
    alike = np.median([np.corrcoef(*pair)[0, 1] for pair in maps])
    over_time = np.corrcoef(time_histogram(simulated), time_histogram(real))[0, 1]
    together = np.corrcoef(numbers, real_numbers)[0, 1]
    rows = [
        ("event maps, median correlation", f"{alike:.4f}", "0.95 or more", alike >= 0.95),
        ("events over time, correlation", f"{over_time:.4f}", "0.985 or more", over_time >= 0.985),
    ]
    for name, statistic, limit in (("mean", np.mean, 0.03), ("spread", np.std, 0.12)):
        value = statistic(numbers)
        change = value / statistic(real_numbers) - 1
        result = f"{value:,.0f} ({change:+.1%})", f"within {limit:.0%}", abs(change) <= limit
        rows.append((f"events a recording, {name}", *result))
    result = f"{together:.4f}", "0.95 or more", together >= 0.95
    rows.append(("events a recording, correlation", *result))
    on, real_on = (np.concatenate(part)["p"].mean() for part in (simulated, real))
    change = on - real_on
    result = f"{on:.4f} ({change:+.4f})", "within 0.01", abs(change) <= 0.01
    rows.append(("share of ON events", *result))
    for polarity, name in enumerate(("OFF", "ON")):
        ms, real_ms = (np.median(inter_event_times(part, polarity)) for part in (simulated, real))
        change = ms / real_ms - 1
        result = f"{ms:.2f} ms ({change:+.1%})", "within 20%", abs(change) <= 0.2
        rows.append((f"inter-event time, {name}", *result))
    return rows


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
    """Return the number of events in bins of 5 ms."""
    return np.histogram(np.concatenate(recordings)["t"], np.arange(0, 325_000, 5_000))[0]


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


def simulation_ms(images: np.ndarray) -> float:
    """Return the median time in ms in which one core simulates one of the images."""

    def simulate():
        list(nmnist.simulate_events(images, [np.random.default_rng(i) for i in range(len(images))]))

    (seconds,) = measure({"": simulate}, 5, 1, torch.device("cpu")).values()
    return 1000 * seconds / len(images)


def train_on_simulated(shared: Path, images: np.ndarray, ids: np.ndarray) -> float:
    """Train the CNN on 10,000 other MNIST digits, simulated; return its accuracy on real ones."""
    mnist = np.load(shared / "mnist.npz")
    others = np.flatnonzero(mnist["train_ids"] > 800)
    chosen = np.sort(np.random.default_rng(0).permutation(others)[:10_000])
    labels = mnist["train_labels"][np.searchsorted(mnist["train_ids"], ids)]
    train = mnist["train_images"][chosen], mnist["train_labels"][chosen], np.arange(1, 10_001)
    parts = {"Train": train, "Test": (images, labels, ids)}
    with tempfile.TemporaryDirectory() as folder:
        simulated, real = f"{folder}/simulated", f"{folder}/real"
        nmnist.record_data_set(Path(simulated) / "NMNIST", parts, "mnist.npz", seed=0)
        for path in (shared / "nmnist-small").glob("NMNIST/*/*/*.bin"):  # tests on all of them
            link = Path(real) / "NMNIST" / "Test" / path.parent.name / path.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
        folders = [f"--save_dir={folder}", f"--log_dir={folder}"]
        recipe = ["--time_steps=10", "--batch_size=64", "--scheduler"]
        train_nmnist.main([f"--data_dir={simulated}", *recipe, *folders])
        train_nmnist.main([f"--data_dir={real}", "--test_only", *folders])
        return utils.read_json(f"{folder}/cnn_test_metrics.json")["accuracy"]


# --- The script -----------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the flags; without the name of a benchmark, those of `speed`."""
    argv = sys.argv[1:] if argv is None else argv
    parser = utils.make_parser(__doc__)
    commands = parser.add_subparsers(required=True, help="what to measure (default: speed)")
    speed = commands.add_parser("speed", help=benchmark_speed.__doc__)
    speed.set_defaults(run=benchmark_speed)
    utils.add_flag(speed, "--model", "cnn", "network", choices=list(models.NETWORKS))
    utils.add_flag(speed, "--time_steps", 25, "T", type=utils.number(int, 1))
    text = "recordings of a batch"
    utils.add_flag(speed, "--batch_size", 128, text, type=utils.number(int, 1, 1000))
    text = "how often each is measured, besides a warm-up"
    utils.add_flag(speed, "--rounds", 5, text, type=utils.number(int, 1))
    utils.add_device_flags(speed)
    simulator = commands.add_parser("simulator", help=benchmark_simulator.__doc__)
    simulator.set_defaults(run=benchmark_simulator)
    default = ROOT.parent / "shared"
    utils.add_flag(simulator, "--shared", default, "folder of the reference data", type=Path)
    simulator.add_argument("--no_train", action="store_true", help="train no network")
    named = argv and argv[0] in (*commands.choices, "-h", "--help")
    return parser.parse_args(argv if named else ["speed", *argv])


def main() -> None:
    args = parse_args()
    args.run(args)


if __name__ == "__main__":
    utils.run_script(main)
