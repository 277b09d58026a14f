"""Which reference a run has: log-probabilities of a pass before training, a second model, or the
policy without what is trained.
"""

import copy
import logging
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
from ..model.scorer import Scorer, load_scorer
from ..parallel.world import ALONE, World
from ..reference import (
    LogpStore,
    ReferenceReport,
    fill_reference,
    model_fingerprint,
    weights_digest,
)
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
    if precomputes:
        _, digests["reference model"] = precompute_reference(
            config, policy, data, loss, max_tokens, world
        )
    elif not needed:
        digests["starting model"] = weights_digest(policy.model)
    elif config.ref_model_name_or_path or not config.use_peft:
        reference = _second_model(config, policy)
        if config.sync_ref_model:
            _check_same_shapes(config, policy, reference)
        digests["reference model"] = weights_digest(reference.scorer.model)
    if config.use_peft:
        if config.ref_model_name_or_path or not precomputes:
            digests["starting model"] = weights_digest(policy.model)
        without = _add_adapter(config, policy)
        if needed and reference is None and not precomputes:
            reference = without
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
) -> tuple[ReferenceReport, str]:
    """Reference log-probabilities of every group, from the cache or from a pass over the data in
    rows of `max_tokens` and more; and the digest of the reference's weights.
    """
    scorer = policy
    if config.ref_model_name_or_path:
        scorer = load_scorer(config, policy.device, policy.autocast, config.ref_model_name_or_path)
    root = Path(config.reference_cache_dir or cache_root() / "reference").expanduser()
    weights = weights_digest(scorer.model)
    name = model_fingerprint(scorer.model, scorer.autocast, weights)
    store = LogpStore(root / (f"{name}-tokens" if loss.by_tokens else name))

    def progress(rows: Any, total: int) -> Any:
        return tqdm(rows, total=total, desc="reference", unit="row", disable=config.disable_tqdm)

    scorer.model.eval()
    report = fill_reference(
        [*data.train, *data.evaluation],
        scorer,
        store,
        max_tokens=reference_budget(max_tokens, scorer.device.type),
        progress=progress,
        by_tokens=loss.by_tokens,
        world=world,
    )
    logger.info(f"reference log-probabilities: {report}")
    return report, weights


def _second_model(config: TrainConfig, policy: Scorer) -> OnlineReference:
    """The model that `ref_model_name_or_path` names, or the policy as it is at the start."""
    device, autocast, path = policy.device, policy.autocast, config.ref_model_name_or_path
    if path is None and config.model_name_or_path is None:  # it came from memory
        scorer = Scorer(
            copy.deepcopy(policy.model), policy.head, policy.layout, autocast, policy.workspace_mib
        )
        scorer.head = find_head(scorer.model)
    else:
        scorer = load_scorer(config, device, autocast, path or config.model_name_or_path)
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


def _add_adapter(config: TrainConfig, policy: Scorer) -> OnlineReference:
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
    if not loaded:
        return OnlineReference(policy, adapter_off=True)
    return OnlineReference(policy, start=trained_parameters(policy.model))


def _describe(reference: OnlineReference | None) -> str:
    if reference is None:
        return "precomputed, no reference model during training"
    if reference.start is not None:
        return "the policy with its adapter as it was at the start"
    return "the policy with its adapter off" if reference.adapter_off else "a second model, online"
