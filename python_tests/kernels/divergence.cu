// One instantiation of the divergence kernel for ptxsim, chosen by -DFUNCTOR= -DTYPE=.
#include "cuda/divergence/divergence.cuh"

using namespace distillm;

template __global__ void distillm::divergence_kernel<FUNCTOR<float>, TYPE>(const DivergenceArguments);
