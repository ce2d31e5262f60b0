"""The README is a contract: its flags exist with the defaults it states, its commands are real."""

import argparse
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import benchmark
import matplotlib.pyplot as plt
import pytest
import torch
from conftest import ROOT, files_in, make_recordings, run

import nmnist
import train_nmnist
import utils
import visualize_activations
import visualize_nmnist
from models import NETWORKS, NetworkConfig, build_model

README = (ROOT / "README.md").read_text()
SCRIPTS = {
    "train_nmnist.py": train_nmnist,
    "nmnist.py": nmnist,
    "visualize_nmnist.py": visualize_nmnist,
    "visualize_activations.py": visualize_activations,
}
# Flags that are refused, besides the values of `test_every_flag_refuses_a_wrong_value`.
# fmt: off
REFUSED = {
    "train_nmnist.py": [
        "--beta 1.1", "--alpha 2", "--threshold 0", "--dropout 1", "--width 0", "--width 65",
        "--val_split 0", "--val_split 1", "--lr 0", "--lr inf", "--weight_decay inf",
        "--epochs 0", "--epochs 1.5", "--batch_size 0", f"--seed {2**32}", "--time_steps 1001",
        "--batch_size 1 --time_steps 1", "--resume --test_only", "--alpha 0.9 --model cnn",
        "--readout rate --no_spikes", "--learn_beta --no_spikes", "--beta 0.9 --no_spikes",
        "--threshold 2 --no_spikes", "--alpha 0.9 --no_spikes --model resnet",
    ],
    "nmnist.py": [
        "--time_steps 0", "--time_steps 1001", "--denoise 0", "--seed 1", f"--seed {2**32}",
    ],
    "visualize_nmnist.py": ["--num_samples 0", "--num_samples 101", "--digit 10"],
    "visualize_activations.py": ["--sample -1", "--tsne_samples 4"],
}
# fmt: on


def flags(parser) -> dict:
    """Return a parser's flags and their defaults."""
    actions = (action for action in parser._actions if action.dest != "help")
    return {action.option_strings[-1]: action.default for action in actions}


def shared_flags() -> set[str]:
    """Return the flags that several scripts take, which the README documents once for all."""
    parser = argparse.ArgumentParser()
    nmnist.add_data_flags(parser)
    nmnist.add_frame_flags(parser)
    utils.add_device_flags(parser)
    return set(flags(parser))


def tables_of_flags(heading: str) -> dict[str, str]:
    """Return the flags and defaults in the README's tables with this heading."""
    tables = README.split(f"| {heading} | default | meaning |\n")[1:]
    rows = "\n".join(table.split("\n\n")[0] for table in tables)
    return dict(re.findall(r"^\| `(--\w+)` \| ([^|]*) \|", rows, re.MULTILINE))


