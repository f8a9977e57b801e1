// Both sides are bfloat16.
#include "../divergence_kernels.cuh"

template distillm::DivergenceKernel distillm::divergence_kernel_of<distillm::BFloat16>(const std::string&);
