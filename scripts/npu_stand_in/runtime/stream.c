/* Streams, events and graphs. A stream does everything at once, in the order of the calls.
 *
 * A stream that captures notes work instead; a replay goes through the notes, as far as the first event that has yet
 * to be recorded. There the stream is stalled: whoever records the event lets it go on, and who waits for the stream
 * meanwhile is told that it would wait for ever, because there is no other thread that could record it.
 */
#include "runtime.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct Graph Graph;

typedef struct {
    double ms;
    int recorded, external; /* external: waited for in a graph and recorded outside of it */
    Graph *within;          /* the graph into which it was captured last */
} Event;

typedef enum { WORK, WAIT, RESET, RECORD, WAIT_FOR_VALUE, WRITE_VALUE, CALL } Kind;

typedef struct {
    Kind kind;
    Event *event;
    uint64_t work; /* WORK: the number it was given */
    volatile uint64_t *at; /* WAIT_FOR_VALUE, WRITE_VALUE: a word of the device's memory */
    uint64_t value;
    uint32_t comparison;
    int (*run)(void *); /* CALL */
    void *with;
} Node;

struct Graph {
    uint32_t id;
    Node *nodes;
    size_t count, room, next;
};

typedef struct {
    Graph *graph;
    size_t begin, end;
} TaskGroup;

typedef struct {
    int32_t id;
    Graph *capturing;
    TaskGroup *grouping, *updating;
    size_t updated; /* of the group that is updating */
    Graph *stalled;
} Stream;

enum { MAX_STREAMS = 4096 };

static Stream *streams[MAX_STREAMS];
static int next_stream = 1;
static uint32_t next_graph = 1;
static uint64_t next_work = 1;
static int engaged; /* streams that capture or update */
static unsigned long replays;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* ---- for arithmetic.py ------------------------------------------------------------------------------------------ */

enum { RUN = 0, FORGET = 1 };
static int (*worker)(uint64_t work, int what);

/* `chosen` does the work of this number, whenever it is replayed, or hears that it will not be needed again. An
 * answer other than 0 fails the replay. */
void npu_sim_set_worker(int (*chosen)(uint64_t, int)) { worker = chosen; }
unsigned long npu_sim_replays(void) { return replays; }

/* Whether any stream captures or updates: a cheap look before npu_sim_note_work. */
int npu_sim_engaged(void) { return engaged; }

static aclError note(Graph *graph, Node node) {
    if (graph->count == graph->room) {
        size_t room = graph->room ? 2 * graph->room : 64;
        Node *nodes = realloc(graph->nodes, room * sizeof *nodes);
        if (!nodes) return NO_MEMORY;
        graph->nodes = nodes;
        graph->room = room;
    }
    graph->nodes[graph->count++] = node;
    return ACL_SUCCESS;
}

/* What an operator issued on this stream is to it: the number of the work it has become there, to be done by each
 * replay; 0: nothing is captured, do it now; -1: refused, aclGetRecentErrMsg says why. */
int64_t npu_sim_note_work(aclrtStream handle) {
    Stream *stream = handle;
    if (!stream) return 0;
    if (stream->stalled) {
        refuse(TIMED_OUT, "work is issued behind a replay that still waits for an update of its operators");
        return -1;
    }
    if (stream->updating) {
        TaskGroup *group = stream->updating;
        size_t at = group->begin + stream->updated;
        if (at >= group->end) {
            refuse(BAD_ARGUMENT, "an update issues more operators than its task group has captured");
            return -1;
        }
        stream->updated++;
        if (worker) worker(group->graph->nodes[at].work, FORGET);
        return (int64_t)(group->graph->nodes[at].work = next_work++);
    }
    if (stream->capturing) {
        Node node = {.kind = WORK, .work = next_work++};
        return note(stream->capturing, node) ? -1 : (int64_t)node.work;
    }
    return 0;
}

aclError do_or_note(aclrtStream handle, int (*run)(void *), const void *with, size_t bytes) {
    Stream *stream = handle;
    if (stream && stream->stalled) return refuse(TIMED_OUT, "a collective is issued behind a replay that still waits");
    void *copy = malloc(bytes);
    if (!copy) return NO_MEMORY;
    memcpy(copy, with, bytes);
    if (stream && stream->capturing) return note(stream->capturing, (Node){.kind = CALL, .run = run, .with = copy});
    aclError code = run(copy);
    free(copy);
    return code;
}

/* ---- streams ---------------------------------------------------------------------------------------------------- */

