/* An external TFLite delegate for tests, which does what its options say: right, wrong, late, never, or with a crash.
 *
 * It takes ADD of two float32 tensors of one shape and, as a stand-in Edge TPU, the custom operator "edgetpu-custom-op" (y = 2 x).
 * The structs are declared here, as far as they are used: no wheel ships TensorFlow Lite's headers. Their layout is the same
 * in tflite-runtime 2.14 and ai-edge-litert 2.x. Options are listed in __init__.py.
 */
#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <time.h>
#include <unistd.h>

enum { OK = 0, ERROR = 1, FLOAT32 = 1, BUILTIN_ADD = 0, BUILTIN_CUSTOM = 32, BUILTIN_DELEGATE = 51 };

typedef struct { int size; int data[]; } IntArray;

typedef struct {
    int type;
    void *data;
    IntArray *dims;
    struct { float scale; int32_t zero_point; } params;
    int allocation_type;
    size_t bytes;
    const void *allocation;
    const char *name;
    void *delegate;
    int buffer_handle;
    bool data_is_stale, is_variable;
    struct { int type; void *params; } quantization;
    void *sparsity;
    const IntArray *dims_signature;
} Tensor;

typedef struct {
    IntArray *inputs, *outputs, *intermediates, *temporaries;
    void *user_data, *builtin_data;
} Node; /* and more, which nobody here reads */

struct Context;
typedef struct {
    void *(*init)(struct Context *, const char *, size_t);
    void (*free)(struct Context *, void *);
    int (*prepare)(struct Context *, Node *);
    int (*invoke)(struct Context *, Node *);
    const char *(*profiling_string)(const struct Context *, const Node *);
    int32_t builtin_code;
    const char *custom_name;
    int version;
    void *rest[8]; /* larger than in any release: it is passed by value, and what is not known stays zero */
} Registration;

typedef struct {
    void *data;
    int (*prepare)(struct Context *, void *);
    void *buffer_functions[3];
    int64_t flags;
    void *builder;
} Delegate;

typedef struct Context {
    size_t tensors_size;
    int (*get_execution_plan)(struct Context *, IntArray **);
    Tensor *tensors;
    void *impl;
    int (*resize_tensor)(struct Context *, Tensor *, IntArray *);
    void (*report_error)(struct Context *, const char *, ...);
    int (*add_tensors)(struct Context *, int, int *);
    int (*get_node)(struct Context *, int, Node **, Registration **);
    int (*replace)(struct Context *, Registration, const IntArray *, Delegate *);
} Context;

typedef struct { Delegate *delegate; IntArray *nodes, *inputs, *outputs; } Params;

enum { MOST = 64 };
typedef struct { int number; struct { int first, second, output; bool tpu; } operators[MOST]; } Kernel;

static struct {
    char claims[16];       /* add, tpu, all, nothing */
    char prepare[16];      /* fail, crash, hang */
    char invoke[16];       /* fail, crash, hang, nan, wrong */
    long from;             /* from which run on (0: the first) */
    double off;            /* how wrong */
    long sleep_us;         /* what a run takes at least */
    char when[512];        /* only while this file is there */
    char unplugged[512];   /* while this file is there, runs fail */
    int lock;
} wishes;
static long runs;

static void hang(void) {
    for (;;)
        pause();
}

static int misbehave(Context *context, const char *what) {
    if (!strcmp(what, "crash"))
        raise(SIGSEGV);
    if (!strcmp(what, "hang"))
        hang();
    if (!strcmp(what, "fail")) {
        context->report_error(context, "the test delegate fails, as it was told to");
        return ERROR;
    }
    return OK;
}

static void *kernel_init(Context *context, const char *buffer, size_t length) {
    (void)length;
    const Params *params = (const Params *)buffer;
    Kernel *kernel = calloc(1, sizeof *kernel);
    for (int i = 0; i < params->nodes->size && i < MOST; i++) {
        Node *node;
        Registration *registration;
        context->get_node(context, params->nodes->data[i], &node, &registration);
        bool tpu = registration->builtin_code == BUILTIN_CUSTOM;
        kernel->operators[i].first = node->inputs->data[0];
        kernel->operators[i].second = tpu ? node->inputs->data[0] : node->inputs->data[1];
        kernel->operators[i].output = node->outputs->data[0];
        kernel->operators[i].tpu = tpu;
        kernel->number = i + 1;
    }
    return kernel;
}

static void kernel_free(Context *context, void *kernel) {
    (void)context;
    free(kernel);
}

static int kernel_prepare(Context *context, Node *node) {
    (void)node;
    return misbehave(context, wishes.prepare);
}

static int kernel_invoke(Context *context, Node *node) {
    bool now = runs++ >= wishes.from && (!*wishes.when || !access(wishes.when, F_OK));
    if (wishes.sleep_us) {
        struct timespec pause_for = {wishes.sleep_us / 1000000, wishes.sleep_us % 1000000 * 1000};
        nanosleep(&pause_for, NULL);
    }
    if (*wishes.unplugged && !access(wishes.unplugged, F_OK)) {
        context->report_error(context, "the test delegate's device is gone");
        return ERROR;
    }
    if (now && misbehave(context, wishes.invoke) != OK)
        return ERROR;
    const Kernel *kernel = node->user_data;
    for (int i = 0; i < kernel->number; i++) {
        const float *a = context->tensors[kernel->operators[i].first].data;
        const float *b = context->tensors[kernel->operators[i].second].data;
        Tensor *output = &context->tensors[kernel->operators[i].output];
        float *c = output->data;
        for (size_t k = 0; k < output->bytes / sizeof(float); k++)
            c[k] = a[k] + b[k] + (now && !strcmp(wishes.invoke, "wrong") ? (float)wishes.off : 0.0f);
        if (now && !strcmp(wishes.invoke, "nan"))
            c[0] = NAN;
    }
    return OK;
}

