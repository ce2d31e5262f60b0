"""Neurons against snnTorch's own stepped by hand and their equations; networks; activity."""

import copy
import pickle
import re
import shlex
import sys
from pathlib import Path

import benchmark
import numpy as np
import pytest
import snntorch as snn
import torch
import torch.nn.functional as F
from conftest import run
from snntorch import surrogate
from torch import nn

import models
from models import (
    ALIF,
    ActivityMeter,
    FastSigmoid,
    NetworkConfig,
    NetworkError,
    NeuronLayer,
    SpikingNetwork,
    describe_backend,
    predict,
)

TIME_STEPS = [3, 10, 27]  # kernels take five steps per call, and single ones for the rest
each_device = pytest.mark.usefixtures("on_device")
each_model = pytest.mark.parametrize("model", ["cnn", "resnet"])
BACKENDS = ("fused", "step")
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def draw(*shape, seed=0) -> torch.Tensor:
    """Return normal numbers on the default device, the same on each."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu").to(torch.get_default_device())


def make_current(time_steps=30, *shape) -> torch.Tensor:
    """Return a current [T, B, ...] that makes neurons fire often, and needs a gradient."""
    return (draw(time_steps, *(shape or (4, 50))) * 0.8).requires_grad_()


def make_frames(time_steps: int, batch: int, rate=0.2) -> torch.Tensor:
    """Return frames with `rate` events a bin in the mean, the same at each call."""
    mean = torch.full((time_steps, batch, 2, 34, 34), rate, device="cpu")
    frames = torch.poisson(mean, torch.Generator("cpu").manual_seed(0))
    return frames.to(torch.get_default_device())


def make_network(model: str, backend="fused", precision="fp32", **config) -> SpikingNetwork:
    """Build a network, the same at each call."""
    torch.manual_seed(0)
    config = NetworkConfig(model=model, **config)
    return models.build_model(config, neuron_backend=backend, precision=precision)


def network_that_fires(model: str, frames: torch.Tensor, backend="fused") -> SpikingNetwork:
    """Return an untrained network in eval mode whose norms know the frames: else it is silent."""
    network = make_network(model, backend)
    with torch.no_grad():
        for _ in range(40):
            network(frames)
    return network.eval()


def record_layers(network: SpikingNetwork, frames: torch.Tensor) -> dict[str, tuple]:
    """Run a network without learning; return (current, spikes, potentials) by neuron layer."""
    layers, shape = {}, frames.shape[:2]

    def record(name):
        def hook(_layer, inputs, outputs):
            layers[name] = tuple(x.unflatten(0, shape) for x in (inputs[0], *outputs))

        return hook

    hooks = [x.register_forward_hook(record(name)) for name, x in network.neuron_layers().items()]
    with torch.no_grad():
        network(frames)
    for hook in hooks:
        hook.remove()
    return layers


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference, relative to that of what is expected."""
    return float((result.float() - expected).detach().norm() / expected.detach().norm())


# --- Neurons over time ----------------------------------------------------------------------------


class Layer(NeuronLayer):
    """A layer of neurons on sequences [T, B, ...], by a backend."""

    def __init__(self, neuron: snn.SpikingNeuron, backend: str):
        super().__init__(neuron)
        self.stepped |= backend != "fused"

    def forward(self, cur):
        outputs = super().forward(cur.flatten(0, 1), len(cur))
        return tuple(x.unflatten(0, cur.shape[:2]) for x in outputs)


class ByHand(nn.Module):
    """The loop of snnTorch's tutorials over a neuron."""

    def __init__(self, neuron: snn.SpikingNeuron):
        super().__init__()
        self.neuron = neuron

    def forward(self, cur):
        state, outputs = self.neuron.reset_mem(), []
        state = [state] if isinstance(state, torch.Tensor) else state
        for step_cur in cur:
            out = self.neuron(step_cur, *state)
            state = out[-len(state) :]
            outputs.append((out[0], out[-1]))
        return tuple(torch.stack(x) for x in zip(*outputs, strict=True))


class ALIFByEquation(nn.Module):
    """A loop over the equations of ALIF, written without its class."""

    def __init__(self, learn_beta=False, learn_threshold=False):
        super().__init__()
        beta = nn.Parameter(torch.tensor(0.6), requires_grad=learn_beta)
        threshold = nn.Parameter(torch.tensor(0.4), requires_grad=learn_threshold)
        self.neuron = nn.ParameterDict({"beta": beta, "threshold": threshold})

    def forward(self, cur):
        mem = spk = adapt = torch.zeros_like(cur[0])
        outputs, threshold = [], self.neuron["threshold"]
        for step_cur in cur:
            mem = self.neuron["beta"] * mem + step_cur - spk.detach() * threshold
            adapt = 0.9 * adapt + (1 - 0.9) * spk
            threshold = self.neuron["threshold"] + 0.7 * adapt
            spk = surrogate.fast_sigmoid(5)(mem - threshold)
            outputs.append((spk, mem))
        return tuple(torch.stack(x) for x in zip(*outputs, strict=True))


def leaky_pair(beta=0.9, threshold=0.5, slope=5, **learn):
    """Return a Leaky neuron, and the same with snnTorch's own surrogate, stepped by hand."""
    neuron = snn.Leaky(beta, threshold, FastSigmoid(slope), **learn)
    reference = snn.Leaky(beta, threshold, surrogate.fast_sigmoid(slope), **learn)
    return neuron, ByHand(reference)


def synaptic_pair(alpha=0.7, beta=0.6, **learn):
    """Return a Synaptic neuron, and the same with snnTorch's own surrogate, stepped by hand."""
    neuron = snn.Synaptic(alpha, beta, spike_grad=FastSigmoid(5), **learn)
    reference = snn.Synaptic(alpha, beta, spike_grad=surrogate.fast_sigmoid(5), **learn)
    return neuron, ByHand(reference)


def alif_pair(**learn):
    """Return an ALIF neuron, and its equations."""
    return ALIF(0.9, 0.6, 0.7, 0.4, FastSigmoid(5), **learn), ALIFByEquation(**learn)


PAIRS = [leaky_pair, synaptic_pair, alif_pair]


