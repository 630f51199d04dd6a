// The processor's matrix unit (AMX): eight tiles of 16 rows of 64 bytes, multiplied by each other.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "simd.h"

namespace {

constexpr int TILE_ROWS = 16;
constexpr int TILE_BYTES = 16 * 64;

struct TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {};
    uint8_t rows[16] = {};

    TileShapes() {
        for (int tile = 0; tile < 8; tile++) bytes_per_row[tile] = 64, rows[tile] = TILE_ROWS;
    }
};

// All eight tiles of the calling thread are whole from here on, until _tile_release.
INLINE void use_tiles() {
    static const TileShapes shapes;
    _tile_loadconfig(&shapes);
}

// One row into its tile: [steps, 16 rows, 64 bytes]. What the row lacks at its end is zero; rows that nobody asks
// for are computed as they come, and dropped.
INLINE void lay_out(const char* row, int64_t bytes, int64_t steps, char* tile) {
    int64_t whole = bytes / 64;
    for (int64_t k = 0; k < whole; k++) memcpy(tile + k * TILE_BYTES, row + 64 * k, 64);
    if (whole < steps) {
        memset(tile + whole * TILE_BYTES, 0, 64);
        memcpy(tile + whole * TILE_BYTES, row + 64 * whole, bytes - 64 * whole);
    }
}

}  // namespace
