// Products with packed weights, for any number of rows.
//
// A panel of 32 outputs lies together, input by input, and is read from front to back once per tile of rows.
// Each output of each row adds its products up in the order of the inputs in one accumulator of its own: its bits
// depend neither on the other rows nor on the number of threads.
#pragma once

#include <omp.h>

#include "kernels.h"
#include "simd.h"

namespace {

constexpr int PANEL = 32;             // outputs
constexpr int VECTORS = PANEL / LANES;
#if defined(__AVX512F__)
constexpr int TILE = 12;              // rows whose accumulators fit into the registers
#elif defined(__AVX2__)
constexpr int TILE = 3;
#elif defined(__aarch64__)
constexpr int TILE = 3;
#else
constexpr int TILE = 1;
#endif
// inputs to a multiple of which weights are filled up with zeros, as the kernels that read them take steps so long
#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
constexpr int BF16_INPUTS = 32, INT8_INPUTS = 64;
#else
constexpr int BF16_INPUTS = 2, INT8_INPUTS = 4;
#endif
constexpr int64_t BLOCK_BYTES = 384 << 10;  // of prepared rows, which stay in the second-level cache
constexpr int64_t SERIAL = 1 << 17;         // products that one thread does sooner than two
constexpr int64_t SHARED = 1 << 14;         // elements whose preparation is worth sharing
constexpr int64_t AHEAD = 8192;             // bytes that are fetched ahead: 31 of 32 GB/s; with 2048 29

// -- what one step over the inputs does, for each kind of weights ---------------------------------------
// X: prepared row element; per_step: inputs of a step; a row has X_PER_STEP elements in a step.

template <int M> INLINE void add(vf (&sum)[M][VECTORS], const float* x, const vf (&weight)[VECTORS]) {
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
        for (int v = 0; v < VECTORS; v++) sum[m][v] = fma(splat(x[m]), weight[v], sum[m][v]);
}

struct Float {
    typedef float X;
    typedef vf Sum;
    static constexpr int inputs = 1, filled = 1, elements = 1, bytes = 4 * PANEL;

    static INLINE vf value(const Linear*, vf sum, float, int64_t, int64_t) { return sum; }

    template <int M> static INLINE void step(Sum (&sum)[M][VECTORS], const X* x, const char* w) {
        vf weight[VECTORS];
        for (int v = 0; v < VECTORS; v++) weight[v] = load((const float*)w + v * LANES);
        add<M>(sum, x, weight);
    }
};

struct Bf16 {
    typedef float X;
    typedef vf Sum;
    static constexpr int inputs = 2, filled = BF16_INPUTS, elements = 2, bytes = 4 * PANEL;

    static INLINE vf value(const Linear*, vf sum, float, int64_t, int64_t) { return sum; }

    template <int M> static INLINE void step(Sum (&sum)[M][VECTORS], const X* x, const char* w) {
        vf first[VECTORS], second[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
            vu pair = load_as<vu>(w + 4 * v * LANES);
            first[v] = (vf)(pair << 16);
            second[v] = (vf)(pair & 0xffff0000u);
        }
        add<M>(sum, x, first);
        add<M>(sum, x + M, second);
    }
};

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
struct Bf16Dot {
    typedef uint32_t X;
    typedef vf Sum;
    static constexpr int inputs = 2, filled = BF16_INPUTS, elements = 1, bytes = 4 * PANEL;

    static INLINE vf value(const Linear*, vf sum, float, int64_t, int64_t) { return sum; }

    template <int M> static INLINE void step(Sum (&sum)[M][VECTORS], const X* x, const char* w) {
        __m512bh weight[VECTORS];
        for (int v = 0; v < VECTORS; v++) weight[v] = (__m512bh)load_as<vu>(w + 4 * v * LANES);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++)
            for (int v = 0; v < VECTORS; v++)
                sum[m][v] = (vf)_mm512_dpbf16_ps((__m512)sum[m][v], (__m512bh)splat_bits(x[m]), weight[v]);
    }
};
#endif

