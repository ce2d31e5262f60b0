"""The neurons against snnTorch's own stepped by hand and against their equations; the networks; the activity."""

import copy
import functools
import os
import pickle
import re
import subprocess
import sys

import benchmark
import numpy as np
import pytest
import snntorch as snn
import snntorch.functional as SF
import torch
import torch.nn.functional as F
from conftest import ROOT
from snntorch import surrogate
from torch import nn

import models
from models import (
    ALIF,
    ActivityMeter,
    Fused,
    NetworkConfig,
    OverTime,
    SpikingCNN,
    SpikingResNet,
    build_model,
    fan_out,
    predict,
    predict_over_time,
)
from visualize_activations import LayerRecorder

MODELS = ["cnn", "resnet"]
SPIKE_GRAD = surrogate.fast_sigmoid(models.SURROGATE_SLOPE)  # snnTorch's own, for what `models` is compared with
# Steps in whole calls of the kernels, in single ones, and in both.
TIME_STEPS = [3, 10, 27]
HALF = [torch.bfloat16, torch.float16]
WRAPPERS = [Fused, OverTime]
each_device = pytest.mark.usefixtures("on_device")


def make_network(model: str, **settings) -> models.SpikingNetwork:
    """Build a network with the default settings but for those given."""
    return build_model(NetworkConfig(model=model, **settings))


def draw(*shape, seed=0) -> torch.Tensor:
    """Return normal numbers on the default device, the same on each."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu").to(torch.get_default_device())


def make_current(time_steps=30, batch=4, neurons=50):
    """Return a current that makes neurons fire often, and needs a gradient."""
    return (draw(time_steps, batch, neurons) * 0.8).requires_grad_()


def make_frames(time_steps: int, batch: int, rate=0.2) -> torch.Tensor:
    """Return frames with events at random, `rate` a bin in the mean."""
    return torch.poisson(torch.full((time_steps, batch, 2, 34, 34), rate))


def compare_with_steps(layer, reference, steps, cur):
    """Check spikes, membrane potentials and gradients of a layer against `reference`, which `steps(cur)` steps by hand.

    The gradients are those of the current and of what both neurons learn.
    """
    expected_cur = cur.detach().clone().requires_grad_()
    expected_spk, expected_mem = steps(expected_cur)
    spk, mem = layer(cur)
    assert 0.05 < expected_spk.mean() < 0.95, "the comparison says nothing about neurons that never or always fire"
    assert torch.equal(spk, expected_spk)
    torch.testing.assert_close(mem, expected_mem)
    weights = draw(*spk.shape, seed=1)
    (spk * weights + mem * weights.flip(0)).sum().backward()
    (expected_spk * weights + expected_mem * weights.flip(0)).sum().backward()
    torch.testing.assert_close(cur.grad, expected_cur.grad)
    learned = dict(reference.named_parameters())
    assert learned.keys() == dict(layer.neuron.named_parameters()).keys()
    for name, parameter in layer.neuron.named_parameters():
        torch.testing.assert_close(parameter.grad, learned[name].grad, rtol=1e-4, atol=1e-3)


def step_by_hand(reference, states):
    """Return the loop of snnTorch's tutorials over `reference`, a neuron with so many states."""

    def steps(cur):
        state, spks, mems = [torch.zeros_like(cur[0])] * states, [], []
        for step_cur in cur:
            spk, *state = reference(step_cur, *state)
            spks.append(spk)
            mems.append(state[-1])
        return torch.stack(spks), torch.stack(mems)

    return steps


def alif_by_equation(rho, beta, adapt_scale, base):
    """Return a loop over the equations of ALIF, written without its class."""

    def steps(cur):
        mem = spk = adapt = torch.zeros_like(cur[0])
        spks, mems, threshold = [], [], base
        for step_cur in cur:
            mem = beta * mem + step_cur - spk.detach() * threshold
            adapt = rho * adapt + (1 - rho) * spk
            threshold = base + adapt_scale * adapt
            spk = SPIKE_GRAD(mem - threshold)
            spks.append(spk)
            mems.append(mem)
        return torch.stack(spks), torch.stack(mems)

    return steps


def learn_options(wrapper, learn: bool) -> dict:
    """Return the options of what a neuron learns: all that the wrapper passes gradients to."""
    return {"learn_beta": learn, "learn_threshold": learn and wrapper is OverTime}


@each_device
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("time_steps", TIME_STEPS)
@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize(("beta", "threshold"), [(0.0, 1.0), (0.5, 0.3), (0.95, 1.0)])
def test_leaky_equals_snntorch_stepped_by_hand(wrapper, time_steps, learn, beta, threshold):
    options = learn_options(wrapper, learn)
    reference = snn.Leaky(beta, threshold, SPIKE_GRAD, **options)
    layer = wrapper(snn.Leaky(beta, threshold, models.spike_grad, **options))
    compare_with_steps(layer, reference, step_by_hand(reference, 1), make_current(time_steps))


@each_device
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("slope", [0.5, 2, 25])
def test_other_slopes_equal_snntorchs(wrapper, slope):
    reference = snn.Leaky(0.5, 0.3, surrogate.fast_sigmoid(slope))
    layer = wrapper(snn.Leaky(0.5, 0.3, functools.partial(models.spike_grad, slope=slope)))
    compare_with_steps(layer, reference, step_by_hand(reference, 1), make_current(7))


def test_each_network_has_its_slope():
    for model, slope in (("cnn", 5), ("resnet", 2)):
        slopes = {models.slope_of(layer.neuron) for layer in make_network(model).neuron_layers().values()}
        assert slopes == {slope}


@each_device
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("time_steps", TIME_STEPS)
@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.5), (0.5, 0.5), (0.9, 0.7)])
def test_synaptic_equals_snntorch_stepped_by_hand(wrapper, time_steps, learn, alpha, beta):
    options = learn_options(wrapper, learn)
    reference = snn.Synaptic(alpha, beta, spike_grad=SPIKE_GRAD, **options)
    layer = wrapper(snn.Synaptic(alpha, beta, spike_grad=models.spike_grad, **options))
    compare_with_steps(layer, reference, step_by_hand(reference, 2), make_current(time_steps))


