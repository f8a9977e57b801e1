// The instantiations of the kernel of `divergence`, in two translation units that compile side by side.
#pragma once

#include "divergence.cuh"
#include "launch.h"

namespace distillm {

struct DivergenceKernel {
  void (*function)(DivergenceArguments) = nullptr;  // null: no such divergence
  int slot_bytes = 0, kept_bytes = 0, chunk_entries = 0;
  int64_t static_bytes = 0;
};

DivergenceKernel divergence_kernel_of_one_type(const DivergenceCall& call);
DivergenceKernel divergence_kernel_of_two_types(const DivergenceCall& call);

template <class Member, class Student, class Teacher>
DivergenceKernel instantiated() {
  using Rows = RowPair<Student, Teacher>;
  return {divergence_kernel<Member, Student, Teacher>, Rows::kSlotBytes, Rows::kKeptBytes, Rows::N,
          static_cast<int64_t>(sizeof(MemberScratch<Member>))};
}

// Choose: Choose::kernel<Member>(call) is the kernel of a member for the dtypes of the call.
template <class Choose>
DivergenceKernel kernel_of_member(const DivergenceCall& call) {
  const std::string& name = call.options.divergence;
#define DISTILLM_MATCH(public_name, Positive, AtZero, Functor) \
  if (name == public_name) return Choose::template kernel<Functor<float>>(call);
  DISTILLM_FOR_EACH_DIVERGENCE(DISTILLM_MATCH)
#undef DISTILLM_MATCH
  if (name == "interpolated") return Choose::template kernel<Interpolated<float>>(call);
  if (name == "adaptive_kl") return Choose::template kernel<AdaptiveKl<float>>(call);
  return {};
}

}  // namespace distillm
