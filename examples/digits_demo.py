"""Train three networks on real handwritten digits side by side: plain residual, MRLA as published, ELA.

    python examples/digits_demo.py [--out DIR] [--epochs N] [--threads N] [--quick]

The images come with scikit-learn. The three runs take turns, a step each, so that whatever else the machine does
meets all of them alike. In the output folder stand afterwards results.json, ebqm.txt and three pictures.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

try:
    import torch
    from digits_pictures import draw_accuracy, draw_divergence, draw_weights
    from digits_runs import VARIANTS, Digits, Plan, Run, attention_weights, faster_threads
    from rich.console import Console
    from rich.table import Table
    from tqdm import tqdm

    import ela_kernels
except ImportError as error:
    raise SystemExit(
        f"{error}. The demo needs what `make demo` installs, or: pip install '.[demo]'"
    ) from error

QUICK = Plan(
    blocks=(4, 4), widths=(16, 32), side=8, batch=32, epochs=2, train_images=320, test_images=100
)


def main() -> None:
    arguments = parse()
    plan = QUICK if arguments.quick else Plan()
    if arguments.epochs is not None:
        plan = replace(plan, epochs=arguments.epochs)
    digits = Digits(plan)
    torch.set_num_threads(arguments.threads or faster_threads(plan, digits))
    console = Console(width=max(100, Console().width), highlight=False)
    console.print(
        f"{len(digits.labels)} images of {plan.side}x{plan.side} to train with, {len(digits.test_labels)} to test; "
        f"{plan.epochs} epochs of {digits.steps} steps for each of {len(VARIANTS)} networks; "
        f"threads: {torch.get_num_threads()} of {os.cpu_count()} cores, malloc: {malloc()}; "
        f"compiled kernels: {ela_kernels.backend_status()['cpp']}"
    )
    start = time.perf_counter()
    runs = train(plan, digits)
    console.print("Measuring the memory of a step, reading the weights, drawing pictures")
    results = collect(runs, plan, digits)
    results["minutes"] = round((time.perf_counter() - start) / 60, 2)

    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    ela = runs["ela"]
    assert ela.ebqm is not None
    (out / "ebqm.txt").write_text(f"{ela.ebqm.report()}\n")
    draw_weights(results, out / "attention_weights.png")
    draw_divergence(results, out / "divergence.png")
    draw_accuracy(results, out / "accuracy.png")
    console.print(table(results))
    console.print(
        f"Pictures, results.json and EBQM's report layer by layer (ebqm.txt) are in {out}/ "
        f"({results['minutes']:.1f} minutes)",
        soft_wrap=True,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--out", type=Path, default=Path("runs/digits_demo"), help="folder of the output"
    )
    parser.add_argument("--epochs", type=positive, help=f"default: {Plan().epochs}")
    parser.add_argument(
        "--threads",
        type=positive,
        help="default: one, or PyTorch's own number, whichever trains faster at the start",
    )
    parser.add_argument(
        "--quick", action="store_true", help="small networks and few images: a trial"
    )
    return parser.parse_args()


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {number}; allowed is an int of at least 1")
    return number


def train(plan: Plan, digits: Digits) -> dict[str, Run]:
    """All runs, a step of each in turn."""
    runs = {variant.key: Run(variant, plan, digits) for variant in VARIANTS}
    with tqdm(total=plan.epochs * digits.steps * len(runs), unit="step", smoothing=0.02) as bar:
        for epoch in range(plan.epochs):
            bar.set_description(f"epoch {epoch + 1}/{plan.epochs}")
            for batch in digits.batches(epoch):
                for run in runs.values():
                    run.timed_step(batch)
                    bar.update()
            for run in runs.values():
                run.end_epoch()
            bar.set_postfix_str(
                "test accuracy "
                + " / ".join(f"{run.record.accuracies[-1]:.1%}" for run in runs.values())
                + f", {runs['ela'].skipped} layers skipped"
            )
    return runs


def collect(runs: dict[str, Run], plan: Plan, digits: Digits) -> dict[str, Any]:
    """Everything that the table and the pictures show, in plain numbers."""
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "malloc": malloc(),
        "torch": torch.__version__,
        "ela_kernels": ela_kernels.__version__,
        "kernels": ela_kernels.backend_status()["cpp"],
        "python": platform.python_version(),
        "plan": asdict(plan),
        "images": {"train": len(digits.labels), "test": len(digits.test_labels)},
        "steps_per_epoch": digits.steps,
        "runs": {key: describe(run, plan) for key, run in runs.items()},
        "weights": {
            key: rounded(attention_weights(runs[key].model, digits.test_images))
            for key in ("mrla", "ela")
        },
        "ebqm": decisions(runs["ela"]),
    }


def describe(run: Run, plan: Plan) -> dict[str, Any]:
    record = run.record
    return {
        "title": run.variant.title,
        "test_accuracy": record.accuracies[-1],
        "step_ms_median": 1e3 * run.median_step(),
        "step_ms_median_last_epoch": 1e3 * run.median_step(run.digits.steps),
        "peak_step_bytes": run.peak_memory(plan),
        "layers": len(run.model.attentions) and sum(plan.blocks),
        "layers_skipped": run.skipped,
        "training_seconds": rounded(record.training_seconds),
        "test_accuracies": rounded(record.accuracies),
        "losses": rounded(record.losses),
    }


def decisions(run: Run) -> dict[str, Any]:
    """EBQM's settings and what it saw and decided of every layer, at every decision point."""
    assert run.ebqm is not None
    report = run.ebqm.report()
    return {
        "settings": run.ebqm.settings.as_dict(),
        "steps": [decision.step for decision in report.decisions],
        "layers": [
            {
                "name": layer.name,
                "stage": layer.stage,
                "place": layer.place,
                "divergence": rounded([d.divergence[i] for d in report.decisions]),
                "score": rounded([d.score[i] for d in report.decisions]),
                "skipped": [d.skipped[i] for d in report.decisions],
                "reason": layer.reason.value,
            }
            for i, layer in enumerate(report.layers)
        ],
    }


