// `distillm_ext._codec`: NumPy codec of packed teacher logits, the same bytes as the operators `pack_logits` and
// `unpack_logits`. Links no torch, so that data-loader workers can use it without importing torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>

#include "math/records/record_checks.h"
#include "math/records/record_trim.h"

namespace distillm {
namespace {

namespace py = pybind11;

template <class T>
using Array = py::array_t<T, py::array::c_style>;
using Temperatures = std::vector<double>;

RecordLayout layout_or_throw(const std::string& codec, int64_t k, int64_t vocab_size, const Temperatures& temperatures,
                             bool labels, bool counts) {
  const CheckedShape checked = record_shape(codec, k, vocab_size, temperatures, labels, counts);
  if (!checked.error.empty()) throw py::value_error(checked.error);
  return record_layout(checked.shape);
}

std::string shape_text(const py::array& x) {
  std::string text = "[";
  for (py::ssize_t i = 0; i < x.ndim(); ++i) text += (i ? ", " : "") + std::to_string(x.shape(i));
  return text + "]";
}

// columns < 0: one dimension.
void check_shape(const py::array& x, const char* name, int64_t rows, int64_t columns) {
  const bool good =
      columns < 0 ? x.ndim() == 1 && x.shape(0) == rows : x.ndim() == 2 && x.shape(0) == rows && x.shape(1) == columns;
  if (good) return;
  const std::string wanted = std::to_string(rows) + (columns < 0 ? "" : ", " + std::to_string(columns));
  throw py::value_error(std::string(name) + " must have shape [" + wanted + "], got " + shape_text(x));
}

int64_t rows_of(const py::array& x, const char* name) {
  if (x.ndim() != 2) throw py::value_error(std::string(name) + " must have two dimensions, got " + shape_text(x));
  return x.shape(0);
}

Array<uint8_t> pack_logits(const Array<int32_t>& ids, const Array<float>& logprobs, const Array<float>& norm,
                           const Array<float>& tail, const std::optional<Array<float>>& label, const Array<bool>& valid,
                           const std::optional<Array<int32_t>>& counts, int64_t vocab_size,
                           const Temperatures& temperatures, const std::string& codec) {
  const int64_t rows = rows_of(ids, "ids"), k = ids.shape(1), t = static_cast<int64_t>(temperatures.size());
  const RecordLayout layout =
      layout_or_throw(codec, k, vocab_size, temperatures, label.has_value(), counts.has_value());
  check_shape(logprobs, "logprobs", rows, k);
  check_shape(norm, "log_norm", rows, t);
  check_shape(tail, "tail_logprob", rows, t);
  check_shape(valid, "valid", rows, -1);
  if (label) check_shape(*label, "label_logprob", rows, -1);
  if (counts) check_shape(*counts, "counts", rows, k);
  Array<uint8_t> packed({rows, static_cast<int64_t>(layout.bytes)});
  const RecordInput fields{ids.data(),
                           logprobs.data(),
                           norm.data(),
                           tail.data(),
                           label ? label->data() : nullptr,
                           valid.data(),
                           counts ? counts->data() : nullptr};
  uint8_t* out = packed.mutable_data();
  py::gil_scoped_release release;
  RecordCoder coder(layout);
  for (int64_t row = 0; row < rows; ++row) coder.pack(fields.row(layout.shape, row), out + row * layout.bytes);
  return packed;
}

using Unpacked = std::tuple<Array<int32_t>, Array<float>, Array<float>, Array<float>, std::optional<Array<float>>,
                            Array<bool>, std::optional<Array<int32_t>>>;

Unpacked unpack_logits(const Array<uint8_t>& packed, const std::string& codec, int64_t k, int64_t vocab_size,
                       const Temperatures& temperatures, bool has_labels, bool has_counts) {
  const RecordLayout layout = layout_or_throw(codec, k, vocab_size, temperatures, has_labels, has_counts);
  const int64_t rows = rows_of(packed, "packed"), t = static_cast<int64_t>(temperatures.size());
  check_shape(packed, "packed", rows, layout.bytes);
  Array<int32_t> ids({rows, k});
  Array<float> logprobs({rows, k}), norm({rows, t}), tail({rows, t});
  Array<bool> valid(rows);
  std::optional<Array<float>> label;
  std::optional<Array<int32_t>> counts;
  if (has_labels) label.emplace(rows);
  if (has_counts) counts.emplace(std::vector<py::ssize_t>{rows, k});
  const RecordOutput fields{ids.mutable_data(),
                            logprobs.mutable_data(),
                            norm.mutable_data(),
                            tail.mutable_data(),
                            label ? label->mutable_data() : nullptr,
                            valid.mutable_data(),
                            counts ? counts->mutable_data() : nullptr};
  const uint8_t* in = packed.data();
  {
    py::gil_scoped_release release;
    RecordCoder coder(layout);
    for (int64_t row = 0; row < rows; ++row) coder.unpack(in + row * layout.bytes, fields.row(layout.shape, row));
  }
  return {ids, logprobs, norm, tail, label, valid, counts};
}

int64_t record_bytes(const std::string& codec, int64_t k, int64_t vocab_size, const Temperatures& temperatures,
                     bool has_labels, bool has_counts) {
  return layout_or_throw(codec, k, vocab_size, temperatures, has_labels, has_counts).bytes;
}

std::tuple<Array<uint8_t>, Array<int64_t>> trim_records(const Array<uint8_t>& packed, const std::string& codec,
                                                        int64_t k, int64_t vocab_size, const Temperatures& temperatures,
                                                        bool has_labels, bool has_counts) {
  const RecordLayout layout = layout_or_throw(codec, k, vocab_size, temperatures, has_labels, has_counts);
  const int64_t rows = rows_of(packed, "packed");
  check_shape(packed, "packed", rows, layout.bytes);
  Array<int64_t> offsets(rows + 1);
  int64_t* ends = offsets.mutable_data();
  const uint8_t* in = packed.data();
  std::vector<uint8_t> trimmed;
  {
    py::gil_scoped_release release;
    ends[0] = 0;
    for (int64_t row = 0; row < rows; ++row) {
      trim_record(layout, in + row * layout.bytes, trimmed);
      ends[row + 1] = static_cast<int64_t>(trimmed.size());
    }
  }
  Array<uint8_t> flat(static_cast<py::ssize_t>(trimmed.size()));
  std::copy(trimmed.begin(), trimmed.end(), flat.mutable_data());
  return {flat, offsets};
}

Array<uint8_t> restore_records(const Array<uint8_t>& flat, const Array<int64_t>& offsets, const std::string& codec,
                               int64_t k, int64_t vocab_size, const Temperatures& temperatures, bool has_labels,
                               bool has_counts) {
  const RecordLayout layout = layout_or_throw(codec, k, vocab_size, temperatures, has_labels, has_counts);
  if (flat.ndim() != 1 || offsets.ndim() != 1 || offsets.shape(0) < 1)
    throw py::value_error("trimmed and offsets must have one dimension, offsets at least one entry, got shapes " +
                          shape_text(flat) + " and " + shape_text(offsets));
  const int64_t rows = offsets.shape(0) - 1;
  Array<uint8_t> packed({rows, static_cast<int64_t>(layout.bytes)});
  const uint8_t* in = flat.data();
  const int64_t* at = offsets.data();
  uint8_t* out = packed.mutable_data();
  int64_t bad = -1;
  {
    py::gil_scoped_release release;
    for (int64_t row = 0; row < rows && bad < 0; ++row) {
      const bool inside = at[row] >= 0 && at[row] <= at[row + 1] && at[row + 1] <= flat.shape(0);
      if (!inside || !restore_record(layout, in + at[row], at[row + 1] - at[row], out + row * layout.bytes)) bad = row;
    }
  }
  if (bad >= 0) throw py::value_error("record " + std::to_string(bad) + " is damaged or of other settings");
  return packed;
}

}  // namespace
}  // namespace distillm

