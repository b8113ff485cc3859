"""Part files: their layout, and that no damage to one goes unseen."""

import json
import mmap
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from embedding_service.errors import CorruptPart, InvalidRequest
from embedding_service.formats import FORMATS, get_format
from embedding_service.store import Part, part_layout, read_into, rows_per_part, verify
from embedding_service.store.parts import NewPart, PartWriter, default_rows_per_part

PAGE = 4096


def write_part(folder: Path, name: str = "int8", rows: int = 1000, dim: int = 32) -> tuple[Path, Part, torch.Tensor]:
    """Write one part in a few chunks; its path, entry and stored rows."""
    row_format = get_format(name)
    values = torch.arange(rows * dim, dtype=torch.float32).view(rows, dim) % 1999
    stored = row_format.encode(values)
    with PartWriter(folder, NewPart("t", 3, 9000, rows, dim, row_format)) as writer:
        for chunk in stored.split(300):
            writer.write(chunk)
        part = writer.finish()
    return folder / part.file, part, stored


@pytest.mark.parametrize("name", FORMATS)
def test_a_part_is_a_safetensors_file_whose_rows_begin_on_a_page(tmp_path: Path, name: str) -> None:
    path, part, stored = write_part(tmp_path, name)
    assert path.name == "part-00003.safetensors"
    assert (part.index, part.first_row, part.rows, part.bytes) == (3, 9000, 1000, stored.numel())
    tensors = load_file(path)
    assert list(tensors) == ["rows"]
    plain = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    assert tensors["rows"].dtype == plain.get(name, torch.uint8)
    assert tensors["rows"].shape == ((1000, 32) if name in plain else stored.shape)
    assert torch.equal(tensors["rows"].view(torch.uint8), stored)
    layout = part_layout(path)
    assert layout.offset % PAGE == 0
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), layout.bytes, prot=mmap.PROT_READ, offset=layout.offset) as m,
    ):
        assert m[:] == stored.numpy().tobytes()
    verify(path, part)


@given(row_bytes=st.integers(1, 5000), part_bytes=st.integers(1, 1 << 26))
def test_parts_are_as_many_whole_pages_as_fit(row_bytes: int, part_bytes: int) -> None:
    step = next(rows for rows in range(1, PAGE + 1) if rows * row_bytes % PAGE == 0)
    if part_bytes < step * row_bytes:
        with pytest.raises(InvalidRequest, match="too small"):
            rows_per_part(row_bytes, part_bytes)
        return
    rows = rows_per_part(row_bytes, part_bytes)
    assert rows * row_bytes % PAGE == 0
    assert rows * row_bytes <= part_bytes < (rows + step) * row_bytes


def test_the_default_part_of_the_real_tables() -> None:
    assert rows_per_part(260) == 1_032_192
    assert rows_per_part(264) == 1_016_320


def test_read_into_fills_tensors_and_memory(tmp_path: Path) -> None:
    path, part, stored = write_part(tmp_path)
    tensor = torch.zeros_like(stored)
    read_into(path, part, tensor)
    assert torch.equal(tensor, stored)
    memory = bytearray(part.bytes)
    read_into(path, part, memoryview(memory))
    assert memory == stored.numpy().tobytes()
    with pytest.raises(InvalidRequest, match="buffer of 5 bytes"):
        read_into(path, part, memoryview(bytearray(5)))


def damaged(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "a bit":
        data[PAGE + 777] ^= 1
    elif how == "the last byte":
        data[-1] ^= 0x80
    elif how == "the header":
        data[20:24] = b"\0\0\0\0"
    elif how == "the header's length":
        data[:8] = (1 << 40).to_bytes(8, "little")
    elif how == "cut":
        del data[-1:]
    elif how == "cut in the header":
        del data[100:]
    elif how == "empty":
        data.clear()
    elif how == "longer":
        data += b"\0"
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("a bit", "corrupt: expected xxh3-128:"),
        ("the last byte", "corrupt: expected xxh3-128:"),
        ("the header", "not a safetensors file"),
        ("the header's length", "not a safetensors file"),
        ("cut", "cut short"),
        ("cut in the header", "not a safetensors file"),
        ("empty", "not a safetensors file"),
        ("longer", "1 bytes that belong to no tensor"),
    ],
)
def test_damage_is_found_and_the_file_named(tmp_path: Path, how: str, message: str) -> None:
    path, part, stored = write_part(tmp_path)
    damaged(path, how)
    for check in (lambda: verify(path, part), lambda: read_into(path, part, torch.empty_like(stored))):
        with pytest.raises(CorruptPart, match=message) as caught:
            check()
        assert str(path) in str(caught.value)


def test_the_message_of_a_wrong_checksum_gives_both(tmp_path: Path) -> None:
    path, part, _ = write_part(tmp_path)
    wrong = part.model_copy(update={"checksum": "xxh3-128:" + "0" * 32})
    with pytest.raises(CorruptPart, match=f"expected {wrong.checksum}, got {part.checksum}"):
        verify(path, wrong)


def test_another_parts_file_is_refused(tmp_path: Path) -> None:
    path, part, _ = write_part(tmp_path)
    other, _, _ = write_part(tmp_path / "other", rows=999)
    with pytest.raises(CorruptPart, match="expected 1,000 rows in 36,000 bytes, got"):
        verify(other, part)
    # As many bytes in another shape.
    save_file({"rows": torch.zeros(36000, 1, dtype=torch.uint8)}, path)
    with pytest.raises(CorruptPart):
        verify(path, part)


def test_files_that_are_no_parts(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(CorruptPart, match="No such file"):
        part_layout(missing)
    two = tmp_path / "two"
    save_file({"rows": torch.zeros(2, 2), "more": torch.zeros(1)}, two)
    with pytest.raises(CorruptPart, match=r"holds \['more', 'rows'\]"):
        part_layout(two)
    unaligned = tmp_path / "unaligned"
    save_file({"rows": torch.zeros(2, 2)}, unaligned)
    with pytest.raises(CorruptPart, match="do not begin on a page"):
        part_layout(unaligned)
    lying = tmp_path / "lying"
    header = json.dumps({"rows": {"dtype": "U8", "shape": [4, 4], "data_offsets": [0, 15]}}).encode()
    lying.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(CorruptPart, match=r"U8 \[4, 4\] does not fit"):
        part_layout(lying)


def test_a_part_that_was_not_finished_leaves_nothing(tmp_path: Path) -> None:
    row_format = get_format("int8")
    with (
        pytest.raises(KeyboardInterrupt),
        PartWriter(tmp_path, NewPart("t", 0, 0, 10, 8, row_format)) as writer,
    ):
        writer.write(row_format.encode(torch.ones(5, 8)))
        raise KeyboardInterrupt
    assert list((tmp_path / "t").iterdir()) == []


@pytest.mark.parametrize(
    ("rows", "row_bytes", "parts"),
    [
        (1_000_000, 260, 16),
        (2_000, 64, 16),
        (1_024, 64, 16),
        (64, 64, 1),  # a page
        (1, 260, 1),
        (1_500, 260, 2),  # rows of 260 bytes fill whole pages every 1,024 rows
        (122_683_536, 260, 119),  # LongCat-Flash-Lite: parts of at most 256 MiB
    ],
)
def test_a_small_table_is_spread_and_a_large_one_in_parts_of_256_mib(rows: int, row_bytes: int, parts: int) -> None:
    part_rows = default_rows_per_part(rows, row_bytes)
    assert part_rows * row_bytes % 4096 == 0
    assert part_rows * row_bytes <= 256 << 20
    assert -(-rows // part_rows) == parts
