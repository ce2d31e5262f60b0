"""Spiking networks for N-MNIST: `SpikingCNN`, `SpikingResNet`, and how their neurons run over time.

    network = build_model(NetworkConfig(model="cnn"))
    spk, mem = network(frames)      # frames [T, B, 2, 34, 34]; spk and mem [T, B, 10]
    digits = predict(spk, mem)      # [B]

The layers run one after the other, each over the whole sequence, so that a convolution sees T * B
frames at once. Read from the top: the networks, what they predict, how a neuron runs over time,
our ALIF neuron, the other layers. The compiled kernels come next, and may be skipped: they change
the speed, not the results. Measuring activity comes last.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields

import snntorch as snn
import torch
import torch.nn.functional as F
from snntorch import surrogate
from torch import nn
from torch.utils.dlpack import to_dlpack

NUM_DIGITS = 10
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # by precision
BACKENDS = ("fused", "step")
READOUTS = ("membrane", "rate", "latency")

# --- Networks -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NetworkConfig:
    """What a network is: the settings that flags, constructors and checkpoints share."""

    model: str = "cnn"  # or "resnet"
    beta: float = 0.5  # decay of the membrane potential per step
    threshold: float = 1.0  # membrane potential above which a neuron fires
    alpha: float = 0.5  # decay per step of ALIF's adaptation and of the synaptic current (resnet)
    dropout: float = 0.0  # probability of dropping a neuron of the last hidden layer
    width: int = 1  # factor on the channels and the hidden layer
    learn_beta: bool = False  # learn one beta per layer
    readout: str = "membrane"  # or "rate" or "latency": what decides on the digit (`predict`)
    no_spikes: bool = False  # ReLU in place of the neurons: the baseline without spikes

    @classmethod
    def from_settings(cls, settings: dict) -> "NetworkConfig":
        """Return the network's part of a checkpoint's settings or of a script's flags."""
        return cls(**{field.name: settings[field.name] for field in fields(cls)})

    @property
    def name(self) -> str:
        """The network's name in files: 'cnn', 'resnet', 'cnn_relu' or 'resnet_relu'."""
        return f"{self.model}_relu" if self.no_spikes else self.model


