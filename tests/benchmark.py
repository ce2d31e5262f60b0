"""Measurements that the README quotes, each made by a command.

    python tests/benchmark.py                                     # speed: training, inference, batches, binning
    python tests/benchmark.py --model resnet --json speed.json    # of the other network, written as JSON, too
    python tests/benchmark.py --device cuda                       # on a GPU, with the share of time that it is busy
    python tests/benchmark.py simulator                           # the simulated camera against 800 real recordings
    python tests/benchmark.py simulator --no_train                # without training a network: a minute, not twenty
    python tests/benchmark.py accuracy --data_dir DIR             # accuracy against training time: a grid of networks
    python tests/benchmark.py accuracy --data_dir DIR --model cnn --width 1 --time_steps 10 --epochs 3    # a part of it

`simulator` needs `nmnist-small` and `mnist.npz`, by default from the folder `../shared` beside the project.
"""

import argparse
import copy
import dataclasses
import itertools
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import snntorch
import snntorch.functional as SF
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

# ---------------------------------------------------------------------------------------------------------
# Speed
# ---------------------------------------------------------------------------------------------------------

EPOCH = "a step of train_nmnist.py, batch included"


class Loop(nn.Module):
    """The loop of snnTorch's tutorial 7, on N-MNIST, over the layers of one of our networks: all of them step by step.

    The same topology and weights, in float32 and torch's usual memory layout, with snnTorch's own neurons, which keep
    their state (`init_hidden`) until `snntorch.utils.reset` clears it before each batch. snnTorch has no ALIF, so that
    of the ResNet is ours.
    """

    def __init__(self, network: models.SpikingNetwork):
        super().__init__()
        self.net = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
        self.step = self.step_resnet if isinstance(network, models.SpikingResNet) else self.step_cnn
        for name, layer in network.neuron_layers().items():
            # snntorch.utils.reset looks for types of neurons among a network's children, and clears all that a
            # constructor made: so the neurons are new ones, and children of this module.
            self.net.set_submodule(name, nn.Identity())
            setattr(self, name.replace(".", "_"), new_neuron(layer.neuron))

    def forward(self, frames):
        snntorch.utils.reset(self)
        for neuron in self.children():
            if isinstance(neuron, models.ALIF):  # which snnTorch's reset does not know
                neuron.reset_mem()
        outputs = [self.step(x) for x in frames]
        return tuple(torch.stack(x) for x in zip(*outputs, strict=True))

    def conv_pool(self, conv: nn.Conv2d, x):
        return F.max_pool2d(F.conv2d(x, conv.weight, padding=1), 2)

    def output(self, spk):
        """Return (spk, mem) of the output neurons for the spikes of the last hidden layer."""
        spk = F.dropout(spk, self.net.dropout.p, self.training)
        return self.lif_out(self.net.norm_out(self.net.fc_out(spk))), self.lif_out.mem

    def step_cnn(self, x):
        net = self.net
        spk = self.lif1(net.norm1(self.conv_pool(net.conv1, x)))
        spk = self.lif2(net.norm2(self.conv_pool(net.conv2, spk)))
        spk = self.lif3(net.norm3(self.conv_pool(net.conv3, spk)))
        return self.output(self.lif4(net.norm4(net.fc1(spk.movedim(1, -1).flatten(1)))))

    def step_resnet(self, x):
        net = self.net
        spk, _adapt, _mem = self.lif1(net.norm1(self.conv_pool(net.conv1, x)))
        spk = self.step_block(net.res1, self.res1_lif1, self.res1_lif2, spk)
        spk = self.step_block(net.res2, self.res2_lif1, self.res2_lif2, spk)
        return self.output(self.fc_syn(net.norm2(net.fc1(spk.movedim(1, -1).flatten(1)))))

    def step_block(self, block: models.ResidualBlock, lif1, lif2, x):
        spk1 = lif1(block.norm1(self.conv_pool(block.conv1, x)))
        return spk1 + lif2(block.norm2(block.conv2(spk1)) + block.shortcut(models.sum_pool(x)))


def new_neuron(neuron: snntorch.SpikingNeuron) -> snntorch.SpikingNeuron:
    """Construct a neuron with the parameters of another that keeps its state from step to step."""
    beta, threshold, spike_grad = float(neuron.beta), float(neuron.threshold), neuron.spike_grad
    if isinstance(neuron, models.ALIF):
        return models.ALIF(float(neuron.rho), beta, float(neuron.adapt_scale), threshold, spike_grad)
    if isinstance(neuron, snntorch.Synaptic):
        return snntorch.Synaptic(float(neuron.alpha), beta, threshold, spike_grad, init_hidden=True)
    return snntorch.Leaky(beta, threshold, spike_grad, init_hidden=True)


