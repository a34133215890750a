// The kernels as torch operators: what is checked before a kernel is launched, and what it writes to.
//
// Their schemas, fakes and gradients are in Python, beside a reference of each (../norm.py and so on).
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "launch.h"

#ifdef MEGAFAB_EMULATE
#define MEGAFAB_LIBRARY megafab_emulated
#define MEGAFAB_DEVICE CPU
#else
#include <c10/cuda/CUDAStream.h>
#define MEGAFAB_LIBRARY megafab
#define MEGAFAB_DEVICE CUDA
#endif

namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

megafab::Stream stream() {
#ifdef MEGAFAB_EMULATE
  return nullptr;
#else
  return c10::cuda::getCurrentCUDAStream().stream();
#endif
}

megafab::Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return megafab::Type::fp32;
    case at::kBFloat16: return megafab::Type::bf16;
    case at::kHalf: return megafab::Type::fp16;
    default: TORCH_CHECK(false, "expected float32, bfloat16 or float16, found ", x.scalar_type());
  }
}

// That `x` lies dense in memory, beside `like` and of its type.
const void* dense(const Tensor& x, const Tensor& like, const char* name) {
  TORCH_CHECK(x.is_contiguous(), name, " is not contiguous: sizes ", x.sizes(), ", strides ", x.strides());
  TORCH_CHECK(x.device() == like.device(), name, " is on ", x.device(), ", not on ", like.device());
  TORCH_CHECK(x.scalar_type() == like.scalar_type(), name, " is ", x.scalar_type(), ", not ", like.scalar_type());
  return x.const_data_ptr();
}

const void* dense(const Optional& x, const Tensor& like, const char* name) {
  return x ? dense(*x, like, name) : nullptr;
}

Tensor fp32(const Tensor& like, at::IntArrayRef sizes) { return at::empty(sizes, like.options().dtype(at::kFloat)); }

int columns_of(const Tensor& x) {
  TORCH_CHECK(x.dim() > 0 && x.size(-1) > 0 && x.size(-1) < (1 << 30), "rows of ", x.sizes());
  return static_cast<int>(x.size(-1));
}

int64_t rows_of(const Tensor& x) { return x.numel() / columns_of(x); }