static bool mine(Context *context, int index) {
    Node *node;
    Registration *registration;
    if (context->get_node(context, index, &node, &registration) != OK)
        return false;
    bool all = !strcmp(wishes.claims, "all");
    if (registration->builtin_code == BUILTIN_CUSTOM)
        return (all || !strcmp(wishes.claims, "tpu")) && registration->custom_name &&
               !strcmp(registration->custom_name, "edgetpu-custom-op");
    if (registration->builtin_code != BUILTIN_ADD || !(all || !strcmp(wishes.claims, "add")) || node->inputs->size != 2)
        return false;
    const Tensor *a = &context->tensors[node->inputs->data[0]], *b = &context->tensors[node->inputs->data[1]];
    return a->type == FLOAT32 && b->type == FLOAT32 && a->bytes == b->bytes;
}

static int delegate_prepare(Context *context, void *data) {
    Delegate *delegate = data;
    IntArray *plan;
    if (context->get_execution_plan(context, &plan) != OK)
        return ERROR;
    IntArray *nodes = malloc(sizeof *nodes + sizeof(int) * (size_t)plan->size);
    nodes->size = 0;
    for (int i = 0; i < plan->size; i++)
        nodes->data[nodes->size++] = plan->data[i];
    int number = 0;
    for (int i = 0; i < nodes->size; i++)
        if (mine(context, nodes->data[i]))
            nodes->data[number++] = nodes->data[i];
    nodes->size = number;
    Registration kernel = {.init = kernel_init, .free = kernel_free, .prepare = kernel_prepare, .invoke = kernel_invoke};
    kernel.builtin_code = BUILTIN_DELEGATE;
    kernel.custom_name = "TestDelegate";
    kernel.version = 1;
    int status = number ? context->replace(context, kernel, nodes, delegate) : OK;
    free(nodes);
    return status;
}

static bool one_of(const char *value, const char *known) {
    char words[128], *rest = words;
    snprintf(words, sizeof words, "%s", known);
    for (char *word; (word = strsep(&rest, " "));)
        if (!strcmp(word, value))
            return true;
    return false;
}

Delegate *tflite_plugin_create_delegate(const char *const *keys, const char *const *values, size_t number,
                                        void (*report)(const char *)) {
    memset(&wishes, 0, sizeof wishes);
    snprintf(wishes.claims, sizeof wishes.claims, "all");
    wishes.off = 1.0;
    wishes.lock = -1;
    runs = 0;
    for (size_t i = 0; i < number; i++) {
        const char *key = keys[i], *value = values[i];
        if (!strcmp(key, "claims") && one_of(value, "add tpu all nothing"))
            snprintf(wishes.claims, sizeof wishes.claims, "%s", value);
        else if (!strcmp(key, "prepare") && one_of(value, "fail crash hang"))
            snprintf(wishes.prepare, sizeof wishes.prepare, "%s", value);
        else if (!strcmp(key, "invoke") && one_of(value, "fail crash hang nan wrong"))
            snprintf(wishes.invoke, sizeof wishes.invoke, "%s", value);
        else if (!strcmp(key, "from"))
            wishes.from = atol(value);
        else if (!strcmp(key, "off"))
            wishes.off = atof(value);
        else if (!strcmp(key, "sleep_us"))
            wishes.sleep_us = atol(value);
        else if (!strcmp(key, "when"))
            snprintf(wishes.when, sizeof wishes.when, "%s", value);
        else if (!strcmp(key, "unplugged")) {
            snprintf(wishes.unplugged, sizeof wishes.unplugged, "%s", value);
            if (!access(value, F_OK)) {
                report("no device is there");
                return NULL;
            }
        } else if (!strcmp(key, "lock")) {
            wishes.lock = open(value, O_CREAT | O_RDWR | O_CLOEXEC, 0600);
            if (wishes.lock < 0 || flock(wishes.lock, LOCK_EX | LOCK_NB)) {
                report("the device is in use");
                return NULL;
            }
        } else if (!strcmp(key, "create") && !strcmp(value, "refuse")) {
            report("the test delegate refuses, as it was told to");
            return NULL;
        } else if (!strcmp(key, "create") && !strcmp(value, "crash"))
            raise(SIGSEGV);
        else if (!strcmp(key, "create") && !strcmp(value, "hang"))
            hang();
        else if (strcmp(key, "device")) {
            char text[256];
            snprintf(text, sizeof text, "unknown option %.80s = %.80s", key, value);
            report(text);
            return NULL;
        }
    }
    Delegate *delegate = calloc(1, sizeof *delegate);
    delegate->prepare = delegate_prepare;
    delegate->flags = !strcmp(wishes.claims, "tpu") ? 1 : 0; /* allow dynamic tensors, as libedgetpu does */
    return delegate;
}

void tflite_plugin_destroy_delegate(Delegate *delegate) {
    if (wishes.lock >= 0)
        close(wishes.lock);
    wishes.lock = -1;
    free(delegate);
}