class SpikingNetwork(nn.Module):
    """Base of both networks, which define their layers and `forward_layers`.

    `config` says what the network is. How it runs is no part of it: `neuron_backend` is 'fused'
    (compiled) or 'step' (snnTorch's neurons, step by step), `precision` the type of the layers,
    'fp32' or 'bf16'. The state of neurons is always float32.
    """

    slope = 5  # of the surrogate gradient; snnTorch's 25 lets little of it reach the first layer

    def __init__(
        self, config: NetworkConfig, neuron_backend: str = "fused", precision: str = "fp32"
    ):
        super().__init__()
        self.config = config
        self.neuron_backend = neuron_backend
        self.dtype = DTYPES[precision]  # of the tensors between layers

    def forward(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map frames [T, B, 2, 34, 34] to (spk, mem) of the output neurons, both [T, B, 10].

        Raises `ValueError` for frames of another shape.
        """
        if frames.dim() != 5 or frames.shape[2:] != (2, 34, 34) or len(frames) == 0:
            raise ValueError(f"frames are {list(frames.shape)}; they must be [T, B, 2, 34, 34]")
        frames = channels_first(channels_last(frames.to(self.dtype)).contiguous())
        with torch.autocast(frames.device.type, self.dtype, enabled=self.dtype != torch.float32):
            spk, mem = self.forward_layers(frames)
        return spk.float(), mem.float()

    def forward_layers(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map frames, stored as `channels_last` says, to (spk, mem) of the output neurons."""
        raise NotImplementedError

    def make_lif(self) -> snn.SpikingNeuron:
        """Return a new neuron for a LIF layer; a subclass may return any other of snnTorch's."""
        return snn.Leaky(**self.lif_options())

    def lif_options(self) -> dict:
        """Return the options that all neurons of this network share."""
        return {
            "beta": self.config.beta,
            "threshold": self.config.threshold,
            "learn_beta": self.config.learn_beta,
            "spike_grad": FastSigmoid(self.slope),
        }

    def make_layer(self, neuron: snn.SpikingNeuron | None = None) -> nn.Module:
        """Return a layer that runs `neuron`, by default a new LIF neuron, over a sequence.

        In a network without spikes it is a ReLU.
        """
        if self.config.no_spikes:
            return WithoutSpikes()
        layer = {"fused": Fused, "step": OverTime}[self.neuron_backend]
        return layer(self.make_lif() if neuron is None else neuron)

    def neuron_layers(self) -> dict[str, nn.Module]:
        """Return the neuron layers by name (`lif1`, `res1.lif2`), in the order of their run."""
        kinds = OverTime, WithoutSpikes
        return {name: layer for name, layer in self.named_modules() if isinstance(layer, kinds)}

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

    def __init__(self, config: NetworkConfig, *args, **options):
        super().__init__(config, *args, **options)
        w1, w2, w3, hidden = (config.width * size for size in (16, 32, 64, 128))
        self.conv1 = ConvPool(2, w1)
        self.norm1 = init_norm(nn.BatchNorm2d(w1), config)
        self.lif1 = self.make_layer()
        self.conv2 = ConvPool(w1, w2)
        self.norm2 = init_norm(nn.BatchNorm2d(w2), config)
        self.lif2 = self.make_layer()
        self.conv3 = ConvPool(w2, w3)
        self.norm3 = init_norm(nn.BatchNorm2d(w3), config)
        self.lif3 = self.make_layer()
        self.fc1 = nn.Linear(w3 * 4 * 4, hidden, bias=False)
        self.norm4 = init_norm(nn.BatchNorm1d(hidden), config)
        self.lif4 = self.make_layer()
        self.dropout = TimeSharedDropout(config.dropout)
        self.fc_out = nn.Linear(hidden, NUM_DIGITS, bias=False)
        self.norm_out = init_norm(nn.BatchNorm1d(NUM_DIGITS), config)
        self.lif_out = self.make_layer()

    def forward_layers(self, frames):
        spk, _ = self.lif1(each_frame(frames, self.conv1, self.norm1))
        spk, _ = self.lif2(each_frame(spk, self.conv2, self.norm2))
        spk, _ = self.lif3(each_frame(spk, self.conv3, self.norm3))
        spk, _ = self.lif4(each_frame(flatten_images(spk), self.fc1, self.norm4))
        return self.lif_out(each_frame(self.dropout(spk), self.fc_out, self.norm_out))


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

    def __init__(self, config: NetworkConfig, *args, **options):
        super().__init__(config, *args, **options)
        w1, w2, w3, hidden = (config.width * size for size in (16, 32, 64, 128))
        adapt_scale = self.adapt_scale * config.threshold
        alif = ALIF(config.alpha, adapt_scale=adapt_scale, **self.lif_options())
        synaptic = snn.Synaptic(config.alpha, **self.lif_options())
        self.conv1 = ConvPool(2, w1)
        self.norm1 = init_norm(nn.BatchNorm2d(w1), config)
        self.lif1 = self.make_layer(alif)
        self.res1 = ResidualBlock(w1, w2, config, self.make_layer)
        self.res2 = ResidualBlock(w2, w3, config, self.make_layer)
        self.fc1 = nn.Linear(w3 * 4 * 4, hidden, bias=False)
        scale = 1.0 if config.no_spikes else input_scale(config.alpha)
        self.norm2 = init_norm(nn.BatchNorm1d(hidden), config, scale)
        self.fc_syn = self.make_layer(synaptic)
        self.dropout = TimeSharedDropout(config.dropout)
        self.fc_out = nn.Linear(hidden, NUM_DIGITS, bias=False)
        self.norm_out = init_norm(nn.BatchNorm1d(NUM_DIGITS), config)
        self.lif_out = self.make_layer()

    def forward_layers(self, frames):
        spk, _ = self.lif1(each_frame(frames, self.conv1, self.norm1))
        spk = self.res2(self.res1(spk))
        spk, _ = self.fc_syn(each_frame(flatten_images(spk), self.fc1, self.norm2))
        return self.lif_out(each_frame(self.dropout(spk), self.fc_out, self.norm_out))


class ResidualBlock(nn.Module):
    """Two layers of neurons, whose spikes are added; the second one also gets the block's input:

        conv1, max pool, norm1, lif1                                    -> spk1
        conv2, norm2 of spk1, + shortcut of the summed 2 x 2 inputs, lif2  -> spk2
        spk1 + spk2                                                     -> 0, 1 or 2 at each place

    Spikes [T, B, in_channels, H, W] -> [T, B, out_channels, H // 2, W // 2]. The sum lets gradients
    past the second neuron; the blocks of Fang et al. 2021, "Deep residual learning in spiking
    neural networks" (SEW), add the spikes of the shortcut instead.
    """

    def __init__(
        self, in_channels: int, out_channels: int, config: NetworkConfig, make_layer: Callable
    ):
        super().__init__()
        self.conv1 = ConvPool(in_channels, out_channels)
        self.norm1 = init_norm(nn.BatchNorm2d(out_channels), config)
        self.lif1 = make_layer()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = init_norm(nn.BatchNorm2d(out_channels), config)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        with torch.no_grad():
            self.shortcut.weight *= initial_current(config)  # as the weight of norm2 is
        self.lif2 = make_layer()

    def forward(self, spk):
        spk1, _ = self.lif1(each_frame(spk, self.conv1, self.norm1))
        cur = each_frame(spk1, self.conv2, self.norm2) + each_frame(spk, sum_pool, self.shortcut)
        spk2, _ = self.lif2(cur)
        return spk1 + spk2


NETWORKS = {"cnn": SpikingCNN, "resnet": SpikingResNet}


def build_model(config: NetworkConfig, **options) -> SpikingNetwork:
    """Build the network that `config.model` names; torch's global generator draws its weights.

    `options` are `neuron_backend` and `precision`, which say how it runs.
    """
    return NETWORKS[config.model](config, **options)


def restore_network(checkpoint: dict, **options) -> SpikingNetwork:
    """Return the network of a checkpoint that `utils.load_checkpoint` read, in evaluation mode."""
    network = build_model(NetworkConfig.from_settings(checkpoint["settings"]), **options)
    network.load_state_dict(checkpoint["network"])
    return network.eval()


def init_norm(norm: nn.Module, config: NetworkConfig, scale: float = 1.0) -> nn.Module:
    """Set a norm's weight, hence the spread of its output, to `scale` times `initial_current`."""
    nn.init.constant_(norm.weight, initial_current(config) * scale)
    return norm


def initial_current(config: NetworkConfig) -> float:
    """Return the standard deviation of a LIF layer's current at the start; 1 without spikes.

    With one threshold, a layer is neither silent nor saturated (threshold-dependent normalization,
    Zheng et al. 2021). If beta is above 0.5, currents sum to membrane potentials far from the
    threshold, where the surrogate gradient is small. The currents then start smaller.
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


# --- Predictions ----------------------------------------------------------------------------------


def predict(spk: torch.Tensor, mem: torch.Tensor, readout: str = "membrane") -> torch.Tensor:
    """Return the digit [B] that the output neurons' spk and mem [T, B, 10] tell.

    - 'membrane': the largest mean membrane potential. In the mean over time,
      U (1 - beta) = I - rate * threshold: of two neurons that fire at the same rate, the potentials
      still tell which has the larger current.
    - 'rate': the most spikes (rate code).
    - 'latency': the first spike (latency code).

    Ties of the last two are decided by the membrane.
    """
    return predict_over_time(spk, mem, readout)[-1]


def predict_over_time(spk, mem, readout: str = "membrane") -> torch.Tensor:
    """Return the prediction of `predict` after each of the T time steps, [T, B]."""
    scores = digit_scores(spk, mem, "membrane")
    if readout != "membrane":
        scores = scores.masked_fill(~leading_digits(spk, readout), -torch.inf)
    return scores.argmax(-1)


def leading_digits(spk: torch.Tensor, readout: str) -> torch.Tensor:
    """Return which digits lead by 'rate' or 'latency' after each time step, bool [T, B, 10].

    Several lead if their neurons have fired equally often, or first at the same step; all do if
    none has fired.
    """
    scores = digit_scores(spk, None, readout)
    return scores == scores.amax(-1, keepdim=True)


def digit_scores(spk: torch.Tensor, mem: torch.Tensor | None, readout: str) -> torch.Tensor:
    """Return the score of each digit for a readout after each time step, [T, B, 10].

    'membrane': the mean membrane potential so far; 'rate': the firing rate so far; 'latency': minus
    the number of steps without a spike before the first.
    """
    if readout == "latency":
        return -(spk.cumsum(0) == 0).float().cumsum(0)
    # Means: sums grow faster than what they tell, and no temperature would fit all steps.
    values = {"membrane": mem, "rate": spk}[readout]
    steps = torch.arange(1, len(values) + 1, device=values.device)
    return values.cumsum(0) / steps.view(-1, 1, 1)


def confidence(spk, mem, readout: str, temperature: float) -> torch.Tensor:
    """Return the confidence after each time step, [T, B]: largest softmax(scores / temperature)."""
    return torch.softmax(digit_scores(spk, mem, readout) / temperature, -1).amax(-1)


def fit_temperature(spk, mem, readout: str, labels: torch.Tensor) -> float:
    """Return the temperature that minimizes the mean cross entropy.

    The mean is over all time steps and recordings, labels [B]. Searched in steps of 2**0.25, from
    1/64 to 16 standard deviations of the scores. Source: Guo et al. 2017, "On calibration of modern
    neural networks".
    """
    scores = digit_scores(spk, mem, readout).flatten(0, 1)
    labels = labels.expand(len(spk), -1).flatten()
    scale = scores.std().item() or 1.0  # 0 if the output neurons are silent

    def loss(quarter_octaves: int) -> float:
        return F.cross_entropy(scores / (scale * 2 ** (quarter_octaves / 4)), labels).item()

    return scale * 2 ** (min(range(-24, 17), key=loss) / 4)


# --- Neurons over time ----------------------------------------------------------------------------


class OverTime(nn.Module):
    """Runs any snnTorch neuron over a whole sequence, step by step.

        spk, mem = OverTime(snn.Leaky(beta=0.5))(cur)   # all three [T, B, ...]

    The neuron starts each sequence with zero state, and is left with it. Raises `TypeError` for a
    module that is no snnTorch neuron.
    """

    def __init__(self, neuron: snn.SpikingNeuron):
        super().__init__()
        if not (isinstance(neuron, snn.SpikingNeuron) and hasattr(neuron, "reset_mem")):
            name = type(neuron).__name__
            raise TypeError(f"{name} is no snnTorch neuron with a reset_mem method")
        self.neuron = neuron

    def forward(self, cur):
        self.neuron.reset_mem()  # snntorch.utils.reset would miss neurons of a deep copy
        spks, mems = [], []
        for step_cur in cur.float():  # potentials in bfloat16 stand still at small currents
            out = self.neuron(step_cur)
            spks.append(out[0] if isinstance(out, tuple) else out)
            mems.append(self.neuron.mem)
        self.neuron.reset_mem()  # which lets go of the gradients' graph
        return stack_steps(spks).to(cur.dtype), stack_steps(mems).to(cur.dtype)


class Fused(OverTime):
    """Runs a neuron like `OverTime` by compiled kernels, several times as fast.

    It takes `snn.Leaky`, `snn.Synaptic` and `ALIF` with scalar parameters, of which `beta` may be
    learned, reset by subtraction, and `FastSigmoid`. Raises `ValueError` for anything else.
    """

    def __init__(self, neuron: snn.SpikingNeuron):
        super().__init__(neuron)
        if not can_fuse(neuron):
            raise ValueError(
                "Fused runs snn.Leaky, snn.Synaptic and ALIF with scalar parameters, of which beta "
                "alone is learned, reset by subtraction, FastSigmoid and no other option: "
                f"run this {type(neuron).__name__} by OverTime (neuron_backend step)"
            )

    def forward(self, cur):
        neuron = self.neuron
        beta = neuron.beta.clamp(0, 1)  # as snnTorch does, and with Synaptic's alpha
        alpha, zero = getattr(neuron, "alpha", None), torch.zeros_like(beta)
        if isinstance(neuron, ALIF):
            params = beta, neuron.threshold, zero, alpha, neuron.adapt_scale
        elif isinstance(neuron, snn.Synaptic):
            params = beta, neuron.threshold, alpha.clamp(0, 1), zero, zero
        else:
            params = beta, neuron.threshold, None, None, None
        cur = channels_last(cur)
        slope = neuron.spike_grad.slope
        outputs = FusedNeuron.apply(cur.flatten(1).contiguous(), slope, *params)
        return tuple(channels_first(x.view(cur.shape)) for x in outputs)


def can_fuse(neuron: snn.SpikingNeuron) -> bool:
    """Return whether the kernels know all that a neuron does."""
    parameters = ("alpha", "beta", "threshold", "adapt_scale", "graded_spikes_factor")
    values = [getattr(neuron, name) for name in parameters if hasattr(neuron, name)]
    options = ("inhibition", "state_quant", "init_hidden", "output")
    return (
        type(neuron) in (snn.Leaky, snn.Synaptic, ALIF)
        and type(neuron.spike_grad) is FastSigmoid
        and neuron.reset_mechanism == "subtract"
        and getattr(neuron, "reset_delay", True)
        and not any(getattr(neuron, name) for name in options)
        and {name for name, _ in neuron.named_parameters()} <= {"beta"}
        and all(value.dim() == 0 for value in values)
        and float(neuron.graded_spikes_factor) == 1
    )


@dataclass(frozen=True)
class FastSigmoid:
    """`snntorch.surrogate.fast_sigmoid(slope)` that can be pickled, and asked for its slope.

    Spikes where x > 0; the gradient is 1 / (1 + slope |x|)^2 (Zenke and Ganguli 2018).
    """

    slope: float = SpikingNetwork.slope

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return surrogate.FastSigmoid.apply(x, self.slope)


class ALIF(snn.SpikingNeuron):
    """Leaky integrate-and-fire with an adaptive threshold, one step per call, as in snnTorch.

        a[t] = alpha a[t-1] + (1 - alpha) S[t-1]
        threshold[t] = threshold + adapt_scale a[t]
        U[t] = beta U[t-1] + I[t] - S[t-1] threshold[t-1]
        S[t] = (U[t] > threshold[t])

        alif = ALIF(alpha=0.9, beta=0.5, adapt_scale=0.5)
        spk, adapt, mem = alif.reset_mem()
        spk, adapt, mem = alif(cur[0], spk, adapt, mem)    # without states, it goes on from its own

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
        super().__init__(threshold, spike_grad, learn_threshold=learn_threshold)
        self.register_buffer("alpha", torch.as_tensor(alpha))
        self.register_buffer("adapt_scale", torch.as_tensor(adapt_scale))
        beta = torch.as_tensor(beta)
        if learn_beta:
            self.beta = nn.Parameter(beta)
        else:
            self.register_buffer("beta", beta)
        for name in ("spk", "adapt", "mem"):
            self.register_buffer(name, torch.zeros(0), persistent=False)

    def reset_mem(self):
        """Set the state to zero, and return it."""
        states = self.spk, self.adapt, self.mem
        self.spk, self.adapt, self.mem = (torch.zeros_like(x) for x in states)
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


class WithoutSpikes(nn.Module):
    """A ReLU in the place of neurons: returns (relu(cur), cur), as they return (spk, mem)."""

    def forward(self, cur):
        return torch.relu(cur), cur


# --- Other layers ---------------------------------------------------------------------------------


class ConvPool(nn.Conv2d):
    """Convolution (3 x 3, padded by 1), then max pooling (2 x 2).

    x [F, C, H, W] -> [F, D, H // 2, W // 2]. Pooling before norm and neuron is 2.5 times as fast.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1, bias=False)

    def forward(self, x):
        return F.max_pool2d(super().forward(x), 2)


class TimeSharedDropout(nn.Dropout):
    """Dropout with one mask for all steps of a recording: spk [T, B, N] -> [T, B, N].

    A neuron is dropped for a whole recording, as in SpikingJelly's multi-step `Dropout`.
    """

    def forward(self, spk):
        return spk * super().forward(torch.ones_like(spk[0])) if self.training else spk


def sum_pool(x: torch.Tensor) -> torch.Tensor:
    """Count the spikes in each window (2 x 2): x [F, C, H, W] -> [F, C, H // 2, W // 2]."""
    return F.avg_pool2d(x, 2, divisor_override=1)


def each_frame(x: torch.Tensor, *layers: Callable) -> torch.Tensor:
    """Apply layers without time to all steps at once: x [T, B, ...] as [T * B, ...]."""
    out = x.flatten(0, 1)
    for layer in layers:
        out = layer(out)
    return out.unflatten(0, x.shape[:2])


# Images are indexed [T, B, C, H, W] but stored [T, B, H, W, C], as `torch.channels_last` frames:
# pooling and the backward pass of convolutions are several times faster on a CPU that way.


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """View images [T, B, C, H, W] as [T, B, H, W, C], uncopied; return anything else as it is."""
    return x.movedim(2, -1) if x.dim() == 5 else x


def channels_first(x: torch.Tensor) -> torch.Tensor:
    """View images [T, B, H, W, C] as [T, B, C, H, W]; return anything else as it is."""
    return x.movedim(-1, 2) if x.dim() == 5 else x


def flatten_images(x: torch.Tensor) -> torch.Tensor:
    """Flatten images [T, B, C, H, W] in the order in which they are stored: [T, B, H * W * C]."""
    return channels_last(x).flatten(2)


def stack_steps(steps: list[torch.Tensor]) -> torch.Tensor:
    """Stack steps [B, ...] along a new first dimension, images in channels-last format."""
    if steps[0].dim() == 4:
        return channels_first(torch.stack([step.movedim(1, -1) for step in steps]))
    return torch.stack(steps)


# --- Compiled kernels: may be skipped -------------------------------------------------------------

# Hand-written forward and backward: 13.0 ms, compiled in 4 s. torch.compile of a loop and autograd:
# 49.6 ms, compiled in 17 s (T = 25, 592,000 neurons, bfloat16, two cores with AMX).

# The steps a kernel runs per call, between which the state stays in registers. A kernel over all
# steps would be compiled for each T.
STEPS_PER_CALL = 5


class FusedNeuron(torch.autograd.Function):
    """Neurons over a sequence: cur [T, N] -> (spk, mem), both [T, N].

        I_syn[t] = syn_alpha I_syn[t-1] + I[t]
        a[t] = adapt_alpha a[t-1] + (1 - adapt_alpha) S[t-1]
        threshold[t] = threshold + adapt_scale a[t]
        U[t] = beta U[t-1] + I_syn[t] - S[t-1] threshold[t-1]
        S[t] = (U[t] > threshold[t])

    `snn.Synaptic` has adapt_scale = 0, `ALIF` syn_alpha = 0; `snn.Leaky` has None for both and for
    adapt_alpha. Gradients reach `cur` and `beta`. The state between steps is always float32.
    """

    @staticmethod
    def forward(ctx, cur, slope, *params):  # beta, threshold, syn_alpha, adapt_alpha, adapt_scale
        ctx.set_materialize_grads(False)
        params = tuple(plain(x) for x in params)
        forward, _ = kernels(cur.device, cur.dtype)
        spk, mem, adapt = run_forward(forward, cur, params)
        ctx.save_for_backward(spk, mem, adapt, *params)
        ctx.slope = slope
        return spk, mem

    @staticmethod
    def backward(ctx, grad_spk, grad_mem):
        if torch.is_grad_enabled():  # once_differentiable lets torch.autograd.grad pass in silence
            raise RuntimeError("Fused has no second derivative: use OverTime (neuron_backend step)")
        spk, mem, adapt, *params = ctx.saved_tensors
        grad_spk = torch.zeros_like(spk) if grad_spk is None else grad_spk.contiguous()
        # Without gradients of mem, grad_spk times 0 stands in: no other variant is compiled.
        scales = (0.0 if grad_mem is None else 1.0, ctx.slope)
        # torch.full, since torch.tensor would synchronize with a GPU.
        scales = tuple(torch.full((), x, device=spk.device) for x in scales)
        grad_mem = grad_spk if grad_mem is None else grad_mem.contiguous()
        grad_cur = torch.empty_like(spk)
        state = (*zeros(spk, 1), *((None, None) if adapt is None else zeros(spk, 2)))
        grad_beta = prev_mem = None
        if ctx.needs_input_grad[2]:
            (grad_beta,) = zeros(spk, 1)
            prev_mem = torch.cat([torch.zeros_like(mem[:1]), mem[:-1]])
        _, backward = kernels(spk.device, spk.dtype)
        for steps in reversed(time_chunks(spk)):
            grads = plain(grad_spk[steps]), plain(grad_mem[steps])
            outputs = (None if x is None else plain(x[steps]) for x in (spk, mem, adapt, prev_mem))
            state, grad_beta = backward(
                unbind(grad_cur[steps]), grads, scales, *outputs, state, grad_beta, tuple(params)
            )
        grad_beta = None if grad_beta is None else grad_beta.sum()
        return grad_cur, None, grad_beta, None, None, None, None


def neuron_forward(cur, spks, mems, adapts, state, params):
    """Run neurons over the steps of cur [steps, N]; fill the lists of tensors [N] with the outputs.

    `state` is (mem, spk, syn, adapt) after the step before, float32 [N]; `params` are those of
    `FusedNeuron`. Returns the new state.
    """
    beta, threshold, syn_alpha, adapt_alpha, adapt_scale = params
    mem, spk, syn, adapt = state
    leaky = adapt_scale is None  # neither synaptic current nor adaptation
    threshold_now = threshold if leaky else threshold + adapt_scale * adapt
    for t in range(len(spks)):
        current = cur[t].float()
        if not leaky:
            syn = current = syn_alpha * syn + current
        mem = beta * mem + current - spk * threshold_now
        if not leaky:
            adapt = adapt_alpha * adapt + (1 - adapt_alpha) * spk
            threshold_now = threshold + adapt_scale * adapt
            adapts[t].copy_(adapt)
        spk = (mem > threshold_now).float()
        spks[t].copy_(spk)
        mems[t].copy_(mem)
    return mem, spk, syn, adapt


# The backward pass. dX is the derivative of the loss by X; the reset's S[t-1] is a constant;
# fire[t] = 1 / (1 + slope |U[t] - threshold[t]|)^2 is the surrogate derivative of a spike.
#
#     dS[t]         = what comes from the next layer + (1 - adapt_alpha) da[t+1]
#     dthreshold[t] = -fire[t] dS[t] - S[t] dU[t+1]
#     dU[t]         = what comes from the loss + fire[t] dS[t] + beta dU[t+1]
#     da[t]         = adapt_scale dthreshold[t] + adapt_alpha da[t+1]
#     dI[t]         = dI_syn[t] = dU[t] + syn_alpha dI_syn[t+1]
#     dbeta         = the sum of dU[t] U[t-1]


def neuron_backward(
    grad_curs, grads, scales, spks, mems, adapts, prev_mems, state, grad_beta, params
):
    """Run the gradients back over a few steps; fill the list `grad_curs` of tensors [N].

    `grads` are those of (spk, mem), [steps, N]; `scales` are a factor of the second and the slope.
    `spks`, `mems` and `adapts` [steps, N] are those of the forward pass. If beta is learned,
    `prev_mems` are the potentials one step earlier, and `grad_beta` [N] is its gradient so far.
    `state` is (grad_mem, grad_syn, grad_adapt), above dU, dI_syn and da, of the step after.
    Returns the new state and grad_beta.
    """
    beta, threshold, syn_alpha, adapt_alpha, adapt_scale = params
    grad_mem_scale, slope = scales
    grad_spks, grad_mems = grads
    grad_mem, grad_syn, grad_adapt = state
    leaky = adapt_scale is None
    for t in reversed(range(len(grad_curs))):
        grad_spk = grad_spks[t].float()
        threshold_now = threshold
        if not leaky:
            grad_spk = grad_spk + (1 - adapt_alpha) * grad_adapt
            threshold_now = threshold + adapt_scale * adapts[t].float()
        grad_fire = grad_spk / (1 + slope * (mems[t].float() - threshold_now).abs()) ** 2
        grad_threshold = -grad_fire - spks[t].float() * grad_mem  # grad_mem is still dU[t+1]
        grad_mem = beta * grad_mem + grad_fire
        grad_mem = grad_mem + grad_mem_scale * grad_mems[t].float()
        if grad_beta is not None:
            grad_beta = grad_beta + grad_mem * prev_mems[t].float()
        if leaky:
            grad_curs[t].copy_(grad_mem)
        else:
            grad_adapt = adapt_alpha * grad_adapt + adapt_scale * grad_threshold
            grad_syn = syn_alpha * grad_syn + grad_mem
            grad_curs[t].copy_(grad_syn)
    return (grad_mem, grad_syn, grad_adapt), grad_beta


def run_forward(forward: Callable, cur, params):
    """Run `neuron_forward`, compiled or not, over all steps: cur [T, N] -> (spk, mem, adapt)."""
    spk, mem, adapt = torch.empty_like(cur), torch.empty_like(cur), None
    state = (*zeros(cur, 2), None, None)
    if params[-1] is not None:  # not for snn.Leaky
        adapt, state = torch.empty_like(cur), tuple(zeros(cur, 4))
    for steps in time_chunks(cur):
        outputs = (None if x is None else unbind(x[steps]) for x in (spk, mem, adapt))
        state = forward(plain(cur[steps]), *outputs, state, params)
    return spk, mem, adapt


@functools.cache
def kernels(device: torch.device, dtype: torch.dtype) -> tuple[Callable, Callable]:
    """Return the forward and the backward kernel, compiled for all shapes at their first call.

    The forward one is tried on zeros; where that fails, both are returned as they are, and a
    warning says so.
    """
    options = {"dynamic": True, "fullgraph": True, "recompile_limit": 256}
    forward, backward = (torch.compile(k, **options) for k in (neuron_forward, neuron_backward))
    neurons = 16 if device.type == "cpu" else 2**18  # Triton chooses its blocks at the first call
    half, one = (torch.tensor(x, device=device) for x in (0.5, 1.0))
    try:
        cur = torch.zeros(STEPS_PER_CALL, neurons, device=device, dtype=dtype)
        run_forward(forward, cur, (half, one, None, None, None))
    except Exception as error:  # compilers fail in many ways
        print(
            "WARNING: neurons run uncompiled, with the same results but several times slower: "
            "compiling needs a C++ compiler (g++) or Triton, and a folder for its cache "
            f"({str(error).partition(chr(10))[0]})",
            file=sys.stderr,
        )
        return neuron_forward, neuron_backward
    return forward, backward


def describe_backend(network: SpikingNetwork) -> str:
    """Return how neurons run: 'fused', 'fused, uncompiled', 'step', or 'ReLU' without spikes."""
    if network.config.no_spikes:
        return "ReLU"
    if network.neuron_backend == "fused":
        forward, _ = kernels(network.fc_out.weight.device, network.dtype)
        return "fused, uncompiled" if forward is neuron_forward else "fused"
    return network.neuron_backend


def time_chunks(x: torch.Tensor) -> list[slice]:
    """Cut the steps of x [T, N] into calls of `STEPS_PER_CALL`, and single ones for the rest."""
    if not x.numel():
        return []
    whole = len(x) - len(x) % STEPS_PER_CALL
    chunks = [slice(t, t + STEPS_PER_CALL) for t in range(0, whole, STEPS_PER_CALL)]
    return chunks + [slice(t, t + 1) for t in range(whole, len(x))]


def zeros(x: torch.Tensor, count: int) -> list[torch.Tensor]:
    """Return `count` tensors of zeros [N], in float32, for x [T, N]."""
    return [torch.zeros(x.shape[1], device=x.device) for _ in range(count)]


def plain(x: torch.Tensor | None) -> torch.Tensor | None:
    """Return x on the same memory, but no view and no gradient, which trigger recompilation."""
    # By to_dlpack it is four times as fast as by from_dlpack(x).
    return None if x is None else torch.from_dlpack(to_dlpack(x.detach()))


def unbind(x: torch.Tensor) -> list[torch.Tensor]:
    """Return the steps of x [T, N] as a list of tensors [N], into which kernels write directly."""
    return [plain(step) for step in x]


# --- Activity -------------------------------------------------------------------------------------

# Energy in pJ at 45 nm, 32-bit floating point: Horowitz 2014, ISSCC, figure 1.1.9.
ADDITION_PJ, MAC_PJ = 0.9, 4.6


class ActivityMeter:
    """Measures a network's activity by layer while open as a context manager, by forward hooks.

        with ActivityMeter(network) as meter:
            network(frames)
        meter.outputs["lif1"]       # (spk, mem) of the last pass
        meter.layers()              # means over all recordings that passed

    A layer is named by its neurons, and includes the connections that lead to them. Synaptic
    operations are its input spikes times their connections; an event counts as a spike of the
    sensor's pixel. MACs are the multiply-accumulates of the same network without spikes, where
    every connection is used at every step. Connections to the padding around an image are not
    counted, nor are the neurons' own operations.
    """

    def __init__(self, network: SpikingNetwork):
        self.network = network
        self.outputs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.num_recordings = 0
        self._inputs: list[tuple[nn.Module, torch.Tensor]] = []  # since the last neuron layer
        self._fan_outs: dict[nn.Module, torch.Tensor] = {}  # of one channel: equal for all
        self._macs: dict[str, float] = {}  # per recording and time step
        self._spikes = {name: 0.0 for name in network.neuron_layers()}  # [T]: of all recordings
        self._operations = {name: [] for name in self._spikes}  # of each batch: [T, B]

    def __enter__(self):
        self._hooks = [
            layer.register_forward_hook(functools.partial(self._count, name))
            for name, layer in self.network.neuron_layers().items()
        ]
        for module in self.network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                self._hooks.append(module.register_forward_pre_hook(self._note_input))
        return self

    def __exit__(self, *_):
        for hook in self._hooks:
            hook.remove()

    def _note_input(self, module, inputs):
        self._inputs.append((module, inputs[0].detach()))

    def _count(self, name, _layer, _inputs, outputs):
        spk, mem = (x.detach().float() for x in outputs)
        self.outputs[name] = spk, mem
        if name == next(iter(self._spikes)):
            self.num_recordings += spk.shape[1]
        # Over the recordings first: float32 counts exactly to 2^24, and a layer may fire more.
        self._spikes[name] += spk.sum(1).flatten(1).cpu().sum(1, dtype=torch.float64)
        operations = torch.zeros(spk.shape[0] * spk.shape[1], dtype=torch.float64, device="cpu")
        self._macs[name] = 0.0
        for module, x in self._inputs:
            if module not in self._fan_outs:
                self._fan_outs[module] = fan_out(module, x.shape[1:])[0]
            sent = x.sum(1, dtype=torch.float32).cpu() * self._fan_outs[module]
            operations += sent.view(len(x), -1).sum(1)
            self._macs[name] += x.shape[1] * float(self._fan_outs[module].sum())
        self._inputs.clear()
        self._operations[name].append(operations.view(spk.shape[:2]))

    def operations(self, layer: str) -> torch.Tensor:
        """Return a layer's synaptic operations for each recording at each time step, [T, N]."""
        return torch.cat(self._operations[layer], dim=1)

    def firing_rate(self, layer: str) -> torch.Tensor:
        """Return a layer's spikes per neuron at each time step, [T]."""
        neurons = self.outputs[layer][0][0, 0].numel()
        return self._spikes[layer] / (self.num_recordings * neurons)

    def layers(self) -> dict[str, dict[str, float]]:
        """Return by layer: neurons and firing rate; synaptic operations and MACs per recording.

        Without spikes, it is neurons and MACs alone.
        """
        result = {}
        for name, macs in self._macs.items():
            spk = self.outputs[name][0]
            result[name] = {"neurons": spk[0, 0].numel(), "macs": len(spk) * macs}
            if not self.network.config.no_spikes:
                result[name]["firing_rate"] = self.firing_rate(name).mean().item()
                operations = self.operations(name).sum(0).mean().item()
                result[name]["synaptic_operations"] = operations
        return result

    def operations_until(self, step: torch.Tensor) -> float:
        """Return the mean synaptic operations of recordings that end at `step` [N], from 1."""
        total = sum(self.operations(name) for name in self._operations)
        return total.cumsum(0).gather(0, step[None] - 1).mean().item()


def energy_uj(layers: dict[str, dict[str, float]]) -> dict[str, float]:
    """Estimate the energy per recording in uJ, from `ActivityMeter.layers`.

    'spiking': an addition (`ADDITION_PJ`) for each synaptic operation, in the first layer for each
    event and connection. 'without_spikes': a `MAC_PJ` for each MAC of the same network. Memory
    traffic, which may cost more, pooling and the neurons' own operations are left out, as in most
    papers.
    """
    energy = {"without_spikes": MAC_PJ * sum(layer["macs"] for layer in layers.values()) / 1e6}
    if all("synaptic_operations" in layer for layer in layers.values()):
        operations = sum(layer["synaptic_operations"] for layer in layers.values())
        energy = {"spiking": ADDITION_PJ * operations / 1e6} | energy
    return energy


def fan_out(layer: nn.Conv2d | nn.Linear, shape: torch.Size) -> torch.Tensor:
    """Return how many outputs of `layer` each element of an input of `shape` (no batch) reaches.

    With all weights 1, this is the gradient of the sum of its outputs: in float64, a whole number.
    """
    options = {"dtype": torch.float64, "device": "cpu"}
    x = torch.zeros(1, *shape, **options, requires_grad=True)
    ones = torch.ones(layer.weight.shape, **options)
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        if isinstance(layer, nn.Linear):
            out = F.linear(x, ones)
        else:
            out = F.conv2d(x, ones, None, layer.stride, layer.padding)
        if isinstance(layer, ConvPool):  # an odd last row or column is in no window
            out = out[..., : out.shape[2] // 2 * 2, : out.shape[3] // 2 * 2]
        return torch.autograd.grad(out.sum(), x)[0][0]
