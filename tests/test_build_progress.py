"""What is said while something takes long."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from build_tools import progress

ROOT = Path(__file__).resolve().parents[1]


def test_lines_of_steps_are_told_and_the_rest_is_kept(tmp_path: Path) -> None:
    program = (
        "print('[1/2] 0.512 csrc/a b.cpp'); print('warning: x'); print('[2/2] 12.9 linked.so')"
    )
    told: list[str] = []
    status, printed = progress.follow([sys.executable, "-c", program], tmp_path, told.append)
    assert (status, printed) == (0, "warning: x\n")
    assert told == ["[1/2] csrc/a b.cpp, after 1 s", "[2/2] linked.so, after 13 s"]
    program = "import os, sys; print(os.environ['NINJA_STATUS']); sys.exit(3)"
    assert progress.follow([sys.executable, "-c", program], tmp_path) == (3, "[%f/%t] %e \n")


def test_a_long_silence_is_broken(tmp_path: Path) -> None:
    program = (
        "import time; time.sleep(0.5); print('[1/2] 0.5 a.cpp', flush=True); time.sleep(0.5);"
        "print('[2/2] 1.0 linked.so')"
    )
    told: list[str] = []
    command = [sys.executable, "-c", program]
    assert progress.follow(command, tmp_path, told.append, silence=0.2) == (0, "")
    first, last = told.index("[1/2] a.cpp, after 0 s"), told.index("[2/2] linked.so, after 1 s")
    assert first >= 1
    assert re.fullmatch(r"still compiling, after \d+ s", told[0])
    assert last > first + 1
    assert re.fullmatch(r"\[1/2\] still compiling, after \d+ s", told[first + 1])


def test_a_command_is_accompanied(capfd: pytest.CaptureFixture[str]) -> None:
    program = "import sys, time; time.sleep(0.5); print('its own', flush=True); sys.exit(3)"
    assert progress.accompany("sleeping", [sys.executable, "-c", program], silence=0.2) == 3
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "sleeping"
    assert lines[-1] == "its own"
    assert len(lines) >= 3
    assert all(re.fullmatch(r"still sleeping, after \d+ s", line) for line in lines[1:-1])


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_is_left_to_the_command() -> None:
    program = """
import signal, sys, time
signal.signal(signal.SIGINT, lambda *_: sys.exit(print("cleaned up")))
print("ready", flush=True)
time.sleep(100)
"""
    with subprocess.Popen(
        [sys.executable, "-m", "build_tools.progress", "waiting", sys.executable, "-c", program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        assert process.stdout.readline() == "ready\n"
        os.killpg(process.pid, signal.SIGINT)  # a terminal's Ctrl-C
        assert process.communicate() == ("cleaned up\n", "")
    assert process.returncode == 130
