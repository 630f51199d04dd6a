/* A stand-in for the Ascend driver and runtime, so that torch_npu's own code runs on a machine without either.
 *
 * Kernels compute nothing: libraries.py generates one for each operator, which counts its launches. What an operator
 * means is added above torch's dispatcher (arithmetic.py), which a replayed graph calls for what it has captured.
 * The declarations are those of the headers in the wheel, so the compiler checks the signatures. Whatever torch_npu
 * links to and is not here is generated as a function that returns 0, which is success.
 *
 * Not modelled: time, streams that run beside each other, anything a kernel checks or computes.
 */
#define _GNU_SOURCE
#include <acl/acl.h>

#define UNUSED(x) ((void)(x))

/* Codes of the runtime's own document; the headers have no names for them. */
enum {
    BAD_ARGUMENT = 107000,
    BAD_DEVICE = 107001,
    NO_CONTEXT = 107002,
    NO_MEMORY = 207001,
    WORK_FAILED = 507000,
    TIMED_OUT = 507046,
};

/* `code`, with a reason for aclGetRecentErrMsg. */
aclError refuse(aclError code, const char *why);

/* Calls `run` with `with`, `bytes` long; while the stream captures, each replay does so, with a copy. Code of `run`. */
aclError do_or_note(aclrtStream stream, int (*run)(void *), const void *with, size_t bytes);
