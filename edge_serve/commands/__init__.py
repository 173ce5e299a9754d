"""The sub-commands of `edge-serve`, one module each, imported when they are called; and the table of them."""

# name → (where the click command is, what `--help` says of it)
COMMANDS = {
    "convert": (
        "edge_serve_converters.cli:convert",
        "Turn a SavedModel, Keras or float .tflite model into a bundle of checked files.",
    ),
    "compare": ("edge_serve_converters.compare_cli:compare", "Compare two bundles on the same data."),
    "run": ("edge_serve.commands.run:run", "Serve the pipelines of a configuration until a signal."),
    "status": ("edge_serve.commands.status:status", "Show how the running service is, and what is wrong."),
    "reload": (
        "edge_serve.commands.reload:reload",
        "Let the running service read its configuration again, without losing a message.",
    ),
    "spool": (
        "edge_serve.commands.spool:spool",
        "Show, export or delete what waits on disk while an upstream is away.",
    ),
    "check": ("edge_serve.commands.check:check", "Find every mistake of a configuration; no connection is opened."),
    "config": ("edge_serve.commands.config:config", "Write a commented configuration to begin with."),
    "infer": ("edge_serve.commands.infer:infer", "Run a model once on photos, arrays or samples."),
    "inspect": ("edge_serve.commands.inspect:inspect", "Show a model's signatures, tensors, operators and delegates."),
    "bench": ("edge_serve.commands.bench:bench", "Measure a model on every delegate that is here."),
    "doctor": ("edge_serve.commands.doctor:doctor", "Find what is wrong with this machine, and say what to do."),
    "devices": ("edge_serve.commands.devices:devices", "List accelerators and cameras."),
    "send": ("edge_serve.commands.send:send", "Send inputs to a running pipeline's socket and print the answers."),
    "capture": (
        "edge_serve.commands.capture:capture",
        "Record what a running pipeline's model sees, as calibration data.",
    ),
    "service": ("edge_serve.commands.service:service", "Install, remove or look at the systemd service."),
    "demo": ("edge_serve.commands.demo:demo", "Serve the two demo models and check their results."),
}
