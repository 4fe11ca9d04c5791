// AdaLoRA: argument checks, the partition of the work into tasks, and the selection of the budget.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "kernels.h"
#include "peftkern/checks.h"
#include "tasks.h"

namespace peftkern {
namespace {

constexpr int64_t kTaskElements = 1 << 14;  // of one parameter, in one task

// Elements of the state that the layer has; throws std::invalid_argument on a size that is absurd.
int64_t checked_numel(const Triplets& t) {
  require(t.K > 0 && t.N > 0, "lora_A, lora_B: expected at least one column and one row");
  const int64_t a = checked_mul(t.r, t.K, "lora_A: r x K");
  const int64_t b = checked_mul(t.N, t.r, "lora_B: N x r");
  checked_mul(a, 64, "lora_A: bytes");
  checked_mul(b, 64, "lora_B: bytes");
  require(t.r == 0 || (t.lora_E && t.lora_A && t.lora_B), "lora_E, lora_A, lora_B: null pointer");
  return t.r + a + b;
}

int64_t task_rows(int64_t columns) { return std::max<int64_t>(1, kTaskElements / columns); }

// Tasks of a layer; how it is cut depends on its shape alone. Each task of lora_B gets r sums.
struct Plan {
  std::vector<ImportanceTask> tasks;
  std::vector<int64_t> first_sum, tasks_of_B;  // per layer
  std::vector<double> sums;
};

Plan make_plan(const ImportanceArgs& args) {
  Plan plan;
  int64_t state = 0, scores = 0, sums = 0;
  std::vector<int64_t> offsets;  // of each task's sums
  for (int64_t i = 0; i < args.count; ++i) {
    const Triplets& t = args.layers[i];
    const int64_t numel = checked_numel(t);
    require(numel <= args.state_len - state, "exp_avg_ipt, exp_avg_unc: shorter than the layers");
    plan.first_sum.push_back(sums);
    plan.tasks_of_B.push_back(0);
    for (int64_t row = 0, step = task_rows(t.K); row < t.r; row += step) {
      plan.tasks.push_back({i, false, row, std::min(t.r, row + step), state, nullptr});
      offsets.push_back(sums);
    }
    sums += t.r;
    for (int64_t row = 0, step = task_rows(std::max<int64_t>(t.r, 1)); t.r > 0 && row < t.N;
         row += step) {
      plan.tasks.push_back({i, true, row, std::min(t.N, row + step), state, nullptr});
      offsets.push_back(sums);
      sums += t.r;
      ++plan.tasks_of_B.back();
    }
    state += numel;
    scores += t.r;
  }
  require(state == args.state_len, "exp_avg_ipt, exp_avg_unc: longer than the layers");
  require(scores == args.scores_len, "scores: expected one per triplet");
  plan.sums.resize(static_cast<size_t>(sums));
  for (size_t i = 0; i < offsets.size(); ++i) plan.tasks[i].sums = plan.sums.data() + offsets[i];
  return plan;
}

void select(const float* scores, int64_t count, int64_t budget, bool threshold_ties,
            uint8_t* keep) {
  std::fill(keep, keep + count, budget >= count ? 1 : 0);
  if (budget >= count) return;
  std::vector<int64_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  const auto before = [&](int64_t a, int64_t b) {
    const float x = scores[a], y = scores[b];
    const bool x_nan = x != x, y_nan = y != y;
    if (x_nan != y_nan) return x_nan;
    return x > y || (!(x < y) && a < b);
  };
  std::nth_element(order.begin(), order.begin() + budget, order.end(), before);
  const float threshold = scores[order[budget]];
  const bool all_zero = std::all_of(scores, scores + count, [](float s) { return s == 0.0f; });
  for (int64_t i = 0; i < budget; ++i) keep[order[i]] = 1;
  if (!threshold_ties || all_zero) return;
  for (int64_t i = 0; i < count; ++i) keep[i] = !(scores[i] <= threshold);
}

void check_matrices(const GramArgs& args, bool backward) {
  require(args.threads >= 1, "threads: expected at least 1");
  for (int64_t i = 0; i < args.count; ++i) {
    const GramMatrix& m = args.matrices[i];
    const int64_t numel = checked_mul(m.r, m.length, "lora: r x length");
    checked_mul(numel, 64, "lora: bytes");
    checked_mul(checked_mul(m.r, m.r + 16, "residual: r x r"), 64, "residual: bytes");
    checked_mul(m.r, 1 << 16, "r");
    require(numel == 0 || (m.x && (m.grad || !backward)), "lora, grad: null pointer");
    require(m.r == 0 || m.residual, "residual: null pointer");
  }
}

}  // namespace

void adalora_importance(Isa isa, const ImportanceArgs& args) {
  const AdaLoraKernels& kernels = kernels_for(isa).adalora;
  require(args.threads >= 1, "threads: expected at least 1");
  require(args.state_len == 0 || (args.ipt && args.unc), "exp_avg_ipt, exp_avg_unc: null pointer");
  require(args.scores_len == 0 || args.scores, "scores: null pointer");
  const Plan plan = make_plan(args);
  kernels.importance(args, plan.tasks.data(), static_cast<int64_t>(plan.tasks.size()));
  float* score = args.scores;
  for (int64_t i = 0; i < args.count; ++i) {
    const Triplets& t = args.layers[i];
    const double* rows = plan.sums.data() + plan.first_sum[i];
    for (int64_t j = 0; j < t.r; ++j) {
      double column = 0.0;
      for (int64_t part = 1; part <= plan.tasks_of_B[i]; ++part) column += rows[part * t.r + j];
      *score++ = static_cast<float>(rows[j] + column / static_cast<double>(t.N));
    }
  }
}

void adalora_allocate(const float* scores, int64_t count, int64_t budget, bool threshold_ties,
                      const std::vector<Triplets>& layers, DType dtype, uint8_t* keep) {
  require(count >= 0 && budget >= 0, "scores, budget: expected no negative number");
  require(count == 0 || (scores && keep), "scores, keep: null pointer");
  int64_t total = 0;
  for (const Triplets& t : layers) {
    require(t.r >= 0 && t.r <= count - total, "lora_E: more elements than scores");
    require(t.r == 0 || t.lora_E, "lora_E: null pointer");
    total += t.r;
  }
  require(total == count, "lora_E: fewer elements than scores");
  select(scores, count, budget, threshold_ties, keep);
  const int64_t bytes = itemsize(dtype);
  for (const Triplets& t : layers) {
    for (int64_t j = 0; j < t.r; ++j) {
      if (!*keep++) std::memset(static_cast<char*>(t.lora_E) + j * bytes, 0, bytes);
    }
  }
}

void adalora_gram(Isa isa, const GramArgs& args) {
  check_matrices(args, false);
  require(args.count == 0 || args.norms, "norms: null pointer");
  kernels_for(isa).adalora.gram(args);
}

void adalora_gram_backward(Isa isa, const GramArgs& args) {
  check_matrices(args, true);
  kernels_for(isa).adalora.gram_backward(args);
}

}  // namespace peftkern
