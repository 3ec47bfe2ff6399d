"""The study's runs: equal beginnings, what is skipped, the file of finished runs, and going on with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ela_kernels as ek
from benchmarks.study import runs as study_runs
from benchmarks.study.choice import at_random, ranking, the_last
from benchmarks.study.data import load
from benchmarks.study.records import Records, read
from benchmarks.study.runs import run_all
from benchmarks.study.settings import Settings, plan_runs
from benchmarks.study.training import Run, mean_share, network_of
from benchmarks.study.variants import GROUPS, VARIANTS, make_network
from ela_kernels.modules.skipping import SKIP_MODES
from ela_kernels.training.data import Task

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

# EBQM's thresholds so high that it skips in the first steps already.
TINY: dict[str, Any] = {
    "data": "digits",
    "epochs": 2,
    "batch": 16,
    "train_images": 96,
    "test_images": 20,
    "side": 8,
    "low": 0.9,
    "high": 0.95,
}


@pytest.fixture(scope="module")
def digits() -> Task:
    return load("digits")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As runs beside others have it: convolutions round by the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def every_variant(digits: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run of each variant."""
    out = tmp_path_factory.mktemp("study") / "runs.jsonl"
    assert run_all(plan_runs([0], [20], list(VARIANTS), **TINY), digits, out) == 0
    return out


def by_variant(path: Path) -> dict[str, dict[str, Any]]:
    return {record["settings"]["variant"]: record for record in read([path])}


def forbid(*_: object, **__: object) -> None:
    raise AssertionError("a finished run was made again")


def test_every_skip_mode_has_its_variants() -> None:
    for mode in SKIP_MODES:
        assert {f"ela-{mode}", f"random-{mode}", f"last-{mode}"} <= VARIANTS.keys()
    assert set(GROUPS["all"]) == VARIANTS.keys()


def test_every_variant_trains_and_leaves_a_record(every_variant: Path) -> None:
    found = by_variant(every_variant)
    assert found.keys() == VARIANTS.keys()
    for name, record in found.items():
        assert record["steps"] == 12
        assert len(record["train_loss"]) == 2
        assert all(loss > 0 for loss in record["train_loss"])
        assert [epoch for epoch, _ in record["test_accuracy"]] == [1, 2]
        assert all(0 <= accuracy <= 1 for _, accuracy in record["test_accuracy"])
        first, last = record["training_seconds"]
        assert 0 < first < last
        assert record["machine"]["torch"] == torch.__version__
        assert (record["skipping"] is None) == (VARIANTS[name].chosen_by is None)
    modes = [found[f"ela-{mode}"] for mode in SKIP_MODES]
    # Until something is skipped they are the network that is never skipped, on the same images.
    assert {record["train_loss"][0] for record in modes} != {found["plain"]["train_loss"][0]}
    assert all(record["skipping"]["share"] > 0 for record in modes)


def test_as_many_are_skipped_as_in_the_paired_run(every_variant: Path) -> None:
    found = by_variant(every_variant)
    for mode in SKIP_MODES:
        counts = {}
        for prefix in ("ela", "random", "last"):
            skipping = found[f"{prefix}-{mode}"]["skipping"]
            counts[prefix] = [
                (d["step"], sum(s.count("1") for s in d["skipped"])) for d in skipping["decisions"]
            ]
            assert all(s[0] == "0" for d in skipping["decisions"] for s in d["skipped"])
        assert counts["ela"] == counts["random"] == counts["last"]
        assert max(count for _, count in counts["ela"]) > 0


def test_what_is_planned_is_skipped(every_variant: Path, digits: Task) -> None:
    mode = SKIP_MODES[0]
    found = by_variant(every_variant)
    run = Run(Settings(f"last-{mode}", 20, seed=0, **TINY), digits, paired=found[f"ela-{mode}"])
    held: list[list[str]] = []
    run.train(lambda: held.append(now(run)))
    for decision, after in zip(
        found[f"last-{mode}"]["skipping"]["decisions"], run.planned, strict=True
    ):
        assert decision["step"] == after
        assert held[after - 1] == decision["skipped"]
    assert {layer.skip for stage in run.layers for layer in stage} == {mode}


def now(run: Run) -> list[str]:
    return ["".join(str(int(layer.skipped)) for layer in stage) for stage in run.layers]


def test_the_record_tells_what_ebqm_decided(digits: Task) -> None:
    run = Run(Settings(f"ela-{SKIP_MODES[0]}", 20, seed=1, **TINY), digits)
    held: list[list[str]] = []
    skipping = run.train(lambda: held.append(now(run)))["skipping"]
    assert skipping["decisions"]
    for decision in skipping["decisions"]:
        assert held[decision["step"] - 1] == decision["skipped"]
        assert len(decision["divergence"]) == 9
    # What holds in a step is what was decided after the one before.
    in_steps = [["000"] * 3, *held[:-1]]
    share = sum(stage.count("1") for step in in_steps for stage in step) / (9 * len(held))
    assert skipping["share"] == pytest.approx(share, abs=1e-6)