struct Int8 {
    typedef uint32_t X;
    typedef vi Sum;
    static constexpr int inputs = 4, filled = INT8_INPUTS, elements = 1, bytes = 4 * PANEL;

    static INLINE vf value(const Linear* linear, vi sum, float row_scale, int64_t column, int64_t count) {
        vf whole = __builtin_convertvector(sum + load_some<vi>(linear->correction + column, count), vf);
        return whole * load_some<vf>(linear->scale + column, count) * row_scale;
    }

    template <int M> static INLINE void step(Sum (&sum)[M][VECTORS], const X* x, const char* w) {
        vi weight[VECTORS];
        for (int v = 0; v < VECTORS; v++) weight[v] = load_as<vi>(w + 4 * v * LANES);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++)
            for (int v = 0; v < VECTORS; v++) {
#if defined(__AVX512VNNI__)
                sum[m][v] = (vi)_mm512_dpbusd_epi32((__m512i)sum[m][v], (__m512i)splat_bits(x[m]), (__m512i)weight[v]);
#else
                for (int i = 0; i < 4; i++)
                    sum[m][v] += (int32_t)(x[m] >> 8 * i & 0xff) * (weight[v] << (24 - 8 * i) >> 24);
#endif
            }
    }
};

// -- rows ------------------------------------------------------------------------------------------------

// Tiles of nearly equal numbers of rows.
struct Tiles {
    int64_t count, size, larger;  // the first `larger` ones have a row more

    explicit Tiles(int64_t rows) : count((rows + TILE - 1) / TILE), size(rows / count), larger(rows % count) {}
    int64_t first(int64_t tile) const { return tile * size + (tile < larger ? tile : larger); }
    int rows(int64_t tile) const { return (int)(size + (tile < larger)); }
};

struct Prepared {
    char* rows;     // tile by tile: [steps, elements, rows of the tile]
    float* scales;  // [rows], of int8
    uint8_t* bytes; // [threads, steps, 4], of int8
};

template <class T> INLINE void prepare_row(Float, const T* x, int64_t in, int64_t, float* to, int m, int tile) {
    for (int64_t k = 0; k < in; k++) to[k * tile + m] = to_float(x[k]);
}

template <class T> INLINE void prepare_row(Bf16, const T* x, int64_t in, int64_t steps, float* to, int m, int tile) {
    for (int64_t k = 0; k < in; k++) to[k * tile + m] = to_float(x[k]);
    for (int64_t k = in; k < 2 * steps; k++) to[k * tile + m] = 0;
}

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
INLINE void prepare_row(Bf16Dot, const bf16* x, int64_t in, int64_t, uint32_t* to, int m, int tile) {
    int64_t pairs = in / 2;
    for (int64_t k = 0; k < pairs; k++) memcpy(&to[k * tile + m], x + 2 * k, 4);
    if (in & 1) to[pairs * tile + m] = x[in - 1];
}
#endif

// The largest magnitude of a row as the bits of a float: so an infinity is larger than all numbers, and NaN than that.
template <class T> INLINE uint32_t largest_bits(const T* x, int64_t in) {
    vu largest = {};
    uint32_t parts[LANES], result = 0;
    int64_t k = 0;
    for (; k + LANES <= in; k += LANES) {
        vu bits = (vu)load(x + k) & 0x7fffffffu;
        largest = bits > largest ? bits : largest;
    }
    store_as(parts, largest);
    for (int i = 0; i < LANES; i++) result = parts[i] > result ? parts[i] : result;
    for (; k < in; k++) {
        float value = to_float(x[k]);
        uint32_t bits;
        memcpy(&bits, &value, 4);
        bits &= 0x7fffffffu;
        result = bits > result ? bits : result;
    }
    return result;
}

