// Attention of one head over one text in FP32, 16 numbers at a time.
#pragma once

#include "vectors.h"

#ifdef __AVX512F__
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace mlis {

constexpr int64_t kQueries = 8;  // rows of a step; 8 rows of 2 x 16 sums fill half of the registers

struct FloatScratch {
  std::vector<float> keys, values, query, scores;
};

// to = a b: (8, depth) by (depth, 32). stride_*: floats from one row to the next.
inline void multiply_8_by_32(const float* a, int64_t stride_a, const float* b, int64_t stride_b, int64_t depth,
                             float* to, int64_t stride_to) {
  __m512 sums[kQueries][2];
#pragma GCC unroll 8
  for (int i = 0; i < kQueries; ++i) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < depth; ++k) {
    const __m512 left = _mm512_loadu_ps(b + k * stride_b), right = _mm512_loadu_ps(b + k * stride_b + 16);
#pragma GCC unroll 8
    for (int i = 0; i < kQueries; ++i) {
      const __m512 one = _mm512_set1_ps(a[i * stride_a + k]);
      sums[i][0] = _mm512_fmadd_ps(one, left, sums[i][0]);
      sums[i][1] = _mm512_fmadd_ps(one, right, sums[i][1]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kQueries; ++i) {
    _mm512_storeu_ps(to + i * stride_to, sums[i][0]);
    _mm512_storeu_ps(to + i * stride_to + 16, sums[i][1]);
  }
}

// scores = softmax, in powers of 2, of `factor` * the first `keys` scores; the rest of `wide` becomes 0.
inline void softmax(float* scores, int64_t keys, int64_t wide, float factor) {
  const __m512 by = _mm512_set1_ps(factor);
  auto kept = [&](int64_t j) { return static_cast<__mmask16>(keys - j >= 16 ? 0xffff : (1u << (keys - j)) - 1); };
  __m512 top = _mm512_set1_ps(-INFINITY);
  for (int64_t j = 0; j < keys; j += 16) top = _mm512_mask_max_ps(top, kept(j), top, _mm512_loadu_ps(scores + j));
  const __m512 most = _mm512_set1_ps(_mm512_reduce_max_ps(top) * factor);
  __m512 total = _mm512_setzero_ps();
  for (int64_t j = 0; j < keys; j += 16) {
    const __m512 power = exp2_nonpositive(_mm512_fmsub_ps(_mm512_loadu_ps(scores + j), by, most));
    const __m512 e = _mm512_maskz_mov_ps(kept(j), power);
    total = _mm512_add_ps(total, e);
    _mm512_storeu_ps(scores + j, e);
  }
  const __m512 share = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(total));
  for (int64_t j = 0; j < keys; j += 16)
    _mm512_storeu_ps(scores + j, _mm512_mul_ps(_mm512_loadu_ps(scores + j), share));
  for (int64_t j = (keys + 15) / 16 * 16; j < wide; j += 16) _mm512_storeu_ps(scores + j, _mm512_setzero_ps());
}

// q, k, v: `length` rows of `dim` floats (a multiple of 32), `stride` from one to the next; o: the same, `stride_o`.
inline void attend_in_floats(const float* q, const float* k, const float* v, int64_t stride, float* o, int64_t stride_o,
                             int64_t length, int64_t dim, float log2_scale, FloatScratch& s) {
  const int64_t wide = (length + 31) / 32 * 32;
  s.keys.resize(dim * wide);
  s.query.resize(kQueries * dim);
  s.values.resize(kQueries * dim);
  s.scores.resize(kQueries * wide);
  for (int64_t n = 0; n < wide; n += 16)  // keys: (dim, wide)
    for (int64_t d = 0; d < dim; d += 16) {
      __m512i r[16];
      for (int64_t i = 0; i < 16; ++i)
        r[i] = n + i < length ? _mm512_loadu_si512(k + (n + i) * stride + d) : _mm512_setzero_si512();
      transpose16(r);
      for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(s.keys.data() + (d + i) * wide + n, r[i]);
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
    for (int64_t n = 0; n < wide; n += 32)
      multiply_8_by_32(query, stride_q, s.keys.data() + n, wide, dim, s.scores.data() + n, wide);
    for (int64_t i = 0; i < kQueries; ++i) softmax(s.scores.data() + i * wide, length, wide, log2_scale);
    for (int64_t d = 0; d < dim; d += 32) {
      const bool whole = rows == kQueries;
      float* to = whole ? o + m * stride_o + d : s.values.data();
      multiply_8_by_32(s.scores.data(), wide, v + d, stride, length, to, whole ? stride_o : 32);
      for (int64_t i = 0; !whole && i < rows; ++i) std::copy_n(to + i * 32, 32, o + (m + i) * stride_o + d);
    }
  }
}

}  // namespace mlis

#endif
