// A box of cells with solid voxels as a graph: its fluid cells, the faces between them, and what lies open.
//
// Arrays are in C order. A cell owns its three low faces, so that a flux [m³/s] has the shape (3, nx, ny, nz): face a
// of cell i lies between cell i − e_a and cell i. On a periodic axis the high face of the last cell is face 0; through
// an open high side flows, unstored, what closes the balance of the last cells.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __FAST_MATH__
#error "latentphys: expected IEEE arithmetic, got -ffast-math, which hides NaN; compile this file without it."
#endif

namespace latentphys {

enum class Boundary { periodic, no_slip, free_slip, inflow, outflow };

inline bool is_open(Boundary boundary) { return boundary == Boundary::inflow || boundary == Boundary::outflow; }

// Throws std::runtime_error for another word than those of Boundary.
inline Boundary boundary_of(const std::string& word) {
  static const std::array<const char*, 5> words{"periodic", "no_slip", "free_slip", "inflow", "outflow"};
  for (std::size_t i = 0; i < words.size(); ++i)
    if (word == words[i]) return static_cast<Boundary>(i);
  throw std::runtime_error("Expected a boundary of periodic | no_slip | free_slip | inflow | outflow, got '" + word +
                           "'.");
}

using Boundaries = std::array<std::array<Boundary, 2>, 3>;  // per axis {low, high}

// From six words with blanks between them, x- x+ y- y+ z- z+.
inline Boundaries boundaries_of(const std::string& words) {
  std::istringstream in(words);
  Boundaries boundaries;
  std::string word, more;
  int num_words = 0;
  for (; num_words < 6 && in >> word; ++num_words) boundaries[num_words / 2][num_words % 2] = boundary_of(word);
  if (num_words < 6 || in >> more)
    throw std::runtime_error("Expected six boundaries, x- x+ y- y+ z- z+, got '" + words + "'.");
  return boundaries;
}

// A box of nx × ny × nz cells.
struct Grid {
  std::array<std::int64_t, 3> shape;
  std::array<double, 3> spacing;  // [m]
  Boundaries boundaries;

  std::int64_t num_cells() const { return shape[0] * shape[1] * shape[2]; }
  bool periodic(int axis) const { return boundaries[axis][0] == Boundary::periodic; }
  bool open(int axis, int side) const { return is_open(boundaries[axis][side]); }

  // Face area / cell size [m], which turns a difference of the potential [m²/s] into a flux.
  double conductance(int axis) const { return spacing[(axis + 1) % 3] / spacing[axis] * spacing[(axis + 2) % 3]; }

  // Throws std::runtime_error for a shape, spacing or boundary that no box can have.
  void check() const {
    double cells = 1;
    for (int axis = 0; axis < 3; ++axis) {
      const bool ends_alike = periodic(axis) == (boundaries[axis][1] == Boundary::periodic);
      std::ostringstream got;
      got << shape[axis] << " cells of " << spacing[axis] << " m along " << "xyz"[axis];
      if (!ends_alike)
        throw std::runtime_error(std::string("Expected 'periodic' on both sides of axis ") + "xyz"[axis] +
                                 " or on neither, got one.");
      if (shape[axis] < (periodic(axis) ? 1 : 2))
        throw std::runtime_error("Expected at least 2 cells along each axis, or 1 along a periodic one, got " +
                                 got.str() + "; make the axis periodic where nothing depends on it.");
      if (!(std::isfinite(spacing[axis]) && spacing[axis] > 0))
        throw std::runtime_error("Expected three positive, finite spacings [m], got " + got.str() + ".");
      cells *= static_cast<double>(shape[axis]);
    }
    if (cells > std::numeric_limits<std::int32_t>::max())
      throw std::runtime_error("Expected fewer than 2^31 cells, got " + std::to_string(cells) + "; split the box.");
  }
};

// The fluid cells of a box, numbered in their order, and their neighbours.
class PoreSpace {
 public:
  // One open face of a cell: which cell lies behind it, the face's axis, and whether it is the cell's own low face.
  struct Link {
    std::int32_t other;
    std::uint8_t axis;
    bool is_low;
  };

