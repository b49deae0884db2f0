// Steps an exported model in a loop, as a solver would: surrogate FOLDER NUM_STEPS OUT.
//
// Starts from the example that the export left in the folder. Prints the energy and the largest net flux after every
// step, and writes the last flux to OUT: FP64, (3, nx, ny, nz) in C order.
#include <latentphys/surrogate.hpp>

#include <cstdio>
#include <cstdlib>
#include <iostream>

namespace {

// ½⟨u·u⟩ on the low faces [m²/s²].
double kinetic_energy(const double* flux, const latentphys::Grid& grid) {
  double energy = 0;
  for (int axis = 0; axis < 3; ++axis) {
    const double area = grid.spacing[(axis + 1) % 3] * grid.spacing[(axis + 2) % 3];
    for (std::int64_t i = 0; i < grid.num_cells(); ++i) {
      const double u = *flux++ / area;
      energy += 0.5 * u * u;
    }
  }
  return energy / static_cast<double>(grid.num_cells());
}

void run(const std::string& folder, int num_steps, const std::string& out) {
  latentphys::Surrogate surrogate(folder);
  const latentphys::Contract& contract = surrogate.contract();
  std::printf("family %s, interval %g s\n", contract.family.c_str(), contract.interval);
  for (const latentphys::Parameter& p : contract.parameters)
    std::printf("parameter %s [%s] of size %d\n", p.name.c_str(), p.unit.c_str(), p.size);

  const latentphys::Example example = surrogate.example();
  surrogate.init(example.fields, example.parameters);
  latentphys::Surrogate::Snapshot token;
  for (int n = 1; n <= num_steps; ++n) {
    surrogate.step();
    std::printf("step %d energy %.17g net %g\n", n, kinetic_energy(surrogate.flux(), contract.grid),
                surrogate.net_flux_max());
    if (n == num_steps / 2) token = surrogate.snapshot();
  }

  const std::size_t num_faces = 3 * static_cast<std::size_t>(contract.grid.num_cells());
  const std::vector<double> last(surrogate.flux(), surrogate.flux() + num_faces);
  if (num_steps > 1) {
    surrogate.restore(token);
    surrogate.step(num_steps - num_steps / 2);
    std::printf("repeated %s\n", std::equal(last.begin(), last.end(), surrogate.flux()) ? "bit for bit" : "otherwise");
  }
  std::ofstream file(out, std::ios::binary);
  file.write(reinterpret_cast<const char*>(last.data()), static_cast<std::streamsize>(num_faces * sizeof(double)));
  if (!file) throw std::runtime_error("Expected to write " + out + ", got an error of the file system.");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "Usage: surrogate FOLDER NUM_STEPS OUT\n";
    return 2;
  }
  try {
    run(argv[1], std::atoi(argv[2]), argv[3]);
    return 0;
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
