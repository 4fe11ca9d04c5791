// Runs independent tasks on OpenMP threads. The one place that knows about threads: kernels receive
// task indices. Torch-free.
#pragma once

#include <cstdint>

namespace peftkern {

// fn(context, task, thread) for every task in [0, tasks), thread in [0, threads). Tasks must not
// depend on one another; which thread takes which task is not fixed.
using TaskFn = void (*)(void* context, int64_t task, int thread);
void parallel_tasks(int threads, int64_t tasks, TaskFn fn, void* context);

// After fork() the OpenMP worker threads are gone but the runtime does not know: a child process
// must stay on one thread or it waits for them forever.
void set_fork_child();

}  // namespace peftkern
