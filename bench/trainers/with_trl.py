"""TRL's trainers as every benchmark runs them: rows in their order, no files, no progress bars.

It works with every release of TRL that is measured and needs nothing of fastdpo, since another
trainer's interpreter imports it too.
"""

import importlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .clock import NotInstalled

Rows = Sequence[dict[str, Any]]

_MODULES = {
    "dpo": "trl",
    "kto": "trl",
    "orpo": "trl.experimental.orpo",
    "cpo": "trl.experimental.cpo",
}
REFERENCE_FREE = ("orpo", "cpo")
"""Trainers without a reference model."""

LABELLED = ("kto", "apo_zero_unpaired")
"""Losses whose rows are prompt, completion and label."""

_NO_LIMIT = 1 << 30


def trl_keys(loss: str) -> dict[str, Any]:
    """The trainer of TRL that has this loss of ours, and what the loss is called there."""
    if loss == "orpo":
        return {"trainer": "orpo"}
    if loss in LABELLED:
        return {"trainer": "kto", "loss_type": loss}
    if loss in ("simpo", "cpo", "cpo_hinge", "cpo_ipo"):
        name = "sigmoid" if loss == "cpo" else loss.removeprefix("cpo_")
        return {"trainer": "cpo", "loss_type": name}
    return {"trainer": "dpo", "loss_type": [loss]}


def make_trainer(
    model: Any,
    rows: Any,
    eval_rows: Rows | None = None,
    peft_config: Any = None,
    trainer: str = "dpo",
    **keys: Any,
) -> Any:
    """A trainer of rows of prompt, chosen and rejected; KTO's are prompt, completion and label.

    Args:
        model: a directory, or a model in memory that is trained in place.
        rows: in the order in which they are trained; for several processes a `Dataset` of a file,
            whose cache they share.
        eval_rows: what is evaluated.
        peft_config: of an adapter.
        trainer: dpo, kto, orpo or cpo.
        keys: of that trainer's configuration; a `max_length` of None is no limit.
    """
    try:
        from datasets import Dataset
        from torch.utils.data import SequentialSampler
        from transformers import PrinterCallback

        module = importlib.import_module(_MODULES[trainer])
        kind = getattr(module, f"{trainer.upper()}Trainer")
        settings = getattr(module, f"{trainer.upper()}Config")
    except (ImportError, AttributeError) as error:
        raise NotInstalled(str(error)) from error
    if trainer in REFERENCE_FREE and keys.get("max_length", 0) is None:
        keys["max_length"] = _NO_LIMIT  # None means 512 to these

    class InOrder(kind):
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
    made = InOrder(
        model=str(model) if isinstance(model, Path) else model,
        args=settings(**common | keys),
        train_dataset=rows if isinstance(rows, Dataset) else Dataset.from_list(list(rows)),
        eval_dataset=Dataset.from_list(list(eval_rows)) if eval_rows else None,
        peft_config=peft_config,
    )
    made.folder = folder  # removed with the trainer
    made.remove_callback(PrinterCallback)
    return made
