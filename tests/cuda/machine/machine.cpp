// The machine behind cuda_cpu.h: runs a kernel's blocks one after another, each CUDA thread as a fibre.
//
// - Barriers and warp operations are meeting points that check who takes part; a kernel that breaks the rules ends the
//   program with the place. So do a deadlock and a launch outside the hardware's limits.
// - CUDA_CPU_ORDER chooses the schedule of threads and blocks: 0 upwards, 1 downwards, n > 1 shuffled with seed n.
// - Shared memory holds NaN bytes when a block starts.
// - Under ThreadSanitizer every CUDA thread is one of its threads, and only barriers and the launch order memory
//   (shuffles order nothing, as CUDA's guide says). At most about 100 threads a block: it has 255 in all.
//
// Build this file WITHOUT sanitizers, or its own bookkeeping would be reported; it tells them of the fibres through
// weak symbols.
#include <sys/mman.h>
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#if !defined(__x86_64__)
#error "the emulated device switches fibres in x86-64 assembly"
#endif

struct uint3 { unsigned x, y, z; };

extern "C" {
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void* __tsan_create_fiber(unsigned);
__attribute__((weak)) void __tsan_switch_to_fiber(void*, unsigned);
__attribute__((weak)) void __tsan_acquire(void*);
__attribute__((weak)) void __tsan_release(void*);
__attribute__((weak)) void __tsan_java_init(uintptr_t, uintptr_t);
__attribute__((weak)) void __tsan_java_alloc(uintptr_t, uintptr_t);
__attribute__((weak)) void __sanitizer_start_switch_fiber(void**, const void*, size_t);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
// Saves the stack pointer to *save and continues on the stack `to`.
void cuda_cpu_switch(void** save, void* to);
}

asm(R"(
.text
.globl cuda_cpu_switch
.type cuda_cpu_switch,@function
cuda_cpu_switch:
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
.size cuda_cpu_switch,.-cuda_cpu_switch
)");

namespace {

constexpr size_t STACK_BYTES = 128 * 1024;
constexpr unsigned SAVED_REGISTERS = 6;
constexpr unsigned WARP = 32;
constexpr unsigned TSAN_NO_SYNC = 1;  // a switch of fibres orders no memory
// Addresses that TSan sees as locks: two for the block's barrier, two for each of its 32 warps.
constexpr size_t SYNCS_PER_BLOCK = 2 + 2 * WARP;

enum class State { Ready, Waiting, Done };
// What a thread waits at; shuffles are told apart by their kind (1, 2, 3).
enum Meeting : unsigned { BLOCK_BARRIER = 0, WARP_BARRIER = 9 };

struct Fibre {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void* tsan = nullptr;
  void* asan = nullptr;
  uint3 index{};
  unsigned linear = 0;
  State state = State::Done;
  unsigned meeting = 0, mask = 0;
  const char* file = "?";
  int line = 0;
  // A lane can be one shuffle ahead of another, never two: so two slots for the values it offers.
  uint64_t offered[2] = {};
  unsigned shuffles = 0, block_barriers = 0, warp_barriers = 0;
};

struct Machine {
  uint3 grid{}, block{}, block_index{};
  std::vector<Fibre> fibres;
  Fibre* current = nullptr;
  unsigned alive = 0;
  size_t blocks_run = 0;
  void (*kernel)(void*) = nullptr;
  void* arguments = nullptr;
  char* dynamic_shared = nullptr;
  bool busy = false;
  // The scheduler's own context.
  void* stack_pointer = nullptr;
  void* tsan = nullptr;
  void* asan = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
  // The schedule.
  unsigned order = 0;
  std::mt19937 random;
  std::vector<uint64_t> syncs;
  size_t first_sync = 0;
} machine;

uint64_t launch_begin_sync, launch_end_sync;

[[noreturn]] void stop(const char* what, const Fibre* fibre) {
  const uint3 b = machine.block_index;
  fprintf(stderr, "emulated device: %s: block (%u,%u,%u) thread %u at %s:%d\n", what, b.x, b.y, b.z,
          fibre ? fibre->linear : 0, fibre ? fibre->file : "?", fibre ? fibre->line : 0);
  fflush(stderr);
  _Exit(99);
}

void acquire(void* address) { if (__tsan_acquire) __tsan_acquire(address); }
void release(void* address) { if (__tsan_release) __tsan_release(address); }

void switch_to_scheduler() {
  Fibre* fibre = machine.current;
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(machine.tsan, TSAN_NO_SYNC);
  if (__sanitizer_start_switch_fiber) {
    void** keep = fibre->state == State::Done ? nullptr : &fibre->asan;
    __sanitizer_start_switch_fiber(keep, machine.stack_bottom, machine.stack_size);
  }
  cuda_cpu_switch(&fibre->stack_pointer, machine.stack_pointer);
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(fibre->asan, &machine.stack_bottom, &machine.stack_size);
}

void resume(Fibre& fibre) {
  machine.current = &fibre;
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(fibre.tsan, TSAN_NO_SYNC);
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&machine.asan, fibre.stack, STACK_BYTES);
  cuda_cpu_switch(&machine.stack_pointer, fibre.stack_pointer);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(machine.asan, nullptr, nullptr);
}

