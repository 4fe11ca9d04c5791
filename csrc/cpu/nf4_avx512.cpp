// NF4 quantise and dequantise for AVX-512.
#include "nf4_blocks.h"

namespace peftkern {
const NF4Kernels kNF4Avx512 = {quantize_blocks, dequantize_blocks};
}  // namespace peftkern