def without_spikes(network: models.SpikingNetwork) -> models.SpikingNetwork:
    """Return the network of `--no_spikes` with the weights of `network`."""
    relu = models.build_model(dataclasses.replace(network.config, no_spikes=True))
    relu.load_state_dict(network.state_dict(), strict=False)  # without the neurons' parameters
    return relu.to(network.fc_out.weight.device)


def training_step(network, frames, labels):
    """Return a function that makes a training step of `network` on a batch."""
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    loss_fn = SF.ce_rate_loss()

    def step():
        network.train()
        _, mem = network(frames)
        loss = loss_fn(mem, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def inference(network, frames):
    """Return a function that runs `network` on a batch without learning."""

    @torch.no_grad()
    def run():
        network.eval()
        network(frames)

    return run


def measure(competitors: dict, rounds: int, turns: int, device: torch.device) -> dict[str, float]:
    """Return the median seconds of each competitor: a round gives each so many turns in a row, one after the other."""
    seconds = {name: [] for name in competitors}
    for _ in range(rounds + 1):
        for name, run in competitors.items():
            for _ in range(turns):
                start = time.perf_counter()
                run()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(values[turns:])) for name, values in seconds.items()}  # the first round warms up


def training_epoch(args: argparse.Namespace, precision: str, frames: nmnist.Frames, device: torch.device):
    """Return a function that trains for an epoch as `train_nmnist.py` does: augmented batches, moving average."""
    flags = {"model": args.model, "batch_size": args.batch_size, "precision": precision, "device": device.type}
    train_args, _ = train_nmnist.parse_args([f"--{name}={value}" for name, value in flags.items()])
    state = train_nmnist.make_state(train_args, device)

    def epoch():
        order = torch.randperm(len(frames))
        batches = train_nmnist.training_batches(train_args, order, frames, state.network.dtype)
        train_nmnist.train_one_epoch(state, batches, tqdm(total=len(order), disable=True))

    return epoch


def kernel_seconds(run, device: torch.device) -> float:
    """Return the time that a GPU's kernels take in `run`, which the profiler itself slows."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize(device)
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6


def make_recordings(folder: Path, number: int) -> None:
    """Record `number` of scikit-learn's digits as training and as many as test recordings into `folder`."""
    images, labels = nmnist.sklearn_images()
    part = nmnist.Images(images[:number], labels[:number], np.arange(1, number + 1))
    nmnist.record_data_set(folder / "NMNIST", {"Train": part, "Test": part}, nmnist.describe_simulator("benchmark", 0))


def bin_with_tonic(recordings: nmnist.NMNIST, time_steps: int) -> None:
    """Read and bin recordings with tonic alone, one after the other, as its data set and transform do."""
    to_frame = tonic.transforms.ToFrame(sensor_size=nmnist.SENSOR_SIZE, n_time_bins=time_steps)
    for index in range(len(recordings)):
        to_frame(tonic.datasets.NMNIST.__getitem__(recordings, index)[0])


