"""Writing a model so that the stack loads it, whatever its own configuration files hold."""

from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from .dropout import original_dropout
from .head import base_causal_lm


def save_weights(model: Any, path: Path) -> None:
    """The model, or its adapter alone, as `AutoModelForCausalLM` or peft loads it.

    transformers refuses to save a generation configuration that it calls invalid (sampling flags
    without `do_sample`, which published models have), after everything has been trained; here it is
    written as it was read.
    """
    base = base_causal_lm(model)
    generation = getattr(base, "generation_config", None)
    with original_dropout(base):
        if generation is None or base is not model:
            model.save_pretrained(path)
            return
        base.generation_config = GenerationConfig()
        try:
            model.save_pretrained(path)
        finally:
            base.generation_config = generation
        generation.to_json_file(path / "generation_config.json")
