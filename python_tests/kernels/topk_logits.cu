// One pair of instantiations of the topk_logits kernels for ptxsim, chosen by -DTYPE= -DSLOTS=.
#include "cuda/topk_logits/draw_logits.cuh"
#include "cuda/topk_logits/topk_logits.cuh"

using namespace distillm;

template __global__ void distillm::topk_logits_kernel<TYPE, SLOTS>(const TopkLogitsArguments);
template __global__ void distillm::draw_logits_kernel<TYPE, SLOTS>(const TopkLogitsArguments);
