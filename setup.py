"""Package definition of `fastdpo`, the trainer. Its head, `fastdpo-kernels`, is a distribution of
its own in `kernels/`, of the same version: pip install -e ./kernels -e .
"""

from pathlib import Path
from runpy import run_path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = run_path(str(HERE / "fastdpo" / "version.py"))["__version__"]

CHECK = ["py3langid>=0.3", "rensa>=0.5"]
DEMO = ["gguf>=0.17"]
GPU = ['liger-kernel>=0.8.5; platform_system == "Linux"']
MEMORY = ["bitsandbytes>=0.50", "torchao>=0.18"]
ROUNDS = ["math-verify>=0.8"]

TEST = [
    *CHECK,
    *DEMO,
    *GPU,
    *MEMORY,
    *ROUNDS,
    "hatchling>=1.27",
    "hypothesis>=6.100",
    "kernels>=0.17",
    "pytest>=8",
    "pytest-benchmark>=5",
    "pytest-xdist>=3.6",
    "tensorboard>=2.18",
    'triton>=3.6; platform_system == "Linux"',
    'trl==1.16.0; python_version >= "3.11"',
]

setup(
    name="fastdpo",
    version=VERSION,
    description="Direct Preference Optimization, fast and frugal: shared prefixes, fused heads",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["fastdpo", "fastdpo.*"]),
    package_data={
        "fastdpo": ["py.typed"],
        "fastdpo.demo": ["*.jsonl", "*.yaml"],
        "fastdpo.report": ["templates/*"],
    },
    install_requires=[
        f"fastdpo-kernels=={VERSION}",
        "torch>=2.11",
        "transformers>=5.17,<6",
        "datasets>=5",
        "peft>=0.19",
        "plotly>=6",
        "jinja2>=3.1",
        "markupsafe>=2.1",
        "numpy>=2",
        "pyyaml>=6",
        "safetensors>=0.5",
        "tokenizers",
        "tqdm>=4.66",
        "typing-extensions",
        "xxhash>=3.4",
    ],
    extras_require={
        "check": CHECK,
        "demo": DEMO,
        "flash": ["flash-attn"],
        "gpu": GPU,
        "memory": MEMORY,
        "rounds": ROUNDS,
        "test": TEST,
        "dev": [*TEST, "mypy>=1.15", "ruff>=0.9", "types-PyYAML", "uv"],
    },
    entry_points={"console_scripts": ["fastdpo=fastdpo.cli:main"]},
)