def learned(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that get a gradient, by name."""
    return {name: x for name, x in sorted(module.named_parameters()) if x.requires_grad}


def gradients(outputs, inputs) -> list[tuple]:
    """Return the gradients of the spikes alone, of the potentials alone, and of both.

    An output that is left out gets no gradient at all, as in a network.
    """
    weights = [draw(*x.shape, seed=i).bfloat16().to(x.dtype) for i, x in enumerate(outputs)]
    return [
        torch.autograd.grad(outputs[used], inputs, weights[used], retain_graph=True)
        for used in (slice(0, 1), slice(1, 2), slice(0, 2))
    ]


def assert_equal(layer: nn.Module, reference: nn.Module, cur: torch.Tensor) -> None:
    """Check spikes, potentials and gradients, of the current and of all that is learned."""
    (spk, mem), (expected_spk, expected_mem) = layer(cur), reference(cur)
    assert 0.05 < expected_spk.mean() < 0.95, "it says nothing if neurons never or always fire"
    assert torch.equal(spk, expected_spk)
    torch.testing.assert_close(mem, expected_mem)
    assert learned(layer).keys() == learned(reference).keys()
    results = gradients((spk, mem), (cur, *learned(layer).values()))
    expected = gradients((expected_spk, expected_mem), (cur, *learned(reference).values()))
    for result, same in zip(results, expected, strict=True):
        torch.testing.assert_close(result[0], same[0])
        torch.testing.assert_close(result[1:], same[1:], rtol=1e-4, atol=1e-3)


VALUES = [  # of beta, threshold and slope; of alpha and beta
    *((leaky_pair, values) for values in ((0.0, 1.0, 0.5), (0.5, 0.3, 2), (0.95, 1.0, 25))),
    *((synaptic_pair, values) for values in ((0.0, 0.5), (0.5, 0.5), (0.9, 0.7))),
    (alif_pair, ()),
]


@each_device
@each_backend
@pytest.mark.parametrize("time_steps", TIME_STEPS)
@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize(("make", "values"), VALUES)
def test_neurons_equal_snntorch_and_their_equations(backend, time_steps, learn, make, values):
    learn_threshold = learn and backend == "step"  # which passes gradients to all parameters
    neuron, reference = make(*values, learn_beta=learn, learn_threshold=learn_threshold)
    layer = Layer(neuron, backend)
    assert layer.fused == (backend == "fused")
    assert_equal(layer, reference, make_current(time_steps))


@each_backend
def test_alif_without_adaptation_is_leaky_of_images_too(backend):
    alif, (_, leaky) = ALIF(0.9, 0.5, 0.0, 0.6, FastSigmoid(5)), leaky_pair(0.5, 0.6)
    assert_equal(Layer(alif, backend), leaky, make_current(7, 2, 3, 6, 5))


def test_alif_is_stepped_like_snntorchs_neurons():
    assert_equal(ByHand(alif_pair()[0]), ALIFByEquation(), make_current())


def test_alif_keeps_its_state_or_takes_it():
    """So do snnTorch's neurons; the states that are passed may be those of another sequence."""
    alif, cur = alif_pair()[0], make_current(8)
    kept = [alif(step_cur)[0] for step_cur in cur]
    states = [(torch.zeros_like(cur[0]),) * 3] * 2
    for t, step_cur in enumerate(cur):  # two sequences in turn: with the current, and with none
        inputs = step_cur, torch.zeros_like(step_cur)
        states = [alif(x, *state) for x, state in zip(inputs, states, strict=True)]
        assert torch.equal(states[0][0], kept[t])
        assert states[1][0].sum() == 0
    assert all(state.abs().sum() == 0 for state in alif.reset_mem())
    assert torch.equal(alif(cur[0])[0], kept[0])


BETAS = torch.linspace(0.2, 0.9, 50)  # one for each neuron
STEPPED = {  # by a surrogate gradient; the current is that of 50 neurons
    "lapicque": lambda grad: snn.Lapicque(0.8, threshold=0.3, spike_grad=grad),
    "alpha": lambda grad: snn.Alpha(0.8, 0.5, 0.3, grad),
    "recurrent": lambda grad: snn.RLeaky(0.8, 0.4, False, spike_grad=grad),
    "all to all": lambda grad: snn.RSynaptic(0.5, 0.5, linear_features=50, spike_grad=grad),
    "a subclass": lambda grad: type("OwnLeaky", (snn.Leaky,), {})(0.5, 0.5, grad),
    "reset to zero": lambda grad: snn.Leaky(0.8, 0.5, grad, reset_mechanism="zero"),
    "reset at once": lambda grad: snn.Leaky(0.8, 0.5, grad, reset_delay=False),
    "betas": lambda grad: snn.Leaky(BETAS.clone(), 0.5, grad, learn_beta=True),
    "thresholds": lambda grad: snn.Leaky(0.8, BETAS.clone(), grad, learn_threshold=True),
    "graded": lambda grad: snn.Leaky(0.8, 0.5, grad, graded_spikes_factor=0.9),
    "quantized": lambda grad: snn.Leaky(0.8, 0.5, grad, state_quant=torch.round),
    "another surrogate": lambda grad: snn.Leaky(0.8, 0.5, lambda x: 2 * grad(x / 2) - grad(x)),
}


@each_device
@pytest.mark.parametrize("kind", STEPPED)
def test_neurons_that_no_kernel_knows_run_step_by_step(kind):
    """They equal snnTorch's, stepped by hand, with the gradients of all that they learn."""
    cur = make_current()
    torch.manual_seed(0)
    layer = Layer(STEPPED[kind](FastSigmoid(5)), "fused").to(cur.device)
    torch.manual_seed(0)
    reference = ByHand(STEPPED[kind](surrogate.fast_sigmoid(5))).to(cur.device)
    assert not layer.fused
    assert_equal(layer, reference, cur)


def test_options_that_a_neuron_gets_later_are_heeded():
    layer = NeuronLayer(snn.Leaky(0.5, spike_grad=FastSigmoid(5)))
    assert layer.fused
    layer.neuron.inhibition = True  # one neuron fires at each step
    spk, _ = layer(torch.rand(3 * 2, 10) + 1, 3)
    assert not layer.fused
    assert spk.sum(1).tolist() == [1] * 6


class Forgets(snn.Leaky):
    """A neuron that returns its potential, but does not store it."""

    def forward(self, input_):
        return self.fire(input_), input_


def test_a_neuron_that_does_not_store_its_potential_is_refused():
    with pytest.raises(NetworkError, match="Forgets does not store its potential as mem"):
        NeuronLayer(Forgets(0.5))(torch.rand(6, 10), 3)


@pytest.mark.parametrize("output", [False, True])
def test_neurons_that_hide_their_state_run_too(output):
    neuron = snn.Leaky(0.9, 0.5, FastSigmoid(5), init_hidden=True, output=output)
    assert_equal(Layer(neuron, "fused"), leaky_pair()[1], make_current())


def test_recurrent_convolutions_get_images_as_snntorch_means_them():
    cur = make_current(5, 2, 4, 6, 6)
    torch.manual_seed(0)
    neuron = snn.RSynaptic(0.5, 0.5, conv2d_channels=4, kernel_size=3, spike_grad=FastSigmoid(5))
    layer, reference = Layer(neuron, "fused"), ByHand(copy.deepcopy(neuron))
    assert_equal(layer, reference, cur)
    images = cur.detach().flatten(0, 1).to(memory_format=torch.channels_last)
    outputs = NeuronLayer(neuron)(images, 5)
    for out, expected in zip(outputs, reference(cur), strict=True):
        torch.testing.assert_close(out, expected.flatten(0, 1))


@each_backend
@pytest.mark.parametrize("make", PAIRS)
def test_neurons_start_at_rest_and_keep_no_graph(backend, make):
    """Those that were stepped by hand before start at rest, too, and can be copied afterwards."""
    cur, neuron = make_current(), make()[0]
    expected = Layer(make()[0], backend)(cur)
    for step_cur in cur.detach()[:2]:
        neuron(step_cur)
    assert neuron.mem.abs().sum() > 0
    for _ in range(2):
        assert all(map(torch.equal, Layer(copy.deepcopy(neuron), backend)(cur), expected))
        assert all(map(torch.equal, Layer(neuron, backend)(cur), expected))
        assert not any(buffer.requires_grad for buffer in neuron.buffers())


@each_device
@each_backend
@pytest.mark.parametrize("make", PAIRS)
@pytest.mark.parametrize("time_steps", TIME_STEPS)
def test_neurons_in_bfloat16_equal_float32_of_the_same_current(backend, make, time_steps):
    """Spikes are equal, potentials to their rounding: state is float32 inside.

    The fused backward pass reads potentials of about 1, which bfloat16 rounds by up to 2^-8; the
    surrogate gradient's slope of 5 multiplies that by up to 10. So 2% in the norm and 4% of the
    largest gradient are allowed.
    """
    neuron, reference = make(learn_beta=True)
    cur = make_current(time_steps).detach().bfloat16().requires_grad_()
    expected_cur = cur.detach().float().requires_grad_()
    (spk, mem), (expected_spk, expected_mem) = Layer(neuron, backend)(cur), reference(expected_cur)
    assert spk.dtype == mem.dtype == torch.bfloat16
    assert 0.05 < expected_spk.mean() < 0.95
    assert torch.equal(spk.float(), expected_spk)
    torch.testing.assert_close(mem.float(), expected_mem, rtol=2**-8, atol=1e-5)
    results = gradients((spk, mem), cur)
    expected = gradients((expected_spk, expected_mem), expected_cur)
    for (grad,), (expected_grad,) in zip(results, expected, strict=True):
        assert grad.dtype == torch.bfloat16
        assert relative_error(grad, expected_grad) < 0.02
        assert (grad - expected_grad).abs().max() < 0.04 * expected_grad.abs().max()


@each_device
@pytest.mark.parametrize("make", PAIRS)
def test_gradient_of_beta_in_bfloat16(make):
    """The current is positive, so that no terms of the sum over neurons and steps cancel."""
    neuron, reference = make(learn_beta=True)
    cur = make_current(27).detach().abs().mul(0.5).bfloat16()
    for spk, mem in (Layer(neuron, "fused")(cur), reference(cur.float())):
        assert 0.05 < spk.float().mean() < 0.95
        (spk.float().sum() + mem.float().sum()).backward()
    expected = learned(reference)["neuron.beta"].grad
    assert float(neuron.beta.grad) == pytest.approx(float(expected), rel=0.01)


class OwnNeuron(nn.Module):
    """What has the state of a neuron, but is none of snnTorch's: it has no threshold."""

    mem = torch.zeros(0)

    def reset_mem(self):
        """Do nothing."""


NOT_STEPPED = (nn.ReLU(), nn.Linear(3, 3), snn.SpikingNeuron(), snn.LeakyParallel(3, 3))


@pytest.mark.parametrize("neuron", [*NOT_STEPPED, NeuronLayer(snn.Leaky(0.5)), OwnNeuron()])
def test_what_cannot_be_stepped_is_refused(neuron):
    with pytest.raises(NetworkError, match=type(neuron).__name__):
        NeuronLayer(neuron)


# --- Networks -------------------------------------------------------------------------------------


@each_device
@each_model
def test_networks_equal_snntorchs_loop_over_the_same_layers(model):
    """The benchmark's competitor: all layers step by step, twice, since it must start at rest.

    A GPU adds in another order for another number of frames, which may flip single spikes.
    """
    frames = make_frames(11, 4)
    network = network_that_fires(model, frames)
    loop = benchmark.Loop(network)
    (spk, mem), (expected_spk, expected_mem) = network(frames), loop(frames)
    expected_mem.sum().backward()
    assert torch.equal(loop(frames)[1], expected_mem)
    assert expected_spk.sum() > 0
    if frames.device.type == "cpu":
        assert torch.equal(spk, expected_spk)
        torch.testing.assert_close(mem, expected_mem, rtol=1e-3, atol=1e-3)
    assert (spk != expected_spk).float().mean() < 0.05
    assert relative_error(mem, expected_mem) < 0.1


@each_device
@each_model
def test_precisions_and_backends_agree(model):
    """Backends to float32's rounding on a CPU; else in what the first layer fires, and in how much
    the others do: which spike of an untrained network falls where is chaos."""
    frames, layers = make_frames(10, 24), {}
    for precision in models.DTYPES:
        for backend in BACKENDS:
            network = make_network(model, backend, precision)
            layers[precision, backend] = record_layers(network, frames)
            assert {x.dtype for x in network(frames[:1])} == {torch.float32}
    if frames.device.type == "cpu":
        expected, mem = (layers["fp32", backend]["lif_out"][2] for backend in BACKENDS)
        torch.testing.assert_close(mem, expected, rtol=1e-3, atol=1e-3)
    first, *others = layers.values()
    for other in others:
        assert (first["lif1"][1] != other["lif1"][1]).float().mean() < 0.005
        for name, (_cur, spk, _mem) in other.items():
            rate = first[name][1].mean().item()
            assert spk.float().mean().item() == pytest.approx(rate, rel=0.1), name


@each_model
def test_networks_map_frames_to_spikes_and_membrane_potentials(model):
    network = make_network(model, dropout=0.2)
    for time_steps, batch in ((1, 3), (10, 2), (10, 1)):
        network.train(batch > 1)
        spk, mem = network(torch.rand(time_steps, batch, 2, 34, 34))
        assert spk.shape == mem.shape == (time_steps, batch, 10)
        assert set(spk.unique().tolist()) <= {0.0, 1.0}


def test_networks_have_the_neurons_that_the_readme_names():
    cnn, resnet = (make_network(model).neuron_layers() for model in models.NETWORKS)
    assert list(cnn) == ["lif1", "lif2", "lif3", "lif4", "lif_out"]
    blocks = ["res1.lif1", "res1.lif2", "res2.lif1", "res2.lif2"]
    assert list(resnet) == ["lif1", *blocks, "fc_syn", "lif_out"]
    kinds = dict.fromkeys(resnet, snn.Leaky) | {"lif1": ALIF, "fc_syn": snn.Synaptic}
    assert {name: type(layer.neuron) for name, layer in resnet.items()} == kinds
    assert {type(layer.neuron) for layer in cnn.values()} == {snn.Leaky}
    for layers, slope in ((cnn, 5), (resnet, 2)):
        assert {layer.neuron.spike_grad.slope for layer in layers.values()} == {slope}
        assert all(layer.fused for layer in layers.values())


@pytest.mark.parametrize("width", [1, 2])
def test_width_multiplies_channels_and_the_hidden_layer(width):
    network = make_network("cnn", width=width)
    layers = network.conv1, network.conv2, network.conv3, network.fc1
    w1, w2, w3, hidden = (width * size for size in (16, 32, 64, 128))
    shapes = [tuple(layer.weight.shape[:2]) for layer in layers]
    assert shapes == [(w1, 2), (w2, w1), (w3, w2), (hidden, width * 1024)]


@each_device
@each_model
def test_silent_input_gives_no_spikes(model):
    network = make_network(model, dropout=0.2)
    for training in (True, False):
        with ActivityMeter(network.train(training)) as meter:
            _, mem = network(torch.zeros(10, 2, 2, 34, 34))
        assert mem.abs().sum() == 0
        for layer in meter.layers().values():
            assert layer["firing_rate"] == layer["synaptic_operations"] == 0


@each_device
@each_model
@pytest.mark.parametrize("precision", models.DTYPES)
def test_gradients_reach_every_parameter_and_no_layer_is_silent_or_saturated(model, precision):
    network = make_network(model, precision=precision, dropout=0.2, learn_beta=True)
    with ActivityMeter(network) as meter:
        spk, _ = network(make_frames(25, 8, rate=0.05))
    F.cross_entropy(spk.sum(0), torch.arange(8)).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
        assert parameter.grad.dtype == torch.float32
    for name, layer in meter.layers().items():
        assert 0.01 < layer["firing_rate"] < 0.6, name


@each_model
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 0.7, 0.9])
def test_initial_membrane_potentials_spread_by_about_a_threshold(model, beta):
    layers = record_layers(make_network(model, beta=beta), make_frames(25, 8, rate=0.05))
    for name, (_cur, _spk, mem) in layers.items():
        assert 0.5 < float(mem.std()) < 2, name


