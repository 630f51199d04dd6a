/* Collectives of HCCL between processes, through shared memory.
 *
 * A communicator is a file in /dev/shm that rank 0 makes and whose name is the root information; it has a slot for
 * each rank and a barrier. All ranks put a piece of their operand into their slots, meet, read what they need of the
 * others', and meet again. Sums are taken in the order of ranks and rounded once, so every rank has the same bits.
 * The file loses its name as soon as everybody has opened it. hccl_missing.c has
 * those that are refused.
 */
#include "runtime.h"

#include <fcntl.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { SLOT = 1 << 18, MAX_RANKS = 64 };

/* What of HCCL's interface is used here: its header is C++. */
typedef enum {
    HCCL_SUCCESS = 0,
    HCCL_E_PARA = 1,
    HCCL_E_PTR = 2,
    HCCL_E_MEMORY = 3,
    HCCL_E_NOT_FOUND = 6,
    HCCL_E_SYSCALL = 8,
    HCCL_E_TIMEOUT = 9,
    HCCL_E_RUNTIME = 15,
    HCCL_E_RESERVED = 25,
} HcclResult;
typedef enum { HCCL_REDUCE_SUM, HCCL_REDUCE_PROD, HCCL_REDUCE_MAX, HCCL_REDUCE_MIN } HcclReduceOp;
typedef enum {
    HCCL_DATA_TYPE_INT8 = 0,
    HCCL_DATA_TYPE_INT16 = 1,
    HCCL_DATA_TYPE_INT32 = 2,
    HCCL_DATA_TYPE_FP16 = 3,
    HCCL_DATA_TYPE_FP32 = 4,
    HCCL_DATA_TYPE_INT64 = 5,
    HCCL_DATA_TYPE_UINT8 = 7,
    HCCL_DATA_TYPE_FP64 = 10,
    HCCL_DATA_TYPE_BFP16 = 11,
} HcclDataType;
typedef struct { char internal[4108]; } HcclRootInfo;
typedef void *HcclComm;
enum { COMM_NAME_MAX_LENGTH = 128 };

typedef struct {
    atomic_uint opened, arrived, round;
    char slots[];
} Shared;

typedef struct {
    Shared *shared;
    size_t bytes;
    uint32_t rank, size;
    char name[64];
} Comm;

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

/* As HCCL has it: how long a collective waits for the others. */
static double time_limit(void) {
    const char *text = getenv("HCCL_EXEC_TIMEOUT");
    return text && *text ? strtod(text, NULL) : 1836;
}

static void pause_after(int turns) {
    struct timespec moment = {0, 50000};
    if (turns < 200) sched_yield();
    else nanosleep(&moment, NULL);
}

static HcclResult meet(Comm *comm) {
    Shared *shared = comm->shared;
    unsigned round = atomic_load(&shared->round);
    double until = seconds() + time_limit();
    if (atomic_fetch_add(&shared->arrived, 1) + 1 == comm->size) {
        atomic_store(&shared->arrived, 0);
        atomic_fetch_add(&shared->round, 1);
        return HCCL_SUCCESS;
    }
    for (int turns = 0; atomic_load(&shared->round) == round; turns++) {
        pause_after(turns);
        if (turns % 1000 == 999 && seconds() > until) return HCCL_E_TIMEOUT;
    }
    return HCCL_SUCCESS;
}

/* ---- communicators ---------------------------------------------------------------------------------------------- */

static size_t bytes_for(uint32_t ranks) { return sizeof(Shared) + (size_t)ranks * SLOT; }

HcclResult HcclGetRootInfo(HcclRootInfo *root) {
    static atomic_uint count;
    memset(root, 0, sizeof *root);
    snprintf(root->internal, 64, "/npu_sim_%d_%u", (int)getpid(), atomic_fetch_add(&count, 1));
    shm_unlink(root->internal);
    int file = shm_open(root->internal, O_CREAT | O_EXCL | O_RDWR, 0600);
    if (file < 0) return HCCL_E_SYSCALL;
    int code = ftruncate(file, (off_t)bytes_for(MAX_RANKS)); /* holes: pages come with their ranks */
    close(file);
    return code ? HCCL_E_MEMORY : HCCL_SUCCESS;
}

