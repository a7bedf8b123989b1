"""The commands of ``flowgraph``, a module each; heavy imports stay inside the functions."""
