// RoSA's sparse products for AVX-512.
#include "rosa_kernels.h"

namespace peftkern {
const RosaKernels kRosaAvx512 = {spmm, sddmm};
}  // namespace peftkern
