"""Generate embedding_service/wire/ from protos/embedding/v1/ (`make proto`).

The files are registered under their own names (embedding/v1/*.proto), as reflection and other languages see them. Only
Python's import lines are pointed at the package that they lie in.

grpcio-tools is held at 1.74 (protobuf 6.31) on purpose. Generated code runs with its own major version of the runtime
and the next one, and model stacks carry both.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
WIRE = ROOT / "embedding_service" / "wire"


def generate(out: Path) -> None:
    """Write the generated modules into the folder `out`."""
    import tempfile

    from grpc_tools import protoc

    sources = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.glob("embedding/v1/*.proto"))
    with tempfile.TemporaryDirectory() as scratch:
        arguments = ["protoc", f"-I{PROTOS}", f"--python_out={scratch}", f"--pyi_out={scratch}"]
        if protoc.main([*arguments, f"--grpc_python_out={scratch}", *sources]) != 0:
            sys.exit("protoc failed; its messages are above")
        for path in sorted(Path(scratch, "embedding/v1").iterdir()):
            text = path.read_text()
            text = re.sub(r"^from embedding\.v1 import", "from embedding_service.wire import", text, flags=re.M)
            (out / path.name).write_text(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=WIRE)
    generate(parser.parse_args().out)
