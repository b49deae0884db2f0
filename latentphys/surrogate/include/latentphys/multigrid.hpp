// Algebraic multigrid in a pore space: an approximate inverse of
//
//     (A x)_i = Σ_j k_ij (x_i − x_j) + s_i x_i.
//
// Every level doubles the blocks of cells, and a node of the next level is a connected piece of such a block: pores
// that run side by side without touching are never joined. A piece carries one number, so the coarse operator is again
// a graph of conductances: of their contact over their distance, without which such aggregation corrects too little.
// One V-cycle of Gauss–Seidel, forward on the way down and backward on the way up, is symmetric and definite, as
// conjugate gradients want it.
//
// References: Braess, Computing 55 (1995), and Notay, ETNA 37 (2010), on aggregation.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace latentphys {

using Column = std::vector<double>;

// The operator A on the nodes of one level.
struct Graph {
  struct Edge {
    std::int32_t other;
    double conductance;
    std::uint8_t axis;
  };

  std::vector<std::size_t> first;  // where the edges of each node begin, and where the last end
  std::vector<Edge> edges;         // each twice, once from either end
  Column sink, diagonal, inverse;  // s, Σk + s, and 1 over that: 0 for a node that nothing couples
  std::vector<std::array<std::int32_t, 3>> block;
  std::array<std::int32_t, 3> dims;  // blocks along each axis
  std::array<double, 3> strength;    // conductance between two full blocks along each axis

  std::size_t size() const { return sink.size(); }

  double inflow(const Column& x, std::size_t i) const {
    double sum = 0;
    for (std::size_t e = first[i]; e < first[i + 1]; ++e) sum += edges[e].conductance * x[edges[e].other];
    return sum;
  }

  void complete() {
    diagonal = sink;
    inverse.assign(size(), 0.0);
    for (std::size_t i = 0; i < size(); ++i) {
      for (std::size_t e = first[i]; e < first[i + 1]; ++e) diagonal[i] += edges[e].conductance;
      if (diagonal[i] > 0) inverse[i] = 1 / diagonal[i];
    }
  }
};

class Multigrid {
 public:
  explicit Multigrid(Graph cells) {
    int sweeps = first_sweeps;
    for (levels_.push_back({std::move(cells), {}, {}, {}, sweeps}); !levels_.back().graph.edges.empty();) {
      std::vector<std::int32_t> parent;
      Graph coarse = coarsen(levels_.back().graph, parent);
      sweeps = std::min(2 * sweeps, most_sweeps);
      levels_.back().parent = std::move(parent);
      levels_.push_back({std::move(coarse), {}, {}, {}, sweeps});
    }
    for (Level& level : levels_) level.x.resize(level.graph.size());
    for (Level& level : levels_) level.b.resize(level.graph.size());
  }

  const Graph& cells() const { return levels_.front().graph; }

  // Approximately A⁻¹ r.
  void operator()(const Column& r, Column& z) {
    levels_.front().b = r;
    cycle(0);
    z = levels_.front().x;
  }

 private:
  static constexpr int first_sweeps = 2, most_sweeps = 16;
  static constexpr double strong = 0.3;  // blocks double along axes with at least this share of the largest strength

  struct Level {
    Graph graph;
    std::vector<std::int32_t> parent;  // of each node; −1 where the next level does not have it
    Column x, b;
    int sweeps;
  };

  void cycle(std::size_t depth) {
    Level& level = levels_[depth];
    const Graph& g = level.graph;
    Column &x = level.x, &b = level.b;
    std::fill(x.begin(), x.end(), 0.0);
    const auto relax = [&](std::size_t i) { x[i] = (b[i] + g.inflow(x, i)) * g.inverse[i]; };
    const bool is_last = depth + 1 == levels_.size();
    for (int sweep = 0; sweep < (is_last ? 1 : level.sweeps); ++sweep)
      for (std::size_t i = 0; i < g.size(); ++i) relax(i);
    if (is_last) return;
    Column& down = levels_[depth + 1].b;
    std::fill(down.begin(), down.end(), 0.0);
    for (std::size_t i = 0; i < g.size(); ++i)
      if (level.parent[i] >= 0) down[level.parent[i]] += b[i] + g.inflow(x, i) - g.diagonal[i] * x[i];
    cycle(depth + 1);
    const Column& up = levels_[depth + 1].x;
    for (std::size_t i = 0; i < g.size(); ++i)
      if (level.parent[i] >= 0) x[i] += up[level.parent[i]];
    for (int sweep = 0; sweep < level.sweeps; ++sweep)
      for (std::size_t i = g.size(); i-- > 0;) relax(i);
  }

