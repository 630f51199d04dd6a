// The kernels for one instruction set: build.py compiles this file once for each, with -DISA=name.
#include "attention.h"
#include "kernels.h"
#include "linear.h"
#include "rows.h"

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)

namespace ISA {

#if defined(__AVX512BF16__)
constexpr int32_t BF16_DOT = 1;
#else
constexpr int32_t BF16_DOT = 0;
#endif
#if defined(__AVX512VNNI__)
constexpr int32_t INT8_DOT = 1;
#else
constexpr int32_t INT8_DOT = 0;
#endif

extern const Kernels kernels;
const Kernels kernels = {TEXT(ISA), BF16_DOT, INT8_DOT, BF16_INPUTS, INT8_INPUTS, linear, attention, add_rms_norm, silu_mul, rotate};

}  // namespace ISA
