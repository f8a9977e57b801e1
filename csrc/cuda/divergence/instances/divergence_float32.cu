// Both sides are float.
#include "../divergence_kernels.cuh"

template distillm::DivergenceKernel distillm::divergence_kernel_of<float>(const std::string&);
