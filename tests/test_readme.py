"""The README is a contract: its flags exist with the defaults it states, its commands are real."""

import re
import shlex
import sys

import benchmark
import pytest
import torch
from conftest import ROOT, make_recordings, run

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
DATA_FLAGS = {"--data_dir", "--dataset", *(f"--{name}" for name in nmnist.FRAME_FLAGS)}  # documented once for all
# Values that `test_every_flag_refuses_a_wrong_value` does not try.
OUTSIDE = {
    "train_nmnist.py": [
        *("--beta 1.1", "--alpha 2", "--threshold 0", "--dropout 1", "--val_split 0", "--val_split 1"),
        *("--lr 0", "--lr inf", "--epochs 0", "--epochs 1.5", "--batch_size 0", f"--seed {2**32}"),
        *("--batch_size 1 --time_steps 1", "--resume --test_only", "--alpha 0.9 --model cnn"),
        *("--no_spikes --readout rate", "--no_spikes --loss mse", "--no_spikes --learn_beta", "--no_spikes --beta 0.9"),
    ],
    "nmnist.py": ["--time_steps 0", "--time_steps 1001", "--denoise 0"],
    "visualize_nmnist.py": ["--num_samples 0", "--num_samples 101", "--digit 10"],
    "visualize_activations.py": ["--num_neurons 0", "--tsne_samples 4"],
}


def flags(parser):
    """Return a parser's flags and their defaults."""
    return {action.option_strings[-1]: action.default for action in parser._actions if action.dest != "help"}


def commands():
    """Return the python and torchrun commands in the README's code blocks, without comments."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
    return [
        match.strip()
        for match in re.findall(r"(?:^|&& )(?:python|torchrun(?: --\S+=\S+)+) ([^#&\n]*)", blocks, re.MULTILINE)
    ]


def table_of_flags(heading):
    """Return the flags and defaults in the README's table with this heading."""
    rows = README.split(f"| {heading} | default | meaning |\n")[1].split("\n\n")[0]
    return dict(re.findall(r"^\| `(--\w+)` \| ([^|]*) \|", rows, re.MULTILINE))


@pytest.mark.parametrize("script", ["train_nmnist.py", "visualize_nmnist.py", "visualize_activations.py"])
def test_tables_of_flags_match_the_parsers(script):
    actual = flags(SCRIPTS[script].make_parser())
    table = table_of_flags("flag" if script == "train_nmnist.py" else f"`{script}`")
    assert set(table) == set(actual) - (set() if script == "train_nmnist.py" else DATA_FLAGS)
    for flag, stated in table.items():
        default = actual[flag]
        if flag == "--lr":
            assert stated.strip("`") == str(train_nmnist.DEFAULT_LR["adam"])
        elif flag == "--device":
            assert stated == "`cuda` where there is one"
        elif flag == "--digit":
            assert (stated, default) == ("all", None)
        else:
            assert stated.strip("`") == ("off" if default is None or default is False else str(default)), flag


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_refuses_a_wrong_value(script, capsys):
    parser = SCRIPTS[script].make_parser()
    for action in parser._actions:
        if action.nargs == 0 or (action.type in (None, str) and not action.choices):
            continue  # a switch, or a path, which is checked where it is used
        for wrong in ("wrong", "-1", "nan"):
            with pytest.raises(SystemExit) as stop:
                parser.parse_args([f"{action.option_strings[-1]}={wrong}"])
            assert stop.value.code == 2
            assert f"error: argument {action.option_strings[-1]}: " in capsys.readouterr().err


@pytest.mark.parametrize(("script", "flags"), [(name, flags) for name in OUTSIDE for flags in OUTSIDE[name]])
def test_values_outside_their_limits_are_refused_before_anything_is_loaded(script, flags, capsys, monkeypatch):
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
    if script == "-m":
        assert arguments[:2] == ["pytest", "tests"]
        return
    if script == "tests/benchmark.py":
        benchmark.parse_args(arguments)
        return
    SCRIPTS[script].make_parser().parse_args(arguments)


def test_every_promise_names_tests_that_exist():
    promises = README.split("| promise | test |")[1].split("\n\n")[0]
    written = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for row in promises.splitlines()[2:]:
        names = re.findall(r"`(test_\w+)`", row)
        assert names, row
        for name in names:
            assert f"def {name}(" in written, name


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


def test_the_code_for_a_script_of_ones_own_runs_as_pasted(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 25
    make_recordings(tmp_path / "data")
    (tmp_path / "own.py").write_text(code)
    result = run(sys.executable, "own.py", cwd=tmp_path, import_from=ROOT)
    assert result.returncode == 0, result.stderr
    assert re.search(r"accuracy \d\.\d+\nLapicque torch.Size\(\[10, 30, 10\]\)", result.stdout)
