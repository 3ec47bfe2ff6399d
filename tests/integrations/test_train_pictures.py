"""Whole runs of the training program on pictures, with the standard recipe: exact when interrupted."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support.image_files import publish, write_cifar10, write_folder
from support.program import assert_same, read_log, said, without_times

from ela_kernels.__main__ import main
from ela_kernels.training.checkpoint import load_checkpoint
from ela_kernels.training.loop import Trainer

for library in ("sklearn", "torchvision"):
    pytest.importorskip(library)

pytestmark = pytest.mark.integration

EBQM = "--ebqm warmup=4 interval=2 probe_interval=3 low=0.98 high=0.99 smoothing=0.5"
SMALL = f"--model resnet20 --threads 1 --drop-path 0.1 {EBQM}"
RECIPE = (
    "--mixup-alpha 0.2 --cutmix-alpha 1 --auto-augment ra --random-erase 0.3 --label-smoothing 0.1 --model-ema "
    "--schedule cosine --lr-warmup-epochs 1 --optimizer adamw --lr 0.002"
)


def train(out: Path, more: str, data: Path | None = None) -> int:
    where = [] if data is None else ["--data-dir", str(data)]
    return main(["train", "--out", str(out), *where, *more.split()])


def data_of(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write some; options for them, four steps an epoch."""
    if name == "folder":
        write_folder(folder, train=8, val=4)
        return "--data folder --side 16 --batch-size 4"
    write_cifar10(folder, each=4)
    publish(folder, monkeypatch)
    return "--data cifar10 --batch-size 5"


@pytest.mark.parametrize("name", ["folder", "cifar10"])
def test_a_run_goes_on_to_the_same_bits_with_any_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    data = tmp_path / "data"
    more = f"{data_of(name, data, monkeypatch)} {SMALL} {RECIPE} --epochs 3 --log-every 1"
    assert train(tmp_path / "whole", more, data) == 0

    step = Trainer._step

    def step_and_stop(self: Trainer, *args: Any) -> None:
        step(self, *args)
        if self.steps + 1 in stops:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "_step", step_and_stop)
    # In the middle of the warm-up, in the middle of the second epoch, and at its end.
    for stops, how in (
        ({2}, "--workers 2"),
        ({6}, "--resume"),
        ({8}, "--resume --workers 3"),
        (set[int](), "--resume --workers 1"),
    ):
        assert train(tmp_path / "parts", f"{more} {how}", data) == (130 if stops else 0)
    whole, parts = (without_times(load_checkpoint(tmp_path / n)) for n in ("whole", "parts"))
    assert any(whole["ebqm"]["skipped"])
    assert_same(whole, parts)
    for log, rows in (("log.csv", 3), ("steps.csv", 12)):
        logs = [read_log(tmp_path / n, log) for n in ("whole", "parts")]
        assert len(logs[0]) == rows
        for a, b in zip(*logs, strict=True):
            assert {**a, "seconds": ""} == {**b, "seconds": ""}


def test_columns_are_those_that_apply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two classes none is beyond the five likeliest."""
    for name, top in (("folder", []), ("cifar10", ["ema_accuracy_5", "test_accuracy_5"])):
        data = tmp_path / name
        more = f"{data_of(name, data, monkeypatch)} --model resnet20 --attention none --epochs 1"
        assert train(tmp_path / f"{name} out", f"{more} --model-ema", data) == 0
        row = read_log(tmp_path / f"{name} out")[0]
        assert sorted(n for n in row if n.endswith("_5")) == top
        assert "ema_accuracy" in row
        assert train(tmp_path / f"{name} plain", more, data) == 0
        assert not any(n.startswith("ema") for n in read_log(tmp_path / f"{name} plain")[0])


def test_a_folder_is_learnt(tmp_path: Path) -> None:
    write_folder(tmp_path, train=12, val=4)
    more = (
        "--data folder --side 16 --model resnet20 --attention mrla_light --epochs 4 --batch-size 8"
    )
    assert train(tmp_path / "out", f"{more} --threads 1", tmp_path) == 0
    # Dark and light images: anything that learns tells them apart in training.
    assert float(read_log(tmp_path / "out")[-1]["train_accuracy"]) > 0.7


def test_in_half_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = data_of("cifar10", tmp_path / "data", monkeypatch)
    more += " --model resnet20 --attention mrla --unfused --epochs 2 --threads 1 --amp bf16"
    assert train(tmp_path / "out", f"{more} {RECIPE}", tmp_path / "data") == 0
    assert read_log(tmp_path / "out")[1]["step"] == "8"


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_fails_in_the_middle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    write_folder(tmp_path, train=8, val=2)
    (tmp_path / "train" / "dark" / "3.png").write_bytes(b"no image")
    more = "--data folder --side 16 --model resnet20 --batch-size 4 --epochs 1 --threads 1"
    assert train(tmp_path / "out", f"{more} --workers {workers}", tmp_path) == 1
    error = capsys.readouterr().err
    assert "3.png cannot be read" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("attention", ["none", "ela", "mrla_light"])
def test_a_single_value_a_channel_is_refused_beforehand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], attention: str
) -> None:
    write_folder(tmp_path, train=1, val=1)
    more = f"--data folder --batch-size 1 --model resnet50 --attention {attention} --epochs 1"
    for side in (8, 32):
        assert train(tmp_path / "out", f"{more} --side {side}", tmp_path) == 2
        expected = f"error: batch-size: got 1 with images of side {side}, whose last maps are 1x1"
        assert said(capsys).startswith(expected)
    # A small step, since one image says little of a gradient, and what diverges is refused too.
    assert train(tmp_path / "out", f"{more} --side 33 --lr 1e-4", tmp_path) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--data cifar10", "data_batch_1, data_batch_2"),
        ("--data folder", "train/CLASS"),
        ("--data cifar10 --side 64", "side: got 64 for 'cifar10'; allowed is 32"),
    ],
)
def test_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str, message: str
) -> None:
    assert train(tmp_path / "out", more, tmp_path) == 2
    assert message in said(capsys)
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("text")
    assert train(tmp_path / "out", "--data folder", tmp_path / "file") == 2
    assert said(capsys).startswith(f"error: data-dir: {tmp_path / 'file' / 'train'} not found")


def test_a_run_of_before_torchvision_read_the_images_is_not_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its images were varied in another way."""
    write_folder(tmp_path, train=4, val=2)
    more = "--data folder --side 16 --model resnet20 --attention none --batch-size 4 --epochs 2"
    assert train(tmp_path / "out", more, tmp_path) == 0
    path = tmp_path / "out" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    del state["options"]["task"]["reading"]
    torch.save(state, path)
    capsys.readouterr()
    assert train(tmp_path / "out", f"{more} --resume", tmp_path) == 2
    assert "reading=missing (now 'torchvision')" in said(capsys)