def rounded(value: Any) -> Any:
    """Numbers with five digits after the point, as JSON has them: None for NaN."""
    if isinstance(value, float):
        return round(value, 5) if math.isfinite(value) else None
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return value


def table(results: dict[str, Any]) -> Table:
    runs = results["runs"]
    grid = Table(
        title=f"Handwritten digits after {results['plan']['epochs']} epochs",
        caption=(
            f"Time: median of the training steps, taken in turns; {threads(results)}, malloc: {results['malloc']}. "
            "Memory: the most that PyTorch's allocator held at once during one step as at the end of the run, counted "
            "by its profiler, beyond parameters, their gradients and the optimizer's state."
        ),
    )
    grid.add_column("network", no_wrap=True)
    for heading in (
        "test accuracy",
        "ms a step",
        "in the last epoch",
        "peak memory",
        "layers skipped",
    ):
        grid.add_column(heading, justify="right")
    for run in runs.values():
        grid.add_row(
            run["title"],
            f"{run['test_accuracy']:.2%}",
            f"{run['step_ms_median']:.1f}",
            f"{run['step_ms_median_last_epoch']:.1f}",
            f"{run['peak_step_bytes'] / 2**20:.1f} MiB",
            f"{run['layers_skipped']} of {run['layers']}" if run["layers"] else "-",
        )
    return grid


def threads(results: dict[str, Any]) -> str:
    return "1 thread" if results["threads"] == 1 else f"{results['threads']} threads"


def malloc() -> str:
    """What was set for the allocator by the environment, since times depend on it."""
    names = [name for name in os.environ if name.startswith("MALLOC_") or name == "LD_PRELOAD"]
    return ", ".join(f"{name}={os.environ[name]}" for name in sorted(names)) or "default"


def processor() -> str:
    """The processor's public name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
