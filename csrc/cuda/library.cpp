// What the CUDA half of this build is.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>

#ifndef DISTILLM_CUDA_ARCHITECTURES
#define DISTILLM_CUDA_ARCHITECTURES "unknown"
#endif

namespace distillm {
namespace {

std::string cuda_architectures() { return DISTILLM_CUDA_ARCHITECTURES; }

}  // namespace
}  // namespace distillm

STABLE_TORCH_LIBRARY_FRAGMENT(distillm_ext, m) { m.def("cuda_architectures() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(distillm_ext, CompositeExplicitAutograd, m) {
  m.impl("cuda_architectures", TORCH_BOX(&distillm::cuda_architectures));
}