// ---- norm --------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> normalise(
    const Tensor& x, const Optional& residual, const Tensor& weight, const Optional& bias, double eps) {
  const c10::DeviceGuard guard(x.device());
  const int columns = columns_of(x);
  const int64_t rows = rows_of(x);
  TORCH_CHECK(weight.numel() == columns && (!bias || bias->numel() == columns), "weights for ", columns, " columns");
  TORCH_CHECK(!residual || residual->sizes() == x.sizes(), "a residual of x's sizes ", x.sizes());
  Tensor y = at::empty_like(x), sum = residual ? at::empty_like(x) : at::empty({0}, x.options());
  Tensor mean = fp32(x, {bias ? rows : 0}), rstd = fp32(x, {rows});
  megafab::norm(
      {type_of(x), rows, columns, dense(x, x, "x"), dense(residual, x, "residual"), dense(weight, x, "weight"),
       dense(bias, x, "bias"), y.mutable_data_ptr(), residual ? sum.mutable_data_ptr() : nullptr,
       mean.mutable_data_ptr<float>(), rstd.mutable_data_ptr<float>(), static_cast<float>(eps)},
      stream());
  return {y, sum, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> norm(
    const Tensor& x, const Tensor& weight, const Optional& bias, double eps) {
  auto [y, sum, mean, rstd] = normalise(x, std::nullopt, weight, bias, eps);
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm(
    const Tensor& x, const Tensor& residual, const Tensor& weight, const Optional& bias, double eps) {
  return normalise(x, residual, weight, bias, eps);
}

std::tuple<Tensor, Tensor, Tensor> norm_backward(
    const Tensor& grad, const Optional& grad_sum, const Tensor& x, const Tensor& weight, const Optional& mean,
    const Tensor& rstd) {
  const c10::DeviceGuard guard(x.device());
  const int columns = columns_of(x);
  const int64_t rows = rows_of(x);
  const bool centred = mean.has_value();
  const int groups = megafab::norm_groups(type_of(x), rows, columns, centred);
  Tensor grad_x = at::empty_like(x), grad_weight = at::empty_like(weight);
  Tensor grad_bias = at::empty({centred ? columns : 0}, weight.options());
  Tensor partial = fp32(x, {centred ? 2 : 1, groups, columns});
  float* sums = partial.mutable_data_ptr<float>();
  megafab::norm_backward(
      {type_of(x), rows, columns, dense(grad, x, "grad"), dense(grad_sum, x, "grad_sum"), dense(x, x, "x"),
       dense(weight, x, "weight"), centred ? mean->const_data_ptr<float>() : nullptr, rstd.const_data_ptr<float>(),
       grad_x.mutable_data_ptr(), grad_weight.mutable_data_ptr(),
       centred ? grad_bias.mutable_data_ptr() : nullptr, sums,
       centred ? sums + static_cast<int64_t>(groups) * columns : nullptr},
      stream());
  return {grad_x, grad_weight, grad_bias};
}

// ---- activation --------------------------------------------------------------------------------------------

megafab::ActivationKind kind_of(std::string_view name) {
  using Kind = megafab::ActivationKind;
  if (name == "gelu") return Kind::gelu;
  if (name == "relu") return Kind::relu;
  if (name == "squared_relu") return Kind::squared_relu;
  if (name == "swiglu") return Kind::swiglu;
  TORCH_CHECK(name == "geglu", "no activation ", name);
  return Kind::geglu;
}

Tensor activate_or_gradient(const Optional& grad, const Tensor& x, const Optional& bias, std::string_view kind_name) {
  const c10::DeviceGuard guard(x.device());
  const auto kind = kind_of(kind_name);
  const int64_t parts = kind == megafab::ActivationKind::swiglu || kind == megafab::ActivationKind::geglu ? 2 : 1;
  TORCH_CHECK(columns_of(x) % parts == 0, "two halves of ", x.sizes());
  const int columns = columns_of(x) / parts;
  TORCH_CHECK(!bias || bias->numel() == columns * parts, "a bias for ", columns * parts, " columns");
  auto sizes = x.sizes().vec();
  sizes.back() = columns;
  TORCH_CHECK(!grad || grad->sizes() == at::IntArrayRef(sizes), "a gradient of ", sizes);
  Tensor y = grad ? at::empty_like(x) : at::empty(sizes, x.options());
  megafab::activation(
      {type_of(x), kind, rows_of(x), columns, dense(x, x, "x"), dense(bias, x, "bias"), dense(grad, x, "grad"),
       y.mutable_data_ptr()},
      stream());
  return y;
}

Tensor activation(const Tensor& x, const Optional& bias, std::string_view kind) {
  return activate_or_gradient(std::nullopt, x, bias, kind);
}

Tensor activation_backward(const Tensor& grad, const Tensor& x, const Optional& bias, std::string_view kind) {
  return activate_or_gradient(grad, x, bias, kind);
}

// ---- dropout -----------------------------------------------------------------------------------------------

Tensor drop(const Tensor& x, const Optional& bias, const Optional& residual, double p, const Optional& seed) {
  const c10::DeviceGuard guard(x.device());
  const int columns = columns_of(x);
  TORCH_CHECK(p >= 0 && p < 1, "a probability below 1, found ", p);
  TORCH_CHECK(!bias || bias->numel() == columns, "a bias for ", columns, " columns");
  TORCH_CHECK(!residual || residual->sizes() == x.sizes(), "a residual of x's sizes ", x.sizes());
  TORCH_CHECK(!seed || (seed->numel() == 1 && seed->device() == x.device()), "one seed, on ", x.device());
  Tensor y = at::empty_like(x);
  megafab::dropout(
      {type_of(x), x.numel(), columns, dense(x, x, "x"), dense(bias, x, "bias"), dense(residual, x, "residual"),
       y.mutable_data_ptr(), seed ? seed->const_data_ptr<int64_t>() : nullptr,
       static_cast<uint32_t>(p * 4294967296.0), static_cast<float>(1.0 / (1.0 - p))},
      stream());
  return y;
}

Tensor dropout_backward(const Tensor& grad, double p, const Tensor& seed) {
  return drop(grad, std::nullopt, std::nullopt, p, seed);
}

// ---- rope --------------------------------------------------------------------------------------------------

megafab::Heads heads_of(const Tensor& from, const Tensor& to) {
  TORCH_CHECK(from.dim() == 4 && from.size(3) % 2 == 0, "heads [L, B, H, D] of an even size, found ", from.sizes());
  TORCH_CHECK(from.stride(3) == 1 && to.stride(3) == 1, "a head that is dense, found strides ", from.strides());
  megafab::Heads heads{static_cast<int>(from.size(2)), from.const_data_ptr(), to.mutable_data_ptr(), {}, {}};
  for (int i = 0; i < 3; ++i) {
    heads.from_strides[i] = from.stride(i);
    heads.to_strides[i] = to.stride(i);
  }
  return heads;
}

void rotate(const Tensor& x, const Tensor& to, const Optional& k, const Tensor& k_to, const Tensor& table, bool back) {
  const c10::DeviceGuard guard(x.device());
  const int64_t length = x.size(0), batch = x.size(1), half = x.size(3) / 2;
  const std::vector<int64_t> angles = {2, length, batch, 1, half};
  const Tensor spread = table.expand(angles);
  TORCH_CHECK(table.scalar_type() == x.scalar_type() && table.stride(4) == 1, "a dense table of x's type");
  megafab::Rope call{type_of(x), length, batch, static_cast<int>(half), {heads_of(x, to), {}}, table.const_data_ptr(),
                     {spread.stride(0), spread.stride(1), spread.stride(2)}, back ? -1.0f : 1.0f};
  TORCH_CHECK(length * batch < (int64_t(1) << 31), "fewer tokens than ", length * batch);
  if (k) {
    TORCH_CHECK(k->scalar_type() == x.scalar_type() && k->size(0) == length && k->size(1) == batch &&
                    k->size(3) == 2 * half, "queries and keys of the same tokens, found ", x.sizes(), " and ", k->sizes());
    call.x[1] = heads_of(*k, k_to);
  }
  megafab::rope(call, stream());
}

// As attention reads fastest: [B, H, L, D] in memory; gradients as they go on: [L, B, H, D].
Tensor empty_heads(const Tensor& x, bool back) {
  const auto s = x.sizes();
  if (back) return at::empty(s, x.options());
  return at::empty({s[1], s[2], s[0], s[3]}, x.options()).permute({2, 0, 1, 3});
}

std::tuple<Tensor, Tensor> rope(const Tensor& q, const Optional& k, const Tensor& table, bool back) {
  const Tensor q_out = empty_heads(q, back), k_out = k ? empty_heads(*k, back) : at::empty({0}, q.options());
  rotate(q, q_out, k, k_out, table, back);
  return {q_out, k_out};
}

void rope_(const Tensor& q, const Optional& k, const Tensor& table, bool back) {
  rotate(q, q, k, k ? *k : q, table, back);
}

// ---- softmax -----------------------------------------------------------------------------------------------

Tensor masked_softmax(const Tensor& scores, const Optional& mask, double scale, bool causal) {
  const c10::DeviceGuard guard(scores.device());
  TORCH_CHECK(scores.dim() == 4, "scores [B, H, L, S], found ", scores.sizes());
  Tensor out = at::empty_like(scores);
  megafab::Softmax call{type_of(scores), scores.size(0), scores.size(1), scores.size(2), columns_of(scores),
                        dense(scores, scores, "scores"), nullptr, {}, causal, static_cast<float>(scale), nullptr,
                        out.mutable_data_ptr()};
  if (mask) {
    const Tensor spread = mask->expand(scores.sizes());
    TORCH_CHECK(mask->scalar_type() == at::kBool && mask->stride(3) == 1, "a mask of bool, its rows dense");
    call.mask = spread.const_data_ptr<bool>();
    for (int i = 0; i < 3; ++i) call.mask_strides[i] = spread.stride(i);
  }
  megafab::masked_softmax(call, stream());
  return out;
}

Tensor masked_softmax_backward(const Tensor& grad, const Tensor& probabilities, double scale) {
  const c10::DeviceGuard guard(grad.device());
  const Tensor& p = probabilities;
  Tensor out = at::empty_like(p);
  megafab::masked_softmax(
      {type_of(p), p.size(0), p.size(1), p.size(2), columns_of(p), dense(p, p, "probabilities"), nullptr, {}, false,
       static_cast<float>(scale), dense(grad, p, "grad"), out.mutable_data_ptr()},
      stream());
  return out;
}

// ---- multi_tensor ------------------------------------------------------------------------------------------

struct Listed {
  Tensor memory;  // of the table
  megafab::Table table;
};

// A table of lists on their device; the first list has tensors, others as many or none.
Listed listed(std::initializer_list<at::TensorList> lists) {
  constexpr int64_t kWords = sizeof(megafab::Row) / sizeof(int64_t);
  const at::TensorList first = *lists.begin();
  const auto device = first[0].device();
  std::vector<megafab::Row> rows;
  int64_t chunks = 0;
  for (const at::TensorList& list : lists) {
    TORCH_CHECK(list.empty() || list.size() == first.size(), "lists of ", first.size(), " and ", list.size());
  }
  for (size_t i = 0; i < first.size(); ++i) {
    megafab::Row row{chunks, first[i].numel(), {}};
    void** data = row.lists;
    for (const at::TensorList& list : lists) {
      void*& place = *data++;
      if (list.empty()) continue;
      const Tensor& x = list[i];
      TORCH_CHECK(x.is_contiguous(), "tensor ", i, " is not contiguous: sizes ", x.sizes(), ", strides ", x.strides());
      TORCH_CHECK(x.device() == device, "tensor ", i, " is on ", x.device(), ", not on ", device);
      TORCH_CHECK(x.scalar_type() == list[0].scalar_type(), "a list of ", list[0].scalar_type(), " and ", x.scalar_type());
      TORCH_CHECK(x.numel() == row.size, "tensors ", i, " have ", row.size, " and ", x.numel(), " values");
      place = x.mutable_data_ptr();
    }
    if (row.size == 0) continue;
    chunks += (row.size + megafab::kChunk - 1) / megafab::kChunk;
    rows.push_back(row);
  }
  // From pinned memory, which torch does not use again before the copy is over, so that nothing waits.
  const auto count = static_cast<int64_t>(rows.size());
  const auto options = at::TensorOptions().dtype(at::kLong);
  Tensor host = at::empty({count, kWords}, options.pinned_memory(device.is_cuda()));
  if (count) std::memcpy(host.mutable_data_ptr(), rows.data(), rows.size() * sizeof(megafab::Row));
  Tensor memory = host.to(options.device(device), /*non_blocking=*/true);
  const auto* on_device = static_cast<const megafab::Row*>(memory.const_data_ptr());
  return {memory, {on_device, static_cast<int>(count), chunks}};
}

void expect_fp32(at::TensorList list, const char* name) {
  TORCH_CHECK(list[0].scalar_type() == at::kFloat, name, " are ", list[0].scalar_type(), ", not float32");
}

void adamw_(
    at::TensorList weights, at::TensorList grads, at::TensorList m, at::TensorList v, at::TensorList copies,
    const Optional& scale, double lr, double beta1, double beta2, double eps, double decay, int64_t step) {
  const c10::DeviceGuard guard(weights[0].device());
  TORCH_CHECK(!grads.empty() && !m.empty() && !v.empty(), "weights without gradients or moments");
  expect_fp32(weights, "weights");
  expect_fp32(m, "moments");
  expect_fp32(v, "moments");
  const Listed lists = listed({weights, grads, m, v, copies});
  const float* factor = nullptr;
  if (scale) {
    TORCH_CHECK(scale->numel() == 1 && scale->scalar_type() == at::kFloat, "the scale is one value in float32");
    TORCH_CHECK(scale->device() == weights[0].device(), "the scale is on ", scale->device());
    factor = scale->const_data_ptr<float>();
  }
  const double t = static_cast<double>(step);
  megafab::adamw(
      {type_of(grads[0]), copies.empty() ? megafab::Type::bf16 : type_of(copies[0]), lists.table, factor,
       static_cast<float>(lr / (1 - std::pow(beta1, t))), static_cast<float>(1 - lr * decay),
       static_cast<float>(1 - beta1), static_cast<float>(beta2), static_cast<float>(1 - beta2),
       static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, t))), static_cast<float>(eps)},
      stream());
}

