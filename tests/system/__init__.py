"""The whole thing: a real mosquitto, real `edge-serve` processes, real signals and real sockets."""
