"""The neurons against snnTorch's own stepped by hand and against their equations; the networks; the activity."""

import copy

import benchmark
import numpy as np
import pytest
import snntorch as snn
import torch
from snntorch import surrogate
from torch import distributed

import models
from models import ALIF, ActivityMeter, Leaky, Synaptic, build_model, fan_out, predict, predict_over_time

MODELS = ["cnn", "resnet"]
SPIKE_GRAD = surrogate.fast_sigmoid(models.SURROGATE_SLOPE)
# Steps in whole blocks of the fused neurons, in single ones, and in both.
TIME_STEPS = [3, 10, 27]


def make_current(time_steps=30, batch=4, neurons=50):
    """Return a current that makes neurons fire often, and needs a gradient."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(time_steps, batch, neurons, generator=generator) * 0.8).requires_grad_()


def compare_with_steps(layer, reference, steps, cur):
    """Check spikes, membranes and gradients of a layer against `reference`, a neuron that `steps(cur)` steps by hand.

    The gradients are those of the current and of whatever both learn.
    """
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
    learned = dict(reference.named_parameters())
    assert learned.keys() == dict(layer.named_parameters()).keys()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, learned[name].grad, rtol=1e-4, atol=1e-3)


def step_by_hand(reference, states):
    """Return the loop of snnTorch's tutorials over `reference`, whose neurons hand on so many states."""

    def steps(cur):
        state, spks, mems = [torch.zeros_like(cur[0])] * states, [], []
        for step_cur in cur:
            spk, *state = reference(step_cur, *state)
            spks.append(spk)
            mems.append(state[-1])
        return torch.stack(spks), torch.stack(mems)

    return steps


@pytest.mark.parametrize("backend", models.BACKENDS)
@pytest.mark.parametrize("time_steps", TIME_STEPS)
@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize(("beta", "threshold"), [(0.0, 1.0), (0.5, 0.3), (0.95, 1.0)])
def test_leaky_equals_snntorch_stepped_by_hand(backend, time_steps, learn, beta, threshold):
    options = {"learn_beta": learn, "learn_threshold": learn}
    reference = snn.Leaky(beta=beta, threshold=threshold, spike_grad=SPIKE_GRAD, **options)
    layer = Leaky(beta, threshold, backend, **options)
    compare_with_steps(layer, reference, step_by_hand(reference, 1), make_current(time_steps))


@pytest.mark.parametrize("backend", models.BACKENDS)
@pytest.mark.parametrize("time_steps", TIME_STEPS)
@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.5), (0.5, 0.5), (0.9, 0.7)])
def test_synaptic_equals_snntorch_stepped_by_hand(backend, time_steps, learn, alpha, beta):
    options = {"learn_beta": learn, "learn_threshold": learn}
    reference = snn.Synaptic(alpha=alpha, beta=beta, spike_grad=SPIKE_GRAD, **options)
    layer = Synaptic(alpha, beta, 1.0, backend, **options)
    compare_with_steps(layer, reference, step_by_hand(reference, 2), make_current(time_steps))


@pytest.mark.parametrize("backend", models.BACKENDS)
def test_alif_follows_its_equation_worked_in_numpy(backend):
    alpha, beta, kappa, base = 0.9, 0.6, 0.7, 0.4
    cur = make_current().detach()
    spk, mem = ALIF(alpha, beta, kappa, base, backend)(cur)
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


@pytest.mark.parametrize("time_steps", TIME_STEPS)
@pytest.mark.parametrize("learn", [False, True])
def test_the_fused_alif_equals_the_stepped_one(time_steps, learn):
    fused, stepped = (ALIF(0.9, 0.6, 0.7, 0.4, backend, learn_threshold=learn) for backend in models.BACKENDS)
    compare_with_steps(fused, stepped, stepped, make_current(time_steps))


def test_alif_without_adaptation_is_leaky():
    leaky = Leaky(0.5, 0.6, "step")
    compare_with_steps(ALIF(0.9, 0.5, 0.0, 0.6), leaky, leaky, make_current())


