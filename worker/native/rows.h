// What happens to each token between the products; each row by itself.
#pragma once

#include <math.h>
#include <omp.h>

#include "kernels.h"
#include "simd.h"

namespace {

constexpr int64_t SERIAL_ELEMENTS = 1 << 14;  // that one thread does sooner than two

INLINE int threads_for(int64_t elements) { return elements < SERIAL_ELEMENTS ? 1 : omp_get_max_threads(); }

// The elements of a row from `k` on, at most LANES.
template <class T> INLINE vf load_part(const T* from, int64_t count) {
    if (count >= LANES) return load(from);
    vf part = {};
    for (int64_t i = 0; i < count; i++) part[i] = to_float(from[i]);
    return part;
}

template <class T> INLINE void store_part(T* to, vf v, int64_t count) {
    if (count >= LANES) return store(to, v);
    for (int64_t i = 0; i < count; i++) put(to + i, v[i]);
}

template <class T>
void norm_rows(T* x, const T* delta, const T* weight, float eps, int64_t rows, int64_t width, T* out) {
    int threads = threads_for(rows * width);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        T *own = x + row * width, *to = out + row * width;
        vf squares = {};
        for (int64_t k = 0; k < width; k += LANES) {
            vf value = load_part(own + k, width - k);
            if (delta) {
                store_part(own + k, value + load_part(delta + row * width + k, width - k), width - k);
                value = load_part(own + k, width - k);
            }
            squares = fma(value, value, squares);
        }
        float factor = 1.f / sqrtf(sum_of(squares) / (float)width + eps);
        for (int64_t k = 0; k < width; k += LANES) {
            vf value = load_part(own + k, width - k) * factor;
            store_part(to + k, value * load_part(weight + k, width - k), width - k);
        }
    }
}

template <class T> void gate_rows(const T* gate_up, int64_t rows, int64_t width, T* out) {
    int threads = threads_for(rows * width);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t k = 0; k < width; k += LANES) {
            vf gate = load_part(gate_up + 2 * row * width + k, width - k);
            vf up = load_part(gate_up + (2 * row + 1) * width + k, width - k);
            vf below = -gate > 88.f ? splat(88.f) : -gate;
            store_part(out + row * width + k, gate / (exp_of(below) + 1.f) * up, width - k);
        }
}

// Heads of a token lie together; sin has the sign of its half, as apply_rotary of worker/layers/rotary.py wants it.
template <class T>
void rotate_rows(T* heads, int64_t stride, const T* cos, const T* sin, int64_t rows, int64_t count, int64_t dim) {
    int64_t half = dim / 2;
    int threads = threads_for(rows * count * dim);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t head = 0; head < count; head++) {
            T* x = heads + row * stride + head * dim;
            const T *c = cos + row * dim, *s = sin + row * dim;
            for (int64_t d = 0; d < half; d += LANES) {
                int64_t left = half - d;
                vf first = load_part(x + d, left), second = load_part(x + half + d, left);
                vf turned = fma(second, load_part(s + d, left), first * load_part(c + d, left));
                vf other = fma(first, load_part(s + half + d, left), second * load_part(c + half + d, left));
                store_part(x + d, turned, left);
                store_part(x + half + d, other, left);
            }
        }
}

void add_rms_norm(void* x, const void* delta, const void* weight, float eps, int64_t rows, int64_t width,
                  void* out, int32_t dtype) {
    if (dtype)
        norm_rows((bf16*)x, (const bf16*)delta, (const bf16*)weight, eps, rows, width, (bf16*)out);
    else
        norm_rows((float*)x, (const float*)delta, (const float*)weight, eps, rows, width, (float*)out);
}

void silu_mul(const void* gate_up, int64_t rows, int64_t width, void* out, int32_t dtype) {
    if (dtype)
        gate_rows((const bf16*)gate_up, rows, width, (bf16*)out);
    else
        gate_rows((const float*)gate_up, rows, width, (float*)out);
}

void rotate(void* heads, int64_t stride, const void* cos, const void* sin, int64_t rows, int64_t count,
            int64_t dim, int32_t dtype) {
    if (dtype)
        rotate_rows((bf16*)heads, stride, (const bf16*)cos, (const bf16*)sin, rows, count, dim);
    else
        rotate_rows((float*)heads, stride, (const float*)cos, (const float*)sin, rows, count, dim);
}

}  // namespace
