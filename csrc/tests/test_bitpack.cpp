// Bit-packed rows: every width there and back, the documented bit order, no byte written past the end.
#include <random>
#include <vector>

#include "../math/bitpack.h"
#include "check.h"

using namespace distillm;

int main() {
  std::mt19937 generator(7);
  for (int bits = 1; bits <= 31; ++bits) {
    for (int64_t count : {0, 1, 2, 7, 8, 64, 129}) {
      std::vector<int32_t> values(count), back(count, -1);
      for (int32_t& v : values) v = static_cast<int32_t>(generator() & ((uint64_t{1} << bits) - 1));
      std::vector<uint8_t> packed(packed_bytes(count, bits) + 1, 0xa5);
      pack_row(values.data(), count, bits, packed.data());
      unpack_row(packed.data(), count, bits, back.data());
      CHECK(back == values);
      CHECK_EQUAL(packed.back(), 0xa5);
    }
  }
  const int32_t values[] = {1, 2, 3};
  uint8_t packed;
  pack_row(values, 3, 2, &packed);
  CHECK_EQUAL(packed, 0b111001);
  return report("bitpack");
}
