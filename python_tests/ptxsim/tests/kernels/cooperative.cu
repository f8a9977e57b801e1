// Blocks of one launch that wait for each other through global memory.
#ifdef MISSING_ACQUIRE
#define LOOK "relaxed"
#else
#define LOOK "acquire"
#endif

__device__ void wait_for(unsigned* counter, unsigned goal) {
#if defined(MISSING_WAIT)
#elif defined(ATOMIC_SPIN)
  while (static_cast<int>(atomicAdd(counter, 0) - goal) < 0) __nanosleep(20);
  __threadfence();
#elif defined(VOLATILE_SPIN)
  while (static_cast<int>(*const_cast<volatile unsigned*>(counter) - goal) < 0) {
  }
  __threadfence();
#else
  unsigned now;
  do {
    asm volatile("ld." LOOK ".gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
  } while (static_cast<int>(now - goal) < 0);
#endif
}

// A barrier of all blocks of the grid.
__device__ void grid_barrier(unsigned* counter) {
  __syncthreads();
  if (threadIdx.x == 0) {
#ifndef MISSING_RELEASE
    __threadfence();
#endif
    const unsigned old = atomicAdd(counter, 1u);
    wait_for(counter, (old / gridDim.x + 1) * gridDim.x);
  }
  __syncthreads();
}

// In each round every block writes a number and adds up those of all blocks: out[round][block]. `boxes` takes turns.
extern "C" __global__ void grid_sums(const int* in, int* boxes, unsigned* counter, int* out, int rounds, int buffers) {
  __shared__ int of_warp[2];
  for (int round = 0; round < rounds; ++round) {
    int* const box = boxes + round % buffers * gridDim.x;
    of_warp[threadIdx.x / 32] = 1;
    __syncthreads();
    if (threadIdx.x == 0) box[blockIdx.x] = in[round * gridDim.x + blockIdx.x] * (of_warp[0] + of_warp[1]);
    grid_barrier(counter);
    int sum = 0;
    for (int b = 0; b < gridDim.x; ++b) sum += box[b];
    __syncthreads();
    if (threadIdx.x == 40) out[round * gridDim.x + blockIdx.x] = sum;
  }
}

// The last block never comes.
extern "C" __global__ void one_block_leaves(unsigned* counter) {
  if (blockIdx.x + 1 == gridDim.x) return;
  grid_barrier(counter);
}

// Which of the threads comes first depends on the schedule.
extern "C" __global__ void order_of_blocks(unsigned* counter, unsigned* out) {
  for (int round = 0; round < 4; ++round) {
    if (threadIdx.x == 0) out[4 * blockIdx.x + round] = atomicAdd(counter, 1u);
    grid_barrier(counter + 1);
  }
}
