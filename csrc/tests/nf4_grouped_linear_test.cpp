// NF4 products over groups of rows on exactly sized buffers, against plain loops in float64.
#include "peftkern/nf4_grouped_linear.h"

#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "native_data.h"

namespace {

void check_groups(Isa isa, DType dtype, int64_t N, int64_t K, bool shared) {
  const Blocks blocks = random_blocks();
  K = blocks.columns(K);
  const std::vector<int64_t> sizes = {0, pick({1, 2, 5}), 0, pick({6, 15, 16}), pick({17, 33}), 1};
  const int64_t E = static_cast<int64_t>(sizes.size()), T = 7;
  const int64_t end = std::accumulate(sizes.begin(), sizes.end(), int64_t{0}), R = end + rng() % 3;
  const bool over_rows = rng() % 2, gathered = rng() % 2;
  const int64_t inner = over_rows ? N : K, outer = over_rows ? K : N, rows_of_x = gathered ? T : R;
  const DType out_dtype = rng() % 2 ? dtype : DType::kFloat32;
  const Weight w(blocks.format, (shared ? 1 : E) * N * K, blocks.size, blocks.nests() && rng() % 2,
                 pick({1, 2, 256}));
  Values x(dtype, rows_of_x * inner), out(out_dtype, R * outer, static_cast<int64_t>(rng() % 3));
  x.randomize();
  Buffer<int32_t> offsets(E), rows(R);  // rows past the end hold no row of x
  for (int64_t e = 0; e < E; ++e) {
    offsets[e] = static_cast<int32_t>(sizes[e]) + (e > 0 ? offsets[e - 1] : 0);
  }
  for (int64_t i = 0; i < end; ++i) rows[i] = static_cast<int32_t>(rng() % T);

  NF4GroupedArgs args;
  args.groups = {R, E, rows_of_x, offsets.data(), gathered ? rows.data() : nullptr};
  args.N = N, args.K = K, args.w = w.view, args.over_rows = over_rows;
  args.x = x.data(), args.dtype = dtype, args.out = out.data(), args.out_dtype = out_dtype;
  args.few_rows = pick({0, 5, 1 << 20});
  args.threads = static_cast<int>(pick({1, 2, 3}));
  nf4_grouped_linear(isa, args);

  for (int64_t i = 0, e = 0; i < R; ++i) {
    while (e < E && i >= offsets[e]) ++e;
    const int64_t source = gathered && i < end ? rows[i] : i, first = shared ? 0 : e * N * K;
    for (int64_t o = 0; o < outer; ++o) {
      Sum sum;
      for (int64_t j = 0; i < end && j < inner; ++j) {
        sum += x.at(source * inner + j) * w.at(first + (over_rows ? j * K + o : o * K + j));
      }
      const double bound =
          dtype == DType::kFloat32 ? 1e-5 * sum.size : 0.004 * (std::fabs(sum.value) + sum.size);
      if (!(std::fabs(out.at(i * outer + o) - sum.value) <= bound)) {
        fail(std::string(isa_name(isa)) + (over_rows ? " dy W" : " x W^T") +
             " of groups, N=" + std::to_string(N) + " K=" + std::to_string(K) + " format " +
             std::to_string(static_cast<int>(blocks.format)) + ": row " + std::to_string(i));
      }
    }
  }
}

void check_malformed(Isa isa) {
  const Weight w(3 * 4 * 64, 64, false);
  Values x(DType::kFloat32, 5 * 64), out(DType::kFloat32, 5 * 4);
  Buffer<int32_t> good_offsets(3), good_rows(5), bad(5);
  for (int i = 0; i < 3; ++i) good_offsets[i] = 1 + 2 * i;
  for (int i = 0; i < 5; ++i) good_rows[i] = i;
  NF4GroupedArgs good;
  good.groups = {5, 3, 5, good_offsets.data(), good_rows.data()};
  good.N = 4, good.K = 64, good.w = w.view, good.x = x.data(), good.out = out.data();
  nf4_grouped_linear(isa, good);
  const auto with = [&](const int32_t* values, int64_t at, int32_t value) {
    for (int64_t i = 0; i < 3; ++i) bad[i] = values[i];
    bad[at] = value;
    return bad.data();
  };
  const Damages<NF4GroupedArgs> damages = {
      [&](auto& a) { a.groups.offsets = with(good_offsets.data(), 0, -1); },
      [&](auto& a) { a.groups.offsets = with(good_offsets.data(), 1, 0); },
      [&](auto& a) { a.groups.offsets = with(good_offsets.data(), 2, 6); },
      [&](auto& a) { a.groups.rows = with(good_rows.data(), 1, -1); },
      [&](auto& a) { a.groups.rows = with(good_rows.data(), 1, 5); },
      [](auto& a) { a.groups.offsets = nullptr; },
      [](auto& a) { a.groups.rows = nullptr, a.groups.T = 4; },
      [](auto& a) { a.groups.R = -1; },
      [](auto& a) { a.groups.E = -1; },
      [](auto& a) { a.groups.E = 2; },
      [](auto& a) { a.groups.T = int64_t{1} << 60; },
      [](auto& a) { a.groups.R = int64_t{1} << 60; },
      [](auto& a) { a.groups.E = int64_t{1} << 60; },
      [](auto& a) { a.N = 5; },
      [](auto& a) { a.N = -4, a.K = -64; },
      [](auto& a) { a.N = a.K = int64_t{1} << 40; },
      [](auto& a) { a.x = nullptr; },
      [](auto& a) { a.out = nullptr; },
      [](auto& a) { a.threads = 0; },
      [](auto& a) { a.dtype = DType::kFloat16; },
      [](auto& a) { a.w.packed_bytes -= 1; },
  };
  check_refusals("nf4_grouped_linear", good, damages,
                 [&](const auto& args) { nf4_grouped_linear(isa, args); });
}

}  // namespace

void check_nf4_grouped_linear(Isa isa) {
  for (int i = 0; i < 60; ++i) {
    for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      check_groups(isa, dtype, pick({1, 2, 33, 64, 130}), pick({1, 3, 64, 65, 192, 257}),
                   rng() % 4 == 0);
    }
  }
  check_malformed(isa);
}