// The first thing that a fibre runs.
void enter() {
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(nullptr, &machine.stack_bottom, &machine.stack_size);
  acquire(&launch_begin_sync);
  machine.kernel(machine.arguments);
  release(&launch_end_sync);
  machine.current->state = State::Done;
  machine.alive--;
  switch_to_scheduler();
  abort();
}

// One of two identities for each thread, in turn from block to block: with a single one, TSan would take two blocks'
// threads for one thread after another and miss races between blocks. Making an identity is slow, so they are kept.
void* tsan_identity(unsigned thread) {
  if (!__tsan_create_fiber) return nullptr;
  static std::vector<void*> identities[2];
  auto& ours = identities[machine.blocks_run & 1];
  while (ours.size() <= thread) ours.push_back(__tsan_create_fiber(0));
  return ours[thread];
}

void prepare(Fibre& fibre) {
  fibre.state = State::Ready;
  fibre.shuffles = fibre.block_barriers = fibre.warp_barriers = 0;
  fibre.asan = nullptr;
  void** top = (void**)(fibre.stack + STACK_BYTES);
  *--top = nullptr;  // keeps the stack aligned as after a call
  *--top = (void*)enter;
  fibre.stack_pointer = top - SAVED_REGISTERS;
  fibre.tsan = tsan_identity(fibre.linear);
}

void wait_at(unsigned meeting, unsigned mask, const char* file, int line) {
  Fibre* fibre = machine.current;
  if (!fibre) stop("called outside a kernel", nullptr);
  fibre->meeting = meeting;
  fibre->mask = mask;
  fibre->file = file;
  fibre->line = line;
  fibre->state = State::Waiting;
  switch_to_scheduler();
}

bool waits_in_warp(const Fibre& fibre) { return fibre.state == State::Waiting && fibre.meeting != BLOCK_BARRIER; }

