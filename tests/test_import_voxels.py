"""Voxel images: axes, values, and images that no flow can be computed in."""

import importlib.util
import itertools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentphys.data import open_store
from latentphys.data.importing import ImportOptions, import_files, voxels
from latentphys.data.importing.voxels import read_voxels

SHAPE = (6, 5, 4)
SOLID = np.random.default_rng(3).random(SHAPE) < 0.3
IMAGE = np.where(SOLID, 255, 7).astype(np.uint8)
Writer = Callable[[Path, np.ndarray], Path]


def tiff(path: Path, pages: np.ndarray, order: str = "<", photometric: int = 1, samples: int = 1) -> Path:
    """An uncompressed TIFF by hand: pages (page, row, column) of bytes, one strip each."""
    rows, columns = pages.shape[1:3]
    size = pages[0].nbytes
    data = bytearray((b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + pages.nbytes))
    data += pages.tobytes()
    for i in range(len(pages)):
        entries = [(256, columns), (257, rows), (258, 8), (259, 1), (262, photometric), (273, 8 + i * size)]
        entries += [(277, samples), (278, rows), (279, size)]
        data += struct.pack(f"{order}H", len(entries))
        for tag, value in entries:
            data += struct.pack(f"{order}HHII", tag, 4, 1, value)
        following = len(data) + 4 if i + 1 < len(pages) else 0
        data += struct.pack(f"{order}I", following)
    path.write_bytes(bytes(data))
    return path


def z_pages(image: np.ndarray) -> np.ndarray:
    """Pages z, rows y, columns x, by loops."""
    nx, ny, nz = image.shape
    pages = np.zeros((nz, ny, nx), image.dtype)
    for x, y, z in itertools.product(range(nx), range(ny), range(nz)):
        pages[z, y, x] = image[x, y, z]
    return pages


def stack(path: Path, image: np.ndarray) -> Path:
    pytest.importorskip("tifffile")
    return tiff(path / "sample.image", z_pages(image))


def big_endian_stack(path: Path, image: np.ndarray) -> Path:
    pytest.importorskip("tifffile")
    return tiff(path / "sample", z_pages(image), order=">")


def compressed_stack(path: Path, image: np.ndarray) -> Path:
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(path / "a.tif", z_pages(image), compression="zlib", photometric="minisblack")
    return path / "a.tif"


def slices(path: Path, image: np.ndarray) -> Path:
    pytest.importorskip("tifffile")
    folder = path / "slices"
    folder.mkdir()
    for z, page in enumerate(z_pages(image)):
        tiff(folder / f"slice_{7 + z}", page[None])  # 7 … 10: by name, 10 would be the first
    return folder


def npy(path: Path, image: np.ndarray) -> Path:
    np.save(path / "a.npy", image, allow_pickle=False)
    return path / "a.npy"


def fortran_npy(path: Path, image: np.ndarray) -> Path:
    np.save(path / "a.npy", np.asfortranarray(image), allow_pickle=False)
    return path / "a.npy"


WRITERS = [stack, big_endian_stack, compressed_stack, slices, npy, fortran_npy]


@pytest.mark.parametrize("write", WRITERS)
def test_every_format_gives_the_same_solid(tmp_path: Path, write: Writer) -> None:
    path = write(tmp_path, IMAGE)
    assert voxels.recognises(path)
    np.testing.assert_array_equal(read_voxels(path, pore=7), SOLID)


