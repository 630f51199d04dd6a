/* Devices and their memory, which is memory of this process; copies are memcpy. runtime.h says what all this is.
 *
 * Environment, read once: NPU_SIM_DEVICES how many there are; NPU_SIM_SOC the name of the chip; NPU_SIM_MEMORY_MIB
 * memory of each, as one process sees it; ASCEND_RT_VISIBLE_DEVICES as the driver reads it.
 */
#include "runtime.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <acl/acl_op_compiler.h>

enum { MAX_DEVICES = 64 };

static __thread char last_error[256];

aclError refuse(aclError code, const char *why) {
    snprintf(last_error, sizeof last_error, "stand-in runtime: %s", why);
    return code;
}

const char *aclGetRecentErrMsg(void) { return last_error; }

/* ---- devices ---------------------------------------------------------------------------------------------------- */

static int num_visible, physical_id[MAX_DEVICES];
static size_t total_memory;
static atomic_size_t used_memory[MAX_DEVICES];
static int contexts[MAX_DEVICES]; /* their addresses are the handles; nonzero: the device has been used */
static pthread_once_t environment_read = PTHREAD_ONCE_INIT;
static __thread int current = -1;

static long number_of(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text && *text ? strtol(text, NULL, 10) : otherwise;
}

/* The driver takes the ids up to the first that is none, and numbers them anew from 0. */
static void read_environment(void) {
    long there = number_of("NPU_SIM_DEVICES", 1);
    const char *visible = getenv("ASCEND_RT_VISIBLE_DEVICES");
    total_memory = (size_t)number_of("NPU_SIM_MEMORY_MIB", 1024) << 20;
    if (there > MAX_DEVICES) there = MAX_DEVICES;
    if (!visible) {
        for (int id = 0; id < there; id++) physical_id[num_visible++] = id;
        return;
    }
    while (*visible && num_visible < MAX_DEVICES) {
        char *end;
        long id = strtol(visible, &end, 10);
        if (end == visible || id < 0 || id >= there) break;
        physical_id[num_visible++] = (int)id;
        visible = *end == ',' ? end + 1 : end;
        if (*end && *end != ',') break;
    }
}

static int visible_devices(void) {
    pthread_once(&environment_read, read_environment);
    return num_visible;
}

static int known(int device) { return device >= 0 && device < visible_devices(); }

aclError aclInit(const char *config) { UNUSED(config); return visible_devices() ? ACL_SUCCESS : BAD_DEVICE; }
aclError aclFinalize(void) { return ACL_SUCCESS; }
const char *aclrtGetSocName(void) { const char *name = getenv("NPU_SIM_SOC"); return name && *name ? name : "Ascend910B1"; }
aclError aclsysGetVersionStr(char *package, char *version) { UNUSED(package); strcpy(version, "8.5.0"); return ACL_SUCCESS; }

aclError aclrtGetDeviceCount(uint32_t *count) { *count = (uint32_t)visible_devices(); return ACL_SUCCESS; }

aclError aclrtSetDevice(int32_t device) {
    if (!known(device)) return refuse(BAD_DEVICE, "there is no such device");
    current = device;
    contexts[device] = 1;
    return ACL_SUCCESS;
}

aclError aclrtGetDevice(int32_t *device) { *device = current; return current < 0 ? NO_CONTEXT : ACL_SUCCESS; }
aclError aclrtResetDevice(int32_t device) { return known(device) ? ACL_SUCCESS : BAD_DEVICE; }

aclError aclrtGetCurrentContext(aclrtContext *context) {
    *context = current < 0 ? NULL : &contexts[current];
    return current < 0 ? NO_CONTEXT : ACL_SUCCESS;
}

aclError aclrtSetCurrentContext(aclrtContext context) {
    int *slot = context;
    if (slot < contexts || slot >= contexts + MAX_DEVICES) return BAD_ARGUMENT;
    current = (int)(slot - contexts);
    return ACL_SUCCESS;
}

aclError aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active) {
    if (!known(device)) return BAD_DEVICE;
    if (flags) *flags = 0;
    *active = contexts[device];
    return ACL_SUCCESS;
}

aclError aclrtGetLogicDevIdByUserDevId(const int32_t user, int32_t *const logic) {
    if (!known(user)) return BAD_DEVICE;
    *logic = physical_id[user];
    return ACL_SUCCESS;
}