def test_membranes_are_float32_inside_bfloat16():
    """A membrane that keeps 0.95 of itself and gets 0.001 a step stands still in bfloat16, long before 0.02."""
    cur = torch.full((200, 1, 1), 0.001, dtype=torch.bfloat16)
    for layer in (Leaky(0.95), Synaptic(0.0, 0.95), ALIF(0.9, 0.95, 0.5)):
        spk, mem = layer(cur)
        assert spk.dtype == mem.dtype == torch.bfloat16
        expected = float(cur[0]) / (1 - 0.95)
        assert float(mem[-1]) == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize("size", [8, 17, 34])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_pooling_equals_torchs(size, dtype):
    """Spikes, of which windows hold many equals, and numbers; odd sizes, whose last row and column no window holds."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(6, 5, size, size, generator=generator)
    for x in (numbers, (numbers > 0.8).float()):
        x = x.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        (same, pooled), expected = models.MaxPool("fused")(x), torch.nn.functional.max_pool2d(x, 2)
        assert torch.equal(same, x)
        assert torch.equal(pooled, expected)
        grad, grad_x = (torch.randn(y.shape, generator=generator).to(dtype) for y in (expected, x))
        assert torch.equal(*(torch.autograd.grad(y, x, grad, retain_graph=True)[0] for y in (pooled, expected)))
        # Both outputs in use: their gradients add up.
        ours, torchs = (
            torch.autograd.grad(outputs, x, (grad_x.clone(), grad))[0]
            for outputs in ((same, pooled), (x * 1, expected))
        )
        assert torch.equal(ours, torchs)


@pytest.mark.parametrize("size", [8, 17])
def test_a_fused_convolution_with_pooling_equals_torchs(size, monkeypatch):
    monkeypatch.setattr(models.FusedConvPool, "CACHED", 3 * size * size * 6 * 4)  # three frames a part
    torch.manual_seed(0)
    layer = models.ConvPool(4, 6, "fused")
    x = torch.randn(7, 4, size, size).contiguous(memory_format=torch.channels_last).requires_grad_()
    expected = torch.nn.functional.max_pool2d(torch.nn.functional.conv2d(x, layer.weight, padding=1), 2)
    pooled = layer(x)
    torch.testing.assert_close(pooled, expected)
    grad = torch.randn(expected.shape)
    for ours, torchs in zip(
        *(torch.autograd.grad(y, (x, layer.weight), grad) for y in (pooled, expected)), strict=True
    ):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_other_shapes_compile_nothing_anew(model):
    """Once a training and a test pass have run; T that is no multiple of the block has its own functions, once."""
    network = build_model(model, 0.5, 1.0, 0.9, 0.2)

    def run(time_steps, batch):
        network.train()
        network(torch.rand(time_steps, batch, 2, 34, 34))[0].sum().backward()
        network.eval()
        with torch.no_grad():
            network(torch.rand(time_steps, batch, 2, 34, 34))

    run(5, 3)
    run(11, 7)
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    assert before > 0
    for time_steps, batch in ((5, 2), (10, 9), (25, 4), (7, 5), (10, 21)):
        run(time_steps, batch)
    assert counters["unique_graphs"] == before


def test_without_a_compiler_the_same_runs_uncompiled_and_says_so(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no working C++ compiler\nand a long story")

    cur, layer = make_current(7), Leaky(0.5)
    expected = layer(cur)
    monkeypatch.setattr(models.Kernel, "compiler_error", None)
    monkeypatch.setattr(models.run_forward, "compiled", broken)
    for _ in range(2):
        assert all(torch.equal(*pair) for pair in zip(layer(cur), expected, strict=True))
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "uncompiled" in message
    assert "no working C++ compiler" in message
    network = build_model("cnn", 0.5, 1.0, 0.9, 0.2)
    assert models.describe_backend(network) == "fused, uncompiled"


@pytest.mark.parametrize("model", MODELS)
def test_precisions_and_backends_agree(model):
    """Backends to float32's rounding; bfloat16 in what the first layer fires, and in how much the others do: which
    spike of an untrained network falls where is chaos."""
    torch.manual_seed(0)
    first = build_model(model, 0.5, 1.0, 0.9, 0.0)
    frames = torch.poisson(torch.full((10, 8, 2, 34, 34), 0.2))
    mems, spikes, rates = {}, {}, {}
    for key in (("fp32", "fused"), ("fp32", "step"), ("bf16", "fused")):
        network = build_model(model, 0.5, 1.0, 0.9, 0.0, *key)
        network.load_state_dict(first.state_dict())
        with ActivityMeter(network) as meter, models.LayerRecorder(network) as layers:
            spk, mems[key] = network(frames)
        assert spk.dtype == mems[key].dtype == torch.float32
        spikes[key], rates[key] = layers["lif1"][0], meter.firing_rate()
    fused, step, bf16 = mems
    torch.testing.assert_close(mems[fused], mems[step], rtol=1e-3, atol=1e-3)
    assert (spikes[fused] != spikes[bf16]).float().mean() < 0.005
    for name, rate in rates[fused].items():
        assert rates[bf16][name] == pytest.approx(rate, rel=0.1), name


@pytest.mark.parametrize("model", MODELS)
def test_networks_equal_snntorchs_loop_over_the_same_layers(model):
    """The benchmark's competitor: every layer step by step, with snnTorch's own neurons."""
    torch.manual_seed(0)
    network = build_model(model, 0.5, 1.0, 0.9, 0.0)
    frames = torch.poisson(torch.full((11, 4, 2, 34, 34), 0.2))
    with torch.no_grad():
        for _ in range(40):  # the norms learn what to expect: without, all is silent
            network(frames)
        spk, mem = network.eval()(frames)
        expected_spk, expected_mem = benchmark.Loop(network)(frames)
    assert expected_spk.sum() > 0
    assert torch.equal(spk, expected_spk)
    torch.testing.assert_close(mem, expected_mem, rtol=1e-3, atol=1e-3)


def test_alif_fires_less_the_more_it_adapts():
    cur = torch.full((40, 1, 1), 1.5)
    rates = [ALIF(0.9, 0.5, kappa, 1.0)(cur)[0].mean().item() for kappa in (0.0, 1.0, 4.0)]
    assert rates[0] > rates[1] > rates[2] > 0


def test_alif_learns_through_its_adaptation():
    """A spike raises the threshold of later steps, so a later spike's gradient reaches an earlier current."""
    cur = torch.tensor([1.5, 0.0, 0.0, 0.7]).view(4, 1, 1).requires_grad_()
    gradients = []
    for kappa in (0.0, 2.0):
        spk, _ = ALIF(0.9, 0.0, kappa, 1.0)(cur)
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


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("model", MODELS)
def test_membranes_start_with_a_standard_deviation_of_about_a_threshold(model, beta):
    torch.manual_seed(0)
    network = build_model(model, beta, 1.0, 0.9, 0.0)
    with models.LayerRecorder(network) as layers, torch.no_grad():
        network(torch.poisson(torch.full((25, 8, 2, 34, 34), 0.05)))
    for name, (_spk, mem) in layers.items():
        assert 0.5 < float(mem.std()) < 2, name


