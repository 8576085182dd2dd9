/* A library with NCCL's interface for tests: ranks are threads or processes that meet in a folder, memory is the host's.
 *
 * An operation is a file per rank; whoever has the files of all ranks has the result. Every call that NCCL makes without
 * blocking is a thread here, so that "in progress" is real. Ranks whose operations do not match are not told so: they
 * get sums of what is not the same, the worst that could happen.
 *
 * FAKE_FOLDER           where they meet (required)
 * FAKE_VERSION          what ncclGetVersion says
 * FAKE_WITHOUT_ABORT    the library lacks ncclCommAbort
 * FAKE_INIT_REFUSED     joining fails at once
 * FAKE_INIT_STUCK       joining never ends
 * FAKE_ERROR_AFTER=N    the N-th operation (from 0) fails in its course
 * FAKE_STUCK_AFTER=N    the N-th operation never ends
 * FAKE_SILENT           others are not told of an abort
 * FAKE_ABORT_STUCK      an abort does not return for a long time
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifndef FAKE_VERSION
#define FAKE_VERSION 22703
#endif
#ifndef FAKE_ERROR_AFTER
#define FAKE_ERROR_AFTER -1
#endif
#ifndef FAKE_STUCK_AFTER
#define FAKE_STUCK_AFTER -1
#endif

enum { SUCCESS = 0, SYSTEM_ERROR = 2, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, REMOTE_ERROR = 6, IN_PROGRESS = 7 };
enum { ALL_REDUCE, REDUCE_SCATTER, BROADCAST };

typedef struct { char internal[128]; } Id;
typedef struct { size_t size; unsigned magic, version; int blocking; } Config;

typedef struct {
    char folder[128];
    int rank, size, operation;
    atomic_int state, ended;
    pthread_t thread;
    int threaded;
    /* The operation under way. */
    int kind, root;
    const int64_t *from;
    int64_t *to;
    size_t count;
} Comm;

static void name(char *out, const Comm *comm, const char *what, int operation, int rank) {
    snprintf(out, 256, "%s/%s-%d-%d", comm->folder, what, operation, rank);
}

static int is_there(const Comm *comm, const char *what, int operation, int rank) {
    char path[256];
    name(path, comm, what, operation, rank);
    return access(path, F_OK) == 0;
}

/* Written beside and renamed: who sees it sees all of it. */
static void put(const Comm *comm, const char *what, int operation, const void *bytes, size_t length) {
    char path[256], hidden[264];
    name(path, comm, what, operation, comm->rank);
    snprintf(hidden, sizeof hidden, "%s.new", path);
    FILE *file = fopen(hidden, "wb");
    if (!file) return;
    fwrite(bytes, 1, length, file);
    fclose(file);
    rename(hidden, path);
}

static int64_t *get(const Comm *comm, int operation, int rank, size_t *count) {
    char path[256];
    name(path, comm, "operation", operation, rank);
    FILE *file = fopen(path, "rb");
    if (!file) return NULL;
    fseek(file, 0, SEEK_END);
    long length = ftell(file);
    rewind(file);
    int64_t *values = malloc(length > 0 ? (size_t)length : 1);
    *count = fread(values, sizeof *values, (size_t)length / sizeof *values, file);
    fclose(file);
    return values;
}

/* Waits for a file of every rank. */
static int meet(Comm *comm, const char *what, int operation) {
    for (;;) {
        int there = 0;
        for (int rank = 0; rank < comm->size; rank++) {
            there += is_there(comm, what, operation, rank);
            if (is_there(comm, "gone", 0, rank) && !is_there(comm, what, operation, rank)) return REMOTE_ERROR;
        }
        if (there == comm->size) return SUCCESS;
        if (atomic_load(&comm->ended)) return INVALID_USAGE;
        usleep(200);
    }
}

static void stay(Comm *comm) {
    while (!atomic_load(&comm->ended)) usleep(1000);
}

static void *join(void *argument) {
    Comm *comm = argument;
#ifdef FAKE_INIT_STUCK
    stay(comm);
#endif
    int32_t size = comm->size;
    put(comm, "rank", 0, &size, sizeof size);
    atomic_store(&comm->state, meet(comm, "rank", 0));
    return NULL;
}

static void add(Comm *comm, int rank, const int64_t *values, size_t count, size_t first) {
    for (size_t i = 0; i < comm->count && first + i < count; i++) {
        uint64_t before = rank == 0 ? 0 : (uint64_t)comm->to[i];
        comm->to[i] = (int64_t)(before + (uint64_t)values[first + i]);
    }
}

