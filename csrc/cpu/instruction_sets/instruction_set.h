// Which instruction set the CPU kernels use.
#pragma once

#include <vector>

namespace distillm {

struct RowKernels;

struct InstructionSet {
  const char* name;
  const RowKernels* kernels;
};

// Those that this processor has, the best one last.
std::vector<InstructionSet> supported_instruction_sets();

// The best of them, or a lesser one named by DISTILLM_CPU_ISA (generic, x86-64-v2, x86-64-v3, x86-64-v4). Decided once
// per process.
const InstructionSet& instruction_set();

}  // namespace distillm
