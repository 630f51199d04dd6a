// What every instruction set offers, and what dispatch.cpp hands to Python (mirrored in library.py).
#pragma once

#include <stdint.h>

enum Weights : int32_t {
    WEIGHTS_F32 = 0,       // [out / 32, in, 32] float
    WEIGHTS_BF16 = 1,      // [out / 32, in / 2, 32, 2] bfloat16, multiplied as float
    WEIGHTS_BF16_DOT = 2,  // the same, by the processor's bfloat16 dot product or matrix unit where there is one
    WEIGHTS_S8 = 3,        // [out / 32, in / 4, 32, 4] int8, rows quantised on the way in
};

struct Linear {
    const void* weight;   // packed; both counts filled up with zeros, `in` as Kernels says
    const float* scale;   // [out], of int8 weights
    const int32_t* correction;  // [out], of int8 weights: added to the sums of (input + 128) * weight
    const float* bias;    // [out] or null
    int64_t in;
    int64_t out;
    int32_t weights;      // enum Weights
    float input_scale;    // of int8: rows become round(x / input_scale + input_offset); 0: each has its own scale
    float input_offset;
};

struct Attention {
    int64_t num_heads;
    int64_t num_kv_heads;
    int64_t head_dim;     // a multiple of 16
    int64_t block_size;   // tokens
    int64_t window;       // latest keys a query sees, its own among them; 0: all
};

// What all layers of a step share. Row r has the queries query_start[r] .. query_start[r + 1], which are the last
// of its context_len[r] tokens; those lie in the blocks table[r * table_width ...].
struct Step {
    const int64_t* slots;  // [tokens] where keys and values go: block * block_size + offset
    const int32_t* query_start;
    const int32_t* context_len;
    const int32_t* table;
    int64_t table_width;
    int64_t rows;
};

// dtype of activations and caches: 0 float, 1 bfloat16
struct Kernels {
    const char* name;
    int32_t has_bf16_dot;
    int32_t has_int8_dot;
    int32_t bf16_inputs;  // to a multiple of which the inputs of bfloat16 weights are filled up with zeros
    int32_t int8_inputs;  // of int8 weights
    // 0, or 1 when memory has run out
    int32_t (*linear)(const Linear*, const void* x, int64_t x_stride, void* y, int64_t rows, int32_t dtype);
    // Stores k and v, then attends. q, k, v: [tokens, heads, head_dim], tokens that many elements apart, heads
    // dense; out: dense; caches: [blocks, block_size, num_kv_heads, head_dim].
    int32_t (*attention)(const Attention*, const Step*, const void* q, const void* k, const void* v,
                         int64_t q_stride, int64_t k_stride, int64_t v_stride, void* k_cache,
                         void* v_cache, void* out, int32_t dtype);
    // x += delta (null: nothing), out = x normalised; all [rows, width], weight: [width]
    void (*add_rms_norm)(void* x, const void* delta, const void* weight, float eps, int64_t rows, int64_t width,
                         void* out, int32_t dtype);
    // gate_up: [rows, 2 * width]; out: [rows, width]
    void (*silu_mul)(const void* gate_up, int64_t rows, int64_t width, void* out, int32_t dtype);
    // heads: [rows, count, dim], rows `stride` elements apart, in place; cos, sin: [rows, dim]
    void (*rotate)(void* heads, int64_t stride, const void* cos, const void* sin, int64_t rows, int64_t count,
                   int64_t dim, int32_t dtype);
};
