"""Lay the package out as Hugging Face's `kernels` library loads a universal kernel:

    python kernels/hub.py FOLDER

after which `kernels.get_local_kernel(Path(FOLDER))` is the package, under a name of its own.
"""

import argparse
import hashlib
import json
import shutil
from pathlib import Path
from runpy import run_path

PACKAGE = Path(__file__).parent / "fastdpo_kernels"
VARIANT = "torch-universal"


def lay_out(folder: Path) -> Path:
    """Write the kernel into `folder`/build, in place of one that is there; returns where it is."""
    place = folder / "build" / VARIANT
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(PACKAGE, place, ignore=shutil.ignore_patterns("__pycache__"))
    digest = hashlib.sha256()
    for file in sorted(place.rglob("*.py")):
        digest.update(file.relative_to(place).as_posix().encode() + file.read_bytes())
    metadata = {
        "id": f"_fastdpo_kernels_{digest.hexdigest()[:12]}",
        "name": "fastdpo-kernels",
        "version": int(run_path(str(PACKAGE / "version.py"))["__version__"].split(".")[0]),
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    (place / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    return place


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    print(lay_out(parser.parse_args().folder))
