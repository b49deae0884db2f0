"""How far imported flows are from solenoidal, against closed forms, and fluxes made of them."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import foreign
import numpy as np
import pytest
import torch
from reference import box, random_flux, random_geometry

from latentphys import operators
from latentphys.conversions import flux_from_cells, spectral_flux, spectral_solenoidal
from latentphys.data import open_store
from latentphys.data.importing import ImportOptions, Source, import_files, report, solenoidal_floor
from latentphys.data.relayout import relayout
from latentphys.exact import conserve
from latentphys.fields import VELOCITY, FieldSpec
from latentphys.grid import Geometry, Grid

VECTOR = FieldSpec("velocity", "vector", "m/s")
Flow = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def source(values: np.ndarray, geometry: Geometry, spec: FieldSpec = VECTOR) -> Source:
    """A source of one field, (trajectory, time, axis, x, y, z)."""
    count, num_frames = values.shape[:2]
    solid = geometry.solid
    return Source(
        format="fake",
        paths=[],
        family="flow",
        grid=geometry.grid,
        times=np.arange(float(num_frames)),
        num_trajectories=count,
        specs={spec.name: spec},
        read=lambda name, trajectory, frame: values[trajectory, frame],
        solid=None if solid is None else np.broadcast_to(solid.numpy(), (count, *geometry.grid.shape)),
        layout="face_flux" if spec.kind == "flux" else "cell_centred",
    )


def planar(n: int, flow: Flow) -> Source:
    """A flow in the plane, sampled at the centres of n × n cells of a box of 2π."""
    x = foreign.points(n, 2 * math.pi)
    u, v = np.broadcast_arrays(*flow(x[:, None], x[None, :]))
    h = 2 * math.pi / n
    return source(np.stack([u, v, 0 * u])[None, None, ..., None], Geometry(Grid((n, n, 1), (h, h, h))))


def eddies(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """u = ∂ψ/∂y, v = −∂ψ/∂x of ψ = sin x sin 2y: solenoidal, and ⟨u·u⟩ = 5/4."""
    return 2 * np.sin(x) * np.cos(2 * y), -np.cos(x) * np.sin(2 * y)


@pytest.mark.parametrize("n", [8, 16, 32])
def test_a_solenoidal_flow_at_points_has_the_error_of_its_interpolation(n: int) -> None:
    """∇·u of the interpolation is 2 cos x cos 2y (sin h/h − sin 2h/2h), second order; the spectral one is zero."""
    floor, h = solenoidal_floor(planar(n, eddies))["velocity"], 2 * math.pi / n
    size = abs(math.sin(h) / h - math.sin(2 * h) / (2 * h)) * h / math.sqrt(1.25)
    assert floor["mac"]["rms"] == pytest.approx(size, rel=1e-12)
    assert floor["mac"]["max"] == pytest.approx(2 * size * math.cos(h / 2) * math.cos(h), rel=1e-12)
    assert floor["spectral"]["max"] < 1e-14 and floor["spectral"]["removed"] < 1e-14
    # projection takes off the gradient part of the interpolation: −∇·u / |k|, with the lattice's wavenumbers
    k = math.hypot(2 * math.sin(h / 2), 2 * math.sin(h)) / h
    u, v = math.cos(h / 2), 0.5 * math.cos(h)
    norm = math.sqrt(u**2 + v**2)
    assert floor["mac"]["removed"] == pytest.approx(size * math.sqrt(1.25) / h / k / norm, rel=1e-10)


def test_gradients_are_removed_and_uniform_flow_is_not() -> None:
    floor = solenoidal_floor(planar(16, lambda x, y: (np.sin(2 * x), 0 * y)))["velocity"]
    assert floor["mac"]["removed"] == pytest.approx(1) and floor["spectral"]["removed"] == pytest.approx(1)
    h = 2 * math.pi / 16
    # of sin 2x, ∇·u = 2 cos 2x, as large as 2 √2 rms(u) at most; the centres hit cos 2x at multiples of π/8
    assert floor["spectral"]["rms"] == pytest.approx(2 * h, rel=1e-12)
    assert floor["spectral"]["max"] == pytest.approx(2 * math.sqrt(2) * h * math.cos(math.pi / 8), rel=1e-12)
    fine = solenoidal_floor(planar(16, lambda x, y: (np.sin(7 * x), 0 * y)))["velocity"]["spectral"]
    assert fine["removed"] == pytest.approx(1) and fine["rms"] == pytest.approx(7 * h)
    # at Nyquist the slope of a sample is anything
    alternating = solenoidal_floor(planar(16, lambda x, y: (np.sin(8 * x), 0 * y)))["velocity"]["spectral"]
    assert alternating["max"] == alternating["removed"] == 0.0
    floor = solenoidal_floor(planar(16, lambda x, y: (1 + 0 * x, 2 + 0 * y)))["velocity"]
    assert floor["mac"]["max"] == 0 and floor["spectral"]["removed"] < 1e-14
    still = solenoidal_floor(planar(8, lambda x, y: (0 * x, 0 * y)))["velocity"]
    assert all(still[key][number] == 0 for key in ("mac", "spectral") for number in ("rms", "max", "removed"))


def test_all_snapshots_count_up_to_64_evenly_spaced() -> None:
    """One wild frame among a hundred calm ones is measured where it is among those that are looked at."""
    x = foreign.points(8, 2 * math.pi)
    calm = np.stack(np.broadcast_arrays(np.ones((8, 8, 1)), 0.0, 0.0))
    values = np.broadcast_to(calm, (2, 50, *calm.shape)).copy()
    geometry = Geometry(Grid((8, 8, 1), (0.1, 0.1, 0.1)))
    assert solenoidal_floor(source(values, geometry))["velocity"]["mac"]["max"] == 0
    values[1, 49, 0] += np.sin(x)[:, None, None]
    counted: list[int] = []
    floor = solenoidal_floor(source(values, geometry), progress=counted.append)["velocity"]
    assert floor["mac"]["snapshots"] == sum(counted) == 64 and floor["mac"]["max"] > 0.1
    assert solenoidal_floor(source(values[:, :30], geometry))["velocity"]["mac"]["snapshots"] == 60


def test_in_voxels_only_open_cells_and_faces_count() -> None:
    geometry = random_geometry(box("mixed"))
    assert geometry.solid is not None
    cells = operators.cell_velocity(conserve(flux=random_flux(geometry.grid), geometry=geometry), geometry.grid)
    floor = solenoidal_floor(source(cells[None, None].numpy(), geometry))
    assert list(floor["velocity"]) == ["mac"]
    wild = torch.where(geometry.solid, 1e9, cells)  # what stands in solid cells is nobody's flow
    assert solenoidal_floor(source(wild[None, None].numpy(), geometry)) == floor


def test_fluxes_are_measured_by_their_net(capsys: pytest.CaptureFixture[str]) -> None:
    geometry = random_geometry(box("mixed"))
    flux = random_flux(geometry.grid)
    numbers = solenoidal_floor(source(flux[None, None].numpy(), geometry, VELOCITY))["velocity"]["flux"]
    net = operators.div(flux, geometry.grid)
    assert numbers["max"] == pytest.approx(float(net.abs().amax() / flux.abs().amax()), rel=1e-12)
    exact = conserve(flux=flux, geometry=geometry)
    floor = solenoidal_floor(source(exact[None, None].numpy(), geometry, VELOCITY))
    assert floor["velocity"]["flux"]["max"] == 0.0
    (line,) = report(floor)
    assert line == "velocity: net flux / largest |flux| rms 0, max 0 (flux, 1 snapshots)"


@pytest.mark.parametrize("spectral", [False, True])
def test_velocities_become_exact_fluxes(tmp_path: Path, spectral: bool) -> None:
    path = foreign.well(tmp_path / "file", (6, 5, 4), kinds=("periodic",) * 3)
    (out,) = import_files(path, tmp_path / "out.zarr", flux=["velocity"], spectral=spectral)
    store = open_store(out)
    assert (store.specs["velocity"], store.attributes["layout"]) == (VELOCITY, "face_flux")
    assert store.attributes["provenance"]["exact"] is True and store.array("velocity").dtype == np.float64
    with foreign.h5py.File(path) as file:
        cells = torch.from_numpy(np.moveaxis(file["t1_fields/velocity"][1, 2].astype(np.float64), -1, 0).copy())
    flux, geometry = store.read("velocity", 1, 2), Geometry(store.grid)
    solenoidal = spectral_flux(spectral_solenoidal(cells, store.grid), store.grid)
    expected = (
        conserve(flux=solenoidal, geometry=geometry) if spectral else flux_from_cells(cells, geometry, exact=True)
    )
    assert torch.equal(flux, expected)
    assert all(bool((operators.div(store.read("velocity", i, slice(None)), store.grid) == 0.0).all()) for i in range(2))
    # what is in the store's attributes is how far the file was from that
    assert store.attributes["floor"]["velocity"]["mac"]["removed"] > 0.1
    assert store.specs["pressure"].kind == "scalar"


def test_magnetic_fields_too(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with foreign.written(path) as file:
        file["b"] = foreign.numbers(2, 6, 5, 4, 3)
    options = ImportOptions(axes="txyzc", fields=("magnetic_field",) * 3)
    (out,) = import_files(path, tmp_path / "out.zarr", flux=["magnetic_field"], options=options)
    store = open_store(out)
    assert store.specs["magnetic_field"] == FieldSpec("magnetic_field", "flux", "Wb", "solenoidal")
    assert bool((operators.div(store.read("magnetic_field", 0, 1), store.grid) == 0.0).all())
    back = open_store(relayout(store, tmp_path / "back.zarr", "cell_centred"))
    assert back.specs["magnetic_field"] == FieldSpec("magnetic_field", "vector", "T")


def test_fluxes_in_single_precision_say_so(tmp_path: Path) -> None:
    path = foreign.pdebench_flow(tmp_path / "file", (6, 4))
    (out,) = import_files(path, tmp_path / "out.zarr", flux=["velocity"], dtype="float32")
    store = open_store(out)
    assert store.attributes["provenance"]["exact"] is False and store.array("velocity").dtype == np.float32
    net = operators.div(store.read("velocity", 0, 0).double(), store.grid)
    assert 0 < float(net.abs().amax()) < 1e-6 * float(store.read("velocity", 0, 0).abs().amax())


def test_what_cannot_become_a_flux(tmp_path: Path) -> None:
    path, out = foreign.well(tmp_path / "file"), tmp_path / "out.zarr"
    for name in ("pressure", "wind"):
        with pytest.raises(ValueError, match=rf"vectors in m/s or T to make fluxes of \(velocity\), got '{name}'"):
            import_files(path, out, flux=[name])
    with pytest.raises(ValueError, match=r"\(none\), got 'velocity'"):
        import_files(path, out, flux=["velocity"], options=ImportOptions(units={"velocity": "1"}))
    with pytest.raises(ValueError, match="a periodic box without solids for a spectral conversion"):
        import_files(path, out, flux=["velocity"], spectral=True)
    with pytest.raises(ValueError, match="fields that shall become fluxes .* beside `spectral`"):
        import_files(path, out, spectral=True)
    assert not out.exists()


def test_numbers_that_are_not_finite_are_found_whoever_read_them() -> None:
    values = np.zeros((2, 3, 3, 8, 8, 1))
    values[1, 2, 0, 4, 4, 0] = np.inf
    with pytest.raises(ValueError, match="NaN or infinity in 'velocity', trajectory 1, frame 2"):
        solenoidal_floor(source(values, Geometry(Grid((8, 8, 1), (1.0, 1.0, 1.0)))))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_fluxes_in_files_end_at_zero_or_stay_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """A flux that a solver conserved to twelve digits, as finite-volume codes write it."""
    geometry = random_geometry(box("mixed"))
    flux = conserve(flux=random_flux(geometry.grid), geometry=geometry)
    noisy = geometry.mask(flux + 1e-12 * random_flux(geometry.grid))
    fake: Any = SimpleNamespace(
        recognises=lambda path: True,
        sources=lambda path, options: [source(noisy[None, None].numpy(), geometry, VELOCITY)],
    )
    monkeypatch.setattr("latentphys.data.importing.write.reader", lambda format: fake)
    done: list[tuple[int, int]] = []
    (out,) = import_files(
        tmp_path, tmp_path / "out.zarr", format="fake", dtype=dtype, progress=lambda *counts: done.append(counts)
    )
    store = open_store(out)
    stored, is_exact = store.read("velocity", 0, 0), dtype == "float64"
    assert store.attributes["provenance"]["exact"] is is_exact and store.attributes["layout"] == "face_flux"
    assert bool((operators.div(stored, store.grid) == 0.0).all()) is is_exact
    if is_exact:
        assert 0 < float((stored - noisy).abs().amax()) < 1e-10
    else:
        assert torch.equal(stored, noisy.float())
    assert store.attributes["floor"]["velocity"]["flux"]["max"] > 1e-13 and done == [(1, 2), (2, 2)]
