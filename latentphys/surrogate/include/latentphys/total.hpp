// A conserved scalar whose sum over the fluid cells is the one given, in every bit.
//
// The nearest field with that sum is shifted by a constant. Then its values become whole multiples of a power of two,
// so few of them that FP64 adds them up without rounding in any order, and what their sum is then off goes to all fluid
// cells alike, the remainder to the first.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace latentphys {

// Over the fluid cells.
inline double sum_of(const double* values, const std::vector<std::uint8_t>& solid) {
  double sum = 0;
  for (std::size_t i = 0; i < solid.size(); ++i)
    if (!solid[i]) sum += values[i];
  return sum;
}

// values: in place, and 0 in solids after it. load: a usual Σ|value| above 0, which says what power of two is fine enough.
// Throws std::runtime_error for values whose sum is not finite.
inline void keep_sum(double* values, const std::vector<std::uint8_t>& solid, double sum, double load) {
  constexpr int total_bits = 50;  // Σ|value| in quanta; three more for the shift, the rounding and a rounded sum
  const std::size_t n = solid.size();
  const auto num_fluid = static_cast<std::int64_t>(std::count(solid.begin(), solid.end(), 0));
  const double shift = (sum - sum_of(values, solid)) / static_cast<double>(num_fluid);
  double size = 0;
  for (std::size_t i = 0; i < n; ++i) {
    values[i] = solid[i] ? 0.0 : values[i] + shift;
    size += std::abs(values[i]);
  }
  if (!std::isfinite(size))
    throw std::runtime_error("Expected a scalar with a finite sum, got NaN or infinity; scale it first.");
  const int quantum = std::ilogb(std::max(size, load)) + 1 - total_bits;
  const auto units = [quantum](double value) {
    return static_cast<std::int64_t>(std::nearbyint(std::ldexp(value, -quantum)));
  };
  std::int64_t missing = units(sum);
  for (std::size_t i = 0; i < n; ++i) missing -= units(values[i]);
  std::int64_t left = missing % num_fluid;
  if (left < 0) left += num_fluid;
  const std::int64_t each = (missing - left) / num_fluid;
  for (std::size_t i = 0; i < n; ++i)
    if (!solid[i]) values[i] = std::ldexp(static_cast<double>(units(values[i]) + each + (left-- > 0)), quantum);
}

}  // namespace latentphys
