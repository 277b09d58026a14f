"""Keys that earlier releases of TRL and transformers had, and what other trainers call ours."""

from types import MappingProxyType

_SIDE = "Use max_length: it covers prompt and response together."
_NOT_PADDED = "Nothing is padded, so there is no such value: remove the key."
_ONE_ADAPTER = (
    "One adapter is trained and the reference is the model with it switched off: remove the key."
)
_ALWAYS = "That is always so: remove the key."
GPU_BF16 = "Use bf16."

REPLACED_KEYS = MappingProxyType(
    {
        # TRL's DPOConfig, ModelConfig and ScriptArguments
        "rpo_alpha": "Use loss_type: [sigmoid, sft] with loss_weights: [1, rpo_alpha].",
        "reference_free": "Use a loss without a reference, such as loss_type: cpo.",
        "ref_model_init_kwargs": "The reference is loaded with the options of the model.",
        "model_adapter_name": _ONE_ADAPTER,
        "ref_adapter_name": _ONE_ADAPTER,
        "force_use_ref_model": "Use ref_model_name_or_path, with adapters too.",
        "label_pad_token_id": _NOT_PADDED,
        "max_prompt_length": _SIDE,
        "max_target_length": _SIDE,
        "tools": "Give each row a tools column.",
        "use_liger_loss": "The head is always fused: remove the key.",
        "use_logits_to_keep": _ALWAYS,
        "use_num_logits_to_keep": _ALWAYS,
        "base_model_attribute_name": "The head is found by itself: remove the key.",
        "torch_dtype": "Use dtype.",
        "gradient_checkpointing_use_reentrant": "It is never re-entrant: remove the key.",
        # transformers' TrainingArguments
        "warmup_ratio": "Use warmup_steps: a value below 1 is a share of the run.",
        "evaluation_strategy": "Use eval_strategy.",
        "evaluate_during_training": "Use eval_strategy.",
        "no_cuda": "Use use_cpu.",
        "use_mps_device": "Remove the key: the device is found by itself.",
        "group_by_length": "Packing balances lengths by itself: remove the key.",
        "save_safetensors": "Weights are always written as safetensors: remove the key.",
        "adafactor": "Use optim.",
        "per_gpu_train_batch_size": "Use per_device_train_batch_size.",
        "per_gpu_eval_batch_size": "Use per_device_eval_batch_size.",
        "fp16_opt_level": GPU_BF16,
        "fp16_backend": GPU_BF16,
        "half_precision_backend": GPU_BF16,
        "bf16_no_autocast": GPU_BF16,
        "past_index": "Remove the key: training keeps no cache.",
        "include_tokens_per_second": "tokens_per_second is always reported: remove the key.",
        "include_inputs_for_metrics": "Evaluation reports the loss's own metrics: remove the key.",
        "torchdynamo": "Use torch_compile.",
        "push_to_hub_model_id": "Use hub_model_id.",
        "push_to_hub_organization": "Use hub_model_id: it may begin with the owner.",
        "push_to_hub_token": "Use hub_token.",
        "overwrite_cache": "Cached results are keyed by all they depend on: remove the key.",
        "env": "Set environment variables in the shell that starts the run.",
    }
)

OTHER_NAMES = MappingProxyType(
    {
        "lr": "learning_rate",
        "model": "model_name_or_path",
        "model_name": "model_name_or_path",
        "base_model": "model_name_or_path",
        "ref_model": "ref_model_name_or_path",
        "dataset": "dataset_name",
        "datasets_path": "dataset_name",
        "train_file": "dataset_name",
        "eval_dataset": "eval_dataset_name",
        "eval_file": "eval_dataset_name",
        "batch_size": "per_device_train_batch_size",
        "train_batch_size": "per_device_train_batch_size",
        "micro_batch_size": "per_device_train_batch_size",
        "eval_batch_size": "per_device_eval_batch_size",
        "grad_accum": "gradient_accumulation_steps",
        "epochs": "num_train_epochs",
        "num_epochs": "num_train_epochs",
        "steps": "max_steps",
        "scheduler": "lr_scheduler_type",
        "lr_scheduler": "lr_scheduler_type",
        "optimizer": "optim",
        "cutoff_len": "max_length",
        "sequence_len": "max_length",
        "max_seq_length": "max_length",
        "pref_beta": "beta",
        "dpo_beta": "beta",
        "pref_loss": "loss_type",
        "loss": "loss_type",
        "lora_rank": "lora_r",
        "lora_target": "lora_target_modules",
        "output": "output_dir",
        "packing": "share_prefix",
        "num_processes": "devices",
        "nproc_per_node": "devices",
        "num_gpus": "devices",
        "n_gpu": "devices",
        "gpus": "devices",
        "ddp": "data_parallel",
        "sharding_strategy": "data_parallel",
        "strategy": "data_parallel",
        "dp_shard_size": "data_parallel",
        "context_parallel_size": "cp_size",
        "sequence_parallel_size": "cp_size",
        "peft": "use_peft",
        "lora": "use_peft",
        "resume": "resume_from_checkpoint",
        "patience": "early_stopping_patience",
        "early_stopping": "early_stopping_patience",
        "wandb_project": "project",
        "wandb_name": "run_name",
        "repo_id": "hub_model_id",
    }
)
"""What people call a key elsewhere: names the right one in the error for an unknown key."""
