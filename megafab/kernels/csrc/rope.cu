// Rotary embedding of queries and keys in one launch, by a table of angles per token, in place or not.
//
// A thread takes 16 bytes of the first half of a head and the 16 bytes of the second that turn with them.
#include "common.cuh"

namespace megafab {
namespace {

constexpr int kThreads = 256;

// A token belongs to the threads along x, which share its angles.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) rotate(Rope call) {
  const int token = blockIdx.x * blockDim.y + threadIdx.y, batch = static_cast<int>(call.batch);
  if (token >= call.length * call.batch) return;
  const int64_t position = token / batch, row = token % batch;
  const int half = call.half, pieces = half / N, total = (call.x[0].heads + call.x[1].heads) * pieces;
  const T* angles =
      static_cast<const T*>(call.table) + position * call.table_strides[1] + row * call.table_strides[2];
  for (int i = threadIdx.x; i < total; i += blockDim.x) {
    const int column = i % pieces * N, found = i / pieces;
    const bool other = found >= call.x[0].heads;
    const Heads& x = call.x[other];
    const int head = other ? found - call.x[0].heads : found;
    const T* from = static_cast<const T*>(x.from) + position * x.from_strides[0] + row * x.from_strides[1] +
                    head * x.from_strides[2] + column;
    T* to = static_cast<T*>(x.to) + position * x.to_strides[0] + row * x.to_strides[1] +
            head * x.to_strides[2] + column;
    const Vec<T, N> cosine = load<N>(angles + column), sine = load<N>(angles + call.table_strides[0] + column);
    Vec<T, N> first = load<N>(from), second = load<N>(from + half);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float c = to_float(cosine.values[j]), s = to_float(sine.values[j]) * call.sign;
      const float a = to_float(first.values[j]), b = to_float(second.values[j]);
      first.values[j] = from_float<T>(a * c - b * s);
      second.values[j] = from_float<T>(b * c + a * s);
    }
    store<N>(to, first);
    store<N>(to + half, second);
  }
}

template <typename T>
bool fits(const Rope& call) {
  const auto even = [](const int64_t* strides) {
    return (strides[0] | strides[1] | strides[2]) % kPer16Bytes<T> == 0;
  };
  bool wide = in_16_bytes<T>(call.half, call.table) && even(call.table_strides);
  for (const Heads& x : call.x) {
    wide = wide && in_16_bytes<T>(call.half, x.from, x.to) && even(x.from_strides) && even(x.to_strides);
  }
  return wide;
}

}  // namespace

void rope(const Rope& call, Stream stream) {
  by_type(call.type, [&](auto zero) {
    using T = decltype(zero);
    constexpr int N = kPer16Bytes<T>;
    const bool wide = fits<T>(call);
    const int64_t pairs = static_cast<int64_t>(call.x[0].heads + call.x[1].heads) * (wide ? call.half / N : call.half);
    const int threads = power_of_two(pairs, kWarp, kThreads), tokens = kThreads / threads;
    const dim3 grid(static_cast<unsigned>(ceil_div(call.length * call.batch, tokens)));
    launch(wide ? rotate<T, N> : rotate<T, 1>, grid, dim3(threads, tokens), 0, stream, call);
  });
}

}  // namespace megafab
