"""Spiking networks for N-MNIST: `SpikingCNN`, `SpikingResNet`, and how their neurons run over time.

    network = build_model(NetworkConfig(model="cnn"))
    spk, mem = network(frames)                          # frames [T, B, 2, 34, 34]; spk and mem [T, B, 10]
    digits = predict(spk, mem)                          # [B]

The layers run one after the other, each over the whole sequence, so that a convolution sees T * B frames at once.
Read from the top: the networks, how a neuron runs over time, our ALIF neuron, the other layers. The compiled kernels
come next, and may be skipped: they change the speed, not the results. The measurement of activity comes last.
"""

import functools
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

import snntorch as snn
import torch
import torch.nn.functional as F
from snntorch import surrogate
from torch import nn
from torch.utils.dlpack import to_dlpack

NUM_DIGITS = 10
SURROGATE_SLOPE = 5  # of the fast sigmoid; snnTorch's default of 25 lets little gradient reach the first layer
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by precision
BACKENDS = ("fused", "step")
READOUTS = ("membrane", "rate", "latency")

# --- Networks --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NetworkConfig:
    """The settings of a network, shared by flags, constructors and checkpoints, with their defaults."""

    model: str = "cnn"  # or "resnet"
    beta: float = 0.5  # decay of the membrane potential per step
    threshold: float = 1.0  # membrane potential above which a neuron fires
    alpha: float = 0.5  # decay per step of ALIF's adaptation and of the synaptic current (resnet only)
    dropout: float = 0.0  # probability of dropping a neuron of the last hidden layer
    precision: str = "fp32"  # or "bf16" or "fp16": the type of layers; the state of neurons is float32
    neuron_backend: str = "fused"  # or "step"
    width: int = 1  # factor on the channels and the hidden layer
    learn_beta: bool = False  # learn one beta per layer
    readout: str = "membrane"  # or "rate" or "latency": what decides on the digit (`predict`)
    no_spikes: bool = False  # ReLU in place of the neurons: the baseline without spikes

    def __post_init__(self):
        known = {"model": NETWORKS, "precision": DTYPES, "neuron_backend": BACKENDS, "readout": READOUTS}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(values)}")
        if self.no_spikes and (self.readout != "membrane" or self.learn_beta):
            raise ValueError("no_spikes: without spikes there is no other readout than membrane, and no beta to learn")

    @property
    def name(self) -> str:
        """The network's name in files: 'cnn', 'resnet', 'cnn_relu' or 'resnet_relu'."""
        return self.model + "_relu" * self.no_spikes


def make_leaky(config: NetworkConfig) -> snn.Leaky:
    """Make the LIF neuron that both networks use unless told otherwise."""
    grad = functools.partial(spike_grad, slope=NETWORKS[config.model].SLOPE)
    return snn.Leaky(beta=config.beta, threshold=config.threshold, spike_grad=grad, learn_beta=config.learn_beta)


def spike_grad(x: torch.Tensor, slope: float = SURROGATE_SLOPE) -> torch.Tensor:
    """Spike where x > 0, with the surrogate gradient of Zenke and Ganguli 2018.

    It is `snntorch.surrogate.fast_sigmoid(slope)`, as a function that can be pickled.
    """
    return surrogate.FastSigmoid.apply(x, slope)


