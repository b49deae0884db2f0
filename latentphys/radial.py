"""Derivatives, weights and boundary conditions along the radius of a shell, as small dense FP64 matrices."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

Scheme = Literal["chebyshev", "finite_difference"]
SCHEMES: tuple[Scheme, ...] = ("chebyshev", "finite_difference")


def gauss_lobatto(inner: float, outer: float, num_levels: int) -> tuple[float, ...]:
    """Radii r_k = (r_i + r_o)/2 − (r_o − r_i)/2 · cos(πk/(n − 1)) [m], from inner to outer."""
    middle, half = (inner + outer) / 2, (outer - inner) / 2
    between = (middle - half * math.cos(math.pi * k / (num_levels - 1)) for k in range(1, num_levels - 1))
    return (inner, *between, outer)


def differentiation(radii: np.ndarray, scheme: Scheme) -> np.ndarray:
    """The matrix D of d/dr [1/m], shape (nr, nr): of the polynomial through all levels, or through three neighbours."""
    if scheme == "chebyshev":
        return _collocation(radii)
    n = len(radii)
    matrix = np.zeros((n, n))
    for k in range(n):
        first = min(max(k - 1, 0), n - 3)
        matrix[k, first : first + 3] = _collocation(radii[first : first + 3])[k - first]
    return matrix


def quadrature_weights(radii: np.ndarray, scheme: Scheme) -> np.ndarray:
    """Weights of ∫ dr [m], shape (nr,), all positive: Clenshaw–Curtis, or trapezoidal."""
    if scheme == "finite_difference":
        steps = np.diff(radii)
        return (np.append(steps, 0) + np.append(0, steps)) / 2
    n, gap = len(radii), radii[-1] - radii[0]
    integrals = np.zeros(n)
    integrals[::2] = 2 / (1 - np.arange(0, n, 2) ** 2)
    nodes = (2 * radii - radii[0] - radii[-1]) / gap
    return np.linalg.solve(np.polynomial.chebyshev.chebvander(nodes, n - 1).T, integrals) * gap / 2


def null_space(conditions: list[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """Columns that span {x : c·x = 0 for every condition c}, orthonormal in Σ w x²; shape (nr, nr − conditions)."""
    scaled = np.array([condition / np.sqrt(weights) for condition in conditions]).reshape(-1, len(weights))
    basis = np.linalg.svd(scaled)[2][len(conditions) :].T / np.sqrt(weights)[:, None]
    for condition in conditions:
        if np.count_nonzero(condition) == 1:
            basis[np.flatnonzero(condition)] = 0.0  # exactly, not to rounding
    return basis


def _collocation(nodes: np.ndarray) -> np.ndarray:
    """Derivative at each node of the polynomial through all of them (Berrut & Trefethen 2004, eq. 9.4)."""
    # In units of a quarter of the interval, long products of differences neither overflow nor underflow.
    quarter = (nodes[-1] - nodes[0]) / 4
    difference = (nodes[:, None] - nodes) / quarter + np.eye(len(nodes))
    weight = 1 / difference.prod(axis=1)
    matrix = weight / weight[:, None] / difference / quarter
    np.fill_diagonal(matrix, 0.0)
    return matrix - np.diag(matrix.sum(axis=1))
