"""Errors, flag types, seeds, norms of several processes, files and figures."""

import argparse
import copy
import errno
import os
import pickle
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import assert_refused, run
from torch import distributed

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


def test_each_seed_gives_its_own_random_numbers():
    draws = {}
    for parts in ((0,), (1,), (0, 1), (1, 0), (0, 2)):
        utils.set_seed(*parts)
        draws[parts] = torch.rand(1).item()
        utils.set_seed(*parts)
        assert torch.rand(1).item() == draws[parts]
    assert len(set(draws.values())) == len(draws)


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
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert utils.pick_precision("auto", cpu) == expected
    for name in ("bf16", "fp16", "fp32"):
        assert utils.pick_precision(name, cpu) == name
    for capability, precision in ((6.1, "fp32"), (7.0, "fp16"), (7.5, "fp16"), (8.0, "bf16"), (9.0, "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device, c=capability: divmod(c, 1))
        assert utils.pick_precision("auto", cuda) == precision


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert utils.pick_device("cuda") == torch.device("cuda", rank)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(utils.UserError, match=r"2 GPU\(s\) for more processes"):
        utils.pick_device("cuda")


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's list of features is Linux's")
def test_the_precision_of_this_cpu_is_that_of_the_kernels_list_of_features():
    flags = Path("/proc/cpuinfo").read_text().split()
    expected = "bf16" if {"amx_tile", "avx512_bf16"} & set(flags) else "fp32"
    assert utils.pick_precision("auto", torch.device("cpu")) == expected


@pytest.mark.parametrize("shape", [(12, 3, 4, 4), (12, 3)])
@pytest.mark.usefixtures("on_device")
def test_sync_batch_norm_of_one_process_equals_torchs(shape, device):
    backend = {"cpu": "gloo", "cuda": "nccl"}[device.type]
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        ours = (torch.nn.BatchNorm2d if len(shape) == 4 else torch.nn.BatchNorm1d)(3, momentum=0.2)
        torch.nn.init.uniform_(ours.weight)
        torch.nn.init.uniform_(ours.bias)
        torchs = copy.deepcopy(ours)
        utils.sync_batch_norm(ours)
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


@pytest.mark.parametrize(("size", "processes"), [(7, 3), (1, 2), (0, 2), (128, 4)])
def test_shards_are_consecutive_and_as_even_as_possible(size, processes, monkeypatch):
    monkeypatch.setattr(utils, "world_size", lambda: processes)
    shards = []
    for rank in range(processes):
        monkeypatch.setenv("RANK", str(rank))
        shards.append(range(size)[utils.shard(size)])
    assert [i for shard in shards for i in shard] == list(range(size))
    lengths = [len(shard) for shard in shards]
    assert max(lengths) - min(lengths) <= 1


class Exploit:
    """A pickle that would make a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_files_that_are_not_checkpoints_are_refused_and_never_run(tmp_path):
    marker = tmp_path / "marker"
    files = {"empty": b"", "text": b"hello", "evil": pickle.dumps(Exploit(marker))}
    for name, content in files.items():
        path = tmp_path / f"{name}.pt"
        path.write_bytes(content)
        with pytest.raises(utils.UserError, match=f"{name}.pt"):
            utils.load_checkpoint(path, "cnn")
    torch.save({"other": 1}, tmp_path / "other.pt")
    torch.save({"network": Exploit(marker)}, tmp_path / "evil2.pt")
    for name in ("other", "evil2"):
        with pytest.raises(utils.UserError, match=f"{name}.pt"):
            utils.load_checkpoint(tmp_path / f"{name}.pt", "cnn")
    torch.save({"network": {}, "format": utils.CHECKPOINT_FORMAT}, tmp_path / "parts.pt")
    with pytest.raises(utils.UserError, match=r"parts\.pt lacks parts of a checkpoint"):
        utils.load_checkpoint(tmp_path / "parts.pt", "cnn")
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(utils.UserError, match=r"folder\.pt is a folder, not a checkpoint"):
        utils.load_checkpoint(tmp_path / "folder.pt", "cnn")
    with pytest.raises(utils.UserError, match=r"missing\.pt.*python train_nmnist.py --model cnn"):
        utils.load_checkpoint(tmp_path / "missing.pt", "cnn")
    assert not marker.exists()


@pytest.mark.parametrize("number", [None, 2])
def test_checkpoints_of_older_formats_are_refused(tmp_path, number):
    """The content of a checkpoint before format 3; the first ones had no format."""
    settings = {"model": "cnn", "beta": 0.5, "threshold": 1.0, "alpha": 0.9, "dropout": 0.0, "precision": "fp32"}
    old = {"network_settings": settings, "settings": settings | {"time_steps": 25}, "dataset": "NMNIST"}
    old |= {"num_recordings": 120, "neuron_backend": "fused", "network": {"fc_out.weight": torch.zeros(10, 128)}}
    old |= {"epoch": 1, "score": [0.9, -0.1]} | ({} if number is None else {"format": number})
    path = tmp_path / "cnn_best.pt"
    torch.save(old, path)
    with pytest.raises(utils.UserError) as error:
        utils.load_checkpoint(path, "cnn")
    again = "make one with `python train_nmnist.py --model cnn`"
    assert str(error.value) == f"{path} was written by another version of this project: {again}"


def test_damaged_checkpoints_are_refused_or_unchanged(tmp_path):
    """Cut anywhere, or with any bit flipped, a checkpoint is refused, or what it holds is unchanged."""
    config = {"model": "cnn", "beta": 0.5}
    whole = dict.fromkeys(utils.CHECKPOINT_KEYS, 1) | {"format": utils.CHECKPOINT_FORMAT, "name": "cnn"}
    whole |= {
        "network_config": config,
        "network": {"weight": torch.arange(100.0)},
        "settings": {"lr": 1.0},
        "data": {"data set": "NMNIST"},
        "constants": {},
        "versions": {"torch": "2"},
    }
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


@pytest.fixture
def impatient(monkeypatch):
    """Make `utils.locked` give up at once where it waits a while for a process on its way out."""

    class Impatient(filelock.FileLock):
        def acquire(self, timeout=-1, **options):
            return super().acquire(min(timeout, 0), **options)

    monkeypatch.setattr(utils, "FileLock", Impatient)


HOLD = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); input()"


def test_a_lock_is_held_by_one_process_at_a_time(tmp_path, impatient):
    with utils.locked(tmp_path / "a", "cnn"):
        with pytest.raises(utils.UserError, match="busy"), utils.locked(tmp_path / "a", "cnn", "busy"):
            pass
        with utils.locked(tmp_path / "a", "resnet", "busy"), utils.locked(tmp_path / "b", "cnn", "busy"):
            pass  # another name, another folder
    with utils.locked(tmp_path / "a", "cnn", "busy"):
        pass


def test_a_killed_process_holds_no_lock(tmp_path, impatient):
    path = tmp_path / ".cnn.lock"
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], **options) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(utils.UserError, match="busy"), utils.locked(tmp_path, "cnn", "busy"):
            pass
        process.kill()
    with utils.locked(tmp_path, "cnn", "busy"):
        pass


def test_a_folder_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, capsys):
    def refuse(*_args, **_options):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(utils.FileLock, "acquire", refuse)
    with utils.locked(tmp_path, "cnn", "busy"):
        pass
    warning = f"WARNING: {tmp_path} can't be locked (No locks available): "
    assert capsys.readouterr().err == warning + "let no other process write to it\n"


def test_what_a_killed_process_left_half_written_is_replaced(tmp_path):
    target = tmp_path / "cnn_last.pt"
    hidden = utils.temporary_path(target)
    assert hidden.name.startswith(".")
    hidden.write_bytes(b"half" * 1000)
    utils.save_tensors(target, {"x": torch.arange(3)})
    assert utils.read_tensors(target)["x"].tolist() == [0, 1, 2]
    assert list(tmp_path.iterdir()) == [target]


def test_user_errors_are_one_line_and_status_1(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py"])

    def main():
        raise utils.UserError("x.bin is damaged")

    with pytest.raises(SystemExit) as stop:
        utils.run_script(main)
    assert stop.value.code == "script.py: error: x.bin is damaged"  # a text is printed, and the status is 1


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.25 GiB. GPU 0 has"),
            " (2.25 GiB more",
        ),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), ": choose"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), ": choose"),
        (MemoryError(), ": choose"),
        (None, " (4000000000000000 bytes more"),
    ],
)
def test_out_of_memory_ends_in_one_line(capsys, monkeypatch, error, asked):
    """Of the last case, torch's own error: a tensor that no machine holds."""
    monkeypatch.setattr(sys, "argv", ["script.py"])

    def main():
        if error:
            raise error
        torch.empty(10**15)

    with pytest.raises(SystemExit) as stop:
        utils.run_script(main)
    assert stop.value.code.startswith(f"script.py: error: not enough memory{asked}")
    assert stop.value.code.endswith("choose a smaller --batch_size or --time_steps")


def test_other_errors_are_not_taken_for_out_of_memory(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py"])

    def main():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        utils.run_script(main)


def test_save_figure_writes_prints_and_closes(tmp_path, capsys):
    figure, axis = plt.subplots()
    axis.plot([1, 2])
    path = tmp_path / "new" / "figure.png"
    utils.save_figure(figure, path)
    assert plt.imread(path).shape[2] == 4
    assert capsys.readouterr().out == f"figure      {path}\n"
    assert not plt.fignum_exists(figure.number)


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
    assert sorted(utils.mistakes_first(labels[:6], labels[:6], 20)) == [*range(6)]  # fewer than asked for


@pytest.mark.parametrize(
    ("kind", "limits", "bad"),
    [
        (float, {"low": 0, "open_low": True}, ["1e-46", "1e39", "-1e39"]),
        (int, {"low": 1}, ["100000000000000000000", "10000000000000000000000"]),
    ],
)
def test_numbers_that_32_bits_cannot_hold_are_refused(kind, limits, bad):
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"{text} is out of range: it must be"):
            utils.number(kind, **limits)(text)


def test_names_that_the_terminal_cannot_show_end_no_script(tmp_path):
    data_dir = tmp_path / "Ziffern für ☃"
    data_dir.mkdir()
    command = [sys.executable, "nmnist.py", "--data_dir", data_dir, "--simulate", data_dir / "ß.npz"]
    environments = (["PYTHONIOENCODING=ascii"], ["LC_ALL=POSIX", "PYTHONUTF8=0"])
    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(lambda environment: run("env", *environment, *command), environments):
            assert_refused(result, "--simulate", "can't be read as a .npz file")
