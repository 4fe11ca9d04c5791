// The emulation itself: instructions against plain loops, and that it stops on what it must find.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "cuda_test.h"
#include "intrinsics_sm90a.cuh"
#include "launch.cuh"
#include "native_data.h"

namespace {

// True if `action` aborts with `message` on stderr; it runs in a child process.
bool aborts_with(const std::string& message, const std::function<void()>& action) {
  int ends[2];
  if (pipe(ends) != 0) return false;
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], 2);
    close(ends[0]);
    action();
    _exit(0);
  }
  close(ends[1]);
  std::string text;
  char buffer[4096];
  for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0;) {
    text.append(buffer, static_cast<size_t>(n));
  }
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  const bool ended_well = WIFEXITED(status) && WEXITSTATUS(status) == 0;
  if (!ended_well && text.find(message) != std::string::npos) return true;
  std::fprintf(stderr, "expected an abort with '%s', got: %s\n", message.c_str(), text.c_str());
  return false;
}

void expect_abort(const std::string& message, const std::function<void()>& action) {
  if (!aborts_with(message, action)) fail("the emulation let it pass: " + message);
}

// ---- tensor cores

template <typename T>
__global__ void mma_kernel(const uint16_t* A, const uint16_t* B, float* D) {
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
  uint32_t a[4], b[2];
  float d[4];
  for (int i = 0; i < 4; ++i) {
    std::memcpy(&a[i], A + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8, 4);
  }
  for (int i = 0; i < 2; ++i) {
    const int k = 2 * t + 8 * i;
    b[i] = B[k * 8 + g] | static_cast<uint32_t>(B[(k + 1) * 8 + g]) << 16;
  }
  for (int i = 0; i < 4; ++i) d[i] = D[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  mma_m16n8k16<T>(d, a, b);
  for (int i = 0; i < 4; ++i) D[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

template <typename T>
void check_mma() {
  Buffer<uint16_t> A(256), B(128);
  Buffer<float> D(128), before(128);
  for (int i = 0; i < 256; ++i) A[i] = from_float<T>(uniform()).bits;
  for (int i = 0; i < 128; ++i) B[i] = from_float<T>(uniform()).bits;
  for (int i = 0; i < 128; ++i) D[i] = before[i] = uniform();
  if (launch(mma_kernel<T>, 1, 32, 0, nullptr, A.data(), B.data(), D.data())) {
    fail("mma: not launched");
  }
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      double sum = before[row * 8 + column];
      for (int k = 0; k < 16; ++k) {
        sum += double{to_float(T{A[row * 16 + k]})} * double{to_float(T{B[k * 8 + column]})};
      }
      const double error = std::fabs(D[row * 8 + column] - sum);
      if (!(error <= 0x1p-23 * std::fabs(sum))) fail("mma: wrong element");
    }
  }
}

// Products of a warpgroup: D = D + A B^T, [64, 64] by 2 k16 steps; each fault leaves out one step.
enum ProductFault { kRight, kNoProductWait, kNoProductFence, kNoSharedFence, kEarlyWrite };
template <typename T>
__global__ void product_kernel(const uint16_t* A, const uint16_t* B, float* D, float* early,
                               ProductFault fault, uint64_t damage) {
  unsigned char* tile = dynamic_shared<unsigned char>();
  const int thread = static_cast<int>(threadIdx.x), lane = lane_index(), g = lane / 4, t = lane % 4;
  for (int i = thread; i < 64 * 8; i += 128) {  // 64 rows of 128 bytes
    copy_async16(tile + swizzled(i / 8, i % 8), B + 8 * i);
  }
  copy_async_commit();
  copy_async_wait<0>();
  if (fault != kNoSharedFence) fence_shared();
  __syncthreads();
  uint32_t a[2][4];
  float d[32];
  const int row = 16 * warp_index() + g;
  for (int j = 0; j < 2; ++j) {
    for (int i = 0; i < 4; ++i) {
      std::memcpy(&a[j][i], A + (row + 8 * (i % 2)) * 32 + 16 * j + 2 * t + 8 * (i / 2), 4);
    }
  }
  const auto place = [&](int i) { return (row + i / 2 % 2 * 8) * 64 + i / 4 * 8 + 2 * t + i % 2; };
  for (int i = 0; i < 32; ++i) d[i] = D[place(i)];
  if (fault != kNoProductFence) products_fence();
  for (int j = 0; j < 2; ++j) {
    product_m64k16<T, 64>(d, a[j], (shared_tile(tile) + 2 * (j + 1)) ^ damage);
  }
  products_commit();
  early[thread] = d[0];
  if (fault == kEarlyWrite) a[1][0] = 0x7fff7fff;
  if (fault != kNoProductWait) products_wait<0>();
  for (int i = 0; i < 32; ++i) D[place(i)] = d[i];
}

template <typename T>
int wrong_products(ProductFault fault, uint64_t damage = 0) {
  Buffer<uint16_t> A(64 * 32), B(64 * 64);
  Buffer<float> D(64 * 64), before(64 * 64), early(128);
  for (int i = 0; i < A.size(); ++i) A[i] = from_float<T>(uniform()).bits;
  for (int i = 0; i < B.size(); ++i) B[i] = from_float<T>(uniform()).bits;
  for (int i = 0; i < D.size(); ++i) D[i] = before[i] = uniform();
  if (launch(product_kernel<T>, 1, 128, 64 * 128, nullptr, A.data(), B.data(), D.data(),
             early.data(), fault, damage)) {
    fail("wgmma: not launched");
  }
  int wrong = 0;
  for (int i = 0; i < 128; ++i) wrong += !std::isnan(early[i]);
  for (int i = 0; i < 64 * 64; ++i) {
    double sum = before[i], size = std::fabs(sum);
    for (int k = 0; k < 32; ++k) {  // of columns 16 to 47
      const double x = to_float(T{A[i / 64 * 32 + k]}), y = to_float(T{B[i % 64 * 64 + 16 + k]});
      sum += x * y, size += std::fabs(x * y);
    }
    wrong += !(std::fabs(D[i] - sum) <= 0x1p-22 * size);
  }
  return wrong;
}

void check_products() {
  for (uint32_t schedule = 0; schedule < emulation::kSchedules; ++schedule) {
    emulation::set_schedule(schedule);
    if (wrong_products<BF16>(kRight) || wrong_products<FP16>(kRight)) {
      fail("wgmma: wrong element, or one that was there before the wait");
    }
  }
  emulation::set_schedule(0);
  if (!wrong_products<BF16>(kEarlyWrite)) fail("wgmma: A was read too early");
  expect_abort("waiting for its products", [] { wrong_products<BF16>(kNoProductWait); });
  expect_abort("without wgmma.fence", [] { wrong_products<BF16>(kNoProductFence); });
  expect_abort("without fence.proxy.async", [] { wrong_products<BF16>(kNoSharedFence); });
  const std::string place = "no k16 step of a tile begins here";
  expect_abort(place, [] { wrong_products<BF16>(kRight, 1); });  // 16 bytes on
  for (int bit = 3; bit < 6; ++bit) {                            // 128, 256 and 512 bytes on
    expect_abort(place, [bit] { wrong_products<BF16>(kRight, uint64_t{1} << bit); });
  }
  for (int bit = 49; bit < 52; ++bit) {
    expect_abort("no base offset", [bit] { wrong_products<BF16>(kRight, uint64_t{1} << bit); });
  }
  expect_abort("128-byte rows", [] { wrong_products<BF16>(kRight, uint64_t{1} << 63); });
}

// ---- chains of kernels

// Each adds one to what the kernel before has left, in another order and by way of shared memory.
enum WaitFault { kWaits, kNeverWaits, kReadsBefore, kOneWaits };
__global__ void step_kernel(float* values, int from, WaitFault fault) {
  float* kept = dynamic_shared<float>();
  const int i = static_cast<int>(threadIdx.x), n = static_cast<int>(blockDim.x);
  allow_following();
  kept[i] = 1.0f;
  __syncthreads();
  float* in = values + from * n * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x) * n;
  float* out = in + n * static_cast<int>(gridDim.x);
  const float before = in[n - 1 - i];
  if (fault != kNeverWaits && (fault != kOneWaits || i == 0)) wait_for_preceding();
  out[i] = kept[n - 1 - i] + (fault == kReadsBefore ? before : in[n - 1 - i]);
}

