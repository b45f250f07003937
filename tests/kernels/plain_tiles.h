// AMX's tiles in plain C++, beside plain_dpbusd.h: included before everything else. It ends where a processor would
// fault: tiles that are not configured, or whose sizes do not match.
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "plain_dpbusd.h"

namespace plain_tiles {

struct Tile {
  uint8_t bytes[16][64];
};

inline thread_local Tile tiles[8];
inline thread_local int rows[8], columns[8];  // in bytes; 0 where there is no such tile

inline void need(bool good, const char* what) {
  if (good) return;
  std::printf("a tile would fault: %s\n", what);
  std::abort();
}

inline void configure(const void* from) {
  const uint8_t* config = static_cast<const uint8_t*>(from);
  need(config[0] == 1, "palette");
  for (int i = 1; i < 16; ++i) need(config[i] == 0, "reserved bytes");
  for (int i = 0; i < 8; ++i) {
    uint16_t width;
    std::memcpy(&width, config + 16 + 2 * i, 2);
    rows[i] = config[48 + i];
    columns[i] = width;
    need(rows[i] <= 16 && width <= 64 && width % 4 == 0, "size");
    std::memset(&tiles[i], 0, sizeof(Tile));
  }
  for (int i = 24; i < 32; ++i) need(config[16 + i] == 0, "tiles that do not exist");
}

inline void release() {
  for (int i = 0; i < 8; ++i) rows[i] = columns[i] = 0;
}

inline void zero(int tile) {
  need(rows[tile] > 0, "not configured");
  std::memset(&tiles[tile], 0, sizeof(Tile));
}

inline void load(int tile, const void* from, int64_t stride) {
  need(rows[tile] > 0, "not configured");
  for (int i = 0; i < rows[tile]; ++i)
    std::memcpy(tiles[tile].bytes[i], static_cast<const uint8_t*>(from) + i * stride, columns[tile]);
}

inline void save(int tile, void* to, int64_t stride) {
  need(rows[tile] > 0, "not configured");
  for (int i = 0; i < rows[tile]; ++i)
    std::memcpy(static_cast<uint8_t*>(to) + i * stride, tiles[tile].bytes[i], columns[tile]);
}

// sums[m][n] += u[m][4k + i] * w[k][4n + i], for i in 0 .. 3.
inline void add_products(int sums, int u, int w) {
  need(sums != u && sums != w && u != w, "one tile twice");
  need(rows[sums] == rows[u] && columns[sums] == columns[w] && columns[u] == 4 * rows[w], "sizes do not match");
  for (int m = 0; m < rows[sums]; ++m)
    for (int n = 0; n < columns[sums] / 4; ++n) {
      int32_t sum;
      std::memcpy(&sum, tiles[sums].bytes[m] + 4 * n, 4);
      for (int k = 0; k < rows[w]; ++k)
        for (int i = 0; i < 4; ++i)
          sum += tiles[u].bytes[m][4 * k + i] * static_cast<int8_t>(tiles[w].bytes[k][4 * n + i]);
      std::memcpy(tiles[sums].bytes[m] + 4 * n, &sum, 4);
    }
}

// By the kernel of the system, to all who ask.
inline long granted(long, int, int) { return 0; }

}  // namespace plain_tiles

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbusd
#define _tile_loadconfig plain_tiles::configure
#define _tile_release plain_tiles::release
#define _tile_zero plain_tiles::zero
#define _tile_loadd plain_tiles::load
#define _tile_stored plain_tiles::save
#define _tile_dpbusd plain_tiles::add_products
#define syscall plain_tiles::granted
#ifndef __AMX_TILE__
#define __AMX_TILE__ 1
#endif
#ifndef __AMX_INT8__
#define __AMX_INT8__ 1
#endif
