// Teams: blocks that work on one row together where the hardware has no clusters of them.
//
// A cooperative launch keeps all of its blocks resident, so that they can wait for each other. `size` of them, a power
// of two, take rows in turn. Each block has a mailbox in global memory, laid out like its static shared memory, and a
// team has a counter of arrivals at its barrier.
//
// There are two mailboxes, used by turns: of the rows with a barrier, every other one. A block may be on its way to the
// first barrier of such a row while another still reads what was exchanged in the row before; it cannot be further,
// since that barrier waits for the other, which by then is done with the row before. Within a row the barriers that
// clusters need for their shared memory order all accesses here too.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace distillm {

// Global memory of all teams of a launch (cluster_launch.h).
struct TeamMemory {
  unsigned char* mailboxes;  // [teams][2][size][bytes of a mailbox]
  uint32_t* arrivals;        // [teams], 0 at first
  int32_t size, teams;       // blocks of a team; 1: no teams, and the pointers are null
};

// Which row a team is at and which mailboxes it uses there, in the static shared memory of each of its blocks.
// Registers are scarce in the kernels, exchanges and new rows rare: what these need is looked up there.
struct TeamTurn {
  int32_t row, second;
};

// The mailboxes in use of this block's team.
struct TeamMailbox {
  const TeamMemory* memory = nullptr;     // a kernel argument
  const unsigned char* shared = nullptr;  // what a mailbox mirrors
  int bytes = 0;                          // of that
  const TeamTurn* turn = nullptr;

  __device__ static int own_block() {
    int block;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));  // volatile: not kept in a register
    return block;
  }

  // Where block number `block` of the team exposes what this block has at p, in shared memory.
  template <class T>
  __device__ T* of_block(T* p, int block) const {
    const int own = own_block(), size = memory->size;
    const int64_t number = 2 * int64_t{own & -size} + (turn->second ? size : 0) + block;
    const int64_t offset = reinterpret_cast<const unsigned char*>(p) - shared;
    return reinterpret_cast<T*>(memory->mailboxes + number * bytes + offset);
  }

  // By one thread of each block, between two barriers of the block.
  __device__ void arrive_and_wait() const {
#if __CUDA_ARCH__ < 900
    const uint32_t size = memory->size;
    uint32_t* const arrivals = memory->arrivals + static_cast<uint32_t>(own_block()) / size;
    uint32_t before, now;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;"
                 : "=r"(before)
                 : "l"(__cvta_generic_to_global(arrivals))
                 : "memory");
    const uint32_t goal = (before & (0 - size)) + size;
    for (;;) {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                   : "=r"(now)
                   : "l"(__cvta_generic_to_global(arrivals))
                   : "memory");
      if (static_cast<int32_t>(now - goal) >= 0) return;  // the counter may wrap around
      __nanosleep(32);
    }
#endif
  }
};

}  // namespace distillm
