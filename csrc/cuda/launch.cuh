// Launching a kernel, on a device or in the emulation of csrc/tests/cuda_emulation.h.
//
//   launch(kernel, grid, block, dynamic_shared_bytes, stream, arguments...) -> cudaError_t
//   Chain chain(stream);
//   chain.launch(kernel, grid, block, dynamic_shared_bytes, arguments...) -> cudaError_t
//
// The first kernel of a chain is launched as any other. Each further one begins, where the GPU can
// (sm_90), as soon as the one before allows it (allow_following), and calls wait_for_preceding()
// before it touches what those before it write, or writes what they read.
//
// Arguments convert to the kernel's parameters. The error is the launch's own: a kernel that fails
// later reports at the next synchronization. More than 48 KiB of shared memory is asked for as it
// must be. Neither allocates nor synchronizes, so streams may be captured into graphs. The caller
// has made the stream's device current.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef PEFTKERN_CUDA_EMULATED
#include <tuple>
#include <type_traits>
#else
#include <cuda_runtime.h>
#endif

namespace peftkern {
namespace {

// Blocks for `work` items at `per_block` each, at least one and no more than a grid's x may have:
// kernels loop over what is left, so any int64 size is covered.
inline unsigned grid_size(int64_t work, int64_t per_block) {
  const int64_t blocks = work / per_block + (work % per_block != 0);
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks > 0x7fffffff ? 0x7fffffff : blocks);
}

// Shared memory that a block may have at most on the current device; what every device has where
// there is none, whose launch then says so.
inline int64_t most_shared_bytes() {
#ifdef PEFTKERN_CUDA_EMULATED
  return emulation::kMaxSharedBytes;
#else
  int device = 0, bytes = 0;
  const auto attribute = cudaDevAttrMaxSharedMemoryPerBlockOptin;
  if (cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&bytes, attribute, device) == cudaSuccess) {
    return bytes;
  }
  cudaGetLastError();
  return 48 * 1024;
#endif
}

// Multiprocessors of the current device.
inline int multiprocessors() {
#ifdef PEFTKERN_CUDA_EMULATED
  return 2;
#else
  int device = 0, count = 1;
  if (cudaGetDevice(&device) == cudaSuccess) {
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  }
  return count < 1 ? 1 : count;
#endif
}

enum class Link { kAlone, kFirst, kDependent };  // of a kernel: in no chain, or where in one

template <typename... Parameters, typename... Arguments>
cudaError_t launch_at(Link link, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                      size_t dynamic_shared_bytes, cudaStream_t stream, Arguments&&... arguments) {
#ifdef PEFTKERN_CUDA_EMULATED
  (void)stream;
  const std::tuple<std::decay_t<Parameters>...> values(static_cast<Parameters>(arguments)...);
  const auto body = [kernel, values] { std::apply(kernel, values); };
  if (link == Link::kAlone) return emulation::run(grid, block, dynamic_shared_bytes, body);
  return emulation::run_later(grid, block, dynamic_shared_bytes, body, link == Link::kDependent);
#else
  const void* function = reinterpret_cast<const void*>(kernel);
  if (dynamic_shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(dynamic_shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = dynamic_shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  if (link != Link::kAlone) {
    cudaFuncAttributes code = {};
    cudaError_t error = cudaFuncGetAttributes(&code, function);
    if (error != cudaSuccess) return error;
    // Not by the device's capability: code that is made from older PTX does not wait.
    const bool overlaps = code.ptxVersion >= 90;
    // An SM divides its memory into L1 and shared memory anew only when it is empty, so kernels
    // that are to be on it together must wish for the same. This wish leaves the least L1, and
    // what the overlap gains against that is not measured.
    if (overlaps && code.preferredShmemCarveout != cudaSharedmemCarveoutMaxShared) {
      error = cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout,
                                   cudaSharedmemCarveoutMaxShared);
      if (error != cudaSuccess) return error;
    }
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = overlaps && link == Link::kDependent ? 1 : 0;
  }
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
#endif
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                   size_t dynamic_shared_bytes, cudaStream_t stream, Arguments&&... arguments) {
  return launch_at(Link::kAlone, kernel, grid, block, dynamic_shared_bytes, stream, arguments...);
}

class Chain {
 public:
  explicit Chain(cudaStream_t stream) : stream_(stream) {}
#ifdef PEFTKERN_CUDA_EMULATED
  ~Chain() { emulation::run_deferred(); }
#endif
  Chain(const Chain&) = delete;
  Chain& operator=(const Chain&) = delete;

  template <typename... Parameters, typename... Arguments>
  cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                     size_t dynamic_shared_bytes, Arguments&&... arguments) {
    const Link link = link_;
    link_ = Link::kDependent;
    return launch_at(link, kernel, grid, block, dynamic_shared_bytes, stream_, arguments...);
  }

 private:
  cudaStream_t stream_;
  Link link_ = Link::kFirst;
};

}  // namespace
}  // namespace peftkern
