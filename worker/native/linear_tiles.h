// Products with packed weights by the processor's matrix unit: the panels of linear.h, part of which this is.
//
// A panel of 32 outputs is, step by step, two tiles of weights side by side as it lies, so nothing is packed otherwise
// than for vectors and one row reads it as fast as 500. All row numbers go this way: the unit adds in an order of its
// own, and a row's bits are to be the same in any company.
#pragma once

#include <omp.h>

#include "tiles.h"

namespace {

constexpr int PAIR = 2 * TILE_ROWS;         // rows whose sums stay in the unit at once
constexpr int STEP_BYTES = 2 * TILE_BYTES;  // of a panel, in a step
constexpr int SUMS_BYTES = 4 * TILE_BYTES;  // of a pair of row tiles and a panel

// Many rows: what is read again and again stays in the second-level cache: for long inputs a part of them at a time,
// of a block of rows and of a group of panels, with the unfinished sums of these.
constexpr int PART = 32;   // steps
constexpr int BLOCK = 16;  // pairs
constexpr int GROUP = 8;   // panels
constexpr int FEW = 2;     // pairs: not worth it

struct Bf16Tiles {
    typedef vf Sum;
    static constexpr int inputs = 32;

    static INLINE vf value(const Linear*, vf sum, float, int64_t, int64_t) { return sum; }
};

struct Int8Tiles {
    typedef vi Sum;
    static constexpr int inputs = 64;

    static INLINE vf value(const Linear* linear, vi sum, float scale, int64_t column, int64_t count) {
        return Int8::value(linear, sum, scale, column, count);
    }
};

// sums 0 to 3 += rows 4, 5 times weights 6, 7
template <class W, bool BOTH> INLINE void multiply_step(const char* first, const char* second, const char* w) {
    _tile_loadd(4, first, 64);
    _tile_loadd(6, w, 128);
    _tile_loadd(7, w + 64, 128);
    if (BOTH) _tile_loadd(5, second, 64);
    if constexpr (__is_same(W, Bf16Tiles)) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (BOTH) _tile_dpbf16ps(2, 5, 6);
        if (BOTH) _tile_dpbf16ps(3, 5, 7);
    } else {
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        if (BOTH) _tile_dpbusd(2, 5, 6);
        if (BOTH) _tile_dpbusd(3, 5, 7);
    }
}

// What of the next panel is fetched into the second-level cache meanwhile: else the first rows of each wait for memory.
struct Ahead {
    const char* from;
    int lines;  // in each step
};

// Nearly equal shares of `total`: share i is [begin(i), begin(i + 1)).
struct Shares {
    int64_t total, count;
    int64_t begin(int64_t i) const { return total * i / count; }
};

// Adds a part of the steps up, from `before` on unless that is null, and leaves the sums at `after`.
// x: the part of 16 rows, of the next 16 at `second` with BOTH; w: of a panel.
template <class W, bool BOTH>
void multiply_pair(const char* x, const char* second, const char* w, int64_t steps, const void* before, void* after,
                   Ahead ahead) {
    constexpr int ROW = 2 * 64;
    const char* from = (const char*)before;
    char* to = (char*)after;
    if (before) {
        _tile_loadd(0, from, ROW);
        _tile_loadd(1, from + 64, ROW);
        if (BOTH) _tile_loadd(2, from + TILE_ROWS * ROW, ROW);
        if (BOTH) _tile_loadd(3, from + TILE_ROWS * ROW + 64, ROW);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        if (BOTH) _tile_zero(2);
        if (BOTH) _tile_zero(3);
    }
    for (int64_t k = 0; k < steps; k++, x += TILE_BYTES, second += TILE_BYTES, w += STEP_BYTES) {
        for (int i = 0; i < ahead.lines; i++, ahead.from += 64) __builtin_prefetch(ahead.from, 0, 2);
        multiply_step<W, BOTH>(x, second, w);
    }
    _tile_stored(0, to, ROW);
    _tile_stored(1, to + 64, ROW);
    if (BOTH) _tile_stored(2, to + TILE_ROWS * ROW, ROW);
    if (BOTH) _tile_stored(3, to + TILE_ROWS * ROW + 64, ROW);
}

