"""Errors, flag types, seeds and files."""

import argparse
import os
import pickle
import platform
import random
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

import utils


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


@pytest.mark.parametrize(
    ("kind", "limits", "good", "bad"),
    [
        (int, {"low": 1}, ["1", "25"], ["0", "-3", "2.5", "x", ""]),
        (float, {"low": 0, "high": 1}, ["0", "1", "0.5"], ["-0.1", "1.1", "nan", "inf", "-inf"]),
        (float, {"low": 0, "high": 1, "open_low": True, "open_high": True}, ["0.1"], ["0", "1"]),
        (float, {"low": 0, "open_low": True}, ["1e-3"], ["0", "nan", "inf"]),
    ],
)
def test_number_accepts_its_range_only(kind, limits, good, bad):
    parse = utils.number(kind, **limits)
    assert [parse(text) for text in good] == [kind(text) for text in good]
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError):
            parse(text)


def test_seeds_give_streams_of_their_own():
    draws = {}
    for parts in ((0,), (1,), (0, 1), (1, 0), (0, 2)):
        utils.set_seed(*parts)
        draws[parts] = torch.rand(1).item()
        utils.set_seed(*parts)
        assert torch.rand(1).item() == draws[parts]
    assert len(set(draws.values())) == len(draws)


@pytest.mark.parametrize(("amx", "avx512_bf16", "expected"), [(0, 0, "fp32"), (0, 1, "bf16"), (1, 0, "bf16")])
def test_precision_is_what_the_processor_is_built_for(monkeypatch, amx, avx512_bf16, expected):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(amx))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(avx512_bf16))
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert utils.pick_precision("auto", cpu) == expected
    for name in ("bf16", "fp32"):
        assert utils.pick_precision(name, cpu) == name
    for capability, precision in (((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device, c=capability: c)
        assert utils.pick_precision("auto", cuda) == precision


class Exploit:
    """A pickle that would make a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_checkpoints_that_are_none_are_refused_and_never_run(tmp_path):
    marker = tmp_path / "marker"
    files = {"empty": b"", "text": b"hello", "evil": pickle.dumps(Exploit(marker))}
    for name, content in files.items():
        path = tmp_path / f"{name}.pt"
        path.write_bytes(content)
        with pytest.raises(utils.UserError, match=f"{name}.pt"):
            utils.load_checkpoint(path, "cnn")
    torch.save({"other": 1}, tmp_path / "other.pt")
    torch.save({"network_settings": Exploit(marker)}, tmp_path / "evil2.pt")
    for name in ("other", "evil2"):
        with pytest.raises(utils.UserError, match=f"{name}.pt"):
            utils.load_checkpoint(tmp_path / f"{name}.pt", "cnn")
    torch.save({"network_settings": {"model": "cnn"}}, tmp_path / "old.pt")
    with pytest.raises(utils.UserError, match=r"old\.pt was written by another version of this project"):
        utils.load_checkpoint(tmp_path / "old.pt", "cnn")
    with pytest.raises(utils.UserError, match=r"missing\.pt.*python train_nmnist.py --model cnn"):
        utils.load_checkpoint(tmp_path / "missing.pt", "cnn")
    assert not marker.exists()


def test_damaged_checkpoints_are_refused_or_whole(tmp_path):
    """Cut anywhere, or with any bit flipped, a checkpoint is refused, or what it holds is unchanged."""
    settings = {"model": "cnn", "beta": 0.5}
    whole = dict.fromkeys(utils.CHECKPOINT_KEYS, 1) | {"format": utils.CHECKPOINT_FORMAT, "network_settings": settings}
    whole["network"] = {"weight": torch.arange(100.0)}
    path = tmp_path / "cnn_last.pt"
    utils.save_tensors(path, whole)
    content = path.read_bytes()
    assert torch.equal(utils.load_checkpoint(path, "cnn")["network"]["weight"], torch.arange(100.0))
    rng = random.Random(0)
    damaged = [content[: rng.randrange(len(content))] for _ in range(200)]
    for _ in range(400):
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        damaged.append(bytes(flipped))
    refused = 0
    for bad in damaged:
        path.write_bytes(bad)
        try:
            loaded = utils.load_checkpoint(path, "cnn")
        except utils.UserError as error:
            assert str(path) in str(error)  # noqa: PT017
            refused += 1
        else:
            assert torch.equal(loaded.pop("network")["weight"], torch.arange(100.0))
            assert loaded == {name: value for name, value in whole.items() if name != "network"}
    assert refused > 250


def test_locks_are_held_by_one_and_given_back(tmp_path):
    folders = {"--save_dir": tmp_path / "a", "--log_dir": tmp_path / "a"}  # one folder by two flags is locked once
    with (
        utils.locked(folders, "cnn"),
        pytest.raises(utils.UserError, match=r"--save_dir .*a: another run of cnn"),
        utils.locked({"--save_dir": tmp_path / "a"}, "cnn", seconds=0),
    ):
        pass
    with utils.locked(folders, "cnn", seconds=0):
        pass


def test_files_left_over_by_a_killed_process_are_removed_and_no_others(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    host = platform.node()
    gone = [tmp_path / f".cnn_last.pt.{host}.{process.pid}.tmp.pt", tmp_path / f".NMNIST.{host}.{process.pid}.tmp"]
    alive = utils.temporary_beside(tmp_path / "cnn_last.pt")
    elsewhere = tmp_path / f".cnn_last.pt.other{host}.{process.pid}.tmp.pt"
    gone[1].mkdir()
    for path in (gone[0], gone[1] / "x.bin", alive, elsewhere):
        path.touch()
    utils.remove_left_over(tmp_path)
    assert set(tmp_path.iterdir()) == {alive, elsewhere}


def test_user_errors_are_one_line_and_status_1(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py"])

    def main():
        raise utils.UserError("x.bin is damaged")

    with pytest.raises(SystemExit) as stop:
        utils.run_script(main)
    assert stop.value.code == "script.py: error: x.bin is damaged"  # a text is printed, and the status is 1


def test_saved_figures_say_where_they_are(tmp_path, capsys):
    figure, axis = plt.subplots()
    axis.plot([1, 2])
    path = tmp_path / "new" / "figure.png"
    utils.save_figure(figure, path)
    assert plt.imread(path).shape[2] == 4
    assert str(path) in capsys.readouterr().out
    assert not plt.fignum_exists(figure.number)