aclError aclrtCreateStreamWithConfig(aclrtStream *given, uint32_t priority, uint32_t flags) {
    UNUSED(priority), UNUSED(flags);
    Stream *stream = calloc(1, sizeof *stream);
    pthread_mutex_lock(&lock);
    if (stream && next_stream < MAX_STREAMS) {
        stream->id = next_stream++;
        streams[stream->id] = stream;
    }
    pthread_mutex_unlock(&lock);
    if (!stream || !stream->id) return free(stream), refuse(NO_MEMORY, "too many streams");
    *given = stream;
    return ACL_SUCCESS;
}

aclError aclrtCreateStream(aclrtStream *given) { return aclrtCreateStreamWithConfig(given, 0, 0); }

aclError aclrtDestroyStream(aclrtStream handle) {
    Stream *stream = handle;
    if (!stream) return ACL_SUCCESS;
    pthread_mutex_lock(&lock);
    streams[stream->id] = NULL;
    pthread_mutex_unlock(&lock);
    free(stream);
    return ACL_SUCCESS;
}

aclError aclrtDestroyStreamForce(aclrtStream handle) { return aclrtDestroyStream(handle); }

aclError aclrtStreamGetId(aclrtStream handle, int32_t *id) {
    *id = handle ? ((Stream *)handle)->id : 0;
    return ACL_SUCCESS;
}

aclError aclrtStreamQuery(aclrtStream handle, aclrtStreamStatus *status) {
    int stalled = handle && ((Stream *)handle)->stalled;
    *status = stalled ? ACL_STREAM_STATUS_NOT_READY : ACL_STREAM_STATUS_COMPLETE;
    return ACL_SUCCESS;
}

aclError aclrtSynchronizeStreamWithTimeout(aclrtStream handle, int32_t timeout_ms) {
    UNUSED(timeout_ms);
    Stream *stream = handle;
    if (stream && stream->capturing) return refuse(BAD_ARGUMENT, "a stream cannot be waited for while it captures");
    if (stream && stream->stalled)
        return refuse(TIMED_OUT, "the replayed graph waits for an update of its operators that never came");
    return ACL_SUCCESS;
}

aclError aclrtSynchronizeStream(aclrtStream handle) { return aclrtSynchronizeStreamWithTimeout(handle, -1); }

aclError aclrtSynchronizeDeviceWithTimeout(int32_t timeout_ms) {
    for (int i = 1; i < next_stream; i++) {
        aclError code = aclrtSynchronizeStreamWithTimeout(streams[i], timeout_ms);
        if (code) return code;
    }
    return ACL_SUCCESS;
}

aclError aclrtSynchronizeDevice(void) { return aclrtSynchronizeDeviceWithTimeout(-1); }

/* An operator's own copies are part of its work, which the worker does as a whole. */
aclError aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t bytes, aclrtMemcpyKind kind, aclrtStream handle) {
    Stream *stream = handle;
    if (stream && stream->capturing) return ACL_SUCCESS;
    return aclrtMemcpy(to, room, from, bytes, kind);
}

aclError aclrtMemsetAsync(void *to, size_t room, int32_t value, size_t bytes, aclrtStream handle) {
    Stream *stream = handle;
    if (stream && stream->capturing) return ACL_SUCCESS;
    return aclrtMemset(to, room, value, bytes);
}

aclError aclrtLaunchCallback(aclrtCallback call, void *with, aclrtCallbackBlockType blocking, aclrtStream stream) {
    UNUSED(blocking), UNUSED(stream);
    call(with);
    return ACL_SUCCESS;
}

aclError aclrtLaunchHostFunc(aclrtStream stream, aclrtHostFunc call, void *with) {
    UNUSED(stream);
    call(with);
    return ACL_SUCCESS;
}

/* ---- graphs ----------------------------------------------------------------------------------------------------- */

enum { AT_LEAST, EQUAL, ALL_OF_ITS_BITS, NEITHER_OF_ITS_BITS }; /* comparisons of aclrtValueWait */

static int has_value(const Node *node) {
    uint64_t found = *node->at;
    switch (node->comparison) {
    case EQUAL: return found == node->value;
    case ALL_OF_ITS_BITS: return (found & node->value) != 0;
    case NEITHER_OF_ITS_BITS: return ~(found | node->value) != 0;
    default: return (int64_t)(found - node->value) >= 0;
    }
}

/* Goes on to the end of the stream's replay, or to an event that is not there yet. */
static aclError advance(Stream *stream) {
    Graph *graph = stream->stalled;
    for (; graph->next < graph->count; graph->next++) {
        Node *node = &graph->nodes[graph->next];
        if (node->kind == WAIT && !node->event->recorded) return ACL_SUCCESS;
        if (node->kind == WAIT_FOR_VALUE && !has_value(node)) return ACL_SUCCESS;
        if (node->kind == WRITE_VALUE) *node->at = node->value;
        if (node->kind == RESET) node->event->recorded = 0;
        if (node->kind == RECORD) node->event->recorded = 1;
        if (node->kind == CALL && node->run(node->with)) {
            stream->stalled = NULL;
            return refuse(WORK_FAILED, "a collective of a replayed graph failed");
        }
        if (node->kind == WORK && worker && worker(node->work, RUN)) {
            stream->stalled = NULL;
            return refuse(WORK_FAILED, "work of a replayed graph failed");
        }
    }
    stream->stalled = NULL;
    return ACL_SUCCESS;
}

