// What the text file of an exported model says: its grid, fields, parameters and tolerances.
#pragma once

#include <fstream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "pore_space.hpp"

namespace latentphys {

struct Field {
  std::string name, kind, constraint, unit;
  int first_channel, num_channels;
};

struct Parameter {
  std::string name;
  int size;
  std::string unit;
};

// What a solver and a model must agree on.
struct Contract {
  std::string family;
  Grid grid;
  double interval;  // Δt of one step [s]
  std::vector<Field> fields;
  std::vector<Parameter> parameters;

  int num_channels() const {
    int n = 0;
    for (const Field& field : fields) n += field.num_channels;
    return n;
  }
  int num_numbers() const {
    int n = 0;
    for (const Parameter& parameter : parameters) n += parameter.size;
    return n;
  }
};

// The lines `key value value …` of artefact.txt.
class Facts {
 public:
  static constexpr const char* schema = "latentphys.artefact/1";

  // Throws std::runtime_error where there is no such file, or one of another schema.
  explicit Facts(const std::string& path) : path_(path) {
    std::ifstream file(path);
    if (!file) throw std::runtime_error("Expected an exported model with " + path + ", got none; export one first.");
    for (std::string line, key; std::getline(file, line);) {
      std::istringstream words(line);
      if (words >> key) std::getline(words >> std::ws, values_[key]);
    }
    if (text("schema") != schema)
      throw std::runtime_error(std::string("Expected an exported model of schema ") + schema + ", got " +
                               text("schema") + " in " + path + "; export it again with this version.");
  }

  bool has(const std::string& key) const { return values_.count(key) > 0; }

  std::string text(const std::string& key) const {
    if (!has(key))
      throw std::runtime_error("Expected a line '" + key + "' in " + path_ + ", got none; export it again.");
    return values_.at(key);
  }

  // The next values of a line, of the types of the arguments.
  template <typename... T>
  void read(const std::string& key, T&... out) const {
    std::istringstream words(text(key));
    ((words >> out), ...);
    if (!words)
      throw std::runtime_error("Expected " + std::to_string(sizeof...(out)) + " values after '" + key + "' in " +
                               path_ + ", got '" + text(key) + "'; export it again.");
  }

  int count(const std::string& key) const {
    int n = 0;
    while (has(key + "." + std::to_string(n))) ++n;
    return n;
  }

  Contract contract() const {
    Contract contract;
    contract.family = text("family");
    Grid& grid = contract.grid;
    read("grid.shape", grid.shape[0], grid.shape[1], grid.shape[2]);
    read("grid.spacing", grid.spacing[0], grid.spacing[1], grid.spacing[2]);
    grid.boundaries = boundaries_of(text("grid.boundaries"));
    grid.check();
    read("interval", contract.interval);
    for (int n = 0; n < count("fields"); ++n) {
      Field f;
      read("fields." + std::to_string(n), f.name, f.kind, f.constraint, f.unit, f.first_channel, f.num_channels);
      const int num_components = f.kind == "scalar" ? 1 : 3;
      if (f.first_channel != contract.num_channels() || f.num_channels != num_components)
        throw std::runtime_error("Expected the channels of '" + f.name + "' behind those before it, " +
                                 std::to_string(num_components) + " of them, got others; export it again.");
      contract.fields.push_back(f);
    }
    for (int n = 0; n < count("parameters"); ++n) {
      Parameter p;
      read("parameters." + std::to_string(n), p.name, p.size, p.unit);
      contract.parameters.push_back(p);
    }
    return contract;
  }

 private:
  std::string path_;
  std::map<std::string, std::string> values_;
};

}  // namespace latentphys
