// AdaLoRA's kernels on exactly sized buffers, against plain loops in float64.
#include "peftkern/adalora.h"

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

void compare(double got, double wanted, double size, const std::string& what) {
  if (!(std::fabs(got - wanted) <= 1e-5 * size + 1e-30)) fail(what);
}

struct Layer {
  Layer(DType dtype, int64_t r, int64_t K, int64_t N) : r(r), K(K), N(N) {
    for (int64_t size : {r, r * K, N * r}) {
      params.push_back(std::make_unique<Values>(dtype, size, static_cast<int64_t>(rng() % 3)));
      grads.push_back(std::make_unique<Values>(dtype, size, static_cast<int64_t>(rng() % 3)));
      params.back()->randomize();
      grads.back()->randomize();
    }
    if (rng() % 3 == 0) grads[rng() % 3] = nullptr;
  }
  Triplets triplets() {
    const auto grad = [&](int i) { return grads[i] ? grads[i]->data() : nullptr; };
    const auto param = [&](int i) { return params[i]->data(); };
    return {param(0), param(1), param(2), grad(0), grad(1), grad(2), r, K, N};
  }
  int64_t numel() const { return r * (1 + K + N); }

  int64_t r, K, N;
  std::vector<std::unique_ptr<Values>> params, grads;
};

void check_importance(Isa isa, DType dtype) {
  std::vector<Layer> layers;
  std::vector<Triplets> triplets;
  int64_t state = 0, count = 0;
  for (uint32_t i = 1 + rng() % 4; i > 0; --i) {
    layers.emplace_back(dtype, pick({0, 1, 2, 3, 7, 12, 16, 17, 33}), pick({1, 2, 15, 64, 4099}),
                        pick({1, 3, 16, 33, 2500}));
    state += layers.back().numel();
    count += layers.back().r;
  }
  for (Layer& layer : layers) triplets.push_back(layer.triplets());
  Buffer<float> ipt(state, 1), unc(state, 2), scores(count);
  std::vector<double> wanted;
  for (int64_t i = 0; i < state; ++i) ipt[i] = std::fabs(uniform()), unc[i] = std::fabs(uniform());
  int64_t at = 0;
  for (const Layer& layer : layers) {
    std::vector<double> sums(static_cast<size_t>(layer.r), 0.0);
    for (int part = 0; part < 3; ++part) {
      const int64_t size = part == 0 ? layer.r : layer.r * (part == 1 ? layer.K : layer.N);
      for (int64_t i = 0; i < size; ++i, ++at) {
        const auto& g = layer.grads[part];
        const double w = layer.params[part]->at(i), s = g ? std::fabs(w * g->at(i)) : 0.0;
        const double e = 0.75 * ipt[at] + 0.25 * s, u = 0.5 * unc[at] + 0.5 * std::fabs(s - e);
        if (part == 1) {
          sums[i / layer.K] += e * u / layer.K;
        } else {
          sums[part == 0 ? i : i % layer.r] += part == 0 ? e * u : e * u / layer.N;
        }
      }
    }
    wanted.insert(wanted.end(), sums.begin(), sums.end());
  }
  ImportanceArgs args;
  args.layers = triplets.data(), args.count = static_cast<int64_t>(triplets.size());
  args.dtype = dtype, args.ipt = ipt.data(), args.unc = unc.data(), args.state_len = state;
  args.beta1 = 0.75, args.beta2 = 0.5, args.scores = scores.data(), args.scores_len = count;
  args.threads = static_cast<int>(pick({1, 2, 3}));
  adalora_importance(isa, args);
  for (int64_t i = 0; i < count; ++i) {
    compare(scores[i], wanted[i], wanted[i], std::string(isa_name(isa)) + " importance");
  }
}

