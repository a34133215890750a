// softmax(scale x scores) where a mask allows it, over the last dimension; a row belongs to one block.
//
// As in norm.cu a row stays in registers, up to four 16-byte pieces a thread; longer ones are read again.
#include "common.cuh"

namespace megafab {
namespace {

constexpr int kPieces = 4;
constexpr int kThreads = 512;

template <typename T, int N, int K>
__global__ void __launch_bounds__(kThreads) forward(Softmax call) {
  __shared__ float scratch[2][kWarp];
  const int columns = call.columns;
  const int64_t row = blockIdx.x, query = row % call.queries, head = row / call.queries % call.heads;
  const int64_t sequence = row / call.queries / call.heads;
  const T* scores = static_cast<const T*>(call.scores) + row * columns;
  T* out = static_cast<T*>(call.out) + row * columns;
  const bool* mask = call.mask ? call.mask + sequence * call.mask_strides[0] + head * call.mask_strides[1] +
                                     query * call.mask_strides[2]
                               : nullptr;
  // Of `queries` the last sees all columns.
  const int64_t seen = call.causal ? columns - call.queries + query + 1 : columns;
  float kept[K > 0 ? K : 1][N];
  const auto read = [&](float (&to)[N], int column) {
    const Vec<T, N> value = load<N>(scores + column);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const bool hidden = column + i >= seen || (mask && !mask[column + i]);
      to[i] = hidden ? -INFINITY : to_float(value.values[i]) * call.scale;
    }
  };
  float peak = -INFINITY;
  for_columns<N, K>(columns, [&](int piece, int column) {
    float value[N];
    read(K > 0 ? kept[piece] : value, column);
#pragma unroll
    for (int i = 0; i < N; ++i) peak = fmaxf(peak, K > 0 ? kept[piece][i] : value[i]);
  });
  peak = over_row(peak, blockDim.x, scratch[0], Max());
  if (peak == -INFINITY) peak = 0.0f;  // nothing is seen: all of it is 0
  float total = 0.0f;
  for_columns<N, K>(columns, [&](int piece, int column) {
    float value[N];
    if constexpr (K == 0) read(value, column);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float power = __expf((K > 0 ? kept[piece][i] : value[i]) - peak);
      if constexpr (K > 0) kept[piece][i] = power;
      total += power;
    }
  });
  total = over_row(total, blockDim.x, scratch[1], Sum());
  const float factor = total > 0.0f ? 1.0f / total : 0.0f;
  for_columns<N, K>(columns, [&](int piece, int column) {
    float value[N];
    if constexpr (K == 0) read(value, column);
    Vec<T, N> result;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float power = K > 0 ? kept[piece][i] : __expf(value[i] - peak);
      result.values[i] = from_float<T>(power * factor);
    }
    store<N>(out + column, result);
  });
}

// scale p (g - sum(p g)); what is masked has p = 0.
template <typename T, int N, int K>
__global__ void __launch_bounds__(kThreads) backward(Softmax call) {
  __shared__ float scratch[kWarp];
  const int columns = call.columns;
  const int64_t start = static_cast<int64_t>(blockIdx.x) * columns;
  const T* grad = static_cast<const T*>(call.grad) + start;
  const T* probability = static_cast<const T*>(call.scores) + start;
  T* out = static_cast<T*>(call.out) + start;
  Vec<T, N> kept_grad[K > 0 ? K : 1], kept[K > 0 ? K : 1];
  float along = 0.0f;
  for_columns<N, K>(columns, [&](int piece, int column) {
    const Vec<T, N> g = load<N>(grad + column), p = load<N>(probability + column);
    if constexpr (K > 0) {
      kept_grad[piece] = g;
      kept[piece] = p;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) along += to_float(g.values[i]) * to_float(p.values[i]);
  });
  along = over_row(along, blockDim.x, scratch, Sum());
  for_columns<N, K>(columns, [&](int piece, int column) {
    Vec<T, N> g, p;
    if constexpr (K > 0) {
      g = kept_grad[piece];
      p = kept[piece];
    } else {
      g = load<N>(grad + column);
      p = load<N>(probability + column);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      g.values[i] = from_float<T>(call.scale * to_float(p.values[i]) * (to_float(g.values[i]) - along));
    }
    store<N>(out + column, g);
  });
}

}  // namespace

void masked_softmax(const Softmax& call, Stream stream) {
  by_type(call.type, [&](auto zero) {
    using T = decltype(zero);
    constexpr int N = kPer16Bytes<T>;
    const bool wide = in_16_bytes<T>(call.columns, call.scores, call.grad, call.out);
    const int64_t vectors = wide ? call.columns / N : call.columns;
    const int threads = power_of_two(ceil_div(vectors, kPieces), kWarp, kThreads);
    const bool keeps = wide && ceil_div(vectors, threads) <= kPieces;
    const int64_t rows = call.sequences * call.heads * call.queries;
    auto kernel = call.grad == nullptr
                      ? (keeps ? forward<T, N, kPieces> : wide ? forward<T, N, 0> : forward<T, 1, 0>)
                      : (keeps ? backward<T, N, kPieces> : wide ? backward<T, N, 0> : backward<T, 1, 0>);
    launch(kernel, dim3(static_cast<unsigned>(rows)), dim3(threads), 0, stream, call);
  });
}

}  // namespace megafab
