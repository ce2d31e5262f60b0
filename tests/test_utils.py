"""Errors, flags, seeds, files, checkpoints and figures."""

import argparse
import os
import pickle
import random
import runpy
import subprocess
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import INLINE, ROOT, files_in, make_recordings, run

import nmnist
import train_nmnist
import utils
import visualize_activations
import visualize_nmnist

# --- Scripts and their flags ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (utils.UserError("x.bin is damaged"), 1, "error: x.bin is damaged"),
        (OSError(28, "Disk full", "a.pt"), 1, "error: [Errno 28] Disk full: 'a.pt'"),
        (KeyboardInterrupt("Repeat it."), 130, "interrupted. Repeat it."),
    ],
)
def test_user_errors_and_ctrl_c_end_a_script_in_one_line(error, status, line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["folder/script.py"])

    def main():
        raise error

    with matplotlib.rc_context(), pytest.raises(SystemExit) as stop:
        utils.run_script(main)
    code, message = stop.value.code, capsys.readouterr().err
    if isinstance(code, str):  # which Python prints, with status 1
        code, message = 1, code
    assert (code, message.strip()) == (status, f"script.py: {line}")


IMPORTS = """
import os, random, signal
import matplotlib, matplotlib.pyplot, numpy, seaborn, sklearn.manifold, snntorch, tonic, torch

def state():
    settings = matplotlib.rcParams
    names = {name: dict.__getitem__(settings, name) for name in settings}  # asks for no backend
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    torchs = torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed()
    torchs += torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    return names, dict(os.environ), handlers, torchs, os.getcwd(), random.getstate()

before = state()
import models, nmnist, train_nmnist, utils, visualize_activations, visualize_nmnist
for old, new in zip(before, state(), strict=True):
    assert old == new, (old, new)
"""


def test_scripts_start_in_a_cell_of_a_notebook(tmp_path):
    """They inherit its backend of matplotlib, whose package their environment may lack."""
    environment = {**os.environ, "MPLBACKEND": INLINE}
    names = "train_nmnist.py", "nmnist.py", "visualize_nmnist.py", "visualize_activations.py"
    started = {}
    for name in names:
        command = [sys.executable, ROOT / name, "--help"]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        started[name] = subprocess.Popen(command, env=environment, cwd=tmp_path, **pipes)
    for name, process in started.items():
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, (name, stderr)


def test_a_script_that_a_notebook_runs_leaves_its_backend_and_style(
    made_data_dir, monkeypatch, capsys
):
    """`%run visualize_nmnist.py` runs it in the notebook's own process."""
    flags = ["--data_dir", str(made_data_dir), "--num_samples", "1", "--output_dir", "figures"]
    monkeypatch.setattr(sys, "argv", ["visualize_nmnist.py", *flags])
    monkeypatch.chdir(made_data_dir.parent)
    with matplotlib.rc_context():
        matplotlib.use("svg")
        matplotlib.rcParams["font.size"] = 7
        before = dict(matplotlib.rcParams)
        runpy.run_path(str(ROOT / "visualize_nmnist.py"), run_name="__main__")
        assert dict(matplotlib.rcParams) == before
        assert matplotlib.get_backend() == "svg"
    matplotlib.use("Agg")
    assert "figure      figures/digits.png\n" in capsys.readouterr().out


