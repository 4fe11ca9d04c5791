// The skinny LoRA products for AVX2.
#include "lora_products.h"

namespace peftkern {
const LoraKernels kLoraAvx2 = {shrink, expand, outer};
}  // namespace peftkern
