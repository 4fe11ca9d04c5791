// RoSA's sparse products for AVX2.
#include "rosa_kernels.h"

namespace peftkern {
const RosaKernels kRosaAvx2 = {spmm, sddmm};
}  // namespace peftkern