// The row's scale; `to` gets its whole numbers plus 128, as the instruction takes the left side without a sign.
template <class T> float quantise_row(const Linear* linear, const T* x, uint8_t* to) {
    float scale = linear->input_scale, result = 1;
    if (scale == 0) {
        uint32_t bits = largest_bits(x, linear->in);
        memcpy(&scale, &bits, 4);
        if (bits >= 0x7f800000u) {  // an infinity or a NaN: no number of the row has a meaning
            memset(to, 0, linear->in);
            return __builtin_nanf("");
        }
        scale /= 127.f;
        if (scale < 1.17549435e-38f) scale = 1.17549435e-38f;
        result = scale;
    }
    for (int64_t k = 0; k < linear->in; k += LANES) {
        int64_t count = linear->in - k;
        vf part = {};
        if (count >= LANES)
            part = load(x + k);
        else
            for (int64_t i = 0; i < count; i++) part[i] = to_float(x[k + i]);
        part = part / scale + linear->input_offset;
        part = part > -128.f ? part : splat(-128.f);  // NaN as well
        part = part < 127.f ? part : splat(127.f);
        part += 12582912.f + 128.f;  // rounds to a whole number, in the lowest bits
        store_some(to + k, __builtin_convertvector((vu)part & 0xffu, bytes_of_vu), count);
    }
    return result;
}

template <class W, class T>
INLINE void prepare(const Linear* linear, const T* x, int64_t x_stride, int64_t steps, const Prepared& prepared,
                    const Tiles& tiles, int64_t t) {
    typedef typename W::X X;
    int64_t first = tiles.first(t);
    int size = tiles.rows(t);
    X* to = (X*)prepared.rows + first * steps * W::elements;
    for (int m = 0; m < size; m++) {
        const T* row = x + (first + m) * x_stride;
        if constexpr (__is_same(W, Int8)) {
            uint8_t* whole = prepared.bytes + omp_get_thread_num() * steps * 4;
            memset(whole + steps * 4 - 4, 0, 4);
            prepared.scales[first + m] = quantise_row(linear, row, whole);
            for (int64_t k = 0; k < steps; k++) memcpy(&to[k * size + m], whole + 4 * k, 4);
        } else
            prepare_row(W(), row, linear->in, steps, to, m, size);
    }
}

// -- panels ----------------------------------------------------------------------------------------------

// Rows of results in either dtype.
struct Output {
    char* data;
    int64_t stride;  // bytes
    bool is_bf16;
};

// A row's sums of a panel, as what they stand for.
template <class W>
INLINE void put_results(const Linear* linear, const typename W::Sum (&sums)[VECTORS], float scale, int64_t panel,
                        char* row, bool is_bf16) {
    for (int v = 0; v < VECTORS; v++) {
        int64_t column = panel * PANEL + v * LANES, count = linear->out - column;
        if (count <= 0) break;
        if (count > LANES) count = LANES;
        vf value = W::value(linear, sums[v], scale, column, count);
        if (linear->bias) value += load_some<vf>(linear->bias + column, count);
        if (is_bf16)
            store_some(row + 2 * column, narrow(value), 2 * count);
        else
            store_some(row + 4 * column, value, 4 * count);
    }
}

template <class W, int M>
void multiply(const Linear* linear, const typename W::X* x, const float* scales, int64_t panel, int64_t steps,
              Output y) {
    typename W::Sum sum[M][VECTORS] = {};
    const char* w = (const char*)linear->weight + panel * steps * W::bytes;
    for (int64_t k = 0; k < steps; k++, w += W::bytes, x += M * W::elements) {
        __builtin_prefetch(w + AHEAD);
        __builtin_prefetch(w + AHEAD + 64);
        W::template step<M>(sum, x, w);
    }
    typename W::Sum results[M][VECTORS];  // no registers: rows are finished in a loop
    memcpy(results, sum, sizeof results);
    for (int m = 0; m < M; m++)
        put_results<W>(linear, results[m], scales[m], panel, y.data + m * y.stride, y.is_bf16);
}