def benchmark_speed(args: argparse.Namespace) -> None:
    """Print how long training, inference, batches and binning take, against snnTorch's loop and tonic alone."""
    device = utils.pick_device(args.device)
    utils.prepare_device(device)
    precision = utils.pick_precision(args.precision, device)
    torch.manual_seed(args.seed)
    config = models.NetworkConfig(model=args.model, dropout=0.2, precision=precision)
    network = models.build_model(config).to(device)
    batch_size = args.batch_size
    with tempfile.TemporaryDirectory() as folder:
        make_recordings(Path(folder), 1_000)
        recordings = nmnist.NMNIST(folder, "train")
        cached = nmnist.bin_recordings(recordings, args.time_steps).to(device)
        order = torch.randperm(len(cached))[:batch_size]
        frames, labels = cached.batch(order, network.dtype)
        plain = frames.float().contiguous()
        loop, floor = Loop(network).to(device), without_spikes(network)
        epoch = training_epoch(args, precision, cached, device)
        start = time.perf_counter()
        ours = training_step(network, frames, labels)
        ours()
        first_step = time.perf_counter() - start
        speed = measure(
            {
                "our training step": ours,
                "the same without spikes (ReLU)": training_step(floor, frames, labels),
                "snnTorch's loop, training step": training_step(loop, plain, labels),
                "our inference": inference(network, frames),
                "without spikes, inference": inference(floor, frames),
                "snnTorch's loop, inference": inference(loop, plain),
                "a batch from the cache": lambda: cached.batch(order, network.dtype),
                "an augmented batch": lambda: cached.batch(order, network.dtype, augment=True),
            },
            args.rounds,
            turns=3,
            device=device,
        )
        speed |= measure({EPOCH: epoch}, args.rounds, turns=1, device=device)
        busy = kernel_seconds(epoch, device) / speed[EPOCH] if device.type == "cuda" else None
        speed[EPOCH] *= args.batch_size / len(cached)
        binning = measure(
            {
                "binning, ours": lambda: nmnist.bin_recordings(recordings, args.time_steps),
                "binning, tonic alone": lambda: bin_with_tonic(recordings, args.time_steps),
            },
            args.rounds,
            turns=1,
            device=torch.device("cpu"),
        )
    report_speed(args, device, precision, first_step, speed, binning, len(recordings), busy)


def report_speed(args, device, precision, first_step, speed, binning, recordings: int, busy: float | None) -> None:
    """Print the table of `benchmark_speed`, and write it to `--json`."""
    head = {
        "machine": f"{utils.processor_name()}, {num_cores()} cores",
        "device": utils.describe_device(device),
        "versions": f"torch {torch.__version__}, snnTorch {snntorch.__version__}, tonic {tonic.__version__}",
        "model": args.model,
        "time steps": args.time_steps,
        "batch size": args.batch_size,
        "precision": f"{precision}, the loop fp32",
        "neurons": "uncompiled" if models.compiler_error else "compiled",
        "rounds": args.rounds,
    }
    rates = {name: args.batch_size / seconds for name, seconds in speed.items()}
    rates |= {name: recordings / seconds for name, seconds in binning.items()}
    ratios = {
        "training, times snnTorch's loop": rates["our training step"] / rates["snnTorch's loop, training step"],
        "training, of the speed without spikes": rates["our training step"] / rates["the same without spikes (ReLU)"],
        "inference, times snnTorch's loop": rates["our inference"] / rates["snnTorch's loop, inference"],
        "making a batch, of a training step": speed["a batch from the cache"] / speed["our training step"],
        "an augmented batch, of a training step": speed["an augmented batch"] / speed["our training step"],
        "binning, times tonic alone": rates["binning, ours"] / rates["binning, tonic alone"],
    }
    if busy is not None:
        ratios["share of training in which the GPU is busy"] = busy
    print()
    for name, value in head.items():
        print(f"{name:42} {value}")
    print(f"{'first training step':42} {first_step:.1f} s")
    print(f"{'an epoch of 60,000 recordings':42} {60_000 / rates[EPOCH]:.1f} s")
    print(f"\n{'medians':42} {'ms a batch':>12} {'recordings/s':>14}")
    for name, rate in rates.items():
        milliseconds = f"{1000 * speed[name]:12.1f}" if name in speed else " " * 12
        print(f"{name:42} {milliseconds} {rate:14,.0f}")
    print()
    for name, ratio in ratios.items():
        print(f"{name:42} {ratio:12.2f}")
    if args.json:
        content = {**head, "first_step_seconds": first_step, "recordings_per_second": rates, "ratios": ratios}
        utils.write_json(args.json, content)
        print(f"\nwritten to {args.json}")


