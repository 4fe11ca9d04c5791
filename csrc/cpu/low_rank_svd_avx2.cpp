// The kernels of the low-rank SVD for AVX2.
#include "low_rank_core.h"

namespace peftkern {
const LowRankKernels kLowRankAvx2 = kKernels;
}  // namespace peftkern