// `steps` kernels, of which the second has the fault.
int wrong_steps(int steps, WaitFault fault, uint32_t schedule) {
  const int n = 64, blocks = 3, size = n * blocks;
  Buffer<float> values((steps + 1) * size);
  for (int i = 0; i < size; ++i) values[i] = 0.0f;
  emulation::set_schedule(schedule);
  int wrong = 0;
  {
    Chain chain(nullptr);
    for (int step = 0; step < steps; ++step) {
      const WaitFault own = step == 1 ? fault : kWaits;
      if (chain.launch(step_kernel, blocks, n, n * sizeof(float), values.data(), step, own)) {
        fail("a chain: not launched");
      }
    }
    wrong += !std::isnan(values[size]);  // the first runs when the second waits
  }
  emulation::set_schedule(0);
  for (int i = 0; i < size; ++i) wrong += values[steps * size + i] != static_cast<float>(steps);
  return wrong;
}

void check_chains() {
  int read_before = 0, one_waits = 0;
  for (uint32_t schedule = 0; schedule < emulation::kSchedules; ++schedule) {
    for (int steps = 1; steps <= 4; ++steps) {
      if (wrong_steps(steps, kWaits, schedule)) fail("a chain gives wrong results");
    }
    read_before += wrong_steps(2, kReadsBefore, schedule);
    one_waits += wrong_steps(3, kOneWaits, schedule);
  }
  if (!read_before) fail("a read before the wait changed nothing");
  if (!one_waits) fail("a wait of one thread alone changed nothing");
  expect_abort("has not waited", [] { wrong_steps(2, kNeverWaits, 0); });
  expect_abort("has not waited", [] { wrong_steps(4, kNeverWaits, 0); });

  Buffer<float> values(4 * 64);  // a launch outside the chain comes after what the chain has so far
  for (int i = 0; i < 64; ++i) values[i] = 0.0f;
  Chain chain(nullptr);
  chain.launch(step_kernel, 1, 64, 256, values.data(), 0, kWaits);
  launch(step_kernel, 1, 64, 256, nullptr, values.data(), 1, kNeverWaits);
  if (values[2 * 64] != 2.0f) fail("a launch overtakes a chain");
  chain.launch(step_kernel, 1, 64, 256, values.data(), 2, kWaits);
}