@each_model
@pytest.mark.parametrize("beta", [0.5, 0.9])
def test_outputs_scale_with_threshold(model, beta):
    frames = make_frames(25, 4, rate=0.05)
    spk, mem = make_network(model, beta=beta)(frames)
    spk_of_quarter, mem_of_quarter = make_network(model, beta=beta, threshold=0.25)(frames)
    assert spk.sum() > 0
    assert torch.equal(spk_of_quarter, spk)
    assert torch.equal(4 * mem_of_quarter, mem)  # a power of 2 rounds nothing


SHAPES = [
    (0, 3, 2, 34, 34),
    (10, 2, 34, 34),
    (2, 34, 34),
    (10, 3, 1, 34, 34),
    (10, 3, 34, 34, 2),
    (10, 3, 2, 28, 28),
]


@each_model
@pytest.mark.parametrize("shape", SHAPES)
def test_frames_of_another_shape_are_refused(model, shape):
    message = f"{list(shape)}; they must be [T, B, 2, 34, 34]"
    with pytest.raises(ValueError, match=re.escape(message)):
        make_network(model)(torch.rand(shape))


@each_device
@each_model
def test_outputs_depend_on_no_other_recording_and_no_later_frame(model):
    network, frames = make_network(model, dropout=0.2).eval(), make_frames(10, 4)
    _, mem = network(frames)
    for b in range(4):
        alone = network(frames[:, b : b + 1])[1][:, 0]
        torch.testing.assert_close(alone, mem[:, b], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(network(frames[:5])[1], mem[:5], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_a_neuron_for_a_whole_recording(dtype):
    dropout, spk = models.TimeSharedDropout(0.25), (draw(6 * 40, 100) < 0).to(dtype)
    torch.manual_seed(0)
    masks = dropout(torch.ones_like(spk), 6)
    mask = masks.view(6, 40, 100)
    assert torch.equal(mask, mask[:1].expand_as(mask))
    assert set(mask.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.75, dtype=dtype))}
    dropped = (mask[0] == 0).float().mean()
    assert dropped == pytest.approx(0.25, abs=0.03)  # of 4,000: four standard deviations
    assert len(mask[0].unique(dim=0)) == 40, "recordings share a mask"
    assert not torch.equal(dropout(torch.ones_like(spk), 6), masks), "batches share a mask"
    torch.manual_seed(0)
    assert torch.equal(dropout(spk, 6), spk * masks)
    assert torch.equal(dropout.eval()(spk, 6), spk)


