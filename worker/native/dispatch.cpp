// Which of the compiled instruction sets this processor has. Compiled for any processor.
#include "kernels.h"

#define DECLARE(isa) namespace isa { extern const Kernels kernels; }
#if defined(__x86_64__)
DECLARE(avx512bf16)
DECLARE(avx512)
DECLARE(avx2)
#endif
DECLARE(plain)

// The index-th best for this processor; null behind the last.
extern "C" __attribute__((visibility("default"))) const Kernels* mindie_kernels(int32_t index) {
    const Kernels* usable[4];
    int32_t count = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512vnni");
    bool narrow = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (wide && narrow && __builtin_cpu_supports("avx512bf16")) usable[count++] = &avx512bf16::kernels;
    if (wide && narrow) usable[count++] = &avx512::kernels;
    if (narrow) usable[count++] = &avx2::kernels;
#endif
    usable[count++] = &plain::kernels;
    return index >= 0 && index < count ? usable[index] : nullptr;
}
