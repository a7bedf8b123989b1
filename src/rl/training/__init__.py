"""The PPO loop, its updates, checkpoints, logging and distribution."""