@each_device
@each_model
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_networks_drop_neurons_in_training_only(model, dropout):
    network, frames = make_network(model, dropout=dropout), make_frames(10, 4)
    assert torch.equal(network(frames)[1], network(frames)[1]) == (dropout == 0)
    network.eval()
    assert torch.equal(network(frames)[1], network(frames)[1])


# --- Predictions ----------------------------------------------------------------------------------


def test_predict_takes_the_largest_mean_membrane_potential():
    mem = torch.zeros(2, 3, 10)
    mem[0, 0, 4], mem[1, 0, 4], mem[:, 0, 7] = 2.0, -1.5, 0.4  # means 0.25 and 0.4
    mem[0, 1, 2], mem[1, 1, 8] = 0.3, 0.9
    mem[:, 2] = -1.0
    mem[:, 2, 3] = -0.5  # the least negative
    assert predict(mem * 0, mem).tolist() == [7, 8, 3]
    assert predict(mem * 0, mem, over_time=True).tolist() == [[4, 2, 3], [7, 8, 3]]


def test_rate_and_latency_codes_and_their_ties():
    spk, mem = torch.zeros(4, 4, 10), torch.zeros(4, 4, 10)
    mem[:, :, 9] = 0.1  # the membrane decides for 9 unless told otherwise
    spk[1:, 0, 3], spk[0, 0, 5], mem[0, 0, 5] = 1, 1, 0.05  # 3 fires most, 5 first
    spk[2, 1, [1, 2]], mem[2, 1, 2] = 1, 2.0  # a tie of both codes, the membrane says 2
    spk[[0, 3], 2, 6], spk[[1, 2], 2, 7], mem[3, 2, 7] = 1, 1, 2.0  # equal rates, 6 is first
    # the last recording is silent
    assert predict(spk, mem, "rate").tolist() == [3, 2, 7, 9]
    assert predict(spk, mem, "latency").tolist() == [5, 2, 6, 9]
    rates = [[5, 9, 6, 9], [5, 9, 6, 9], [3, 2, 7, 9], [3, 2, 7, 9]]
    assert predict(spk, mem, "rate", over_time=True).tolist() == rates
    assert predict(spk, mem, "latency", over_time=True)[0].tolist() == [5, 9, 6, 9]
    numbers = {}
    for code in ("rate", "latency"):
        numbers[code] = models.leaders(models.digit_scores(spk, mem, code)[-1]).sum(-1).tolist()
    assert numbers == {"rate": [1, 2, 2, 10], "latency": [1, 2, 1, 10]}


