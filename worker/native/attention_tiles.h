// The two products of attention by the processor's matrix unit (AMX), for bfloat16 caches.
//
// Scores are sums of exact products of bfloat16 numbers in float; the weights e^(score - largest) are rounded to
// bfloat16 before they meet the values, as they are wherever bfloat16 attention runs on such units.
#pragma once

#include "simd.h"
#include "tiles.h"

namespace {

constexpr int KEY_TILES = PORTION / TILE_ROWS;   // of scores
constexpr int KEY_STEPS = PORTION / 32;          // of values
constexpr int ROW_TILES = MAX_ROWS / TILE_ROWS;

// Tiles of 1 KiB, each 16 rows of 64 bytes. Left sides lie row by row, right sides as pairs of rows, as the unit wants.
struct AttentionTiles {
    int64_t dim;
    char *queries, *keys, *weights, *values;  // [rows, dims], [dims, keys], [rows, key steps], [key steps, dims]

    int64_t steps() const { return (dim + 31) / 32; }
    static int64_t bytes(int64_t dim) {
        int64_t steps = (dim + 31) / 32;
        return (ROW_TILES * steps + steps * KEY_TILES + ROW_TILES * KEY_STEPS + KEY_STEPS * 2 * steps) * TILE_BYTES;
    }

    void use(char* memory, int64_t head_dim) {
        dim = head_dim;
        queries = memory;
        keys = queries + ROW_TILES * steps() * TILE_BYTES;
        weights = keys + steps() * KEY_TILES * TILE_BYTES;
        values = weights + ROW_TILES * KEY_STEPS * TILE_BYTES;
    }

    void load_query(int64_t i, const bf16* from) {
        lay_out((const char*)from, 2 * dim, steps(), queries + i / TILE_ROWS * steps() * TILE_BYTES + i % TILE_ROWS * 64);
    }

    // 32 dimensions of a key from d on; a head of 80 has only 16 in its last step
    INLINE vu some_of(const bf16* row, int64_t d) const {
        vu all = {};
        memcpy(&all, row + d, d + 32 <= dim ? 64 : 32);
        return all;
    }

    // `count` keys and values, zeros up to PORTION: what other slots hold, be it NaN, is not read.
    // `ahead`: how many are wanted next; their starts follow.
    void load_portion(const bf16* k, const bf16* v, const int64_t* starts, int64_t count, int64_t ahead) {
        for (int64_t i = 0; i < PORTION; i += LANES)
            for (int64_t d = 0; d < dim; d += 32) {
                for (int64_t j = i; j < i + LANES && j < ahead; j++) {
                    __builtin_prefetch(k + starts[count + j] + d);
                    __builtin_prefetch(v + starts[count + j] + d);
                }
                vf rows[LANES];  // pairs of dimensions, as if they were floats
#pragma GCC unroll 16
                for (int j = 0; j < LANES; j++) rows[j] = i + j < count ? (vf)some_of(k + starts[i + j], d) : vf{};
                transpose(rows);
                char* tile = keys + (d / 32 * KEY_TILES + i / TILE_ROWS) * TILE_BYTES;
#pragma GCC unroll 16
                for (int j = 0; j < LANES; j++) store_as(tile + 64 * j, rows[j]);
            }
        for (int64_t i = 0; i < PORTION; i += 2) {
            const bf16 *even = v + starts[i < count ? i : 0], *odd = v + starts[i + 1 < count ? i + 1 : 0];
            char* to = values + i / 32 * (dim / 16) * TILE_BYTES + i % 32 / 2 * 64;
            for (int64_t d = 0; d < dim; d += 16, to += TILE_BYTES) {
                vu low = wide_bits(load_as<half_vu>(even + d)), high = wide_bits(load_as<half_vu>(odd + d)) << 16;
                store_as(to, i + 1 < count ? low | high : i < count ? low : vu{});
            }
        }
    }

