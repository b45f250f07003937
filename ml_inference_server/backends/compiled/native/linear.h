// x W^T + b in BF16 tiles, and GELU of it if wanted. Sums are FP32; the result is BF16.
//
// W lies in the order in which it is read: for each 32 outputs, for each 32 inputs, two tiles of 16 pairs of inputs by
// 16 outputs (packed.py, EncoderLayer). x lies in tiles too, see rows_to_tiles.
//
// Each step multiplies two tiles of x with two of W into four sums of 16 x 16. What follows a block's last step (bias,
// activation, rounding) is done between the steps of the next block, where the tile unit leaves the vector units idle.
#pragma once

#include <ATen/Parallel.h>

#include "amx.h"
#include "vectors.h"

#ifdef MLIS_AMX
#include <algorithm>

namespace mlis {

constexpr int64_t kBlock = 32;  // rows of x, and outputs, of a block

// A block of sums that still has to be written.
struct Pending {
  const float* sums;
  const float* bias;
  uint16_t* out;
  int64_t stride, rows;
};

template <bool kGelu>
inline void finish_row(const Pending& block, int64_t i) {
  const float* sums = block.sums + i * kBlock;
  __m512 low = _mm512_add_ps(_mm512_load_ps(sums), _mm512_loadu_ps(block.bias));
  __m512 high = _mm512_add_ps(_mm512_load_ps(sums + 16), _mm512_loadu_ps(block.bias + 16));
  if constexpr (kGelu) {
    low = gelu(low);
    high = gelu(high);
  }
  _mm512_storeu_si512(block.out + i * block.stride, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

// Rows of x as tiles: for each 32 rows, for each 32 inputs, two tiles. Rows after the last are left as they are.
inline void rows_to_tiles(const uint16_t* x, uint16_t* tiles, int64_t rows, int64_t in) {
  for (int64_t m = 0; m < rows; ++m) {
    uint16_t* to = tiles + m / kBlock * kBlock * in + m % kBlock * 32;
    for (int64_t k = 0; k < in; k += 32) _mm512_store_si512(to + k * kBlock, _mm512_loadu_si512(x + m * in + k));
  }
}

// One matrix, in -> out. tiles: of W.
struct Matrix {
  const uint16_t* tiles;
  const float* bias;
  int64_t in, out;
};

// The outputs 32 * first .. 32 * last - 1 for `rows` rows of x. Inner: GELU follows, and `to` gets tiles, as the next
// matrix reads them; else `to` is (rows, out).
template <bool kInner>
void multiply(const uint16_t* x_tiles, const Matrix& matrix, uint16_t* to, int64_t rows, int64_t first, int64_t last) {
  const int64_t in = matrix.in, stride = kInner ? 32 : matrix.out, across = kInner ? 2 * kTile : kBlock;
  alignas(64) float sums[kBlock * kBlock];
  const int64_t steps = in / 32, rows_a_step = (kBlock + steps - 1) / steps, blocks = (rows + kBlock - 1) / kBlock;
  // Lines of W's next 32 outputs (32 a step) that each step asks for, into the L2 cache.
  const int64_t lines = (32 + blocks - 1) / blocks;
  Pending pending{sums, matrix.bias, to, stride, 0};
  configure_tiles();
  for (int64_t n = first; n < last; ++n)
    for (int64_t m = 0; m < rows; m += kBlock) {
      const uint16_t *w = matrix.tiles + n * kBlock * in, *x = x_tiles + m * in;
      const char* ahead = reinterpret_cast<const char*>(w + kBlock * in) + m / kBlock * steps * lines * 64;
      int64_t finished = 0;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t k = 0; k < steps; ++k, w += 2 * kTile, x += 2 * kTile) {
        // x passes through the L1 cache without a stay there: W's 32 outputs are what is read again.
        _tile_stream_loadd(4, x, 64);
        _tile_loadd(6, w, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, w + kTile, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_stream_loadd(5, x + kTile, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        for (int64_t i = 0; i < lines; ++i, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
        for (int64_t i = 0; i < rows_a_step; ++i, ++finished)
          if (finished < pending.rows) finish_row<kInner>(pending, finished);
      }
      _tile_stored(0, sums, kBlock * 4);
      _tile_stored(1, sums + 16, kBlock * 4);
      _tile_stored(2, sums + 16 * kBlock, kBlock * 4);
      _tile_stored(3, sums + 16 * kBlock + 16, kBlock * 4);
      pending = {sums, matrix.bias + n * kBlock, to + m * matrix.out + n * across, stride, std::min(kBlock, rows - m)};
    }
  for (int64_t i = 0; i < pending.rows; ++i) finish_row<kInner>(pending, i);
  _tile_release();
}

// The same for all outputs, by all threads.
template <bool kInner>
void multiply_all(const uint16_t* x_tiles, const Matrix& matrix, uint16_t* to, int64_t rows) {
  at::parallel_for(0, matrix.out / kBlock, 1,
                   [&](int64_t first, int64_t last) { multiply<kInner>(x_tiles, matrix, to, rows, first, last); });
}

}  // namespace mlis

#endif