def test_scores_are_means_so_far_and_steps_without_a_spike():
    mem, spk = torch.zeros(3, 1, 10), torch.zeros(3, 1, 10)
    mem[:, 0, 4] = torch.tensor([1.0, 2.0, -1.0])
    spk[1:, 0, 7] = 1
    expected = {  # of one digit and of the others, after each step
        "membrane": (4, [1, 3 / 2, 2 / 3], [0, 0, 0]),
        "rate": (7, [0, 1 / 2, 2 / 3], [0, 0, 0]),
        "latency": (7, [-1, -1, -1], [-1, -2, -3]),
    }
    for readout, (digit, values, of_others) in expected.items():
        scores = models.digit_scores(spk, mem, readout)[:, 0]
        np.testing.assert_allclose(scores[:, digit], values, rtol=1e-6)
        for other in set(range(10)) - {digit}:
            np.testing.assert_allclose(scores[:, other], of_others)


def test_the_fitted_temperature_is_the_one_that_labels_were_drawn_with():
    logits, generator = draw(20_000, 10) * 8, torch.Generator().manual_seed(0)
    for temperature in (1.0, 4.0, 16.0):
        probabilities = torch.softmax(logits / temperature, -1)
        labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        for scale in (1, 1e-3, 1e3):  # scores may be of any size
            fitted = models.fit_temperature(logits[None] * scale, labels)
            assert fitted == pytest.approx(temperature * scale, rel=0.05)


# --- Activity -------------------------------------------------------------------------------------


def count_connections(in_channels, out_channels, size, pooled=False):
    """Count, one by one, how many outputs of a 3 x 3 convolution each input pixel reaches.

    If it is pooled, an odd last row and column of outputs are in no window.
    """
    reached = np.zeros((in_channels, size, size))
    outputs = size - size % 2 if pooled else size
    for out_y, out_x, y, x in np.ndindex(outputs, outputs, size, size):
        if abs(out_y - y) <= 1 and abs(out_x - x) <= 1:
            reached[:, y, x] += out_channels
    return reached


def test_activity_of_the_cnn_equals_a_count_by_hand():
    network, frames = make_network("cnn", dropout=0.2).eval(), make_frames(6, 4, rate=0.3)
    batches = frames[:, :3], frames[:, 3:]
    recorded = [record_layers(network, batch) for batch in batches]
    with ActivityMeter(network) as meter:
        outputs = [network(batch) for batch in batches]
    for output, expected in zip(outputs, recorded, strict=True):
        assert all(map(torch.equal, output, expected["lif_out"][1:])), "measuring changed it"
    layers = meter.layers()
    spikes = {name: torch.cat([x[name][1] for x in recorded], dim=1) for name in recorded[0]}
    for name, spk in spikes.items():
        assert layers[name]["neurons"] == spk[0, 0].numel()
        assert layers[name]["firing_rate"] == pytest.approx(spk.mean().item(), rel=1e-5)
        np.testing.assert_allclose(meter.firing_rate(name), spk.flatten(1).mean(1), rtol=1e-5)
        assert all(map(torch.equal, meter.outputs[name], recorded[1][name][1:]))
    shapes = (2, 16, 34), (16, 32, 17), (32, 64, 8)
    reached = [count_connections(*shape, pooled=True) for shape in shapes]
    inputs = frames, spikes["lif1"], spikes["lif2"]
    operations = [(x.numpy() * n).sum((2, 3, 4)) for x, n in zip(inputs, reached, strict=True)]
    operations.append(spikes["lif3"].sum((2, 3, 4)).numpy() * 128)
    operations.append(spikes["lif4"].sum(2).numpy() * 10)
    macs = [6 * int(n.sum()) for n in reached] + [6 * 1024 * 128, 6 * 128 * 10]
    assert [layer["macs"] for layer in layers.values()] == macs
    for (name, layer), expected in zip(layers.items(), operations, strict=True):
        np.testing.assert_allclose(meter.operations(name), expected)
        assert layer["synaptic_operations"] == pytest.approx(expected.sum() / 4)
    total = sum(operations)
    assert models.energy_uj(layers) == {
        "spiking": pytest.approx(0.9e-6 * total.sum() / 4),
        "without_spikes": pytest.approx(4.6e-6 * sum(macs)),
    }
    until = [1, 4, 6, 2]  # the steps after which the recordings are decided
    used = sum(total[:step, n].sum() for n, step in enumerate(until))
    assert meter.operations_until(torch.tensor(until)) == pytest.approx(used / 4)


def test_the_operations_of_a_residual_block_are_those_of_its_three_convolutions():
    frames = make_frames(6, 3, rate=0.3)
    network = network_that_fires("resnet", frames)
    with ActivityMeter(network) as meter:
        layers = record_layers(network, frames)
    spk1, inner = (layers[name][1].numpy() for name in ("lif1", "res1.lif1"))
    assert min(spk1.sum(), inner.sum()) > 0
    expected = (spk1 * count_connections(16, 32, 17, pooled=True)).sum((2, 3, 4))
    np.testing.assert_allclose(meter.operations("res1.lif1"), expected)
    reached = count_connections(32, 32, 8)
    # The shortcut has no window for the last row and column.
    expected = (inner * reached).sum((2, 3, 4)) + 32 * spk1[..., :16, :16].sum((2, 3, 4))
    np.testing.assert_allclose(meter.operations("res1.lif2"), expected)
    assert meter.layers()["res1.lif2"]["macs"] == 6 * (reached.sum() + 16 * 64 * 32)


def count_by_one_hots(layer: nn.Module, shape: tuple[int, ...]) -> torch.Tensor:
    """Count the outputs of a layer that depend on each element of an input of `shape`."""
    layer = copy.deepcopy(layer).double()
    nn.init.ones_(layer.weight)
    size = torch.Size(shape).numel()
    one_hots = torch.eye(size, dtype=torch.float64).view(size, *shape)
    with torch.no_grad():
        return (layer(one_hots).flatten(1) != 0).sum(1).view(shape)


