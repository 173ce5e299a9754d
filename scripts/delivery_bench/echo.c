/* The mark for scripts/bench-delivery: answers each message with its own payload, as a C programmer would write it.
 *
 * usage: echo HOST PORT IN_TOPIC OUT_TOPIC [3|5]
 * One thread, libmosquitto's own loop, QoS 1, TCP_NODELAY. Prints "ready" when the broker has granted the subscription.
 */
#include <mosquitto.h>
#include <mqtt_protocol.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *in_topic, *out_topic;

static void connected(struct mosquitto *client, void *data, int code)
{
    (void)data;
    if (code != 0) {
        fprintf(stderr, "echo: refused: %s\n", mosquitto_connack_string(code));
        exit(3);
    }
    mosquitto_subscribe(client, NULL, in_topic, 1);
}

static void subscribed(struct mosquitto *client, void *data, int id, int count, const int *granted)
{
    (void)client, (void)data, (void)id, (void)count, (void)granted;
    fprintf(stderr, "ready\n");
}

static void received(struct mosquitto *client, void *data, const struct mosquitto_message *message)
{
    (void)data;
    mosquitto_publish(client, NULL, out_topic, message->payloadlen, message->payload, 1, false);
}

int main(int count, char **arguments)
{
    if (count < 5) {
        fprintf(stderr, "usage: echo HOST PORT IN_TOPIC OUT_TOPIC [3|5]\n");
        return 2;
    }
    in_topic = arguments[3];
    out_topic = arguments[4];
    mosquitto_lib_init();
    struct mosquitto *client = mosquitto_new("bench.echo", true, NULL);
    if (client == NULL)
        return 3;
    if (count > 5 && strcmp(arguments[5], "5") == 0)
        mosquitto_int_option(client, MOSQ_OPT_PROTOCOL_VERSION, MQTT_PROTOCOL_V5);
    mosquitto_int_option(client, MOSQ_OPT_TCP_NODELAY, 1);
    mosquitto_connect_callback_set(client, connected);
    mosquitto_subscribe_callback_set(client, subscribed);
    mosquitto_message_callback_set(client, received);
    if (mosquitto_connect(client, arguments[1], atoi(arguments[2]), 60) != MOSQ_ERR_SUCCESS) {
        fprintf(stderr, "echo: cannot connect\n");
        return 3;
    }
    int result = mosquitto_loop_forever(client, -1, 1);
    mosquitto_destroy(client);
    mosquitto_lib_cleanup();
    return result == MOSQ_ERR_SUCCESS ? 0 : 3;
}
