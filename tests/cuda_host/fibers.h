// The threads of one CUDA block as fibers of one host thread, which run in a chosen order and switch only where they
// wait for each other. A barrier that is missing therefore shows as a wrong result in some order, always the same one.
#pragma once
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <new>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace cuda_host {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 << 10;  // of address space; pages that are never touched cost nothing
constexpr size_t kGuardBytes = 64 << 10;   // the largest page size in use

enum class Order : int { ascending = 0, descending = 1, random = 2 };

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Fiber {
  jmp_buf context;
  bool started = false;
  State state = State::done;
  int line = 0;                 // where it waits
  unsigned int mask = 0;        // for which lanes, at a warp barrier
  unsigned long long slot = 0;  // what it shows to its warp in a shuffle
};

class Block {
 public:
  // Runs body(thread) as `threads` fibers until all have returned; thread numbers are given to `enter` before each
  // stretch that a fiber runs. Returns an empty string, or what went wrong.
  template <typename Body, typename Enter>
  std::string run(int threads, Order order, std::mt19937& random, const Body& body, const Enter& enter) {
    reserve(threads);
    threads_ = threads;
    call_ = [](const void* f, int thread) { (*static_cast<const Body*>(f))(thread); };
    body_ = &body;
    std::vector<int> turns(threads);
    std::iota(turns.begin(), turns.end(), 0);
    if (order == Order::descending) std::reverse(turns.begin(), turns.end());
    for (int t = 0; t < threads; ++t) fibers_[t].state = State::ready;

    for (bool running = true; running;) {
      if (order == Order::random) std::shuffle(turns.begin(), turns.end(), random);
      for (int t : turns) {
        if (fibers_[t].state != State::ready) continue;
        enter(t);
        resume(t);
        if (!error_.empty()) return abandon();
      }
      running = release_warps();
      if (running) continue;
      running = release_block();
      if (!error_.empty()) return abandon();
    }
    return "";
  }

  // Ends the run from within a fiber, which does not go on.
  [[noreturn]] void fail(const std::string& error) {
    error_ = error;
    _longjmp(scheduler_, 1);
  }

  Fiber& current() { return fibers_[current_]; }
  int current_thread() const { return current_; }

  void block_barrier(int line) { wait(State::at_block_barrier, line); }

  void warp_barrier(unsigned int mask, int line) {
    current().mask = mask;
    wait(State::at_warp_barrier, line);
  }

  // What a lane of the current warp shows, or null when there is no such lane in the mask.
  const unsigned long long* shown(int lane, unsigned int mask) const {
    const int thread = current_ / kWarp * kWarp + lane;
    const bool there = thread < threads_ && (mask >> lane & 1u) && fibers_[thread].state != State::done;
    return there ? &fibers_[thread].slot : nullptr;
  }

 private:
  // Fibers stuck in the middle of a kernel are of no more use: the next run starts new ones on their stacks.
  std::string abandon() {
    fibers_.clear();
    return std::exchange(error_, "");
  }

  void reserve(int threads) {
    const size_t before = stacks_.size();
    for (size_t t = before; t < static_cast<size_t>(threads); ++t) {
      char* stack = static_cast<char*>(mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
      if (stack == MAP_FAILED) throw std::bad_alloc();
      mprotect(stack, kGuardBytes, PROT_NONE);  // a kernel that needs more stack faults instead of writing next door
      stacks_.push_back(stack + kGuardBytes);
    }
    if (fibers_.size() < stacks_.size()) fibers_.resize(stacks_.size());
  }

  // ucontext makes the stack; every later switch is a setjmp and a longjmp, which unlike swapcontext call no kernel.
  __attribute__((noinline)) void resume(int thread) {
    current_ = thread;
    Fiber& fiber = fibers_[thread];
    if (_setjmp(scheduler_)) return;
    if (fiber.started) _longjmp(fiber.context, 1);
    fiber.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks_[thread];
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    starting_ = this;
    makecontext(&context, reinterpret_cast<void (*)()>(&Block::main), 0);
    setcontext(&context);
  }

  __attribute__((noinline)) void yield() {
    if (_setjmp(current().context) == 0) _longjmp(scheduler_, 1);
  }

  // A fiber outlives its kernel, so that stacks are made once.
  static void main() {
    Block* block = starting_;
    for (;;) {
      block->call_(block->body_, block->current_);
      block->current().state = State::done;
      block->yield();
    }
  }

  void wait(State state, int line) {
    current().state = state;
    current().line = line;
    yield();
  }

  // Lets every group of lanes go on that wait for each other, and all are there. As on the device, lanes that have left
  // the kernel are not waited for.
  bool release_warps() {
    bool any = false;
    for (int first = 0; first < threads_; first += kWarp) {
      const int lanes = std::min(kWarp, threads_ - first);
      for (int lane = 0; lane < lanes; ++lane) {
        if (fibers_[first + lane].state != State::at_warp_barrier) continue;
        const unsigned int mask = fibers_[first + lane].mask;
        const auto in_group = [&](int l) { return (mask >> l & 1u) && fibers_[first + l].state != State::done; };
        bool all = mask >> lane & 1u;
        for (int l = 0; l < lanes; ++l) {
          const Fiber& other = fibers_[first + l];
          if (in_group(l)) all = all && other.state == State::at_warp_barrier && other.mask == mask;
        }
        for (int l = 0; all && l < lanes; ++l) {
          if (in_group(l)) fibers_[first + l].state = State::ready;
        }
        any = any || all;
      }
    }
    return any;
  }

  // Called when no fiber can run: lets all go on if they have met at one block barrier. False when none is left.
  bool release_block() {
    const Fiber* first = nullptr;
    for (int t = 0; t < threads_; ++t) {
      const Fiber& fiber = fibers_[t];
      if (fiber.state == State::done) continue;
      first = first ? first : &fiber;
      const std::string where = "thread " + std::to_string(t) + " waits at line " + std::to_string(fiber.line);
      if (fiber.state == State::at_warp_barrier) error_ = where + " for lanes of its warp that do not come";
      if (fiber.state == State::at_block_barrier && first->line != fiber.line) {
        error_ = where + ", but others of its block at the barrier of line " + std::to_string(first->line);
      }
    }
    for (int t = 0; t < threads_; ++t) {
      if (fibers_[t].state == State::at_block_barrier) fibers_[t].state = State::ready;
    }
    return first;
  }

  static inline Block* starting_ = nullptr;

  std::vector<Fiber> fibers_;
  std::vector<char*> stacks_;
  jmp_buf scheduler_;
  int threads_ = 0;
  int current_ = 0;
  void (*call_)(const void*, int) = nullptr;
  const void* body_ = nullptr;
  std::string error_;
};

}  // namespace cuda_host
