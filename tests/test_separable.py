"""Functions of the Laplacian of an empty box against dense functions of its matrix."""

import itertools
import math

import numpy as np
import pytest
import torch
from reference import BOUNDARIES, box
from torch import Tensor

from latentphys import operators
from latentphys.grid import End, Ends, Geometry, Grid
from latentphys.separable import Separable, box_poisson

CELLS: list[tuple[End, End]] = [
    ("periodic", "periodic"),
    ("closed", "closed"),
    ("open", "open"),
    ("open", "closed"),
    ("closed", "open"),
]
CORNERS: list[tuple[End, End, bool]] = [
    ("periodic", "periodic", False),
    ("periodic", "periodic", True),
    ("closed", "closed", False),
    ("closed", "closed", True),
]
WEIGHTS = (0.6, 2.1, 1.3)
FUNCTIONS = {"inverse": lambda e: 1 / e, "root": torch.sqrt, "inverse root": lambda e: e**-0.5}


def second_difference(n: int, low: End, high: End, corners: bool) -> np.ndarray:
    """Minus the second difference along one axis; the value on the corner of a low wall is zero and stays it."""
    matrix = np.zeros((n, n))
    for i in range(n):
        for j in (i - 1, i + 1):
            if low == "periodic" or 0 <= j < n:
                matrix[i, i] += 1
                matrix[i, j % n] -= 1
            elif corners:
                matrix[i, i] += 1
            elif (low if j < 0 else high) == "open":
                matrix[i, i] += 2  # zero half a cell away: minus the value itself beyond
    if corners and low != "periodic":
        matrix[0] = matrix[:, 0] = 0.0
    return matrix


def dense(shape: tuple[int, int, int], ends: Ends, corners: tuple[bool, bool, bool], name: str) -> Tensor:
    """f(−Δ) with nothing at eigenvalue 0, nor on corners that lie on a wall."""
    one = [np.eye(n) for n in shape]
    laplacian: np.ndarray = np.zeros((math.prod(shape),) * 2)
    inside: np.ndarray = np.ones(1)
    for axis, (n, pair, corner, weight) in enumerate(zip(shape, ends, corners, WEIGHTS, strict=True)):
        along = [weight * second_difference(n, *pair, corner) if a == axis else one[a] for a in range(3)]
        laplacian += np.kron(np.kron(along[0], along[1]), along[2])
        inside = np.kron(inside, np.arange(n) > 0 if corner and pair[0] != "periodic" else np.ones(n))
    laplacian *= inside[:, None] * inside
    values, vectors = np.linalg.eigh(laplacian)
    kept = values > 1e-9
    symbol = FUNCTIONS[name](torch.from_numpy(values[kept])).numpy()
    return torch.from_numpy(vectors[:, kept] * symbol @ vectors[:, kept].T)


def applied(shape: tuple[int, int, int], ends: Ends, corners: tuple[bool, bool, bool], name: str) -> Tensor:
    """The matrix of a `Separable`, column by column."""
    operator = Separable(
        Grid(shape, (1.0, 1.0, 1.0)),
        ends,
        WEIGHTS,
        FUNCTIONS[name],
        corners=corners,
        dtype=torch.float64,
        device=torch.device("cpu"),
    )
    units = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
    return operator(units).flatten(1).T


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 2, 5)])
def test_it_is_the_dense_function_on_cells(shape: tuple[int, int, int], name: str) -> None:
    for x, y, z in itertools.product(CELLS, repeat=3):
        cells = (False, False, False)
        torch.testing.assert_close(
            applied(shape, (x, y, z), cells, name), dense(shape, (x, y, z), cells, name), rtol=0, atol=1e-13
        )


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 2, 5)])
def test_it_is_the_dense_function_on_corners(shape: tuple[int, int, int], name: str) -> None:
    for axes in itertools.product(CORNERS, repeat=3):
        (ax, bx, x), (ay, by, y), (az, bz, z) = axes
        ends, corners = ((ax, bx), (ay, by), (az, bz)), (x, y, z)
        torch.testing.assert_close(
            applied(shape, ends, corners, name), dense(shape, ends, corners, name), rtol=0, atol=1e-13
        )


def test_eigenvalue_zero_is_left_alone() -> None:
    """The function is never asked for it, and a constant, whose eigenvalue it is, has no part in the result."""
    asked = []

    def inverse(eigenvalues: Tensor) -> Tensor:
        asked.append(eigenvalues)
        return 1 / eigenvalues

    ends: Ends = (("periodic", "periodic"), ("closed", "closed"), ("periodic", "periodic"))
    grid = Grid((4, 3, 5), (1.0, 1.0, 1.0))
    operator = Separable(grid, ends, WEIGHTS, inverse, dtype=torch.float64, device=torch.device("cpu"))
    assert asked and all(bool((e > 1e-3).all()) for e in asked)
    assert float(operator(torch.ones(grid.shape, dtype=torch.float64)).abs().amax()) < 1e-15
    assert float(operator(torch.randn(grid.shape, dtype=torch.float64)).mean().abs()) < 1e-15


@pytest.mark.parametrize("corners", [False, True])
def test_single_precision_is_as_good_as_its_rounding(corners: bool) -> None:
    ends: Ends = (("closed", "closed"), ("periodic", "periodic"), ("closed", "closed"))
    grid = Grid((8, 6, 7), (1e-6, 1e-6, 1e-6))
    weights = (1e12, 1e12, 1e12)
    x = torch.randn(2, *grid.shape, dtype=torch.float64)
    double, single = (
        Separable(
            grid,
            ends,
            weights,
            lambda e: e**-0.5,
            corners=(corners, False, corners),
            dtype=dtype,
            device=torch.device("cpu"),
        )(x.to(dtype))
        for dtype in (torch.float64, torch.float32)
    )
    assert single.dtype == torch.float32
    assert float((single - double).abs().amax() / double.abs().amax()) < 1e-6


@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_the_direct_solver_undoes_the_laplacian(boundaries: str) -> None:
    grid = box(boundaries)
    r = torch.randn(2, *grid.shape, dtype=torch.float64)
    r -= r.mean((-3, -2, -1), keepdim=True)
    phi = box_poisson(grid, Geometry(grid).ends, torch.float64, r.device)(r)
    metric = grid.per_face((1.3 * 0.4 / 0.7, 0.7 * 0.4 / 1.3, 0.7 * 1.3 / 0.4), r)
    torch.testing.assert_close(operators.div(metric * operators.grad(phi, grid), grid), r, rtol=0, atol=1e-13)
    assert float(phi.mean((-3, -2, -1)).abs().amax()) < 1e-14


def test_corners_of_an_open_axis_are_refused() -> None:
    ends: Ends = (("closed", "closed"), ("closed", "open"), ("closed", "closed"))
    with pytest.raises(ValueError, match=r"Expected closed ends of an axis with values on corners, got .*'open'"):
        Separable(
            Grid((3, 3, 3), (1.0, 1.0, 1.0)),
            ends,
            WEIGHTS,
            torch.sqrt,
            corners=(False, True, False),
            dtype=torch.float64,
            device=torch.device("cpu"),
        )
