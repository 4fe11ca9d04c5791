// Every family's kernels for the instruction set that the including file is compiled for.
#pragma once

#include "adalora_kernels.h"
#include "dora_kernels.h"
#include "gram_product_kernels.h"
#include "grouped_linear_kernels.h"
#include "grouped_outer_kernels.h"
#include "kernels.h"
#include "lora_linear_kernels.h"
#include "low_rank_svd_kernels.h"
#include "nf4_kernels.h"
#include "nf4_lora_linear_kernels.h"
#include "rosa_kernels.h"
#include "swiglu_kernels.h"

namespace peftkern {
namespace {

constexpr NF4LinearKernels kNF4Linear = {forward_panels<Float32Math>,
                                         backward_panels<Float32Math>,
                                         forward_few<Float32Dots>,
                                         backward_few<Float32Axpy>,
                                         kShortBlocks,
                                         kAnyCodes};
constexpr GroupedKernels kGrouped = {grouped::linear<Float32Math, grouped::Float32Tiles>,
                                     grouped::outer<Float32Math, grouped::Float32Tiles>};
constexpr CpuKernels kIsaKernels = {
    kNF4Linear,
    kGrouped,
    kNF4Linear,
    kGrouped,
    {quantize_blocks, expand_absmax, dequantize_blocks},
    {lora::shrink, lora::expand, lora::outer},
    {dora::norm},
    {low_rank::scratch_doubles, low_rank::gram, low_rank::factorize, low_rank::product,
     low_rank::combine, low_rank::rotate, kDoubles, low_rank::jacobi},
    {adalora::importance, adalora::gram, adalora::gram_backward},
    {rosa::spmm, rosa::sddmm},
    {swiglu::forward, swiglu::backward},
    {gram_product::run},
};

}  // namespace
}  // namespace peftkern
