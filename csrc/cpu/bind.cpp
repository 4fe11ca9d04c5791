// peftkern._cpu: addresses, sizes and a thread count in; no torch. Every entry checks its sizes and
// raises ValueError (std::invalid_argument); the GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "peftkern/adalora.h"
#include "peftkern/binding.h"
#include "peftkern/dora.h"
#include "peftkern/gram_product.h"
#include "peftkern/grouped_linear.h"
#include "peftkern/isa.h"
#include "peftkern/lora_linear.h"
#include "peftkern/low_rank_svd.h"
#include "peftkern/nf4.h"
#include "peftkern/nf4_grouped_linear.h"
#include "peftkern/nf4_lora_linear.h"
#include "peftkern/parallel.h"
#include "peftkern/rosa.h"
#include "peftkern/route.h"
#include "peftkern/swiglu.h"

namespace py = pybind11;

namespace {

using namespace peftkern;

// The instruction sets that satisfy a predicate, weakest first, by name.
py::dict isas(bool (*predicate)(Isa)) {
  py::dict codes;
  for (int i = 0; i < kIsaCount; ++i) {
    if (predicate(Isa{i})) codes[isa_name(Isa{i})] = i;
  }
  return codes;
}

NF4LinearArgs linear_args(int threads, int64_t M, int64_t N, int64_t K, int64_t r, uintptr_t in,
                          int dtype, const py::tuple& w, uintptr_t s, uintptr_t factor,
                          uintptr_t out) {
  NF4LinearArgs args;
  args.M = M, args.N = N, args.K = K, args.r = r;
  args.in = pointer<const void>(in);
  args.dtype = dtype_from_code(dtype);
  args.w = view_of(w);
  args.s = pointer<const float>(s);
  args.factor = pointer<const float>(factor);
  args.out = pointer<void>(out);
  args.threads = threads;
  return args;
}

void set_lora_args(LoraArgs& args, int threads, int64_t M, int64_t K, int64_t r, int dtype,
                   uintptr_t keep, float scale) {
  args.M = M, args.K = K, args.r = r;
  args.dtype = dtype_from_code(dtype);
  args.keep = pointer<const uint8_t>(keep);
  args.scale = scale;
  args.threads = threads;
}

// The address of a dense weight, or the fields of a quantized one.
template <class Args>
void set_weight(Args& args, const py::object& weight) {
  if (py::isinstance<py::tuple>(weight)) {
    args.w = view_of(weight.cast<py::tuple>());
  } else {
    args.weight = pointer<const void>(weight.cast<uintptr_t>());
  }
}

// (dy, its type, b, scaling, ds, x, its type, keep, keep_scale, da, s, db)
LoraBackwardArgs backward_args(int threads, int64_t M, int64_t N, int64_t K, int64_t r,
                               const py::tuple& adapter) {
  Fields fields(adapter, "adapter", 12);
  LoraBackwardArgs args;
  args.M = M, args.N = N, args.K = K, args.r = r;
  args.threads = threads;
  args.dy = fields.address<const void>();
  args.dy_dtype = fields.dtype();
  args.b = fields.address<const float>();
  args.scaling = fields.real();
  args.ds = fields.address<float>();
  args.x = fields.address<const void>();
  args.x_dtype = fields.dtype();
  args.keep = fields.address<const uint8_t>();
  args.keep_scale = fields.real();
  args.da = fields.address<float>();
  args.s = fields.address<const float>();
  args.db = fields.address<float>();
  return args;
}

// A row per pair: m, n, address and type of lora_B, address and type of lora_A.
std::vector<LowRankPair> low_rank_pairs(const std::vector<std::array<int64_t, 9>>& table) {
  std::vector<LowRankPair> pairs(table.size());
  for (size_t i = 0; i < table.size(); ++i) {
    const auto& [m, n, b, b_dtype, a, a_dtype, u, s, vh] = table[i];
    pairs[i].m = m, pairs[i].n = n;
    pairs[i].b = pointer<const void>(static_cast<uintptr_t>(b));
    pairs[i].b_dtype = dtype_from_code(static_cast<int>(b_dtype));
    pairs[i].a = pointer<const void>(static_cast<uintptr_t>(a));
    pairs[i].a_dtype = dtype_from_code(static_cast<int>(a_dtype));
    pairs[i].u = pointer<float>(static_cast<uintptr_t>(u));
    pairs[i].s = pointer<float>(static_cast<uintptr_t>(s));
    pairs[i].vh = pointer<float>(static_cast<uintptr_t>(vh));
  }
  return pairs;
}

// Nine numbers per layer: r, K, N, then the addresses of lora_E, A, B and of their gradients.
std::vector<Triplets> triplets_from(const std::vector<int64_t>& table) {
  constexpr size_t kFields = 9;
  require(table.size() % kFields == 0, "layers: expected nine fields each");
  std::vector<Triplets> layers;
  for (size_t i = 0; i < table.size(); i += kFields) {
    const auto at = [&](size_t field) {
      return pointer<void>(static_cast<uintptr_t>(table[i + field]));
    };
    layers.push_back(
        {at(3), at(4), at(5), at(6), at(7), at(8), table[i], table[i + 1], table[i + 2]});
  }
  return layers;
}

// Four numbers per matrix: r, length, the address of x and that of its gradient; lora_A before
// lora_B. Their residuals follow one another.
std::vector<GramMatrix> matrices_from(const std::vector<int64_t>& table, int64_t rows,
                                      uintptr_t residual, int64_t residual_len) {
  constexpr size_t kFields = 4;
  require(table.size() % kFields == 0, "lora: expected four fields each");
  std::vector<GramMatrix> matrices;
  int64_t used = 0;
  for (size_t i = 0; i < table.size(); i += kFields) {
    GramMatrix m;
    m.r = table[i];
    m.length = table[i + 1];
    m.x = pointer<const void>(static_cast<uintptr_t>(table[i + 2]));
    m.grad = pointer<void>(static_cast<uintptr_t>(table[i + 3]));
    m.columns = static_cast<int64_t>(i / kFields) >= rows;
    const int64_t size = checked_mul(m.r, m.r, "residual: r x r");
    require(size <= residual_len - used, "residual: too short");
    m.residual = pointer<float>(residual) + used;
    used += size;
    matrices.push_back(m);
  }
  return matrices;
}

// (R, E, T, offsets, rows)
RowGroups row_groups(const py::tuple& tuple) {
  Fields fields(tuple, "groups", 5);
  RowGroups groups;
  groups.R = fields.size();
  groups.E = fields.size();
  groups.T = fields.size();
  groups.offsets = fields.address<const int32_t>();
  groups.rows = fields.address<const int32_t>();
  return groups;
}

// (address, type, strides of group, rank and column, collected)
FactorStack factor_stack(const py::tuple& tuple) {
  Fields fields(tuple, "factor", 6);
  FactorStack factor;
  factor.data = fields.address<const void>();
  factor.dtype = fields.dtype();
  factor.strides = {fields.size(), fields.size(), fields.size()};
  factor.collected = fields.size() != 0;
  return factor;
}

// (starts, index, int64 instead of int32, rows, columns, nnz)
SparseMatrix sparse_matrix(const std::array<int64_t, 6>& t) {
  SparseMatrix s;
  s.starts = pointer<const void>(static_cast<uintptr_t>(t[0]));
  s.index = pointer<const void>(static_cast<uintptr_t>(t[1]));
  s.wide = t[2] != 0;
  s.rows = t[3];
  s.columns = t[4];
  s.nnz = t[5];
  return s;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  load_openmp();  // or the import fails and says why
  m.doc() = "CPU kernels of peftkern; call them through peftkern.native.";
  m.def(
      "isas", [] { return isas(isa_available); },
      "Instruction sets compiled in and supported here: names, weakest first, and codes.");
  m.def("built_isas", [] { return isas(isa_built); }, "The same of all that are compiled in.");
  m.def("set_fork_child", &set_fork_child, "Stay on one thread from now on (after fork).");

  m.def("nf4_quantize",
        [](int isa, int threads, uintptr_t src, int src_dtype, int64_t numel, int64_t blocksize,
           uintptr_t packed, int64_t packed_bytes, uintptr_t absmax, int64_t absmax_len) {
          const DType dtype = dtype_from_code(src_dtype);
          py::gil_scoped_release release;
          nf4_quantize(Isa{isa}, threads, pointer<const void>(src), dtype, numel, blocksize,
                       pointer<uint8_t>(packed), packed_bytes, pointer<float>(absmax), absmax_len);
        });
  m.def("nf4_quantize_absmax",
        [](int threads, uintptr_t absmax, int64_t n, float offset, uintptr_t code,
           int64_t nested_blocksize, uintptr_t q, uintptr_t nested_absmax, int64_t nested_len) {
          py::gil_scoped_release release;
          nf4_quantize_absmax(threads, pointer<const float>(absmax), n, offset,
                              pointer<const float>(code), nested_blocksize, pointer<uint8_t>(q),
                              pointer<float>(nested_absmax), nested_len);
        });
  m.def("nf4_dequantize", [](int isa, int threads, const py::tuple& w, uintptr_t out, int out_dtype,
                             int64_t out_numel, bool fresh) {
    const NF4View view = view_of(w);
    const DType dtype = dtype_from_code(out_dtype);
    py::gil_scoped_release release;
    nf4_dequantize(Isa{isa}, threads, view, pointer<void>(out), dtype, out_numel, fresh);
  });
  // Both products in one call: s[M, r] is written with keep_scale * keep(x) a^T (unscaled), then
  // y with x W^T + scaling s b^T + bias.
  m.def("nf4_lora_linear_forward",
        [](int isa, int threads, int64_t M, int64_t N, int64_t K, int64_t r, uintptr_t x, int dtype,
           const py::tuple& w, uintptr_t a, uintptr_t keep, float keep_scale, uintptr_t s,
           float scaling, uintptr_t b, uintptr_t bias, uintptr_t y, int64_t few_rows) {
          NF4LinearArgs args = linear_args(threads, M, N, K, r, x, dtype, w, s, b, y);
          args.few_rows = few_rows;
          args.scaling = scaling;
          args.bias = pointer<const float>(bias);
          LoraShrinkArgs shrink;
          set_lora_args(shrink, threads, M, K, r, dtype, keep, keep_scale);
          shrink.x = pointer<const void>(x);
          shrink.a = pointer<const float>(a);
          shrink.s = pointer<float>(s);
          args.shrink = &shrink;
          py::gil_scoped_release release;
          nf4_lora_linear_forward(Isa{isa}, args);
        });
  // `adapter` is as lora_backward takes it, or empty: then s[M, r] is the caller's.
  m.def("nf4_lora_linear_backward",
        [](int isa, int threads, int64_t M, int64_t N, int64_t K, int64_t r, uintptr_t dy,
           int dtype, const py::tuple& w, uintptr_t s, uintptr_t a, const py::tuple& adapter,
           uintptr_t dx, int64_t few_rows) {
          NF4LinearArgs args = linear_args(threads, M, N, K, r, dy, dtype, w, s, a, dx);
          args.few_rows = few_rows;
          LoraBackwardArgs gradients;
          if (adapter.size() > 0) {
            gradients = backward_args(threads, M, N, K, r, adapter);
            args.gradients = &gradients;
            args.s = gradients.ds;
          }
          py::gil_scoped_release release;
          nf4_lora_linear_backward(Isa{isa}, args);
        });
  m.def("lora_backward", [](int isa, int threads, int64_t M, int64_t N, int64_t K, int64_t r,
                            const py::tuple& adapter) {
    const LoraBackwardArgs args = backward_args(threads, M, N, K, r, adapter);
    py::gil_scoped_release release;
    lora_backward(Isa{isa}, args);
  });
  m.def("lora_shrink", [](int isa, int threads, int64_t M, int64_t K, int64_t r, uintptr_t x,
                          int dtype, uintptr_t a, uintptr_t keep, float scale, uintptr_t s) {
    LoraShrinkArgs args;
    set_lora_args(args, threads, M, K, r, dtype, keep, scale);
    args.x = pointer<const void>(x);
    args.a = pointer<const float>(a);
    args.s = pointer<float>(s);
    py::gil_scoped_release release;
    lora_shrink(Isa{isa}, args);
  });
  m.def("lora_expand", [](int isa, int threads, int64_t M, int64_t K, int64_t r, uintptr_t s,
                          uintptr_t a, uintptr_t keep, float scale, uintptr_t y, int dtype) {
    LoraExpandArgs args;
    set_lora_args(args, threads, M, K, r, dtype, keep, scale);
    args.s = pointer<const float>(s);
    args.a = pointer<const float>(a);
    args.y = pointer<void>(y);
    py::gil_scoped_release release;
    lora_expand(Isa{isa}, args);
  });

  // `weight`: address, transposed, strides of groups and of rows.
  m.def("grouped_linear", [](int isa, int threads, const py::tuple& groups, int64_t N, int64_t K,
                             int64_t r, uintptr_t x, int dtype, const py::tuple& weight,
                             uintptr_t base, uintptr_t bias, const py::tuple& a, const py::tuple& b,
                             float s_scale, float scaling, uintptr_t s, uintptr_t y) {
    GroupedLinearArgs args;
    args.groups = row_groups(groups);
    args.N = N, args.K = K, args.r = r;
    args.x = pointer<const void>(x);
    args.dtype = dtype_from_code(dtype);
    Fields fields(weight, "weight", 4);
    args.weight = fields.address<const void>();
    args.transposed = fields.size() != 0;
    args.weight_group = fields.size();
    args.weight_row = fields.size();
    args.base = pointer<const float>(base);
    args.bias = pointer<const void>(bias);
    args.a = factor_stack(a);
    args.b = factor_stack(b);
    args.s_scale = s_scale, args.scaling = scaling;
    args.s = pointer<float>(s);
    args.y = pointer<void>(y);
    args.threads = threads;
    py::gil_scoped_release release;
    grouped_linear(Isa{isa}, args);
  });
  m.def("grouped_outer", [](int isa, int threads, const py::tuple& groups, int64_t K, int64_t r,
                            uintptr_t x, int dtype, uintptr_t s, float scale, const py::tuple& g) {
    GroupedOuterArgs args;
    args.groups = row_groups(groups);
    args.K = K, args.r = r;
    args.x = pointer<const void>(x);
    args.dtype = dtype_from_code(dtype);
    args.s = pointer<const float>(s);
    args.scale = scale;
    const FactorStack gradient = factor_stack(g);
    args.g = const_cast<void*>(gradient.data);
    args.g_dtype = gradient.dtype;
    args.strides = gradient.strides;
    args.threads = threads;
    py::gil_scoped_release release;
    grouped_outer(Isa{isa}, args);
  });
  m.def("grouped_collect", [](int threads, const py::tuple& groups, int64_t columns, int dtype,
                              uintptr_t in, uintptr_t out) {
    GroupedCollectArgs args;
    args.groups = row_groups(groups);
    args.columns = columns;
    args.dtype = dtype_from_code(dtype);
    args.in = pointer<const void>(in);
    args.out = pointer<void>(out);
    args.threads = threads;
    py::gil_scoped_release release;
    grouped_collect(args);
  });
  m.def("route", [](int64_t T, int64_t top, int64_t E, uintptr_t index, bool wide,
                    uintptr_t weights, int64_t itemsize, uintptr_t rows, uintptr_t offsets,
                    uintptr_t inverse, uintptr_t row_weights) {
    RouteArgs args;
    args.T = T, args.top = top, args.E = E;
    args.index = pointer<const void>(index);
    args.wide = wide;
    args.weights = pointer<const void>(weights);
    args.itemsize = itemsize;
    args.rows = pointer<int32_t>(rows);
    args.offsets = pointer<int32_t>(offsets);
    args.inverse = pointer<int64_t>(inverse);
    args.row_weights = pointer<void>(row_weights);
    py::gil_scoped_release release;
    return route(args);
  });
  m.def("swiglu_forward", [](int isa, int threads, int64_t R, int64_t I, uintptr_t u, int dtype,
                             uintptr_t w, uintptr_t a) {
    SwigluArgs args;
    args.R = R, args.I = I;
    args.u = pointer<const void>(u);
    args.dtype = dtype_from_code(dtype);
    args.w = pointer<const float>(w);
    args.a = pointer<void>(a);
    args.threads = threads;
    py::gil_scoped_release release;
    swiglu_forward(Isa{isa}, args);
  });
  m.def("swiglu_backward", [](int isa, int threads, int64_t R, int64_t I, uintptr_t u, int dtype,
                              uintptr_t w, uintptr_t da, uintptr_t du, uintptr_t dw) {
    SwigluBackwardArgs args;
    args.R = R, args.I = I;
    args.u = pointer<const void>(u);
    args.dtype = dtype_from_code(dtype);
    args.w = pointer<const float>(w);
    args.da = pointer<const void>(da);
    args.du = pointer<void>(du);
    args.dw = pointer<float>(dw);
    args.threads = threads;
    py::gil_scoped_release release;
    swiglu_backward(Isa{isa}, args);
  });
  m.def("nf4_grouped_linear",
        [](int isa, int threads, const py::tuple& groups, int64_t N, int64_t K, const py::tuple& w,
           bool over_rows, uintptr_t x, int dtype, uintptr_t out, int out_dtype, int64_t few_rows) {
          NF4GroupedArgs args;
          args.groups = row_groups(groups);
          args.N = N, args.K = K;
          args.w = view_of(w);
          args.over_rows = over_rows;
          args.x = pointer<const void>(x);
          args.dtype = dtype_from_code(dtype);
          args.out = pointer<void>(out);
          args.out_dtype = dtype_from_code(out_dtype);
          args.few_rows = few_rows;
          args.threads = threads;
          py::gil_scoped_release release;
          nf4_grouped_linear(Isa{isa}, args);
        });

  // `weight` is the address of a dense weight, or a tuple that describes one in NF4.
  m.def("dora_norm",
        [](int isa, int threads, int64_t N, int64_t K, int64_t r, const py::object& weight,
           int dtype, uintptr_t a, uintptr_t b, uintptr_t norm) {
          DoraNormArgs args;
          args.N = N, args.K = K, args.r = r;
          set_weight(args, weight);
          args.dtype = dtype_from_code(dtype);
          args.a = pointer<const float>(a);
          args.b = pointer<const float>(b);
          args.norm = pointer<float>(norm);
          args.threads = threads;
          py::gil_scoped_release release;
          dora_norm(Isa{isa}, args);
        });

  m.def("gram_product", [](int isa, int64_t m, int64_t n, int64_t width, const py::object& weight,
                           int dtype, uintptr_t x, uintptr_t y, uintptr_t z, uintptr_t squares) {
    GramProductArgs args;
    args.m = m, args.n = n, args.width = width;
    set_weight(args, weight);
    args.dtype = dtype_from_code(dtype);
    args.x = pointer<const float>(x);
    args.y = pointer<float>(y);
    args.z = pointer<float>(z);
    args.squares = pointer<float>(squares);
    py::gil_scoped_release release;
    gram_product(Isa{isa}, args);
  });

  m.def("low_rank_cores", [](int isa, int threads, const std::vector<std::array<int64_t, 9>>& table,
                             int64_t r, uintptr_t scaling, bool second_pass, uintptr_t cores,
                             uintptr_t inverse, uintptr_t scale, uintptr_t floor, uintptr_t info) {
    const std::vector<LowRankPair> pairs = low_rank_pairs(table);
    LowRankCoresArgs args;
    args.pairs = pairs.data();
    args.count = static_cast<int64_t>(pairs.size());
    args.r = r;
    args.scaling = pointer<const double>(scaling);
    args.second_pass = second_pass;
    args.threads = threads;
    args.cores = pointer<double>(cores);
    args.inverse = pointer<double>(inverse);
    args.scale = pointer<double>(scale);
    args.floor = pointer<double>(floor);
    args.info = pointer<int64_t>(info);
    py::gil_scoped_release release;
    low_rank_cores(Isa{isa}, args);
  });
  m.def("jacobi_svd",
        [](int isa, int threads, int64_t count, int64_t r, int sweeps, uintptr_t cores,
           uintptr_t sigma, uintptr_t left, uintptr_t right, uintptr_t info) {
          JacobiSvdArgs args;
          args.cores = pointer<const double>(cores);
          args.count = count;
          args.r = r;
          args.sweeps = sweeps;
          args.threads = threads;
          args.sigma = pointer<double>(sigma);
          args.left = pointer<double>(left);
          args.right = pointer<double>(right);
          args.info = pointer<int64_t>(info);
          py::gil_scoped_release release;
          jacobi_svd(Isa{isa}, args);
        });
  m.def("low_rank_results",
        [](int isa, int threads, const std::vector<std::array<int64_t, 9>>& table, int64_t r,
           uintptr_t inverse, uintptr_t left, uintptr_t right, uintptr_t sigma, uintptr_t scale,
           uintptr_t floor, bool stream, uintptr_t rank, uintptr_t info) {
          const std::vector<LowRankPair> pairs = low_rank_pairs(table);
          LowRankResultsArgs args;
          args.pairs = pairs.data();
          args.count = static_cast<int64_t>(pairs.size());
          args.r = r;
          args.inverse = pointer<const double>(inverse);
          args.left = pointer<const double>(left);
          args.right = pointer<const double>(right);
          args.sigma = pointer<const double>(sigma);
          args.scale = pointer<const double>(scale);
          args.floor = pointer<const double>(floor);
          args.threads = threads;
          args.stream = stream;
          args.rank = pointer<int64_t>(rank);
          args.info = pointer<int64_t>(info);
          py::gil_scoped_release release;
          low_rank_results(Isa{isa}, args);
        });
  m.def("low_rank_svd", [](int isa, int threads, const std::vector<std::array<int64_t, 9>>& table,
                           int64_t r, uintptr_t scaling, bool second_pass, int sweeps, bool vectors,
                           bool stream, uintptr_t rank, uintptr_t info) {
    const std::vector<LowRankPair> pairs = low_rank_pairs(table);
    LowRankSvdArgs args;
    args.pairs = pairs.data();
    args.count = static_cast<int64_t>(pairs.size());
    args.r = r;
    args.scaling = pointer<const double>(scaling);
    args.second_pass = second_pass;
    args.vectors = vectors;
    args.stream = stream;
    args.sweeps = sweeps;
    args.threads = threads;
    args.rank = pointer<int64_t>(rank);
    args.info = pointer<int64_t>(info);
    py::gil_scoped_release release;
    low_rank_svd(Isa{isa}, args);
  });
  m.def("advise_huge_pages",
        [](uintptr_t p, int64_t bytes) { advise_huge_pages(pointer<void>(p), bytes); });
  m.def("adalora_importance", [](int isa, int threads, const std::vector<int64_t>& table, int dtype,
                                 uintptr_t ipt, uintptr_t unc, int64_t state_len, double beta1,
                                 double beta2, uintptr_t scores, int64_t scores_len) {
    const std::vector<Triplets> layers = triplets_from(table);
    ImportanceArgs args;
    args.layers = layers.data();
    args.count = static_cast<int64_t>(layers.size());
    args.dtype = dtype_from_code(dtype);
    args.ipt = pointer<float>(ipt);
    args.unc = pointer<float>(unc);
    args.state_len = state_len;
    args.beta1 = beta1;
    args.beta2 = beta2;
    args.scores = pointer<float>(scores);
    args.scores_len = scores_len;
    args.threads = threads;
    py::gil_scoped_release release;
    adalora_importance(Isa{isa}, args);
  });
  m.def("adalora_allocate", [](uintptr_t scores, int64_t count, int64_t budget, bool threshold_ties,
                               const std::vector<int64_t>& table, int dtype, uintptr_t keep) {
    const std::vector<Triplets> layers = triplets_from(table);
    const DType type = dtype_from_code(dtype);
    py::gil_scoped_release release;
    adalora_allocate(pointer<const float>(scores), count, budget, threshold_ties, layers, type,
                     pointer<uint8_t>(keep));
  });
  m.def(
      "adalora_gram",
      [](int isa, int threads, const std::vector<int64_t>& table, int64_t rows, int dtype,
         uintptr_t residual, int64_t residual_len) {
        const std::vector<GramMatrix> matrices = matrices_from(table, rows, residual, residual_len);
        std::vector<double> norms(matrices.size());
        GramArgs args;
        args.matrices = matrices.data();
        args.count = static_cast<int64_t>(matrices.size());
        args.dtype = dtype_from_code(dtype);
        args.norms = norms.data();
        args.threads = threads;
        {
          py::gil_scoped_release release;
          adalora_gram(Isa{isa}, args);
        }
        return norms;
      },
      "Writes the residuals and returns the sum of squares of each.");
  m.def("adalora_gram_backward",
        [](int isa, int threads, const std::vector<int64_t>& table, int64_t rows, int dtype,
           uintptr_t residual, int64_t residual_len, const std::vector<double>& scales) {
          std::vector<GramMatrix> matrices = matrices_from(table, rows, residual, residual_len);
          require(scales.size() == matrices.size(), "scales: expected one per matrix");
          for (size_t i = 0; i < scales.size(); ++i) matrices[i].scale = scales[i];
          GramArgs args;
          args.matrices = matrices.data();
          args.count = static_cast<int64_t>(matrices.size());
          args.dtype = dtype_from_code(dtype);
          args.threads = threads;
          py::gil_scoped_release release;
          adalora_gram_backward(Isa{isa}, args);
        });
  m.def("rosa_spmm",
        [](int isa, int threads, const std::array<int64_t, 6>& matrix, uintptr_t values,
           uintptr_t order, uintptr_t x, uintptr_t y, int64_t T, int dtype) {
          SpmmArgs args;
          args.s = sparse_matrix(matrix);
          args.values = pointer<const float>(values);
          args.order = pointer<const void>(order);
          args.x = pointer<const void>(x);
          args.y = pointer<void>(y);
          args.T = T;
          args.dtype = dtype_from_code(dtype);
          args.threads = threads;
          py::gil_scoped_release release;
          rosa_spmm(Isa{isa}, args);
        });
  m.def("rosa_sddmm", [](int isa, int threads, const std::array<int64_t, 6>& matrix, uintptr_t dy,
                         uintptr_t x, uintptr_t values, int64_t T, int dtype) {
    SddmmArgs args;
    args.s = sparse_matrix(matrix);
    args.dy = pointer<const void>(dy);
    args.x = pointer<const void>(x);
    args.values = pointer<float>(values);
    args.T = T;
    args.dtype = dtype_from_code(dtype);
    args.threads = threads;
    py::gil_scoped_release release;
    rosa_sddmm(Isa{isa}, args);
  });
}
