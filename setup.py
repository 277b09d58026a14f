"""Package definition: `fastdpo` (the trainer) and `fastdpo_kernels` (the head, importable on its
own).
"""

from pathlib import Path
from runpy import run_path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

DEMO = ["gguf>=0.17"]
GPU = ['liger-kernel>=0.8.5,<0.9; platform_system == "Linux"']
MEMORY = ["bitsandbytes>=0.50", "torchao>=0.18"]

TEST = [
    *DEMO,
    *GPU,
    *MEMORY,
    "hatchling>=1.27",
    "hypothesis>=6.100",
    "pytest>=8",
    "pytest-benchmark>=5",
    "pytest-xdist>=3.6",
    "trl==1.16.0",
]

setup(
    name="fastdpo",
    version=run_path(str(HERE / "fastdpo" / "version.py"))["__version__"],
    description="Direct Preference Optimization, fast and frugal: shared prefixes, fused heads",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["fastdpo", "fastdpo.*"]) + find_packages("kernels"),
    package_dir={"fastdpo_kernels": "kernels/fastdpo_kernels"},
    package_data={
        "fastdpo": ["py.typed"],
        "fastdpo.demo": ["*.jsonl", "*.yaml"],
        "fastdpo_kernels": ["py.typed"],
    },
    install_requires=[
        "torch>=2.11,<2.14",
        'triton>=3.6,<3.8; platform_system == "Linux"',
        "transformers>=5.17,<6",
        "datasets>=5",
        "peft>=0.19",
        "jinja2>=3.1",
        "numpy>=2",
        "pyyaml>=6",
        "safetensors>=0.5",
        "tokenizers",
        "tqdm>=4.66",
        "xxhash>=3.4",
    ],
    extras_require={
        "demo": DEMO,
        "flash": ["flash-attn"],
        "gpu": GPU,
        "memory": MEMORY,
        "test": TEST,
        "dev": [*TEST, "mypy>=1.15", "ruff>=0.9", "types-PyYAML", "uv"],
    },
    entry_points={"console_scripts": ["fastdpo=fastdpo.cli:main"]},
)