class SpikingNetwork(nn.Module):
    """Base of both networks, which define `forward_layers`.

    They take `make_lif`, a function of the config that makes the neuron of each LIF layer: any snnTorch neuron with
    `neuron_backend="step"`, such as `snn.Lapicque(config.beta, threshold=config.threshold, spike_grad=spike_grad)`.
    The network wraps it in `OverTime` or `Fused`, so a neuron never sees the time dimension as the batch.
    """

    SLOPE = SURROGATE_SLOPE  # of its neurons' surrogate gradient

    def __init__(self, config: NetworkConfig):
        super().__init__()
        if not isinstance(self, NETWORKS[config.model]):
            raise ValueError(f"{type(self).__name__} can't be built with model={config.model!r}")
        self.config = config

    @property
    def title(self) -> str:
        """The network's name in figures."""
        name = type(self).__name__
        return name.replace("Spiking", "") + " with ReLU" if self.config.no_spikes else name

    @property
    def dtype(self) -> torch.dtype:
        """The type of the tensors between layers, which is also the best type for frames."""
        return DTYPES[self.config.precision]

    def forward(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map frames [T, B, 2, 34, 34] to (spk, mem) of the output neurons, both float32 [T, B, 10].

        Raises `ValueError` for frames of another shape, `TypeError` if the weights are not float32.
        """
        if frames.dim() != 5 or frames.shape[2:] != (2, 34, 34):
            raise ValueError(f"frames have the shape {list(frames.shape)}; it must be [T, B, 2, 34, 34]")
        weight_dtype = self.fc_out.weight.dtype
        if weight_dtype != torch.float32:
            raise TypeError(f"the weights are {weight_dtype}; they must stay float32: set the precision instead")
        frames = to_channels_first(to_channels_last(frames.to(self.dtype)).contiguous())
        with torch.autocast(frames.device.type, self.dtype, enabled=self.dtype != torch.float32):
            spk, mem = self.forward_layers(frames)
        return spk.float(), mem.float()

    def forward_layers(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map frames [T, B, 2, 34, 34], stored channels-last, to (spk, mem) of the output neurons, both [T, B, 10]."""
        raise NotImplementedError

    def neuron_layers(self) -> dict[str, nn.Module]:
        """Return the neuron layers by name (`lif1`, `res1.lif2`), in the order in which they run."""
        return {name: module for name, module in self.named_modules() if isinstance(module, OverTime | ReLU)}


class SpikingCNN(SpikingNetwork):
    """Three times conv -> max pool -> norm -> LIF, then fully connected -> LIF -> dropout, then output -> LIF."""

    def __init__(self, config: NetworkConfig, make_lif: Callable = make_leaky):
        super().__init__(config)
        w1, w2, w3, hidden = (config.width * size for size in (16, 32, 64, 128))
        self.conv1 = ConvPool(2, w1, config)  # 34 x 34, pooled to 17 x 17
        self.norm1 = init_norm(nn.BatchNorm2d(w1), config)
        self.lif1 = over_time(make_lif(config), config)
        self.conv2 = ConvPool(w1, w2, config)  # 17 x 17, pooled to 8 x 8
        self.norm2 = init_norm(nn.BatchNorm2d(w2), config)
        self.lif2 = over_time(make_lif(config), config)
        self.conv3 = ConvPool(w2, w3, config)  # 8 x 8, pooled to 4 x 4
        self.norm3 = init_norm(nn.BatchNorm2d(w3), config)
        self.lif3 = over_time(make_lif(config), config)
        self.fc1 = nn.Linear(w3 * 4 * 4, hidden, bias=False)
        self.norm4 = init_norm(nn.BatchNorm1d(hidden), config)
        self.lif4 = over_time(make_lif(config), config)
        self.dropout = TimeSharedDropout(config.dropout)
        self.fc_out = nn.Linear(hidden, NUM_DIGITS, bias=False)
        self.norm_out = init_norm(nn.BatchNorm1d(NUM_DIGITS), config)
        self.lif_out = over_time(make_lif(config), config)

    def forward_layers(self, frames):
        spk, _ = self.lif1(time_distributed(frames, self.conv1, self.norm1))
        spk, _ = self.lif2(time_distributed(spk, self.conv2, self.norm2))
        spk, _ = self.lif3(time_distributed(spk, self.conv3, self.norm3))
        spk = to_channels_last(spk).flatten(2)
        spk, _ = self.lif4(time_distributed(spk, self.fc1, self.norm4))
        return self.lif_out(time_distributed(self.dropout(spk), self.fc_out, self.norm_out))


class SpikingResNet(SpikingNetwork):
    """conv -> ALIF, two residual blocks with LIF, fully connected -> synaptic LIF -> dropout, output -> LIF."""

    SLOPE = 2  # a wider surrogate gradient, for more layers of neurons one after the other
    ADAPT_SCALE = 0.5  # in thresholds: how far the threshold of a neuron that fires at every step would rise

    def __init__(self, config: NetworkConfig, make_lif: Callable = make_leaky):
        super().__init__(config)
        w1, w2, w3, hidden = (config.width * size for size in (16, 32, 64, 128))
        shared = {"beta": config.beta, "threshold": config.threshold, "learn_beta": config.learn_beta}
        shared["spike_grad"] = functools.partial(spike_grad, slope=self.SLOPE)
        alif = ALIF(rho=config.alpha, adapt_scale=self.ADAPT_SCALE * config.threshold, **shared)
        synaptic = snn.Synaptic(alpha=config.alpha, **shared)
        self.conv1 = ConvPool(2, w1, config)  # 34 x 34, pooled to 17 x 17
        self.norm1 = init_norm(nn.BatchNorm2d(w1), config)
        self.lif1 = over_time(alif, config)
        self.res1 = ResidualBlock(w1, w2, config, make_lif)  # 17 x 17 to 8 x 8
        self.res2 = ResidualBlock(w2, w3, config, make_lif)  # 8 x 8 to 4 x 4
        self.fc1 = nn.Linear(w3 * 4 * 4, hidden, bias=False)
        self.norm2 = init_norm(
            nn.BatchNorm1d(hidden), config, scale=1.0 if config.no_spikes else decay_gain(config.alpha)
        )
        self.fc_syn = over_time(synaptic, config)
        self.dropout = TimeSharedDropout(config.dropout)
        self.fc_out = nn.Linear(hidden, NUM_DIGITS, bias=False)
        self.norm_out = init_norm(nn.BatchNorm1d(NUM_DIGITS), config)
        self.lif_out = over_time(make_lif(config), config)

    def forward_layers(self, frames):
        spk, _ = self.lif1(time_distributed(frames, self.conv1, self.norm1))
        spk = self.res2(self.res1(spk))
        spk = to_channels_last(spk).flatten(2)
        spk, _ = self.fc_syn(time_distributed(spk, self.fc1, self.norm2))
        return self.lif_out(time_distributed(self.dropout(spk), self.fc_out, self.norm_out))


class ResidualBlock(nn.Module):
    """conv -> max pool -> norm -> LIF -> conv -> norm, plus sum pool -> 1 x 1 conv of the input, -> LIF; spikes added.

    Spikes [T, B, in_channels, H, W] -> spikes [T, B, out_channels, H // 2, W // 2], 0, 1 or 2 from the two neurons at
    each place. Their sum lets gradients past the second neuron; the blocks of Fang et al. 2021, "Deep residual learning
    in spiking neural networks" (SEW), add the spikes of the shortcut instead.
    """

    def __init__(self, in_channels: int, out_channels: int, config: NetworkConfig, make_lif: Callable):
        super().__init__()
        self.conv1 = ConvPool(in_channels, out_channels, config)
        self.norm1 = init_norm(nn.BatchNorm2d(out_channels), config)
        self.lif1 = over_time(make_lif(config), config)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = init_norm(nn.BatchNorm2d(out_channels), config)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        # The shortcut has no norm, so its initial weights are scaled instead.
        with torch.no_grad():
            self.shortcut.weight *= initial_current(config)
        self.lif2 = over_time(make_lif(config), config)

    def forward(self, spk):
        spk1, _ = self.lif1(time_distributed(spk, self.conv1, self.norm1))
        cur = time_distributed(spk1, self.conv2, self.norm2) + time_distributed(spk, sum_pool, self.shortcut)
        spk2, _ = self.lif2(cur)
        return spk1 + spk2


NETWORKS = {"cnn": SpikingCNN, "resnet": SpikingResNet}


def build_model(config: NetworkConfig) -> SpikingNetwork:
    """Build the network that `config.model` names; torch's global generator draws its weights."""
    return NETWORKS[config.model](config).to(memory_format=torch.channels_last)


def load_network(checkpoint: dict, device: torch.device) -> SpikingNetwork:
    """Rebuild a checkpoint's network on `device`, with the settings it was trained with."""
    network = build_model(NetworkConfig(**checkpoint["network_config"]))
    network.load_state_dict(checkpoint["network"])
    return network.to(device)


def predict(spk: torch.Tensor, mem: torch.Tensor, readout: str = "membrane") -> torch.Tensor:
    """Return the digit [B] that the output neurons' spk and mem [T, B, 10] tell.

    - 'membrane': the largest mean membrane potential. In the mean over time, U (1 - beta) = I - rate *
      threshold: if two neurons fire at the same rate, their potentials still tell which has the larger current.
    - 'rate': the most spikes (rate code).
    - 'latency': the first spike (latency code).

    Ties of the last two are decided by the membrane.
    """
    return predict_over_time(spk, mem, readout)[-1]


def predict_over_time(spk: torch.Tensor, mem: torch.Tensor, readout: str = "membrane") -> torch.Tensor:
    """Return the prediction of `predict` after each of the T time steps, [T, B]."""
    mem = evidence(spk, mem, "membrane")
    if readout != "membrane":
        mem = mem.masked_fill(~leading(spk, readout), -torch.inf)
    return mem.argmax(-1)


def leading(spk: torch.Tensor, readout: str) -> torch.Tensor:
    """Return which output neurons lead by 'rate' or 'latency' after each time step: spk [T, B, 10] -> bool [T, B, 10].

    Several lead if they have fired equally often, or first at the same step; all do if none has fired.
    """
    score = evidence(spk, None, readout)
    return score == score.amax(-1, keepdim=True)


def evidence(spk: torch.Tensor, mem: torch.Tensor | None, readout: str) -> torch.Tensor:
    """Return what a readout has for each digit after each time step, [T, B, 10], from spk and mem of that shape.

    'membrane': the mean membrane potential so far; 'rate': the firing rate so far; 'latency': minus the number of steps
    without a spike before the first.
    """
    if readout == "latency":
        return -(spk.cumsum(0) == 0).float().cumsum(0)
    # Means, not sums: a sum grows with time, faster than what it tells of the digit, and no temperature fits all steps.
    values = mem if readout == "membrane" else spk
    return values.cumsum(0) / torch.arange(1, len(values) + 1, device=values.device).view(-1, 1, 1)


def confidence(spk: torch.Tensor, mem: torch.Tensor, readout: str, temperature: float) -> torch.Tensor:
    """Return the confidence in the prediction after each time step, [T, B]: softmax of the evidence / temperature."""
    return torch.softmax(evidence(spk, mem, readout) / temperature, -1).amax(-1)


def fit_temperature(spk: torch.Tensor, mem: torch.Tensor, readout: str, labels: torch.Tensor) -> float:
    """Return the temperature with which confidences fit best: the smallest cross entropy, averaged over all time steps.

    The best to a fourth of an octave, from about 1/64 to 16 standard deviations of the evidence. Source: Guo et al.
    2017, "On calibration of modern neural networks".
    """
    values = evidence(spk, mem, readout).flatten(0, 1)
    labels = labels.expand(len(spk), -1).flatten()
    scale = values.std().item() or 1.0  # 0 if the output neurons are silent

    def loss(quarter_octaves: int) -> float:
        return F.cross_entropy(values / (scale * 2 ** (quarter_octaves / 4)), labels).item()

    coarse = min(range(-24, 17, 4), key=loss)
    return scale * 2 ** (min(range(coarse - 3, coarse + 4), key=loss) / 4)


def init_norm(norm: nn.Module, config: NetworkConfig, scale: float = 1.0) -> nn.Module:
    """Let a norm start with currents of `scale` times `initial_current`; return it."""
    # Momentum 0.2, not torch's 0.1, with which the first epoch of a small data set ends with a silent network. A batch
    # holds T frames of each recording, so its statistics are reliable.
    norm.momentum = 0.2
    nn.init.constant_(norm.weight, initial_current(config) * scale)
    return norm


def initial_current(config: NetworkConfig) -> float:
    """Return the standard deviation of a LIF layer's current at the start; it is 1 without spikes.

    With one threshold, a layer is neither silent nor saturated (threshold-dependent normalization, Zheng et al. 2021).
    If beta is above 0.5, currents sum to membrane potentials far from the threshold, where the surrogate gradient is
    small. The currents then start smaller.
    """
    return 1.0 if config.no_spikes else config.threshold * min(1.0, decay_gain(config.beta) / decay_gain(0.5))


def decay_gain(decay: float) -> float:
    """Return (1 - decay)**0.5, by which to scale an input so that its leaky sum over time keeps its size.

    The sum multiplies noise by (1 - decay**2)**-0.5 and a constant by 1 / (1 - decay); this factor is a compromise. The
    floor keeps it above 0 if decay is 1.
    """
    return max(1 - decay, 0.01) ** 0.5


# --- Neurons over time -----------------------------------------------------------------------------------


def over_time(neuron: snn.SpikingNeuron, config: NetworkConfig) -> nn.Module:
    """Wrap a neuron as `config.neuron_backend` says: 'step' for `OverTime`, 'fused' for `Fused`."""
    if config.no_spikes:
        return ReLU()
    return {"step": OverTime, "fused": Fused}[config.neuron_backend](neuron)


class OverTime(nn.Module):
    """Runs any snnTorch neuron over a whole sequence, step by step: cur [T, B, ...] -> (spk, mem) of the same shape.

        spk, mem = OverTime(snn.Leaky(beta=0.5))(cur)

    The neuron starts each sequence with zero state. After the sequence, its state is what it was before.
    """

    def __init__(self, neuron: snn.SpikingNeuron):
        super().__init__()
        if not (isinstance(neuron, snn.SpikingNeuron) and hasattr(neuron, "reset_mem")):
            raise TypeError(f"{type(neuron).__name__} is not a snnTorch neuron with a reset_mem method")
        self.neuron = neuron

    def forward(self, cur):
        self.check(cur)
        before = dict(self.neuron.named_buffers())
        # snntorch.utils.reset would miss neurons of a deep copy: it only knows those created through __init__.
        self.neuron.reset_mem()
        spks, mems = [], []
        try:
            for step_cur in cur.float():  # as in the kernels: membrane potentials in bfloat16 stop at small currents
                out = self.neuron(step_cur)
                spks.append(out[0] if isinstance(out, tuple) else out)
                mems.append(self.neuron.mem)
        finally:
            for name, buffer in before.items():
                setattr(self.neuron, name, buffer)
        return stack_steps(spks).to(cur.dtype), stack_steps(mems).to(cur.dtype)

    @staticmethod
    def check(cur):
        """Raise `TypeError` for a current of integers, of whose type membrane potentials can't be."""
        if not cur.is_floating_point():
            raise TypeError(f"the current is {cur.dtype}; it must be a floating point type")


class Fused(OverTime):
    """The same by compiled kernels, several times as fast, for `snn.Leaky`, `snn.Synaptic` and `ALIF`.

    Their parameters must be scalars, and their reset by subtraction. `beta` may be learned. The state between steps is
    float32, whatever the type of the current. Raises `ValueError` for any other neuron or option.
    """

    def __init__(self, neuron: snn.SpikingNeuron):
        super().__init__(neuron)
        option = unsupported_option(neuron)
        if option:
            name = type(neuron).__name__
            raise ValueError(f"the fused backend can't run {name} with {option}: use --neuron_backend step (OverTime)")

    def forward(self, cur):
        self.check(cur)
        neuron, zero = self.neuron, torch.zeros_like(self.neuron.beta)
        beta = neuron.beta.clamp(0, 1)  # as snnTorch does
        if isinstance(neuron, ALIF):
            params = beta, neuron.threshold, zero, neuron.rho, neuron.adapt_scale
        elif isinstance(neuron, snn.Synaptic):
            params = beta, neuron.threshold, neuron.alpha.clamp(0, 1), zero, zero
        else:
            params = beta, neuron.threshold, None, None, None
        cur = to_channels_last(cur)
        outputs = FusedNeuron.apply(cur.flatten(1).contiguous(), slope_of(neuron), *params)
        return tuple(to_channels_first(x.view(cur.shape)) for x in outputs)


def slope_of(neuron: snn.SpikingNeuron) -> float | None:
    """Return the slope of a neuron whose surrogate gradient is `spike_grad`, with another slope perhaps; else None."""
    grad, options = neuron.spike_grad, {}
    if isinstance(grad, functools.partial) and not grad.args:
        grad, options = grad.func, grad.keywords
    known = grad is spike_grad and options.keys() <= {"slope"}
    return float(options.get("slope", SURROGATE_SLOPE)) if known else None


def unsupported_option(neuron: snn.SpikingNeuron) -> str | None:
    """Return the option of a neuron that the kernels can't run, None if they can run it."""
    if type(neuron) not in (snn.Leaky, snn.Synaptic, ALIF):
        return "its own equations"
    if slope_of(neuron) is None:
        return "another spike_grad than models.spike_grad"
    if neuron.reset_mechanism != "subtract":
        return f"reset_mechanism={neuron.reset_mechanism!r}"
    for name in ("inhibition", "state_quant", "init_hidden", "output"):
        if getattr(neuron, name):
            return f"{name}={getattr(neuron, name)}"
    if not getattr(neuron, "reset_delay", True):
        return "reset_delay=False"
    learned = [name for name, _ in neuron.named_parameters() if name != "beta"]
    if learned:
        return f"learn_{learned[0]}=True"
    for name in ("alpha", "beta", "threshold", "rho", "adapt_scale", "graded_spikes_factor"):
        value = getattr(neuron, name, None)
        if value is not None and value.dim() > 0:
            return f"{name} of the shape {list(value.shape)}"
    if float(neuron.graded_spikes_factor) != 1:
        return f"graded_spikes_factor={float(neuron.graded_spikes_factor)}"
    return None


class ALIF(snn.SpikingNeuron):
    """Leaky integrate-and-fire with an adaptive threshold, one step per call (snnTorch has no such neuron).

    a[t] = rho a[t-1] + (1 - rho) S[t-1],                threshold[t] = threshold + adapt_scale a[t],
    U[t] = beta U[t-1] + I[t] - S[t-1] threshold[t-1],   S[t] = (U[t] > threshold[t]).

        alif = ALIF(rho=0.9, beta=0.5, adapt_scale=0.5)
        spk, adapt, mem = alif(cur[0])                      # starts with zero state
        spk, adapt, mem = alif(cur[1], spk, adapt, mem)     # without states, it goes on from its own

    The spikes of the reset carry no gradient, as in snnTorch; those of the adaptation do. With adapt_scale = 0 it is
    `snn.Leaky`. Source: Bellec et al. 2018, "Long short-term memory and learning-to-learn in networks of spiking
    neurons".
    """

    def __init__(self, rho, beta, adapt_scale, threshold=1.0, spike_grad=None, learn_beta=False, learn_threshold=False):
        super().__init__(threshold, spike_grad, learn_threshold=learn_threshold)
        for name, value in (("rho", rho), ("beta", beta), ("adapt_scale", adapt_scale)):
            self.register_buffer(name, torch.as_tensor(value))
        if learn_beta:
            del self.beta
            self.beta = nn.Parameter(torch.as_tensor(beta))
        for name in ("spk", "adapt", "mem", "limit"):  # limit: threshold[t], kept so that its gradient is summed once
            self.register_buffer(name, torch.zeros(0), persistent=False)

    def reset_mem(self):
        """Set the state to zero, and return it."""
        self.spk, self.adapt, self.mem = (torch.zeros_like(x) for x in (self.spk, self.adapt, self.mem))
        self.limit = self.threshold + self.adapt_scale * self.adapt
        return self.spk, self.adapt, self.mem

    def forward(self, input_, spk=None, adapt=None, mem=None):
        """Advance by one step: input_ and states [B, ...] -> (spk, adapt, mem), each [B, ...]."""
        if self.mem.shape != input_.shape:
            self.spk = self.adapt = self.mem = torch.zeros_like(input_)
            self.reset_mem()
        spk = self.spk if spk is None else spk
        mem = self.mem if mem is None else mem
        if adapt is not None and adapt is not self.adapt:
            self.adapt, self.limit = adapt, self.threshold + self.adapt_scale * adapt
        self.mem = self.beta.clamp(0, 1) * mem + input_ - spk.detach() * self.limit
        self.adapt = self.rho * self.adapt + (1 - self.rho) * spk
        self.limit = self.threshold + self.adapt_scale * self.adapt
        self.spk = self.spike_grad(self.mem - self.limit)
        return self.spk, self.adapt, self.mem

    def thresholds(self, spk):
        """Return the threshold at each step for the neurons' own spikes; both are [T, ...]."""
        adapt, thresholds = torch.zeros_like(spk[0]), [torch.full_like(spk[0], float(self.threshold))]
        for step_spk in spk[:-1]:
            adapt = self.rho * adapt + (1 - self.rho) * step_spk
            thresholds.append(self.threshold + self.adapt_scale * adapt)
        return torch.stack(thresholds)


class ReLU(nn.Module):
    """What `no_spikes` puts in place of neurons: cur -> (its positive part, cur), all [T, B, ...]."""

    def forward(self, cur):
        return torch.relu(cur), cur


# --- Other layers ----------------------------------------------------------------------------------------


def time_distributed(x: torch.Tensor, *layers: nn.Module) -> torch.Tensor:
    """Apply layers without time to all steps at once: [T, B, ...] -> [T * B, ...] -> [T, B, ...]."""
    out = x.flatten(0, 1)
    for layer in layers:
        out = layer(out)
    return out.unflatten(0, x.shape[:2])


# Images are indexed [T, B, C, H, W] but stored channels-last: pooling and the backward pass of convolutions are several
# times faster on a CPU that way. Kernels see [T, B, H, W, C], so nothing is copied.


def to_channels_last(x: torch.Tensor) -> torch.Tensor:
    """View images [T, B, C, H, W] as [T, B, H, W, C]; return anything else as it is."""
    return x.movedim(2, -1) if x.dim() == 5 else x


def to_channels_first(x: torch.Tensor) -> torch.Tensor:
    """Undo `to_channels_last`."""
    return x.movedim(-1, 2) if x.dim() == 5 else x


def stack_steps(steps: list[torch.Tensor]) -> torch.Tensor:
    """Stack steps [B, ...] along a new first dimension, images in the memory format of `to_channels_last`."""
    if steps[0].dim() == 4:
        return to_channels_first(torch.stack([step.movedim(1, -1) for step in steps]))
    return torch.stack(steps)


class TimeSharedDropout(nn.Dropout):
    """Dropout with one mask for all steps of a recording: spk [T, B, N] -> [T, B, N], in training only.

    A neuron is dropped for the whole recording, as in SpikingJelly's multi-step `Dropout`.
    """

    def forward(self, spk):
        return spk * super().forward(torch.ones_like(spk[0])) if self.training else spk


def sum_pool(x: torch.Tensor) -> torch.Tensor:
    """Count the spikes in each window (2 x 2): x [F, C, H, W] -> [F, C, H // 2, W // 2]."""
    return F.avg_pool2d(x, 2, divisor_override=1)


class ConvPool(nn.Conv2d):
    """Convolution (3 x 3, padded by 1, no bias), then max pooling (2 x 2): x [F, C, H, W] -> [F, D, H // 2, W // 2]."""

    def __init__(self, in_channels: int, out_channels: int, config: NetworkConfig):
        super().__init__(in_channels, out_channels, 3, padding=1, bias=False)
        self.fused = config.neuron_backend == "fused"

    def forward(self, x):
        if self.fused:
            return FusedConvPool.apply(x, self.weight.to(x.dtype))
        return F.max_pool2d(super().forward(x), 2)


# --- Compiled kernels: read last -------------------------------------------------------------------------

# Hand-written forward and backward of LIF: 13.0 ms, compiled in 4 s. torch.compile of a loop, with autograd: 49.6 ms,
# compiled in 17 s (T = 25, 592,000 neurons, bfloat16, two cores with AMX).

# Trust the instruction sets that the processor reports: inductor's own trial of each takes 7 s at the first start.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
compiler_error: str | None = None  # why kernels run uncompiled


def compile_kernel(function: Callable) -> Callable:
    """Compile a kernel at its first call, once for all shapes.

    It has a few variants: for each type of the currents, five steps and one, Leaky or not.
    """
    compiled = functools.cache(lambda: torch.compile(function, dynamic=True, fullgraph=True, recompile_limit=256))
    return functools.wraps(function)(lambda *args: (function if compiler_error else compiled())(*args))


@functools.cache
def probe_compiler(device: torch.device, dtype: torch.dtype) -> None:
    """Compile one of the kernels on a few zeros. If that fails, warn and run all of them uncompiled from then on.

    A missing compiler is only found here: an error of a later call, such as out of memory, is never mistaken for it.
    """
    global compiler_error
    try:
        neurons = 16 if device.type == "cpu" else 2**18  # for the size of the first call, Triton chooses its blocks
        cur = torch.zeros(STEPS_PER_CALL, neurons, device=device, dtype=dtype)
        run_neurons(cur, (torch.tensor(0.5, device=device), torch.tensor(1.0, device=device), None, None, None))
    except Exception as error:  # compilers fail in many ways
        if isinstance(error, MemoryError) or re.search("out of memory|allocate memory|ALLOC_FAILED", str(error)):
            raise
        compiler_error = next(iter(str(error).splitlines()), type(error).__name__)
        print(
            "WARNING: neurons run uncompiled, with the same results but several times slower: compiling needs a C++ "
            f"compiler (g++) or Triton, and a folder for its cache ({compiler_error})",
            file=sys.stderr,
        )


def describe_backend(network: SpikingNetwork) -> str:
    """Return how the neurons of `network` run: 'fused', 'fused, uncompiled', 'step', or 'ReLU' without spikes."""
    if network.config.no_spikes:
        return "ReLU"
    backend = network.config.neuron_backend
    return f"{backend}, uncompiled" if backend == "fused" and compiler_error else backend


def detached_alias(x: torch.Tensor | None) -> torch.Tensor | None:
    """Return a plain tensor on the memory of x: kernels would compile again for a view or for one with a gradient."""
    return None if x is None else torch.from_dlpack(to_dlpack(x.detach()))  # to_dlpack: four times as fast


# The steps a kernel runs per call, between which the state stays in registers. Over all T steps, each T would be
# compiled.
STEPS_PER_CALL = 5


@compile_kernel
def neuron_forward(cur, spks, mems, adapts, state, params):
    """Run neurons over the steps of cur [steps, N], and fill the lists `spks`, `mems` and `adapts` of tensors [N].

    `state` is (mem, spk, syn, adapt) after the step before, float32 [N]. `params` are those of `FusedNeuron`; if
    `adapt_scale` is None, there is neither synapse nor adaptation. Returns the new state.
    """
    beta, threshold, alpha, rho, adapt_scale = params
    mem, spk, syn, adapt = state
    limit = threshold if adapt_scale is None else threshold + adapt_scale * adapt  # that the last spike crossed
    for t in range(len(spks)):
        current = cur[t].float()
        if adapt_scale is not None:
            syn = current = alpha * syn + current
        mem = beta * mem + current - spk * limit
        if adapt_scale is not None:
            adapt = rho * adapt + (1 - rho) * spk
            limit = threshold + adapt_scale * adapt
            adapts[t].copy_(adapt)
        spk = (mem > limit).float()
        spks[t].copy_(spk)
        mems[t].copy_(mem)
    return mem, spk, syn, adapt


@compile_kernel
def neuron_backward(grad_cur, grads, scales, spks, mems, adapts, prev_mems, state, grad_beta, params):
    """Run the gradients back over a few steps, and fill the list `grad_cur` of tensors [N], in the order of time.

    `grads` are those of (spk, mem), [steps, N]. `scales` are a factor of the second, which is 0 if no gradient reaches
    the membrane potentials, and the slope of the surrogate gradient. `spks`, `mems` and `adapts` [steps, N] are those
    of the forward pass. If beta is learned, `prev_mems` are the potentials one step earlier, and `grad_beta` [N] is its
    gradient so far. `state` holds the gradients of (mem, syn, adapt) one step later. Returns the new state and
    grad_beta. The reset's spikes carry no gradient.
    """
    beta, threshold, alpha, rho, adapt_scale = params
    grad_mem_scale, slope = scales
    grad_spks, grad_mems = grads
    grad_mem, grad_syn, grad_adapt = state
    for t in reversed(range(len(grad_cur))):
        grad_spk = grad_spks[t].float()
        limit = threshold
        if adapt_scale is not None:
            grad_spk = grad_spk + (1 - rho) * grad_adapt
            limit = threshold + adapt_scale * adapts[t].float()
        grad_fire = grad_spk / (1 + slope * (mems[t].float() - limit).abs()) ** 2  # fast_sigmoid
        grad_limit = -grad_fire - spks[t].float() * grad_mem
        grad_mem = beta * grad_mem + grad_fire
        grad_mem = grad_mem + grad_mem_scale * grad_mems[t].float()
        if grad_beta is not None:
            grad_beta = grad_beta + grad_mem * prev_mems[t].float()
        if adapt_scale is None:
            grad_cur[t].copy_(grad_mem)
        else:
            grad_adapt = rho * grad_adapt + adapt_scale * grad_limit
            grad_syn = alpha * grad_syn + grad_mem
            grad_cur[t].copy_(grad_syn)
    return (grad_mem, grad_syn, grad_adapt), grad_beta


def time_chunks(time_steps: int) -> list[slice]:
    """Cut the steps into chunks of `STEPS_PER_CALL`, and single steps for the rest: so two lengths are compiled."""
    whole = time_steps - time_steps % STEPS_PER_CALL
    chunks = [slice(t, t + STEPS_PER_CALL) for t in range(0, whole, STEPS_PER_CALL)]
    return chunks + [slice(t, t + 1) for t in range(whole, time_steps)]


def unbind_steps(x: torch.Tensor) -> list[torch.Tensor]:
    """Return the steps of x [steps, N] as a list of tensors [N], into which kernels write directly."""
    return [detached_alias(step) for step in x]


def zero_state(x: torch.Tensor, count: int) -> list[torch.Tensor]:
    """Return `count` tensors of zeros [N], in float32, for x [T, N]."""
    return [torch.zeros(x.shape[1], device=x.device) for _ in range(count)]


def run_neurons(cur, params):
    """Run `neuron_forward` over all steps: cur [T, N] -> (spk, mem, adapt), each [T, N]."""
    is_adaptive = params[-1] is not None
    spk, mem, adapt = torch.empty_like(cur), torch.empty_like(cur), torch.empty_like(cur) if is_adaptive else None
    state = (*zero_state(cur, 2), *(zero_state(cur, 2) if is_adaptive else (None, None)))
    for chunk in time_chunks(len(cur)) if cur.numel() else []:
        outputs = (None if x is None else unbind_steps(x[chunk]) for x in (spk, mem, adapt))
        state = neuron_forward(detached_alias(cur[chunk]), *outputs, state, params)
    return spk, mem, adapt


class FusedNeuron(torch.autograd.Function):
    """Neurons over a whole sequence: cur [T, N] -> (spk, mem), both [T, N]; gradients reach `cur` and `beta`.

    I_syn[t] = alpha I_syn[t-1] + I[t],
    a[t] = rho a[t-1] + (1 - rho) S[t-1],    threshold[t] = threshold + adapt_scale a[t],
    U[t] = beta U[t-1] + I_syn[t] - S[t-1] threshold[t-1],    S[t] = (U[t] > threshold[t]).

    `snn.Synaptic` has adapt_scale = 0, `ALIF` alpha = 0; for `snn.Leaky` alpha, rho and adapt_scale are None. The state
    between steps is float32, whatever the type of `cur`.
    """

    @staticmethod
    def forward(ctx, cur, slope, *params):  # beta, threshold, alpha, rho, adapt_scale
        ctx.set_materialize_grads(False)
        probe_compiler(cur.device, cur.dtype)
        params = tuple(detached_alias(x) for x in params)
        spk, mem, adapt = run_neurons(cur, params)
        ctx.save_for_backward(spk, mem, adapt, *params)
        ctx.slope = slope
        return spk, mem

    @staticmethod
    def backward(ctx, grad_spk, grad_mem):
        refuse_second_derivative()
        spk, mem, adapt, *params = ctx.saved_tensors
        grad_spk = torch.zeros_like(spk) if grad_spk is None else grad_spk.contiguous()
        # Without gradients of mem, grad_spk scaled by 0 stands in, so that no other variant is compiled.
        scales = (0.0 if grad_mem is None else 1.0, ctx.slope)
        scales = tuple(torch.full((), scale, device=spk.device) for scale in scales)  # torch.tensor waits for a GPU
        grad_mem = grad_spk if grad_mem is None else grad_mem.contiguous()
        grad_cur = torch.empty_like(spk)
        state = (*zero_state(spk, 1), *((None, None) if adapt is None else zero_state(spk, 2)))
        grad_beta = prev_mem = None
        if ctx.needs_input_grad[2]:
            (grad_beta,), prev_mem = zero_state(spk, 1), torch.cat([torch.zeros_like(mem[:1]), mem[:-1]])
        for chunk in reversed(time_chunks(len(spk))) if spk.numel() else []:
            grads = detached_alias(grad_spk[chunk]), detached_alias(grad_mem[chunk])
            forward = (None if x is None else detached_alias(x[chunk]) for x in (spk, mem, adapt, prev_mem))
            state, grad_beta = neuron_backward(
                unbind_steps(grad_cur[chunk]), grads, scales, *forward, state, grad_beta, tuple(params)
            )
        return grad_cur, None, None if grad_beta is None else grad_beta.sum(), None, None, None, None


def refuse_second_derivative() -> None:
    """Raise `RuntimeError` in a backward pass that is to be differentiated again (`create_graph=True`)."""
    if torch.is_grad_enabled():
        raise RuntimeError("the fused backend has no second derivatives: use --neuron_backend step")


@compile_kernel
def pool_forward(x, pooled, index):
    """Write the maximum of each 2 x 2 window of x [N, 2, w, 2, C] to `pooled`, and its index, 0 to 3, to `index`.

    The rows of all frames are one dimension, N pairs: dividing indices would take longer than the maximum.
    """
    # In float32, since bfloat16 with fewer than 32 channels is not vectorized.
    first, second, third, fourth = (x[:, i, :, j].float() for i in (0, 1) for j in (0, 1))
    largest = torch.maximum(torch.maximum(first, second), torch.maximum(third, fourth))
    # Of equal values the first, as in torch's pooling.
    later = torch.where(second == largest, 1.0, torch.where(third == largest, 2.0, 3.0))
    pooled.copy_(largest)
    index.copy_(torch.where(first == largest, 0.0, later))


@compile_kernel
def pool_backward(grad, index, window_index):
    """Return `grad` [F, h, w, C] at its index in windows [F, h, 2, w, 2, C] of zeros."""
    here = index[:, :, None, :, None].float() == window_index
    return torch.where(here, grad[:, :, None, :, None].float(), 0.0).to(grad.dtype)


def max_pool(x: torch.Tensor, pooled: torch.Tensor, index: torch.Tensor) -> None:
    """Run `pool_forward` over x [F, 2h, 2w, C] into `pooled` and `index` [F, h, w, C], all contiguous."""
    if x.numel():
        windows = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).flatten(0, 1)
        pool_forward(*(detached_alias(x) for x in (windows, pooled.flatten(0, 1), index.flatten(0, 1))))


