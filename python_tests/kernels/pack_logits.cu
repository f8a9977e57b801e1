// The kernels of packed records, for ptxsim.
#include "cuda/pack_logits/pack_logits.cuh"
#include "cuda/pack_logits/unpack_logits.cuh"