// ---- shuffles, conversions

__global__ void warp_kernel(int* shuffled, float* sums, uint32_t* ballots) {
  const int lane = lane_index();
  shuffled[lane] = __shfl_sync(kFullMask, 100 + lane, lane + 33);
  shuffled[32 + lane] = __shfl_sync(kFullMask, 100 + lane, 1, 8);
  sums[lane] = lanes_sum<8>(static_cast<float>(lane));
  ballots[lane] = __ballot_sync(kFullMask, lane % 3 == 0);
}

void check_warp() {
  Buffer<int> shuffled(64);
  Buffer<float> sums(32);
  Buffer<uint32_t> ballots(32);
  launch(warp_kernel, 1, 32, 0, nullptr, shuffled.data(), sums.data(), ballots.data());
  for (int i = 0; i < 32; ++i) {
    const bool right = shuffled[i] == 100 + (i + 1) % 32 &&
                       shuffled[32 + i] == 100 + i / 8 * 8 + 1 &&
                       sums[i] == 8.0f * (i / 8 * 8) + 28.0f && ballots[i] == 0x49249249u;
    if (!right) fail("a warp's shuffles, sums or ballots");
  }
}

void check_fp16() {  // every value and the ties between neighbors
  for (uint32_t bits = 0; bits < 0x7c00; ++bits) {
    const float value = to_float(FP16{static_cast<uint16_t>(bits)});
    const float next = bits == 0x7bff ? 65536.0f : to_float(FP16{static_cast<uint16_t>(bits + 1)});
    const uint32_t even = bits + bits % 2;
    const float tie = (value + next) / 2;
    const bool right = (pack2<FP16>(value, -value) == (bits | (bits | 0x8000) << 16)) &&
                       pack2<FP16>(tie, std::nextafter(tie, 0.0f)) == (even | bits << 16) &&
                       from_float<FP16>(std::nextafter(tie, 1e9f)).bits == bits + 1;
    if (!right) fail("fp16: wrong rounding");
  }
  for (uint32_t bits = 0; bits < 0x7f80; ++bits) {
    const float value = to_float(BF16{static_cast<uint16_t>(bits)});
    const float tie = __uint_as_float(bits << 16 | 0x8000);
    const bool right = from_float<BF16>(value).bits == bits &&
                       from_float<BF16>(tie).bits == bits + bits % 2 &&
                       from_float<BF16>(-std::nextafter(tie, 0.0f)).bits == (bits | 0x8000);
    if (!right) fail("bf16: wrong rounding");
  }
}

void check_integers() {
  for (int i = 0; i < 1000; ++i) {
    const uint32_t a = rng(), b = rng();
    const uint32_t swapped = permute_bytes(a, b, 0x0526);
    if (swapped !=
        ((a & 255) << 24 | (b >> 8 & 255) << 16 | (a >> 16 & 255) << 8 | (b >> 16 & 255))) {
      fail("permute_bytes");
    }
  }
  if (permute_bytes(0x80, 0x7f, 0x4c80) != 0x7f00ff80) fail("permute_bytes: signs");
}

// ---- what must be found

// Doubles the y of `in` through shared memory with a two-stage pipeline; each fault leaves out one
// step.
enum Fault { kNone, kNoWait, kNoBarrier, kOverrun };
__global__ void pipeline_kernel(const float4* in, float* out, int tiles, Fault fault) {
  float4* stage = dynamic_shared<float4>();
  const int i = static_cast<int>(threadIdx.x), n = static_cast<int>(blockDim.x);
  const auto fetch = [&](int tile) {
    if (tile < tiles) copy_async16(stage + tile % 2 * n + i, in + tile * n + i);
    copy_async_commit();
  };
  fetch(0);
  for (int tile = 0; tile < tiles; ++tile) {
    fetch(tile + 1);
    if (fault == kNoWait && tile == 0) {
    } else {
      copy_async_wait<1>();
    }
    if (fault != kNoBarrier) __syncthreads();
    const int other = n - 1 - i;
    out[tile * n + i] = 2 * stage[tile % 2 * n + other + (fault == kOverrun ? n : 0)].y;
    __syncthreads();
  }
}

