"""Read a flow: routes, backbone, gap to the max flow, layered baselines, statistics."""
