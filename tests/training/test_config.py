"""Options in a file: the same as on the command line, which wins; anything else is refused by name."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support.program import assert_same, said, without_times

from ela_kernels.__main__ import main
from ela_kernels.training import config
from ela_kernels.training.arguments import check_numbers, make_options
from ela_kernels.training.checkpoint import load_checkpoint
from ela_kernels.training.parser import make_parser

DIGITS = "--side 8 --batch-size 400 --model resnet20 --threads 1 --epochs 1"


class _Images:
    def __init__(self) -> None:
        self.classes, self.train = ["a", "b"], range(8)


def options_of(found: dict[str, Any]) -> None:
    """What a run looks at before it reads any image."""
    arguments = argparse.Namespace(**found)
    check_numbers(arguments)
    make_options(arguments, _Images())


def parsed(path: Path, content: Any, more: str = "") -> dict[str, Any]:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return vars(config.parse(["--config", str(path), *more.split()]))


def test_a_file_stands_for_a_command_line(tmp_path: Path) -> None:
    content = {
        "batch-size": 32,
        "label_smoothing": 0,
        "lr": 1,
        "data-dir": "some/where",
        "model-ema": True,
        "augment": False,
        "ebqm": ["warmup=3", "low=0.1"],
        "auto-augment": "ra",
        "image-size": 40,
    }
    found = parsed(tmp_path / "a.json", content)
    line = (
        "--batch-size 32 --label-smoothing 0 --lr 1 --data-dir some/where --model-ema --no-augment"
    )
    line += " --ebqm warmup=3 low=0.1 --auto-augment ra --image-size 40"
    expected = vars(make_parser().parse_args(line.split()))
    del found["config"], expected["config"]
    assert found == expected
    assert {name: type(value) for name, value in found.items()} == {
        name: type(value) for name, value in expected.items()
    }


def test_the_command_line_wins(tmp_path: Path) -> None:
    content = {"batch_size": 32, "model_ema": True, "augment": False, "ebqm": ["low=0.1"], "lr": 1}
    more = "--batch-size 64 --no-model-ema --augment --ebqm high=0.2"
    found = parsed(tmp_path / "a.json", content, more)
    assert (found["batch_size"], found["model_ema"], found["augment"]) == (64, False, True)
    assert (found["ebqm"], found["lr"]) == (["high=0.2"], 1.0)


@pytest.mark.parametrize(
    ("content", "more", "gone"),
    [
        ({"model_ema": True, "model_ema_decay": 0.9}, "--no-model-ema", ["model_ema_decay"]),
        ({"model-ema": True, "model-ema-steps": 2}, "--no-model-ema", ["model_ema_steps"]),
        ({"auto-augment": "ra", "ra-magnitude": 3}, "--auto-augment ta_wide", ["ra_magnitude"]),
        (
            {"schedule": "cosine", "lr-warmup-epochs": 5, "lr-warmup-decay": 0.1},
            "--lr-warmup-epochs 0",
            ["lr_warmup_decay"],
        ),
        ({"data": "folder", "data_dir": "a"}, "--data digits", ["data_dir"]),
        ({"ebqm": ["low=0.1"]}, "--no-ebqm", ["ebqm"]),
        ({"ebqm": ["low=0.1"]}, "--attention mrla", ["ebqm"]),
        ({"no_ebqm": True}, "--ebqm low=0.1", ["no_ebqm"]),
        # What still goes together stays.
        ({"model_ema": True, "model_ema_decay": 0.9}, "--model-ema", []),
        ({"auto-augment": "ra", "ra-magnitude": 3}, "--auto-augment ra --lr 1", []),
        ({"ebqm": ["low=0.1"]}, "--attention ela", []),
    ],
)
def test_what_goes_with_something_else_goes_with_it(
    tmp_path: Path, content: dict[str, Any], more: str, gone: list[str]
) -> None:
    found = parsed(tmp_path / "a.json", content, more)
    options_of(found)
    usual = vars(make_parser().parse_args([]))
    for key, value in content.items():
        name = key.replace("-", "_")
        if name in gone:
            assert found[name] == usual[name]
        elif name.replace("_", "-") not in more:
            assert found[name] == value


def test_what_the_command_line_gives_itself_is_refused_as_ever(tmp_path: Path) -> None:
    for content, more in (
        ({"model_ema": True}, "--no-model-ema --model-ema-decay 0.9"),
        ({"no_ebqm": True}, "--no-ebqm --ebqm low=0.1"),
        ({"model_ema_decay": 0.9}, "--lr 1"),
    ):
        found = parsed(tmp_path / "a.json", content, more)
        with pytest.raises(ValueError, match=r"allowed is (it with that|one of them)"):
            options_of(found)


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", 10**400), ("weight-decay", -(10**400))],
    ids=["lr", "weight-decay"],
)
def test_an_int_beyond_all_floats(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, value: int
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({name: value, "side": 8, "model": "resnet20"}))
    assert main(["train", "--config", str(path), "--out", str(tmp_path / "out")]) == 2
    infinite = "inf" if value > 0 else "-inf"
    assert said(capsys).startswith(f"error: {name}: got {infinite}")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="no tomllib")
def test_toml(tmp_path: Path) -> None:
    text = '# a run\nbatch-size = 32\nlr = 0.1\nmodel_ema = true\ndata = "digits"\nebqm = ["low=0.1"]\n'
    found = parsed(tmp_path / "a.toml", text)
    assert (found["batch_size"], found["lr"], found["model_ema"]) == (32, 0.1, True)
    assert (found["data"], found["ebqm"]) == ("digits", ["low=0.1"])
    for text, message in (
        ("lr = ", "is no TOML: "),
        ("[optimisation]\nlr = 1\n", "has 'optimisation'; allowed are the options"),
        ("[lr]\nvalue = 1\n", "lr: got a dict of 1; allowed is a number"),
        ("lr = 1979-05-27\n", "lr: got a date; allowed is a number"),
    ):
        with pytest.raises(ValueError, match=message):
            parsed(tmp_path / "a.toml", text)


def test_toml_without_a_reader_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tomllib", None)
    with pytest.raises(ValueError, match=r"config: got .*a\.toml, and this Python has no reader"):
        parsed(tmp_path / "a.toml", "lr = 1\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"label-smoothin": 0.1}, "has 'label-smoothin'; .* did you mean 'label-smoothing'?"),
        ({"no-augment": True}, "has 'no-augment'; .* did you mean 'augment'"),
        ({"xyz": 0.1}, "has 'xyz'; allowed are the options by name: --help lists them"),
        ({"resume": True}, "has 'resume', which is for the command line alone"),
        ({"evaluate": "a"}, "has 'evaluate', which is for"),
        ({"dry-run": True}, "has 'dry-run', which is for"),
        ({"config": "a"}, "has 'config', which is for"),
        ({"help": True}, "has 'help'; allowed are the options"),
        ({"lr": 1, "l-r": 2}, "has 'l-r'"),
        ({"batch-size": 1, "batch_size": 2}, "has 'batch_size' more than once"),
        ({"side": 8, "image-size": 8}, "has 'image-size' more than once"),
        ('{"lr": 1, "lr": 2}', "is no JSON: it has 'lr' more than once"),
        ({"lr": "1"}, "lr: got '1'; allowed is a number"),
        ({"lr": True}, "lr: got True; allowed is a number"),
        ({"lr": None}, "lr: got None; allowed is a number"),
        ({"epochs": 1.0}, "epochs: got 1.0; allowed is an int"),
        ({"epochs": True}, "epochs: got True; allowed is an int"),
        ({"model_ema": 1}, "model_ema: got 1; allowed is true or false"),
        ({"no-ebqm": "yes"}, "no-ebqm: got 'yes'; allowed is true or false"),
        ({"ebqm": "low=0.1"}, "ebqm: got 'low=0.1'; allowed is a list of texts"),
        ({"ebqm": [0.1]}, "ebqm: got a list of 1; allowed is a list of texts"),
        ({"data-dir": 3}, "data-dir: got 3; allowed is a path"),
        ({"data": "mnist"}, "data: got 'mnist'; allowed are 'digits'"),
        ({"data": ["digits"]}, "data: got a list of 1; allowed is a text"),
        ([1], "holds a list of 1; allowed is one object of options"),
        ("", "is no JSON: "),
        ("[" * 100_000, "is no JSON: "),
    ],
)
def test_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^config: {tmp_path / 'a.json'}.*{message}"):
        parsed(tmp_path / "a.json", content)


def test_a_file_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for path, reason in (
        (tmp_path / "nowhere.json", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (tmp_path / "binary", "it is no text"),
    ):
        assert main(["train", "--config", str(path), "--out", str(tmp_path / "out")]) == 2
        assert said(capsys) == f"error: config: {path} cannot be read: {reason}"
    assert not (tmp_path / "out").exists()


def test_every_option_can_stand_in_a_file() -> None:
    parser = make_parser()
    names = {action.dest for action in parser.options.values()}
    assert names == vars(parser.parse_args([])).keys()


def test_the_help_says_no_none_and_no_false() -> None:
    text = make_parser().format_help()
    assert "None" not in text
    assert "False" not in text
    for group in ("data", "model", "attention", "EBQM", "optimisation", "variation", "output"):
        assert f"\n{group}:\n" in text


def test_a_run_repeats_from_its_own_file(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    more = f"{DIGITS} --attention ela --ebqm warmup=1 interval=1 --label-smoothing 0.1 --model-ema"
    assert main(["train", "--out", str(tmp_path / "x"), *more.split()]) == 0
    path = str(tmp_path / "x" / "config.json")
    assert main(["train", "--config", path, "--out", str(tmp_path / "y")]) == 0
    states = [without_times(load_checkpoint(tmp_path / n)) for n in ("x", "y")]
    assert_same(*states)
    files = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("x", "y")]
    assert [f.pop("out") for f in files] == [str(tmp_path / n) for n in ("x", "y")]
    assert files[0] == files[1]
    # It says where it is too: the same run goes on, and is not begun again.
    assert main(["train", "--config", path]) == 2
    assert main(["train", "--config", path, "--resume"]) == 0


def test_a_run_that_is_refused_leaves_the_file_before(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    assert main(["train", "--out", str(tmp_path), *DIGITS.split()]) == 0
    before = (tmp_path / "config.json").read_bytes()
    for more in ("--lr 0.5", "--lr 0.5 --resume"):
        assert main(["train", "--out", str(tmp_path), *DIGITS.split(), *more.split()]) == 2
        assert (tmp_path / "config.json").read_bytes() == before
