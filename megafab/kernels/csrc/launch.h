// What the kernels offer: pointers and sizes in, work on a stream out. Documented in the Python file of each.
#pragma once

#include <cstdint>

namespace megafab {

enum class Type { fp32, bf16, fp16 };
using Stream = void*;

// ---- norm.cu: see norm.py ----------------------------------------------------------------------------------

// Null: `residual` and `sum` without an addition, `bias` and `mean` for RMSNorm.
struct Norm {
  Type type;
  int64_t rows;
  int columns;
  const void* x;
  const void* residual;
  const void* weight;
  const void* bias;
  void* y;
  void* sum;
  float* mean;
  float* rstd;
  float eps;
};
void norm(const Norm& call, Stream stream);

// `partial` is fp32 [`norm_groups`, columns], for the weight and, unless null, for the bias.
struct NormBackward {
  Type type;
  int64_t rows;
  int columns;
  const void* grad;
  const void* grad_sum;
  const void* x;
  const void* weight;
  const float* mean;
  const float* rstd;
  void* grad_x;
  void* grad_weight;
  void* grad_bias;
  float* partial_weight;
  float* partial_bias;
};
int norm_groups(Type type, int64_t rows, int columns, bool centred);
void norm_backward(const NormBackward& call, Stream stream);

// ---- activation.cu: see activation.py ----------------------------------------------------------------------

enum class ActivationKind { gelu, relu, squared_relu, swiglu, geglu };

// `columns` of y forward, and of the gradient; x and the bias of a gated unit have twice as many. Backward where
// `grad` is not null: y is then the gradient of x.
struct Activation {
  Type type;
  ActivationKind kind;
  int64_t rows;
  int columns;
  const void* x;
  const void* bias;
  const void* grad;
  void* y;
};
void activation(const Activation& call, Stream stream);

// ---- dropout.cu: see dropout.py ----------------------------------------------------------------------------

// Null: `bias` and `residual` of a gradient, `seed` where nothing is dropped. What has random bits below
// `threshold` is dropped, the rest multiplied by `scale`.
struct Dropout {
  Type type;
  int64_t count;
  int columns;
  const void* x;
  const void* bias;
  const void* residual;
  void* y;
  const int64_t* seed;
  uint32_t threshold;
  float scale;
};
void dropout(const Dropout& call, Stream stream);

// ---- rope.cu: see rope.py ----------------------------------------------------------------------------------

// Heads [length, batch, heads, 2 half] read at `from` and written at `to`; strides of the first three dimensions.
struct Heads {
  int heads;
  const void* from;
  void* to;
  int64_t from_strides[3];
  int64_t to_strides[3];
};

// The second of `x` may have 0 heads. The table is [2, length, batch, half], `sign` -1 to turn back.
struct Rope {
  Type type;
  int64_t length;
  int64_t batch;
  int half;
  Heads x[2];
  const void* table;
  int64_t table_strides[3];
  float sign;
};
void rope(const Rope& call, Stream stream);

// ---- softmax.cu: see softmax.py ----------------------------------------------------------------------------

// Scores [sequences, heads, queries, columns]; a mask is null or has strides, 0 where it is the same for all, of
// the first three dimensions. Backward where `grad` is not null: `scores` are then the probabilities.
struct Softmax {
  Type type;
  int64_t sequences;
  int64_t heads;
  int64_t queries;
  int columns;
  const void* scores;
  const bool* mask;
  int64_t mask_strides[3];
  bool causal;
  float scale;
  const void* grad;
  void* out;
};
void masked_softmax(const Softmax& call, Stream stream);

// ---- multi_tensor.cu: see multi_tensor.py ------------------------------------------------------------------

constexpr int kLists = 5;
constexpr int64_t kChunk = 1 << 14;  // values of a tensor that a block takes at a time

// One tensor of each list, all of `size` values; null where a list is not given.
struct Row {
  int64_t first;  // of its chunks, among those of all rows
  int64_t size;
  void* lists[kLists];
};

// Rows that are not empty, on the device.
struct Table {
  const Row* rows;
  int count;
  int64_t chunks;
};

// Lists: fp32 weights, gradients, fp32 m, fp32 v, copies. With t the number of the step,
// rate = lr / (1 - beta1^t), kept = 1 - lr decay, fresh = 1 - beta, correction = 1 / sqrt(1 - beta2^t).
struct AdamW {
  Type gradients;
  Type copies;
  Table table;
  const float* scale;  // null: 1
  float rate;
  float kept;
  float fresh1;
  float beta2;
  float fresh2;
  float correction;
  float eps;
};
void adamw(const AdamW& call, Stream stream);

// `partial` is fp32 [`square_partials`].
struct SumOfSquares {
  Type type;
  Table table;
  float* partial;
  float* out;
};
int square_partials(int64_t chunks);
void sum_of_squares(const SumOfSquares& call, Stream stream);

// Lists: fp32 values, bool masks.
void mask(const Table& table, Stream stream);

// ---- rows.cu: see rows.py ----------------------------------------------------------------------------------

// out[r] = x[index[r]] for `count` rows of `bytes` bytes, an even number.
struct GatherRows {
  int64_t count;
  int64_t bytes;
  const void* x;
  const int64_t* index;
  void* out;
};
void gather_rows(const GatherRows& call, Stream stream);

// out[s] = fresh[r] where index[r] = s, else x[s], for `rows` rows; taken[r] = x[index[r]]. Null: `x` and
// `fresh` for zeros, `taken` for nowhere. `inverse` is int32 [rows], all -1, and gets r at s.
struct PutRows {
  int64_t rows;
  int64_t count;
  int64_t bytes;
  const void* x;
  const void* fresh;
  const int64_t* index;
  int* inverse;
  void* out;
  void* taken;
};
void put_rows(const PutRows& call, Stream stream);

// ---- cross_entropy.cu: see cross_entropy.py ----------------------------------------------------------------

// With `expected` it writes `nll` and `gradient`, which is where the logits are; without, the other results.
struct CrossEntropy {
  Type type;
  int64_t rows;
  int columns;
  int64_t first;
  const void* logits;
  const int64_t* labels;
  float* peak;
  float* total;
  float* target;
  float* sum;
  const float* expected;
  float* nll;
  void* gradient;
};
void cross_entropy(const CrossEntropy& call, Stream stream);

// Null: a gradient of 0.
struct CrossEntropyGradient {
  Type type;
  int64_t rows;
  int columns;
  int64_t first;
  float vocabulary;
  void* logits;
  const int64_t* labels;
  const float* peak;
  const float* total;
  const float* nll;
  const float* log_z;
  const float* mean;
};
void cross_entropy_gradient(const CrossEntropyGradient& call, Stream stream);

struct ScaleRows {
  Type type;
  int64_t rows;
  int columns;
  void* x;
  const float* expected;
  const float* found;
};
void scale_rows(const ScaleRows& call, Stream stream);

}  // namespace megafab
