"""The figures of recordings: what is drawn is what the recordings hold."""

import sys

import numpy as np
import pytest
from conftest import files_in, run
from matplotlib.colors import to_rgb
from PIL import Image

import nmnist
import utils
import visualize_nmnist


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path_factory, monkeypatch):
    """Start in an empty folder, in which scripts make their folders of figures."""
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))


def draw(data_dir, *flags):
    """Draw the recordings in a folder in this process."""
    visualize_nmnist.main([str(part) for part in ("--data_dir", data_dir, *flags)])


@pytest.fixture
def recordings(made_data_dir):
    """The 30 made-up test recordings."""
    return nmnist.NMNIST(made_data_dir / "NMNIST" / "Test")


def test_all_figures_are_written(tmp_path, made_data_dir, recordings, monkeypatch):
    """The script writes them, whatever backend of matplotlib the environment names."""
    monkeypatch.setenv("MPLBACKEND", "module://nowhere")
    flags = ["--num_samples", 4, "--time_steps", 10, "--split", "test", "--animate"]
    folders = ["--data_dir", made_data_dir, "--output_dir", tmp_path]
    result = run(sys.executable, "visualize_nmnist.py", *flags, *folders)
    assert result.returncode == 0, result.stderr
    (animation,) = tmp_path.glob("sample_*.gif")
    names = ("samples.png", "events_3d.png", "event_rate.png", "digits.png")
    figures = [tmp_path / name for name in names]
    assert files_in(tmp_path) == {*figures, animation}
    for path in (*figures, animation):
        kind = "animation" if path == animation else "figure"
        assert f"{kind:12}{path}\n" in result.stdout
        width, height = Image.open(path).size
        assert width >= 300
        assert height >= 300
    index = int(animation.stem.split("_")[1])
    events, _ = recordings[index]
    image = Image.open(animation)
    assert image.n_frames == -(-(events["t"][-1] + 1) // 5000)  # 5 ms each
    assert image.info["duration"] == 50  # so ten times slower than it was


def test_event_images_show_each_polarity_in_its_colour_on_white():
    frame = np.zeros((2, 3, 3))
    frame[0, 0, 0], frame[1, 2, 2], frame[1, 1, 1] = 4, 4, 2
    image = utils.event_image(frame, full=4)
    np.testing.assert_allclose(image[0, 0], to_rgb(utils.BLUE))
    np.testing.assert_allclose(image[2, 2], to_rgb(utils.ORANGE))
    np.testing.assert_allclose(image[1, 1], (1 + np.array(to_rgb(utils.ORANGE))) / 2)
    np.testing.assert_allclose(image[0, 1], 1)


@pytest.mark.parametrize(("time_steps", "columns"), [(5, 5), (25, 12)])
def test_samples_are_rows_of_frames(made_data_dir, figures, time_steps, columns):
    draw(made_data_dir, "--num_samples", 3, "--time_steps", time_steps)
    figure = figures["samples.png"]
    images = [axis for axis in figure.axes if axis.images]
    assert len(images) == 3 * columns
    digits = [int(axis.get_ylabel()) for axis in images if axis.get_ylabel()]
    assert len(digits) == 3
    assert digits == sorted(digits)
    times = [axis.get_title() for axis in images[:columns]]
    assert times[0].endswith(" ms")
    assert len(set(times)) == columns
    assert "NMNIST" in figure.get_suptitle()
    # The position of a made-up recording's blob tells its digit: the images of a row show it there.
    for row, digit in enumerate(digits):
        drawn = [axis.images[0] for axis in images[row * columns : (row + 1) * columns]]
        ink = sum(3 - image.get_array().sum(-1) for image in drawn)
        y, x = np.unravel_index(ink.argmax(), ink.shape)
        assert 8 + 14 * (digit // 5) <= y <= 11 + 14 * (digit // 5)
        assert 4 + 6 * (digit % 5) <= x <= 9 + 6 * (digit % 5)


def test_event_rates_sum_to_the_number_of_events(made_data_dir, figures):
    draw(made_data_dir, "--num_samples", 10, "--digit", 3)
    axis = figures["event_rate.png"].axes[0]
    curves = {line.get_label(): line for line in axis.lines if "mean" in str(line.get_label())}
    total = sum(curve.get_ydata().sum() * 5 for curve in curves.values())
    assert total == pytest.approx(400)  # events of each made-up recording
    assert axis.get_xlabel() == "time (ms)"
    assert {text.get_text() for text in axis.texts} == {"saccade 1", "saccade 2", "saccade 3"}


def test_the_3d_figure_shows_every_event_by_polarity(made_data_dir, recordings, figures):
    draw(made_data_dir, "--num_samples", 1, "--split", "test", "--seed", 3)
    axis = figures["events_3d.png"].axes[0]
    index = np.random.default_rng(3).permutation(30)[0]
    events, digit = recordings[index]
    on, off = (len(cloud._offsets3d[0]) for cloud in axis.collections)
    assert (on, off) == (int(events["p"].sum()), int((1 - events["p"]).sum()))
    # The box is wider than its axes.
    assert not any(cloud.get_clip_on() for cloud in axis.collections)
    title = figures["events_3d.png"].get_suptitle()
    assert f"digit {digit}, recording {index}, 400 events" in title
    labels = axis.get_xlabel(), axis.get_ylabel(), axis.get_zlabel()
    assert labels == ("time (ms)", "x (pixels)", "y (pixels)")


def test_mean_event_images_are_means(made_data_dir, recordings, figures):
    draw(made_data_dir, "--num_samples", 1, "--split", "test")
    panels = [axis for axis in figures["digits.png"].axes if axis.images]
    titles = [axis.get_title() for axis in panels]
    assert titles == [f"{digit}  (3 recordings)" for digit in range(10)]
    expected = np.zeros((34, 34))
    for index in np.flatnonzero(np.array(recordings.labels) == 7):
        events, _ = recordings[index]
        np.add.at(expected, (events["y"], events["x"]), 1 / 3)
    np.testing.assert_allclose(panels[7].images[0].get_array(), expected)


def test_one_digit_with_fewer_recordings_than_asked_for(made_data_dir, figures, capsys):
    draw(made_data_dir, "--num_samples", 10, "--digit", 6, "--split", "test")
    assert "only 3 test recordings of digit 6" in capsys.readouterr().out
    assert len([axis for axis in figures["digits.png"].axes if axis.images]) == 1
    labels = [axis.get_ylabel() for axis in figures["samples.png"].axes if axis.get_ylabel()]
    assert labels == ["6", "6", "6"]


def test_denoising_that_leaves_no_events_is_refused(tmp_path):
    events = np.zeros(2, nmnist.NMNIST.dtype)  # two, far apart: nothing but noise
    events["x"], events["y"], events["t"] = [2, 30], [2, 30], [100_000, 300_000]
    for folder in ("Train", "Test"):
        for digit in range(10):
            path = tmp_path / "NMNIST" / folder / str(digit) / "00001.bin"
            path.parent.mkdir(parents=True)
            nmnist.write_recording(path, events)
    message = r"00001\.bin has no events left: choose a longer --denoise"
    with pytest.raises(utils.UserError, match=message):
        draw(tmp_path, "--denoise", 1000, "--output_dir", tmp_path / "out")
