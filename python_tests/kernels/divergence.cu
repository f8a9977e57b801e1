// One instantiation of the divergence kernel, and the metrics of its pair of dtypes, for ptxsim, chosen by -DFUNCTOR= -DSTUDENT= -DTEACHER=.
#include "cuda/row_metrics.cuh"

using namespace distillm;

template __global__ void distillm::divergence_kernel<FUNCTOR<float>, STUDENT, TEACHER>(const DivergenceArguments);
template __global__ void distillm::row_metrics_kernel<STUDENT, TEACHER>(const DivergenceArguments);
