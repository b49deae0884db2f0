// The FP64 finish of a decode: the flux nearest to the one given whose net is 0.0 in every cell, bit for bit.
//
//     latentphys::Finish finish(grid, solid);
//     finish.conserve(flux);                   // (3, nx, ny, nz) [m³/s] in C order, in place
//
// First the orthogonal projection, in kinetic energy, onto fluxes without divergence that pass no wall or solid. Then
// fixed point: sums of multiples of one power of two q, below 2⁵³ q, have no rounding error in any order. Fluxes become
// multiples of q = 2⁻⁴⁶ of the power of two above the largest, and the small integer that each cell's balance is then
// off is carried along a spanning tree of the pore space to its root, where it meets those of all other cells and
// cancels, or leaves through an open side.
//
// An inflow side is an opening like an outflow; a prescribed profile is not known here.
#pragma once

#include <algorithm>
#include <cstring>
#include <utility>

#include "pressure.hpp"

namespace latentphys {

struct FinishSettings {
  double tolerance = 1e-13;  // of the projection: ‖net‖₂ / ‖flux‖₂; the fixed point takes care of what is left
  int max_iterations = 1000;
  bool warm_start = false;  // begin with the potential of the call before; saves iterations in a time loop
};

struct Finished {
  int num_iterations;  // of conjugate gradients
  double correction;   // largest change of a face by the fixed point, relative to the largest flux given
};

class Finish {
 public:
  // solid: (nx, ny, nz), not 0 where solid; a null pointer in an empty box.
  // Throws std::runtime_error for a box that cannot be, or one without a fluid cell.
  explicit Finish(const Grid& grid, const std::uint8_t* solid = nullptr) : space_(grid, solid), pressure_(space_) {
    grow_tree();
  }

  // Throws std::runtime_error for a tolerance outside 0…1 or a bound below 1.
  void set(const FinishSettings& settings) {
    if (!(settings.tolerance >= 0 && settings.tolerance < 1))
      throw std::runtime_error("Expected a tolerance from 0 to below 1, got " + std::to_string(settings.tolerance) +
                               ".");
    if (settings.max_iterations < 1)
      throw std::runtime_error("Expected at least 1 iteration at most, got " + std::to_string(settings.max_iterations) +
                               ".");
    settings_ = settings;
  }

  const Grid& grid() const { return space_.grid; }
  std::size_t num_faces() const { return space_.free.size(); }

  // Throws std::runtime_error for NaN and infinity, fluxes at the end of FP64's range, and a projection that does not
  // reach its tolerance; the flux is then as it was.
  Finished conserve(double* flux) {
    double largest = 0;
    for (std::size_t f = 0; f < num_faces(); ++f) {
      if (!std::isfinite(flux[f])) throw std::runtime_error("Expected a finite flux, got NaN or infinity.");
      if (space_.free[f]) largest = std::max(largest, std::abs(flux[f]));
    }
    if (largest == 0) {
      std::memset(flux, 0, num_faces() * sizeof(double));
      return {0, 0.0};
    }
    // Squares of fluxes in micrometre pores underflow; a power of two changes no bit of them.
    const int exponent = std::ilogb(largest) + 1;
    std::vector<double> scaled(num_faces());
    for (std::size_t f = 0; f < num_faces(); ++f) scaled[f] = space_.free[f] ? std::ldexp(flux[f], -exponent) : 0.0;
    const int num_iterations = project(scaled, exponent);
    const double change = round(scaled, exponent, flux);
    return {num_iterations, std::ldexp(change, exponent) / largest};
  }

  // Largest |net flux| of a cell [m³/s], NaN if there is one. In the last cells before an open high side it is zero by
  // definition.
  double net_flux_max(const double* flux) const {
    double largest = 0;
    for (std::int64_t cell = 0; cell < space_.grid.num_cells(); ++cell) {
      const double net = std::abs(space_.net(flux, cell));
      if (std::isnan(net)) return net;
      largest = std::max(largest, net);
    }
    return largest;
  }

 private:
  static constexpr int flux_bits = 46, smallest_exponent = -1074;

  // A cell, its parent, the face between them, and +1 where that is the cell's own low face, −1 where the parent's.
  struct Branch {
    std::int32_t child, parent;
    std::int64_t face;
    int sign;
  };

  int project(std::vector<double>& flux, int exponent) {
    const std::size_t n = space_.cells.size();
    std::vector<double> b(n), x(n, 0.0), r(n);
    double size = 0, net = 0;
    for (const double f : flux) size += f * f;
    for (std::size_t i = 0; i < n; ++i) {
      r[i] = b[i] = -space_.net(flux.data(), space_.cells[i]);
      net += b[i] * b[i];
    }
    const double target = std::max(settings_.tolerance, 8 * std::numeric_limits<double>::epsilon()) * std::sqrt(size);
    if (settings_.warm_start && !potential_.empty() && std::sqrt(net) > target) {
      for (std::size_t i = 0; i < n; ++i) x[i] = std::ldexp(potential_[i], potential_exponent_ - exponent);
      pressure_.residual(b, x, r);
      double left = 0;
      for (const double value : r) left += value * value;
      if (!(left < net)) {
        x.assign(n, 0.0);
        r = b;
      }
    }
    const int num_iterations = pressure_.solve(x, r, target, settings_.max_iterations);
    subtract_gradient(flux, x);
    if (settings_.warm_start) {
      potential_ = std::move(x);
      potential_exponent_ = exponent;
    }
    return num_iterations;
  }

