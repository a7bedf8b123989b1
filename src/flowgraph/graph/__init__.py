"""FlowGraph, and how attention rows become its edges."""
