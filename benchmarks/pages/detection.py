"""The table of the detection example, from the results.json that it leaves."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.tables import Results, table


def detection(results: Results) -> Iterator[str]:
    """Mean average precision after each epoch, and what the last network is."""
    images, rows = results["images"], []
    yield (
        f"{images['train']} canvases to train with, {images['test']} to test, one seed; torch {results['torch']}, "
        f"torchvision {results['torchvision']}, {results['date']}."
    )
    yield ""
    for run in results["runs"].values():
        last = run["history"][-1]
        rows.append(
            [
                run["title"],
                ", ".join(f"{row['test_precision']:.3f}" for row in run["history"]),
                f"{last['test_precision_50']:.3f}",
                f"{run['parameters']:,}",
                str(last["layers_skipped"]),
            ]
        )
    head = ["network", "mAP 0.5:0.95, by epoch", "mAP 0.5", "parameters", "layers skipped"]
    yield from table(head, rows)
