// NF4 quantise and dequantise for AVX2.
#include "nf4_blocks.h"

namespace peftkern {
const NF4Kernels kNF4Avx2 = {quantize_blocks, dequantize_blocks};
}  // namespace peftkern
