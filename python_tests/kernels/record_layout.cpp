// Prints the RecordLayout of a shape as 32-bit words: what the launchers in csrc/cuda pass to the kernels by value.
//   record_layout CODEC K VOCAB LABELS COUNTS TEMPERATURE...
#include <cstdio>
#include <cstdlib>

#include "../../csrc/math/records/record_checks.h"

using namespace distillm;

int main(int count, char** text) {
  std::vector<double> temperatures;
  for (int i = 6; i < count; ++i) temperatures.push_back(std::atof(text[i]));
  const CheckedShape checked = record_shape(text[1], std::atoll(text[2]), std::atoll(text[3]), temperatures,
                                            std::atoi(text[4]) != 0, std::atoi(text[5]) != 0);
  const RecordLayout layout = record_layout(checked.shape);
  static_assert(sizeof(layout) % 4 == 0, "words");
  const unsigned char* bytes = reinterpret_cast<const unsigned char*>(&layout);
  for (size_t i = 0; i < sizeof(layout); i += 4) {
    std::printf("%u ", bytes[i] | bytes[i + 1] << 8 | bytes[i + 2] << 16 | static_cast<unsigned>(bytes[i + 3]) << 24);
  }
  return !checked.error.empty();
}
