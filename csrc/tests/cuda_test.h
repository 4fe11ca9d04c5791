// Shared by the tests of the emulated CUDA kernels: one check_cuda_<stem> per kernel file.
#pragma once

void check_cuda_emulation();        // cuda_emulation_test.cpp
void check_cuda_nf4();              // cuda_nf4_test.cpp
void check_cuda_low_rank_svd();     // cuda_low_rank_svd_test.cpp
void check_cuda_nf4_lora_linear();  // cuda_nf4_lora_linear_test.cpp
