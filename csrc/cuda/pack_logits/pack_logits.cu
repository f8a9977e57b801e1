// `pack_logits` and `unpack_logits` on CUDA: one block per row.
#include <algorithm>

#include "../../ops/pack_logits.h"
#include "../row/launch.h"
#include "pack_logits.cuh"
#include "unpack_logits.cuh"

namespace distillm {
namespace {

// The words of the record, and a value and an id per entry (packing needs the id only).
size_t shared_bytes(const RecordLayout& layout) {
  return static_cast<size_t>(layout.words + 2 * layout.shape.entries) * sizeof(uint32_t);
}

int threads_for(const RecordLayout& layout) {
  return std::min(256, (layout.shape.entries + kWarp - 1) / kWarp * kWarp);
}

// One block for each row of `packed`.
template <class Arguments>
void launch(void (*kernel)(Arguments), const Arguments& arguments, const Tensor& packed) {
  const int64_t rows = packed.size(0);
  if (rows == 0) return;
  check_grid(rows, arguments.layout.shape.vocab);
  const DeviceScope device(packed);
  const size_t bytes = shared_bytes(arguments.layout);
  const int64_t room = device.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - 4 * sizeof(PartialSums);
  STD_TORCH_CHECK(static_cast<int64_t>(bytes) <= room, "records of k = ", arguments.layout.shape.entries, " need ",
                  bytes, " bytes of shared memory, this device has ", room, "; use a smaller k");
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  const dim3 grid(static_cast<unsigned>(rows));
  kernel<<<grid, threads_for(arguments.layout), bytes, device.stream()>>>(arguments);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

struct Cuda {
  static void pack(const RecordTensors& t) {
    const PackArguments arguments{t.layout, t.fields<RecordInput>(), static_cast<uint8_t*>(t.packed.data_ptr())};
    launch<PackArguments>(pack_logits_kernel, arguments, t.packed);
  }

  static void unpack(const RecordTensors& t) {
    const auto* packed = static_cast<const uint8_t*>(t.packed.data_ptr());
    const UnpackArguments arguments{t.layout, packed, t.fields<RecordOutput>()};
    launch<UnpackArguments>(unpack_logits_kernel, arguments, t.packed);
  }
};

}  // namespace
}  // namespace distillm

STABLE_TORCH_LIBRARY_IMPL(distillm_ext, CUDA, m) {
  m.impl("pack_logits", TORCH_BOX(&distillm::pack_logits<distillm::Cuda>));
  m.impl("unpack_logits", TORCH_BOX(&distillm::unpack_logits<distillm::Cuda>));
}
