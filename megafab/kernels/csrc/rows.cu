// Rows of a tensor taken out and put back: bytes are moved, whatever they mean.
//
// Rows share blocks of 256 threads, each with up to four pieces of a row in flight. What is put back is found
// through the inverse of the index, so that each row of the result is written once.
#include "common.cuh"

namespace megafab {
namespace {

constexpr int kThreads = 256;
constexpr int kPieces = 4;

// Copies a row of `columns` pieces, by the threads along x. `from` null: zeros.
template <typename U>
__device__ __forceinline__ void move(const U* from, U* to, int columns) {
  for (int first = threadIdx.x; first < columns; first += kPieces * blockDim.x) {
    U kept[kPieces] = {};
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const int column = first + piece * blockDim.x;
      if (from && column < columns) kept[piece] = from[column];
    }
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const int column = first + piece * blockDim.x;
      if (column < columns) to[column] = kept[piece];
    }
  }
}

__device__ __forceinline__ int64_t own_row() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
}

template <typename U>
__global__ void __launch_bounds__(kThreads) gather(GatherRows call, int columns) {
  const int64_t row = own_row();
  if (row >= call.count) return;
  const U* x = static_cast<const U*>(call.x);
  move(x + call.index[row] * columns, static_cast<U*>(call.out) + row * columns, columns);
}

__global__ void __launch_bounds__(kThreads) invert(const int64_t* index, int* inverse, int64_t count) {
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (place < count) inverse[index[place]] = static_cast<int>(place);
}

template <typename U>
__global__ void __launch_bounds__(kThreads) put(PutRows call, int columns) {
  const int64_t row = own_row();
  if (row >= call.rows) return;
  const int64_t place = call.inverse[row];
  const bool replaced = place >= 0;
  const U* base = static_cast<const U*>(replaced ? call.fresh : call.x);
  const U* from = base ? base + (replaced ? place : row) * columns : nullptr;
  move(from, static_cast<U*>(call.out) + row * columns, columns);
  if (replaced && call.taken) {
    move(static_cast<const U*>(call.x) + row * columns, static_cast<U*>(call.taken) + place * columns, columns);
  }
}

// Calls `run(U())` with the widest piece that rows of `bytes` bytes which begin at `pointers` consist of.
template <typename F, typename... P>
void by_piece(int64_t bytes, F run, const P*... pointers) {
  if (in_16_bytes<char>(bytes, pointers...)) return run(Vec<uint32_t, 4>());
  if (bytes % 4 == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 4 == 0) && ...)) return run(uint32_t());
  run(uint16_t());
}

struct Geometry {
  dim3 grid, block;
  int columns;
};

template <typename U>
Geometry geometry(int64_t rows, int64_t bytes) {
  const int columns = static_cast<int>(bytes / sizeof(U));
  const int threads = power_of_two(ceil_div(columns, kPieces), 8, kThreads);
  const int each = kThreads / threads;
  return {dim3(static_cast<unsigned>(ceil_div(rows, each))), dim3(threads, each), columns};
}

}  // namespace

void gather_rows(const GatherRows& call, Stream stream) {
  by_piece(
      call.bytes,
      [&](auto piece) {
        using U = decltype(piece);
        const Geometry g = geometry<U>(call.count, call.bytes);
        launch(gather<U>, g.grid, g.block, 0, stream, call, g.columns);
      },
      call.x, call.out);
}

void put_rows(const PutRows& call, Stream stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(call.count, kThreads)));
  launch(invert, grid, dim3(kThreads), 0, stream, call.index, call.inverse, call.count);
  by_piece(
      call.bytes,
      [&](auto piece) {
        using U = decltype(piece);
        const Geometry g = geometry<U>(call.rows, call.bytes);
        launch(put<U>, g.grid, g.block, 0, stream, call, g.columns);
      },
      call.x, call.fresh, call.out, call.taken);
}

}  // namespace megafab
