// Causal attention over the paged cache.
//
// The heads that share a key head are rows of one product, and so are the queries of a chunk. A row takes its keys
// in portions, from the first on, and starts a new sum with every segment of portions; the segments' sums are then
// joined in order. So its bits depend neither on the other rows nor on the number of threads, be the segments
// of a row computed by one thread or by several.
#pragma once

#include <math.h>
#include <omp.h>

#include "kernels.h"
#include "simd.h"

namespace {

constexpr int PORTION = 64;                // keys
constexpr int SEGMENT = 8 * PORTION;
constexpr int MAX_ROWS = 64;               // that go through the keys together
constexpr int ROW_TILE = 6;                // rows whose accumulators fit into the registers, ...
constexpr int COLUMN_TILE = LANES == 8 ? 2 : 4;  // ... of so many vectors each
constexpr int64_t SERIAL_ATTENTION = 1 << 17;    // products that one thread does sooner than two

}  // namespace

#if defined(__AMX_BF16__)
#include "attention_tiles.h"
#endif

namespace {

// Queries of one row of the step that share a key head: rows of a product, the heads of a query side by side.
struct Item {
    int32_t row, kv_head, first, count;
};

struct Sums {
    float* largest;  // [count]
    float* total;    // [count] of e^(score - largest)
    float* values;   // [count, head_dim] the same times the values
};

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

// Whether the matrix unit computes the products of caches of this kind.
template <class T> constexpr bool by_tiles() {
#if defined(__AMX_BF16__)
    return __is_same(T, bf16);
#else
    return false;
#endif
}

template <class T> struct Worker {
    const Attention& shape;
    const Step& step;
    const T* q;
    int64_t q_stride;
    const T* k_cache;
    const T* v_cache;
    T* out;
    float *queries, *scores, *keys, *values;  // [MAX_ROWS, D], [MAX_ROWS, PORTION], [D, PORTION], [PORTION, D]
    Sums part, whole;
#if defined(__AMX_BF16__)
    AttentionTiles tiles;  // instead of queries, keys and values, where by_tiles
#endif

    static int64_t sums_size(int64_t rows, int64_t dim) { return rows * (dim + 2); }
    static int64_t scratch_bytes(int64_t dim) {
        int64_t bytes = sizeof(float) * (MAX_ROWS * (dim + PORTION) + 2 * PORTION * dim + 2 * sums_size(MAX_ROWS, dim));
#if defined(__AMX_BF16__)
        bytes += AttentionTiles::bytes(dim);
#endif
        return bytes;
    }
    static Sums sums_at(float* memory, int64_t rows) { return {memory, memory + rows, memory + 2 * rows}; }

    void use(float* memory) {
        int64_t dim = shape.head_dim;
        queries = memory;
        scores = queries + MAX_ROWS * dim;
        keys = scores + MAX_ROWS * PORTION;
        values = keys + PORTION * dim;
        part = sums_at(values + PORTION * dim, MAX_ROWS);
        whole = sums_at(values + PORTION * dim + sums_size(MAX_ROWS, dim), MAX_ROWS);
#if defined(__AMX_BF16__)
        tiles.use((char*)(values + PORTION * dim + 2 * sums_size(MAX_ROWS, dim)), dim);
#endif
    }

    int64_t group() const { return shape.num_heads / shape.num_kv_heads; }

    // Keys that row i of the item sees; rising.
    int64_t seen(const Item& item, int64_t i) const {
        int64_t query = (item.first + i) / group();
        int64_t num_queries = step.query_start[item.row + 1] - step.query_start[item.row];
        return step.context_len[item.row] - num_queries + query + 1;
    }

    // Keys before these are out of the window of row i; rising.
    int64_t hidden(const Item& item, int64_t i) const {
        int64_t before = shape.window ? seen(item, i) - shape.window : 0;
        return before > 0 ? before : 0;
    }

    int64_t first_segment(const Item& item) const { return hidden(item, 0) / SEGMENT; }

    int64_t segments(const Item& item) const { return (seen(item, item.count - 1) + SEGMENT - 1) / SEGMENT; }

    int64_t place(const Item& item, int64_t i) const {
        int64_t query = (item.first + i) / group(), head = item.kv_head * group() + (item.first + i) % group();
        return (step.query_start[item.row] + query) * shape.num_heads + head;
    }

    void load_queries(const Item& item) {
        int64_t dim = shape.head_dim;
        vf scale = splat(1.f / sqrtf((float)dim));
        for (int64_t i = 0; i < item.count; i++) {
            int64_t at = place(item, i);
            const T* from = q + at / shape.num_heads * q_stride + at % shape.num_heads * dim;
#if defined(__AMX_BF16__)
            if constexpr (by_tiles<T>()) {
                tiles.load_query(i, from);
                continue;
            }
#endif
            for (int64_t d = 0; d < dim; d += LANES) store(queries + i * dim + d, load(from + d) * scale);
        }
    }

    // Where in the caches the keys first .. first + count - 1 of the item lie, in elements.
    void find_slots(const Item& item, int64_t first, int64_t count, int64_t* starts) const {
        int64_t token = shape.num_kv_heads * shape.head_dim;
        const int32_t* blocks = step.table + item.row * step.table_width;
        int64_t block = first / shape.block_size, offset = first % shape.block_size;
        for (int64_t i = 0; i < count; i++) {
            starts[i] = (blocks[block] * shape.block_size + offset) * token + item.kv_head * shape.head_dim;
            if (++offset == shape.block_size) {
                offset = 0;
                block++;
            }
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
#if defined(__AMX_BF16__)
            if constexpr (by_tiles<T>()) {
                tiles.load_portion(k_cache, v_cache, starts, count, ahead);
                tiles.score(row, item.count, scores);
                vf scale = splat(1.f / sqrtf((float)dim));
                for (float* at = scores + row * PORTION; at < scores + item.count * PORTION; at += LANES)
                    store(at, load(at) * scale);
                weigh_all(item, row, first, scores + row * PORTION, to);
                tiles.add_values(row, item.count, scores, to.values);
                continue;
            }
#endif
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

    void finish(const Item& item, float* parts, int64_t size) {
        int64_t segment = first_segment(item);
        Sums first = sums_at(parts + segment * size, MAX_ROWS);
        while (++segment < segments(item)) join(item, first, sums_at(parts + segment * size, MAX_ROWS));
        write(item, first);
    }

    void attend(const Item& item) {
        load_queries(item);
        int64_t segment = first_segment(item);
        add_segment(item, segment, whole);
        while (++segment < segments(item)) {
            add_segment(item, segment, part);
            join(item, whole, part);
        }
        write(item, whole);
    }
};

template <class T>
int32_t attend_all(const Attention* shape, const Step* step, const T* q, const T* k, const T* v, int64_t q_stride,
                   int64_t k_stride, int64_t v_stride, T* k_cache, T* v_cache, T* out) {
    int64_t group = shape->num_heads / shape->num_kv_heads, token = shape->num_kv_heads * shape->head_dim;
    int64_t tokens = step->query_start[step->rows];
    for (int64_t t = 0; t < tokens; t++) {
        memcpy(k_cache + step->slots[t] * token, k + t * k_stride, sizeof(T) * token);
        memcpy(v_cache + step->slots[t] * token, v + t * v_stride, sizeof(T) * token);
    }
    int64_t most = tokens * shape->num_heads / MAX_ROWS + step->rows * shape->num_kv_heads;
    Item* items = (Item*)scratch<1>(sizeof(Item) * most);
    if (!items) return 1;
    int64_t count = 0, work = 0, longest = 0;
    for (int64_t row = 0; row < step->rows; row++) {
        int64_t rows = (step->query_start[row + 1] - step->query_start[row]) * group;
        for (int64_t first = 0; first < rows; first += MAX_ROWS) {
            int64_t length = rows - first < MAX_ROWS ? rows - first : MAX_ROWS;
            for (int64_t head = 0; head < shape->num_kv_heads; head++)
                items[count++] = {(int32_t)row, (int32_t)head, (int32_t)first, (int32_t)length};
        }
        work += rows * token * step->context_len[row];
        if (step->context_len[row] > longest) longest = step->context_len[row];
    }
    int threads = work < SERIAL_ATTENTION ? 1 : omp_get_max_threads();
    int64_t segments = (longest + SEGMENT - 1) / SEGMENT, sums = Worker<T>::sums_size(MAX_ROWS, shape->head_dim);
    float* parts = nullptr;  // sums of segments, when there are too few items for the threads
    if (threads > 1 && segments > 1 && count < 2 * threads) {
        parts = (float*)scratch<3>(sizeof(float) * count * segments * sums);
        if (!parts) return 1;
    }
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Worker<T> worker = {*shape, *step, q, q_stride, k_cache, v_cache, out};
        float* memory = (float*)scratch<2>(worker.scratch_bytes(shape->head_dim));
        if (memory)
            worker.use(memory);
        else
            failed = 1;
#if defined(__AMX_BF16__)
        if (by_tiles<T>()) use_tiles();
#endif
        if (parts) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < count * segments; i++) {
                const Item& item = items[i / segments];
                if (!memory || i % segments >= worker.segments(item) || i % segments < worker.first_segment(item))
                    continue;
                worker.load_queries(item);
                worker.add_segment(item, i % segments, worker.sums_at(parts + i * sums, MAX_ROWS));
            }
        }
        // from behind: the last queries of a chunk see the most keys
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = count - 1; i >= 0; i--) {
            if (!memory) continue;
            if (parts)
                worker.finish(items[i], parts + i * segments * sums, sums);
            else
                worker.attend(items[i]);
        }
#if defined(__AMX_BF16__)
        if (by_tiles<T>()) _tile_release();
#endif
    }
    return failed;
}

int32_t attention(const Attention* shape, const Step* step, const void* q, const void* k, const void* v,
                  int64_t q_stride, int64_t k_stride, int64_t v_stride, void* k_cache, void* v_cache, void* out,
                  int32_t dtype) {
    if (dtype)
        return attend_all(shape, step, (const bf16*)q, (const bf16*)k, (const bf16*)v, q_stride, k_stride, v_stride,
                          (bf16*)k_cache, (bf16*)v_cache, (bf16*)out);
    return attend_all(shape, step, (const float*)q, (const float*)k, (const float*)v, q_stride, k_stride, v_stride,
                      (float*)k_cache, (float*)v_cache, (float*)out);
}

}  // namespace