aclError aclrtDeviceCanAccessPeer(int32_t *can, int32_t device, int32_t peer) { *can = device != peer; return ACL_SUCCESS; }
aclError aclrtDeviceGetBareTgid(int32_t *pid) { *pid = getpid(); return ACL_SUCCESS; }

aclError aclrtDeviceGetUuid(int32_t device, aclrtUuid *uuid) {
    if (!known(device)) return BAD_DEVICE;
    memset(uuid, 0, sizeof *uuid);
    uuid->bytes[0] = (char)physical_id[device];
    return ACL_SUCCESS;
}

/* Both are asked for numbers of cores, and tell of any other attribute the same. */
aclError aclGetDeviceCapability(uint32_t device, aclDeviceInfo what, int64_t *value) { UNUSED(device); UNUSED(what); *value = 24; return ACL_SUCCESS; }
aclError aclrtGetDeviceInfo(uint32_t device, aclrtDevAttr what, int64_t *value) { UNUSED(device); UNUSED(what); *value = 24; return ACL_SUCCESS; }

/* torch_npu asks for the length first and refuses a length of 0. */
size_t aclGetCompileoptSize(aclCompileOpt option) { UNUSED(option); return sizeof "disable"; }
aclError aclGetCompileopt(aclCompileOpt option, char *value, size_t length) {
    UNUSED(option);
    if (length) snprintf(value, length, "disable");
    return ACL_SUCCESS;
}

/* ---- memory ----------------------------------------------------------------------------------------------------- */

typedef struct { size_t bytes; int device; } Block;

#define HEAD 512 /* alignment that kernels ask for; the block's own description lies in front of what is handed out */
#define NEVER_WRITTEN 0xFF /* NaN in every floating type, -1 in every integer: who reads it shows it */

static int claim(int device, size_t bytes) {
    if (atomic_fetch_add(&used_memory[device], bytes) + bytes <= total_memory) return 1;
    atomic_fetch_sub(&used_memory[device], bytes);
    return 0;
}

aclError aclrtGetMemInfo(aclrtMemAttr attribute, size_t *available, size_t *total) {
    UNUSED(attribute);
    if (current < 0) return NO_CONTEXT;
    *total = total_memory;
    *available = total_memory - atomic_load(&used_memory[current]);
    return ACL_SUCCESS;
}

aclError aclrtMalloc(void **pointer, size_t bytes, aclrtMemMallocPolicy policy) {
    UNUSED(policy);
    if (current < 0) return NO_CONTEXT;
    char *start;
    if (!claim(current, bytes)) return refuse(NO_MEMORY, "the memory of the device is used up");
    if (posix_memalign((void **)&start, HEAD, HEAD + bytes)) {
        atomic_fetch_sub(&used_memory[current], bytes);
        return NO_MEMORY;
    }
    *(Block *)start = (Block){bytes, current};
    memset(start + HEAD, NEVER_WRITTEN, bytes);
    *pointer = start + HEAD;
    return ACL_SUCCESS;
}

aclError aclrtMallocAlign32(void **pointer, size_t bytes, aclrtMemMallocPolicy policy) { return aclrtMalloc(pointer, bytes, policy); }

aclError aclrtFree(void *pointer) {
    if (!pointer) return BAD_ARGUMENT;
    Block *block = (Block *)((char *)pointer - HEAD);
    atomic_fetch_sub(&used_memory[block->device], block->bytes);
    free(block);
    return ACL_SUCCESS;
}

/* Segments that grow (expandable_segments): addresses first, then memory behind parts of them. Both are given back by
 * their addresses alone, so their sizes are kept here. */
typedef struct { size_t bytes; int device; } Physical;
typedef struct Mapping { void *at; size_t bytes; struct Mapping *next; } Mapping;
typedef struct Reservation { void *at; size_t bytes; struct Reservation *next; } Reservation;
static Mapping *mappings;
static Reservation *reservations;
static pthread_mutex_t ranges = PTHREAD_MUTEX_INITIALIZER;

aclError aclrtReserveMemAddress(void **address, size_t bytes, size_t alignment, void *wanted, uint64_t flags) {
    UNUSED(alignment); UNUSED(flags);
    void *at = mmap(wanted, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) return NO_MEMORY;
    Reservation *made = malloc(sizeof *made);
    pthread_mutex_lock(&ranges);
    *made = (Reservation){at, bytes, reservations};
    reservations = made;
    pthread_mutex_unlock(&ranges);
    *address = at;
    return ACL_SUCCESS;
}

