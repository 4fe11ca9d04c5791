// AdaLoRA's passes for AVX-512.
#include "adalora_kernels.h"

namespace peftkern {
const AdaLoraKernels kAdaLoraAvx512 = {importance, gram, gram_backward};
}  // namespace peftkern
