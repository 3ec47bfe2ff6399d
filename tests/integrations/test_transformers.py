"""The callback for the Trainer of transformers, in a real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.ela_models import CHANNELS, Network, plant
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from ela_kernels.integrations.transformers import EBQMCallback  # noqa: E402

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

OPTIONS: dict[str, Any] = {"warmup": 4, "interval": 2, "probe_interval": 2, "smoothing": 0.5}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = Network((6,))
        plant(self.network, {2})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.network(x).mean()}


class Data(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 80

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(i)
        return {"x": torch.rand(CHANNELS, 5, 5, generator=generator) + 0.5}


def trainer(folder: Path, model: Model, callback: EBQMCallback, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        learning_rate=1e-9,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        **options,
    )
    return transformers.Trainer(model, arguments, train_dataset=Data(), callbacks=[callback])


def test_it_steps_with_the_optimizer(tmp_path: Path) -> None:
    model, callback = Model(), EBQMCallback(**OPTIONS)
    options = {"max_steps": 9, "gradient_accumulation_steps": 3, "save_strategy": "no"}
    trainer(tmp_path, model, callback, **options).train()
    assert callback.ebqm is not None
    assert callback.ebqm.steps == 9
    assert [layer.skipped for layer in model.network.layers] == [i == 2 for i in range(6)]
    assert not any(layer.watched for layer in model.network.layers)


@pytest.mark.parametrize("restores", [False, True])
def test_a_run_that_was_stopped_goes_on(tmp_path: Path, restores: bool) -> None:
    first = EBQMCallback(**OPTIONS)
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 7}
    trainer(tmp_path, Model(), first, max_steps=7, **options).train()
    model, second = Model(), EBQMCallback(**OPTIONS)
    options["restore_callback_states_from_checkpoint"] = restores
    run = trainer(tmp_path, model, second, max_steps=12, **options)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    (callback,) = (c for c in run.callback_handler.callbacks if isinstance(c, EBQMCallback))
    assert callback.ebqm is not None
    assert callback.ebqm.steps == 12
    assert [d.step for d in callback.ebqm.report().decisions] == [2, 4, 6, 8, 10, 12]
    assert model.network.layers[2].skipped
