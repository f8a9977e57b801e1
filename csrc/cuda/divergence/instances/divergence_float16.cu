// Both sides are float16.
#include "../divergence_kernels.cuh"

template distillm::DivergenceKernel distillm::divergence_kernel_of<distillm::Half>(const std::string&);
