"""The committed generated code is what the protos give."""

import sys
from pathlib import Path

from embedding_service import wire

sys.path.insert(0, str(Path(__file__).parent.parent / "protos"))
from generate import generate


def test_generated_code_is_up_to_date(tmp_path: Path) -> None:
    generate(tmp_path)
    committed = Path(wire.__file__).parent
    fresh = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert fresh
    assert fresh == {path.name: path.read_text() for path in committed.glob("*_pb2*.py*")}, "run `make proto`"
