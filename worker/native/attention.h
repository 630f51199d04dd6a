// Causal attention over the paged cache.
#pragma once

#include <omp.h>

#include "attention_rows.h"
#if defined(__AMX_BF16__)
#include "attention_tiles.h"
#endif

namespace {

#if defined(__AMX_BF16__)
using Bf16Core = TileCore;
#else
using Bf16Core = VectorCore<bf16>;
#endif

constexpr int64_t SERIAL_ATTENTION = 1 << 17;  // products that one thread does sooner than two

template <class Core, class T>
int32_t attend_all(const Attention* shape, const Step* step, const T* q, const T* k, const T* v, int64_t q_stride,
                   int64_t k_stride, int64_t v_stride, T* k_cache, T* v_cache, T* out) {
    int64_t group = shape->num_heads / shape->num_kv_heads, token = shape->num_kv_heads * shape->head_dim;
    int64_t tokens = step->query_start[step->rows];
    for (int64_t t = 0; t < tokens; t++) {
        memcpy(k_cache + step->slots[t] * token, k + t * k_stride, sizeof(T) * token);
        memcpy(v_cache + step->slots[t] * token, v + t * v_stride, sizeof(T) * token);
    }
    int64_t most = tokens * shape->num_heads / Core::ROWS + step->rows * shape->num_kv_heads;
    Item* items = (Item*)scratch<1>(sizeof(Item) * most);
    if (!items) return 1;
    int64_t count = 0, work = 0, longest = 0;
    for (int64_t row = 0; row < step->rows; row++) {
        int64_t rows = (step->query_start[row + 1] - step->query_start[row]) * group;
        for (int64_t first = 0; first < rows; first += Core::ROWS) {
            int64_t length = rows - first < Core::ROWS ? rows - first : Core::ROWS;
            for (int64_t head = 0; head < shape->num_kv_heads; head++)
                items[count++] = {(int32_t)row, (int32_t)head, (int32_t)first, (int32_t)length};
        }
        work += rows * token * step->context_len[row];
        if (step->context_len[row] > longest) longest = step->context_len[row];
    }
    int threads = work < SERIAL_ATTENTION ? 1 : omp_get_max_threads();
    int64_t segments = (longest + SEGMENT - 1) / SEGMENT, sums = Core::sums_size(shape->head_dim);
    float* parts = nullptr;  // sums of segments, when there are too few items for the threads
    if (threads > 1 && segments > 1 && count < 2 * threads) {
        parts = (float*)scratch<3>(sizeof(float) * count * segments * sums);
        if (!parts) return 1;
    }
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Core core = {*shape, *step, q, q_stride, k_cache, v_cache, out};
        char* memory = scratch<2>(Core::scratch_bytes(shape->head_dim));
        if (memory)
            core.use(memory);
        else
            failed = 1;
        if (parts) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < count * segments; i++) {
                const Item& item = items[i / segments];
                if (!memory || i % segments >= core.segments(item) || i % segments < core.first_segment(item))
                    continue;
                core.begin(item);
                core.add_segment(item, i % segments, Core::sums_at(parts + i * sums, shape->head_dim));
            }
        }
        // from behind: the last queries of a chunk see the most keys
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = count - 1; i >= 0; i--) {
            if (!memory) continue;
            if (parts)
                finish(core, items[i], parts + i * segments * sums, sums);
            else
                attend(core, items[i]);
        }
        core.release();
    }
    return failed;
}

int32_t attention(const Attention* shape, const Step* step, const void* q, const void* k, const void* v,
                  int64_t q_stride, int64_t k_stride, int64_t v_stride, void* k_cache, void* v_cache, void* out,
                  int32_t dtype) {
    if (dtype)
        return attend_all<Bf16Core>(shape, step, (const bf16*)q, (const bf16*)k, (const bf16*)v, q_stride, k_stride, v_stride,
                          (bf16*)k_cache, (bf16*)v_cache, (bf16*)out);
    return attend_all<VectorCore<float>>(shape, step, (const float*)q, (const float*)k, (const float*)v, q_stride, k_stride, v_stride,
                      (float*)k_cache, (float*)v_cache, (float*)out);
}

}  // namespace
