"""FlowTrace: make one from a model and a text, save it, load it, describe it as JSON."""
