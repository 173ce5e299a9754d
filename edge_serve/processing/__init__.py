"""Processing: payload bytes become the model's tensors, and its output tensors become a result's JSON body."""