  void subtract_gradient(std::vector<double>& flux, const std::vector<double>& x) const {
    for (std::size_t i = 0; i < x.size(); ++i) {
      for (std::size_t l = space_.first[i]; l < space_.first[i + 1]; ++l) {
        const PoreSpace::Link link = space_.links[l];
        if (link.is_low) flux[space_.face(i, link)] -= pressure_.conductance(link.axis) * (x[i] - x[link.other]);
      }
      for (int axis = 0; axis < 3; ++axis)
        if (space_.at_open(space_.cells[i], axis, 0))
          flux[axis * space_.grid.num_cells() + space_.cells[i]] -= 2 * pressure_.conductance(axis) * x[i];
    }
  }

  // Fluxes as multiples of a power of two with the nets carried away, into `out`; returns the largest change of a face.
  double round(const std::vector<double>& flux, int exponent, double* out) const {
    double largest = 0, carried = 0;
    for (const double f : flux) largest = std::max(largest, std::abs(f));
    for (const std::int64_t cell : space_.cells) carried += std::abs(space_.net(flux.data(), cell));
    // No branch of the tree carries more than Σ|net|; an eighth of it keeps every integer below 2⁵³.
    const double most = std::max(largest, carried / 8);
    const int power = most > 0 ? std::ilogb(most) + 1 - flux_bits : 0;
    const int quantum = std::max(power, smallest_exponent - exponent);
    if (!std::isfinite(std::ldexp(8 * most, exponent)))
      throw std::runtime_error(
          "Expected fluxes whose sums stay within FP64's range, got an overflow; scale them first.");
    std::vector<std::int64_t> units(flux.size());
    for (std::size_t f = 0; f < flux.size(); ++f)
      units[f] = static_cast<std::int64_t>(std::nearbyint(std::ldexp(flux[f], -quantum)));
    balance(units);
    double change = 0;
    for (std::size_t f = 0; f < flux.size(); ++f) {
      const auto whole = static_cast<double>(units[f]);
      change = std::max(change, std::abs(std::ldexp(whole, quantum) - flux[f]));
      out[f] = std::ldexp(whole, quantum + exponent);
    }
    return change;
  }

  // Every cell's net into its parent, the deepest cells first.
  void balance(std::vector<std::int64_t>& units) const {
    std::vector<std::int64_t> net(space_.cells.size());
    for (std::size_t i = 0; i < net.size(); ++i) net[i] = space_.net(units.data(), space_.cells[i]);
    for (auto branch = tree_.rbegin(); branch != tree_.rend(); ++branch) {
      const std::int64_t excess = net[branch->child];
      units[branch->face] += branch->sign * excess;
      net[branch->parent] += excess;
    }
    for (const auto& [root, face] : exits_) units[face] += net[root];
  }

  // A breadth-first tree in every pore space, from the cells at open sides or else from its first cell.
  void grow_tree() {
    std::vector<std::int32_t> queue;
    std::vector<bool> reached(space_.cells.size(), false);
    for (std::size_t i = 0; i < space_.cells.size(); ++i) {
      const std::int64_t cell = space_.cells[i];
      int low = -1;
      for (int axis = 0; axis < 3; ++axis)
        if (space_.at_open(cell, axis, 0)) low = axis;
      if (low < 0 && !space_.at_open_high(cell)) continue;
      reached[i] = true;
      queue.push_back(static_cast<std::int32_t>(i));
      // Through an open high side the net leaves unseen.
      if (!space_.at_open_high(cell)) exits_.push_back({i, low * space_.grid.num_cells() + cell});
    }
    std::size_t next = 0;
    for (std::size_t start = 0; start <= space_.cells.size(); ++start) {
      for (; next < queue.size(); ++next) {
        const std::int32_t i = queue[next];
        for (std::size_t l = space_.first[i]; l < space_.first[i + 1]; ++l) {
          const PoreSpace::Link link = space_.links[l];
          if (reached[link.other]) continue;
          reached[link.other] = true;
          queue.push_back(link.other);
          tree_.push_back({link.other, i, space_.face(i, link), link.is_low ? -1 : 1});
        }
      }
      if (start < space_.cells.size() && !reached[start]) {
        reached[start] = true;
        queue.push_back(static_cast<std::int32_t>(start));
      }
    }
  }

  PoreSpace space_;
  Pressure pressure_;
  std::vector<Branch> tree_;  // parents before children
  std::vector<std::pair<std::size_t, std::int64_t>> exits_;
  FinishSettings settings_;
  std::vector<double> potential_;
  int potential_exponent_ = 0;
};

}  // namespace latentphys
