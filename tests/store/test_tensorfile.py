"""safetensors headers: what the format does not allow is refused in one line, and nothing is waited for."""

import json
import os
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.json_values import JUNK

from embedding_service.errors import BadTensorFile
from embedding_service.tensorfile import read_spans


def write(path: Path, header: object, data: int = 16) -> Path:
    """A file with this header (bytes as they are) and `data` bytes of data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    return path


def entry(begin: object = 0, end: object = 16, shape: object = (2, 2), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(), "b": entry()}, "tensor 'b' overlaps tensor 'a'"),
        ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, "'b' overlaps"),
        ({"a": entry(0, 8, [2]), "b": entry(12, 16, [1])}, "'b' leaves a hole after tensor 'a'"),
        ({"a": entry(4, 16, [3])}, "'a' leaves a hole after the header"),
        ({"a": entry(0, 8, [2])}, "8 bytes that belong to no tensor"),
        ({}, "16 bytes that belong to no tensor"),
        (b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), "two entries 'a'"),
        (b'{"a":{"dtype":"F32","dtype":"F32","shape":[4],"data_offsets":[0,16]}}', "two entries 'dtype'"),
        ({"a": entry(shape=[2.0, 2.0])}, "no valid shape"),
        ({"a": entry(shape=[True, 4])}, "no valid shape"),
        ({"a": entry(shape=[-2, -2])}, "no valid shape"),
        ({"a": entry(shape=[1 << 63, 2])}, "no valid shape"),
        ({"a": entry(shape=[1] * 65)}, "no valid shape"),
        ({"a": entry(shape="22")}, "no valid shape"),
        ({"a": entry(-16, 0)}, "no valid data_offsets"),
        ({"a": entry(0.0, 16.0)}, "no valid data_offsets"),
        ({"a": {**entry(), "data_offsets": [0, 8, 16]}}, "no valid data_offsets"),
        ({"a": entry(16, 0)}, "does not fit the bytes 16 to 0"),
        ({"a": entry(dtype="F31")}, "dtype that is not known: 'F31'"),
        ({"a": entry(dtype=["F32"])}, "dtype that is not known"),
        ({"a": [entry()]}, "lacks dtype, shape or data_offsets"),
        ({"a": {"dtype": "F32"}}, "lacks dtype, shape or data_offsets"),
        ({"a": None}, "lacks dtype, shape or data_offsets"),
        ([entry()], "not a JSON object"),
        (b"  {}", "not a JSON object"),
        (b"{" * 3, "not a safetensors file"),
        (b'{"a":' * 100_000, "not a safetensors file"),
        (b'{"a":' + b"[" * 1_000_000, "nested without end"),
        (b'{"\xff": 1}', "not a safetensors file"),
        (b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,16]}}', "not a safetensors file"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value)[:60],
)
def test_what_the_format_does_not_allow(tmp_path: Path, header: object, message: str) -> None:
    path = write(tmp_path / "x.safetensors", header)
    with pytest.raises(BadTensorFile, match=message) as caught:
        read_spans(path)
    assert len(str(caught.value)) < 600 and str(caught.value).isprintable()


@pytest.mark.parametrize("length", [0, 1, 17, 100_000_001, 2**63, 2**64 - 1])
def test_a_header_of_a_length_that_cannot_be(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}" + bytes(14))
    with pytest.raises(BadTensorFile, match="a header of"):
        read_spans(path)


@pytest.mark.parametrize("header", [{"\x1b[31m\nred": entry(shape=[1.5])}, {"a" * 100_000: None}], ids=["raw", "long"])
def test_a_name_in_an_error_is_short_and_printable(tmp_path: Path, header: dict[str, object]) -> None:
    with pytest.raises(BadTensorFile) as caught:
        read_spans(write(tmp_path / "x.safetensors", header))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


def test_a_fifo_and_a_device_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero"), tmp_path):
        with pytest.raises(BadTensorFile, match=r"no regular file|directory"):
            read_spans(path)


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6.0).view(2, 3),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(7),
        "b": torch.ones(3, dtype=torch.complex64),
        "c": torch.zeros(2, 2).to(torch.float8_e5m2fnuz),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    spans = read_spans(tmp_path / "x.safetensors")
    assert {name: span.shape for name, span in spans.items()} == {name: tuple(t.shape) for name, t in tensors.items()}
    data = (tmp_path / "x.safetensors").read_bytes()
    assert data[spans["a"].offset :][:24] == tensors["a"].numpy().tobytes()


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=3),
        JUNK | st.fixed_dictionaries({"dtype": st.just("U8") | JUNK, "shape": JUNK, "data_offsets": JUNK}),
        max_size=3,
    )
)
def test_no_header_ends_in_anything_but_an_answer(header: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            read_spans(write(Path(folder) / "x.safetensors", header))
        except BadTensorFile as error:
            assert str(error).isprintable()
