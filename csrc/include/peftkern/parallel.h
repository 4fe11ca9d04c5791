// Runs independent tasks on the threads of the process's OpenMP runtime. The one place that knows
// about threads: kernels receive task indices. Torch-free.
#pragma once

#include <cstdint>

namespace peftkern {

// fn(context, task, thread) for every task in [0, tasks), thread in [0, threads). Tasks must not
// depend on one another; which thread takes which task is not fixed.
using TaskFn = void (*)(void* context, int64_t task, int thread);
void parallel_tasks(int threads, int64_t tasks, TaskFn fn, void* context);

// Finds that runtime now, not in the first call that needs threads. Throws std::runtime_error if
// the process has none and the system no libgomp.so.1.
void load_openmp();

// After fork() the OpenMP worker threads are gone but the runtime does not know: a child process
// must stay on one thread or it waits for them forever.
void set_fork_child();

}  // namespace peftkern
