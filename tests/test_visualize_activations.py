"""The figures of a trained network: what is drawn is what its layers did."""

import sys

import numpy as np
import pytest
import torch
from conftest import files_in, run
from PIL import Image

import nmnist
import train_nmnist
import utils
import visualize_activations
from models import load_network
from visualize_activations import LayerRecorder

LAYERS = {
    "cnn": ["lif1", "lif2", "lif3", "lif4", "lif_out"],
    "resnet": ["lif1", "res1.lif1", "res1.lif2", "res2.lif1", "res2.lif2", "fc_syn", "lif_out"],
}


@pytest.fixture(scope="module", params=["cnn", "resnet"])
def network_dir(request, tmp_path_factory, made_data_dir):
    """A folder with a network of either kind, trained for two epochs with 8 time steps: (model, folder).

    In float32, where what is drawn can be compared with thresholds exactly. In small batches, since after fewer steps
    a layer may still be silent.
    """
    folder = tmp_path_factory.mktemp(f"activations_{request.param}")
    folders = ["--data_dir", made_data_dir, "--save_dir", folder, "--log_dir", folder / "logs"]
    flags = ["--model", request.param, "--epochs", 2, "--time_steps", 8, "--batch_size", 8, "--val_split", 0.2]
    train_nmnist.main([str(part) for part in (*folders, *flags, "--device", "cpu", "--precision", "fp32")])
    return request.param, folder


def draw(network_dir, data_dir, *flags):
    model, folder = network_dir
    common = ["--model", model, "--save_dir", folder, "--data_dir", data_dir, "--device", "cpu"]
    visualize_activations.main([str(part) for part in (*common, *flags)])


def activity(network_dir, data_dir, sample):
    """Run the network on one test recording; return its layers' (spk, mem) [T, neurons], and the network."""
    model, folder = network_dir
    checkpoint = utils.load_checkpoint(folder / f"{model}_best.pt", model)
    network = load_network(checkpoint, torch.device("cpu")).eval()
    frames = nmnist.load_frames(nmnist.NMNIST(data_dir, "test"), 8)
    with torch.no_grad(), LayerRecorder(network) as layers:
        network(frames.batch(torch.tensor([sample]))[0])
    return {name: [x[:, 0].flatten(1) for x in values] for name, values in layers.items()}, network


def test_all_figures_are_written(network_dir, made_data_dir, tmp_path, capsys):
    model, folder = network_dir
    folders = ["--save_dir", folder, "--data_dir", made_data_dir, "--output_dir", tmp_path]
    flags = ["--model", model, "--visualize_all", "--time_steps", 9]
    if model == "cnn":  # as a user does; the other in this process, which starts faster
        result = run(sys.executable, "visualize_activations.py", *flags, *folders)
        assert result.returncode == 0, result.stderr
        output = result.stdout
    else:
        visualize_activations.main([str(part) for part in (*flags, *folders)])
        output = capsys.readouterr().out
    assert "--time_steps 9 is ignored: the network was trained with 8" in output
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
    draw(network_dir, made_data_dir, "--visualize_all", "--sample", 11, "--num_neurons", 64)
    layers, _ = activity(network_dir, made_data_dir, 11)
    assert list(layers) == LAYERS[network_dir[0]]
    for name, (spk, _) in layers.items():
        axis = figures[f"spike_pattern_{name}.png"].axes[0]
        drawn = len(axis.collections[0].get_offsets())
        shown = min(64, spk.shape[1])
        assert drawn == int(spk.sum(0).sort(descending=True).values[:shown].sum())
        assert f"{spk.mean():.3f}" in axis.get_title()
        assert ("most active" in axis.get_title()) == (spk.shape[1] > 64)
        assert axis.get_xlabel() == "time step"