def test_the_mean_share_by_hand() -> None:
    decisions = [{"step": 4, "skipped": ["011", "0"]}, {"step": 6, "skipped": ["010", "0"]}]
    # Two layers in steps 5 and 6, one in steps 7 to 10, of four.
    assert mean_share(decisions, [3, 1], 10) == (2 * 2 + 4 * 1) / 40
    assert mean_share([], [3, 1], 10) == 0


def test_all_variants_begin_with_the_same_weights() -> None:
    states = {
        name: network_of(Settings(name, 20, "digits", 5), 10, 1).state_dict() for name in VARIANTS
    }
    plain, mrla = states["plain"], states["mrla"]
    for name, state in states.items():
        assert plain.keys() <= state.keys()
        assert all(torch.equal(state[key], value) for key, value in plain.items())
        shared = [
            key for key, value in mrla.items() if key in state and state[key].shape == value.shape
        ]
        assert all(torch.equal(state[key], mrla[key]) for key in shared)
        if name != "plain":
            assert any(key.endswith("attn.Wv.weight") for key in shared)
    assert plain.keys() == ek.models.resnet20(in_chans=1).state_dict().keys()
    other = make_network("none", 3, 10, 1, seed=6).state_dict()
    assert not torch.equal(other["stem.0.weight"], plain["stem.0.weight"])


def test_making_a_network_leaves_random_numbers_alone() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    make_network("uniform", 1, 10, 1, seed=0)
    assert torch.equal(torch.rand(1), wanted)


def scores(network: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return network.train()(torch.randn(4, 1, 16, 16, generator=generator))


def test_uniform_is_layer_attention_with_equal_weights() -> None:
    uniform, mrla = (make_network(kind, 3, 10, 1, seed=0) for kind in ("uniform", "mrla"))
    for name, parameter in mrla.named_parameters():
        if name.endswith("Wq.weight"):
            nn.init.zeros_(parameter)  # all scores are zero then
    # Float32 through twenty layers, summed in another order: 1e-6 each.
    torch.testing.assert_close(scores(uniform), scores(mrla), rtol=1e-4, atol=1e-4)
    assert (scores(uniform) - scores(make_network("mrla", 3, 10, 1, seed=0))).abs().max() > 1e-3


def test_self_is_layer_attention_that_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    own, mrla = (make_network(kind, 3, 10, 1, seed=0) for kind in ("self", "mrla"))
    wanted = scores(mrla)
    forward = ek.LayerAttention.plan

    def forget(self: Any, x: Any, history: Any, *args: Any) -> Any:
        history.__init__()
        return forward(self, x, history, *args)

    monkeypatch.setattr(ek.LayerAttention, "plan", forget)
    torch.testing.assert_close(scores(own), scores(mrla), rtol=1e-4, atol=1e-4)
    assert (scores(own) - wanted).abs().max() > 1e-3


def test_layers_at_random_keep_the_guards() -> None:
    stages = [9, 4, 1]
    orders = [ranking(stages, 2, str(seed)) for seed in range(20)]
    assert len({tuple(order) for order in orders}) == 20
    assert ranking(stages, 2, "3") == orders[3]
    for order in orders:
        assert sorted(order) == [(i, j) for i, n in enumerate(stages) for j in range(1, n)]
        chosen = at_random([[True] * 5 + [False] * 4, [False] * 4, [False]], order)
        assert sum(map(sum, chosen)) == 5
        assert not any(stage[0] for stage in chosen)
        assert "111" not in "".join("1" if s else "0" for s in chosen[0])


def test_the_last_of_each_stage() -> None:
    paired = [[False, True, False, True], [False, False, False], [False, True, False]]
    assert the_last(paired) == [
        [False, False, True, True],
        [False, False, False],
        [False, False, True],
    ]


def test_finished_runs_are_not_made_again(
    every_variant: Path, digits: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = every_variant.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(study_runs, "Run", forbid)
        assert run_all(plan_runs([0], [20], list(VARIANTS), **TINY), digits, every_variant) == 0
        assert every_variant.read_bytes() == content
        other = plan_runs([0], [20], ["plain"], **{**TINY, "epochs": 3})
        with pytest.raises(AssertionError, match="made again"):
            run_all(other, digits, every_variant)
    assert every_variant.read_bytes() == content


@pytest.mark.parametrize("left", [1, 30, -1])
def test_a_line_that_was_cut_off_is_redone(
    every_variant: Path, digits: Task, tmp_path: Path, capfd: pytest.CaptureFixture[str], left: int
) -> None:
    lines = every_variant.read_bytes().splitlines(keepends=True)
    names = [json.loads(line)["settings"]["variant"] for line in lines]
    out = tmp_path / "runs.jsonl"
    # -1: all but the end of the line, which is JSON already.
    out.write_bytes(b"".join(lines[:2]) + lines[2][:left])
    assert len(read([out])) == 2
    assert "the last line was cut off, and is passed over" in capfd.readouterr().err
    assert run_all(plan_runs([0], [20], names[:3], **TINY), digits, out) == 0
    assert "the last line was cut off; it is removed" in capfd.readouterr().err
    redone = out.read_bytes().splitlines(keepends=True)
    assert redone[:2] == lines[:2]
    assert len(redone) == 3
    # The same numbers but for the time that it took.
    again, before = (json.loads(line) for line in (redone[2], lines[2]))
    assert again["train_loss"] == before["train_loss"]
    assert again["test_accuracy"] == before["test_accuracy"]


def test_a_last_line_of_zeros_is_redone(every_variant: Path, tmp_path: Path) -> None:
    lines = every_variant.read_bytes().splitlines(keepends=True)
    out = tmp_path / "runs.jsonl"
    for end in (b"\0" * 50, b"\0" * 50 + b"\n"):
        out.write_bytes(lines[0] + end)
        assert len(read([out])) == 1
        Records(out).close()
        assert out.read_bytes() == lines[0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [lines[0][:50] + b"\n", lines[1]], "line 1 of .* is no finished run"),
        (lambda lines: [lines[0], b'{"format": 2}\n'], "line 2 of .*format 2; allowed is 1"),
        (lambda lines: [lines[0], b'{"format": 1}\n'], "line 2 of .*without settings, machine"),
        (lambda lines: [lines[0], b"[]\n", lines[1]], "line 2 of .*format 'list'"),
        (lambda lines: [b"notes of mine\n"], "line 1 of .* is no finished run"),
        (lambda lines: [b"notes of mine"], "line 1 of .*begins with b'notes"),
        (lambda lines: [b"\xff\xfe", lines[0]], "line 1 of .* is no finished run"),
    ],
)
def test_a_file_of_something_else_is_refused_and_left(
    every_variant: Path,
    tmp_path: Path,
    damage: Callable[[list[bytes]], list[bytes]],
    message: str,
) -> None:
    out = tmp_path / "runs.jsonl"
    out.write_bytes(b"".join(damage(every_variant.read_bytes().splitlines(keepends=True))))
    content = out.read_bytes()
    for use in (Records, lambda path: read([path])):
        with pytest.raises(ValueError, match=message):
            use(out)
    assert out.read_bytes() == content


