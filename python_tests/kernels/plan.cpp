// The launch plans for Python: the tests launch the kernels as the extension does.
#include "cuda/divergence/divergence_plan.h"
#include "cuda/sample_tokens/sample_plan.h"

using namespace distillm;

// shape, device, plan: the fields of DivergenceShape, DeviceLimits and DivergencePlan in order.
extern "C" void plan(const int64_t* shape, const int64_t* device, int64_t* out) {
  const DivergencePlan p = plan_divergence({shape[0], shape[1], shape[2], shape[3] != 0, shape[4]},
                                           {device[0], device[1], device[2], device[3]});
  out[0] = p.cluster, out[1] = p.threads, out[2] = p.staged_turns, out[3] = p.kept_turns;
}

// in: the arguments of plan_sample; plan: the fields of SamplePlan.
extern "C" void plan_sample_tokens(const int64_t* in, int64_t* out) {
  const SamplePlan p = plan_sample(in[0], in[1], in[2], in[3]);
  out[0] = p.cluster, out[1] = p.threads, out[2] = p.staged_chunks;
}
