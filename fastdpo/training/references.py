"""Which reference a run has: log-probabilities of a pass before training, a second model, or the
policy without what is trained.
"""

import copy
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..config import TrainConfig
from ..data.dataset import Data, needs_reference
from ..data.packing import LAYOUTS
from ..data.plan import reference_budget
from ..errors import ModelError
from ..files import cache_root
from ..losses import TrainingLoss
from ..model.adapter import add_adapter
from ..model.head import find_head
from ..model.layout import Layout
from ..model.load_scorer import load_scorer
from ..model.scorer import Scorer
from ..parallel.world import ALONE, World
from ..reference import (
    LogpStore,
    ReferenceReport,
    fill_reference,
    model_fingerprint,
    weights_digest,
)
from .arrangement import shard_scorer
from .online import OnlineReference, trained_parameters

logger = logging.getLogger(__name__)


def make_reference(
    config: TrainConfig,
    policy: Scorer,
    data: Data,
    loss: TrainingLoss,
    max_tokens: int,
    world: World = ALONE,
) -> tuple[OnlineReference | None, dict[str, str]]:
    """The reference that is evaluated while training, None where its log-probabilities are in the
    groups now or the loss needs none; and digests of the models that the run begins with, by what
    they are.

    With `use_peft` the policy has its adapter afterwards.
    """
    digests, reference = {}, None
    needed = needs_reference(loss, data)
    precomputes = needed and config.precomputes
    fill = _Filling(config, data, loss, max_tokens, world)
    own = precomputes and not config.ref_model_name_or_path
    if precomputes:
        source = _second_scorer(config, policy, world) if config.ref_model_name_or_path else policy
        store, digests["reference model"] = fill.store_of(source)
        if not own or not world.sharded:
            fill(source, store)
    elif not needed:
        digests["starting model"] = _digest(policy, world)
    elif config.ref_model_name_or_path or not config.use_peft:
        reference = _second_model(config, policy, world)
        if config.sync_ref_model:
            _check_same_shapes(config, policy, reference)
        digests["reference model"] = _digest(reference.scorer, world)
    if config.use_peft:
        if config.ref_model_name_or_path or not precomputes:
            digests["starting model"] = _digest(policy, world)
        without = _add_adapter(config, policy, world)
        if needed and reference is None and not precomputes:
            reference = without
    else:
        without = OnlineReference(policy)
        shard_scorer(policy, world)
    if own and world.sharded:  # with what is trained switched off, since it had to be there first
        with without.as_it_was():
            fill(policy, store)
    if reference is not None and reference.scorer is not policy:
        shard_scorer(reference.scorer, world)
    said = _describe(reference) if needed else "none, the loss needs none"
    if config.sync_ref_model:
        said += f", moved towards the policy every {config.ref_model_sync_steps} steps"
    logger.info(f"reference: {said}")
    return reference, digests


def precompute_reference(
    config: TrainConfig,
    policy: Scorer,
    data: Data,
    loss: TrainingLoss,
    max_tokens: int,
    world: World = ALONE,
) -> ReferenceReport:
    """Reference log-probabilities of every group, from the cache or from a pass over the data in
    rows of `max_tokens` and more.
    """
    scorer = _second_scorer(config, policy, world) if config.ref_model_name_or_path else policy
    fill = _Filling(config, data, loss, max_tokens, world)
    store, _ = fill.store_of(scorer)
    shard_scorer(scorer, world)
    return fill(scorer, store)


