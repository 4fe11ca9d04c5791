// The skinny LoRA products for AVX-512.
#include "lora_products.h"

namespace peftkern {
const LoraKernels kLoraAvx512 = {shrink, expand, outer};
}  // namespace peftkern
