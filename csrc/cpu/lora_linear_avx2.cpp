// The skinny LoRA product for AVX2.
#include "lora_shrink.h"

namespace peftkern {
void (*const kLoraShrinkAvx2)(const LoraShrinkArgs&) = shrink;
}  // namespace peftkern
