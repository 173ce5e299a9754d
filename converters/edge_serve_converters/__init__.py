"""edge-serve's converter: TensorFlow SavedModels become bundles. Only the child process in worker.py imports tensorflow."""