static void *operate(void *argument) {
    Comm *comm = argument;
    int operation = comm->operation++;
    size_t whole = comm->kind == REDUCE_SCATTER ? comm->count * (size_t)comm->size : comm->count;
    if (operation == FAKE_STUCK_AFTER) stay(comm);
    if (operation == FAKE_ERROR_AFTER) {
        atomic_store(&comm->state, SYSTEM_ERROR);
        return NULL;
    }
    put(comm, "operation", operation, comm->from, whole * sizeof *comm->from);
    int met = meet(comm, "operation", operation);
    for (int rank = 0; met == SUCCESS && rank < comm->size; rank++) {
        size_t count = 0;
        int64_t *values = get(comm, operation, rank, &count);
        if (!values) met = SYSTEM_ERROR;
        else if (comm->kind == BROADCAST) {
            if (rank == comm->root) memcpy(comm->to, values, (count < whole ? count : whole) * sizeof *values);
        } else add(comm, rank, values, count, comm->kind == REDUCE_SCATTER ? comm->count * (size_t)comm->rank : 0);
        free(values);
    }
    /* All have read the one before the last: each has put the last. */
    char path[256];
    name(path, comm, "operation", operation - 2, comm->rank);
    unlink(path);
    atomic_store(&comm->state, met);
    return NULL;
}

static int begin(Comm *comm, void *(*work)(void *)) {
    if (comm->threaded) pthread_join(comm->thread, NULL);
    atomic_store(&comm->state, IN_PROGRESS);
    comm->threaded = pthread_create(&comm->thread, NULL, work, comm) == 0;
    return comm->threaded ? IN_PROGRESS : SYSTEM_ERROR;
}

static int call(Comm *comm, int kind, const void *from, void *to, size_t count, int type, int root) {
    if (type != 4 || atomic_load(&comm->state) != SUCCESS) return INVALID_USAGE;
    comm->kind = kind;
    comm->from = from;
    comm->to = to;
    comm->count = count;
    comm->root = root;
    return begin(comm, operate);
}

int ncclGetVersion(int *version) {
    *version = FAKE_VERSION;
    return SUCCESS;
}

int ncclGetUniqueId(Id *id) {
    memset(id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "%s/group-XXXXXX", FAKE_FOLDER);
    return mkdtemp(id->internal) ? SUCCESS : SYSTEM_ERROR;
}

int ncclCommInitRankConfig(Comm **comm, int size, Id id, int rank, Config *config) {
    if (config->magic != 0xcafebeef || config->size < offsetof(Config, blocking) + sizeof(int) || config->blocking != 0)
        return INVALID_ARGUMENT;
    if (rank < 0 || rank >= size) return INVALID_ARGUMENT;
#ifdef FAKE_INIT_REFUSED
    return INVALID_USAGE;
#endif
    Comm *made = calloc(1, sizeof *made);
    memcpy(made->folder, id.internal, sizeof made->folder);
    made->folder[sizeof made->folder - 1] = 0;
    made->rank = rank;
    made->size = size;
    if (is_there(made, "rank", 0, rank) || access(made->folder, F_OK) != 0) {
        free(made);
        return INVALID_USAGE;
    }
    *comm = made;
    return begin(made, join);
}

int ncclCommGetAsyncError(Comm *comm, int *state) {
    *state = atomic_load(&comm->state);
    return SUCCESS;
}

int ncclCommFinalize(Comm *comm) { return atomic_load(&comm->state); }

int ncclCommDestroy(Comm *comm) {
    atomic_store(&comm->ended, 1);
    if (comm->threaded) pthread_join(comm->thread, NULL);
    free(comm);
    return SUCCESS;
}

#ifndef FAKE_WITHOUT_ABORT
int ncclCommAbort(Comm *comm) {
#ifdef FAKE_ABORT_STUCK
    sleep(600);
#endif
#ifndef FAKE_SILENT
    put(comm, "gone", 0, "", 0);
#endif
    return ncclCommDestroy(comm);
}
#endif

int ncclAllReduce(const void *from, void *to, size_t count, int type, int sum, Comm *comm, void *stream) {
    (void)stream;
    return sum == 0 ? call(comm, ALL_REDUCE, from, to, count, type, 0) : INVALID_ARGUMENT;
}

int ncclReduceScatter(const void *from, void *to, size_t count, int type, int sum, Comm *comm, void *stream) {
    (void)stream;
    return sum == 0 ? call(comm, REDUCE_SCATTER, from, to, count, type, 0) : INVALID_ARGUMENT;
}

int ncclBroadcast(const void *from, void *to, size_t count, int type, int root, Comm *comm, void *stream) {
    (void)stream;
    return call(comm, BROADCAST, from, to, count, type, root);
}

const char *ncclGetErrorString(int result) {
    switch (result) {
        case SUCCESS: return "no error";
        case SYSTEM_ERROR: return "a system error, by order of a test";
        case INVALID_ARGUMENT: return "invalid argument";
        case INVALID_USAGE: return "invalid usage";
        case REMOTE_ERROR: return "a member is gone";
        default: return "unknown result";
    }
}
