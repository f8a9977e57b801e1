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

template <class Member, template <class Student> class TeacherOf>
DivergenceKernel kernel_of_student(const DivergenceCall& call) {
  switch (element_type(call.student_type)) {
    case ElementType::kBFloat16: return instantiated<Member, BFloat16, TeacherOf<BFloat16>>();
    case ElementType::kHalf: return instantiated<Member, Half, TeacherOf<Half>>();
    default: return instantiated<Member, float, TeacherOf<float>>();
  }
}

// TeacherOf<Student>: the type of the teacher's logits beside a student's.
template <template <class Student> class TeacherOf>
DivergenceKernel kernel_of_member(const DivergenceCall& call) {
  const std::string& name = call.options.divergence;
#define DISTILLM_MATCH(public_name, Positive, AtZero, Functor) \
  if (name == public_name) return kernel_of_student<Functor<float>, TeacherOf>(call);
  DISTILLM_FOR_EACH_DIVERGENCE(DISTILLM_MATCH)
#undef DISTILLM_MATCH
  if (name == "interpolated") return kernel_of_student<Interpolated<float>, TeacherOf>(call);
  if (name == "adaptive_kl") return kernel_of_student<AdaptiveKl<float>, TeacherOf>(call);
  return {};
}

}  // namespace distillm
