// RoSA's sparse products on exactly sized buffers, against plain loops in float64.
#include "peftkern/rosa.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "native_data.h"

namespace {

// A random sparse matrix; about one row in three is empty.
template <typename Index>
struct Entries {
  Entries(int64_t rows, int64_t columns, double share) : starts(rows + 1, 1), rows(rows) {
    std::vector<Index> places;
    starts[0] = 0;
    for (int64_t n = 0; n < rows; ++n) {
      const bool empty = rng() % 3 == 0;
      for (int64_t k = 0; k < columns; ++k) {
        if (!empty && static_cast<double>(rng() % 1000) < 1000 * share) {
          places.push_back(static_cast<Index>(k));
        }
      }
      starts[n + 1] = static_cast<Index>(places.size());
    }
    index = std::make_unique<Buffer<Index>>(static_cast<int64_t>(places.size()), 1);
    std::copy(places.begin(), places.end(), index->data());
    matrix.starts = starts.data(), matrix.index = index->data();
    matrix.wide = sizeof(Index) == 8, matrix.rows = rows, matrix.columns = columns;
    matrix.nnz = index->size();
  }

  Buffer<Index> starts;
  std::unique_ptr<Buffer<Index>> index;
  int64_t rows;
  SparseMatrix matrix;
};

template <typename Index>
void check_products(Isa isa, DType dtype) {
  const int64_t T = pick({0, 1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 130, 200});
  const int64_t N = pick({1, 2, 15, 16, 17, 63, 65, 130}), K = pick({1, 3, 16, 33, 100, 259});
  Entries<Index> s(N, K, static_cast<double>(pick({0, 20, 100, 500, 1000})) / 1000);
  const int64_t nnz = s.matrix.nnz;
  Values x(dtype, T * K, static_cast<int64_t>(rng() % 3));
  Values y(dtype, T * N, static_cast<int64_t>(rng() % 3));
  x.randomize(), y.randomize();
  Buffer<float> values(nnz, 2), slopes(nnz);
  Buffer<Index> order(nnz, 1);
  for (int64_t j = 0; j < nnz; ++j) {
    values[j] = uniform();
    order[j] = static_cast<Index>(j);
  }
  std::shuffle(order.data(), order.data() + nnz, rng);
  const bool ordered = rng() % 2 == 0;
  const std::string what = std::string(isa_name(isa)) + " T=" + std::to_string(T) +
                           " N=" + std::to_string(N) + " K=" + std::to_string(K) +
                           " nnz=" + std::to_string(nnz);

  SddmmArgs gradient;
  gradient.s = s.matrix, gradient.dy = y.data(), gradient.x = x.data();
  gradient.values = slopes.data(), gradient.T = T, gradient.dtype = dtype;
  gradient.threads = static_cast<int>(pick({1, 2, 3}));
  rosa_sddmm(isa, gradient);
  std::vector<Sum> sums(static_cast<size_t>(T * N));
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t j = s.starts[n]; j < static_cast<int64_t>(s.starts[n + 1]); ++j) {
      const double value = values[ordered ? static_cast<int64_t>(order[j]) : j];
      Sum slope;
      for (int64_t t = 0; t < T; ++t) {
        const double at = x.at(t * K + (*s.index)[j]);
        slope += at * y.at(t * N + n);
        sums[t * N + n] += at * value;
      }
      if (!(std::fabs(slopes[j] - slope.value) <= 1e-5 * slope.size + 1e-30)) {
        fail(what + ": sddmm");
      }
    }
  }
  for (int64_t i = 0; i < T * N; ++i) sums[i] += y.at(i);

  SpmmArgs product;
  product.s = s.matrix, product.values = values.data(), product.x = x.data();
  product.order = ordered ? order.data() : nullptr;
  product.y = y.data(), product.T = T, product.dtype = dtype, product.threads = gradient.threads;
  rosa_spmm(isa, product);
  const double rounding = dtype == DType::kFloat32 ? 1e-5 : 0.004;
  for (int64_t i = 0; i < T * N; ++i) {
    const auto [sum, size] = sums[i];
    if (!(std::fabs(y.at(i) - sum) <= 1e-5 * size + rounding * std::fabs(sum) + 1e-30)) {
      fail(what + ": spmm");
    }
  }
}

