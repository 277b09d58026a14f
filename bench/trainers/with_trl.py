"""TRL's `DPOTrainer` as every benchmark runs it: rows in their order, no files, no progress bars.

It works with every release of TRL that is measured and needs nothing of fastdpo, since another
trainer's interpreter imports it too.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .clock import NotInstalled

Rows = Sequence[dict[str, Any]]


def make_trainer(
    model: Any, rows: Rows, eval_rows: Rows | None = None, peft_config: Any = None, **keys: Any
) -> Any:
    """A trainer of rows of prompt, chosen and rejected.

    Args:
        model: a directory, or a model in memory that is trained in place.
        rows: in the order in which they are trained.
        eval_rows: what is evaluated.
        peft_config: of an adapter.
        keys: of TRL's `DPOConfig`.
    """
    try:
        from datasets import Dataset
        from torch.utils.data import SequentialSampler
        from transformers import PrinterCallback
        from trl import DPOConfig, DPOTrainer
    except ImportError as error:
        raise NotInstalled(str(error)) from error

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset)

    folder = tempfile.TemporaryDirectory()
    common = {
        "output_dir": folder.name,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }
    trainer = InOrder(
        model=str(model) if isinstance(model, Path) else model,
        args=DPOConfig(**common | keys),
        train_dataset=Dataset.from_list(list(rows)),
        eval_dataset=Dataset.from_list(list(eval_rows)) if eval_rows else None,
        peft_config=peft_config,
    )
    trainer.folder = folder  # removed with the trainer
    trainer.remove_callback(PrinterCallback)
    return trainer
