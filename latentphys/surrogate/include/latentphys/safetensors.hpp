// Arrays of a safetensors file: F64, F32 and U8, little-endian.
//
// Format: https://github.com/huggingface/safetensors#format: the length of a JSON header in 8 bytes, the header, the
// data.
#pragma once

#include <cctype>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace latentphys {

struct Array {
  std::string dtype;  // as the file names it
  std::vector<std::int64_t> shape;
  std::vector<char> bytes;

  // The numbers, if they are of this type: double, float or std::uint8_t.
  template <typename T>
  std::vector<T> as() const {
    const char* wanted = sizeof(T) == 8 ? "F64" : sizeof(T) == 4 ? "F32" : "U8";
    if (dtype != wanted)
      throw std::runtime_error(std::string("Expected an array of ") + wanted + ", got " + dtype + "; export it again.");
    std::vector<T> values(bytes.size() / sizeof(T));
    if (!values.empty()) std::memcpy(values.data(), bytes.data(), bytes.size());
    return values;
  }
};

// The header of a safetensors file: one object of objects, whose values are strings and lists of whole numbers.
class SafetensorsHeader {
 public:
  struct Entry {
    std::string dtype;
    std::vector<std::int64_t> shape, offsets;
  };
  std::map<std::string, Entry> entries;

  explicit SafetensorsHeader(const std::string& text) : text_(text) {
    object([this](const std::string& name) {
      Entry entry;
      object([&](const std::string& key) {
        if (peek() == '"')
          entry.dtype = string();
        else
          (key == "shape" ? entry.shape : entry.offsets) = numbers();
      });
      if (name != "__metadata__") entries[name] = entry;
    });
  }

 private:
  template <typename Value>
  void object(Value value) {
    take('{');
    if (peek() == '}') return take('}');
    for (;;) {
      const std::string key = string();
      take(':');
      value(key);
      if (peek() == '}') return take('}');
      take(',');
    }
  }

  std::string string() {
    take('"');
    std::string out;
    while (at_ < text_.size() && text_[at_] != '"') {
      if (text_[at_] == '\\') ++at_;
      if (at_ < text_.size()) out += text_[at_++];
    }
    take('"');
    return out;
  }

  std::vector<std::int64_t> numbers() {
    std::vector<std::int64_t> out;
    take('[');
    while (peek() != ']') {
      if (!out.empty()) take(',');
      if (!std::isdigit(static_cast<unsigned char>(peek()))) fail();
      std::size_t length = 0;
      out.push_back(std::stoll(text_.substr(at_, max_digits), &length));
      at_ += length;
    }
    take(']');
    return out;
  }

  char peek() {
    while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
    if (at_ == text_.size()) fail();
    return text_[at_];
  }
  void take(char wanted) {
    if (peek() != wanted) fail();
    ++at_;
  }
  [[noreturn]] static void fail() {
    throw std::runtime_error("Expected the header of a safetensors file, got other text.");
  }

  static constexpr std::size_t max_digits = 18;  // a longer number is beyond any file, and 64 bits
  const std::string& text_;
  std::size_t at_ = 0;
};

// Bytes of an array; −1 where 64 bits do not hold their number.
inline std::int64_t num_bytes(const SafetensorsHeader::Entry& entry) {
  std::int64_t size = entry.dtype == "F64" ? 8 : entry.dtype == "F32" ? 4 : 1;
  for (const std::int64_t n : entry.shape) {
    if (n > 0 && size > std::numeric_limits<std::int64_t>::max() / n) return -1;
    size *= n;
  }
  return size;
}

// Every array of a file by its name. Throws std::runtime_error for a file that is missing, cut short or no safetensors.
inline std::map<std::string, Array> read_safetensors(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string data{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  std::uint64_t length = 0;
  if (data.size() >= 8) std::memcpy(&length, data.data(), 8);
  if (data.size() < 8 || length > data.size() - 8)
    throw std::runtime_error("Expected a safetensors file at " + path +
                             ", got none or one cut short; export it again.");
  const std::string text = data.substr(8, length);
  const std::size_t begin = 8 + length, end = data.size();
  std::map<std::string, Array> arrays;
  for (const auto& [name, entry] : SafetensorsHeader(text).entries) {
    const std::int64_t size = num_bytes(entry);
    if (size < 0 || entry.offsets.size() != 2 || entry.offsets[1] - entry.offsets[0] != size ||
        static_cast<std::uint64_t>(entry.offsets[1]) > end - begin)
      throw std::runtime_error("Expected the whole array '" + name + "' in " + path + ", got less; export it again.");
    const auto from = data.begin() + static_cast<std::ptrdiff_t>(begin) + entry.offsets[0];
    arrays[name] = {entry.dtype, entry.shape, {from, from + size}};
  }
  return arrays;
}

}  // namespace latentphys
