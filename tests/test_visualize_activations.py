"""The figures of a trained network: what is drawn is what its layers did."""

import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import files_in
from matplotlib.colors import to_hex
from PIL import Image

import nmnist
import train_nmnist
import utils
import visualize_activations
from models import ActivityMeter, restore_network

LAYERS = {
    "cnn": ["lif1", "lif2", "lif3", "lif4", "lif_out"],
    "resnet": ["lif1", "res1.lif1", "res1.lif2", "res2.lif1", "res2.lif2", "fc_syn", "lif_out"],
}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path_factory, monkeypatch):
    """Start in an empty folder, in which scripts make their folders of figures."""
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))


@pytest.fixture(scope="module", params=["cnn", "resnet"])
def network_dir(request, tmp_path_factory, made_data_dir):
    """A folder with a network of either kind, trained with 8 time steps: (model, folder).

    Two epochs in small batches, since after fewer steps a layer may still be silent; in float32, in
    which it is drawn, too, so that potentials can be compared with thresholds exactly.
    """
    folder = tmp_path_factory.mktemp(f"activations_{request.param}")
    flags = ["--model", request.param, "--epochs", 2, "--time_steps", 8, "--batch_size", 8]
    flags += ["--val_split", 0.2, "--device", "cpu", "--precision", "fp32"]
    folders = ["--data_dir", made_data_dir, "--save_dir", folder, "--log_dir", folder / "logs"]
    train_nmnist.main([str(part) for part in (*flags, *folders)])
    return request.param, folder


def draw(network_dir, data_dir, *flags):
    """Draw the network in a folder in this process."""
    model, folder = network_dir
    common = ["--model", model, "--save_dir", folder, "--data_dir", data_dir, "--device", "cpu"]
    visualize_activations.main([str(part) for part in (*common, *flags)])


def activity(network_dir, data_dir, sample):
    """Return what the layers do during one test recording, by name: (spk, mem), both [T, ...]."""
    model, folder = network_dir
    network = restore_network(utils.load_checkpoint(folder / f"{model}_best.pt"))
    frames = nmnist.load_frames(nmnist.NMNIST(data_dir / "NMNIST" / "Test"), 8)
    with torch.no_grad(), ActivityMeter(network) as meter:
        network(frames.batch(torch.tensor([sample]))[0])
    return {name: [x[:, 0] for x in out] for name, out in meter.outputs.items()}


def test_all_figures_are_written(network_dir, made_data_dir, tmp_path, monkeypatch, capsys):
    model, folder = network_dir
    folders = ["--save_dir", folder, "--data_dir", made_data_dir, "--output_dir", tmp_path]
    command = ["visualize_activations.py", "--model", model, "--visualize_all", *folders]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    monkeypatch.setenv("TORCHINDUCTOR_VEC_ISA_OK", "1")
    with plt.rc_context():
        utils.run_script(visualize_activations.main)
    output = capsys.readouterr().out
    expected = {f"spikes/spike_pattern_{layer}.png" for layer in LAYERS[model]}
    expected |= {f"membrane/membrane_potential_{layer}.png" for layer in LAYERS[model]}
    expected |= {"tsne/tsne_features.png", "firing_rates.png"}
    assert {str(path.relative_to(tmp_path)) for path in files_in(tmp_path)} == expected
    for name in expected:
        assert f"figure      {tmp_path / name}\n" in output
        width, height = Image.open(tmp_path / name).size
        assert width > 1000
        assert height > 500


def test_without_visualize_all_only_the_output_is_drawn(network_dir, made_data_dir, figures):
    draw(network_dir, made_data_dir)
    assert set(figures) == {"spike_pattern_lif_out.png", "membrane_potential_lif_out.png"}


