"""Stores in another layout: the flows converted, everything else the same, and nothing half-written."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import box, random_flux, random_geometry
from torch import Tensor

from latentphys import operators
from latentphys.conversions import flux_from_cells, spectral_flux, spectral_solenoidal, spectral_velocity
from latentphys.data import Store, create_store, open_store
from latentphys.data.relayout import relayout
from latentphys.exact import conserve
from latentphys.fields import VELOCITY, FieldSpec
from latentphys.grid import Geometry, Grid

PRESSURE = FieldSpec("pressure", "scalar", "Pa")
TIMES = [0.0, 0.1, 0.3]
PARAMETERS: dict[str, Any] = {"viscosity": [1e-3, 2e-3], "force": np.arange(6.0).reshape(2, 3, 1)}


def write(path: Path, grid: Grid, velocity: Tensor, **changes: Any) -> Store:
    """A store of two trajectories of three snapshots, (2, 3, 3, nx, ny, nz), with a pressure beside the velocity."""
    settings: dict[str, Any] = {"parameters": PARAMETERS, "parameter_units": {"viscosity": "m2/s"}, **changes}
    specs = {"velocity": settings.pop("spec", VELOCITY), "pressure": PRESSURE}
    with create_store(path, grid=grid, specs=specs, family="flow", num_trajectories=2, times=TIMES, **settings) as out:
        for trajectory in range(2):
            out.write("velocity", trajectory, slice(None), velocity[trajectory])
            out.write("pressure", trajectory, slice(None), velocity[trajectory, :, 0])
            if "extras" in settings:
                out.write("routing", trajectory, slice(None), torch.arange(12).reshape(3, 4) + trajectory)
    return open_store(path)


def velocities(store: Store) -> Tensor:
    return torch.stack([store.read("velocity", i, slice(None)) for i in range(len(store))])


def exact_fluxes(geometry: Geometry) -> Tensor:
    """Two trajectories of three snapshots, the geometry batched (2, 1) or not at all."""
    return conserve(geometry=geometry, flux=random_flux(geometry.grid, 2, 3))


def test_cell_centred_and_back_in_voxels(tmp_path: Path) -> None:
    geometry = random_geometry(box("mixed"), 2, 1)
    assert geometry.solid is not None
    flux = exact_fluxes(geometry)
    rollout: dict[str, Any] = {"reference": "truth.zarr"}
    extras = {"routing": ((2, 3, 4), "int16", ("trajectory", "time", "layer"))}
    more: dict[str, Any] = {"attributes": {"rollout": rollout}, "extras": extras, "provenance": {"seed": 7}}
    source = write(tmp_path / "faces", geometry.grid, flux, solid=geometry.solid[:, 0], **more)
    counted: list[int] = []
    cells = open_store(relayout(source, tmp_path / "cells", "cell_centred", progress=counted.append))
    assert sum(counted) == 6
    assert torch.equal(velocities(cells), operators.cell_velocity(flux, geometry.grid))
    assert cells.specs["velocity"] == FieldSpec("velocity", "vector", "m/s")
    back = open_store(relayout(cells, tmp_path / "back", "face_flux"))
    expected = flux_from_cells(operators.cell_velocity(flux, geometry.grid), geometry, exact=True)
    torch.testing.assert_close(velocities(back), expected, rtol=0, atol=1e-12)
    assert float(operators.div(velocities(back), geometry.grid).abs().amax()) == 0.0
    assert float(velocities(back).abs().amax()) > 0.1
    for store, layout in ((cells, "cell_centred"), (back, "face_flux")):
        store.verify()
        assert (store.grid, store.family, store.times.tolist()) == (geometry.grid, "flow", TIMES)
        assert (store.attributes["layout"], store.attributes["kind"]) == (layout, "rollout")
        assert store.attributes["rollout"] == rollout
        assert store.attributes["parameter_units"] == {"viscosity": "m2/s", "force": "1"}
        assert all(np.array_equal(store.parameters[name], PARAMETERS[name]) for name in PARAMETERS)
        assert torch.equal(store.read("pressure", 1, slice(None)), flux[1, :, 0])
        assert store.read("routing", 1, 2).tolist() == [9, 10, 11, 12]
        assert all(torch.equal(store.geometry(i).fluid, geometry.fluid[i, 0]) for i in range(2))


def test_spectral_and_back_loses_nothing(tmp_path: Path) -> None:
    grid = Grid((6, 5, 8), (0.7, 1.3, 0.4))
    u = spectral_solenoidal(torch.randn(2, 3, 3, *grid.shape, dtype=torch.float64), grid)
    flux = conserve(geometry=Geometry(grid), flux=spectral_flux(u, grid))
    source = write(tmp_path / "faces", grid, flux)
    spectral = open_store(relayout(source, tmp_path / "cells", "cell_spectral"))
    torch.testing.assert_close(velocities(spectral), u, rtol=0, atol=1e-12)
    # with several threads a batch is transformed in other pieces than its snapshots, which shows in the last bits
    torch.testing.assert_close(velocities(spectral), spectral_velocity(flux, grid), rtol=0, atol=1e-14)
    back = open_store(relayout(spectral, tmp_path / "back", "face_flux"))
    torch.testing.assert_close(velocities(back), flux, rtol=0, atol=1e-12)
    assert float(operators.div(velocities(back), grid).abs().amax()) == 0.0


def test_spectral_velocities_lose_what_is_not_solenoidal(tmp_path: Path) -> None:
    grid = Grid((6, 5, 8), (0.7, 1.3, 0.4))
    u = torch.randn(2, 3, 3, *grid.shape, dtype=torch.float64)
    source = write(tmp_path / "cells", grid, u, layout="cell_spectral", spec=FieldSpec("velocity", "vector", "m/s"))
    flux = velocities(open_store(relayout(source, tmp_path / "faces", "face_flux")))
    assert float(operators.div(flux, grid).abs().amax()) == 0.0
    torch.testing.assert_close(spectral_velocity(flux, grid), spectral_solenoidal(u, grid), rtol=0, atol=1e-12)


def test_provenance_and_type(tmp_path: Path) -> None:
    grid = box("channel")
    source = write(tmp_path / "faces", grid, exact_fluxes(Geometry(grid)), provenance={"seed": 7}, dtype="float32")
    cells = open_store(relayout(source, tmp_path / "cells", "cell_centred"))
    single = open_store(relayout(cells, tmp_path / "single", "face_flux"))
    double = open_store(relayout(cells, tmp_path / "double", "face_flux", dtype="float64"))
    types = [str(velocities(s).dtype) for s in (cells, single, double)]
    assert types == ["torch.float32", "torch.float32", "torch.float64"]
    assert [s.attributes["provenance"]["exact"] for s in (cells, single, double)] == [False, False, True]
    converted = cells.attributes["provenance"]["converted"]
    assert (converted["path"], converted["layout"]) == (str((tmp_path / "faces").resolve()), "face_flux")
    assert converted["provenance"]["seed"] == 7 and "command" in cells.attributes["provenance"]
    assert float(operators.div(velocities(double), grid).abs().amax()) == 0.0


def test_an_interruption_leaves_nothing_and_the_old_store_in_place(tmp_path: Path) -> None:
    grid = box("channel")
    source = write(tmp_path / "faces", grid, exact_fluxes(Geometry(grid)))
    old = velocities(open_store(relayout(source, tmp_path / "cells", "cell_centred")))

    def interrupted(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        relayout(source, tmp_path / "cells", "cell_centred", overwrite=True, progress=interrupted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cells", "faces"]
    assert torch.equal(velocities(open_store(tmp_path / "cells")), old)


def test_impossible_conversions_are_refused(tmp_path: Path) -> None:
    grid = box("channel")
    source = write(tmp_path / "faces", grid, exact_fluxes(Geometry(grid)))
    for layout, message in [
        ("nodes", r"Expected layouts of face_flux \| cell_centred \| cell_spectral, got 'face_flux' in .* and 'nodes'"),
        ("face_flux", "Expected face_flux on one side, got 'face_flux' to 'face_flux'"),
        ("cell_spectral", "Expected a periodic box without solids for cell_spectral"),
    ]:
        with pytest.raises(ValueError, match=message):
            relayout(source, tmp_path / "out", layout)
    with pytest.raises(ValueError, match="Expected another path than the store's own"):
        relayout(source, source.path, "cell_centred", overwrite=True)
    with pytest.raises(ValueError, match="Expected a new path"):
        relayout(source, write(tmp_path / "old", grid, velocities(source)).path, "cell_centred")
    conserved = write(tmp_path / "heat", grid, velocities(source), spec=FieldSpec("velocity", "flux", "W", "conserved"))
    with pytest.raises(ValueError, match=r"Expected solenoidal fluxes in m3/s \| Wb, got 'velocity', conserved in W"):
        relayout(conserved, tmp_path / "out", "cell_centred")
    curl = FieldSpec("velocity", "vector", "1/s")
    vorticity = write(tmp_path / "curl", grid, velocities(source), spec=curl, layout="cell_centred")
    with pytest.raises(ValueError, match="Expected a velocity in .*/curl, got only"):
        relayout(vorticity, tmp_path / "out", "face_flux")
    solid = torch.zeros(2, 5, 4, 7, dtype=torch.bool)
    solid[1, 0, 0, 0] = True
    voxels = write(tmp_path / "voxels", Grid((5, 4, 7), (1.0, 1.0, 1.0)), velocities(source), solid=solid)
    with pytest.raises(ValueError, match="without solids for cell_spectral, got .*/voxels"):
        relayout(voxels, tmp_path / "out", "cell_spectral")
    assert not (tmp_path / "out").exists()
