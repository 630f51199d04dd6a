// What every instruction set offers, and what dispatch.cpp hands to Python (mirrored in library.py).
#pragma once

#include <stdint.h>

enum Weights : int32_t {
    WEIGHTS_F32 = 0,       // [out / 32, in, 32] float
    WEIGHTS_BF16 = 1,      // [out / 32, in / 2, 32, 2] bfloat16, multiplied as float
    WEIGHTS_BF16_DOT = 2,  // the same, multiplied by the processor's bfloat16 dot product where there is one
    WEIGHTS_S8 = 3,        // [out / 32, in / 4, 32, 4] int8, rows quantised on the way in
};

struct Linear {
    const void* weight;   // packed; both counts filled up with zeros
    const float* scale;   // [out], of int8 weights
    const int32_t* sums;  // [out], of int8 weights: the sum over the inputs
    const float* bias;    // [out] or null
    int64_t in;
    int64_t out;
    int32_t weights;      // enum Weights
    float input_scale;    // of int8: 0 = each row has its own
    int32_t input_offset; // of int8 with an input_scale
};

// dtype of activations and caches: 0 float, 1 bfloat16
struct Kernels {
    const char* name;
    int32_t has_bf16_dot;
    int32_t has_int8_dot;
    // 0, or 1 when memory has run out
    int32_t (*linear)(const Linear*, const void* x, int64_t x_stride, void* y, int64_t rows, int32_t dtype);
};
