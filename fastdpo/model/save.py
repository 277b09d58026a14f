"""Writing a model so that the stack loads it, whatever its own configuration files hold."""

from pathlib import Path
from typing import Any

from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig

from .dropout import original_dropout
from .head import base_causal_lm
from .sharding import is_sharded


def whole_state(model: Any) -> dict[str, Tensor] | None:
    """The state of a sharded model, or of its adapter, on the first rank's host: gathered tensor by
    tensor, so that no device holds more than one of them. Empty on the other ranks, which all have
    to call it; None where the model is whole anyway.
    """
    if not is_sharded(model):
        return None
    adapter = hasattr(model, "peft_config")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapter)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    for name, weight in model.named_parameters() if adapter else ():
        base = name.endswith(".base_layer.weight")
        if base and any(f".{kind}." in name for kind in EMBEDDING_LAYER_NAMES):
            whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
            if state:  # on the first rank
                state[name] = whole.detach().cpu()
    first: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        own = first.setdefault(parameter, name)
        if own in state and name in state:  # transformers saves a tied weight once
            state[name] = state[own]
    return state


def save_weights(
    model: Any, path: Path, state: dict[str, Tensor] | None = None, **options: Any
) -> None:
    """The model, or its adapter alone, as `AutoModelForCausalLM` or peft loads it; `state` is that
    of `whole_state`, and further options are those of `save_pretrained`.

    transformers refuses to save a generation configuration that it calls invalid (sampling flags
    without `do_sample`, which published models have), after everything has been trained; here it is
    written as it was read.
    """
    base = base_causal_lm(model)
    given = options if state is None else {"state_dict": state, **options}
    generation = getattr(base, "generation_config", None)
    with original_dropout(base):
        if generation is None or base is not model:
            model.save_pretrained(path, **given)
            return
        base.generation_config = GenerationConfig()
        try:
            model.save_pretrained(path, **given)
        finally:
            base.generation_config = generation
        generation.to_json_file(path / "generation_config.json")