  // The graph of the connected pieces of doubled blocks, and to which piece each node belongs.
  static Graph coarsen(const Graph& fine, std::vector<std::int32_t>& parent) {
    std::array<std::int32_t, 3> factor{1, 1, 1};
    double strongest = 0;
    for (int axis = 0; axis < 3; ++axis)
      if (fine.dims[axis] > 1) strongest = std::max(strongest, fine.strength[axis]);
    Graph coarse;
    for (int axis = 0; axis < 3; ++axis) {
      if (fine.dims[axis] > 1 && fine.strength[axis] >= strong * strongest) factor[axis] = 2;
      coarse.dims[axis] = (fine.dims[axis] + factor[axis] - 1) / factor[axis];
    }
    for (int axis = 0; axis < 3; ++axis)
      coarse.strength[axis] = fine.strength[axis] * factor[0] * factor[1] * factor[2] / (factor[axis] * factor[axis]);
    const auto block_of = [&](std::size_t i) {
      std::array<std::int32_t, 3> block = fine.block[i];
      for (int axis = 0; axis < 3; ++axis) block[axis] /= factor[axis];
      return block;
    };

    // Pieces, each a run of `members`; along an axis a piece is two layers thick if an edge inside it runs that way.
    std::vector<std::int32_t> piece(fine.size(), -1);
    std::vector<std::size_t> members, begin;
    std::vector<std::array<double, 3>> thickness;
    for (std::size_t start = 0; start < fine.size(); ++start) {
      if (piece[start] >= 0) continue;
      const auto own = static_cast<std::int32_t>(begin.size());
      const auto block = block_of(start);
      begin.push_back(members.size());
      thickness.push_back({1, 1, 1});
      piece[start] = own;
      members.push_back(start);
      for (std::size_t m = begin.back(); m < members.size(); ++m)
        for (std::size_t e = fine.first[members[m]]; e < fine.first[members[m] + 1]; ++e) {
          const auto& edge = fine.edges[e];
          if (block_of(edge.other) != block) continue;
          thickness.back()[edge.axis] = 2;
          if (piece[edge.other] >= 0) continue;
          piece[edge.other] = own;
          members.push_back(edge.other);
        }
    }
    begin.push_back(members.size());

    // A piece without an edge or a sink is a whole pore space, which needs no correction.
    std::vector<std::int32_t> number(thickness.size(), -1);
    for (std::size_t p = 0; p < thickness.size(); ++p) {
      double sink = 0;
      bool is_coupled = false;
      for (std::size_t m = begin[p]; m < begin[p + 1]; ++m) {
        sink += fine.sink[members[m]];
        for (std::size_t e = fine.first[members[m]]; e < fine.first[members[m] + 1]; ++e)
          is_coupled |= piece[fine.edges[e].other] != static_cast<std::int32_t>(p);
      }
      if (!is_coupled && sink == 0) continue;
      number[p] = static_cast<std::int32_t>(coarse.sink.size());
      coarse.sink.push_back(sink);
      coarse.block.push_back(block_of(members[begin[p]]));
    }
    // 1 + where the edge to each node stands, if the piece before or this one has it.
    std::vector<std::size_t> place(coarse.size(), 0);
    coarse.first.push_back(0);
    for (std::size_t p = 0; p < thickness.size(); ++p) {
      if (number[p] < 0) continue;
      const std::size_t from = coarse.edges.size();
      for (std::size_t m = begin[p]; m < begin[p + 1]; ++m)
        for (std::size_t e = fine.first[members[m]]; e < fine.first[members[m] + 1]; ++e) {
          const auto& edge = fine.edges[e];
          const std::int32_t q = piece[edge.other];
          if (q == static_cast<std::int32_t>(p)) continue;
          std::size_t& at = place[number[q]];
          if (at <= from) {
            coarse.edges.push_back({number[q], 0.0, edge.axis});
            at = coarse.edges.size();
          }
          const double distance = (thickness[p][edge.axis] + thickness[q][edge.axis]) / 2;
          coarse.edges[at - 1].conductance += edge.conductance / distance;
        }
      coarse.first.push_back(coarse.edges.size());
    }
    parent.resize(fine.size());
    for (std::size_t i = 0; i < fine.size(); ++i) parent[i] = number[piece[i]];
    coarse.complete();
    return coarse;
  }

  std::vector<Level> levels_;
};

}  // namespace latentphys
