// A trained model, exported to a folder with a compiled model.pt2, as a time stepper for a solver in C++.
//
//     latentphys::Surrogate surrogate("porous.pt2");
//     surrogate.init(fields, {{"viscosity", {1e-6}}});   // (channels, nx, ny, nz) in C order, FP64
//     surrogate.step(8);
//     const double* flux = surrogate.flux();             // (3, nx, ny, nz) [m³/s], net 0.0 in every cell
//
// Needs the headers and libraries of PyTorch, as its wheel brings them, and no Python.
#pragma once

#include <ATen/Functions.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <functional>
#include <memory>
#include <optional>

#include "artefact.hpp"
#include "finish.hpp"
#include "safetensors.hpp"
#include "total.hpp"

namespace latentphys {

using Parameters = std::map<std::string, std::vector<double>>;  // physical units, as the contract names them
using ParametersAt = std::function<Parameters(double time)>;

// A state to start from.
struct Example {
  std::vector<double> fields;
  Parameters parameters;
};

class Surrogate {
 public:
  // A token of a state; steps after restore() repeat bit for bit.
  struct Snapshot {
    at::Tensor latent;
    double time = 0;
    Parameters parameters;
    std::vector<double> sums;  // of each channel over the fluid cells: what conserved scalars keep
  };

  // folder: what `latentphys export … --to pt2` wrote, of a batch of one.
  // Throws std::runtime_error where it is not whole, has fluxes that are not solenoidal, or does not compute what it did
  // when it was exported.
  explicit Surrogate(const std::string& folder, const FinishSettings& settings = {})
      : facts_(folder + "/artefact.txt"),
        arrays_(read_safetensors(folder + "/arrays.safetensors")),
        contract_(facts_.contract()) {
    if (facts_.text("format") != "pt2")
      throw std::runtime_error("Expected a model exported to pt2, got " + facts_.text("format") +
                               "; export it with --to pt2.");
    if (facts_.text("batch") != "1")
      throw std::runtime_error("Expected a model exported for a batch of 1, got one of " + facts_.text("batch") +
                               "; export it again without --batch.");
    for (const Field& field : contract_.fields)
      if (field.kind == "flux" && field.constraint != "solenoidal")
        throw std::runtime_error("Expected fluxes that are solenoidal, got '" + field.name + "' of the constraint '" +
                                 field.constraint + "'; step this artefact in Python.");
    solid_ = array("solid").as<std::uint8_t>();
    if (solid_.size() != static_cast<std::size_t>(contract_.grid.num_cells()))
      throw std::runtime_error("Expected solid voxels for every cell, got another number; export it again.");
    finish_ = std::make_unique<Finish>(contract_.grid, solid_.data());
    finish_->set(settings);
    const std::string path = folder + "/model.pt2";
    if (!std::ifstream(path))
      throw std::runtime_error("Expected a compiled model at " + path + ", got none; export it again.");
    for (const char* name : {"encode", "step", "decode"})
      functions_[name] = std::make_unique<torch::inductor::AOTIModelPackageLoader>(path, name);
    device_ = c10::Device(facts_.text("device"));
    check_self();
    for (const char* name : {"test.then", "test.latent", "test.next", "test.decoded", "test.finished"})
      arrays_.erase(name);
  }

  const Contract& contract() const { return contract_; }
  double time() const { return current().time; }

  // Set the state: packed fields (channels, nx, ny, nz) in the contract's units, and the physical parameters.
  // Call it again when the solver has changed the flow.
  void init(const std::vector<double>& fields, const Parameters& parameters, double time = 0) {
    if (fields.size() != num_values())
      throw std::runtime_error("Expected fields of " + std::to_string(num_values()) + " values, got " +
                               std::to_string(fields.size()) + ".");
    for (const double value : fields)
      if (!std::isfinite(value))
        throw std::runtime_error("Expected finite fields, got NaN or infinity; step back to a snapshot.");
    numbers(parameters);
    current_ = Snapshot{run("encode", {tensor(fields, field_shape())}), time, parameters, sums_of(fields)};
    finished_.clear();
  }

  // Advance by num_steps intervals; parameters_at: the parameters where they change in time. Default: those of init.
  void step(int num_steps = 1, const ParametersAt& parameters_at = nullptr) {
    if (num_steps < 1) throw std::runtime_error("Expected at least 1 step, got " + std::to_string(num_steps) + ".");
    Snapshot next = current();
    const double begin = next.time;
    for (int n = 0; n < num_steps; ++n) {
      const double end = begin + (n + 1) * contract_.interval;
      const at::Tensor now = numbers(parameters_at ? parameters_at(next.time) : next.parameters);
      if (parameters_at) next.parameters = parameters_at(end);
      next.latent = run("step", {next.latent, now, numbers(next.parameters)});
      next.time = end;
    }
    current_ = std::move(next);
    finished_.clear();
  }