aclError aclmdlRICaptureBegin(aclrtStream handle, aclmdlRICaptureMode mode) {
    UNUSED(mode);
    Stream *stream = handle;
    if (!stream || stream->capturing) return refuse(BAD_ARGUMENT, "this stream cannot begin a capture");
    Graph *graph = calloc(1, sizeof *graph);
    if (!graph) return NO_MEMORY;
    graph->id = next_graph++;
    stream->capturing = graph;
    engaged++;
    return ACL_SUCCESS;
}

aclError aclmdlRICaptureEnd(aclrtStream handle, aclmdlRI *graph) {
    Stream *stream = handle;
    if (!stream || !stream->capturing) return refuse(BAD_ARGUMENT, "no capture has begun on this stream");
    *graph = stream->capturing;
    for (int i = 1; i < next_stream; i++)
        if (streams[i] && streams[i]->capturing == *graph) streams[i]->capturing = NULL;
    engaged--;
    return ACL_SUCCESS;
}

aclError aclmdlRICaptureGetInfo(aclrtStream handle, aclmdlRICaptureStatus *status, aclmdlRI *graph) {
    Graph *capturing = handle ? ((Stream *)handle)->capturing : NULL;
    *status = capturing ? ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE : ACL_MODEL_RI_CAPTURE_STATUS_NONE;
    if (graph) *graph = capturing;
    return ACL_SUCCESS;
}

aclError aclmdlRICaptureThreadExchangeMode(aclmdlRICaptureMode *mode) {
    UNUSED(mode);
    return ACL_SUCCESS;
}

aclError aclmdlRIExecuteAsync(aclmdlRI handle, aclrtStream on) {
    Graph *graph = handle;
    Stream *stream = on;
    if (!graph || !stream || stream->capturing) return refuse(BAD_ARGUMENT, "a graph cannot be replayed here");
    if (stream->stalled) return refuse(TIMED_OUT, "a graph is replayed behind one that still waits for its update");
    replays++;
    graph->next = 0;
    stream->stalled = graph;
    return advance(stream);
}

aclError aclmdlRIDestroy(aclmdlRI handle) {
    Graph *graph = handle;
    if (!graph) return ACL_SUCCESS;
    for (int i = 1; i < next_stream; i++)
        if (streams[i] && streams[i]->stalled == graph) streams[i]->stalled = NULL;
    for (size_t i = 0; i < graph->count; i++) {
        if (graph->nodes[i].kind == WORK && worker) worker(graph->nodes[i].work, FORGET);
        free(graph->nodes[i].with);
    }
    free(graph->nodes);
    free(graph);
    return ACL_SUCCESS;
}

aclError aclmdlRIGetId(aclmdlRI graph, uint32_t *id) {
    *id = ((Graph *)graph)->id;
    return ACL_SUCCESS;
}

/* Task groups live as long as the process: who holds their handles never gives them back. */
aclError aclmdlRICaptureTaskGrpBegin(aclrtStream handle) {
    Stream *stream = handle;
    if (!stream || !stream->capturing || stream->grouping)
        return refuse(BAD_ARGUMENT, "a task group cannot begin here");
    TaskGroup *group = calloc(1, sizeof *group);
    if (!group) return NO_MEMORY;
    group->graph = stream->capturing;
    group->begin = group->graph->count;
    stream->grouping = group;
    return ACL_SUCCESS;
}

aclError aclmdlRICaptureTaskGrpEnd(aclrtStream handle, aclrtTaskGrp *given) {
    Stream *stream = handle;
    if (!stream || !stream->grouping) return refuse(BAD_ARGUMENT, "no task group has begun on this stream");
    stream->grouping->end = stream->grouping->graph->count;
    *given = stream->grouping;
    stream->grouping = NULL;
    return ACL_SUCCESS;
}

aclError aclmdlRICaptureTaskUpdateBegin(aclrtStream handle, aclrtTaskGrp group) {
    Stream *stream = handle;
    if (!stream || !group || stream->updating || stream->capturing)
        return refuse(BAD_ARGUMENT, "an update cannot begin here");
    stream->updating = group;
    stream->updated = 0;
    engaged++;
    return ACL_SUCCESS;
}

