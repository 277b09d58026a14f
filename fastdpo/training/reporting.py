"""`report.html` while a run goes on. Whatever goes wrong with it is said once and stops nothing."""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import files
from ..config import TrainConfig
from ..data.dataset import Data
from ..errors import one_line
from ..model.scorer import Scorer
from ..parallel.world import World
from ..report.lengths import length_facts
from ..report.page import write_report
from ..report.runs import FACTS
from ..version import __version__
from .samples import answers, best_response, choose_prompts, turns

logger = logging.getLogger(__name__)

SECONDS = 30.0
"""Between two versions of the page, at least; writing one takes at most `SHARE` of the time."""
SHARE = 0.01


class Reporter:
    """A tracker that keeps the report of one run. Of several processes the first one writes."""

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        policy: Scorer,
        tokenizer: Any,
        data: Data,
        world: World,
        total_steps: int,
    ) -> None:
        self.config, self.folder = config, folder
        self.policy, self.tokenizer, self.data, self.world = policy, tokenizer, data, world
        self.on = config.report and world.first
        self.facts: dict[str, Any] = {"total_steps": total_steps}
        self._due = self._start = time.perf_counter()
        self._before = 0.0
        self._chosen: list[Any] = []

    def begin(self, step: int) -> None:
        """What has to be seen before the first step that is left, the one after `step`; nothing is
        written.
        """
        self._guarded(lambda: self._begin(step))

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Write the page where that is due."""
        if time.perf_counter() >= self._due:
            self._guarded(lambda: self._write(live=True))

    def close(self, failed: bool) -> None:
        """Nothing is left open; the page of a run that failed says how far it came."""

    def end(self, step: int) -> None:
        """What has to be seen after the last step, before the model is saved."""

        def ended() -> None:
            self._sample("after" if step else "before")
            self._write(live=True)

        self._guarded(ended)

    def finish(self) -> None:
        """Write the page of a run whose model is saved."""
        self._guarded(lambda: self._write(live=False))

    def _guarded(self, part: Callable[[], None]) -> None:
        if not self.on:
            return
        try:
            part()
        except Exception as error:
            self.on = False
            logger.warning(f"report: not written any more ({one_line(error)}); training goes on")

    def _begin(self, step: int) -> None:
        if step:
            earlier = files.read_json(self.folder / FACTS)
            earlier = earlier if isinstance(earlier, dict) else {}
            self._before = float(earlier.get("seconds", 0.0))
            self.facts = {k: v for k, v in earlier.items() if k != "no_samples"} | self.facts
        self.facts |= {
            "fastdpo": __version__,
            "torch": torch.__version__,
            "device": _device_name(self.policy.device),
            "devices": self.world.size,
            "parameters": sum(p.numel() for p in self.policy.model.parameters()),
            "lengths": length_facts(self.data.train, self.config.max_length),
        }
        self._chosen = choose_prompts(self.data.evaluation, self.config.report_samples)
        rows = [self._row(group) for group in self._chosen]
        known = self.facts.get("samples")
        prompts = [row.get("prompt") for row in known] if isinstance(known, list) else []
        if prompts != [row["prompt"] for row in rows]:
            self.facts["samples"] = rows
        if not step:
            self._sample("before")

    def _sample(self, when: str) -> None:
        """Put the policy's answers into the facts, beside the prompts and the chosen responses."""
        if not self._chosen or "no_samples" in self.facts:
            return
        if reason := self._obstacle():
            logger.info(f"report: no samples: {reason}")
            self.facts["no_samples"] = reason
            return
        try:
            found = answers(self.policy, self.tokenizer, [g.prompt.tolist() for g in self._chosen])
        except Exception as error:  # what a model's own generate may stumble over
            logger.warning(f"report: no samples: {one_line(error)}")
            self.facts["no_samples"] = one_line(error)
            return
        for row, answer in zip(self.facts["samples"], found, strict=True):
            row[when] = answer

    def _row(self, group: Any) -> dict[str, Any]:
        best = best_response(group)
        chosen = None if best is None else self.tokenizer.decode(best, skip_special_tokens=True)
        return {"prompt": turns(group.prompt.tolist(), self.tokenizer), "chosen": chosen}

    def _obstacle(self) -> str | None:
        """Why this run's policy is not asked."""
        if self.world.sharded:
            return "the model is sharded over devices"
        if self.policy.context is not None:
            return "each row is shared by several devices"
        if self.config.torch_compile:
            return "the layers are compiled"
        if not getattr(self.policy.model, "can_generate", lambda: True)():
            return "the model cannot generate"
        return None

    def _write(self, live: bool) -> None:
        start = time.perf_counter()
        self.facts["seconds"] = self._before + start - self._start
        files.write_text(self.folder / FACTS, json.dumps(self.facts))
        write_report(self.folder, live=live)
        end = time.perf_counter()
        self._due = end + max(SECONDS, (end - start) / SHARE)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
