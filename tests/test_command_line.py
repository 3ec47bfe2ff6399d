"""What all commands share: help that fits a terminal, a word on what was meant, how they end."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ela_kernels
from ela_kernels.__main__ import COMMANDS, main
from ela_kernels.command_line import Parser, counted, either, ended, nearest

ROOT = Path(ela_kernels.__file__).resolve().parents[1]


def help_of(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *command: str
) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ending:
        main([*command, "--help"])
    assert ending.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_fits_a_terminal(
    command: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = help_of(capsys, monkeypatch, *command)
    usual, _, examples = text.partition("\nexamples:\n")
    assert max(map(len, usual.splitlines())) <= 80
    assert max(map(len, examples.splitlines())) <= 90  # a command line is not broken
    assert text.startswith(f"usage: python -m ela_kernels {' '.join(command)}".rstrip())
    assert "None" not in text
    assert "\N{NO-BREAK SPACE}" not in text
    assert f"python -m ela_kernels {' '.join(command)}" in examples
    # A default stands whole on its line.
    assert text.count("(default:") == len(re.findall(r"\(default: [^\s)]+\)", text))


def test_descriptions_stand_below_each_other(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_of(capsys, monkeypatch, "train")
    rows = [line for line in text.partition("\nexamples:")[0].splitlines() if line[:3] == "  -"]
    starts = {re.match(r"  \S.*?  +", row).end() for row in rows}  # type: ignore[union-attr]
    assert len(rows) > 40
    assert len(starts) == 1


def test_what_an_option_takes_and_what_it_is_by_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = " ".join(help_of(capsys, monkeypatch, "train").split())
    assert "--lr X learning rate, the highest of a schedule (default: 0.03)" in text
    assert "--amp NAME mixed precision: off, bf16 or fp16 (default: off)" in text
    assert "--[no-]augment crops, and flips but of digits (default: on)" in text
    assert "--[no-]compile train the network as torch.compile has it --seed" in text
    assert "--evaluate [PATH]" in text


def test_all_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{ela_kernels.__version__}\n"


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("trian", "did you mean train? Allowed are info, "), ("xyz", "allowed are info, bench")],
)
def test_a_wrong_command(wrong: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([wrong, "--out", "x"]) == 2
    assert f"error: command: got {wrong!r}; {meant}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("train --epocs 3", "--epocs is no option; did you mean --epochs?"),
        ("train --epocs=3", "--epocs is no option; did you mean --epochs?"),
        ("train --qqq 3", "--qqq is no option\n"),
        ("train somewhere", "got 'somewhere', which belongs to no option"),
        (
            "train --optimizer sdg",
            "--optimizer: got 'sdg'; did you mean sgd? Allowed are sgd, adamw",
        ),
        ("train --model x", "--model: got 'x'; allowed are resnet56, "),
        ("train --lr fast", "--lr: invalid float value: 'fast'"),
        ("info --jsn", "--jsn is no option; did you mean --json?"),
        ("bench --threads 0", "--threads: got 0; allowed is an int from 1"),
        (
            "bench --json nowhere/a.json",
            "--json: got nowhere/a.json; allowed is a file in a folder",
        ),
        ("analyze --batches 0", "--batches: got 0; allowed is an int of at least 1"),
        ("explain --device gpu", "--device: got 'gpu'; did you mean cpu? Allowed are auto, cpu, "),
    ],
)
def test_a_wrong_option(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        main(line.split())
    assert ending.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}")
    assert f"python -m ela_kernels {line.split()[0]} --help" in error


def test_names_of_a_list() -> None:
    assert either(["a"]) == "a"
    assert either(["a", "b", "c"]) == "a, b or c"
    assert nearest("traim", ["train", "info"]) == "train"
    assert nearest("xyz", ["train"]) is None
    assert counted(1, "step") == "1 step"
    assert counted(2000, "step") == "2,000 steps"
    assert counted(0, "process", "processes") == "0 processes"


def test_a_parser_keeps_types_and_choices() -> None:
    parser = Parser("x", "A command.")
    add = parser.group("options")
    add("--kind", choices={"a": 1, "b": 2}, default="a")
    add("--number", type=int)
    assert vars(parser.parse_args(["--number", "3"])) == {"kind": "a", "number": 3}
    assert list(parser.options["kind"].choices or ()) == ["a", "b"]
    assert parser.parse_args([], argparse.Namespace(kind="b")).kind == "b"


def run_with(output: int, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ela_kernels", *command],
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
    )


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
@pytest.mark.parametrize("command", [("info",), ("train", "--help")])
def test_nobody_reads_the_output(command: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = run_with(writing, *command)
    finally:
        os.close(writing)
    assert done.stderr == ""
    # Of help argparse does not tell that it could not be written.
    assert done.returncode in ((141,) if command == ("info",) else (0, 141))


def test_a_disk_that_takes_no_output() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with open("/dev/full", "w") as full:
        done = run_with(full.fileno(), "--version")
    assert done.returncode == 1
    assert done.stderr == "error: the output could not be written: No space left on device\n"


def test_ctrl_c_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    assert ended(interrupted) == 130
    assert capsys.readouterr().err == "\nStopped.\n"
    assert ended(lambda: 7) == 7