@each_device
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_alif_equals_its_equations_in_numpy(wrapper):
    rho, beta, adapt_scale, base = 0.9, 0.6, 0.7, 0.4
    cur = make_current().detach()
    spk, mem = (x.cpu() for x in wrapper(ALIF(rho, beta, adapt_scale, base, models.spike_grad))(cur))
    i = cur.double().cpu().numpy()
    u, s, a, threshold = (np.zeros(i.shape[1:]) for _ in range(4))
    threshold = threshold + base
    for t in range(len(i)):
        u = beta * u + i[t] - s * threshold
        a = rho * a + (1 - rho) * s
        threshold = base + adapt_scale * a
        s = (u > threshold).astype(float)
        np.testing.assert_allclose(mem[t].numpy(), u, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(spk[t].numpy(), s)
    assert 0.05 < spk.mean() < 0.95
    assert a.max() > 0.1, "no threshold moved"


@each_device
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("time_steps", TIME_STEPS)
def test_alif_gradients_equal_those_of_its_equations(wrapper, time_steps):
    layer = wrapper(ALIF(0.9, 0.6, 0.7, 0.4, models.spike_grad))
    compare_with_steps(layer, nn.Module(), alif_by_equation(0.9, 0.6, 0.7, 0.4), make_current(time_steps))


@each_device
@pytest.mark.parametrize("time_steps", TIME_STEPS)
@pytest.mark.parametrize("learn", [False, True])
def test_alif_over_time_equals_alif_stepped_by_hand(time_steps, learn):
    reference = ALIF(0.9, 0.6, 0.7, 0.4, SPIKE_GRAD, learn_threshold=learn)

    def steps(cur):
        spk = adapt = mem = torch.zeros_like(cur[0])
        spks, mems = [], []
        for step_cur in cur:
            spk, adapt, mem = reference(step_cur, spk, adapt, mem)
            spks.append(spk)
            mems.append(mem)
        return torch.stack(spks), torch.stack(mems)

    layer = OverTime(ALIF(0.9, 0.6, 0.7, 0.4, models.spike_grad, learn_threshold=learn))
    compare_with_steps(layer, reference, steps, make_current(time_steps))


@each_device
@pytest.mark.parametrize("time_steps", TIME_STEPS)
def test_fused_alif_equals_alif_over_time(time_steps):
    fused, stepped = (wrapper(ALIF(0.9, 0.6, 0.7, 0.4, models.spike_grad)) for wrapper in WRAPPERS)
    compare_with_steps(fused, stepped.neuron, stepped, make_current(time_steps))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_alif_without_adaptation_is_leaky(wrapper):
    leaky = OverTime(snn.Leaky(0.5, 0.6, SPIKE_GRAD))
    compare_with_steps(wrapper(ALIF(0.9, 0.5, 0.0, 0.6, models.spike_grad)), leaky.neuron, leaky, make_current())


def test_alif_keeps_its_state_or_takes_it():
    """As snnTorch's neurons do; the states that are passed may be those of another sequence."""
    cur = make_current(8).detach()
    alif = ALIF(0.9, 0.6, 0.7, 0.4, models.spike_grad)
    kept = [alif(step_cur)[0] for step_cur in cur]
    states = [(torch.zeros_like(cur[0]),) * 3] * 2
    for t, step_cur in enumerate(cur):  # two sequences in turn: one with the current, one with none
        states = [alif(x, *state) for x, state in zip((step_cur, torch.zeros_like(step_cur)), states, strict=True)]
        assert torch.equal(states[0][0], kept[t])
        assert states[1][0].sum() == 0
    assert all(state.abs().sum() == 0 for state in alif.reset_mem())
    assert torch.equal(alif(cur[0])[0], kept[0])


def test_fused_membrane_potentials_are_float32_inside_bfloat16():
    """A potential that keeps 0.95 of itself and gets 0.001 a step stands still in bfloat16, long before 0.02."""
    cur = torch.full((200, 1, 1), 0.001, dtype=torch.bfloat16)
    grad = models.spike_grad
    neurons = (
        snn.Leaky(0.95, spike_grad=grad),
        snn.Synaptic(0.0, 0.95, spike_grad=grad),
        ALIF(0.9, 0.95, 0.5, spike_grad=grad),
    )
    for neuron in neurons:
        spk, mem = Fused(neuron)(cur)
        assert spk.dtype == mem.dtype == torch.bfloat16
        expected = float(cur[0]) / (1 - 0.95)
        assert float(mem[-1]) == pytest.approx(expected, rel=0.005)


def leaky_and_steps():
    reference = snn.Leaky(0.9, 0.5, SPIKE_GRAD, learn_beta=True)
    return snn.Leaky(0.9, 0.5, models.spike_grad, learn_beta=True), reference, step_by_hand(reference, 1)


def synaptic_and_steps():
    reference = snn.Synaptic(0.7, 0.6, 1.0, SPIKE_GRAD, learn_beta=True)
    return snn.Synaptic(0.7, 0.6, 1.0, models.spike_grad, learn_beta=True), reference, step_by_hand(reference, 2)


def alif_and_steps():
    return ALIF(0.9, 0.6, 0.7, 0.4, models.spike_grad), nn.Module(), alif_by_equation(0.9, 0.6, 0.7, 0.4)


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference, relative to that of what is expected."""
    return float((result.float() - expected.float()).detach().norm() / expected.detach().float().norm())


@each_device
@pytest.mark.parametrize("make", [leaky_and_steps, synaptic_and_steps, alif_and_steps])
@pytest.mark.parametrize(("dtype", "time_steps"), [*((torch.bfloat16, T) for T in TIME_STEPS), (torch.float16, 10)])
@pytest.mark.parametrize("outputs", ["spk", "mem", "both"])
def test_gradients_of_fused_neurons_in_half_precision(make, time_steps, outputs, dtype):
    """Against float32 of the same current, rounded: so spikes are equal, and potentials to their rounding.

    The backward pass reads potentials of about 1, which bfloat16 rounds by up to 2^-8; the surrogate gradient's slope
    of 5 multiplies that by up to 10. So 2% in the norm and 4% of the largest gradient are allowed.
    """
    neuron, _, steps = make()
    cur = make_current(time_steps).detach().to(dtype).requires_grad_()
    expected_cur = cur.detach().float().requires_grad_()
    spk, mem = Fused(neuron)(cur)
    expected_spk, expected_mem = steps(expected_cur)
    assert spk.dtype == mem.dtype == dtype
    assert 0.05 < expected_spk.mean() < 0.95
    assert torch.equal(spk.float(), expected_spk)
    torch.testing.assert_close(mem.float(), expected_mem, rtol=2**-8, atol=1e-5)
    weights = [draw(*spk.shape, seed=i).to(dtype) * (outputs in (x, "both")) for i, x in enumerate(("spk", "mem"))]
    if outputs == "both":
        torch.autograd.backward((spk, mem), weights)
    else:  # the other output gets no gradient at all, as in a network
        torch.autograd.backward(spk if outputs == "spk" else mem, weights[outputs == "mem"])
    torch.autograd.backward((expected_spk, expected_mem), [w.float() for w in weights])
    assert cur.grad.dtype == dtype
    assert relative_error(cur.grad, expected_cur.grad) < 0.02
    assert (cur.grad - expected_cur.grad).abs().max() < 0.04 * expected_cur.grad.abs().max()


@each_device
@pytest.mark.parametrize("make", [leaky_and_steps, synaptic_and_steps])
@pytest.mark.parametrize(("dtype", "time_steps"), [(torch.bfloat16, 27), (torch.float16, 25)])
def test_gradient_of_beta_in_half_precision(make, dtype, time_steps):
    """Of a positive current, so that no terms of the sum over neurons and steps cancel; within 1%."""
    neuron, reference, steps = make()
    cur = make_current(time_steps).detach().abs().mul(0.5).to(dtype)
    for spk, mem in (Fused(neuron)(cur), steps(cur.float())):
        assert 0.05 < spk.float().mean() < 0.95
        (spk.float().sum() + mem.float().sum()).backward()
    assert float(neuron.beta.grad) == pytest.approx(float(reference.beta.grad), rel=0.01)


@each_device
@pytest.mark.parametrize("make", [leaky_and_steps, synaptic_and_steps, alif_and_steps])
@pytest.mark.parametrize("output", [0, 1])
def test_gradients_of_one_output_alone(make, output):
    """In float32: a hidden layer's gradient is that of the spikes, the output layer's that of the potentials."""
    neuron, _, steps = make()
    cur = make_current(27)
    expected_cur = cur.detach().clone().requires_grad_()
    for x, run in ((cur, Fused(neuron)), (expected_cur, steps)):
        out = run(x)[output]
        (out * draw(*out.shape, seed=1)).sum().backward()
    torch.testing.assert_close(cur.grad, expected_cur.grad)


def conv_pool_and_torchs(size: int, dtype: torch.dtype, needs_grad: bool, monkeypatch):
    """Return (tensors that get a gradient, output) of the fused convolution with pooling, and of torch's."""
    monkeypatch.setattr(models.FusedConvPool, "CHUNK_BYTES", 3 * size * size * 6 * dtype.itemsize)  # three frames
    torch.manual_seed(0)
    layer = models.ConvPool(4, 6, NetworkConfig())
    x = draw(7, 4, size, size).to(dtype).contiguous(memory_format=torch.channels_last)
    results = []
    for fused in (True, False):
        x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(needs_grad)
        weight = layer.weight if fused else layer.weight.detach().clone().requires_grad_()
        pooled = layer(x) if fused else F.max_pool2d(F.conv2d(x, weight.to(dtype), padding=1), 2)
        results.append(((x, weight) if needs_grad else (weight,), pooled))
    return results


@each_device
@pytest.mark.parametrize("size", [8, 17])
@pytest.mark.parametrize("needs_grad", [True, False])
def test_fused_convolution_with_pooling_equals_torchs(size, needs_grad, monkeypatch):
    """Weights get their gradient even where the input needs none, as frames do."""
    (ours, pooled), (torchs, expected) = conv_pool_and_torchs(size, torch.float32, needs_grad, monkeypatch)
    torch.testing.assert_close(pooled, expected)
    grad = torch.randn(expected.shape)
    pooled.backward(grad)
    expected.backward(grad)
    for a, b in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


@each_device
@pytest.mark.parametrize("size", [8, 17])
@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.parametrize("dtype", HALF)
def test_fused_convolution_with_pooling_in_half_precision(size, needs_grad, dtype, monkeypatch):
    """Against torch's own of that type, since float32 may find another pixel of a window the largest.

    The weights' gradient is a sum over chunks of frames, each rounded by up to 2^-9: 1% in the norm is allowed.
    """
    (ours, pooled), (torchs, expected) = conv_pool_and_torchs(size, dtype, needs_grad, monkeypatch)
    assert pooled.dtype == dtype
    assert relative_error(pooled, expected) < 0.01
    grad = torch.randn(expected.shape).to(dtype)
    pooled.backward(grad)
    expected.backward(grad)
    for a, b in zip(ours, torchs, strict=True):
        assert a.grad.dtype == a.dtype
        assert relative_error(a.grad, b.grad) < 0.01


@each_device
@pytest.mark.parametrize(
    ("make_neuron", "states"),
    [
        (lambda grad: snn.Lapicque(0.8, threshold=0.3, spike_grad=grad), 1),
        (lambda grad: snn.Alpha(0.8, 0.5, 0.3, grad), 3),
        (lambda grad: snn.Leaky(0.8, 0.5, grad, reset_mechanism="zero"), 1),
        (lambda grad: snn.Leaky(torch.linspace(0.2, 0.9, 50), 0.5, grad, learn_beta=True), 1),
    ],
    ids=["lapicque", "alpha", "reset to zero", "a beta per neuron"],
)
def test_over_time_runs_any_snntorch_neuron(make_neuron, states):
    reference = make_neuron(SPIKE_GRAD)
    compare_with_steps(
        OverTime(make_neuron(models.spike_grad)), reference, step_by_hand(reference, states), make_current()
    )


NEURONS = {
    "leaky": lambda: snn.Leaky(0.9, 0.5, models.spike_grad),
    "synaptic": lambda: snn.Synaptic(0.9, 0.9, 1.0, models.spike_grad),
    "alif": lambda: ALIF(0.9, 0.9, 1.0, 0.5, models.spike_grad),
    "lapicque": lambda: snn.Lapicque(0.8, threshold=0.5, spike_grad=models.spike_grad),
}


@pytest.mark.parametrize("make_neuron", NEURONS.values(), ids=NEURONS)
def test_over_time_starts_at_rest_and_keeps_nothing(make_neuron):
    """A neuron that was stepped by hand before starts at rest, too, and has that state again afterwards."""
    cur = make_current()
    expected = OverTime(make_neuron())(cur)
    neuron = make_neuron()
    for step_cur in cur.detach()[:2]:
        neuron(step_cur)
    before = dict(neuron.named_buffers())
    assert neuron.mem.abs().sum() > 0
    for _ in range(2):
        spk, mem = OverTime(neuron)(cur)
        assert torch.equal(spk, expected[0])
        assert torch.equal(mem, expected[1])
        after = dict(neuron.named_buffers())
        assert all(after[name] is before[name] for name in before)
        assert not any(buffer.requires_grad for buffer in after.values())


@pytest.mark.parametrize("model", MODELS)
def test_copies_of_a_network_start_at_rest(model):
    """On the step backend, after a training pass, and for a copy whose neurons were stepped by hand."""
    torch.manual_seed(0)
    network = make_network(model, neuron_backend="step")
    frames = make_frames(5, 3)
    network(frames)[1].sum().backward()
    expected = [x.detach() for x in network(frames)]
    copied = copy.deepcopy(network)
    with LayerRecorder(copied) as layers:
        copied(frames)
    for name, layer in copied.neuron_layers().items():
        layer.neuron(1 + torch.rand_like(layers[name][0][0]))
        assert layer.neuron.mem.abs().sum() > 0
    for _ in range(2):
        for result, same in zip(copied(frames), expected, strict=True):
            assert torch.equal(result, same)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("layer", [nn.ReLU(), nn.Linear(3, 3), snn.SpikingNeuron(), OverTime(snn.Leaky(0.5))])
def test_wrappers_refuse_what_is_not_a_neuron(wrapper, layer):
    with pytest.raises(TypeError, match=type(layer).__name__):
        wrapper(layer)


class OwnLeaky(snn.Leaky):
    """A neuron of one's own, whose equations the kernels can't know."""


UNSUPPORTED = [
    ("Lapicque", lambda grad: snn.Lapicque(0.5, spike_grad=grad)),
    ("Alpha", lambda grad: snn.Alpha(0.8, 0.5, spike_grad=grad)),
    ("OwnLeaky", lambda grad: OwnLeaky(0.5, spike_grad=grad)),
    ("reset_mechanism='zero'", lambda grad: snn.Leaky(0.5, spike_grad=grad, reset_mechanism="zero")),
    ("reset_mechanism='none'", lambda grad: snn.Synaptic(0.5, 0.5, spike_grad=grad, reset_mechanism="none")),
    ("beta of the shape [50]", lambda grad: snn.Leaky(torch.full((50,), 0.5), spike_grad=grad)),
    ("alpha of the shape [50]", lambda grad: snn.Synaptic(torch.full((50,), 0.5), 0.5, spike_grad=grad)),
    ("threshold of the shape [50]", lambda grad: snn.Leaky(0.5, torch.ones(50), spike_grad=grad)),
    ("beta of the shape [50]", lambda grad: ALIF(0.9, torch.full((50,), 0.5), 0.5, spike_grad=grad)),
    ("learn_threshold", lambda grad: snn.Leaky(0.5, spike_grad=grad, learn_threshold=True)),
    ("learn_threshold", lambda grad: snn.Synaptic(0.5, 0.5, spike_grad=grad, learn_threshold=True)),
    ("learn_threshold", lambda grad: ALIF(0.9, 0.5, 0.5, spike_grad=grad, learn_threshold=True)),
    ("learn_alpha", lambda grad: snn.Synaptic(0.5, 0.5, spike_grad=grad, learn_alpha=True)),
    ("spike_grad", lambda _: snn.Leaky(0.5)),
    ("spike_grad", lambda _: snn.Leaky(0.5, spike_grad=SPIKE_GRAD)),
    ("spike_grad", lambda _: ALIF(0.9, 0.5, 0.5)),
    ("spike_grad", lambda grad: snn.Leaky(0.5, spike_grad=functools.partial(grad, SPIKE_GRAD))),
    ("spike_grad", lambda grad: snn.Leaky(0.5, spike_grad=grad, surrogate_disable=True)),
    ("init_hidden", lambda grad: snn.Leaky(0.5, spike_grad=grad, init_hidden=True)),
    ("output", lambda grad: snn.Leaky(0.5, spike_grad=grad, output=True)),
    ("state_quant", lambda grad: snn.Leaky(0.5, spike_grad=grad, state_quant=torch.round)),
    ("reset_delay", lambda grad: snn.Synaptic(0.5, 0.5, spike_grad=grad, reset_delay=False)),
    ("graded", lambda grad: snn.Leaky(0.5, spike_grad=grad, graded_spikes_factor=2.0)),
    ("graded", lambda grad: snn.Leaky(0.5, spike_grad=grad, learn_graded_spikes_factor=True)),
    ("rho of the shape [50]", lambda grad: ALIF(torch.full((50,), 0.9), 0.5, 0.5, spike_grad=grad)),
    ("adapt_scale of the shape [50]", lambda grad: ALIF(0.9, 0.5, torch.full((50,), 0.5), spike_grad=grad)),
]


@pytest.mark.parametrize(("words", "make_neuron"), UNSUPPORTED, ids=[words for words, _ in UNSUPPORTED])
def test_fused_refuses_what_its_kernels_do_not_know(words, make_neuron):
    neuron = make_neuron(models.spike_grad)
    with pytest.raises(ValueError, match=re.escape(words)) as refusal:
        Fused(neuron)
    assert type(neuron).__name__ in str(refusal.value)
    assert "OverTime" in str(refusal.value)


@pytest.mark.filterwarnings("ignore:Inhibition")
def test_fused_refuses_inhibition():
    with pytest.raises(ValueError, match="inhibition"):
        Fused(snn.Leaky(0.5, spike_grad=models.spike_grad, inhibition=True))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_currents_of_integers_are_refused(wrapper):
    with pytest.raises(TypeError, match=r"the current is torch\.int64"):
        wrapper(snn.Leaky(0.5, spike_grad=models.spike_grad))(torch.ones(3, 2, 5, dtype=torch.int64))


@pytest.mark.parametrize(("network", "model"), [(SpikingCNN, "cnn"), (SpikingResNet, "resnet")])
def test_networks_of_other_neurons(network, model):
    def make_lif(config):
        return snn.Lapicque(config.beta, threshold=config.threshold, spike_grad=models.spike_grad)

    with pytest.raises(ValueError, match="Lapicque"):
        network(NetworkConfig(model), make_lif=make_lif)
    with pytest.raises(ValueError, match="can't be built with model="):
        network(NetworkConfig({"cnn": "resnet", "resnet": "cnn"}[model]))
    torch.manual_seed(0)
    built = network(NetworkConfig(model, neuron_backend="step"), make_lif=make_lif)
    kinds = [type(layer.neuron) for layer in built.neuron_layers().values()]
    assert kinds.count(snn.Lapicque) == 5
    assert snn.Leaky not in kinds
    frames = make_frames(5, 3)
    spk, mem = built(frames)
    assert spk.shape == mem.shape == (5, 3, 10)
    mem.sum().backward()
    assert all(parameter.grad is not None for parameter in built.parameters())
    assert torch.equal(built(frames)[1], mem)


@pytest.fixture
def probe_again():
    """Let a test look for the compiler again, and the next test, too."""
    models.probe_compiler.cache_clear()
    yield
    torch.compiler.set_stance("default")
    models.compiler_error = None
    models.probe_compiler.cache_clear()


def runs_compiled(layer, cur) -> bool:
    """Return whether a neuron layer's kernel runs compiled: then no operator of torch compares mem with threshold."""
    layer(cur)  # compiles
    with torch.profiler.profile() as profile:
        layer(cur)
    return "aten::gt" not in {event.name for event in profile.events()}


@pytest.mark.parametrize("model", MODELS)
def test_other_shapes_compile_nothing_again(model, probe_again):
    """Once a pass of training and one of testing have run, for a T that is a multiple of STEPS_PER_CALL and one not."""
    network = make_network(model, dropout=0.2)

    def run(time_steps, batch):
        network.train()
        network(torch.rand(time_steps, batch, 2, 34, 34))[0].sum().backward()
        network.eval()
        with torch.no_grad():
            network(torch.rand(time_steps, batch, 2, 34, 34))

    run(5, 3)
    run(11, 7)
    with torch.compiler.set_stance("fail_on_recompile"):
        for time_steps, batch in ((5, 2), (10, 9), (25, 4), (7, 5), (10, 21)):
            run(time_steps, batch)
        assert models.compiler_error is None
        cur = torch.zeros(5, 16, dtype=torch.float64)
        with pytest.raises(RuntimeError, match="recompile"):  # as any other compilation would
            models.run_neurons(cur, (torch.tensor(0.5), torch.tensor(1.0), None, None, None))


def test_without_a_compiler_the_same_runs_uncompiled_with_a_warning(monkeypatch, capsys, probe_again):
    cur, layer = make_current(7), Fused(snn.Leaky(0.5, spike_grad=models.spike_grad))
    network, frames = make_network("cnn"), make_frames(5, 3)
    expected, expected_mem = layer(cur), network(frames)[1]
    assert runs_compiled(layer, cur)
    assert models.describe_backend(network) == "fused"
    compiled, errors = models.neuron_forward, [RuntimeError("no working C++ compiler\nand a long story")]

    def broken_once(*args):
        if errors:
            raise errors.pop()
        return compiled(*args)

    models.probe_compiler.cache_clear()
    capsys.readouterr()
    monkeypatch.setattr(models, "neuron_forward", broken_once)
    for _ in range(2):
        assert all(torch.equal(*pair) for pair in zip(layer(cur), expected, strict=True))
    layer(cur.detach().bfloat16())  # which is probed, too
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "uncompiled" in message
    assert "no working C++ compiler" in message
    assert not runs_compiled(layer, cur)
    assert models.describe_backend(network) == "fused, uncompiled"
    torch.testing.assert_close(network(frames)[1], expected_mem, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error")])
@pytest.mark.parametrize("kernel", ["neuron_forward", "neuron_backward", "pool_forward", "pool_backward"])
def test_errors_of_kernels_are_not_taken_for_a_missing_compiler(kernel, error, monkeypatch, capsys, probe_again):
    network, frames = make_network("resnet"), make_frames(5, 3)
    network(frames)[1].sum().backward()

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(models, kernel, fail)
        with pytest.raises(type(error), match=str(error)):
            network(frames)[1].sum().backward()
    assert models.compiler_error is None
    assert models.describe_backend(network) == "fused"
    assert capsys.readouterr().err == ""
    network(frames)[1].sum().backward()
    assert runs_compiled(network.lif_out, torch.rand(5, 3, 10))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: out of memory\nmore lines"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        MemoryError(),
        None,
    ],
)
def test_out_of_memory_in_the_probe_is_not_taken_for_a_missing_compiler(error, monkeypatch, capsys, probe_again):
    """The last is torch's own: a tensor that no machine holds."""
    cur, layer = make_current(7), Fused(snn.Leaky(0.5, spike_grad=models.spike_grad))

    def out_of_memory(*_):
        if error:
            raise error
        torch.empty(10**15)

    with monkeypatch.context() as patch:
        patch.setattr(models, "run_neurons", out_of_memory)
        for _ in range(2):
            with pytest.raises(type(error) if error else RuntimeError):
                layer(cur)
    assert models.compiler_error is None
    assert runs_compiled(layer, cur)
    assert capsys.readouterr().err == ""