    // c (+)= a b for one or two tiles of rows and of columns; steps of a and b are so many bytes apart
    template <bool ROWS, bool COLUMNS, bool FRESH>
    static INLINE void product(const char* a, int64_t a_tile, const char* b, int64_t b_step, int64_t steps, float* c,
                               int64_t c_stride) {
        char* out = (char*)c;
        int64_t row = 4 * c_stride;
        if (FRESH) {
            _tile_zero(0);
            if (COLUMNS) _tile_zero(1);
            if (ROWS) _tile_zero(2);
            if (ROWS && COLUMNS) _tile_zero(3);
        } else {
            _tile_loadd(0, out, row);
            if (COLUMNS) _tile_loadd(1, out + 64, row);
            if (ROWS) _tile_loadd(2, out + TILE_ROWS * row, row);
            if (ROWS && COLUMNS) _tile_loadd(3, out + TILE_ROWS * row + 64, row);
        }
        for (int64_t k = 0; k < steps; k++, a += TILE_BYTES, b += b_step) {
            _tile_loadd(4, a, 64);
            _tile_loadd(6, b, 64);
            if (COLUMNS) _tile_loadd(7, b + TILE_BYTES, 64);
            if (ROWS) _tile_loadd(5, a + a_tile, 64);
            _tile_dpbf16ps(0, 4, 6);
            if (COLUMNS) _tile_dpbf16ps(1, 4, 7);
            if (ROWS) _tile_dpbf16ps(2, 5, 6);
            if (ROWS && COLUMNS) _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, out, row);
        if (COLUMNS) _tile_stored(1, out + 64, row);
        if (ROWS) _tile_stored(2, out + TILE_ROWS * row, row);
        if (ROWS && COLUMNS) _tile_stored(3, out + TILE_ROWS * row + 64, row);
    }

    template <bool FRESH>
    static void all_products(int64_t first, int64_t last, int64_t columns, const char* a, const char* b, int64_t steps,
                             float* c) {
        int64_t a_tile = steps * TILE_BYTES, b_step = columns * TILE_BYTES, c_stride = columns * TILE_ROWS;
        for (int64_t row = first; row < last; row += 2)
            for (int64_t column = 0; column < columns; column += 2) {
                const char *left = a + row * a_tile, *right = b + column * TILE_BYTES;
                float* to = c + row * TILE_ROWS * c_stride + column * TILE_ROWS;
                bool rows = row + 1 < last, both = column + 1 < columns;
                if (rows && both)
                    product<true, true, FRESH>(left, a_tile, right, b_step, steps, to, c_stride);
                else if (rows)
                    product<true, false, FRESH>(left, a_tile, right, b_step, steps, to, c_stride);
                else if (both)
                    product<false, true, FRESH>(left, a_tile, right, b_step, steps, to, c_stride);
                else
                    product<false, false, FRESH>(left, a_tile, right, b_step, steps, to, c_stride);
            }
    }

    // scores: [MAX_ROWS, PORTION], of the tiles that hold the rows first .. last - 1
    void score(int64_t first, int64_t last, float* scores) const {
        all_products<true>(first / TILE_ROWS, (last + TILE_ROWS - 1) / TILE_ROWS, KEY_TILES, queries, keys, steps(), scores);
    }

    // sums [rows, dim] += weights times values, the weights of the rows first .. last - 1 being `scores`
    void add_values(int64_t first, int64_t last, const float* scores, float* sums) {
        int64_t begin = first / TILE_ROWS, end = (last + TILE_ROWS - 1) / TILE_ROWS;
        for (int64_t i = begin * TILE_ROWS; i < last; i++)
            for (int64_t j = 0; j < PORTION; j += LANES) {
                half_vu part = i < first ? half_vu{} : narrow(load(scores + i * PORTION + j));
                store_as(weights + (i / TILE_ROWS * KEY_STEPS + j / 32) * TILE_BYTES + i % TILE_ROWS * 64 + j % 32 * 2, part);
            }
        all_products<false>(begin, end, dim / TILE_ROWS, weights, values, KEY_STEPS, sums);
    }
};

}  // namespace
