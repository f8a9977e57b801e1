// Which instruction set the CPU kernels use, decided once per process.
#pragma once

#include <cstdint>

namespace distillm {

enum class InstructionSet { kGeneric, kX86_64_v2, kX86_64_v3, kX86_64_v4 };

// The best set of this processor, or a lesser one named by DISTILLM_CPU_ISA (generic, x86-64-v2, x86-64-v3, x86-64-v4).
InstructionSet instruction_set();
const char* instruction_set_name(InstructionSet set);

// The builds of one kernel, `name`_generic and so on, in order -> the one for this processor.
template <class Kernel>
Kernel for_instruction_set(Kernel generic, Kernel v2, Kernel v3, Kernel v4) {
  const Kernel builds[] = {generic, v2, v3, v4};
  return builds[static_cast<int>(instruction_set())];
}
#ifdef __x86_64__
#define DISTILLM_FOR_THIS_PROCESSOR(name) \
  for_instruction_set(name##_generic, name##_x86_64_v2, name##_x86_64_v3, name##_x86_64_v4)
#else
#define DISTILLM_FOR_THIS_PROCESSOR(name) name##_generic
#endif

// Several rows per task where rows are short, one where they are long.
inline int64_t rows_per_task(int64_t entries) { return entries < 16384 ? 16384 / (entries > 0 ? entries : 1) : 1; }

}  // namespace distillm
