// What the operators share: AMX's tiles of 16 rows by 64 bytes, configured all alike.
#pragma once

#if defined(__linux__) && defined(__AMX_TILE__)
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define MLIS_AMX 1
#endif
#if defined(__AMX_INT8__) && (defined(__AVX512VNNI__) || defined(__AVXVNNI__))
#define MLIS_AMX_INT8 1
#endif
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace mlis {

// The kernel hands out the tile registers only to processes that ask (Documentation/arch/x86/xstate.rst).
inline bool amx_granted() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

constexpr int kRows = 16;       // rows of a tile
constexpr int kTile = 16 * 32;  // BF16 values of a tile

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t colsb[16] = {};
  uint8_t rows[16] = {};
};

// Each thread configures its tiles before use, and ends with _tile_release(). GCC does not know what its instructions
// for tiles read: what was written before this is in memory afterwards.
inline void configure_tiles() {
  static const TileConfig config = [] {
    TileConfig c;
    for (int i = 0; i < 8; ++i) {
      c.rows[i] = kRows;
      c.colsb[i] = 64;
    }
    return c;
  }();
  __asm__ volatile("" ::: "memory");
  _tile_loadconfig(&config);
}

}  // namespace mlis

#endif
