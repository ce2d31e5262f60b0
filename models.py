"""Spiking networks for N-MNIST: `SpikingCNN`, `SpikingResNet`, and how their neurons run over time.

    network = build_model(NetworkConfig(model="cnn"))
    spk, mem = network(frames)      # frames [T, B, 2, 34, 34]; spk and mem [T, B, 10]
    digits = predict(spk, mem)      # [B]

T is the number of time steps, B that of recordings. The layers run one after the other, each over
the whole sequence: a convolution sees T * B frames at once. Read from the top: the networks, how a
neuron runs over time, building a network, its predictions. The compiled kernels may be skipped:
they change the speed, and a neuron's results by no more than rounding. Measuring activity comes
last. This file imports no other of the project.
"""

import functools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import snntorch as snn
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from snntorch import surrogate
from torch import nn
from torch.utils.dlpack import to_dlpack

NUM_DIGITS = 10
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # by precision
READOUTS = ("membrane", "rate", "latency")

# --- Networks -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NetworkConfig:
    """The settings that define a network: set by flags, passed to constructors, saved with it."""

    model: str = "cnn"  # a key of NETWORKS
    beta: float = 0.5  # decay of the membrane potential per step
    threshold: float = 1.0  # membrane potential above which a neuron fires
    alpha: float = 0.5  # decay per step of ALIF's adaptation and of the synaptic current (resnet)
    dropout: float = 0.0  # probability of dropping a neuron of the last hidden layer
    width: int = 1  # factor on the channels and the hidden layer
    learn_beta: bool = False  # learn one beta per layer
    readout: str = "membrane"  # or "rate" or "latency": what the prediction is made of (`predict`)
    no_spikes: bool = False  # ReLU in place of the neurons: the baseline without spikes

    @classmethod
    def from_settings(cls, settings: dict) -> "NetworkConfig":
        """Return the network's part of a checkpoint's settings or of a script's flags."""
        return cls(**{field.name: settings[field.name] for field in fields(cls)})

    @property
    def name(self) -> str:
        """The network's name in files, such as 'cnn' or, without spikes, 'cnn_relu'."""
        return f"{self.model}_relu" if self.no_spikes else self.model


class NetworkError(Exception):
    """A network or a neuron that cannot be used. The message is one line."""