Tensor sum_of_squares(at::TensorList tensors) {
  const c10::DeviceGuard guard(tensors[0].device());
  const Listed list = listed({tensors});
  Tensor partial = fp32(tensors[0], {megafab::square_partials(list.table.chunks)}), out = fp32(tensors[0], {});
  megafab::sum_of_squares(
      {type_of(tensors[0]), list.table, partial.mutable_data_ptr<float>(), out.mutable_data_ptr<float>()}, stream());
  return out;
}

void mask_(at::TensorList values, at::TensorList masks) {
  const c10::DeviceGuard guard(values[0].device());
  expect_fp32(values, "values");
  TORCH_CHECK(!masks.empty() && masks[0].scalar_type() == at::kBool, "masks are not bool");
  megafab::mask(listed({values, masks}).table, stream());
}

// ---- rows --------------------------------------------------------------------------------------------------

// The index of `count` rows, on the device of what it is into.
const int64_t* index_of(const Tensor& rows, const Tensor& x) {
  TORCH_CHECK(rows.scalar_type() == at::kLong && rows.is_contiguous(), "rows are int64 and contiguous");
  TORCH_CHECK(rows.device() == x.device(), "rows are on ", rows.device(), ", not on ", x.device());
  return rows.const_data_ptr<int64_t>();
}