aclError aclrtReleaseMemAddress(void *address) {
    aclError code = BAD_ARGUMENT;
    pthread_mutex_lock(&ranges);
    for (Reservation **at = &reservations; *at; at = &(*at)->next) {
        if ((*at)->at != address) continue;
        Reservation *gone = *at;
        *at = gone->next;
        munmap(address, gone->bytes);
        free(gone);
        code = ACL_SUCCESS;
        break;
    }
    pthread_mutex_unlock(&ranges);
    return code;
}

aclError aclrtMallocPhysical(aclrtDrvMemHandle *handle, size_t bytes, const aclrtPhysicalMemProp *wanted, uint64_t flags) {
    UNUSED(flags);
    int device = wanted ? (int)wanted->location.id : current;
    if (!known(device)) return BAD_DEVICE;
    if (!claim(device, bytes)) return refuse(NO_MEMORY, "the memory of the device is used up");
    Physical *made = malloc(sizeof *made);
    *made = (Physical){bytes, device};
    *handle = (aclrtDrvMemHandle)made;
    return ACL_SUCCESS;
}

aclError aclrtFreePhysical(aclrtDrvMemHandle handle) {
    Physical *gone = (Physical *)handle;
    atomic_fetch_sub(&used_memory[gone->device], gone->bytes);
    free(gone);
    return ACL_SUCCESS;
}

aclError aclrtMapMem(void *address, size_t bytes, size_t offset, aclrtDrvMemHandle handle, uint64_t flags) {
    UNUSED(offset); UNUSED(handle); UNUSED(flags);
    if (mprotect(address, bytes, PROT_READ | PROT_WRITE)) return BAD_ARGUMENT;
    memset(address, NEVER_WRITTEN, bytes);
    Mapping *made = malloc(sizeof *made);
    pthread_mutex_lock(&ranges);
    *made = (Mapping){address, bytes, mappings};
    mappings = made;
    pthread_mutex_unlock(&ranges);
    return ACL_SUCCESS;
}

aclError aclrtUnmapMem(void *address) {
    aclError code = BAD_ARGUMENT;
    pthread_mutex_lock(&ranges);
    for (Mapping **at = &mappings; *at; at = &(*at)->next) {
        if ((*at)->at != address) continue;
        Mapping *gone = *at;
        *at = gone->next;
        madvise(address, gone->bytes, MADV_DONTNEED);
        mprotect(address, gone->bytes, PROT_NONE);
        free(gone);
        code = ACL_SUCCESS;
        break;
    }
    pthread_mutex_unlock(&ranges);
    return code;
}

aclError aclrtMallocHost(void **pointer, size_t bytes) { return posix_memalign(pointer, 64, bytes ? bytes : 64) ? NO_MEMORY : ACL_SUCCESS; }
aclError aclrtMallocHostWithCfg(void **pointer, uint64_t bytes, aclrtMallocConfig *config) { UNUSED(config); return aclrtMallocHost(pointer, bytes); }
aclError aclrtFreeHost(void *pointer) { free(pointer); return ACL_SUCCESS; }

/* While an operator's host code runs for whom arithmetic.py computes, copies within the device are its kernels' too:
 * a temporary that no kernel filled must not be copied over what the operator was given. */
static __thread int kernels_are_replaced;
void npu_sim_replace_kernels(int on) { kernels_are_replaced = on; }

aclError aclrtMemcpy(void *to, size_t room, const void *from, size_t bytes, aclrtMemcpyKind kind) {
    if (bytes > room) return refuse(BAD_ARGUMENT, "a copy is larger than its destination");
    if (kind == ACL_MEMCPY_DEVICE_TO_DEVICE && kernels_are_replaced) return ACL_SUCCESS;
    memmove(to, from, bytes);
    return ACL_SUCCESS;
}

aclError aclrtMemset(void *at, size_t room, int32_t value, size_t bytes) {
    if (bytes > room) return refuse(BAD_ARGUMENT, "a fill is larger than its destination");
    memset(at, value, bytes);
    return ACL_SUCCESS;
}