def test_names_that_a_console_or_a_font_lacks_stop_neither_figure_nor_table(tmp_path):
    """A $, which starts a formula in matplotlib, does not either."""
    folder = make_recordings(tmp_path / "模型", train=1, test=1)
    utils.write_json(folder / "NMNIST" / "simulator.json", {"images": "$\\frac模$.npz"})
    for script in ("nmnist.py", "visualize_nmnist.py"):
        command = ["env", "PYTHONIOENCODING=cp1252", sys.executable, ROOT / script]
        result = run(*command, "--data_dir=模型", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert r"SimulatedNMNIST ($\frac\u6a21$.npz)" in result.stdout
        assert r"recordings in \u6a21\u578b" in result.stdout
    assert (tmp_path / "visualizations" / "digits.png").exists()


def test_the_home_folder_is_found_in_every_path(monkeypatch):
    """A shell replaces the ~ in `--save_dir ~/x`, but not in `--save_dir=~/x`."""
    monkeypatch.setenv("HOME", "/home/me")
    for script in (train_nmnist, nmnist, visualize_nmnist, visualize_activations):
        parser = script.make_parser()
        names = [name for name in vars(parser.parse_args([])) if name.endswith(("dir", "simulate"))]
        assert names
        args = parser.parse_args([f"--{name}=~/x" for name in names])
        assert {getattr(args, name) for name in names} == {"/home/me/x"}


def test_importing_the_modules_changes_nothing_outside_them(tmp_path):
    """Backend and style of figures, the environment, signal handlers, torch, files."""
    # In an environment of its own: this process, which has imported them, might hand a change on.
    environment = f"PYTHONPATH={ROOT}", f"HOME={tmp_path}/home", "MPLBACKEND=svg"
    python = ["env", "-i", *environment, sys.executable]
    (tmp_path / "here").mkdir()
    result = run(*python, "-c", IMPORTS, cwd=tmp_path / "here")
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize(
    ("kind", "limits", "good", "bad"),
    [
        (int, {"low": 1}, ["1", "25"], ["0", "-3", "2.5", "x", ""]),
        (float, {"low": 0, "high": 1}, ["0", "1", "0.5"], ["-0.1", "1.1", "nan", "inf", "-inf"]),
        (float, {"low": 0.001}, ["1e-3", "7e9"], ["0", "nan", "inf", "-1"]),
    ],
)
def test_number_accepts_its_range_only(kind, limits, good, bad):
    parse = utils.number(kind, **limits)
    assert [parse(text) for text in good] == [kind(text) for text in good]
    for text in bad:
        with pytest.raises((argparse.ArgumentTypeError, ValueError), match=text or "''"):
            parse(text)
    assert parse.__name__ == kind.__name__  # as argparse calls it


def test_the_names_of_flags_are_those_that_functions_add():
    def add_flags(parser):
        group = parser.add_argument_group("group")
        group.add_argument("--lr", type=float, default=0.1)
        group.add_argument("--no_spikes", action="store_true")

    def add_more(parser):
        parser.add_argument("--seed", nargs="+")

    assert utils.flag_names(add_flags, add_more) == ["lr", "no_spikes", "seed"]
    assert utils.flag_names() == []


# --- Seeds -------------------------------------------------------------------------------------


def test_each_seed_gives_its_own_random_numbers():
    draws = {}
    for parts in ((0,), (1,), (0, 1), (1, 0), (0, 0), (0, 2), (2**32 - 1,)):
        utils.set_seed(*parts)
        draws[parts] = torch.rand(1).item()
        utils.set_seed(*parts)
        assert torch.rand(1).item() == draws[parts]
    assert len(set(draws.values())) == len(draws)


def test_a_seed_is_that_of_all_generators():
    drawn = []
    for _ in range(2):
        utils.set_seed(3)
        drawn.append((torch.rand(1).item(), np.random.rand(), random.random()))  # noqa: NPY002
    assert drawn[0] == drawn[1]


# --- Files ----------------------------------------------------------------------------------------


def test_atomic_path_replaces_only_on_success(tmp_path):
    target = tmp_path / "folder" / "file.json"
    with utils.atomic_path(target) as temporary:
        assert temporary.parent == target.parent
        assert not target.exists()
        temporary.write_text("first")
    assert target.read_text() == "first"
    with pytest.raises(RuntimeError), utils.atomic_path(target) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "first"
    assert list(target.parent.iterdir()) == [target]
    os.umask(mask := os.umask(0))
    assert target.stat().st_mode & 0o777 == 0o666 & ~mask


def test_files_of_earlier_runs_get_the_first_number_that_is_free_for_all(tmp_path, capsys):
    best, last, other = (tmp_path / name for name in ("cnn_best.pt", "cnn_last.pt", "other.pt"))
    utils.keep_earlier_files(best, last)  # nothing to keep
    assert not list(tmp_path.iterdir())
    for path in (best, last, other, tmp_path / "cnn_last.1.pt"):
        path.write_text(path.name)
    utils.keep_earlier_files(best, last)
    names = ["cnn_best.2.pt", "cnn_last.1.pt", "cnn_last.2.pt", "other.pt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert (tmp_path / "cnn_best.2.pt").read_text() == "cnn_best.pt"
    assert (tmp_path / "cnn_last.1.pt").read_text() == "cnn_last.1.pt"
    assert f"cnn_best.pt kept as {tmp_path / 'cnn_best.2.pt'}\n" in capsys.readouterr().out


def test_a_folder_is_held_by_one_run_of_a_network(tmp_path):
    def hold(name, folder=tmp_path):
        return utils.hold_folders(name, save_dir=folder)

    with hold("cnn"):
        message = f"--save_dir {tmp_path}: in use by another run of cnn"
        with pytest.raises(utils.UserError, match=message), hold("cnn"):
            pass
        with hold("resnet"), hold("cnn", tmp_path / "b"):
            pass
    with hold("cnn"):
        pass


def test_folders_that_cannot_be_written_to_are_refused_by_name(tmp_path):
    with utils.hold_folders("cnn", save_dir=tmp_path, log_dir=tmp_path / "new" / "logs"):
        assert not files_in(tmp_path)  # but the locks
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for folder in (tmp_path / "file", tmp_path / "file" / "logs", tmp_path / "loop"):
        held = utils.hold_folders("cnn", save_dir=tmp_path, log_dir=folder)
        message = f"--log_dir {folder} can't be written to: "
        with pytest.raises(utils.UserError, match=message), held:
            pass


# --- Checkpoints ----------------------------------------------------------------------------------


class Exploit:
    """A pickle that would make a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_files_that_are_not_checkpoints_are_refused_by_name_and_never_run(tmp_path):
    marker, network = tmp_path / "marker", {"weight": torch.ones(2)}
    whole = {"format": utils.CHECKPOINT_FORMAT, "network": network}
    whole |= {"settings": {}, "history": [{"epoch": 1}], "data": {}, "versions": {}}
    contents = {
        "other": {"other": 1},
        "list": [1, 2],
        "exploit": whole | {"history": Exploit(marker)},
        "older": {"format": utils.CHECKPOINT_FORMAT - 1, "network": network},
        "newer": whole | {"format": utils.CHECKPOINT_FORMAT + 1},
        "nan": whole | {"network": {"weight": torch.tensor([0.0, torch.nan])}},
        "infinite": whole | {"network": {"weight": torch.tensor([0.0, -torch.inf])}},
    }
    for part in whole:
        contents[f"no_{part}"] = {name: value for name, value in whole.items() if name != part}
    for name, content in contents.items():
        torch.save(content, tmp_path / f"{name}.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Exploit(marker), 2))
    (tmp_path / "folder.pt").mkdir()
    for name in (*contents, "text", "pickle", "folder", "missing"):
        path = tmp_path / f"{name}.pt"
        with pytest.raises(utils.UserError) as error:
            utils.load_checkpoint(path)
        message = str(error.value)
        assert str(path) in message
        assert "\n" not in message
        assert f"train a network in {tmp_path}, or repeat its training command with" in message
        other_version = name in ("older", "newer", "other", "no_format")
        assert ("not a checkpoint of this version" in message) == other_version
        assert ("not finite" in message) == (name in ("nan", "infinite"))
    assert not marker.exists()


def test_checkpoints_that_are_cut_short_are_refused_by_name(tmp_path):
    path = tmp_path / "cnn_last.pt"
    whole = {"format": utils.CHECKPOINT_FORMAT, "network": {"weight": torch.arange(100.0)}}
    whole |= {"settings": {}, "history": [{"epoch": 1}], "data": {}, "versions": {}}
    utils.save_tensors(path, whole)
    content = path.read_bytes()
    assert torch.equal(utils.load_checkpoint(path)["network"]["weight"], torch.arange(100.0))
    for size in range(0, len(content), 17):
        path.write_bytes(content[:size])
        with pytest.raises(utils.UserError, match=str(path)):
            utils.load_checkpoint(path)


# --- Figures --------------------------------------------------------------------------------------


def test_save_figure_writes_and_prints(tmp_path, capsys):
    """Below a title; none is left open."""
    figure, axis = utils.subplots((4, 3))
    axis.plot([1, 2])
    path = tmp_path / "new" / "figure.png"
    utils.save_figure(figure, "A title", path)
    assert plt.imread(path).shape[2] == 4
    assert figure.get_suptitle() == "A title"
    assert capsys.readouterr().out == f"figure      {path}\n"
    assert plt.get_fignums() == []
    assert list(path.parent.iterdir()) == [path]


def test_mistakes_come_first_then_the_digits_in_turn():
    labels = np.repeat(np.arange(10), 5)
    correct = utils.mistakes_first(labels, labels, 20)
    assert labels[correct].tolist() == [*range(10), *range(10)]
    assert correct.tolist() == [*range(0, 50, 5), *range(1, 50, 5)]
    predictions = labels.copy()
    predictions[[0, 7, 49]] = 3, 4, 0
    chosen = utils.mistakes_first(labels, predictions, 20)
    assert chosen[:3].tolist() == [0, 7, 49]
    assert labels[chosen[3:]].tolist() == [*range(10), *range(7)]
    assert (labels[chosen[3:]] == predictions[chosen[3:]]).all()
    assert len(set(chosen)) == 20
    assert sorted(utils.mistakes_first(labels[:6], labels[:6], 20)) == [*range(6)]  # too few
