// What the headers hold beside the finish, for the tests to call; errors are texts, empty where there is none.
#include <latentphys/finish.h>

#include <latentphys/artefact.hpp>
#include <latentphys/safetensors.hpp>
#include <latentphys/total.hpp>

namespace {
std::string text;
}

extern "C" {

const char* keep_sum(double* values, const std::uint8_t* solid, std::int64_t num_cells, double sum, double load) {
  text.clear();
  try {
    latentphys::keep_sum(values, {solid, solid + num_cells}, sum, load);
  } catch (const std::runtime_error& error) {
    text = error.what();
  }
  return text.c_str();
}

double sum_of(const double* values, const std::uint8_t* solid, std::int64_t num_cells) {
  return latentphys::sum_of(values, {solid, solid + num_cells});
}

// One line per array: name, dtype, shape, and the sum of its numbers.
const char* describe_safetensors(const char* path) {
  try {
    std::ostringstream out;
    for (const auto& [name, array] : latentphys::read_safetensors(path)) {
      out << name << ' ' << array.dtype;
      for (const std::int64_t n : array.shape) out << ' ' << n;
      double sum = 0;
      if (array.dtype == "F64")
        for (const double x : array.as<double>()) sum += x;
      if (array.dtype == "F32")
        for (const float x : array.as<float>()) sum += x;
      if (array.dtype == "U8")
        for (const std::uint8_t x : array.as<std::uint8_t>()) sum += x;
      out << " = " << sum << '\n';
    }
    text = out.str();
  } catch (const std::runtime_error& error) {
    text = error.what();
  }
  return text.c_str();
}

const char* describe_artefact(const char* path) {
  try {
    const latentphys::Contract contract = latentphys::Facts(path).contract();
    std::ostringstream out;
    out << contract.family << ' ' << contract.interval << ' ' << contract.grid.num_cells();
    for (const latentphys::Field& f : contract.fields) out << ' ' << f.name << ' ' << f.unit << ' ' << f.num_channels;
    for (const latentphys::Parameter& p : contract.parameters) out << ' ' << p.name << ' ' << p.size;
    text = out.str();
  } catch (const std::runtime_error& error) {
    text = error.what();
  }
  return text.c_str();
}
}
