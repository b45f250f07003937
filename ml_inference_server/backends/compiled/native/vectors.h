// What the operators share of AVX-512: functions of 16 floats, and a transposition.
#pragma once

#ifdef __AVX512F__
#include <immintrin.h>

namespace mlis {

// 2^x for x <= 0, relative error below 1e-4: BF16 holds 8 bits.
inline __m512 exp2_nonpositive(__m512 x) {
  const __m512 magic = _mm512_set1_ps(12582912.0f);  // 1.5 * 2^23: its sum with x holds round(x) in its low bits
  x = _mm512_max_ps(x, _mm512_set1_ps(-126.0f));
  const __m512 shifted = _mm512_add_ps(x, magic);
  const __m512 f = _mm512_sub_ps(x, _mm512_sub_ps(shifted, magic));
  __m512 p = _mm512_set1_ps(0.05583828f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.24263948f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69314718f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.99992522f));
  const __m512i power = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), power));
}

// 16 x 16 dwords.
inline void transpose16(__m512i r[16]) {
  __m512i t[16];
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
}

// x * Phi(x), absolute error below 1e-4: BF16 holds 8 bits. Phi(x) - 1/2 is an odd polynomial up to |x| = 4.
inline __m512 gelu(__m512 x) {
  const __m512 t = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-4.0f)), _mm512_set1_ps(4.0f));
  const __m512 s = _mm512_mul_ps(t, t);
  __m512 p = _mm512_set1_ps(-8.521429952e-10f);
  p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(7.676403314e-08f));
  p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(-2.982062081e-06f));
  p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(6.629969466e-05f));
  p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(-9.473684633e-04f));
  p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(9.289026502e-03f));
  p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(-6.551710584e-02f));
  p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(3.984620620e-01f));
  return _mm512_mul_ps(x, _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.5f)));
}

}  // namespace mlis

#endif
