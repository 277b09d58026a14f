"""References that are evaluated at every step of training."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.batch import Batch
from ..errors import CheckpointError
from ..model.scorer import Scorer
from ..model.sharding import is_sharded
from ..model.shares import reshard
from ..parallel.shares import Stored


@dataclass
class OnlineReference:
    """A reference that is evaluated at every step: a second model, or the policy with its adapter
    switched off or as it was at the start.
    """

    scorer: Scorer
    adapter_off: bool = False
    start: dict[str, torch.Tensor] | None = None
    """Trained parameters by name as they were, see `trained_parameters`."""

    def response_logps(self, batch: Batch) -> torch.Tensor:
        """Log-probability (R,) of every response of the batch, nats; no gradient."""
        with self.as_it_was():
            return self.scorer.response_logps(batch)

    def token_logps(self, batch: Batch) -> torch.Tensor:
        """Log-probability (T,) of every scored token of the batch, nats; no gradient."""
        with self.as_it_was():
            return self.scorer.token_logps(batch)

    @torch.no_grad()
    def follow(self, policy: torch.nn.Module, alpha: float) -> None:
        """Move a second model towards the policy: θ_ref ← α·θ + (1 − α)·θ_ref (TR-DPO, Gorbatovski
        et al. 2024, arXiv:2404.09656, eq. 3).
        """
        reshard(self.scorer.model)
        reshard(policy)
        own = self.scorer.model.parameters()
        for weight, trained in zip(own, policy.parameters(), strict=True):
            weight.mul_(1 - alpha).add_(trained, alpha=alpha)

    def weights(self) -> dict[str, torch.Tensor]:
        """Parameters of a second model by name, each once, as safetensors may hold them; DTensors
        where ranks hold shares.
        """
        reshard(self.scorer.model)
        named = self.scorer.model.named_parameters()
        return {name: weight.detach().contiguous() for name, weight in named}

    def load(self, weights: Stored, path: Path) -> None:
        """Put back what `weights` gave.

        Raises:
            CheckpointError: those are another model's; `path` says whose.
        """
        reshard(self.scorer.model)
        own = dict(self.scorer.model.named_parameters())
        if {name: weight.shape for name, weight in own.items()} != weights.sizes:
            raise CheckpointError(f"{path}: holds another reference model than this run's")
        weights.read(own)

    @contextmanager
    def as_it_was(self) -> Iterator[None]:
        """The model as the reference is."""
        model: Any = self.scorer.model
        switched: AbstractContextManager[Any] = nullcontext()
        if self.adapter_off:
            switched = model.disable_adapter()
        elif self.start is not None:
            switched = _parameters_of(model, self.start)
        training = model.training
        model.eval()
        try:
            with switched:
                yield
        finally:
            model.train(training)


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the parameters that training will change, by name."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@contextmanager
def _parameters_of(model: torch.nn.Module, values: dict[str, torch.Tensor]) -> Iterator[None]:
    """`values` in place of the parameters' own; nothing is copied, but shares of FSDP's, which it
    knows by where they lie.
    """
    own = {name: model.get_parameter(name) for name in values}
    copies = is_sharded(model)
    now = {name: p.detach().clone() if copies else p.data for name, p in own.items()}

    @torch.no_grad()
    def put(tensors: dict[str, torch.Tensor]) -> None:
        for name, parameter in own.items():
            if copies:
                parameter.copy_(tensors[name])
            else:
                parameter.data = tensors[name]

    try:
        put(values)
        yield
    finally:
        put(now)