def max_unpool(grad: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return the gradients [F, 2h, 2w, C] of what `max_pool` read, from those of what it wrote [F, h, w, C]."""
    if not grad.numel():
        return grad.new_zeros((len(grad), 2 * grad.shape[1], 2 * grad.shape[2], grad.shape[3]))
    window_index = torch.arange(4.0, device=index.device).view(2, 1, 2, 1)
    return pool_backward(*(detached_alias(x) for x in (grad, index, window_index))).flatten(3, 4).flatten(1, 2)


class FusedConvPool(torch.autograd.Function):
    """Convolution (3 x 3, padded by 1), then max pooling: x [F, C, H, H] -> [F, D, H // 2, H // 2], channels_last.

    On a CPU, it runs in chunks of frames whose convolution fits into the cache.
    """

    CHUNK_BYTES = 16_000_000

    @staticmethod
    def frame_chunks(x: torch.Tensor, weight: torch.Tensor) -> list[slice]:
        """Cut the frames of x into chunks whose convolution fits into a CPU's cache."""
        size = x.shape[2] * x.shape[3] * len(weight) * x.element_size()
        frames = max(1, FusedConvPool.CHUNK_BYTES // size if x.device.type == "cpu" else len(x))
        return [slice(first, first + frames) for first in range(0, len(x), frames)]

    @staticmethod
    def pad_odd(x: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Return x as the convolution sees it, and the padding that is left to it."""
        if x.shape[2] % 2 == 0:
            return x, 1
        # The last row and column of the convolution are in no window. Without padding there, they are not computed.
        return F.pad(x, (1, 0, 1, 0)), 0

    @staticmethod
    def forward(ctx, x, weight):
        probe_compiler(x.device, x.dtype)
        shape = (len(x), x.shape[2] // 2, x.shape[3] // 2, len(weight))
        pooled = x.new_empty(shape)
        index = torch.empty(shape, dtype=torch.uint8, device=x.device)
        for chunk in FusedConvPool.frame_chunks(x, weight):
            padded, padding = FusedConvPool.pad_odd(x[chunk])
            conv = F.conv2d(padded, weight, padding=padding)
            max_pool(conv.movedim(1, -1), pooled[chunk], index[chunk])
        ctx.save_for_backward(x, weight, index)
        return pooled.movedim(-1, 1)

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivative()
        x, weight, index = ctx.saved_tensors
        grad = grad.movedim(1, -1).contiguous()
        needed = [ctx.needs_input_grad[0], True, False]
        grad_x = torch.empty_like(x) if needed[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for chunk in FusedConvPool.frame_chunks(x, weight):
            padded, padding = FusedConvPool.pad_odd(x[chunk])
            grad_conv = max_unpool(grad[chunk], index[chunk]).movedim(-1, 1)
            grads = torch.ops.aten.convolution_backward(
                grad_conv, padded, weight, None, [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1, needed
            )
            if needed[0]:
                grad_x[chunk] = grads[0] if padding else grads[0][:, :, 1:, 1:]
            grad_weight += grads[1]
        return grad_x, grad_weight.to(weight.dtype)


# --- Activity --------------------------------------------------------------------------------------------


ADDITION_PJ, MAC_PJ = 0.9, 4.6  # energy in pJ at 45 nm, 32-bit floating point: Horowitz 2014, ISSCC, figure 1.1.9


class ActivityMeter:
    """Measures a network's activity by layer, through forward hooks, while it is open as a context manager.

    A layer is named by its neurons, and includes the connections that lead to them. Synaptic operations are its input
    spikes times their connections: a spike counts once for each connection that it travels, an event as a spike of the
    sensor's pixel. MACs are the multiply-accumulates of the same network without spikes, where every connection is used
    at every time step. Connections to the zero padding around an image are not counted. Nor are the neurons' own
    operations.
    """

    def __init__(self, network: SpikingNetwork):
        self.network = network
        self._neurons: dict[str, int] = {}
        self._spikes: dict[str, float] = {name: 0.0 for name in network.neuron_layers()}
        self._macs: dict[str, torch.Tensor] = {}  # per recording and time step
        self._operations: dict[str, list[torch.Tensor]] = {name: [] for name in self._spikes}  # a batch: [T, B]
        self._connections: list[tuple[nn.Module, torch.Tensor]] = []  # of the layer that runs: each module, its input
        self._fan_outs: dict[nn.Module, torch.Tensor] = {}  # of one channel, since they are the same for all

    def __enter__(self):
        self._hooks = []
        for name, layer in self.network.neuron_layers().items():
            self._hooks.append(layer.register_forward_hook(functools.partial(self._count, name)))
        for module in self.network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                self._hooks.append(module.register_forward_pre_hook(self._note_connections))
        return self

    def __exit__(self, *_):
        for hook in self._hooks:
            hook.remove()

    def _note_connections(self, module, inputs):
        self._connections.append((module, inputs[0].detach()))

    def _count(self, name, _layer, _inputs, outputs):
        spk = outputs[0].detach()
        self._neurons[name] = spk[0, 0].numel()
        # Over time and batch first: float32 counts exactly to 2^24, and a whole layer may fire more spikes.
        self._spikes[name] += float(spk.sum((0, 1), dtype=torch.float32).sum(dtype=torch.float64))
        operations, self._macs[name] = 0, 0
        for module, x in self._connections:
            if module not in self._fan_outs:
                self._fan_outs[module] = fan_out(module, x.shape[1:])[0]
            sent = x.sum(1, dtype=torch.float32) * self._fan_outs[module]
            operations = operations + sent.view(len(x), -1).sum(1, dtype=torch.float64)
            self._macs[name] += x.shape[1] * self._fan_outs[module].sum(dtype=torch.float64)
        self._connections.clear()
        self._operations[name].append(operations.view(spk.shape[:2]).cpu())

    def operations(self, layer: str) -> torch.Tensor:
        """Return a layer's synaptic operations for each recording at each time step, [T, N]."""
        return torch.cat(self._operations[layer], dim=1)

    def layers(self) -> dict[str, dict[str, float]]:
        """Return by layer, per recording: neurons, firing rate (spikes per neuron and step), spikes, operations, MACs.

        Without spikes, it is neurons and MACs alone.
        """
        time_steps, num_recordings = self.operations(next(iter(self._spikes))).shape
        result = self.cost_until(torch.full((num_recordings,), time_steps))
        for name, spikes in self._spikes.items():
            activity = {"neurons": self._neurons[name]}
            if not self.network.config.no_spikes:
                activity["firing_rate"] = spikes / (num_recordings * self._neurons[name] * time_steps)
                activity["spikes"] = spikes / num_recordings
            result[name] = activity | result[name]
        return result

    def cost_until(self, step: torch.Tensor) -> dict[str, dict[str, float]]:
        """Return by layer synaptic operations (none without spikes) and MACs, if each recording ends at `step` [N].

        They are means over the recordings; steps count from 1.
        """
        result = {}
        for name, macs in self._macs.items():
            result[name] = {"macs": step.double().mean().item() * float(macs)}
            if not self.network.config.no_spikes:
                operations = self.operations(name).cumsum(0).gather(0, step[None] - 1)
                result[name] = {"synaptic_operations": operations.mean().item()} | result[name]
        return result


def energy_uj(layers: dict[str, dict[str, float]], time_steps: float) -> dict[str, float]:
    """Estimate the energy per recording in uJ, from `ActivityMeter.layers`, under four conventions.

    - 'spiking_events': a synaptic operation is an addition (`ADDITION_PJ`), in the first layer, too, for each event.
    - 'spiking_dense_input': the first layer is a convolution of numbers, whose every MAC costs `MAC_PJ`.
    - 'relu_all_frames': the same network without spikes, all MACs on all `time_steps` frames.
    - 'relu_one_frame': the same, on one frame that holds all events.

    Reading weights and states from memory, which may cost more, is left out, as in most papers, and so are pooling and
    the neurons' own operations. `time_steps` may be a mean over recordings, as of an early exit.
    """
    macs = sum(layer["macs"] for layer in layers.values())
    energy = {"relu_all_frames": MAC_PJ * macs, "relu_one_frame": MAC_PJ * macs / time_steps}
    first, *rest = layers.values()
    if "synaptic_operations" in first:
        later = ADDITION_PJ * sum(layer["synaptic_operations"] for layer in rest)
        spiking = {
            "spiking_events": ADDITION_PJ * first["synaptic_operations"] + later,
            "spiking_dense_input": MAC_PJ * first["macs"] + later,
        }
        energy = spiking | energy
    return {name: picojoules / 1e6 for name, picojoules in energy.items()}


def fan_out(layer: nn.Conv2d | nn.Linear, shape: torch.Size) -> torch.Tensor:
    """Return how many outputs of `layer` each element of an input of `shape` (without batch) reaches.

    With all weights 1, the sum of a layer's outputs has this number as its gradient in each input: in float64, a whole
    number, which bfloat16 may not hold.
    """
    x = torch.zeros(1, *shape, device=layer.weight.device, dtype=torch.float64, requires_grad=True)
    ones = torch.ones_like(layer.weight, dtype=torch.float64)
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        if isinstance(layer, nn.Linear):
            out = F.linear(x, ones)
        else:
            out = F.conv2d(x, ones, None, layer.stride, layer.padding, layer.dilation, layer.groups)
            if isinstance(layer, ConvPool):  # an odd last row or column is in no window: nothing is computed there
                out = out[..., : out.shape[2] // 2 * 2, : out.shape[3] // 2 * 2]
        return torch.autograd.grad(out.sum(), x)[0][0]
