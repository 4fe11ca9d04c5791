// DoRA's row norms for AVX2.
#include "dora_kernels.h"

namespace peftkern {
const DoraKernels kDoraAvx2 = {norm};
}  // namespace peftkern
