"""A detector in training: the loop of the classifier, with boxes for labels and COCO's mean average precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ela_kernels.optional import optional
from ela_kernels.training.detection.scenes import Sample
from ela_kernels.training.loop import Trainer


class DetectionTrainer(Trainer):
    """As :class:`ela_kernels.training.loop.Trainer`, of a model as torchvision's detectors are.

    In training the model gives a dict of losses for a list of images and a list of targets, whose sum is the loss; in
    evaluation a list of boxes, labels and scores. `test_precision` is COCO's mean average precision, over overlaps from
    0.5 to 0.95; `test_precision_50` that at 0.5. Both are from 0 to 1.
    """

    columns = (
        "epoch",
        "step",
        "lr",
        "train_loss",
        "test_precision",
        "test_precision_50",
        "seconds",
        "layers_skipped",
    )
    step_columns = ("step", "epoch", "lr", "loss", "seconds", "layers_skipped")
    takes_labels = True

    @torch.no_grad()
    def detect(self, samples: list[Sample]) -> list[dict[str, Tensor]]:
        """Boxes, labels and scores that the model finds on each image."""
        training = self.model.training
        self.model.eval()
        try:
            with self.autocast():
                found: list[dict[str, Tensor]] = self.model(
                    [sample.image.to(self.device) for sample in samples]
                )
        finally:
            self.model.train(training)
        return [{name: value.cpu() for name, value in one.items()} for one in found]

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Mean average precision on the test images, over all overlaps and at 0.5."""
        metric = optional(
            "torchmetrics.detection", "mean average precision", "detection"
        ).MeanAveragePrecision(iou_type="bbox", backend="pycocotools")
        # Images with more objects than COCO's hundred are judged by their hundred best.
        metric.warn_on_many_detections = False
        self.processes.copy_first(self.model.buffers())
        first, last, step = self.processes.rank, len(self.task.test), self.processes.count
        indices = torch.arange(first, last, step, device="cpu")
        for part in indices.split(self.options.batch_size):
            samples = [self.task.test[number] for number in part.tolist()]
            found = self.detect(samples)
            names = ("boxes", "labels", "scores")
            metric.update(
                [
                    {name: one[name].float() if name != "labels" else one[name] for name in names}
                    for one in found
                ],
                [{"boxes": s.boxes, "labels": s.labels} for s in samples],
            )
            if self.processes.count == 1:
                # Shares may differ by one batch, and a flag can only be agreed on by all.
                self._stop_if_asked()
        self.model.train()
        result = metric.compute()  # over all processes
        return float(result["map"]), float(result["map_50"])

    def results(self) -> list[tuple[str, str]]:
        best = max(row["test_precision"] for row in self.history)
        last = self.history[-1]
        return [
            ("mean average precision, last epoch", f"{last['test_precision']:.3f}"),
            ("mean average precision, best epoch", f"{best:.3f}"),
            ("at an overlap of 0.5, last epoch", f"{last['test_precision_50']:.3f}"),
        ]

    def evaluation(self) -> list[Sequence[str]]:
        precision, precision_50 = self.evaluate()
        head = ["", "mean average precision", "at an overlap of 0.5"]
        return [head, ["model", f"{precision:.3f}", f"{precision_50:.3f}"]]

    def epoch_text(self, row: Mapping[str, float]) -> str:
        return f"mean average precision {row['test_precision']:.3f}"

    def _tested(self) -> dict[str, float]:
        precision, precision_50 = self.evaluate()
        return {"test_precision": precision, "test_precision_50": precision_50}

    def _first_images(self) -> Any:
        return [self.task.train[0].image.to(self.device)]

    def _check_single_image(self) -> None:
        """Maps of a detector are larger than one value a channel."""

    def _loss(self, images: Any, labels: Any) -> tuple[Tensor, Tensor]:
        losses: dict[str, Tensor] = self.parallel(images, labels)
        loss = torch.stack(list(losses.values())).sum()
        count = len(images)
        seen = loss.new_tensor([0, count], dtype=torch.float64)
        return loss, torch.cat((loss.detach().double().view(1) * count, seen))

    def place(self, images: Any, labels: Any) -> tuple[Any, Any]:
        return (
            [image.to(self.device) for image in images],
            [{name: value.to(self.device) for name, value in one.items()} for one in labels],
        )
