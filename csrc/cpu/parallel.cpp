#include "peftkern/parallel.h"

#include <atomic>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace peftkern {
namespace {
std::atomic<bool> fork_child{false};
}

void set_fork_child() { fork_child.store(true); }

void parallel_tasks(int threads, int64_t tasks, TaskFn fn, void* context) {
  if (threads > tasks) threads = static_cast<int>(tasks);
#ifdef _OPENMP
  if (threads > 1 && !fork_child.load()) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) fn(context, task, omp_get_thread_num());
    return;
  }
#endif
  for (int64_t task = 0; task < tasks; ++task) fn(context, task, 0);
}

}  // namespace peftkern