  // All fields of the present state, packed, FP64, with a net flux of 0.0; valid until the state changes.
  const std::vector<double>& fields() {
    if (finished_.empty()) finished_ = finished(run("decode", {current().latent}), current().sums);
    return finished_;
  }

  // The first solenoidal flux among them (3, nx, ny, nz) [m³/s].
  const double* flux() { return fields().data() + first_flux(); }

  // The state that the export tried the model on.
  Example example() const {
    Example example{array("test.fields").as<double>(), {}};
    const std::vector<double> values = array("test.now").as<double>();
    auto next = values.begin();
    for (const Parameter& p : contract_.parameters) {
      example.parameters[p.name] = {next, next + p.size};
      next += p.size;
    }
    return example;
  }

  double net_flux_max() { return finish_->net_flux_max(flux()); }

  Snapshot snapshot() const { return current(); }  // no call writes into a latent
  void restore(const Snapshot& token) {
    current_ = token;
    finished_.clear();
  }

 private:
  const Array& array(const std::string& name) const {
    const auto found = arrays_.find(name);
    if (found == arrays_.end())
      throw std::runtime_error("Expected the array '" + name + "', got none; export it again.");
    return found->second;
  }

  const Snapshot& current() const {
    if (!current_) throw std::runtime_error("Expected init before this call, got a surrogate without a state.");
    return *current_;
  }

  std::size_t num_cells() const { return static_cast<std::size_t>(contract_.grid.num_cells()); }
  std::size_t num_values() const { return contract_.num_channels() * num_cells(); }
  std::vector<std::int64_t> field_shape() const {
    const auto& n = contract_.grid.shape;
    return {1, contract_.num_channels(), n[0], n[1], n[2]};
  }

  std::size_t first_flux() const {
    for (const Field& field : contract_.fields)
      if (field.constraint == "solenoidal") return field.first_channel * num_cells();
    throw std::runtime_error("Expected a model with a solenoidal flux, got " + contract_.family + " without one.");
  }

  std::vector<std::int64_t> latent_shape() const {
    std::vector<std::int64_t> n{1, 0, 0, 0, 0};
    facts_.read("latent.shape", n[1], n[2], n[3], n[4]);
    return n;
  }
  std::vector<std::int64_t> parameter_shape() const { return {1, contract_.num_numbers()}; }

  template <typename T>
  at::Tensor tensor(const std::vector<T>& values, const std::vector<std::int64_t>& shape) const {
    constexpr auto dtype = c10::CppTypeToScalarType<T>::value;
    return at::from_blob(const_cast<T*>(values.data()), shape, dtype).clone().to(device_);
  }

  // The parameters one after another, as the model takes them.
  at::Tensor numbers(const Parameters& parameters) const {
    std::vector<double> values;
    for (const Parameter& wanted : contract_.parameters) {
      const auto given = parameters.find(wanted.name);
      if (given == parameters.end())
        throw std::runtime_error("Expected the parameter '" + wanted.name + "' [" + wanted.unit + "], got none.");
      if (given->second.size() != static_cast<std::size_t>(wanted.size))
        throw std::runtime_error("Expected " + std::to_string(wanted.size) + " numbers for '" + wanted.name +
                                 "', got " + std::to_string(given->second.size()) + ".");
      for (const double value : given->second)
        if (!std::isfinite(value))
          throw std::runtime_error("Expected a finite '" + wanted.name + "', got NaN or infinity.");
      values.insert(values.end(), given->second.begin(), given->second.end());
    }
    for (const auto& given : parameters)
      if (std::none_of(contract_.parameters.begin(), contract_.parameters.end(),
                       [&](const Parameter& known) { return known.name == given.first; }))
        throw std::runtime_error("Expected parameters that the model knows, got '" + given.first + "'.");
    return tensor(values, parameter_shape());
  }

  at::Tensor run(const std::string& name, const std::vector<at::Tensor>& inputs) {
    const c10::InferenceMode no_gradients;
    return functions_.at(name)->run(inputs).at(0);
  }

  std::vector<double> sums_of(const std::vector<double>& fields) const {
    std::vector<double> sums;
    for (int c = 0; c < contract_.num_channels(); ++c)
      sums.push_back(sum_of(fields.data() + c * num_cells(), solid_));
    return sums;
  }