// Lets go one warp whose lanes have all met; false where none of them waits at a warp operation.
bool release_warp(unsigned first) {
  auto& fibres = machine.fibres;
  const unsigned lanes = std::min<size_t>(WARP, fibres.size() - first);
  unsigned waiting = 0, wanted = 0;
  Fibre* any = nullptr;
  for (unsigned lane = 0; lane < lanes; lane++) {
    Fibre& fibre = fibres[first + lane];
    if (!waits_in_warp(fibre)) continue;
    waiting |= 1u << lane;
    wanted |= fibre.mask;
    any = &fibre;
  }
  if (!any) return false;
  if (lanes < WARP && wanted >> lanes) stop("warp operation names lanes past the end of the block", any);
  for (unsigned lane = 0; lane < lanes; lane++) {
    Fibre& fibre = fibres[first + lane];
    if (!(wanted >> lane & 1)) continue;
    if (fibre.state == State::Done) stop("warp operation names a lane that has exited", any);
    if (!waits_in_warp(fibre)) stop("warp operation names a lane that waits at __syncthreads", any);
    if (fibre.mask != any->mask || fibre.meeting != any->meeting || fibre.line != any->line)
      stop("lanes of one warp meet in different warp operations", &fibre);
    if (!(fibre.mask >> lane & 1)) stop("lane calls a warp operation whose mask leaves it out", &fibre);
  }
  for (unsigned lane = 0; lane < lanes; lane++)
    if (waiting >> lane & 1) fibres[first + lane].state = State::Ready;
  return true;
}

// Nothing can run: lets go the warps that have met, else the whole block at its barrier.
void release_meetings() {
  auto& fibres = machine.fibres;
  bool released = false;
  for (unsigned first = 0; first < fibres.size(); first += WARP) released |= release_warp(first);
  if (released) return;
  size_t at_barrier = 0;
  Fibre* any = nullptr;
  for (auto& fibre : fibres)
    if (fibre.state == State::Waiting) {
      at_barrier++;
      any = &fibre;
    }
  if (!any) stop("deadlock", nullptr);
  if (at_barrier != fibres.size()) stop("__syncthreads not reached by every thread of the block", any);
  for (auto& fibre : fibres)
    if (fibre.line != any->line) stop("threads meet at different __syncthreads", &fibre);
  for (auto& fibre : fibres) fibre.state = State::Ready;
}

// NaN bytes, stored without memset (TSan intercepts it).
void poison(char* begin, char* end) {
  for (volatile char* byte = begin; byte < end; byte++) *byte = (char)0xff;
}

// Poisons static shared memory and lets TSan forget what other blocks did there.
void poison_static_shared(char* begin, char* end) {
  poison(begin, end);
  if (!__tsan_java_alloc || begin >= end) return;
  static char* declared = nullptr;
  const uintptr_t from = (uintptr_t)begin & ~7ul, to = ((uintptr_t)end + 7) & ~7ul;
  if (!declared) {
    declared = begin;
    __tsan_java_init(from, to - from);
  }
  if (declared == begin) __tsan_java_alloc(from, to - from);
}

std::vector<unsigned> schedule(unsigned count) {
  std::vector<unsigned> order(count);
  for (unsigned i = 0; i < count; i++) order[i] = i;
  if (machine.order == 1) std::reverse(order.begin(), order.end());
  if (machine.order > 1) std::shuffle(order.begin(), order.end(), machine.random);
  return order;
}

// Stacks are kept for the next launch: making them is slow.
void make_fibres(unsigned count) {
  static std::vector<char*> stacks;
  while (stacks.size() < count) {
    void* stack = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) stop("no memory for the stacks of a block", nullptr);
    mprotect(stack, 4096, PROT_NONE);
    stacks.push_back((char*)stack);
  }
  machine.fibres.resize(count);
  for (unsigned i = 0; i < count; i++) machine.fibres[i].stack = stacks[i];
}

void run_block() {
  for (auto& fibre : machine.fibres) prepare(fibre);
  machine.alive = machine.fibres.size();
  while (machine.alive) {
    bool ran = false;
    for (unsigned i : schedule(machine.fibres.size()))
      if (machine.fibres[i].state == State::Ready) {
        ran = true;
        resume(machine.fibres[i]);
      }
    if (!ran && machine.alive) release_meetings();
  }
}

}  // namespace