int64_t bytes_of(const Tensor& x) {
  type_of(x);
  return static_cast<int64_t>(columns_of(x)) * x.element_size();
}

Tensor inverse_of(const Tensor& x, int64_t rows) {
  TORCH_CHECK(rows < (int64_t{1} << 31), rows, " rows");
  return at::full({rows}, -1, x.options().dtype(at::kInt));
}

Tensor gather_rows(const Tensor& x, const Tensor& rows) {
  const c10::DeviceGuard guard(x.device());
  std::vector<int64_t> sizes = rows.sizes().vec();
  sizes.push_back(columns_of(x));
  Tensor out = at::empty(sizes, x.options());
  megafab::gather_rows(
      {rows.numel(), bytes_of(x), dense(x, x, "x"), index_of(rows, x), out.mutable_data_ptr()}, stream());
  return out;
}

Tensor gather_rows_backward(const Tensor& grad, const Tensor& rows, at::IntArrayRef sizes) {
  const c10::DeviceGuard guard(grad.device());
  Tensor grad_x = at::empty(sizes, grad.options());
  Tensor inverse = inverse_of(grad, rows_of(grad_x));
  megafab::put_rows(
      {rows_of(grad_x), rows.numel(), bytes_of(grad), nullptr, dense(grad, grad, "grad"), index_of(rows, grad),
       inverse.mutable_data_ptr<int>(), grad_x.mutable_data_ptr(), nullptr},
      stream());
  return grad_x;
}

