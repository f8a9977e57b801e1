// The kernels of packed records, for ptxsim.
#include "cuda/pack_logits.cuh"
#include "cuda/unpack_logits.cuh"
