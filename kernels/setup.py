"""Package definition of `fastdpo-kernels`: the head alone, which needs torch and nothing else."""

from pathlib import Path
from runpy import run_path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="fastdpo-kernels",
    version=run_path(str(HERE / "fastdpo_kernels" / "version.py"))["__version__"],
    description="Log-probabilities and preference losses out of a language-model head, no logits",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(str(HERE), include=["fastdpo_kernels", "fastdpo_kernels.*"]),
    package_data={"fastdpo_kernels": ["py.typed"]},
    install_requires=["torch>=2.11"],
)
