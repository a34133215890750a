// The kernels as torch operators: what is checked before a kernel is launched, and what it writes to.
//
// Their schemas, fakes and gradients are in Python, beside a reference of each (../norm.py and so on).
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

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
  m.impl("cross_entropy", &cross_entropy);
  m.impl("cross_entropy_gradient_", &cross_entropy_gradient_);
  m.impl("nll_and_gradient_", &nll_and_gradient_);
  m.impl("scale_rows_", &scale_rows_);
}
