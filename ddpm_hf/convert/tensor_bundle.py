"""The variables of TensorFlow's checkpoints (its "tensor bundle"), read without TensorFlow.

The checkpoint `model.ckpt-790000` is a file `model.ckpt-790000.index`, a table in LevelDB's format that maps each
variable's name to its type, shape and place, and the places themselves, `model.ckpt-790000.data-00000-of-00001`.
Each block of the table and each tensor has a CRC-32C, and nothing is returned whose sum does not match.

Sources: doc/table_format.md of LevelDB; core/protobuf/tensor_bundle.proto and core/util/tensor_bundle of TensorFlow.
"""

import functools
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8", 19: "<f2"}  # numbers of types.proto


class Entry(NamedTuple):
    """Where a variable is: bytes [offset, offset + size) of data file `shard`; `dtype` is TensorFlow's number."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int
    is_sliced: bool


class TensorBundle:
    """The variables of the checkpoint `prefix` (a path without `.index`); `entries` by name, `read` one by one.

    Raises OSError for files that cannot be read, ValueError for those that are truncated, corrupt or big-endian.
    """

    def __init__(self, prefix: str | os.PathLike[str]):
        self.prefix = str(prefix)
        try:
            table = _read_table(Path(f"{self.prefix}.index"))
            header = _fields(table.pop(b"")) if b"" in table else None
            self.entries = {name.decode(): _entry(message) for name, message in table.items()}
        except (
            IndexError,
            TypeError,
            UnicodeDecodeError,
        ) as error:  # its checksums are right, but it is no such table
            raise ValueError(f"{self.prefix}.index is not the index of a TensorFlow checkpoint: {error}") from None
        if header is None:
            raise ValueError(f"{self.prefix}.index is not the index of a TensorFlow checkpoint: it has no header")
        if header.get(2, [0])[0] != 0:
            raise ValueError(f"{self.prefix}.index is of a big-endian machine; only little-endian data can be read")
        self._num_shards = int(header.get(1, [1])[0])

    def read(self, name: str) -> np.ndarray:
        """The variable `name` in its own shape and dtype.

        Raises KeyError for a name not in `entries`, ValueError for data that are truncated, corrupt, partitioned or
        not plain numbers.
        """
        entry = self.entries[name]
        if entry.dtype not in _DTYPES or entry.is_sliced:
            kind = "partitioned" if entry.is_sliced else f"of TensorFlow's type number {entry.dtype}"
            raise ValueError(f"{name!r} is {kind}; only whole variables of floats or integers can be read")
        dtype = np.dtype(_DTYPES[entry.dtype])
        path = Path(f"{self.prefix}.data-{entry.shard:05d}-of-{self._num_shards:05d}")
        available = path.stat().st_size  # checked first, because a damaged index could ask for all memory
        if entry.offset + entry.size > available or entry.size != math.prod(entry.shape) * dtype.itemsize:
            raise ValueError(
                f"{path} is truncated: {name!r} {entry.shape} needs bytes {entry.offset} to "
                f"{entry.offset + entry.size}, the file has {available}"
            )
        with path.open("rb") as file:
            file.seek(entry.offset)
            data = file.read(entry.size)
        _require_checksum(entry.checksum, data, f"{name!r} in {path}")
        return np.frombuffer(data, dtype).reshape(entry.shape)


def _entry(message: bytes) -> Entry:
    """The entry that a protocol buffer `BundleEntryProto` describes."""
    fields = _fields(message)
    dtype, shape, shard, offset, size, checksum = (fields.get(number, [0])[0] for number in range(1, 7))
    dims = _fields(shape).get(2, []) if shape else []
    sizes = tuple(_fields(dim).get(1, [0])[0] for dim in dims)
    if not all(isinstance(number, int) for number in (dtype, shard, offset, size, checksum, *sizes)):
        raise TypeError("an entry holds text where it should hold numbers")
    return Entry(dtype, sizes, shard, offset, size, checksum, is_sliced=7 in fields)


# ---- the index: a table in LevelDB's format ------------------------------------------------------------------------

_MAGIC = 0xDB4775248B80FB57
_FOOTER_BYTES = 48


def _read_table(path: Path) -> dict[bytes, bytes]:
    """Keys and values of the table at `path`. Raises ValueError where it is truncated or corrupt."""
    table = path.read_bytes()
    footer = table[-_FOOTER_BYTES:]
    if len(footer) < _FOOTER_BYTES or struct.unpack("<Q", footer[-8:])[0] != _MAGIC:
        raise ValueError(f"{path} is truncated, or not the index of a TensorFlow checkpoint")
    _, position = _varint(footer, 0)  # place and size of the "meta index", which is empty
    _, position = _varint(footer, position)
    start, position = _varint(footer, position)
    size, _ = _varint(footer, position)
    entries: dict[bytes, bytes] = {}
    for _, handle in _entries(_block(table, start, size, path)):
        start, position = _varint(handle, 0)
        entries.update(_entries(_block(table, start, _varint(handle, position)[0], path)))
    return entries


def _block(table: bytes, position: int, size: int, path: Path) -> bytes:
    """The block of `size` bytes at `position`, verified; a byte for its compression and a checksum follow it."""
    block, trailer = table[position : position + size + 1], table[position + size + 1 : position + size + 5]
    if len(trailer) < 4:
        raise ValueError(
            f"{path} is truncated: it has {len(table)} bytes and should have at least {position + size + 5}"
        )
    _require_checksum(int.from_bytes(trailer, "little"), block, f"the block at byte {position} of {path}")
    if block[-1] != 0:
        raise ValueError(f"{path} is compressed (type {block[-1]}), which TensorFlow does not do; save it again there")
    return block[:-1]


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a block in order; a key is given by what it shares with the one before and by the rest."""
    num_restarts = int.from_bytes(block[-4:], "little")
    end = len(block) - 4 - 4 * num_restarts
    key, position = b"", 0
    while position < end:
        shared, position = _varint(block, position)
        rest, position = _varint(block, position)
        length, position = _varint(block, position)
        key = key[:shared] + block[position : position + rest]
        position += rest
        yield key, block[position : position + length]
        position += length