Tensor put_rows(const Tensor& x, const Tensor& fresh, const Tensor& rows) {
  const c10::DeviceGuard guard(x.device());
  TORCH_CHECK(rows_of(fresh) == rows.numel() && columns_of(fresh) == columns_of(x), "a row of x's for each of rows");
  Tensor out = at::empty_like(x), inverse = inverse_of(x, rows_of(x));
  megafab::put_rows(
      {rows_of(x), rows.numel(), bytes_of(x), dense(x, x, "x"), dense(fresh, x, "new"), index_of(rows, x),
       inverse.mutable_data_ptr<int>(), out.mutable_data_ptr(), nullptr},
      stream());
  return out;
}

std::tuple<Tensor, Tensor> put_rows_backward(const Tensor& grad, const Tensor& rows) {
  const c10::DeviceGuard guard(grad.device());
  std::vector<int64_t> sizes = rows.sizes().vec();
  sizes.push_back(columns_of(grad));
  Tensor grad_x = at::empty_like(grad), grad_new = at::empty(sizes, grad.options());
  Tensor inverse = inverse_of(grad, rows_of(grad));
  megafab::put_rows(
      {rows_of(grad), rows.numel(), bytes_of(grad), dense(grad, grad, "grad"), nullptr, index_of(rows, grad),
       inverse.mutable_data_ptr<int>(), grad_x.mutable_data_ptr(), grad_new.mutable_data_ptr()},
      stream());
  return {grad_x, grad_new};
}

// ---- cross_entropy -----------------------------------------------------------------------------------------

// That `x` has a value of type V for each row of `like`, or one alone.
template <typename V>
const V* per_row(const Tensor& x, const Tensor& like, int64_t count, const char* name) {
  TORCH_CHECK(x.is_contiguous() && x.numel() == count, name, ": ", count, " values, found sizes ", x.sizes());
  TORCH_CHECK(x.device() == like.device(), name, " is on ", x.device(), ", not on ", like.device());
  return x.const_data_ptr<V>();
}

