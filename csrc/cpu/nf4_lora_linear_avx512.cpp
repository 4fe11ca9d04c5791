// NF4 matrix products for AVX-512: float32 arithmetic.
#include "nf4_gemm.h"

namespace peftkern {
const NF4LinearKernels kNF4LinearAvx512 = {forward_with<Float32Math>, backward_with<Float32Math>};
}  // namespace peftkern
