"""The benchmarks run from end to end, and refuse to time what is wrong."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ela_kernels as ek
from benchmarks import left_out_network, position
from benchmarks.blocks import HALF, OURS
from benchmarks.contenders import EAGER, LAYER, PULL, PUSH, Stage, WrongResultError, check_forms
from benchmarks.environment import KEPT, MALLOC_SETTINGS, process_environment
from benchmarks.history_dtype import HeldBlocks, measure_history_dtype
from benchmarks.layer_floor import BLOCK_PHASES, StageOfLayers, check_layers
from benchmarks.left_out import Retrievals, measure_left_out
from benchmarks.left_out_network import measure_left_out_networks
from benchmarks.limits import limits
from benchmarks.measure import interleave, ratio
from benchmarks.memory import profiled_peak
from benchmarks.mixes import EINSUM, SUMS, measure_mixes
from benchmarks.mixes import OURS as OUR_MIX
from benchmarks.networks import measure_networks
from benchmarks.pages.speed import TABLES
from benchmarks.position import measure_position
from benchmarks.probe import read_probes, transfer_probes
from benchmarks.report import targets, text_report
from benchmarks.shapes import StageShape, parse_shape
from benchmarks.stages import least_bytes_of_ops
from benchmarks.tables import Target
from benchmarks.worker import PARTS
from ela_kernels.backends.setting import current_setting

ROOT = Path(__file__).resolve().parent.parent
SHAPE = parse_shape("3x2x16x6x8")


@pytest.mark.skipif(ek.backend_status()["cpp"] != "available", reason="times the cpp backend")
def test_a_quick_run_measures_everything_but_the_compiled_form(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.run", "--quick", "--shapes", SHAPE.name]
    command += ["--rounds", "2", "--threads", "1", "--out", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["stages"]) == list(MALLOC_SETTINGS)
    for stages in results["stages"].values():
        contenders = stages[SHAPE.name]["contenders"]
        assert list(contenders) == [EAGER, LAYER, PULL, PUSH]
        for contender in contenders.values():
            assert contender["ms"]["rounds"] == len(contender["ms"]["samples"]) == 2
            assert 0 < contender["ms"]["q1"] <= contender["ms"]["median"] <= contender["ms"]["q3"]
    phases = results["floor"][SHAPE.name]["phases"]
    assert [p["least_bytes"] for p in phases.values()] == [9 * SHAPE.map_elements * 4] * 3
    # Depth 3: forward (1 + 2) + (2 + 2) + (3 + 2) maps; backward 3 + 3 at every depth.
    directions = results["layer_floor"][SHAPE.name]["phases"]
    least = {name: d["least_bytes"] for name, d in directions.items()}
    assert least == {
        "forward": 12 * SHAPE.map_elements * 4,
        "backward": 18 * SHAPE.map_elements * 4,
    }
    assert results["layer_floor"][SHAPE.name]["percent_of_probe"] > 0
    assert set(results["memory"][SHAPE.name]) == {EAGER, LAYER, PULL, PUSH}
    assert results["memory"][SHAPE.name][PULL]["maps"] > 2 * SHAPE.depth - 1
    assert math.isfinite(results["divergence"][SHAPE.name]["percent_of_forward"])
    assert results["overhead"]["bare"]["both"]["median"] > 0
    assert results["overhead"]["op"]["both"]["median"] > 0
    for part in ("blocks", "light"):
        blocks = results[part][SHAPE.name]
        for phase in ("training", "inference"):
            assert list(blocks[phase]["ms"]) == [EAGER, OURS, HALF]
            assert blocks[phase]["times_ours"][EAGER]["of_medians"] > 0
    assert results["machine"]["threads"] == 1
    table = (tmp_path / "tables.md").read_text()
    assert "peak memory, maps" in table
    assert "Whole layer against the read probe" in table
    assert "Layers and blocks against the transfer probe" in table
    assert "Times faster than a baseline, and the most that any layer could be" in table
    assert table == done.stdout.removesuffix("\n")


def test_limits_are_the_baseline_over_the_probe() -> None:
    """A stage of 3 maps of 4000 bytes: 12 maps forward, 18 backward, and 7 more a layer around a block."""
    shape = StageShape(3, 1, 10, 10, 1)
    name, size = shape.name, 4 * shape.map_elements
    ms = {"eager": {"median": 10.0}, "layer": {"median": 4.0}, "block": {"median": 5.0}}
    times = {"eager": {"of_medians": 2.5}}
    phases = {
        "forward": {"least_bytes": 12 * size, "probe_gb_per_s": size / 1e6},  # a map a millisecond
        "backward": {"least_bytes": 18 * size, "probe_gb_per_s": size / 1e6 * 2},
    }
    stage = {
        "fastest_baseline": "eager",
        "contenders": {n: {"ms": m} for n, m in ms.items()},
        "times_ours": times,
    }
    found = limits(
        {
            "layer_floor": {name: {"phases": phases}},
            "stages": {KEPT: {name: stage}},
            "blocks": {
                name: {p: {"ms": ms, "times_ours": times} for p in ("training", "inference")}
            },
            "networks": {},
        }
    )
    assert [(limit.reached, round(limit.most, 6)) for limit in found] == [
        (2.5, round(10 / 21, 6)),
        (2.5, round(10 / (21 + 9 + 6), 6)),
        (2.5, round(10 / 12, 6)),
    ]


@pytest.mark.parametrize("name", [EAGER, LAYER, PULL, PUSH])
def test_every_contender_passes_its_check(name: str) -> None:
    stage = Stage(SHAPE)
    report = check_forms(stage, stage.forms([name]))
    assert 0 < report[name]["largest_error"] < 2e-5


def test_whole_networks() -> None:
    (found,) = measure_networks(rounds=1, small=True).values()
    assert (found["skipped"], found["layers"]) == (3, 9)
    assert found["peak_bytes"]["plain"] < found["peak_bytes"]["mrla"]
    assert found["peak_bytes"]["mrla"] < found["peak_bytes"]["concatenating"]
    for phase in ("training", "inference"):
        of = found[phase]
        assert list(of["ms"]) == ["plain", "concatenating", "mrla", "ela"]
        assert of["times_plain"]["plain"]["of_medians"] == 1
        plain, most, ours = (of["ms"][n]["median"] for n in ("plain", "concatenating", "mrla"))
        assert of["share_removed"]["mrla"] == pytest.approx((most - ours) / (most - plain))


@pytest.mark.parametrize("broken", ["output", "gradient"])
def test_a_wrong_contender_is_not_timed(broken: str) -> None:
    stage = Stage(SHAPE)

    def wrong_output(x: torch.Tensor) -> torch.Tensor:
        return stage.eager(x) * 1.001

    def wrong_gradient(x: torch.Tensor) -> torch.Tensor:
        right = stage.eager(x)
        return right.detach() + 1.001 * (right - right.detach())

    forward = {"output": wrong_output, "gradient": wrong_gradient}[broken]
    with pytest.raises(WrongResultError, match=broken):
        check_forms(stage, {"broken": forward})


@pytest.mark.skipif(ek.backend_status()["cpp"] != "available", reason="times the cpp backend")
def test_a_wrong_layer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = StageOfLayers(SHAPE)
    assert 0 < check_layers(stage) < 2e-5
    right = stage.backward
    monkeypatch.setattr(stage, "backward", lambda t: right(t)._replace(wk=1.001 * right(t).wk))
    with pytest.raises(RuntimeError, match="dwk is"):
        check_layers(stage)


def test_contenders_take_turns() -> None:
    calls: list[str] = []
    contenders = {name: lambda name=name: calls.append(name) for name in "ABC"}
    seconds = interleave(contenders, rounds=3, warmup=1)
    assert "".join(calls) == "ABC" + "ABC" + "BCA" + "CAB"
    assert {name: len(times) for name, times in seconds.items()} == {"A": 3, "B": 3, "C": 3}


def test_ratio_is_of_the_medians() -> None:
    found = ratio([2.0, 4.0, 60.0], [1.0, 1.0, 10.0])
    assert found["of_medians"] == 4.0
    assert found["median_of_rounds"] == 4.0


def test_read_probes_read_without_a_change() -> None:
    maps = [torch.randn(33, 32) for _ in range(5)]
    copies = [m.clone() for m in maps]
    probes = read_probes()
    assert {"torch.sum", "torch.dot"} <= set(probes)
    for run in probes.values():
        run(maps)
    assert all(torch.equal(m, c) for m, c in zip(maps, copies, strict=True))


def test_transfer_probes_write_what_is_written_and_nothing_else() -> None:
    for run in transfer_probes().values():
        for writes in (1, 2, 3):
            read = [torch.randint(0, 1000, (33, 32)) for _ in range(2)]
            copies = [r.clone() for r in read]
            written = [torch.full_like(read[0], -1) for _ in range(writes)]
            assert run(read, written) == sum(int(r.sum()) for r in read)
            assert all(torch.equal(r, c) for r, c in zip(read, copies, strict=True))
            assert all(int((w == -1).sum()) == 0 for w in written)


def test_transfers_move_what_layers_and_blocks_must() -> None:
    stage = StageOfLayers(SHAPE)
    depth = SHAPE.depth
    for t in range(1, depth + 1):
        for name in ("forward", "backward"):
            read, written = stage.transfers(name, t)
            assert len(read) + len(written) == len(stage.footprint(name, t))
        moved = {n: stage.transfers(n, t) for n in BLOCK_PHASES}
        counts = {n: (len(m.read), len(m.written)) for n, m in moved.items()}
        assert counts == {
            "block forward": (t + 2, 3),
            "block backward": (depth + 5, 2),
            "block inference": (t, 2),
        }


def test_peak_memory_is_the_most_held_at_once() -> None:
    def step() -> None:
        first = torch.empty(1000, 1000)
        second = torch.empty(1000, 1000)
        del first
        third = torch.empty(1000, 1000)
        del second, third

    assert profiled_peak(step) == 8_000_000


def test_least_bytes_by_hand() -> None:
    # Depth 3: forward reads 1 + 2 + 3 and writes 3 maps; backward reads (1 + 1) + (2 + 1) + (3 + 1) for the dots, and
    # the gathers read 3 + 2 + 1 and write 3.
    one = SHAPE.map_elements * 4
    assert least_bytes_of_ops(SHAPE) == {"forward": 9 * one, "backward": 18 * one}


def test_malloc_settings_replace_those_of_this_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    assert not any(n.startswith("MALLOC_") for n in process_environment({}, tmp_path))
    kept = process_environment(MALLOC_SETTINGS["kept"], tmp_path)
    assert kept["MALLOC_TOP_PAD_"] == "1000000000"


def test_targets_look_at_the_right_side() -> None:
    assert Target("speed", "", 1.4, 1.4, True).met
    assert not Target("speed", "", 1.39, 1.4, True).met
    assert Target("memory", "", 32.0, 32.0, False).met
    assert not Target("memory", "", 32.1, 32.0, False).met


@pytest.mark.parametrize("text", ["", "3x2x16x6", "3x2x16x6x5", "0x2x16x6x8", "axbxcxdxe"])
def test_shapes_that_do_not_fit_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="allowed is TxBxCxHxD"):
        parse_shape(text)


def results_of(part: str, found: dict[str, Any]) -> dict[str, Any]:
    """Those of a run of one part."""
    machine = {
        "cpu": "",
        "threads": 1,
        "simd_level": "",
        "torch": "",
        "date": "",
        "load_before": [0],
    }
    return {**{p: {} for p in PARTS}, "machine": machine, "small": True, part: found}


@pytest.mark.skipif(ek.backend_status()["cpp"] != "available", reason="measures the cpp backend")
def test_held_values_are_measured_and_reported() -> None:
    found = measure_history_dtype(SHAPE, rounds=2)
    names = ["float32", "bfloat16", "float16"]
    for part in ("error", "peak_maps"):
        assert list(found[part]) == names
    exact, bfloat16, float16 = (found["error"][name]["output"] for name in names)
    assert 0 < exact < 1e-6 < float16 < bfloat16 < 1e-2
    # Three values in half the bytes.
    saved = found["peak_maps"]["float32"] - found["peak_maps"]["bfloat16"]
    assert saved == pytest.approx(1.5, abs=0.1)
    for phase in ("training", "inference"):
        assert found[phase]["over_float32"]["float32"]["of_medians"] == 1
    table = text_report(results_of("history_dtype", {SHAPE.name: found}))
    assert "whose history holds values in a dtype: relative L2 distance from float64" in table
    assert f"{found['peak_maps']['bfloat16']:.1f}" in table


def test_mixes_are_measured_and_reported() -> None:
    found = measure_mixes(SHAPE, [EAGER], rounds=2)
    maps = {"forward": SHAPE.depth + 1, "forward and backward": 3 * SHAPE.depth + 2}
    for form in ("[B, G, T]", "[T]"):
        for phase, least in maps.items():
            of_phase = found[form][phase]
            assert list(of_phase["ms"]) == [EINSUM, SUMS, OUR_MIX]
            assert of_phase["least_bytes"] == 4 * SHAPE.map_elements * least
            assert of_phase["times_ours"][OUR_MIX]["of_medians"] == 1
    table = text_report(results_of("mixes", {SHAPE.name: found}))
    assert "Sums of all maps of a stage by given weights" in table
    assert f"| {found['[T]']['forward']['ms'][OUR_MIX]['median']:.2f}" in table


def test_mixes_that_are_wrong_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ek.depth_mix
    monkeypatch.setattr(ek, "depth_mix", lambda *args: 1.01 * right(*args))
    with pytest.raises(WrongResultError, match="ours: 0"):
        measure_mixes(SHAPE, [EAGER], rounds=1)


@pytest.mark.slow
@pytest.mark.skipif(ek.backend_status()["cpp"] != "available", reason="measures the cpp backend")
def test_position_attention_is_measured_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measure_position(rounds=2, small=True)
    tokens = found["T=3 [2, 5, 8]"]
    # Three maps read and one written; with gradients seven and four.
    assert tokens["forward"]["least_bytes"] == 4 * 80 * 4
    assert tokens["forward and backward"]["least_bytes"] == 11 * 80 * 4
    assert "T=3 [2, 8, 4, 3] channels_last" in found
    assert all(of["floor_ms"] > 0 for phases in found.values() for of in phases.values())
    results = results_of("position", found)
    of_page = "\n".join(TABLES["position"](results))
    assert all(f"| {shape} " in of_page for shape in found)
    assert "eager / compiled over ours" in text_report(results)
    # Small shapes say nothing of speed; those of a full run are held to a bound.
    assert not [t for t in targets(results) if "position_attention" in t.what]
    assert [
        t
        for t in targets(results | {"small": False, "networks": {}, "converted": {}})
        if "position" in t.what
    ]
    right = position.ours
    monkeypatch.setattr(position, "ours", lambda *given: 1.01 * right(*given))
    with pytest.raises(WrongResultError, match="position: 0"):
        measure_position(rounds=1, small=True)


@pytest.mark.skipif(ek.backend_status()["cpp"] != "available", reason="measures the cpp backend")
def test_held_values_that_are_wrong_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    right = HeldBlocks.run

    def wrong(stage: HeldBlocks, x: torch.Tensor, dtype: torch.dtype | None) -> Any:
        out, attended = right(stage, x, dtype)
        is_eager = current_setting() == "eager"
        return out * (1 if is_eager else 1.01), attended

    monkeypatch.setattr(HeldBlocks, "run", wrong)
    with pytest.raises(WrongResultError, match="values in None: output"):
        measure_history_dtype(SHAPE, rounds=1)


@pytest.mark.skipif(ek.backend_status()["cpp"] != "available", reason="measures the cpp backend")
def test_what_is_left_out_is_measured_and_reported() -> None:
    found = measure_left_out(SHAPE, rounds=2)
    assert list(found) == ["planar", "channels_last"]
    for form in found.values():
        assert list(form) == ["even", "as at the start", "as after 50 steps", "as at the end"]
        assert all(form["even"]["left_out"][name] == 0 for name in ("0", "2^-24", "1e-3"))
        shares = [of_weights["left_out"] for of_weights in form.values()]
        assert all(s["0"] == 0 and s["2^-24"] <= s["1e-3"] < 1 for s in shares)
        assert form["as at the start"]["left_out"]["2^-24"] > 0
        for of_weights in form.values():
            for phase in ("training", "inference"):
                assert of_weights[phase]["times_faster"]["0"]["of_medians"] == 1
    results = results_of("left_out", {SHAPE.name: found})
    for text in (text_report(results), "\n".join(TABLES["left_out"](results))):
        assert "as after 50 steps" in text
        assert f"{100 * shares[1]['1e-3']:.0f} %" in text


def test_networks_that_leave_out_are_measured_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measure_left_out_networks(1, small=True)
    (name,) = found
    assert name == "resnet20, 4 at 16x16"
    assert list(found[name]["left_out"]) == ["0", "2^-24", "1e-3"]
    assert found[name]["left_out"]["0"] == found[name]["apart"]["0"] == 0
    results = results_of("left_out_networks", found)
    for text in (text_report(results), "\n".join(TABLES["left_out_networks"](results))):
        assert "2^-24" in text
        assert name in text
    monkeypatch.setitem(left_out_network.TOLERANCES, "1e-3", 0.9)
    with pytest.raises(WrongResultError, match=r"tolerance 1e-3: scores are .* from those without"):
        measure_left_out_networks(1, small=True)


@pytest.mark.skipif(ek.backend_status()["cpp"] != "available", reason="measures the cpp backend")
def test_what_is_left_out_wrongly_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Retrievals.forward

    def wrong(stage: Retrievals, tolerance: float, *args: Any) -> list[torch.Tensor]:
        is_eager = current_setting() == "eager"
        return right(stage, tolerance if is_eager or not tolerance else 0.9, *args)

    monkeypatch.setattr(Retrievals, "forward", wrong)
    with pytest.raises(WrongResultError, match=r"tolerance 5\.96.*e-08: "):
        measure_left_out(SHAPE, rounds=1)
