// x W^T + b in INT8, and GELU of it if wanted: bytes in, exact 32-bit sums, FP32 out.
//
// W is symmetric with a scale for each output: W[n][k] = scale[n] * w[n][k], w in -127 .. 127. x is quantised here, a
// row at a time, with a scale and a zero point of its own: x[m][k] = s[m] * (u[m][k] - zero[m]), u in
// kLeast .. kLeast + kMost. Then
//
//   sum over k of x W = s[m] * scale[n] * (sum of u w - zero[m] * sum of w[n])
//
// w lies in panels of kPanel outputs: for each kInputs inputs, the bytes of output 0, then of 1, ... (packed.py,
// Int8Layer). Inputs and outputs are multiples of 64.
#pragma once

#include "amx.h"
#include "vectors.h"

#ifdef MLIS_VECTORS
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace mlis {

// kMost: the steps of `u` for which sums are exact: 129 where two products are added up in 16 bits, for 2 * 129 * 127 =
// 32,766 just fits. kVectors: of sums that a row has in sum_panel; 6 rows of 4 fill 24 of the 32 registers of AVX-512
// and NEON, 6 of 2 12 of the 16 of AVX2. kInputs: what one instruction adds up. add_products: to each of `sums`, four
// products of bytes of `u` and of `w`. Processors with AMX have AVX-512 VNNI too; tests have tiles beside AVX-VNNI.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
constexpr const char* kInt8Instructions = "AVX-512 VNNI";
constexpr int32_t kMost = 255;
constexpr int kVectors = 4, kInputs = 4;
inline Ints add_products(Ints sums, Ints u, Ints w) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)u, (__m512i)w);
}
#elif defined(__AVX512BW__)
constexpr const char* kInt8Instructions = "AVX-512";
constexpr int32_t kMost = 129;
constexpr int kVectors = 4, kInputs = 4;
inline Ints add_products(Ints sums, Ints u, Ints w) {
  const __m512i pairs = _mm512_maddubs_epi16((__m512i)u, (__m512i)w);
  return sums + (Ints)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
}
#elif defined(__AVXVNNI__)
constexpr const char* kInt8Instructions = "AVX-VNNI";
constexpr int32_t kMost = 255;
#ifdef MLIS_AMX_INT8
constexpr int kVectors = 8, kInputs = 4;
#else
constexpr int kVectors = 2, kInputs = 4;
#endif
inline Ints add_products(Ints sums, Ints u, Ints w) {
  return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)u, (__m256i)w);
}
#elif defined(__AVX2__)
constexpr const char* kInt8Instructions = "AVX2";
constexpr int32_t kMost = 129;
constexpr int kVectors = 2, kInputs = 4;
inline Ints add_products(Ints sums, Ints u, Ints w) {
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)u, (__m256i)w);
  return sums + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#elif defined(__ARM_FEATURE_MATMUL_INT8)
constexpr const char* kInt8Instructions = "NEON i8mm";
constexpr int32_t kMost = 255;
constexpr int kVectors = 4, kInputs = 8;
#else
constexpr const char* kInt8Instructions = "NEON dotprod";
constexpr int32_t kMost = 255;
constexpr int kVectors = 4, kInputs = 4;
#endif

constexpr int32_t kLeast = std::numeric_limits<Byte>::min();
constexpr int64_t kPanel = kVectors * kLanes;  // outputs whose weights lie together
constexpr int kRowsAtOnce = 6;

// One matrix, in -> out. sums: of the bytes of each output.
struct Int8Matrix {
  const int8_t* panels;
  const float* scales;
  const int32_t* sums;
  const float* bias;
  int64_t in, out;
};

// Rows of bytes, `width` of them each, with what is needed to read them as numbers. There is room for a multiple of 16
// rows: tiles read so many, and what comes of rows that are none is left.
struct Int8Rows {
  Byte* bytes;
  float* scales;
  int32_t* zeros;
  int64_t width;
};

// Row m of `rows` from `width` floats. What is not finite makes the row's scale, and so all that follows, NaN.
inline void quantise_row(const float* from, const Int8Rows& rows, int64_t m) {
  constexpr float most = static_cast<float>(kMost);
  const int64_t width = rows.width;
  const Floats none = spread(0.0f);
  Floats low = none, high = none, check = none;
  for (int64_t j = 0; j < width; j += kLanes) {
    const Floats x = load(from + j);
    low = least(low, x);
    high = greatest(high, x);
    check = multiply_add(x, none, check);  // 0 * x is NaN where x is not finite
  }
  const float lowest = least_of(low), highest = greatest_of(high);
  const float scale = std::max((highest - lowest) / most, 1e-30f);
  const int32_t zero = kLeast + static_cast<int32_t>(std::nearbyint(std::clamp(-lowest / scale, 0.0f, most)));
  rows.scales[m] = scale + sum_of(check);
  rows.zeros[m] = zero;
  const Floats inverse = spread(1.0f / scale);
  const Ints offset = spread(zero), limit = spread(kLeast + kMost);
  Byte* to = rows.bytes + m * width;
  for (int64_t j = 0; j < width; j += kLanes)
    store_bytes(to + j, least(rounded(load(from + j) * inverse) + offset, limit));
}

