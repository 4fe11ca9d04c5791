// DoRA's row norms for AVX-512.
#include "dora_kernels.h"

namespace peftkern {
const DoraKernels kDoraAvx512 = {norm};
}  // namespace peftkern