// The product of prepared rows with a group of panels, for a block of pairs of row tiles.
template <class W, class T> struct TileJob {
    const Linear* linear;
    const char* rows;      // prepared
    const float* scales;
    T* y;
    int64_t num_rows, steps;
    Shares parts;          // of the steps

    void run(int64_t pair_begin, int64_t pair_end, int64_t panel_begin, int64_t panel_end, char* unfinished) const {
        int64_t pairs = pair_end - pair_begin;
        for (int64_t part = 0; part < parts.count; part++)
            for (int64_t panel = panel_begin; panel < panel_end; panel++)
                for (int64_t pair = pair_begin; pair < pair_end; pair++) {
                    char* sums = unfinished + ((panel - panel_begin) * pairs + pair - pair_begin) * SUMS_BYTES;
                    add(part, panel, pair, pair - pair_begin, pairs, sums);
                }
    }

    INLINE void add(int64_t part, int64_t panel, int64_t pair, int64_t turn, int64_t turns, char* sums) const {
        alignas(64) typename W::Sum finished[PAIR][VECTORS];
        int64_t k = parts.begin(part), count = parts.begin(part + 1) - k;
        int64_t first = pair * PAIR, left = num_rows - first;
        int meant = (int)(left < PAIR ? left : PAIR);
        const char* x = rows + (2 * pair * steps + k) * TILE_BYTES;
        const char* w = (const char*)linear->weight + (panel * steps + k) * STEP_BYTES;
        int lines = (int)((STEP_BYTES / 64 + turns - 1) / turns);
        Ahead ahead = {w + steps * STEP_BYTES + turn * count * lines * 64, lines};
        bool last = part + 1 == parts.count;
        T* to = y + first * linear->out;
        if (last)  // where results go is far apart, row by row: they would wait for it at the end
            for (int m = 0; m < meant; m++) __builtin_prefetch(to + m * linear->out + panel * PANEL, 1);
        void* after = last ? (void*)finished : sums;
        if (left > TILE_ROWS)
            multiply_pair<W, true>(x, x + steps * TILE_BYTES, w, count, part ? sums : nullptr, after, ahead);
        else
            multiply_pair<W, false>(x, x, w, count, part ? sums : nullptr, after, ahead);
        if (last)
            for (int m = 0; m < meant; m++, to += linear->out)
                put_results<W>(linear, finished[m], scales[first + m], panel, (char*)to, sizeof(T) == 2);
    }
};

template <class W, class T>
int32_t run_tiles(const Linear* linear, const T* x, int64_t x_stride, T* y, int64_t rows) {
    int64_t steps = (linear->in + W::inputs - 1) / W::inputs;
    int64_t panels = (linear->out + PANEL - 1) / PANEL;
    int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, pairs = (tiles + 1) / 2;
    int threads = rows * linear->in * linear->out < SERIAL ? 1 : omp_get_max_threads();
    bool many = pairs > FEW;
    Shares parts = {steps, many ? (steps + PART - 1) / PART : 1};
    Shares blocks = {pairs, (pairs + BLOCK - 1) / BLOCK};
    int64_t shares = many ? (panels + GROUP - 1) / GROUP : 1;
    Shares groups = {panels, (shares + threads - 1) / threads * threads};
    int64_t unfinished = parts.count > 1 ? BLOCK * (GROUP + 1) * SUMS_BYTES : 0;  // of a thread
    char* prepared = scratch<0>(tiles * steps * TILE_BYTES + threads * (unfinished + steps * 64) + rows * sizeof(float));
    if (!prepared) return 1;
    char* sums = prepared + tiles * steps * TILE_BYTES;
    char* bytes = sums + threads * unfinished;
    float* scales = (float*)(bytes + threads * steps * 64);
    bool together = rows * linear->in >= SHARED;
    auto prepare_one = [&](int64_t r) {
        char* tile = prepared + r / TILE_ROWS * steps * TILE_BYTES + r % TILE_ROWS * 64;
        const T* row = x + r * x_stride;
        if constexpr (__is_same(W, Int8Tiles)) {
            char* whole = bytes + omp_get_thread_num() * steps * 64;
            scales[r] = quantise_row(linear, row, (uint8_t*)whole);
            lay_out(whole, linear->in, steps, tile);
        } else
            lay_out((const char*)row, 2 * linear->in, steps, tile);
    };
    if (!together)
        for (int64_t r = 0; r < rows; r++) prepare_one(r);
    TileJob<W, T> job = {linear, prepared, scales, y, rows, steps, parts};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        if (together) {
#pragma omp for schedule(static)
            for (int64_t r = 0; r < rows; r++) prepare_one(r);
        }
        use_tiles();
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < blocks.count * groups.count; i++) {
            int64_t block = i / groups.count, group = i % groups.count;
            job.run(blocks.begin(block), blocks.begin(block + 1), groups.begin(group), groups.begin(group + 1),
                    sums + omp_get_thread_num() * unfinished);
        }
        _tile_release();
    }
    return 0;
}

}  // namespace