@dataclass(frozen=True)
class _Filling:
    """The pass that gives every group its reference log-probabilities."""

    config: TrainConfig
    data: Data
    loss: TrainingLoss
    max_tokens: int
    world: World

    def store_of(self, scorer: Scorer) -> tuple[LogpStore, str]:
        """Where the log-probabilities of a whole model are kept, and its weights' digest."""
        config = self.config
        root = Path(config.reference_cache_dir or cache_root() / "reference").expanduser()
        weights = _digest(scorer, self.world)
        name = model_fingerprint(scorer.model, scorer.autocast, weights)
        return LogpStore(root / (f"{name}-tokens" if self.loss.by_tokens else name)), weights

    def __call__(self, scorer: Scorer, store: LogpStore) -> ReferenceReport:
        hidden = self.config.disable_tqdm if self.world.first else True

        def progress(rows: Any, total: int) -> Any:
            return tqdm(rows, total=total, desc="reference", unit="row", disable=hidden)

        scorer.model.eval()
        train, evaluation = self.data.train, self.data.evaluation
        both = train + evaluation
        report = fill_reference(
            both,
            scorer,
            store,
            max_tokens=reference_budget(self.max_tokens, scorer.device.type),
            progress=progress,
            by_tokens=self.loss.by_tokens,
            world=self.world,
        )
        both.hand_references(train, evaluation)
        logger.info(f"reference log-probabilities: {report}")
        return report


def _digest(scorer: Scorer, world: World) -> str:
    """The digest of a model's weights, before they are sharded."""
    if not scorer.from_first:
        return weights_digest(scorer.model)
    return str(world.share(weights_digest(scorer.model) if world.first else None))


def _second_scorer(config: TrainConfig, policy: Scorer, world: World) -> Scorer:
    """The model that `ref_model_name_or_path` names, or the policy's own files once more."""
    path = config.ref_model_name_or_path or config.model_name_or_path
    scorer = load_scorer(config, policy.device, policy.autocast, path, world=world)
    scorer.context = policy.context
    return scorer


def _second_model(config: TrainConfig, policy: Scorer, world: World) -> OnlineReference:
    """The model that `ref_model_name_or_path` names, or the policy as it is at the start."""
    path = config.ref_model_name_or_path
    if path is None and config.model_name_or_path is None:  # it came from memory
        scorer = replace(policy, model=copy.deepcopy(policy.model))
        scorer.head = find_head(scorer.model)
    else:
        scorer = _second_scorer(config, policy, world)
    scorer.model.requires_grad_(False)
    if policy.layout.name != scorer.layout.name:
        weaker = max(policy.layout, scorer.layout, key=lambda layout: LAYOUTS.index(layout.name))
        raise ModelError(
            f"the policy packs {policy.layout.name} rows and the reference "
            f"{scorer.layout.name} ones ({weaker.reason}); use precompute_ref_log_probs: true"
        )
    return OnlineReference(scorer)


def _check_same_shapes(config: TrainConfig, policy: Scorer, reference: OnlineReference) -> None:
    """Raise ConfigError where the reference cannot move towards the policy."""
    own, other = policy.model.parameters(), reference.scorer.model.parameters()
    if [weight.shape for weight in own] != [weight.shape for weight in other]:
        raise config.error(
            "sync_ref_model",
            f"expected a reference with weights of the policy's shapes, got "
            f"{config.ref_model_name_or_path}",
        )


def _add_adapter(config: TrainConfig, policy: Scorer, world: World) -> OnlineReference:
    """Put the adapter to train on the policy, unless it was loaded with one; the policy as it was
    before, as a reference.
    """
    loaded = hasattr(policy.model, "peft_config")
    if not loaded:
        policy.model = add_adapter(policy.model, config)
        policy.head = find_head(policy.model)
    if config.lora_dropout > 0 and policy.layout.name == "shared":
        reason = "packed: with lora_dropout, responses must not share what was dropped"
        policy.layout = Layout("packed", reason)
        logger.info(f"model: {reason}")
    shard_scorer(policy, world)
    if not loaded:
        return OnlineReference(policy, adapter_off=True)
    return OnlineReference(policy, start=trained_parameters(policy.model))


def _describe(reference: OnlineReference | None) -> str:
    if reference is None:
        return "precomputed, no reference model during training"
    if reference.start is not None:
        return "the policy with its adapter as it was at the start"
    return "the policy with its adapter off" if reference.adapter_off else "a second model, online"
