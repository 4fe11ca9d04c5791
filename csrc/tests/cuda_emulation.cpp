// The scheduler behind cuda_emulation.h: fibers, barriers, collectives, shared memory.
#include "cuda_emulation.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#ifndef __x86_64__
#include <ucontext.h>
#endif
#ifdef PEFTKERN_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

__thread uint3 threadIdx, blockIdx, blockDim, gridDim;

#ifdef __x86_64__
// Saves the registers that a call preserves, and the stack. swapcontext does that too, with a
// system call that costs more than all the rest.
extern "C" void peftkern_switch_stack(void** save, void* restore);
asm(R"(
.text
.hidden peftkern_switch_stack
.globl peftkern_switch_stack
.type peftkern_switch_stack, @function
peftkern_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size peftkern_switch_stack, . - peftkern_switch_stack
)");
#endif

namespace peftkern {
namespace emulation {
namespace {

constexpr size_t kStackBytes = 256 * 1024;  // only touched pages take memory
constexpr size_t kGuardBytes = 4096;

class Stack {
 public:
  Stack() {
    void* p =
        mmap(nullptr, kGuardBytes + kStackBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) std::abort();
    base_ = static_cast<char*>(p);
    if (mprotect(bottom(), kStackBytes, PROT_READ | PROT_WRITE) != 0) std::abort();
  }
  ~Stack() { munmap(base_, kGuardBytes + kStackBytes); }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;
  char* bottom() const { return base_ + kGuardBytes; }

