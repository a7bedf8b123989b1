"""Pure functions of the PPO family: advantages, losses, schedules."""