  // What a decode said, with the constraints of every field to the last bit.
  // Throws std::runtime_error for another number of values, and for NaN and infinity.
  std::vector<double> finished(const at::Tensor& decoded, const std::vector<double>& sums) {
    const at::Tensor said = decoded.cpu().contiguous();
    if (said.scalar_type() != at::kDouble || static_cast<std::size_t>(said.numel()) != num_values())
      throw std::runtime_error("Expected " + std::to_string(num_values()) + " FP64 values from 'decode', got " +
                               std::to_string(said.numel()) + " of " + c10::toString(said.scalar_type()) +
                               "; export it again.");
    const double* values_said = said.const_data_ptr<double>();
    std::vector<double> fields(values_said, values_said + num_values());
    if (!std::all_of(fields.begin(), fields.end(), [](double value) { return std::isfinite(value); }))
      throw std::runtime_error(
          "Expected finite fields from 'decode', got NaN or infinity; restore a snapshot, or init with a solver's "
          "flow.");
    for (std::size_t n = 0; n < contract_.fields.size(); ++n) {
      const Field& field = contract_.fields[n];
      double* values = fields.data() + field.first_channel * num_cells();
      double load = 0;
      if (field.constraint == "solenoidal") finish_->conserve(values);
      if (field.constraint != "conserved") continue;
      facts_.read("conserved." + std::to_string(n), load);
      keep_sum(values, solid_, sums[field.first_channel], load);
    }
    return fields;
  }

  template <typename T>
  at::Tensor stored(const std::string& name, const std::vector<std::int64_t>& shape) const {
    const Array& values = array(name);
    if (values.shape != shape)
      throw std::runtime_error("Expected '" + name + "' of the shape that artefact.txt tells, got another; export it " +
                               "again.");
    return tensor(values.as<T>(), shape);
  }

  void check_self() {
    const auto fields_of = [this](const char* name) { return stored<double>(name, field_shape()); };
    const auto latent_of = [this](const char* name) { return stored<float>(name, latent_shape()); };
    const at::Tensor start = fields_of("test.fields"), latent = latent_of("test.latent");
    const at::Tensor now = stored<double>("test.now", parameter_shape());
    const at::Tensor then = stored<double>("test.then", parameter_shape());
    const at::Tensor exact = fields_of("test.finished"), before = fields_of("test.decoded");
    const at::Tensor decoded = run("decode", {latent});
    compare("encode", run("encode", {start}), latent);
    compare("step", run("step", {latent, now, then}), latent_of("test.next"));
    const std::vector<double> fields = finished(decoded, sums_of(array("test.fields").as<double>()));
    const at::Tensor result = tensor(fields, field_shape());
    for (const Field& field : contract_.fields) {
      const auto channels = [&](const at::Tensor& of) { return of.narrow(1, field.first_channel, field.num_channels); };
      compare("decode", channels(decoded), channels(before));
      compare("decode", channels(result), channels(exact), finish_margin);
      if (field.constraint == "solenoidal" &&
          finish_->net_flux_max(fields.data() + field.first_channel * num_cells()) != 0)
        throw std::runtime_error("Expected a net flux of 0.0 in every cell, got another; compile without -ffast-math.");
    }
  }

  // The projection does not enlarge an error, but can gather it in few cells.
  static constexpr double finish_margin = 10;

  void compare(const std::string& name, const at::Tensor& got, const at::Tensor& expected, double margin = 1) const {
    double tolerance = 0;
    facts_.read("tolerance." + name, tolerance);
    const bool is_alike = got.sizes() == expected.sizes() && got.scalar_type() == expected.scalar_type();
    const double size = std::max(expected.abs().max().item().toDouble(), std::numeric_limits<double>::min());
    const double error = is_alike ? got.sub(expected).abs().max().item().toDouble() / size : INFINITY;
    if (!(error <= margin * tolerance)) {
      std::ostringstream text;
      text << "Expected '" << name << "' of the exported model to give what it gave when it was exported within "
           << margin * tolerance << ", got a difference of " << error << "; export it again on this machine.";
      throw std::runtime_error(text.str());
    }
  }

  Facts facts_;
  std::map<std::string, Array> arrays_;
  Contract contract_;
  std::vector<std::uint8_t> solid_;
  std::unique_ptr<Finish> finish_;
  std::map<std::string, std::unique_ptr<torch::inductor::AOTIModelPackageLoader>> functions_;
  c10::Device device_ = c10::kCPU;
  std::optional<Snapshot> current_;
  std::vector<double> finished_;
};

}  // namespace latentphys
