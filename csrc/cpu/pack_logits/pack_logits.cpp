// `pack_logits` and `unpack_logits` on the CPU: rows are shared out over torch's threads.
#include "../../ops/pack_logits.h"

namespace distillm {
namespace {

constexpr int64_t kRowsPerTask = 64;

Tensor pack_logits(const Tensor& ids, const Tensor& logprobs, const Tensor& log_norm, const Tensor& tail,
                   const std::optional<Tensor>& label, const Tensor& valid, const std::optional<Tensor>& counts,
                   int64_t vocab_size, std::vector<double> temperatures, std::string codec) {
  const RecordTensors t = prepare_pack(ids, logprobs, log_norm, tail, label, valid, counts,
                                       {std::move(codec), vocab_size, std::move(temperatures)});
  const RecordInput fields = t.fields<RecordInput>();
  uint8_t* out = static_cast<uint8_t*>(t.packed.data_ptr());
  torch::stable::parallel_for(0, ids.size(0), kRowsPerTask, [&](int64_t begin, int64_t end) {
    RecordCoder coder(t.layout);
    for (int64_t row = begin; row < end; ++row) coder.pack(fields.row(t.layout.shape, row), out + row * t.layout.bytes);
  });
  return t.packed;
}

UnpackedLogits unpack_logits(const Tensor& packed, std::string codec, int64_t k, int64_t vocab_size,
                             std::vector<double> temperatures, bool has_labels, bool has_counts) {
  const RecordTensors t =
      prepare_unpack(packed, k, has_labels, has_counts, {std::move(codec), vocab_size, std::move(temperatures)});
  const RecordOutput fields = t.fields<RecordOutput>();
  const uint8_t* in = static_cast<const uint8_t*>(t.packed.data_ptr());
  torch::stable::parallel_for(0, packed.size(0), kRowsPerTask, [&](int64_t begin, int64_t end) {
    RecordCoder coder(t.layout);
    for (int64_t row = begin; row < end; ++row) {
      coder.unpack(in + row * t.layout.bytes, fields.row(t.layout.shape, row));
    }
  });
  return unpacked(t);
}

}  // namespace
}  // namespace distillm

STABLE_TORCH_LIBRARY_IMPL(distillm_ext, CPU, m) {
  m.impl("pack_logits", TORCH_BOX(&distillm::pack_logits));
  m.impl("unpack_logits", TORCH_BOX(&distillm::unpack_logits));
}