@each_device
@pytest.mark.parametrize("model", MODELS)
def test_precisions_and_backends_agree(model):
    """Backends to float32's rounding on a CPU; else in what the first layer fires, and in how much the others do: which
    spike of an untrained network falls where is chaos."""
    torch.manual_seed(0)
    first = make_network(model)
    frames = make_frames(10, 24)
    mems, spikes, rates = {}, {}, {}
    for key in (("fp32", "fused"), ("fp32", "step"), ("bf16", "fused"), ("fp16", "fused"), ("fp16", "step")):
        network = make_network(model, precision=key[0], neuron_backend=key[1])
        network.load_state_dict(first.state_dict())
        with ActivityMeter(network) as meter, LayerRecorder(network) as layers, torch.no_grad():
            spk, mems[key] = network(frames)
        assert spk.dtype == mems[key].dtype == torch.float32
        spikes[key], rates[key] = layers["lif1"][0], firing_rates(meter)
    fused, step, *half = mems
    if frames.device.type == "cpu":
        torch.testing.assert_close(mems[fused], mems[step], rtol=1e-3, atol=1e-3)
    for key in (step, *half):
        assert (spikes[fused] != spikes[key]).float().mean() < 0.005
        for name, rate in rates[fused].items():
            assert rates[key][name] == pytest.approx(rate, rel=0.1), (key, name)


