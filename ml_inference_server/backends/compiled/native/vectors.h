// The vectors that the operators compute with: 16 floats with AVX-512, 8 with AVX2, 4 with ARM's NEON. What differs
// between them stands here, once for each; all else is written for `Floats` of `kLanes`. ARM has products of signed
// bytes before it has those of unsigned ones by signed: there a `Byte` is signed.
//
// ATen's Vectorized<float> is not used: it is one thing or the other by a macro of PyTorch's own build, its least and
// greatest spend three instructions on NaN, and it has neither the rows of bytes nor powers as coarse as these.
#pragma once

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define MLIS_VECTORS 1
#include <immintrin.h>

#include <cstdint>

namespace mlis {

constexpr int64_t kLanes = 16;
using Floats = __m512;
using Ints = int32_t __attribute__((vector_size(64)));
using Byte = uint8_t;

inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
inline Ints load(const int32_t* from) { return (Ints)_mm512_loadu_si512(from); }
inline void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }
inline void store(int32_t* to, Ints x) { _mm512_storeu_si512(to, (__m512i)x); }
inline Floats spread(float x) { return _mm512_set1_ps(x); }
inline Ints spread(int32_t x) { return (Ints)_mm512_set1_epi32(x); }
inline Floats least(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats greatest(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Ints least(Ints a, Ints b) { return (Ints)_mm512_min_epi32((__m512i)a, (__m512i)b); }
inline float least_of(Floats x) { return _mm512_reduce_min_ps(x); }
inline float greatest_of(Floats x) { return _mm512_reduce_max_ps(x); }
inline float sum_of(Floats x) { return _mm512_reduce_add_ps(x); }
// a * b + c and a * b - c, rounded once.
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats multiply_subtract(Floats a, Floats b, Floats c) { return _mm512_fmsub_ps(a, b, c); }
inline Ints rounded(Floats x) { return (Ints)_mm512_cvtps_epi32(x); }

// The first `count` of x, and `rest` in the other places.
inline Floats first_of(Floats x, int64_t count, Floats rest) {
  return _mm512_mask_mov_ps(rest, static_cast<__mmask16>(count >= 16 ? 0xffff : (1u << count) - 1), x);
}

// One byte of each; what lies outside of 0 .. 255 becomes the nearest of them.
inline void store_bytes(Byte* to, Ints x) {
  const __m512i from_zero = _mm512_max_epi32((__m512i)x, _mm512_setzero_si512());
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtusepi32_epi8(from_zero));
}

// 16 rows of 16.
inline void transpose(Floats rows[kLanes]) {
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_castps_si512(rows[i]);
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i + 0] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_castsi512_ps(r[i]);
}

}  // namespace mlis

#elif defined(__AVX2__) && defined(__FMA__)
#define MLIS_VECTORS 1
#include <immintrin.h>

#include <cstdint>

