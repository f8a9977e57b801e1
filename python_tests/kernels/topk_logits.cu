// One pair of instantiations of the topk_logits kernels for ptxsim, chosen by -DTYPE= -DSLOTS=.
#include "cuda/sample_logits.cuh"
#include "cuda/topk_logits.cuh"

using namespace distillm;

template __global__ void distillm::topk_logits_kernel<TYPE, SLOTS>(const TopkLogitsArguments);
template __global__ void distillm::sample_logits_kernel<TYPE, SLOTS>(const TopkLogitsArguments);
