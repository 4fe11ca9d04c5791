// All kernels for AVX-512.
#include "isa_kernels.h"

namespace peftkern {
constexpr CpuKernels kAvx512Kernels = kIsaKernels;
}  // namespace peftkern
