// The instantiations of the kernel of `divergence`, one for each member of the family.
#pragma once

#include "divergence.cuh"
#include "divergence_kernels.h"

namespace distillm {

template <class Member, class T>
DivergenceKernel instantiated() {
  using Rows = RowPair<T>;
  return {divergence_kernel<Member, T>, Rows::kSlotBytes, Rows::kKeptBytes, Rows::N,
          static_cast<int64_t>(sizeof(MemberScratch<Member>))};
}

template <class T>
DivergenceKernel divergence_kernel_of(const std::string& divergence) {
#define DISTILLM_MATCH(public_name, Positive, AtZero, Functor) \
  if (divergence == public_name) return instantiated<Functor<float>, T>();
  DISTILLM_FOR_EACH_DIVERGENCE(DISTILLM_MATCH)
#undef DISTILLM_MATCH
  if (divergence == "interpolated") return instantiated<Interpolated<float>, T>();
  if (divergence == "adaptive_kl") return instantiated<AdaptiveKl<float>, T>();
  return {};
}

}  // namespace distillm
