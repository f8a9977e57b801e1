// Record shapes from names and numbers a user gave. Errors are sentences, thrown by whoever binds them.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "record.h"

namespace distillm {
inline namespace DISTILLM_ISA {

inline int codec_number(const std::string& name) {
  constexpr const char* kNames[] = {"q4", "q6", "q8", "fp16", "exact"};
  for (int i = 0; i < 5; ++i) {
    if (name == kNames[i]) return i;
  }
  return -1;
}

struct CheckedShape {
  RecordShape shape;
  std::string error;  // empty when the shape is good
};

inline std::string temperature_error(const std::vector<double>& temperatures) {
  if (temperatures.empty() || temperatures.size() > kMaxTemperatures)
    return "temperatures must hold 1 to " + std::to_string(kMaxTemperatures) + " numbers, got " +
           std::to_string(temperatures.size());
  for (double temperature : temperatures) {
    if (!(temperature > 0) || std::isinf(temperature))
      return "temperatures must be positive and finite, got " + std::to_string(temperature);
  }
  return "";
}

inline CheckedShape record_shape(const std::string& codec, int64_t k, int64_t vocab,
                                 const std::vector<double>& temperatures, bool has_labels, bool has_counts) {
  const int number = codec_number(codec);
  if (number < 0) return {{}, "codec must be q4, q6, q8, fp16 or exact, got '" + codec + "'"};
  if (k < 1 || k > kMaxEntries)
    return {{}, "k must lie in 1.." + std::to_string(kMaxEntries) + ", got " + std::to_string(k)};
  if (vocab < 1 || vocab > int64_t{1} << 30)
    return {{}, "vocab_size must lie in 1..2**30, got " + std::to_string(vocab)};
  if (std::string error = temperature_error(temperatures); !error.empty()) return {{}, error};
  RecordShape shape{static_cast<int32_t>(vocab),
                    static_cast<int32_t>(k),
                    has_counts ? static_cast<int32_t>(k) : 0,
                    static_cast<Codec>(number),
                    has_labels,
                    static_cast<int32_t>(temperatures.size()),
                    {}};
  for (size_t t = 0; t < temperatures.size(); ++t) shape.temperature[t] = static_cast<float>(temperatures[t]);
  return {shape, ""};
}

}  // namespace DISTILLM_ISA
}  // namespace distillm