# ---- protocol buffers ----------------------------------------------------------------------------------------------


def _fields(message: bytes) -> dict[int, list[Any]]:
    """The fields of a protocol buffer by number: an int for numbers, bytes for strings and messages inside."""
    fields: dict[int, list[Any]] = {}
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, position = _varint(message, position)
        elif wire_type in (1, 5):
            length = 8 if wire_type == 1 else 4
            value, position = int.from_bytes(message[position : position + length], "little"), position + length
        elif wire_type == 2:
            length, position = _varint(message, position)
            value, position = message[position : position + length], position + length
        else:
            raise ValueError(f"field {number} of a protocol buffer has the unknown wire type {wire_type}")
        fields.setdefault(number, []).append(value)
    return fields


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """The number at `position`, 7 bits a byte with the lowest first, and the position behind it."""
    value = shift = 0
    while True:
        if shift > 63:
            raise IndexError("a number of more than 64 bits")
        byte = data[position]
        value, shift, position = value | (byte & 0x7F) << shift, shift + 7, position + 1
        if byte < 0x80:
            return value, position


# ---- CRC-32C -------------------------------------------------------------------------------------------------------

_POLYNOMIAL = 0x82F63B78  # Castagnoli's, reflected
_PREFIX = bytes.fromhex("54641f64")  # takes the register from 0 to 0xFFFFFFFF, where CRC-32C starts


def _require_checksum(stored: int, data: bytes, what: str) -> None:
    """Raise ValueError unless `data` have the checksum `stored`.

    Both formats store a CRC rotated by 15 bits plus a constant, since sums over data that contain sums are weak.
    """
    crc = crc32c(data)
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    if masked != stored:
        raise ValueError(f"{what} is corrupt: its checksum is {masked:08x}, recorded {stored:08x}; copy it again")


def crc32c(data: bytes) -> int:
    """The CRC-32C (Castagnoli) of `data`, at about 0.3 GB/s.

    A register absorbs a word by XOR and then advances over its four bytes, which is linear. So neighbours can be
    joined pairwise, all at once: the left one advances over the length of the right one. Leading zeros change nothing.
    """
    words = np.frombuffer(bytes(-len(data) % 4) + _PREFIX + data, dtype="<u4").astype(np.uint32)
    level = 0
    while len(words) > 1:
        if len(words) % 2:
            words = np.append(np.uint32(0), words)
        words = _advance(_tables(level), words[0::2]) ^ words[1::2]
        level += 1
    return ~int(_advance(_tables(0), words)[0]) & 0xFFFFFFFF


def _advance(tables: np.ndarray, registers: np.ndarray) -> np.ndarray:
    """CRC registers, uint32 [n], after as many zero bytes as the tables stand for; linear, so table by table."""
    low, high = registers & 0xFFFF, registers >> 16
    return tables[0].take(low) ^ tables[1].take(high)


@functools.cache
def _tables(level: int) -> np.ndarray:
    """What 4 · 2^level zero bytes make of the low and the high half of a register: uint32 [2, 65536]."""
    half = np.arange(1 << 16, dtype=np.uint32)
    tables = np.stack([half, half << 16])
    if level:
        before = _tables(level - 1)
        return _advance(before, _advance(before, tables.ravel())).reshape(tables.shape)
    for _ in range(32):  # a bit at a time
        tables = (tables >> 1) ^ (tables & 1) * np.uint32(_POLYNOMIAL)
    return tables