class Parts(SpikingNetwork):
    """A network of any layers before its neurons, which run in another order than registered."""

    def __init__(self, config, *layers):
        super().__init__(config)
        self.lif_out = self.make_layer(self.make_lif([10]))
        size = nn.Sequential(*layers)(torch.zeros(2, 2, 34, 34))[0].numel()
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(size, 10, bias=False))
        self.lif1 = self.make_layer(self.make_lif([10]))

    def forward_layers(self, x, T):
        x, _ = self.lif1(self.layers(x), T)
        return self.lif_out(x, T)


CONVOLUTIONS = [
    nn.Conv2d(2, 6, 3, stride=2, bias=False),
    nn.Conv2d(2, 4, (3, 2), padding=(0, 2), dilation=(2, 1), bias=False),
    nn.Conv2d(2, 8, 5, stride=(3, 1), padding=2, groups=2, bias=False),
]


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=lambda layer: str(layer)[:30])
def test_operations_of_any_convolution_equal_a_count_by_one_hots(layer):
    frames = make_frames(3, 2)
    network = Parts(NetworkConfig(), layer)
    with torch.no_grad(), ActivityMeter(network) as meter:
        network(frames)
        shape = layer(frames[0]).shape[1:]
    size, reached = shape.numel(), count_by_one_hots(layer, (2, 34, 34))
    assert list(meter.outputs) == ["lif1", "lif_out"]
    assert meter.layers()["lif1"]["macs"] == 3 * (reached.sum() + size * 10)
    entering = (frames * reached).sum((2, 3, 4))
    with torch.no_grad():
        inner = layer(frames.flatten(0, 1)).double().flatten(1).sum(1).view(3, 2) * 10
    np.testing.assert_allclose(meter.operations("lif1"), entering + inner, rtol=1e-5)
    assert not meter.not_counted


def test_a_layer_that_is_not_called_is_not_counted():
    network, frames = make_network("cnn"), make_frames(2, 2)
    network.weight_only = nn.Linear(3, 3)  # whose weight may be used without calling it
    with ActivityMeter(network) as meter:
        network(frames)
    assert meter.not_counted == {"weight_only"}


class RunsTwice(models.SpikingCNN):
    """A network that runs one layer of neurons twice."""

    def forward_layers(self, x, T):
        spk, mem = super().forward_layers(x, T)
        return self.lif_out(spk + mem, T)


def test_a_layer_of_neurons_that_runs_twice_is_refused():
    network = RunsTwice(NetworkConfig())
    match = "lif_out runs more than once"
    with pytest.raises(NetworkError, match=match), ActivityMeter(network):
        network(make_frames(2, 2))


def test_connections_that_are_not_counted_are_named():
    class OwnNeurons(Parts):
        def make_lif(self, shape):
            return snn.RSynaptic(0.5, 0.5, linear_features=shape[0])

        def forward_layers(self, x, T):
            spk, mem = super().forward_layers(x, T)
            return spk, self.layers[-1](F.pad(mem, (0, 1146)))

    transposed = nn.ConvTranspose2d(2, 1, 3, padding=1)
    reflected = nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")
    network = OwnNeurons(NetworkConfig(), transposed, nn.BatchNorm2d(1), reflected)
    network.own = nn.Parameter(torch.ones(2, 2))
    with torch.no_grad(), ActivityMeter(network) as meter:
        network(make_frames(3, 2))
        network(make_frames(3, 2))
    layers = {"layers.0", "layers.2", "layers.4", "lif1", "lif_out"}
    assert meter.not_counted == layers | {"the network itself"}
    # Only the last linear layer is counted before the neurons, and not again after them.
    assert meter.layers()["lif1"]["macs"] == 3 * 1156 * 10
    assert meter.layers()["lif_out"]["macs"] == 0


# --- Without spikes -------------------------------------------------------------------------------


