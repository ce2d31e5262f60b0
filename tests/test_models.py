"""The neurons against snnTorch's own stepped by hand and against their equations; the networks; the activity."""

import numpy as np
import pytest
import snntorch as snn
import torch
from snntorch import surrogate

import models
from models import ALIF, ActivityMeter, Leaky, Synaptic, build_model, fan_out, predict, predict_over_time

MODELS = ["cnn", "resnet"]


def make_current(time_steps=30, batch=4, neurons=50):
    """Return a current that makes neurons fire often, and needs a gradient."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(time_steps, batch, neurons, generator=generator) * 0.8).requires_grad_()


def compare_with_steps(layer, steps, cur):
    """Check spikes, membranes and gradients of a layer against those of `steps(cur)`, snnTorch stepped by hand."""
    expected_cur = cur.detach().clone().requires_grad_()
    expected_spk, expected_mem = steps(expected_cur)
    spk, mem = layer(cur)
    assert 0.05 < expected_spk.mean() < 0.95, "the comparison says nothing about neurons that never or always fire"
    assert torch.equal(spk, expected_spk)
    torch.testing.assert_close(mem, expected_mem)
    weights = torch.randn(spk.shape, generator=torch.Generator().manual_seed(1))
    (spk * weights + mem * weights.flip(0)).sum().backward()
    (expected_spk * weights + expected_mem * weights.flip(0)).sum().backward()
    torch.testing.assert_close(cur.grad, expected_cur.grad)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("threshold", [0.3, 1.0])
def test_leaky_equals_snntorch_stepped_by_hand(beta, threshold):
    spike_grad = surrogate.fast_sigmoid(5)
    reference = snn.Leaky(beta=beta, threshold=threshold, spike_grad=spike_grad)

    def steps(cur):
        mem, spks, mems = reference.reset_mem(), [], []
        for t in range(len(cur)):
            spk, mem = reference(cur[t], mem)
            spks.append(spk)
            mems.append(mem)
        return torch.stack(spks), torch.stack(mems)

    compare_with_steps(Leaky(beta=beta, threshold=threshold, spike_grad=spike_grad), steps, make_current())


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.5), (0.5, 0.5), (0.9, 0.7)])
def test_synaptic_equals_snntorch_stepped_by_hand(alpha, beta):
    spike_grad = surrogate.fast_sigmoid(5)
    reference = snn.Synaptic(alpha=alpha, beta=beta, spike_grad=spike_grad)

    def steps(cur):
        (syn, mem), spks, mems = reference.reset_mem(), [], []
        for t in range(len(cur)):
            spk, syn, mem = reference(cur[t], syn, mem)
            spks.append(spk)
            mems.append(mem)
        return torch.stack(spks), torch.stack(mems)

    compare_with_steps(Synaptic(alpha=alpha, beta=beta, spike_grad=spike_grad), steps, make_current())


def test_alif_follows_its_equation_worked_in_numpy():
    alpha, beta, kappa, base = 0.9, 0.6, 0.7, 0.4
    cur = make_current().detach()
    spk, mem = ALIF(alpha, beta, kappa, base, surrogate.fast_sigmoid(5))(cur)
    i = cur.double().numpy()
    u, s, a, threshold = (np.zeros(i.shape[1:]) for _ in range(4))
    threshold = threshold + base
    for t in range(len(i)):
        u = beta * u + i[t] - s * threshold
        a = alpha * a + (1 - alpha) * s
        threshold = base + kappa * a
        s = (u > threshold).astype(float)
        np.testing.assert_allclose(mem[t].numpy(), u, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(spk[t].numpy(), s)
    assert 0.05 < spk.mean() < 0.95
    assert a.max() > 0.1, "no threshold moved"


def test_alif_without_adaptation_is_leaky():
    spike_grad = surrogate.fast_sigmoid(5)
    alif = ALIF(alpha=0.9, beta=0.5, kappa=0.0, threshold=0.6, spike_grad=spike_grad)
    compare_with_steps(alif, Leaky(beta=0.5, threshold=0.6, spike_grad=spike_grad), make_current())


def test_alif_fires_less_the_more_it_adapts():
    cur = torch.full((40, 1, 1), 1.5)
    rates = [ALIF(0.9, 0.5, kappa, 1.0)(cur)[0].mean().item() for kappa in (0.0, 1.0, 4.0)]
    assert rates[0] > rates[1] > rates[2] > 0


def test_alif_learns_through_its_adaptation():
    """A spike raises the threshold of later steps, so a later spike's gradient reaches an earlier current."""
    cur = torch.tensor([1.5, 0.0, 0.0, 0.7]).view(4, 1, 1).requires_grad_()
    gradients = []
    for kappa in (0.0, 2.0):
        spk, _ = ALIF(0.9, 0.0, kappa, 1.0, surrogate.fast_sigmoid(5))(cur)
        gradients.append(torch.autograd.grad(spk[3].sum(), cur)[0][0].item())
    assert gradients[0] == 0  # with beta = 0, only the adaptation remembers
    assert gradients[1] < 0