def num_cores() -> int:
    """Return the number of CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---------------------------------------------------------------------------------------------------------
# The simulated camera against real recordings
# ---------------------------------------------------------------------------------------------------------

BLUR = 0.7  # pixels, of the event maps that are compared


def load_real(shared: Path):
    """Return the 800 real recordings, the MNIST image behind each, and their ids."""
    parts = [nmnist.NMNIST(shared / "nmnist-small", split) for split in nmnist.SPLITS]
    paths = [path for part in parts for path in part.data]
    recordings = [part[i][0] for part in parts for i in range(len(part))]
    ids = np.array([int(Path(path).stem) for path in paths])
    mnist = np.load(shared / "mnist.npz")
    index = {int(number): i for i, number in enumerate(mnist["train_ids"])}
    return recordings, mnist["train_images"][[index[number] for number in ids]], ids


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
    """Return rows (what, result, target, met) of how alike two lists of recordings of the same images are."""
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
        list(nmnist.simulate_events(images, generators))
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
        folders = ["--save_dir", f"{folder}/checkpoints", "--log_dir", f"{folder}/logs"]
        train_nmnist.main(["--data_dir", str(simulated), "--epochs", str(epochs), *recipe, *folders])
        args, _ = train_nmnist.parse_args(["--test_only", "--data_dir", str(real), *folders])
        device = utils.pick_device(None)
        metrics, _, _ = train_nmnist.test(args, nmnist.load_data(args, device), device)
        return metrics["accuracy"]


def benchmark_simulator(args: argparse.Namespace) -> None:
    """Print how like the real recordings the simulated ones of the same images are."""
    if not (args.shared / "nmnist-small").is_dir():
        raise utils.UserError(f"--shared {args.shared}: there is no nmnist-small in it")
    real, images, ids = load_real(args.shared)
    simulated = list(nmnist.simulate_events(images, [np.random.default_rng([args.seed, i]) for i in ids]))
    rows = compare(simulated, real)
    (alone,) = nmnist.simulate_events(images[7:8], [np.random.default_rng([args.seed, ids[7]])])
    same = alone.tobytes() == simulated[7].tobytes()
    rows.append(("the same bytes alone as among others", "yes" if same else "no", "yes", same))
    milliseconds = time_simulation(images)
    rows.append(("simulating a recording, one core", f"{milliseconds:.2f} ms", "3 ms or less", milliseconds <= 3))
    if not args.no_train:
        accuracy = train_on_simulated(args.shared, images, ids, number=10_000, epochs=10)
        title = "CNN of simulated digits on real ones"
        rows.append((title, f"{accuracy:.2%}", "98.5% or more", accuracy >= 0.985))
    machine = f"{platform.machine()}, {num_cores()} cores, NumPy {np.__version__}"
    print(f"\nsimulated against the {len(real)} real recordings, seed {args.seed} ({machine})")
    for what, result, target, met in rows:
        print(f"{what:38} {result:>18}   {target:14} {'met' if met else 'MISSED'}")
    if not all(met for *_, met in rows):
        sys.exit(1)


# ---------------------------------------------------------------------------------------------------------
# Accuracy against time
# ---------------------------------------------------------------------------------------------------------


def benchmark_accuracy(args: argparse.Namespace) -> None:
    """Train the grid of networks that the flags name, one after the other; print each one's accuracy and time.

    What an earlier call has trained in `--output_dir` is not trained again; a run that was stopped goes on.
    """
    for model in args.model:
        compile_kernels(model)
    rows = []
    for cell in itertools.product(args.model, args.width, args.time_steps, args.epochs):
        results = [train_cell(args, *cell, seed) for seed in args.seed]
        rows.append(dict(zip(("model", "width", "T", "epochs"), cell, strict=True)))
        rows[-1]["machine"] = "; ".join(sorted({result.pop("machine") for result in results}))
        rows[-1] |= {name: float(np.mean([result[name] for result in results])) for name in results[0]}
    titles = (
        f"{'model':8} {'width':>5} {'T':>3} {'epochs':>6} {'weights':>10} {'accuracy':>9} {'last 3':>8} {'training':>9}"
    )
    machines = "; ".join(sorted({row["machine"] for row in rows}))
    print(f"\n{machines}; {len(args.seed)} seed(s); `--scheduler`")
    print(f"{titles} {'recordings/s':>12} {'operations':>11} {'energy':>8}")
    for row in sorted(rows, key=lambda row: row["seconds"]):
        print(
            f"{row['model']:8} {row['width']:5} {row['T']:3} {row['epochs']:6} {row['parameters']:10,.0f} "
            f"{row['accuracy']:9.2%} {row['last_three']:8.2%} {row['seconds'] / 60:5.1f} min "
            f"{row['recordings_per_second']:12,.0f} {row['synaptic_operations'] / 1e6:9.2f} M "
            f"{row['energy_uj']:5.2f} uJ"
        )
    if args.json:
        utils.write_json(args.json, rows)
        print(f"\nwritten to {args.json}")


def train_cell(args: argparse.Namespace, model: str, width: int, time_steps: int, epochs: int, seed: int) -> dict:
    """Train one network of the grid with one seed, or go on with it; return its results."""
    cell = f"{model}_width{width}_T{time_steps}_epochs{epochs}_batch{args.batch_size}_seed{seed}"
    folder = args.output_dir / cell
    flags = {"model": model, "width": width, "time_steps": time_steps, "epochs": epochs, "seed": seed}
    flags |= {"data_dir": args.data_dir, "dataset": args.dataset, "batch_size": args.batch_size}
    flags |= {"save_dir": folder, "log_dir": folder}
    train_nmnist.main(["--scheduler", "--resume", *(f"--{name}={value}" for name, value in flags.items())])
    metrics = json.loads((folder / f"{model}_test_metrics.json").read_text())
    history = json.loads((folder / f"{model}_history.json").read_text())
    return {
        "accuracy": metrics["accuracy"],
        "last_three": np.mean([entry["test_accuracy"] for entry in history[-3:]]),
        "seconds": sum(entry["seconds"] for entry in history),
        "recordings_per_second": np.median([entry["recordings_per_second"] for entry in history]),
        "parameters": metrics["parameters"],
        "synaptic_operations": metrics["synaptic_operations"],
        "energy_uj": metrics["energy_uj"]["spiking_events"],
        "machine": metrics["machine"],
    }


def compile_kernels(model: str) -> None:
    """Make a training step on two empty recordings, so that compiling is not counted as training."""
    device = utils.pick_device(None)
    config = models.NetworkConfig(model=model, precision=utils.pick_precision("auto", device))
    frames, labels = torch.zeros(6, 2, 2, 34, 34, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    training_step(models.build_model(config).to(device), frames, labels)()


def add_speed_arguments(parser: argparse.ArgumentParser) -> None:
    utils.add_device_argument(parser)
    utils.add_precision_argument(parser)
    parser.add_argument("--model", choices=list(models.NETWORKS), default="cnn", help="network (default: %(default)s)")
    parser.add_argument("--time_steps", type=utils.number(int, 1), default=25, help="T (default: %(default)s)")
    parser.add_argument("--batch_size", type=utils.number(int, 1, 1000), default=128, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=utils.number(int, 1), default=5, help="rounds (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the table as JSON, too")


def add_simulator_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder of the reference data")
    parser.add_argument("--seed", type=int, default=0, help="seed of the simulation (default: %(default)s)")
    parser.add_argument("--no_train", action="store_true", help="train no network")


def add_accuracy_arguments(parser: argparse.ArgumentParser) -> None:
    grid = {"nargs": "+", "help": "(default: %(default)s)"}
    parser.add_argument("--data_dir", default="./data", help="folder of the data sets (default: %(default)s)")
    parser.add_argument("--dataset", choices=nmnist.DATASETS, default="auto", help="as in training")
    parser.add_argument("--model", nargs="+", choices=list(models.NETWORKS), default=list(models.NETWORKS))
    parser.add_argument("--width", default=[1, 2], type=utils.number(int, 1, 64), **grid)
    parser.add_argument("--time_steps", default=[5, 10, 25], type=utils.number(int, 1, 1000), **grid)
    parser.add_argument("--epochs", default=[1, 3, 10], type=utils.number(int, 1), **grid)
    parser.add_argument("--seed", default=[0], type=utils.number(int, 0, 2**32 - 1), **grid)
    parser.add_argument("--batch_size", default=128, type=utils.number(int, 1), help="(default: %(default)s)")
    text = "folder of checkpoints and logs (default: %(default)s)"
    parser.add_argument("--output_dir", type=Path, default="./logs/benchmark", help=text)
    parser.add_argument("--json", metavar="FILE", help="write the table as JSON, too")


BENCHMARKS = {
    "speed": (add_speed_arguments, benchmark_speed),
    "simulator": (add_simulator_arguments, benchmark_simulator),
    "accuracy": (add_accuracy_arguments, benchmark_accuracy),
}


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Return the flags; without the name of a benchmark, those of `speed`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="benchmark", help="what to measure (default: speed)")
    for name, (add_arguments, run) in BENCHMARKS.items():
        command = commands.add_parser(name, help=run.__doc__.split(".")[0].lower())
        add_arguments(command)
        command.set_defaults(run=run)
    named = argv and argv[0] in (*BENCHMARKS, "-h", "--help")
    return parser.parse_args(argv if named else ["speed", *argv])


def main() -> None:
    args = parse_args(sys.argv[1:])
    args.run(args)


if __name__ == "__main__":
    utils.run_script(main)