def conv_pool_norm(conv: nn.Conv2d, norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return what three layers and a ReLU make of frames [F, C, H, W], by torch's functions."""
    return F.relu(norm(F.max_pool2d(F.conv2d(x, conv.weight, padding=1), 2)))


@each_model
@each_backend
def test_networks_without_spikes_are_ordinary_ones_on_each_frame(model, backend):
    network = make_network(model, backend, no_spikes=True).eval()
    frames = make_frames(4, 3, rate=0.3)
    x = conv_pool_norm(network.conv1, network.norm1, frames.flatten(0, 1))
    if model == "cnn":
        x = conv_pool_norm(network.conv2, network.norm2, x)
        x, norm = conv_pool_norm(network.conv3, network.norm3, x), network.norm4
    else:
        for block in (network.res1, network.res2):
            first = conv_pool_norm(block.conv1, block.norm1, x)
            shortcut = F.conv2d(4 * F.avg_pool2d(x, 2), block.shortcut.weight)
            second = block.norm2(F.conv2d(first, block.conv2.weight, padding=1)) + shortcut
            x, norm = first + F.relu(second), network.norm2
    x = F.relu(norm(network.fc1(x.flatten(1))))
    expected = network.norm_out(network.fc_out(x)).unflatten(0, (4, 3))
    out, mem = network(frames)
    assert expected.abs().mean() > 0.01
    torch.testing.assert_close(mem, expected)
    torch.testing.assert_close(out, F.relu(expected))
    assert describe_backend(network) == "relu"


@each_model
def test_without_spikes_networks_have_the_same_weights_and_nothing_that_needs_spikes(model):
    spiking, relu = make_network(model), make_network(model, no_spikes=True)
    assert [p.shape for p in spiking.parameters()] == [p.shape for p in relu.parameters()]
    assert list(spiking.neuron_layers()) == list(relu.neuron_layers())
    with ActivityMeter(spiking) as meter, ActivityMeter(relu) as relu_meter:
        spiking(make_frames(4, 2))
        relu(make_frames(4, 2))
    for name, layer in relu_meter.layers().items():
        assert layer == {key: meter.layers()[name][key] for key in ("neurons", "macs")}
    assert set(models.energy_uj(relu_meter.layers())) == {"without_spikes"}


# --- In one's own script --------------------------------------------------------------------------


@pytest.mark.parametrize("base", models.NETWORKS.values())
def test_a_subclass_may_have_other_neurons(base, monkeypatch, capsys):
    shapes = []

    class Lapicques(base):
        def make_lif(self, shape):
            shapes.append(shape)
            return snn.Lapicque(self.config.beta, threshold=self.config.threshold)

    monkeypatch.setitem(models.NETWORKS, "lapicques", Lapicques)
    frames = make_frames(5, 3)
    network = make_network("lapicques", beta=0.7, threshold=0.8)
    layers = record_layers(network, frames)
    kinds = [type(layer.neuron) for layer in network.neuron_layers().values()]
    assert kinds.count(snn.Lapicque) == 5
    assert snn.Leaky not in kinds
    assert sorted(shapes) == sorted(
        [*cur.shape[2:]]
        for kind, (cur, *_) in zip(kinds, layers.values(), strict=True)
        if kind is snn.Lapicque
    )
    for kind, (cur, *outputs) in zip(kinds, layers.values(), strict=True):
        if kind is snn.Lapicque:
            expected = ByHand(snn.Lapicque(0.7, threshold=0.8))(cur)
            torch.testing.assert_close(tuple(outputs), expected)
    assert sum(spk.sum() for _cur, spk, _mem in layers.values()) > 0
    network(frames)[1].sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    (warning,) = capsys.readouterr().err.splitlines()
    stepped = [f"{x} (Lapicque)" for x, layer in network.neuron_layers().items() if not layer.fused]
    assert f"no kernel supports the neurons of {', '.join(stepped)}: they run step" in warning
    expected = "step" if base is models.SpikingCNN else "fused+step"
    assert describe_backend(network) == expected


@each_backend
def test_a_network_of_ones_own(backend, monkeypatch):
    class OneLayer(SpikingNetwork):
        def __init__(self, config):
            super().__init__(config)
            self.fc = nn.Linear(2 * 34 * 34, 10, bias=False)
            self.lif = self.make_layer(self.make_lif([10]))

        def forward_layers(self, x, T):
            return self.lif(self.fc(x.flatten(1)), T)

    monkeypatch.setitem(models.NETWORKS, "one_layer", OneLayer)
    network = make_network("one_layer", backend, beta=0.9)
    frames = make_frames(7, 3, rate=3.0)
    with ActivityMeter(network) as meter:
        outputs = network(frames)
    cur = F.linear(frames.flatten(2), network.fc.weight)
    torch.testing.assert_close(outputs, ByHand(snn.Leaky(0.9))(cur))
    assert 0.05 < outputs[0].mean() < 0.95
    np.testing.assert_allclose(meter.operations("lif"), 10 * frames.sum((2, 3, 4)))
    assert describe_backend(network) == backend


def test_networks_that_are_unknown_or_were_changed_are_refused():
    checkpoint = {"settings": vars(NetworkConfig(width=2))}
    checkpoint["network"] = make_network("cnn").state_dict()
    checkpoint["history"] = [{"precision": "fp32", "neuron_backend": "step"}]
    with pytest.raises(NetworkError, match="not those of SpikingCNN as it is defined now"):
        models.restore_network(checkpoint)
    checkpoint["settings"] = vars(NetworkConfig(model="mlp"))
    with pytest.raises(NetworkError, match="no network 'mlp': this script does not add it"):
        models.restore_network(checkpoint)


class LearnsDecays(SpikingNetwork):
    """Neurons whose alpha is learned, too, then some of which each has a beta of its own."""

    def __init__(self, config):
        super().__init__(config)
        self.fc = nn.Linear(2 * 34 * 34, 4)
        grad = FastSigmoid(self.slope)
        options = {"learn_alpha": True, "learn_beta": True, "spike_grad": grad}
        self.lif1 = self.make_layer(snn.Synaptic(0.5, 0.5, **options))
        betas = torch.tensor([0.2, 0.4, 0.6, 0.8])
        self.lif2 = self.make_layer(snn.Leaky(betas, spike_grad=grad, learn_beta=True))
        self.fc_out = nn.Linear(4, 10)
        self.lif3 = self.make_layer(self.make_lif([10]))

    def forward_layers(self, x, T):
        x, _ = self.lif1(self.fc(x.flatten(1)), T)
        x, _ = self.lif2(8 * x, T)
        return self.lif3(self.fc_out(x), T)


class Sigmoid(snn.Leaky):
    """A neuron that learns its decay otherwise: as the sigmoid of `beta`."""

    def forward(self, input_):
        self.mem = torch.sigmoid(self.beta) * self.mem + input_
        return self.fire(self.mem), self.mem


def test_what_a_neuron_of_ones_own_calls_beta_is_not_clamped(monkeypatch):
    monkeypatch.setattr(models.SpikingCNN, "make_lif", lambda *_: Sigmoid(-2.0, learn_beta=True))
    network = make_network("cnn")
    network.clamp_decays()
    assert network.lif1.neuron.beta == -2
    assert not network.learned_decays()


@each_device
@each_backend
def test_learned_decays_that_left_0_to_1_come_back_and_learn_again(monkeypatch, backend):
    monkeypatch.setitem(models.NETWORKS, "own", LearnsDecays)
    network, frames = make_network("own", backend, learn_beta=True), make_frames(12, 20)
    outside = {"lif1.neuron.alpha": 1.2, "lif1.neuron.beta": -0.3, "lif3.neuron.beta": 1.01}
    outside["lif2.neuron.beta"] = torch.tensor([-1.0, 0.4, 0.6, 2.0])
    learned = dict(network.named_parameters())
    for name, value in outside.items():
        learned[name].data = torch.as_tensor(value) + 0 * learned[name].data
    gradients = []
    for _ in range(2):
        network.zero_grad()
        network(frames)[1].pow(2).sum().backward()
        gradients.append({name: learned[name].grad.abs().sum().item() for name in outside})
        network.clamp_decays()
    for name, value in outside.items():
        expected = torch.as_tensor(value).clamp(0, 1)
        torch.testing.assert_close(learned[name].data, expected, check_device=False)
        if value is not outside["lif2.neuron.beta"]:
            assert gradients[0][name] == 0  # snnTorch's clamp has none
        assert gradients[1][name] > 0
    with torch.no_grad(), ActivityMeter(network) as meter:
        network(frames)
    found = {}
    for layer, values in meter.layers().items():
        found |= {f"{layer}.{name}": x for name, x in values.items() if name[0] in "ab"}
    expected = {"lif1.beta": 0, "lif1.alpha": 1, "lif2.beta": 0.5, "lif2.beta_min": 0}
    expected |= {"lif2.beta_max": 1, "lif3.beta": 1}
    assert found == pytest.approx(expected)
    assert not make_network("resnet").learned_decays()


# --- How a network runs ---------------------------------------------------------------------------


def precision_of(precision: str, device: str) -> str:
    """Return the precision in which a new network runs."""
    return models.run_options(torch.device(device), "fused", precision)["precision"]


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({}, "fp32"),  # not an x86 processor
        ({"amx_tile": False, "avx512_bf16": False}, "fp32"),
        ({"amx_tile": False, "avx512_bf16": True}, "bf16"),
        ({"amx_tile": True, "avx512_bf16": False}, "bf16"),
    ],
)
def test_auto_precision_follows_the_hardware(monkeypatch, features, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert precision_of("auto", "cpu") == expected
    for supported, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda s=supported, **_: s)
        assert precision_of("auto", "cuda") == precision
        for name in ("bf16", "fp32"):
            assert precision_of(name, "cpu") == precision_of(name, "cuda") == name


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's list of features is Linux's")
def test_the_precision_of_this_cpu_is_that_of_the_kernels_list_of_features():
    flags = Path("/proc/cpuinfo").read_text().split()
    expected = "bf16" if {"amx_tile", "avx512_bf16"} & set(flags) else "fp32"
    assert precision_of("auto", "cpu") == expected


