"""Package definition: `fastdpo` (the trainer) and `fastdpo_kernels` (the head, importable on its
own).
"""

from pathlib import Path

from setuptools import find_packages, setup

MEMORY = ["bitsandbytes>=0.50", "torchao>=0.18"]

TEST = [
    *MEMORY,
    "gguf>=0.17",
    "hatchling",
    "hypothesis",
    'liger-kernel>=0.8.5,<0.9; platform_system == "Linux"',
    "pytest>=8",
    "pytest-benchmark",
    "pytest-xdist",
    "trl==1.16.0",
]

setup(
    name="fastdpo",
    version="0.1.0",
    description="Direct Preference Optimization, fast and frugal: shared prefixes, fused heads",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
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
        "datasets>=4.7",
        "peft>=0.19",
        "safetensors",
        "pyyaml",
        "xxhash",
        "tqdm",
    ],
    extras_require={
        "demo": ["gguf>=0.17"],
        "flash": ["flash-attn"],
        "gpu": ["liger-kernel"],
        "memory": MEMORY,
        "test": TEST,
        "dev": [*TEST, "mypy", "ruff", "types-PyYAML"],
    },
    entry_points={"console_scripts": ["fastdpo=fastdpo.cli:main"]},
)
