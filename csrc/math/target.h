// Where a function of csrc/math may run, and in which namespace it lives.
//
// The CPU kernels are compiled once per instruction set. An inline function shared by two of those objects would be
// merged by the linker into whichever copy it met first, AVX-512 code in the generic path included. DISTILLM_ISA names
// an inline namespace, so that every build has its own symbols.
#pragma once

#ifndef DISTILLM_ISA
#define DISTILLM_ISA generic
#endif

#ifdef __CUDACC__
#define DISTILLM_HD __host__ __device__ __forceinline__
#else
#define DISTILLM_HD inline __attribute__((always_inline))
#endif
