/* The load of scripts/bench-delivery: keeps WINDOW messages on the way and times each from its publish to its answer.
 *
 * usage: load HOST PORT IN_TOPIC OUT_TOPIC WINDOW COUNT WARM_UP SIZE [3|5]
 * Publishes at QoS 1 to IN_TOPIC and takes what comes on OUT_TOPIC for the answers, in order. Prints one JSON document:
 * {"count", "seconds", "rate" (answers a second), "p10_us", "p50_us", "p99_us", "answer_bytes" (of the last one)}.
 */
#include <mosquitto.h>
#include <mqtt_protocol.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define MOST_ON_THE_WAY 1024
#define SILENCE_S 30.0

static const char *in_topic, *out_topic;
static int window, total, warm_up, size;
static int sent, answered;
static double sent_at[MOST_ON_THE_WAY];
static double *taken;
static double began, last;
static int answer_bytes;
static char *payload;

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static void send_one(struct mosquitto *client)
{
    sent_at[sent % MOST_ON_THE_WAY] = now();
    sent++;
    int result = mosquitto_publish(client, NULL, in_topic, size, payload, 1, false);
    if (result != MOSQ_ERR_SUCCESS) {
        fprintf(stderr, "load: cannot publish: %s\n", mosquitto_strerror(result));
        exit(3);
    }
}

static void connected(struct mosquitto *client, void *data, int code)
{
    (void)data;
    if (code != 0) {
        fprintf(stderr, "load: refused: %s\n", mosquitto_connack_string(code));
        exit(3);
    }
    mosquitto_subscribe(client, NULL, out_topic, 1);
}

static void subscribed(struct mosquitto *client, void *data, int id, int count, const int *granted)
{
    (void)data, (void)id, (void)count, (void)granted;
    last = now();
    while (sent < window && sent < total)
        send_one(client);
}

static void received(struct mosquitto *client, void *data, const struct mosquitto_message *message)
{
    (void)data;
    double moment = now();
    if (answered == warm_up)
        began = moment;
    if (answered > warm_up)
        taken[answered - warm_up - 1] = moment - sent_at[answered % MOST_ON_THE_WAY];
    answered++;
    last = moment;
    answer_bytes = message->payloadlen;
    if (sent < total)
        send_one(client);
    else if (answered == total)
        mosquitto_disconnect(client);
}

static int ascending(const void *left, const void *right)
{
    double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

int main(int count, char **arguments)
{
    if (count < 9) {
        fprintf(stderr, "usage: load HOST PORT IN_TOPIC OUT_TOPIC WINDOW COUNT WARM_UP SIZE [3|5]\n");
        return 2;
    }
    in_topic = arguments[3];
    out_topic = arguments[4];
    window = atoi(arguments[5]);
    warm_up = atoi(arguments[7]);
    total = atoi(arguments[6]) + warm_up + 1;
    size = atoi(arguments[8]);
    if (window < 1 || window > MOST_ON_THE_WAY || total <= warm_up + 1 || size < 0) {
        fprintf(stderr, "load: impossible numbers\n");
        return 2;
    }
    taken = calloc((size_t)total, sizeof *taken);
    /* Bytes that are no JSON: a raw tensor. */
    payload = malloc((size_t)size + 1);
    if (taken == NULL || payload == NULL)
        return 3;
    for (int i = 0; i < size; i++)
        payload[i] = (char)(1 + i % 7);
    mosquitto_lib_init();
    struct mosquitto *client = mosquitto_new("bench.load", true, NULL);
    if (client == NULL)
        return 3;
    if (count > 9 && strcmp(arguments[9], "5") == 0)
        mosquitto_int_option(client, MOSQ_OPT_PROTOCOL_VERSION, MQTT_PROTOCOL_V5);
    mosquitto_int_option(client, MOSQ_OPT_TCP_NODELAY, 1);
    mosquitto_max_inflight_messages_set(client, MOST_ON_THE_WAY);
    mosquitto_connect_callback_set(client, connected);
    mosquitto_subscribe_callback_set(client, subscribed);
    mosquitto_message_callback_set(client, received);
    if (mosquitto_connect(client, arguments[1], atoi(arguments[2]), 60) != MOSQ_ERR_SUCCESS) {
        fprintf(stderr, "load: cannot connect\n");
        return 3;
    }
    last = now();
    while (answered < total && now() - last < SILENCE_S)
        if (mosquitto_loop(client, 1000, 1) != MOSQ_ERR_SUCCESS)
            break;
    if (answered < total) {
        fprintf(stderr, "load: %d of %d answers\n", answered, total);
        return 1;
    }
    int measured = total - warm_up - 1;
    double seconds = last - began;
    qsort(taken, (size_t)measured, sizeof *taken, ascending);
    printf("{\"count\": %d, \"seconds\": %.6f, \"rate\": %.1f, \"p10_us\": %.2f, \"p50_us\": %.2f, \"p99_us\": %.2f, \"answer_bytes\": %d}\n",
           measured, seconds, measured / seconds, taken[measured / 10] * 1e6, taken[measured / 2] * 1e6, taken[(int)(measured * 0.99)] * 1e6,
           answer_bytes);
    mosquitto_destroy(client);
    mosquitto_lib_cleanup();
    return 0;
}
