// AdaLoRA's passes for AVX2.
#include "adalora_kernels.h"

namespace peftkern {
const AdaLoraKernels kAdaLoraAvx2 = {importance, gram, gram_backward};
}  // namespace peftkern
