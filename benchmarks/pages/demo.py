"""The table of the demo, from the results.json that it leaves."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.tables import Results, table


def demo(results: Results) -> Iterator[str]:
    """Accuracy, time and memory of its three networks."""
    plan, images = results["plan"], results["images"]
    yield (
        f"{results['threads']} threads of an {results['processor']}, float32, {results['malloc']} malloc, torch "
        f"{results['torch']}, {results['date']}. "
        f"{images['train']} images of {plan['side']}x{plan['side']} to train with, "
        f"{images['test']} to test, {plan['epochs']} epochs, one seed; {results['minutes']:.1f} minutes for all three."
    )
    yield ""
    rows = [
        [
            run["title"],
            f"{100 * run['test_accuracy']:.2f} %",
            f"{run['step_ms_median']:.1f}",
            f"{run['step_ms_median_last_epoch']:.1f}",
            f"{run['peak_step_bytes'] / 2**20:.1f}",
            f"{run['layers_skipped']} of {run['layers']}" if run["layers"] else "",
        ]
        for run in results["runs"].values()
    ]
    head = ["network", "test accuracy", "a step, ms", "in the last epoch"]
    yield from table([*head, "peak memory of a step, MiB", "layers skipped"], rows)