void check_gram(Isa isa, DType dtype) {
  const int64_t r = pick({0, 1, 2, 3, 4, 5, 7, 8, 12, 15, 16, 17, 31, 33, 50});
  const int64_t length = pick({0, 1, 2, 15, 16, 17, 255, 256, 257, 1025});
  for (bool columns : {false, true}) {
    Values x(dtype, r * length, static_cast<int64_t>(rng() % 3)), grad(dtype, r * length);
    x.randomize();
    Buffer<float> residual(r * r);
    Buffer<double> norm(1);
    GramMatrix m;
    m.x = x.data(), m.r = r, m.length = length, m.columns = columns, m.residual = residual.data();
    m.grad = grad.data(), m.scale = 0.25;
    GramArgs args;
    args.matrices = &m, args.count = 1, args.dtype = dtype, args.norms = norm.data();
    args.threads = 2;
    adalora_gram(isa, args);
    const auto at = [&](int64_t i, int64_t k) {
      return x.at(columns ? k * r + i : i * length + k);
    };
    const std::string what = std::string(isa_name(isa)) + " gram r=" + std::to_string(r) +
                             " length=" + std::to_string(length) + (columns ? " columns" : " rows");
    double squares = 0.0;
    for (int64_t i = 0; i < r * r; ++i) {
      Sum sum{i / r == i % r ? -1.0 : 0.0, 1.0};
      for (int64_t k = 0; k < length; ++k) sum += double{at(i / r, k)} * at(i % r, k);
      compare(residual[i], sum.value, sum.size, what);
      squares += double{residual[i]} * residual[i];
    }
    compare(norm[0], squares, squares, what + ": norm");
    adalora_gram_backward(isa, args);
    const double rounding = dtype == DType::kFloat32 ? 0.0 : 0.004;
    for (int64_t i = 0; i < r; ++i) {
      for (int64_t k = 0; k < length; ++k) {
        Sum sum;
        for (int64_t j = 0; j < r; ++j) sum += 0.25 * residual[i * r + j] * at(j, k);
        const double got = grad.at(columns ? k * r + i : i * length + k);
        const double size = sum.size + rounding * 1e5 * std::fabs(sum.value);
        compare(got, sum.value, size, what + ": gradient");
      }
    }
  }
}

void check_allocate() {
  for (int round = 0; round < 300; ++round) {
    const int64_t count = static_cast<int64_t>(rng() % 40), cut = count ? rng() % count : 0;
    Buffer<float> scores(count), first(cut), second(count - cut);
    Buffer<uint8_t> keep(count);
    for (int64_t i = 0; i < count; ++i) scores[i] = static_cast<float>(rng() % 5);
    std::vector<Triplets> layers(2);
    layers[0].lora_E = first.data(), layers[0].r = cut;
    layers[1].lora_E = second.data(), layers[1].r = count - cut;
    const int64_t budget = static_cast<int64_t>(rng() % 45);
    adalora_allocate(scores.data(), count, budget, false, layers, DType::kFloat32, keep.data());
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      kept += keep[i];
      const float E = i < cut ? first[i] : second[i - cut];
      if (keep[i] ? E == E : E != 0.0f) fail("allocate: lora_E and the mask disagree");
      for (int64_t j = 0; j < i; ++j) {
        if (keep[i] && !keep[j] && !(scores[i] > scores[j])) fail("allocate: wrong order");
      }
    }
    if (kept != std::min(budget, count)) fail("allocate: the budget is not met");
  }
}

void check_malformed(Isa isa) {
  Layer layer(DType::kFloat32, 3, 8, 9);
  Buffer<float> ipt(54), unc(54), scores(3);
  Triplets triplets = layer.triplets();
  ImportanceArgs good;
  good.layers = &triplets, good.count = 1, good.ipt = ipt.data(), good.unc = unc.data();
  good.state_len = 54, good.scores = scores.data(), good.scores_len = 3;
  const auto call = [&](const ImportanceArgs& args) { adalora_importance(isa, args); };
  const Damages<ImportanceArgs> damages = {
      [](auto& a) { a.state_len = 53; },   [](auto& a) { a.state_len = 55; },
      [](auto& a) { a.scores_len = 2; },   [](auto& a) { a.ipt = nullptr; },
      [](auto& a) { a.scores = nullptr; }, [](auto& a) { a.threads = 0; },
  };
  check_refusals("adalora_importance", good, damages, call);
  const Damages<Triplets> layer_damages = {
      [](auto& t) { t.r = -1; },
      [](auto& t) { t.K = 0; },
      [](auto& t) { t.N = int64_t{1} << 62; },
      [](auto& t) { t.lora_B = nullptr; },
  };
  check_refusals("layer of adalora_importance", layer.triplets(), layer_damages,
                 [&](const Triplets& damaged) { triplets = damaged, call(good); });
  GramMatrix m;
  m.r = 3, m.length = 8, m.x = ipt.data();
  GramArgs args;
  args.matrices = &m, args.count = 1;
  double norm = 0.0;
  args.norms = &norm;
  if (!rejected([&] { adalora_gram(isa, args); })) fail("a missing residual was accepted");
  m.residual = unc.data();
  if (!rejected([&] { adalora_gram_backward(isa, args); })) fail("a missing grad was accepted");
  m.length = int64_t{1} << 62;
  if (!rejected([&] { adalora_gram(isa, args); })) fail("an overflowing matrix was accepted");
}

}  // namespace

void check_adalora(Isa isa) {
  for (int i = 0; i < 60; ++i) {
    for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      check_importance(isa, dtype);
      check_gram(isa, dtype);
    }
  }
  check_allocate();
  check_malformed(isa);
}
