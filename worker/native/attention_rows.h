// The products of attention by vectors, in float, whatever the dtype of the caches.
#pragma once

#include <math.h>

#include "attention_items.h"

namespace {

constexpr int ROW_TILE = 6;                // rows whose accumulators fit into the registers, ...
constexpr int COLUMN_TILE = LANES == 8 ? 2 : 4;  // ... of so many vectors each

// Rows of the right side of a product: one after the other in float, or as they lie in a cache.
struct Dense {
    const float* rows;
    int64_t stride;

    INLINE const float* row(int64_t k) const { return rows + k * stride; }
};

template <class T> struct Scattered {
    const T* memory;
    const int64_t* starts;

    INLINE const T* row(int64_t k) const { return memory + starts[k]; }
};

// c += a b for M rows and V vectors of columns; sums go in the order of `inner`
template <int M, int V, class B>
void multiply_tile(const float* a, int64_t a_stride, const B& b, int64_t column, int64_t inner, float* c,
                   int64_t c_stride) {
    vf sum[M][V];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sum[m][v] = load(c + m * c_stride + column + v * LANES);
    for (int64_t k = 0; k < inner; k++) {
        vf right[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) right[v] = load(b.row(k) + column + v * LANES);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) sum[m][v] = fma(splat(a[m * a_stride + k]), right[v], sum[m][v]);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) store(c + m * c_stride + column + v * LANES, sum[m][v]);
}

template <int M, int V, class B>
INLINE void multiply_some(int rows, const float* a, int64_t a_stride, const B& b, int64_t column, int64_t inner,
                          float* c, int64_t c_stride) {
    if (rows == M)
        multiply_tile<M, V>(a, a_stride, b, column, inner, c, c_stride);
    else if constexpr (M > 1)
        multiply_some<M - 1, V>(rows, a, a_stride, b, column, inner, c, c_stride);
}

// c += a b. a: [rows, a_stride], of which `inner` are used; c: [rows, columns], columns a multiple of LANES
template <class B>
void multiply_add(const float* a, int64_t a_stride, const B& b, int64_t inner, int64_t columns, float* c,
                  int64_t rows) {
    int64_t tiles = (rows + ROW_TILE - 1) / ROW_TILE;
    for (int64_t tile = 0; tile < tiles; tile++) {
        int64_t first = tile * rows / tiles, column = 0;
        int size = (int)((tile + 1) * rows / tiles - first);
        const float* left = a + first * a_stride;
        float* to = c + first * columns;
        for (; column + COLUMN_TILE * LANES <= columns; column += COLUMN_TILE * LANES)
            multiply_some<ROW_TILE, COLUMN_TILE>(size, left, a_stride, b, column, inner, to, columns);
        for (; column < columns; column += LANES)
            multiply_some<ROW_TILE, 1>(size, left, a_stride, b, column, inner, to, columns);
    }
}

