"""Base models with linear layers in 4 bits (bitsandbytes), for adapters on top of them (QLoRA).

Embeddings, norms and the output head stay in `dtype`. peft's `prepare_model_for_kbit_training`
would make them float32, which is what `dtype` is unless set otherwise; freezing is left to peft and
recomputed layers need no gradient of their inputs, so nothing of it is missing here.
"""

from typing import Any

import torch
from transformers import BitsAndBytesConfig

from ..config import TrainConfig
from ..errors import ModelError, one_line
from ..extras import need
from .frozen import frozen_state, probe_tokens


def quantisation(config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantise while loading, on the device itself.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    if not config.load_in_4bit:
        return {}
    need("bitsandbytes", "load_in_4bit")
    fourbit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.use_bnb_nested_quant,
        bnb_4bit_quant_storage=config.bnb_4bit_quant_storage,
    )
    return {"quantization_config": fourbit, "device_map": {"": device}}


def is_quantised(model: Any) -> bool:
    """Whether transformers loaded it with quantised weights."""
    return getattr(model, "hf_quantizer", None) is not None


def compute_in(model: Any, autocast: torch.dtype | None) -> None:
    """Let 4-bit layers multiply in the type of `autocast`, or in that of the other weights.

    bitsandbytes' products do not see autocast, and would otherwise run in the type of their input.
    """
    dtype = autocast or model.get_output_embeddings().weight.dtype
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            module.compute_dtype, module.compute_type_is_set = dtype, True
            state.dtype = dtype  # what the backward's products unpack to
            if module.bias is not None:  # as the first product would do
                module.bias.data = module.bias.data.to(dtype)
            # Evaluation on a CPU would repack weights so that no gradient passes through them.
            module.support_avx512bf16_for_cpu = False


def check_packed(model: Any) -> None:
    """Raise ModelError where `load_in_4bit` found nothing to quantise, or the model does not run
    with what it quantised.
    """
    name = type(model).__name__
    if not any(hasattr(parameter, "quant_state") for parameter in model.parameters()):
        raise ModelError(f"load_in_4bit: {name} has no linear layers that bitsandbytes knows")
    try:
        with frozen_state(model):
            model(input_ids=probe_tokens(model, 4)[None], use_cache=False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # an architecture that reads weights itself may fail in any way
        raise ModelError(
            f"load_in_4bit: {name} does not run in 4 bits ({one_line(error)})"
        ) from error


def packing(model: Any) -> str:
    """How the weights are held, for the first lines of a run."""
    states = [s for p in model.parameters() if (s := getattr(p, "quant_state", None)) is not None]
    if not states:
        method = model.hf_quantizer.quantization_config.quant_method
        return f"quantised by {getattr(method, 'value', method)}"
    kind = f"{states[0].quant_type} with {'8-bit' if states[0].nested else 'fp32'} scales"
    rest = model.get_output_embeddings().weight.dtype
    return (
        f"{len(states)} matrices in 4 bits ({kind}), multiplied in {_name(states[0].dtype)}; the "
        f"rest in {_name(rest)}"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def count_weights(parameter: torch.Tensor) -> int:
    """Elements of a weight, which its 4-bit form packs into half as many bytes."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else torch.Size(state.shape).numel()