def test_raw_files_have_the_axes_that_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(np.ascontiguousarray(IMAGE).tobytes())
    np.testing.assert_array_equal(read_voxels(path, pore=7, shape=SHAPE, dtype="uint8"), SOLID)
    path.write_bytes(z_pages(IMAGE).astype(">u2").tobytes())
    got = read_voxels(path, pore=7, shape=SHAPE[::-1], dtype=">u2", axes="z y x")
    np.testing.assert_array_equal(got, SOLID)
    assert not voxels.recognises(path)
    options = ImportOptions(pore=7, shape=SHAPE[::-1], dtype=">u2", axes="z y x")
    [written] = import_files(path, tmp_path / "raw.zarr", options=options)  # shape and dtype say that it is raw
    np.testing.assert_array_equal(~open_store(written).geometry(0).fluid.numpy(), SOLID)
    with pytest.raises(ValueError, match=r"the shape and dtype of a raw one, for .* of 240 bytes"):
        read_voxels(path, pore=7)
    with pytest.raises(ValueError, match="Expected 120 bytes, shape .*got 240"):
        read_voxels(path, pore=7, shape=SHAPE, dtype="uint8")
    for wrong in ({"dtype": "object"}, {"dtype": "spam"}, {"shape": (2, 3)}, {"shape": (0, 5, 4)}):
        with pytest.raises(ValueError, match="dtype"):
            read_voxels(path, **{"pore": 7, "shape": SHAPE, "dtype": "uint8"} | wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the axes x, y and z"):
        read_voxels(path, pore=7, shape=SHAPE, dtype="uint16", axes="x y t")


def test_several_solids_are_one(tmp_path: Path) -> None:
    image = IMAGE.copy()
    image[0, 0, 0], image[5, 4, 3] = 3, 200
    expected = SOLID.copy()
    expected[0, 0, 0] = expected[5, 4, 3] = True
    np.testing.assert_array_equal(read_voxels(npy(tmp_path, image), pore=7), expected)


def test_an_image_becomes_a_store(tmp_path: Path) -> None:
    options = ImportOptions(pore=7, lengths=(0.6, 0.5, 0.4), family="sandstone")
    [path] = import_files(npy(tmp_path, IMAGE), tmp_path / "out.zarr", options=options)
    store = open_store(path)
    assert store.family == "sandstone" and store.grid.spacing == pytest.approx((0.1, 0.1, 0.1))
    np.testing.assert_array_equal(~store.geometry(0).fluid.numpy(), SOLID)
    np.testing.assert_array_equal(store.read("pore", 0, 0).numpy(), ~SOLID)
    about = store.attributes["provenance"]["imported"]
    assert about["porosity"] == pytest.approx(1 - SOLID.mean()) and about["independent_net_flows"] == 3


def test_closed_pores_are_counted(tmp_path: Path) -> None:
    image = np.full((7, 7, 7), 1, np.uint8)
    image[:, 3, 3] = 0
    image[1, 1, 1] = image[5, 5, 5] = 0
    [found] = voxels.sources(npy(tmp_path, image), ImportOptions(pore=0))
    assert found.about["pore_spaces"] == 3 and found.about["independent_net_flows"] == 1


def closed() -> np.ndarray:
    image = np.ones((5, 5, 5), np.uint8)
    image[1:4, 1:4, 1:4] = 0
    return image


@pytest.mark.parametrize(
    ("image", "pore", "message"),
    [
        (IMAGE, None, r"the value of pore space in .*7 \(\d+\.\d%\), 255 \(\d+\.\d%\)"),
        (SOLID, None, r"0 \(\d+\.\d%\), 1 \(\d+\.\d%\)"),
        (IMAGE, 9, r"none of value 9; it holds 7 \("),
        (np.zeros(SHAPE, np.uint8), 0, "value 0 only"),
        (closed(), 0, "nothing can flow"),
        (np.arange(120, dtype=np.uint8).reshape(SHAPE), 0, "segmented image .* 120 values"),
        (np.where(SOLID, np.nan, 1.0), 1, "NaN or infinity"),
        (IMAGE[:1], 7, "at least two voxels"),
        (IMAGE[0], 7, "three axes"),
        (IMAGE.astype(complex), 7, "numbers wanted"),
    ],
)
def test_images_without_a_flow_are_refused(tmp_path: Path, image: np.ndarray, pore: float | None, message: str) -> None:
    path = npy(tmp_path, image)
    with pytest.raises(ValueError, match=message) as error:
        read_voxels(path, pore=pore)
    assert "a.npy" in str(error.value) and "\n" not in str(error.value)


def test_colour_and_slices_of_several_sizes_are_refused(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "rgb", np.zeros((4, 5, 6, 3), np.uint8), photometric="rgb")
    with pytest.raises(ValueError, match="grey slices .*3 samples a pixel"):
        read_voxels(tmp_path / "rgb", pore=0)
    with tifffile.TiffWriter(tmp_path / "sizes") as writer:
        writer.write(np.zeros((5, 6), np.uint8))
        writer.write(np.zeros((5, 7), np.uint8))
    with pytest.raises(ValueError, match="slices of one size"):
        read_voxels(tmp_path / "sizes", pore=0)
    tifffile.imwrite(tmp_path / "nan", z_pages(np.where(SOLID, np.nan, 1.0)), photometric="minisblack")
    with pytest.raises(ValueError, match="NaN"):
        read_voxels(tmp_path / "nan", pore=1)
    folder = slices(tmp_path, IMAGE)
    tiff(folder / "slice_8", np.zeros((1, 5, 7), np.uint8))
    with pytest.raises(ValueError, match=r"slices of 6×5 pixels .*7×5 .*slice_8"):
        read_voxels(folder, pore=7)
    (folder / "slice_8").write_text("no image")
    assert not voxels.recognises(folder)
    with pytest.raises(ValueError, match="TIFF slices .*slice_8"):
        read_voxels(folder, pore=7)


@pytest.mark.parametrize("write", WRITERS)
def test_files_that_are_cut_off_are_named(tmp_path: Path, write: Writer) -> None:
    path = write(tmp_path, IMAGE)
    file = path if path.is_file() else path / "slice_9"
    data = file.read_bytes()
    for size in [0, *np.linspace(1, len(data) - 4, 20).astype(int)]:
        file.write_bytes(data[:size])
        with pytest.raises(ValueError, match="Expected") as error:
            read_voxels(path, pore=7)
        assert "\n" not in str(error.value) and path.name in str(error.value)


def test_sizes_that_are_only_said_take_no_memory(tmp_path: Path) -> None:
    pytest.importorskip("tifffile")
    path = stack(tmp_path, IMAGE)
    data = path.read_bytes()
    columns, large = struct.pack("<HHII", 256, 4, 1, 6), struct.pack("<HHII", 256, 4, 1, 2**31)
    assert data.count(columns) == 4
    path.write_bytes(data.replace(columns, large))
    with pytest.raises(ValueError, match="too small"):
        read_voxels(path, pore=7)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "harmed",))

    objects = np.empty(SHAPE, dtype=object)
    objects[:] = Harm()
    np.save(tmp_path / "a.npy", objects, allow_pickle=True)
    assert not voxels.recognises(tmp_path / "a.npy")
    with pytest.raises(ValueError, match="numbers wanted"):
        read_voxels(tmp_path / "a.npy", pore=0)
    assert not (tmp_path / "harmed").exists()


def test_a_damaged_list_of_pages_is_no_shorter_stack(tmp_path: Path) -> None:
    path = stack(tmp_path, IMAGE)
    data = bytearray(path.read_bytes())
    number, length = 4, 2 + 9 * 12 + 4
    second = len(data) - (number - 1) * length + length - 4  # where the second page says where the third begins
    assert struct.unpack_from("<I", data, second)[0] == len(data) - 2 * length
    struct.pack_into("<I", data, second, 10**6)
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"an image that can be read at .*sample\.image"):
        read_voxels(path, pore=7)


@pytest.mark.skipif(importlib.util.find_spec("imagecodecs") is not None, reason="imagecodecs reads every compression")
def test_a_compression_that_cannot_be_read_is_no_damage(tmp_path: Path) -> None:
    path = stack(tmp_path, IMAGE)
    lzw, none = (struct.pack("<HHII", 259, 4, 1, code) for code in (5, 1))
    path.write_bytes(path.read_bytes().replace(none, lzw))
    with pytest.raises(ValueError, match="another compression; save it so, or install imagecodecs"):
        read_voxels(path, pore=7)
