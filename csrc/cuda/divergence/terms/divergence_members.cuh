// The members of the family: functors of math/divergence.h, and two that look at more than one entry.
#pragma once

#include "adaptive_terms.cuh"
#include "blended_terms.cuh"
#include "divergence_terms.cuh"

namespace distillm {

template <class Real>
struct Interpolated {};
template <class Real>
struct AdaptiveKl {};

template <class Member>
struct TermsOfMember {
  using Type = FunctorTerms<Member>;
};
template <>
struct TermsOfMember<Interpolated<float>> {
  using Type = BlendedTerms;
};
template <>
struct TermsOfMember<AdaptiveKl<float>> {
  using Type = AdaptiveTerms;
};

template <class Member>
using TermsOf = typename TermsOfMember<Member>::Type;

}  // namespace distillm