def test_layers_start_at_rest_every_time():
    for layer in (Leaky(beta=0.9), Synaptic(alpha=0.9, beta=0.9), ALIF(0.9, 0.9, 1.0)):
        cur = make_current().detach()
        assert torch.equal(layer(cur)[1], layer(cur)[1])


@pytest.mark.parametrize("model", MODELS)
def test_networks_map_frames_to_spikes_and_membranes(model):
    network = build_model(model, beta=0.5, threshold=1.0, alpha=0.9, dropout=0.2)
    for time_steps, batch in ((1, 3), (10, 2), (10, 1)):
        network.train(batch > 1)
        spk, mem = network(torch.rand(time_steps, batch, 2, 34, 34))
        assert spk.shape == mem.shape == (time_steps, batch, 10)
        assert set(spk.unique().tolist()) <= {0.0, 1.0}


def test_networks_have_the_neurons_that_the_readme_names():
    cnn, resnet = (build_model(model, 0.5, 1.0, 0.9, 0.2).neuron_layers() for model in MODELS)
    assert list(cnn) == ["lif1", "lif2", "lif3", "lif4", "lif_out"]
    assert list(resnet) == ["lif1", "res1_lif1", "res1_lif2", "res2_lif1", "res2_lif2", "fc_syn", "lif_out"]
    assert all(isinstance(layer, snn.Leaky) for layer in cnn.values())
    assert isinstance(resnet["lif1"], ALIF)
    assert isinstance(resnet["fc_syn"], snn.Synaptic)


@pytest.mark.parametrize("model", MODELS)
def test_silent_input_gives_no_spikes(model):
    network = build_model(model, 0.5, 1.0, 0.9, 0.2)
    for training in (True, False):
        network.train(training)
        with ActivityMeter(network) as meter:
            spk, mem = network(torch.zeros(10, 2, 2, 34, 34))
        assert spk.sum() == 0
        assert mem.abs().sum() == 0
        assert set(meter.firing_rate().values()) == {0.0}
        assert meter.synaptic_operations() == 0


@pytest.mark.parametrize("model", MODELS)
def test_gradients_reach_every_parameter_and_no_layer_is_silent_or_saturated(model):
    torch.manual_seed(0)
    network = build_model(model, 0.5, 1.0, 0.9, 0.2)
    frames = torch.poisson(torch.full((25, 8, 2, 34, 34), 0.05))
    with ActivityMeter(network) as meter:
        spk, _ = network(frames)
    torch.nn.functional.cross_entropy(spk.sum(0), torch.arange(8)).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    for name, rate in meter.firing_rate().items():
        assert 0.01 < rate < 0.6, f"{name} fires at {rate}"


