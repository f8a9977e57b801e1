// Each side has a dtype of its own, known at run time only.
#include "../divergence_kernels.cuh"

template distillm::DivergenceKernel distillm::divergence_kernel_of<distillm::AnyElement>(const std::string&);