namespace mlis {

constexpr int64_t kLanes = 8;
using Floats = __m256;
using Ints = int32_t __attribute__((vector_size(32)));
using Byte = uint8_t;

inline Floats load(const float* from) { return _mm256_loadu_ps(from); }
inline Ints load(const int32_t* from) { return (Ints)_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
inline void store(float* to, Floats x) { _mm256_storeu_ps(to, x); }
inline void store(int32_t* to, Ints x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)x); }
inline Floats spread(float x) { return _mm256_set1_ps(x); }
inline Ints spread(int32_t x) { return (Ints)_mm256_set1_epi32(x); }
inline Floats least(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline Floats greatest(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Ints least(Ints a, Ints b) { return (Ints)_mm256_min_epi32((__m256i)a, (__m256i)b); }
// a * b + c and a * b - c, rounded once.
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats multiply_subtract(Floats a, Floats b, Floats c) { return _mm256_fmsub_ps(a, b, c); }
inline Ints rounded(Floats x) { return (Ints)_mm256_cvtps_epi32(x); }

// f, of two vectors, over all of x.
template <typename F>
inline float reduced(Floats x, const F& f) {
  x = f(x, _mm256_permute2f128_ps(x, x, 1));
  x = f(x, _mm256_permute_ps(x, 0x4e));
  return _mm256_cvtss_f32(f(x, _mm256_permute_ps(x, 0xb1)));
}

inline float least_of(Floats x) {
  return reduced(x, [](Floats a, Floats b) { return least(a, b); });
}
inline float greatest_of(Floats x) {
  return reduced(x, [](Floats a, Floats b) { return greatest(a, b); });
}
inline float sum_of(Floats x) {
  return reduced(x, [](Floats a, Floats b) { return a + b; });
}

// The first `count` of x, and `rest` in the other places.
inline Floats first_of(Floats x, int64_t count, Floats rest) {
  const Ints places = {0, 1, 2, 3, 4, 5, 6, 7};
  return _mm256_blendv_ps(rest, x, (Floats)(places < spread(static_cast<int32_t>(count < 8 ? count : 8))));
}

// One byte of each; what lies outside of 0 .. 255 becomes the nearest of them.
inline void store_bytes(Byte* to, Ints x) {
  const __m128i low = _mm256_castsi256_si128((__m256i)x), high = _mm256_extracti128_si256((__m256i)x, 1);
  const __m128i words = _mm_packs_epi32(low, high);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
}

// 8 rows of 8.
inline void transpose(Floats r[kLanes]) {
  Floats t[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}

}  // namespace mlis

#elif defined(__aarch64__) && (defined(__ARM_FEATURE_DOTPROD) || defined(__ARM_FEATURE_MATMUL_INT8))
#define MLIS_VECTORS 1
#include <arm_neon.h>

#include <cstdint>

namespace mlis {

constexpr int64_t kLanes = 4;
using Floats = float32x4_t;
using Ints = int32x4_t;
using Byte = int8_t;

inline Floats load(const float* from) { return vld1q_f32(from); }
inline Ints load(const int32_t* from) { return vld1q_s32(from); }
inline void store(float* to, Floats x) { vst1q_f32(to, x); }
inline void store(int32_t* to, Ints x) { vst1q_s32(to, x); }
inline Floats spread(float x) { return vdupq_n_f32(x); }
inline Ints spread(int32_t x) { return vdupq_n_s32(x); }
// Of NaN and a number, the number: as on x86, NaN is not kept here.
inline Floats least(Floats a, Floats b) { return vminnmq_f32(a, b); }
inline Floats greatest(Floats a, Floats b) { return vmaxnmq_f32(a, b); }
inline Ints least(Ints a, Ints b) { return vminq_s32(a, b); }
inline float least_of(Floats x) { return vminnmvq_f32(x); }
inline float greatest_of(Floats x) { return vmaxnmvq_f32(x); }
inline float sum_of(Floats x) { return vaddvq_f32(x); }
// a * b + c and a * b - c, rounded once.
inline Floats multiply_add(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
inline Floats multiply_subtract(Floats a, Floats b, Floats c) { return vfmaq_f32(vnegq_f32(c), a, b); }
inline Ints rounded(Floats x) { return vcvtnq_s32_f32(x); }

// The first `count` of x, and `rest` in the other places.
inline Floats first_of(Floats x, int64_t count, Floats rest) {
  const Ints places = {0, 1, 2, 3};
  return vbslq_f32(vcltq_s32(places, spread(static_cast<int32_t>(count < 4 ? count : 4))), x, rest);
}

// One byte of each; what lies outside of -128 .. 127 becomes the nearest of them.
inline void store_bytes(Byte* to, Ints x) {
  const int16x4_t words = vqmovn_s32(x);
  const int8x8_t bytes = vqmovn_s16(vcombine_s16(words, words));
  vst1_lane_s32(reinterpret_cast<int32_t*>(to), vreinterpret_s32_s8(bytes), 0);
}

// 4 rows of 4.
inline void transpose(Floats r[kLanes]) {
  const float32x4x2_t even = vtrnq_f32(r[0], r[1]), odd = vtrnq_f32(r[2], r[3]);
  for (int i = 0; i < 2; ++i) {
    r[i] = vcombine_f32(vget_low_f32(even.val[i]), vget_low_f32(odd.val[i]));
    r[i + 2] = vcombine_f32(vget_high_f32(even.val[i]), vget_high_f32(odd.val[i]));
  }
}

}  // namespace mlis

#endif

#ifdef MLIS_VECTORS
namespace mlis {

inline Floats as_floats(Ints x) { return __builtin_convertvector(x, Floats); }

// 2^x for x <= 0, relative error below 1e-4: BF16 holds 8 bits.
inline Floats exp2_nonpositive(Floats x) {
  const Floats magic = spread(12582912.0f);  // 1.5 * 2^23: its sum with x holds round(x) in its low bits
  x = greatest(x, spread(-126.0f));
  const Floats shifted = x + magic;
  const Floats f = x - (shifted - magic);
  Floats p = spread(0.05583828f);
  p = multiply_add(p, f, spread(0.24263948f));
  p = multiply_add(p, f, spread(0.69314718f));
  p = multiply_add(p, f, spread(0.99992522f));
  return (Floats)((Ints)p + ((Ints)shifted << 23));
}

// x * Phi(x), absolute error below 1e-4: BF16 holds 8 bits. Phi(x) - 1/2 is an odd polynomial up to |x| = 4.
inline Floats gelu(Floats x) {
  const Floats t = least(greatest(x, spread(-4.0f)), spread(4.0f));
  const Floats s = t * t;
  Floats p = spread(-8.521429952e-10f);
  p = multiply_add(p, s, spread(7.676403314e-08f));
  p = multiply_add(p, s, spread(-2.982062081e-06f));
  p = multiply_add(p, s, spread(6.629969466e-05f));
  p = multiply_add(p, s, spread(-9.473684633e-04f));
  p = multiply_add(p, s, spread(9.289026502e-03f));
  p = multiply_add(p, s, spread(-6.551710584e-02f));
  p = multiply_add(p, s, spread(3.984620620e-01f));
  return x * multiply_add(p, t, spread(0.5f));
}

}  // namespace mlis
#endif