const float* per_row(const Optional& x, const Tensor& like, int64_t count, const char* name) {
  return x ? per_row<float>(*x, like, count, name) : nullptr;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& labels, int64_t first) {
  const c10::DeviceGuard guard(logits.device());
  const int columns = columns_of(logits);
  const int64_t rows = rows_of(logits);
  Tensor peak = fp32(logits, {rows}), total = fp32(logits, {rows});
  Tensor target = fp32(logits, {rows}), sum = fp32(logits, {rows});
  megafab::cross_entropy(
      {type_of(logits), rows, columns, first, dense(logits, logits, "logits"),
       per_row<int64_t>(labels, logits, rows, "labels"), peak.mutable_data_ptr<float>(),
       total.mutable_data_ptr<float>(), target.mutable_data_ptr<float>(), sum.mutable_data_ptr<float>(), nullptr,
       nullptr, nullptr},
      stream());
  return {peak, total, target, sum};
}

Tensor nll_and_gradient_(Tensor& logits, const Tensor& labels, const Tensor& expected) {
  const c10::DeviceGuard guard(logits.device());
  const int columns = columns_of(logits);
  const int64_t rows = rows_of(logits);
  Tensor nll = fp32(logits, {rows});
  megafab::cross_entropy(
      {type_of(logits), rows, columns, 0, dense(logits, logits, "logits"),
       per_row<int64_t>(labels, logits, rows, "labels"), nullptr, nullptr, nullptr, nullptr,
       per_row<float>(expected, logits, 1, "expected"), nll.mutable_data_ptr<float>(), logits.mutable_data_ptr()},
      stream());
  return nll;
}

void cross_entropy_gradient_(
    Tensor& logits, const Tensor& labels, int64_t first, const Tensor& peak, const Tensor& total, const Optional& nll,
    const Optional& log_z, const Optional& mean, int64_t vocabulary) {
  const c10::DeviceGuard guard(logits.device());
  const int columns = columns_of(logits);
  const int64_t rows = rows_of(logits);
  dense(logits, logits, "logits");
  megafab::cross_entropy_gradient(
      {type_of(logits), rows, columns, first, static_cast<float>(vocabulary), logits.mutable_data_ptr(),
       per_row<int64_t>(labels, logits, rows, "labels"), per_row<float>(peak, logits, rows, "peak"),
       per_row<float>(total, logits, rows, "total"), per_row(nll, logits, rows, "nll"),
       per_row(log_z, logits, rows, "log_z"), per_row(mean, logits, rows, "mean")},
      stream());
}

void scale_rows_(Tensor& x, const Tensor& expected, const Tensor& found) {
  const c10::DeviceGuard guard(x.device());
  const int columns = columns_of(x);
  const int64_t rows = rows_of(x);
  dense(x, x, "x");
  megafab::scale_rows(
      {type_of(x), rows, columns, x.mutable_data_ptr(), per_row<float>(expected, x, 1, "expected"),
       per_row<float>(found, x, rows, "found")},
      stream());
}

}  // namespace

TORCH_LIBRARY_IMPL(MEGAFAB_LIBRARY, MEGAFAB_DEVICE, m) {
  m.impl("norm", &norm);
  m.impl("add_norm", &add_norm);
  m.impl("norm_backward", &norm_backward);
  m.impl("activation", &activation);
  m.impl("activation_backward", &activation_backward);
  m.impl("dropout", &drop);
  m.impl("dropout_backward", &dropout_backward);
  m.impl("rope", &rope);
  m.impl("rope_", &rope_);
  m.impl("masked_softmax", &masked_softmax);
  m.impl("masked_softmax_backward", &masked_softmax_backward);
  m.impl("adamw_", &adamw_);
  m.impl("sum_of_squares", &sum_of_squares);
  m.impl("mask_", &mask_);
  m.impl("gather_rows", &gather_rows);
  m.impl("gather_rows_backward", &gather_rows_backward);
  m.impl("put_rows", &put_rows);
  m.impl("put_rows_backward", &put_rows_backward);
  m.impl("cross_entropy", &cross_entropy);
  m.impl("cross_entropy_gradient_", &cross_entropy_gradient_);
  m.impl("nll_and_gradient_", &nll_and_gradient_);
  m.impl("scale_rows_", &scale_rows_);
}
