"""The reader of TensorFlow checkpoints: recorded variables, known checksums, and files that are not whole."""

import struct
from pathlib import Path

import numpy as np
import pytest

from ddpm_hf.convert.tensor_bundle import TensorBundle, crc32c

NAME = "model.ckpt-790000"
INDEX, DATA = f"{NAME}.index", f"{NAME}.data-00000-of-00001"
CHECKPOINT = Path(__file__).parents[1] / "golden" / "tf_checkpoint"


@pytest.fixture
def copy(tmp_path) -> Path:
    """The prefix of a copy that a test may damage."""
    for name in (INDEX, DATA):
        (tmp_path / name).write_bytes((CHECKPOINT / name).read_bytes())
    return tmp_path / NAME


def change(path: Path, position: int, new: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[position : position + len(new)] = new
    path.write_bytes(data)


def masked_crc(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def index_with(message: bytes, *, header: bytes | None = b"\x08\x01", compression: int = 0) -> bytes:
    """The index of a bundle with one variable, "v": a block of entries, the block that tells where it is, the footer.

    `message` is the variable's BundleEntryProto, `header` the BundleHeaderProto, here of one little-endian shard.
    """

    def block(*entries: tuple[bytes, bytes]) -> bytes:
        body = b"".join(bytes([0, len(key), len(value)]) + key + value for key, value in entries)
        body += struct.pack("<II", 0, 1) + bytes([compression])
        return body + masked_crc(body)

    data = block(*([] if header is None else [(b"", header)]), (b"v", message))
    index = block((b"z", bytes([0, len(data) - 5])))
    assert len(data) < 128  # so that the numbers are single bytes
    return data + index + bytes([0, 0, len(data), len(index) - 5]).ljust(40, b"\0") + bytes.fromhex("57fb808b247547db")


# ---- checksums -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"a", 0xC1D04330),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),  # this and the next three are of RFC 3720, B.4
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(reversed(range(32))), 0x113FDB5C),
    ],
)
def test_the_checksum_is_crc_32c(data, expected):
    assert crc32c(data) == expected


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 1000, 4096, 65537])
def test_the_checksum_equals_the_definition_at_any_length(length):
    """Bit by bit, as the polynomial division is defined."""
    data = np.random.RandomState(length).bytes(length)
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ 0x82F63B78 * (register & 1)
    assert crc32c(data) == register ^ 0xFFFFFFFF


# ---- the recorded checkpoint ---------------------------------------------------------------------------------------


def test_every_variable_of_the_checkpoint_is_read_and_matches_its_checksum():
    bundle = TensorBundle(CHECKPOINT / NAME)
    arrays = {name: bundle.read(name) for name in bundle.entries}
    # All 142 weights with two Adam slots and an average each, the two beta powers and global_step.
    assert len(arrays) == 4 * 142 + 3
    assert arrays["global_step"] == 790_000 and arrays["global_step"].dtype == np.int64
    assert arrays["model/conv_in/W"].shape == (3, 3, 3, 32) and arrays["model/conv_in/W"].dtype == np.float32
    assert {name: array.shape for name, array in arrays.items()} == {n: e.shape for n, e in bundle.entries.items()}
    assert sum(array.nbytes for array in arrays.values()) == (CHECKPOINT / DATA).stat().st_size


# ---- files that are not whole --------------------------------------------------------------------------------------


def test_a_changed_byte_of_a_variable_is_found(copy):
    entry = TensorBundle(copy).entries["model/conv_in/W"]
    change(copy.with_name(DATA), entry.offset + 100, b"\x01\x02\x03")
    bundle = TensorBundle(copy)
    with pytest.raises(ValueError, match=r"'model/conv_in/W' in .*data-00000-of-00001 is corrupt: its checksum is"):
        bundle.read("model/conv_in/W")
    bundle.read("model/conv_in/b")  # the others are whole


@pytest.mark.parametrize("position", [0, 10, 4000, 15_000, 20_000])
def test_a_changed_byte_of_the_index_is_found(copy, position):
    index = copy.with_name(INDEX)
    change(index, position, bytes([index.read_bytes()[position] ^ 0x10]))
    with pytest.raises(ValueError, match=r"the block at byte \d+ of .*\.index is corrupt"):
        TensorBundle(copy)


def test_truncated_data_are_found(copy):
    data = copy.with_name(DATA)
    data.write_bytes(data.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"truncated: 'model/conv_in/W' .* needs bytes .* the file has 2000"):
        TensorBundle(copy).read("model/conv_in/W")


@pytest.mark.parametrize("length", [0, 47, 1000, 21_000])
def test_a_truncated_index_is_found(copy, length):
    index = copy.with_name(INDEX)
    index.write_bytes(index.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"\.index is truncated, or not the index of a TensorFlow checkpoint"):
        TensorBundle(copy)


def test_an_index_that_lost_its_middle_is_found(copy):
    index = copy.with_name(INDEX)
    index.write_bytes(index.read_bytes()[:1000] + index.read_bytes()[-48:])
    with pytest.raises(ValueError, match=r"\.index is truncated: it has 1048 bytes and should have at least"):
        TensorBundle(copy)


@pytest.mark.parametrize("name", [INDEX, DATA])
def test_a_missing_file_is_named(copy, name):
    copy.with_name(name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        TensorBundle(copy).read("model/conv_in/W")


# ---- what the format allows and the paper's code does not write ----------------------------------------------------


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (index_with(b"", compression=1), "is compressed"),
        (index_with(b"", header=b"\x08\x01\x10\x01"), "of a big-endian machine"),
        (index_with(b"\x08\x07"), "'v' is of TensorFlow's type number 7"),  # strings
        (index_with(b"\x08\x01\x3a\x00"), "'v' is partitioned"),
        (index_with(b"\x08\x01\x12\x04\x12\x02\x08\x02\x28\x04"), r"truncated: 'v' \(2,\) needs"),  # 4 bytes for 8
        (index_with(b"\x0b"), "wire type 3"),  # a group, which no proto here has
    ],
    ids=["compressed", "big-endian", "strings", "partitioned", "size", "group"],
)
def test_other_kinds_of_bundles_are_refused(tmp_path, index, message):
    (tmp_path / "v.index").write_bytes(index)
    (tmp_path / "v.data-00000-of-00001").write_bytes(bytes(8))
    with pytest.raises(ValueError, match=message):
        TensorBundle(tmp_path / "v").read("v")


def test_a_table_without_the_header_of_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "v.index").write_bytes(index_with(b"", header=None))
    with pytest.raises(ValueError, match="it has no header"):
        TensorBundle(tmp_path / "v")


def test_a_whole_small_bundle_is_read(tmp_path):
    """The indices above are refused for what is odd in them, not for how they are made."""
    values = np.array([1.5, -2.0], dtype="<f4")
    message = b"\x08\x01\x12\x04\x12\x02\x08\x02\x28\x08\x35" + masked_crc(values.tobytes())
    (tmp_path / "v.index").write_bytes(index_with(message))
    (tmp_path / "v.data-00000-of-00001").write_bytes(values.tobytes())
    assert np.array_equal(TensorBundle(tmp_path / "v").read("v"), values)
