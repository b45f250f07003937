// x W^T + b in INT8 with AVX-512 VNNI, and GELU of it if wanted: bytes in, exact 32-bit sums, FP32 out.
//
// W is symmetric with a scale for each output: W[n][k] = scale[n] * w[n][k], w in -127 .. 127. x is quantised here, a
// row at a time, with a scale and a zero point of its own: x[m][k] = s[m] * (u[m][k] - zero[m]), u in 0 .. 255. Then
//
//   sum over k of x W = s[m] * scale[n] * (sum of u w - zero[m] * sum of w[n])
//
// w lies in panels of 64 outputs: for each 4 inputs, the 4 bytes of output 0, then of 1, ... (packed.py, Int8Layer).
// Inputs and outputs are multiples of 64.
#pragma once

#include "vectors.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define MLIS_VNNI 1
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace mlis {

constexpr int64_t kPanel = 64;  // outputs whose weights lie together
constexpr int kRowsAtOnce = 6;  // 6 rows of 4 x 16 sums fill 24 of the 32 registers

// One matrix, in -> out. sums: of the bytes of each output.
struct Int8Matrix {
  const int8_t* panels;
  const float* scales;
  const int32_t* sums;
  const float* bias;
  int64_t in, out;
};

// Rows of bytes, `width` of them each, with what is needed to read them as numbers.
struct Int8Rows {
  uint8_t* bytes;
  float* scales;
  int32_t* zeros;
  int64_t width;
};

// Row m of `rows` from `width` floats. What is not finite makes the row's scale, and so all that follows, NaN.
inline void quantise_row(const float* from, const Int8Rows& rows, int64_t m) {
  const int64_t width = rows.width;
  __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps(), check = _mm512_setzero_ps();
  for (int64_t j = 0; j < width; j += 16) {
    const __m512 x = _mm512_loadu_ps(from + j);
    low = _mm512_min_ps(low, x);
    high = _mm512_max_ps(high, x);
    check = _mm512_fmadd_ps(x, _mm512_setzero_ps(), check);  // 0 * x is NaN where x is not finite
  }
  const float least = _mm512_reduce_min_ps(low), most = _mm512_reduce_max_ps(high);
  const float scale = std::max((most - least) / 255.0f, 1e-30f);
  const int32_t zero = static_cast<int32_t>(std::nearbyint(std::clamp(-least / scale, 0.0f, 255.0f)));
  rows.scales[m] = scale + _mm512_reduce_add_ps(check);
  rows.zeros[m] = zero;
  const __m512 inverse = _mm512_set1_ps(1.0f / scale);
  const __m512i offset = _mm512_set1_epi32(zero), none = _mm512_setzero_si512();
  uint8_t* to = rows.bytes + m * width;
  for (int64_t j = 0; j < width; j += 16) {
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(from + j), inverse));
    const __m512i value = _mm512_max_epi32(_mm512_add_epi32(whole, offset), none);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + j), _mm512_cvtusepi32_epi8(value));
  }
}

// The exact sums of `kRows` rows of x and the 64 outputs of a panel; to: (kRows, 64). Nothing else stands here, so that
// the compiler keeps all sums in registers.
template <int kRows>
inline void sum_panel(const uint8_t* x, const int8_t* w, int64_t in, int32_t* to) {
  __m512i sums[kRows][4];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[i][j] = _mm512_setzero_si512();
  for (int64_t k = 0; k < in; k += 4, w += 4 * kPanel) {
    __m512i weights[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) weights[j] = _mm512_loadu_si512(w + 64 * j);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      int32_t four;
      std::memcpy(&four, x + i * in + k, 4);
      const __m512i row = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sums[i][j] = _mm512_dpbusd_epi32(sums[i][j], row, weights[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) _mm512_store_si512(to + i * kPanel + 16 * j, sums[i][j]);
}

// `kRows` rows from row m on by one panel.
template <int kRows, bool kGelu>
inline void multiply_panel(const Int8Rows& x, int64_t m, const Int8Matrix& matrix, int64_t n, float* out) {
  alignas(64) int32_t sums[kRows * kPanel];
  sum_panel<kRows>(x.bytes + m * matrix.in, matrix.panels + n * matrix.in, matrix.in, sums);
  for (int64_t j = 0; j < kPanel; j += 16) {
    const __m512i all = _mm512_loadu_si512(matrix.sums + n + j);
    const __m512 scales = _mm512_loadu_ps(matrix.scales + n + j), bias = _mm512_loadu_ps(matrix.bias + n + j);
    for (int i = 0; i < kRows; ++i) {
      const __m512i offset = _mm512_mullo_epi32(_mm512_set1_epi32(x.zeros[m + i]), all);
      const __m512 exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_load_si512(sums + i * kPanel + j), offset));
      __m512 y = _mm512_fmadd_ps(_mm512_mul_ps(exact, scales), _mm512_set1_ps(x.scales[m + i]), bias);
      if constexpr (kGelu) y = gelu(y);
      _mm512_storeu_ps(out + i * matrix.out + n + j, y);
    }
  }
}

// All outputs of `rows` rows; out: (rows, matrix.out). A panel stays in the cache for all rows.
template <bool kGelu>
void multiply_int8(const Int8Rows& x, int64_t rows, const Int8Matrix& matrix, float* out) {
  for (int64_t n = 0; n < matrix.out; n += kPanel) {
    int64_t m = 0;
    for (; m + kRowsAtOnce <= rows; m += kRowsAtOnce)
      multiply_panel<kRowsAtOnce, kGelu>(x, m, matrix, n, out + m * matrix.out);
    switch (rows - m) {
      case 5:
        multiply_panel<5, kGelu>(x, m, matrix, n, out + m * matrix.out);
        break;
      case 4:
        multiply_panel<4, kGelu>(x, m, matrix, n, out + m * matrix.out);
        break;
      case 3:
        multiply_panel<3, kGelu>(x, m, matrix, n, out + m * matrix.out);
        break;
      case 2:
        multiply_panel<2, kGelu>(x, m, matrix, n, out + m * matrix.out);
        break;
      case 1:
        multiply_panel<1, kGelu>(x, m, matrix, n, out + m * matrix.out);
        break;
      default:
        break;
    }
  }
}

}  // namespace mlis

#endif