def commands() -> list[str]:
    """Return the python and torchrun commands in the README's code blocks, without comments."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
    start = r"(?:^|&& )(?:python|torchrun(?: --\S+=\S+)+)"
    return [found.strip() for found in re.findall(rf"{start} ([^#&\n]*)", blocks, re.MULTILINE)]


@pytest.mark.parametrize(
    "script", ["train_nmnist.py", "visualize_nmnist.py", "visualize_activations.py"]
)
def test_tables_of_flags_match_the_parsers(script):
    actual = flags(SCRIPTS[script].make_parser())
    trains = script == "train_nmnist.py"
    stated = tables_of_flags("flag" if trains else f"`{script}`")
    assert set(stated) == set(actual) - (set() if trains else shared_flags())
    for flag, text in stated.items():
        default = actual[flag]
        if flag == "--lr":
            assert text.strip("`") == str(train_nmnist.DEFAULT_LR["adam"])
        elif flag == "--device":
            assert (text, default) == ("`cuda` where there is one", None)
        elif flag == "--digit":
            assert (text, default) == ("all", None)
        elif flag == "--output_dir" and script == "visualize_activations.py":
            assert (text, default) == ("`./activations`", None)  # of a CNN
        else:
            expected = "off" if default is None or default is False else f"`{default}`"
            assert text == expected, flag


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_refuses_a_wrong_value(script, capsys):
    parser = SCRIPTS[script].make_parser()
    for action in parser._actions:
        is_text = action.type in (None, str, utils.file_path)
        if action.nargs == 0 or (is_text and not action.choices):
            continue  # a switch, or a path, which is checked where it is used
        for wrong in ("wrong", "-1", "nan"):
            with pytest.raises(SystemExit) as stop:
                parser.parse_args([f"{action.option_strings[-1]}={wrong}"])
            assert stop.value.code == 2
            assert f"error: argument {action.option_strings[-1]}: " in capsys.readouterr().err


@pytest.mark.parametrize(("script", "flags"), [(s, flags) for s in REFUSED for flags in REFUSED[s]])
def test_refused_flags_are_named_before_anything_is_read(script, flags, capsys, monkeypatch):
    monkeypatch.setattr(nmnist, "open_recordings", None)
    monkeypatch.setattr(utils, "load_checkpoint", None)
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script].main(flags.split())
    assert stop.value.code == 2
    assert f"error: argument {flags.split()[0]}: " in capsys.readouterr().err


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    script, *arguments = shlex.split(command)
    if script == "-c" or script == "mlp.py":
        return  # test_the_network_of_ones_own_runs_by_the_commands_below_it
    if script == "-m":
        assert arguments[:2] == ["pytest", "tests"]
    elif script == "tests/benchmark.py":
        benchmark.parse_args(arguments)
    else:
        SCRIPTS[script].make_parser().parse_args(arguments)


def test_there_are_commands():
    assert len(commands()) >= 8


def test_files_and_sizes_are_as_stated():
    for name in re.findall(r"^\| `(\w+\.(?:py|txt))` \|", README, re.MULTILINE):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"!\[[^]]*\]\(([^)]*)\)", README):
        assert (ROOT / name).is_file(), name
        assert (ROOT / name).stat().st_size < 300_000, name
    for name, network in NETWORKS.items():
        parameters = sum(p.numel() for p in build_model(NetworkConfig(model=name)).parameters())
        assert f"**{network.__name__}** ({parameters:,} parameters)" in README


def test_the_readme_is_short():
    words = [word for word in README.split() if any(map(str.isalnum, word))]  # no bars of tables
    assert len(words) <= 1_900


def test_the_top_level_holds_what_the_project_structure_says():
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    listed = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    top_level = {path.split("/")[0] for path in listed if not path.startswith(".")}
    files = {*SCRIPTS, "models.py", "utils.py", "requirements.txt", "README.md"}
    assert top_level == files | {"tests", "logs", "activations"}


def test_the_code_for_scripts_of_ones_own_runs_as_pasted(tmp_path, monkeypatch, capsys):
    """The data set and the trained network are like those that it names."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scripts = [block for block in blocks if "NETWORKS" not in block]
    for block in blocks:
        assert len([line for line in block.splitlines() if line]) <= 25
    make_recordings(tmp_path / "data", train=30)
    folders = [f"--{name}_dir={tmp_path}/{name}" for name in ("data", "log")]
    folders.append(f"--save_dir={tmp_path}/checkpoints")
    train_nmnist.main([*folders, "--epochs=1", "--time_steps=10"])
    monkeypatch.chdir(tmp_path)
    for script in scripts:
        exec(script, {})  # in this process, which starts faster
    assert re.search(r"^accuracy \d\.\d+\ndigit \d\n", capsys.readouterr().out, re.MULTILINE)


def test_the_network_of_ones_own_runs_by_the_commands_below_it(
    tmp_path, made_data_dir, monkeypatch, capsys
):
    """Trained, resumed with all its flags repeated, tested and drawn, as pasted."""
    (code,) = (x for x in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "NETWORKS" in x)
    (tmp_path / "mlp.py").write_text(code)
    train, test, draw = re.search(r"```bash\n(python mlp.*?)```", README, re.DOTALL)[1].splitlines()
    here = f"--data_dir {made_data_dir} --device cpu"
    train += f" --epochs 1 --time_steps 5 {here}"
    trained = run(sys.executable, *shlex.split(train)[1:], cwd=tmp_path, import_from=ROOT)
    assert trained.returncode == 0, trained.stderr
    layers = "lif1 (RSynaptic)"
    assert f"no kernel supports the neurons of {layers}: they run step by step" in trained.stderr
    # In this process, which starts faster.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(NETWORKS, "mlp", None)
    monkeypatch.setitem(train_nmnist.LOSSES, "margin", None)
    for command in (f"{train} --resume", f"{test} {here}"):
        monkeypatch.setattr(sys, "argv", shlex.split(command)[1:])
        with plt.rc_context():
            runpy.run_path("mlp.py", run_name="__main__")
    output = capsys.readouterr().out
    assert "nothing is left to train" in output
    accuracy = re.search("^accuracy .*", trained.stdout, re.MULTILINE)[0]
    assert output.count(f"{accuracy}\n") == 2
    _, _, code, *flags = shlex.split(f"{draw} {here}")  # python -c <code> <flags>
    monkeypatch.setattr(sys, "argv", ["-c", *flags])
    monkeypatch.syspath_prepend(tmp_path)
    with plt.rc_context():
        exec(code, {})
    names = {path.name for path in files_in(tmp_path)}
    assert {"mlp_best.pt", "mlp_samples.png", "spike_pattern_lif_out.png"} <= names
    assert "mlp_filters.png" not in names  # it has no conv1


def test_the_benchmark_runs(capsys):
    benchmark.benchmark_speed(
        benchmark.parse_args(["--rounds=1", "--batch_size=4", "--time_steps=3", "--device=cpu"])
    )
    assert re.search(r"training, times snnTorch's loop +\d", capsys.readouterr().out)