  Grid grid;
  std::vector<std::int64_t> cells;  // flat index of each fluid cell
  std::vector<std::uint8_t> free;   // 1 on the faces that a flow can pass, (3, nx, ny, nz)
  std::vector<Link> links;
  std::vector<std::size_t> first;  // where the links of each cell begin, and where the last end

  // solid: (nx, ny, nz), not 0 where solid; a null pointer in an empty box.
  PoreSpace(const Grid& box, const std::uint8_t* solid) : grid(box) {
    grid.check();
    const std::int64_t n = grid.num_cells();
    std::vector<std::int32_t> number(n, -1);
    for (std::int64_t i = 0; i < n; ++i)
      if (!solid || !solid[i]) {
        number[i] = static_cast<std::int32_t>(cells.size());
        cells.push_back(i);
      }
    if (cells.empty())
      throw std::runtime_error("Expected at least one fluid cell, got a box that is solid throughout.");
    free.assign(3 * n, 0);
    first.push_back(0);
    for (const std::int64_t cell : cells) {
      for (int axis = 0; axis < 3; ++axis) {
        const std::int64_t below = beside(cell, axis, -1), above = beside(cell, axis, 1);
        const bool has_low_face = below >= 0 ? number[below] >= 0 : grid.open(axis, 0);
        free[axis * n + cell] = has_low_face;
        // Both faces of a cell that is alone on its axis are one, and no balance knows of it.
        if (grid.shape[axis] == 1) continue;
        const auto along = static_cast<std::uint8_t>(axis);
        if (below >= 0 && number[below] >= 0) links.push_back({number[below], along, true});
        if (above >= 0 && number[above] >= 0) links.push_back({number[above], along, false});
      }
      first.push_back(links.size());
    }
  }

  std::int64_t position(std::int64_t cell, int axis) const { return cell / stride(axis) % grid.shape[axis]; }

  // The cell one further (offset 1) or before (−1), round periodic axes; −1 beyond the box.
  std::int64_t beside(std::int64_t cell, int axis, int offset) const {
    const std::int64_t at = position(cell, axis), n = grid.shape[axis], step = stride(axis);
    if (at + offset >= 0 && at + offset < n) return cell + offset * step;
    return grid.periodic(axis) ? cell - offset * (n - 1) * step : -1;
  }

  // Whether the cell stands at an open side of the box.
  bool at_open(std::int64_t cell, int axis, int side) const {
    return grid.open(axis, side) && position(cell, axis) == (side ? grid.shape[axis] - 1 : 0);
  }
  bool at_open_high(std::int64_t cell) const {
    return at_open(cell, 0, 1) || at_open(cell, 1, 1) || at_open(cell, 2, 1);
  }

  // The face of a link, as an index into the flux.
  std::int64_t face(std::int64_t number, Link link) const {
    return link.axis * grid.num_cells() + cells[link.is_low ? number : link.other];
  }

  // Net flux out of a cell; zero by definition in the last cells before an open high side.
  template <typename T>
  T net(const T* flux, std::int64_t cell) const {
    if (at_open_high(cell)) return T{0};
    const std::int64_t n = grid.num_cells();
    T sum[3];
    for (int axis = 0; axis < 3; ++axis) {
      const std::int64_t above = beside(cell, axis, 1);
      sum[axis] = (above < 0 ? T{0} : flux[axis * n + above]) - flux[axis * n + cell];
    }
    return sum[0] + sum[1] + sum[2];
  }

 private:
  std::int64_t stride(int axis) const {
    return axis == 2 ? 1 : axis == 1 ? grid.shape[2] : grid.shape[1] * grid.shape[2];
  }
};

}  // namespace latentphys