// The exact sums of `kRows` rows of x and the outputs of a panel; to: (kRows, kPanel). Nothing else stands here, so
// that the compiler keeps all sums in registers.
#if defined(__ARM_FEATURE_MATMUL_INT8)
// One instruction multiplies 2 rows by 2 outputs. The last of an odd number of rows is its own partner.
template <int kRows>
inline void sum_panel(const Byte* x, const int8_t* w, int64_t in, int32_t* to) {
  constexpr int kPairs = (kRows + 1) / 2, kOutputPairs = kPanel / 2;
  Ints sums[kPairs][kOutputPairs];
#pragma GCC unroll 8
  for (int i = 0; i < kPairs; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kOutputPairs; ++j) sums[i][j] = spread(0);
  for (int64_t k = 0; k < in; k += 8, w += 8 * kPanel) {
    int8x16_t rows[kPairs];
#pragma GCC unroll 8
    for (int i = 0; i < kPairs; ++i)
      rows[i] = vcombine_s8(vld1_s8(x + 2 * i * in + k), vld1_s8(x + std::min(2 * i + 1, kRows - 1) * in + k));
#pragma GCC unroll 8
    for (int j = 0; j < kOutputPairs; ++j) {
      const int8x16_t weights = vld1q_s8(w + 16 * j);
#pragma GCC unroll 8
      for (int i = 0; i < kPairs; ++i) sums[i][j] = vmmlaq_s32(sums[i][j], rows[i], weights);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kPairs; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kOutputPairs; j += 2) {
      const Ints left = sums[i][j], right = sums[i][j + 1];
      store(to + 2 * i * kPanel + 2 * j, vcombine_s32(vget_low_s32(left), vget_low_s32(right)));
      if (2 * i + 1 < kRows)
        store(to + (2 * i + 1) * kPanel + 2 * j, vcombine_s32(vget_high_s32(left), vget_high_s32(right)));
    }
}
#elif defined(__ARM_FEATURE_DOTPROD)
// 16 inputs at a time: an instruction takes its 4 of a row from there.
template <int kRows>
inline void sum_panel(const Byte* x, const int8_t* w, int64_t in, int32_t* to) {
  Ints sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) sums[i][j] = spread(0);
  for (int64_t k = 0; k < in; k += 16, w += 16 * kPanel) {
    int8x16_t rows[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) rows[i] = vld1q_s8(x + i * in + k);
    auto add_four = [&]<int kFour>() {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        const int8x16_t weights = vld1q_s8(w + 4 * kPanel * kFour + 16 * j);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) sums[i][j] = vdotq_laneq_s32(sums[i][j], weights, rows[i], kFour);
      }
    };
    add_four.template operator()<0>();
    add_four.template operator()<1>();
    add_four.template operator()<2>();
    add_four.template operator()<3>();
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) store(to + i * kPanel + kLanes * j, sums[i][j]);
}
#else
template <int kRows>
inline void sum_panel(const Byte* x, const int8_t* w, int64_t in, int32_t* to) {
  Ints sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) sums[i][j] = spread(0);
  for (int64_t k = 0; k < in; k += 4, w += 4 * kPanel) {
    Ints weights[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) std::memcpy(&weights[j], w + 4 * kLanes * j, sizeof(Ints));
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      int32_t four;
      std::memcpy(&four, x + i * in + k, 4);
      const Ints row = spread(four);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sums[i][j] = add_products(sums[i][j], row, weights[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) store(to + i * kPanel + kLanes * j, sums[i][j]);
}
#endif

// What `rows` rows from row m on give, from their sums: (rows, kPanel).
template <bool kGelu>
inline void finish_panel(const int32_t* sums, int64_t rows, const Int8Rows& x, int64_t m, const Int8Matrix& matrix,
                         int64_t n, float* out) {
  for (int64_t j = 0; j < kPanel; j += kLanes) {
    const Ints all = load(matrix.sums + n + j);
    const Floats scales = load(matrix.scales + n + j), bias = load(matrix.bias + n + j);
    for (int64_t i = 0; i < rows; ++i) {
      const Floats exact = as_floats(load(sums + i * kPanel + j) - spread(x.zeros[m + i]) * all);
      Floats y = multiply_add(exact * scales, spread(x.scales[m + i]), bias);
      if constexpr (kGelu) y = gelu(y);
      store(out + i * matrix.out + n + j, y);
    }
  }
}

// `kRows` rows from row m on by one panel.
template <int kRows, bool kGelu>
inline void multiply_panel(const Int8Rows& x, int64_t m, const Int8Matrix& matrix, int64_t n, float* out) {
  alignas(64) int32_t sums[kRows * kPanel];
  sum_panel<kRows>(x.bytes + m * matrix.in, matrix.panels + n * matrix.in, matrix.in, sums);
  finish_panel<kGelu>(sums, kRows, x, m, matrix, n, out);
}

#ifdef MLIS_AMX_INT8
static_assert(kPanel == 64 && kInputs == 4 && kLeast == 0 && kMost == 255, "bytes lie and count as in four tiles");

// As sum_panel, for 16 rows. The thread's tiles are configured.
inline void sum_panel_in_tiles(const Byte* x, const int8_t* w, int64_t in, int32_t* to) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < in; k += 64, w += 64 * kPanel) {
    _tile_loadd(4, x + k, in);
    _tile_loadd(5, w, 4 * kPanel);
    _tile_dpbusd(0, 4, 5);
    _tile_loadd(6, w + 64, 4 * kPanel);
    _tile_dpbusd(1, 4, 6);
    _tile_loadd(7, w + 128, 4 * kPanel);
    _tile_dpbusd(2, 4, 7);
    _tile_loadd(5, w + 192, 4 * kPanel);
    _tile_dpbusd(3, 4, 5);
  }
  _tile_stored(0, to, 4 * kPanel);
  _tile_stored(1, to + 16, 4 * kPanel);
  _tile_stored(2, to + 32, 4 * kPanel);
  _tile_stored(3, to + 48, 4 * kPanel);
}