PYBIND11_MODULE(_codec, m) {
  using namespace distillm;
  using py::arg;
  m.doc() = "NumPy codec of packed teacher logits; needs no torch.";
  m.attr("MAX_K") = kMaxEntries;
  m.def(
      "pack_logits", &pack_logits, arg("ids").noconvert(), arg("logprobs").noconvert(), arg("log_norm").noconvert(),
      arg("tail_logprob").noconvert(), arg("label_logprob").noconvert().none(true), arg("valid").noconvert(),
      arg("counts").noconvert().none(true), arg("vocab_size"), arg("temperatures"), arg("codec"),
      "Compressed logits of R positions as uint8 [R, bytes]: what distillm_ext.packing.pack gives for tensors.\n\n"
      "C-contiguous arrays, read in place: ids, counts [R, k] int32; logprobs [R, k], log_norm, tail_logprob [R, T],\n"
      "label_logprob [R] float32; valid [R] bool; label_logprob and counts may be None.\n\n"
      "Raises TypeError for a wrong dtype or layout, ValueError for a wrong shape or setting.");
  m.def("unpack_logits", &unpack_logits, arg("packed").noconvert(), arg("codec"), arg("k"), arg("vocab_size"),
        arg("temperatures"), arg("has_labels"), arg("has_counts"),
        "Inverse of pack_logits: (ids, logprobs, log_norm, tail_logprob, label_logprob or None, valid, counts or "
        "None).\n\nAny bytes of the right width are safe: what cannot be an entry becomes padding.");
  m.def("record_bytes", &record_bytes, arg("codec"), arg("k"), arg("vocab_size"), arg("temperatures"),
        arg("has_labels"), arg("has_counts"), "Bytes of one packed record.");
  m.def("trim_records", &trim_records, arg("packed").noconvert(), arg("codec"), arg("k"), arg("vocab_size"),
        arg("temperatures"), arg("has_labels"), arg("has_counts"),
        "Records without their padding: (uint8 [total], int64 offsets [R + 1]).");
  m.def("restore_records", &restore_records, arg("trimmed").noconvert(), arg("offsets").noconvert(), arg("codec"),
        arg("k"), arg("vocab_size"), arg("temperatures"), arg("has_labels"), arg("has_counts"),
        "Inverse of trim_records. Raises ValueError naming the record whose bytes cannot be one.");
}
