"""Train LoRA policies by PPO with token credit shaped by reasoning flow (under construction)."""
