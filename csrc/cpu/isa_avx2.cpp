// All kernels for AVX2.
#include "isa_kernels.h"

namespace peftkern {
constexpr CpuKernels kAvx2Kernels = kIsaKernels;
}  // namespace peftkern
