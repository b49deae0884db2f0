// The pressure problem in a pore space: A φ = b by conjugate gradients, with
//
//     (A φ)_i = Σ_links C (φ_i − φ_j) + Σ_open sides 2C φ_i,      C = face area / cell size.
//
// φ has no difference across walls and is zero half a cell beyond open sides. One cycle of multigrid preconditions.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <sstream>

#include "multigrid.hpp"
#include "pore_space.hpp"

namespace latentphys {

class Pressure {
 public:
  explicit Pressure(const PoreSpace& space)
      : conductance_(relative(space.grid)), inverse_(graph(space, conductance_)) {}

  // C of an axis relative to the largest of the three: φ is in units of a flux.
  double conductance(int axis) const { return conductance_[axis]; }

  // b − A x
  void residual(const Column& b, const Column& x, Column& r) const {
    for (std::size_t i = 0; i < x.size(); ++i) r[i] = b[i] - row(x, i);
  }

  // Iterations from x, whose residual is r, until ‖r‖₂ ≤ target; both are replaced.
  // Throws std::runtime_error where that takes more than max_iterations.
  int solve(Column& x, Column& r, double target, int max_iterations) {
    const std::size_t n = x.size();
    Column z(n), p(n), q(n);
    double rz = 0;
    for (int iteration = 0;; ++iteration) {
      const double left = std::sqrt(dot(r, r));
      if (left <= target) return iteration;
      if (iteration == max_iterations || !std::isfinite(left)) {
        std::ostringstream text;
        text << "Expected the projection to leave a net flux of " << target << ", got " << left << " after "
             << iteration << " iterations; allow more iterations or a looser tolerance.";
        throw std::runtime_error(text.str());
      }
      inverse_(r, z);
      const double previous = rz;
      rz = dot(r, z);
      const double beta = iteration ? rz / previous : 0.0;
      for (std::size_t i = 0; i < n; ++i) p[i] = z[i] + beta * p[i];
      for (std::size_t i = 0; i < n; ++i) q[i] = row(p, i);
      const double alpha = rz / dot(p, q);
      for (std::size_t i = 0; i < n; ++i) {
        x[i] += alpha * p[i];
        r[i] -= alpha * q[i];
      }
    }
  }

 private:
  static std::array<double, 3> relative(const Grid& grid) {
    std::array<double, 3> c{grid.conductance(0), grid.conductance(1), grid.conductance(2)};
    const double largest = *std::max_element(c.begin(), c.end());
    for (double& value : c) value /= largest;
    return c;
  }

  static Graph graph(const PoreSpace& space, const std::array<double, 3>& conductance) {
    Graph g;
    g.strength = conductance;
    g.first = space.first;
    for (const PoreSpace::Link& link : space.links) g.edges.push_back({link.other, conductance[link.axis], link.axis});
    for (const std::int64_t cell : space.cells) {
      g.sink.push_back(0);
      g.block.emplace_back();
      for (int axis = 0; axis < 3; ++axis) {
        g.dims[axis] = static_cast<std::int32_t>(space.grid.shape[axis]);
        g.block.back()[axis] = static_cast<std::int32_t>(space.position(cell, axis));
        for (int side = 0; side < 2; ++side)
          if (space.at_open(cell, axis, side)) g.sink.back() += 2 * conductance[axis];
      }
    }
    g.complete();
    return g;
  }

  double row(const Column& x, std::size_t i) const {
    const Graph& g = inverse_.cells();
    return g.diagonal[i] * x[i] - g.inflow(x, i);
  }

  static double dot(const Column& a, const Column& b) {
    double sum = 0;
    for (std::size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
    return sum;
  }

  std::array<double, 3> conductance_;
  Multigrid inverse_;
};

}  // namespace latentphys
