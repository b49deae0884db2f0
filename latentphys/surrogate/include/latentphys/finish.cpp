// The C interface of the finish: compile this one file as C++17.
#include "finish.h"

#include "finish.hpp"

struct latentphys_finish : latentphys::Finish {
  using Finish::Finish;
};

namespace {

thread_local std::string error_text;

void check(const latentphys_finish* finish) {
  if (!finish)
    throw std::runtime_error(
        "Expected a finish that latentphys_finish_create made, got NULL; see the error of that call.");
}

void given(bool is_given, const char* wanted) {
  if (!is_given) throw std::runtime_error(std::string("Expected ") + wanted + ", got NULL.");
}

// What work() returns, or `failed` with the text of what it threw.
template <typename Work, typename Result>
Result guarded(Work work, Result failed) {
  try {
    return work();
  } catch (const std::exception& error) {
    error_text = error.what();
    return failed;
  }
}

}  // namespace

extern "C" {

latentphys_finish* latentphys_finish_create(const int64_t shape[3], const double spacing[3], const char* boundaries,
                                            const uint8_t* solid) {
  const auto create = [&] {
    given(shape && spacing && boundaries, "a shape, a spacing and boundaries");
    latentphys::Grid grid{{shape[0], shape[1], shape[2]}, {spacing[0], spacing[1], spacing[2]}, {}};
    grid.boundaries = latentphys::boundaries_of(boundaries);
    return new latentphys_finish(grid, solid);
  };
  return guarded(create, static_cast<latentphys_finish*>(nullptr));
}

void latentphys_finish_destroy(latentphys_finish* finish) { delete finish; }

int latentphys_finish_set(latentphys_finish* finish, double tolerance, int max_iterations, int warm_start) {
  const auto set = [&] {
    check(finish);
    finish->set({tolerance, max_iterations, warm_start != 0});
    return 0;
  };
  return guarded(set, 1);
}

int latentphys_finish_conserve(latentphys_finish* finish, double* flux, int* num_iterations) {
  const auto conserve = [&] {
    check(finish);
    given(flux, "a flux");
    const latentphys::Finished done = finish->conserve(flux);
    if (num_iterations) *num_iterations = done.num_iterations;
    return 0;
  };
  return guarded(conserve, 1);
}

double latentphys_finish_net_flux_max(const latentphys_finish* finish, const double* flux) {
  return finish && flux ? finish->net_flux_max(flux) : NAN;
}

const char* latentphys_error(void) { return error_text.c_str(); }

}  // extern "C"