def test_spikes_are_marked_where_membranes_exceed_their_thresholds(network_dir, made_data_dir, figures):
    draw(network_dir, made_data_dir, "--visualize_all")
    for name in LAYERS[network_dir[0]][:-1]:
        for axis in figures[f"membrane_potential_{name}.png"].axes:
            membrane, threshold, spikes = axis.lines
            above = np.flatnonzero(membrane.get_ydata() > threshold.get_ydata())
            assert spikes.get_xdata().tolist() == above.tolist()
    moving = [line.get_ydata() for line in figures["membrane_potential_lif1.png"].axes[0].lines][1]
    assert (np.ptp(moving) > 0) == (network_dir[0] == "resnet")  # ALIF's threshold moves, LIF's does not


def test_the_output_figure_names_every_trace_and_highlights_the_correct_one(network_dir, made_data_dir, figures):
    draw(network_dir, made_data_dir, "--sample", 29)  # the last test recording: a 9
    axis = figures["membrane_potential_lif_out.png"].axes[0]
    assert sorted(text.get_text() for text in axis.texts) == [str(digit) for digit in range(10)]
    assert [text.get_text() for text in axis.texts if text.get_weight() == "bold"] == ["9"]
    layers, _ = activity(network_dir, made_data_dir, 29)
    front = max((line for line in axis.lines if len(line.get_xdata()) == 8), key=lambda line: line.get_linewidth())
    np.testing.assert_allclose(front.get_ydata(), layers["lif_out"][1][:, 9], rtol=1e-5)
    assert "a 9, read as" in axis.get_title()


def test_tsne_and_firing_rates_cover_the_test_recordings(network_dir, made_data_dir, figures):
    draw(network_dir, made_data_dir, "--visualize_all", "--tsne_samples", 20)
    axis = figures["tsne_features.png"].axes[0]
    clouds = {cloud.get_label(): len(cloud.get_offsets()) for cloud in axis.collections}
    assert sum(clouds[str(digit)] for digit in range(10)) == 20
    assert "20 test recordings" in axis.get_title()
    over_time, means = figures["firing_rates.png"].axes
    assert [line.get_label() for line in over_time.lines] == LAYERS[network_dir[0]]
    spikes = [activity(network_dir, made_data_dir, sample)[0]["lif1"][0].mean(1) for sample in range(30)]
    np.testing.assert_allclose(over_time.lines[0].get_ydata(), torch.stack(spikes).mean(0), rtol=1e-4)
    assert f"{torch.stack(spikes).mean():.3f}" in means.texts[0].get_text()


def test_a_silent_layer_gets_a_message_instead_of_a_tsne(figures, capsys, tmp_path):
    labels = torch.arange(10)
    visualize_activations.plot_tsne(torch.zeros(10, 4), labels, labels, 0, "heading", "lif4", tmp_path / "tsne.png")
    assert not figures
    assert "lif4 answers every recording alike" in capsys.readouterr().err


def test_missing_checkpoints_recordings_and_folders_are_refused(network_dir, made_data_dir, tmp_path):
    model, folder = network_dir
    flags = ["--model", model, "--data_dir", str(made_data_dir)]
    with pytest.raises(utils.UserError, match=rf"{model}_best\.pt: .*`python train_nmnist.py --model {model}`"):
        visualize_activations.main([*flags, "--save_dir", str(tmp_path)])
    with pytest.raises(utils.UserError, match="--sample 30: there are 30 test recordings"):
        visualize_activations.main([*flags, "--save_dir", str(folder), "--sample", "30", "--output_dir", str(tmp_path)])
    (tmp_path / "file").touch()
    with pytest.raises(utils.UserError, match=r"--output_dir .*file is not a folder"):
        visualize_activations.main([*flags, "--save_dir", str(folder), "--output_dir", str(tmp_path / "file")])
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_checkpoint_without_its_network_is_refused(network_dir, made_data_dir, tmp_path):
    model, folder = network_dir
    checkpoint = utils.load_checkpoint(folder / f"{model}_best.pt", model)
    utils.save_tensors(tmp_path / f"{model}_best.pt", checkpoint | {"network": {}})
    flags = ["--model", model, "--data_dir", str(made_data_dir), "--output_dir", str(tmp_path / "figures")]
    with pytest.raises(utils.UserError, match=rf"{model}_best\.pt does not hold the network it names"):
        visualize_activations.main([*flags, "--save_dir", str(tmp_path)])
    assert not (tmp_path / "figures").exists()
