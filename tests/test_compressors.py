"""Classical compressors keep what they promise to keep, and no more numbers than they may."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("pywt")
pytest.importorskip("zfpy")

from reference import BOUNDARIES, box, face_points, random_flux, random_geometry, two_pi_box

from latentphys import operators
from latentphys.exact import conserve
from latentphys.grid import Geometry, Grid
from latentphys.validators import vrmse

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SINGLE = 1e-6
"""Of numbers of order one that went through FP32."""
FULL = 3 * 8**3


@pytest.fixture
def compressors(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("compressors")


@pytest.fixture
def reconstructions(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("reconstructions")


def noise(grid: Grid, *batch: int, seed: int = 0) -> np.ndarray:
    """White noise that is 0 on closed faces."""
    torch.manual_seed(seed)
    return Geometry(grid).mask(random_flux(grid, *batch)).numpy()


def correlated(grid: Grid, *batch: int, seed: int = 0) -> np.ndarray:
    """Noise whose neighbours are alike."""
    x = noise(grid, *batch, seed=seed)
    for axis in (-3, -2, -1):
        for _ in range(2):
            x = (np.roll(x, 1, axis) + 2 * x + np.roll(x, -1, axis)) / 2
    return Geometry(grid).mask(torch.from_numpy(x / x.std())).numpy()


class Scale:
    """Velocities in units of a size, without a mean."""

    def __init__(self, size: float) -> None:
        self.size = size

    def normalise(self, x: Tensor, grid: Grid) -> Tensor:
        return operators.velocity(x, grid) / self.size

    def denormalise(self, x: Tensor, grid: Grid) -> Tensor:
        return operators.flux_of(x * self.size, grid)


def there_and_back(compressor: Any, u: np.ndarray) -> np.ndarray:
    return compressor.decode(compressor.encode(u))


@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_spectral_keeps_everything_at_full_rank(compressors: ModuleType, boundaries: str) -> None:
    grid = box(boundaries, (6, 4, 8))
    u, num_modes = noise(grid), int(Geometry(grid).open_faces.sum())
    assert np.abs(there_and_back(compressors.Spectral(grid, num_modes), u) - u).max() < SINGLE * np.abs(u).max()


@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_spectral_is_an_orthogonal_projection(compressors: ModuleType, boundaries: str) -> None:
    grid = box(boundaries)
    u, spectral = noise(grid), compressors.Spectral(grid, 50)
    kept = there_and_back(spectral, u)
    assert spectral.encode(u).num_numbers == 50
    assert np.abs(there_and_back(spectral, kept) - kept).max() < SINGLE * np.abs(u).max()
    assert np.vdot(kept, u - kept) == pytest.approx(0, abs=SINGLE * np.vdot(u, u))
    assert 0 < np.vdot(kept, kept) < 0.5 * np.vdot(u, u)


def test_spectral_keeps_the_longest_waves(compressors: ModuleType) -> None:
    """A plane wave and the waves that meet walls survive whole where shorter ones are cut off."""
    grid = box("channel", (8, 8, 8), (1.0, 1.0, 1.0))  # no slip at z = 0, free slip at the top
    height = grid.lengths[2]
    low, high = np.zeros((2, 3, *grid.shape))
    for component, wave in (
        (0, lambda z: (0.5 * math.pi / height * z).sin()),
        (2, lambda z: (math.pi / height * z).sin()),
    ):
        x, _, z = face_points(grid, component)
        for target, k in ((low, 1), (high, 3)):
            target[component] = ((2 * math.pi * k / grid.lengths[0] * x + 0.3).sin() * wave(z)).expand(grid.shape)
    spectral = compressors.Spectral(grid, 3 * 4**3)
    assert np.abs(there_and_back(spectral, low) - low).max() < SINGLE
    assert np.abs(there_and_back(spectral, high)).max() < SINGLE


def test_spectral_keeps_five_waves_between_walls(compressors: ModuleType) -> None:
    """Two quarter waves of each tangential velocity and half a wave of the normal one are longer than one across."""
    grid = box("channel", (8, 8, 8), (1.0, 1.0, 1.0))
    u = np.zeros((3, *grid.shape))
    for component, quarter_waves in ((0, 1), (0, 3), (1, 1), (1, 3), (2, 2)):
        z = face_points(grid, component)[2]
        u[component] += (quarter_waves * math.pi / 2 / grid.lengths[2] * z).sin().expand(grid.shape).numpy()
    assert np.abs(there_and_back(compressors.Spectral(grid, 5), u) - u).max() < SINGLE
    assert np.abs(there_and_back(compressors.Spectral(grid, 4), u) - u).max() > 0.1


def test_spectral_measures_waves_in_cells(compressors: ModuleType) -> None:
    """Waves along a long side are kept before shorter ones in cells, whatever they are in metres."""
    grid = Grid((16, 8, 8), (4.0, 1.0, 1.0))
    x, y, _ = face_points(grid, 1)
    kept = []
    for phase in (2 * math.pi * 2 / 64.0 * x, 2 * math.pi * 2 / 8.0 * y):  # 8 and 4 cells long
        u = np.zeros((3, *grid.shape))
        u[1] = (phase + 0.3).sin().expand(grid.shape)
        kept.append(float(np.square(there_and_back(compressors.Spectral(grid, 100), u)).sum() / np.square(u).sum()))
    assert kept == pytest.approx([1.0, 0.0], abs=SINGLE)


def test_spectral_refuses_open_sides(compressors: ModuleType) -> None:
    with pytest.raises(ValueError, match="walls and periodic sides"):
        compressors.Spectral(box("duct"), 10)


def test_every_compressor_refuses_no_numbers(compressors: ModuleType) -> None:
    with pytest.raises(ValueError, match="at least 1 number per snapshot, got 0"):
        compressors.Zfp(0)


def test_pod_reproduces_training_snapshots(compressors: ModuleType) -> None:
    """As many modes as snapshots less one (their mean costs nothing), whatever the budget; others are cut off."""
    grid = box("channel", (8, 8, 8))
    train = noise(grid, 6)
    pod = compressors.Pod(train.astype(np.float32), FULL)
    assert [pod.encode(u).num_numbers for u in train] == [5] * 6
    assert max(np.abs(there_and_back(pod, u) - u).max() for u in train) < 10 * SINGLE
    assert pod.num_parameters == 6 * FULL
    stranger = noise(grid, seed=1)
    assert np.abs(there_and_back(pod, stranger) - stranger).max() > 1


def test_pod_keeps_the_modes_that_vary_most(compressors: ModuleType) -> None:
    grid = box("periodic", (8, 8, 8))
    modes = np.linalg.qr(noise(grid, 3).reshape(3, -1).T)[0].T.reshape(3, 3, *grid.shape)
    amplitudes = np.random.default_rng(0).standard_normal((20, 3)) * [1.0, 10.0, 3.0]
    train = np.einsum("ni,i...->n...", amplitudes, modes) + 2.0
    pod = compressors.Pod(train, 2)
    assert pod.encode(train[0]).num_numbers == 2
    lost = np.stack([there_and_back(pod, u) - u for u in train])
    assert np.square(lost).sum() < 1.1 * np.square(amplitudes[:, 0] - amplitudes[:, 0].mean()).sum()


def test_patches_keep_everything_at_full_rank_and_the_best_part_below(compressors: ModuleType) -> None:
    grid = box("periodic", (8, 4, 8))
    train = correlated(grid, 5)
    full = compressors.PatchPca(train, 3 * 2**3, 2)
    assert full.encode(train[0]).num_numbers == train[0].size
    assert np.abs(there_and_back(full, train[0]) - train[0]).max() < 10 * SINGLE
    errors = []
    for channels in (2, 4, 8, 16):
        pca = compressors.PatchPca(train, channels, 2)
        assert pca.encode(train[0]).num_numbers == channels * 4 * 2 * 4
        errors.append(sum(np.square(there_and_back(pca, u) - u).sum() for u in train))
        means = np.stack([patch_means(u) for u in train])
        if channels == 4:  # three means per patch are a code of patches too
            assert errors[-1] < np.square(train - means).sum()
    assert errors == sorted(errors, reverse=True)


def patch_means(u: np.ndarray) -> np.ndarray:
    """Each value replaced by its mean over 2³ cells."""
    c, x, y, z = u.shape
    means = u.reshape(c, x // 2, 2, y // 2, 2, z // 2, 2).mean((2, 4, 6))
    return means.repeat(2, 1).repeat(2, 2).repeat(2, 3)


@pytest.mark.parametrize(("channels", "patch"), [(24, 3), (25, 2)])
def test_patches_that_do_not_fit(compressors: ModuleType, channels: int, patch: int) -> None:
    with pytest.raises(ValueError, match="patches that divide a box"):
        compressors.PatchPca(noise(box("periodic", (8, 8, 8)), 2), channels, patch)


@pytest.mark.parametrize("shape", [(8, 8, 8), (16, 8, 12)])
@pytest.mark.parametrize("share", [4, 12, 48])
def test_wavelets_and_zfp_use_up_their_budget(compressors: ModuleType, shape: tuple[int, int, int], share: int) -> None:
    u = noise(box("periodic", shape))
    budget = u.size // share
    wavelet, zfp = compressors.Wavelet(budget).encode(u), compressors.Zfp(budget).encode(u)
    assert budget - 2 < wavelet.num_numbers <= budget
    kept, values, *_ = wavelet.stored
    bits = 32 * len(kept) + math.log2(math.comb(3 * math.prod(shape), len(kept)))
    assert (wavelet.num_numbers, values.dtype) == (pytest.approx(bits / 32), np.float32)
    assert 8 * len(zfp.stored[0]) == 32 * zfp.num_numbers
    assert zfp.num_numbers <= budget


def test_eight_bits_are_four_times_as_many_numbers_each_off_by_half_a_step(compressors: ModuleType) -> None:
    u = noise(box("periodic", (8, 8, 8)))
    budget = u.size // 48
    coarse, fine = (compressors.Spectral(box("periodic", (8, 8, 8)), budget, bits) for bits in (32, 8))
    code, exact = fine.encode(u), coarse.encode(u)
    assert code.num_numbers == exact.num_numbers == budget and code.stored.size == 4 * exact.stored.size
    step = np.abs(code.stored).max() / 127
    assert len(np.unique(np.rint(code.stored / step))) <= 255
    assert 0 < np.abs(code.stored[: exact.stored.size] - exact.stored).max() <= step / 2 * (1 + 1e-6)
    kept, values, *_ = compressors.Wavelet(budget, bits=8).encode(u).stored
    bits = 8 * len(kept) + math.log2(math.comb(u.size, len(kept)))
    assert budget - 1 < bits / 32 <= budget and len(kept) == len(values)


@pytest.mark.parametrize("name", ["Wavelet", "Zfp"])
def test_everything_is_kept_where_there_is_room(compressors: ModuleType, name: str) -> None:
    u = noise(box("periodic", (8, 8, 8)))
    compressor = getattr(compressors, name)(FULL + 16)
    assert np.abs(there_and_back(compressor, u) - u).max() < SINGLE * np.abs(u).max()


def test_zfp_says_what_its_lowest_rate_costs(compressors: ModuleType) -> None:
    u = noise(box("periodic", (8, 8, 8)))
    code = compressors.Zfp(1).encode(u)
    assert code.num_numbers >= 24 * 9 / 32  # 9 bits for each of 24 blocks
    assert np.isfinite(compressors.Zfp(1).decode(code)).all()


def test_wavelets_keep_the_largest_coefficients(compressors: ModuleType) -> None:
    """A bump in one place costs next to nothing; where coefficients are all alike, little is kept."""
    grid = box("periodic", (16, 16, 16))
    x, y, z = (at - length / 2 for at, length in zip(face_points(grid, 0), grid.lengths, strict=True))
    u = np.zeros((3, *grid.shape))
    u[0] = (-(x**2 + y**2 + z**2) / 4).exp()
    wavelet = compressors.Wavelet(3 * 16**3 // 8)
    lost = np.square(there_and_back(wavelet, u) - u).sum() / np.square(u).sum()
    white = noise(grid)
    assert lost < 1e-4 < 0.2 < np.square(there_and_back(wavelet, white) - white).sum() / np.square(white).sum()


def test_errors_of_a_reconstruction_that_is_off_by_a_constant(reconstructions: ModuleType) -> None:
    """Closed forms for a uniform velocity too much, in units of the scale."""
    torch.manual_seed(0)
    geometry = random_geometry(box("channel", (8, 8, 8)))
    grid, size = geometry.grid, 2.0
    truth = conserve(flux=random_flux(grid), geometry=geometry)
    extra = geometry.mask(operators.flux_of(torch.full((3, *grid.shape), 0.5, dtype=torch.float64), grid))
    errors = reconstructions.Errors(Scale(size))
    errors.update(truth + extra, truth, geometry)
    figures = errors.figures()
    assert figures["mse_unit"] == pytest.approx((0.5 / size) ** 2)
    assert figures["wall_slip"] == pytest.approx(0.5 / size)
    assert figures["vrmse"] == pytest.approx(float(vrmse(truth + extra, truth, geometry)))
    assert figures["net_flux_max"] == float(operators.div(truth + extra, grid).abs().amax()) > 0
    assert figures["net_flux_relative"] == pytest.approx(figures["net_flux_max"] / float(truth.abs().amax()))
    assert figures["solid_flux_max"] == 0.0
    errors.update(truth + torch.where(geometry.open_faces, 0.0, 3.0), truth, geometry)
    assert errors.figures()["solid_flux_max"] == 3.0
    assert errors.figures()["vrmse"] == pytest.approx(figures["vrmse"] / 2)
    assert errors.figures()["mse_unit"] == pytest.approx((0.5 / size) ** 2 / 2)


def test_errors_of_the_truth(reconstructions: ModuleType) -> None:
    geometry = random_geometry(box("periodic", (8, 8, 8)))
    truth = conserve(flux=random_flux(geometry.grid), geometry=geometry)
    errors = reconstructions.Errors(Scale(1.0))
    errors.update(truth, truth, geometry)
    assert {value for name, value in errors.figures().items()} == {0.0}


def test_spectra_are_told_apart_by_band(reconstructions: ModuleType) -> None:
    """Twice the velocity is four times the energy, in every band."""
    grid = two_pi_box((16, 16, 16))
    truth = random_flux(grid)
    errors = reconstructions.Errors(Scale(1.0))
    errors.update(2 * truth, truth, Geometry(grid))
    figures = errors.figures()
    assert [figures[f"spectrum_{band}"] for band in ("low", "mid", "high")] == pytest.approx([math.log10(4)] * 3)
    assert "wall_slip" not in figures


def test_faces_beside_no_slip_surfaces(reconstructions: ModuleType) -> None:
    """The first layer off a no-slip side, none off a free-slip one, and four faces for each edge of a lone voxel."""
    walls = reconstructions.beside_no_slip(Geometry(box("channel", (5, 6, 7))))
    assert walls.sum((1, 2, 3)).tolist() == [30, 30, 0]
    assert bool(walls[:2, :, :, 0].all())
    ceiling = Grid((5, 6, 7), (1.0, 1.0, 1.0), (("no_slip", "no_slip"), ("free_slip", "no_slip"), ("periodic",) * 2))
    found = reconstructions.beside_no_slip(Geometry(ceiling))
    expected = torch.zeros_like(found)
    expected[1:, [0, -1]] = True
    expected[0, 1:, -1] = expected[2, :, -1] = True
    expected[1, :, 0] = False
    assert torch.equal(found, expected)
    solid = torch.zeros(5, 6, 7, dtype=torch.bool)
    solid[2, 3, 4] = True
    voxel = reconstructions.beside_no_slip(Geometry(box("periodic", (5, 6, 7)), solid))
    assert voxel.sum((1, 2, 3)).tolist() == [8, 8, 8]
    assert voxel[0, 2:4, [2, 4], 4].all() and voxel[0, 2:4, 3, [3, 5]].all()


@pytest.mark.slow
def test_the_benchmark_prints_json_alone(tmp_path: Path) -> None:
    """One line for each method, conservation to the last bit where it is promised, and no more numbers than allowed."""
    command = [sys.executable, str(BENCHMARKS / "bench_autoencoder.py"), "--size", "tiny", "--families", "porous"]
    command += ["--threads", "1", "--json", "--work", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()][1:]
    models = {line["model"]: line for line in lines if line.get("family") == "porous"}
    assert len(models) == 16
    exact = [name for name, line in models.items() if line["net_flux_max"] == 0.0]
    assert exact == [name for name in models if name.endswith("_projected") or name.startswith("helmholtz")]
    assert all(line["solid_flux_max"] == 0.0 and line["vrmse"] > 0 for line in models.values())
    assert models["helmholtz"]["numbers_stored"] == 16 * 4**3
    assert all(line["numbers_stored"] <= 16 * 4**3 for line in models.values())
    assert models["helmholtz"]["compression"] == 12
    assert models["unconstrained_projected"]["vrmse"] < models["unconstrained"]["vrmse"]
    (cost,) = (line for line in lines if line["name"] == "cost_tiny_16")
    assert cost["backward_mib"] > 0 and cost["predicted_mib"] > 0