def test_a_run_that_is_there_twice_is_refused(every_variant: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(every_variant.read_bytes())
    with pytest.raises(ValueError, match="is there more than once"):
        read([every_variant, copy])


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    records = Records(tmp_path / "runs.jsonl")
    with pytest.raises(ValueError, match="is being written by another process"):
        Records(tmp_path / "runs.jsonl")
    records.close()
    Records(tmp_path / "runs.jsonl").close()


def test_a_cut_off_leaves_complete_seeds() -> None:
    names = ["random-layer", "plain", "ela-layer"]
    found = plan_runs([4, 1], [56, 20], names, data="digits")
    assert [(r.seed, r.depth) for r in found[::3]] == [(4, 56), (4, 20), (1, 56), (1, 20)]
    # Whoever takes over another's number comes after it.
    assert [r.variant for r in found[:3]] == ["plain", "ela-layer", "random-layer"]
    found = plan_runs([4, 1], [56, 20], names, order="depth", data="digits")
    assert [(r.seed, r.depth) for r in found[::3]] == [(4, 56), (1, 56), (4, 20), (1, 20)]


def test_without_its_pair_nothing_is_run(digits: Task, tmp_path: Path) -> None:
    out = tmp_path / "runs.jsonl"
    names = ["plain", "random-layer"]
    with pytest.raises(ValueError, match="variants: got 'random-layer' without 'ela-layer'"):
        run_all(plan_runs([0], [20], names, **TINY), digits, out)
    assert out.read_bytes() == b""
    with pytest.raises(ValueError, match="variants: got 'random-layer' without the finished run"):
        Run(Settings("random-layer", 20, seed=0, **TINY), digits)


def test_no_run_is_begun_after_the_time(digits: Task, tmp_path: Path) -> None:
    out = tmp_path / "runs.jsonl"
    runs = plan_runs([0], [8], ["plain", "self"], **TINY)
    assert run_all(runs, digits, out, minutes=1e-9) == 2
    assert run_all(runs, digits, out, minutes=60) == 0
    assert len(read([out])) == 2


@pytest.mark.slow
def test_several_runs_at_a_time_give_the_same(
    every_variant: Path, digits: Task, tmp_path: Path
) -> None:
    names = [f"{prefix}-{SKIP_MODES[0]}" for prefix in ("ela", "random", "last")]
    out = tmp_path / "runs.jsonl"
    runs = plan_runs([0], [20], [*names, "plain"], **TINY)
    assert run_all(runs, digits, out, jobs=2) == 0
    alone, found = by_variant(every_variant), by_variant(out)
    assert found.keys() == {*names, "plain"}
    for name, record in found.items():
        assert record["machine"]["jobs"] == 2
        assert record["skipping"] is None or (
            [d["skipped"] for d in record["skipping"]["decisions"]]
            == [d["skipped"] for d in alone[name]["skipping"]["decisions"]]
        )
        assert record["train_loss"] == pytest.approx(alone[name]["train_loss"], rel=1e-3)