template <class W, int M>
INLINE void multiply_tile(int size, const Linear* linear, const typename W::X* x, const float* scales,
                          int64_t panel, int64_t steps, Output y) {
    if (size == M)
        multiply<W, M>(linear, x, scales, panel, steps, y);
    else if constexpr (M > 1)
        multiply_tile<W, M - 1>(size, linear, x, scales, panel, steps, y);
}

template <class W, class T>
int32_t run(const Linear* linear, const T* x, int64_t x_stride, T* y, int64_t rows) {
    int64_t steps = (linear->in + W::filled - 1) / W::filled * (W::filled / W::inputs);
    int64_t panels = (linear->out + PANEL - 1) / PANEL;
    int64_t row_bytes = steps * W::elements * sizeof(typename W::X);
    Tiles tiles(rows);
    int threads = rows * linear->in * linear->out < SERIAL ? 1 : omp_get_max_threads();
    Prepared prepared;
    prepared.rows = scratch<0>(rows * (row_bytes + sizeof(float)) + threads * steps * 4);
    if (!prepared.rows) return 1;
    prepared.scales = (float*)(prepared.rows + rows * row_bytes);
    prepared.bytes = (uint8_t*)(prepared.scales + rows);
    int64_t block = BLOCK_BYTES / (TILE * row_bytes);
    if (block < 1) block = 1;
    int64_t blocks = (tiles.count + block - 1) / block;
    bool together = rows * linear->in >= SHARED;  // else the threads need not wait for each other once more
    if (!together)
        for (int64_t t = 0; t < tiles.count; t++) prepare<W>(linear, x, x_stride, steps, prepared, tiles, t);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        if (together) {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < tiles.count; t++) prepare<W>(linear, x, x_stride, steps, prepared, tiles, t);
        }
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < blocks * panels; i++) {
            int64_t panel = i % panels, begin = i / panels * block;
            int64_t end = begin + block < tiles.count ? begin + block : tiles.count;
            for (int64_t t = begin; t < end; t++) {
                int64_t first = tiles.first(t);
                const typename W::X* own = (const typename W::X*)prepared.rows + first * steps * W::elements;
                Output out = {(char*)(y + first * linear->out), (int64_t)sizeof(T) * linear->out, sizeof(T) == 2};
                multiply_tile<W, TILE>(tiles.rows(t), linear, own, prepared.scales + first, panel, steps, out);
            }
        }
    }
    return 0;
}

}  // namespace

#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
#include "linear_tiles.h"
#endif

namespace {

template <class T>
INLINE int32_t run_int8(const Linear* linear, const T* x, int64_t x_stride, T* y, int64_t rows) {
#if defined(__AMX_INT8__)
    return run_tiles<Int8Tiles>(linear, x, x_stride, y, rows);
#else
    return run<Int8>(linear, x, x_stride, y, rows);
#endif
}

// float weights take float rows, bfloat16 weights bfloat16 rows, int8 weights either
int32_t linear(const Linear* linear, const void* x, int64_t x_stride, void* y, int64_t rows, int32_t dtype) {
    if (rows == 0) return 0;
    switch (linear->weights) {
        case WEIGHTS_F32: return run<Float>(linear, (const float*)x, x_stride, (float*)y, rows);
        case WEIGHTS_S8:
            return dtype ? run_int8(linear, (const bf16*)x, x_stride, (bf16*)y, rows)
                         : run_int8(linear, (const float*)x, x_stride, (float*)y, rows);
#if defined(__AMX_BF16__)
        case WEIGHTS_BF16_DOT: return run_tiles<Bf16Tiles>(linear, (const bf16*)x, x_stride, (bf16*)y, rows);
#elif defined(__AVX512BF16__)
        case WEIGHTS_BF16_DOT: return run<Bf16Dot>(linear, (const bf16*)x, x_stride, (bf16*)y, rows);
#endif
        default: return run<Bf16>(linear, (const bf16*)x, x_stride, (bf16*)y, rows);
    }
}

}  // namespace
