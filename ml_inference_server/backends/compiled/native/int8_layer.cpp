// One layer of BERT and its kin over packed texts, its matrices in INT8: torch.ops.mlis.int8_layer.
//
// As encoder_layer.cpp, but x, attention and normalisation are FP32, and query, key and value come from one matrix.
// matrices: the panels (int8_linear.h) of these, output, first, second; scales, sums, biases: theirs. Texts do not see
// each other: some of them at a time pass through the whole layer, while what is computed of them is in the L2 cache.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "float_attention.h"
#include "int8_linear.h"

namespace {

#ifdef MLIS_VECTORS

using namespace mlis;

constexpr int64_t kTokensTogether = 192;  // of texts that pass through the layer together, unless one is longer
constexpr int64_t kRowsTogether = 48;     // of which the inner floats of a thread stay in its L2 cache

struct Layer {
  std::array<Int8Matrix, 4> matrices;
  std::array<const float*, 4> norms;
  int64_t width, inner, heads;
  float eps;
};

// row = normalised row + more.
void add_and_norm(float* row, const float* more, const float* weight, const float* bias, float eps, int64_t width) {
  Floats total = spread(0.0f), squares = spread(0.0f);
  for (int64_t j = 0; j < width; j += kLanes) {
    const Floats sum = load(row + j) + load(more + j);
    store(row + j, sum);
    total = total + sum;
  }
  const Floats mean = spread(sum_of(total) / static_cast<float>(width));
  for (int64_t j = 0; j < width; j += kLanes) {
    const Floats centred = load(row + j) - mean;
    squares = multiply_add(centred, centred, squares);
  }
  const float variance = sum_of(squares) / static_cast<float>(width);
  const Floats scale = spread(1.0f / std::sqrt(variance + eps));
  for (int64_t j = 0; j < width; j += kLanes) {
    const Floats centred = (load(row + j) - mean) * scale;
    store(row + j, multiply_add(centred, load(weight + j), load(bias + j)));
  }
}

// A thread's own rows as bytes.
struct Bytes {
  std::vector<uint8_t> bytes;
  std::vector<float> scales;
  std::vector<int32_t> zeros;

  Int8Rows rows(int64_t most, int64_t width) {
    bytes.resize(most * width);
    scales.resize(most);
    zeros.resize(most);
    return {bytes.data(), scales.data(), zeros.data(), width};
  }
};

// f(begin, end) for parts of 0 .. rows - 1, none above kRowsTogether, on all threads that are free.
template <typename F>
void for_rows(int64_t rows, const F& f) {
  const int64_t parts = (rows + kRowsTogether - 1) / kRowsTogether;
  at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) f(i * kRowsTogether, std::min(rows, (i + 1) * kRowsTogether));
  });
}

// The texts whose tokens are rows 0 .. starts[texts] - starts[0] - 1 of x; out may be x.
void run(const Layer& layer, const float* x, const int64_t* starts, int64_t texts, float* out) {
  const int64_t width = layer.width, inner = layer.inner, dim = width / layer.heads, tokens = starts[texts] - starts[0];
  thread_local std::vector<float> joined_kept, attended_kept;
  joined_kept.resize(tokens * 3 * width);
  attended_kept.resize(tokens * width);
  float *joined = joined_kept.data(), *attended = attended_kept.data();
  for_rows(tokens, [&](int64_t begin, int64_t end) {
    thread_local Bytes kept;
    const Int8Rows bytes = kept.rows(kRowsTogether, width);
    for (int64_t m = begin; m < end; ++m) quantise_row(x + m * width, bytes, m - begin);
    multiply_int8<false>(bytes, end - begin, layer.matrices[0], joined + begin * 3 * width);
  });
  const float log2_scale = static_cast<float>(1.4426950408889634 / std::sqrt(static_cast<double>(dim)));
  at::parallel_for(0, texts * layer.heads, 1, [&](int64_t first, int64_t last) {
    thread_local FloatScratch scratch;
    for (int64_t i = first; i < last; ++i) {
      const int64_t text = i / layer.heads, head = i % layer.heads, row = starts[text] - starts[0];
      const float* q = joined + row * 3 * width + head * dim;
      attend_in_floats(q, q + width, q + 2 * width, 3 * width, attended + row * width + head * dim, width,
                       starts[text + 1] - starts[text], dim, log2_scale, scratch);
    }
  });
  for_rows(tokens, [&](int64_t begin, int64_t end) {
    thread_local Bytes kept, inner_kept;
    thread_local std::vector<float> inner_floats, first_kept;
    inner_floats.resize(kRowsTogether * inner);
    first_kept.resize(kRowsTogether * width);
    const Int8Rows bytes = kept.rows(kRowsTogether, width), inner_bytes = inner_kept.rows(kRowsTogether, inner);
    const int64_t rows = end - begin;
    float* y = first_kept.data();
    for (int64_t m = 0; m < rows; ++m) quantise_row(attended + (begin + m) * width, bytes, m);
    multiply_int8<false>(bytes, rows, layer.matrices[1], y);
    for (int64_t m = 0; m < rows; ++m) {
      add_and_norm(y + m * width, x + (begin + m) * width, layer.norms[0], layer.norms[1], layer.eps, width);
      quantise_row(y + m * width, bytes, m);
    }
    multiply_int8<true>(bytes, rows, layer.matrices[2], inner_floats.data());
    for (int64_t m = 0; m < rows; ++m) quantise_row(inner_floats.data() + m * inner, inner_bytes, m);
    float* z = out + begin * width;
    multiply_int8<false>(inner_bytes, rows, layer.matrices[3], z);
    for (int64_t m = 0; m < rows; ++m)
      add_and_norm(z + m * width, y + m * width, layer.norms[2], layer.norms[3], layer.eps, width);
  });
}

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

// What the operator runs on, and the outputs of a panel of its weights; "" and 0 where it does not run.
std::string int8_instructions() {
#ifdef MLIS_VECTORS
  return kInt8Instructions;
#else
  return "";
#endif
}

int64_t int8_panel() {
#ifdef MLIS_VECTORS
  return kPanel;
#else
  return 0;
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
  std::vector<int64_t> groups{0};  // the first text of each
  for (int64_t t = 1; t <= texts; ++t)
    if (t == texts || first[t + 1] - first[groups.back()] > kTokensTogether) groups.push_back(t);
  const int64_t count = static_cast<int64_t>(groups.size()) - 1;
  auto some = [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g)
      run(layer, from + first[groups[g]] * width, first + groups[g], groups[g + 1] - groups[g],
          to + first[groups[g]] * width);
  };
  if (count >= at::get_num_threads())
    at::parallel_for(0, count, 1, some);
  else
    some(0, count);  // the threads share the rows of each group instead
  return out;
#else
  TORCH_CHECK(false, "int8_layer: built for a processor without AVX2");
#endif
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mlis, m) {
  m.def(
      "int8_layer(Tensor x, Tensor starts, Tensor[] matrices, Tensor[] scales, Tensor[] sums, Tensor[] biases, "
      "Tensor[] norms, int heads, float eps) -> Tensor");
  m.def("int8_instructions() -> str", int8_instructions);
  m.def("int8_panel() -> int", int8_panel);
}

TORCH_LIBRARY_IMPL(mlis, CPU, m) { m.impl("int8_layer", int8_layer); }
