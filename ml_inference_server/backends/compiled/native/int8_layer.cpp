// One layer of BERT and its kin over packed texts, its matrices in INT8: torch.ops.mlis.int8_layer.
//
// As encoder_layer.cpp, but x, attention and normalisation are FP32, and query, key and value come from one matrix.
// matrices: the panels (int8_linear.h) of these, output, first, second; scales, sums, biases: theirs.

#include "int8_layer.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <tuple>

namespace {

#ifdef MLIS_VECTORS

using namespace mlis;

Layer checked(const at::Tensor& x, at::TensorList matrices, at::TensorList scales, at::TensorList sums,
              at::TensorList biases, at::TensorList norms, int64_t heads, double eps) {
  const int64_t width = x.size(1);
  TORCH_CHECK(matrices.size() == 4 && scales.size() == 4 && sums.size() == 4 && biases.size() == 4 && norms.size() == 4,
              "int8_layer: parameters");
  const int64_t inner = biases[2].numel();
  TORCH_CHECK(width % (32 * heads) == 0 && width % 64 == 0 && inner % 64 == 0, "int8_layer: sizes");
  Layer layer{{}, {}, width, inner, heads, static_cast<float>(eps)};
  for (size_t i = 0; i < 4; ++i) {
    const int64_t in = i == 3 ? inner : width, out = i == 0 ? 3 * width : i == 2 ? inner : width;
    TORCH_CHECK(matrices[i].scalar_type() == at::kChar && matrices[i].is_contiguous() &&
                    matrices[i].numel() == in * out && scales[i].scalar_type() == at::kFloat &&
                    scales[i].numel() == out && sums[i].scalar_type() == at::kInt && sums[i].numel() == out &&
                    biases[i].scalar_type() == at::kFloat && biases[i].numel() == out,
                "int8_layer: matrix ", i);
    layer.matrices[i] = {matrices[i].const_data_ptr<int8_t>(),
                         scales[i].const_data_ptr<float>(),
                         sums[i].const_data_ptr<int32_t>(),
                         biases[i].const_data_ptr<float>(),
                         in,
                         out};
    TORCH_CHECK(norms[i].scalar_type() == at::kFloat && norms[i].numel() == width, "int8_layer: norm ", i);
    layer.norms[i] = norms[i].const_data_ptr<float>();
  }
  return layer;
}

#endif  // MLIS_VECTORS

// What the operator runs on, and the outputs of a panel of its weights and the inputs that lie together there; "" and 0
// where it does not run.
std::string instructions() {
#ifdef MLIS_VECTORS
  return int8_instructions();
#else
  return "";
#endif
}

std::tuple<int64_t, int64_t> int8_panel() {
#ifdef MLIS_VECTORS
  return {kPanel, kInputs};
#else
  return {0, 0};
#endif
}

int64_t multiplied_in_cache(int64_t repeats) {
#ifdef MLIS_VECTORS
  return multiply_in_cache(repeats);
#else
  TORCH_CHECK(false, "int8_multiply_in_cache: built for a processor without AVX2 or ARM's dot products, not ", repeats);
#endif
}

at::Tensor int8_layer(const at::Tensor& x, const at::Tensor& starts, at::TensorList matrices, at::TensorList scales,
                      at::TensorList sums, at::TensorList biases, at::TensorList norms, int64_t heads, double eps) {
#ifdef MLIS_VECTORS
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.is_contiguous() && x.dim() == 2, "int8_layer: x is contiguous FP32");
  TORCH_CHECK(starts.scalar_type() == at::kLong && starts.is_contiguous(), "int8_layer: starts: contiguous int64");
  const Layer layer = checked(x, matrices, scales, sums, biases, norms, heads, eps);
  const int64_t width = layer.width, tokens = x.size(0), texts = starts.size(0) - 1;
  const int64_t* first = starts.const_data_ptr<int64_t>();
  TORCH_CHECK(first[texts] <= tokens, "int8_layer: the texts end at ", first[texts], ", the tokens at ", tokens);
  const auto out = at::empty_like(x);
  const float* from = x.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  // Nothing reads what comes after the last text, but it must stay finite.
  std::fill(to + first[texts] * width, to + tokens * width, 0.0f);
  const auto loop = [](int64_t count, const auto& f) { at::parallel_for(0, count, 1, f); };
  run_layer(loop, at::get_num_threads(), layer, from, first, texts, to);
  return out;
#else
  TORCH_CHECK(false, "int8_layer: built for a processor without AVX2 or ARM's dot products");
#endif
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mlis, m) {
  m.def(
      "int8_layer(Tensor x, Tensor starts, Tensor[] matrices, Tensor[] scales, Tensor[] sums, Tensor[] biases, "
      "Tensor[] norms, int heads, float eps) -> Tensor");
  m.def("int8_instructions() -> str", instructions);
  m.def("int8_panel() -> (int, int)", int8_panel);
  m.def("int8_multiply_in_cache(int repeats) -> int", multiplied_in_cache);
}

TORCH_LIBRARY_IMPL(mlis, CPU, m) { m.impl("int8_layer", int8_layer); }
