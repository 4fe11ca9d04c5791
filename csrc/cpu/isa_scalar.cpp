// All kernels for the baseline of the processor.
#include "isa_kernels.h"

namespace peftkern {
constexpr CpuKernels kScalarKernels = kIsaKernels;
}  // namespace peftkern
