#include "instruction_set.h"

#include <cstdlib>
#include <cstring>

namespace distillm {
namespace {

constexpr const char* kNames[] = {"generic", "x86-64-v2", "x86-64-v3", "x86-64-v4"};

InstructionSet best_supported() {
#ifdef __x86_64__
  __builtin_cpu_init();
  const bool v2 = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
  const bool v3 = v2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (v4) return InstructionSet::kX86_64_v4;
  if (v3) return InstructionSet::kX86_64_v3;
  if (v2) return InstructionSet::kX86_64_v2;
#endif
  return InstructionSet::kGeneric;
}

// A name that is unknown, or asks for more than the processor has, changes nothing.
InstructionSet chosen() {
  const InstructionSet best = best_supported();
  const char* wanted = std::getenv("DISTILLM_CPU_ISA");
  for (int i = 0; wanted && i <= static_cast<int>(best); ++i) {
    if (!std::strcmp(wanted, kNames[i])) return static_cast<InstructionSet>(i);
  }
  return best;
}

}  // namespace

InstructionSet instruction_set() {
  static const InstructionSet set = chosen();
  return set;
}

const char* instruction_set_name(InstructionSet set) { return kNames[static_cast<int>(set)]; }

}  // namespace distillm