def test_rasters_show_the_spikes_of_the_layers(network_dir, made_data_dir, figures):
    """Of a larger layer, those of neurons from the least to the most active."""
    draw(network_dir, made_data_dir, "--visualize_all", "--sample", 11, "--num_neurons", 64)
    layers = activity(network_dir, made_data_dir, 11)
    assert list(layers) == LAYERS[network_dir[0]]
    for name, (spk, _) in layers.items():
        axis = figures[f"spike_pattern_{name}.png"].axes[0]
        dots = axis.collections[0].get_offsets()
        steps, rows = np.asarray(dots).T.astype(int)
        drawn = [tuple(sorted(steps[rows == row])) for row in range(max(rows) + 1)]
        trains = [tuple(1 + np.flatnonzero(train)) for train in spk.flatten(1).T]
        if name == "lif_out":
            assert drawn == trains[: len(drawn)]
            assert sum(map(len, drawn)) == spk.sum()
        else:
            firing = sorted((train for train in trains if train), key=len)
            assert len(drawn) == min(64, len(firing))
            assert set(drawn) <= set(firing)
            counts = [len(train) for train in drawn]
            assert counts == sorted(counts)
            assert (counts[0], counts[-1]) == (len(firing[0]), len(firing[-1]))
            assert f"{len(drawn)} of {len(firing):,} that fire" in axis.get_title()
        assert f"{spk.mean():.3f}" in axis.get_title()
        assert axis.get_xlabel() == "time step"


def test_the_output_raster_highlights_the_true_digit(network_dir, made_data_dir, figures):
    draw(network_dir, made_data_dir, "--sample", 29)  # the last test recording: a 9
    dots = figures["spike_pattern_lif_out.png"].axes[0].collections[0]
    digits = np.asarray(dots.get_offsets())[:, 1]
    for digit, colour in zip(digits, dots.get_facecolors(), strict=True):
        assert to_hex(colour).upper() == (utils.ORANGE if digit == 9 else utils.BLUE)


def test_spikes_are_marked_where_membranes_exceed_thresholds(network_dir, made_data_dir, figures):
    """A trace is that of the neuron whose place stands beside it."""
    draw(network_dir, made_data_dir, "--visualize_all")
    layers = activity(network_dir, made_data_dir, 0)
    for name in LAYERS[network_dir[0]][:-1]:
        axes = figures[f"membrane_potential_{name}.png"].axes
        assert len(axes) == 5
        for axis in axes:
            membrane, threshold, spikes = axis.lines
            above = membrane.get_ydata() > threshold.get_ydata()
            assert spikes.get_xdata().tolist() == (1 + np.flatnonzero(above)).tolist()
            assert above.any()
            place = tuple(int(i) for i in axis.get_ylabel().split(", "))
            _, mem = layers[name]
            np.testing.assert_allclose(membrane.get_ydata(), mem[:, *place], rtol=1e-4, atol=1e-4)
    _, threshold, _ = figures["membrane_potential_lif1.png"].axes[0].lines
    moves = np.ptp(threshold.get_ydata()) > 0
    assert moves == (network_dir[0] == "resnet")  # ALIF's threshold moves, LIF's does not


def test_the_output_figure_shows_every_digit_and_highlights_the_true_one(
    network_dir, made_data_dir, figures
):
    draw(network_dir, made_data_dir, "--sample", 29)  # the last test recording: a 9
    axis = figures["membrane_potential_lif_out.png"].axes[0]
    _, mem = activity(network_dir, made_data_dir, 29)["lif_out"]
    traces = [line.get_ydata() for line in axis.lines if line.get_linestyle() == "-"]
    traces = np.stack([trace for trace in traces if len(trace) == 8])
    assert len(traces) == 10
    for digit in range(10):
        assert np.isclose(traces, mem[:, digit], rtol=1e-4, atol=1e-4).all(1).any()
    named = {line.get_label(): line for line in axis.lines}
    others = mem.mean(0)
    others[9] = -torch.inf
    strongest = int(others.argmax())
    for digit, name in ((9, "the true digit"), (strongest, "the strongest other")):
        trace = named[f"{digit}, {name}"]
        np.testing.assert_allclose(trace.get_ydata(), mem[:, digit], rtol=1e-4, atol=1e-4)
    assert named["9, the true digit"].get_color() == utils.ORANGE
    assert "a 9, read as" in axis.get_title()


