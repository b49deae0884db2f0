"""Snapshots come from shards as Zarr reads them, whatever codec wrote them; damage is one clear error."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numcodecs import blosc
from zarr.codecs import BloscCodec, BytesCodec, ZstdCodec

from latentphys.data import shards
from latentphys.data.shards import SnapshotReader

SHAPE = (2, 7, 3, 4, 2, 5)
VALUES = np.random.default_rng(0).standard_normal(SHAPE)
LZ4 = BloscCodec(cname="lz4", shuffle="shuffle")


def make(path: Path, dtype: str = "float64", shard: int | None = 3, **codecs: Any) -> zarr.Array:
    chunk = (1, 1, *SHAPE[2:])
    array = zarr.create_array(
        path,
        shape=SHAPE,
        dtype=dtype,
        chunks=chunk,
        shards=None if shard is None else (1, shard, *SHAPE[2:]),
        fill_value=np.nan,
        **{"compressors": None, **codecs},
    )
    array[...] = VALUES.astype(dtype)
    return zarr.open_array(path, mode="r")


def file_of(array: zarr.Array, trajectory: int = 1, position: int = 0) -> Path:
    return Path(str(array.store.root)) / "c" / str(trajectory) / str(position) / "0" / "0" / "0" / "0"  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("direct", "options"),
    [
        (True, {}),
        (True, {"compressors": LZ4}),
        (True, {"compressors": BloscCodec(cname="zstd", shuffle="bitshuffle")}),
        (True, {"shard": 7}),
        (False, {"compressors": ZstdCodec()}),
        (False, {"serializer": BytesCodec(endian="big")}),
        (False, {"shard": None}),
    ],
    ids=["plain", "lz4", "blosc zstd", "one shard", "zstd", "big-endian", "no shards"],
)
def test_every_codec_reads_as_zarr_does(tmp_path: Path, dtype: str, direct: bool, options: dict[str, Any]) -> None:
    array = make(tmp_path / "a", dtype, **options)
    reader = SnapshotReader(array)
    assert reader.direct == direct
    for time in (0, 2, 6, slice(None), slice(1, 6, 2), slice(5, 2), slice(-2, None)):
        got = reader.read(1, time)
        assert got.dtype == dtype and got.flags.writeable
        np.testing.assert_array_equal(got, array[1, time])
        out = np.empty_like(got, dtype="float32" if dtype == "float64" else "float64")
        assert reader.read(1, time, out) is out
        np.testing.assert_array_equal(out, np.asarray(array[1, time]).astype(out.dtype))
    strided = np.zeros((2, *SHAPE[2:]), dtype)[:, ::-1]
    reader.read(0, slice(0, 2), strided)
    np.testing.assert_array_equal(strided, array[0, :2])
    with pytest.raises(ValueError, match=r"Expected room for \(3, 4, 2, 5\), got \(3, 4\)"):
        reader.read(0, 0, np.empty((3, 4)))


def test_threads_share_a_reader_of_more_shards_than_it_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "NUM_SHARDS", 2)
    reader = SnapshotReader(make(tmp_path / "a", shard=1))
    where = [(i, t) for i in range(2) for t in range(7)] * 20
    with ThreadPoolExecutor(4) as threads:
        for (i, t), got in zip(where, threads.map(lambda at: reader.read(*at), where), strict=True):
            np.testing.assert_array_equal(got, VALUES[i, t])


def test_what_was_read_outlives_reader_and_file(tmp_path: Path) -> None:
    got = SnapshotReader(make(tmp_path / "a")).read(0, slice(None))
    shutil.rmtree(tmp_path / "a")
    np.testing.assert_array_equal(got, VALUES[0])
    got += 1


def test_a_snapshot_that_was_never_written_is_filled(tmp_path: Path) -> None:
    path = tmp_path / "a"
    make(path)
    zarr.open_array(path, mode="r+")[1, 1] = np.nan
    reader = SnapshotReader(zarr.open_array(path, mode="r"))
    assert np.isnan(reader.read(1, 1)).all()
    np.testing.assert_array_equal(reader.read(1, 2), VALUES[1, 2])


@pytest.mark.parametrize("compressors", [None, LZ4], ids=["plain", "lz4"])
@pytest.mark.parametrize("kept", [0, 3, 50, -100, -1], ids=["none", "3 bytes", "50 bytes", "no index", "one short"])
def test_a_truncated_shard_is_refused(tmp_path: Path, compressors: Any, kept: int) -> None:
    array = make(tmp_path / "a", compressors=compressors)
    file = file_of(array)
    file.write_bytes(file.read_bytes()[:kept])
    reader = SnapshotReader(array)
    with pytest.raises(ValueError, match="Expected a (whole )?shard .*copy it again"):
        reader.read(1, 0)
    np.testing.assert_array_equal(reader.read(1, 3), VALUES[1, 3])


def test_a_lost_shard_is_refused(tmp_path: Path) -> None:
    array = make(tmp_path / "a")
    file_of(array, 0, 2).unlink()
    with pytest.raises(ValueError, match="Expected a shard .*, got none or an empty one; make or copy it again"):
        SnapshotReader(array).read(0, 6)


def test_every_byte_of_the_index_is_checked(tmp_path: Path) -> None:
    array = make(tmp_path / "a")
    file = file_of(array)
    good = file.read_bytes()
    size = 16 * 3 + 4
    for position in range(len(good) - size, len(good)):
        bad = bytearray(good)
        bad[position] ^= 1
        file.write_bytes(bad)
        with pytest.raises(ValueError, match="Expected a whole shard of 3 snapshots, got a damaged"):
            SnapshotReader(array).read(1, 0)


@pytest.mark.parametrize(
    "entry",
    [(10**9, 960), (0, 959), (2**64 - 1, 960), (0, 2**64 - 1), (3 * 960, 960)],
    ids=["beyond", "short", "far", "endless", "into the index"],
)
def test_an_index_with_its_checksum_that_points_elsewhere_is_refused(tmp_path: Path, entry: tuple[int, int]) -> None:
    array = make(tmp_path / "a")
    file = file_of(array)
    good = file.read_bytes()
    table = np.frombuffer(good[-52:-4], "<u8").reshape(3, 2).copy()
    table[1] = entry
    stored = table.tobytes()
    file.write_bytes(good[:-52] + stored + shards.crc32c(stored).to_bytes(4, "little"))
    with pytest.raises(ValueError, match="Expected a whole shard of 3 snapshots, got a damaged"):
        SnapshotReader(array).read(1, 0)


@pytest.mark.parametrize("position", [4, 5, 12], ids=["size", "high size", "length"])
def test_a_damaged_compressed_snapshot_is_refused(tmp_path: Path, position: int) -> None:
    array = make(tmp_path / "a", compressors=LZ4)
    file = file_of(array)
    bad = bytearray(file.read_bytes())
    bad[position] ^= 0x55
    file.write_bytes(bad)
    with pytest.raises(ValueError, match="Expected a readable snapshot at trajectory 1, time 0 of .*copy it again"):
        SnapshotReader(array).read(1, 0)


def test_a_compressed_snapshot_of_another_size_is_refused(tmp_path: Path) -> None:
    array = make(tmp_path / "a", compressors=LZ4)
    for snapshot in (VALUES[1, 0, :2], np.concatenate([VALUES[1, 0]] * 2)):
        frame = blosc.compress(snapshot, b"lz4", 5, 1)
        table = np.array([[0, len(frame)], *[[shards.NO_CHUNK] * 2] * 2], dtype="<u8").tobytes()
        file_of(array).write_bytes(frame + table + shards.crc32c(table).to_bytes(4, "little"))
        with pytest.raises(ValueError, match=f"got damaged data .{snapshot.nbytes} bytes for a snapshot of 960"):
            SnapshotReader(array).read(1, 0)
