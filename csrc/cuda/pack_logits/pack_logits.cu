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

template <class Arguments>
void launch(void (*kernel)(Arguments), const Arguments& arguments, int64_t rows, const DeviceScope& device) {
  check_grid(rows, arguments.layout.shape.vocab);
  const size_t bytes = shared_bytes(arguments.layout);
  const int64_t room = device.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - 4 * sizeof(PartialSums);
  STD_TORCH_CHECK(static_cast<int64_t>(bytes) <= room, "records of k = ", arguments.layout.shape.entries, " need ",
                  bytes, " bytes of shared memory, this device has ", room, "; use a smaller k");
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  const dim3 grid(static_cast<unsigned>(rows));
  kernel<<<grid, threads_for(arguments.layout), bytes, device.stream()>>>(arguments);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor pack_logits(const Tensor& ids, const Tensor& logprobs, const Tensor& log_norm, const Tensor& tail,
                   const std::optional<Tensor>& label, const Tensor& valid, const std::optional<Tensor>& counts,
                   int64_t vocab_size, std::vector<double> temperatures, std::string codec) {
  const DeviceScope device(ids);
  const RecordTensors t = prepare_pack(ids, logprobs, log_norm, tail, label, valid, counts,
                                       {std::move(codec), vocab_size, std::move(temperatures)});
  if (ids.size(0) == 0) return t.packed;
  const PackArguments arguments{t.layout, t.fields<RecordInput>(), static_cast<uint8_t*>(t.packed.data_ptr())};
  launch<PackArguments>(pack_logits_kernel, arguments, ids.size(0), device);
  return t.packed;
}

UnpackedLogits unpack_logits(const Tensor& packed, std::string codec, int64_t k, int64_t vocab_size,
                             std::vector<double> temperatures, bool has_labels, bool has_counts) {
  const DeviceScope device(packed);
  const RecordTensors t =
      prepare_unpack(packed, k, has_labels, has_counts, {std::move(codec), vocab_size, std::move(temperatures)});
  if (packed.size(0) == 0) return unpacked(t);
  const UnpackArguments arguments{t.layout, static_cast<const uint8_t*>(t.packed.data_ptr()), t.fields<RecordOutput>()};
  launch<UnpackArguments>(unpack_logits_kernel, arguments, packed.size(0), device);
  return unpacked(t);
}

}  // namespace
}  // namespace distillm

STABLE_TORCH_LIBRARY_IMPL(distillm_ext, CUDA, m) {
  m.impl("pack_logits", TORCH_BOX(&distillm::pack_logits));
  m.impl("unpack_logits", TORCH_BOX(&distillm::unpack_logits));
}
