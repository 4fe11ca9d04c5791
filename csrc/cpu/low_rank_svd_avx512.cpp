// The kernels of the low-rank SVD for AVX-512.
#include "low_rank_core.h"

namespace peftkern {
const LowRankKernels kLowRankAvx512 = kKernels;
}  // namespace peftkern
