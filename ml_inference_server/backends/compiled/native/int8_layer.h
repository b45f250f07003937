// One layer of BERT and its kin over packed texts, its matrices in INT8, without what belongs to PyTorch.
//
// Texts do not see each other: some of them at a time pass through the whole layer, while what is computed of them is
// in the L2 cache. `loop`(count, f) calls f(first, last) for parts of 0 .. count - 1, on all threads that are free.
#pragma once

#include "float_attention.h"
#include "int8_linear.h"

#ifdef MLIS_VECTORS
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

namespace mlis {

constexpr int64_t kTokensTogether = 192;  // of texts that pass through the layer together, unless one is longer
constexpr int64_t kRowsTogether = 48;     // of which the inner floats of a thread stay in its L2 cache
static_assert(kRowsTogether % 16 == 0);   // Int8Rows

struct Layer {
  std::array<Int8Matrix, 4> matrices;
  std::array<const float*, 4> norms;
  int64_t width, inner, heads;
  float eps;
};

// row = normalised row + more.
inline void add_and_norm(float* row, const float* more, const float* weight, const float* bias, float eps,
                         int64_t width) {
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
  std::vector<Byte> bytes;
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
template <typename Loop, typename F>
void for_rows(const Loop& loop, int64_t rows, const F& f) {
  const int64_t parts = (rows + kRowsTogether - 1) / kRowsTogether;
  loop(parts, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) f(i * kRowsTogether, std::min(rows, (i + 1) * kRowsTogether));
  });
}

// The texts whose tokens are rows 0 .. starts[texts] - starts[0] - 1 of x; out may be x.
template <typename Loop>
void run_together(const Loop& loop, const Layer& layer, const float* x, const int64_t* starts, int64_t texts,
                  float* out) {
  const int64_t width = layer.width, inner = layer.inner, dim = width / layer.heads, tokens = starts[texts] - starts[0];
  thread_local std::vector<float> joined_kept, attended_kept;
  joined_kept.resize(tokens * 3 * width);
  attended_kept.resize(tokens * width);
  float *joined = joined_kept.data(), *attended = attended_kept.data();
  for_rows(loop, tokens, [&](int64_t begin, int64_t end) {
    thread_local Bytes kept;
    const Int8Rows bytes = kept.rows(kRowsTogether, width);
    for (int64_t m = begin; m < end; ++m) quantise_row(x + m * width, bytes, m - begin);
    multiply_int8<false>(bytes, end - begin, layer.matrices[0], joined + begin * 3 * width);
  });
  const float log2_scale = static_cast<float>(1.4426950408889634 / std::sqrt(static_cast<double>(dim)));
  loop(texts * layer.heads, [&](int64_t first, int64_t last) {
    thread_local FloatScratch scratch;
    for (int64_t i = first; i < last; ++i) {
      const int64_t text = i / layer.heads, head = i % layer.heads, row = starts[text] - starts[0];
      const float* q = joined + row * 3 * width + head * dim;
      attend_in_floats(q, q + width, q + 2 * width, 3 * width, attended + row * width + head * dim, width,
                       starts[text + 1] - starts[text], dim, log2_scale, scratch);
    }
  });
  for_rows(loop, tokens, [&](int64_t begin, int64_t end) {
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

// The layer over `texts` texts, whose tokens are the rows from starts[0] on of x; out may be x.
template <typename Loop>
void run_layer(const Loop& loop, int64_t threads, const Layer& layer, const float* x, const int64_t* starts,
               int64_t texts, float* out) {
  std::vector<int64_t> groups{0};  // the first text of each
  for (int64_t t = 1; t <= texts; ++t)
    if (t == texts || starts[t + 1] - starts[groups.back()] > kTokensTogether) groups.push_back(t);
  const int64_t count = static_cast<int64_t>(groups.size()) - 1;
  auto some = [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const int64_t offset = starts[groups[g]] * layer.width;
      run_together(loop, layer, x + offset, starts + groups[g], groups[g + 1] - groups[g], out + offset);
    }
  };
  if (count >= threads)
    loop(count, some);
  else
    some(0, count);  // the threads share the rows of each group instead
}

}  // namespace mlis

#endif
