#include "peftkern/parallel.h"

#include <dlfcn.h>

#include <atomic>
#include <stdexcept>
#include <string>

namespace peftkern {
namespace {

std::atomic<bool> fork_child{false};

// GNU's entry points of OpenMP, which LLVM's and Intel's runtimes have, too. Looked up, not linked:
// the runtime has to be the one that torch has loaded, for another would have threads of its own.
// -fopenmp links the compiler's instead, and auditwheel then packs a copy of that into the wheel.
struct OpenMP {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
  int (*thread_num)();

  OpenMP() {
    void* scope = RTLD_DEFAULT;  // torch loads its runtime for everybody, before this module
    if (!dlsym(scope, "GOMP_parallel")) {
      scope = dlopen("libgomp.so.1", RTLD_NOW);
      if (!scope) throw std::runtime_error(std::string("no OpenMP runtime: ") + dlerror());
    }
    find(parallel, scope, "GOMP_parallel");
    find(thread_num, scope, "omp_get_thread_num");
  }

  template <typename Function>
  static void find(Function& function, void* scope, const char* name) {
    function = reinterpret_cast<Function>(dlsym(scope, name));
    if (!function) throw std::runtime_error(std::string("the OpenMP runtime has no ") + name);
  }
};

const OpenMP& openmp() {
  static const OpenMP instance;
  return instance;
}

// `omp parallel for schedule(dynamic, 1)`
struct Loop {
  TaskFn fn;
  void* context;
  int64_t tasks;
  alignas(64) std::atomic<int64_t> next{0};  // on a cache line of its own: all threads write it
};

void run_tasks(void* data) noexcept {
  Loop& loop = *static_cast<Loop*>(data);
  const int thread = openmp().thread_num();
  for (;;) {
    const int64_t task = loop.next.fetch_add(1, std::memory_order_relaxed);
    if (task >= loop.tasks) return;
    loop.fn(loop.context, task, thread);
  }
}

}  // namespace

void load_openmp() { openmp(); }

void set_fork_child() { fork_child.store(true); }

void parallel_tasks(int threads, int64_t tasks, TaskFn fn, void* context) {
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads > 1 && !fork_child.load()) {
    Loop loop{fn, context, tasks};
    openmp().parallel(run_tasks, &loop, static_cast<unsigned>(threads), 0);
    return;
  }
  for (int64_t task = 0; task < tasks; ++task) fn(context, task, 0);
}

}  // namespace peftkern
