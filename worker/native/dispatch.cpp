// Which of the compiled instruction sets this processor has. Compiled for any processor.
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define DECLARE(isa) namespace isa { extern const Kernels kernels; }
#if defined(__x86_64__)
DECLARE(amx)
DECLARE(avx512bf16)
DECLARE(avx512)
DECLARE(avx2)
#endif
DECLARE(plain)

#if defined(__x86_64__)
// Whether the processor has a matrix unit and the kernel lets this process use it: the tiles make the state that it
// keeps of each thread 8 KiB larger, so it wants to be asked first.
static bool may_use_tiles() {
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    constexpr unsigned int AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24, AMX_INT8 = 1u << 25;
    constexpr unsigned int ALL = AMX_BF16 | AMX_TILE | AMX_INT8;
    unsigned int a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & ALL) != ALL) return false;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#endif

// The index-th best for this processor; null behind the last.
extern "C" __attribute__((visibility("default"))) const Kernels* mindie_kernels(int32_t index) {
    const Kernels* usable[5];
    int32_t count = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512vnni");
    bool narrow = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool has_bf16 = wide && narrow && __builtin_cpu_supports("avx512bf16");
    if (has_bf16 && may_use_tiles()) usable[count++] = &amx::kernels;
    if (has_bf16) usable[count++] = &avx512bf16::kernels;
    if (wide && narrow) usable[count++] = &avx512::kernels;
    if (narrow) usable[count++] = &avx2::kernels;
#endif
    usable[count++] = &plain::kernels;
    return index >= 0 && index < count ? usable[index] : nullptr;
}