template <class T> struct VectorCore : Places {
    static constexpr int ROWS = 64;     // that go through the keys together
    static constexpr int PORTION = 64;  // keys

    const T* q;
    int64_t q_stride;
    const T* k_cache;
    const T* v_cache;
    T* out;
    float *queries, *scores, *keys, *values;  // [ROWS, D], [ROWS, PORTION], [D, PORTION], [PORTION, D]
    Sums part, whole;                         // values: [ROWS, D]

    static int64_t sums_size(int64_t dim) { return ROWS * (dim + 2); }
    static Sums sums_at(float* memory, int64_t) { return {memory, memory + ROWS, memory + 2 * ROWS}; }
    static int64_t scratch_bytes(int64_t dim) {
        return sizeof(float) * (ROWS * (dim + PORTION) + 2 * PORTION * dim + 2 * sums_size(dim));
    }

    void use(char* memory) {
        int64_t dim = shape.head_dim;
        queries = (float*)memory;
        scores = queries + ROWS * dim;
        keys = scores + ROWS * PORTION;
        values = keys + PORTION * dim;
        part = sums_at(values + PORTION * dim, dim);
        whole = sums_at(values + PORTION * dim + sums_size(dim), dim);
    }

    void release() {}

    void begin(const Item& item) {
        int64_t dim = shape.head_dim;
        vf scale = splat(1.f / sqrtf((float)dim));
        for (int64_t i = 0; i < item.count; i++) {
            int64_t at = place(item, i);
            const T* from = q + at / shape.num_heads * q_stride + at % shape.num_heads * dim;
            for (int64_t d = 0; d < dim; d += LANES) store(queries + i * dim + d, load(from + d) * scale);
        }
    }

    // `count` keys in float, as columns; zeros up to PORTION. What other slots hold, be it NaN, is not read.
    // `ahead`: how many are wanted next; their starts follow.
    void load_keys(const int64_t* starts, int64_t count, int64_t ahead) {
        int64_t dim = shape.head_dim;
        const T *k = k_cache, *v = v_cache;
        float* __restrict key_columns = keys;
        for (int64_t i = 0; i < PORTION; i += LANES) {
            int64_t here = count - i;
            for (int64_t d = 0; d < dim; d += LANES) {
                if (d * sizeof(T) % 64 == 0)  // a line at a time between the loads: all at once they would wait
                    for (int64_t j = i; j < i + LANES && j < ahead; j++) {
                        __builtin_prefetch(k + starts[count + j] + d);
                        __builtin_prefetch(v + starts[count + j] + d);
                    }
                vf rows[LANES];
#pragma GCC unroll 16
                for (int j = 0; j < LANES; j++) rows[j] = j < here ? load(k + starts[i + j] + d) : vf{};
                transpose(rows);
#pragma GCC unroll 16
                for (int j = 0; j < LANES; j++) store(key_columns + (d + j) * PORTION + i, rows[j]);
            }
        }
    }

    void load_values(const int64_t* starts, int64_t count) {
        int64_t dim = shape.head_dim;
        const T* v = v_cache;
        float* __restrict rows = values;
        for (int64_t i = 0; i < count; i++)
            for (int64_t d = 0; d < dim; d += LANES) store(rows + i * dim + d, load(v + starts[i] + d));
    }

    // The sums of a segment; rows that see nothing of it keep a largest of minus infinity.
    void add_segment(const Item& item, int64_t segment, Sums to) {
        int64_t dim = shape.head_dim, limit = seen(item, item.count - 1), end = (segment + 1) * SEGMENT;
        if (end > limit) end = limit;
        for (int64_t i = 0; i < item.count; i++) {
            to.largest[i] = -INFINITY;
            to.total[i] = 0;
        }
        memset(to.values, 0, sizeof(float) * item.count * dim);
        int64_t row = 0, starts[2 * PORTION], begin = hidden(item, 0) / PORTION * PORTION;
        if (begin < segment * SEGMENT) begin = segment * SEGMENT;
        for (int64_t first = begin; first < end; first += PORTION) {
            while (seen(item, row) <= first) row++;
            int64_t count = end - first < PORTION ? end - first : PORTION, rows = item.count - row;
            int64_t ahead = limit - first - count;
            ahead = ahead < PORTION ? ahead : PORTION;
            find_slots(item, first, count + ahead, starts);
            float* sums = to.values + row * dim;
            load_keys(starts, count, ahead);
            bool dense_values = rows > 2 * ROW_TILE;  // else they are read once or twice, and need no copy
            if (dense_values) load_values(starts, count);
            memset(scores, 0, sizeof(float) * rows * PORTION);
            multiply_add(queries + row * dim, dim, Dense{keys, PORTION}, dim, PORTION, scores, rows);
            weigh_all(item, row, first, scores, to);
            if (dense_values)
                multiply_add(scores, PORTION, Dense{values, dim}, count, dim, sums, rows);
            else
                multiply_add(scores, PORTION, Scattered<T>{v_cache, starts}, count, dim, sums, rows);
        }
    }

    // The scores of the rows from `row` on, for the portion of keys that begins with `first`.
    void weigh_all(const Item& item, int64_t row, int64_t first, float* of_rows, Sums to) {
        for (; row < item.count; row++, of_rows += PORTION)
            weigh(of_rows, hidden(item, row) - first, seen(item, row) - first, to, row);
    }

    // Scores become e^(score - largest), 0 before `out` and from `visible` on; what row i has so far is brought to
    // the new largest.
    void weigh(float* scores_of_row, int64_t out, int64_t visible, Sums to, int64_t i) {
        int64_t dim = shape.head_dim;
        if (out >= PORTION) {  // the row's window begins later: there is no largest yet
            memset(scores_of_row, 0, sizeof(float) * PORTION);
            return;
        }
        for (int64_t j = 0; j < out; j++) scores_of_row[j] = -INFINITY;
        for (int64_t j = visible; j < PORTION; j++) scores_of_row[j] = -INFINITY;
        vf top = load(scores_of_row);
        for (int j = LANES; j < PORTION; j += LANES) top = max_of(top, load(scores_of_row + j));
        float before = to.largest[i], largest = max_in(top);
        if (largest < before) largest = before;
        vf total = {};
        for (int j = 0; j < PORTION; j += LANES) {
            vf weight = exp_of(load(scores_of_row + j) - largest);
            store(scores_of_row + j, weight);
            total += weight;
        }
        to.largest[i] = largest;
        if (before == largest || before == -INFINITY) {
            to.total[i] += sum_of(total);
            return;
        }
        float factor = exp_of(before - largest);
        to.total[i] = to.total[i] * factor + sum_of(total);
        for (int64_t d = 0; d < dim; d += LANES)
            store(to.values + i * dim + d, load(to.values + i * dim + d) * factor);
    }

    // `to` after all segments before, and then `from`.
    void join(const Item& item, Sums to, Sums from) {
        int64_t dim = shape.head_dim;
        for (int64_t i = 0; i < item.count; i++) {
            if (from.largest[i] == -INFINITY) continue;
            float largest = to.largest[i] > from.largest[i] ? to.largest[i] : from.largest[i];
            float old = exp_of(to.largest[i] - largest), fresh = exp_of(from.largest[i] - largest);
            to.largest[i] = largest;
            to.total[i] = to.total[i] * old + from.total[i] * fresh;
            for (int64_t d = 0; d < dim; d += LANES) {
                float* at = to.values + i * dim + d;
                store(at, load(at) * old + load(from.values + i * dim + d) * fresh);
            }
        }
    }

    void write(const Item& item, Sums sums) {
        int64_t dim = shape.head_dim;
        for (int64_t i = 0; i < item.count; i++) {
            float inverse = 1.f / sums.total[i];
            for (int64_t d = 0; d < dim; d += LANES)
                store(out + place(item, i) * dim + d, load(sums.values + i * dim + d) * inverse);
        }
    }
};

}  // namespace