def test_a_checkpoint_is_tested_on_other_images_of_the_same_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, train_images in (("a", 8), ("b", 3)):
        write_folder(tmp_path / name, train=train_images, val=2)
    more = "--data folder --side 16 --model resnet20 --attention none --batch-size 4 --epochs 1"
    assert train(tmp_path / "out", f"{more} --model-ema", tmp_path / "a") == 0
    before = {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    more = more.replace("--batch-size 4", "--batch-size 3")
    assert train(tmp_path / "out", f"{more} --evaluate --workers 1", tmp_path / "b") == 0
    shown = capsys.readouterr().out
    assert "average" in shown
    assert "top-1" in shown
    assert "top-5" not in shown
    assert {p: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_digits_may_be_mixed(tmp_path: Path) -> None:
    more = "--side 8 --batch-size 400 --model resnet20 --attention none --epochs 1 --threads 1"
    assert train(tmp_path / "plain", more) == 0
    assert train(tmp_path / "mixed", f"{more} --mixup-alpha 1 --cutmix-alpha 1 --workers 1") == 0
    losses = [read_log(tmp_path / n)[0]["train_loss"] for n in ("plain", "mixed")]
    assert losses[0] != losses[1]


def test_mixup_is_not_for_detectors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option, value in (
        ("--mixup-alpha", "0.2"),
        ("--cutmix-alpha", "1.0"),
        ("--auto-augment", "ra"),
        ("--random-erase", "0.1"),
        ("--label-smoothing", "0.1"),
        ("--model-ema", ""),
        ("--compile", ""),
    ):
        assert train(tmp_path / "out", f"--task detection {option} {value}") == 2
        expected = (
            f"error: {option[2:]}: got .* with --task detection; allowed is it with --task class"
        )
        assert re.match(expected, said(capsys))


def test_classes_of_other_names_are_not_taken_for_these(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As many of them, of which each would be taken for the one of its number."""
    for name in ("a", "b"):
        write_folder(tmp_path / name, train=4, val=2)
    for part in ("train", "val"):
        (tmp_path / "b" / part / "dark").rename(tmp_path / "b" / part / "murky")
    more = "--data folder --side 16 --model resnet20 --attention none --batch-size 4 --threads 1"
    assert train(tmp_path / "out", f"{more} --epochs 2", tmp_path / "a") == 0
    capsys.readouterr()
    # They are sorted by name: dark, light; light, murky.
    message = "class-names='dark' as number 0 (now 'light' as number 0). Give the same ones"
    for how in ("--resume", "--evaluate"):
        assert train(tmp_path / "out", f"{more} --epochs 2 {how}", tmp_path / "b") == 2
        assert message in said(capsys)
    # Of before the names were kept.
    path = tmp_path / "out" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    assert state["options"]["task"].pop("class_names") == ["dark", "light"]
    torch.save(state, path)
    for how in ("--resume", "--evaluate"):
        assert train(tmp_path / "out", f"{more} --epochs 2 {how}", tmp_path / "a") == 0


def test_a_single_class_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As where the data are one folder deeper: all of it would be right from the first step on."""
    write_folder(tmp_path / "train" / "images", train=2, val=2)
    write_folder(tmp_path / "val" / "images", train=2, val=2)
    assert train(tmp_path / "out", "--data folder --side 16 --model resnet20", tmp_path) == 2
    assert said(capsys).startswith("error: data-dir: got one class, images, in ")


def test_evaluate_takes_an_average_where_there_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the options say, which are of another run's training."""
    write_folder(tmp_path, train=4, val=2)
    more = "--data folder --side 16 --model resnet20 --attention none --batch-size 4 --threads 1"
    ema = "--model-ema --model-ema-decay 0.9 --model-ema-steps 2"
    for name, options in (("with", ema), ("without", "")):
        assert train(tmp_path / name, f"{more} --epochs 1 {options}", tmp_path) == 0
    for config, checkpoint in (("with", "without"), ("without", "with")):
        capsys.readouterr()
        path = tmp_path / config / "config.json"
        command = ["train", "--config", str(path), "--evaluate", str(tmp_path / checkpoint)]
        assert main(command) == 0
        assert ("average" in capsys.readouterr().out) == (checkpoint == "with")
    command = ["train", "--task", "detection", "--evaluate", str(tmp_path / "with")]
    assert main(command) == 2
    assert "was made with other settings: data='folder' (now 'digits')" in said(capsys)
