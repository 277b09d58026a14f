"""From a configuration to a trained model: loads everything, says which paths are active, and runs
the loop.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fastdpo_kernels.losses import Comparisons
from tqdm import tqdm
from transformers import set_seed

from ..config import TrainConfig
from ..data.groups import Group, check_agreement, count_comparisons, make_groups
from ..data.load import load_rows
from ..data.tokenize import tokenize_dataset
from ..errors import CheckpointError, ConfigError, ModelError
from ..files import cache_root
from ..hub import reached
from ..losses import make_loss
from ..memory.allocator import keep_freed_memory, return_freed_memory
from ..memory.auto import fit
from ..memory.estimate import REFERENCE_ROWS
from ..memory.plan import TOKENS_PER_ROW, longest_comparison
from ..model.activations import recompute_layers
from ..model.adapter import add_adapter, adopt_adapter, check_targets, load_adapter
from ..model.compiled import compile_layers
from ..model.head import check_causal, check_head, find_head
from ..model.layout import Layout, beyond_positions, choose_layout
from ..model.load import check_model_files, load_model, load_model_config, load_tokenizer
from ..model.offload import transfer_of
from ..model.paths import activations_path, attention_path, head_path, run_device
from ..model.place import Place, find_model
from ..model.precision import choose_precision
from ..model.quantised import is_quantised, packing
from ..model.scorer import Scorer
from ..model.tiles import tile_layers
from ..reference import (
    LogpStore,
    OnlineReference,
    ReferenceReport,
    fill_reference,
    model_fingerprint,
    trained_parameters,
    weights_digest,
)
from ..terminal import progress_bars, withheld
from .card import model_card
from .changes import check_keys
from .checkpoint import read_state
from .loop import Trainer
from .optimizer import optimizer_path
from .output import Output, claim
from .retry import enough_memory
from .step import Objective

_ORDER = ("shared", "packed", "padded")


@dataclass
class Data:
    """Tokenised groups to train on and to evaluate on."""

    train: list[Group]
    evaluation: list[Group]


def train(config: TrainConfig, say: Callable[[str], None] = tqdm.write) -> dict[str, Any]:
    """Run `fastdpo train`: returns the last of every metric and `output_dir`.

    Raises:
        FastDPOError: anything wrong with configuration, data, model or checkpoint, before the first
            step.
    """
    config.require("model_name_or_path", "dataset_name")
    with claim(config) as output, _surroundings(config, say):
        if output.holds_this_run() and config.resume_from_checkpoint is True:
            say(
                f"{output.path}: the run with these keys is finished (step {output.step}), nothing "
                "is left to do"
            )
            return {"output_dir": str(output.path)}
        return _train(config, output, say)


def _train(config: TrainConfig, output: Output, say: Callable[[str], None]) -> dict[str, Any]:
    with withheld():
        trainer = _set_up(config, output, say)
    if output.finished and trainer.step == trainer.total_steps:
        say(f"{output.path}: this run is finished (step {trainer.step}), nothing is left to do")
        return {"output_dir": str(output.path)}
    result = trainer.train()
    card = model_card(trainer.config, result)
    output.finish(trainer.config, trainer.step, trainer.model, trainer.tokenizer, card)
    return {**result, "output_dir": str(output.path)}


def _set_up(config: TrainConfig, output: Output, say: Callable[[str], None]) -> Trainer:
    """Everything that is loaded, checked and computed before the first step."""
    loss = _loss(config)
    attention_path(config)  # a backend that cannot be had here is an error before anything else
    config = adopt_adapter(config)
    optimizer = optimizer_path(config, run_device(config))
    activations, start = activations_path(config), output.checkpoint()
    bf16 = config.bf16
    if start is not None:
        state = read_state(start)
        check_keys(start, state, config)
        if bf16 is None and "identity" in state:  # not what this machine would choose
            bf16 = state["identity"]["precision"] == str(torch.bfloat16)
    set_seed(config.seed)
    check_model_files(config)
    device, tokenizer = _device(config), load_tokenizer(config)
    data = load_data(config, tokenizer, say)
    autocast = _precision(config, bf16, device, say)
    if config.memory == "auto":
        config = fit(config, data.train, load_model_config(config), device, autocast, say)
        activations = activations_path(config)
    policy = load_scorer(config, device, autocast, say)
    max_tokens = config.max_tokens_per_batch or TOKENS_PER_ROW[device.type]
    reference = None
    identity = {"precision": str(autocast)}
    if config.precompute_ref_log_probs:
        _, weights = precompute_reference(config, policy, data, max_tokens, say)
        identity["reference model"] = weights
    elif config.ref_model_name_or_path or not config.use_peft:
        reference = _second_model(config, policy, device, autocast, say)
        identity["reference model"] = weights_digest(reference.scorer.model)
    if config.use_peft:
        if config.ref_model_name_or_path or not config.precompute_ref_log_probs:
            identity["starting model"] = weights_digest(policy.model)
        own = _with_adapter(config, policy, say)
        reference = reference or (None if config.precompute_ref_log_probs else own)
    say(f"reference: {_describe_reference(config, reference)}")
    say(f"activations: {activations}")
    say(f"optimizer: {optimizer}")
    if config.gradient_checkpointing:
        transfer = transfer_of(device, output.path) if config.activation_offloading else None
        recompute_layers(policy.model, every=config.gradient_checkpointing_every, offload=transfer)
    if config.torch_compile:
        say(f"layers: {compile_layers(policy.model)} compiled")
    trainer = Trainer(
        config=config,
        objective=Objective(policy, loss, config.beta, reference),
        tokenizer=tokenizer,
        groups=data.train,
        eval_groups=data.evaluation,
        max_tokens=max_tokens,
        output=output,
        identity=identity,
        load_weights=lambda path: load_weights(policy.model, config, path),
        say=say,
    )
    say(
        f"training: {count_comparisons(data.train)} comparisons, {trainer.per_step} a step, "
        f"{trainer.total_steps} steps, rows of up to {max_tokens} tokens"
    )
    if device.type == "cpu":
        keep_freed_memory(max(max_tokens, longest_comparison(data.train, policy.layout.name)))
        return_freed_memory()
    if start is not None:
        trainer.resume(start, state)
    elif config.resume_from_checkpoint:
        say(f"resume_from_checkpoint: {output.path} holds no checkpoint, starting at step 0")
    return trainer


def _loss(config: TrainConfig) -> Callable[[Comparisons], torch.Tensor]:
    try:
        return make_loss(
            config.loss_type,
            beta=config.beta,
            label_smoothing=config.label_smoothing,
            loss_weights=config.loss_weights,
        )
    except ConfigError as error:  # which does not know where the key stood
        raise config.error("loss_type", str(error).removeprefix("loss_type: ")) from error


def precompute(config: TrainConfig, say: Callable[[str], None] = tqdm.write) -> dict[str, Any]:
    """Run `fastdpo precompute`: fills the reference cache, returns what was found and computed."""
    config.require("model_name_or_path", "dataset_name")
    with _surroundings(config, say), withheld():
        config = adopt_adapter(config)
        check_model_files(config)
        device, tokenizer = _device(config), load_tokenizer(config)
        data = load_data(config, tokenizer, say)
        autocast = _precision(config, config.bf16, device, say)
        policy = load_scorer(config, device, autocast, say)
        max_tokens = config.max_tokens_per_batch or TOKENS_PER_ROW[device.type]
        report, _ = precompute_reference(config, policy, data, max_tokens, say)
    return {"found": report.found, "computed": report.computed, "cache": str(report.directory)}


@contextmanager
def _surroundings(config: TrainConfig, say: Callable[[str], None]) -> Iterator[None]:
    """Terminal, network and memory, each of which may be less than what libraries expect."""
    with progress_bars(config.disable_tqdm), reached(config, say), enough_memory():
        yield


def load_data(config: TrainConfig, tokenizer: Any, say: Callable[[str], None]) -> Data:
    """Both splits as groups; evaluation is empty where nothing is evaluated."""
    model_config = load_model_config(config)
    vocab_size = getattr(model_config.get_text_config(), "vocab_size", None)

    def groups(name: str, split: str) -> list[Group]:
        rows = load_rows(
            name,
            split,
            config_name=config.dataset_config,
            num_proc=config.dataset_num_proc,
            skip_bad_rows=config.skip_bad_rows,
        )
        tokens, report = tokenize_dataset(
            rows,
            tokenizer,
            max_length=config.max_length,
            truncation_mode=config.truncation_mode,
            num_proc=config.dataset_num_proc,
            skip_bad_rows=config.skip_bad_rows,
            max_comparisons_per_group=config.max_comparisons_per_group,
            seed=config.seed,
            vocab_size=vocab_size,
            source=name,
        )
        made = make_groups(tokens, group_prompts=config.group_prompts, source=name)
        say(
            f"data: {report}; {len(made)} groups, {sum(len(g.responses) for g in made)} responses, "
            f"{count_comparisons(made)} comparisons{check_agreement(made)}"
        )
        return made

    assert config.dataset_name is not None
    training = groups(config.dataset_name, config.dataset_train_split)
    length, what = config.max_length, "max_length"
    if length is None:
        length = max(len(g.prompt) + len(response) for g in training for response in g.responses)
        what = "the longest sequence,"
    if warning := beyond_positions(model_config, length, what):
        say(f"note: {warning}")
    held_out = config.eval_source
    return Data(training, groups(*held_out) if held_out else [])


def load_scorer(
    config: TrainConfig,
    device: torch.device,
    autocast: torch.dtype | None,
    say: Callable[[str], None],
    path: str | None = None,
) -> Scorer:
    """A model with its head, checked against its own logits, and the row layout that is exact for
    it.
    """
    model = load_model(config, device, path, autocast, say)
    head, layout = find_head(model), Layout("padded", "", None)
    scorer = Scorer(model, head, layout, autocast, config.head_workspace_mib)
    with scorer.precision():
        check_causal(model)
        check_head(model, head)
        if config.attn_implementation is None:
            scorer.layout = choose_layout(
                model,
                share_prefix=config.share_prefix,
                max_length=config.max_length,
                attention_backend=config.attention_backend,
            )
        else:
            reason = f"padded: attn_implementation is {config.attn_implementation}"
            scorer.layout = Layout("padded", reason, None)
        if config.layer_tile_tokens is not None:
            say(f"tiles: {tile_layers(model, config.layer_tile_tokens)}")
    say(f"{'model' if path is None else 'reference model'}: {scorer.layout.reason}")
    if is_quantised(model):
        say(f"weights: {packing(model)}")
    place = find_model(config, path)
    if place.adapter is not None and config.use_peft:
        _put_on(scorer, place, config, path is None)
        say(f"adapter: {place.adapter}{', trained on' if path is None else ''}")
    if path is None:
        packed = scorer.layout.name != "padded"
        stock = f"{model.config._attn_implementation}: the model's own"
        sinks = any(name.endswith("sinks") for name, _ in model.named_parameters())
        say(f"attention: {attention_path(config, model.config, sinks) if packed else stock}")
        say(f"head: {head_path(config)}")
        if config.use_liger_kernel:
            say("layers: liger: use_liger_kernel asks for it")
    return scorer


def _put_on(scorer: Scorer, place: Place, config: TrainConfig, trained: bool) -> None:
    """Put the adapter that lies on disk on a scorer's model; a head with it is checked again."""
    if trained:
        check_targets(scorer.model, place, config)
    scorer.model = load_adapter(scorer.model, place, config.lora_dropout if trained else 0.0)
    scorer.head = find_head(scorer.model)
    with scorer.precision():
        check_head(scorer.model, scorer.head)