@pytest.mark.parametrize("model", MODELS)
def test_recordings_of_a_batch_do_not_mix(model):
    torch.manual_seed(0)
    network = build_model(model, 0.5, 1.0, 0.9, 0.2).eval()
    frames = torch.poisson(torch.full((10, 4, 2, 34, 34), 0.2))
    _spk, mem = network(frames)
    for b in range(4):
        torch.testing.assert_close(network(frames[:, b : b + 1])[1][:, 0], mem[:, b], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_the_past_does_not_know_the_future(model):
    torch.manual_seed(0)
    network = build_model(model, 0.5, 1.0, 0.9, 0.2).eval()
    frames = torch.poisson(torch.full((12, 2, 2, 34, 34), 0.2))
    torch.testing.assert_close(network(frames)[1][:5], network(frames[:5])[1], rtol=1e-3, atol=1e-4)


def test_ties_are_broken_by_the_summed_membrane_potential():
    spk, mem = torch.zeros(2, 3, 10), torch.zeros(2, 3, 10)
    spk[0, 0, [4, 7]] = 1  # 4 and 7 fire once each, 7 has the larger potential
    mem[:, 0, 7] = 0.4
    mem[:, 0, 9] = 5.0  # a silent neuron is no candidate
    spk[:, 1, 8], spk[0, 1, 2] = 1, 1
    mem[0, 1, 2] = 9.0  # a potential outweighs no spike
    mem[0, 2] = -1.0  # nobody fires
    mem[0, 2, 3] = -0.5
    assert predict(spk, mem).tolist() == [7, 8, 3]
    # After the first step, 8 and 2 have one spike each, and 2 has the larger potential.
    assert predict_over_time(spk, mem)[:, 1].tolist() == [2, 8]


def count_connections(in_channels, out_channels, size, kernel, stride, padding):
    """Count, one by one, how many outputs of a convolution each input pixel reaches."""
    reached = np.zeros((in_channels, size, size))
    outputs = (size + 2 * padding - kernel) // stride + 1
    for oy in range(outputs):
        for ox in range(outputs):
            for ky in range(kernel):
                for kx in range(kernel):
                    y, x = oy * stride + ky - padding, ox * stride + kx - padding
                    if 0 <= y < size and 0 <= x < size:
                        reached[:, y, x] += out_channels
    return reached


@pytest.mark.parametrize(("size", "kernel", "stride", "padding"), [(5, 3, 1, 1), (7, 3, 2, 1), (6, 1, 2, 0)])
def test_fan_out_of_a_convolution_counted_one_by_one(size, kernel, stride, padding):
    layer = torch.nn.Conv2d(2, 3, kernel, stride, padding)
    expected = count_connections(2, 3, size, kernel, stride, padding)
    np.testing.assert_array_equal(fan_out(layer, torch.Size((2, size, size))).numpy(), expected)


def test_activity_of_the_cnn_counted_by_hand():
    torch.manual_seed(0)
    network = build_model("cnn", 0.5, 1.0, 0.9, 0.2).eval()
    frames = torch.poisson(torch.full((6, 3, 2, 34, 34), 0.3))
    with ActivityMeter(network) as meter:
        out, _ = network(frames)
        network(frames)
    spk1, _ = network.lif1(models.over_steps(frames, network.conv1, network.pool, network.norm1))
    spk2, _ = network.lif2(models.over_steps(spk1, network.conv2, network.pool, network.norm2))
    spk3, _ = network.lif3(models.over_steps(spk2, network.conv3, network.pool, network.norm3))
    spk4, _ = network.lif4(models.over_steps(spk3.flatten(2), network.fc1, network.norm4))
    rates = meter.firing_rate()
    for name, spk in {"lif1": spk1, "lif2": spk2, "lif3": spk3, "lif4": spk4, "lif_out": out}.items():
        assert rates[name] == pytest.approx(spk.mean().item(), rel=1e-5)
    reached = [count_connections(*shape, 3, 1, 1) for shape in ((2, 16, 34), (16, 32, 17), (32, 64, 8))]
    operations = sum((x.detach().numpy() * n).sum() for x, n in zip((frames, spk1, spk2), reached, strict=True))
    operations += spk3.sum().item() * 128 + spk4.sum().item() * 10
    assert meter.synaptic_operations() == pytest.approx(operations / 3, rel=1e-6)
    assert meter.macs() == 6 * (sum(int(n.sum()) for n in reached) + 1024 * 128 + 128 * 10)


@pytest.mark.parametrize("model", MODELS)
def test_measuring_activity_changes_nothing(model):
    network = build_model(model, 0.5, 1.0, 0.9, 0.2).eval()
    frames = torch.poisson(torch.full((5, 2, 2, 34, 34), 0.3))
    before = network(frames)[1]
    with ActivityMeter(network):
        during = network(frames)[1]
    assert torch.equal(before, during)
    assert torch.equal(before, network(frames)[1])
