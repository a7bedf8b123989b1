"""What a flow says: routes, backbone, gap to the max flow, layered baselines, statistics."""