aclError aclmdlRICaptureTaskUpdateEnd(aclrtStream handle) {
    Stream *stream = handle;
    if (!stream || !stream->updating) return refuse(BAD_ARGUMENT, "no update has begun on this stream");
    stream->updating = NULL;
    engaged--;
    return ACL_SUCCESS;
}

/* ---- events ----------------------------------------------------------------------------------------------------- */

aclError aclrtCreateEventExWithFlag(aclrtEvent *given, uint32_t flags) {
    Event *event = calloc(1, sizeof *event);
    if (!event) return NO_MEMORY;
    event->external = (flags & ACL_EVENT_EXTERNAL) != 0;
    *given = event;
    return ACL_SUCCESS;
}

aclError aclrtCreateEventWithFlag(aclrtEvent *given, uint32_t flags) { return aclrtCreateEventExWithFlag(given, flags); }

/* A graph refers to the events it has captured, which may be destroyed before it: they stay. */
aclError aclrtDestroyEvent(aclrtEvent handle) {
    Event *event = handle;
    if (event && !event->within) free(event);
    return ACL_SUCCESS;
}

static aclError note_event(Graph *graph, Kind kind, Event *event) {
    event->within = graph;
    return note(graph, (Node){.kind = kind, .event = event});
}

/* Whoever has waited for what has just happened goes on. */
static aclError wake(void) {
    for (int i = 1; i < next_stream; i++) {
        aclError code = streams[i] && streams[i]->stalled ? advance(streams[i]) : ACL_SUCCESS;
        if (code) return code;
    }
    return ACL_SUCCESS;
}

aclError aclrtRecordEvent(aclrtEvent handle, aclrtStream on) {
    Event *event = handle;
    Stream *stream = on;
    if (stream && stream->capturing) return note_event(stream->capturing, RECORD, event);
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    event->ms = (double)now.tv_sec * 1e3 + (double)now.tv_nsec * 1e-6;
    event->recorded = 1;
    return wake();
}

static int is_captured_now(const Graph *graph) {
    for (int i = 1; i < next_stream; i++)
        if (graph && streams[i] && streams[i]->capturing == graph) return 1;
    return 0;
}

/* A stream that waits for what a graph captures takes part in the capture from then on. As notes are made in the
 * order of calls, only an event from outside has to be waited for again. */
aclError aclrtStreamWaitEvent(aclrtStream on, aclrtEvent handle) {
    Event *event = handle;
    Stream *stream = on;
    if (stream && stream->capturing && event->external) return note_event(stream->capturing, WAIT, event);
    if (stream && !stream->capturing && is_captured_now(event->within)) stream->capturing = event->within;
    return ACL_SUCCESS;
}

aclError aclrtResetEvent(aclrtEvent handle, aclrtStream on) {
    Event *event = handle;
    Stream *stream = on;
    if (stream && stream->capturing) return note_event(stream->capturing, RESET, event);
    event->recorded = 0;
    return ACL_SUCCESS;
}

/* torch_npu makes its external events of words of memory: waiting for 1, and writing 0 as soon as that is there. */
aclError aclrtValueWrite(void *at, uint64_t value, uint32_t flag, aclrtStream on) {
    UNUSED(flag);
    Stream *stream = on;
    if (stream && stream->capturing)
        return note(stream->capturing, (Node){.kind = WRITE_VALUE, .at = at, .value = value});
    *(volatile uint64_t *)at = value;
    return wake();
}

aclError aclrtValueWait(void *at, uint64_t value, uint32_t comparison, aclrtStream on) {
    Stream *stream = on;
    Node node = {.kind = WAIT_FOR_VALUE, .at = at, .value = value, .comparison = comparison};
    if (stream && stream->capturing) return note(stream->capturing, node);
    return has_value(&node) ? ACL_SUCCESS : refuse(TIMED_OUT, "a stream waits for a value that nobody writes");
}

aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus *status) {
    *status = ((Event *)event)->recorded ? ACL_EVENT_RECORDED_STATUS_COMPLETE : ACL_EVENT_RECORDED_STATUS_NOT_READY;
    return ACL_SUCCESS;
}

aclError aclrtQueryEventWaitStatus(aclrtEvent event, aclrtEventWaitStatus *status) {
    UNUSED(event);
    *status = ACL_EVENT_WAIT_STATUS_COMPLETE;
    return ACL_SUCCESS;
}

aclError aclrtSynchronizeEvent(aclrtEvent event) {
    UNUSED(event);
    return ACL_SUCCESS;
}

aclError aclrtEventElapsedTime(float *ms, aclrtEvent from, aclrtEvent to) {
    *ms = (float)(((Event *)to)->ms - ((Event *)from)->ms);
    return ACL_SUCCESS;
}
