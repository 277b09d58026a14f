"""The models that the CPU benchmarks train: a tiny Llama with a real vocabulary, and
SmolLM2-135M-Instruct.
"""

from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fastdpo.demo.model import demo_model_path
from fastdpo.files import atomic_directory, cache_root

NAMES = ("tiny-llama", "smollm2-135m")


def model_path(name: str) -> Path:
    """A local directory with weights and tokenizer, made once in the user's cache. KeyError if
    unknown.
    """
    return {"tiny-llama": _tiny_llama, "smollm2-135m": demo_model_path}[name]()


def _tiny_llama() -> Path:
    """Llama of 4 layers, width 256, V = 49152 (SmolLM2's tokenizer), random weights, 28.7M
    parameters.
    """
    path = cache_root() / "models" / "tiny-llama-4x256"
    if path.exists():
        return path
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    with atomic_directory(path) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return path