 private:
  char* base_;
};

// One side of a switch: a stack pointer, and where AddressSanitizer believes the stack to be.
struct Context {
#ifdef __x86_64__
  void* stack_pointer = nullptr;
#else
  ucontext_t registers;
#endif
  const void* bottom = nullptr;
  size_t size = 0;
};

void arrived(void* fake_stack, Context* from) {
#ifdef PEFTKERN_ASAN
  __sanitizer_finish_switch_fiber(fake_stack, from ? &from->bottom : nullptr,
                                  from ? &from->size : nullptr);
#else
  (void)fake_stack;
  (void)from;
#endif
}

// `learn` is whose stack limits are unknown until somebody comes from it.
void switch_context(Context& from, Context& to, Context* learn) {
  void* fake_stack = nullptr;
#ifdef PEFTKERN_ASAN
  __sanitizer_start_switch_fiber(&fake_stack, to.bottom, to.size);
#endif
#ifdef __x86_64__
  peftkern_switch_stack(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.registers, &to.registers);
#endif
  arrived(fake_stack, learn);
}

struct Copy {
  void* destination;
  const void* source;
  int bytes, total;
};

// Accumulators of products in flight, by their registers.
struct Sum {
  float* d;
  int users;
  std::vector<float> value;
};

struct Thread {
  Stack stack;
  Context context;
  bool started = false, done = false;
  bool (*ready)(const void*) = nullptr;  // null: can go on
  const void* state = nullptr;
  const char* what = nullptr;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
  bool copies_fenced = true;  // those that have arrived
  std::vector<Product> open_products;
  std::deque<std::vector<Product>> product_groups;
  std::deque<Sum> sums;
  bool products_fenced = false;
};

struct Barrier {
  int arrived = 0, line = 0;
  uint64_t generation = 0;
};

struct Collective {
  uint32_t mask = 0;
  Run run = nullptr;
  int arrived = 0;
  uint64_t generation = 0;
  void* args[128] = {};
};

struct Segment {
  const void* key;
  void* data;
  size_t bytes;
  uint32_t address;
};

struct Machine {
  std::deque<Thread> threads;  // reused by every block; never moved
  Context scheduler;
  int current = -1, count = 0;
  const std::function<void()>* body = nullptr;
  uint3 block{1, 1, 1};
  Barrier barrier;
  std::deque<Collective> warps[32], warpgroups[8];  // one for each mask in use
  std::vector<Segment> shared;                      // the dynamic part, then static objects
  bool unfenced_barrier = false;                    // one that unfenced copies have passed
  uint32_t next_address = 0;
  bool waited = false;  // for the kernel before
};

struct Kernel {
  dim3 grid, block;
  size_t dynamic_shared_bytes;
  std::function<void()> body;
  bool dependent;
};

// While a kernel waits for the one before, that one runs on a machine of its own.
struct Host {
  std::deque<Machine> machines;  // never moved
  size_t running = 0;            // of them
  std::deque<Kernel> deferred;
  uint32_t seed = 0;
  std::mt19937 rng;
};

Host& host() {
  static thread_local Host instance;
  return instance;
}

Machine& machine() { return host().machines[host().running - 1]; }

std::string name_of(const Machine& m, int thread) {
  const unsigned x = static_cast<unsigned>(thread) % m.block.x;
  const unsigned y = static_cast<unsigned>(thread) / m.block.x % m.block.y;
  const unsigned z = static_cast<unsigned>(thread) / m.block.x / m.block.y;
  return "thread (" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) +
         ") of block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
         std::to_string(blockIdx.z) + ")";
}

bool copies_in_flight(Thread& self) {
  bool any = !self.open.empty();
  for (const std::vector<Copy>& group : self.groups) any = any || !group.empty();
  self.groups.clear();
  return any;
}

bool products_in_flight(Thread& self) {
  const bool any = !self.open_products.empty() || !self.sums.empty();
  self.open_products.clear();
  self.product_groups.clear();
  self.sums.clear();
  return any;
}

// Everything a fiber runs starts here; a finished fiber waits to run a thread of the next block.
[[noreturn]] void fiber_main() {
  arrived(nullptr, &machine().scheduler);
  for (;;) {
    Machine& m = machine();
    Thread& self = m.threads[static_cast<size_t>(m.current)];
    (*m.body)();
    if (copies_in_flight(self)) fail("returned without waiting for its asynchronous copies");
    if (products_in_flight(self)) fail("returned without waiting for its products");
    self.done = true;
    switch_context(self.context, m.scheduler, &m.scheduler);
  }
}

void prepare(Thread& thread) {
  thread.done = false;
  thread.ready = nullptr;
  thread.copies_fenced = true;
  thread.products_fenced = false;
  if (thread.started) return;
  thread.started = true;
  thread.context.bottom = thread.stack.bottom();
  thread.context.size = kStackBytes;
#ifdef __x86_64__
  // As if called: fiber_main finds a return address of 0 above a 16-byte boundary.
  void** top = reinterpret_cast<void**>(thread.stack.bottom() + kStackBytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  thread.context.stack_pointer = top;
#else
  getcontext(&thread.context.registers);
  thread.context.registers.uc_stack.ss_sp = thread.stack.bottom();
  thread.context.registers.uc_stack.ss_size = kStackBytes;
  thread.context.registers.uc_link = nullptr;
  makecontext(&thread.context.registers, reinterpret_cast<void (*)()>(&fiber_main), 0);
#endif
}

[[noreturn]] void report_deadlock(const Machine& m) {
  std::fprintf(stderr, "cuda emulation: no thread can go on\n");
  int shown = 0;
  std::string last;
  for (int i = 0; i < m.count; ++i) {
    const Thread& thread = m.threads[static_cast<size_t>(i)];
    const std::string state = thread.done ? "has returned" : std::string("waits at ") + thread.what;
    if (state == last) continue;  // one line for neighbors in the same state
    last = state;
    if (++shown <= 20) std::fprintf(stderr, "  %s %s\n", name_of(m, i).c_str(), state.c_str());
  }
  std::abort();
}

void order(std::vector<int64_t>& turns) {
  Host& h = host();
  std::iota(turns.begin(), turns.end(), 0);
  if (h.seed == 1) std::reverse(turns.begin(), turns.end());
  if (h.seed > 1) std::shuffle(turns.begin(), turns.end(), h.rng);
}

void poison(const Segment& segment) { std::memset(segment.data, 0xff, segment.bytes); }

void add_segment(Machine& m, const void* key, size_t bytes) {
  Segment segment{key, nullptr, bytes, m.next_address};
  if (posix_memalign(&segment.data, 1024, bytes ? bytes : 1) != 0) std::abort();
  m.next_address += static_cast<uint32_t>((bytes + 1024) / 1024 * 1024);
  m.shared.push_back(segment);
  poison(segment);
}

void run_block(Machine& m, std::vector<int64_t>& turns) {
  for (const Segment& segment : m.shared) poison(segment);
  m.barrier = Barrier{};
  m.unfenced_barrier = false;
  for (int i = 0; i < m.count; ++i) prepare(m.threads[static_cast<size_t>(i)]);
  for (int left = m.count; left > 0;) {
    bool moved = false;
    order(turns);
    for (const int64_t i : turns) {
      Thread& thread = m.threads[static_cast<size_t>(i)];
      if (thread.done || (thread.ready && !thread.ready(thread.state))) continue;
      moved = true;
      thread.ready = nullptr;
      const unsigned index = static_cast<unsigned>(i);
      m.current = static_cast<int>(i);
      threadIdx = {index % m.block.x, index / m.block.x % m.block.y, index / m.block.x / m.block.y};
      switch_context(m.scheduler, thread.context, nullptr);
      left -= thread.done;
    }
    if (!moved) report_deadlock(m);
  }
}

// The last kernel that is deferred; those before it run where it waits for them.
void run_last() {
  Host& h = host();
  const Kernel kernel = std::move(h.deferred.back());
  h.deferred.pop_back();
  const uint3 outer[] = {threadIdx, blockIdx, blockDim, gridDim};
  if (++h.running > h.machines.size()) h.machines.emplace_back();
  Machine& m = machine();
  m.body = &kernel.body;
  m.block = {kernel.block.x, kernel.block.y, kernel.block.z};
  m.count = static_cast<int>(m.block.x * m.block.y * m.block.z);
  m.waited = false;
  const size_t count = static_cast<size_t>(m.count);
  if (m.threads.size() < count) m.threads.resize(count);
  m.next_address = kSharedBase;
  add_segment(m, nullptr, kernel.dynamic_shared_bytes);
  blockDim = m.block;
  gridDim = {kernel.grid.x, kernel.grid.y, kernel.grid.z};

  const dim3 grid = kernel.grid;
  std::vector<int64_t> turns(count), blocks(size_t{grid.x} * grid.y * grid.z);
  order(blocks);
  for (const int64_t i : blocks) {
    const uint64_t index = static_cast<uint64_t>(i);
    blockIdx = {static_cast<unsigned>(index % grid.x),
                static_cast<unsigned>(index / grid.x % grid.y),
                static_cast<unsigned>(index / grid.x / grid.y)};
    run_block(m, turns);
  }
  if (kernel.dependent && !m.waited) fail("the kernel has not waited for the one before it");
  for (const Segment& segment : m.shared) std::free(segment.data);
  m.shared.clear();
  m.body = nullptr;
  --h.running;
  threadIdx = outer[0], blockIdx = outer[1], blockDim = outer[2], gridDim = outer[3];
}

struct Generation {
  const uint64_t* now;
  uint64_t then;
};
bool has_moved_on(const void* p) {
  const auto* generation = static_cast<const Generation*>(p);
  return *generation->now != generation->then;
}

}  // namespace

void set_schedule(uint32_t seed) {
  host().seed = seed;
  host().rng.seed(seed);
}

void fail(const char* message) {
  const std::string name = host().running ? name_of(machine(), machine().current) : "the host";
  std::fprintf(stderr, "cuda emulation: %s: %s\n", name.c_str(), message);
  std::abort();
}

cudaError_t run(dim3 grid, dim3 block, size_t dynamic_shared_bytes,
                const std::function<void()>& body) {
  const cudaError_t error = run_later(grid, block, dynamic_shared_bytes, body, false);
  if (error == cudaSuccess) run_deferred();
  return error;
}

cudaError_t run_later(dim3 grid, dim3 block, size_t dynamic_shared_bytes,
                      const std::function<void()>& body, bool dependent) {
  const uint64_t count = uint64_t{block.x} * block.y * block.z;
  if (count == 0 || count > 1024 || block.z > 64 || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
      grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  if (dynamic_shared_bytes > kMaxSharedBytes) return cudaErrorInvalidValue;
  if (host().running) fail("a kernel launches a kernel");
  if (count % 32) fail("blocks must be whole warps: collectives name all 32 lanes");
  if (!dependent) run_deferred();
  host().deferred.push_back({grid, block, dynamic_shared_bytes, body, dependent});
  return cudaSuccess;
}

void run_deferred() {
  if (!host().deferred.empty()) run_last();
}

void wait_for_preceding() {
  machine().waited = true;
  run_deferred();
}

void wait(bool (*ready)(const void*), const void* state, const char* what) {
  Machine& m = machine();
  Thread& self = m.threads[static_cast<size_t>(m.current)];
  self.ready = ready;
  self.state = state;
  self.what = what;
  switch_context(self.context, m.scheduler, &m.scheduler);
}

void barrier(int line) {
  Machine& m = machine();
  Barrier& b = m.barrier;
  if (b.arrived == 0) b.line = line;
  if (b.line != line) fail("__syncthreads is reached at different lines");
  if (!m.threads[static_cast<size_t>(m.current)].copies_fenced) m.unfenced_barrier = true;
  const Generation mine{&b.generation, b.generation};
  if (++b.arrived == m.count) {
    b.arrived = 0;
    ++b.generation;
    return;
  }
  wait(has_moved_on, &mine, "__syncthreads");
}

void collective(int width, uint32_t mask, Run run, void* args, const char* what) {
  Machine& m = machine();
  const int group = m.current / width, lane = m.current % width;
  if (width == 32 && !(mask >> lane & 1)) fail("a lane is not in the mask that it names");
  if ((group + 1) * width > m.count) fail("a warpgroup needs 128 threads");
  std::deque<Collective>& groups = (width == 32 ? m.warps : m.warpgroups)[group];
  auto found = std::find_if(groups.begin(), groups.end(),
                            [&](const Collective& c) { return c.mask == mask; });
  if (found == groups.end()) {
    found = groups.emplace(groups.end());
    found->mask = mask;
  }
  Collective& c = *found;
  if (c.arrived == 0) c.run = run;
  if (c.run != run) fail("lanes of a warp have reached different instructions");
  c.args[lane] = args;
  const Generation mine{&c.generation, c.generation};
  if (++c.arrived == (width == 32 ? __builtin_popcount(mask) : width)) {
    run(c.args, width);
    std::fill(c.args, c.args + width, nullptr);
    c.arrived = 0;
    ++c.generation;
    return;
  }
  wait(has_moved_on, &mine, what);
}

void* dynamic_shared() { return machine().shared[0].data; }

void* static_shared(const void* key, size_t bytes) {
  Machine& m = machine();
  for (const Segment& segment : m.shared) {
    if (segment.key == key) return segment.data;
  }
  add_segment(m, key, bytes);
  return m.shared.back().data;
}

uint32_t shared_address(const void* pointer) {
  const uintptr_t p = reinterpret_cast<uintptr_t>(pointer);
  for (const Segment& segment : machine().shared) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(segment.data);
    if (p >= begin && p <= begin + segment.bytes) {
      return segment.address + static_cast<uint32_t>(p - begin);
    }
  }
  fail("the address of something that is not shared memory");
}

void* shared_pointer(uint32_t address) {
  for (const Segment& segment : machine().shared) {
    if (address >= segment.address && address - segment.address <= segment.bytes) {
      return static_cast<char*>(segment.data) + (address - segment.address);
    }
  }
  fail("an address outside shared memory");
}

void defer_copy(void* destination, const void* source, int bytes, int total) {
  Machine& m = machine();
  if (bytes < 0 || bytes > total) fail("an asynchronous copy takes more bytes than it has");
  const uintptr_t both =
      reinterpret_cast<uintptr_t>(destination) | (bytes ? reinterpret_cast<uintptr_t>(source) : 0);
  if (both % static_cast<uintptr_t>(total)) fail("an asynchronous copy is not aligned");
  shared_address(destination);  // fails unless it is shared memory
  std::memset(destination, 0xff, static_cast<size_t>(total));
  m.threads[static_cast<size_t>(m.current)].open.push_back({destination, source, bytes, total});
}

void commit_copies() {
  Machine& m = machine();
  Thread& self = m.threads[static_cast<size_t>(m.current)];
  self.groups.push_back(std::move(self.open));
  self.open.clear();
}

void wait_copies(int groups_left) {
  Machine& m = machine();
  Thread& self = m.threads[static_cast<size_t>(m.current)];
  while (self.groups.size() > static_cast<size_t>(groups_left)) {
    if (!self.groups.front().empty()) self.copies_fenced = false;
    for (const Copy& copy : self.groups.front()) {
      char* to = static_cast<char*>(copy.destination);
      if (copy.bytes) std::memcpy(to, copy.source, static_cast<size_t>(copy.bytes));
      std::memset(to + copy.bytes, 0, static_cast<size_t>(copy.total - copy.bytes));
    }
    self.groups.pop_front();
  }
}

void fence_copies() {
  Machine& m = machine();
  m.threads[static_cast<size_t>(m.current)].copies_fenced = true;
}

void fence_products() {
  Machine& m = machine();
  m.threads[static_cast<size_t>(m.current)].products_fenced = true;
}

void issue_product(const Product& share) {
  Machine& m = machine();
  Thread& self = m.threads[static_cast<size_t>(m.current)];
  if (!self.products_fenced) fail("a product without wgmma.fence before it");
  if (m.unfenced_barrier) {
    fail("a product reads shared memory: copies passed a barrier without fence.proxy.async");
  }
  auto sum = std::find_if(self.sums.begin(), self.sums.end(),
                          [&](const Sum& s) { return s.d == share.d; });
  if (sum == self.sums.end()) {
    sum = self.sums.insert(sum, {share.d, 0, {share.d, share.d + share.count}});
    std::memset(static_cast<void*>(share.d), 0xff, sizeof(float) * sum->value.size());
  }
  ++sum->users;
  self.open_products.push_back(share);
}

void commit_products() {
  Machine& m = machine();
  Thread& self = m.threads[static_cast<size_t>(m.current)];
  self.product_groups.push_back(std::move(self.open_products));
  self.open_products.clear();
  self.products_fenced = false;
}

void wait_products(int groups_left) {
  struct Waiting {
    Thread* thread;
    int groups_left;
  };
  Machine& m = machine();
  Waiting mine{&m.threads[static_cast<size_t>(m.current)], groups_left};
  const auto retire = [](void* const* args, int width) {
    const auto thread = [&](int lane) { return static_cast<Waiting*>(args[lane])->thread; };
    const size_t left = static_cast<size_t>(static_cast<Waiting*>(args[0])->groups_left);
    while (thread(0)->product_groups.size() > left) {
      const size_t products = thread(0)->product_groups.front().size();
      for (size_t i = 0; i < products; ++i) {
        const Product* shares[128];
        float* sums[128];
        std::deque<Sum>::iterator found[128];
        for (int lane = 0; lane < width; ++lane) {
          std::deque<Sum>& all = thread(lane)->sums;
          if (thread(lane)->product_groups.empty() ||
              thread(lane)->product_groups.front().size() != products) {
            fail("lanes of a warpgroup have issued different products");
          }
          shares[lane] = &thread(lane)->product_groups.front()[i];
          found[lane] = std::find_if(all.begin(), all.end(),
                                     [&](const Sum& s) { return s.d == shares[lane]->d; });
          sums[lane] = found[lane]->value.data();
        }
        shares[0]->run(shares, sums);
        for (int lane = 0; lane < width; ++lane) {
          if (--found[lane]->users) continue;
          std::copy(found[lane]->value.begin(), found[lane]->value.end(), found[lane]->d);
          thread(lane)->sums.erase(found[lane]);
        }
      }
      for (int lane = 0; lane < width; ++lane) thread(lane)->product_groups.pop_front();
    }
  };
  collective(128, 0, retire, &mine, "wgmma.wait_group");
}

}  // namespace emulation
}  // namespace peftkern