HcclResult HcclCommInitRootInfo(uint32_t ranks, const HcclRootInfo *root, uint32_t rank, HcclComm *given) {
    if (ranks > MAX_RANKS || rank >= ranks) return HCCL_E_PARA;
    int file = shm_open(root->internal, O_RDWR, 0);
    if (file < 0) return HCCL_E_NOT_FOUND;
    Comm *comm = calloc(1, sizeof *comm);
    comm->bytes = bytes_for(ranks);
    comm->shared = mmap(NULL, comm->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (comm->shared == MAP_FAILED) return free(comm), HCCL_E_MEMORY;
    comm->rank = rank;
    comm->size = ranks;
    snprintf(comm->name, sizeof comm->name, "%.63s", root->internal);
    if (atomic_fetch_add(&comm->shared->opened, 1) + 1 == ranks) shm_unlink(root->internal);
    *given = comm;
    return HCCL_SUCCESS;
}

HcclResult HcclCommInitRootInfoConfig(
    uint32_t ranks, const HcclRootInfo *root, uint32_t rank, const void *config, HcclComm *given
) {
    UNUSED(config);
    return HcclCommInitRootInfo(ranks, root, rank, given);
}

HcclResult HcclCommDestroy(HcclComm handle) {
    Comm *comm = handle;
    if (!comm) return HCCL_E_PTR;
    munmap(comm->shared, comm->bytes);
    free(comm);
    return HCCL_SUCCESS;
}

HcclResult HcclGetCommName(HcclComm comm, char *name) {
    snprintf(name, COMM_NAME_MAX_LENGTH, "%s", ((Comm *)comm)->name);
    return HCCL_SUCCESS;
}

HcclResult HcclGetRankSize(HcclComm comm, uint32_t *size) {
    *size = ((Comm *)comm)->size;
    return HCCL_SUCCESS;
}

HcclResult HcclGetRankId(HcclComm comm, uint32_t *rank) {
    *rank = ((Comm *)comm)->rank;
    return HCCL_SUCCESS;
}

HcclResult HcclGetCommAsyncError(HcclComm comm, HcclResult *error) {
    UNUSED(comm);
    *error = HCCL_SUCCESS;
    return HCCL_SUCCESS;
}

/* ---- numbers ---------------------------------------------------------------------------------------------------- */

static size_t width_of(HcclDataType type) {
    switch (type) {
    case HCCL_DATA_TYPE_INT8: case HCCL_DATA_TYPE_UINT8: return 1;
    case HCCL_DATA_TYPE_INT16: case HCCL_DATA_TYPE_FP16: case HCCL_DATA_TYPE_BFP16: return 2;
    case HCCL_DATA_TYPE_INT32: case HCCL_DATA_TYPE_FP32: return 4;
    case HCCL_DATA_TYPE_INT64: case HCCL_DATA_TYPE_FP64: return 8;
    default: return 0;
    }
}

static float of_bfloat16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

static uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value) return 0x7FC0;
    return (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16); /* halves to even */
}

#define COMBINED(a, b) \
    (op == HCCL_REDUCE_SUM ? (a) + (b) : op == HCCL_REDUCE_PROD ? (a) * (b) : op == HCCL_REDUCE_MAX ? ((a) > (b) ? (a) : (b)) : ((a) < (b) ? (a) : (b)))

#define REDUCE(stored, wide, load, store) \
    for (size_t i = 0; i < count; i++) { \
        wide total = load(((const stored *)(slots + from))[i]); \
        for (uint32_t rank = 1; rank < ranks; rank++) { \
            wide next = load(((const stored *)(slots + (size_t)rank * SLOT + from))[i]); \
            total = COMBINED(total, next); \
        } \
        ((stored *)to)[i] = (stored)store(total); \
    }

/* `count` numbers that lie `from` bytes into each slot become one in `to`. */
static void reduce(void *to, const char *slots, size_t from, size_t count, uint32_t ranks, HcclDataType type, HcclReduceOp op) {
    switch (type) {
    case HCCL_DATA_TYPE_FP32: REDUCE(float, float, , ) break;
    case HCCL_DATA_TYPE_FP64: REDUCE(double, double, , ) break;
    case HCCL_DATA_TYPE_FP16: REDUCE(_Float16, float, , ) break;
    case HCCL_DATA_TYPE_BFP16: REDUCE(uint16_t, float, of_bfloat16, to_bfloat16) break;
    case HCCL_DATA_TYPE_INT64: REDUCE(int64_t, int64_t, , ) break;
    case HCCL_DATA_TYPE_INT32: REDUCE(int32_t, int32_t, , ) break;
    case HCCL_DATA_TYPE_INT16: REDUCE(int16_t, int16_t, , ) break;
    case HCCL_DATA_TYPE_UINT8: REDUCE(uint8_t, uint8_t, , ) break;
    default: REDUCE(int8_t, int8_t, , ) break;
    }
}