@pytest.mark.parametrize("features", [{}, {"avx512_bf16": True}])
def test_bfloat16_on_a_processor_without_it_is_told(monkeypatch, capsys, features):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    models.warn_once.cache_clear()
    assert precision_of("bf16", "cpu") == "bf16"
    assert ("fp32 is faster" in capsys.readouterr().err) == (not features)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("backend", ["fused", "uncompiled+step", "step", "relu"])
def test_a_trained_network_runs_as_it_was_trained(monkeypatch, precision, backend):
    trained = {"precision": precision, "neuron_backend": backend}
    expected = "step" if backend == "step" else "fused"
    for fast in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda fast=fast: {"amx_tile": fast})
        options = models.run_options(torch.device("cpu"), "auto", "auto", trained)
        assert options["neuron_backend"] == expected
        assert options["precision"] == (precision if fast else "fp32")
        typed = models.run_options(torch.device("cpu"), "step", "bf16", trained)
        assert typed == {"neuron_backend": "step", "precision": "bf16"}
    options = models.run_options(torch.device("mps"), "auto", "auto", trained)
    assert options == {"neuron_backend": "step", "precision": "fp32"}  # no kernel is for mps


def test_a_network_without_layers_of_neurons_is_refused(monkeypatch):
    monkeypatch.setitem(models.NETWORKS, "own", type("Own", (SpikingNetwork,), {}))
    with pytest.raises(NetworkError, match="Own makes no layer of neurons"):
        make_network("own")


@each_model
@each_backend
def test_copied_and_saved_networks_start_at_rest(model, backend, tmp_path):
    """After a pass of training, and if the copy's neurons were stepped by hand."""
    network, frames = make_network(model, backend), make_frames(5, 3)
    network(frames)[1].sum().backward()
    expected = [x.detach() for x in network(frames)]
    torch.save(network, tmp_path / "network.pt")
    saved = torch.load(tmp_path / "network.pt", weights_only=False)
    for copied in (copy.deepcopy(network), pickle.loads(pickle.dumps(network)), saved):
        layers = record_layers(copied, frames)
        for name, layer in copied.neuron_layers().items():
            layer.neuron(1 + torch.rand_like(layers[name][0][0]))
            assert layer.neuron.mem.abs().sum() > 0
        for _ in range(2):
            assert all(map(torch.equal, copied(frames), expected))


@each_model
def test_second_derivatives_of_fused_networks_are_refused(model):
    def differentiate_twice(backend):
        network = make_network(model, backend)
        loss, weight = network(make_frames(6, 3))[1].square().sum(), network.conv1.weight
        (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), weight)[0]

    assert differentiate_twice("step").abs().sum() > 0
    with pytest.raises(RuntimeError, match="no second derivative"):
        differentiate_twice("fused")


@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_torch_compile_and_export_run_neurons_step_by_step(compiler):
    """The outputs are the same; 'inductor', torch.compile's default, takes half a minute."""
    frames = make_frames(2, 3)
    network = network_that_fires("resnet", frames)
    expected_spk, expected_mem = network(frames)
    compiled = [torch.compile(network, backend=compiler)]
    if compiler == "eager":
        compiled.append(torch.export.export(network, (frames,)).module())
    for run_compiled in compiled:
        spk, mem = run_compiled(frames)
        assert expected_spk.sum() > 0
        assert torch.equal(spk, expected_spk)
        torch.testing.assert_close(mem, expected_mem)


@each_model
def test_other_shapes_compile_nothing_again(model):
    """Once a pass of training and one of testing have run with whole and with single calls."""
    network = make_network(model, dropout=0.2)

    def run(time_steps, batch):
        network.train()(torch.rand(time_steps, batch, 2, 34, 34))[0].sum().backward()
        with torch.no_grad():
            network.eval()(torch.rand(time_steps, batch, 2, 34, 34))

    run(5, 3)
    run(11, 7)
    with torch.compiler.set_stance("fail_on_recompile"):
        for time_steps, batch in ((5, 2), (10, 9), (3, 4), (25, 4), (7, 5), (10, 21)):
            run(time_steps, batch)
        with pytest.raises(RuntimeError, match="recompile"):  # as would any compilation
            torch.compile(lambda x: x + 1)(torch.ones(3))
    assert describe_backend(network) == "fused"


@pytest.mark.parametrize(
    "missing",
    [
        "CXX=/nowhere/g++ TORCHINDUCTOR_CACHE_DIR={}/empty",
        "TORCHINDUCTOR_CACHE_DIR={}/with\\ space",  # which torch's commands do not quote
        "TORCHINDUCTOR_CACHE_DIR=/dev/null/folder",  # which can't be made
    ],
)
def test_networks_run_without_a_compiler(missing, tmp_path):
    """One warning says what is missing, and the results are those of the compiled network."""
    code = """
import sys, torch
from models import *
frames, state = torch.load(sys.argv[1])
network = build_model(NetworkConfig())
network.load_state_dict(state)
network(frames)
spk, mem = network(frames)
mem.sum().backward()
torch.save([mem.detach(), network.conv1.weight.grad], sys.argv[1])
print(describe_backend(network))
"""
    network, frames, path = make_network("cnn"), make_frames(6, 3), tmp_path / "tensors.pt"
    torch.save([frames, network.state_dict()], path)
    result = run("env", *shlex.split(missing.format(tmp_path)), sys.executable, "-c", code, path)
    compiling, backend = result.stdout.splitlines()
    assert compiling.startswith("compile     neurons, about 10 s")
    assert backend == "uncompiled", result.stderr
    (warning,) = [line for line in result.stderr.splitlines() if "WARNING" in line]
    assert "compiling needs a C++ compiler (g++)" in warning
    assert "no path of these or of Python may hold a space" in warning
    assert "same results" in warning
    _, mem = network(frames)
    mem.sum().backward()
    assert describe_backend(network) == "fused"
    for expected, got in zip((mem, network.conv1.weight.grad), torch.load(path), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_compiler_that_fails_without_a_word_is_told(monkeypatch, capsys):
    def fail(*_):
        raise AssertionError

    network, frames = make_network("cnn"), make_frames(6, 3)
    expected = network(frames)[1]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", lambda kernel, **_: fail)
        models.get_kernels.cache_clear()
        models.warn_once.cache_clear()
        torch.testing.assert_close(network(frames)[1], expected, rtol=1e-4, atol=1e-4)
        assert describe_backend(network) == "uncompiled"
    assert "WARNING: neurons run uncompiled" in capsys.readouterr().err
    models.get_kernels.cache_clear()
