// NF4 matrix products for AVX2: float32 arithmetic.
#include "nf4_gemm.h"

namespace peftkern {
const NF4LinearKernels kNF4LinearAvx2 = {forward_with<Float32Math>, backward_with<Float32Math>};
}  // namespace peftkern
