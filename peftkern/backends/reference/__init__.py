"""Plain-torch oracle of every op, and the back end where no kernel serves.

One function per op with the op's signature. Products accumulate in float32, or in float64 when the
activations are float64, so that the same code run in float64 is the oracle and passes gradcheck.
"""

from peftkern.backends.reference.adalora import (
    adalora_allocate_,
    adalora_importance_,
    adalora_orthogonality_backward,
    adalora_orthogonality_forward,
)
from peftkern.backends.reference.dora import dora_norm, nf4_dora_norm
from peftkern.backends.reference.gram_product import gram_product, nf4_gram_product
from peftkern.backends.reference.grouped_linear import (
    grouped_linear_backward,
    grouped_linear_forward,
    nf4_grouped_linear_backward,
    nf4_grouped_linear_forward,
)
from peftkern.backends.reference.lora_linear import (
    dropped,
    lora_linear_backward,
    lora_linear_forward,
    lora_shrink,
)
from peftkern.backends.reference.low_rank_svd import (
    low_rank_svd,
    low_rank_svd_out,
    unrepresentable,
)
from peftkern.backends.reference.nf4 import (
    block_scales,
    nf4_dequantize,
    nf4_dequantize_out,
    nf4_quantize,
    nf4_quantize_absmax,
    unnested,
)
from peftkern.backends.reference.nf4_lora_linear import (
    nf4_lora_linear_backward,
    nf4_lora_linear_forward,
)
from peftkern.backends.reference.rosa import rosa_sddmm, rosa_spmm_
from peftkern.backends.reference.route import route
from peftkern.backends.reference.swiglu import swiglu_backward, swiglu_forward
