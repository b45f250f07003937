// Attention of one head over one text in FP32.
#pragma once

#include "vectors.h"

#ifdef MLIS_VECTORS
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace mlis {

// Rows and vectors of columns of a step: 8 x 2 sums take half of the 32 registers of AVX-512, 6 x 2 all but 4 of AVX2's
// 16, 6 x 4 all but 8 of NEON's 32.
constexpr int64_t kQueries = kLanes == 16 ? 8 : 6;
constexpr int kAcross = kLanes == 4 ? 4 : 2;
constexpr int64_t kColumns = kAcross * kLanes;

struct FloatScratch {
  std::vector<float> keys, values, query, scores;
};

// to = a b: (kQueries, depth) by (depth, kColumns). stride_*: floats from one row to the next.
inline void multiply_step(const float* a, int64_t stride_a, const float* b, int64_t stride_b, int64_t depth, float* to,
                          int64_t stride_to) {
  Floats sums[kQueries][kAcross];
#pragma GCC unroll 8
  for (int i = 0; i < kQueries; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kAcross; ++j) sums[i][j] = spread(0.0f);
  for (int64_t k = 0; k < depth; ++k) {
    Floats columns[kAcross];
#pragma GCC unroll 4
    for (int j = 0; j < kAcross; ++j) columns[j] = load(b + k * stride_b + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kQueries; ++i) {
      const Floats one = spread(a[i * stride_a + k]);
#pragma GCC unroll 4
      for (int j = 0; j < kAcross; ++j) sums[i][j] = multiply_add(one, columns[j], sums[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kQueries; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kAcross; ++j) store(to + i * stride_to + j * kLanes, sums[i][j]);
}

// scores = softmax, in powers of 2, of `factor` * the first `keys` scores; the rest of `wide` becomes 0.
inline void softmax(float* scores, int64_t keys, int64_t wide, float factor) {
  const Floats by = spread(factor), none = spread(0.0f), low = spread(-INFINITY);
  Floats top = low;
  for (int64_t j = 0; j < keys; j += kLanes) top = greatest(top, first_of(load(scores + j), keys - j, low));
  const Floats most = spread(greatest_of(top) * factor);
  Floats total = none;
  for (int64_t j = 0; j < keys; j += kLanes) {
    const Floats power = exp2_nonpositive(multiply_subtract(load(scores + j), by, most));
    const Floats e = first_of(power, keys - j, none);
    total = total + e;
    store(scores + j, e);
  }
  const Floats share = spread(1.0f / sum_of(total));
  for (int64_t j = 0; j < keys; j += kLanes) store(scores + j, load(scores + j) * share);
  for (int64_t j = (keys + kLanes - 1) / kLanes * kLanes; j < wide; j += kLanes) store(scores + j, none);
}

// q, k, v: `length` rows of `dim` floats (a multiple of 32), `stride` from one to the next; o: the same, `stride_o`.
inline void attend_in_floats(const float* q, const float* k, const float* v, int64_t stride, float* o, int64_t stride_o,
                             int64_t length, int64_t dim, float log2_scale, FloatScratch& s) {
  const int64_t wide = (length + kColumns - 1) / kColumns * kColumns;
  s.keys.resize(dim * wide);
  s.query.resize(kQueries * dim);
  s.values.resize(kQueries * kColumns);
  s.scores.resize(kQueries * wide);
  for (int64_t n = 0; n < wide; n += kLanes)  // keys: (dim, wide)
    for (int64_t d = 0; d < dim; d += kLanes) {
      Floats r[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) r[i] = n + i < length ? load(k + (n + i) * stride + d) : spread(0.0f);
      transpose(r);
      for (int64_t i = 0; i < kLanes; ++i) store(s.keys.data() + (d + i) * wide + n, r[i]);
    }
  for (int64_t m = 0; m < length; m += kQueries) {
    const int64_t rows = std::min(kQueries, length - m);
    const float* query = q + m * stride;
    int64_t stride_q = stride;
    if (rows < kQueries) {
      std::fill(s.query.begin(), s.query.end(), 0.0f);
      for (int64_t i = 0; i < rows; ++i) std::copy_n(query + i * stride, dim, s.query.data() + i * dim);
      query = s.query.data();
      stride_q = dim;
    }
    for (int64_t n = 0; n < wide; n += kColumns)
      multiply_step(query, stride_q, s.keys.data() + n, wide, dim, s.scores.data() + n, wide);
    for (int64_t i = 0; i < kQueries; ++i) softmax(s.scores.data() + i * wide, length, wide, log2_scale);
    for (int64_t d = 0; d < dim; d += kColumns) {
      const bool whole = rows == kQueries;
      float* to = whole ? o + m * stride_o + d : s.values.data();
      multiply_step(s.scores.data(), wide, v + d, stride, length, to, whole ? stride_o : kColumns);
      for (int64_t i = 0; !whole && i < rows; ++i) std::copy_n(to + i * kColumns, kColumns, o + (m + i) * stride_o + d);
    }
  }
}

}  // namespace mlis

#endif
