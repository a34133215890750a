// CUDA's threads on a CPU, for kernels compiled with MEGAFAB_EMULATE: the arithmetic, the indices and the
// barriers of the real sources, where there is no GPU to run them.
//
// Blocks run one after another. The threads of a block are fibers that run in turn, each as far as its next
// barrier or shuffle; a second order of turns (EMULATOR_ORDER=reverse) gives other results where a barrier is
// missing. A barrier that only some threads of a block reach ends in an exception, which a GPU would hang at.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#undef __restrict__
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(emulator::shared.data())

namespace emulator {

constexpr int kWarpSize = 32;
constexpr int kMultiprocessors = 2;  // few, so that small tests too have blocks that take several rows
constexpr size_t kStack = 128 << 10;

struct Fiber {
  ucontext_t context;  // to begin with
  jmp_buf place;       // to go on with: unlike swapcontext it asks nothing of the kernel
  bool begun;
  enum { ready, at_block, at_warp, done } state;
  uint3 index;
  int turn;  // which of the two slots of its warp the next shuffle uses
};

inline std::vector<Fiber> fibers;
inline std::vector<char> shared;
inline std::vector<uint64_t> slots;  // [warp][turn][lane]
inline jmp_buf scheduler;
inline Fiber* running = nullptr;
inline const std::function<void()>* body = nullptr;
inline uint3 block_index;
inline dim3 block_dim, grid_dim;

inline void enter() {
  (*body)();
  running->state = Fiber::done;
  _longjmp(scheduler, 1);
}

inline void wait(decltype(Fiber::state) at) {
  running->state = at;
  if (!_setjmp(running->place)) _longjmp(scheduler, 1);
}

inline void resume(Fiber& f) {
  running = &f;
  if (_setjmp(scheduler)) return;
  if (f.begun) _longjmp(f.place, 1);
  f.begun = true;
  setcontext(&f.context);
}

inline char* stacks(size_t count) {
  static char* memory = nullptr;
  static size_t size = 0;
  if (count > size) {
    memory = static_cast<char*>(
        mmap(nullptr, count * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (memory == MAP_FAILED) throw std::runtime_error("emulator: no memory for stacks");
    size = count;
  }
  return memory;
}

// Lets those go on who wait for each other; whether any does.
inline bool release(int warps) {
  bool progress = false, all = true, any = false;
  for (const Fiber& f : fibers) {
    any |= f.state == Fiber::at_block;
    all &= f.state == Fiber::at_block || f.state == Fiber::done;
  }
  if (any && all) {
    for (Fiber& f : fibers) {
      if (f.state == Fiber::done) throw std::runtime_error("emulator: __syncthreads after a thread has returned");
      f.state = Fiber::ready;
    }
    return true;
  }
  for (int warp = 0; warp < warps; ++warp) {
    const auto begin = fibers.begin() + warp * kWarpSize;
    const auto end = fibers.begin() + std::min<size_t>(fibers.size(), (warp + 1) * kWarpSize);
    if (std::all_of(begin, end, [](const Fiber& f) { return f.state == Fiber::at_warp; })) {
      std::for_each(begin, end, [](Fiber& f) { f.state = Fiber::ready; });
      progress = true;
    }
  }
  return progress;
}

inline void run_block() {
  const int warps = (fibers.size() + kWarpSize - 1) / kWarpSize;
  const char* order = std::getenv("EMULATOR_ORDER");
  const bool reverse = order && std::strcmp(order, "reverse") == 0;
  for (;;) {
    bool ran = false, left = false;
    for (size_t turn = 0; turn < fibers.size(); ++turn) {
      Fiber& f = fibers[reverse ? fibers.size() - 1 - turn : turn];
      if (f.state == Fiber::ready) {
        resume(f);
        ran = true;
      }
      left |= f.state != Fiber::done;
    }
    if (!left) return;
    if (!release(warps) && !ran) throw std::runtime_error("emulator: only some threads reached a barrier");
  }
}

inline void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  const size_t threads = size_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024) throw std::runtime_error("emulator: a block of " + std::to_string(threads));
  if (shared_bytes > 232448) throw std::runtime_error("emulator: too much shared memory");
  char* memory = stacks(threads);
  fibers.resize(threads);
  slots.assign((threads + kWarpSize - 1) / kWarpSize * 2 * kWarpSize, 0);
  body = &kernel, block_dim = block, grid_dim = grid;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        block_index = {x, y, z};
        shared.assign(shared_bytes, char(0xff));  // nobody has written it: nan
        for (size_t i = 0; i < threads; ++i) {
          Fiber& f = fibers[i];
          f.state = Fiber::ready, f.turn = 0, f.begun = false;
          f.index = {unsigned(i % block.x), unsigned(i / block.x % block.y), unsigned(i / block.x / block.y)};
          getcontext(&f.context);
          f.context.uc_stack = {memory + i * kStack, 0, kStack};
          f.context.uc_link = nullptr;
          makecontext(&f.context, enter, 0);
        }
        run_block();
      }
}

template <typename T>
T shuffle(T value, int (*from)(int lane, int by, int width), int by, int width) {
  static_assert(sizeof(T) <= 8);
  const int thread = running - fibers.data(), warp = thread / kWarpSize, lane = thread % kWarpSize;
  uint64_t* mine = slots.data() + (warp * 2 + running->turn) * kWarpSize;
  running->turn ^= 1;
  std::memcpy(mine + lane, &value, sizeof(T));
  wait(Fiber::at_warp);
  std::memcpy(&value, mine + from(lane, by, width), sizeof(T));
  return value;
}

}  // namespace emulator

#define threadIdx (emulator::running->index)
#define blockIdx (emulator::block_index)
#define blockDim (emulator::block_dim)
#define gridDim (emulator::grid_dim)

inline void __syncthreads() { emulator::wait(emulator::Fiber::at_block); }
inline void __syncwarp(unsigned = 0xffffffffu) { emulator::wait(emulator::Fiber::at_warp); }
template <typename T>
T __shfl_xor_sync(unsigned, T value, int by, int width = 32) {
  return emulator::shuffle(value, [](int lane, int by, int) { return lane ^ by; }, by, width);
}
template <typename T>
T __shfl_sync(unsigned, T value, int by, int width = 32) {
  return emulator::shuffle(
      value, [](int lane, int by, int width) { return lane / width * width + by % width; }, by, width);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, int by, int width = 32) {
  return emulator::shuffle(
      value, [](int lane, int by, int width) { return lane % width + by < width ? lane + by : lane; }, by, width);
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
template <typename T>
T __ldg(const T* from) { return *from; }
