"""Train three object detectors on real handwritten digits on canvases: plain, MRLA, ELA.

    python examples/detect_digits.py [--out DIR] [--epochs N] [--threads N] [--quick]

Faster R-CNN with a feature pyramid on a small residual network, from torchvision; the digits come with scikit-learn.
The three start from the same seed, see the same images, and take turns, an epoch each. In the output folder stand
afterwards results.json, ebqm.txt, and a picture of what each of them finds on canvases that none was trained on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

try:
    import matplotlib as mpl
    import torch
    import torchvision
    from rich.console import Console
    from rich.table import Table
    from tqdm import tqdm

    import ela_kernels
    from ela_kernels.training.detection.networks import fasterrcnn_small
    from ela_kernels.training.detection.scenes import Sample, Scenes
    from ela_kernels.training.detection.tasks import DetectionTask
    from ela_kernels.training.detection.trainer import DetectionTrainer
    from ela_kernels.training.options import Options
except ImportError as error:
    raise SystemExit(
        f"{error}. This example needs: pip install 'ela-kernels[train,detection]'"
    ) from error

mpl.use("Agg")
import matplotlib.pyplot as plt

NETWORKS = {"none": "plain residual", "mrla": "MRLA, fused", "ela": "ELA, fused, EBQM"}
TRAIN, TEST, EPOCHS, BATCH = 800, 200, 3, 4
SHOWN = 4  # canvases in the picture
SURE = 0.5  # the least score of a box that is drawn


def main() -> None:
    arguments = parse()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    train, test = (64, 16) if arguments.quick else (TRAIN, TEST)
    scenes = Scenes(train), Scenes(test, train=False)
    task = DetectionTask(*scenes, list(Scenes.classes), lambda sample, _: sample)
    epochs = arguments.epochs or (1 if arguments.quick else EPOCHS)
    runs = {kind: make_run(kind, task, epochs) for kind in NETWORKS}
    steps = epochs * sum(run.steps_per_epoch for run in runs.values())
    with tqdm(total=steps, unit="step", smoothing=0.02) as bar:
        for epoch in range(epochs):
            for kind, run in runs.items():
                bar.set_description(f"epoch {epoch + 1}/{epochs}, {NETWORKS[kind]}")
                run.run_epoch(bar.update)
            found = (f"{run.history[-1]['test_precision']:.3f}" for run in runs.values())
            bar.set_postfix_str(f"mean average precision {' / '.join(found)}")

    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    results = collect(runs, task)
    (out / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    ebqm = runs["ela"].ebqm
    assert ebqm is not None
    (out / "ebqm.txt").write_text(f"{ebqm.report()}\n")
    draw(runs, [task.test[number] for number in range(SHOWN)], out / "detections.png")
    console = Console(width=max(100, Console().width), highlight=False)
    console.print(table(results))
    console.print(f"results.json, ebqm.txt and detections.png are in {out}/", soft_wrap=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/detect_digits"), help="folder of the output")
    add("--epochs", type=positive, help=f"default: {EPOCHS}")
    add("--threads", type=positive, help="default: PyTorch's own number")
    add("--quick", action="store_true", help="few images, one epoch: is everything there?")
    return parser.parse_args()


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {number}; allowed is an int of at least 1")
    return number


def make_run(kind: str, task: DetectionTask, epochs: int) -> DetectionTrainer:
    torch.manual_seed(0)
    model = fasterrcnn_small(len(task.classes) + 1, attention=kind)
    options = Options(
        epochs=epochs, batch_size=BATCH, lr=1e-3, optimizer="adamw", weight_decay=1e-4
    )
    return DetectionTrainer(model, task, options)


def collect(runs: dict[str, DetectionTrainer], task: DetectionTask) -> dict[str, Any]:
    """Every number of the table, and what it depends on."""
    return {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "ela_kernels": ela_kernels.__version__,
        "backends": ela_kernels.backend_status(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "images": {"train": len(task.train), "test": len(task.test)},
        "runs": {
            kind: {
                "title": NETWORKS[kind],
                "parameters": sum(p.numel() for p in run.model.parameters()),
                "history": run.history,
            }
            for kind, run in runs.items()
        },
    }


def table(results: dict[str, Any]) -> Table:
    images = results["images"]
    title = f"{images['train']} canvases to train with, {images['test']} to test; one seed"
    found = Table(title=title)
    for column in ("", "mAP 0.5:0.95", "mAP 0.5", "training, s", "parameters", "layers skipped"):
        found.add_column(column, justify="right" if column else "left")
    for run in results["runs"].values():
        last = run["history"][-1]
        found.add_row(
            run["title"],
            f"{last['test_precision']:.3f}",
            f"{last['test_precision_50']:.3f}",
            f"{last['seconds']:.0f}",
            f"{run['parameters']:,}",
            str(last["layers_skipped"]),
        )
    return found


def draw(runs: dict[str, DetectionTrainer], samples: list[Sample], path: Path) -> None:
    """A row for the boxes as they are, and one for what each network finds; a column a canvas."""
    rows: list[tuple[str, list[dict[str, torch.Tensor]]]] = [
        ("what is there", [{"boxes": s.boxes, "labels": s.labels} for s in samples])
    ]
    rows += [(NETWORKS[kind], run.detect(samples)) for kind, run in runs.items()]
    figure, grid = plt.subplots(
        len(rows),
        len(samples),
        figsize=(2.6 * len(samples), 2.7 * len(rows)),
        squeeze=False,
        layout="constrained",
    )
    for axes_of_row, (title, found) in zip(grid, rows, strict=True):
        for axes, sample, boxes in zip(axes_of_row, samples, found, strict=True):
            axes.imshow(sample.image[0], cmap="gray", vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
            scores = boxes.get("scores", torch.ones(len(boxes["labels"])))
            for box, label, score in zip(boxes["boxes"], boxes["labels"], scores, strict=True):
                if score < SURE:
                    continue
                x0, y0, x1, y1 = box.tolist()
                colour = "#4daf4a" if "scores" not in boxes else "#ffb000"
                axes.add_patch(
                    plt.Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, lw=1.4)
                )
                axes.text(x0, y0 - 2, Scenes.classes[int(label) - 1], color=colour, fontsize=9)
        axes_of_row[0].set_ylabel(title, fontsize=10)
    figure.savefig(path, dpi=72)
    plt.close(figure)


if __name__ == "__main__":
    main()
