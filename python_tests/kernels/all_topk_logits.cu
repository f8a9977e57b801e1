// Every kernel of topk_logits that the extension instantiates: for ptxas to report registers and spills of.
#include "cuda/topk_logits/draw_logits.cuh"
#include "cuda/topk_logits/topk_logits.cuh"

using namespace distillm;

#define TOPK(T, slots)                                                                              \
  template __global__ void distillm::topk_logits_kernel<T, slots>(const TopkLogitsArguments);      \
  template __global__ void distillm::draw_logits_kernel<T, slots>(const TopkLogitsArguments);
TOPK(float, 1) TOPK(float, 2) TOPK(float, 4)
TOPK(BFloat16, 1) TOPK(BFloat16, 2) TOPK(BFloat16, 4)
TOPK(Half, 1) TOPK(Half, 2) TOPK(Half, 4)