def test_tsne_and_firing_rates_cover_the_test_recordings(network_dir, made_data_dir, figures):
    draw(network_dir, made_data_dir, "--visualize_all", "--tsne_samples", 20)
    axis = figures["tsne_features.png"].axes[0]
    clouds = {cloud.get_label(): len(cloud.get_offsets()) for cloud in axis.collections}
    assert sum(clouds[str(digit)] for digit in range(10)) == 20
    assert "20 test recordings" in axis.get_title()
    over_time, means = figures["firing_rates.png"].axes
    assert [line.get_label() for line in over_time.lines] == LAYERS[network_dir[0]]
    activities = (activity(network_dir, made_data_dir, sample) for sample in range(30))
    rates = torch.stack([layers["lif1"][0].flatten(1).mean(1) for layers in activities])
    np.testing.assert_allclose(over_time.lines[0].get_ydata(), rates.mean(0), rtol=1e-4)
    assert list(over_time.lines[0].get_xdata()) == list(range(1, 9))
    assert f"{rates.mean():.3f}" in means.texts[0].get_text()


def test_figures_of_a_network_that_runs_otherwise_than_trained_say_so(
    network_dir, made_data_dir, figures, capsys
):
    draw(network_dir, made_data_dir, "--precision", "bf16", "--neuron_backend", "step")
    changes = "precision: bf16, was fp32; neuron_backend: step, was fused"
    assert f"runs otherwise than when trained: {changes}\n" in capsys.readouterr().err
    for figure in figures.values():
        assert f" ({changes}) on NMNIST, test recording 0" in figure.axes[0].get_title()
    figures.clear()
    draw(network_dir, made_data_dir)
    assert "WARNING" not in capsys.readouterr().err
    assert not any("was" in figure.axes[0].get_title() for figure in figures.values())


def test_a_silent_layer_gets_a_message_instead_of_a_tsne(figures, capsys, tmp_path):
    labels, path = torch.arange(10), tmp_path / "tsne.png"
    spikes = torch.zeros(10, 4)
    visualize_activations.plot_tsne(spikes, labels, labels, 0, "heading", "lif4", path)
    assert not figures
    assert "lif4 answers every recording alike" in capsys.readouterr().err


def test_missing_checkpoints_recordings_and_folders_are_refused(
    network_dir, made_data_dir, tmp_path
):
    model, _ = network_dir
    output = ["--output_dir", tmp_path / "figures"]
    message = rf"no checkpoint at {tmp_path}/{model}_best\.pt: train a network in {tmp_path}, or"
    with pytest.raises(utils.UserError, match=message):
        draw((model, tmp_path), made_data_dir, *output)
    with pytest.raises(utils.UserError, match="--sample 30: the last test recording is 29"):
        draw(network_dir, made_data_dir, "--sample", 30, *output)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        draw(network_dir, made_data_dir, "--output_dir", tmp_path / "file")
    assert files_in(tmp_path) == {tmp_path / "file"}


def test_figures_on_other_recordings_than_trained_on_say_so(
    network_dir, made_data_dir, tmp_path, figures, capsys
):
    for part in ("Train", "Test"):
        (tmp_path / "NMNIST").mkdir(exist_ok=True)
        (tmp_path / "NMNIST" / part).symlink_to(made_data_dir / "NMNIST" / part)
    utils.write_json(tmp_path / "NMNIST" / "simulator.json", {"images": "letters.npz"})
    draw(network_dir, tmp_path)
    name = "SimulatedNMNIST (letters.npz)"
    assert f"{name} (TRAINED on NMNIST)" in capsys.readouterr().err
    title = figures["spike_pattern_lif_out.png"].axes[0].get_title()
    assert f"{name} (TRAINED on NMNIST)" in title
