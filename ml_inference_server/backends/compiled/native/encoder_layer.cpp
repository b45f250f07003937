// One layer of BERT and its kin over packed texts, BF16 in AMX tiles: torch.ops.mlis.encoder_layer.
//
//   y = norm(x + output(attention(query(x), key(x), value(x))));  norm(y + second(gelu(first(y))))
//
// x: (tokens, width), BF16; starts: as in packed_attention.cpp. matrices: the tiles (linear.h) of query, key, value,
// output, first, second; biases: theirs, FP32. norms: weight and bias of the two normalisations, FP32. The layer is one
// call, so that 256 rows at a time pass through all that follows attention while they are in the L2 cache.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <cstdint>

#include "attention.h"
#include "linear.h"

namespace {

#ifdef MLIS_AMX

using namespace mlis;

constexpr int64_t kRowsInCache = 256;

inline __m512 wide(const uint16_t* from) {
  const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
}

// out = normalised a + b, a row at a time; may be in place. Mean first, then variance: no digits are lost.
void add_and_norm(const uint16_t* a, const uint16_t* b, const float* weight, const float* bias, float eps,
                  uint16_t* out, int64_t rows, int64_t width) {
  at::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
    thread_local std::vector<float> kept;
    kept.resize(width);
    float* sums = kept.data();
    for (int64_t i = begin * width; i < end * width; i += width) {
      __m512 total = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
      for (int64_t j = 0; j < width; j += 16) {
        const __m512 sum = _mm512_add_ps(wide(a + i + j), wide(b + i + j));
        _mm512_storeu_ps(sums + j, sum);
        total = _mm512_add_ps(total, sum);
      }
      const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(total) / static_cast<float>(width));
      for (int64_t j = 0; j < width; j += 16) {
        const __m512 centred = _mm512_sub_ps(_mm512_loadu_ps(sums + j), mean);
        squares = _mm512_fmadd_ps(centred, centred, squares);
      }
      const float variance = _mm512_reduce_add_ps(squares) / static_cast<float>(width);
      const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(variance + eps));
      auto normalised = [&](int64_t j) {
        const __m512 centred = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(sums + j), mean), scale);
        return _mm512_fmadd_ps(centred, _mm512_loadu_ps(weight + j), _mm512_loadu_ps(bias + j));
      };
      for (int64_t j = 0; j < width; j += 32)
        _mm512_storeu_si512(out + i + j, (__m512i)_mm512_cvtne2ps_pbh(normalised(j + 16), normalised(j)));
    }
  });
}

#endif  // MLIS_AMX

at::Tensor encoder_layer(const at::Tensor& x, const at::Tensor& starts, at::TensorList matrices, at::TensorList biases,
                         at::TensorList norms, int64_t heads, double eps) {
#ifdef MLIS_AMX
  const int64_t tokens = x.size(0), width = x.size(1), inner = biases[4].size(0), texts = starts.size(0) - 1;
  TORCH_CHECK(amx_granted(), "encoder_layer: the kernel does not grant AMX");
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && x.is_contiguous(), "encoder_layer: x is contiguous BF16");
  TORCH_CHECK(starts.scalar_type() == at::kLong && starts.is_contiguous(), "encoder_layer: starts: contiguous int64");
  TORCH_CHECK(matrices.size() == 6 && biases.size() == 6 && norms.size() == 4, "encoder_layer: parameters");
  TORCH_CHECK(width % (32 * heads) == 0 && inner % 32 == 0, "encoder_layer: sizes are multiples of 32");
  const int64_t* first = starts.const_data_ptr<int64_t>();
  const int64_t real = first[texts];
  TORCH_CHECK(real <= tokens, "encoder_layer: the texts end at ", real, ", the tokens at ", tokens);
  auto read = [](const at::Tensor& t) { return reinterpret_cast<const uint16_t*>(t.const_data_ptr()); };
  auto write = [](const at::Tensor& t) { return reinterpret_cast<uint16_t*>(t.mutable_data_ptr()); };
  std::array<Matrix, 6> matrix;
  for (size_t i = 0; i < 6; ++i) {
    const int64_t in = i == 5 ? inner : width, out = i == 4 ? inner : width;
    TORCH_CHECK(matrices[i].scalar_type() == at::kBFloat16 && matrices[i].is_contiguous() &&
                    matrices[i].numel() == in * out && biases[i].scalar_type() == at::kFloat &&
                    biases[i].is_contiguous() && biases[i].numel() == out,
                "encoder_layer: matrix ", i);
    matrix[i] = {read(matrices[i]), biases[i].const_data_ptr<float>(), in, out};
  }
  std::array<const float*, 4> norm;
  for (size_t i = 0; i < 4; ++i) {
    TORCH_CHECK(norms[i].scalar_type() == at::kFloat && norms[i].numel() == width, "encoder_layer: norm ", i);
    norm[i] = norms[i].const_data_ptr<float>();
  }

  const int64_t some = std::min(kRowsInCache, (tokens + kBlock - 1) / kBlock * kBlock);
  const auto out = at::empty_like(x), q = at::empty_like(x), k = at::empty_like(x), v = at::empty_like(x);
  const auto x_tiles = at::empty({some, width}, x.options()), inner_tiles = at::empty({some, inner}, x.options());
  for (int64_t m = 0; m < tokens; m += some) {
    const int64_t rows = std::min(some, tokens - m);
    rows_to_tiles(read(x) + m * width, write(x_tiles), rows, width);
    multiply_all<false>(read(x_tiles), matrix[0], write(q) + m * width, rows);
    multiply_all<false>(read(x_tiles), matrix[1], write(k) + m * width, rows);
    multiply_all<false>(read(x_tiles), matrix[2], write(v) + m * width, rows);
  }
  // Nothing attends from tokens after the last text, but they must stay finite.
  uint16_t* attended = write(out);
  std::fill(attended + real * width, attended + tokens * width, 0);
  attend(read(q), read(k), read(v), attended, first, texts, heads, width / heads,
         1.0 / std::sqrt(static_cast<double>(width / heads)), false);
  for (int64_t m = 0; m < tokens; m += some) {
    const int64_t rows = std::min(some, tokens - m);
    uint16_t *y = write(q) + m * width, *z = attended + m * width;  // what lay there has been used
    rows_to_tiles(z, write(x_tiles), rows, width);
    multiply_all<false>(read(x_tiles), matrix[3], y, rows);
    add_and_norm(y, read(x) + m * width, norm[0], norm[1], static_cast<float>(eps), y, rows, width);
    rows_to_tiles(y, write(x_tiles), rows, width);
    multiply_all<true>(read(x_tiles), matrix[4], write(inner_tiles), rows);
    multiply_all<false>(read(inner_tiles), matrix[5], z, rows);
    add_and_norm(z, y, norm[2], norm[3], static_cast<float>(eps), z, rows, width);
  }
  return out;
#else
  TORCH_CHECK(false, "encoder_layer: built for a processor without AMX");
#endif
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mlis, m) {
  m.def(
      "encoder_layer(Tensor x, Tensor starts, Tensor[] matrices, Tensor[] biases, Tensor[] norms, int heads, float eps)"
      " -> Tensor");
}

TORCH_LIBRARY_IMPL(mlis, CPU, m) { m.impl("encoder_layer", encoder_layer); }