// Each damage must be noticed before anything is read or written through it.
template <typename Index>
void check_malformed(Isa isa) {
  struct Call {
    SpmmArgs args;
    Index *starts, *index, *order;
  };
  const std::vector<std::function<void(Call&)>> damages = {
      [](Call& c) { c.index[2] = 8; },
      [](Call& c) { c.index[5] = -1; },
      [](Call& c) { c.starts[0] = 1; },
      [](Call& c) { c.starts[1] = 5; },
      [](Call& c) { c.starts[3] = 7; },
      [](Call& c) { c.starts[2] = -2; },
      [](Call& c) { c.order[0] = 6; },
      [](Call& c) { c.order[0] = -1; },
      [](Call& c) { c.args.threads = 0; },
      [](Call& c) { c.args.T = -1; },
      [](Call& c) { c.args.T = int64_t{1} << 60; },
      [](Call& c) { c.args.s.rows = int64_t{1} << 60; },
      [](Call& c) { c.args.s.columns = int64_t{1} << 60; },
      [](Call& c) { c.args.s.nnz = -1; },
      [](Call& c) { c.args.s.nnz = 5; },
      [](Call& c) { c.args.s.starts = nullptr; },
      [](Call& c) { c.args.s.index = nullptr; },
      [](Call& c) { c.args.values = nullptr; },
      [](Call& c) { c.args.x = nullptr; },
      [](Call& c) { c.args.y = nullptr; },
  };
  for (size_t i = 0; i <= damages.size(); ++i) {
    Buffer<Index> starts(4), index(6), order(6);
    Buffer<float> values(6), x(2 * 8), y(2 * 3);
    for (int64_t j = 0; j < 6; ++j) index[j] = order[j] = static_cast<Index>(j), values[j] = 1.0f;
    for (int64_t j = 0; j < 4; ++j) starts[j] = static_cast<Index>(2 * j);
    for (int64_t j = 0; j < 16; ++j) x[j] = 1.0f;
    for (int64_t j = 0; j < 6; ++j) y[j] = 0.0f;
    Call call;
    call.starts = starts.data(), call.index = index.data(), call.order = order.data();
    SpmmArgs& args = call.args;
    args.s.starts = starts.data(), args.s.index = index.data(), args.s.wide = sizeof(Index) == 8;
    args.s.rows = 3, args.s.columns = 8, args.s.nnz = 6, args.values = values.data();
    args.order = order.data(), args.x = x.data(), args.y = y.data(), args.T = 2;
    if (i < damages.size()) damages[i](call);
    const bool spmm = rejected([&] { rosa_spmm(isa, args); });
    SddmmArgs gradient;
    gradient.s = args.s, gradient.dy = args.y, gradient.x = args.x, gradient.T = args.T;
    gradient.values = const_cast<float*>(args.values), gradient.threads = args.threads;
    const bool sddmm = rejected([&] { rosa_sddmm(isa, gradient); });
    const bool of_order = i == 6 || i == 7;
    if (spmm != (i < damages.size()) || sddmm != (i < damages.size() && !of_order)) {
      fail("malformed sparse matrix " + std::to_string(i) + ": accepted, or a good one refused");
    }
    if (spmm && args.y) {
      for (int64_t j = 0; j < 6; ++j) {
        if (y[j] != 0.0f) fail("a refused call wrote to y");
      }
    }
  }
}

}  // namespace

void check_rosa(Isa isa) {
  for (int i = 0; i < 150; ++i) {
    for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      check_products<int32_t>(isa, dtype);
      check_products<int64_t>(isa, dtype);
    }
  }
  check_malformed<int32_t>(isa);
  check_malformed<int64_t>(isa);
}