int wrong_results(Fault fault, uint32_t schedule) {
  const int n = 64, tiles = 5;
  Buffer<float4> in(n * tiles);
  Buffer<float> out(n * tiles);
  for (int i = 0; i < n * tiles; ++i) in[i].y = uniform();
  emulation::set_schedule(schedule);
  launch(pipeline_kernel, 1, n, 2 * n * sizeof(float4), nullptr, in.data(), out.data(), tiles,
         fault);
  emulation::set_schedule(0);
  int wrong = 0;
  for (int i = 0; i < n * tiles; ++i) wrong += out[i] != 2 * in[i / n * n + n - 1 - i % n].y;
  return wrong;
}

void check_pipeline() {
  int without_wait = 0, without_barrier = 0;
  for (uint32_t schedule = 0; schedule < emulation::kSchedules; ++schedule) {
    if (wrong_results(kNone, schedule)) fail("a correct pipeline gives wrong results");
    without_wait += wrong_results(kNoWait, schedule);
    without_barrier += wrong_results(kNoBarrier, schedule);
  }
  if (!without_wait) fail("a missing wait changed nothing");
  if (!without_barrier) fail("a missing barrier changed nothing");
#ifdef __SANITIZE_ADDRESS__
  expect_abort("heap-buffer-overflow", [] { wrong_results(kOverrun, 0); });
#endif
}

__global__ void half_barrier_kernel() {
  if (threadIdx.x < 32) __syncthreads();
}
__global__ void two_barriers_kernel() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void half_warp_kernel() {
  if (threadIdx.x < 16) __shfl_sync(kFullMask, 1, 0);
}
__global__ void two_instructions_kernel() {
  if (threadIdx.x < 16) {
    __shfl_sync(kFullMask, 1, 0);
  } else {
    __syncwarp();
  }
}
__global__ void lost_copy_kernel(const float4* in) {
  copy_async16(dynamic_shared<float4>() + threadIdx.x, in);
  copy_async_commit();
}
__global__ void shared_objects_kernel(float* out) {
  PEFTKERN_SHARED(values, float[64]);
  PEFTKERN_SHARED(total, float);
  const unsigned i = threadIdx.x;
  out[i] = values[i];  // not written yet
  values[i] = static_cast<float>(i);
  __syncthreads();
  if (i == 0) {
    total = 0.0f;
    for (float value : values) total += value;
  }
  __syncthreads();
  out[64 + i] = total;
  static_assert(sizeof(values) == 256, "the object has its type");
}

void check_findings() {
  expect_abort("has returned", [] { launch(half_barrier_kernel, 1, 64, 0, nullptr); });
  expect_abort("different lines", [] { launch(two_barriers_kernel, 1, 64, 0, nullptr); });
  expect_abort("waits at __shfl_sync", [] { launch(half_warp_kernel, 1, 32, 0, nullptr); });
  expect_abort("different instructions",
               [] { launch(two_instructions_kernel, 1, 32, 0, nullptr); });
  expect_abort("asynchronous copies", [] {
    launch(lost_copy_kernel, 1, 32, 512, nullptr, static_cast<float4*>(nullptr));
  });

  for (uint32_t schedule = 0; schedule < emulation::kSchedules; ++schedule) {
    emulation::set_schedule(schedule);
    Buffer<float> out(128);
    launch(shared_objects_kernel, 2, 64, 0, nullptr, out.data());
    for (int i = 0; i < 64; ++i) {
      if (!std::isnan(out[i]) || out[64 + i] != 2016.0f) fail("static shared memory");
    }
  }
  emulation::set_schedule(0);
  const cudaError_t errors[] = {launch(half_barrier_kernel, 0, 32, 0, nullptr),
                                launch(half_barrier_kernel, 1, 2048, 0, nullptr),
                                launch(half_barrier_kernel, dim3(1, 65536), 32, 0, nullptr),
                                launch(half_barrier_kernel, 1, 32, 300000, nullptr)};
  for (const cudaError_t error : errors) {
    if (error == cudaSuccess) fail("an impossible launch was accepted");
  }
}

}  // namespace

void check_cuda_emulation() {
  check_mma<BF16>();
  check_mma<FP16>();
  check_products();
  check_chains();
  check_warp();
  check_fp16();
  check_integers();
  check_pipeline();
  check_findings();
}
