"""The keys of TRL and transformers that fastdpo does not have, and what to do in place of each.

The table is static so that reading a configuration imports neither library; a test compares it with
the installed ones.
"""

from .accelerate import of_accelerate_config
from .parallel_peers import (
    MESH,
    of_accelerator_config,
    of_fsdp,
    of_fsdp_config,
    of_local_rank,
)
from .peer_key import PeerKey

_LOADER = "Rows are packed before the run, so there is no data loader to set up."
_COMPILE = "torch_compile: true compiles the layers with torch's default backend and mode."
_METRICS = "Evaluation reports the metrics of the loss and no others."
_SUMMED = "Gradients are summed once a step, without DDP."
_NODES = "The first process alone logs and saves."
_LAYER_KERNELS = "use_liger_kernel takes all of Liger's kernels for layers; the head is ours."

PEER_KEYS: dict[str, PeerKey] = {
    # Model
    "disable_dropout": PeerKey(True, "The model's dropout is always off."),
    "model_init_kwargs": PeerKey(
        None, "Use model_revision, dtype, trust_remote_code and attn_implementation."
    ),
    "router_aux_loss_coef": PeerKey(None, "The balance loss of experts is not added to the loss."),
    "pad_token": PeerKey(
        None, "Nothing is padded; set the token in the tokenizer if you need one."
    ),
    "use_cache": PeerKey(False, "Training keeps no key-value cache."),
    "activation_checkpointing": PeerKey(None, "Use gradient_checkpointing."),
    "activation_checkpointing_kwargs": PeerKey(None, "Use gradient_checkpointing_every."),
    "gradient_checkpointing_kwargs": PeerKey(
        None, "Every layer is checkpointed, without re-entrance.", also=({"use_reentrant": False},)
    ),
    "neftune_noise_alpha": PeerKey(None, "Noise on the embeddings is not supported."),
    "liger_kernel_config": PeerKey(None, _LAYER_KERNELS),
    "load_in_8bit": PeerKey(False, "Use load_in_4bit."),
    "lora_target_parameters": PeerKey(None, "Adapters go on modules: use lora_target_modules."),
    "lora_task_type": PeerKey("CAUSAL_LM", "Only causal language models are trained."),
    # Data
    "padding_free": PeerKey(False, "Nothing is ever padded.", also=(True,)),
    "pad_to_multiple_of": PeerKey("auto", "Nothing is padded.", also=(None,)),
    "padding_value": PeerKey(None, "Nothing is padded."),
    "is_encoder_decoder": PeerKey(None, "Only causal language models are trained.", also=(False,)),
    "streaming": PeerKey(
        False, "Use dataset_streaming.", means={"true": ("dataset_streaming", True)}
    ),
    "test_split_size": PeerKey(None, "Split the data first and set eval_dataset_name."),
    "remove_unused_columns": PeerKey(
        True, "Columns that are not needed are never read.", also=(False,)
    ),
    "train_sampling_strategy": PeerKey(
        "random",
        "Use shuffle: false for the file's order; packing balances lengths by itself.",
        means={"sequential": ("shuffle", False)},
    ),
    "length_column_name": PeerKey("length", "Lengths are measured, not read."),
    "label_names": PeerKey(None, "Labels are made from the responses."),
    "dataloader_drop_last": PeerKey(False, "The last, smaller step is taken."),
    "dataloader_num_workers": PeerKey(0, _LOADER),
    "dataloader_pin_memory": PeerKey(True, _LOADER),
    "dataloader_persistent_workers": PeerKey(False, _LOADER),
    "dataloader_prefetch_factor": PeerKey(None, _LOADER),
    "dataloader_multiprocessing_context": PeerKey(None, _LOADER),
    "dataloader_in_order": PeerKey(True, _LOADER),
    "accelerator_config": PeerKey(None, _LOADER, also=({},), read=of_accelerator_config),
    # Reference and loss
    "precompute_ref_batch_size": PeerKey(
        None, "The reference pass is packed by tokens: use max_tokens_per_batch."
    ),
    "label_smoothing_factor": PeerKey(0.0, "Use label_smoothing."),
    # Training
    "fp16": PeerKey(False, "Use bf16: half precision would need a loss scale."),
    "fp16_full_eval": PeerKey(False, "Evaluation computes as training does: use bf16."),
    "bf16_full_eval": PeerKey(False, "Evaluation computes as training does: use bf16."),
    "optim_args": PeerKey(None, "Use adam_beta1, adam_beta2, adam_epsilon and weight_decay."),
    "optim_target_modules": PeerKey(None, "Use use_peft for training few parameters."),
    "average_tokens_across_devices": PeerKey(
        True,
        "The loss is the mean over what a step holds, however long its responses are.",
        also=(False,),
    ),
    "torch_compile_backend": PeerKey(None, _COMPILE),
    "torch_compile_mode": PeerKey(None, _COMPILE),
    "torch_empty_cache_steps": PeerKey(None, "Lower max_tokens_per_batch to save memory."),
    "auto_find_batch_size": PeerKey(
        False, "Use memory: auto, which fits rows and switches to the device."
    ),
    "full_determinism": PeerKey(
        False, "Set seed; the kernels' order of additions is the device's."
    ),
    "ignore_data_skip": PeerKey(False, "A resumed run goes on where the checkpoint was taken."),
    "restore_callback_states_from_checkpoint": PeerKey(
        False, "Checkpoints hold no states of callbacks; early_stopping_patience is resumed."
    ),
    "local_rank": PeerKey(-1, "Leave it out.", read=of_local_rank),
    "do_train": PeerKey(False, "The train command trains.", also=(True,)),
    "do_predict": PeerKey(False, "There is nothing to predict."),
    "debug": PeerKey("", "Not available.", also=([],)),
    "skip_memory_metrics": PeerKey(True, "peak_memory_mib is always reported."),
    # Many devices; what a later one says of data_parallel refines what an earlier one says
    "accelerate_config": PeerKey(None, "Use devices and data_parallel.", read=of_accelerate_config),
    "fsdp": PeerKey(None, "Use data_parallel.", also=("", [], False), read=of_fsdp),
    "fsdp_config": PeerKey(
        None, "Use data_parallel.", also=({},), read=of_fsdp_config, needs="fsdp"
    ),
    "parallelism_config": MESH,
    "deepspeed": PeerKey(
        None,
        "Use data_parallel: fsdp, which shards weights, gradients and optimizer states as ZeRO's "
        "stage 3 does.",
    ),
    "ddp_find_unused_parameters": PeerKey(None, _SUMMED, also=(False, True)),
    "ddp_bucket_cap_mb": PeerKey(None, _SUMMED, also=(25,)),
    "ddp_broadcast_buffers": PeerKey(None, _SUMMED, also=(False, True)),
    "ddp_static_graph": PeerKey(None, _SUMMED, also=(False, True)),
    "ddp_backend": PeerKey(
        None, "GPUs exchange over nccl and CPUs over gloo: leave it out.", also=("nccl",)
    ),
    "ignore_bias_buffers": PeerKey(False, _SUMMED, also=(True,)),
    # Evaluation
    "generate_during_eval": PeerKey(
        False, "Evaluation does not generate: sample from the saved model."
    ),
    "eval_delay": PeerKey(0, "Use eval_steps."),
    "prediction_loss_only": PeerKey(False, _METRICS),
    "eval_do_concat_batches": PeerKey(True, _METRICS),
    "eval_use_gather_object": PeerKey(False, _METRICS),
    "eval_accumulation_steps": PeerKey(None, "Evaluation keeps no logits, so nothing piles up."),
    "include_for_metrics": PeerKey([], _METRICS),
    "batch_eval_metrics": PeerKey(False, _METRICS),
    # Logging
    "logging_strategy": PeerKey("steps", "Use logging_steps."),
    "log_on_each_node": PeerKey(True, _NODES, also=(False,)),
    "log_level": PeerKey("passive", "Set TRANSFORMERS_VERBOSITY for transformers' messages."),
    "log_level_replica": PeerKey("warning", _NODES),
    "logging_nan_inf_filter": PeerKey(True, "A loss that is not a number stops the run."),
    "include_num_input_tokens_seen": PeerKey(
        "no", "num_tokens is always reported.", also=(False, True, "all", "non_padding")
    ),
    "trackio_static_space_id": PeerKey(
        None, "Freeze the Space with trackio's own command.", also=(False,)
    ),
    # Saving
    "save_on_each_node": PeerKey(False, _NODES),
    "enable_jit_checkpoint": PeerKey(False, "Use save_steps."),
}
