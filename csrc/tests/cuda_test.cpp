// Runs every CUDA kernel on the CPU, in the emulation of cuda_emulation.h, on awkward shapes.
//
//   make sanitize    builds it with AddressSanitizer and UBSan, and runs it
//
// Buffers are exactly as long as the format says, so one element too many is an error report. What
// runs are the sources that nvcc compiles; results are compared with the CPU kernels' or with plain
// loops, under several orders of threads and blocks.
#include "cuda_test.h"

#include <cstdio>

int main() {
  check_cuda_emulation();
  std::printf("emulated CUDA test: the emulation passed\n");
  check_cuda_nf4();
  std::printf("emulated CUDA test: nf4 passed\n");
  check_cuda_low_rank_svd();
  std::printf("emulated CUDA test: low_rank_svd passed\n");
  check_cuda_nf4_lora_linear();
  std::printf("emulated CUDA test: nf4_lora_linear passed\n");
  return 0;
}
