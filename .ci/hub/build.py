"""Builds a repository for Hugging Face's kernels hub from `kernels/`: `python .ci/hub/build.py [--out hub-out]`, or `make hub`.

The folder that it writes is what `kernels.get_local_kernel` loads by its path, and what `kernel-builder upload` would upload.
Nothing is uploaded here. Only Python's own library is needed.

    hub-out/
      README.md                the card, CARD.md of this folder
      LICENSE
      build/torch-cuda/        a variant for each backend of torch; their code is the same
        __init__.py            api.py of this folder
        launchers/             kernels/*.py
        fastpg_kernels/        for old versions of `kernels`, which look for the package in a folder of its name
        metadata.json

The layout is that of https://huggingface.co/docs/kernels/kernel-requirements.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import shutil
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NAME = "fastpg-kernels"
# On a CPU the kernels run in Triton's interpreter alone. No list of architectures: kernels/blocks.py has tiles for any.
BACKENDS = ("cuda", "rocm", "cpu")

OLDER = '''"""For versions of `kernels` that look here for the package, which is the folder above."""

import importlib.util
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location("{id}", Path(__file__).resolve().parents[1] / "__init__.py")
_package = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _package
_spec.loader.exec_module(_package)
__all__ = _package.__all__
globals().update({{name: getattr(_package, name) for name in __all__}})
'''


def version() -> int:
    """The first part of fastpg's version. By the hub's convention 0 is a kernel that may change at any time."""
    (found,) = re.findall(r'^__version__ = "(\d+)\.', (ROOT / "fastpg" / "__init__.py").read_text(), re.MULTILINE)
    return int(found)


def sources() -> dict[str, bytes]:
    """The files that all variants share, by their place in a variant."""
    launchers = {f"launchers/{path.name}": path.read_bytes() for path in sorted((ROOT / "kernels").glob("*.py"))}
    return {"__init__.py": (HERE / "api.py").read_bytes(), **launchers}


def write_variant(folder: Path, backend: str) -> None:
    files = sources()
    # Two builds may be loaded in one process, each as a module named by its id: other sources need another id.
    content = hashlib.sha256(b"".join(files.values())).hexdigest()
    module = NAME.replace("-", "_")
    metadata = {
        "name": NAME,
        "id": f"_{module}_{backend}_{content[:7]}",
        "version": version(),
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
    }
    files[f"{module}/__init__.py"] = OLDER.format(id=metadata["id"]).encode()
    digests = {name: base64.b64encode(hashlib.sha256(text).digest()).decode() for name, text in sorted(files.items())}
    metadata["digest"] = {"algorithm": "sha256", "files": digests}
    files["metadata.json"] = (json.dumps(metadata, indent=2) + "\n").encode()
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)


def build(out: Path) -> None:
    shutil.rmtree(out / "build", ignore_errors=True)
    for backend in BACKENDS:
        write_variant(out / "build" / f"torch-{backend}", backend)
    shutil.copy(HERE / "CARD.md", out / "README.md")
    shutil.copy(ROOT / "LICENSE", out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("hub-out"), help="the folder to write; default: hub-out")
    out = parser.parse_args().out.resolve()
    build(out)
    print(f"{NAME}, version {version()}, for {', '.join(BACKENDS)}: {out}")


if __name__ == "__main__":
    main()
