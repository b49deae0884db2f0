// Calls of latentphys::Surrogate; prints `name: what came out` for the tests to judge. checks FOLDER
#include <latentphys/surrogate.hpp>

#include <cstdio>
#include <iostream>

using latentphys::Parameters;
using latentphys::Surrogate;

namespace {

template <typename Work>
void refused(const char* name, Work work) {
  try {
    work();
    std::cout << name << ": taken\n";
  } catch (const std::runtime_error& error) {
    std::cout << name << ": " << error.what() << '\n';
  }
}

void equal(const char* name, bool is_equal) { std::cout << name << ": " << (is_equal ? "equal" : "different") << '\n'; }

void run(const std::string& folder) {
  Surrogate surrogate(folder);
  const latentphys::Example start = surrogate.example();
  refused("step before init", [&] { surrogate.step(); });
  refused("flux before init", [&] { surrogate.flux(); });

  std::vector<double> fields = start.fields;
  fields.pop_back();
  refused("short fields", [&] { surrogate.init(fields, start.parameters); });
  fields.push_back(NAN);
  refused("nan fields", [&] { surrogate.init(fields, start.parameters); });
  Parameters parameters = start.parameters;
  parameters["depth"] = {1.0};
  refused("unknown parameter", [&] { surrogate.init(start.fields, parameters); });
  parameters = start.parameters;
  parameters["viscosity"] = {1.0, 2.0};
  refused("parameter of another size", [&] { surrogate.init(start.fields, parameters); });
  parameters["viscosity"] = {NAN};
  refused("nan parameter", [&] { surrogate.init(start.fields, parameters); });
  parameters.erase("viscosity");
  refused("missing parameter", [&] { surrogate.init(start.fields, parameters); });

  surrogate.init(start.fields, start.parameters, 2.0);
  refused("no steps", [&] { surrogate.step(0); });
  const Surrogate::Snapshot first = surrogate.snapshot();
  for (int n = 0; n < 4; ++n) surrogate.step();
  const std::vector<double> one_by_one = surrogate.fields();
  std::printf("time: %.12g\n", (surrogate.time() - 2.0) / surrogate.contract().interval);

  surrogate.init(start.fields, start.parameters);
  surrogate.step(4);
  equal("four steps at once", surrogate.fields() == one_by_one);
  surrogate.restore(first);
  std::printf("time restored: %.12g\n", surrogate.time());
  std::vector<double> times;
  surrogate.step(4, [&](double time) {
    times.push_back(time);
    return start.parameters;
  });
  equal("constant parameters of a function", surrogate.fields() == one_by_one);
  std::printf("times asked for:");
  for (const double time : times) std::printf(" %.12g", (time - 2.0) / surrogate.contract().interval);
  std::printf("\n");

  surrogate.restore(first);
  surrogate.step(4, [&](double) {
    Parameters other = start.parameters;
    for (double& value : other["viscosity"]) value *= 4;
    return other;
  });
  equal("other parameters", surrogate.fields() == one_by_one);
  surrogate.restore(first);
  refused("parameters that end", [&] {
    surrogate.step(2, [&](double time) {
      return time > 2.0 + 1.5 * surrogate.contract().interval ? Parameters{} : start.parameters;
    });
  });
  surrogate.step(4);
  equal("after a refused step", surrogate.fields() == one_by_one);
  refused("changed by a solver", [&] {
    fields = surrogate.fields();
    for (double& value : fields) value *= 1.1;
    surrogate.init(fields, start.parameters);
  });
  equal("changed by a solver, then", surrogate.fields() == one_by_one);
  std::printf("net: %g\n", surrogate.net_flux_max());
  Surrogate::Snapshot lost = first;
  lost.latent = at::full_like(first.latent, NAN);
  surrogate.restore(lost);
  refused("lost state", [&] { surrogate.flux(); });
  surrogate.restore(first);
  surrogate.step(4);
  equal("token used again", surrogate.fields() == one_by_one);
}

}  // namespace

int main(int, char** argv) {
  try {
    run(argv[1]);
  } catch (const std::exception& error) {
    std::cout << "failed: " << error.what() << '\n';
    return 1;
  }
}
