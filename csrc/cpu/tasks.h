// Scratch memory and tasks on threads, for kernels and for the code that cuts their work. All in an
// anonymous namespace: each instruction set gets its own copy (see simd.h).
#pragma once

#include "peftkern/base.h"
#include "peftkern/parallel.h"

namespace peftkern {
namespace {

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Scratch {
  explicit Scratch(int64_t bytes) : data(scratch_allocate(bytes)) {}
  ~Scratch() { scratch_free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* floats() const { return static_cast<float*>(data); }
  void* data;
};

// fn(task, thread) for every task in [0, tasks); see parallel_tasks.
template <class Fn>
void parallel_for(int threads, int64_t tasks, const Fn& fn) {
  parallel_tasks(
      threads, tasks,
      [](void* context, int64_t task, int thread) {
        (*static_cast<const Fn*>(context))(task, thread);
      },
      const_cast<Fn*>(&fn));
}

}  // namespace
}  // namespace peftkern