/* ---- collectives ------------------------------------------------------------------------------------------------ */

typedef enum { ALL_REDUCE, REDUCE_TO_ROOT, REDUCE_SCATTER, ALL_GATHER, BROADCAST } Kind;

typedef struct {
    Kind kind;
    Comm *comm;
    const char *send;
    char *receive;
    uint64_t count; /* of numbers in what each rank sends */
    HcclDataType type;
    HcclReduceOp op;
    uint32_t root;
} Call;

/* What this rank takes out of the slots, which hold `bytes` from `at` on of what each sends. */
static void take(const Call *call, size_t at, size_t bytes, size_t width) {
    const Comm *comm = call->comm;
    const char *slots = comm->shared->slots;
    size_t mine = call->count / comm->size * width, begin = mine * comm->rank, end = begin + mine;
    switch (call->kind) {
    case REDUCE_TO_ROOT:
        if (comm->rank != call->root) break; /* fall through */
    case ALL_REDUCE:
        reduce(call->receive + at, slots, 0, bytes / width, comm->size, call->type, call->op);
        break;
    case REDUCE_SCATTER:
        begin = begin > at ? begin : at;
        end = end < at + bytes ? end : at + bytes;
        if (begin < end)
            reduce(call->receive + begin - mine * comm->rank, slots, begin - at, (end - begin) / width, comm->size, call->type, call->op);
        break;
    case ALL_GATHER:
        for (uint32_t rank = 0; rank < comm->size; rank++)
            memcpy(call->receive + rank * call->count * width + at, slots + (size_t)rank * SLOT, bytes);
        break;
    case BROADCAST:
        memcpy(call->receive + at, slots + (size_t)call->root * SLOT, bytes);
        break;
    }
}

static int run(void *with) {
    const Call *call = with;
    Comm *comm = call->comm;
    size_t width = width_of(call->type), whole = call->count * width;
    for (size_t at = 0; at < whole; at += SLOT) {
        size_t bytes = whole - at < SLOT ? whole - at : SLOT;
        memcpy(comm->shared->slots + (size_t)comm->rank * SLOT, call->send + at, bytes);
        HcclResult code = meet(comm);
        if (code) return (int)code;
        take(call, at, bytes, width);
        if ((code = meet(comm))) return (int)code;
    }
    return HCCL_SUCCESS;
}

static HcclResult issue(Call call, aclrtStream stream) {
    if (!call.comm || !width_of(call.type) || call.op > HCCL_REDUCE_MIN) return HCCL_E_PARA;
    aclError code = do_or_note(stream, run, &call, sizeof call);
    return code == ACL_SUCCESS ? HCCL_SUCCESS : code < (aclError)HCCL_E_RESERVED ? (HcclResult)code : HCCL_E_RUNTIME;
}

HcclResult HcclAllReduce(void *send, void *receive, uint64_t count, HcclDataType type, HcclReduceOp op, HcclComm comm, aclrtStream stream) {
    return issue((Call){ALL_REDUCE, comm, send, receive, count, type, op, 0}, stream);
}

HcclResult HcclReduce(void *send, void *receive, uint64_t count, HcclDataType type, HcclReduceOp op, uint32_t root, HcclComm comm, aclrtStream stream) {
    return issue((Call){REDUCE_TO_ROOT, comm, send, receive, count, type, op, root}, stream);
}

HcclResult HcclReduceScatter(void *send, void *receive, uint64_t count, HcclDataType type, HcclReduceOp op, HcclComm comm, aclrtStream stream) {
    return issue((Call){REDUCE_SCATTER, comm, send, receive, count * (comm ? ((Comm *)comm)->size : 0), type, op, 0}, stream);
}

HcclResult HcclAllGather(void *send, void *receive, uint64_t count, HcclDataType type, HcclComm comm, aclrtStream stream) {
    return issue((Call){ALL_GATHER, comm, send, receive, count, type, HCCL_REDUCE_SUM, 0}, stream);
}

HcclResult HcclBroadcast(void *buffer, uint64_t count, HcclDataType type, uint32_t root, HcclComm comm, aclrtStream stream) {
    return issue((Call){BROADCAST, comm, buffer, buffer, count, type, HCCL_REDUCE_SUM, root}, stream);
}

HcclResult HcclBarrier(HcclComm comm, aclrtStream stream) {
    UNUSED(stream);
    return meet(comm);
}
