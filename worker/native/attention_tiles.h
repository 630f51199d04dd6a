// Attention over bfloat16 caches by the processor's matrix unit (AMX).
//
// Everything lies on its side: scores are [keys, rows] and sums [dims, rows], so that a vector holds the same of
// sixteen rows and nothing is summed up across one. Keys go into the unit as they lie in the cache. Scores are sums
// of exact products of bfloat16 numbers in float; the weights are powers of two, for the score's factor is free, and
// are rounded to bfloat16 before they meet the values, as they are wherever bfloat16 attention runs on such units.
#pragma once

#include <math.h>

#include "attention_items.h"
#include "tiles.h"

namespace {

// 2^x, relative error 3e-6; 0 below -126; NaN stays NaN
INLINE vf power_of_two(vf x) {
    vf r = (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x)
    vf p = fma(splat(1.34266708e-2f), r, splat(5.22424959e-2f));
    p = fma(p, r, splat(2.41280195e-1f));
    p = fma(p, r, splat(6.93044846e-1f));
    p = fma(p, r, splat(1.f));
    __mmask16 counts = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.f), _CMP_NLT_UQ);
    return (vf)_mm512_maskz_scalef_ps(counts, (__m512)p, (__m512)x);  // p * 2^floor(x)
}

// Two rows of floats as pairs of bfloat16: even[0], odd[0], even[1], ...
INLINE vu in_pairs(vf even, vf odd) {
    static const __m512i alternating = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (vu)_mm512_permutexvar_epi16(alternating, (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
}

// One or two tiles of the left side of a product, below each other, or of its right side, beside each other.
// Further steps of the inner dimension lie `step` bytes behind.
struct Left {
    const char *first, *second;
    int64_t row, step;
};
struct Right {
    const char *first, *second;
    int64_t step;
};

// c (+)= a b, where rows of c are c_stride floats apart
template <bool FRESH, bool TWO_LEFT, bool TWO_RIGHT>
void multiply_tiles(Left a, Right b, int64_t steps, float* c, int64_t c_stride) {
    char *out = (char*)c, *below = (char*)(c + TILE_ROWS * c_stride);
    int64_t row = 4 * c_stride;
    if (FRESH) {
        _tile_zero(0);
        if (TWO_RIGHT) _tile_zero(1);
        if (TWO_LEFT) _tile_zero(2);
        if (TWO_LEFT && TWO_RIGHT) _tile_zero(3);
    } else {
        _tile_loadd(0, out, row);
        if (TWO_RIGHT) _tile_loadd(1, out + 64, row);
        if (TWO_LEFT) _tile_loadd(2, below, row);
        if (TWO_LEFT && TWO_RIGHT) _tile_loadd(3, below + 64, row);
    }
    for (int64_t k = 0; k < steps; k++) {
        _tile_loadd(4, a.first + k * a.step, a.row);
        _tile_loadd(6, b.first + k * b.step, 64);
        if (TWO_RIGHT) _tile_loadd(7, b.second + k * b.step, 64);
        if (TWO_LEFT) _tile_loadd(5, a.second + k * a.step, a.row);
        _tile_dpbf16ps(0, 4, 6);
        if (TWO_RIGHT) _tile_dpbf16ps(1, 4, 7);
        if (TWO_LEFT) _tile_dpbf16ps(2, 5, 6);
        if (TWO_LEFT && TWO_RIGHT) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, row);
    if (TWO_RIGHT) _tile_stored(1, out + 64, row);
    if (TWO_LEFT) _tile_stored(2, below, row);
    if (TWO_LEFT && TWO_RIGHT) _tile_stored(3, below + 64, row);
}

struct TileCore : Places {
    using T = bf16;
    static constexpr int ROWS = 128;            // that go through the keys together
    static constexpr int PAIR = 2 * TILE_ROWS;  // of them, whose scores and weights stay in the first cache
    static constexpr int PORTION = 128;         // keys
    static constexpr int KEY_STEPS = PORTION / 32;

    const T* q;
    int64_t q_stride;
    const T* k_cache;
    const T* v_cache;
    T* out;
    // In tiles of 16 rows of 64 bytes. Left sides have 32 numbers of a row there, right sides 16 pairs.
    char* queries;  // [row tiles, steps of dims], right
    char* keys;     // [key tiles, steps of dims], left: of caches that do not lie as the unit wants them
    char* values;   // [dim tiles, steps of keys], left
    char* weights;  // [2 row tiles, steps of keys], right
    float* scores;  // [PORTION, PAIR]
    int32_t *until, *from;  // of each row: the keys it sees are from .. until - 1; both rise
    Sums part, whole;       // values: [D, ROWS]

    static int64_t sums_size(int64_t dim) { return ROWS * (dim + 2); }
    static Sums sums_at(float* memory, int64_t dim) {
        return {memory + ROWS * dim, memory + ROWS * (dim + 1), memory};
    }
    static int64_t steps_of(int64_t dim) { return (dim + 31) / 32; }
    static int64_t tile_bytes(int64_t dim) {
        int64_t tiles = (ROWS / TILE_ROWS + PORTION / TILE_ROWS) * steps_of(dim) + (dim / TILE_ROWS + 2) * KEY_STEPS;
        return tiles * TILE_BYTES;
    }
    static int64_t scratch_bytes(int64_t dim) {
        return tile_bytes(dim) + sizeof(float) * (PORTION * PAIR + 2 * ROWS + 2 * sums_size(dim));
    }

    void use(char* memory) {
        int64_t dim = shape.head_dim, steps = steps_of(dim);
        queries = memory;
        keys = queries + ROWS / TILE_ROWS * steps * TILE_BYTES;
        values = keys + PORTION / TILE_ROWS * steps * TILE_BYTES;
        weights = values + dim / TILE_ROWS * KEY_STEPS * TILE_BYTES;
        scores = (float*)(memory + tile_bytes(dim));
        until = (int32_t*)(scores + PORTION * PAIR);
        from = until + ROWS;
        part = sums_at((float*)(from + ROWS), dim);
        whole = sums_at((float*)(from + ROWS) + sums_size(dim), dim);
        use_tiles();
    }

    void release() { _tile_release(); }

    static int64_t tiles_of(const Item& item) { return (item.count + TILE_ROWS - 1) / TILE_ROWS; }

    // Whether keys can be read where they are: sixteen in a row, and nothing behind the dimensions of each.
    bool keys_in_place() const { return shape.block_size % TILE_ROWS == 0 && shape.head_dim % 32 == 0; }

    // 32 dimensions of a row from d on; a head of 80 has only 16 in its last step
    INLINE vu some_of(const T* row, int64_t d) const {
        vu all = {};
        memcpy(&all, row + d, d + 32 <= shape.head_dim ? 64 : 32);
        return all;
    }

    void begin(const Item& item) {
        int64_t dim = shape.head_dim, steps = steps_of(dim);
        for (int64_t tile = 0; tile < tiles_of(item); tile++) {
            const T* rows_of_q[TILE_ROWS];
            for (int64_t j = 0; j < TILE_ROWS; j++) {
                int64_t i = tile * TILE_ROWS + j;
                if (i >= item.count) i = item.count - 1;  // what fills a tile up is computed, and dropped
                int64_t at = place(item, i);
                rows_of_q[j] = q + at / shape.num_heads * q_stride + at % shape.num_heads * dim;
                until[tile * TILE_ROWS + j] = (int32_t)seen(item, i);
                from[tile * TILE_ROWS + j] = (int32_t)hidden(item, i);
            }
            for (int64_t k = 0; k < steps; k++) {
                vf rows[LANES];  // pairs of dimensions, as if they were floats
#pragma GCC unroll 16
                for (int j = 0; j < LANES; j++) rows[j] = (vf)some_of(rows_of_q[j], 32 * k);
                store_columns(rows, queries + (tile * steps + k) * TILE_BYTES);
            }
        }
    }

    static INLINE void store_columns(vf (&rows)[LANES], char* tile) {
        transpose(rows);
#pragma GCC unroll 16
        for (int j = 0; j < LANES; j++) store_as(tile + 64 * j, rows[j]);
    }

    // `count` values of a portion, zeros where there are no more: what other slots hold, be it NaN, is not read.
    void load_values(const int64_t* starts, int64_t count) {
        for (int64_t k = 0; 32 * k < count; k++)
            for (int64_t d = 0; d < shape.head_dim; d += LANES) {
                vf rows[LANES];  // pairs of keys, as if they were floats
#pragma GCC unroll 16
                for (int p = 0; p < LANES; p++) {
                    int64_t even = 32 * k + 2 * p;
                    vu low = {}, high = {};
                    if (even < count) low = wide_bits(load_as<half_vu>(v_cache + starts[even] + d));
                    if (even + 1 < count) high = wide_bits(load_as<half_vu>(v_cache + starts[even + 1] + d)) << 16;
                    rows[p] = (vf)(low | high);
                }
                store_columns(rows, values + (d / LANES * KEY_STEPS + k) * TILE_BYTES);
            }
    }

    void load_keys(const int64_t* starts, int64_t count) {
        int64_t steps = steps_of(shape.head_dim);
        for (int64_t i = 0; i < count; i++)
            for (int64_t k = 0; k < steps; k++)
                store_as(keys + (i / TILE_ROWS * steps + k) * TILE_BYTES + i % TILE_ROWS * 64,
                         some_of(k_cache + starts[i], 32 * k));
    }

    void prefetch(const int64_t* starts, int64_t count) const {
        for (int64_t i = 0; i < count; i++)
            for (int64_t d = 0; d < shape.head_dim; d += 64 / sizeof(T)) {
                __builtin_prefetch(k_cache + starts[i] + d);
                __builtin_prefetch(v_cache + starts[i] + d);
            }
    }

    Left left_of_keys(const int64_t* starts, int64_t tile, bool both) const {
        int64_t steps = steps_of(shape.head_dim);
        if (!keys_in_place()) {
            const char* first = keys + tile * steps * TILE_BYTES;
            return {first, first + steps * TILE_BYTES, 64, TILE_BYTES};
        }
        int64_t token = sizeof(T) * shape.num_kv_heads * shape.head_dim;
        const T* second = both ? k_cache + starts[(tile + 1) * TILE_ROWS] : nullptr;
        return {(const char*)(k_cache + starts[tile * TILE_ROWS]), (const char*)second, token, 64};
    }

    // The sums of a segment; rows that see nothing of it keep a largest of minus infinity.
    void add_segment(const Item& item, int64_t segment, Sums to) {
        int64_t dim = shape.head_dim, limit = seen(item, item.count - 1), end = (segment + 1) * SEGMENT;
        int64_t tiles = tiles_of(item), row = 0, starts[2 * PORTION];
        if (end > limit) end = limit;
        for (int64_t i = 0; i < tiles * TILE_ROWS; i++) {
            to.largest[i] = -INFINITY;
            to.total[i] = 0;
        }
        for (int64_t d = 0; d < dim; d++) memset(to.values + d * ROWS, 0, sizeof(float) * TILE_ROWS * tiles);
        int64_t first = hidden(item, 0) / PORTION * PORTION;
        if (first < segment * SEGMENT) first = segment * SEGMENT;
        for (; first < end; first += PORTION) {
            while (until[row] <= first) row++;
            int64_t count = end - first < PORTION ? end - first : PORTION, ahead = limit - first - count;
            ahead = ahead < PORTION ? ahead : PORTION;
            find_slots(item, first, count + ahead, starts);
            prefetch(starts + count, ahead);
            load_values(starts, count);
            if (!keys_in_place()) load_keys(starts, count);
            for (int64_t tile = row / TILE_ROWS; tile < tiles; tile += 2)
                if (tile + 1 < tiles)
                    add_portion<true>(tile, first, count, starts, to);
                else
                    add_portion<false>(tile, first, count, starts, to);
        }
    }

    // `count` keys from the one numbered `first` on, for one or two tiles of rows.
    template <bool TWO> void add_portion(int64_t tile, int64_t first, int64_t count, const int64_t* starts, Sums to) {
        int64_t dim = shape.head_dim, steps = steps_of(dim), key_tiles = (count + TILE_ROWS - 1) / TILE_ROWS;
        const char* right = queries + tile * steps * TILE_BYTES;
        Right of_queries = {right, right + steps * TILE_BYTES, TILE_BYTES};
        for (int64_t i = 0; i < key_tiles; i += 2) {
            bool both = i + 1 < key_tiles;
            Left of_keys = left_of_keys(starts, i, both);
            float* c = scores + i * TILE_ROWS * PAIR;
            if (both)
                multiply_tiles<true, true, TWO>(of_keys, of_queries, steps, c, PAIR);
            else
                multiply_tiles<true, false, TWO>(of_keys, of_queries, steps, c, PAIR);
        }
        for (int64_t i = 0; i < 1 + TWO; i++) weigh(tile + i, i, first, key_tiles * TILE_ROWS, to);
        Right of_weights = {weights, weights + KEY_STEPS * TILE_BYTES, TILE_BYTES};
        for (int64_t d = 0; d < dim / TILE_ROWS; d += 2) {
            const char* left = values + d * KEY_STEPS * TILE_BYTES;
            Left of_values = {left, left + KEY_STEPS * TILE_BYTES, 64, TILE_BYTES};
            float* c = to.values + d * TILE_ROWS * ROWS + tile * TILE_ROWS;
            if (d + 1 < dim / TILE_ROWS)
                multiply_tiles<false, true, TWO>(of_values, of_weights, (count + 31) / 32, c, ROWS);
            else
                multiply_tiles<false, false, TWO>(of_values, of_weights, (count + 31) / 32, c, ROWS);
        }
    }

    // The scores of a tile of rows, which is the left or the right one of its pair, become weights: 2^(score -
    // largest), and 0 for keys that a row does not see. What its rows have so far is brought to the new largest.
    void weigh(int64_t tile, int64_t right, int64_t first, int64_t keys_here, Sums to) {
        int64_t base = tile * TILE_ROWS;
        float* of_rows = scores + right * TILE_ROWS;
        bool all_seen = from[base + TILE_ROWS - 1] <= first && until[base] >= first + keys_here;
        if (!all_seen) hide(of_rows, first, keys_here, base);
        vf tops[4];
        for (int j = 0; j < 4; j++) tops[j] = splat(-INFINITY);
        for (int64_t j = 0; j < keys_here; j += 4)
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) tops[i] = max_of(load(of_rows + (j + i) * PAIR), tops[i]);
        vf scale = splat(1.44269504f / sqrtf((float)shape.head_dim)), before = load(to.largest + base);
        vf largest = max_of(max_of(max_of(tops[0], tops[1]), max_of(tops[2], tops[3])) * scale, before);
        store(to.largest + base, largest);
        vf zero = largest == -INFINITY ? vf{} : largest, totals[4] = {};
        char* pairs = weights + right * KEY_STEPS * TILE_BYTES;
        for (int64_t j = 0; j < keys_here; j += 4, pairs += 128) {
            vf some[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                some[i] = power_of_two(fma(load(of_rows + (j + i) * PAIR), scale, -zero));
                totals[i] += some[i];
            }
            store_as(pairs, in_pairs(some[0], some[1]));
            store_as(pairs + 64, in_pairs(some[2], some[3]));
        }
        if (keys_here % 32) memset(pairs, 0, TILE_BYTES / 2);
        vf total = (totals[0] + totals[1]) + (totals[2] + totals[3]), factor = power_of_two(before - zero);
        store(to.total + base, fma(load(to.total + base), factor, total));
        if (_mm512_cmp_ps_mask((__m512)factor, _mm512_set1_ps(1.f), _CMP_NEQ_UQ) == 0) return;
        for (int64_t d = 0; d < shape.head_dim; d++) {
            float* at = to.values + d * ROWS + base;
            store(at, load(at) * factor);
        }
    }

    void hide(float* of_rows, int64_t first, int64_t keys_here, int64_t base) const {
        vi begin = load_as<vi>(from + base), end = load_as<vi>(until + base);
        for (int64_t j = 0; j < keys_here; j++) {
            vi key = (int32_t)(first + j) - vi{};
            float* at = of_rows + j * PAIR;
            store(at, (key >= begin) & (key < end) ? load(at) : splat(-INFINITY));
        }
    }

    // `to` after all segments before, and then `from_next`.
    void join(const Item& item, Sums to, Sums next) {
        for (int64_t i = 0; i < item.count; i += TILE_ROWS) {
            vf before = load(to.largest + i), fresh = load(next.largest + i), largest = max_of(before, fresh);
            vf zero = largest == -INFINITY ? vf{} : largest;
            store(to.largest + i, largest);
            before = power_of_two(before - zero), fresh = power_of_two(fresh - zero);
            store(to.total + i, load(to.total + i) * before + load(next.total + i) * fresh);
            for (int64_t d = 0; d < shape.head_dim; d++) {
                float* at = to.values + d * ROWS + i;
                store(at, load(at) * before + load(next.values + d * ROWS + i) * fresh);
            }
        }
    }

    void write(const Item& item, Sums sums) {
        int64_t dim = shape.head_dim;
        for (int64_t i = 0; i < item.count; i += TILE_ROWS) {
            int64_t count = item.count - i < TILE_ROWS ? item.count - i : TILE_ROWS, places[TILE_ROWS];
            for (int64_t j = 0; j < count; j++) places[j] = place(item, i + j) * dim;
            vf inverse = 1.f / load(sums.total + i);
            for (int64_t d = 0; d < dim; d += LANES) {
                vf rows[LANES];
#pragma GCC unroll 16
                for (int j = 0; j < LANES; j++) rows[j] = load(sums.values + (d + j) * ROWS + i) * inverse;
                transpose(rows);
                for (int64_t j = 0; j < count; j++) store(out + places[j] + d, rows[j]);
            }
        }
    }
};

}  // namespace
