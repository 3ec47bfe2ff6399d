"""The callback for lightning, in a real `Trainer`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ela_models import CHANNELS, Network, plant
from torch import Tensor

lightning = pytest.importorskip("lightning.pytorch")

from ela_kernels.integrations.lightning import EBQMCallback  # noqa: E402

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

OPTIONS: dict[str, Any] = {"warmup": 4, "interval": 2, "probe_interval": 2, "smoothing": 0.5}


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = Network((6,))
        plant(self.network, {2})

    def training_step(self, x: Tensor, _: int) -> Tensor:
        return self.network(x).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-9, momentum=0.9)


def batches(count: int = 40) -> Any:
    torch.manual_seed(1)
    data = torch.rand(2 * count, CHANNELS, 5, 5) + 0.5
    return torch.utils.data.DataLoader(data, batch_size=2)


def trainer(folder: Path, callback: EBQMCallback, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lightning.Trainer(
            default_root_dir=folder,
            callbacks=[callback],
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            **options,
        )


def test_it_steps_with_the_optimizer(tmp_path: Path) -> None:
    module, callback = Module(), EBQMCallback(**OPTIONS)
    run = trainer(tmp_path, callback, max_steps=9, accumulate_grad_batches=3)
    run.fit(module, batches())
    assert callback.ebqm is not None
    assert callback.ebqm.steps == run.global_step == 9
    assert [layer.skipped for layer in module.network.layers] == [i == 2 for i in range(6)]
    assert float(run.logged_metrics["ebqm/skipped"]) == 1.0
    assert "ebqm/score/network.stages.0.2" in run.logged_metrics
    # Nobody is watched any more, and the optimizer is its own again.
    assert not any(layer.watched for layer in module.network.layers)
    assert callback._handles == []


def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    first, second = EBQMCallback(**OPTIONS), EBQMCallback(**OPTIONS)
    run = trainer(tmp_path, first, max_steps=7)
    run.fit(Module(), batches())
    run.save_checkpoint(tmp_path / "at7.ckpt")
    resumed = Module()
    run = trainer(tmp_path, second, max_steps=12)
    run.fit(resumed, batches(), ckpt_path=tmp_path / "at7.ckpt", weights_only=True)
    assert second.ebqm is not None
    assert second.ebqm.steps == 12
    assert [d.step for d in second.ebqm.report().decisions] == [2, 4, 6, 8, 10, 12]
    assert resumed.network.layers[2].skipped


def test_the_same_trainer_may_fit_again(tmp_path: Path) -> None:
    module, callback = Module(), EBQMCallback(logs=False, **OPTIONS)
    for steps in (5, 4):
        trainer(tmp_path, callback, max_steps=steps).fit(module, batches())
    assert callback.ebqm is not None
    assert callback.ebqm.steps == 9