def precompute_reference(
    config: TrainConfig, policy: Scorer, data: Data, max_tokens: int, say: Callable[[str], None]
) -> tuple[ReferenceReport, str]:
    """Reference log-probabilities of every group, from the cache or from a pass over the data; and
    the digest of the reference's weights.
    """
    scorer = policy
    if config.ref_model_name_or_path:
        scorer = load_scorer(
            config, policy.device, policy.autocast, say, config.ref_model_name_or_path
        )
    root = Path(config.reference_cache_dir or cache_root() / "reference").expanduser()
    weights = weights_digest(scorer.model)
    store = LogpStore(root / model_fingerprint(scorer.model, scorer.autocast, weights))

    def progress(rows, total):
        return tqdm(rows, total=total, desc="reference", unit="row", disable=config.disable_tqdm)

    scorer.model.eval()
    report = fill_reference(
        [*data.train, *data.evaluation],
        scorer,
        store,
        max_tokens=max_tokens * REFERENCE_ROWS[scorer.device.type],
        progress=progress,
    )
    say(f"reference log-probabilities: {report}")
    return report, weights


def load_weights(model: Any, config: TrainConfig, path: Path) -> None:
    """Put the weights (or the adapter) of a checkpoint into the model that is being trained."""
    if config.use_peft:
        from peft import load_peft_weights, set_peft_model_state_dict

        adapter = path / "adapter_model.safetensors"
        if not adapter.exists():
            raise CheckpointError(f"{path}: holds no adapter, but use_peft is set")
        try:
            loaded = set_peft_model_state_dict(model, load_peft_weights(str(path), device="cpu"))
        except RuntimeError as error:
            raise CheckpointError(f"{path}: its adapter has other shapes ({error})") from error
        missing = [name for name in loaded.missing_keys if "lora_" in name]
        if missing or loaded.unexpected_keys:
            names = ", ".join([*missing, *loaded.unexpected_keys][:3])
            raise CheckpointError(f"{path}: its adapter is on other modules ({names})")
        return
    if not (path / "config.json").exists():
        raise CheckpointError(f"{path}: holds no full model, but use_peft is not set")
    saved = load_model(config, torch.device("cpu"), str(path))
    try:
        model.load_state_dict(saved.state_dict())
    except RuntimeError as error:
        raise CheckpointError(f"{path}: holds another model ({error})") from error


