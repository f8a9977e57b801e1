// `distillm_ext._codec`: NumPy codec of packed teacher logits. Links no torch, so that data-loader workers can use it
// without importing torch.
//
// Packed records of compressed logits: codec_records.h. Bare ids:
// A row of k ids below 2^bits is stored as ceil(k * bits / 8) bytes: id i occupies the bits [i * bits, (i + 1) * bits)
// of the row, least significant bit first. Rows start on a byte.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "codec_records.h"
#include "math/bitpack.h"

namespace py = pybind11;

namespace {

using Ids = py::array_t<int32_t, py::array::c_style>;
using Bytes = py::array_t<uint8_t, py::array::c_style>;

void check_bits(int bits) {
  if (bits < 1 || bits > 31) throw py::value_error("bits must lie in 1..31, got " + std::to_string(bits));
}

Bytes pack_ids(const Ids& ids, int bits) {
  check_bits(bits);
  if (ids.ndim() != 2)
    throw py::value_error("ids must have shape [rows, k], got " + std::to_string(ids.ndim()) + " dimensions");
  const int64_t rows = ids.shape(0), k = ids.shape(1);
  const int64_t limit = int64_t{1} << bits;
  const int32_t* in = ids.data();
  for (int64_t i = 0; i < rows * k; ++i) {
    if (in[i] < 0 || in[i] >= limit) {
      throw py::value_error("ids must lie in [0, 2**bits) = [0, " + std::to_string(limit) + "), got " +
                            std::to_string(in[i]) + " in row " + std::to_string(i / k));
    }
  }
  const int64_t row_bytes = distillm::packed_bytes(k, bits);
  Bytes packed({rows, row_bytes});
  uint8_t* out = packed.mutable_data();
  py::gil_scoped_release release;
  for (int64_t row = 0; row < rows; ++row) distillm::pack_row(in + row * k, k, bits, out + row * row_bytes);
  return packed;
}

Ids unpack_ids(const Bytes& packed, int64_t k, int bits) {
  check_bits(bits);
  if (k < 0) throw py::value_error("k must not be negative, got " + std::to_string(k));
  const int64_t row_bytes = distillm::packed_bytes(k, bits);
  if (packed.ndim() != 2 || packed.shape(1) != row_bytes) {
    throw py::value_error("packed must have shape [rows, " + std::to_string(row_bytes) +
                          "] for k = " + std::to_string(k) + " and bits = " + std::to_string(bits));
  }
  const int64_t rows = packed.shape(0);
  Ids ids({rows, k});
  const uint8_t* in = packed.data();
  int32_t* out = ids.mutable_data();
  py::gil_scoped_release release;
  for (int64_t row = 0; row < rows; ++row) distillm::unpack_row(in + row * row_bytes, k, bits, out + row * k);
  return ids;
}

}  // namespace

PYBIND11_MODULE(_codec, m) {
  m.doc() = "NumPy codec of packed teacher logits; needs no torch.";
  m.def("pack_ids", &pack_ids, py::arg("ids").noconvert(), py::arg("bits"),
        "Packs int32 ids [rows, k], each in [0, 2**bits), into uint8 [rows, ceil(k * bits / 8)], least significant bit "
        "first.\n\nRaises ValueError for an id out of range or bits outside 1..31.\n\n"
        ">>> pack_ids(np.array([[1, 2, 3]], np.int32), bits=2)\narray([[57]], dtype=uint8)");
  m.def("unpack_ids", &unpack_ids, py::arg("packed").noconvert(), py::arg("k"), py::arg("bits"),
        "Inverse of pack_ids: uint8 [rows, ceil(k * bits / 8)] -> int32 [rows, k].\n\n"
        "Raises ValueError when the width of packed does not fit k and bits.");
  distillm::define_records(m);
}
