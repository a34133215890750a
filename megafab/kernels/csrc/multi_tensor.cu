// Operations on lists of tensors of any number and sizes, in one launch each.
//
// A block takes a chunk of one tensor; which, it finds in a table of the lists, by bisection. Tensors that lie
// at 16-byte boundaries in all lists are read 16 bytes at a time, others a value at a time.
#include <type_traits>

#include "common.cuh"

namespace megafab {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksEach = 8;  // blocks of sums that a multiprocessor runs at once

// The part of a row's tensors that belongs to one chunk.
struct Part {
  const Row& row;
  int64_t start;
  int count;
};

__device__ __forceinline__ Part part_of(const Table& table, int64_t chunk) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.rows[middle].first <= chunk) low = middle;
    else high = middle;
  }
  const Row& row = table.rows[low];
  const int64_t start = (chunk - row.first) * kChunk, left = row.size - start;
  return {row, start, static_cast<int>(left < kChunk ? left : kChunk)};
}

// Where a chunk begins in a tensor; null stays so.
template <typename T>
__device__ __forceinline__ T* at(const Part& part, int list) {
  T* data = static_cast<T*>(part.row.lists[list]);
  return data ? data + part.start : nullptr;
}

template <int N, typename... T>
__device__ __forceinline__ bool aligned(const T*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % (N * sizeof(T)) == 0) && ...);
}

// Calls `body(width, i)` for the values i .. i + width - 1 of this thread, `width` being N, or 1 where N does
// not fit; U turns of N at a time, so that their loads are in flight together.
template <int N, int U, typename F>
__device__ __forceinline__ void for_values(int count, bool wide, F body) {
  const int whole = wide ? count / N * N : 0;
#pragma unroll U
  for (int i = threadIdx.x * N; i < whole; i += kThreads * N) body(std::integral_constant<int, N>(), i);
#pragma unroll U
  for (int i = whole + threadIdx.x; i < count; i += kThreads) body(std::integral_constant<int, 1>(), i);
}

template <typename G, typename C>
__global__ void __launch_bounds__(kThreads) update(AdamW call) {
  constexpr int kWide = 4;
  const Part part = part_of(call.table, blockIdx.x);
  float *weight = at<float>(part, 0), *m = at<float>(part, 2), *v = at<float>(part, 3);
  const G* grad = at<G>(part, 1);
  C* copy = at<C>(part, 4);
  const float scale = call.scale ? *call.scale : 1.0f;
  const bool wide = aligned<kWide>(weight, grad, m, v, copy);
  for_values<kWide, 1>(part.count, wide, [&](auto width, int i) {
    constexpr int N = decltype(width)::value;
    Vec<float, N> weights = load<N>(weight + i), ms = load<N>(m + i), vs = load<N>(v + i);
    const Vec<G, N> grads = load<N>(grad + i);
    Vec<C, N> rounded;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float g = to_float(grads.values[k]) * scale;
      ms.values[k] += call.fresh1 * (g - ms.values[k]);
      vs.values[k] = call.beta2 * vs.values[k] + call.fresh2 * g * g;
      const float step = ms.values[k] / (sqrtf(vs.values[k]) * call.correction + call.eps);
      weights.values[k] = call.kept * weights.values[k] - call.rate * step;
      rounded.values[k] = from_float<C>(weights.values[k]);
    }
    store<N>(weight + i, weights);
    store<N>(m + i, ms);
    store<N>(v + i, vs);
    if (copy) store<N>(copy + i, rounded);
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads) add_squares(SumOfSquares call) {
  __shared__ float scratch[kWarp];
  constexpr int kWide = kPer16Bytes<T>;
  float total = 0.0f;
  for (int64_t chunk = blockIdx.x; chunk < call.table.chunks; chunk += gridDim.x) {
    const Part part = part_of(call.table, chunk);
    const T* x = at<T>(part, 0);
    float sum = 0.0f;  // of a chunk by itself, so that large totals swallow less
    for_values<kWide, 2>(part.count, aligned<kWide>(x), [&](auto width, int i) {
      constexpr int N = decltype(width)::value;
      const Vec<T, N> xs = load<N>(x + i);
#pragma unroll
      for (int k = 0; k < N; ++k) sum += to_float(xs.values[k]) * to_float(xs.values[k]);
    });
    total += sum;
  }
  total = over_row(total, kThreads, scratch, Sum());
  if (threadIdx.x == 0) call.partial[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kThreads) add_partials(const float* partial, int count, float* out) {
  __shared__ float scratch[kWarp];
  float total = 0.0f;
  for (int i = threadIdx.x; i < count; i += kThreads) total += partial[i];
  total = over_row(total, kThreads, scratch, Sum());
  if (threadIdx.x == 0) *out = total;
}

__global__ void __launch_bounds__(kThreads) multiply(Table table) {
  constexpr int kWide = 4;
  const Part part = part_of(table, blockIdx.x);
  float* value = at<float>(part, 0);
  const bool* mask = at<bool>(part, 1);
  for_values<kWide, 1>(part.count, aligned<kWide>(value, mask), [&](auto width, int i) {
    constexpr int N = decltype(width)::value;
    Vec<float, N> values = load<N>(value + i);
    const Vec<bool, N> kept = load<N>(mask + i);
#pragma unroll
    for (int k = 0; k < N; ++k) values.values[k] *= kept.values[k] ? 1.0f : 0.0f;
    store<N>(value + i, values);
  });
}

dim3 block_each(const Table& table) { return dim3(static_cast<unsigned>(table.chunks)); }

}  // namespace

void adamw(const AdamW& call, Stream stream) {
  by_type(call.gradients, [&](auto gradient) {
    by_type(call.copies, [&](auto copy) {
      launch(update<decltype(gradient), decltype(copy)>, block_each(call.table), dim3(kThreads), 0, stream, call);
    });
  });
}

int square_partials(int64_t chunks) {
  const int64_t resident = static_cast<int64_t>(multiprocessors()) * kBlocksEach;
  return static_cast<int>(chunks < resident ? chunks : resident);
}

void sum_of_squares(const SumOfSquares& call, Stream stream) {
  const int blocks = square_partials(call.table.chunks);
  by_type(call.type, [&](auto zero) {
    launch(add_squares<decltype(zero)>, dim3(blocks), dim3(kThreads), 0, stream, call);
  });
  launch(add_partials, dim3(1), dim3(kThreads), 0, stream, call.partial, blocks, call.out);
}

void mask(const Table& table, Stream stream) {
  launch(multiply, block_each(table), dim3(kThreads), 0, stream, table);
}

}  // namespace megafab