def _with_adapter(
    config: TrainConfig, policy: Scorer, say: Callable[[str], None]
) -> OnlineReference:
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
        say(f"model: {reason}")
    if not loaded:
        return OnlineReference(policy, adapter_off=True)
    return OnlineReference(policy, start=trained_parameters(policy.model))


def _second_model(config, policy: Scorer, device, autocast, say) -> OnlineReference:
    path = config.ref_model_name_or_path or config.model_name_or_path
    scorer = load_scorer(config, device, autocast, say, path)
    scorer.model.requires_grad_(False)
    weaker = max(policy.layout, scorer.layout, key=lambda layout: _ORDER.index(layout.name))
    if policy.layout.name != scorer.layout.name:
        raise ModelError(
            f"the policy packs {policy.layout.name} rows and the reference "
            f"{scorer.layout.name} ones ({weaker.reason}); use precompute_ref_log_probs: true"
        )
    return OnlineReference(scorer)


def _describe_reference(config: TrainConfig, reference: OnlineReference | None) -> str:
    if reference is None:
        return "precomputed, no reference model during training"
    if reference.start is not None:
        return "the policy with its adapter as it was at the start"
    return "the policy with its adapter off" if reference.adapter_off else "a second model, online"


def _device(config: TrainConfig) -> torch.device:
    world = os.environ.get("WORLD_SIZE", "1")
    if not world.isdecimal() or int(world) > 1:
        raise ConfigError(
            f"WORLD_SIZE: expected 1, since several processes are not supported yet, got {world}"
        )
    if run_device(config).type == "cpu":
        keep_freed_memory()
    if config.tf32 is not None:
        torch.backends.cuda.matmul.allow_tf32 = config.tf32
    return run_device(config)


def _precision(
    config: TrainConfig, bf16: bool | None, device: torch.device, say: Callable[[str], None]
) -> torch.dtype | None:
    """bf16 autocast where it is asked for or faster; None for the weights' own precision."""
    autocast, reason = choose_precision(bf16, device)
    say(f"precision: {'bf16 autocast' if autocast else config.dtype} on {device.type} ({reason})")
    return autocast
