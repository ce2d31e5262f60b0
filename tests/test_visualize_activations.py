"""The figures of a trained network: what is drawn is what its layers did."""

import re
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import tonic
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
    """A hidden layer's has all neurons that fire, in the order of their first spikes."""
    draw(network_dir, made_data_dir, "--visualize_all", "--sample", 11)
    layers = activity(network_dir, made_data_dir, 11)
    assert list(layers) == LAYERS[network_dir[0]]
    for name, (spk, _) in layers.items():
        figure = figures[f"spike_pattern_{name}.png"]
        axis = figure.axes[1]
        trains = [tuple(1 + np.flatnonzero(train)) for train in spk.flatten(1).T]
        firing = [train for train in trains if train]
        if name == "lif_out":
            dots = axis.collections[0].get_offsets()
            steps, rows = np.asarray(dots).T.astype(int)
            drawn = [tuple(sorted(steps[rows == row])) for row in range(max(rows) + 1)]
            assert drawn == trains[: len(drawn)]
            assert sum(map(len, drawn)) == spk.sum()
        else:
            image = axis.images[0].get_array().data
            per_row = -(-len(firing) // 300)  # of which a row is the mean
            assert len(image) == -(-len(firing) // per_row)
            assert axis.images[0].get_extent() == [0.5, 8.5, per_row * len(image) + 0.5, 0.5]
            sizes = np.full(len(image), per_row)
            sizes[-1] = len(firing) - per_row * (len(image) - 1)
            np.testing.assert_allclose(sizes @ image, spk.flatten(1).sum(1), rtol=1e-5)
            firsts = np.array(sorted(train[0] for train in firing))
            for step in range(1, 9):  # rows above fire by this step, rows below do not yet
                fired = np.flatnonzero(image[:, :step].any(1))
                assert list(fired) == list(range(-(-(firsts <= step).sum() // per_row)))
            if per_row == 1:
                drawn = [tuple(1 + np.flatnonzero(row)) for row in image]
                assert sorted(drawn) == sorted(firing)
            assert f"{len(firing):,} of {len(trains):,} neurons fire" in figure.get_suptitle()
        assert f"{spk.mean():.3f}" in figure.get_suptitle()
        assert axis.get_xlabel() == "time step"


def test_the_events_stand_above_the_spikes_that_they_cause(network_dir, made_data_dir, figures):
    draw(network_dir, made_data_dir, "--sample", 11)
    events, label = nmnist.NMNIST(made_data_dir / "NMNIST" / "Test")[11]
    frames = tonic.transforms.ToFrame(sensor_size=(34, 34, 2), n_time_bins=8)(events)
    axis = figures["spike_pattern_lif_out.png"].axes[0]
    drawn = {line.get_label(): line.get_ydata() for line in axis.lines}
    for name, polarity in (("OFF events", 0), ("ON events", 1)):
        np.testing.assert_array_equal(drawn[name], frames[:, polarity].sum((1, 2)))
    assert (
        f"test recording 11: a {label}, read as"
        in figures["spike_pattern_lif_out.png"].get_suptitle()
    )


@pytest.mark.parametrize(("bin_by", "mean_ms"), [("time", 300), ("events", 300), ("time", 1200)])
def test_the_ends_of_saccades_and_ms_stand_over_time(bin_by, mean_ms):
    """Frames of 38.5 ms: 100 ms are 2.6 steps. Neither is known of equal event count or others."""
    time_axis = nmnist.time_axis(8, bin_by, first_saccade_only=False, mean_ms=mean_ms)
    known = (bin_by, mean_ms) == ("time", 300)
    figure, axes = utils.subplots((9, 5), 2, sharex=True)
    utils.show_time(axes, 8, time_axis)
    figure.draw_without_rendering()
    for axis in axes:
        marks = [line.get_xdata()[0] for line in axis.lines]
        # Step 1 is drawn from 0.5 to 1.5.
        expected = [0.5 + 100 / 38.5, 0.5 + 220 / 38.5] if known else []
        np.testing.assert_allclose(marks, expected)
    if known:
        (upper,) = axes[0].child_axes
        assert upper.get_xlabel() == "time (ms)"
        np.testing.assert_allclose(upper.get_xlim(), (0, 308))
    assert not axes[1].child_axes
    assert known or not axes[0].child_axes


def test_the_output_raster_highlights_the_true_digit(network_dir, made_data_dir, figures):
    draw(network_dir, made_data_dir, "--sample", 29)  # the last test recording: a 9
    dots = figures["spike_pattern_lif_out.png"].axes[1].collections[0]
    digits = np.asarray(dots.get_offsets())[:, 1]
    for digit, colour in zip(digits, dots.get_facecolors(), strict=True):
        assert to_hex(colour).upper() == (utils.GREEN if digit == 9 else utils.GREY)


def test_spikes_are_marked_where_membranes_exceed_thresholds(network_dir, made_data_dir, figures):
    """A trace is that of the neuron whose place stands beside it; the five are spread."""
    draw(network_dir, made_data_dir, "--visualize_all")
    layers = activity(network_dir, made_data_dir, 0)
    for name in LAYERS[network_dir[0]][:-1]:
        axes = figures[f"membrane_potential_{name}.png"].axes
        assert len(axes) == 5
        places = [re.findall(r"\d+", axis.get_title("left")) for axis in axes]
        assert len({channel for channel, *_ in places}) == 5
        assert len({tuple(place) for _, *place in places}) > 1 or len(places[0]) == 1
        for axis in axes:
            membrane, spikes, threshold, *ends = axis.lines
            expected = [0.5 + 100 / 38.5, 0.5 + 220 / 38.5]
            np.testing.assert_allclose([line.get_xdata()[0] for line in ends], expected)
            above = membrane.get_ydata() > threshold.get_ydata()
            assert spikes.get_xdata().tolist() == (1 + np.flatnonzero(above)).tolist()
            assert above.any()
            place = tuple(int(i) for i in re.findall(r"\d+", axis.get_title("left")))
            _, mem = layers[name]
            np.testing.assert_allclose(membrane.get_ydata(), mem[:, *place], rtol=1e-4, atol=1e-4)
    _, _, threshold, *_ = figures["membrane_potential_lif1.png"].axes[0].lines
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
    assert named["9, the true digit"].get_color() == utils.GREEN
    assert "a 9, read as" in figures["membrane_potential_lif_out.png"].get_suptitle()


def test_tsne_and_firing_rates_cover_the_test_recordings(network_dir, made_data_dir, figures):
    draw(network_dir, made_data_dir, "--visualize_all", "--tsne_samples", 20)
    axis = figures["tsne_features.png"].axes[0]
    clouds = {cloud.get_label(): len(cloud.get_offsets()) for cloud in axis.collections}
    assert sum(clouds[str(digit)] for digit in range(10)) == 20
    title = figures["tsne_features.png"].get_suptitle()
    assert "20 recordings" in title
    assert "% correct of 30 test recordings" in title
    (over_time,) = figures["firing_rates.png"].axes
    labels = [line.get_label() for line in over_time.lines]
    assert [label.split(",")[0] for label in labels[:-2]] == LAYERS[network_dir[0]]
    assert labels[-2] == "end of a saccade"
    activities = (activity(network_dir, made_data_dir, sample) for sample in range(30))
    rates = torch.stack([layers["lif1"][0].flatten(1).mean(1) for layers in activities])
    np.testing.assert_allclose(over_time.lines[0].get_ydata(), rates.mean(0), rtol=1e-4)
    assert list(over_time.lines[0].get_xdata()) == list(range(1, 9))
    assert labels[0] == f"lif1, mean {rates.mean():.3f}"


def test_figures_of_a_network_that_runs_otherwise_than_trained_say_so(
    network_dir, made_data_dir, figures, capsys
):
    draw(network_dir, made_data_dir, "--precision", "bf16", "--neuron_backend", "step")
    changes = "precision: bf16, was fp32; neuron_backend: step, was fused"
    assert f"runs otherwise than when trained: {changes}\n" in capsys.readouterr().err
    for figure in figures.values():
        assert f" ({changes}) on NMNIST, test recording 0" in figure.get_suptitle()
    figures.clear()
    draw(network_dir, made_data_dir)
    assert "WARNING" not in capsys.readouterr().err
    assert not any("was" in figure.get_suptitle() for figure in figures.values())


def test_a_silent_layer_gets_a_message_instead_of_a_tsne(
    network_dir, made_data_dir, tmp_path, figures, capsys
):
    """Its other figures say that no neuron fires."""
    model, folder = network_dir
    checkpoint = utils.load_checkpoint(folder / f"{model}_best.pt")
    silent = LAYERS[model][-2]
    checkpoint["network"][f"{silent}.neuron.threshold"] = torch.tensor(1e9)
    utils.save_tensors(tmp_path / f"{model}_best.pt", checkpoint)
    draw((model, tmp_path), made_data_dir, "--visualize_all")
    assert f"{silent} answers every recording alike" in capsys.readouterr().err
    assert "tsne_features.png" not in figures
    title = figures[f"spike_pattern_{silent}.png"].get_suptitle()
    assert "0 of 128 neurons fire; firing rate 0.000" in title
    assert not figures[f"spike_pattern_{silent}.png"].axes[1].images[0].get_array().any()
    title = figures[f"membrane_potential_{silent}.png"].get_suptitle()
    assert "5 of 128 neurons, none of which fires" in title


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
    assert f"{name} (TRAINED on NMNIST)" in figures["spike_pattern_lif_out.png"].get_suptitle()


def test_the_titles_of_figures_fit(network_dir, made_data_dir, tmp_path, figures):
    """The longest is that of a network drawn on recordings of a long name."""
    (tmp_path / "NMNIST").mkdir()
    for part in ("Train", "Test"):
        (tmp_path / "NMNIST" / part).symlink_to(made_data_dir / "NMNIST" / part)
    name = "a long name of recordings.npz"
    utils.write_json(tmp_path / "NMNIST" / "simulator.json", {"images": name})
    with matplotlib.rc_context(utils.STYLE):
        draw(network_dir, tmp_path, "--visualize_all", "--precision", "bf16")
        for figure in figures.values():
            figure.draw_without_rendering()
            (title,) = (x for x in figure.texts if x.get_text() == figure.get_suptitle())
            assert name in title.get_text()
            extent = title.get_window_extent()
            assert extent.x0 > 0
            assert extent.x1 < figure.bbox.width
            assert not any(axis.get_tightbbox().y1 > extent.y0 for axis in figure.axes)


def test_a_cnn_is_drawn_in_activations_and_others_in_a_folder_of_their_own(
    network_dir, made_data_dir
):
    draw(network_dir, made_data_dir)
    folder = Path("activations") if network_dir[0] == "cnn" else Path("activations/resnet")
    names = "spikes/spike_pattern_lif_out.png", "membrane/membrane_potential_lif_out.png"
    assert files_in(Path()) == {folder / name for name in names}
