// AVX-VNNI's one instruction in plain C++, for x86 processors that lack it: included before everything else.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

inline __m256i plain_dpbusd(__m256i sums, __m256i u, __m256i w) {
  int32_t to[8];
  uint8_t left[32];
  int8_t right[32];
  std::memcpy(to, &sums, 32);
  std::memcpy(left, &u, 32);
  std::memcpy(right, &w, 32);
  for (int i = 0; i < 32; ++i) to[i / 4] += left[i] * right[i];
  std::memcpy(&sums, to, 32);
  return sums;
}

#define _mm256_dpbusd_avx_epi32 plain_dpbusd
#ifndef __AVXVNNI__
#define __AVXVNNI__ 1
#endif