@pytest.mark.parametrize("beta", [0.5, 0.9])
@pytest.mark.parametrize("model", MODELS)
def test_the_threshold_is_but_the_unit_of_the_membranes(model, beta):
    frames = torch.poisson(torch.full((25, 4, 2, 34, 34), 0.05), generator=torch.Generator().manual_seed(0))
    outputs = []
    for threshold in (1.0, 0.25):  # a power of 2 rounds nothing
        torch.manual_seed(0)
        with torch.no_grad():
            outputs.append(build_model(model, beta, threshold, 0.9, 0.0)(frames))
    (spk, mem), (spk_of_quarter, mem_of_quarter) = outputs
    assert spk.sum() > 0
    assert torch.equal(spk_of_quarter, spk)
    assert torch.equal(4 * mem_of_quarter, mem)


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


@pytest.mark.parametrize("shape", [(12, 3, 4, 4), (12, 3)])
def test_norms_over_processes_are_torchs_where_there_is_one(shape):
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        ours = (torch.nn.BatchNorm2d if len(shape) == 4 else torch.nn.BatchNorm1d)(3, momentum=0.2)
        torch.nn.init.uniform_(ours.weight)
        torch.nn.init.uniform_(ours.bias)
        torchs = copy.deepcopy(ours)
        models.synchronize_norms(ours)
        for training in (True, True, False):
            x = (3 + 2 * torch.randn(shape)).requires_grad_()
            results = []
            for norm in (ours, torchs):
                out = norm.train(training)(x)
                grads = torch.autograd.grad(out.square().mul(x.detach()).sum(), (x, norm.weight, norm.bias))
                results.append((out, *grads, *norm.buffers()))
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    finally:
        distributed.destroy_process_group()


def test_the_largest_summed_membrane_potential_decides():
    mem = torch.zeros(2, 3, 10)
    mem[0, 0, 4], mem[1, 0, 4], mem[:, 0, 7] = 2.0, -1.5, 0.4  # 0.5 and 0.8 in all
    mem[0, 1, 2], mem[1, 1, 8] = 0.3, 0.9
    mem[:, 2] = -1.0
    mem[:, 2, 3] = -0.5  # the least negative
    assert predict(mem).tolist() == [7, 8, 3]
    assert predict_over_time(mem).tolist() == [[4, 2, 3], [7, 8, 3]]


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
    spk1, _ = network.lif1(models.over_steps(frames, network.conv1, network.norm1))
    spk2, _ = network.lif2(models.over_steps(spk1, network.conv2, network.norm2))
    spk3, _ = network.lif3(models.over_steps(spk2, network.conv3, network.norm3))
    spk4, _ = network.lif4(models.over_steps(models.memory_order(spk3).flatten(2), network.fc1, network.norm4))
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
