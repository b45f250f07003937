// Attention of one head over one text, in AMX tiles.
#pragma once

#include <ATen/Parallel.h>

#include "amx.h"
#include "vectors.h"

#ifdef MLIS_AMX
#include <algorithm>
#include <cmath>
#include <vector>

namespace mlis {

struct Scratch {
  std::vector<uint16_t> keys, values, query, weights;
  std::vector<float> scores, out;
};

inline void one_head(const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* o, int64_t length,
                     int64_t stride, int64_t dim, float scale, bool causal, Scratch& s) {
  const int64_t key_blocks = (length + 15) / 16, key_steps = (length + 31) / 32, wide = key_steps * 32;
  const int64_t dim_steps = dim / 32, dim_blocks = dim / 16;
  s.keys.resize(key_steps * 2 * dim_steps * 512);
  s.values.resize(key_steps * dim_blocks * 512);
  s.query.resize(kRows * dim);
  s.weights.resize(kRows * wide);
  s.scores.resize(kRows * wide);
  s.out.resize(1024);
  // Keys: tiles of 16 dword-pairs of the head's dimension by 16 keys.
  for (int64_t nb = 0; nb < key_blocks; ++nb) {
    const int64_t rows = std::min<int64_t>(16, length - nb * 16);
    for (int64_t ks = 0; ks < dim_steps; ++ks) {
      Floats r[16];  // pairs of BF16, in truth
      for (int64_t i = 0; i < 16; ++i)
        r[i] = i < rows ? _mm512_loadu_ps(k + (nb * 16 + i) * stride + ks * 32) : _mm512_setzero_ps();
      transpose(r);
      uint16_t* tile = s.keys.data() + (nb * dim_steps + ks) * 512;
      for (int i = 0; i < 16; ++i) _mm512_storeu_ps(tile + i * 32, r[i]);
    }
  }
  // Values: tiles of 16 pairs of keys by 16 dimensions.
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                              6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  for (int64_t ks = 0; ks < key_steps; ++ks)
    for (int64_t p = 0; p < 16; ++p) {
      const int64_t row = ks * 32 + 2 * p;
      for (int64_t nb = 0; nb < dim_blocks; ++nb) {
        const __m256i zero = _mm256_setzero_si256();
        const __m256i a = row < length ? _mm256_loadu_si256((const __m256i*)(v + row * stride + nb * 16)) : zero;
        const __m256i b =
            row + 1 < length ? _mm256_loadu_si256((const __m256i*)(v + (row + 1) * stride + nb * 16)) : zero;
        const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
        _mm512_storeu_si512(s.values.data() + (ks * dim_blocks + nb) * 512 + p * 32,
                            _mm512_permutexvar_epi16(interleave, both));
      }
    }
  for (int64_t mb = 0; mb * 16 < length; ++mb) {
    const int64_t rows = std::min<int64_t>(16, length - mb * 16);
    const uint16_t* query = q + mb * 16 * stride;
    int64_t query_stride = stride;
    if (rows < 16) {
      for (int64_t i = 0; i < rows; ++i) std::copy_n(query + i * stride, dim, s.query.data() + i * dim);
      query = s.query.data();
      query_stride = dim;
    }
    int64_t nb = 0;
    for (; nb + 4 <= key_blocks; nb += 4) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t ks = 0; ks < dim_steps; ++ks) {
        const uint16_t* tile = s.keys.data() + (nb * dim_steps + ks) * 512;
        _tile_loadd(4, query + ks * 32, query_stride * 2);
        _tile_loadd(5, tile, 64);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, tile + dim_steps * 512, 64);
        _tile_dpbf16ps(1, 4, 6);
        _tile_loadd(7, tile + 2 * dim_steps * 512, 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_loadd(5, tile + 3 * dim_steps * 512, 64);
        _tile_dpbf16ps(3, 4, 5);
      }
      float* at = s.scores.data() + nb * 16;
      _tile_stored(0, at, wide * 4);
      _tile_stored(1, at + 16, wide * 4);
      _tile_stored(2, at + 32, wide * 4);
      _tile_stored(3, at + 48, wide * 4);
    }
    for (; nb < key_blocks; ++nb) {
      _tile_zero(0);
      for (int64_t ks = 0; ks < dim_steps; ++ks) {
        _tile_loadd(4, query + ks * 32, query_stride * 2);
        _tile_loadd(5, s.keys.data() + (nb * dim_steps + ks) * 512, 64);
        _tile_dpbf16ps(0, 4, 5);
      }
      _tile_stored(0, s.scores.data() + nb * 16, wide * 4);
    }
    float inverse[16];
    for (int64_t i = 0; i < rows; ++i) {
      const float* score = s.scores.data() + i * wide;
      uint16_t* weight = s.weights.data() + i * wide;
      const int64_t keys = causal ? mb * 16 + i + 1 : length;
      const int64_t full = keys / 32;
      const uint32_t rest = (uint32_t)((1ull << (keys % 32)) - 1);
      const __mmask16 rest0 = (__mmask16)rest, rest1 = (__mmask16)(rest >> 16);
      const __m512 low = _mm512_set1_ps(-INFINITY);
      __m512 top0 = low, top1 = low;
      for (int64_t j = 0; j < full; ++j) {
        top0 = _mm512_max_ps(top0, _mm512_loadu_ps(score + j * 32));
        top1 = _mm512_max_ps(top1, _mm512_loadu_ps(score + j * 32 + 16));
      }
      top0 = _mm512_mask_max_ps(top0, rest0, top0, _mm512_maskz_loadu_ps(rest0, score + full * 32));
      top1 = _mm512_mask_max_ps(top1, rest1, top1, _mm512_maskz_loadu_ps(rest1, score + full * 32 + 16));
      const __m512 factor = _mm512_set1_ps(scale);
      const __m512 most = _mm512_set1_ps(_mm512_reduce_max_ps(_mm512_max_ps(top0, top1)) * scale);
      __m512 sum0 = _mm512_setzero_ps(), sum1 = _mm512_setzero_ps();
      int64_t j = 0;
      for (; j < full; ++j) {
        const __m512 e0 = exp2_nonpositive(_mm512_fmsub_ps(_mm512_loadu_ps(score + j * 32), factor, most));
        const __m512 e1 = exp2_nonpositive(_mm512_fmsub_ps(_mm512_loadu_ps(score + j * 32 + 16), factor, most));
        sum0 = _mm512_add_ps(sum0, e0);
        sum1 = _mm512_add_ps(sum1, e1);
        _mm512_storeu_si512(weight + j * 32, (__m512i)_mm512_cvtne2ps_pbh(e1, e0));
      }
      if (rest) {
        const __m512 e0 = _mm512_maskz_mov_ps(
            rest0, exp2_nonpositive(_mm512_fmsub_ps(_mm512_maskz_loadu_ps(rest0, score + j * 32), factor, most)));
        const __m512 e1 = _mm512_maskz_mov_ps(
            rest1, exp2_nonpositive(_mm512_fmsub_ps(_mm512_maskz_loadu_ps(rest1, score + j * 32 + 16), factor, most)));
        sum0 = _mm512_add_ps(sum0, e0);
        sum1 = _mm512_add_ps(sum1, e1);
        _mm512_storeu_si512(weight + j * 32, (__m512i)_mm512_cvtne2ps_pbh(e1, e0));
        ++j;
      }
      for (; j < key_steps; ++j) _mm512_storeu_si512(weight + j * 32, _mm512_setzero_si512());
      inverse[i] = 1.0f / _mm512_reduce_add_ps(_mm512_add_ps(sum0, sum1));
    }
    for (int64_t nb2 = 0; nb2 < dim_blocks; nb2 += 2) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      int64_t ks = 0;
      for (; ks + 2 <= key_steps; ks += 2) {
        const uint16_t* tile = s.values.data() + (ks * dim_blocks + nb2) * 512;
        _tile_loadd(4, s.weights.data() + ks * 32, wide * 2);
        _tile_loadd(6, tile, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, tile + 512, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, s.weights.data() + ks * 32 + 32, wide * 2);
        _tile_loadd(6, tile + dim_blocks * 512, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_loadd(7, tile + dim_blocks * 512 + 512, 64);
        _tile_dpbf16ps(3, 5, 7);
      }
      if (ks < key_steps) {
        const uint16_t* tile = s.values.data() + (ks * dim_blocks + nb2) * 512;
        _tile_loadd(4, s.weights.data() + ks * 32, wide * 2);
        _tile_loadd(6, tile, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, tile + 512, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      float* even = s.out.data();
      float* odd = even + 512;
      _tile_stored(0, even, 128);
      _tile_stored(1, even + 16, 128);
      _tile_stored(2, odd, 128);
      _tile_stored(3, odd + 16, 128);
      for (int64_t i = 0; i < rows; ++i) {
        const __m512 by = _mm512_set1_ps(inverse[i]);
        const __m512 a =
            _mm512_mul_ps(_mm512_add_ps(_mm512_loadu_ps(even + i * 32), _mm512_loadu_ps(odd + i * 32)), by);
        const __m512 b =
            _mm512_mul_ps(_mm512_add_ps(_mm512_loadu_ps(even + i * 32 + 16), _mm512_loadu_ps(odd + i * 32 + 16)), by);
        _mm512_storeu_si512(o + (mb * 16 + i) * stride + nb2 * 16, (__m512i)_mm512_cvtne2ps_pbh(b, a));
      }
    }
  }
}

// All heads of all texts. q, k, v, out: (tokens, heads * dim); starts: as in packed_attention.cpp.
inline void attend(const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* out, const int64_t* starts,
                   int64_t texts, int64_t heads, int64_t dim, double scale, bool causal) {
  const int64_t stride = heads * dim;
  const float log2_scale = static_cast<float>(scale * 1.4426950408889634);  // the softmax is computed with powers of 2
  at::parallel_for(0, texts * heads, 1, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    configure_tiles();
    for (int64_t i = begin; i < end; ++i) {
      const int64_t text = i / heads, offset = starts[text] * stride + (i % heads) * dim;
      one_head(q + offset, k + offset, v + offset, out + offset, starts[text + 1] - starts[text], stride, dim,
               log2_scale, causal, scratch);
    }
    _tile_release();
  });
}

}  // namespace mlis

#endif