// Whether the kernel grants tiles, and they give the sums that vectors give: looked at once, with bytes of all kinds.
inline bool uses_int8_tiles() {
  static const bool uses = [] {
    if (!amx_granted()) return false;
    constexpr int64_t in = 128;
    alignas(64) Byte x[kRows * in];
    alignas(64) int8_t w[in * kPanel];
    alignas(64) int32_t in_tiles[kRows * kPanel], in_vectors[kRows * kPanel];
    uint32_t any = 1;
    auto next = [&any] { return (any = any * 1664525u + 1013904223u) >> 24; };
    for (Byte& each : x) each = static_cast<Byte>(next());
    for (int8_t& each : w) each = static_cast<int8_t>(next());
    configure_tiles();
    sum_panel_in_tiles(x, w, in, in_tiles);
    _tile_release();
    for (int64_t m = 0; m < kRows; ++m) sum_panel<1>(x + m * in, w, in, in_vectors + m * kPanel);
    return std::memcmp(in_tiles, in_vectors, sizeof(in_tiles)) == 0;
  }();
  return uses;
}

template <bool kGelu>
void multiply_in_tiles(const Int8Rows& x, int64_t rows, const Int8Matrix& matrix, float* out) {
  alignas(64) int32_t sums[kRows * kPanel];
  configure_tiles();
  for (int64_t n = 0; n < matrix.out; n += kPanel)
    for (int64_t m = 0; m < rows; m += kRows) {
      sum_panel_in_tiles(x.bytes + m * matrix.in, matrix.panels + n * matrix.in, matrix.in, sums);
      finish_panel<kGelu>(sums, std::min<int64_t>(kRows, rows - m), x, m, matrix, n, out + m * matrix.out);
    }
  _tile_release();
}
#endif

inline const char* int8_instructions() {
#ifdef MLIS_AMX_INT8
  if (uses_int8_tiles()) return "AMX";
#endif
  return kInt8Instructions;
}

// All outputs of `rows` rows; out: (rows, matrix.out). A panel stays in the cache for all rows.
template <bool kGelu>
void multiply_int8(const Int8Rows& x, int64_t rows, const Int8Matrix& matrix, float* out) {
#ifdef MLIS_AMX_INT8
  if (uses_int8_tiles()) return multiply_in_tiles<kGelu>(x, rows, matrix, out);
#endif
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

// What the processor can do at most: the sums of rows and a panel that stay in the L1 cache, `repeats` times. The
// number of operations: a multiply and an add for each product.
inline int64_t multiply_in_cache(int64_t repeats) {
  constexpr int64_t in = 256;
  alignas(64) thread_local Byte x[16 * in] = {};
  alignas(64) thread_local int8_t w[in * kPanel] = {};
  alignas(64) int32_t sums[16 * kPanel];
#ifdef MLIS_AMX_INT8
  if (uses_int8_tiles()) {
    configure_tiles();
    for (int64_t i = 0; i < repeats; ++i) sum_panel_in_tiles(x, w, in, sums);
    _tile_release();
    return 2 * repeats * kRows * in * kPanel;
  }
#endif
  for (int64_t i = 0; i < repeats; ++i) {
    sum_panel<kRowsAtOnce>(x, w, in, sums);
    x[i % in] = static_cast<Byte>(sums[0]);  // so that no repeat is left out
  }
  return 2 * repeats * kRowsAtOnce * in * kPanel;
}

}  // namespace mlis

#endif