extern "C" {

uint3 cuda_cpu_thread_index() { return machine.current->index; }
uint3 cuda_cpu_block_index() { return machine.block_index; }
uint3 cuda_cpu_block_size() { return machine.block; }
uint3 cuda_cpu_grid_size() { return machine.grid; }
unsigned cuda_cpu_lane() { return machine.current->linear % WARP; }
void* cuda_cpu_dynamic_shared() { return machine.dynamic_shared; }

// Two lock addresses in turn: a thread that is resumed late must not acquire what a quicker one has released at the
// NEXT barrier, or that false order would hide a race.
void cuda_cpu_block_barrier(const char* file, int line) {
  uint64_t* sync = &machine.syncs[machine.first_sync + (machine.current->block_barriers++ & 1)];
  release(sync);
  wait_at(BLOCK_BARRIER, 0, file, line);
  acquire(sync);
}

void cuda_cpu_warp_barrier(unsigned mask, const char* file, int line) {
  const size_t warp = machine.current->linear / WARP;
  uint64_t* sync = &machine.syncs[machine.first_sync + 2 + 2 * warp + (machine.current->warp_barriers++ & 1)];
  release(sync);
  wait_at(WARP_BARRIER, mask, file, line);
  acquire(sync);
}

uint64_t cuda_cpu_shuffle(unsigned kind, unsigned mask, uint64_t bits, unsigned source, const char* file, int line) {
  Fibre* fibre = machine.current;
  const unsigned slot = fibre->shuffles++ & 1, first = fibre->linear / WARP * WARP;
  fibre->offered[slot] = bits;
  wait_at(kind, mask, file, line);
  if (source >= WARP) return bits;
  if (!(mask >> source & 1) || first + source >= machine.fibres.size())
    stop("shuffle reads a lane outside its mask", fibre);
  return machine.fibres[first + source].offered[slot];
}

void cuda_cpu_run(uint3 grid, uint3 block, unsigned dynamic_shared, char* shared_begin, char* shared_end,
                  void (*kernel)(void*), void* arguments) {
  if (machine.busy) stop("one launch at a time", nullptr);
  const size_t threads = (size_t)block.x * block.y * block.z, blocks = (size_t)grid.x * grid.y * grid.z;
  if (!threads || threads > 1024 || block.z > 64 || !blocks || grid.y > 65535 || grid.z > 65535 ||
      dynamic_shared > 232448)
    stop("launch configuration out of range", nullptr);
  const char* order = getenv("CUDA_CPU_ORDER");
  machine.order = order ? atoi(order) : 0;
  machine.random.seed(machine.order);
  machine.busy = true;
  machine.grid = grid;
  machine.block = block;
  machine.kernel = kernel;
  machine.arguments = arguments;
  make_fibres(threads);
  for (unsigned i = 0; i < threads; i++) {
    machine.fibres[i].linear = i;
    machine.fibres[i].index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
  }
  const bool tsan = __tsan_release != nullptr;
  if (tsan) machine.tsan = __tsan_get_current_fiber();
  // Under TSan each block has locks of its own, or one block's barrier would seem to order another's memory.
  machine.syncs.assign(tsan ? blocks * SYNCS_PER_BLOCK : SYNCS_PER_BLOCK, 0);
  for (unsigned i : schedule(blocks)) {
    machine.block_index = {i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)};
    machine.first_sync = tsan ? (size_t)i * SYNCS_PER_BLOCK : 0;
    poison_static_shared(shared_begin, shared_end);
    if (dynamic_shared) {
      machine.dynamic_shared = (char*)malloc(dynamic_shared);
      if (!machine.dynamic_shared) stop("no memory for dynamic shared memory", nullptr);
      poison(machine.dynamic_shared, machine.dynamic_shared + dynamic_shared);
    }
    release(&launch_begin_sync);
    run_block();
    machine.blocks_run++;
    if (!tsan) free(machine.dynamic_shared);  // its accesses are not ordered before ours: TSan would report the free
    machine.dynamic_shared = nullptr;
  }
  acquire(&launch_end_sync);
  machine.current = nullptr;
  machine.busy = false;
}

}  // extern "C"
