// Which instruction set the CPU kernels use, decided once per process.
#pragma once

namespace distillm {

enum class InstructionSet { kGeneric, kX86_64_v2, kX86_64_v3, kX86_64_v4 };

// The best set of this processor, or a lesser one named by DISTILLM_CPU_ISA (generic, x86-64-v2, x86-64-v3, x86-64-v4).
InstructionSet instruction_set();
const char* instruction_set_name(InstructionSet set);

}  // namespace distillm