@each_device
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("model", MODELS)
def test_gradients_of_a_network_in_half_precision(model, dtype):
    """Without spikes, since one that flips changes the gradients of all layers before it; neurons have tests above.

    The largest errors are the first layer's, of pooling windows where rounding makes another pixel the largest.
    """
    torch.manual_seed(0)
    frames, precision = make_frames(5, 8), {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    first, grads = make_network(model, no_spikes=True), []
    for name in ("fp32", precision):
        network = make_network(model, no_spikes=True, precision=name)
        network.load_state_dict(first.state_dict())
        F.cross_entropy(network(frames)[1].sum(0), torch.arange(8)).backward()
        # Weights alone: norms' gradients are sums over a batch that cancel.
        grads.append({name: x.grad for name, x in network.named_parameters() if "norm" not in name})
    for name, grad in grads[1].items():
        assert grad.dtype == torch.float32
        assert relative_error(grad, grads[0][name]) < {"bf16": 0.3, "fp16": 0.1}[precision], name


def firing_rates(meter: ActivityMeter) -> dict[str, float]:
    return {name: layer["firing_rate"] for name, layer in meter.layers().items()}


def network_that_fires(model: str, frames: torch.Tensor) -> models.SpikingNetwork:
    """Return an untrained network in eval mode whose norms know the frames: without, all layers are silent."""
    torch.manual_seed(0)
    network = make_network(model)
    with torch.no_grad():
        for _ in range(40):
            network(frames)
    return network.eval()


@each_device
@pytest.mark.parametrize("model", MODELS)
def test_networks_equal_snntorchs_loop_over_the_same_layers(model):
    """The benchmark's competitor: every layer step by step, with snnTorch's own neurons.

    A GPU adds in another order for another number of frames, which may flip single spikes.
    """
    frames = make_frames(11, 4)
    network = network_that_fires(model, frames)
    with torch.no_grad():
        spk, mem = network(frames)
        expected_spk, expected_mem = benchmark.Loop(network)(frames)
    assert expected_spk.sum() > 0
    if frames.device.type == "cpu":
        assert torch.equal(spk, expected_spk)
        torch.testing.assert_close(mem, expected_mem, rtol=1e-3, atol=1e-3)
    assert (spk != expected_spk).float().mean() < 0.05
    assert relative_error(mem, expected_mem) < 0.1


@pytest.mark.parametrize("model", MODELS)
def test_snntorchs_loop_starts_every_batch_at_rest(model):
    """In training, too: `snntorch.utils.reset` misses neurons of a copied network, and an ALIF."""
    frames = make_frames(6, 4)
    loop = benchmark.Loop(network_that_fires(model, frames))
    results = []
    for _ in range(2):
        spk, mem = loop(frames)
        mem.sum().backward()
        assert spk.sum() > 0
        results.append(mem)
    assert torch.equal(*results)


def test_alif_fires_less_with_a_larger_adapt_scale():
    cur = torch.full((40, 1, 1), 1.5)
    rates = [Fused(ALIF(0.9, 0.5, scale, 1.0, models.spike_grad))(cur)[0].mean().item() for scale in (0.0, 1.0, 4.0)]
    assert rates[0] > rates[1] > rates[2] > 0


def test_alif_gradient_passes_through_its_adaptation():
    """A spike raises the threshold of later steps, so a later spike's gradient reaches an earlier current."""
    cur = torch.tensor([1.5, 0.0, 0.0, 0.7]).view(4, 1, 1).requires_grad_()
    gradients = []
    for adapt_scale in (0.0, 2.0):
        spk, _ = Fused(ALIF(0.9, 0.0, adapt_scale, 1.0, models.spike_grad))(cur)
        gradients.append(torch.autograd.grad(spk[3].sum(), cur)[0][0].item())
    assert gradients[0] == 0  # with beta = 0, only the adaptation remembers
    assert gradients[1] < 0


@pytest.mark.parametrize("make_neuron", [leaky_and_steps, synaptic_and_steps, alif_and_steps])
def test_fused_starts_at_rest_every_time(make_neuron):
    layer, cur = Fused(make_neuron()[0]), make_current().detach()
    assert torch.equal(layer(cur)[1], layer(cur)[1])


@pytest.mark.parametrize("model", MODELS)
def test_networks_map_frames_to_spikes_and_membrane_potentials(model):
    network = make_network(model, dropout=0.2)
    for time_steps, batch in ((1, 3), (10, 2), (10, 1)):
        network.train(batch > 1)
        spk, mem = network(torch.rand(time_steps, batch, 2, 34, 34))
        assert spk.shape == mem.shape == (time_steps, batch, 10)
        assert set(spk.unique().tolist()) <= {0.0, 1.0}


def test_networks_have_the_neurons_that_the_readme_names():
    cnn, resnet = (make_network(model).neuron_layers() for model in MODELS)
    assert list(cnn) == ["lif1", "lif2", "lif3", "lif4", "lif_out"]
    assert list(resnet) == ["lif1", "res1.lif1", "res1.lif2", "res2.lif1", "res2.lif2", "fc_syn", "lif_out"]
    assert all(isinstance(layer.neuron, snn.Leaky) for layer in cnn.values())
    assert isinstance(resnet["lif1"].neuron, ALIF)
    assert isinstance(resnet["fc_syn"].neuron, snn.Synaptic)
    for layers in (cnn, resnet):
        assert all(isinstance(layer, Fused) for layer in layers.values())


@each_device
@pytest.mark.parametrize("model", MODELS)
def test_silent_input_gives_no_spikes(model):
    network = make_network(model, dropout=0.2)
    for training in (True, False):
        network.train(training)
        with ActivityMeter(network) as meter:
            spk, mem = network(torch.zeros(10, 2, 2, 34, 34))
        assert spk.sum() == 0
        assert mem.abs().sum() == 0
        assert set(firing_rates(meter).values()) == {0.0}
        assert all(meter.operations(name).sum() == 0 for name in meter.layers())


@each_device
@pytest.mark.parametrize("model", MODELS)
def test_gradients_reach_every_parameter_and_no_layer_is_silent_or_saturated(model):
    torch.manual_seed(0)
    network = make_network(model, dropout=0.2)
    frames = make_frames(25, 8, rate=0.05)
    with ActivityMeter(network) as meter:
        spk, _ = network(frames)
    F.cross_entropy(spk.sum(0), torch.arange(8)).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    for name, rate in firing_rates(meter).items():
        assert 0.01 < rate < 0.6, f"{name} fires at {rate}"


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("model", MODELS)
def test_initial_membrane_potentials_spread_by_about_a_threshold(model, beta):
    torch.manual_seed(0)
    network = make_network(model, beta=beta)
    with LayerRecorder(network) as layers, torch.no_grad():
        network(make_frames(25, 8, rate=0.05))
    for name, (_spk, mem) in layers.items():
        assert 0.5 < float(mem.std()) < 2, name


@pytest.mark.parametrize("beta", [0.5, 0.9])
@pytest.mark.parametrize("model", MODELS)
def test_outputs_scale_with_threshold(model, beta):
    frames = torch.poisson(torch.full((25, 4, 2, 34, 34), 0.05), generator=torch.Generator().manual_seed(0))
    outputs = []
    for threshold in (1.0, 0.25):  # a power of 2 rounds nothing
        torch.manual_seed(0)
        with torch.no_grad():
            outputs.append(make_network(model, beta=beta, threshold=threshold)(frames))
    (spk, mem), (spk_of_quarter, mem_of_quarter) = outputs
    assert spk.sum() > 0
    assert torch.equal(spk_of_quarter, spk)
    assert torch.equal(4 * mem_of_quarter, mem)


@pytest.mark.parametrize(
    "shape", [(10, 2, 34, 34), (2, 34, 34), (10, 3, 1, 34, 34), (10, 3, 34, 34, 2), (10, 3, 2, 28, 28)]
)
@pytest.mark.parametrize("model", MODELS)
def test_frames_of_another_shape_are_refused(model, shape):
    with pytest.raises(ValueError, match=re.escape(f"{list(shape)}; it must be [T, B, 2, 34, 34]")):
        make_network(model)(torch.rand(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_a_neuron_for_a_whole_recording(dtype):
    dropout = models.TimeSharedDropout(0.25)
    spk = (torch.rand(6, 40, 100, generator=torch.Generator().manual_seed(0)) < 0.5).to(dtype)
    torch.manual_seed(0)
    mask = dropout(torch.ones_like(spk))
    assert torch.equal(mask, mask[:1].expand_as(mask))
    assert set(mask.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.75, dtype=dtype))}
    assert (mask[0] == 0).float().mean() == pytest.approx(0.25, abs=0.03)  # of 4,000: four standard deviations
    assert len(mask[0].unique(dim=0)) == 40, "recordings share a mask"
    assert not torch.equal(dropout(torch.ones_like(spk)), mask), "batches share a mask"
    torch.manual_seed(0)
    assert torch.equal(dropout(spk), spk * mask)
    assert torch.equal(dropout.eval()(spk), spk)


@each_device
@pytest.mark.parametrize("model", MODELS)
def test_networks_drop_neurons_in_training_only(model):
    torch.manual_seed(0)
    frames = make_frames(10, 4)
    for network, training, same in (
        (make_network(model), True, True),
        (make_network(model, dropout=0.5), True, False),
        (make_network(model, dropout=0.5), False, True),
    ):
        network.train(training)
        assert torch.equal(network(frames)[1], network(frames)[1]) == same


@each_device
@pytest.mark.parametrize("model", MODELS)
def test_recordings_of_a_batch_do_not_mix(model):
    torch.manual_seed(0)
    network = make_network(model, dropout=0.2).eval()
    frames = make_frames(10, 4)
    _spk, mem = network(frames)
    for b in range(4):
        torch.testing.assert_close(network(frames[:, b : b + 1])[1][:, 0], mem[:, b], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_outputs_do_not_depend_on_later_frames(model):
    torch.manual_seed(0)
    network = make_network(model, dropout=0.2).eval()
    frames = make_frames(12, 2)
    torch.testing.assert_close(network(frames)[1][:5], network(frames[:5])[1], rtol=1e-3, atol=1e-4)


def test_predict_takes_the_largest_summed_membrane_potential():
    mem = torch.zeros(2, 3, 10)
    mem[0, 0, 4], mem[1, 0, 4], mem[:, 0, 7] = 2.0, -1.5, 0.4  # 0.5 and 0.8 in all
    mem[0, 1, 2], mem[1, 1, 8] = 0.3, 0.9
    mem[:, 2] = -1.0
    mem[:, 2, 3] = -0.5  # the least negative
    assert predict(mem * 0, mem).tolist() == [7, 8, 3]
    assert predict_over_time(mem * 0, mem).tolist() == [[4, 2, 3], [7, 8, 3]]


def test_rate_and_latency_codes_and_their_ties():
    spk, mem = torch.zeros(4, 4, 10), torch.zeros(4, 4, 10)
    mem[:, :, 9] = 0.1  # the membrane decides for 9 unless told otherwise
    spk[1:, 0, 3], spk[0, 0, 5], mem[0, 0, 5] = 1, 1, 0.05  # 3 fires most, 5 first
    spk[2, 1, [1, 2]], mem[2, 1, 2] = 1, 2.0  # a tie of both codes, the membrane says 2
    spk[[0, 3], 2, 6], spk[[1, 2], 2, 7], mem[3, 2, 7] = 1, 1, 2.0  # equal rates, 6 is first
    # the last recording is silent
    assert predict(spk, mem, "rate").tolist() == [3, 2, 7, 9]
    assert predict(spk, mem, "latency").tolist() == [5, 2, 6, 9]
    assert predict_over_time(spk, mem, "rate").tolist() == [[5, 9, 6, 9], [5, 9, 6, 9], [3, 2, 7, 9], [3, 2, 7, 9]]
    assert predict_over_time(spk, mem, "latency")[0].tolist() == [5, 9, 6, 9]
    ties = {code: (models.leading(spk, code)[-1].sum(-1) > 1).tolist() for code in ("rate", "latency")}
    assert ties == {"rate": [False, True, True, True], "latency": [False, True, False, True]}


def test_the_rate_code_is_snntorchs_where_nothing_ties():
    spk = torch.bernoulli(torch.rand(1, 500, 10).expand(25, -1, -1), generator=torch.Generator().manual_seed(0))
    spk = spk[:, models.leading(spk, "rate")[-1].sum(-1) == 1]
    labels = torch.randint(0, 10, (spk.shape[1],))
    ours = (predict(spk, torch.zeros_like(spk), "rate") == labels).double().mean()
    assert len(labels) > 100
    assert float(ours) == pytest.approx(SF.accuracy_rate(spk, labels))


def count_connections(in_channels, out_channels, size, kernel, stride, padding, pooled=False):
    """Count, one by one, how many outputs of a convolution each input pixel reaches; pooled, an odd last one is cut."""
    reached = np.zeros((in_channels, size, size))
    outputs = (size + 2 * padding - kernel) // stride + 1
    outputs -= outputs % 2 if pooled else 0
    for oy in range(outputs):
        for ox in range(outputs):
            for ky in range(kernel):
                for kx in range(kernel):
                    y, x = oy * stride + ky - padding, ox * stride + kx - padding
                    if 0 <= y < size and 0 <= x < size:
                        reached[:, y, x] += out_channels
    return reached


@pytest.mark.parametrize(("size", "kernel", "stride", "padding"), [(5, 3, 1, 1), (7, 3, 2, 1), (6, 1, 2, 0)])
def test_fan_out_of_a_convolution_equals_a_count_of_connections(size, kernel, stride, padding):
    layer = nn.Conv2d(2, 3, kernel, stride, padding)
    expected = count_connections(2, 3, size, kernel, stride, padding)
    np.testing.assert_array_equal(fan_out(layer, torch.Size((2, size, size))).numpy(), expected)


def test_connections_are_counted_exactly_inside_autocast():
    """9 times 29 channels is 261, which bfloat16 rounds to 260."""
    with torch.autocast("cpu", torch.bfloat16):
        counted = fan_out(nn.Conv2d(2, 29, 3, padding=1), torch.Size((2, 5, 5)))
    np.testing.assert_array_equal(counted.numpy(), count_connections(2, 29, 5, 3, 1, 1))


def test_activity_of_the_cnn_equals_a_count_by_hand():
    torch.manual_seed(0)
    network = make_network("cnn", dropout=0.2).eval()
    frames = make_frames(6, 3, rate=0.3)
    with ActivityMeter(network) as meter:
        out, _ = network(frames)
        network(frames)
    spk1, _ = network.lif1(models.time_distributed(frames, network.conv1, network.norm1))
    spk2, _ = network.lif2(models.time_distributed(spk1, network.conv2, network.norm2))
    spk3, _ = network.lif3(models.time_distributed(spk2, network.conv3, network.norm3))
    spk4, _ = network.lif4(
        models.time_distributed(models.to_channels_last(spk3).flatten(2), network.fc1, network.norm4)
    )
    layers = meter.layers()
    for name, spk in {"lif1": spk1, "lif2": spk2, "lif3": spk3, "lif4": spk4, "lif_out": out}.items():
        assert layers[name]["neurons"] == spk[0, 0].numel()
        assert layers[name]["firing_rate"] == pytest.approx(spk.mean().item(), rel=1e-5)
        assert layers[name]["spikes"] == pytest.approx(spk.sum().item() / 3, rel=1e-5)
    reached = [count_connections(*shape, 3, 1, 1, pooled=True) for shape in ((2, 16, 34), (16, 32, 17), (32, 64, 8))]
    inputs = zip((frames, spk1, spk2), reached, strict=True)
    operations = [(x.detach().numpy() * n).sum((2, 3, 4)) for x, n in inputs]
    operations += [spk3.sum((2, 3, 4)).detach().numpy() * 128, spk4.sum(2).detach().numpy() * 10]
    for (name, layer), expected in zip(layers.items(), operations, strict=True):
        np.testing.assert_allclose(meter.operations(name), np.tile(expected, 2))  # of two passes
        assert layer["synaptic_operations"] == pytest.approx(expected.sum() / 3)
    macs = [6 * int(n.sum()) for n in reached] + [6 * 1024 * 128, 6 * 128 * 10]
    assert [layer["macs"] for layer in layers.values()] == macs
    first, *rest = (x.sum() / 3 for x in operations)
    assert models.energy_uj(layers, 6) == {
        "spiking_events": pytest.approx(0.9e-6 * (first + sum(rest))),
        "spiking_dense_input": pytest.approx(4.6e-6 * macs[0] + 0.9e-6 * sum(rest)),
        "relu_all_frames": pytest.approx(4.6e-6 * sum(macs)),
        "relu_one_frame": pytest.approx(4.6e-6 * sum(macs) / 6),
    }
    until = [1, 4, 6, 2, 2, 2]  # the steps after which the recordings of the two passes are decided
    cost = meter.cost_until(torch.tensor(until))
    for layer, expected, connections in zip(cost.values(), operations, macs, strict=True):
        used = sum(expected[:step, n % 3].sum() for n, step in enumerate(until))
        assert layer["synaptic_operations"] == pytest.approx(used / 6)
        assert layer["macs"] == pytest.approx(connections / 6 * sum(until) / 6)


def test_the_operations_of_a_residual_block_are_those_of_its_three_convolutions():
    network = network_that_fires("resnet", make_frames(6, 3, rate=0.3))
    frames = make_frames(6, 3, rate=0.3)
    with ActivityMeter(network) as meter, LayerRecorder(network) as layers, torch.no_grad():
        network(frames)
    spk1, inner = layers["lif1"][0], layers["res1.lif1"][0]
    reached = count_connections(16, 32, 17, 3, 1, 1, pooled=True)
    np.testing.assert_allclose(meter.operations("res1.lif1"), (spk1.numpy() * reached).sum((2, 3, 4)))
    # The shortcut has no window for the last row and column.
    expected = 32 * spk1[..., :16, :16].sum((2, 3, 4)).numpy()
    expected += (inner.numpy() * count_connections(32, 32, 8, 3, 1, 1)).sum((2, 3, 4))
    np.testing.assert_allclose(meter.operations("res1.lif2"), expected)
    assert meter.layers()["res1.lif2"]["macs"] == 6 * (count_connections(32, 32, 8, 3, 1, 1).sum() + 16 * 64 * 32)


# --- Without spikes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", models.BACKENDS)
def test_the_network_without_spikes_is_an_ordinary_one_on_each_frame(backend):
    torch.manual_seed(0)
    network = make_network("cnn", no_spikes=True, neuron_backend=backend).eval()
    frames = make_frames(4, 3, rate=0.3)
    with torch.no_grad():
        out, mem = network(frames)
        x = frames.flatten(0, 1)
        for conv, norm in (
            (network.conv1, network.norm1),
            (network.conv2, network.norm2),
            (network.conv3, network.norm3),
        ):
            x = F.relu(norm(F.max_pool2d(F.conv2d(x, conv.weight, padding=1), 2)))
        x = F.relu(network.norm4(network.fc1(x.movedim(1, -1).flatten(1))))
        expected = network.norm_out(network.fc_out(x)).unflatten(0, (4, 3))
    assert expected.abs().mean() > 0.01
    torch.testing.assert_close(mem, expected)
    torch.testing.assert_close(out, F.relu(expected))


def test_without_spikes_the_networks_have_the_same_weights_and_nothing_that_needs_spikes():
    for model in MODELS:
        spiking, relu = make_network(model), make_network(model, no_spikes=True)
        assert [p.shape for p in spiking.parameters()] == [p.shape for p in relu.parameters()]
        assert list(spiking.neuron_layers()) == list(relu.neuron_layers())
        with ActivityMeter(spiking) as meter, ActivityMeter(relu) as relu_meter:
            spiking(make_frames(4, 2))
            relu(make_frames(4, 2))
        for name, layer in relu_meter.layers().items():
            assert layer == {key: meter.layers()[name][key] for key in ("neurons", "macs")}
        assert set(models.energy_uj(relu_meter.layers(), 4)) == {"relu_all_frames", "relu_one_frame"}
    for wrong in ({"readout": "rate"}, {"learn_beta": True}):
        with pytest.raises(ValueError, match="no_spikes"):
            NetworkConfig(no_spikes=True, **wrong)


# --- Confidence ------------------------------------------------------------------------------------------


def test_confidence_is_the_softmax_of_the_evidence():
    mem = torch.zeros(3, 1, 10)
    mem[:, 0, 4] = torch.tensor([1.0, 2.0, -1.0])  # means of 1, 3 / 2, 2 / 3
    spk = torch.zeros(3, 1, 10)
    spk[1:, 0, 7] = 1
    e = np.exp
    expected = [e(1 / 2) / (e(1 / 2) + 9), e(3 / 4) / (e(3 / 4) + 9), e(1 / 3) / (e(1 / 3) + 9)]
    np.testing.assert_allclose(models.confidence(spk, mem, "membrane", 2.0)[:, 0], expected, rtol=1e-6)
    expected = [0.1, e(1 / 4) / (e(1 / 4) + 9), e(1 / 3) / (e(1 / 3) + 9)]  # rates of 0, 1 / 2, 2 / 3
    np.testing.assert_allclose(models.confidence(spk, mem, "rate", 2.0)[:, 0], expected, rtol=1e-6)
    # Neuron 7 waited one step; the others wait for 1, 2, 3.
    expected = [0.1, 1 / (1 + 9 * e(-1 / 2)), 1 / (1 + 9 * e(-2 / 2))]
    np.testing.assert_allclose(models.confidence(spk, mem, "latency", 2.0)[:, 0], expected, rtol=1e-6)


def test_the_fitted_temperature_is_the_one_that_labels_were_drawn_with():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 20_000, 10, generator=generator) * 8
    for temperature in (1.0, 4.0, 16.0):
        labels = torch.multinomial(torch.softmax(logits[0] / temperature, -1), 1, generator=generator)[:, 0]
        fitted = models.fit_temperature(torch.zeros_like(logits), logits, "membrane", labels)
        assert fitted == pytest.approx(temperature, rel=0.2)
        for scale in (1e-3, 1e3):  # evidence may be of any size
            fitted = models.fit_temperature(torch.zeros_like(logits), logits * scale, "membrane", labels)
            assert fitted == pytest.approx(temperature * scale, rel=0.2)


def test_confidences_fit_at_every_step_of_a_current_that_lasts():
    """Output neurons whose potential has a constant mean tell the digit at the first step as surely as at the last."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 10, generator=generator) * 3
    labels = torch.multinomial(torch.softmax(logits, -1), 1, generator=generator)[:, 0]
    mem = logits.expand(25, -1, -1)
    temperature = models.fit_temperature(torch.zeros_like(mem), mem, "membrane", labels)
    confidence = models.confidence(torch.zeros_like(mem), mem, "membrane", temperature)
    correct = logits.argmax(-1) == labels
    for step in (0, 9, 24):
        assert confidence[step].mean() == pytest.approx(correct.double().mean().item(), abs=0.04)


@pytest.mark.parametrize("model", MODELS)
def test_measuring_activity_changes_no_outputs(model):
    network = make_network(model, dropout=0.2).eval()
    frames = make_frames(5, 2, rate=0.3)
    before = network(frames)[1]
    with ActivityMeter(network):
        during = network(frames)[1]
    assert torch.equal(before, during)
    assert torch.equal(before, network(frames)[1])


# --- in one's own script ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", models.BACKENDS)
@pytest.mark.parametrize("model", MODELS)
def test_networks_can_be_copied_and_saved_after_a_pass(model, backend, tmp_path):
    torch.manual_seed(0)
    network = build_model(NetworkConfig(model=model, neuron_backend=backend))
    frames = torch.poisson(torch.full((6, 3, 2, 34, 34), 0.2))
    network(frames)[1].sum().backward()
    _, expected = network.eval()(frames)
    torch.save(network, tmp_path / "network.pt")
    copies = copy.deepcopy(network), pickle.loads(pickle.dumps(network))
    for copied in (*copies, torch.load(tmp_path / "network.pt", weights_only=False)):
        assert torch.equal(copied(frames)[1], expected)


@pytest.mark.parametrize("model", MODELS)
def test_second_derivatives_of_fused_networks_are_refused(model):
    frames = torch.poisson(torch.full((6, 3, 2, 34, 34), 0.2))
    for backend in models.BACKENDS:
        torch.manual_seed(0)
        network = build_model(NetworkConfig(model=model, neuron_backend=backend))
        loss = network(frames)[1].square().sum()
        if backend == "fused":
            with pytest.raises(RuntimeError, match="no second derivatives: use --neuron_backend step"):
                torch.autograd.grad(loss, network.conv1.weight, create_graph=True)
        else:
            (grad,) = torch.autograd.grad(loss, network.conv1.weight, create_graph=True)
            (second,) = torch.autograd.grad(grad.square().sum(), network.conv1.weight)
            assert second.abs().sum() > 0


@pytest.mark.parametrize("convert", ["half", "double", "bfloat16"])
def test_weights_of_another_type_are_refused(convert):
    network = getattr(build_model(NetworkConfig()), convert)()
    with pytest.raises(TypeError, match="must stay float32: set the precision instead"):
        network(torch.zeros(2, 1, 2, 34, 34))


def test_networks_run_without_a_compiler(tmp_path):
    """The warning says what is missing, and the results are those of the compiled network."""
    code = (
        "import sys, torch; from models import *; frames, state = torch.load(sys.argv[1]); "
        "n = build_model(NetworkConfig()); n.load_state_dict(state); spk, mem = n(frames); mem.sum().backward(); "
        "torch.save([mem.detach(), n.conv1.weight.grad], sys.argv[1]); print(describe_backend(n))"
    )
    network, frames, path = make_network("cnn"), make_frames(6, 3), tmp_path / "tensors.pt"
    torch.save([frames, network.state_dict()], path)
    missing = {"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "empty")}
    command, environment = [sys.executable, "-c", code, str(path)], {**os.environ, **missing}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "fused, uncompiled"
    (warning,) = [line for line in result.stderr.splitlines() if "WARNING" in line]
    assert "compiling needs a C++ compiler (g++)" in warning
    assert "same results" in warning
    _, mem = network(frames)
    mem.sum().backward()
    assert models.describe_backend(network) == "fused"
    for expected, got in zip((mem, network.conv1.weight.grad), torch.load(path), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [1, 2])
def test_width_multiplies_channels_and_the_hidden_layer(width):
    network = build_model(NetworkConfig(width=width))
    shapes = [tuple(layer.weight.shape[:2]) for layer in (network.conv1, network.conv2, network.conv3, network.fc1)]
    assert shapes == [(16 * width, 2), (32 * width, 16 * width), (64 * width, 32 * width), (128 * width, 1024 * width)]


def test_the_gradient_of_alifs_beta_equals_the_stepped_one():
    grads = []
    for wrapper in (OverTime, Fused):
        alif = ALIF(0.9, 0.6, 0.7, 0.4, models.spike_grad, learn_beta=True)
        spk, mem = wrapper(alif)(make_current(11))
        (spk.sum() + mem.square().sum()).backward()
        grads.append(alif.beta.grad)
    assert grads[0].abs() > 1
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-3)


def test_unknown_settings_of_a_network_are_refused():
    for settings in ({"model": "mlp"}, {"precision": "auto"}, {"neuron_backend": "slow"}, {"readout": "best"}):
        (name,) = settings
        with pytest.raises(ValueError, match=f"{name} is '{settings[name]}'; it must be one of"):
            NetworkConfig(**settings)
