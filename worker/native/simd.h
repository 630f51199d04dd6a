// Vectors of the widest kind that this translation unit is compiled for, and the few operations that compilers
// do not find by themselves. Everything here is internal to a unit: units differ in their instruction sets.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t half_vu __attribute__((vector_size(2 * LANES)));
typedef uint8_t bytes_of_vu __attribute__((vector_size(LANES)));

#define INLINE inline __attribute__((always_inline))

template <class V> INLINE V load_as(const void* from) {
    V v;
    memcpy(&v, from, sizeof v);
    return v;
}

template <class V> INLINE void store_as(void* to, V v) { memcpy(to, &v, sizeof v); }

// the first `count` elements, of at most LANES; the others are zero
template <class V, class T> INLINE V load_some(const T* from, int64_t count) {
    V v = {};
    if (count >= LANES) return load_as<V>(from);
    memcpy(&v, from, count * sizeof(T));
    return v;
}

template <class V> INLINE void store_some(void* to, V v, int64_t bytes) {
    if (bytes >= (int64_t)sizeof v) return store_as(to, v);
    memcpy(to, &v, bytes);
}

INLINE vf splat(float x) { return x - vf{}; }
INLINE vu splat_bits(uint32_t x) { return x - vu{}; }
// b where they cannot be compared
INLINE vf max_of(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return a > b ? a : b;
#endif
}

// a * b + c, rounded once where the processor can
INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

// The upper half of the first 2 * `width` elements in their lower half; the others are of no interest.
template <int WIDTH> INLINE vf upper_half(vf v) {
    vi chosen;
    for (int i = 0; i < LANES; i++) chosen[i] = i < WIDTH ? WIDTH + i : i;
    return __builtin_shuffle(v, chosen);
}

template <int WIDTH = LANES / 2> INLINE float sum_of(vf v) {
    v += upper_half<WIDTH>(v);
    if constexpr (WIDTH == 1) return v[0];
    else return sum_of<WIDTH / 2>(v);
}

template <int WIDTH = LANES / 2> INLINE float max_in(vf v) {
    v = max_of(v, upper_half<WIDTH>(v));
    if constexpr (WIDTH == 1) return v[0];
    else return max_in<WIDTH / 2>(v);
}

// -- bfloat16, which is the upper half of a float --------------------------------------------------------

typedef uint16_t bf16;

// compilers take the conversions to pieces
INLINE vu wide_bits(half_vu v) {
#if defined(__AVX512F__)
    return (vu)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(__AVX2__)
    return (vu)_mm256_cvtepu16_epi32((__m128i)v);
#else
    return __builtin_convertvector(v, vu);
#endif
}

INLINE half_vu low_halves(vu v) {
#if defined(__AVX512F__)
    return (half_vu)_mm512_cvtepi32_epi16((__m512i)v);
#else
    return __builtin_convertvector(v, half_vu);
#endif
}

INLINE vf widen(half_vu v) { return (vf)(wide_bits(v) << 16); }

// to the nearest, ties to even; NaN stays NaN
INLINE half_vu narrow(vf v) {
#if defined(__AVX512BF16__)
    return (half_vu)_mm512_cvtneps_pbh((__m512)v);
#else
    vu bits = (vu)v;
    vu rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return low_halves(v == v ? rounded : (bits >> 16 | 0x40));
#endif
}

INLINE vf load(const float* from) { return load_as<vf>(from); }
INLINE vf load(const bf16* from) { return widen(load_as<half_vu>(from)); }
INLINE void store(float* to, vf v) { store_as(to, v); }
INLINE void store(bf16* to, vf v) { store_as(to, narrow(v)); }

INLINE float to_float(float x) { return x; }
INLINE float to_float(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
INLINE void put(float* to, float x) { *to = x; }
INLINE void put(bf16* to, float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    *to = (bf16)(x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : (bits >> 16 | 0x40));
}

// -- functions -------------------------------------------------------------------------------------------

// e^x for x <= 88: 2^n times a polynomial on [-ln2 / 2, ln2 / 2], relative error 2e-7; below -87 it is 0
INLINE vf exp_of(vf x) {
    vf clamped = x < -87.f ? splat(-87.f) : x;
    vf n = clamped * 1.44269504f + 12582912.f;  // the addition rounds to an integer in the lowest bits
    vi exponent = (vi)n << 23;
    n -= 12582912.f;
    vf r = fma(n, splat(-0.693145752f), clamped);
    r = fma(n, splat(-1.42860677e-6f), r);
    vf p = fma(splat(1.98756915e-4f), r, splat(1.39819995e-3f));
    p = fma(p, r, splat(8.33345191e-3f));
    p = fma(p, r, splat(4.16657959e-2f));
    p = fma(p, r, splat(1.66666655e-1f));
    p = fma(p, r, splat(5.00000012e-1f));
    p = fma(p, r * r, r + 1.f);
    vf result = (vf)((vi)p + exponent);
    return x < -87.f ? vf{} : x == x ? result : x;
}

INLINE float exp_of(float x) { return exp_of(splat(x))[0]; }

// Which elements of two rows make up the new two when blocks of `width` elements change places.
struct Exchange {
    int32_t low[LANES], high[LANES];

    constexpr explicit Exchange(int width) : low(), high() {
        for (int i = 0; i < LANES; i++) {
            low[i] = i & width ? LANES + i - width : i;
            high[i] = i & width ? LANES + i : i + width;
        }
    }
};

template <int WIDTH> INLINE void exchange(vf (&rows)[LANES]) {
    static constexpr Exchange chosen(WIDTH);
    vi low = load_as<vi>(chosen.low), high = load_as<vi>(chosen.high);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
        if (i & WIDTH) continue;
        vf first = rows[i], second = rows[i + WIDTH];
        rows[i] = __builtin_shuffle(first, second, low);
        rows[i + WIDTH] = __builtin_shuffle(first, second, high);
    }
}

// rows become columns
INLINE void transpose(vf (&rows)[LANES]) {
    exchange<1>(rows);
    exchange<2>(rows);
    if constexpr (LANES > 4) exchange<4>(rows);
    if constexpr (LANES > 8) exchange<8>(rows);
}

// -- memory ----------------------------------------------------------------------------------------------

// Memory of the calling thread that lives on, as fresh buffers are page-faulted in; null when there is none.
// A call takes what the one before has given.
template <int USE> char* scratch(size_t bytes) {
    static thread_local char* buffer = nullptr;
    static thread_local size_t size = 0;
    if (bytes > size) {
        free(buffer);
        size = (bytes + bytes / 4 + 4095) & ~(size_t)4095;
        buffer = (char*)aligned_alloc(4096, size);
        if (!buffer) size = 0;
    }
    return buffer;
}

}  // namespace
