#include "instruction_set.h"

#include <cstdlib>
#include <cstring>

#include "row_kernels.h"

namespace distillm {

std::vector<InstructionSet> supported_instruction_sets() {
  std::vector<InstructionSet> sets = {{"generic", &row_kernels_generic}};
#ifdef __x86_64__
  __builtin_cpu_init();
  const bool v2 = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
  const bool v3 = v2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (v2) sets.push_back({"x86-64-v2", &row_kernels_x86_64_v2});
  if (v3) sets.push_back({"x86-64-v3", &row_kernels_x86_64_v3});
  if (v4) sets.push_back({"x86-64-v4", &row_kernels_x86_64_v4});
#endif
  return sets;
}

namespace {

// A name that is unknown, or asks for more than the processor has, changes nothing.
InstructionSet chosen() {
  const std::vector<InstructionSet> sets = supported_instruction_sets();
  const char* wanted = std::getenv("DISTILLM_CPU_ISA");
  for (const InstructionSet& set : sets) {
    if (wanted && !std::strcmp(wanted, set.name)) return set;
  }
  return sets.back();
}

}  // namespace

const InstructionSet& instruction_set() {
  static const InstructionSet set = chosen();
  return set;
}

const RowKernels& row_kernels() { return *instruction_set().kernels; }

}  // namespace distillm
