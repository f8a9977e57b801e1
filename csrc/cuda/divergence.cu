// `divergence` on CUDA: chooses the kernel of this divergence and pair of dtypes and launches one block per row.
#include <algorithm>

#include "divergence.cuh"
#include "launch.h"
#include "row_metrics.cuh"
#include "zero_rest.cuh"

namespace distillm {
namespace {

struct DivergenceKernel {
  void (*function)(DivergenceArguments) = nullptr;
  void (*metrics)(DivergenceArguments) = nullptr;
  void (*zero_rest)(const DivergenceCall&, cudaStream_t) = nullptr;
  int slot_bytes = 0, chunk_entries = 0;
};

template <class Student>
void launch_zero_rest(const DivergenceCall& call, cudaStream_t stream) {
  zero_rest_kernel<Student><<<dim3(static_cast<unsigned>(call.rows)), kZeroRestThreads, 0, stream>>>(
      static_cast<Student*>(call.gradient), call.gradient_rows, static_cast<int32_t>(call.student_vocab),
      static_cast<int32_t>(call.gradient_vocab));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class Functor, class Student, class Teacher>
DivergenceKernel instantiated() {
  using Rows = RowPair<Student, Teacher>;
  return {divergence_kernel<Functor, Student, Teacher>, row_metrics_kernel<Student, Teacher>, launch_zero_rest<Student>,
          Rows::kSlotBytes, Rows::N};
}

template <class Functor, class Student>
DivergenceKernel kernel_for_teacher(const DivergenceCall& call) {
  return call.student_type == call.teacher_type ? instantiated<Functor, Student, Student>()
                                                : instantiated<Functor, Student, AnyElement>();
}

template <class Functor>
DivergenceKernel kernel_for_pair(const DivergenceCall& call) {
  switch (element_type(call.student_type)) {
    case ElementType::kBFloat16: return kernel_for_teacher<Functor, BFloat16>(call);
    case ElementType::kHalf: return kernel_for_teacher<Functor, Half>(call);
    default: return kernel_for_teacher<Functor, float>(call);
  }
}

DivergenceKernel kernel_for(const DivergenceCall& call) {
#define DISTILLM_MATCH(public_name, Positive, AtZero, Functor) \
  if (call.options.divergence == public_name) return kernel_for_pair<Functor<float>>(call);
  DISTILLM_FOR_EACH_DIVERGENCE(DISTILLM_MATCH)
#undef DISTILLM_MATCH
  return {};
}

// Rows share a multiprocessor as their staging allows; the threads of those blocks together should fill it.
int threads_per_block(int64_t shared_bytes, int64_t chunks) {
  const int64_t filling = shared_bytes > 72 * 1024 ? kMaxBlockThreads : shared_bytes > 36 * 1024 ? 512 : 256;
  const int64_t useful = (chunks + kWarp - 1) / kWarp * kWarp;
  return static_cast<int>(std::max<int64_t>(kWarp, std::min(filling, useful)));
}

// As much of a row pair as the shared memory of a block holds beside the kernel's own.
int32_t staged_chunks(const DivergenceKernel& kernel, int64_t chunks, int64_t own_bytes, const DeviceScope& device) {
  const int64_t room = device.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - own_bytes;
  return static_cast<int32_t>(std::min(chunks, room / kernel.slot_bytes));
}

// staged_chunks is set per launch.
DivergenceArguments arguments_of(const DivergenceCall& call) {
  const DivergenceOptions& options = call.options;
  return {call.student,
          call.teacher,
          call.student_rows,
          call.teacher_rows,
          call.gradient_rows,
          static_cast<int32_t>(call.student_vocab),
          static_cast<int32_t>(call.teacher_vocab),
          element_type(call.teacher_type),
          0,
          call.labels,
          static_cast<const float*>(call.weight),
          static_cast<const float*>(call.alpha),
          static_cast<const float*>(call.cap),
          static_cast<float*>(call.loss),
          call.gradient,
          static_cast<float*>(call.metrics),
          options.ignore_index,
          static_cast<float>(options.alpha),
          static_cast<float>(options.beta),
          static_cast<float>(1 / options.temperature),
          static_cast<float>(options.ce_weight),
          options.detach_mixture};
}

void launch(void (*function)(DivergenceArguments), const DivergenceArguments& arguments, const DivergenceKernel& kernel,
            const DivergenceCall& call, int64_t chunks, cudaStream_t stream) {
  const int64_t shared_bytes = int64_t{arguments.staged_chunks} * kernel.slot_bytes;
  STD_CUDA_CHECK(
      cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  const dim3 grid(static_cast<unsigned>(call.rows));
  function<<<grid, threads_per_block(shared_bytes, chunks), shared_bytes, stream>>>(arguments);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// The metrics first: the gradient may take the place of the logits.
void launch_all(const DivergenceKernel& kernel, const DivergenceCall& call, const DeviceScope& device) {
  const int64_t vocab = std::max(call.student_vocab, call.teacher_vocab);
  check_grid(call.rows, std::max(vocab, call.gradient_vocab));
  const int64_t chunks = most_chunks(static_cast<int>(vocab), kernel.chunk_entries);
  DivergenceArguments arguments = arguments_of(call);
  if (call.metrics) {
    arguments.staged_chunks = staged_chunks(kernel, chunks, sizeof(Scratch) + sizeof(MetricScratch), device);
    launch(kernel.metrics, arguments, kernel, call, chunks, device.stream());
  }
  arguments.staged_chunks = staged_chunks(kernel, chunks, sizeof(Scratch), device);
  launch(kernel.function, arguments, kernel, call, chunks, device.stream());
  if (call.gradient && call.gradient_vocab > call.student_vocab) kernel.zero_rest(call, device.stream());
}

void run(const DivergenceTensors& t, const DeviceScope& device) {
  const DivergenceKernel kernel = kernel_for(t.call);
  STD_TORCH_CHECK(kernel.function, "divergence '", t.call.options.divergence, "' has no CUDA kernel");
  if (t.call.rows > 0) launch_all(kernel, t.call, device);
}

std::tuple<Tensor, Tensor, Tensor> divergence(const Tensor& student, const Tensor& teacher,
                                              const std::optional<Tensor>& labels, const std::optional<Tensor>& weight,
                                              const std::optional<Tensor>& alpha_rows, const std::optional<Tensor>& cap,
                                              std::string name, double alpha, double beta, double temperature,
                                              double ce_weight, int64_t ignore_index, bool detach_mixture,
                                              int64_t vocab_size, bool need_gradient, bool need_metrics) {
  const DeviceScope device(student);
  const DivergenceTensors t = prepare_divergence(
      student, teacher, labels, weight, alpha_rows, cap,
      {std::move(name), alpha, beta, temperature, ce_weight, ignore_index, detach_mixture, vocab_size},
      need_gradient ? GradientTo::kNewTensor : GradientTo::kNowhere, need_metrics);
  run(t, device);
  return {t.loss, t.gradient, t.metrics};
}

std::tuple<Tensor, Tensor> divergence_(Tensor student, const Tensor& teacher, const std::optional<Tensor>& labels,
                                       const std::optional<Tensor>& weight, const std::optional<Tensor>& alpha_rows,
                                       const std::optional<Tensor>& cap, std::string name, double alpha, double beta,
                                       double temperature, double ce_weight, int64_t ignore_index, bool detach_mixture,
                                       int64_t vocab_size, bool need_metrics) {
  const DeviceScope device(student);
  const DivergenceTensors t = prepare_divergence(
      student, teacher, labels, weight, alpha_rows, cap,
      {std::move(name), alpha, beta, temperature, ce_weight, ignore_index, detach_mixture, vocab_size},
      GradientTo::kStudent, need_metrics);
  run(t, device);
  return {t.loss, t.metrics};
}

}  // namespace
}  // namespace distillm

STABLE_TORCH_LIBRARY_IMPL(distillm_ext, CUDA, m) {
  m.impl("divergence", TORCH_BOX(&distillm::divergence));
  m.impl("divergence_", TORCH_BOX(&distillm::divergence_));
}
