// The skinny LoRA product for AVX-512.
#include "lora_shrink.h"

namespace peftkern {
void (*const kLoraShrinkAvx512)(const LoraShrinkArgs&) = shrink;
}  // namespace peftkern
