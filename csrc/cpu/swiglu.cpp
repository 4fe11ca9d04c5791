// The gate of experts: argument checks, and rows on threads.
#include "peftkern/swiglu.h"

#include "kernels.h"
#include "peftkern/checks.h"
#include "tasks.h"

namespace peftkern {
namespace {

constexpr int64_t kTaskValues = 1 << 14;

template <class Args>
void run(const Args& args, const void* other, const char* missing,
         void (*kernel)(const Args& args, int64_t begin, int64_t end)) {
  require(args.threads >= 1, "threads: expected at least 1");
  const int64_t values = checked_mul(args.R, args.I, "R x I");
  checked_mul(values, 8, "R x I: bytes");
  require(values == 0 || args.u, "u: null pointer");
  require(values == 0 || other, missing);
  require(args.R == 0 || args.w, "w: null pointer");
  const int64_t rows = args.I < kTaskValues ? kTaskValues / (args.I + 1) + 1 : 1;
  parallel_for(args.threads, ceil_div(args.R, rows), [&](int64_t task, int) {
    kernel(args, task * rows, min64(args.R, (task + 1) * rows));
  });
}

}  // namespace

void swiglu_forward(Isa isa, const SwigluArgs& args) {
  run(args, args.a, "a: null pointer", kernels_for(isa).swiglu.forward);
}

void swiglu_backward(Isa isa, const SwigluBackwardArgs& args) {
  run(args, args.da, "da: null pointer", kernels_for(isa).swiglu.backward);
}

}  // namespace peftkern
