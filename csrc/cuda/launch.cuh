// Launching a kernel, on a device or in the emulation of csrc/tests/cuda_emulation.h.
//
//   launch(kernel, grid, block, dynamic_shared_bytes, stream, arguments...) -> cudaError_t
//   launch_dependent(...): the same for a kernel that calls wait_for_preceding(). Where the GPU can
//     (sm_90), it begins as soon as the kernel before it on the stream allows (allow_following).
//
// Arguments convert to the kernel's parameters. The error is the launch's own: a kernel that fails
// later reports at the next synchronisation. More than 48 KiB of shared memory is asked for as it
// must be. Neither allocates nor synchronises, so streams may be captured into graphs. The caller
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

template <bool kDependent, typename... Parameters, typename... Arguments>
cudaError_t launch_as(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                      size_t dynamic_shared_bytes, cudaStream_t stream, Arguments&&... arguments) {
#ifdef PEFTKERN_CUDA_EMULATED
  (void)stream;
  const std::tuple<std::decay_t<Parameters>...> values(static_cast<Parameters>(arguments)...);
  return emulation::run(grid, block, dynamic_shared_bytes, [&] { std::apply(kernel, values); });
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
  if constexpr (kDependent) {
    // Not by the device's capability: code that is made from older PTX does not wait.
    cudaFuncAttributes code = {};
    const cudaError_t error = cudaFuncGetAttributes(&code, function);
    if (error != cudaSuccess) return error;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = code.ptxVersion >= 90 ? 1 : 0;
  }
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
#endif
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                   size_t dynamic_shared_bytes, cudaStream_t stream, Arguments&&... arguments) {
  return launch_as<false>(kernel, grid, block, dynamic_shared_bytes, stream, arguments...);
}
template <typename... Parameters, typename... Arguments>
cudaError_t launch_dependent(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                             size_t dynamic_shared_bytes, cudaStream_t stream,
                             Arguments&&... arguments) {
  return launch_as<true>(kernel, grid, block, dynamic_shared_bytes, stream, arguments...);
}

}  // namespace
}  // namespace peftkern