class SpikingNetwork(nn.Module):
    """Base of all networks. To add your own, define two methods, and register it in `NETWORKS`:

    - `__init__(self, config)` calls `super().__init__(config)`, then makes the layers: neurons as
      `self.make_layer(self.make_lif(shape))`, connections as `nn.Conv2d`, `ConvPool` or
      `nn.Linear`, which `ActivityMeter` counts. It may end with `self.init_currents()`.
    - `forward_layers(self, x, T)` runs each layer once, on all frames x [T * B, 2, 34, 34], and
      returns what the last layer of neurons returns: (spk, mem), both [T * B, 10].
    """

    slope = 5  # steepness of the surrogate gradient; at snnTorch's 25, little reaches early layers

    def __init__(self, config: NetworkConfig):
        super().__init__()
        self.config = config
        self.precision = "fp32"  # of the layers, set by `build_model`; neurons' state is float32
        self.note = ""  # for titles: " (precision: fp32, was bf16)" if it was trained otherwise

    def forward(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map frames [T, B, 2, 34, 34] to (spk, mem) of the output neurons, both [T, B, 10]."""
        if frames.dim() != 5 or frames.shape[2:] != (2, 34, 34) or len(frames) == 0:
            raise ValueError(f"frames are {list(frames.shape)}; they must be [T, B, 2, 34, 34]")
        T = len(frames)
        # channels_last is several times faster than torch's default memory format on a CPU.
        x = frames.flatten(0, 1).to(self.dtype, memory_format=torch.channels_last)
        with torch.autocast(frames.device.type, self.dtype, enabled=self.dtype != torch.float32):
            spk, mem = self.forward_layers(x, T)
        return spk.float().unflatten(0, (T, -1)), mem.float().unflatten(0, (T, -1))

    def make_lif(self, shape: Sequence[int]) -> snn.SpikingNeuron:
        """Return a LIF neuron for a layer whose frames have `shape`, [C, H, W] or [N].

        A subclass may return any other; `shape` is for those that need it, as recurrent ones do.
        """
        return snn.Leaky(self.config.beta, self.config.threshold, **self.neuron_options())

    def neuron_options(self) -> dict:
        """Return the options that all neurons of a network share."""
        return {"spike_grad": FastSigmoid(self.slope), "learn_beta": self.config.learn_beta}

    def make_layer(self, neuron: snn.SpikingNeuron) -> nn.Module:
        """Return a layer that runs `neuron` over time; in a network without spikes, a ReLU."""
        return WithoutSpikes() if self.config.no_spikes else NeuronLayer(neuron)

    def init_currents(self) -> None:
        """Set the norms' weights to `initial_current`, the spread of the currents at the start."""
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                nn.init.constant_(module.weight, initial_current(self.config))

    def neuron_layers(self) -> dict[str, nn.Module]:
        """Return the layers of neurons by name, such as `lif1` and `res1.lif2`."""
        kinds = NeuronLayer, WithoutSpikes
        return {name: layer for name, layer in self.named_modules() if isinstance(layer, kinds)}

    def learned_decays(self) -> dict[str, nn.Parameter]:
        """Return the decays that are learned: `lif1.beta`, and alpha where snnTorch learns it.

        Those of a user's own neuron are left out: its beta may mean something else.
        """
        decays = {}
        for layer, module in self.neuron_layers().items():
            for name, value in module.named_parameters():
                package = type(module.neuron).__module__.split(".")[0]
                if package in ("snntorch", __name__) and name in ("neuron.beta", "neuron.alpha"):
                    decays[f"{layer}.{name.removeprefix('neuron.')}"] = value
        return decays

    @torch.no_grad()
    def clamp_decays(self) -> None:
        """Put learned decays that left 0 to 1 back; to be called after each training step.

        snnTorch clamps only the value that it uses; a parameter outside gets no gradient, and would
        stay there.
        """
        for decay in self.learned_decays().values():
            decay.clamp_(0, 1)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the layers."""
        return DTYPES[self.precision]

    @property
    def title(self) -> str:
        """The network's name in figures."""
        name = type(self).__name__
        return f"{name.removeprefix('Spiking')} with ReLU" if self.config.no_spikes else name


class SpikingCNN(SpikingNetwork):
    """Convolutions with LIF neurons; shapes are of one frame, at width 1:

    conv1, max pool, norm1, lif1         2 x 34 x 34 -> 16 x 17 x 17
    conv2, max pool, norm2, lif2                     -> 32 x 8 x 8
    conv3, max pool, norm3, lif3                     -> 64 x 4 x 4
    fc1, norm4, lif4, dropout                        -> 128
    fc_out, norm_out, lif_out                        -> 10
    """

    def __init__(self, config: NetworkConfig):
        super().__init__(config)
        w = config.width
        self.conv1 = ConvPool(2, 16 * w)
        self.norm1 = nn.BatchNorm2d(16 * w)
        self.lif1 = self.make_layer(self.make_lif([16 * w, 17, 17]))
        self.conv2 = ConvPool(16 * w, 32 * w)
        self.norm2 = nn.BatchNorm2d(32 * w)
        self.lif2 = self.make_layer(self.make_lif([32 * w, 8, 8]))
        self.conv3 = ConvPool(32 * w, 64 * w)
        self.norm3 = nn.BatchNorm2d(64 * w)
        self.lif3 = self.make_layer(self.make_lif([64 * w, 4, 4]))
        self.fc1 = nn.Linear(64 * w * 4 * 4, 128 * w, bias=False)
        self.norm4 = nn.BatchNorm1d(128 * w)
        self.lif4 = self.make_layer(self.make_lif([128 * w]))
        self.dropout = TimeSharedDropout(config.dropout)
        self.fc_out = nn.Linear(128 * w, NUM_DIGITS, bias=False)
        self.norm_out = nn.BatchNorm1d(NUM_DIGITS)
        self.lif_out = self.make_layer(self.make_lif([NUM_DIGITS]))
        self.init_currents()

    def forward_layers(self, x, T):
        x, _ = self.lif1(self.norm1(self.conv1(x)), T)
        x, _ = self.lif2(self.norm2(self.conv2(x)), T)
        x, _ = self.lif3(self.norm3(self.conv3(x)), T)
        x, _ = self.lif4(self.norm4(self.fc1(x.flatten(1))), T)
        x = self.dropout(x, T)
        return self.lif_out(self.norm_out(self.fc_out(x)), T)


class SpikingResNet(SpikingNetwork):
    """Residual blocks, and three kinds of neurons; shapes are of one frame, at width 1:

    conv1, max pool, norm1, lif1 (ALIF)           2 x 34 x 34 -> 16 x 17 x 17
    res1 (`ResidualBlock`)                                    -> 32 x 8 x 8
    res2 (`ResidualBlock`)                                    -> 64 x 4 x 4
    fc1, norm2, fc_syn (synaptic LIF), dropout                -> 128
    fc_out, norm_out, lif_out                                 -> 10
    """

    slope = 2  # a wider surrogate gradient, for more layers of neurons one after the other
    adapt_scale = 0.5  # in thresholds: rise of the threshold of a neuron that fires at every step

    def __init__(self, config: NetworkConfig):
        super().__init__(config)
        w = config.width
        self.conv1 = ConvPool(2, 16 * w)
        self.norm1 = nn.BatchNorm2d(16 * w)
        self.lif1 = self.make_layer(self.make_alif())
        self.res1 = self.make_block(16 * w, [32 * w, 8, 8])
        self.res2 = self.make_block(32 * w, [64 * w, 4, 4])
        self.fc1 = nn.Linear(64 * w * 4 * 4, 128 * w, bias=False)
        self.norm2 = nn.BatchNorm1d(128 * w)
        self.fc_syn = self.make_layer(self.make_synaptic())
        self.dropout = TimeSharedDropout(config.dropout)
        self.fc_out = nn.Linear(128 * w, NUM_DIGITS, bias=False)
        self.norm_out = nn.BatchNorm1d(NUM_DIGITS)
        self.lif_out = self.make_layer(self.make_lif([NUM_DIGITS]))
        self.init_currents()

    def make_block(self, in_channels, shape):
        lif1 = self.make_layer(self.make_lif(shape))
        lif2 = self.make_layer(self.make_lif(shape))
        return ResidualBlock(in_channels, shape[0], lif1, lif2)

    def make_alif(self):
        config = self.config
        adapt_scale = self.adapt_scale * config.threshold
        options = self.neuron_options()
        return ALIF(config.alpha, config.beta, adapt_scale, config.threshold, **options)

    def make_synaptic(self):
        config = self.config
        options = self.neuron_options()
        return snn.Synaptic(config.alpha, config.beta, config.threshold, **options)

    def init_currents(self):
        super().init_currents()
        current = initial_current(self.config)
        with torch.no_grad():  # the shortcuts have no norm
            self.res1.shortcut.weight *= current
            self.res2.shortcut.weight *= current
        if not self.config.no_spikes:  # fc_syn sums twice: to a synaptic current, to a potential
            nn.init.constant_(self.norm2.weight, current * input_scale(self.config.alpha))

    def forward_layers(self, x, T):
        x, _ = self.lif1(self.norm1(self.conv1(x)), T)
        x = self.res1(x, T)
        x = self.res2(x, T)
        x, _ = self.fc_syn(self.norm2(self.fc1(x.flatten(1))), T)
        x = self.dropout(x, T)
        return self.lif_out(self.norm_out(self.fc_out(x)), T)


class ResidualBlock(nn.Module):
    """Two layers of neurons, whose spikes are added; the second one also gets the block's input:

        spk1 = lif1(norm1(max_pool(conv1(x))))
        spk2 = lif2(norm2(conv2(spk1)) + shortcut(sum_pool(x)))
        output = spk1 + spk2    # 0, 1 or 2 at each place

    x [T * B, in_channels, H, W] -> [T * B, out_channels, H // 2, W // 2]. The sum lets gradients
    past the second neuron; the blocks of Fang et al. 2021, "Deep residual learning in spiking
    neural networks" (SEW), add the spikes of the shortcut instead.
    """

    def __init__(self, in_channels: int, out_channels: int, lif1: nn.Module, lif2: nn.Module):
        super().__init__()
        self.conv1 = ConvPool(in_channels, out_channels)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.lif1 = lif1
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.lif2 = lif2

    def forward(self, x, T):
        spk1, _ = self.lif1(self.norm1(self.conv1(x)), T)
        spk2, _ = self.lif2(self.norm2(self.conv2(spk1)) + self.shortcut(sum_pool(x)), T)
        return spk1 + spk2


class ConvPool(nn.Conv2d):
    """Convolution (3 x 3, padded by 1), then max pooling (2 x 2), in one layer of connections.

    x [T * B, C, H, W] -> [T * B, D, H // 2, W // 2]. Pooling here makes a network 2.5 times as fast
    as pooling after the norm and the neurons.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1, bias=False)

    def forward(self, x):
        return F.max_pool2d(super().forward(x), 2)


class TimeSharedDropout(nn.Dropout):
    """Dropout with one mask for all steps of a recording: spk [T * B, N] -> [T * B, N].

    A neuron is dropped for a whole recording, as in SpikingJelly's multi-step `Dropout`.
    """

    def forward(self, spk, T):
        if not self.training:
            return spk
        spk = spk.unflatten(0, (T, -1))
        mask = super().forward(torch.ones_like(spk[0]))
        return (spk * mask).flatten(0, 1)


def sum_pool(x: torch.Tensor) -> torch.Tensor:
    """Sum each window (2 x 2): x [T * B, C, H, W] -> [T * B, C, H // 2, W // 2]."""
    return F.avg_pool2d(x, 2, divisor_override=1)


def initial_current(config: NetworkConfig) -> float:
    """Return the standard deviation of a LIF layer's current at the start; 1 without spikes.

    It is one threshold up to beta = 0.5: such a layer is neither silent nor saturated (Zheng et al.
    2021, threshold-dependent normalization). Above, it falls as (1 - beta)**0.5, or currents would
    sum to potentials far from the threshold, where the surrogate gradient is small.
    """
    if config.no_spikes:
        return 1.0
    return config.threshold * min(1.0, input_scale(config.beta) / input_scale(0.5))


def input_scale(decay: float) -> float:
    """Return the factor that keeps the leaky sum of an input about as large as the input.

    (1 - decay)**0.5 lies between (1 - decay**2)**0.5, which keeps the variance of white noise, and
    1 - decay, which keeps a constant. The floor keeps it above 0 if decay is 1.
    """
    return max(1 - decay, 0.01) ** 0.5


# --- Neurons over time ----------------------------------------------------------------------------


class NeuronLayer(nn.Module):
    """Runs a neuron over a whole sequence, from rest: currents I to spikes S and potentials U.

        layer = NeuronLayer(snn.Leaky(beta=0.5, spike_grad=FastSigmoid(5)))
        spk, mem = layer(cur, T)    # all three [T * B, ...]

        U[t] = beta U[t-1] + I[t] - S[t-1] threshold    # snn.Leaky
        S[t] = (U[t] > threshold)

    It takes any of snnTorch's neurons that are called once per time step and store their state,
    with `mem` and `reset_mem`, and raises `NetworkError` for any other. Neurons that the compiled
    kernels support (`has_kernel`) run by these unless `stepped` is set, others step by step.
    """

    def __init__(self, neuron: snn.SpikingNeuron):
        super().__init__()
        stores_state = hasattr(neuron, "mem") and hasattr(neuron, "reset_mem")
        if not (isinstance(neuron, snn.SpikingNeuron) and stores_state):
            name = type(neuron).__name__
            raise NetworkError(f"{name} is not a neuron of snnTorch with mem and reset_mem")
        self.neuron = neuron
        self.stepped = float(neuron.graded_spikes_factor) != 1  # read here: it makes a GPU wait

    @property
    def fused(self) -> bool:
        """Whether the neuron runs by kernels: asked at each run, since its options may change."""
        return not self.stepped and has_kernel(self.neuron)

    def forward(self, cur, T):
        if not torch.compiler.is_compiling() and self.fused:  # torch.compile can't trace kernels
            return run_kernels(self.neuron, cur, T)
        return run_steps(self.neuron, cur, T)


def run_steps(neuron: snn.SpikingNeuron, cur: torch.Tensor, T: int):
    """Step a neuron through cur [T * B, ...]; return (spk, mem), both [T * B, ...]."""
    neuron.reset_mem()  # snntorch.utils.reset misses neurons of a deep copy
    spks, mems = [], []
    # In float32: potentials in bfloat16 stand still at small currents.
    for step_cur in cur.float().unflatten(0, (T, -1)):
        out = neuron(step_cur)
        spks.append(out[0] if isinstance(out, tuple) else out)
        mems.append(neuron.mem)
    if neuron.mem.shape[:1] != step_cur.shape[:1]:
        raise NetworkError(f"{type(neuron).__name__} does not store its potential as mem")
    neuron.reset_mem()  # releases the autograd graph
    return torch.cat(spks).to(cur.dtype), torch.cat(mems).to(cur.dtype)


class WithoutSpikes(nn.Module):
    """A ReLU in the place of neurons: returns (relu(cur), cur), as they return (spk, mem)."""

    def forward(self, cur, T):
        return torch.relu(cur), cur


@dataclass(frozen=True)
class FastSigmoid:
    """`snntorch.surrogate.fast_sigmoid(slope)` that can be pickled, and asked for its slope.

    Spikes where x > 0; the gradient is 1 / (1 + slope |x|)^2 (Zenke and Ganguli 2018).
    """

    slope: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return surrogate.FastSigmoid.apply(x, self.slope)


class ALIF(snn.LIF):
    """Leaky integrate-and-fire with an adaptive threshold, one step per call, as in snnTorch.

        a[t] = alpha a[t-1] + (1 - alpha) S[t-1]
        threshold[t] = threshold + adapt_scale a[t]
        U[t] = beta U[t-1] + I[t] - S[t-1] threshold[t-1]
        S[t] = (U[t] > threshold[t])

        alif = ALIF(alpha=0.9, beta=0.5, adapt_scale=0.5)
        spk, adapt, mem = alif.reset_mem()
        spk, adapt, mem = alif(cur[0], spk, adapt, mem)    # without states, from its own

    The reset's spikes carry no gradient, as in snnTorch; the adaptation's do. With adapt_scale = 0
    it is `snn.Leaky`. Source: Bellec et al. 2018, "Long short-term memory and learning-to-learn in
    networks of spiking neurons".
    """

    def __init__(
        self,
        alpha: float,
        beta: float,
        adapt_scale: float,
        threshold: float = 1.0,
        spike_grad: Callable | None = None,
        learn_beta: bool = False,
        learn_threshold: bool = False,
    ):
        super().__init__(
            beta, threshold, spike_grad, learn_beta=learn_beta, learn_threshold=learn_threshold
        )
        self.register_buffer("alpha", torch.as_tensor(alpha))
        self.register_buffer("adapt_scale", torch.as_tensor(adapt_scale))
        for name in ("spk", "adapt", "mem"):
            self.register_buffer(name, torch.zeros(0), persistent=False)

    def reset_mem(self):
        """Set the state to zero, and return it."""
        self.spk = self.adapt = self.mem = torch.zeros_like(self.mem)
        return self.spk, self.adapt, self.mem

    def forward(self, input_, spk=None, adapt=None, mem=None):
        """Advance by one step: input_ and states [B, ...] -> (spk, adapt, mem), each [B, ...]."""
        spk = self.spk if spk is None else spk
        adapt = self.adapt if adapt is None else adapt
        mem = self.mem if mem is None else mem
        if mem.shape != input_.shape:  # as after reset_mem of a new neuron
            spk = adapt = mem = torch.zeros_like(input_)
        reset = spk.detach() * self.threshold_at(adapt)
        self.mem = self.beta.clamp(0, 1) * mem + input_ - reset
        self.adapt = self.alpha * adapt + (1 - self.alpha) * spk
        self.spk = self.spike_grad(self.mem - self.threshold_at(self.adapt))
        return self.spk, self.adapt, self.mem

    def threshold_at(self, adapt: torch.Tensor) -> torch.Tensor:
        """Return the threshold of neurons with this adaptation."""
        return self.threshold + self.adapt_scale * adapt

    def thresholds(self, spk: torch.Tensor) -> torch.Tensor:
        """Return the threshold at each step, [T, ...], of neurons that fire spk [T, ...]."""
        adapt = [torch.zeros_like(spk[0])]
        for step_spk in spk[:-1]:
            adapt.append(self.alpha * adapt[-1] + (1 - self.alpha) * step_spk)
        return self.threshold_at(torch.stack(adapt))


# --- Building and restoring -----------------------------------------------------------------------

NETWORKS = {"cnn": SpikingCNN, "resnet": SpikingResNet}  # add your own: NETWORKS["mlp"] = MLP


def build_model(
    config: NetworkConfig, neuron_backend: str = "fused", precision: str = "fp32"
) -> SpikingNetwork:
    """Build the network that `config.model` names; its weights are drawn from torch's generator.

    `neuron_backend` is 'fused' (compiled kernels, for the neurons that they support) or 'step'
    (snnTorch's neurons, step by step); `precision` of the layers is 'fp32' or 'bf16'. Raises
    `NetworkError` if there is no such network, or if its neurons cannot be run over time.
    """
    if config.model not in NETWORKS:
        raise NetworkError(f"no network {config.model!r}: this script does not add it to NETWORKS")
    network = NETWORKS[config.model](config)
    network.precision = precision
    if not network.neuron_layers():
        raise NetworkError(f"{type(network).__name__} makes no layer of neurons by make_layer")
    if neuron_backend == "step":
        for layer in network.neuron_layers().values():
            layer.stepped = True
    elif stepped := stepped_layers(network):
        warn_once(f"no kernel supports the neurons of {', '.join(stepped)}: they run step by step")
    return network


def restore_network(checkpoint: dict, device="cpu", neuron_backend="auto", precision="auto"):
    """Return the network of a checkpoint on `device`, in evaluation mode.

    It runs as it was trained, unless other options are given or it was trained in bf16 and `device`
    is slow at that; a warning says so. Raises `NetworkError` if the checkpoint is not of a network
    of this project.
    """
    trained = checkpoint["history"][-1]
    options = run_options(torch.device(device), neuron_backend, precision, trained)
    network = build_model(NetworkConfig.from_settings(checkpoint["settings"]), **options)
    load_weights(network, checkpoint["network"])
    network = network.to(device).eval()
    now = {"precision": network.precision, "neuron_backend": describe_backend(network)}
    if changes := describe_changes(now, trained):
        # Not once: this holds for each network that is restored.
        print(f"WARNING: the network runs otherwise than when trained: {changes}", file=sys.stderr)
        network.note = f" ({changes})"
    return network


def run_options(
    device: torch.device, neuron_backend: str, precision: str, trained: dict | None = None
) -> dict[str, str]:
    """Return the options of `build_model`, where 'auto' is replaced.

    For a new network, by what is fastest on `device`; for one that was trained, by what was used
    then, as an entry `trained` of its history says, but by fp32 where bf16 is slow.
    """
    backend = choose_backend(device, neuron_backend, trained)
    return {"neuron_backend": backend, "precision": choose_precision(device, precision, trained)}


def choose_precision(device: torch.device, asked: str, trained: dict | None) -> str:
    """Return 'fp32' or 'bf16'; see `run_options`."""
    if device.type == "cuda":
        computes_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        computes_bf16 = features.get("amx_tile") or features.get("avx512_bf16")
    if asked == "auto":
        wanted = trained["precision"] if trained else "bf16"
        return wanted if computes_bf16 else "fp32"
    if asked == "bf16" and not computes_bf16:
        warn_once(f"--precision bf16: this {device.type} has no fast bf16, fp32 is faster")
    return asked


def choose_backend(device: torch.device, asked: str, trained: dict | None) -> str:
    """Return 'fused' or 'step'; see `run_options`."""
    if asked == "auto":
        stepped = trained and trained["neuron_backend"] == "step"
        asked = "step" if stepped else "fused"
    if asked == "fused" and device.type == "mps":  # for which no kernel was written
        warn_once("on mps, neurons run step by step")
        return "step"
    return asked


def how_it_runs(network: SpikingNetwork) -> dict[str, str | int]:
    """Return what stands in histories and metrics of how a network was run."""
    return {
        "device": next(network.parameters()).device.type,
        "precision": network.precision,
        "neuron_backend": describe_backend(network),
        "threads": torch.get_num_threads(),
    }


def describe_changes(now: dict, before: dict) -> str:
    """Return which values of `now` differ: 'precision: fp32, was bf16; threads: 1, was 2'."""
    changed = [name for name in now if now[name] != before.get(name)]
    return "; ".join(f"{name}: {now[name]}, was {before.get(name)}" for name in changed)


def load_weights(network: SpikingNetwork, weights: dict[str, torch.Tensor]) -> None:
    """Load a state dictionary; raise `NetworkError` if it is that of another network."""
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        name = type(network).__name__
        raise NetworkError(f"the weights are not those of {name} as it is defined now") from error


def stepped_layers(network: SpikingNetwork) -> list[str]:
    """Return the layers that run step by step, with their kind of neuron: 'lif1 (Lapicque)'."""
    stepped = []
    for name, layer in network.neuron_layers().items():
        if isinstance(layer, NeuronLayer) and not layer.fused:
            stepped.append(f"{name} ({type(layer.neuron).__name__})")
    return stepped


def describe_backend(network: SpikingNetwork) -> str:
    """Return how neurons run: 'fused', 'uncompiled' (without a compiler), 'step', or 'relu'.

    If kernels support only some of them, it is 'fused+step' or 'uncompiled+step'. To know it, the
    forward kernel is compiled, if it was not yet.
    """
    if network.config.no_spikes:
        return "relu"
    stepped = stepped_layers(network)
    if len(stepped) == len(network.neuron_layers()):
        return "step"
    kernel, _ = get_kernels(next(network.parameters()).device, network.dtype)
    backend = "uncompiled" if kernel is forward_kernel else "fused"
    return f"{backend}+step" if stepped else backend


@functools.cache
def warn_once(text: str) -> None:
    """Print a warning to stderr, unless it was printed before."""
    print(f"WARNING: {text}", file=sys.stderr)


# --- Predictions ----------------------------------------------------------------------------------


def digit_scores(spk: torch.Tensor, mem: torch.Tensor, readout: str = "membrane") -> torch.Tensor:
    """Return the score of each digit after each time step, [T, B, 10].

    `spk` and `mem` [T, B, 10] are those of the output neurons. By `readout`, the scores are:

    - 'membrane': the mean membrane potential so far. In the long run its mean is
      U = (I - rate * threshold) / (1 - beta): of two neurons that fire at the same rate, it tells
      which has the larger current.
    - 'rate': the firing rate so far (rate code).
    - 'latency': minus the number of steps without a spike before the first (latency code).
    """
    if readout == "latency":
        not_yet_fired = spk.cumsum(0) == 0
        return -not_yet_fired.float().cumsum(0)
    values = {"membrane": mem, "rate": spk}[readout]
    # Means, not sums, so that scores after few steps and after many compare.
    steps = torch.arange(1, len(values) + 1, device=values.device)
    return values.cumsum(0) / steps.view(-1, 1, 1)


def leaders(scores: torch.Tensor) -> torch.Tensor:
    """Return which digits have the largest score [..., 10]: several if they tie."""
    return scores == scores.amax(-1, keepdim=True)


def predict(
    spk: torch.Tensor, mem: torch.Tensor, readout: str = "membrane", over_time: bool = False
) -> torch.Tensor:
    """Return the digit [B] with the largest of `digit_scores`; ties are broken by 'membrane'.

    With `over_time`, it is the prediction after each time step, [T, B].
    """
    scores = digit_scores(spk, mem, "membrane")
    if readout != "membrane":  # the largest potential among those who lead by the readout
        scores = scores.masked_fill(~leaders(digit_scores(spk, mem, readout)), -torch.inf)
    predictions = scores.argmax(-1)
    return predictions if over_time else predictions[-1]


def fit_temperature(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the temperature that minimizes the mean cross entropy of scores / temperature.

    The mean is over scores [T, B, 10] and labels [B] of all time steps and recordings. Searched
    from 1/64 to 16 standard deviations of the scores. Source: Guo et al. 2017, "On calibration of
    modern neural networks".
    """
    labels = labels.expand(len(scores), -1).flatten()
    scores = scores.flatten(0, 1)
    scale = scores.std().item() or 1.0  # 0 if all scores are equal
    if not math.isfinite(scale):  # of a network that diverged
        return math.nan

    def loss(log_temperature: float) -> float:
        return F.cross_entropy(scores / math.exp(log_temperature), labels).item()

    bounds = math.log(scale / 64), math.log(scale * 16)
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x)


# --- Compiled kernels: may be skipped -------------------------------------------------------------

# Hand-written forward and backward: 13.0 ms, compiled in 4 s. torch.compile of a loop and autograd:
# 49.6 ms, compiled in 17 s (T = 25, 592,000 neurons, bfloat16, two cores with AMX).

# A call of a kernel runs this many steps, with the state in registers in between. A kernel over all
# steps would be compiled for each T.
STEPS_PER_CALL = 5


def run_kernels(neuron: snn.SpikingNeuron, cur: torch.Tensor, T: int):
    """Return the same as `run_steps`, several times as fast, of a neuron that `has_kernel`."""
    cur = cur.movedim(1, -1)  # images in channels_last format are contiguous as [..., H, W, C]
    sequence = cur.contiguous().view(T, -1)
    spk, mem = FusedNeuron.apply(sequence, *kernel_parameters(neuron))
    return spk.view(cur.shape).movedim(-1, 1), mem.view(cur.shape).movedim(-1, 1)


def has_kernel(neuron: snn.SpikingNeuron) -> bool:
    """Return whether the kernels support a neuron: its kind, and all options but graded spikes.

    `NeuronLayer` reads that one, a tensor's value, once.
    """
    return (
        type(neuron) in (snn.Leaky, snn.Synaptic, ALIF)
        and type(neuron.spike_grad) is FastSigmoid
        and neuron.reset_mechanism == "subtract"
        and getattr(neuron, "reset_delay", True)
        and not (neuron.inhibition or neuron.state_quant or neuron.init_hidden or neuron.output)
        and {name for name, _ in neuron.named_parameters()} <= {"beta"}
        and all(value.dim() == 0 for value in neuron.state_dict().values())
    )


class Parameters(NamedTuple):
    """A neuron's parameters as scalar tensors; the last three are None for `snn.Leaky`.

    The equations are those of `ALIF`, with a synaptic current in place of I[t]:
    I_syn[t] = syn_alpha I_syn[t-1] + I[t].
    """

    beta: torch.Tensor
    threshold: torch.Tensor
    slope: torch.Tensor  # of the surrogate gradient
    syn_alpha: torch.Tensor | None = None
    adapt_alpha: torch.Tensor | None = None
    adapt_scale: torch.Tensor | None = None

    @property
    def leaky(self) -> bool:
        """Whether the neuron is `snn.Leaky`: no synaptic current, no adaptation."""
        return self.adapt_scale is None


def kernel_parameters(neuron: snn.SpikingNeuron) -> Parameters:
    """Return the parameters of a neuron that `has_kernel`."""
    beta = neuron.beta.clamp(0, 1)  # as snnTorch does
    # torch.full, since torch.tensor would synchronize with a GPU.
    slope = torch.full((), float(neuron.spike_grad.slope), device=beta.device)
    if isinstance(neuron, snn.Leaky):
        return Parameters(beta, neuron.threshold, slope)
    zero = torch.zeros_like(beta)
    if isinstance(neuron, snn.Synaptic):
        return Parameters(beta, neuron.threshold, slope, neuron.alpha.clamp(0, 1), zero, zero)
    return Parameters(beta, neuron.threshold, slope, zero, neuron.alpha, neuron.adapt_scale)


class FusedNeuron(torch.autograd.Function):
    """Neurons over a sequence: cur [T, N] and `Parameters` -> (spk, mem), both [T, N].

    Gradients reach `cur` and beta. The state between steps is always float32.
    """

    @staticmethod
    def forward(ctx, cur, *values):
        p = Parameters(*[alias(x) for x in values])
        kernel, _ = get_kernels(cur.device, cur.dtype)
        spk, mem, adapt = run_forward(kernel, cur, p)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(spk, mem, adapt, *p)
        return spk, mem

    @staticmethod
    def backward(ctx, grad_spk, grad_mem):
        if torch.is_grad_enabled():  # with @once_differentiable, autograd.grad passes in silence
            raise RuntimeError("kernels have no second derivative: use neuron_backend 'step'")
        spk, mem, adapt, *values = ctx.saved_tensors
        p = Parameters(*values)
        _, kernel = get_kernels(spk.device, spk.dtype)
        grad_cur = run_backward(kernel, grad_spk, grad_mem, spk, mem, adapt, p)
        grad_beta = beta_gradient(grad_cur, mem, p) if ctx.needs_input_grad[1] else None
        return grad_cur, grad_beta, None, None, None, None, None


def run_forward(kernel: Callable, cur: torch.Tensor, p: Parameters):
    """Run `forward_kernel`, compiled or not, over all steps: cur [T, N] -> (spk, mem, adapt)."""
    spk, mem = torch.empty_like(cur), torch.empty_like(cur)
    adapt = None if p.leaky else torch.empty_like(cur)
    state = zeros(cur, 2) + ((None, None) if p.leaky else zeros(cur, 2))
    for steps in time_chunks(len(cur)):
        outputs = [None if x is None else step_aliases(x[steps]) for x in (spk, mem, adapt)]
        state = kernel(alias(cur[steps]), *outputs, state, p)
    return spk, mem, adapt


def forward_kernel(cur, spks, mems, adapts, state, p: Parameters):
    """Run neurons over the steps of cur [steps, N]; fill the lists of tensors [N] with the outputs.

    `state` is (spk, mem, adapt, syn) after the step before, float32 [N]. Returns the new state.
    """
    spk, mem, adapt, syn = state
    threshold = p.threshold if p.leaky else p.threshold + p.adapt_scale * adapt
    for t in range(len(spks)):
        current = cur[t].float()
        reset = spk * threshold
        if not p.leaky:
            syn = current = p.syn_alpha * syn + current
            adapt = p.adapt_alpha * adapt + (1 - p.adapt_alpha) * spk
            threshold = p.threshold + p.adapt_scale * adapt
            adapts[t].copy_(adapt)
        mem = p.beta * mem + current - reset
        spk = (mem > threshold).float()
        spks[t].copy_(spk)
        mems[t].copy_(mem)
    return spk, mem, adapt, syn


def run_backward(kernel: Callable, grad_spk, grad_mem, spk, mem, adapt, p: Parameters):
    """Run `backward_kernel`, compiled or not, back over all steps; return the gradient of cur."""
    # Most layers get no gradient of mem: the kernel then reads grad_spk in its place, times 0,
    # which spares a second kernel, and a sequence of zeros to read.
    mem_factor = torch.full((), 0.0 if grad_mem is None else 1.0, device=spk.device)
    grad_spk = torch.zeros_like(spk) if grad_spk is None else grad_spk.contiguous()
    grad_mem = grad_spk if grad_mem is None else grad_mem.contiguous()
    grad_cur = torch.empty_like(spk)
    state = zeros(spk, 1) + ((None, None) if p.leaky else zeros(spk, 2))
    for steps in reversed(time_chunks(len(spk))):
        sequences = grad_spk, grad_mem, spk, mem, adapt
        inputs = [None if x is None else alias(x[steps]) for x in sequences]
        state = kernel(step_aliases(grad_cur[steps]), *inputs, mem_factor, state, p)
    return grad_cur


# The backward pass. dX is the derivative of the loss by X; the reset's S[t-1] is a constant;
# fire[t] = 1 / (1 + slope |U[t] - threshold[t]|)^2 is the surrogate derivative of a spike.
#
#     dS[t]         = what comes from the next layer + (1 - adapt_alpha) da[t+1]
#     dthreshold[t] = -fire[t] dS[t] - S[t] dU[t+1]
#     dU[t]         = what comes from the loss + fire[t] dS[t] + beta dU[t+1]
#     da[t]         = adapt_scale dthreshold[t] + adapt_alpha da[t+1]
#     dI[t]         = dI_syn[t] = dU[t] + syn_alpha dI_syn[t+1]
#     dbeta         = the sum of dU[t] U[t-1] = that of (dI[t] - syn_alpha dI[t+1]) U[t-1]


def backward_kernel(grad_curs, grad_spk, grad_mem, spk, mem, adapt, mem_factor, state, p):
    """Run the gradients back over a few steps; fill the list `grad_curs` of tensors [N].

    All else is [steps, N]: `spk`, `mem` and `adapt` of the forward pass, and the gradients that
    reach `spk` and, times `mem_factor`, `mem`. `state` is (dU, da, dI_syn) of the step after,
    float32 [N]. Returns the new state.
    """
    d_mem, d_adapt, d_syn = state
    threshold = p.threshold
    for t in reversed(range(len(grad_curs))):
        d_spk = grad_spk[t].float()
        if not p.leaky:
            d_spk = d_spk + (1 - p.adapt_alpha) * d_adapt
            threshold = p.threshold + p.adapt_scale * adapt[t].float()
        fire_d_spk = d_spk / (1 + p.slope * (mem[t].float() - threshold).abs()) ** 2
        d_mem_next = d_mem
        d_cur = d_mem = p.beta * d_mem_next + fire_d_spk + mem_factor * grad_mem[t].float()
        if not p.leaky:
            d_threshold = -fire_d_spk - spk[t].float() * d_mem_next
            d_adapt = p.adapt_alpha * d_adapt + p.adapt_scale * d_threshold
            d_cur = d_syn = p.syn_alpha * d_syn + d_mem
        grad_curs[t].copy_(d_cur)
    return d_mem, d_adapt, d_syn


def beta_gradient(grad_cur: torch.Tensor, mem: torch.Tensor, p: Parameters) -> torch.Tensor:
    """Return the gradient of beta, dbeta above, from dI and U, both [T, N]."""
    gradient = (grad_cur[1:] * mem[:-1]).sum(dtype=torch.float32)
    if not p.leaky:
        gradient -= p.syn_alpha * (grad_cur[2:] * mem[:-2]).sum(dtype=torch.float32)
    return gradient


@functools.cache
def get_kernels(device: torch.device, dtype: torch.dtype) -> tuple[Callable, Callable]:
    """Return the forward and the backward kernel, compiled at their first calls, for any N.

    The forward one is tried on zeros; where that fails, both are returned as they are, and a
    warning says so.
    """
    # torch.compiler.config has this limit per thread, and on a GPU autograd runs in its own.
    options = {"dynamic": True, "fullgraph": True, "recompile_limit": 256}
    print("compile     neurons, about 10 s at the first start, later 4 s", flush=True)
    # Triton chooses its blocks at the first call, by the size that it sees.
    num_neurons = 16 if device.type == "cpu" else 2**18
    cur = torch.zeros(STEPS_PER_CALL, num_neurons, device=device, dtype=dtype)
    half, one = torch.tensor(0.5, device=device), torch.tensor(1.0, device=device)
    try:
        forward = torch.compile(forward_kernel, **options)
        backward = torch.compile(backward_kernel, **options)
        run_forward(forward, cur, Parameters(beta=half, threshold=one, slope=one))
    except Exception as error:  # compilers fail in many ways
        reason, _, _ = str(error).partition("\n")
        warn_once(
            "neurons run uncompiled, with the same results but several times slower: compiling "
            "needs a C++ compiler (g++) or Triton, and a folder for its cache; no path of these or "
            f"of Python may hold a space ({reason})"
        )
        return forward_kernel, backward_kernel
    return forward, backward


def time_chunks(T: int) -> list[slice]:
    """Cut T steps into calls of `STEPS_PER_CALL`, and single ones for the rest."""
    whole = T - T % STEPS_PER_CALL
    chunks = [slice(t, t + STEPS_PER_CALL) for t in range(0, whole, STEPS_PER_CALL)]
    return chunks + [slice(t, t + 1) for t in range(whole, T)]


def zeros(x: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    """Return `count` tensors of zeros [N], in float32, for x [T, N]."""
    # A tuple, as kernels return their state: for a list, they would be compiled again.
    return tuple(torch.zeros(x.shape[1], device=x.device) for _ in range(count))


def alias(x: torch.Tensor | None) -> torch.Tensor | None:
    """Return a tensor on x's memory that is no view and in no graph.

    For either, kernels would be compiled again.
    """
    # By to_dlpack it is four times as fast as by from_dlpack(x).
    return None if x is None else torch.from_dlpack(to_dlpack(x.detach()))


def step_aliases(x: torch.Tensor) -> list[torch.Tensor]:
    """Return the steps of x [T, N] as a list of tensors [N], into which kernels write directly."""
    return [alias(step) for step in x]


# --- Activity -------------------------------------------------------------------------------------

# Energy in pJ at 45 nm, 32-bit floating point: Horowitz 2014, ISSCC, figure 1.1.9.
ADDITION_PJ, MAC_PJ = 0.9, 4.6


class ActivityMeter:
    """Context manager that measures a network's activity by layer, with forward hooks.

        with ActivityMeter(network) as meter:
            network(frames)
        meter.outputs["lif1"]       # (spk, mem) of the last pass, both [T, B, ...]
        meter.layers()              # means over all recordings that passed

    - A layer of neurons includes the connections (`nn.Conv2d`, `ConvPool`, `nn.Linear`) that run
      before it; layers are listed in the order in which they run.
    - The synaptic operations of a connection are what enters it (events, spikes, sums of spikes)
      times the number of outputs that it reaches.
    - MACs are the multiply-accumulates of the same network without spikes, where every connection
      is used at every step.
    - Padding around an image, biases and the neurons' own operations are left out.
    - `not_counted` lists what else has weights: neurons with layers inside, other kinds of layers
      (also `padding="same"`), layers that do not run on [T * B, ...], run after all neurons, or
      are not called.

    Raises `NetworkError` if a layer of neurons runs more than once in a pass.
    """

    def __init__(self, network: SpikingNetwork):
        self.network = network
        self.num_recordings = 0
        self.outputs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.not_counted: set[str] = set()
        self._in_pass = False
        self._weighted: set[str] = set()  # layers with weights, outside neurons
        self._reached: dict[tuple, torch.Tensor] = {}  # by convolution and shape of its input
        self._spikes: dict[str, torch.Tensor] = {}  # [T]: of all recordings
        self._operations: dict[str, list[torch.Tensor]] = {}  # of each batch: [T, B]
        self._macs: dict[str, float] = {}  # per recording

    def __enter__(self):
        neurons = self.network.neuron_layers()
        self._hooks = [self.network.register_forward_pre_hook(self._start_pass)]
        for name, layer in self.network.named_modules():
            has_weights = any(p.dim() > 1 for p in layer.parameters(recurse=False))
            inside_neurons = any(name.startswith(f"{neuron}.") for neuron in neurons)
            name = name or "the network itself"
            if has_weights and not inside_neurons:
                self._weighted.add(name)
            if name in neurons or name in self._weighted:
                hook = functools.partial(self._after_layer, name)
                self._hooks.append(layer.register_forward_hook(hook))
        self._hooks.append(self.network.register_forward_hook(self._end_pass))
        return self

    def __exit__(self, *_):
        for hook in self._hooks:
            hook.remove()

    def _start_pass(self, _network, inputs):
        self._in_pass = True
        self._T, self._B = inputs[0].shape[:2]
        self.num_recordings += self._B
        self._ran = set()
        self._pending = []  # name, operations [T * B], MACs of connections since the last neurons

    def _after_layer(self, name, layer, inputs, output):
        if not self._in_pass:  # called otherwise than by the network
            return
        if isinstance(layer, NeuronLayer | WithoutSpikes):
            self._count_neurons(name, layer, output)
        elif is_counted(layer) and len(inputs[0]) == self._T * self._B:
            operations, macs = self._count_connection(layer, inputs[0].detach(), output.shape)
            self._pending.append((name, operations, macs))
        else:
            self.not_counted.add(name)
        self._ran.add(name)

    def _count_neurons(self, name, layer, output):
        if name in self._ran:
            raise NetworkError(f"{name} runs more than once: make a layer for each run")
        shape = self._T, self._B
        self.outputs[name] = tuple(x.detach().float().unflatten(0, shape) for x in output)
        spikes = self.outputs[name][0].sum(1).flatten(1).cpu().sum(1, dtype=torch.float64)
        self._spikes[name] = self._spikes.get(name, 0) + spikes
        operations = torch.zeros(shape, dtype=torch.float64, device="cpu")
        for _, of_connection, _ in self._pending:
            operations += of_connection.view(shape)
        self._operations.setdefault(name, []).append(operations)
        self._macs[name] = self._T * sum(macs for _, _, macs in self._pending)
        self._pending = []
        if isinstance(layer, NeuronLayer) and list(layer.neuron.children()):
            self.not_counted.add(name)

    def _end_pass(self, *_):
        self.not_counted.update(name for name, _, _ in self._pending)  # no neurons ran after them
        self.not_counted |= self._weighted - self._ran
        self._in_pass = False

    def _count_connection(self, layer, x, out_shape) -> tuple[torch.Tensor, float]:
        """Return the operations of each frame of x [T * B, ...], and the MACs of a frame."""
        if isinstance(layer, nn.Linear):
            sums = x.flatten(1).sum(1, dtype=torch.float32).cpu().double()
            return layer.out_features * sums, layer.out_features * x[0].numel()
        key = layer, x.shape[1:]
        if key not in self._reached:
            self._reached[key] = outputs_reached(layer, x.shape[1:], out_shape[1:])
        reached = self._reached[key]
        # Over the channels first, all of which reach as many outputs. float32 is exact to 2^24.
        sums = x.sum(1, dtype=torch.float32).cpu()
        return (sums * reached).sum((1, 2)), x.shape[1] * float(reached.sum())

    def operations(self, layer: str) -> torch.Tensor:
        """Return a layer's synaptic operations for each recording at each time step, [T, N]."""
        return torch.cat(self._operations[layer], dim=1)

    def firing_rate(self, layer: str) -> torch.Tensor:
        """Return a layer's spikes per neuron at each time step, [T]."""
        neurons = self.outputs[layer][0][0, 0].numel()
        return self._spikes[layer] / (neurons * self.num_recordings)

    def layers(self) -> dict[str, dict[str, float]]:
        """Return by layer: neurons and firing rate; synaptic operations and MACs per recording.

        Without spikes, it is neurons and MACs alone. Learned decays follow, such as `beta`; of one
        per neuron it is the mean, and `beta_min` and `beta_max`.
        """
        result = {}
        for name, (spk, _) in self.outputs.items():
            result[name] = {"neurons": spk[0, 0].numel(), "macs": self._macs[name]}
            if not self.network.config.no_spikes:
                result[name]["firing_rate"] = self.firing_rate(name).mean().item()
                operations = self.operations(name).sum(0).mean().item()
                result[name]["synaptic_operations"] = operations
        for name, values in self.network.learned_decays().items():
            layer, _, decay = name.rpartition(".")
            if layer in result:  # it ran
                result[layer][decay] = values.mean().item()
                if values.numel() > 1:
                    result[layer] |= {f"{decay}_min": values.min().item()}
                    result[layer] |= {f"{decay}_max": values.max().item()}
        return result

    def operations_until(self, step: torch.Tensor) -> float:
        """Return the mean synaptic operations if recordings stop after `step` [N] steps, from 1."""
        total = sum(self.operations(name) for name in self._operations)
        return total.cumsum(0).gather(0, step[None] - 1).mean().item()


def is_counted(module: nn.Module) -> bool:
    """Return whether a layer's operations are counted."""
    if isinstance(module, nn.Conv2d):
        return module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return isinstance(module, nn.Linear)


def outputs_reached(conv: nn.Conv2d, in_shape: torch.Size, out_shape: torch.Size) -> torch.Tensor:
    """Return how many outputs of a convolution each pixel of its input reaches, [H, W] in float64.

    It is the transposed convolution of ones, as in sinabs, of zeros for outputs that are in no
    pooling window. All channels reach as many outputs.
    """
    options = {"dtype": torch.float64, "device": "cpu"}
    out = torch.ones(1, *out_shape, **options)
    if isinstance(conv, ConvPool):  # an odd last row or column is in no window
        channels, height, width = out_shape
        out = torch.zeros(1, channels, *in_shape[1:], **options)
        out[:, :, : 2 * height, : 2 * width] = 1
    weight = torch.ones(conv.weight.shape, **options)
    geometry = conv.stride, conv.padding, conv.dilation, conv.groups
    return torch.nn.grad.conv2d_input((1, *in_shape), weight, out, *geometry)[0, 0]


def energy_uj(layers: dict[str, dict[str, float]]) -> dict[str, float]:
    """Estimate the energy per recording in uJ, from `ActivityMeter.layers`.

    'spiking', if it has spikes: `ADDITION_PJ` for each synaptic operation. 'without_spikes':
    `MAC_PJ` for each MAC of the same network. Memory traffic, which may cost more, pooling and the
    neurons' own operations are left out, as in most papers.
    """
    energy = {}
    if all("synaptic_operations" in layer for layer in layers.values()):
        operations = sum(layer["synaptic_operations"] for layer in layers.values())
        energy["spiking"] = ADDITION_PJ * operations / 1e6
    energy["without_spikes"] = MAC_PJ * sum(layer["macs"] for layer in layers.values()) / 1e6
    return energy
