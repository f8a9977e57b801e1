// `pack_logits` and `unpack_logits` on the CPU: rows are shared out over torch's threads.
#include "../../ops/pack_logits.h"

namespace distillm {
namespace {

constexpr int64_t kRowsPerTask = 64;

struct Cpu {
  static void pack(const RecordTensors& t) {
    const RecordInput fields = t.fields<RecordInput>();
    uint8_t* out = static_cast<uint8_t*>(t.packed.data_ptr());
    torch::stable::parallel_for(0, t.packed.size(0), kRowsPerTask, [&](int64_t begin, int64_t end) {
      RecordCoder coder(t.layout);
      for (int64_t row = begin; row < end; ++row) {
        coder.pack(fields.row(t.layout.shape, row), out + row * t.layout.bytes);
      }
    });
  }

  static void unpack(const RecordTensors& t) {
    const RecordOutput fields = t.fields<RecordOutput>();
    const uint8_t* in = static_cast<const uint8_t*>(t.packed.data_ptr());
    torch::stable::parallel_for(0, t.packed.size(0), kRowsPerTask, [&](int64_t begin, int64_t end) {
      RecordCoder coder(t.layout);
      for (int64_t row = begin; row < end; ++row) {
        coder.unpack(in + row * t.layout.bytes, fields.row(t.layout.shape, row));
      }
    });
  }
};

}  // namespace
}  // namespace distillm

STABLE_TORCH_LIBRARY_IMPL(distillm_ext, CPU, m) {
  m.impl("pack_logits", TORCH_BOX(&distillm::pack_logits<distillm::Cpu>));
  m.impl("unpack_logits", TORCH_BOX(&distillm::unpack_logits<distillm::Cpu>));
}
